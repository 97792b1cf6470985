"""Configurations of studies and comparisons. This module does not import torch."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

from quarterview.commands.config import FinetuneConfig
from quarterview.config import (
    FIRST,
    MAY_CHANGE,
    PATH,
    POSITIONAL,
    RESEARCH,
    ComposedConfig,
    Ge,
    Gt,
    Le,
    Lt,
    Size,
    Text,
    Texts,
    part,
)
from quarterview.data.config import AugmentConfig, LoaderConfig
from quarterview.errors import UserError, invalid, not_supported, unknown
from quarterview.evaluation.config import LabeledImagesConfig
from quarterview.methods.config import RegularizationConfig
from quarterview.training.config import (
    ComputeConfig,
    Device,
    LayerDecayConfig,
    LoopConfig,
    OptimConfig,
    RunConfig,
)
from quarterview.weights.config import SCRATCH, TuningConfig, parse_num_blocks

# ---------------------------------------------------------------------- studies

MEASURES = ("finetune", "linear", "knn", "corrupted")
"""Kinds of evaluations of an arm. ``finetune:K`` trains only the last K blocks. ``linear@P`` and ``knn@P``
encode P percent of the patches. ``corrupted`` classifies corrupted test images with the network of
``finetune``."""
FINETUNED_MEASURES = ("finetune", "corrupted")
"""Kinds of evaluations that need a fine-tuned network."""
RESERVED_FLAGS = ("out", "seed", "steps", "epochs", "device")
"""Flags of pre-training that an arm cannot set, since the study sets them from its --out, --seed, --seeds,
--budget and --device."""
BudgetKind = Literal["minutes", "images", "flops"]


@part
class StudyConfig:
    """Study."""

    RENAMED: ClassVar[Mapping[str, str]] = {
        "head_width": "proj_hidden_dim",
        "vocabulary": "codebook_size",
    }

    name: Annotated[Text, FIRST, PATH, MAY_CHANGE, POSITIONAL] = ""
    """Required: the name of a study (see quarterview recipes) or a YAML file."""
    data: Annotated[Texts, FIRST, PATH, MAY_CHANGE] = ()
    """Required: images for pre-training, anything that --data of pretrain takes."""
    train: Annotated[Texts, FIRST, PATH, MAY_CHANGE] = ()
    """Required: labelled images to train probes and to fine-tune on."""
    test: Annotated[Texts, FIRST, PATH, MAY_CHANGE] = ()
    """Required: labelled images for evaluation. They are not used to choose anything."""
    out: Annotated[Text, FIRST, PATH, MAY_CHANGE] = ""
    """Required: the folder of the study. The same command resumes a stopped study."""
    budget: Annotated[Text, FIRST] = "30m"
    """Time of the whole study (30m, 2h), in which all arms train on the same number of images; or images of
    each arm (2e6images); or operations of each arm (1e15flops), the same for all arms."""
    seeds: Annotated[int, Ge(1), FIRST, MAY_CHANGE] = 3
    """Runs of each arm; each has other initial weights, another order and other labelled images. More can be
    added when the study is complete."""
    seed: int = 0
    """The first seed; the others are the following integers."""
    base: Annotated[Text, FIRST, PATH, MAY_CHANGE] = "cifar"
    """The pre-training configuration that all arms start from: a recipe (see quarterview recipes) or a YAML
    file."""
    model: Text | None = None
    """Encoder; by default that of the base."""
    image_size: Size | None = None
    """Image size: height and width, or one number for both; by default that of the base."""
    batch_size: Annotated[int | None, Ge(1)] = None
    """Batch size of pre-training; by default that of the base."""
    labels: Annotated[int, Ge(1)] = 2000
    """Labelled training images, the same number for each class; all if there are fewer."""
    tune_steps: Annotated[int | None, Ge(1)] = None
    """Updates of each fine-tuning, with the recipe small. By default 500, or fewer (at least 30) where
    evaluation would take more than half of a budget of time."""
    proj_hidden_dim: Annotated[int | None, Ge(1), RESEARCH] = None
    """Hidden width of the projection heads of SimCLR, BYOL and MoCo v3; the default is slow beside a tiny
    encoder."""
    codebook_size: Annotated[int, Ge(1), RESEARCH] = 512
    """Codebook size (number of visual tokens) of the tokenizer that the study trains."""
    tokenizer_width: Annotated[int | None, Ge(1), RESEARCH] = None
    """Hidden channels of the tokenizer that the study trains."""
    measures: Texts = ()
    """Evaluate by these only: finetune, finetune:K (last K blocks), linear, knn, linear@P or knn@P (P percent
    of the patches visible), corrupted. By default those of each table."""
    workers: Annotated[int | None, Ge(0), MAY_CHANGE] = None
    """Processes that decode images."""
    device: Annotated[Device, MAY_CHANGE] = "auto"
    """Device for training and evaluation."""
    jobs: Annotated[int | None, Ge(1), MAY_CHANGE] = None
    """Parallel runs; by default one for each GPU, or one. On a CPU they share its cores, which is faster for
    small networks."""

    def __post_init__(self) -> None:
        parse_budget(self.budget)
        for measure in self.measures:
            check_measure(measure)

    @property
    def all_seeds(self) -> range:
        """The seeds of the runs of each arm."""
        return range(self.seed, self.seed + self.seeds)

    def check_complete(self) -> None:
        """Raise UserError if a required field is missing."""
        for name, value in (
            ("NAME", self.name),
            ("--data", self.data),
            ("--train", self.train),
            ("--test", self.test),
            ("--out", self.out),
        ):
            if not value:
                raise UserError(
                    f"{name} is missing. Give study NAME --data … --train … --test … --out FOLDER."
                )


def parse_budget(text: str) -> tuple[BudgetKind, float]:
    """Parse --budget: minutes of the whole study, images of each arm, or operations of each arm.

    Returns:
        The kind of budget, and its value in minutes, images or operations.

    Raises:
        UserError: if the text is not a valid budget.
    """
    match = re.fullmatch(r"([\d.]+(?:e\d+)?)(s|m|h|images|flops)", text)
    units = {"s": 1 / 60, "m": 1.0, "h": 60.0}
    try:
        number = float(match[1]) if match else 0.0
    except ValueError:
        number = 0.0
    if match is None or not 0 < number < 1e30:
        raise invalid(
            "--budget",
            text,
            "a time such as 30m or 2h, images such as 2e6images, or operations such as 1e15flops",
        )
    if match[2] in units:
        return "minutes", number * units[match[2]]
    return match[2], number  # type: ignore[return-value]


def check_measure(measure: str) -> None:
    """Raise UserError if the name of a measure is not valid."""
    kind, blocks, visible = parse_measure(measure)
    if kind not in MEASURES or (blocks and kind != "finetune") or (visible and kind in FINETUNED_MEASURES):
        raise unknown("measure", measure, [*MEASURES, "finetune:K", "linear@P", "knn@P"])
    if blocks:
        parse_num_blocks(blocks)
    if visible and not (visible.isdigit() and 1 <= int(visible) <= 100):
        raise UserError(
            f"The measure {measure} has an invalid percentage of visible patches. Give 1 to 100, such as "
            f"{kind}@25."
        )


def parse_measure(measure: str) -> tuple[str, str, str]:
    """Return the kind of a measure, its number of tuned blocks and its percentage of visible patches.

    All three are text; a part that the measure does not have is empty.
    """
    rest, _, visible = measure.partition("@")
    kind, _, blocks = rest.partition(":")
    return kind, blocks, visible


# ---------------------------------------------------------------------- comparisons

PROTOCOL_NAMES = {"finetune": "fine-tuning", "linear": "linear classifier", "knn": "nearest neighbours"}
"""Protocols of a comparison, the most important first, with their names in reports."""
RANDOM_WEIGHTS_ARMS = (SCRATCH, "random")
"""Names of arms that stand for random weights, which are part of every comparison."""


@part
class CompareOptions:
    """Comparison."""

    RENAMED: ClassVar[Mapping[str, str]] = {
        "least_steps": "min_steps",
        "worthwhile": "min_difference",
    }

    arms: Annotated[Texts, FIRST, PATH, POSITIONAL] = ()
    """Runs, checkpoint folders, .safetensors files or timm:NAME. Random weights are always compared; scratch
    and random are accepted and change nothing."""
    counts: Annotated[Texts, FIRST] = ("1%", "10%", "100%")
    """Numbers of labelled training images: percentages or integers."""
    seeds: Annotated[int, Ge(1), FIRST] = 3
    """Seeds; each has its own labelled images, random encoder and fine-tuning runs."""
    protocols: Annotated[Texts, FIRST] = ("knn", "linear", "finetune")
    """Any of knn, linear and finetune."""
    k: Annotated[int, Ge(1)] = 20
    """Nearest neighbours of knn, weighted by exp(cosine / 0.07); all images if there are fewer."""
    min_steps: Annotated[int, Ge(0)] = 500
    """Minimum updates of fine-tuning. 100 epochs of 50 images would be too few for random weights, and the
    comparison would be unfair."""
    scratch_layer_decay: Annotated[float, Gt(0), Le(1)] = 1.0
    """Layer-wise learning rate decay of random weights (table 11 of the paper)."""
    min_difference: Annotated[float, Gt(0), Lt(100)] = 1.0
    """The smallest gain that matters, in percentage points of accuracy."""

    def __post_init__(self) -> None:
        for protocol in self.protocols:
            if protocol not in PROTOCOL_NAMES:
                raise unknown("protocol", protocol, PROTOCOL_NAMES)
        for count in self.counts:
            parse_num_labels(count, 100)

    @property
    def pretrained(self) -> list[str]:
        """The pre-trained arms without duplicates."""
        return [arm for arm in dict.fromkeys(self.arms) if arm not in RANDOM_WEIGHTS_ARMS]


def parse_num_labels(count: str, num_images: int) -> int:
    """Return the number of labelled images that ``10%`` or ``500`` means for `num_images` training images.

    Raises:
        UserError: if the text is neither a percentage nor a positive integer.
    """
    text = count.removesuffix("%")
    try:
        number = float(text) if text != count else int(text)
    except ValueError:
        number = -1.0
    if not number > 0 or (text != count and number > 100):
        raise invalid("--counts", count or "empty", "a percentage such as 10%, or a positive integer")
    return max(1, round(number * num_images / 100)) if text != count else int(number)


@dataclass(frozen=True)
class CompareConfig(ComposedConfig):
    """Configuration of a comparison, and the fine-tuning recipe that all arms share."""

    options: CompareOptions = field(default_factory=CompareOptions)
    images: LabeledImagesConfig = field(default_factory=LabeledImagesConfig)
    run: RunConfig = field(default_factory=RunConfig)
    tuning: TuningConfig = field(default_factory=TuningConfig)
    loop: LoopConfig = field(default_factory=lambda: LoopConfig(epochs=100))
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(blr=1e-3, warmup_epochs=5))
    decay: LayerDecayConfig = field(default_factory=LayerDecayConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    regularization: RegularizationConfig = field(default_factory=RegularizationConfig)
    loader: LoaderConfig = field(default_factory=LoaderConfig)
    compute: ComputeConfig = field(default_factory=ComputeConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.make_finetune_config(SCRATCH)
        if len(self.tuning.blocks) > 1:
            raise not_supported(f"--blocks {' '.join(self.tuning.blocks)}", "compare", "Give one value.")

    def make_finetune_config(self, run: str, **flags: Any) -> FinetuneConfig:
        """Return the configuration to fine-tune one arm.

        Args:
            run: the weights to start from.
            flags: flags that differ from the shared recipe.
        """
        shared = {name: config_part for name, config_part in self.parts().items() if name != "options"}
        return FinetuneConfig(**shared).with_flags(**{"run": run, **flags})

    @property
    def seeds(self) -> range:
        """All seeds of the comparison."""
        return range(self.loop.seed, self.loop.seed + self.options.seeds)

    def check_complete(self) -> None:
        """Raise UserError if a required field is missing."""
        for name, value in (
            ("--train", self.images.train),
            ("--test", self.images.test),
            ("--out", self.run.out),
            ("--protocols", self.options.protocols),
        ):
            if not value:
                raise UserError(f"{name} is missing. Give compare RUN… --train … --test … --out FOLDER.")
        if not self.options.pretrained:
            raise UserError(
                "There is no pre-trained arm. Give a run, a checkpoint folder, a .safetensors file or "
                "timm:NAME. Random weights and raw pixels are always compared."
            )
