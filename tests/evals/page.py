"""A page of HTML as a tree, read strictly: what is not well-formed fails."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from html.parser import HTMLParser

VOID = {"meta", "link", "br", "img", "hr", "input"}
DRAWN = {"line", "path", "rect", "circle"}
"""Elements of a drawing, which close themselves."""


@dataclass
class Element:
    """An element, its attributes, and what is in it: elements and texts."""

    tag: str
    attributes: dict[str, str]
    inside: list[Element | str] = field(default_factory=list)

    def __iter__(self) -> Iterator[Element]:
        for each in self.inside:
            if isinstance(each, Element):
                yield each
                yield from each

    def all(self, tag: str, **attributes: str) -> list[Element]:
        """Elements below this one, in order."""
        return [each for each in self if each.tag == tag and attributes.items() <= each.attributes.items()]

    def find(self, tag: str, **attributes: str) -> Element:
        """The first of them."""
        return self.all(tag, **attributes)[0]

    @property
    def text(self) -> str:
        """All that is written in it, without the ends of lines around."""
        return "".join(each.text if isinstance(each, Element) else each for each in self.inside).strip()


class _Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.open = [Element("", {})]

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        names = [name for name, _ in attributes]
        assert len(set(names)) == len(names), f"<{tag}> says something twice"
        element = Element(tag, {name: value or "" for name, value in attributes})
        self.open[-1].inside.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        assert tag in DRAWN, f"<{tag}/> closes itself"
        self.handle_starttag(tag, attributes)
        self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop().tag == tag, f"</{tag}> closes something else, at {self.getpos()}"

    def handle_data(self, data: str) -> None:
        self.open[-1].inside.append(data)


def parse(text: str) -> Element:
    """The tree of a page; AssertionError where an element is not closed, or closed by another's end."""
    reader = _Reader()
    reader.feed(text)
    reader.close()
    assert len(reader.open) == 1, f"<{reader.open[-1].tag}> is never closed"
    return reader.open[0]
