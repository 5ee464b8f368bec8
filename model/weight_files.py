"""Tensors in files: safetensors and torch's .bin, whole or sharded, read one at a time; safetensors written so, in the
place of what a directory held before.

Nothing here runs code from a file: .bin files are loaded with weights only.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import struct
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from model.directories import ADAPTED_CONFIG, ADAPTER_CONFIG, read_json
from model.errors import InputError

SAFETENSORS, SAFETENSORS_INDEX = "model.safetensors", "model.safetensors.index.json"
MODEL_FILES = (SAFETENSORS, "pytorch_model.bin")
"""Where a model's weights are, the best first; an index beside them stands for shards."""
ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")
"""Where an adapter's are."""
WRITTEN = (
    *("config.json", "generation_config.json", SAFETENSORS, SAFETENSORS_INDEX, "model-*.safetensors"),
    *(ADAPTER_CONFIG, ADAPTED_CONFIG, ADAPTER_FILES[0]),
)
"""Names, or patterns, of files that tell which model a directory holds: what one leaves there, the next removes."""
DTYPE_NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
"""Of the weights that are written, as safetensors writes them."""


class TensorStore:
    """Every tensor of a directory by name: its shape at once, its values when asked.

    shapes: of all tensors, in the order of the files.
    dtypes: of the same, as safetensors writes them: F32, BF16, I8.
    files: where they are.
    """

    def __init__(self, directory: Path, names: Sequence[str] = MODEL_FILES) -> None:
        """Open the first of some files, or sets of shards, that is there.

        Raises:
            InputError: no weights, a missing or damaged file, a tensor that the index promises in vain.
        """
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, str] = {}
        self._readers: dict[str, Callable[[], Tensor]] = {}
        self.files, self._promised = _weight_files(directory, names)
        for path in self.files:
            if not path.is_file():
                raise InputError(f"{path}: this shard is listed in the index but missing. Download it again.")
            if path.suffix == ".safetensors":
                self._open_safetensors(path)
            else:
                self._open_bin(path)
        for name, file in self._promised.items():
            if name not in self.shapes:
                raise InputError(f"{directory / file}: {name} is listed in the index but missing. Download it again.")

    def read(self, name: str) -> Tensor:
        """The tensor on the CPU, in the dtype of the file; it may be a map of the file: do not write to it."""
        return self._readers[name]()

    def _open_safetensors(self, path: Path) -> None:
        try:
            file = safe_open(path, framework="pt")
            for name in file.keys():  # noqa: SIM118  not a dict
                piece = file.get_slice(name)
                self._keep(path, name, tuple(piece.get_shape()), piece.get_dtype(), partial(file.get_tensor, name))
        except (SafetensorError, OSError) as error:
            raise InputError(f"{path}: not a whole safetensors file ({error}). Download or copy it again.") from error

    def _open_bin(self, path: Path) -> None:
        try:
            try:
                content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            except RuntimeError:  # torch before 1.6 wrote another format, which cannot be mapped
                content = torch.load(path, map_location="cpu", weights_only=True)
        except (RuntimeError, OSError, EOFError, ValueError, pickle.UnpicklingError) as error:
            reason = str(error).splitlines()[0]
            if isinstance(error, pickle.UnpicklingError):  # torch's own words advise to run whatever is in it
                reason = "it is damaged, or holds more than tensors"
            raise InputError(
                f"{path}: not a whole file of weights ({reason}). Download it again, or convert it to safetensors."
            ) from error
        if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
            raise InputError(f"{path}: holds more than named tensors. Save the model's state dict alone.")
        for name, tensor in content.items():
            kind = DTYPE_NAMES.get(tensor.dtype, str(tensor.dtype).removeprefix("torch."))
            self._keep(path, name, tuple(tensor.shape), kind, partial(content.__getitem__, name))

    def _keep(self, path: Path, name: str, shape: tuple[int, ...], dtype: str, read: Callable[[], Tensor]) -> None:
        """Of a tensor that several files hold, the one that the index names."""
        if name not in self.shapes or self._promised.get(name) == path.name:
            self.shapes[name], self.dtypes[name], self._readers[name] = shape, dtype, read


def _weight_files(directory: Path, names: Sequence[str]) -> tuple[list[Path], dict[str, str]]:
    """Files to open, and the map from names to files that an index gives."""
    for single in names:
        path = directory / f"{single}.index.json"
        if path.is_file():
            weight_map = read_json(path).get("weight_map")
            if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
                weight_map = {}
            if not weight_map:
                raise InputError(f"{path}: weight_map is missing, or does not name files. Download it again.")
            return [directory / file for file in dict.fromkeys(weight_map.values())], weight_map
        if (directory / single).is_file():
            return [directory / single], {}
    raise InputError(
        f"{directory}: no weights here. Expected {' or '.join(names)}, or the shards named by {names[0]}.index.json."
    )


def write_safetensors(
    path: Path, entries: Sequence[tuple[str, tuple[int, ...]]], dtype: torch.dtype, tensors: Iterator[Tensor]
) -> None:
    """Write one file, holding one tensor in memory at a time.

    The format: length of the header (u64, little endian), a JSON header of dtypes, shapes and offsets, the bytes.

    Args:
        entries: names and shapes, in the order in which `tensors` yields them; exactly that many are taken.
        dtype: of the file; tensors are cast.
    """
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in entries:
        start, end = end, end + torch.Size(shape).numel() * dtype.itemsize
        header[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data starts aligned
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for (name, shape), tensor in zip(entries, tensors, strict=False):
            assert tuple(tensor.shape) == shape, f"{name} is {tuple(tensor.shape)}, not {shape}"
            values = tensor.detach().to("cpu", dtype).contiguous()
            file.write(memoryview(values.view(-1).view(torch.uint8).numpy()))
        assert file.tell() == 8 + len(text) + end, f"{path}: fewer tensors than entries"


@contextlib.contextmanager
def replacing(directory: Path, files: Sequence[str], what: str) -> Iterator[Callable[[str], Path]]:
    """Put files in the place of those that a directory held before, and remove what is left of another model.

    Within the context each file is written under a temporary path, which the function that is given finds by its name.
    At the end all are synced; then the old `files[-1]` goes, the new files take their names, and `files[-1]` comes
    last. A directory without it is one that was interrupted; one that failed before is as it was.

    Args:
        what: is written, for messages.
    Raises:
        InputError: the directory cannot be written, or the disk is full.
    """

    def temporary(file: str) -> Path:
        return directory / f".{file}.tmp"

    try:
        directory.mkdir(parents=True, exist_ok=True)
        yield temporary
        for file in files:
            _sync(temporary(file))
        (directory / files[-1]).unlink(missing_ok=True)
        _sync(directory)
        for pattern in WRITTEN:
            for stale in directory.glob(pattern):
                stale.unlink()
        for file in files:
            temporary(file).replace(directory / file)
            _sync(directory)
    except OSError as error:
        reason = error.strerror or str(error)
        raise InputError(f"{directory}: cannot write {what} ({reason}). Free space or choose another.") from error
    finally:
        for file in files:
            with contextlib.suppress(OSError):
                temporary(file).unlink(missing_ok=True)


def write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _sync(path: Path) -> None:
    """Wait until a file's content, or a directory's names, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
