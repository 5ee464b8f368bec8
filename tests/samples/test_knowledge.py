"""The facts: how many there are, that they hold together, and that the loader refuses those that do not."""

import re
import shutil
from pathlib import Path

import pytest

from samples.knowledge import DIRECTORY, Knowledge, load_knowledge

DOSE = re.compile(r"\d+(\.\d+)?\s*(mg|ml|毫克|微克|毫升|克|片|粒|支|单位)|(每日|一日)[一二三四\d]+次")


def test_the_sample_covers_enough_conditions_departments_and_drugs(knowledge: Knowledge) -> None:
    assert len(knowledge.conditions) >= 84
    assert len(knowledge.departments) >= 14
    assert len(knowledge.drugs) >= 66


def test_every_drug_treats_a_condition_and_every_named_drug_exists(knowledge: Knowledge) -> None:
    named = {drug_id for condition in knowledge.conditions for drug_id in condition.drugs}
    assert named == {drug.id for drug in knowledge.drugs}


def test_every_trait_rules_something_out_for_somebody(knowledge: Knowledge) -> None:
    had = {trait for condition in knowledge.conditions for trait in (*condition.implies, *condition.backgrounds)}
    had |= {trait.id for trait in knowledge.traits if trait.by_age}
    avoided = {trait for drug in knowledge.drugs for trait in drug.avoid}
    assert {trait.id for trait in knowledge.traits} == had & avoided


def test_a_background_changes_what_is_done(knowledge: Knowledge) -> None:
    for condition in knowledge.conditions:
        for trait in set(condition.backgrounds) - {
            "pregnancy"
        }:  # that all stays as it is in pregnancy is worth telling
            exams = knowledge.trait(trait).unsuitable_examinations
            is_relevant = any(trait in knowledge.drug(drug_id).avoid for drug_id in condition.drugs)
            is_relevant |= any(part in exam.name for part in exams for exam in condition.examinations)
            assert is_relevant, f"{condition.id}: {trait} makes no difference"


def test_no_fact_gives_a_dose(knowledge: Knowledge) -> None:
    for drug in knowledge.drugs:
        assert not DOSE.search("\n".join((*drug.uses, drug.form, *drug.cautions, *drug.contraindications))), drug.id
    for condition in knowledge.conditions:
        purposes = (therapy.purpose for therapy in (*condition.therapies, *condition.second_line))
        assert not DOSE.search("\n".join((*purposes, *condition.measures, *condition.cautions))), condition.id


BROKEN = {
    "a drug that does not exist": ("[amlodipine, valsartan,", "[amlodipin, valsartan,", "hypertension.*amlodipin'"),
    "a trait that does not exist": ("backgrounds: [gout,", "backgrounds: [gouty,", "hypertension.*gouty"),
    "a key that is not known": ("course: 慢性\n", "course: 慢性\n    curse: 急性\n", "unknown keys.*curse"),
    "a key that is missing": ("    definition: 以体循环", "    aliases2: 以体循环", "'definition' is missing"),
    "a name given twice": ("name: 稳定型心绞痛", "name: 原发性高血压", "原发性高血压: this name is given twice"),
    "an id given twice": ("id: stable_angina", "id: hypertension", "hypertension: this id is given twice"),
    "a drug for two purposes": (
        "控制心室率: [",
        "控制心室率: [warfarin, ",
        "warfarin: this drug of atrial_fib.* twice",
    ),
    "an unknown course": ("course: 慢性", "course: 永久", "course '永久'"),
    "a text with its own full stop": ("[低盐饮食,", "[低盐饮食。,", "closing punctuation.*低盐饮食。"),
    "too few symptoms": ("[头晕, 头痛, 颈项板紧, 耳鸣, 心悸]", "[头晕]", "'symptoms' should list 4"),
    "the same symptom twice": ("[头晕, 头痛,", "[头晕, 头晕,", "different texts"),
    "ages that fall": ("ages: [35, 78]", "ages: [78, 35]", "'ages' should rise"),
    "a treatment its own patients must avoid": (
        "ages: [35, 78]",
        "ages: [35, 78]\n    implies: [gout]",
        "must not have",
    ),
    "a background none of its patients can have": ("ages: [35, 78]", "ages: [8, 12]", "none of its patients"),
}


@pytest.mark.parametrize("problem", BROKEN)
def test_the_loader_refuses(problem: str, tmp_path: Path) -> None:
    right, wrong, message = BROKEN[problem]
    directory = tmp_path / "knowledge"
    shutil.copytree(DIRECTORY, directory)
    file = directory / "conditions" / "cardiology.yaml"
    text = file.read_text(encoding="utf-8")
    assert right in text
    file.write_text(text.replace(right, wrong, 1), encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        load_knowledge(directory)
