"""Features without a network: principal components and k-means clusters of whole images or of patches.

They are fitted to unlabelled images by scikit-learn, and evaluated like the features of any other encoder.
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
from quarterview.evaluation.features import (
    Encoder,
    compute_pixel_features,
    iterate_central_crops,
    shrink_images,
)

NUM_IMAGE_COMPONENTS, NUM_PATCH_COMPONENTS = 128, 64
"""Numbers of principal components of whole images and of patches."""
NUM_CLUSTERS, PATCH_SIZE = 256, 6
"""Number of clusters, and side of the patches in pixels, as in Coates et al. 2011 for 32 × 32 pixels."""
_NUM_FIT_IMAGES, _PATCHES_PER_IMAGE = 5000, 20
_BATCH_SIZE = 500
_CONTRAST_EPS, _WHITENING_EPS = 10.0 / 255**2, 0.1  # Coates et al. 2011, scaled to pixels in [0, 1]


def fit_image_pca(source: Source, image_size: Sequence[int], seed: int) -> Encoder:
    """Return an encoder that gives the first principal components of whole images, scaled to unit variance.

    Raises:
        RunError: if there are fewer than 2 images.
    """
    pixels = torch.cat([compute_pixel_features(images) for images in _iter_images(source, image_size, seed)])
    project = _fit_pca(pixels, NUM_IMAGE_COMPONENTS, "images")
    return lambda images: project(compute_pixel_features(images).cpu())


def fit_image_kmeans(source: Source, image_size: Sequence[int], seed: int) -> Encoder:
    """Return an encoder that gives the proximity of whole images to clusters of their principal components.

    Raises:
        RunError: if there are fewer than 2 images.
    """
    pixels = torch.cat([compute_pixel_features(images) for images in _iter_images(source, image_size, seed)])
    project = _fit_pca(pixels, NUM_IMAGE_COMPONENTS, "images")
    centers = _fit_kmeans(project(pixels), seed, "images")
    return _encode_in_chunks(
        lambda images: _compute_triangle_activations(project(compute_pixel_features(images).cpu()), centers)
    )


def fit_patch_pca(source: Source, image_size: Sequence[int], seed: int) -> Encoder:
    """Return an encoder that gives the principal components of patches, averaged over each image quadrant.

    Positive and negative parts are separate features (Coates and Ng 2011); otherwise the average would only
    describe the mean patch of the quadrant.

    Raises:
        RunError: if there are fewer than 2 patches.
    """
    project = _fit_pca(_sample_patches(source, image_size, seed), NUM_PATCH_COMPONENTS, "patches")

    def encode_patches(patches: Tensor) -> Tensor:
        components = project(patches.flatten(0, 1)).unflatten(0, patches.shape[:2])
        return torch.cat([components.clamp(min=0), (-components).clamp(min=0)], dim=2)

    return _encode_in_chunks(lambda images: _pool_quadrants(images, encode_patches))


def fit_patch_kmeans(source: Source, image_size: Sequence[int], seed: int) -> Encoder:
    """Return an encoder that gives the proximity of patches to clusters, averaged over each image quadrant.

    This is k-means (triangle) of Coates et al. 2011: patches at all positions are normalized in brightness
    and contrast, and whitened.

    Raises:
        RunError: if there are fewer than 2 patches.
    """
    patches = _sample_patches(source, image_size, seed).double()
    mean = patches.mean(0)
    values, vectors = torch.linalg.eigh(torch.cov((patches - mean).T))
    whiten = ((vectors * (values.clamp(min=0) + _WHITENING_EPS).rsqrt()) @ vectors.T).float()
    mean = mean.float()
    centers = _fit_kmeans((patches.float() - mean) @ whiten, seed, "patches")
    return _encode_in_chunks(
        lambda images: _pool_quadrants(
            images, lambda patches: _compute_triangle_activations((patches - mean) @ whiten, centers)
        )
    )


def _fit_pca(samples: Tensor, num_components: int, noun: str) -> Callable[[Tensor], Tensor]:
    """Fit a projection of samples, float [N, D], to their first components, scaled to unit variance.

    Args:
        noun: plural name of the samples in messages.
    """
    from sklearn.decomposition import IncrementalPCA

    if len(samples) < 2:
        raise RunError(f"Principal components need at least 2 {noun}, but --data has {len(samples)}.")
    num_components = min(num_components, *samples.shape)
    pca = IncrementalPCA(num_components, whiten=True, batch_size=max(num_components, _BATCH_SIZE))
    pca.fit(samples.numpy())
    return lambda features: torch.from_numpy(pca.transform(features.numpy())).float()


def _fit_kmeans(samples: Tensor, seed: int, noun: str) -> Tensor:
    """Return cluster centres of samples, float [N, D]: float [K, D], K = min(NUM_CLUSTERS, N)."""
    from sklearn.cluster import MiniBatchKMeans

    if len(samples) < 2:
        raise RunError(f"Clusters need at least 2 {noun}, but --data has {len(samples)}.")
    kmeans = MiniBatchKMeans(min(NUM_CLUSTERS, len(samples)), random_state=seed, n_init=3, batch_size=2048)
    return torch.from_numpy(kmeans.fit(samples.numpy()).cluster_centers_).float()


def _compute_triangle_activations(x: Tensor, centers: Tensor) -> Tensor:
    """Return the mean distance to all K centres minus that to each, at least 0: [..., D] -> [..., K]."""
    distances = torch.cdist(x, centers.expand(*x.shape[:-2], -1, -1))
    return (distances.mean(dim=-1, keepdim=True) - distances).clamp(min=0)


def _sample_patches(source: Source, image_size: Sequence[int], seed: int) -> Tensor:
    """Return normalized patches at random positions of the images: float [N, P]."""
    generator = np.random.default_rng(seed)
    samples = []
    for images in _iter_images(source, image_size, seed):
        patches = _extract_patches(images)  # [B, L, P]
        positions = generator.integers(0, patches.shape[1], (len(patches), _PATCHES_PER_IMAGE))
        chosen = patches.gather(1, torch.from_numpy(positions)[:, :, None].expand(-1, -1, patches.shape[2]))
        samples.append(_normalize_patches(chosen.flatten(0, 1)))
    return torch.cat(samples)


def _pool_quadrants(images: Tensor, encode_patches: Callable[[Tensor], Tensor]) -> Tensor:
    """Average the features of all patches over the four quadrants of each image: float [B, 4 * D].

    Args:
        encode_patches: normalized patches, float [B, L, P] -> features, float [B, L, D].
    """
    images = shrink_images(images.cpu())
    rows, columns = (side - PATCH_SIZE + 1 for side in images.shape[2:])
    maps = (
        encode_patches(_normalize_patches(_extract_patches(images)))
        .transpose(1, 2)
        .unflatten(2, (rows, columns))
    )
    return F.adaptive_avg_pool2d(maps, 2).flatten(1)


def _encode_in_chunks(encode: Callable[[Tensor], Tensor], chunk_size: int = 32) -> Encoder:
    """Return an encoder that encodes a few images at a time, since distances to all clusters need memory."""
    return lambda images: torch.cat([encode(chunk) for chunk in images.split(chunk_size)])


def _iter_images(source: Source, image_size: Sequence[int], seed: int) -> Iterator[Tensor]:
    """Iterate over random images of the training set in batches, float [B, C, H, W] in [0, 1], shrunk.

    Images are shrunk in the same way as for pixel features.
    """
    ids = SampleStream(len(source), 0, seed).select_train_ids(_NUM_FIT_IMAGES).tolist()
    for _, pixels in iterate_central_crops(source, ids, image_size, _BATCH_SIZE):
        yield shrink_images(to_float(pixels))


def _extract_patches(images: Tensor) -> Tensor:
    """Return the patches at all L positions, row by row: float [B, L, PATCH_SIZE * PATCH_SIZE * C]."""
    return F.unfold(images, PATCH_SIZE).transpose(1, 2)


def _normalize_patches(patches: Tensor) -> Tensor:
    """Normalize each patch to mean 0 and standard deviation 1."""
    variance, mean = torch.var_mean(patches, dim=-1, keepdim=True)
    return (patches - mean) / (variance + _CONTRAST_EPS).sqrt()


NETWORK_FREE_ENCODERS: Mapping[str, Callable[[Source, Sequence[int], int], Encoder]] = {
    "pixels": lambda _source, _size, _seed: compute_pixel_features,
    "pca": fit_image_pca,
    "pca_patches": fit_patch_pca,
    "kmeans": fit_patch_kmeans,
    "kmeans_pixels": fit_image_kmeans,
}
"""Value of `Arm.start` -> function that fits an encoder to a source, from the image size and a seed."""
