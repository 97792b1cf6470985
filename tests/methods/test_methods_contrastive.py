"""Tests of SimCLR, BYOL and MoCo v3: comparison with their formulas, element by element."""

import math

import pytest
import torch
import torch.nn.functional as F
from lightly.loss import NTXentLoss

from quarterview.data.loader import Batch
from quarterview.errors import UserError
from quarterview.methods import config as configs
from quarterview.methods.base import MethodContext, build
from quarterview.methods.contrastive import BYOL, MoCoV3, SimCLR, compute_feature_std, compute_info_nce
from quarterview.models.config import ViTConfig
from quarterview.models.vit import VisionTransformer

CONFIG = ViTConfig("mae_vit_16x2x2_patch4", (8, 8))
METHODS = {"simclr": configs.SimCLRConfig, "byol": configs.BYOLConfig, "mocov3": configs.MoCoV3Config}


@pytest.fixture
def batch():
    torch.manual_seed(0)
    ids = torch.arange(6)
    return Batch(torch.randn(6, 3, 8, 8), ids, ids * 0, second_view=torch.randn(6, 3, 8, 8))


def make(kind, updates=10, seed=0, **options):
    return build(
        METHODS[kind](proj_hidden_dim=24, proj_output_dim=8, **options), MethodContext(CONFIG, seed, updates)
    )


def nt_xent(one, two, temperature):
    """NT-Xent (Chen et al. 2020, equation 1 and algorithm 1), one pair at a time."""
    z = [x / x.norm() for x in (*one, *two)]
    n, losses = len(one), []
    for i in range(2 * n):
        partner = (i + n) % (2 * n)
        similar = {j: math.exp((z[i] @ z[j]).item() / temperature) for j in range(2 * n) if j != i}
        losses.append(-math.log(similar[partner] / sum(similar.values())))
    return sum(losses) / (2 * n)


# ---------------------------------------------------------------------- losses


def test_simclr_is_nt_xent_of_the_projected_cls_tokens(batch):
    method = make("simclr")
    views = [method.projector(method.model(x)[:, 0]) for x in (batch.images, batch.second_view)]
    expected = nt_xent(*(view.detach().double() for view in views), 0.5)
    torch.testing.assert_close(method(batch).loss.item(), expected, rtol=1e-5, atol=0)


def test_byol_is_the_squared_distance_of_unit_vectors_both_ways(batch):
    method = make("byol")
    out = [method.predictor(method.projector(method.model(x)[:, 0])) for x in batch[::4]]
    targets = [method.teacher_projector(method.teacher(x)[:, 0]) for x in batch[::4]]
    expected = sum(
        (q / q.norm() - z / z.norm()).square().sum().item()
        for queries, keys in ((out[0], targets[1]), (out[1], targets[0]))
        for q, z in zip(queries, keys, strict=True)
    )
    torch.testing.assert_close(method(batch).loss.item(), expected / len(batch.ids))


def test_mocov3_compares_with_keys_of_the_other_view_only(batch):
    method = make("mocov3")
    out = [method.predictor(method.projector(method.model(x)[:, 0])) for x in batch[::4]]
    targets = [method.teacher_projector(method.teacher(x)[:, 0]) for x in batch[::4]]
    expected = 0.0
    for queries, keys in ((out[0], targets[1]), (out[1], targets[0])):
        for i, q in enumerate(queries):
            cosines = [(q @ k / (q.norm() * k.norm())).item() for k in keys]
            weights = [math.exp(cosine / 0.2) for cosine in cosines]
            expected -= 2 * 0.2 * math.log(weights[i] / sum(weights)) / len(queries)
    loss = method(batch).loss.item()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    both = (torch.cat(views) for views in (out, targets))
    assert (
        abs(loss - 2 * 0.2 * NTXentLoss(temperature=0.2)(*both).item()) > 0.01
    )  # NT-Xent of both views is a different loss


def test_info_nce_does_not_depend_on_order_or_norm():
    torch.manual_seed(0)
    queries, keys, order = torch.randn(7, 4), torch.randn(7, 4), torch.randperm(7)
    loss = compute_info_nce(queries, keys, 0.2)
    torch.testing.assert_close(compute_info_nce(queries[order], keys[order], 0.2), loss)
    torch.testing.assert_close(compute_info_nce(3 * queries, keys * torch.rand(7, 1).add(0.1), 0.2), loss)
    assert compute_info_nce(queries, keys[order], 0.2) != loss
    assert float(compute_info_nce(torch.eye(5), torch.eye(5), 0.01)) < 1e-6
    torch.testing.assert_close(
        float(compute_info_nce(torch.ones(5, 3), torch.ones(5, 3), 0.2)), 0.4 * math.log(5)
    )


@pytest.mark.parametrize("kind", ["simclr", "byol", "mocov3"])
def test_the_views_are_interchangeable(kind, batch):
    turned = batch._replace(images=batch.second_view, second_view=batch.images)
    torch.testing.assert_close(make(kind)(batch).loss, make(kind)(turned).loss)


def test_the_configured_temperature_is_used(batch):
    for kind in ("simclr", "mocov3"):
        assert make(kind, temperature=0.05)(batch).loss != make(kind)(batch).loss


# ---------------------------------------------------------------------- teachers


def test_the_teacher_follows_the_momentum_schedule():
    method = make("byol", updates=4, momentum=0.9)
    with torch.no_grad():
        for parameter in (*method.teacher.parameters(), *method.teacher_projector.parameters()):
            parameter.zero_()
        for parameter in (*method.model.parameters(), *method.projector.parameters()):
            parameter.fill_(1.0)
    remaining = 1.0  # weight of the teacher's initial weights, which are 0
    for momentum in (0.9, 0.9146446609, 0.95, 0.9853553391, 1.0, 1.0):  # 1 - 0.1 (1 + cos(pi k / 4)) / 2
        method.update_teacher()
        remaining *= momentum
        for parameter in (*method.teacher.parameters(), *method.teacher_projector.parameters()):
            torch.testing.assert_close(
                parameter, torch.full_like(parameter, 1 - remaining), rtol=0, atol=1e-6
            )


@pytest.mark.parametrize(("kind", "momentum"), [("byol", 0.996), ("mocov3", 0.99)])
def test_the_first_momentum_is_the_papers(kind, momentum):
    method = make(kind, updates=1000)
    with torch.no_grad():
        method.teacher.norm.weight.zero_()
    method.update_teacher()
    torch.testing.assert_close(method.teacher.norm.weight, torch.full((16,), 1 - momentum), rtol=1e-4, atol=0)


@pytest.mark.parametrize("kind", ["byol", "mocov3"])
def test_the_teacher_starts_as_the_student_and_has_no_gradient_and_no_update_in_evaluation(kind, batch):
    method = make(kind)
    begun = {name: tensor.clone() for name, tensor in method.teacher.state_dict().items()}
    assert all(torch.equal(begun[name], tensor) for name, tensor in method.model.state_dict().items())
    method(batch).loss.backward()
    assert all(p.grad is None for p in method.teacher.parameters())
    assert all(p.grad is not None for p in method.model.parameters() if p.requires_grad)
    with torch.no_grad():
        for parameter in method.model.parameters():
            parameter.add_(1)
    method.eval()(batch)
    assert all(torch.equal(begun[name], tensor) for name, tensor in method.teacher.state_dict().items())
    assert int(method.updated) == 1
    method.train()(batch)
    moved = method.teacher.state_dict()
    assert not any(torch.equal(begun[name], moved[name]) for name in begun)
    assert int(method.updated) == 2


def test_only_mocov3_freezes_the_patch_embedding():
    for kind in ("simclr", "byol", "mocov3"):
        trained = {p.requires_grad for p in make(kind).model.patch_embed.parameters()}
        assert trained == {kind != "mocov3"}


# ---------------------------------------------------------------------- heads


def test_the_heads_have_the_papers_layers():
    def layers(head):
        return [
            (type(m).__name__, getattr(m, "out_features", getattr(m, "affine", None))) for m in head.layers
        ]

    hidden = [("Linear", 24), ("BatchNorm1d", True), ("ReLU", None)]
    last = [("Linear", 8), ("BatchNorm1d", False)]
    moco = make("mocov3")
    assert layers(moco.projector) == hidden + hidden + last
    assert layers(moco.predictor) == hidden + last
    byol = make("byol")
    assert layers(byol.projector) == layers(byol.predictor) == [*hidden, ("Linear", 8)]
    assert layers(make("simclr").projector) == [*hidden, ("Linear", 8), ("BatchNorm1d", True)]


@pytest.mark.parametrize("kind", ["simclr", "byol", "mocov3"])
def test_heads_use_batch_statistics(kind, batch):
    method = make(kind)
    before = {n: t.clone() for n, t in method.state_dict().items() if not n.endswith("updated")}
    method(batch._replace(images=batch.images * torch.nan))
    after = method.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert not any("running" in name for name in after)


def test_the_initial_encoder_depends_on_the_seed():
    one, two = make("simclr").state_dict(), make("simclr").state_dict()
    assert all(torch.equal(one[name], two[name]) for name in one)
    other = make("simclr", seed=1).state_dict()
    assert not torch.equal(one["projector.layers.0.weight"], other["projector.layers.0.weight"])


# ---------------------------------------------------------------------- errors and metrics


def test_one_view_is_an_error(batch):
    for kind in ("simclr", "byol", "mocov3"):
        with pytest.raises(ValueError, match="has one view of each image"):
            make(kind)(batch._replace(second_view=None))


@pytest.mark.parametrize(
    ("kind", "name", "value", "accepted"),
    [
        ("simclr", "temperature", 0.0, "a number above 0 and of at most 100"),
        ("mocov3", "temperature", 0.0, "a number above 0 and of at most 100"),
        ("byol", "momentum", 1.1, "a number of at least 0 and of at most 1"),
        ("mocov3", "momentum", 1.1, "a number of at least 0 and of at most 1"),
        *(
            (kind, "proj_hidden_dim", 0, "a whole number of at least 1 and of at most 65536")
            for kind in METHODS
        ),
        *(
            (kind, "proj_output_dim", 0, "a whole number of at least 1 and of at most 65536")
            for kind in METHODS
        ),
    ],
)
def test_invalid_settings_are_errors(kind, name, value, accepted):
    flag = f"--{name.replace('_', '-')}"
    with pytest.raises(UserError, match=f"^{flag} {value} is out of range. Give {accepted}.$"):
        METHODS[kind](**{name: value})


def test_the_feature_spread_detects_collapse():
    torch.manual_seed(0)
    alike = torch.randn(1, 64).expand(50, -1)
    assert float(compute_feature_std(alike)) < 1e-6
    assert 0.95 < float(compute_feature_std(torch.randn(500, 64))) < 1.05
    assert torch.equal(compute_feature_std(alike * 100), compute_feature_std(alike))


def test_all_three_methods_train_the_encoder(batch):
    for kind, its in (("simclr", SimCLR), ("byol", BYOL), ("mocov3", MoCoV3)):
        method = make(kind)
        assert isinstance(method, its)
        assert isinstance(method.model, VisionTransformer)
        before = method(batch).loss
        trained = [p for p in method.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(trained, lr=0.05)
        for _ in range(5):
            optimizer.zero_grad()
            method(batch).loss.backward()
            optimizer.step()
        assert method(batch).loss < before
        unit = F.normalize(method.model(batch.images)[:, 0], dim=1)
        assert unit.isfinite().all()
