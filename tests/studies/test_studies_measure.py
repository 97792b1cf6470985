"""What arms are judged by: patches that are visible, and what there was before networks."""

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA

from quarterview.data.augment import to_float
from quarterview.data.open import open_source
from quarterview.errors import RunError, UserError
from quarterview.evaluate.features import encoder_features, partly_visible
from quarterview.model.create import create_model
from quarterview.studies.measure import check_measures
from quarterview.studies.plain_features import WORDS, patch_clusters, picture_components
from quarterview.studies.study import check_measure


@pytest.fixture
def model():
    torch.manual_seed(0)
    return create_model("mae_vit_32x2x2_patch4", image_size=16, mean=(0.5,) * 3, std=(0.25,) * 3).eval()


def test_all_of_the_picture_is_the_picture(model):
    images = torch.rand(5, 3, 16, 16)
    torch.testing.assert_close(partly_visible(model, 1.0, 0)(images), encoder_features(model, "mean")(images))


def test_a_share_of_the_patches_is_all_that_is_seen(model):
    images = torch.rand(400, 3, 16, 16)
    changed = images.clone()
    changed[:, :, :4, :4] = torch.rand(400, 3, 4, 4)  # the first of 16 patches
    one, two = (partly_visible(model, 0.25, 3)(x) for x in (images, changed))
    share = float((one != two).any(dim=1).float().mean())
    assert abs(share - 0.25) < 0.07
    parts = partly_visible(model, 0.25, 3)
    again = torch.cat([parts(images[:150]), parts(images[150:])])
    torch.testing.assert_close(again, one)
    assert not torch.equal(partly_visible(model, 0.25, 4)(images), one)


def test_components_of_pictures_are_scikit_learns():
    source = open_source("shapes:300:size=8", 3)
    images = to_float(torch.stack([source.image(i).pixels for i in range(300)]))
    features = picture_components(source, (8, 8), 0)(images)
    assert features.shape == (300, 128)
    reference = PCA(whiten=True).fit_transform(images.flatten(1).numpy())[:, :5]
    ours = features[:, :5].numpy()
    signs = np.sign((ours * reference).sum(0))
    np.testing.assert_allclose(ours * signs, reference, rtol=0.02, atol=0.02)


def test_clusters_of_patches_tell_stripes_apart(tmp_path):
    generator = np.random.default_rng(0)
    lines = generator.integers(0, 256, (120, 16, 1, 1), dtype=np.uint8).repeat(16, 2).repeat(3, 3)
    lines[1::2] = lines[1::2].transpose(0, 2, 1, 3)
    np.save(tmp_path / "x.npy", lines)
    source = open_source(str(tmp_path / "x.npy"), 3)
    encode = patch_clusters(source, (16, 16), 0)
    features = encode(to_float(torch.from_numpy(lines).permute(0, 3, 1, 2)))
    assert features.shape == (120, 4 * WORDS)
    assert features.min() >= 0
    unit = torch.nn.functional.normalize(features, dim=1)
    similar = unit @ unit.T - 2 * torch.eye(120)
    assert float((similar.argmax(1) % 2 == torch.arange(120) % 2).float().mean()) > 0.95
    some = torch.rand(2, 3, 16, 16)
    assert torch.equal(patch_clusters(source, (16, 16), 0)(some), encode(some))


def test_too_few_pictures_are_refused():
    with pytest.raises(RunError, match="clusters of 60 patches"):
        patch_clusters(open_source("shapes:3:size=8", 3), (8, 8), 0)


@pytest.mark.parametrize(
    "measure", ["linear", "knn@10", "linear@100", "finetune", "finetune:0.5", "finetune:all"]
)
def test_measures(measure):
    check_measure(measure)


@pytest.mark.parametrize(
    "measure", ["probe", "linear:2", "finetune@50", "knn@0", "knn@101", "linear@x", "finetune:-1"]
)
def test_what_is_no_measure(measure):
    with pytest.raises(UserError):
        check_measure(measure)


def test_measures_that_an_arm_cannot_have():
    check_measures("kmeans", ["linear", "knn"], 4)
    check_measures("pretrain", ["finetune:4", "finetune:all", "linear@50"], 4)
    for start, measure in (("pixels", "finetune"), ("pca", "knn@50"), ("pretrain", "finetune:5")):
        with pytest.raises(UserError):
            check_measures(start, [measure], 4)
