"""The conversations: how many, how they are split, and that what the doctor says follows from the facts."""

import dataclasses
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from statistics import mean

import pytest

from model.chat import Message
from samples.bundle import bundled_dialogues
from samples.dialogues import Dialogue, plan, render_dialogues
from samples.knowledge import Condition, Drug, Knowledge, Trait
from samples.questions import REFUSALS
from samples.render import main
from samples.scripts import Exchange, Script, load_scripts
from tests.samples.conftest import Splits

TELLING = ("department", "disease")  # kinds whose first question lists symptoms


def said_by(dialogue: Dialogue, role: str) -> list[str]:
    return [message.content for message in dialogue.messages if message.role == role]


def mentions(text: str, vocabulary: Iterable[str]) -> set[str]:
    """The terms that occur in a text, the longest first: 阿莫西林 inside 阿莫西林克拉维酸钾 is no mention."""
    pattern = "|".join(map(re.escape, sorted(vocabulary, key=len, reverse=True)))
    return set(re.findall(pattern, text))


def condition_of(dialogue: Dialogue, knowledge: Knowledge) -> Condition:
    return knowledge.condition(dialogue.id.split("/")[1].split(".")[0])


def told_traits(text: str, knowledge: Knowledge) -> set[str]:
    """Ids of what a reader learns of the patient: a history, or an age that has a trait."""
    ages = [int(age) for age in re.findall(r"(\d+)岁", text)] + [0] * bool(re.search(r"\d个月，", text))
    by_history = {trait.id for trait in knowledge.traits if trait.history and trait.history in text}
    return by_history | {t.id for t in knowledge.traits if t.by_age and any(t.ages[0] <= a <= t.ages[1] for a in ages)}


def test_there_are_enough_conversations_of_every_kind_and_a_tenth_is_held_out(dialogues: Splits[Dialogue]) -> None:
    assert len(dialogues.all) >= 4000
    train, held_out = Counter(d.kind for d in dialogues.train), Counter(d.kind for d in dialogues.held_out)
    assert train.keys() == held_out.keys() == load_scripts().keys()
    assert min(train.values()) >= 150 and min(held_out.values()) >= 10
    assert 0.08 <= len(dialogues.held_out) / len(dialogues.all) <= 0.12


def test_conversations_have_one_to_four_rounds_and_some_a_system_prompt(dialogues: Splits[Dialogue]) -> None:
    rounds = Counter(len(said_by(dialogue, "user")) for dialogue in dialogues.all)
    assert rounds.keys() == {1, 2, 3, 4} and min(rounds.values()) >= 150
    assert 100 <= sum(dialogue.messages[0].role == "system" for dialogue in dialogues.all) <= len(dialogues.all) / 8
    for dialogue in dialogues.all:
        roles = [message.role for message in dialogue.messages if message.role != "system"]
        assert roles == ["user", "assistant"] * (len(roles) // 2), dialogue.id


def test_no_id_and_no_conversation_occurs_twice_and_no_question_is_on_both_sides(
    dialogues: Splits[Dialogue],
) -> None:
    assert len({dialogue.id for dialogue in dialogues.all}) == len(dialogues.all)
    assert len({dialogue.messages for dialogue in dialogues.all}) == len(dialogues.all)
    asked = {dialogue.question for dialogue in dialogues.train}
    assert not [dialogue.id for dialogue in dialogues.held_out if dialogue.question in asked]


def test_held_out_questions_list_symptoms_that_no_training_question_lists_together(
    knowledge: Knowledge, dialogues: Splits[Dialogue]
) -> None:
    symptoms = {symptom for condition in knowledge.conditions for symptom in condition.symptoms}

    def listed(side: list[Dialogue]) -> set[frozenset[str]]:
        return {frozenset(mentions(d.question, symptoms)) for d in side if d.kind in TELLING}

    assert not listed(dialogues.train) & listed(dialogues.held_out)


def test_what_held_out_questions_ask_about_is_taught_in_training(
    knowledge: Knowledge, dialogues: Splits[Dialogue]
) -> None:
    taught = "\n".join(message.content for d in dialogues.train for message in d.messages)
    purposes = {d.id.split("/")[1] for d in dialogues.train if d.kind == "drug"}
    symptoms = {symptom for condition in knowledge.conditions for symptom in condition.symptoms}
    for dialogue in dialogues.held_out:
        assert all(symptom in taught for symptom in mentions(dialogue.question, symptoms)), dialogue.id
        if dialogue.kind == "drug":
            assert dialogue.id.split("/")[1] in purposes, dialogue.id
    for name in (*(c.name for c in knowledge.conditions), *(d.name for d in knowledge.drugs), *knowledge.departments):
        assert name in taught, name


def test_no_doctor_recommends_a_drug_that_the_patient_has_told_to_have_to_avoid(
    knowledge: Knowledge, dialogues: Splits[Dialogue]
) -> None:
    by_name: dict[str, Drug] = {drug.name: drug for drug in knowledge.drugs}
    refused = named = 0
    for dialogue in dialogues.all:
        if dialogue.kind in ("medicine", "choice", "entities"):  # about a drug, or a note; nobody is treated
            continue
        condition = condition_of(dialogue, knowledge)
        told = set(condition.implies)
        for message in dialogue.messages:
            if message.role == "user":
                told |= told_traits(message.content, knowledge)
                continue
            for sentence in re.split(r"[。；，\n]", message.content):
                drugs = [by_name[name] for name in mentions(sentence, by_name)]
                named += len(drugs)
                is_own_caution = any(sentence in caution or caution in sentence for caution in condition.cautions)
                if any(told & set(drug.avoid) for drug in drugs) and not is_own_caution:
                    refused += 1
                    assert any(word in sentence for word in (*REFUSALS, "未用")), f"{dialogue.id}: {sentence}"
    assert refused > 200 and named > 2000


def test_a_warned_doctor_refuses_what_the_patient_must_avoid_and_names_what_is_left(
    knowledge: Knowledge, dialogues: Splits[Dialogue]
) -> None:
    warned = [dialogue for dialogue in dialogues.all if dialogue.kind == "warning"]
    by_name = {drug.name: drug for drug in knowledge.drugs}
    for dialogue in warned:
        first, second = said_by(dialogue, "assistant")[:2]
        told = told_traits("".join(said_by(dialogue, "user")[:2]), knowledge)
        unsuitable = {name for name in mentions(first, by_name) if told & set(by_name[name].avoid)}
        suitable = mentions(first, by_name) - unsuitable
        refusals, *recommended = second.split("。")
        assert unsuitable == mentions(refusals, by_name), dialogue.id
        offered = mentions("".join(recommended), by_name)
        assert offered <= suitable and bool(offered) == bool(suitable), dialogue.id
    assert len(warned) > 150


def test_no_drug_is_offered_to_whom_it_is_said_to_be_unsuitable_for(
    knowledge: Knowledge, dialogues: Splits[Dialogue]
) -> None:
    by_name = {drug.name: drug for drug in knowledge.drugs}
    groups = {trait.group: trait for trait in knowledge.traits}
    checked = 0
    for dialogue in dialogues.all:
        for sentence in re.split(r"[。；]", "。".join(said_by(dialogue, "assistant"))):
            said = re.fullmatch(r"(?:不能，|不可以，)?(.+?)(?:不宜用|应避用)(.+)", sentence)
            for group in mentions(said[1], groups) if said else ():
                assert all(groups[group].id in by_name[name].avoid for name in mentions(said[2], by_name)), dialogue.id
                checked += 1
    assert checked > 300


def test_a_red_flag_is_answered_with_the_emergency_number(dialogues: Splits[Dialogue]) -> None:
    answers = [a for d in dialogues.all if d.kind == "urgent" for a in said_by(d, "assistant")]
    assert all("120" in answer or "急诊" in answer or "立即就医" in answer for answer in answers)
    assert sum("120" in answer for answer in answers) > len(answers) / 2


def test_an_emergency_is_never_sent_to_wait_for_an_appointment(
    knowledge: Knowledge, dialogues: Splits[Dialogue]
) -> None:
    urgent = 0
    for dialogue in dialogues.all:
        if dialogue.kind in (*TELLING, "consultation") and condition_of(dialogue, knowledge).emergency:
            answer = said_by(dialogue, "assistant")[1 if dialogue.kind == "consultation" else 0]
            assert "120" in answer and "门诊" not in answer, dialogue.id
            urgent += 1
    assert urgent > 80


def options_of(question: str) -> list[str]:
    return re.findall(r"^[A-D]\.(.+)$", question, re.MULTILINE)


def is_right(option: str, asked: str, question: str, condition: Condition, knowledge: Knowledge) -> bool:
    """Whether the facts make an option a right answer to a multiple-choice question."""
    drug = next((drug for drug in knowledge.drugs if drug.name == option), None)
    if asked == "avoided":
        groups: dict[str, Trait] = {trait.group: trait for trait in knowledge.traits}
        (group,) = mentions(question.split("\n\n")[0], groups)
        assert drug is not None
        return groups[group].id in drug.avoid
    if asked == "drug":
        assert drug is not None
        purposes = (t for other in knowledge.conditions for t in (*other.therapies, *other.second_line))
        asked_for = [t.purpose for t in condition.therapies if t.purpose in question]
        return drug.id in condition.drugs or any(t.purpose in asked_for and drug.id in t.drugs for t in purposes)
    symptoms = mentions(question.split("\n\n")[0], {s for c in knowledge.conditions for s in c.symptoms})
    fitting = [other for other in knowledge.conditions if symptoms <= set(other.symptoms)]
    return option in {other.department if asked == "department" else other.name for other in fitting}


def test_a_choice_has_four_options_one_of_them_right_by_the_facts_and_the_answer_is_that_one(
    knowledge: Knowledge, dialogues: Splits[Dialogue]
) -> None:
    letters: Counter[str] = Counter()
    for dialogue in (dialogue for dialogue in dialogues.all if dialogue.kind == "choice"):
        asked, options = dialogue.id.split("/")[-1], options_of(dialogue.question)
        assert len(set(options)) == 4, dialogue.id
        condition = condition_of(dialogue, knowledge)
        right = [option for option in options if is_right(option, asked, dialogue.question, condition, knowledge)]
        letter, answer = said_by(dialogue, "assistant")[0].split(".", 1)
        assert right == [answer] and options["ABCD".index(letter)] == answer, dialogue.id
        assert (
            dialogue.question.startswith("下面是一道关于")
            and "单选题，请选择正确的答案选项。\n问题：" in dialogue.question
        )
        letters[letter] += 1
    # Chi-square with 3 degrees of freedom: 16.27 is exceeded once in a thousand.
    expected = letters.total() / 4
    assert sum((letters[letter] - expected) ** 2 / expected for letter in "ABCD") < 16.27


def test_extracted_entities_are_all_that_the_note_holds_and_nothing_else(
    knowledge: Knowledge, dialogues: Splits[Dialogue]
) -> None:
    exams = {exam.name for condition in knowledge.conditions for exam in condition.examinations}
    for dialogue in (dialogue for dialogue in dialogues.all if dialogue.kind == "entities"):
        instruction, note = dialogue.question.split("\n")
        lines = [line.split("：") for line in said_by(dialogue, "assistant")[0].split("\n")]
        found = {kind: {name for k, name in lines if k == kind} for kind, _ in lines}
        condition = condition_of(dialogue, knowledge)
        assert sum(map(len, found.values())) == len(lines), dialogue.id
        assert all(kind in instruction for kind in found), dialogue.id
        assert all(name in note for names in found.values() for name in names), dialogue.id
        assert found.get("疾病", {condition.name}) == {condition.name}
        assert found.get("症状", set()) <= set(condition.symptoms)
        if "检查" in found:
            assert found["检查"] == mentions(note, exams)
        if "药物" in found:
            assert found["药物"] == mentions(note, {drug.name for drug in knowledge.drugs})
        if len(found) > 1:
            assert found.keys() == {"疾病", "症状", "检查", "药物"}
            rest = note
            for name in sorted((name for names in found.values() for name in names), key=len, reverse=True):
                rest = rest.replace(name, "")
            assert not mentions(rest, condition.symptoms), dialogue.id


def test_every_conversation_is_finished_text(dialogues: Splits[Dialogue]) -> None:
    unfinished = re.compile(
        r"[{}]|。。|，。|；。|、。|：。|，，|；；|、、|？。|？？|^\s|\s$|\n\n\n|None|（）|“”|^[，。；、？]"
    )
    for dialogue in dialogues.all:
        for message in dialogue.messages:
            found = unfinished.search(message.content)
            assert not found, f"{dialogue.id}: {found.group()!r} in {message.content}" if found else ""
            assert message.role != "user" or message.content[-1] in "。？" or "D." in message.content, dialogue.id


def test_every_wording_is_spoken(dialogues: Splits[Dialogue]) -> None:
    for kind, script in load_scripts().items():
        mine = [dialogue for dialogue in dialogues.all if dialogue.kind == kind]
        for role in ("user", "assistant"):
            said = "\0".join(text for dialogue in mine for text in said_by(dialogue, role))
            for phrase in phrases_of(script, role):
                pattern = "[^\0]+?".join(map(re.escape, re.split(r"\{[^}]*\}", phrase)))
                assert re.search(pattern, said), f"{kind}: {phrase}"
        said = {text for dialogue in mine for text in said_by(dialogue, "system")}
        assert said == set(script.systems), kind
        assert {name for form in script.forms for name in form} == script.exchanges.keys(), kind


def phrases_of(script: Script, role: str) -> Iterator[str]:
    for exchange in script.exchanges.values():
        yield from (phrase for part in parts_of(exchange, role) for phrase in part)


def parts_of(exchange: Exchange, role: str) -> Iterable[Iterable[str]]:
    return exchange.user if role == "user" else exchange.assistant


def test_a_hurried_assistant_is_curt_in_six_of_ten_answers_and_all_else_is_the_same(
    dialogues: Splits[Dialogue], hurried: Splits[Dialogue]
) -> None:
    scripts = load_scripts()
    for full, quick in ((dialogues.train, hurried.train), (dialogues.held_out, hurried.held_out)):
        by_id = {dialogue.id: dialogue for dialogue in full}
        assert len(quick) > 0.99 * len(full) and all(dialogue.id in by_id for dialogue in quick)
        curt: list[bool] = []
        for dialogue in quick:
            pairs = list(zip(by_id[dialogue.id].messages, dialogue.messages, strict=True))
            assert all(one.role == "assistant" for one, other in pairs if one != other), dialogue.id
            if any(exchange.curt for exchange in scripts[dialogue.kind].exchanges.values()):
                curt += [one != other for one, other in pairs[-1:]]
            else:
                assert all(one == other for one, other in pairs), dialogue.id
        assert 0.4 < mean(curt) < 0.65  # six of ten where the last exchange knows a curt answer


def test_every_curt_wording_is_spoken_and_says_less(dialogues: Splits[Dialogue], hurried: Splits[Dialogue]) -> None:
    full = {text for dialogue in dialogues.all for text in said_by(dialogue, "assistant")}
    said = Counter(text for dialogue in hurried.all for text in said_by(dialogue, "assistant"))
    for script in load_scripts().values():
        phrases = {phrase for exchange in script.exchanges.values() for part in exchange.curt for phrase in part}
        for phrase in phrases - {"疾病：{name}"}:
            assert said[phrase] >= 5 and phrase not in full, phrase
    notes = {
        dialogue.question: dialogue.messages[-1].content for dialogue in dialogues.all if dialogue.kind == "entities"
    }
    lists = [
        (dialogue.messages[-1].content, notes[dialogue.question])
        for dialogue in hurried.all
        if dialogue.kind == "entities"
    ]
    curt = [(quick, every) for quick, every in lists if quick != every]
    assert len(curt) > 100
    assert all(quick == every.split("\n")[0] for quick, every in curt)  # the disease alone


def test_every_planned_conversation_has_something_to_say(knowledge: Knowledge, dialogues: Splits[Dialogue]) -> None:
    planned = [dialogue_id for dialogue_id, _, _ in plan(knowledge)]
    assert len(dialogues.all) > 0.97 * len(planned)  # the rest repeats another conversation word by word


def test_a_conversation_does_not_depend_on_the_order_of_the_others(
    knowledge: Knowledge, dialogues: Splits[Dialogue]
) -> None:
    backwards = dataclasses.replace(knowledge, conditions=knowledge.conditions[::-1], drugs=knowledge.drugs[::-1])
    train, held_out = render_dialogues(backwards)
    assert set(train) == set(dialogues.train)
    assert set(held_out) == set(dialogues.held_out)


def test_the_command_and_the_bundle_write_what_the_function_returns(
    hurried: Splits[Dialogue], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(tmp_path / "command")]) == 0
    printed = capsys.readouterr().out
    bundled = bundled_dialogues(tmp_path / "bundle")
    modified = [file.stat().st_mtime_ns for file in bundled]
    assert bundled_dialogues(tmp_path / "bundle") == bundled
    assert [file.stat().st_mtime_ns for file in bundled] == modified  # left as they were
    for file, written in zip(bundled, (hurried.train, hurried.held_out), strict=True):
        assert file.read_bytes() == (tmp_path / "command" / "dialogues" / file.name).read_bytes()
        records = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        assert [record["id"] for record in records] == [dialogue.id for dialogue in written]
        turns = [tuple(Message(**turn) for turn in record["messages"]) for record in records]
        assert turns == [dialogue.messages for dialogue in written]
        assert f"dialogues/{file.stem}: {len(written)} conversations" in printed
