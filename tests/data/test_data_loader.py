import io
import json
import multiprocessing

import numpy as np
import pytest
import torch
from PIL import Image

from quarterview.data.bad_samples import BadSampleLog
from quarterview.data.cache import CachedDataset, load_cached_dataset
from quarterview.data.config import DataConfig, LoaderConfig
from quarterview.data.loader import Batch, Loader
from quarterview.data.reading import SampleReport
from quarterview.data.sampler import SampleStream
from quarterview.data.sources.open import open_source
from quarterview.data.statistics import compute_channel_statistics
from quarterview.data.transforms.crop import get_center_box
from quarterview.errors import RunError, UserError

CPU = torch.device("cpu")
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
BROKEN = {3, 8, 9, 17}


@pytest.fixture
def folder(tmp_path):
    """Forty images of one size. Those of `BROKEN` cannot be read."""
    path = tmp_path / "photos"
    path.mkdir()
    generator = np.random.default_rng(0)
    for i in range(40):
        file = io.BytesIO()
        pixels = generator.integers(60, 190, (5, 6, 3), dtype=np.uint8).repeat(5, 0).repeat(5, 1)
        Image.fromarray(pixels).save(file, "PNG")
        data = b"no image at all" if i in BROKEN else file.getvalue()
        (path / f"{i:02d}.png").write_bytes(data)
    return path


def make(spec, workers=0, cached=False, holdout=0, image_size=(16, 16), channels=3):
    """Return a loader, and the list of its reports."""
    source = open_source(str(spec), channels)
    stream = SampleStream(len(source), holdout, 5)
    reports: list[SampleReport] = []
    cache = load_cached_dataset(source, CPU, 1 << 30, 2, reports.append) if cached else None
    assert not cached or isinstance(cache, CachedDataset)
    mean, std = MEAN[:channels], STD[:channels]
    return Loader(source, stream, image_size, mean, std, CPU, workers, cache, reports.append), reports


def parts(batch: int, count: int, start: int = 0) -> list[range]:
    return [range(start + i * batch, start + (i + 1) * batch) for i in range(count)]


def same(one: Batch, two: Batch) -> bool:
    assert (one.labels is None) == (two.labels is None)
    pairs = zip(one, two, strict=True)
    return all(torch.equal(a, b) for a, b in pairs if a is not None and b is not None)


# ---------------------------------------------------------------------- batches


def test_any_number_of_workers_makes_the_same_batches(folder):
    expected, expected_reports = make(folder)
    expected = list(expected.iter_batches(parts(12, 7)))  # 84 positions: two epochs of 40 and more
    assert [tuple(batch.images.shape) for batch in expected] == [(12, 3, 16, 16)] * 7
    assert expected[3].epochs.unique().tolist() == [0, 1]  # one of them spans two epochs
    for workers in (1, 2):
        loader, reports = make(folder, workers)
        batches = list(loader.iter_batches(parts(12, 7)))
        assert len(batches) == 7
        assert all(same(*pair) for pair in zip(expected, batches, strict=True))
        assert sorted(set(reports)) == sorted(set(expected_reports))


def test_a_loader_may_start_at_any_position(folder):
    for options in ({"workers": 2}, {"cached": True}):
        whole = list(make(folder, **options)[0].iter_batches(parts(12, 7)))
        rest = list(make(folder, **options)[0].iter_batches(parts(12, 2, start=60)))
        assert all(same(*pair) for pair in zip(whole[5:], rest, strict=True))


def test_batches_carry_the_samples_of_the_stream(folder):
    loader, _ = make(folder)
    for part, batch in zip(parts(10, 4), loader.iter_batches(parts(10, 4)), strict=True):
        epochs, ids = loader.stream.get_samples(torch.arange(part.start, part.stop))
        assert torch.equal(batch.ids, ids)
        assert torch.equal(batch.epochs, epochs)


def test_the_cached_dataset_gives_the_same_batches_as_the_stream(folder):
    streamed, cached = make(folder)[0], make(folder, cached=True)[0]
    for one, two in zip(streamed.iter_batches(parts(16, 5)), cached.iter_batches(parts(16, 5)), strict=True):
        assert torch.equal(one.ids, two.ids)
        assert torch.equal(one.epochs, two.epochs)
        difference = (one.images - two.images) * torch.tensor(STD)[:, None, None] * 255
        assert difference.abs().max() < 2  # uint8 rounds after each axis
        assert difference.abs().mean() > 0  # the two code paths differ


def test_images_are_normalised_crops(tmp_path):
    values = np.full((3, 20, 20, 3), (255, 102, 0), np.uint8)
    np.save(tmp_path / "x.npy", values)
    expected = [(1 - 0.5) / 0.2, 0.0, -0.3 / 0.3]
    for cached in (False, True):
        loader, _ = make(tmp_path / "x.npy", cached=cached)
        (batch,) = loader.iter_batches([range(3)])
        for channel, value in enumerate(expected):
            torch.testing.assert_close(
                batch.images[:, channel], torch.full((3, 16, 16), value), rtol=0, atol=1e-4
            )


def test_a_batch_is_split_into_chunks():
    ids = torch.arange(12)
    batch = Batch(torch.randn(12, 3, 2, 2), ids, ids * 2, ids % 5)
    chunks = list(batch.chunk(3))
    assert [len(chunk.ids) for chunk in chunks] == [4, 4, 4]
    joined = zip(*(part[:4] for part in chunks), strict=True)
    assert same(Batch(*(torch.cat(tensors) for tensors in joined)), batch)
    two_views = batch._replace(second_view=torch.randn(12, 3, 2, 2))
    assert torch.equal(torch.cat([part.second_view for part in two_views.chunk(5)]), two_views.second_view)


def test_images_of_many_sizes_and_depths_make_a_batch(tmp_path):
    for i in range(6):
        Image.new("RGB", (10 + 7 * i, 40 - 5 * i), (i * 40, 0, 0)).save(tmp_path / f"{i}.png")
    Image.new("I;16", (30, 20), 65535).save(tmp_path / "6.png")
    loader, _ = make(tmp_path)
    (batch,) = loader.iter_batches([range(7)])
    red = {int(i): batch.images[row, 0] * STD[0] + MEAN[0] for row, i in enumerate(batch.ids)}
    for i in range(7):
        torch.testing.assert_close(red[i], torch.full((16, 16), 1.0 if i == 6 else i * 40 / 255))


# ---------------------------------------------------------------------- broken images


def test_broken_images_are_replaced_and_reported(folder):
    for options in ({}, {"workers": 2}, {"cached": True}):
        loader, reports = make(folder, **options)
        first = list(loader.iter_batches(parts(8, 10)))
        assert {report.sample_id for report in reports} == BROKEN
        assert {report.name for report in reports} == {f"{i:02d}.png" for i in BROKEN}
        assert all(
            report.broken and "not an image in one of the formats" in report.broken for report in reports
        )
        assert all(batch.images.shape == (8, 3, 16, 16) for batch in first)
        again = list(make(folder, **options)[0].iter_batches(parts(8, 10)))
        assert all(same(*pair) for pair in zip(first, again, strict=True))


def test_a_replacement_is_another_training_image(tmp_path):
    """Each image has its own color, so a batch shows which image was read."""
    values = np.zeros((30, 8, 8, 1), np.float32) + np.arange(30, dtype=np.float32)[:, None, None, None] / 64
    values[[4, 11]] = np.nan
    np.save(tmp_path / "x.npy", values)
    loader, _ = make(tmp_path / "x.npy", holdout=6, image_size=(4, 4), channels=1)
    held_out = set(loader.stream.get_held_out_ids().tolist())
    assert held_out.isdisjoint({4, 11})
    read: dict[int, list[int]] = {}
    for batch in loader.iter_batches(parts(12, 10)):
        colors = (batch.images[:, 0, 0, 0] * STD[0] + MEAN[0]) * 64
        for sample, epoch, color in zip(batch.ids, batch.epochs, colors, strict=True):
            if int(sample) in (4, 11):
                read.setdefault(int(sample), []).append(round(float(color)))
                assert read[int(sample)][-1] == next(
                    c
                    for c in (loader.stream.get_replacement(int(epoch), int(sample), a) for a in range(32))
                    if c not in (4, 11)
                )
            else:
                assert round(float(color)) == sample
    for replacements in read.values():
        assert len(replacements) == 5
        assert len(set(replacements)) > 1  # a different one in each epoch
        assert held_out.isdisjoint(replacements)


@pytest.mark.parametrize("workers", [0, 1])
def test_no_readable_image_is_an_error(tmp_path, workers):
    for i in range(5):
        (tmp_path / f"{i}.png").write_bytes(b"")
    loader, _ = make(tmp_path, workers)
    with pytest.raises(RunError, match="Cannot read sample 0 nor any of 32 replacements") as caught:
        list(loader.iter_batches([range(4)]))
    assert caught.tb is not None  # no worker is left even while a traceback references the frames
    assert multiprocessing.active_children() == []


def test_held_out_images_are_center_crops_without_broken_images(folder):
    loader, reports = make(folder, holdout=30)
    batch = loader.load_held_out()
    expected_ids = [i for i in loader.stream.get_held_out_ids().tolist() if i not in BROKEN]
    assert batch.ids.tolist() == expected_ids
    assert {report.sample_id for report in reports} == set(loader.stream.get_held_out_ids().tolist()) & BROKEN
    top, left, height, width = get_center_box(25, 30, (16, 16))
    for sample, image in list(zip(expected_ids, batch.images, strict=True))[:5]:
        with Image.open(folder / f"{sample:02d}.png") as opened:
            box = (left, top, left + width, top + height)
            expected = np.asarray(opened.crop(box).resize((16, 16), Image.Resampling.BICUBIC)) / 255
        ours = image.permute(1, 2, 0).numpy() * STD + MEAN
        assert np.abs(ours - expected).max() < 2.5 / 255  # torch and Pillow round differently
    assert make(folder)[0].load_held_out() is None


# ---------------------------------------------------------------------- the log of bad samples


def bad(sample: int, name: str = "x.png") -> SampleReport:
    return SampleReport(sample, name, "cannot be decoded")


def test_the_log_contains_each_broken_image_once(tmp_path):
    bad_samples = BadSampleLog(tmp_path / "bad_samples.jsonl", 100, 0.05)
    for sample in (7, 7, 9, 7, 9, 2):
        bad_samples(bad(sample, f"{sample}.png"))
    rows = [json.loads(line) for line in (tmp_path / "bad_samples.jsonl").read_text().splitlines()]
    assert rows == [{"id": i, "name": f"{i}.png", "reason": "cannot be decoded"} for i in (7, 9, 2)]
    assert "3 broken image(s)" in bad_samples.summarize()[0]
    assert "7.png: cannot be decoded" in bad_samples.summarize()[1]


def test_the_run_stops_above_the_limit(tmp_path):
    path = tmp_path / "bad_samples.jsonl"
    bad_samples = BadSampleLog(path, 100, 0.02)
    bad_samples(bad(1))
    bad_samples(bad(2))
    bad_samples(bad(2))
    with pytest.raises(RunError, match=r"3 of 100 images are broken.*2\.00%.*--max-bad-samples"):
        bad_samples(bad(3))
    assert len(path.read_text().splitlines()) == 3


def test_repaired_images_do_not_stop_a_resumed_run(tmp_path):
    path = tmp_path / "bad_samples.jsonl"
    bad_samples = BadSampleLog(path, 100, 0.02)
    bad_samples(bad(1))
    bad_samples(bad(2))
    with pytest.raises(RunError):
        bad_samples(bad(3))
    again = BadSampleLog(path, 100, 0.02)
    again.check_limit()
    again(bad(1))
    again(bad(4))
    with pytest.raises(RunError, match="3 of 100"):
        again(bad(2))
    assert [json.loads(line)["id"] for line in path.read_text().splitlines()] == [1, 2, 3, 4]


def test_an_incomplete_last_line_is_removed(tmp_path):
    path = tmp_path / "bad_samples.jsonl"
    BadSampleLog(path, 10, 1.0)(bad(1))
    whole = path.read_text()
    path.write_text(whole + '{"id": 4, "na')
    bad_samples = BadSampleLog(path, 10, 1.0)
    bad_samples(bad(1))
    bad_samples(bad(4))
    assert [json.loads(line)["id"] for line in path.read_text().splitlines()] == [1, 4]


def test_a_limit_of_zero_stops_at_the_first_broken_image():
    with pytest.raises(RunError, match="1 of 1000 images are broken"):
        BadSampleLog(None, 1000, 0.0)(bad(1))


def test_conversions_are_counted_once_per_image():
    bad_samples = BadSampleLog(None, 10, 0.0)
    for sample in (1, 2, 1):
        bad_samples(SampleReport(sample, "x", None, ("CMYK converted to RGB",)))
    bad_samples(SampleReport(3, "x", None, ("rotated by EXIF", "CMYK converted to RGB")))
    first, second = bad_samples.summarize()
    assert first.startswith("3 image(s): CMYK converted to RGB")
    assert second.startswith("1 image(s): rotated by EXIF")


# ---------------------------------------------------------------------- statistics


def test_statistics_are_numpys(tmp_path):
    values = np.random.default_rng(0).beta(2, 5, (50, 9, 7, 3)).astype(np.float32) * [1, 0.5, 0.1]
    np.save(tmp_path / "x.npy", values.astype(np.float32))
    source = open_source(str(tmp_path / "x.npy"), 3)
    stream = SampleStream(50, 10, 0)
    mean, std = compute_channel_statistics(source, stream, 2, lambda report: None)
    training = values[sorted(set(range(50)) - set(stream.get_held_out_ids().tolist()))]
    np.testing.assert_allclose(mean, training.mean((0, 1, 2)), rtol=1e-5)
    np.testing.assert_allclose(std, training.std((0, 1, 2)), rtol=1e-5)
    assert mean[0] != pytest.approx(values.mean((0, 1, 2))[0], rel=1e-5)  # the held-out ones do not count


def test_all_images_have_the_same_weight_whatever_their_size(tmp_path):
    Image.new("RGB", (100, 100), (0, 0, 0)).save(tmp_path / "0.png")
    Image.new("RGB", (5, 5), (255, 255, 255)).save(tmp_path / "1.png")
    mean, std = compute_channel_statistics(
        open_source(str(tmp_path), 3), SampleStream(2, 0, 0), 1, lambda r: None
    )
    assert mean == pytest.approx((0.5, 0.5, 0.5))
    assert std == pytest.approx((0.5, 0.5, 0.5))


def test_statistics_of_constant_images_do_not_divide_by_zero(tmp_path):
    np.save(tmp_path / "x.npy", np.full((5, 8, 8), 128, np.uint8))
    mean, std = compute_channel_statistics(
        open_source(str(tmp_path / "x.npy"), 3), SampleStream(5, 0, 0), 1, lambda r: None
    )
    assert mean == pytest.approx([128 / 255] * 3)
    assert std[0] == std[1] == std[2] >= 1 / 255 - 1e-9


def test_statistics_report_broken_images_and_leave_them_out(folder):
    reports: list[SampleReport] = []
    compute_channel_statistics(open_source(str(folder), 3), SampleStream(40, 0, 0), 2, reports.append)
    assert {report.sample_id for report in reports} == BROKEN
    for i in range(40):
        (folder / f"{i:02d}.png").write_bytes(b"")
    with pytest.raises(RunError, match="None of 40 images can be read"):
        compute_channel_statistics(open_source(str(folder), 3), SampleStream(40, 0, 0), 2, reports.append)


# ---------------------------------------------------------------------- the cached dataset


def test_a_whole_dataset_is_cached(tmp_path):
    values = np.random.default_rng(0).integers(0, 256, (2100, 4, 5, 3), dtype=np.uint8)
    np.save(tmp_path / "x.npy", values)
    cache = load_cached_dataset(
        open_source(str(tmp_path / "x.npy"), 3), CPU, values.nbytes, 2, lambda r: None
    )
    assert isinstance(cache, CachedDataset)
    assert torch.equal(cache.images, torch.from_numpy(values).permute(0, 3, 1, 2))
    assert cache.broken_ids == set()


def test_the_reason_is_returned_if_a_dataset_cannot_be_cached(tmp_path, folder):
    def why(spec, limit=1 << 30):
        return load_cached_dataset(open_source(str(spec), 3), CPU, limit, 1, lambda r: None)

    np.save(tmp_path / "x.npy", np.zeros((10, 300, 400, 3), np.uint8))
    assert why(tmp_path / "x.npy", 10 * 300 * 400 * 3 - 1) == "more than 3 MiB of pixels"
    np.save(tmp_path / "deep.npy", np.zeros((10, 4, 4), np.uint16))
    assert why(tmp_path / "deep.npy") == "images of more than 8 bits"
    Image.new("RGB", (31, 25)).save(folder / "39.png")
    assert why(folder) == "images of several sizes"
    nothing = tmp_path / "nothing"
    nothing.mkdir()
    (nothing / "0.png").write_bytes(b"")
    assert why(nothing) == "no readable image"


# ---------------------------------------------------------------------- the configuration


@pytest.mark.parametrize(
    ("config_class", "field", "value"),
    [
        (LoaderConfig, "workers", -1),
        (DataConfig, "holdout", -1),
        (LoaderConfig, "max_bad_samples", 1.5),
        (LoaderConfig, "max_bad_samples", -0.1),
    ],
)
def test_invalid_values_are_rejected(config_class, field, value):
    with pytest.raises(UserError, match=f"^--{field.replace('_', '-')} {value} is out of range. Give "):
        config_class(**{field: value})
