"""The task: what is asked, what theory says that stubs score, and what of a file ends up in the numbers."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from evals.entities import BUILDERS
from evals.entity_files import LAYOUTS
from evals.evaluation import conclude
from evals.suite import BuildContext, parse_spec
from evals.task import Answer, Answered, Metric, Result, Task
from model.chat import Message
from model.errors import InputError
from tests.evals.entity_samples import MORE, NOTES, write_sample
from tests.evals.stubs import Stub, always, ask, guessing, knowing, text_of

DATASETS = tuple(LAYOUTS)
FORMS = ("lines", "short", "json")


def build(word: str, **context: Any) -> Task:
    spec = parse_spec(word)
    task = BUILDERS[spec.name](spec, BuildContext(**{"prompting": "chat", **context}))
    spec.check_all_taken()
    return task


def values(result: Result) -> dict[str, float]:
    return {metric.name: metric.value for metric in result.metrics}


def key(task: Task) -> dict[str, str]:
    """The right answers, by id."""
    return {item.id: item.gold for item in ask(task, always(text="")).items}


def sample(folder: Path, dataset: str = "entities", notes: Any = NOTES, name: str = "notes.json") -> Path:
    return write_sample(folder / name, dataset, notes)


def notes(folder: Path, *records: Mapping[str, Any]) -> Path:
    path = folder / "own.jsonl"
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    return path


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dataset", DATASETS)
def test_the_right_answer_scores_one_in_every_format_and_form(dataset: str, form: str, tmp_path: Path) -> None:
    task = build(f"{dataset}={sample(tmp_path, dataset)},format={form}")
    result = ask(task, knowing(key(task)))
    assert values(result) == {name: 1.0 for name in values(result)} | {"parse_failures": 0.0}
    assert all(metric.low == metric.high == 1.0 for metric in result.metrics[:-1])  # though some draws lack a type
    assert not any(result.counts.values())
    assert all(metric.value == 1.0 for group in result.groups.values() for metric in group if metric.n)


@pytest.mark.parametrize("dataset", DATASETS)
def test_an_answer_that_names_nothing_has_no_precision_and_finds_nothing(dataset: str, tmp_path: Path) -> None:
    found = values(ask(build(f"{dataset}={sample(tmp_path, dataset)}"), always(text="无")))
    assert math.isnan(found.pop("precision"))
    assert set(found.values()) == {0.0}


def test_an_empty_answer_is_a_failure_and_an_explicit_nothing_is_none(tmp_path: Path) -> None:
    task = build(f"entities={sample(tmp_path)}")
    for text, share in (("", 1.0), ("不知道", 1.0), ("无", 0.0), ("疾病：肺炎", 0.0)):
        result = ask(task, always(text=text))
        assert values(result)["parse_failures"] == share and result.counts["unreadable"] == 5 * share


def test_a_text_that_stands_in_the_file_ten_times_tells_no_more_than_once(tmp_path: Path) -> None:
    def of(times: int) -> dict[str, Metric]:
        task = build(f"entities={sample(tmp_path, notes=[note for note in NOTES for _ in range(times)])}")
        right = {item.shown: item.gold for item in ask(task, always(text="")).items[: 2 * times]}
        half = Stub(lambda asked: [], lambda asked: right.get(text_of(asked.prompt), "疾病：肺炎"))
        result = ask(task, half)
        return {metric.name: metric for metric in (*result.metrics, *result.groups["症状"])}

    once, often = of(1), of(10)
    for name, metric in once.items():
        assert dataclasses.astuple(often[name])[:4] == pytest.approx((name, metric.value, metric.low, metric.high))
    assert 0 < once["micro_f1"].value < 1 and once["micro_f1"].n == 5 and often["micro_f1"].n == 50


def test_a_letter_is_no_entity(tmp_path: Path) -> None:
    assert values(ask(build(f"entities={sample(tmp_path)}"), always()))["micro_f1"] == 0.0


def test_one_answer_for_all_is_counted_by_hand(tmp_path: Path) -> None:
    # NOTES have 3, 3, 0, 2 and 2 entities up to repetition. 疾病：肺炎 is right in the first note alone.
    result = ask(build(f"entities={sample(tmp_path)}"), always(text="疾病：肺炎\n症状：发烧"))
    found = values(result)
    assert found["precision"] == 1 / 10 and found["recall"] == 1 / 10 and found["micro_f1"] == 2 / 20
    assert result.counts["not_in_text"] == 9
    # Types 疾病 1 of 5 + 3, 症状 0 of 5 + 2, and 0 of the four others.
    assert found["macro_f1"] == pytest.approx((2 / 8 + 0 + 0 + 0 + 0) / 5)
    # Spans: 肺炎 twice in the first note, nine answers that have no place, 11 gold spans.
    assert found["span_f1"] == pytest.approx(2 * 2 / (2 + 9 + 11))


def test_an_answer_at_random_scores_what_theory_says(tmp_path: Path) -> None:
    """Of two types and two mentions, an answer names each of the four pairs with probability one half. Gold is two of
    them: a right answer's expectation is 1 of 2 that are said and of 2 that are there, so F1 is 2 * 1 / (2 + 2)."""
    records = [
        {"text": f"甲乙{n}", "entities": [{"type": "病", "mention": "甲"}, {"type": "药", "mention": "乙"}]}
        for n in range(4000)
    ]
    pairs = [f"{kind}：{mention}" for kind, mention in itertools.product("病药", "甲乙")]
    sayings = ["\n".join(pair for bit, pair in enumerate(pairs) if at >> bit & 1) or "无" for at in range(16)]
    found = {one.name: one for one in ask(build(f"entities={notes(tmp_path, *records)}"), guessing(0, sayings)).metrics}
    for name in ("micro_f1", "precision", "recall"):
        low, high = found[name].low, found[name].high
        assert low is not None and high is not None and low - 0.01 < 0.5 < high + 0.01 and high - low < 0.05
    assert found["parse_failures"].value == 0.0


def test_where_places_of_a_mention_are_not_all_marked_the_note_says_what_can_be_reached(tmp_path: Path) -> None:
    entity = {"type": "病", "mention": "水痘", "start": 3, "end": 5}
    task = build(f"entities={notes(tmp_path, {'text': '水痘与水痘', 'entities': [entity]})}")
    result = ask(task, knowing(key(task)))
    assert values(result)["micro_f1"] == 1.0 and values(result)["span_f1"] == 2 / 3
    assert result.baselines == (("the right answer", "span_f1", 2 / 3),) and "66.7%" in result.notes[0]


def test_without_places_there_are_no_span_metrics(tmp_path: Path) -> None:
    path = notes(tmp_path, {"text": "肺炎", "entities": [{"type": "病", "mention": "肺炎"}]})
    result = ask(build(f"entities={path}"), always(text="病：肺炎"))
    assert [metric.name for metric in result.metrics] == [
        "micro_f1", "precision", "recall", "macro_f1", "relaxed_f1", "parse_failures"
    ]  # fmt: skip
    assert not result.notes


def test_the_parts_of_items_sum_to_the_metrics(tmp_path: Path) -> None:
    task = build(f"cmeee={sample(tmp_path, 'cmeee')}")
    result = ask(task, always(text="疾病：肺炎、扁桃体炎\n临床表现：发热"))
    for metric in result.metrics:
        if metric.name != "macro_f1":
            top, bottom = (sum(item.parts[metric.name][side] for item in result.items) for side in (0, 1))
            assert metric.value == top / bottom and metric.low <= metric.value + 1e-12 and metric.value <= metric.high


def test_a_type_has_precision_recall_and_f1_of_its_own(tmp_path: Path) -> None:
    result = ask(build(f"entities={sample(tmp_path)}"), always(text="疾病：肺炎\n疾病：偏头痛"))
    named = {metric.name: metric for metric in result.groups["疾病"]}
    assert (named["precision"].value, named["recall"].value, named["f1"].value) == (2 / 10, 2 / 3, 4 / 13)
    assert named["recall"].n == 3
    assert math.isnan({metric.name: metric for metric in result.groups["药物"]}["precision"].value)


def test_a_type_that_nobody_marked_is_no_part_of_the_macro_mean(tmp_path: Path) -> None:
    task = build(
        f"entities={notes(tmp_path, {'text': '肺炎', 'entities': [{'type': '病', 'mention': '肺炎'}]})},types=药+病"
    )
    assert values(ask(task, always(text="病：肺炎")))["macro_f1"] == 1.0
    found = values(ask(task, always(text="病：肺炎\n药：肺炎")))
    assert found["macro_f1"] == 1.0 and found["micro_f1"] == 2 / 3


def test_a_conversation_shows_exemplars_as_earlier_turns(tmp_path: Path) -> None:
    exemplars = sample(tmp_path, notes=MORE, name="train.json")
    (first, *_), task = build_with(f"entities={sample(tmp_path)},shots=2,exemplars={exemplars}")
    assert [message.role for message in first.prompt] == ["user", "assistant"] * 2 + ["user"]
    assert first.prompt[1] == Message("assistant", "症状：咳嗽\n药物：氨溴索")
    instruction, text = first.prompt[-1].content.split("\n")
    assert text == f"文本：{NOTES[0][0]}" and "抽取下面文本中的症状、疾病、药物、部位、检查，" in instruction
    assert task.settings["shots"] == 2 and not first.sampling.stop


def build_with(word: str, **context: Any) -> tuple[list[Answer], Task]:
    task = build(word, **context)
    requests = [request for request in task.requests() if isinstance(request, Answer)]
    return requests, task


def test_a_plain_text_shows_exemplars_as_sections_and_ends_where_the_answer_begins(tmp_path: Path) -> None:
    exemplars = sample(tmp_path, notes=MORE, name="train.json")
    word = f"entities={sample(tmp_path)},shots=1,exemplars={exemplars},format=json"
    (first, *_), _ = build_with(word, prompting="plain")
    instruction, shown, asked = first.prompt.split("\n\n")
    assert instruction.startswith("抽取下面文本中的")
    assert shown == f'文本：{MORE[0][0]}\n结果：\n{{"症状": ["咳嗽"], "药物": ["氨溴索"]}}'
    assert asked == f"文本：{NOTES[0][0]}\n结果：\n" and first.sampling.stop == ["\n\n"]


def test_exemplars_that_a_plain_text_has_no_room_for_go_and_the_instruction_stays(tmp_path: Path) -> None:
    exemplars = sample(tmp_path, notes=MORE, name="train.json")
    word = f"entities={sample(tmp_path)},shots=3,exemplars={exemplars},max_new_tokens=9"
    whole = [text_of(request.prompt) for request in build(word, prompting="plain").requests()]
    limit = max(map(len, whole)) - 1  # the longest prompt alone is too long
    requests, task = build_with(word, prompting="plain", fits=lambda prompt, room: len(prompt) + room <= limit + 9)
    prompts = [text_of(request.prompt) for request in requests]
    assert all(prompt.startswith("抽取") and len(prompt) <= limit for prompt in prompts)
    assert sorted(prompt.count("文本：") for prompt in prompts) == [3, 4, 4, 4, 4]
    assert MORE[0][0] not in prompts[whole.index(max(whole, key=len))]
    assert ask(task, always(text="无")).counts["dropped_exemplars"] == 1


def test_the_short_wording_is_that_of_the_bundled_conversations(tmp_path: Path) -> None:
    types = "疾病+症状+部位+检查+药物"
    (first, *_), _ = build_with(f"entities={sample(tmp_path)},format=short,types={types}")
    assert first.prompt[0].content == f"抽取病历中的疾病、症状、部位、检查和药物，每行一个。\n{NOTES[0][0]}"


def test_the_right_answer_goes_type_by_type_in_the_order_of_the_prompt(tmp_path: Path) -> None:
    task = build(f"entities={sample(tmp_path)},types=药物+疾病+症状+部位+检查")
    assert key(task)["1"] == "药物：头孢克肟\n疾病：肺炎\n症状：发热" and key(task)["3"] == "无"
    task = build(f"entities={sample(tmp_path)},types=药物+疾病+症状+部位+检查,format=json")
    assert key(task)["1"] == '{"药物": ["头孢克肟"], "疾病": ["肺炎"], "症状": ["发热"]}' and key(task)["3"] == "{}"


def test_a_text_may_bring_its_own_instruction(tmp_path: Path) -> None:
    entity = {"type": "病", "mention": "肺炎"}
    path = notes(tmp_path, {"text": "肺炎。", "entities": [entity], "instruction": "找出疾病。"})
    (first,), _ = build_with(f"entities={path}")
    assert first.prompt == (Message("user", "找出疾病。\n肺炎。"),)


def test_exemplars_that_are_asked_about_are_passed_over_and_counted(tmp_path: Path) -> None:
    exemplars = sample(tmp_path, notes=[NOTES[0], MORE[0], NOTES[4], MORE[1]], name="train.json")
    requests, task = build_with(f"entities={sample(tmp_path)},shots=2,exemplars={exemplars}")
    shown = {turn.content.split("文本：")[1] for turn in requests[0].prompt[:-1] if turn.role == "user"}
    assert shown == {MORE[0][0], MORE[1][0]}
    assert ask(task, always(text="无")).counts["exemplars_in_test"] == 2
    with pytest.raises(InputError, match="2 of its texts can be shown, fewer than shots=3"):
        build(f"entities={sample(tmp_path)},shots=3,exemplars={exemplars}")


def test_an_exemplar_with_a_misplaced_entity_is_not_shown(tmp_path: Path) -> None:
    entity = {"type": "疾病", "mention": "胃炎"}
    wrong, right = ({"text": f"诊断胃炎{n}。", "entities": [entity | {"start": n}]} for n in (1, 2))
    (first, *_), _ = build_with(f"entities={sample(tmp_path)},shots=1,exemplars={notes(tmp_path, wrong, right)}")
    assert first.prompt[0].content.endswith("文本：诊断胃炎2。")


def test_covering_exemplars_show_every_type_as_soon_as_can_be(tmp_path: Path) -> None:
    exemplars = sample(
        tmp_path, notes=[MORE[0], *[(f"{n}{text}", marked) for n in range(5) for text, marked in MORE]], name="t"
    )
    exemplars = exemplars.rename(tmp_path / "train.json")
    drawn = set()
    for seed in range(5):
        requests, _ = build_with(f"entities={sample(tmp_path)},shots=3,pick=cover,exemplars={exemplars}", seed=seed)
        drawn.add(text_of(requests[0].prompt))
        shown = " ".join(turn.content for turn in requests[0].prompt if turn.role == "assistant")
        assert all(name in shown for name in ("症状：", "药物：", "疾病：", "检查：", "部位："))
    assert len(drawn) > 1


def test_a_folder_brings_its_own_exemplars(tmp_path: Path) -> None:
    write_sample(tmp_path / "CMeEE_dev.json", "cmeee")
    write_sample(tmp_path / "CMeEE_train.json", "cmeee", MORE)
    requests, _ = build_with(f"cmeee={tmp_path},shots=1")
    assert len(requests) == 5 and len(requests[0].prompt) == 3


@pytest.mark.parametrize("protocol", ["default", "paper"])
def test_what_was_cut_dropped_and_not_finished_is_counted_once(protocol: str, tmp_path: Path) -> None:
    task = build(f"ccks2019={sample(tmp_path, 'ccks2019')},protocol={protocol}")
    responses = {request.id: Answered("无", "length", 4, dropped=2, cut=3) for request in task.requests()}
    counts = {name: count for name, count in conclude(task, responses).counts.items() if count}
    assert counts == {"answers_without_end": 5, "prompts_without_oldest_turns": 5, "prompts_cut": 5}


def test_a_limit_draws_texts_and_leaves_their_names(tmp_path: Path) -> None:
    whole, some = (build(f"entities={sample(tmp_path)}", limit=limit) for limit in (None, 2))
    ids = [request.id for request in whole.requests()]
    assert ids == ["1", "2", "3", "4", "5"] and len(some.requests()) == 2
    assert {request.id for request in some.requests()} < set(ids) and some.settings["items"] == 2


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("entities", "it needs its file. Write entities=PATH."),
        ("cmeee=nowhere.json", "nowhere.json is not there"),
        ("entities=FILE,shots=2", "shots=2 needs examples. Name their file with exemplars=FILE"),
        ("entities=FILE,exemplars=FILE", "are not shown without shots. Add shots=5"),
        ("entities=FILE,types=疾病+症状+部位+检查+药物,protocol=paper", "protocol=paper is not for entities"),
        ("entities=FILE,format=xml", "format=xml is not one of lines, short, json"),
        ("entities=FILE,shot=2", "shot is none of its options. Did you mean shots?"),
        ("entities=FILE,types=疾病+症状", "has 药物 too, which types=疾病+症状 does not name"),
        ("cmeee=FILE", "an entity has neither a mention nor a place. Mend the record, or check which dataset it is of"),
        ("ccks2019=FILE", '"originalText" is missing; this record has "text", "entities"'),
        ("entities=FILE,protocol=paper", "protocol=paper is not for entities; it is for ccks2019 and chimst"),
    ],
)
def test_a_word_that_cannot_be_used_is_refused(word: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(InputError) as error:
        build(word.replace("FILE", str(sample(tmp_path))))
    assert said in str(error.value)


@pytest.mark.parametrize("form", FORMS)
def test_the_real_test_set_is_evaluated_whole(form: str, real_data: Path) -> None:
    files = real_data / "ner"
    word = f"cmedqaner={files / 'cmedqaner_test.json'},shots=3,exemplars={files / 'cmedqaner_train.json'},format={form}"
    requests, task = build_with(word)
    assert len(requests) == 215 and all(len(request.prompt) == 7 for request in requests)
    result = ask(task, knowing(key(task)))
    found = {metric.name: metric for metric in result.metrics}
    for name in ("micro_f1", "precision", "recall", "macro_f1", "relaxed_f1"):
        assert found[name] == Metric(name, 1.0, 1.0, 1.0, 215)
    assert found["span_f1"].value == result.baselines[0][2] > 0.98
    assert result.counts == dict.fromkeys(result.counts, 0) | {"respelled_gold": 4}
