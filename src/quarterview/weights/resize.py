"""Adapt weights to another image size, patch size or number of channels."""

import torch
import torch.nn.functional as F
from torch import Tensor

from quarterview.models.config import ViTConfig
from quarterview.models.positions import get_2d_sincos_pos_embed
from quarterview.weights.convert.architecture import is_sincos


def adapt_weights(
    tensors: dict[str, Tensor], source_config: ViTConfig, config: ViTConfig
) -> tuple[dict[str, Tensor], list[str]]:
    """Adapt weights to a configuration with another image size, patch size or number of channels.

    Args:
        tensors: the weights, by name.
        source_config: the configuration of the weights.
        config: the configuration to adapt them to.

    Returns:
        The adapted weights, and notes that describe each change.
    """
    tensors, notes = dict(tensors), []
    if source_config.in_chans != config.in_chans:
        rule = _describe_channel_rule(source_config.in_chans, config.in_chans)
        notes.append(f"channels: {source_config.in_chans} -> {config.in_chans}, {rule}")
    old_patch_size, patch_size = source_config.shape.patch_size, config.shape.patch_size
    if old_patch_size != patch_size:
        notes.append(
            f"patches: {old_patch_size} -> {patch_size} pixels, the kernel is resized by pseudo-inverse"
        )
    name = "patch_embed.proj.weight"
    tensors[name] = resize_patch_embed(adapt_channels(tensors[name], config.in_chans), patch_size)
    for name in ("decoder_pred.weight", "decoder_pred.bias"):
        if name in tensors and getattr(source_config, "target", "pixels") == "pixels":
            tensors[name] = resize_prediction_head(
                tensors[name], old_patch_size, source_config.in_chans, patch_size, config.in_chans
            )
    for name in ("pos_embed", "decoder_pos_embed"):
        if name in tensors and source_config.grid != config.grid:
            tensors[name], method = resize_pos_embed(tensors[name], source_config.grid, config.grid)
            grids = f"{_format_grid(source_config.grid)} -> {_format_grid(config.grid)}"
            notes.append(f"{name}: {grids} patches, {method}")
    return tensors, notes


def _format_grid(grid: tuple[int, int]) -> str:
    return f"{grid[0]}×{grid[1]}"


def _describe_channel_rule(old_in_chans: int, in_chans: int) -> str:
    if in_chans == 1:
        return "summed in the kernel and averaged in the prediction head"
    return f"channel c from channel c mod {old_in_chans}, the kernel times {old_in_chans}/{in_chans}"


# ---------------------------------------------------------------------- channels


def adapt_channels(kernel: Tensor, in_chans: int) -> Tensor:
    """Adapt the kernel of a patch embedding [D, C, p, p] to another number of channels.

    A single channel takes the sum over all channels, so that a gray image is embedded as an image with equal
    channels was. Several channels repeat the old ones in turn, scaled by old / new (the rule of timm's
    ``adapt_input_conv`` for RGB). If the old number divides the new one, images with equal channels are
    embedded as before.
    """
    old_in_chans = kernel.shape[1]
    if in_chans == old_in_chans:
        return kernel
    if in_chans == 1:
        return kernel.sum(dim=1, keepdim=True)
    return kernel[:, torch.arange(in_chans) % old_in_chans] * (old_in_chans / in_chans)


# ---------------------------------------------------------------------- patches


def compute_resize_matrix(old_size: int, new_size: int) -> Tensor:
    """Return the matrix of bicubic, antialiased resizing of square patches: float64 [new², old²]."""
    basis = torch.eye(old_size**2, dtype=torch.float64).view(old_size**2, 1, old_size, old_size)
    resized = F.interpolate(basis, (new_size, new_size), mode="bicubic", antialias=True)
    return resized.view(old_size**2, new_size**2).T


def resize_patch_embed(kernel: Tensor, patch_size: int) -> Tensor:
    """Resize the kernel of a patch embedding [D, C, p, p] to another patch size.

    Uses the pseudo-inverse of bicubic resizing (FlexiViT, Beyer et al. 2023, section 3.4): an enlarged patch
    is embedded exactly as the original patch was.
    """
    old_patch_size = kernel.shape[2]
    if patch_size == old_patch_size:
        return kernel
    inverse = torch.linalg.pinv(compute_resize_matrix(old_patch_size, patch_size).T)  # [new², old²]
    resized = kernel.double().flatten(2) @ inverse.T  # [D, C, new²]
    return resized.unflatten(2, (patch_size, patch_size)).to(kernel.dtype)


def resize_prediction_head(
    weight: Tensor, old_patch_size: int, old_in_chans: int, patch_size: int, in_chans: int
) -> Tensor:
    """Adapt the weight [p*p*C, E] or bias [p*p*C] of the pixel prediction head to other patches and channels.

    The adapted head predicts the resized patch. Channels are repeated in turn, as in `adapt_channels`; a
    single channel takes the mean over all channels.
    """
    if (old_patch_size, old_in_chans) == (patch_size, in_chans):
        return weight
    maps = weight.double().view(old_patch_size**2, old_in_chans, -1)
    channels = torch.arange(in_chans) % old_in_chans
    maps = maps.mean(dim=1, keepdim=True) if in_chans == 1 else maps[:, channels]
    if patch_size != old_patch_size:
        maps = torch.einsum("ab,bce->ace", compute_resize_matrix(old_patch_size, patch_size), maps)
    return maps.reshape(-1, *weight.shape[1:]).to(weight.dtype)


# ---------------------------------------------------------------------- positions


def resize_pos_embed(
    pos_embed: Tensor, old_grid: tuple[int, int], grid: tuple[int, int]
) -> tuple[Tensor, str]:
    """Resize a position embedding [1, 1 + L, D] to another grid of patches.

    A fixed sine-cosine embedding is computed for the new grid. A learned one is interpolated (bicubic,
    antialiased); the position of the cls token is kept.

    Returns:
        The new embedding, and the method: "computed anew" or "interpolated".
    """
    if is_sincos(pos_embed, old_grid):
        return get_2d_sincos_pos_embed(pos_embed.shape[2], grid).to(pos_embed.dtype), "computed anew"
    cls, patches = pos_embed[:, :1], pos_embed[:, 1:]
    maps = patches.float().unflatten(1, old_grid).permute(0, 3, 1, 2)  # [1, D, rows, columns]
    resized = F.interpolate(maps, grid, mode="bicubic", antialias=True)
    return torch.cat([cls, resized.flatten(2).transpose(1, 2).to(pos_embed.dtype)], dim=1), "interpolated"
