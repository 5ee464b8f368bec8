"""How a run ends before its end, and how it goes on: signals, divergence, other numbers of processes."""

from __future__ import annotations

import functools
import json
import os
import signal
import time
from pathlib import Path

import pytest
import torch
from torch import nn

import engine.pretraining
from engine.step import Loss, Objective
from model.batch import PackedBatch
from tests.ranks import PATIENCE
from tests.small_base import write_small_data
from tests.tools.in_child import Running
from tests.tools.small_job import (
    checkpoints,
    held_out_losses,
    losses,
    pretrain,
    rows,
    start_pretraining,
    weights,
    write_small_job,
)

STEPS = 60


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small_job(tmp_path_factory.mktemp("job"))


@pytest.fixture(scope="module")
def unbroken(folder: Path) -> Path:
    """A run of two processes that nobody disturbs."""
    pretrain(folder, "unbroken", "--train.steps", STEPS, "--checkpoint.every", 0, world=2)
    return folder / "unbroken"


def contents(directory: Path, *names: str) -> dict[str, bytes]:
    """Files of a directory, by path below it; of the folders named, all that is in them."""
    listed = [path for name in names for path in [directory / name, *(directory / name).rglob("*")] if path.is_file()]
    return {str(path.relative_to(directory)): path.read_bytes() for path in listed}


def wait_for_steps(running: Running, directory: Path, count: int) -> None:
    """Until so many steps are in metrics.jsonl."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline and all(process.is_alive() for process in running.processes):
        if (directory / "metrics.jsonl").exists() and len(losses(directory)) >= count:
            return
        time.sleep(0.02)
    raise AssertionError(f"the run never came to step {count}: {running.stderr()}")


def hold_in_step(step: int, until: str) -> None:
    """Have a run of two micro-batches a step wait in a step until there is a file: it cannot end before."""
    make, calls = engine.pretraining.next_token_loss, 0

    def make_held(z_loss: float) -> Objective:
        objective = make(z_loss)

        def held(model: nn.Module, batch: PackedBatch) -> Loss:
            nonlocal calls
            calls += torch.is_grad_enabled()
            while calls >= 2 * step and not Path(until).exists():
                time.sleep(0.01)
            return objective(model, batch)

        return held

    engine.pretraining.next_token_loss = make_held  # type: ignore[assignment]


@pytest.mark.parametrize(
    ("number", "rank", "codes"),
    [
        (signal.SIGTERM, 1, [143, 143]),
        (signal.SIGUSR1, 0, [143, 143]),
        (signal.SIGINT, 0, [130, 143]),  # the rank that was interrupted says so
    ],
    ids=["SIGTERM", "SIGUSR1", "SIGINT"],
)
def test_a_signal_to_one_rank_saves_and_the_same_command_ends_bitwise_as_unbroken(
    folder: Path, unbroken: Path, number: int, rank: int, codes: list[int]
) -> None:
    name = signal.Signals(number).name
    command = ("--train.steps", STEPS, "--checkpoint.every", 0)
    before = functools.partial(hold_in_step, STEPS // 2, f"{name}-sent")
    running = start_pretraining(folder, name, *command, world=2, before=before)
    wait_for_steps(running, folder / name, 4)
    running.signal(rank, number)
    (folder / f"{name}-sent").touch()
    ends = running.wait()
    assert [ended.code for ended in ends] == codes
    (saved,) = checkpoints(folder / name)
    step = int(saved.removeprefix("step-"))
    assert 4 <= step < STEPS
    assert ends[0].last_line == f"Stopped by a signal; saved after step {step}. The same command goes on from there."
    assert "Traceback" not in ends[0].stderr + ends[1].stderr
    assert not (folder / name / "MODEL_COMPLETE").exists()

    said = pretrain(folder, name, *command, world=2).stderr
    assert f"Resuming {name} after step {step}." in said
    assert rows(folder / name) == rows(unbroken)
    assert weights(folder / name) == weights(unbroken)


def test_the_number_of_processes_may_change_from_run_to_run(folder: Path) -> None:
    # A constant rate, so that a run of fewer steps is the beginning of a run of more.
    constant = ("--schedule.kind", "constant", "--schedule.warmup_steps", 3, "--train.batch_tokens", 320)
    pretrain(folder, "alone", *constant, "--train.steps", 24)
    for world, steps in ((2, 8), (1, 16), (3, 24)):
        pretrain(folder, "moving", *constant, "--train.steps", steps, world=world)
    assert losses(folder / "moving") == pytest.approx(losses(folder / "alone"), rel=1e-5)
    last = ("state", "step-00000024", "trainer.json")
    moved, alone = (json.loads(folder.joinpath(out, *last).read_text())["trainer"] for out in ("moving", "alone"))
    assert moved["cursor"] == alone["cursor"]
    assert moved["progress"]["tokens"] == alone["progress"]["tokens"]
    assert moved["cursor"]["epoch"] == 0 and moved["cursor"]["packs"] == 24 * 5


def test_a_run_that_diverges_ends_with_code_3_and_its_last_checkpoint_stays(folder: Path) -> None:
    pretrain(folder, "wild", "--train.steps", 4)
    before = contents(folder / "wild", "state", "model.safetensors", "MODEL_COMPLETE")
    absurd = ("--train.steps", 40, "--optim.lr", 1e6, "--guard.settle_steps", 4, "--guard.max_in_a_row", 3)
    (ended,) = start_pretraining(folder, "wild", *absurd, "--checkpoint.every", 0).wait()
    assert ended.code == 3
    assert ended.last_line.startswith("Diverged at step ")
    assert "3 steps in a row were refused" in ended.last_line
    assert "Lower --optim.lr" in ended.last_line
    assert ended.last_line.endswith("The last checkpoint is intact.")
    assert "Traceback" not in ended.stderr
    assert [row["skipped"] for row in rows(folder / "wild") if "loss" in row][-3:] == [1, 2, 3]
    assert contents(folder / "wild", *before) == before
    said = pretrain(folder, "wild", "--train.steps", 6, "--optim.lr", 1e-3).stderr
    assert "Resuming wild after step 4." in said


def spoil_one_step(step: int, rank: int) -> None:
    """Have this rank's loss be NaN once: in the first micro-batch of a step."""
    make = engine.pretraining.next_token_loss
    calls = 0

    def make_spoiled(z_loss: float) -> Objective:
        objective = make(z_loss)

        def spoiled(model: nn.Module, batch: PackedBatch) -> Loss:
            nonlocal calls
            loss = objective(model, batch)
            if not torch.is_grad_enabled() or int(os.environ.get("RANK", "0")) != rank:
                return loss
            calls += 1
            is_bad = calls == 2 * step - 1  # two micro-batches a step
            return loss._replace(total=loss.total * float("nan")) if is_bad else loss

        return spoiled

    engine.pretraining.next_token_loss = make_spoiled  # type: ignore[assignment]


def test_one_nan_on_one_rank_is_skipped_by_all_and_counted(folder: Path) -> None:
    said = pretrain(folder, "nan", "--train.steps", 6, world=2, before=functools.partial(spoil_one_step, 3, 1)).stderr
    assert [row["skipped"] for row in rows(folder / "nan") if "loss" in row] == [0, 0, 1, 1, 1, 1]
    assert said.count("skipped: loss") == 1 and "step 3 skipped: " in said and "(1 skipped so far)" in said
    assert all(loss == loss for loss in losses(folder / "nan"))
    seen = held_out_losses(folder / "nan")
    assert seen[6] < seen[0]
    # A refused step changes nothing: step 4 sees the weights that step 3 saw.
    pretrain(folder, "whole", "--train.steps", 6, world=2)
    assert losses(folder / "nan")[:3] == losses(folder / "whole")[:3]
    assert losses(folder / "nan")[3] != losses(folder / "whole")[3]


def test_resume_never_begins_again_and_sets_the_old_run_aside(folder: Path) -> None:
    pretrain(folder, "run")
    old = contents(folder / "run", "state", "metrics.jsonl", "model.safetensors", "MODEL_COMPLETE")
    said = pretrain(folder, "run", "--resume", "never", "--seed", 7).stderr
    assert "The earlier run is now in run/replaced-1." in said
    assert "Resuming" not in said
    assert contents(folder / "run" / "replaced-1", *old) == old
    pretrain(folder, "other-seed", "--seed", 7)
    assert rows(folder / "run") == rows(folder / "other-seed")
    assert weights(folder / "run") == weights(folder / "other-seed")
    assert checkpoints(folder / "run") == ["step-00000002", "step-00000004"]
    # What was set aside is a run like any other.
    assert "Resuming run/replaced-1 after step 4." in pretrain(folder, "run/replaced-1").stderr


def test_a_new_beginning_that_is_refused_leaves_the_old_run_whole(folder: Path) -> None:
    """Also where the run has trained a tokenizer of its own, which a new beginning trains anew."""
    fresh = ("--model", "tiny", "--train.context", 32, "--train.steps", 2)
    pretrain(folder, "fresh", *fresh)
    old = contents(folder / "fresh", ".")
    again = (*fresh, "--resume", "never", "--data", "data.jsonl", "more.jsonl")
    write_small_data(folder / "more.jsonl", 600)
    (ended,) = start_pretraining(folder, "fresh", *again, "--train.batch_tokens", 640_000).wait()
    assert ended.code == 2, ended.stderr
    assert contents(folder / "fresh", *old) == old

    pretrain(folder, "fresh", *again)
    new, aside = folder / "fresh", folder / "fresh" / "replaced-1"
    assert (aside / "tokenizer" / "tokenizer.model").read_bytes() == old["tokenizer/tokenizer.model"]
    assert (new / "tokenizer" / "tokenizer.model").read_bytes() == (new / "tokenizer.model").read_bytes()
    assert (new / "tokenizer.model").read_bytes() != old["tokenizer.model"]
    assert not (new / "tokenizer-new").exists()
    assert "Resuming fresh/replaced-1 after step 2." in pretrain(folder, "fresh/replaced-1", *fresh).stderr
