"""Entity extraction: a model names the entities of a text in words, and is scored against annotators.

    entities=FILE  chimst=FILE  ccks2019=PATH  cmeee=PATH  cmedqaner=PATH  cehrner=PATH

with ,shots=5,exemplars=FILE,pick=cover,format=json ... : docs/evaluation-entities.md.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Literal, NamedTuple

from engine.chatting import SamplingConfig
from engine.files import digest_files
from evals.entity_answers import Parsed, parse
from evals.entity_files import LAYOUTS, Annotated, Layout, Reading, read_annotated
from evals.entity_metrics import FAILURES, measure
from evals.entity_paper import build_paper
from evals.entity_prompts import PLAIN_STOP, WORDINGS, Wording, ask, choose_exemplars, shown, write
from evals.entity_records import find_file, holds_written
from evals.entity_scores import Counts, Pair, Span, claim, pairs, relaxed, relaxed_spans, strict
from evals.entity_text import FoldedText, fold
from evals.entity_types import EntityType, TypeNames, named
from evals.suite import BuildContext, Builder, TaskSpec
from evals.task import Answer, Answered, Item, Prompt, Request, Response, Result, Task
from model.errors import InputError

MAX_NEW_TOKENS = 512
"""Of an answer. Few notes of these datasets need more; answers that do are counted."""

SIGNATURE = "set of (type, mention)|nfkc, case and spaces folded|relaxed: one contains the other, largest matching"
SIGNATURE += "|spans: every place, free ones first|version:1"


@dataclass(frozen=True)
class EntityTask:
    """texts: what is asked about.
    types: asked for, in the order of prompts.
    fits: whether a prompt and so many tokens go into the context; None where everything does.
    read, counts: how the files were read, and what they held.
    """

    name: str
    texts: tuple[Annotated, ...]
    exemplars: tuple[Annotated, ...]
    types: tuple[EntityType, ...]
    has_spans: bool
    wording: Wording
    prompting: Literal["chat", "plain"]
    max_new_tokens: int
    seed: int
    fits: Callable[[Prompt, int], bool] | None = None
    read: Mapping[str, str | int] = field(default_factory=dict)
    counts: Mapping[str, int] = field(default_factory=dict)
    kind: Literal["entities"] = "entities"

    @property
    def settings(self) -> Mapping[str, str | int | float | bool]:
        return {
            **self.read,
            "instruction": self.wording.instruction.format(types="…"),
            "types": "、".join(self._names),
            "shots": len(self.exemplars),
            "prompting": self.prompting,
            "max_new_tokens": self.max_new_tokens,
            "signature": SIGNATURE,
            "seed": self.seed,
        }

    def requests(self) -> Sequence[Request]:
        stop = [PLAIN_STOP] if self.prompting == "plain" else []
        sampling = SamplingConfig(temperature=0.0, top_p=1.0, max_new_tokens=self.max_new_tokens, stop=stop)
        return [Answer(asked.id, asked.prompt, sampling) for asked in self._asked]

    def result(self, responses: Mapping[str, Response]) -> Result:
        scored = [self._score(asked, responses[asked.id]) for asked in self._asked]
        counts = Counter({**self.counts, "dropped_exemplars": sum(asked.dropped for asked in self._asked)})
        for one in scored:
            counts.update(one.counts)
        items = tuple(one.item for one in scored)
        metrics, groups = measure(items, [one.by_type for one in scored], self.seed)
        if not self.has_spans:
            return Result(metrics, items, groups, counts=dict(counts))
        best = self.span_f1_of_the_right_answer()
        note = (
            "Spans: an answer names no places, so a mention means every place where the text has it. The right answer "
            f"itself reaches {best:.1%} by this rule."
        )
        return Result(metrics, items, groups, (("the right answer", "span_f1", best),), dict(counts), (note,))

    def span_f1_of_the_right_answer(self) -> float:
        """What an answer that names exactly the right mentions scores: 1 unless only some places of one are marked."""
        found = [strict(claim(_pairs_of(text), FoldedText(text.text)), _spans_of(text)).f1 for text in self.texts]
        right, in_all = (math.fsum(column) for column in zip(*found, strict=True))
        return right / in_all if in_all else math.nan

    @cached_property
    def _names(self) -> tuple[str, ...]:
        return tuple(kind.name for kind in self.types)

    @cached_property
    def _labels(self) -> TypeNames:
        return TypeNames(self.types)

    @cached_property
    def _asked(self) -> list[_Asked]:
        return [self._ask(text) for text in self.texts]

    def _ask(self, text: Annotated) -> _Asked:
        """The first exemplars go where a plain text would lose its beginning, which is the instruction; of a
        conversation the respondent drops the oldest turns."""
        for dropped in range(len(self.exemplars) + 1):
            prompt = ask(text, self.exemplars[dropped:], self._names, self.wording, self.prompting)
            if self.prompting == "chat" or self.fits is None or self.fits(prompt, self.max_new_tokens):
                break
        return _Asked(str(text.number), text, prompt, dropped)

    def _score(self, asked: _Asked, response: Response) -> _Scored:
        assert isinstance(response, Answered)
        text, folded = asked.text, FoldedText(asked.text.text)
        parsed = parse(response.text, folded, self._labels)
        said, gold = pairs(parsed.entities), _pairs_of(text)
        exact = strict(said, gold)
        parts: dict[str, tuple[float, float]] = {
            "micro_f1": exact.f1,
            "precision": exact.precision,
            "recall": exact.recall,
            "relaxed_f1": relaxed(said, gold).f1,
            FAILURES: (float(parsed.is_unreadable), 1.0),
        }
        if self.has_spans:
            claimed, places = claim(said, folded), _spans_of(text)
            parts["span_f1"] = strict(claimed, places).f1
            parts["span_relaxed_f1"] = relaxed_spans(claimed, places).f1
        by_type = {name: strict(_of(name, said), _of(name, gold)) for name in self._names}
        right = write(text, self._names, self.wording)
        item = Item(asked.id, parts, shown(asked.prompt), response.text, right, texts=(text.text,))
        return _Scored(item, by_type, _count(parsed))


class _Asked(NamedTuple):
    """dropped: exemplars that the prompt goes without."""

    id: str
    text: Annotated
    prompt: Prompt
    dropped: int


class _Scored(NamedTuple):
    item: Item
    by_type: dict[str, Counts]
    counts: dict[str, int]


def build(spec: TaskSpec, context: BuildContext) -> Task:
    """The task that a word of --tasks asks for. Raises InputError."""
    layout = LAYOUTS[spec.name]
    path = find_file(spec.require_path("its file"), layout.files, "of what is asked")
    name, protocol = spec.take_str("label", spec.name), spec.take_choice("protocol", ("default", "paper"))
    shots = spec.take_int("shots", 0)
    exemplars_path = _exemplars_path(spec, layout, shots)
    leave_out = spec.take_choice("misplaced", ("refuse", "skip")) == "skip"
    if protocol == "paper":
        return build_paper(spec, context, name, path, exemplars_path, shots, leave_out)
    if holds_written(path):
        raise InputError(
            f"{path}: its records hold prompts and answers, no texts with entities. Compare them as the paper does, "
            f"with {spec.name}={path},protocol=paper."
        )
    form, pick = spec.take_choice("format", ("lines", "short", "json")), spec.take_choice("pick", ("first", "cover"))
    max_new_tokens = spec.take_int("max_new_tokens", MAX_NEW_TOKENS, low=1)
    reading = read_annotated(path, layout, leave_out)
    texts = tuple(context.draw(reading.texts))
    examples = Reading((), reading.types, (), 0)
    if exemplars_path:
        examples = read_annotated(exemplars_path, layout, True, reading.types)
    types = layout.types or named(_own_types(spec, path, examples.types))
    whole = [text for text in examples.texts if text.number not in examples.misplaced]
    excluded = {fold(text.text) for text in reading.texts}
    exemplars, in_test = choose_exemplars(whole, shots, pick, context.seed, excluded)
    if len(exemplars) < shots:
        raise InputError(
            f"{exemplars_path}: {len(exemplars)} of its texts can be shown, fewer than shots={shots}; others are asked "
            "about, or have misplaced entities. Ask for fewer, or name another file with exemplars=FILE."
        )
    read: dict[str, str | int] = {"dataset": spec.name, "protocol": protocol, "format": form, "pick": pick}
    read |= {"file": digest_files(path), "items": len(texts), "misplaced": "skip" if leave_out else "refuse"}
    if exemplars_path:
        read["exemplars"] = digest_files(exemplars_path)
    counts = {
        "misplaced_gold": len(reading.misplaced),
        "respelled_gold": reading.respelled,
        "gold_not_in_text": sum(_missing(text) for text in texts),
        "exemplars_in_test": in_test,
    }
    return EntityTask(
        name=name,
        texts=texts,
        exemplars=tuple(exemplars),
        types=types,
        has_spans=reading.has_spans,
        wording=WORDINGS[form],
        prompting=context.prompting,
        max_new_tokens=max_new_tokens,
        seed=context.seed,
        fits=context.fits,
        read=read,
        counts=counts,
    )


BUILDERS: dict[str, Builder] = dict.fromkeys(LAYOUTS, build)


def _exemplars_path(spec: TaskSpec, layout: Layout, shots: int) -> Path | None:
    given = spec.take_str("exemplars")
    if not shots and given:
        raise InputError(f"--tasks {spec.name}: exemplars={given} are not shown without shots. Add shots=5, say.")
    if not shots:
        return None
    folder = Path(given or spec.path or "")
    if not given and not folder.is_dir():
        raise InputError(f"--tasks {spec.name}: shots={shots} needs examples. Name their file with exemplars=FILE.")
    return find_file(folder, layout.exemplars, "of examples with exemplars=FILE")


def _own_types(spec: TaskSpec, path: Path, found: tuple[str, ...]) -> tuple[str, ...]:
    """Types of a file that brings its own, in the order of types=A+B, which must name them all."""
    given = spec.take_str("types")
    types = tuple(given.split("+")) if given else found
    if missing := [name for name in found if name not in types]:
        raise InputError(f"{path}: it has {missing[0]} too, which types={given} does not name. Add it.")
    return types


def _missing(text: Annotated) -> int:
    """Entities that the text does not have."""
    folded = FoldedText(text.text)
    return sum(fold(entity.mention) not in folded for entity in text.entities)


def _pairs_of(text: Annotated) -> set[Pair]:
    return pairs((entity.type, entity.mention) for entity in text.entities)


def _spans_of(text: Annotated) -> set[Span]:
    return {
        (entity.type, entity.start, entity.end)
        for entity in text.entities
        if entity.start is not None and entity.end is not None
    }


def _of(name: str, found: set[Pair]) -> set[Pair]:
    return {pair for pair in found if pair[0] == name}


def _count(parsed: Parsed) -> dict[str, int]:
    """What `evals.evaluation.conclude` does not count for every task."""
    return {
        "unreadable": int(parsed.is_unreadable),
        "not_in_text": parsed.invented,
        "unknown_types": parsed.unknown_types,
        "repeated": parsed.repeated,
        "prose_lines": parsed.prose,
    }
