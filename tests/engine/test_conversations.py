"""From what a user names to the conversations of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from engine.conversations import (
    ConversationDataConfig,
    describe_conversations,
    first_whole,
    open_conversations,
    open_held_out_conversations,
)
from engine.corpora import DataConfig, open_data
from engine.data.corpus import Corpus
from engine.data.loader import require_a_step
from engine.data.shards import TRAINED
from model.chat import ChatTemplate
from model.errors import InputError
from model.tokenizer import Tokenizer
from model.tokenizer_training import train_tokenizer
from tests.engine.data.dialogues import dialogues, write

Q, A = "头疼怎么办？", "先休息。"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    directory = tmp_path_factory.mktemp("tokenizer")
    texts = [turn["value"] for record in dialogues(40) for turn in record["conversations"]]
    train_tokenizer(texts, directory, vocab_size=400)
    return Tokenizer.load(directory)


def ask(question: str, answer: str = A) -> dict[str, str]:
    return {"question": question, "answer": answer}


def opened(tmp_path: Path, tokenizer: Tokenizer, paths: list[Path], context: int = 128, **options: Any) -> Corpus:
    config = ConversationDataConfig(paths=list(map(str, paths)), workers=1, **options)
    return open_conversations(config, ChatTemplate.named("chimed", tokenizer), tokenizer, context, tmp_path / "run")


def hold_out(
    corpus: Corpus, tmp_path: Path, tokenizer: Tokenizer, fraction: float = 0.0, paths: tuple[Path, ...] = ()
) -> tuple[Corpus, Corpus | None]:
    config = ConversationDataConfig(workers=1)
    template = ChatTemplate.named("chimed", tokenizer)
    return open_held_out_conversations(
        corpus, fraction, list(map(str, paths)), config, template, tokenizer, 128, tmp_path / "run"
    )


def questions(corpus: Corpus | None, tokenizer: Tokenizer) -> list[str]:
    """First questions, in the order of documents."""
    assert corpus is not None
    texts = [tokenizer.decode((corpus.read(document) % TRAINED).tolist()) for document in corpus.documents().tolist()]
    return [text.removeprefix("[human]:").partition("\n[bot]:")[0] for text in texts]


def test_the_conversation_that_is_shown_is_whole_where_there_is_one(tmp_path: Path, tokenizer: Tokenizer) -> None:
    ends = ChatTemplate.named("chimed", tokenizer).end_ids(tokenizer)
    cut = [ask(f"{question}{Q}", A * 60) for question in "甲乙"]
    mixed = opened(tmp_path, tokenizer, [write(tmp_path / "mixed.jsonl", [*cut, ask("丙"), ask("丁")])])
    assert mixed.documents()[0] == 0 and mixed.read(0)[-1] % TRAINED not in ends
    shown = first_whole(mixed, ends)
    assert shown == 2 and mixed.read(shown)[-1] % TRAINED in ends
    assert first_whole(opened(tmp_path, tokenizer, [write(tmp_path / "cut.jsonl", cut)]), ends) == 0


def test_what_was_read_left_out_and_shortened_is_said(
    tmp_path: Path, tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    long = {"conversations": [text for turn in range(30) for text in (Q, A)]}
    last = {"conversations": ["甲", A, "乙"]}
    raw = write(tmp_path / "a.jsonl", [ask("丙"), long, last, ask("丁", ""), ask("戊", ""), {"note": 1}])
    corpus = opened(tmp_path, tokenizer, [raw])
    said = capsys.readouterr().err
    assert corpus.kind == "conversations" and corpus.num_documents == 3
    assert "Files read: 1 utf-8; 3 conversations with" in said
    assert f"3 records (2 x turn 2 (assistant) is empty (first {raw}:4), 1 x no conversation is known" in said
    assert "the last question of 1 conversations, which nobody answers" in said
    assert "Longer than the context of 128 tokens: 1 conversations lost their" in said
    assert describe_conversations(corpus, None) == f"3 conversations, {corpus.num_tokens:,} tokens to train on."


def test_too_few_tokens_for_a_step_are_laid_to_the_context_that_left_records_out(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    raw = write(tmp_path / "a.jsonl", [ask("丙"), *(ask(f"{number}" + Q * 30) for number in range(4)), ask("丁", "")])
    corpus = opened(tmp_path, tokenizer, [raw], context=64)
    assert corpus.num_documents == 1
    with pytest.raises(
        InputError, match=r"a step takes 9,999: 4 of 6 records are left out, longer than the context of 64 .*context,"
    ):
        require_a_step(corpus, 9999)


def test_prepared_once_and_found_again(tmp_path: Path, tokenizer: Tokenizer) -> None:
    raw = write(tmp_path / "a.jsonl", dialogues(5))
    first = opened(tmp_path, tokenizer, [raw])
    (directory,) = (tmp_path / "run" / "prepared").iterdir()
    stamp = (directory / "prepared.json").stat().st_mtime_ns
    assert opened(tmp_path, tokenizer, [raw]).fingerprint == first.fingerprint
    assert (directory / "prepared.json").stat().st_mtime_ns == stamp
    assert opened(tmp_path, tokenizer, [directory]).fingerprint == first.fingerprint
    assert opened(tmp_path, tokenizer, [raw], context=64).fingerprint != first.fingerprint
    with pytest.raises(InputError, match=r"prepared for another --train\.context"):
        opened(tmp_path, tokenizer, [directory], context=64)
    with pytest.raises(InputError, match=r"is prepared, .* is raw"):
        opened(tmp_path, tokenizer, [directory, raw])


def test_a_question_is_on_one_side_of_the_split_whatever_its_answers(tmp_path: Path, tokenizer: Tokenizer) -> None:
    records = [ask(f"第{n % 200}问", f"{A}{n}") for n in range(600)]
    corpus = opened(tmp_path, tokenizer, [write(tmp_path / "a.jsonl", records)])
    train, held_out = hold_out(corpus, tmp_path, tokenizer, fraction=0.2)
    kept, held = questions(train, tokenizer), questions(held_out, tokenizer)
    assert sorted(kept + held) == sorted(record["question"] for record in records)
    assert not set(kept) & set(held)
    assert 15 < len(set(held)) < 65  # Binomial(200, 0.2): mean 40, standard deviation 5.7
    # What else the corpus holds does not matter.
    more = opened(tmp_path, tokenizer, [write(tmp_path / "b.jsonl", [*dialogues(50), *records[::-1]])])
    assert set(held) <= set(questions(hold_out(more, tmp_path, tokenizer, fraction=0.2)[1], tokenizer))


@pytest.mark.parametrize("fraction", [1e-9, 0.999999])
def test_two_questions_are_enough_for_a_split(tmp_path: Path, tokenizer: Tokenizer, fraction: float) -> None:
    records = [ask("甲", "一"), ask("乙", "一"), ask("甲", "二"), ask("乙", "二")]
    corpus = opened(tmp_path, tokenizer, [write(tmp_path / "a.jsonl", records)])
    train, held_out = hold_out(corpus, tmp_path, tokenizer, fraction)
    assert {tuple(questions(side, tokenizer)) for side in (train, held_out)} == {("甲", "甲"), ("乙", "乙")}


def test_one_question_is_not_split(tmp_path: Path, tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]) -> None:
    corpus = opened(tmp_path, tokenizer, [write(tmp_path / "a.jsonl", [ask("甲", "一"), ask("甲", "二")])])
    train, held_out = hold_out(corpus, tmp_path, tokenizer, 0.5)
    assert train.num_documents == 2 and held_out is None
    assert "so none is held out" in capsys.readouterr().err


def test_held_out_questions_are_not_trained_on(
    tmp_path: Path, tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus = opened(
        tmp_path, tokenizer, [write(tmp_path / "a.jsonl", [ask("甲"), ask("乙"), ask(" 乙 ", "二"), ask("丙")])]
    )
    other = write(tmp_path / "b.jsonl", [ask("乙", "三"), ask("丁")])
    train, held_out = hold_out(corpus, tmp_path, tokenizer, paths=(other,))
    assert questions(train, tokenizer) == ["甲", "丙"] and questions(held_out, tokenizer) == ["乙", "丁"]
    assert "2 training conversations begin with a held-out question" in capsys.readouterr().err
    everything = write(tmp_path / "c.jsonl", [ask(name) for name in "甲乙丙"])
    with pytest.raises(InputError, match="All training questions are held out"):
        hold_out(corpus, tmp_path, tokenizer, paths=(everything,))


def test_exact_duplicates_are_trained_on_once(tmp_path: Path, tokenizer: Tokenizer) -> None:
    corpus = opened(
        tmp_path, tokenizer, [write(tmp_path / "a.jsonl", [ask("甲"), ask("乙"), ask("甲"), ask("甲", "二")])]
    )
    assert questions(corpus, tokenizer) == ["甲", "乙", "甲"] and corpus.num_duplicates == 1


def test_sources_have_weights(tmp_path: Path, tokenizer: Tokenizer) -> None:
    paths = [write(tmp_path / f"{n}.jsonl", dialogues(4, seed=n)) for n in range(2)]
    corpus = opened(tmp_path, tokenizer, paths, weights=[1.0, 0.5])
    assert corpus.epoch_tokens == corpus.source_tokens[0] + corpus.source_tokens[1] // 2


def test_texts_and_conversations_are_not_taken_for_one_another(tmp_path: Path, tokenizer: Tokenizer) -> None:
    text = write(tmp_path / "text.jsonl", [{"text": f"第{n}例：高血压患者应低盐饮食，按时服药。"} for n in range(3)])
    talk = write(tmp_path / "talk.jsonl", [{"instruction": Q, "output": A}])
    with pytest.raises(InputError, match=r"text\.jsonl:1: .*texts are for tools/pretrain\.py"):
        opened(tmp_path, tokenizer, [text])
    with pytest.raises(InputError, match=r"talk\.jsonl:1: .*conversations are for tools/sft\.py"):
        open_data(DataConfig(paths=[str(talk)]), tokenizer, tmp_path / "run")
    texts = open_data(DataConfig(paths=[str(text)], workers=1), tokenizer, tmp_path / "texts")
    with pytest.raises(InputError, match=r"it holds texts, not conversations\. Give it to tools/pretrain\.py"):
        opened(tmp_path, tokenizer, [texts.store.prepared[0].directory])
    talks = opened(tmp_path, tokenizer, [talk]).store.prepared[0].directory
    with pytest.raises(InputError, match=r"it holds conversations, not texts\. Give it to tools/sft\.py"):
        open_data(DataConfig(paths=[str(talks)]), tokenizer, tmp_path / "run")


def test_records_without_answers_are_no_training_data(tmp_path: Path, tokenizer: Tokenizer) -> None:
    raw = write(tmp_path / "a.jsonl", [{"conversations": [Q]}])
    with pytest.raises(InputError, match=r"no conversation \(1 x it holds no answer \(first .*a.jsonl:1\)\)"):
        opened(tmp_path, tokenizer, [raw])
    compared = write(tmp_path / "b.jsonl", [{"conversations": [Q], "chosen": A, "rejected": "不知道。"}])
    sentence = r"b\.jsonl:1: it holds no answer; comparisons are for tools/rm\.py and tools/dpo\.py\. "
    with pytest.raises(InputError, match=sentence):
        opened(tmp_path, tokenizer, [compared])
    with pytest.raises(InputError, match="There is no data"):
        opened(tmp_path, tokenizer, [])


def test_a_context_that_leaves_nothing_is_named_as_what_to_raise(tmp_path: Path, tokenizer: Tokenizer) -> None:
    data = write(tmp_path / "a.jsonl", [ask("头晕乏力咳嗽" * 30)])
    with pytest.raises(InputError, match=r"no conversation .* context of 64 .*\. Raise --train\.context"):
        opened(tmp_path, tokenizer, [data], context=64)


def test_held_out_files_without_conversations_name_their_own_option(tmp_path: Path, tokenizer: Tokenizer) -> None:
    corpus = opened(tmp_path, tokenizer, [write(tmp_path / "a.jsonl", [ask(Q)])])
    with pytest.raises(InputError, match=r"empty\.jsonl: there is no conversation\. Give --eval\.data other files"):
        hold_out(corpus, tmp_path, tokenizer, paths=(write(tmp_path / "empty.jsonl", []),))
