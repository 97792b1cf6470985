"""Reconstruction targets: pixels, principal components and visual tokens (table 1d), and HOG (MaskFeat).

A target is a module that computes the true values of patches and the loss of a prediction. Table 1d is in He
et al. 2021; histograms of oriented gradients (HOG) are the target of MaskFeat (Wei et al. 2022).
"""

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quarterview.errors import UserError
from quarterview.models.config import MAEConfig, compute_hog_cell_size, compute_hog_dim
from quarterview.models.hog import compute_hog
from quarterview.models.masking import gather_patches
from quarterview.models.vit import patchify

NORM_PIX_EPS = 1e-6


class Target(Protocol):
    """The interface of a reconstruction target."""

    dim: int
    """The number of values that the decoder predicts per patch."""

    def __call__(self, images: Tensor, patches: Tensor, indices: Tensor | None) -> Tensor:
        """Compute the true values of some patches.

        Args:
            images: float [B, C, H, W], normalised; HOG and token targets need the pixels around a patch.
            patches: float [B, L, p*p*C], the patches of the same images.
            indices: int64 [B, Q], the patches to compute; None computes all.

        Returns:
            float32 [B, Q, dim]; for visual tokens int64 [B, Q].
        """
        ...

    def loss(self, pred: Tensor, truth: Tensor) -> Tensor:
        """Compute the loss of each patch, float32 [...], from pred [..., dim] and the true values."""
        ...

    def to_pixels(self, pred: Tensor, mean: Tensor, std: Tensor) -> Tensor | None:
        """Convert predictions to pixels, float [..., p*p*C].

        Args:
            pred: float [..., dim].
            mean, std: float [..., 1], estimates of the mean and standard deviation of each patch, for targets
                that are normalised per patch.

        Returns:
            The pixels, or None if the target cannot be shown as an image.
        """
        ...


class PixelTarget(nn.Module):
    """The pixels of a patch, optionally normalised by the patch's mean and standard deviation.

    The statistics are those of all p*p*C values of the patch together, with the unbiased variance, and with
    the epsilon inside the square root (He et al. 2021, section 3 and the official code).
    """

    def __init__(self, dim: int, normalize: bool) -> None:
        super().__init__()
        self.dim = dim
        self.normalize = normalize

    def forward(self, images: Tensor, patches: Tensor, indices: Tensor | None) -> Tensor:
        patches = (patches if indices is None else gather_patches(patches, indices)).float()
        if not self.normalize:
            return patches
        mean, std = compute_patch_statistics(patches)
        return (patches - mean) / std

    def loss(self, pred: Tensor, truth: Tensor) -> Tensor:
        return F.mse_loss(pred.float(), truth, reduction="none").mean(dim=-1)

    def to_pixels(self, pred: Tensor, mean: Tensor, std: Tensor) -> Tensor:
        return pred.float() * std + mean if self.normalize else pred.float()


class PCATarget(nn.Module):
    """The coefficients of a patch on the largest principal components of patches (PCA, table 1d).

    The components are fitted before training (see `PatchMoments`) and saved with the weights; before the fit
    they are zero.
    """

    mean: Tensor
    """float [P], the mean of the patches."""
    components: Tensor
    """float [dim, P], orthonormal rows, the largest component first."""

    def __init__(self, patch_dim: int, num_components: int) -> None:
        super().__init__()
        self.dim = num_components
        self.register_buffer("mean", torch.zeros(patch_dim))
        self.register_buffer("components", torch.zeros(num_components, patch_dim))

    def forward(self, images: Tensor, patches: Tensor, indices: Tensor | None) -> Tensor:
        patches = (patches if indices is None else gather_patches(patches, indices)).float()
        return (patches - self.mean) @ self.components.T

    def loss(self, pred: Tensor, truth: Tensor) -> Tensor:
        return F.mse_loss(pred.float(), truth, reduction="none").mean(dim=-1)

    def to_pixels(self, pred: Tensor, mean: Tensor, std: Tensor) -> Tensor:
        return pred.float() @ self.components + self.mean

    def fit(self, moments: "PatchMoments") -> None:
        """Set mean and components from the moments of patches.

        Raises:
            ValueError: if there are too few patches for the number of components.
        """
        mean, components = moments.compute_components(self.dim)
        self.mean.copy_(mean)
        self.components.copy_(components)


class PatchMoments:
    """Running mean and scatter matrix of patches, in float64, for principal components."""

    def __init__(self, patch_dim: int) -> None:
        self.num_patches = 0
        self.mean = torch.zeros(patch_dim, dtype=torch.float64)
        self.scatter = torch.zeros(patch_dim, patch_dim, dtype=torch.float64)

    def update(self, patches: Tensor) -> None:
        """Add patches, float [..., P]."""
        x = patches.detach().flatten(0, -2).double().cpu()
        count, mean = len(x), x.mean(0)
        step = mean - self.mean
        total = self.num_patches + count
        self.scatter += (x - mean).T @ (x - mean) + torch.outer(step, step) * self.num_patches * count / total
        self.mean += step * count / total
        self.num_patches = total

    def compute_components(self, num_components: int) -> tuple[Tensor, Tensor]:
        """Return the mean, float64 [P], and the largest components, float64 [num_components, P].

        The value of largest magnitude in each component is positive, so that the signs are reproducible.

        Raises:
            ValueError: if there are not more patches than components.
        """
        if self.num_patches <= num_components:
            raise ValueError(
                f"Cannot fit {num_components} principal components to {self.num_patches} patches. "
                "Give more images, or a smaller --pca-components."
            )
        vectors = torch.linalg.eigh(self.scatter).eigenvectors.flip(1)[:, :num_components].T
        largest = vectors.gather(1, vectors.abs().argmax(dim=1, keepdim=True))
        return self.mean, vectors * largest.sign()


class HOGTarget(nn.Module):
    """Histograms of oriented gradients of the cells of a patch, per channel (MaskFeat, Wei et al. 2022).

    They are computed on the whole image, so the gradients at the edge of a patch include its neighbours. The
    normalisation of a channel does not change them. The values of a patch are in the order cell row, cell
    column, channel, orientation.
    """

    def __init__(self, patch_size: int, in_chans: int) -> None:
        super().__init__()
        self.cell_size = compute_hog_cell_size(patch_size)
        self.cells_per_side = patch_size // self.cell_size
        self.dim = compute_hog_dim(patch_size, in_chans)

    @torch.no_grad()
    def forward(self, images: Tensor, patches: Tensor, indices: Tensor | None) -> Tensor:
        histograms = compute_hog(images.float(), self.cell_size)  # [B, C, O, H/c, W/c]
        values = patchify(histograms.flatten(1, 2), self.cells_per_side)  # [B, L, dim]
        return values if indices is None else gather_patches(values, indices)

    def loss(self, pred: Tensor, truth: Tensor) -> Tensor:
        return F.mse_loss(pred.float(), truth, reduction="none").mean(dim=-1)

    def to_pixels(self, pred: Tensor, mean: Tensor, std: Tensor) -> None:
        return None


class VisualTokenizer(Protocol):
    """The interface of a tokenizer, which maps each patch to one of a fixed number of visual tokens."""

    @property
    def codebook_size(self) -> int:
        """The number of visual tokens."""
        ...

    def tokenize(self, images: Tensor) -> Tensor:
        """Return the token of each patch, int64 [B, L] in row-major order.

        Args:
            images: float [B, C, H, W], normalised as for the model.
        """
        ...


class TokenTarget(nn.Module):
    """The visual tokens of the patches from a tokenizer, with a cross-entropy loss (BEiT, Bao et al. 2021).

    The tokenizer is not a part of the model's weights. A trained model can be used without it; training it
    further needs the tokenizer again.
    """

    tokenizer: VisualTokenizer | None

    def __init__(self, codebook_size: int) -> None:
        super().__init__()
        self.dim = codebook_size
        self.tokenizer = None

    def set_tokenizer(self, tokenizer: VisualTokenizer) -> None:
        """Set the tokenizer. It must be on the device of the images.

        Raises:
            UserError: if its codebook has another size than the model's.
        """
        if tokenizer.codebook_size != self.dim:
            raise UserError(
                f"The tokenizer has {tokenizer.codebook_size} visual tokens, and the model predicts "
                f"{self.dim}. Give the tokenizer that the model was trained with."
            )
        object.__setattr__(self, "tokenizer", tokenizer)  # not registered as a submodule, so not saved

    @torch.no_grad()
    def forward(self, images: Tensor, patches: Tensor, indices: Tensor | None) -> Tensor:
        if self.tokenizer is None:
            raise UserError("The model predicts visual tokens, and has no tokenizer. Give --tokenizer RUN.")
        tokens = self.tokenizer.tokenize(images)  # [B, L]
        if tokens.shape != patches.shape[:2]:
            raise UserError(
                f"The tokenizer gives {tokens.shape[1]} tokens for an image of {patches.shape[1]} patches. "
                "Give a tokenizer with the model's patch size."
            )
        return tokens if indices is None else gather_patches(tokens, indices)

    def loss(self, pred: Tensor, truth: Tensor) -> Tensor:
        return F.cross_entropy(pred.float().movedim(-1, 1), truth, reduction="none")

    def to_pixels(self, pred: Tensor, mean: Tensor, std: Tensor) -> None:
        return None


def create_target(config: MAEConfig) -> PixelTarget | PCATarget | HOGTarget | TokenTarget:
    """Create the target of a configuration.

    Raises:
        UserError: if the target is visual tokens and the codebook size is not set.
    """
    if config.target == "pca":
        return PCATarget(config.shape.patch_size**2 * config.in_chans, config.target_dim)
    if config.target == "hog":
        return HOGTarget(config.shape.patch_size, config.in_chans)
    if config.target == "tokens":
        return TokenTarget(config.target_dim)
    return PixelTarget(config.target_dim, normalize=config.norm_pix_loss)


def compute_patch_statistics(patches: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean and the standard deviation of patches, float [..., P] -> two of float [..., 1].

    The epsilon is added to the variance, inside the square root.
    """
    variance, mean = torch.var_mean(patches, dim=-1, keepdim=True, correction=1)
    return mean, (variance + NORM_PIX_EPS).sqrt()


def compute_distance_weights(indices: Tensor, neighbors: Tensor, num_columns: int) -> Tensor:
    """Compute weights of neighbouring patches that fall with the fourth power of their distance.

    Args:
        indices: int64 [N, M], patches.
        neighbors: int64 [N, V], other patches, none of which is in `indices`.
        num_columns: the number of columns of the grid of patches.

    Returns:
        float32 [N, M, V]; the weights of the neighbours of a patch sum to 1.
    """
    positions = [
        torch.stack([i // num_columns, i % num_columns], dim=2).float() for i in (indices, neighbors)
    ]
    weights = torch.cdist(*positions) ** -4.0
    return weights / weights.sum(dim=2, keepdim=True)
