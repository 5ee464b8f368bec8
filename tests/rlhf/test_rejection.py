"""Rejection sampling: the picks are the best, what is trained is what was sampled, and a kill leaves no trace."""

from __future__ import annotations

import dataclasses
import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.conversations import ConversationDataConfig
from engine.data.corpus import open_corpus
from engine.data.preferences import parse_comparison
from engine.data.prepare import prepare
from engine.data.sampled import SampledEncoder, SampledOptions
from engine.data.shards import TRAINED
from engine.loop import EvalConfig
from engine.mesh import stop
from engine.optim import OptimConfig
from engine.sft import SftConfig, SftTrainConfig, sft
from engine.watchdog import Watchdog
from model.chat import ChatTemplate
from model.errors import InputError
from model.tokenizer import Tokenizer
from rlhf.draws import Draws
from rlhf.rejection_config import DrawConfig, HeldOutConfig, RejectionConfig
from rlhf.rejection_job import rejection
from rlhf.selection import SelectConfig
from tests.engine.kill import kill_at_touch, run_to_the_end_or_a_kill
from tests.ranks import PATIENCE, start_ranks
from tests.rlhf.small_rejection import CONTEXT, small_rejection, write_small_rejection
from tests.rlhf.small_reward import write_small_reward_model

ONE_STEP = SftTrainConfig(steps=1, micro_batch_tokens=128, batch_tokens=128)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small_rejection(tmp_path_factory.mktemp("rejection"))


@pytest.fixture(scope="module")
def made(folder: Path) -> Path:
    """Two rounds."""
    rejection(small_rejection(folder, folder / "made"))
    return folder / "made"


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def files(directory: Path) -> dict[str, bytes]:
    """What the rounds computed, by name: samples, picks and models."""
    found = [*directory.glob("rounds/*/*.jsonl"), *directory.glob("**/model.safetensors")]
    return {str(path.relative_to(directory)): path.read_bytes() for path in found}


def test_each_pick_is_the_best_answer_that_its_prompt_ever_got(made: Path) -> None:
    ever: dict[int, list[tuple[float, list[int]]]] = {}
    for number in (1, 2):
        rows = lines(made / f"rounds/{number}/samples.jsonl")
        assert len(rows) == len({row["index"] for row in rows}) == 19 and all(
            len(row["responses"]) == 4 for row in rows
        )
        for row in rows:
            whole = [(one["score"], one["ids"]) for one in row["responses"] if one["is_complete"]]
            ever.setdefault(row["index"], []).extend(whole)
        picks = lines(made / f"rounds/{number}/picks.jsonl")
        assert {pick["index"] for pick in picks} == {index for index, answers in ever.items() if answers}
        for pick in picks:
            best = max(score for score, _ in ever[pick["index"]])
            first = next(ids for score, ids in ever[pick["index"]] if score == best)
            assert (pick["score"], pick["answer_ids"]) == (best, first)
        facts = json.loads((made / f"rounds/{number}/picks.json").read_text())
        assert facts["mean_score_of_picks"] > facts["mean_score"]
    assert facts["picks_of_earlier_rounds"] == sum(pick["round"] == 1 for pick in picks) > 0


def test_the_ids_that_are_trained_are_the_sampled_ones_and_of_them_the_answers_alone(made: Path) -> None:
    corpus = open_corpus([made / "rounds/2/picks"], kind="conversations")
    stored = [corpus.read(int(document)) for document in corpus.documents()]
    picks = lines(made / "rounds/2/picks.jsonl")
    assert len(stored) == len(picks)
    for ids, pick in zip(stored, picks, strict=True):
        assert (ids % TRAINED).tolist() == pick["prompt_ids"] + pick["answer_ids"]
        assert np.flatnonzero(ids >= TRAINED).tolist() == list(range(len(pick["prompt_ids"]), len(ids)))
        end = ChatTemplate.named("chimed", tokenizer := Tokenizer.load(made)).end_ids(tokenizer)
        assert pick["answer_ids"][-1] in end and end[0] not in pick["answer_ids"][:-1]


def test_answers_on_held_out_prompts_score_higher_and_the_interval_is_that_of_their_differences(
    folder: Path, made: Path, capsys: pytest.CaptureFixture
) -> None:
    rejection(small_rejection(folder, made))  # nothing is left to do but to say so
    said = capsys.readouterr().out
    scores = [
        np.array([row["responses"][0]["score"] for row in lines(made / f"rounds/{number}/held_out.jsonl")])
        for number in (0, 2)
    ]
    gain = scores[1] - scores[0]
    half = 1.959964 * gain.std(ddof=1) / len(gain) ** 0.5
    assert f"gain {gain.mean():+.4f} [{gain.mean() - half:+.4f}, {gain.mean() + half:+.4f}] on 5 prompts" in said
    # Five prompts prove little; the samples that were learnt from are many.
    means = [json.loads((made / f"rounds/{number}/picks.json").read_text())["mean_score"] for number in (1, 2)]
    assert means[1] > means[0]


def test_the_model_is_the_last_round_s_with_its_template_and_no_training_state_is_kept(made: Path) -> None:
    marker = json.loads((made / "MODEL_COMPLETE").read_text())
    assert marker["stage"] == "rejection"
    for name in marker["files"]:
        assert (made / name).read_bytes() == (made / "rounds/2/model" / name).read_bytes()
    assert ChatTemplate.of(Tokenizer.load(made)) is not None
    assert not list(made.glob("rounds/*/model/state"))


def test_with_one_answer_a_prompt_it_is_fine_tuning_on_its_own_answers(folder: Path, tmp_path: Path) -> None:
    config = small_rejection(folder, tmp_path / "one", rounds=1, rollout=DrawConfig(samples=1, max_new_tokens=16))
    rejection(config)
    rows = lines(tmp_path / "one/rounds/1/samples.jsonl")
    records = [
        {
            "messages": [*row["prompt"], {"role": "assistant", "content": row["responses"][0]["text"]}],
            "prompt_ids": row["prompt_ids"],
            "answer_ids": row["responses"][0]["ids"],
        }
        for row in rows
        if row["responses"][0]["is_complete"]
    ]
    assert len(records) >= 15
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    tokenizer = Tokenizer.load(folder / "sft")
    encoder = SampledEncoder(ChatTemplate.named("chimed", tokenizer), tokenizer, CONTEXT)
    prepare([tmp_path / "own.jsonl"], encoder, tmp_path / "own", SampledOptions(), workers=1)
    sft(
        SftConfig(
            model=config.model,
            out=str(tmp_path / "sft"),
            train=config.train,
            optim=config.optim,
            schedule=config.schedule,
            eval=EvalConfig(every=0, fraction=0.0),
            log=config.log,
            data=ConversationDataConfig(paths=[str(tmp_path / "own")]),
        )
    )
    assert (tmp_path / "one/model.safetensors").read_bytes() == (tmp_path / "sft/model.safetensors").read_bytes()


def killed_at(config: RejectionConfig, touch: int) -> None:
    kill_at_touch(touch, Path(config.out))
    rejection(config)


def test_killed_again_and_again_it_ends_with_the_files_of_an_unbroken_run(
    folder: Path, made: Path, tmp_path: Path
) -> None:
    config, chance = small_rejection(folder, tmp_path / "killed"), random.Random(0)
    reached: list[int] = []
    while not run_to_the_end_or_a_kill(killed_at, config, chance.randint(20, 300)):
        reached.append(len(list((tmp_path / "killed").glob("rounds/**/*"))))
        assert len(reached) < 30
    assert len(set(reached)) >= 4, f"the kills must fall apart to prove anything: {reached}"
    assert files(tmp_path / "killed") == files(made)


def test_more_rounds_go_on_from_those_that_are_there(folder: Path, made: Path, tmp_path: Path) -> None:
    rejection(small_rejection(folder, tmp_path / "more", rounds=1))
    first = (tmp_path / "more/model.safetensors").read_bytes()
    rejection(small_rejection(folder, tmp_path / "more"))
    assert first == (made / "rounds/1/model/model.safetensors").read_bytes() != files(made)["model.safetensors"]
    assert files(tmp_path / "more") == files(made)


def test_a_finished_run_called_again_says_that_nothing_is_trained(
    folder: Path, made: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = files(made)
    recipe = (made / "config.yaml").read_bytes()
    rejection(small_rejection(folder, made, optim=OptimConfig(lr=1e-3, beta2=0.5)))
    said = capsys.readouterr().err
    assert f"Resuming {made} after round 2. 2 of 2 rounds had been done before: nothing is trained." in said
    assert "optim.beta2 " in said and "-> 0.5.\nIt was not trained with that." in said and "raise --rounds" in said
    assert files(made) == before and (made / "config.yaml").read_bytes() == recipe


def test_two_processes_sample_and_choose_what_one_does(folder: Path, made: Path, tmp_path: Path) -> None:
    config = small_rejection(folder, tmp_path / "two", rounds=1)
    for process in (processes := start_ranks(rejection, 2, config)):
        process.join(PATIENCE)
    assert [process.exitcode for process in processes] == [0, 0]
    for name in ("samples.jsonl", "picks.jsonl"):
        assert lines(tmp_path / f"two/rounds/1/{name}") == lines(made / f"rounds/1/{name}")


def test_a_round_begins_with_the_base_or_with_the_round_before(folder: Path, made: Path, tmp_path: Path) -> None:
    """After one and the same first round, the second model differs by where it began."""
    rejection(small_rejection(folder, tmp_path / "last", begin="last"))
    one, other = files(made), files(tmp_path / "last")
    assert one["rounds/1/model/model.safetensors"] == other["rounds/1/model/model.safetensors"]
    assert one["rounds/2/picks.jsonl"] == other["rounds/2/picks.jsonl"]
    assert one["model.safetensors"] != other["model.safetensors"]


def test_a_reward_model_judges_and_rounds_may_take_other_prompts(folder: Path, tmp_path: Path) -> None:
    write_small_reward_model(tmp_path / "rm", mean=0.5, std=2.0)
    options = DrawConfig(prompts=7, samples=2, max_new_tokens=16)
    config = small_rejection(
        folder,
        tmp_path / "out",
        reward=str(tmp_path / "rm"),
        rollout=options,
        select=SelectConfig(by="top", keep=9),
        train=ONE_STEP,
    )
    rejection(config)
    asked = [{row["index"] for row in lines(tmp_path / f"out/rounds/{number}/samples.jsonl")} for number in (1, 2)]
    assert [len(one) for one in asked] == [7, 7] and not asked[0] & asked[1]
    picks = lines(tmp_path / "out/rounds/2/picks.jsonl")
    scores = [
        one["score"]
        for number in (1, 2)
        for row in lines(tmp_path / f"out/rounds/{number}/samples.jsonl")
        for one in row["responses"]
        if one["is_complete"]
    ]
    assert sorted(pick["score"] for pick in picks) == sorted(scores)[-9:]


def test_a_reward_function_knows_the_records_of_the_prompts(folder: Path, tmp_path: Path) -> None:
    judge = "tests.rlhf.small_rejection:counts_fields"
    rejection(small_rejection(folder, tmp_path / "out", rounds=1, reward=judge, train=ONE_STEP))
    for row in lines(tmp_path / "out/rounds/1/samples.jsonl"):
        assert f"患者{row['responses'][0]['score']:.0f}，" in row["prompt"][0]["content"]


def test_samples_are_graded_comparisons_for_other_jobs(made: Path) -> None:
    rows = lines(made / "rounds/1/samples.jsonl")
    differing = [row for row in rows if len({one["score"] for one in row["responses"]}) > 1]
    differing = [row for row in differing if all(one["text"] for one in row["responses"])]
    assert len(differing) > 5
    for row in differing:
        found = parse_comparison(row)
        assert [vars(message) for message in found.prompt] == row["prompt"]
        assert {tuple(one) for one in found.responses} == {(one["text"], one["score"]) for one in row["responses"]}


def test_the_watchdog_hears_of_every_token_of_a_chunk(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard: Counter[str] = Counter()
    monkeypatch.setattr(Watchdog, "beat", lambda self, doing: heard.update([doing]))
    rejection(small_rejection(folder, tmp_path / "out", rounds=1, train=ONE_STEP))
    drawn = tmp_path / "out/rounds/1/samples.jsonl"
    tokens = sum(len(one["ids"]) for row in lines(drawn) for one in row["responses"])
    sampling = {doing: times for doing, times in heard.items() if doing.startswith("sampling") and str(drawn) in doing}
    assert sum(sampling.values()) == len(sampling) + tokens


def test_other_options_than_the_samples_were_drawn_with_are_refused(folder: Path, made: Path) -> None:
    hot = dataclasses.replace(small_rejection(folder, made).rollout, temperature=0.5)
    with pytest.raises(InputError, match=r"were drawn with rollout\.temperature 1\.0, this command asks for 0\.5\."):
        rejection(small_rejection(folder, made, rollout=hot))
    stop()


def test_an_earlier_run_is_set_aside_when_it_is_not_to_go_on(folder: Path, made: Path, tmp_path: Path) -> None:
    config = small_rejection(folder, tmp_path / "out", rounds=1, train=ONE_STEP)
    rejection(config)
    rejection(dataclasses.replace(config, seed=1, resume="never"))
    assert (tmp_path / "out/replaced-1/rounds/1/picks.jsonl").exists() and (tmp_path / "out/prepared").exists()
    assert (
        files(tmp_path / "out/replaced-1")["rounds/1/samples.jsonl"]
        != (tmp_path / "out/rounds/1/samples.jsonl").read_bytes()
    )


def test_answers_that_never_end_give_nothing_to_choose_unless_that_is_asked_for(folder: Path, tmp_path: Path) -> None:
    cut = {"rollout": DrawConfig(samples=1, max_new_tokens=1), "eval": HeldOutConfig(fraction=0.0)}
    config = small_rejection(folder, tmp_path / "out", rounds=1, model=str(folder / "fresh"), train=ONE_STEP, **cut)
    with pytest.raises(InputError, match=r"none of 24 answers ended by itself.*--select\.truncated true"):
        rejection(config)
    stop()
    rejection(dataclasses.replace(config, resume="never", select=SelectConfig(truncated=True), train=ONE_STEP))
    assert all(len(pick["answer_ids"]) == 1 for pick in lines(tmp_path / "out/rounds/1/picks.jsonl"))


def test_a_dry_run_shows_the_plan_and_a_prompt_and_writes_nothing(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    rejection(small_rejection(folder, tmp_path / "out", dry_run=True))
    shown = capsys.readouterr().out
    assert "memory of a rank" in shown and "2 rounds of 19 prompts x 4 answers of at most 16 tokens" in shown
    assert "患者0，高血压，怎么办？" in shown and not (tmp_path / "out").exists()


@pytest.mark.parametrize(("kept", "chunks"), [(0, 0), (1, 0), (2, 1), (3, 1), (4, 2), (5, 3)])
def test_what_is_no_whole_chunk_is_cut_off(tmp_path: Path, kept: int, chunks: int) -> None:
    """Chunks of two, two and one lines, of which so many are there whole, and a piece of the next."""
    rows = [f'{{"index": {number}}}\n'.encode() for number in range(5)]
    (tmp_path / "samples.jsonl").write_bytes(b"".join(rows[:kept]) + b'{"ind')
    draws = Draws(tmp_path / "samples.jsonl")
    assert draws.resume([2, 2, 1]) == chunks
    assert (tmp_path / "samples.jsonl").read_bytes() == b"".join(rows[: [0, 2, 4, 5][chunks]])
