"""tools/serve.py as a process: it says where it listens, answers, and finishes what runs when it is told to stop."""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path
from typing import Any

import openai
import pytest

from engine.model_directory import ModelDirectory
from tests.engine.serving.live import Alone, wait_for
from tests.ranks import PATIENCE
from tests.tools.in_child import Running, start_tool
from tests.tools.small_chat import write_small_chat_model

QUESTION = [{"role": "user", "content": "头晕怎么办？"}]


def address(running: Running) -> str:
    """Where it listens; it has to say so."""
    said = re.compile(r"^Serving \S+ at (http://\S+)$", re.MULTILINE)
    wait_for(lambda: said.search(running.stderr()) is not None or not running.processes[0].is_alive())
    found = said.search(running.stderr())
    assert found is not None, running.stderr()
    return found[1]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_it_behind_the_running_answer(tmp_path: Path, number: signal.Signals, code: int) -> None:
    alone = Alone(write_small_chat_model(tmp_path / "model"))
    running = start_tool("serve", "--model", "model", "--port", 0, "--device", "cpu", cwd=tmp_path)
    client = openai.OpenAI(base_url=f"{address(running)}/v1", api_key="-", max_retries=0, timeout=PATIENCE)
    stream = client.chat.completions.create(
        model="model", messages=QUESTION, temperature=0, max_tokens=150, stream=True
    )
    pieces = [next(stream), next(stream)]
    running.signal(0, number)
    pieces += list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in pieces)
    assert text == alone.chat("头晕怎么办？", 150)
    (ended,) = running.wait()
    assert ended.code == code, ended.stderr
    assert ended.stdout == "" and "Traceback" not in ended.stderr


def test_elsewhere_than_on_this_machine_it_listens_with_a_token(tmp_path: Path) -> None:
    write_small_chat_model(tmp_path / "model")
    words = ("--model", "model", "--port", 0, "--host", "0.0.0.0", "--token", "secret", "--name", "ward")
    running = start_tool("serve", *words, "--device", "cpu", cwd=tmp_path)
    url = f"{address(running).replace('0.0.0.0', '127.0.0.1')}/v1"
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=url, api_key="-", max_retries=0).models.list()
    client = openai.OpenAI(base_url=url, api_key="secret", max_retries=0)
    assert [model.id for model in client.models.list()] == ["ward"]
    running.signal(0, signal.SIGTERM)
    assert running.wait()[0].code == 143


def test_products_keep_few_programs_unless_the_environment_says_how_many(tmp_path: Path) -> None:
    write_small_chat_model(tmp_path / "model")
    running = start_tool("serve", "--model", "model", "--port", 0, "--device", "cpu", cwd=tmp_path, before=keep_seven)
    address(running)
    told = (tmp_path / "environment").read_text().split()
    running.signal(0, signal.SIGTERM)
    assert running.wait()[0].code == 143
    assert told == ["64", "7"]


def keep_seven() -> None:
    """What the environment says when the server has opened its model."""
    os.environ.pop("ONEDNN_PRIMITIVE_CACHE_CAPACITY", None)
    os.environ["LRU_CACHE_CAPACITY"] = "7"
    open_model = ModelDirectory.generator

    def tell(*given: Any, **named: Any) -> Any:
        names = "ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"
        Path("environment").write_text(" ".join(os.environ[name] for name in names))
        return open_model(*given, **named)

    ModelDirectory.generator = tell  # type: ignore[method-assign]
