"""The reward-model job: a planted reward is found, scores are normalised, and transformers agrees."""

from __future__ import annotations

import dataclasses
import itertools
import json
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.building import find_trained
from engine.data.groups import PreferenceSet
from engine.job import StepShape, TrainConfig, resolve_shape
from engine.loggers import LogConfig, read_rows
from engine.loop import CheckpointConfig, EvalConfig
from engine.mesh import ParallelConfig, start, stop
from engine.optim import OptimConfig
from engine.preferences import PreferenceDataConfig, open_preferences
from model.chat import ChatTemplate, Message
from model.errors import InputError
from model.heads import ScalarModel
from model.hf import load_config, read_model
from model.tokenizer import Tokenizer
from rlhf.comparison_job import open_comparisons
from rlhf.reward_job import LossConfig, RmConfig, padding_id, rm
from rlhf.reward_model import open_reward_model
from rlhf.reward_scores import HeldOut, NormaliseConfig
from tests.engine.random_kills import check_that_kills_leave_no_trace
from tests.ranks import PATIENCE, start_ranks
from tests.rlhf.planted import write_comparisons
from tests.rlhf.small_reward import write_small_sft

CONTEXT = 64


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small SFT model, comparisons to train on by number of answers, and held-out ones."""
    folder = tmp_path_factory.mktemp("planted")
    write_small_sft(folder / "sft", CONTEXT)
    write_comparisons(folder / "held.jsonl", 100, 4, first=10_000)
    for answers in (2, 4):
        write_comparisons(folder / f"{answers}.jsonl", 100, answers)
    return folder


def recipe(folder: Path, out: Path, answers: int = 4, epochs: float = 1.0, seed: int = 0, **changes: Any) -> RmConfig:
    return RmConfig(
        **{
            "model": str(folder / "sft"),
            "out": str(out),
            "seed": seed,
            "data": PreferenceDataConfig(paths=[str(folder / f"{answers}.jsonl")], workers=1),
            "train": TrainConfig(epochs=epochs, micro_batch_tokens=512, batch_tokens=1024),
            "optim": OptimConfig(lr=3e-3),
            "eval": EvalConfig(data=[str(folder / "held.jsonl")], every=0),
            "log": LogConfig(tensorboard=False, curves=False),
            **changes,
        }
    )


def trained(config: RmConfig) -> dict[str, Any]:
    """The report of a run."""
    rm(config)
    report: dict[str, Any] = json.loads((Path(config.out) / "report.json").read_text())
    return report


@pytest.fixture(scope="module")
def made(folder: Path) -> Path:
    """A trained reward model."""
    trained(recipe(folder, folder / "rm"))
    return folder / "rm"


def test_a_planted_reward_is_found_sooner_with_more_answers_a_prompt(folder: Path, tmp_path: Path) -> None:
    """100 prompts, two seeds: four answers teach more than two, and more than two seen twice (as many steps)."""

    def accuracies(answers: int, epochs: float) -> list[float]:
        out = tmp_path / f"{answers}-{epochs}"
        configs = (recipe(folder, out / str(seed), answers, epochs, seed) for seed in range(2))
        reports = [trained(config) for config in configs]
        # The rule knows nothing of length.
        assert all(report["longer_wins"][1] < 0.5 < report["longer_wins"][2] for report in reports)
        return [report["accuracy"][0] for report in reports]

    four, two, twice = accuracies(4, 1.0), accuracies(2, 1.0), accuracies(2, 2.0)
    assert min(four) > 0.9 > max(two) > 0.7
    assert statistics.mean(four) > statistics.mean(twice)


def scorer(directory: Path) -> Any:
    """transformers' model of a directory."""
    from transformers import AutoModelForSequenceClassification
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    return AutoModelForSequenceClassification.from_pretrained(
        directory, attn_implementation="eager", dtype=torch.float32
    ).eval()


def written(directory: Path, file: Path) -> tuple[list[Tensor], list[float]]:
    """The ids of all answers of a file with their prompts, in the directory's template, and their grades."""
    tokenizer = Tokenizer.load(directory)
    template = ChatTemplate.of(tokenizer)
    assert template is not None
    ids, grades = [], []
    for row in map(json.loads, file.read_text().splitlines()):
        for answer in row["responses"]:
            conversation = [Message("user", row["prompt"]), Message("assistant", answer["text"])]
            ids.append(torch.tensor(template.encode(tokenizer, conversation).ids))
            grades.append(answer["score"])
    return ids, grades


@torch.no_grad()
def test_transformers_gives_the_scores_that_the_directory_is_normalised_by(folder: Path, made: Path) -> None:
    """Alone and padded; and the best held-out answers, as it scores them, have mean 0 and deviation 1 then."""
    theirs, opened = scorer(made), open_reward_model(made)
    ids, grades = written(made, folder / "held.jsonl")
    alone = torch.cat([theirs(row[None]).logits[0] for row in ids])
    padded = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=theirs.config.pad_token_id)
    mask = torch.arange(padded.shape[1]) < torch.tensor([[len(row)] for row in ids])
    together = theirs(padded, attention_mask=mask.long()).logits[:, 0]
    assert len({len(row) for row in ids}) >= 10 and (alone - together).abs().max() < 1e-5

    from transformers import AutoTokenizer

    row = json.loads((folder / "held.jsonl").read_text().splitlines()[0])
    said = [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["responses"][0]["text"]}]
    inputs = AutoTokenizer.from_pretrained(made).apply_chat_template(said, return_tensors="pt", return_dict=True)
    normalised = (theirs(**inputs).logits[0, 0] - theirs.config.score_mean) / theirs.config.score_std
    assert normalised.item() == pytest.approx(opened.normalise(alone[0]).item(), abs=1e-5)

    best = [max(range(4), key=lambda place: grades[first + place]) + first for first in range(0, 400, 4)]
    scores = opened.normalise(alone[best].double())
    assert abs(scores.mean()) < 1e-5 and abs(scores.std(correction=0) - 1) < 1e-5
    right = [
        (alone[i] > alone[j]).item()
        for first in range(0, 400, 4)
        for i, j in itertools.permutations(range(first, first + 4), 2)
        if grades[i] > grades[j]
    ]
    report = json.loads((made / "report.json").read_text())
    assert report["pairs"] == len(right) and report["accuracy"][0] == pytest.approx(statistics.mean(right))


def test_conversations_can_be_what_scores_are_normalised_by(folder: Path, tmp_path: Path) -> None:
    """Each is read at the end of its last answer; one that was cut to the context has no such end, and no say."""
    chats = [(f"患者{number}，咳嗽，怎么办？", "注意休息，" * (1 + number % 5)) for number in range(30)]
    chats.append(("怎么办？", "注意休息，" * 40))
    rows = [[{"role": "user", "content": asked}, {"role": "assistant", "content": said}] for asked, said in chats]
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps({"messages": row}, ensure_ascii=False) + "\n" for row in rows))
    out = tmp_path / "rm"
    trained(recipe(folder, out, eval=EvalConfig(fraction=0, every=0), normalise=NormaliseConfig(data=[str(path)])))
    tokenizer, theirs = Tokenizer.load(out), scorer(out)
    template = ChatTemplate.of(tokenizer)
    assert template is not None
    ids = [
        template.encode(tokenizer, [Message("user", asked), Message("assistant", said)]).ids for asked, said in chats
    ]
    assert [len(row) > CONTEXT for row in ids] == [False] * 30 + [True]
    with torch.no_grad():
        raw = torch.cat([theirs(torch.tensor([row])).logits[0] for row in ids[:30]])
    scores = open_reward_model(out).normalise(raw.double())
    assert abs(scores.mean()) < 1e-5 and abs(scores.std(correction=0) - 1) < 1e-5
    assert "nobody knows how good the model is" in (out / "report.md").read_text()


def test_a_score_of_one_size_for_all_is_not_normalised(folder: Path) -> None:
    """A reward head of zeros: there is no deviation to divide by, and no directory is made of it."""
    runtime = start(ParallelConfig())
    try:
        config = dataclasses.replace(load_config(folder / "sft"), head="score")
        model = ScalarModel(config)
        for parameter in model.parameters():
            torch.nn.init.constant_(parameter, 0.0)
        held_out = opened_comparisons(folder)
        judge = HeldOut(model, held_out, None, (2,), StepShape(CONTEXT, 512, 2), runtime, 10_000)
        with pytest.raises(InputError, match=r"100 answers to normalise by have scores of mean 0 and deviation 0"):
            judge.normalised(config)
    finally:
        stop()


def opened_comparisons(folder: Path) -> PreferenceSet:
    tokenizer = Tokenizer.load(folder / "sft")
    template = ChatTemplate.of(tokenizer)
    assert template is not None
    paths = [str(folder / "held.jsonl")]
    return open_preferences(PreferenceDataConfig(paths=paths, workers=1), template, tokenizer, CONTEXT, folder)


def test_a_run_without_anything_to_normalise_by_is_refused_before_it_begins(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"With --eval.fraction 0 there are no held-out answers to normalise"):
        rm(recipe(folder, tmp_path / "rm", eval=EvalConfig(fraction=0)))
    one = write_comparisons(tmp_path / "one.jsonl", 1, 2, first=20_000)
    with pytest.raises(InputError, match=r"1 held-out prompts give no mean and deviation"):
        rm(recipe(folder, tmp_path / "rm", eval=EvalConfig(data=[str(one)])))
    stop()
    assert not (tmp_path / "rm" / "state").exists()


def test_two_processes_make_the_model_that_one_makes(folder: Path, made: Path, tmp_path: Path) -> None:
    for process in (processes := start_ranks(rm, 2, recipe(folder, tmp_path / "rm"))):
        process.join(PATIENCE)
    assert [process.exitcode for process in processes] == [0, 0]
    one, two = load_config(made), load_config(tmp_path / "rm")
    assert (two.score_mean, two.score_std) == pytest.approx((one.score_mean, one.score_std), rel=1e-4)
    weights = dict(read_model(made, one))
    assert all(torch.allclose(tensor, weights[name], atol=1e-4) for name, tensor in read_model(tmp_path / "rm", two))
    reports = [json.loads((directory / "report.json").read_text()) for directory in (made, tmp_path / "rm")]
    assert reports[1]["pairs"] == reports[0]["pairs"]
    assert reports[1]["accuracy"] == pytest.approx(reports[0]["accuracy"], abs=0.005)


def test_a_run_killed_at_random_moments_ends_bitwise_as_an_unbroken_one(folder: Path, tmp_path: Path) -> None:
    def config(out: Path) -> RmConfig:
        return recipe(
            folder,
            out,
            train=TrainConfig(steps=40, micro_batch_tokens=512, batch_tokens=1024),
            checkpoint=CheckpointConfig(every=3, keep=2),
            eval=EvalConfig(data=[str(folder / "held.jsonl")], every=20),
        )

    check_that_kills_leave_no_trace(rm, config, tmp_path, world=2, kills=4)
    for name in ("config.json", "report.json", "report.md"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "unbroken" / name).read_bytes()


def test_the_same_command_again_finds_the_run_finished(folder: Path, made: Path, capsys: pytest.CaptureFixture) -> None:
    before = (made / "config.json").read_bytes(), (made / "report.json").read_bytes()
    rm(recipe(folder, made))
    assert ((made / "config.json").read_bytes(), (made / "report.json").read_bytes()) == before
    assert capsys.readouterr().out.startswith("held-out accuracy 9")


def test_a_reward_model_can_be_trained_further(folder: Path, made: Path, tmp_path: Path) -> None:
    """Its head is kept: before the first step it judges as it did."""
    looks = EvalConfig(data=[str(folder / "held.jsonl")], every=1)
    rm(recipe(folder, tmp_path / "more", model=str(made), eval=looks, train=TrainConfig(steps=1)))
    first = read_rows(tmp_path / "more" / "metrics.jsonl")[0]
    last = [row for row in read_rows(made / "metrics.jsonl") if "held_out_accuracy" in row][-1]
    assert first["held_out_accuracy"] == pytest.approx(last["held_out_accuracy"], abs=1e-6)
    assert first["held_out_loss"] == pytest.approx(last["held_out_loss"], abs=1e-6)


def test_metrics_count_prompts_and_show_accuracy(made: Path) -> None:
    rows = read_rows(made / "metrics.jsonl")
    training = [row for row in rows if "loss" in row]
    assert training[-1]["prompts"] >= 100 and "tokens" not in training[-1]
    assert 0.4 < training[0]["accuracy"] < training[-1]["accuracy"] <= 1 + 1e-6
    assert training[-1]["margin"] > training[0]["margin"]
    assert [row for row in rows if "held_out_loss" in row] and not any("perplexity" in row for row in rows)


def test_the_loss_that_is_shown_has_no_margin_and_no_centring(folder: Path, tmp_path: Path) -> None:
    """So that runs with and without them can be compared: before the first step they show the same."""
    options = {"eval": EvalConfig(data=[str(folder / "held.jsonl")], every=1), "train": TrainConfig(steps=1)}
    rm(recipe(folder, tmp_path / "plain", **options))
    rm(recipe(folder, tmp_path / "more", **options, loss=LossConfig(margin=0.5, centre=0.1)))
    plain, more = (read_rows(tmp_path / name / "metrics.jsonl") for name in ("plain", "more"))
    assert (plain[0]["step"], plain[0]["held_out_loss"]) == (0, more[0]["held_out_loss"])
    assert plain[1]["loss"] == more[1]["loss"] and plain[1]["grad_norm"] != more[1]["grad_norm"]


def test_a_dry_run_shows_the_plan_and_the_answers_of_a_prompt(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    rm(recipe(folder, tmp_path / "rm", dry_run=True))
    shown = capsys.readouterr().out
    assert "memory of a rank" in shown and "Learning rate at step 1" in shown
    assert shown.count("⟦") >= 4 and "[human]:患者0，高血压，怎么办？" in shown
    assert not (tmp_path / "rm").exists()


@pytest.mark.parametrize("long_place", [0, 1])
def test_the_best_and_the_worst_answer_of_the_first_group_that_fits_the_context_are_shown_before_a_run(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], long_place: int
) -> None:
    """No answer that is compared is cut: a prompt of which one would be is left out, whichever of them it is."""
    long = ["头晕" if place != long_place else "头晕乏力" * 100 for place in range(2)]
    asked = {"长": [*zip((1.0, 0.0), long, strict=True)]}
    asked |= {"短": [(0.5, "头晕"), (0.0, "乏力"), (1.0, "咳嗽"), (0.25, "发热")], "后": [(1.0, "皮疹"), (0.0, "腹痛")]}
    lines = [
        {"prompt": question, "responses": [{"text": text, "score": grade} for grade, text in answers]}
        for question, answers in asked.items()
    ]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    config = recipe(folder, tmp_path / "rm")
    config.data.paths, config.train = [str(data)], TrainConfig(steps=1, micro_batch_tokens=96, batch_tokens=96)
    config.eval.data, config.eval.fraction = [], 0.0
    base = find_trained(config.model, "tools/sft.py", head=None)
    open_comparisons(config, base, 1e-3, start(ParallelConfig())).describe()
    stop()
    said = capsys.readouterr().err.splitlines()
    at = said.index("The chat template is chimed. A prompt's answers, compared tokens marked:")
    assert said[at + 1 :] == ["1: [human]:短", "[bot]:⟦咳嗽<eos>⟧", "0: [human]:短", "[bot]:⟦乏力<eos>⟧"]


def test_a_micro_batch_holds_the_largest_group_unless_it_is_told_otherwise(folder: Path) -> None:
    config = load_config(folder / "sft")
    assert resolve_shape(TrainConfig(), config, 1, largest=1500) == StepShape(CONTEXT, 1536, 1)
    assert resolve_shape(TrainConfig(), config, 1, largest=300) == StepShape(CONTEXT, 1024, 1)
    assert resolve_shape(TrainConfig(micro_batch_tokens=512), config, 1, largest=1500) == StepShape(CONTEXT, 512, 2)
    wide = dataclasses.replace(config, max_position_embeddings=4096)
    assert resolve_shape(TrainConfig(), wide, 1, largest=9000) == StepShape(4096, 9024, 8)


def test_padding_is_never_what_ends_an_answer(made: Path) -> None:
    """transformers reads the score at the last token that is no padding: an end token must not be one."""
    tokenizer = Tokenizer.load(made)
    assert tokenizer.pad_id is not None and load_config(made).pad_token_id == tokenizer.pad_id
    assert padding_id(tokenizer, (tokenizer.eos_id,)) == tokenizer.pad_id
    assert padding_id(tokenizer, (tokenizer.eos_id, tokenizer.pad_id)) == tokenizer.unk_id
    assert padding_id(tokenizer, (*range(4), 6)) == 4
