"""Flags of a command from its configuration: one parse by tyro, help in groups, values checked by the parts.

The flags are the fields of all parts, flat. Help shows first what a newcomer needs, then the parts, then what
research needs. Values that are no numbers reach the parts as texts, so that they are refused there, in the
same words as in Python or YAML.
"""

import difflib
import logging
from collections.abc import Sequence
from dataclasses import MISSING, field, make_dataclass
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, cast, get_args, get_origin

import tyro
from tyro.constructors import PrimitiveConstructorSpec

from quarterview.config import FIRST, POSITIONAL, RESEARCH, Composed, FieldSpec, field_specs, flag
from quarterview.errors import UserError

_FIRST, _MORE, _RESEARCH = "main", "more", "research"
_UNSET = "unset"
_MAX_TITLE = 30  # a longer text says what the part is, and is no heading


def parse_flags(
    name: str, summary: str, example: str, base: Any, options: Any, words: Sequence[str]
) -> tuple[Any, Any]:
    """The configuration and the options that the words after a command mean.

    Args:
        name: of the command.
        base: a composed configuration, above whose values the flags stand; or the class of a single part.
        options: a part that belongs to the command line alone, or None.
        words: without the command.

    Raises:
        UserError: if a flag is unknown or a value is not accepted.
        SystemExit: after --help, or if tyro cannot make sense of the words.
    """
    if isinstance(base, Composed):
        words = _renamed(base, words)
    groups, defaults = _groups(base, options)
    _check_known(name, base, [spec for group in groups.values() for spec in group], words)
    root = make_dataclass(
        "Flags",
        [(_identifier(title), _struct(title, specs, defaults)) for title, specs in groups.items() if specs],
    )
    parsed = tyro.cli(
        root,
        prog=f"quarterview {name}",
        args=list(words),
        description=f"{summary}\n\nExample: {example}",
        config=(tyro.conf.OmitArgPrefixes,),
        compact_help=False,
    )
    values = {
        spec.name: getattr(getattr(parsed, _identifier(title)), spec.name)
        for title, specs in groups.items()
        for spec in specs
    }
    given = {key: value for key, value in values.items() if defaults.get(key, MISSING) != value}
    own = field_specs(type(options)) if options is not None else {}
    chosen = type(options)(**{key: values[key] for key in own}) if options is not None else None
    flags = {key: value for key, value in given.items() if key not in own}
    return (base.with_flags(**flags) if isinstance(base, Composed) else base(**flags)), chosen


def _groups(base: Any, options: Any) -> tuple[dict[str, list[FieldSpec]], dict[str, Any]]:
    """The flags under the titles of their groups, in the order of the help, and their defaults."""
    groups: dict[str, list[FieldSpec]] = {_FIRST: []}
    research: list[FieldSpec] = []
    defaults: dict[str, Any] = {}
    parts: list[tuple[Any, Any]] = [(type(options), options)] if options is not None else []
    if isinstance(base, Composed):
        for choice, kinds in base.choices().items():
            current = base.parts()[choice]
            text = f"What is learned. {current.name}: {_title(type(current), dot=True)}"
            kind = cast(Any, Literal)[tuple(kinds)]
            groups[_FIRST].append(FieldSpec(choice, kind, current.name, text, frozenset([FIRST]), ()))
            defaults[choice] = current.name
        parts += [(type(its), its) for its in base.parts().values()]
    else:
        parts += [(base, None)]
    for kind, its in parts:
        own = groups.setdefault(_title(kind) if its is not None else _MORE, [])
        for spec in field_specs(kind).values():
            defaults[spec.name] = getattr(its, spec.name) if its is not None else spec.default
            first = FIRST in spec.markers or POSITIONAL in spec.markers
            (groups[_FIRST] if first else research if RESEARCH in spec.markers else own).append(spec)
    return {**groups, _RESEARCH: research}, defaults


def _title(kind: type, dot: bool = False) -> str:
    if not dot and hasattr(kind, "other_defaults"):  # a method
        return kind.name
    first = (kind.__doc__ or kind.__name__).strip().splitlines()[0]
    title = first.split(".")[0].lower()
    return first if dot else title if len(title) <= _MAX_TITLE else _MORE


def _identifier(title: str) -> str:
    return "".join(c if c.isalnum() else "_" for c in title)


def _struct(title: str, specs: Sequence[FieldSpec], defaults: dict[str, Any]) -> Any:
    """A dataclass of a group's flags, for tyro."""
    fields: list[Any] = []
    for spec in specs:
        kind: Any = bool
        if POSITIONAL in spec.markers:
            kind = Annotated[Any, _words_of(spec.annotation), tyro.conf.Positional]
        elif spec.annotation is not bool:
            kind = Annotated[Any, _words_of(spec.annotation)]
        name = spec.name.upper() if POSITIONAL in spec.markers else None
        kind = Annotated[kind, tyro.conf.arg(help=spec.help.replace("``", ""), metavar=name)]
        default = defaults[spec.name]
        fields.append((spec.name, kind) if default is MISSING else (spec.name, kind, field(default=default)))
    return make_dataclass(_identifier(title), fields, kw_only=True)


def _metavar(annotation: Any) -> str:
    kinds = [kind for kind in _alternatives(annotation) if kind is not NoneType]
    if all(get_origin(kind) is Literal for kind in kinds):
        return "{" + ",".join(str(word) for kind in kinds for word in get_args(kind)) + "}"
    if get_origin(kinds[0]) is tuple:
        return {int: "N...", float: "NUMBER..."}.get(get_args(kinds[0])[0], "TEXT...")
    return {int: "N", float: "NUMBER"}.get(kinds[0], "TEXT")


def _alternatives(annotation: Any) -> tuple[Any, ...]:
    return get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)


# ---------------------------------------------------------------------- which words are flags


def _renamed(base: Composed, words: Sequence[str]) -> list[str]:
    """The words with flags of earlier versions replaced by today's, and a warning for each."""
    renamed = {flag(old): flag(new) for old, new in base.RENAMED.items()}
    for word in words:
        if word in renamed:
            logging.getLogger("quarterview").warning("%s is now called %s", word, renamed[word])
    return [renamed.get(word, word) for word in words]


def _check_known(command: str, base: Any, specs: Sequence[FieldSpec], words: Sequence[str]) -> None:
    """Raises UserError for the first word that looks like a flag and is none."""
    known = {flag(spec.name): spec for spec in specs if POSITIONAL not in spec.markers}
    for word in words:
        name = flag(word.removeprefix("--")) if word.startswith("--") else ""
        if not name or name == "--help" or name in known:
            continue
        positive = "--" + name.removeprefix("--no-")
        if positive in known and known[positive].annotation is bool:
            continue
        if isinstance(base, Composed) and (owners := base.owners(name.removeprefix("--").replace("-", "_"))):
            raise owners
        near = difflib.get_close_matches(name, known, n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise UserError(f"{name} is not a flag of quarterview {command}.{hint} --help lists them all.")


# ---------------------------------------------------------------------- how words become values


def _words_of(annotation: Any) -> PrimitiveConstructorSpec:
    """How tyro reads the words of a flag: a word that is no number stays a text, which the part refuses."""
    kinds = [kind for kind in _alternatives(annotation) if kind is not NoneType]
    several = get_origin(kinds[0]) is tuple
    items = get_args(kinds[0])[:1] if several else tuple(kinds)

    def read(words: list[str]) -> Any:
        if words == [_UNSET]:
            return None
        values = tuple(_read(word, items) for word in words)
        return values if several else values[0]

    def show(default: Any) -> list[str]:
        if default is None:
            return [_UNSET]
        return [str(item) for item in default] if several else [str(default)]

    return PrimitiveConstructorSpec(
        nargs="*" if several else 1,
        metavar=_metavar(annotation),
        instance_from_str=read,
        is_instance=lambda _: True,
        str_from_instance=show,
    )


def _read(word: str, kinds: Sequence[Any]) -> Any:
    for kind in (int, float):
        if kind in kinds:
            try:
                return kind(word)
            except ValueError:
                continue
    return word
