"""Hugging Face model directories: read into our parameters and written from them, one tensor at a time.

A directory that holds an adapter (`model.peft`) is read as the model that its base and the adapter make.

Our names are theirs, but that query, key and value projections are one tensor here, and gate and up projections
another: they are joined when read and split when written, and nowhere else.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model.config import Head, ModelConfig, parameter_shapes, projections
from model.directories import ADAPTED_CONFIG, is_adapter, read_json
from model.errors import InputError
from model.hf_config import config_from_hf, config_to_hf
from model.lora import merged
from model.peft import adapted_config, adapter_parameters, open_adapter
from model.weight_files import SAFETENSORS, SAFETENSORS_INDEX, TensorStore, replacing, write_json, write_safetensors

_EMBEDDING, _HEAD, _SCORE = "model.embed_tokens.weight", "lm_head.weight", "score.weight"


def load_config(directory: Path | str, head: Head | None = None) -> ModelConfig:
    """The configuration of a model directory.

    Args:
        head: the only one that the caller can work with; None for any.
    Raises:
        InputError: no such directory or config.json, a model that is not supported, or one with the other head.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise InputError(f"{directory}: no such directory. Download the model and give the directory's path.")
    if is_adapter(directory):
        adapter, own = open_adapter(directory), directory / ADAPTED_CONFIG
        config = config_from_hf(read_json(own), str(own)) if own.is_file() else load_config(adapter.base)
        config = adapted_config(adapter, config)
    else:
        path = directory / "config.json"
        config = config_from_hf(read_json(path), str(path))
    if head == "lm" and config.head == "score":
        raise InputError(f"{directory} is a reward model: it gives scores, not words. Give the model it was made from.")
    if head == "score" and config.head == "lm":
        raise InputError(
            f"{directory} is a language model: as a reward model its head would be random. Train one from it with "
            f"tools/rm.py --model {directory}."
        )
    return config


def hf_parameters(config: ModelConfig) -> dict[str, list[tuple[str, tuple[int, ...]]]]:
    """For each of our parameters, in order: names and shapes of the tensors that a directory holds for it."""
    stacked = projections(config)
    parameters = {}
    for name, shape in parameter_shapes(config).items():
        module = name.split(".")[-2]
        parameters[name] = [
            (name.replace(module, part), (rows, *shape[1:])) for part, rows in stacked.get(module, {}).items()
        ] or [(name, shape)]
    return parameters


def read_model(directory: Path | str, config: ModelConfig) -> Iterator[tuple[str, Tensor]]:
    """Every parameter of `CausalLM(config)` or `ScalarModel(config)` from a directory's weights, one at a time.

    Names and shapes of all tensors are checked against the configuration before the first is read.

    Returns:
        (name, full CPU tensor), in the order of `parameter_shapes(config)`: in the dtype of the file, or fp32 where an
        adapter's product was added. A tensor may be a map of its file: copy from it, do not write to it.
    Raises:
        InputError: missing or damaged files; missing, unknown or mis-shaped tensors; an adapter that does not fit its
            base.
    """
    directory = Path(directory)
    if is_adapter(directory):
        return read_adapted(directory, config)
    store = TensorStore(directory)
    parameters = hf_parameters(config)
    _check(store.shapes, {name: shape for parts in parameters.values() for name, shape in parts}, directory)

    def values() -> Iterator[tuple[str, Tensor]]:
        for name, parts in parameters.items():
            tensors = [store.read(part) for part, _ in parts]
            has_second_head = config.head == "lm" and config.tie_word_embeddings and _HEAD in store.shapes
            if name == _EMBEDDING and has_second_head and not torch.equal(tensors[0], store.read(_HEAD)):
                raise InputError(
                    f"{directory}: config.json ties the embeddings, but {_HEAD} differs from {_EMBEDDING}. "
                    "Set tie_word_embeddings to false there."
                )
            yield name, tensors[0] if len(tensors) == 1 else torch.cat(tensors)

    return values()


def read_adapted(
    directory: Path, config: ModelConfig, read: Callable[[str], Tensor] | None = None
) -> Iterator[tuple[str, Tensor]]:
    """`read_model` of an adapter's directory, a module of base and adapter at a time.

    Args:
        read: gives what was trained, by our names, if not the directory's own values are meant.
    """
    adapter = open_adapter(directory)
    base, shapes = load_config(adapter.base), parameter_shapes(config)
    found, adapted = parameter_shapes(base), adapter_parameters(config, adapter.spec)
    adapter.check(adapted)
    for name, shape in shapes.items():
        there = found.get(name) or found[_EMBEDDING]  # a head that was tied, and is not any more
        if name not in adapted and there != shape:
            raise InputError(
                f"{adapter.base}: {name} has shape {list(there)}, but the adapter in {directory} wants {list(shape)}. "
                "Write the directory of the model that it was trained on into base_model_name_or_path."
            )
    tensors, trained = read_model(adapter.base, base), read or (lambda name: adapter.read(adapted[name]))

    def values() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in tensors:
            a, b = (name.replace(".weight", f".lora_{matrix}") for matrix in "ab")
            if name in adapted:
                yield name, trained(name)
            elif a in adapted:
                yield from ((name, tensor.float()), (a, trained(a)), (b, trained(b)))
            elif name in shapes:  # a reward model has no use for the head of words
                yield name, tensor
        for name in shapes.keys() - found.keys():
            yield name, trained(name) if name in adapted else next(read_model(adapter.base, base))[1]

    return merged(values(), config, adapter.spec)


def _check(found: dict[str, tuple[int, ...]], wanted: dict[str, tuple[int, ...]], directory: Path) -> None:
    missing = [name for name in wanted if name not in found]
    if missing == [_HEAD]:
        raise InputError(
            f"{directory}: {_HEAD} is missing. If the head shares the embedding, set tie_word_embeddings to true "
            "in config.json; otherwise download the weights again."
        )
    if missing == [_SCORE]:
        raise InputError(
            f"{directory}: {_SCORE} is missing, so its scores would be random. Train it with tools/rm.py, or correct "
            "architectures in config.json if it is a language model."
        )
    if missing:
        raise InputError(f"{directory}: {_list(missing)} missing. Download the weights again, or correct config.json.")
    # Old directories keep a buffer of rotary frequencies, and some a second copy of a tied head.
    known = {*wanted} if _SCORE in wanted else {*wanted, _HEAD}
    unknown = [name for name in found if name not in known and not name.endswith("rotary_emb.inv_freq")]
    if unknown:
        raise InputError(f"{directory}: {_list(unknown)} not used by the model that config.json describes. Correct it.")
    for name, shape in wanted.items():
        if found[name] == shape:
            continue
        remedy = "Correct config.json, or download the weights again."
        if name in (_EMBEDDING, _HEAD) and found[name][1:] == shape[1:]:
            remedy = f"Set vocab_size to {found[name][0]} in config.json if these are the right weights."
        raise InputError(
            f"{directory}: {name} has shape {list(found[name])}, but config.json says {list(shape)}. {remedy}"
        )


def _list(names: list[str]) -> str:
    shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
    return f"{shown} {'is' if len(names) == 1 else 'are'}"


def write_model(
    directory: Path | str,
    config: ModelConfig,
    tensors: Iterator[tuple[str, Tensor]],
    dtype: torch.dtype = torch.bfloat16,
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Write a directory that transformers and serving stacks open: weights, index, config.json, and
    generation_config.json where the model generates.

    It replaces what was there before as `model.weight_files.replacing` tells, config.json last.

    Args:
        tensors: (name, full tensor on any device), in the order of `parameter_shapes(config)`; one is held at a
            time.
        dtype: of the written weights: bfloat16, float16 or float32.
        max_shard_bytes: of one file, unless a single tensor is larger.
    Raises:
        InputError: the directory cannot be written, or the disk is full.
    """
    parameters = hf_parameters(config)
    shards = _plan([part for parts in parameters.values() for part in parts], dtype.itemsize, max_shard_bytes)
    documents = _documents(config, dtype, shards)
    pieces = _split(tensors, parameters)
    with replacing(Path(directory), [*shards, *documents], "the model") as temporary:
        for file, entries in shards.items():
            write_safetensors(temporary(file), entries, dtype, pieces)
        assert next(pieces, None) is None, "more tensors than parameters"
        for file, content in documents.items():
            write_json(temporary(file), content)


def _documents(config: ModelConfig, dtype: torch.dtype, shards: dict[str, list]) -> dict[str, dict[str, Any]]:
    """The JSON files of a directory, config.json last."""
    facts = config_to_hf(config, str(dtype).removeprefix("torch."))
    special = {name: facts[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    documents: dict[str, dict[str, Any]] = {"config.json": facts}
    if config.head == "lm":
        known = {name: value for name, value in special.items() if value is not None}
        documents = {"generation_config.json": known, **documents}
    if len(shards) == 1:
        return documents
    weight_map = {name: file for file, entries in shards.items() for name, _ in entries}
    index = {"metadata": {"total_size": config.num_parameters * dtype.itemsize}, "weight_map": weight_map}
    return {SAFETENSORS_INDEX: index, **documents}


def _plan(
    parts: list[tuple[str, tuple[int, ...]]], itemsize: int, max_shard_bytes: int
) -> dict[str, list[tuple[str, tuple[int, ...]]]]:
    """Which tensors go into which file, in order."""
    shards: list[list[tuple[str, tuple[int, ...]]]] = [[]]
    held = 0
    for name, shape in parts:
        size = torch.Size(shape).numel() * itemsize
        if shards[-1] and held + size > max_shard_bytes:
            shards.append([])
            held = 0
        shards[-1].append((name, shape))
        held += size
    if len(shards) == 1:
        return {SAFETENSORS: shards[0]}
    return {f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors": shard for i, shard in enumerate(shards)}


def _split(
    tensors: Iterator[tuple[str, Tensor]], parameters: dict[str, list[tuple[str, tuple[int, ...]]]]
) -> Iterator[Tensor]:
    """The tensors of the files, in order, from our parameters."""
    for (name, tensor), (expected, parts) in itertools.zip_longest(tensors, parameters.items(), fillvalue=(None, None)):
        assert name == expected, f"{name} was given where {expected} was due"
        assert tensor is not None and parts is not None
        yield from tensor.split([shape[0] for _, shape in parts])
