"""Every row of docs/errors.md, played: the sentence that is printed, the exit code, and that nothing is lost."""

from __future__ import annotations

import dataclasses
import re
import shutil
from pathlib import Path

import pytest
import torch

from model.config import parameter_shapes
from model.hf import load_config, write_model
from model.tokenizer import Tokenizer
from model.tokenizer_training import train_sentencepiece
from tests.rlhf.planted import write_comparisons
from tests.small_adapter import write_small_adapter
from tests.small_base import small_texts
from tests.tools.in_child import run_tool
from tests.tools.mistakes import MISTAKES, MODEL, NOT_PERMITTED, prepare, pretrain, pretrain_new, train_tokenizer
from tests.tools.mistakes_adapters import MISTAKES_ADAPTERS
from tests.tools.mistakes_attitudes import MISTAKES_ATTITUDES
from tests.tools.mistakes_choice import MISTAKES_CHOICE
from tests.tools.mistakes_contamination import MISTAKES_CONTAMINATION
from tests.tools.mistakes_entities import MISTAKES_ENTITIES
from tests.tools.mistakes_evaluation import MISTAKES_EVALUATION
from tests.tools.mistakes_generation import MISTAKES_GENERATION
from tests.tools.mistakes_lora import MISTAKES_LORA
from tests.tools.mistakes_ppo import MISTAKES_PPO, ppo
from tests.tools.mistakes_preferences import MISTAKES_PREFERENCES
from tests.tools.mistakes_rejection import MISTAKES_REJECTION, dpo, rejection
from tests.tools.mistakes_rm import MISTAKES_RM, rm, rm_new
from tests.tools.mistakes_rollout import MISTAKES_ROLLOUT
from tests.tools.mistakes_scaling import MISTAKES_SCALING
from tests.tools.mistakes_serve import MISTAKES_SERVE
from tests.tools.mistakes_sft import MISTAKES_SFT, sft, sft_new
from tests.tools.mistakes_tools import MISTAKES_TOOLS
from tests.tools.small_job import write_small_job
from tests.tools.small_sft import write_small_sft_job

GROUPS = (
    MISTAKES,
    MISTAKES_SFT,
    MISTAKES_PREFERENCES,
    MISTAKES_RM,
    MISTAKES_ROLLOUT,
    MISTAKES_PPO,
    MISTAKES_REJECTION,
    MISTAKES_TOOLS,
    MISTAKES_SCALING,
    MISTAKES_SERVE,
    MISTAKES_ADAPTERS,
    MISTAKES_LORA,
    MISTAKES_EVALUATION,
    MISTAKES_CHOICE,
    MISTAKES_ENTITIES,
    MISTAKES_GENERATION,
    MISTAKES_ATTITUDES,
    MISTAKES_CONTAMINATION,
)
PLAYED = {situation: mistake for group in GROUPS for situation, mistake in group.items()}
# Found before a run directory is made, let alone data prepared in it.
WRITES_NOTHING = (
    "no data at all",
    "a list without a value, such as a variable of the shell that is not set",
    "a base to fine-tune that nobody has trained yet",
    "a data file that does not exist",
    "a folder without a readable file",
    "a kind of file that is not read",
    *MODEL,
    "more ids than the model has rows",
    "another tokenizer than the base's",
    "a base without a tokenizer",
    "a base to fine-tune without a tokenizer",
    "a base to fine-tune whose weights are cut short",
)
MISSING = "dota.jsonl"
READ = {  # every option of a job that names files
    "pretrain --eval.data": pretrain_new("--eval.data", MISSING),
    "sft --data": sft_new("--data", MISSING),
    "sft --eval.data": sft_new("--eval.data", MISSING),
    "rm --data": rm_new("--data", MISSING),
    "rm --eval.data": rm_new("--eval.data", MISSING),
    "rm --normalise.data": rm_new("--normalise.data", MISSING),
    "dpo --data": dpo("--data", MISSING),
    "dpo --eval.data": dpo("--eval.data", MISSING),
    "ppo --data": ppo("--data", MISSING),
    "ppo --eval.data": ppo("--eval.data", MISSING),
    "ppo --ptx.paths": ppo("--ptx.paths", MISSING, "--ptx.coef", 1),
    "rejection --data": rejection("--data", MISSING),
    "rejection --eval.data": rejection("--eval.data", MISSING),
    "prepare --data": prepare("--data", MISSING, "--out", "new"),
    "train_tokenizer --data": train_tokenizer("--data", MISSING),
}
PAGE = Path(__file__).resolve().parents[2] / "docs" / "errors.md"


def page_rows() -> dict[str, str]:
    """What is printed, by situation."""
    lines = [line.strip("| ").split(" | ") for line in PAGE.read_text(encoding="utf-8").splitlines()]
    rows = [cells for cells in lines if len(cells) == 3 and cells[1].startswith("`")]
    assert len(rows) == len({situation for situation, _, _ in rows}), "a situation stands there twice"
    return {situation: printed.strip("`") for situation, printed, _ in rows}


def contents(folder: Path) -> dict[str, bytes]:
    """Every file and what is in it, but for what processes said."""
    files = (path for path in folder.rglob("*") if path.is_file() and not path.parent.name.startswith(".said"))
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Bases, data, tokenizers, prepared data and finished runs, for each mistake to copy and spoil."""
    folder = tmp_path_factory.mktemp("template")
    write_small_job(folder)
    write_small_sft_job(folder, base="chat-base", out="tuned")
    write_comparisons(folder / "compared.jsonl", 40, 3)
    wide = dataclasses.replace(load_config(folder / "base"), intermediate_size=64)
    shapes = parameter_shapes(wide)
    shutil.copytree(folder / "base", folder / "wide")
    write_model(folder / "wide", wide, ((name, torch.ones(shape)) for name, shape in shapes.items()), torch.float32)
    write_small_adapter(folder / "adapter", folder / "base")
    stands_on = folder / "adapter" / "adapter_config.json"
    stands_on.write_text(stands_on.read_text().replace(str(folder / "base"), "base"))
    for name, size in (("large", 480), ("little", 390)):
        model = train_sentencepiece(small_texts(), size, is_limit_soft=True)
        Tokenizer.from_sentencepiece(model, {}).save(folder / name)
    for command in (
        pretrain(),
        prepare("--out", "prepared"),
        prepare("--out", "prepared-otherwise", "--tokenizer", "large"),
        prepare("--out", "parts", "--part", "1/2"),
        prepare("--out", "parts", "--part", "2/2"),
        sft(),
        rm("--out", "judge"),
        sft("--out", "adapted", "--lora.rank", 2),
    ):
        (ended,) = run_tool(command.tool, *command.words, cwd=folder)
        assert ended.code == 0, ended.stderr
    return folder


def test_every_row_of_the_page_is_played_and_every_mistake_has_a_row() -> None:
    assert sorted(page_rows()) == sorted(PLAYED)
    assert len(MISTAKES) >= 30 and len(MISTAKES_SFT) >= 15
    assert len(PLAYED) == sum(map(len, GROUPS)), "a situation is played twice"


def test_every_sentence_says_what_was_found_and_then_what_to_do() -> None:
    finding_and_remedy = re.compile(r"\S.+?[.:;)] \S.+[.?]")
    assert [printed for printed in page_rows().values() if not finding_and_remedy.fullmatch(printed)] == []


@pytest.mark.parametrize("situation", PLAYED)
def test_a_mistake_ends_with_one_sentence_and_loses_nothing(template: Path, tmp_path: Path, situation: str) -> None:
    folder = tmp_path / "work"
    shutil.copytree(template, folder)
    mistake = PLAYED[situation]
    mistake.set_up(folder)
    earlier = contents(folder)
    ends = run_tool(mistake.tool, *mistake.words, cwd=folder, world=mistake.world, before=mistake.before)
    if ends[0].code == NOT_PERMITTED:
        pytest.skip("mounting a filesystem is not permitted here")
    sentence = re.compile(".+".join(map(re.escape, page_rows()[situation].split("…"))))
    for ended in ends:
        assert ended.code == 2, ended.stderr
        assert sentence.fullmatch(ended.last_line), ended.last_line
        assert sum(bool(sentence.search(line)) for line in ended.stderr.splitlines()) == 1
        assert "Traceback" not in ended.stderr
        assert ended.stdout == ""
    later = contents(folder)
    if situation in WRITES_NOTHING:
        assert later.keys() == earlier.keys() and not (folder / "new").exists()
    assert {name for name in earlier if later.get(name) != earlier[name]} == set()


@pytest.mark.parametrize("option", READ)
def test_a_file_that_is_not_there_is_missed_before_anything_is_written(
    template: Path, tmp_path: Path, option: str
) -> None:
    folder = tmp_path / "work"
    shutil.copytree(template, folder)
    (ended,) = run_tool(READ[option].tool, *READ[option].words, cwd=folder)
    assert ended.code == 2, ended.stderr
    assert ended.last_line == f"{MISSING}: no such file or directory. Check the path after --data."
    assert not (folder / "new").exists()
