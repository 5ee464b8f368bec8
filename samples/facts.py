"""What a document may say, by name: the facts of a condition, a drug or a patient's case, in a drawn order and wording.

Each function returns the facts that the phrases of `phrases/*.yaml` name. Facts that do not apply are empty, and the
phrases that name them are then never used.
"""

from collections.abc import Sequence

from samples.draw import Draw
from samples.knowledge import Condition, Drug, Examination, Knowledge, Therapy
from samples.patients import CHILD_AGE, Patient, Prescription, prescribe, suitable_examinations
from samples.sheets import Facts, Items

DURATIONS = {
    "急性": ("6小时", "12小时", "1天", "2天", "3天"),
    "亚急性": ("1周", "2周", "3周", "1个月", "2个月"),
    "慢性": ("6个月", "8个月", "1年", "2年", "3年", "5年"),
    "发作性": ("2个月", "3个月", "6个月", "1年", "2年"),
}
DEVELOPMENTS = {
    "急性": ("持续不缓解", "症状明显"),
    "亚急性": ("逐渐加重", "症状日益明显"),
    "慢性": ("时轻时重", "近来加重"),
    "发作性": ("反复发作", "发作渐频"),
}
UNREMARKABLE = (
    "否认其他慢性病史和药物过敏史",
    "否认药物过敏史",
    "无药物过敏史，无手术外伤史",
    "否认家族遗传病史和药物过敏史",
)
RESULTS = ("{exam}：{finding}", "{exam}示{finding}", "{exam}（{finding}）")
ORDERS = ("予{drug}{purpose}", "用{drug}{purpose}", "{purpose}：{drug}", "给予{drug}以{purpose}")
CHOICES = ("{purpose}可选用{drugs:或}", "{purpose}常用{drugs}", "{purpose}：{drugs:、}", "{purpose}选择{drugs:或}")
AVOIDED = ("{drug}禁用于{group}，本例避用", "因属{group}，未用{drug}", "{group}不宜用{drug}，故不选")


def condition_facts(condition: Condition, knowledge: Knowledge, draw: Draw, part: bool = False) -> Facts:
    """The facts of a condition: all of them, or a drawn part of each list."""

    def listed(items: Sequence[str], least: int = 2) -> Items:
        return Items(draw.some(items, least if part else len(items)))

    symptoms = listed(condition.symptoms, 3)
    facts: Facts = {
        "name": condition.name,
        "other": draw.choice(condition.aliases) if condition.aliases else "",
        "department": condition.department,
        "definition": condition.definition,
        "course": condition.course,
        "clinic": "" if condition.emergency else condition.department,
        "urgent": "这是急症，请立即拨打120或前往急诊" if condition.emergency else "",
        "setting": "急诊" if condition.emergency else "门诊",
        "symptoms": symptoms,
        "others": Items(symptoms[1:]),
        "measures": listed(condition.measures),
        "cautions": listed(condition.cautions, 1),
        "risks": listed(condition.risk_groups),
        "prevention": listed(condition.prevention),
        "red_flags": listed(condition.red_flags),
        "therapies": _therapies(condition.therapies, knowledge, draw),
        "second_line": _therapies(condition.second_line, knowledge, draw),
    }
    return facts | _examinations(condition.examinations, draw, part)


def case_facts(condition: Condition, patient: Patient, knowledge: Knowledge, draw: Draw) -> Facts:
    """The facts of one patient's case, over a part of the condition's: nothing that this patient must not have."""
    facts = condition_facts(condition, knowledge, draw, part=True)
    symptoms = Items(facts["symptoms"])
    main = Items(symptoms[: draw.integer(1, 2)])
    prescription = prescribe(condition, patient, knowledge, draw)
    facts |= {
        "patient": patient.name,
        "sex": patient.sex,
        "age": patient.age_text,
        "word": "患儿" if patient.age < CHILD_AGE else "患者",
        "pronoun": "她" if patient.sex == "女" else "他",
        "main": main,
        "more": Items(symptoms[len(main) :]),
        "duration": draw.choice(DURATIONS[condition.course]),
        "development": draw.choice(DEVELOPMENTS[condition.course]),
        "history": patient.background.history if patient.background else "",
        "unremarkable": "" if patient.background else draw.choice(UNREMARKABLE),
    }
    facts |= _examinations(suitable_examinations(condition, patient), draw, part=True)
    facts |= _prescription(prescription, draw)
    if prescription.chosen:
        _, drug = draw.choice(prescription.chosen)
        facts |= drug_facts(drug, knowledge, draw)  # the drug that a follow-up asks about
    return facts


def drug_facts(drug: Drug, knowledge: Knowledge, draw: Draw) -> Facts:
    """The facts of a drug, with the conditions that it serves."""
    return {
        "drug": drug.name,
        "drug_class": drug.drug_class,
        "form": drug.form,
        "uses": Items(draw.shuffled(drug.uses)),
        "treated": Items(draw.shuffled(sorted(condition.name for condition in knowledge.treated_by(drug.id)))),
        "contraindications": Items(draw.shuffled(drug.contraindications)),
        "avoid_groups": Items(draw.shuffled([knowledge.trait(trait_id).group for trait_id in drug.avoid])),
        "drug_cautions": Items(draw.shuffled(drug.cautions)),
        "effects": Items(draw.shuffled(drug.adverse_effects)),
    }


def _examinations(examinations: Sequence[Examination], draw: Draw, part: bool) -> Facts:
    drawn = draw.some(examinations, 2 if part else len(examinations))
    style = draw.choice(RESULTS)
    return {
        "exams": Items(exam.name for exam in drawn),
        "results": Items(style.format(exam=exam.name, finding=exam.finding) for exam in drawn),
    }


def _therapies(therapies: Sequence[Therapy], knowledge: Knowledge, draw: Draw) -> Items:
    style = draw.choice(CHOICES)
    texts = []
    for therapy in therapies:
        drugs = Items(draw.shuffled([knowledge.drug(drug_id).name for drug_id in therapy.drugs]))
        texts.append(style.format(purpose=therapy.purpose, drugs=drugs))
    return Items(texts)


def _prescription(prescription: Prescription, draw: Draw) -> Facts:
    order, avoided = draw.choice(ORDERS), draw.choice(AVOIDED)
    return {
        "orders": Items(order.format(drug=drug.name, purpose=purpose) for purpose, drug in prescription.chosen),
        "taken": Items(drug.name for _, drug in prescription.chosen),
        "avoided": Items(avoided.format(drug=drug.name, group=trait.group) for drug, trait in prescription.avoided),
        "unserved": Items(prescription.unserved),
    }
