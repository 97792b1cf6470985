"""``quarterview inspect``: describe weights of any origin, or compare two."""

from collections.abc import Sequence

from quarterview.training.console import Console
from quarterview.weights.config import InspectConfig
from quarterview.weights.inspect import compare_weights, inspect_weights

_MAX_SHOWN_TENSORS = 20


def main(config: InspectConfig, argv: Sequence[str]) -> int:
    """Print a description of weights, or their differences from others.

    Raises:
        UserError: if the weights cannot be read.
    """
    console = Console()
    if config.other is None:
        console.key_values(config.path, inspect_weights(config.path))
        return 0
    comparison = compare_weights(config.path, config.other)
    if comparison.config_rows:
        console.table("configurations", ["", "first", "second"], comparison.config_rows)
    columns = ["part", "equal", "different", "largest difference", "only in one"]
    console.table("tensors", columns, comparison.part_rows)
    for name, first, second in comparison.mismatched_tensors[:_MAX_SHOWN_TENSORS]:
        console.info(f"{name}: {first} in the first, {second} in the second")
    if len(comparison.mismatched_tensors) > _MAX_SHOWN_TENSORS:
        console.info(f"and {len(comparison.mismatched_tensors) - _MAX_SHOWN_TENSORS} more")
    return 0
