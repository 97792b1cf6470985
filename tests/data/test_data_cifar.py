import os
import pickle
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quarterview.data.sources.cifar import CifarSplit, read_cifar
from quarterview.errors import UserError

DATA = np.random.default_rng(0).integers(0, 256, (4, 3072), dtype=np.uint8)
NAMES = {"label_names": ["cat", "dog"]}


def read(folder: Path, *batches: bytes, names: bytes | None = None) -> CifarSplit:
    (folder / "names").write_bytes(pickle.dumps(NAMES, protocol=2) if names is None else names)
    paths = []
    for index, batch in enumerate(batches):
        paths.append(folder / f"batch_{index}")
        paths[-1].write_bytes(batch)
    return read_cifar(paths, "labels", folder / "names", "label_names")


def batch(data: object = DATA, labels: object = (0, 1, 1, 0)) -> bytes:
    labels = list(labels) if isinstance(labels, tuple) else labels
    return pickle.dumps({"data": data, "labels": labels}, protocol=2)


def test_batches_are_concatenated(tmp_path):
    images, labels, classes = read(tmp_path, batch(), batch(DATA[:1], (1,)))
    assert np.array_equal(images, np.concatenate([DATA, DATA[:1]]).reshape(5, 3, 32, 32))
    assert labels == [0, 1, 1, 0, 1]
    assert classes == ["cat", "dog"]


def test_fortran_order_arrays(tmp_path):
    images, _, _ = read(tmp_path, batch(np.asfortranarray(DATA)))
    assert np.array_equal(images.reshape(4, 3072), DATA)


def test_pickles_of_python_2_and_numpy_1(tmp_path):
    # as Python 2 wrote it: str objects of bytes (U), numpy.core, and no _codecs
    raw = DATA[:1].tobytes()
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntU\x01btR(I1\n(I1\nI3072\nt"
        b"cnumpy\ndtype\n(U\x02u1I0\nI1\ntR(I3\nU\x01|NNNI-1\nI-1\nI0\ntbI00\n"
        b"T" + len(raw).to_bytes(4, "little") + raw + b"tb"
    )
    images, labels, _ = read(tmp_path, b"\x80\x02}U\x04data" + array + b"sU\x06labels](I1\nes.")
    assert np.array_equal(images.reshape(1, 3072), DATA[:1])
    assert labels == [1]


class Hostile:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return os.system, (f"touch {self.target}",)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_pickles_execute_no_code(tmp_path, protocol):
    target = tmp_path / "executed"
    hostile = pickle.dumps({"data": DATA, "labels": [0, 1, 1, 0], "more": Hostile(target)}, protocol)
    with pytest.raises(
        UserError, match=r"batch_0 as a file of CIFAR: it refers to posix\.system|it refers to numpy"
    ):
        read(tmp_path, hostile)
    with pytest.raises(UserError, match=r"it refers to posix\.system"):
        read(tmp_path, batch(), names=pickle.dumps(Hostile(target), protocol))
    assert not target.exists()


@pytest.mark.parametrize(
    "invalid",
    [
        batch(DATA[:, :3000]),
        batch(DATA.astype(np.uint16)),
        batch("no array"),
        batch(labels=(0, 1)),
        batch(labels="cats"),
        batch(labels=(0, 1, 1, "dog")),
        pickle.dumps([1, 2], protocol=2),
        batch()[:-100],
        b"",
    ],
)
def test_invalid_batches_are_refused(tmp_path, invalid):
    with pytest.raises(UserError, match="batch_0"):
        read(tmp_path, invalid)


def test_missing_files_and_class_names_are_refused(tmp_path):
    with pytest.raises(UserError, match="missing"):
        read_cifar([tmp_path / "missing"], "labels", tmp_path / "names", "label_names")
    with pytest.raises(UserError, match="no list label_names"):
        read(tmp_path, batch(), names=pickle.dumps({"other": []}, protocol=2))


@settings(deadline=None, max_examples=200)
@given(changes=st.lists(st.tuples(st.integers(0, 299), st.integers(0, 255)), max_size=5))
def test_damaged_pickles_are_read_or_refused(tmp_path_factory, changes):
    damaged = bytearray(batch())
    for position, value in changes:
        damaged[position] = value
    try:
        images, labels, _ = read(tmp_path_factory.getbasetemp(), bytes(damaged))
    except UserError:
        return
    assert images.shape == (len(labels), 3, 32, 32)
