"""Features compared with timm, and the code shared by all probes."""

import copy
import io

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from quarterview.commands.config import KnnConfig
from quarterview.commands.knn import evaluate_knn
from quarterview.data.sources.open import open_source
from quarterview.doctor.collapse import compute_encoder_statistics
from quarterview.errors import UserError
from quarterview.evaluation import features
from quarterview.evaluation.config import EmbedConfig, ProbeConfig
from quarterview.evaluation.embed import Embedder
from quarterview.evaluation.features import (
    compute_pixel_features,
    create_untrained_copy,
    extract_features,
    get_intermediate_tokens,
    iterate_central_crops,
)
from quarterview.models.create import create_mae, create_model
from quarterview.training import checkpoint
from quarterview.training.console import Console
from quarterview.weights.loading import make_metadata, read_weights


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
    checkpoint.save(folder, 1, {"model": model.state_dict()}, {"step": 1}, make_metadata(model.config))
    return tmp_path / "run"


def timm_copy(model):
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
def test_several_cls_tokens_are_averaged_and_are_not_patch_tokens(model, disturbed):
    small = {"image_size": 16, "decoder_width": 16, "decoder_depth": 1, "decoder_heads": 2}
    model = disturbed(create_model("mae_vit_32x2x2_patch4", **small, cls_tokens=3)).eval()
    images = torch.rand(4, 3, 16, 16)
    tokens = model.encode(images)  # neither mean nor std is recorded
    cls, mean = (features.make_encoder(model, pool)(images) for pool in ("cls", "mean"))
    torch.testing.assert_close(cls, tokens[:, :3].mean(1))
    torch.testing.assert_close(mean, tokens[:, 3:].mean(1))
    torch.testing.assert_close(
        features.make_masked_encoder(model, 1.0, 0)(images), mean, atol=1e-5, rtol=1e-4
    )
    spread = compute_encoder_statistics(model, images)
    assert spread.variance == pytest.approx(float(mean.double().var(dim=0, correction=0).mean()), rel=1e-4)
    for name, expected in (("cls", cls), ("mean", mean), ("tokens", tokens)):
        config = EmbedConfig("run", ("data",), "out", features=name)
        embedder = Embedder(model, config, torch.device("cpu"), tuple(expected.shape[1:]))
        torch.testing.assert_close(embedder(images), expected, atol=0.1, rtol=0.1)  # computed in bf16


def test_features_equal_those_of_timm_with_the_same_weights(model):
    vit = timm_copy(model)
    images = torch.rand(5, 3, 16, 16)
    mean, std = (torch.tensor(x)[:, None, None] for x in (model.config.mean, model.config.std))
    with torch.no_grad():
        tokens = vit.forward_features((images - mean) / std)
        torch.testing.assert_close(
            features.make_encoder(model, "cls")(images), tokens[:, 0], atol=1e-5, rtol=0
        )
        torch.testing.assert_close(
            features.make_encoder(model, "mean")(images), tokens[:, 1:].mean(1), atol=1e-5, rtol=0
        )


def test_feature_extraction_does_not_change_the_encoder(model):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    source = open_source("shapes:40", 3)
    encoders = {"ours": features.make_encoder(model, "mean")}
    first, ids = extract_features(encoders, source, range(40), model.config, torch.device("cpu"))
    second, _ = extract_features(encoders, source, range(40), model.config, torch.device("cpu"), batch_size=7)
    assert ids == list(range(40))
    torch.testing.assert_close(first["ours"], second["ours"], atol=2e-2, rtol=0)  # bf16, different batches
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
        expected = features.get_intermediate_tokens(model, images, block)
        for _ in range(2):
            found = features.get_intermediate_tokens(compiled, images, block)
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 1
    assert not torch._dynamo.utils.counters["graph_break"]


def test_unreadable_images_are_left_out(model, tmp_path):
    for i in range(6):
        image = Image.fromarray(np.full((16, 16, 3), 40 * i, np.uint8))
        stream = io.BytesIO()
        image.save(stream, "PNG")
        data = stream.getvalue()
        (tmp_path / f"{i}.png").write_bytes(data[: len(data) // 2] if i == 3 else data)
    source = open_source(str(tmp_path), 3)
    extracted, read_ids = extract_features(
        {"raw": compute_pixel_features}, source, range(6), model.config, torch.device("cpu")
    )
    assert read_ids == [0, 1, 2, 4, 5]
    torch.testing.assert_close(extracted["raw"][:, 0] * 255, torch.tensor([0.0, 40, 80, 160, 200]))


@pytest.mark.parametrize(
    ("size", "crop_pct", "sees_frame"),
    [((224, 224), None, False), ((224, 224), 1.0, True), ((32, 32), None, True), ((32, 32), 0.5, False)],
)
def test_crop_pct_decides_how_much_of_an_image_is_cropped(tmp_path, size, crop_pct, sees_frame):
    image = np.zeros((64, 64, 3), np.uint8)
    image[:4] = image[-4:] = 255  # a frame of 1/16, outside of the central 7/8
    Image.fromarray(image).save(tmp_path / "a.png")
    source = open_source(str(tmp_path), 3)
    [(_, pixels)] = iterate_central_crops(source, [0], size, 1, crop_pct=crop_pct)
    assert bool((pixels > 128).any()) == sees_frame


def test_an_invalid_crop_pct_is_refused():
    with pytest.raises(UserError, match=r"--crop-pct 1\.5"):
        ProbeConfig("run", crop_pct=1.5)


def test_images_are_shrunk_to_32_pixels_for_pixel_features():
    assert compute_pixel_features(torch.rand(2, 3, 16, 16)).shape == (2, 3 * 16 * 16)
    assert compute_pixel_features(torch.rand(2, 3, 64, 128)).shape == (2, 3 * 16 * 32)


@pytest.mark.parametrize("block", [1, 2])
def test_tokens_of_an_intermediate_block_equal_those_of_timm(model, block):
    vit = timm_copy(model)
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
        tokens = get_intermediate_tokens(model, images, block)
        torch.testing.assert_close(tokens, torch.cat([cls, patches], dim=1), atol=1e-5, rtol=0)
        final = get_intermediate_tokens(model, images)
        torch.testing.assert_close(final, model.encode(images))
        if block == 2:
            torch.testing.assert_close(model.norm(tokens), final, atol=1e-6, rtol=0)


def test_an_untrained_copy_has_the_initial_weights_of_its_seed(model):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    untrained = create_untrained_copy(model, 5)
    assert all(
        torch.equal(a, b)
        for a, b in zip(
            untrained.state_dict().values(), create_mae(model.config, 5).state_dict().values(), strict=True
        )
    )
    assert not untrained.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_digest_depends_on_the_bytes_of_the_weights(run, tmp_path):
    file = run / "checkpoints" / "step-00000001" / "model.safetensors"
    digest = read_weights(file).digest
    assert len(digest) == 16
    copy = tmp_path / "copy"
    copy.write_bytes(file.read_bytes())
    assert read_weights(copy).digest == digest
    content = file.read_bytes()
    copy.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert read_weights(copy).digest != digest


def test_probes_refuse_images_without_labels_and_missing_averages(run, tmp_path):
    np.save(tmp_path / "x.npy", np.zeros((20, 16, 16, 3), np.uint8))
    for changes, message in (
        ({"train": str(tmp_path / "x.npy")}, "no labels"),
        ({"ema": True}, "no moving average"),
    ):
        flags = {"run": str(run), "train": "shapes:20", "test": "shapes:20", "k": 3, **changes}
        with pytest.raises(UserError, match=message):
            evaluate_knn(KnnConfig.from_flags(**flags), Console(quiet=True))
