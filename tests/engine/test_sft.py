"""Fine-tuning's loss: of the answers and of nothing else, however conversations are packed."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from engine.conversations import ConversationDataConfig, open_conversations
from engine.data.corpus import Corpus
from engine.data.loader import PackLoader, build_batch
from engine.data.packing import Piece
from engine.step import next_token_loss
from model.batch import IGNORE, PackedBatch
from model.chat import ChatTemplate, Message
from model.heads import CausalLM
from model.hf import load_config, read_model
from model.tokenizer import Tokenizer
from tests.small_base import small_conversations, write_small_base, write_small_conversations

CONTEXT, PACK = 192, 512  # no conversation is longer


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small_base(tmp_path_factory.mktemp("base"), context=CONTEXT)


@pytest.fixture(scope="module")
def tokenizer(base: Path) -> Tokenizer:
    return Tokenizer.load(base)


@pytest.fixture(scope="module")
def template(tokenizer: Tokenizer) -> ChatTemplate:
    return ChatTemplate.named("chimed", tokenizer)


@pytest.fixture(scope="module")
def corpus(tokenizer: Tokenizer, template: ChatTemplate, tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    folder = tmp_path_factory.mktemp("data")
    config = ConversationDataConfig(paths=[str(write_small_conversations(folder / "chats.jsonl", 60))], workers=1)
    return open_conversations(config, template, tokenizer, CONTEXT, folder)


@pytest.fixture(scope="module")
def packs(corpus: Corpus) -> list[PackedBatch]:
    loader = PackLoader(corpus, 0, PACK, CONTEXT, 8, allow_split=False)
    batches = loader.next_step()
    loader.close()
    return batches


@pytest.fixture(scope="module")
def model(base: Path) -> CausalLM:
    config = load_config(base).with_context(CONTEXT)
    made = CausalLM(config)
    with torch.no_grad():
        for name, value in read_model(base, config):
            # Fresh weights say the same of every token: larger ones have opinions.
            made.get_parameter(name).copy_(value * 3 if value.ndim == 2 else value)
    return made


def documents(batch: PackedBatch) -> list[slice]:
    return [slice(begin, end) for begin, end in pairwise(batch.cu_seqlens[: batch.num_documents + 1].tolist())]


def test_targets_are_what_is_behind_each_prompt_up_to_its_end_token(
    corpus: Corpus, tokenizer: Tokenizer, template: ChatTemplate
) -> None:
    """A prompt as it is given for generation ends where an answer's targets begin."""
    for number, record in enumerate(small_conversations(60)):
        messages = [Message(**message) for message in record]  # type: ignore[arg-type]
        stored = len(corpus.read(number))
        batch = build_batch(corpus, [Piece(0, number, 0, stored)], PACK, CONTEXT)
        expected = torch.full((PACK,), IGNORE)
        for index, message in enumerate(messages):
            if message.role == "assistant":
                begin = len(template.encode_prompt(tokenizer, messages[:index]))
                answer = [*tokenizer.encode_batch([message.content], is_continuation=True)[0], tokenizer.eos_id]
                expected[begin - 1 : begin - 1 + len(answer)] = torch.tensor(answer)
        assert torch.equal(batch.targets, expected)
        assert batch.targets[stored - 2] == tokenizer.eos_id and batch.tokens[stored - 1] == tokenizer.eos_id


def test_every_end_token_of_an_answer_is_trained_and_seen_by_the_next_turn(
    packs: list[PackedBatch], tokenizer: Tokenizer
) -> None:
    for batch in packs:
        for part in documents(batch):
            tokens, targets = batch.tokens[part], batch.targets[part]
            ends = (tokens[1:] == tokenizer.eos_id).nonzero().flatten()
            assert len(ends) and torch.equal(targets[:-1][ends], tokens[1:][ends])
            assert (batch.positions[part] == torch.arange(len(tokens))).all()


def test_loss_of_packs_is_the_token_weighted_loss_of_their_conversations_one_by_one(
    packs: list[PackedBatch], base: Path, model: CausalLM
) -> None:
    """One by one with labels of -100 where transformers shall not look, and packed with everything together."""
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.mul_(3 if parameter.ndim == 2 else 1)
        packed = [next_token_loss()(model, batch) for batch in packs]
        total, count, alone, seen = 0.0, 0, 0.0, 0
        for batch in packs:
            for part in documents(batch):
                tokens, targets = batch.tokens[part], batch.targets[part]
                trained = int((targets != IGNORE).sum())
                labels = torch.cat([torch.tensor([IGNORE]), targets[:-1]])
                total += theirs(tokens[None], labels=labels[None]).loss.item() * trained
                count += trained
                bounds = torch.tensor([0, len(tokens)], dtype=torch.int32)
                one = PackedBatch(tokens, batch.positions[part], bounds, targets, 1, CONTEXT)
                loss = next_token_loss()(model, one)
                alone, seen = alone + loss.reported.item(), seen + int(loss.count)
    assert seen == count == sum(int(loss.count) for loss in packed) > 500
    mean = sum(loss.reported.item() for loss in packed) / count
    assert mean == pytest.approx(alone / count, rel=1e-6)
    assert mean == pytest.approx(total / count, rel=1e-6)


def gradient_of_hidden(model: CausalLM, batch: PackedBatch) -> Tensor:
    """Of the loss, with respect to the final hidden states: what the head sends back. [T, d]"""
    kept: list[Tensor] = []
    handle = model.model.norm.register_forward_hook(lambda *call: call[2].retain_grad() or kept.append(call[2]))
    try:
        next_token_loss()(model, batch).total.backward()
    finally:
        handle.remove()
        model.zero_grad()
    assert kept[0].grad is not None
    return kept[0].grad


def test_a_prompt_token_has_zero_gradient(packs: list[PackedBatch], model: CausalLM) -> None:
    """Where the next token is a prompt's, a boundary or padding, nothing comes back through the logits: not a bit."""
    for batch in packs:
        gradient = gradient_of_hidden(model, batch)
        is_target = batch.targets != IGNORE
        assert (gradient[~is_target] == 0).all()
        assert (gradient[is_target] != 0).any(dim=1).all()


def test_the_gradient_of_the_logits_is_that_of_answers_alone(packs: list[PackedBatch], model: CausalLM) -> None:
    """(softmax - one hot) of each target (the closed form), and the matrix turns it into what the model returned."""
    batch = packs[0]
    hidden: list[Tensor] = []
    handle = model.model.norm.register_forward_hook(lambda *call: hidden.append(call[2].detach()))
    with torch.no_grad():
        next_token_loss()(model, batch)
    handle.remove()
    weight = model.head_weight.detach()
    logits_gradient = F.softmax(hidden[0] @ weight.T, dim=1)
    is_target = batch.targets != IGNORE
    logits_gradient[is_target, batch.targets[is_target]] -= 1
    logits_gradient[~is_target] = 0
    torch.testing.assert_close(gradient_of_hidden(model, batch), logits_gradient @ weight, rtol=1e-4, atol=1e-6)
