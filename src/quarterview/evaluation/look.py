"""What a model sees in pictures: where it attends, how its patch tokens group, and what it completes.

The attention weights are those of the real forward pass: the input of every block's attention is
caught on its way in, and the weights computed from it anew, because the pass itself never has to
hold them.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quarterview.data.transforms.crop import normalise
from quarterview.evaluation.config import LookConfig
from quarterview.evaluation.panel import (
    channels_caption,
    completed_caption,
    completed_rows,
    draw_rows,
    keyed_noise,
    read_pictures,
    shown,
)
from quarterview.models.classifier import Classifier
from quarterview.models.mae import MaskedAutoencoder
from quarterview.models.vit import Attention
from quarterview.weights.loading import open_model, read

_COMPONENTS = 3
_TRIMMED = 0.01
_GREY, _HEAT = 0.35, 0.75
_LUMINANCE = (0.299, 0.587, 0.114)
_PIXELS_A_SIDE = 128


class Seen(NamedTuple):
    """What a forward pass shows of B images with L patches each."""

    tokens: Tensor
    """float [B, K + L, D], what `encode` returns."""
    attention: Tensor
    """float [B, heads, L], from the cls token of the last block to the patches, of several on average; the
    weights to cls tokens are left out, so that the sums are at most 1."""
    rollout: Tensor
    """float [B, L], likewise through all blocks (Abnar and Zuidema 2020)."""


def attention_weights(attention: Attention, x: Tensor) -> Tensor:
    """The weights with which each token reads each.

    Args:
        x: float [B, T, D], what the layer is given.

    Returns:
        float [B, heads, T, T], reading tokens first; rows sum to 1.
    """
    batch, tokens, width = x.shape
    qkv = attention.qkv(x).view(batch, tokens, 3, attention.heads, width // attention.heads)
    query, key, _ = qkv.permute(2, 0, 3, 1, 4)  # each [B, heads, T, D / heads]
    return (query @ key.transpose(2, 3) * query.shape[3] ** -0.5).softmax(dim=3)


@torch.no_grad()
def see(model: MaskedAutoencoder | Classifier, images: Tensor) -> Seen:
    """Encode whole images and watch the attention.

    The rollout is the product of all blocks' weights, each averaged over the heads and, for the
    residual connection, with the identity: how much of each patch has come to the cls token, if
    nothing but attention mixed tokens. One image is encoded at a time, for the weights of many
    tokens are large.

    Args:
        images: float [B, C, H, W], normalised.
    """
    seen = [_see(model, image) for image in images.split(1)]
    return Seen(*(torch.cat(parts) for parts in zip(*seen, strict=True)))


def _see(model: MaskedAutoencoder | Classifier, image: Tensor) -> Seen:
    attention = rollout = image.new_empty(0)
    cls = model.config.cls_tokens

    def watch(layer: nn.Module, arguments: tuple[Any, ...]) -> None:
        nonlocal attention, rollout
        assert isinstance(layer, Attention)
        weights = attention_weights(layer, arguments[0])  # [1, heads, K + L, K + L]
        attention = weights[:, :, :cls, cls:].mean(dim=2)
        mixed = (weights.mean(dim=1) + torch.eye(weights.shape[2], device=weights.device)) / 2
        rollout = mixed @ rollout if rollout.numel() else mixed

    with ExitStack() as hooks:
        for block in model.blocks:
            hooks.enter_context(block.get_submodule("attn").register_forward_pre_hook(watch))
        tokens = model.encode(image)
    return Seen(tokens, attention, rollout[:, :cls, cls:].mean(dim=1))


def principal_colours(tokens: Tensor) -> tuple[Tensor, float]:
    """The first three principal components of the patch tokens of all images together, as colours.

    Each component is stretched from its 1st to its 99th percentile. Patches of like colour have like
    tokens, across images, too.

    Args:
        tokens: float [B, L, D].

    Returns:
        float [B, L, 3] in [0, 1], and the share of the variance that the three components hold.
    """
    from sklearn.decomposition import PCA

    flat = tokens.flatten(0, 1).double().cpu()  # [B * L, D]
    count = min(_COMPONENTS, *flat.shape)
    analysis = PCA(count, svd_solver="full")
    components = torch.zeros(len(flat), _COMPONENTS, dtype=torch.float64)
    varied = bool((flat != flat[0]).any())
    if varied:  # tokens that are all alike have no components
        components[:, :count] = torch.from_numpy(analysis.fit_transform(flat.numpy()))
    ends = torch.tensor([_TRIMMED, 1 - _TRIMMED], dtype=torch.float64)
    low, high = components.quantile(ends, dim=0)
    spread = torch.where(high > low, high - low, 1.0)
    colours = torch.where(high > low, ((components - low) / spread).clamp(0, 1), 0.5)
    share = float(analysis.explained_variance_ratio_.sum()) if varied else 0.0
    return colours.float().view(*tokens.shape[:2], _COMPONENTS), share


def without_position(tokens: Tensor, grid: Sequence[int]) -> Tensor:
    """Patch tokens less what tells only where a patch is.

    The part left out is the same for every image: the quadratic surface over rows and columns that fits
    the tokens best. Else the first components of a masked autoencoder are its positions and little else.

    Args:
        tokens: float [B, L, D].
        grid: rows and columns, of which L is the product.

    Returns:
        float64 [B, L, D], on the CPU.
    """
    tokens = tokens.double().cpu()
    axes = (torch.linspace(-1, 1, count, dtype=torch.float64) for count in grid)
    row, column = (place.flatten() for place in torch.meshgrid(*axes, indexing="ij"))  # [L] each
    surface = torch.stack(
        [torch.ones_like(row), row, column, row * row, column * column, row * column], dim=1
    )  # [L, 6]
    # Of less than full rank where there are few rows or columns, which gelsd takes as it is.
    fit = torch.linalg.lstsq(surface, tokens.mean(dim=0), driver="gelsd").solution  # [6, D]
    return tokens - surface @ fit


def draw_look(
    model: MaskedAutoencoder | Classifier,
    images: Tensor,
    path: Path,
    title: str = "",
    seed: int = 0,
    heads: int = 6,
    completes: bool = True,
) -> None:
    """Write a PNG with a column for each image.

    The rows are the original; the attention of the cls token in the last block, as the mean of its
    heads and of each of the first `heads`; the attention rollout; the patch tokens' principal
    components, as they are and without position; and, of a model with a decoder, what it makes of a
    quarter of the picture.

    Args:
        images: float [B, C, H, W], normalised.
        seed: of the masks.
        completes: whether a masked autoencoder has the decoder that it was trained with.
    """
    config = model.config
    original = shown(images, config.mean, config.std)
    seen = see(model, images)
    tokens = seen.tokens[:, config.cls_tokens :]
    rows = {"original": original, "attention": _heat(original, seen.attention.mean(1), config.grid)}
    for head in range(min(heads, seen.attention.shape[1])):
        rows[f"head {head + 1}"] = _heat(original, seen.attention[:, head], config.grid)
    rows["rollout"] = _heat(original, seen.rollout, config.grid)
    shares = []
    for name, some in {"tokens": tokens, "less position": without_position(tokens, config.grid)}.items():
        colours, share = principal_colours(some)
        rows[name] = colours.transpose(1, 2).unflatten(2, config.grid)
        shares.append(share)
    autoencoder = isinstance(model, MaskedAutoencoder) and completes and model.config.predicts_pictures
    sentences = [*([title] if title else []), *_caption(model, shares, autoencoder)]
    if isinstance(model, MaskedAutoencoder) and autoencoder:
        rows |= completed_rows(model, images, keyed_noise(model, len(images), seed))
    draw_rows(rows, "\n".join([*sentences, *channels_caption(config.in_chans)]), path)


def _caption(model: MaskedAutoencoder | Classifier, shares: Sequence[float], autoencoder: bool) -> list[str]:
    tokens = "cls tokens" if model.config.cls_tokens > 1 else "cls token"
    sentences = [
        f"Attention: from the {tokens} of the last block to the patches, brightest where most.",
        "Rollout: the same through all blocks (Abnar and Zuidema 2020).",
        f"Tokens: three principal components of all patch tokens, {shares[0]:.0%} of their variance;",
        f"less position: after removing what depends on the place alone, {shares[1]:.0%} of the rest.",
    ]
    if isinstance(model, MaskedAutoencoder) and autoencoder:
        return [*sentences, *completed_caption(model)]
    if isinstance(model, Classifier) and model.config.pool == "mean":
        sentences.append(f"This classifier reads the mean of its patch tokens and not its {tokens}.")
    return [*sentences, "No reconstruction: this model predicts no pictures."]


def _heat(original: Tensor, weights: Tensor, grid: Sequence[int]) -> Tensor:
    """Weights over patches as a glow over the greyed pictures, black at 0 and brightest at the largest.

    Args:
        original: float [B, C, H, W] in [0, 1].
        weights: float [B, L].

    Returns:
        float [B, 3, h, w] in [0, 1], magnified where the pictures are small.
    """
    size = _magnified(original.shape[2:])
    three = original[:, :3] if original.shape[1] >= 3 else original[:, :1].expand(-1, 3, -1, -1)
    luminance = (three * torch.tensor(_LUMINANCE, device=original.device)[:, None, None]).sum(1, keepdim=True)
    grey = F.interpolate(luminance, size=size, mode="nearest")  # [B, 1, h, w]
    relative = weights / weights.amax(dim=1, keepdim=True).clamp(min=torch.finfo(weights.dtype).tiny)
    smooth = F.interpolate(relative.unflatten(1, tuple(grid))[:, None], size=size, mode="bicubic").clamp(0, 1)
    colours = matplotlib.colormaps["inferno"](smooth[:, 0].cpu().numpy())[..., :3]  # [B, h, w, 3]
    glow = torch.from_numpy(colours).float().permute(0, 3, 1, 2).to(grey.device)
    return (_GREY * grey + _HEAT * glow).clamp(0, 1)


def _magnified(size: Sequence[int]) -> tuple[int, int]:
    """The size times the whole number that makes the longer side at least 128 pixels."""
    times = -(-_PIXELS_A_SIDE // max(size))
    return size[0] * times, size[1] * times


def look(config: LookConfig) -> Path:
    """Draw what a model sees in images from files.

    Returns:
        The PNG.

    Raises:
        UserError: if the model or an image cannot be read.
    """
    weights = read(config.run)
    model = open_model(weights)
    shape = model.config
    batch = read_pictures(config.images, shape.in_chans, shape.image_size)
    mean, std = shape.mean or (0.0,) * shape.in_chans, shape.std or (1.0,) * shape.in_chans
    images, out, title = normalise(batch, mean, std), Path(config.out), Path(config.run).name
    draw_look(model, images, out, title, config.seed, config.heads, weights.has_decoder)
    return out
