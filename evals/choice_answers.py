"""Which options an answer in words names: rules in order, the first that finds something decides.

    1  the answer, or its first line, is letters and nothing else     B   (D)   ABD   A和C
    2  it says which is the answer; the last time counts              答案是B   正确选项为(C)   故选A
    3  it says which one to choose; the last time counts              我会选C   选择 B
    4  it says of options that they are right; all of them count      B是正确的   A、D正确
    5  it begins with letters                                         B. 肺炎   (D) 因为   C、
    6  no others are mentioned, options' own texts left out           这道题考查的是 B
    7  only one option's text is mentioned                            应为肺炎

Half and full width are one. A letter names an option if no Latin letter or digit touches it, so DNA and B12 name none.
What is denied names nothing: 不选 A, A、B都不对, 错误的是A, 排除肺炎; nor does A或B, which leaves it open. Where the
question asks for what is wrong (下列说法错误的是), 错误的是A and A错误 are its answer.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

from evals.choice_files import LETTERS

# Letters side by side may be an abbreviation (ACE抑制剂): then a word follows them that is none of these.
_AFTER_RUN = r"(?![^\W\d_a-zA-Z])|(?=[项都均正对是为或两三四五共])"
_OR = "或"
_BETWEEN = rf"[ \t]*(?:[,、;/&+]|和|与|及|以及|[ \t]|、?{_OR}者?)[ \t]*"
_IS = r"(?:应该|应当|应|就)?(?:是|为|选择|选|:|\s)*(?:选项|答案)?[:\s]*"
_ANSWER = rf"答案{_IS}|正确的?选项{_IS}|(?:应该|应当|应|故|所以|因此|综上,?)选择?{_IS}"
_CHOICE = r"选择?(?:答案|选项)?[:\s]*"
_WRONG = r"\s*(?:选?项)?(?:也|都|均|是|为)*(?:错|不|误|非)"
_RIGHT = r"\s*[.:]?\s*(?:选?项)?(?:都|均|是|为|才|才是)?(?:正确|对)的?(?:答案|选项)?(?=[\s。.,;!]|$)"
_OPEN, _CLOSE = r"[(\[【<{\"'“*]*", r"[)\]】>}\"'”*]*"
# What denies an option before it is named, up to there, spaces taken out.
_CAN = "(?:可能|应当|应该|建议|推荐|可以|[能会该应可宜要首再])?"
_CHOOSES = "(?:选择|使用|考虑|诊断|支持|属于|符合|包括|看作|[选是为用有见像])*"
_NOT = re.compile(
    rf"(?:(?:[不没未无勿别]|并?非){_CAN}{_CHOOSES}|(?<![切去消清解拔摘])除了?|(?:错误?|误|不对|不正确|不当)的?(?:是|为)*)"
    rf"(?:选项|答案)?(?:是|为)?:?{_OPEN}$"
)
_IS_NOT = re.compile(rf"{_CLOSE}{_WRONG}")
# Of an option's text, which may itself go on with 不.
_TEXT_IS_NOT = re.compile(rf"{_CLOSE}(?:也|都|均|是|为)*(?:错|不对|不是|不正确|不符|有误|除外|可?排除)")
# A question for the option that is wrong, and how an answer to one speaks of it.
_BAD = "(?:错误?|有误|不(?:正确|对|恰当|妥|准确))"
_ASKS_WRONG = re.compile(rf"{_BAD}|不(?:属于|包括|包含|符合|支持|是|宜|应)[^。?;]{{0,12}}是|除外|例外")
_WRONG_ONE = rf"{_BAD}(?:的|之处)?(?:说法|描述|叙述|选项|答案|一项)?(?:是|为|:)+\s*{_OPEN}"
_IS_WRONG_ONE = rf"{_CLOSE}\s*(?:选?项)?(?:的?(?:说法|描述|叙述))?(?:是|为)?{_BAD}的?"


def find_letters(said: str, options: Sequence[str], question: str = "") -> str:
    """The letters of the options that an answer names, in order; "" where none can be found.

    Args:
        question: what was asked; it may ask for what is wrong.
    """
    text = unicodedata.normalize("NFKC", said).strip()
    if not text:
        return ""
    one = f"[{LETTERS[: len(options)]}]"
    if _ASKS_WRONG.search(unicodedata.normalize("NFKC", question)):
        text = re.sub(rf"{_WRONG_ONE}(?={one}(?![A-Za-z0-9]))", "答案是", text)
        text = re.sub(
            rf"(?<![A-Za-z0-9])(?<![A-Z][、,和与及])({one}){_IS_WRONG_ONE}(?=$|[\s。.,;!])", r"答案是\1。", text
        )
    unit = rf"(?<![A-Za-z0-9])(?:{one}(?![A-Za-z0-9])|{one}{{2,}}(?![A-Za-z0-9])(?:{_AFTER_RUN}))"
    run = rf"(?P<run>{unit}(?:{_BETWEEN}{unit})*(?!{_BETWEEN}{unit}))"  # whole, whatever must follow it
    named = f"{_OPEN}{run}{_CLOSE}"
    if (alone := re.match(rf"{named}[ \t。.,:;!]*(?:\n|$)", text)) and _OR not in alone["run"]:
        return _in_order(alone["run"])
    for says in (_ANSWER, _CHOICE):
        if found := _meant(rf"(?:{says}){named}", text, re.IGNORECASE):
            return _in_order(found[-1])
    if found := _meant(rf"{named}{_RIGHT}", text):
        return _in_order("".join(found))
    if found := _meant(rf"\A{named}\s*[.。、:,)\]】](?!{_WRONG})", text):
        return _in_order(found[0])
    mentioned = find_texts(said, options)
    return _only_letters(text, run, options) or (mentioned if len(mentioned) == 1 else "")


def find_texts(said: str, options: Sequence[str]) -> str:
    """The letters of the options whose texts an answer mentions and nowhere denies, in order, spaces aside.

    An option within another one that is mentioned is not mentioned by that.
    """
    plain, text = [*map(_squash, options)], unicodedata.normalize("NFKC", said)
    named, denied = set[str](), set[str]()
    for found in re.finditer(_any_of(plain), text):
        (denied if _is_denied(text, *found.span(), _TEXT_IS_NOT) else named).add(_squash(found[0]))
    left = named - denied
    whole = [option for option in left if not any(option != other and option in other for other in left)]
    return "".join(sorted(LETTERS[plain.index(option)] for option in whole))


def _meant(pattern: str, text: str, flags: int = 0) -> list[str]:
    """The letters that a pattern finds, without those that are denied or left open."""
    return [
        found["run"]
        for found in re.finditer(pattern, text, flags)
        if _OR not in found["run"] and not _is_denied(text, *found.span("run"), _IS_NOT)
    ]


def _is_denied(text: str, start: int, end: int, behind: re.Pattern[str]) -> bool:
    line = text[:start].rpartition("\n")[2]
    return bool(_NOT.search(_squash(line[-24:])) or behind.match(text, end))


def _in_order(found: str) -> str:
    return "".join(sorted({letter for letter in found.upper() if letter in LETTERS}))


def _only_letters(text: str, run: str, options: Sequence[str]) -> str:
    text = re.sub(_any_of([plain for plain in map(_squash, options) if len(plain) > 1]), " ", text)
    mentioned = {found["run"] for found in re.finditer(run, text) if not _is_denied(text, *found.span(), _IS_NOT)}
    return _in_order(mentioned.pop()) if len(mentioned) == 1 and _OR not in "".join(mentioned) else ""


def _any_of(plain: Sequence[str]) -> str:
    """A pattern of some texts, spaces anywhere in them, the longest one first."""
    longest_first = sorted(filter(None, plain), key=len, reverse=True)
    return "|".join(r"\s*".join(map(re.escape, option)) for option in longest_first) or "(?!)"


def _squash(text: str) -> str:
    return re.sub(r"\s", "", unicodedata.normalize("NFKC", text))
