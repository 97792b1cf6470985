"""Configurations of the pre-training methods, with their defaults and checks.

A method is one class here, listed in `MethodConfig`, and one module in this folder, named by the class's
`module_name`. That module has the function `build` (see `quarterview.methods.base`).
"""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from quarterview.config import (
    FIRST,
    MAY_CHANGE,
    PATH,
    RESEARCH,
    Ge,
    Gt,
    Ints,
    Le,
    Lt,
    Text,
    get_field_specs,
    part,
)
from quarterview.data.config import BYOL_COLORS, SIMCLR_COLORS, ColorDistortion
from quarterview.errors import UserError, not_supported
from quarterview.models.config import AutoencoderConfig, MAEConfig, MaskKind, ViTConfig

_TokenizerPath = Annotated[Text | None, PATH, MAY_CHANGE]


@part
class RegularizationConfig:
    """Regularization. The defaults are those of the paper's fine-tuning of ViT-B (table 9)."""

    smoothing: Annotated[float, Ge(0), Lt(1)] = 0.1
    """Label smoothing."""
    mixup: Annotated[float, Ge(0)] = 0.8
    """Alpha of mixup; 0 is off."""
    cutmix: Annotated[float, Ge(0)] = 1.0
    """Alpha of CutMix; 0 is off. With both on, one of the two is drawn for each pair of images."""
    drop_path: Annotated[float, Ge(0), Lt(1)] = 0.1
    """Stochastic depth rate of the last block; it grows linearly from 0 at the first."""

    def check_batch_size(self, batch_size: int) -> None:
        """Check that the images of a batch can be mixed in pairs.

        Raises:
            UserError: if the batch size is odd, and mixup or CutMix is on.
        """
        if (self.mixup or self.cutmix) and batch_size % 2:
            raise UserError(
                f"--batch-size is {batch_size}, but mixup and CutMix mix images in pairs. "
                "Give an even number, or --mixup 0 --cutmix 0."
            )


class BaseMethodConfig:
    """Base class of the configurations of all methods."""

    name: ClassVar[str]
    """The value of ``--method``."""
    module_name: ClassVar[str]
    """The module of `quarterview.methods` that builds the method."""
    default_overrides: ClassVar[Mapping[str, Any]] = {}
    """Defaults of other flags that differ for this method, such as the learning rate."""
    trains_mae: ClassVar[bool] = False
    """Whether the method trains a `MaskedAutoencoder`."""
    uses_two_views: ClassVar[bool] = False
    """Whether the method compares two views of each image."""
    needs_whole_batch: ClassVar[bool] = False
    """Whether the loss compares the images of a batch, which rules out gradient accumulation."""
    needs_labels: ClassVar[bool] = False
    """Whether the method needs labelled images."""


class _MaskingMethodConfig(BaseMethodConfig):
    """Base class of the configurations of methods that mask patches."""

    @property
    def needs_whole_batch(self) -> bool:  # type: ignore[override]
        """Whether the loss compares the images of a batch: only with uniformity."""
        return getattr(self, "uniformity", 0) > 0


@part
class MAEMethodConfig(AutoencoderConfig, _MaskingMethodConfig):
    """Masked autoencoding (He et al. 2021)."""

    name: ClassVar[str] = "mae"
    module_name: ClassVar[str] = "mae"
    trains_mae: ClassVar[bool] = True

    tokenizer: _TokenizerPath = None
    """For --target tokens: a run of quarterview tokenizer, or a folder of transformers' FlavaImageCodebook
    (the tokenizer of DALL-E)."""
    masks_per_image: Annotated[int, Ge(1), RESEARCH] = 1
    """Number of masks per image in each update. An image is read and augmented once for all its masks.
    Compute and memory of the model grow with it; batch size (in images) and learning rate do not change."""
    uniformity: Annotated[float, Ge(0), Le(1000), RESEARCH] = 0.0
    """Weight of the uniformity loss, the mean squared cosine between features of different images of a batch
    (U-MAE, Zhang et al. 2022, who use 0.01). 0 is off."""

    def __post_init__(self) -> None:
        if (self.target == "tokens") != (self.tokenizer is not None):
            raise UserError(
                f"--target is {self.target}, and --tokenizer is {self.tokenizer or 'not given'}. "
                "Give --target tokens with --tokenizer RUN, or neither."
            )
        if self.mask == "grid" and self.masks_per_image > 1 and self.predict_ratio == 1:
            raise UserError(
                f"--masks-per-image is {self.masks_per_image}, but with --mask grid all masks are the same. "
                "Give 1, or a --predict-ratio below 1."
            )
        if self.uniformity and self.fused_blocks:
            # The features that it compares would be the fused sum, which nothing else uses.
            raise not_supported(f"--uniformity {self.uniformity}", "--fused-blocks", "Remove one of them.")


@part
class BEiTConfig(_MaskingMethodConfig):
    """BEiT: predict visual tokens of masked patches, with mask tokens in the encoder (Bao et al. 2021)."""

    name: ClassVar[str] = "beit"
    module_name: ClassVar[str] = "mae"
    trains_mae: ClassVar[bool] = True
    RENAMED: ClassVar[Mapping[str, str]] = {"vocabulary": "codebook_size"}

    tokenizer: _TokenizerPath = None
    """Required: a run of quarterview tokenizer, or a folder of transformers' FlavaImageCodebook (the
    tokenizer of DALL-E)."""
    mask_ratio: Annotated[float, Gt(0), Lt(1), FIRST] = 0.4
    """Fraction of the patches to mask."""
    mask: MaskKind = "block"
    """Mask sampling: random, block (BEiT's rectangles) or grid (a regular lattice)."""
    mask_unit: Annotated[int, Ge(1), RESEARCH] = 1
    """For random masks: the side, in patches, of squares that are masked as a whole."""
    codebook_size: Annotated[int | None, Ge(2), RESEARCH] = None
    """Number of visual tokens. Default: the tokenizer's."""
    fused_blocks: Annotated[Ints, RESEARCH] = ()
    """Earlier encoder blocks whose projected outputs are added to the last output in a learned weighted sum
    (MFF, Liu et al. 2023)."""
    predict_all: Annotated[bool, RESEARCH] = False
    """Compute the loss on all patches, visible ones too."""
    masks_per_image: Annotated[int, Ge(1), RESEARCH] = 1
    """Number of masks per image in each update."""
    uniformity: Annotated[float, Ge(0), Le(1000), RESEARCH] = 0.0
    """Weight of the uniformity loss, the mean squared cosine between features of images. 0 is off."""

    def __post_init__(self) -> None:
        if self.uniformity and self.fused_blocks:
            # The features that it compares would be the fused sum, which nothing else uses.
            raise not_supported(f"--uniformity {self.uniformity}", "--fused-blocks", "Remove one of them.")


@part
class DenoisingConfig(BaseMethodConfig):
    """Denoising: predict the clean image from a noisy one, without masks (Vincent et al. 2008)."""

    name: ClassVar[str] = "denoising"
    module_name: ClassVar[str] = "denoising"
    trains_mae: ClassVar[bool] = True
    RENAMED: ClassVar[Mapping[str, str]] = {"noise": "noise_std"}

    noise_std: Annotated[float, Gt(0), Le(100)] = 1.0
    """Standard deviation of the noise, in standard deviations of the pixels. At 1, half of the input's
    variance is noise."""
    target: Literal["pixels", "pca"] = "pixels"
    """Reconstruction target of a patch: its pixels, or its largest principal components."""
    norm_pix_loss: bool = True
    """For --target pixels: normalise the pixels by each patch's own mean and standard deviation."""
    pca_components: Annotated[int, Ge(1), RESEARCH] = 96
    """For --target pca: number of principal components to predict; all where a patch has fewer."""
    decoder_width: int = 512
    """Width of the decoder."""
    decoder_depth: Annotated[int, Ge(0), Lt(1000)] = 8
    """Number of decoder blocks; 0 is a linear layer."""
    decoder_heads: int = 16
    """Number of attention heads of the decoder."""
    fused_blocks: Annotated[Ints, RESEARCH] = ()
    """Earlier encoder blocks that the decoder reads together with the last one (MFF)."""


@part
class SupervisedConfig(RegularizationConfig, BaseMethodConfig):
    """Supervised training on the labels of --data (He et al. 2021, table 11)."""

    name: ClassVar[str] = "supervised"
    module_name: ClassVar[str] = "supervised"
    needs_labels: ClassVar[bool] = True
    default_overrides: ClassVar[Mapping[str, Any]] = {"blr": 1e-4, "weight_decay": 0.3}


class ContrastiveConfig(BaseMethodConfig):
    """Base class of methods that compare two views of each image; heads and losses are lightly's."""

    module_name: ClassVar[str] = "contrastive"
    uses_two_views: ClassVar[bool] = True
    needs_whole_batch: ClassVar[bool] = True
    default_overrides: ClassVar[Mapping[str, Any]] = {"weight_decay": 0.1}
    color_distortions: ClassVar[tuple[ColorDistortion, ColorDistortion]] = BYOL_COLORS
    RENAMED: ClassVar[Mapping[str, str]] = {
        "head_width": "proj_hidden_dim",
        "head_out": "proj_output_dim",
        "view_colours": "view_colors",
    }


@part
class SimCLRConfig(ContrastiveConfig):
    """SimCLR: find the other view of an image among all views of the batch (Chen et al. 2020)."""

    name: ClassVar[str] = "simclr"
    color_distortions: ClassVar[tuple[ColorDistortion, ColorDistortion]] = SIMCLR_COLORS

    temperature: Annotated[float, Gt(0), Le(100)] = 0.5
    """Temperature of the loss, the divisor of similarities; Chen et al. use 0.5 for CIFAR-10."""
    proj_hidden_dim: Annotated[int, Ge(1), Le(1 << 16)] = 4096
    """Width of the hidden layers of the heads."""
    proj_output_dim: Annotated[int, Ge(1), Le(1 << 16)] = 256
    """Output dimension of the projection head."""
    view_colors: bool = True
    """Distort the colors of both views as in the method's paper; otherwise only crop and flip."""


@part
class BYOLConfig(ContrastiveConfig):
    """BYOL: predict a momentum teacher's projection of the other view (Grill et al. 2020)."""

    name: ClassVar[str] = "byol"

    momentum: Annotated[float, Ge(0), Le(1)] = 0.996
    """Momentum of the teacher at the first update; it rises to 1 along a cosine."""
    proj_hidden_dim: Annotated[int, Ge(1), Le(1 << 16)] = 4096
    """Width of the hidden layers of the heads."""
    proj_output_dim: Annotated[int, Ge(1), Le(1 << 16)] = 256
    """Output dimension of the projection head."""
    view_colors: bool = True
    """Distort the colors of both views as in the method's paper; otherwise only crop and flip."""


@part
class MoCoV3Config(ContrastiveConfig):
    """MoCo v3: find a momentum teacher's projection of the other view in the batch (Chen et al. 2021)."""

    name: ClassVar[str] = "mocov3"

    temperature: Annotated[float, Gt(0), Le(100)] = 0.2
    """Temperature of the loss, the divisor of similarities."""
    momentum: Annotated[float, Ge(0), Le(1)] = 0.99
    """Momentum of the teacher at the first update; it rises to 1 along a cosine."""
    proj_hidden_dim: Annotated[int, Ge(1), Le(1 << 16)] = 4096
    """Width of the hidden layers of the heads."""
    proj_output_dim: Annotated[int, Ge(1), Le(1 << 16)] = 256
    """Output dimension of the projection head."""
    view_colors: bool = True
    """Distort the colors of both views as in the method's paper; otherwise only crop and flip."""


@part
class TokenizerMethodConfig(BaseMethodConfig):
    """Tokenizer for --target tokens and --method beit: a discrete VAE (Ramesh et al. 2021)."""

    name: ClassVar[str] = "tokenizer"
    module_name: ClassVar[str] = "tokenizer"
    default_overrides: ClassVar[Mapping[str, Any]] = {"lr": 1e-3, "weight_decay": 0.0}
    RENAMED: ClassVar[Mapping[str, str]] = {"vocabulary": "codebook_size"}

    codebook_size: Annotated[int, Ge(2)] = 1024
    """Number of visual tokens, the size of the codebook."""
    tokenizer_width: Annotated[int, Ge(1), Le(1 << 14)] = 128
    """Number of channels of the layers."""
    tokenizer_depth: Annotated[int, Ge(0), Lt(1000)] = 2
    """Number of residual blocks in the encoder, and in the decoder."""
    kl_weight: Annotated[float, Ge(0)] = 0.01
    """Weight of the KL divergence, in nats per patch, of the token distribution from the uniform one."""


MethodConfig = (
    MAEMethodConfig
    | DenoisingConfig
    | BEiTConfig
    | SimCLRConfig
    | BYOLConfig
    | MoCoV3Config
    | SupervisedConfig
    | TokenizerMethodConfig
)
"""The methods of ``--method``; the first is the default."""


def make_mae_config(
    method: MAEMethodConfig | BEiTConfig | DenoisingConfig,
    encoder: ViTConfig,
    codebook_size: int | None = None,
) -> MAEConfig:
    """Make the configuration of the masked autoencoder that a method trains.

    Args:
        method: the configuration of the method.
        encoder: the configuration of the encoder.
        codebook_size: the number of visual tokens of the tokenizer, for methods that predict them.
    """
    own = {
        name: getattr(method, name) for name in get_field_specs(AutoencoderConfig) if hasattr(method, name)
    }
    if isinstance(method, BEiTConfig):
        own |= {"target": "tokens", "encoder_mask_tokens": True, "decoder_depth": 0}
    own["codebook_size"] = codebook_size
    return MAEConfig(**{name: getattr(encoder, name) for name in get_field_specs(ViTConfig)}, **own)
