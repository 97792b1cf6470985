"""The record of where a result comes from, also where the package is on the path and not installed."""

import json
import os
import subprocess
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

from quarterview.training.record import environment, provenance
from quarterview.versions import installed_version, own_version

REPOSITORY = Path(__file__).parents[2]


def test_what_is_installed():
    assert own_version() == provenance([])["versions"]["quarterview"] == version("quarterview")
    assert provenance(["a", "b"])["argv"] == ["a", "b"]
    assert installed_version("no-such-package") is None


def test_what_a_bug_report_needs(monkeypatch):
    found = environment()
    assert found["torch"] == version("torch")
    assert "cores" in found["processor"]
    assert found["devices"].startswith("cpu")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)

    class About:
        name, total_memory, major, minor = "Some GPU", 80 * 2**30, 9, 0

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _index: About)
    assert "cuda:0 Some GPU, 80 GiB, capability 9.0" in environment()["devices"]


@pytest.fixture
def elsewhere(tmp_path) -> dict[str, str]:
    """The environment of a Python that has every package but ours, which is on the path as sources."""
    packages = tmp_path / "packages"
    packages.mkdir()
    for path in Path(torch.__file__).parents[1].iterdir():
        if "quarterview" not in path.name:
            (packages / path.name).symlink_to(path)
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(REPOSITORY / "src"), str(packages)])}


def test_without_an_installed_package_the_record_says_so(elsewhere):
    code = (
        "import json; from quarterview.training.record import environment, provenance;"
        "print(json.dumps([provenance([])['versions'], environment()]))"
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
