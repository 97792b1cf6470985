"""Count lines, functions and configuration classes of the Python files in a folder.

uv run python benchmarks/code_size.py
uv run python benchmarks/code_size.py src/quarterview/models
"""

import ast
import io
import statistics
import sys
import tokenize
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

MAX_FUNCTION_LINES = 50
"""Functions with more lines than this are counted as long."""


class LineCounts(NamedTuple):
    """Numbers of lines of a file by their content."""

    all: int
    statements: int
    """Lines with code, without blank lines, docstrings and lines with only a comment."""
    docstrings: int
    comments: int
    """Lines with only a comment."""


def count_lines(text: str) -> LineCounts:
    """Count the lines of a Python source text."""
    docstring_lines = {
        line
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
        for line in range(node.lineno, (node.end_lineno or node.lineno) + 1)
    }
    code_lines: set[int] = set()
    comment_lines: set[int] = set()
    layout = (tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            comment_lines.add(token.start[0])
        elif token.type not in layout:
            code_lines.update(range(token.start[0], token.end[0] + 1))
    return LineCounts(
        len(text.splitlines()),
        len(code_lines - docstring_lines),
        len(docstring_lines),
        len(comment_lines - code_lines - docstring_lines),
    )


class FunctionSize(NamedTuple):
    """A function and its number of lines, including nested functions."""

    name: str
    num_lines: int


def find_functions(path: Path, tree: ast.AST) -> Iterator[FunctionSize]:
    """Yield all functions and methods of a file."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield FunctionSize(
                f"{path}:{node.lineno} {node.name}", (node.end_lineno or node.lineno) - node.lineno + 1
            )


class ClassFields(NamedTuple):
    """Bases and fields of a dataclass, as written in its source."""

    bases: tuple[str, ...]
    fields: tuple[str, ...]


def find_dataclasses(tree: ast.AST) -> Iterator[tuple[str, ClassFields]]:
    """Yield the dataclasses of a file by name: classes decorated with ``dataclass`` or `@part`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef) and any(map(_is_dataclass_decorator, node.decorator_list)):
            fields = [
                entry.target.id
                for entry in node.body
                if isinstance(entry, ast.AnnAssign)
                and isinstance(entry.target, ast.Name)
                and "ClassVar" not in ast.unparse(entry.annotation)
            ]
            bases = [ast.unparse(base).split("[")[0].split(".")[-1] for base in node.bases]
            yield node.name, ClassFields(tuple(bases), tuple(fields))


def _is_dataclass_decorator(decorator: ast.expr) -> bool:
    """Return True for ``dataclass`` and ``part``, also with arguments or under another module name."""
    name = ast.unparse(decorator).split("(")[0].split(".")[-1]
    return name == "part" or "dataclass" in name


def find_longest_ancestry(name: str, classes: Mapping[str, ClassFields]) -> list[str]:
    """Return the longest chain of dataclasses that a class inherits from, starting with the class."""
    chains = [
        find_longest_ancestry(base, classes)
        for base in classes[name].bases
        if base in classes and base != name
    ]
    return [name, *max(chains, key=len, default=[])]


def collect_fields(name: str, classes: Mapping[str, ClassFields]) -> set[str]:
    """Return the fields of a dataclass, including inherited ones."""
    inherited = [
        collect_fields(base, classes) for base in classes[name].bases if base in classes and base != name
    ]
    return set(classes[name].fields).union(*inherited)


def main() -> None:
    """Print the counts of the folder given as argument; by default of the package."""
    default = Path(__file__).parent.parent / "src" / "quarterview"
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else default
    texts = {path.relative_to(folder): path.read_text() for path in sorted(folder.rglob("*.py"))}
    if not texts:
        sys.exit(f"There are no Python files in {folder}. Give another folder.")
    trees = {path: ast.parse(text) for path, text in texts.items()}
    counts = [count_lines(text) for text in texts.values()]
    print(f"files {len(texts)}")
    for name, numbers in zip(LineCounts._fields, zip(*counts, strict=True), strict=True):
        print(f"{'' if name == 'all' else name.removesuffix('s') + ' '}lines {sum(numbers):,}")
    functions = [function for path, tree in trees.items() for function in find_functions(path, tree)]
    lengths = [function.num_lines for function in functions]
    longest = max(functions, key=lambda function: function.num_lines)
    print(f"functions {len(functions):,}, median {statistics.median(lengths):g} lines")
    print(
        f"functions over {MAX_FUNCTION_LINES} lines {sum(length > MAX_FUNCTION_LINES for length in lengths)}"
    )
    print(f"longest function {longest.num_lines} lines, {longest.name}")

    classes = dict(pair for tree in trees.values() for pair in find_dataclasses(tree))
    configs = [name for name in classes if name.endswith("Config")]
    if configs:
        distinct = set().union(*(collect_fields(name, classes) for name in configs))
        widest = max(configs, key=lambda name: len(collect_fields(name, classes)))
        deepest = max((find_longest_ancestry(name, classes) for name in configs), key=len)
        print(f"config classes {len(configs)}, of {len(distinct)} different fields")
        print(f"most fields of a config {len(collect_fields(widest, classes))}, {widest}")
        print(f"longest chain of config ancestors {len(deepest)}, {' < '.join(deepest)}")


if __name__ == "__main__":
    main()
