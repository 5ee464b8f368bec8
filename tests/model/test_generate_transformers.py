"""Greedy decoding against transformers' generate, token for token, on 64 ragged Chinese prompts."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from model.config import ModelConfig
from model.generate import Generator, Request
from model.hf import load_config, read_model
from model.hf_config import config_to_hf
from model.sampling import SamplingOptions
from tests.model.test_streaming import tokenizer
from tests.model.tiny import CONFIGS, transformers_model
from tests.small_base import small_texts

ANSWER = 24
# Logits of a few units in fp32: two right computations differ by some 1e-6.
NEAR_TIE = 2e-5


def prompts() -> list[list[int]]:
    """64 Chinese texts of 3 to 66 tokens."""
    ids = tokenizer("llama").encode("。".join(small_texts()))
    return [ids[70 * at : 70 * at + 3 + at] for at in range(64)]


@torch.no_grad()
def expected(theirs: Any, asked: list[list[int]]) -> tuple[list[list[int]], torch.Tensor]:
    """Answers in one batch, padded on the left, and the margin of every token over the next likeliest."""
    width = max(map(len, asked))
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in asked])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in asked])
    out = theirs.generate(
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=ANSWER,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=None,
        output_logits=True,
        return_dict_in_generate=True,
    )
    top = torch.stack(out.logits, dim=1).topk(2).values  # [64, ANSWER, 2]
    return out.sequences[:, width:].tolist(), top[..., 0] - top[..., 1]


@pytest.mark.parametrize("kind", ["llama", "tied", "mistral", "qwen2", "qwen2 with a window", "qwen3"])
def test_greedy_answers_are_those_of_transformers(kind: str, tmp_path: Path) -> None:
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    config: ModelConfig = replace(
        CONFIGS[kind], vocab_size=tokenizer("llama").padded_vocab_size, max_position_embeddings=128
    )
    (tmp_path / "config.json").write_text(json.dumps(config_to_hf(config, "float32")))
    theirs = transformers_model(tmp_path)
    theirs.save_pretrained(tmp_path)
    asked = prompts()
    assert len({len(prompt) for prompt in asked}) == 64
    answers, margins = expected(theirs, asked)

    made = Generator(load_config(tmp_path), device="cpu", max_rows=20)
    made.load(read_model(tmp_path, made.config))
    options = SamplingOptions(temperature=0.0, max_new_tokens=ANSWER)
    ours = made.generate([Request(prompt, options) for prompt in asked])
    compared = 0
    for mine, theirs_of, margin in zip(ours, answers, margins, strict=True):
        clear = int((margin < NEAR_TIE).float().argmax()) if bool((margin < NEAR_TIE).any()) else ANSWER
        assert mine.ids[:clear] == theirs_of[:clear]
        compared += clear
    assert compared >= 0.95 * 64 * ANSWER
    assert len({tuple(answer) for answer in answers}) > 32  # they say different things
