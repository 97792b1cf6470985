"""A short search of every door, the same each time, finds nothing."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

FUZZ = Path(__file__).parents[2] / "benchmarks" / "fuzz.py"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("door", "runs"), [("images", 5000), ("tar", 20000), ("weights", 2000), ("configuration", 2000)]
)
def test_a_short_search_finds_nothing(tmp_path, door, runs):
    pytest.importorskip("atheris", reason="there is none for this machine")
    command = [
        sys.executable,
        FUZZ,
        door,
        "--runs",
        str(runs),
        "--seed",
        "3",
        "--findings",
        tmp_path / "found",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=1200)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(done.stdout)
    assert result["findings"] == []
    assert result["executions"] >= runs
