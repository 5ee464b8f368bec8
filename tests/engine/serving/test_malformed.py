"""Bodies that no client should send: refused in OpenAI's shape, never a 500, and the next request is served."""

from __future__ import annotations

import json
import shlex
from typing import Any
from urllib.parse import urlsplit

import pytest

from engine.serving.errors import ApiError
from tests.documented import ROOT, others
from tests.engine.serving.live import NAME, Live

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
GOOD: dict[str, Any] = {"model": NAME, "messages": [{"role": "user", "content": "头晕"}], "max_tokens": 1}
COMPLETION: dict[str, Any] = {"model": NAME, "prompt": "头晕", "max_tokens": 1}
BODIES: dict[str, tuple[str, Any]] = {
    "nothing": (CHAT, b""),
    "no JSON": (CHAT, b"{"),
    "no UTF-8": (CHAT, b'{"model": "\xff"}'),
    "a list": (CHAT, []),
    "nesting": (CHAT, b"[" * 100_000),
    "a number of 5000 digits": (CHAT, json.dumps(GOOD)[:-1].encode() + b', "seed": ' + b"9" * 5000 + b"}"),
    "NaN": (CHAT, {**GOOD, "temperature": float("nan")}),
    "infinity": (CHAT, {**GOOD, "top_p": float("inf")}),
    "a text for a number": (CHAT, {**GOOD, "max_tokens": "5"}),
    "true for a number": (CHAT, {**GOOD, "n": True}),
    "half a surrogate pair": (CHAT, b'{"model": "small", "messages": [{"role": "user", "content": "\\ud800"}]}'),
    "no messages": (CHAT, {**GOOD, "messages": []}),
    "an unknown role": (CHAT, {**GOOD, "messages": [{"role": "tool", "content": "x"}]}),
    "an image": (CHAT, {**GOOD, "messages": [{"role": "user", "content": [{"type": "image_url"}]}]}),
    "an option that is not served": (CHAT, {**GOOD, "logit_bias": {"5": 1}}),
    "an option whose name is no text": (CHAT, b'{"\\ud800": 1, ' + json.dumps(GOOD)[1:].encode()),
    "a model whose name is no text": (CHAT, b'{"model": "\\ud800", "messages": 1}'),
    "an option that may only be off": (CHAT, {**GOOD, "presence_penalty": 0.5}),
    "no answers": (CHAT, {**GOOD, "n": 0}),
    "more tokens than may be": (CHAT, {**GOOD, "max_tokens": 10**9}),
    "an empty stop text": (CHAT, {**GOOD, "stop": ""}),
    "a seed of 65 bits": (CHAT, {**GOOD, "seed": 2**64}),
    "a prompt longer than the context": (CHAT, {**GOOD, "messages": [{"role": "user", "content": "头晕" * 500}]}),
    "no prompts": (TEXT, {**COMPLETION, "prompt": []}),
    "an empty prompt of ids": (TEXT, {**COMPLETION, "prompt": [[]]}),
    "ids that the model does not know": (TEXT, {**COMPLETION, "prompt": [2**30]}),
    "negative ids": (TEXT, {**COMPLETION, "prompt": [-1]}),
    "ids and texts": (TEXT, {**COMPLETION, "prompt": [1, "x"]}),
    "log-probabilities in a stream": (TEXT, {**COMPLETION, "stream": True, "logprobs": 1}),
    "nothing to write": (TEXT, {**COMPLETION, "max_tokens": 0}),
    "too many log-probabilities": (TEXT, {**COMPLETION, "logprobs": 6}),
}


@pytest.mark.parametrize("what", BODIES)
def test_it_is_refused_in_a_sentence(live: Live, what: str) -> None:
    path, body = BODIES[what]
    status, _, told = live.post(path, body)
    assert status == 400, told
    assert told["error"]["type"] == "invalid_request_error" and told["error"]["message"].endswith(".")
    assert live.service.load == (0, 0)
    assert live.post(CHAT, GOOD)[0] == 200


def documented_request() -> tuple[str, dict[str, str], bytes]:
    """Path, headers and body of the request that docs/serving.md shows for curl."""
    (typed,) = [typed for _, typed in others(ROOT / "docs" / "serving.md") if typed.startswith("curl ")]
    _, url, *options = shlex.split(typed)
    given = list(zip(options[::2], options[1::2], strict=True))
    headers = dict(value.split(": ") for flag, value in given if flag == "-H")
    (body,) = [json.loads(value) for flag, value in given if flag == "-d"]
    assert len(given) == len(headers) + 1
    return urlsplit(url).path, headers, json.dumps({**body, "model": NAME, "max_tokens": 1}).encode()


def test_the_documented_request_is_answered_and_without_its_content_type_told_of_it(live: Live) -> None:
    path, headers, body = documented_request()
    assert live.send("POST", path, body, **headers)[0] == 200
    form = "application/x-www-form-urlencoded"  # what curl -d says by itself
    for kind, given in (
        (form, {"Content-Type": form}),
        ("without a type", {}),
        ("text/plain", {"Content-Type": "text/plain"}),
    ):
        status, _, answer = live.send("POST", path, body, **given)
        told = json.loads(answer)["error"]["message"]
        assert status == 400 and kind in told
        assert told.endswith(" Send it with the header Content-Type: application/json.")


def test_whatever_a_sentence_quotes_can_be_sent() -> None:
    body = json.dumps(ApiError(400, "There is no \ud800 here.").body, ensure_ascii=False).encode()
    assert json.loads(body)["error"]["message"] == "There is no \\ud800 here."


def test_other_paths_and_methods_are_refused(live: Live) -> None:
    assert live.post("/v1/embeddings", {})[0] == 404
    assert live.send("GET", CHAT)[0] == 405


def test_what_was_served_is_counted(live: Live) -> None:
    live.post(CHAT, GOOD)
    live.send("GET", "/nowhere/at/all")
    status, headers, content = live.send("GET", "/metrics")
    lines = dict(line.rsplit(" ", 1) for line in content.decode().splitlines() if line[0] != "#")
    assert status == 200 and headers["Content-Type"].startswith("text/plain; version=0.0.4")
    assert int(lines[f'chimed_requests_total{{path="{CHAT}",status="200"}}']) >= 1
    assert int(lines['chimed_requests_total{path="other",status="404"}']) >= 1
    assert int(lines["chimed_generated_tokens_total"]) >= 1
    assert lines["chimed_answers_running"] == lines["chimed_answers_waiting"] == "0"
    assert lines['chimed_first_token_seconds_bucket{le="+Inf"}'] == lines["chimed_first_token_seconds_count"]
