"""Log-probabilities of prompts and answers, in the lists that lm-evaluation-harness reads."""

from __future__ import annotations

import pytest

from model.scoring import score
from tests.engine.serving.live import NAME, Alone, Live

ASKED = {"model": NAME, "temperature": 0, "max_tokens": 1, "logprobs": 1, "echo": True, "seed": 1234}


def test_an_echo_gives_every_token_what_scoring_gives_it(live: Live, alone: Alone) -> None:
    """The harness takes all but the answer's one token from the end of the context on, and their largest."""
    texts = ["患者因头晕、乏力就诊", "诊断为肺炎"]
    prompts = [alone.directory.tokenizer.encode(text) for text in texts]
    choices = live.client().completions.create(prompt=prompts, **ASKED).choices
    for choice, prompt, text in zip(choices, prompts, texts, strict=True):
        lists = choice.logprobs
        assert len(lists.tokens) == len(lists.token_logprobs) == len(lists.top_logprobs) == len(prompt) + 1
        assert lists.token_logprobs[0] is None and lists.top_logprobs[0] is None
        ((whole,),) = score(alone.generator.model, [prompt[:1]], [[prompt[1:]]])
        assert lists.token_logprobs[1:-1] == pytest.approx(whole.logprobs, abs=1e-5)
        assert choice.text.startswith(text)
        assert lists.text_offset[0] == 0 and lists.text_offset[-1] == len(text)
        for at in range(1, len(prompt)):
            ((one,),) = score(alone.generator.model, [prompt[:at]], [[[prompt[at]]]], with_greedy=True)
            assert (lists.token_logprobs[at] == max(lists.top_logprobs[at].values())) == one.is_greedy


def test_an_answer_alone_has_its_own_log_probabilities(live: Live, alone: Alone) -> None:
    prompt = alone.directory.tokenizer.encode("患者因头晕")
    (expected,) = alone.answers(prompt, temperature=0, max_new_tokens=6)
    asked = {**ASKED, "prompt": prompt, "max_tokens": 6, "echo": False}
    (choice,) = live.client().completions.create(**asked).choices
    assert choice.text == expected.text
    assert choice.logprobs.token_logprobs == pytest.approx(expected.logprobs, abs=1e-5)
    assert [max(top.values()) for top in choice.logprobs.top_logprobs] == choice.logprobs.token_logprobs


def test_a_prompt_can_be_scored_with_nothing_written(live: Live, alone: Alone) -> None:
    prompt = alone.directory.tokenizer.encode("患者因头晕")
    answer = live.client().completions.create(**{**ASKED, "prompt": prompt, "max_tokens": 0, "logprobs": 3})
    assert answer.usage.completion_tokens == 0
    assert answer.choices[0].text == "患者因头晕"
    assert len(answer.choices[0].logprobs.token_logprobs) == len(prompt)
    assert all(3 <= len(top) <= 4 for top in answer.choices[0].logprobs.top_logprobs[1:])


def test_rows_that_pad_the_vocabulary_are_scored_too_and_have_no_text(live: Live, alone: Alone) -> None:
    rows, pieces = alone.generator.config.vocab_size, alone.directory.tokenizer.vocab_size
    assert rows > pieces
    for padding in pieces, rows - 1:
        answer = live.client().completions.create(**{**ASKED, "prompt": [5, padding, 6], "logprobs": 5})
        lists = answer.choices[0].logprobs
        assert lists.tokens[1] == "" and len(lists.token_logprobs) == 4
