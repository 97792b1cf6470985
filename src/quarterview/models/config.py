"""What a model is, as numbers: an encoder, and the masked autoencoder around it."""

from dataclasses import dataclass
from typing import Literal

from quarterview.errors import UserError, check_types
from quarterview.models import masking
from quarterview.models.hog import cell_side, numbers_of_patch
from quarterview.models.masking import MaskKind
from quarterview.models.vit import ViTShape, check_width, parse_model_name

DecoderKind = Literal["standard", "cross"]
TargetKind = Literal["pixels", "pca", "hog", "tokens"]


@dataclass(frozen=True)
class ViTConfig:
    """What an encoder is, and what images it takes."""

    model: str = "mae_vit_base_patch16"
    """Encoder: mae_vit_{tiny,small,base,large,huge}_patch{N}, or mae_vit_{WIDTH}x{DEPTH}x{HEADS}_patch{N}."""
    image_size: tuple[int, ...] = (224, 224)
    """Height and width in pixels; one number means a square. Each must divide by the patch size."""
    in_chans: int = 3
    """Channels of the images."""
    mean: tuple[float, ...] | None = None
    """Channel means, of pixels in [0, 1], that images are normalised by; measured when None."""
    std: tuple[float, ...] | None = None
    """Channel standard deviations, likewise."""
    cls_tokens: int = 1
    """How many cls tokens the encoder has; the feature `cls` is their mean (Pixio: 4 to 8)."""

    def __post_init__(self) -> None:
        size = (self.image_size,) if isinstance(self.image_size, int) else tuple(self.image_size)
        object.__setattr__(self, "image_size", size * 2 if len(size) == 1 else size)
        for name in ("mean", "std"):
            values = getattr(self, name)
            object.__setattr__(self, name, None if values is None else tuple(values))
        check_types(self, ViTConfig)
        patch = self.shape.patch_size
        if len(self.image_size) != 2 or any(side < 1 or side % patch for side in self.image_size):
            raise UserError(
                f"image size {self.image_size} with patches of {patch} pixels; "
                f"accepted: one side or two (height width), each a multiple of {patch}"
            )
        if self.in_chans < 1:
            raise UserError(f"{self.in_chans} channels; accepted: 1 or more")
        if not 0 < self.cls_tokens < 1000:
            raise UserError(f"{self.cls_tokens} cls tokens; accepted: 1 to 999")
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


@dataclass(frozen=True)
class MAEConfig(ViTConfig):
    """What a masked autoencoder is. The defaults are the paper's."""

    mask_ratio: float = 0.75
    """Share of the patches that is hidden."""
    mask: MaskKind = "random"
    """How hidden patches are chosen: random, block (BEiT's rectangles) or grid (a regular lattice)."""
    mask_unit: int = 1
    """Of random masks: the side, in patches, of squares that are hidden or shown as one (Pixio: 2 to 4)."""
    target: TargetKind = "pixels"
    """What is predicted of a patch: its pixels, its largest principal components (pca), histograms of its
    oriented gradients (hog; MaskFeat), or the tokens that a tokenizer has for it, by cross-entropy (table
    1d)."""
    norm_pix_loss: bool = True
    """Of --target pixels: normalise them by each patch's own mean and deviation."""
    pca_components: int = 96
    """Of --target pca: how many are predicted; all where a patch has fewer numbers."""
    vocabulary: int | None = None
    """Of --target tokens: how many different tokens there are; by default those of the tokenizer."""
    decoder: DecoderKind = "standard"
    """The paper's decoder of all tokens, or cross: hidden patches look at visible ones alone, and at every
    layer of the encoder (CrossMAE, Fu et al. 2024), which costs less."""
    predict_share: float = 1.0
    """Share of the hidden patches that a cross decoder predicts in training, chosen at random; validation and
    pictures predict all. The learning rate stays as it is: CrossMAE multiplies its own by this share."""
    decoder_width: int = 512
    """Width of the decoder."""
    decoder_depth: int = 8
    """Blocks of the decoder; 0 is a linear head."""
    decoder_heads: int = 16
    """Attention heads of the decoder."""
    encoder_mask_tokens: bool = False
    """Let the encoder see mask tokens in place of hidden patches (table 1c: slower and worse)."""
    fused_blocks: tuple[int, ...] = ()
    """Earlier blocks of the encoder whose outputs the decoder is given together with the last one's, each
    projected, in a learned weighted sum (MFF, Liu et al. 2023: 1 3 5 7 9 of 12). Features stay the last's."""
    predict_all: bool = False
    """Predict visible patches too and count them in the loss (footnote 1: costs half a point)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        fused = self.fused_blocks
        object.__setattr__(self, "fused_blocks", (fused,) if isinstance(fused, int) else tuple(fused))
        check_types(self, MAEConfig)
        patch = self.shape.patch_size
        if not 0 <= self.decoder_depth < 1000:
            raise UserError(f"a decoder of {self.decoder_depth} blocks; accepted: 0 to 999")
        check_width("the decoder", self.decoder_width, self.decoder_heads)
        if self.target == "pixels" and self.norm_pix_loss and patch == self.in_chans == 1:
            raise UserError("a patch of one number cannot be normalised; accepted: --no-norm-pix-loss")
        if self.pca_components < 1:
            raise UserError(f"{self.pca_components} principal components; accepted: 1 or more")
        if self.vocabulary is not None and self.vocabulary < 2:
            raise UserError(f"a vocabulary of {self.vocabulary}; accepted: 2 or more")
        if self.mask_unit < 1 or any(side % self.mask_unit for side in self.grid):
            raise UserError(
                f"mask units of {self.mask_unit} patches on a grid of {self.grid[0]} × {self.grid[1]}; "
                "accepted: divisors of both"
            )
        if self.mask_unit > 1 and self.mask != "random":
            raise UserError(f"mask units of {self.mask_unit} with {self.mask} masks; accepted: random ones")
        self._check_decoder()
        self._check_fusion()
        try:
            masking.keep_count(self.patches, self.mask_ratio)
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
            return numbers_of_patch(self.shape.patch_size, self.in_chans)
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
        if not 0 < self.predict_share <= 1:
            raise UserError(f"a predict share of {self.predict_share}; accepted: above 0, up to 1")
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
