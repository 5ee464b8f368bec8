"""Who computes attention: every provider does what the reference says, and the choice follows the written rule.

flash-attn and torch's flash kernel want a GPU. Elsewhere functions stand in for them that have exactly their
signatures and do, densely, what their documentation says of masks, so that the adapters are held to the reference.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from functools import partial
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.attention import attention, attention_reference, dispatch, flash, sdpa
from kernels.attention.dispatch import Call, choose, read_table, refusal, table_key
from kernels.launches import ARCHITECTURES
from tests.kernels import oracle
from tests.kernels.faces import DEVICE
from tests.kernels.oracle import random

# Squares, more keys, fewer keys (the first queries see none), no keys, nothing at all.
LENGTHS_Q, LENGTHS_K = [1, 20, 0, 6, 5, 3], [1, 20, 0, 9, 2, 0]
WIDTHS = (64, 80, 96, 128, 256)
SCALE = 0.25

windows = pytest.mark.parametrize("window", [None, 1, 4])


def bounds(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32, device=DEVICE)


def qkv(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    shapes = (sum(LENGTHS_Q), 4), (sum(LENGTHS_K), 2), (sum(LENGTHS_K), 2)
    return tuple(random(*shape, 16, seed=seed, dtype=dtype) for seed, shape in enumerate(shapes))  # type: ignore[return-value]


def assert_faithful(provider: Callable[..., Tensor], window: int | None, dtype: torch.dtype = torch.float32) -> None:
    """provider: takes q, k, v, bounds of both, and the longest of both."""
    cu_seqlens = bounds(LENGTHS_Q), bounds(LENGTHS_K)

    def face(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return provider(q, k, v, *cu_seqlens, max(LENGTHS_Q), max(LENGTHS_K), scale=SCALE, window=window)

    def reference(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention_reference(q, k, v, *cu_seqlens, scale=SCALE, window=window)

    oracle.assert_faithful(face, reference, qkv(dtype), cancels=True)


def windowed_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, scale: float, left: int | None, right: int | None
) -> Tensor:
    """Query i of a document sees keys from i + n_k - n_q - left to i + n_k - n_q + right; negative is without end."""
    out = []
    for d in range(len(cu_q) - 1):
        rows, keys = slice(int(cu_q[d]), int(cu_q[d + 1])), slice(int(cu_k[d]), int(cu_k[d + 1]))
        group = q.shape[1] // k.shape[1]
        query, key, value = q[rows], k[keys].repeat_interleave(group, 1), v[keys].repeat_interleave(group, 1)
        places = torch.arange(max(len(key), len(query)), device=q.device)
        ahead = places[: len(key)] - places[: len(query), None] - (len(key) - len(query))
        seen = torch.ones_like(ahead, dtype=torch.bool)
        if left is not None and left >= 0:
            seen &= ahead >= -left
        if right is not None and right >= 0:
            seen &= ahead <= right
        scores = (torch.einsum("qhd,khd->hqk", query, key) * scale).masked_fill(~seen, -torch.inf)
        weights = torch.where(seen.any(1, keepdim=True), scores, 0.0).softmax(-1) * seen
        out.append(torch.einsum("hqk,khd->qhd", weights, value))
    return torch.cat(out)


def flash2(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None,
           causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False,
           return_attn_probs=False, block_table=None):  # fmt: skip
    assert dropout_p == softcap == 0.0 and deterministic and not return_attn_probs
    assert (max_seqlen_q, max_seqlen_k) == (max(LENGTHS_Q), max(LENGTHS_K))
    assert all(isinstance(side, int) for side in window_size)
    right = 0 if causal else window_size[1]
    return windowed_attention(q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale, window_size[0], right)


def flash3(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q=None, seqused_k=None,
           softmax_scale=None, causal=False, qv=None, q_descale=None, k_descale=None, v_descale=None,
           window_size=(-1, -1), attention_chunk=0, softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False,
           sm_margin=0, return_attn_probs=False):  # fmt: skip
    bounds = cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
    options = {"softmax_scale": softmax_scale, "causal": causal, "window_size": window_size}
    return flash2(q, k, v, *bounds, deterministic=deterministic, **options), None


def flash4(q, k, v, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None, seqused_q=None,
           seqused_k=None, page_table=None, softmax_scale=None, causal=False, window_size=(None, None),
           learnable_sink=None, softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False, score_mod=None,
           mask_mod=None, block_sparse_tensors=None, cu_total_m_blocks=None, cu_total_n_blocks=None,
           aux_tensors=None, return_lse=False):  # fmt: skip
    assert -1 not in window_size, "None is without end here"
    bounds = cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
    sides = tuple(-1 if side is None else side for side in window_size)
    options = {"softmax_scale": softmax_scale, "causal": causal, "window_size": sides}
    return flash2(q, k, v, *bounds, deterministic=deterministic, **options), None


STAND_INS = {
    "flash_attn": (2, flash2),
    "flash_attn_3.flash_attn_interface": (3, flash3),
    "flash_attn_interface": (3, flash3),
    "flash_attn.cute": (4, flash4),
}
Install = Callable[..., None]


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Puts stand-ins where flash-attn would be imported from, and nothing else."""

    def put(*names: str) -> None:
        for name in STAND_INS:
            monkeypatch.setitem(sys.modules, name, None)  # an ImportError
        for name in names:
            module = ModuleType(name)
            module.flash_attn_varlen_func = STAND_INS[name][1]  # type: ignore[attr-defined]
            for parent in [name.split(".")[0]] * ("." in name):
                monkeypatch.setitem(sys.modules, parent, sys.modules.get(parent) or ModuleType(parent))
            monkeypatch.setitem(sys.modules, name, module)
        forget()

    def forget() -> None:
        flash.varlen_function.cache_clear()
        dispatch._resolve.cache_clear()

    yield put
    monkeypatch.undo()
    forget()


@windows
@pytest.mark.parametrize("place", STAND_INS)
@pytest.mark.skipif(DEVICE == "cuda", reason="stand-ins are for machines without a GPU")
def test_flash_attn_computes_what_the_reference_says(place: str, window: int | None, install: Install) -> None:
    install(place)
    assert_faithful(partial(flash.attention_flash, STAND_INS[place][0]), window)


@windows
@pytest.mark.skipif(DEVICE == "cuda", reason="stand-ins are for machines without a GPU")
def test_torch_flash_kernel_computes_what_the_reference_says(
    window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    signature = inspect.signature(sdpa.varlen_attn)

    def varlen_attn(*args: Any, **keywords: Any) -> Tensor:
        given = signature.bind(*args, **keywords)
        given.apply_defaults()
        q, k, v, cu_q, cu_k, max_q, max_k = given.args
        assert (max_q, max_k) == (max(LENGTHS_Q), max(LENGTHS_K)) and given.arguments.get("enable_gqa", True)
        return windowed_attention(q, k, v, cu_q, cu_k, given.arguments["scale"], *given.arguments["window_size"])

    monkeypatch.setattr(sdpa, "varlen_attn", varlen_attn)
    monkeypatch.setattr(sdpa, "takes_packed_documents", lambda q: True)
    assert_faithful(sdpa.attention_sdpa, window)


@windows
@pytest.mark.parametrize("provider", ["triton", "sdpa", "auto"])
def test_every_provider_computes_what_the_reference_says(provider: str, window: int | None) -> None:
    assert_faithful(partial(attention, provider=provider), window)


@pytest.mark.parametrize("provider", ["triton", "sdpa", "auto"])
def test_every_provider_finds_its_pages(provider: str) -> None:
    q, k, v = qkv()
    page, cu_seqlens = 4, (bounds(LENGTHS_Q), bounds(LENGTHS_K))
    used = [-(-n // page) for n in LENGTHS_K]
    order = torch.randperm(sum(used), generator=torch.Generator().manual_seed(0)).tolist()
    table = torch.zeros((len(used), max(used)), dtype=torch.int32)
    pools = [torch.full((sum(used), page, *x.shape[1:]), float("nan")) for x in (k, v)]
    for d, documents in enumerate(zip(k.cpu().split(LENGTHS_K), v.cpu().split(LENGTHS_K), strict=True)):
        for i in range(used[d]):
            table[d, i] = order.pop()
            for pool, document in zip(pools, documents, strict=True):
                piece = document[i * page : (i + 1) * page]
                pool[table[d, i], : len(piece)] = piece
    paged = [x.to(DEVICE) for x in (*pools, table)]
    options: dict[str, Any] = {"scale": SCALE, "window": 7}
    oracle.assert_faithful(
        lambda q: attention(
            q,
            *paged[:2],
            *cu_seqlens,
            max(LENGTHS_Q),
            max(LENGTHS_K),
            block_table=paged[2],
            provider=provider,
            **options,
        ),
        lambda q: attention_reference(q, k.to(q.dtype), v.to(q.dtype), *cu_seqlens, **options),
        [q],
        has_gradients=False,
    )


@pytest.mark.gpu
@windows
@pytest.mark.parametrize("provider", ["triton", "flash", "sdpa", "auto"])
def test_every_provider_on_a_gpu(provider: str, window: int | None) -> None:
    if provider == "flash" and flash.flash_version(torch.cuda.get_device_capability()[0] * 10, 16, True) is None:
        pytest.skip("flash-attn is not installed")
    assert_faithful(partial(attention, provider=provider), window, torch.bfloat16)


@pytest.mark.gpu
@pytest.mark.parametrize("provider", ["triton", "sdpa", "auto"])
def test_compiled_graphs_on_a_gpu_are_whole_and_never_wait_for_the_device(provider: str) -> None:
    cu_seqlens = bounds(LENGTHS_Q), bounds(LENGTHS_K)
    run = torch.compile(partial(attention, provider=provider), fullgraph=True, backend="aot_eager")
    inputs = [x.requires_grad_() for x in qkv(torch.bfloat16)]
    run(*inputs, *cu_seqlens, 20, 20).sum().backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(*inputs, *cu_seqlens, 20, 20).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def call(arch: int | None = 90, dtype: torch.dtype = torch.bfloat16, width: int = 128, **facts: Any) -> Call:
    return Call(
        arch, **{"runs_triton": True, "is_paged": False, "has_gradient": False, **facts}, dtype=dtype, width=width
    )


def test_flash_attn_is_taken_in_the_version_for_the_chip(install: Install) -> None:
    install("flash_attn", "flash_attn_interface", "flash_attn.cute")
    assert flash.flash_version(80, 128, True) == 2
    assert flash.flash_version(90, 128, True) == 3
    assert flash.flash_version(90, 256, False) == 3
    assert flash.flash_version(90, 256, True) == 2, "3 has no deterministic backward for wide heads"
    assert flash.flash_version(100, 128, True) == 4
    assert flash.flash_version(90, 512, False) is None
    install("flash_attn.cute")
    assert flash.flash_version(90, 128, True) == 4
    assert flash.flash_version(80, 128, True) is None
    install()
    assert flash.flash_version(90, 128, True) is None


@pytest.mark.parametrize(
    ("provider", "refused", "reason"),
    [
        ("triton", call(dtype=torch.float64, runs_triton=False), "float64 on a GPU.*use sdpa"),
        ("triton", call(is_paged=True, has_gradient=True), "no gradients through a block table"),
        ("triton", call(width=512), "at most 256, not 512"),
        ("flash", call(arch=None), "runs on a GPU; use triton"),
        ("flash", call(dtype=torch.float32), "takes fp16 and bf16, not torch.float32"),
        ("flash", call(is_paged=True), "no block table"),
        ("flash", call(), "not installed in a version for heads of 128 on sm_90"),
    ],
)
def test_what_a_provider_does_not_take_is_refused_with_a_remedy(
    provider: str, refused: Call, reason: str, install: Install
) -> None:
    install()
    with pytest.raises(ValueError, match=reason):
        dispatch._resolve(provider, refused)


def test_the_public_function_refuses_by_the_same_rule(install: Install) -> None:
    cu_seqlens = bounds(LENGTHS_Q), bounds(LENGTHS_K)
    install()
    with pytest.raises(ValueError, match="provider is 'fast'; it must be auto, triton, flash, sdpa"):
        attention(*qkv(), *cu_seqlens, 20, 20, provider="fast")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="attention's provider flash"):
        attention(*qkv(), *cu_seqlens, 20, 20, provider="flash")
    with pytest.raises(ValueError, match="block_table"):
        q, k, v = qkv()
        attention(q, k[None], v[None], *cu_seqlens, 20, 20, block_table=torch.zeros((2, 1), dtype=torch.int32))


def measured(monkeypatch: pytest.MonkeyPatch, **lines: list[str]) -> None:
    table = {
        key.replace("_", " ").replace("sm ", "sm_"): {"order": order, "measured": "x"} for key, order in lines.items()
    }
    monkeypatch.setattr(dispatch, "read_table", lambda: table)


def test_auto_takes_what_the_rule_says(monkeypatch: pytest.MonkeyPatch, install: Install) -> None:
    lines = {"sm_90_128_forward": ["flash", "triton"], "sm_90_128_training": ["sdpa"], "sm_90_96_forward": ["sdpa"]}
    measured(monkeypatch, **lines)
    install("flash_attn_interface")
    assert choose(call()) == "flash"
    assert choose(call(has_gradient=True)) == "sdpa"
    assert choose(call(width=64)) == "triton", "no line for this width"
    assert choose(call(arch=80)) == "triton", "no line for this chip"
    assert choose(call(is_compiling=True)) == "triton", "flash-attn would break the graph"
    assert choose(call(width=96)) == "sdpa"
    assert choose(call(width=96, is_paged=True)) == "triton", "lines are for packed documents"
    assert choose(call(width=96, dtype=torch.float32)) == "triton", "lines are for 16 bits"
    assert choose(call(is_paged=True, has_gradient=True)) == "sdpa"
    assert choose(call(dtype=torch.float64, runs_triton=False)) == "sdpa"
    assert choose(call(width=512)) == "sdpa"
    assert choose(call(arch=89)) == choose(call(arch=120)) == "sdpa"
    assert choose(call(arch=None)) == choose(call(arch=None, dtype=torch.float64, runs_triton=False)) == "triton"
    install()
    assert choose(call()) == "triton", "flash-attn is not installed"


def test_the_table_has_a_line_for_every_chip_width_and_pass_and_says_what_was_measured() -> None:
    keys = {table_key(arch, width, way) for arch in ARCHITECTURES for width in WIDTHS for way in (False, True)}
    assert set(read_table()) == keys
    for key, line in read_table().items():
        order = line["order"]
        assert set(line) == {"order", "measured"} and order and set(order) <= set(dispatch.PROVIDERS), key
        assert "triton" in order, f"{key}: ours is what is left when the others are not installed"
        if line["measured"] is None:
            assert order == ["triton"], f"{key}: nobody has measured it"


def test_no_provider_refuses_what_auto_gives_it(install: Install) -> None:
    install("flash_attn", "flash_attn_interface", "flash_attn.cute")
    for arch in (None, 75, 80, 89, 90, 100):
        for dtype in (torch.float64, torch.float32, torch.bfloat16):
            for width in (16, 80, 256, 512):
                for facts in range(8):
                    is_paged, has_gradient, is_compiling = (bool(facts >> bit & 1) for bit in range(3))
                    one = Call(arch, dtype != torch.float64, dtype, width, is_paged, has_gradient, is_compiling)
                    assert refusal(choose(one), one) is None, one
