"""What goes wrong because of what the user gave: said once, clearly, without a traceback."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """The request cannot be met. The message says what was given and what is accepted.

    The command line prints it as one line and exits with code 2.
    """


def unknown(what: str, given: str, accepted: Iterable[str]) -> UserError:
    """A UserError for a name that is none of the accepted ones, with the nearest of them."""
    names = [str(name) for name in accepted]
    lower = {name.lower(): name for name in names}
    near = difflib.get_close_matches(given.lower(), lower, n=1, cutoff=0.5)
    hint = f" Did you mean {lower[near[0]]!r}?" if near else ""
    return UserError(f"unknown {what} {given!r}; accepted: {', '.join(names)}.{hint}")


class RunError(RuntimeError):
    """A run cannot go on: it diverged, or its data is too broken.

    The message says what happened and what to do. The command line prints it as one line and exits
    with code 1.
    """


class ToldElsewhereError(RunError):
    """A run cannot go on, and another of its ranks has said why."""


EXIT_CODES = {
    "complete": 0,
    "helped": 0,
    "did not help": 1,
    "cannot tell": 1,
    "SIGTERM": 75,
    "SIGINT": 130,
}
"""The exit code of a command by how it ended."""
