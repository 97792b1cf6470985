"""``quarterview recipes``: the named configurations and studies."""

from collections.abc import Sequence
from importlib import import_module

from quarterview.commands.config import RecipesConfig
from quarterview.training.console import Console


def main(_config: RecipesConfig, _argv: Sequence[str]) -> int:
    """Print each recipe's purpose, command, result and flags, and return the exit code."""
    console = Console()
    recipes = import_module("quarterview.recipes")  # by name, because recipes and studies import the commands
    for command, table in (("pretrain", recipes.RECIPES), ("finetune", recipes.FINETUNE_RECIPES)):
        console.info(f"{command} --recipe:")
        for name, recipe in table.items():
            purpose = (recipe.__doc__ or "").replace("``", "").strip()
            console.info(f"{name}: {purpose}")
            flags = recipes.get_changed_flags(recipe())
            console.info("    " + ", ".join(f"{key} {_format_value(value)}" for key, value in flags.items()))
    console.info("study:")
    for name, study in import_module("quarterview.studies.named").STUDIES.items():
        console.info(f"{name}: {study.purpose}\n    " + "; ".join(table.title for table in study.tables))
    return 0


def _format_value(value: object) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
