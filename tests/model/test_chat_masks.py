"""Which ids a conversation becomes and which are trained, against pieces written down by hand for every template.

The oracles: transformers encodes what the hand-written prompt pieces say, SentencePiece (or the byte-level library)
the answers; a token is trained where the hand-written table says so.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from model.chat import ChatTemplate, ConversationError, Encoded, Message, resolve_template
from model.tokenizer import Tokenizer
from tests.model.chat_bases import FOREIGN, NEEDS_QWEN, talk, write_bases

VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions. "
)
ALPACA = "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"

# For the conversation [system S] Q1 A1 Q2 A2: what is encoded between answers, what stands around an answer's text,
# and the end token. {S} and {Q} are the contents; an answer is `around` with the content in it.
WRITTEN: dict[str, dict[str, str]] = {
    "chimed": {"system": "{S}\n", "first": "[human]:{Q}\n[bot]:", "end": "eos"},
    "ziya": {"system": "{S}\n", "first": "<human>:{Q}\n<bot>:", "end": "eos"},
    "vicuna": {
        "bos": "yes",
        "no system": VICUNA,
        "system": "{S} ",
        "first": "USER: {Q} ASSISTANT:",
        "around": " {A}",
        "end": "eos",
    },
    "llama2": {
        "bos": "every turn",
        "system": "[INST] <<SYS>>\n{S}\n<</SYS>>\n\n",
        "no system": "[INST] ",
        "first": "{Q} [/INST]",
        "next": "[INST] {Q} [/INST]",
        "around": " {A} ",
        "end": "eos",
    },
    "llama3": {
        "bos": "yes",
        "system": "<|start_header_id|>system<|end_header_id|>\n\n{S}<|eot_id|>",
        "first": "<|start_header_id|>user<|end_header_id|>\n\n{Q}<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        "end": "<|eot_id|>",
    },
    "chatml": {
        "system": "<|im_start|>system\n{S}<|im_end|>\n",
        "first": "<|im_start|>user\n{Q}<|im_end|>\n<|im_start|>assistant\n",
        "next": "\n<|im_start|>user\n{Q}<|im_end|>\n<|im_start|>assistant\n",
        "end": "<|im_end|>",
    },
    "alpaca": {
        "bos": "yes",
        "no system": ALPACA,
        "system": "{S}\n\n",
        "first": "### Instruction:\n{Q}\n\n### Response:\n",
        "end": "eos",
    },
    "plain": {"system": "{S}\n", "first": "{Q}\n", "end": "eos"},
}
QUESTIONS = ["高血压病人，应当低盐饮食吗？", "  two spaces, 38.5 degrees\n\nand a line"]
ANSWERS = ["应及时就医，以免诱发心力衰竭。", "The patient took aspirin (100 mg) twice."]
SYSTEM = "你是医生。"


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_bases(tmp_path_factory.mktemp("chat"))


class Oracle:
    """Ids from transformers for prompts, and from the vocabulary's own library for answers."""

    def __init__(self, directory: Path) -> None:
        from transformers import AutoTokenizer

        self.auto = AutoTokenizer.from_pretrained(directory)
        model = directory / "tokenizer.model"
        self.processor = sentencepiece.SentencePieceProcessor(model_file=str(model)) if model.exists() else None

    def prompt(self, text: str) -> list[int]:
        return self.auto(text, add_special_tokens=False)["input_ids"]

    def answer(self, text: str) -> list[int]:
        if self.processor is None:
            return self.prompt(text)
        # A line break is one byte token that never merges: behind it SentencePiece is in the middle of a text.
        line = self.processor.encode("\n")
        ids = self.processor.encode("\n" + text)
        assert ids[: len(line)] == line
        return ids[len(line) :]


def written(name: str, oracle: Oracle, system: str | None, trims: bool) -> tuple[list[int], list[bool]]:
    """Ids and flags of the conversation, put together from the table above."""
    table = WRITTEN[name]
    bos, eos = oracle.auto.bos_token or "", oracle.auto.eos_token
    end = eos if table["end"] == "eos" else table["end"]
    [end_id] = oracle.prompt(end)
    ids: list[int] = []
    trained: list[bool] = []
    for turn, (question, answer) in enumerate(zip(QUESTIONS, ANSWERS, strict=True)):
        question = question.strip() if trims else question
        text = table["first"] if turn == 0 else table.get("next", table["first"])
        text = text.replace("{Q}", question)
        if turn == 0:
            text = (table.get("no system", "") if system is None else table["system"].replace("{S}", system)) + text
        if "bos" in table and (turn == 0 or table["bos"] == "every turn"):
            text = bos + text
        prompt = oracle.prompt(text) if turn == 0 else oracle.prompt(end + text)[1:]
        said = [*oracle.answer(table.get("around", "{A}").replace("{A}", answer)), end_id]
        ids += prompt + said
        trained += [False] * len(prompt) + [True] * len(said)
    return ids, trained


@pytest.mark.parametrize("system", [None, SYSTEM])
@pytest.mark.parametrize(
    ("base", "name"),
    [
        (base, name)
        for base in ("trained", "ziya", "qwen")
        for name in WRITTEN
        if base == "qwen" or name not in ("llama3", "chatml")
    ],
)
def test_ids_and_masks_are_what_is_written_down(
    base: str, name: str, system: str | None, bases: dict[str, Path]
) -> None:
    tokenizer = Tokenizer.load(bases[base])
    template = ChatTemplate.named(name, tokenizer)
    conversation = talk(QUESTIONS[0], ANSWERS[0], QUESTIONS[1], ANSWERS[1], system=system)
    encoded = template.encode(tokenizer, conversation)
    ids, trained = written(name, Oracle(bases[base]), system, trims=name in ("llama2", "llama3"))
    assert encoded.ids == ids
    assert encoded.trained == trained
    assert (encoded.dropped_turns, encoded.is_cut) == (0, False)


def templates_of(tokenizer: Tokenizer, base: str) -> dict[str, ChatTemplate]:
    """Every template that goes with a base, named and foreign."""
    names = [name for name in WRITTEN if base == "qwen" or name not in ("llama3", "chatml")]
    shapes = [shape for shape in FOREIGN if base == "qwen" or shape not in NEEDS_QWEN]
    templates = {name: ChatTemplate.named(name, tokenizer) for name in names}
    return templates | {shape: ChatTemplate(FOREIGN[shape], tokenizer.special_names, shape) for shape in shapes}


# Markers, halves of markers, whitespace that templates trim, private-use characters, thinking, Jinja.
HARD = ["</s>", "<s>", "<|im_end|>", "<|eot_id|>", "<human>", "<bot>", "[human]:", "\n[bot]:", "[/INST]", "ASSISTANT:"]
HARD += ["<|im_", "end|>", "</", "s>", " ", "\n", "\t", "\u2581", "\u3000", "\ue0000\ue001", "\x1d\ue0001\ue001\x1e"]
HARD += [
    "\ue000\ue001",
    "<think>\n",
    "\n</think>\n\n",
    "{{ eos_token }}",
    "{% raw %}",
    "高血压",
    "38.5",
    "e\u0301",
    "😀",
]
contents = st.lists(st.sampled_from(HARD) | st.text(max_size=3), max_size=5).map("".join)
# What generation writes for an answer; of the others, the answer itself.
SAID: dict[str, Callable[[str], str]] = {
    "vicuna": lambda answer: " " + answer,
    "macro": lambda answer: " " + answer,
    "llama2": lambda answer: f" {answer.strip()} ",
    "brackets": lambda answer: f" {answer.strip()} ",
    "llama3": str.strip,
    "date": str.strip,
}


@pytest.mark.parametrize("base", ["trained", "ziya", "metaspace", "qwen"])
def test_laws_hold_for_any_contents(base: str, bases: dict[str, Path]) -> None:
    tokenizer = Tokenizer.load(bases[base])
    templates = templates_of(tokenizer, base)
    special = {index for index, token in tokenizer.added_tokens.items() if token.special}
    # Not special in the base's files, but what these templates write themselves is theirs alone.
    turn_marks = {index for index, token in tokenizer.added_tokens.items() if token.content in ("<human>", "<bot>")}
    written = {
        (name, system is None): template.encode(tokenizer, talk("a", "b", "a", "b", system=system))
        for name, template in templates.items()
        for system in (None, "c")
    }

    @settings(max_examples=80, deadline=None)
    @given(st.lists(contents, min_size=4, max_size=4), st.none() | contents)
    def check(texts: list[str], system: str | None) -> None:
        conversation = talk(*texts, system=system)
        asked = [conversation[:index] for index, message in enumerate(conversation) if message.role == "assistant"]
        thinks = any("think>" in text or text.startswith("\n") for text in texts)
        for name, template in templates.items():
            if name == "thinking" and thinks:
                continue  # it takes contents apart: tests of its own
            ids, trained, *_ = template.encode(tokenizer, conversation)
            prompts = [template.encode_prompt(tokenizer, prompt) for prompt in asked]
            assert all(ids[: len(prompt)] == prompt for prompt in prompts)
            assert not any(trained[: len(prompts[0])])
            # No content has become a special token: there are those of the template, in its order.
            plain = written[name, system is None].ids
            marks = special | turn_marks if name in ("ziya", "added tokens") else special
            assert [token for token in ids if token in marks] == [token for token in plain if token in marks]
            end = template.end_ids(tokenizer)[0]
            said = "".join(
                "\0" if token == end else tokenizer.token_bytes(token).decode("latin-1")
                for token, is_trained in zip(ids, trained, strict=True)
                if is_trained
            )
            expected = [SAID.get(name, str)(text).replace("\0", "") for text in (texts[1], texts[3])]
            if name == "thinking":
                expected[1] = "<think>\n\n</think>\n\n" + expected[1]
            if base == "qwen":
                expected = [unicodedata.normalize("NFC", text) for text in expected]
            else:
                expected = [text.replace("\u2581", " ") for text in expected]
            if not any("\0" in text for text in texts):
                assert said.encode("latin-1").decode() == "".join(text + "\0" for text in expected), name

    check()


def test_a_template_that_takes_contents_apart_keeps_the_law_or_refuses(bases: dict[str, Path]) -> None:
    tokenizer = Tokenizer.load(bases["qwen"])
    template = ChatTemplate(FOREIGN["thinking"], tokenizer.special_names, "thinking")

    @settings(max_examples=80, deadline=None)
    @given(st.lists(contents | st.just("<think>\n甲\n</think>\n\n乙"), min_size=4, max_size=4))
    def check(texts: list[str]) -> None:
        try:
            ids, trained, *_ = template.encode(tokenizer, talk(*texts))
        except ConversationError as error:
            assert "(assistant)" in str(error) and any("think>" in text for text in texts)
            return
        prompts = [template.encode_prompt(tokenizer, talk(*texts[:k])) for k in (1, 3)]
        assert all(ids[: len(prompt)] == prompt for prompt in prompts)
        assert trained[len(prompts[0]) :].count(True) >= 2 and trained[-1]

    check()


def test_everything_behind_the_prompt_is_trained_also_thinking_that_the_template_puts_in(
    bases: dict[str, Path],
) -> None:
    tokenizer = Tokenizer.load(bases["qwen"])
    template = ChatTemplate(FOREIGN["thinking"], tokenizer.special_names, "thinking")
    for conversation in (talk("问", "乙"), talk("问", "甲", "再问", "乙"), talk("问", "\n\n乙")):
        ids, trained, *_ = template.encode(tokenizer, conversation)
        prompt = template.encode_prompt(tokenizer, conversation[:-1])
        thought = tokenizer.encode("<think>\n\n</think>\n\n", allow_special=True)
        assert ids[len(prompt) :] == [*thought, *tokenizer.encode("乙"), template.end_ids(tokenizer)[0]]
        assert all(trained[len(prompt) :])  # whoever generates has the prompt alone


def test_thinking_in_an_answer_is_trained(bases: dict[str, Path]) -> None:
    tokenizer = Tokenizer.load(bases["qwen"])
    template = ChatTemplate(FOREIGN["thinking"], tokenizer.special_names, "thinking")
    answer = "<think>\n想一想\n</think>\n\n乙"
    encoded = template.encode(tokenizer, talk("问", "<think>\n旧\n</think>\n\n甲", "再问", answer))
    said = [token for token, is_trained in zip(encoded.ids, encoded.trained, strict=True) if is_trained]
    end = template.end_ids(tokenizer)[0]
    assert said == [*tokenizer.encode("甲"), end, *tokenizer.encode(answer, allow_special=True), end]
    assert "旧" not in tokenizer.decode(encoded.ids)


def test_an_answer_alone_trains_its_end_token(bases: dict[str, Path]) -> None:
    for base in ("trained", "ziya", "metaspace", "qwen"):
        tokenizer = Tokenizer.load(bases[base])
        template = resolve_template("chimed", tokenizer)
        encoded = template.encode(tokenizer, [Message("user", ""), Message("assistant", "")])
        prompt = template.encode_prompt(tokenizer, [Message("user", "")])
        assert encoded == Encoded([*prompt, tokenizer.eos_id], [False] * len(prompt) + [True])
