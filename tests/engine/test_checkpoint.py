"""What a checkpoint holds comes back bit for bit, on any number of ranks, without a pickle on the way."""

from __future__ import annotations

import json
import os
import pickle
import threading
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import nn

import engine.checkpoint
from engine.checkpoint import Checkpointer
from tests.engine.training_state import blank, differences, full_state, mesh_of, sharded, trainer_state
from tests.ranks import PATIENCE, run_ranks

# pytest takes the place of the filter that the module sets.
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def resume_and_save(run_dir: str, replicas: int, asynchronous: bool, step: int) -> dict:
    """Load the newest checkpoint, look at it, and save the state of `step`."""
    mesh = mesh_of(replicas)
    checkpointer = Checkpointer(run_dir, keep=2, asynchronous=asynchronous)
    seen: dict = {"latest": checkpointer.latest()}
    if seen["latest"] is not None:
        state = blank(mesh)
        seen["trainer"] = checkpointer.load(seen["latest"], state)
        seen["wrong"] = differences(state, seen["latest"])
    state = sharded(full_state(step), mesh)
    checkpointer.save(step, state, trainer_state(step))
    if asynchronous:  # the training goes on; what is being written must not notice
        for tensor in state.values():
            tensor.zero_()
    checkpointer.wait()
    return seen


def test_state_is_bit_equal_across_world_sizes_and_layouts(tmp_path: Path) -> None:
    # (ranks, groups of ranks that each hold everything, asynchronous); 0 ranks: plain python, no torch.distributed
    chain = [(4, 1, False), (2, 1, True), (0, 1, True), (4, 2, True), (3, 1, False)]
    for step, (world, replicas, asynchronous) in enumerate(chain, start=1):
        arguments = (str(tmp_path), replicas, asynchronous, step)
        reports = run_ranks(resume_and_save, world, *arguments) if world else [resume_and_save(*arguments)]
        for seen in reports:
            if step == 1:
                assert seen == {"latest": None}
            else:
                assert seen == {"latest": step - 1, "trainer": trainer_state(step - 1), "wrong": []}
    assert resume_and_save(str(tmp_path), 1, False, 99)["wrong"] == []


def train_with_fsdp(run_dir: str, step: int) -> list[bytes]:
    """One AdamW step on random data under FSDP2, after resuming; returns gathered weights and moments."""
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    mesh = mesh_of(1)
    model = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3, bias=False))
    for layer in model:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.zeros(2, 5)).sum().backward()  # the optimizer makes its moments in a step
    optimizer.step()
    tensors = {}
    for name, parameter in model.named_parameters():
        tensors[f"model.{name}"] = parameter
        tensors |= {f"{kind}.{name}": optimizer.state[parameter][kind] for kind in ("exp_avg", "exp_avg_sq", "step")}
    checkpointer = Checkpointer(run_dir)
    if step:
        checkpointer.load(step, tensors)
    else:
        model(torch.randn(2, 5)).square().sum().backward()
        optimizer.step()
    checkpointer.save(step + 1, tensors, {})
    full = [tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor for tensor in tensors.values()]
    return [tensor.detach().numpy().tobytes() for tensor in full]


def test_fsdp_parameters_and_adam_moments_survive_four_two_one_four(tmp_path: Path) -> None:
    gathered = [run_ranks(train_with_fsdp, world, str(tmp_path), step) for step, world in enumerate([4, 2, 1, 4])]
    first = gathered[0][0]
    assert any(any(tensor) for tensor in first)
    assert all(rank == first for ranks in gathered for rank in ranks)


def test_a_large_state_is_written_in_several_files_a_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine.checkpoint, "FILE_BYTES", 100)
    checkpointer = Checkpointer(tmp_path)
    checkpointer.save(1, full_state(1), {})
    sizes = [path.stat().st_size for path in checkpointer.directory(1).glob("*.safetensors")]
    assert len(sizes) > 3
    state = blank(None)
    checkpointer.load(1, state)
    assert differences(state, 1) == []


def test_no_pickle_is_written(tmp_path: Path) -> None:
    run_ranks(resume_and_save, 2, str(tmp_path), 1, False, 1)
    names = set()
    for path in tmp_path.rglob("*"):
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as shard:
                names |= set(shard.keys())
        elif path.is_file():
            json.loads(path.read_text(encoding="utf-8"))
    assert names == set(full_state(0))


def test_no_pickle_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_ranks(resume_and_save, 2, str(tmp_path), 1, False, 1)

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("something was unpickled")

    for module, name in [(pickle, "load"), (pickle, "loads"), (pickle, "Unpickler"), (torch, "load")]:
        monkeypatch.setattr(module, name, refuse)
    state = blank(None)
    assert Checkpointer(tmp_path).load(1, state) == trainer_state(1)
    assert differences(state, 1) == []


@pytest.mark.parametrize("value", [3, 0.5, "text", [1], None])
def test_anything_but_a_tensor_is_refused_before_writing(tmp_path: Path, value: object) -> None:
    with pytest.raises(AssertionError, match="count"):
        Checkpointer(tmp_path).save(1, {"count": value}, {})  # type: ignore[dict-item]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("value", [(1, 2), {1: 2}, torch.tensor(1), b"bytes", {"deep": [{"er": {1}}]}])
def test_trainer_values_that_json_would_change_are_refused(tmp_path: Path, value: object) -> None:
    with pytest.raises(AssertionError, match=r"trainer\.json"):
        Checkpointer(tmp_path).save(1, full_state(1), {"value": value})


def test_trainer_floats_come_back_exactly(tmp_path: Path) -> None:
    values = [0.1 + 0.2, 1e-320, -0.0, float("inf"), 2**200]
    checkpointer = Checkpointer(tmp_path)
    checkpointer.save(1, {}, {"values": values})
    loaded = checkpointer.load(1, {})["values"]
    assert [repr(value) for value in loaded] == [repr(value) for value in values]


@pytest.mark.parametrize("size", [10, 1_000_003])  # a small file stays in Python's buffer until it is closed
def test_everything_is_flushed_before_complete_appears(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    flushed: dict[str, int] = {}
    real_fsync, real_replace = os.fsync, os.replace

    def fsync(descriptor: int) -> None:
        flushed[os.readlink(f"/proc/self/fd/{descriptor}")] = os.fstat(descriptor).st_size
        real_fsync(descriptor)

    def replace(source: Path, target: Path) -> None:
        flushed[str(target)] = flushed.get(str(source), -1)
        if target.name == "COMPLETE":
            at_complete.update(flushed)
        real_replace(source, target)

    at_complete: dict[str, int] = {}
    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    checkpointer = Checkpointer(tmp_path)
    checkpointer.save(1, {"weight": torch.randn(size)}, {})
    directory = checkpointer.directory(1)
    for path in directory.iterdir():
        assert at_complete[str(path)] == path.stat().st_size, f"{path.name} was not on disk whole"
    assert str(directory.parent) in at_complete
    assert str(directory) in at_complete


def test_the_newest_checkpoints_stay_and_older_ones_go(tmp_path: Path) -> None:
    checkpointer = Checkpointer(tmp_path, keep=2)
    kept = []
    for step in (5, 10, 100_000_000, 100_000_001):
        checkpointer.save(step, full_state(step), {})
        kept.append(checkpointer.steps())
    assert kept == [[5], [5, 10], [10, 100_000_000], [100_000_000, 100_000_001]]
    assert len(list(checkpointer.state_dir.iterdir())) == 2


def test_a_complete_step_is_not_written_again(tmp_path: Path) -> None:
    checkpointer = Checkpointer(tmp_path, keep=1)
    checkpointer.save(1, full_state(1), {"first": True})
    checkpointer.save(1, full_state(2), {"first": False})
    state = blank(None)
    assert checkpointer.load(1, state) == {"first": True}
    assert differences(state, 1) == []


def test_leftovers_are_no_checkpoints_and_go_with_the_next_save(tmp_path: Path) -> None:
    checkpointer = Checkpointer(tmp_path)
    checkpointer.save(1, full_state(1), {})
    torn, going = checkpointer.directory(2), checkpointer.state_dir / "step-00000003.deleted"
    for directory in (torn, going):
        directory.mkdir()
        for path in checkpointer.directory(1).iterdir():
            (directory / path.name).write_bytes(path.read_bytes())
    (torn / "COMPLETE").unlink()
    stranger = checkpointer.state_dir / "notes"
    stranger.mkdir()
    assert checkpointer.latest() == 1
    checkpointer.save(4, full_state(4), {})
    assert sorted(path.name for path in checkpointer.state_dir.iterdir()) == ["notes", "step-00000001", "step-00000004"]


def test_nothing_is_created_by_looking(tmp_path: Path) -> None:
    assert Checkpointer(tmp_path / "run").latest() is None
    assert list(tmp_path.iterdir()) == []


def test_an_asynchronous_save_returns_before_it_is_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    may_finish = threading.Event()
    write_manifest = engine.checkpoint.write_manifest

    def patient(*arguments: object) -> None:
        assert may_finish.wait(PATIENCE)
        write_manifest(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(engine.checkpoint, "write_manifest", patient)
    checkpointer = Checkpointer(tmp_path, asynchronous=True)
    checkpointer.save(1, full_state(1), {})
    assert checkpointer.steps() == []
    may_finish.set()
    checkpointer.save(2, full_state(2), {})
    assert 1 in checkpointer.steps()
    assert checkpointer.latest() == 2


def test_staging_holds_one_copy_however_many_saves(tmp_path: Path) -> None:
    checkpointer = Checkpointer(tmp_path, asynchronous=True)
    pointers = []
    for step in (1, 2, 3):
        checkpointer.save(step, full_state(step), {})
        checkpointer.wait()
        assert checkpointer._staging is not None
        pointers.append({name: buffer.data_ptr() for name, buffer in checkpointer._staging.items()})
    assert pointers[0] == pointers[1] == pointers[2]
    state = blank(None)
    checkpointer.load(3, state)
    assert differences(state, 3) == []
