"""Which directories may judge, and what they say of their scores."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import nn

from engine.data.ranked_batch import RankedBatch
from engine.mesh import Runtime
from model.batch import PackedBatch
from model.chat import ChatTemplate
from model.errors import InputError
from model.tokenizer import Tokenizer
from rlhf.ranking_loss import ranking_accuracy
from rlhf.reward_model import open_reward_model, ranking_objective, score_sequences
from tests.rlhf.small_reward import write_small_reward_model, write_small_sft


@pytest.fixture(scope="module")
def reward(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small_reward_model(tmp_path_factory.mktemp("rm") / "rm", mean=-3.5, std=0.25)


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small_sft(tmp_path_factory.mktemp("sft") / "sft")


def test_a_reward_model_is_opened_for_the_model_that_it_was_made_from(reward: Path, policy: Path) -> None:
    tokenizer = Tokenizer.load(policy)
    template = ChatTemplate.of(tokenizer)
    opened = open_reward_model(reward, tokenizer, template)
    assert (opened.mean, opened.std, opened.config.head) == (-3.5, 0.25, "score")
    raw = torch.tensor([-3.5, -3.25, -4.0])
    assert opened.normalise(raw).tolist() == [0.0, 1.0, -2.0]
    alone = open_reward_model(reward)
    assert alone.template.source == template.source and alone.tokenizer.fingerprint == tokenizer.fingerprint


def test_scores_of_a_model_that_was_not_normalised_stay_as_they_are(tmp_path: Path) -> None:
    opened = open_reward_model(write_small_reward_model(tmp_path / "rm"))
    assert opened.normalise(torch.tensor([0.5, -2.0])).tolist() == [0.5, -2.0]


def test_a_language_model_is_refused_as_a_reward_model(policy: Path) -> None:
    with pytest.raises(InputError, match=r"as a reward model its head would be random. Train one .* tools/rm.py"):
        open_reward_model(policy)


def test_another_tokenizer_is_refused(reward: Path, tmp_path: Path) -> None:
    other = write_small_sft(tmp_path / "other")
    path = other / "tokenizer_config.json"
    path.write_text(path.read_text().replace('"add_bos_token": true', '"add_bos_token": false'))
    tokenizer = Tokenizer.load(other)
    assert tokenizer.fingerprint != Tokenizer.load(reward).fingerprint
    with pytest.raises(InputError, match=r"reads with another tokenizer than .* Train a reward model from the model"):
        open_reward_model(reward, tokenizer, ChatTemplate.of(tokenizer))


def test_another_template_is_refused(reward: Path, policy: Path) -> None:
    tokenizer = Tokenizer.load(policy)
    with pytest.raises(InputError, match=r"was trained with the chat template chimed, but vicuna is in use"):
        open_reward_model(reward, tokenizer, ChatTemplate.named("vicuna", tokenizer))


def test_a_reward_model_that_does_not_know_its_template_is_refused(tmp_path: Path) -> None:
    reward = write_small_reward_model(tmp_path / "rm")
    (reward / "chat_template.jinja").unlink()
    (reward / "tokenizer_config.json").write_text('{"eos_token": "</s>", "bos_token": "<s>"}')
    with pytest.raises(InputError, match=r"stores no chat template, so nobody knows what its scores are of"):
        open_reward_model(reward)


def test_accuracy_is_the_share_of_pairs_in_order_group_by_group() -> None:
    """By hand: of two untied pairs in group 0 one is right; in group 1 there is one, with equal scores."""
    batch = RankedBatch(
        batch=None,  # type: ignore[arg-type]
        ends=torch.zeros(7, dtype=torch.int64),
        groups=torch.tensor([0, 0, 0, 1, 1, -1, -1]),
        grades=torch.tensor([2.0, 1.0, 1.0, 0.0, 3.0, 0.0, 0.0]),
        sequence=torch.arange(7),
        most_responses=3,
    )
    scores = torch.tensor([1.5, 0.5, 2.5, 4.0, 4.0, 9.0, -9.0])
    assert ranking_accuracy(scores, batch).item() == 1 / 2 + 1 / 2


def test_a_score_is_read_at_the_last_token_of_each_answer() -> None:
    """A model gives token t the number t squared / 10; of answers that end at 3 and 7 the second is better."""
    tokens = torch.zeros(9, dtype=torch.int64)
    bounds = torch.tensor([0, 3, 7, 9], dtype=torch.int32)
    batch = RankedBatch(
        batch=PackedBatch(tokens, tokens, bounds, tokens, num_documents=2, max_seqlen=9),
        ends=torch.tensor([2, 6, 0, 0]),
        groups=torch.tensor([0, 0, -1, -1]),
        grades=torch.tensor([1.0, 2.0, 0.0, 0.0]),
        sequence=torch.tensor([1, 0, -1, -1]),
        most_responses=2,
    )

    class Squares(nn.Module):
        def forward(self, of: PackedBatch) -> torch.Tensor:
            return torch.arange(1, len(of.tokens) + 1).float().square() / 10

    loss = ranking_objective("pairwise", margin=0.5, centre=0.25)(Squares(), batch)
    assert loss.reported.item() == pytest.approx(math.log1p(math.exp(0.9 - 4.9)))
    assert loss.total.item() == pytest.approx(math.log1p(math.exp(0.9 - 4.9 + 0.5)) + 0.25 * (0.9 + 4.9) ** 2)
    assert loss.count == 1 and loss.shown is not None
    assert loss.shown.tolist() == pytest.approx([1.0, 4.0])
    alone = Runtime(0, 1, torch.device("cpu"), mesh=None)  # type: ignore[arg-type]
    assert score_sequences(Squares(), [batch], 3, alone).tolist() == pytest.approx([4.9, 0.9, 0.0])
