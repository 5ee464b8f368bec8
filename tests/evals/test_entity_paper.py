"""Paper mode: the first items, their sampling, and sets of words, as the authors' script counts them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evals.entities import BUILDERS
from evals.entity_paper import elements
from evals.suite import BuildContext, parse_spec
from evals.task import Answer, Task
from model.chat import Message
from model.errors import InputError
from tests.evals.entity_samples import NOTES, write_sample
from tests.evals.stubs import always, ask, knowing


def records(path: Path, *outputs: str) -> Path:
    lines = [json.dumps({"prompt": [f"问{n}"], "output": [output]}) for n, output in enumerate(outputs)]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def build(word: str, prompting: str = "chat") -> Task:
    spec = parse_spec(f"{word},protocol=paper")
    task = BUILDERS[spec.name](spec, BuildContext(prompting))
    spec.check_all_taken()
    return task


def paper_values(task: Task, text: str) -> list[float]:
    return [metric.value for metric in ask(task, always(text=text)).metrics]


def test_a_line_counts_by_its_first_two_words() -> None:
    assert elements("肺炎 疾病\n头孢 药物 口服") == {("肺炎", "疾病"), ("头孢", "药物")}
    assert elements("肺炎\t疾病") == elements("  肺炎   疾病 ") == {("肺炎", "疾病")}
    assert elements("疾病：肺炎") == {("疾病：肺炎",)}


def test_an_empty_line_is_an_element() -> None:
    assert elements("") == elements("\n \n") == {()}
    assert elements("肺炎 疾病\n") == {("肺炎", "疾病"), ()}


@given(st.text("甲乙 \n\t", max_size=20))
def test_there_is_always_an_element_so_nothing_is_divided_by_zero(text: str) -> None:
    assert elements(text)


def test_two_answers_counted_by_hand(tmp_path: Path) -> None:
    # Gold: {肺炎 疾病, 头孢 药物} and {()}. Said twice: {肺炎 疾病, 头孢 药, ()}.
    # First: 1 right, 2 wrong, 1 missed. Second: () is right, 2 wrong, none missed. So tp 2, fp 4, fn 1.
    task = build(f"chimst={records(tmp_path / 'a.json', '肺炎 疾病' + chr(10) + '头孢 药物', '')}")
    assert paper_values(task, "肺炎 疾病\n头孢 药\n") == [4 / 9, 2 / 6, 2 / 3]


def test_nothing_is_folded(tmp_path: Path) -> None:
    assert paper_values(build(f"chimst={records(tmp_path / 'a.json', 'CT 检查')}"), "ＣＴ 检查") == [0.0, 0.0, 0.0]


@pytest.mark.parametrize(("dataset", "count"), [("ccks2019", 200), ("chimst", 100)])
def test_the_first_items_count(dataset: str, count: int, tmp_path: Path) -> None:
    requests = build(f"{dataset}={records(tmp_path / 'a.json', *['肺炎 疾病'] * 250)}").requests()
    assert [request.id for request in requests] == [str(n + 1) for n in range(count)]


def test_answers_are_drawn_as_the_authors_drew_them(tmp_path: Path) -> None:
    first, second = (one for one in build(f"chimst={records(tmp_path / 'a.json', 'a', 'b')}").requests())
    assert isinstance(first, Answer) and isinstance(second, Answer)
    assert (first.sampling.temperature, first.sampling.top_p, first.sampling.max_new_tokens) == (1.0, 0.85, 512)
    assert first.seed != second.seed and first.prompt == (Message("user", "问0"),)


def test_exemplars_stand_before_the_question(tmp_path: Path) -> None:
    word = f"chimst={records(tmp_path / 'a.json', 'a')},shots=1,exemplars={records(tmp_path / 'b.json', 'x y')}"
    assert build(word).requests()[0].prompt == (
        Message("user", "问0"), Message("assistant", "x y"), Message("user", "问0")
    )  # fmt: skip
    assert build(word, "plain").requests()[0].prompt == "问0\nx y\n\n问0\n"


@pytest.mark.parametrize("dataset", ["ccks2019", "chimst"])
def test_marked_texts_are_written_a_mention_and_its_type_a_line(dataset: str, tmp_path: Path) -> None:
    task = build(f"{dataset}={write_sample(tmp_path / 'notes.json', dataset)}")
    result = ask(task, always(text=""))
    assert result.items[0].gold.splitlines()[0].split()[0] in NOTES[0][0] and NOTES[0][0] in result.items[0].shown
    gold = {item.id: item.gold for item in result.items}
    assert [metric.value for metric in ask(task, knowing(gold)).metrics] == [1.0, 1.0, 1.0]
    # The third note has nothing in it: an empty answer has its one empty line right, and 4 others wrong.
    assert result.metrics[1].value == 1 / 5
    assert any("first two words" in note for note in result.notes)


def test_prompts_with_answers_are_for_the_paper_alone(tmp_path: Path) -> None:
    spec = parse_spec(f"chimst={records(tmp_path / 'a.json', 'a')}")
    with pytest.raises(
        InputError, match=r"no texts with entities\. Compare them as the paper does, with chimst=.*,protocol=paper"
    ):
        BUILDERS["chimst"](spec, BuildContext("chat"))


def test_too_few_exemplars_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="it holds 1 examples, fewer than shots=2"):
        build(f"chimst={records(tmp_path / 'a.json', 'a')},shots=2,exemplars={records(tmp_path / 'b.json', 'x y')}")
