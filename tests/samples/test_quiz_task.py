"""The keyed questions as a task: theory says what some answers are worth."""

from __future__ import annotations

import pytest

from evals.evaluation import conclude
from evals.suite import BuildContext, TaskSpec
from evals.task import Answer, Answered, Item, Metric, Result
from model.errors import InputError
from samples.dialogues import Dialogue
from samples.knowledge import Knowledge
from samples.questions import questions_of
from samples.quiz_task import QuizTask, build
from tests.evals.stubs import always, ask, guessing, knowing, text_of
from tests.samples.conftest import Splits


def quiz(prompting: str = "chat", limit: int | None = None, **options: str) -> QuizTask:
    context = BuildContext("plain" if prompting == "plain" else "chat", limit=limit)
    task = build(TaskSpec("questions", None, options), context)
    assert isinstance(task, QuizTask)
    return task


def metric(result: Result, name: str) -> Metric:
    return next(metric for metric in result.metrics if metric.name == name)


def test_the_conversations_own_answers_are_right_and_safe(dialogues: Splits[Dialogue]) -> None:
    said = {dialogue.id: dialogue.messages[-1].content for dialogue in dialogues.held_out}
    task = quiz()
    result = ask(task, knowing({request.id: said[request.id.split("#")[0]] for request in task.requests()}))
    assert metric(result, "correct").value == metric(result, "safe").value == 1.0
    reward, complete, cautious = (metric(result, name).value for name in ("true_reward", "complete", "cautious"))
    assert reward == pytest.approx(0.5 + complete / 4 + cautious / 4)
    assert len(result.items) == len(questions_of(dialogues.held_out)) == 248


def test_whoever_always_names_one_department_is_right_where_it_is_asked_for() -> None:
    task = quiz()
    result = ask(task, always(text="请到心内科就诊。"))
    right = [question.accepted == ("心内科",) for question in task.questions]
    assert 0 < sum(right) < 142
    assert metric(result, "correct").value == sum(right) / len(right)
    assert {metric.name: metric.value for metric in result.groups["drug"]}["correct"] == 0.0


def test_whoever_guesses_departments_is_right_as_often_as_the_baseline_says(knowledge: Knowledge) -> None:
    task = quiz(answers="40")
    departments, drugs = knowledge.departments, [drug.name for drug in knowledge.drugs]
    of_kind = {"department": guessing(1, departments), "drug": guessing(2, drugs)}
    answers = {}
    for request in task.requests():
        assert isinstance(request, Answer)
        answers[request.id] = of_kind[request.id.split("/")[0]].respond([request])[0].text  # type: ignore[union-attr]
    result = ask(task, knowing(answers))
    [(_, name, chance)] = result.baselines
    low, high = (metric(result, "correct").low, metric(result, "correct").high)
    assert name == "correct" and low is not None and high is not None and low <= chance <= high


def test_an_item_is_a_question_with_all_of_its_answers() -> None:
    task = quiz(answers="3", limit=5)
    result = ask(task, always(text="我不知道"))
    assert len(task.requests()) == 15 and len(result.items) == 5
    item: Item = result.items[0]
    assert item.parts["safe"][1] == 3.0 and item.answer.count("我不知道") == 3
    assert metric(result, "tokens").value == len("我不知道") + 1


def test_answers_without_an_end_are_counted_once() -> None:
    task = quiz(answers="2", limit=3)
    result = conclude(task, {request.id: Answered("请", "length", 1, dropped=1, cut=0) for request in task.requests()})
    assert result.counts == {"answers_without_end": 6, "prompts_without_oldest_turns": 6}


def test_a_model_without_a_template_sees_the_question_as_documents_write_it() -> None:
    chat, plain = quiz(), quiz("plain")
    for asked, written in zip(chat.requests(), plain.requests(), strict=True):
        question = text_of(asked.prompt).split("\n")[-1]
        assert text_of(written.prompt).endswith(f"问：{question}\n答：") and written.sampling.stop == ["\n"]
        assert asked.sampling.stop == []


def test_its_questions_are_the_bundled_ones_alone() -> None:
    with pytest.raises(InputError, match="Leave the path out"):
        build(TaskSpec("questions", "mine.jsonl"), BuildContext())
