"""Ops on tensors of more than 2^31 entries, where a 32-bit offset would have come round.

What counts lies in the last rows, behind zeros; there, results and gradients are held to the reference on those rows
alone. Zeros have no upstream gradient, so even the gradient of a weight is that of the last rows.

Two ops are absent: `gae`, whose int32 bounds end before that, and `linear`, whose product is the vendor's.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
from torch import Tensor

from kernels.adamw import adamw, adamw_reference
from kernels.attention import attention, attention_reference, decode_attention, decode_attention_reference
from kernels.cross_entropy import cross_entropy, cross_entropy_reference
from kernels.grad_norm import grad_norm, grad_norm_reference
from kernels.linear_cross_entropy import linear_cross_entropy, linear_cross_entropy_reference
from kernels.linear_logprob import linear_logprob, linear_logprob_reference
from kernels.masters import split_master
from kernels.rms_norm import add_rms_norm, add_rms_norm_reference, rms_norm, rms_norm_reference
from kernels.rotary import rotary, rotary_reference
from kernels.sample import sample
from kernels.swiglu import swiglu, swiglu_reference
from kernels.vocabulary import IGNORE
from tests.kernels.faces import DEVICE
from tests.kernels.oracle import assert_faithful, random

pytestmark = pytest.mark.gpu

ENTRIES = 2**31
# The most that a test holds at once: AdamW, with five lists in fp32 or bf16 and one more while it makes them.
NEEDED = 64 * 2**30
EPS = 1e-5
ROWS = 70  # that count
VOCABULARY = 151936

bfloat16 = partial(random, dtype=torch.bfloat16)
Function = Callable[..., Tensor | tuple[Tensor, ...]]


@pytest.fixture(autouse=True)
def _memory() -> Iterator[None]:
    gc.collect()
    torch.cuda.empty_cache()
    if torch.cuda.mem_get_info()[0] < NEEDED:
        pytest.skip(f"needs {NEEDED / 2**30:.0f} GiB of free device memory")
    yield


def behind(x: Tensor, rows: int, filler: float = 0) -> Tensor:
    """x as the last of so many rows."""
    return torch.cat((x.new_full((rows - len(x), *x.shape[1:]), filler), x))


def assert_faithful_at_the_end(
    op: Function, reference: Function, inputs: list[Tensor], long: int, has_gradients: bool = True
) -> None:
    """The op with its first `long` inputs made of more than 2^31 entries (the first one) or of as many rows."""
    count = len(inputs[0])
    rows = ENTRIES * count // inputs[0].numel() + count

    def at_the_end(*tensors: Tensor) -> tuple[Tensor, ...]:
        results = op(*(behind(x, rows) for x in tensors[:long]), *tensors[long:])
        results = (results,) if isinstance(results, Tensor) else results
        return tuple(x[-count:] if x.ndim else x for x in results)

    assert_faithful(at_the_end, reference, inputs, has_gradients=has_gradients)


def test_rms_norm() -> None:
    op, reference = (partial(norm, eps=EPS) for norm in (rms_norm, rms_norm_reference))
    assert_faithful_at_the_end(op, reference, [bfloat16(ROWS, 8192), bfloat16(8192, seed=1)], long=1)


def test_add_rms_norm() -> None:
    op, reference = (partial(norm, eps=EPS) for norm in (add_rms_norm, add_rms_norm_reference))
    inputs = [bfloat16(ROWS, 8192), bfloat16(ROWS, 8192, seed=1), bfloat16(8192, seed=2)]
    assert_faithful_at_the_end(op, reference, inputs, long=2)


def test_rms_norm_of_heads() -> None:
    op, reference = (partial(norm, eps=EPS) for norm in (rms_norm, rms_norm_reference))
    assert_faithful_at_the_end(op, reference, [bfloat16(ROWS, 32, 128), bfloat16(128, seed=1)], long=1)


def test_swiglu() -> None:
    assert_faithful_at_the_end(swiglu, swiglu_reference, [bfloat16(ROWS, 2 * 11008)], long=1)


def test_rotary() -> None:
    angles = random(ROWS, 64, seed=2)
    positions = torch.arange(ROWS, device=DEVICE).flip(0)

    def run(rotate: Function, q: Tensor, k: Tensor) -> Tensor | tuple[Tensor, ...]:
        return rotate(q, k, behind(positions, len(q)), angles.cos(), angles.sin())

    inputs = [bfloat16(ROWS, 32, 128), bfloat16(ROWS, 8, 128, seed=1)]
    assert_faithful_at_the_end(partial(run, rotary), partial(run, rotary_reference), inputs, long=2)


def test_attention() -> None:
    """Documents of 4096 zeros, and the one that counts."""

    def run(attend: Function, q: Tensor, k: Tensor, v: Tensor) -> Tensor | tuple[Tensor, ...]:
        bounds = torch.tensor([*range(0, len(q) - 777, 4096), len(q) - 777, len(q)], dtype=torch.int32, device=DEVICE)
        return attend(q, k, v, bounds, bounds)

    op = partial(run, partial(attention, max_q=4096, max_k=4096, provider="triton"))
    reference = partial(run, partial(attention_reference, scale=128**-0.5, window=None))
    inputs = [bfloat16(777, 64, 128), bfloat16(777, 8, 128, seed=1), bfloat16(777, 8, 128, seed=2)]
    assert_faithful_at_the_end(op, reference, inputs, long=3)


def test_decode_attention() -> None:
    """Rows of 8192 cached keys; the first tensor is the cache."""

    def run(attend: Function, k_cache: Tensor, v_cache: Tensor, q: Tensor) -> Tensor | tuple[Tensor, ...]:
        lengths = torch.full((len(q),), k_cache.shape[1], dtype=torch.int32, device=DEVICE)
        return attend(q, k_cache, v_cache, lengths)

    op = partial(run, decode_attention)
    reference = partial(run, partial(decode_attention_reference, scale=128**-0.5, window=None))
    inputs = [bfloat16(2, 8192, 8, 128), bfloat16(2, 8192, 8, 128, seed=1), bfloat16(2, 64, 128, seed=2)]
    assert_faithful_at_the_end(op, reference, inputs, long=3, has_gradients=False)


def some_targets(vocabulary: int) -> Tensor:
    targets = torch.arange(ROWS, device=DEVICE) * 2171 % vocabulary
    targets[5] = IGNORE
    return targets


def test_cross_entropy() -> None:
    def run(loss: Function, logits: Tensor) -> Tensor | tuple[Tensor, ...]:
        return loss(logits, behind(some_targets(VOCABULARY), len(logits)), z_loss=0.1)

    op, reference = (partial(run, loss) for loss in (cross_entropy, cross_entropy_reference))
    assert_faithful_at_the_end(op, reference, [3 * bfloat16(ROWS, VOCABULARY)], long=1)


def test_linear_logprob() -> None:
    def run(logprob: Function, hidden: Tensor, weight: Tensor) -> Tensor | tuple[Tensor, ...]:
        return logprob(hidden, weight, behind(some_targets(1000), len(hidden), IGNORE), 0.7, True)

    op, reference = (partial(run, logprob) for logprob in (linear_logprob, linear_logprob_reference))
    assert_faithful_at_the_end(op, reference, [bfloat16(ROWS, 4096), bfloat16(1000, 4096, seed=1) / 64], long=1)


def test_linear_cross_entropy() -> None:
    def run(loss: Function, hidden: Tensor, weight: Tensor) -> Tensor | tuple[Tensor, ...]:
        return loss(hidden, weight, behind(some_targets(1000), len(hidden), IGNORE))[0]

    op, reference = (partial(run, loss) for loss in (linear_cross_entropy, linear_cross_entropy_reference))
    assert_faithful_at_the_end(op, reference, [bfloat16(ROWS, 4096), bfloat16(1000, 4096, seed=1) / 64], long=1)


def test_sample() -> None:
    logits, seeds = 3 * bfloat16(ROWS, VOCABULARY), torch.arange(ROWS, device=DEVICE)
    step = torch.tensor(7, device=DEVICE)
    tokens, _ = sample(logits, 0.8, seeds, step)

    def logprob(logits: Tensor) -> Tensor:
        drawn, logprob = sample(logits, 0.8, behind(seeds, len(logits)), step)
        assert torch.equal(drawn[-ROWS:], tokens)
        return logprob

    def reference(logits: Tensor) -> Tensor:
        wide = logits if logits.dtype == torch.float64 else logits.float()
        return (wide / 0.8).log_softmax(dim=1).gather(1, tokens.unsqueeze(1)).squeeze(1)

    assert_faithful_at_the_end(logprob, reference, [logits], long=1, has_gradients=False)


def test_adamw() -> None:
    scalars = {"lr": 1e-3, "step": 3, "clip_scale": 0.37, "should_skip": 0}
    options = {name: torch.tensor(value, device=DEVICE) for name, value in scalars.items()}

    def run(update: Callable[..., None], *tensors: Tensor) -> tuple[Tensor, ...]:
        p, grad, m, v = (x.clone() if len(x) == ROWS else x for x in tensors)  # the long ones are made for this call
        v.abs_()
        shadow = torch.empty_like(p, dtype=torch.bfloat16)
        lists = ([x] for x in (p, grad, m, v))
        update(*lists, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, shadows=[shadow], **options)
        return p, m, v, shadow

    inputs = [random(ROWS, seed=i) for i in range(4)]
    op, reference = (partial(run, update) for update in (adamw, adamw_reference))
    assert_faithful_at_the_end(op, reference, inputs, long=4, has_gradients=False)


def test_adamw_of_masters_in_halves() -> None:
    """The last entries take the bits that they take alone."""
    scalars = {"lr": 1e-3, "step": 3, "clip_scale": 0.37, "should_skip": 0}
    options = {name: torch.tensor(value, device=DEVICE) for name, value in scalars.items()}

    def run(entries: int) -> list[Tensor]:
        master, grad, m, v = (random(ROWS, seed=i) for i in range(4))
        short = (*split_master(master), grad, m, v.abs())
        p, remainder, grad, m, v = (behind(x, entries) for x in short)
        lists = ([x] for x in (p, grad, m, v))
        adamw(*lists, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, remainders=[remainder], **options)
        assert not torch.equal(p[-ROWS:], short[0])
        return [x[-ROWS:].clone() for x in (p, remainder, m, v)]

    assert all(map(torch.equal, run(ENTRIES + ROWS), run(ROWS)))


def test_grad_norm() -> None:
    op, reference = (lambda x, norm=norm: norm([x]) for norm in (grad_norm, grad_norm_reference))
    assert_faithful_at_the_end(op, reference, [random(ROWS)], long=1, has_gradients=False)
