"""The rejection-sampling job: from options to prompts, a judge and rounds of them."""

from __future__ import annotations

import dataclasses
import json
import tempfile
from pathlib import Path
from typing import Any

from engine.agreement import ControlGroup
from engine.building import Base, find_trained, make_run_directory
from engine.config import to_yaml
from engine.dry_run import planned_device, planned_world
from engine.files import write_durably
from engine.job import STORED, begin_anew, plan_alone, plan_report, resolve_precision, resolve_shape
from engine.launch import speak
from engine.memory_roles_advice import describe_roles
from engine.mesh import start, stop
from engine.sft import read_chat_base
from model.errors import InputError
from rlhf.draws import Draws
from rlhf.memory import plan_rejection
from rlhf.ppo_config import RewardConfig
from rlhf.prompts import open_split_prompts
from rlhf.rejection import Rounds
from rlhf.rejection_config import RejectionConfig
from rlhf.rejection_report import describe_gain
from rlhf.reward_model import open_reward_model
from rlhf.rollout import Rollout
from rlhf.scores import names_function, open_scorer

GIB = 2**30


def rejection(config: RejectionConfig) -> None:
    """Run the whole job: read prompts, go on or begin, then round by round; publish, and say what it has brought.

    Raises:
        InputError: anything the user gave that cannot work, found before the first sample where possible.
        DivergedError, StoppedError: see `engine.loop.train`.
    """
    config.check()
    directory = Path(config.out)
    base = find_trained(config.model, "tools/sft.py", is_planned=config.dry_run)
    if config.dry_run:
        return dry_run(config, base)
    runtime = start(config.parallel)
    shape = resolve_shape(config.train, base.config, runtime.world)
    with runtime.main_first():
        if runtime.is_main:
            make_run_directory(directory)
        tokenizer, template, model = read_chat_base(base, config.tokenizer, config.chat)
        is_function = names_function(config.reward)
        reward = None if is_function else open_reward_model(config.reward, tokenizer, template, model.vocab_size)
        prompts, held_out = open_split_prompts(
            config.data, config.eval, config.rollout.max_new_tokens, template, tokenizer, shape.context, directory
        )
    model = model.with_context(shape.context)
    train = dataclasses.replace(config.train, context=shape.context)
    recipe = dataclasses.replace(config, train=train)
    if runtime.is_main:
        speak(describe(recipe, model.num_parameters, len(prompts), len(held_out), runtime.world))
    precision = resolve_precision(config.train, runtime)
    judged_by = RewardConfig(config.reward, clip=0.0, missing_end_penalty=0.0, offload=True)
    scorer = open_scorer(judged_by, reward, shape.context, shape.tokens_per_pack, recipe, precision, runtime)
    rollout = Rollout(
        model,
        tokenizer,
        template.end_ids(tokenizer),
        seed=config.seed,
        dtype=STORED[precision],
        context=shape.context,
        rows=config.rollout.rows,
        cache_bytes=None if config.rollout.cache_gib is None else int(config.rollout.cache_gib * GIB),
        keep=True,
    )
    if config.resume == "never":
        begin_anew(directory, runtime)
    ranks = ControlGroup()
    facts = {
        "tokenizer": tokenizer.fingerprint,
        "template": f"{template.name} ({template.fingerprint[:8]})",
        "context": shape.context,
        "prompts": prompts.fingerprint,
        "held_out": held_out.fingerprint,
    }
    ranks.first(f"begin in {directory}", lambda: _keep_identity(recipe, facts))
    rounds = Rounds(recipe, runtime, ranks, tokenizer, template, shape.context, prompts, held_out, rollout, scorer)
    rounds.run()
    if runtime.is_main and len(held_out):
        before, after = (Draws(rounds.folder(number) / "held_out.jsonl") for number in (0, config.rounds))
        print(describe_gain(before, after))
    speak(f"Done: {directory} is a model directory.")
    stop()


def dry_run(config: RejectionConfig, base: Base) -> None:
    """Print the memory plan, what a round samples and one prompt to stdout."""
    shape = resolve_shape(config.train, base.config, planned_world(config.plan))
    policy = base.config.with_context(shape.context)
    print(f"sampling and scoring\n{describe_roles(plan_rejection(config, policy, shape), planned_device(config.plan))}")
    print("fine-tuning")
    if base.directory is None and config.tokenizer is None:
        return plan_alone(config, base.config)
    tokenizer, template, model = read_chat_base(base, config.tokenizer, config.chat)
    with tempfile.TemporaryDirectory() as beside:
        prompts, held_out = open_split_prompts(
            config.data, config.eval, config.rollout.max_new_tokens, template, tokenizer, shape.context, Path(beside)
        )
        print(plan_report(config, model, shape))
        print(describe(config, model.num_parameters, len(prompts), len(held_out), planned_world(config.plan)))
        print(f"a prompt as {template.name} writes it:\n{tokenizer.decode(prompts.prompt(0).ids)}")


def describe(config: RejectionConfig, parameters: int, prompts: int, held_out: int, world: int) -> str:
    """What is about to happen, in a few lines."""
    rollout, chosen = config.rollout, config.select
    asked = min(prompts, rollout.prompts or prompts)
    count = f"{chosen.keep:.0%}" if chosen.by == "fraction" else f"{chosen.keep:,.0f}"
    whose = "all answers" if chosen.by == "top" else "each prompt's answers"
    return (
        f"{parameters:,} parameters; {prompts:,} prompts to train on, {held_out:,} held out.\n"
        f"{config.rounds} round{'s' if config.rounds > 1 else ''} of {asked:,} prompts x {rollout.samples} answers of "
        f"at most {rollout.max_new_tokens:,} tokens on {world} process{'es' if world > 1 else ''}; kept: the best "
        f"{count} of {whose}{' of all rounds so far' if chosen.earlier_rounds and config.rounds > 1 else ''}."
    )


def _keep_identity(config: RejectionConfig, facts: dict[str, Any]) -> None:
    """Write down what decides the samples, or see that it is what an earlier command wrote.

    Raises:
        InputError: it is something else.
    """
    directory = Path(config.out)
    (directory / "rounds").mkdir(exist_ok=True)
    decisive = {name: getattr(config, name) for name in ("model", "reward", "seed", "begin")}
    for group in ("select", "rollout"):
        decisive |= {f"{group}.{name}": value for name, value in vars(getattr(config, group)).items()}
    asked = json.loads(json.dumps({**facts, **decisive}))
    kept = directory / "rounds" / "identity.json"
    if kept.exists():
        for name, value in json.loads(kept.read_text(encoding="utf-8")).items():
            if asked[name] != value:
                raise InputError(
                    f"{directory}: its samples were drawn with {name} {value!r}, this command asks for "
                    f"{asked[name]!r}. Use the same options to go on, another --out for a new run, or --resume never "
                    "to start over."
                )
    else:
        write_durably(kept, json.dumps(asked, indent=1, ensure_ascii=False) + "\n")
    write_durably(directory / "config.yaml", to_yaml(config))
