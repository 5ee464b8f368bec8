"""The bundled medical facts as typed, checked objects.

`samples/knowledge` holds them as YAML: one file a department under `conditions/`, one file a group under `drugs/`,
and the traits of patients in `traits.yaml`. `load_knowledge()` reads them all and refuses whatever does not hold
together: a drug that is missing, a fact given twice, a treatment that the condition's own patients must not have.
Order is that of the sorted file names, then of the files.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import yaml

DIRECTORY = Path(__file__).parent / "knowledge"
COURSES = ("急性", "亚急性", "慢性", "发作性")
SEXES = ("男", "女")
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the C parser where PyYAML was built with it: 10 x as fast

Fact = TypeVar("Fact")


@dataclass(frozen=True)
class Trait:
    """Something about a patient that rules drugs or examinations out."""

    id: str
    group: str  # who has it: 妊娠期妇女
    history: str  # how a case note says so; empty where age alone says it
    sexes: tuple[str, ...]
    ages: tuple[int, int]  # years, both included
    by_age: bool  # everyone in the age range has it
    unsuitable_examinations: tuple[str, ...]  # parts of examination names


@dataclass(frozen=True)
class Drug:
    id: str
    name: str
    drug_class: str
    uses: tuple[str, ...]
    form: str
    contraindications: tuple[str, ...]  # beyond the traits of `avoid`
    avoid: tuple[str, ...]  # ids of traits
    cautions: tuple[str, ...]
    adverse_effects: tuple[str, ...]


@dataclass(frozen=True)
class Examination:
    name: str
    finding: str  # what it typically shows in this condition


@dataclass(frozen=True)
class Therapy:
    """One purpose of a treatment and the drugs that serve it: alternatives, of which a patient takes one."""

    purpose: str
    drugs: tuple[str, ...]  # ids


@dataclass(frozen=True)
class Condition:
    id: str
    name: str
    department: str
    aliases: tuple[str, ...]
    definition: str  # completes the sentence "<name>是…"
    course: str  # one of COURSES
    emergency: bool  # its patients belong in an emergency department at once
    sexes: tuple[str, ...]
    ages: tuple[int, int]  # typical patients, in years, both included
    symptoms: tuple[str, ...]
    examinations: tuple[Examination, ...]
    therapies: tuple[Therapy, ...]  # first line: a patient gets each of them
    second_line: tuple[Therapy, ...]  # when the first does not suffice
    measures: tuple[str, ...]  # first-line treatment without drugs
    cautions: tuple[str, ...]
    risk_groups: tuple[str, ...]
    prevention: tuple[str, ...]
    red_flags: tuple[str, ...]  # when to seek care at once
    implies: tuple[str, ...]  # ids of traits that every patient with this condition has
    backgrounds: tuple[str, ...]  # ids of traits that its patients may have besides

    @cached_property
    def drugs(self) -> tuple[str, ...]:
        """Ids of all its drugs, the first line first; each serves one purpose."""
        return tuple(drug for therapy in (*self.therapies, *self.second_line) for drug in therapy.drugs)

    @cached_property
    def _symptom_set(self) -> frozenset[str]:
        return frozenset(self.symptoms)

    def has(self, symptoms: Iterable[str]) -> bool:
        """Whether all of these are among its symptoms."""
        return self._symptom_set.issuperset(symptoms)


@dataclass(frozen=True)
class Knowledge:
    conditions: tuple[Condition, ...]
    drugs: tuple[Drug, ...]
    traits: tuple[Trait, ...]

    @cached_property
    def departments(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(condition.department for condition in self.conditions))

    @cached_property
    def _by_id(self) -> dict[type, dict[str, Any]]:
        return {kind: {fact.id: fact for fact in facts} for kind, facts in self._tables()}

    def _tables(self) -> Iterator[tuple[type, tuple[Any, ...]]]:
        yield from ((Condition, self.conditions), (Drug, self.drugs), (Trait, self.traits))

    def condition(self, condition_id: str) -> Condition:
        return self._by_id[Condition][condition_id]

    def drug(self, drug_id: str) -> Drug:
        return self._by_id[Drug][drug_id]

    def trait(self, trait_id: str) -> Trait:
        return self._by_id[Trait][trait_id]

    @cached_property
    def _by_drug(self) -> dict[str, tuple[Condition, ...]]:
        found: dict[str, list[Condition]] = {}
        for condition in self.conditions:
            for drug_id in dict.fromkeys(condition.drugs):
                found.setdefault(drug_id, []).append(condition)
        return {drug_id: tuple(conditions) for drug_id, conditions in found.items()}

    def treated_by(self, drug_id: str) -> tuple[Condition, ...]:
        """The conditions whose treatment names this drug."""
        return self._by_drug.get(drug_id, ())


def load_knowledge(directory: Path = DIRECTORY) -> Knowledge:
    """Read and check the facts below `directory`.

    Raises:
        ValueError: naming the file, the entry and what is wrong with it.
    """
    conditions = []
    for path in sorted((directory / "conditions").glob("*.yaml")):
        department = _Entry(_parse(path), path.name)
        name = department.text("department")
        conditions += [_condition(entry, name) for entry in department.entries("conditions")]
        department.close()
    drugs = [_drug(entry) for path in sorted((directory / "drugs").glob("*.yaml")) for entry in _entries(path)]
    traits = [_trait(entry) for entry in _entries(directory / "traits.yaml")]
    knowledge = Knowledge(tuple(conditions), tuple(drugs), tuple(traits))
    problems = list(_problems(knowledge))
    if problems:
        raise ValueError("\n".join(problems))
    return knowledge


class _Entry:
    """One YAML mapping being read: each key is asked for once, and what is left at the end is a mistake."""

    def __init__(self, values: Any, where: str) -> None:
        if not isinstance(values, dict):
            raise ValueError(f"{where}: a mapping was expected, found {type(values).__name__}.")
        self._left = dict(values)
        self.where = f"{where}: {values['id']}" if "id" in values else where

    def text(self, key: str, default: str | None = None) -> str:
        return self._checked(key, self._take(key, default))

    def texts(self, key: str, least: int = 1) -> tuple[str, ...]:
        """A list of at least so many texts, none twice; an absent list is an empty one."""
        values = self._take(key, [])
        if not isinstance(values, list) or len(values) < least or len(set(map(str, values))) < len(values):
            raise ValueError(f"{self.where}: {key!r} should list {least} or more different texts, found {values!r}.")
        return tuple(self._checked(key, value) for value in values)

    def pairs(self, key: str, build: Callable[[str, Any], Fact]) -> tuple[Fact, ...]:
        """A mapping, one fact a key."""
        return tuple(build(self._checked(key, name), value) for name, value in self._take(key, {}).items())

    def entries(self, key: str) -> list["_Entry"]:
        return [_Entry(value, self.where) for value in self._take(key, [])]

    def flag(self, key: str) -> bool:
        return self._take(key, False) is True

    def ages(self) -> tuple[int, int]:
        low, high = self._take("ages", None)
        if not 0 <= low <= high <= 100:
            raise ValueError(f"{self.where}: 'ages' should rise from 0 to 100 years, found {low} and {high}.")
        return low, high

    def close(self) -> None:
        if self._left:
            raise ValueError(f"{self.where}: unknown keys {sorted(self._left)}.")

    def _take(self, key: str, default: Any) -> Any:
        value = self._left.pop(key, default)
        if value is None:
            raise ValueError(f"{self.where}: {key!r} is missing.")
        return value

    def _checked(self, key: str, value: Any) -> str:
        if not isinstance(value, str) or value != value.strip() or value.endswith(("。", "，", "；", "、")):
            raise ValueError(f"{self.where}: {key!r} should be text without closing punctuation, found {value!r}.")
        return value


def _parse(path: Path) -> Any:
    return yaml.load(path.read_text(encoding="utf-8"), Loader=_LOADER)


def _entries(path: Path) -> Iterator[_Entry]:
    for values in _parse(path):
        yield _Entry(values, path.name)


def _trait(entry: _Entry) -> Trait:
    trait = Trait(
        id=entry.text("id"),
        group=entry.text("group"),
        history=entry.text("history", ""),
        sexes=entry.texts("sexes", 0) or SEXES,
        ages=entry.ages(),
        by_age=entry.flag("by_age"),
        unsuitable_examinations=entry.texts("unsuitable_examinations", 0),
    )
    entry.close()
    return trait


def _drug(entry: _Entry) -> Drug:
    drug = Drug(
        id=entry.text("id"),
        name=entry.text("name"),
        drug_class=entry.text("class"),
        uses=entry.texts("uses"),
        form=entry.text("form"),
        contraindications=entry.texts("contraindications"),
        avoid=entry.texts("avoid", 0),
        cautions=entry.texts("cautions", 2),
        adverse_effects=entry.texts("adverse_effects", 2),
    )
    entry.close()
    return drug


def _condition(entry: _Entry, department: str) -> Condition:
    condition = Condition(
        id=entry.text("id"),
        name=entry.text("name"),
        department=department,
        aliases=entry.texts("aliases", 0),
        definition=entry.text("definition"),
        course=entry.text("course"),
        emergency=entry.flag("emergency"),
        sexes=entry.texts("sexes", 0) or SEXES,
        ages=entry.ages(),
        symptoms=entry.texts("symptoms", 4),
        examinations=entry.pairs("examinations", Examination),
        therapies=entry.pairs("therapies", _therapy),
        second_line=entry.pairs("second_line", _therapy),
        measures=entry.texts("measures", 2),
        cautions=entry.texts("cautions", 2),
        risk_groups=entry.texts("risk_groups", 2),
        prevention=entry.texts("prevention", 2),
        red_flags=entry.texts("red_flags", 2),
        implies=entry.texts("implies", 0),
        backgrounds=entry.texts("backgrounds", 0),
    )
    entry.close()
    return condition


def _therapy(purpose: str, drugs: list[str]) -> Therapy:
    return Therapy(purpose, tuple(drugs))


def _problems(knowledge: Knowledge) -> Iterator[str]:
    """What no single entry can show: references, repeated names, and treatments that their own patients must avoid."""
    yield from _repeated("id", [fact.id for _, facts in knowledge._tables() for fact in facts])
    names = [name for condition in knowledge.conditions for name in (condition.name, *condition.aliases)]
    yield from _repeated("name", names + [drug.name for drug in knowledge.drugs])

    known_drugs = {drug.id: drug for drug in knowledge.drugs}
    known_traits = {trait.id: trait for trait in knowledge.traits}
    for drug in knowledge.drugs:
        yield from (f"{drug.id}: no trait {trait!r}." for trait in drug.avoid if trait not in known_traits)
    for condition in knowledge.conditions:
        where, unknown = condition.id, set(condition.drugs) - known_drugs.keys()
        unknown |= {*condition.implies, *condition.backgrounds} - known_traits.keys()
        if unknown:
            yield f"{where}: no drug or trait {sorted(unknown)}."
            continue
        if condition.course not in COURSES or not set(condition.sexes) <= set(SEXES):
            yield f"{where}: course {condition.course!r} or sexes {condition.sexes!r} is not a known one."
        if condition.course == "慢性" and condition.ages[0] < 4:
            yield f"{where}: a chronic course does not fit patients from {condition.ages[0]} years."
        yield from _repeated(f"drug of {where}", condition.drugs)
        if len(condition.examinations) < 2 or not condition.therapies:
            yield f"{where}: two examinations and one therapy are the least."
        fixed = [known_traits[trait] for trait in condition.implies]
        fixed += [trait for trait in knowledge.traits if trait.by_age and _covers(trait, condition)]
        for trait in fixed:
            wrong = [drug for drug in condition.drugs if trait.id in known_drugs[drug].avoid]
            if wrong:
                yield f"{where}: all its patients are {trait.group}, who must not have {wrong}."
            if not _covers(trait, condition):
                yield f"{where}: implies {trait.id!r}, which not all of its patients can have."
        for trait in (known_traits[trait] for trait in condition.backgrounds):
            if not set(trait.sexes) & set(condition.sexes) or not _overlap(trait.ages, condition.ages):
                yield f"{where}: none of its patients can have {trait.id!r}."


def _repeated(what: str, values: Iterable[str]) -> Iterator[str]:
    seen: set[str] = set()
    for value in values:
        if value in seen:
            yield f"{value}: this {what} is given twice."
        seen.add(value)


def _covers(trait: Trait, condition: Condition) -> bool:
    low, high = trait.ages
    return set(condition.sexes) <= set(trait.sexes) and low <= condition.ages[0] and condition.ages[1] <= high


def _overlap(ages: tuple[int, int], others: tuple[int, int]) -> bool:
    return ages[0] <= others[1] and others[0] <= ages[1]
