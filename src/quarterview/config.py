"""Configuration: small checked parts, composed into one object for each command.

A *part* is a frozen dataclass that a package owns (`LoopConfig`, `OptimConfig`, …). pydantic checks the
type and the range of every field, once, when a part is made. The text below a field is its help, and
markers in its annotation say what else it is::

    @part
    class LoopConfig:
        \"\"\"How long a run trains.\"\"\"

        batch_size: Annotated[int, Ge(1), FIRST] = 256
        \"\"\"Images per update.\"\"\"

A *composed* configuration (`Composed`) is a frozen dataclass of parts. Its flags are the fields of all its
parts, whose names are unique, so that ``config.loop.batch_size`` is the flag ``--batch-size``. A field whose
type is a union of parts, such as the method, is chosen by a flag of its own.

Nothing here imports torch: ``quarterview --help`` reads these classes.
"""

import dataclasses
import difflib
import json
import os
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import cache, reduce
from operator import or_
from types import NoneType, UnionType
from typing import (
    Annotated,
    Any,
    ClassVar,
    Literal,
    Self,
    TypeVar,
    Union,
    dataclass_transform,
    get_args,
    get_origin,
    get_type_hints,
)

from annotated_types import Ge, Gt, Le, Lt
from pydantic import BeforeValidator, ConfigDict, PlainValidator, ValidationError
from pydantic.dataclasses import dataclass as checked_dataclass

from quarterview.errors import UserError, unknown

# ---------------------------------------------------------------------- markers and types of fields


@dataclass(frozen=True)
class Marker:
    """What a field is, beside its type; written into its annotation."""

    name: str


FIRST = Marker("first")
"""A newcomer needs this flag: it stands at the top of the help."""
RESEARCH = Marker("research")
"""Few need this flag: it stands at the end of the help."""
MAY_CHANGE = Marker("may change")
"""A resumed run may be given another value."""
PATH = Marker("path")
"""A place on this machine: never shown in a model card."""
POSITIONAL = Marker("positional")
"""Given on the command line by its position, without its name."""


def _as_text(value: object) -> str:
    # Not pydantic's str, which refuses the surrogates that stand for a file name that is not UTF-8.
    if not isinstance(value, str | os.PathLike):
        raise ValueError("not a text")  # noqa: TRY004
    return os.fspath(value)


def _as_tuple(value: object) -> object:
    """A single value, a list or a tuple as a tuple: YAML has lists, and users write one item alone."""
    if isinstance(value, str | os.PathLike | int | float):
        return (value,)
    return tuple(value) if isinstance(value, list) else value


def _twice(value: object) -> object:
    """One side of an image as height and width."""
    value = _as_tuple(value)
    return value * 2 if isinstance(value, tuple) and len(value) == 1 else value


Text = Annotated[str, PlainValidator(_as_text)]
Texts = Annotated[tuple[Text, ...], BeforeValidator(_as_tuple)]
Ints = Annotated[tuple[int, ...], BeforeValidator(_as_tuple)]
Floats = Annotated[tuple[float, ...], BeforeValidator(_as_tuple)]
Size = Annotated[tuple[Annotated[int, Ge(1)], ...], BeforeValidator(_twice)]
"""Height and width in pixels; one number means a square."""


# ---------------------------------------------------------------------- parts

_LARGEST = 2**63  # more digits are no one's intention, and overflow tensors
_STRICT = ConfigDict(strict=True, use_attribute_docstrings=True, allow_inf_nan=False, extra="forbid")


_Kind = TypeVar("_Kind", bound=type)


@dataclass_transform(frozen_default=True)
def part(kind: _Kind) -> _Kind:
    """Make a class a frozen dataclass whose fields are checked when it is made.

    Raises:
        UserError: from the class, if a value has another type or lies out of range. The message names the
            flag, what was given and what to give instead.
    """
    made: Any = checked_dataclass(frozen=True, config=_STRICT)(kind)
    checked_init = made.__init__

    def init(self: object, *args: object, **values: object) -> None:
        try:
            checked_init(self, *args, **values)
        except ValidationError as error:
            raise _in_our_words(error, made) from None
        for name in field_specs(made):
            value = getattr(self, name)
            if isinstance(value, int) and abs(value) >= _LARGEST:
                raise UserError(
                    f"{flag(name)} {_BRIEF.repr(value)} is out of range. Give a number below 2^63."
                )

    made.__init__ = init
    return made


@dataclass(frozen=True)
class FieldSpec:
    """A field of a part, as the command line and records need it."""

    name: str
    annotation: Any
    """The type without markers and checks."""
    default: Any
    help: str
    markers: frozenset[Marker]
    metadata: tuple[Any, ...]
    """Checks of the range."""


@cache
def field_specs(kind: type) -> Mapping[str, FieldSpec]:
    """The fields of a part by name, in order."""
    specs = {}
    hints = get_type_hints(kind, include_extras=True)
    for field in fields(kind):
        annotation, metadata = _split(hints[field.name])
        specs[field.name] = FieldSpec(
            field.name,
            annotation,
            field.default,
            " ".join(_help_of(kind, field.name).split()),
            frozenset(item for item in metadata if isinstance(item, Marker)),
            tuple(item for item in metadata if not isinstance(item, Marker)),
        )
    return specs


def _split(hint: Any) -> tuple[Any, tuple[Any, ...]]:
    """A type without what annotates it, anywhere in it, and what annotates it at the top."""
    if get_origin(hint) is Annotated:
        inner, *metadata = get_args(hint)
        plain, more = _split(inner)
        return plain, (*more, *metadata)
    arguments = get_args(hint)
    if get_origin(hint) in (Union, UnionType):
        parts = [_split(argument) for argument in arguments]
        plain: Any = reduce(or_, (kind for kind, _ in parts))
        return plain, tuple(item for _, more in parts for item in more)
    if get_origin(hint) is tuple:
        parts = [(a, ()) if a is ... else _split(a) for a in arguments]
        items: Any = tuple(kind for kind, _ in parts)
        return tuple.__class_getitem__(items), tuple(item for _, more in parts for item in more)
    return hint, ()


def _help_of(kind: type, name: str) -> str:
    for ancestor in kind.__mro__:  # pydantic keeps the text below a field in the class that declares it alone
        found = getattr(ancestor, "__pydantic_fields__", {}).get(name)
        if found is not None and found.description:
            return found.description
    return ""


def flag(name: str) -> str:
    """The flag of a field: ``batch_size`` → ``--batch-size``."""
    return "--" + name.replace("_", "-")


# ---------------------------------------------------------------------- what is wrong with a value

_BRIEF = reprlib.Repr()  # a few lines of YAML can stand for a text of any length
_BRIEF.maxstring = _BRIEF.maxother = 200
_BRIEF.maxlevel, _BRIEF.maxtuple, _BRIEF.maxlist, _BRIEF.maxlong = 3, 20, 20, 40
_KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
_LISTS = {int: "whole numbers", float: "numbers", str: "texts"}


def _in_our_words(error: ValidationError, kind: type) -> UserError:
    first = error.errors(include_url=False)[0]
    cause = first.get("ctx", {}).get("error")
    if isinstance(cause, UserError):  # a check of several fields, which has its own words
        return cause
    place = first["loc"][0] if first["loc"] else ""
    name = list(field_specs(kind))[place] if isinstance(place, int) else place  # a number: by position
    if first["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        return unknown("option", name, field_specs(kind))
    if name not in field_specs(kind):
        return UserError(f"{kind.__name__}: {first['msg']}")
    spec, given = field_specs(kind)[name], first["input"]
    shown = given if isinstance(given, str) else _BRIEF.repr(given)
    if first["type"] == "literal_error":
        return unknown(f"value of {flag(name)}:", str(given), _literals(spec.annotation))
    is_huge = isinstance(given, int) and abs(given) >= _LARGEST  # which no float holds
    wrong = "out of range" if is_huge or first["type"] in _OUT_OF_RANGE else "of the wrong type"
    return UserError(f"{flag(name)} {shown} is {wrong}. Give {accepted(spec)}.")


_OUT_OF_RANGE = ("greater_than", "greater_than_equal", "less_than", "less_than_equal", "finite_number")


def _literals(annotation: Any) -> list[str]:
    if get_origin(annotation) is Literal:
        return [str(value) for value in get_args(annotation)]
    return [text for argument in get_args(annotation) for text in _literals(argument)]


def accepted(spec: FieldSpec) -> str:
    """What a field takes, in words: ``a number above 0 and below 1``."""
    choices = get_args(spec.annotation) if get_origin(spec.annotation) in (Union, UnionType) else ()
    kinds = [kind for kind in choices or (spec.annotation,) if kind is not NoneType]
    words = [
        ", ".join(_literals(kind))
        if get_origin(kind) is Literal
        else _LISTS.get(get_args(kind)[0], "values")
        if get_origin(kind) is tuple
        else _KINDS.get(kind, getattr(kind, "__name__", str(kind)))
        for kind in kinds
    ]
    limits = [text for check in spec.metadata for text in _limit(check)]
    text = " ".join([" or ".join(words), " and ".join(limits)]).strip()
    return f"{text}, or nothing" if NoneType in choices else text


def _limit(check: object) -> list[str]:
    for kind, attribute, word in (
        (Gt, "gt", "above"),
        (Ge, "ge", "of at least"),
        (Lt, "lt", "below"),
        (Le, "le", "of at most"),
    ):
        if isinstance(check, kind):
            return [f"{word} {getattr(check, attribute):g}"]
    return []


# ---------------------------------------------------------------------- composed configurations


def _shared(current: Any, kind: type) -> dict[str, Any]:
    """What a part of another class takes over: fields of both, where both have the same default."""
    theirs, ours = field_specs(type(current)), field_specs(kind)
    return {
        name: getattr(current, name)
        for name, spec in ours.items()
        if name in theirs and theirs[name].default == spec.default
    }


class Composed:
    """A configuration made of parts; subclasses are frozen dataclasses whose fields are parts.

    Attributes:
        RENAMED: flags of earlier versions and what they are called today.
    """

    RENAMED: ClassVar[Mapping[str, str]] = {}

    def __post_init__(self) -> None:
        for name, hint in get_type_hints(type(self)).items():
            if name != "RENAMED" and not isinstance(getattr(self, name), hint):
                kind = type(self).__name__
                given = _BRIEF.repr(getattr(self, name))
                raise UserError(
                    f"{kind}({name}={given}) is not a part of a configuration. Give flags to "
                    f"{kind}.from_flags({name}=…)."
                )

    @classmethod
    def from_flags(cls, **flags: Any) -> Self:
        """A configuration from its flags as keywords: ``PretrainConfig.from_flags(data="photos", epochs=5)``.

        Raises:
            UserError: if a flag is unknown, or its value is not accepted.
        """
        return cls().with_flags(**flags)

    def with_flags(self, **flags: Any) -> Self:
        """A copy in which some flags have other values.

        A flag that chooses a part, such as ``method="simclr"``, replaces that part by another, which keeps
        the values of fields that both have with the same default, and brings along the defaults that it has
        for other parts, unless those are given, too.

        Raises:
            UserError: if a flag is unknown, or its value is not accepted.
        """
        flags = {self.RENAMED.get(name, name): value for name, value in flags.items()}
        parts = self.parts()
        for name, kinds in self.choices().items():
            chosen = flags.pop(name, parts[name].name)
            if isinstance(chosen, tuple(kinds.values())):  # the part itself
                parts[name], chosen = chosen, chosen.name
            if chosen not in kinds:
                raise unknown(name, str(chosen), kinds)
            if chosen != parts[name].name:
                own = {key: flags.pop(key) for key in field_specs(kinds[chosen]) if key in flags}
                parts[name] = kinds[chosen](**{**_shared(parts[name], kinds[chosen]), **own})
                flags = {**kinds[chosen].other_defaults, **flags}
        for name, value in list(flags.items()):
            if name in parts and isinstance(value, type(parts[name])):  # a whole part
                parts[name] = flags.pop(name)
        for name, current in parts.items():
            own = {key: flags.pop(key) for key in field_specs(type(current)) if key in flags}
            if own:
                parts[name] = replace(current, **own)
        for name in flags:
            raise self.owners(name, parts) or self.unknown_flag(name)
        return type(self)(**parts)

    def parts(self) -> dict[str, Any]:
        """The parts by their names."""
        return {field.name: getattr(self, field.name) for field in fields(self)}  # type: ignore[arg-type]

    @classmethod
    def choices(cls) -> dict[str, dict[str, Any]]:
        """The parts that are one of several, with the classes that each may have, by name."""
        return {
            name: {kind.name: kind for kind in get_args(hint)}
            for name, hint in get_type_hints(cls).items()
            if get_origin(hint) in (Union, UnionType)
        }

    def unknown_flag(self, name: str) -> UserError:
        """The error for a flag that no configuration of this kind has."""
        near = difflib.get_close_matches(flag(name), [flag(known) for known in self.flags()], n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        return UserError(f"{flag(name)} is not a flag here.{hint}")

    def owners(self, name: str, parts: Mapping[str, Any] | None = None) -> UserError | None:
        """The error for a flag of another method than the one that is chosen; None if no method has it.

        Args:
            parts: what is chosen; by default the parts of this configuration.
        """
        parts = self.parts() if parts is None else parts
        for choice, kinds in self.choices().items():
            owners = [other for other, kind in kinds.items() if name in field_specs(kind)]
            if owners:
                given = f"{flag(choice)} {parts[choice].name}"
                return UserError(
                    f"{flag(name)} is not a flag of {given}. Remove it, or use {flag(choice)} "
                    f"{' or '.join(owners)}."
                )
        return None

    def flags(self) -> dict[str, Any]:
        """Every flag's value, by its name."""
        values: dict[str, Any] = {}
        for name, its in self.parts().items():
            if name in self.choices():
                values[name] = its.name
            values |= {key: getattr(its, key) for key in field_specs(type(its))}
        return values

    def specs(self) -> dict[str, FieldSpec]:
        """The fields of all parts, by flag name; those that choose a part are not among them."""
        return {key: spec for its in self.parts().values() for key, spec in field_specs(type(its)).items()}

    def marked(self, marker: Marker) -> frozenset[str]:
        """The names of the flags with a marker."""
        return frozenset(name for name, spec in self.specs().items() if marker in spec.markers)

    # ------------------------------------------------------------------ as YAML and JSON hold it

    def to_plain(self) -> dict[str, Any]:
        """Nested tables, lists and numbers, as JSON and YAML hold them."""
        plain: dict[str, Any] = {}
        for name, its in self.parts().items():
            chosen = {"name": its.name} if name in self.choices() else {}
            plain[name] = chosen | json.loads(json.dumps(dataclasses.asdict(its)))
        return plain

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> Self:
        """The configuration that `to_plain` wrote, or an older version, or a person by hand.

        Raises:
            UserError: if a name is unknown, or a value is not accepted.
        """
        return cls.from_flags(**cls.flat(plain))

    @classmethod
    def flat(cls, plain: Mapping[str, Any]) -> dict[str, Any]:
        """The flags in a table of YAML or JSON: nested by parts, or flat as version 0.1 wrote it, or both.

        Raises:
            UserError: if a part is no table, or a value is one.
        """
        names, choices = {field.name for field in fields(cls)}, cls.choices()  # type: ignore[arg-type]
        flags: dict[str, Any] = {}
        for name, value in plain.items():
            if name in names and isinstance(value, Mapping):
                inner = dict(value)
                if name in choices and "name" in inner:
                    flags[name] = inner.pop("name")
                flags |= inner
            elif isinstance(value, Mapping):
                raise UserError(f"{name} is a table. Give a number, a text or a list of them.")
            elif name in names and name not in choices and name not in cls().specs():
                raise UserError(f"{name} is {_BRIEF.repr(value)}. Give a table of its fields.")
            else:
                flags[str(name)] = value
        return cls.upgrade(flags)

    @classmethod
    def upgrade(cls, flags: dict[str, Any]) -> dict[str, Any]:
        """Flags as an earlier version wrote them into a file, by today's names."""
        return {cls.RENAMED.get(name, name): value for name, value in flags.items()}
