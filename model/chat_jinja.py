"""Chat templates as programs: Jinja in a sandbox, set up as transformers sets it up, so that strings agree.

A template comes with a downloaded base, so it is somebody else's program. It gets no access to Python, and a budget
of steps (loop rounds and calls) and of what its operators may make, so that no loop holds up a job for ever.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from model.errors import InputError

_MAX_STEPS = 250_000  # a conversation of ten thousand messages takes some fifty thousand
_MAX_SIZE = 10_000_000  # characters, elements or bits that one operator may make
_ROUNDS, _JOINED = "counted rounds", "joined text"  # filters, by names that no template can write


class TemplateProgram:
    """A compiled template and the names it knows.

    Args:
        source: the Jinja text.
        variables: name -> value beside the messages; transformers passes bos_token, eos_token and their kind.
        where: what messages call it, such as its directory.
    Raises:
        InputError: the source is no Jinja template.
    """

    def __init__(self, source: str, variables: Mapping[str, str], where: str) -> None:
        self._where = where
        self._environment = _Environment()
        try:
            template = self._environment.from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise InputError(
                f"{where}, line {error.lineno}: the chat template is not Jinja ({error.message}). Mend it, or name "
                "another with --chat.template."
            ) from None
        self._template = template
        self._variables = {**variables, "tools": None, "documents": None}

    def render(self, messages: list[dict[str, str]], add_generation_prompt: bool) -> str:
        """What transformers' `apply_chat_template(tokenize=False)` returns.

        Args:
            messages: each with "role" and "content".
        Raises:
            InputError: the template refuses these messages, fails on them, or spends its budget.
        """
        self._environment.steps = 0
        try:
            return self._template.render(
                self._variables, messages=messages, add_generation_prompt=add_generation_prompt
            )
        except Exception as error:  # whatever somebody else's program does
            roles = ", ".join(message["role"] for message in messages[:6]) + ", …" * (len(messages) > 6)
            raise InputError(
                f"{self._where}: the chat template refuses a conversation of {roles} "
                f"({type(error).__name__}: {error}). Leave out what it does not take, or name another template with "
                "--chat.template."
            ) from None


class _GenerationBlock(Extension):
    """`{% generation %}…{% endgeneration %}`, with which some templates mark answers, renders as its content."""

    tags = {"generation"}  # noqa: RUF012 (as jinja2 declares it)

    def parse(self, parser: Any) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body).set_lineno(line)


class _Environment(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset(["+", "*", "**"])

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, loopcontrols])
        self.steps = 0
        self.filters["tojson"] = _to_json
        self.filters[_ROUNDS] = self._count_rounds
        self.filters[_JOINED] = self._check_joined
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = _strftime_now

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        return _Metered().visit(super()._parse(source, name, filename))

    def _count_rounds(self, values: Iterable[Any]) -> Iterator[Any]:
        for value in values:
            self._spend()
            yield value

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        __self._spend()
        return super().call(__context, __obj, *args, **kwargs)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        _check_size(_result_size(operator, left, right))
        return super().call_binop(context, operator, left, right)

    def _check_joined(self, text: str) -> str:
        _check_size(len(text))
        return text

    def _spend(self) -> None:
        self.steps += 1
        if self.steps > _MAX_STEPS:
            raise jinja2.TemplateError(f"not done after {_MAX_STEPS:,} steps")


class _Metered(NodeTransformer):
    """Sends what loops go through, and what `~` joins, by way of the environment."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        node.iter = nodes.Filter(node.iter, _ROUNDS, [], [], None, None, lineno=node.lineno)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        return nodes.Filter(self.generic_visit(node), _JOINED, [], [], None, None, lineno=node.lineno)


def _result_size(operator: str, left: Any, right: Any) -> int:
    """Characters, elements or bits of what an operator is about to make, from above; 0 for other types."""
    if operator == "**":
        return _size(left) * right if isinstance(right, int) else 0
    if operator == "+" or (isinstance(left, int) and isinstance(right, int)):
        return _size(left) + _size(right)
    repeated, times = (right, left) if isinstance(left, int) else (left, right)
    return _size(repeated) * times if isinstance(times, int) else 0


def _size(value: Any) -> int:
    if isinstance(value, int):
        return value.bit_length()
    return len(value) if isinstance(value, (str, list, tuple)) else 0


def _check_size(size: int) -> None:
    if size > _MAX_SIZE:
        raise jinja2.TemplateError(f"an operator would make more than {_MAX_SIZE:,} characters or bits")


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own escapes `<` and `>` for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)
