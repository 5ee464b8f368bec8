"""Low-rank adapters in a job: the options, and what a run remembers of the weights that its adapters stand on."""

from __future__ import annotations

import math
from collections.abc import Mapping, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine.config import check_range
from engine.launch import speak
from model.config import ModelConfig
from model.directories import lineage
from model.errors import InputError
from model.fingerprint import fingerprint_weights
from model.lora import TARGETS, LoraSpec

ADAPTER_RATE = 10.0
"""Times the learning rate of all weights: the ratio of the best ones ("LoRA Without Regret", Schulman et al. 2025)."""


@dataclass
class LoraConfig:
    """Train low-rank adapters and leave the model's own weights as they are (Hu et al. 2021)."""

    rank: int = 0
    """of every adapter, such as 16; 0 trains all weights instead"""
    alpha: float | None = None
    """an adapter's product is multiplied by alpha / rank; by default twice the rank"""
    dropout: float = 0.0
    """share of an adapter's inputs that it does not see in training"""
    rslora: bool = False
    """multiply by alpha / root of the rank instead (rsLoRA), which suits high ranks"""
    targets: list[str] = field(default_factory=lambda: list(TARGETS))
    """projections that get an adapter"""
    train_embeddings: bool = False
    """also train the embedding and the head of words whole, as new words need it"""

    def __post_init__(self) -> None:
        # No option: what `settle` finds.
        self.of_all_weights: dict[str, float] = {}

    def settle(self, config: Any, recipe: Any, named: Set[str]) -> None:
        """Set aside the learning rates of a recipe that trains all weights, where the command line asks for adapters,
        and those of adapters, where it asks for none.

        Those on the command line hold.
        """
        if bool(self.rank) == bool(recipe.lora.rank):
            return
        named_for, trained = ("all weights", "adapters") if self.rank else ("adapters", "all weights")
        for name in ("optim", "value"):
            group = getattr(config, name, None)
            if group is not None and group.lr is not None and f"{name}.lr" not in named:
                speak(f"The recipe's {name}.lr {group.lr:g} is for {named_for}; {trained} take another (docs/lora.md).")
                if self.rank:
                    self.of_all_weights[name] = group.lr
                group.lr = None

    def rate(self, usual: float, group: str = "optim") -> float:
        """Peak learning rate of what is trained, where none is given.

        Args:
            usual: the job's own, for all weights. group: of options that it belongs to.
        """
        return ADAPTER_RATE * self.of_all_weights.get(group, usual) if self.rank else usual

    def check(self) -> None:
        """Raises InputError where a value makes no sense."""
        check_range("lora", self, 0, "rank")
        check_range("lora", self, 0, "dropout", below=1)
        if self.alpha is not None and not 0 < self.alpha < math.inf:
            raise InputError(f"--lora.alpha is {self.alpha}. Use a number above 0, such as twice the rank.")
        for target in self.targets:
            if target not in TARGETS:
                raise InputError(f"--lora.targets: {target!r} is no projection. Choose from {', '.join(TARGETS)}.")
        if not self.targets:
            raise InputError(f"--lora.targets is empty. Choose from {', '.join(TARGETS)}.")
        if self.rank == 0 and self != LoraConfig():
            usual = vars(LoraConfig())
            changed = next(name for name, value in vars(self).items() if value != usual[name])
            raise InputError(f"--lora.{changed} says nothing without adapters. Add --lora.rank 16, or leave it out.")

    def spec(self) -> LoraSpec | None:
        """What is trained of a model; None for all of it. The head of a reward model is fresh and always trained."""
        if self.rank == 0:
            return None
        return LoraSpec(
            rank=self.rank,
            alpha=2.0 * self.rank if self.alpha is None else self.alpha,
            dropout=self.dropout,
            rslora=self.rslora,
            targets=tuple(target for target in TARGETS if target in self.targets),
            trained=("embed_tokens", "lm_head", "score") if self.train_embeddings else ("score",),
        )

    def describe(self) -> str | None:
        """What a checkpoint must share with a run that goes on from it; None for a run that trains all weights."""
        spec = self.spec()
        if spec is None:
            return None
        scale = f"{'rsLoRA, ' if spec.rslora else ''}alpha {spec.alpha:g}, dropout {spec.dropout:g}"
        whole = ", embeddings" if self.train_embeddings else ""
        return f"rank {spec.rank}, {scale}, {' '.join(spec.targets)}{whole}"


def adapter_rate(model: ModelConfig, lora: LoraConfig) -> float:
    """Peak learning rate of adapters that learn texts or conversations: 3e-4 at width 4096, falling with the root of
    the width; or what a recipe names for all weights, where that is more.

    That is ten times what continued pre-training takes where all weights are trained, the ratio of the best rates that
    Schulman et al. found ("LoRA Without Regret", 2025).
    """
    return max(3e-4 * math.sqrt(4096 / model.hidden_size), lora.of_all_weights.get("optim", 0.0))


@dataclass(frozen=True)
class FrozenBase:
    """The weights that adapters stand on.

    directory: absolute. fingerprint: of the weights in it.
    """

    directory: str
    fingerprint: str


def stand_on(directory: Path | None, model: str, out: str) -> FrozenBase:
    """The base of a run of adapters.

    Args:
        directory: of a model, or of an adapter and so of what the two make; None for a preset.
        model, out: as given, for messages.
    Raises:
        InputError: fresh weights, which nobody could find again; or a directory in the run's own, such as `best`.
    """
    if directory is None:
        raise InputError(
            f"--model {model} is a preset: adapters need trained weights to stand on. Give a model directory, or leave "
            "--lora.rank out."
        )
    run = Path(out).resolve()
    for each in map(Path.resolve, lineage(directory)):
        if run in each.parents:  # that it is none of them is seen before (`engine.out_directory`)
            raise InputError(
                f"--out {out} holds a model that the adapters stand on. Give the run a directory of its own."
            )
    return FrozenBase(str(directory.absolute()), fingerprint_weights(directory))


def require_same_base(
    run: Path, saved: Mapping[str, Any] | None, base: FrozenBase | None, option: str = "--model"
) -> None:
    """See that adapters go on with the weights that they were trained beside.

    Args:
        run: the run directory. saved: what its checkpoint remembers.
        option: that names the weights.
    Raises:
        InputError: they are others.
    """
    if saved is None or base is None or saved["fingerprint"] == base.fingerprint:
        return
    raise InputError(
        f"{run}: its adapters were trained beside weights that lay in {saved['directory']}, and those in "
        f"{base.directory} are others. Give {option} the same weights, another --out for a new run, or --resume never "
        "to start over."
    )
