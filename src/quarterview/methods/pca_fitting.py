"""What a target learns from the images before a model does."""

from collections.abc import Callable

from quarterview.data.loader import central
from quarterview.data.reading import Report, read_many
from quarterview.data.sampler import SampleStream
from quarterview.data.sources.base import Source
from quarterview.data.transforms.crop import normalise, to_float
from quarterview.errors import RunError
from quarterview.models.mae import MaskedAutoencoder
from quarterview.models.targets import PatchMoments, PCATarget

FITTED_IMAGES = 4096


def fit_components(
    model: MaskedAutoencoder,
    source: Source,
    stream: SampleStream,
    threads: int,
    report: Callable[[Report], None],
) -> None:
    """Fit the principal components that a model predicts, to the patches of up to 4,096 training images.

    Raises:
        RunError: if too few of them can be read.
    """
    target, config = model.target, model.config
    assert isinstance(target, PCATarget)
    assert config.mean is not None
    assert config.std is not None
    moments = PatchMoments(len(target.mean))
    for _, picture, reports in read_many(source, stream.training_sample(FITTED_IMAGES).tolist(), threads):
        for said in reports:
            report(said)
        if picture is not None:
            image = to_float(central(picture.pixels, config.image_size))[None]
            moments.add(model.patchify(normalise(image, config.mean, config.std)))
    try:
        target.fit(moments)
    except ValueError as error:
        raise RunError(f"{error}, or more images") from None
