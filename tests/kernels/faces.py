"""Which faces are tested, in which dtypes, on which device.

Without a GPU, Triton kernels run on the interpreter, whose bf16 is wrong: there they are held to their references in
fp32 and fp16. On a GPU the same tests run the compiled kernels, in bf16 too.
"""

from __future__ import annotations

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TORCH = [("torch", dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16)]
TRITON = [("triton", dtype) for dtype in (torch.float32, torch.float16)]
if DEVICE == "cuda":
    TORCH, TRITON = [], [*TRITON, ("triton", torch.bfloat16)]

_name = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


def _mark(pairs: list[tuple[str, torch.dtype]]) -> pytest.MarkDecorator:
    names = [f"{face}-{_name[dtype]}" for face, dtype in pairs]
    return pytest.mark.parametrize(("face", "dtype"), pairs, indirect=["face"], ids=names)


# For tests that take `face` and `dtype`: every face in its dtypes, or the Triton face alone.
faces = _mark([*TORCH, *TRITON])
triton_face = _mark(TRITON)
# For tests that take `face` only.
each_face = pytest.mark.parametrize("face", ["triton"] if DEVICE == "cuda" else ["torch", "triton"], indirect=True)
