"""The package as a user installs it: a wheel in an environment of its own, away from the source tree.

Its dependencies come from uv's cache, or from the package registry where the cache is cold.
"""

import os
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
from PIL import Image

pytestmark = [pytest.mark.slow, pytest.mark.alone]

ROOT = Path(__file__).parents[1]


def run(*words: str | Path, cwd: Path) -> str:
    """Run a command that must succeed, without this environment's paths, and return what it prints."""
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run(words, cwd=cwd, env=kept, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    uv = os.environ.get("UV") or shutil.which("uv")
    assert uv, "uv is needed to build the wheel. Run: pip install uv"
    folder = tmp_path_factory.mktemp("wheel")
    run(uv, "build", "--quiet", "--wheel", "--out-dir", folder, ROOT, cwd=folder)
    (found,) = folder.glob("quarterview-*.whl")
    return found


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """The `bin` folder of an environment that holds the wheel and its dependencies, nothing else."""
    uv = os.environ.get("UV") or shutil.which("uv")
    folder = tmp_path_factory.mktemp("clean")
    run(uv, "venv", "--quiet", "--python", sys.executable, folder / "env", cwd=folder)
    run(uv, "pip", "install", "--quiet", "--python", folder / "env", wheel, cwd=folder)
    return folder / "env" / "bin"


def test_the_wheel_holds_the_package_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    source = {
        str(path.relative_to(ROOT / "src")) for path in (ROOT / "src" / "quarterview").rglob("*.py")
    }  # and no test, no benchmark, no cache
    assert {name for name in names if ".dist-info/" not in name} == source


def test_an_installed_package_is_imported_from_its_environment(installed, tmp_path):
    script = "import quarterview, quarterview.training.run; print(quarterview.__file__, quarterview.pretrain)"
    shown = run(installed / "python", "-c", script, cwd=tmp_path)
    assert str(installed.parent) in shown
    assert str(ROOT) not in shown
    assert "0.2" in run(installed / "quarterview", "--version", cwd=tmp_path)


def test_the_demo_succeeds_in_under_five_minutes(installed, tmp_path):
    began = time.monotonic()
    shown = run(installed / "quarterview", "demo", "--out", tmp_path / "demo", cwd=tmp_path)
    assert time.monotonic() - began < 300
    assert "times as accurate" in " ".join(shown.split())
    with Image.open(tmp_path / "demo" / "panel.png") as panel:
        assert panel.width > 500
    assert (tmp_path / "demo" / "curve.png").is_file()
