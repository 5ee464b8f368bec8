"""Case notes tell of their own condition and of one patient, and prescribe nothing that this patient must avoid."""

import re
from collections.abc import Iterable, Iterator

import pytest

from samples.draw import Draw
from samples.knowledge import Condition, Drug, Knowledge, Trait
from samples.patients import SURNAMES, Patient, draw_patient, prescribe, suitable_examinations
from samples.render import CASE_COPIES, Document
from tests.samples.conftest import Splits

PATIENTS_PER_CONDITION = 60
REFUSALS = ("避用", "未用", "不宜用", "禁用于")  # words with which a note leaves a drug out


@pytest.fixture(scope="module")
def cases(knowledge: Knowledge, splits: Splits[Document]) -> list[tuple[Document, Condition]]:
    documents = [document for document in splits.all if document.kind in CASE_COPIES]
    return [(document, knowledge.condition(document.id.split("/")[1])) for document in documents]


@pytest.fixture(scope="module")
def patients(knowledge: Knowledge) -> list[tuple[Condition, Patient, Draw]]:
    drawn = []
    for condition in knowledge.conditions:
        for number in range(PATIENTS_PER_CONDITION):
            draw = Draw(f"{condition.id}/{number}")
            drawn.append((condition, draw_patient(condition, knowledge, draw), draw))
    return drawn


def own_words(condition: Condition, knowledge: Knowledge) -> str:
    """Every text that the facts give this condition, its drugs and its patients' traits."""
    texts = [condition.name, condition.definition, *condition.aliases, *condition.symptoms, *condition.measures]
    texts += [*condition.cautions, *condition.red_flags]
    texts += [text for exam in condition.examinations for text in (exam.name, exam.finding)]
    texts += [therapy.purpose for therapy in (*condition.therapies, *condition.second_line)]
    for drug in map(knowledge.drug, condition.drugs):
        texts += [drug.name, drug.drug_class, *drug.cautions, *drug.adverse_effects]
    for trait in knowledge.traits:
        texts += [trait.group, trait.history] if trait.by_age or trait.id in condition.implies else []
        texts += [trait.group, trait.history] if trait.id in condition.backgrounds else []
    return "\n".join(texts)


def mentions(text: str, vocabulary: Iterable[str]) -> set[str]:
    """The terms that occur in a text, the longest first: 阿莫西林 inside 阿莫西林克拉维酸钾 is no mention."""
    pattern = "|".join(map(re.escape, sorted(vocabulary, key=len, reverse=True)))
    return set(re.findall(pattern, text))


def test_a_case_mentions_only_symptoms_examinations_and_drugs_of_its_own_condition(
    knowledge: Knowledge, cases: list[tuple[Document, Condition]]
) -> None:
    symptoms = {symptom for condition in knowledge.conditions for symptom in condition.symptoms}
    examinations = {exam.name for condition in knowledge.conditions for exam in condition.examinations}
    vocabulary = symptoms | examinations | {drug.name for drug in knowledge.drugs}
    own = {condition.id: own_words(condition, knowledge) for condition in knowledge.conditions}
    for document, condition in cases:
        foreign = {term for term in mentions(document.text, vocabulary) if term not in own[condition.id]}
        assert not foreign, f"{document.id}: {foreign}"


def test_a_case_names_its_condition_its_department_and_enough_symptoms(
    cases: list[tuple[Document, Condition]],
) -> None:
    for document, condition in cases:
        assert condition.name in document.text, document.id
        assert condition.department in document.text, document.id
        assert any(symptom in document.text for symptom in condition.symptoms), document.id


def test_a_case_speaks_of_one_patient_from_first_to_last(
    knowledge: Knowledge, cases: list[tuple[Document, Condition]]
) -> None:
    for document, condition in cases:
        facts = sorted(own_words(condition, knowledge).splitlines(), key=len, reverse=True)
        text = re.sub("|".join(map(re.escape, facts)), "", document.text)  # the 他 of 倍他司汀 is nobody
        assert len(set(re.findall(r"\d+岁", text))) <= 1, document.id
        assert len(set(re.findall(rf"[{SURNAMES}]某+", text))) <= 1, document.id
        pronouns = set(re.findall(r"(?<!其)他|她", text))
        words = set(re.findall(r"[男女](?=，|性|。)", text.split("诊断")[0]))
        if document.kind != "triage":
            assert len(pronouns) <= 1, document.id
            assert pronouns != {"他"} or words <= {"男"}, document.id
            assert pronouns != {"她"} or words <= {"女"}, document.id
        assert words <= set(condition.sexes), document.id


def told_traits(document: Document, condition: Condition, knowledge: Knowledge) -> Iterator[Trait]:
    """What a reader knows of the patient: the history that the note tells, the age, and what the condition implies."""
    age = re.search(r"(\d+)岁", document.text.replace("未满18岁者", ""))
    for trait in knowledge.traits:
        is_of_age = trait.by_age and age is not None and trait.ages[0] <= int(age.group(1)) <= trait.ages[1]
        is_told = bool(trait.history) and trait.history in document.text
        if is_of_age or is_told or trait.id in condition.implies:
            yield trait


def test_no_note_prescribes_a_drug_that_its_patient_must_avoid(
    knowledge: Knowledge, cases: list[tuple[Document, Condition]]
) -> None:
    by_name: dict[str, Drug] = {drug.name: drug for drug in knowledge.drugs}
    refusals = 0
    for document, condition in cases:
        if document.kind == "triage":
            continue
        traits = {trait.id for trait in told_traits(document, condition, knowledge)}
        for sentence in re.split(r"[。；\n]", document.text):
            drugs = [by_name[name] for name in mentions(sentence, by_name) if traits & set(by_name[name].avoid)]
            is_own_caution = any(sentence in caution or caution in sentence for caution in condition.cautions)
            if drugs and not is_own_caution:
                assert any(word in sentence for word in REFUSALS), f"{document.id}: {sentence}"
                refusals += 1
    assert refusals > 100  # the sample shows many patients for whom something had to be left out


def test_a_prescription_serves_each_purpose_once_or_says_that_it_cannot(
    knowledge: Knowledge, patients: list[tuple[Condition, Patient, Draw]]
) -> None:
    for condition, patient, draw in patients:
        prescription = prescribe(condition, patient, knowledge, draw)
        traits = {trait.id for trait in patient.traits}
        assert traits >= set(condition.implies)
        chosen = dict(prescription.chosen)
        assert len(set(chosen.values())) == len(chosen)
        for therapy in condition.therapies:
            suitable = {drug for drug in therapy.drugs if not traits & set(knowledge.drug(drug).avoid)}
            if therapy.purpose in chosen:
                assert chosen[therapy.purpose].id in suitable
            else:
                assert therapy.purpose in prescription.unserved
                assert not suitable
        for drug, trait in prescription.avoided:
            assert trait in patient.traits and trait.id in drug.avoid


def test_an_expectant_mother_is_spared_radiation_and_everyone_keeps_an_examination(
    knowledge: Knowledge, patients: list[tuple[Condition, Patient, Draw]]
) -> None:
    expecting = 0
    for condition, patient, _ in patients:
        names = [exam.name for exam in suitable_examinations(condition, patient)]
        assert names, condition.id
        if any(trait.id == "pregnancy" for trait in patient.traits):
            expecting += 1
            assert patient.sex == "女" and 18 <= patient.age <= 42
            assert not any(part in name for name in names for part in ("X线", "CT", "造影", "摄碘")), condition.id
    assert expecting > 100


def test_a_patient_fits_the_condition(patients: list[tuple[Condition, Patient, Draw]]) -> None:
    for condition, patient, _ in patients:
        assert patient.sex in condition.sexes
        assert condition.ages[0] <= patient.age <= condition.ages[1]
        assert patient.age_text == (f"{patient.months}个月" if patient.age == 0 else f"{patient.age}岁")
        for trait in patient.traits:
            assert patient.sex in trait.sexes and trait.ages[0] <= patient.age <= trait.ages[1]
