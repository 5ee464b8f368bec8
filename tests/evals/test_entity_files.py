"""Files of marked texts are read as they come, and refused where they do not say what they seem to."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from evals.entity_files import LAYOUTS, Entity, read_annotated
from evals.entity_records import find_file, holds_written, read_written
from model.errors import InputError
from tests.evals.entity_samples import CODES, NOTES, place, write_sample


def write(path: Path, *records: Any) -> Path:
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    return path


def refused(path: Path, dataset: str = "entities") -> str:
    with pytest.raises(InputError) as error:
        read_annotated(path, LAYOUTS[dataset])
    return str(error.value)


@pytest.mark.parametrize("dataset", LAYOUTS)
def test_every_format_gives_the_same_places(dataset: str, tmp_path: Path) -> None:
    reading = read_annotated(write_sample(tmp_path / "notes.json", dataset), LAYOUTS[dataset])
    names = {alias: kind.name for kind in LAYOUTS[dataset].types for alias in (kind.name, *kind.aliases)}
    kinds = [names.get(code, code) for code in CODES[dataset]]
    for text, (written, marked) in zip(reading.texts, NOTES, strict=True):
        expected = [Entity(kinds[kind], mention, *place(written, mention, nth)) for mention, nth, kind in marked]
        assert text.text == written and list(text.entities) == expected
        assert all(written[one.start : one.end] == one.mention for one in text.entities)
    assert reading.has_spans and not reading.misplaced and not reading.respelled
    assert reading.types == tuple(kind.name for kind in LAYOUTS[dataset].types) or not LAYOUTS[dataset].types


def test_texts_are_numbered_however_the_file_is_broken_into_lines(tmp_path: Path) -> None:
    path = write_sample(tmp_path / "a.json", "cmeee")
    whole = read_annotated(path, LAYOUTS["cmeee"])
    assert [text.number for text in whole.texts] == [1, 2, 3, 4, 5]
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8"))), encoding="utf-8")  # on one line
    assert read_annotated(path, LAYOUTS["cmeee"]) == whole


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "gbk", "utf-16"])
def test_ccks_is_read_in_any_encoding_under_any_name(encoding: str, tmp_path: Path) -> None:
    path = write_sample(tmp_path / "subtask1_training_part1.txt", "ccks2019")
    text = path.read_text(encoding="utf-8-sig")
    path.write_text(text, encoding=encoding)
    assert read_annotated(path, LAYOUTS["ccks2019"]).texts[0].entities[0].mention == "发热"


def test_the_end_of_cmeee_is_the_last_character_or_the_one_behind_it(tmp_path: Path) -> None:
    layout, entity = LAYOUTS["cmeee"], {"type": "dis", "start_idx": 2, "entity": "肺炎"}
    for end in (3, 4):
        path = write(tmp_path / "a.json", {"text": "诊断肺炎。", "entities": [entity | {"end_idx": end}]})
        assert read_annotated(path, layout).texts[0].entities == (Entity("疾病", "肺炎", 2, 4),)
    write(path, {"text": "诊断肺炎。", "entities": [{"type": "dis", "start_idx": 2, "end_idx": 3}]})
    assert read_annotated(path, layout).texts[0].entities == (Entity("疾病", "肺炎", 2, 4),)
    write(path, {"text": "诊断肺炎。", "entities": [entity | {"end_idx": 5}]})
    assert 'a.json:1: "肺炎" has 2 characters, and its place 3.' in refused(path, "cmeee")


def test_a_mention_in_other_case_and_width_is_taken_from_the_text_and_counted(tmp_path: Path) -> None:
    path = write(
        tmp_path / "a.json", {"text": "查ｔｃｔ", "mention_data": [{"mention": "TCT", "type": "test", "offset": "1"}]}
    )
    reading = read_annotated(path, LAYOUTS["cmedqaner"])
    assert reading.texts[0].entities == (Entity("检查", "ｔｃｔ", 1, 4),) and reading.respelled == 1


def test_an_entity_that_is_not_where_it_should_be_is_refused_or_left_out_and_counted(tmp_path: Path) -> None:
    right, wrong = (
        {"mention": "肺炎", "type": "disease", "offset": 2},
        {"mention": "肺炎", "type": "disease", "offset": "1"},
    )
    good = {"text": "诊断肺炎。", "mention_data": [right]}
    path = write(tmp_path / "a.json", good, {"text": "诊断肺炎。", "mention_data": [right, wrong]})
    assert 'a.json:2: at 1 the text reads "断肺", not "肺炎"' in refused(path, "cmedqaner")
    reading = read_annotated(path, LAYOUTS["cmedqaner"], leave_out_misplaced=True)
    assert [len(text.entities) for text in reading.texts] == [1, 1] and reading.misplaced == (2,)


@pytest.mark.parametrize(
    ("entity", "said"),
    [
        ({"mention": "肺炎", "start": 4}, "lies from 4 to 6, the text has 5 characters"),
        ({"mention": "肺炎", "start": -3}, "lies from -3"),
        ({"mention": "肺炎", "start": "二"}, "\"start\" is '二', not a whole number"),
        ({"mention": "肺炎", "start": 2.5}, '"start" is 2.5, not a whole number'),
        ({"mention": "肺炎", "start": True}, "not a whole number"),
        ({"mention": "　"}, "a mention is empty"),
        ({"mention": 3}, "a mention is empty, or no text"),
        ({"start": 2}, "has no end"),
        ({}, "neither a mention nor a place"),
    ],
)
def test_an_entity_without_a_place_that_holds_is_refused(entity: dict, said: str, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", {"text": "诊断肺炎。", "entities": [{"type": "疾病"} | entity]})
    assert said in refused(path) and "a.jsonl:1: " in refused(path)


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ({"txt": "a"}, '"text" is missing; this record has "txt"'),
        ({"text": 1, "entities": []}, '"text" is a number, not a text'),
        ({"text": "a", "entities": {}}, '"entities" is an object, not a list'),
        ({"text": "a", "entities": ["a"]}, "an entity is a text, not an object"),
        ({"text": "a", "entities": [{"mention": "a"}]}, 'an entity has no "type"'),
        ({"text": "a", "entities": [{"mention": "a", "type": "A:B"}]}, 'the type "A:B" holds a colon'),
        ({"text": "a\0", "entities": []}, "the text holds NUL"),
        ({"text": "a", "entities": [], "instruction": 1}, '"instruction" is a number'),
        (["a"], "a record is an object, this one is a list"),
    ],
)
def test_a_record_of_another_shape_is_refused(record: Any, said: str, tmp_path: Path) -> None:
    good = {"text": "a", "entities": [{"mention": "a", "type": "A"}]}
    path = write(tmp_path / "a.jsonl", good, record)
    assert said in refused(path) and "a.jsonl:2: " in refused(path)


def test_a_type_that_the_dataset_does_not_have_is_refused(tmp_path: Path) -> None:
    path = write_sample(tmp_path / "a.json", "cmedqaner")
    path.write_text(path.read_text(encoding="utf-8").replace("symptom", "sympton"), encoding="utf-8")
    assert "a.json:1: sympton is no type of this dataset; it has 疾病, 症状, " in refused(path, "cmedqaner")


def test_types_of_a_file_that_differ_in_case_alone_are_one(tmp_path: Path) -> None:
    entities = [{"mention": "a", "type": "Drug"}, {"mention": "b", "type": "drug"}]
    reading = read_annotated(write(tmp_path / "a.jsonl", {"text": "ab", "entities": entities}), LAYOUTS["entities"])
    assert reading.types == ("Drug",) and {one.type for one in reading.texts[0].entities} == {"Drug"}
    assert not reading.has_spans


def test_types_that_another_file_has_are_called_as_there(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", {"text": "ab", "entities": [{"mention": "a", "type": "drug"}]})
    reading = read_annotated(path, LAYOUTS["entities"], known_types=("Test", "Drug"))
    assert reading.types == ("Test", "Drug") and reading.texts[0].entities[0].type == "Drug"


def test_a_file_without_records_or_entities_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.json").write_text("", encoding="utf-8")
    assert "empty.json: there is no record in it" in refused(tmp_path / "empty.json")
    assert "no entity is marked in it" in refused(write(tmp_path / "a.json", {"text": "a", "entities": []}))
    assert "there is no such file" in refused(tmp_path / "none.json")


def test_a_folder_stands_for_the_file_that_it_is_known_by(tmp_path: Path) -> None:
    write_sample(tmp_path / "CMeEE-V2_dev.json", "cmeee")
    assert find_file(tmp_path, LAYOUTS["cmeee"].files, "").name == "CMeEE-V2_dev.json"
    with pytest.raises(InputError, match=r"none of test\.json, .* is in it\. Name the file"):
        find_file(tmp_path, LAYOUTS["cmedqaner"].files, "")


def test_prompts_with_answers_are_read_as_lists_of_one_or_texts(tmp_path: Path) -> None:
    path = write(tmp_path / "a.json", {"prompt": ["问"], "output": ["肺炎 疾病\n"]}, {"prompt": "问", "output": "答"})
    assert holds_written(path)
    assert [tuple(one) for one in read_written(path)] == [(1, "问", "肺炎 疾病\n"), (2, "问", "答")]
    with pytest.raises(InputError, match=r'a\.json:1: "output" is not one text'):
        read_written(write(path, {"prompt": ["问"], "output": ["a", "b"]}))


def test_the_real_files_hold_what_they_are_known_to_hold(real_data: Path) -> None:
    layout = LAYOUTS["cmedqaner"]
    reading = read_annotated(real_data / "ner" / "cmedqaner_test.json", layout)
    assert len(reading.texts) == 215 and sum(len(text.entities) for text in reading.texts) == 1350
    assert reading.respelled == 4 and reading.has_spans
    assert "cmedqaner_train.json:367: at 11 the text reads" in refused(
        real_data / "ner" / "cmedqaner_train.json", "cmedqaner"
    )
    train = read_annotated(real_data / "ner" / "cmedqaner_train.json", layout, leave_out_misplaced=True)
    assert len(train.texts) == 1673
    assert sum(len(text.entities) for text in train.texts) + len(train.misplaced) == 12625
