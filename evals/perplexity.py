"""Perplexity: how well a model predicts held-out texts.

Of all documents together, the negative log-probability of every token given those before it, per token, per character
and per byte of UTF-8. A token means another piece of text in every tokenizer, so the figure per token, and perplexity,
which is its exponential, compare models of one tokenizer; those per character and per byte compare any.

Beside the held-out loss that tools/pretrain.py reports on the same files: there every document ends with eos, which is
predicted too, a document longer than the context is cut into pieces that know nothing of each other, and texts that
occur twice count once. The first token is predicted from bos in both; a base without bos predicts it here from eos, and
there not at all.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal, NamedTuple

from engine.data.reading import read_records
from engine.data.records import TextSchema
from engine.data.sources import ReadOptions, list_files, probe, settle
from engine.evaluation import perplexity
from engine.files import digest_files
from evals.comparison import bootstrap_interval
from evals.suite import BuildContext, Builder, TaskSpec
from evals.task import Item, Metric, Read, Request, Response, Result, Scored, Task
from model.errors import InputError

PER_CHARACTER, PER_BYTE, PER_TOKEN = "nats_per_character", "nats_per_byte", "nats_per_token"


class Held(NamedTuple):
    """A held-out document. file: its name below the path that was given."""

    id: str
    file: str
    text: str


@dataclass(frozen=True)
class PerplexityTask:
    """documents: all, or those drawn of them. left_out: documents that were not used, by reason."""

    name: str
    documents: tuple[Held, ...]
    left_out: Mapping[str, int]
    fingerprint: str
    reading: str
    seed: int
    kind: Literal["perplexity"] = "perplexity"

    @property
    def settings(self) -> Mapping[str, str | int | float | bool]:
        return {
            "files": self.fingerprint,
            "documents": len(self.documents),
            "reading": self.reading,
            "seed": self.seed,
            "signature": "perplexity|first token from bos|no eos|windows of half a context|version:1",
        }

    def requests(self) -> Sequence[Request]:
        return [Read(document.id, document.text) for document in self.documents]

    def result(self, responses: Mapping[str, Response]) -> Result:
        items = tuple(_item(document, responses[document.id]) for document in self.documents)
        files = list(dict.fromkeys(item.group for item in items))
        groups = {}
        if len(files) > 1:
            groups = {file: self._metrics([item for item in items if item.group == file]) for file in files}
        return Result(self._metrics(items), items, groups, counts=self.left_out)

    def _metrics(self, items: Sequence[Item]) -> tuple[Metric, ...]:
        means = [self._mean(items, name) for name in (PER_CHARACTER, PER_BYTE, PER_TOKEN)]
        low, high = (
            None if nats is None or math.isnan(nats) else perplexity(nats) for nats in (means[-1].low, means[-1].high)
        )
        value = perplexity(means[-1].value)
        return (*means, Metric("perplexity", value, low, high, len(items), "", "lower"))

    def _mean(self, items: Sequence[Item], name: str) -> Metric:
        nats, whole = (sum(column) for column in zip(*(item.parts[name] for item in items), strict=True))
        interval = bootstrap_interval(items, name, self.seed)
        return Metric(name, nats / whole if whole else math.nan, *interval, len(items), "nats", "lower")


def _item(document: Held, response: Response) -> Item:
    assert isinstance(response, Scored)
    nats, text = -response.logprob, document.text
    parts = {
        PER_CHARACTER: (nats, float(len(text))),
        PER_BYTE: (nats, float(len(text.encode()))),
        PER_TOKEN: (nats, float(response.tokens)),
    }
    return Item(document.id, parts, text, "", "", document.file, (text,))


@dataclass(frozen=True)
class _Schema(TextSchema):
    advice: ClassVar[str] = "Name the fields to be joined with fields=FIELD+FIELD, or give another file."


class _Options(ReadOptions):
    @property
    def schema(self) -> TextSchema:
        return _Schema(tuple(self.fields), self.max_characters)


def read_held_out(path: Path, options: ReadOptions) -> tuple[list[Held], Mapping[str, int]]:
    """Documents of a file or folder, as tools/pretrain.py reads them, and how many were left out, by reason.

    Raises:
        InputError: it cannot be read, holds something else than texts, such as conversations, or none at all.
    """
    documents: list[Held] = []
    lines: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    for listed in list_files([path]).files:
        file = probe(listed, options)
        for record in read_records(file, options.schema):
            record = settle(record, options)
            if record.text is None:
                counts["malformed"] += 1
            elif options.is_short(record):
                counts["too_short"] += 1
            else:
                where = f"{file.name}:{record.line}"
                lines[where] += 1  # a line may hold several records
                id = where if lines[where] == 1 else f"{where}.{lines[where]}"
                documents.append(Held(id, file.name, record.text))
    if not documents:
        why = ", ".join(f"{count} {reason.replace('_', ' ')}" for reason, count in counts.items())
        raise InputError(f"{path}: there is no text in it{f' ({why})' if why else ''}. Give another file.")
    return documents, counts


def build(spec: TaskSpec, context: BuildContext) -> Task:
    """Raises InputError: as `read_held_out`."""
    path = spec.require_path("a file or folder of held-out texts")
    fields = spec.take_str("fields", "")
    document = spec.take_choice("document", ("auto", "file", "paragraph", "line"))
    shortest = spec.take_int("min_characters", ReadOptions.min_characters, low=1)
    options = _Options(fields.split("+") if fields else [], document, min_characters=shortest)  # type: ignore[arg-type]
    documents, counts = read_held_out(path, options)
    files = [Path(file.path) for file in list_files([path]).files]
    reading = f"fields:{fields or 'auto'}|document:{document}|min_characters:{shortest}"
    return PerplexityTask(
        spec.take_str("label", spec.name),
        tuple(context.draw(documents)),
        counts,
        digest_files(*files),
        reading,
        context.seed,
    )


BUILDERS: dict[str, Builder] = {"perplexity": build}
