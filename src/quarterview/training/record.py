"""Where a result comes from: versions, commit and hardware, for ``run.json`` and ``results/*.json``."""

import datetime
import os
import platform
import subprocess
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

import torch

_PACKAGES = ("quarterview", "torch", "torchvision", "numpy", "pillow")


def provenance(argv: Sequence[str]) -> dict[str, Any]:
    """What it takes to trace a result: the command line, versions, commit, hardware and date.

    Args:
        argv: the command line; empty where Python called.
    """
    return {
        "argv": list(argv),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": {name: version(name) for name in _PACKAGES},
        "python": platform.python_version(),
        "git": git_state(),
        "hardware": hardware(),
    }


def git_state() -> str | None:
    """The commit of the working folder and whether it is changed; None outside a repository."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def hardware() -> dict[str, Any]:
    """What this runs on."""
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpus": gpus,
    }
