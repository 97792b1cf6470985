"""What a study is: arms that differ in few settings from one base, and what the paper found of them."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from quarterview.commands.config import PretrainConfig
from quarterview.config import field_specs
from quarterview.errors import UserError, unknown
from quarterview.recipes import as_number, from_values
from quarterview.safe_yaml import MOST_BYTES, read_yaml
from quarterview.studies.config import DECIDED, check_measure

Start = Literal["pretrain", "random", "pixels", "pca", "pca_patches", "kmeans", "kmeans_pixels"]
STARTS = get_args(Start)


@dataclass(frozen=True)
class Arm:
    """One way to pre-train, or none."""

    name: str
    """In tables."""
    values: Mapping[str, Any] = field(default_factory=dict)
    """In what it differs from the base: flags of pre-training."""
    start: Start = "pretrain"
    """random is the encoder of the base with its initial weights. pixels, principal components of
    pictures (pca) and of patches (pca_patches), and clusters of patches (kmeans) and of pictures
    (kmeans_pixels) are no networks, and judged as frozen features alone."""
    length: float = 1.0
    """Of its schedule, as a share of the study's."""
    x: float | None = None
    """Its place on the axis of a curve."""
    decoder_share: float | None = None
    """The decoder's width as a share of the encoder's, in heads of 32."""
    paper: Mapping[str, float] = field(default_factory=dict)
    """The paper's figures in percent, by measure, where it has such an arm."""


@dataclass(frozen=True)
class Finding:
    """What the paper says of two arms."""

    claim: str
    """In words."""
    first: str
    """The arm that is ahead, or as good."""
    second: str
    """The other one."""
    measure: str
    """By which."""
    rule: Literal["ahead", "as good"] = "ahead"
    second_measure: str | None = None
    """By which the other arm is judged, if by another one."""
    over: tuple[str, str] | None = None
    """Arms whose figures are taken off first, one from each: what is compared are gains."""
    over_measure: str | None = None
    """By which those are judged, if not as the arms that they are taken off."""


@dataclass(frozen=True)
class Table:
    """A table or a curve of the paper."""

    title: str
    """What is varied."""
    arms: tuple[Arm, ...]
    """In the order of the rows."""
    findings: tuple[Finding, ...] = ()
    """What is decided."""
    measures: tuple[str, ...] = ("finetune", "linear")
    """How every arm is judged."""
    source: str = ""
    """Where the paper has it."""
    axis: str | None = None
    """What a curve is drawn over; None for a table alone."""

    def __post_init__(self) -> None:
        names = [arm.name for arm in self.arms]
        if len(names) < 2 or len(set(names)) < len(names):
            raise UserError(
                f"{self.title}: arms {', '.join(names)}; accepted: two or more with different names"
            )
        for measure in self.measures:
            check_measure(measure)
        for finding in self.findings:
            for name in (finding.first, finding.second, *(finding.over or ())):
                if name not in names:
                    raise unknown(f"arm in a finding of {self.title}:", name, names)
            asked = (finding.measure, finding.second_measure, finding.over_measure)
            for measure in filter(None, asked):
                if measure not in self.measures:
                    raise unknown(f"measure in a finding of {self.title}:", measure, self.measures)
            if finding.over_measure is not None and finding.over is None:
                raise UserError(
                    f"over_measure {finding.over_measure} in a finding of {self.title}; accepted: beside over"
                )
            if finding.rule not in ("ahead", "as good"):
                raise unknown(f"rule in a finding of {self.title}:", finding.rule, ("ahead", "as good"))


@dataclass(frozen=True)
class Study:
    """Tables that are measured together; arms that are alike are run once."""

    name: str
    purpose: str
    """What it asks."""
    tables: tuple[Table, ...]
    base: Mapping[str, Any] = field(default_factory=dict)
    """In what all arms differ from the recipe."""


# ---------------------------------------------------------------------- files


def read_study(path: str | Path) -> Study:
    """A study from a YAML file; docs/studies.md says what may stand in it.

    Raises:
        UserError: if it cannot be read, or something in it is unknown.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            content = read_yaml(file.read(MOST_BYTES + 1))
    except OSError as error:
        raise UserError(f"study {path} cannot be read: {error}") from None
    except ValueError as error:
        raise UserError(f"study {path} is no YAML: {error}") from None
    where = f"study {path}"
    given = _fields(content, where, {"purpose": str, "base": dict, "tables": list})
    tables = given.get("tables") or []
    if not tables:
        raise UserError(f"{where} has no tables; accepted: a list of them under `tables`")
    base = given.get("base") or {}
    from_values(f"{where}, base", base, PretrainConfig)
    if "objective" not in base:  # of version 0.1, which was flat
        base = PretrainConfig.flat(base)
    _leave_to_study(base, f"{where}, base", "data")
    base = {name: as_number(value) for name, value in base.items()}
    return Study(path.stem, given.get("purpose", ""), tuple(_table(t, where) for t in tables), base)


def _table(content: object, where: str) -> Table:
    kinds = {"title": str, "arms": dict, "findings": list, "measures": list, "axis": str, "source": str}
    given = _fields(content, f"a table of {where}", kinds)
    title = given.get("title", "")
    arms = tuple(
        _arm(str(name), values, f"{where}, {title}") for name, values in (given.get("arms") or {}).items()
    )
    findings = tuple(_finding(f, f"{where}, {title}") for f in given.get("findings") or [])
    measures = tuple(map(str, given.get("measures") or Table.measures))
    return Table(title, arms, findings, measures, given.get("source", ""), given.get("axis"))


def _arm(name: str, content: object, where: str) -> Arm:
    """An arm; its values are flags of pre-training, beside `length`, `start`, `x` and `decoder_share`."""
    if content in STARTS:
        return Arm(name, start=content)  # type: ignore[arg-type]
    values = dict(_fields(content or {}, f"arm {name} of {where}", None))
    start = values.pop("start", "pretrain")
    if start not in STARTS:
        raise unknown(f"start of arm {name} in {where}:", str(start), STARTS)
    own = {key: values.pop(key) for key in ("length", "x", "decoder_share") if key in values}
    for key, number in own.items():
        if isinstance(number, bool) or not isinstance(number, int | float) or not math.isfinite(number):
            raise UserError(f"{key} {number} of arm {name} in {where}; accepted: a number")
        if key != "x" and number <= 0:
            raise UserError(f"{key} {number} of arm {name} in {where}; accepted: a number above 0")
    if "decoder_share" in own and not values.keys().isdisjoint(("decoder_width", "decoder_heads")):
        raise UserError(
            f"decoder_share beside decoder_width or decoder_heads in arm {name} of {where}; accepted: either"
        )
    _leave_to_study(values, f"arm {name} of {where}")
    accepted = _flags_of_pretraining()
    for key in values:
        if key not in accepted and key not in PretrainConfig.RENAMED:
            raise unknown(f"field of arm {name} in {where}:", str(key), sorted(accepted))
    return Arm(name, {key: as_number(value) for key, value in values.items()}, start, **own)


def _flags_of_pretraining() -> set[str]:
    """The flags of pre-training by any method."""
    kinds = [kind for kinds in PretrainConfig.choices().values() for kind in kinds.values()]
    return {*PretrainConfig().flags(), *(name for kind in kinds for name in field_specs(kind))}


def _leave_to_study(values: Mapping[str, Any], where: str, *more: str) -> None:
    """Raises UserError if fields are set that no arm has to itself."""
    for key in (*DECIDED, *more):
        if key in values:
            raise UserError(
                f"{key} in {where}; accepted: anything that the study's own flags do not decide "
                "(--data, --budget, --seeds, --out, --device), and `length`, an arm's share of the study's "
                "schedule"
            )


def _finding(content: object, where: str) -> Finding:
    texts = dict.fromkeys(
        ("claim", "first", "second", "measure", "rule", "second_measure", "over_measure"), str
    )
    given = _fields(content, f"a finding of {where}", {**texts, "over": list})
    over = given.pop("over", None)
    if over is not None and len(over) != 2:
        raise UserError(f"over {over} in a finding of {where}; accepted: two arms")
    try:
        return Finding(**given, over=None if over is None else (str(over[0]), str(over[1])))
    except TypeError:
        raise UserError(
            f"a finding of {where} says {', '.join(given) or 'nothing'}; accepted: claim, first, second, "
            "measure, and rule"
        ) from None


def _fields(content: object, where: str, kinds: Mapping[str, type] | None) -> dict[str, Any]:
    """A table of YAML whose names and kinds of values are known.

    Raises:
        UserError: if it is something else.
    """
    if not isinstance(content, dict):
        raise UserError(f"{where} is no table of fields; accepted: lines such as `title: Mask ratio`")
    for key, value in content.items():
        if kinds is None:
            break
        if key not in kinds:
            raise unknown(f"field in {where}:", str(key), kinds)
        if value is not None and not isinstance(value, kinds[key]):
            raise UserError(f"{key} in {where} is {value!r}; accepted: {_SPOKEN[kinds[key]]}")
    return {str(key): value for key, value in content.items() if value is not None}


_SPOKEN = {str: "a text", dict: "a table of fields", list: "a list"}
