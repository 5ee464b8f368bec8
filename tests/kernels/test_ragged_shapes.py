"""Kernels are compiled before the work begins, not in the middle of it because a batch has 16 rows or 17."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_ragged_work_asks_for_few_forms_of_each_kernel() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.kernels.ragged_shapes"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {
        "_decode_attention_fwd_kernel": 3,  # a plain cache; pages, in one stretch or in several
        "_decode_attention_sum_kernel": 6,  # from 2 to 64 stretches, a power of two
        "_schedule_kernel": 4,  # over queries or keys, of few documents or many
        "_attention_fwd_kernel": 2,  # of packed keys, or of pages
        "_attention_bwd_dq_kernel": 1,
        "_attention_bwd_dkdv_kernel": 1,
        "_low_rank_fwd_kernel": 1,
        "_low_rank_bwd_kernel": 1,
        "_sample_groups_kernel": 1,
        "_sample_draw_kernel": 1,
        "_linear_logprob_fwd_kernel": 1,
        "_linear_logprob_bwd_kernel": 1,
        "_gae_kernel": 1,
    }
