"""The ops on the language-model head: against their references, chunked or not, with rows that do not count."""

from __future__ import annotations

import importlib
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

from kernels import vocabulary
from kernels.cross_entropy import cross_entropy, cross_entropy_reference
from kernels.linear_cross_entropy import linear_cross_entropy, linear_cross_entropy_reference
from kernels.linear_logprob import linear_logprob, linear_logprob_reference
from kernels.vocabulary import IGNORE
from tests.kernels.oracle import Op, assert_faithful, random

# Modules and the functions imported from them have the same names.
linear_logprob_module = importlib.import_module("kernels.linear_logprob")
linear_cross_entropy_module = importlib.import_module("kernels.linear_cross_entropy")

DTYPES = (torch.float32, torch.bfloat16)
either_way = pytest.mark.usefixtures("picking")
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def head(tokens: int, width: int, vocab: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    return random(tokens, width, dtype=dtype), random(vocab, width, seed=1, dtype=dtype)


@pytest.fixture(params=[True, False], ids=["counted rows only", "all rows"])
def picking(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ignored rows are left out, as on a CPU, or computed and cleared, as on a GPU."""
    if not request.param:
        for module in (linear_logprob_module, linear_cross_entropy_module):
            monkeypatch.setattr(module, "counted_rows", lambda targets: None)


def labels(tokens: int, vocab: int, ignored: float = 0.3) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    targets = torch.randint(0, vocab, (tokens,), generator=generator)
    return targets.where(torch.rand(tokens, generator=generator) >= ignored, IGNORE)


@either_way
@dtypes
@pytest.mark.parametrize("ignored", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("heat", ["one", "number", "per token"])
def test_linear_logprob_is_faithful(heat: str, ignored: float, dtype: torch.dtype) -> None:
    inputs = head(37, 16, 101, dtype)
    temperature = {"one": 1.0, "number": 0.7, "per token": random(37, seed=8).abs() + 0.5}[heat]
    keywords = {"targets": labels(37, 101, ignored), "temperature": temperature, "with_entropy": True}
    assert_faithful(partial(linear_logprob, **keywords), partial(linear_logprob_reference, **keywords), inputs)


@either_way
@dtypes
@pytest.mark.parametrize("ignored", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("weighted", [False, True])
def test_linear_cross_entropy_is_faithful(weighted: bool, ignored: float, dtype: torch.dtype) -> None:
    inputs = head(37, 16, 101, dtype)
    keywords = {"targets": labels(37, 101, ignored), "weights": random(37, seed=8) if weighted else None, "z_loss": 0.1}
    face = lambda *args: sum(linear_cross_entropy(*args, **keywords))  # noqa: E731
    reference = lambda *args: sum(linear_cross_entropy_reference(*args, **keywords))  # noqa: E731
    assert_faithful(face, reference, inputs)


@pytest.mark.parametrize("rows_at_once", [1, 5, 36, 37])
@pytest.mark.parametrize("op", ["logprob", "cross_entropy"])
def test_chunks_leave_the_results_as_they_are(op: str, rows_at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(vocabulary.WORKSPACE, "cpu", rows_at_once * 101 * 4)
    targets = labels(37, 101, 0.0)
    if op == "logprob":
        face: Op = partial(linear_logprob, targets=targets, with_entropy=True)
        reference: Op = partial(linear_logprob_reference, targets=targets, with_entropy=True)
    else:
        face = lambda h, w: linear_cross_entropy(h, w, targets)[0]  # noqa: E731
        reference = lambda h, w: linear_cross_entropy_reference(h, w, targets)[0]  # noqa: E731
    assert_faithful(face, reference, head(37, 16, 101))


def test_chunks_cover_all_rows_once_within_the_budget() -> None:
    for rows in (0, 1, 7, 1000):
        parts = list(vocabulary.chunks(rows, 1 << 20, torch.bfloat16, torch.device("cpu")))
        assert [i for part in parts for i in range(part.start, part.stop)] == list(range(rows))
        assert all((part.stop - part.start) << 22 <= vocabulary.WORKSPACE["cpu"] for part in parts)


def test_ignored_rows_are_zero_whatever_their_hidden_state_holds() -> None:
    hidden, weight = head(6, 4, 9)
    hidden[[1, 4]] = float("nan")
    targets = torch.tensor([3, IGNORE, 0, 8, IGNORE, 2])
    hidden.requires_grad_(), weight.requires_grad_()
    for result in linear_logprob(hidden, weight, targets, with_entropy=True):
        assert result is not None
        assert (result[[1, 4]] == 0).all() and result.isfinite().all() and (result[[0, 2, 3, 5]] != 0).all()
        grads = torch.autograd.grad(result.sum(), (hidden, weight), retain_graph=True)
        assert (grads[0][[1, 4]] == 0).all() and all(grad.isfinite().all() for grad in grads)
    nll, _ = linear_cross_entropy(hidden, weight, targets)
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(nll, (hidden, weight)))


@either_way
def test_a_batch_without_targets_gives_zero_gradients_not_none() -> None:
    hidden, weight = (x.requires_grad_() for x in head(6, 4, 9))
    targets = torch.full((6,), IGNORE)
    nll, z = linear_cross_entropy(hidden, weight, targets, z_loss=0.1)
    (nll + z).backward()
    assert (nll + z).item() == 0
    assert hidden.grad is not None and weight.grad is not None
    assert not hidden.grad.any() and not weight.grad.any()


def test_every_output_carries_its_own_gradient_per_token() -> None:
    hidden, weight = (x.double().requires_grad_() for x in head(6, 5, 11))
    targets = labels(6, 11)
    heat = random(6, seed=3).abs() + 0.5
    assert gradcheck(lambda h, w: linear_logprob(h, w, targets, heat, True), (hidden, weight))
    assert gradcheck(lambda h, w: linear_logprob(h, w, targets)[0], (hidden, weight))
    assert gradcheck(lambda h, w: sum(linear_cross_entropy(h, w, targets, heat, 0.3)), (hidden, weight))
    logits = random(6, 9, seed=4, dtype=torch.float64).requires_grad_()
    assert gradcheck(lambda x: cross_entropy(x, targets.clamp(max=8), 0.2), (logits,))


def test_cross_entropy_is_the_sum_of_log_probabilities() -> None:
    hidden, weight = head(37, 16, 101)
    targets = labels(37, 101)
    nll, z = linear_cross_entropy(hidden, weight, targets, z_loss=0.5)
    logprob, entropy, lse = linear_logprob(hidden, weight, targets)
    assert entropy is None
    assert torch.allclose(nll, -logprob.sum(), rtol=1e-6)
    assert torch.allclose(z, 0.5 * lse.square().sum(), rtol=1e-6)


def test_different_gradients_of_the_two_sums_are_refused() -> None:
    hidden, weight = (x.requires_grad_() for x in head(6, 4, 9))
    targets = labels(6, 9)
    nll, z = linear_cross_entropy(hidden, weight, targets, z_loss=0.1)
    with pytest.raises(RuntimeError, match="one upstream gradient"):
        (nll + 2 * z).backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="one upstream gradient"):
        nll.backward()


def test_backward_twice_gives_the_gradient_twice() -> None:
    hidden, weight = (x.requires_grad_() for x in head(6, 4, 9))
    nll, z = linear_cross_entropy(hidden, weight, labels(6, 9), z_loss=0.1)
    loss = (nll + z) * 0.25
    once = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
    twice = torch.autograd.grad(loss, (hidden, weight))
    assert all(torch.equal(a, b) for a, b in zip(once, twice, strict=True))


def test_evaluation_makes_no_gradient() -> None:
    hidden, weight = (x.requires_grad_() for x in head(6, 4, 9))
    with torch.no_grad():
        nll, _ = linear_cross_entropy(hidden, weight, labels(6, 9))
    assert not nll.requires_grad
    results = torch.ops.chimed.linear_cross_entropy(hidden.detach(), weight.detach(), labels(6, 9), None, 0.0, False)
    assert results[2].numel() == 0 and results[3].numel() == 0


def test_large_logits_neither_overflow_nor_vanish() -> None:
    hidden = torch.tensor([[200.0], [200.0]])
    weight = torch.tensor([[1.0], [0.0], [-1.0]])
    logprob, entropy, lse = linear_logprob(hidden, weight, torch.tensor([0, 2]), with_entropy=True)
    assert torch.equal(logprob, torch.tensor([0.0, -400.0]))
    assert torch.equal(lse, torch.tensor([200.0, 200.0]))
    assert torch.equal(entropy, torch.zeros(2))


def test_the_entropy_of_equal_logits_is_the_log_of_their_number() -> None:
    _, entropy, _ = linear_logprob(torch.zeros(3, 4), random(50, 4), torch.tensor([0, 1, 2]), with_entropy=True)
    assert torch.allclose(entropy, torch.tensor(50.0).log().expand(3), rtol=1e-6)


@dtypes
@pytest.mark.parametrize("z_loss", [0.0, 0.1])
def test_cross_entropy_from_logits_is_faithful(z_loss: float, dtype: torch.dtype) -> None:
    keywords = {"targets": labels(37, 101), "z_loss": z_loss}
    logits = 4 * random(37, 101, dtype=dtype)
    assert_faithful(partial(cross_entropy, **keywords), partial(cross_entropy_reference, **keywords), [logits])


def test_shapes_that_do_not_fit_are_refused() -> None:
    hidden, weight = head(6, 4, 9)
    targets = labels(6, 9)
    with pytest.raises(ValueError, match="weight"):
        linear_logprob(hidden, weight[:, :3], targets)
    with pytest.raises(ValueError, match="targets"):
        linear_cross_entropy(hidden, weight, targets[:5])
    with pytest.raises(ValueError, match="weights"):
        linear_cross_entropy(hidden, weight, targets, torch.ones(5))
    with pytest.raises(ValueError, match="temperature"):
        linear_logprob(hidden, weight, targets, 0.0)
    with pytest.raises(ValueError, match="temperature"):
        linear_logprob(hidden, weight, targets, torch.ones(5))
    with pytest.raises(ValueError, match="bfloat16"):
        linear_logprob(hidden.bfloat16(), weight, targets)
    with pytest.raises(ValueError, match="logits"):
        cross_entropy(hidden, targets[:5])
