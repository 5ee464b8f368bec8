"""Multiple choice from files to numbers: what theory says of those who know, insist and guess."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest

from engine.intervals import wilson_interval
from evals.choice import BUILDERS, build
from evals.choice_files import LETTERS
from evals.choice_task import ChoiceTask
from evals.suite import BuildContext, parse_spec
from evals.task import Answer, Answered, Choose, Chosen, Metric, Result
from model.errors import InputError
from tests.evals.choice_samples import (
    FIRST,
    FIVE,
    SECOND,
    SEVERAL,
    Sample,
    many,
    write_ceval,
    write_cmb,
    write_cmexam,
    write_cmmlu,
    write_medqa,
)
from tests.evals.stubs import Stub, always, ask, guessing, knowing

COPIES = 40
WRITERS: dict[str, Callable[[Path], Path]] = {
    "ceval": lambda folder: write_ceval(folder, COPIES),
    "ceval-paper": lambda folder: write_ceval(folder, COPIES),
    "cmmlu": lambda folder: write_cmmlu(folder, COPIES),
    "medqa": lambda folder: write_medqa(folder / "a.jsonl", many((*FIRST, *FIVE), COPIES)),
    "cmexam": lambda folder: write_cmexam(folder / "a.csv", many((*FIVE, *SEVERAL), COPIES)),
    "cmb": lambda folder: write_cmb(folder / "a.json", copies=COPIES),
}
CASES = [
    (dataset, protocol)
    for dataset in WRITERS
    for protocol in ("ceval", "cmmlu", "lm-eval", "gen", "paper", "text")
    if protocol != "lm-eval" or dataset.startswith(("ceval", "cmmlu"))
]


def made(word: str, prompting: str = "plain", **context: object) -> ChoiceTask:
    spec = parse_spec(word)
    task = build(spec, BuildContext(prompting=prompting, **context))  # type: ignore[arg-type]
    spec.check_all_taken()
    assert isinstance(task, ChoiceTask)
    return task


def metric(result: Result, name: str) -> Metric:
    [found] = [metric for metric in result.metrics if metric.name == name]
    return found


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {dataset: write(tmp_path_factory.mktemp(dataset)) for dataset, write in WRITERS.items()}


@pytest.mark.parametrize("prompting", ["plain", "chat"])
@pytest.mark.parametrize(("dataset", "protocol"), CASES)
def test_who_knows_gets_all_who_insists_what_a_letter_has_and_who_guesses_a_share(
    files: dict[str, Path], dataset: str, protocol: str, prompting: str
) -> None:
    task = made(f"{dataset}={files[dataset]},protocol={protocol}", prompting)
    n, golds = len(task.questions), [question.answer for question in task.questions]

    is_likelihood = task.protocol.is_likelihood
    key = {one.id: one.letters.index(one.answer) if is_likelihood else one.answer for one in task.questions}
    known = ask(task, knowing(key))
    assert {metric.name: metric.value for metric in known.metrics if metric.name != "text_accuracy"} == {
        "accuracy": 1.0,
        **({"subject_mean": 1.0} if task.means_subjects else {}),
        **({"acc_norm": 1.0} if protocol == "lm-eval" else {}),
        **({} if is_likelihood else {"parse_failures": 0.0}),
        **({"acc_norm": metric(known, "acc_norm").value} if protocol == "text" else {}),
    }
    baselines = {name: value for name, metric, value in known.baselines if metric == "accuracy"}
    for place, letter in enumerate("ABCD"):
        insists = ask(task, always(place, letter))
        assert metric(insists, "accuracy").value == golds.count(letter) / n == baselines[f"always {letter}"]

    guesses = ask(task, guessing(seed=3, sayings=("A", "B", "C", "D")))
    chances = [
        (1 / len(one.options) if is_likelihood else 0.25 * (one.answer in "ABCD")) if len(one.answer) == 1 else 0.0
        for one in task.questions
    ]
    deviation = math.sqrt(sum(chance * (1 - chance) for chance in chances)) / n
    assert abs(metric(guesses, "accuracy").value - sum(chances) / n) < 4 * deviation
    if is_likelihood:
        assert baselines["a letter drawn at random"] == pytest.approx(sum(chances) / n)


def test_accuracy_is_of_questions_and_the_subjects_mean_of_subjects(files: dict[str, Path]) -> None:
    task = made(f"ceval={files['ceval']}")
    right = {one.id: one.answer if one.subject == "clinical_medicine" else "A" for one in task.questions}
    result = ask(task, knowing(right))
    in_basic = sum(one.answer == "A" for one in SECOND) / len(SECOND)
    first, second = len(FIRST) * COPIES, len(SECOND) * COPIES
    accuracy, mean = metric(result, "accuracy"), metric(result, "subject_mean")
    assert accuracy.value == pytest.approx((first + second * in_basic) / (first + second))
    assert (accuracy.low, accuracy.high) == wilson_interval(accuracy.value, first + second)
    assert mean.value == pytest.approx((1 + in_basic) / 2)
    # One subject is certain, the other a share: half the standard error of that share, either side.
    error = math.sqrt(in_basic * (1 - in_basic) / second) / 2
    assert mean.low is not None and mean.high is not None
    assert mean.high - mean.low == pytest.approx(2 * 1.96 * error, rel=0.1)
    groups = {name: (one.value, one.n) for name, (one,) in result.groups.items()}
    assert groups == {"clinical_medicine": (1.0, first), "basic_medicine": (in_basic, second)}


def test_several_right_options_are_right_only_together(files: dict[str, Path]) -> None:
    task = made(f"cmexam={files['cmexam']},protocol=gen")
    several = [one for one in task.questions if len(one.answer) > 1]
    assert len(several) == 2 * COPIES
    said = {one.id: "答案：" + "、".join(reversed(one.answer)) for one in task.questions}
    assert metric(ask(task, knowing(said)), "accuracy").value == 1.0
    less = {one.id: one.answer[:-1] if len(one.answer) > 1 else one.answer for one in task.questions}
    result = ask(task, knowing(less))
    assert metric(result, "accuracy").value == 1 - len(several) / len(task.questions)
    assert [one.value for (one,) in result.groups.values()] == [1.0, 0.0]
    assert list(result.groups) == ["one right option", "several right options"]
    more = {one.id: "".join(sorted({*one.answer, "B"})) for one in task.questions}
    unharmed = sum("B" in one.answer for one in task.questions)
    assert metric(ask(task, knowing(more)), "accuracy").value == unharmed / len(task.questions)


@pytest.mark.parametrize("protocol", ["ceval", "cmmlu", "paper"])
def test_a_protocol_of_one_letter_leaves_questions_with_several_out_and_says_so(
    files: dict[str, Path], protocol: str
) -> None:
    result = ask(made(f"cmexam={files['cmexam']},protocol={protocol}"), always())
    assert len(result.items) == 2 * COPIES
    assert result.counts["several_right_options_left_out"] == 2 * COPIES
    assert any("several right options are left out" in note for note in result.notes)


def test_answers_without_a_letter_are_wrong_and_counted(files: dict[str, Path]) -> None:
    task = made(f"medqa={files['medqa']},protocol=gen")
    silent = {one.id: "无法回答。" if index % 4 == 0 else one.answer for index, one in enumerate(task.questions)}
    result = ask(task, knowing(silent))
    lost = len(task.questions[::4])
    assert result.counts["unparsed"] == lost
    assert metric(result, "parse_failures").value == lost / len(task.questions)
    assert metric(result, "accuracy").value == 1 - lost / len(task.questions)
    assert result.items[0].answer == "无法回答。\n→ none"


def test_the_text_of_an_option_counts_beside_its_letter(files: dict[str, Path]) -> None:
    task = made(f"medqa={files['medqa']},protocol=gen")
    options = {one.id: dict(zip(one.letters, one.options, strict=True)) for one in task.questions}
    right = {one.id: f"应为{options[one.id][one.answer]}。" for one in task.questions}
    result = ask(task, knowing(right))
    assert [metric(result, name).value for name in ("accuracy", "text_accuracy")] == [1.0, 1.0]
    wrong = {one.id: f"{'BA'[one.answer == 'B']}. {options[one.id][one.answer]}" for one in task.questions}
    result = ask(task, knowing(wrong))
    assert [metric(result, name).value for name in ("accuracy", "text_accuracy")] == [0.0, 1.0]
    assert result.counts["letter_is_not_of_the_text"] == len(task.questions)


def test_by_character_a_long_text_may_be_likelier_than_a_short_one(tmp_path: Path) -> None:
    path = write_medqa(tmp_path / "a.jsonl", (Sample("什么？", ("短", "很长的一个选项", "甲", "乙"), "B"),))
    task = made(f"medqa={path},protocol=text")
    result = task.result({"0": Chosen((-3.0, -7.0, -4.0, -5.0), (1, 7, 1, 1), (False,) * 4)})
    assert {one.name: one.value for one in result.metrics} == {"accuracy": 0.0, "acc_norm": 1.0}
    assert result.items[0].answer == "A"


def test_of_equally_likely_letters_the_first_is_taken_and_ties_are_counted(files: dict[str, Path]) -> None:
    task = made(f"cmmlu={files['cmmlu']},protocol=lm-eval")
    result = ask(task, Stub(lambda asked: [1.0, 2.0, 2.0, 1.0], lambda asked: ""))
    assert {item.answer for item in result.items} == {"B"}
    assert result.counts["ties"] == len(result.items)


def test_exemplars_are_the_first_of_dev_for_each_subject(files: dict[str, Path]) -> None:
    task = made(f"ceval={files['ceval']},shots=2")
    dev = [one.text for one in task.exemplars["basic_medicine"]]
    assert dev == ["维生素 C 缺乏会导致", "正常人的体温约为"]
    with pytest.raises(InputError, match="shots=6, but 5 questions can be shown"):
        made(f"ceval={files['ceval']},shots=6")


def test_a_file_without_dev_lends_drawn_questions_that_are_not_asked(files: dict[str, Path]) -> None:
    task = made(f"medqa={files['medqa']},shots=3", seed=5)
    again, other = (made(f"medqa={files['medqa']},shots=3", seed=seed) for seed in (5, 6))
    shown = {one.text for one in task.exemplars["内科"]}
    assert len(shown) == 3
    assert not shown & {one.text for one in task.questions}
    assert len(task.questions) == 10 * COPIES - 3 == 10 * COPIES - task.counts["shown_as_exemplars"]
    assert task.exemplars == again.exemplars != other.exemplars


def test_exemplars_of_another_file_are_not_those_that_are_asked(files: dict[str, Path], tmp_path: Path) -> None:
    others = write_medqa(tmp_path / "dev.jsonl", (FIRST[0], *SECOND[:3]))
    task = made(f"medqa={files['medqa']},shots=2,exemplars={others}")
    assert [one.text for one in task.exemplars["内科"]] == [one.text for one in SECOND[:2]]
    assert task.counts["exemplars_that_are_asked"] == 1
    assert len(task.questions) == 10 * COPIES


def test_a_limit_draws_questions_and_a_larger_one_keeps_them(files: dict[str, Path]) -> None:
    small, large = (made(f"cmmlu={files['cmmlu']}", limit=limit) for limit in (20, 50))
    ids = [[one.id for one in task.questions] for task in (small, large)]
    assert [*map(len, ids)] == [20, 50]
    assert set(ids[0]) < set(ids[1])
    assert small.settings["limit"] == 20


def test_what_decides_the_numbers_is_in_the_settings(files: dict[str, Path]) -> None:
    words = ("", ",shots=2", ",protocol=gen", ",protocol=gen,max_new_tokens=8", ",subjects=anatomy")
    settings = [str(made(f"cmmlu={files['cmmlu']}{word}").settings) for word in words]
    assert len(set(settings)) == len(words)
    table = files["cmmlu"] / "test" / "anatomy.csv"
    before = table.read_bytes()
    try:
        table.write_bytes(before.replace("皮肤".encode(), "皮  肤".encode()))
        assert str(made(f"cmmlu={files['cmmlu']}").settings) not in settings
    finally:
        table.write_bytes(before)


def test_likelihoods_are_asked_of_letters_and_words_of_answers(files: dict[str, Path]) -> None:
    for protocol, letters in {"ceval": LETTERS[:4], "cmmlu": LETTERS[:4], "lm-eval": " A B C D"}.items():
        [request, *_] = made(f"cmmlu={files['cmmlu']},protocol={protocol}").requests()
        assert isinstance(request, Choose)
        assert "".join(request.options) == letters
    plain, chat = (
        made(f"cmmlu={files['cmmlu']},protocol=gen", prompting).requests()[0] for prompting in ("plain", "chat")
    )
    assert isinstance(plain, Answer) and isinstance(chat, Answer)
    assert (plain.sampling.stop, chat.sampling.stop) == (["\n\n"], [])
    assert (plain.sampling.temperature, plain.sampling.max_new_tokens) == (0.0, 256)


def test_duplicates_are_counted(tmp_path: Path) -> None:
    path = write_medqa(tmp_path / "a.jsonl", (*FIRST, *FIRST[:3]))
    assert ask(made(f"medqa={path}"), always()).counts == {"duplicates": 3}


@pytest.mark.parametrize("protocol", ["ceval", "gen", "text"])
def test_a_question_that_is_asked_ten_times_tells_no_more_than_once(tmp_path: Path, protocol: str) -> None:
    intervals = []
    for times in (1, 10):
        path = write_medqa(tmp_path / "a.jsonl", FIRST * times)
        result = ask(made(f"medqa={path},protocol={protocol}"), always(3, "D"))
        assert {one.n for one in result.metrics} == {len(FIRST) * times}
        intervals.append([(one.name, one.value, one.low, one.high) for one in result.metrics])
    assert intervals[0] == intervals[1] and intervals[0][0][1:] == (0.25, *wilson_interval(0.25, len(FIRST)))


def test_questions_of_one_text_with_other_options_are_two(tmp_path: Path) -> None:
    same = tuple(sample._replace(text="下列正确的是") for sample in FIRST)
    task = made(f"medqa={write_medqa(tmp_path / 'a.jsonl', same)},protocol=text")
    result = ask(task, always(3))
    assert (result.metrics[0].low, result.metrics[0].high) == wilson_interval(0.25, len(FIRST))
    assert result.items[0].shown == "问题：下列正确的是\n答案：\n\nA 30-50 次\nB 60-100 次\nC 110-130 次\nD 140-160 次"


@pytest.mark.parametrize("protocol", ["ceval", "text"])
def test_a_question_with_an_empty_option_is_not_asked_and_counted(tmp_path: Path, protocol: str) -> None:
    empty = Sample("什么？", ("甲", "", "乙", "丙"), "A")
    task = made(f"medqa={write_medqa(tmp_path / 'a.jsonl', (empty, *FIRST))},protocol={protocol}")
    assert len(task.requests()) == len(FIRST) and all(all(one.options) for one in task.requests())  # type: ignore[union-attr]
    result = ask(task, always())
    assert result.counts["not_questions"] == 1 and "a.jsonl:1: its option B is empty" in result.notes[1]


REFUSALS = {
    "medqa={medqa},protocol=lm-eval": "protocol=lm-eval is for ceval and cmmlu only. Choose another protocol.",
    "ceval={ceval},protocol=paper,shots=2": "protocol=paper shows no exemplars. Leave out shots.",
    "cmmlu={cmmlu},split=val": "split=val is not one of test. Correct it.",
    "cmmlu-paper={cmmlu}": "there is no such file. Known are anatomy, clinical_knowledge.",
    "ceval-paper={ceval},subjects=physician": "subjects is none of its options.",
    "cmexam={several}": "nothing is left to ask by protocol=ceval. Use protocol=gen.",
    "medqa=nowhere.jsonl": "nowhere.jsonl is not there. Give its file.",
}


@pytest.mark.parametrize("word", REFUSALS)
def test_what_cannot_be_asked_is_refused_with_a_remedy(files: dict[str, Path], word: str, tmp_path: Path) -> None:
    several = write_cmexam(tmp_path / "several.csv", SEVERAL)
    with pytest.raises(InputError) as refused:
        made(word.format(**files, several=several))
    assert REFUSALS[word] in str(refused.value)


def test_every_task_is_named() -> None:
    assert set(BUILDERS) == {"ceval", "ceval-paper", "cmmlu", "cmmlu-paper", "medqa", "cmexam", "cmb"}


def test_a_result_needs_the_responses_alone(files: dict[str, Path]) -> None:
    task = made(f"cmb={files['cmb']}")
    responses = {one.id: Chosen((-2.0, -1.0, *[-3.0] * len(one.options[2:])), (1,), (False,)) for one in task.questions}
    assert task.result(responses) == task.result(dict(reversed(responses.items())))
    spoken = made(f"cmb={files['cmb']},protocol=gen")
    answered = {one.id: Answered("B", "stop", 2) for one in spoken.questions}
    assert metric(spoken.result(answered), "accuracy").value == sum(
        one.answer == "B" for one in spoken.questions
    ) / len(spoken.questions)
