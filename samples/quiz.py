"""The keyed questions put to a model: what it answers, and how often that is right."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from model.chat import ChatTemplate, Conversation
from model.generate import Generator, Request
from model.sampling import SamplingOptions
from model.tokenizer import Tokenizer
from samples.dialogues import render_dialogues
from samples.knowledge import load_knowledge
from samples.questions import Score, names_of, questions_of, score_answers

LONGEST = 48  # tokens of an answer; those of the conversations to these questions are shorter


def examine(directory: Path | str, template: ChatTemplate, longest: int = LONGEST) -> list[Score]:
    """Scores of a model directory on the questions that the bundled dialogues hold out; answers of `longest` tokens."""
    knowledge = load_knowledge()
    _, held_out = render_dialogues(knowledge)
    questions = questions_of(held_out)
    conversations = [question.messages for question in questions]
    answers = answer(Generator.from_directory(directory), template, conversations, longest)
    return score_answers(questions, answers, names_of(knowledge))


def answer(
    generator: Generator, template: ChatTemplate, conversations: Sequence[Conversation], longest: int = LONGEST
) -> list[str]:
    """The likeliest answer to each conversation, token by token."""
    tokenizer = generator.tokenizer
    assert tokenizer is not None
    options = SamplingOptions(temperature=0, max_new_tokens=longest, stop_ids=template.end_ids(tokenizer))
    requests = [Request(template.encode_prompt(tokenizer, conversation), options) for conversation in conversations]
    return [completion.text or "" for completion in generator.generate(requests)]


def compare(base: Path | str, tuned: Path | str, longest: int = LONGEST) -> str:
    """What tuning has brought: the scores of both directories, in the tuned one's template, a line for each kind."""
    template = ChatTemplate.of(Tokenizer.load(tuned))
    assert template is not None
    before, after = (examine(directory, template, longest) for directory in (base, tuned))
    return "\n".join(f"{new}; before tuning {old.right}" for old, new in zip(before, after, strict=True))
