"""What must be given on the command line."""

from quarterview.config import POSITIONAL, Composed, flag
from quarterview.errors import UserError


def require(config: Composed, *names: str) -> None:
    """Check that flags are given which have no default.

    Raises:
        UserError: naming the first that is missing, and what it is.
    """
    specs, values = config.specs(), config.flags()
    for name in names:
        if not values[name]:
            shown = name.upper() if POSITIONAL in specs[name].markers else flag(name)
            raise UserError(f"{shown} is missing. Give {specs[name].help[0].lower()}{specs[name].help[1:]}")
