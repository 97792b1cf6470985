"""Import paths of version 0.1, which still work, with a DeprecationWarning."""

import sys
import warnings
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

MOVED_MODULES = {
    "quarterview.exchange": "quarterview.weights",
    "quarterview.pretraining": "quarterview.commands.pretrain",
    "quarterview.draws": "quarterview.rng",
}
"""Old names of documented modules, and their new names."""


class _MovedModuleFinder(MetaPathFinder, Loader):
    """Finds modules by their old names, with a warning."""

    def find_spec(self, fullname: str, path: object = None, target: object = None) -> ModuleSpec | None:
        return ModuleSpec(fullname, self) if fullname in MOVED_MODULES else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        new = MOVED_MODULES[spec.name]
        warnings.warn(f"{spec.name} has moved. Import {new}.", DeprecationWarning, stacklevel=2)
        moved = ModuleType(spec.name, f"Moved to `{new}`.")
        moved.__getattr__ = lambda name: getattr(import_module(new), name)  # type: ignore[method-assign]
        return moved

    def exec_module(self, module: ModuleType) -> None:
        """Do nothing: `create_module` returns the complete module."""


def install_moved_modules() -> None:
    """Add the finder of moved modules to ``sys.meta_path``, unless it is there."""
    if not any(isinstance(finder, _MovedModuleFinder) for finder in sys.meta_path):
        sys.meta_path.append(_MovedModuleFinder())
