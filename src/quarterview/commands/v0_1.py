"""Configurations of version 0.1, which were flat and held the fields of all methods, by today's flags."""

from collections.abc import Mapping
from typing import Any, get_args

from quarterview.config import Composed, field_specs
from quarterview.methods.config import BEiT, MethodConfig

_METHODS = {kind.name: kind for kind in get_args(MethodConfig)}
_FIXED_BY_BEIT = ("target", "encoder_mask_tokens", "decoder_depth", "decoder_width", "decoder_heads")


def upgrade_pretraining(flags: dict[str, Any]) -> dict[str, Any]:
    """The flags of a pre-training of version 0.1, which called its method `objective`.

    What belongs to another method and was left at its default, is left out; anything else stays and is
    refused where it makes no sense.
    """
    if "objective" not in flags:
        return flags
    flags = dict(flags)
    method = flags.pop("objective")
    own = field_specs(_METHODS[method]) if method in _METHODS else {}
    for kind in _METHODS.values():
        for name, spec in field_specs(kind).items():
            if name in flags and name not in own and flags[name] in (None, _plain(spec.default)):
                del flags[name]
    for name in ("temperature", "momentum", "vocabulary"):  # None meant the method's own default
        if name in own and flags.get(name, 0) is None:
            del flags[name]
    if method == BEiT.name:
        for name in _FIXED_BY_BEIT:
            flags.pop(name, None)
    return {"method": method, **flags}


def upgrade_changes(changes: Mapping[str, Any], base: Composed) -> dict[str, Any]:
    """In what a pre-training differs from another one, by today's flags.

    In version 0.1 `objective` chose a method and left all other flags as they were; today a method brings its
    own defaults along, which are undone here.

    Args:
        changes: flags, by their names of version 0.1 or of today.
        base: the other pre-training.
    """
    flags = base.flags()
    upgraded = upgrade_pretraining(dict(changes))
    if "objective" not in changes or upgraded["method"] not in _METHODS:
        return upgraded
    method = _METHODS[upgraded["method"]]
    own = field_specs(method)
    same = [*method.other_defaults, *(name for name in ("mask", "mask_ratio") if name in own)]
    return {**{name: flags[name] for name in same if name in flags}, **upgraded}


def _plain(value: object) -> object:
    return list(value) if isinstance(value, tuple) else value
