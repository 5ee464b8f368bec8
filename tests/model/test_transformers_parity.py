"""Done-when 7: transformers is the oracle. Import, logits, gradients, export, and every rotary scaling."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from model.batch import IGNORE
from model.config import ModelConfig
from model.hf import hf_parameters, write_model
from model.hf_config import config_to_hf
from tests.model.tiny import CONFIGS, batch, causal_lm, documents, loaded, logits, reopened, transformers_model

LENGTHS = (40, 1, 17)  # longer than the windows of CONFIGS and the original contexts of its scalings
TOLERANCE = 1e-5

every_kind = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())


@pytest.fixture(autouse=True)
def quiet_transformers() -> None:
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def imported(config: ModelConfig, directory: Path):
    """The same random weights in transformers' model and in ours, by way of a directory that transformers wrote."""
    (directory / "config.json").write_text(json.dumps(config_to_hf(config, "float32")))
    theirs = transformers_model(directory)
    theirs.save_pretrained(directory)
    return theirs, loaded(directory)


@every_kind
def test_imported_models_have_equal_logits_and_gradients(config: ModelConfig, tmp_path: Path) -> None:
    theirs, ours = imported(config, tmp_path)
    assert ours.config == config
    pack = batch(LENGTHS)
    mine = logits(ours, pack)
    expected = torch.cat([theirs(document.tokens[None]).logits[0] for document in documents(pack)])
    assert (mine - expected).abs().max() <= TOLERANCE

    nll = ours(pack, cross_entropy=True).nll_sum
    oracle = torch.nn.functional.cross_entropy(expected, pack.targets, ignore_index=IGNORE, reduction="sum")
    count = int((pack.targets != IGNORE).sum())
    (nll / count).backward()
    (oracle / count).backward()
    assert abs(nll - oracle) / count <= TOLERANCE
    parts = hf_parameters(config)
    grads = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    for name, parameter in ours.named_parameters():
        assert parameter.grad is not None
        expected_grad = torch.cat([grads[part] for part, _ in parts[name]])
        assert (parameter.grad - expected_grad).abs().max() <= TOLERANCE, name


@every_kind
def test_exported_models_have_equal_logits_in_transformers(config: ModelConfig, tmp_path: Path) -> None:
    ours = causal_lm(config)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)), alpha=0.1)
    write_model(tmp_path, config, ours.named_parameters(), dtype=torch.float32, max_shard_bytes=30_000)
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    theirs = reopened(tmp_path)
    pack = batch(LENGTHS)
    with torch.no_grad():
        expected = torch.cat([theirs(document.tokens[None]).logits[0] for document in documents(pack)])
        assert (logits(ours, pack) - expected).abs().max() <= TOLERANCE
        again = loaded(tmp_path)
        assert torch.equal(logits(ours, pack), logits(again, pack))
    assert again.config == config


def test_both_spellings_of_transformers_are_read(tmp_path: Path) -> None:
    """What transformers writes today (rope_parameters, dtype) and what it wrote for years (rope_scaling) agree."""
    for name, config in CONFIGS.items():
        directory = tmp_path / name
        directory.mkdir()
        (directory / "config.json").write_text(json.dumps(config_to_hf(config, "float32")))
        transformers_model(directory).save_pretrained(directory)
        facts = json.loads((directory / "config.json").read_text())
        assert "rope_parameters" in facts and "dtype" in facts and "rope_scaling" not in facts
        assert loaded(directory).config == config


def test_dynamic_frequencies_are_those_of_the_run_not_of_the_batch(tmp_path: Path) -> None:
    """transformers grows them with the longest sequence seen; a run fixes them at its context, for all documents."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = CONFIGS["dynamic"].with_context(100)
    ours = causal_lm(config)
    write_model(tmp_path, config, ours.named_parameters(), dtype=torch.float32)
    hf_config = AutoConfig.from_pretrained(tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, config=hf_config, attn_implementation="eager").eval()
    full = batch([100], max_seqlen=100)
    with torch.no_grad():
        assert (logits(ours, full) - theirs(full.tokens[None]).logits[0]).abs().max() <= TOLERANCE
        short, packed = batch([30], max_seqlen=100), batch([30, 100], max_seqlen=100)
        assert torch.equal(short.tokens, packed.tokens[:30])
        assert (logits(ours, short) - logits(ours, packed)[:30]).abs().max() <= TOLERANCE
