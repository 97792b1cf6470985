"""Every flag of version 0.1 works, or the changelog says how to do without it."""

import json
from pathlib import Path

import pytest

from quarterview.cli import _find
from quarterview.command_table import COMMANDS
from quarterview.config import Composed, field_specs, flag

ROOT = Path(__file__).parent.parent
OLD = json.loads((ROOT / "tests" / "fixtures" / "v0_1" / "flags.json").read_text("utf-8"))


def flags_of(name: str) -> set[str]:
    """The flags of a command, whatever its method, under their old names too."""
    command = COMMANDS[name]
    kind = _find(command.config)
    parts = [kind]
    names: set[str] = set()
    if issubclass(kind, Composed):
        parts = [type(part) for part in kind().parts().values()]
        for choice, kinds in kind.choices().items():
            names.add(choice)
            parts += kinds.values()
        names |= set(kind.RENAMED)
    if command.options:
        parts.append(_find(command.options))
    for part in parts:
        names |= set(field_specs(part))
    return {flag(each) for each in names} | {flag(f"no_{each}") for each in names} | {"--help"}


@pytest.mark.parametrize("name", [name for name in OLD if name])
def test_every_old_flag_works_or_the_changelog_says_how(name):
    changelog = (ROOT / "CHANGELOG.md").read_text("utf-8")
    lost = {each for each in OLD[name]["flags"] if each.startswith("--")} - flags_of(name)
    assert not [each for each in lost if f"`{name} {each}`" not in changelog]


@pytest.mark.parametrize("name", COMMANDS)
def test_flag_names_are_unique_within_a_command(name):
    kind = _find(COMMANDS[name].config)
    options = [_find(COMMANDS[name].options)] if COMMANDS[name].options else []
    if not issubclass(kind, Composed):
        return
    choices = kind.choices()
    for choice, kinds in choices.items() or [("", {"": None})]:
        for chosen in kinds.values():
            parts = {key: type(its) for key, its in kind().parts().items()}
            if choice:
                parts[choice] = chosen
            names = [each for part in [*parts.values(), *options] for each in field_specs(part)] + list(
                choices
            )
            assert len(names) == len(set(names)), (name, choice)
