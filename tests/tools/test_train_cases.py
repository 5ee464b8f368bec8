"""The cases of the training benchmark: their names, their order, and the plans they run by."""

from __future__ import annotations

import pytest

from engine.memory import plan
from engine.memory_setup import Setup
from engine.step_seconds import step_seconds
from model.config import PRESETS
from model.errors import InputError
from tools.train_cases import default_cases, fitted, named, ways

GIB = 1 << 30
H200 = int(139.8 * GIB)


def test_a_name_says_shape_context_and_kind() -> None:
    case = named("7b-8192-reward")
    assert (case.shape, case.context, case.kind, case.name) == ("7b", 8192, "reward", "7b-8192-reward")
    assert case.model.head == "score" and case.model.rope_length == case.model.max_position_embeddings == 8192
    assert case.model.hidden_size == PRESETS["7b"].hidden_size and case.model.num_layers == 32


@pytest.mark.parametrize("name", ["7b-4096", "8b-4096-full", "7b-4096-dpo", "7b-x-full", ""])
def test_a_name_of_nothing_is_refused(name: str) -> None:
    with pytest.raises(InputError, match=r"--cases: .* is no case. Write shape-context-kind, such as 7b-4096-full"):
        named(name)


def test_every_shape_context_and_kind_is_there_once_and_those_with_a_target_come_first() -> None:
    names = [case.name for case in default_cases(is_on_gpu=True)]
    assert names[:2] == ["7b-4096-full", "1b-4096-full"] and names[2].endswith("sft")
    assert sorted(names) == sorted(
        f"{shape}-{context}-{kind}"
        for shape in ("1b", "7b", "13b")
        for context in (4096, 8192)
        for kind in ("full", "ragged", "sft", "reward")
    )


def test_what_makes_the_shortest_step_comes_first_and_all_fit() -> None:
    found = ways(named("1b-4096-full"), 32768, "bf16", H200).plans
    assert (found[0].setup.recompute, found[0].setup.tokens_per_pack) == ("none", 32768)
    seconds = [step_seconds(one.config, one.setup).total for one in found]
    assert seconds == sorted(seconds)
    assert all(one.fits(H200) for one in found)
    assert all(one.setup.tokens_per_pack * one.setup.micro_batches == 32768 for one in found)
    assert {one.setup.recompute for one in found} == {"none", "selective", "full"}
    smaller = ways(named("1b-4096-full"), 32768, "bf16", 30 * GIB).plans
    assert smaller[0].fits(30 * GIB) and smaller[0].setup.tokens_per_pack < 32768
    assert ways(named("7b-4096-full"), 32768, "bf16", 24 * GIB).plans == []


def test_what_is_asked_for_is_taken() -> None:
    found = ways(named("1b-4096-full"), 32768, "bf16", H200, "full", 8192).plans
    assert [(one.setup.recompute, one.setup.tokens_per_pack) for one in found] == [("full", 8192)]


def test_a_pack_holds_both_answers_of_a_pair() -> None:
    sizes = {one.setup.tokens_per_pack for one in ways(named("1b-4096-reward"), 32768, "bf16", H200).plans}
    assert min(sizes) == 8192


@pytest.mark.parametrize(("batch", "pack"), [(32768, 2048), (32768, 12288), (2048, None)])
def test_packs_that_hold_no_document_or_divide_no_step_are_refused(batch: int, pack: int | None) -> None:
    with pytest.raises(InputError, match=r"--batch_tokens .* does not divide into packs that hold 4096 tokens"):
        ways(named("1b-4096-full"), batch, "bf16", H200, None, pack)


def test_as_many_layers_as_fit_and_not_one_more() -> None:
    case = fitted(named("13b-4096-full"), 32768, "bf16", H200)
    assert 0 < case.model.num_layers < PRESETS["ziya2-13b"].num_layers

    def needed(layers: int) -> int:
        model = named("13b-4096-full").model
        cut = type(model)(**{**vars(model), "num_layers": layers})
        # Peers have two bytes a parameter more.
        return plan(cut, Setup(4096, 4096, micro_batches=8)).needed_bytes + 2 * cut.num_parameters

    assert needed(case.model.num_layers) <= H200 < needed(case.model.num_layers + 1)
    assert fitted(named("7b-4096-full"), 32768, "bf16", H200).model.num_layers == 32
    with pytest.raises(InputError, match="No layer of 13b-4096-full fits"):
        fitted(named("13b-4096-full"), 32768, "bf16", GIB)
