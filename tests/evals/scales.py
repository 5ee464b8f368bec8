"""Items files for tests: statements about tea, and numbered stand-ins for scales whose wording is not ours."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from evals.attitudes import build
from evals.suite import BuildContext, TaskSpec, parse_spec
from evals.task import Task

TEA: dict[str, Any] = {
    "scale": "tea",
    "options_low_to_high": ["不赞成", "说不好", "赞成"],
    "items": [
        {"id": "t1", "text": "下午喝茶会打扰工作。", "subscale": "time", "agreeing_is_stigma": True},
        {"id": "t2", "text": "喝茶的时间总是值得的。", "subscale": "time", "agreeing_is_stigma": False},
        {"id": "t3", "text": "泡茶太麻烦了。", "subscale": "work", "agreeing_is_stigma": True},
        {"id": "t4", "text": "洗茶具是一件愉快的事。", "subscale": "work", "agreeing_is_stigma": False},
        {"id": "t5", "text": "茶叶应当少买一些。", "subscale": "work", "agreeing_is_stigma": True},
    ],
}
COUNTS = {"cami": 40, "mica4": 16}


def write(path: Path, value: object) -> Path:
    path.write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")
    return path


def numbered(name: str) -> list[str]:
    """As many statements as a scale has."""
    return [f"陈述{number}。" for number in range(1, COUNTS[name] + 1)]


def task(tmp_path: Path, name: str, options: str = "", context: BuildContext | None = None) -> Task:
    """The task of a scale: tea under the name attitudes."""
    path = write(tmp_path / f"{name}.json", TEA if name == "attitudes" else numbered(name))
    return build(parse_spec(f"{name}={path}{options and ','}{options}"), context or BuildContext("chat"))


def spec(name: str, path: Path) -> TaskSpec:
    return TaskSpec(name, str(path))
