"""A folder in which the documentation's commands can be typed as they stand: all that they name, of milliseconds."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

from evals.choice_subjects import CMMLU_PAPER
from tests.evals.choice_samples import CMMLU_SUBJECTS, write_cmmlu, write_medqa
from tests.evals.entity_samples import MORE, write_sample
from tests.evals.scales import numbered
from tests.rlhf.planted import write_comparisons
from tests.rlhf.small_reward import write_small_reward_model, write_small_sft
from tests.small_base import FINDINGS, write_small_base, write_small_conversations, write_small_data
from tests.tools.in_child import TOOLS, run_tool

CONTEXT = 2048
DIALOGUE = "id\t{0}\tdepartment\t内科\tdisease\t感冒\nP\t咳嗽{0}天。\t1\nD\t多久了？\t0\nP\t一周。\t0\nD\t多喝水。\t2\n"
QUIET = ("log.tensorboard=false", "log.curves=false")
CONTEXT_OF_RUN = "train.context=256"
STEPS = (
    *(CONTEXT_OF_RUN, "train.micro_batch_tokens=1024", "train.batch_tokens=1024", "train.steps=2", "eval.fraction=0.2"),
    *("data.workers=1", *QUIET),
)
SAMPLED = (CONTEXT_OF_RUN, "rollout.max_new_tokens=4", "eval.fraction=0.2", "eval.max_tokens=8", *QUIET)
PICKED = ("select.truncated=true", "train.micro_batch_tokens=256", "train.batch_tokens=256", "train.epochs=1")
SHORT = {
    "tools/pretrain.py": STEPS,
    "tools/sft.py": STEPS,
    "tools/rm.py": STEPS,
    "tools/dpo.py": STEPS,
    "tools/ppo.py": ("train.steps=1", "rollout.prompts=4", *SAMPLED),
    "tools/rejection.py": ("rollout.prompts=8", *PICKED, *SAMPLED),
    "tools/evaluate_model.py": ("limit=1",),
    "tools/chat.py": ("sampling.max_new_tokens=4",),
    "tools/train_tokenizer.py": ("vocab_size=450",),
}
"""Behind a command's own words: the same on little data, in little time."""
STANDS_FOR = {
    "tools/evaluate_model.py": {"DIR": "data/cmmlu", "FILE": "data/medqa.jsonl"},
    "tools/convert.py": {"1500": "2"},
}
"""What words mean that are no names of files, or are numbers of a longer run."""


def write_documented_files(folder: Path) -> Path:
    """Models, data, files of tasks and a run of two steps, under the names that the pages use."""
    write_small_base(folder / "BASE", CONTEXT)
    for name in ("DIR", "ckpt/pretrain", "ckpt/tokenizer", "models/llama"):
        shutil.copytree(folder / "BASE", folder / name)
    write_small_reward_model(folder / "ckpt/rm", mean=0.1, std=0.5, context=CONTEXT)
    write_small_sft(folder / "ckpt/ppo", CONTEXT)
    for name, write in (
        *((f"{name}/texts.jsonl", write_small_data) for name in ("corpus", "texts", "PATH")),
        *((f"{name}/chats.jsonl", write_small_conversations) for name in ("dialogues", "talks", "prompts")),
    ):
        (folder / name).parent.mkdir()
        write(folder / name)
    (folder / "comparisons").mkdir()
    write_comparisons(folder / "comparisons/pairs.jsonl", 60, 3)
    write_small_conversations(folder / "questions.jsonl", 40)
    write_small_conversations(folder / "dialogues.jsonl", 40)
    (folder / "my.jinja").write_text((folder / "ckpt/ppo/chat_template.jinja").read_text(encoding="utf-8"))
    (folder / "lines").write_text("头晕怎么办？\n")
    (folder / "samples").mkdir()
    shutil.copy(TOOLS.parent / "samples/attitudes.json", folder / "samples")
    _write_tasks(folder / "data")
    page = (TOOLS.parent / "docs/evaluation.md").read_text(encoding="utf-8")
    (code,) = re.findall("```python\n(.+?)```", page, re.DOTALL)
    (folder / "my_tasks.py").write_text(code, encoding="utf-8")
    for tool, words in (
        ("prepare", ("--data", "texts", "--tokenizer", "BASE", "--out", "prepared", "--workers", 1)),
        ("sft", ("--model", "BASE", "--data", "dialogues", "--checkpoint.every", 1, *_flags(STEPS))),
    ):
        (ended,) = run_tool(tool, *words, cwd=folder)
        assert ended.code == 0, ended.stderr
    return folder


def _write_tasks(data: Path) -> None:
    data.mkdir()
    write_cmmlu(data / "cmmlu")
    for split in ("dev", "test"):
        for subject in set(CMMLU_PAPER) - set(CMMLU_SUBJECTS):
            shutil.copy(data / f"cmmlu/{split}/anatomy.csv", data / f"cmmlu/{split}/{subject}.csv")
    write_medqa(data / "medqa.jsonl")
    (data / "yidu-s4k").mkdir()
    write_sample(data / "yidu-s4k/subtask1_test_set_with_answer.json", "ccks2019")
    write_sample(
        data / "yidu-s4k/subtask1_training_part1.txt",
        "ccks2019",
        [(f"{text}第{n}次。", marks) for n in (1, 2) for text, marks in MORE],
    )
    write_sample(data / "CMeEE_dev.json", "cmeee")
    (data / "cMedQANER").mkdir()
    write_sample(data / "cMedQANER/test.json", "cmedqaner")
    for name in ("huatuo26m_test.json", "huatuo26M_test.json"):
        _write_rows(data / name, [{"questions": f"{finding}怎么办？", "answers": "多休息。"} for finding in FINDINGS])
    for split, days in (("test", range(20, 22)), ("train", range(3))):
        (data / f"{split}.dialog").write_text("\n".join(map(DIALOGUE.format, days)), encoding="utf-8")
    for name in ("cami", "mica4"):
        (data / f"{name}.json").write_text(json.dumps(numbered(name), ensure_ascii=False), encoding="utf-8")
    write_small_conversations(data / "prompts.jsonl", 4)
    write_small_data(data / "held_out.jsonl", 4)
    _write_rows(data / "names.jsonl", [{"description": f"{finding}三天", "disease": "感冒"} for finding in FINDINGS])


def _write_rows(path: Path, rows: list[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def _flags(options: tuple[str, ...]) -> list[str]:
    return [f"--{option}" for option in options]


def shortened(program: str, words: tuple[str, ...]) -> list[str]:
    """A documented command's words with what makes it short behind them; a dry run is short as it stands."""
    given = list(words)
    for name, meant in STANDS_FOR.get(program, {}).items():
        given = [re.sub(rf"(?<![\w/]){name}(?![\w/])", meant, word) for word in given]
    return given if "--dry-run" in given else [*given, *_flags(SHORT.get(program, ()))]
