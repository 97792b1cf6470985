"""What a model is, as numbers: an encoder, the masked autoencoder around it, a classifier, a tokenizer.

Nothing here imports torch.
"""

import math
import re
from dataclasses import dataclass
from typing import Annotated, Literal

from quarterview.config import FIRST, RESEARCH, Floats, Ge, Gt, Ints, Le, Lt, Size, Text, Texts, part
from quarterview.errors import UserError, unknown

DecoderKind = Literal["standard", "cross"]
MaskKind = Literal["random", "block", "grid"]
Pool = Literal["mean", "cls"]
TargetKind = Literal["pixels", "pca", "hog", "tokens"]

HOG_CELL, HOG_ORIENTATIONS = 8, 9
"""Pixels and bins of a histogram of oriented gradients, as MaskFeat has them."""
SIZES: dict[str, tuple[int, int, int]] = {
    "tiny": (192, 12, 3),
    "small": (384, 12, 6),
    "base": (768, 12, 12),
    "large": (1024, 24, 16),
    "huge": (1280, 32, 16),
}
"""Width, depth and heads of the encoders that have a name."""


@dataclass(frozen=True)
class ViTShape:
    """The numbers behind a model name."""

    width: int
    depth: int
    heads: int
    patch_size: int


def parse_model_name(name: str) -> ViTShape:
    """Read ``mae_vit_{size}_patch{N}``.

    `size` is a name of `SIZES`, or the numbers themselves: ``mae_vit_128x4x4_patch4`` is 128 wide
    with 4 blocks of 4 heads. There may be 999 blocks.

    Raises:
        UserError: if the name is none of these.
    """
    match = re.fullmatch(r"mae_vit_(\w+?)_patch([1-9]\d{0,8})", name)
    custom = re.fullmatch(r"([1-9]\d{0,5})x([1-9]\d{0,2})x([1-9]\d{0,5})", match[1]) if match else None
    if match is None or (custom is None and match[1] not in SIZES):
        patch = match[2] if match else "16"
        raise unknown(
            "model", name, [f"mae_vit_{size}_patch{patch}" for size in (*SIZES, "WIDTHxDEPTHxHEADS")]
        )
    width, depth, heads = (int(n) for n in custom.groups()) if custom else SIZES[match[1]]
    check_width(f"model {name!r}", width, heads)
    return ViTShape(width, depth, heads, patch_size=int(match[2]))


def check_width(what: str, width: int, heads: int) -> None:
    """Raises UserError unless `heads` divide `width`, and 4 does, as the positions need."""
    if heads < 1 or width < 4 or width % heads or width % 4:
        raise UserError(
            f"{what}: {width} wide with {heads} heads; accepted: widths that divide by 4 and by the heads"
        )


def keep_count(patches: int, mask_ratio: float) -> int:
    """How many patches stay visible: the official expression ``int(L * (1 - ratio))``.

    Floating point is part of it: 64 patches at ratio 0.8 keep 12, and 10 at 0.9 would keep 0.

    Raises:
        ValueError: if none or all of the patches would be kept.
    """
    kept = int(patches * (1 - mask_ratio))
    if not 0 < kept < patches:
        raise ValueError(
            f"a mask ratio of {mask_ratio} keeps {kept} of {patches} patches; accepted: ratios that keep "
            f"at least one and hide at least one (int({patches} * (1 - ratio)) from 1 to {patches - 1})"
        )
    return kept


def cell_side(patch_size: int) -> int:
    """The side of a cell: of the divisors of the patch's side the one nearest to 8 by ratio.

    That is 8 for patches of 8, 16 and 32 pixels, 7 for those of 14, and the whole of a smaller patch.
    A cell of one pixel, which tells no more than that pixel, is for patches of one pixel alone.
    """
    sides = [side for side in range(2, min(patch_size, HOG_CELL**2) + 1) if patch_size % side == 0]
    return min(sides or [patch_size], key=lambda side: abs(math.log(side / HOG_CELL)))


def hog_numbers(patch_size: int, channels: int) -> int:
    """How many numbers the histograms of one patch have."""
    return (patch_size // cell_side(patch_size)) ** 2 * channels * HOG_ORIENTATIONS


# ---------------------------------------------------------------------- configurations


@part
class ViTConfig:
    """Encoder."""

    model: Annotated[Text, FIRST] = "mae_vit_base_patch16"
    """mae_vit_{tiny,small,base,large,huge}_patch{N}, or mae_vit_{WIDTH}x{DEPTH}x{HEADS}_patch{N}."""
    image_size: Annotated[Size, FIRST] = (224, 224)
    """Height and width in pixels; one number means a square. Each must divide by the patch size."""
    in_chans: Annotated[int, Ge(1)] = 3
    """Channels of the images."""
    mean: Floats | None = None
    """Channel means, of pixels in [0, 1], that images are normalised by; by default measured."""
    std: Floats | None = None
    """Channel standard deviations, likewise."""
    cls_tokens: Annotated[int, Ge(1), Lt(1000), RESEARCH] = 1
    """How many cls tokens the encoder has; the feature `cls` is their mean (Pixio: 4 to 8)."""

    def __post_init__(self) -> None:
        patch = self.shape.patch_size
        if len(self.image_size) != 2 or any(side % patch for side in self.image_size):
            raise UserError(
                f"image size {self.image_size} with patches of {patch} pixels; "
                f"accepted: one side or two (height width), each a multiple of {patch}"
            )
        for name in ("mean", "std"):
            values = getattr(self, name)
            if values is not None and len(values) != self.in_chans:
                raise UserError(f"{name} has {len(values)} numbers for {self.in_chans} channels")
        if self.std is not None and not all(value > 0 for value in self.std):
            raise UserError(f"std {self.std}; accepted: numbers above 0")

    @property
    def shape(self) -> ViTShape:
        """Width, depth, heads and patch size of the encoder."""
        return parse_model_name(self.model)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        height, width = self.image_size
        return height // self.shape.patch_size, width // self.shape.patch_size

    @property
    def patches(self) -> int:
        """L, the number of patches."""
        return self.grid[0] * self.grid[1]


@part
class AutoencoderConfig:
    """What a masked autoencoder has around its encoder. The defaults are the paper's."""

    mask_ratio: Annotated[float, Gt(0), Lt(1), FIRST] = 0.75
    """Share of the patches that is hidden."""
    mask: MaskKind = "random"
    """How hidden patches are chosen: random, block (BEiT's rectangles) or grid (a regular lattice)."""
    mask_unit: Annotated[int, Ge(1), RESEARCH] = 1
    """Of random masks: the side, in patches, of squares that are hidden or shown as one (Pixio: 2 to 4)."""
    target: TargetKind = "pixels"
    """What is predicted of a patch: its pixels, its largest principal components (pca), histograms of its
    oriented gradients (hog; MaskFeat), or the tokens that a tokenizer has for it, by cross-entropy (table
    1d)."""
    norm_pix_loss: bool = True
    """Of --target pixels: normalise them by each patch's own mean and deviation."""
    pca_components: Annotated[int, Ge(1), RESEARCH] = 96
    """Of --target pca: how many are predicted; all where a patch has fewer numbers."""
    vocabulary: Annotated[int | None, Ge(2), RESEARCH] = None
    """Of --target tokens: how many different tokens there are; by default those of the tokenizer."""
    decoder: DecoderKind = "standard"
    """The paper's decoder of all tokens, or cross: hidden patches look at visible ones alone, and at every
    layer of the encoder (CrossMAE, Fu et al. 2024), which costs less."""
    predict_share: Annotated[float, Gt(0), Le(1), RESEARCH] = 1.0
    """Share of the hidden patches that a cross decoder predicts in training, chosen at random; validation and
    pictures predict all. The learning rate stays as it is: CrossMAE multiplies its own by this share."""
    decoder_width: int = 512
    """Width of the decoder."""
    decoder_depth: Annotated[int, Ge(0), Lt(1000)] = 8
    """Blocks of the decoder; 0 is a linear head."""
    decoder_heads: int = 16
    """Attention heads of the decoder."""
    encoder_mask_tokens: Annotated[bool, RESEARCH] = False
    """Let the encoder see mask tokens in place of hidden patches (table 1c: slower and worse)."""
    fused_blocks: Annotated[Ints, RESEARCH] = ()
    """Earlier blocks of the encoder whose outputs the decoder is given together with the last one's, each
    projected, in a learned weighted sum (MFF, Liu et al. 2023: 1 3 5 7 9 of 12). Features stay the last's."""
    predict_all: Annotated[bool, RESEARCH] = False
    """Predict visible patches too and count them in the loss (footnote 1: costs half a point)."""


@part
class MAEConfig(AutoencoderConfig, ViTConfig):
    """A masked autoencoder: an encoder, and what is around it. The defaults are the paper's."""

    def __post_init__(self) -> None:
        ViTConfig.__post_init__(self)
        patch = self.shape.patch_size
        check_width("the decoder", self.decoder_width, self.decoder_heads)
        if self.target == "pixels" and self.norm_pix_loss and patch == self.in_chans == 1:
            raise UserError("a patch of one number cannot be normalised; accepted: --no-norm-pix-loss")
        if any(side % self.mask_unit for side in self.grid):
            raise UserError(
                f"mask units of {self.mask_unit} patches on a grid of {self.grid[0]} × {self.grid[1]}; "
                "accepted: divisors of both"
            )
        if self.mask_unit > 1 and self.mask != "random":
            raise UserError(f"mask units of {self.mask_unit} with {self.mask} masks; accepted: random ones")
        self._check_decoder()
        self._check_fusion()
        try:
            keep_count(self.patches, self.mask_ratio)
        except ValueError as error:
            raise UserError(str(error)) from None

    @property
    def normalises_patches(self) -> bool:
        """Whether each patch is predicted up to its own mean and deviation."""
        return self.target == "pixels" and self.norm_pix_loss

    @property
    def predicts_pictures(self) -> bool:
        """Whether predictions can be drawn."""
        return self.target in ("pixels", "pca")

    @property
    def predicted_numbers(self) -> int:
        """How many numbers are predicted of a patch.

        Raises:
            UserError: if they are tokens, and it is not said how many there are.
        """
        numbers = self.shape.patch_size**2 * self.in_chans
        if self.target == "pca":
            return min(self.pca_components, numbers)
        if self.target == "pixels":
            return numbers
        if self.target == "hog":
            return hog_numbers(self.shape.patch_size, self.in_chans)
        if self.vocabulary is None:
            raise UserError(
                "a model of tokens without a vocabulary; accepted: --tokenizer, or --vocabulary N"
            )
        return self.vocabulary

    @property
    def described_target(self) -> str:
        """What is predicted of a patch, in words."""
        if self.target == "pca":
            return f"{self.predicted_numbers} principal components of patches"
        if self.target == "hog":
            cell = cell_side(self.shape.patch_size)
            return f"oriented gradients (HOG) in cells of {cell} × {cell} pixels"
        if self.target == "tokens":
            return f"tokens, of {self.vocabulary}"
        return "pixels normalised by patch" if self.norm_pix_loss else "pixels"

    def _check_decoder(self) -> None:
        if self.decoder == "standard":
            if self.predict_share < 1:
                raise UserError(
                    f"a predict share of {self.predict_share} with the standard decoder, in which hidden "
                    "patches look at one another, so that leaving some out would change the others; "
                    "accepted: 1, or --decoder cross"
                )
            return
        if self.decoder_depth == 0:
            raise UserError("a cross decoder of 0 blocks sees nothing of the picture; accepted: 1 or more")
        if self.encoder_mask_tokens:
            raise UserError(
                "mask tokens in the encoder, and a cross decoder, whose own mask tokens look at visible "
                "patches; accepted: one of the two"
            )
        if self.predict_all:
            raise UserError(
                "visible patches cannot be predicted by a cross decoder, which looks at them; accepted: "
                "--no-predict-all, or --decoder standard"
            )

    def _check_fusion(self) -> None:
        fused, depth = self.fused_blocks, self.shape.depth
        if not fused:
            return
        if list(fused) != sorted({block for block in fused if 0 < block < depth}):
            raise UserError(
                f"fused blocks {' '.join(map(str, fused))} of an encoder of {depth}; accepted: different "
                f"numbers from 1 to {depth - 1}, ascending; the last block is always among them"
                if depth > 1
                else "fused blocks of an encoder that has one; accepted: none"
            )
        if self.decoder == "cross":
            raise UserError(
                "fused blocks, and a cross decoder, whose blocks mix all of the encoder's already; accepted: "
                "one of the two"
            )


@part
class ClassifierConfig(ViTConfig):
    """A classifier: an encoder and a linear head."""

    classes: Annotated[int, Ge(2)] = 1000
    """How many classes there are."""
    pool: Pool = "mean"
    """What the head reads: the mean of the patch tokens, or the cls token (of several the mean)."""
    class_names: Texts | None = None
    """What the classes are called, in the order of the head's rows."""


@part
class TokenizerConfig:
    """A tokenizer: a discrete VAE that gives each patch a visual token."""

    patch_size: Annotated[int, Ge(1)]
    """Side in pixels of what one token stands for."""
    in_chans: Annotated[int, Ge(1)]
    """Channels of the images."""
    vocabulary: Annotated[int, Ge(2)]
    """How many tokens there are: the size of the codebook."""
    width: Annotated[int, Ge(1)]
    """Channels of its layers."""
    depth: Annotated[int, Ge(0)]
    """Residual blocks on either side."""
    mean: Floats
    """Channel means, of pixels in [0, 1], that its images are normalised by."""
    std: Floats
    """Channel standard deviations, likewise."""

    def __post_init__(self) -> None:
        if not len(self.mean) == len(self.std) == self.in_chans or not all(s > 0 for s in self.std):
            raise UserError(
                f"a tokenizer with mean {self.mean} and std {self.std}; accepted: {self.in_chans} numbers"
            )
