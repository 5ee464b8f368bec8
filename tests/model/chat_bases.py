"""Tokenizers and templates that stand for those of downloaded chat models, made on the spot."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import AddedToken, pre_tokenizers
from tokenizers import Tokenizer as Backend

from model.chat import Message
from model.tokenizer import Tokenizer
from model.tokenizer_training import train_tokenizer
from tests.model.tokenizer_bases import sentences, write_json, write_llama, write_qwen

CHAT_TOKENS = ["<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|begin_of_text|>"]


def write_bases(folder: Path) -> dict[str, Path]:
    """Directories: `trained` here; `ziya`, with a dummy prefix and <human> and <bot>; `metaspace`, with a prefix at
    the start of a text only; `qwen`, byte-level, with chat tokens and a bos."""
    train_tokenizer(sentences(0, 400), folder / "trained", 480)
    Tokenizer.load(write_llama(folder / "llama")).save(folder / "ziya")
    _write_metaspace(folder / "ziya", folder / "metaspace")
    _write_chat_qwen(write_qwen(folder / "base"), folder / "qwen")
    return {name: folder / name for name in ("trained", "ziya", "metaspace", "qwen")}


def _write_metaspace(source: Path, directory: Path) -> None:
    backend = Backend.from_file(str(source / "tokenizer.json"))
    table = json.loads(backend.to_str())
    table["normalizer"] = None
    backend = Backend.from_str(json.dumps(table))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    directory.mkdir()
    backend.save(str(directory / "tokenizer.json"))
    config = json.loads((source / "tokenizer_config.json").read_text())
    write_json(directory / "tokenizer_config.json", {**config, "add_prefix_space": None})


def _write_chat_qwen(source: Path, directory: Path) -> None:
    backend = Backend.from_file(str(source / "tokenizer.json"))
    backend.add_special_tokens([AddedToken(name, normalized=False) for name in CHAT_TOKENS])
    backend.add_tokens([AddedToken("</think>", normalized=False)])
    directory.mkdir()
    backend.save(str(directory / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}
    config |= {"pad_token": "<|endoftext|>", "bos_token": "<|begin_of_text|>"}
    write_json(directory / "tokenizer_config.json", {**config, "add_bos_token": False})


def talk(*contents: str, system: str | None = None) -> list[Message]:
    """A conversation of these contents, the user beginning."""
    roles = ("user", "assistant")
    messages = [Message(roles[index % 2], content) for index, content in enumerate(contents)]  # type: ignore[arg-type]
    return [*([Message("system", system)] if system is not None else []), *messages]


# Shapes of templates that bases bring along, each with what makes its family hard.
FOREIGN = {
    # a system message of its own where none is given, and a look at tools
    "default system": (
        "{%- if tools is not none or documents is not none %}tools{%- endif %}\n"
        "{%- if messages[0]['role'] == 'system' %}\n"
        "    {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}\n"
        "{%- else %}\n"
        "    {{- '<|im_start|>system\\nYou help patients.<|im_end|>\\n' }}\n"
        "{%- endif %}\n"
        "{%- for message in messages %}\n"
        "    {%- if message.role == 'user' or (message.role == 'system' and not loop.first)"
        " or message.role == 'assistant' and not message.tool_calls %}\n"
        "        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}\n"
        "    {%- endif %}\n"
        "{%- endfor %}\n"
        "{%- if add_generation_prompt %}\n"
        "    {{- '<|im_start|>assistant\\n' }}\n"
        "{%- endif %}\n"
    ),
    # thinking: an empty block before the last answer, and what was thought before is left out of the history
    "thinking": (
        "{%- set ns = namespace(last=0) %}\n"
        "{%- for message in messages[::-1] %}\n"
        "    {%- set index = (messages | length - 1) - loop.index0 %}\n"
        "    {%- if message.role == 'user' and ns.last == 0 %}{% set ns.last = index %}{% endif %}\n"
        "{%- endfor %}\n"
        "{%- for message in messages %}\n"
        "    {%- if message.role != 'assistant' %}\n"
        "        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}\n"
        "    {%- else %}\n"
        "        {%- set content = message.content %}\n"
        "        {%- set thought = '' %}\n"
        "        {%- if '</think>' in content %}\n"
        "            {%- set thought = content.split('</think>')[0].split('<think>')[-1].strip('\\n') %}\n"
        "            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}\n"
        "        {%- endif %}\n"
        "        {{- '<|im_start|>assistant\\n' }}\n"
        "        {%- if loop.index0 > ns.last and (loop.last or thought) %}\n"
        "            {{- '<think>\\n' + thought.strip('\\n') + '\\n</think>\\n\\n' + content.lstrip('\\n') }}\n"
        "        {%- else %}\n"
        "            {{- content }}\n"
        "        {%- endif %}\n"
        "        {{- '<|im_end|>\\n' }}\n"
        "    {%- endif %}\n"
        "{%- endfor %}\n"
        "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
    ),
    # a date in the system message, contents trimmed, blocks for the assistant's mask
    "date": (
        "{{- bos_token }}\n"
        "{%- if not date_string is defined %}\n"
        "    {%- if strftime_now is defined %}{%- set date_string = strftime_now('%d %b %Y') %}\n"
        "    {%- else %}{%- set date_string = '26 Jul 2024' %}{%- endif %}\n"
        "{%- endif %}\n"
        "{%- if messages[0]['role'] == 'system' %}\n"
        "    {%- set system = messages[0]['content'] | trim %}\n"
        "    {%- set messages = messages[1:] %}\n"
        "{%- else %}{%- set system = '' %}{%- endif %}\n"
        "{{- '<|start_header_id|>system<|end_header_id|>\\n\\nToday: ' + date_string + '\\n\\n' }}\n"
        "{{- system + '<|eot_id|>' }}\n"
        "{%- for message in messages %}\n"
        "    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}\n"
        "    {%- if message['role'] == 'assistant' %}\n"
        "        {%- generation %}{{- message['content'] | trim + '<|eot_id|>' }}{%- endgeneration %}\n"
        "    {%- else %}{{- message['content'] | trim + '<|eot_id|>' }}{%- endif %}\n"
        "{%- endfor %}\n"
        "{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}\n"
    ),
    # the system message inside the first question, a space on both sides of an answer, roles are checked
    "brackets": (
        "{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}{% set rest = messages[1:] %}"
        "{% else %}{% set rest = messages %}{% endif %}"
        "{% for message in rest %}"
        "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
        "{% if loop.first and system is defined %}"
        "{% set content = '<<SYS>>\\n' + system.strip() + '\\n<</SYS>>\\n\\n' + message['content'] %}"
        "{% else %}{% set content = message['content'] %}{% endif %}"
        "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
        "{% else %}{{ ' '  + content.strip() + ' ' + eos_token }}{% endif %}"
        "{% endfor %}"
    ),
    # bos once, a space before an answer and none behind, written with loop controls and macros
    "macro": (
        "{%- macro quoted(text) -%}[INST] {{ text }}[/INST]{%- endmacro -%}\n"
        "{{- bos_token }}\n"
        "{%- for message in messages %}\n"
        "    {%- if message.role == 'system' %}{{- message.content + '\\n\\n' }}{%- continue %}{%- endif %}\n"
        "    {%- if message.role == 'user' %}{{- quoted(message.content) }}\n"
        "    {%- else %}{{- ' ' + message.content + eos_token }}{%- endif %}\n"
        "{%- endfor %}"
    ),
    # markers that are plain text for this tokenizer, whitespace of the template itself in the output
    "plain markers": (
        "{% for message in messages %}\n"
        "    {% if message['role'] == 'user' %}\n{{ '<|user|>\n' + message['content'] + eos_token }}\n"
        "{% elif message['role'] == 'system' %}\n{{ '<|system|>\n' + message['content'] + eos_token }}\n"
        "{% elif message['role'] == 'assistant' %}\n{{ '<|assistant|>\n'  + message['content'] + eos_token }}\n"
        "{% endif %}\n"
        "{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n"
        "{% endfor %}"
    ),
    # an added token that is not special opens every turn
    "added tokens": (
        "{% for m in messages %}{% if m['role'] == 'user' %}<human>{{ m['content'] }}"
        "{% elif m['role'] == 'assistant' %}<bot>{{ m['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<bot>{% endif %}"
    ),
}
# Written for a tokenizer that has <|im_start|> and its kind.
NEEDS_QWEN = {"default system", "thinking", "date"}
