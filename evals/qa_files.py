"""Files of open questions: ChiMed, Huatuo-26M, cMedQA2, and whatever tools/sft.py reads."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from engine.data.conversations import recognise
from evals.questions import Question, Questions, gather, read_entries, texts_in
from model.chat import ConversationError, Message
from model.errors import InputError

# What the makers of the published figures do to the pages (process_chimed.py of IDEA-CCNL/Fengshenbang-LM): texts end
# where the page goes on with something else, and pages with contacts or another site's marks are left out.
_PAGE_GOES_ON = ("提问者对于答案的评价", "补充问题", "提问人的追问", "补充提问：")
_FOREIGN = ("http:", "www.", "askhpww42013", "````````````````", "发表时间：", "ask7kbks", "电话", "热线")


def read_chimed(path: Path | str, references: str = "each", is_cleaned: bool = False) -> Questions:
    """ChiMed (ChiMed.v1.{train,dev,test}.json): pages of a question and two answers, each perhaps adopted by the asker.

    Args:
        references: "each" answer makes a question of its own, as in the published figures; or "all" are references of
            one question; or only "adopted" ones are, and pages without such a one are left out.
        is_cleaned: whether pages are cut and left out as for the published figures.
    Raises:
        InputError: not such a file.
    """
    questions: list[Question] = []
    counts: Counter[str] = Counter()
    for entry in read_entries(path):
        asked, *answers = (str(entry.take(name) or "").strip() for name in ("question", "answer_1", "answer_2"))
        if is_cleaned:
            if any(mark in text.lower() for mark in _FOREIGN for text in (asked, *answers)):
                counts["with_contacts"] += 1
                continue
            asked, *answers = map(_cut, (asked, *answers))
        if references == "adopted":
            flags = [str(entry.take(f"adopted_{number}")).lower() == "true" for number in (1, 2)]
            if not any(flags):
                counts["without_adopted_answer"] += 1
                continue
            answers = [answer if is_adopted else "" for answer, is_adopted in zip(answers, flags, strict=True)]
        if not asked or not any(answers):
            counts["without_answer" if asked else "without_question"] += 1
            continue
        messages = (Message("user", asked),)
        specialties = [str(entry.fields.get(f"specialty_{number}") or "") for number in (1, 2)]
        if references == "each":
            counts["without_answer"] += answers.count("")
            questions += [
                Question(f"{entry.id}.{number}", messages, (answer,), specialty)
                for number, (answer, specialty) in enumerate(zip(answers, specialties, strict=True), 1)
                if answer
            ]
        else:
            first = next(place for place, answer in enumerate(answers) if answer)
            questions.append(Question(entry.id, messages, texts_in(answers), specialties[first]))
    return gather(path, questions, counts)


def _cut(text: str) -> str:
    for mark in _PAGE_GOES_ON:
        text = text.partition(mark)[0]
    return text.strip()


def read_huatuo(path: Path | str) -> Questions:
    """Huatuo-26M: {instruction, input, output} of the test file that Zhongjing carries, {questions, answers} of the
    Hugging Face data sets, or {question, answer}. Values are texts or lists of them. Of several questions, which say
    the same, the first is asked; all answers are references.

    Raises:
        InputError: not such a file.
    """
    questions: list[Question] = []
    counts: Counter[str] = Counter()
    for entry in read_entries(path):
        asked_in, answered_in = next(
            (names for names in (("questions", "answers"), ("question", "answer")) if names[0] in entry.fields),
            ("instruction", "output"),
        )
        asked, answers = texts_in(entry.take(asked_in)), texts_in(entry.take(answered_in))
        if not asked or not answers:
            counts["without_answer" if asked else "without_question"] += 1
            continue
        text = "\n".join((asked[0], *texts_in(entry.fields.get("input"))[:1]))
        questions.append(Question(entry.id, (Message("user", text),), answers, str(entry.fields.get("label") or "")))
    return gather(path, questions, counts)


def read_cmedqa2(path: Path | str, references: str = "all") -> Questions:
    """cMedQA2: question.csv, answer.csv, and the positive ones of a file of candidates.

    Args:
        path: the folder, whose test_candidates.txt or .csv is taken, or a file of candidates in it, also that of the
            training set.
        references: "all" positive answers are references of one question, or "each" makes a question of its own.
    Raises:
        InputError: a file is missing, or not as it should be.
    """
    candidates = Path(path)
    if candidates.is_dir():
        names = ("test_candidates.txt", "test_candidates.csv")
        candidates = next((candidates / name for name in names if (candidates / name).is_file()), candidates / names[0])
    for file in (candidates, *(candidates.with_name(name) for name in ("question.csv", "answer.csv"))):
        if not file.is_file():
            raise InputError(
                f"{file}: there is no such file. cMedQA2 needs question.csv, answer.csv and {candidates.name}."
            )
    positives: dict[str, list[str]] = defaultdict(list)
    for entry in read_entries(candidates, is_table=True):
        is_training = "label" not in entry.fields and any(name.startswith("pos") for name in entry.fields)
        answer = next(name for name in entry.fields if name.startswith("pos")) if is_training else "ans_id"
        if is_training or entry.take("label").strip() == "1":
            positives[entry.take("question_id")].append(entry.take(answer))
    wanted = {answer for answers in positives.values() for answer in answers}
    asked = _contents(candidates.with_name("question.csv"), "question_id", positives.keys())
    answered = _contents(candidates.with_name("answer.csv"), "ans_id", wanted)
    questions: list[Question] = []
    counts: Counter[str] = Counter()
    for id, ids in positives.items():
        answers = texts_in([answered.get(answer, "") for answer in ids])
        if not asked.get(id) or not answers:
            counts["without_answer" if asked.get(id) else "without_question"] += 1
            continue
        messages = (Message("user", asked[id]),)
        if references == "each":
            questions += [Question(f"{id}.{n}", messages, (answer,)) for n, answer in enumerate(answers, 1)]
        else:
            questions.append(Question(id, messages, answers))
    return gather(candidates, questions, counts)


def _contents(path: Path, key: str, wanted: Iterable[str]) -> dict[str, str]:
    """The texts of some rows of question.csv or answer.csv, by their ids."""
    kept = set(wanted)
    return {
        entry.fields[key]: entry.take("content").strip()
        for entry in read_entries(path, is_table=True)
        if entry.take(key) in kept
    }


def read_conversations(path: Path | str, keys: Mapping[str, Sequence[str]], system: str | None) -> Questions:
    """The last answer of every conversation, given what was said before: any file that tools/sft.py reads.

    Args:
        keys: what fields mean where the schema is not known by itself, as --data.keys of tools/sft.py.
        system: system prompt of conversations that have none.
    Raises:
        InputError: no file, or no conversation with an answer in it.
    """
    questions: list[Question] = []
    counts: Counter[str] = Counter()
    first_refused = ""
    for entry in read_entries(path):
        try:
            messages = recognise(entry.value, keys).messages
        except ConversationError as error:
            counts["no_conversation"] += 1
            first_refused = first_refused or f"{entry.where}: {error}"
            continue
        if messages[-1].role == "user":
            messages = messages[:-1]
        if not messages or messages[-1].role != "assistant":
            counts["without_answer"] += 1
            continue
        if system is not None and messages[0].role != "system":
            messages = [Message("system", system), *messages]
        questions.append(Question(entry.id, tuple(messages[:-1]), (messages[-1].content.strip(),)))
    notes = [f"Records were left out that hold no conversation, the first at {first_refused}."] if first_refused else []
    return gather(path, questions, counts, notes)
