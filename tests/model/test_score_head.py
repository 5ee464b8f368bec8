"""Reward models as directories: transformers' sequence classifiers of one label, in both directions."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from model.batch import PackedBatch
from model.config import ModelConfig, parameter_shapes
from model.errors import InputError
from model.heads import ScalarModel
from model.hf import load_config, read_model, write_model
from model.hf_config import config_from_hf, config_to_hf
from model.init import initial_value
from tests.model.tiny import CONFIGS, LLAMA, batch, documents, fill

PAD = 130
LENGTHS = (40, 1, 17)
KINDS = {name: dataclasses.replace(config, head="score", pad_token_id=PAD) for name, config in CONFIGS.items()}
SCORER = KINDS["llama"]

every_kind = pytest.mark.parametrize("config", KINDS.values(), ids=KINDS.keys())


@pytest.fixture(autouse=True)
def quiet_transformers() -> None:
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def scorer(config: ModelConfig, directory: Path | None = None) -> ScalarModel:
    """With initial weights, or those of a directory."""
    model = ScalarModel(config)
    if directory is None:
        fill(model, config)
        return model
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, tensor in read_model(directory, config):
            parameters.pop(name).copy_(tensor)
    assert not parameters
    return model


def classifier(directory: Path) -> Any:
    """transformers' model of a directory, in eager attention."""
    from transformers import AutoModelForSequenceClassification

    options = {"attn_implementation": "eager", "dtype": torch.float32}
    return AutoModelForSequenceClassification.from_pretrained(directory, **options).eval()


@torch.no_grad()
def ends(model: ScalarModel, pack: PackedBatch) -> Tensor:
    """The value at every document's last token."""
    return model(pack)[pack.cu_seqlens[1 : pack.num_documents + 1].long() - 1]


def padded(pack: PackedBatch, side: str = "right") -> Tensor:
    """[D, longest]: the documents as transformers batches them."""
    rows = [document.tokens for document in documents(pack)]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PAD, padding_side=side)


@every_kind
@torch.no_grad()
def test_transformers_gives_our_scores_alone_and_padded(config: ModelConfig, tmp_path: Path) -> None:
    ours = scorer(config)
    write_model(tmp_path, config, ours.named_parameters(), torch.float32, max_shard_bytes=30_000)
    theirs = classifier(tmp_path)
    assert theirs.config.num_labels == 1
    pack = batch(LENGTHS, vocab=PAD)
    scores = ends(ours, pack)
    alone = torch.cat([theirs(document.tokens[None]).logits[0] for document in documents(pack)])
    assert (scores - alone).abs().max() <= 1e-5
    if config.rope_scaling is None or config.rope_scaling.kind != "dynamic":  # theirs grow with the longest row
        tokens = padded(pack)
        rows = theirs(tokens, attention_mask=(tokens != PAD).long()).logits[:, 0]
        assert (scores - rows).abs().max() <= 1e-5
    assert torch.equal(ends(scorer(load_config(tmp_path), tmp_path), pack), scores)


@every_kind
@torch.no_grad()
def test_a_classifier_that_transformers_wrote_is_read(config: ModelConfig, tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModelForSequenceClassification

    facts = {**config_to_hf(config, "float32"), "id2label": None, "label2id": None}
    (tmp_path / "config.json").write_text(json.dumps(facts))
    theirs = AutoModelForSequenceClassification.from_config(AutoConfig.from_pretrained(tmp_path, num_labels=1)).eval()
    theirs.save_pretrained(tmp_path)
    assert load_config(tmp_path, "score") == config
    pack = batch(LENGTHS, vocab=PAD)
    alone = torch.cat([theirs(document.tokens[None]).logits[0] for document in documents(pack)])
    assert (ends(scorer(config, tmp_path), pack) - alone).abs().max() <= 1e-5


@torch.no_grad()
def test_a_score_does_not_depend_on_the_layout() -> None:
    """Alone, at any place of a pack, before any tail: the same number."""
    model = scorer(SCORER)
    whole = batch(LENGTHS)
    alone = torch.cat([ends(model, document) for document in documents(whole)])
    for order in ((0, 1, 2), (2, 0, 1), (1, 2, 0)):
        for tail in (0, 1, 23):
            chosen = [documents(whole)[place] for place in order]
            lengths = [len(document.tokens) for document in chosen] + [tail] * (tail > 0)
            filler = torch.full((tail,), 7)
            pack = PackedBatch(
                tokens=torch.cat([*(document.tokens for document in chosen), filler]),
                positions=torch.cat([torch.arange(length) for length in lengths]),
                cu_seqlens=torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32),
                targets=torch.cat([*(document.targets for document in chosen), filler]),
                num_documents=3,
                max_seqlen=64,
            )
            assert (ends(model, pack) - alone[list(order)]).abs().max() <= 1e-6


def test_a_reward_head_starts_with_deviation_one_over_the_root_of_its_width() -> None:
    wide = dataclasses.replace(SCORER, hidden_size=9999)
    head = initial_value(wide, "score.weight", (1, 9999), seed=0)
    assert abs(head.std().item() * 100 - 1) < 0.03 and abs(head.mean().item()) < 3 / 9999**0.5 / 100


def test_training_and_evaluation_are_the_same_function() -> None:
    """There is no dropout anywhere."""
    model, pack = scorer(SCORER), batch(LENGTHS)
    assert torch.equal(model.train()(pack), model.eval()(pack))
    assert not any("dropout" in type(module).__name__.lower() for module in model.modules())


def test_mean_and_deviation_survive_config_json() -> None:
    config = dataclasses.replace(SCORER, score_mean=-0.1 / 3, score_std=math.pi)
    facts = json.loads(json.dumps(config_to_hf(config, "float32")))
    assert (facts["score_mean"], facts["score_std"]) == (-0.1 / 3, math.pi)
    assert facts["architectures"] == ["LlamaForSequenceClassification"]
    assert config_from_hf(facts) == config


def test_a_reward_model_has_neither_a_head_of_words_nor_settings_of_generation(tmp_path: Path) -> None:
    tied = dataclasses.replace(KINDS["tied"])
    assert "lm_head.weight" not in parameter_shapes(SCORER) and list(parameter_shapes(SCORER))[-1] == "score.weight"
    assert SCORER.num_parameters == LLAMA.num_parameters - 131 * 48 + 48 == tied.num_parameters
    assert SCORER.num_matmul_parameters == LLAMA.num_matmul_parameters - 131 * 48 + 48 == tied.num_matmul_parameters
    write_model(tmp_path, SCORER, scorer(SCORER).named_parameters(), torch.float32)
    assert not (tmp_path / "generation_config.json").exists()


def test_the_two_heads_are_not_taken_for_each_other(tmp_path: Path) -> None:
    write_model(tmp_path, SCORER, scorer(SCORER).named_parameters(), torch.float32)
    with pytest.raises(InputError, match=r"is a reward model: it gives scores, not words. Give the model it was made"):
        load_config(tmp_path, "lm")
    facts = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**facts, "architectures": ["LlamaForCausalLM"]}))
    with pytest.raises(InputError, match=r"its head would be random. Train one from it with tools/rm.py --model"):
        load_config(tmp_path, "score")


def test_a_classifier_without_its_head_is_refused(tmp_path: Path) -> None:
    """As transformers would fill one in at random, and warn."""
    weights = [(name, initial_value(LLAMA, name, shape, 0)) for name, shape in parameter_shapes(LLAMA).items()]
    write_model(tmp_path, LLAMA, iter(weights), torch.float32)
    (tmp_path / "config.json").write_text(json.dumps(config_to_hf(SCORER, "float32")))
    with pytest.raises(InputError, match=r"score.weight is missing, so its scores would be random. Train it with"):
        read_model(tmp_path, load_config(tmp_path, "score"))
