"""The training state on disk: saved by any number of ranks, loaded by any other.

    <run>/state/step-00000123/
        shard-00001-model-00001-of-00002.safetensors ...   every rank's pieces, written by DCP
        trainer.json                                       every number, string and list that is no tensor
        COMPLETE                                           written last: the list of files and sizes

DCP (torch.distributed.checkpoint) plans who writes which piece and reads pieces for another number of ranks. Its
safetensors storage keeps all of that in the files' own headers: no pickle is written or read. A directory counts
once COMPLETE is there, which happens after everything else has been flushed and reopened; a kill before that
leaves a directory that nobody takes for a checkpoint and that the next save removes.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import re
import threading
import warnings
from collections.abc import Generator, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import (
    DefaultLoadPlanner,
    DefaultSavePlanner,
    HuggingFaceStorageReader,
    HuggingFaceStorageWriter,
)
from torch.distributed.checkpoint.default_planner import create_default_local_save_plan
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.metadata import STATE_DICT_TYPE, Metadata, StorageMeta
from torch.distributed.checkpoint.planner import ReadItem, SavePlan, WriteItem
from torch.distributed.tensor import DTensor

from engine.agreement import ControlGroup
from engine.files import (
    DELETED,
    discard_directory,
    human_size,
    remove_directory,
    sync_directory,
    sync_file,
    write_durably,
)
from engine.manifest import (
    DTYPE_NAMES,
    DamagedFile,
    check_manifest,
    check_written,
    is_complete,
    state_bytes,
    stored_tensors,
    write_manifest,
)
from engine.masters import Master
from model.errors import InputError

TRAINER = "trainer.json"
TRAINER_SCHEMA = 1

# A rank writes its pieces in files of about this size, one after the other. safetensors builds a file in memory
# before writing it, so this, not the size of the model, is what a save needs beyond the tensors.
FILE_BYTES = 512 * 2**20

# One process without torch.distributed is an ordinary way to run, not an oversight to warn of.
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")


class Checkpointer:
    """Saves and loads the training state of one run directory.

    Every method is a collective: all ranks call it, in the same order. All ranks see one filesystem. An error
    on one rank is raised on all of them.
    """

    def __init__(self, run_dir: Path | str, keep: int = 2, asynchronous: bool = False) -> None:
        """
        Args:
            run_dir: the run directory; nothing is created or removed before the first save.
            keep: how many complete checkpoints stay, the newest ones; at least 1.
            asynchronous: return from `save` once the tensors are copied to host memory, and write in a thread.
        """
        assert keep >= 1, "the newest checkpoint is never deleted"
        self.state_dir = Path(run_dir) / "state"
        self._keep = keep
        self._ranks = ControlGroup()
        self._staging: dict[str, Tensor] | None = {} if asynchronous else None
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def save(self, step: int, tensors: Mapping[str, Tensor | Master], trainer: dict[str, Any]) -> None:
        """Write a checkpoint, or (asynchronous) copy its tensors and begin to.

        A step that is complete on disk already is left as it is: a run's state is a function of its step.

        Args:
            step: steps done, the checkpoint's name.
            tensors: the same names on every rank. DTensors in any sharding; a plain tensor is the same on every
                rank and is written once. A master in halves is written whole. Tied weights go in under one name.
            trainer: JSON values that every rank agrees on (rank 0's are written): int, float, str, bool, None,
                and lists and string-keyed dicts of them.
        Raises:
            InputError: the filesystem refused, now or (asynchronous) since the previous call; checkpoints that
                were complete before still are.
        """
        self.wait()
        for name, tensor in tensors.items():
            assert isinstance(tensor, Tensor | Master) and tensor.dtype in DTYPE_NAMES, f"{name} is no tensor for DCP"
        assert _is_json(trainer), "trainer.json holds JSON values only"
        directory = self.directory(step)
        doing = f"write {directory} ({human_size(state_bytes(tensors))})"
        with self._leaving_nothing_half(directory):
            if not self._ranks.first(doing, lambda: self._make_room(directory)):
                return
            planner = self._ranks.each(doing, lambda: _SavePlanner(tensors, self._staging))
        text = json.dumps({"schema": TRAINER_SCHEMA, "step": step, "trainer": trainer}, indent=1) + "\n"
        if self._staging is None:
            self._write(step, planner, text, doing)
        else:
            # Daemonic, so that a process that must end does; an orderly end goes through `wait`.
            self._thread = threading.Thread(
                target=self._write_aside, args=(step, planner, text, doing), name="checkpoint", daemon=True
            )
            self._thread.start()

    def wait(self) -> None:
        """Return when nothing is being written. Raises what the last asynchronous save met."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def latest(self) -> int | None:
        """Step of the newest complete checkpoint, or None.

        Raises:
            InputError: a rank does not see the checkpoint that rank 0 found.
        """
        self.wait()
        step = self._ranks.first(f"read {self.state_dir}", lambda: max(self.steps(), default=None))
        if step is None:
            return None

        def look() -> None:
            if not is_complete(self.directory(step)):
                raise InputError(
                    f"{self.directory(step)}: rank {self._ranks.rank} does not see this checkpoint, rank 0 does. "
                    "Put --out on a filesystem that all nodes share."
                )

        self._ranks.each(f"read {self.directory(step)}", look)
        return step

    def load(self, step: int, tensors: Mapping[str, Tensor | Master]) -> dict[str, Any]:
        """Fill `tensors` in place from a checkpoint, whatever number of ranks wrote it.

        Args:
            tensors: names, shapes and dtypes of what was saved; any sharding, any device.
        Returns:
            The `trainer` dict of the save.
        Raises:
            InputError: the checkpoint is damaged or belongs to another model. No tensor has been touched then,
                unless the storage failed between the check and the reading.
        """
        self.wait()
        directory = self.directory(step)
        doing = f"read {directory}"
        trainer = self._ranks.each(doing, lambda: self._check(step, tensors))
        self._ranks.checkpointing(
            doing,
            dcp.load,
            _outlined(tensors),
            storage_reader=HuggingFaceStorageReader(str(directory)),
            planner=_LoadPlanner(tensors),
        )
        return trainer

    def steps(self) -> list[int]:
        """Steps with a complete checkpoint, as this rank sees them, in order."""
        if not self.state_dir.is_dir():
            return []
        named = ((path, re.fullmatch(r"step-(\d{8,})", path.name)) for path in self.state_dir.iterdir())
        return sorted(int(match[1]) for path, match in named if match and is_complete(path))

    def directory(self, step: int) -> Path:
        """Where the checkpoint of a step lies."""
        return self.state_dir / f"step-{step:08d}"

    def _make_room(self, directory: Path) -> bool:
        """Remove what broken saves left and create `directory`; False when it is complete already."""
        if is_complete(directory):
            return False
        self.state_dir.mkdir(parents=True, exist_ok=True)
        for leftover in self.state_dir.glob("step-*"):
            if leftover.suffix == DELETED or not is_complete(leftover):
                remove_directory(leftover)
        directory.mkdir()
        sync_directory(self.state_dir)
        return True

    def _write_aside(self, *args: Any) -> None:
        try:
            self._write(*args)
        except BaseException as error:  # carried over to the thread that will ask
            self._error = error

    def _write(self, step: int, planner: _SavePlanner, trainer: str, doing: str) -> None:
        directory = self.directory(step)

        def complete() -> None:
            check_written(directory, planned)
            write_durably(directory / TRAINER, trainer)
            write_manifest(directory, step, self._ranks.world)

        writer = HuggingFaceStorageWriter(
            str(directory), fqn_to_index_mapping=planner.file_numbers(), save_distributed=True
        )
        writer.fs = _FlushedFiles()
        # No copying ahead on a CUDA stream: in a thread it would be device 0's, on every rank of a node.
        writer.per_thread_copy_ahead = 0
        with self._leaving_nothing_half(directory):
            planned: Metadata = self._ranks.checkpointing(doing, dcp.save, {}, storage_writer=writer, planner=planner)
            self._ranks.first(doing, complete)
        self._ranks.first(f"remove checkpoints older than {directory}", self._prune)

    @contextlib.contextmanager
    def _leaving_nothing_half(self, directory: Path) -> Iterator[None]:
        """Remove `directory` when the filesystem refuses it, and say what there is to resume from."""

        def clean_up() -> str:
            discard_directory(directory)
            try:
                steps = self.steps()
            except OSError:  # the first error says more
                return ""
            return f" The checkpoint of step {steps[-1]} is intact." if steps else " There is no earlier checkpoint."

        try:
            yield
        except InputError as error:
            raise InputError(str(error) + self._ranks.first("clean up", clean_up)) from error

    def _prune(self) -> None:
        for step in self.steps()[: -self._keep]:
            remove_directory(self.directory(step))

    def _check(self, step: int, tensors: Mapping[str, Tensor | Master]) -> dict[str, Any]:
        """Compare a checkpoint with its manifest and with what shall be filled; returns the trainer dict."""
        directory = self.directory(step)
        try:
            check_manifest(directory)
            stored = stored_tensors(directory)
        except DamagedFile as error:
            raise InputError(f"{error}. {self._remedy(step)}") from None
        saved = json.loads((directory / TRAINER).read_text(encoding="utf-8"))
        if saved["schema"] != TRAINER_SCHEMA:
            raise InputError(
                f"{directory / TRAINER} is of format {saved['schema']}; this version reads {TRAINER_SCHEMA}. "
                "Resume with the version that wrote it."
            )
        for name in sorted(stored.keys() | tensors.keys()):
            there = f"{stored[name].dtype} {list(stored[name].shape)}" if name in stored else "absent"
            here = f"{DTYPE_NAMES[tensors[name].dtype]} {list(tensors[name].shape)}" if name in tensors else "absent"
            if there != here:
                raise InputError(
                    f"{directory}: this checkpoint is of another model: {name} is {there} in it and {here} in this "
                    "run. Give the run its own --out, or the model and optimizer options it began with."
                )
        return saved["trainer"]

    def _remedy(self, step: int) -> str:
        earlier = [other for other in self.steps() if other < step]
        onward = f"go on from step {earlier[-1]}" if earlier else "begin again (no earlier checkpoint is complete)"
        return f"Delete {self.directory(step)} and run the same command to {onward}."


class _FlushedFiles(FileSystem):
    """DCP flushes a file to disk while its last bytes may be in Python's buffer yet; flush it again when closed."""

    @contextlib.contextmanager
    def create_stream(self, path: str | os.PathLike, mode: str) -> Generator[io.IOBase, None, None]:
        with super().create_stream(path, mode) as stream:
            yield stream
        if "w" in mode:
            sync_file(Path(path))


class _SavePlanner(DefaultSavePlanner):
    """Plans a save when it is made, from the tensors' layout, and hands out this rank's pieces when they are written.

    With a staging area the pieces are copied into it at once, so the training may go on. The area lives as long
    as its Checkpointer and there is one save at a time, so it holds one copy of this rank's state, no more. Its
    memory is pageable: pinned memory is allotted in powers of two, which could double that copy.
    """

    def __init__(self, tensors: Mapping[str, Tensor | Master], staging: dict[str, Tensor] | None) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self.plan = create_default_local_save_plan(_outlined(tensors), is_coordinator=False)
        self._pieces = {name: _local(tensor) for name, tensor in tensors.items()}
        if staging is not None:
            for name, piece in self._pieces.items():
                if name not in staging:
                    staging[name] = torch.empty(piece.shape, dtype=piece.dtype)
                assert staging[name].shape == piece.shape, f"{name} changed its shape during a run"
                self._pieces[name] = staging[name].copy_(_whole(piece))

    def set_up_planner(
        self, state_dict: STATE_DICT_TYPE, storage_meta: StorageMeta | None = None, is_coordinator: bool = False
    ) -> None:
        self.is_coordinator = is_coordinator

    def create_local_plan(self) -> SavePlan:
        return self.plan

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        return _whole(self._pieces[write_item.index.fqn]).contiguous()

    def file_numbers(self) -> dict[str, int]:
        """Number (from 1) of the file that takes each tensor's pieces; rank 0, whose pieces are largest, decides."""
        numbers, written = {}, 0
        for name, piece in self._pieces.items():
            numbers[name] = 1 + written // FILE_BYTES
            written += math.prod(piece.shape) * piece.element_size()
        return numbers


class _LoadPlanner(DefaultLoadPlanner):
    """Reads into tensors, and into masters in halves piece by piece: there is never a second copy of the model."""

    def __init__(self, tensors: Mapping[str, Tensor | Master]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._halved = {name: tensor for name, tensor in tensors.items() if isinstance(tensor, Master)}

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        if read_item.dest_index.fqn in self._halved:
            return torch.empty(read_item.lengths, dtype=Master.dtype)
        return super().resolve_tensor(read_item)

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        halved = self._halved.get(read_item.dest_index.fqn)
        if halved is not None:
            place = zip(read_item.dest_offsets, read_item.lengths, strict=True)
            halved.copy_(tensor, at=tuple(slice(begin, begin + length) for begin, length in place))


def _outlined(tensors: Mapping[str, Tensor | Master]) -> dict[str, Tensor]:
    """What DCP makes its plans of."""
    return {name: tensor.outline() if isinstance(tensor, Master) else tensor for name, tensor in tensors.items()}


def _local(tensor: Tensor | Master) -> Tensor | Master:
    """This rank's piece of a tensor, without a graph."""
    if isinstance(tensor, Master):
        return tensor
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _whole(piece: Tensor | Master) -> Tensor:
    return piece.join() if isinstance(piece, Master) else piece


def _is_json(value: Any) -> bool:
    """Would JSON give back just this value?"""
    if isinstance(value, dict):
        return all(isinstance(key, str) and _is_json(item) for key, item in value.items())
    if isinstance(value, list):
        return all(map(_is_json, value))
    return value is None or type(value) in (bool, int, float, str)
