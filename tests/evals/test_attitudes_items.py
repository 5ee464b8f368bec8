"""Items files: what is read, and what each mistake is told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from evals.attitude_items import read_scale
from evals.attitude_key import CAMI, MICA4, Key
from model.errors import InputError
from tests.evals.scales import TEA, numbered, write


def keyed(name: str = "cami") -> list[dict[str, Any]]:
    return [{"id": number, "text": text} for number, text in enumerate(numbered(name), 1)]


def test_a_plain_list_is_the_scale_in_order(tmp_path: Path) -> None:
    scale = read_scale(str(write(tmp_path / "items.json", numbered("cami"))), CAMI)
    assert [item.text for item in scale.items] == numbered("cami")
    assert [item.id for item in scale.items] == [str(number) for number in range(1, 41)]
    assert scale.options == CAMI.options and scale.name == "CAMI"


def test_numbered_items_are_put_in_order_and_brought_options_are_used(tmp_path: Path) -> None:
    options = ["一", "二", "三", "四", "五", "六"]
    value = {"options_low_to_high": options, "points": 6, "items": keyed("mica4")[::-1]}
    scale = read_scale(str(write(tmp_path / "items.json", value)), MICA4)
    assert [item.text for item in scale.items] == numbered("mica4")
    assert scale.options == tuple(options) and scale.subscales == ()


def test_a_scale_of_ones_own_brings_everything(tmp_path: Path) -> None:
    scale = read_scale(str(write(tmp_path / "tea.json", TEA)))
    assert scale.name == "tea" and scale.subscales == ("time", "work")
    assert [item.points(3) for item in scale.items[:2]] == [[1, 2, 3], [3, 2, 1]]


def test_a_file_may_say_what_the_key_says(tmp_path: Path) -> None:
    items = keyed()
    items[1] |= {"subscale": "Benevolence", "agreeing_is_stigma": False}
    items[3] |= {"subscale": "community mental-health ideology"}
    said = read_scale(str(write(tmp_path / "items.json", {"items": items})), CAMI)
    unsaid = read_scale(str(write(tmp_path / "unsaid.json", {"items": keyed()})), CAMI)
    assert said.items == unsaid.items


@pytest.mark.parametrize(("name", "key"), [("cami", CAMI), ("mica4", MICA4)])
def test_the_real_files_agree_with_our_keys(real_data: Path, name: str, key: Key) -> None:
    path = real_data / "bias" / f"{name}.json"
    scale = read_scale(str(path), key)
    theirs = json.loads(path.read_text(encoding="utf-8"))
    assert len(scale.items) == {"cami": 40, "mica4": 16}[name]
    assert scale.options == tuple(theirs["options_low_to_high"]) == key.options
    assert [item.agreeing_is_stigma for item in scale.items] == [item["agreeing_is_stigma"] for item in theirs["items"]]
    assert [item.subscale for item in scale.items] == [item.get("subscale", "") for item in theirs["items"]]


def without(place: int) -> list[dict[str, Any]]:
    items = keyed()
    del items[place]
    return items


def changed(place: int, **fields: object) -> list[dict[str, Any]]:
    items = keyed()
    items[place] = {name: value for name, value in {**items[place], **fields}.items() if value is not None}
    return items


@pytest.mark.parametrize(
    ("value", "sentence"),
    [
        (numbered("mica4"), "16 items, CAMI has 40. List all of them, in its order."),
        ({"items": without(6)}, "it holds 39 of the 40 items of CAMI, not 7. Add what is missing."),
        ({"items": keyed()[:3]}, "it holds 3 of the 40 items of CAMI, not 4, 5, 6, 7, 8, …. Add what is missing."),
        ({"items": changed(4, id=41)}, "there is no item 41 in CAMI. Number its items from 1 to 40."),
        ({"items": changed(4, id="five")}, "there is no item five in CAMI. Number its items from 1 to 40."),
        ({"items": changed(4, id="٥")}, "there is no item ٥ in CAMI. Number its items from 1 to 40."),
        ({"items": changed(4, id=4)}, "two items have the id 4. Give each its own."),
        ({"items": changed(4, id=None)}, 'item 5 has no "id". Give each item a number or a name.'),
        ({"items": changed(4, text=" ")}, 'item 5 has no "text". Write its statement there.'),
        ({"items": [*keyed()[:39], 7]}, 'item 40 is a number. Write {"id": 40, "text": "…"}.'),
        (
            {"items": changed(0, agreeing_is_stigma=False)},
            'item 1 has "agreeing_is_stigma": false, the key of CAMI says true. See that the item is the one with this '
            "number, and leave agreeing_is_stigma out.",
        ),
        (
            {"items": changed(0, subscale="benevolence")},
            'item 1 has "subscale": "benevolence", the key of CAMI says "authoritarianism". See that the item is the '
            "one with this number, and leave subscale out.",
        ),
        (
            {"questions": keyed()},
            'it holds "questions" and no list "items". Write {"items": [{"id": 1, "text": "…"}, …]}.',
        ),
        (3, 'it holds a number. Write {"items": [{"id": 1, "text": "…"}, …]}.'),
        (
            {"items": keyed(), "options_low_to_high": ["否", "是"]},
            '"options_low_to_high" lists 2. List 5 degrees of agreement, the least first.',
        ),
        (
            {"items": keyed(), "points": 6},
            '"options_low_to_high" lists 5; "points" says 6. List 5 degrees of agreement, the least first.',
        ),
        (
            {"items": keyed(), "options_low_to_high": list("一二三四四")},
            "two options say 四. Word each degree of agreement differently.",
        ),
    ],
)
def test_a_mistake_in_the_items_of_cami(tmp_path: Path, value: object, sentence: str) -> None:
    path = write(tmp_path / "items.json", value)
    with pytest.raises(InputError) as refused:
        read_scale(str(path), CAMI)
    assert str(refused.value) == f"{path}: {sentence}"


def tea(**fields: object) -> dict[str, Any]:
    return {**TEA, **fields}


@pytest.mark.parametrize(
    ("value", "sentence"),
    [
        (
            {"items": TEA["items"]},
            '"options_low_to_high" is no list of texts. List 2 to 9 degrees of agreement, the least first.',
        ),
        (
            tea(options_low_to_high=["只有一个"]),
            '"options_low_to_high" lists 1. List 2 to 9 degrees of agreement, the least first.',
        ),
        (tea(items=[]), "there is no item in it. Give a file that holds the scale's statements."),
        (
            tea(items=[{"id": 1, "text": "茶", "agreeing_is_stigma": "yes"}]),
            'item 1 does not say "agreeing_is_stigma". Write true or false there.',
        ),
        (
            tea(items=[*TEA["items"], {"id": "t6", "text": "茶", "agreeing_is_stigma": True}]),
            'item t6 has no "subscale", others have. Name one in each, or in none.',
        ),
        (
            tea(items=[{"id": 1, "text": "茶", "agreeing_is_stigma": True, "subscale": 3}]),
            '"subscale" of item 1 is a number. Write its name there.',
        ),
    ],
)
def test_a_mistake_in_a_scale_of_ones_own(tmp_path: Path, value: object, sentence: str) -> None:
    path = write(tmp_path / "items.json", value)
    with pytest.raises(InputError) as refused:
        read_scale(str(path))
    assert str(refused.value) == f"{path}: {sentence}"


def test_a_file_that_is_no_json_is_told_where(tmp_path: Path) -> None:
    path = tmp_path / "items.json"
    path.write_text('{"items": [\n{"id": 1,}]}')
    with pytest.raises(InputError, match=r"items\.json:2: not readable as JSON \(.+\)\. Mend the file\.$"):
        read_scale(str(path), CAMI)


def test_a_file_in_gbk_is_read(tmp_path: Path) -> None:
    path = tmp_path / "items.json"
    path.write_bytes(json.dumps(numbered("mica4"), ensure_ascii=False).encode("gb18030"))
    assert read_scale(str(path), MICA4).items[0].text == "陈述1。"
