"""Requests that schemathesis makes up from the server's own schema, sound ones and mutilated ones, over the network."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from engine.serving.limits import Limits
from tests.engine.serving.live import served
from tests.tools.small_chat import write_small_chat_model

CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_headers_conformance",
    "response_schema_conformance",
    "negative_data_rejection",
    "positive_data_acceptance",
    "unsupported_method",
    "allow_header_conformance",
)
# Sound requests too are refused for what no schema tells, such as how long a prompt may be.
SETTINGS = """
[checks.positive_data_acceptance]
expected-statuses = [200, 400]
"""


def test_whatever_is_sent_the_answer_is_one_that_the_schema_declares(tmp_path: Path, nothing_fails: None) -> None:
    """Answers end with a short context, so that any number of tokens may be asked for."""
    model = write_small_chat_model(tmp_path / "model", context=64)
    (tmp_path / "settings.toml").write_text(SETTINGS)
    words = ["--phases", "examples,coverage,fuzzing", "--max-examples", "30", "--generation-deterministic"]
    words += ["--workers", "1", "--request-timeout", "60", "--checks", ",".join(CHECKS), "--no-color"]
    program = [sys.executable, "-m", "schemathesis.cli", "--config-file", "settings.toml", "run", *words]
    with served(model, max_queue=8, limits=Limits(max_tokens=2**62)) as live:
        url = f"http://127.0.0.1:{live.port}/openapi.json"
        ended = subprocess.run([*program, url], cwd=tmp_path, capture_output=True, text=True, encoding="utf-8")
        assert ended.returncode == 0, ended.stdout + ended.stderr
        counted = dict(line.rsplit(" ", 1) for line in live.service.metrics.text(*live.service.load).splitlines())
    for path in "chat/completions", "completions":
        for status in 200, 400:  # both were reached, and not by chance
            assert int(counted[f'chimed_requests_total{{path="/v1/{path}",status="{status}"}}']) >= 20
