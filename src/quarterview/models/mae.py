"""The masked autoencoder, in the order of section 3 of He et al. 2021 (arXiv 2111.06377).

Cut the image into patches, hide three quarters of them, encode what is left, decode it together
with mask tokens, and compare the hidden patches with the truth. One polarity everywhere: `mask` is
bool [B, L], True where hidden. One order of tokens: cls, visible, hidden; attention does not care
about order once positions are added, so nothing is ever shuffled back but pictures for people.
A cheaper decoder, which is not the paper's, is in `cross.py`; nor is what `fusion.py` adds.

Letters in shapes: B images, N masks (B, or a multiple of it where each image has several, which follow
one another), C channels, H×W pixels, p the patch size, L patches, V visible ones, Q predicted ones,
P = p*p*C numbers in a patch, K cls tokens (the paper's is one), D the encoder's width and E the decoder's.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from quarterview.errors import UserError
from quarterview.models import masking
from quarterview.models.config import MAEConfig
from quarterview.models.cross_decoder import CrossDecoder
from quarterview.models.fusion import Fusion
from quarterview.models.positions import sincos_2d
from quarterview.models.targets import Target, nearness, patch_statistics, take, target_of
from quarterview.models.vit import LAYER_NORM_EPS, Block, PatchEmbed, init_weights, patchify


class MAEOutput(NamedTuple):
    """What `MaskedAutoencoder.forward` returns."""

    loss: Tensor
    """float32 scalar: the error of predicted patches, on average."""
    mask: Tensor
    """bool [N, L], True where hidden."""
    pred: Tensor
    """float [N, Q, target.width], a row for each predicted patch in ascending patch index."""
    predicted: Tensor
    """int64 [N, Q], which patches those are: the hidden ones, L - V a mask; all with `predict_all`; a
    random part of the hidden ones in training mode with a `predict_share` below 1."""
    latent: Tensor
    """float [N, K + V, D], the encoder's tokens as the decoder is given them: cls, then the visible patches,
    then mask tokens if any."""


class MaskedAutoencoder(nn.Module):
    """A vision transformer that sees a quarter of the picture, and a small one that completes it."""

    def __init__(self, config: MAEConfig) -> None:
        super().__init__()
        self.config = config
        shape = config.shape
        self.patch_size, self.grid = shape.patch_size, config.grid
        self.kept = masking.keep_count(config.patches, config.mask_ratio)

        self.patch_embed = PatchEmbed(shape.patch_size, config.in_chans, shape.width)
        self.cls_token = nn.Parameter(torch.zeros(1, config.cls_tokens, shape.width))
        self.pos_embed = nn.Parameter(sincos_2d(shape.width, self.grid), requires_grad=False)
        self.blocks = nn.ModuleList(Block(shape.width, shape.heads) for _ in range(shape.depth))
        self.norm = nn.LayerNorm(shape.width, eps=LAYER_NORM_EPS)

        # A decoder without blocks is a linear head on the encoder's own tokens.
        headless, cross = config.decoder_depth == 0, config.decoder == "cross"
        width = shape.width if headless else config.decoder_width
        mask_width = shape.width if config.encoder_mask_tokens else width
        self.mask_token = nn.Parameter(torch.zeros(1, 1, mask_width))
        self.decoder_embed = nn.Identity() if headless or cross else nn.Linear(shape.width, width)
        self.decoder_pos_embed = nn.Parameter(sincos_2d(width, self.grid), requires_grad=False)
        self.decoder_blocks = (
            CrossDecoder(width, config.decoder_heads, config.decoder_depth, shape)
            if cross
            else nn.ModuleList(Block(width, config.decoder_heads) for _ in range(config.decoder_depth))
        )
        self.decoder_norm = nn.Identity() if headless else nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.target: Target = target_of(config)
        self.decoder_pred = nn.Linear(width, self.target.width)

        self.apply(init_weights)
        nn.init.normal_(self.cls_token, std=0.02)
        nn.init.normal_(self.mask_token, std=0.02)
        fused = config.fused_blocks  # drawn last, so that all else begins as it does without
        self.decoder_fusion = Fusion(shape.width, fused) if fused else None

    # ------------------------------------------------------------------ patches

    def patchify(self, images: Tensor) -> Tensor:
        """float [B, C, H, W] -> float [B, L, p*p*C]: patches by row, numbers by row, column, channel."""
        return patchify(images, self.patch_size)

    def unpatchify(self, patches: Tensor) -> Tensor:
        """float [B, L, p*p*C] -> float [B, C, H, W]; the exact inverse of `patchify`."""
        p = self.patch_size
        x = patches.unflatten(2, (p, p, -1)).unflatten(1, self.grid)  # [B, rows, columns, p, p, C]
        return x.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)

    # ------------------------------------------------------------------ masking

    def mask_noise(self, uniforms: Tensor) -> Tensor:
        """Noise for `forward` of this model's kind of mask: float [B, L] from [B, `uniforms_needed`]."""
        config = self.config
        return masking.mask_noise(config.mask, uniforms, self.grid, config.mask_ratio, config.mask_unit)

    @property
    def uniforms_needed(self) -> int:
        """How many uniform numbers the mask of one image takes."""
        return masking.uniforms_needed(self.config.mask, self.config.patches)

    def _choose_mask(
        self, images: Tensor, noise: Tensor | None, mask: Tensor | None
    ) -> tuple[Tensor, int, Tensor | None]:
        """bool [N, L], how many each row leaves visible, and the noise [N, L] unless the mask was given."""
        if mask is not None:
            kept = masking.count_visible(mask, (len(images), self.config.patches))
            if kept == self.config.patches:
                raise ValueError("mask hides nothing, so there is nothing to predict; accepted: 1 or more")
            return mask, kept, None
        if noise is None:
            noise = self.mask_noise(torch.rand(len(images), self.uniforms_needed, device=images.device))
        noise = masking.rows_of(noise, (len(images), self.config.patches))
        return masking.mask_from_noise(noise, self.kept), self.kept, noise

    def _choose_predicted(self, hidden: Tensor, noise: Tensor | None) -> Tensor:
        """Which patches the loss is about: int64 [N, Q], ascending."""
        if self.config.predict_all:
            return torch.arange(self.config.patches, device=hidden.device).expand(len(hidden), -1)
        if self.config.predict_share == 1 or not self.training:
            return hidden
        if noise is None:  # the mask was given
            noise = torch.rand(len(hidden), self.config.patches, device=hidden.device)
        return masking.lowest(hidden, noise, self.config.predict_share)

    # ------------------------------------------------------------------ encode

    def encode(self, images: Tensor, mask: Tensor | None = None) -> Tensor:
        """The encoder's features; nothing is hidden unless a mask says so.

        Args:
            images: float [B, C, H, W], normalised.
            mask: bool [B, L], True where hidden, with equal counts in every row.

        Returns:
            float [B, K + V, D] after the final norm: cls, then the visible patches in ascending
            patch index. Deterministic.

        Raises:
            ValueError: if the images or the mask have another shape than the model's.
        """
        patches = self.patchify(self._check_images(images))
        if mask is None:
            return self._encode(patches, visible=None)
        kept = masking.count_visible(mask, (len(images), self.config.patches))
        return self._encode(patches, masking.split(mask, kept)[0])

    def _encode(
        self,
        patches: Tensor,
        visible: Tensor | None,
        hidden: Tensor | None = None,
        layers: list[Tensor] | None = None,
    ) -> Tensor:
        """Only visible patches are embedded. With `hidden`, mask tokens stand in for those. What goes
        into each block, float [N, K + V, D], is appended to `layers`, and fused if the model does that."""
        positions = self.pos_embed[:, 1:]
        if visible is not None:
            patches, positions = take(patches, visible), take(positions, visible)
        x = self.patch_embed(patches) + positions  # [N, V, D]
        cls = (self.cls_token + self.pos_embed[:, :1]).expand(x.shape[0], -1, -1).to(x.dtype)
        tokens = [cls, x]
        if hidden is not None:
            tokens.append((self.mask_token + take(self.pos_embed[:, 1:], hidden)).to(x.dtype))
        x = torch.cat(tokens, dim=1)  # [N, K + V, D], or [N, K + L, D] with mask tokens
        for block in self.blocks:
            if layers is not None:
                layers.append(x)
            x = block(x)
        if self.decoder_fusion is not None and layers is not None:
            x = self.decoder_fusion(layers, x)
        return self.norm(x)

    # ------------------------------------------------------------------ decode

    def predict(
        self, patches: Tensor, visible: Tensor, hidden: Tensor, wanted: Tensor
    ) -> tuple[Tensor, Tensor]:
        """float [N, Q, P] for the patches `wanted`, and the encoder's tokens; `hidden` may be none."""
        layers: list[Tensor] = []
        if self.config.decoder == "cross":
            tokens = self._encode(patches, visible, layers=layers)
            layers.append(tokens)
            x = self.decoder_blocks(self.mask_token + take(self.decoder_pos_embed, 1 + wanted), layers)
        else:
            masked = hidden if self.config.encoder_mask_tokens else None
            tokens = self._encode(patches, visible, masked, layers if self.config.fused_blocks else None)
            x = self._decode(tokens, visible, hidden, everything=wanted.shape[1] > hidden.shape[1])
        return self.decoder_pred(self.decoder_norm(x)), tokens

    def _decode(self, tokens: Tensor, visible: Tensor, hidden: Tensor, everything: bool) -> Tensor:
        """The encoder's tokens -> the decoder's of hidden patches, float [N, L - V, E], or of everything."""
        x = self.decoder_embed(tokens)
        if not self.config.encoder_mask_tokens:
            x = torch.cat([x.float(), self.mask_token.expand(len(x), hidden.shape[1], -1)], dim=1)
        if len(self.decoder_blocks) or not self.config.encoder_mask_tokens:
            x = x + self._decoder_positions(visible, hidden)  # [N, K + L, E]: cls, visible, hidden
        cls = self.config.cls_tokens
        first = 0 if everything else cls + visible.shape[1]  # in the last block others are only attended to
        for i, block in enumerate(self.decoder_blocks, 1):
            x = block(x, first=first if i == len(self.decoder_blocks) else 0)
        if everything:
            order = torch.cat([visible, hidden], dim=1)
            return take(x[:, cls:], order.argsort(dim=1))  # [N, L, E], ascending
        return x[:, -hidden.shape[1] :]

    def _decoder_positions(self, visible: Tensor, hidden: Tensor) -> Tensor:
        cls = visible.new_zeros(len(visible), self.config.cls_tokens)  # whose row is the first, of zeros
        return take(self.decoder_pos_embed, torch.cat([cls, 1 + visible, 1 + hidden], dim=1))

    # ------------------------------------------------------------------ target and loss

    def forward(self, images: Tensor, noise: Tensor | None = None, mask: Tensor | None = None) -> MAEOutput:
        """Hide patches, predict them, and measure the error.

        Args:
            images: float [B, C, H, W], normalised.
            noise: float [B, L], of which the lowest ``int(L * (1 - ratio))`` a row are kept, and the
                next predicted where not all are; or [B, k, L], to hide each image in k ways. None
                draws from torch's default generator.
            mask: bool [B, L], True where hidden: any pattern with equal counts in every row,
                instead of noise.

        Raises:
            ValueError: if the images, the noise or the mask have another shape than the model's.
        """
        patches = self.patchify(self._check_images(images))
        mask, kept, noise = self._choose_mask(images, noise, mask)
        visible, hidden = masking.split(mask, kept)
        predicted = self._choose_predicted(hidden, noise)

        pred, latent = self.predict(patches, visible, hidden, predicted)

        with torch.autocast(images.device.type, enabled=False):  # targets and loss in float32
            if len(predicted) == len(images):
                truth = self.target(images, patches, predicted)
            else:  # made once for all masks of an image
                truth = take(self.target(images, patches, None), predicted)
            loss = self.target.loss(pred, truth).mean()  # every row predicts equally many
        return MAEOutput(loss, mask, pred, predicted, latent)

    def _check_images(self, images: Tensor) -> Tensor:
        expected = (self.config.in_chans, *self.config.image_size)
        if images.ndim != 4 or tuple(images.shape[1:]) != expected:
            raise ValueError(
                f"images of shape {tuple(images.shape)}; accepted: (B, {', '.join(map(str, expected))})"
            )
        return images

    # ------------------------------------------------------------------ pictures for people

    @torch.no_grad()
    def reconstruct(self, images: Tensor, mask: Tensor | None = None) -> Tensor:
        """The picture as the model completes it: visible patches as they are, hidden ones predicted.

        With normalised targets the model predicts each patch up to its mean and contrast. Those
        are guessed from the visible patches around it (the nearer, the more), never taken from
        the hidden ones, which would leak the answer.

        Args:
            images: float [B, C, H, W], normalised.
            mask: bool [B, L], True where hidden; None draws one from torch's default generator.

        Returns:
            float32 [B, C, H, W], normalised as the images are.
        """
        patches = self.patchify(self._check_images(images))
        mask, kept, _ = self._choose_mask(images, None, mask)
        visible, hidden = masking.split(mask, kept)
        pred, _ = self.predict(patches, visible, hidden, wanted=hidden)  # all of them, in training mode too
        patches = patches.float()
        mean, std = patch_statistics(take(patches, visible))
        weights = nearness(hidden, visible, self.grid[1])  # [B, L - V, V]
        pixels = self.target.to_pixels(pred, weights @ mean, weights @ std)
        if pixels is None:
            raise UserError("this model's target is no picture, so there is nothing to reconstruct")
        index = hidden[:, :, None].expand(-1, -1, patches.shape[2])
        return self.unpatchify(patches.scatter(1, index, pixels))
