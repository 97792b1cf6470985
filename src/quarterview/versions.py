"""Versions of this package and of other installed packages."""

import tomllib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


def get_installed_version(package: str) -> str | None:
    """Return the version of an installed package; None if it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def get_quarterview_version() -> str:
    """Return the version of Quarterview, such as ``0.2.0``.

    If Quarterview is imported from a source tree without being installed, the version is that of
    ``pyproject.toml``, followed by ``(not installed)``.
    """
    return get_installed_version("quarterview") or f"{_read_source_version()} (not installed)"


def _read_source_version() -> str:
    """Read the version from the ``pyproject.toml`` of the source tree."""
    try:
        with (Path(__file__).parents[2] / "pyproject.toml").open("rb") as file:
            return tomllib.load(file)["project"]["version"]
    except (OSError, KeyError, tomllib.TOMLDecodeError):
        return "unknown version"
