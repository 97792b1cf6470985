"""The command line: finds the command, parses its flags and runs it.

Exit codes: 0 success; 1 the run failed, the demo's model is not good enough, the doctor found an error, or
the comparison does not show that pre-training helped; 2 invalid input; 75 stopped by SIGTERM after saving;
130 stopped by Ctrl-C after saving. The same command resumes a stopped run.
"""

import sys
from collections.abc import Sequence
from importlib import import_module
from itertools import pairwise, takewhile
from signal import SIGTERM, signal
from typing import Any

from quarterview.command_flags import parse_flags
from quarterview.command_table import COMMANDS, Command
from quarterview.config import ComposedConfig, flag_name
from quarterview.errors import EXIT_CODES, ReportedElsewhereError, RunError, UserError, unknown


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line and exit.

    Args:
        argv: the arguments; by default those of the process.
    """
    signal(
        SIGTERM, lambda *_: sys.exit(EXIT_CODES["SIGTERM"])
    )  # until the training loop sets its own handler
    sys.exit(run(sys.argv[1:] if argv is None else argv))


def run(argv: Sequence[str]) -> int:
    """Run a command line and return its exit code."""
    try:
        return _run(argv)
    except UserError as error:
        _console().error(str(error))
        return 2
    except (RunError, OSError) as error:  # such as a full disk; the message names the path
        if not isinstance(error, ReportedElsewhereError):
            _console().error(str(error))
        return 1
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":  # torch's, named so that torch need not be imported
            raise
        _console().error(
            f"{error} Give a smaller --batch-size, or --accum-iter 2 to compute it in two parts."
        )
        return 1
    except KeyboardInterrupt:
        return 130


def _run(argv: Sequence[str]) -> int:
    if not argv:
        _console().error(_overview())
        return 2
    if argv[0] in ("-h", "--help"):
        _console().info(_overview())
        return 0
    if argv[0] == "--version":
        _console().info(f"quarterview {_import('versions:get_quarterview_version')()}")
        if "--verbose" in argv[1:]:  # for a bug report
            _console().key_values("", list(_import("training.record:describe_environment")().items()))
        return 0
    with _import("training.console:forward_logs")():
        command, config, options = parse(argv)
        given = ["quarterview", *argv]
        return _import(command.main)(*([config, given] if options is None else [config, given, options]))


def parse(argv: Sequence[str]) -> tuple[Command, Any, Any]:
    """Parse a command line.

    Returns:
        The command, its configuration, and its options (None if it has none).

    Raises:
        UserError: if a command, flag or value is not accepted.
        SystemExit: after --help.
    """
    name, args = argv[0], normalize_args(argv[1:])
    if name not in COMMANDS:
        raise unknown("command", name, COMMANDS)
    command = COMMANDS[name]
    kind, options = _import(command.config), _import(command.options)() if command.options else None
    if issubclass(kind, ComposedConfig):
        base = choose_defaults(name, command, kind, args)
        return command, *parse_flags(name, command.summary, command.example, base, options, args)
    values = parse_flags(name, command.summary, command.example, kind, options, args)
    return command, *values


def choose_defaults(name: str, command: Command, kind: Any, args: list[str]) -> Any:
    """Return the configuration that the flags override: of a recipe, a method, or the weights to start
    from."""
    given = dict(pairwise([arg.replace("--objective", "--method") for arg in args]))
    base = kind()
    if command.recipes and "--recipe" in given:
        recipe = _import(command.recipes)(given["--recipe"])
        base = kind(**{name: part for name, part in recipe.parts().items() if name in base.parts()})
        if "--blr" in args and "--lr" not in args:
            base = base.with_flags(lr=None)  # else the recipe's lr would override the flag
    method = "tokenizer" if name == "tokenizer" else given.get("--method")
    if method is not None and "method" in base.choices():
        base = base.with_flags(method=method)
    if "--init-from" in given and name == "pretrain":
        initial = _import("commands.start:read_initial_flags")(
            given["--init-from"], given.get("--out", ""), _get_values_after("--allow-partial", args), base
        )
        if "--recipe" in given:
            initial.pop("image_size", None)  # the weights are adapted to the recipe's size
        base = base.with_flags(**initial)
    return base


def _get_values_after(name: str, args: Sequence[str]) -> list[str]:
    """Return the arguments between a flag and the next flag."""
    following = list(args[args.index(name) + 1 :]) if name in args else []
    return list(takewhile(lambda arg: not arg.startswith("--"), following))


def normalize_args(argv: Sequence[str]) -> list[str]:
    """Split ``--flag=value`` into two arguments, and join the values of all ``--data`` into one flag.

    Raises:
        UserError: if another flag is given twice.
    """
    args = [part for arg in argv for part in (arg.split("=", 1) if arg.startswith("--") else [arg])]
    others: list[str] = []
    data: list[str] = []
    seen: set[str] = set()
    in_data = False
    for arg in args:
        if arg == "-h":
            in_data = False
        if arg.startswith("--"):
            in_data = arg == "--data"
            name = flag_name(arg[2:]).removeprefix("--no-").removeprefix("--")
            if name in seen and not in_data:
                raise UserError(f"--{name} is given twice. Give it once; only --data may be repeated.")
            seen.add(name)
            if in_data:
                continue
        (data if in_data else others).append(arg)
    return [*others, "--data", *data] if "data" in seen else others


def _import(spec: str) -> Any:
    """Import ``module:name`` below `quarterview`."""
    module, _, name = spec.partition(":")
    return getattr(import_module(f"quarterview.{module}"), name)


def _console() -> Any:
    return _import("training.console:Console")()


def _overview() -> str:
    lines = [
        "usage: quarterview COMMAND [FLAGS]",
        "",
        "Masked autoencoders (MAE) for your own images.",
        "Start with `quarterview demo`, then `quarterview pretrain --data FOLDER --out runs/mine`.",
    ]
    group = ""
    for name, command in COMMANDS.items():
        if command.group != group:
            group = command.group
            lines += ["", f"{group}:"]
        lines.append(f"  {name:<12} {command.summary}")
    return "\n".join(
        [
            *lines,
            "",
            "Run `quarterview COMMAND --help` for its flags, `quarterview --version` for the version.",
        ]
    )
