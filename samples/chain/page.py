"""ckpt/report.html: the chain on one page that needs nothing else."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from engine.files import write_durably
from samples.chain.figures import MODELS, Figure, answers
from samples.chain.stages import Stage
from samples.chain.table import rows

_STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.6 system-ui, "Noto Sans CJK SC", sans-serif; max-width: 76rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { border-bottom: 1px solid #8884; padding: .35rem .7rem; text-align: left; vertical-align: top; }
.wide { overflow-x: auto; }
figure { margin: 1rem 0; } img { max-width: 100%; background: white; }
code { background: #8882; padding: .1rem .3rem; border-radius: .2rem; overflow-wrap: anywhere; }
"""


def write_page(root: Path, stages: Sequence[Stage], found: Mapping[str, Figure]) -> Path:
    """Write it; returns where it lies. Curves are left out of runs that have drawn none (matplotlib is optional)."""
    parts = [
        "<h1>The whole regime on the bundled sample 全流程演示</h1>",
        "<p>Every model here has 4.1 million parameters. Nothing it says is medical advice. "
        "以下回答由演示用的小模型生成，不是医疗建议。</p>",
        "<h2>Figures 结果</h2>",
        _table(rows(found)),
        "<p>In brackets 95 % intervals. The <a href='evaluation/report.html'>evaluation's own page</a> has all "
        "metrics, comparisons and samples.</p>",
        "<h2>Five held-out questions 五个留出问题</h2>",
        _table([["question 问题", "reference 参考", *MODELS], *_answers(root)]),
        "<h2>Curves 曲线</h2>",
        *(_curves(root / "ckpt" / stage.name / "curves.png", stage) for stage in stages),
        "<h2>Commands 命令</h2>",
        "<ol>",
        *(f"<li>{escape(one.title)}<br><code>{escape(one.shown)}</code></li>" for one in stages),
        "</ol>",
    ]
    head = f"<meta charset='utf-8'><meta name='viewport' content='width=device-width'><style>{_STYLE}</style>"
    body = "\n".join(part for part in parts if part)
    file = root / "ckpt" / "report.html"
    head = f"<head>{head}<title>ChiMed Engine</title></head>"
    write_durably(file, f"<!doctype html><html lang='zh'>{head}<body>\n{body}\n</body></html>\n")
    return file


def _answers(root: Path) -> list[list[str]]:
    return [[shown, gold, *(said[model] for model in MODELS)] for shown, gold, said in answers(root)]


def _table(table: Sequence[Sequence[str]]) -> str:
    heading, *body = table
    lines = ["<tr>" + "".join(f"<th scope='col'>{escape(text)}</th>" for text in heading) + "</tr>"]
    for first, *others in body:
        cells = "".join(f"<td>{escape(text)}</td>" for text in others)
        lines.append(f"<tr><th scope='row'>{escape(first)}</th>{cells}</tr>")
    return f"<div class='wide'><table>{''.join(lines)}</table></div>"


def _curves(picture: Path, stage: Stage) -> str:
    if not picture.is_file():
        return ""
    data = base64.b64encode(picture.read_bytes()).decode("ascii")
    title = escape(stage.title)
    return f"<figure><img alt='{title}' src='data:image/png;base64,{data}'><figcaption>{title}</figcaption></figure>"
