"""Questions as the files of five datasets hold them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from evals.choice_files import Question, read_ceval, read_cmb, read_cmexam, read_cmmlu, read_medqa
from evals.choice_subjects import CMMLU_PAPER
from model.errors import InputError
from tests.evals.choice_samples import (
    DEV,
    FIRST,
    FIVE,
    SECOND,
    SEVERAL,
    Sample,
    write_ceval,
    write_cmb,
    write_cmexam,
    write_cmmlu,
    write_medqa,
)


def contents(questions: list[Question]) -> list[Sample]:
    return [Sample(question.text, question.options, question.answer) for question in questions]


def test_ceval_is_read_by_subject_and_split(tmp_path: Path) -> None:
    bank = read_ceval(write_ceval(tmp_path), [], "val", with_exemplars=True)
    assert contents(bank.questions) == [*SECOND, *FIRST]
    assert {subject: contents(own) for subject, own in bank.exemplars.items()} == {
        "basic_medicine": [*DEV],
        "clinical_medicine": [*DEV],
    }
    assert {(one.subject, one.topic) for one in bank.questions} == {
        ("basic_medicine", "基础医学"),
        ("clinical_medicine", "临床医学"),
    }
    assert len({one.id for one in bank.questions}) == len(bank.questions)


def test_cmmlu_is_read_past_its_column_without_a_name(tmp_path: Path) -> None:
    bank = read_cmmlu(write_cmmlu(tmp_path / "data").parent, ["anatomy"], "test", with_exemplars=False)
    assert contents(bank.questions) == [*SECOND]
    assert not bank.exemplars
    assert bank.questions[0].id == "anatomy/0"
    assert bank.questions[0].topic == "解剖学"


def test_spaces_at_the_ends_of_a_question_stay(tmp_path: Path) -> None:
    [found] = [one for one in read_cmmlu(write_cmmlu(tmp_path), [], "test", False).questions if "胰岛素由" in one.text]
    assert found.text == " 胰岛素由哪种细胞分泌？ "


@pytest.mark.parametrize("as_list", [False, True])
def test_medqa_has_options_as_an_object_or_a_list_four_of_them_or_five(tmp_path: Path, as_list: bool) -> None:
    bank = read_medqa(write_medqa(tmp_path / "a.jsonl", as_list=as_list))
    assert contents(bank.questions) == [*FIRST, *FIVE]
    assert {one.letters for one in bank.questions} == {"ABCD", "ABCDE"}
    assert {(one.subject, one.topic) for one in bank.questions} == {("内科", "内科")}


def test_a_chapter_of_a_book_is_no_topic(tmp_path: Path) -> None:
    path = write_medqa(tmp_path / "a.jsonl")
    path.write_text(path.read_text().replace("内科", "第二部分　内科"))
    assert {(one.subject, one.topic) for one in read_medqa(path).questions} == {("第二部分　内科", "医学")}


def test_cmexam_has_a_mark_options_in_lines_and_several_answers(tmp_path: Path) -> None:
    path = write_cmexam(tmp_path / "a.csv")
    assert path.read_bytes().startswith(b"\xef\xbb\xbf")
    bank = read_cmexam(path)
    assert contents(bank.questions) == [*FIVE, *SEVERAL]
    assert {(one.form, one.subject) for one in bank.questions} == {("open", "临床医学")}


def test_an_option_of_cmexam_may_go_over_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text('Question,Options,Answer\n问,"A 甲\n续\nB. 乙\nD 不是选项\nC、丙\n",C\n')
    [question] = read_cmexam(path).questions
    assert question.options == ("甲\n续", "乙\nD 不是选项", "丙")


def test_cmb_says_of_each_question_how_many_options_are_right(tmp_path: Path) -> None:
    bank = read_cmb(write_cmb(tmp_path / "a.json"))
    assert contents(bank.questions) == [*FIRST[:3], *FIVE, *SEVERAL]
    assert [one.form for one in bank.questions] == ["one"] * 5 + ["several"] * 2
    assert {one.subject for one in bank.questions} == {"医师考试", "护理考试"}


def test_cmb_keeps_the_answers_of_its_test_in_another_file(tmp_path: Path) -> None:
    path = write_cmb(tmp_path / "test.json", tmp_path / "answers.json")
    assert contents(read_cmb(path, tmp_path / "answers.json").questions) == [*FIRST[:3], *FIVE, *SEVERAL]
    with pytest.raises(InputError, match=r"test\.json:2: it has no answer\. Name the file .* answers=FILE"):
        read_cmb(path)


def test_records_that_are_no_questions_are_left_out_and_named(tmp_path: Path) -> None:
    path = write_medqa(tmp_path / "a.jsonl")
    lines = path.read_text().splitlines()
    broken = json.loads(lines[1])
    lines[1] = json.dumps({**broken, "answer_idx": "F"})
    lines[3] = json.dumps({**json.loads(lines[3]), "answer": "别的"})
    lines[4] = lines[4][:-3]
    lines[5] = json.dumps({**json.loads(lines[5]), "question": " "})
    lines[6] = json.dumps({**json.loads(lines[6]), "options": {"A": "一个"}})
    path.write_text("\n".join(lines))
    bank = read_medqa(path)
    assert len(bank.questions) == len(lines) - 5
    assert [reason.split(":")[1] for reason in bank.refused] == ["2", "4", "5", "6", "7"]
    assert bank.refused[0] == f"{path}:2: \"answer_idx\" is 'F', none of its options"


@pytest.mark.parametrize("dataset", ["cmmlu", "medqa"])
def test_a_question_with_an_empty_option_before_others_is_left_out_and_named(tmp_path: Path, dataset: str) -> None:
    if dataset == "cmmlu":
        path = write_cmmlu(tmp_path) / "test" / "anatomy.csv"
        path.write_text(path.read_text().replace("肝,脑,心", " ,脑,心"))
        bank = read_cmmlu(tmp_path, ["anatomy"], "test", False)
    else:
        path = write_medqa(tmp_path / "a.jsonl", SECOND)
        path.write_text(path.read_text().replace('"B": "肝"', '"B": null'))
        bank = read_medqa(path)
    assert contents(bank.questions) == [*SECOND[1:]]
    assert [reason.partition(": ")[2] for reason in bank.refused] == ["its option B is empty"]


def test_a_question_with_one_right_option_has_no_two(tmp_path: Path) -> None:
    path = tmp_path / "test" / "anatomy.csv"
    path.parent.mkdir()
    path.write_text(",Question,A,B,C,D,Answer\n0,问,甲,乙,丙,丁,AB\n1,问,甲,乙,丙,丁,B\n")
    bank = read_cmmlu(tmp_path, [], "test", False)
    assert len(bank.questions) == 1
    assert bank.refused == [f"{path}:2: its answer is 'AB', but one option should be right"]


def test_files_that_do_not_hold_what_is_asked_for_are_refused_with_a_remedy(tmp_path: Path) -> None:
    folder = write_ceval(tmp_path)
    refusals = {
        ("anatmy", "val"): "there is no such file. Known are basic_medicine, clinical_medicine.",
        ("clinical", "val"): "there is no such file. Did you mean clinical_medicine?",
        ("basic_medicine", "test"): "it has no answer. The answers of this split were withheld when it was published. "
        "Use split=val.",
    }
    for (subject, split), sentence in refusals.items():
        with pytest.raises(InputError) as refused:
            read_ceval(folder, [subject], split, with_exemplars=False)
        assert str(refused.value).endswith(sentence)
    (folder / "dev" / "basic_medicine_dev.csv").unlink()
    with pytest.raises(InputError, match="Fetch it, or use shots=0"):
        read_ceval(folder, ["basic_medicine"], "val", with_exemplars=True)
    with pytest.raises(InputError, match=r"no test/\*\.csv is in it"):
        read_cmmlu(tmp_path / "dev", [], "test", with_exemplars=False)


def test_the_seven_subjects_of_cmmlu_hold_1166_questions_and_medqa_685(real_data: Path) -> None:
    bank = read_cmmlu(real_data / "mcq" / "cmmlu", CMMLU_PAPER, "test", with_exemplars=True)
    assert len(bank.questions) == 1166
    assert {len(own) for own in bank.exemplars.values()} == {5}
    sizes = [sum(one.subject == subject for one in bank.questions) for subject in CMMLU_PAPER]
    assert sizes == [148, 237, 106, 176, 145, 185, 169]
    medqa = read_medqa(real_data / "mcq" / "medqa_zh_685.jsonl")
    assert len(medqa.questions) == 685
    assert not bank.refused + medqa.refused
