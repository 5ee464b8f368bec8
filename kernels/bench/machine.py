"""What a figure depends on beside the code: the GPU, its driver, versions, date, commit, command."""

from __future__ import annotations

import platform
import re
import subprocess
import sys
import time
from pathlib import Path

import torch
import triton

from kernels.bench import peers

ROOT = Path(__file__).resolve().parents[2]


def machine(device: torch.device, commit: str | None = None) -> dict[str, str]:
    """Facts by name, in order.

    Args:
        commit: where the checkout has no history; otherwise it is asked for.
    """
    facts = {"date": time.strftime("%Y-%m-%d", time.gmtime()), "device": device_name(device)}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts |= {
            "multiprocessors": str(properties.multi_processor_count),
            "memory": f"{properties.total_memory / 2**30:.0f} GiB",
            "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").split("\n")[0],
            "CUDA": str(torch.version.cuda),
            "cuDNN": str(torch.backends.cudnn.version()),
        }
    facts |= {"torch": torch.__version__, "triton": triton.__version__, "python": platform.python_version()}
    return facts | peers.versions() | {"commit": commit or _commit(), "command": " ".join(["python", *sys.argv])}


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "CPU"


def slug(name: str) -> str:
    """A device's name for a file: `NVIDIA H200` gives `h200`."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower().replace("nvidia", "")).strip("-") or "device"


def _commit() -> str:
    """Short hash, with a + where files under version control differ from it."""
    head = _output("git", "rev-parse", "--short", "HEAD")
    return head + ("+" if head != "unknown" and _output("git", "status", "--porcelain", "-uno") else "")


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
