"""What a study and a comparison are told. Nothing here imports torch."""

import re
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from quarterview.commands.config import FinetuneConfig
from quarterview.config import (
    FIRST,
    MAY_CHANGE,
    PATH,
    POSITIONAL,
    RESEARCH,
    Composed,
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
from quarterview.errors import UserError, unknown
from quarterview.evaluation.config import LabelledImagesConfig
from quarterview.methods.config import RegularizationConfig
from quarterview.training.config import (
    ComputeConfig,
    Device,
    LayerDecayConfig,
    LoopConfig,
    OptimConfig,
    RunConfig,
)
from quarterview.weights.config import SCRATCH, TuningConfig, count_blocks

# ---------------------------------------------------------------------- studies

MEASURES = ("finetune", "linear", "knn", "corrupted")
"""How an arm is evaluated. ``finetune:K`` trains the last K blocks alone; ``linear@P`` and ``knn@P`` see P
percent of the patches; ``corrupted`` shows corrupted test images to what ``finetune`` made."""
TUNED = ("finetune", "corrupted")
"""Measures of networks that were fine-tuned."""
DECIDED = ("out", "seed", "steps", "epochs", "device")
"""Flags of pre-training that no arm has to itself: the study decides them, by its own --out, --seed, --seeds,
--budget and --device."""
BudgetKind = Literal["minutes", "images", "flops"]


@part
class StudyConfig:
    """Study."""

    name: Annotated[Text, FIRST, PATH, MAY_CHANGE, POSITIONAL] = ""
    """Required: a study's name (see quarterview recipes), or a YAML file."""
    data: Annotated[Texts, FIRST, PATH, MAY_CHANGE] = ()
    """Required: images to pre-train on, anything that --data of pretrain takes."""
    train: Annotated[Texts, FIRST, PATH, MAY_CHANGE] = ()
    """Required: labelled images that probes and fine-tuning learn from."""
    test: Annotated[Texts, FIRST, PATH, MAY_CHANGE] = ()
    """Required: labelled images to be judged on. Nothing is chosen by them."""
    out: Annotated[Text, FIRST, PATH, MAY_CHANGE] = ""
    """Required: the study's folder; the same command goes on where it was stopped."""
    budget: Annotated[Text, FIRST] = "30m"
    """Time of the whole study (30m, 2h), in which all arms see equally many images. Or, for each arm, images
    (2e6images) or operations (1e15flops), with which all arms compute equally much."""
    seeds: Annotated[int, Ge(1), FIRST, MAY_CHANGE] = 3
    """Runs of each arm; each draws other initial weights, another order and other labelled images. More may
    be added when the study is done."""
    seed: int = 0
    """The first seed; the others follow it."""
    base: Annotated[Text, FIRST, PATH, MAY_CHANGE] = "cifar"
    """The pre-training that all arms begin from: a recipe (see quarterview recipes) or a YAML file."""
    model: Text | None = None
    """Another encoder than the base's."""
    image_size: Size | None = None
    """Another image size than the base's: height and width, or one number for both."""
    batch_size: Annotated[int | None, Ge(1)] = None
    """Another batch size of pre-training than the base's."""
    labels: Annotated[int, Ge(1)] = 2000
    """Labelled images that probes and fine-tuning learn from, equally many a class; or all, if fewer."""
    tune_steps: Annotated[int | None, Ge(1)] = None
    """Updates of each fine-tuning, under the recipe small. By default 500, or fewer (30 at least) where
    judging would take more than half of a budget of minutes."""
    head_width: Annotated[int | None, Ge(1), RESEARCH] = None
    """Hidden width of the heads of SimCLR, BYOL and MoCo v3, which cost more than a tiny encoder."""
    vocabulary: Annotated[int, Ge(1), RESEARCH] = 512
    """Visual tokens of the tokenizer that the study trains: the size of its codebook."""
    tokenizer_width: Annotated[int | None, Ge(1), RESEARCH] = None
    """Channels inside that tokenizer."""
    measures: Texts = ()
    """Judge by these alone: finetune, finetune:K, linear, knn, linear@P or knn@P with P percent of the
    patches visible, corrupted. By default each table says."""
    workers: Annotated[int | None, Ge(0), MAY_CHANGE] = None
    """Processes that decode images."""
    device: Annotated[Device, MAY_CHANGE] = "auto"
    """Where to compute."""
    jobs: Annotated[int | None, Ge(1), MAY_CHANGE] = None
    """Runs at a time; by default one on each GPU, or one. On a CPU they share its cores, which small networks
    use better so."""

    def __post_init__(self) -> None:
        read_budget(self.budget)
        for measure in self.measures:
            check_measure(measure)

    @property
    def all_seeds(self) -> range:
        """The seeds of the runs of each arm."""
        return range(self.seed, self.seed + self.seeds)

    def check_complete(self) -> None:
        """Raises UserError if a study cannot be started by this, because something required is missing."""
        for name, given in (
            ("NAME", self.name),
            ("--data", self.data),
            ("--train", self.train),
            ("--test", self.test),
            ("--out", self.out),
        ):
            if not given:
                raise UserError(
                    f"{name} is missing. Give study NAME --data … --train … --test … --out FOLDER."
                )


def read_budget(text: str) -> tuple[BudgetKind, float]:
    """What a budget means: minutes of the whole study, images of each arm, or operations of each arm.

    Raises:
        UserError: if it means none of these.
    """
    match = re.fullmatch(r"([\d.]+(?:e\d+)?)(s|m|h|images|flops)", text)
    units = {"s": 1 / 60, "m": 1.0, "h": 60.0}
    try:
        number = float(match[1]) if match else 0.0
    except ValueError:
        number = 0.0
    if match is None or not 0 < number < 1e30:
        raise UserError(
            f"--budget {text} is not accepted. Give a time such as 30m or 2h, images such as 2e6images, or "
            "operations such as 1e15flops."
        )
    if match[2] in units:
        return "minutes", number * units[match[2]]
    return match[2], number  # type: ignore[return-value]


def check_measure(measure: str) -> None:
    """Raises UserError if an arm cannot be judged so."""
    kind, blocks, visible = parts_of(measure)
    if kind not in MEASURES or (blocks and kind != "finetune") or (visible and kind in TUNED):
        raise unknown("measure", measure, [*MEASURES, "finetune:K", "linear@P", "knn@P"])
    if blocks:
        count_blocks(blocks)
    if visible and not (visible.isdigit() and 1 <= int(visible) <= 100):
        raise UserError(
            f"The measure {measure} is not accepted. Give 1 to 100 percent of the patches, such as {kind}@25."
        )


def parts_of(measure: str) -> tuple[str, str, str]:
    """A measure's kind, the blocks that are tuned, and the percentage of the patches that is visible."""
    rest, _, visible = measure.partition("@")
    kind, _, blocks = rest.partition(":")
    return kind, blocks, visible


# ---------------------------------------------------------------------- comparisons

PROTOCOLS = {"finetune": "fine-tuning", "linear": "linear classifier", "knn": "nearest neighbours"}
"""What each protocol of a comparison is called, the one that counts most first."""
RANDOM_WEIGHTS = (SCRATCH, "random")
"""Words for random weights among the arms of a comparison."""


@part
class CompareOptions:
    """Comparison."""

    arms: Annotated[Texts, FIRST, PATH, POSITIONAL] = ()
    """Runs, checkpoint folders, .safetensors files or timm:NAME. scratch and random, which stand in
    every comparison, may be named too."""
    counts: Annotated[Texts, FIRST] = ("1%", "10%", "100%")
    """How many of the training images have labels: shares of them or numbers."""
    seeds: Annotated[int, Ge(1), FIRST] = 3
    """How many choices of labelled images, random encoders and fine-tuning runs there are of each."""
    protocols: Annotated[Texts, FIRST] = ("knn", "linear", "finetune")
    """knn, linear, finetune: any of them."""
    k: Annotated[int, Ge(1)] = 20
    """Neighbours that vote, each by exp(cosine / 0.07); all where there are fewer images."""
    least_steps: Annotated[int, Ge(0)] = 500
    """Fine-tune for at least so many updates: a hundred passes over fifty images are too few of them
    for random weights, and an easy win is no help."""
    scratch_layer_decay: Annotated[float, Gt(0), Le(1)] = 1.0
    """Layer decay of random weights, which have no lower layers worth protecting (table 11)."""
    worthwhile: Annotated[float, Gt(0), Lt(100)] = 1.0
    """The smallest gain worth having, in points of accuracy."""

    def __post_init__(self) -> None:
        for protocol in self.protocols:
            if protocol not in PROTOCOLS:
                raise unknown("protocol", protocol, PROTOCOLS)
        for count in self.counts:
            labelled_count(count, 100)

    @property
    def pretrained(self) -> list[str]:
        """The pre-trained arms, each once."""
        return [arm for arm in dict.fromkeys(self.arms) if arm not in RANDOM_WEIGHTS]


def labelled_count(count: str, images: int) -> int:
    """How many labelled images ``10%`` or ``500`` means. Raises UserError if it means none."""
    text = count.removesuffix("%")
    try:
        number = float(text) if text != count else int(text)
    except ValueError:
        number = -1.0
    if not number > 0 or (text != count and number > 100):
        raise UserError(f"--counts {count} is not accepted. Give a share such as 10%, or a number.")
    return max(1, round(number * images / 100)) if text != count else int(number)


@dataclass(frozen=True)
class CompareConfig(Composed):
    """What is compared, and the recipe of fine-tuning, which is one for all."""

    options: CompareOptions = field(default_factory=CompareOptions)
    images: LabelledImagesConfig = field(default_factory=LabelledImagesConfig)
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
        self.finetuning(SCRATCH)
        if len(self.tuning.blocks) > 1:
            raise UserError(f"--blocks {' '.join(self.tuning.blocks)} are several recipes. Give one value.")

    def finetuning(self, run: str, **flags: Any) -> FinetuneConfig:
        """The fine-tuning of one arm.

        Args:
            run: the weights that it starts from.
            flags: in what it differs from the recipe of all.
        """
        shared = {name: its for name, its in self.parts().items() if name != "options"}
        return FinetuneConfig(**shared).with_flags(**{"run": run, **flags})

    @property
    def seeds(self) -> range:
        """The seeds of the comparison."""
        return range(self.loop.seed, self.loop.seed + self.options.seeds)

    def check_complete(self) -> None:
        """Raises UserError if nothing can be compared by this, because something required is missing."""
        for name, given in (
            ("--train", self.images.train),
            ("--test", self.images.test),
            ("--out", self.run.out),
            ("--protocols", self.options.protocols),
        ):
            if not given:
                raise UserError(f"{name} is missing. Give compare RUN… --train … --test … --out FOLDER.")
        if not self.options.pretrained:
            raise UserError(
                "There is no pre-trained arm. Give a run, a checkpoint folder, a .safetensors file or "
                "timm:NAME, beside which scratch, random and raw pixels stand anyway."
            )
