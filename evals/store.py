"""What a model responded, on disk: kept as it comes, gone on with after a kill, and final once all is there.

    OUT/MODEL/LABEL/settings.json           what was asked of whom, and how
                    responses.jsonl         a line a response, in the order of the requests once all are there
                    responses-RANK.jsonl    those of each process until then
                    predictions.jsonl       a line an item: what was shown, said and right, and what it counts for

A process writes its own file only, and reads everybody's. A line counts once it is whole; what is torn behind the last
one is written over.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from engine.files import claim, write_durably
from evals.task import Answered, Chosen, Response, Result, Scored
from model.errors import InputError

_KINDS: dict[str, type[Any]] = {"chosen": Chosen, "answered": Answered, "scored": Scored}
_DIGEST = re.compile(r"\b[0-9a-f]{16,}\b")
_NAMES = {kind: name for name, kind in _KINDS.items()}


class Store:
    """The folder of one task and one model.

    Args:
        folder: made if it is not there.
        rank: of this process.
    """

    def __init__(self, folder: Path, rank: int = 0) -> None:
        self.folder, self._rank = folder, rank
        self.path, self._own = folder / "responses.jsonl", folder / f"responses-{rank}.jsonl"

    @contextlib.contextmanager
    def claimed(self) -> Iterator[None]:
        """The folder for this command alone, as far as the filesystem knows locks. Rank 0 holds it for all.

        Raises:
            InputError: another process has it.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(self.folder / ".lock", "a") as file:
            claim(
                file,
                f"{self.folder}: another process is evaluating into it. Wait for it, or choose another --out.",
                f"{self.folder}: its filesystem offers no locks. Let no two commands write it at the same time.",
            )
            yield

    def begin(self, settings: Mapping[str, Any]) -> None:
        """Write down what decides the responses, or see that it is what decided those that are there.

        Raises:
            InputError: it is not.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        path, settings = self.folder / "settings.json", json.loads(json.dumps(dict(settings)))
        if not path.exists():
            if any(self._files()):
                raise InputError(
                    f"{self.folder} holds responses and no settings.json: nobody knows whose. Move it away."
                )
            return write_durably(path, json.dumps(settings, indent=1, ensure_ascii=False) + "\n")
        try:
            before = dict(json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, TypeError):
            raise InputError(f"{path} is not readable as JSON. Move {self.folder} away.") from None
        names = [name for name in dict.fromkeys((*before, *settings)) if before.get(name) != settings.get(name)]
        if names:
            # A digest differs with everything, and says nothing.
            name = min(names, key=lambda name: bool(_DIGEST.search(str(settings.get(name)))))
            raise InputError(
                f"{self.folder} holds responses with {name} {_short(before.get(name))}; now it is "
                f"{_short(settings.get(name))}. Choose another --out or label, or move it away."
            )

    def read(self) -> dict[str, Response]:
        """All responses that are whole, by id.

        Raises:
            InputError: a line is none.
        """
        found: dict[str, Response] = {}
        for path in self._files():
            for number, line in enumerate(_whole_lines(path), 1):
                try:
                    fields = json.loads(line)
                    kind, name = _KINDS[fields.pop("kind")], fields.pop("id")
                    found.setdefault(name, kind(**{key: _tuple(value) for key, value in fields.items()}))
                except (ValueError, LookupError, TypeError, AttributeError):
                    raise InputError(
                        f"{path}:{number}: this is no response. Move the file away; what it held is asked again."
                    ) from None
        return found

    def append(self, responses: Iterable[tuple[str, Response]]) -> None:
        """Keep some more: they are on disk when this returns."""
        with open(self._own, "ab+") as file:
            _drop_torn_line(file)
            file.writelines(_response_line(name, response) for name, response in responses)
            file.flush()
            os.fsync(file.fileno())

    def finish(self, order: Sequence[str], responses: Mapping[str, Response]) -> None:
        """All responses in one file, in this order; the files of processes go. By one process, once all are there."""
        parts = list(self.folder.glob("responses-*.jsonl"))
        if self.path.exists() and not parts:
            return
        write_durably(self.path, b"".join(_response_line(name, responses[name]) for name in order).decode())
        for part in parts:
            part.unlink()

    def write_predictions(self, result: Result) -> None:
        """What became of every item."""
        names = ("id", "group", "shown", "answer", "gold", "parts")
        lines = [_line({name: getattr(item, name) for name in names}) for item in result.items]
        write_durably(self.folder / "predictions.jsonl", b"".join(lines).decode())

    def _files(self) -> list[Path]:
        return [path for path in (self.path, *sorted(self.folder.glob("responses-*.jsonl"))) if path.exists()]


def _response_line(name: str, response: Response) -> bytes:
    return _line({"id": name, "kind": _NAMES[type(response)], **response._asdict()})


def _line(fields: Mapping[str, Any]) -> bytes:
    # Half a surrogate pair is no UTF-8; written as an escape it is JSON again.
    return json.dumps(fields, ensure_ascii=False).encode(errors="backslashreplace") + b"\n"


def _whole_lines(path: Path) -> Iterator[bytes]:
    with open(path, "rb") as file:
        yield from (line for line in file if line.endswith(b"\n"))


def _drop_torn_line(file: Any) -> None:
    """Cut a file behind its last line break."""
    end = file.seek(0, os.SEEK_END)
    while end:
        start = max(0, end - (1 << 16))
        file.seek(start)
        at = file.read(end - start).rfind(b"\n")
        end = start + at + 1
        if at >= 0:
            break
        end = start
    file.truncate(end)


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."
