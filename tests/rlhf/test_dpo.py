"""The loss of preferences against its closed form, and what it says of a model that has not moved."""

from __future__ import annotations

import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from engine.data.ranked_batch import RankedBatch
from model.batch import IGNORE, PackedBatch
from model.config import PRESETS, ModelConfig
from model.errors import InputError
from model.heads import CausalLM, TokenLogprobs
from rlhf.dpo import SHOWN, DpoLossConfig, dpo_objective, extremes, sequence_logprobs

BETA = 0.3
# Of each group: prompt length, then length and grade of each answer.
GROUPS: list = [
    (3, [(2, 2.0), (4, 1.0)]),
    (2, [(5, 0.0), (1, 3.0), (3, 2.0)]),
    (4, [(2, 1.0), (2, 1.0)]),
    (1, [(1, 0), (6, 2)]),
]
T, D = 96, 14


def ranked(groups: list = GROUPS, vocabulary: int = 31, seed: int = 0) -> RankedBatch:
    """Sequences of random ids, with a tail behind them; sequence number n has place n."""
    chance = np.random.default_rng(seed)
    tokens, positions, targets = np.zeros(T, np.int64), np.zeros(T, np.int64), np.full(T, IGNORE)
    bounds, ends, member, grades = [0], [], [], []
    for group, (asked, answers) in enumerate(groups):
        prompt = chance.integers(vocabulary, size=asked)
        for length, grade in answers:
            begin, end = bounds[-1], bounds[-1] + asked + length
            tokens[begin:end] = [*prompt, *chance.integers(vocabulary, size=length)]
            positions[begin:end] = np.arange(end - begin)
            targets[begin + asked - 1 : end - 1] = tokens[begin + asked : end]
            bounds.append(end)
            ends.append(end - 1)
            member.append(group)
            grades.append(grade)
    tail = D - len(ends)
    packed = PackedBatch(
        torch.from_numpy(tokens),
        torch.from_numpy(positions),
        torch.tensor([*bounds, *[T] * (tail + 1)], dtype=torch.int32),
        torch.from_numpy(targets),
        len(ends),
        T,
    )
    return RankedBatch(
        packed,
        torch.tensor(ends + [0] * tail),
        torch.tensor(member + [-1] * tail),
        torch.tensor(grades + [0.0] * tail),
        torch.tensor([*range(len(ends)), *[-1] * tail]),
        3,
    )


def small_model(seed: int) -> CausalLM:
    config: ModelConfig = dataclasses.replace(
        PRESETS["tiny"],
        vocab_size=31,
        hidden_size=16,
        intermediate_size=24,
        num_layers=2,
        num_heads=2,
        num_kv_heads=1,
        head_dim=8,
        max_position_embeddings=T,
    )
    torch.manual_seed(seed)
    model = CausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3)
    return model


class Fixed(nn.Module):
    """Log-probabilities that are given: what a loss makes of them can be worked out by hand."""

    def __init__(self, logprob: Tensor) -> None:
        super().__init__()
        self.given = nn.Parameter(logprob)

    def forward(self, batch: PackedBatch) -> TokenLogprobs:
        logprob = self.given.where(batch.targets != IGNORE, 0.0)
        return TokenLogprobs(logprob, None, logprob)


def by_hand(
    logprob: np.ndarray, reference: np.ndarray, config: DpoLossConfig, groups: list = GROUPS
) -> tuple[float, np.ndarray, dict[str, float]]:
    """Loss, its gradient by each token's log-probability, and what is shown, in float64, pair by pair."""
    sequences, place, begin = [], 0, 0
    by_group = []
    for asked, answers in groups:
        rows = []
        for length, grade in answers:
            own = np.arange(begin + asked - 1, begin + asked + length - 1)
            scale = config.beta / (length if config.per_token else 1)
            known = reference[place] * (length if config.per_token else 1)
            rows.append((grade, scale * (logprob[own].sum() - known), scale, own))
            place, begin = place + 1, begin + asked + length
        by_group.append(rows)
        sequences += rows
    total, gradient, counted = 0.0, np.zeros(len(logprob)), 0
    shown = dict.fromkeys(SHOWN, 0.0)
    e = config.label_smoothing
    for rows in by_group:
        pairs = [(a, b) for a, b in itertools.permutations(rows, 2) if a[0] > b[0]]
        if config.extremes:
            best, worst = max(row[0] for row in rows), min(row[0] for row in rows)
            pairs = [(a, b) for a, b in pairs if a[0] == best and b[0] == worst]
        counted += bool(pairs)
        for a, b in pairs:
            h, w = a[1] - b[1], 1 / len(pairs)
            likely = 1 / (1 + math.exp(-h))
            total += w * (-(1 - e) * math.log(likely) - e * math.log(1 - likely))
            slope = w * (-(1 - e) * (1 - likely) + e * likely)
            np.add.at(gradient, a[3], slope * a[2])
            np.add.at(gradient, b[3], -slope * b[2])
            for name, value in zip(SHOWN, (a[1], b[1], h, float(h > 0)), strict=True):
                shown[name] += w * value
    return total / counted, gradient / counted, {name: value / counted for name, value in shown.items()}


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("only_extremes", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_loss_gradient_and_rewards_are_those_of_the_closed_form(
    smoothing: float, only_extremes: bool, per_token: bool
) -> None:
    config = DpoLossConfig(BETA, label_smoothing=smoothing, extremes=only_extremes, per_token=per_token)
    batch, chance = ranked(), torch.Generator().manual_seed(1)
    logprob = torch.where(batch.batch.targets == IGNORE, 0.0, -3 * torch.rand(T, generator=chance))
    reference = -5 * torch.rand(9, generator=chance)
    model = Fixed(logprob.double())
    loss = dpo_objective(config, reference.double())(model, batch)
    (loss.total / loss.count).backward()
    total, gradient, shown = by_hand(logprob.double().numpy(), reference.double().numpy(), config)
    assert loss.count == 3, "one of the four has a tie alone"
    assert float(loss.reported / loss.count) == pytest.approx(total, rel=1e-12)
    assert model.given.grad is not None
    np.testing.assert_allclose(model.given.grad.numpy(), gradient, rtol=1e-10, atol=1e-15)
    assert loss.shown is not None
    assert dict(zip(SHOWN, (loss.shown / loss.count).tolist(), strict=True)) == pytest.approx(shown, rel=1e-12)


def test_the_hand_numbers_of_one_pair() -> None:
    """beta 0.1, log pi -4 and -6, reference -5 and -5: the rewards are 0.1 and -0.1, the margin 0.2."""
    batch = ranked([(1, [(1, 1.0), (1, 0.0)])])
    logprob = torch.zeros(T, dtype=torch.float64)
    logprob[0], logprob[2] = -4.0, -6.0
    loss = dpo_objective(DpoLossConfig(), torch.tensor([-5.0, -5.0]))(Fixed(logprob), batch)
    assert loss.shown is not None
    assert loss.shown.tolist() == pytest.approx([0.1, -0.1, 0.2, 1.0])
    assert loss.total.item() == pytest.approx(0.598138869381592, rel=1e-9)  # ln(1 + exp(-0.2))


def test_a_model_that_has_not_moved_has_loss_ln_2_and_no_margin_to_the_bit() -> None:
    pairs = [group for group in GROUPS if len(group[1]) == 2]
    for groups, per_token in itertools.product((pairs, GROUPS), (False, True)):
        batch, model = ranked(groups), small_model(0)
        with torch.no_grad():
            reference = sequence_logprobs(model, batch, per_token)
        loss = dpo_objective(DpoLossConfig(BETA, per_token=per_token), reference)(model, batch)
        assert loss.shown is not None and loss.shown[:3].tolist() == [0.0, 0.0, 0.0]
        ln2 = torch.tensor(math.log(2), dtype=torch.float32)
        assert torch.allclose(loss.total / loss.count, ln2, rtol=2**-23, atol=0)
        assert groups is GROUPS or torch.equal(loss.total / loss.count, ln2)


def test_log_probabilities_of_answers_are_sums_of_log_softmax_over_their_own_tokens() -> None:
    batch, model = ranked(), small_model(3)
    found = sequence_logprobs(model, batch).detach()
    means = sequence_logprobs(model, batch, per_token=True).detach()
    begin, place = 0, 0
    for asked, answers in GROUPS:
        for length, _ in answers:
            ids = batch.tokens[begin : begin + asked + length]
            alone = PackedBatch(
                ids, torch.arange(len(ids)), torch.tensor([0, len(ids)], dtype=torch.int32), ids, 1, len(ids)
            )
            hidden = model.model(alone.tokens, alone.positions, alone.layout)
            table = (hidden @ model.head_weight.T).log_softmax(1)
            expected = table[torch.arange(asked - 1, len(ids) - 1), ids[asked:]].sum()
            assert float(found[place]) == pytest.approx(expected.item(), rel=1e-5)
            assert float(means[place]) == pytest.approx(expected.item() / length, rel=1e-5)
            begin, place = begin + asked + length, place + 1
    assert found[place:].tolist() == [0.0] * (D - place)


def test_prompts_and_the_tail_have_no_gradient() -> None:
    batch, model = ranked(), small_model(0)
    kept: list[Tensor] = []
    model.model.register_forward_hook(lambda module, inputs, hidden: (hidden.retain_grad(), kept.append(hidden))[0])
    dpo_objective(DpoLossConfig(BETA), torch.zeros(9))(model, batch).total.backward()
    # A hidden state's gradient comes from the logits over it alone: attention is beneath.
    gradient = kept[0].grad
    assert gradient is not None
    assert (gradient != 0).any(1).tolist() == _compared_targets(batch).tolist()


def _compared_targets(batch: RankedBatch) -> Tensor:
    """Targets of answers that differ in grade from another of their group: all groups but the third."""
    owner = torch.bucketize(torch.arange(T), batch.batch.cu_seqlens[1:].long(), right=True).clamp(max=D - 1)
    return (batch.batch.targets != IGNORE) & (batch.groups[owner] != 2)


def test_the_order_of_two_is_their_pair_and_k_answers_may_be_ranked_as_a_whole() -> None:
    pairs = ranked([group for group in GROUPS if len(group[1]) == 2])
    three, model, reference = ranked(), small_model(5), torch.linspace(-9, -2, 9)
    for kind in ("plackett_luce", "best"):
        whole = dpo_objective(DpoLossConfig(BETA, kind), reference)  # type: ignore[arg-type]
        by_pairs = dpo_objective(DpoLossConfig(BETA), reference)
        torch.testing.assert_close(whole(model, pairs).total, by_pairs(model, pairs).total)
        assert not torch.isclose(whole(model, three).total, by_pairs(model, three).total)


def test_extremes_compare_the_best_of_a_group_with_its_worst() -> None:
    compared = extremes(ranked())
    assert compared.groups[:9].tolist() == [0, 0, 1, 1, -1, 2, 2, 3, 3]


@pytest.mark.parametrize(
    ("config", "complaint"),
    [
        (DpoLossConfig(beta=0), r"--dpo\.beta is 0"),
        (DpoLossConfig(label_smoothing=0.5), r"--dpo\.label_smoothing is 0\.5"),
        (DpoLossConfig(loss="plackett_luce", label_smoothing=0.1), "is of pairs"),
    ],
)
def test_options_that_make_no_sense_are_refused(config: DpoLossConfig, complaint: str) -> None:
    with pytest.raises(InputError, match=complaint):
        config.check()
