"""Mapping from the class names of a set of images to the classes of a classifier."""

import csv
import difflib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from quarterview.data.sources.base import Source
from quarterview.errors import UserError, invalid, unknown, unreadable
from quarterview.evaluation.labelled import read_labels
from quarterview.models.classifier import ClassifierConfig
from quarterview.safe_yaml import MAX_YAML_BYTES, read_yaml

ClassMap = Mapping[str, str]
"""Class name in a set of images -> class of the classifier, by name or by index."""
_MAX_NAMES = 30  # class names that an error message lists


def read_class_map(path: str | Path) -> ClassMap:
    """Read a class map from a file.

    ``.json``, ``.yaml`` and ``.yml`` files hold a mapping from names to names or indices. ``.csv`` files have
    a line ``name,class`` for each class; ``.tsv`` files separate the two by a tab, ``.txt`` files by a space.

    Raises:
        UserError: if the file cannot be read, is too long, has another suffix, or does not hold a class map.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            text = file.read(MAX_YAML_BYTES + 1).decode("utf-8-sig")  # spreadsheets write a byte order mark
    except (OSError, UnicodeDecodeError) as error:
        raise unreadable(f"class map {path}", error) from None
    if len(text) > MAX_YAML_BYTES:
        raise UserError(f"Class map {path} is too long. Give a file of at most {MAX_YAML_BYTES:,} bytes.")
    suffix = path.suffix.lower()
    if suffix in (".json", ".yaml", ".yml"):
        return _parse_table(text, suffix, path)
    if suffix in (".csv", ".tsv", ".txt"):
        return _parse_lines(text, suffix, path)
    raise invalid("Class map", path, "a .json, .yaml, .csv, .tsv or .txt file")


def _parse_table(text: str, suffix: str, path: Path) -> ClassMap:
    try:
        content = json.loads(text, object_pairs_hook=_build_table) if suffix == ".json" else read_yaml(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"Class map {path} is not valid {suffix[1:].upper()}: {error}.") from None
    expected = "Give a mapping from names to names or class indices, such as n01440764: tench"
    if not isinstance(content, dict):
        raise UserError(f"Class map {path} is not a mapping. {expected}.")
    for pair in content.items():
        for part in pair:
            if isinstance(part, bool) or not isinstance(part, str | int):
                raise UserError(
                    f"Class map {path} has {part!r}, which is not a name or an index. {expected}; put a name "
                    "in quotes where YAML reads it as something else."
                )
    return {str(name): str(target) for name, target in content.items()}


def _build_table(pairs: Sequence[tuple[str, object]]) -> dict[str, object]:
    """Return the pairs of a JSON object as a dict. Raises ValueError if a name occurs twice."""
    table = dict(pairs)
    if len(table) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)} occurs twice")
    return table


def _parse_lines(text: str, suffix: str, path: Path) -> ClassMap:
    class_map: dict[str, str] = {}
    lines = [line for line in text.splitlines() if line.strip()]
    for line in lines:
        if suffix == ".csv":
            parts = next(csv.reader([line]))
        else:
            parts = line.split("\t") if "\t" in line else line.split(maxsplit=1)
        if len(parts) != 2:
            raise UserError(
                f"Class map {path} has the line {line!r}. Give lines of two columns, a name and a class."
            )
        name, target = (part.strip() for part in parts)
        if class_map.setdefault(name, target) != target:
            raise UserError(f"Class map {path} maps {name} to two classes. Give one class for each name.")
    return class_map


def map_labels(source: Source, config: ClassifierConfig, class_map: ClassMap, set_name: str) -> Tensor:
    """Return the classifier's class index of every image of a labelled set.

    A class name that the map does not have is looked up unchanged. If the classifier's classes have no
    names and no map is given, a set with the same number of classes is assumed to have them in the same
    order, unless the set's class names are numbers.

    Args:
        set_name: name of the set in error messages.

    Returns:
        int64 [N].

    Raises:
        UserError: if the images have no labels, or the classifier does not have one of their classes.
    """
    labels = read_labels(source, set_name)
    present = labels.unique()
    names = {int(n): source.classes[n] if source.classes else str(int(n)) for n in present}
    theirs = source.classes or ()
    in_order = not class_map and config.class_names is None and len(theirs) == config.classes
    if in_order and not all(name.isdecimal() for name in theirs):
        return labels
    indices = torch.full((int(present.max()) + 1,), -1)
    for label, name in names.items():
        indices[label] = _find_class_index(class_map.get(name, name), config, set_name)
    return indices[labels]


def _find_class_index(name: str, config: ClassifierConfig, set_name: str) -> int:
    """Return the index of the class with this name, or the name itself if it is a valid class index."""
    names: Sequence[str] = config.class_names or ()
    if names.count(name) > 1:
        raise UserError(
            f"{names.count(name)} classes of the classifier are named {name!r}, which {set_name} has. Map "
            "the name to a class index with --class-map FILE."
        )
    if name in names:
        return names.index(name)
    if name.isdecimal() and int(name) < config.classes:
        return int(name)
    what = f"class of {set_name}:"
    if not names:
        raise UserError(
            f"Unknown {what} {name!r}: the classes of the classifier have no names. Give class indices from "
            f"0 to {config.classes - 1}, or --class-map FILE."
        )
    if len(names) <= _MAX_NAMES:
        raise unknown(what, name, names)
    near = difflib.get_close_matches(name, names, n=10, cutoff=0.0)
    raise unknown(what, name, [*near, f"… ({len(names)} in all), or --class-map FILE"])
