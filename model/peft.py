"""Low-rank adapters in the layout of PEFT (Mangrulkar et al. 2022), read and written one tensor at a time.

    adapter_config.json        rank, alpha, which modules have an adapter, the directory of the base model
    adapter_model.safetensors  base_model.model.<module>.lora_A.weight [r, in] and .lora_B.weight [out, r], and
                               base_model.model.<module>.weight of every module that was trained whole

Adapters of projections that are stacked here are stacked, too (`model.lora`): they are joined when read and split when
written, and nowhere else. What the layout can say and `LoraSpec` cannot hold is an error that names it.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from model.config import ModelConfig, parameter_shapes, projections
from model.directories import ADAPTED_CONFIG, ADAPTER_CONFIG, lineage, read_json
from model.errors import InputError
from model.fingerprint import fingerprint_weights
from model.hf_config import config_to_hf
from model.lora import TARGETS, TRAINED, LoraSpec, is_trained, lora_shapes
from model.peft_config import MERGE, require_supported, spec_from_peft, spec_to_peft
from model.weight_files import ADAPTER_FILES, MODEL_FILES, TensorStore, replacing, write_json, write_safetensors

Parts = list[tuple[str, tuple[int, ...]]]

BASE_FINGERPRINT = "base_fingerprint"
"""Field of our file beside the adapter: which weights it was trained on."""
_PREFIX = "base_model.model."
_EMBEDDING = "model.embed_tokens.weight"
_WHOLE = {"embed_tokens": "model.embed_tokens", "lm_head": "lm_head", "score": "score"}
_MODULE = re.compile(r"model\.layers\.\d+\.(?:self_attn\.[qkvo]_proj|mlp\.(?:gate|up|down)_proj)")
_COPY = re.compile(r"\.(?:modules_to_save|original_module)(?=\.weight$)")


@dataclass(frozen=True)
class Adapter:
    """What a directory says of its adapter; the weights are read when they are asked for.

    base: the directory that it stands on: of a whole model, or of another adapter.
    keeps_tie: whether an embedding that was trained whole is still the head's matrix where the base's is.
    shapes: of the tensors that count, by PEFT's names.
    """

    directory: Path
    spec: LoraSpec
    base: Path
    keeps_tie: bool
    store: TensorStore
    shapes: dict[str, tuple[int, ...]]

    def read(self, parts: Parts) -> Tensor:
        """One of our parameters from the tensors that hold it, on the CPU, in the dtype of the file."""
        tensors = [self.store.read(name) for name, _ in parts]
        return tensors[0] if _is_tied(parts) else torch.cat(tensors)

    def check(self, parameters: dict[str, Parts]) -> None:
        """See that the file holds what `adapter_parameters` promises. Raises InputError: it does not."""
        found = self.shapes
        wanted = {name: shape for parts in parameters.values() for name, shape in parts}
        remedy = "write the directory of the model that it was trained on into base_model_name_or_path."
        if odd := sorted(found.keys() ^ wanted.keys()):
            how = "is missing" if odd[0] in wanted else "has no place"
            raise InputError(
                f"{self.directory}: {odd[0]} {how} in an adapter of every layer of {self.base}. Save it again, or "
                f"{remedy}"
            )
        for name, shape in wanted.items():
            if found[name] != shape:
                raise InputError(
                    f"{self.directory}: {name} has shape {list(found[name])}; r in {ADAPTER_CONFIG} and the shape of "
                    f"{self.base} make it {list(shape)}. Correct r, or {remedy}"
                )


def open_adapter(directory: Path | str) -> Adapter:
    """The adapter of a directory, without its weights and without a look at its base.

    Raises:
        InputError: a file is missing or damaged, the base is not there, or the adapter is of a kind that is not
            supported.
    """
    directory = Path(directory)
    path = directory / ADAPTER_CONFIG
    facts = read_json(path)
    require_supported(facts, str(path))
    base = list(lineage(directory))[1]
    if any((directory / f"{name}{index}").is_file() for name in MODEL_FILES for index in ("", ".index.json")):
        raise InputError(f"{directory} holds a whole model and an adapter. Move one of them to a directory of its own.")
    store = TensorStore(directory, ADAPTER_FILES)
    # Of a module trained whole in a vocabulary that grew, PEFT writes three copies.
    plain = {name: _COPY.sub("", name) for name in store.shapes}
    shapes = {name: shape for name, shape in store.shapes.items() if plain[name] == name or plain[name] not in plain}
    adapted, whole = set(), []
    for name in shapes:
        module, _, kind = name.removeprefix(_PREFIX).partition(".lora_")
        if kind in ("A.weight", "B.weight") and _MODULE.fullmatch(module):
            adapted.add(module)
        elif name.removeprefix(_PREFIX).removesuffix(".weight") in _WHOLE.values():
            whole.append(name.split(".")[-2])
        else:
            raise InputError(
                f"{store.files[0]}: {name} is not supported; adapters of {', '.join(TARGETS)} are, and "
                f"{', '.join(TRAINED)} trained whole. {MERGE}"
            )
    spec = spec_from_peft(facts, adapted, whole, str(path))
    return Adapter(directory, spec, base, bool(facts.get("ensure_weight_tying")), store, shapes)


def adapted_config(adapter: Adapter, config: ModelConfig) -> ModelConfig:
    """The configuration of the model that an adapter and its base make.

    Args:
        config: of the base, or what the adapter's own directory says.
    Raises:
        InputError: the adapter's tensors do not fit.
    """
    trained, shapes = adapter.spec.trained, adapter.shapes
    if "score" in trained and (labels := shapes[f"{_PREFIX}score.weight"][0]) != 1:
        raise InputError(
            f"{adapter.directory}: a classifier of {labels} labels; a reward model has one. Choose an adapter that was "
            "trained with num_labels 1."
        )
    tables = [name for name in trained if name != "score"]
    rows = shapes[f"{_PREFIX}{_WHOLE[tables[0]]}.weight"][0] if tables else config.vocab_size
    # Of a tied base PEFT trains copies, each for itself, unless it is told to keep them one.
    is_untied = bool(tables) and not adapter.keeps_tie
    config = replace(
        config,
        vocab_size=rows,
        head="score" if "score" in trained else config.head,
        tie_word_embeddings=config.tie_word_embeddings and not is_untied,
    )
    adapter.check(adapter_parameters(config, adapter.spec))
    return config


def trained_shapes(config: ModelConfig, spec: LoraSpec) -> dict[str, tuple[int, ...]]:
    """Name and shape of every parameter that is trained, in the order of named_parameters()."""
    whole = {name: shape for name, shape in parameter_shapes(config).items() if is_trained(name, spec)}
    embedding = {_EMBEDDING: whole.pop(_EMBEDDING)} if _EMBEDDING in whole else {}
    return {**embedding, **lora_shapes(config, spec), **whole}


def adapter_parameters(config: ModelConfig, spec: LoraSpec) -> dict[str, Parts]:
    """For each of those: names and shapes of the tensors that PEFT keeps it in."""
    stacked, parameters = projections(config), dict[str, Parts]()
    for name, shape in trained_shapes(config, spec).items():
        path, _, kind = name.rpartition(".")
        block, _, module = path.rpartition(".")
        if kind == "weight":
            is_head_too = name == _EMBEDDING and config.head == "lm" and config.tie_word_embeddings
            heads = [f"{_WHOLE['lm_head']}.weight"] if is_head_too else []
            parameters[name] = [(f"{_PREFIX}{each}", shape) for each in (name, *heads)]
            continue
        rows = {part: count for part, count in stacked[module].items() if part in spec.targets}
        matrix = "A" if kind == "lora_a" else "B"
        parameters[name] = [
            (f"{_PREFIX}{block}.{part}.lora_{matrix}.weight", (spec.rank if matrix == "A" else count, shape[1]))
            for part, count in rows.items()
        ]
    return parameters


def read_adapter(directory: Path | str, config: ModelConfig) -> Iterator[tuple[str, Tensor]]:
    """What was trained, one tensor at a time: (our name, full CPU tensor in the dtype of the file), in the order of
    `adapter_parameters`.

    Args:
        config: `model.hf.load_config` of the same directory.
    Raises:
        InputError: as `open_adapter`, or the tensors do not fit the configuration.
    """
    adapter = open_adapter(directory)
    parameters = adapter_parameters(config, adapter.spec)
    adapter.check(parameters)
    return ((name, adapter.read(parts)) for name, parts in parameters.items())


def write_adapter(
    directory: Path | str,
    config: ModelConfig,
    spec: LoraSpec,
    base: Path | str,
    tensors: Iterator[tuple[str, Tensor]],
    dtype: torch.dtype = torch.float32,
    fingerprint: str | None = None,
) -> None:
    """Write a directory that PEFT opens beside the base, and our own tools by itself.

    It replaces what was there before as `model.weight_files.replacing` tells, adapter_config.json last. A file beside
    it tells of the model that base and adapter make: a reward model keeps there what its scores are normalised by, and
    all of them which weights they stand on.

    Args:
        config: of that model.
        base: the directory that the frozen weights came from; written as an absolute path.
        tensors: (our name, full tensor on any device), in the order of `adapter_parameters(config, spec)`; one is held
            at a time.
        dtype: of the written weights: bfloat16, float16 or float32.
        fingerprint: of the base's weights as they were read; by default of those that it has now.
    Raises:
        InputError: the directory cannot be written, or is the base's own.
    """
    directory, base = Path(directory), Path(base)
    if directory.exists() and base.exists() and directory.samefile(base):
        raise InputError(f"{directory}: the adapter cannot replace the model that it stands on. Choose another --out.")
    parameters = adapter_parameters(config, spec)
    entries = [part for parts in parameters.values() for part in parts]
    whole = [name.split(".")[-2] for name, _ in entries if ".lora_" not in name]
    files, pieces = (ADAPTER_FILES[0], ADAPTED_CONFIG, ADAPTER_CONFIG), _split(tensors, parameters)
    with replacing(directory, files, "the adapter") as temporary:
        write_safetensors(temporary(files[0]), entries, dtype, pieces)
        assert next(pieces, None) is None, "more tensors than parameters"
        facts = config_to_hf(config, str(dtype).removeprefix("torch."))
        write_json(temporary(files[1]), {**facts, BASE_FINGERPRINT: fingerprint or fingerprint_weights(base)})
        write_json(temporary(files[2]), spec_to_peft(spec, config, whole, str(base.absolute())))


def _split(tensors: Iterator[tuple[str, Tensor]], parameters: dict[str, Parts]) -> Iterator[Tensor]:
    """The tensors of the file, in order, from our parameters."""
    for (name, tensor), (expected, parts) in itertools.zip_longest(tensors, parameters.items(), fillvalue=(None, None)):
        assert name == expected, f"{name} was given where {expected} was due"
        assert tensor is not None and parts is not None
        yield from [tensor] * len(parts) if _is_tied(parts) else tensor.split([shape[0] for _, shape in parts])


def _is_tied(parts: Parts) -> bool:
    """Whether the tensors are copies of one parameter, an embedding that is the head, too, and no pieces of it."""
    return ".lora_" not in parts[0][0]
