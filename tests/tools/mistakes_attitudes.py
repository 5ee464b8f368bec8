"""What users get wrong with attitude scales, reward and perplexity: one mistake a row of docs/errors.md.

Each is played in the folder of `mistakes_rm.py`, where `tuned` is what fine-tuning has left.
"""

from __future__ import annotations

import json

from tests.tools.mistakes import Mistake

ITEMS = [{"id": number, "text": f"陈述{number}。"} for number in range(1, 41)]
TEA = {
    "options_low_to_high": ["不赞成", "说不好", "赞成"],
    "items": [{"id": 1, "text": "下午喝茶会打扰工作。", "agreeing_is_stigma": True}],
}


def asked(task: str, items: object = None, **files: str) -> Mistake:
    """An evaluation in one task, beside an items file."""
    spoil = {"items.json": json.dumps(items, ensure_ascii=False), **files}
    return Mistake("evaluate_model", ("--model", "tuned", "--tasks", task, "--out", "new"), spoil)


MISTAKES_ATTITUDES: dict[str, Mistake] = {
    "an items file that is not whole": asked("cami=items.json", {"items": ITEMS[:39]}),
    "as many statements as another scale has": asked("mica4=items.json", [item["text"] for item in ITEMS]),
    "an item under the number of another": asked(
        "cami=items.json", {"items": [{**ITEMS[0], "subscale": "benevolence"}, *ITEMS[1:]]}
    ),
    "two items of one number": asked("cami=items.json", {"items": [*ITEMS, ITEMS[0]]}),
    "a scale of one's own without its key": asked(
        "attitudes=items.json", {**TEA, "items": [{"id": 1, "text": "下午喝茶会打扰工作。"}]}
    ),
    "orders of options that are not balanced": asked("attitudes=items.json,orders=7", TEA),
    "a protocol that is only known for published scales": asked("attitudes=items.json,mode=paper", TEA),
    "answers that nobody judges": asked("reward=chats.jsonl"),
    "conversations in the place of held-out texts": asked("perplexity=chats.jsonl"),
}
