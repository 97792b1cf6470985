"""Open image tokenizers: those of this package, and DALL-E's, as transformers implements it."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quarterview.errors import UserError, missing_package, unreadable
from quarterview.models.config import MAEConfig
from quarterview.models.targets import VisualTokenizer
from quarterview.models.tokenizer import DiscreteVAE, RenormalizingTokenizer
from quarterview.weights.loading import find_weights_file, load_tokenizer

DALLE_PATCH_SIZE = 8
"""Side of the patch, in pixels, that DALL-E's encoder maps to one visual token."""
_LOGIT_LAPLACE_EPS = 0.1
"""DALL-E maps pixels to 0.1…0.9 (Ramesh et al. 2021, appendix A; ``map_pixels`` of the official code)."""


class LoadedTokenizer(NamedTuple):
    """A tokenizer, and the normalisation of its images."""

    tokenizer: VisualTokenizer
    mean: tuple[float, ...]
    std: tuple[float, ...]
    patch_size: int | None
    """Side of the patch, in pixels, of one visual token; None if images are resized to fit the grid."""
    digest: str
    """BLAKE2b digest of the tokenizer's weights: 16 hex digits."""

    @property
    def codebook_size(self) -> int:
        """Number of entries of the codebook."""
        return self.tokenizer.codebook_size

    def match_model(self, config: MAEConfig, device: torch.device) -> VisualTokenizer:
        """Return the tokenizer for images that are normalised as those of a model.

        Raises:
            UserError: if the patch size or the number of channels differs from that of the model.
        """
        if self.patch_size not in (None, config.shape.patch_size):
            raise UserError(
                f"The tokenizer's patches have {self.patch_size} pixels, but those of {config.model} have "
                f"{config.shape.patch_size}. Give a tokenizer with the same patch size."
            )
        if len(self.mean) != config.in_chans:
            raise UserError(
                f"The tokenizer has {len(self.mean)} channels, but the model has {config.in_chans}. Give a "
                "tokenizer with the same number."
            )
        assert config.mean is not None
        assert config.std is not None
        tokenizer = self.tokenizer
        if isinstance(tokenizer, DalleTokenizer):
            tokenizer.grid = config.grid
        return RenormalizingTokenizer(tokenizer, (self.mean, self.std), (config.mean, config.std), device)


def open_tokenizer(path: str, resolved: Mapping[str, Any], device: torch.device) -> LoadedTokenizer:
    """Open a tokenizer.

    Args:
        path: a run of `quarterview tokenizer`, or a folder of transformers' FlavaImageCodebook.
        resolved: the values that a resumed run has recorded; its ``tokenizer_digest`` must match.
        device: where the tokenizer is moved to.

    Raises:
        UserError: if the path has no tokenizer, or not the one that the resumed run used.
    """
    folder = Path(path)
    opened = _open_dalle(folder, device) if (folder / "config.json").is_file() else _open_native(path, device)
    if opened.digest != resolved.get("tokenizer_digest", opened.digest):
        raise UserError(
            f"{path} is another tokenizer than the run was started with: its digest is {opened.digest}. "
            f"Give the tokenizer with digest {resolved['tokenizer_digest']}."
        )
    return opened


def _open_native(path: str, device: torch.device) -> LoadedTokenizer:
    model: DiscreteVAE = load_tokenizer(path).to(device)
    config = model.config
    return LoadedTokenizer(
        model, config.mean, config.std, config.patch_size, compute_file_digest(find_weights_file(path))
    )


def _open_dalle(folder: Path, device: torch.device) -> LoadedTokenizer:
    try:
        from transformers import FlavaImageCodebook
    except ImportError:
        raise missing_package("transformers", "DALL-E's tokenizer", "transformers") from None
    weights = folder / "model.safetensors"
    if not weights.is_file():
        raise unreadable(folder, "it has no model.safetensors", "Give a folder of FlavaImageCodebook.")
    codebook = FlavaImageCodebook.from_pretrained(folder, local_files_only=True, use_safetensors=True)
    nn.Module.to(codebook.eval().requires_grad_(False), device)
    tokenizer = DalleTokenizer(codebook)
    return LoadedTokenizer(tokenizer, (0.0,) * 3, (1.0,) * 3, None, compute_file_digest(weights))


class DalleTokenizer:
    """DALL-E's encoder (Ramesh et al. 2021), as BEiT uses it: a token per 8 × 8 pixels of a resized image."""

    def __init__(self, codebook: nn.Module) -> None:
        self.codebook = codebook
        self.codebook_size: int = codebook.config.vocab_size  # type: ignore[assignment,union-attr]
        self.grid: tuple[int, int] | None = None

    @torch.no_grad()
    def tokenize(self, images: Tensor) -> Tensor:
        """Compute visual tokens: float [B, 3, H, W] in [0, 1] -> int64 [B, L], patches in row-major order."""
        rows, columns = self.grid or [side // DALLE_PATCH_SIZE for side in images.shape[2:]]
        size = (rows * DALLE_PATCH_SIZE, columns * DALLE_PATCH_SIZE)
        if tuple(images.shape[2:]) != size:
            images = F.interpolate(images, size, mode="bicubic", antialias=True)
        mapped = (1 - 2 * _LOGIT_LAPLACE_EPS) * images.clamp(0, 1) + _LOGIT_LAPLACE_EPS
        return self.codebook.get_codebook_indices(mapped).flatten(1)  # type: ignore[operator]


def compute_file_digest(file: Path) -> str:
    """Return the BLAKE2b digest of a file: 16 hex digits."""
    with file.open("rb") as content:
        return hashlib.file_digest(content, lambda: hashlib.blake2b(digest_size=8)).hexdigest()
