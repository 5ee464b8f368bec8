"""Bytes that a model's head takes, in the forward pass and in the backward: of words by loss, or of one number a token.

T tokens, d width, V vocabulary, b bytes a computed number. The sizes of buffers are asked of the kernels themselves.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from kernels.linear_cross_entropy import token_groups
from kernels.linear_logprob import vocabulary_slices
from kernels.vocabulary import chunks, most, padded, runs, workspace
from model.config import ModelConfig

FP32 = 4
# Bytes of what is one number a token on a CPU: labels (int64), weights, losses and log-sum-exps of the loss; and in the
# backward of log-probabilities labels, three gradients, and which tokens count.
LOSS_ROW, LOGPROB_ROW = 20, 21

Loss = Literal["cross_entropy", "logprob"]
"""What is made of a language model's head: a loss whose gradient the forward pass forms, or log-probabilities."""


@dataclass(frozen=True)
class HeadCost:
    """Beside the hidden states that the head reads, and its gathered weights.

    scoring: at most, where nothing is kept for a backward pass.
    forward: at most, in a forward pass of training; what that keeps is among it.
    backward: at most, in the backward pass, with the gradient of the hidden states and without that of the head.
    gradient: of the head's matrix, in computed numbers; it waits for the root's reduction. 0 of a frozen one.
    """

    scoring: int
    forward: int
    backward: int
    gradient: int


def head_cost(
    config: ModelConfig,
    loss: Loss,
    tokens: int,
    number_bytes: int,
    device: Literal["cuda", "cpu"],
    is_frozen: bool = False,
) -> HeadCost:
    """Of a forward pass over so many tokens, by the model's head and what is asked of it.

    Args:
        is_frozen: the head of words is not trained.
    """
    if config.head == "score":
        return _score(config, tokens, number_bytes)
    if loss == "cross_entropy":
        forward = _cross_entropy(config, tokens, number_bytes, device, is_frozen)
        # The gradients that it has kept are multiplied into new ones.
        of_matrix = 0 if is_frozen else number_bytes * config.vocab_size * config.hidden_size
        return HeadCost(forward, forward, number_bytes * config.hidden_size * tokens + of_matrix, of_matrix)
    return _logprob(config, tokens, number_bytes, device, is_frozen)


def _score(config: ModelConfig, tokens: int, b: int) -> HeadCost:
    """`ScalarModel`: hidden states in fp32, which the head's backward asks for."""
    wide = FP32 * tokens * config.hidden_size
    copy = wide if b < FP32 else 0
    gradient = wide + (b * tokens * config.hidden_size if b < FP32 else 0)
    return HeadCost(copy, copy, gradient, 0)


def _logprob(config: ModelConfig, tokens: int, b: int, device: Literal["cuda", "cpu"], is_frozen: bool) -> HeadCost:
    """`linear_logprob` with entropies: five numbers a token are kept, and logits formed again in the backward."""
    dtype = torch.bfloat16 if b < FP32 else torch.float32
    vocabulary, width = config.vocab_size, config.hidden_size
    stream, matrix = b * tokens * width, vocabulary * width
    results = 5 * FP32 * tokens  # in the backward three of them, and two gradients
    budget = workspace(torch.device(device))
    if device == "cuda":
        chunk = runs(tokens, most(budget, FP32 * padded(vocabulary)))[0].stop
        forward = results + FP32 * chunk * padded(vocabulary)
        largest, chunk = vocabulary_slices(tokens, vocabulary, dtype, budget, not is_frozen)
        if is_frozen:
            rows = runs(tokens, chunk)[0].stop
            buffers = padded(vocabulary) * (FP32 + b) * rows
            return HeadCost(forward, forward, results + stream + buffers, 0)
        slices = runs(vocabulary, largest)
        buffers = padded(slices[0].stop) * (FP32 * runs(tokens, chunk)[0].stop + b * tokens)
        total = FP32 * tokens * width if len(slices) > 1 else 0
        copy = stream  # of the hidden states, without those that have no target
        return HeadCost(forward, forward, results + stream + copy + total + buffers, b * matrix)
    parts = chunks(tokens, vocabulary, dtype, torch.device(device))
    logits = FP32 * vocabulary * parts[0].stop
    rows = LOGPROB_ROW * tokens
    is_narrow = b < FP32
    # A product's operands are widened, the weight once for all; at the end the gradients are rounded.
    weight, widened = (FP32 * matrix, FP32 * width * parts[0].stop) if is_narrow else (0, 0)
    is_cut = len(parts) > 1
    # Beside the logits their exponentials, or those of the chunk before while these are made.
    forward = results + weight + 2 * logits + (widened if is_cut else 0)
    if is_frozen:
        # A chunk's part of the gradient of hidden states, or the next one's logits; at the end that gradient rounded.
        chunk = FP32 * width * parts[0].stop
        in_chunks = max(2 * logits + chunk, 3 * logits + widened if is_cut else 0)
        in_chunks = max(in_chunks, 2 * logits + stream if is_narrow else 0)
        return HeadCost(forward, forward, results + rows + weight + FP32 * tokens * width + in_chunks, 0)
    gradients = FP32 * (tokens * width + matrix)
    product = FP32 * matrix if is_cut else 0  # this chunk's part of the head's gradient
    # Logits turn into their gradient; a factor each stands beside them, and what the chunk before has left.
    in_chunks = max((3 if is_cut else 2) * logits, 2 * logits + product + widened)
    rounded = 2 * logits + b * matrix if is_narrow else 0
    backward = rows + weight + gradients + max(in_chunks, rounded)
    return HeadCost(forward, forward, results + backward - b * matrix, b * matrix)


def _cross_entropy(config: ModelConfig, tokens: int, b: int, device: Literal["cuda", "cpu"], is_frozen: bool) -> int:
    """`linear_cross_entropy`: its results, and what it holds beside them."""
    dtype = torch.bfloat16 if b < FP32 else torch.float32
    stream, matrix = b * tokens * config.hidden_size, config.vocab_size * config.hidden_size
    if device == "cpu":
        parts = chunks(tokens, config.vocab_size, dtype, torch.device("cpu"))
        of_all = _frozen_cross_entropy_on_cpu if is_frozen else _cross_entropy_on_cpu
        return LOSS_ROW * tokens + of_all(config, tokens, b, parts)
    shape = tokens, config.vocab_size, config.hidden_size
    group, chunk = token_groups(*shape, dtype, workspace(torch.device(device)), not is_frozen)
    groups = runs(tokens, group)
    group = groups[0].stop
    chunk = runs(group, chunk)[0].stop
    buffers = padded(config.vocab_size) * (FP32 * chunk + b * group)
    if is_frozen:
        return stream + buffers + 2 * FP32 * tokens
    total = FP32 * matrix if len(groups) > 1 else 0
    copy = stream  # of the hidden states, without those that have no target
    return stream + b * matrix + copy + buffers + total + 2 * FP32 * tokens


def _cross_entropy_on_cpu(config: ModelConfig, tokens: int, b: int, parts: list[slice]) -> int:
    """Gradients in fp32, a chunk of logits, and the most that stands beside them."""
    matrix = config.vocab_size * config.hidden_size
    gradients = FP32 * (tokens * config.hidden_size + matrix)
    logits = FP32 * config.vocab_size * parts[0].stop
    beside = 0
    if len(parts) > 1:
        # The next chunk's logits, or this chunk's part of the head's gradient before it is added.
        beside = max(logits, FP32 * matrix)
    if b < FP32:
        # A product's operands are widened, the weight once for all; at the end the gradients are rounded.
        widened = FP32 * config.hidden_size * parts[0].stop
        beside = max(beside + widened, b * (tokens * config.hidden_size + matrix)) + FP32 * matrix
    return gradients + logits + beside


def _frozen_cross_entropy_on_cpu(config: ModelConfig, tokens: int, b: int, parts: list[slice]) -> int:
    """The gradient of hidden states in fp32, a chunk of logits, and the most that stands beside them."""
    gradient, chunk = (FP32 * rows * config.hidden_size for rows in (tokens, parts[0].stop))
    logits = FP32 * config.vocab_size * parts[0].stop
    # A chunk's part of the gradient, or the next chunk's logits.
    beside = max(chunk, logits if len(parts) > 1 else 0)
    if b < FP32:
        # The weight is widened once for all, hidden states chunk by chunk; at the end the gradient is rounded.
        weight = FP32 * config.vocab_size * config.hidden_size
        beside = weight + max(beside, (logits if len(parts) > 1 else 0) + chunk, b * tokens * config.hidden_size)
    return gradient + logits + beside
