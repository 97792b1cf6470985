"""Learning by comparing two views of an image: SimCLR, BYOL, MoCo v3.

What the paper's section 4 stands beside. The encoder is ours; heads and losses are lightly's where
it has them. All ranks' features are brought together before the heads, so that BatchNorm and
negatives are those of the whole batch, whatever the number of ranks, and every rank computes the same
loss. For the same reason a batch cannot be accumulated in parts.
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
from quarterview.errors import UserError
from quarterview.methods import config as configs
from quarterview.methods.base import Gather, Loss, Setting
from quarterview.models.create import fresh_encoder
from quarterview.models.vit import VisionTransformer

AnyModule = TypeVar("AnyModule", bound=nn.Module)


class Contrastive(nn.Module):
    """What the three have in common: cls tokens of two views, gathered from all ranks.

    Raises:
        UserError: if lightly is not installed.
        ValueError: if a batch has no second view.
    """

    def __init__(self, model: VisionTransformer, gather: Gather = lambda rows: rows) -> None:
        super().__init__()
        self.model, self.gather = model, gather

    def views(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Both views of this rank's images."""
        if batch.second is None:
            raise ValueError("a batch of one view; accepted: batches of a loader that makes two")
        return batch.images, batch.second

    def features(self, encoder: VisionTransformer, images: Tensor) -> Tensor:
        """The cls tokens of all ranks' images, of several the mean: float32 [B, D]."""
        return self.gather(encoder(images)[:, : encoder.config.cls_tokens].float().mean(dim=1))


class SimCLR(Contrastive):
    """Chen et al. 2020: a view's partner among all other views of the batch, by NT-Xent."""

    def __init__(
        self, model: VisionTransformer, config: configs.SimCLR, gather: Gather = lambda rows: rows
    ) -> None:
        super().__init__(model, gather)
        losses, heads = _lightly()
        width = model.config.shape.width
        self.projector = plain_batch_norm(
            heads.SimCLRProjectionHead(width, config.head_width, config.head_out)
        )
        self.compare = losses.NTXentLoss(temperature=config.temperature)

    def forward(self, batch: Batch) -> Loss:
        views = [self.features(self.model, view) for view in self.views(batch)]
        with torch.autocast(batch.images.device.type, enabled=False):
            loss = self.compare(*(self.projector(view) for view in views))
        return Loss(loss, {"feature_spread": spread_of(views[0])})


class Taught(Contrastive):
    """A teacher, the moving average of the student, says what the student's other view should give.

    It follows at the beginning of each training pass, so before the first its weights are the student's;
    its share of itself rises along a cosine from `momentum` to 1 over `updates` of them.
    """

    updated: Tensor

    def __init__(
        self, model: VisionTransformer, projector: nn.Module, momentum: float, updates: int, gather: Gather
    ) -> None:
        super().__init__(model, gather)
        self.projector = projector
        self.teacher, self.teacher_projector = _frozen(model), _frozen(projector)
        self.momentum, self.updates = momentum, updates
        self.register_buffer("updated", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def follow(self) -> None:
        """Move the teacher towards the student, by 1 - m of the way."""
        progress = (self.updated.float() / self.updates).clamp(max=1)
        way = (1 - self.momentum) * 0.5 * (1 + (math.pi * progress).cos())
        pairs = ((self.teacher, self.model), (self.teacher_projector, self.projector))
        for teacher, student in pairs:
            for mine, theirs in zip(teacher.parameters(), student.parameters(), strict=True):
                mine.lerp_(theirs.to(mine.dtype), way.to(mine))
        self.updated += 1

    def both(self, batch: Batch) -> tuple[list[Tensor], list[Tensor]]:
        """The student's features of both views, and what the teacher makes of them."""
        if self.training:
            self.follow()
        views = self.views(batch)
        with torch.no_grad():
            taught = [self.features(self.teacher, view) for view in views]
            with torch.autocast(batch.images.device.type, enabled=False):
                taught = [self.teacher_projector(view) for view in taught]
        return [self.features(self.model, view) for view in views], taught


class BYOL(Taught):
    """Grill et al. 2020: predict the teacher's projection of the other view; no negatives."""

    def __init__(
        self,
        model: VisionTransformer,
        config: configs.BYOL,
        updates: int,
        gather: Gather = lambda rows: rows,
    ) -> None:
        losses, heads = _lightly()
        width, hidden, out = model.config.shape.width, config.head_width, config.head_out
        projector = plain_batch_norm(heads.BYOLProjectionHead(width, hidden, out))
        super().__init__(model, projector, config.momentum, updates, gather)
        self.predictor = plain_batch_norm(heads.BYOLPredictionHead(out, hidden, out))
        self.compare = losses.NegativeCosineSimilarity()

    def forward(self, batch: Batch) -> Loss:
        views, (first, second) = self.both(batch)
        with torch.autocast(batch.images.device.type, enabled=False):
            predictions = [self.predictor(self.projector(view)) for view in views]
            # The squared distance of unit vectors is 2 - 2 cos; both directions are added.
            loss = 4 + 2 * (self.compare(predictions[0], second) + self.compare(predictions[1], first))
        return Loss(loss, {"feature_spread": spread_of(views[0])})


class MoCoV3(Taught):
    """Chen et al. 2021: find the teacher's projection of the other view among those of the batch.

    The patch embedding keeps its random weights, which that paper found to be stable.
    """

    def __init__(
        self,
        model: VisionTransformer,
        config: configs.MoCoV3,
        updates: int,
        gather: Gather = lambda rows: rows,
    ) -> None:
        _, heads = _lightly()
        width, hidden, out = model.config.shape.width, config.head_width, config.head_out
        model.patch_embed.requires_grad_(False)
        projector = plain_batch_norm(_moco_head(heads.ProjectionHead, width, hidden, out, depth=3))
        super().__init__(model, projector, config.momentum, updates, gather)
        self.predictor = plain_batch_norm(_moco_head(heads.ProjectionHead, out, hidden, out, depth=2))
        self.temperature = config.temperature

    def forward(self, batch: Batch) -> Loss:
        views, (first, second) = self.both(batch)
        with torch.autocast(batch.images.device.type, enabled=False):
            queries = [self.predictor(self.projector(view)) for view in views]
            loss = info_nce(queries[0], second, self.temperature)
            loss = loss + info_nce(queries[1], first, self.temperature)
        return Loss(loss, {"feature_spread": spread_of(views[0])})


def info_nce(queries: Tensor, keys: Tensor, temperature: float) -> Tensor:
    """MoCo v3's loss of one direction: each query against the other view's keys alone.

    Args:
        queries, keys: float [B, E]; a query's own key is in its row.

    Returns:
        2 * temperature * cross-entropy, on average.
    """
    logits = F.normalize(queries, dim=1) @ F.normalize(keys, dim=1).T / temperature
    own = torch.arange(len(queries), device=queries.device)
    return 2 * temperature * F.cross_entropy(logits, own)


@torch.no_grad()
def spread_of(features: Tensor) -> Tensor:
    """How far features are from having collapsed: 1 where directions are even, 0 where all are alike.

    The deviation of each number of the unit vectors, on average, times the root of their length.
    """
    unit = F.normalize(features.detach().float(), dim=1)
    return unit.std(dim=0, correction=0).mean() * unit.shape[1] ** 0.5


# ---------------------------------------------------------------------- heads


def plain_batch_norm(head: nn.Module) -> nn.Module:
    """A head whose BatchNorms go by the batch alone, in evaluation too.

    Heads are thrown away, so running means would serve nobody, and a batch that is not finite would
    spoil them.
    """
    for module in head.modules():
        if isinstance(module, nn.BatchNorm1d):
            module.track_running_stats = False
            module.running_mean = module.running_var = module.num_batches_tracked = None
    return head


def _moco_head(kind: Callable[[list], nn.Module], width: int, hidden: int, out: int, depth: int) -> nn.Module:
    """MoCo v3's MLP: BatchNorm after every layer, the last without scale and shift."""
    widths = [width, *[hidden] * (depth - 1)]
    layers: list = [(into, hidden, nn.BatchNorm1d(hidden), nn.ReLU()) for into in widths[:-1]]
    return kind([*layers, (widths[-1], out, nn.BatchNorm1d(out, affine=False), None)])


def _frozen(module: AnyModule) -> AnyModule:
    twin = copy.deepcopy(module)
    twin.requires_grad_(False)
    return twin


def _lightly() -> tuple[ModuleType, ModuleType]:
    """lightly's losses and heads.

    Raises:
        UserError: if it is not installed.
    """
    try:
        from lightly import loss
        from lightly.models.modules import heads
    except ImportError:
        raise UserError(
            "simclr, byol and mocov3 take their heads from lightly: pip install 'quarterview[baselines]'"
        ) from None
    return loss, heads


def build(config: configs.SimCLR | configs.BYOL | configs.MoCoV3, setting: Setting) -> Contrastive:
    """The method of a configuration, with the initial encoder and heads that belong to the seed."""
    encoder = fresh_encoder(setting.encoder, setting.seed)
    with rng.seeded(setting.seed, "heads"):
        if isinstance(config, configs.SimCLR):
            return SimCLR(encoder, config, setting.gather)
        if isinstance(config, configs.BYOL):
            return BYOL(encoder, config, setting.steps, setting.gather)
        return MoCoV3(encoder, config, setting.steps, setting.gather)
