"""Which version of this package and of others is in use."""

import tomllib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


def installed_version(package: str) -> str | None:
    """The version of an installed package; None if it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def own_version() -> str:
    """The version of Quarterview, such as ``0.2.0``.

    Where the sources are on the path and the package is not installed, it is that of the
    ``pyproject.toml`` beside them, and is followed by ``(not installed)``.
    """
    return installed_version("quarterview") or f"{_source_version()} (not installed)"


def _source_version() -> str:
    try:
        with (Path(__file__).parents[2] / "pyproject.toml").open("rb") as file:
            return tomllib.load(file)["project"]["version"]
    except (OSError, KeyError, tomllib.TOMLDecodeError):
        return "unknown version"
