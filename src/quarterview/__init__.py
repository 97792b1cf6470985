"""Quarterview: masked autoencoders (He et al. 2021) for your own images.

Example::

    import quarterview as qv
    run = qv.pretrain(data="photos", out="runs/x", epochs=100)
    model = qv.load("runs/x")
    tokens = model.encode(images)

The keyword arguments of `pretrain` and `finetune` are the flags of the command line.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from quarterview.moved import install_moved_modules

if TYPE_CHECKING:
    from quarterview.commands.config import FinetuneConfig, PretrainConfig
    from quarterview.commands.finetune import FinetuneResult, finetune
    from quarterview.commands.pretrain import pretrain
    from quarterview.models.config import MAEConfig
    from quarterview.models.create import create_model
    from quarterview.training.run import Run
    from quarterview.weights.loading import load

_MODULES = {
    "FinetuneConfig": "commands.config",
    "FinetuneResult": "commands.finetune",
    "MAEConfig": "models.config",
    "PretrainConfig": "commands.config",
    "Run": "training.run",
    "create_model": "models.create",
    "finetune": "commands.finetune",
    "load": "weights.loading",
    "pretrain": "commands.pretrain",
}

__all__ = [
    "FinetuneConfig",
    "FinetuneResult",
    "MAEConfig",
    "PretrainConfig",
    "Run",
    "create_model",
    "finetune",
    "load",
    "pretrain",
]

install_moved_modules()  # the import paths of version 0.1


def __getattr__(name: str) -> Any:  # lazy, so that importing the package is fast
    if name in _MODULES:
        return getattr(import_module(f"quarterview.{_MODULES[name]}"), name)
    raise AttributeError(f"module 'quarterview' has no attribute {name!r}")
