"""Python, the packages, and what may stand in their way."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from engine.doctor.finding import Finding

ROOT = Path(__file__).resolve().parents[2]
OLDEST_PYTHON = (3, 10)
OLDEST_TORCH = (2, 11)
ROOMS = ("kernels", "model", "engine", "rlhf", "evals")
# What each optional group is for, and the packages in it.
EXTRAS = {
    "data": ("Parquet and .zst files", ("pyarrow", "zstandard")),
    "logs": ("curves and TensorBoard", ("matplotlib", "tensorboard")),
    "eval": ("BLEU and ROUGE", ("sacrebleu", "rouge-score")),
}
CORE = ("numpy", "safetensors", "sentencepiece", "protobuf", "tokenizers", "jsonargparse", "PyYAML", "jinja2")


def software() -> Iterator[Finding]:
    """What is installed, and whether it fits together."""
    yield python()
    yield torch_package()
    yield triton_package()
    yield flash_attention()
    yield core_packages()
    yield from extras()
    yield from foreign_packages()


def python(version: tuple[int, ...] = tuple(sys.version_info[:3])) -> Finding:
    found = f"{'.'.join(map(str, version))}, {sys.executable}"
    if version < OLDEST_PYTHON:
        wanted = ".".join(map(str, OLDEST_PYTHON))
        return Finding("Python", "wrong", found, f"Use Python {wanted} or newer: make setup PYTHON=python{wanted}.")
    return Finding("Python", "good", found)


def torch_package() -> Finding:
    version = version_of("torch")
    if version is None:
        return Finding("torch", "wrong", "not installed", "Run make setup.")
    if numbers(version) < OLDEST_TORCH:
        wanted = ".".join(map(str, OLDEST_TORCH))
        return Finding("torch", "wrong", version, f"Use {wanted} or newer; make setup installs the one that is tested.")
    try:
        import torch
    except Exception as error:  # a library that it was built against is missing, or of another version
        return Finding(
            "torch", "wrong", f"{version} does not load: {first_line(error)}", "Install it anew: make setup."
        )
    return Finding("torch", "good", f"{version}, built for {build_of(torch.version)}")


def build_of(version: object) -> str:
    """What a torch build runs on."""
    if getattr(version, "hip", None):
        return "ROCm"
    cuda = getattr(version, "cuda", None)
    return f"CUDA {cuda}" if cuda else "the CPU alone"


def triton_package() -> Finding:
    version = version_of("triton")
    if version is None:
        if platform.system() != "Linux":
            return Finding("triton", "good", "does not exist for this system, and is only needed on GPUs")
        return Finding("triton", "wrong", "not installed", "Run make setup.")
    wanted = _triton_of_torch()
    if wanted and numbers(wanted) != numbers(version):
        remedy = f"pip install triton=={wanted}: this torch was built with that one."
        return Finding("triton", "wrong", f"{version}, but torch wants {wanted}", remedy)
    return Finding("triton", "good", version)


def _triton_of_torch() -> str | None:
    """The version that this torch pins; a build for the CPU alone pins none."""
    for requirement in importlib.metadata.requires("torch") or () if version_of("torch") else ():
        if found := re.match(r"triton\s*==\s*([\w.+]+)", requirement):
            return found[1]
    return None


def flash_attention() -> Finding:
    version = version_of("flash-attn")
    if version is None:
        return Finding("flash-attn", "good", "not installed; our own kernels do without")
    try:
        import flash_attn  # noqa: F401
    except Exception as error:
        remedy = "It was built for another torch: pip uninstall flash-attn, or build it anew. Our kernels do without."
        return Finding("flash-attn", "wrong", f"{version} does not load: {first_line(error)}", remedy)
    return Finding("flash-attn", "good", version)


def core_packages() -> Finding:
    missing = [name for name in CORE if version_of(name) is None]
    if missing:
        return Finding("packages", "wrong", f"missing: {', '.join(missing)}", "Run make setup.")
    return Finding("packages", "good", ", ".join(f"{name} {version_of(name)}" for name in CORE))


def extras() -> Iterator[Finding]:
    for extra, (purpose, names) in EXTRAS.items():
        missing = [name for name in names if version_of(name) is None]
        if missing:
            remedy = f"pip install -e '.[{extra}]' -c constraints.txt, if you want {purpose}."
            yield Finding(f"extra {extra}", "note", f"missing: {', '.join(missing)}", remedy)


def foreign_packages() -> Iterator[Finding]:
    """Packages of others that have the names of our rooms: whichever comes first on the path is imported."""
    for room in ROOMS:
        if version := version_of(room):
            remedy = (
                f"pip uninstall {room}. Our checkout holds a package of that name, and what expects the other "
                "(transformers looks for kernels) would get ours, or we it."
            )
            yield Finding(f"package {room}", "note", f"a foreign one is installed, {version}", remedy)
    path = os.environ.get("PYTHONPATH")
    for folder in path.split(os.pathsep) if path else ():
        for room in ROOMS:
            if folder and Path(folder).resolve() != ROOT and Path(folder, room, "__init__.py").exists():
                remedy = "Take that folder out of PYTHONPATH."
                yield Finding(f"package {room}", "note", f"PYTHONPATH holds another one, in {folder}", remedy)


def version_of(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def numbers(version: str) -> tuple[int, ...]:
    """(2, 13, 0) of "2.13.0+cu129"."""
    return tuple(int(number) for number in re.findall(r"\d+", version.split("+")[0])[:3])


def first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
