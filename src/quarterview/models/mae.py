"""The masked autoencoder (MAE) of He et al. 2021 (arXiv 2111.06377), in the order of the paper's section 3.

The image is cut into patches, and 75% of them are masked. The encoder sees the visible patches alone. The
decoder predicts the masked patches from the encoded ones and mask tokens. The loss is the mean error over
the masked patches.

Two conventions hold throughout the package:

- A mask is bool [B, L], True where the patch is masked. The official code has 1 there.
- Tokens are in the order cls, visible patches, masked patches. Attention does not depend on the order of
  tokens once positions are added, so the official code's `ids_restore` is not needed.

The encoder is in `vit.py`. Two options that are not in the paper have files of their own: `cross_decoder.py`
(CrossMAE) and `fusion.py` (MFF).

Letters in shapes: B images, N masks (one or more per image), C channels, H×W pixels, p the patch size,
L patches per image, V visible patches, Q predicted patches, P = p*p*C values per patch, K cls tokens, D the
encoder's width, E the decoder's width.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from quarterview.errors import not_supported
from quarterview.models import masking
from quarterview.models.config import MAEConfig, compute_num_visible
from quarterview.models.cross_decoder import CrossDecoder
from quarterview.models.fusion import MultiLevelFusion
from quarterview.models.masking import gather_patches
from quarterview.models.positions import get_2d_sincos_pos_embed
from quarterview.models.targets import (
    Target,
    compute_distance_weights,
    compute_patch_statistics,
    create_target,
)
from quarterview.models.vit import LAYER_NORM_EPS, Block, VisionTransformer


class MAEOutput(NamedTuple):
    """The output of `MaskedAutoencoder.forward`."""

    loss: Tensor
    """float32 scalar: the mean error of the predicted patches."""
    mask: Tensor
    """bool [N, L], True where masked."""
    pred: Tensor
    """float [N, Q, target.dim]: the predictions, in the order of `pred_indices`."""
    pred_indices: Tensor
    """int64 [N, Q]: the indices of the predicted patches, ascending. By default these are the L - V masked
    patches; with `predict_all` they are all patches; with `predict_ratio` below 1 they are, in training mode,
    a random part of the masked patches."""
    latent: Tensor
    """float [N, K + V, D]: the encoder's output, cls tokens first, then the visible patches. With
    `encoder_mask_tokens` the mask tokens follow: [N, K + L, D]."""


class MaskedAutoencoder(VisionTransformer[MAEConfig]):
    """A vision transformer as the encoder, and a small transformer as the decoder."""

    notes: tuple[str, ...] = ()
    """Remarks on converted weights (origin, missing parts, assumptions), set by `quarterview.load`."""

    def __init__(self, config: MAEConfig) -> None:
        super().__init__(config, init=False)
        shape, fused_blocks = config.shape, config.fused_blocks
        is_linear, is_cross = config.decoder_depth == 0, config.decoder == "cross"
        self.num_visible = compute_num_visible(config.num_patches, config.mask_ratio)
        # The decoder reads the encoder's tokens after these numbers of blocks, and after the last block.
        self.decoder_source_blocks = tuple(range(shape.depth)) if is_cross else fused_blocks

        # A decoder of depth 0 is a linear layer on the encoder's tokens.
        width = shape.width if is_linear else config.decoder_width
        mask_width = shape.width if config.encoder_mask_tokens else width
        self.mask_token = nn.Parameter(torch.zeros(1, 1, mask_width))
        self.decoder_embed = nn.Identity() if is_linear or is_cross else nn.Linear(shape.width, width)
        self.decoder_pos_embed = nn.Parameter(get_2d_sincos_pos_embed(width, self.grid), requires_grad=False)
        self.decoder_blocks = (
            CrossDecoder(width, config.decoder_heads, config.decoder_depth, shape)
            if is_cross
            else nn.ModuleList(Block(width, config.decoder_heads) for _ in range(config.decoder_depth))
        )
        self.decoder_norm = nn.Identity() if is_linear else nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.target: Target = create_target(config)
        self.decoder_pred = nn.Linear(width, self.target.dim)

        self.init_weights()
        nn.init.normal_(self.mask_token, std=0.02)
        # Created last: the other initial weights are then the same with fusion and without.
        self.decoder_fusion = MultiLevelFusion(shape.width, fused_blocks) if fused_blocks else None

    # ------------------------------------------------------------------ masking

    def mask_noise(self, uniforms: Tensor) -> Tensor:
        """Return noise for `forward`, made according to the configured mask.

        Args:
            uniforms: float [B, num_mask_uniforms] in [0, 1).

        Returns:
            float [B, L]. The patches of lowest noise stay visible.
        """
        config = self.config
        return masking.mask_noise(config.mask, uniforms, self.grid, config.mask_ratio, config.mask_unit)

    @property
    def num_mask_uniforms(self) -> int:
        """The number of uniform random numbers that `mask_noise` needs per image."""
        return masking.count_mask_uniforms(self.config.mask, self.config.num_patches)

    def _make_mask(
        self, images: Tensor, noise: Tensor | None, mask: Tensor | None
    ) -> tuple[Tensor, int, Tensor | None]:
        """Return the mask, bool [N, L], the number of visible patches per row, and the noise, float [N, L].

        The noise is None where the caller gave the mask.
        """
        if mask is not None:
            num_visible = masking.count_visible(mask, (len(images), self.config.num_patches))
            if num_visible == self.config.num_patches:
                raise ValueError("The mask has no masked patch. Mask at least one patch in every row.")
            return mask, num_visible, None
        if noise is None:
            noise = self.mask_noise(torch.rand(len(images), self.num_mask_uniforms, device=images.device))
        noise = masking.flatten_noise(noise, (len(images), self.config.num_patches))
        return masking.mask_from_noise(noise, self.num_visible), self.num_visible, noise

    def _select_pred_indices(self, masked_indices: Tensor, noise: Tensor | None) -> Tensor:
        """Return the indices of the patches that the loss is computed on: int64 [N, Q], ascending."""
        if self.config.predict_all:
            return torch.arange(self.config.num_patches, device=masked_indices.device).expand(
                len(masked_indices), -1
            )
        if self.config.predict_ratio == 1 or not self.training:
            return masked_indices
        if noise is None:  # the caller gave the mask
            noise = torch.rand(len(masked_indices), self.config.num_patches, device=masked_indices.device)
        return masking.select_lowest_noise(masked_indices, noise, self.config.predict_ratio)

    # ------------------------------------------------------------------ encoder

    def _encode(
        self, patches: Tensor, visible_indices: Tensor, masked_indices: Tensor
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """Encode the visible patches (section 3, "MAE encoder").

        Returns:
            The tokens after the final norm, see `MAEOutput.latent`, and by number of blocks the tokens that
            `decoder_source_blocks` asks for, of the same shape.
        """
        x = self.embed(patches, visible_indices)
        if self.config.encoder_mask_tokens:  # table 1c
            x = torch.cat([x, self.mask_token + gather_patches(self.pos_embed[:, 1:], masked_indices)], dim=1)
        x, block_outputs = self.forward_blocks(x, keep_after=self.decoder_source_blocks)
        if self.decoder_fusion is not None:
            x = self.decoder_fusion(block_outputs, x)
        return self.norm(x), block_outputs

    # ------------------------------------------------------------------ decoder

    def predict(
        self, patches: Tensor, visible_indices: Tensor, masked_indices: Tensor, pred_indices: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Encode the visible patches, and decode the predictions of some patches.

        Args:
            patches: float [B, L, P]. Only the visible patches are read.
            visible_indices: int64 [N, V], ascending.
            masked_indices: int64 [N, L - V], ascending; L - V may be 0.
            pred_indices: int64 [N, Q], the patches to predict: the masked ones, or all L; the cross decoder
                also takes a part of the masked ones.

        Returns:
            The predictions, float [N, Q, target.dim], and the encoder's output, see `MAEOutput.latent`.
        """
        latent, block_outputs = self._encode(patches, visible_indices, masked_indices)
        if self.config.decoder == "cross":
            queries = self.mask_token + gather_patches(self.decoder_pos_embed, 1 + pred_indices)  # [N, Q, E]
            x = self.decoder_blocks(queries, [*block_outputs.values(), latent])
        else:
            predict_all = pred_indices.shape[1] > masked_indices.shape[1]
            x = self._decode(latent, visible_indices, masked_indices, predict_all)
        return self.decoder_pred(self.decoder_norm(x)), latent

    def _decode(
        self, latent: Tensor, visible_indices: Tensor, masked_indices: Tensor, predict_all: bool
    ) -> Tensor:
        """Run the standard decoder on the encoder's output and mask tokens (section 3, "MAE decoder").

        Returns:
            The tokens of the masked patches, float [N, L - V, E], or with `predict_all` those of all patches,
            float [N, L, E], in ascending patch index.
        """
        x = self.decoder_embed(latent)
        if not self.config.encoder_mask_tokens:
            x = torch.cat([x.float(), self.mask_token.expand(len(x), masked_indices.shape[1], -1)], dim=1)
        if len(self.decoder_blocks) or not self.config.encoder_mask_tokens:
            # The tokens are now cls, visible patches, masked patches: [N, K + L, E].
            x = x + self._gather_decoder_pos_embed(visible_indices, masked_indices)
        cls = self.config.cls_tokens
        # The last block computes only the tokens that are predicted. The others serve as keys and values.
        query_start = 0 if predict_all else cls + visible_indices.shape[1]
        for i, block in enumerate(self.decoder_blocks, 1):
            x = block(x, query_start=query_start if i == len(self.decoder_blocks) else 0)
        if predict_all:
            order = torch.cat([visible_indices, masked_indices], dim=1)
            return gather_patches(x[:, cls:], order.argsort(dim=1))  # [N, L, E], ascending
        return x[:, -masked_indices.shape[1] :]

    def _gather_decoder_pos_embed(self, visible_indices: Tensor, masked_indices: Tensor) -> Tensor:
        # All cls tokens have row 0 of the table, which is zeros.
        cls = visible_indices.new_zeros(len(visible_indices), self.config.cls_tokens)
        return gather_patches(
            self.decoder_pos_embed, torch.cat([cls, 1 + visible_indices, 1 + masked_indices], dim=1)
        )

    # ------------------------------------------------------------------ target and loss

    def forward(self, images: Tensor, noise: Tensor | None = None, mask: Tensor | None = None) -> MAEOutput:
        """Mask patches, predict them, and compute the loss.

        Args:
            images: float [B, C, H, W], normalised.
            noise: float [B, L]. In each row the ``int(L * (1 - mask_ratio))`` patches of lowest noise stay
                visible; with `predict_ratio` below 1 the masked patches of lowest noise are predicted.
                [B, k, L] gives each image k masks. None draws the noise from torch's default generator.
            mask: bool [B, L], True where masked, used instead of noise. Every row must have the same number
                of masked patches.

        Raises:
            ValueError: if images, noise or mask have the wrong shape, or the mask's rows have different
                numbers of masked patches, or mask no patch or every patch.
        """
        patches = self.patchify(images)
        mask, num_visible, noise = self._make_mask(images, noise, mask)
        visible_indices, masked_indices = masking.split_indices(mask, num_visible)
        pred_indices = self._select_pred_indices(masked_indices, noise)

        pred, latent = self.predict(patches, visible_indices, masked_indices, pred_indices)

        with torch.autocast(images.device.type, enabled=False):  # targets and loss in float32
            if len(pred_indices) == len(images):
                truth = self.target(images, patches, pred_indices)
            else:  # several masks per image: compute the targets of an image once for all of them
                truth = gather_patches(self.target(images, patches, None), pred_indices)
            loss = self.target.loss(pred, truth).mean()  # every row predicts the same number of patches
        return MAEOutput(loss, mask, pred, pred_indices, latent)

    # ------------------------------------------------------------------ reconstruction

    def unpatchify(self, patches: Tensor) -> Tensor:
        """Return the images of patches, float [B, L, P] -> [B, C, H, W]: the inverse of `patchify`."""
        p = self.patch_size
        x = patches.unflatten(2, (p, p, -1)).unflatten(1, self.grid)  # [B, rows, columns, p, p, C]
        return x.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)

    @torch.no_grad()
    def reconstruct(self, images: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the images with their masked patches replaced by the predictions.

        With `norm_pix_loss` the model predicts each patch without its mean and standard deviation. Both are
        estimated from the visible patches, weighted by their distance; the true values of the masked patches
        are never used.

        Args:
            images: float [B, C, H, W], normalised.
            mask: bool [B, L], True where masked; None draws one from torch's default generator.

        Returns:
            float32 [B, C, H, W], normalised like `images`.

        Raises:
            UserError: if the target cannot be shown as an image (HOG, tokens).
            ValueError: if images or mask have the wrong shape, see `forward`.
        """
        patches = self.patchify(images)
        mask, num_visible, _ = self._make_mask(images, None, mask)
        visible_indices, masked_indices = masking.split_indices(mask, num_visible)
        # All masked patches are predicted here, whatever `predict_ratio` is.
        pred, _ = self.predict(patches, visible_indices, masked_indices, pred_indices=masked_indices)
        patches = patches.float()
        mean, std = compute_patch_statistics(gather_patches(patches, visible_indices))
        weights = compute_distance_weights(masked_indices, visible_indices, self.grid[1])  # [B, L - V, V]
        pixels = self.target.to_pixels(pred, weights @ mean, weights @ std)
        if pixels is None:
            raise not_supported(
                "Reconstruction",
                f"a model that predicts {self.config.target_description}",
                "Use a model trained with --target pixels or --target pca.",
            )
        index = masked_indices[:, :, None].expand(-1, -1, patches.shape[2])
        return self.unpatchify(patches.scatter(1, index, pixels))
