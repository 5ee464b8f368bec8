"""Log-probabilities of answers by the model that training starts from, computed once and kept on disk.

The model that is to be trained computes them before its first step, over the micro-batches that training begins with.
So no second model is ever loaded, and whatever rounding the batches bring is the same on both sides.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from engine.agreement import ControlGroup
from engine.data.ranked_batch import RankedBatch
from engine.files import sync_directory, sync_file
from engine.launch import StoppedError, speak
from engine.mesh import Runtime
from engine.shard import free_gathered
from engine.signals import StopSignals
from engine.watchdog import Watchdog
from model.directories import ADAPTER_CONFIG, is_adapter, lineage
from rlhf.dpo import sequence_logprobs

SAVE_EVERY = 50  # steps


def reference_key(model: Path, *facts: Any) -> str:
    """128 bits in hex over a model directory's files (names, sizes, times), for an adapter those of its base, too, and
    whatever else decides the values."""
    directories = list(lineage(model))
    paths = [path for each in directories for path in sorted(each.glob("*.safetensors"))]
    files = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in paths]
    configs = [each / (ADAPTER_CONFIG if is_adapter(each) else "config.json") for each in directories]
    config = "".join(path.read_text(encoding="utf-8") for path in configs)
    return blake2b(json.dumps([files, config, *facts]).encode(), digest_size=16).hexdigest()


@torch.no_grad()
def reference_logprobs(
    model: nn.Module,
    steps: Iterator[list[RankedBatch]],
    num_steps: int,
    num_sequences: int,
    path: Path,
    key: str,
    runtime: Runtime,
    dog: Watchdog,
    signals: StopSignals,
    per_token: bool = False,
) -> Tensor:
    """`sequence_logprobs` of all sequences of some steps, by their numbers; a collective.

    What `path` holds under this key is not computed again; what is computed is written there from time to time.

    Args:
        steps: this rank's micro-batches, as many of one size as the other ranks have.
        num_steps: how many of them to read.
        num_sequences: S, of the whole set.
    Returns:
        fp32 [S] on the device; nan for sequences that are in none of the steps.
    Raises:
        InputError: the file cannot be written.
        StoppedError: a signal asked for it; what was computed is saved.
    """
    ranks = ControlGroup()
    kept, done = ranks.first(f"read {path}", lambda: _load(path, key, num_sequences))
    values = kept.to(runtime.device)
    if done >= num_steps:
        return values
    speak(f"Log-probabilities of the reference: {num_steps - done:,} steps without gradients.")
    for number in range(num_steps):
        batches = next(steps)
        if number < done:
            continue
        dog.beat(f"in step {number + 1} of the reference")
        must_stop = _add(values, model, batches, per_token, signals.wants_stop, runtime)
        is_last = number + 1 == num_steps
        if is_last or must_stop or (number + 1) % SAVE_EVERY == 0:
            ranks.first(f"write {path}", lambda done=number + 1: _save(path, key, values, done))  # type: ignore[misc]
        if must_stop:
            raise StoppedError(
                f"Stopped by a signal after {number + 1} of {num_steps} steps of the reference. The same command goes "
                "on from there.",
                signals.exit_code,
            )
    free_gathered(model)
    return values


def _add(
    values: Tensor, model: nn.Module, batches: list[RankedBatch], per_token: bool, wants_stop: bool, runtime: Runtime
) -> bool:
    """Put one step's values, of all ranks, where they belong. Returns whether a rank was asked to stop."""
    own = []
    for batch in batches:
        here = batch.to(runtime.device)
        own.append(torch.stack([here.sequence.double(), sequence_logprobs(model, here, per_token).double()]))
    mine = torch.cat(own, 1)  # numbers and values, [2, n D]
    found = torch.zeros(runtime.world, mine.numel() + 1, dtype=torch.float64, device=runtime.device)
    found[runtime.rank, :-1], found[runtime.rank, -1] = mine.flatten(), float(wants_stop)
    found = runtime.sum(found)
    numbers, new = found[:, :-1].view(runtime.world, 2, -1).transpose(0, 1).flatten(1)
    numbers = numbers.long()
    # At the seam of two epochs a sequence comes again, in another micro-batch: the first value stays.
    is_new = (numbers >= 0) & values[numbers.clamp(min=0)].isnan()
    values[numbers[is_new]] = new[is_new].float()
    return bool(found[:, -1].any())


def _load(path: Path, key: str, num_sequences: int) -> tuple[Tensor, int]:
    """Values, and the steps that they are of; none of them where nothing is kept under this key."""
    if path.exists():
        with safe_open(path, "pt") as file:
            facts = file.metadata()
            if facts["key"] == key:
                return file.get_tensor("logprob"), int(facts["steps"])
    return torch.full((num_sequences,), torch.nan), 0


def _save(path: Path, key: str, values: Tensor, steps: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.tmp")
    save_file({"logprob": values.cpu()}, beside, {"key": key, "steps": str(steps)})
    sync_file(beside)
    beside.replace(path)
    sync_directory(path.parent)
