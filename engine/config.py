"""Command lines and YAML files to typed dataclasses: defaults < --config file.yaml < dotted flags.

A recipe is a tree of dataclasses, one a concern. This page adds to jsonargparse what its users expect here:
list options take several words (`--data a.txt b.jsonl`), `--dry-run` means `--dry_run true`, and whatever is
unknown is refused with the nearest name.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import json
import math
import typing
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from jsonargparse import ArgumentParser, set_parsing_settings

from model.errors import InputError

Config = TypeVar("Config")

# These belong to the parser, not to a recipe.
_PARSER_FLAGS = ("config", "print_config", "help")


def parse(
    config_class: type[Config],
    argv: Sequence[str],
    prog: str,
    aliases: dict[str, str] | None = None,
    default_config: Path | None = None,
) -> Config:
    """Build `config_class` from a command line.

    Args:
        config_class: a dataclass; nested dataclasses give dotted names.
        argv: the words after the program's name.
        prog: the program's name, for --help.
        aliases: short flags, such as {"data": "data.paths"}.
        default_config: a YAML file read beneath everything else.

    A group of options with a method `settle(config, recipe, named)` is called with the whole configuration, what the
    YAML files alone make of it, and the names of the options on the command line.

    Raises:
        InputError: unknown option, wrong type, missing or malformed file; the message names the remedy.
        SystemExit: after --help or --print_config, code 0.
    """
    fields = dict(_leaf_fields(config_class))
    words = _normalise(argv, fields, aliases or {})
    places: dict[str, str] = {}
    for position, word in enumerate(words):
        if word == "--config":
            places |= _check_file(Path(words[position + 1]), fields)
    places = {name: place for name, place in places.items() if not any(word.startswith(f"--{name}=") for word in words)}
    parser = _build_parser(config_class, prog, default_config)
    _mend_help(parser, fields, aliases or {})

    def read(words: Sequence[str]) -> Config:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                values = parser.instantiate(parser.parse_args(words))
        except InputError:
            raise
        except Exception as error:  # jsonargparse raises several kinds; each is a sentence about the user's input
            raise InputError(_explain(str(error), fields, places)) from None
        return config_class(**{field.name: values[field.name] for field in dataclasses.fields(config_class)})  # type: ignore[arg-type]

    config = read(words)
    for group in vars(config).values():
        if hasattr(group, "settle"):
            files = [part for at, word in enumerate(words) if word == "--config" for part in words[at : at + 2]]
            group.settle(config, read(files), {word[2:].partition("=")[0] for word in words})
    return config


def to_yaml(config: Any) -> str:
    """The resolved recipe as YAML, in the order of its dataclasses; `--config` reads it back."""
    return yaml.safe_dump(dataclasses.asdict(config), sort_keys=False, allow_unicode=True)


def check_range(group: str, config: Any, least: float, *names: str, below: float = math.inf) -> None:
    """Numbers of a group of options lie in [least, below); None passes, nan does not.

    Raises:
        InputError: names the first option that does not.
    """
    for name in names:
        value = getattr(config, name)
        if value is not None and not least <= value < below:
            span = f"{least} or more" if below == math.inf else f"a value from {least} up to, not at, {below}"
            raise InputError(f"--{group}.{name} is {value}. Use {span}.")


def changes(before: str, config: Any) -> list[str]:
    """What differs between a saved recipe (YAML) and a configuration: "train.steps 100 -> 200", in order."""
    old, new = _flatten(yaml.safe_load(before)), _flatten(dataclasses.asdict(config))
    return [f"{name} {old.get(name)} -> {value}" for name, value in new.items() if old.get(name) != value]


def _flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        flat |= _flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat


def _build_parser(config_class: type, prog: str, default_config: Path | None) -> ArgumentParser:
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    description = (config_class.__doc__ or "").strip().splitlines()[0]
    if default_config:
        description += (
            f" The defaults below are those of the bundled demo ({default_config.parent.name}/{default_config.name}), "
            "which do not apply where --data is given: --data PATH --help shows those that do."
        )
    parser = ArgumentParser(
        prog=prog,
        description=description,
        exit_on_error=False,
        default_config_files=[str(default_config)] if default_config else [],
    )
    parser.add_argument("--config", action="config", help="YAML file; flags override it")
    parser.add_class_arguments(config_class)
    return parser


def _mend_help(parser: ArgumentParser, fields: dict[str, Any], aliases: dict[str, str]) -> None:
    """Show what `_normalise` takes: short flags, and no files for groups of options."""
    for action in parser._actions:
        # A list's words are gathered by `_normalise`; nothing is appended to one.
        action.option_strings = [word for word in action.option_strings if not word.endswith("+")]
        if action.dest in fields or action.dest in _PARSER_FLAGS:
            continue
        target = aliases.get(action.dest)
        action.metavar = "VALUE"
        action.help = f"the same as --{target}" if target else argparse.SUPPRESS


def _leaf_fields(config_class: type, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted name and type of every option, in order."""
    hints = typing.get_type_hints(config_class)
    for field in dataclasses.fields(config_class):
        kind = hints[field.name]
        if dataclasses.is_dataclass(kind):
            yield from _leaf_fields(typing.cast(type, kind), f"{prefix}{field.name}.")
        else:
            yield prefix + field.name, kind


def _normalise(argv: Sequence[str], fields: dict[str, Any], aliases: dict[str, str]) -> list[str]:
    """Flags with full dotted names; several words of a list option gathered into one."""
    words: list[str] = []
    position = 0
    while position < len(argv):
        word = argv[position]
        position += 1
        if not word.startswith("--"):
            raise InputError(f"{word!r} stands alone. Options begin with --; see --help.")
        flag, has_value, value = word[2:].partition("=")
        flag = flag.replace("-", "_")
        flag = aliases.get(flag, flag)
        values = [value] if has_value else []
        while not has_value and position < len(argv) and not argv[position].startswith("--"):
            values.append(argv[position])
            position += 1
        if flag in _PARSER_FLAGS:
            words += [f"--{flag}", *values]
            if flag == "config" and len(values) != 1:
                raise InputError("--config takes one YAML file.")
            continue
        written = word.partition("=")[0]
        _check_known(flag, fields, f"{written} is not an option", aliases)
        if typing.get_origin(fields[flag]) is list and not all(
            values or [""]
        ):  # a variable of the shell that is not set
            raise InputError(
                f"{written} is given {'an empty value' if values else 'no value'}. Name some, or leave it out."
            )
        words += _option_words(flag, fields[flag], values)
    return words


def _option_words(flag: str, kind: Any, values: list[str]) -> list[str]:
    if kind is bool and not values:
        values = ["true"]
    if typing.get_origin(kind) is list:
        if len(values) == 1 and values[0].startswith("["):
            return [f"--{flag}={values[0]}"]
        (item,) = typing.get_args(kind)
        return [f"--{flag}={json.dumps([_scalar(value, item, flag) for value in values], ensure_ascii=False)}"]
    if typing.get_origin(kind) is dict:
        pairs = [value.partition("=") for value in values]
        if not all(separator for _, separator, _ in pairs):
            raise InputError(f"--{flag} takes name=value pairs. Write them as in --{flag} user=ask assistant=answer.")
        return [f"--{flag}={json.dumps({key: value for key, _, value in pairs}, ensure_ascii=False)}"]
    if len(values) != 1:
        raise InputError(f"--{flag} takes one value, not {len(values)}. Give it {_type_name(kind)}.")
    return [f"--{flag}={values[0]}"]


def _scalar(value: str, kind: Any, flag: str) -> Any:
    try:
        return kind(value) if isinstance(kind, type) else value  # of a union a word is the text
    except ValueError:
        raise InputError(f"--{flag}: {value!r} is not {_type_name(kind)}.") from None


def _check_file(path: Path, fields: dict[str, Any]) -> dict[str, str]:
    """A YAML recipe is a mapping of known names. Returns where it sets each: {"train.steps": "recipe.yaml:2"}."""
    try:
        content = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except FileNotFoundError:
        raise InputError(f"{path}: there is no such recipe. Give --config an existing YAML file.") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{path}:{mark.line + 1}" if mark else f"{path}"
        raise InputError(f"{place}: not readable as YAML ({str(error).splitlines()[0]}). Mend the file.") from None
    if not isinstance(content, yaml.MappingNode):
        raise InputError(f"{path}: a recipe is a mapping of names to values. Write lines such as out: ckpt/pretrain.")
    places: dict[str, str] = {}

    def walk(mapping: yaml.MappingNode, prefix: str) -> None:
        for key, value in mapping.value:
            name, place = f"{prefix}{key.value}", f"{path}:{key.start_mark.line + 1}"
            is_group = any(field.startswith(f"{name}.") for field in fields)
            if is_group and isinstance(value, yaml.MappingNode):
                walk(value, f"{name}.")
            elif is_group:
                found = value.value if isinstance(value, yaml.ScalarNode) else "a list"
                raise InputError(f"{place}: {name} is a group of options, not {found}. Write its options below it.")
            else:
                _check_known(name, fields, f"{place}: {name} is not an option")
                places[name] = place

    walk(content, "")
    return places


def _check_known(name: str, fields: dict[str, Any], found: str, aliases: Iterable[str] = ()) -> None:
    if name in fields:
        return
    begun = sorted((known for known in [*aliases, *fields] if known.startswith(name)), key=len)
    close = begun or difflib.get_close_matches(name, fields, n=1, cutoff=0.5)
    close = close or [field for field in fields if field.rpartition(".")[2] == name.rpartition(".")[2]]
    hint = f"Did you mean --{close[0]}?" if close else "See --help for the list."
    raise InputError(f"{found}. {hint}")


def _explain(message: str, fields: dict[str, Any], places: dict[str, str]) -> str:
    """A parser's message as one sentence: option or line of a recipe, value, what was expected."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    key = message.partition('key "')[2].partition('"')[0]
    if key not in fields:
        return f"{' '.join(lines)} See --help."
    given = next((line.partition(": ")[2] for line in lines if line.startswith("Given value:")), "")
    given = given or next((line.rpartition("Got value: ")[2] for line in lines if "Got value: " in line), "")
    found = f"{given!r} is not" if given else "the value is not"
    where = f"{places[key]}: {key}" if key in places else f"--{key}"
    return f"{where}: {found} {_type_name(fields[key])}. Correct it."


def _type_name(kind: Any) -> str:
    """A type in a user's words."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Literal:
        return "one of " + ", ".join(map(str, args))
    if origin is list:
        return f"a list ({_type_name(args[0])} each)"
    if origin is dict:
        return "a mapping"
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", type(None): "null"}
    return " or ".join(names.get(one) or (_type_name(one) if args else str(one)) for one in (args or (kind,)))
