"""Functions of the user's own, named on a command line as module:function."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from typing import Any

from model.errors import InputError


def names_function(source: str) -> bool:
    """Whether a text is of the form module:function."""
    module, separator, name = source.partition(":")
    return bool(separator) and name.isidentifier() and all(part.isidentifier() for part in module.split("."))


def load_function(source: str, option: str) -> Callable[..., Any]:
    """The function; its module is looked for where the command runs, too.

    Args:
        option: that names it, for messages.
    Raises:
        InputError: there is no such module or function. What goes wrong inside the module is raised as it is.
    """
    module, _, name = source.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        function = getattr(importlib.import_module(module), name, None)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise  # of a module that theirs imports
        raise InputError(
            f"{option} {source}: there is no module {error.name} here. Start the command in the folder that holds it, "
            "or install it."
        ) from None
    if not callable(function):
        raise InputError(f"{option} {source}: {module} has no function {name!r}. Check its name.")
    return function
