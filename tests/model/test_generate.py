"""The generator: what it returns is what the training forward says of the finished text, whatever ran beside it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from model.batch import IGNORE, PackedBatch
from model.config import ModelConfig
from model.generate import Completion, Generator, Request
from model.heads import CausalLM
from model.sampling import SamplingOptions
from tests.model.tiny import CONFIGS, causal_lm

TOLERANCE = 1e-5


def trained_logprobs(model: CausalLM, request: Request, completion: Completion) -> torch.Tensor:
    """Log-probabilities of an answer by the training forward, over the finished text."""
    ids = torch.tensor([*request.prompt, *completion.ids])
    targets = ids.roll(-1)
    targets[-1] = IGNORE
    bounds = torch.tensor([0, len(ids)], dtype=torch.int32)
    batch = PackedBatch(ids, torch.arange(len(ids)), bounds, targets, 1, model.config.rope_length)
    with torch.no_grad():
        logprobs = model(batch, request.options.temperature or 1.0).logprob
    return logprobs[len(request.prompt) - 1 : -1]


def ragged_requests(count: int, vocab: int = 131, longest: int = 40) -> list[Request]:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, longest, (count,), generator=generator).tolist()
    return [
        Request(
            torch.randint(0, vocab, (length,), generator=generator).tolist(),
            SamplingOptions(temperature=0.7 if i % 2 else 0.0, max_new_tokens=3 + 5 * i % 23),
            samples=1 + i % 3,
            seed=i,
        )
        for i, length in enumerate(lengths)
    ]


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_logprobs_are_those_of_the_training_forward(config: ModelConfig) -> None:
    model = causal_lm(replace(config, initializer_range=0.1))
    generator = Generator(config, device="cpu", max_rows=5)
    generator.load(model.named_parameters())
    requests = ragged_requests(12)
    for completion in generator.generate(requests):
        request = requests[completion.request]
        assert len(completion.ids) == min(request.options.max_new_tokens, 64 - len(request.prompt))
        expected = trained_logprobs(model, request, completion)
        assert (torch.tensor(completion.logprobs) - expected).abs().max() <= TOLERANCE
