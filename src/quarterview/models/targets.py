"""What the decoder learns to predict.

A target is a module: it says how many numbers it wants for a patch, makes them from the true
patches, and judges predictions: pixels, principal components, the tokens of a tokenizer
(He et al. 2021, table 1d), or histograms of oriented gradients (Wei et al. 2022).
"""

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quarterview.errors import UserError
from quarterview.models.config import MAEConfig, cell_side, hog_numbers
from quarterview.models.hog import oriented_gradients
from quarterview.models.masking import take
from quarterview.models.vit import patchify

NORM_EPS = 1e-6


class Target(Protocol):
    """One answer to "what should be reconstructed?" (He et al. 2021, table 1d)."""

    width: int
    """How many numbers the decoder predicts for a patch."""

    def __call__(self, images: Tensor, patches: Tensor, wanted: Tensor | None) -> Tensor:
        """The truth for some patches, from whole images, as targets may look beyond a patch.

        Args:
            images: float [B, C, H, W], normalised.
            patches: float [B, L, p*p*C], the same images cut up.
            wanted: int64 [B, K], the patches that are asked for; None asks for all.

        Returns:
            float32 [B, K, width]; token targets give int64 [B, K].
        """
        ...

    def loss(self, pred: Tensor, truth: Tensor) -> Tensor:
        """One error a patch: float32 [...], from pred [..., width] and what `__call__` gave."""
        ...

    def to_pixels(self, pred: Tensor, mean: Tensor, std: Tensor) -> Tensor | None:
        """Patches [..., p*p*C] that a person can look at, given a guess of each patch's mean and
        standard deviation [..., 1]; None if the prediction is no picture."""
        ...


class PixelTarget(nn.Module):
    """The pixels of the patch, or its pixels normalised by their own mean and deviation.

    The normalisation is over all p*p*C values of the patch together, with the unbiased variance
    and the epsilon inside the root (He et al. 2021, section 3 and the official code).
    """

    def __init__(self, width: int, normalised: bool) -> None:
        super().__init__()
        self.width = width
        self.normalised = normalised

    def forward(self, images: Tensor, patches: Tensor, wanted: Tensor | None) -> Tensor:
        patches = (patches if wanted is None else take(patches, wanted)).float()
        if not self.normalised:
            return patches
        mean, std = patch_statistics(patches)
        return (patches - mean) / std

    def loss(self, pred: Tensor, truth: Tensor) -> Tensor:
        return F.mse_loss(pred.float(), truth, reduction="none").mean(dim=-1)

    def to_pixels(self, pred: Tensor, mean: Tensor, std: Tensor) -> Tensor:
        return pred.float() * std + mean if self.normalised else pred.float()


class PCATarget(nn.Module):
    """The coefficients of the patch along the principal components of all patches, the largest first.

    They are fitted before training (see `PatchMoments`) and kept with the weights; until then all are 0.
    """

    mean: Tensor
    """float [P], of the patches."""
    components: Tensor
    """float [k, P], orthonormal rows."""

    def __init__(self, numbers: int, components: int) -> None:
        super().__init__()
        self.width = components
        self.register_buffer("mean", torch.zeros(numbers))
        self.register_buffer("components", torch.zeros(components, numbers))

    def forward(self, images: Tensor, patches: Tensor, wanted: Tensor | None) -> Tensor:
        patches = (patches if wanted is None else take(patches, wanted)).float()
        return (patches - self.mean) @ self.components.T

    def loss(self, pred: Tensor, truth: Tensor) -> Tensor:
        return F.mse_loss(pred.float(), truth, reduction="none").mean(dim=-1)

    def to_pixels(self, pred: Tensor, mean: Tensor, std: Tensor) -> Tensor:
        return pred.float() @ self.components + self.mean

    def fit(self, moments: "PatchMoments") -> None:
        """Take the components of patches that were seen."""
        mean, components = moments.principal(self.width)
        self.mean.copy_(mean)
        self.components.copy_(components)


class PatchMoments:
    """What principal components are made of, gathered a batch at a time in float64."""

    def __init__(self, numbers: int) -> None:
        self.count = 0
        self.mean = torch.zeros(numbers, dtype=torch.float64)
        self.scatter = torch.zeros(numbers, numbers, dtype=torch.float64)

    def add(self, patches: Tensor) -> None:
        """See patches, float [..., P]."""
        x = patches.detach().flatten(0, -2).double().cpu()
        count, mean = len(x), x.mean(0)
        step = mean - self.mean
        total = self.count + count
        self.scatter += (x - mean).T @ (x - mean) + torch.outer(step, step) * self.count * count / total
        self.mean += step * count / total
        self.count = total

    def principal(self, count: int) -> tuple[Tensor, Tensor]:
        """The mean float64 [P] and the first components float64 [count, P].

        Each component's largest number is positive, so that the same patches give the same signs.

        Raises:
            ValueError: if fewer patches were seen than components are asked for.
        """
        if self.count <= count:
            raise ValueError(f"{count} principal components of {self.count} patches; accepted: fewer")
        vectors = torch.linalg.eigh(self.scatter).eigenvectors.flip(1)[:, :count].T  # [count, P]
        largest = vectors.gather(1, vectors.abs().argmax(dim=1, keepdim=True))
        return self.mean, vectors * largest.sign()


class HOGTarget(nn.Module):
    """The histograms of oriented gradients of the patch's cells, by channel (MaskFeat, Wei et al. 2022).

    They are made of the whole picture, so that a gradient at the edge of a patch sees the next one. The
    mean and deviation that a channel was normalised by make no difference to them. A patch's numbers are
    by row and column of its cells, channel and orientation.
    """

    def __init__(self, patch_size: int, channels: int) -> None:
        super().__init__()
        self.cell, self.cells = cell_side(patch_size), patch_size // cell_side(patch_size)
        self.width = hog_numbers(patch_size, channels)

    @torch.no_grad()
    def forward(self, images: Tensor, patches: Tensor, wanted: Tensor | None) -> Tensor:
        histograms = oriented_gradients(images.float(), self.cell)  # [B, C, O, H/c, W/c]
        numbers = patchify(histograms.flatten(1, 2), self.cells)  # [B, L, width]
        return numbers if wanted is None else take(numbers, wanted)

    def loss(self, pred: Tensor, truth: Tensor) -> Tensor:
        return F.mse_loss(pred.float(), truth, reduction="none").mean(dim=-1)

    def to_pixels(self, pred: Tensor, mean: Tensor, std: Tensor) -> None:
        return None


class Tokenizer(Protocol):
    """Something that names each patch of a picture by one of a fixed number of words."""

    @property
    def vocabulary(self) -> int:
        """How many words there are."""
        ...

    def tokens(self, images: Tensor) -> Tensor:
        """float [B, C, H, W], normalised as the model's images are -> int64 [B, L], by row."""
        ...


class TokenTarget(nn.Module):
    """The words that a tokenizer has for the patches of the whole picture, told by cross-entropy (BEiT).

    The tokenizer is none of the model's weights: what is trained can be used without it, but not
    trained further.
    """

    tokenizer: Tokenizer | None

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.width = vocabulary
        self.tokenizer = None

    def use(self, tokenizer: Tokenizer) -> None:
        """Take the tokens from `tokenizer`, which lies where the images do.

        Raises:
            UserError: if it has another number of words.
        """
        if tokenizer.vocabulary != self.width:
            raise UserError(f"a tokenizer of {tokenizer.vocabulary} words for a model of {self.width}")
        object.__setattr__(self, "tokenizer", tokenizer)  # not registered as a part of the model

    @torch.no_grad()
    def forward(self, images: Tensor, patches: Tensor, wanted: Tensor | None) -> Tensor:
        if self.tokenizer is None:
            raise UserError("the model predicts tokens, and no tokenizer is at hand; accepted: --tokenizer")
        tokens = self.tokenizer.tokens(images)  # [B, L]
        if tokens.shape != patches.shape[:2]:
            raise UserError(
                f"a tokenizer of {tokens.shape[1]} tokens for pictures of {patches.shape[1]} patches"
            )
        return tokens if wanted is None else take(tokens, wanted)

    def loss(self, pred: Tensor, truth: Tensor) -> Tensor:
        return F.cross_entropy(pred.float().movedim(-1, 1), truth, reduction="none")

    def to_pixels(self, pred: Tensor, mean: Tensor, std: Tensor) -> None:
        return None


def target_of(config: MAEConfig) -> PixelTarget | PCATarget | HOGTarget | TokenTarget:
    """The target that a configuration asks for.

    Raises:
        UserError: if it predicts tokens and does not say how many words there are.
    """
    if config.target == "pca":
        return PCATarget(config.shape.patch_size**2 * config.in_chans, config.predicted_numbers)
    if config.target == "hog":
        return HOGTarget(config.shape.patch_size, config.in_chans)
    if config.target == "tokens":
        return TokenTarget(config.predicted_numbers)
    return PixelTarget(config.predicted_numbers, normalised=config.norm_pix_loss)


def patch_statistics(patches: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each patch: float [..., 1] twice, epsilon inside the root."""
    variance, mean = torch.var_mean(patches, dim=-1, keepdim=True, correction=1)
    return mean, (variance + NORM_EPS).sqrt()


def nearness(of: Tensor, to: Tensor, columns: int) -> Tensor:
    """Weights that sum to 1 over the patches `to`, falling with the fourth power of distance.

    Args:
        of, to: int64 [B, K] and [B, V], patch indices that have none in common.
        columns: of patches.

    Returns:
        float32 [B, K, V].
    """
    rows_and_columns = [torch.stack([i // columns, i % columns], dim=2).float() for i in (of, to)]
    weights = torch.cdist(*rows_and_columns) ** -4.0
    return weights / weights.sum(dim=2, keepdim=True)
