"""Does an export compute what our model computes? Each is opened again in its target, and compared."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor

from quarterview import rng
from quarterview.errors import RunError
from quarterview.models.classifier import Classifier
from quarterview.models.config import ViTConfig
from quarterview.models.mae import MaskedAutoencoder

Model = MaskedAutoencoder | Classifier

LIMIT = 1e-4
"""The largest `difference` from our forward, in float32, with which an export is let out."""
BATCHES = (1, 3)
"""How many images an export is tried on; several counts, because a batch must not be fixed."""


@dataclass(frozen=True)
class Exported:
    """What an export wrote, and how near it is to our forward."""

    path: Path
    """The folder or the file."""
    differences: Mapping[str, float]
    """Of each output, see `difference`, on random images in float32."""
    versions: Mapping[str, str]
    """Of the packages that it was compared in."""

    @property
    def largest(self) -> float:
        """The largest of the differences."""
        return max(self.differences.values())


def versions(*packages: str) -> dict[str, str]:
    """The installed versions of torch and of these packages."""
    return {name: version(name) for name in ("torch", *packages)}


def reference(model: Model) -> Model:
    """A copy of a model to compare with: in float32, on the CPU, in evaluation mode."""
    with torch.device("meta"):  # draws nothing and takes no memory
        copy = (
            MaskedAutoencoder(model.config)
            if isinstance(model, MaskedAutoencoder)
            else Classifier(model.config)
        )
    weights = {name: value.detach().cpu().float() for name, value in model.state_dict().items()}
    copy.load_state_dict(weights, assign=True)
    return copy.eval()


def random_images(config: ViTConfig, count: int) -> Tensor:
    """Standard normal images that are the same every time: float32 [count, C, H, W]."""
    with rng.seeded(0, "verify an export", count):
        return torch.randn(count, config.in_chans, *config.image_size)


@torch.no_grad()
def outputs(model: Model, images: Tensor) -> dict[str, Tensor]:
    """What exports return, by our forward.

    Returns:
        `tokens`, float [B, K + L, D]; of a masked autoencoder their mean without cls too, `pooled`,
        float [B, D]; of a classifier `logits`, float [B, classes].
    """
    tokens = model.encode(images)
    if isinstance(model, Classifier):
        return {"tokens": tokens, "logits": model(images)}
    return {"tokens": tokens, "pooled": tokens[:, model.config.cls_tokens :].mean(dim=1)}


def difference(ours: Tensor, theirs: Tensor) -> float:
    """The largest absolute difference as a share of our largest number.

    A share, because the scale of logits and of tokens without a norm is whatever training made of it.
    Infinite where the shapes differ or a number is not finite.
    """
    if ours.shape != theirs.shape:
        return math.inf
    largest = float((ours.double() - theirs.double()).abs().max())
    share = largest / (float(ours.double().abs().max()) or 1.0)
    return share if math.isfinite(share) else math.inf


@torch.no_grad()
def compare(model: Model, theirs: Callable[[Tensor], Mapping[str, Tensor]]) -> dict[str, float]:
    """The largest difference of each output from our forward, over batches of several sizes.

    Args:
        theirs: float [B, C, H, W] -> some of what `outputs` returns, as the target computes it.
    """
    ours, found = reference(model), dict[str, float]()
    for count in BATCHES:
        images = random_images(model.config, count)
        expected = outputs(ours, images)
        for name, value in theirs(images).items():
            found[name] = max(found.get(name, 0.0), difference(expected[name], value))
    return found


def accept(target: str, differences: Mapping[str, float]) -> None:
    """Let an export out.

    Raises:
        RunError: if an output differs by more than `LIMIT` from our forward.
    """
    wrong = {name: value for name, value in differences.items() if not value <= LIMIT}
    if wrong:
        seen = ", ".join(f"{name} by {value:.1e}" for name, value in wrong.items())
        raise RunError(
            f"the export to {target}, opened again, differs from this model's own forward: {seen} of the "
            f"largest number; at most {LIMIT:.0e} is let out, so nothing was written. Another version of "
            f"{target} may be the cause"
        )
