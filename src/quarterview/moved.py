"""Import paths of version 0.1, which work in this version, with a warning."""

import sys
import warnings
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

MOVED = {
    "quarterview.exchange": "quarterview.weights",
    "quarterview.pretraining": "quarterview.commands.pretrain",
    "quarterview.draws": "quarterview.rng",
}
"""What was documented, and where it is now."""


class _Moved(MetaPathFinder, Loader):
    """Finds a module under its old name, and warns."""

    def find_spec(self, fullname: str, path: object = None, target: object = None) -> ModuleSpec | None:
        return ModuleSpec(fullname, self) if fullname in MOVED else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        new = MOVED[spec.name]
        warnings.warn(f"{spec.name} has moved. Import {new}.", DeprecationWarning, stacklevel=2)
        moved = ModuleType(spec.name, f"Moved to `{new}`.")
        moved.__getattr__ = lambda name: getattr(import_module(new), name)  # type: ignore[method-assign]
        return moved

    def exec_module(self, module: ModuleType) -> None:
        """Nothing is left to be done."""


def install() -> None:
    """Let the old names be found; once."""
    if not any(isinstance(finder, _Moved) for finder in sys.meta_path):
        sys.meta_path.append(_Moved())
