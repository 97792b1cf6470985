"""What each method of pre-training can be told, with its own defaults and checks.

A method is one class here, listed in `MethodConfig`, and one module beside this file, which its `module`
names and which builds what is trained (see `quarterview.methods.base`).
"""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from quarterview.config import FIRST, MAY_CHANGE, PATH, RESEARCH, Ge, Gt, Ints, Le, Lt, Text, part
from quarterview.data.config import BYOL_COLORS, SIMCLR_COLORS, ColorDistortion
from quarterview.errors import UserError
from quarterview.models.config import AutoencoderConfig, MAEConfig, MaskKind, ViTConfig

_TokenizerPath = Annotated[Text | None, PATH, MAY_CHANGE]


@part
class RegularizationConfig:
    """Regularization. The defaults are the paper's fine-tuning of ViT-B (table 9)."""

    smoothing: Annotated[float, Ge(0), Lt(1)] = 0.1
    """Label smoothing: this share of the target is spread over all classes."""
    mixup: Annotated[float, Ge(0)] = 0.8
    """Alpha of mixup; 0 is off."""
    cutmix: Annotated[float, Ge(0)] = 1.0
    """Alpha of CutMix; 0 is off. Where both are on, each pair of images draws one of them."""
    drop_path: Annotated[float, Ge(0), Lt(1)] = 0.1
    """Rate of stochastic depth at the last block; it grows linearly from 0 at the first."""

    def check_batch(self, batch_size: int) -> None:
        """Raises UserError if the images of a batch cannot be mixed in pairs."""
        if (self.mixup or self.cutmix) and batch_size % 2:
            raise UserError(
                f"--batch-size {batch_size} leaves an image without one to mix with. Give an even number, or "
                "--mixup 0 --cutmix 0."
            )


class BaseMethodConfig:
    """What all methods have in common; each method is a part that derives from this."""

    name: ClassVar[str]
    module: ClassVar[str]
    """The module of `quarterview.methods` that builds it."""
    other_defaults: ClassVar[Mapping[str, Any]] = {}
    """In what the defaults of other parts differ from masked autoencoding's."""
    predicts: ClassVar[bool] = False
    """Whether it trains a masked autoencoder, which predicts patches."""
    compares: ClassVar[bool] = False
    """Whether it compares two views of each image with those of the other images of a batch."""
    compares_batch: ClassVar[bool] = False
    """Whether the images of a batch are compared, so that it cannot be cut into parts."""
    learns_labels: ClassVar[bool] = False
    """Whether it needs labelled images."""


class _Masking(BaseMethodConfig):
    """Methods that hide patches."""

    @property
    def compares_batch(self) -> bool:  # type: ignore[override]
        """Whether the images of a batch are compared, which uniformity does."""
        return getattr(self, "uniformity", 0) > 0


@part
class MAE(AutoencoderConfig, _Masking):
    """Masked autoencoding (He et al. 2021)."""

    name: ClassVar[str] = "mae"
    module: ClassVar[str] = "mae"
    predicts: ClassVar[bool] = True

    tokenizer: _TokenizerPath = None
    """Of --target tokens: a run of quarterview tokenizer, or a folder of transformers' FlavaImageCodebook
    (DALL-E's)."""
    masks_per_image: Annotated[int, Ge(1), RESEARCH] = 1
    """Ways in which each image is hidden in the same update, so that it is read and augmented once for all.
    The model's work and memory grow as many times; the batch size, in images, and the learning rate stay."""
    uniformity: Annotated[float, Ge(0), Le(1000), RESEARCH] = 0.0
    """How much it costs that features of different images point the same way: times the mean squared cosine
    between those of a batch (U-MAE, Zhang et al. 2022, who take 0.01). 0 is off."""

    def __post_init__(self) -> None:
        if (self.target == "tokens") != (self.tokenizer is not None):
            raise UserError(
                f"--target {self.target} does not go with --tokenizer {self.tokenizer}. Give --target tokens "
                "with --tokenizer RUN, or neither."
            )
        if self.mask == "grid" and self.masks_per_image > 1 and self.predict_share == 1:
            raise UserError(
                f"--masks-per-image {self.masks_per_image} with --mask grid hides every image alike. Give 1, "
                "or a --predict-share below 1."
            )
        if self.uniformity and self.fused_blocks:
            raise UserError(
                f"--uniformity {self.uniformity} does not go with --fused-blocks, whose sum is no feature "
                "that anything else reads. Give one of them."
            )


@part
class BEiT(_Masking):
    """Predict visual tokens of masked patches from a full encoder without a decoder (Bao et al. 2021)."""

    name: ClassVar[str] = "beit"
    module: ClassVar[str] = "mae"
    predicts: ClassVar[bool] = True

    tokenizer: _TokenizerPath = None
    """Required: a run of quarterview tokenizer, or a folder of transformers' FlavaImageCodebook
    (DALL-E's)."""
    mask_ratio: Annotated[float, Gt(0), Lt(1), FIRST] = 0.4
    """Share of the patches that is hidden."""
    mask: MaskKind = "block"
    """How hidden patches are chosen: random, block (BEiT's rectangles) or grid (a regular lattice)."""
    mask_unit: Annotated[int, Ge(1), RESEARCH] = 1
    """Of random masks: the side, in patches, of squares that are hidden or shown as one."""
    vocabulary: Annotated[int | None, Ge(2), RESEARCH] = None
    """How many different tokens there are; by default those of the tokenizer."""
    fused_blocks: Annotated[Ints, RESEARCH] = ()
    """Earlier blocks of the encoder whose outputs are added to the last one's, each projected, in a learned
    weighted sum (MFF, Liu et al. 2023)."""
    predict_all: Annotated[bool, RESEARCH] = False
    """Predict visible patches too and count them in the loss."""
    masks_per_image: Annotated[int, Ge(1), RESEARCH] = 1
    """Ways in which each image is hidden in the same update."""
    uniformity: Annotated[float, Ge(0), Le(1000), RESEARCH] = 0.0
    """How much it costs that features of different images point the same way. 0 is off."""

    def __post_init__(self) -> None:
        if self.uniformity and self.fused_blocks:
            raise UserError(
                f"--uniformity {self.uniformity} does not go with --fused-blocks, whose sum is no feature "
                "that anything else reads. Give one of them."
            )


@part
class Denoising(BaseMethodConfig):
    """Predict clean images from noisy ones, nothing hidden."""

    name: ClassVar[str] = "denoising"
    module: ClassVar[str] = "denoising"
    predicts: ClassVar[bool] = True

    noise: Annotated[float, Gt(0), Le(100)] = 1.0
    """The noise's standard deviation, in those of the pixels. At 1 half of what the encoder sees is noise."""
    target: Literal["pixels", "pca"] = "pixels"
    """What is predicted of a patch: its pixels, or its largest principal components."""
    norm_pix_loss: bool = True
    """Of --target pixels: normalise them by each patch's own mean and deviation."""
    pca_components: Annotated[int, Ge(1), RESEARCH] = 96
    """Of --target pca: how many are predicted; all where a patch has fewer numbers."""
    decoder_width: int = 512
    """Width of the decoder."""
    decoder_depth: Annotated[int, Ge(0), Lt(1000)] = 8
    """Blocks of the decoder; 0 is a linear head."""
    decoder_heads: int = 16
    """Attention heads of the decoder."""
    fused_blocks: Annotated[Ints, RESEARCH] = ()
    """Earlier blocks of the encoder whose outputs the decoder is given together with the last one's."""


@part
class Supervised(RegularizationConfig, BaseMethodConfig):
    """Learn the labels of the images, which --data must have (He et al. 2021, table 11)."""

    name: ClassVar[str] = "supervised"
    module: ClassVar[str] = "supervised"
    learns_labels: ClassVar[bool] = True
    other_defaults: ClassVar[Mapping[str, Any]] = {"blr": 1e-4, "weight_decay": 0.3}


class ContrastiveConfig(BaseMethodConfig):
    """Methods that compare two views of each image; heads and losses are lightly's."""

    module: ClassVar[str] = "contrastive"
    compares: ClassVar[bool] = True
    compares_batch: ClassVar[bool] = True
    other_defaults: ClassVar[Mapping[str, Any]] = {"weight_decay": 0.1}
    colors: ClassVar[tuple[ColorDistortion, ColorDistortion]] = BYOL_COLORS


@part
class SimCLR(ContrastiveConfig):
    """A view's partner among all other views of the batch (Chen et al. 2020)."""

    name: ClassVar[str] = "simclr"
    colors: ClassVar[tuple[ColorDistortion, ColorDistortion]] = SIMCLR_COLORS

    temperature: Annotated[float, Gt(0), Le(100)] = 0.5
    """By which similarities are divided; Chen et al. take 0.5 for CIFAR-10."""
    head_width: Annotated[int, Ge(1), Le(1 << 16)] = 4096
    """Width of the hidden layers of the heads."""
    head_out: Annotated[int, Ge(1), Le(1 << 16)] = 256
    """Numbers that are compared."""
    view_colours: bool = True
    """Distort the colors of both views as the method's paper does; otherwise crop and flip alone."""


@part
class BYOL(ContrastiveConfig):
    """Predict a teacher's projection of the other view; no negatives (Grill et al. 2020)."""

    name: ClassVar[str] = "byol"

    momentum: Annotated[float, Ge(0), Le(1)] = 0.996
    """The part that the teacher keeps of itself at the first update; it rises to 1 along a cosine."""
    head_width: Annotated[int, Ge(1), Le(1 << 16)] = 4096
    """Width of the hidden layers of the heads."""
    head_out: Annotated[int, Ge(1), Le(1 << 16)] = 256
    """Numbers that are compared."""
    view_colours: bool = True
    """Distort the colors of both views as the method's paper does; otherwise crop and flip alone."""


@part
class MoCoV3(ContrastiveConfig):
    """Find a teacher's projection of the other view among those of the batch (Chen et al. 2021)."""

    name: ClassVar[str] = "mocov3"

    temperature: Annotated[float, Gt(0), Le(100)] = 0.2
    """By which similarities are divided."""
    momentum: Annotated[float, Ge(0), Le(1)] = 0.99
    """The part that the teacher keeps of itself at the first update; it rises to 1 along a cosine."""
    head_width: Annotated[int, Ge(1), Le(1 << 16)] = 4096
    """Width of the hidden layers of the heads."""
    head_out: Annotated[int, Ge(1), Le(1 << 16)] = 256
    """Numbers that are compared."""
    view_colours: bool = True
    """Distort the colors of both views as the method's paper does; otherwise crop and flip alone."""


@part
class Tokenizer(BaseMethodConfig):
    """Learn visual tokens, for --target tokens and --method beit: a discrete VAE (Ramesh et al. 2021)."""

    name: ClassVar[str] = "tokenizer"
    module: ClassVar[str] = "tokenizer"
    other_defaults: ClassVar[Mapping[str, Any]] = {"lr": 1e-3, "weight_decay": 0.0}

    vocabulary: Annotated[int, Ge(2)] = 1024
    """How many different tokens there are: the size of the codebook."""
    tokenizer_width: Annotated[int, Ge(1), Le(1 << 14)] = 128
    """Channels of its layers."""
    tokenizer_depth: Annotated[int, Ge(0), Lt(1000)] = 2
    """Residual blocks between the patches and the tokens, and back."""
    kl_weight: Annotated[float, Ge(0)] = 0.01
    """What a nat costs by which a patch's tokens are not equally likely."""


MethodConfig = MAE | Denoising | BEiT | SimCLR | BYOL | MoCoV3 | Supervised | Tokenizer
"""The methods of ``--method``; the first is the default."""


def autoencoder_config(
    method: MAE | BEiT | Denoising, encoder: ViTConfig, vocabulary: int | None = None
) -> MAEConfig:
    """The masked autoencoder that a method trains around an encoder.

    Args:
        vocabulary: how many tokens the tokenizer has, for a target of tokens.
    """
    own = {
        name: getattr(method, name)
        for name in AutoencoderConfig.__dataclass_fields__
        if hasattr(method, name)
    }
    if isinstance(method, BEiT):
        own |= {"target": "tokens", "encoder_mask_tokens": True, "decoder_depth": 0}
    own["vocabulary"] = vocabulary
    return MAEConfig(**{name: getattr(encoder, name) for name in ViTConfig.__dataclass_fields__}, **own)
