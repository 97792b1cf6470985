"""Conversion of configurations of version 0.1, which were flat and had the fields of all methods."""

from collections.abc import Mapping
from typing import Any, get_args

from quarterview.config import ComposedConfig, get_field_specs
from quarterview.methods.config import BEiTConfig, MethodConfig

_METHODS = {kind.name: kind for kind in get_args(MethodConfig)}
_FIXED_BY_BEIT = ("target", "encoder_mask_tokens", "decoder_depth", "decoder_width", "decoder_heads")


def upgrade_flags(flags: dict[str, Any]) -> dict[str, Any]:
    """Convert the flags of pre-training of version 0.1, where `method` was called `objective`.

    Flags of other methods are dropped if they have the default value. Others are kept and raise an error
    later.
    """
    if "objective" not in flags:
        return flags
    flags = dict(flags)
    method = flags.pop("objective")
    own = get_field_specs(_METHODS[method]) if method in _METHODS else {}
    for kind in _METHODS.values():
        for name, spec in get_field_specs(kind).items():
            if name in flags and name not in own and flags[name] in (None, _to_plain(spec.default)):
                del flags[name]
    for name in ("temperature", "momentum", "codebook_size"):  # None meant the method's default
        if name in own and flags.get(name, 0) is None:
            del flags[name]
    if method == BEiTConfig.name:
        for name in _FIXED_BY_BEIT:
            flags.pop(name, None)
    return {"method": method, **flags}


def upgrade_flag_changes(changes: Mapping[str, Any], base: ComposedConfig) -> dict[str, Any]:
    """Convert flags of version 0.1 that override a base configuration, such as those of an arm in a study
    file.

    In version 0.1 `objective` chose a method and kept all other flags. Now a method sets defaults of its own
    (``default_overrides``), so the returned flags set them back to those of the base.

    Args:
        changes: flags of version 0.1 or of this version.
        base: the base configuration.
    """
    flags = base.flags()
    upgraded = upgrade_flags(dict(changes))
    if "objective" not in changes or upgraded["method"] not in _METHODS:
        return upgraded
    method = _METHODS[upgraded["method"]]
    own = get_field_specs(method)
    same = [*method.default_overrides, *(name for name in ("mask", "mask_ratio") if name in own)]
    return {**{name: flags[name] for name in same if name in flags}, **upgraded}


def _to_plain(value: object) -> object:
    return list(value) if isinstance(value, tuple) else value
