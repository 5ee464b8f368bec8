"""Memory plans from the options of the jobs that sample: who takes part, and in what sizes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from engine.job import StepShape, planned_step
from engine.memory_roles import Role, RolesPlan, RolesSetup, plan_roles
from model.config import PRESETS, ModelConfig
from model.hf import load_config
from rlhf.ppo_config import PpoConfig
from rlhf.rejection_config import RejectionConfig
from rlhf.scores import names_function


def plan_ppo(config: PpoConfig, policy: ModelConfig, shape: StepShape) -> RolesPlan:
    """Plan the phases of an iteration.

    Args:
        policy: its configuration; what the options leave to it, or name a directory for that is not there yet, is of
            its size.
    """
    answers = config.rollout.prompts * config.rollout.samples
    packs = -(-answers * shape.context // (config.ppo.minibatches * shape.tokens_per_pack))  # if all are the longest
    return plan_roles(
        RolesSetup(
            sampler=policy,
            roles=_roles(config, policy),
            step=planned_step(config, replace(shape, packs_per_step=packs)),
            rows=config.rollout.rows,
            answers=answers,
            cache_bytes=config.rollout.cache_bytes,
            keeps_generator=config.rollout.keep,
            reads_pretraining=config.ptx.coef > 0,
        )
    )


def plan_rejection(config: RejectionConfig, policy: ModelConfig, shape: StepShape) -> RolesPlan:
    """Plan sampling and scoring of a round; what fine-tuning needs is planned as any training is."""
    is_function = ":" in config.reward and names_function(config.reward)
    reward = replace(_size(config.reward, policy), head="score", context=policy.rope_length)
    return plan_roles(
        RolesSetup(
            sampler=policy,
            roles={} if is_function else {"reward": Role(reward, is_on_host=True)},
            step=planned_step(config, shape),
            rows=config.rollout.rows,
            answers=config.rollout.chunk,
            cache_bytes=config.rollout.cache_bytes,
            keeps_generator=True,
        )
    )


def _roles(config: PpoConfig, policy: ModelConfig) -> dict[str, Role]:
    waits = config.rollout.offload_moments
    score = replace(policy, head="score")
    is_function = ":" in config.reward.source and names_function(config.reward.source)
    reward = None if is_function else replace(_size(config.reward.source, score), head="score")
    roles = {"policy": Role(policy, is_trained=True, is_on_host=waits)}
    if config.ppo.advantage == "gae":
        critic = _size(config.value.model, reward or score)
        roles["critic"] = Role(replace(critic, head="score"), is_trained=True, is_on_host=waits)
    if config.kl.coef > 0 and not config.reference_is_policy:
        roles["reference"] = Role(_size(config.kl.reference, policy), is_on_host=config.kl.offload)
    if reward is not None:
        roles["reward"] = Role(reward, is_on_host=config.reward.offload)
    return {name: replace(role, config=role.config.with_context(policy.rope_length)) for name, role in roles.items()}


def _size(model: str | None, otherwise: ModelConfig) -> ModelConfig:
    """Of a preset or a directory; else what it is taken for."""
    if model in PRESETS:
        return PRESETS[model]
    return load_config(model) if model is not None and Path(model).is_dir() else otherwise
