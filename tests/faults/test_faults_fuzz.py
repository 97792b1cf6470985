"""A short reproducible fuzzing run of every entry point."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

FUZZ = Path(__file__).parents[2] / "benchmarks" / "fuzz.py"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "runs"), [("images", 5000), ("tar", 20000), ("weights", 2000), ("configuration", 2000)]
)
def test_a_short_fuzzing_run_finds_no_bug(tmp_path, target, runs):
    pytest.importorskip("atheris", reason="atheris is not available for this machine")
    command = [
        sys.executable,
        FUZZ,
        target,
        "--runs",
        str(runs),
        "--seed",
        "3",
        "--findings",
        tmp_path / "findings",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=1200)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(done.stdout)
    assert result["findings"] == []
    assert result["executions"] >= runs
