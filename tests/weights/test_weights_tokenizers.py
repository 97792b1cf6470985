"""Open tokenizers of this package, and DALL-E's architecture with small random weights."""

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from transformers import FlavaImageCodebook, FlavaImageCodebookConfig

import quarterview as qv
from quarterview.data.transforms.crop import normalize
from quarterview.errors import UserError
from quarterview.models.config import MAEConfig
from quarterview.weights.loading import find_weights_file
from quarterview.weights.tokenizers import open_tokenizer

CPU = torch.device("cpu")
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
MODEL = MAEConfig("mae_vit_32x2x2_patch4", (16, 16), mean=MEAN, std=STD)


@pytest.fixture(scope="module")
def codebook(tmp_path_factory):
    """A folder with a small DALL-E encoder, and the model."""
    torch.manual_seed(0)
    config = FlavaImageCodebookConfig(num_blocks_per_group=1, hidden_size=8, vocab_size=20)
    model = FlavaImageCodebook(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    folder = tmp_path_factory.mktemp("dalle")
    model.save_pretrained(folder, safe_serialization=True)
    return folder, model


def test_visual_tokens_are_those_of_the_dalle_codebook(codebook):
    folder, model = codebook
    opened = open_tokenizer(str(folder), {}, CPU)
    assert opened.codebook_size == 20
    images = torch.rand(3, 3, 16, 16)
    tokens = opened.match_model(MODEL, CPU).tokenize(normalize(images, MEAN, STD))
    assert tokens.shape == (3, 16)
    assert len(tokens.unique()) > 1
    resized = F.interpolate(images, (32, 32), mode="bicubic", antialias=True).clamp(0, 1)
    with torch.no_grad():
        expected = model.get_codebook_indices(0.8 * resized + 0.1).flatten(1)
    assert float((tokens == expected).float().mean()) > 0.95  # normalising and back changes the last bits


def test_beit_trains_with_the_dalle_tokenizer(codebook, tmp_path):
    config = qv.PretrainConfig.from_flags(
        data=("shapes:40:size=16",),
        out=str(tmp_path / "run"),
        model="mae_vit_32x2x2_patch4",
        image_size=16,
        method="beit",
        tokenizer=str(codebook[0]),
        steps=2,
        batch_size=8,
        lr=1e-3,
        device="cpu",
        workers=0,
    )
    run = qv.pretrain(config)
    assert run.status == "complete"
    assert qv.load(tmp_path / "run").config.codebook_size == 20


def test_wrong_tokenizers_are_rejected(codebook, tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        open_tokenizer(str(tmp_path / "nothing"), {}, CPU)
    with pytest.raises(UserError, match="another tokenizer"):
        open_tokenizer(str(codebook[0]), {"tokenizer_digest": "0" * 16}, CPU)
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"no model\.safetensors"):
        open_tokenizer(str(empty), {}, CPU)


def test_weights_that_do_not_match_the_header_are_rejected(tmp_path):
    out = tmp_path / "tokenizer"
    qv.pretrain(
        qv.PretrainConfig.from_flags(
            data=("shapes:20:size=16",),
            out=str(out),
            model="mae_vit_32x2x2_patch4",
            image_size=16,
            method="tokenizer",
            codebook_size=8,
            tokenizer_width=8,
            steps=1,
            batch_size=4,
            lr=1e-3,
            device="cpu",
            workers=0,
        )
    )
    opened = open_tokenizer(str(out), {}, CPU)
    assert (opened.codebook_size, opened.patch_size) == (8, 4)
    with pytest.raises(UserError, match="patches have 4 pixels, but those of mae_vit_32x2x2_patch8 have 8"):
        opened.match_model(MAEConfig("mae_vit_32x2x2_patch8", (16, 16), mean=MEAN, std=STD), CPU)
    from safetensors import safe_open

    file = find_weights_file(out)
    with safe_open(file, "pt") as handle:
        header = handle.metadata()
    tensors = load_file(file)
    tensors["words.weight"] = tensors["words.weight"][:4].clone()
    save_file(tensors, tmp_path / "wrong.safetensors", header)
    with pytest.raises(UserError, match="its tensors do not match its header"):
        open_tokenizer(str(tmp_path / "wrong.safetensors"), {}, CPU)
