"""Serve a model directory to OpenAI's clients.

    python tools/serve.py --model ckpt/ppo --port 8000

docs/serving.md tells more.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from engine.chatting import DISCLAIMER
from engine.config import check_range
from engine.launch import run, speak
from engine.model_directory import ModelDirectory
from engine.serving.auth import host_name, is_loopback
from engine.serving.limits import Limits
from engine.serving.service import GenerationService
from model.errors import InputError
from model.streaming import TextStream


@dataclass
class TemplateConfig:
    """How conversations are written down."""

    template: str = "auto"
    """auto: the one stored beside the model; or a name, or a .jinja file, where none is"""


@dataclass
class LimitsConfig:
    """What clients may ask for."""

    tokens: int = 2048
    """longest answer; also of a conversation that does not say"""
    queue: int = 256
    """answers that may wait for one of max_rows places; beyond that clients are told to come again"""
    body_bytes: int = 1 << 20
    """largest request"""
    client_seconds: float = 30.0
    """in which a request's head must have come, its body after it, and a client taken something of its answer"""
    shutdown_seconds: float = 60.0
    """what is left to running answers when the server is asked to stop"""


@dataclass
class ServeConfig:
    """Serve a model to OpenAI's clients."""

    model: str = "ckpt/sft"
    """Hugging Face model directory, such as fine-tuning leaves"""
    name: str | None = None
    """what clients call the model; by default the path"""
    host: str = "127.0.0.1"
    """address to listen at; one that others reach needs a token"""
    port: int = 8000
    """0 takes a free one, and says which"""
    token: str | None = None
    """what clients have to show, as OpenAI's api_key"""
    hosts: list[str] = field(default_factory=list)
    """names beside localhost by which clients may call the server; any by default where a token is asked for"""
    device: str | None = None
    """cuda, cuda:1 or cpu; by default the GPU if there is one"""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """of weights and cache; auto: bfloat16 on a GPU, float32 on a CPU"""
    context: int | None = None
    """longest prompt with its answer in tokens; by default the model's"""
    max_rows: int = 64
    """answers that are written at once"""
    limits: LimitsConfig = field(default_factory=LimitsConfig)
    chat: TemplateConfig = field(default_factory=TemplateConfig)


def main(config: ServeConfig) -> int:
    uvicorn, create_app, server_settings = import_server()
    check(config)
    bound_programs()
    listener = listen(config.host, config.port)
    directory = ModelDirectory.open(config.model, config.chat.template)
    TextStream(directory.tokenizer)  # refuses a tokenizer whose text cannot be streamed
    generator = directory.generator(
        device=config.device, dtype=config.dtype, context=config.context, max_rows=config.max_rows
    )
    service = GenerationService(
        generator, config.max_rows, config.limits.queue, on_failure=lambda: setattr(server, "should_exit", True)
    )
    asked = config.limits
    limits = Limits(asked.tokens, asked.body_bytes, asked.client_seconds)
    app = create_app(service, directory, config.name or config.model, limits, config.token, config.hosts)
    settings = server_settings(app, limits, asked.shutdown_seconds)
    server = uvicorn.Server(settings)
    stopped_by: list[int] = []

    def stop(number: int, frame: object) -> None:
        stopped_by.append(number)
        server.should_exit = True

    for number in signal.SIGINT, signal.SIGTERM:
        # The server takes signals while it runs, and raises them again when it has finished; before, they are ours.
        signal.signal(number, stop)
    speak(DISCLAIMER)
    listener.listen(settings.backlog)  # who comes from now on waits, and is not refused
    address = f"[{config.host}]" if ":" in config.host else config.host
    speak(f"Serving {config.name or config.model} at http://{address}:{listener.getsockname()[1]}")
    server.run(sockets=[listener])
    if service.failure is not None:
        raise service.failure
    return 130 if signal.SIGINT in stopped_by else 143


def import_server() -> tuple[Any, Any, Any]:
    """(uvicorn, create_app, server_settings). Raises InputError: they are not installed."""
    try:
        import uvicorn

        from engine.serving.api import create_app
        from engine.serving.connection import server_settings
    except ModuleNotFoundError as error:
        if error.name not in ("uvicorn", "h11", "fastapi", "pydantic", "starlette"):
            raise
        raise InputError(
            f"Serving needs {error.name}, which is not installed. Install it with pip install -e '.[serve]'."
        ) from None
    return uvicorn, create_app, server_settings


def bound_programs() -> None:
    """Have products on a CPU keep few programs; what the environment says already holds.

    oneDNN, and PyTorch's layer above it, keep one for each number of rows that a weight was multiplied with, a third of
    a MiB, and 1,024 of them. A server meets all lengths of prompts, so its memory would grow for minutes.
    """
    for name in "ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY":
        os.environ.setdefault(name, "64")


def check(config: ServeConfig) -> None:
    """See to what can be seen before a model is loaded. Raises InputError."""
    check_range("limits", config.limits, 1, "tokens", "body_bytes")
    check_range("limits", config.limits, 0, "queue", "client_seconds", "shutdown_seconds")
    if config.max_rows < 1:
        raise InputError(f"--max_rows is {config.max_rows}. Use at least 1.")
    if not 0 <= config.port < 65536:
        raise InputError(f"--port is {config.port}. Use a value from 0 to 65535.")
    token = config.token
    if token is not None and not (token.isascii() and token.isprintable() and token.strip() == token != ""):
        raise InputError("--token is empty, or holds more than letters, digits and signs of ASCII. Give another.")
    for name in config.hosts:
        if name != host_name(name) or not re.fullmatch(r"[a-z0-9_.:-]+", name):
            raise InputError(f"--hosts {name}: a name alone is meant. Leave out scheme and port, as in ward.example.")
    if token is None and not is_loopback(config.host):
        raise InputError(
            f"--host {config.host}: others can reach the model there, and nobody asks who they are. Give --token TEXT."
        )


def listen(host: str, port: int) -> socket.socket:
    """A bound socket. Raises InputError: there is no such address, or the port is taken."""
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        raise InputError(f"--host {host} --port {port}: {error.strerror or error}. Use another.") from None
    return listener


if __name__ == "__main__":
    run(main, ServeConfig)
