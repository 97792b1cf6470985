"""Figures of a model's attention maps, patch tokens and reconstructions.

The attention weights are those of the actual forward pass. Hooks take the input of every attention layer and
compute the weights from it again, because fused attention does not return them.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quarterview.data.transforms.crop import normalize
from quarterview.evaluation.config import LookConfig
from quarterview.evaluation.panel import (
    describe_channels,
    describe_reconstruction,
    draw_image_grid,
    make_mask_noise,
    make_reconstruction_rows,
    read_images,
    to_display_range,
)
from quarterview.models.classifier import Classifier
from quarterview.models.mae import MaskedAutoencoder
from quarterview.models.vit import Attention
from quarterview.weights.loading import build_model, read_weights

_NUM_COMPONENTS = 3
_TRIMMED_FRACTION = 0.01  # of each component, at both ends
_GRAY_WEIGHT, _HEAT_WEIGHT = 0.35, 0.75
_LUMINANCE = (0.299, 0.587, 0.114)  # ITU-R 601
_MIN_SIDE = 128  # pixels of the longer side of a heat map


class AttentionMaps(NamedTuple):
    """Tokens and attention maps of B images with L patches and K cls tokens."""

    tokens: Tensor
    """float [B, K + L, D], the output of `encode`."""
    attention: Tensor
    """float [B, heads, L], weights from the cls token to the patches in the last block, averaged over cls
    tokens. Weights to cls tokens are left out, so the sums are at most 1."""
    rollout: Tensor
    """float [B, L], attention rollout from the cls token to the patches (Abnar and Zuidema 2020)."""


def compute_attention_weights(attention: Attention, x: Tensor) -> Tensor:
    """Compute the attention weights of a layer.

    Args:
        x: float [B, T, D], the input of the layer.

    Returns:
        float [B, heads, T, T], queries first, then keys; the rows sum to 1.
    """
    batch, tokens, width = x.shape
    qkv = attention.qkv(x).view(batch, tokens, 3, attention.num_heads, width // attention.num_heads)
    query, key, _ = qkv.permute(2, 0, 3, 1, 4)  # each [B, heads, T, D / heads]
    return (query @ key.transpose(2, 3) * query.shape[3] ** -0.5).softmax(dim=3)


@torch.no_grad()
def compute_attention_maps(model: MaskedAutoencoder | Classifier, images: Tensor) -> AttentionMaps:
    """Encode unmasked images and compute the attention maps of the cls token.

    The rollout is the product of the attention weights of all blocks, each averaged over the heads and, for
    the residual connection, with the identity. It estimates how much each patch contributes to the cls token
    if only attention mixes tokens. Images are encoded one at a time, because the weights of many tokens are
    large.

    Args:
        images: float [B, C, H, W], normalised.
    """
    maps = [_compute_one(model, image) for image in images.split(1)]
    return AttentionMaps(*(torch.cat(parts) for parts in zip(*maps, strict=True)))


def _compute_one(model: MaskedAutoencoder | Classifier, image: Tensor) -> AttentionMaps:
    attention = rollout = image.new_empty(0)
    cls = model.config.cls_tokens

    def hook(layer: nn.Module, arguments: tuple[Any, ...]) -> None:
        nonlocal attention, rollout
        assert isinstance(layer, Attention)
        weights = compute_attention_weights(layer, arguments[0])  # [1, heads, K + L, K + L]
        attention = weights[:, :, :cls, cls:].mean(dim=2)
        mixed = (weights.mean(dim=1) + torch.eye(weights.shape[2], device=weights.device)) / 2
        rollout = mixed @ rollout if rollout.numel() else mixed

    with ExitStack() as hooks:
        for block in model.blocks:
            hooks.enter_context(block.get_submodule("attn").register_forward_pre_hook(hook))
        tokens = model.encode(image)
    return AttentionMaps(tokens, attention, rollout[:, :cls, cls:].mean(dim=1))


def compute_principal_colors(tokens: Tensor) -> tuple[Tensor, float]:
    """Compute colours from the first three principal components of the patch tokens of all images.

    Each component is scaled from its 1st and 99th percentile to 0 and 1. Patches of similar colours have
    similar tokens, also across images.

    Args:
        tokens: float [B, L, D].

    Returns:
        float [B, L, 3] in [0, 1], and the ratio of the variance that the three components explain.
    """
    from sklearn.decomposition import PCA

    flat = tokens.flatten(0, 1).double().cpu()  # [B * L, D]
    num_components = min(_NUM_COMPONENTS, *flat.shape)
    pca = PCA(num_components, svd_solver="full")
    components = torch.zeros(len(flat), _NUM_COMPONENTS, dtype=torch.float64)
    has_variance = bool((flat != flat[0]).any())
    if has_variance:  # equal tokens have no principal components
        components[:, :num_components] = torch.from_numpy(pca.fit_transform(flat.numpy()))
    quantiles = torch.tensor([_TRIMMED_FRACTION, 1 - _TRIMMED_FRACTION], dtype=torch.float64)
    low, high = components.quantile(quantiles, dim=0)
    width = torch.where(high > low, high - low, 1.0)
    colors = torch.where(high > low, ((components - low) / width).clamp(0, 1), 0.5)
    ratio = float(pca.explained_variance_ratio_.sum()) if has_variance else 0.0
    return colors.float().view(*tokens.shape[:2], _NUM_COMPONENTS), ratio


def remove_position(tokens: Tensor, grid: Sequence[int]) -> Tensor:
    """Subtract from patch tokens the part that depends only on the position of the patch.

    This part is the same for every image: the quadratic surface over rows and columns that fits the mean
    tokens best. Without this step, the first principal components of a masked autoencoder mainly show
    positions.

    Args:
        tokens: float [B, L, D].
        grid: number of rows and columns of patches, with product L.

    Returns:
        float64 [B, L, D], on the CPU.
    """
    tokens = tokens.double().cpu()
    axes = (torch.linspace(-1, 1, count, dtype=torch.float64) for count in grid)
    row, column = (coordinate.flatten() for coordinate in torch.meshgrid(*axes, indexing="ij"))  # [L] each
    surface = torch.stack(
        [torch.ones_like(row), row, column, row * row, column * column, row * column], dim=1
    )  # [L, 6]
    # With few rows or columns the matrix has less than full rank, which gelsd accepts.
    fit = torch.linalg.lstsq(surface, tokens.mean(dim=0), driver="gelsd").solution  # [6, D]
    return tokens - surface @ fit


def draw_look_figure(
    model: MaskedAutoencoder | Classifier,
    images: Tensor,
    path: Path,
    title: str = "",
    seed: int = 0,
    heads: int = 6,
    has_decoder: bool = True,
) -> None:
    """Write a PNG with a column for each image.

    The rows are: the original; the attention of the cls token in the last block, averaged over the heads and
    for each of the first `heads` heads; the attention rollout; the principal components of the patch tokens,
    with and without the position; and, for a model with a decoder, the visible patches and the
    reconstruction.

    Args:
        images: float [B, C, H, W], normalised.
        path: PNG file to write.
        title: first line of the caption.
        seed: seed of the masks.
        heads: number of attention heads that are drawn separately.
        has_decoder: True if a masked autoencoder has the decoder that it was trained with.
    """
    config = model.config
    original = to_display_range(images, config.mean, config.std)
    maps = compute_attention_maps(model, images)
    tokens = maps.tokens[:, config.cls_tokens :]
    rows = {
        "original": original,
        "attention": _overlay_heatmap(original, maps.attention.mean(1), config.grid),
    }
    for head in range(min(heads, maps.attention.shape[1])):
        rows[f"head {head + 1}"] = _overlay_heatmap(original, maps.attention[:, head], config.grid)
    rows["rollout"] = _overlay_heatmap(original, maps.rollout, config.grid)
    ratios = []
    without_position = remove_position(tokens, config.grid)
    for name, features in {"tokens": tokens, "no position": without_position}.items():
        colors, ratio = compute_principal_colors(features)
        rows[name] = colors.transpose(1, 2).unflatten(2, config.grid)
        ratios.append(ratio)
    can_reconstruct = isinstance(model, MaskedAutoencoder) and has_decoder and model.config.can_reconstruct
    sentences = [*([title] if title else []), *_make_caption(model, ratios, can_reconstruct)]
    if isinstance(model, MaskedAutoencoder) and can_reconstruct:
        rows |= make_reconstruction_rows(model, images, make_mask_noise(model, len(images), seed))
    draw_image_grid(rows, "\n".join([*sentences, *describe_channels(config.in_chans)]), path)


def _make_caption(
    model: MaskedAutoencoder | Classifier, ratios: Sequence[float], can_reconstruct: bool
) -> list[str]:
    tokens = "cls tokens" if model.config.cls_tokens > 1 else "cls token"
    sentences = [
        f"Attention: from the {tokens} to the patches in the last block; bright is high.",
        "Rollout: attention through all blocks (Abnar and Zuidema 2020).",
        f"Tokens: three principal components of all patch tokens, {ratios[0]:.0%} of their variance.",
        f"No position: the same without what depends on the position alone, {ratios[1]:.0%}.",
    ]
    if isinstance(model, MaskedAutoencoder) and can_reconstruct:
        return [*sentences, *describe_reconstruction(model)]
    if isinstance(model, Classifier) and model.config.pool == "mean":
        sentences.append(f"This classifier uses the mean of its patch tokens, not its {tokens}.")
    return [*sentences, "No reconstruction: this model does not predict pixels."]


def _overlay_heatmap(original: Tensor, weights: Tensor, grid: Sequence[int]) -> Tensor:
    """Draw weights over patches as a heat map over gray images, black at 0 and brightest at the maximum.

    Args:
        original: float [B, C, H, W] in [0, 1].
        weights: float [B, L].

    Returns:
        float [B, 3, h, w] in [0, 1], enlarged if the images are small.
    """
    size = _magnify_size(original.shape[2:])
    rgb = original[:, :3] if original.shape[1] >= 3 else original[:, :1].expand(-1, 3, -1, -1)
    luminance = (rgb * torch.tensor(_LUMINANCE, device=original.device)[:, None, None]).sum(1, keepdim=True)
    gray = F.interpolate(luminance, size=size, mode="nearest")  # [B, 1, h, w]
    relative = weights / weights.amax(dim=1, keepdim=True).clamp(min=torch.finfo(weights.dtype).tiny)
    smooth = F.interpolate(relative.unflatten(1, tuple(grid))[:, None], size=size, mode="bicubic").clamp(0, 1)
    colors = matplotlib.colormaps["inferno"](smooth[:, 0].cpu().numpy())[..., :3]  # [B, h, w, 3]
    heat = torch.from_numpy(colors).float().permute(0, 3, 1, 2).to(gray.device)
    return (_GRAY_WEIGHT * gray + _HEAT_WEIGHT * heat).clamp(0, 1)


def _magnify_size(size: Sequence[int]) -> tuple[int, int]:
    """Return the size times the smallest integer that makes the longer side at least 128 pixels."""
    factor = -(-_MIN_SIDE // max(size))
    return size[0] * factor, size[1] * factor


def look(config: LookConfig) -> Path:
    """Draw the attention, the tokens and the reconstructions of a model for images from files.

    Returns:
        The path of the PNG file.

    Raises:
        UserError: if the model or an image cannot be read.
    """
    weights = read_weights(config.run)
    model = build_model(weights)
    in_chans = model.config.in_chans
    batch = read_images(config.images, in_chans, model.config.image_size)
    mean, std = model.config.mean or (0.0,) * in_chans, model.config.std or (1.0,) * in_chans
    images, out, title = normalize(batch, mean, std), Path(config.out), Path(config.run).name
    draw_look_figure(model, images, out, title, config.seed, config.heads, weights.has_decoder)
    return out
