"""The mistakes that re-implementations of masked autoencoding make, and the test that catches each.

One test a line of the list, in its order and named after it. Where a model's inner steps are asked about,
the question is put through its weights: with a final norm of zero the encoder's tokens are zero, and so on.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from quarterview import recipes
from quarterview.commands.config import PretrainConfig
from quarterview.data.cache import CachedDataset
from quarterview.data.loader import Batch, Loader
from quarterview.data.sampler import SampleStream
from quarterview.data.sources.open import open_sources
from quarterview.errors import RunError, UserError
from quarterview.evaluation.features import Features, extract_features, make_encoder, make_encoders
from quarterview.evaluation.linear import LogisticRegression
from quarterview.evaluation.panel import draw_panel
from quarterview.methods.config import RegularizationConfig
from quarterview.methods.mae import MaskedAutoencoding
from quarterview.methods.supervised import Supervised
from quarterview.models import masking
from quarterview.models.classifier import Classifier, ClassifierConfig, freeze_all_but_last_blocks
from quarterview.models.create import create_model
from quarterview.models.mae import MaskedAutoencoder
from quarterview.models.positions import get_2d_sincos_pos_embed
from quarterview.models.targets import PixelTarget
from quarterview.training import checkpoint
from quarterview.training.config import OptimConfig
from quarterview.training.distributed import World
from quarterview.training.logging import RunLogger, ThroughputMeter
from quarterview.training.optim import (
    Schedule,
    compute_warmup_steps,
    create_adamw,
    create_adamw_from_groups,
    param_groups_layer_decay,
    param_groups_weight_decay,
)
from quarterview.training.trainer import Trainer
from quarterview.weights.loading import load_encoder_into, load_into, make_metadata

CPU = torch.device("cpu")
CLASSIFIER = ClassifierConfig("mae_vit_32x2x4_patch4", (16, 16), classes=5)
SMALL = {
    "model": "mae_vit_32x2x4_patch4",
    "image_size": 16,
    "decoder_width": 24,
    "decoder_depth": 2,
    "decoder_heads": 2,
}


def truth_of(target: PixelTarget, patches: Tensor) -> Tensor:
    """The target of patches [..., P], for which whole images do not matter."""
    return target(torch.empty(0), patches, None)


def make(**changes) -> MaskedAutoencoder:
    torch.manual_seed(0)
    return create_model(**{**SMALL, **changes})


def some_images(model: MaskedAutoencoder, batch: int = 4, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, model.config.in_chans, *model.config.image_size, generator=generator)


def some_mask(model: MaskedAutoencoder, batch: int = 4, visible: int = 4, seed: int = 2) -> Tensor:
    noise = torch.rand(batch, model.config.num_patches, generator=torch.Generator().manual_seed(seed))
    return masking.mask_from_noise(noise, visible)


@torch.no_grad()
def silence(*parameters: nn.Parameter) -> None:
    for parameter in parameters:
        parameter.zero_()


def repainted(model: MaskedAutoencoder, images: Tensor, patches: Tensor) -> Tensor:
    """The images with other random pixels in `patches`, bool [B, L]."""
    cut = model.patchify(images)
    noise = 3 * torch.randn(cut.shape, generator=torch.Generator().manual_seed(9))
    return model.unpatchify(torch.where(patches[:, :, None], noise, cut))


class GivenBatches(Loader):
    """A loader of batches made beforehand."""

    def __init__(self, images: Sequence[Tensor]) -> None:
        self.images, self.stream = images, SampleStream(1000, 0, 0)

    def iter_batches(self, position_ranges: Sequence[range]) -> Iterator[Batch]:
        for images, part in zip(self.images, position_ranges, strict=True):
            ids = torch.arange(part.start, part.stop)
            yield Batch(images, ids, torch.zeros_like(ids))


def trainer(
    folder: Path,
    model: MaskedAutoencoder,
    batches: Sequence[Tensor],
    schedule: Schedule | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    **config,
) -> Trainer:
    method = MaskedAutoencoding(model, seed=0)
    return Trainer(
        PretrainConfig.from_flags(**{"batch_size": len(batches[0]), "eval_every": 1, **config}),
        place(folder),
        method,
        optimizer or create_adamw(method, 0.05),
        schedule or Schedule(peak_lr=1e-3, warmup_steps=0, total_steps=len(batches)),
        GivenBatches(batches),
        "fp32",
    )


def place(folder: Path) -> SimpleNamespace:
    """Where a trainer writes, alone and in silence."""
    return SimpleNamespace(folder=folder, world=World(CPU), log=RunLogger(quiet=True))


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def equal(some: dict[str, Tensor], others: dict[str, Tensor]) -> bool:
    return some.keys() == others.keys() and all(torch.equal(some[name], others[name]) for name in some)


# ---------------------------------------------------------------------- the method


@pytest.mark.parametrize("seed", range(20))
def test_pitfall_01_unshuffle_inverse(seed):
    """With silent tokens a silent decoder reads the position alone, which must be the patch's own."""
    model = make(encoder_mask_tokens=True, decoder_depth=1, predict_all=True)
    block = model.decoder_blocks[0]
    silence(model.norm.weight, model.norm.bias, model.decoder_embed.bias)
    silence(block.attn.proj.weight, block.attn.proj.bias, block.mlp.fc2.weight, block.mlp.fc2.bias)
    with torch.no_grad():
        pred = model(some_images(model), mask=some_mask(model, visible=5, seed=seed)).pred
        expected = model.decoder_pred(model.decoder_norm(model.decoder_pos_embed[:, 1:]))
    torch.testing.assert_close(pred, expected.expand_as(pred))


def test_pitfall_02_loss_on_hidden_patches_only():
    model = make(norm_pix_loss=False)
    images, mask = some_images(model).requires_grad_(), some_mask(model)
    silence(model.decoder_pred.weight)  # so that images reach the loss as targets only
    out = model(images, mask=mask)
    out.loss.backward()
    reached = model.patchify(images.grad).abs().sum(dim=2)
    assert torch.equal(reached[~mask], torch.zeros_like(reached[~mask]))
    assert bool((reached[mask] > 0).all())
    expected = ((model.patchify(images) - model.decoder_pred.bias) ** 2)[mask].mean()
    torch.testing.assert_close(out.loss, expected)


def test_pitfall_03_hidden_pixels_do_not_leak(disturbed):
    model = disturbed(make())
    images, mask = some_images(model), some_mask(model)
    other = repainted(model, images, mask)
    with torch.no_grad():
        assert torch.equal(model.encode(images, mask), model.encode(other, mask))
        assert torch.equal(model(images, mask=mask).pred, model(other, mask=mask).pred)
        one_visible = torch.zeros_like(mask)
        one_visible[torch.arange(4), masking.split_indices(mask, 4)[0][:, 0]] = True
        moved = repainted(model, images, one_visible)
        changes = (model(images, mask=mask).pred - model(moved, mask=mask).pred).abs().amax(dim=(1, 2))
    assert float(changes.min()) > 1e-4


def test_pitfall_04_positions_belong_to_places_not_slots(disturbed):
    model = disturbed(make())
    images, mask = some_images(model, 1), some_mask(model, 1)
    visible = (~mask[0]).nonzero()[:, 0]
    with torch.no_grad():
        every = model.patch_embed.proj(images).flatten(2).transpose(1, 2) + model.pos_embed[:, 1:]
        for order in (visible, visible.flip(0)):  # attention does not care about order
            x = torch.cat([model.cls_token, every[:, order]], dim=1)
            for block in model.blocks:
                x = block(x)
            torch.testing.assert_close(model.encode(images, mask)[:, 0], model.norm(x)[:, 0])
        swapped = model.unpatchify(model.patchify(images).flip(1))  # the same patches in other places
        assert float((model.encode(images)[:, 0] - model.encode(swapped)[:, 0]).abs().max()) > 1e-3


@pytest.mark.parametrize("size", [8, 16])  # 4 and 16 patches
def test_pitfall_05_no_off_by_one_from_cls(size):
    model = make(image_size=size, mask_ratio=0.5)
    for block in (*model.blocks, *model.decoder_blocks):  # every token sees itself alone
        silence(block.attn.proj.weight, block.mlp.fc2.weight)
    blank = torch.zeros(1, 3, size, size)
    for i in range(model.config.num_patches):
        here = torch.arange(model.config.num_patches)[None] == i
        picture = repainted(model, blank, here)
        with torch.no_grad():
            moved = (model.encode(picture) - model.encode(blank)).abs().amax(dim=2)[0] > 1e-4
        assert moved.nonzero()[:, 0].tolist() == [1 + i]
        shown = model.patchify(model.reconstruct(blank, mask=here)) != 0
        assert shown.any(dim=2)[0].nonzero()[:, 0].tolist() == [i]


def test_pitfall_06_decoder_positions_on_every_token():
    """With zero latents and mask token, what enters the decoder is its table, in the order of tokens."""
    model = make()
    silence(model.norm.weight, model.norm.bias, model.mask_token)
    entered = []
    model.decoder_blocks[0].register_forward_pre_hook(lambda _, args: entered.append(args[0]))
    images, mask = some_images(model), some_mask(model)
    with torch.no_grad():
        model(images, mask=mask)
    table = get_2d_sincos_pos_embed(24, (4, 4))[0]
    for tokens, hidden in zip(entered[0], mask, strict=True):
        order = torch.cat([(~hidden).nonzero()[:, 0], hidden.nonzero()[:, 0]])
        torch.testing.assert_close(tokens, table[torch.cat([torch.zeros(1, dtype=torch.int64), 1 + order])])


@pytest.mark.parametrize("kind", ["random", "block"])
def test_pitfall_07_a_mask_of_its_own_for_every_row_step_and_rank(kind):
    model = make(image_size=32, mask=kind)
    objective, masks = MaskedAutoencoding(model, seed=0), []
    model.register_forward_hook(lambda _module, _args, out: masks.append(out.mask))
    images = torch.zeros(400, 3, 32, 32)
    with torch.no_grad():
        for epoch in range(2):
            ids = torch.arange(400)
            objective(Batch(images, ids, torch.full_like(ids, epoch)))
        for rank in range(2):  # each rank asks for its own part, and gets what the whole batch got
            share = World(CPU, rank, 2).shard_positions(range(400))
            ids = torch.arange(share.start, share.stop)
            objective(Batch(images[:200], ids, torch.zeros_like(ids)))
    first, second, *ranks = masks
    assert len(first.unique(dim=0)) > 390
    assert float((first == second).all(dim=1).float().mean()) < 0.02
    assert torch.equal(torch.cat(ranks), first)
    assert first.sum(dim=1).unique().tolist() == [48]
    if kind == "random":
        frequency = torch.cat([first, second]).float().mean(dim=0)
        assert float((frequency - 0.75).abs().max()) < 5 * (0.75 * 0.25 / 800) ** 0.5


def test_pitfall_08_float_truncation_of_the_count():
    assert masking.compute_num_visible(64, 0.8) == 12
    assert masking.compute_num_visible(100, 0.9) == 9
    for patches, ratio in [(10, 0.9), (64, 1.0), (64, 0.0)]:
        with pytest.raises(ValueError, match="Give a ratio with int"):
            masking.compute_num_visible(patches, ratio)
    model = make(image_size=32, mask_ratio=0.8, norm_pix_loss=False)  # 52 hidden are 0.8125 of 64
    silence(model.decoder_pred.weight)
    assert float(model(torch.ones(2, 3, 32, 32)).loss.detach()) == pytest.approx(1)


def test_pitfall_09_patchify_order():
    model = create_model("mae_vit_4x1x1_patch2", image_size=4, in_chans=2, mask_ratio=0.5, decoder_depth=0)
    image = torch.arange(32.0).view(1, 2, 4, 4)  # channel 0 counts from 0 by row, channel 1 from 16
    assert model.patchify(image)[0].tolist() == [
        [0, 16, 1, 17, 4, 20, 5, 21],
        [2, 18, 3, 19, 6, 22, 7, 23],
        [8, 24, 9, 25, 12, 28, 13, 29],
        [10, 26, 11, 27, 14, 30, 15, 31],
    ]
    assert torch.equal(model.unpatchify(model.patchify(image)), image)

    larger = make(image_size=(16, 24), norm_pix_loss=False)  # a coordinate ramp, pasted patch by patch
    ramp = torch.arange(16.0 * 24).view(1, 1, 16, 24).expand(1, 3, 16, 24).contiguous()
    mask = some_mask(larger, 1)
    shown = larger.reconstruct(ramp, mask=mask)
    hidden = mask.view(1, 1, 4, 6).repeat_interleave(4, dim=2).repeat_interleave(4, dim=3).expand_as(ramp)
    assert torch.equal(shown[~hidden], ramp[~hidden])
    assert not bool((shown[hidden] == ramp[hidden]).any())


@pytest.mark.parametrize("patch", [2, 4, 16])
def test_pitfall_10_target_normalisation(patch):
    numbers = patch * patch * 3
    target = PixelTarget(numbers, normalize=True)
    patches = torch.randn(50, numbers, generator=torch.Generator().manual_seed(0))
    expected = (patches - patches.mean(1, keepdim=True)) / (patches.var(1, keepdim=True) + 1e-6).sqrt()
    torch.testing.assert_close(truth_of(target, patches), expected)
    zero = target.loss(torch.zeros(50, numbers), truth_of(target, patches)).mean()
    assert float(zero) == pytest.approx((numbers - 1) / numbers, rel=1e-4)
    assert bool(truth_of(target, torch.full((1, numbers), 0.3)).isfinite().all())
    by_channel = torch.tensor([0.0, 5.0, 10.0]).repeat(1, patch * patch)
    assert float(truth_of(target, by_channel).abs().max()) > 1  # zero, if each channel had a mean of its own


@pytest.mark.parametrize("predict_all", [False, True])
@pytest.mark.parametrize("ratio", [0.1, 0.25, 0.5, 0.75, 0.9])
def test_pitfall_11_loss_is_a_mean_over_hidden_patches(ratio, predict_all):
    model = make(mask_ratio=ratio, norm_pix_loss=False, predict_all=predict_all)
    silence(model.decoder_pred.weight)
    nn.init.ones_(model.decoder_pred.bias)  # an error of 1 everywhere
    assert float(model(torch.zeros(4, 3, 16, 16)).loss.detach()) == pytest.approx(1)


def test_pitfall_12_initialisation():
    torch.manual_seed(0)
    model = create_model("mae_vit_192x2x3_patch8", image_size=32, decoder_width=128, decoder_depth=2)
    linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert {"decoder_embed", "decoder_pred", "blocks.1.attn.qkv", "decoder_blocks.0.mlp.fc2"} <= linear.keys()
    matrices = {name: module.weight for name, module in linear.items()}
    matrices["patch_embed.proj"] = model.patch_embed.proj.weight.flatten(1)
    with torch.no_grad():
        for name, weight in matrices.items():
            bound = (6 / sum(weight.shape)) ** 0.5  # xavier-uniform, qkv as one matrix
            assert 0.95 * bound < float(weight.abs().max()) <= bound, name
            assert float(weight.std()) == pytest.approx(bound / 3**0.5, rel=0.03), name
        for name, module in linear.items():
            assert float(module.bias.abs().max()) == 0, name
        assert 0 < float(model.patch_embed.proj.bias.abs().max()) <= (8 * 8 * 3) ** -0.5  # a convolution's
        for token in (model.cls_token, model.mask_token):
            assert float(token.std()) == pytest.approx(0.02, rel=0.2)
        for module in model.modules():
            if isinstance(module, nn.LayerNorm):
                assert torch.equal(module.weight, torch.ones_like(module.weight))
                assert torch.equal(module.bias, torch.zeros_like(module.bias))


def test_pitfall_13_layer_norms():
    model = make()
    norms = {name: module for name, module in model.named_modules() if isinstance(module, nn.LayerNorm)}
    expected = {f"{s}.{i}.norm{n}" for s in ("blocks", "decoder_blocks") for i in (0, 1) for n in (1, 2)}
    assert norms.keys() == expected | {"norm", "decoder_norm"}
    assert {norm.eps for norm in norms.values()} == {1e-6}
    entered = []
    model.decoder_pred.register_forward_pre_hook(lambda _, args: entered.append(args[0]))
    with torch.no_grad():
        tokens = model.encode(some_images(model))
        model(some_images(model))
    for x in (tokens, *entered):  # and both final ones are used
        torch.testing.assert_close(x.mean(dim=2), torch.zeros(x.shape[:2]), rtol=0, atol=1e-5)
        torch.testing.assert_close(x.var(dim=2, correction=0), torch.ones(x.shape[:2]), rtol=0, atol=1e-4)


def test_pitfall_14_positions_are_two_dimensional_and_fixed(tmp_path):
    model = make(image_size=(8, 12), mask_ratio=0.5)
    for table, width in ((model.pos_embed, 32), (model.decoder_pos_embed, 24)):
        assert not table.requires_grad
        quarter = width // 4
        waves = torch.tensor([10000 ** (-k / quarter) for k in range(quarter)])
        moved, still = (
            torch.cat([waves.sin(), waves.cos()]),
            torch.tensor([0.0, 1.0]).repeat_interleave(quarter),
        )
        torch.testing.assert_close(table[0, 1 + 1], torch.cat([moved, still]))  # row 0, column 1
        torch.testing.assert_close(table[0, 1 + 3], torch.cat([still, moved]))  # row 1, column 0
        assert torch.equal(table[0, 0], torch.zeros(width))
    before = weights(model)
    trainer(tmp_path, model, [some_images(model)] * 2).run()
    assert torch.equal(model.pos_embed, before["pos_embed"])
    assert torch.equal(model.decoder_pos_embed, before["decoder_pos_embed"])
    assert not torch.equal(model.cls_token, before["cls_token"])


# ---------------------------------------------------------------------- training


def test_pitfall_15_schedule(tmp_path):
    steps, sentence = compute_warmup_steps(
        warmup_epochs=40, steps_per_epoch=10, total_steps=200
    )  # 40 of 20 epochs
    assert 0 < steps < 200
    assert sentence is not None
    model = make()
    schedule = Schedule(peak_lr=1e-3, warmup_steps=4, total_steps=12)
    run = trainer(tmp_path, model, [some_images(model)] * 12, schedule)
    rates = []
    run.evaluators = [lambda _step: rates.append(run.optimizer.param_groups[0]["lr"]) or {}]
    run.run()
    warm = [1e-3 * i / 4 for i in range(4)]  # a rate for every update, the first exactly 0
    cosine = [1e-3 * (1 + math.cos(math.pi * i / 8)) / 2 for i in range(8)]
    assert rates == pytest.approx(warm + cosine)
    assert {group["lr"] for group in run.optimizer.param_groups} == {rates[-1]}


@pytest.mark.parametrize("parts", [2, 4])
def test_pitfall_16_accumulated_gradients_are_those_of_the_whole_batch(tmp_path, parts):
    """By plain descent, because Adam hides a gradient's scale."""

    def descended(accum_iter: int) -> dict[str, Tensor]:
        model = make()
        optimizer = torch.optim.SGD(
            param_groups_weight_decay(MaskedAutoencoding(model, 0), 0.0), lr=0.0, fused=True
        )
        images = some_images(model, batch=8)
        trainer(
            tmp_path / str(accum_iter),
            model,
            [images],
            Schedule(peak_lr=1.0, warmup_steps=0, total_steps=1),
            optimizer,
            accum_iter=accum_iter,
        ).run()
        return weights(model)

    start, whole, cut = weights(make()), descended(1), descended(parts)
    assert not equal(start, whole)
    for name, value in whole.items():
        torch.testing.assert_close(cut[name] - start[name], value - start[name], rtol=1e-4, atol=1e-6)
    assert OptimConfig().peak_lr(4096) == pytest.approx(16 * OptimConfig().peak_lr(256)) == 2.4e-3


def test_pitfall_17_decay_groups():
    decayed, plain = param_groups_weight_decay(make(), 0.05)
    assert decayed["weight_decay"] == 0.05
    assert plain["weight_decay"] == 0
    assert {"cls_token", "mask_token", "decoder_embed.weight"} <= set(decayed["names"])
    assert all(name.endswith(".bias") or "norm" in name for name in plain["names"])
    assert not any(name.endswith(".bias") or "norm" in name for name in decayed["names"])


def test_pitfall_18_every_groups_rate_is_base_times_scale_after_a_step(tmp_path):
    ids = torch.arange(8)
    loader = GivenBatches([torch.empty(0)] * 3)
    loader.iter_batches = lambda parts: (
        Batch(torch.randn(8, 3, 16, 16), ids, ids * 0, ids % 5) for _ in parts
    )
    objective = Supervised(Classifier(CLASSIFIER), RegularizationConfig(), 0)
    groups = param_groups_layer_decay(objective, 0.05, 0.65, 2, "model.")
    schedule = Schedule(peak_lr=0.01, warmup_steps=1, total_steps=3, min_lr=1e-6)
    config = PretrainConfig.from_flags(batch_size=8, eval_every=3)
    optimizer = create_adamw_from_groups(groups, (0.9, 0.999))
    run = Trainer(config, place(tmp_path), objective, optimizer, schedule, loader, "fp32")
    run.run()
    rates = {name: group["lr"] for group in run.optimizer.param_groups for name in group["names"]}
    base = 1e-6 + (0.01 - 1e-6) * 0.5 * (1 + math.cos(math.pi / 2))
    layers = {
        "pos_embed": 0,
        "patch_embed.proj.weight": 0,
        "blocks.0.attn.qkv.weight": 1,
        "blocks.1.norm2.bias": 2,
    }
    for name, layer in {**layers, "fc_norm.weight": 3, "head.weight": 3}.items():
        assert rates[f"model.{name}"] == pytest.approx(base * 0.65 ** (3 - layer), rel=1e-12), name


@pytest.mark.parametrize("pool", ["mean", "cls"])
def test_pitfall_19_fine_tuning_skips_no_weight_in_silence(tmp_path, pool):
    model = make()
    left = {"fc_norm.weight", "fc_norm.bias"} if pool == "mean" else set()
    folder = checkpoint.save(tmp_path, 1, {"model": model.state_dict()}, {}, make_metadata(model.config))
    classifier = Classifier(replace(CLASSIFIER, pool=pool))
    fresh = weights(classifier)
    load_encoder_into(classifier, folder)
    now, theirs = weights(classifier), weights(model)
    same = {name for name in now if torch.equal(now[name], theirs.get(name, torch.empty(0)))}
    assert now.keys() - same == {"head.weight", "head.bias"} | left
    assert all(torch.equal(now[name], fresh[name]) for name in now.keys() - same)
    state = {name: value for name, value in theirs.items() if name != "blocks.0.norm1.bias"}
    checkpoint.save(tmp_path, 2, {"model": state}, {}, make_metadata(model.config))
    with pytest.raises(UserError, match=r"blocks\.0\.norm1\.bias"):
        load_encoder_into(classifier, tmp_path / "step-00000002")


def test_pitfall_19_loading_skips_nothing_in_silence(tmp_path):
    model = make()
    for other in (
        make(model="mae_vit_32x3x4_patch4"),
        make(model="mae_vit_32x1x4_patch4"),
        make(decoder_depth=3),
    ):
        folder = checkpoint.save(tmp_path, 1, {"model": other.state_dict()}, {}, make_metadata(other.config))
        before = weights(model)
        with pytest.raises(
            UserError, match=r"The architecture of .* differs: (num_heads|depth|decoder_depth) is \d, not \d"
        ):
            load_into(model, folder)
        assert equal(before, weights(model))


def test_pitfall_20_mean_features_leave_cls_out():
    model = make()
    for block in model.blocks:  # every token sees itself alone
        silence(block.attn.proj.weight)
    images = some_images(model)
    with torch.no_grad():
        mean, cls = (make_encoder(model, kind)(images) for kind in ("mean", "cls"))
        model.cls_token += torch.randn(32, generator=torch.Generator().manual_seed(0))
        assert torch.equal(make_encoder(model, "mean")(images), mean)
        assert not torch.equal(make_encoder(model, "cls")(images), cls)


def test_pitfall_20_the_head_reads_patches_under_one_norm():
    classifier = Classifier(CLASSIFIER)
    for block in classifier.blocks:  # every token sees itself alone
        silence(block.attn.proj.weight)
    assert isinstance(classifier.norm, nn.Identity)
    assert isinstance(classifier.fc_norm, nn.LayerNorm)
    images = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        before = classifier(images)
        classifier.cls_token += 1
        assert torch.equal(classifier(images), before)
    by_cls = Classifier(replace(CLASSIFIER, pool="cls"))
    assert isinstance(by_cls.norm, nn.LayerNorm)
    assert isinstance(by_cls.fc_norm, nn.Identity)


def test_pitfall_21_features_without_masking_in_image_order():
    model = make()
    images = some_images(model)
    with torch.no_grad():
        for mode in (True, False):
            model.train(mode)
            tokens = model.encode(images)
            assert tokens.shape == (4, 1 + 16, 32)
            assert torch.equal(tokens, model.encode(images))
            assert torch.equal(make_encoder(model, "mean")(images), tokens[:, 1:].mean(dim=1))
        for block in model.blocks:
            silence(block.attn.proj.weight, block.mlp.fc2.weight)
        x = model.patch_embed.proj(images).flatten(2).transpose(1, 2) + model.pos_embed[:, 1:]
        torch.testing.assert_close(model.encode(images)[:, 1:], model.norm(x), rtol=1e-4, atol=1e-5)


def test_pitfall_22_a_probe_of_frozen_standardised_features_with_a_floor(tmp_path):
    model = make()
    before = weights(model)
    np.save(tmp_path / "a.npy", np.random.default_rng(0).integers(0, 256, (40, 16, 16, 3), dtype=np.uint8))
    encoders = make_encoders(model, "mean")
    assert list(encoders) == ["raw pixels", "random encoder", "this model"]
    source = open_sources((str(tmp_path / "a.npy"),), 3)
    found, _ = extract_features(encoders, source, range(40), model.config, CPU)
    assert equal(before, weights(model))
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not torch.allclose(found["random encoder"], found["this model"])

    labels = torch.arange(40) % 4
    scales = torch.logspace(-3, 3, 32)[:, None].T  # a standardised probe does not see these
    features = found["this model"] + labels[:, None]
    accuracies = [
        dict(LogisticRegression(0)(Features(x[:30], labels[:30], x[30:], labels[30:])))["accuracy"]
        for x in (features, features * scales)
    ]
    assert accuracies[0] == accuracies[1] > 0.8


def test_pitfall_22_what_is_frozen_stays_bit_equal(tmp_path):
    classifier = Classifier(CLASSIFIER)
    freeze_all_but_last_blocks(classifier, 0)
    before, ids = weights(classifier), torch.arange(8)
    objective = Supervised(classifier, RegularizationConfig(), 0)
    optimizer = create_adamw_from_groups(
        param_groups_layer_decay(objective, 0.3, 0.75, 2, "model."), (0.9, 0.999)
    )
    optimizer.param_groups[0]["lr"] = optimizer.param_groups[-1]["lr"] = 0.1
    objective(Batch(torch.randn(8, 3, 16, 16), ids, ids * 0, ids % 5)).loss.backward()
    optimizer.step()
    after = weights(classifier)
    moved = {name for name in after if not torch.equal(after[name], before[name])}
    assert moved == {"head.weight", "head.bias", "fc_norm.weight", "fc_norm.bias"}


def test_pitfall_23_loss_in_float32_and_bad_steps_change_nothing(tmp_path):
    model = make()
    images, mask = some_images(model), some_mask(model)
    with torch.no_grad():
        exact = model(images, mask=mask).loss
        with torch.autocast("cpu", torch.bfloat16):
            out = model(images, mask=mask)
    assert out.pred.dtype == torch.bfloat16
    assert out.loss.dtype == torch.float32
    assert float(out.loss) == pytest.approx(float(exact), rel=0.01)

    bad = torch.full_like(images, math.inf)
    seen = []
    run = trainer(tmp_path / "a", model, [images, bad, images, bad, bad], log_every=1)
    run.evaluators = [lambda _step: seen.append(weights(model)) or {}]
    run.run()
    assert [equal(a, b) for a, b in itertools.pairwise(seen)] == [True, False, True, True]
    assert run.skips == 3
    assert all(bool(value.isfinite().all()) for value in seen[-1].values())

    diverging = trainer(tmp_path / "b", model, [images, *[bad] * 3, images], log_every=1)
    with pytest.raises(RunError, match="The gradients of steps 2 to 4 are not finite"):
        diverging.run()


def test_pitfall_24_a_zero_predictor_does_not_look_good(tmp_path):
    """Patches of unrelated brightness: only who looks at the hidden ones can know theirs."""
    model = make(image_size=64)
    silence(model.decoder_pred.weight, model.decoder_pred.bias)
    brightness = torch.randn(8, 256, 1, generator=torch.Generator().manual_seed(0))
    images = model.unpatchify(brightness.expand(-1, -1, 48) + 0.05 * torch.randn(8, 256, 48))
    mask = some_mask(model, 8, visible=64)
    shown = model.patchify(model.reconstruct(images, mask=mask)).mean(dim=2)[mask]
    truth = brightness[:, :, 0][mask]
    assert abs(float(torch.corrcoef(torch.stack([shown, truth]))[0, 1])) < 0.1
    assert float(((shown - truth) ** 2).mean()) > float(truth.var())

    noise = torch.rand(2, 256, generator=torch.Generator().manual_seed(1))
    hidden = model(images[:2], noise=noise).mask
    drawn = []
    for name, some in (("a", images[:2]), ("b", repainted(model, images[:2], hidden))):
        draw_panel(model, some, noise, tmp_path / f"{name}.png")
        drawn.append(np.asarray(Image.open(tmp_path / f"{name}.png").convert("RGB")).astype(int))
    height = drawn[0].shape[0]
    changed = np.abs(drawn[0] - drawn[1]).sum(axis=(1, 2)).nonzero()[0]
    assert len(changed)
    assert changed.max() < 0.45 * height  # the original, on top; what is shown and made of it is the same


# ---------------------------------------------------------------------- around it


def test_pitfall_25_held_out_images_are_never_trained_on():
    stream = SampleStream(size=101, holdout=20, seed=3)
    held_out = set(stream.get_held_out_ids().tolist())
    trained = stream.get_samples(torch.arange(5 * 81))[1]
    assert len(held_out) == 20
    assert not held_out & set(trained.tolist())
    assert not held_out & set(stream.select_train_ids(81).tolist())
    assert not held_out & {
        stream.get_replacement(e, s, a) for e in range(5) for s in range(20) for a in range(5)
    }
    assert torch.equal(trained.bincount(minlength=101).unique(), torch.tensor([0, 5]))


@pytest.mark.parametrize(
    ("width", "depth", "speedup"), [(512, 8, 1.16), (192, 4, 2.28), (128, 2, 3.27), (96, 2, 3.52)]
)
def test_pitfall_26_speed_is_told_apart_from_the_decoder_and_the_loader(width, depth, speedup):
    """What leaving mask tokens out of ViT-tiny/4 saves depends on the decoder (paper-facts 4.3)."""
    flops = []
    for encoder_mask_tokens in (True, False):
        model = create_model(
            "mae_vit_tiny_patch4",
            image_size=32,
            decoder_width=width,
            decoder_depth=depth,
            decoder_heads=4,
            encoder_mask_tokens=encoder_mask_tokens,
        )
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(torch.zeros(1, 3, 32, 32), noise=torch.rand(1, 64))
        flops.append(counter.get_total_flops())
    assert flops[0] / flops[1] == pytest.approx(speedup, rel=0.03)

    for name in ("cifar", "laptop", "gpu"):  # so small models come with small decoders
        config = recipes.read_pretrain_recipe(name).autoencoder()
        kept = masking.compute_num_visible(config.num_patches, config.mask_ratio)
        encoder = (1 + kept) * config.shape.depth * config.shape.width**2
        decoder = (1 + config.num_patches) * config.decoder_depth * config.decoder_width**2
        assert decoder < encoder, name

    now = [0.0]
    meter = ThroughputMeter(clock=lambda: now[0])
    meter.num_images, meter.wait_seconds, meter.pause_seconds, now[0] = 600, 2.0, 90.0, 100.0
    assert meter.read_and_reset() == (
        60.0,
        0.2,
    )  # images a second, and the share of that time lost to loading


@pytest.mark.parametrize("cached", [True, False])
def test_pitfall_27_only_crops_and_flips(tmp_path, cached):
    """Colours stay what they are, up stays up, and right may become left."""
    rows, columns = np.mgrid[0:40, 0:40]
    pictures = np.stack([rows * 5, columns * 5, np.full_like(rows, 77)], axis=2).astype(np.uint8)
    np.save(tmp_path / "a.npy", np.broadcast_to(pictures, (64, 40, 40, 3)).copy())
    source = open_sources((str(tmp_path / "a.npy"),), 3)
    held = CachedDataset(torch.stack([source.image(i).pixels for i in range(64)]), set()) if cached else None
    loader = Loader(
        source, SampleStream(64, 0, 0), (16, 16), (0.0,) * 3, (1.0,) * 3, CPU, 0, held, lambda _report: None
    )
    [batch] = loader.iter_batches([range(64)])
    down, across, plain = (255 * batch.images).unbind(1)  # each [B, 16, 16]
    torch.testing.assert_close(plain, torch.full_like(plain, 77), rtol=0, atol=0.5)
    assert bool((down.diff(dim=1) > 0).all())
    assert float(down.diff(dim=2).abs().max()) <= 1
    assert float(across.diff(dim=1).abs().max()) <= 1
    rising = (across.diff(dim=2) > 0).all(dim=(1, 2))
    falling = (across.diff(dim=2) < 0).all(dim=(1, 2))
    assert bool((rising | falling).all())
    assert 16 < int(rising.sum()) < 48
    spans = (down[:, -1].mean(1) - down[:, 0].mean(1)) / (15 / 16 * 200)  # of the height
    assert 0.3 < float(spans.min()) < 0.6
    assert 0.9 < float(spans.max()) <= 1.02


@pytest.mark.parametrize("kind", ["random", "block", "grid"])
@pytest.mark.parametrize("size", [(16, 16), (24, 40), (56, 56)])
def test_pitfall_28_every_row_keeps_as_many(kind, size):
    model = make(image_size=size, mask=kind, decoder_depth=1)
    mask = model(some_images(model, 16), noise=model.mask_noise(torch.rand(16, model.num_mask_uniforms))).mask
    assert (~mask).sum(dim=1).unique().tolist() == [model.config.num_patches // 4]
    if kind == "grid":
        grid = model.config.grid
        kept = F.avg_pool2d((~mask).float().view(16, 1, *grid), 2) * 4
        assert torch.equal(kept, torch.ones_like(kept))
