"""Stored records put together to groups: which answers are compared with each other.

A record with several answers is a group by itself; one that repeats an earlier one is dropped. Records of one answer
(the rows of a table of candidates) are joined to groups (`candidates.py`), wherever in the files they stand. Pairs with
one prompt stay apart: nobody has compared the answer of one with the answer of another.

All this is found by sorting hashes, some 40 bytes a record, and kept beside the tokens:

groups.npy           one row a group, in the order of their first records (`GROUP`)
members.npy          int64, the records of each group
left_out.jsonl       groups of candidates from which nothing can be learnt, and why
groups.json          written last: what `Facts` says
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np

from engine.data.candidates import join
from engine.data.corpus import Store
from engine.data.ranked_encoder import FACTS, HEAD
from engine.data.shards import Prepared, token_path
from engine.files import sync_file, write_durably

# members: where a group's records begin in members.npy; sequence: number of its first sequence; sequences, tokens: how
# many it has; hashes: of its first record, the second for the first question.
GROUP = np.dtype(
    [("members", "<i8"), ("sequence", "<i8"), ("sequences", "<i4"), ("tokens", "<i4"), ("hashes", "<u8", 2)]
)
_FILE = "groups.json"


@dataclass(frozen=True)
class Facts:
    """Of all groups of a prepared directory.

    duplicates: groups and candidates that repeat an earlier one, and are left out.
    beyond_most: candidates left out because a group has too many.
    left_out: groups of candidates from which nothing can be learnt.
    shortest: tokens of the shortest sequence.
    most_responses, most_tokens: of a group.
    fingerprint: over all that training reads.
    """

    groups: int
    sequences: int
    duplicates: int
    beyond_most: int
    left_out: int
    shortest: int
    most_responses: int
    most_tokens: int
    fingerprint: str


@dataclass(frozen=True)
class Index:
    """What groups there are; the arrays are memory-mapped."""

    facts: Facts
    groups: np.ndarray
    members: np.ndarray


def open_index(directory: Path, max_responses: int) -> Index:
    """The groups of a prepared directory, found on first use."""
    if not (directory / _FILE).is_file():
        _Grouping(directory, max_responses).write()
    facts = Facts(**json.loads((directory / _FILE).read_text(encoding="utf-8")))
    if not facts.groups:
        return Index(facts, np.empty(0, GROUP), np.empty(0, np.int64))
    return Index(facts, *(np.load(directory / f"{name}.npy", mmap_mode="r") for name in ("groups", "members")))


@dataclass
class _Records:
    """Facts of all stored records, [N] each; `grade`, `answer` and `line` count for records of one answer."""

    answers: np.ndarray
    tokens: np.ndarray
    shortest: np.ndarray
    line: np.ndarray
    grade: np.ndarray
    answer: np.ndarray


class _Grouping:
    """The work on one directory."""

    def __init__(self, directory: Path, max_responses: int) -> None:
        self.directory = directory
        self.max_responses = max_responses
        self.prepared = Prepared(directory)
        self.store = Store([[self.prepared]])
        self.records = self._scan()
        self.duplicates = self.beyond_most = 0
        self.left_out: list[tuple[int, str]] = []  # first record, reason

    def write(self) -> None:
        """Find the groups and write them down; the facts come last."""
        whole = self._whole()
        candidates, owners = self._candidates()
        members = np.concatenate([whole, candidates])
        owners = np.concatenate([np.arange(len(whole)), len(whole) + owners])
        facts = self._save(members, owners) if len(members) else Facts(0, 0, 0, 0, 0, 0, 0, 0, "")
        with open(self.directory / "left_out.jsonl", "w", encoding="utf-8") as file:
            file.writelines(json.dumps(entry, ensure_ascii=False) + "\n" for entry in self._faults())
            file.flush()
            os.fsync(file.fileno())
        counted = {"duplicates": self.duplicates, "beyond_most": self.beyond_most, "left_out": len(self.left_out)}
        write_durably(self.directory / _FILE, json.dumps({**asdict(facts), **counted}))

    def _save(self, members: np.ndarray, owners: np.ndarray) -> Facts:
        """Write groups in the order of their first records.

        Args:
            members: records; owners: the number of each one's group.
        """
        records = self.records
        first = np.full(owners.max() + 1, len(records.answers))
        np.minimum.at(first, owners, members)
        order = np.lexsort((members, first[owners]))
        members, owners = members[order], owners[order]
        starts = np.flatnonzero(np.r_[True, owners[1:] != owners[:-1]])
        groups = np.empty(len(starts), GROUP)
        groups["members"] = starts
        groups["sequences"] = np.add.reduceat(records.answers[members], starts)
        groups["sequence"] = np.cumsum(groups["sequences"]) - groups["sequences"]
        groups["tokens"] = np.add.reduceat(records.tokens[members], starts)
        groups["hashes"] = self.store.hashes(0, len(self.store))[members[starts]]
        for name, values in (("groups", groups), ("members", members)):
            beside = self.directory / f".{name}.tmp.npy"
            np.save(beside, values)
            sync_file(beside)
            os.replace(beside, self.directory / f"{name}.npy")
        digest = blake2b(self.store.fingerprint.encode(), digest_size=16)
        for unit in self.prepared.manifest["units"]:
            digest.update(unit["tokens_digest"].encode())
        return Facts(
            groups=len(groups),
            sequences=int(groups["sequences"].sum()),
            duplicates=0,
            beyond_most=0,
            left_out=0,
            shortest=int(records.shortest[members].min()),
            most_responses=int(groups["sequences"].max()),
            most_tokens=int(groups["tokens"].max()),
            fingerprint=digest.hexdigest(),
        )

    def _scan(self) -> _Records:
        """Read the facts before the ids of every record."""
        count = len(self.store)
        line, grade = np.zeros(count, np.int64), np.zeros(count, np.float32)
        answers, shortest, answer = (np.zeros(count, np.int64) for _ in range(3))
        for shard in self.prepared.shards:
            if not shard.documents:
                continue
            cells = np.memmap(token_path(self.directory, shard.unit), self.prepared.dtype, mode="r")
            rows = slice(shard.first_row, shard.first_row + shard.documents)
            begin = self.prepared.offsets[rows].astype(np.int64) - shard.first_token
            answers[rows], line[rows] = cells[begin], cells[begin + 1]
            for number in np.unique(answers[rows]):
                chosen = np.flatnonzero(answers[rows] == number)
                places = begin[chosen, None] + HEAD + np.arange(FACTS * number)
                facts = cells[places].reshape(len(chosen), number, FACTS)
                shortest[rows.start + chosen] = facts[:, :, 0].min(1)
                if number == 1:
                    grade[rows.start + chosen] = np.ascontiguousarray(facts[:, 0, 1]).view("<f4")
                    answer[rows.start + chosen] = np.ascontiguousarray(facts[:, 0, 2:]).view("<i8").ravel()
        tokens = self.store.lengths(np.arange(count)) - HEAD - FACTS * answers
        return _Records(answers, tokens, shortest, line, grade, answer)

    def _whole(self) -> np.ndarray:
        """Records that are groups by themselves, the first of equal ones."""
        whole = np.flatnonzero(self.records.answers > 1)
        _, first = np.unique(self.store.hashes(0, len(self.store))[whole, 0], return_index=True)
        self.duplicates += len(whole) - len(first)
        return whole[np.sort(first)]

    def _candidates(self) -> tuple[np.ndarray, np.ndarray]:
        """Records of one answer that are compared with others, and the number of each one's group."""
        rows = np.flatnonzero(self.records.answers == 1)
        prompts = self.store.hashes(0, len(self.store))[rows, 0]
        joined = join(prompts, self.records.answer[rows], self.records.grade[rows], self.max_responses)
        self.duplicates += joined.duplicates
        self.beyond_most += joined.beyond_most
        self.left_out += [(int(rows[first]), reason) for first, reason in joined.left_out]
        return rows[joined.rows], joined.owners

    def _faults(self) -> Iterator[dict[str, Any]]:
        """Groups that are left out, by the place of their first candidates."""
        with open(self.directory / "files.jsonl", encoding="utf-8") as lines:
            files = [json.loads(line) for line in lines]
        ends = np.cumsum([file["documents"] for file in files])
        units = np.array([shard.first_row for shard in self.prepared.shards])
        for record, reason in sorted(self.left_out):
            number = int(np.searchsorted(ends, record, side="right"))
            file, first = files[number], ends[number] - files[number]["documents"]
            # Lines of JSON that was read in several pieces are counted from the piece's beginning.
            is_exact = file["format"] != "json_lines" or units[units <= record].max() <= first
            yield {"file": file["file"], "line": int(self.records.line[record]) if is_exact else None, "reason": reason}
