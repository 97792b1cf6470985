"""Which of a classifier's classes the classes of another set of images are."""

import csv
import difflib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from quarterview.data.sources.base import Source
from quarterview.errors import UserError, unknown
from quarterview.evaluation.labelled import read_labels
from quarterview.models.classifier import ClassifierConfig
from quarterview.safe_yaml import MOST_BYTES, read_yaml

ClassMap = Mapping[str, str]
"""From the name of a set's class to a classifier's class, by name or by number."""
_MOST_NAMES = 30  # in an error


def read_class_map(path: str | Path) -> ClassMap:
    """The class map of a file.

    ``.json``, ``.yaml`` and ``.yml`` hold a table from names to names or numbers; ``.csv`` has a line
    ``name,class`` for each, ``.tsv`` and ``.txt`` likewise with a tab or a space.

    Raises:
        UserError: if it is no such file.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            text = file.read(MOST_BYTES + 1).decode("utf-8-sig")  # spreadsheets write a mark before the text
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"class map {path} cannot be read: {error}") from None
    if len(text) > MOST_BYTES:
        raise UserError(f"class map {path} is too long; accepted: up to {MOST_BYTES:,} bytes")
    kind = path.suffix.lower()
    if kind in (".json", ".yaml", ".yml"):
        return _from_table(text, kind, path)
    if kind in (".csv", ".tsv", ".txt"):
        return _from_lines(text, kind, path)
    raise UserError(f"class map {path}; accepted: .json, .yaml, .csv, .tsv or .txt")


def _from_table(text: str, kind: str, path: Path) -> ClassMap:
    try:
        content = json.loads(text, object_pairs_hook=_once) if kind == ".json" else read_yaml(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"class map {path} is no {kind[1:].upper()}: {error}") from None
    accepted = f"accepted in {path}: a table of names, such as n01440764: tench, or of numbers"
    if not isinstance(content, dict):
        raise UserError(f"a class map that is no table; {accepted}")
    for pair in content.items():
        for part in pair:
            if isinstance(part, bool) or not isinstance(part, str | int):
                raise UserError(
                    f"a class map with {part!r}; {accepted}; in quotes where YAML reads it otherwise"
                )
    return {str(name): str(target) for name, target in content.items()}


def _once(pairs: Sequence[tuple[str, object]]) -> dict[str, object]:
    """A table of JSON. Raises ValueError for a name that comes twice."""
    table = dict(pairs)
    if len(table) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)} is there twice")
    return table


def _from_lines(text: str, kind: str, path: Path) -> ClassMap:
    found: dict[str, str] = {}
    lines = [line for line in text.splitlines() if line.strip()]
    for line in lines:
        if kind == ".csv":
            parts = next(csv.reader([line]))
        else:
            parts = line.split("\t") if "\t" in line else line.split(maxsplit=1)
        if len(parts) != 2:
            raise UserError(f"a line {line!r} in class map {path}; accepted: a name and a class")
        name, target = (part.strip() for part in parts)
        if found.setdefault(name, target) != target:
            raise UserError(f"{name} is given two classes in class map {path}; accepted: one")
    return found


def classes_of(source: Source, config: ClassifierConfig, classes: ClassMap, where: str) -> Tensor:
    """The classifier's class of every image of a labelled set.

    A name that the map does not have stands for itself. Where neither the classifier's classes have names
    nor a map is given, a set of as many classes is taken to have them in the same order, unless it calls
    them by numbers.

    Args:
        where: the set, for errors.

    Returns:
        int64 [N].

    Raises:
        UserError: if the images have no labels, or a class is none of the classifier's.
    """
    labels = read_labels(source, where)
    present = labels.unique()
    names = {int(n): source.classes[n] if source.classes else str(int(n)) for n in present}
    theirs = source.classes or ()
    in_order = not classes and config.class_names is None and len(theirs) == config.classes
    if in_order and not all(name.isdecimal() for name in theirs):
        return labels
    numbers = torch.full((int(present.max()) + 1,), -1)
    for label, name in names.items():
        numbers[label] = _number(classes.get(name, name), config, f"class of {where}:")
    return numbers[labels]


def _number(name: str, config: ClassifierConfig, what: str) -> int:
    """The number of a class, by its name, or by its number where no class is called so."""
    names: Sequence[str] = config.class_names or ()
    if names.count(name) > 1:
        raise UserError(f"{what} {name!r} are {names.count(name)} of the classifier's; accepted: a number")
    if name in names:
        return names.index(name)
    if name.isdecimal() and int(name) < config.classes:
        return int(name)
    if not names:
        raise UserError(
            f"unknown {what} {name!r}, of a classifier whose classes have no names; accepted: 0 to "
            f"{config.classes - 1}, or --class-map FILE"
        )
    if len(names) <= _MOST_NAMES:
        raise unknown(what, name, names)
    near = difflib.get_close_matches(name, names, n=10, cutoff=0.0)
    raise unknown(what, name, [*near, f"… ({len(names)} in all), or --class-map FILE"])
