"""Many images read in order, in threads or not."""

import threading
import time
from types import SimpleNamespace

import pytest
import torch

from quarterview.data import reading
from quarterview.data.reading import read_many
from quarterview.data.sources.base import BadSampleError, Picture
from quarterview.data.sources.open import open_source


class Slow:
    """Images that take a while, by a clock of their own; every seventh is broken."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.now, self.threads = seconds, 0.0, set()

    def name(self, sample: int) -> str:
        return f"image {sample}"

    def image(self, sample: int) -> Picture:
        self.threads.add(threading.get_ident())
        self.now += self.seconds
        if self.seconds and threading.current_thread() is not threading.main_thread():
            time.sleep(self.seconds)  # so that one thread cannot do the work of all
        if sample % 7 == 3:
            raise BadSampleError("broken")
        return Picture(torch.full((3, 4, 4), sample % 256, dtype=torch.uint8))


@pytest.mark.parametrize(("seconds", "several"), [(0.0, False), (0.004, True)])
def test_threads_are_for_what_is_slow_and_change_nothing(monkeypatch, seconds, several):
    source, ids = Slow(seconds), list(range(300, 20, -1))
    monkeypatch.setattr(reading, "time", SimpleNamespace(perf_counter=lambda: source.now))
    found = list(read_many(source, ids, threads=3))
    assert [sample for sample, _, _ in found] == ids
    for sample, picture, reports in found:
        if sample % 7 == 3:
            assert picture is None
            assert [report.broken for report in reports] == ["broken"]
        else:
            assert picture is not None
            assert int(picture.pixels[0, 0, 0]) == sample % 256
    assert (len(source.threads) > 1) == several


@pytest.mark.parametrize("ids", [[], [5], list(range(40))])
def test_few_or_none(ids):
    assert [sample for sample, _, _ in read_many(Slow(0.0), ids, threads=4)] == ids
    generated = open_source("shapes:40:size=16", 3)
    assert [sample for sample, _, _ in read_many(generated, ids, threads=4)] == ids
