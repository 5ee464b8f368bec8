"""Files of comparisons to groups of sequences: what is stored, what is compared with what, what is left out."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.data.groups import Group, PreferenceSet, open_groups
from engine.data.preference_files import PreferenceOptions
from engine.data.prepare import prepare
from engine.data.shards import read_manifest
from model.chat import ChatTemplate, Message
from model.errors import InputError
from model.tokenizer import Tokenizer
from tests.engine.data.comparisons import comparisons, open_files, open_records, ranked_encoder
from tests.engine.data.dialogues import write

Q, GOOD, FAIR, BAD = "头疼怎么办？", "先休息。", "多喝水。", "不用管。"


def pair(question: str = Q, chosen: str = GOOD, rejected: str = BAD) -> dict[str, str]:
    return {"prompt": question, "chosen": chosen, "rejected": rejected}


def row(label: float, answer: str, question: str = Q) -> dict[str, Any]:
    return {"label": label, "question": question, "answer": answer}


def every(groups: PreferenceSet) -> list[Group]:
    return [groups.group(number) for number in groups.documents().tolist()]


def graded(groups: PreferenceSet, tokenizer: Tokenizer) -> list[list[tuple[str, str, float]]]:
    """Question, answer and grade of each sequence, group by group."""
    found = []
    for group in every(groups):
        texts = []
        for ids, start, grade in zip(group.ids, group.answer_starts, group.grades, strict=True):
            question = tokenizer.decode(ids[:start].tolist()).removeprefix("[human]:").removesuffix("\n[bot]:")
            texts.append((question, tokenizer.decode(ids[start:].tolist(), skip_special=True), grade))
        found.append(texts)
    return found


def answers(groups: PreferenceSet, tokenizer: Tokenizer) -> list[list[tuple[str, float]]]:
    return [[(answer, grade) for _, answer, grade in group] for group in graded(groups, tokenizer)]


def listed(path: Path) -> list[tuple[str, int | None, str]]:
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [(Path(line["file"]).name, line["line"], line["reason"]) for line in lines]


# What is stored


@pytest.mark.parametrize("name", ["chimed", "vicuna", "alpaca", "plain"])
def test_sequences_are_what_fine_tuning_trains_up_to_the_end_token(
    tmp_path: Path, tokenizer: Tokenizer, name: str
) -> None:
    turns = [Message("system", "你是医生。")] if name in ("chimed", "vicuna") else []
    turns += [Message("user", Q), Message("assistant", FAIR), Message("user", "还疼呢？")]
    record = {"messages": [vars(turn) for turn in turns], "chosen": GOOD, "rejected": BAD}
    raw = write(tmp_path / "raw.jsonl", [record])
    (group,) = every(open_files(tmp_path / "out", [raw], ranked_encoder(tokenizer, 4096, name)))
    template = ChatTemplate.named(name, tokenizer)
    for ids, start, answer in zip(group.ids, group.answer_starts, (GOOD, BAD), strict=True):
        whole = template.encode(tokenizer, [*turns, Message("assistant", answer)])
        assert ids.tolist() == whole.ids
        assert ids[:start].tolist() == template.encode_prompt(tokenizer, turns)
        assert ids[-1] in template.end_ids(tokenizer)
    assert group.grades == [1.0, 0.0]


def test_what_one_answer_has_no_room_for_is_left_out_of_all_prompts(tmp_path: Path, tokenizer: Tokenizer) -> None:
    history = [[f"第{turn}问", f"第{turn}答"] for turn in range(6)]
    record = {"history": history, "question": Q, "response_chosen": GOOD * 8, "response_rejected": BAD}
    groups = open_records(tmp_path / "1", [record], tokenizer, context=128)
    (group,) = every(groups)
    better, worse = (ids[:start].tolist() for ids, start in zip(group.ids, group.answer_starts, strict=True))
    assert better == worse
    assert max(map(len, group.ids)) <= 128
    # The shorter sequence had room for more.
    alone = open_records(tmp_path / "2", [{**record, "response_chosen": FAIR}], tokenizer, context=128)
    assert len(every(alone)[0].ids[1]) > len(group.ids[1])
    manifest = read_manifest(tmp_path / "1" / "prepared")
    assert manifest["shortened"] == 1 and manifest["dropped_turns"] > 0


def test_group_with_an_answer_that_does_not_fit_is_refused_whole(tmp_path: Path, tokenizer: Tokenizer) -> None:
    records = [pair(), pair("咳嗽？", rejected=BAD * 100), pair("发热？" * 100)]
    groups = open_records(tmp_path / "1", records, tokenizer, context=64)
    assert groups.num_groups == 1
    (_, second, too_long), (_, third, no_room) = listed(tmp_path / "1" / "prepared" / "rejects.jsonl")
    assert (second, too_long) == (2, "answer 2 and its question exceed the context of 64 tokens")
    assert third == 3 and no_room.startswith("its last question takes")


def test_refused_records_are_listed_by_file_and_line(tmp_path: Path, tokenizer: Tokenizer) -> None:
    records = [pair(), pair(rejected=GOOD), {"prompt": Q}, pair("咳嗽？")]
    groups = open_records(tmp_path / "1", records, tokenizer)
    assert groups.num_groups == 2
    assert listed(tmp_path / "1" / "prepared" / "rejects.jsonl") == [
        ("raw.jsonl", 2, "the better and the worse answer are the same"),
        ("raw.jsonl", 3, 'no comparison of answers is known by these fields; this record has "prompt"'),
    ]
    with pytest.raises(InputError, match=r"raw.jsonl:2: the better and the worse answer are the same"):
        open_records(tmp_path / "2", records, tokenizer, on_error="fail")


def test_of_many_answers_as_many_as_asked_for_are_kept(tmp_path: Path, tokenizer: Tokenizer) -> None:
    record = {"prompt": Q, "responses": [{"text": f"{grade}号", "score": grade} for grade in range(7)]}
    groups = open_records(tmp_path / "1", [record], tokenizer, max_responses=3)
    assert answers(groups, tokenizer) == [[("0号", 0.0), ("3号", 3.0), ("6号", 6.0)]]
    assert groups.most_responses == 3
    assert read_manifest(tmp_path / "1" / "prepared")["beyond_most"] == 4


# What is compared with what


def test_candidates_of_a_question_are_one_group_wherever_they_stand(tmp_path: Path, tokenizer: Tokenizer) -> None:
    one = write(tmp_path / "1.jsonl", [row(0, BAD), row(1, "甲", "咳嗽？"), row(1, GOOD), row(0, "乙", "咳嗽？")])
    two = write(tmp_path / "2.jsonl", [row(0.5, FAIR)])
    groups = open_files(tmp_path / "out", [one, two], ranked_encoder(tokenizer))
    assert graded(groups, tokenizer) == [
        [(Q, BAD, 0.0), (Q, GOOD, 1.0), (Q, FAIR, 0.5)],
        [("咳嗽？", "甲", 1.0), ("咳嗽？", "乙", 0.0)],
    ]
    assert groups.num_responses == groups.num_sequences == 5
    assert [group.first_sequence for group in every(groups)] == [0, 3]


def test_candidates_belong_together_by_all_that_goes_before_them(tmp_path: Path, tokenizer: Tokenizer) -> None:
    records = [
        {**row(label, answer), "history": [[before, FAIR]]}
        for before in "甲乙"
        for label, answer in ((1, GOOD), (0, BAD))
    ]
    groups = open_records(tmp_path / "1", [*records, {**row(1, GOOD), "system": "一"}, row(0, BAD)], tokenizer)
    assert groups.num_groups == 2


def test_candidates_that_teach_nothing_are_listed_by_their_first_row(tmp_path: Path, tokenizer: Tokenizer) -> None:
    records = [
        *(row(1, GOOD), row(0, BAD)),
        *(row(0, GOOD, "甲"), row(1, BAD, "乙"), row(0, FAIR, "甲")),
        *(row(1, GOOD, "丙"), row(0, BAD, "丙"), row(0, GOOD, "丙")),
        *(row(1, GOOD, "丁"), row(1, f"{GOOD} ", "丁")),
    ]
    groups = open_records(tmp_path / "1", records, tokenizer)
    assert groups.num_groups == 1 and groups.store.facts.left_out == 4
    assert listed(tmp_path / "1" / "prepared" / "left_out.jsonl") == [
        ("raw.jsonl", 3, "all 2 answers to this question have one grade"),
        ("raw.jsonl", 4, "this question has one answer"),
        ("raw.jsonl", 6, "an answer to this question has two grades"),
        ("raw.jsonl", 9, "this question has one answer"),
    ]


def test_place_in_a_later_file_is_found(tmp_path: Path, tokenizer: Tokenizer) -> None:
    first = write(tmp_path / "1.jsonl", [pair(), {"broken": 1}, pair("咳嗽？")])
    second = write(tmp_path / "2.jsonl", [{"broken": 1}, row(1, GOOD, "甲"), pair("发热？"), row(1, GOOD, "乙")])
    open_files(tmp_path / "out", [first, second], ranked_encoder(tokenizer))
    alone = "this question has one answer"
    assert listed(tmp_path / "out" / "left_out.jsonl") == [("2.jsonl", 2, alone), ("2.jsonl", 4, alone)]


def test_repetitions_count_once(tmp_path: Path, tokenizer: Tokenizer) -> None:
    turned = {"prompt": Q, "responses": [{"text": BAD, "score": 0}, {"text": GOOD, "score": 1}]}
    candidates = [row(1, "甲", "咳嗽？"), row(0, "乙", "咳嗽？"), row(0, "乙", "咳嗽？")]
    groups = open_records(tmp_path / "1", [pair(), turned, pair(), *candidates], tokenizer)
    assert answers(groups, tokenizer) == [[(GOOD, 1.0), (BAD, 0.0)], [("甲", 1.0), ("乙", 0.0)]]
    assert groups.num_duplicates == 3


def test_pairs_of_one_prompt_stay_apart_and_may_disagree(tmp_path: Path, tokenizer: Tokenizer) -> None:
    groups = open_records(tmp_path / "1", [pair(), pair(rejected=FAIR), pair(chosen=BAD, rejected=GOOD)], tokenizer)
    assert [len(group.ids) for group in every(groups)] == [2, 2, 2]


def test_candidates_beyond_the_most_are_counted(tmp_path: Path, tokenizer: Tokenizer) -> None:
    records = [row(1 if place == 4 else 0, f"{place}号") for place in range(12)]
    groups = open_records(tmp_path / "1", records, tokenizer, max_responses=4)
    ((*kept,),) = answers(groups, tokenizer)
    assert len(kept) == 4 and ("4号", 1.0) in kept
    assert groups.store.facts.beyond_most == 8


def test_units_of_work_do_not_change_the_groups(tmp_path: Path, tokenizer: Tokenizer) -> None:
    candidates = [row(place % 2, f"答{place}", f"问{place % 5}") for place in range(40)]
    records = [*comparisons(30), *candidates, row(1, GOOD, "独问")]
    whole = open_records(tmp_path / "1", records, tokenizer)
    raw = tmp_path / "1" / "raw.jsonl"
    prepare([raw], ranked_encoder(tokenizer), tmp_path / "2", PreferenceOptions(), workers=2, unit_bytes=1000)
    cut = open_groups(tmp_path / "2", None, 9)
    assert len(read_manifest(tmp_path / "2")["units"]) > 5
    for one, other in zip(every(whole), every(cut), strict=True):
        assert one.grades == other.grades and one.first_sequence == other.first_sequence
        assert all(np.array_equal(*ids) for ids in zip(one.ids, other.ids, strict=True))
    # Lines of JSON read in pieces are not counted from the file's beginning: better none than a wrong one.
    assert [place for _, place, _ in listed(tmp_path / "1" / "prepared" / "left_out.jsonl")] == [71]
    assert [place for _, place, _ in listed(tmp_path / "2" / "left_out.jsonl")] == [None]


def test_another_grade_is_another_set(tmp_path: Path, tokenizer: Tokenizer) -> None:
    prints = {
        open_records(tmp_path / str(grade), [row(grade, GOOD), row(0, BAD)], tokenizer).fingerprint for grade in (1, 2)
    }
    assert len(prints) == 2


# Formats


TABLE = [("1", Q, GOOD), ("0", Q, BAD), ("0", "咳嗽？", BAD), ("1", "咳嗽？", FAIR)]
TABLED = [[(GOOD, 1.0), (BAD, 0.0)], [(BAD, 0.0), (FAIR, 1.0)]]


@pytest.mark.parametrize("encoding", ["utf-8", "gbk"])
@pytest.mark.parametrize("form", ["tsv", "csv", "tsv without a header", "csv, label last, without a header"])
def test_tables_of_candidates_in_every_form(tmp_path: Path, tokenizer: Tokenizer, form: str, encoding: str) -> None:
    separator = "\t" if form.startswith("tsv") else ","
    rows = TABLE if "without" in form else [("label", "question", "answer"), *TABLE]
    rows = [(*fields[1:], fields[0]) for fields in rows] if "last" in form else rows
    path = tmp_path / f"table.{form[:3]}"
    path.write_bytes("".join(separator.join(fields) + "\r\n" for fields in rows).encode(encoding))
    groups = open_files(tmp_path / "out", [path], ranked_encoder(tokenizer))
    assert answers(groups, tokenizer) == TABLED


def test_lists_and_parquet(tmp_path: Path, tokenizer: Tokenizer) -> None:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")

    graded_list = {"prompt": Q, "responses": [{"text": GOOD, "score": 1}, {"text": BAD, "score": 0}]}
    (tmp_path / "a.json").write_text(json.dumps([graded_list], ensure_ascii=False, indent=1))
    parquet.write_table(pyarrow.Table.from_pylist([{**graded_list, "prompt": "咳嗽？"}]), tmp_path / "b.parquet")
    groups = open_files(tmp_path / "out", [tmp_path / "a.json", tmp_path / "b.parquet"], ranked_encoder(tokenizer))
    assert answers(groups, tokenizer) == [[(GOOD, 1.0), (BAD, 0.0)]] * 2


# Held out


def test_no_question_is_on_both_sides(tmp_path: Path, tokenizer: Tokenizer) -> None:
    records = [pair(f"第{number % 40}问", f"{number}好", f"{number}坏") for number in range(120)]
    groups = open_records(
        tmp_path / "1", [*records, *(row(i % 2, f"{i}", f"第{i // 2}问") for i in range(80))], tokenizer
    )
    train, held_out = groups.split(0.25)
    assert isinstance(train, PreferenceSet) and isinstance(held_out, PreferenceSet)
    sides = [{question for group in graded(side, tokenizer) for question, _, _ in group} for side in (train, held_out)]
    assert not sides[0] & sides[1] and len(sides[0] | sides[1]) == 40
    assert train.num_groups + held_out.num_groups == 160
    assert train.num_responses + held_out.num_responses == groups.num_responses == 320
    assert train.num_tokens + held_out.num_tokens == groups.num_tokens


def test_held_out_questions_are_taken_out_whatever_their_spaces(tmp_path: Path, tokenizer: Tokenizer) -> None:
    groups = open_records(tmp_path / "1", [pair(), pair("咳嗽？"), row(1, GOOD), row(0, BAD)], tokenizer)
    held_out = open_records(tmp_path / "2", [pair(f"{Q[:2]} {Q[2:]}\n", FAIR)], tokenizer)
    rest, overlap = groups.without(held_out)
    assert overlap == 2
    assert [group[0][0] for group in graded(rest, tokenizer)] == ["咳嗽？"]


# Real files


def test_real_files_give_their_groups(real_data: Path, tmp_path: Path, tokenizer: Tokenizer) -> None:
    encoder = ranked_encoder(tokenizer, 1 << 20)
    lists = open_files(tmp_path / "1", [real_data / "preference" / "ranked_first_turn.jsonl"], encoder)
    assert lists.num_groups == 293 and lists.num_responses == 6 * 293
    pairs = open_files(tmp_path / "2", [real_data / "preference" / "dpo_zh_500.jsonl"], encoder)
    assert pairs.num_groups == 500 and pairs.num_responses == 1000
    table = open_files(tmp_path / "3", [real_data / "preference" / "cmedqa_candidates.tsv"], encoder)
    # Of 895 questions 677 have candidates of one label alone, or only one.
    assert table.num_groups == 218 and table.store.facts.left_out == 677
    reasons = Counter(
        "one" if "has one answer" in reason else "equal" for *_, reason in listed(tmp_path / "3/left_out.jsonl")
    )
    assert reasons == {"one": 39, "equal": 638}
    for groups in (lists, pairs, table):
        assert read_manifest(groups.store.prepared[0].directory)["rejected"] == 0
