"""Words of --tasks: their parts, their options, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from evals.catalogue import BUILDERS, Suite
from evals.suite import BuildContext, TaskSpec, parse_spec
from evals.task import Task
from model.errors import InputError
from tests.evals.small_tasks import SmallTask


def build_small(spec: TaskSpec, context: BuildContext) -> Task:
    return SmallTask(spec.take_int("count", 2), context.prompting, context.seed)  # type: ignore[return-value]


def suite(*words: object, **how: object) -> Suite:
    return Suite(list(words), more={"small": build_small}, **how)  # type: ignore[arg-type]


def test_a_word_and_a_mapping_say_the_same() -> None:
    word = parse_spec("cmmlu=data/c mmlu,shots=5,label=five,clean=true")
    mapping = {"name": "cmmlu", "path": "data/c mmlu", "shots": 5, "label": "five", "clean": True}
    assert word == parse_spec(mapping) == TaskSpec("cmmlu", "data/c mmlu", word.options)
    assert word.options == {"shots": "5", "label": "five", "clean": "true"}
    assert parse_spec("small") == TaskSpec("small")
    assert parse_spec("small,count=3").options == {"count": "3"}


def test_a_path_may_hold_equal_signs_and_a_value_too() -> None:
    assert parse_spec("qa=data/split=test.jsonl,user=a=b") == TaskSpec("qa", "data/split=test.jsonl", {"user": "a=b"})


@pytest.mark.parametrize("word", ["", "=data", "cmmlu=", "cmmlu=data,shots", "cmmlu=data,=5", "cmmlu=data,"])
def test_a_word_of_another_form_is_refused(word: str) -> None:
    with pytest.raises(InputError, match="not of the form NAME=PATH,key=value"):
        parse_spec(word)


def test_a_mapping_without_a_name_and_an_option_given_twice_are_refused() -> None:
    with pytest.raises(InputError, match="no name says which task it is"):
        parse_spec({"path": "data"})
    with pytest.raises(InputError, match="count is given twice"):
        parse_spec("small,count=1,count=2")


def test_options_are_read_by_their_kind() -> None:
    spec = parse_spec("a,whole=3,share=0.5,way=gen,is=true,text=头晕")
    assert (spec.take_int("whole", 0), spec.take_float("share", 0.0), spec.take_flag("is")) == (3, 0.5, True)
    assert (spec.take_choice("way", ("lm-eval", "gen")), spec.take_str("text")) == ("gen", "头晕")
    assert (spec.take_int("none", 7), spec.take_int("none", None), spec.take_choice("none", ("x", "y"))) == (
        7,
        None,
        "x",
    )
    spec.check_all_taken()


def test_a_value_out_of_range_is_refused_with_the_range() -> None:
    spec = parse_spec("a,whole=-1,share=nan,way=other,is=1,word=many,wide=１_0")
    for take, said in (
        (lambda: spec.take_int("whole", 0), "whole=-1 is not a whole number, 0 or more"),
        (lambda: spec.take_int("word", 0, 1, 5), "word=many is not a whole number, 1 to 5"),
        (lambda: spec.take_int("wide", 0), "wide=１_0 is not a whole number, 0 or more"),
        (lambda: spec.take_float("share", 0.0, 0.0, 1.0), "share=nan is not a number from 0 to 1"),
        (lambda: spec.take_choice("way", ("lm-eval", "gen")), "way=other is not one of lm-eval, gen"),
        (lambda: spec.take_flag("is"), "is=1 is not true or false"),
    ):
        with pytest.raises(InputError, match=said):
            take()


def test_an_option_that_nobody_takes_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(InputError, match=r"--tasks small: cuont is none of its options\. Did you mean count\?"):
        suite("small,cuont=3").build(has_template=True)


def test_an_unknown_task_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(InputError, match=r"--tasks smal: there is no such task\. Did you mean small\?"):
        suite("smal").build(has_template=True)
    assert "ccks2019" in BUILDERS
    with pytest.raises(InputError, match=r"Did you mean ccks2019\?"):
        suite("ccks-2019=data").build(has_template=True)


def test_a_builder_of_ones_own_is_named_by_its_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_own_tasks.py").write_text("from tests.evals.test_suite import build_small as mine\n")
    monkeypatch.chdir(tmp_path)
    tasks = suite("my_own_tasks:mine,count=3", "my_own_tasks:mine,label=again").build(has_template=True)
    assert [(label, task.settings["count"]) for label, task in tasks.items()] == [("mine", 3), ("again", 2)]
    with pytest.raises(InputError, match=r"--tasks no_such_tasks:mine: there is no module no_such_tasks here\."):
        suite("no_such_tasks:mine").build(has_template=True)
    with pytest.raises(InputError, match="--tasks my_own_tasks:other: my_own_tasks has no function 'other'"):
        suite("my_own_tasks:other").build(has_template=True)


def test_labels_tell_tasks_of_one_name_apart_and_must() -> None:
    assert list(suite("small", "small,label=other,count=3").build(has_template=True)) == ["small", "other"]
    with pytest.raises(InputError, match="two are called small"):
        suite("small", "small,count=3").build(has_template=True)
    with pytest.raises(InputError, match="to name a folder"):
        suite("small,label=a/b").build(has_template=True)


def test_prompts_are_messages_where_the_model_has_a_template() -> None:
    def prompting(word: str, has_template: bool) -> object:
        (task,) = suite(word).build(has_template).values()
        return task.settings["prompting"]

    assert prompting("small", True) == prompting("small,prompting=chat", True) == "chat"
    assert prompting("small", False) == prompting("small,prompting=plain", True) == "plain"
    with pytest.raises(InputError, match="prompting=chat, but the model stores no chat template"):
        prompting("small,prompting=chat", False)


def test_a_task_that_asks_nothing_is_refused() -> None:
    class Empty(SmallTask):
        def requests(self) -> list[object]:  # type: ignore[override]
            return []

    with pytest.raises(InputError, match="there is nothing to ask"):
        Suite(["empty=data"], more={"empty": lambda spec, context: Empty()}).build(True)  # type: ignore[dict-item]


def test_a_limit_draws_items_in_their_order_and_a_larger_one_keeps_those_of_a_smaller() -> None:
    items = list("abcdefghijklmnopqrstuvwxyz")
    few, more = BuildContext(limit=5, seed=3).draw(items), BuildContext(limit=9, seed=3).draw(items)
    assert few == sorted(few) and len(few) == 5 and few != items[:5]
    assert set(few) < set(more) and len(more) == 9
    assert BuildContext(limit=5, seed=4).draw(items) != few
    assert BuildContext(limit=26).draw(items) == BuildContext().draw(items) == items


def test_a_tasks_own_limit_goes_before_that_of_all() -> None:
    seen: list[int | None] = []

    def build(spec: TaskSpec, context: BuildContext) -> Task:
        seen.append(context.limit)
        return SmallTask()  # type: ignore[return-value]

    Suite(["a", "b,limit=2"], limit=7, more={"a": build, "b": build}).build(True)
    assert seen == [7, 2]
