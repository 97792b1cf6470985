"""Features against timm, and what every probe shares."""

import copy
import io

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from quarterview.commands.config import KnnConfig
from quarterview.commands.knn import knn
from quarterview.data.sources.open import open_source
from quarterview.doctor.collapse import encoder_spread
from quarterview.errors import UserError
from quarterview.evaluation import features
from quarterview.evaluation.config import EmbedConfig, ProbeConfig
from quarterview.evaluation.embed import Embedder
from quarterview.evaluation.features import (
    central_batches,
    extract,
    fresh_twin,
    pixel_features,
    tokens_after,
)
from quarterview.models.create import create_model, fresh_model
from quarterview.training import checkpoint
from quarterview.training.console import Console
from quarterview.weights.loading import metadata, read


@pytest.fixture
def model():
    torch.manual_seed(0)
    return create_model(
        "mae_vit_32x2x2_patch4",
        image_size=16,
        decoder_width=16,
        decoder_depth=1,
        decoder_heads=2,
        mean=(0.4, 0.5, 0.6),
        std=(0.2, 0.3, 0.25),
    ).eval()


@pytest.fixture
def run(model, tmp_path):
    folder = tmp_path / "run" / "checkpoints"
    checkpoint.save(folder, 1, {"model": model.state_dict()}, {"step": 1}, metadata(model.config))
    return tmp_path / "run"


def timm_twin(model):
    vit = timm.models.VisionTransformer(
        img_size=16, patch_size=4, embed_dim=32, depth=2, num_heads=2, num_classes=0, norm_layer=None
    )
    own = {k: v for k, v in model.state_dict().items() if not k.startswith(("decoder", "mask_token"))}
    vit.load_state_dict(own)
    for module in vit.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.eps = 1e-6
    return vit.eval()


@torch.no_grad()
def test_of_several_cls_tokens_the_feature_is_the_mean_and_none_counts_as_a_patch(model, disturbed):
    few = {"image_size": 16, "decoder_width": 16, "decoder_depth": 1, "decoder_heads": 2}
    model = disturbed(create_model("mae_vit_32x2x2_patch4", **few, cls_tokens=3)).eval()
    images = torch.rand(4, 3, 16, 16)
    tokens = model.encode(images)  # neither mean nor std is recorded
    cls, mean = (features.encoder_features(model, kind)(images) for kind in ("cls", "mean"))
    torch.testing.assert_close(cls, tokens[:, :3].mean(1))
    torch.testing.assert_close(mean, tokens[:, 3:].mean(1))
    torch.testing.assert_close(features.partly_visible(model, 1.0, 0)(images), mean, atol=1e-5, rtol=1e-4)
    spread = encoder_spread(model, images)
    assert spread.variance == pytest.approx(float(mean.double().var(dim=0, correction=0).mean()), rel=1e-4)
    for kind, expected in (("cls", cls), ("mean", mean), ("tokens", tokens)):
        config = EmbedConfig("run", ("data",), "out", features=kind)
        embedder = Embedder(model, config, torch.device("cpu"), tuple(expected.shape[1:]))
        torch.testing.assert_close(embedder(images), expected, atol=0.1, rtol=0.1)  # computed in bf16


def test_features_equal_timms_forward_with_the_same_weights(model):
    vit = timm_twin(model)
    images = torch.rand(5, 3, 16, 16)
    mean, std = (torch.tensor(x)[:, None, None] for x in (model.config.mean, model.config.std))
    with torch.no_grad():
        tokens = vit.forward_features((images - mean) / std)
        torch.testing.assert_close(
            features.encoder_features(model, "cls")(images), tokens[:, 0], atol=1e-5, rtol=0
        )
        torch.testing.assert_close(
            features.encoder_features(model, "mean")(images), tokens[:, 1:].mean(1), atol=1e-5, rtol=0
        )


def test_the_encoder_is_untouched_by_feature_extraction(model):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    source = open_source("shapes:40", 3)
    encoders = {"ours": features.encoder_features(model, "mean")}
    first, ids = extract(encoders, source, range(40), model.config, torch.device("cpu"))
    second, _ = extract(encoders, source, range(40), model.config, torch.device("cpu"), batch_size=7)
    assert ids == list(range(40))
    torch.testing.assert_close(first["ours"], second["ours"], atol=2e-2, rtol=0)  # bf16, other batches
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.slow
@pytest.mark.parametrize("block", [None, 2])
def test_compiled_features_are_the_same(model, block):
    images = torch.rand(5, 3, 16, 16)
    compiled = copy.deepcopy(model)
    features.compile_blocks(compiled, block)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with torch.inference_mode(), torch._dynamo.config.patch(error_on_recompile=True):
        expected = features.tokens_after(model, images, block)
        for _ in range(2):
            found = features.tokens_after(compiled, images, block)
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 1
    assert not torch._dynamo.utils.counters["graph_break"]


def test_broken_images_are_left_out(model, tmp_path):
    for i in range(6):
        image = Image.fromarray(np.full((16, 16, 3), 40 * i, np.uint8))
        stream = io.BytesIO()
        image.save(stream, "PNG")
        data = stream.getvalue()
        (tmp_path / f"{i}.png").write_bytes(data[: len(data) // 2] if i == 3 else data)
    source = open_source(str(tmp_path), 3)
    found, kept = extract({"raw": pixel_features}, source, range(6), model.config, torch.device("cpu"))
    assert kept == [0, 1, 2, 4, 5]
    torch.testing.assert_close(found["raw"][:, 0] * 255, torch.tensor([0.0, 40, 80, 160, 200]))


@pytest.mark.parametrize(
    ("size", "crop_pct", "outer"),
    [((224, 224), None, False), ((224, 224), 1.0, True), ((32, 32), None, True), ((32, 32), 0.5, False)],
)
def test_how_much_of_a_test_image_is_seen(tmp_path, size, crop_pct, outer):
    image = np.zeros((64, 64, 3), np.uint8)
    image[:4] = image[-4:] = 255  # a frame of a sixteenth, which seven eighths do not reach
    Image.fromarray(image).save(tmp_path / "a.png")
    source = open_source(str(tmp_path), 3)
    [(_, seen)] = central_batches(source, [0], size, 1, crop_pct=crop_pct)
    assert bool((seen > 128).any()) == outer


def test_a_share_that_is_none_is_refused():
    with pytest.raises(UserError, match=r"--crop-pct 1\.5"):
        ProbeConfig("run", crop_pct=1.5)


def test_pixels_are_shrunk_to_the_stated_side():
    assert pixel_features(torch.rand(2, 3, 16, 16)).shape == (2, 3 * 16 * 16)
    assert pixel_features(torch.rand(2, 3, 64, 128)).shape == (2, 3 * 16 * 32)


@pytest.mark.parametrize("block", [1, 2])
def test_tokens_of_an_inner_block_equal_timms(model, block):
    vit = timm_twin(model)
    images = torch.randn(3, 3, 16, 16)
    with torch.no_grad():
        expected = vit.forward_intermediates(
            images,
            indices=[block - 1],
            norm=False,
            output_fmt="NLC",
            intermediates_only=True,
            return_prefix_tokens=True,
        )
        patches, cls = expected[0]
        tokens = tokens_after(model, images, block)
        torch.testing.assert_close(tokens, torch.cat([cls, patches], dim=1), atol=1e-5, rtol=0)
        after_all = tokens_after(model, images)
        torch.testing.assert_close(after_all, model.encode(images))
        if block == 2:
            torch.testing.assert_close(model.norm(tokens), after_all, atol=1e-6, rtol=0)


def test_a_fresh_twin_has_the_weights_of_its_seed_and_leaves_the_model_alone(model):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    twin = fresh_twin(model, 5)
    assert all(
        torch.equal(a, b)
        for a, b in zip(
            twin.state_dict().values(), fresh_model(model.config, 5).state_dict().values(), strict=True
        )
    )
    assert not twin.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_digest_is_that_of_the_bytes(run, tmp_path):
    file = run / "checkpoints" / "step-00000001" / "model.safetensors"
    digest = read(file).digest
    assert len(digest) == 16
    copy = tmp_path / "copy"
    copy.write_bytes(file.read_bytes())
    assert read(copy).digest == digest
    content = file.read_bytes()
    copy.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert read(copy).digest != digest


def test_probes_refuse_what_cannot_be_compared(run, tmp_path):
    np.save(tmp_path / "x.npy", np.zeros((20, 16, 16, 3), np.uint8))
    for changes, said in (
        ({"train": str(tmp_path / "x.npy")}, "no labels"),
        ({"ema": True}, "no moving average"),
    ):
        flags = {"run": str(run), "train": "shapes:20", "test": "shapes:20", "k": 3, **changes}
        with pytest.raises(UserError, match=said):
            knn(KnnConfig.from_flags(**flags), Console(quiet=True))
