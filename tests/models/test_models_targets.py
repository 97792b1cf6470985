import pytest
import torch
from sklearn.decomposition import PCA
from torch import Tensor

from quarterview.errors import UserError
from quarterview.models.create import create_model
from quarterview.models.targets import (
    NORM_PIX_EPS,
    PatchMoments,
    PCATarget,
    PixelTarget,
    compute_patch_statistics,
)


def truth_of(target: PixelTarget, patches: Tensor) -> Tensor:
    """The pixel target of patches [..., P]; it does not depend on the rest of the image."""
    return target(torch.empty(0), patches, None)


@pytest.mark.parametrize("numbers", [12, 48, 768])
def test_the_normalised_target_equals_the_official_formula(numbers):
    patches = 3 + 2 * torch.randn(5, 7, numbers, generator=torch.Generator().manual_seed(0))
    mean = patches.mean(dim=-1, keepdim=True)
    variance = patches.var(dim=-1, keepdim=True)  # unbiased
    expected = (patches - mean) / (variance + 1.0e-6) ** 0.5
    torch.testing.assert_close(
        truth_of(PixelTarget(numbers, normalize=True), patches), expected, rtol=1e-5, atol=1e-6
    )


def test_the_unnormalised_target_is_the_patch():
    patches = torch.randn(2, 3, 12)
    assert torch.equal(truth_of(PixelTarget(12, normalize=False), patches), patches)


@pytest.mark.parametrize("numbers", [12, 48, 768])
def test_the_loss_of_a_zero_prediction_follows_the_unbiased_variance(numbers):
    target = PixelTarget(numbers, normalize=True)
    patches = 5 * torch.randn(64, numbers, generator=torch.Generator().manual_seed(0))
    loss = target.loss(torch.zeros_like(patches), truth_of(target, patches))
    torch.testing.assert_close(loss, torch.full((64,), (numbers - 1) / numbers), rtol=1e-4, atol=0)


def test_a_constant_patch_has_a_finite_target_of_zero():
    truth = truth_of(PixelTarget(48, normalize=True), torch.full((1, 48), 0.7))
    assert torch.equal(truth.abs() < 1e-3, torch.ones(1, 48, dtype=torch.bool))


def test_the_epsilon_is_inside_the_root():
    patch = torch.tensor([[0.0, 2e-4]])  # variance 2e-8, below the epsilon
    expected = 1e-4 / (2e-8 + NORM_PIX_EPS) ** 0.5
    torch.testing.assert_close(
        truth_of(PixelTarget(2, normalize=True), patch), torch.tensor([[-expected, expected]])
    )


def test_the_normalisation_is_over_all_channels_of_a_patch_together():
    patch = torch.tensor([[0.0, 10.0] * 24])  # two channels, each constant
    truth = truth_of(PixelTarget(48, normalize=True), patch)
    assert truth[0, 0] < -0.9
    assert truth[0, 1] > 0.9


def test_the_loss_is_the_mean_of_squares_of_a_patch_in_float32():
    target = PixelTarget(4, normalize=False)
    pred = torch.tensor([[1.0, 2.0, 3.0, 4.0], [0.0, 0.0, 0.0, 2.0]], dtype=torch.bfloat16)
    loss = target.loss(pred, torch.zeros(2, 4))
    assert loss.dtype == torch.float32
    assert loss.tolist() == [7.5, 1.0]


def test_targets_of_half_precision_patches_are_made_in_float32():
    patches = (100 + torch.randn(3, 48, generator=torch.Generator().manual_seed(0))).to(torch.float16)
    truth = truth_of(PixelTarget(48, normalize=True), patches)
    assert truth.dtype == torch.float32
    torch.testing.assert_close(truth, truth_of(PixelTarget(48, normalize=True), patches.float()))


@pytest.mark.parametrize("normalised", [True, False])
def test_to_pixels_inverts_the_target(normalised):
    target = PixelTarget(48, normalised)
    patches = 2 + 3 * torch.randn(4, 48, generator=torch.Generator().manual_seed(0))
    pixels = target.to_pixels(truth_of(target, patches), *compute_patch_statistics(patches))
    torch.testing.assert_close(pixels, patches, rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------------- principal components


def correlated(count: int, numbers: int = 12) -> Tensor:
    torch.manual_seed(0)
    return torch.randn(count, 5) @ torch.randn(5, numbers) + 0.1 * torch.randn(count, numbers) + 3


def test_components_equal_scikit_learns_for_any_batching():
    patches = correlated(500)
    reference = PCA(4).fit(patches.double().numpy())
    for sizes in ([500], [1, 99, 400], [250, 250]):
        moments = PatchMoments(12)
        for part in patches.split(sizes):
            moments.update(part)
        mean, components = moments.compute_components(4)
        torch.testing.assert_close(mean, torch.tensor(reference.mean_), rtol=1e-8, atol=1e-8)
        theirs = torch.tensor(reference.components_)
        signs = (components * theirs).sum(1).sign()
        torch.testing.assert_close(components, theirs * signs[:, None], rtol=1e-6, atol=1e-7)
        assert (components.gather(1, components.abs().argmax(1, keepdim=True)) > 0).all()


def test_the_target_equals_scikit_learns_transform():
    patches = correlated(400)
    moments = PatchMoments(12)
    moments.update(patches.view(20, 20, 12))
    target = PCATarget(12, 3)
    assert target.dim == 3
    target.fit(moments)
    reference = PCA(3).fit(patches.double().numpy())
    theirs = torch.tensor(reference.transform(patches.double().numpy())).float()
    made = target(torch.empty(1), patches[None], None)[0]
    signs = (made * theirs).sum(0).sign()
    torch.testing.assert_close(made, theirs * signs, rtol=1e-4, atol=1e-4)
    wanted = torch.tensor([[3, 7]])
    torch.testing.assert_close(target(torch.empty(1), patches[None], wanted), made[None, [3, 7]])
    torch.testing.assert_close(target.loss(made + 2, made), torch.full((400,), 4.0))


def test_all_components_reconstruct_the_image():
    patches = correlated(300)
    moments = PatchMoments(12)
    moments.update(patches)
    target = PCATarget(12, 12)
    target.fit(moments)
    made = target(torch.empty(1), patches[None], None)
    torch.testing.assert_close(target.to_pixels(made, made, made)[0], patches, rtol=1e-4, atol=1e-4)


def test_more_components_than_patches_are_an_error():
    moments = PatchMoments(12)
    moments.update(correlated(5))
    with pytest.raises(ValueError, match="5 patches"):
        moments.compute_components(5)


# ---------------------------------------------------------------------- tokens


class Counting:
    """A tokenizer that gives each patch a different token."""

    codebook_size = 16

    def tokenize(self, images: Tensor) -> Tensor:
        return torch.arange(16).expand(len(images), -1)


def test_the_loss_of_tokens_is_the_cross_entropy_of_masked_patches():
    torch.manual_seed(0)
    options = {"target": "tokens", "codebook_size": 16, "decoder_depth": 0, "encoder_mask_tokens": True}
    model = create_model("mae_vit_16x2x2_patch4", image_size=16, mask_ratio=0.4, mask="block", **options)
    model.target.set_tokenizer(Counting())
    images = torch.randn(3, 3, 16, 16)
    out = model(images)
    assert out.pred.shape == (3, 7, 16)
    assert torch.equal(out.pred_indices.sort(1).values, out.mask.nonzero()[:, 1].view(3, 7))
    expected = 0.0
    for image in range(3):
        for row, patch in enumerate(out.pred_indices[image].tolist()):
            logits = out.pred[image, row].double()
            expected -= (logits[patch] - logits.exp().sum().log()).item() / 21
    torch.testing.assert_close(out.loss.item(), expected, rtol=1e-5, atol=0)
    visible = model.encode(images)  # BEiT's features are computed with all patches visible
    assert visible.shape == (3, 17, 16)
    assert not any(name.startswith("target") for name in model.state_dict())


def test_tokens_of_several_masks_are_computed_once():
    made = []

    class Watched(Counting):
        def tokenize(self, images: Tensor) -> Tensor:
            made.append(len(images))
            return super().tokenize(images)

    model = create_model(
        "mae_vit_16x2x2_patch4", image_size=16, target="tokens", codebook_size=16, decoder_width=16
    )
    model.target.set_tokenizer(Watched())
    noise = torch.rand(3, 2, 16)
    images = torch.randn(3, 3, 16, 16)
    both = model(images, noise=noise)
    assert made == [3]
    apart = [model(images, noise=noise[:, i]).loss for i in (0, 1)]
    torch.testing.assert_close(both.loss, sum(apart) / 2)


def test_training_needs_a_tokenizer_and_features_do_not():
    model = create_model("mae_vit_16x2x2_patch4", image_size=16, target="tokens", codebook_size=16)
    with pytest.raises(UserError, match="no tokenizer"):
        model(torch.randn(1, 3, 16, 16))
    assert model.encode(torch.randn(1, 3, 16, 16)).shape == (1, 17, 16)
    with pytest.raises(UserError, match="tokenizer has 16 visual tokens, and the model predicts 8"):
        create_model(
            "mae_vit_16x2x2_patch4", image_size=16, target="tokens", codebook_size=8
        ).target.set_tokenizer(Counting())
    with pytest.raises(UserError, match="codebook size"):
        create_model("mae_vit_16x2x2_patch4", image_size=16, target="tokens")
    model.target.set_tokenizer(Counting())
    with pytest.raises(
        UserError, match="Reconstruction is not supported with a model that predicts visual tokens"
    ):
        model.reconstruct(torch.randn(1, 3, 16, 16))
