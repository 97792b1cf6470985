"""YAML of anyone: read in time and memory that its length bounds."""

from typing import Any

import yaml

MOST_BYTES = 1_000_000
"""Of a text."""


class _Plain(yaml.SafeLoader):
    """Without merges: a few lines of them stand for any number of entries, which are made at once.

    And without a key that comes twice, of which one would be lost in silence.
    """

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        if any(key.tag == "tag:yaml.org,2002:merge" for key, _ in node.value):
            raise yaml.constructor.ConstructorError(None, None, "merges (<<) are not read", node.start_mark)
        seen = set[tuple[str, str]]()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if (key.tag, key.value) in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"{key.value} is there twice", key.start_mark
                    )
                seen.add((key.tag, key.value))


def read_yaml(text: str | bytes) -> Any:
    """Plain values of a YAML text.

    Raises:
        ValueError: if it is none, or too long.
    """
    if len(text) > MOST_BYTES:
        raise ValueError(f"it is too long; accepted: up to {MOST_BYTES:,} bytes")
    try:
        return yaml.load(text.decode() if isinstance(text, bytes) else text, _Plain)
    except Exception as error:  # of tags with a wrong value PyYAML raises nearly everything
        raise ValueError(" ".join(str(error).split()) or type(error).__name__) from None
