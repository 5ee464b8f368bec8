"""Which options an answer in words names: rules in order, the first that finds something decides.

    1  the answer, or its first line, is letters and nothing else     B   (D)   ABD   A和C
    2  it says which is the answer; the last time counts              答案是B   正确选项为(C)   故选A
    3  it says which one to choose; the last time counts              我会选C   选择 B
    4  it says of options that they are right; all of them count      B是正确的   A、D正确
    5  it begins with letters                                         B. 肺炎   (D) 因为   C、
    6  no others are mentioned, options' own texts left out           这道题考查的是 B
    7  only one option's text is mentioned                            应为肺炎

Half and full width are one. A letter names an option if no Latin letter or digit touches it, so DNA and B12 name none;
and "不选A" or "A错误" do not name A.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

from evals.choice_files import LETTERS

# Letters side by side may be an abbreviation (ACE抑制剂): then a word follows them that is none of these.
_AFTER_RUN = r"(?![^\W\d_a-zA-Z])|(?=[项都均正对是为两三四五共])"
_BETWEEN = r"[ \t]*(?:[,、;/&+]|和|与|及|以及|[ \t])[ \t]*"
_IS = r"(?:应该|应当|应|就)?(?:是|为|选择|选|:|\s)*(?:选项|答案)?[:\s]*"
_ANSWER = rf"答案{_IS}|正确的?选项{_IS}|(?<!不)(?:应该|应当|应|故|所以|因此|综上,?)选择?{_IS}"
_CHOICE = r"(?<![不未没别勿非])选择?(?:答案|选项)?[:\s]*"
_WRONG = r"\s*(?:选?项)?(?:也|都|均|是|为)*(?:错|不|误|非)"
_RIGHT = r"\s*[.:]?\s*(?:选?项)?(?:都|均|是|为|才|才是)?(?:正确|对)的?(?:答案|选项)?(?=[\s。.,;!]|$)"
_OPEN, _CLOSE = r"[(\[【<{\"'“*]*", r"[)\]】>}\"'”*]*"


def find_letters(said: str, options: Sequence[str]) -> str:
    """The letters of the options that an answer names, in order; "" where none can be found."""
    text = unicodedata.normalize("NFKC", said).strip()
    if not text:
        return ""
    one = f"[{LETTERS[: len(options)]}]"
    unit = rf"(?<![A-Za-z0-9])(?:{one}(?![A-Za-z0-9])|{one}{{2,}}(?![A-Za-z0-9])(?:{_AFTER_RUN}))"
    letters = f"{unit}(?:{_BETWEEN}{unit})*"
    named = f"{_OPEN}({letters}){_CLOSE}"
    if alone := re.match(rf"{named}[ \t。.,:;!]*(?:\n|$)", text):
        return _in_order(alone[1])
    for says in (_ANSWER, _CHOICE):
        if found := re.findall(rf"(?:{says}){named}(?!{_WRONG})", text, re.IGNORECASE):
            return _in_order(found[-1])
    if found := re.findall(rf"{named}{_RIGHT}", text):
        return _in_order("".join(found))
    if opening := re.match(rf"(?:{named}\s*[.。、:,)]|[(\[【]({letters})[)\]】])(?!{_WRONG})", text):
        return _in_order(opening[1] or opening[2])
    mentioned = find_texts(said, options)
    return _only_letters(text, letters, options) or (mentioned if len(mentioned) == 1 else "")


def find_texts(said: str, options: Sequence[str]) -> str:
    """The letters of the options whose texts an answer mentions, in order, spaces aside.

    An option within another one that is mentioned is not mentioned by that.
    """
    plain, text = [_squash(option) for option in options], _squash(said)
    found = [option for option in plain if option and option in text]
    found = [option for option in found if not any(option != other and option in other for other in found)]
    return "".join(sorted({LETTERS[plain.index(option)] for option in found}))


def _in_order(found: str) -> str:
    return "".join(sorted({letter for letter in found.upper() if letter in LETTERS}))


def _only_letters(text: str, letters: str, options: Sequence[str]) -> str:
    for option in sorted(options, key=len, reverse=True):
        plain = r"\s*".join(map(re.escape, _squash(option)))
        text = re.sub(plain, " ", text) if len(_squash(option)) > 1 else text
    mentioned = set(re.findall(rf"(?<!不是)(?<!不选)(?<!排除)({letters})(?!{_WRONG})", text))
    return _in_order(mentioned.pop()) if len(mentioned) == 1 else ""


def _squash(text: str) -> str:
    return re.sub(r"\s", "", unicodedata.normalize("NFKC", text))
