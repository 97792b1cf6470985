"""Export to timm: bit-equal weights, and equal tokens with every global_pool."""

import json

import pytest
import timm
import torch
from safetensors.torch import load_file
from weights_models import CLASSES, EVERY_SIZE, SIZES, autoencoder, classifier, random_images

from quarterview.weights import export_timm
from quarterview.weights.export.timm import make_model_args

TOLERANCE = {"rtol": 0, "atol": 1e-5}


def load_with_timm(folder, **options):
    return timm.create_model(f"local-dir:{folder}", pretrained=True, **options).eval()


@pytest.mark.parametrize("size", EVERY_SIZE)
@torch.no_grad()
def test_weights_are_bit_equal_and_tokens_equal_with_every_pooling(tmp_path, size):
    model = autoencoder(**SIZES[size])
    assert export_timm(model, tmp_path).max_difference < 1e-5

    mine = {k: v for k, v in model.state_dict().items() if not k.startswith(("decoder", "mask_token"))}
    for theirs in (load_file(tmp_path / "model.safetensors"), load_with_timm(tmp_path).state_dict()):
        assert theirs.keys() == mine.keys()
        for name, value in mine.items():
            assert torch.equal(theirs[name], value), name

    images = random_images(model)
    tokens = model.encode(images)
    for pool, expected in {"token": tokens[:, 0], "avg": tokens[:, 1:].mean(dim=1), "": tokens}.items():
        theirs = load_with_timm(tmp_path, global_pool=pool)
        torch.testing.assert_close(theirs(images), expected, **TOLERANCE)
        torch.testing.assert_close(theirs.forward_features(images), tokens, **TOLERANCE)


@pytest.mark.parametrize("pool", ["mean", "cls"])
@torch.no_grad()
def test_a_classifier_keeps_its_head(tmp_path, pool):
    model = classifier(pool=pool, image_size=(16, 32))
    assert export_timm(model, tmp_path).max_difference < 1e-5
    theirs, images = load_with_timm(tmp_path), random_images(model)
    torch.testing.assert_close(theirs(images), model(images), **TOLERANCE)
    assert theirs.num_classes == 3
    assert theirs.pretrained_cfg["label_names"] == list(CLASSES)
    arguments = json.loads((tmp_path / "config.json").read_text("utf-8"))["model_args"]
    assert arguments["fc_norm"] is (pool == "mean")
    assert arguments["global_pool"] == ("avg" if pool == "mean" else "token")
    assert theirs.state_dict().keys() == model.state_dict().keys()
    for name, value in model.state_dict().items():
        assert torch.equal(theirs.state_dict()[name], value), name


@torch.no_grad()
def test_the_file_loads_as_checkpoint_path(tmp_path):
    model = autoencoder()
    export_timm(model, tmp_path)
    file = tmp_path / "model.safetensors"
    theirs = timm.create_model("vit_base_patch16_224", checkpoint_path=file, **make_model_args(model)).eval()
    torch.testing.assert_close(
        theirs(random_images(model)), model.encode(random_images(model))[:, 0], **TOLERANCE
    )


@torch.no_grad()
def test_a_new_head_can_be_added(tmp_path):
    model = autoencoder()
    export_timm(model, tmp_path)
    theirs = load_with_timm(tmp_path, num_classes=7, global_pool="avg")
    assert theirs(random_images(model)).shape == (2, 7)
    torch.testing.assert_close(
        theirs.forward_features(random_images(model)), model.encode(random_images(model)), **TOLERANCE
    )


def test_the_architecture_name_is_that_of_the_size(tmp_path):
    export_timm(autoencoder(**SIZES["tiny/4 at 32"]), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text("utf-8"))
    assert config["architecture"] == "vit_tiny_patch16_224"


def test_the_exported_model_is_not_changed(tmp_path):
    model = autoencoder().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    export_timm(model, tmp_path)
    assert model.training
    assert model.blocks[0].attn.qkv.weight.requires_grad
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
