"""``pretrain --dry-run``: configuration, size, length and memory of a run, without training."""

from collections.abc import Callable
from typing import Any

import torch
import yaml
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from quarterview.commands.config import PretrainConfig
from quarterview.data.sampler import compute_default_holdout
from quarterview.data.shuffle import create_stream
from quarterview.data.sources.base import Source
from quarterview.data.sources.open import open_sources
from quarterview.errors import UserError, not_supported
from quarterview.methods.config import TokenizerMethodConfig
from quarterview.models.mae import MaskedAutoencoder
from quarterview.models.vit import Block, CheckpointableBlock, enable_grad_checkpointing
from quarterview.training.console import Console
from quarterview.training.distributed import choose_device
from quarterview.training.optim import compute_warmup_steps
from quarterview.training.run import check_batch_size
from quarterview.training.trainer import get_autocast_context, get_supported_precision

ADAMW_BYTES_PER_PARAMETER = 4 + 4 + 4 + 4
"""Bytes of a float32 weight, its gradient and AdamW's two moments."""


def print_dry_run(config: PretrainConfig) -> None:
    """Print the configuration, size, length and memory of a run.

    Raises:
        UserError: if the configuration is invalid or the images cannot be read.
    """
    if not config.method.trains_mae:
        method = f"--method {config.method.name}"
        raise not_supported("--dry-run", method, "Use --method mae, denoising or beit.")
    console, loop = Console(), config.loop
    source = check_data(config)
    device = choose_device(config.compute.device)
    precision = get_supported_precision(config.compute.precision, device)
    holdout = compute_default_holdout(len(source)) if config.data.holdout is None else config.data.holdout
    trained = create_stream(config.data, source, holdout, loop.seed).num_train
    steps = loop.total_steps(trained)
    warmup, warning = compute_warmup_steps(config.optim.warmup_epochs, trained / loop.batch_size, steps)
    parameters, frozen, activations = estimate_memory(config, precision)
    console.info(yaml.safe_dump(config.to_dict(), sort_keys=False).rstrip())
    if warning:
        console.warning(warning)
    peak, masks = config.optim.peak_lr(loop.batch_size), get_masks_per_image(config)
    memory = (parameters * ADAMW_BYTES_PER_PARAMETER + frozen * 4 + activations) / 2**30
    micro_batch = f"{loop.batch_size // loop.accum_iter} images"
    if masks > 1:
        micro_batch += f" with {masks} masks each"
    rows = [
        ("images", f"{len(source):,}: {trained:,} for training, {holdout:,} held out"),
        ("parameters", f"{parameters:,} trained, {frozen:,} in fixed position embeddings"),
        ("steps", f"{steps:,}, of which {warmup:,} are warm-up to a learning rate of {peak:.2e}"),
        ("epochs", f"{steps * loop.batch_size / trained:.4g}"),
        ("device", f"{device}, {precision}"),
        ("memory", f"about {memory:.2f} GiB for {micro_batch} at a time on one device, "
                   "without cached images and libraries"),
    ]  # fmt: skip
    console.key_values("dry run", rows)


def get_masks_per_image(config: PretrainConfig) -> int:
    """Return the number of masks per image and update."""
    return getattr(config.method, "masks_per_image", 1)


def check_data(config: PretrainConfig, ranks: int = 1) -> Source:
    """Check the images and the batch size, as far as possible without starting the ranks.

    Args:
        config: the configuration.
        ranks: number of ranks that will train.

    Returns:
        The images.

    Raises:
        UserError: if the images cannot be read, or the batch is too small.
    """
    if not config.data.data:
        raise UserError("No images are given. Give --data.")
    check_batch_size(config.loop, ranks)
    return open_sources(config.data.data, config.model.in_chans)


def estimate_memory(config: PretrainConfig, precision: str) -> tuple[int, int, int]:
    """Estimate the memory of a training step by tracing the forward pass with fake tensors on the CPU.

    Args:
        config: the configuration.
        precision: precision of the forward pass.

    Returns:
        The numbers of trained and of frozen parameters, and the bytes that the forward pass saves for the
        backward pass.
    """
    inputs: dict[nn.Module, tuple[Any, ...]] = {}

    def save_inputs(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs[block] = (*args, *kwargs.values())

    encoder = config.model
    with FakeTensorMode(), get_autocast_context(precision, torch.device("cpu"))():
        codebook_size = getattr(config.method, "codebook_size", None) or TokenizerMethodConfig.codebook_size
        model = MaskedAutoencoder(config.autoencoder(codebook_size))
        size = config.loop.batch_size // config.loop.accum_iter
        images = torch.empty(size, encoder.in_chans, *encoder.image_size)
        noise = torch.empty(len(images), get_masks_per_image(config), encoder.num_patches)
        if config.compute.grad_checkpointing:
            enable_grad_checkpointing(model)
            for block in model.modules():
                if isinstance(block, CheckpointableBlock):
                    block.register_forward_pre_hook(save_inputs, with_kwargs=True)
        kept = _measure_saved_bytes(model, lambda: model(images, noise=noise))
        if inputs:  # the blocks' inputs, and the activations of one block at a time while it is recomputed
            kept += sum(given[0].untyped_storage().nbytes() for given in inputs.values())
            kept += max(
                _measure_saved_bytes(model, lambda block=block, given=given: _recompute(block, *given))
                for block, given in inputs.items()
            )
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return trained, sum(p.numel() for p in model.parameters()) - trained, kept


def _recompute(block: Any, *inputs: Any) -> Tensor:
    """Compute a block's forward pass, as activation recomputation does."""
    if isinstance(block, Block):
        return block._forward(inputs[0], None, inputs[1] if len(inputs) > 1 else 0)
    return block._forward(*inputs)


def _measure_saved_bytes(model: nn.Module, forward: Callable[[], object]) -> int:
    """Return the bytes that a forward pass saves for the backward pass, without parameters."""
    own = {p.untyped_storage()._cdata for p in model.parameters()}
    kept: dict[int, int] = {}
    alive: list[Tensor] = []  # so that no storage is freed and its address reused

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage.nbytes()
            alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        forward()
    return sum(kept.values())
