"""Sampling: random numbers word for word, tokens against the softmax, and rows that mind their own business."""

from __future__ import annotations

import math
from itertools import combinations

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import opcheck

from kernels import backend, linear_logprob
from kernels import sample as sampling
from kernels.backend import launch
from kernels.sample import GROUP, sample
from tests.kernels.faces import DEVICE, each_face, faces, triton_face
from tests.kernels.oracle import assert_faithful, random

EPS = torch.finfo(torch.float32).eps
STEP = torch.tensor(5, device=DEVICE)
NO_LOGIT = float("-inf")


def seeds(rows: int, first: int = 0) -> Tensor:
    return torch.arange(first, first + rows, device=DEVICE)


# The random numbers.


@triton.jit
def _exponential_kernel(high_ptr, low_ptr, noise_ptr, BLOCK: tl.constexpr):
    lane = tl.arange(0, BLOCK)
    tl.store(noise_ptr + lane, sampling._exponential(tl.load(high_ptr + lane), tl.load(low_ptr + lane)))


@each_face
def test_noise_is_finite_and_fine_to_its_ends(face: str) -> None:
    """u = 1 - (j + 1/2) / 2^52 has E = -log u, for j from 0 to the last."""
    j = [0, 1, 2, 1000, 2**20, 2**29, 2**30 + 1, 2**44, 2**51, 2**51 - 1, 2**52 - 3, 2**52 - 1]
    k = [2**52 - 1 - below for below in j]
    truth = [-math.log1p(-((below + 0.5) / 2**52)) for below in j]
    high, low = torch.tensor(k, device=DEVICE) >> 20, (torch.tensor(k, device=DEVICE) << 12) & 0xFFFFFFFF
    if face == "torch":
        noise = sampling.exponential(high, low)
    else:
        high, low = (torch.nn.functional.pad(x, (0, 4)).to(torch.uint32) for x in (high, low))
        noise = high.new_empty(16, dtype=torch.float32)
        launch(_exponential_kernel, (1,), high, low, noise, BLOCK=16)
    torch.testing.assert_close(noise[:12].double().cpu(), torch.tensor(truth, dtype=torch.float64), rtol=EPS, atol=0)
    assert 0 < truth[0] < 2**-52


@triton_face
@pytest.mark.parametrize("columns", [1, 2, 127, GROUP, GROUP + 1, 50264, 151936])
def test_faces_draw_the_same_tokens(columns: int, face: str, dtype: torch.dtype, monkeypatch) -> None:
    rows = 3 if columns > 50000 else 16
    logits = 2 * random(rows, columns, dtype=dtype)
    # Large ones of either sign: seeds fill two words of the key, steps two of the counter.
    key, step = seeds(rows) * -(2**61 // 3 + 1), seeds(rows) * 12345678901
    token, logprob = sample(logits, 0.8, key, step)
    monkeypatch.setattr(backend, "FACE", "torch")
    expected_token, expected_logprob = sample(logits, 0.8, key, step)
    assert torch.equal(token, expected_token)
    torch.testing.assert_close(logprob, expected_logprob, rtol=4 * EPS, atol=4 * EPS)


# The distribution. Seeds are fixed, so these either hold or do not; a correct sampler fails one with other seeds in
# one of a million. On a processor the torch face draws; the test above says that the other draws the same.

ONE_IN_A_MILLION = 4.7534  # of a normal variable, in standard deviations


def assert_follows(counts: Tensor, probabilities: Tensor) -> None:
    """Pearson's chi-square over bins that expect 5 or more; rarer outcomes are one bin together."""
    assert counts[probabilities == 0].sum() == 0
    expected = probabilities.double() * counts.sum()
    is_rare = expected < 5
    counts, expected = (
        torch.cat((x[~is_rare].double(), x[is_rare].sum(dtype=torch.float64).view(1))) for x in (counts, expected)
    )
    counts, expected = (x[expected > 0] for x in (counts, expected))
    statistic = ((counts - expected).square() / expected).sum().item()
    freedom = len(counts) - 1
    # Wilson & Hilferty 1931: the cube root of chi-square / freedom is close to normal.
    limit = freedom * (1 - 2 / (9 * freedom) + ONE_IN_A_MILLION * math.sqrt(2 / (9 * freedom))) ** 3
    print(f"chi-square {statistic:.1f}, limit {limit:.1f}, {freedom} degrees of freedom")  # shown by pytest -rP
    assert statistic <= limit


def first_of_every_group(groups: int, columns: int) -> Tensor:
    """Here noise that served both heats would favour the column whose place is its group's number."""
    logits = torch.full((groups, GROUP), NO_LOGIT)
    logits[:, :columns] = 0
    return logits.flatten()


@pytest.mark.parametrize(
    "logits",
    [
        torch.zeros(2 * GROUP),
        first_of_every_group(4, 4),
        torch.full((37,), -60.0),
        random(37, seed=2).cpu(),
        8 * random(GROUP + 188, seed=3).cpu(),
        torch.cat((torch.tensor([9.0]), torch.zeros(3 * GROUP))),
    ],
    ids=["flat", "first of every group", "flat and far from 0", "plain", "peaked", "one against many"],
)
@pytest.mark.parametrize("vary", ["seeds", "steps"])
def test_tokens_follow_the_softmax(logits: Tensor, vary: str) -> None:
    counts = torch.zeros(len(logits), dtype=torch.int64, device=DEVICE)
    for start in range(0, 2**14, 2**11):
        running, same = seeds(2**11, start), torch.full((2**11,), 99, device=DEVICE)
        key, step = (running, same) if vary == "seeds" else (same, running)
        tokens, _ = sample(logits.to(DEVICE).expand(2**11, -1), 1.0, key, step)
        counts += tokens.bincount(minlength=len(logits))
    assert_follows(counts.cpu(), logits.double().softmax(dim=0))


def test_rare_tokens_are_drawn_as_often_as_they_should() -> None:
    draws, at_once, probability = 2**22, 2**14, 2.0**-18
    logits = torch.tensor([0.0, math.log(probability / (1 - probability))], device=DEVICE).expand(at_once, 2)
    count = sum(sample(logits, 1.0, seeds(at_once, n), STEP)[0].sum().item() for n in range(0, draws, at_once))
    # Poisson with mean 16: 1 or fewer, and 39 or more, are each as rare as two in a million.
    assert 2 <= count <= 38


def test_successive_steps_and_neighbouring_seeds_are_independent() -> None:
    draws, columns = 2**15, 7
    logits = random(columns, seed=4)
    p = logits.double().softmax(dim=0).cpu()
    here_and_next = [
        sample(logits.expand(draws, columns), 1.0, seeds(draws, first), STEP + later)[0]
        for first, later in ((0, 0), (0, 1), (1, 0))
    ]
    for one, other in combinations(here_and_next, 2):
        pairs = (one * columns + other).bincount(minlength=columns**2)
        assert_follows(pairs.cpu(), torch.outer(p, p).flatten())


# Log-probabilities.


@faces
@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
@pytest.mark.parametrize("columns", [127, 3000])
def test_logprob_is_faithful(columns: int, temperature: float, face: str, dtype: torch.dtype) -> None:
    logits = 4 * random(8, columns, dtype=dtype)
    tokens, _ = sample(logits, temperature, seeds(8), STEP)

    def reference(x: Tensor) -> Tensor:
        wide = x.to(backend.accumulation_dtype(x.dtype))
        return (wide / temperature).log_softmax(dim=1).gather(1, tokens.unsqueeze(1)).squeeze(1)

    def logprob(x: Tensor) -> Tensor:
        return sample(x, temperature, seeds(8), STEP)[1]

    assert_faithful(logprob, reference, [logits], has_gradients=False)


@each_face
def test_logprob_is_the_one_that_training_sees(face: str) -> None:
    hidden, weight = random(16, 24), random(700, 24, seed=1)
    temperature = torch.linspace(0.5, 2, 16, device=DEVICE)
    logits = hidden @ weight.t()
    tokens, logprob = sample(logits, temperature, seeds(16), STEP)
    trained, _, _ = linear_logprob.linear_logprob(hidden, weight, tokens, temperature)
    # Logits are rounded apart, by a few last places of the largest.
    torch.testing.assert_close(logprob, trained, rtol=0, atol=8 * EPS * (logits.abs().max() / 0.5).item())


@each_face
def test_temperature_zero_takes_the_likeliest_with_its_untempered_logprob(face: str) -> None:
    logits = random(6, 1300)
    for zero in (0.0, 1e-40, torch.zeros(6, device=DEVICE)):
        tokens, logprob = sample(logits, zero, seeds(6), STEP)
        assert torch.equal(tokens, logits.argmax(dim=1))
        torch.testing.assert_close(logprob, logits.log_softmax(dim=1).amax(dim=1), rtol=4 * EPS, atol=0)


@each_face
def test_extreme_temperatures_leave_one_token_or_all_alike(face: str) -> None:
    logits = random(6, 600)
    temperature = torch.tensor([1e-37, 1e-6, 1e-4, 1e6, 1e20, 1e37], device=DEVICE)
    tokens, logprob = sample(logits, temperature, seeds(6), STEP)
    assert torch.equal(tokens[:3], logits[:3].argmax(dim=1))
    assert logprob[:3].tolist() == [0, 0, 0]
    torch.testing.assert_close(logprob[3:], torch.full_like(logprob[3:], -math.log(600)), rtol=1e-5, atol=0)


# Rows that mind their own business.


@each_face
def test_a_row_alone_and_among_others_is_bitwise_the_same(face: str) -> None:
    logits, key, step = random(9, 1100), seeds(9), seeds(9, 40)
    temperature = torch.linspace(0, 2, 9, device=DEVICE)
    token, logprob = sample(logits, temperature, key, step)
    order = torch.tensor([4, 0, 8, 3, 3, 1], device=DEVICE)
    mixed_token, mixed_logprob = sample(logits[order], temperature[order], key[order], step[order])
    assert torch.equal(mixed_token, token[order]) and torch.equal(mixed_logprob, logprob[order])
    for row in (0, 5):
        alone = sample(logits[row : row + 1], temperature[row : row + 1], key[row : row + 1], step[row])
        assert (alone[0].item(), alone[1].item()) == (token[row].item(), logprob[row].item())


@pytest.mark.skipif(DEVICE == "cuda", reason="a GPU is not asked whether anybody draws")
def test_where_nobody_draws_no_noise_is_made(monkeypatch) -> None:
    logits, zeros = random(6, 1100), torch.zeros(6)
    among_others = sample(logits.repeat(2, 1), torch.cat([zeros, zeros + 1]), seeds(12), STEP)
    monkeypatch.setattr(sampling, "_noise", None)
    token, logprob = sample(logits, zeros, seeds(6), STEP)
    assert torch.equal(token, among_others[0][:6]) and torch.equal(logprob, among_others[1][:6])


@triton_face
def test_tokens_do_not_depend_on_how_groups_are_split_among_programs(face: str, dtype, monkeypatch) -> None:
    logits = random(8, 9 * GROUP + 5, dtype=dtype)
    token, logprob = sample(logits, 1.0, seeds(8), STEP)
    for groups in (1, 4, 16):
        monkeypatch.setattr(sampling, "GROUPS_PER_PROGRAM", groups)
        other_token, other_logprob = sample(logits, 1.0, seeds(8), STEP)
        assert torch.equal(other_token, token)
        # The order of sums within a group is the compiler's.
        torch.testing.assert_close(other_logprob, logprob, rtol=4 * EPS, atol=0)


@each_face
def test_masked_logits_are_never_drawn(face: str) -> None:
    logits = random(12, 3 * GROUP + 7)
    is_masked = random(12, 3 * GROUP + 7, seed=1) < 0.8
    is_masked[3:, :GROUP] = True  # a whole group
    is_masked[6:, 2 * GROUP :] = True  # and the last ones
    is_masked[9:] = True  # all but one
    is_masked[9, 0] = is_masked[10, GROUP + 3] = is_masked[11, -1] = False
    logits[is_masked] = NO_LOGIT
    tokens, logprob = sample(logits, 1.5, seeds(12), STEP)
    expected = (logits / 1.5).log_softmax(dim=1).gather(1, tokens.unsqueeze(1)).squeeze(1)
    assert expected.isfinite().all()
    torch.testing.assert_close(logprob, expected, rtol=4 * EPS, atol=4 * EPS)
    assert tokens[9:].tolist() == [0, GROUP + 3, 3 * GROUP + 6] and logprob[9:].tolist() == [0, 0, 0]


@pytest.mark.filterwarnings("ignore:invalid value")
@each_face
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_without_a_distribution_gives_token_0_and_nan(temperature: float, face: str) -> None:
    logits = random(6, GROUP + 40)
    expected = sample(logits, temperature, seeds(6), STEP)
    logits[0, 5] = logits[1, -1] = float("nan")
    logits[2, 7] = float("inf")
    logits[3] = NO_LOGIT
    token, logprob = sample(logits, temperature, seeds(6), STEP)
    assert token[:4].tolist() == [0, 0, 0, 0] and logprob[:4].isnan().all()
    assert torch.equal(token[4:], expected[0][4:]) and torch.equal(logprob[4:], expected[1][4:])


@each_face
def test_ties_go_to_the_lowest_index(face: str) -> None:
    logits = torch.zeros(4, 2 * GROUP + 3, device=DEVICE)
    logits[1, [7, 9]] = 1
    logits[2, [GROUP - 1, GROUP]] = 1
    logits[3, [GROUP + 1, 2 * GROUP + 2]] = 1
    assert sample(logits, 0.0, seeds(4), STEP)[0].tolist() == [0, 7, GROUP - 1, GROUP + 1]


@each_face
def test_strided_arguments_draw_what_contiguous_ones_do(face: str) -> None:
    wide, key, step = random(6, 1501), seeds(12)[::2], seeds(18)[::3]
    temperature = torch.linspace(0.5, 1.5, 12, device=DEVICE)[::2]
    for logits in (wide[:, 3:1200], random(1200, 6).t(), random(1, 1200).expand(6, -1)):
        strided = sample(logits, temperature, key, step)
        contiguous = (x.contiguous() for x in (logits, temperature, key, step))
        assert all(torch.equal(a, b) for a, b in zip(strided, sample(*contiguous), strict=True))


@each_face
def test_no_rows_draw_nothing(face: str) -> None:
    token, logprob = sample(random(0, 33), 1.0, seeds(0), STEP)
    assert token.shape == logprob.shape == (0,) and token.dtype == torch.int64 and logprob.dtype == torch.float32


# As PyTorch sees it.


def test_the_op_keeps_its_word_to_the_dispatcher() -> None:
    temperatures = torch.linspace(0, 1, 4, device=DEVICE)
    for heat in (None, temperatures):
        opcheck(torch.ops.chimed.sample.default, (random(4, 700), seeds(4), seeds(4), heat, 0.7))


@each_face
def test_no_gradient_flows(face: str) -> None:
    _, logprob = sample(random(2, 9).requires_grad_(), 1.0, seeds(2), STEP)
    assert not logprob.requires_grad


def test_what_does_not_fit_is_refused() -> None:
    logits = random(3, 9)
    for temperature in (-1.0, math.inf, math.nan, torch.ones(4, device=DEVICE), seeds(3)):
        with pytest.raises(ValueError, match="temperature"):
            sample(logits, temperature, seeds(3), STEP)
    for bad in (seeds(2), seeds(3).int()):
        with pytest.raises(ValueError, match="seeds"):
            sample(logits, 1.0, bad, STEP)
        with pytest.raises(ValueError, match="step"):
            sample(logits, 1.0, seeds(3), bad)
    for nothing in (random(3), random(3, 0)):
        with pytest.raises(ValueError, match="V > 0"):
            sample(nothing, 1.0, seeds(3), STEP)


@pytest.mark.gpu
def test_a_captured_graph_draws_anew_at_every_step() -> None:
    logits, step = random(5, 151936, dtype=torch.bfloat16), torch.zeros((), dtype=torch.int64, device=DEVICE)
    expected = [sample(logits, 1.0, seeds(5), step + later) for later in range(3)]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        token, logprob = sample(logits, 1.0, seeds(5), step)
    for later in range(3):
        step.fill_(later)
        graph.replay()
        assert torch.equal(token, expected[later][0]) and torch.equal(logprob, expected[later][1])
