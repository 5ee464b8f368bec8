"""A language model's directory: what can be known of it before any weight is read."""

from __future__ import annotations

import hashlib
import re
from functools import cached_property
from pathlib import Path

import torch

from engine.conversion import DTYPES, end_ids
from engine.inspection import is_scorer
from engine.publish import require_model
from model.chat import ChatTemplate, resolve_template
from model.config import ModelConfig
from model.directories import is_adapter, read_json
from model.errors import InputError
from model.fingerprint import add_weights
from model.generate import Generator
from model.hf import load_config
from model.tokenizer import Tokenizer, has_tokenizer


class ModelDirectory:
    """What a model that writes is made of.

    template: its chat template; None for a base that stores none.
    stop_ids: the template's end token, the tokenizer's, and whatever else the directory says ends a text, so that
        answers end where transformers' `generate` ends them.
    """

    def __init__(self, directory: Path, config: ModelConfig, tokenizer: Tokenizer, template: ChatTemplate | None):
        """Use `open`."""
        self.path, self.config, self.tokenizer, self.template = directory, config, tokenizer, template
        ends = (tokenizer.eos_id,) if template is None else template.end_ids(tokenizer)
        self.stop_ids = tuple(dict.fromkeys((*ends, *end_ids(config, directory))))

    @classmethod
    def open(cls, model: str, template: str = "auto") -> ModelDirectory:
        """Read everything but the weights.

        Args:
            template: "auto" for the directory's own, if it has one; a name, or a file in .jinja.
        Raises:
            InputError: it is no model, not whole, or one that does not write.
        """
        if not Path(model).is_dir():
            raise InputError(f"--model {model}: there is no such directory. Run tools/sft.py first, or give another.")
        directory = require_model(model)
        if not is_adapter(directory) and is_scorer(read_json(directory / "config.json")):
            raise InputError(f"{directory} is a reward model: it scores answers and gives none. Give a language model.")
        if not has_tokenizer(directory):
            raise InputError(f"{directory} holds no tokenizer. Copy its files from the model that it was trained from.")
        tokenizer = Tokenizer.load(directory)
        is_bare = template == "auto" and ChatTemplate.of(tokenizer) is None
        chat_template = None if is_bare else resolve_template(template, tokenizer)
        return cls(directory, load_config(directory, "lm"), tokenizer, chat_template)

    @cached_property
    def fingerprint(self) -> str:
        """Of everything in the directory that decides what the model writes."""
        return fingerprint_model(self.path, self.config, self.tokenizer)

    def generator(
        self, *, device: str | None = None, dtype: str = "auto", context: int | None = None, max_rows: int = 1
    ) -> Generator:
        """Read the weights.

        Args:
            dtype: as in `resolve_dtype`.
            device, context, max_rows: as in `Generator`.
        Raises:
            InputError: there is no such device, or its memory does not do.
        """
        place = resolve_device(device)
        return Generator.from_directory(
            self.path,
            tokenizer=self.tokenizer,
            device=place,
            dtype=resolve_dtype(dtype, place),
            context=context,
            max_rows=max_rows,
        )


def fingerprint_model(directory: Path, config: ModelConfig, tokenizer: Tokenizer) -> str:
    """128 bits in hex over the configuration, the tokenizer and samples of all files of weights."""
    digest = hashlib.sha256(f"{config} {tokenizer.fingerprint}".encode())
    add_weights(digest, directory)
    return digest.hexdigest()[:32]


def resolve_device(name: str | None) -> torch.device:
    """A device by its name; by default the GPU if there is one. Raises InputError: there is none of this name here."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found = re.fullmatch("cpu|cuda(?::([0-9]+))?", name)
    if found is None:
        raise InputError(f"--device {name}: no such device. Use cuda, cuda:1 or cpu.")
    if name != "cpu" and int(found[1] or 0) >= torch.cuda.device_count():
        raise InputError(f"--device {name}: there is no such GPU here. Use another, or cpu.")
    return torch.device(name)


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """One of `engine.conversion.DTYPES`; auto: bfloat16 on a GPU, float32 on a CPU."""
    return DTYPES[("bfloat16" if device.type == "cuda" else "float32") if name == "auto" else name]
