"""One mention or several in a piece of an answer, and ways to say that there is none.

A mention that holds a separator stands in quotation marks (`quote`), and is then taken as it is.
"""

from __future__ import annotations

import re

from evals.entity_text import fold
from evals.entity_types import TypeNames

NOTHING = "无"
"""What is answered where there is nothing to name."""

TRIMMED = " \t\u3000*`_。．.;；,，、!！?？:："
"""What ends of lines and mentions lose."""

_SEPARATORS = "、，,；;"
_QUOTES = {"“": "”", "「": "」", "『": "』", '"': '"'}
_BRACKETS = {"(": ")", "（": "）", "[": "]", "【": "】"}
_THERE_IS_NO = (
    r"(?:文本|原文|文中|病历|该|本|其|中|均|都|暂|里)*(?:无|没有|未|不存在|不包含|不含|不涉及)"
    r"(?:找到|发现|提到|提及|涉及|识别到|抽取到|出现|包含|见)?(?:任何|相关|相应|上述|指定|这些|可抽取|符合要求|类型|类别|的)*"
)
_NONE = re.compile(rf"{_THERE_IS_NO}(?:实体|内容|信息)?|none|null|nil|n/a|空")
_NONE_OF = re.compile(rf"{_THERE_IS_NO}(.+)")
_AND = re.compile("[、,/和与及或]")


def says_none(text: str) -> bool:
    """Whether a piece of an answer says that there is nothing: 无, 未提及, 没有相关实体, none, ..."""
    return _NONE.fullmatch(fold(text.strip(TRIMMED + "()（）[]"))) is not None


def says_none_of(text: str, types: TypeNames) -> bool:
    """Whether it says so of some types: 没有药物, 未提及疾病和症状."""
    found = _NONE_OF.fullmatch(fold(text.strip(TRIMMED + "()（）[]")))
    return found is not None and (types.find(found[1]) is not None or all(map(types.find, _AND.split(found[1]))))


def quote(mention: str) -> str:
    """A mention so that `divide` finds it whole, in quotation marks where it needs them."""
    mention = " ".join(mention.split())
    for opening, closing in (("", ""), *_QUOTES.items()):
        written = f"{opening}{mention}{closing}"
        if divide(written) == [mention] and not says_none(written):
            return written
    return mention


def divide(piece: str) -> list[str]:
    """The mentions that 、，； part, outside of brackets and quotation marks; a comma between digits parts nothing.

    Unquoted ones lose punctuation and marks of emphasis at their ends.
    """
    parts: list[str] = []
    expected: list[str] = []  # closing brackets
    start = at = 0
    while at < len(piece):
        character = piece[at]
        if character in _QUOTES and not piece[start:at].strip():
            end = _end_of_quotation(piece, at + 1, _QUOTES[character])
            if end is not None:
                parts.append(piece[at + 1 : end])
                at = start = _behind_separator(piece, end + 1)
                continue
        if character in _BRACKETS and _BRACKETS[character] in piece[at:]:
            expected.append(_BRACKETS[character])
        elif expected and character == expected[-1]:
            expected.pop()
        elif character in _SEPARATORS and not expected and not _is_in_number(piece, at):
            parts.append(piece[start:at].strip(TRIMMED))
            start = at + 1
        at += 1
    parts.append(piece[start:].strip(TRIMMED))
    return [part for part in parts if fold(part)]


def _end_of_quotation(piece: str, start: int, closing: str) -> int | None:
    """The first closing mark behind which a part ends too."""
    for at in range(start, len(piece)):
        if piece[at] == closing:
            rest = piece[at + 1 :].lstrip(" \t\u3000。．.")
            if not rest or rest[0] in _SEPARATORS:
                return at
    return None


def _behind_separator(piece: str, at: int) -> int:
    while at < len(piece) and piece[at] not in _SEPARATORS:
        at += 1
    return min(at + 1, len(piece))


def _is_in_number(piece: str, at: int) -> bool:
    return piece[at] == "," and piece[at - 1 : at].isdecimal() and piece[at + 1 : at + 2].isdecimal()
