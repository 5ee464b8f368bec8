"""The audit of the whole package: every kernel must have a case, and every entry of the launch table a use.

An entry of the table is asked for by some case, stands among the candidates that its module names, and keeps the
limits, for it is what ops dispatch.
"""

from __future__ import annotations

import importlib
import pkgutil
import re
from collections.abc import Collection, Iterable

import triton

import kernels
from kernels.launches import Lookup, read_table
from kernels.offline.audit import Audit, audit_cases
from kernels.offline.cases import cases


def audit_package(ops: Collection[str] = ()) -> Audit:
    """All cases, or those of some ops; of these alone nothing can be said about what is left out."""
    audit, lookups = audit_cases(case for case in cases() if not ops or case.op in ops)
    if not ops:
        launched = {row.kernel for row in audit.rows if row.is_dispatched}
        audit.uncovered = [f"{name}: no case launches it" for name in all_kernels() if name not in launched]
        audit.idle = list(_idle_entries(lookups))
    return audit


def _idle_entries(lookups: set[Lookup]) -> Iterable[str]:
    """Entries that nobody asks for, or that their module does not offer."""
    asked = {(lookup.kernel, lookup.key): lookup for lookup in lookups}
    for kernel, entries in read_table().items():
        found = {key: asked.get((kernel, key)) for key in entries}
        unasked = [key for key, lookup in found.items() if lookup is None]
        strange = [key for key, lookup in found.items() if lookup and entries[key] not in lookup.candidates()]
        if unasked:
            yield f"launches.json: no case asks for {kernel}: {', '.join(unasked)}"
        if strange:
            yield f"launches.json: not among the candidates of {kernel}: {', '.join(strange)}"


def all_kernels() -> dict[str, triton.JITFunction]:
    """Every Triton function of the package that no other calls, by name."""
    found: dict[str, triton.JITFunction] = {}
    names = (module.name for module in pkgutil.walk_packages(kernels.__path__, "kernels."))
    for module in [importlib.import_module(name) for name in names if not name.endswith("__main__")]:
        for value in vars(module).values():
            while hasattr(value, "fn") and not isinstance(value, triton.JITFunction):
                value = value.fn
            if isinstance(value, triton.JITFunction) and value.__module__.startswith("kernels."):
                found[value.__name__] = value
    called = {name for name in found for other in found.values() if re.search(rf"\b{name}\b", _body(other))}
    return {name: kernel for name, kernel in found.items() if name not in called}


def _body(kernel: triton.JITFunction) -> str:
    return kernel.src.split("\n", 1)[1]
