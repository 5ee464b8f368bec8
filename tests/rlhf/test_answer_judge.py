"""A reward model that judges texts says what it says of one sequence alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from model.batch import PackedBatch
from model.chat import ChatTemplate, Message
from model.errors import InputError
from model.heads import ScalarModel
from model.hf import load_config, read_model
from model.tokenizer import Tokenizer
from rlhf import answer_judge
from rlhf.answer_judge import AnswerJudge
from tests.ranks import run_ranks
from tests.rlhf.small_reward import write_small_reward_model, write_small_sft

MEAN, STD, CONTEXT = 0.25, 1.5, 64
ANSWERS = [
    ((Message("user", "头晕怎么办？"),), "注意休息。"),
    ((Message("system", "你是医生。"), Message("user", "咳嗽？")), ""),
    ((Message("user", "头晕，" * 40),), "低盐饮食，按时服药。"),  # longer than the context
    ((Message("user", "发热怎么办？"), Message("assistant", "多喝水。"), Message("user", "还有呢？")), "定期复查"),
] * 3


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small_reward_model(tmp_path_factory.mktemp("judge") / "judge", MEAN, STD)


def judge_on_rank(directory: Path) -> list[float]:
    return AnswerJudge(directory, torch.device("cpu"), torch.float32)(ANSWERS)


def test_a_reward_is_the_normalised_score_at_the_end_token(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answer_judge, "_TOKENS", 100)  # several passes
    config, tokenizer = load_config(directory, "score"), Tokenizer.load(directory)
    model, template = ScalarModel(config), ChatTemplate.of(tokenizer)
    assert template is not None
    model.load_state_dict(dict(read_model(directory, config)))
    for (messages, text), reward in zip(ANSWERS, judge_on_rank(directory), strict=True):
        ids = template.encode(tokenizer, [*messages, Message("assistant", text)]).ids[-CONTEXT:]
        assert ids[-1] == tokenizer.eos_id
        bounds = torch.tensor([0, len(ids)], dtype=torch.int32)
        batch = PackedBatch(torch.tensor(ids), torch.arange(len(ids)), bounds, torch.tensor(ids), 1, len(ids))
        score = model(batch)[-1].item()
        assert reward == pytest.approx((score - MEAN) / STD, abs=1e-5)


def test_any_number_of_ranks_says_the_same(directory: Path) -> None:
    first, second = run_ranks(judge_on_rank, 2, directory)
    assert first == second == pytest.approx(judge_on_rank(directory), abs=1e-5)
    assert AnswerJudge(directory, torch.device("cpu"), torch.float32)([]) == []


def test_a_language_model_judges_nothing(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="as a reward model its head would be random"):
        AnswerJudge(write_small_sft(tmp_path / "sft"), torch.device("cpu"), torch.float32)
