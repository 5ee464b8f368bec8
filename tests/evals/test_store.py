"""Responses on disk: kept to the last digit, whole after a kill, and nobody else's."""

from __future__ import annotations

import fcntl
import json
import math
from pathlib import Path

import pytest

from evals.store import Store
from evals.task import Answered, Chosen, Item, Response, Result, Scored
from model.errors import InputError

RESPONSES: dict[str, Response] = {
    "a/1": Chosen((-0.1 - 0.2, -1e-300, math.log(3)), (1, 2, 3), (True, False, False), 0, 7),
    "b 头晕": Answered("多休息。\n\u2028<b>\ud83d", "stop", 5, 1, 0),
    "c": Scored(-123.456, 78),
}
SETTINGS = {"task": "small", "shots": 5, "model": "abc"}


@pytest.fixture
def store(tmp_path: Path) -> Store:
    store = Store(tmp_path / "model" / "small")
    store.folder.mkdir(parents=True)
    return store


def test_responses_come_back_to_the_last_bit(store: Store) -> None:
    store.append(RESPONSES.items())
    assert store.read() == RESPONSES
    store.finish(list(RESPONSES), RESPONSES)
    assert store.read() == RESPONSES
    assert sorted(path.name for path in store.folder.iterdir()) == ["responses.jsonl"]


def test_the_finished_file_has_the_order_of_the_requests_whoever_answered_first(store: Store) -> None:
    other = Store(store.folder, rank=1)
    other.append([("c", RESPONSES["c"])])
    store.append([("b 头晕", RESPONSES["b 头晕"]), ("a/1", RESPONSES["a/1"])])
    assert store.read() == other.read() == RESPONSES
    store.finish(list(RESPONSES), store.read())
    with open(store.path, "rb") as file:
        assert [json.loads(line)["id"] for line in file] == list(RESPONSES)


def test_a_torn_last_line_is_dropped_and_written_over(store: Store) -> None:
    store.append(RESPONSES.items())
    path = store.folder / "responses-0.jsonl"
    whole = path.read_bytes()
    last = whole.rstrip(b"\n").rindex(b"\n") + 1
    for size in (len(whole) - 1, last + 1, last, 3, 0):
        path.write_bytes(whole[:size])
        kept = store.read()
        assert set(kept) == set(list(RESPONSES)[: whole[:size].count(b"\n")])
        store.append([(name, response) for name, response in RESPONSES.items() if name not in kept])
        assert path.read_bytes() == whole


def test_a_torn_line_longer_than_a_block_is_dropped_too(store: Store) -> None:
    path = store.folder / "responses-0.jsonl"
    store.append([("c", RESPONSES["c"])])
    whole = path.read_bytes()
    path.write_bytes(whole + b"x" * 200_000)
    store.append([])
    assert path.read_bytes() == whole


def test_a_line_that_is_no_response_is_named(store: Store) -> None:
    store.append(RESPONSES.items())
    for line in ("hello", "[]", '{"kind": "chosen"}', '{"id": "a", "kind": "other"}', '{"id": "a", "kind": "scored"}'):
        (store.folder / "responses-1.jsonl").write_text(f"{line}\n")
        with pytest.raises(InputError, match=r"responses-1.jsonl:1: this is no response. Move the file away"):
            store.read()


def test_the_same_settings_go_on_and_others_are_refused_by_name(store: Store) -> None:
    store.begin(SETTINGS)
    store.append(RESPONSES.items())
    store.begin(dict(reversed(SETTINGS.items())))
    with pytest.raises(InputError, match="holds responses with shots 5; now it is 0"):
        store.begin({**SETTINGS, "shots": 0})
    with pytest.raises(InputError, match='holds responses with model "abc"; now it is "abd"'):
        store.begin({**SETTINGS, "model": "abd"})
    with pytest.raises(InputError, match="holds responses with new null; now it is 1"):
        store.begin({**SETTINGS, "new": 1})


def test_responses_without_settings_are_nobodys(store: Store) -> None:
    store.append(RESPONSES.items())
    with pytest.raises(InputError, match=r"holds responses and no settings\.json"):
        store.begin(SETTINGS)


def test_settings_that_cannot_be_read_are_named(store: Store) -> None:
    (store.folder / "settings.json").write_text("{")
    with pytest.raises(InputError, match=r"settings\.json is not readable as JSON"):
        store.begin(SETTINGS)


def test_two_commands_cannot_write_one_folder(store: Store) -> None:
    with store.claimed():
        with pytest.raises(InputError, match="another process is evaluating into it"), Store(store.folder).claimed():
            pass
    with store.claimed():
        pass


def test_a_filesystem_without_locks_is_told_of(
    store: Store, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with store.claimed():
        assert "offers no locks" in capfd.readouterr().err


def test_every_prediction_is_kept_as_a_line(store: Store) -> None:
    items = (
        Item("1", {"accuracy": (1.0, 1.0)}, "题目：头晕\n答案：", "A", "A", "内科"),
        Item("2", {"accuracy": (0.0, 1.0)}, "题目：\ud83d", "", "B"),
    )
    store.write_predictions(Result((), items))
    rows = [json.loads(line) for line in (store.folder / "predictions.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["shown"] for row in rows] == [item.shown for item in items]
    shown = {"shown": items[0].shown, "answer": "A", "gold": "A", "parts": {"accuracy": [1.0, 1.0]}}
    assert rows[0] == {"id": "1", "group": "内科", **shown}
