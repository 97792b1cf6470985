"""What knn and linear start from: the encoders to compare, and the labelled images to compare them on."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from quarterview.evaluation.config import FeatureKind, LabelledImagesConfig, ProbeConfig
from quarterview.evaluation.features import BackboneConfig, Encoder, Features, extract, make_encoders
from quarterview.evaluation.labelled import LabelledSplit, open_split
from quarterview.training.distributed import choose_device
from quarterview.weights.loading import load


@dataclass(frozen=True)
class Probe:
    """Encoders to compare, and the labelled images to compare them on. Made by `open_probe`."""

    encoders: Mapping[str, Encoder]
    """By the name that they have in tables."""
    backbone: BackboneConfig
    """Size and channels of the images that they take."""
    device: torch.device
    kind: FeatureKind
    images: LabelledSplit
    chosen: Tensor
    """int64, the training images whose labels may be used."""
    crop_pct: float | None = None
    seed: int = 0

    def features(self) -> dict[str, Features]:
        """The features of each encoder, by its name. Images that cannot be read are left out."""
        train, test = self.images.train, self.images.test
        of = partial(extract, config=self.backbone, device=self.device, crop_pct=self.crop_pct)
        train_features, train_kept = of(self.encoders, train, self.chosen.tolist())
        test_features, test_kept = of(self.encoders, test, range(len(test)))
        labels, test_labels = self.images.train_labels[train_kept], self.images.test_labels[test_kept]
        return {
            name: Features(train_features[name], labels, test_features[name], test_labels)
            for name in self.encoders
        }


def open_probe(images: LabelledImagesConfig, config: ProbeConfig, default: FeatureKind = "mean") -> Probe:
    """Open the model and the images of a probe.

    Args:
        default: the kind of features where the configuration leaves it open.

    Raises:
        UserError: if the weights cannot be loaded, or the images not be compared, see `open_split`.
    """
    device = choose_device(config.device)
    model = load(config.run, config.ema).to(device)
    split = open_split(images.train, images.test, model.config.in_chans)
    chosen = split.choose(config.labels, config.seed)
    kind = config.features or default
    encoders = make_encoders(model, kind, config.baselines, config.compile, config.seed)
    return Probe(encoders, model.config, device, kind, split, chosen, config.crop_pct, config.seed)
