"""Common setup of the commands knn and linear: encoders to compare, and labelled images."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from quarterview.evaluation.config import FeaturePool, LabeledImagesConfig, ProbeConfig
from quarterview.evaluation.features import BackboneConfig, Encoder, Features, extract_features, make_encoders
from quarterview.evaluation.labelled import LabeledSplit, open_split
from quarterview.training.distributed import choose_device
from quarterview.weights.loading import load


@dataclass(frozen=True)
class Probe:
    """Encoders to compare, and the labelled images to compare them on. Created by `open_probe`."""

    encoders: Mapping[str, Encoder]
    """Name in tables -> encoder."""
    backbone_config: BackboneConfig
    """Image size and channels of the encoders."""
    device: torch.device
    pool: FeaturePool
    split: LabeledSplit
    labeled_ids: Tensor
    """int64, the ids of the training images whose labels may be used."""
    crop_pct: float | None = None
    seed: int = 0

    def extract_features(self) -> dict[str, Features]:
        """Extract the features of each encoder: name -> features. Unreadable images are left out."""
        train, test = self.split.train, self.split.test
        extract = partial(
            extract_features, config=self.backbone_config, device=self.device, crop_pct=self.crop_pct
        )
        train_features, train_ids = extract(self.encoders, train, self.labeled_ids.tolist())
        test_features, test_ids = extract(self.encoders, test, range(len(test)))
        labels, test_labels = self.split.train_labels[train_ids], self.split.test_labels[test_ids]
        return {
            name: Features(train_features[name], labels, test_features[name], test_labels)
            for name in self.encoders
        }


def open_probe(images: LabeledImagesConfig, config: ProbeConfig, default_pool: FeaturePool = "mean") -> Probe:
    """Open the model and the images of a probe.

    Args:
        default_pool: kind of features if the configuration does not set it.

    Raises:
        UserError: if the weights cannot be loaded, or the images are not suitable, see `open_split`.
    """
    device = choose_device(config.device)
    model = load(config.run, config.ema).to(device)
    split = open_split(images.train, images.test, model.config.in_chans)
    labeled_ids = split.choose_labeled(config.labels, config.seed)
    pool = config.features or default_pool
    encoders = make_encoders(model, pool, config.baselines, config.compile, config.seed)
    return Probe(encoders, model.config, device, pool, split, labeled_ids, config.crop_pct, config.seed)
