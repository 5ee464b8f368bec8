"""What a report says of evaluations, and that its three forms say the same."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest

from engine.intervals import wilson_interval
from evals.evaluation import Evaluation
from evals.published import read_published
from evals.report import write_report
from evals.report_facts import SAMPLES, gather
from evals.report_format import bounds, number
from evals.task import Item, Metric, Result
from model.errors import InputError
from tests.evals.fake_evaluations import SUBJECTS, TASKS, evaluation
from tests.evals.page import Element, parse
from tests.evals.test_report_html import nasty_everywhere


@pytest.fixture(scope="module")
def evaluations() -> list[Evaluation]:
    return [evaluation("sft", 0.40, 1, leaked=20), evaluation("ppo", 0.62, 2, leaked=20)]


@pytest.fixture(scope="module")
def folder(evaluations: list[Evaluation], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("report") / "made" / "for it"
    write_report(evaluations, out)
    return out


@pytest.fixture(scope="module")
def written(folder: Path) -> dict:
    return json.loads((folder / "report.json").read_text("utf-8"), parse_constant=lambda name: pytest.fail(name))


@pytest.fixture(scope="module")
def page(folder: Path) -> Element:
    return parse((folder / "report.html").read_text("utf-8"))


def one(metrics: list[dict], name: str) -> dict:
    return next(metric for metric in metrics if metric["name"] == name)


def with_result(model: str, result: Result, kind: str = "choice") -> Evaluation:
    return Evaluation(model, f"ckpt/{model}", "", {"t": result}, {"t": {}}, {"t": kind})


def scored(values: list[float], better: str = "higher", seed: str = "") -> Result:
    items = tuple(Item(f"{seed}{at}", {"m": (value, 1.0)}, "", "", "") for at, value in enumerate(values))
    return Result((Metric("m", sum(values) / len(values), n=len(values), better=better),), items)  # type: ignore[arg-type]


def test_json_holds_every_number_unrounded(evaluations: list[Evaluation], written: dict) -> None:
    assert written["schema"] == 1
    assert [about["model"] for about in written["models"]] == ["sft", "ppo"]
    assert [section["label"] for section in written["sections"]] == list(TASKS)
    for section in written["sections"]:
        for each, entry in zip(evaluations, section["entries"], strict=True):
            result = each.results[section["label"]]
            assert entry["metrics"] == [dataclasses.asdict(metric) for metric in result.metrics]
            assert entry["counts"] == result.counts and entry["items"] == len(result.items)
            assert entry["settings"] == each.settings[section["label"]]


def test_tables_of_the_page_hold_what_json_holds(written: dict, page: Element) -> None:
    """Task by task, metric by metric, model by model: every digit, and what is shown of it."""
    for place, section in enumerate(written["sections"]):
        table = page.find("section", **{"aria-labelledby": f"task-{place}"}).find("table")
        rows = [row for row in table.all("tr") if row.all("td")]
        assert len(rows) == len(section["entries"][0]["metrics"])
        for row, *metrics in zip(rows, *(entry["metrics"] for entry in section["entries"]), strict=True):
            cells = row.all("td")[1:]
            assert len(cells) == len(metrics)
            for cell, metric in zip(cells, metrics, strict=True):
                data = cell.find("data")
                assert float(data.attributes["value"]) == metric["value"]
                assert data.text == number(metric["value"], metric["unit"])
                shown = bounds(metric["low"], metric["high"], metric["unit"])
                assert cell.find("span").text == shown


def test_summaries_of_page_and_markdown_hold_what_json_holds(written: dict, page: Element, folder: Path) -> None:
    rows = page.find("section", **{"aria-labelledby": "summary"}).find("tbody").all("tr")
    lines = (folder / "report.md").read_text("utf-8").split("## Summary")[1].split("\n\n")[1].split("\n")[2:]
    assert len(rows) == len(lines) == len(TASKS)
    for section, row, line in zip(written["sections"], rows, lines, strict=True):
        headlines = [one(entry["metrics"], section["headline"]) for entry in section["entries"]]
        assert [float(data.attributes["value"]) for data in row.all("data")] == [each["value"] for each in headlines]
        assert section["label"] in row.text
        cells = line.replace("\\", "").replace("**", "").strip("| ").split(" | ")
        expected = [f"{number(m['value'], m['unit'])} {bounds(m['low'], m['high'], m['unit'])}" for m in headlines]
        assert (cells[0], cells[3:]) == (section["label"], expected)


def test_differences_of_page_and_markdown_hold_what_json_holds(written: dict, page: Element, folder: Path) -> None:
    said = [each for section in written["sections"] for each in section["comparisons"]]
    shown = [
        row
        for region in page.all("div")
        if region.attributes.get("aria-label", "").startswith("Comparisons")
        for row in region.find("tbody").all("tr")
    ]
    assert len(shown) == len(said) > len(TASKS)
    text = (folder / "report.md").read_text("utf-8").replace("\\", "")
    for comparison, row in zip(said, shown, strict=True):
        difference = comparison["difference"]
        assert float(row.find("data").attributes["value"]) == difference["value"]
        counts = f"{difference['higher']} / {difference['equal']} / {difference['lower']}"
        assert counts in row.text and counts in text
        assert row.find("data").text + " " + row.find("td").find("span").text in text


def test_difference_is_that_of_the_two_models_in_the_table(written: dict) -> None:
    for section in written["sections"]:
        a, b = (entry["metrics"] for entry in section["entries"])
        for comparison in section["comparisons"]:
            metric, difference = comparison["metric"], comparison["difference"]
            assert difference["value"] == pytest.approx(one(a, metric)["value"] - one(b, metric)["value"], abs=1e-12)
            assert difference["low"] <= difference["value"] <= difference["high"]
            is_binary = metric == "accuracy"
            assert (difference["mcnemar"] is not None) == is_binary == (comparison["p"] == difference["mcnemar"])


def test_metrics_that_are_no_sums_are_not_compared(written: dict) -> None:
    by_label = {section["label"]: section for section in written["sections"]}
    assert {each["metric"] for each in by_label["perplexity"]["comparisons"]} == {"nats_per_token"}
    assert "bleu_4" not in {each["metric"] for each in by_label["chimed"]["comparisons"]}


def test_mean_of_subjects_is_compared_as_a_mean_of_subjects() -> None:
    """Two subjects of 6 and 2 questions: the mean of the subjects' accuracies is not that of the questions."""

    def result(right: list[int]) -> Result:
        items = tuple(
            Item(str(at), {"subject_mean": (float(hit), 1.0)}, "", "", "", "a" if at < 6 else "b")
            for at, hit in enumerate(right)
        )
        return Result((Metric("subject_mean", (sum(right[:6]) / 6 + sum(right[6:]) / 2) / 2, n=8),), items)

    a, b = result([1, 1, 1, 0, 0, 0, 1, 1]), result([0, 0, 0, 0, 0, 1, 0, 1])
    (section,) = gather([with_result("a", a), with_result("b", b)]).sections
    assert section.comparisons[0].difference.value == pytest.approx((3 / 6 + 2 / 2) / 2 - (1 / 6 + 1 / 2) / 2)


@pytest.mark.parametrize(("better", "leader"), [("higher", "b"), ("lower", "a")])
def test_leader_is_better_than_every_other_model(better: str, leader: str) -> None:
    values = {"a": [0.1, 0.2, 0.15] * 20, "b": [0.5, 0.7, 0.6] * 20, "c": [0.3, 0.4, 0.35] * 20}
    evaluations = [with_result(model, scored(each, better)) for model, each in values.items()]
    assert gather(evaluations).sections[0].leader == leader


def test_nobody_leads_where_the_data_do_not_say_so(page: Element, written: dict) -> None:
    close = [with_result("a", scored([0.0, 1.0] * 20)), with_result("b", scored([1.0, 0.0, 0.0, 1.0] * 10))]
    assert gather(close).sections[0].leader is None
    third = with_result("c", scored([1.0, 1.0] * 20))
    assert gather([close[0], third]).sections[0].leader == "c"
    # As good as c: c is no longer better than every other one.
    assert gather([close[0], third, with_result("d", scored([1.0, 1.0] * 20))]).sections[0].leader is None


def test_length_ratio_has_no_leader() -> None:
    low, high = (scored([value, value + 0.01] * 20, better=None) for value in (0.5, 0.9))  # type: ignore[arg-type]
    assert gather([with_result("a", low), with_result("b", high)]).sections[0].leader is None


def test_bold_stands_for_the_leader_alone(written: dict, page: Element) -> None:
    rows = page.find("section", **{"aria-labelledby": "summary"}).find("tbody").all("tr")
    for section, row in zip(written["sections"], rows, strict=True):
        bold = [
            model
            for model, cell in zip(("sft", "ppo"), row.all("td"), strict=True)
            if cell.attributes.get("class") == "leads"
        ]
        assert bold == [section["leader"]][: section["leader"] is not None]
    assert {section["leader"] for section in written["sections"]} == {"ppo", None}


def test_metrics_on_clean_items_are_those_of_the_items_that_are_not_flagged(
    evaluations: list[Evaluation], written: dict
) -> None:
    entry = written["sections"][0]["entries"][1]
    kept = evaluations[1].results["cmmlu-paper"].items[20:]
    share = sum(item.answer == item.gold for item in kept) / len(kept)
    clean = entry["clean"]
    assert (clean["flagged"], clean["items"]) == (20, sum(SUBJECTS.values()))
    accuracy = one(clean["metrics"], "accuracy")
    assert (accuracy["value"], accuracy["n"]) == (pytest.approx(share), len(kept))
    assert (accuracy["low"], accuracy["high"]) == pytest.approx(wilson_interval(share, len(kept)))
    by_subject = [[item.answer == item.gold for item in kept if item.group == subject] for subject in SUBJECTS]
    mean = sum(sum(right) / len(right) for right in by_subject) / len(by_subject)
    assert one(clean["metrics"], "subject_mean")["value"] == pytest.approx(mean)
    assert all(other["clean"] is None for section in written["sections"][1:] for other in section["entries"])


def test_win_rate_stands_where_a_reward_model_judged(written: dict, page: Element, folder: Path) -> None:
    wins = {section["label"]: section["wins"] for section in written["sections"]}
    assert [label for label, each in wins.items() if each] == ["reward"]
    rate = wins["reward"][0]["rate"]
    assert rate["wins"] + rate["ties"] + rate["losses"] == 70
    region = page.find("div", **{"aria-label": "Win rates in reward"})
    assert float(region.find("data").attributes["value"]) == rate["rate"]["value"]
    assert f"{rate['wins']} / {rate['ties']} / {rate['losses']}" in (folder / "report.md").read_text("utf-8")


@pytest.mark.parametrize("better", ["higher", "lower"])
def test_samples_are_the_items_of_both_ends(better: str) -> None:
    values = [0.5, 0.1, 0.9, 0.3, 0.7, 0.2, 0.8, 0.4]
    (entry,) = gather([with_result("a", scored(values, better))]).sections[0].entries
    low, high = [0.1, 0.2, 0.3], [0.9, 0.8, 0.7]
    assert len(low) == SAMPLES
    ends = [[sample.value for sample in samples] for samples in (entry.worst, entry.best)]
    assert ends == ([low, high] if better == "higher" else [high, low])


def test_samples_of_equal_value_are_the_same_for_every_order_and_not_the_first() -> None:
    result = scored([0.0] * 50 + [1.0] * 50)
    shuffled = dataclasses.replace(result, items=result.items[::-1])
    first, second = (gather([with_result("a", each)]).sections[0].entries[0] for each in (result, shuffled))
    assert (first.worst, first.best) == (second.worst, second.best)
    assert {sample.id for sample in first.worst} != {"0", "1", "2"}
    assert {sample.value for sample in first.worst} == {0.0} and {sample.value for sample in first.best} == {1.0}


def test_number_that_is_not_there_is_null_and_a_dash(tmp_path: Path) -> None:
    empty = Result((Metric("accuracy", math.nan, math.nan, math.nan, 0),), ())
    write_report([with_result("a", empty), with_result("b", empty)], tmp_path)
    (section,) = json.loads((tmp_path / "report.json").read_text("utf-8"))["sections"]
    assert section["entries"][0]["metrics"][0]["value"] is None
    page = parse((tmp_path / "report.html").read_text("utf-8"))
    rows = page.find("section", **{"aria-labelledby": "summary"}).find("tbody").all("tr")
    assert [cell.text for cell in rows[0].all("td")] == ["—", "—"]
    assert "| t | Accuracy (%) ↑ | 0 | — | — |" in (tmp_path / "report.md").read_text("utf-8")


def test_result_without_metrics_and_models_with_other_tasks_are_shown(tmp_path: Path) -> None:
    nothing = with_result("a", Result((), ()))
    other = Evaluation("b", "b", "", {"u": scored([1.0, 0.0])}, {"u": {}}, {"u": "entities"})
    write_report([nothing, other], tmp_path)
    written = json.loads((tmp_path / "report.json").read_text("utf-8"))
    assert [len(section["entries"]) for section in written["sections"]] == [1, 1]
    page = parse((tmp_path / "report.html").read_text("utf-8"))
    rows = page.find("section", **{"aria-labelledby": "summary"}).find("tbody").all("tr")
    assert [[cell.text for cell in row.all("td")] for row in rows] == [["—", "—"], ["—", "50.00"]]


def test_what_a_model_says_is_kept_in_json_to_the_letter(tmp_path: Path) -> None:
    nasty = nasty_everywhere()
    write_report([nasty], tmp_path)
    (section,) = json.loads((tmp_path / "report.json").read_text("utf-8"))["sections"]
    (entry,) = section["entries"]
    answers = {item.id: item.answer for item in next(iter(nasty.results.values())).items}
    assert {sample["id"]: sample["answer"] for sample in entry["worst"] + entry["best"]} == answers


def test_line_to_beat_is_the_best_that_is_reached_without_a_model(written: dict, page: Element) -> None:
    """Of the letters always answered, the most frequent one; on the overview's axis, which ends at round numbers."""
    figure = page.find("figure")
    low, high = (float(figure.all("text")[place].text) for place in (0, -1))
    (line,) = [each for each in figure.find("svg", role="img").all("line") if each.attributes["class"] == "reference"]
    shown = low + float(line.attributes["x1"].rstrip("%")) / 100 * (high - low)
    best = max(value for _, metric, value in written["sections"][0]["entries"][0]["baselines"] if metric == "accuracy")
    assert shown == pytest.approx(100 * best, abs=1e-2)


def test_what_was_never_counted_takes_one_line(page: Element, folder: Path) -> None:
    table = page.find("div", **{"aria-label": "Counts of cmmlu-paper"}).find("tbody")
    assert [[cell.text for cell in row if cell.tag in ("th", "td")] for row in table.all("tr")] == [
        ["Unparsed", "1", "2"]
    ]
    line = "Looked for and not found: Dropped exemplars."
    assert line in page.find("section", **{"aria-labelledby": "task-0"}).text
    assert line in (folder / "report.md").read_text("utf-8")


def test_report_is_the_same_every_time(evaluations: list[Evaluation], folder: Path, tmp_path: Path) -> None:
    write_report(evaluations, tmp_path)
    for name in ("report.json", "report.md", "report.html"):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()


def test_two_models_of_one_name_are_refused(evaluations: list[Evaluation]) -> None:
    with pytest.raises(InputError, match="two of the models are called sft"):
        gather([evaluations[0], evaluations[0]])


def test_report_of_nothing_is_refused() -> None:
    with pytest.raises(InputError, match="no model was evaluated"):
        gather([])


def test_our_scores_stand_beside_published_ones_of_the_same_items(written: dict, page: Element) -> None:
    table = page.find("section", **{"aria-labelledby": "published"}).find("table")
    heads = [cell.text for cell in table.find("thead").all("th")][1:]
    assert [re.sub("n .*", "", head) for head in heads] == ["CMMLU accuracy", "ChiMed ROUGE-1"]
    rows = {row.find("th").text.replace("this evaluation", ""): row for row in table.find("tbody").all("tr")}
    assert list(rows) == ["sft", "ppo", *read_published().models]
    first = [one(entry["metrics"], "accuracy")["value"] for entry in written["sections"][0]["entries"]]
    assert [float(rows[model].find("data").attributes["value"]) for model in ("sft", "ppo")] == first
    # The paper mode's figure, not the one that counts in the usual way.
    paper = [one(entry["metrics"], "paper_rouge_1")["value"] for entry in written["sections"][2]["entries"]]
    assert [float(rows[model].all("data")[1].attributes["value"]) for model in ("sft", "ppo")] == paper


def test_our_scores_beside_published_ones_say_which_task_and_how_many_items(
    written: dict, page: Element, folder: Path
) -> None:
    entry = written["sections"][0]["entries"][0]
    said = f"{written['sections'][0]['label']}, {entry['settings']['protocol']}, n {entry['items']:,}"
    rows = page.find("section", **{"aria-labelledby": "published"}).find("table").find("tbody").all("tr")
    assert rows[0].find("span", **{"class": "count"}).text == said
    lines = (folder / "report.md").read_text("utf-8").split("## Beside published")[1].split("\n")
    assert f"({said})" in next(line for line in lines if line.startswith("| **sft**"))


def test_what_only_one_of_two_models_has_is_counted_beside_their_difference(tmp_path: Path) -> None:
    one, other = with_result("a", scored([1.0, 0.0, 1.0])), with_result("b", scored([0.0, 0.0]))
    write_report([one, other], tmp_path)
    for name in ("report.md", "report.html"):
        assert "1 not of both" in (tmp_path / name).read_text("utf-8"), name


def test_columns_are_called_comparable_in_the_same_words_everywhere(page: Element, folder: Path) -> None:
    notes = page.find("section", **{"aria-labelledby": "published"}).find("ul", **{"class": "notes"}).all("li")
    lines = (folder / "report.md").read_text("utf-8").split("## Beside published")[1].split("\n")
    said = [re.sub(r"\\(.)", r"\1", line.removeprefix("- ").replace("**", "")) for line in lines if line[:2] == "- "]
    assert said[: len(notes)] == [note.text for note in notes]
    assert "comparable in part" in said[0]


def test_whole_numbers_of_any_type_are_numbers_in_json(tmp_path: Path) -> None:
    one = with_result("a", dataclasses.replace(scored([1.0, 0.0]), counts={"unparsed": np.int64(3)}))
    write_report([one], tmp_path)
    found = json.loads((tmp_path / "report.json").read_text("utf-8"))
    assert found["sections"][0]["entries"][0]["counts"] == {"unparsed": 3}


def test_nothing_stands_beside_published_scores_where_no_task_is_theirs(tmp_path: Path) -> None:
    write_report([with_result("a", scored([1.0, 0.0]))], tmp_path)
    page = parse((tmp_path / "report.html").read_text("utf-8"))
    section = page.find("section", **{"aria-labelledby": "published"})
    assert "None of the tasks" in section.text
    assert len(section.all("table")) == 1 and "this evaluation" not in section.find("table").text
