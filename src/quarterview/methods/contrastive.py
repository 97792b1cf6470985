"""Self-supervised baselines that compare two views of an image: SimCLR, BYOL and MoCo v3.

The MAE paper compares itself with MoCo v3 (section 4). The encoder is this package's; heads and losses are
lightly's where it has them. The features of all ranks are gathered before the heads, so BatchNorm and
negatives are those of the whole batch whatever the number of ranks, and every rank computes the same loss.
Gradient accumulation is therefore not supported.
"""

import copy
import math
from collections.abc import Callable
from types import ModuleType
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quarterview import rng
from quarterview.data.loader import Batch
from quarterview.errors import missing_package
from quarterview.methods import config as configs
from quarterview.methods.base import GatherFn, MethodContext, MethodOutput
from quarterview.models.create import create_encoder
from quarterview.models.vit import VisionTransformer

ModuleT = TypeVar("ModuleT", bound=nn.Module)


class Contrastive(nn.Module):
    """Base class: cls tokens of two views of each image, gathered from all ranks.

    Raises:
        UserError: if lightly is not installed.
        ValueError: if a batch has no second view.
    """

    def __init__(self, model: VisionTransformer, gather: GatherFn = lambda rows: rows) -> None:
        super().__init__()
        self.model, self.gather = model, gather

    def get_views(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return both views of this rank's images."""
        if batch.second_view is None:
            raise ValueError("The batch has one view of each image. Use a loader that makes two views.")
        return batch.images, batch.second_view

    def compute_features(self, encoder: VisionTransformer, images: Tensor) -> Tensor:
        """Return the cls features of the images of all ranks, float32 [B, D].

        With several cls tokens the feature is their mean.
        """
        return self.gather(encoder(images)[:, : encoder.config.cls_tokens].float().mean(dim=1))


class SimCLR(Contrastive):
    """SimCLR (Chen et al. 2020): find the other view of an image among all views of the batch (NT-Xent)."""

    def __init__(
        self, model: VisionTransformer, config: configs.SimCLRConfig, gather: GatherFn = lambda rows: rows
    ) -> None:
        super().__init__(model, gather)
        losses, heads = _import_lightly()
        width = model.config.shape.width
        self.projector = use_batch_statistics(
            heads.SimCLRProjectionHead(width, config.proj_hidden_dim, config.proj_output_dim)
        )
        self.criterion = losses.NTXentLoss(temperature=config.temperature)

    def forward(self, batch: Batch) -> MethodOutput:
        views = [self.compute_features(self.model, view) for view in self.get_views(batch)]
        with torch.autocast(batch.images.device.type, enabled=False):
            loss = self.criterion(*(self.projector(view) for view in views))
        return MethodOutput(loss, {"feature_spread": compute_feature_std(views[0])})


class MomentumTeacherMethod(Contrastive):
    """Base class of methods whose targets come from a teacher, a moving average of the model (the student).

    The teacher is updated at the beginning of each training pass; at the first its weights equal the
    student's. The momentum rises along a cosine from `momentum` to 1 over `num_updates` passes.
    """

    updated: Tensor
    """int64 scalar, the number of updates of the teacher so far."""

    def __init__(
        self,
        model: VisionTransformer,
        projector: nn.Module,
        momentum: float,
        num_updates: int,
        gather: GatherFn,
    ) -> None:
        super().__init__(model, gather)
        self.projector = projector
        self.teacher, self.teacher_projector = _make_frozen_copy(model), _make_frozen_copy(projector)
        self.momentum, self.num_updates = momentum, num_updates
        self.register_buffer("updated", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def update_teacher(self) -> None:
        """Update the teacher: teacher = m * teacher + (1 - m) * student, with the current momentum m."""
        progress = (self.updated.float() / self.num_updates).clamp(max=1)
        student_weight = (1 - self.momentum) * 0.5 * (1 + (math.pi * progress).cos())
        pairs = ((self.teacher, self.model), (self.teacher_projector, self.projector))
        for teacher, student in pairs:
            for average, current in zip(teacher.parameters(), student.parameters(), strict=True):
                average.lerp_(current.to(average.dtype), student_weight.to(average))
        self.updated += 1

    def compute_both_features(self, batch: Batch) -> tuple[list[Tensor], list[Tensor]]:
        """Return the student's features and the teacher's projections, each of both views."""
        if self.training:
            self.update_teacher()
        views = self.get_views(batch)
        with torch.no_grad():
            targets = [self.compute_features(self.teacher, view) for view in views]
            with torch.autocast(batch.images.device.type, enabled=False):
                targets = [self.teacher_projector(features) for features in targets]
        return [self.compute_features(self.model, view) for view in views], targets


class BYOL(MomentumTeacherMethod):
    """BYOL (Grill et al. 2020): predict the teacher's projection of the other view, without negatives."""

    def __init__(
        self,
        model: VisionTransformer,
        config: configs.BYOLConfig,
        num_updates: int,
        gather: GatherFn = lambda rows: rows,
    ) -> None:
        losses, heads = _import_lightly()
        width, hidden, out = model.config.shape.width, config.proj_hidden_dim, config.proj_output_dim
        projector = use_batch_statistics(heads.BYOLProjectionHead(width, hidden, out))
        super().__init__(model, projector, config.momentum, num_updates, gather)
        self.predictor = use_batch_statistics(heads.BYOLPredictionHead(out, hidden, out))
        self.criterion = losses.NegativeCosineSimilarity()

    def forward(self, batch: Batch) -> MethodOutput:
        views, (first, second) = self.compute_both_features(batch)
        with torch.autocast(batch.images.device.type, enabled=False):
            predictions = [self.predictor(self.projector(view)) for view in views]
            # The squared distance of unit vectors is 2 - 2 cos. The losses of both directions are added.
            loss = 4 + 2 * (self.criterion(predictions[0], second) + self.criterion(predictions[1], first))
        return MethodOutput(loss, {"feature_spread": compute_feature_std(views[0])})


class MoCoV3(MomentumTeacherMethod):
    """MoCo v3 (Chen et al. 2021): find the teacher's projection of the other view among those of the batch.

    The patch embedding is frozen at its random weights, which makes training stable (section 4 there).
    """

    def __init__(
        self,
        model: VisionTransformer,
        config: configs.MoCoV3Config,
        num_updates: int,
        gather: GatherFn = lambda rows: rows,
    ) -> None:
        _, heads = _import_lightly()
        width, hidden, out = model.config.shape.width, config.proj_hidden_dim, config.proj_output_dim
        model.patch_embed.requires_grad_(False)
        projector = use_batch_statistics(_make_mocov3_head(heads.ProjectionHead, width, hidden, out, depth=3))
        super().__init__(model, projector, config.momentum, num_updates, gather)
        self.predictor = use_batch_statistics(
            _make_mocov3_head(heads.ProjectionHead, out, hidden, out, depth=2)
        )
        self.temperature = config.temperature

    def forward(self, batch: Batch) -> MethodOutput:
        views, (first, second) = self.compute_both_features(batch)
        with torch.autocast(batch.images.device.type, enabled=False):
            queries = [self.predictor(self.projector(view)) for view in views]
            loss = compute_info_nce(queries[0], second, self.temperature)
            loss = loss + compute_info_nce(queries[1], first, self.temperature)
        return MethodOutput(loss, {"feature_spread": compute_feature_std(views[0])})


def compute_info_nce(queries: Tensor, keys: Tensor, temperature: float) -> Tensor:
    """Compute MoCo v3's InfoNCE loss of one direction: queries of one view, keys of the other view.

    Args:
        queries, keys: float [B, E]; the positive key of a query is in the same row.
        temperature: the divisor of the cosine similarities.

    Returns:
        The mean of 2 * temperature * cross-entropy.
    """
    logits = F.normalize(queries, dim=1) @ F.normalize(keys, dim=1).T / temperature
    positives = torch.arange(len(queries), device=queries.device)
    return 2 * temperature * F.cross_entropy(logits, positives)


@torch.no_grad()
def compute_feature_std(features: Tensor) -> Tensor:
    """Measure how far features [B, D] are from collapse: 0 if all are equal, 1 if directions are uniform.

    It is the mean over dimensions of the standard deviation of the L2-normalised features, times sqrt(D).
    """
    unit = F.normalize(features.detach().float(), dim=1)
    return unit.std(dim=0, correction=0).mean() * unit.shape[1] ** 0.5


# ---------------------------------------------------------------------- heads


def use_batch_statistics(head: nn.Module) -> nn.Module:
    """Make the BatchNorms of a head use the statistics of the batch, in evaluation mode too.

    Heads are discarded after training, so running statistics are not needed, and a batch with infinite or NaN
    values would spoil them.
    """
    for module in head.modules():
        if isinstance(module, nn.BatchNorm1d):
            module.track_running_stats = False
            module.running_mean = module.running_var = module.num_batches_tracked = None
    return head


def _make_mocov3_head(
    head_class: Callable[[list], nn.Module], width: int, hidden: int, out: int, depth: int
) -> nn.Module:
    """Make an MLP head of MoCo v3: BatchNorm after every layer, the last one without scale and shift."""
    widths = [width, *[hidden] * (depth - 1)]
    layers: list = [(in_width, hidden, nn.BatchNorm1d(hidden), nn.ReLU()) for in_width in widths[:-1]]
    return head_class([*layers, (widths[-1], out, nn.BatchNorm1d(out, affine=False), None)])


def _make_frozen_copy(module: ModuleT) -> ModuleT:
    frozen = copy.deepcopy(module)
    frozen.requires_grad_(False)
    return frozen


def _import_lightly() -> tuple[ModuleType, ModuleType]:
    """Import the losses and heads of lightly.

    Raises:
        UserError: if lightly is not installed.
    """
    try:
        from lightly import loss
        from lightly.models.modules import heads
    except ImportError:
        raise missing_package("lightly", "Each of simclr, byol and mocov3", "baselines") from None
    return loss, heads


def build(
    config: configs.SimCLRConfig | configs.BYOLConfig | configs.MoCoV3Config, context: MethodContext
) -> Contrastive:
    """Build SimCLR, BYOL or MoCo v3, with the initial weights of the seed."""
    encoder = create_encoder(context.encoder, context.seed)
    with rng.seeded(context.seed, "heads"):
        if isinstance(config, configs.SimCLRConfig):
            return SimCLR(encoder, config, context.gather)
        if isinstance(config, configs.BYOLConfig):
            return BYOL(encoder, config, context.num_steps, context.gather)
        return MoCoV3(encoder, config, context.num_steps, context.gather)
