"""What users get wrong in pre-training: one mistake a row of docs/errors.md.

Each is played in a folder with a base, data, tokenizers, prepared data and a finished run of four steps.
"""

from __future__ import annotations

import ctypes
import functools
import gzip
import os
import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file

from tests.small_base import write_small_data

NOT_PERMITTED = 77
"""Exit code of a process that could not set its scene."""

# By file name or pattern: what it holds from now on; or, a number, how many of its bytes stay; or None, it goes.
Spoiled = Mapping[str, str | bytes | int | None]


class Mistake(NamedTuple):
    """What is spoiled, and the command that meets it.

    before: runs in the tool's process first.
    """

    tool: str
    words: tuple[object, ...]
    spoil: Spoiled | Callable[[Path], None] | None = None
    world: int = 1
    before: Callable[[], None] | None = None

    def set_up(self, folder: Path) -> None:
        """Spoil what is to be spoiled."""
        if callable(self.spoil):
            return self.spoil(folder)
        for pattern, content in (self.spoil or {}).items():
            for path in list(folder.glob(pattern)) or [folder / pattern]:
                if content is None:
                    path.unlink()
                elif isinstance(content, int):
                    os.truncate(path, content)
                else:
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_bytes(content.encode() if isinstance(content, str) else content)


def pretrain(*words: object, **how: Any) -> Mistake:
    """A run by the recipe in the folder, with these words behind it."""
    return Mistake("pretrain", ("--config", "recipe.yaml", *words), **how)


def pretrain_new(*words: object, **how: Any) -> Mistake:
    """The same, into a fresh directory."""
    return pretrain("--out", "new", *words, **how)


def recipe(text: str) -> Mistake:
    """A run by a recipe of one's own."""
    return Mistake("pretrain", ("--config", "mine.yaml"), {"mine.yaml": text})


def prepare(*words: object, **how: Any) -> Mistake:
    return Mistake("prepare", ("--data", "data.jsonl", "--tokenizer", "base", *words), **how)


def train_tokenizer(*words: object, **how: Any) -> Mistake:
    return Mistake("train_tokenizer", ("--data", "data.jsonl", "--out", "new", *words), **how)


def hide_wandb() -> None:
    sys.modules["wandb"] = None  # type: ignore[assignment]


def break_third_record(folder: Path) -> None:
    lines = (folder / "data.jsonl").read_text().splitlines()
    lines[2] = lines[2][:-1]
    (folder / "broken.jsonl").write_text("\n".join(lines))


def cut_compressed_data(folder: Path) -> None:
    packed = gzip.compress((folder / "data.jsonl").read_bytes())
    (folder / "data.jsonl.gz").write_bytes(packed[: len(packed) // 2])


def write_more_data(folder: Path) -> None:
    write_small_data(folder / "more.jsonl", 300)


def remove_a_part(folder: Path) -> None:
    shutil.rmtree(folder / "parts" / "part-00002-of-00002")


def flip_a_bit(folder: Path) -> None:
    (shard,) = (folder / "prepared").glob("tokens/*.bin")
    content = bytearray(shard.read_bytes())
    content[1000] ^= 1
    shard.write_bytes(content)


def pickle_a_path(folder: Path) -> None:
    weights = folder / "base" / "model.safetensors"
    torch.save({"weights": load_file(weights), "when": Path("now")}, weights.with_name("pytorch_model.bin"))
    weights.unlink()


def remove_a_tensor(folder: Path) -> None:
    path = folder / "base" / "model.safetensors"
    save_file({name: tensor for name, tensor in load_file(path).items() if name != "model.norm.weight"}, path)


def widen_a_tensor(folder: Path) -> None:
    path = folder / "base" / "model.safetensors"
    save_file({**load_file(path), "model.norm.weight": torch.ones(25)}, path)


def make_sealed(folder: Path) -> None:
    (folder / "sealed").mkdir()


def copy_run(folder: Path) -> None:
    shutil.copytree(folder / "run", folder / "small")


def mount(target: bytes, flags: int) -> None:
    """A small filesystem that this process alone sees."""
    libc = ctypes.CDLL(None, use_errno=True)
    new_mounts, private = 0x00020000, 0x00040000 | 0x4000
    if libc.unshare(new_mounts) or libc.mount(b"none", b"/", None, private, None):
        os._exit(NOT_PERMITTED)
    if libc.mount(b"tmpfs", target, b"tmpfs", flags, b"size=8m"):
        os._exit(NOT_PERMITTED)


def seal() -> None:
    """A filesystem that may only be read."""
    mount(b"sealed", flags=1)


def leave_room(size: int) -> None:
    """The finished run, on a filesystem that is full but for `size` bytes."""
    shutil.copytree("small", "copy")
    mount(b"small", flags=0)
    shutil.copytree("copy", "small", dirs_exist_ok=True)
    status = os.statvfs("small")
    Path("small", "filler").write_bytes(b"0" * (status.f_bavail * status.f_bsize - size))


leave_no_room = functools.partial(leave_room, 0)
leave_little_room = functools.partial(leave_room, 100_000)  # enough for metrics, not for a checkpoint of 241 kB

FRESH = ("--model", "tiny", "--train.context", 32)
NOTE = "患者因头晕就诊，诊断为高血压。"

OPTIONS = {
    "an option that does not exist": pretrain("--train.step", 4),
    "the beginning of an option's name": pretrain("--dat", "data.jsonl"),
    "a value of the wrong type": pretrain("--train.steps", "many"),
    "a value that is none of the choices": pretrain("--train.precision", "fp16"),
    "8-bit products of sizes that are no multiples of 16": pretrain_new("--train.fp8"),
    "an option without its value": pretrain("--train.steps"),
    "a list without a value, such as a variable of the shell that is not set": pretrain_new("--data"),
    "no data at all": pretrain_new("--data", "[]"),
    "a word that belongs to no option": Mistake("pretrain", ("data.jsonl",)),
    "a number out of its range": pretrain("--checkpoint.keep", 0),
    "a data option out of its range": pretrain("--data.min_characters", 0),
    "a share above 1": pretrain("--schedule.warmup_ratio", 1.5),
    "a learning rate that is not positive": pretrain("--optim.lr", 0),
    "an unknown name in a recipe": recipe("train:\n  stepps: 4\n"),
    "a value of the wrong type in a recipe": recipe("train:\n  steps: many\n"),
    "a recipe that is not YAML": recipe("train:\n  steps: [4\nout: run\n"),
    "a recipe that is no mapping": recipe("- train\n- steps\n"),
    "a recipe that does not exist": Mistake("pretrain", ("--config", "mine.yaml")),
    "wandb is asked for and not installed": pretrain("--log.wandb", "project", before=hide_wandb),
}

DATA = {
    "a data file that does not exist": pretrain_new("--data", "dota.jsonl"),
    "a folder without a readable file": pretrain_new("--data", "texts", spoil={"texts/notes.docx": ""}),
    "a kind of file that is not read": pretrain_new("--data", "notes.docx", spoil={"notes.docx": ""}),
    "an empty file": pretrain("--data", "empty.jsonl", spoil={"empty.jsonl": ""}),
    "no text to train a tokenizer on": pretrain_new(*FRESH, "--data", "empty.txt", spoil={"empty.txt": "\n\n"}),
    "a binary file under a text's name": pretrain("--data", "book.txt", spoil={"book.txt": b"\x01\x00\x02\x00"}),
    "a document of an office program under a text's name": pretrain(
        "--data", "book.txt", spoil={"book.txt": b"PK\x03\x04" + b"\x00" * 100}
    ),
    "a broken record, with --data.on_error fail": pretrain(
        "--data", "broken.jsonl", "--data.on_error", "fail", spoil=break_third_record
    ),
    "a broken table row, with --data.on_error fail": pretrain(
        "--data", "notes.csv", "--data.on_error", "fail", spoil={"notes.csv": f"id,text\n1,{NOTE}\n2,咳嗽,发热\n"}
    ),
    "records without a text field": pretrain(
        "--data", "notes.jsonl", spoil={"notes.jsonl": f'{{"id": 1, "note": "{NOTE}"}}\n'}
    ),
    "--data.fields names a field that is not there": pretrain("--data.fields", "title", "text"),
    "a list of records without an end": pretrain(
        "--data", "notes.json", spoil={"notes.json": f'[\n{{"text": "{NOTE}"}},\n{{"text": "患者因'}
    ),
    "bytes that are of no known encoding": pretrain(
        "--data", "book.txt", spoil={"book.txt": "患者因头晕就诊".encode() + b"\xff\xfe\xff"}
    ),
    "another encoding than --data.encoding says": pretrain(
        *("--data", "book.txt", "--data.encoding", "utf-8", "--data.on_error", "fail"),
        spoil={"book.txt": NOTE.encode("gb18030")},
    ),
    "a compressed file that is cut short": pretrain("--data", "data.jsonl.gz", spoil=cut_compressed_data),
    "a file that is Parquet by name only": pretrain("--data", "notes.parquet", spoil={"notes.parquet": NOTE}),
    "one file named twice": pretrain("--data", "data.jsonl", "./data.jsonl"),
    "more or fewer weights than sources": pretrain("--data.weights", 1, 0.5),
    "a weight that is not positive": pretrain("--data.weights", -1),
    "all training documents are held out": pretrain_new("--eval.data", "data.jsonl"),
    "too few tokens for one step": pretrain_new("--train.batch_tokens", 64_000),
}

PREPARED = {
    "prepared data beside raw files": pretrain_new("--data", "prepared", "data.jsonl"),
    "data prepared with another tokenizer": pretrain_new("--data", "prepared-otherwise"),
    "a prepared shard that is cut short": pretrain_new("--data", "prepared", spoil={"prepared/tokens/*.bin": 1000}),
    "a prepared shard that has changed, found by tools/check_data.py --verify": Mistake(
        "check_data", ("--data", "prepared", "--verify"), flip_a_bit
    ),
    "a part of prepared data is missing": pretrain_new("--data", "parts", spoil=remove_a_part),
    "a part of prepared data is listed twice": pretrain_new("--data", "parts", "parts/part-00001-of-00002"),
    "a preparation that has not ended": pretrain_new("--data", "prepared", spoil={"prepared/prepared.json": None}),
    "--part outside of its range": prepare("--out", "parts", "--part", "3/2"),
    "--part that is no part": prepare("--out", "parts", "--part", "first"),
    "--out of tools/prepare.py holds other data": prepare(
        "--data", "more.jsonl", "--out", "prepared", spoil=write_more_data
    ),
}

TOKENIZER = {
    "a tokenizer that is not there": Mistake("prepare", ("--data", "data.jsonl", "--out", "new")),
    "a damaged tokenizer.model": pretrain_new(
        *(*FRESH, "--tokenizer", "large"), spoil={"large/tokenizer.json": None, "large/tokenizer.model": b"\x00" * 100}
    ),
    "a damaged tokenizer.json": pretrain_new(*FRESH, "--tokenizer", "large", spoil={"large/tokenizer.json": 1000}),
    "more ids than the model has rows": pretrain_new("--tokenizer", "large", spoil={"base/*token*": None}),
    "another tokenizer than the base's": pretrain_new("--tokenizer", "little"),
    "a base without a tokenizer": pretrain_new(spoil={"base/*token*": None}),
    "a vocabulary larger than the text supports": train_tokenizer("--vocab_size", 100_000),
    "a vocabulary smaller than the text's characters": train_tokenizer("--vocab_size", 270),
    "a tokenizer or a model that is extended in its place": train_tokenizer(
        *("--extend", "base", "--model", "base", "--out", "base", "--vocab_size", 500)
    ),
    "--out of a tokenizer holds a model": train_tokenizer("--out", "wide"),
    "--out of a tokenizer holds another one": train_tokenizer("--out", "large", "--vocab_size", 480),
    "--extend with a base that has no tokenizer.model": train_tokenizer(
        "--extend", "base", spoil={"base/tokenizer.model": None}
    ),
}

MODEL = {
    "a model that is neither preset nor directory": pretrain_new("--model", "7B"),
    "a model directory without config.json": pretrain_new(spoil={"base/config.json": None}),
    "a config.json that is not JSON": pretrain_new(spoil={"base/config.json": 100}),
    "an architecture that is not of the LLaMA family": pretrain_new(spoil={"base/config.json": '{"model_type": "t5"}'}),
    "a model that its run has not finished": pretrain_new("--model", "run", spoil={"run/MODEL_COMPLETE": None}),
    "a file of a finished run's model is cut short": pretrain_new(
        "--model", "run", spoil={"run/model.safetensors": 1000}
    ),
    "a safetensors file that is cut short": pretrain_new(spoil={"base/model.safetensors": 1000}),
    "a model directory without weights": pretrain_new(spoil={"base/model.safetensors": None}),
    "a .bin file that holds more than tensors": pretrain_new(spoil=pickle_a_path),
    "a tensor is missing in a model directory": pretrain_new(spoil=remove_a_tensor),
    "a tensor of another shape in a model directory": pretrain_new(spoil=widen_a_tensor),
}

SIZES = {
    "a context longer than the model's": pretrain_new("--train.context", 64),
    "a context longer than a preset's": pretrain_new("--model", "tiny", "--train.context", 4096),
    "a micro-batch that cannot hold the context": pretrain_new("--train.micro_batch_tokens", 16),
    "a step that is no multiple of the micro-batch": pretrain_new("--train.batch_tokens", 250),
    "more processes than micro-batches in a step": pretrain_new("--train.batch_tokens", 64, world=2),
    "replicas that do not divide the processes": pretrain_new("--parallel.replicas", 2),
}

RUNS = {
    "--out lies below a file": pretrain("--out", "data.jsonl/run"),
    "--out is on a read-only filesystem": pretrain("--out", "sealed/run", spoil=make_sealed, before=seal),
    "--out is the model that training begins from": pretrain("--out", "base"),
    "--out is the tokenizer that is trained with": pretrain(*FRESH, "--tokenizer", "large", "--out", "large"),
    "--out holds a model that no run has left": pretrain("--out", "wide"),
    "--out holds a tokenizer": pretrain("--out", "large"),
    "the checkpoint in --out is of another model": pretrain("--model", "wide"),
    "the checkpoint in --out was trained on other data": pretrain("--data", "more.jsonl", spoil=write_more_data),
    "the checkpoint in --out was trained with another seed": pretrain("--seed", 1),
    "the checkpoint in --out was trained with other batches": pretrain("--train.batch_tokens", 512),
    "the checkpoint in --out has more steps than asked for": pretrain("--train.steps", 3),
    "a shard of the checkpoint is cut short": pretrain(spoil={"run/state/step-00000004/*.safetensors": 1000}),
    "a file of the checkpoint is missing": pretrain(spoil={"run/state/step-00000004/trainer.json": None}),
    "the disk is full when a checkpoint is written": pretrain(
        "--out", "small", "--train.steps", 6, spoil=copy_run, before=leave_little_room
    ),
    "the disk is full when metrics are written": pretrain(
        "--out", "small", "--train.steps", 6, spoil=copy_run, before=leave_no_room
    ),
}

MISTAKES: dict[str, Mistake] = {**OPTIONS, **DATA, **PREPARED, **TOKENIZER, **MODEL, **SIZES, **RUNS}
