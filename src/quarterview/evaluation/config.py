"""What evaluation is asked: the parts of the configurations of knn, linear, robustness, embed, look and
reconstruct, and of the probe that watches pre-training. Nothing here imports torch."""

import re
from collections.abc import Mapping
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le

from quarterview.config import FIRST, MAY_CHANGE, PATH, POSITIONAL, Ints, Text, Texts, part
from quarterview.errors import UserError, unknown

FeatureKind = Literal["mean", "cls"]
Device = Literal["auto", "cpu", "cuda", "mps"]
CropPct = Annotated[float | None, Gt(0), Le(1)]
"""A share of the sides of the largest central box of an image, or the default of `crop_share`."""


@part
class LabelledImagesConfig:
    """Labelled images."""

    train: Annotated[Texts, FIRST, PATH, MAY_CHANGE] = ()
    """Required: labelled images to learn from, anything that --data of pretrain takes."""
    test: Annotated[Texts, FIRST, PATH, MAY_CHANGE] = ()
    """Required: labelled images to be judged on. Nothing is chosen by them."""


@part
class ProbeConfig:
    """Which model's features are judged, and how they are computed."""

    run: Annotated[Text, PATH, POSITIONAL] = ""
    """A run, a checkpoint folder or a .safetensors file."""
    features: Annotated[FeatureKind | None, FIRST] = None
    """The mean of the patch tokens after the final norm, or the cls token (of several the mean). By default
    the mean, and for the paper's linear probe the cls token."""
    labels: Annotated[int | None, Ge(1), FIRST] = None
    """Use only so many labelled training images, equally many per class; by default all."""
    baselines: bool = True
    """Judge raw pixels and an encoder with random weights beside the model."""
    ema: bool = False
    """Judge the moving average of the weights, of a run with --ema."""
    crop_pct: CropPct = None
    """Share of the sides of the largest central box that an image is cut to. By default 0.875 for 224 × 224
    pixels, as the paper does, and 1 for other sizes."""
    device: Device = "auto"
    """Where to compute the features."""
    compile: bool = False
    """Compile the encoders, which takes a minute and pays off over many images."""
    seed: int = 0
    """Seed of the choice of labelled images, of the random encoder, and of a probe's own draws."""


@part
class KnnClassifierConfig:
    """How the k nearest neighbours classify."""

    k: Annotated[Ints, FIRST] = (20,)
    """How many neighbours vote, equally and by exp(cosine / 0.07); several numbers give a row each."""

    def __post_init__(self) -> None:
        if not self.k or min(self.k) < 1:
            raise UserError(f"--k {' '.join(map(str, self.k))} is no number of neighbours. Give 1 or more.")


@part
class LinearClassifierConfig:
    """How the linear classifier is trained. The defaults of the paper's protocol are the paper's."""

    protocol: Annotated[Literal["fast", "paper"], FIRST] = "fast"
    """fast: features computed once, logistic regression whose regularisation is chosen on a fifth of the
    training images. paper: BatchNorm and a linear layer, trained by LARS on new crops each epoch."""
    epochs: Annotated[int, Ge(1)] = 90
    """With --protocol paper: passes over the labelled images."""
    warmup_epochs: Annotated[float, Ge(0)] = 10.0
    """With --protocol paper: epochs of linear warm-up from 0."""
    batch_size: Annotated[int, Ge(2)] = 16384  # one image cannot be normalised
    """With --protocol paper: images per update; the whole set where it has fewer."""
    blr: Annotated[float, Gt(0)] = 0.1
    """With --protocol paper: base learning rate: the rate is blr × batch size / 256."""


# ---------------------------------------------------------------------- while a run trains


@part
class OnlineProbeConfig:
    """Labelled images that show, while a run trains, how good its features are."""

    probe_train: Annotated[Texts, PATH, MAY_CHANGE] = ()
    """Labelled images, named as in --data, whose labels a k-nearest-neighbour probe reads at validations, for
    the column knn_accuracy; off by default. Nothing is trained on them."""
    probe_test: Annotated[Texts, PATH, MAY_CHANGE] = ()
    """Labelled images that this probe classifies: other ones."""
    probe_every: Annotated[float | None, Gt(0), MAY_CHANGE] = None
    """Epochs from one probe to the next, which waits for a validation; by default every validation."""
    probe_labels: Annotated[int, Ge(1), MAY_CHANGE] = 1000
    """At most so many images of probe_train, and of probe_test; equally many per class. They are held on the
    device."""
    probe_k: Annotated[int, Ge(1), MAY_CHANGE] = 20
    """How many neighbours vote in this probe, each by exp(cosine / 0.07)."""

    def __post_init__(self) -> None:
        if bool(self.probe_train) != bool(self.probe_test):
            given, missing = ("train", "test") if self.probe_train else ("test", "train")
            raise UserError(f"--probe-{given} is given without --probe-{missing}. Give both, or neither.")
        if self.probe_k > self.probe_labels:
            raise UserError(
                f"--probe-k {self.probe_k} is more than the {self.probe_labels} images of --probe-labels. "
                "Give fewer neighbours, or more labels."
            )


# ---------------------------------------------------------------------- robustness

COMMON = (
    *("gaussian_noise", "shot_noise", "impulse_noise"),
    *("defocus_blur", "glass_blur", "motion_blur", "zoom_blur"),
    *("snow", "frost", "fog", "brightness"),
    *("contrast", "elastic_transform", "pixelate", "jpeg_compression"),
)
"""The corruptions that ImageNet-C is made of, and over which its mean goes."""
EXTRA = ("speckle_noise", "gaussian_blur", "spatter", "saturate")
"""The corruptions that ImageNet-C has beside them, for validation."""
GROUPS: Mapping[str, tuple[str, ...]] = {"common": COMMON, "extra": EXTRA, "all": (*COMMON, *EXTRA)}
"""Words for several corruptions."""
SEVERITIES = (1, 2, 3, 4, 5)
_SET_NAME = re.compile(r"[\w.-]+")


@part
class RobustnessConfig:
    """Which classifier is judged, and on what."""

    run: Annotated[Text, PATH, POSITIONAL] = ""
    """A run of fine-tuning, a checkpoint folder, or other weights of a classifier."""
    test: Annotated[Texts, PATH, FIRST] = ()
    """Labelled images to corrupt: anything that --data of pretrain takes."""
    sets: Annotated[Texts, PATH, FIRST] = ()
    """Other labelled images, each with a name: sketch=FOLDER. Only classes that a set has are predicted."""
    class_map: Annotated[Text | None, PATH] = None
    """A file that says which of the classifier's classes a class of --test or --sets is, where the names
    differ: .json or .yaml with `name: class`, or .csv with `name,class`."""
    corruptions: Annotated[Texts, FIRST] = ("common",)
    """Names of corruptions, or common (the 15 of ImageNet-C), extra (its other 4), all."""
    severities: Ints = SEVERITIES
    """From 1 to 5."""
    alexnet: bool = False
    """Also give the mCE, of errors as shares of AlexNet's on ImageNet-C: it is for ImageNet's classes."""
    ema: bool = False
    """Judge the moving average of the weights, of a run with --ema."""
    crop_pct: CropPct = None
    """Share of the sides of the largest central box that an image is cut to. By default 0.875 for 224 × 224
    pixels, as the paper does, and 1 for other sizes."""
    batch_size: Annotated[int, Ge(1)] = 256
    """Images that the classifier sees at a time."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """Precision of the classifier; fp32 where the device has no bf16."""
    workers: Annotated[int | None, Ge(0)] = None
    """Processes that decode and corrupt; by default one on each core, up to 8."""
    device: Device = "auto"
    """Where to compute."""
    seed: int = 0
    """Seed of what the corruptions draw."""

    def __post_init__(self) -> None:
        names = [*GROUPS["all"], *GROUPS]
        for name in self.corruptions:
            if name not in names:
                raise unknown("corruption", name, names)
        if not self.corruptions or not self.severities:
            empty = "--severities" if self.corruptions else "--corruptions"
            raise UserError(f"{empty} is empty. Give one or more, or leave it out.")
        for severity in self.severities:
            if severity not in SEVERITIES:
                raise UserError(f"--severities {severity} is out of range. Give numbers from 1 to 5.")
        whole = self.test and {*COMMON} <= {*self.names} and {*SEVERITIES} <= {*self.severities}
        if self.alexnet and not whole:
            raise UserError(
                "--alexnet needs --test with all 15 common corruptions and all five severities, which make "
                "an mCE. Give --test, and neither --corruptions nor --severities."
            )
        _ = self.named_sets  # which checks them

    @property
    def names(self) -> tuple[str, ...]:
        """The corruptions, each once, in the library's order."""
        asked = {name for given in self.corruptions for name in GROUPS.get(given, (given,))}
        return tuple(name for name in GROUPS["all"] if name in asked)

    @property
    def named_sets(self) -> dict[str, str]:
        """The images of each of the other sets, by the set's name.

        Raises:
            UserError: if one of them has no name, or two have the same.
        """
        found: dict[str, str] = {}
        for given in self.sets:
            name, _, images = given.partition("=")
            if not images or not _SET_NAME.fullmatch(name):
                raise UserError(
                    f"--sets {given!r} is no set with a name. Give NAME=IMAGES, such as sketch=data/sketch."
                )
            if name in found:
                raise UserError(f"two of --sets are called {name!r}. Give them different names.")
            found[name] = images
        return found


# ---------------------------------------------------------------------- features written and drawn


@part
class EmbedConfig:
    """Which images are embedded, by what, and how the embeddings are written."""

    run: Annotated[Text, PATH, POSITIONAL] = ""
    """A run, a checkpoint folder or a .safetensors file."""
    data: Annotated[Texts, PATH, FIRST] = ()
    """Images: anything that --data of pretrain takes; labels are taken along where there are any."""
    out: Annotated[Text, PATH, FIRST] = ""
    """The folder to write; the same command continues one that was interrupted."""
    features: Annotated[Literal["mean", "cls", "tokens"], FIRST] = "mean"
    """The mean of the patch tokens, the cls token (of several the mean), or all tokens: cls, then the patches
    by row."""
    block: Annotated[int | None, Ge(1)] = None
    """Take the tokens after so many blocks; by default after the last one and the final norm."""
    dtype: Literal["float32", "float16"] = "float32"
    """Type of the embeddings as they are written."""
    shard_size: Annotated[int, Ge(1)] = 8192
    """Images per shard."""
    batch_size: Annotated[int, Ge(1)] = 256
    """Images that the encoder sees at a time."""
    crop_pct: CropPct = None
    """Share of the sides of the largest central box that an image is cut to. By default 0.875 for 224 × 224
    pixels, as the paper does, and 1 for other sizes."""
    ema: bool = False
    """Use the moving average of the weights, of a run with --ema."""
    device: Device = "auto"
    """Where to compute."""
    compile: bool = False
    """Compile the encoder, which takes a minute and pays off over many images."""


@part
class LookConfig:
    """Which model looks at which images, and what is drawn."""

    run: Annotated[Text, PATH, POSITIONAL] = ""
    """A run, a checkpoint folder or a .safetensors file."""
    images: Annotated[Texts, PATH, POSITIONAL] = ()
    """Image files, or anything that --data of pretrain takes; the first eight are drawn."""
    out: Annotated[Text, PATH, FIRST] = "look.png"
    """The PNG to write."""
    heads: Annotated[int, Ge(0)] = 6
    """How many attention heads of the last block are drawn one by one."""
    seed: int = 0
    """Seed of the masks."""


@part
class ReconstructConfig:
    """Which model completes which images."""

    run: Annotated[Text, PATH, POSITIONAL] = ""
    """A run, a checkpoint folder or a .safetensors file."""
    images: Annotated[Texts, PATH, POSITIONAL] = ()
    """Image files, or anything that --data of pretrain takes; the first eight are drawn."""
    out: Annotated[Text, PATH, FIRST] = "panel.png"
    """The PNG to write."""
    seed: int = 0
    """Seed of the masks."""
