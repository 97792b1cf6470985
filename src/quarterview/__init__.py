"""Quarterview: learn to see from a quarter of the picture.

Masked autoencoders (He et al. 2021) for anyone's images::

    import quarterview as qv
    run = qv.pretrain(data="photos", out="runs/x", epochs=100)
    model = qv.load("runs/x")
    tokens = model.encode(images)

The keywords of `pretrain` and `finetune` are the flags of the command line.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from quarterview.moved import install

if TYPE_CHECKING:
    from quarterview.commands.config import FinetuneConfig, PretrainConfig
    from quarterview.commands.finetune import Finetuned, finetune
    from quarterview.commands.pretrain import pretrain
    from quarterview.models.config import MAEConfig
    from quarterview.models.create import create_model
    from quarterview.training.run import Run
    from quarterview.weights.loading import load

_HOMES = {
    "FinetuneConfig": "commands.config",
    "Finetuned": "commands.finetune",
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
    "Finetuned",
    "MAEConfig",
    "PretrainConfig",
    "Run",
    "create_model",
    "finetune",
    "load",
    "pretrain",
]

install()  # the import paths of version 0.1


def __getattr__(name: str) -> Any:  # so that importing the package costs nothing
    if name in _HOMES:
        return getattr(import_module(f"quarterview.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'quarterview' has no attribute {name!r}")
