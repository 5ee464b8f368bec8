"""Many clients of a server for minutes: each must get what it gets alone, sooner than one by one, in steady memory.

    python tools/bench_serve.py                                  # make bench-serve: 64 clients, two minutes, ckpt/ppo
    python tools/bench_serve.py --out docs/benchmarks/serve-cpu  # and keep the result

First one client asks every question by itself: its answers are what all others are compared with, its speed is the
one of a single client. Then the clients ask the same questions, all at once, each again as soon as it is answered,
every other one in a stream; then the one client again, as the machine may be slower or faster by now. All decoding is
greedy. The server is tools/serve.py in a process of its own, whose resident memory is read each second; its slope is
a least-squares line through the last three quarters of the time.

Exit code 4 means that an answer was another than alone, or that a request failed.
"""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from engine.benchmark import append_record, machine
from engine.launch import EXIT_GATE, run, speak
from model.errors import InputError

_FINDINGS = ["头晕", "乏力", "咳嗽", "腹痛", "皮疹", "发热", "口渴", "心悸"]
_ASKED = [
    "怎么办",
    "要做哪些检查",
    "可以吃什么药",
    "严重吗",
    "会传染吗",
    "饮食上要注意什么",
    "是什么原因",
    "要去医院吗",
]
# After the first quarter buffers have their size, and what still grows is a leak.
_SETTLED = 0.25

_COLUMNS = {
    "Date": "date",
    "Device": "device",
    "Threads": "threads",
    "torch": "torch",
    "Model": "model",
    "Clients": "clients",
    "Seconds": "seconds",
    "Requests": "requests",
    "Failed": "failed",
    "Other than alone": "different answers",
    "One client, tok/s": "tok/s alone",
    "All, tok/s": "tok/s together",
    "Ratio": "ratio",
    "Processor, ms/tok: one": "processor ms/tok alone",
    "all": "processor ms/tok together",
    "Median, s": "median seconds",
    "p95, s": "p95 seconds",
    "Memory, MiB": "memory MiB",
    "Slope, MiB/min": "memory MiB/min",
    "Commit": "commit",
    "Note": "note",
}


@dataclass
class BenchConfig:
    """Clients of a server, all at once."""

    model: str = "ckpt/ppo"
    """model directory with a chat template"""
    clients: int = 64
    """that ask at the same time"""
    seconds: float = 120.0
    """for which they ask"""
    tokens: int = 48
    """longest answer"""
    device: str | None = None
    """of the server; by default the GPU if there is one"""
    out: str | None = None
    """append the result to OUT.jsonl and its table to OUT.md"""
    note: str = ""
    """a remark to keep with the result"""

    def check(self) -> None:
        """Raises InputError where numbers make no sense."""
        for name in "clients", "seconds", "tokens":
            if getattr(self, name) < 1:
                raise InputError(f"--{name} is {getattr(self, name)}. Use at least 1.")


@dataclass(frozen=True)
class Answer:
    """text: as the client put it together. tokens: that the server counted. seconds: from request to end."""

    text: str
    tokens: int
    seconds: float


class Client:
    """One connection."""

    def __init__(self, url: str, model: str, tokens: int) -> None:
        self._connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=600)
        self._asked = {"model": model, "temperature": 0, "max_tokens": tokens}

    def ask(self, question: str, stream: bool = False) -> Answer:
        """Raises OSError, http.client.HTTPException, ValueError: there is no answer."""
        body: dict[str, Any] = {**self._asked, "messages": [{"role": "user", "content": question}], "stream": stream}
        if stream:
            body["stream_options"] = {"include_usage": True}
        began = time.monotonic()
        headers = {"Content-Type": "application/json"}
        self._connection.request("POST", "/v1/chat/completions", json.dumps(body).encode(), headers)
        response = self._connection.getresponse()
        if response.status != 200:
            raise ValueError(f"{response.status}: {response.read().decode()}")
        if not stream:
            whole = json.loads(response.read())
            text, usage = whole["choices"][0]["message"]["content"], whole["usage"]
        else:
            text, usage = "", None
            for chunk in _events(response):
                text += "".join(choice["delta"].get("content", "") for choice in chunk["choices"])
                usage = chunk.get("usage", usage)
            if usage is None:
                raise ValueError("a stream without end")
        return Answer(text, usage["completion_tokens"], time.monotonic() - began)

    def close(self) -> None:
        self._connection.close()


def _events(response: http.client.HTTPResponse) -> Iterator[dict[str, Any]]:
    for line in response:
        if line.startswith(b"data: ") and line != b"data: [DONE]\n":
            yield json.loads(line[6:])


def questions() -> list[str]:
    """64 that differ."""
    return [f"{finding}{days}天了，{asked}？" for days, finding in enumerate(_FINDINGS, 2) for asked in _ASKED]


@contextmanager
def server(config: BenchConfig) -> Iterator[tuple[str, int]]:
    """(address, process id) of a server that runs. Raises InputError: it does not."""
    tool = Path(__file__).with_name("serve.py")
    words = ["--model", config.model, "--name", "bench", "--port", "0", "--limits.tokens", str(config.tokens)]
    words += ["--max_rows", str(config.clients), *(["--device", config.device] if config.device else [])]
    process = subprocess.Popen([sys.executable, str(tool), *words], stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        said = []
        for line in process.stderr:
            said.append(line)
            if found := re.match(r"Serving \S+ at (http://\S+)", line):
                break
        else:
            raise InputError(f"--model {config.model}: the server did not start. It said: {''.join(said[-1:]).strip()}")
        # What nobody reads would fill the pipe, and the server would wait.
        threading.Thread(target=process.stderr.read, daemon=True).start()
        yield found[1], process.pid
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=120)


class Memory:
    """Resident memory of a process, each second: samples of (seconds, MiB)."""

    def __init__(self, process: int) -> None:
        self.samples: list[tuple[float, float]] = []
        self._status, self._is_over = Path(f"/proc/{process}/status"), threading.Event()
        self._thread = threading.Thread(target=self._read)
        self._thread.start()

    def _read(self) -> None:
        began = time.monotonic()
        while not self._is_over.wait(1.0):
            found = re.search(r"^VmRSS:\s+(\d+) kB", self._status.read_text(), re.MULTILINE)
            assert found is not None
            self.samples.append((time.monotonic() - began, int(found[1]) / 1024))

    def stop(self) -> None:
        self._is_over.set()
        self._thread.join()


def slope(samples: Sequence[tuple[float, float]]) -> float:
    """Of a least-squares line through (seconds, value), a minute; of what comes after the first quarter of the time."""
    settled = [(at, value) for at, value in samples if at >= _SETTLED * samples[-1][0]]
    return 60 * statistics.linear_regression(*zip(*settled, strict=True)).slope


@dataclass
class Asking:
    """What clients got. seconds: of all together. processor: seconds that the server's threads ran."""

    answers: list[tuple[str, Answer]] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    seconds: float = 0.0
    processor: float = 0.0

    @property
    def tokens(self) -> int:
        return sum(answer.tokens for _, answer in self.answers)

    @property
    def speed(self) -> float:
        """Tokens a second."""
        return self.tokens / self.seconds

    def different(self, alone: dict[str, Answer]) -> list[str]:
        """Questions whose answers are other than alone, once for each such answer."""
        return [asked for asked, answer in self.answers if answer.text != alone[asked].text]


@contextmanager
def timed(asking: Asking, process: int) -> Iterator[None]:
    """Write down how long it took, and the server in it."""
    began, ran = time.monotonic(), processor_seconds(process)
    yield
    asking.seconds, asking.processor = time.monotonic() - began, processor_seconds(process) - ran


def processor_seconds(process: int) -> float:
    """Of all threads, in user and kernel mode (proc(5), fields 14 and 15 of stat)."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def ask_alone(url: str, config: BenchConfig, asked: Sequence[str], process: int) -> Asking:
    """One client asks every question once."""
    got, client = Asking(), Client(url, "bench", config.tokens)
    client.ask(asked[0])  # warm
    with timed(got, process):
        got.answers += [(question, client.ask(question)) for question in asked]
    client.close()
    return got


def ask_together(url: str, config: BenchConfig, asked: Sequence[str], process: int) -> Asking:
    """Every client asks, from a place of its own on, until the time is over."""
    got, until = Asking(), time.monotonic() + config.seconds

    def converse(number: int) -> None:
        client, turn = Client(url, "bench", config.tokens), number
        while time.monotonic() < until:
            question = asked[turn % len(asked)]
            try:
                got.answers.append((question, client.ask(question, stream=number % 2 == 1)))
            except (OSError, http.client.HTTPException, ValueError) as error:
                got.failures.append(f"{question}: {error!r}")
            turn += 1
        client.close()

    with timed(got, process), ThreadPoolExecutor(config.clients) as threads:
        list(threads.map(converse, range(config.clients)))
    return got


def main(config: BenchConfig) -> int:
    config.check()
    asked, device = questions(), torch.device(config.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    with server(config) as (url, process):
        before = ask_alone(url, config, asked, process)
        speak(f"One client: {before.speed:.1f} tokens/s.")
        memory = Memory(process)
        try:
            together = ask_together(url, config, asked, process)
        finally:
            memory.stop()
        speak(f"{config.clients} clients: {together.speed:.1f} tokens/s.")
        after = ask_alone(url, config, asked, process)
    alone = dict(before.answers)
    failures = [failure for asking in (before, together, after) for failure in asking.failures]
    different = [question for asking in (together, after) for question in asking.different(alone)]
    alone_tokens, alone_seconds = before.tokens + after.tokens, before.seconds + after.seconds
    seconds = sorted(answer.seconds for _, answer in together.answers)
    record = {
        **machine(device),
        "model": config.model,
        "clients": config.clients,
        "seconds": round(together.seconds, 1),
        "requests": len(together.answers) + len(together.failures),
        "failed": len(failures),
        "different answers": len(different),
        "answers that differ alone": len({answer.text for answer in alone.values()}),
        "tok/s alone": f"{alone_tokens / alone_seconds:.1f}",
        "tok/s alone, before and after": [round(before.speed, 1), round(after.speed, 1)],
        "tok/s together": f"{together.speed:.1f}",
        "ratio": f"{together.speed * alone_seconds / alone_tokens:.2f}",
        "processor ms/tok alone": f"{1000 * (before.processor + after.processor) / alone_tokens:.2f}",
        "processor ms/tok together": f"{1000 * together.processor / together.tokens:.2f}",
        "median seconds": f"{statistics.median(seconds):.2f}",
        "p95 seconds": f"{seconds[int(0.95 * len(seconds))]:.2f}",
        "memory MiB": f"{memory.samples[-1][1]:.0f}",
        "memory MiB/min": f"{slope(memory.samples):+.2f}",
        "memory by second": [round(value, 1) for _, value in memory.samples],
        "note": config.note,
        "config": asdict(config),
    }
    for name, value in record.items():
        if not isinstance(value, dict | list):
            print(f"{name:<28}{value}")
    if config.out:
        append_record(Path(config.out), record, _heading(), _COLUMNS)
    for line in [*failures[:5], *different[:5]]:
        speak(f"Not as alone: {line}")
    return EXIT_GATE if failures or different else 0


def _heading() -> str:
    told = (
        "One client asks 64 questions by itself; then all clients ask them at once for so many seconds, each again "
        "as soon as it is answered, every other one in a stream; then the one again. Greedy decoding; each answer "
        "is compared with the one given alone. Tokens a second are those that the server counted, over the whole "
        "time, of the one client over both of its. Processor: time of all threads of the server for a token, which "
        "other work on the machine lengthens little. Seconds of an answer, from request to end, are those of "
        "clients all at once. Memory: resident, of the server, at the end, and the slope of a least-squares line "
        "through the last three quarters of the time. Clients run on the same machine and take their share of it. "
        "All samples of memory, and the options, are in the .jsonl file beside this page."
    )
    command = "python tools/bench_serve.py --out docs/benchmarks/serve-cpu"
    return f"# A server and many clients\n\n    {command}\n\n{textwrap.fill(told, 118, break_on_hyphens=False)}"


if __name__ == "__main__":
    run(main, BenchConfig)
