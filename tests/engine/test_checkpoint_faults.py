"""A save that fails, on any rank and for any reason, is one error on all ranks and harms no earlier checkpoint."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import resource
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.metadata import Metadata

import engine.checkpoint
from engine.checkpoint import Checkpointer
from engine.files import human_size
from engine.manifest import state_bytes
from model.errors import InputError
from tests.engine.training_state import blank, differences, full_state, mesh_of, sharded
from tests.ranks import run_ranks

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

# Each fault lasts for one save and is set up in the rank that shall fail.


def full_device(patch: pytest.MonkeyPatch) -> None:
    """Shards are written to a device on which the kernel reports that no space is left."""

    @contextlib.contextmanager
    def create_stream(self: FileSystem, path: str, mode: str) -> Iterator:
        with open("/dev/full", mode) as stream:
            yield stream

    patch.setattr(FileSystem, "create_stream", create_stream)


def file_size_limit(patch: pytest.MonkeyPatch) -> None:
    """The kernel cuts off this process's files at 100 bytes."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def no_files_left(patch: pytest.MonkeyPatch) -> None:
    """This process may open no further file."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))


def storage_error_at_the_manifest(patch: pytest.MonkeyPatch) -> None:
    def write_manifest(directory: Path, step: int, world: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(directory / "COMPLETE"))

    patch.setattr(engine.checkpoint, "write_manifest", write_manifest)


def no_memory_for_the_copy(patch: pytest.MonkeyPatch) -> None:
    def piece_of(tensor: Tensor) -> Tensor:
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    patch.setattr(engine.checkpoint, "_local", piece_of)


def mistake_of_ours(patch: pytest.MonkeyPatch) -> None:
    def resolve_data(self: object, write_item: object) -> Tensor:
        raise KeyError("weight")

    patch.setattr(engine.checkpoint._SavePlanner, "resolve_data", resolve_data)


# fault, the rank that it meets, what the error says
REFUSALS: list[tuple[Callable[[pytest.MonkeyPatch], None], int, str]] = [
    (full_device, 1, "rank 1 cannot write {}: the disk or the quota is full. Free some space"),
    (full_device, 0, "rank 0 cannot write {}: the disk or the quota is full. Free some space"),
    (file_size_limit, 1, "rank 1 cannot write {}: File too large"),
    (no_files_left, 1, "rank 1 cannot write {}: Too many open files"),
    (no_memory_for_the_copy, 1, "rank 1 cannot write {}: Cannot allocate memory"),
    (storage_error_at_the_manifest, 0, "rank 0 cannot write {}: Input/output error"),
]


def save_under_a_fault(
    run_dir: Path, fault: Callable[[pytest.MonkeyPatch], None], failing: int, asynchronous: bool
) -> tuple[str, str]:
    """Save step 1, then step 2 under the fault, then step 3 in health; returns what step 2 raised."""
    mesh = mesh_of(1)
    checkpointer = Checkpointer(run_dir, asynchronous=asynchronous)
    checkpointer.save(1, sharded(full_state(1), mesh), {})
    checkpointer.wait()
    state = sharded(full_state(2), mesh)
    limits = {kind: resource.getrlimit(kind) for kind in (resource.RLIMIT_FSIZE, resource.RLIMIT_NOFILE)}
    raised = ("nothing", "")
    with pytest.MonkeyPatch.context() as patch:
        if dist.get_rank() == failing:
            fault(patch)
        try:
            checkpointer.save(2, state, {})
            checkpointer.wait()
        except Exception as error:
            raised = (type(error).__name__, str(error))
        for kind, limit in limits.items():
            resource.setrlimit(kind, limit)

    assert checkpointer.latest() == 1
    state = blank(mesh)
    checkpointer.load(1, state)
    assert differences(state, 1) == []
    if raised[0] == "InputError":
        assert [path.name for path in checkpointer.state_dir.iterdir()] == ["step-00000001"], "the torn save is there"
    dist.barrier()
    checkpointer.save(3, sharded(full_state(3), mesh), {})
    assert checkpointer.latest() == 3
    assert sorted(path.name for path in checkpointer.state_dir.iterdir()) == ["step-00000001", "step-00000003"]
    return raised


def save_under_every_fault(run_dir: str, asynchronous: bool) -> list[tuple[str, str]]:
    faults = [(fault, failing) for fault, failing, _ in REFUSALS] + [(mistake_of_ours, 1)]
    return [
        save_under_a_fault(Path(run_dir, f"{fault.__name__}{failing}"), fault, failing, asynchronous)
        for fault, failing in faults
    ]


@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
def test_a_failing_write_is_one_error_on_every_rank(tmp_path: Path, asynchronous: bool) -> None:
    first, second = run_ranks(save_under_every_fault, 2, str(tmp_path), asynchronous)
    size = human_size(state_bytes(full_state(2)))
    for (fault, failing, found), on_first, on_second in zip(REFUSALS, first, second, strict=False):
        assert on_first == on_second, fault.__name__
        kind, message = on_first
        directory = tmp_path / f"{fault.__name__}{failing}" / "state" / "step-00000002"
        assert kind == "InputError", fault.__name__
        assert message.startswith(found.format(f"{directory} ({size})"))
        assert message.endswith("The checkpoint of step 1 is intact.")
    # A mistake of ours keeps its kind, and its traceback, where it happened.
    assert second[-1] == ("KeyError", "'weight'")
    assert first[-1][0] == "RuntimeError"
    assert first[-1][1].startswith("rank 1 failed to write")


def save_below_a_file(run_dir: str) -> str:
    mesh = mesh_of(1)
    with pytest.raises(InputError) as caught:
        Checkpointer(run_dir).save(1, sharded(full_state(1), mesh), {})
    return str(caught.value)


def test_a_run_directory_that_cannot_be_made_is_one_sentence_on_every_rank(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    messages = run_ranks(save_below_a_file, 2, str(tmp_path / "file" / "run"))
    assert messages[0] == messages[1]
    assert "a file stands where a directory is needed" in messages[0]
    assert "choose another --out" in messages[0]


def save_on_a_full_disk(where: str) -> str | None:
    """Mount a small filesystem that only this process sees, and fill it with a second checkpoint."""
    libc = ctypes.CDLL(None, use_errno=True)
    new_mounts, private = 0x00020000, 0x00040000 | 0x4000
    if libc.unshare(new_mounts) or libc.mount(b"none", b"/", None, private, None):
        return None
    if libc.mount(b"tmpfs", where.encode(), b"tmpfs", 0, b"size=256k"):
        return None
    checkpointer = Checkpointer(where)
    checkpointer.save(1, {"weight": torch.ones(40_000)}, {})
    with pytest.raises(InputError) as caught:
        checkpointer.save(2, {"weight": torch.ones(40_000)}, {})
    state = {"weight": torch.zeros(40_000)}
    checkpointer.load(1, state)
    assert state["weight"].eq(1).all()
    assert checkpointer.steps() == [1]
    return str(caught.value)


def test_a_full_disk_is_said_and_the_last_checkpoint_stays(tmp_path: Path) -> None:
    (message,) = run_ranks(save_on_a_full_disk, 1, str(tmp_path))
    if message is None:
        pytest.skip("mounting a filesystem is not permitted here")
    assert "the disk or the quota is full" in message
    assert message.endswith("The checkpoint of step 1 is intact.")


def test_a_shard_that_is_short_when_reopened_never_becomes_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_written = engine.checkpoint.check_written

    def lose_a_byte(directory: Path, planned: Metadata) -> None:
        (shard,) = directory.glob("*.safetensors")
        os.truncate(shard, shard.stat().st_size - 1)
        check_written(directory, planned)

    monkeypatch.setattr(engine.checkpoint, "check_written", lose_a_byte)
    checkpointer = Checkpointer(tmp_path)
    with pytest.raises(InputError, match="bytes where its header tells of"):
        checkpointer.save(1, full_state(1), {})
    assert list(checkpointer.state_dir.iterdir()) == []


def test_an_asynchronous_failure_is_raised_once_by_the_next_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpointer = Checkpointer(tmp_path, asynchronous=True)
    checkpointer.save(1, full_state(1), {})
    checkpointer.wait()
    monkeypatch.setattr(FileSystem, "create_stream", refuse)
    checkpointer.save(2, full_state(2), {})
    with pytest.raises(InputError, match="the disk or the quota is full"):
        checkpointer.save(3, full_state(3), {})
    assert checkpointer.latest() == 1
    monkeypatch.undo()
    checkpointer.save(3, full_state(3), {})
    assert checkpointer.latest() == 3


def refuse(self: FileSystem, path: str, mode: str) -> None:
    raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))
