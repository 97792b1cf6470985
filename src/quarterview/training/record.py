"""Provenance: versions, commit and hardware, for ``run.json``, results and bug reports."""

import datetime
import os
import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from quarterview.versions import get_installed_version, get_quarterview_version

_PACKAGES = ("torch", "torchvision", "numpy", "pillow")
_MORE_PACKAGES = (
    *("timm", "transformers", "safetensors", "pyarrow", "scikit-learn", "pydantic", "tyro"),
    *("tensorboard", "huggingface-hub", "onnx", "onnxruntime", "lightly"),
)
"""Further packages whose versions a bug report lists."""


def collect_provenance(argv: Sequence[str]) -> dict[str, Any]:
    """Return what is needed to trace a result: command line, versions, commit, hardware and date.

    Args:
        argv: the command line; empty for a call from Python.
    """
    return {
        "argv": list(argv),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": {"quarterview": get_quarterview_version()}
        | {name: get_installed_version(name) for name in _PACKAGES},
        "python": platform.python_version(),
        "git": read_git_revision(),
        "hardware": describe_hardware(),
    }


def read_git_revision() -> str | None:
    """Return the commit of the working folder, ``-dirty`` if it was changed; None outside a repository."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def describe_hardware() -> dict[str, Any]:
    """Return the machine type, cores, torch threads and GPUs."""
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpus": gpus,
    }


def describe_environment() -> dict[str, str]:
    """Return versions, processor and devices by name, in the order of a bug report."""
    packages = {
        name: get_installed_version(name) or "not installed" for name in (*_PACKAGES, *_MORE_PACKAGES)
    }
    cuda = f"CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}" if torch.version.cuda else ""
    return {
        "quarterview": get_quarterview_version(),
        **packages,
        "python": f"{platform.python_version()} ({platform.python_implementation()})",
        "system": platform.platform(),
        "processor": f"{_processor()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads of torch, "
        f"{torch.backends.cpu.get_cpu_capability()}",
        "torch built with": cuda or "no CUDA",
        "devices": "; ".join(_devices()),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def _devices() -> list[str]:
    found = ["cpu"]
    for index in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(index)
        size = about.total_memory / 2**30
        found.append(f"cuda:{index} {about.name}, {size:.0f} GiB, capability {about.major}.{about.minor}")
    if torch.backends.mps.is_available():
        found.append("mps")
    return found
