"""The same strings and the same ids as transformers' `apply_chat_template`, for what we store and for foreign ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from model.chat import ChatTemplate, Conversation
from model.chat_templates import NAMED_TEMPLATES
from model.tokenizer import Tokenizer
from tests.model.chat_bases import FOREIGN, NEEDS_QWEN, talk, write_bases
from tests.model.tokenizer_bases import ENGLISH, sentences, write_json

ORDINARY = [text.strip() for text in (*sentences(5, 12), *ENGLISH, "血压120/80mmHg，体温38.5℃", "a\nb\n\nc", "好的")]
TRICKY = [
    "",
    " ",
    "\n\n x \n",
    "<b>&'\"</b>",
    "</s><|im_end|>",
    "{{ messages }}",
    "\ue0000\ue001",
    "😀\u3000é",
    "%d \\n",
]
NEEDS = {"chatml": "qwen", "llama3": "qwen"} | dict.fromkeys(NEEDS_QWEN, "qwen")


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_bases(tmp_path_factory.mktemp("chat"))


def conversations(texts: list[str]) -> list[Conversation]:
    """Of one to three turns, with and without a system message, complete and waiting for an answer."""
    found: list[Conversation] = []
    for start in range(len(texts)):
        said = [texts[(start + step) % len(texts)] for step in range(6)]
        found += [talk(*said[: 1 + start % 6]), talk(*said[: 6 - start % 6], system=said[5])]
    return found


def load(name: str, base: str, bases: dict[str, Path], directory: Path) -> tuple[Tokenizer, ChatTemplate, Any]:
    """A base saved with a template, as both libraries open it."""
    tokenizer = Tokenizer.load(bases[base])
    if name in NAMED_TEMPLATES:
        template = ChatTemplate.named(name, tokenizer)
    else:
        template = ChatTemplate(FOREIGN[name], tokenizer.special_names, name)
    template.store(tokenizer).save(directory)
    tokenizer = Tokenizer.load(directory)
    stored = ChatTemplate.of(tokenizer)
    assert stored is not None and stored.fingerprint == template.fingerprint
    return tokenizer, stored, AutoTokenizer.from_pretrained(directory)


def as_dicts(conversation: Conversation) -> list[dict[str, str]]:
    return [{"role": message.role, "content": message.content} for message in conversation]


CASES = [
    (name, base)
    for name in (*NAMED_TEMPLATES, *FOREIGN)
    for base in ("trained", "ziya", "metaspace", "qwen")
    if base == NEEDS.get(name, base)
]


@pytest.mark.parametrize(("name", "base"), CASES)
def test_strings_and_ids_are_those_of_transformers(
    name: str, base: str, bases: dict[str, Path], tmp_path: Path
) -> None:
    tokenizer, template, oracle = load(name, base, bases, tmp_path)
    for conversation in conversations(ORDINARY) + conversations(TRICKY):
        for add_generation_prompt in (False, True):
            expected = oracle.apply_chat_template(
                as_dicts(conversation), tokenize=False, add_generation_prompt=add_generation_prompt
            )
            assert template.render(conversation, add_generation_prompt) == expected
    for text in ORDINARY:
        for conversation in (talk(text), talk(text, system=ORDINARY[0])):
            expected = oracle.apply_chat_template(as_dicts(conversation), add_generation_prompt=True, return_dict=False)
            assert template.encode_prompt(tokenizer, conversation) == expected


@pytest.mark.parametrize("name", ["chatml", "llama3", "default system", "thinking", "date"])
def test_later_prompts_have_the_ids_of_transformers_where_tokens_bound_every_turn(
    name: str, bases: dict[str, Path], tmp_path: Path
) -> None:
    tokenizer, template, oracle = load(name, "qwen", bases, tmp_path)
    for start in range(len(ORDINARY) - 5):
        conversation = talk(*ORDINARY[start : start + 5])
        expected = oracle.apply_chat_template(as_dicts(conversation), add_generation_prompt=True, return_dict=False)
        assert template.encode_prompt(tokenizer, conversation) == expected


@pytest.mark.parametrize("form", ["file", "string", "list", "both"])
def test_every_place_of_a_template_is_read_as_transformers_reads_it(
    form: str, bases: dict[str, Path], tmp_path: Path
) -> None:
    tokenizer = Tokenizer.load(bases["trained"])
    tokenizer.save(tmp_path)
    chimed, plain = NAMED_TEMPLATES["chimed"].source, NAMED_TEMPLATES["plain"].source
    if form in ("file", "both"):
        (tmp_path / "chat_template.jinja").write_text(chimed)
    in_config = {
        "string": chimed,
        "list": [{"name": "rag", "template": plain}, {"name": "default", "template": chimed}],
        "both": plain,
    }
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    write_json(tmp_path / "tokenizer_config.json", {**config, "chat_template": in_config.get(form)})
    template = ChatTemplate.of(Tokenizer.load(tmp_path))
    assert template is not None and template.name == "chimed"
    expected = AutoTokenizer.from_pretrained(tmp_path).apply_chat_template(as_dicts(talk("问", "答")), tokenize=False)
    assert template.render(talk("问", "答")) == expected == "[human]:问\n[bot]:答</s>"


def test_a_saved_template_is_in_the_file_and_in_the_config(bases: dict[str, Path], tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(bases["trained"])
    template = ChatTemplate.named("ziya", tokenizer)
    stored = template.store(tokenizer)
    stored.save(tmp_path)
    assert ChatTemplate.of(tokenizer) is None  # what was given is left alone
    assert (tmp_path / "chat_template.jinja").read_text() == template.source
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["chat_template"] == template.source
    again = ChatTemplate.named("plain", tokenizer).store(Tokenizer.load(tmp_path))
    assert (found := ChatTemplate.of(again)) is not None and found.name == "plain"
    assert again.encode("血压") == tokenizer.encode("血压") and again.fingerprint == tokenizer.fingerprint
