"""A damaged checkpoint, or one of another model, is refused before any tensor is touched, with a remedy."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from engine.checkpoint import Checkpointer
from model.errors import InputError
from tests.engine.training_state import bits, blank, differences, full_state, mesh_of, sharded, trainer_state
from tests.ranks import run_ranks

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def shard_of(directory: Path) -> Path:
    return next(directory.glob("*.safetensors"))


def truncate_shard(directory: Path) -> None:
    shard = shard_of(directory)
    shard.write_bytes(shard.read_bytes()[:-1])


def truncate_shard_to_nothing(directory: Path) -> None:
    shard_of(directory).write_bytes(b"")


def lengthen_shard(directory: Path) -> None:
    with open(shard_of(directory), "ab") as file:
        file.write(b"\0")


def remove_shard(directory: Path) -> None:
    shard_of(directory).unlink()


def flip_a_header_bit(directory: Path) -> None:
    shard = shard_of(directory)
    content = bytearray(shard.read_bytes())
    content[content.index(b"weight")] ^= 1
    shard.write_bytes(content)


def break_header_length(directory: Path) -> None:
    shard = shard_of(directory)
    shard.write_bytes(b"\xff" * 8 + shard.read_bytes()[8:])


def break_header_json(directory: Path) -> None:
    shard = shard_of(directory)
    content = shard.read_bytes()
    shard.write_bytes(content[:8] + b"!" + content[9:])


def bring_a_foreign_shard(directory: Path) -> None:
    shard = shard_of(directory)
    shard.with_name("shard-00009-model-00001-of-00001.safetensors").write_bytes(shard.read_bytes())


def take_shard_of_another_step(directory: Path) -> None:
    """Same size, same names; only the values and the places of two tensors differ."""
    shard = shard_of(directory)
    content = shard.read_bytes()
    swapped = content.replace(b'"embedding"', b'"\0"').replace(b'"fewer_rows_than_ranks"', b'"embedding"')
    shard.write_bytes(swapped.replace(b'"\0"', b'"fewer_rows_than_ranks"'))
    assert shard.stat().st_size == len(content)


def edit_trainer(directory: Path) -> None:
    path = directory / "trainer.json"
    path.write_text(path.read_text().replace('"step": 2', '"step": 3'))


def garble_complete(directory: Path) -> None:
    (directory / "COMPLETE").write_text("{")


@pytest.mark.parametrize(
    ("damage", "found"),
    [
        (truncate_shard, "shard-00001-model-00001-of-00001.safetensors has"),
        (truncate_shard_to_nothing, "shard-00001-model-00001-of-00001.safetensors has 0 bytes where"),
        (lengthen_shard, "shard-00001-model-00001-of-00001.safetensors has"),
        (remove_shard, "shard-00001-model-00001-of-00001.safetensors is missing"),
        (flip_a_header_bit, "shard-00001-model-00001-of-00001.safetensors is not the file that was written"),
        (break_header_length, "shard-00001-model-00001-of-00001.safetensors has no safetensors header"),
        (break_header_json, "shard-00001-model-00001-of-00001.safetensors has a header that is not readable"),
        (take_shard_of_another_step, "shard-00001-model-00001-of-00001.safetensors is not the file that was written"),
        (bring_a_foreign_shard, "shard-00009-model-00001-of-00001.safetensors does not belong to this checkpoint"),
        (edit_trainer, "trainer.json is not the file that was written"),
        (garble_complete, "COMPLETE is not readable"),
    ],
)
def test_damage_is_named_and_the_previous_checkpoint_offered(
    tmp_path: Path, damage: Callable[[Path], None], found: str
) -> None:
    checkpointer = Checkpointer(tmp_path)
    for step in (1, 2):
        checkpointer.save(step, full_state(step), trainer_state(step))
    directory = checkpointer.directory(2)
    damage(directory)
    state = blank(None)
    before = {name: bits(tensor) for name, tensor in state.items()}
    with pytest.raises(InputError) as caught:
        checkpointer.load(2, state)
    assert found in str(caught.value)
    assert str(directory) in str(caught.value)
    assert f"Delete {directory} and run the same command to go on from step 1." in str(caught.value)
    assert {name: bits(tensor) for name, tensor in state.items()} == before, "a tensor was touched"
    checkpointer.load(1, state)
    assert differences(state, 1) == []


def test_the_remedy_without_an_earlier_checkpoint_is_to_begin_again(tmp_path: Path) -> None:
    checkpointer = Checkpointer(tmp_path)
    checkpointer.save(2, full_state(2), {})
    truncate_shard(checkpointer.directory(2))
    with pytest.raises(InputError, match="to begin again"):
        checkpointer.load(2, blank(None))


@pytest.mark.parametrize("schema", ["engine.checkpoint.TRAINER_SCHEMA", "engine.manifest.SCHEMA"])
def test_a_later_format_is_refused_and_nobody_is_told_to_delete_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, schema: str
) -> None:
    checkpointer = Checkpointer(tmp_path)
    monkeypatch.setattr(schema, 2)
    checkpointer.save(1, full_state(1), {})
    monkeypatch.undo()
    with pytest.raises(InputError, match="is of format 2; this version reads 1") as caught:
        checkpointer.load(1, blank(None))
    assert "Delete" not in str(caught.value)


def wider(state: dict[str, Tensor]) -> None:
    state["weight"] = torch.zeros(7, 6)


def deeper(state: dict[str, Tensor]) -> None:
    state["layers.1.weight"] = torch.zeros(3)


def shallower(state: dict[str, Tensor]) -> None:
    del state["half"]


def other_precision(state: dict[str, Tensor]) -> None:
    state["half"] = state["half"].float()


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (wider, "weight is F32 [7, 5] in it and F32 [7, 6] in this run"),
        (deeper, "layers.1.weight is absent in it and F32 [3] in this run"),
        (shallower, "half is BF16 [6] in it and absent in this run"),
        (other_precision, "half is BF16 [6] in it and F32 [6] in this run"),
    ],
)
def test_a_checkpoint_of_another_model_is_refused(
    tmp_path: Path, change: Callable[[dict[str, Tensor]], None], found: str
) -> None:
    checkpointer = Checkpointer(tmp_path)
    checkpointer.save(1, full_state(1), {})
    state = blank(None)
    change(state)
    with pytest.raises(InputError) as caught:
        checkpointer.load(1, state)
    assert "this checkpoint is of another model: " + found in str(caught.value)


def load_where_only_rank_one_sees_damage(run_dir: str) -> str:
    import engine.checkpoint

    mesh = mesh_of(1)
    checkpointer = Checkpointer(run_dir)
    checkpointer.save(1, sharded(full_state(1), mesh), {})
    if checkpointer._ranks.rank == 1:
        engine.checkpoint.check_manifest = refuse
    with pytest.raises(InputError) as caught:
        checkpointer.load(1, blank(mesh))
    return str(caught.value)


def refuse(directory: Path) -> None:
    from engine.manifest import DamagedFile

    raise DamagedFile(f"{directory}/x is missing")


def test_damage_that_one_rank_sees_stops_all_ranks(tmp_path: Path) -> None:
    messages = run_ranks(load_where_only_rank_one_sees_damage, 3, str(tmp_path))
    assert len(set(messages)) == 1
    assert "x is missing" in messages[0]


def look_from_another_filesystem(run_dir: str) -> str:
    checkpointer = Checkpointer(run_dir)
    checkpointer.save(1, {"weight": torch.zeros(3)}, {})
    if checkpointer._ranks.rank == 1:
        checkpointer.state_dir = Path(run_dir) / "elsewhere"
    with pytest.raises(InputError) as caught:
        checkpointer.latest()
    return str(caught.value)


def test_a_checkpoint_that_one_rank_cannot_see_stops_all_ranks(tmp_path: Path) -> None:
    messages = run_ranks(look_from_another_filesystem, 2, str(tmp_path))
    assert len(set(messages)) == 1
    assert "rank 1 does not see this checkpoint" in messages[0]


def save_on_two_filesystems(run_dir: str) -> str:
    mesh = mesh_of(1)
    checkpointer = Checkpointer(run_dir)
    rank = checkpointer._ranks.rank
    checkpointer.state_dir = Path(run_dir) / f"node{rank}" / "state"
    with pytest.raises(InputError) as caught:
        checkpointer.save(1, sharded(full_state(1), mesh), {})
    assert checkpointer.steps() == []
    return str(caught.value)


def test_ranks_that_write_to_separate_filesystems_are_found_out_at_the_first_save(tmp_path: Path) -> None:
    messages = run_ranks(save_on_two_filesystems, 2, str(tmp_path))
    assert len(set(messages)) == 1
    assert "pieces of" in messages[0]
    assert "put --out on a shared one" in messages[0]


def test_manifest_lists_every_file(tmp_path: Path) -> None:
    checkpointer = Checkpointer(tmp_path)
    checkpointer.save(7, full_state(7), {})
    directory = checkpointer.directory(7)
    manifest = json.loads((directory / "COMPLETE").read_text())
    assert (manifest["step"], manifest["world_size"]) == (7, 1)
    sizes = {name: facts["bytes"] for name, facts in manifest["files"].items()}
    assert sizes == {path.name: path.stat().st_size for path in directory.iterdir() if path.name != "COMPLETE"}
