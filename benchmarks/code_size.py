"""How much code is there, and how is it cut? Counted from the syntax trees of a folder's Python files.

uv run python benchmarks/code_size.py
uv run python benchmarks/code_size.py src/quarterview/model
"""

import ast
import io
import statistics
import sys
import tokenize
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

LONG = 50
"""Lines above which a function is counted as long."""


class Lines(NamedTuple):
    """How many lines of a file are what."""

    all: int
    statements: int
    """Lines that hold code: not blank, not a comment alone, not of a docstring."""
    docstrings: int
    comments: int
    """Lines that are a comment alone."""


def lines_of(text: str) -> Lines:
    """Count the lines of a file."""
    documented = {
        line
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
        for line in range(node.lineno, (node.end_lineno or node.lineno) + 1)
    }
    code: set[int] = set()
    commented: set[int] = set()
    empty = (tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            commented.add(token.start[0])
        elif token.type not in empty:
            code.update(range(token.start[0], token.end[0] + 1))
    return Lines(
        len(text.splitlines()), len(code - documented), len(documented), len(commented - code - documented)
    )


class Function(NamedTuple):
    """A function, with those inside it."""

    name: str
    length: int


def functions_of(path: Path, tree: ast.AST) -> Iterator[Function]:
    """All functions and methods of a file."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield Function(
                f"{path}:{node.lineno} {node.name}", (node.end_lineno or node.lineno) - node.lineno + 1
            )


class Dataclass(NamedTuple):
    """A dataclass as its source shows it."""

    bases: tuple[str, ...]
    fields: tuple[str, ...]


def dataclasses_of(tree: ast.AST) -> Iterator[tuple[str, Dataclass]]:
    """The dataclasses of a file, by their names."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef) and any("dataclass" in ast.unparse(d) for d in node.decorator_list):
            fields = [
                entry.target.id
                for entry in node.body
                if isinstance(entry, ast.AnnAssign)
                and isinstance(entry.target, ast.Name)
                and "ClassVar" not in ast.unparse(entry.annotation)
            ]
            bases = [ast.unparse(base).split("[")[0].split(".")[-1] for base in node.bases]
            yield node.name, Dataclass(tuple(bases), tuple(fields))


def ancestry(name: str, classes: Mapping[str, Dataclass]) -> list[str]:
    """The longest chain of dataclasses that a class stands on, with itself first."""
    chains = [ancestry(base, classes) for base in classes[name].bases if base in classes and base != name]
    return [name, *max(chains, key=len, default=[])]


def all_fields(name: str, classes: Mapping[str, Dataclass]) -> set[str]:
    """The fields of a dataclass with those that it inherits."""
    inherited = [
        all_fields(base, classes) for base in classes[name].bases if base in classes and base != name
    ]
    return set(classes[name].fields).union(*inherited)


def main() -> None:
    """Count and print."""
    default = Path(__file__).parent.parent / "src" / "quarterview"
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else default
    texts = {path.relative_to(folder): path.read_text() for path in sorted(folder.rglob("*.py"))}
    if not texts:
        sys.exit(f"no Python files in {folder}")
    trees = {path: ast.parse(text) for path, text in texts.items()}
    counts = [lines_of(text) for text in texts.values()]
    print(f"files {len(texts)}")
    for name, numbers in zip(Lines._fields, zip(*counts, strict=True), strict=True):
        print(f"{'' if name == 'all' else name.removesuffix('s') + ' '}lines {sum(numbers):,}")
    functions = [function for path, tree in trees.items() for function in functions_of(path, tree)]
    lengths = [function.length for function in functions]
    longest = max(functions, key=lambda function: function.length)
    print(f"functions {len(functions):,}, median {statistics.median(lengths):g} lines")
    print(f"functions over {LONG} lines {sum(length > LONG for length in lengths)}")
    print(f"longest function {longest.length} lines, {longest.name}")

    classes = dict(pair for tree in trees.values() for pair in dataclasses_of(tree))
    configs = [name for name in classes if name.endswith("Config")]
    if configs:
        distinct = set().union(*(all_fields(name, classes) for name in configs))
        widest = max(configs, key=lambda name: len(all_fields(name, classes)))
        deepest = max((ancestry(name, classes) for name in configs), key=len)
        print(f"config classes {len(configs)}, of {len(distinct)} different fields")
        print(f"most fields of a config {len(all_fields(widest, classes))}, {widest}")
        print(f"longest chain of config ancestors {len(deepest)}, {' < '.join(deepest)}")


if __name__ == "__main__":
    main()
