"""Cross-entropy from logits: every face against the reference, and rows that mind their own business."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck
from torch.library import opcheck

from kernels.cross_entropy import cross_entropy, cross_entropy_reference
from kernels.vocabulary import IGNORE
from tests.kernels.faces import DEVICE, each_face, faces, triton_face
from tests.kernels.heads import labels
from tests.kernels.oracle import assert_faithful, random


def gradient(logits: Tensor, targets: Tensor, z_loss: float = 0.0) -> Tensor:
    logits = logits.detach().requires_grad_()
    (dlogits,) = torch.autograd.grad(cross_entropy(logits, targets, z_loss).sum(), logits)
    return dlogits


@faces
@pytest.mark.parametrize("z_loss", [0.0, 0.1])
@pytest.mark.parametrize("size", [4.0, 100.0])
def test_cross_entropy_is_faithful(size: float, z_loss: float, face: str, dtype: torch.dtype) -> None:
    keywords = {"targets": labels(37, 101), "z_loss": z_loss}
    logits = size * random(37, 101, dtype=dtype)
    assert_faithful(partial(cross_entropy, **keywords), partial(cross_entropy_reference, **keywords), [logits])


@triton_face
@pytest.mark.parametrize("vocab", [1, 2, 127, 1000, 39424, 50264, 151936])
def test_any_vocabulary_is_read_to_its_end(vocab: int, face: str, dtype: torch.dtype) -> None:
    keywords = {"targets": labels(2, vocab, 0.0)}
    logits = 4 * random(2, vocab, dtype=dtype)
    assert_faithful(
        partial(cross_entropy, **keywords),
        partial(cross_entropy_reference, **keywords),
        [logits],
        cancels=vocab < 3,
    )


@each_face
def test_rows_may_lie_apart_and_columns_too(face: str) -> None:
    wide, targets = random(7, 130), labels(7, 101)
    packed = wide[:, 3:104].contiguous()
    expected = cross_entropy(packed, targets), gradient(packed, targets)
    for logits in (wide[:, 3:104], packed.t().contiguous().t()):
        assert not logits.is_contiguous()
        assert torch.equal(cross_entropy(logits, targets), expected[0])
        assert torch.equal(gradient(logits, targets), expected[1])


@each_face
@pytest.mark.parametrize("vocab", [101, 9000])
def test_a_row_alone_and_among_others_is_bitwise_the_same(vocab: int, face: str) -> None:
    logits, targets = 4 * random(9, vocab), labels(9, vocab, 0.0)
    losses, dlogits = cross_entropy(logits, targets, 0.1), gradient(logits, targets, 0.1)
    for row in (slice(0, 1), slice(5, 8)):
        assert torch.equal(cross_entropy(logits[row], targets[row], 0.1), losses[row])
        assert torch.equal(gradient(logits[row], targets[row], 0.1), dlogits[row])


@each_face
def test_ignored_rows_are_zero_whatever_they_hold(face: str) -> None:
    logits, targets = random(5, 101), labels(5, 101, 0.0)
    logits[[1, 3]], targets[[1, 3]] = float("nan"), IGNORE
    losses, dlogits = cross_entropy(logits, targets, 0.1), gradient(logits, targets, 0.1)
    assert (losses[[1, 3]] == 0).all() and (losses[[0, 2, 4]] > 0).all()
    assert (dlogits[[1, 3]] == 0).all() and dlogits.isfinite().all() and (dlogits[[0, 2, 4]] != 0).all()


@each_face
@pytest.mark.parametrize("tokens", [0, 4])
def test_without_targets_there_is_no_loss(tokens: int, face: str) -> None:
    logits, targets = random(tokens, 11), torch.full((tokens,), IGNORE, device=DEVICE)
    assert cross_entropy(logits, targets, 0.1).shape == (tokens,)
    assert not cross_entropy(logits, targets, 0.1).any()
    assert gradient(logits, targets).shape == (tokens, 11) and not gradient(logits, targets).any()


@each_face
def test_huge_logits_and_impossible_tokens_are_numbers_all_the_same(face: str) -> None:
    """Minus infinity takes a token out of the vocabulary; so does the difference of 1e4 to another."""
    gone = float("-inf")
    logits = torch.tensor([[1e4, 1e4, -1e4, gone], [gone, -1e4, gone, gone]], device=DEVICE)
    targets = torch.tensor([1, 1], device=DEVICE)
    assert torch.allclose(cross_entropy(logits, targets), torch.tensor([2.0, 1.0], device=DEVICE).log())
    assert gradient(logits, targets).tolist() == [[0.5, -0.5, 0, 0], [0, 0, 0, 0]]


@each_face
def test_a_target_outside_the_vocabulary_is_never_read(face: str) -> None:
    logits, targets = random(3, 11), torch.tensor([2, 11, 5], device=DEVICE)
    if face == "torch":
        with pytest.raises(RuntimeError, match="out of bounds"):
            cross_entropy(logits, targets)
    else:
        assert cross_entropy(logits, targets).isnan().tolist() == [False, True, False]


def test_reference_and_torch_face_pass_gradcheck() -> None:
    logits = random(6, 9, seed=4, dtype=torch.float64).requires_grad_()
    for op in (cross_entropy, cross_entropy_reference):
        assert gradcheck(lambda x, op=op: op(x, labels(6, 9), 0.2), (logits,))


@each_face
def test_every_face_keeps_its_word_to_the_dispatcher(face: str) -> None:
    arguments = random(8, 16).requires_grad_(), labels(8, 16), 0.1
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    opcheck(torch.ops.chimed.cross_entropy.default, arguments, test_utils=checks)


@pytest.mark.gpu
def test_rows_beyond_two_to_the_31_are_found() -> None:
    tokens, vocab = 14400, 151936
    logits = torch.randn(1, vocab, device=DEVICE, dtype=torch.bfloat16).expand(tokens, vocab).contiguous()
    targets = labels(tokens, vocab, 0.0)
    assert (tokens - 1) * vocab > 2**31
    last = slice(tokens - 1, tokens)
    assert torch.equal(cross_entropy(logits, targets)[last], cross_entropy(logits[:1], targets[last]))
    assert torch.equal(gradient(logits, targets)[last], gradient(logits[:1], targets[last]))


def test_shapes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="logits"):
        cross_entropy(random(6, 4), labels(5, 4))
