"""Embeddings: content of the shards, and identical bytes after kills."""

import json
import multiprocessing
import random
import signal
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from quarterview.data.loader import resized_center_crop
from quarterview.data.sources.open import open_source
from quarterview.data.transforms.crop import normalize, to_float
from quarterview.errors import RunError, UserError
from quarterview.evaluation.config import EmbedConfig
from quarterview.evaluation.embed import compute_shard_ranges, embed
from quarterview.models.create import create_model
from quarterview.training import checkpoint
from quarterview.weights.loading import load, make_metadata, read_weights

# A fork server that has imported the package, but not used it, forks the processes that are killed.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["quarterview.evaluation.embed"])

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)


@pytest.fixture
def run(tmp_path):
    torch.manual_seed(0)
    small = {"decoder_width": 16, "decoder_depth": 1, "decoder_heads": 2, "image_size": 16}
    model = create_model("mae_vit_32x2x2_patch8", **small, mean=MEAN, std=STD)
    folder = tmp_path / "run" / "checkpoints"
    checkpoint.save(folder, 1, {"model": model.state_dict()}, {"step": 1}, make_metadata(model.config))
    return tmp_path / "run"


@pytest.fixture
def photos(tmp_path):
    """Forty images of two classes, three of which are unreadable."""
    generator = np.random.default_rng(0)
    for i in range(40):
        folder = tmp_path / "photos" / "ab"[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / f"{i:02d}.png"
        Image.fromarray(generator.integers(0, 255, (20, 24, 3), dtype=np.uint8)).save(file)
        if i in (0, 7, 39):
            file.write_bytes(file.read_bytes()[:60])
    return tmp_path / "photos"


def config(run, data, out, **changes):
    values = {"run": str(run), "data": (str(data),), "out": str(out), "shard_size": 16, "batch_size": 6}
    return EmbedConfig(**{**values, "device": "cpu", **changes})


def files(folder: Path) -> dict[str, bytes]:
    """The content of all files that are not hidden, by name."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.startswith(".")}


def column(folder: Path, name: str) -> list:
    shards = sorted(folder.glob("*.parquet"))
    return [value for shard in shards for value in pq.read_table(shard).column(name).to_pylist()]


# ---------------------------------------------------------------------- content


def compute_reference(model, source, ids, features, block):
    """Features computed with the layers of the model, in float32."""
    pixels = torch.stack([resized_center_crop(source.image(i).pixels, (16, 16)) for i in ids])
    with torch.no_grad():
        images = normalize(to_float(pixels), MEAN, STD)
        x = model.patch_embed(model.patchify(images)) + model.pos_embed[:, 1:]
        x = torch.cat([model.cls_token.expand(len(x), -1, -1), x], dim=1)  # its position is 0
        for module in model.blocks[:block]:
            x = module(x)
        tokens = x if block is not None else model.norm(x)
    return {"cls": tokens[:, 0], "mean": tokens[:, 1:].mean(1), "tokens": tokens}[features].numpy()


@pytest.mark.parametrize(
    ("features", "block", "dtype", "shape"),
    [
        ("mean", None, "float32", [32]),
        ("cls", 1, "float32", [32]),
        ("tokens", 2, "float16", [5, 32]),
    ],
)
def test_the_rows_are_the_readable_images_in_order(run, photos, tmp_path, features, block, dtype, shape):
    out, source, model = tmp_path / "out", open_source(str(photos), 3), load(run)
    record = embed(config(run, photos, out, features=features, block=block, dtype=dtype))
    ids = column(out, "id")
    broken = [i for i in range(40) if i not in ids]
    assert len(broken) == 3
    assert ids == sorted(ids)
    assert column(out, "name") == [source.name(i) for i in ids]
    assert column(out, "label") == [source.label(i) for i in ids]
    embeddings = np.array(column(out, "embedding"))
    assert embeddings.shape == (37, *shape)
    reference = compute_reference(model, source, ids, features, block)
    assert np.abs(embeddings - reference).max() < 0.06  # bf16 if the machine supports it
    assert np.corrcoef(embeddings.ravel(), reference.ravel())[0, 1] > 0.999
    arrow_type = pq.read_schema(out / record["shards"][0]).field("embedding").type
    while pa.types.is_fixed_size_list(arrow_type):
        arrow_type = arrow_type.value_type
    assert arrow_type == {"float32": pa.float32(), "float16": pa.float16()}[dtype]

    assert record == json.loads((out / "embed.json").read_text())
    assert record["complete"]
    assert (record["rows"], record["shape"], record["dimension"]) == (37, shape, 32)
    assert [row["id"] for row in record["unreadable"]] == broken
    assert all(row["reason"] and row["name"] == source.name(row["id"]) for row in record["unreadable"])
    assert record["classes"] == ["a", "b"]
    assert record["settings"]["data_fingerprint"] == source.fingerprint()
    assert record["settings"]["weights"] == read_weights(next(run.rglob("model.safetensors"))).digest
    assert sorted(files(out)) == ["embed.json", *record["shards"]]
    assert [pq.read_metadata(out / name).num_rows for name in record["shards"]] == [
        sum(16 * i <= sample < 16 * (i + 1) for sample in ids) for i in range(3)
    ]


def test_images_without_labels_have_none(run, tmp_path):
    np.save(tmp_path / "x.npy", np.random.default_rng(0).integers(0, 255, (9, 16, 16, 3), dtype=np.uint8))
    record = embed(config(run, tmp_path / "x.npy", tmp_path / "out"))
    assert column(tmp_path / "out", "label") == [None] * 9
    assert record["classes"] is None
    table = pq.read_table(tmp_path / "out" / record["shards"][0])
    flat = table.column("embedding").combine_chunks().flatten().to_numpy()
    assert flat.reshape(9, 32).dtype == np.float32


def test_shards_cover_every_image_once():
    for images, size in [(1, 1), (7, 3), (16, 16), (17, 16), (100, 1000)]:
        ranges = compute_shard_ranges(images, size)
        assert [i for ids in ranges.values() for i in ids] == list(range(images))
        assert list(ranges) == sorted(ranges)
        assert all(name.endswith(f"-of-{len(ranges):05d}.parquet") for name in ranges)


# ---------------------------------------------------------------------- repeated commands


def test_progress_is_reported_after_each_shard(run, photos, tmp_path):
    calls = []
    embed(config(run, photos, tmp_path / "out"), lambda *counts: calls.append(counts))
    assert calls == [(0, 3), (1, 3), (2, 3), (3, 3)]


def test_a_repeated_command_changes_nothing_and_restores_a_deleted_shard(run, photos, tmp_path):
    out = tmp_path / "out"
    embed(config(run, photos, out))
    before, times = files(out), {path: path.stat().st_mtime_ns for path in out.glob("*.parquet")}
    embed(config(run, photos, out))
    assert files(out) == before
    assert {path: path.stat().st_mtime_ns for path in out.glob("*.parquet")} == times
    next(out.glob("*-00001-of-*")).unlink()
    embed(config(run, photos, out))
    assert files(out) == before


def test_different_settings_or_weights_are_refused_and_named(run, photos, tmp_path):
    out = tmp_path / "out"
    embed(config(run, photos, out))
    before = files(out)
    for changes, message in [
        ({"features": "cls"}, "features was mean and is now cls"),
        ({"block": 1}, "block was None and is now 1"),
        ({"dtype": "float16"}, "dtype was float32 and is now float16"),
        ({"shard_size": 8}, "shard_size was 16 and is now 8"),
        ({"data": ("shapes:40",)}, r"data_fingerprint was .* and is now "),
    ]:
        with pytest.raises(UserError, match=message):
            embed(replace(config(run, photos, out), **changes))
    file = next(run.rglob("model.safetensors"))
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(UserError, match=r"weights was .* and is now .*\. Give the same settings"):
        embed(config(run, photos, out))
    assert files(out) == before


def test_invalid_requests_are_refused(run, photos, tmp_path):
    with pytest.raises(UserError, match="--block 3 is more than the 2 blocks"):
        embed(config(run, photos, tmp_path / "out", block=3))
    with pytest.raises(UserError, match="--shard-size 0"):
        config(run, photos, tmp_path / "out", shard_size=0)
    with pytest.raises(UserError, match="has other files, such as a"):
        embed(config(run, photos, photos))
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "x.png").write_bytes(b"none")
    with pytest.raises(UserError, match="None of the images"):
        embed(config(run, tmp_path / "broken", tmp_path / "out"))
    (tmp_path / "out" / "embed.json").write_text("{")
    with pytest.raises(UserError, match="damaged"):
        embed(config(run, photos, tmp_path / "out"))


def test_embeddings_that_are_not_finite_or_do_not_fit_are_never_written(run, photos, tmp_path):
    file = next(run.rglob("model.safetensors"))
    model = load(run)
    for scale, dtype, error in [(1e6, "float16", UserError), (float("nan"), "float32", RunError)]:
        model.norm.bias.data.fill_(scale)
        checkpoint.save(file.parents[1], 1, {"model": model.state_dict()}, {}, make_metadata(model.config))
        with pytest.raises(error, match=r"float16|not finite"):
            embed(config(run, photos, tmp_path / dtype, dtype=dtype))
        assert not list((tmp_path / dtype).glob("*.parquet"))


# ---------------------------------------------------------------------- kills


def run_embed(settings: EmbedConfig) -> None:
    torch.set_num_threads(1)
    embed(settings)


@pytest.mark.slow
def test_the_bytes_are_the_same_after_repeated_kills(run, photos, tmp_path):
    changes = {"shard_size": 6, "batch_size": 4, "features": "tokens"}
    embed(config(run, photos, tmp_path / "whole", **changes))
    whole, generator, num_killed, file_counts = files(tmp_path / "whole"), random.Random(0), 0, set()
    parts = tmp_path / "parts"
    for _ in range(40):
        before = len(list(parts.glob("*.parquet")))
        process = CONTEXT.Process(target=run_embed, args=(config(run, photos, parts, **changes),))
        process.start()
        deadline = time.monotonic() + 60
        while process.is_alive() and len(list(parts.glob("*.parquet"))) < before + generator.randint(1, 4):
            assert time.monotonic() < deadline
            time.sleep(0.001)
        time.sleep(generator.uniform(0, 0.01))
        process.kill()
        process.join(60)
        assert process.exitcode in (-signal.SIGKILL, 0)
        num_killed += process.exitcode != 0
        current = files(parts)
        assert all(whole[name] == content for name, content in current.items() if name.endswith(".parquet"))
        file_counts.add(len(current))
        if process.exitcode == 0:
            break
    assert num_killed >= 3
    assert len(file_counts) >= 3
    embed(config(run, photos, parts, **changes))
    assert files(parts) == whole
    assert not list(parts.glob("*.partial"))
    assert not list(parts.glob(".*.partial"))
