"""Configurations of the commands knn, linear, robustness, embed, look and reconstruct, and of the online
probe of pre-training. Nothing here imports torch."""

import re
from collections.abc import Mapping
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le

from quarterview.config import FIRST, MAY_CHANGE, PATH, POSITIONAL, Ints, Text, Texts, part
from quarterview.errors import UserError, invalid, unknown

FeaturePool = Literal["mean", "cls"]
Device = Literal["auto", "cpu", "cuda", "mps"]
CropPct = Annotated[float | None, Gt(0), Le(1)]
"""Fraction of the sides of the largest central box of an image; None: the default of `resolve_crop_pct`."""


@part
class LabeledImagesConfig:
    """Labelled training and test images."""

    train: Annotated[Texts, FIRST, PATH, MAY_CHANGE] = ()
    """Required: labelled training images, anything that --data of pretrain takes."""
    test: Annotated[Texts, FIRST, PATH, MAY_CHANGE] = ()
    """Required: labelled test images. No setting is chosen on them."""


@part
class ProbeConfig:
    """The model whose features are evaluated, and how they are computed."""

    run: Annotated[Text, PATH, POSITIONAL] = ""
    """A run, a checkpoint folder or a .safetensors file."""
    features: Annotated[FeaturePool | None, FIRST] = None
    """mean: average the patch tokens after the final norm. cls: take the cls token, or the mean of several.
    By default mean, and cls for the paper's linear probe."""
    labels: Annotated[int | None, Ge(1), FIRST] = None
    """Number of labelled training images to use, equally many per class; by default all."""
    baselines: bool = True
    """Also evaluate raw pixels and an encoder with random weights."""
    ema: bool = False
    """Evaluate the moving average of the weights, from a run with --ema."""
    crop_pct: CropPct = None
    """Fraction of the sides of the largest central box that an image is cropped to. By default 0.875 for
    224 × 224 pixels, as in the paper, and 1 for other sizes."""
    device: Device = "auto"
    """Device that computes the features."""
    compile: bool = False
    """Compile the encoders. It takes a minute and pays off over many images."""
    seed: int = 0
    """Seed of the choice of labelled images, of the random encoder, and of the random draws of a probe."""


@part
class KnnClassifierConfig:
    """The k-nearest-neighbour classifier."""

    k: Annotated[Ints, FIRST] = (20,)
    """Number of neighbours that vote, with equal weights and with weights exp(cosine / 0.07); several numbers
    give a row each."""

    def __post_init__(self) -> None:
        if not self.k or min(self.k) < 1:
            raise invalid(
                "--k", " ".join(map(str, self.k)) or "empty", "one or more numbers, each at least 1"
            )


@part
class LinearClassifierConfig:
    """The training of the linear classifier. The defaults of --protocol paper are those of the paper."""

    protocol: Annotated[Literal["fast", "paper"], FIRST] = "fast"
    """fast: logistic regression on features computed once, with the regularisation chosen on a fifth of the
    training images. paper: BatchNorm and a linear layer, trained by LARS on new crops in each epoch."""
    epochs: Annotated[int, Ge(1)] = 90
    """With --protocol paper: epochs over the labelled images."""
    warmup_epochs: Annotated[float, Ge(0)] = 10.0
    """With --protocol paper: epochs of linear warm-up from 0."""
    batch_size: Annotated[int, Ge(2)] = 16384  # BatchNorm cannot normalise a single image
    """With --protocol paper: images per update, at most the whole set."""
    blr: Annotated[float, Gt(0)] = 0.1
    """With --protocol paper: base learning rate; the learning rate is blr × batch size / 256."""


# ---------------------------------------------------------------------- online probe


@part
class OnlineProbeConfig:
    """A k-nearest-neighbour probe of the features during pre-training."""

    probe_train: Annotated[Texts, PATH, MAY_CHANGE] = ()
    """Labelled reference images of a k-nearest-neighbour probe that runs at validations and writes the column
    knn_accuracy; anything that --data takes. The model is not trained on them. By default there is no
    probe."""
    probe_test: Annotated[Texts, PATH, MAY_CHANGE] = ()
    """Labelled images that the probe classifies; not those of --probe-train."""
    probe_every: Annotated[float | None, Gt(0), MAY_CHANGE] = None
    """Epochs between probes, each of which runs at the next validation; by default every validation."""
    probe_labels: Annotated[int, Ge(1), MAY_CHANGE] = 1000
    """Maximum number of images of --probe-train, and of --probe-test, equally many per class. They are kept
    in device memory."""
    probe_k: Annotated[int, Ge(1), MAY_CHANGE] = 20
    """Number of neighbours that vote in the probe, with weights exp(cosine / 0.07)."""

    def __post_init__(self) -> None:
        if bool(self.probe_train) != bool(self.probe_test):
            given, missing = ("train", "test") if self.probe_train else ("test", "train")
            raise UserError(f"--probe-{given} needs --probe-{missing}. Give both, or neither.")
        if self.probe_k > self.probe_labels:
            raise UserError(
                f"--probe-k {self.probe_k} is more than the {self.probe_labels} images of --probe-labels. "
                "Give fewer neighbours, or more labels."
            )


# ---------------------------------------------------------------------- robustness

COMMON_CORRUPTIONS = (
    *("gaussian_noise", "shot_noise", "impulse_noise"),
    *("defocus_blur", "glass_blur", "motion_blur", "zoom_blur"),
    *("snow", "frost", "fog", "brightness"),
    *("contrast", "elastic_transform", "pixelate", "jpeg_compression"),
)
"""The 15 corruptions of ImageNet-C over which the mean corruption error is taken."""
EXTRA_CORRUPTIONS = ("speckle_noise", "gaussian_blur", "spatter", "saturate")
"""The four further corruptions of ImageNet-C, meant for validation."""
CORRUPTION_GROUPS: Mapping[str, tuple[str, ...]] = {
    "common": COMMON_CORRUPTIONS,
    "extra": EXTRA_CORRUPTIONS,
    "all": (*COMMON_CORRUPTIONS, *EXTRA_CORRUPTIONS),
}
"""Names of groups of corruptions, for --corruptions."""
SEVERITIES = (1, 2, 3, 4, 5)
_SET_NAME = re.compile(r"[\w.-]+")


@part
class RobustnessConfig:
    """The classifier to evaluate, and the images to evaluate it on."""

    run: Annotated[Text, PATH, POSITIONAL] = ""
    """A fine-tuning run, a checkpoint folder, or other weights of a classifier."""
    test: Annotated[Texts, PATH, FIRST] = ()
    """Labelled images to corrupt: anything that --data of pretrain takes."""
    sets: Annotated[Texts, PATH, FIRST] = ()
    """Further labelled sets, each with a name: sketch=FOLDER. Predictions are limited to its classes."""
    class_map: Annotated[Text | None, PATH] = None
    """File that maps class names of --test and --sets to classes of the classifier, where the names differ:
    .json or .yaml with `name: class`, or .csv with `name,class`."""
    corruptions: Annotated[Texts, FIRST] = ("common",)
    """Names of corruptions, or common (the 15 of ImageNet-C), extra (its other 4) or all."""
    severities: Ints = SEVERITIES
    """Severities of the corruptions, 1 to 5."""
    alexnet: bool = False
    """Also compute the mCE, which divides errors by those of AlexNet on ImageNet-C. It is meant for the
    classes of ImageNet."""
    ema: bool = False
    """Evaluate the moving average of the weights, from a run with --ema."""
    crop_pct: CropPct = None
    """Fraction of the sides of the largest central box that an image is cropped to. By default 0.875 for
    224 × 224 pixels, as in the paper, and 1 for other sizes."""
    batch_size: Annotated[int, Ge(1)] = 256
    """Images per forward pass of the classifier."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """Precision of the classifier; fp32 on devices without bf16."""
    workers: Annotated[int | None, Ge(0)] = None
    """Worker processes that decode and corrupt images; by default one per core, up to 8."""
    device: Device = "auto"
    """Device that runs the classifier."""
    seed: int = 0
    """Seed of the random draws of the corruptions."""

    def __post_init__(self) -> None:
        names = [*CORRUPTION_GROUPS["all"], *CORRUPTION_GROUPS]
        for name in self.corruptions:
            if name not in names:
                raise unknown("corruption", name, names)
        if not self.corruptions or not self.severities:
            empty = "--severities" if self.corruptions else "--corruptions"
            raise UserError(f"{empty} is empty. Give one or more, or leave it out.")
        for severity in self.severities:
            if severity not in SEVERITIES:
                raise invalid("--severities", severity, "numbers from 1 to 5")
        has_common = {*COMMON_CORRUPTIONS} <= {*self.corruption_names} and {*SEVERITIES} <= {*self.severities}
        if self.alexnet and not (self.test and has_common):
            raise UserError(
                "--alexnet needs --test with the 15 common corruptions and all five severities, over "
                "which the mCE is a mean. Give --test, and leave out --corruptions and --severities."
            )
        _ = self.named_sets  # raises UserError if a name is invalid

    @property
    def corruption_names(self) -> tuple[str, ...]:
        """The corruptions with groups expanded, each once, in the order of the corruption library."""
        chosen = {name for word in self.corruptions for name in CORRUPTION_GROUPS.get(word, (word,))}
        return tuple(name for name in CORRUPTION_GROUPS["all"] if name in chosen)

    @property
    def named_sets(self) -> dict[str, str]:
        """The sets of --sets: name -> images.

        Raises:
            UserError: if a set has no name, or two sets have the same name.
        """
        named: dict[str, str] = {}
        for spec in self.sets:
            name, _, images = spec.partition("=")
            if not images or not _SET_NAME.fullmatch(name):
                raise UserError(
                    f"--sets {spec!r} has no valid name. Give NAME=IMAGES, such as sketch=data/sketch."
                )
            if name in named:
                raise UserError(f"--sets has two sets named {name!r}. Give them different names.")
            named[name] = images
        return named


# ---------------------------------------------------------------------- embeddings and figures


@part
class EmbedConfig:
    """The model and the images to embed, and the format of the embeddings."""

    run: Annotated[Text, PATH, POSITIONAL] = ""
    """A run, a checkpoint folder or a .safetensors file."""
    data: Annotated[Texts, PATH, FIRST] = ()
    """Images: anything that --data of pretrain takes. Labels are written, too, if there are any."""
    out: Annotated[Text, PATH, FIRST] = ""
    """Output folder. Repeating the command continues an interrupted one."""
    features: Annotated[Literal["mean", "cls", "tokens"], FIRST] = "mean"
    """mean: average the patch tokens. cls: take the cls token, or the mean of several. tokens: all tokens,
    cls tokens first, then the patches row by row."""
    block: Annotated[int | None, Ge(1)] = None
    """Take the tokens after this block, counted from 1; by default after the final norm."""
    dtype: Literal["float32", "float16"] = "float32"
    """Data type of the written embeddings."""
    shard_size: Annotated[int, Ge(1)] = 8192
    """Images per shard."""
    batch_size: Annotated[int, Ge(1)] = 256
    """Images per forward pass of the encoder."""
    crop_pct: CropPct = None
    """Fraction of the sides of the largest central box that an image is cropped to. By default 0.875 for
    224 × 224 pixels, as in the paper, and 1 for other sizes."""
    ema: bool = False
    """Use the moving average of the weights, from a run with --ema."""
    device: Device = "auto"
    """Device that computes the embeddings."""
    compile: bool = False
    """Compile the encoder. It takes a minute and pays off over many images."""


@part
class LookConfig:
    """The model and the images whose attention and tokens are drawn."""

    run: Annotated[Text, PATH, POSITIONAL] = ""
    """A run, a checkpoint folder or a .safetensors file."""
    images: Annotated[Texts, PATH, POSITIONAL] = ()
    """Image files, or anything that --data of pretrain takes; the first eight are drawn."""
    out: Annotated[Text, PATH, FIRST] = "look.png"
    """PNG file to write."""
    heads: Annotated[int, Ge(0)] = 6
    """Number of attention heads of the last block that are drawn separately."""
    seed: int = 0
    """Seed of the masks."""


@part
class ReconstructConfig:
    """The model and the images to reconstruct."""

    run: Annotated[Text, PATH, POSITIONAL] = ""
    """A run, a checkpoint folder or a .safetensors file."""
    images: Annotated[Texts, PATH, POSITIONAL] = ()
    """Image files, or anything that --data of pretrain takes; the first eight are drawn."""
    out: Annotated[Text, PATH, FIRST] = "panel.png"
    """PNG file to write."""
    seed: int = 0
    """Seed of the masks."""
