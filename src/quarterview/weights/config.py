"""Configuration for loading, inspecting, exporting and publishing weights, and for fine-tuning."""

import math
from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

from quarterview.config import FIRST, PATH, POSITIONAL, Ge, Gt, Le, Lt, Size, Text, Texts, part
from quarterview.errors import invalid, not_supported
from quarterview.models.config import Pool

ExportFormat = Literal["timm", "transformers", "onnx", "safetensors", "torch-export"]
"""The formats that weights can be exported to."""
TransformersPart = Literal["mae", "vit", "classifier"]
"""The sub-folders of an export to transformers: masked autoencoder, encoder, or encoder with its head."""


@part
class InitConfig:
    """Initial weights."""

    init_from: Annotated[Text | None, FIRST, PATH] = None
    """Weights to start from: a run, a checkpoint, an official .pth file, a folder of transformers or timm,
    timm:NAME or hf:OWNER/NAME. Image size, patch size and channels may differ."""
    allow_partial: Texts = ()
    """Patterns of tensor names, such as decoder*, that may be missing from --init-from, or ignored in it."""


@part
class InspectConfig:
    """Describe weights of any supported source, or compare two of them."""

    path: Annotated[Text, POSITIONAL, PATH]
    """A run, a checkpoint folder, a .safetensors or .pth file, a folder of transformers or timm, timm:NAME
    or hf:OWNER/NAME."""
    other: Annotated[Text | None, POSITIONAL, PATH] = None
    """Other weights to compare with."""


@part
class ExportConfig:
    """Export a model to the format of another library."""

    RENAMED: ClassVar[Mapping[str, str]] = {"licence": "license"}

    run: Annotated[Text, POSITIONAL, PATH]
    """A run, a checkpoint folder, a .safetensors file, or weights of another library."""
    to: Annotated[ExportFormat, FIRST]
    """Format: timm, transformers, onnx, safetensors, or torch-export."""
    out: Annotated[Text, FIRST, PATH]
    """Output folder: new, empty, or an earlier export, which is replaced."""
    ema: bool = False
    """Export the moving average of the weights (EMA)."""
    license: Text = ""
    """License of the weights, such as CC-BY-NC-4.0; by default the one recorded by the run, or by the weights
    that the run started from."""
    parts: tuple[TransformersPart, ...] = ()
    """Sub-folders of an export to transformers: mae, vit, classifier. By default mae and vit, or classifier
    and vit."""

    def __post_init__(self) -> None:
        if self.parts and self.to != "transformers":
            raise not_supported(
                f"--parts {' '.join(self.parts)}", f"--to {self.to}", "Remove it, or use --to transformers."
            )


@part
class HubConfig:
    """Upload an export to the Hugging Face Hub."""

    folder: Annotated[Text, POSITIONAL, PATH]
    """A folder that `quarterview export` wrote."""
    name: Annotated[Text, POSITIONAL]
    """The repository, OWNER/NAME; created if it does not exist."""
    private: bool = False
    """Create the repository as private. An existing repository is not changed."""


# ---------------------------------------------------------------------- fine-tuning

SCRATCH = "scratch"
"""The value of --run that means random initial weights."""


@part
class StartConfig:
    """Starting point."""

    run: Annotated[Text, FIRST, PATH, POSITIONAL] = ""
    """A run, checkpoint or .safetensors file of a masked autoencoder; scratch for random weights."""
    model: Text | None = None
    """The model to train from scratch, such as mae_vit_tiny_patch4."""
    labels: Annotated[int | None, Ge(2), FIRST] = None
    """Number of labelled training images to use, the same number per class; by default all."""


@part
class TuningConfig:
    """Classifier."""

    image_size: Annotated[Size | None, FIRST] = None
    """Height and width, or one number for both; by default those of pre-training."""
    blocks: Annotated[Texts, FIRST] = ("all",)
    """Number of last blocks to train: all, a number, 0.5 for the MLP of the last block only, or 0. Several
    values start one run each and draw the curve of figure 9 of the paper."""
    pool: Pool = "mean"
    """Input of the head: mean (of the patch tokens, under a new norm) or cls (the cls token; the mean if
    there are several)."""
    in_chans: Annotated[int, Ge(1)] = 3
    """Number of image channels, with scratch only; otherwise that of the run."""
    cls_tokens: Annotated[int | None, Ge(1), Lt(1000)] = None
    """Number of cls tokens, with scratch only, 1 by default; otherwise that of the run."""
    from_ema: bool = False
    """Start from the moving average of the run's weights (EMA)."""
    crop_pct: Annotated[float | None, Gt(0), Le(1)] = None
    """Center-crop fraction for test images, as in timm: the side of the crop divided by the side of the
    largest centered box of the model's aspect ratio. By default 0.875 for 224 × 224 pixels, as in the paper,
    else 1."""

    def __post_init__(self) -> None:
        if self.image_size is not None and len(self.image_size) != 2:
            raise invalid(
                "--image-size", " ".join(map(str, self.image_size)), "one number, or height and width"
            )
        if not self.blocks or len(set(self.blocks)) < len(self.blocks):
            raise invalid("--blocks", " ".join(self.blocks) or "empty", "one or several different values")
        for blocks in self.blocks:
            parse_num_blocks(blocks)


def parse_num_blocks(blocks: str) -> float:
    """Return a value of ``--blocks`` as a number of blocks; infinity for ``all``.

    Raises:
        UserError: if the value is none of all, 0.5 and the whole numbers.
    """
    try:
        num_blocks = math.inf if blocks == "all" else float(blocks)
    except ValueError:
        num_blocks = -1.0
    if num_blocks < 0 or (num_blocks not in (0.5, math.inf) and num_blocks % 1):
        raise invalid("--blocks", blocks, "all, 0.5 or a whole number")
    return num_blocks
