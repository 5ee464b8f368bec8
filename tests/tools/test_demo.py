"""The demo asks what training has not shown, and its commands name tools and files that are there."""

from __future__ import annotations

from pathlib import Path

from samples.chain.stages import ADAPTER_STAGES, RANK, ROOT, SAMPLE, STAGES
from samples.dialogues import render_dialogues
from samples.knowledge import load_knowledge
from samples.questions import questions_of


def test_the_question_asked_is_a_held_out_one() -> None:
    _, held_out = render_dialogues(load_knowledge())
    kinds = {question.messages[-1].content: question.kind for question in questions_of(held_out)}
    assert [kinds[stage.typed] for stage in STAGES if stage.typed] == ["department"]


def test_every_stage_runs_a_tool_that_is_there_on_files_that_rendering_writes() -> None:
    rendered = {f"{SAMPLE}/{folder}{name}.jsonl" for folder in ("", "dialogues/") for name in ("train", "held_out")}
    for stage in (*STAGES, *ADAPTER_STAGES):
        tool, *words = stage.command.split()
        assert (ROOT / tool).is_file()
        assert {word for word in words if Path(word).suffix == ".jsonl"} <= rendered


def test_adapters_take_the_command_of_all_weights_with_the_rank_and_nothing_else() -> None:
    """Their reward model judges them, as each chain's own does."""
    plain = {stage.name: stage.command for stage in (*STAGES, *ADAPTER_STAGES)}
    names = ("sft", "rm", "rejection", "ppo", "dpo")
    for name in names:
        beside = plain[name].replace("ckpt/rm", "ckpt/lora-rm")
        assert plain[f"lora-{name}"] == f"{beside} {RANK} --out ckpt/lora-{name}"
    assert [stage.leaves for stage in ADAPTER_STAGES if RANK in stage.command] == [
        f"ckpt/lora-{name}" for name in names
    ]
