"""How a multiple-choice question is put, and how its answer is taken: one protocol of several that give other numbers.

ceval    as C-Eval's evaluators write it (hkust-nlp/ceval, code/evaluator_series); the likeliest letter
cmmlu    as CMMLU's script for base models does (haonan-li/CMMLU, src/hf_causal_model.py); the likeliest letter
lm-eval  as lm-evaluation-harness 0.4.13 does in its tasks ceval-valid and cmmlu; the likeliest " A", " B", ...
gen      the model answers, and letters are looked for in what it says
paper    the same with the prompt of ChiMed-GPT's authors (IDEA-CCNL/Fengshenbang-LM, branch dev_bio, work tree)
text     the option whose own text is likeliest behind the question, no option being listed
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from evals.choice_files import Question
from evals.task import Prompt
from model.chat import Message


@dataclass(frozen=True)
class Wording:
    """The pieces of a prompt, with {topic}, {form}, {text}, {letter} and {option} in them.

    header: once, before everything.
    question, option, ask: of each question; `ask` comes before its answer.
    lead: between that and the letters; it is scored with the letter.
    choice: what is scored of an option.
    behind: an exemplar's answer.
    turn: of one text that stands for a question and the header of its answer, where there is no template; "" for none.
    """

    header: str
    question: str = "{text}"
    option: str = "\n{letter}. {option}"
    ask: str = "\n答案："
    lead: str = ""
    choice: str = "{letter}"
    behind: str = "\n\n"
    turn: str = ""


@dataclass(frozen=True)
class Protocol:
    """wording: by dataset; "" for all others.

    is_likelihood: whether letters are compared by likelihood. Otherwise the model answers.
    takes_several: whether questions with several right options can be asked. A letter that is likeliest is only one.
    is_chat: whether it may be put in turns, where a model has a template.
    has_shots: whether exemplars may be shown.
    is_stripped: whether spaces around a question's text are taken away.
    has_norm: whether likelihoods per character are compared too.
    is_shortened: whether exemplars are left out where the context is too short, and then the header. Otherwise the
        oldest tokens are.
    note: what a reader of its numbers must know.
    """

    name: str
    wording: dict[str, Wording]
    note: str
    is_likelihood: bool = True
    takes_several: bool = False
    is_chat: bool = False
    has_shots: bool = True
    is_stripped: bool = False
    has_norm: bool = False
    is_shortened: bool = True


FORMS = {"one": "单项选择题", "several": "多项选择题", "open": "选择题（正确选项可能不止一个）"}

_CEVAL_HEADER = "以下是中国关于{topic}考试的单项选择题，请选出其中的正确答案。\n\n"
_CMMLU_HEADER = "以下是关于{topic}的单项选择题，请直接给出正确答案的选项。\n\n"

PROTOCOLS = {
    protocol.name: protocol
    for protocol in (
        Protocol(
            "ceval",
            {"": Wording(_CEVAL_HEADER)},
            "The answer is the letter that is likeliest behind the prompt, encoded together with it.",
            is_chat=True,
        ),
        Protocol(
            "cmmlu",
            {"": Wording(_CMMLU_HEADER, question="题目：{text}", ask="\n答案是：")},
            "The answer is the letter whose token is likeliest behind the prompt; no chat template is used.",
        ),
        Protocol(
            "lm-eval",
            {
                "ceval": Wording("以下是中国关于{topic}的单项选择题，请选出其中的正确答案。\n\n", lead=" "),
                "cmmlu": Wording(_CMMLU_HEADER, lead=" "),
            },
            "As lm-evaluation-harness 0.4.13 asks and counts, without a chat template: accuracy is its acc, that of a "
            "group weighted by size.",
            is_stripped=True,
            has_norm=True,
            is_shortened=False,
        ),
        Protocol(
            "gen",
            {"": Wording("以下是关于{topic}的{form}，请给出正确选项的字母。\n\n")},
            "The answer is read off what the model says; one without a letter to be found is wrong, and counted.",
            is_likelihood=False,
            takes_several=True,
            is_chat=True,
        ),
        Protocol(
            "paper",
            {
                "": Wording(
                    "下面是一道关于{topic}的单选题，请选择正确的答案选项。\n",
                    question="问题：{text}\n",
                    option="\n{letter}.{option}",
                    ask="",
                    turn="[human]:{asked}\n[bot]:",
                )
            },
            "With the prompt of ChiMed-GPT's authors; how they read answers off is not published, here as in gen.",
            is_likelihood=False,
            is_chat=True,
            has_shots=False,
        ),
        Protocol(
            "text",
            {"": Wording("", question="问题：{text}", option="", choice="{option}")},
            "The answer is the option whose text is likeliest behind the question: no options are listed and no chat "
            "template is used, so a model need not have learnt to answer by letter. Short texts are at an advantage; "
            "acc_norm compares by character.",
            has_shots=False,
            has_norm=True,
        ),
    )
}


class Asked(NamedTuple):
    """A prompt, how many exemplars it was shortened by, and whether by its header."""

    prompt: Prompt
    dropped: int = 0
    is_headless: bool = False


class Writer:
    """Writes the prompts of a protocol.

    Args:
        dataset: such as cmmlu; one that the protocol has a wording for.
        is_chat: in turns, otherwise as one text.
        fits: whether a prompt goes into the context with room for its answer; None where every one does.
    """

    def __init__(
        self, protocol: Protocol, dataset: str, is_chat: bool, fits: Callable[[Prompt], bool] | None = None
    ) -> None:
        self.protocol, self.is_chat = protocol, is_chat and protocol.is_chat
        self.wording = protocol.wording.get(dataset) or protocol.wording[""]
        self._fits = fits if protocol.is_shortened else None

    def ask(self, question: Question, exemplars: Sequence[Question] = ()) -> Asked:
        """The prompt. Where it does not fit, exemplars go, the longest first and those as long with it, then the
        header, as in CMMLU's script (which measures in tokens what is measured in characters here)."""
        kept, header = list(exemplars), True
        prompt = self._write(question, kept, header)
        while self._fits and not self._fits(prompt) and (kept or header):
            if kept:
                lengths = [len(self._body(one)) + len(one.answer) for one in kept]
                kept = [one for one, length in zip(kept, lengths, strict=True) if length < max(lengths)]
            else:
                header = False
            prompt = self._write(question, kept, header)
        return Asked(prompt, len(exemplars) - len(kept), not header)

    def choices(self, question: Question) -> tuple[str, ...]:
        """What answers the question, by option."""
        return tuple(
            self.wording.choice.format(letter=letter, option=option)
            for letter, option in zip(question.letters, question.options, strict=True)
        )

    def options(self, question: Question) -> tuple[str, ...]:
        """What may follow the prompt."""
        return tuple(self.wording.lead + choice for choice in self.choices(question))

    def _write(self, question: Question, exemplars: Sequence[Question], has_header: bool) -> Prompt:
        header = self.wording.header.format(topic=question.topic, form=FORMS[question.form]) if has_header else ""
        bodies = [self._body(one) for one in (*exemplars, question)]
        if self.is_chat:
            asked = [Message("user", body) for body in (header + bodies[0], *bodies[1:])]
            said = [Message("assistant", one.answer) for one in exemplars]
            return (*(message for pair in zip(asked, said, strict=False) for message in pair), asked[-1])
        shown = [
            body + self.wording.lead + one.answer + self.wording.behind
            for body, one in zip(bodies, exemplars, strict=False)
        ]
        text = header + "".join(shown) + bodies[-1]
        return self.wording.turn.format(asked=text) if self.wording.turn else text

    def _body(self, question: Question) -> str:
        """A question with its options, up to its answer."""
        wording = self.wording
        text = question.text.strip() if self.protocol.is_stripped else question.text
        options = (
            wording.option.format(letter=letter, option=option)
            for letter, option in zip(question.letters, question.options, strict=True)
        )
        return wording.question.format(text=text) + "".join(options) + wording.ask
