"""From what a user names to the comparisons of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.data.groups import PreferenceSet
from engine.data.loader import require_a_step
from engine.preferences import (
    PreferenceDataConfig,
    describe_preferences,
    open_held_out_preferences,
    open_preferences,
)
from model.chat import ChatTemplate
from model.errors import InputError
from model.tokenizer import Tokenizer
from model.tokenizer_training import train_tokenizer
from tests.engine.data.comparisons import comparisons
from tests.engine.data.dialogues import write
from tests.engine.data.test_groups import BAD, FAIR, GOOD, pair, row


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    directory = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer([record["prompt"] for record in comparisons(200)], directory, vocab_size=400)
    return Tokenizer.load(directory)


def opened(
    tmp_path: Path, tokenizer: Tokenizer, paths: list[Path], context: int = 128, **options: Any
) -> PreferenceSet:
    config = PreferenceDataConfig(paths=list(map(str, paths)), workers=1, **options)
    return open_preferences(config, ChatTemplate.named("chimed", tokenizer), tokenizer, context, tmp_path / "run")


def hold_out(
    groups: PreferenceSet, tmp_path: Path, tokenizer: Tokenizer, fraction: float = 0.0, paths: tuple[Path, ...] = ()
) -> tuple[PreferenceSet, PreferenceSet | None]:
    config, template = PreferenceDataConfig(workers=1), ChatTemplate.named("chimed", tokenizer)
    return open_held_out_preferences(
        groups, fraction, list(map(str, paths)), config, template, tokenizer, 128, tmp_path / "run"
    )


def questions(groups: PreferenceSet | None, tokenizer: Tokenizer) -> list[str]:
    """First questions, in the order of groups."""
    assert groups is not None
    texts = [tokenizer.decode(groups.group(number).ids[0].tolist()) for number in groups.documents().tolist()]
    return [text.removeprefix("[human]:").partition("\n[bot]:")[0] for text in texts]


def test_what_was_read_left_out_and_shortened_is_said(
    tmp_path: Path, tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    long = {**pair("长？"), "history": [["问", "答"]] * 40}
    candidates = [row(1, GOOD, "甲？"), row(1, GOOD, "乙？"), row(1, BAD, "乙？")]
    graded = [row(place % 2, f"{place}号", "丙？") for place in range(6)]
    records = [pair(), pair(), long, pair(rejected=GOOD), pair("丁？", "一", "一"), {"a": 1}, *candidates, *graded]
    groups = opened(tmp_path, tokenizer, [write(tmp_path / "a.jsonl", records)], max_responses=4)
    said = capsys.readouterr().err
    assert f"Files read: 1 utf-8; 3 prompts with 8 answers, {groups.num_tokens:,} tokens." in said
    first = f"(first {tmp_path}/a.jsonl:"
    assert f"Left out: 3 records (2 x the better and the worse answer are the same {first}4), 1 x no comparison" in said
    assert f"2 questions (1 x this question has one answer {first}7), 1 x all 2 answers to this question have" in said
    assert "2 answers beyond --data.max_responses." in said
    assert "Longer than the context of 128 tokens: 1 prompts lost their" in said
    size = f"3 prompts with 8 answers, {groups.num_tokens:,} tokens to train on"
    assert describe_preferences(groups, None) == f"{size}; 1 exact duplicates dropped."


def test_a_context_that_leaves_nothing_is_named_as_what_to_raise(tmp_path: Path, tokenizer: Tokenizer) -> None:
    data = write(tmp_path / "a.jsonl", [pair("甲？", GOOD * 30)])
    with pytest.raises(InputError, match=r"no comparison .* context of 64 tokens .*\. Raise --train\.context"):
        opened(tmp_path, tokenizer, [data], context=64)


def test_too_few_tokens_for_a_step_are_laid_to_the_context_that_left_records_out(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    records = [pair(), *(pair(f"{number}？", GOOD * 30) for number in range(4)), pair("丁？", "一", "一")]
    groups = opened(tmp_path, tokenizer, [write(tmp_path / "a.jsonl", records)], context=64)
    assert groups.num_groups == 1
    with pytest.raises(
        InputError, match=r": 4 of 6 records are left out, longer than the context of 64 tokens\. Raise"
    ):
        require_a_step(groups, 9999)


def test_prepared_once_and_mapped_by_whoever_comes_next(tmp_path: Path, tokenizer: Tokenizer) -> None:
    raw = write(tmp_path / "a.jsonl", comparisons(5))
    first = opened(tmp_path, tokenizer, [raw])
    (directory,) = (tmp_path / "run" / "prepared").iterdir()
    stamps = [(directory / name).stat().st_mtime_ns for name in ("prepared.json", "groups.json")]
    again = opened(tmp_path, tokenizer, [raw])
    assert again.fingerprint == first.fingerprint
    assert stamps == [(directory / name).stat().st_mtime_ns for name in ("prepared.json", "groups.json")]
    assert isinstance(again.store.groups, np.memmap)
    others = [opened(tmp_path, tokenizer, [raw], context=64), opened(tmp_path, tokenizer, [raw], max_responses=2)]
    assert len({first.fingerprint, *(other.fingerprint for other in others)}) == 3
    with pytest.raises(InputError, match=r"prepared; comparisons are prepared by the job"):
        opened(tmp_path, tokenizer, [directory])


def test_an_index_that_a_kill_left_unfinished_is_made_again(tmp_path: Path, tokenizer: Tokenizer) -> None:
    raw = write(tmp_path / "a.jsonl", comparisons(5))
    first = opened(tmp_path, tokenizer, [raw])
    (directory,) = (tmp_path / "run" / "prepared").iterdir()
    (directory / "groups.json").unlink()  # written last
    (directory / "members.npy").write_bytes(b"half")
    assert opened(tmp_path, tokenizer, [raw]).fingerprint == first.fingerprint


def test_a_question_is_on_one_side_of_the_split_whatever_its_answers(tmp_path: Path, tokenizer: Tokenizer) -> None:
    records = [pair(f"第{n % 200}问", f"{GOOD}{n}") for n in range(600)]
    groups = opened(tmp_path, tokenizer, [write(tmp_path / "a.jsonl", records)])
    train, held_out = hold_out(groups, tmp_path, tokenizer, fraction=0.2)
    kept, held = questions(train, tokenizer), questions(held_out, tokenizer)
    assert sorted(kept + held) == sorted(record["prompt"] for record in records)
    assert not set(kept) & set(held)
    assert 15 < len(set(held)) < 65  # Binomial(200, 0.2): mean 40, standard deviation 5.7


def test_held_out_questions_are_not_trained_on(
    tmp_path: Path, tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    raw = write(tmp_path / "a.jsonl", [pair("甲"), pair("乙"), pair(" 乙 ", FAIR), pair("丙")])
    groups = opened(tmp_path, tokenizer, [raw])
    other = write(tmp_path / "b.jsonl", [row(1, GOOD, "乙"), row(0, BAD, "乙"), pair("丁")])
    train, held_out = hold_out(groups, tmp_path, tokenizer, paths=(other,))
    assert questions(train, tokenizer) == ["甲", "丙"] and questions(held_out, tokenizer) == ["乙", "丁"]
    assert "2 training prompts begin with a held-out question" in capsys.readouterr().err
    assert held_out is not None and "2 prompts with 4 answers" in describe_preferences(train, held_out)
    with pytest.raises(InputError, match="All training questions are held out"):
        hold_out(groups, tmp_path, tokenizer, paths=(raw,))


def test_one_question_is_not_split(tmp_path: Path, tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]) -> None:
    groups = opened(tmp_path, tokenizer, [write(tmp_path / "a.jsonl", [pair(), pair(chosen=FAIR)])])
    train, held_out = hold_out(groups, tmp_path, tokenizer, 0.5)
    assert train.num_groups == 2 and held_out is None
    assert "so none is held out" in capsys.readouterr().err


def test_files_that_compare_nothing_are_refused(tmp_path: Path, tokenizer: Tokenizer) -> None:
    alone = write(tmp_path / "a.jsonl", [row(1, GOOD, "甲"), row(1, GOOD, "乙")])
    with pytest.raises(
        InputError, match=r"comparison of answers \(2 x this question has one answer \(first .*a.jsonl:1\)\)"
    ):
        opened(tmp_path, tokenizer, [alone])
    with pytest.raises(InputError, match="There is no data"):
        opened(tmp_path, tokenizer, [])


def test_a_source_may_weigh_more(tmp_path: Path, tokenizer: Tokenizer) -> None:
    paths = [write(tmp_path / f"{seed}.jsonl", comparisons(10, seed)) for seed in (1, 2)]
    groups = opened(tmp_path, tokenizer, paths, weights=[1, 3])
    first, second = groups.source_tokens
    assert groups.epoch_tokens == first + 3 * second
    with pytest.raises(InputError, match=r"--data\.weights has 1 numbers for 2 sources"):
        opened(tmp_path, tokenizer, paths, weights=[2])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keys": {"patient": "a", "chosen": "b"}}, "patient is none of user, assistant"),
        ({"keys": {"user": "a", "chosen": "b"}}, "needs chosen=FIELD and rejected=FIELD"),
        ({"keys": {"chosen": "a", "rejected": ""}}, "a field's name is missing"),
        ({"system": " "}, "--data.system is empty"),
        ({"max_responses": 1}, r"--data.max_responses is 1"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        PreferenceDataConfig(**options).check()
