"""What goes wrong because of what the user gave: said once, clearly, without a traceback."""

import difflib
import math
import reprlib
from collections.abc import Iterable
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints


class UserError(ValueError):
    """The request cannot be met. The message says what was given and what is accepted.

    The command line prints it as one line and exits with code 2.
    """


def unknown(what: str, given: str, accepted: Iterable[str]) -> UserError:
    """A UserError for a name that is none of the accepted ones, with the nearest of them."""
    names = [str(name) for name in accepted]
    lower = {name.lower(): name for name in names}
    near = difflib.get_close_matches(given.lower(), lower, n=1, cutoff=0.5)
    hint = f" Did you mean {lower[near[0]]!r}?" if near else ""
    return UserError(f"unknown {what} {given!r}; accepted: {', '.join(names)}.{hint}")


class RunError(RuntimeError):
    """A run cannot go on: it diverged, or its data is too broken.

    The message says what happened and what to do. The command line prints it as one line and exits
    with code 1.
    """


class ToldElsewhereError(RunError):
    """A run cannot go on, and another of its ranks has said why."""


def check_types(config: object, kind: type) -> None:
    """Check the fields that a dataclass `kind` declares against its annotations, in an instance.

    Configurations come from YAML and from Python, which check nothing by themselves.

    Raises:
        UserError: naming the field, what was given and what is accepted.
    """
    for name, annotation in get_type_hints(kind).items():
        value = getattr(config, name)
        choices = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)
        if not any(_fits(value, choice) for choice in choices):
            accepted = [
                option for c in choices for option in (get_args(c) if get_origin(c) is Literal else (c,))
            ]
            if isinstance(value, str) and all(isinstance(option, str) for option in accepted):
                raise unknown(name, value, accepted)
            names = ", ".join(_SPOKEN.get(option, str(option)) for option in accepted)
            raise UserError(f"{name} is {_BRIEF.repr(value)}; accepted: {names}")


_LARGEST = 2**63
"""Numbers of a configuration are below this, positive or negative: more digits are no one's intention."""
_BRIEF = reprlib.Repr()  # a few lines of YAML can stand for a text of any length
_BRIEF.maxstring = _BRIEF.maxother = 200
_BRIEF.maxlevel, _BRIEF.maxtuple, _BRIEF.maxlist = 3, 20, 20

_SPOKEN: dict[Any, str] = {
    int: "a whole number",
    float: "a finite number",
    bool: "true or false",
    str: "a text",
    type(None): "nothing",
    tuple[int, ...]: "whole numbers",
    tuple[float, ...]: "finite numbers",
    tuple[str, ...]: "texts",
}


def _fits(value: object, kind: Any) -> bool:
    origin = get_origin(kind)
    if origin is Literal:
        return value in get_args(kind)
    if origin is tuple:
        return isinstance(value, tuple) and all(_fits(item, get_args(kind)[0]) for item in value)
    if kind is float and isinstance(value, float):
        return math.isfinite(value)
    if kind in (int, float):
        return isinstance(value, int) and not isinstance(value, bool) and abs(value) < _LARGEST
    return isinstance(value, kind)
