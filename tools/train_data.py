"""The documents of the training benchmark: made up by a rule, prepared and loaded as real ones are.

Every contender trains on the same documents in the same steps: ours from the loader, which packs them as in any run;
the others from rows that were cut from those very packs beforehand, off the clock.

Lengths, with C the context (a question, an answer and a text each have an end token):

    full     C
    ragged   lognormal, median C/8, deviation of the logarithm 1, clipped to 16 and C
    sft      one turn, with half the chance of the one before each further one up to four; questions lognormal with
             median C/64, answers C/16, deviation 0.8
    reward   a prompt and two answers of the same lengths as one turn of those
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from engine.data.corpus import Corpus, open_corpus
from engine.data.encoders import Encoder, Stored
from engine.data.groups import PreferenceSet, open_groups
from engine.data.loader import PackLoader, StepLoader
from engine.data.prepare import prepare
from engine.data.ranked_batch import RankedBatch
from engine.data.ranked_encoder import FACTS, HEAD
from engine.data.ranked_loader import RankedLoader
from engine.data.records import Record
from engine.data.shards import TRAINED, text_hash
from model.batch import IGNORE, PackedBatch
from tools.train_cases import Kind

MOST_TURNS = 4
_KINDS = {"full": "texts", "ragged": "texts", "sft": "conversations", "reward": "preferences"}


def lengths(kind: Kind, context: int, tokens: int, seed: int) -> list[list[int]]:
    """Documents of so many tokens together, each as the lengths of its parts: of a text one; of a conversation a
    question and an answer in turn; of a comparison the prompt and both answers. Every one fits the context."""
    random = np.random.default_rng(seed)

    def draw(median: float, spread: float, most: int) -> int:
        return int(np.clip(random.lognormal(np.log(median), spread), 4, max(4, most)))

    found: list[list[int]] = []
    total = 0
    while total < tokens:
        if kind == "full":
            parts = [context]
        elif kind == "ragged":
            parts = [max(16, draw(context / 8, 1.0, context))]
        elif kind == "sft":
            turns = min(int(random.geometric(0.5)), MOST_TURNS)
            most = context // (2 * turns)
            parts = [draw(context / share, 0.8, most) for _ in range(turns) for share in (64, 16)]
        else:
            parts = [draw(context / share, 0.8, context // 2) for share in (64, 16, 16)]
        found.append(parts)
        total += sum(parts) + (parts[0] if kind == "reward" else 0)  # the prompt stands before both answers
    return found


class _NoTokenizer:
    """Ids need none."""

    bos_id, eos_id, add_bos, fingerprint = None, 0, False, "made up"

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size

    def encode_batch(self, texts: list[str], /) -> list[list[int]]:
        raise AssertionError("nothing is read here")

    def save(self, directory: Path, /) -> None:
        directory.mkdir()


class MadeUp(Encoder):
    """Random ids from 1 on, as many as a record says: `number: length length ...`."""

    def __init__(self, kind: Kind, vocab_size: int, context: int) -> None:
        self.tokenizer = _NoTokenizer(vocab_size)
        self.dtype = np.dtype("<u4")
        self._kind = kind
        self.fingerprint = f"made up {kind} {vocab_size}"
        self.facts: dict[str, Any] = {}
        if kind in ("sft", "reward"):
            self.facts = {
                "kind": _KINDS[kind],
                "encoder": self.fingerprint,
                "template": "made up",
                "context": context,
            }

    def encode(self, records: Sequence[Record]) -> Iterator[Stored]:
        for record in records:
            text = record.text or ""
            number, _, sizes = text.partition(":")
            random = np.random.default_rng(int(number))
            parts = [random.integers(1, self.tokenizer.vocab_size, int(size), self.dtype) for size in sizes.split()]
            yield Stored(self._joined(parts, record.line), len(text), text_hash(text))

    def _joined(self, parts: list[np.ndarray], line: int) -> np.ndarray:
        if self._kind == "sft":
            for answer in parts[1::2]:
                answer |= TRAINED
        if self._kind != "reward":
            return np.concatenate(parts)
        prompt, *answers = parts
        facts = np.zeros((2, FACTS), self.dtype)
        facts[:, 0] = [len(prompt) + len(answer) for answer in answers]
        facts[:, 1] = np.array([1.0, 0.0], "<f4").view(self.dtype)  # the first is the better one
        for row, answer in zip(facts, answers, strict=True):
            row[2:] = np.frombuffer(blake2b(answer.tobytes(), digest_size=8).digest(), self.dtype)
        head = np.array([2, line], self.dtype)
        assert len(head) == HEAD
        sequences = [np.concatenate([prompt, answer | TRAINED]) for answer in answers]
        return np.concatenate([head, facts.ravel(), *sequences])


def made_up_corpus(kind: Kind, context: int, vocab_size: int, tokens: int, seed: int, directory: Path) -> Corpus:
    """Documents of so many tokens, prepared below a directory that is there."""
    raw = directory / "raw.jsonl"
    with open(raw, "w", encoding="utf-8") as file:
        for number, parts in enumerate(lengths(kind, context, tokens, seed)):
            file.write(json.dumps({"text": f"{seed + number:012d}: {' '.join(map(str, parts))}"}) + "\n")
    prepared = prepare([raw], MadeUp(kind, vocab_size, context), directory / "prepared", workers=1)
    if kind == "reward":
        return open_groups(prepared, None, 2)
    return open_corpus([prepared], kind="conversations" if kind == "sft" else "texts")


def loader_of(corpus: Corpus, kind: Kind, seed: int, tokens_per_pack: int, context: int, packs: int) -> StepLoader[Any]:
    """The loader of a run, from its first step on."""
    if isinstance(corpus, PreferenceSet):
        return RankedLoader(corpus, seed, tokens_per_pack, context, packs)
    return PackLoader(corpus, seed, tokens_per_pack, context, packs, allow_split=kind != "sft")


class Rows(NamedTuple):
    """A peer's batch, padded on the right with id 0, which no document has.

    tokens, targets: int64 [B, S]; targets are the next tokens, or IGNORE.
    ends: int64 [B], each row's last token; of comparisons rows are a better and a worse answer in turn.
    """

    tokens: Tensor
    targets: Tensor
    ends: Tensor

    def to(self, device: torch.device) -> Rows:
        return Rows(*(tensor.to(device, non_blocking=True) for tensor in self))


class Step(NamedTuple):
    """What one optimizer step trains on.

    lengths: of its documents; their sum is its real tokens.
    targets: how many; of comparisons pairs.
    units: rows that belong together, a row or a pair of rows each: (tokens, targets) int64 [L].
    """

    lengths: list[int]
    targets: int
    units: list[list[tuple[Tensor, Tensor]]]

    @property
    def tokens(self) -> int:
        return sum(self.lengths)

    def batches(self, units: int) -> list[Rows]:
        """All rows, so many units at a time; those of similar lengths together."""
        ordered = sorted(self.units, key=lambda unit: max(len(tokens) for tokens, _ in unit), reverse=True)
        groups = [ordered[first : first + units] for first in range(0, len(ordered), units)]
        return [_padded([row for unit in group for row in unit]) for group in groups]


def _padded(rows: list[tuple[Tensor, Tensor]]) -> Rows:
    width = -(-max(len(tokens) for tokens, _ in rows) // 8) * 8
    ids, targets = torch.zeros(len(rows), width).long(), torch.full((len(rows), width), IGNORE)
    for row, (tokens, following) in enumerate(rows):
        ids[row, : len(tokens)], targets[row, : len(tokens)] = tokens, following
    return Rows(ids, targets, torch.tensor([len(tokens) - 1 for tokens, _ in rows]))


def steps_of(loader: StepLoader[Any], kind: Kind, context: int, count: int) -> list[Step]:
    """The first steps of a loader, for those who do not pack.

    In pre-training a row is a run of `context` tokens of a pack, whatever documents it holds: that is how texts are
    usually fed, and leaves no padding; attention then reaches into the document before, which costs little. Elsewhere a
    row is a document.
    """
    found = []
    for _ in range(count):
        packs = loader.next_step()
        units: list[list[tuple[Tensor, Tensor]]] = []
        sizes: list[int] = []
        targets = 0
        for pack in packs:
            batch = pack.batch if isinstance(pack, RankedBatch) else pack
            documents = _documents(batch)
            sizes += [len(tokens) for tokens, _ in documents]
            if kind in ("full", "ragged"):
                units += [[row] for row in zip(batch.tokens.split(context), batch.targets.split(context), strict=True)]
            elif kind == "sft":
                units += [[document] for document in documents]
            else:
                units += [documents[first : first + 2] for first in range(0, len(documents), 2)]
            targets += int((batch.targets != IGNORE).sum())
        found.append(Step(sizes, len(units) if kind == "reward" else targets, units))
    return found


def _documents(batch: PackedBatch) -> list[tuple[Tensor, Tensor]]:
    bounds = batch.cu_seqlens[: batch.num_documents + 1].tolist()
    return [(batch.tokens[first:last], batch.targets[first:last]) for first, last in itertools.pairwise(bounds)]
