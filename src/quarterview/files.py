"""Atomic writing of files."""

from pathlib import Path


def write_text_atomic(path: Path, text: str) -> None:
    """Write a text file in UTF-8 atomically: readers see either the old content or the new one."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, "utf-8")
    partial.replace(path)
