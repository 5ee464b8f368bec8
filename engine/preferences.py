"""Raw comparisons to the groups of one run, as `conversations.py` does for conversations: prepared, held out, and said.

Everything here is done by rank 0 first and found done by the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from engine.config import check_range
from engine.conversations import hold_out
from engine.data.groups import PreferenceSet as PreferenceSet
from engine.data.groups import open_groups
from engine.data.preference_files import PreferenceOptions
from engine.data.prepare import preparation_key, prepare
from engine.data.progress import ProgressLine
from engine.data.ranked_encoder import RankedEncoder
from engine.data.report import reject_reasons, what_else
from engine.data.shards import is_prepared, read_manifest
from engine.launch import speak
from model.chat import ChatTemplate
from model.errors import InputError
from model.tokenizer import Tokenizer

# Reasons that are said; all of them are in the lists named beside them.
_REASONS = 3


@dataclass
class PreferenceDataConfig(PreferenceOptions):
    """What is read, and how records become comparisons."""

    paths: list[str] = field(default_factory=list)
    """files, directories or glob patterns of compared answers"""
    weights: list[float] = field(default_factory=list)
    """epochs of each source in one epoch of the mixture; by default 1 each"""
    workers: int | None = None
    """processes that tokenise; by default one a core"""

    def check(self) -> None:
        """Raises InputError where a number makes no sense."""
        super().check()
        check_range("data", self, 1, "workers")


def open_preferences(
    config: PreferenceDataConfig, template: ChatTemplate, tokenizer: Tokenizer, context: int, directory: Path
) -> PreferenceSet:
    """The groups to train on, tokenised under a template, no sequence longer than the context.

    Raw files are prepared on first use below `directory`/prepared; what was left out or shortened is said.

    Raises:
        InputError: no data, data that cannot be read, or nothing in it that compares answers.
    """
    return _open(config.paths, config.weights, config, template, tokenizer, context, directory, "--data")


def open_held_out_preferences(
    train: PreferenceSet,
    fraction: float,
    paths: Sequence[str],
    config: PreferenceDataConfig,
    template: ChatTemplate,
    tokenizer: Tokenizer,
    context: int,
    directory: Path,
) -> tuple[PreferenceSet, PreferenceSet | None]:
    """Groups to train on and held-out ones, of which none begin with the same question.

    Args:
        fraction: of the first questions, where there are no held-out files.
        paths: held-out files, or nothing. Groups that begin with one of their questions are taken out of training, and
            counted.
    Raises:
        InputError: as `open_preferences`; or nothing is left to train on.
    """
    held_out = None
    if paths:
        held_out = _open(paths, [], config, template, tokenizer, context, directory, "--eval.data")
    return hold_out(train, fraction, paths, held_out, "prompts")


def describe_preferences(train: PreferenceSet, held_out: PreferenceSet | None) -> str:
    """One line on what is trained on."""
    parts = [f"{_size(train)} to train on"]
    if train.num_duplicates:
        parts.append(f"{train.num_duplicates:,} exact duplicates dropped")
    if held_out is not None:
        parts.append(f"{_size(held_out)} held out")
    return "; ".join(parts) + "."


def _size(groups: PreferenceSet) -> str:
    return f"{groups.num_groups:,} prompts with {groups.num_responses:,} answers, {groups.num_tokens:,} tokens"


def _open(
    paths: Sequence[str],
    weights: list[float],
    config: PreferenceDataConfig,
    template: ChatTemplate,
    tokenizer: Tokenizer,
    context: int,
    directory: Path,
    option: str,
) -> PreferenceSet:
    if not paths:
        raise InputError("There is no data. Name files or directories with --data.")
    for path in filter(is_prepared, paths):
        raise InputError(f"{path}: prepared; comparisons are prepared by the job that reads them. Give the raw files.")
    encoder = RankedEncoder(template, tokenizer, context, config.max_responses)
    target = directory / "prepared" / preparation_key(paths, encoder, config)
    prepare(paths, encoder, target, config, workers=config.workers, progress=ProgressLine("Preparing"))
    groups = open_groups(target, weights or None, config.max_responses)
    _report(paths, target, groups, option)
    return groups


def _report(paths: Sequence[str], directory: Path, groups: PreferenceSet, option: str) -> None:
    """What the files were, and what became of their comparisons.

    Raises:
        InputError: there is none in them.
    """
    manifest, facts = read_manifest(directory), groups.store.facts
    rejects, left_out = directory / "rejects.jsonl", directory / "left_out.jsonl"
    reasons = {
        path: [f"{count:,} x {reason}" for reason, count in reject_reasons(path)] for path in (rejects, left_out)
    }
    if not groups.num_groups:
        why = next((f" ({found[0]})" for found in reasons.values() if found), "")
        remedy = what_else(rejects, manifest["context"], option)
        raise InputError(f"{', '.join(paths)}: there is no comparison of answers{why}. {remedy}")
    encodings = ", ".join(f"{count:,} {name}" for name, count in sorted(manifest["encodings"].items()))
    speak(
        f"Files read: {encodings}; {groups.num_groups:,} prompts with {groups.num_responses:,} answers, "
        f"{groups.num_tokens:,} tokens."
    )
    dropped = [f"{manifest['ignored_files']:,} files of other kinds"] if manifest["ignored_files"] else []
    for path, count, what in ((rejects, manifest["rejected"], "records"), (left_out, facts.left_out, "questions")):
        if count:
            more = ", ..." if len(reasons[path]) > _REASONS else ""
            dropped.append(f"{count:,} {what} ({', '.join(reasons[path][:_REASONS])}{more}; see {path})")
    if beyond := manifest["beyond_most"] + facts.beyond_most:
        dropped.append(f"{beyond:,} answers beyond --data.max_responses")
    speak(f"Left out: {', '.join(dropped) or 'nothing'}.")
    if manifest["shortened"]:
        speak(
            f"Longer than the context of {manifest['context']:,} tokens: {manifest['shortened']:,} prompts lost their "
            f"{manifest['dropped_turns']:,} oldest turns."
        )
