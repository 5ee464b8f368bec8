"""tools/chat.py: answers through a pipe, Ctrl-C, and files of answers that survive being killed."""

from __future__ import annotations

import functools
import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from engine.chatting import DISCLAIMER
from engine.data.conversations import parse_conversation
from engine.terminal_chat import _noted_interrupts
from model.generate import Generator
from tests.ranks import PATIENCE
from tests.tools.in_child import Ended, hold_generation, run_tool, start_tool
from tests.tools.small_chat import chat, end_answers_at, read_from, transformers_answer, write_small_chat_model

GREEDY = ("--sampling.temperature", 0, "--sampling.max_new_tokens", 24)
QUESTIONS = ("头晕怎么办？", "咳嗽两周了，需要做什么检查？")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory with a model that ends some of its answers, and one that ends none."""
    folder = tmp_path_factory.mktemp("chat")
    write_small_chat_model(folder / "endless")
    end_answers_at(Path(shutil.copytree(folder / "endless", folder / "model")), 47, 88)
    return folder


# A conversation


def test_a_pipe_reads_answers_alone_and_they_are_those_of_transformers(folder: Path) -> None:
    ended = chat(folder, ["/system 你是医生。", *QUESTIONS, "/reset", "/system", QUESTIONS[0]], *GREEDY)
    assert ended.code == 0, ended.stderr
    expected, messages = [], [{"role": "system", "content": "你是医生。"}]
    for question in QUESTIONS:
        messages.append({"role": "user", "content": question})
        expected.append(transformers_answer(folder / "model", messages, 24))
        messages.append({"role": "assistant", "content": expected[-1]})
    expected.append(transformers_answer(folder / "model", [{"role": "user", "content": QUESTIONS[0]}], 24))
    assert ended.stdout == "".join(f"{answer}\n" for answer in expected)
    assert len(set(expected)) == 3
    assert ended.stderr.count(DISCLAIMER) == 1
    assert ended.stderr.count("tokens/s") == 3


def test_commands_change_the_conversation_and_mistakes_in_them_do_not_end_it(folder: Path) -> None:
    lines = ["/set temperature=0 max_new_tokens=5", QUESTIONS[0], "/save said.json", "/save said.json", "/sytem x"]
    lines += ["/set temprature=1", "/set top_p=2", "/set top_p", "/load nothing.json"]
    lines += ["/reset", "/load said.json", QUESTIONS[1]]
    ended = chat(folder, [*lines, "/save both.json", "/quit", "never asked"])
    assert ended.code == 0, ended.stderr
    first, second = (json.loads((folder / name).read_text()) for name in ("said.json", "both.json"))
    assert [message["content"] for message in first["messages"]] == [QUESTIONS[0], ended.stdout.splitlines()[0]]
    assert second["messages"][:2] == first["messages"] and len(second["messages"]) == 4
    assert len(parse_conversation(second)) == 4, "what is saved can be trained on"
    assert ended.stdout == f"{second['messages'][1]['content']}\n{second['messages'][3]['content']}\n"
    for sentence in (
        "said.json exists, and nothing is overwritten. Choose another name.",
        "/sytem is not a command. Did you mean /system?",
        "/set temprature: there is no such option.",
        "sampling option top_p is 2.0; give a number above 0 and at most 1.",
        "nothing.json: cannot be read (No such file or directory). Check the path.",
        "/set top_p needs a value, as in /set top_p=0.9.",
        "What was said is forgotten.",
    ):
        assert sentence in ended.stderr


def test_no_file_and_no_name_of_one_ends_a_conversation(folder: Path) -> None:
    (folder / "deep.json").write_text("[" * 100_000)
    lines = [
        "/system 你是医生。",
        "/save nothing.json",
        "/load deep.json",
        "/load a\0b",
        QUESTIONS[0],
        "/save a\0b",
    ]
    ended = chat(folder, lines, *GREEDY)
    assert ended.code == 0, ended.stderr
    assert "Nothing was said yet that could be saved. Ask first." in ended.stderr
    assert not (folder / "nothing.json").exists()
    assert "deep.json: no conversation (maximum recursion depth exceeded" in ended.stderr
    assert "a\0b: no conversation (embedded null byte)" in ended.stderr
    assert "a\0b: cannot be written (embedded null byte)" in ended.stderr


def read_in_two_encodings() -> None:
    """Stdin from a file that is UTF-8 but for its first line."""
    Path("lines").write_bytes(f"{QUESTIONS[0]}\n".encode("gbk") + f"{QUESTIONS[0]}\n".encode())
    read_from("lines")


def test_a_question_that_is_not_utf8_is_not_answered(folder: Path) -> None:
    ended = chat(folder, [], *GREEDY, before=read_in_two_encodings)
    assert ended.code == 0, ended.stderr
    assert "This line is not UTF-8, and is left out. Set the terminal to UTF-8" in ended.stderr
    assert ended.stdout == chat(folder, [QUESTIONS[0]], *GREEDY).stdout


def close_the_pipe(name: str) -> None:
    """Stdin from a file, and stdout to somebody who has left."""
    read_from(name)
    reader, writer = os.pipe()
    os.close(reader)
    sys.stdout = open(writer, "w")  # noqa: SIM115


def test_a_reader_that_leaves_ends_the_conversation_without_a_word(folder: Path) -> None:
    ended = chat(folder, QUESTIONS, *GREEDY, before=functools.partial(close_the_pipe, "lines"))
    assert ended.code == 141
    assert "Traceback" not in ended.stderr and "Broken pipe" not in ended.stderr


def test_turns_that_are_left_out_are_said_once(folder: Path) -> None:
    lines = [f"{number} " + "头晕" * 20 for number in range(9)]
    ended = chat(folder, lines, *GREEDY)
    assert ended.code == 0, ended.stderr
    assert len(ended.stdout.splitlines()) >= 9
    assert ended.stderr.count("The context is full: from here on the oldest turns are left out.") == 1


def read_slowly(name: str) -> None:
    """Stdin from a file, and a tenth of a second for every token."""
    read_from(name)
    step = Generator.step

    def slowly(self: Generator) -> list:
        time.sleep(0.1)
        return step(self)

    Generator.step = slowly  # type: ignore[method-assign]


def interrupt_reading() -> None:
    """Ctrl-C while a question is waited for."""

    sys.stdin = mock.MagicMock(isatty=lambda: False, __iter__=mock.Mock(side_effect=KeyboardInterrupt))


def wait_for(condition: Callable[[], Any], what: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.01)


def size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def test_ctrl_c_stops_an_answer_and_the_chat_goes_on(folder: Path) -> None:
    (folder / "lines").write_text("头晕怎么办？\n/save after.json\n咳嗽呢？\n")
    words = ("--model", "endless", "--sampling.temperature", 0, "--sampling.max_new_tokens", 200)
    running = start_tool("chat", *words, cwd=folder, before=functools.partial(read_slowly, "lines"))
    stdout = max(folder.glob(".said-*"), key=lambda path: int(path.name[6:])) / "stdout-0"
    wait_for(lambda: size(stdout) > 3, "no answer came")
    running.signal(0, signal.SIGINT)
    wait_for(lambda: running.stderr().count("tokens/s") == 1, "the answer went on")
    first = stdout.read_text()
    wait_for(lambda: size(stdout) > len(first.encode()) + 3, "the second question was not answered")
    running.signal(0, signal.SIGINT)
    (ended,) = running.wait()
    assert ended.code == 0, ended.stderr
    assert ended.stderr.count("tokens/s, stopped]") == 2
    saved = json.loads((folder / "after.json").read_text())["messages"]
    assert [message["content"] for message in saved] == ["头晕怎么办？", first.removesuffix("\n")]


def test_a_second_ctrl_c_leaves() -> None:
    earlier = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), _noted_interrupts() as is_interrupted:
        assert not is_interrupted()
        signal.raise_signal(signal.SIGINT)
        assert is_interrupted()
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is earlier


def test_ctrl_c_between_answers_leaves(folder: Path) -> None:
    ended = chat(folder, [], before=interrupt_reading)
    assert (ended.code, ended.stdout) == (130, "")
    assert "Traceback" not in ended.stderr


# A file of questions

RECORDS = [
    "头晕怎么办？",
    {"question": "孩子发热39℃怎么办？", "answer": "参考答案", "id": "q-7"},
    {"instruction": "给出建议", "input": "血压150/95", "output": "参考"},
    {"messages": [{"role": "system", "content": "你是医生。"}, {"role": "user", "content": "咳嗽"}]},
    {"conversations": [{"from": "human", "value": "胃痛"}, {"from": "gpt", "value": "多久了？"}] * 2, "source": "甲"},
    {"query": "还要吃药吗？", "history": [["我有高血压", "请按时服药。"]]},
]
PROMPTS = [
    [("user", "头晕怎么办？")],
    [("user", "孩子发热39℃怎么办？")],
    [("user", "给出建议\n血压150/95")],
    [("system", "你是医生。"), ("user", "咳嗽")],
    [("user", "胃痛"), ("assistant", "多久了？"), ("user", "胃痛")],
    [("user", "我有高血压"), ("assistant", "请按时服药。"), ("user", "还要吃药吗？")],
]


def write_lines(path: Path, records: list) -> None:
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))


def answers(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def batch(folder: Path, *words: object) -> Ended:
    (ended,) = run_tool("chat", "--model", "model", *words, cwd=folder)
    return ended


def test_any_record_is_answered_as_transformers_would_and_keeps_its_fields(folder: Path) -> None:
    write_lines(folder / "in.jsonl", RECORDS)
    ended = batch(folder, "--input", "in.jsonl", "--output", "out/greedy.jsonl", *GREEDY, "--max_rows", 4)
    assert ended.code == 0, ended.stderr
    assert ended.stdout == "out/greedy.jsonl: 6 answers written\n"
    found = answers(folder / "out" / "greedy.jsonl")
    assert [row["line"] for row in found] == [1, 2, 3, 4, 5, 6]
    for row, prompt in zip(found, PROMPTS, strict=True):
        messages = [{"role": role, "content": content} for role, content in prompt]
        assert row["answer"] == transformers_answer(folder / "model", messages, 24)
        assert row["tokens"] == 24 or row["end_reason"] == "stop"
        assert row["logprob"] < 0
    assert {row["end_reason"] for row in found} == {"stop", "length"}
    assert (found[1]["id"], found[1]["given"]) == ("q-7", {"answer": "参考答案"})
    assert found[4]["source"] == "甲" and "given" not in found[4]
    assert found[0]["prompt"] == "头晕怎么办？"


def test_samples_differ_and_do_not_depend_on_the_other_lines(folder: Path) -> None:
    write_lines(folder / "in.jsonl", [{"question": f"患者{n}，头晕？"} for n in range(8)])
    words = ("--samples", 3, "--sampling.max_new_tokens", 10, "--seed", 5)
    assert batch(folder, "--input", "in.jsonl", "--output", "three.jsonl", *words).code == 0
    found = answers(folder / "three.jsonl")
    assert [(row["line"], row["sample"]) for row in found] == [(line, n) for line in range(1, 9) for n in range(3)]
    assert len({row["answer"] for row in found}) > 16
    write_lines(folder / "in.jsonl", [{"question": f"患者{n}，头晕？"} if n == 4 else 1 for n in range(8)])
    assert batch(folder, "--input", "in.jsonl", "--output", "alone.jsonl", *words).code == 0
    alone = answers(folder / "alone.jsonl")
    assert [row["answer"] for row in alone] == [row["answer"] for row in found if row["line"] == 5]
    assert [row["logprob"] for row in alone] == pytest.approx([r["logprob"] for r in found if r["line"] == 5], abs=1e-4)


def test_records_that_are_no_questions_are_named_by_line_and_counted(folder: Path) -> None:
    lines = [
        '"头晕？"',
        '{"question": "咳',
        '{"text": "一段文本"}',
        "",
        '"' + "长" * 300 + '"',
        '{"question": "咳嗽？", "note": "\\ud83d"}',
    ]
    (folder / "mixed.jsonl").write_text("\n".join(lines))
    ended = batch(folder, "--input", "mixed.jsonl", "--output", "mixed-out.jsonl", *GREEDY)
    assert ended.code == 0, ended.stderr
    found = answers(folder / "mixed-out.jsonl")
    assert [row["line"] for row in found] == [1, 6]
    assert found[1]["note"] == "\ud83d", "fields come back as they were"
    assert "mixed.jsonl:2: left out: broken JSON" in ended.stderr
    assert 'mixed.jsonl:3: left out: no conversation is known by these fields; this record has "text"' in ended.stderr
    assert "mixed.jsonl:5: left out: its last question takes" in ended.stderr
    assert "3 records of mixed.jsonl were left out." in ended.stderr


KILLED = ("--input", "many.jsonl", "--max_rows", 2, "--samples", 2, "--sampling.max_new_tokens", 8)


def many_questions(folder: Path) -> bytes:
    """40 questions in two groups, and what a run that nothing interrupts makes of them."""
    write_lines(folder / "many.jsonl", [{"question": f"患者{n}，{'头晕' * (n % 7)}怎么办？"} for n in range(40)])
    if not (folder / "whole.jsonl").exists():
        assert batch(folder, *KILLED, "--output", "whole.jsonl").code == 0
    return (folder / "whole.jsonl").read_bytes()


def test_a_run_that_is_killed_again_and_again_writes_the_same_bytes(folder: Path) -> None:
    whole = many_questions(folder)
    assert whole.count(b"\n") == 80
    chance, kills, out = random.Random(3), 0, folder / "killed.jsonl"
    for _ in range(30):
        until = size(out) + chance.randrange(1, len(whole) // 3)
        # It goes on for some lines, and then waits to be killed.
        before = functools.partial(hold_generation, out.name, until + len(whole) // 20, "never")
        words = ("--model", "model", *KILLED, "--output", out.name)
        running = start_tool("chat", *words, cwd=folder, before=before)
        process = running.processes[0]
        wait_for(lambda: size(out) >= until or not process.is_alive(), "no line came")  # noqa: B023
        process.kill()
        (ended,) = running.wait()
        assert whole.startswith(out.read_bytes()), "lines are added, never changed"
        if ended.code == 0:
            break
        assert ended.code == -signal.SIGKILL
        kills += 1
    assert kills >= 2
    assert out.read_bytes() == whole
    ended = batch(folder, *KILLED, "--output", "killed.jsonl")
    assert (ended.code, ended.stdout) == (0, "killed.jsonl: 0 answers written\n")
    assert out.read_bytes() == whole


@pytest.mark.parametrize("kept", [5_000, -1])
def test_a_torn_line_is_written_anew(folder: Path, kept: int) -> None:
    whole = many_questions(folder)
    (folder / "torn.jsonl").write_bytes(whole[:kept])
    (folder / "torn.jsonl.meta.json").write_bytes((folder / "whole.jsonl.meta.json").read_bytes())
    assert batch(folder, *KILLED, "--output", "torn.jsonl").code == 0
    assert (folder / "torn.jsonl").read_bytes() == whole


def test_answers_go_into_a_file_and_nothing_else(folder: Path) -> None:
    write_lines(folder / "asked.jsonl", RECORDS)
    os.mkfifo(folder / "fifo")
    ended = batch(folder, "--input", "asked.jsonl", "--output", "fifo")
    assert ended.code == 2 and "--output fifo is no file that could be gone on with." in ended.last_line
    assert not (folder / "fifo.meta.json").exists()


def test_only_one_process_writes_a_file(folder: Path) -> None:
    many_questions(folder)
    words = ("--model", "model", *KILLED, "--output", "twice.jsonl")
    before = functools.partial(hold_generation, "twice.jsonl", 1, "refused")
    first = start_tool("chat", *words, cwd=folder, before=before)
    wait_for(lambda: size(folder / "twice.jsonl"), "no line came")
    (second,) = run_tool("chat", *words, cwd=folder)
    (folder / "refused").touch()
    (ended,) = first.wait()
    assert ended.code == 0
    assert second.code == 2 and "another process is writing it. Wait for it" in second.last_line
