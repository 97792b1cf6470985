"""Tests of files of version 0.1: runs resume and load, recipes and a study are read."""

import importlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import yaml
from safetensors.torch import load_file

import quarterview as qv
from quarterview.config import get_field_specs, get_renamed_fields
from quarterview.methods.config import MethodConfig

FIXTURES = Path(__file__).parent / "fixtures" / "v0_1"
PRETRAIN = "pretrain --recipe pretrain.yaml --data shapes:256:size=16 --out run"
_SETS = "--train shapes:128:size=16 --test shapes:64:size=16:seed=1"
FINETUNE = f"finetune run --recipe finetune.yaml {_SETS} --out tuned"

# ---------------------------------------------------------------------- what is called of the package


def read_recipe(path: Path) -> Any:
    """Read a recipe of pre-training."""
    return importlib.import_module("quarterview.recipes").read_pretrain_recipe(str(path))


def read_finetune_recipe(path: Path) -> Any:
    """Read a recipe of fine-tuning."""
    return importlib.import_module("quarterview.recipes").read_finetune_recipe(str(path))


def read_study(path: Path) -> Any:
    """Read a study file."""
    return importlib.import_module("quarterview.studies.study").read_study(path)


def fields_of(config: Any) -> dict[str, Any]:
    """Return the values of a configuration by their names in version 0.1."""
    values = config.flags() | ({"objective": config.method.name} if hasattr(config, "method") else {})
    old = {new: old for old, new in config.get_renamed_fields().items()}
    return {old.get(name, name): value for name, value in values.items()}


# ---------------------------------------------------------------------- tests


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the fixtures that can be changed."""
    return shutil.copytree(FIXTURES, tmp_path / "v0_1", symlinks=True)


@pytest.mark.parametrize(("command", "run"), [(PRETRAIN, "run"), (FINETUNE, "tuned")])
def test_a_stopped_run_resumes_to_the_same_result(folder, command, run):
    words = [sys.executable, "-m", "quarterview", *command.split()]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    reference = FIXTURES / {"run": "finished", "tuned": "tuned_finished"}[run]
    rows, expected = (_metrics(path) for path in (folder / run, reference))
    assert [row["step"] for row in rows] == [row["step"] for row in expected] == list(range(1, 25))
    assert [row["loss"] for row in rows] == pytest.approx([row["loss"] for row in expected], rel=1e-5)
    weights = load_file(folder / run / "checkpoints" / "step-00000024" / "model.safetensors")
    wanted = load_file(reference / "model.safetensors")
    assert weights.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(_sure(name, weights[name]), _sure(name, tensor), rtol=1e-5, atol=1e-5)


def _metrics(run: Path) -> list[dict[str, Any]]:
    return list(map(json.loads, (run / "metrics.jsonl").read_text().splitlines()))


def _sure(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor without the biases of keys, on which no output depends, so that Adam amplifies rounding
    errors."""
    if not name.endswith("qkv.bias"):
        return tensor
    queries, _, values = tensor.chunk(3)
    return torch.cat([queries, values])


def test_a_run_opens():
    model = qv.load(str(FIXTURES / "run"))
    assert model.encode(torch.zeros(2, 3, 16, 16)).shape == (2, 1 + 16, 16)
    held = load_file(FIXTURES / "run" / "checkpoints" / "step-00000007" / "model.safetensors")
    assert all(torch.equal(model.state_dict()[name], held[name]) for name in ("cls_token", "norm.bias"))
    assert model(torch.rand(2, 3, 16, 16)).loss.isfinite()


@pytest.mark.parametrize(
    ("path", "read"),
    [
        ("pretrain.yaml", read_recipe),
        ("finetune.yaml", read_finetune_recipe),
        ("run/config.yaml", read_recipe),
        ("tuned/config.yaml", read_finetune_recipe),
    ],
)
def test_recipes_are_read(path, read):
    values = fields_of(read(FIXTURES / path))
    methods = get_args(MethodConfig)
    others = {name for kind in methods for name in (*get_field_specs(kind), *get_renamed_fields(kind))}
    for name, value in yaml.safe_load((FIXTURES / path).read_text()).items():
        if name in values:
            assert _plain(values[name], value) == value, name
        else:  # 0.1 wrote the fields of all methods
            assert name in others, name


def _plain(value: Any, like: Any) -> Any:
    """Convert a value to what YAML would contain."""
    if isinstance(value, tuple):
        return list(value) if isinstance(like, list) else value[0]
    return "none" if value is None and like is not None else value


def test_a_study_is_read():
    (table,) = read_study(FIXTURES / "study.yaml").tables
    content = yaml.safe_load((FIXTURES / "study.yaml").read_text())["tables"][0]
    assert [arm.name for arm in table.arms] == list(content["arms"])
    assert len(table.findings) == 1
