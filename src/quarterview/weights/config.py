"""What can be told to starting from weights, to inspecting, exporting and publishing them."""

import math
from typing import Annotated, Literal

from quarterview.config import FIRST, PATH, POSITIONAL, Ge, Gt, Le, Lt, Size, Text, Texts, part
from quarterview.errors import UserError
from quarterview.models.config import Pool

Target = Literal["timm", "transformers", "onnx", "safetensors", "torch-export"]
"""What an export is for."""
TransformersPart = Literal["mae", "vit", "classifier"]
"""A folder of an export to transformers: masked autoencoder, encoder, or encoder with its head."""


@part
class InitConfig:
    """Initial weights."""

    init_from: Annotated[Text | None, FIRST, PATH] = None
    """Weights to start from: a run, a checkpoint, an official .pth file, a folder of transformers or timm,
    timm:NAME or hf:OWNER/NAME. Image size, patch size and channels may differ."""
    allow_partial: Texts = ()
    """Names of weights, such as decoder*, that `init_from` may lack, or that may be left out of it."""


@part
class InspectConfig:
    """Say what weights are, wherever they are from; or in what two of them differ."""

    path: Annotated[Text, POSITIONAL, PATH]
    """A run, a checkpoint folder, a .safetensors or .pth file, a folder of transformers or timm, timm:NAME
    or hf:OWNER/NAME."""
    other: Annotated[Text | None, POSITIONAL, PATH] = None
    """Others to compare them with."""


@part
class ExportConfig:
    """Write a model as others open it."""

    run: Annotated[Text, POSITIONAL, PATH]
    """A run, a checkpoint folder, a .safetensors file, or weights from elsewhere."""
    to: Annotated[Target, FIRST]
    """What it is for: timm, transformers, onnx, safetensors, or torch-export."""
    out: Annotated[Text, FIRST, PATH]
    """The folder to write: new, empty, or an older export, which is replaced."""
    ema: bool = False
    """Take the moving average of the weights."""
    licence: Text = ""
    """Of these weights, such as CC-BY-NC-4.0; by default what the run, or the weights it started from,
    recorded."""
    parts: tuple[TransformersPart, ...] = ()
    """Of transformers: which of mae, vit and classifier; by default mae and vit, or classifier and vit."""

    def __post_init__(self) -> None:
        if self.parts and self.to != "transformers":
            raise UserError(
                f"--parts {' '.join(self.parts)} does not go with --to {self.to}. Remove it, or use --to "
                "transformers."
            )


@part
class HubConfig:
    """Upload an export to the Hugging Face Hub."""

    folder: Annotated[Text, POSITIONAL, PATH]
    """What `quarterview export` wrote."""
    name: Annotated[Text, POSITIONAL]
    """The repository, OWNER/NAME; made if it is not there."""
    private: bool = False
    """Make it visible to its owner only."""


# ---------------------------------------------------------------------- fine-tuning

SCRATCH = "scratch"
"""What stands for random weights where a run is asked for."""


@part
class StartConfig:
    """Start."""

    run: Annotated[Text, FIRST, PATH, POSITIONAL] = ""
    """A run, checkpoint or .safetensors file of a masked autoencoder; scratch for random weights."""
    model: Text | None = None
    """The network to train from scratch, such as mae_vit_tiny_patch4."""
    labels: Annotated[int | None, Ge(2), FIRST] = None
    """Use only so many labelled training images, equally many a class; by default all."""


@part
class TuningConfig:
    """Classifier."""

    image_size: Annotated[Size | None, FIRST] = None
    """Height and width, or one number for both; by default those of pre-training."""
    blocks: Annotated[Texts, FIRST] = ("all",)
    """How many of the last blocks are trained: all, a number, 0.5 for the last block's MLP alone, or 0.
    Several give a run each, and the curve of figure 9."""
    pool: Pool = "mean"
    """What the head reads: the mean of the patch tokens under a new norm, or the cls token (of several the
    mean)."""
    in_chans: Annotated[int, Ge(1)] = 3
    """Channels of the images, from scratch; otherwise the run says."""
    cls_tokens: Annotated[int | None, Ge(1), Lt(1000)] = None
    """How many cls tokens there are, from scratch, 1 if nothing is said; otherwise the run says."""
    from_ema: bool = False
    """Start from the moving average of the run's weights."""
    crop_pct: Annotated[float | None, Gt(0), Le(1)] = None
    """Share of the sides of the largest central box that a test image is cut to. By default 0.875 for
    224 × 224 pixels, as the paper does, and 1 for other sizes."""

    def __post_init__(self) -> None:
        if self.image_size is not None and len(self.image_size) != 2:
            raise UserError(
                f"--image-size {' '.join(map(str, self.image_size))} is neither one side nor height and "
                "width."
            )
        if not self.blocks or len(set(self.blocks)) < len(self.blocks):
            raise UserError(
                f"--blocks {' '.join(self.blocks)} is not accepted. Give one or several different numbers."
            )
        for blocks in self.blocks:
            count_blocks(blocks)


def count_blocks(blocks: str) -> float:
    """A value of ``--blocks`` as a number; infinity for all. Raises UserError if it is none."""
    try:
        count = math.inf if blocks == "all" else float(blocks)
    except ValueError:
        count = -1.0
    if count < 0 or (count not in (0.5, math.inf) and count % 1):
        raise UserError(f"--blocks {blocks} is not accepted. Give all, 0, 0.5 or a whole number.")
    return count
