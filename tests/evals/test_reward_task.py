"""Rewards of answers, and one model's against another's."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from engine.model_directory import ModelDirectory
from evals.preview import describe
from evals.respondent import ModelRespondent
from evals.reward import RewardTask, build, win_rate
from evals.suite import BuildContext, parse_spec
from evals.task import Answer, Answered, Item, Result
from model.chat import Message
from model.errors import InputError
from tests.evals.stubs import always, ask, guessing, text_of
from tests.tools.small_chat import write_small_chat_model

QUESTIONS = [f"问题{number}？" for number in range(1, 9)]


class LengthJudge:
    """Likes long answers. calls: what it was given."""

    fingerprint = "judge of the tests"

    def __init__(self) -> None:
        self.calls: list[list[tuple[tuple[Message, ...], str]]] = []

    def __call__(self, pairs: Sequence[tuple[tuple[Message, ...], str]]) -> list[float]:
        self.calls.append(list(pairs))
        return [float(len(answer)) for _, answer in pairs]


def reward_task(
    tmp_path: Path, options: str = "", context: BuildContext | None = None, lines: Sequence[object] | None = None
) -> RewardTask:
    path = tmp_path / "prompts.jsonl"
    rows = lines or [{"prompt": question} for question in QUESTIONS]
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    context = context or BuildContext("chat", judge=LengthJudge())
    found = build(parse_spec(f"reward={path}{options and ','}{options}"), context)
    assert isinstance(found, RewardTask)
    return found


def test_the_same_answer_has_the_same_reward_everywhere(tmp_path: Path) -> None:
    result = ask(reward_task(tmp_path), always(text="请多休息。"))
    reward, tokens, ends = result.metrics
    assert (reward.value, reward.low, reward.high, reward.n) == (5, 5, 5, 8)
    assert (tokens.name, tokens.value, ends.name, ends.value) == ("tokens", 6, "end_rate", 1)
    assert {item.answer for item in result.items} == {"请多休息。"}


def test_guesses_have_the_mean_reward_of_what_they_say(tmp_path: Path) -> None:
    rows = [{"prompt": f"问题{number}？"} for number in range(400)]
    result = ask(reward_task(tmp_path, lines=rows), guessing(sayings=("一", "一二三")))
    assert result.metrics[0].value == pytest.approx(2, abs=4 / math.sqrt(400))
    low, high = result.metrics[0].low, result.metrics[0].high
    assert low is not None and high is not None
    # A mean of 400 coins of 1 and 3 lies within 1.96 standard errors of 1/20.
    assert high - low == pytest.approx(2 * 1.96 / 20, rel=0.05)


def test_the_judge_hears_the_conversation_and_the_answer_without_its_end(tmp_path: Path) -> None:
    judge = LengthJudge()
    rows = [
        {
            "messages": [
                {"role": "user", "content": "一"},
                {"role": "assistant", "content": "二"},
                {"role": "user", "content": "三"},
                {"role": "assistant", "content": "四"},
            ]
        }
    ]
    ask(reward_task(tmp_path, "system=你是医生。", BuildContext("plain", judge=judge), rows), always(text="好"))
    [[(messages, answer)]] = judge.calls
    assert [(one.role, one.content) for one in messages] == [
        ("system", "你是医生。"), ("user", "一"), ("assistant", "二"), ("user", "三"),
    ]  # fmt: skip
    assert answer == "好"


def test_a_plain_prompt_writes_the_turns_down(tmp_path: Path) -> None:
    rows = [
        {
            "messages": [
                {"role": "user", "content": "一"},
                {"role": "assistant", "content": "二"},
                {"role": "user", "content": "三"},
            ]
        }
    ]
    task = reward_task(tmp_path, "system=你是医生。", BuildContext("plain", judge=LengthJudge()), rows)
    [request] = task.requests()
    assert isinstance(request, Answer)
    assert request.prompt == "你是医生。\n\n问：一\n答：二\n问：三\n答："
    assert request.sampling.stop == ["\n问："]


def test_sampling_is_as_asked_and_greedy_unless_asked(tmp_path: Path) -> None:
    [request, *_] = reward_task(tmp_path).requests()
    assert isinstance(request, Answer) and request.sampling.temperature == 0 and text_of(request.prompt) == "问题1？"
    [request, *_] = reward_task(tmp_path, "temperature=0.7,top_p=0.9,max_new_tokens=64").requests()
    assert isinstance(request, Answer)
    assert (request.sampling.temperature, request.sampling.top_p, request.sampling.max_new_tokens) == (0.7, 0.9, 64)


def test_results_are_computed_from_kept_responses_with_a_judge_and_nothing_else(tmp_path: Path) -> None:
    task = reward_task(tmp_path)
    responses = {request.id: Answered("好" * int(request.id), "stop", 3) for request in task.requests()}
    assert task.result(responses) == task.result(responses)
    assert [item.parts["reward"][0] for item in task.result(responses).items] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert task.settings["reward_model"] == "judge of the tests"


def test_answers_without_end_and_without_words_show(tmp_path: Path) -> None:
    task = reward_task(tmp_path)
    responses = {request.id: Answered("" if request.id < "3" else "好", "length", 9) for request in task.requests()}
    result = task.result(responses)
    assert result.counts == {"empty_answers": 2}
    assert result.metrics[2].value == 0


def test_records_without_a_prompt_are_counted(tmp_path: Path) -> None:
    result = ask(reward_task(tmp_path, lines=[{"prompt": "一？"}, {"other": 1}, {"prompt": "二？"}]), always())
    assert result.counts["refused_records"] == 1 and [item.id for item in result.items] == ["1", "3"]


def test_without_a_reward_model_there_is_nobody_to_judge(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"^--tasks reward: there is nobody to judge\. Name a reward model with"):
        reward_task(tmp_path, context=BuildContext("chat"))


def result_of(rewards: Sequence[float], lengths: Sequence[float], answers: Sequence[str] | str) -> Result:
    """answers: one each, or a letter that makes them distinct."""
    if isinstance(answers, str):
        answers = [f"{answers}{place}" for place in range(len(rewards))]
    rows = zip(rewards, lengths, answers, strict=True)
    items = (
        Item(str(place), {"reward": (reward, 1.0), "tokens": (length, 1.0)}, f"question {place}", answer, "")
        for place, (reward, length, answer) in enumerate(rows)
    )
    return Result((), tuple(items))


def test_a_win_rate_worked_by_hand() -> None:
    a = result_of([1.0, 0.0, 2.0, 0.5, 3.0], [10, 10, 20, 100, 7], "a")
    b = result_of([0.0, 1.0, 2.005, 0.0, 3.0], [10, 30, 20, 95, 9], "b")
    found = win_rate(a, b)
    assert (found.wins, found.ties, found.losses, found.unpaired) == (2, 2, 1, 0)
    assert found.rate.value == pytest.approx((2 + 2 / 2) / 5)
    assert found.longer.value == pytest.approx((0 - 20 + 0 + 5 - 2) / 5)
    # Nearly equal: 10 and 10, 20 and 20, 100 and 95; won, alike, won.
    assert found.near == 3 and found.rate_near.value == pytest.approx(2.5 / 3)


def test_answers_that_say_the_same_are_alike_whatever_rounding_gave_them() -> None:
    a, b = result_of([1.0, 2.0], [5, 5], ["好", "行"]), result_of([1.5, 1.0], [5, 5], ["好", "否"])
    found = win_rate(a, b)
    assert (found.wins, found.ties, found.losses) == (1, 1, 0)


def test_swapping_the_models_mirrors_everything() -> None:
    rng = np.random.default_rng(0)
    a = result_of(rng.normal(size=200).tolist(), rng.integers(5, 90, 200).tolist(), "a")
    b = result_of(rng.normal(size=200).tolist(), rng.integers(5, 90, 200).tolist(), "b")
    one, other = win_rate(a, b), win_rate(b, a)
    assert (one.wins, one.ties, one.losses) == (other.losses, other.ties, other.wins)
    assert one.rate.value + other.rate.value == pytest.approx(1)
    assert (one.rate.low, one.rate.high) == pytest.approx((1 - other.rate.high, 1 - other.rate.low))
    assert one.longer.value == pytest.approx(-other.longer.value)
    assert one.rate.low < 0.5 < one.rate.high


def test_a_prompt_that_is_asked_ten_times_tells_no_more_than_once() -> None:
    a, b = result_of([1.0, 0.0, 1.0, 2.0] * 10, [5, 6, 7, 8] * 10, "a"), result_of([0.5] * 40, [5] * 40, "b")
    often = [
        dataclasses.replace(
            result,
            items=tuple(
                dataclasses.replace(item, shown=f"question {place % 4}") for place, item in enumerate(result.items)
            ),
        )
        for result in (a, b)
    ]
    once = [dataclasses.replace(result, items=result.items[:4]) for result in (a, b)]
    ten, one = win_rate(*often), win_rate(*once)
    for found, wanted in ((ten.rate, one.rate), (ten.longer, one.longer)):
        assert tuple(found) == pytest.approx(tuple(wanted))
    assert (ten.wins, one.wins) == (30, 3)


def test_without_ties_the_interval_is_wilsons() -> None:
    wins = result_of([1.0] * 30 + [-1.0] * 10, [5] * 40, "a")
    found = win_rate(wins, result_of([0.0] * 40, [5] * 40, "b"))
    # 30 of 40: (p + z^2 / 2n -+ z sqrt(p q / n + z^2 / 4n^2)) / (1 + z^2 / n), by hand.
    z, n, p = 1.959964, 40, 0.75
    half = z * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    expected = [(p + z**2 / (2 * n) + sign * half) / (1 + z**2 / n) for sign in (-1, 1)]
    assert [found.rate.low, found.rate.high] == pytest.approx(expected, abs=0.005)


def test_prompts_that_one_model_was_not_asked_are_no_pairs() -> None:
    found = win_rate(result_of([1.0, 1.0, 1.0], [5, 5, 5], "a"), result_of([0.0], [5], "b"))
    assert (found.wins, found.unpaired) == (1, 2)
    nothing = win_rate(result_of([], [], "a"), result_of([0.0], [5], "b"))
    assert (nothing.wins, nothing.near, nothing.unpaired) == (0, 0, 1) and math.isnan(nothing.rate.value)


def test_fields_are_named_in_the_word_of_the_task(tmp_path: Path) -> None:
    rows = [{"题目": "一？", "解": "好"}]
    with pytest.raises(InputError, match=r"Say which field asks with user=FIELD, or leave the file out\.$"):
        reward_task(tmp_path, lines=rows)
    assert text_of(reward_task(tmp_path, "user=题目", lines=rows).requests()[0].prompt) == "一？"  # type: ignore[union-attr]


def test_looking_ahead_does_not_wake_the_reward_model(tmp_path: Path) -> None:
    judge = LengthJudge()
    directory = ModelDirectory.open(str(write_small_chat_model(tmp_path / "model")))
    respondent = ModelRespondent(directory, device="cpu")
    lines = list(describe(respondent, {"reward": reward_task(tmp_path, context=BuildContext("chat", judge=judge))}))
    assert any("问题1？" in line for line in lines) and judge.calls == []
