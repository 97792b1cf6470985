"""Errors that the command line prints without a traceback, and builders of their messages."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """An invalid request. The message says what is wrong, what was given and what to do.

    The command line prints the message and exits with code 2.
    """


def unknown(what: str, given: str, accepted: Iterable[str]) -> UserError:
    """Return the error for a name that is not accepted, with the most similar accepted name."""
    names = [str(name) for name in accepted]
    lower = {name.lower(): name for name in names}
    near = difflib.get_close_matches(given.lower(), lower, n=1, cutoff=0.5)
    hint = f" Did you mean {lower[near[0]]!r}?" if near else ""
    return UserError(f"Unknown {what} {given!r}.{hint} Give one of: {', '.join(names)}.")


def invalid(what: str, given: object, expected: str) -> UserError:
    """Return the error for a value that is not accepted: ``invalid("--quality", 101, "1 to 100")``."""
    return UserError(f"{what} is {given}. Give {expected}.")


def not_supported(what: str, used_with: str, fix: str) -> UserError:
    """Return the error for two things that exclude each other, such as a flag and a method."""
    return UserError(f"{what} is not supported with {used_with}. {fix}")


def unreadable(what: object, reason: object, fix: str = "") -> UserError:
    """Return the error for a file, folder or URL that cannot be read. `fix` is a sentence."""
    return UserError(f"Cannot read {what}: {reason}.{fix and ' ' + fix}")


def missing_package(package: str, purpose: str, extra: str | None = None) -> UserError:
    """Return the error for an optional package that is not installed. `extra` is an extra of quarterview."""
    name = f"'quarterview[{extra}]'" if extra else package
    return UserError(f"{purpose} needs {package}. Run: pip install {name}")


class RunError(RuntimeError):
    """A failure of a run, such as divergence or too many broken images.

    The message says what happened and what to do. The command line prints it and exits with code 1.
    """


class ReportedElsewhereError(RunError):
    """A failure of a run that another rank reports."""


EXIT_CODES = {
    "complete": 0,
    "helped": 0,
    "did not help": 1,
    "cannot tell": 1,
    "SIGTERM": 75,
    "SIGINT": 130,
}
"""The exit code of a command by its status or answer."""
