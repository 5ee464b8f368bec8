"""Model directories from other stacks to ours and back, one tensor at a time.

Both ways give a new directory, or none: everything is written to a folder beside it, flushed, and takes its name at
the end. What differs is what stands in it. `import_model` adds the marker of a whole model that our own jobs leave;
`export_model` writes nothing that only we know.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import reduce
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from engine.checkpoint_weights import read_checkpoint
from engine.files import human_size, new_directory, sync_tree, write_durably
from engine.live_line import LiveLine
from engine.publish import mark_complete, require_model
from model.chat import ChatTemplate
from model.config import ModelConfig
from model.directories import is_adapter, lineage, read_json
from model.errors import InputError
from model.hf import hf_parameters, load_config, read_model, write_model
from model.tokenizer import Tokenizer, has_tokenizer
from model.tokenizer_resize import VOCABULARY_TENSORS, extend_rows
from model.weight_files import DTYPE_NAMES, TensorStore

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_GENERATION = "generation_config.json"
_DOING = {"import": "Importing", "merge": "Merging"}


class Converted(NamedTuple):
    """What was written."""

    directory: Path
    config: ModelConfig
    dtype: torch.dtype

    def __str__(self) -> str:
        sizes = [file.stat().st_size for file in self.directory.glob("*.safetensors")]
        files = f"{human_size(sum(sizes))} in {len(sizes)} {'file' if len(sizes) == 1 else 'files'}"
        return f"{self.directory}: {self.config.num_parameters:,} parameters in {_name(self.dtype)}, {files}"


def import_model(
    source: Path | str, out: Path | str, dtype: str = "auto", pad_vocab: int = 1, max_shard_gb: float = 5.0
) -> Converted:
    """Write a Hugging Face directory of the LLaMA family, safetensors or .bin, as one that every job here begins from.

    Args:
        source: stays as it is.
        out: a directory that does not exist, or is empty.
        dtype: one of DTYPES; auto keeps that of the source.
        pad_vocab: make the vocabulary's rows a multiple of it, and enough for the tokenizer; the new ones begin as the
            mean of the others.
        max_shard_gb: of one file.
    Raises:
        InputError: the source is not whole, or not a model that is supported; a value does not fit into the dtype;
            `out` is taken, or cannot be written.
    """
    model = _Source.open(source)
    rows, old_rows = _rows(model, pad_vocab), model.config.vocab_size

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in read_model(model.directory, model.config):
            is_extended = rows > old_rows and name in VOCABULARY_TENSORS
            yield name, extend_rows(tensor, {}, old_rows, rows) if is_extended else tensor

    config = model.config.with_vocab_size(rows)
    return _write_marked(model, config, tensors(), Path(out), dtype, max_shard_gb, "import")


def merge_model(source: Path | str, out: Path | str, dtype: str = "auto", max_shard_gb: float = 5.0) -> Converted:
    """Write what an adapter and its base make as one whole model, which every job here begins from.

    Args:
        source: an adapter's directory; it and its base stay as they are.
        dtype: one of DTYPES; auto keeps that of the base.
        out, max_shard_gb: as in `import_model`.
    Raises:
        InputError: as in `import_model`; or the source is a whole model already.
    """
    if require_model(source) and not is_adapter(source):
        raise InputError(f"{source} is a whole model: there is nothing to merge. Give the directory of an adapter.")
    model = _Source.open(source)
    tensors = read_model(model.directory, model.config)
    return _write_marked(model, model.config, tensors, Path(out), dtype, max_shard_gb, "merge")


def export_model(
    source: Path | str, out: Path | str, dtype: str = "auto", step: int | None = None, max_shard_gb: float = 5.0
) -> Converted:
    """Write the model of a run directory as a plain Hugging Face directory, for transformers and serving stacks.

    Args:
        source: a run directory that has published its model, or any model directory.
        step: take the weights of this checkpoint of the run instead of those it has published.
        out, dtype, max_shard_gb: as in `import_model`.
    Raises:
        InputError: as in `import_model`; or there is no whole checkpoint of this step.
    """
    model = _Source.open(source)
    template = None if model.tokenizer is None else ChatTemplate.of(model.tokenizer)
    if model.tokenizer is not None and template is not None:
        model = replace(model, tokenizer=template.store(model.tokenizer))
    kind = model.dtype(dtype)
    if step is None:
        tensors = read_model(model.directory, model.config)
    else:
        tensors = read_checkpoint(model.directory, step, model.config)
    with new_directory(Path(out), model.config.num_parameters * kind.itemsize) as folder:
        _write(folder, model, _cast(tensors, model, kind, "Exporting"), kind, max_shard_gb)
    return Converted(Path(out), model.config, kind)


def generation_facts(directory: Path) -> dict[str, Any]:
    """What generation_config.json says, of an adapter without one that of its base; {} where there is none."""
    paths = (each / _GENERATION for each in lineage(directory))
    return next((read_json(path) for path in paths if path.is_file()), {})


def end_ids(config: ModelConfig, directory: Path) -> tuple[int, ...]:
    """The ids at which serving stacks end an answer: those of config.json, then what generation_config.json adds."""
    given = config.eos_token_id, generation_facts(directory).get("eos_token_id")
    lists = ([ids] if isinstance(ids, int) else list(ids or ()) for ids in given)
    return tuple(dict.fromkeys(index for ids in lists for index in ids))


@dataclass(frozen=True)
class _Source:
    """A model directory that is whole; its configuration with all tokens that end an answer."""

    directory: Path
    config: ModelConfig
    tokenizer: Tokenizer | None

    @classmethod
    def open(cls, source: Path | str) -> _Source:
        directory = require_model(source)
        config = load_config(directory)
        read_model(directory, config)  # opens every file, and compares names and shapes
        ends = end_ids(config, directory)
        config = replace(config, eos_token_id=ends if len(ends) > 1 else next(iter(ends), None))
        return cls(directory, config, Tokenizer.load(directory) if has_tokenizer(directory) else None)

    def dtype(self, asked: str) -> torch.dtype:
        """The dtype asked for; auto: that of the weights, or where they differ the smallest that holds all of them."""
        known = {name: dtype for dtype, name in DTYPE_NAMES.items()}
        *_, whole = lineage(self.directory)  # an adapter's own weights may be of any
        stored = TensorStore(whole).dtypes
        names = (name for parts in hf_parameters(load_config(whole)).values() for name, _ in parts)
        kinds = dict.fromkeys(stored[name] for name in names)
        if other := [kind for kind in kinds if kind not in known]:
            raise InputError(
                f"{self.directory}: its weights are stored as {', '.join(other)}; {', '.join(known)} can be converted. "
                "Take the model as it was before it was quantised."
            )
        return DTYPES[asked] if asked != "auto" else reduce(torch.promote_types, map(known.__getitem__, kinds))


def _rows(model: _Source, pad_vocab: int) -> int:
    """Rows that the vocabulary shall have."""
    if pad_vocab < 1:
        raise InputError(
            f"--pad_vocab is {pad_vocab}. Use 1 for as many rows as there are, or 64 for the matrix units."
        )
    ids, rows = 0 if model.tokenizer is None else model.tokenizer.vocab_size, model.config.vocab_size
    if ids > rows and pad_vocab == 1:
        raise InputError(
            f"{model.directory}: its tokenizer has {ids} ids, its weights only {rows} rows. Give --pad_vocab 64, which "
            "adds rows that begin as the mean of the others."
        )
    return -(-max(ids, rows) // pad_vocab) * pad_vocab


def _cast(
    tensors: Iterable[tuple[str, Tensor]], model: _Source, dtype: torch.dtype, doing: str
) -> Iterator[tuple[str, Tensor]]:
    """The same in another dtype, every value of them a number."""
    line, done, total = LiveLine(), 0, model.config.num_parameters
    for name, tensor in tensors:
        cast = tensor.to(dtype)
        if not math.isfinite(_largest(cast)):
            largest, holder = _largest(tensor), f"{model.directory}: {name}"
            if not math.isfinite(largest):
                raise InputError(f"{holder} holds NaN or infinity. Download or train the model again.")
            raise InputError(f"{holder} reaches {largest:.3g}, more than {_name(dtype)} holds. Use --dtype bfloat16.")
        yield name, cast
        done += tensor.numel()
        line.show(f"{doing} {model.directory} {done / total:4.0%}", is_last=done >= total)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _largest(tensor: Tensor) -> float:
    """The largest magnitude, NaN if there is one; without a copy."""
    low, high = tensor.aminmax()
    return max(-low.item(), high.item())


def _write(
    folder: Path, model: _Source, tensors: Iterator[tuple[str, Tensor]], dtype: torch.dtype, max_shard_gb: float
) -> None:
    if not 0 < max_shard_gb < math.inf:
        raise InputError(f"--max_shard_gb is {max_shard_gb}. Use a number above 0, such as 5.")
    write_model(folder, model.config, tensors, dtype, int(max_shard_gb * 1e9))
    read_model(folder, model.config)  # opens every file, and compares names and shapes
    # How to sample is the model's own affair; which ids there are is said by config.json.
    facts = {**generation_facts(model.directory), **generation_facts(folder)}
    write_durably(folder / _GENERATION, json.dumps(facts, indent=2, ensure_ascii=False) + "\n")
    if model.tokenizer is not None:
        model.tokenizer.save(folder)


def _write_marked(
    model: _Source,
    config: ModelConfig,
    tensors: Iterator[tuple[str, Tensor]],
    out: Path,
    dtype: str,
    max_shard_gb: float,
    stage: str,
) -> Converted:
    """Write a new directory with the marker of a whole model."""
    kind = model.dtype(dtype)
    with new_directory(out, config.num_parameters * kind.itemsize) as folder:
        _write(folder, replace(model, config=config), _cast(tensors, model, kind, _DOING[stage]), kind, max_shard_gb)
        sync_tree(folder)
        mark_complete(folder, {path.name: path.stat().st_size for path in sorted(folder.iterdir())}, 0, stage)
    return Converted(out, config, kind)
