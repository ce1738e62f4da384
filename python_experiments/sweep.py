"""Sweeps: `--set FIELD=VALUE,VALUE` changes a field of an experiment's configuration, one variant a value."""

from __future__ import annotations

import dataclasses
import itertools
import json
import types
from collections.abc import Iterator, Sequence
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from python_experiments.config import RunConfig

#: Full names of fields and what they are set to.
Changes = tuple[tuple[str, Any], ...]

#: Fields that have an option of their own.
OPTIONS = {"rates": "--rates", "device": "--device"}


def variants(config: RunConfig, texts: Sequence[str]) -> list[Changes]:
    """Every combination of the values given to fields of a configuration.

    Args:
        config: The configuration whose fields are named.
        texts: "FIELD=VALUE,VALUE,...". FIELD is a full name such as "network.width", or its last part where that
            is unique. A VALUE is JSON (numbers, true, null, lists) or a bare word.

    Returns:
        One entry for each combination; a single empty one without `texts`.

    Raises:
        ValueError: There is no such field, or a value is not of its type; the message says what there is.
    """
    axes = [_axis(config, text) for text in texts]
    names = [axis[0][0] for axis in axes]
    if twice := {name for name in names if names.count(name) > 1}:
        raise ValueError(f"--set: expected each field once, got {', '.join(sorted(twice))} more than once")
    return list(itertools.product(*axes))


def apply(config: RunConfig, changes: Changes) -> RunConfig:
    """The configuration with its fields set."""
    for name, value in changes:
        config = _replaced(config, name.split("."), value)
    return config


def in_words(changes: Changes) -> str:
    """Such as "network.width=64, batch_size=5"."""
    return ", ".join(f"{name}={_word(value)}" for name, value in changes)


def order(changes: Changes) -> list[tuple[str, bool, float, str]]:
    """Key by which variants are sorted: by field, numbers by size, before everything else."""
    number = [isinstance(value, (int, float)) for _, value in changes]
    return [
        (name, not known, float(value) if known else 0.0, str(value))
        for (name, value), known in zip(changes, number, strict=True)
    ]


def _word(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))


def _axis(config: RunConfig, text: str) -> list[tuple[str, Any]]:
    name, equals, values = text.partition("=")
    if not equals or not values:
        raise ValueError(f"--set: expected FIELD=VALUE,VALUE,..., got {text!r}")
    known = dict(_fields(config))
    found = [full for full in known if full == name] or [f for f in known if f.rpartition(".")[2] == name]
    if name in OPTIONS:
        raise ValueError(f"--set {name}: use {OPTIONS[name]}")
    if len(found) != 1:
        raise ValueError(f"--set: expected one of {', '.join(found or known)}, got {name!r}")
    (field,) = found
    chosen = []
    for part in _parts(values):
        try:
            value = json.loads(part)
        except ValueError:
            value = {"none": None}.get(part.lower(), part)
        if not _fits(value, known[field]):
            raise ValueError(f"--set {field}: expected {_type_in_words(known[field])}, got {part!r}")
        value = _typed(value, known[field])
        if (field, value) not in chosen:
            chosen.append((field, value))
    return chosen


def _parts(text: str) -> Iterator[str]:
    """The values between the commas outside of brackets."""
    start = depth = 0
    for at, letter in enumerate(text):
        depth += (letter == "[") - (letter == "]")
        if letter == "," and depth == 0:
            yield text[start:at].strip()
            start = at + 1
    yield text[start:].strip()


def _fields(part: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Full name and type of every field of a configuration, those of its parts included."""
    hints = get_type_hints(type(part))
    for field in dataclasses.fields(part):
        value = getattr(part, field.name)
        if dataclasses.is_dataclass(value):
            yield from _fields(value, f"{prefix}{field.name}.")
        elif prefix + field.name not in OPTIONS:
            yield prefix + field.name, hints[field.name]


def _replaced(part: Any, names: Sequence[str], value: Any) -> Any:
    if len(names) > 1:
        value = _replaced(getattr(part, names[0]), names[1:], value)
    return dataclasses.replace(part, **{names[0]: value})


def _fits(value: Any, hint: Any) -> bool:
    """Whether a JSON value is one of the type."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return any(_fits(value, argument) for argument in arguments)
    if origin is Literal:
        return value in arguments
    if origin is tuple:
        variable = arguments[-1] is ...  # other tuples hold what cannot be written here, such as a Rate
        return variable and isinstance(value, list) and all(_fits(entry, arguments[0]) for entry in value)
    if hint is type(None):
        return value is None
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return hint in (str, bool) and isinstance(value, hint)


def _typed(value: Any, hint: Any) -> Any:
    """The value as the dataclass holds it: 1 and 1.0 must give the same run."""
    members = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    if isinstance(value, int) and not isinstance(value, bool) and float in members and int not in members:
        return float(value)
    return tuple(value) if isinstance(value, list) else value


def _type_in_words(hint: Any) -> str:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(_type_in_words(argument) for argument in arguments))
    if origin is Literal:
        return " or ".join(map(str, arguments))
    if origin is tuple:
        if get_origin(arguments[0]) is tuple:
            return "[]"
        return f"a list such as [1,2] of {_type_in_words(arguments[0])}"
    return {int: "an integer", float: "a number", str: "a word", bool: "true or false"}.get(hint, "null")
