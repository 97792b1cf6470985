"""Test reading many images in order, with and without threads."""

import threading
import time
from types import SimpleNamespace

import pytest
import torch

from quarterview.data import reading
from quarterview.data.reading import read_samples
from quarterview.data.sources.base import BadSampleError, DecodedImage
from quarterview.data.sources.open import open_source


class SlowSource:
    """A source whose images take `seconds` each on its own clock, and of which every seventh is broken."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.now, self.threads = seconds, 0.0, set()

    def name(self, sample_id: int) -> str:
        return f"image {sample_id}"

    def image(self, sample_id: int) -> DecodedImage:
        self.threads.add(threading.get_ident())
        self.now += self.seconds
        if self.seconds and threading.current_thread() is not threading.main_thread():
            time.sleep(self.seconds)  # so that a single thread does not read all images
        if sample_id % 7 == 3:
            raise BadSampleError("broken")
        return DecodedImage(torch.full((3, 4, 4), sample_id % 256, dtype=torch.uint8))


@pytest.mark.parametrize(("seconds", "is_threaded"), [(0.0, False), (0.004, True)])
def test_threads_are_used_for_slow_sources_only_and_do_not_change_results(monkeypatch, seconds, is_threaded):
    source, ids = SlowSource(seconds), list(range(300, 20, -1))
    monkeypatch.setattr(reading, "time", SimpleNamespace(perf_counter=lambda: source.now))
    results = list(read_samples(source, ids, num_threads=3))
    assert [sample_id for sample_id, _, _ in results] == ids
    for sample_id, image, reports in results:
        if sample_id % 7 == 3:
            assert image is None
            assert [report.broken for report in reports] == ["broken"]
        else:
            assert image is not None
            assert int(image.pixels[0, 0, 0]) == sample_id % 256
    assert (len(source.threads) > 1) == is_threaded


@pytest.mark.parametrize("ids", [[], [5], list(range(40))])
def test_few_or_no_samples(ids):
    assert [sample_id for sample_id, _, _ in read_samples(SlowSource(0.0), ids, num_threads=4)] == ids
    generated = open_source("shapes:40:size=16", 3)
    assert [sample_id for sample_id, _, _ in read_samples(generated, ids, num_threads=4)] == ids
