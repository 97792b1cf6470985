"""Configuration: validated dataclasses (parts), composed into one configuration for each command.

A *part* is a frozen dataclass for one topic (`LoopConfig`, `OptimConfig`, …). pydantic checks the type and
range of every field when a part is created. The docstring below a field is its help text, and markers in its
annotation give further properties::

    @part
    class LoopConfig:
        \"\"\"Schedule.\"\"\"

        batch_size: Annotated[int, Ge(1), FIRST] = 256
        \"\"\"Images per update.\"\"\"

A *composed* configuration (`ComposedConfig`) is a frozen dataclass of parts. Its flags are the fields of all
parts, whose names are unique: ``config.loop.batch_size`` is the flag ``--batch-size``. A part that is a union
of classes, such as the method, is chosen by a flag of its own (``--method``).

Configuration modules do not import torch, so that ``quarterview --help`` is fast.
"""

import dataclasses
import difflib
import json
import logging
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

LOGGER = logging.getLogger("quarterview")

# ---------------------------------------------------------------------- markers and types of fields


@dataclass(frozen=True)
class Marker:
    """A property of a field, given in its annotation."""

    name: str


FIRST = Marker("first")
"""Shown in the first group of the help."""
RESEARCH = Marker("research")
"""Shown in the last group of the help."""
MAY_CHANGE = Marker("may change")
"""May change when a run is resumed."""
PATH = Marker("path")
"""A path on this machine, which is never shown in a model card."""
POSITIONAL = Marker("positional")
"""A positional argument of the command line."""


def _as_text(value: object) -> str:
    # pydantic's str does not accept surrogate escapes, which file names that are not UTF-8 need.
    if not isinstance(value, str | os.PathLike):
        raise ValueError("not a string")  # noqa: TRY004
    return os.fspath(value)


def _as_tuple(value: object) -> object:
    """Convert a single value or a list, as in YAML, to a tuple."""
    if isinstance(value, str | os.PathLike | int | float):
        return (value,)
    return tuple(value) if isinstance(value, list) else value


def _as_pair(value: object) -> object:
    """Convert one side length of an image to height and width."""
    value = _as_tuple(value)
    return value * 2 if isinstance(value, tuple) and len(value) == 1 else value


Text = Annotated[str, PlainValidator(_as_text)]
Texts = Annotated[tuple[Text, ...], BeforeValidator(_as_tuple)]
Ints = Annotated[tuple[int, ...], BeforeValidator(_as_tuple)]
Floats = Annotated[tuple[float, ...], BeforeValidator(_as_tuple)]
Size = Annotated[tuple[Annotated[int, Ge(1)], ...], BeforeValidator(_as_pair)]
"""Height and width in pixels; one number means a square."""


# ---------------------------------------------------------------------- parts

_MAX_INT = 2**63  # larger integers overflow tensors
_STRICT = ConfigDict(strict=True, use_attribute_docstrings=True, allow_inf_nan=False, extra="forbid")


_Kind = TypeVar("_Kind", bound=type)


@dataclass_transform(frozen_default=True)
def part(kind: _Kind) -> _Kind:
    """Make a class a frozen dataclass whose fields are validated when an instance is created.

    Fields of earlier versions, which its class variable RENAMED lists, are accepted with a warning.

    Raises:
        UserError: from the class, if a value has a wrong type or is out of range.
    """
    validated: Any = checked_dataclass(frozen=True, config=_STRICT)(kind)
    checked_init = validated.__init__

    def init(self: object, *args: object, **values: object) -> None:
        values = use_new_names(values, get_renamed_fields(validated))
        try:
            checked_init(self, *args, **values)
        except ValidationError as error:
            raise _to_user_error(error, validated) from None
        for name in get_field_specs(validated):
            value = getattr(self, name)
            if isinstance(value, int) and abs(value) >= _MAX_INT:
                raise UserError(
                    f"{flag_name(name)} {_SHORT_REPR.repr(value)} is out of range. Give a number below 2^63."
                )

    validated.__init__ = init
    return validated


@dataclass(frozen=True)
class FieldSpec:
    """The name, type, default, help and markers of a field of a part."""

    name: str
    annotation: Any
    """The type without markers and range checks."""
    default: Any
    help: str
    markers: frozenset[Marker]
    metadata: tuple[Any, ...]
    """Range checks (`Ge`, …) and validators."""


@cache
def get_field_specs(kind: type) -> Mapping[str, FieldSpec]:
    """Return the fields of a part by name, in order."""
    specs = {}
    hints = get_type_hints(kind, include_extras=True)
    for field in fields(kind):
        annotation, metadata = _split_annotation(hints[field.name])
        specs[field.name] = FieldSpec(
            field.name,
            annotation,
            field.default,
            " ".join(_get_help(kind, field.name).split()),
            frozenset(item for item in metadata if isinstance(item, Marker)),
            tuple(item for item in metadata if not isinstance(item, Marker)),
        )
    return specs


def _split_annotation(hint: Any) -> tuple[Any, tuple[Any, ...]]:
    """Return a type without annotations at any level, and the annotations of its top level."""
    if get_origin(hint) is Annotated:
        inner, *metadata = get_args(hint)
        plain, more = _split_annotation(inner)
        return plain, (*more, *metadata)
    arguments = get_args(hint)
    if get_origin(hint) in (Union, UnionType):
        parts = [_split_annotation(argument) for argument in arguments]
        plain: Any = reduce(or_, (kind for kind, _ in parts))
        return plain, tuple(item for _, more in parts for item in more)
    if get_origin(hint) is tuple:
        parts = [(a, ()) if a is ... else _split_annotation(a) for a in arguments]
        items: Any = tuple(kind for kind, _ in parts)
        return tuple.__class_getitem__(items), tuple(item for _, more in parts for item in more)
    return hint, ()


def _get_help(kind: type, name: str) -> str:
    for ancestor in kind.__mro__:  # pydantic keeps field docstrings only in the declaring class
        found = getattr(ancestor, "__pydantic_fields__", {}).get(name)
        if found is not None and found.description:
            return found.description
    return ""


def flag_name(name: str) -> str:
    """Return the flag of a field: ``batch_size`` → ``--batch-size``."""
    return "--" + name.replace("_", "-")


# ---------------------------------------------------------------------- fields of earlier versions


def get_renamed_fields(kind: type) -> Mapping[str, str]:
    """Return the old names of a part's fields and their new names, from its class variable RENAMED."""
    return getattr(kind, "RENAMED", {})


def use_new_names(values: Mapping[str, Any], renamed: Mapping[str, str], warn: bool = True) -> dict[str, Any]:
    """Return values by field name, with old field names replaced by new ones.

    Args:
        values: by field name.
        renamed: old names and their new names.
        warn: log a warning for each old name.

    Raises:
        UserError: if a value is given under the old and the new name.
    """
    for old in values.keys() & renamed.keys():
        if renamed[old] in values:
            raise UserError(
                f"{flag_name(old)} is now called {flag_name(renamed[old])}, and both are given. Remove "
                f"{flag_name(old)}."
            )
        if warn:
            warn_renamed(old, renamed[old])
    return {renamed.get(name, name): value for name, value in values.items()}


def warn_renamed(old: str, new: str) -> None:
    """Log a warning that a field has a new name."""
    LOGGER.warning(
        "%s is now called %s. The old name will go in the next version.", flag_name(old), flag_name(new)
    )


# ---------------------------------------------------------------------- errors for invalid values

_SHORT_REPR = reprlib.Repr()  # YAML aliases can make values of any length
_SHORT_REPR.maxstring = _SHORT_REPR.maxother = 200
_SHORT_REPR.maxlevel, _SHORT_REPR.maxtuple, _SHORT_REPR.maxlist, _SHORT_REPR.maxlong = 3, 20, 20, 40
_TYPE_NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "a string"}
_LIST_NAMES = {int: "whole numbers", float: "numbers", str: "strings"}


def _to_user_error(error: ValidationError, kind: type) -> UserError:
    first = error.errors(include_url=False)[0]
    cause = first.get("ctx", {}).get("error")
    if isinstance(cause, UserError):  # from a check of several fields in __post_init__
        return cause
    location = first["loc"][0] if first["loc"] else ""  # an index for a positional argument
    name = list(get_field_specs(kind))[location] if isinstance(location, int) else location
    if first["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        return unknown("option", name, get_field_specs(kind))
    if name not in get_field_specs(kind):
        return UserError(f"{kind.__name__}: {first['msg']}")
    spec, given = get_field_specs(kind)[name], first["input"]
    shown = given if isinstance(given, str) else _SHORT_REPR.repr(given)
    if first["type"] == "literal_error":
        return unknown(f"value of {flag_name(name)}:", str(given), _get_literals(spec.annotation))
    is_huge = isinstance(given, int) and abs(given) >= _MAX_INT  # too large for a float
    wrong = "out of range" if is_huge or first["type"] in _OUT_OF_RANGE else "of the wrong type"
    return UserError(f"{flag_name(name)} {shown} is {wrong}. Give {describe_accepted(spec)}.")


_OUT_OF_RANGE = ("greater_than", "greater_than_equal", "less_than", "less_than_equal", "finite_number")


def _get_literals(annotation: Any) -> list[str]:
    if get_origin(annotation) is Literal:
        return [str(value) for value in get_args(annotation)]
    return [text for argument in get_args(annotation) for text in _get_literals(argument)]


def describe_accepted(spec: FieldSpec) -> str:
    """Describe the accepted values of a field: ``a number above 0 and below 1``."""
    choices = get_args(spec.annotation) if get_origin(spec.annotation) in (Union, UnionType) else ()
    kinds = [kind for kind in choices or (spec.annotation,) if kind is not NoneType]
    words = [
        ", ".join(_get_literals(kind))
        if get_origin(kind) is Literal
        else _LIST_NAMES.get(get_args(kind)[0], "values")
        if get_origin(kind) is tuple
        else _TYPE_NAMES.get(kind, getattr(kind, "__name__", str(kind)))
        for kind in kinds
    ]
    limits = [text for check in spec.metadata for text in _describe_limit(check)]
    text = " ".join([" or ".join(words), " and ".join(limits)]).strip()
    return f"{text}, or nothing" if NoneType in choices else text


def _describe_limit(check: object) -> list[str]:
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


def _get_shared_values(current: Any, kind: type) -> dict[str, Any]:
    """Return the values of a part that another class also has as fields with the same defaults."""
    theirs, ours = get_field_specs(type(current)), get_field_specs(kind)
    return {
        name: getattr(current, name)
        for name, spec in ours.items()
        if name in theirs and theirs[name].default == spec.default
    }


class ComposedConfig:
    """Base class of composed configurations, which are frozen dataclasses whose fields are parts.

    Attributes:
        RENAMED: old names of the flags that choose a part, and their new names. Each part has such a table of
            its own fields.
    """

    RENAMED: ClassVar[Mapping[str, str]] = {}

    def __post_init__(self) -> None:
        for name, hint in get_type_hints(type(self)).items():
            if name != "RENAMED" and not isinstance(getattr(self, name), hint):
                kind = type(self).__name__
                given = _SHORT_REPR.repr(getattr(self, name))
                raise UserError(
                    f"{kind}({name}={given}) is not a part of a configuration. Use "
                    f"{kind}.from_flags({name}=…) to give flags."
                )

    @classmethod
    def from_flags(cls, **flags: Any) -> Self:
        """Create a configuration from flags: ``PretrainConfig.from_flags(data="photos", epochs=5)``.

        Raises:
            UserError: if a flag is unknown, or its value is not accepted.
        """
        return cls().with_flags(**flags)

    def with_flags(self, **flags: Any) -> Self:
        """Return a copy with other values of some flags.

        A flag that chooses a part, such as ``method="simclr"``, replaces it by a part of another class. That
        keeps the values of fields that both classes have with the same default, and sets its
        ``default_overrides`` in other parts, unless these flags are given, too.

        Raises:
            UserError: if a flag is unknown, or its value is not accepted.
        """
        flags = use_new_names(flags, self.get_renamed_flags())
        parts = self.parts()
        for name, kinds in self.choices().items():
            chosen = flags.pop(name, parts[name].name)
            if isinstance(chosen, tuple(kinds.values())):  # the part itself
                parts[name], chosen = chosen, chosen.name
            if chosen not in kinds:
                raise unknown(name, str(chosen), kinds)
            if chosen != parts[name].name:
                own = {key: flags.pop(key) for key in get_field_specs(kinds[chosen]) if key in flags}
                parts[name] = kinds[chosen](**{**_get_shared_values(parts[name], kinds[chosen]), **own})
                flags = {**kinds[chosen].default_overrides, **flags}
        for name, value in list(flags.items()):
            if name in parts and isinstance(value, type(parts[name])):  # a whole part
                parts[name] = flags.pop(name)
        for name, current in parts.items():
            own = {key: flags.pop(key) for key in get_field_specs(type(current)) if key in flags}
            if own:
                parts[name] = replace(current, **own)
        for name in flags:
            raise self.other_method_error(name, parts) or self.unknown_flag_error(name)
        return type(self)(**parts)

    def parts(self) -> dict[str, Any]:
        """Return the parts by name."""
        return {field.name: getattr(self, field.name) for field in fields(self)}  # type: ignore[arg-type]

    @classmethod
    def choices(cls) -> dict[str, dict[str, Any]]:
        """Return the parts that are unions, and the classes of each by name."""
        return {
            name: {kind.name: kind for kind in get_args(hint)}
            for name, hint in get_type_hints(cls).items()
            if get_origin(hint) in (Union, UnionType)
        }

    @classmethod
    def get_renamed_flags(cls) -> dict[str, str]:
        """Return the old names of all flags and their new names."""
        return {**cls.get_renamed_fields(), **cls.RENAMED}

    @classmethod
    def get_renamed_fields(cls) -> dict[str, str]:
        """Return the old names of the fields of all parts and their new names."""
        hints = get_type_hints(cls)
        names = [field.name for field in fields(cls)]  # type: ignore[arg-type]
        kinds = [kind for name in names for kind in get_args(hints[name]) or (hints[name],)]
        return {old: new for kind in kinds for old, new in get_renamed_fields(kind).items()}

    def unknown_flag_error(self, name: str) -> UserError:
        """Return the error for an unknown flag."""
        near = difflib.get_close_matches(flag_name(name), [flag_name(known) for known in self.flags()], n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        return UserError(f"Unknown flag {flag_name(name)}.{hint}")

    def other_method_error(self, name: str, parts: Mapping[str, Any] | None = None) -> UserError | None:
        """Return the error for a flag of another method than the chosen one; None if no method has the flag.

        Args:
            name: name of the flag.
            parts: the chosen parts; by default those of this configuration.
        """
        parts = self.parts() if parts is None else parts
        for choice, kinds in self.choices().items():
            owners = [other for other, kind in kinds.items() if name in get_field_specs(kind)]
            if owners:
                given = f"{flag_name(choice)} {parts[choice].name}"
                return UserError(
                    f"{flag_name(name)} is not a flag of {given}. Remove it, or use {flag_name(choice)} "
                    f"{' or '.join(owners)}."
                )
        return None

    def flags(self) -> dict[str, Any]:
        """Return the values of all flags by name."""
        values: dict[str, Any] = {}
        for name, its in self.parts().items():
            if name in self.choices():
                values[name] = its.name
            values |= {key: getattr(its, key) for key in get_field_specs(type(its))}
        return values

    def specs(self) -> dict[str, FieldSpec]:
        """Return the fields of all parts by flag name, without the flags that choose a part."""
        return {
            key: spec for its in self.parts().values() for key, spec in get_field_specs(type(its)).items()
        }

    def flags_marked(self, marker: Marker) -> frozenset[str]:
        """Return the names of the flags with a marker."""
        return frozenset(name for name, spec in self.specs().items() if marker in spec.markers)

    # ------------------------------------------------------------------ YAML and JSON

    def to_dict(self) -> dict[str, Any]:
        """Convert to nested dicts, lists and numbers for YAML and JSON."""
        plain: dict[str, Any] = {}
        for name, its in self.parts().items():
            chosen = {"name": its.name} if name in self.choices() else {}
            plain[name] = chosen | json.loads(json.dumps(dataclasses.asdict(its)))
        return plain

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> Self:
        """Create a configuration from the output of `to_dict`, also that of an earlier version.

        Raises:
            UserError: if a name is unknown, or a value is not accepted.
        """
        return cls.from_flags(**cls.flatten(plain))

    @classmethod
    def flatten(cls, plain: Mapping[str, Any], warn: bool = False) -> dict[str, Any]:
        """Return the flags of a dict that is nested by parts, flat (as version 0.1 wrote it), or both.

        Args:
            plain: contents of a YAML or JSON file.
            warn: log a warning for each flag with an old name, as for a file that a user edits.

        Raises:
            UserError: if a part is not a dict, or a value is one.
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
                raise UserError(f"{name} is a mapping. Give a number, a string or a list of them.")
            elif name in names and name not in choices and name not in cls().specs():
                raise UserError(f"{name} is {_SHORT_REPR.repr(value)}. Give a mapping of its fields.")
            else:
                flags[str(name)] = value
        renamed = cls.get_renamed_fields()
        upgraded = cls.upgrade(use_new_names(flags, renamed, warn=False))
        for name in flags:
            if warn and name in renamed and renamed[name] in upgraded:
                warn_renamed(name, renamed[name])
        return upgraded

    @classmethod
    def upgrade(cls, flags: dict[str, Any]) -> dict[str, Any]:
        """Convert flags from a file of an earlier version to those of this version."""
        return {cls.RENAMED.get(name, name): value for name, value in flags.items()}
