"""The ops on the language-model head: every face against the references, with rows that do not count."""

from __future__ import annotations

import importlib
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck
from torch.library import opcheck

from kernels.linear_cross_entropy import linear_cross_entropy, linear_cross_entropy_reference
from kernels.linear_logprob import linear_logprob, linear_logprob_reference
from kernels.vocabulary import IGNORE
from tests.kernels.faces import DEVICE, each_face, faces, triton_face
from tests.kernels.heads import head, labels, loss_and_reference
from tests.kernels.oracle import assert_faithful, random

triton_only = pytest.mark.parametrize("face", ["triton"], indirect=True)


def heat_of(tokens: int, kind: str) -> float | Tensor:
    return {"one": 1.0, "number": 0.7, "per token": random(tokens, seed=8).abs() + 0.5}[kind]


@faces
@pytest.mark.parametrize(("heat", "ignored"), [("one", 0.0), ("number", 0.3), ("per token", 0.3)])
def test_linear_logprob_is_faithful(heat: str, ignored: float, face: str, dtype: torch.dtype) -> None:
    keywords = {"targets": labels(37, 101, ignored), "temperature": heat_of(37, heat), "with_entropy": True}
    inputs = head(37, 16, 101, dtype)
    assert_faithful(partial(linear_logprob, **keywords), partial(linear_logprob_reference, **keywords), inputs)


@faces
@pytest.mark.parametrize(("weighted", "ignored"), [(False, 0.0), (True, 0.3)])
def test_linear_cross_entropy_is_faithful(weighted: bool, ignored: float, face: str, dtype: torch.dtype) -> None:
    weights = random(37, seed=8) if weighted else None
    compared = loss_and_reference(targets=labels(37, 101, ignored), weights=weights, z_loss=0.1)
    assert_faithful(*compared, head(37, 16, 101, dtype))


@triton_face
@pytest.mark.parametrize("vocab", [1, 2, 127, 1000])
def test_any_vocabulary_is_read_to_its_end(vocab: int, face: str, dtype: torch.dtype) -> None:
    """The last token's target is the last column."""
    targets, inputs = labels(3, vocab, 0.0), head(3, 4, vocab, dtype)
    keywords = {"targets": targets, "temperature": heat_of(3, "per token"), "with_entropy": True}
    logprob, reference = partial(linear_logprob, **keywords), partial(linear_logprob_reference, **keywords)
    # Of one token or two, the results are differences of their logits.
    assert_faithful(logprob, reference, inputs, cancels=vocab < 3)
    assert_faithful(*loss_and_reference(targets=targets, z_loss=0.1), inputs, cancels=vocab < 3)


@triton_only
@pytest.mark.parametrize("vocab", [39424, 50264, 151936])
def test_so_are_those_of_real_models(vocab: int, face: str) -> None:
    dtype = torch.bfloat16 if DEVICE == "cuda" else torch.float32
    targets, inputs = labels(2, vocab, 0.0), head(2, 4, vocab, dtype)
    keywords = {"targets": targets, "temperature": heat_of(2, "per token"), "with_entropy": True}
    assert_faithful(partial(linear_logprob, **keywords), partial(linear_logprob_reference, **keywords), inputs)
    assert_faithful(*loss_and_reference(targets=targets, z_loss=0.1), inputs)


@faces
def test_a_softmax_with_a_peak_is_as_good(face: str, dtype: torch.dtype) -> None:
    """Hidden states point where their targets do: p is near 1 there, and the gradient p - 1 near 0."""
    weight, targets = random(300, 16, seed=1, dtype=dtype), labels(12, 300, 0.0)
    inputs = 2 * weight[targets], weight
    keywords = {"targets": targets, "with_entropy": True}
    logprob, reference = partial(linear_logprob, **keywords), partial(linear_logprob_reference, **keywords)
    assert reference(*inputs)[0].exp().max() > 0.99
    assert_faithful(logprob, reference, inputs)
    assert_faithful(*loss_and_reference(targets=targets, z_loss=0.01), inputs)


@each_face
@pytest.mark.parametrize("chosen", [(0,), (1,), (2,), (0, 1), (0, 2), (1, 2)], ids=str)
def test_results_without_a_gradient_add_nothing(chosen: tuple[int, ...], face: str) -> None:
    keywords = {"targets": labels(19, 101), "temperature": heat_of(19, "per token"), "with_entropy": True}

    def some(op, *args: Tensor) -> tuple[Tensor, ...]:
        results = op(*args, **keywords)
        return tuple(results[index] for index in chosen)

    assert_faithful(partial(some, linear_logprob), partial(some, linear_logprob_reference), head(19, 16, 101))


@each_face
def test_entropy_costs_the_other_results_nothing(face: str) -> None:
    inputs, targets = head(19, 16, 1000), labels(19, 1000)
    with_entropy = linear_logprob(*inputs, targets, with_entropy=True)
    logprob, entropy, lse = linear_logprob(*inputs, targets)
    assert entropy is None
    assert torch.equal(logprob, with_entropy[0]) and torch.equal(lse, with_entropy[2])


@pytest.mark.parametrize("face", ["torch"], indirect=True)
@pytest.mark.parametrize("op", ["linear_logprob", "linear_cross_entropy"])
def test_the_torch_face_may_compute_ignored_rows_or_leave_them_out(
    op: str, face: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Away from a CPU nobody knows how many they are."""
    monkeypatch.setattr(importlib.import_module(f"kernels.{op}"), "counted_rows", lambda targets: None)
    targets, inputs = labels(37, 101), head(37, 16, 101)
    if op == "linear_logprob":
        keywords = {"targets": targets, "temperature": heat_of(37, "per token"), "with_entropy": True}
        assert_faithful(partial(linear_logprob, **keywords), partial(linear_logprob_reference, **keywords), inputs)
    else:
        assert_faithful(*loss_and_reference(targets=targets, weights=random(37, seed=8), z_loss=0.1), inputs)


@each_face
@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_ignored_rows_are_zero_whatever_their_hidden_state_holds(wrong: float, face: str) -> None:
    hidden, weight = head(6, 4, 9)
    hidden[[1, 4]] = wrong
    targets = torch.tensor([3, IGNORE, 0, 8, IGNORE, 2], device=DEVICE)
    hidden.requires_grad_(), weight.requires_grad_()
    for result in linear_logprob(hidden, weight, targets, with_entropy=True):
        assert result is not None
        assert (result[[1, 4]] == 0).all() and result.isfinite().all() and (result[[0, 2, 3, 5]] != 0).all()
        grads = torch.autograd.grad(result.sum(), (hidden, weight), retain_graph=True)
        assert (grads[0][[1, 4]] == 0).all() and all(grad.isfinite().all() for grad in grads)
    nll, z = linear_cross_entropy(hidden, weight, targets, z_loss=0.1)
    grads = torch.autograd.grad(nll + z, (hidden, weight))
    assert (grads[0][[1, 4]] == 0).all() and all(grad.isfinite().all() for grad in grads)


@each_face
@pytest.mark.parametrize("tokens", [0, 6])
def test_a_batch_without_targets_gives_zero_gradients_not_none(tokens: int, face: str) -> None:
    hidden, weight = (x.requires_grad_() for x in head(tokens, 4, 9))
    targets = torch.full((tokens,), IGNORE, device=DEVICE)
    logprob, entropy, lse = linear_logprob(hidden, weight, targets, with_entropy=True)
    assert entropy is not None
    nll, z = linear_cross_entropy(hidden, weight, targets, z_loss=0.1)
    for sums in (logprob.sum() + entropy.sum() + lse.sum(), nll + z):
        assert sums.item() == 0
        dhidden, dweight = torch.autograd.grad(sums, (hidden, weight))
        assert dhidden.shape == hidden.shape and not dhidden.any()
        assert dweight.shape == weight.shape and not dweight.any()


def test_references_and_the_torch_face_pass_gradcheck() -> None:
    hidden, weight = (x.double().requires_grad_() for x in head(3, 2, 5))
    targets, heat = labels(3, 5), random(3, seed=3).abs() + 0.5
    for op in (linear_logprob, linear_logprob_reference):
        assert gradcheck(lambda h, w, op=op: op(h, w, targets, heat, True), (hidden, weight))
    for op in (linear_cross_entropy, linear_cross_entropy_reference):
        assert gradcheck(lambda h, w, op=op: sum(op(h, w, targets, heat, 0.3)), (hidden, weight))


@each_face
def test_cross_entropy_is_the_sum_of_log_probabilities(face: str) -> None:
    hidden, weight = head(37, 16, 101)
    targets = labels(37, 101)
    nll, z = linear_cross_entropy(hidden, weight, targets, z_loss=0.5)
    logprob, _, lse = linear_logprob(hidden, weight, targets)
    assert torch.allclose(nll, -logprob.sum(), rtol=1e-6)
    assert torch.allclose(z, 0.5 * lse.square().sum(), rtol=1e-6)


@each_face
def test_different_gradients_of_the_two_sums_are_refused(face: str) -> None:
    hidden, weight = (x.requires_grad_() for x in head(6, 4, 9))
    nll, z = linear_cross_entropy(hidden, weight, labels(6, 9), z_loss=0.1)
    if DEVICE == "cuda":
        pytest.skip("on a GPU a failed assertion ends the process")
    with pytest.raises(RuntimeError, match="one upstream gradient"):
        (nll + 2 * z).backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="one upstream gradient"):
        nll.backward()


@each_face
def test_an_upstream_gradient_of_nan_is_passed_on_for_the_guard_to_see(face: str) -> None:
    hidden, weight = (x.requires_grad_() for x in head(6, 4, 9))
    nll, z = linear_cross_entropy(hidden, weight, labels(6, 9), z_loss=0.1)
    ((nll + z) * float("nan")).backward()
    assert hidden.grad is not None and hidden.grad.isnan().all()


@each_face
def test_backward_twice_and_all_over_again_is_bitwise_the_same(face: str) -> None:
    hidden, weight = (x.requires_grad_() for x in head(6, 4, 9))

    def losses() -> list[Tensor]:
        nll, z = linear_cross_entropy(hidden, weight, labels(6, 9), z_loss=0.1)
        return [(nll + z) * 0.25, *(x.sum() for x in linear_logprob(hidden, weight, labels(6, 9), 0.7, True))]

    for loss, again in zip(losses(), losses(), strict=True):
        once = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
        twice = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
        anew = torch.autograd.grad(again, (hidden, weight), retain_graph=True)
        assert torch.equal(loss, again)
        assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(once, twice, anew, strict=True))


@faces
def test_the_upstream_gradient_is_not_rounded(face: str, dtype: torch.dtype) -> None:
    """1/3 in bf16 is off by 0.13%, and with it every gradient of a model would be."""
    x, factor = random(1000, dtype=dtype), torch.tensor(1 / 3, device=DEVICE)
    expected = (x.double() * factor.double()).to(dtype)
    if dtype == torch.bfloat16:
        assert not torch.equal(x * factor.to(dtype), expected)
    scaled = importlib.import_module("kernels.linear_cross_entropy")._scaled_op(x, factor)
    assert torch.allclose(scaled.double(), expected.double(), rtol=torch.finfo(dtype).eps / 4, atol=0)


@each_face
def test_evaluation_makes_no_gradient(face: str) -> None:
    hidden, weight = (x.requires_grad_() for x in head(6, 4, 9))
    with torch.no_grad():
        nll, _ = linear_cross_entropy(hidden, weight, labels(6, 9))
    assert not nll.requires_grad
    assert torch.equal(nll, linear_cross_entropy(hidden, weight, labels(6, 9))[0])
    inputs = hidden.detach(), weight.detach(), labels(6, 9), None, 0.0
    results = torch.ops.chimed.linear_cross_entropy(*inputs, False, False)
    assert results[2].numel() == 0 and results[3].numel() == 0


@each_face
def test_large_logits_neither_overflow_nor_vanish(face: str) -> None:
    hidden = torch.tensor([[1e4], [1e4]], device=DEVICE).requires_grad_()
    weight = torch.tensor([[1.0], [0.0], [-1.0]], device=DEVICE).requires_grad_()
    targets = torch.tensor([0, 2], device=DEVICE)
    logprob, entropy, lse = linear_logprob(hidden, weight, targets, with_entropy=True)
    assert entropy is not None
    assert logprob.tolist() == [0, -2e4] and lse.tolist() == [1e4, 1e4] and entropy.tolist() == [0, 0]
    # The softmax is 1 at the first column: d logprob = onehot(target) - onehot(0).
    grads = torch.autograd.grad((logprob + entropy).sum(), (hidden, weight))
    assert grads[0].tolist() == [[0], [-2]] and grads[1].tolist() == [[-1e4], [0], [1e4]]
    nll, z = linear_cross_entropy(hidden, weight, targets, z_loss=1e-8)
    assert nll.item() == 2e4 and torch.allclose(z, torch.tensor(2.0, device=DEVICE))


@each_face
def test_the_entropy_of_equal_logits_is_the_log_of_their_number(face: str) -> None:
    hidden = torch.zeros(3, 4, device=DEVICE)
    _, entropy, _ = linear_logprob(hidden, random(50, 4), labels(3, 50, 0.0), with_entropy=True)
    assert torch.allclose(entropy, torch.tensor(50.0).log().to(DEVICE).expand(3), rtol=1e-6)


@each_face
@pytest.mark.parametrize("op", ["linear_logprob", "linear_cross_entropy"])
def test_every_face_keeps_its_word_to_the_dispatcher(op: str, face: str) -> None:
    hidden, weight = (x.requires_grad_() for x in head(8, 16, 7))
    targets = labels(8, 7)
    of_op = (heat_of(8, "per token"), True) if op == "linear_logprob" else (None, 0.0, True, True)
    arguments = hidden, weight, targets, *of_op
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    opcheck(getattr(torch.ops.chimed, op).default, arguments, test_utils=checks)


@pytest.mark.gpu
def test_nothing_waits_for_the_gpu() -> None:
    hidden, weight = (x.requires_grad_() for x in head(64, 128, 1000, torch.bfloat16))
    targets, weights = labels(64, 1000), random(64, seed=8)
    torch.cuda.set_sync_debug_mode("error")
    try:
        nll, z = linear_cross_entropy(hidden, weight, targets, weights, 0.1)
        results = linear_logprob(hidden, weight, targets, weights.abs() + 0.5, True)
        (nll + z + sum(x.sum() for x in results if x is not None)).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


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
