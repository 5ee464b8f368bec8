"""The documents: how many, how different, and that nothing but their ids decides what they say."""

import dataclasses
import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from samples.draw import Draw
from samples.knowledge import Knowledge
from samples.render import Document, main, plan, render_pretraining
from samples.sheets import Facts, Items, fact_names, load_sheets, say
from tests.samples.conftest import Splits

ROOT = Path(__file__).resolve().parents[2]
CHINESE = re.compile(r"[\u4e00-\u9fff]")


def chinese_characters(documents: list) -> int:
    return sum(len(CHINESE.findall(document.text)) for document in documents)


def test_the_command_writes_the_same_bytes_in_every_process(tmp_path: Path) -> None:
    written = []
    for seed in ("0", "4711"):
        command = [sys.executable, "samples/render.py", str(tmp_path / seed)]
        subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONHASHSEED": seed}, check=True, capture_output=True)
        written.append([(tmp_path / seed / name).read_bytes() for name in ("train.jsonl", "held_out.jsonl")])
    assert written[0] == written[1]


def test_the_command_writes_what_the_function_returns(
    splits: Splits[Document], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    for name, documents in (("train", splits.train), ("held_out", splits.held_out)):
        lines = (tmp_path / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        assert [json.loads(line) for line in lines] == [dataclasses.asdict(document) for document in documents]
        assert f"{name}: {len(documents)} documents" in printed


def test_the_command_without_a_directory_says_how_to_call_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "OUT_DIR" in capsys.readouterr().err


def test_a_document_does_not_depend_on_the_order_of_the_others(knowledge: Knowledge, splits: Splits[Document]) -> None:
    backwards = dataclasses.replace(knowledge, conditions=knowledge.conditions[::-1], drugs=knowledge.drugs[::-1])
    train, held_out = render_pretraining(backwards)
    assert set(train) == set(splits.train)
    assert set(held_out) == set(splits.held_out)


def test_there_is_enough_text_to_train_on_and_a_small_part_is_held_out(splits: Splits[Document]) -> None:
    train, held_out = chinese_characters(splits.train), chinese_characters(splits.held_out)
    assert train >= 450_000
    assert 0.035 <= held_out / (train + held_out) <= 0.055


def test_no_id_and_no_text_occurs_twice_in_or_across_the_splits(splits: Splits[Document]) -> None:
    assert len({document.id for document in splits.all}) == len(splits.all)
    assert len({document.text for document in splits.all}) == len(splits.all)


def test_every_held_out_document_is_more_than_lines_that_training_shows(splits: Splits[Document]) -> None:
    shown = {line for document in splits.train for line in document.text.splitlines()}
    for document in splits.held_out:
        assert set(document.text.splitlines()) - shown, document.id


def test_training_names_every_condition_and_drug_and_shows_every_kind(
    knowledge: Knowledge, splits: Splits[Document]
) -> None:
    subjects = Counter(document.id.split("/")[1].split(".")[0] for document in splits.train)
    assert {condition.id for condition in knowledge.conditions} <= subjects.keys()
    text = "\n".join(document.text for document in splits.train)
    for name in (*(c.name for c in knowledge.conditions), *(d.name for d in knowledge.drugs), *knowledge.departments):
        assert name in text, name
    kinds = set(load_sheets())
    assert {document.kind for document in splits.train} == kinds == {document.kind for document in splits.held_out}


def test_every_document_is_finished_text(splits: Splits[Document]) -> None:
    unfinished = re.compile(r"[{}]|。。|，。|；。|、。|：。|，，|；；|、、|^\s|\s$|\n\n|None|（）|“”")
    for document in splits.all:
        found = unfinished.search(document.text)
        assert not found, f"{document.id}: {found.group()!r}" if found else ""


def test_every_phrase_can_be_spoken(knowledge: Knowledge) -> None:
    sheets = load_sheets()
    known: dict[str, set[frozenset[str]]] = {kind: set() for kind in sheets}
    for _, kind, facts in plan(knowledge):
        present = frozenset(name for name, fact in facts.items() if fact)
        known[kind].add(present)
    for kind, sheet in sheets.items():
        phrases = [*sheet.titles, *(p for s in sheet.sections.values() for p in (*s.headings, *s.bodies))]
        for phrase in phrases:
            assert any(fact_names(phrase) <= present for present in known[kind]), f"{kind}: {phrase}"
        assert {name for order in sheet.orders for name in order} == sheet.sections.keys(), kind


def test_a_phrase_is_spoken_only_when_all_of_its_facts_are_known() -> None:
    phrases = ["{name}又称{other}", "{name}：{signs:或}", "{name}，首见{signs[0]}"]
    facts: Facts = {"name": "感冒", "other": "", "signs": Items(("咳嗽", "发热"))}
    assert [say(phrases, facts, voice) for voice in range(3)] == [
        "感冒：咳嗽或发热",
        "感冒，首见咳嗽",
        "感冒：咳嗽或发热",
    ]
    assert say(phrases[:1], facts, 0) == ""
    assert format(facts["signs"], "#") == "1.咳嗽；2.发热"


def test_draws_are_uniform_and_within_their_bounds() -> None:
    draw = Draw("uniform")
    counts = Counter(draw.integer(3, 6) for _ in range(4000))
    assert counts.keys() == {3, 4, 5, 6}
    # chi-square with 3 degrees of freedom: 16.27 is exceeded once in a thousand; the stream is fixed by its name
    assert sum((count - 1000) ** 2 / 1000 for count in counts.values()) < 16.27
    assert sorted(draw.shuffled("abcde")) == list("abcde")
    assert {len(draw.some("abcde", 2, 4)) for _ in range(200)} == {2, 3, 4}
    assert {len(draw.some("ab", 3)) for _ in range(20)} == {2}
