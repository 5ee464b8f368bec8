"""The report on conversations: what was recognised, what is wrong and where, what a context costs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from engine.conversations import ConversationDataConfig, open_conversations
from engine.data.check_conversations import (
    ConversationReport,
    Counting,
    are_conversations,
    check_conversations,
    render_conversations,
)
from engine.data.conversation_files import ConversationOptions
from engine.data.shards import read_manifest
from engine.data.sources import ReadOptions
from model.chat import ChatTemplate
from model.errors import InputError
from model.tokenizer import Tokenizer
from tests.engine.data.dialogues import dialogues, prepare_records, write
from tests.ranks import PATIENCE

ROOT = Path(__file__).resolve().parents[3]
Q, A = "头疼怎么办？", "先休息。"
LONG = {"conversations": [text for turn in range(20) for text in (f"{turn}{Q}", A)]}
RECORDS: list[Any] = [
    {"question": Q, "answer": A},
    {"instruction": Q, "output": A},
    {"question": Q, "answer": "去看医生。"},
    {"messages": [{"role": "assistant", "content": A}]},
    LONG,
    {"conversations": ["甲", A, "乙"]},
    {"conversations": ["丙"]},
    {"question": "丁", "answer": ""},
    {"question": "戊", "answer": " "},
]


def report(paths: list[Path], encoding: Counting | None = None, **more: Any) -> ConversationReport:
    return check_conversations(list(map(str, paths)), ConversationOptions(), encoding, **more)


@pytest.fixture
def encoding(tokenizer: Tokenizer) -> Counting:
    return Counting(ChatTemplate.named("chimed", tokenizer), tokenizer, 64)


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "notes.md").write_text("x")
    return write(tmp_path / "raw" / "a.jsonl", RECORDS).parent


def test_what_is_there_is_counted(raw: Path) -> None:
    found = report([raw])
    assert (found.files, found.ignored_files, found.conversations) == (1, 1, 5)
    assert found.schemas == {"question = answer": 2, "Alpaca": 1, "conversations": 3}
    assert found.answers == {1: 4, 20: 1}
    assert (found.duplicates, found.repeated, found.unanswered) == (1, 1, 1)
    kept = [[Q, A], [Q, A], [Q, "去看医生。"], LONG["conversations"], ["甲", A]]
    assert found.lengths.tolist() == [sum(map(len, contents)) for contents in kept]
    assert found.characters == sum(found.lengths) and found.tokens is None


def test_faults_are_counted_by_reason_and_named_by_place(raw: Path) -> None:
    found = report([raw])
    assert found.faults == {
        "turn N is the assistant's; a conversation begins with the user's": 1,
        "it holds no answer": 1,
        "turn N (assistant) is empty": 2,
    }
    assert found.places["turn N (assistant) is empty"] == [
        f"{raw}/a.jsonl:8: turn 2 (assistant) is empty",
        f"{raw}/a.jsonl:9: turn 2 (assistant) is empty",
    ]
    page = render_conversations(found)
    assert "rejected       4\n               2 x turn 2 (assistant) is empty\n" in page
    assert f"  e.g. {raw}/a.jsonl:4: turn 1 is the assistant's" in page
    assert f"1 whose last question has no answer and is left out\n               e.g. {raw}/a.jsonl:6" in page
    with pytest.raises(InputError, match=r"a\.jsonl:4: turn 1 is the assistant's"):
        check_conversations([str(raw)], ConversationOptions(on_error="fail"))


def test_tokens_are_those_that_preparation_stores(tmp_path: Path, raw: Path, encoding: Counting) -> None:
    found = report([raw], encoding._replace(context=4096))
    prepared = prepare_records(tmp_path / "1", RECORDS, encoding.tokenizer, context=4096)
    manifest = read_manifest(prepared)
    assert (found.tokens, found.trained) == (manifest["tokens"], manifest["trained"])
    assert sum(found.lengths) == found.tokens
    assert (found.conversations, found.unanswered) == (manifest["documents"], manifest["unanswered"])


def test_what_a_context_costs_is_what_preparation_counts(tmp_path: Path, encoding: Counting) -> None:
    records = [*RECORDS, {"question": "己", "answer": A * 30}, {"question": Q * 30, "answer": A}]
    found = report([write(tmp_path / "a.jsonl", records)], encoding)
    manifest = read_manifest(prepare_records(tmp_path / "1", records, encoding.tokenizer, context=64))
    assert (found.shortened, found.dropped_turns, found.cut) == tuple(
        manifest[name] for name in ("shortened", "dropped_turns", "cut")
    )
    assert found.shortened == found.cut == 1 and found.dropped_turns > 10
    assert (found.conversations, found.faults.total()) == (manifest["documents"], manifest["rejected"])
    assert f"1 lose {found.dropped_turns} oldest turns at 64 tokens" in render_conversations(found, 64)


def test_a_sample_of_one_turn_and_one_of_several_show_their_trained_tokens(raw: Path, encoding: Counting) -> None:
    samples = report([raw], encoding).samples
    assert len(samples) == 2
    assert samples[0] == f"{raw}/a.jsonl:1\n[human]:{Q}\n[bot]:⟦{A}<eos>⟧"
    assert samples[1].startswith(f"{raw}/a.jsonl:5\n[human]:0{Q}\n[bot]:⟦{A}<eos>⟧[human]:1{Q}\n[bot]:⟦{A}<eos>⟧")
    assert "Length in tokens: median" in render_conversations(report([raw], encoding))


def test_held_out_questions_are_looked_for(tmp_path: Path, raw: Path, tokenizer: Tokenizer) -> None:
    records = [{"question": f" {Q}", "answer": "别的。"}, {"question": "庚", "answer": A}]
    other = write(tmp_path / "b.jsonl", records)
    prepared = prepare_records(tmp_path / "1", records, tokenizer)
    for held_out in (other, prepared):
        found = report([raw], held_out=[str(held_out)])
        assert (found.held_out, found.overlap) == (2, 1)
    assert "held out       2, 1 of them with a question to be trained on" in render_conversations(found)


def test_kinds_are_told_apart_by_the_first_records(tmp_path: Path, tokenizer: Tokenizer) -> None:
    options = ConversationOptions()
    prepared = prepare_records(tmp_path / "1", dialogues(2), tokenizer)
    (tmp_path / "a.txt").write_text(Q)
    for path, expected in (
        (write(tmp_path / "a.jsonl", [{"note": 1}, {"question": Q, "answer": A}]), True),
        (write(tmp_path / "b.jsonl", [{"text": Q}]), False),
        (write(tmp_path / "c.jsonl", ["一段文字"]), False),
        (tmp_path / "a.txt", False),
        (prepared, True),
    ):
        assert are_conversations([str(path)], options, ReadOptions()) == expected
    with pytest.raises(InputError, match="Check the raw files"):
        report([prepared])


def test_the_command_finds_conversations_by_itself(tmp_path: Path, raw: Path, tokenizer_directory: Path) -> None:
    def page(*words: str | Path) -> str:
        command = [sys.executable, str(ROOT / "tools" / "check_data.py"), *map(str, words)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
        assert done.returncode == 0, done.stderr
        return done.stdout

    found = page("--data", raw, "--model", tokenizer_directory, "--template", "vicuna", "--context", 512)
    assert "recognised     3 conversations, 2 question = answer, 1 Alpaca" in found
    assert "A chat between a curious user" in found and f"{A}<eos>⟧" in found
    named_as_for_training = page("--data", raw, "--model", tokenizer_directory, "--chat.template", "plain")
    assert f"{Q}\n⟦{A}<eos>⟧" in named_as_for_training
    odd = write(tmp_path / "odd.jsonl", [{"ctx": Q, "reply": A}])
    with pytest.raises(AssertionError, match=r'this record has "ctx", "reply"\. .*--data\.keys .*--data\.fields'):
        page("--data", odd)
    assert "recognised     1 --data.keys" in page("--data", odd, "--data.keys", "user=ctx", "assistant=reply")


def test_real_files_are_reported_as_they_are_prepared(real_data: Path, tmp_path: Path, encoding: Counting) -> None:
    path = str(real_data / "sft" / "sharegpt_medical_1k.jsonl")
    found = report([Path(path)], encoding._replace(context=512))
    config = ConversationDataConfig(paths=[path], workers=1)
    corpus = open_conversations(config, encoding.template, encoding.tokenizer, 512, tmp_path)
    manifest = corpus.store.prepared[0].manifest
    assert found.schemas == {"ShareGPT": 1000}
    assert (found.conversations, found.duplicates) == (1000, corpus.num_duplicates)
    assert (found.shortened, found.dropped_turns, found.cut) == tuple(
        manifest[name] for name in ("shortened", "dropped_turns", "cut")
    )
