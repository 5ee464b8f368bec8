"""Low-rank adaptation: the weights stay as they are, and beside each a product of two thin matrices is trained.

    y = x W^T + s (x A^T) B^T,      A [r, in], B [out, r]           (Hu et al. 2021, section 4.1)
    s = alpha / r, or alpha / sqrt(r) with rsLoRA                    (Kalajdzievski 2023, theorem 3.2)

An adapter belongs to one of Hugging Face's projections; a `model.layers.Linear` holds those of all that are stacked
in its weight. Nothing here knows of sharding or precision: `engine.shard` stores what is frozen in the compute dtype.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from model.config import ModelConfig, parameter_shapes, projections
from model.layers import Linear, LowRank

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""Every projection of a block, by Hugging Face's names."""
TRAINED = ("embed_tokens", "lm_head", "score")
"""Modules that can be trained whole beside the adapters."""


@dataclass(frozen=True)
class LoraSpec:
    """What is trained of a model.

    rank: r, of every adapter.
    alpha: what the product is multiplied by, before the division by r or its root.
    dropout: share of an adapter's inputs that it does not see in training.
    rslora: divide by the root of r.
    targets: projections with an adapter, of TARGETS.
    trained: modules that are trained whole (peft's modules_to_save), of TRAINED.
    """

    rank: int
    alpha: float
    dropout: float = 0.0
    rslora: bool = False
    targets: tuple[str, ...] = TARGETS
    trained: tuple[str, ...] = ()

    @property
    def scale(self) -> float:
        """s"""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    def present(self, parts: Iterable[str]) -> tuple[bool, ...]:
        """Which of some projections have an adapter."""
        return tuple(part in self.targets for part in parts)


def add_lora(model: nn.Module, spec: LoraSpec, seed: int = 0) -> None:
    """Freeze a model but for adapters, which it gets here, and the modules that are trained whole; in place.

    Args:
        model: `CausalLM` or `ScalarModel`, usually on the meta device; before it is sharded.
        seed: of dropout. The adapters' first values are `model.init.initial_value`'s, as all parameters' are.
    """
    model.requires_grad_(False)
    stacked = projections(model.config)
    for name, module in model.model.layers.named_modules():
        parts = stacked.get(name.rpartition(".")[2])
        if isinstance(module, Linear) and parts is not None and any(present := spec.present(parts)):
            module.add_low_rank(spec.rank, LowRank(tuple(parts.values()), present, spec.scale, spec.dropout))
    for name, module in model.named_modules():
        if name.rpartition(".")[2] in spec.trained:
            module.requires_grad_(True)
    if spec.dropout > 0:
        model.register_forward_pre_hook(lambda root, args: _seed_dropout(root, seed, args[0].index))


def lora_shapes(config: ModelConfig, spec: LoraSpec) -> dict[str, tuple[int, ...]]:
    """Name and shape of every adapter parameter, in the order of named_parameters()."""
    stacked = projections(config)
    shapes: dict[str, tuple[int, ...]] = {}
    for name, shape in parameter_shapes(config).items():
        path, _, kind = name.rpartition(".")
        parts = stacked.get(path.rpartition(".")[2], {})
        present = spec.present(parts)
        if kind == "weight" and any(present):
            rows = itertools.compress(parts.values(), present)
            shapes[f"{path}.lora_a"] = (sum(present) * spec.rank, shape[1])
            shapes[f"{path}.lora_b"] = (sum(rows), spec.rank)
    return shapes


def is_trained(name: str, spec: LoraSpec) -> bool:
    """Whether a parameter is trained: one of an adapter, or of a module that is trained whole."""
    *path, kind = name.split(".")
    return kind in ("lora_a", "lora_b") or path[-1] in spec.trained


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Within the context the model computes with its frozen weights alone: the reference of PPO and DPO."""
    terms = [term for term in _terms(model) if term.is_on]
    for term in terms:
        term.is_on = False
    try:
        yield
    finally:
        for term in terms:
            term.is_on = True


def merged(tensors: Iterable[tuple[str, Tensor]], config: ModelConfig, spec: LoraSpec) -> Iterator[tuple[str, Tensor]]:
    """The dense model that weights and adapters make, a module at a time.

    Args:
        tensors: (name, full tensor) of all parameters, in the order of named_parameters().
    Returns:
        (name, tensor) in the order of `parameter_shapes(config)`, weights in their own dtype.
    """
    stacked = projections(config)
    for path, group in itertools.groupby(tensors, key=lambda item: item[0].rpartition(".")[0]):
        own = {name.rpartition(".")[2]: tensor for name, tensor in group}
        if "lora_a" in own:
            parts = stacked[path.rpartition(".")[2]]
            own["weight"] = _merge(own["weight"], own.pop("lora_a"), own.pop("lora_b"), parts, spec)
        yield from ((f"{path}.{kind}", tensor) for kind, tensor in own.items())


def add_product(weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """weight + scale b a, [out, in], in the weight's dtype; summed in fp32 (fp64 for fp64)."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    return torch.addmm(weight.to(wide), b.to(wide), a.to(wide), alpha=scale).to(weight.dtype)


def flops_per_token(config: ModelConfig, spec: LoraSpec | None, context: int) -> float:
    """As `ModelConfig.flops_per_token`, but that frozen matrices need no product for a gradient, and adapters are
    matrices, too."""
    whole = config.flops_per_token(context)
    if spec is None:
        return whole
    shapes = parameter_shapes(config)
    head = next(name for name in ("score.weight", "lm_head.weight", "model.embed_tokens.weight") if name in shapes)
    frozen = config.num_matmul_parameters - (math.prod(shapes[head]) if is_trained(head, spec) else 0)
    return whole - 2 * frozen + 6 * sum(map(math.prod, lora_shapes(config, spec).values()))


def _merge(weight: Tensor, a: Tensor, b: Tensor, parts: dict[str, int], spec: LoraSpec) -> Tensor:
    """[out, in] of a stacked weight: each part with its adapter's product."""
    present = spec.present(parts)
    pairs = zip(a.split(spec.rank), b.split(list(itertools.compress(parts.values(), present))), strict=True)
    rows = zip(weight.split(list(parts.values())), present, strict=True)
    return torch.cat([add_product(part, *next(pairs), spec.scale) if is_there else part for part, is_there in rows])


def _terms(model: nn.Module) -> Iterator[LowRank]:
    for module in model.modules():
        if isinstance(module, Linear) and module.low_rank is not None:
            yield module.low_rank


def _seed_dropout(model: nn.Module, seed: int, pack: Any) -> None:
    """A seed for each adapter's dropout: a function of the run's seed, the pack's number and the adapter's place."""
    for place, term in enumerate(_terms(model)):
        digest = hashlib.blake2b(f"dropout {seed} {pack} {place}".encode(), digest_size=8).digest()
        term.seed = torch.tensor(int.from_bytes(digest, "little") & (2**63 - 1), device="cpu")
