"""The page: nothing in it acts, nothing is outside it, everybody can read it."""

from __future__ import annotations

import dataclasses
import re

import pytest

from evals.evaluation import Evaluation
from evals.published import read_published
from evals.report_facts import gather
from evals.report_html import FOLD, MOST, folded, render
from evals.task import Item, Metric, Result
from tests.evals.fake_evaluations import NASTY, evaluation
from tests.evals.page import Element, parse


@pytest.fixture(scope="module")
def text() -> str:
    return render(gather([evaluation("sft", 0.40, 1, leaked=20), evaluation("ppo", 0.62, 2)]), read_published())


@pytest.fixture(scope="module")
def page(text: str) -> Element:
    return parse(text)


def saying(answer: str, prompt: str = "p", values: tuple[float, ...] = (0.0, 1.0)) -> Evaluation:
    items = tuple(Item(str(at), {"m": (value, 1.0)}, prompt, answer, "") for at, value in enumerate(values))
    result = Result((Metric("m", 0.5, n=len(items)),), items)
    return Evaluation("a", "ckpt/a", "", {"t": result}, {"t": {}}, {"t": "generation"})


def page_of(*evaluations: Evaluation) -> Element:
    return parse(render(gather(evaluations), read_published()))


def nasty_everywhere() -> Evaluation:
    """A model, a task, a group, a setting, a count, a note, an item: all of them say the worst."""
    metric = dataclasses.replace(Metric(NASTY, 0.5, 0.4, 0.6, 2))
    items = tuple(
        Item(f"{NASTY}{at}", {NASTY: (float(at), 1.0)}, NASTY * 20, NASTY * (1 + 19 * at), NASTY, NASTY)
        for at in range(2)
    )
    groups = {NASTY: (metric,), NASTY + "2": (metric,)}
    result = Result((metric,), items, groups, ((NASTY, NASTY, 0.3),), {NASTY: 3}, (NASTY,))
    settings = {"task": NASTY, NASTY: NASTY}
    return Evaluation(
        NASTY, NASTY, NASTY, {NASTY: result}, {NASTY: settings}, {NASTY: "choice"}, {}, NASTY, {NASTY: NASTY}, NASTY
    )


def test_page_is_well_formed_and_its_links_lead_somewhere(page: Element) -> None:
    ids = [each.attributes["id"] for each in page if "id" in each.attributes]
    assert len(set(ids)) == len(ids)
    inner = {link.attributes["href"][1:] for link in page.all("a") if link.attributes["href"].startswith("#")}
    named = {each.attributes["aria-labelledby"] for each in page if "aria-labelledby" in each.attributes}
    assert inner | named <= set(ids) and len(inner) == 3 + 6


def test_page_needs_nothing_beside_it(text: str, page: Element) -> None:
    assert not {each.tag for each in page} & {"script", "link", "img", "iframe", "object", "embed", "form", "use"}
    assert not [name for each in page for name in each.attributes if name in ("src", "srcset") or name.startswith("on")]
    style = page.find("style").text
    assert "@import" not in style and "url(" not in style and "<" not in style
    outer = {link.attributes["href"] for link in page.all("a") if not link.attributes["href"].startswith("#")}
    published = read_published()
    assert outer == {published.url, published.paper}  # read if one likes to, never loaded
    policy = page.find("meta", **{"http-equiv": "Content-Security-Policy"}).attributes["content"]
    assert policy == "default-src 'none'; style-src 'unsafe-inline'"


def test_what_a_model_says_is_read_and_does_not_act() -> None:
    text = render(gather([nasty_everywhere()]), read_published())
    page = parse(text)
    assert not {each.tag for each in page} & {"script", "img"}
    said = [each.text for each in page if each.attributes.get("class") == "said"]
    assert any('<script>alert("1")</script>| a | `code` **bold**' in each for each in said)
    assert any(
        "⟨U+001B⟩[31mred⟨U+001B⟩[0m ⟨U+202E⟩gnp.exe⟨U+202C⟩" in each and "⟨U+D83D⟩ &amp; [link]" in each
        for each in said
    )
    assert "{{ 7 * 7 }}⟨U+0000⟩" in said[0] and "49" not in said[0]
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f\u202a-\u202e\u2066-\u2069\ud800-\udfff]", text)
    assert not [name for each in page for name in each.attributes if name.startswith("on")]


def test_everything_that_is_named_badly_stays_in_its_place() -> None:
    page = page_of(nasty_everywhere())
    for name in ("h3", "title", "li", "figcaption"):
        assert all("<" not in child.tag for child in page.all(name))
    assert page.find("h3").text.startswith("</p></dd><script>")
    assert {link.attributes["href"][:5] for link in page.all("a")} == {"#summ", "#publ", "#task", "#envi", "https"}


def test_tables_say_what_their_heads_are_for(page: Element) -> None:
    heads = page.all("th")
    assert heads and all(head.attributes.get("scope") in ("col", "row") for head in heads)
    for table in page.all("table"):
        rows = [row for row in table.all("tr") if row.all("td")]
        widths = {
            sum(int(cell.attributes.get("colspan", 1)) for cell in row if cell.tag in ("td", "th"))
            for row in table.all("tr")
        }
        assert len(widths) == 1, f"rows of different widths: {table.text[:80]}"
        assert all(row.all("th")[0].attributes["scope"] == "row" for row in rows)


def test_wide_tables_scroll_and_can_be_reached_by_keyboard(page: Element) -> None:
    regions = page.all("div", role="region")
    assert {each.attributes["class"].split()[0] for each in regions} == {"scroll"}
    assert sum(len(region.all("table")) for region in regions) == len(page.all("table"))
    assert all(region.attributes["tabindex"] == "0" and region.attributes["aria-label"] for region in regions)
    assert all(details.find("summary").text for details in page.all("details"))


def test_plots_are_said_in_words(page: Element) -> None:
    drawings = page.all("svg")
    named = [each for each in drawings if each.attributes.get("role") == "img"]
    hidden = [each for each in drawings if each.attributes.get("aria-hidden") == "true"]
    inner = [each for outer in drawings for each in outer.all("svg")]
    assert named and len(named) + len(hidden) + len(inner) == len(drawings)
    first = named[0].find("title").text
    assert re.fullmatch(r"cmmlu-paper: sft \d\d\.\d\d \[.*\]; ppo \d\d\.\d\d \[.*\]", first)


def test_dots_and_whiskers_lie_where_the_numbers_are(page: Element) -> None:
    """The first row of the overview, on an axis whose ends are in its last drawing."""
    figure = page.find("figure")
    marks = {each.text: float(each.attributes["x"].rstrip("%")) for each in figure.all("text")}
    low, high = (float(name) for name in (next(iter(marks)), list(marks)[-1]))
    assert list(marks.values())[:: len(marks) - 1] == [0, 100]
    row = figure.find("svg", role="img")
    said = re.findall(r"(\d+\.\d+) \[(\d+\.\d), (\d+\.\d)\]", row.find("title").text)
    dots = [float(each.attributes["x"].rstrip("%")) for each in row.all("svg")]
    whiskers = [
        tuple(float(each.attributes[side].rstrip("%")) for side in ("x1", "x2"))
        for each in row.all("line")
        if "whisker" in each.attributes["class"]
    ]
    for numbers, dot, whisker in zip(said, dots, whiskers, strict=True):
        for number, place in zip(numbers, (dot, *whisker), strict=True):
            assert low + place / 100 * (high - low) == pytest.approx(float(number), abs=0.06)


def test_series_are_told_apart_without_colour() -> None:
    models = [evaluation(f"m{at}", 0.3 + 0.05 * at, at) for at in range(5)]
    for each in models:
        for label in list(each.results)[1:]:
            del each.results[label]  # type: ignore[attr-defined]
    page = page_of(*models)
    legend = page.find("ul", **{"class": "legend"}).all("path")
    assert len({(each.attributes["d"], "hollow" in each.attributes["class"]) for each in legend}) == 5


def test_long_texts_are_folded_and_the_longest_are_cut() -> None:
    page = page_of(saying("答" * (MOST + 5), prompt="问" * (FOLD + 1)))
    folds = [each for each in page.all("details") if each.find("summary").text.startswith("all ")]
    assert [each.find("summary").text for each in folds[:2]] == [
        f"all {FOLD + 1:,} characters",
        f"all {MOST + 5:,} characters",
    ]
    assert "5 of them are left out here; predictions.jsonl has all." in folds[1].text
    assert folds[0].find("p", **{"class": "said"}).text == "问" * (FOLD + 1)


def test_prompt_is_folded_to_its_end_and_an_answer_to_its_beginning() -> None:
    letters = "".join(chr(0x4E00 + at) for at in range(MOST + 1))
    short, whole, left_out = folded(letters, end=True)
    assert (short, whole, left_out) == ("…" + letters[-FOLD // 2 :], letters[1:], 1)
    short, whole, left_out = folded(letters, end=False)
    assert (short, whole, left_out) == (letters[: FOLD // 2] + "…", letters[:-1], 1)
    assert folded("短", end=True) == ("", "短", 0)


def test_empty_answer_is_shown_as_empty() -> None:
    page = page_of(saying(""))
    assert [each.find("dd").text for each in page.all("dl")] == ["p", "p"]
    assert [each.all("dd")[1].text for each in page.all("dl")] == ["(empty)"] * 2


def test_size_of_the_page_does_not_grow_with_the_items() -> None:
    few, many = (
        len(
            render(
                gather([saying("好" * 50, values=tuple((at * 7919 % 997) / 997 for at in range(n)))]), read_published()
            )
        )
        for n in (100, 20_000)
    )
    assert abs(many - few) < 100  # digits of n
