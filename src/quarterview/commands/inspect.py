"""`quarterview inspect`: say what weights are, or in what two of them differ."""

from collections.abc import Sequence

from quarterview.training.console import Console
from quarterview.weights.config import InspectConfig
from quarterview.weights.inspect import compare_weights, inspect

_TENSORS_SHOWN = 20


def main(config: InspectConfig, argv: Sequence[str]) -> int:
    """Show what is known about weights from anywhere, or how they differ from others.

    Raises:
        UserError: if they are not understood.
    """
    console = Console()
    if config.other is None:
        console.facts(config.path, inspect(config.path))
        return 0
    found = compare_weights(config.path, config.other)
    if found.configs:
        console.table("what they are", ["", "first", "second"], found.configs)
    columns = ["part", "equal", "different", "largest difference", "in one alone"]
    console.table("tensors", columns, found.parts)
    for name, first, second in found.tensors[:_TENSORS_SHOWN]:
        console.say(f"{name}: {first} in the first, {second} in the second")
    if len(found.tensors) > _TENSORS_SHOWN:
        console.say(f"and {len(found.tensors) - _TENSORS_SHOWN} more")
    return 0
