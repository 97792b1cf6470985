"""Fit weights to images of another size, patches of another size, or another number of channels."""

import torch
import torch.nn.functional as F
from torch import Tensor

from quarterview.models.config import ViTConfig
from quarterview.models.positions import sincos_2d
from quarterview.weights.convert.architecture import is_sincos


def adapt(
    tensors: dict[str, Tensor], theirs: ViTConfig, ours: ViTConfig
) -> tuple[dict[str, Tensor], list[str]]:
    """Weights of one configuration for another, which may differ in image size, patch size and channels.

    Returns:
        The weights, and what was done to them in words.
    """
    tensors, notes = dict(tensors), []
    if theirs.in_chans != ours.in_chans:
        notes.append(
            f"channels: {theirs.in_chans} -> {ours.in_chans}, {_rule(theirs.in_chans, ours.in_chans)}"
        )
    before, patch = theirs.shape.patch_size, ours.shape.patch_size
    if before != patch:
        notes.append(f"patches: {before} -> {patch} pixels, the kernel resized by pseudo-inverse")
    name = "patch_embed.proj.weight"
    tensors[name] = resize_patches(adapt_channels(tensors[name], ours.in_chans), patch)
    for name in ("decoder_pred.weight", "decoder_pred.bias"):
        if name in tensors and getattr(theirs, "target", "pixels") == "pixels":
            tensors[name] = resize_prediction(tensors[name], before, theirs.in_chans, patch, ours.in_chans)
    for name in ("pos_embed", "decoder_pos_embed"):
        if name in tensors and theirs.grid != ours.grid:
            tensors[name], how = resize_positions(tensors[name], theirs.grid, ours.grid)
            notes.append(f"{name}: {_by(theirs.grid)} -> {_by(ours.grid)} patches, {how}")
    return tensors, notes


def _by(grid: tuple[int, int]) -> str:
    return f"{grid[0]}×{grid[1]}"


def _rule(theirs: int, ours: int) -> str:
    if ours == 1:
        return "summed in the kernel and averaged in the prediction"
    return f"each taken from its number modulo {theirs}, the kernel times {theirs}/{ours}"


# ---------------------------------------------------------------------- channels


def adapt_channels(kernel: Tensor, channels: int) -> Tensor:
    """A patch embedding's kernel [D, C, p, p] for other channels.

    One channel takes the sum: a grey image then embeds as it did with all channels alike. Several
    repeat the old ones in turn, times old / new, so that the sum over alike channels stays too
    where the old number divides the new one (timm's rule for RGB).
    """
    before = kernel.shape[1]
    if channels == before:
        return kernel
    if channels == 1:
        return kernel.sum(dim=1, keepdim=True)
    return kernel[:, torch.arange(channels) % before] * (before / channels)


# ---------------------------------------------------------------------- patches


def resize_matrix(before: int, after: int) -> Tensor:
    """The linear map of bicubic resizing with antialiasing, of square patches: float64 [after², before²]."""
    basis = torch.eye(before**2, dtype=torch.float64).view(before**2, 1, before, before)
    resized = F.interpolate(basis, (after, after), mode="bicubic", antialias=True)
    return resized.view(before**2, after**2).T


def resize_patches(kernel: Tensor, patch_size: int) -> Tensor:
    """A patch embedding's kernel [D, C, p, p] for patches of another size.

    By the pseudo-inverse of resizing (Beyer et al. 2023, FlexiViT, section 3.4): a patch that is
    enlarged embeds exactly as it did before.
    """
    before = kernel.shape[2]
    if patch_size == before:
        return kernel
    inverse = torch.linalg.pinv(resize_matrix(before, patch_size).T)  # [after², before²]
    resized = kernel.double().flatten(2) @ inverse.T  # [D, C, after²]
    return resized.unflatten(2, (patch_size, patch_size)).to(kernel.dtype)


def resize_prediction(
    rows: Tensor, before: int, channels_before: int, patch_size: int, channels: int
) -> Tensor:
    """The last layer's weight [p*p*C, E] or bias [p*p*C], so that it predicts the patch resized.

    Channels are taken in turn as the kernel's are; a single one is the mean of them all.
    """
    if (before, channels_before) == (patch_size, channels):
        return rows
    maps = rows.double().view(before**2, channels_before, -1)
    if channels == 1:
        maps = maps.mean(dim=1, keepdim=True)
    else:
        maps = maps[:, torch.arange(channels) % channels_before]
    if patch_size != before:
        maps = torch.einsum("ab,bce->ace", resize_matrix(before, patch_size), maps)
    return maps.reshape(-1, *rows.shape[1:]).to(rows.dtype)


# ---------------------------------------------------------------------- positions


def resize_positions(table: Tensor, before: tuple[int, int], grid: tuple[int, int]) -> tuple[Tensor, str]:
    """A position table [1, 1 + L, D] for another grid of patches, and how it was made.

    The fixed sine-cosine table is computed anew. A learned one is interpolated, bicubic with
    antialiasing; the position of cls stays.
    """
    if is_sincos(table, before):
        return sincos_2d(table.shape[2], grid).to(table.dtype), "computed anew"
    cls, patches = table[:, :1], table[:, 1:]
    maps = patches.float().unflatten(1, before).permute(0, 3, 1, 2)  # [1, D, rows, columns]
    resized = F.interpolate(maps, grid, mode="bicubic", antialias=True)
    return torch.cat([cls, resized.flatten(2).transpose(1, 2).to(table.dtype)], dim=1), "interpolated"
