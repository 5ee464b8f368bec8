"""A proof, for one compiled kernel, that no address is made with a product that can leave 32 bits.

Every integer of the kernel gets an upper bound of its magnitude, as a sum of two parts:

    |value| <= units * 2^30 + bound

Constants and positions inside a tile have no units. The number of a program and a loaded value have one: they index
rows, tokens or tiles, of which there are fewer than 2^30, and what is not multiplied fits. Arguments, the counts and
strides, have a quarter. A 32-bit product has at most two units: a row times its stride, or a tile times its size,
has to be made in 64 bits, while twice a row's number, or an argument times 8, fits. What was divided may be
multiplied back: `cdiv(n, 64) * 64` has the units of n.

The bounds are the least that satisfy the equations between values, loops and branches included. A number that grows
by a constant in every turn of a loop is bounded by whatever ends the loop, so it has one unit; one that grows by a
number with units (a stride) is a product in disguise.

A fault counts when an address is made from it, directly or after it was widened to 64 bits: widened too late. Where
the author knows better, the line says so and why: `first = tile * BLOCK  # fits 32 bits: a position in a document`.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import partial, reduce
from math import prod

from kernels.offline.ttir import VALUE, Block, Operation, read, signature

_MOST_UNITS = 2
_CEILING = 1 << 63
# Times that a value on a loop's way round may still grow before it counts as growing forever.
_TURNS = 4


@dataclass(frozen=True)
class Size:
    """Magnitude of an integer.

    fault: the arithmetic that may have left 32 bits on the way to it. is_exact: it is `bound` and nothing less.
    """

    units: Fraction = Fraction(0)
    bound: int = 0
    fault: str | None = None
    is_exact: bool = False

    def __or__(self, other: Size) -> Size:
        if self == other:
            return self
        return Size(max(self.units, other.units), max(self.bound, other.bound), self.fault or other.fault)


UNKNOWN = Size(Fraction(1))
ARGUMENT = Size(Fraction(1, 4))
Equation = tuple[str, list[str], Callable[..., Size], bool]


def narrow_offsets(ttir: str, fitting: Collection[str] = ()) -> list[str]:
    """What went wrong with addresses, a line for each: which arithmetic, and where an address was made of it.

    Args:
        ttir: text of a kernel, as the compiler prints it.
        fitting: lines, as `file.py:12`, whose products are known to fit.
    """
    module = read(ttir)
    sizes = _solve(list(_Equations(module, fitting).collect()))
    faults: dict[str, list[str]] = {}
    for operation in module.walk():
        for value in _address_parts(operation):
            assert value in sizes, f"{operation.place}: nothing is known of {value}"
            if (fault := sizes[value].fault) is not None:
                faults.setdefault(fault, []).append(operation.place)
    return [f"{fault} is part of an address ({places[0]})" for fault, places in faults.items()]


def _address_parts(operation: Operation) -> list[str]:
    """Integers that an operation makes an address of."""
    if operation.name == "tt.addptr":
        return operation.values[1:2]
    if "descriptor" in operation.name:
        return VALUE.findall("".join(re.findall(r"\[[^\]]*\]", operation.text)))
    return []


def _solve(equations: list[Equation]) -> dict[str, Size]:
    """The least sizes that satisfy all equations, loops widened."""
    sizes: dict[str, Size] = {}
    grown: dict[str, int] = {}
    changed = True
    while changed:
        changed = False
        for target, sources, rule, is_loop in equations:
            if not all(source in sizes for source in sources):
                continue  # not reached yet
            before = sizes.get(target)
            now = rule(*(sizes[source] for source in sources))
            now = now if before is None else before | now
            if now == before:
                continue
            grown[target] = grown.get(target, 0) + 1
            if is_loop and before is not None and grown[target] > _TURNS:
                now = _widened(before, now)
            changed |= now != before
            sizes[target] = now
    return sizes


def _widened(before: Size, now: Size) -> Size:
    if now.units > before.units and now.units > 1:
        return replace(now, units=Fraction(_CEILING), bound=before.bound)
    return replace(now, units=max(now.units, Fraction(1)), bound=before.bound)


class _Equations:
    """What every value is made of: (target, sources, rule, whether it closes a loop)."""

    def __init__(self, module: Operation, fitting: Collection[str]) -> None:
        self.fitting = fitting
        self.functions = {signature(op)[0]: op for op in module.walk() if op.name == "tt.func"}

    def collect(self) -> Iterator[Equation]:
        for function in self.functions.values():
            if "public" in function.text:
                for name, _ in signature(function)[1]:
                    yield name, [], lambda: ARGUMENT, False
            for region in function.regions:
                yield from self._region(region, function)

    def _region(self, region: list[Block], parent: Operation) -> Iterator[Equation]:
        labels = {block.label: [name for name, _ in block.arguments] for block in region}
        for block in region:
            for operation in block.operations:
                yield from self._operation(operation, parent, labels)

    def _operation(self, op: Operation, parent: Operation, labels: dict[str, list[str]]) -> Iterator[Equation]:
        for region in op.regions:
            yield from self._region(region, op)
        if op.name == "scf.for":
            yield from self._for(op)
        elif op.name == "scf.while":
            yield from _copies(op.values[1::2], op.values[::2], True)
        elif op.name == "scf.condition":
            carried = op.values[1:]
            yield from _copies(carried, parent.results)
            yield from _copies(carried, [name for name, _ in parent.regions[1][0].arguments])
        elif op.name == "scf.yield":
            yield from _copies(op.values, parent.results if parent.name != "scf.while" else [])
            yield from _copies(op.values, _loop_arguments(parent), True)
        elif op.name in ("cf.br", "cf.cond_br"):
            for label, arguments in re.findall(r"(\^\w+)(?:\(([^)]*)\))?", op.text):
                yield from _copies(VALUE.findall(arguments), labels[label], True)
        elif op.name == "tt.call":
            callee = self.functions[re.findall(r"@([\w$.]+)", op.text)[0]]
            yield from _copies(op.values, [name for name, _ in signature(callee)[1]])
            for inner in callee.walk():
                if inner.name == "tt.return":
                    yield from _copies(inner.values, op.results)
        elif op.name in ("tt.reduce", "tt.scan"):
            yield from self._reduce(op)
        elif op.name != "scf.if":
            rule = _fits(_rule(op)) if op.place in self.fitting else _rule(op)
            for result in op.results:
                yield result, op.values, rule, False

    def _for(self, op: Operation) -> Iterator[Equation]:
        counter, lower, upper, _step, *carried = op.values
        yield counter, [lower, upper], lambda low, high: low | high, False
        yield from _copies(carried[1::2], carried[::2], True)
        yield from _copies(carried[1::2], op.results)

    def _reduce(self, op: Operation) -> Iterator[Equation]:
        names = {inner.name for inner in op.walk()}
        operands = VALUE.findall(op.text.split(")")[0])
        terms = max(prod(int(n) for n in shape.split("x")) for shape in re.findall(r"tensor<((?:\d+x)*\d+)x", op.text))
        for result, operand in zip(op.results, operands, strict=True):
            count = terms if "arith.addi" in names else 1
            yield result, [operand], partial(_repeated, count), False


def _loop_arguments(op: Operation) -> list[str]:
    if op.name == "scf.for":
        return op.values[4::2]
    return op.values[::2] if op.name == "scf.while" else []


def _copies(sources: Iterable[str], targets: Iterable[str], is_loop: bool = False) -> Iterator[Equation]:
    for source, target in zip(sources, targets, strict=False):
        yield target, [source], lambda x: x, is_loop


def _rule(op: Operation) -> Callable[..., Size]:
    """How the size of a result follows from those of the operands."""
    kind = op.name.removeprefix("arith.")
    bits, place = _bits(re.split(r" to | -> | : ", op.text)[-1]), op.place
    if kind == "constant":
        numbers = [abs(int(n)) for n in re.findall(r"-?\d+", op.text.split(" : ")[0])]
        return lambda: Size(bound=max(numbers, default=1), is_exact=len(numbers) == 1)
    if op.name == "tt.make_range":
        ends = [int(n) for n in re.findall(r"= (\d+)", op.text)]
        return lambda: Size(bound=max(ends) - 1)
    rules: dict[str, Callable[..., Size]] = {
        "addi": lambda a, b: _sum(a, b, bits, place),
        "subi": lambda a, b: _sum(a, b, bits, place),
        "muli": lambda a, b: _product(a, b, bits, place),
        "shli": lambda a, b: _product(a, _power(b), bits, place),
        "shrsi": lambda a, b: _quotient(a, _power(b)),
        "shrui": lambda a, b: _quotient(a, _power(b)),
        "select": lambda _, a, b: a | b,
        **dict.fromkeys(("divsi", "divui", "ceildivsi", "floordivsi"), _quotient),
        **dict.fromkeys(("remsi", "remui", "minsi", "minui", "andi"), _smaller),
        "trunci": lambda a: _cut(a, bits, place),
        **dict.fromkeys(("ori", "xori", "maxsi", "maxui", "extsi", "extui", "index_cast"), _any),
        **dict.fromkeys(("cmpi", "cmpf"), lambda *_: Size(bound=1)),
    }
    return rules.get(kind, _any if op.name in _MOVES else lambda *_: UNKNOWN)  # loads, program ids, from floats


def _fits(rule: Callable[..., Size]) -> Callable[..., Size]:
    """The rule of a line that is known to fit: its results are numbers like any other."""

    def fitting_rule(*operands: Size) -> Size:
        size = rule(*(replace(operand, fault=None) for operand in operands))
        fault = next((operand.fault for operand in operands if operand.fault), None)
        return replace(size, units=min(size.units, UNKNOWN.units), fault=fault)

    return fitting_rule


_MOVES = ("tt.splat", "tt.broadcast", "tt.expand_dims", "tt.reshape", "tt.trans", "tt.join", "tt.split", "tt.cat")


def _any(*sizes: Size) -> Size:
    return reduce(operator.or_, sizes)


def _sum(a: Size, b: Size, bits: int, place: str) -> Size:
    units, bound, fault = a.units + b.units, a.bound + b.bound, a.fault or b.fault
    if bits <= 32 and units >= _CEILING:
        fault = fault or f"a 32-bit sum that grows by a run-time step in a loop, {place},"
    return Size(min(units, Fraction(_CEILING)), min(bound, _CEILING), fault)


def _product(a: Size, b: Size, bits: int, place: str) -> Size:
    units = a.units * b.bound + b.units * a.bound + (_CEILING if a.units and b.units else 0)
    bound, fault = a.bound * b.bound, a.fault or b.fault
    if bits <= 32 and (units > _MOST_UNITS or bound >= 1 << 31):
        fault = fault or f"a 32-bit product without bound, {place},"
    return Size(min(units, Fraction(_CEILING)), min(bound, _CEILING), fault)


def _cut(a: Size, bits: int, place: str) -> Size:
    if bits > 32 or (a.units <= _MOST_UNITS and a.bound < 1 << 31):
        return a
    return replace(UNKNOWN, fault=a.fault or f"a number cut to 32 bits, {place},")


def _repeated(count: int, a: Size) -> Size:
    """A sum of so many; of numbers with units, parts of one whole, the whole is no larger than such a number."""
    return Size(a.units, min(count * a.bound, _CEILING), a.fault)


def _quotient(a: Size, b: Size) -> Size:
    divisor = b.bound if b.is_exact and b.bound else 1
    return Size(a.units / divisor, a.bound // divisor, a.fault or b.fault)


def _power(shift: Size) -> Size:
    return Size(shift.units, 1 << min(shift.bound, 63), shift.fault, shift.is_exact)


def _smaller(a: Size, b: Size) -> Size:
    """Of numbers that are not negative: a remainder, the smaller of two, the bits of a mask."""
    least = min(a, b, key=lambda size: (size.units, size.bound))
    return Size(least.units, least.bound, a.fault or b.fault)


def _bits(kind: str) -> int:
    """Width of the integers of a type, the last of several; 64 for what is no integer."""
    found = re.findall(r"(?:^|[\sx<])i(\d+)\b", kind)
    return int(found[-1]) if found else 64
