import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from quarterview.errors import UserError
from quarterview.models.create import create_model
from quarterview.models.mae import MaskedAutoencoder
from quarterview.training.config import OptimConfig
from quarterview.training.optim import (
    Schedule,
    compute_warmup_steps,
    create_adamw,
    get_optimizer_tensors,
    load_optimizer_tensors,
    param_groups_weight_decay,
)


def small() -> MaskedAutoencoder:
    torch.manual_seed(0)
    return create_model(
        "mae_vit_32x2x4_patch4", image_size=16, decoder_width=16, decoder_depth=1, decoder_heads=2
    )


def give_gradients(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.randn(parameter.shape, generator=generator)


def trained_names(model: nn.Module) -> list[str]:
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def is_decayed(name: str) -> bool:
    """Whether the official code decays a parameter: weights of linear layers, the patch embedding and the
    tokens."""
    return name in ("cls_token", "mask_token") or (name.endswith(".weight") and "norm" not in name)


# ---------------------------------------------------------------------- groups


def test_group_membership_by_name():
    model = small()
    decayed, plain = param_groups_weight_decay(model, 0.05)
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.05, 0.0)
    assert set(decayed["names"]) == {name for name in trained_names(model) if is_decayed(name)}
    assert set(plain["names"]) == {name for name in trained_names(model) if not is_decayed(name)}
    for name in ("cls_token", "mask_token", "patch_embed.proj.weight", "blocks.0.attn.qkv.weight"):
        assert name in decayed["names"]
    for name in ("patch_embed.proj.bias", "blocks.1.norm1.weight", "norm.weight", "decoder_norm.bias"):
        assert name in plain["names"]


def test_every_trained_parameter_is_in_one_group_once_and_the_positions_in_none():
    model = small()
    groups = create_adamw(model, 0.05).param_groups
    grouped = [id(parameter) for group in groups for parameter in group["params"]]
    assert len(grouped) == len(set(grouped))
    assert set(grouped) == {id(p) for p in model.parameters() if p.requires_grad}
    names = [name for group in groups for name in group["names"]]
    assert sorted(names) == sorted(trained_names(model))
    assert not {"pos_embed", "decoder_pos_embed"} & set(names)
    for group in groups:
        for name, parameter in zip(group["names"], group["params"], strict=True):
            assert parameter is model.get_parameter(name)


# ---------------------------------------------------------------------- steps


@pytest.mark.parametrize("steps", [1, 3])
def test_steps_equal_those_of_torchs_adamw(steps):
    ours, theirs = small(), small()
    parameters = dict(theirs.named_parameters())
    groups = [
        {"params": [parameters[n] for n in trained_names(theirs) if is_decayed(n)], "weight_decay": 0.05},
        {"params": [parameters[n] for n in trained_names(theirs) if not is_decayed(n)], "weight_decay": 0.0},
    ]
    plain = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95), eps=1e-8, foreach=False, fused=False)
    optimizer = create_adamw(ours, 0.05)
    for step in range(steps):
        for model, either in ((ours, optimizer), (theirs, plain)):
            give_gradients(model, seed=step)
            for group in either.param_groups:
                group["lr"] = 1e-3 * (step + 1)
            either.step()
    moved = dict(small().named_parameters())
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter, parameters[name], rtol=0, atol=1e-7)
        assert torch.equal(parameter, moved[name]) == (name in ("pos_embed", "decoder_pos_embed"))


def test_a_new_optimizer_has_learning_rate_zero():
    model = small()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    give_gradients(model, seed=0)
    create_adamw(model, 0.05).step()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])


@pytest.mark.parametrize("steps_before", [0, 2])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_found_inf_leaves_weights_moments_and_counters_as_they_were(steps_before, bad):
    model = small()
    optimizer = create_adamw(model, 0.05)
    for group in optimizer.param_groups:
        group["lr"] = 1e-3
    optimizer.found_inf = torch.tensor(0.0)
    for step in range(steps_before):
        give_gradients(model, seed=step)
        optimizer.step()

    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    state = {name: value.clone() for name, value in get_optimizer_tensors(optimizer).items()}
    give_gradients(model, seed=9)
    model.cls_token.grad[0, 0, 0] = bad
    optimizer.found_inf = torch.tensor(1.0)
    optimizer.step()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, weights[name]), name
    after = get_optimizer_tensors(optimizer)
    assert len(after) == 3 * len(trained_names(model))
    for name, value in after.items():
        assert torch.equal(value, state.get(name, torch.zeros_like(value))), name

    optimizer.found_inf = torch.tensor(0.0)  # and the next good step is as if nothing had been
    give_gradients(model, seed=10)
    optimizer.step()
    assert not torch.equal(model.cls_token, weights["cls_token"])
    assert {float(v) for k, v in get_optimizer_tensors(optimizer).items() if k.startswith("step/")} == {
        steps_before + 1.0
    }


def test_the_optimizer_state_round_trip_is_exact():
    def stepped(optimizer: torch.optim.Optimizer, model: nn.Module, seeds: range) -> dict[str, Tensor]:
        for seed in seeds:
            give_gradients(model, seed)
            for group in optimizer.param_groups:
                group["lr"] = 1e-3
            optimizer.step()
        return {name: value.clone() for name, value in get_optimizer_tensors(optimizer).items()}

    straight, resumed = small(), small()
    optimizer = create_adamw(straight, 0.05)
    middle = stepped(optimizer, straight, range(3))
    assert {name.partition("/")[0] for name in middle} == {"step", "exp_avg", "exp_avg_sq"}
    assert {name.partition("/")[2] for name in middle} == set(trained_names(straight))
    assert float(middle["step/blocks.0.norm1.bias"]) == 3

    resumed.load_state_dict(straight.state_dict())
    another = create_adamw(resumed, 0.05)
    load_optimizer_tensors(another, middle)
    for name, value in get_optimizer_tensors(another).items():
        assert torch.equal(value, middle[name]), name
    expected = stepped(optimizer, straight, range(3, 6))
    for name, value in stepped(another, resumed, range(3, 6)).items():
        assert torch.equal(value, expected[name]), name
    for name, parameter in resumed.named_parameters():
        assert torch.equal(parameter, straight.get_parameter(name)), name


def test_loaded_state_is_a_copy():
    model = small()
    optimizer = create_adamw(model, 0.05)
    give_gradients(model, 0)
    optimizer.step()
    tensors = get_optimizer_tensors(optimizer)
    kept = {name: value.clone() for name, value in tensors.items()}
    other = small()
    another = create_adamw(other, 0.05)
    load_optimizer_tensors(another, tensors)
    give_gradients(other, 1)
    another.step()
    assert all(torch.equal(tensors[name], kept[name]) for name in kept)


# ---------------------------------------------------------------------- the learning rate


def test_the_schedule_at_start_peak_and_end():
    schedule = Schedule(peak_lr=2.4e-3, warmup_steps=100, total_steps=1100)
    assert schedule.lr(0) == 0
    assert schedule.lr(1) == pytest.approx(2.4e-5)
    assert schedule.lr(50) == pytest.approx(1.2e-3)
    assert schedule.lr(100) == pytest.approx(2.4e-3)
    assert schedule.lr(350) == pytest.approx(2.4e-3 * (1 + math.cos(math.pi / 4)) / 2)
    assert schedule.lr(600) == pytest.approx(1.2e-3)
    assert 0 < schedule.lr(1099) < 1e-8
    assert schedule.lr(1100) == pytest.approx(0, abs=1e-18)
    assert schedule.lr(2000) == pytest.approx(0, abs=1e-18)
    floored = Schedule(peak_lr=2.4e-3, warmup_steps=100, total_steps=1100, min_lr=1e-6)
    assert floored.lr(50) == schedule.lr(50)
    assert floored.lr(600) == pytest.approx((2.4e-3 + 1e-6) / 2)
    assert floored.lr(1100) == pytest.approx(1e-6)


@given(st.integers(0, 500), st.integers(1, 500), st.floats(1e-6, 1))
def test_the_schedule_is_the_official_closed_form(warmup, after, peak):
    total = warmup + after
    schedule = Schedule(peak, warmup, total)
    rates = [schedule.lr(step) for step in range(total)]
    for step, rate in enumerate(rates):
        if step < warmup:
            expected = peak * step / warmup
        else:
            expected = peak * 0.5 * (1.0 + math.cos(math.pi * (step - warmup) / (total - warmup)))
        assert rate == pytest.approx(expected, rel=1e-12, abs=1e-15 * peak)
    assert max(rates) == rates[warmup] == peak
    assert rates[:warmup] == sorted(rates[:warmup])
    assert rates[warmup:] == sorted(rates[warmup:], reverse=True)


@pytest.mark.parametrize(("total", "expected"), [(800, 40), (10_000, 500), (100, 5), (7, 0), (1, 0)])
def test_warmup_is_5_percent_of_the_run_by_default(total, expected):
    assert compute_warmup_steps(None, steps_per_epoch=3.7, total_steps=total) == (expected, None)


@pytest.mark.parametrize(("epochs", "expected"), [(0, 0), (1, 12), (2.5, 31), (40, 500)])
def test_warmup_has_the_requested_length_if_it_fits(epochs, expected):
    assert compute_warmup_steps(epochs, steps_per_epoch=12.5, total_steps=501) == (expected, None)


@pytest.mark.parametrize(("epochs", "total"), [(40, 500), (40, 250), (1000, 20)])
def test_a_warmup_that_does_not_fit_is_shortened_with_a_warning(epochs, total):
    steps, sentence = compute_warmup_steps(epochs, steps_per_epoch=12.5, total_steps=total)
    assert steps == round(total / 20)
    assert sentence == (
        f"The warm-up of {epochs} epochs ({round(12.5 * epochs)} updates) does not fit a run of {total} "
        f"updates. It is shortened to {steps} updates, 5% of the run as in the paper."
    )
    assert Schedule(1.0, steps, total).lr(steps) == 1.0


@given(st.none() | st.floats(0, 1e4), st.floats(0.01, 1e4), st.integers(1, 10**5))
def test_every_schedule_reaches_the_peak(epochs, steps_per_epoch, total):
    steps, _ = compute_warmup_steps(epochs, steps_per_epoch, total)
    assert 0 <= steps < total
    assert Schedule(1.0, steps, total).lr(steps) == 1.0


@pytest.mark.parametrize(
    ("batch", "expected"), [(4096, 2.4e-3), (256, 1.5e-4), (64, 3.75e-5), (1, 1.5e-4 / 256)]
)
def test_the_peak_lr_scales_with_the_batch_size(batch, expected):
    assert OptimConfig().peak_lr(batch) == pytest.approx(expected)


def test_a_given_lr_does_not_scale():
    assert OptimConfig(lr=1e-3).peak_lr(4096) == OptimConfig(lr=1e-3).peak_lr(64) == 1e-3


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("blr", 0),
        ("blr", -1e-4),
        ("lr", math.inf),
        ("lr", math.nan),
        ("clip_grad", 0),
        ("warmup_epochs", -1),
        ("warmup_epochs", math.nan),
        ("weight_decay", -0.1),
        ("weight_decay", math.nan),
        ("ema", 1),
        ("ema", 0),
    ],
)
def test_invalid_values_are_refused(field, value):
    with pytest.raises(
        UserError, match=f"^--{field.replace('_', '-')} {value} is out of range. Give a number "
    ):
        OptimConfig(**{field: value})
