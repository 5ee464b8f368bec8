"""How a report's numbers and texts are written, the same in Markdown and HTML."""

from __future__ import annotations

import math
import unicodedata

from evals.task import Metric

KINDS = {
    "choice": "Multiple choice 选择题",
    "entities": "Entity extraction 实体抽取",
    "generation": "Open answers and dialogue 问答与对话",
    "attitudes": "Attitude scales 态度量表",
    "reward": "Reward 奖励模型评分",
    "perplexity": "Held-out text 留出文本",
}
"""Headings, in a report's order."""

_DIGITS = {"%": 2, "nats": 3, "score": 3, "points": 1, "tokens": 1, "": 3}
_NAMES = {"f1": "F1", "bleu": "BLEU", "rouge": "ROUGE", "l": "L", "kl": "KL", "eos": "EOS"}


def number(value: float | None, unit: str) -> str:
    """A metric's value: fractions as percent without the sign, two digits as the literature prints them."""
    if value is None or not math.isfinite(value):
        return "—"
    digits = _DIGITS.get(unit, 3)
    scaled = 100 * value if unit == "%" else value
    if unit != "%" and abs(scaled) >= 10_000:
        digits = 0
    return f"{scaled:,.{digits}f}".replace("-", "−") if round(scaled, digits) else f"{0:.{digits}f}"


def signed(value: float, unit: str) -> str:
    """A difference; percentage points where fractions are percent."""
    return ("+" if value > 0 and number(value, unit).strip("0.") else "") + number(value, unit)


def bounds(low: float | None, high: float | None, unit: str) -> str:
    """An interval, percent to one digit; "" where there is none."""
    if low is None or high is None or not (math.isfinite(low) and math.isfinite(high)):
        return ""
    if unit == "%":
        return f"[{100 * low:.1f}, {100 * high:.1f}]".replace("-", "−")
    return f"[{number(low, unit)}, {number(high, unit)}]"


def probability(p: float) -> str:
    """A p-value: two digits that mean something, never 0."""
    if not math.isfinite(p):
        return "—"
    return "< 0.001" if p < 0.001 else f"{p:.3f}" if p < 0.1 else f"{p:.2f}"


def title(metric: str) -> str:
    """A metric's name for a table: micro_f1 is Micro F1, bleu_4 is BLEU-4."""
    words = [_NAMES.get(word, word) for word in metric.split("_")]
    text = "".join(word if not place else ("-" if _is_count(word) else " ") + word for place, word in enumerate(words))
    return text[:1].upper() + text[1:]


def heading(metric: Metric) -> str:
    """A metric's name with its unit, and which way is better."""
    unit = f" ({metric.unit})" if metric.unit not in metric.name.split("_") and metric.unit else ""
    return title(metric.name) + unit + {"higher": " ↑", "lower": " ↓"}.get(metric.better or "", "")


def mark(value: float, unit: str) -> str:
    """A round number of an axis."""
    return f"{100 * value if unit == '%' else value:.6g}".replace("-", "−")


def setting(value: object) -> str:
    """A setting's value."""
    return ("no", "yes")[value] if isinstance(value, bool) else f"{value:g}" if isinstance(value, float) else str(value)


def visible(text: str) -> str:
    """A text without what would act instead of being read.

    Control characters, such as those that begin a terminal's commands, signs that turn the direction of writing, and
    lone halves of surrogate pairs become their numbers. Tabs, ends of lines and spaces stay.
    """
    return text if text.isprintable() else "".join(map(_visible, text))


def _visible(letter: str) -> str:
    is_read = letter in "\n\t" or letter.isprintable() or unicodedata.category(letter) == "Zs"
    return letter if is_read else f"⟨U+{ord(letter):04X}⟩"


def _is_count(word: str) -> bool:
    return word.isdigit() or word == "L"


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Round numbers that span [low, high]: steps of 1, 2 or 5 times a power of ten, at most `most` of them."""
    span = high - low or abs(high)
    span = span if span > 1e-300 else 1.0  # of smaller numbers not every part is a number
    step = 10.0 ** math.floor(math.log10(span / most))
    for factor in (1, 2, 5, 10, 20):
        first, last = math.floor(low / (step * factor) + 1e-9), math.ceil(high / (step * factor) - 1e-9)
        if last - first < most:
            break
    return [place * step * factor for place in range(first, max(last, first + 1) + 1)]


def longest_run(text: str, letter: str) -> int:
    """How often a letter repeats in a row, at most."""
    most = run = 0
    for each in text:
        run = run + 1 if each == letter else 0
        most = max(most, run)
    return most
