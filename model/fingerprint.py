"""What tells one model's weights from another's without reading all of them."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from model.directories import ADAPTER_CONFIG, is_adapter, lineage, read_json
from model.weight_files import ADAPTER_FILES, MODEL_FILES, TensorStore

# Of a file of weights: every run changes nearly all weights, so samples tell models apart.
_SAMPLED_BLOCKS, _BLOCK_BYTES = 256, 1 << 16
_SCALE = ("r", "lora_alpha", "use_rslora")


def fingerprint_weights(directory: Path) -> str:
    """128 bits in hex over samples of every file of weights: 16 MB of a large one, all of a small one."""
    digest = hashlib.sha256()
    add_weights(digest, directory)
    return digest.hexdigest()[:32]


def add_weights(digest: Any, directory: Path) -> None:
    """Put the same samples into a hash; of an adapter's directory, those of its base's files, too."""
    for each in lineage(directory):
        names = MODEL_FILES
        if is_adapter(each):
            names, facts = ADAPTER_FILES, read_json(each / ADAPTER_CONFIG)
            digest.update(f"{[facts.get(name) for name in _SCALE]}".encode())  # which no tensor shows
        for path in TensorStore(each, names).files:
            size = path.stat().st_size
            digest.update(f"{path.name} {size}".encode())
            with open(path, "rb") as file:
                for block in range(_SAMPLED_BLOCKS):
                    file.seek(block * size // _SAMPLED_BLOCKS)
                    digest.update(file.read(_BLOCK_BYTES))
