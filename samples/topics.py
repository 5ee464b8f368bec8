"""What a conversation may say, by name: who asks, what troubles them, and the facts that answer it.

As in `samples.facts`, a fact that does not apply is missing or empty, and no phrase that names it is used.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from samples.draw import Draw
from samples.facts import DURATIONS, case_facts, condition_facts, drug_facts
from samples.knowledge import Condition, Drug, Knowledge, Therapy, Trait
from samples.patients import CHILD_AGE, Patient, draw_patient
from samples.sheets import Facts, Items, possible

ADULT_AGE = 18  # years; below it the patient's age is always told, since it rules drugs out
OPTIONS = 4
# On whose behalf people ask about an adult of that age and sex.
RELATIVES = (
    (14, 40, "男", "我弟弟"),
    (14, 40, "女", "我妹妹"),
    (25, 60, "男", "我丈夫"),
    (25, 60, "女", "我妻子"),
    (50, 90, "男", "我父亲"),
    (50, 90, "女", "我母亲"),
)
RELATIVE_RATE = 0.3
# {grown} is {me} for adults: what tells no age is not said of a child.
INTRODUCTIONS = (
    "{grown}{history}",
    "{me}今年{age}，{history}",
    "{me}{age}，{sex}性，{history}",
    "{me}今年{age}",
    "{me}{age}，{sex}性",
    "{grown}是{age}的{sex}性",
)
REFUSAL = "{group}不宜用{drug}"
ENTITY = "{kind}：{name}"  # a line of an extraction's answer
NOTED = 2  # at most so many further symptoms, examinations and drugs in a note to extract from


@dataclass(frozen=True)
class Topic:
    """The facts of one conversation.

    accepted: what a right answer to the first question names, one or more of it, and nothing else of its kind.
    forbidden: drugs that what is told of the patient rules out, where a drug is asked for.
    combination: what the first question puts together, where it is less than its wording: conversations that share
        it are all in training or all held out.
    """

    facts: Facts
    accepted: tuple[str, ...] = ()
    forbidden: tuple[str, ...] = ()
    combination: str = ""


def department_topic(condition: Condition, knowledge: Knowledge, draw: Draw) -> Topic:
    """Symptoms that tell the condition from all others: which department is right, and why."""
    patient = without_history(draw_patient(condition, knowledge, draw))
    symptoms = telling_symptoms(condition, knowledge, draw)
    facts = condition_facts(condition, knowledge, draw, part=True) | person_facts(patient, draw)
    facts |= {"symptoms": symptoms, "others": Items(symptoms[1:]), "duration": draw.choice(DURATIONS[condition.course])}
    return Topic(facts, (condition.department,), combination=_complaint(symptoms))


def disease_topic(condition: Condition, knowledge: Knowledge, draw: Draw) -> Topic:
    """The same symptoms: which condition it could be."""
    return replace(department_topic(condition, knowledge, draw), accepted=(condition.name,))


def drug_topic(condition: Condition, therapy: Therapy, knowledge: Knowledge, draw: Draw) -> Topic:
    """A patient with the condition asks for a drug of this purpose: any that suits the patient is right."""
    patient = draw_patient(condition, knowledge, draw)
    person = person_facts(patient, draw)
    facts: Facts = {"name": condition.name, "department": condition.department}
    facts |= person | _alternatives(therapy, patient.traits, knowledge, draw)
    _, unsuitable = sort_drugs([drug.id for drug in knowledge.drugs], patient.traits, knowledge)
    forbidden = tuple(sorted(drug.name for drug in unsuitable))
    return Topic(facts, tuple(facts["suitable"]), forbidden, f"{condition.id}/{therapy.purpose}/{person['who']}")


def warning_topic(condition: Condition, therapy: Therapy, trait: Trait, knowledge: Knowledge, draw: Draw) -> Topic:
    """A patient tells only in the second turn what rules some of the purpose's drugs out."""
    patient = draw_patient(condition, knowledge, draw, trait)
    usual = Items(draw.shuffled([knowledge.drug(drug_id).name for drug_id in therapy.drugs]))
    facts = condition_facts(condition, knowledge, draw, part=True) | person_facts(patient, draw) | {"usual": usual}
    return Topic(facts | _alternatives(therapy, patient.traits, knowledge, draw))


def case_topic(condition: Condition, knowledge: Knowledge, draw: Draw) -> Topic:
    """One patient's case and a treatment that suits; the symptoms tell the condition from all others."""
    patient = draw_patient(condition, knowledge, draw)
    facts = case_facts(condition, patient, knowledge, draw) | person_facts(patient, draw)
    symptoms = telling_symptoms(condition, knowledge, draw)
    main = Items(symptoms[: draw.integer(1, len(symptoms) - 1)][:2])
    return Topic(facts | {"main": main, "more": Items(symptoms[len(main) :])})


def advice_topic(condition: Condition, knowledge: Knowledge, draw: Draw) -> Topic:
    """A condition whose name the patient knows: what to watch, to do, to have examined, when to hurry."""
    patient = without_history(draw_patient(condition, knowledge, draw))
    facts = condition_facts(condition, knowledge, draw, part=True) | person_facts(patient, draw)
    return Topic(facts | {"flag": draw.choice(condition.red_flags)})


def medicine_topic(drug: Drug, knowledge: Knowledge, draw: Draw) -> Topic:
    """A drug whose name somebody knows."""
    facts = drug_facts(drug, knowledge, draw)
    return Topic(facts | ({"warned": draw.choice(Items(facts["avoid_groups"]))} if drug.avoid else {}))


def choice_topics(condition: Condition, knowledge: Knowledge, draw: Draw) -> Iterator[tuple[str, Topic]]:
    """Questions with four options of which one is right, by what they ask for."""
    symptoms = telling_symptoms(condition, knowledge, draw)
    complaint: Facts = {"symptoms": symptoms}
    departments = [name for name in knowledge.departments if name != condition.department]
    options = _options("departments", condition.department, departments, draw)
    yield "department", Topic(complaint | options, combination=_complaint(symptoms))

    conditions = [other.name for other in knowledge.conditions if other is not condition]
    options = _options("diseases", condition.name, conditions, draw)
    yield "disease", Topic(complaint | options, combination=_complaint(symptoms))

    therapy = draw.choice(condition.therapies)
    wanted: Facts = {"name": condition.name, "purpose": therapy.purpose}
    right, wrong = draw.choice(therapy.drugs), unrelated_drugs(condition, therapy, knowledge)
    options = _options("drugs", knowledge.drug(right).name, [drug.name for drug in wrong], draw)
    yield "drug", Topic(wanted | options)

    warned = [drug for drug in map(knowledge.drug, condition.drugs) if drug.avoid]
    if warned:
        drug = draw.choice(warned)
        trait = knowledge.trait(draw.choice(drug.avoid))
        harmless = [other.name for other in knowledge.drugs if trait.id not in other.avoid]
        options = _options("to_avoid", drug.name, harmless, draw)
        yield "avoided", Topic(options | {"group": trait.group})


def entity_topic(condition: Condition, knowledge: Knowledge, draw: Draw) -> Topic:
    """A case whose note can be written from its entities, and the entities a line each, kind by kind."""
    patient = without_history(draw_patient(condition, knowledge, draw))
    facts = case_facts(condition, patient, knowledge, draw)
    facts |= {name: Items(facts[name][:NOTED]) for name in ("more", "exams", "taken")}
    entities = {
        "疾病": Items([condition.name]),
        "症状": Items((*facts["main"], *facts["more"])),
        "检查": Items(facts["exams"]),
        "药物": Items(facts["taken"]),
    }
    lines = {kind: [ENTITY.format(kind=kind, name=name) for name in names] for kind, names in entities.items()}
    kind = draw.choice(tuple(entities))
    facts |= {"entities": Items(line for kind in lines for line in lines[kind])}
    return Topic(facts | {"wanted": kind, "of_wanted": Items(lines[kind])})


def person_facts(patient: Patient, draw: Draw) -> Facts:
    """Who asks, and what they tell of the patient: a history always, the age always where it is a child's."""
    facts: Facts = {
        "me": _speaker(patient, draw),
        "sex": patient.sex,
        "age": patient.age_text,
        "history": patient.background.history if patient.background else "",
    }
    facts["grown"] = facts["me"] if patient.age >= ADULT_AGE else ""
    introductions = [phrase for phrase in INTRODUCTIONS if ("{history}" in phrase) == bool(facts["history"])]
    return facts | {"who": draw.choice(possible(introductions, facts)).format_map(facts)}


def telling_symptoms(condition: Condition, knowledge: Knowledge, draw: Draw) -> Items:
    """Two to four of the condition's symptoms, more where another condition has all of them too."""
    symptoms = draw.shuffled(condition.symptoms)
    count = draw.integer(2, 4)
    others = [other for other in knowledge.conditions if other is not condition and other.has(symptoms[:count])]
    while count < len(symptoms) and any(other.has(symptoms[:count]) for other in others):
        count += 1
    return Items(symptoms[:count])


def sort_drugs(drugs: Sequence[str], traits: Sequence[Trait], knowledge: Knowledge) -> tuple[list[Drug], list[Drug]]:
    """Which of the drugs (by id) a patient with these traits may have, and which not."""
    ids = {trait.id for trait in traits}
    named = [knowledge.drug(drug_id) for drug_id in drugs]
    suitable = [drug for drug in named if ids.isdisjoint(drug.avoid)]
    return suitable, [drug for drug in named if not ids.isdisjoint(drug.avoid)]


def unrelated_drugs(condition: Condition, therapy: Therapy, knowledge: Knowledge) -> list[Drug]:
    """Drugs that by no fact serve the therapy's purpose, in this condition or another, nor resemble those that do."""
    therapies = (t for other in knowledge.conditions for t in (*other.therapies, *other.second_line))
    related = {drug for other in therapies if other.purpose == therapy.purpose for drug in other.drugs}
    related |= set(condition.drugs)
    classes = {knowledge.drug(drug).drug_class for drug in related}
    return [drug for drug in knowledge.drugs if drug.id not in related and drug.drug_class not in classes]


def without_history(patient: Patient) -> Patient:
    """The same patient without what a history would mention."""
    return replace(patient, background=None, traits=tuple(t for t in patient.traits if t is not patient.background))


def _alternatives(therapy: Therapy, traits: Sequence[Trait], knowledge: Knowledge, draw: Draw) -> Facts:
    suitable, unsuitable = sort_drugs(draw.shuffled(therapy.drugs), traits, knowledge)
    reasons = {drug.name: next(trait.group for trait in traits if trait.id in drug.avoid) for drug in unsuitable}
    facts: Facts = {
        "purpose": therapy.purpose,
        "suitable": Items(drug.name for drug in suitable),
        "refusals": Items(REFUSAL.format(group=group, drug=drug) for drug, group in reasons.items()),
        "unserved": "" if suitable else therapy.purpose,
    }
    return facts | ({"drug": suitable[0].name, "drug_class": suitable[0].drug_class} if suitable else {})


def _options(name: str, right: str, wrong: Sequence[str], draw: Draw) -> Facts:
    options = draw.shuffled([right, *draw.shuffled(sorted(wrong))[: OPTIONS - 1]])
    lettered = [f"{letter}.{option}" for letter, option in zip("ABCD", options, strict=True)]
    return {name: Items(lettered), "answer": lettered[options.index(right)]}


def _complaint(symptoms: Items) -> str:
    return "/".join(sorted(symptoms))


def _speaker(patient: Patient, draw: Draw) -> str:
    if patient.age < CHILD_AGE:
        return "我儿子" if patient.sex == "男" else "我女儿"
    if draw.chance(RELATIVE_RATE):
        fitting = [who for low, high, sex, who in RELATIVES if low <= patient.age <= high and sex == patient.sex]
        return draw.choice(fitting)
    return "我"
