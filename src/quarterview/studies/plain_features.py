"""What one had before: principal components and k-means, of whole pictures and of patches.

Fitted to unlabelled images by scikit-learn, a batch at a time, and judged as any encoder is.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from quarterview.data.sampler import SampleStream
from quarterview.data.sources.base import Source
from quarterview.data.transforms.crop import to_float
from quarterview.errors import RunError
from quarterview.evaluation.features import Encoder, central_batches, pixel_features, shrunk

COMPONENTS, PATCH_COMPONENTS = 128, 64
"""Of pictures, and of patches."""
WORDS, PATCH = 256, 6
"""Clusters, and the side of the patches (Coates et al. 2011, for pictures of 32 pixels)."""
_FITTED, _PATCHES_AN_IMAGE = 5000, 20
_BATCH = 500
_CONTRAST, _WHITENING = 10.0 / 255**2, 0.1  # Coates et al. 2011, for pixels in 0 … 1


def picture_components(source: Source, image_size: Sequence[int], seed: int) -> Encoder:
    """The largest principal components of whole pictures, each divided by its deviation.

    Raises:
        RunError: if there are too few images.
    """
    known = torch.cat([pixel_features(images) for images in _images(source, image_size, seed)])
    project = _components(known, COMPONENTS, "pictures")
    return lambda images: project(pixel_features(images).cpu())


def picture_clusters(source: Source, image_size: Sequence[int], seed: int) -> Encoder:
    """How near a whole picture, by its principal components, is to clusters of pictures.

    Raises:
        RunError: if there are too few images.
    """
    known = torch.cat([pixel_features(images) for images in _images(source, image_size, seed)])
    project = _components(known, COMPONENTS, "pictures")
    centres = _centres(project(known), seed, "pictures")
    return _in_parts(lambda images: _nearness(project(pixel_features(images).cpu()), centres))


def patch_components(source: Source, image_size: Sequence[int], seed: int) -> Encoder:
    """What each quarter of a picture has of the principal components of patches, both signs apart.

    Without the signs the sum over a quarter would be that of its mean patch (Coates and Ng 2011).

    Raises:
        RunError: if there are too few images.
    """
    project = _components(_some_patches(source, image_size, seed), PATCH_COMPONENTS, "patches")

    def describe(patches: Tensor) -> Tensor:
        found = project(patches.flatten(0, 1)).unflatten(0, patches.shape[:2])
        return torch.cat([found.clamp(min=0), (-found).clamp(min=0)], dim=2)

    return _in_parts(lambda images: _by_quarters(images, describe))


def patch_clusters(source: Source, image_size: Sequence[int], seed: int) -> Encoder:
    """How near the patches of each quarter of a picture are to clusters of patches (Coates et al. 2011).

    Patches of every place are made equal in brightness and contrast and whitened; a patch says of each
    cluster how much nearer than on average it is, and each quarter of the picture adds up its patches.

    Raises:
        RunError: if there are too few images.
    """
    known = _some_patches(source, image_size, seed).double()
    mean = known.mean(0)
    values, vectors = torch.linalg.eigh(torch.cov((known - mean).T))
    whiten = ((vectors * (values.clamp(min=0) + _WHITENING).rsqrt()) @ vectors.T).float()
    mean = mean.float()
    centres = _centres((known.float() - mean) @ whiten, seed, "patches")
    return _in_parts(
        lambda images: _by_quarters(images, lambda patches: _nearness((patches - mean) @ whiten, centres))
    )


def _components(known: Tensor, count: int, of: str) -> Callable[[Tensor], Tensor]:
    """The projection of rows to their largest principal components, each divided by its deviation."""
    from sklearn.decomposition import IncrementalPCA

    if len(known) < 2:
        raise RunError(f"principal components of {len(known)} {of}; accepted: 2 or more")
    count = min(count, *known.shape)
    pca = IncrementalPCA(count, whiten=True, batch_size=max(count, _BATCH)).fit(known.numpy())
    return lambda rows: torch.from_numpy(pca.transform(rows.numpy())).float()


def _centres(known: Tensor, seed: int, of: str) -> Tensor:
    """The centres of clusters of rows: float [WORDS, D], or one a row if there are fewer."""
    from sklearn.cluster import MiniBatchKMeans

    if len(known) < 2:
        raise RunError(f"clusters of {len(known)} {of}; accepted: 2 or more")
    kmeans = MiniBatchKMeans(min(WORDS, len(known)), random_state=seed, n_init=3, batch_size=2048)
    return torch.from_numpy(kmeans.fit(known.numpy()).cluster_centers_).float()


def _nearness(x: Tensor, centres: Tensor) -> Tensor:
    """How much nearer than on average each centre is, 0 if it is not: [..., D] -> [..., WORDS]."""
    distances = torch.cdist(x, centres.expand(*x.shape[:-2], -1, -1))
    return (distances.mean(dim=-1, keepdim=True) - distances).clamp(min=0)


def _some_patches(source: Source, image_size: Sequence[int], seed: int) -> Tensor:
    """Patches at random places, made even: float [N, P]."""
    generator = np.random.default_rng(seed)
    found = []
    for images in _images(source, image_size, seed):
        patches = _patches(images)  # [B, places, P]
        places = generator.integers(0, patches.shape[1], (len(patches), _PATCHES_AN_IMAGE))
        chosen = patches.gather(1, torch.from_numpy(places)[:, :, None].expand(-1, -1, patches.shape[2]))
        found.append(_even(chosen.flatten(0, 1)))
    return torch.cat(found)


def _by_quarters(images: Tensor, describe: Callable[[Tensor], Tensor]) -> Tensor:
    """What is said of even patches, [B, places, P] -> [B, places, D], as means over quarters: [B, 4 * D]."""
    images = shrunk(images.cpu())
    rows, columns = (side - PATCH + 1 for side in images.shape[2:])
    maps = describe(_even(_patches(images))).transpose(1, 2).unflatten(2, (rows, columns))
    return F.adaptive_avg_pool2d(maps, 2).flatten(1)


def _in_parts(encode: Callable[[Tensor], Tensor], size: int = 32) -> Encoder:
    """The same, a few pictures at a time: distances to all clusters take room."""
    return lambda images: torch.cat([encode(part) for part in images.split(size)])


def _images(source: Source, image_size: Sequence[int], seed: int) -> Iterator[Tensor]:
    """Keyed images, float [B, C, H, W] in [0, 1], shrunk as pixels are that serve as features."""
    ids = SampleStream(len(source), 0, seed).training_sample(_FITTED).tolist()
    for _, pixels in central_batches(source, ids, image_size, _BATCH):
        yield shrunk(to_float(pixels))


def _patches(images: Tensor) -> Tensor:
    """Every patch of a picture: float [B, places, PATCH * PATCH * C], by row."""
    return F.unfold(images, PATCH).transpose(1, 2)


def _even(patches: Tensor) -> Tensor:
    """Patches less their mean, divided by their deviation."""
    variance, mean = torch.var_mean(patches, dim=-1, keepdim=True)
    return (patches - mean) / (variance + _CONTRAST).sqrt()


PLAIN: Mapping[str, Callable[[Source, Sequence[int], int], Encoder]] = {
    "pixels": lambda _source, _size, _seed: pixel_features,
    "pca": picture_components,
    "pca_patches": patch_components,
    "kmeans": patch_clusters,
    "kmeans_pixels": picture_clusters,
}
"""What makes features without a network, by the start of an arm."""
