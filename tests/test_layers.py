"""The layers of the package: which package may import which, and the single places for some work."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src" / "quarterview"

LAYERS = {
    "__main__": 9,
    "cli": 9,
    "demo": 8,
    "studies": 8,
    "recipes": 7,
    "commands": 6,
    "benchmark": 5,
    "doctor": 5,
    "evaluation": 4,
    "weights": 3,
    "training": 2,
    "methods": 1,
    "data": 1,
    "models": 0,
    "rng": 0,
    "safe_yaml": 0,
    "command_flags": 1,
    "command_table": 0,
    "config": 0,
    "moved": 0,
    "files": 0,
    "versions": 0,
    "errors": 0,
}
MODEL_FREE = ("data", "training")  # these never import the model, or name it
BUILDS = "training/sharding.py"  # recomputes, compiles and shards the blocks of a model


def package(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def modules() -> list[Path]:
    return sorted(path for path in SOURCE.rglob("*.py") if path != SOURCE / "__init__.py")


def imported(path: Path) -> Iterator[str]:
    """The dotted names of ours that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        yield from (name.removeprefix("quarterview.") for name in names if name.startswith("quarterview."))


def as_module(name: str) -> str | None:
    """The module that a dotted name is, or is in; None for the package itself."""
    parts = name.split(".")
    while parts:
        path = SOURCE.joinpath(*parts)
        if path.with_suffix(".py").is_file() or (path / "__init__.py").is_file():
            return ".".join(parts)
        parts.pop()
    return None


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(SOURCE)))
def test_imports_run_downward(path):
    own = package(path)
    for name in imported(path):
        other = name.split(".")[0]
        assert LAYERS[other] <= LAYERS[own], f"{own} imports {other}, which stands above it"
        if own in MODEL_FREE and path != SOURCE / BUILDS:
            assert other != "models", f"{own} imports the model"


def test_no_module_imports_itself_through_others():
    graph = {
        str(path.relative_to(SOURCE).with_suffix("")).replace("/", "."): {
            module for name in imported(path) if (module := as_module(name))
        }
        for path in modules()
    }
    TopologicalSorter(graph).prepare()  # raises CycleError


def test_no_two_packages_import_each_other():
    graph: dict[str, set[str]] = {}
    for path in modules():
        graph.setdefault(package(path), set()).update(n.split(".")[0] for n in imported(path))
    for name, others in graph.items():
        others.discard(name)
    TopologicalSorter(graph).prepare()


def all_imports(path: Path) -> set[str]:
    """The dotted names, ours and others', that a file imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def test_the_training_loop_knows_no_method():
    for path in (SOURCE / "training").glob("*.py"):
        names = {name for name in imported(path) if name.startswith("methods.")}
        assert all(name.startswith("methods.base.") for name in names), path


@pytest.mark.parametrize(
    ("module", "library"),
    [
        ("training/distributed.py", "torch.distributed.rendezvous"),
        ("training/distributed.py", "torch.nn.parallel"),
        ("training/sharding.py", "torch.distributed.fsdp"),
        ("training/checkpoint.py", "safetensors.torch.save_file"),
        ("training/console.py", "rich"),
    ],
)
def test_one_module_alone_uses_a_library(module, library):
    users = {
        str(path.relative_to(SOURCE))
        for path in modules()
        if any(name == library or name.startswith(library + ".") for name in all_imports(path))
    }
    assert users <= {module}


def test_importing_the_package_does_no_work():
    tree = ast.parse((SOURCE / "__init__.py").read_text("utf-8"))
    top = [ast.dump(node) for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    assert [node for node in top if "torch" in node or "quarterview" in node] == [
        ast.dump(
            ast.parse("from quarterview.moved import install_moved_modules").body[0]
        )  # the import paths of 0.1
    ]


def test_the_method_is_short_enough_to_read():
    lines = (SOURCE / "models" / "mae.py").read_text("utf-8").splitlines()
    assert len(lines) < 300


def test_config_modules_load_no_torch():
    names = [
        "quarterview." + str(path.relative_to(SOURCE).with_suffix("")).replace("/", ".")
        for path in modules()
        if path.parent.name in ("doctor", "weights", "data", "commands")
        and path.stem in ("config", "pack_config")
    ]
    assert {"quarterview.doctor.config", "quarterview.weights.config", "quarterview.data.pack_config"} <= set(
        names
    )
    code = f"import sys, {', '.join(names)}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


if __name__ == "__main__":  # the table of layers, for the documentation
    for layer in sorted(set(LAYERS.values()), reverse=True):
        print(layer, ", ".join(name for name, its in LAYERS.items() if its == layer))
