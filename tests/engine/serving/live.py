"""A server of milliseconds on a port of its own, whose generator a test can hold."""

from __future__ import annotations

import http.client
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import openai
import uvicorn

from engine.model_directory import ModelDirectory
from engine.serving.api import create_app
from engine.serving.connection import server_settings
from engine.serving.limits import Limits
from engine.serving.service import GenerationService
from model.chat import Message
from model.generate import Completion, Generator, Request
from model.sampling import SamplingOptions
from tests.ranks import PATIENCE

NAME = "small"


class Live:
    """A server that runs.

    gate: while it is closed the generator makes no step. is_at_gate: it would make one.
    """

    def __init__(self, directory: Path, max_rows: int, max_queue: int, limits: Limits, *who: Any) -> None:
        opened = ModelDirectory.open(str(directory))
        self.directory, self.generator = opened, opened.generator(device="cpu", max_rows=max_rows)
        self.gate, self.is_at_gate = threading.Event(), threading.Event()
        self.gate.set()
        step = self.generator.step

        def gated_step() -> Any:
            self.is_at_gate.set()
            assert self.gate.wait(PATIENCE)
            self.is_at_gate.clear()
            return step()

        self.generator.step = gated_step  # type: ignore[method-assign]
        self.service = GenerationService(self.generator, max_rows, max_queue)
        app = create_app(self.service, opened, NAME, limits, *who)
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        self.server = uvicorn.Server(server_settings(app, limits))
        self.thread = threading.Thread(target=self.server.run, args=([self.listener],), daemon=True)
        self.thread.start()

    def client(self, kind: Any = openai.OpenAI, token: str = "-") -> Any:
        return kind(base_url=f"http://127.0.0.1:{self.port}/v1", api_key=token, max_retries=0, timeout=PATIENCE)

    def send(self, method: str, path: str, body: bytes | None = None, **headers: str) -> tuple[int, Any, bytes]:
        """Status, headers and body, of a request that no client of OpenAI's would make."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE)
        given = {name.replace("_", "-"): value for name, value in headers.items()}
        connection.request(method, path, body, given)
        answer = connection.getresponse()
        content = answer.read()
        connection.close()
        return answer.status, answer.headers, content

    def post(self, path: str, body: Any) -> tuple[int, Any, Any]:
        """The same with JSON both ways."""
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        status, headers, answer = self.send("POST", path, content, content_type="application/json")
        return status, headers, json.loads(answer)

    def stop(self) -> None:
        self.gate.set()
        self.server.should_exit = True
        self.thread.join(PATIENCE)
        assert not self.thread.is_alive()


@contextmanager
def served(
    directory: Path,
    max_rows: int = 8,
    max_queue: int = 256,
    limits: Limits | None = None,
    token: str | None = None,
    hosts: Sequence[str] = (),
) -> Iterator[Live]:
    live = Live(directory, max_rows, max_queue, limits or Limits(max_tokens=200), token, hosts)
    try:
        yield live
    finally:
        live.stop()


def wait_for(is_so: Callable[[], bool], seconds: float = PATIENCE) -> None:
    until = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < until, "it did not come about"
        time.sleep(0.005)


class Alone:
    """What the generator answers to one request with nobody beside it."""

    def __init__(self, directory: Path) -> None:
        self.directory = ModelDirectory.open(str(directory))
        self.generator: Generator = self.directory.generator(device="cpu", max_rows=4)

    def answers(self, prompt: list[int], samples: int = 1, seed: int = 0, **options: Any) -> list[Completion]:
        asked = SamplingOptions(stop_ids=self.directory.stop_ids, **options)
        return self.generator.generate([Request(prompt, asked, samples, seed)])

    def chat(self, question: str, max_tokens: int) -> str:
        """Greedy."""
        assert self.directory.template is not None
        prompt = self.directory.template.encode_prompt(self.directory.tokenizer, [Message("user", question)])
        return self.answers(prompt, temperature=0, max_new_tokens=max_tokens)[0].text or ""
