"""The doctor as a user calls it: in one process, under torchrun, and with nothing installed."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def call(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1", **environment}
    )


def test_it_fits_a_screen_and_says_that_training_can_work() -> None:
    said = call(sys.executable, "tools/doctor.py")
    assert said.returncode == 0 and said.stdout.endswith("Training can work here.\n")
    assert len(said.stdout.splitlines()) < 40 and max(map(len, said.stdout.splitlines())) <= 160


def test_ranks_find_each_other_and_one_speaks(tmp_path: Path) -> None:
    launcher = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    said = call(*launcher, "tools/doctor.py", "--out", str(tmp_path / "ckpt"))
    assert said.returncode == 0, said.stderr
    assert said.stdout.count("Training can work here.") == 1
    assert "2 on 1 host" in said.stdout and "right over gloo" in said.stdout
    assert list(tmp_path.iterdir()) == []


def test_without_packages_it_says_what_is_missing(tmp_path: Path) -> None:
    # -S leaves out site-packages: nothing is installed there.
    said = call(sys.executable, "-S", "tools/doctor.py", "--out", str(tmp_path))
    assert said.returncode == 2 and "Traceback" not in said.stderr
    assert "mend torch" in said.stdout and "make setup" in said.stdout


def test_an_option_that_it_does_not_have_is_one_sentence() -> None:
    said = call(sys.executable, "tools/doctor.py", "--model", "x")
    assert (said.returncode, said.stderr) == (2, "Unrecognized arguments: --model x. See --help.\n")
