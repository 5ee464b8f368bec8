"""The finished model at the root of a run directory, swapped in so that nobody reads a mixture of two.

The new files are written beside (`.model-publishing/`), flushed, and moved to the root one by one. The marker
`MODEL_COMPLETE` goes before the first move and returns, with the list of files and sizes, after the last. A kill
in between leaves a root without a marker but with the folder beside, which `require_model` refuses; running the
same command again publishes again.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from engine.agreement import ControlGroup
from engine.files import sync_directory, sync_tree, write_durably
from engine.masters import Master
from model.directories import ADAPTED_CONFIG, ADAPTER_CONFIG, is_adapter, lineage, read_json
from model.errors import InputError
from model.fingerprint import fingerprint_weights
from model.peft import BASE_FINGERPRINT
from model.weight_files import WRITTEN

MODEL_COMPLETE = "MODEL_COMPLETE"
PUBLISHING = ".model-publishing"
STATE = ("state", "rounds")
"""What a run that may go on has in its directory: its checkpoints, or the rounds of rejection sampling."""
SCHEMA = 1


def gather_full(
    tensors: Iterable[tuple[str, Tensor | Master]], dtype: torch.dtype | None = None, everywhere: bool = False
) -> FullTensors:
    """Full tensors, one at a time, from any sharding; all ranks iterate to the end.

    Args:
        tensors: (name, DTensor, plain tensor or master), the same names in the same order on every rank.
        dtype: cast to it before gathering, which halves the traffic of fp32 master weights kept in bf16.
        everywhere: on every rank's own device, instead of rank 0's CPU alone.
    """
    return FullTensors(tensors, dtype, everywhere)


class FullTensors(Iterator[tuple[str, Tensor]]):
    """Iterator over gathered tensors: (name, full tensor); see `gather_full`. It is empty on ranks that get none.

    Unlike a generator it goes on after an exception in `__next__`, so a rank that fails can still take part in
    the collectives that the others are waiting in: see `drain`.
    """

    def __init__(
        self, tensors: Iterable[tuple[str, Tensor | Master]], dtype: torch.dtype | None, everywhere: bool = False
    ) -> None:
        self._tensors = iter(tensors)
        self._dtype, self._everywhere = dtype, everywhere
        self._is_main = not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0

    @torch.no_grad()
    def __next__(self) -> tuple[str, Tensor]:
        name, tensor = next(self._tensors)
        if isinstance(tensor, Master):
            tensor = tensor.weight if self._dtype == tensor.weight.dtype else tensor.join()
        tensor = tensor.detach()
        if self._dtype is not None:
            tensor = tensor.to(self._dtype)
        if isinstance(tensor, DTensor):
            tensor = tensor.full_tensor()
        if self._everywhere:
            return name, tensor
        return name, tensor.cpu() if self._is_main else torch.empty(0)

    def drain(self) -> None:
        """Take part in what is left, keeping none of it."""
        self._is_main = self._everywhere = False
        for _ in self:
            pass


def publish(
    directory: Path | str,
    tensors: Iterable[tuple[str, Tensor | Master]],
    write: Callable[[Path, Iterator[tuple[str, Tensor]]], None],
    ranks: ControlGroup,
    *,
    step: int,
    stage: str,
    dtype: torch.dtype | None = None,
) -> None:
    """Replace the model at the root of a run directory. A collective: all ranks call it.

    Args:
        directory: the run directory.
        tensors: as in `gather_full`.
        write: called on rank 0 with an empty folder and the full tensors; writes the model directory's files
            there: weights, configuration, tokenizer. No subfolders.
        ranks: a group that no other thread is using now.
        step: training steps behind this model.
        stage: which job made it: "pretrain", "sft", ...
        dtype: see `gather_full`.
    Raises:
        InputError: on all ranks, when the filesystem refused; the model that was there is untouched then, unless
            it refused a rename, in which case the directory counts as unfinished.
    """
    directory = Path(directory)
    beside = directory / PUBLISHING
    full = gather_full(tensors, dtype)

    def make_room() -> None:
        beside.mkdir(parents=True, exist_ok=True)
        _empty(beside)

    def write_beside() -> None:
        try:
            if ranks.rank == 0:
                write(beside, full)
                sync_tree(beside)
        except BaseException:
            with contextlib.suppress(OSError):
                _empty(beside)
            raise
        finally:
            full.drain()

    doing = f"write the model to {directory}"
    ranks.first(doing, make_room)
    ranks.each(doing, write_beside)
    ranks.first(doing, lambda: _swap_in(directory, step, stage))


def require_model(directory: Path | str) -> Path:
    """Check that a model can be read from here, before anything is.

    Args:
        directory: a run directory, or any Hugging Face model directory; or an adapter's, whose base is checked, too.
    Raises:
        InputError: no such directory, no model in it, or one that is not (or no longer) whole; an adapter whose base
            has other weights now.
    """
    directories = list(lineage(directory))
    for each in directories:
        _require_whole(each)
    for adapter, base in itertools.pairwise(directories):
        _require_same_base(adapter, base)
    return Path(directory)


def holds_model_or_run(directory: Path) -> bool:
    """Whether a directory is, or is to become, that of a model."""
    names = (MODEL_COMPLETE, "config.json", *STATE, PUBLISHING)
    return is_adapter(directory) or any((directory / name).exists() for name in names)


def _require_whole(directory: Path) -> None:
    if not directory.is_dir():
        raise InputError(f"{directory}: there is no such model directory. Check the path.")
    marker = directory / MODEL_COMPLETE
    if not marker.exists():
        if any((directory / name).exists() for name in (*STATE, PUBLISHING)):
            raise InputError(
                f"{directory}: this run has not finished writing its model. Resume it with the same command first."
            )
        if not (directory / "config.json").is_file() and not is_adapter(directory):
            raise InputError(f"{directory} holds no config.json, so it is no model directory. Check the path.")
        return
    try:
        content = json.loads(marker.read_text(encoding="utf-8"))
        schema, files = content["schema"], dict(content["files"])
    except (ValueError, LookupError, TypeError):
        raise InputError(f"{marker} is not readable. Run the same command again to write the model anew.") from None
    if schema != SCHEMA:
        raise InputError(f"{marker} is of format {schema}; this version reads {SCHEMA}. Use the one that wrote it.")
    for name, size in files.items():
        path = directory / name
        found = path.stat().st_size if path.is_file() else None
        if found != size:
            state = "is missing" if found is None else f"has {found} bytes where {size} were written"
            raise InputError(f"{path} {state}. Run the same command again to write the model anew.")


def _require_same_base(adapter: Path, base: Path) -> None:
    path = adapter / ADAPTED_CONFIG
    expected = read_json(path).get(BASE_FINGERPRINT) if path.is_file() else None
    if expected is not None and fingerprint_weights(base) != expected:
        raise InputError(
            f"{adapter}: the weights in {base} are not those that this adapter was trained on. Train it again, or "
            f"write the directory that holds them into base_model_name_or_path of {ADAPTER_CONFIG}."
        )


def mark_complete(directory: Path, sizes: dict[str, int], step: int, stage: str) -> None:
    """Write the marker that says which files, of how many bytes, are a whole model; they must be on disk already."""
    content = {"schema": SCHEMA, "step": step, "stage": stage, "files": sizes}
    write_durably(directory / MODEL_COMPLETE, json.dumps(content, indent=1) + "\n")


def _empty(beside: Path) -> None:
    """Remove the files, not the folder: while the root has no marker, the folder says that the root is no model."""
    for path in beside.iterdir():
        path.unlink()


def _swap_in(directory: Path, step: int, stage: str) -> None:
    beside, marker = directory / PUBLISHING, directory / MODEL_COMPLETE
    sizes = {path.name: path.stat().st_size for path in sorted(beside.iterdir())}
    sync_directory(directory)  # the folder beside is on disk before the marker goes
    marker.unlink(missing_ok=True)
    sync_directory(directory)  # and the marker is off it before the first file changes
    for name in sizes:
        os.replace(beside / name, directory / name)
    for pattern in WRITTEN:
        for stale in directory.glob(pattern):
            if stale.name not in sizes:
                stale.unlink()
    sync_directory(directory)
    mark_complete(directory, sizes, step, stage)
    beside.rmdir()
