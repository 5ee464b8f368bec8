"""The sbatch file forms the command lines that it promises, with Slurm's own programs stood in for."""

import os
import subprocess
from pathlib import Path

from tests.tools.in_child import TOOLS

ROOT = TOOLS.parent


def test_torchrun_runs_once_a_node_first_the_doctor_then_the_tool(tmp_path: Path) -> None:
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "activate").touch()
    programs = {"srun": 'echo "$@"', "scontrol": "echo node0; echo node1"}
    for name, body in programs.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    slurm = {"SLURM_JOB_NODELIST": "node[0-1]", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_ID": "7"}
    slurm |= {"SLURM_SUBMIT_DIR": str(tmp_path), "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    command = ["bash", ROOT / "configs" / "slurm.sbatch", "pretrain", "--data", "a b.txt", "--train.steps", "5"]
    said = subprocess.run(command, env={**os.environ, **slurm}, capture_output=True, text=True, check=True)
    launch = (
        "torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint node0:29500 --rdzv-id 7 "
        "--shutdown-timeout 1500"
    )
    assert said.stdout.splitlines() == [
        f"{launch} tools/doctor.py",
        f"{launch} tools/pretrain.py --data a b.txt --train.steps 5",
    ]
