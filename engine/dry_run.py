"""What a run would do, without doing it: memory on each rank, the schedule, and one document as it is trained.

Nothing is written, nothing is allocated on a device; of raw files only the beginning is read.
"""

from __future__ import annotations

import itertools
import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from engine.config import check_range
from engine.conversations import ConversationDataConfig, first_whole, open_conversations
from engine.data.conversation_files import read_conversations
from engine.data.corpus import open_corpus
from engine.data.preference_files import read_comparisons
from engine.data.preferences import dump
from engine.data.ranked_encoder import RankedEncoder, unpack
from engine.data.records import Record
from engine.data.shards import TRAINED, is_prepared
from engine.data.sources import ReadOptions, list_files, read_texts
from engine.memory import Setup
from engine.memory_advice import GIB
from engine.preferences import PreferenceDataConfig
from engine.preview import show_document, show_ids
from engine.recompute import Recompute
from engine.shard import Precision
from model.batch import IGNORE, PackedBatch
from model.chat import ChatTemplate, Encoded, fit_batch
from model.errors import InputError
from model.lora import LoraSpec
from model.tokenizer import Tokenizer
from model.tokenizer_training import coverage_that_fits, sample_lines, train_sentencepiece

# Read of raw files for a sample, and for a throwaway tokenizer.
_TEXTS, _CHARACTERS = 200, 200_000


@dataclass
class PlanConfig:
    """What --dry-run plans for, where it is not the machine at hand."""

    world: int | None = None
    """number of processes; by default those of this launch"""
    device_gib: float | None = None
    """memory of one device; by default that of the GPU here, or the smallest common one that suffices"""

    def check(self) -> None:
        """Raises InputError where a number makes no sense."""
        check_range("plan", self, 1, "world", "device_gib")


def planned_world(config: PlanConfig) -> int:
    """Processes to plan for."""
    return config.world or int(os.environ.get("WORLD_SIZE", "1"))


def planned_device(config: PlanConfig) -> int | None:
    """Bytes of one device: as told, or of the GPU here; None where there is neither."""
    if config.device_gib is not None:
        return int(config.device_gib * GIB)
    return torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else None


def planned_setup(
    config: PlanConfig,
    *,
    tokens_per_pack: int,
    packs_per_step: int,
    context: int,
    replicas: int,
    precision: Literal["auto", "bf16", "fp32"],
    fp8: bool,
    recompute: Recompute,
    reshard_after_forward: bool,
    lora: LoraSpec | None = None,
) -> Setup:
    """How a model is trained. `auto` precision is fp32 only where the run would stay on this machine's CPU."""
    world = planned_world(config)
    is_for_gpu = torch.cuda.is_available() or config.world is not None or config.device_gib is not None
    chosen: Precision = ("bf16" if is_for_gpu else "fp32") if precision == "auto" else precision
    return Setup(
        tokens_per_pack=tokens_per_pack,
        context=context,
        world=world,
        replicas=replicas,
        precision=chosen,
        fp8=fp8,
        recompute=recompute,
        reshard_after_forward=reshard_after_forward,
        micro_batches=-(-packs_per_step // world),
        lora=lora,
        device="cuda" if is_for_gpu else "cpu",
    )


def schedule_report(steps: int, tokens_per_step: int, rate: Callable[[int], float]) -> str:
    """The learning rate at some steps."""
    shown = sorted({0, steps // 100, steps // 10, steps // 4, steps // 2, 3 * steps // 4, steps - 1})
    points = ", ".join(f"{step + 1:,}: {rate(step):.2e}" for step in shown)
    return (
        f"{steps:,} steps of {tokens_per_step:,} tokens, {steps * tokens_per_step:,} in all. "
        f"Learning rate at step {points}."
    )


@dataclass(frozen=True)
class DataLook:
    """What a look at the data says. `is_exact`: the data is prepared, so its tokens are counted, not estimated."""

    tokens: int
    is_exact: bool
    sample: str


def look_at_data(
    paths: Sequence[str], options: ReadOptions, tokenizer: Tokenizer | None, vocab_size: int, context: int
) -> DataLook:
    """Count or estimate the tokens of an epoch, and show one document.

    Args:
        tokenizer: None for one that the run would train; a throwaway one stands in for it.
    Raises:
        InputError: data that cannot be read, or no document in it.
    """
    if all(map(is_prepared, paths)) and tokenizer is not None:
        corpus = open_corpus(paths, None, tokenizer.fingerprint)
        ids = corpus.read(int(corpus.documents()[0]), 0, context).tolist()
        return DataLook(corpus.num_tokens, True, show_document(_as_batch(ids, context), tokenizer))
    listing = list_files(paths)
    texts: list[str] = []
    for text in itertools.islice(read_texts(paths, options), _TEXTS):
        texts.append(text[:_CHARACTERS])
        if sum(map(len, texts)) > _CHARACTERS:
            break
    if not texts:
        raise InputError(f"{', '.join(paths)}: there is no document to read. Give --data other files.")
    note, counted = "", texts
    if tokenizer is None:
        # What a tokenizer has learnt from takes it fewer tokens than the rest will: count on other texts.
        counted = texts[1::2] or texts
        lines, _ = sample_lines(texts[::2], _CHARACTERS, 0)
        coverage = coverage_that_fits(lines, vocab_size)
        tokenizer = Tokenizer.from_sentencepiece(
            train_sentencepiece(lines, vocab_size, coverage, is_limit_soft=True), {}
        )
        note = " (with a tokenizer trained on the first texts only)"
    tokens = sum(map(len, tokenizer.encode_batch(counted)))
    per_byte = tokens / max(1, sum(len(text.encode()) for text in counted))
    first = ([tokenizer.bos_id] if tokenizer.add_bos else []) + tokenizer.encode(texts[0]) + [tokenizer.eos_id]
    ids = [token for token in first if token is not None][:context]
    return DataLook(math.ceil(listing.size * per_byte), False, show_document(_as_batch(ids, context), tokenizer) + note)


def look_at_conversations(
    config: ConversationDataConfig, template: ChatTemplate, tokenizer: Tokenizer, context: int
) -> DataLook:
    """The same for conversations, of which one is shown as the template writes it.

    Raises:
        InputError: data that cannot be read, or no conversation in it.
    """
    if not config.paths or any(map(is_prepared, config.paths)):
        corpus = open_conversations(config, template, tokenizer, context, Path())
        stored = corpus.read(first_whole(corpus, template.end_ids(tokenizer)))
        shown = _as_batch((stored % TRAINED).tolist(), context, (stored >= TRAINED).tolist())
        return DataLook(corpus.num_tokens, True, show_document(shown, tokenizer))
    found = [
        answered
        for messages in itertools.islice(read_conversations(config.paths, config), _TEXTS)
        if (answered := messages[: -1 if messages[-1].role == "user" else None])
    ]
    fitted = fit_batch(template, tokenizer, found, context)
    usable = [(messages, row) for messages, row in zip(found, fitted, strict=True) if isinstance(row, Encoded)]
    if not usable:
        why = next((f" ({error})" for error in fitted), "")
        raise InputError(f"{', '.join(config.paths)}: there is no conversation{why}. Give --data other files.")
    # As most files write them; the names of fields and roles take a third of their bytes where turns are short.
    size = sum(
        len(json.dumps([vars(message) for message in messages], ensure_ascii=False).encode()) for messages, _ in usable
    )
    tokens = sum(len(row.ids) for _, row in usable) / size * list_files(config.paths).size
    first = next((row for _, row in usable if not row.is_cut), usable[0][1])
    return DataLook(math.ceil(tokens), False, show_document(_as_batch(first.ids, context, first.trained), tokenizer))


def look_at_preferences(
    config: PreferenceDataConfig, template: ChatTemplate, tokenizer: Tokenizer, context: int
) -> tuple[DataLook, int]:
    """The same for comparisons, of which the answers of one are shown; and the tokens of the largest group looked at.

    Raises:
        InputError: data that cannot be read, or nothing in it that compares answers.
    """
    if not config.paths:
        raise InputError("There is no data. Name files or directories with --data.")
    found = [comparison for comparison in itertools.islice(read_comparisons(config.paths, config), _TEXTS)]
    texts = list(map(dump, found))
    encoder = RankedEncoder(template, tokenizer, context, config.max_responses)
    stored = encoder.encode([Record(number, text) for number, text in enumerate(texts, 1)])
    usable = [(text, unpack(row.ids)) for text, row in zip(texts, stored, strict=True) if row.ids is not None]
    if not usable:
        raise InputError(f"{', '.join(config.paths)}: there is no comparison of answers. Give --data other files.")
    sizes = [sum(map(len, answers.ids)) for _, answers in usable]
    tokens = sum(sizes) / sum(len(text.encode()) for text, _ in usable) * list_files(config.paths).size
    first = usable[0][1]
    shown = [
        f"{grade:g}: {show_ids((ids % TRAINED).tolist(), (ids >= TRAINED).tolist(), tokenizer)}"
        for ids, grade in zip(first.ids, first.grades.tolist(), strict=True)
    ]
    return DataLook(math.ceil(tokens), False, "\n".join(shown)), max(sizes)


def _as_batch(ids: list[int], context: int, trained: list[bool] | None = None) -> PackedBatch:
    """One document as a batch of its own, all of it trained unless said otherwise."""
    tokens = torch.from_numpy(np.array(ids, dtype=np.int64))
    targets = torch.cat([tokens[1:], torch.tensor([IGNORE])])
    if trained is not None:
        targets[:-1][~torch.tensor(trained[1:], dtype=torch.bool)] = IGNORE
    bounds = torch.tensor([0, len(ids)], dtype=torch.int32)
    return PackedBatch(tokens, torch.arange(len(ids)), bounds, targets, 1, context)
