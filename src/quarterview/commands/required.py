"""Check of required flags."""

from quarterview.config import POSITIONAL, ComposedConfig, flag_name
from quarterview.errors import UserError


def require_flags(config: ComposedConfig, *names: str) -> None:
    """Check that required flags are given.

    Raises:
        UserError: for the first missing flag, with its help.
    """
    specs, values = config.specs(), config.flags()
    for name in names:
        if not values[name]:
            shown = name.upper() if POSITIONAL in specs[name].markers else flag_name(name)
            text = specs[name].help.removeprefix("Required: ")
            raise UserError(f"{shown} is missing. Give {text[0].lower()}{text[1:]}")
