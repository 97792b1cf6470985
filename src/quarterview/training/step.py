"""One update of the weights, and nothing else: what the loop repeats, and what a benchmark times.

Nothing here is decided on the host. A step whose loss or gradient is not finite is dropped by the
fused optimiser on the device, and nobody waits to learn of it.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from quarterview.data.loader import Batch
from quarterview.methods.base import Loss, Method
from quarterview.training.distributed import World
from quarterview.training.sharding import adding_gradients, is_sharded, whole


class Step:
    """Forward, backward, optimiser.

    Args:
        method: what is trained; sharded already (see `sharding.shard`), or else wrapped for several ranks
            here.
        optimizer: fused, over the method's parameters.
        autocast: what to run the forward pass in.
        accum_iter: parts that a batch is cut into.
        clip_grad: largest norm of the gradient, or None.
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
        self.wrapped = method if is_sharded(method) else world.wrap(method)
        self.parameters = [p for p in method.parameters() if p.requires_grad]

    def forward(self, part: Batch) -> Loss:
        """The loss of a part of a batch, in the precision that is trained in."""
        with self.autocast():
            return self.wrapped(part)

    def gradients(self, batch: Batch, images: int | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """Leave the gradients of the whole batch in the parameters.

        Args:
            batch: this rank's part of the batch.
            images: in the whole batch, each of which counts alike; by default `batch` is the whole.

        Returns:
            The loss and the metrics of the whole batch, float32 scalars on the device.
        """
        loss = torch.zeros((), device=self.world.device)
        metrics: dict[str, Tensor] = {}
        images = images or len(batch.ids)
        parts = list(batch.chunks(self.accum_iter))
        for number, part in enumerate(parts, 1):
            weight = len(part.ids) / images * self.world.size  # the ranks' gradients are averaged
            with adding_gradients(self.wrapped, last=number == len(parts)):
                out = self.forward(part)
                share = out.loss * weight
                share.backward()
            loss += share.detach()
            for name, value in out.metrics.items():
                metrics[name] = metrics.get(name, 0) + value.detach() * weight
        if not metrics:
            return self.world.mean(loss), metrics
        means = self.world.mean(torch.stack([loss, *metrics.values()])).unbind()
        return means[0], dict(zip(metrics, means[1:], strict=True))

    def apply(self, loss: Tensor) -> tuple[Tensor, Tensor]:
        """Move the weights, if loss and gradient are finite, and drop the gradients.

        Returns:
            The norm of the gradient, float32, and whether the step was dropped, bool; scalars on the device.
        """
        norm = whole(nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None]))
        if self.clip_grad is not None:
            nn.utils.clip_grads_with_norm_(self.parameters, self.clip_grad, norm)
        bad = ~(loss.isfinite() & norm.isfinite())
        # With this set, the fused step changes nothing, on the device and without asking the host.
        setattr(self.optimizer, "found_inf", bad.float())  # noqa: B010
        self.optimizer.step()
        self.optimizer.zero_grad()
        return norm, bad
