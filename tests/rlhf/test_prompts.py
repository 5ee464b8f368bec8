"""The stream of prompts: all of them each epoch, in an order of its own, from wherever a cursor says."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from model.chat import ChatTemplate
from model.errors import InputError
from model.tokenizer import Tokenizer
from rlhf.prompts import Prompt, Prompts, PromptStream, open_prompts
from tests.small_base import write_small_base


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prompts")
    write_small_base(folder / "base")
    return folder


def prompts(folder: Path, count: int) -> Prompts:
    path = folder / f"{count}.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"{at}？"}) + "\n" for at in range(count)))
    tokenizer = Tokenizer.load(folder / "base")
    return open_prompts([str(path)], {}, ChatTemplate.named("chimed", tokenizer), tokenizer, 64, 8, folder / "out")


def texts(some: list[Prompt]) -> list[str]:
    return [prompt.messages[0].content for prompt in some]


@pytest.mark.parametrize("count", [1, 3, 7, 10, 23])
def test_every_prompt_comes_once_an_epoch_and_tails_are_not_lost(folder: Path, count: int) -> None:
    stream = PromptStream(prompts(folder, 10), 5)
    dealt = [prompt for _ in range(30) for prompt in stream.next(count)]
    assert [prompt.position for prompt in dealt] == list(range(30 * count))
    whole = len(dealt) // 10 * 10
    epochs = [texts(dealt[at : at + 10]) for at in range(0, whole, 10)]
    assert all(Counter(epoch) == Counter(epochs[0]) and len(set(epoch)) == 10 for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == len(epochs)
    assert stream.epoch == 3 * count


def test_order_depends_on_seed_and_epoch_and_not_on_how_many_are_taken(folder: Path) -> None:
    some = prompts(folder, 10)
    stream = PromptStream(some, 5)
    assert PromptStream(some, 5).next(25) == [prompt for count in (4, 11, 10) for prompt in stream.next(count)]
    assert texts(PromptStream(some, 5).next(10)) != texts(PromptStream(some, 6).next(10))


def test_a_cursor_goes_on_where_the_stream_stood(folder: Path) -> None:
    stream = PromptStream(prompts(folder, 10), 5)
    stream.next(13)
    cursor = json.loads(json.dumps(stream.cursor))
    assert PromptStream(prompts(folder, 10), 5, cursor).next(12) == stream.next(12)


def test_a_cursor_of_other_prompts_is_refused(folder: Path) -> None:
    cursor = PromptStream(prompts(folder, 10), 5).cursor
    with pytest.raises(InputError, match="in the middle of other prompts"):
        PromptStream(prompts(folder, 11), 5, cursor)
    with pytest.raises(InputError, match="in the middle of other prompts"):
        PromptStream(prompts(folder, 10).split(0.3)[0], 5, cursor)
