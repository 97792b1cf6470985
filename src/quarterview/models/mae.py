"""The masked autoencoder, in the order of section 3 of He et al. 2021 (arXiv 2111.06377).

Cut the image into patches, hide three quarters of them, encode what is left, decode it together
with mask tokens, and compare the hidden patches with the truth. One polarity everywhere: `mask` is
bool [B, L], True where hidden. One order of tokens: cls, visible, hidden; attention does not care
about order once positions are added, so nothing is ever shuffled back but pictures for people.

The encoder is the one of `vit.py`. Two things that are not the paper's are elsewhere: a cheaper decoder in
`cross_decoder.py`, and in `fusion.py` what adds earlier blocks of the encoder.

Letters in shapes are those of `vit.py`: B images, N masks, C channels, H×W pixels, p the patch size, L
patches, V visible ones, K cls tokens, D the encoder's width. Also Q predicted patches, P = p*p*C numbers in
a patch, E the decoder's width.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from quarterview.errors import UserError
from quarterview.models import masking
from quarterview.models.config import MAEConfig, keep_count
from quarterview.models.cross_decoder import CrossDecoder
from quarterview.models.fusion import Fusion
from quarterview.models.masking import take
from quarterview.models.positions import sincos_2d
from quarterview.models.targets import Target, nearness, patch_statistics, target_of
from quarterview.models.vit import LAYER_NORM_EPS, Block, VisionTransformer


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


class MaskedAutoencoder(VisionTransformer[MAEConfig]):
    """A vision transformer that sees a quarter of the picture, and a small one that completes it."""

    notes: tuple[str, ...] = ()
    """What foreign weights were and lacked, and what was assumed of them; set by `quarterview.load`."""

    def __init__(self, config: MAEConfig) -> None:
        super().__init__(config, init=False)
        shape, fused = config.shape, config.fused_blocks
        headless, cross = config.decoder_depth == 0, config.decoder == "cross"
        self.kept = keep_count(config.patches, config.mask_ratio)
        self.layers_read = tuple(range(shape.depth)) if cross else fused  # the decoder's, of the encoder

        # A decoder without blocks is a linear head on the encoder's own tokens.
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

        self.init_weights()
        nn.init.normal_(self.mask_token, std=0.02)
        # Drawn last, so that all else begins as it does without.
        self.decoder_fusion = Fusion(shape.width, fused) if fused else None

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

    # ------------------------------------------------------------------ encoder

    def _encode(self, patches: Tensor, visible: Tensor, hidden: Tensor) -> tuple[Tensor, dict[int, Tensor]]:
        """The encoder's tokens, float [N, K + V, D], and those after each number of blocks in `layers_read`.

        Hidden patches are left out, or mask tokens stand in for them: [N, K + L, D].
        """
        x = self.embed(patches, visible)
        if self.config.encoder_mask_tokens:
            x = torch.cat([x, self.mask_token + take(self.pos_embed[:, 1:], hidden)], dim=1)
        x, layers = self.forward_blocks(x, keep=self.layers_read)
        if self.decoder_fusion is not None:
            x = self.decoder_fusion(layers, x)
        return self.norm(x), layers

    # ------------------------------------------------------------------ decoder

    def predict(
        self, patches: Tensor, visible: Tensor, hidden: Tensor, wanted: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Encode and decode, for a choice of patches.

        Args:
            patches: float [B, L, P]; only the visible ones are looked at.
            visible, hidden: int64 [N, V] and [N, L - V], ascending patch indices; `hidden` may be none.
            wanted: int64 [N, Q], which patches to predict.

        Returns:
            The predictions, float [N, Q, target.width], and the encoder's tokens, see `MAEOutput.latent`.
        """
        latent, layers = self._encode(patches, visible, hidden)
        if self.config.decoder == "cross":
            queries = self.mask_token + take(self.decoder_pos_embed, 1 + wanted)  # [N, Q, E]
            x = self.decoder_blocks(queries, [*layers.values(), latent])
        else:
            x = self._decode(latent, visible, hidden, everything=wanted.shape[1] > hidden.shape[1])
        return self.decoder_pred(self.decoder_norm(x)), latent

    def _decode(self, latent: Tensor, visible: Tensor, hidden: Tensor, everything: bool) -> Tensor:
        """The encoder's tokens -> the decoder's.

        Returns:
            float [N, L - V, E], of the hidden patches; or of all of them, [N, L, E], with `everything`.
        """
        x = self.decoder_embed(latent)
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
        patches = self.patchify(images)
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

    # ------------------------------------------------------------------ pictures for people

    def unpatchify(self, patches: Tensor) -> Tensor:
        """float [B, L, p*p*C] -> float [B, C, H, W]; the exact inverse of `patchify`."""
        p = self.patch_size
        x = patches.unflatten(2, (p, p, -1)).unflatten(1, self.grid)  # [B, rows, columns, p, p, C]
        return x.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)

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
        patches = self.patchify(images)
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
