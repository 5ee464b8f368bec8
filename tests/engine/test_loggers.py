"""metrics.jsonl across a kill and a resume, and what is drawn from it."""

from __future__ import annotations

import dataclasses
import json
import warnings
from pathlib import Path

import pytest

from engine import loggers
from engine.corpora import DataConfig
from engine.job import TrainConfig
from engine.loggers import LogConfig, RunLog, draw_curves, read_rows
from engine.loop import CheckpointConfig, EvalConfig
from engine.metrics import Speedometer
from engine.optim import OptimConfig
from engine.pretraining import PretrainConfig, pretrain
from tests.small_base import write_small_base, write_small_data

PLAIN = LogConfig(tensorboard=False, curves=False)


def test_a_resumed_run_drops_what_its_checkpoint_does_not_know(tmp_path: Path) -> None:
    log = RunLog(tmp_path, 0, PLAIN, PLAIN)
    for step in range(1, 6):
        log.record(step, {"loss": 1.0 / step})
        if step == 4:
            log.record(step, {"held_out_loss": 0.5})
    log.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "los')  # cut short by a kill
    RunLog(tmp_path, 4, PLAIN, PLAIN).close()
    # The evaluation after step 4 comes after the save of step 4, so the resumed run repeats it.
    assert read_rows(tmp_path / "metrics.jsonl") == [{"step": step, "loss": 1.0 / step} for step in (1, 2, 3, 4)]


def test_ranks_other_than_the_first_write_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    log = RunLog(tmp_path, 0, LogConfig(), PLAIN)
    log.record(1, {"loss": 1.0})
    log.say("hello")
    log.draw()
    log.close()
    assert list(tmp_path.iterdir()) == []


def test_a_run_draws_its_curves_at_every_save_and_the_last_time_when_all_is_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[tuple[int, bool]] = []

    def draw(metrics: Path, *_: object) -> None:
        last = read_rows(metrics)[-1]
        drawn.append((last["step"], "held_out_loss" in last))

    monkeypatch.setattr(loggers, "draw_curves", draw)
    pretrain(
        PretrainConfig(
            model=str(write_small_base(tmp_path / "base")),
            out=str(tmp_path / "out"),
            data=DataConfig(paths=[str(write_small_data(tmp_path / "data.jsonl"))], workers=1),
            train=TrainConfig(steps=4, micro_batch_tokens=64, batch_tokens=64),
            checkpoint=CheckpointConfig(every=2),
            eval=EvalConfig(every=4, fraction=0.1),
            log=LogConfig(tensorboard=False),
        )
    )
    assert drawn == [(2, False), (4, True)]


def test_a_finished_run_called_again_says_that_nothing_is_trained_and_keeps_its_recipe(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = PretrainConfig(
        model=str(write_small_base(tmp_path / "base")),
        out=str(tmp_path / "out"),
        data=DataConfig(paths=[str(write_small_data(tmp_path / "data.jsonl"))], workers=1),
        train=TrainConfig(steps=2, micro_batch_tokens=64, batch_tokens=64),
        optim=OptimConfig(lr=1e-3),
        log=PLAIN,
    )
    pretrain(config)
    kept = {name: (tmp_path / "out" / name).read_bytes() for name in ("config.yaml", "model.safetensors")}
    assert "had been done before" not in capsys.readouterr().err

    over = f"Resuming {tmp_path / 'out'} after step 2. 2 of 2 steps had been done before: nothing is trained."
    pretrain(config)
    said = capsys.readouterr().err
    assert over in said and "Changed since" not in said

    pretrain(dataclasses.replace(config, optim=OptimConfig(lr=2e-3)))
    said = capsys.readouterr().err
    assert over in said
    assert (
        "Changed since this run began: optim.lr 0.001 -> 0.002.\nIt was not trained with that. Use --resume never to "
        "begin anew, another --out for a new run, or raise --train.steps to go on.\n" in said
    )
    assert {name: (tmp_path / "out" / name).read_bytes() for name in kept} == kept

    train = dataclasses.replace(config.train, steps=3)
    pretrain(dataclasses.replace(config, train=train, optim=OptimConfig(lr=2e-3)))
    said = capsys.readouterr().err
    assert "nothing is trained" not in said and "It was not trained" not in said
    assert (tmp_path / "out" / "model.safetensors").read_bytes() != kept["model.safetensors"]
    assert "lr: 0.002" in (tmp_path / "out" / "config.yaml").read_text()


def test_curves_are_drawn_from_rows_with_and_without_losses(tmp_path: Path) -> None:
    log = RunLog(tmp_path, 0, PLAIN, PLAIN)
    log.record(1, {"loss": 2.0, "lr": 0.1, "grad_norm": 1.0, "tokens_per_second": 10.0, "mfu": None})
    log.record(1, {"held_out_loss": 2.1})
    log.close()
    draw_curves(tmp_path / "metrics.jsonl", tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("norms", [[0.0], [0.0, 0.0], [0.0, 2.0], [None, None], []])
def test_gradients_of_nothing_are_drawn_without_a_warning(tmp_path: Path, norms: list[float | None]) -> None:
    """As where all answers are worth the same: a logarithmic scale has no place for 0."""
    rows = [{"step": step, "loss": 1.0, "grad_norm": norm} for step, norm in enumerate(norms, 1)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        draw_curves(tmp_path / "metrics.jsonl", tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_tensorboard_events_hold_the_numbers(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = RunLog(tmp_path, 0, LogConfig(curves=False), PLAIN)
    for step in (1, 2, 3):
        log.record(step, {"loss": 4.0 / step, "mfu": None})
    log.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [
        (1, 4.0),
        (2, 2.0),
        (3, pytest.approx(4 / 3)),
    ]


def test_speed_counts_laps_and_leaves_out_the_first_and_what_is_excluded(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr("engine.metrics.time.perf_counter", lambda: clock[0])
    speedometer = Speedometer(flops_per_token=50.0, peak=1000.0, world=2)
    clock[0] = 100.0  # the first step warms up
    speedometer.lap(10, 0.0, clock[0])
    for _ in range(3):
        clock[0] += 7.0  # an evaluation
        speedometer.restart()
        clock[0] += 2.0
        finished_at = clock[0]
        clock[0] += 1.0  # the numbers are read while the next step runs
        speed = speedometer.lap(40, 0.5, finished_at)
    assert (speed.tokens_per_second, speed.mfu, speed.data_wait_share, speed.seconds_a_step) == (20.0, 0.5, 0.25, 2.0)
    assert speedometer.average() == speed
