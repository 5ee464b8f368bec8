"""What users get wrong with conversations and fine-tuning: one mistake a row of docs/errors.md.

Each is played in the folder of `mistakes.py`, where there are also a base of a longer context, conversations, a recipe
and a finished run of four steps.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.tools.mistakes import Mistake, pretrain_new

HELLO = "头晕怎么办？"
ADVICE = "注意休息。"
GOOD = {"messages": [{"role": "user", "content": HELLO}, {"role": "assistant", "content": ADVICE}]}
OWN = "{% for message in messages %}{{ message['role'] + ':' + message['content'] + eos_token }}{% endfor %}"
OWN += "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"


def sft(*words: object, **how: Any) -> Mistake:
    """A run by the recipe in the folder, with these words behind it."""
    return Mistake("sft", ("--config", "sft.yaml", *words), **how)


def sft_new(*words: object, **how: Any) -> Mistake:
    """The same, into a fresh directory."""
    return sft("--out", "new", *words, **how)


def records(*rows: object) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def sft_on(*rows: object, words: tuple[object, ...] = ()) -> Mistake:
    """A run on these records, which ends at the first that is no conversation."""
    return sft_new("--data", "mine.jsonl", "--data.on_error", "fail", *words, spoil={"mine.jsonl": records(*rows)})


def sft_with_template(source: str | bytes, *words: object) -> Mistake:
    return sft_new("--chat.template", "mine.jinja", *words, spoil={"mine.jinja": source})


def store_a_template(folder: Path) -> None:
    (folder / "chat-base" / "chat_template.jinja").write_text(OWN)


SCHEMAS = {
    "records of no known schema": sft_on({"题目": HELLO, "解析": ADVICE}),
    "--data.keys names fields that are not there": sft_on(
        {"题目": HELLO, "解析": ADVICE}, words=("--data.keys", "user=ask", "assistant=answer")
    ),
    "--data.keys without name=value": sft_new("--data.keys", "ask", "answer"),
    "--data.keys maps what there is not": sft_new("--data.keys", "patient=ask", "assistant=answer"),
    "--data.keys without the answer": sft_new("--data.keys", "user=ask"),
    "a role that is not known": sft_on(GOOD, {"messages": [{"role": "narrator", "content": HELLO}]}),
    "a conversation without an answer": sft_on(GOOD, {"messages": GOOD["messages"][:1]}),
    "a conversation that the assistant begins": sft_on(GOOD, {"messages": GOOD["messages"][::-1]}),
    "an empty message": sft_on(GOOD, {"messages": [GOOD["messages"][0], {"role": "assistant", "content": ""}]}),
    "a multiple-choice question": sft_on({"question": HELLO, "A": "是", "B": "否", "answer": "A"}),
    "a conversation with tools": sft_on(GOOD, {**GOOD, "tools": [{"name": "search"}]}),
    "a question that leaves no room for its answer": sft_on(
        {"messages": [{"role": "user", "content": HELLO * 20}, GOOD["messages"][1]]}
    ),
    "texts given to fine-tuning": sft_new("--data", "data.jsonl"),
    "a text file given to fine-tuning": sft_new("--data", "book.txt", spoil={"book.txt": HELLO * 10}),
    "conversations given to pre-training": pretrain_new("--data", "chats.jsonl"),
    "texts that are prepared, given to fine-tuning": sft_new("--model", "base", "--data", "prepared"),
    "conversations in another encoding than --data.encoding says": sft_new(
        *("--data", "mine.csv", "--data.encoding", "utf-8"),
        spoil={"mine.csv": f"ask,answer\n{HELLO},{ADVICE}\n".encode("gbk")},
    ),
    "an empty system prompt": sft_new("--data.system", ""),
}

CHAT = {
    "a chat template that does not exist": sft_new("--chat.template", "vicunna"),
    "a template's file that is not there": sft_new("--chat.template", "mine.jinja"),
    "a template that is not Jinja": sft_with_template("{% for message in messages %}{{ message.content }}"),
    "a template without an end token": sft_with_template(OWN.replace(" + eos_token", "")),
    "a template that leaves the answer out": sft_with_template("{{ messages[0]['content'] }}{{ eos_token }}"),
    "another template than the base's": sft_new("--chat.template", "vicuna", spoil=store_a_template),
    "a template whose tokens the base does not have": sft_new("--chat.template", "chatml"),
}

TUNING = {
    "nothing has been pre-trained": Mistake("sft", ()),
    "a preset to fine-tune": sft_new("--model", "7b"),
    "a base to fine-tune that nobody has trained yet": sft_new("--model", "notes", spoil={"notes/prepared/x": ""}),
    "a base to fine-tune that its run has not finished": sft_new("--model", "run", spoil={"run/MODEL_COMPLETE": None}),
    "a base to fine-tune whose weights are cut short": sft_new(spoil={"chat-base/model.safetensors": 1000}),
    "a base to fine-tune without a tokenizer": sft_new(spoil={"chat-base/*token*": None}),
    "fewer conversations than a step takes": sft_new("--train.batch_tokens", 102_400),
    "all questions are held out": sft_new("--eval.data", "chats.jsonl"),
    "noise that is not positive": sft_new("--train.neftune_alpha", -5),
    "no epoch": sft_new("--train.epochs", 0),
    "a held-out share of 1": sft_new("--eval.fraction", 1),
    "the checkpoint in --out is of another template": sft("--chat.template", "vicuna"),
    "the checkpoint in --out is of another job": sft(
        "--model", "base", "--out", "run", "--train.micro_batch_tokens", 64
    ),
    "the checkpoint in --out was tuned on other conversations": sft(
        "--data", "mine.jsonl", spoil={"mine.jsonl": records(*[{"q": f"{n}{HELLO}", "a": ADVICE} for n in range(99)])}
    ),
}

MISTAKES_SFT: dict[str, Mistake] = {**SCHEMAS, **CHAT, **TUNING}
