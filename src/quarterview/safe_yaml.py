"""Reading of untrusted YAML, in time and memory proportional to its length."""

from typing import Any

import yaml

MAX_YAML_BYTES = 1_000_000
"""Maximum length of a YAML text."""


class _PlainLoader(yaml.SafeLoader):
    """A safe loader that rejects merge keys and duplicate keys.

    A few lines of merge keys (<<) can expand to exponentially many entries. PyYAML silently drops all but the
    last of duplicate keys.
    """

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        if any(key.tag == "tag:yaml.org,2002:merge" for key, _ in node.value):
            raise yaml.constructor.ConstructorError(
                None, None, "merge keys (<<) are not supported", node.start_mark
            )
        known = set[tuple[str, str]]()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if (key.tag, key.value) in known:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"duplicate key {key.value}", key.start_mark
                    )
                known.add((key.tag, key.value))


def read_yaml(text: str | bytes) -> Any:
    """Parse a YAML text into plain Python values.

    Raises:
        ValueError: if the text is not valid YAML, or too long.
    """
    if len(text) > MAX_YAML_BYTES:
        raise ValueError(f"it is longer than {MAX_YAML_BYTES:,} bytes")
    try:
        return yaml.load(text.decode() if isinstance(text, bytes) else text, _PlainLoader)
    except Exception as error:  # PyYAML raises many types for tags with invalid values
        raise ValueError(" ".join(str(error).split()) or type(error).__name__) from None
