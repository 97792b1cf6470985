"""Tokenizers: ours, and DALL-E's as transformers has it."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quarterview.errors import UserError
from quarterview.models.config import MAEConfig
from quarterview.models.targets import Tokenizer
from quarterview.models.tokenizer import DiscreteVAE, Renormalised
from quarterview.weights.loading import find_weights, load_tokenizer

DALLE_PATCH = 8
"""Pixels on a side for which DALL-E's encoder has one word."""
_DALLE_MARGIN = 0.1  # pixels are moved to 0.1 … 0.9 (Ramesh et al. 2021, appendix A)


class OpenTokenizer(NamedTuple):
    """A tokenizer, and what its images are normalised by."""

    tokenizer: Tokenizer
    mean: tuple[float, ...]
    std: tuple[float, ...]
    patch_size: int | None
    """Side of what a word stands for; None where images are resized to fit."""
    digest: str
    """Sixteen hex digits of its weights."""

    @property
    def vocabulary(self) -> int:
        """How many words there are."""
        return self.tokenizer.vocabulary

    def for_images(self, config: MAEConfig, device: torch.device) -> Tokenizer:
        """The same, for images normalised as a model's are.

        Raises:
            UserError: if a word does not stand for a patch of the model.
        """
        if self.patch_size not in (None, config.shape.patch_size):
            raise UserError(
                f"a tokenizer of patches of {self.patch_size} pixels for {config.model}; accepted: one of "
                f"{config.shape.patch_size} pixels"
            )
        if len(self.mean) != config.in_chans:
            raise UserError(f"a tokenizer of {len(self.mean)} channels for a model of {config.in_chans}")
        assert config.mean is not None
        assert config.std is not None
        tokenizer = self.tokenizer
        if isinstance(tokenizer, DalleTokenizer):
            tokenizer.grid = config.grid
        return Renormalised(tokenizer, (self.mean, self.std), (config.mean, config.std), device)


def open_tokenizer(given: str, known: Mapping[str, Any], device: torch.device) -> OpenTokenizer:
    """The tokenizer of a path.

    Args:
        given: a run of ours, or a folder of transformers' FlavaImageCodebook.
        known: of a run that is resumed, what it decided; its tokenizer must be the same.

    Raises:
        UserError: if there is none, or it is another one.
    """
    folder = Path(given)
    opened = _dalle(folder, device) if (folder / "config.json").is_file() else _ours(given, device)
    if opened.digest != known.get("tokenizer_digest", opened.digest):
        raise UserError(
            f"{given} is another tokenizer than the one that the run began with; accepted: "
            f"the one with digest {known['tokenizer_digest']}"
        )
    return opened


def _ours(given: str, device: torch.device) -> OpenTokenizer:
    model: DiscreteVAE = load_tokenizer(given).to(device)
    config = model.config
    return OpenTokenizer(model, config.mean, config.std, config.patch_size, digest_of(find_weights(given)))


def _dalle(folder: Path, device: torch.device) -> OpenTokenizer:
    try:
        from transformers import FlavaImageCodebook
    except ImportError:
        raise UserError(
            "DALL-E's tokenizer is read through transformers: pip install 'quarterview[transformers]'"
        ) from None
    weights = folder / "model.safetensors"
    if not weights.is_file():
        raise UserError(f"{folder} has no model.safetensors; accepted: a folder of FlavaImageCodebook")
    codebook = FlavaImageCodebook.from_pretrained(folder, local_files_only=True, use_safetensors=True)
    nn.Module.to(codebook.eval().requires_grad_(False), device)
    tokenizer = DalleTokenizer(codebook)
    return OpenTokenizer(tokenizer, (0.0,) * 3, (1.0,) * 3, None, digest_of(weights))


class DalleTokenizer:
    """DALL-E's encoder (Ramesh et al. 2021), as BEiT uses it: 8 pixels of a resized picture a word."""

    def __init__(self, codebook: nn.Module) -> None:
        self.codebook = codebook
        self.vocabulary: int = codebook.config.vocab_size  # type: ignore[assignment,union-attr]
        self.grid: tuple[int, int] | None = None

    @torch.no_grad()
    def tokens(self, images: Tensor) -> Tensor:
        """float [B, 3, H, W] in [0, 1] -> int64 [B, L], by row; a word for each of the grid's patches."""
        rows, columns = self.grid or [side // DALLE_PATCH for side in images.shape[2:]]
        size = (rows * DALLE_PATCH, columns * DALLE_PATCH)
        if tuple(images.shape[2:]) != size:
            images = F.interpolate(images, size, mode="bicubic", antialias=True)
        mapped = (1 - 2 * _DALLE_MARGIN) * images.clamp(0, 1) + _DALLE_MARGIN
        return self.codebook.get_codebook_indices(mapped).flatten(1)  # type: ignore[operator]


def digest_of(file: Path) -> str:
    """Sixteen hex digits of a file."""
    with file.open("rb") as content:
        return hashlib.file_digest(content, lambda: hashlib.blake2b(digest_size=8)).hexdigest()
