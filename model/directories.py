"""What a directory holds, as far as a look at its names tells: a whole model, or an adapter that stands on another.

Nothing here imports torch: tokenizers are opened in processes that do not have it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from model.errors import InputError

ADAPTER_CONFIG = "adapter_config.json"
ADAPTED_CONFIG = "adapted_config.json"
"""Ours beside it: what the config.json of the whole model would be. transformers looks for weights beside that name."""


def is_adapter(directory: Path | str) -> bool:
    """Whether a directory holds a low-rank adapter in PEFT's layout."""
    return (Path(directory) / ADAPTER_CONFIG).is_file()


def lineage(directory: Path | str) -> Iterator[Path]:
    """A model directory; if it holds an adapter the directory that it stands on, and so on down to a whole model.

    A relative path in adapter_config.json is looked for beside the adapter's own files, then in the working directory.

    Raises:
        InputError: a base is not named, is not there, or stands on the adapter itself.
    """
    passed = [Path(directory)]
    yield passed[-1]
    while is_adapter(passed[-1]):
        base = _base(passed[-1])
        if any(base.samefile(earlier) for earlier in passed):
            raise InputError(
                f"{passed[-1] / ADAPTER_CONFIG}: base_model_name_or_path leads back to {base}. Write the directory of "
                "the model there that the adapter was trained on."
            )
        passed.append(base)
        yield base


def _base(adapter: Path) -> Path:
    path = adapter / ADAPTER_CONFIG
    named = read_json(path).get("base_model_name_or_path")
    if not isinstance(named, str) or not named:
        raise InputError(f"{path}: base_model_name_or_path is {named!r}. Write the directory of the base model there.")
    for candidate in (adapter / named, Path(named)):
        if candidate.is_dir():
            return candidate
    raise InputError(
        f'{path}: base_model_name_or_path is "{named}", and there is no such directory. Download the base model, and '
        "write its directory there."
    )


def read_json(path: Path) -> dict:
    """A JSON object. Raises InputError: the file is missing, broken, or holds something else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file. Give a Hugging Face model directory.") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}). Check its permissions.") from error
    except ValueError as error:
        raise InputError(f"{path}: not valid JSON ({error}). Download or correct the file.") from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: not a JSON object. Download or correct the file.")
    return content
