"""Definition of a study: tables of arms that differ from a base in a few settings, and claims about them."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from quarterview.commands.config import PretrainConfig
from quarterview.config import get_field_specs, use_new_names
from quarterview.errors import UserError, invalid, not_supported, unknown, unreadable
from quarterview.recipes import create_config, parse_yaml_number
from quarterview.safe_yaml import MAX_YAML_BYTES, read_yaml
from quarterview.studies.config import RESERVED_FLAGS, check_measure

ArmStart = Literal["pretrain", "random", "pixels", "pca", "pca_patches", "kmeans", "kmeans_pixels"]
STARTS = get_args(ArmStart)


@dataclass(frozen=True)
class Arm:
    """One variant of a study: a pre-training, or features without one."""

    name: str
    """Name in tables and messages."""
    values: Mapping[str, Any] = field(default_factory=dict)
    """The flags of pre-training that differ from the base of the study."""
    start: ArmStart = "pretrain"
    """The features: of a pre-training, of the encoder with its initial weights (``random``), or without a
    network. The latter are pixels, principal components of images (``pca``) or patches (``pca_patches``), and
    k-means clusters of images (``kmeans_pixels``) or patches (``kmeans``). They are evaluated as frozen
    features only."""
    length: float = 1.0
    """Training length, as a fraction of the length of the study."""
    x: float | None = None
    """Position on the x axis of a curve."""
    decoder_share: float | None = None
    """Decoder width as a fraction of the encoder width; the number of heads follows, about 32 wide each."""
    paper: Mapping[str, float] = field(default_factory=dict)
    """Accuracies of the paper in percent, by measure, if the paper has this arm."""


@dataclass(frozen=True)
class Finding:
    """A claim about two arms of a table, which the study tests."""

    claim: str
    """The claim as a sentence."""
    first: str
    """The arm that is claimed to be ahead of the second arm, or as good."""
    second: str
    """The arm that the first arm is compared with."""
    measure: str
    """The measure by which both arms are compared."""
    rule: Literal["ahead", "as good"] = "ahead"
    """The relation that is claimed."""
    second_measure: str | None = None
    """The measure of the second arm, if it differs."""
    over: tuple[str, str] | None = None
    """Baselines of the first and the second arm, so that the gains over these baselines are compared."""
    over_measure: str | None = None
    """The measure of both baselines, if it differs from the measures of their arms."""


@dataclass(frozen=True)
class Table:
    """A table or curve of a study: arms that are evaluated by the same measures and compared."""

    title: str
    """Title, which names what is varied."""
    arms: tuple[Arm, ...]
    """The arms in the order of the rows."""
    findings: tuple[Finding, ...] = ()
    """The claims that are tested."""
    measures: tuple[str, ...] = ("finetune", "linear")
    """The measures by which every arm is evaluated."""
    source: str = ""
    """The table, figure or section of the paper."""
    axis: str | None = None
    """Label of the x axis if a curve is drawn over `Arm.x`; None for a table without a curve."""

    def __post_init__(self) -> None:
        names = [arm.name for arm in self.arms]
        if len(names) < 2 or len(set(names)) < len(names):
            raise UserError(
                f"The table {self.title} has the arms {', '.join(names) or '(none)'}. Give two or more arms "
                "with different names."
            )
        for measure in self.measures:
            check_measure(measure)
        for finding in self.findings:
            for name in (finding.first, finding.second, *(finding.over or ())):
                if name not in names:
                    raise unknown(f"arm in a finding of {self.title}:", name, names)
            for measure in filter(None, (finding.measure, finding.second_measure, finding.over_measure)):
                if measure not in self.measures:
                    raise unknown(f"measure in a finding of {self.title}:", measure, self.measures)
            if finding.over_measure is not None and finding.over is None:
                raise UserError(
                    f"A finding of {self.title} has over_measure {finding.over_measure} without over. Add "
                    "over, or remove over_measure."
                )
            if finding.rule not in ("ahead", "as good"):
                raise unknown(f"rule in a finding of {self.title}:", finding.rule, ("ahead", "as good"))


@dataclass(frozen=True)
class Study:
    """One or more tables that are run together; an arm of several tables is run once."""

    name: str
    purpose: str
    """The question that the study answers."""
    tables: tuple[Table, ...]
    base: Mapping[str, Any] = field(default_factory=dict)
    """Flags of pre-training that all arms share, where they differ from the recipe."""


# ---------------------------------------------------------------------- files


def read_study(path: str | Path) -> Study:
    """Read a study from a YAML file, whose format docs/studies.md describes.

    Raises:
        UserError: if the file cannot be read, or a field is unknown or invalid.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            content = read_yaml(file.read(MAX_YAML_BYTES + 1))
    except OSError as error:
        raise unreadable(f"study {path}", error) from None
    except ValueError as error:
        raise unreadable(f"study {path}", f"not valid YAML: {error}") from None
    context = f"study {path}"
    fields = _check_fields(content, context, {"purpose": str, "base": dict, "tables": list})
    tables = fields.get("tables") or []
    if not tables:
        raise UserError(f"The {context} has no tables. Give a list of them under `tables`.")
    base = fields.get("base") or {}
    create_config(f"Study {path}, base", base, PretrainConfig)
    if "objective" in base:  # a file of version 0.1, which had flat fields only
        base = use_new_names(base, PretrainConfig.get_renamed_fields(), warn=False)
    else:
        base = PretrainConfig.flatten(base)
    _refuse_study_flags(base, f"{context}, base", "data")
    base = {name: parse_yaml_number(value) for name, value in base.items()}
    return Study(path.stem, fields.get("purpose", ""), tuple(_parse_table(t, context) for t in tables), base)


def _parse_table(content: object, study: str) -> Table:
    """Parse a table; ``study`` names the study in messages."""
    types = {"title": str, "arms": dict, "findings": list, "measures": list, "axis": str, "source": str}
    fields = _check_fields(content, f"a table of {study}", types)
    title = fields.get("title", "")
    context = f"{study}, {title}"
    arms = tuple(
        _parse_arm(str(name), values, context) for name, values in (fields.get("arms") or {}).items()
    )
    findings = tuple(_parse_finding(f, context) for f in fields.get("findings") or [])
    measures = tuple(map(str, fields.get("measures") or Table.measures))
    return Table(title, arms, findings, measures, fields.get("source", ""), fields.get("axis"))


def _parse_arm(name: str, content: object, table: str) -> Arm:
    """Parse an arm: a start such as ``random``, or flags of pre-training and the fields of `Arm`.

    Args:
        table: name of the table in messages.
    """
    if content in STARTS:
        return Arm(name, start=content)  # type: ignore[arg-type]
    context = f"arm {name} of {table}"
    values = dict(_check_fields(content or {}, context, None))
    start = values.pop("start", "pretrain")
    if start not in STARTS:
        raise unknown(f"start in {context}:", str(start), STARTS)
    numbers = {key: values.pop(key) for key in ("length", "x", "decoder_share") if key in values}
    for key, number in numbers.items():
        if isinstance(number, bool) or not isinstance(number, int | float) or not math.isfinite(number):
            raise invalid(f"{key} in {context}", number, "a number")
        if key != "x" and number <= 0:
            raise invalid(f"{key} in {context}", number, "a number above 0")
    if "decoder_share" in numbers and not values.keys().isdisjoint(("decoder_width", "decoder_heads")):
        raise not_supported(
            f"decoder_share in {context}", "decoder_width or decoder_heads", "Remove one of them."
        )
    _refuse_study_flags(values, context)
    values = use_new_names(values, PretrainConfig.get_renamed_fields())
    accepted = _list_pretraining_flags()
    for key in values:
        if key not in accepted and key not in PretrainConfig.RENAMED:
            raise unknown(f"field in {context}:", str(key), sorted(accepted))
    return Arm(name, {key: parse_yaml_number(value) for key, value in values.items()}, start, **numbers)


def _list_pretraining_flags() -> set[str]:
    """Return the names of the flags of pre-training, including those of all methods."""
    parts = [part for choice in PretrainConfig.choices().values() for part in choice.values()]
    return {*PretrainConfig().flags(), *(name for part in parts for name in get_field_specs(part))}


def _refuse_study_flags(values: Mapping[str, Any], context: str, *more: str) -> None:
    """Check that no field is set that the flags of the study decide.

    Args:
        context: names the values in the message.
        more: further fields that must not be set.

    Raises:
        UserError: if such a field is set.
    """
    for key in (*RESERVED_FLAGS, *more):
        if key in values:
            raise UserError(
                f"{key} in {context} is decided by the flags of the study (--data, --budget, --seeds, --out, "
                "--device). Remove it. `length` changes the training length of an arm."
            )


def _parse_finding(content: object, table: str) -> Finding:
    """Parse a finding; ``table`` names its table in messages."""
    context = f"a finding of {table}"
    texts = dict.fromkeys(
        ("claim", "first", "second", "measure", "rule", "second_measure", "over_measure"), str
    )
    fields = _check_fields(content, context, {**texts, "over": list})
    over = fields.pop("over", None)
    if over is not None and len(over) != 2:
        raise invalid(f"over in {context}", over, "two arms")
    try:
        return Finding(**fields, over=None if over is None else (str(over[0]), str(over[1])))
    except TypeError:
        raise UserError(
            f"The fields of {context} are {', '.join(fields) or '(none)'}. Give claim, first, second and "
            "measure."
        ) from None


def _check_fields(content: object, context: str, types: Mapping[str, type] | None) -> dict[str, Any]:
    """Return a YAML mapping without its empty fields, after a check of the names and types of its fields.

    Args:
        context: names the mapping in messages.
        types: the type of each accepted field; None accepts any fields.

    Raises:
        UserError: if the content is not a mapping, a field is unknown, or a value has another type.
    """
    if not isinstance(content, dict):
        raise unreadable(context, "it is not a mapping of fields", "Write lines such as `title: Mask ratio`.")
    for key, value in content.items():
        if types is None:
            break
        if key not in types:
            raise unknown(f"field in {context}:", str(key), types)
        if value is not None and not isinstance(value, types[key]):
            raise invalid(f"{key} in {context}", repr(value), _TYPE_NAMES[types[key]])
    return {str(key): value for key, value in content.items() if value is not None}


_TYPE_NAMES = {str: "a text", dict: "a mapping of fields", list: "a list"}
