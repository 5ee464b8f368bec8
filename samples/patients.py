"""Patients drawn for a condition, and the treatment that suits each of them.

Case notes use both; so can anything else that tells a patient's story, such as dialogues or questions. A patient's
traits rule drugs and examinations out: `prescribe` never chooses what `Drug.avoid` forbids, and says what it avoided.
"""

from dataclasses import dataclass

from samples.draw import Draw
from samples.knowledge import Condition, Drug, Examination, Knowledge, Trait

SURNAMES = "王李张刘陈杨赵黄周吴徐孙胡朱高林何郭马罗梁宋郑谢韩唐冯于董萧程曹袁邓许傅沈曾彭吕苏卢蒋蔡贾丁魏薛叶阎"
BACKGROUND_RATE = 0.4  # how often a patient has one of the condition's backgrounds
CHILD_AGE = 14  # years; below it a case note speaks of a 患儿


@dataclass(frozen=True)
class Patient:
    name: str  # 王某, 李某某
    sex: str
    age: int  # years
    months: int  # 6 to 11 below one year of age, else 0
    background: Trait | None  # what a history mentions
    traits: tuple[Trait, ...]  # all that hold: by age, by the condition, and the background

    @property
    def age_text(self) -> str:
        return f"{self.months}个月" if self.months else f"{self.age}岁"


@dataclass(frozen=True)
class Prescription:
    """What a patient gets for each purpose, and what was left out for which trait."""

    chosen: tuple[tuple[str, Drug], ...]  # (purpose, drug)
    avoided: tuple[tuple[Drug, Trait], ...]
    unserved: tuple[str, ...]  # purposes for which every alternative was ruled out


def draw_patient(condition: Condition, knowledge: Knowledge, draw: Draw, background: Trait | None = None) -> Patient:
    """A typical patient with this condition: with the given background, or at times with one of the condition's."""
    if background is None and condition.backgrounds and draw.chance(BACKGROUND_RATE):
        background = knowledge.trait(draw.choice(condition.backgrounds))
    sexes, (youngest, oldest) = condition.sexes, condition.ages
    if background:
        sexes = tuple(sex for sex in sexes if sex in background.sexes)
        youngest, oldest = max(youngest, background.ages[0]), min(oldest, background.ages[1])
    sex, age = draw.choice(sexes), draw.integer(youngest, oldest)
    months = draw.integer(6, 11) if age == 0 else 0
    name = draw.choice(SURNAMES) + ("某某" if draw.chance(0.3) else "某")
    by_age = (trait for trait in knowledge.traits if trait.by_age and trait.ages[0] <= age <= trait.ages[1])
    fixed = (knowledge.trait(trait_id) for trait_id in condition.implies)
    traits = dict.fromkeys((*by_age, *fixed, *((background,) if background else ())))
    return Patient(name, sex, age, months, background, tuple(traits))


def suitable_examinations(condition: Condition, patient: Patient) -> tuple[Examination, ...]:
    """The condition's examinations that none of the patient's traits rules out."""
    unsuitable = [part for trait in patient.traits for part in trait.unsuitable_examinations]
    return tuple(exam for exam in condition.examinations if not any(part in exam.name for part in unsuitable))


def prescribe(condition: Condition, patient: Patient, knowledge: Knowledge, draw: Draw) -> Prescription:
    """One drug for each purpose, from the alternatives that the patient may have."""
    chosen: list[tuple[str, Drug]] = []
    avoided: dict[Drug, Trait] = {}
    unserved: list[str] = []
    for therapy in condition.therapies:
        suitable = []
        for drug in (knowledge.drug(drug_id) for drug_id in therapy.drugs):
            trait = next((trait for trait in patient.traits if trait.id in drug.avoid), None)
            if trait is None:
                suitable.append(drug)
            else:
                avoided[drug] = trait
        if suitable:
            chosen.append((therapy.purpose, draw.choice(suitable)))
        else:
            unserved.append(therapy.purpose)
    return Prescription(tuple(chosen), tuple(avoided.items()), tuple(unserved))
