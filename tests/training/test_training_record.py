"""Tests of provenance, also if the package is on the path but not installed."""

import json
import os
import subprocess
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

from quarterview.training.record import collect_provenance, describe_environment
from quarterview.versions import get_installed_version, get_quarterview_version

REPOSITORY = Path(__file__).parents[2]


def test_versions_of_installed_packages():
    assert (
        get_quarterview_version()
        == collect_provenance([])["versions"]["quarterview"]
        == version("quarterview")
    )
    assert collect_provenance(["a", "b"])["argv"] == ["a", "b"]
    assert get_installed_version("no-such-package") is None


def test_the_environment_of_a_bug_report(monkeypatch):
    found = describe_environment()
    assert found["torch"] == version("torch")
    assert "cores" in found["processor"]
    assert found["devices"].startswith("cpu")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)

    class About:
        name, total_memory, major, minor = "Some GPU", 80 * 2**30, 9, 0

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _index: About)
    assert "cuda:0 Some GPU, 80 GiB, capability 9.0" in describe_environment()["devices"]


@pytest.fixture
def elsewhere(tmp_path) -> dict[str, str]:
    """Environment variables of a Python that has all packages but ours, which is on the path."""
    packages = tmp_path / "packages"
    packages.mkdir()
    for path in Path(torch.__file__).parents[1].iterdir():
        if "quarterview" not in path.name:
            (packages / path.name).symlink_to(path)
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(REPOSITORY / "src"), str(packages)])}


def test_provenance_without_an_installed_package(elsewhere):
    code = (
        "import json; from quarterview.training.record import collect_provenance, describe_environment;"
        "print(json.dumps([collect_provenance([])['versions'], describe_environment()]))"
    )
    done = subprocess.run(  # -S leaves out what is installed
        [sys.executable, "-S", "-c", code], env=elsewhere, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    recorded, reported = json.loads(done.stdout)
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text("utf-8"))["project"]
    assert recorded["quarterview"] == reported["quarterview"] == f"{project['version']} (not installed)"
    assert recorded["torch"] == version("torch")


def test_without_an_installed_package_the_command_line_has_a_version(elsewhere):
    done = subprocess.run(
        [sys.executable, "-S", "-m", "quarterview", "--version"],
        env=elsewhere,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "(not installed)" in done.stdout
