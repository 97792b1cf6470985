"""What a run would be: its configuration, size, length and memory, without training anything."""

from collections.abc import Callable
from typing import Any

import torch
import yaml
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from quarterview.commands.config import PretrainConfig
from quarterview.data.sampler import default_holdout
from quarterview.data.shuffle import stream_of
from quarterview.data.sources.base import Source
from quarterview.data.sources.open import open_sources
from quarterview.errors import UserError
from quarterview.methods.config import Tokenizer
from quarterview.models.mae import MaskedAutoencoder
from quarterview.models.vit import Block, Recomputable, recompute_blocks
from quarterview.training.console import Console
from quarterview.training.distributed import choose_device
from quarterview.training.optim import warmup_steps
from quarterview.training.run import check_shares
from quarterview.training.trainer import precision_context, usable_precision

ADAM_BYTES = 4 + 4 + 4 + 4
"""A trained weight, its gradient and its two moments, in float32."""


def show(config: PretrainConfig) -> None:
    """Say what a configuration comes to.

    Raises:
        UserError: if the request cannot be met.
    """
    if not config.method.predicts:
        raise UserError(
            f"--dry-run is not supported with --method {config.method.name}, of which no memory is known. "
            "Use --method mae, denoising or beit."
        )
    console, loop = Console(), config.loop
    source = check(config)
    device = choose_device(config.compute.device)
    precision = usable_precision(config.compute.precision, device)
    holdout = default_holdout(len(source)) if config.data.holdout is None else config.data.holdout
    trained = stream_of(config.data, source, holdout, loop.seed).trained
    steps = loop.total_steps(trained)
    warmup, warning = warmup_steps(config.optim.warmup_epochs, trained / loop.batch_size, steps)
    parameters, frozen, activations = measure(config, precision, device)
    console.say(yaml.safe_dump(config.to_plain(), sort_keys=False).rstrip())
    if warning:
        console.warn(warning)
    peak, masks = config.optim.peak_lr(loop.batch_size), masks_per_image(config)
    memory = (parameters * ADAM_BYTES + frozen * 4 + activations) / 2**30
    part = f"{loop.batch_size // loop.accum_iter} images"
    if masks > 1:
        part += f", each hidden in {masks} ways,"
    rows = [
        ("images", f"{len(source):,}, of which {trained:,} are trained on and {holdout:,} held out"),
        ("parameters", f"{parameters:,} trained, {frozen:,} in fixed position tables"),
        ("steps", f"{steps:,}, the first {warmup:,} of them warm-up to a learning rate of {peak:.2e}"),
        ("epochs", f"{steps * loop.batch_size / trained:.4g}"),
        ("device", f"{device}, {precision}"),
        ("memory", f"about {memory:.2f} GiB for {part} at a time on one device, "
                   "cached images and libraries not counted"),
    ]  # fmt: skip
    console.facts("dry run", rows)


def masks_per_image(config: PretrainConfig) -> int:
    """Ways in which an image is hidden in one update."""
    return getattr(config.method, "masks_per_image", 1)


def check(config: PretrainConfig, ranks: int = 1) -> Source:
    """Refuse what could not be trained by so many ranks, as far as can be seen where none of them is.

    Returns:
        The images.

    Raises:
        UserError: if the request cannot be met.
    """
    if not config.data.data:
        raise UserError("There are no images. Give --data with at least one source.")
    check_shares(config.loop, ranks)
    return open_sources(config.data.data, config.model.in_chans)


def measure(config: PretrainConfig, precision: str, device: torch.device) -> tuple[int, int, int]:
    """Trained and frozen parameters, and the bytes that one forward pass keeps for the backward one.

    The pass is traced with tensors that have shapes and no memory, as a CPU would compute it.
    """
    inputs: dict[nn.Module, tuple[Any, ...]] = {}

    def note(block: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        inputs[block] = (*given, *named.values())

    encoder = config.model
    with FakeTensorMode(), precision_context(precision, torch.device("cpu"))():
        vocabulary = getattr(config.method, "vocabulary", None) or Tokenizer.vocabulary
        model = MaskedAutoencoder(config.autoencoder(vocabulary))
        size = config.loop.batch_size // config.loop.accum_iter
        images = torch.empty(size, encoder.in_chans, *encoder.image_size)
        noise = torch.empty(len(images), masks_per_image(config), encoder.patches)
        if config.compute.grad_checkpointing:
            recompute_blocks(model)
            for block in model.modules():
                if isinstance(block, Recomputable):
                    block.register_forward_pre_hook(note, with_kwargs=True)
        kept = _kept_bytes(model, lambda: model(images, noise=noise))
        if inputs:  # those, and the inside of one block at a time when it is computed again
            kept += sum(given[0].untyped_storage().nbytes() for given in inputs.values())
            kept += max(
                _kept_bytes(model, lambda block=block, given=given: _inside(block, *given))
                for block, given in inputs.items()
            )
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return trained, sum(p.numel() for p in model.parameters()) - trained, kept


def _inside(block: Any, *inputs: Any) -> Tensor:
    """What a block computes again."""
    if isinstance(block, Block):
        return block._forward(inputs[0], None, inputs[1] if len(inputs) > 1 else 0)
    return block._forward(*inputs)


def _kept_bytes(model: nn.Module, forward: Callable[[], object]) -> int:
    """The bytes that a forward pass keeps for the backward one, besides the parameters."""
    own = {p.untyped_storage()._cdata for p in model.parameters()}
    kept: dict[int, int] = {}
    alive: list[Tensor] = []  # so that no storage is another's successor

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage.nbytes()
            alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        forward()
    return sum(kept.values())
