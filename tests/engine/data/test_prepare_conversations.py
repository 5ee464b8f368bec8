"""Files of conversations to shards in which the trained tokens are marked."""

from __future__ import annotations

import gzip
import io
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.data.conversation_files import ConversationOptions, read_conversations
from engine.data.conversations import conversation_hash
from engine.data.corpus import Corpus, open_corpus
from engine.data.encoders import ChatEncoder
from engine.data.prepare import Progress, preparation_key, prepare
from engine.data.shards import TRAINED, read_manifest
from model.chat import ChatTemplate, Message
from model.errors import InputError
from model.tokenizer import Tokenizer
from tests.engine.data.dialogues import chat_encoder, dialogues, prepare_records, write
from tests.engine.data.test_prepare import same_content

ROOT = Path(__file__).resolve().parents[3]
Q, A = "头疼怎么办？", "先休息。"


def messages(record: dict[str, Any]) -> list[Message]:
    return [
        Message("user" if turn["from"] == "human" else "assistant", turn["value"]) for turn in record["conversations"]
    ]


def opened(directory: Path) -> Corpus:
    return open_corpus([directory], kind="conversations")


def rejects(directory: Path) -> list[tuple[str, int, str]]:
    lines = [json.loads(line) for line in (directory / "rejects.jsonl").read_text().splitlines()]
    return [(Path(line["file"]).name, line["line"], line["reason"]) for line in lines]


def trained_texts(ids: np.ndarray, tokenizer: Tokenizer) -> list[str]:
    """Runs of trained tokens, each decoded."""
    is_trained = ids >= TRAINED
    bounds = np.flatnonzero(np.diff(is_trained.astype(int), prepend=0, append=0))
    return [tokenizer.decode((ids[a:b] % TRAINED).tolist()) for a, b in zip(bounds[::2], bounds[1::2], strict=True)]


# What is stored


def test_trained_are_the_answers_with_their_end_tokens_and_nothing_else(tmp_path: Path, tokenizer: Tokenizer) -> None:
    records = dialogues(40)
    corpus = opened(prepare_records(tmp_path / "1", records, tokenizer, context=4096))
    assert len(corpus.store) == 40
    for document, record in enumerate(records):
        ids = corpus.read(document)
        assert ids.dtype == np.uint32
        answers = [turn["value"] for turn in record["conversations"] if turn["from"] == "gpt"]
        assert trained_texts(ids, tokenizer) == [f"{answer}</s>" for answer in answers]
        assert tokenizer.decode((ids % TRAINED).tolist()) == "".join(
            f"[human]:{turn['value']}\n[bot]:" if turn["from"] == "human" else f"{turn['value']}</s>"
            for turn in record["conversations"]
        )
    manifest = read_manifest(tmp_path / "1" / "prepared")
    assert manifest["kind"] == "conversations"
    assert manifest["trained"] == sum(int((corpus.read(document) >= TRAINED).sum()) for document in range(40))
    assert manifest["answers"] == sum(len(record["conversations"]) // 2 for record in records)
    assert corpus.store.hashes(0, 40).tobytes() == b"".join(conversation_hash(messages(record)) for record in records)


def test_what_exceeds_the_context_is_left_out_turn_by_turn_and_counted(tmp_path: Path, tokenizer: Tokenizer) -> None:
    def record(*contents: str) -> dict[str, Any]:
        return {
            "messages": [
                {"role": ("user", "assistant")[place % 2], "content": text} for place, text in enumerate(contents)
            ]
        }

    long = "低盐饮食" * 30
    records = [
        record(Q, A),
        record(Q, long, Q, A),
        record("甲" + Q, A, Q, long),
        record("乙" + long, A),
        record("丙", A, "丁"),
    ]
    directory = prepare_records(tmp_path / "1", records, tokenizer, context=40)
    corpus = opened(directory)
    manifest = read_manifest(directory)
    found = {
        name: manifest[name] for name in ("documents", "answers", "unanswered", "shortened", "dropped_turns", "cut")
    }
    assert found == {"documents": 4, "answers": 4, "unanswered": 1, "shortened": 2, "dropped_turns": 2, "cut": 1}
    assert [len(corpus.read(document)) <= 40 for document in range(4)] == [True] * 4
    assert trained_texts(corpus.read(1), tokenizer) == [f"{A}</s>"]
    (cut,) = trained_texts(corpus.read(2), tokenizer)
    assert long.startswith(cut) and len(corpus.read(2)) == 40  # no end token is invented
    assert trained_texts(corpus.read(3), tokenizer) == [f"{A}</s>"]
    ((_, line, reason),) = rejects(directory)
    assert line == 4 and "its last question takes" in reason


def test_two_workers_write_the_same_bytes_as_one(tmp_path: Path, tokenizer: Tokenizer) -> None:
    raw = write(tmp_path / "a.jsonl", [*dialogues(150), {"note": 1}, *dialogues(150, seed=1)])
    table = tmp_path / "b.json"
    table.write_text(json.dumps([{"question": f"{n}{Q}", "answer": A} for n in range(200)]))
    encoder, options = chat_encoder(tokenizer), ConversationOptions(system="你是医生。")
    whole = prepare([raw, table], encoder, tmp_path / "1", options, workers=1, unit_bytes=8000)
    other = prepare([raw, table], encoder, tmp_path / "2", options, workers=2, unit_bytes=8000)
    assert len(read_manifest(whole)["units"]) > 10
    assert same_content(whole, other)
    assert opened(whole).num_documents == 500


KILLED = """
import sys, threading
from engine.data import prepare as module
from engine.data.conversation_files import ConversationOptions
from engine.data.encoders import ChatEncoder
from model.chat import ChatTemplate
from model.tokenizer import Tokenizer
tokenizer = Tokenizer.load(sys.argv[2])
encoder = ChatEncoder(ChatTemplate.named("chimed", tokenizer), tokenizer, 128)
module.merge_index = lambda *_: threading.Event().wait()  # no kill, however late, comes after the end
module.prepare([sys.argv[1]], encoder, sys.argv[3], ConversationOptions(), workers=2, unit_bytes=8000)
"""


def test_killed_inside_a_preparation_the_result_is_the_same_to_the_byte(
    tmp_path: Path, tokenizer: Tokenizer, tokenizer_directory: Path
) -> None:
    raw = write(tmp_path / "a.jsonl", [*dialogues(200), {"note": 1}])
    encoder = chat_encoder(tokenizer)
    unbroken = prepare([raw], encoder, tmp_path / "unbroken", ConversationOptions(), workers=1, unit_bytes=8000)
    units = len(read_manifest(unbroken)["units"])
    assert units > 8
    out = tmp_path / "out"
    command = [sys.executable, "-c", KILLED, str(raw), str(tokenizer_directory), str(out)]
    process = subprocess.Popen(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)})
    while len(list((out / "units").glob("[0-9]*.json"))) < 3 and process.poll() is None:
        time.sleep(0.002)
    time.sleep(random.Random(0).random() * 0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    resumed: list[Progress] = []
    prepare([raw], encoder, out, ConversationOptions(), workers=1, unit_bytes=8000, progress=resumed.append)
    assert resumed[-1].resumed > 0
    assert same_content(unbroken, out)


def test_the_key_changes_with_all_that_changes_what_is_stored(tmp_path: Path, tokenizer: Tokenizer) -> None:
    raw = write(tmp_path / "a.jsonl", dialogues(3))
    encoder = chat_encoder(tokenizer)
    keys = {
        preparation_key([raw], encoder, ConversationOptions()),
        preparation_key([raw], chat_encoder(tokenizer, context=64), ConversationOptions()),
        preparation_key([raw], chat_encoder(tokenizer, template="vicuna"), ConversationOptions()),
        preparation_key([raw], encoder, ConversationOptions(system="你是医生。")),
        preparation_key([raw], encoder, ConversationOptions(keys={"user": "a", "assistant": "b"})),
        preparation_key([raw], encoder, ConversationOptions(newlines="unix")),
        preparation_key([raw], tokenizer),
    }
    assert len(keys) == 7
    assert preparation_key([raw], chat_encoder(tokenizer), ConversationOptions()) in keys


def test_workers_do_without_torch() -> None:
    code = "import engine.data.worker, engine.data.encoders, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


# What is read


def test_the_default_system_prompt_serves_conversations_without_one(tmp_path: Path) -> None:
    raw = write(tmp_path / "a.jsonl", [{"question": Q, "answer": A}, {"system": "别的。", "question": Q, "answer": A}])
    prompts = [found[0].content for found in read_conversations([raw], ConversationOptions(system="你是医生。"))]
    assert prompts == ["你是医生。", "别的。"]
    assert [found[0].role for found in read_conversations([raw])] == ["user", "system"]


def table(separator: str) -> str:
    return (
        f"department{separator}title{separator}ask{separator}answer\n内科{separator}头疼{separator}{Q}{separator}{A}\n"
    )


def parquet() -> bytes:
    import pyarrow
    import pyarrow.parquet

    sink = io.BytesIO()
    turns = [[{"from": "human", "value": f"头疼\n{Q}"}, {"from": "gpt", "value": A}]]
    pyarrow.parquet.write_table(pyarrow.table({"id": [1], "conversations": turns}), sink)
    return sink.getvalue()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", lambda: table(",").encode("gbk")),
        ("a.tsv", lambda: table("\t").encode("gb18030")),
        ("a.json", lambda: json.dumps([{"instruction": "头疼", "input": Q, "output": A}]).encode()),
        ("a.jsonl.gz", lambda: gzip.compress(json.dumps({"prompt": f"头疼\n{Q}", "output": [A]}).encode("utf-8-sig"))),
        ("a.parquet", parquet),
    ],
)
def test_every_kind_of_file_is_read(tmp_path: Path, name: str, content: Any) -> None:
    (tmp_path / name).write_bytes(content())
    assert list(read_conversations([tmp_path])) == [[Message("user", f"头疼\n{Q}"), Message("assistant", A)]]


def test_faults_are_kept_with_their_lines(tmp_path: Path, tokenizer: Tokenizer) -> None:
    good = {"question": Q, "answer": A}
    (tmp_path / "a.csv").write_bytes(f'question,answer\n"{Q}\n",{A}\n{Q},\n'.encode("gbk"))
    lines = [
        good,
        {"messages": [{"role": "tool", "content": "x"}]},
        good,
        {"question": Q},
        {"question": "\0", "answer": A},
    ]
    write(
        tmp_path / "b.jsonl",
        [*lines, {"question": "\ud800", "answer": A}, {"messages": [{"role": "user", "content": Q}]}],
    )
    encoder = chat_encoder(tokenizer)
    directory = prepare([tmp_path], encoder, tmp_path / "out", ConversationOptions(), workers=1, unit_bytes=150)
    assert rejects(directory) == [
        ("a.csv", 4, "turn 2 (assistant) is empty"),
        ("b.jsonl", 2, "turn 1 is a tool's, which is not trained on"),
        ("b.jsonl", 4, 'no conversation is known by these fields; this record has "question"'),
        ("b.jsonl", 5, "message 1 (user): the text holds NUL"),
        ("b.jsonl", 6, "message 1 (user): character 1 of the text is half a surrogate pair"),
        ("b.jsonl", 7, "it holds no answer"),
    ]
    with pytest.raises(InputError, match=r"a\.csv:4: turn 2 \(assistant\) is empty\. Mend"):
        prepare([tmp_path], encoder, tmp_path / "2", ConversationOptions(on_error="fail"), workers=1)


def test_a_conversation_that_the_template_refuses_costs_no_other(tmp_path: Path, tokenizer: Tokenizer) -> None:
    source = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system prompts') }}{% endif %}"
        "{{ m.content }}{% if m.role == 'assistant' %}{{ eos_token }}{% else %}:{% endif %}{% endfor %}"
    )
    template = ChatTemplate(source, tokenizer.special_names, "own.jinja")
    raw = write(tmp_path / "a.jsonl", [{"question": Q, "answer": A}, {"system": "x", "question": Q, "answer": A}])
    encoder = ChatEncoder(template, tokenizer, 64)
    directory = prepare([raw], encoder, tmp_path / "out", ConversationOptions(), workers=1)
    assert read_manifest(directory)["documents"] == 1
    ((_, line, reason),) = rejects(directory)
    assert line == 2 and "no system prompts" in reason


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"keys": {"usr": "a", "assistant": "b"}}, "--data.keys usr=a: usr is none of user, assistant"),
        ({"keys": {"user": "a"}}, "--data.keys needs user=FIELD and assistant=FIELD, or turns=FIELD"),
        ({"keys": {"user": "a+", "assistant": "b"}}, "--data.keys user=a+: a field's name is missing"),
        ({"system": " "}, "--data.system is empty"),
    ],
)
def test_options_that_mean_nothing_are_refused(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InputError) as caught:
        ConversationOptions(**options)
    assert sentence in str(caught.value)


def test_texts_are_no_conversations(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("高血压患者应低盐饮食。")
    with pytest.raises(InputError, match=r"a\.txt: a text has no turns .* with tools/pretrain\.py"):
        list(read_conversations([tmp_path / "a.txt"]))
    write(tmp_path / "b.jsonl", [{"text": "高血压患者应低盐饮食。"}])
    with pytest.raises(
        InputError, match=r"b\.jsonl:1: no conversation .* tools/pretrain\.py\. Say what its fields mean"
    ):
        list(read_conversations([tmp_path / "b.jsonl"]))


# Real files


@pytest.mark.parametrize(
    ("name", "keys", "expected"),
    [
        ("sft/alpaca_medical_8k.jsonl", {}, 8658),
        ("sft/sharegpt_medical_1k.jsonl", {}, 1000),
        ("sft/toyhom_gbk.csv", {}, 7644),
        ("sft/multiturn_history.json", {}, 1144),
        ("sft/context_target_7k.jsonl", {"user": "context", "assistant": "target"}, 7622),
        ("qa/huatuo26m_test.json", {}, 6000),
    ],
)
def test_every_record_of_real_files_is_a_conversation(
    real_data: Path, name: str, keys: dict[str, str], expected: int
) -> None:
    options = ConversationOptions(keys=keys, on_error="fail")
    assert sum(found[-1].role == "assistant" for found in read_conversations([real_data / name], options)) == expected
