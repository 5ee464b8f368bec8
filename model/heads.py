"""What is read off the hidden states: log-probabilities, a cross-entropy, or one number a token.

These modules are the roots that sharding wraps. Every use of a head goes through a root's forward, so that its
parameters are gathered when they are needed.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, overload

from torch import Tensor, nn

from kernels.linear_cross_entropy import linear_cross_entropy
from kernels.linear_logprob import linear_logprob
from model.batch import PackedBatch
from model.config import ModelConfig
from model.layers import Linear
from model.transformer import Transformer


class TokenLogprobs(NamedTuple):
    """Of each target, fp32 [T]; 0 where the target is IGNORE. Entropy in nats, None unless asked for."""

    logprob: Tensor
    entropy: Tensor | None
    logsumexp: Tensor


class CrossEntropy(NamedTuple):
    """Sums over all targets, weighted by the batch's weights: fp32 scalars. The loss is their sum."""

    nll_sum: Tensor
    z_sum: Tensor


class CausalLM(nn.Module):
    """A language model. With tied embeddings there is no `lm_head`: the embedding is its matrix."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        assert config.head == "lm"
        self.config = config
        self.model = Transformer(config)
        self.lm_head = None if config.tie_word_embeddings else Linear(config.hidden_size, config.vocab_size)

    @property
    def head_weight(self) -> Tensor:
        """[V, d]"""
        return (self.model.embed_tokens if self.lm_head is None else self.lm_head).weight

    @overload
    def forward(
        self,
        batch: PackedBatch,
        temperature: float | Tensor = ...,
        with_entropy: bool = ...,
        *,
        embedding_noise: Tensor | None = ...,
    ) -> TokenLogprobs: ...

    @overload
    def forward(
        self,
        batch: PackedBatch,
        *,
        cross_entropy: Literal[True],
        z_loss: float = ...,
        embedding_noise: Tensor | None = ...,
    ) -> CrossEntropy: ...

    def forward(
        self,
        batch: PackedBatch,
        temperature: float | Tensor = 1.0,
        with_entropy: bool = False,
        *,
        cross_entropy: bool = False,
        z_loss: float = 0.0,
        embedding_noise: Tensor | None = None,
    ) -> TokenLogprobs | CrossEntropy:
        """Read the model's opinion of the batch's targets.

        Args:
            batch: T tokens.
            temperature: of the log-probabilities; a number or fp32 [T].
            with_entropy: whether the entropies are wanted.
            cross_entropy: return the sums of a training loss, with the batch's weights, instead of a value a
                token. Faster: its gradient is formed in the forward pass.
            z_loss: coefficient of the squared log-sum-exp in the cross-entropy.
            embedding_noise: [T, d], added to the embeddings.
        """
        hidden = self.model(batch.tokens, batch.positions, batch.layout, embedding_noise)
        if cross_entropy:
            return CrossEntropy(*linear_cross_entropy(hidden, self.head_weight, batch.targets, batch.weights, z_loss))
        return TokenLogprobs(*linear_logprob(hidden, self.head_weight, batch.targets, temperature, with_entropy))


class ScalarModel(nn.Module):
    """One number a token: a reward or a value. Its head is named as in transformers' sequence classifiers.

    The head is fp32 whatever the trunk computes in: `engine.shard` keeps it a unit of its own, which is gathered when
    its module is called. A difference of two scores is a loss's only input, and bf16 would give it eight bits.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        assert config.head == "score"
        self.config = config
        self.model = Transformer(config)
        self.score = Linear(config.hidden_size, 1)

    def forward(self, batch: PackedBatch) -> Tensor:
        """fp32 [T]"""
        hidden = self.model(batch.tokens, batch.positions, batch.layout)
        return self.score(hidden.float()).sum(1)  # of one column; FSDP's hooks want no view
