"""Kernels as compiled for chips that are not here: every launch within its limits, and limits that bite.

Kernels are compiled in a process of its own, because this one interprets them.
"""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from kernels.offline.ttir import read

ROOT = Path(__file__).resolve().parents[2]


def compiled(module: str, folder: Path) -> dict[str, Any]:
    """What a program leaves behind; run once, whichever worker asks first."""
    file = folder / f"{module}.json"
    with (folder / f"{module}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not file.exists():
            environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
            command = [sys.executable, "-m", module, str(file)]
            done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
    return json.loads(file.read_text())


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.getbasetemp()
    return folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder


@pytest.fixture(scope="session")
def audit(shared_folder: Path) -> dict[str, Any]:
    return compiled("kernels.offline", shared_folder)


@pytest.fixture(scope="session")
def examples(shared_folder: Path) -> dict[str, dict[str, Any]]:
    return compiled("tests.kernels.offline_examples", shared_folder)


def test_no_launch_breaks_a_limit(audit: dict[str, Any]) -> None:
    assert audit["rows"]
    assert not audit["broken"], "\n".join(audit["broken"])


def test_every_case_launches_kernels_and_products_run_on_tensor_cores(audit: dict[str, Any]) -> None:
    assert not audit["silent"], "\n".join(audit["silent"])


def test_every_kernel_has_a_case(audit: dict[str, Any]) -> None:
    assert not audit["uncovered"], "\n".join(audit["uncovered"])


def test_every_entry_of_the_launch_table_is_dispatched_and_among_its_candidates(audit: dict[str, Any]) -> None:
    assert not audit["idle"], "\n".join(audit["idle"])


def test_both_chips_all_dtypes_and_widths_are_compiled(audit: dict[str, Any]) -> None:
    found = {(row["arch"], row["dtype"]) for row in audit["rows"]}
    assert found >= {(arch, dtype) for arch in (80, 90) for dtype in ("float32", "float16", "bfloat16")}
    widths = {(row["op"], row["stage"], row["width"]) for row in audit["rows"]}
    for stage in ("forward", "backward"):
        assert widths >= {("attention", stage, width) for width in (64, 80, 96, 128, 256)}
        assert widths >= {("add_rms_norm", stage, width) for width in (1023, 5120, 16384)}


def test_what_is_right_passes(examples: dict[str, dict[str, Any]]) -> None:
    right = [name for name, meant in examples["meant"].items() if meant.startswith("right")]
    assert len(right) >= 4
    assert {name: examples["found"][name] for name in right} == {name: [] for name in right}


def test_what_breaks_a_limit_is_found_and_nothing_else_is_said(examples: dict[str, dict[str, Any]]) -> None:
    wrong = {name: meant for name, meant in examples["meant"].items() if not meant.startswith("right")}
    assert len(wrong) >= 12
    for name, meant in wrong.items():
        found = examples["found"][name]
        assert found and all(meant in line for line in found), f"{name}: {meant} is meant, found {found}"


def test_kernels_are_told_from_helpers(audit: dict[str, Any]) -> None:
    assert "_rms_norm_fwd_kernel" in audit["kernels"]
    assert "_then" not in audit["kernels"]  # a helper of the scan in `gae`


def test_text_that_is_no_module_is_refused() -> None:
    with pytest.raises(ValueError, match="braces"):
        read("module {\n  tt.func public @k() {\n")
    with pytest.raises(ValueError, match="not an operation"):
        read("module {\n  ???\n}\n")
