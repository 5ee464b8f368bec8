"""Training: the same bytes every time, no text silently lost, and sizes that cannot be met refused with the limit."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from model.errors import InputError
from model.tokenizer import Tokenizer
from model.tokenizer_report import HeldOutLines, measure
from model.tokenizer_sentencepiece import NORMAL, read_sentencepiece
from model.tokenizer_training import coverage_that_fits, sample_lines, train_sentencepiece, train_tokenizer
from tests.model.tokenizer_bases import sentences


def test_two_trainings_write_identical_directories(tmp_path: Path) -> None:
    for name in ("one", "two"):
        train_tokenizer(iter(sentences(0, 300)), tmp_path / name, 460)
    files = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert files == ["tokenizer.json", "tokenizer.model", "tokenizer_config.json"]
    for name in files:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_every_character_but_the_cuts_reaches_training() -> None:
    texts = ["a\tb\r\nc\0d", "", "\n\n", "▅mark▁mark", "长" * 10_000 + "\n短", "  spaces  kept  "]
    lines, sample = sample_lines(iter(texts), max_characters=10**9, seed=0)
    assert "".join(lines) == re.sub("[\t\r\n\0\u2581\u2585]", "", "".join(texts))
    assert (sample.texts, sample.long_lines) == (6, 1)
    assert sample.characters == sum(map(len, texts)) and sample.used_characters == sum(map(len, lines))
    assert max(map(len, lines)) == 4096


def test_a_corpus_beyond_the_limit_is_sampled_evenly_and_the_same_way_each_time() -> None:
    texts = [f"{number:05d}" for number in range(10_000)]
    lines, sample = sample_lines(iter(texts), max_characters=10_000, seed=1)
    assert sample.used_characters == 10_000 and sample.characters == 50_000
    assert lines == sorted(set(lines)) and len(lines) == 2000
    assert lines == sample_lines(iter(texts), max_characters=10_000, seed=1)[0]
    assert lines != sample_lines(iter(texts), max_characters=10_000, seed=2)[0]
    # 200 are expected of each tenth; the binomial's standard deviation is 13 before the total is fixed.
    tenths = [sum(line.startswith(str(tenth), 1) for line in lines) for tenth in range(10)]
    assert min(tenths) > 200 - 5 * 13 and max(tenths) < 200 + 5 * 13


def test_special_tokens_line_ends_and_digits_are_as_in_llama(tmp_path: Path) -> None:
    train_tokenizer(["2024 2024 2024\n\n2024\n"] * 50 + sentences(0, 200), tmp_path, 480)
    tokenizer = Tokenizer.load(tmp_path)
    assert [tokenizer.piece(index) for index in range(4)] == ["<unk>", "<s>", "</s>", "<pad>"]
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.add_bos) == (1, 2, 3, True)
    assert [tokenizer.piece(index) for index in tokenizer.encode("\n\n")] == ["<0x0A>", "<0x0A>"]
    assert len(tokenizer.encode("2024")) == 4
    assert len(tokenizer.encode("高血压病人")) < 5
    assert tokenizer.vocab_size == 480 and tokenizer.padded_vocab_size == 512


def test_spaces_come_back_from_a_tokenizer_that_saw_none(tmp_path: Path) -> None:
    texts = [text.replace(" ", "") for text in sentences(0, 300)]
    train_tokenizer(iter(texts), tmp_path, 460)
    tokenizer = Tokenizer.load(tmp_path)
    for text in ("药物 阿司匹林", " 前后 "):
        assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("size", [100, 100_000])
def test_a_size_that_cannot_be_met_is_refused_with_the_one_that_can(size: int, tmp_path: Path) -> None:
    texts = sentences(0, 100)
    with pytest.raises(InputError, match=r"at least \d+|at most \d+") as refusal:
        train_tokenizer(texts, tmp_path / "no", size)
    found = re.search(r"at (?:least|most) (\d+)", str(refusal.value))
    assert found is not None
    limit = int(found[1])
    train_tokenizer(texts, tmp_path / "yes", limit)
    assert Tokenizer.load(tmp_path / "yes").vocab_size == limit
    with pytest.raises(InputError):
        train_tokenizer(texts, tmp_path / "no", limit + (1 if size > limit else -1))
    assert not (tmp_path / "no").exists()


def test_nothing_to_train_on_is_said() -> None:
    for texts in ([], ["", "\n\t"]):
        with pytest.raises(InputError, match="no text"):
            train_sentencepiece(sample_lines(texts, 1000, 0)[0], 500)


@pytest.mark.parametrize("coverage", [0.0, 1.1, float("nan")])
def test_a_coverage_that_is_no_share_is_refused(coverage: float) -> None:
    with pytest.raises(InputError, match=f"coverage of {coverage}"):
        train_sentencepiece(["text"], 500, coverage)


def learnt(model: bytes) -> tuple[set[str], list[str]]:
    """The single characters, but for the space that every model has, and the longer pieces of a model."""
    pieces = [piece.piece for piece in read_sentencepiece(model, Path("m")).pieces if piece.type == NORMAL]
    return {piece for piece in pieces if len(piece) == 1} - {"\u2581"}, [piece for piece in pieces if len(piece) > 1]


@pytest.mark.parametrize(("coverage", "characters"), [(1.0, "甲乙丙丁"), (0.81, "甲乙丙"), (0.8, "甲乙"), (0.5, "甲")])
def test_the_most_frequent_characters_get_pieces_until_the_share_is_covered(coverage: float, characters: str) -> None:
    text = ["甲" * 5 + "乙" * 3 + "丙" + "丁"] * 10  # shares of 0.5, 0.3, 0.1 and 0.1
    assert learnt(train_sentencepiece(text, 300, coverage, is_limit_soft=True))[0] == set(characters)


@pytest.mark.parametrize("vocab_size", [301, 1000, 4000])
def test_a_coverage_that_fits_leaves_half_of_the_vocabulary_to_longer_pieces(vocab_size: int) -> None:
    # 3000 equally frequent characters, each in pairs with its neighbours: 98% of them fit into none of these sizes.
    alphabet = "".join(map(chr, range(0x4E00, 0x4E00 + 3000)))
    lines = [alphabet[start : start + 60] for start in range(0, 3000, 30)] * 3
    coverage = coverage_that_fits(lines, vocab_size)
    singles, longer = learnt(train_sentencepiece(lines, vocab_size, coverage))
    assert len(singles) == (vocab_size - 261) // 2
    assert len(longer) == vocab_size - 261 - len(singles)


def test_a_text_of_few_characters_is_covered_as_usual() -> None:
    assert coverage_that_fits(sample_lines(sentences(0, 300), 10**6, 0)[0], 1000) == 0.9999


def test_classical_chinese_fits_into_small_vocabularies_and_comes_back(real_data: Path) -> None:
    records = (real_data / "pretrain" / "tcm_classics.jsonl").read_text(encoding="utf-8").splitlines()
    texts = [json.loads(record)["text"] for record in records]
    lines, _ = sample_lines(texts, 1_000_000, 0)
    for vocab_size in (512, 4096):
        model = train_sentencepiece(lines, vocab_size, coverage_that_fits(lines, vocab_size))
        assert len(learnt(model)[1]) >= (vocab_size - 261) // 2
        tokenizer = Tokenizer.from_sentencepiece(model, {})
        assert all(tokenizer.decode(tokenizer.encode(text)) == text for text in texts[:200])


def test_held_out_lines_are_not_trained_on() -> None:
    texts = ["\n".join(f"line {number}" for number in range(start, start + 30)) + "\n" for start in range(0, 300, 30)]
    held_out = HeldOutLines(texts, every=10, max_characters=10**6)
    kept = "".join(held_out)
    assert len(held_out.lines) == 30
    assert sorted(held_out.lines + kept.splitlines(keepends=True)) == sorted("".join(texts).splitlines(keepends=True))
    short = HeldOutLines(texts, every=10, max_characters=25)
    assert sum(map(len, "".join(short))) + sum(map(len, short.lines)) == sum(map(len, texts))
    assert 0 < sum(map(len, short.lines)) <= 25


def test_a_report_counts_characters_and_tokens(tmp_path: Path) -> None:
    train_tokenizer(sentences(0, 200), tmp_path, 460)
    tokenizer = Tokenizer.load(tmp_path)
    texts = sentences(5, 30)
    report = measure(tokenizer, iter(texts))
    assert report.characters == sum(map(len, texts)) and report.documents == 30
    assert report.tokens == sum(len(tokenizer.encode(text)) for text in texts)
    assert report.characters_per_token == report.characters / report.tokens > 1.5
