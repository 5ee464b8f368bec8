"""From a preset's name or a model directory to a sharded model with its weights, and back to a directory."""

from __future__ import annotations

import dataclasses
import itertools
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from engine.agreement import ControlGroup
from engine.files import explain
from engine.launch import speak
from engine.masters import masters
from engine.mesh import Runtime
from engine.out_directory import published
from engine.publish import STATE, holds_model_or_run, publish, require_model
from engine.shard import fill
from model.config import PRESETS, Head, ModelConfig, parameter_shapes
from model.errors import InputError
from model.fingerprint import fingerprint_weights
from model.hf import load_config, read_model, write_model
from model.init import initial_value
from model.lora import LoraSpec, is_trained, lora_shapes
from model.peft import read_adapter, write_adapter
from model.tokenizer import Tokenizer, has_tokenizer


@dataclass(frozen=True)
class Base:
    """Where training starts: a preset with fresh weights, or a directory with trained ones.

    directory: None for a preset.
    adapters: the directory of an adapter that stands on it and is trained on; None for a fresh one.
    """

    config: ModelConfig
    directory: Path | None
    adapters: Path | None = None

    @property
    def is_pretrained(self) -> bool:
        return self.directory is not None


def find_base(model: str) -> Base:
    """Resolve `--model`.

    Raises:
        InputError: neither a preset nor a complete model directory.
    """
    if model in PRESETS:
        return Base(PRESETS[model], None)
    if not Path(model).exists():
        presets = ", ".join(PRESETS)
        raise InputError(f"--model {model}: neither a preset ({presets}) nor a directory. Check the spelling.")
    return _open_base(model, "lm")


def find_trained(
    model: str, maker: str, head: Head | None = "lm", is_planned: bool = False, option: str = "--model"
) -> Base:
    """Resolve `--model` of a job that goes on from trained weights, or another option that names some.

    Args:
        maker: the tool that makes what the job goes on from, for messages.
        head: what the model must have; None for any.
        is_planned: nothing is trained, so a preset will do: its size is what is asked about.
        option: for messages.
    Raises:
        InputError: a preset, no complete model directory, or a model with the other head.
    """
    if Path(model).exists():
        if not holds_model_or_run(Path(model)):
            raise InputError(
                f"{option} {model}: it holds no config.json, so it is no model directory. Run {maker} first, or give a "
                "Hugging Face model directory."
            )
        return _open_base(model, head)
    if is_planned and model in PRESETS:
        return Base(PRESETS[model], None)
    found = "a preset, whose weights are fresh, but this job goes on from trained ones"
    raise InputError(
        f"{option} {model}: {found if model in PRESETS else 'no such directory'}. Run {maker} first, or give a Hugging "
        "Face model directory."
    )


def _open_base(model: str, head: Head | None) -> Base:
    directory = require_model(model)
    return Base(load_config(directory, head), directory)


def require_weights(base: Base) -> None:
    """See that the weights to begin with are whole and of the model's shapes, by the heads of their files alone.

    Raises:
        InputError: they are not, or not there.
    """
    if base.directory is not None:
        read_model(base.directory, base.config)  # reads no tensor until one is asked for


def fit_vocabulary(base: Base, tokenizer: Tokenizer) -> ModelConfig:
    """The model's configuration for this tokenizer: a preset takes its size, a trained model must have it.

    Raises:
        InputError: the tokenizer has more ids than the model has rows, or is not the one the model came with.
    """
    if base.directory is None:
        return dataclasses.replace(
            base.config,
            vocab_size=tokenizer.padded_vocab_size,
            bos_token_id=tokenizer.bos_id,
            eos_token_id=tokenizer.eos_id,
            pad_token_id=tokenizer.pad_id,
        )
    if tokenizer.vocab_size > base.config.vocab_size:
        raise InputError(
            f"The tokenizer has {tokenizer.vocab_size} ids, the model in {base.directory} only "
            f"{base.config.vocab_size} rows. Use the model's own tokenizer, or extend the model with "
            "tools/train_tokenizer.py --extend."
        )
    if has_tokenizer(base.directory) and Tokenizer.load(base.directory).fingerprint != tokenizer.fingerprint:
        raise InputError(
            f"--tokenizer is not the one in {base.directory}; its ids would mean other words. "
            "Leave --tokenizer out, or extend the model with tools/train_tokenizer.py --extend."
        )
    return base.config


def base_tokenizer(base: Base, given: str | None) -> Tokenizer | None:
    """The tokenizer given, or the base's own; None for a preset.

    Raises:
        InputError: the directory given holds none, or trained weights come without one.
    """
    if given is not None:
        return Tokenizer.load(given)
    if base.directory is None:
        return None
    if not has_tokenizer(base.directory):
        raise InputError(f"{base.directory} holds no tokenizer. Give --tokenizer the one it was trained with.")
    return Tokenizer.load(base.directory)


def make_run_directory(directory: Path) -> None:
    """Create a run directory, or see that an existing one can be written to.

    Raises:
        InputError: it cannot.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        probe = directory / ".writable"
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise InputError(f"--out {directory}: {explain(error)}") from None


# What a run directory holds that is no result: it may serve the next run.
_KEPT = ("prepared", "sample")


def set_run_aside(directory: Path, moving_in: Mapping[str, str]) -> None:
    """Move an earlier run's state, model and metrics to `replaced-<n>`, a run directory of its own, to begin anew; or a
    model or tokenizer that no run has left.

    Args:
        moving_in: folders that the new run has made for itself, if it has, and their names from now on.
    Raises:
        InputError: the filesystem refuses.
    """
    aside = next(path for n in itertools.count(1) if not (path := directory / f"replaced-{n}").exists())
    # The state goes first: whatever happens then, nobody resumes from it here.
    entries = sorted(directory.iterdir(), key=lambda entry: entry.name not in STATE)
    stays = {*_KEPT, *moving_in}
    try:
        if any((directory / name).is_dir() for name in STATE) or published(directory):
            aside.mkdir()
            for entry in entries:
                if entry.name not in stays and not entry.name.startswith("replaced-"):
                    entry.rename(aside / entry.name)
            speak(f"The earlier run is now in {aside}.")
        for name, new_name in moving_in.items():
            if (directory / name).exists():
                shutil.rmtree(directory / new_name, ignore_errors=True)
                (directory / name).rename(directory / new_name)
    except OSError as error:
        raise InputError(f"--out {directory}: {explain(error)}") from None


def fill_from_base(
    model: nn.Module, config: ModelConfig, base: Base, seed: int, runtime: Runtime, lora: LoraSpec | None = None
) -> None:
    """Give a sharded model its first weights: the base's, and fresh ones where it has none (all of a preset, adapters,
    the head of a reward model that begins as a language model). They do not depend on the world size."""

    def values() -> Iterator[tuple[str, Tensor]]:
        fresh = parameter_shapes(config) | ({} if lora is None else lora_shapes(config, lora))
        for name, tensor in () if base.adapters is None else read_adapter(base.adapters, config):
            del fresh[name]
            yield name, tensor
        if base.directory is not None:
            for name, tensor in read_model(base.directory, base.config):
                if fresh.pop(name, None) is not None:  # a reward model has no use for the head of words
                    yield name, tensor
        for name, shape in fresh.items():
            yield name, initial_value(config, name, shape, seed, runtime.device)

    fill(model, values())


def publisher(
    model: nn.Module,
    config: ModelConfig | Callable[[], ModelConfig],
    tokenizer: Tokenizer,
    stage: str,
    dtype: torch.dtype,
    lora: LoraSpec | None = None,
    base: Path | None = None,
) -> Callable[[Path, int], None]:
    """A function that publishes the model as it is, to a directory, after so many steps. It is a collective.

    Args:
        config: of the model; or what gives it then, on every rank, where the weights decide it.
        dtype: of the published weights; adapters stay fp32.
        lora, base: of a model with adapters, of which they alone are published: what is trained, and the directory
            that its frozen weights are from.
    """

    ranks = ControlGroup()
    # Of what was read: whoever trains the base on, while this run goes on, must not pass for it.
    fingerprint = None if base is None or lora is None else fingerprint_weights(base)

    def publish_to(directory: Path, step: int) -> None:
        facts = config if isinstance(config, ModelConfig) else config()

        def write(directory: Path, tensors: Iterator[tuple[str, Tensor]]) -> None:
            if lora is None:
                write_model(directory, facts, tensors, dtype)
            else:
                assert base is not None
                write_adapter(directory, facts, lora, base, tensors, fingerprint=fingerprint)
            tokenizer.save(directory)

        parameters = masters(model.named_parameters())
        if lora is None:
            publish(directory, parameters, write, ranks, step=step, stage=stage, dtype=dtype)
        else:
            trained = ((name, parameter) for name, parameter in parameters if is_trained(name, lora))
            publish(directory, trained, write, ranks, step=step, stage=stage)

    return publish_to
