"""What PPO can be told, one concern a group; docs/ppo.md says where each default comes from."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

from engine.config import check_range
from engine.guard import GuardConfig
from engine.job import TrainConfig
from engine.loggers import LogConfig
from engine.loop import CheckpointConfig
from engine.optim import OptimConfig
from engine.schedule import ScheduleConfig
from model.errors import InputError
from rlhf.sampling_config import HeldOutPromptsConfig, SamplingConfig, SamplingJobConfig

LEARNING_RATE, VALUE_LEARNING_RATE = 1e-6, 9e-6
Advantage = Literal["gae", "group", "rloo"]


@dataclass
class RewardConfig:
    """What answers are judged by."""

    source: str = "ckpt/rm"
    """reward model's directory, or module:function, called with a list of answers and giving a list of numbers"""
    clip: float | None = None
    """largest score either way; by default 5 (deviations) for a reward model and none for a function; 0 is none"""
    missing_end_penalty: float = 1.0
    """taken off the score of an answer that did not end by itself"""
    normalise: bool = False
    """scale scores by their running mean and deviation, before clipping"""
    offload: bool = False
    """the reward model waits in host memory while it is not at work"""

    def check(self) -> None:
        """Raises InputError where a number makes no sense."""
        check_range("reward", self, 0, "clip", "missing_end_penalty")


@dataclass
class PpoEvalConfig(HeldOutPromptsConfig):
    """Held-out prompts: which, how many, how often."""

    every: int = 20
    """iterations between looks at held-out prompts; 0 looks only before and at the end"""


@dataclass
class PpoLogConfig(LogConfig):
    """What is reported, and how often."""

    every: int = 1
    """iterations between lines of progress; metrics.jsonl holds every iteration"""
    samples: int = 16
    """answers of each iteration that samples.jsonl holds, and each look at held-out prompts"""

    def check(self) -> None:
        """Raises InputError where a number makes no sense, or wandb is asked for and not installed."""
        super().check()
        check_range("log", self, 0, "samples")


@dataclass
class RolloutConfig(SamplingConfig):
    """What is sampled in an iteration. Nothing is ever filtered: ratios would be wrong."""

    prompts: int = 512
    """prompts an iteration"""
    samples: int = 1
    """answers a prompt; group and rloo need 2 or more"""
    temperature: float = 1.0
    """of sampling, and of every log-probability that is trained on"""
    keep: bool = False
    """keep the generator's weights and cache between rollouts, instead of freeing them for the update"""
    offload_moments: bool = False
    """optimizer moments of policy and critic wait in host memory meanwhile"""

    def check(self) -> None:
        """Raises InputError where a number makes no sense."""
        super().check()
        check_range("rollout", self, 1, "prompts")


@dataclass
class KlConfig:
    """What keeps the policy near the reference."""

    coef: float = 0.05
    """weight of the KL divergence in nats against the score; 0 is none, and no reference is loaded"""
    place: Literal["reward", "loss"] = "reward"
    """reward: taken off each token's reward, as in PPO; loss: added to the loss, as in GRPO"""
    estimator: Literal["k1", "k2", "k3"] | None = None
    """of a token's divergence; by default k1 in the reward and k2 in the loss, which have the right gradient"""
    target: float | None = None
    """nats an answer that an adaptive coefficient steers to; by default the coefficient is fixed"""
    horizon: int = 10_000
    """answers over which an adaptive coefficient moves"""
    reference: str | None = None
    """model directory of the reference; by default the model that training starts from, with adapters their base"""
    offload: bool = False
    """the reference waits in host memory while it is not at work"""

    def check(self) -> None:
        """Raises InputError where a value makes no sense, or the estimator has no gradient to give."""
        check_range("kl", self, 0, "coef")
        check_range("kl", self, 1e-6, "target")
        check_range("kl", self, 1, "horizon")
        if self.target is not None and not self.coef:
            raise InputError("--kl.target steers a coefficient that is 0 and stays 0. Give --kl.coef, such as 0.05.")
        if self.place == "loss" and self.estimator == "k1":
            raise InputError(
                "--kl.estimator k1 pulls nowhere in the loss: its gradient is 0 on average. Use k2 there, or "
                "--kl.place reward."
            )

    @property
    def kind(self) -> Literal["k1", "k2", "k3"]:
        """The estimator that is used."""
        return self.estimator or ("k1" if self.place == "reward" else "k2")


@dataclass
class AlgorithmConfig:
    """How the policy learns from an iteration's answers."""

    advantage: Advantage = "gae"
    """gae: with a critic (PPO); group: against the prompt's other answers (GRPO); rloo: leave one out (RLOO)"""
    epochs: int = 4
    """passes over an iteration's answers"""
    minibatches: int = 1
    """optimizer steps a pass"""
    clip: float = 0.2
    """the ratio's useful range is 1 - clip to 1 + clip"""
    clip_high: float | None = None
    """the range's upper end, where it is another"""
    dual_clip: float | None = None
    """bound on ratio x advantage where the advantage is negative, such as 3; by default none"""
    entropy: float = 0.0
    """weight of the entropy bonus"""
    gamma: float = 1.0
    """discount of later rewards"""
    lam: float = 0.95
    """decay of GAE: 1 trusts returns, 0 the critic"""
    truncated: Literal["zero", "bootstrap"] = "zero"
    """what GAE takes a cut answer to be still worth: nothing, or what the critic says"""
    whiten: bool = True
    """gae and rloo: advantages get mean 0 and deviation 1 over the whole iteration; group: divide by the group's
    deviation"""
    old_logprobs: Literal["recompute", "rollout"] = "recompute"
    """where ratios come from: a forward pass of the policy, or the sampler, which saves that pass"""

    def check(self) -> None:
        """Raises InputError where a number makes no sense."""
        check_range("ppo", self, 1, "epochs", "minibatches")
        check_range("ppo", self, 1e-6, "clip", "clip_high")
        check_range("ppo", self, 0, "entropy")
        for name in ("gamma", "lam"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"--ppo.{name} is {getattr(self, name)}. Use a value from 0 to 1.")
        if self.clip >= 1:
            raise InputError(f"--ppo.clip is {self.clip}. Use a value below 1, such as 0.2.")
        if self.dual_clip is not None and self.dual_clip <= 1:
            raise InputError(f"--ppo.dual_clip is {self.dual_clip}. Use a value above 1, such as 3.")


@dataclass
class PretrainingMixConfig:
    """PPO-ptx: what the policy goes on reading, so that it forgets nothing."""

    coef: float = 0.0
    """weight of its loss in nats a token beside the policy's; 0 is none"""
    paths: list[str] = field(default_factory=list)
    """files, directories, glob patterns or prepared directories"""
    kind: Literal["texts", "conversations"] = "texts"
    """what they hold"""
    batch_tokens: int | None = None
    """tokens read for each step of the policy, over all processes; by default a micro-batch a process"""

    def check(self) -> None:
        """Raises InputError where a value makes no sense."""
        check_range("ptx", self, 0, "coef")
        check_range("ptx", self, 1, "batch_tokens")
        if (self.coef > 0) != bool(self.paths):
            raise InputError("--ptx.coef and --ptx.paths go together: give both, or neither.")


@dataclass
class ValueConfig:
    """The critic, where the advantage needs one."""

    model: str | None = None
    """directory it starts from; by default the reward model, else the policy with a head of zeros"""
    lr: float | None = None
    """peak learning rate; by default 9e-6, with adapters ten times that"""
    warmup: int = 0
    """first iterations, in which the critic learns alone"""
    clip: float = 0.2
    """how far a value may move from what it was before the update, in deviations of the score; 0 is any"""

    def check(self) -> None:
        """Raises InputError where a number makes no sense."""
        check_range("value", self, 0, "warmup", "clip")
        check_range("value", self, 1e-12, "lr")


@dataclass
class LimitsConfig:
    """What ends a run with exit code 3, when it holds for `patience` iterations in a row."""

    kl: float | None = 100.0
    """nats an answer from the reference, more"""
    entropy: float | None = 0.01
    """nats a token, less"""
    truncated: float | None = 0.95
    """share of answers that did not end, more"""
    length: float | None = None
    """mean tokens an answer, more"""
    reward_std: float | None = None
    """deviation of the iteration's scores, less"""
    patience: int = 3
    """iterations in a row"""

    def check(self) -> None:
        """Raises InputError where a number makes no sense."""
        check_range("limits", self, 0, "kl", "entropy", "truncated", "length", "reward_std")
        check_range("limits", self, 1, "patience")


@dataclass
class PpoTrainConfig(TrainConfig):
    """Sizes, and how long to train."""

    steps: int | None = None
    """iterations, each a rollout and its updates; by default as many as `epochs` needs"""
    epochs: float = 1.0
    """passes over the prompts, where `steps` is not given"""
    context: int | None = None
    """longest prompt with its answer, in tokens; by default the model's"""
    micro_batch_tokens: int | None = None
    """tokens of one forward pass; by default the context, at least 1024"""
    batch_tokens: int | None = None
    """not of PPO: a step takes a share of the iteration's answers"""

    def check(self) -> None:
        """Raises InputError where a number makes no sense."""
        super().check()
        if self.batch_tokens is not None:
            raise InputError(
                "--train.batch_tokens has no meaning here: a step takes the answers of --rollout.prompts times "
                "--rollout.samples over --ppo.minibatches. Leave it out."
            )


@dataclass
class PpoConfig(SamplingJobConfig):
    """Improve a fine-tuned model by its own answers, judged by a reward model or a function."""

    model: str = "ckpt/sft"
    """policy to start from, such as fine-tuning leaves"""
    out: str = "ckpt/ppo"
    """run directory"""
    seed: int = 0
    """of the order of prompts, of sampling and of minibatches"""
    train: PpoTrainConfig = field(default_factory=PpoTrainConfig)
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(eps=1e-5, weight_decay=0.0))
    schedule: ScheduleConfig = field(
        default_factory=lambda: ScheduleConfig(kind="linear", warmup_ratio=0.0, final_ratio=0.0)
    )
    # Losses and gradients leap when a rare reward is found, and clipping bounds the step: no finite one is refused.
    guard: GuardConfig = field(default_factory=lambda: GuardConfig(loss_leap=1e30, norm_leap=1e30))
    checkpoint: CheckpointConfig = field(default_factory=lambda: CheckpointConfig(every=20))
    eval: PpoEvalConfig = field(default_factory=PpoEvalConfig)
    log: PpoLogConfig = field(default_factory=PpoLogConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    kl: KlConfig = field(default_factory=KlConfig)
    ppo: AlgorithmConfig = field(default_factory=AlgorithmConfig)
    value: ValueConfig = field(default_factory=ValueConfig)
    ptx: PretrainingMixConfig = field(default_factory=PretrainingMixConfig)
    limits: LimitsConfig = field(default_factory=LimitsConfig)

    def reads(self) -> dict[str, str | None]:
        """As in every job, and the other roles' models."""
        others = {
            "--reward": self.reward.source,
            "--kl.reference": self.kl.reference,
            "--value.model": self.value.model,
        }
        return {**super().reads(), **others}

    def check(self) -> None:
        """Raises InputError where values make no sense, by themselves or together."""
        super().check()
        rollout, ppo = self.rollout, self.ppo
        if ppo.advantage != "gae" and rollout.samples < 2:
            raise InputError(
                f"--ppo.advantage {ppo.advantage} compares answers to one prompt, but --rollout.samples is "
                f"{rollout.samples}. Use 2 or more."
            )
        answers = rollout.prompts * rollout.samples
        if ppo.minibatches > answers:
            raise InputError(
                f"--ppo.minibatches {ppo.minibatches} is more than the {answers} answers of an iteration. Lower it, "
                "or raise --rollout.prompts."
            )
        if self.optim.z_loss:
            raise InputError("--optim.z_loss has no meaning here. Leave it at 0.")
        if self.lora.dropout:
            raise InputError(
                f"--lora.dropout is {self.lora.dropout}, but ratios compare the policy with the one that answered, and "
                "dropout would part the two. Leave it at 0."
            )

    @property
    def reference_is_policy(self) -> bool:
        """Whether the reference is the policy with its adapters off, and no model of its own."""
        is_frozen = self.lora.rank > 0 and not self.lora.train_embeddings
        return is_frozen and self.kl.coef > 0 and self.kl.reference is None

    def with_rates(self) -> PpoConfig:
        """With the peak learning rates that were not asked for: of all weights, or of adapters."""
        return replace(
            self,
            optim=replace(self.optim, lr=self.optim.lr or self.lora.rate(LEARNING_RATE)),
            value=replace(self.value, lr=self.value.lr or self.lora.rate(VALUE_LEARNING_RATE, "value")),
        )
