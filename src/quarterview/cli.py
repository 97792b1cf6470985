"""The command line: which module a command is in, its help, and one parse of its flags.

Exit codes: 0 done; 1 the run failed, the demo did not show what it should, the doctor found an
ailment, or pre-training is not shown to have helped; 2 wrong input; 75 stopped by SIGTERM after saving,
run the same command to go on; 130 stopped by Ctrl-C, likewise.
"""

import sys
from collections.abc import Sequence
from importlib import import_module
from itertools import pairwise, takewhile
from signal import SIGTERM, signal
from typing import Any

from quarterview.command_flags import parse_flags
from quarterview.command_table import COMMANDS, Command
from quarterview.config import Composed, flag
from quarterview.errors import EXIT_CODES, RunError, ToldElsewhereError, UserError, unknown


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line and exit.

    Args:
        argv: the arguments; those of the process by default.
    """
    signal(SIGTERM, lambda *_: sys.exit(EXIT_CODES["SIGTERM"]))  # until the training loop takes it over
    sys.exit(run(sys.argv[1:] if argv is None else argv))


def run(argv: Sequence[str]) -> int:
    """Run a command line and return its exit code."""
    try:
        return _run(argv)
    except UserError as error:
        _console().error(str(error))
        return 2
    except (RunError, OSError) as error:  # of a full disk, no permission: the message names the path
        if not isinstance(error, ToldElsewhereError):
            _console().error(str(error))
        return 1
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":  # torch's, named so that torch need not be imported
            raise
        _console().error(f"{error} Give a smaller --batch-size, or --accum-iter 2 for the same one in parts.")
        return 1
    except KeyboardInterrupt:
        return 130


def _run(argv: Sequence[str]) -> int:
    if not argv:
        _console().error(_overview())
        return 2
    if argv[0] in ("-h", "--help"):
        _console().say(_overview())
        return 0
    if argv[0] == "--version":
        _console().say(f"quarterview {_find('versions:own_version')()}")
        if "--verbose" in argv[1:]:  # for a bug report
            _console().facts("", list(_find("training.record:environment")().items()))
        return 0
    command, config, options = parse(argv)
    given = ["quarterview", *argv]
    with _find("training.console:forward_logs")():
        return _find(command.main)(*([config, given] if options is None else [config, given, options]))


def parse(argv: Sequence[str]) -> tuple[Command, Any, Any]:
    """The command that a command line means, its configuration, and its options (None if it has none).

    Raises:
        UserError: if a word or a value is not accepted.
        SystemExit: after --help.
    """
    name, words = argv[0], join_data(argv[1:])
    if name not in COMMANDS:
        raise unknown("command", name, COMMANDS)
    command = COMMANDS[name]
    kind, options = _find(command.config), _find(command.options)() if command.options else None
    if issubclass(kind, Composed):
        base, words = choose_defaults(name, command, kind, words)
        return command, *parse_flags(name, command.summary, command.example, base, options, words)
    values = parse_flags(name, command.summary, command.example, kind, options, words)
    return command, *values


def choose_defaults(name: str, command: Command, kind: Any, words: list[str]) -> tuple[Any, list[str]]:
    """What the flags stand above: a recipe, a method's defaults, the shape of the weights to start from.

    Returns:
        The configuration before the flags, and the words that are left to be parsed.
    """
    given = dict(pairwise([word.replace("--objective", "--method") for word in words]))
    base = kind()
    if command.recipes and "--recipe" in given:
        read = _find(command.recipes)(given["--recipe"])
        base = kind(**{part: its for part, its in read.parts().items() if part in base.parts()})
        if "--blr" in words and "--lr" not in words:
            base = base.with_flags(lr=None)  # else the recipe's own rate would go before the flag
    method = "tokenizer" if name == "tokenizer" else given.get("--method")
    if method is not None and "method" in base.choices():
        base = base.with_flags(method=method)
    if "--init-from" in given and name == "pretrain":
        shape = _find("commands.start:flags_of_start")(
            given["--init-from"], given.get("--out", ""), _after("--allow-partial", words), base
        )
        if "--recipe" in given:
            shape.pop("image_size", None)  # to which the weights are adapted
        base = base.with_flags(**shape)
    return base, words


def _after(name: str, words: Sequence[str]) -> list[str]:
    """The words that follow a flag, up to the next."""
    found = list(words[words.index(name) + 1 :]) if name in words else []
    return list(takewhile(lambda word: not word.startswith("--"), found))


def join_data(argv: Sequence[str]) -> list[str]:
    """The same arguments with ``--flag=value`` taken apart and every ``--data`` joined into one.

    Raises:
        UserError: if any other flag is given twice.
    """
    words = [part for word in argv for part in (word.split("=", 1) if word.startswith("--") else [word])]
    kept: list[str] = []
    data: list[str] = []
    seen: set[str] = set()
    in_data = False
    for word in words:
        if word == "-h":
            in_data = False
        if word.startswith("--"):
            in_data = word == "--data"
            name = flag(word[2:]).removeprefix("--no-").removeprefix("--")
            if name in seen and not in_data:
                raise UserError(f"--{name} is given twice. Give it once (only --data may be repeated).")
            seen.add(name)
            if in_data:
                continue
        (data if in_data else kept).append(word)
    return [*kept, "--data", *data] if "data" in seen else kept


def _find(place: str) -> Any:
    module, _, name = place.partition(":")
    return getattr(import_module(f"quarterview.{module}"), name)


def _console() -> Any:
    return _find("training.console:Console")()


def _overview() -> str:
    lines = [
        "usage: quarterview COMMAND [FLAGS]",
        "",
        "Learn to see from a quarter of the picture: masked autoencoders for anyone's images.",
        "Start with `quarterview demo`; then `quarterview pretrain --data FOLDER --out runs/mine`.",
    ]
    group = ""
    for name, command in COMMANDS.items():
        if command.group != group:
            group = command.group
            lines += ["", f"{group}:"]
        lines.append(f"  {name:<12} {command.summary}")
    return "\n".join([*lines, "", "`quarterview COMMAND --help` shows its flags; --version the version."])
