"""Perplexity against transformers, and against the held-out loss of pre-training on the same file."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from engine.data.corpus import open_corpus
from engine.data.loader import evaluation_batches
from engine.data.prepare import prepare
from engine.evaluation import held_out_loss
from engine.mesh import Runtime
from engine.model_directory import ModelDirectory
from engine.step import next_token_loss
from evals.perplexity import PerplexityTask, build
from evals.respondent import ModelRespondent
from evals.suite import BuildContext, parse_spec
from evals.task import Result
from model.errors import InputError
from model.tokenizer import Tokenizer
from tests.evals.stubs import always, ask
from tests.model.tiny import loaded
from tests.small_base import small_texts, write_small_data
from tests.tools.small_chat import write_small_chat_model

DOCUMENTS = 30


def perplexity_task(path: Path, options: str = "", context: BuildContext | None = None) -> PerplexityTask:
    found = build(parse_spec(f"perplexity={path}{options and ','}{options}"), context or BuildContext())
    assert isinstance(found, PerplexityTask)
    return found


def values(result: Result) -> dict[str, float]:
    return {metric.name: metric.value for metric in result.metrics}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """model: random weights; data.jsonl: distinct notes that fit its context, the shortest left out."""
    folder = tmp_path_factory.mktemp("perplexity")
    write_small_chat_model(folder / "model", 256)
    write_small_data(folder / "data.jsonl", DOCUMENTS)
    return folder


@pytest.fixture(scope="module")
def result(folder: Path) -> Result:
    task = perplexity_task(folder / "data.jsonl")
    requests = task.requests()
    respondent = ModelRespondent(ModelDirectory.open(str(folder / "model")), device="cpu")
    responses = respondent.respond(requests)
    return task.result(dict(zip([request.id for request in requests], responses, strict=True)))


def transformers_nats(folder: Path) -> list[tuple[float, float, int]]:
    """Of each note: nats of its tokens given bos, nats of eos behind it, how many tokens it has."""
    from transformers import AutoModelForCausalLM

    tokenizer = Tokenizer.load(folder / "model")
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    found = []
    for text in small_texts(DOCUMENTS):
        ids = torch.tensor([[tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id]])
        with torch.no_grad():
            logprobs = model(ids).logits[0, :-1].double().log_softmax(-1)
        nats = -logprobs.gather(1, ids[0, 1:, None])[:, 0]
        found.append((nats[:-1].sum().item(), nats[-1].item(), len(nats) - 1))
    return found


def test_every_figure_is_that_of_transformers(folder: Path, result: Result) -> None:
    oracle = transformers_nats(folder)
    nats, texts = sum(own for own, _, _ in oracle), small_texts(DOCUMENTS)
    found = values(result)
    assert result.metrics[0].n == DOCUMENTS
    assert found["nats_per_token"] == pytest.approx(nats / sum(count for _, _, count in oracle), rel=1e-5)
    assert found["nats_per_character"] == pytest.approx(nats / sum(map(len, texts)), rel=1e-5)
    assert found["nats_per_byte"] == pytest.approx(nats / sum(len(text.encode()) for text in texts), rel=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(found["nats_per_token"]))
    for item, (own, _, _) in zip(result.items, oracle, strict=True):
        assert item.parts["nats_per_token"][0] == pytest.approx(own, rel=1e-5)


def test_the_held_out_loss_of_pre_training_is_the_same_but_for_the_end_of_each_document(
    folder: Path, result: Result
) -> None:
    prepared = prepare([folder / "data.jsonl"], Tokenizer.load(folder / "model"), folder / "prepared", workers=1)
    batches = evaluation_batches(open_corpus([prepared]), 512, 256)
    alone = Runtime(0, 1, torch.device("cpu"), mesh=None)  # type: ignore[arg-type]
    loss = held_out_loss(loaded(folder / "model"), next_token_loss(), batches, alone)
    nats = sum(item.parts["nats_per_token"][0] for item in result.items)
    tokens = sum(item.parts["nats_per_token"][1] for item in result.items)
    ends = sum(end for _, end, _ in transformers_nats(folder))
    assert loss == pytest.approx((nats + ends) / (tokens + DOCUMENTS), rel=1e-5)
    assert abs(loss - nats / tokens) > 1e-3  # so that the ends can be seen


def test_an_interval_holds_the_value_and_perplexity_has_the_ends_of_its_logarithm(result: Result) -> None:
    for metric in result.metrics:
        assert metric.low is not None and metric.high is not None and metric.low < metric.value < metric.high
    per_token, perplexity = result.metrics[2], result.metrics[3]
    assert per_token.low is not None and per_token.high is not None
    assert (perplexity.low, perplexity.high) == pytest.approx((math.exp(per_token.low), math.exp(per_token.high)))


def test_a_bit_a_character_is_a_perplexity_of_two(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("一二三四五六七八九十\nabcdefghij\n", encoding="utf-8")
    found = values(ask(perplexity_task(tmp_path / "a.txt", "document=line"), always()))
    assert found == pytest.approx(
        {
            "nats_per_character": math.log(2),
            "nats_per_byte": math.log(2) * 20 / 40,
            "nats_per_token": math.log(2),
            "perplexity": 2,
        }
    )


def test_documents_are_those_of_pre_training_and_what_is_left_out_is_counted(tmp_path: Path) -> None:
    texts = ["第一篇文章，足够长了。", "短", "半\ud800个字符，不能用的文章。", "第二篇文章，也足够长。"]
    rows = [{"text": text} for text in texts]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = ask(perplexity_task(tmp_path / "a.jsonl"), always())
    assert [item.id for item in result.items] == ["a.jsonl:1", "a.jsonl:4"]
    assert result.counts == {"malformed": 1, "too_short": 1}
    assert len(ask(perplexity_task(tmp_path / "a.jsonl", "min_characters=1"), always()).items) == 3


def test_several_files_are_also_reported_one_by_one(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text(f"文件{name}里有一些足够长的文字。", encoding="utf-8")
    result = ask(perplexity_task(tmp_path), always())
    assert [*result.groups] == ["a.txt", "b.txt"]
    assert [item.group for item in result.items] == ["a.txt", "b.txt"]


def test_records_of_one_line_have_ids_of_their_own(tmp_path: Path) -> None:
    rows = [{"text": "第一篇文章，足够长了。"}, {"text": "第二篇文章，也足够长。"}]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    assert [request.id for request in perplexity_task(tmp_path / "a.json").requests()] == ["a.json:1", "a.json:1.2"]


def test_a_limit_draws_documents(tmp_path: Path) -> None:
    write_small_data(tmp_path / "data.jsonl", 50)
    task = perplexity_task(tmp_path / "data.jsonl", context=BuildContext(limit=7))
    assert len(task.requests()) == 7 == task.settings["documents"]


def test_named_fields_are_joined(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"title": "标题在这里", "body": "正文在这里呢"}) + "\n")
    [item] = ask(perplexity_task(tmp_path / "a.jsonl", "fields=title+body"), always()).items
    assert item.shown == "标题在这里\n正文在这里呢"


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (
            '{"messages": [{"role": "user", "content": "你好"}]}',
            "conversations are for tools/sft.py. Name the fields to be ",
        ),
        ('{"text": "短"}', "there is no text in it (1 too short). Give another file."),
    ],
)
def test_a_file_without_texts_is_refused(tmp_path: Path, content: str, sentence: str) -> None:
    (tmp_path / "a.jsonl").write_text(content + "\n", encoding="utf-8")
    with pytest.raises(InputError) as refused:
        perplexity_task(tmp_path / "a.jsonl")
    assert sentence in str(refused.value)
