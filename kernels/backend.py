"""Which face of an op runs, how ops are made known to PyTorch, and how kernels start.

Every op has a reference: plain, differentiable torch that says what the op computes. Beside it stand two faces:
torch, for processors, and Triton, for GPUs. CHIMED_KERNELS, read once at import, chooses:

    auto       Triton for tensors on a GPU, torch elsewhere (default)
    triton     Triton everywhere; on a processor this needs TRITON_INTERPRET=1, and is for tests
    torch      torch everywhere
    reference  the references, everywhere

Ops are registered under the name `chimed::`, with shapes for fake tensors and an autograd rule, so that
torch.compile, selective checkpointing and memory planning see one op and not what is inside it. The dispatcher's
way through Python costs tens of microseconds a call, so when nobody is watching a call goes straight to the face.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

FACES = ("auto", "triton", "torch", "reference")


def _chosen_face() -> str:
    face = os.environ.get("CHIMED_KERNELS", "auto")
    if face not in FACES:
        raise ValueError(f"CHIMED_KERNELS is {face!r}; it must be one of {', '.join(FACES)}.")
    return face


FACE = _chosen_face()
_library = torch.library.Library("chimed", "DEF")
_PLAIN = (Tensor, torch.nn.Parameter)


def use_reference() -> bool:
    return FACE == "reference"


def use_triton(x: Tensor) -> bool:
    """Whether ops on x run as Triton kernels. They accumulate in fp32, so fp64 is left to torch."""
    return (FACE == "triton" or (FACE == "auto" and x.is_cuda)) and x.dtype != torch.float64


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """What an op computes in: fp32 for fp32 and below, fp64 for fp64."""
    return torch.promote_types(dtype, torch.float32)


class Op:
    """A registered op that can also be called past the dispatcher.

    Called with positional arguments, in the order of its schema. Gradients that did not reach a result are None
    in its autograd rule, never tensors of zeros.
    """

    def __init__(
        self,
        registered: Any,
        face: Callable[..., Any],
        setup_context: Callable[..., None] | None,
        backward: Callable[..., Any] | None,
    ) -> None:
        self.registered = registered
        self._face = face
        self._apply = None
        if setup_context is not None and backward is not None:
            self._apply = _autograd_function(registered._opname, face, setup_context, backward).apply

    def __call__(self, *args: Any) -> Any:
        is_watched = torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0
        # Of a DTensor, a kernel would see no memory; the dispatcher knows what it is, or refuses it.
        if is_watched or (type(args[0]) not in _PLAIN and isinstance(args[0], Tensor)):
            return self.registered(*args)
        if self._apply is not None and torch.is_grad_enabled():
            return self._apply(*args)
        return self._face(*args)


def register_op(
    schema: str,
    face: Callable[..., Any],
    fake: Callable[..., Any],
    *,
    triton: Callable[..., Any] | None = None,
    setup_context: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
) -> Op:
    """Define `chimed::<schema>` and return the callable op.

    Args:
        schema: name, arguments and results in the dispatcher's notation.
        face: computes the results with torch; it must return fresh tensors, never views of its arguments.
        fake: makes empty results of the right shape, dtype and device.
        triton: computes them with Triton kernels, for every argument that `use_triton`; the first tensor decides.
        setup_context, backward: the autograd rule, as in `torch.library.register_autograd`. It is called when a
            result has a gradient, with None for those that have none.
    """
    name = schema.split("(", 1)[0]
    dispatch = face if triton is None else _by_device(face, triton)
    _library.define(schema)
    _library.impl(name, dispatch, "CompositeExplicitAutograd")
    torch.library.register_fake(f"chimed::{name}", fake, lib=_library)
    op = getattr(torch.ops.chimed, name).default
    if backward is None:
        return Op(op, dispatch, None, None)
    setup_context = _without_zeros(setup_context)
    backward = _unless_there_is_none(backward, len(op._schema.arguments))
    torch.library.register_autograd(f"chimed::{name}", backward, setup_context=setup_context, lib=_library)
    return Op(op, dispatch, setup_context, backward)


def _by_device(face: Callable[..., Any], triton: Callable[..., Any]) -> Callable[..., Any]:
    def dispatch(*args: Any) -> Any:
        for first in args:
            if isinstance(first, Tensor):
                return triton(*args) if use_triton(first) else face(*args)
        raise TypeError("an op needs a tensor")

    return dispatch


def _without_zeros(setup_context: Callable[..., None] | None) -> Callable[..., None]:
    """PyTorch would fill a tensor of zeros for every result without a gradient, statistics included."""

    def setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.set_materialize_grads(False)
        if setup_context is not None:
            setup_context(ctx, inputs, output)

    return setup


def _unless_there_is_none(backward: Callable[..., Any], arguments: int) -> Callable[..., Any]:
    def rule(ctx: Any, *grads: Tensor | None) -> Any:
        return (None,) * arguments if all(grad is None for grad in grads) else backward(ctx, *grads)

    return rule


def _autograd_function(
    name: str, face: Callable[..., Any], setup_context: Callable[..., None], backward: Callable[..., Any]
) -> Any:
    """The rule as an autograd.Function. Its forward is not split in two: the split costs another 10 µs a call."""

    def forward(ctx, *args):
        output = face(*args)
        setup_context(ctx, args, output)
        return output

    # Named like the op: that is what autograd graphs and profiles show.
    rules = {"forward": staticmethod(forward), "backward": staticmethod(once_differentiable(backward))}
    return type(f"chimed_{name}", (torch.autograd.Function,), rules)


@dataclass(frozen=True)
class Chip:
    """What launches depend on. arch: compute capability, 80 for A100, 90 for H100 and H200."""

    arch: int
    multiprocessors: int


_pretended: Chip | None = None
_observer: Callable[..., None] | None = None


def chip(device: torch.device) -> Chip:
    """The chip behind a device. The interpreter passes for a small Hopper, so that persistent programs loop."""
    if _pretended is not None:
        return _pretended
    return Chip(90, 3) if device.type != "cuda" else _chip(device.index)


@functools.cache
def _chip(index: int | None) -> Chip:
    properties = torch.cuda.get_device_properties(torch.cuda.current_device() if index is None else index)
    return Chip(10 * properties.major + properties.minor, properties.multi_processor_count)


def cdiv(number: int, by: int) -> int:
    """Quotient, rounded up. Triton's own serves kernels too, and costs the host a microsecond and a half."""
    return -(-number // by)


def next_power_of_2(number: int) -> int:
    """The smallest power of two that is not below a positive number; as for `cdiv`."""
    return 1 << (number - 1).bit_length()


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """Start a Triton kernel where its tensors are: the only place where one is started.

    Args:
        grid: number of programs; an empty grid is no work.
        args: run-time arguments, in order, at least one of them a tensor.
        options: compile-time constants, num_warps, num_stages.
    """
    if 0 in grid:
        return
    if _observer is not None:
        _observer(kernel, grid, args, options)
        return
    device = next(x for x in args if isinstance(x, Tensor)).device
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):  # Triton takes the current one, which is the first one in a new thread
            kernel[grid](*args, **options)
    else:
        kernel[grid](*args, **options)


@contextmanager
def observed_launches(observer: Callable[..., None], pretended: Chip) -> Iterator[None]:
    """Within the context every launch is told to `observer(kernel, grid, args, options)` and nothing runs.

    Ops see the pretended chip, and take their Triton face whatever the device, meta tensors included.
    """
    global FACE, _observer, _pretended
    before = FACE, _observer, _pretended
    FACE, _observer, _pretended = "triton", observer, pretended
    try:
        yield
    finally:
        FACE, _observer, _pretended = before
