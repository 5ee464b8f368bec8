"""What PyPI's rouge 1.0.1 says of pairs of texts, kept for test_paper_metrics.py. To record again:

python -m venv /tmp/rouge && /tmp/rouge/bin/pip install rouge==1.0.1
PYTHONPATH=. /tmp/rouge/bin/python tests/evals/record_rouge.py
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

RECORDED = Path(__file__).parent / "recorded" / "rouge_1.0.1.json"
# Full stops of ASCII within numbers, alone and in rows; spaces; dashes and quotes; characters that are repeated.
PIECES = (
    "头孢",
    "布洛芬",
    "0.5mg",
    "每日",
    "三次",
    "，",
    "。",
    "不要",
    "饮酒",
    "复查",
    " ",
    "CT",
    "120/80",
    "\n",
    "...",
)
PIECES += ("v1.2.", "“高血压”", "—", "一", "一一", ".")


def record() -> None:
    from rouge import Rouge

    from evals.paper_metrics import space_out

    sys.setrecursionlimit(100_000)
    draw = random.Random(20231111)
    cases = []
    for _ in range(300):
        answer, reference = ("".join(draw.choices(PIECES, k=draw.randint(0, 25))) for _ in range(2))
        try:
            scores = Rouge().get_scores(space_out(answer), space_out(reference))[0]
            said = [scores[name]["f"] for name in ("rouge-1", "rouge-2", "rouge-l")]
        except ValueError:  # one of them is nothing but full stops
            said = None
        cases.append((answer, reference, said))
    RECORDED.write_text(json.dumps(cases, ensure_ascii=False, indent=None) + "\n", encoding="utf-8")


if __name__ == "__main__":
    record()
