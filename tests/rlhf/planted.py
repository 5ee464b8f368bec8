"""Comparisons under a rule that is known: what a phrase is worth. Written as the graded lists that people have."""

from __future__ import annotations

import json
import random
from pathlib import Path

PHRASES = ["注意休息", "低盐饮食", "按时服药", "定期复查", "避免受凉", "适量运动"]
PHRASES += ["头晕", "乏力", "咳嗽", "腹痛", "皮疹", "发热"]
WORTH = {phrase: place / 5.5 - 1 for place, phrase in enumerate(random.Random(0).sample(PHRASES, len(PHRASES)))}
"""From -1 to 1 in even steps."""
SUBJECTS = ["高血压", "糖尿病", "支气管哮喘", "慢性胃炎", "偏头痛", "缺铁性贫血", "湿疹", "肺炎"]


def worth(answer: str) -> float:
    """The planted reward: the sum of its phrases' worth; 0 on the average, so length is worth nothing."""
    return sum(WORTH[phrase] for phrase in answer.rstrip("。").split("，"))


def write_comparisons(path: Path, prompts: int, answers: int, first: int = 0) -> Path:
    """Prompts number `first` and on, each with so many distinct answers; the first answers are the same for any K."""
    rows = []
    for number in range(first, first + prompts):
        chance = random.Random(number)
        texts: dict[str, None] = {}
        while len(texts) < answers:
            texts["，".join(chance.choices(PHRASES, k=chance.randint(2, 6))) + "。"] = None
        subject = SUBJECTS[number % len(SUBJECTS)]
        listed = [{"text": text, "score": round(worth(text), 4)} for text in texts]
        rows.append({"prompt": f"患者{number}，{subject}，怎么办？", "responses": listed})
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return path
