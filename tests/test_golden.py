"""Random draws, initial weights and first losses are what they were: resumed runs depend on it.

`tests/golden/digests.json` holds SHA-256 digests of what is equal on every machine: integers, uniform numbers
and what is made of them without rounding twice. What differs in the last bits between the plain, AVX2 and
AVX-512 code of torch on a CPU, or goes through logarithms, cosines and matrix products, which libraries
round as they like, is held as a few reference numbers, compared to 1e-6. Initial weights are such: they
are uniform numbers times a scale, plus a shift, which a fused multiply-add rounds once instead of twice. So
are the losses of a few updates, to 1e-5. Write the file again, after a change that is meant, by::

    python tests/test_golden.py --write
"""

import argparse
import hashlib
import importlib
import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

# ---------------------------------------------------------------------- what is called of the package

_HOMES = {
    "convert_uniform_to_beta": "quarterview.data.transforms.mixing",
    "draw_view_crops": "quarterview.data.transforms.views",
    "choose_labeled": "quarterview.evaluation.labelled",
    "ClassifierConfig": "quarterview.models.config",
    "build": "quarterview.methods.base",
    "BYOLConfig": "quarterview.methods.config",
    "compute_default_holdout": "quarterview.data.sampler",
    "distort_colors": "quarterview.data.transforms.views",
    "compute_drop_path_scales": "quarterview.models.vit",
    "apply_random_erasing": "quarterview.data.transforms.randaugment",
    "get_center_box": "quarterview.data.transforms.crop",
    "finetune": "quarterview.commands.finetune",
    "FinetuneConfig": "quarterview.commands.config",
    "create_classifier": "quarterview.models.create",
    "create_encoder": "quarterview.models.create",
    "create_mae": "quarterview.models.create",
    "create_tokenizer": "quarterview.models.create",
    "compute_gumbel_noise": "quarterview.methods.tokenizer",
    "key": "quarterview.rng",
    "select_lowest_noise": "quarterview.models.masking",
    "MAEConfig": "quarterview.models.config",
    "MoCoV3Config": "quarterview.methods.config",
    "MethodContext": "quarterview.methods.base",
    "SimCLRConfig": "quarterview.methods.config",
    "mask_from_noise": "quarterview.models.masking",
    "MaskedAutoencoding": "quarterview.methods.mae",
    "mix_pairs": "quarterview.data.transforms.mixing",
    "draw_normal": "quarterview.methods.denoising",
    "permute": "quarterview.rng",
    "pretrain": "quarterview.commands.pretrain",
    "PretrainConfig": "quarterview.commands.config",
    "apply_randaugment": "quarterview.data.transforms.randaugment",
    "draw_random_crops": "quarterview.data.transforms.crop",
    "SampleStream": "quarterview.data.sampler",
    "seeded": "quarterview.rng",
    "ShapesSource": "quarterview.data.sources.shapes",
    "ShardedStream": "quarterview.data.sampler",
    "split_evenly": "quarterview.data.loader",
    "split_indices": "quarterview.models.masking",
    "TokenizerConfig": "quarterview.models.config",
    "uniform": "quarterview.rng",
    "get_views": "quarterview.commands.pretrain",
    "ViTConfig": "quarterview.models.config",
}
"""Where each thing that is called lives. Where things move, only this table and the helpers below change."""


def the(name: str) -> Any:
    """A function or class of the package."""
    return getattr(importlib.import_module(_HOMES[name]), name)


def a_pretraining(**values) -> Any:
    """A configuration of pre-training, of a tiny model where nothing else is said."""
    tiny = {"model": _TINY, "image_size": 16}
    if values.get("method", "mae") == "mae":
        tiny |= {"decoder_width": 32, "decoder_depth": 1, "decoder_heads": 2}
    return the("PretrainConfig").from_flags(**{**tiny, **values})


def views_for(method: str, **values) -> Sequence[Any]:
    """How the one or two views of an image are made."""
    return the("get_views")(a_pretraining(method=method, **values))


def colours_for(method: str, **values) -> list[Any]:
    """How the colours of each view are distorted."""
    return [view.colors for view in views_for(method, **values)]


def an_mae(**values) -> nn.Module:
    """A masked autoencoder with the initial weights of a seed."""
    tiny = {"model": _TINY, "image_size": 16, "decoder_width": 32, "decoder_depth": 2, "decoder_heads": 2}
    return the("create_mae")(the("MAEConfig")(**{**tiny, **values}), _SEED)


def an_encoder(**values) -> nn.Module:
    """An encoder alone, likewise."""
    return the("create_encoder")(the("ViTConfig")(**{"model": _TINY, "image_size": 16, **values}), _SEED)


def a_classifier(**values) -> nn.Module:
    """A classifier, likewise."""
    config = the("ClassifierConfig")(**{"model": _TINY, "image_size": 16, "classes": 10, **values})
    return the("create_classifier")(config, _SEED)


def a_tokenizer(patch_size: int) -> nn.Module:
    """A tokenizer, likewise."""
    config = the("TokenizerConfig")(patch_size, 3, 32, 8, 1, (0.5,) * 3, (0.25,) * 3)
    return the("create_tokenizer")(config, _SEED)


def a_contrastive(kind: str) -> nn.Module:
    """An encoder with the heads of a method that compares views, likewise."""
    config = the(f"{kind}Config")(proj_hidden_dim=16, proj_output_dim=8)
    encoder = the("ViTConfig")(model=_TINY, image_size=16)
    return the("build")(config, the("MethodContext")(encoder, _SEED, 10))


def masks_of(masks: int = 1, **values) -> dict[str, Tensor]:
    """The masks of some samples, and the patches that a model predicts of them."""
    model = an_mae(**{"image_size": 32, **values})
    noise = the("MaskedAutoencoding")(model, _SEED, masks).draw_mask_noise(_EPOCHS, _IDS, masks).flatten(0, 1)
    mask = the("mask_from_noise")(noise, model.num_visible)
    hidden = the("split_indices")(mask, model.num_visible)[1]
    found = {"noise": noise, "mask": mask}
    share = values.get("predict_ratio", 1.0)
    return found | ({"predicted": the("select_lowest_noise")(hidden, noise, share)} if share < 1 else {})


def mae_losses(folder: Path) -> list[float]:
    """The losses of a few updates of pre-training."""
    return _losses(the("pretrain"), a_pretraining(**_short(folder), data=["shapes:64:size=16"], holdout=8))


def classifier_losses(folder: Path) -> list[float]:
    """The losses of a few updates of fine-tuning from random weights."""
    values = {"run": "scratch", "train": ["shapes:64:size=16"], "test": ["shapes:16:size=16:seed=1"]}
    config = the("FinetuneConfig").from_flags(
        **values, **_short(folder), model=_TINY, image_size=16, randaugment="none", warmup_epochs=1
    )
    return _losses(the("finetune"), config)


def _short(folder: Path) -> dict[str, Any]:
    common = {"out": str(folder), "steps": 6, "batch_size": 16, "lr": 1e-3, "log_every": 1, "workers": 0}
    return {**common, "precision": "fp32", "device": "cpu"}


def _losses(train: Callable[[Any], Any], config: Any) -> list[float]:
    train(config)
    lines = (Path(config.run.out) / "metrics.jsonl").read_text().splitlines()
    return [row["loss"] for row in map(json.loads, lines) if row.get("loss") is not None]


# ---------------------------------------------------------------------- what is measured

_TINY = "mae_vit_32x3x2_patch4"
_SEED = 3
_IDS = torch.tensor([0, 1, 7, 4711, 99_999, 2**33])
_EPOCHS = torch.tensor([0, 0, 1, 2, 300, 1])
_SIZES = torch.tensor([[32, 32], [480, 640], [640, 480], [9, 300], [300, 9], [1, 1]])
_FILE = Path(__file__).parent / "golden" / "digests.json"
_INEXACT = {
    "draws": ("normal", "gumbel"),
    "colours": ("color jitter", "simclr", "byol", "mocov3", "erasing noise", "mixup", "beta"),
}
"""Beginnings of the names of what is always held as numbers: it goes through logarithms, cosines, matrix
products or SciPy's quantiles of the Beta distribution."""
_MACHINES = (
    {"ATEN_CPU_CAPABILITY": "default", "MKL_ENABLE_INSTRUCTIONS": "SSE4_2"},
    *({"ATEN_CPU_CAPABILITY": capability} for capability in ("default", "avx2", "avx512")),
)
"""Environments under which torch computes as on other machines."""


def some_images(count: int) -> Tensor:
    """float [count, 3, 16, 16] in [0, 1], multiples of 1/255."""
    return the("ShapesSource")(count, 0, 3, 16).images(range(count)).float() / 255


def draws() -> Iterator[tuple[str, Any]]:
    """Every keyed draw."""
    key, uniform, permute = the("key"), the("uniform"), the("permute")
    for seed in (0, _SEED, -1, 2**40):
        yield f"key, seed {seed}", key(seed, "order", _EPOCHS, _IDS)
        yield f"key of ints, seed {seed}", key(seed, "init", 1, 2, 3)
        yield f"key without parts, seed {seed}", key(seed, "init")
    for purpose in ("crop", "crop 2", "mask", "colours 1", "mix", "drop path", "erase", "visible", "words"):
        yield f"uniform, {purpose}", uniform(_SEED, purpose, _EPOCHS, _IDS, 50)
    yield "uniform of one epoch", uniform(_SEED, "mask", 5, _IDS, 7)
    for size in (1, 2, 3, 10, 1000, 1_281_167):
        places = torch.arange(min(size, 1000))
        yield f"permute {size}", permute(_SEED, "order", 4, places, size)
        yield f"permute {size}, epochs", permute(_SEED, "order", places % 3, places, size)
    yield "normal", the("draw_normal")(_SEED, "noise", _EPOCHS, _IDS, 51)
    yield "gumbel", the("compute_gumbel_noise")(uniform(_SEED, "words", _EPOCHS, _IDS, 50))
    for parts in ((), (1,), (1, 2)):
        with the("seeded")(_SEED, "init", *parts):
            yield f"seeded {parts}, torch", torch.rand(100)
            yield f"seeded {parts}, torch integers", torch.randint(1 << 40, (100,))
            yield f"seeded {parts}, numpy", torch.from_numpy(np.random.random_sample(100))
            yield f"seeded {parts}, random", [random.random() for _ in range(100)]
    yield "shapes", the("ShapesSource")(100, 5, 3, 24).images(range(0, 100, 7))
    yield "labels of shapes", [the("ShapesSource")(100, 5, 3).label(index) for index in range(100)]


def order() -> Iterator[tuple[str, Any]]:
    """Which sample comes when, and which are held out."""
    yield "default holdout", [the("compute_default_holdout")(size) for size in (10, 99, 100, 5000, 10**6)]
    starts = [0, 40, 41, 41, 300, 777, 1000]
    streams = {
        "full": the("SampleStream")(1000, 0, _SEED),
        "full, holdout": the("SampleStream")(1000, 37, _SEED),
        "shards": the("ShardedStream")(starts, 37, _SEED, 2),
        "shards, one at a time": the("ShardedStream")(starts, 37, _SEED, 1),
    }
    for name, stream in streams.items():
        epochs, ids = stream.get_samples(torch.arange(3 * stream.num_train + 10))
        yield f"{name}: epochs", epochs
        yield f"{name}: ids", ids
        yield f"{name}: held out", stream.get_held_out_ids()
        yield f"{name}: sample for statistics", stream.select_train_ids(100)
        yield (
            f"{name}: replacements",
            [stream.get_replacement(e, s, a) for e in (0, 2) for s in (5, 9) for a in (0, 1)],
        )
    for batch, ranks in ((64, 1), (64, 4), (30, 4), (31, 3), (2, 4)):
        parts = the("split_evenly")(range(1000, 1000 + batch), ranks)
        yield f"a batch of {batch} for {ranks} ranks", [list(part) or [-1] for part in parts]
    labels = torch.arange(500) ** 2 % 7
    for count in (None, 1, 7, 100, 500):
        yield f"{count} labelled", the("choose_labeled")(labels, count, _SEED)


def crops() -> Iterator[tuple[str, Any]]:
    """Crop boxes and flips."""
    views = {
        "random": views_for("mae"),
        "random, small": views_for("mae", crop_min=0.05),
        "fixed": views_for("mae", crop="fixed"),
        "none": views_for("mae", crop="none"),
        **{name: views_for(name) for name in ("simclr", "byol", "mocov3")},
    }
    sizes, ids = _SIZES.repeat(20, 1), torch.arange(120)
    for name, made in views.items():
        for number, view in enumerate(made):
            boxes, flips = the("draw_view_crops")(view, number, (16, 24), _SEED, ids % 5, ids, sizes)
            yield f"{name}, view {number + 1}: boxes", boxes
            yield f"{name}, view {number + 1}: flips", flips
    boxes, flips = the("draw_random_crops")(_SEED, ids % 5, ids, sizes, single_draw=True)
    yield "single draw: boxes", boxes
    yield "single draw: flips", flips
    yield (
        "central boxes",
        [the("get_center_box")(h, w, (16, 24), p) for h, w in _SIZES.tolist() for p in (1.0, 0.875)],
    )


def colours() -> Iterator[tuple[str, Any]]:
    """Colour jitter, blur, solarising, RandAugment, random erasing, mixup, CutMix and drop path."""
    images, ids = some_images(12), torch.arange(12)
    made = {"color jitter": colours_for("mae", color_jitter=0.4)}
    made |= {name: colours_for(name) for name in ("simclr", "byol", "mocov3")}
    for name, kinds in made.items():
        for number, kind in enumerate(kinds):
            found = the("distort_colors")(images, kind, number, _SEED, ids % 3, ids)
            yield f"{name}, view {number + 1}", found
    pictures = (images * 255).round().to(torch.uint8)
    for policy in ("rand-m9-mstd0.5-inc1", "rand-m5-n3"):
        done = [
            the("apply_randaugment")(p, policy, (0.5,) * 3, _SEED, i % 3, i) for i, p in enumerate(pictures)
        ]
        yield f"RandAugment {policy}", torch.stack(done)
    erased = the("apply_random_erasing")(torch.zeros(12, 3, 16, 16), 0.5, _SEED, ids % 3, ids)
    yield "erased pixels", erased != 0
    yield "erasing noise", erased[erased != 0]
    targets = nn.functional.one_hot(ids % 10, 10).float()
    for mixup, cutmix in ((0.8, 0.0), (0.0, 1.0), (0.8, 1.0)):
        mixed = the("mix_pairs")(images, targets, ids % 3, ids, _SEED, mixup, cutmix)
        yield f"mixup {mixup}, cutmix {cutmix}: images", mixed[0]
        yield f"mixup {mixup}, cutmix {cutmix}: targets", mixed[1]
    yield "beta", the("convert_uniform_to_beta")(torch.arange(100) / 100, 0.8)
    uniforms = the("uniform")(_SEED, "drop path", ids % 3, ids, 24).view(-1, 12, 2)
    yield "drop path", the("compute_drop_path_scales")(uniforms, 0.4)


def masks() -> Iterator[tuple[str, Any]]:
    """Masks of every kind, and which patches are predicted."""
    kinds: dict[str, dict[str, Any]] = {
        "random": {},
        "random, ratio 0.4": {"mask_ratio": 0.4},
        "block": {"mask": "block"},
        "block, ratio 0.4": {"mask": "block", "mask_ratio": 0.4},
        "grid": {"mask": "grid"},
        "unit of 2": {"mask_unit": 2},
        "3 masks per image": {"masks": 3},
        "3 block masks per image": {"masks": 3, "mask": "block"},
        "predict share": {"decoder": "cross", "predict_ratio": 0.3},
        "predict share, grid, 2 masks per image": {
            **{"decoder": "cross", "predict_ratio": 0.5, "mask": "grid", "masks": 2}
        },
    }
    for name, values in kinds.items():
        for part, tensor in masks_of(**values).items():
            yield f"{name}: {part}", tensor


def weights() -> Iterator[tuple[str, Any]]:
    """Initial weights of every kind of model: their names and shapes, positions, and all other values."""
    models = {
        "mae": an_mae(),
        "mae, no decoder blocks": an_mae(decoder_depth=0, encoder_mask_tokens=True),
        "mae, cross decoder": an_mae(decoder="cross"),
        "mae, encoder mask tokens": an_mae(encoder_mask_tokens=True),
        "mae, 2 cls tokens": an_mae(cls_tokens=2),
        "mae, fused blocks": an_mae(fused_blocks=(1, 2)),
        "mae, 1 channel": an_mae(in_chans=1),
        "mae, pca": an_mae(target="pca", pca_components=5),
        "mae, hog": an_mae(target="hog"),
        "mae, tokens": an_mae(target="tokens", codebook_size=50),
        "encoder": an_encoder(),
        "encoder, 2 cls tokens": an_encoder(cls_tokens=2),
        "classifier": a_classifier(),
        "classifier, cls": a_classifier(pool="cls", cls_tokens=2),
        "tokenizer": a_tokenizer(4),
        "tokenizer, patch of 6": a_tokenizer(6),
        **{kind.lower(): a_contrastive(kind) for kind in ("SimCLR", "BYOL", "MoCoV3")},
    }
    for name, model in models.items():
        tensors = dict(sorted(model.state_dict().items()))
        yield f"{name}: names", [f"{key} {tuple(value.shape)}" for key, value in tensors.items()]
        fixed = [key for key in tensors if key.endswith("pos_embed")]
        if fixed:
            yield f"{name}: positions", torch.cat([tensors[key].flatten() for key in fixed])
        yield f"{name}: values", torch.cat([tensors[k].double().flatten() for k in tensors if k not in fixed])


def losses() -> Iterator[tuple[str, list[float]]]:
    """Losses of a few updates on generated images."""
    with tempfile.TemporaryDirectory() as folder:
        yield "mae", mae_losses(Path(folder) / "mae")
        yield "classifier", classifier_losses(Path(folder) / "classifier")


PARTS = {
    "draws": draws,
    "order": order,
    "crops": crops,
    "colours": colours,
    "masks": masks,
    "weights": weights,
}


# ---------------------------------------------------------------------- digests and numbers


def digest_of(value: Any) -> str:
    """SHA-256 of a tensor's type, shape and bytes, or of a list as JSON."""
    if isinstance(value, Tensor):
        head = f"{value.dtype} {tuple(value.shape)} ".encode()
        return hashlib.sha256(head + value.contiguous().numpy().tobytes()).hexdigest()
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def numbers_of(value: Tensor) -> list[float]:
    """A few numbers of a tensor, evenly spread, and weighted sums that every one of its numbers is in."""
    flat = value.double().flatten()
    place = torch.arange(len(flat))
    sums = [
        (flat * ((place * prime % 2003) / 1001 - 1)).sum() / len(flat) ** 0.5 for prime in (1, 7919, 104_729)
    ]
    return [*flat[torch.linspace(0, len(flat) - 1, 6).long()].tolist(), *map(float, sums)]


def found(part: str, numbers: Sequence[str]) -> dict[str, Any]:
    """The digests of a part, and the numbers of those entries of which digests would differ."""
    return {k: numbers_of(v) if k in numbers else digest_of(v) for k, v in PARTS[part]()}


@pytest.mark.parametrize("part", PARTS)
def test_every_draw_and_initial_weight_is_what_it_was(part):
    held = json.loads(_FILE.read_text())[part]
    numbers = [name for name, value in held.items() if isinstance(value, list)]
    now = found(part, numbers)
    assert list(now) == list(held)
    assert [name for name in held if name not in numbers and now[name] != held[name]] == []
    for name in numbers:
        assert now[name] == pytest.approx(held[name], rel=1e-6, abs=1e-6), name


def test_the_first_losses_are_what_they_were():
    held = json.loads(_FILE.read_text())["losses"]
    for name, values in losses():
        assert values == pytest.approx(held[name], rel=1e-5), name


# ---------------------------------------------------------------------- writing


def _digests_under(machine: dict[str, str]) -> dict[str, dict[str, str]]:
    """All digests in an environment, from a process of its own."""
    environment = os.environ | machine | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, "--digests"]
    return json.loads(subprocess.run(command, env=environment, check=True, capture_output=True).stdout)


def _write() -> None:
    """Measure under each kind of code and write the file; needs a CPU that has AVX-512."""
    measured = [_digests_under(machine) for machine in _MACHINES]
    held: dict[str, Any] = {}
    for part, names in measured[0].items():
        numbers = [
            name
            for name in names
            if name.startswith(_INEXACT.get(part, ())) or len({each[part][name] for each in measured}) > 1
        ]
        held[part] = found(part, numbers)
        print(f"{part}: {len(names)} entries; kept as numbers: {', '.join(numbers) or 'none'}")  # noqa: T201
    held["losses"] = dict(losses())
    _FILE.parent.mkdir(exist_ok=True)
    _FILE.write_text(json.dumps(held, indent=1) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="measure again and write the file")
    parser.add_argument("--digests", action="store_true", help="print all digests as JSON")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.write:
        _write()
    if arguments.digests:
        print(json.dumps({part: found(part, ()) for part in PARTS}))  # noqa: T201
