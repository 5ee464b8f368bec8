"""The others in the training benchmark: transformers, transformers with Liger-Kernel, and a compiled plain decoder.

On a GPU all of them compute in bf16 on weights kept in bf16, beside fp32 masters, fp32 sums of gradients and fp32
moments (18 bytes a parameter), with torch's fused AdamW and a clipped norm: the precision of ours. Each takes the batch
size at which it is fastest, and checkpoints its blocks only where nothing fits without. Rows need no attention mask:
they are padded on the right, so causal attention never reaches the padding, and the flash kernels are free to run.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from engine.benchmark import fastest, free, now, speeds_by_size
from engine.shard import Precision
from model.batch import IGNORE
from model.config import ModelConfig
from tools.plain_decoder import PlainDecoder
from tools.train_data import Rows, Step

Loss = Callable[[Any, Rows, int], Tensor]
"""Of a model on some rows, of a step with so many targets (or pairs): its part of the step's mean."""

# Batches that a size is tried on; more would only cost time.
_TRIED = 4


class MasterAdamW:
    """AdamW on fp32 masters of parameters of any dtype; gradients of all batches of a step are summed in fp32."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        self._parameters = parameters
        self._masters = [nn.Parameter(p.detach().float()) if p.dtype != torch.float32 else p for p in parameters]
        for parameter, master in zip(parameters, self._masters, strict=True):
            if parameter is not master:
                parameter.register_post_accumulate_grad_hook(_summed_into(master))
        self._adamw = torch.optim.AdamW(self._masters, lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)

    @torch.no_grad()
    def step(self) -> None:
        """Clip, update, round."""
        with torch.profiler.record_function("optimizer"):
            torch.nn.utils.clip_grad_norm_(self._masters, 1.0)
            self._adamw.step()
            if self._masters[0] is not self._parameters[0]:
                torch._foreach_copy_(self._parameters, self._masters)
        self.drop_gradients()

    def drop_gradients(self) -> None:
        for parameter in [*self._parameters, *self._masters]:
            parameter.grad = None

    def make_room(self) -> None:
        """Have the moments made, by a step without gradients, before batch sizes are tried."""
        for master in self._masters:
            master.grad = torch.zeros_like(master)
        self.step()


def _summed_into(master: nn.Parameter) -> Callable[[Tensor], None]:
    def take(parameter: Tensor) -> None:
        assert parameter.grad is not None
        master.grad = parameter.grad.float() if master.grad is None else master.grad.add_(parameter.grad)
        parameter.grad = None

    return take


class Peer:
    """A model that trains on rows, a step at a time, in batches of the size at which it is fastest.

    Args:
        checkpoint_blocks: have the model compute its blocks again in the backward pass.
        undo: what takes back changes to a library when this peer is done.

    Raises:
        torch.cuda.OutOfMemoryError: nothing fits, not even with checkpoints.
    """

    data_wait = 0.0  # its batches lie on the device before it begins

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        steps: list[Step],
        device: torch.device,
        checkpoint_blocks: Callable[[], None],
        undo: Callable[[], None] = lambda: None,
    ) -> None:
        self._model, self._loss, self._steps, self._device = model.train(), loss, steps, device
        self._undo, self._next = undo, 0
        try:
            self._optimizer = MasterAdamW(list(model.parameters()))
            self._optimizer.make_room()
            self.is_checkpointing = False
            speeds = self._speeds()
            if not speeds:
                checkpoint_blocks()
                self.is_checkpointing = True
                speeds = self._speeds()
                if not speeds:
                    raise torch.cuda.OutOfMemoryError("a single row is too much")
            self.units = fastest(speeds)
            self._batches = [[rows.to(device) for rows in step.batches(self.units)] for step in steps]
        except BaseException:
            self.close()
            raise

    @property
    def settings(self) -> str:
        """How it runs."""
        rows = max(len(rows.tokens) for rows in self._batches[0])
        checkpoints = "blocks checkpointed" if self.is_checkpointing else "no checkpoints"
        return f"{rows} row{'s' if rows > 1 else ''} a batch, {checkpoints}"

    @property
    def padding_share(self) -> float:
        """Of the first step's batches."""
        numbers = sum(rows.tokens.numel() for rows in self._batches[0])
        return 1 - self._steps[0].tokens / numbers

    def step(self) -> None:
        """One optimizer step; nobody waits for it."""
        place = self._next % len(self._steps)
        self._next += 1
        with _as_torch_comes():
            for rows in self._batches[place]:
                self._pass(rows, self._steps[place].targets)
            self._optimizer.step()

    def _pass(self, rows: Rows, targets: int) -> None:
        self._loss(self._model, rows, targets).backward()

    def _speeds(self) -> dict[int, float]:
        """Numbers of the rows' places a second, by the number of units in a batch."""
        step = self._steps[0]
        sizes = [2**power for power in range(7) if 2**power <= len(step.units)]

        def speed(units: int) -> float:
            batches = step.batches(units)
            chosen = [rows.to(self._device) for rows in batches[:: max(1, len(batches) // _TRIED)]]
            try:
                with _as_torch_comes():
                    self._pass(chosen[0], step.targets)  # the longest: memory is touched, kernels are compiled
                    begin = now(self._device)
                    for rows in chosen:
                        self._pass(rows, step.targets)
                    seconds = now(self._device) - begin
            finally:
                self._optimizer.drop_gradients()
                free()
            return sum(int(rows.ends.sum()) + len(rows.ends) for rows in chosen) / seconds

        speeds = speeds_by_size(sizes, speed)
        free()  # once more: of the size that did not fit
        return speeds

    def close(self) -> None:
        self._undo()
        vars(self).clear()
        torch._dynamo.reset()
        free()


@contextmanager
def _as_torch_comes() -> Iterator[None]:
    """Our determinism is not asked of others: it would slow them down."""
    matmul = torch.backends.cuda.matmul
    torch.use_deterministic_algorithms(False)
    matmul.allow_bf16_reduced_precision_reduction = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(True, warn_only=True)
        matmul.allow_bf16_reduced_precision_reduction = False


def missing(peer: str, device: torch.device) -> str:
    """Why a peer takes no part, and what to do about it; nothing where it can."""
    if peer == "plain":
        return ""
    if importlib.util.find_spec("transformers") is None:
        return "transformers is not installed: pip install transformers"
    if peer == "liger" and device.type != "cuda":
        return "Liger-Kernel runs on GPUs only"
    if peer == "liger" and importlib.util.find_spec("liger_kernel") is None:
        return "Liger-Kernel is not installed: pip install liger-kernel"
    return ""


def plain(config: ModelConfig, steps: list[Step], device: torch.device, precision: Precision, is_ragged: bool) -> Peer:
    """The plain decoder, compiled on a GPU. On a CPU it stays as it is, where compiling takes longer than the race."""
    with device:
        model = PlainDecoder(config)
    _narrow(model, precision)
    if device.type == "cuda":
        model.compile_parts(is_ragged=is_ragged)

    def loss(model: PlainDecoder, rows: Rows, targets: int) -> Tensor:
        out = model(*rows)
        return (_ranking(out) if config.head == "score" else out) / targets

    def checkpoint_blocks() -> None:
        model.checkpointing = True

    return Peer(model, loss, steps, device, checkpoint_blocks)


def hugging_face(
    config: ModelConfig, steps: list[Step], device: torch.device, precision: Precision, with_liger: bool
) -> Peer:
    """transformers' LLaMA with its SDPA attention, and with Liger's kernels in the place of its own."""
    import transformers
    from transformers.models.llama import modeling_llama

    transformers.utils.logging.set_verbosity_error()
    llama = transformers.LlamaConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        max_position_embeddings=config.rope_length,
        rms_norm_eps=config.rms_norm_eps,
        use_cache=False,
        attn_implementation="sdpa",
        pad_token_id=0,
        num_labels=1,
    )
    is_scorer = config.head == "score"
    with device:
        model = (transformers.LlamaForSequenceClassification if is_scorer else transformers.LlamaForCausalLM)(llama)
    _narrow(model, precision)

    def loss(model: Any, rows: Rows, targets: int) -> Tensor:
        if is_scorer:
            return _ranking(model(input_ids=rows.tokens).logits[:, 0].float()) / targets
        # transformers shifts labels itself.
        labels = F.pad(rows.targets[:, :-1], (1, 0), value=IGNORE)
        return model(input_ids=rows.tokens, labels=labels, num_items_in_batch=targets).loss

    def checkpoint_blocks() -> None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})

    with ExitStack() as changes:
        # Liger replaces functions of the module, for everyone who comes later.
        changes.callback(vars(modeling_llama).update, dict(vars(modeling_llama)))
        if with_liger:
            from liger_kernel.transformers import apply_liger_kernel_to_llama

            apply_liger_kernel_to_llama(fused_linear_cross_entropy=not is_scorer, model=model)
        return Peer(model, loss, steps, device, checkpoint_blocks, undo=changes.pop_all().close)


def _ranking(scores: Tensor) -> Tensor:
    """Sum over pairs of the loss of a better answer (even rows) against a worse one."""
    return -F.logsigmoid(scores[0::2] - scores[1::2]).sum()


def _narrow(model: nn.Module, precision: Precision) -> None:
    """Parameters in the precision of the race; the rotary tables stay in fp32."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16 if precision == "bf16" else torch.float32)
