"""Small files in the formats of the datasets: our own sentences, marked as theirs are."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from evals.entity_files import LAYOUTS

# (text, [(mention, nth place, type by its place in the dataset's table)]); repeated, nested, spaced, wide, none.
NOTES: tuple[tuple[str, list[tuple[str, int, int]]], ...] = (
    (
        "患者发热三天，诊断肺炎，予头孢克肟口服，肺炎好转。",
        [("发热", 0, 1), ("肺炎", 0, 0), ("头孢克肟", 0, 4), ("肺炎", 1, 0)],
    ),
    ("呼吸肌麻痹时应行胸部 ＣＴ 检查。", [("呼吸肌", 0, 2), ("呼吸肌麻痹", 0, 1), ("胸部 ＣＴ", 0, 5)]),
    ("今日天气晴。", []),
    ("血常规示白细胞升高，考虑扁桃体炎、咽炎。", [("血常规", 0, 5), ("扁桃体炎、咽炎", 0, 0)]),
    ("偏头痛反复发作，口服布洛芬。", [("偏头痛", 0, 0), ("布洛芬", 0, 4)]),
)
MORE: tuple[tuple[str, list[tuple[str, int, int]]], ...] = (
    ("咳嗽两周，口服氨溴索。", [("咳嗽", 0, 1), ("氨溴索", 0, 4)]),
    ("诊断胃炎，行胃镜。", [("胃炎", 0, 0), ("胃镜", 0, 5)]),
    ("上腹部疼痛。", [("上腹部", 0, 2), ("疼痛", 0, 1)]),
)
OWN_TYPES = ("疾病", "症状", "部位", "治疗", "药物", "检查")
# The file's own word for the type with this place in NOTES.
CODES = {
    "entities": OWN_TYPES,
    "chimst": OWN_TYPES,
    "ccks2019": ("疾病和诊断", "疾病和诊断", "解剖部位", "手术", "药物", "影像检查"),
    "cmeee": ("dis", "sym", "bod", "pro", "dru", "ite"),
    "cmedqaner": ("disease", "symptom", "body", "treatment", "drug", "test"),
    "cehrner": ("疾病和诊断", "症状", "解剖部位", "手术", "药物", "影像检查"),
}


def place(text: str, mention: str, nth: int) -> tuple[int, int]:
    start = -1
    for _ in range(nth + 1):
        start = text.index(mention, start + 1)
    return start, start + len(mention)


def record(dataset: str, text: str, marked: Sequence[tuple[str, int, int]]) -> dict[str, Any]:
    """A text as a dataset writes it down."""
    layout, entities = LAYOUTS[dataset], []
    for mention, nth, kind in marked:
        start, end = place(text, mention, nth)
        entity: dict[str, Any] = {layout.type[0]: CODES[dataset][kind]}
        if dataset == "ccks2019":
            entity |= {"start_pos": start, "end_pos": end, "overlap": 0}
        elif dataset == "cmeee":
            entity |= {"start_idx": start, "end_idx": end - 1, "entity": mention}
        elif dataset in ("cmedqaner", "cehrner"):
            entity |= {"mention": mention, "offset": str(start)}
        else:
            entity |= {"mention": mention, "start": start, "end": end}
        entities.append(entity)
    return {layout.text: text, layout.entities: entities}


def write_sample(path: Path, dataset: str, notes: Sequence[Any] = NOTES) -> Path:
    """A file as the dataset comes: a list for CMeEE, a mark of byte order for CCKS 2019, lines for all others."""
    records = [record(dataset, text, marked) for text, marked in notes]
    lines = "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in records)
    whole = json.dumps(records, ensure_ascii=False, indent=2) if dataset == "cmeee" else lines
    path.write_text(whole, encoding="utf-8-sig" if dataset == "ccks2019" else "utf-8")
    return path
