"""The questions put to a model: every one that is held out, and what it says beside what its base says."""

import re
from collections.abc import Sequence
from pathlib import Path

import pytest

from model.chat import ChatTemplate, Conversation
from model.generate import Generator
from model.tokenizer import Tokenizer
from samples import quiz
from samples.dialogues import Dialogue
from samples.knowledge import Knowledge
from samples.questions import names_of, questions_of
from tests.samples.conftest import Splits
from tests.small_base import write_small_base


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A model of fresh weights that stores a template."""
    base = write_small_base(tmp_path / "model", context=256)
    tokenizer = Tokenizer.load(base)
    ChatTemplate.named("chimed", tokenizer).store(tokenizer).save(base)
    return base


def test_every_held_out_question_is_put_to_both_models_and_their_scores_stand_side_by_side(
    directory: Path, knowledge: Knowledge, dialogues: Splits[Dialogue], monkeypatch: pytest.MonkeyPatch
) -> None:
    questions = questions_of(dialogues.held_out)
    asked: list[list[Conversation]] = []

    def answer(
        generator: Generator, template: ChatTemplate, conversations: Sequence[Conversation], longest: int
    ) -> list[str]:
        asked.append(list(conversations))
        known = {question.messages: question.accepted[0] for question in questions}
        return [known[tuple(conversation)] if len(asked) == 2 else "不知道" for conversation in conversations]

    monkeypatch.setattr(quiz, "answer", answer)
    lines = quiz.compare(directory, directory).splitlines()
    assert asked == [[question.messages for question in questions]] * 2
    for line, kind in zip(lines, names_of(knowledge), strict=True):
        count = sum(question.kind == kind for question in questions)
        assert re.fullmatch(rf"Right {kind}: {count} of {count} \(100%, .*\); before tuning 0", line)


def test_answers_are_the_likeliest_tokens_behind_the_templates_header(
    directory: Path, dialogues: Splits[Dialogue]
) -> None:
    generator = Generator.from_directory(directory)
    template = ChatTemplate.of(generator.tokenizer)
    conversations = [question.messages for question in questions_of(dialogues.held_out)[:3]]
    answers = quiz.answer(generator, template, conversations, longest=4)
    for conversation, text in zip(conversations, answers, strict=True):
        ids = template.encode_prompt(generator.tokenizer, conversation)
        prompt = len(ids)
        for _ in range(4):
            # The model scored every token of its vocabulary as the next one; the best is taken.
            (scores,) = generator.score([ids], [[[token] for token in range(generator.config.vocab_size)]])
            ids.append(max(range(len(scores)), key=lambda token: scores[token][0]))
            if ids[-1] in template.end_ids(generator.tokenizer):
                ids.pop()
                break
        assert text == generator.tokenizer.decode(ids[prompt:])
