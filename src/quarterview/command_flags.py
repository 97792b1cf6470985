"""Parsing of a command's flags with tyro, from its configuration.

The flags are the fields of all parts. The help shows the flags marked FIRST, then those of each part, then
those marked RESEARCH. A value that is not a number reaches its part as a string, so that the error for it is
the same as in Python or YAML.
"""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, field, make_dataclass
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, cast, get_args, get_origin

import tyro
from tyro.constructors import PrimitiveConstructorSpec

from quarterview.config import (
    FIRST,
    POSITIONAL,
    RESEARCH,
    ComposedConfig,
    FieldSpec,
    flag_name,
    get_field_specs,
    get_renamed_fields,
    use_new_names,
)
from quarterview.errors import UserError

_FIRST, _MORE, _RESEARCH = "main", "more", "research"
_UNSET = "unset"
_MAX_TITLE = 30  # a longer docstring is not used as a title


def parse_flags(
    name: str, summary: str, example: str, base: Any, options: Any, args: Sequence[str]
) -> tuple[Any, Any]:
    """Parse the arguments of a command.

    Args:
        name: name of the command.
        summary: its description in the help.
        example: its example in the help.
        base: a composed configuration, whose values the flags override; or the class of a single part.
        options: a part with the flags that only the command line has, or None.
        args: arguments after the command's name.

    Returns:
        The configuration and the options.

    Raises:
        UserError: if a flag is unknown or a value is not accepted.
        SystemExit: after --help, or if tyro cannot parse the arguments.
    """
    renamed = base.get_renamed_flags() if isinstance(base, ComposedConfig) else get_renamed_fields(base)
    args = _use_new_flags(renamed, args)
    groups, defaults = _group_flags(base, options)
    _check_flags(name, base, [spec for group in groups.values() for spec in group], args)
    root = make_dataclass(
        "Flags",
        [
            (_to_identifier(title), _make_group(title, specs, defaults))
            for title, specs in groups.items()
            if specs
        ],
    )
    parsed = tyro.cli(
        root,
        prog=f"quarterview {name}",
        args=list(args),
        description=f"{summary}\n\nExample: {example}",
        config=(tyro.conf.OmitArgPrefixes,),
        compact_help=False,
    )
    values = {
        spec.name: getattr(getattr(parsed, _to_identifier(title)), spec.name)
        for title, specs in groups.items()
        for spec in specs
    }
    given = {key: value for key, value in values.items() if defaults.get(key, MISSING) != value}
    own = get_field_specs(type(options)) if options is not None else {}
    chosen = type(options)(**{key: values[key] for key in own}) if options is not None else None
    flags = {key: value for key, value in given.items() if key not in own}
    return (base.with_flags(**flags) if isinstance(base, ComposedConfig) else base(**flags)), chosen


def _group_flags(base: Any, options: Any) -> tuple[dict[str, list[FieldSpec]], dict[str, Any]]:
    """Return the flags by the title of their help group, in order, and their defaults."""
    groups: dict[str, list[FieldSpec]] = {_FIRST: []}
    research: list[FieldSpec] = []
    defaults: dict[str, Any] = {}
    parts: list[tuple[Any, Any]] = [(type(options), options)] if options is not None else []
    if isinstance(base, ComposedConfig):
        for choice, kinds in base.choices().items():
            current = base.parts()[choice]
            text = f"Training method. {current.name}: {_get_title(type(current), full=True)}"
            kind = cast(Any, Literal)[tuple(kinds)]
            groups[_FIRST].append(FieldSpec(choice, kind, current.name, text, frozenset([FIRST]), ()))
            defaults[choice] = current.name
        parts += [(type(its), its) for its in base.parts().values()]
    else:
        parts += [(base, None)]
    for kind, its in parts:
        own = groups.setdefault(_get_title(kind) if its is not None else _MORE, [])
        for spec in get_field_specs(kind).values():
            defaults[spec.name] = getattr(its, spec.name) if its is not None else spec.default
            first = FIRST in spec.markers or POSITIONAL in spec.markers
            (groups[_FIRST] if first else research if RESEARCH in spec.markers else own).append(spec)
    return {**groups, _RESEARCH: research}, defaults


def _get_title(kind: type, full: bool = False) -> str:
    """Return the title of a part's help group, or with `full` the first line of its docstring."""
    if not full and hasattr(kind, "default_overrides"):  # a method
        return kind.name
    first = (kind.__doc__ or kind.__name__).strip().splitlines()[0]
    title = first.split(".")[0].lower()
    return first if full else title if len(title) <= _MAX_TITLE else _MORE


def _to_identifier(title: str) -> str:
    return "".join(c if c.isalnum() else "_" for c in title)


def _make_group(title: str, specs: Sequence[FieldSpec], defaults: dict[str, Any]) -> Any:
    """Make a dataclass of a help group's flags, for tyro."""
    fields: list[Any] = []
    for spec in specs:
        kind: Any = bool
        if POSITIONAL in spec.markers:
            kind = Annotated[Any, _make_constructor(spec.annotation), tyro.conf.Positional]
        elif spec.annotation is not bool:
            kind = Annotated[Any, _make_constructor(spec.annotation)]
        name = spec.name.upper() if POSITIONAL in spec.markers else None
        kind = Annotated[kind, tyro.conf.arg(help=spec.help.replace("``", ""), metavar=name)]
        default = defaults[spec.name]
        fields.append((spec.name, kind) if default is MISSING else (spec.name, kind, field(default=default)))
    return make_dataclass(_to_identifier(title), fields, kw_only=True)


def _get_metavar(annotation: Any) -> str:
    kinds = [kind for kind in _get_union_members(annotation) if kind is not NoneType]
    if all(get_origin(kind) is Literal for kind in kinds):
        return "{" + ",".join(str(word) for kind in kinds for word in get_args(kind)) + "}"
    if get_origin(kinds[0]) is tuple:
        return {int: "N...", float: "NUMBER..."}.get(get_args(kinds[0])[0], "TEXT...")
    return {int: "N", float: "NUMBER"}.get(kinds[0], "TEXT")


def _get_union_members(annotation: Any) -> tuple[Any, ...]:
    return get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)


# ---------------------------------------------------------------------- names of flags


def _use_new_flags(renamed: Mapping[str, str], args: Sequence[str]) -> list[str]:
    """Return the arguments with old flags replaced by new ones, and log a warning for each.

    Args:
        renamed: old names of fields and their new names.
        args: arguments of a command, with flags and values as separate items.

    Raises:
        UserError: if a flag is given under its old and its new name.
    """
    pairs = {f"{no}{old}": f"{no}{new}" for old, new in renamed.items() for no in ("", "no_")}
    given = {arg.removeprefix("--").replace("-", "_"): arg for arg in args if arg.startswith("--")}
    use_new_names(given, pairs)  # logs the warnings and checks for duplicates
    new = {given[old]: flag_name(name) for old, name in pairs.items() if old in given}
    return [new.get(arg, arg) for arg in args]


def _check_flags(command: str, base: Any, specs: Sequence[FieldSpec], args: Sequence[str]) -> None:
    """Raise UserError for the first argument that looks like a flag and is not one."""
    known = {flag_name(spec.name): spec for spec in specs if POSITIONAL not in spec.markers}
    for arg in args:
        name = flag_name(arg.removeprefix("--")) if arg.startswith("--") else ""
        if not name or name == "--help" or name in known:
            continue
        positive = "--" + name.removeprefix("--no-")
        if positive in known and known[positive].annotation is bool:
            continue
        field_name = name.removeprefix("--").replace("-", "_")
        if isinstance(base, ComposedConfig) and (error := base.other_method_error(field_name)):
            raise error
        near = difflib.get_close_matches(name, known, n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise UserError(
            f"{name} is not a flag of quarterview {command}.{hint} Run quarterview {command} --help for all "
            "flags."
        )


# ---------------------------------------------------------------------- values of flags


def _make_constructor(annotation: Any) -> PrimitiveConstructorSpec:
    """Make tyro's parser of a type. A value that is not a number stays a string, for the part's own error."""
    kinds = [kind for kind in _get_union_members(annotation) if kind is not NoneType]
    is_list = get_origin(kinds[0]) is tuple
    items = get_args(kinds[0])[:1] if is_list else tuple(kinds)

    def read(words: list[str]) -> Any:
        if words == [_UNSET]:
            return None
        values = tuple(_parse_word(word, items) for word in words)
        return values if is_list else values[0]

    def show(default: Any) -> list[str]:
        if default is None:
            return [_UNSET]
        return [str(item) for item in default] if is_list else [str(default)]

    return PrimitiveConstructorSpec(
        nargs="*" if is_list else 1,
        metavar=_get_metavar(annotation),
        instance_from_str=read,
        is_instance=lambda _: True,
        str_from_instance=show,
    )


def _parse_word(word: str, kinds: Sequence[Any]) -> Any:
    for kind in (int, float):
        if kind in kinds:
            try:
                return kind(word)
            except ValueError:
                continue
    return word
