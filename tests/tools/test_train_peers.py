"""The peers of the training benchmark compute what they should: otherwise a race against them would say nothing."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from contextlib import closing, nullcontext
from dataclasses import replace
from pathlib import Path
from traceback import walk_tb
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.models.llama import modeling_llama

from model.batch import IGNORE
from tools import train_peers
from tools.plain_decoder import PlainDecoder
from tools.train_cases import Case, Kind, named
from tools.train_data import Rows, Step, loader_of, made_up_corpus, steps_of
from tools.train_peers import MasterAdamW, Peer, hugging_face, missing, plain

CPU = torch.device("cpu")


def made_up_steps(case: Case, directory: Path) -> list[Step]:
    corpus = made_up_corpus(case.kind, case.context, case.model.vocab_size, 4000, 0, directory)
    with closing(loader_of(corpus, case.kind, 0, 256, case.context, 2)) as loader:
        return steps_of(loader, case.kind, case.context, 2)


def rows(length: int = 40) -> Rows:
    tokens = torch.randint(1, 160, (4, length), generator=torch.Generator().manual_seed(0))
    targets = F.pad(tokens[:, 1:], (0, 1), value=IGNORE)
    ends = torch.tensor([length - 1, 20, length - 1, 9])
    tokens[torch.arange(length) > ends[:, None]] = 0
    targets[torch.arange(length) >= ends[:, None]] = IGNORE
    return Rows(tokens, targets, ends)


def twins(kind: Kind) -> tuple[PlainDecoder, nn.Module]:
    """The plain decoder and transformers' model with the same weights."""
    config = named(f"mini-64-{kind}").model
    theirs = transformers.LlamaConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        rms_norm_eps=config.rms_norm_eps,
        attn_implementation="eager",
        pad_token_id=0,
        num_labels=1,
    )
    torch.manual_seed(0)
    ours = PlainDecoder(config)
    kinds = transformers.LlamaForSequenceClassification if kind == "reward" else transformers.LlamaForCausalLM
    other = kinds(theirs)
    with torch.no_grad():
        for mine, block in zip(ours.blocks, other.model.layers, strict=True):
            attention, mlp = block.self_attn, block.mlp
            projections = (attention.q_proj, attention.k_proj, attention.v_proj)
            mine.qkv.weight.copy_(torch.cat([one.weight for one in projections]))
            mine.out.weight.copy_(attention.o_proj.weight)
            mine.gate_up.weight.copy_(torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]))
            mine.down.weight.copy_(mlp.down_proj.weight)
            for norm, name in ((mine.attention_norm, "input"), (mine.mlp_norm, "post_attention")):
                norm.copy_(torch.rand_like(norm))
                getattr(block, f"{name}_layernorm").weight.copy_(norm)
        ours.embedding.weight.copy_(other.model.embed_tokens.weight)
        ours.head.weight.copy_((other.score if kind == "reward" else other.lm_head).weight)
        ours.norm.copy_(torch.rand_like(ours.norm))
        other.model.norm.weight.copy_(ours.norm)
    return ours, other


def test_the_plain_decoder_is_transformers_llama() -> None:
    ours, theirs = twins("full")
    batch = rows()
    logits = theirs(input_ids=batch.tokens, attention_mask=(batch.tokens != 0).long()).logits
    expected = F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), ignore_index=IGNORE, reduction="sum")
    assert ours(*batch).item() == pytest.approx(expected.item(), rel=1e-6)


def test_the_plain_scorer_is_transformers_sequence_classifier() -> None:
    ours, theirs = twins("reward")
    batch = rows()
    expected = theirs(input_ids=batch.tokens, attention_mask=(batch.tokens != 0).long()).logits[:, 0]
    torch.testing.assert_close(ours(*batch), expected, rtol=1e-5, atol=1e-6)


def test_checkpointed_blocks_and_blocks_that_a_compiler_takes_whole_have_the_same_gradients() -> None:
    def gradients(model: PlainDecoder) -> list[Tensor]:
        model.zero_grad()
        model(*rows()).backward()
        return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]

    model, _ = twins("full")
    expected = gradients(model)
    model.checkpointing = True
    torch.testing.assert_close(gradients(model), expected)
    model.checkpointing = False
    # The graph is traced, whole or not at all, and then run as it is.
    model.compile_parts(backend="eager")
    torch.testing.assert_close(gradients(model), expected)
    torch._dynamo.reset()


@pytest.mark.parametrize("is_ragged", [True, False])
def test_all_blocks_share_one_graph(is_ragged: bool) -> None:
    """The compiler refuses a ninth graph of one function: blocks that each had their own would not run."""
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    model = PlainDecoder(replace(named("mini-64-full").model, num_layers=12))
    model.compile_parts(backend, is_ragged)
    for length in (40, 32) if is_ragged else (40,):
        model(*rows(length)).backward()
    assert len(graphs) == 2  # a block, and the head
    torch._dynamo.reset()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_masters_take_the_step_that_adamw_takes_on_sums_in_fp32(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    parameter = nn.Parameter(torch.randn(8, 8).to(dtype))
    reference = nn.Parameter(parameter.detach().float())
    batches = torch.randn(3, 8, 8).to(dtype)
    optimizer = MasterAdamW([parameter])
    adamw = torch.optim.AdamW([reference], lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1)
    for _ in range(3):
        reference.grad = torch.zeros(8, 8)
        for batch in batches:
            (parameter * batch).sum().backward()
            reference.grad += batch.float()
        torch.nn.utils.clip_grad_norm_([reference], 1.0)
        optimizer.step()
        adamw.step()
        assert parameter.grad is None
    assert torch.equal(parameter, reference.to(dtype))


@pytest.mark.parametrize("kind", ["sft", "reward"])
def test_one_step_of_each_peer_is_the_same_step(kind: Kind, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In whatever batches: the losses of a step's batches add up to its mean."""
    case = named(f"mini-64-{kind}")
    steps = made_up_steps(case, tmp_path)
    monkeypatch.setattr(train_peers, "fastest", lambda speeds: 3)
    losses = []
    for make in (
        lambda: plain(case.model, steps, CPU, "fp32", is_ragged=True),
        lambda: hugging_face(case.model, steps, CPU, "fp32", with_liger=False),
    ):
        peer = make()
        with torch.no_grad():
            for parameter in peer._model.parameters():
                parameter.fill_(0.01)
        losses.append([sum(_losses(peer, units, steps)) for units in (1, 100)])
        peer.close()
    assert losses[0] == pytest.approx(losses[0][:1] * 2, rel=1e-5)
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def _losses(peer: Peer, units: int, steps: list[Step]) -> list[float]:
    with torch.no_grad():
        return [float(peer._loss(peer._model, batch, steps[0].targets)) for batch in steps[0].batches(units)]


def test_a_peer_that_fits_only_with_checkpoints_takes_them(tmp_path: Path) -> None:
    case = named("mini-64-full")
    steps = made_up_steps(case, tmp_path)
    model = PlainDecoder(case.model)

    def loss(model: PlainDecoder, batch: Rows, targets: int) -> Tensor:
        if not model.checkpointing or len(batch.tokens) > 2:
            raise torch.cuda.OutOfMemoryError
        return model(*batch) / targets

    def checkpoint_blocks() -> None:
        model.checkpointing = True

    peer = Peer(model, loss, steps, CPU, checkpoint_blocks)
    assert peer.is_checkpointing and peer.units <= 2 and "blocks checkpointed" in peer.settings
    before = model.head.weight.detach().clone()
    peer.step()
    assert not torch.equal(model.head.weight, before)


def test_peers_run_without_our_determinism_and_leave_it_as_it_was(tmp_path: Path) -> None:
    case = named("mini-64-full")
    seen = []

    def loss(model: PlainDecoder, batch: Rows, targets: int) -> Tensor:
        seen.append(torch.are_deterministic_algorithms_enabled())
        return model(*batch) / targets

    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        peer = Peer(PlainDecoder(case.model), loss, made_up_steps(case, tmp_path), CPU, lambda: None)
        peer.step()
        assert not any(seen) and torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("failing", [None, "patching", "building"])
def test_what_liger_replaced_is_put_back(failing: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def patch(**options: object) -> None:
        modeling_llama.apply_rotary_pos_emb = print  # as Liger-Kernel does
        if failing == "patching":
            raise TypeError("another version")

    def make_room(optimizer: MasterAdamW) -> None:
        assert modeling_llama.apply_rotary_pos_emb is print
        if failing == "building":
            raise torch.cuda.OutOfMemoryError

    library = types.SimpleNamespace(apply_liger_kernel_to_llama=patch)
    monkeypatch.setitem(sys.modules, "liger_kernel", types.SimpleNamespace(transformers=library))
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", library)
    monkeypatch.setattr(MasterAdamW, "make_room", make_room)
    monkeypatch.setattr(Peer, "_speeds", lambda peer: {1: 1.0})
    case, before = named("mini-64-full"), modeling_llama.apply_rotary_pos_emb
    with pytest.raises((TypeError, torch.cuda.OutOfMemoryError)) if failing else nullcontext():
        hugging_face(case.model, made_up_steps(case, tmp_path), CPU, "fp32", with_liger=True).close()
    assert modeling_llama.apply_rotary_pos_emb is before


def test_a_peer_of_which_nothing_fits_says_so_and_holds_nothing(tmp_path: Path) -> None:
    case = named("mini-64-full")
    model = PlainDecoder(case.model)
    undone = []

    def loss(model: PlainDecoder, batch: Rows, targets: int) -> Tensor:
        raise torch.cuda.OutOfMemoryError

    with pytest.raises(torch.cuda.OutOfMemoryError, match="a single row is too much") as caught:
        Peer(model, loss, made_up_steps(case, tmp_path), CPU, lambda: None, undo=lambda: undone.append(1))
    frames = [frame.f_locals["self"] for frame, _ in walk_tb(caught.tb) if isinstance(frame.f_locals.get("self"), Peer)]
    assert undone == [1] and frames and all(not vars(peer) for peer in frames)


def test_who_is_missing_is_said_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("cuda")
    assert missing("liger", CPU) == "Liger-Kernel runs on GPUs only"
    monkeypatch.setattr(train_peers.importlib.util, "find_spec", lambda name: None)
    assert missing("liger", gpu) == missing("transformers", gpu)
    assert missing("transformers", CPU).endswith("pip install transformers")
    monkeypatch.setattr(train_peers.importlib.util, "find_spec", lambda name: name != "liger_kernel" or None)
    assert missing("liger", gpu).endswith("pip install liger-kernel")
    assert missing("plain", gpu) == missing("transformers", gpu) == ""
