"""Quarterview: learn to see from a quarter of the picture.

Masked autoencoders (He et al. 2021) for anyone's images::

    import quarterview as qv
    run = qv.pretrain(qv.PretrainConfig(data=["photos"], out="runs/x"))
    model = qv.load("runs/x")
    tokens = model.encode(images)
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from quarterview.commands.pretrain import PretrainConfig, pretrain
    from quarterview.models.config import MAEConfig
    from quarterview.models.create import create_model
    from quarterview.training.run import Run
    from quarterview.weights import load

_HOMES = {
    "MAEConfig": "quarterview.models.config",
    "PretrainConfig": "quarterview.commands.pretrain",
    "Run": "quarterview.training.run",
    "create_model": "quarterview.models.create",
    "load": "quarterview.weights",
    "pretrain": "quarterview.commands.pretrain",
}

__all__ = ["MAEConfig", "PretrainConfig", "Run", "create_model", "load", "pretrain"]


def __getattr__(name: str) -> Any:  # so that importing the package costs nothing
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'quarterview' has no attribute {name!r}")
