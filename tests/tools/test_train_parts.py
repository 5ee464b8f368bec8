"""A profiler's trace becomes parts of a step: kernels by name and by what launched them, gaps by their times."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from tools.train_parts import (
    ATTENTION,
    HEAD,
    OPTIMIZER,
    OTHER,
    PARTS,
    POINTWISE,
    PRODUCTS,
    STEP,
    part_of,
    parts,
    trace,
)

ROOT = Path(__file__).resolve().parents[2]
VOCABULARY = 39424
# Names as profiles of training on A100 and H100 show them.
KERNELS = {
    "nvjet_hsh_256x128_64x4_1x2_h_bz_coopA_NTT": PRODUCTS,
    "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64_cublas": PRODUCTS,
    "ampere_bf16_s16816gemm_bf16_256x128_ldg8_f2f_stages_64x3_nn": PRODUCTS,
    "void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm_bf16_128x256>": PRODUCTS,
    "void cublasLt::splitKreduce_kernel<32, 16, int, float, __nv_bfloat16>": PRODUCTS,
    "void flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel<Flash_bwd_kernel_traits<128>>": ATTENTION,
    "void pytorch_flash::flash_fwd_kernel<pytorch_flash::Flash_fwd_kernel_traits<128>>": ATTENTION,
    "fmha_cutlassB_bf16_aligned_64x64_k128_sm80": ATTENTION,
    "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_32": ATTENTION,
    "void at::native::(anonymous namespace)::multi_tensor_apply_kernel<FusedAdamMathFunctor<float, 4>>": OPTIMIZER,
    "_liger_cross_entropy_kernel": HEAD,
    "liger_cross_entropy_kernel": HEAD,
    "triton_red_fused__log_softmax_nll_loss_forward_3": HEAD,
    "void at::native::(anonymous namespace)::cunn_SoftMaxForward<LogSoftMaxForwardEpilogue>": HEAD,
    "triton_poi_fused__to_copy_mul_silu_1": POINTWISE,
    "triton_red_fused_add_mean_mul_pow_rsqrt_0": POINTWISE,
    "_rms_norm_backward_kernel": POINTWISE,
    "_swiglu_forward_kernel": POINTWISE,
    "_triton_rope": POINTWISE,
    "void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<c10::BFloat16>>": POINTWISE,
    "void at::native::reduce_kernel<512, 1, at::native::ReduceOp<float, at::native::MeanOps>>": POINTWISE,
    "void at::native::unrolled_elementwise_kernel<at::native::direct_copy_kernel_cuda(at::TensorIteratorBase&)>": OTHER,
    "void at::native::vectorized_elementwise_kernel<4, at::native::FillFunctor<float>>": OTHER,
    "Memcpy HtoD (Pinned -> Device)": OTHER,
    "Memset (Device)": OTHER,
    "ncclDevKernel_AllGather_RING_LL(ncclDevKernelArgsStorage<4096>)": OTHER,
    "void at::native::indexSelectLargeIndex<c10::BFloat16, long>": OTHER,
}
OURS = {
    "_adamw_kernel": OPTIMIZER,
    "_sum_of_squares_kernel": OPTIMIZER,
    "_attention_fwd_kernel": ATTENTION,
    "_attention_bwd_dq_kernel": ATTENTION,
    "_attention_bwd_dkdv_kernel": ATTENTION,
    "_schedule_kernel": ATTENTION,
    "_linear_cross_entropy_kernel": HEAD,
    "_linear_logprob_fwd_kernel": HEAD,
    "_linear_logprob_bwd_kernel": HEAD,
    "_rms_norm_fwd_kernel": POINTWISE,
    "_rms_norm_bwd_kernel": POINTWISE,
    "_sum_rows_kernel": POINTWISE,
    "_swiglu_fwd_kernel": POINTWISE,
    "_swiglu_bwd_kernel": POINTWISE,
    "_rotary_kernel": POINTWISE,
    "_low_rank_fwd_kernel": PRODUCTS,
}


@pytest.mark.parametrize(("kernel", "part"), [*KERNELS.items(), *OURS.items()])
def test_a_kernel_is_told_by_its_name(kernel: str, part: str) -> None:
    assert part_of(kernel, (), [], VOCABULARY) == part


def test_the_names_of_our_kernels_are_those_in_their_files() -> None:
    defined = {
        name
        for path in (ROOT / "kernels").rglob("*.py")
        for name in re.findall(r"^def (_\w+_kernel)\(", path.read_text(encoding="utf-8"), re.MULTILINE)
    }
    assert set(OURS) <= defined


@pytest.mark.parametrize(
    ("operator", "shapes", "part"),
    [
        ("aten::mm", [[4096, 4096], [4096, VOCABULARY]], HEAD),
        ("aten::mm", [[VOCABULARY, 4096], [4096, 4096]], HEAD),
        ("aten::mm", [[8192, 4096], [4096, 22016]], PRODUCTS),
        ("aten::addmm", [[VOCABULARY, 4096], [VOCABULARY, 512], [512, 4096]], HEAD),
    ],
)
def test_a_product_with_a_side_as_long_as_the_vocabulary_is_the_heads(
    operator: str, shapes: list[list[int]], part: str
) -> None:
    assert part_of("nvjet_hsh_256x128", (operator,), shapes, VOCABULARY) == part


def test_logits_are_the_heads_and_the_embedding_is_not() -> None:
    cast = "void at::native::unrolled_elementwise_kernel<at::native::direct_copy_kernel_cuda>"
    assert part_of(cast, ("aten::to", "aten::copy_"), [[1, 4096, VOCABULARY]], VOCABULARY) == HEAD
    assert part_of(cast, ("aten::copy_",), [[VOCABULARY, 4096]], VOCABULARY) == OTHER
    assert part_of("embedding_backward_feature_kernel", ("aten::embedding_dense_backward",), [], VOCABULARY) == OTHER


def test_what_calls_an_operator_tells_where_its_name_does_not() -> None:
    add = "void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<float>>"
    assert part_of(add, ("aten::add",)) == POINTWISE
    assert part_of(add, ("optimizer", "aten::_foreach_mul_")) == OPTIMIZER
    assert part_of(add, ("torch::autograd::AccumulateGrad", "aten::add_")) == OTHER
    assert part_of(add, ("aten::scaled_dot_product_attention", "aten::mul")) == ATTENTION
    assert part_of("nvjet", ("chimed_linear_cross_entropy", "aten::mm")) == HEAD


def event(category: str, name: str, begin: float, duration: float, **arguments: Any) -> dict[str, Any]:
    return {"ph": "X", "cat": category, "name": name, "ts": begin, "dur": duration, "tid": 1, "args": arguments}


def gpu_step(begin: float, first: int, device: float) -> list[dict[str, Any]]:
    """A step of which the host launches two kernels in 100 µs, and which the device begins at `device`: a product of
    300 µs, of which a copy covers 100, and after 50 idle µs attention of 200."""
    return [
        event("user_annotation", STEP, begin, 100),
        event("cpu_op", "aten::mm", begin + 10, 20, **{"External id": first, "Input Dims": [[8, 8], [8, 8], []]}),
        event("cuda_runtime", "cudaLaunchKernel", begin + 15, 5, correlation=first),
        event("cuda_driver", "cuLaunchKernel", begin + 50, 5, correlation=first + 1),
        event("cuda_runtime", "cudaMemcpyAsync", begin + 60, 5, correlation=first + 2),
        event("kernel", "nvjet_hsh", device, 300, **{"External id": first, "correlation": first}),
        event("gpu_memcpy", "Memcpy DtoD", device + 100, 100, **{"correlation": first + 2}),
        event("kernel", "_attention_fwd_kernel", device + 350, 200, correlation=first + 1),
        event("gpu_user_annotation", STEP, device, 550),
    ]


def test_parts_of_a_step_are_sums_of_kernels_and_busy_time_counts_overlaps_once() -> None:
    found = parts(gpu_step(0, 1, 1000) + gpu_step(200, 11, 1600), 2, VOCABULARY)
    micro = {part: round(1e6 * seconds, 6) for part, seconds in found.seconds.items()}
    assert micro == {**dict.fromkeys(PARTS, 0.0), PRODUCTS: 300, ATTENTION: 200, OTHER: 100}
    assert found.busy == pytest.approx(500e-6)
    assert found.largest[0] == ("nvjet_hsh", PRODUCTS, pytest.approx(300e-6))


def test_the_gap_between_steps_is_from_the_last_kernel_to_the_next_steps_first() -> None:
    # Both steps are launched before the device begins the first: a kernel's step is told by its launch.
    found = parts(gpu_step(0, 1, 1000) + gpu_step(200, 11, 1600), 2, VOCABULARY)
    assert found.gap == pytest.approx(50e-6)
    three = gpu_step(0, 1, 1000) + gpu_step(200, 11, 1600) + gpu_step(400, 21, 2300)
    assert parts(three, 3, VOCABULARY).gap == pytest.approx((50e-6 + 150e-6) / 2)
    assert parts(gpu_step(0, 1, 1000), 1, VOCABULARY).gap is None


def test_a_processors_operators_count_their_own_time_alone() -> None:
    events = [
        event("user_annotation", STEP, 0, 1000),
        event("cpu_op", "aten::linear", 0, 500, **{"Input Dims": [[8, 8]]}),
        event("cpu_op", "aten::mm", 100, 300, **{"Input Dims": [[8, 8], [8, VOCABULARY]]}),
        event("cpu_op", "aten::as_strided", 410, 50),
        event("cpu_op", "aten::silu", 600, 100),
    ]
    found = parts(events, 1, VOCABULARY)
    micro = {part: round(1e6 * seconds, 6) for part, seconds in found.seconds.items()}
    assert micro == {**dict.fromkeys(PARTS, 0.0), PRODUCTS: 150, HEAD: 300, POINTWISE: 100}
    assert found.gap is None and found.busy == pytest.approx(550e-6)


def test_a_real_trace_has_the_shapes_and_the_nesting_that_this_reads() -> None:
    a, b = torch.randn(64, 32), torch.randn(32, 48)

    def step() -> None:
        with torch.profiler.record_function("optimizer"):
            torch.mul(a, 2.0)
        (a @ b).exp()

    found = parts(trace(step, 2, torch.device("cpu")), 2, 48)
    assert found.seconds[HEAD] > 0 and found.seconds[OPTIMIZER] > 0
    assert found.seconds[PRODUCTS] == found.seconds[ATTENTION] == 0
