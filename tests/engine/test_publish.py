"""The model at the root of a run directory is whole, of one version, and marked so; or it is refused."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor

from engine.agreement import ControlGroup
from engine.publish import MODEL_COMPLETE, PUBLISHING, gather_full, publish, require_model
from model.errors import InputError
from tests.engine.kill import kill_at_touch, run_to_the_end_or_a_kill
from tests.engine.training_state import bits, differences, full_state, mesh_of, sharded
from tests.ranks import run_ranks


def write_one_file_a_tensor(directory: Path, tensors: Iterator[tuple[str, Tensor]]) -> None:
    """A stand-in for the writer of model directories: every file tells which version it is of."""
    names: list[str] = []
    for name, tensor in tensors:
        names.append(f"model-{len(names) + 1:05d}.safetensors")
        save_file({name: tensor}, directory / names[-1])
    (directory / "model.safetensors.index.json").write_text(json.dumps(names))
    (directory / "config.json").write_text("{}")


def publish_version(directory: Path | str, version: int, tensors: int, ranks: ControlGroup | None = None) -> None:
    state = list(full_state(version).items())[:tensors]
    publish(directory, state, write_one_file_a_tensor, ranks or ControlGroup(), step=version, stage="pretrain")


def version_in(directory: Path) -> tuple[int, int]:
    """(version, number of tensors) of the model, every byte of it compared."""
    marker = json.loads((directory / MODEL_COMPLETE).read_text())
    state = list(full_state(marker["step"]).items())
    shards = sorted(directory.glob("model-*.safetensors"))
    assert [shard.name for shard in shards] == json.loads((directory / "model.safetensors.index.json").read_text())
    for shard, (name, expected) in zip(shards, state, strict=False):
        assert bits(load_file(shard)[name]) == bits(expected), f"{shard.name} is of another version"
    return marker["step"], len(shards)


def test_the_model_is_readable_and_lists_its_files(tmp_path: Path) -> None:
    publish_version(tmp_path, 1, tensors=3)
    assert require_model(tmp_path) == tmp_path
    assert version_in(tmp_path) == (1, 3)
    marker = json.loads((tmp_path / MODEL_COMPLETE).read_text())
    assert (marker["step"], marker["stage"]) == (1, "pretrain")
    assert marker["files"] == {
        path.name: path.stat().st_size for path in tmp_path.iterdir() if path != tmp_path / MODEL_COMPLETE
    }


def test_shards_of_an_earlier_larger_model_go_and_other_files_stay(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("{}")
    publish_version(tmp_path, 1, tensors=5)
    publish_version(tmp_path, 2, tensors=2)
    assert version_in(tmp_path) == (2, 2)
    assert (tmp_path / "metrics.jsonl").read_text() == "{}"
    assert not (tmp_path / PUBLISHING).exists()


def test_everything_is_flushed_before_the_old_model_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    publish_version(tmp_path, 1, tensors=2)
    flushed: list[str] = []
    real_fsync, real_unlink = os.fsync, Path.unlink

    def fsync(descriptor: int) -> None:
        flushed.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        real_fsync(descriptor)

    def unlink(self: Path, missing_ok: bool = False) -> None:
        if self.name == MODEL_COMPLETE:
            beside = tmp_path / PUBLISHING
            before.update({str(path): str(path) in flushed for path in [*beside.iterdir(), beside, tmp_path]})
        real_unlink(self, missing_ok)

    before: dict[str, bool] = {}
    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "unlink", unlink)
    publish_version(tmp_path, 2, tensors=2)
    assert len(before) == 6
    assert all(before.values()), before


def test_any_model_directory_will_do_without_a_marker(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert require_model(str(tmp_path)) == tmp_path


def leave_only_state(directory: Path) -> None:
    (directory / "state").mkdir()
    (directory / MODEL_COMPLETE).unlink()


def leave_an_unfinished_swap(directory: Path) -> None:
    (directory / PUBLISHING).mkdir()
    (directory / MODEL_COMPLETE).unlink()


def truncate_a_file(directory: Path) -> None:
    os.truncate(directory / "model-00001.safetensors", 5)


def remove_a_file(directory: Path) -> None:
    (directory / "model-00002.safetensors").unlink()


def garble_the_marker(directory: Path) -> None:
    (directory / MODEL_COMPLETE).write_text("[")


def raise_the_format(directory: Path) -> None:
    marker = directory / MODEL_COMPLETE
    marker.write_text(marker.read_text().replace('"schema": 1', '"schema": 9'))


def remove_the_configuration(directory: Path) -> None:
    (directory / MODEL_COMPLETE).unlink()
    (directory / "config.json").unlink()


@pytest.mark.parametrize(
    ("damage", "found"),
    [
        (leave_only_state, "has not finished writing its model. Resume it with the same command first."),
        (leave_an_unfinished_swap, "has not finished writing its model. Resume it with the same command first."),
        (truncate_a_file, "model-00001.safetensors has 5 bytes where"),
        (remove_a_file, "model-00002.safetensors is missing. Run the same command again"),
        (garble_the_marker, "MODEL_COMPLETE is not readable. Run the same command again"),
        (raise_the_format, "MODEL_COMPLETE is of format 9; this version reads 1"),
        (remove_the_configuration, "holds no config.json"),
        (shutil.rmtree, "there is no such model directory"),
    ],
)
def test_what_is_not_whole_is_refused(tmp_path: Path, damage: Callable[[Path], None], found: str) -> None:
    publish_version(tmp_path, 1, tensors=2)
    damage(tmp_path)
    with pytest.raises(InputError) as caught:
        require_model(tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert found in str(caught.value)


def publish_until_killed(directory: str, touch: int) -> None:
    kill_at_touch(touch, Path(directory))
    publish_version(directory, 2, tensors=2)


@pytest.mark.parametrize("beginning", ["a run", "a folder with a model and no state"])
def test_a_kill_at_every_touch_of_the_disk_leaves_one_version_or_a_refusal(tmp_path: Path, beginning: str) -> None:
    before = tmp_path / "before"
    publish_version(before, 1, tensors=3)
    if beginning == "a run":
        (before / "state").mkdir()
    found: list[tuple[int, int]] = []
    while True:
        directory = tmp_path / f"killed-at-{len(found) + 1}"
        shutil.copytree(before, directory)
        ended = run_to_the_end_or_a_kill(publish_until_killed, str(directory), len(found) + 1)
        try:
            found.append(version_in(require_model(directory)))
        except InputError as error:
            assert "has not finished writing its model" in str(error)
            found.append((0, 0))
        publish_version(directory, 3, tensors=1)
        assert version_in(require_model(directory)) == (3, 1)
        if ended:
            break
    # Old, then for the moments of the swap none, then new.
    assert found == sorted(found, key=[(1, 3), (0, 0), (2, 2)].index)
    assert set(found) == {(1, 3), (0, 0), (2, 2)}


def test_a_swap_that_is_killed_twice_is_still_refused(tmp_path: Path) -> None:
    """The second attempt dies at each of its touches in turn: what says "unfinished" must outlive it."""
    before = tmp_path / "before"
    publish_version(before, 1, tensors=3)
    leave_an_unfinished_swap(before)
    shutil.copy(before / "config.json", before / PUBLISHING)
    touch, ended = 0, False
    while not ended:
        touch += 1
        directory = tmp_path / f"killed-at-{touch}"
        shutil.copytree(before, directory)
        ended = run_to_the_end_or_a_kill(publish_until_killed, str(directory), touch)
        if (directory / MODEL_COMPLETE).exists():
            assert version_in(require_model(directory)) == (2, 2)
        else:
            with pytest.raises(InputError, match="has not finished"):
                require_model(directory)
    assert touch > 15


def gather_everything(replicas: int) -> tuple[list[str], list[str]]:
    """Names and differences on rank 0; elsewhere nothing is kept."""
    state = sharded(full_state(4), mesh_of(replicas))
    gathered = dict(gather_full(state.items()))
    if dist.get_rank() == 0:
        return list(gathered), differences(gathered, 4)
    return list(gathered), [name for name, tensor in gathered.items() if tensor.numel()]


@pytest.mark.parametrize(("world", "replicas"), [(3, 1), (4, 2)])
def test_gathered_tensors_are_those_of_one_process(world: int, replicas: int) -> None:
    for names, wrong in run_ranks(gather_everything, world, replicas):
        assert names == list(full_state(4))
        assert wrong == []


def test_tensors_are_cast_before_they_are_gathered() -> None:
    weight = torch.randn(5, 3, dtype=torch.float64)
    ((name, full),) = gather_full([("weight", torch.nn.Parameter(weight))], torch.bfloat16)
    assert name == "weight"
    assert full.dtype == torch.bfloat16
    assert not full.requires_grad
    assert torch.equal(full, weight.bfloat16())


class _Breaks:
    """Writes a tensor, then fails in the middle of the collectives the others wait in."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def __call__(self, directory: Path, tensors: Iterator[tuple[str, Tensor]]) -> None:
        name, tensor = next(tensors)
        save_file({name: tensor}, directory / "model-00001.safetensors")
        raise self.error


def publish_with_a_failure(directory: str) -> list[tuple[str, str]]:
    ranks = ControlGroup()
    tensors = sharded(full_state(1), mesh_of(1))
    publish(directory, tensors.items(), write_one_file_a_tensor, ranks, step=1, stage="sft")
    raised = []
    for error in (OSError(28, "No space left on device"), KeyError("tokenizer")):
        try:
            publish(directory, tensors.items(), _Breaks(error), ranks, step=2, stage="sft")
        except Exception as caught:
            raised.append((type(caught).__name__, str(caught)))
        # No collective is out of step: the next one brings what it should.
        total = torch.ones(1)
        dist.all_reduce(total)
        assert total.item() == dist.get_world_size()
    return raised


def test_a_writer_that_fails_on_rank_zero_stops_all_ranks_and_spares_the_old_model(tmp_path: Path) -> None:
    first, second = run_ranks(publish_with_a_failure, 2, str(tmp_path))
    refused = f"rank 0 cannot write the model to {tmp_path}: the disk or the quota is full."
    assert first[0] == second[0]
    assert first[0][0] == "InputError"
    assert first[0][1].startswith(refused)
    assert [kind for kind, _ in (first[1], second[1])] == ["KeyError", "RuntimeError"]
    assert version_in(require_model(tmp_path)) == (1, len(full_state(1)))
    assert list((tmp_path / PUBLISHING).iterdir()) == []
