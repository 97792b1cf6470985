"""Fit the principal components of the PCA target before training."""

from collections.abc import Callable

from quarterview.data.loader import resized_center_crop
from quarterview.data.reading import SampleReport, read_samples
from quarterview.data.sampler import SampleStream
from quarterview.data.sources.base import Source
from quarterview.data.transforms.crop import normalize, to_float
from quarterview.errors import RunError
from quarterview.models.mae import MaskedAutoencoder
from quarterview.models.targets import PatchMoments, PCATarget

MAX_FITTED_IMAGES = 4096


def fit_pca_target(
    model: MaskedAutoencoder,
    source: Source,
    stream: SampleStream,
    num_threads: int,
    on_report: Callable[[SampleReport], None],
) -> None:
    """Fit the principal components of a model's target to the patches of up to 4,096 training images.

    Args:
        model: a masked autoencoder with a `PCATarget`.
        source: the images.
        stream: the stream of training samples, which selects the images by its seed.
        num_threads: the number of threads that decode images.
        on_report: called with a report of each image that is unreadable or remarkable.

    Raises:
        RunError: if too few images can be read.
    """
    target, config = model.target, model.config
    assert isinstance(target, PCATarget)
    assert config.mean is not None
    assert config.std is not None
    moments = PatchMoments(len(target.mean))
    ids = stream.select_train_ids(MAX_FITTED_IMAGES).tolist()
    for _, decoded, reports in read_samples(source, ids, num_threads):
        for report in reports:
            on_report(report)
        if decoded is not None:
            image = to_float(resized_center_crop(decoded.pixels, config.image_size))[None]
            moments.update(model.patchify(normalize(image, config.mean, config.std)))
    try:
        target.fit(moments)
    except ValueError as error:
        raise RunError(str(error)) from None
