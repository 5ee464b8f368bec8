"""Which face of an op runs, and how ops are made known to PyTorch.

Every op has a reference: plain, differentiable torch that says what the op computes. Beside it stand faster
faces. CHIMED_KERNELS, read once at import, chooses:

    auto       the fastest face for the device of the arguments (default)
    reference  the references, everywhere

Faces are registered in the dispatcher under the name `chimed::`, with shapes for fake tensors and an autograd
rule, so that torch.compile, selective checkpointing and memory planning see one op and not what is inside it.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch

FACES = ("auto", "reference")


def _chosen_face() -> str:
    face = os.environ.get("CHIMED_KERNELS", "auto")
    if face not in FACES:
        raise ValueError(f"CHIMED_KERNELS is {face!r}; it must be one of {', '.join(FACES)}.")
    return face


FACE = _chosen_face()
_library = torch.library.Library("chimed", "DEF")


def use_reference() -> bool:
    return FACE == "reference"


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """What an op computes in: fp32 for fp32 and below, fp64 for fp64."""
    return torch.promote_types(dtype, torch.float32)


def register_op(
    schema: str,
    face: Callable[..., Any],
    fake: Callable[..., Any],
    *,
    setup_context: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
) -> Any:
    """Define `chimed::<schema>` and return the callable op.

    Args:
        schema: name, arguments and results in the dispatcher's notation.
        face: computes the results on any device; it must return fresh tensors, never views of its arguments.
        fake: makes empty results of the right shape, dtype and device.
        setup_context, backward: the autograd rule, as in `torch.library.register_autograd`.
    """
    name = schema.split("(", 1)[0]
    _library.define(schema)
    _library.impl(name, face, "CompositeExplicitAutograd")
    torch.library.register_fake(f"chimed::{name}", fake, lib=_library)
    if backward is not None:
        torch.library.register_autograd(f"chimed::{name}", backward, setup_context=setup_context, lib=_library)
    return getattr(torch.ops.chimed, name).default
