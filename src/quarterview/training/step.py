"""One training step: forward, backward and optimizer, used by the training loop and by benchmarks.

Nothing in a step synchronizes with the host. The fused optimizer skips a step with a loss or gradient that is
not finite on the device.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from quarterview.data.loader import Batch
from quarterview.methods.base import Method, MethodOutput
from quarterview.training.distributed import World
from quarterview.training.sharding import gather_full, is_sharded, sync_gradients_if_last


class TrainStep:
    """Forward pass, backward pass and optimizer step.

    Args:
        method: the method to train. If it is not sharded (see `sharding.apply_fsdp`), it is wrapped in DDP
            here when there are several ranks.
        optimizer: fused, over the method's parameters.
        autocast: returns the context manager of the forward pass.
        accum_iter: number of parts that a batch is split into.
        clip_grad: maximum norm of the gradient, or None.
    """

    def __init__(
        self,
        method: Method,
        optimizer: torch.optim.AdamW,
        world: World,
        autocast: Callable[[], AbstractContextManager],
        accum_iter: int = 1,
        clip_grad: float | None = None,
    ) -> None:
        assert isinstance(method, nn.Module)
        self.optimizer, self.world, self.autocast = optimizer, world, autocast
        self.accum_iter, self.clip_grad = accum_iter, clip_grad
        self.wrapped = method if is_sharded(method) else world.wrap_ddp(method)
        self.parameters = [p for p in method.parameters() if p.requires_grad]

    def forward(self, part: Batch) -> MethodOutput:
        """Return the loss of a part of a batch, computed under autocast."""
        with self.autocast():
            return self.wrapped(part)

    def accumulate_gradients(
        self, batch: Batch, images: int | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the gradients of the whole batch and leave them in the parameters.

        Args:
            batch: this rank's part of the batch.
            images: number of images in the batch over all ranks, each with equal weight; by default those of
                `batch`.

        Returns:
            The loss and the metrics of the whole batch, float32 scalars on the device.
        """
        loss = torch.zeros((), device=self.world.device)
        metrics: dict[str, Tensor] = {}
        images = images or len(batch.ids)
        parts = list(batch.chunk(self.accum_iter))
        for i, part in enumerate(parts, 1):
            weight = len(part.ids) / images * self.world.size  # the ranks' gradients are averaged
            with sync_gradients_if_last(self.wrapped, last=i == len(parts)):
                out = self.forward(part)
                weighted_loss = out.loss * weight
                weighted_loss.backward()
            loss += weighted_loss.detach()
            for name, value in out.metrics.items():
                metrics[name] = metrics.get(name, 0) + value.detach() * weight
        if not metrics:
            return self.world.all_reduce_mean(loss), metrics
        means = self.world.all_reduce_mean(torch.stack([loss, *metrics.values()])).unbind()
        return means[0], dict(zip(metrics, means[1:], strict=True))

    def update_weights(self, loss: Tensor) -> tuple[Tensor, Tensor]:
        """Update the weights if loss and gradient are finite, and reset the gradients.

        Returns:
            The norm of the gradient (float32) and whether the step was skipped (bool), scalars on the device.
        """
        norm = gather_full(nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None]))
        if self.clip_grad is not None:
            nn.utils.clip_grads_with_norm_(self.parameters, self.clip_grad, norm)
        bad = ~(loss.isfinite() & norm.isfinite())
        # With found_inf set, the fused step changes nothing, without synchronizing with the host.
        setattr(self.optimizer, "found_inf", bad.float())  # noqa: B010
        self.optimizer.step()
        self.optimizer.zero_grad()
        return norm, bad
