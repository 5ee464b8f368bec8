"""Contamination: what was planted in training texts is found where it was planted, and nothing else is."""

from __future__ import annotations

import csv
import gzip
import json
import random
import tracemalloc
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest

from engine.data.prepare import prepare
from evals import gram_index, training_texts, windows
from evals.contamination import Contamination, find_overlap
from evals.eval_config import EvaluationConfig
from evals.evaluation_job import plan_evaluation
from evals.gram_index import Overlap
from model.errors import InputError
from model.tokenizer import Tokenizer
from tests.model.tokenizer_bases import write_llama
from tests.small_base import write_small_base

QUESTION = "患者男性五十六岁，反复咳嗽咳痰二十年，近三天气促加重，最可能的诊断是什么？"
LETTERS = 33


def noise(count: int, seed: int = 0) -> str:
    """Random text that no question shares a gram with."""
    return "".join(random.Random(seed).choices([chr(point) for point in range(0x6000, 0x7000)], k=count))


def only(found: Contamination) -> Overlap:
    [item] = found.items.values()
    return item


def write_txt(path: Path, text: str, encoding: str = "utf-8") -> Path:
    path.write_bytes(text.encode(encoding))
    return path


def write_lines(path: Path, records: Sequence[object]) -> Path:
    return write_txt(path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))


def gzipped(path: Path) -> Path:
    packed = path.with_name(path.name + ".gz")
    packed.write_bytes(gzip.compress(path.read_bytes()))
    return packed


def in_a_table(path: Path, rows: Sequence[Sequence[str]], encoding: str) -> Path:
    with open(path, "w", encoding=encoding, newline="") as file:
        csv.writer(file).writerows(rows)
    return path


TURNS = [{"from": "human", "value": noise(30, 1)}, {"from": "gpt", "value": f"{noise(9)}{QUESTION}"}]
SHARDS = {
    "text": lambda at: write_txt(at / "a.txt", f"{noise(40)}\n{noise(40)}\n{noise(9)}{QUESTION}{noise(9)}\n"),
    "text in GBK": lambda at: write_txt(at / "a.txt", f"头晕\n高血压患者\n{QUESTION}\n", "gb18030"),
    "text, packed": lambda at: gzipped(write_txt(at / "a.txt", f"{noise(40)}\n{noise(40)}\n{QUESTION}\n")),
    "lines of text": lambda at: write_lines(at / "a.jsonl", [{"text": "甲"}, {"text": noise(9)}, {"text": QUESTION}]),
    "a list of texts": lambda at: write_txt(at / "a.json", f'[\n"{noise(9)}",\n"{QUESTION}"]'),
    "conversations": lambda at: write_lines(at / "a.jsonl", [{"a": "甲"}, {"a": "乙"}, {"conversations": TURNS}]),
    "unknown fields": lambda at: write_lines(at / "a.jsonl", ["甲", {"甲": 1}, {"x": [[None, {"y": QUESTION}]]}]),
    "a table in GBK": lambda at: in_a_table(at / "a.csv", [["问", "答"], ["头晕", "休息"], ["甲", QUESTION]], "gbk"),
    "a table without a header": lambda at: in_a_table(at / "a.csv", [["1", QUESTION]], "utf-8"),
    "a broken line before it": lambda at: write_txt(at / "a.jsonl", f'{{"t": "甲"}}\n{{"t"\n{{"t": "{QUESTION}"}}\n'),
}


@pytest.mark.parametrize("kind", SHARDS)
def test_what_was_planted_is_found_with_file_and_line(kind: str, tmp_path: Path) -> None:
    shard = SHARDS[kind](tmp_path)
    found = find_overlap({"one": [QUESTION]}, [shard])
    grams = LETTERS - 12
    line = {"a table without a header": 1}.get(kind, 3)
    assert only(found) == Overlap(grams, grams, LETTERS, str(shard), line)
    assert found.flagged == found.touched == ("one",) and not found.unchecked and found.share == 1


def test_the_document_of_a_prepared_directory_is_named(tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(write_llama(tmp_path / "base"))
    raw = write_lines(tmp_path / "raw.jsonl", [{"text": noise(20, 1)}, {"text": f"{noise(20)}{QUESTION}"}])
    directory = prepare([raw], tokenizer, tmp_path / "prepared", workers=1)
    found = find_overlap({"one": [QUESTION]}, [directory])
    assert only(found) == Overlap(LETTERS - 12, LETTERS - 12, LETTERS, str(directory), 2)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (f"甲\n{QUESTION[:12]}\n\n{QUESTION[12:]}", 2),  # lines break anywhere
        (f"{noise(9)}\n甲{QUESTION.translate({ord(x): '' for x in '，。？'})}", 2),
        ("甲\r\n" + " ".join(QUESTION.replace("，", "；")), 2),
    ],
)
def test_lines_spaces_and_punctuation_do_not_hide_a_text(text: str, line: int, tmp_path: Path) -> None:
    found = only(find_overlap({"one": [QUESTION]}, [write_txt(tmp_path / "a.txt", text)]))
    assert (found.share, found.longest, found.line) == (1, LETTERS, line)


def test_full_width_forms_and_case_do_not_hide_a_text(tmp_path: Path) -> None:
    shard = write_txt(tmp_path / "a.txt", "ＨｂＡ１ｃ　７．５％，　ＢＭＩ　２８㎏／㎡，　血压１５０／９５ｍｍＨｇ")
    found = only(find_overlap({"one": ["hba1c 7.5%, bmi 28kg/m2, 血压150/95mmHg"]}, [shard]))
    assert found.share == 1 and found.grams > 13


def test_a_paraphrase_is_not_found(tmp_path: Path) -> None:
    shard = write_txt(
        tmp_path / "a.txt", "一名五十六岁男性，咳嗽、咳痰反复发作二十年，气促三天前加重，诊断最可能是什么？"
    )
    assert find_overlap({"one": [QUESTION]}, [shard]).items == {"one": Overlap(LETTERS - 12, 0)}


def test_half_a_question_is_touched_and_not_flagged(tmp_path: Path) -> None:
    shard = write_lines(tmp_path / "a.jsonl", [QUESTION[:20], QUESTION[20:]])  # 18 and 15 letters
    found = find_overlap({"one": [QUESTION], "other": [noise(40)]}, [shard])
    assert found.items["one"] == Overlap(21, 6 + 3, 18, str(shard), 1)
    assert found.touched == ("one",) and found.flagged == () and found.share == 9 / 49


def test_fifty_letters_in_a_row_are_enough(tmp_path: Path) -> None:
    long = noise(400, 3)
    for length, flagged in ((49, ()), (50, ("one",))):
        shard = write_txt(tmp_path / f"{length}.txt", f"{noise(20)}{long[100 : 100 + length]}{noise(20)}")
        found = find_overlap({"one": [long]}, [shard])
        assert only(found).longest == length and found.flagged == flagged


def test_the_longest_stretch_stands_in_one_place(tmp_path: Path) -> None:
    """Both halves of a text, in two records, are all of its grams but no longer match."""
    text = noise(60, 5)
    shard = write_lines(tmp_path / "a.jsonl", [text[:36], text[24:], text[10:30]])
    assert only(find_overlap({"one": [text]}, [shard])) == Overlap(48, 48, 36, str(shard), 1)


def test_texts_shorter_than_a_gram_are_named_as_unchecked(tmp_path: Path) -> None:
    shard = write_txt(tmp_path / "a.txt", "高血压的诊断标准是什么")
    texts = {"short": ["高血压的诊断标准是什么", "血压"], "long": [noise(13)], "none": []}
    found = find_overlap(texts, [shard])
    assert found.unchecked == ("short", "none") and found.touched == ()
    assert find_overlap(texts, [shard], n=8).flagged == ("short",)


def test_grams_do_not_reach_from_one_text_into_another(tmp_path: Path) -> None:
    shard = write_lines(tmp_path / "a.jsonl", [QUESTION[:10], QUESTION[10:20], {"a": QUESTION[:10]}])
    found = find_overlap({"one": [QUESTION[:19], QUESTION[10:]]}, [shard])
    assert only(found).grams == 5 + 12 and only(found).found == 0


def test_a_gram_that_items_share_counts_for_all_of_them(tmp_path: Path) -> None:
    shared = noise(20, 7)
    texts = {str(at): [shared + noise(5, 100 + at), "另外"] for at in range(100)}
    found = find_overlap(texts, [write_txt(tmp_path / "a.txt", shared + noise(5, 104))])
    assert len(found.touched) == 100 and found.items["4"].share == 1 and found.items["5"].share == 8 / 13
    assert found.items["4"].longest == 25


@pytest.mark.parametrize("seed", range(8))
def test_any_cutting_into_windows_finds_what_brute_force_finds(
    seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Random texts of two letters, where there are matches everywhere, in texts and records larger than windows."""
    random_ = random.Random(seed)
    monkeypatch.setattr(windows, "CHARACTERS", random_.choice([5, 20, 60]))
    monkeypatch.setattr(training_texts, "_PIECE_BYTES", random_.choice([7, 50]))  # also within a character
    monkeypatch.setattr(training_texts, "_LONGEST_PIECE", random_.choice([6, 19, 1000]))
    records = ["".join(random_.choices("甲乙", k=random_.randrange(60))) for _ in range(30)]
    texts = {str(at): ["".join(random_.choices("甲乙", k=random_.randrange(30))) for _ in range(2)] for at in range(9)}
    shards = [write_txt(tmp_path / "a.txt", "".join(records[:9])), write_lines(tmp_path / "b.jsonl", records[9:])]
    n = random_.choice([6, 9])
    found = find_overlap(texts, shards, n)
    documents = ["".join(records[:9]), *records[9:]]
    assert found.letters == sum(map(len, records))
    for name, own in texts.items():
        grams = [text[at : at + n] for text in own for at in range(len(text) - n + 1)]
        hits = [gram for gram in grams if any(gram in document for document in documents)]
        stretches = [text[a:b] for text in own for a in range(len(text)) for b in range(a + n, len(text) + 1)]
        inside = [len(stretch) for stretch in stretches if any(stretch in document for document in documents)]
        item = found.items[name]
        assert (item.grams, item.found, item.longest) == (len(grams), len(hits), max(inside, default=0))


def test_grams_of_one_number_are_told_apart_by_their_letters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        gram_index, "gram_numbers", lambda letters, n: np.zeros(max(0, len(letters) - n + 1), np.uint64)
    )
    shard = write_txt(tmp_path / "a.txt", noise(20, 1) + QUESTION[:8])
    assert not find_overlap({"one": [noise(13, 2)]}, [shard]).touched
    assert find_overlap({"one": [noise(20, 1)[4:17]]}, [shard]).flagged


def test_a_long_shard_needs_no_more_memory_than_a_short_one(tmp_path: Path) -> None:
    block = (noise(80) + "\n") * 4000  # 0.97 MB
    shard = tmp_path / "a.txt"
    with open(shard, "w", encoding="utf-8") as file:
        for _ in range(104):
            file.write(block)
        file.write(QUESTION)
    assert shard.stat().st_size > 100e6
    tracemalloc.start()
    try:
        found = only(find_overlap({"one": [QUESTION]}, [shard]))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert (found.longest, found.line) == (LETTERS, 104 * 4000 + 1)
    assert peak < 64 << 20


def test_mistakes_are_named(tmp_path: Path) -> None:
    shard = write_txt(tmp_path / "a.txt", QUESTION)
    with pytest.raises(InputError, match="n is 0"):
        find_overlap({"one": [QUESTION]}, [shard], n=0)
    with pytest.raises(InputError, match="Check the path after --contamination"):
        find_overlap({"one": [QUESTION]}, [tmp_path / "b.txt"])
    with pytest.raises(InputError, match="no training texts"):
        find_overlap({"one": [QUESTION]}, [])
    assert find_overlap({}, [shard]).items == {}


def test_paths_are_looked_at_before_anything_is_asked(tmp_path: Path) -> None:
    write_small_base(tmp_path / "base")
    config = EvaluationConfig([str(tmp_path / "base")], ["no task"], contamination=[str(tmp_path / "nowhere")])
    with pytest.raises(InputError, match="nowhere: no such file or directory"):
        plan_evaluation(config, lambda *_: lambda _: [])


def choice_items(real_data: Path) -> Mapping[str, list[str]]:
    texts = {}
    for path in sorted((real_data / "mcq" / "cmmlu" / "test").glob("*.csv")):
        with open(path, encoding="utf-8-sig", newline="") as file:
            for row in csv.DictReader(file):
                texts[f"{path.stem} {row['']}"] = [row["Question"], *(row[letter] for letter in "ABCD")]
    with open(real_data / "mcq" / "medqa_zh_685.jsonl", encoding="utf-8") as file:
        for number, line in enumerate(file):
            record = json.loads(line)
            texts[f"medqa {number}"] = [record["question"], *record["options"].values()]
    return texts


def test_real_questions_are_not_in_real_training_texts_but_in_themselves(real_data: Path) -> None:
    """Independent files share phrases: 13 letters in a row in less than one question of a hundred, nothing flagged."""
    texts = choice_items(real_data)
    assert len(texts) == 1166 + 685
    found = find_overlap(texts, [real_data / "pretrain", real_data / "sft"])
    assert not found.flagged and len(found.touched) < 0.01 * len(texts)
    itself = find_overlap(texts, [real_data / "mcq"])
    assert set(itself.flagged) == set(texts) - set(itself.unchecked) and itself.share == 1
