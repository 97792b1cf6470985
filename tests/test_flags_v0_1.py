"""Tests that every flag of version 0.1 works or is in the changelog."""

import json
from pathlib import Path

import pytest

from quarterview.cli import _import
from quarterview.command_table import COMMANDS
from quarterview.config import ComposedConfig, flag_name, get_field_specs, get_renamed_fields

ROOT = Path(__file__).parent.parent
OLD = json.loads((ROOT / "tests" / "fixtures" / "v0_1" / "flags.json").read_text("utf-8"))


def flags_of(name: str) -> set[str]:
    """Return the flags of a command for all methods, with their old names."""
    command = COMMANDS[name]
    kind = _import(command.config)
    parts = [kind]
    names: set[str] = set()
    if issubclass(kind, ComposedConfig):
        parts = [type(part) for part in kind().parts().values()]
        for choice, kinds in kind.choices().items():
            names.add(choice)
            parts += kinds.values()
        names |= set(kind.get_renamed_flags())
    else:
        names |= set(get_renamed_fields(kind))
    if command.options:
        parts.append(_import(command.options))
    for part in parts:
        names |= set(get_field_specs(part))
    return {flag_name(each) for each in names} | {flag_name(f"no_{each}") for each in names} | {"--help"}


@pytest.mark.parametrize("name", [name for name in OLD if name])
def test_every_flag_of_0_1_works_or_is_in_the_changelog(name):
    changelog = (ROOT / "CHANGELOG.md").read_text("utf-8")
    lost = {each for each in OLD[name]["flags"] if each.startswith("--")} - flags_of(name)
    assert not [each for each in lost if f"`{name} {each}`" not in changelog]


@pytest.mark.parametrize("name", COMMANDS)
def test_flag_names_are_unique_within_a_command(name):
    kind = _import(COMMANDS[name].config)
    options = [_import(COMMANDS[name].options)] if COMMANDS[name].options else []
    if not issubclass(kind, ComposedConfig):
        return
    choices = kind.choices()
    for choice, kinds in choices.items() or [("", {"": None})]:
        for chosen in kinds.values():
            parts = {key: type(its) for key, its in kind().parts().items()}
            if choice:
                parts[choice] = chosen
            names = [each for part in [*parts.values(), *options] for each in get_field_specs(part)] + list(
                choices
            )
            assert len(names) == len(set(names)), (name, choice)
