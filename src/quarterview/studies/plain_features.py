"""What one had before: principal components of pictures, and k-means of patches.

Fitted to unlabelled images by scikit-learn, a batch at a time, and judged as any encoder is.
"""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from quarterview.data.augment import to_float
from quarterview.data.source import Source
from quarterview.data.stream import SampleStream
from quarterview.errors import RunError
from quarterview.evaluate.features import Encoder, central_batches, pixel_features, shrunk

COMPONENTS = 128
"""Of pictures."""
WORDS, PATCH = 256, 6
"""Clusters, and the side of the patches that they are of (Coates et al. 2011, for pictures of 32 pixels)."""
_FITTED, _PATCHES_AN_IMAGE = 5000, 20
_BATCH = 500
_CONTRAST, _WHITENING = 10.0 / 255**2, 0.1  # Coates et al. 2011, for pixels in 0 … 1


def picture_components(source: Source, image_size: Sequence[int], seed: int) -> Encoder:
    """The largest principal components of whole pictures, each divided by its deviation.

    Raises:
        RunError: if there are too few images.
    """
    from sklearn.decomposition import IncrementalPCA

    def rows(images: Tensor) -> np.ndarray:
        return pixel_features(images).cpu().numpy()

    batches = [rows(images) for images in _images(source, image_size, seed)]
    known = np.concatenate(batches)
    count = min(COMPONENTS, *known.shape)
    if len(known) < 2:
        raise RunError(f"principal components of {len(known)} pictures; accepted: 2 or more")
    pca = IncrementalPCA(count, whiten=True, batch_size=max(count, _BATCH)).fit(known)
    return lambda images: torch.from_numpy(pca.transform(rows(images))).float()


def patch_clusters(source: Source, image_size: Sequence[int], seed: int) -> Encoder:
    """How near the patches of each quarter of a picture are to clusters of patches (Coates et al. 2011).

    Patches of every place are made equal in brightness and contrast and whitened; a patch says of each
    cluster how much nearer than on average it is, and each quarter of the picture adds up its patches.

    Raises:
        RunError: if there are too few images.
    """
    from sklearn.cluster import MiniBatchKMeans

    generator = np.random.default_rng(seed)
    found = []
    for images in _images(source, image_size, seed):
        patches = _patches(images)  # [B, places, P]
        places = generator.integers(0, patches.shape[1], (len(patches), _PATCHES_AN_IMAGE))
        chosen = patches.gather(1, torch.from_numpy(places)[:, :, None].expand(-1, -1, patches.shape[2]))
        found.append(_even(chosen.flatten(0, 1)))
    known = torch.cat(found).double()
    if len(known) < WORDS:
        raise RunError(f"{WORDS} clusters of {len(known)} patches; accepted: more images")
    mean = known.mean(0)
    values, vectors = torch.linalg.eigh(torch.cov((known - mean).T))
    whiten = ((vectors * (values.clamp(min=0) + _WHITENING).rsqrt()) @ vectors.T).float()
    mean = mean.float()
    kmeans = MiniBatchKMeans(WORDS, random_state=seed, n_init=3, batch_size=2048)
    kmeans.fit(((known.float() - mean) @ whiten).numpy())
    centres = torch.from_numpy(kmeans.cluster_centers_).float()

    def encode(images: Tensor) -> Tensor:
        images = shrunk(images.cpu())
        rows, columns = (side - PATCH + 1 for side in images.shape[2:])
        x = (_even(_patches(images)) - mean) @ whiten
        distances = torch.cdist(x, centres.expand(len(x), -1, -1))
        near = (distances.mean(dim=2, keepdim=True) - distances).clamp(min=0)  # [B, places, WORDS]
        maps = near.transpose(1, 2).unflatten(2, (rows, columns))
        return F.adaptive_avg_pool2d(maps, 2).flatten(1)

    return _in_parts(encode)


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
