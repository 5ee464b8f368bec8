"""The job from the command line: what it says, what it leaves, how it ends, and what other numbers of ranks change."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from engine.loggers import read_rows
from model.chat import ChatTemplate
from model.generate import Generator, Request
from model.hf import load_config
from model.tokenizer import Tokenizer
from tests.ranks import PATIENCE
from tests.tools.small_job import checkpoints
from tests.tools.small_ppo import run_ppo, start_ppo, write_small_ppo_job

CLOCK = ("tokens_per_second", "memory_bytes")


def trained(directory: Path) -> list[dict[str, Any]]:
    """Rows of iterations, without what the clock says."""
    return [
        {name: value for name, value in row.items() if name not in CLOCK and not name.startswith("seconds/")}
        for row in read_rows(directory / "metrics.jsonl")
        if "loss" in row
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The job, and its plain run in `run`: four iterations on one process."""
    folder = write_small_ppo_job(tmp_path_factory.mktemp("job"))
    (folder / "said").write_text(run_ppo(folder, "run").stderr, encoding="utf-8")
    return folder


def test_what_is_published_is_an_ordinary_chat_model_without_the_critic(folder: Path) -> None:
    run = folder / "run"
    assert json.loads((run / "MODEL_COMPLETE").read_text())["stage"] == "ppo"
    assert load_config(run) == load_config(folder / "sft")
    tokenizer = Tokenizer.load(run)
    template = ChatTemplate.of(tokenizer)
    assert template is not None and template.name == "chimed"
    (answer,) = Generator.from_directory(run).generate([Request([tokenizer.bos_id, 5])])
    assert answer.ids
    assert (run / "model.safetensors").read_bytes() != (folder / "sft" / "model.safetensors").read_bytes()


def test_held_out_prompts_are_looked_at_before_between_and_at_the_end(folder: Path) -> None:
    looks = [row for row in read_rows(folder / "run" / "metrics.jsonl") if "held_out/reward" in row]
    assert [row["step"] for row in looks] == [0, 2, 4]
    # The reference is the policy itself before the first step: the divergence is 0 to the bit.
    assert (looks[0]["held_out/kl"], looks[0]["held_out/kl_interval"]) == (0.0, 0.0)
    assert {"held_out/reward_interval", "held_out/length", "held_out/truncated"} <= looks[0].keys()


def test_held_out_answers_are_drawn_alike_at_every_look(folder: Path) -> None:
    run_ppo(folder, "still", "--optim.lr", 1e-12)  # fp32 weights of 0.02 do not feel it
    looks = [row for row in read_rows(folder / "still" / "metrics.jsonl") if "held_out/reward" in row]
    assert len({row["held_out/reward"] for row in looks}) == 1 and len(looks) == 3


def test_rows_hold_the_numbers_of_the_field(folder: Path) -> None:
    rows = trained(folder / "run")
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    first = rows[0]
    assert first["objective/kl"] == 0.0 and first["objective/kl_coef"] == 0.05
    named = "objective/reward_mean objective/reward_std objective/score_min objective/kl_per_token objective/entropy"
    named += " policy/approx_kl policy/clip_fraction policy/ratio_mean policy/entropy policy/grad_norm policy/lr"
    named += " value/loss value/clip_fraction value/explained_variance value/grad_norm value/lr values/mean returns/max"
    named += " advantages/min response/length_mean response/length_max response/truncated sampler/logprob_diff_max"
    assert set(named.split()) <= first.keys()
    clock = read_rows(folder / "run" / "metrics.jsonl")[1]
    assert {f"seconds/{phase}" for phase in ("rollout", "score", "logprob", "advantage", "update")} <= clock.keys()
    # Linear to 0 over 4 iterations of 4 steps: the last step lies one interval before it.
    assert [row["policy/lr"] for row in rows] == pytest.approx([1e-3 * left / 16 for left in (13, 9, 5, 1)])


def test_the_table_shows_prompts_and_answers(folder: Path) -> None:
    rows = read_rows(folder / "run" / "samples.jsonl")
    own = [row for row in rows if not row["held_out"]]
    assert [row["step"] for row in own] == [step for step in (1, 2, 3, 4) for _ in range(8)]
    assert own[0]["prompt"][-1]["role"] == "user" and own[0]["end"] in ("stop", "length")
    # Scores are clipped at 5 deviations, and what has no end costs 1.
    docked = [min(max(row["score"], -5), 5) - (row["end"] == "length") for row in own]
    assert [row["reward"] for row in own] == pytest.approx(docked)


def test_iterations_follow_from_epochs_and_prompts(folder: Path) -> None:
    count = int((folder / "said").read_text(encoding="utf-8").partition(" prompts to train on")[0].split()[-1])
    run_ppo(folder, "whole", "--train.steps", "null", "--train.epochs", 2, "--rollout.prompts", 5)
    resolved = yaml.safe_load((folder / "whole" / "config.yaml").read_text())
    assert resolved["train"]["steps"] == -(-2 * count // 5)


def test_the_same_command_goes_on_with_more_iterations_to_the_same_bits(folder: Path) -> None:
    constant = ("--schedule.kind", "constant", "--kl.target", 0.1, "--kl.horizon", 30)
    run_ppo(folder, "whole-6", *constant, "--train.steps", 6)
    run_ppo(folder, "parts", *constant, "--train.steps", 3)
    assert "Resuming parts after iteration 3." in run_ppo(folder, "parts", *constant, "--train.steps", 6).stderr
    assert trained(folder / "parts")[-3:] == trained(folder / "whole-6")[-3:]
    assert len({row["objective/kl_coef"] for row in trained(folder / "parts")}) == 6, "the coefficient moves"
    same = ((folder / name / "model.safetensors").read_bytes() for name in ("parts", "whole-6"))
    assert len(set(same)) == 1


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_on_one_rank_saves_and_stops_all(folder: Path, number: int, code: int) -> None:
    out = folder / f"stopped-{code}"
    running = start_ppo(folder, out.name, "--train.steps", 300, "--checkpoint.every", 0, world=2)
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline and not ((out / "metrics.jsonl").exists() and len(trained(out)) > 2):
        time.sleep(0.05)
    running.signal(1, number)
    ends = running.wait()
    assert [ended.code for ended in ends] == [143, code]  # the other rank was not told which
    done = len(trained(out))
    assert f"saved after iteration {done}." in ends[0].last_line
    assert checkpoints(out) == [f"step-{done:08d}"]


def test_grpo_needs_no_critic_and_takes_a_function(folder: Path) -> None:
    grouped = ("--ppo.advantage", "group", "--rollout.samples", 4, "--reward", "rules:brief", "--kl.place", "loss")
    run_ppo(folder, "grouped", *grouped)
    rows = trained(folder / "grouped")
    assert not any(name.startswith("value") for row in rows for name in row)
    assert all(0 <= row["groups/zero_std"] < 1 for row in rows)
    assert rows[0]["objective/score_mean"] < 0
    said = (folder / "grouped" / "state").rglob("*.safetensors")
    assert all("critic" not in path.name for path in said)


def test_the_first_ratios_are_1_exactly_or_the_difference_is_reported(folder: Path) -> None:
    run_ppo(folder, "recomputed", "--ppo.minibatches", 3)
    assert [row["policy/approx_kl_first"] for row in trained(folder / "recomputed")] == [0.0] * 4
    run_ppo(folder, "sampled", "--ppo.old_logprobs", "rollout", "--train.steps", 1)
    (row,) = trained(folder / "sampled")
    # Half the mean square of rounding in fp32, and no column that would compare the sampler with itself.
    assert row["policy/approx_kl_first"] < (1e-5) ** 2 and "sampler/logprob_diff_max" not in row


def test_pre_training_text_is_read_beside(folder: Path) -> None:
    texts = ("--ptx.coef", 0.5, "--ptx.kind", "conversations", "--ptx.paths", "chats.jsonl")
    run_ppo(folder, "mixed", *texts, "--train.steps", 2)
    losses = [row["ptx/loss"] for row in trained(folder / "mixed")]
    assert losses[1] < losses[0], "what it goes on reading it learns"


@pytest.mark.parametrize(
    ("limit", "found"),
    [
        (("--limits.length", 1), "its answers have"),
        (("--limits.entropy", 100), "nats a token, so that it always says the same"),
    ],
)
def test_a_limit_ends_the_run_with_3_and_keeps_the_last_checkpoint(
    folder: Path, limit: tuple[object, ...], found: str
) -> None:
    out = f"limited-{limit[0]}"
    (ended,) = start_ppo(folder, out, *limit, "--limits.patience", 3, "--checkpoint.every", 1).wait()
    assert ended.code == 3 and found in ended.last_line, ended.stderr
    assert "The last checkpoint is intact." in ended.last_line
    assert checkpoints(folder / out)[-1] == "step-00000002"
    assert not (folder / out / "MODEL_COMPLETE").exists()


def test_steps_that_are_not_finite_end_the_run_with_3(folder: Path) -> None:
    (ended,) = start_ppo(folder, "broken", "--optim.lr", 1e30, "--train.steps", 9).wait()
    assert ended.code == 3 and ended.last_line.startswith(
        "Diverged: 10 steps of the policy model in a row were refused"
    )


@pytest.fixture(scope="module")
def learning(folder: Path) -> dict[str, list[float]]:
    """Mean length of answers over iterations that are rewarded for being brief: three seeds, then 2 and 4 ranks."""
    words = ("--reward", "rules:brief", "--train.steps", 6, "--rollout.prompts", 16, "--eval.fraction", 0)
    words += ("--optim.lr", 3e-3, "--checkpoint.every", 0)
    runs: dict[str, tuple[int, int]] = {"seed 0": (0, 1), "seed 1": (1, 1), "seed 2": (2, 1)}
    runs |= {"2 ranks": (0, 2), "4 ranks": (0, 4)}
    for name, (seed, world) in runs.items():
        run_ppo(folder, name, *words, "--seed", seed, world=world)
    return {name: [row["objective/score_mean"] for row in trained(folder / name)] for name in runs}


def test_curves_on_any_number_of_ranks_stay_within_the_band_of_seeds(learning: dict[str, list[float]]) -> None:
    def distance(one: str, other: str) -> float:
        return max(abs(a - b) for a, b in zip(learning[one], learning[other], strict=True))

    band = min(distance("seed 0", "seed 1"), distance("seed 0", "seed 2"), distance("seed 1", "seed 2"))
    assert distance("seed 0", "2 ranks") <= band and distance("seed 0", "4 ranks") <= band


def test_the_first_iteration_has_the_same_answers_on_any_number_of_ranks(
    folder: Path, learning: dict[str, list[float]]
) -> None:
    tables = [
        [row["answer"] for row in read_rows(folder / name / "samples.jsonl") if row["step"] == 1]
        for name in ("seed 0", "2 ranks", "4 ranks")
    ]
    assert tables[0] == tables[1] == tables[2] and len(tables[0]) == 16
