"""OpenAI's own client, unmodified: every greedy answer is the one that the generator gives alone."""

from __future__ import annotations

import asyncio

import openai
import pytest

from model.sampling import row_seed
from tests.engine.serving.live import NAME, Alone, Live
from tests.small_base import FINDINGS

QUESTION = "头晕怎么办？"
GREEDY = {"model": NAME, "temperature": 0}


def messages(question: str = QUESTION) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}]


def test_the_model_is_listed(live: Live) -> None:
    assert [model.id for model in live.client().models.list()] == [NAME]


def test_a_conversation_is_answered_as_alone(live: Live, alone: Alone) -> None:
    answer = live.client().chat.completions.create(messages=messages(), max_tokens=12, **GREEDY)
    assert answer.choices[0].message.content == alone.chat(QUESTION, 12) != ""
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 12
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 12


def test_parts_of_a_message_are_one_text_and_the_newer_name_of_the_limit_counts(live: Live, alone: Alone) -> None:
    parts = [{"type": "text", "text": QUESTION[:2]}, {"type": "text", "text": QUESTION[2:]}]
    asked = [{"role": "user", "content": parts}]
    answer = live.client().chat.completions.create(messages=asked, max_completion_tokens=5, **GREEDY)
    assert answer.choices[0].message.content == alone.chat(QUESTION, 5)


def test_a_stream_adds_up_to_the_whole_answer_and_ends_with_the_usage(live: Live, alone: Alone) -> None:
    chunks = list(
        live.client().chat.completions.create(
            messages=messages(), max_tokens=12, stream=True, stream_options={"include_usage": True}, **GREEDY
        )
    )
    choices = [chunk.choices[0] for chunk in chunks[:-1]]
    assert choices[0].delta.role == "assistant"
    assert "".join(choice.delta.content or "" for choice in choices) == alone.chat(QUESTION, 12)
    assert [choice.finish_reason for choice in choices if choice.finish_reason] == ["length"]
    assert chunks[-1].usage.completion_tokens == 12 and chunks[-1].choices == []


def test_samples_are_those_of_the_seed(live: Live, alone: Alone) -> None:
    client, prompt = live.client(), alone.directory.tokenizer.encode("患者因头晕")
    asked = {"model": NAME, "prompt": prompt, "n": 3, "temperature": 1.0, "top_p": 0.9, "max_tokens": 8}
    choices = client.completions.create(seed=5, extra_body={"top_k": 20}, **asked).choices
    expected = alone.answers(prompt, 3, 5, temperature=1.0, top_p=0.9, top_k=20, max_new_tokens=8)
    assert [choice.text for choice in choices] == [answer.text for answer in expected]
    assert [choice.index for choice in choices] == [0, 1, 2]
    unseeded = [client.completions.create(**asked).choices[0].text for _ in range(2)]
    assert unseeded[0] != unseeded[1]


def test_an_answer_ends_before_a_stop_text(live: Live, alone: Alone) -> None:
    whole = alone.chat(QUESTION, 12)
    stop = whole[4:6]
    answer = live.client().chat.completions.create(messages=messages(), max_tokens=12, stop=stop, **GREEDY)
    assert answer.choices[0].message.content == whole[: whole.index(stop)]
    assert answer.choices[0].finish_reason == "stop"


def test_several_prompts_are_answered_in_their_order_streamed_or_not(live: Live, alone: Alone) -> None:
    prompts = ["头晕", "咳嗽三天", "腹痛"]
    tokenizer = alone.directory.tokenizer
    begin = [tokenizer.bos_id] if tokenizer.add_bos else []
    expected = [
        alone.answers(begin + tokenizer.encode(prompt), temperature=0, max_new_tokens=7)[0].text for prompt in prompts
    ]
    client = live.client()
    whole = client.completions.create(prompt=prompts, max_tokens=7, **GREEDY)
    assert [choice.text for choice in whole.choices] == expected
    texts = [""] * 3
    for chunk in client.completions.create(prompt=prompts, max_tokens=7, stream=True, **GREEDY):
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == expected


def test_samples_of_several_prompts_stand_side_by_side(live: Live, alone: Alone) -> None:
    """The first prompt draws by the seed itself, as it would alone; those behind it by seeds of their own."""
    prompts = [alone.directory.tokenizer.encode(text) for text in ("头晕", "咳嗽三天")]
    asked = {"model": NAME, "prompt": prompts, "n": 2, "seed": 3, "temperature": 1.0, "max_tokens": 6}
    choices = live.client().completions.create(**asked).choices
    expected = [
        answer.text
        for prompt, seed in zip(prompts, (3, row_seed(3, 1)), strict=True)
        for answer in alone.answers(prompt, 2, seed, temperature=1.0, max_new_tokens=6)
    ]
    assert [choice.text for choice in choices] == expected and len(set(expected)) == 4


def test_64_clients_at_once_get_the_answers_they_get_alone(live: Live, alone: Alone) -> None:
    questions = [f"患者{number}，{FINDINGS[number % len(FINDINGS)]}，怎么办？" for number in range(64)]

    async def ask_all() -> list[str]:
        async with live.client(openai.AsyncOpenAI) as client:

            async def ask(number: int, question: str) -> str:
                asked = {"messages": messages(question), "max_tokens": 4 + number % 9, **GREEDY}
                if number % 2:
                    return (await client.chat.completions.create(**asked)).choices[0].message.content
                stream = await client.chat.completions.create(stream=True, **asked)
                return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

            return await asyncio.gather(*(ask(number, question) for number, question in enumerate(questions)))

    expected = [alone.chat(question, 4 + number % 9) for number, question in enumerate(questions)]
    assert len(set(expected)) > 32
    assert asyncio.run(ask_all()) == expected


def test_errors_are_those_that_the_client_knows(live: Live) -> None:
    client = live.client()
    with pytest.raises(openai.NotFoundError, match="There is no model 'other' here"):
        client.chat.completions.create(model="other", messages=messages())
    with pytest.raises(openai.BadRequestError, match="temperature: Input should be less than or equal to 2"):
        client.chat.completions.create(model=NAME, messages=messages(), temperature=3)
    with pytest.raises(openai.BadRequestError, match="leaves room for at most 255") as refused:
        client.completions.create(model=NAME, prompt=[5] * 256)
    assert refused.value.code == "context_length_exceeded"
