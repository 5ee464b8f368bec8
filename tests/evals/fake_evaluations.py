"""Two or more models that were never evaluated: everything a report can be made of, with numbers drawn by a seed."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from engine.intervals import wilson_interval
from evals.comparison import bootstrap_interval
from evals.contamination import Contamination
from evals.evaluation import Evaluation
from evals.gram_index import Overlap
from evals.task import Item, Metric, Result

SUBJECTS = {
    "anatomy 解剖学": 37,
    "clinical_knowledge 临床知识": 59,
    "genetics 遗传学": 44,
    "nutrition 营养学": 36,
    "virology 病毒学": 42,
}
TYPES = ("疾病和诊断", "药物", "解剖部位")
NASTY = (
    '</p></dd><script>alert("1")</script>| a | `code` **bold** $x$ \x1b[31mred\x1b[0m \u202egnp.exe\u202c '
    "<img src=x onerror=alert(2)> \ud83d &amp; [link](javascript:alert(3)) {{ 7 * 7 }}\x00"
)
"""What a model might say: markup of a page, a table, a template and a terminal, and half a character."""


def choice(skill: float, seed: int) -> Result:
    rng = random.Random(seed)
    items = []
    for subject, count in SUBJECTS.items():
        for number in range(count):
            gold = "ABCD"[random.Random(f"{subject}{number}").randrange(4)]
            is_right = rng.random() < skill
            said = gold if is_right else rng.choice([letter for letter in "ABCD" if letter != gold])
            question = f"以下是关于{subject}的单项选择题。\n题目：第{number + 1}题，下列说法中正确的是？"
            prompt = f"{question}\nA. 甲\nB. 乙\nC. 丙\nD. 丁\n答案："
            parts = {"accuracy": (float(is_right), 1.0), "subject_mean": (float(is_right), 1.0)}
            items.append(Item(f"{subject}/{number}", parts, prompt, said, gold, subject, (prompt,)))
    groups = {subject: (accuracy([item for item in items if item.group == subject]),) for subject in SUBJECTS}
    mean = sum(metrics[0].value for metrics in groups.values()) / len(groups)
    subject_mean = Metric(
        "subject_mean", mean, *bootstrap_interval(items, "subject_mean", 0, by_group=True), n=len(items)
    )
    baselines = tuple(
        (f"always {letter}", "accuracy", sum(item.gold == letter for item in items) / len(items)) for letter in "ABCD"
    )
    return Result(
        (accuracy(items), subject_mean), tuple(items), groups, baselines, {"unparsed": seed % 3, "dropped_exemplars": 0}
    )


def accuracy(items: Sequence[Item]) -> Metric:
    value = sum(item.parts["accuracy"][0] for item in items) / len(items)
    return Metric("accuracy", value, *wilson_interval(value, len(items)), len(items))


def entities(skill: float, seed: int) -> Result:
    rng = random.Random(seed)
    items = []
    for number in range(60):
        gold = 1 + number % 5
        hit = sum(rng.random() < skill for _ in range(gold))
        noise = int(rng.random() < 0.5)
        parts = {"micro_f1": (2.0 * hit, float(gold + hit + noise)), "recall": (float(hit), float(gold))}
        text = f"患者{20 + number}岁，因反复咳嗽、咳痰{number + 1}天入院，予阿莫西林治疗后好转。"
        items.append(Item(str(number), parts, text, "咳嗽 症状\n阿莫西林 药物", "阿莫西林 药物", texts=(text,)))
    metrics = tuple(ratio(items, name) for name in ("micro_f1", "recall"))
    groups = {name: (Metric("f1", skill - 0.05 * at, skill - 0.1, skill + 0.05, 60),) for at, name in enumerate(TYPES)}
    notes = ("Mentions are compared as texts; this file has no places.",)
    return Result(metrics, tuple(items), groups, (), {"unparsed": 4}, notes)


def generation(skill: float, seed: int) -> Result:
    rng = random.Random(seed)
    items = []
    for number in range(80):
        score = min(1.0, max(0.0, rng.gauss(skill, 0.08)))
        answer = "建议多休息，清淡饮食，必要时到呼吸内科就诊。" * (40 if number == 7 else 1)
        if number == 9:
            answer = NASTY
        parts = {
            "rouge_l": (score, 1.0),
            "rouge_1": (score * 1.3, 1.0),
            "length_ratio": (float(len(answer)), 30.0),
            "paper_rouge_1": (score, 1.0),
        }
        items.append(
            Item(
                str(number), parts, f"医生您好，我咳嗽{number}天了，怎么办？", answer, "注意休息，多喝水。", "呼吸内科"
            )
        )
    metrics = [ratio(items, "rouge_l"), ratio(items, "rouge_1")]
    metrics += [Metric("bleu_4", skill / 4, skill / 4 - 0.01, skill / 4 + 0.012, 80)]
    length = ratio(items, "length_ratio")
    metrics += [
        Metric("length_ratio", length.value, length.low, length.high, 80, "", None),
        ratio(items, "paper_rouge_1"),
    ]
    baselines = (("answers to other questions", "rouge_l", 0.11), ("answers to other questions", "rouge_1", 0.14))
    return Result(
        tuple(metrics), tuple(items), {}, baselines, {"answers_without_end": 3}, ("BLEU here is of the corpus.",)
    )


def attitudes(skill: float, seed: int) -> Result:
    rng = random.Random(seed)
    items = []
    for number in range(40):
        points = 2.5 - skill + rng.random()
        parts = {"score": (40 * points, 1.0), "stigma": ((points - 1) / 4, 1.0)}
        items.append(
            Item(
                str(number),
                parts,
                f"说法{number}：……您是否同意？",
                "不同意",
                "",
                ("AU", "BE", "SR", "CMHI")[number % 4],
            )
        )
    score, stigma = ratio(items, "score"), ratio(items, "stigma")
    metrics = (
        Metric("score", score.value, score.low, score.high, 40, "points", "lower"),
        Metric("stigma", stigma.value, stigma.low, stigma.high, 40, "%", "lower"),
        Metric("letter_entropy", 0.91, n=40),
    )
    groups = {
        name: (Metric("subscale_score", 22.0 + at - 3 * skill, 19.0, 28.0, 10, "points", "lower"),)
        for at, name in enumerate(("AU", "BE", "SR", "CMHI"))
    }
    return Result(metrics, tuple(items), groups, (("always the same letter", "score", 120.0),))


def reward(skill: float, seed: int) -> Result:
    rng = random.Random(seed)
    items = tuple(
        Item(
            str(number),
            {"reward": (rng.gauss(3 * skill - 1, 1.0), 1.0), "tokens": (float(rng.randint(15, 60)), 1.0)},
            f"头痛{number}天，要做检查吗？",
            f"建议先测血压，再决定是否检查。（{seed}）",
            "",
        )
        for number in range(70)
    )
    mean, tokens = ratio(items, "reward"), ratio(items, "tokens")
    metrics = (
        Metric("reward", mean.value, mean.low, mean.high, 70, "score"),
        Metric("tokens", tokens.value, tokens.low, tokens.high, 70, "tokens", None),
    )
    return Result(metrics, items, notes=("Rewards compare models under one reward model.",))


def perplexity(skill: float, seed: int) -> Result:
    rng = random.Random(seed)
    items = tuple(
        Item(str(number), {"nats_per_token": (rng.gauss(2.4 - skill, 0.2) * 90, 90.0)}, "", "", "", "")
        for number in range(30)
    )
    nats = ratio(items, "nats_per_token")
    metrics = (
        Metric("nats_per_token", nats.value, nats.low, nats.high, 30, "nats", "lower"),
        Metric("perplexity", 2.718281828459045**nats.value, None, None, 30, "", "lower"),
    )
    return Result(metrics, items)


def ratio(items: Sequence[Item], name: str) -> Metric:
    top, bottom = (sum(item.parts[name][side] for item in items) for side in (0, 1))
    return Metric(name, top / bottom, *bootstrap_interval(items, name, 0), n=len(items))


TASKS: dict[str, tuple[str, Callable[[float, int], Result], dict[str, str | int]]] = {
    "cmmlu-paper": ("choice", choice, {"protocol": "gen", "shots": 5, "prompting": "chat"}),
    "ccks2019": ("entities", entities, {"protocol": "json", "shots": 0, "prompting": "chat"}),
    "chimed": ("generation", generation, {"shots": 0, "signature": "bleu|tok:char|case:lower|version:1"}),
    "cami": ("attitudes", attitudes, {"mode": "letters", "orders": 120}),
    "reward": ("reward", reward, {"reward_model": "5f3c"}),
    "perplexity": ("perplexity", perplexity, {"context": 4096}),
}


def evaluation(model: str, skill: float, seed: int, leaked: int = 0) -> Evaluation:
    """A model of some skill. leaked: how many questions of cmmlu-paper stand in its training texts."""
    results = {name: make(skill, seed) for name, (_, make, _) in TASKS.items()}
    items = results["cmmlu-paper"].items
    overlaps = {
        item.id: Overlap(20, 20 if at < leaked else 0, 32 if at < leaked else 0) for at, item in enumerate(items)
    }
    return Evaluation(
        model,
        f"ckpt/{model}",
        f"{seed:032x}",
        results,
        {name: {"task": name, **settings, "seed": 0} for name, (_, _, settings) in TASKS.items()},
        {name: kind for name, (kind, _, _) in TASKS.items()},
        {"cmmlu-paper": Contamination(13, ("corpus/",), 10_000, overlaps)} if leaked else {},
        "2026-03-14T15:09:26Z",
        {"chimed-engine": "0.1.0", "torch": "2.13.0"},
        f"tools/evaluate_model.py --model ckpt/{model}",
    )
