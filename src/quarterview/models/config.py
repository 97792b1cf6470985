"""Configurations of the models: encoder, masked autoencoder, classifier and tokenizer.

This module does not import torch, so that commands can check their flags quickly.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from quarterview.config import FIRST, RESEARCH, Floats, Ge, Gt, Ints, Le, Lt, Size, Text, Texts, part
from quarterview.errors import UserError, invalid, not_supported, unknown

DecoderKind = Literal["standard", "cross"]
MaskKind = Literal["random", "block", "grid"]
Pool = Literal["mean", "cls"]
TargetKind = Literal["pixels", "pca", "hog", "tokens"]

HOG_CELL_SIZE, HOG_ORIENTATIONS = 8, 9
"""Cell size in pixels and number of bins of MaskFeat's HOG target."""
MODEL_SIZES: dict[str, tuple[int, int, int]] = {
    "tiny": (192, 12, 3),
    "small": (384, 12, 6),
    "base": (768, 12, 12),
    "large": (1024, 24, 16),
    "huge": (1280, 32, 16),
}
"""Width, depth and number of heads of the named encoders, from ViT-tiny to ViT-huge."""


@dataclass(frozen=True)
class ViTShape:
    """The size of a vision transformer, as given by the name of the model."""

    width: int
    depth: int
    num_heads: int
    patch_size: int


def parse_model_name(name: str) -> ViTShape:
    """Parse a model name ``mae_vit_{size}_patch{N}``.

    `size` is a name of `MODEL_SIZES`, or width, depth and heads: ``mae_vit_128x4x4_patch4`` has width 128, 4
    blocks and 4 heads. Depth is at most 999.

    Raises:
        UserError: if the name does not have this form, or the width does not fit the heads.
    """
    match = re.fullmatch(r"mae_vit_(\w+?)_patch([1-9]\d{0,8})", name)
    custom = re.fullmatch(r"([1-9]\d{0,5})x([1-9]\d{0,2})x([1-9]\d{0,5})", match[1]) if match else None
    if match is None or (custom is None and match[1] not in MODEL_SIZES):
        patch = match[2] if match else "16"
        raise unknown(
            "model", name, [f"mae_vit_{size}_patch{patch}" for size in (*MODEL_SIZES, "WIDTHxDEPTHxHEADS")]
        )
    width, depth, num_heads = (int(n) for n in custom.groups()) if custom else MODEL_SIZES[match[1]]
    check_width(f"the model {name!r}", width, num_heads)
    return ViTShape(width, depth, num_heads, patch_size=int(match[2]))


def check_width(name: str, width: int, num_heads: int) -> None:
    """Check that a width is a multiple of the number of heads, and of 4 for the position embeddings.

    Raises:
        UserError: if it is not.
    """
    if num_heads < 1 or width < 4 or width % num_heads or width % 4:
        raise UserError(
            f"The width of {name} is {width}, with {num_heads} heads. "
            "Give a width that is a multiple of 4 and of the number of heads."
        )


def compute_num_visible(num_patches: int, mask_ratio: float) -> int:
    """Return the number of visible patches, ``int(L * (1 - ratio))`` as in the official code.

    The floating-point rounding is part of the definition: of 64 patches at ratio 0.8, 12 are visible; of 10
    at ratio 0.9, none would be.

    Raises:
        ValueError: if no patch or every patch would be visible.
    """
    num_visible = int(num_patches * (1 - mask_ratio))
    if not 0 < num_visible < num_patches:
        raise ValueError(
            f"A mask ratio of {mask_ratio} leaves {num_visible} of {num_patches} patches visible. "
            f"Give a ratio with int({num_patches} * (1 - ratio)) from 1 to {num_patches - 1}."
        )
    return num_visible


def compute_hog_cell_size(patch_size: int) -> int:
    """Choose the side of a HOG cell in pixels: the divisor of the patch size that is nearest to 8 in ratio.

    It is 8 for patches of 8, 16 and 32 pixels, 7 for patches of 14 pixels, and the patch size for smaller
    patches. A cell of 1 pixel has no information about its surroundings, so only patches of 1 pixel have it.
    """
    sides = [side for side in range(2, min(patch_size, HOG_CELL_SIZE**2) + 1) if patch_size % side == 0]
    return min(sides or [patch_size], key=lambda side: abs(math.log(side / HOG_CELL_SIZE)))


def compute_hog_dim(patch_size: int, in_chans: int) -> int:
    """Return the number of values in the HOG target of one patch."""
    return (patch_size // compute_hog_cell_size(patch_size)) ** 2 * in_chans * HOG_ORIENTATIONS


# ---------------------------------------------------------------------- configurations


@part
class ViTConfig:
    """Encoder."""

    model: Annotated[Text, FIRST] = "mae_vit_base_patch16"
    """Name: mae_vit_{tiny,small,base,large,huge}_patch{N}, or mae_vit_{WIDTH}x{DEPTH}x{HEADS}_patch{N}."""
    image_size: Annotated[Size, FIRST] = (224, 224)
    """Height and width in pixels; one number means a square. Both must be multiples of the patch size."""
    in_chans: Annotated[int, Ge(1)] = 3
    """Number of image channels."""
    mean: Floats | None = None
    """Channel means of pixels in [0, 1], for normalisation. Default: measured on the training images."""
    std: Floats | None = None
    """Channel standard deviations of pixels in [0, 1], for normalisation. Default: measured."""
    cls_tokens: Annotated[int, Ge(1), Lt(1000), RESEARCH] = 1
    """Number of cls tokens; the feature `cls` is their mean (Pixio: 4 to 8)."""

    def __post_init__(self) -> None:
        patch = self.shape.patch_size
        if len(self.image_size) != 2 or any(side % patch for side in self.image_size):
            raise UserError(
                f"--image-size is {' '.join(map(str, self.image_size))}, and the patch size is {patch}. "
                f"Give one side, or height and width, each a multiple of {patch}."
            )
        for name in ("mean", "std"):
            values = getattr(self, name)
            if values is not None and len(values) != self.in_chans:
                raise UserError(
                    f"--{name} has {len(values)} numbers, and images have {self.in_chans} channels. "
                    "Give one number per channel."
                )
        if self.std is not None and not all(value > 0 for value in self.std):
            raise invalid("--std", " ".join(map(str, self.std)), "numbers above 0")

    @property
    def shape(self) -> ViTShape:
        """Width, depth, number of heads and patch size of the encoder."""
        return parse_model_name(self.model)

    @property
    def grid(self) -> tuple[int, int]:
        """The numbers of rows and columns of patches."""
        height, width = self.image_size
        return height // self.shape.patch_size, width // self.shape.patch_size

    @property
    def num_patches(self) -> int:
        """The number of patches per image, L."""
        return self.grid[0] * self.grid[1]


@part
class AutoencoderConfig:
    """Mask, target and decoder of a masked autoencoder. The defaults are the paper's."""

    RENAMED: ClassVar[Mapping[str, str]] = {
        "vocabulary": "codebook_size",
        "predict_share": "predict_ratio",
    }

    mask_ratio: Annotated[float, Gt(0), Lt(1), FIRST] = 0.75
    """Fraction of the patches to mask."""
    mask: MaskKind = "random"
    """Mask sampling: random, block (BEiT's rectangles) or grid (a regular lattice)."""
    mask_unit: Annotated[int, Ge(1), RESEARCH] = 1
    """For random masks: the side, in patches, of squares that are masked as a whole (Pixio: 2 to 4)."""
    target: TargetKind = "pixels"
    """Reconstruction target of a patch: its pixels, its largest principal components (pca), its histograms of
    oriented gradients (hog; MaskFeat), or its visual tokens from a tokenizer, by cross-entropy (table 1d)."""
    norm_pix_loss: bool = True
    """For --target pixels: normalise the pixels by each patch's own mean and standard deviation."""
    pca_components: Annotated[int, Ge(1), RESEARCH] = 96
    """For --target pca: number of principal components to predict; all where a patch has fewer."""
    codebook_size: Annotated[int | None, Ge(2), RESEARCH] = None
    """For --target tokens: number of visual tokens. Default: the tokenizer's."""
    decoder: DecoderKind = "standard"
    """standard: the paper's decoder with self-attention among all tokens. cross: masked patches attend to
    the visible patches only, after every encoder block (CrossMAE, Fu et al. 2024), which costs less."""
    predict_ratio: Annotated[float, Gt(0), Le(1), RESEARCH] = 1.0
    """Fraction of the masked patches, chosen at random, that a cross decoder predicts in training. Validation
    and images predict all. The learning rate is not changed; CrossMAE multiplies its own by this fraction."""
    decoder_width: int = 512
    """Width of the decoder."""
    decoder_depth: Annotated[int, Ge(0), Lt(1000)] = 8
    """Number of decoder blocks; 0 is a linear layer."""
    decoder_heads: int = 16
    """Number of attention heads of the decoder."""
    encoder_mask_tokens: Annotated[bool, RESEARCH] = False
    """Feed mask tokens to the encoder in place of masked patches (table 1c: slower and worse)."""
    fused_blocks: Annotated[Ints, RESEARCH] = ()
    """Earlier encoder blocks that the decoder reads together with the last one: their projected outputs and
    the last output enter a learned weighted sum (MFF, Liu et al. 2023: 1 3 5 7 9 of 12). Features are still
    those of the last block."""
    predict_all: Annotated[bool, RESEARCH] = False
    """Compute the loss on all patches, visible ones too (footnote 1: costs half a point of accuracy)."""


@part
class MAEConfig(AutoencoderConfig, ViTConfig):
    """A masked autoencoder: encoder, mask, target and decoder. The defaults are the paper's."""

    def __post_init__(self) -> None:
        ViTConfig.__post_init__(self)
        patch = self.shape.patch_size
        check_width("the decoder", self.decoder_width, self.decoder_heads)
        if self.target == "pixels" and self.norm_pix_loss and patch == self.in_chans == 1:
            raise UserError("A patch of one value cannot be normalised. Give --no-norm-pix-loss.")
        if any(side % self.mask_unit for side in self.grid):
            raise UserError(
                f"--mask-unit is {self.mask_unit}, and the grid of patches is {self.grid[0]} × "
                f"{self.grid[1]}. Give a divisor of both sides."
            )
        if self.mask_unit > 1 and self.mask != "random":
            raise not_supported(
                f"--mask-unit {self.mask_unit}", f"--mask {self.mask}", "Remove it, or use --mask random."
            )
        self._check_decoder()
        self._check_fusion()
        try:
            compute_num_visible(self.num_patches, self.mask_ratio)
        except ValueError as error:
            raise UserError(str(error)) from None

    @property
    def normalizes_patches(self) -> bool:
        """Whether pixels are predicted without the mean and standard deviation of their patch."""
        return self.target == "pixels" and self.norm_pix_loss

    @property
    def can_reconstruct(self) -> bool:
        """Whether predictions can be shown as images."""
        return self.target in ("pixels", "pca")

    @property
    def target_dim(self) -> int:
        """The number of values that are predicted per patch; for visual tokens, the size of the codebook.

        Raises:
            UserError: if the target is visual tokens and the size of the codebook is not set.
        """
        patch_dim = self.shape.patch_size**2 * self.in_chans
        if self.target == "pca":
            return min(self.pca_components, patch_dim)
        if self.target == "pixels":
            return patch_dim
        if self.target == "hog":
            return compute_hog_dim(self.shape.patch_size, self.in_chans)
        if self.codebook_size is None:
            raise UserError(
                "The codebook size of --target tokens is unknown. Give --tokenizer RUN, or --codebook-size N."
            )
        return self.codebook_size

    @property
    def target_description(self) -> str:
        """A phrase that names the target, for messages and model cards."""
        if self.target == "pca":
            return f"{self.target_dim} principal components of patches"
        if self.target == "hog":
            cell = compute_hog_cell_size(self.shape.patch_size)
            return f"oriented gradients (HOG) in cells of {cell} × {cell} pixels"
        if self.target == "tokens":
            return f"visual tokens from a codebook of {self.codebook_size}"
        return "pixels normalised by patch" if self.norm_pix_loss else "pixels"

    def _check_decoder(self) -> None:
        if self.decoder == "standard":
            if self.predict_ratio < 1:
                # Masked patches attend to one another there: leaving some out would change the others.
                raise not_supported(
                    f"--predict-ratio {self.predict_ratio}",
                    "--decoder standard",
                    "Remove it, or use --decoder cross.",
                )
            return
        if self.decoder_depth == 0:  # would not see the image
            raise not_supported("--decoder-depth 0", "--decoder cross", "Give a depth of at least 1.")
        if self.encoder_mask_tokens:
            raise not_supported("--encoder-mask-tokens", "--decoder cross", "Remove one of them.")
        if self.predict_all:  # its queries attend to the visible patches
            raise not_supported(
                "--predict-all", "--decoder cross", "Give --no-predict-all, or --decoder standard."
            )

    def _check_fusion(self) -> None:
        blocks, depth = self.fused_blocks, self.shape.depth
        if not blocks:
            return
        flag = f"--fused-blocks {' '.join(map(str, blocks))}"
        if depth == 1:
            raise not_supported(flag, "an encoder of 1 block", "Remove it.")
        if list(blocks) != sorted({block for block in blocks if 0 < block < depth}):
            raise UserError(
                f"{flag} does not fit an encoder of {depth} blocks. Give different numbers from 1 to "
                f"{depth - 1}, ascending. The last block is always included."
            )
        if self.decoder == "cross":  # reads all blocks already
            raise not_supported("--fused-blocks", "--decoder cross", "Remove one of them.")


@part
class ClassifierConfig(ViTConfig):
    """A classifier: an encoder and a linear head."""

    classes: Annotated[int, Ge(2)] = 1000
    """Number of classes."""
    pool: Pool = "mean"
    """Input of the head: the mean of the patch tokens, or the cls token (the mean of several)."""
    class_names: Texts | None = None
    """Names of the classes, in the order of the head's outputs."""


@part
class TokenizerConfig:
    """A tokenizer: a discrete VAE that maps each patch to a visual token."""

    RENAMED: ClassVar[Mapping[str, str]] = {"vocabulary": "codebook_size"}

    patch_size: Annotated[int, Ge(1)]
    """Side in pixels of the patch that one token stands for."""
    in_chans: Annotated[int, Ge(1)]
    """Number of image channels."""
    codebook_size: Annotated[int, Ge(2)]
    """Number of visual tokens."""
    width: Annotated[int, Ge(1)]
    """Number of channels of the layers."""
    depth: Annotated[int, Ge(0)]
    """Number of residual blocks in the encoder, and in the decoder."""
    mean: Floats
    """Channel means of pixels in [0, 1], for normalisation."""
    std: Floats
    """Channel standard deviations of pixels in [0, 1], for normalisation."""

    def __post_init__(self) -> None:
        if not len(self.mean) == len(self.std) == self.in_chans or not all(s > 0 for s in self.std):
            raise UserError(
                f"The tokenizer has mean {self.mean} and std {self.std}. "
                f"Give {self.in_chans} numbers each, std above 0."
            )
