"""Words that the package does not use in identifiers, in --help and in messages.

They were its private dialect once; the field has plain words for the same things (`CHANGELOG.md`).
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from quarterview.command_table import COMMANDS

SOURCE = Path(__file__).parents[1] / "src" / "quarterview"

RETIRED = {
    *("say", "says", "said", "saying", "tells", "told", "ask", "asks", "asked", "answered"),
    *("settle", "settled", "mend", "mended", "spread", "likewise", "twin", "twins", "remedy"),
    *("most", "least", "share", "shares", "picture", "pictures", "taught"),
    *("colour", "colours", "grey", "greyscale", "licence", "normalise", "normalised", "labelled"),
    *("vocabulary", "worthwhile", "sparing"),
}
"""Parts of identifiers, between underscores or capitals."""

KEPT = {"decoder_share"}
"""A key of study files, which users write."""

RETIRED_PROSE = re.compile(r"accepted:|accepted without|\blikewise\b|\btold\b|\bsuch a one\b|\bmend\b")
"""What --help and the literal text of errors do not hold."""


def parts(name: str) -> set[str]:
    return set(re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower().split("_"))


def identifiers(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """The line and name of everything that a file names itself."""
    for node in ast.walk(tree):
        match node:
            case ast.FunctionDef() | ast.ClassDef():
                yield node.lineno, node.name
            case ast.arg():
                yield node.lineno, node.arg
            case ast.Name(ctx=ast.Store()):
                yield node.lineno, node.id
            case ast.Attribute(ctx=ast.Store()):
                yield node.lineno, node.attr


FILES = sorted(SOURCE.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_no_retired_word_names_anything(path):
    found = [
        f"{path.name}:{line} {name}"
        for line, name in identifiers(ast.parse(path.read_text("utf-8")))
        if parts(name) & RETIRED and name not in KEPT
    ]
    assert not found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_no_error_holds_a_retired_phrase(path):
    found = []
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            texts = [n.value for n in ast.walk(node.exc) if isinstance(n, ast.Constant)]
            found += [f"{path.name}:{node.lineno} {t}" for t in texts if RETIRED_PROSE.search(str(t))]
    assert not found


@pytest.mark.parametrize("command", COMMANDS)
def test_help_holds_no_retired_phrase(command, capsys):
    from quarterview.cli import main

    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    assert ended.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert not RETIRED_PROSE.findall(text)
    flags = set(re.findall(r"--([a-z][a-z0-9-]+)", text))
    assert not {flag for flag in flags if parts(flag.replace("-", "_")) & RETIRED}
