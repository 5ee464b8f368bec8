"""Open questions as a task: prompts, decoding, settings; what known answers score; real files from end to end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from engine.model_directory import ModelDirectory
from evals.characters import CharacterTokenizer
from evals.evaluation import conclude
from evals.generation import BUILDERS, GenerationTask
from evals.respondent import ModelRespondent
from evals.suite import BuildContext, parse_spec
from evals.task import Answer, Answered, Result
from model.chat import Message
from model.errors import InputError
from tests.evals.stubs import Stub, always, ask, guessing, knowing, text_of
from tests.tools.small_chat import write_small_chat_model

QA = [
    ("头晕怎么办？", "多休息，测血压。"),
    ("布洛芬怎么吃？", "每次0.5mg，饭后服。"),
    ("咳嗽三天了。", "多喝温水，不好再来。"),
    ("牙痛难忍。", "先看口腔科，拍个片。"),
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """qa.jsonl, more.jsonl and most.jsonl (exemplars), words.jsonl (one-word answers) and talk.jsonl (two turns)."""
    more = [("发热？", "物理降温。"), ("失眠？", "少喝茶。")]
    words = [("头晕？", "好"), ("牙痛？", "好")]
    for name, pairs in (("qa", QA), ("more", more), ("most", more[1:]), ("words", words)):
        rows = [{"question": question, "answer": answer} for question, answer in pairs]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    turns = [{"role": role, "content": text} for role, text in zip(("user", "assistant") * 2, "甲乙丙丁", strict=False)]
    row = {"messages": [{"role": "system", "content": "你是医生。"}, *turns]}
    (tmp_path / "talk.jsonl").write_text(json.dumps(row), encoding="utf-8")
    return tmp_path


def task(word: str, prompting: Any = "chat", **context: Any) -> GenerationTask:
    spec = parse_spec(word)
    built = BUILDERS[spec.name](spec, BuildContext(prompting, **context))
    spec.check_all_taken()
    assert isinstance(built, GenerationTask)
    return built


def values(result: Result) -> dict[str, float]:
    return {metric.name: metric.value for metric in result.metrics}


def gold(asked: GenerationTask) -> dict[str, int | str]:
    return {question.id: question.references[0] for question in asked.questions}


def test_messages_hold_system_exemplars_and_turns_in_this_order(folder: Path) -> None:
    (request,) = task(f"dialogue={folder}/talk.jsonl,shots=1,exemplars={folder}/more.jsonl").requests()
    assert request.prompt == (
        Message("system", "你是医生。"),
        Message("user", "发热？"),
        Message("assistant", "物理降温。"),
        Message("user", "甲"),
        Message("assistant", "乙"),
        Message("user", "丙"),
    )


def test_a_plain_prompt_writes_the_same_down_and_ends_where_the_answer_begins(folder: Path) -> None:
    (request,) = task(f"dialogue={folder}/talk.jsonl,shots=1,exemplars={folder}/more.jsonl", "plain").requests()
    assert request.prompt == "你是医生。\n\n患者：发热？\n医生：物理降温。\n\n患者：甲\n医生：乙\n患者：丙\n医生："
    assert request.sampling.stop == ["\n患者："]
    first = task(f"qa={folder}/qa.jsonl", "plain").requests()[0]
    assert (first.prompt, first.sampling.stop) == ("问：头晕怎么办？\n答：", ["\n问："])


def test_answers_are_greedy_by_default_and_sampled_as_published_in_paper_mode(folder: Path) -> None:
    def decoding(options: str) -> tuple[float, float, int, list[str]]:
        sampling = task(f"qa={folder}/qa.jsonl{options}").requests()[0].sampling
        return sampling.temperature, sampling.top_p, sampling.max_new_tokens, sampling.stop

    assert decoding("") == (0.0, 1.0, 512, [])
    assert decoding(",mode=paper") == (1.0, 0.85, 512, [])
    assert decoding(",mode=paper,temperature=0.2,top_p=1,max_new_tokens=256") == (0.2, 1.0, 256, [])


def test_settings_hold_whatever_decides_the_numbers(folder: Path) -> None:
    base = task(f"qa={folder}/qa.jsonl")
    assert base.settings["signature"].startswith("tok:char|norm:nfkc|")  # type: ignore[union-attr]
    others = [
        task(f"qa={folder}/qa.jsonl", "plain"),
        task(f"qa={folder}/qa.jsonl,mode=paper"),
        task(f"qa={folder}/qa.jsonl,temperature=0.5"),
        task(f"qa={folder}/qa.jsonl,shots=1,exemplars={folder}/more.jsonl"),
        task(f"qa={folder}/qa.jsonl,shots=1,exemplars={folder}/most.jsonl"),
        task(f"qa={folder}/qa.jsonl", seed=1),
        task(f"qa={folder}/qa.jsonl", limit=2),
        task(f"qa={folder}/qa.jsonl", limit=2, seed=1),
        task(f"qa={folder}/qa.jsonl,system=你是医生。"),
        task(f"qa={folder}/more.jsonl"),
    ]
    settings = [str(one.settings) for one in (base, *others)]
    assert len(set(settings)) == len(settings)
    assert task(f"qa={folder}/qa.jsonl,label=mine").settings == base.settings


def test_a_label_is_the_name(folder: Path) -> None:
    assert task(f"qa={folder}/qa.jsonl,label=mine").name == "mine"


def test_no_exemplar_is_shown_twice(folder: Path) -> None:
    pairs = [("发热？", "物理降温。"), ("发热？", "多喝水。"), ("失眠？", "少喝茶。")]
    rows = "\n".join(json.dumps({"question": question, "answer": answer}) for question, answer in pairs)
    (folder / "repeated.jsonl").write_text(rows, encoding="utf-8")
    asked = task(f"qa={folder}/qa.jsonl,shots=2,exemplars={folder}/repeated.jsonl")
    assert [one.references[0] for one in asked.exemplars] == ["物理降温。", "少喝茶。"]
    with pytest.raises(InputError, match=r"repeated\.jsonl holds 2 exemplars, but shots=3"):
        task(f"qa={folder}/qa.jsonl,shots=3,exemplars={folder}/repeated.jsonl")


def test_a_question_that_is_an_exemplar_is_not_asked(folder: Path) -> None:
    asked = task(f"qa={folder}/qa.jsonl,shots=2,exemplars={folder}/qa.jsonl")
    assert [question.id for question in asked.questions] == ["3", "4"]
    assert ask(asked, always()).counts["left_out_as_exemplars"] == 2


@pytest.mark.parametrize("prompting", ["chat", "plain"])
@pytest.mark.parametrize("mode", ["standard", "paper"])
def test_the_references_themselves_score_1_everywhere(folder: Path, prompting: str, mode: str) -> None:
    asked = task(f"qa={folder}/qa.jsonl,mode={mode}", prompting)
    result = ask(asked, knowing(gold(asked)))
    found = values(result)
    del found["distinct_1"], found["distinct_2"]
    assert found == pytest.approx(dict.fromkeys(found, 1.0), abs=1e-7)
    assert {"rouge_l", "bleu_4", "sentence_bleu_4", "length_ratio", "end_rate"} <= found.keys()
    assert ("paper_bleu_2" in found) == (mode == "paper")
    assert result.counts == {}


def test_metrics_are_those_of_the_libraries_with_intervals_around_them(folder: Path) -> None:
    from sacrebleu.metrics import BLEU

    asked = task(f"qa={folder}/qa.jsonl")
    said = {question.id: question.references[0][:3] + "多休息" for question in asked.questions}
    result = ask(asked, knowing(said))
    spaced = {text: " ".join(CharacterTokenizer().tokenize(text)) for _, text in QA}
    answers = [" ".join(CharacterTokenizer().tokenize(text)) for text in said.values()]
    for n in (1, 2, 4):
        library = BLEU(tokenize="none", max_ngram_order=n, force=True).corpus_score(answers, [list(spaced.values())])
        assert values(result)[f"bleu_{n}"] == pytest.approx(library.score / 100, rel=1e-12)
    for metric in result.metrics:
        if not metric.name.startswith("distinct"):
            assert metric.low is not None and metric.high is not None
            assert metric.low - 1e-12 <= metric.value <= metric.high + 1e-12, metric  # but for rounding
    one_token = ask(task(f"qa={folder}/words.jsonl"), always(text="好"))
    assert (values(one_token)["bleu_4"], values(one_token)["sentence_bleu_4"]) == (0.0, 1.0)  # sacrebleu's corpora
    assert one_token.counts == {"references_of_one_token": 2}
    assert all(type(count) is int for count in one_token.counts.values())


@pytest.mark.parametrize("mode", ["standard", "paper"])
def test_empty_answers_score_0_and_are_counted(folder: Path, mode: str) -> None:
    result = ask(task(f"qa={folder}/qa.jsonl,mode={mode}"), always(text=" \n"))
    found = values(result)
    assert found.pop("end_rate") == 1.0
    assert found.pop("distinct_1") != found.pop("distinct_2")  # nan: of no tokens
    assert found == dict.fromkeys(found, 0.0)
    assert result.counts["empty_answers"] == len(QA)


def test_items_hold_what_was_shown_said_and_right_and_sum_to_the_metrics(folder: Path) -> None:
    asked = task(f"qa={folder}/qa.jsonl,mode=paper,shots=1,exemplars={folder}/more.jsonl")
    result = ask(asked, always(text="多休息。"))
    first = result.items[0]
    assert first.shown == "[user] 发热？\n[assistant] 物理降温。\n[user] 头晕怎么办？"
    assert (first.answer, first.gold) == ("多休息。", "多休息，测血压。")
    assert first.texts == ("头晕怎么办？", "多休息，测血压。")
    found = values(result)
    for name in first.parts:
        numerator, denominator = (sum(item.parts[name][side] for item in result.items) for side in (0, 1))
        assert found[name] == pytest.approx(numerator / denominator), name


def test_several_references_are_numbered(tmp_path: Path) -> None:
    (tmp_path / "test.json").write_text(json.dumps([{"questions": ["头晕？"], "answers": ["多休息。", "测血压。"]}]))
    result = ask(task(f"huatuo26m={tmp_path}/test.json,mode=paper"), always(text="测血压。"))
    assert result.items[0].gold == "(1) 多休息。\n\n(2) 测血压。"
    found = values(result)
    for name in ("rouge_l", "bleu_4", "paper_rouge_l", "paper_rouge_2", "paper_bleu_2"):
        assert found[name] == pytest.approx(1.0, abs=1e-7), name


def test_what_went_wrong_with_answers_and_prompts_is_counted(folder: Path) -> None:
    asked = task(f"qa={folder}/qa.jsonl")
    answers = [
        Answered("多休息", "length", 3),
        Answered("", "stop", 1, dropped=2),
        Answered("多喝水", "stop", 3, cut=7),
        Answered("拍片", "stop", 2),
    ]
    result = asked.result(dict(zip("1234", answers, strict=True)))
    counts = conclude(asked, dict(zip("1234", answers, strict=True))).counts
    assert counts == {  # each once, under the name that it has in every task
        "empty_answers": 1,
        "answers_without_end": 1,
        "prompts_without_oldest_turns": 1,
        "prompts_cut": 1,
    }
    assert all(type(count) is int for count in counts.values())
    assert values(result)["end_rate"] == 0.75


def test_what_is_asked_twice_is_answered_once_unless_answers_are_drawn(tmp_path: Path) -> None:
    page = {"question": "头晕？", "answer_1": "多休息。", "answer_2": "测血压。"}
    (tmp_path / "ChiMed.v1.test.json").write_text(json.dumps(page), encoding="utf-8")
    asked = task(f"chimed={tmp_path}/ChiMed.v1.test.json")
    assert [request.id for request in asked.requests()] == ["1.1"]
    result = ask(asked, always(text="测血压。"))
    assert {item.id: (item.gold, item.parts["rouge_2"][0]) for item in result.items} == {
        "1.1": ("多休息。", 0.0),
        "1.2": ("测血压。", 1.0),
    }
    drawn = task(f"chimed={tmp_path}/ChiMed.v1.test.json,mode=paper")
    assert [request.id for request in drawn.requests()] == ["1.1", "1.2"]


def test_intervals_and_distinct_count_an_answer_to_two_references_once(tmp_path: Path) -> None:
    rows = [{"question": question, "answer_1": answer, "answer_2": answer} for question, answer in QA]
    (tmp_path / "pages.json").write_text(json.dumps(rows), encoding="utf-8")
    (tmp_path / "qa.json").write_text(json.dumps([{"question": q, "answer": a} for q, a in QA]), encoding="utf-8")
    answers = dict(zip((question for question, _ in QA), ("多休息", "饭后，饭后服", "好", "拍片服药"), strict=True))
    stub = Stub(lambda asked: [0.0], lambda asked: answers[text_of(asked.prompt)], name="fixed")
    words = f"chimed={tmp_path}/pages.json", f"qa={tmp_path}/qa.json"
    twice, once = (ask(task(word), stub) for word in words)
    for own, other in zip(twice.metrics, once.metrics, strict=True):
        assert (own.value, own.low, own.high) == pytest.approx((other.value, other.low, other.high), nan_ok=True)
    assert (twice.metrics[0].n, once.metrics[0].n) == (8, 4)


def test_guesses_score_what_chance_gives(tmp_path: Path) -> None:
    """One of four answers of one token is right with probability 1 / 4."""
    n = 400
    rows = [{"question": f"第{number}题？", "answer": "甲乙丙丁"[number % 4]} for number in range(n)]
    (tmp_path / "qa.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    found = values(ask(task(f"qa={tmp_path}/qa.jsonl"), guessing(sayings="甲乙丙丁")))
    within = 4 * (1 / 4 * 3 / 4 / n) ** 0.5  # four standard errors of a proportion
    for name in ("rouge_1", "rouge_l", "bleu_1", "sentence_bleu_1"):
        assert found[name] == pytest.approx(0.25, abs=within), name


def test_answers_to_other_questions_are_the_baseline(folder: Path) -> None:
    asked = task(f"qa={folder}/qa.jsonl")
    baselines = {name: value for who, name, value in ask(asked, always()).baselines}
    assert baselines.keys() >= {"rouge_l", "bleu_4"}
    assert 0 < baselines["rouge_1"] < 0.5  # a full stop at least is shared, and no more than little


def test_the_other_answer_of_a_page_is_no_answer_to_another_question(tmp_path: Path) -> None:
    pages = [("头晕？", "多休息。", "多休息。"), ("牙痛？", "拍片", "拍片")]
    rows = [{"question": question, "answer_1": first, "answer_2": second} for question, first, second in pages]
    (tmp_path / "ChiMed.v1.test.json").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    for seed in range(5):
        baselines = ask(task(f"chimed={tmp_path}/ChiMed.v1.test.json", seed=seed), always()).baselines
        assert {value for _, _, value in baselines} == {0.0}


def test_the_paper_mode_says_loudly_that_its_numbers_are_inflated(folder: Path) -> None:
    result = ask(task(f"qa={folder}/qa.jsonl,mode=paper"), always(text="甲乙丙丁戊己庚辛"))
    assert any("INFLATED" in note and "paper_bleu_1" in note for note in result.notes)
    found = values(result)
    assert found["bleu_2"] == 0.0 < 0.1 < found["paper_bleu_1"]  # nothing is right but the spaces


def test_dialogues_are_shown_by_department(real_data: Path) -> None:
    result = ask(task(f"mc-dialogue={real_data}/dialogue/hetmc_test.dialog"), always(text="好的"))
    assert len(result.items) == 18
    assert sum(metrics[0].n for metrics in result.groups.values()) == 18


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("qa", "--tasks qa: it needs a file of questions and answers"),
        ("mc-dialogue=none.dialog", "none.dialog is not there"),
        ("qa={}/qa.jsonl,shots=2", "shots and exemplars come together. Write shots=5,exemplars=FILE"),
        ("qa={}/qa.jsonl,exemplars={}/more.jsonl", "shots and exemplars come together"),
        ("qa={}/qa.jsonl,shots=1,exemplars=none.jsonl", "exemplars=none.jsonl is not there"),
        ("qa={}/qa.jsonl,shots=5,exemplars={}/more.jsonl", "more.jsonl holds 2 exemplars, but shots=5"),
        ("qa={}/qa.jsonl,shots=4,exemplars={}/qa.jsonl", "all questions of .*qa.jsonl are exemplars"),
        ("qa={}/qa.jsonl,mode=papers", "mode=papers is not one of standard, paper"),
        ("qa={}/qa.jsonl,top_p=2", "top_p=2 is not a number from 0 to 1"),
        ("qa={}/qa.jsonl,max_new_tokens=0", "max_new_tokens=0 is not a whole number"),
        ("qa={}/qa.jsonl,temperature=1,top_p=0", "top_p is 0.0; give a number above 0"),
        ("qa={}/qa.jsonl,temperature=inf", "temperature is inf"),
        ("chimed={}/qa.jsonl", '"answer_1" is missing'),
        ("qa={}/qa.jsonl,references=all", "references is none of its options"),
    ],
)
def test_what_cannot_be_is_refused_in_a_sentence(folder: Path, word: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        task(word.replace("{}", str(folder)))


@pytest.mark.parametrize("word", ["huatuo26m={}/qa/huatuo26m_test.json", "mc-dialogue={}/dialogue/hetmc_test.dialog"])
def test_real_files_are_answered_by_a_model_from_end_to_end(real_data: Path, tmp_path: Path, word: str) -> None:
    directory = ModelDirectory.open(str(write_small_chat_model(tmp_path / "model", 512)))
    model = ModelRespondent(directory, device="cpu", max_rows=16)
    for prompting in ("chat", "plain"):
        asked = task(f"{word.replace('{}', str(real_data))},max_new_tokens=4,mode=paper", prompting, limit=18)
        requests = asked.requests()
        assert all(isinstance(request, Answer) for request in requests)
        responses = dict(zip((request.id for request in requests), model.respond(requests), strict=True))
        result = asked.result(responses)
        assert len(result.items) == 18
        assert all(0 <= metric.value <= 1 for metric in result.metrics if metric.unit == "%")
        cut = sum(response.end_reason == "length" for response in responses.values())
        assert cut + round(18 * values(result)["end_rate"]) == 18
