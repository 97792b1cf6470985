import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from quarterview.data.sources.arrays import ArraySource
from quarterview.data.sources.base import BadSampleError
from quarterview.errors import UserError


def save_array(path: Path, array: np.ndarray) -> Path:
    np.save(path / "a.npy", array)
    return path / "a.npy"


def random_bytes(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


@pytest.mark.parametrize(
    ("shape", "channels", "to_channels_first"),
    [
        ((5, 7, 6, 3), 3, (0, 3, 1, 2)),
        ((5, 3, 7, 6), 3, (0, 1, 2, 3)),
        ((5, 3, 7, 3), 3, (0, 3, 1, 2)),
        ((5, 7, 6, 13), 13, (0, 3, 1, 2)),
        ((5, 2, 7, 6), 2, (0, 1, 2, 3)),
        ((5, 7, 6, 1), 3, (0, 3, 1, 2)),
        ((5, 1, 7, 6), 3, (0, 1, 2, 3)),
    ],
)
def test_channel_axis_is_detected(tmp_path, shape, channels, to_channels_first):
    array = random_bytes(*shape)
    source = ArraySource(save_array(tmp_path, array), channels)
    assert len(source) == 5
    expected = np.broadcast_to(
        array.transpose(to_channels_first)[2], (channels, *array.transpose(to_channels_first).shape[2:])
    )
    pixels = source.image(2).pixels
    assert pixels.dtype == torch.uint8
    assert np.array_equal(pixels, expected)


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_gray_is_repeated_to_all_channels(tmp_path, channels):
    array = random_bytes(5, 7, 6)
    pixels = ArraySource(save_array(tmp_path, array), channels).image(4).pixels
    assert np.array_equal(pixels, np.stack([array[4]] * channels))


@pytest.mark.parametrize("shape", [(5, 7, 6, 4), (5, 4, 7, 6), (5, 7), (5, 3, 3, 3, 3), (0, 7, 6, 3)])
def test_unsupported_shapes_are_refused(tmp_path, shape):
    with pytest.raises(UserError, match=r"shape \[.*Give \[N, H, W\], .* where C is 3 or 1"):
        ArraySource(save_array(tmp_path, np.zeros(shape, np.uint8)), 3)


@pytest.mark.parametrize("order", ["<", ">"])
def test_uint16_is_scaled_without_loss(tmp_path, order):
    array = np.random.default_rng(0).integers(0, 65536, (3, 9, 8), dtype=np.uint16).astype(f"{order}u2")
    pixels = ArraySource(save_array(tmp_path, array), 1).image(1).pixels
    assert pixels.dtype == torch.float32
    assert np.array_equal((pixels[0].double() * 65535).round(), array[1])


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, ">f8"])
def test_floats_are_unchanged(tmp_path, dtype):
    array = (np.random.default_rng(0).standard_normal((3, 9, 8)) * 100).astype(dtype)
    pixels = ArraySource(save_array(tmp_path, array), 1).image(1).pixels
    assert np.array_equal(pixels[0], array[1].astype(np.float32))


def test_bool_becomes_0_and_255(tmp_path):
    array = np.array([[[True, False]]])
    assert ArraySource(save_array(tmp_path, array), 1).image(0).pixels.tolist() == [[[255, 0]]]


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e300])
def test_image_with_non_finite_values_is_a_bad_sample(tmp_path, value):
    array = np.zeros((3, 4, 4))
    array[1, 2, 3] = value
    source = ArraySource(save_array(tmp_path, array), 1)
    assert source.image(0).pixels.sum() == 0
    with pytest.raises(BadSampleError, match="not finite"):
        source.image(1)


@pytest.mark.parametrize("dtype", [np.int64, np.int8, np.uint32, np.complex64, "U3"])
def test_dtypes_of_unknown_range_are_refused(tmp_path, dtype):
    with pytest.raises(UserError, match="Give uint8, uint16"):
        ArraySource(save_array(tmp_path, np.zeros((2, 4, 4), dtype)), 1)


class Hostile:
    def __reduce__(self):
        return pytest.fail, ("unpickled",)


def test_nothing_is_unpickled(tmp_path):
    objects = np.empty((2, 2, 2), dtype=object)
    objects[:] = Hostile()
    np.save(tmp_path / "objects.npy", objects, allow_pickle=True)
    np.savez(tmp_path / "objects.npz", images=objects)
    (tmp_path / "pickle.npy").write_bytes(pickle.dumps(Hostile()))
    (tmp_path / "text.npz").write_text("no archive")
    (tmp_path / "empty.npy").write_bytes(b"")
    for name in ("objects.npy", "objects.npz", "pickle.npy", "text.npz", "empty.npy", "missing.npy"):
        with pytest.raises(UserError, match="of numbers, without pickles"):
            ArraySource(tmp_path / name, 3)


def save_archive(path: Path, **arrays: np.ndarray) -> Path:
    np.savez(path / "a.npz", **arrays)
    return path / "a.npz"


@pytest.mark.parametrize(
    ("images", "labels"), [("images", "labels"), ("x_train", "y_train"), ("other", "label")]
)
def test_npz_images_and_labels(tmp_path, images, labels):
    array = random_bytes(4, 5, 5, 3)
    more = {} if images == "other" else {"x_test": array[:2]}
    source = ArraySource(
        save_archive(tmp_path, **{images: array, labels: np.array([[3], [1], [-1], [0]])}, **more), 3
    )
    assert np.array_equal(source.image(3).pixels.permute(1, 2, 0), array[3])
    assert [source.label(i) for i in range(4)] == [3, 1, None, 0]


@pytest.mark.parametrize("labels", [np.zeros(4), np.zeros((4, 14), int), np.zeros(3, int)])
def test_invalid_labels_are_ignored(tmp_path, labels):
    source = ArraySource(save_archive(tmp_path, images=random_bytes(4, 5, 5), labels=labels), 1)
    assert source.label(0) is None


def test_ambiguous_npz_is_refused(tmp_path):
    array = random_bytes(4, 5, 5)
    with pytest.raises(
        UserError, match=r"images: first \[4, 5, 5\], second \[4, 5, 5\]\. Name it one of images"
    ):
        ArraySource(save_archive(tmp_path, first=array, second=array), 1)


def test_pickled_source_does_not_contain_the_array(tmp_path):
    array = random_bytes(40, 50, 50)
    for path in (save_array(tmp_path, array), save_archive(tmp_path, images=array)):
        text = pickle.dumps(ArraySource(path, 1))
        assert len(text) < 1000
        assert np.array_equal(pickle.loads(text).image(39).pixels[0], array[39])


def test_fingerprint_changes_with_the_content(tmp_path):
    array = random_bytes(40, 5, 5)
    first = ArraySource(save_array(tmp_path, array), 1).fingerprint()
    assert ArraySource(save_array(tmp_path, array), 1).fingerprint() == first
    array[39, 4, 4] ^= 1
    assert ArraySource(save_array(tmp_path, array), 1).fingerprint() != first
