"""Files that are there whole or not at all."""

from pathlib import Path


def replace_text(path: Path, text: str) -> None:
    """Write a text file in UTF-8, whole or not at all: a reader sees the old content or the new one."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, "utf-8")
    partial.replace(path)
