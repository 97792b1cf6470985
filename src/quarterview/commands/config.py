"""The composed configuration of each command: which parts it is made of, and what it checks across them."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar

from quarterview.commands.v0_1 import upgrade_pretraining
from quarterview.config import FIRST, PATH, Composed, Ge, Gt, Text, Texts, part
from quarterview.data.config import AugmentConfig, DataConfig, LoaderConfig, ViewConfig
from quarterview.errors import UserError
from quarterview.evaluation.config import (
    EmbedConfig,
    KnnClassifierConfig,
    LabelledImagesConfig,
    LinearClassifierConfig,
    LookConfig,
    OnlineProbeConfig,
    ProbeConfig,
    ReconstructConfig,
    RobustnessConfig,
)
from quarterview.methods.config import (
    MAE,
    BEiT,
    Denoising,
    MethodConfig,
    RegularizationConfig,
    autoencoder_config,
)
from quarterview.models.config import MAEConfig, ViTConfig
from quarterview.training.config import (
    ComputeConfig,
    LayerDecayConfig,
    LoopConfig,
    OptimConfig,
    ResumeConfig,
    RunConfig,
)
from quarterview.weights.config import InitConfig, StartConfig, TuningConfig


@dataclass(frozen=True)
class PretrainConfig(Composed):
    """Everything about a pre-training run. Each field of a part is a flag of ``quarterview pretrain``.

    ``PretrainConfig.from_flags(data="photos", out="runs/x", epochs=20)`` takes them flat, as keywords.
    """

    RENAMED: ClassVar[Mapping[str, str]] = {"objective": "method"}

    run: RunConfig = field(default_factory=RunConfig)
    data: DataConfig = field(default_factory=DataConfig)
    model: ViTConfig = field(default_factory=ViTConfig)
    method: MethodConfig = field(default_factory=MAE)
    loop: LoopConfig = field(default_factory=LoopConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    view: ViewConfig = field(default_factory=ViewConfig)
    init: InitConfig = field(default_factory=InitConfig)
    resume: ResumeConfig = field(default_factory=ResumeConfig)
    loader: LoaderConfig = field(default_factory=LoaderConfig)
    compute: ComputeConfig = field(default_factory=ComputeConfig)
    probe: OnlineProbeConfig = field(default_factory=OnlineProbeConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        method, given = self.method, f"--method {self.method.name}"
        if isinstance(method, MAE | BEiT | Denoising):
            self.autoencoder()
        elif self.init.init_from is not None:
            raise UserError(
                f"--init-from is not supported with {given}. Remove it, or use --method mae, beit or "
                "denoising."
            )
        if isinstance(method, Denoising) and self.compute.compile:
            raise UserError(
                "--compile is not supported with --method denoising. Remove it, or use --method mae."
            )
        if isinstance(method, RegularizationConfig):
            method.check_batch(self.loop.batch_size)
        if method.compares_batch and self.loop.accum_iter > 1:
            by = given if method.compares else f"--uniformity {getattr(method, 'uniformity', 0)}"
            raise UserError(
                f"--accum-iter {self.loop.accum_iter} is not supported with {by}, which compares the images "
                "of a batch, so that parts of it would be another task. Give --accum-iter 1, and save memory "
                "by --grad-checkpointing or a smaller --batch-size."
            )
        if method.compares and self.compute.parallel == "fsdp":
            raise UserError(f"--parallel fsdp is not supported with {given}. Use --parallel ddp.")
        if method.name == "tokenizer" and self.probe.probe_train:
            raise UserError(
                "--probe-train is not supported with --method tokenizer, which has no features. Remove it."
            )

    @classmethod
    def upgrade(cls, flags: dict[str, Any]) -> dict[str, Any]:
        """Flags as version 0.1 wrote them into a file, by today's names."""
        return upgrade_pretraining(flags)

    def autoencoder(self, vocabulary: int | None = None) -> MAEConfig:
        """The masked autoencoder that is trained.

        Args:
            vocabulary: how many visual tokens there are, for a target of tokens.

        Raises:
            UserError: if encoder and method do not fit each other.
        """
        assert isinstance(self.method, MAE | BEiT | Denoising)
        return autoencoder_config(self.method, self.model, vocabulary)

    def check_complete(self) -> None:
        """Raises UserError if a run cannot be started by this, because something required is missing."""
        if not self.run.out:
            raise UserError("The run has no folder. Give --out RUN.")
        if not self.data.data:
            raise UserError(
                "There are no images. Give --data with folders, packed stores, tar shards, .txt lists of "
                "paths, parquet, .npy/.npz arrays, torchvision:NAME or shapes."
            )
        if isinstance(self.method, BEiT) and self.method.tokenizer is None:
            raise UserError("--method beit has no tokenizer. Give --tokenizer RUN.")


@part
class RecipeOptions:
    """Command."""

    recipe: Annotated[Text | None, FIRST] = None
    """Start from a named configuration (see quarterview recipes) or a YAML file; flags go first."""


@part
class PretrainOptions(RecipeOptions):
    """Command."""

    dry_run: bool = False
    """Show the resolved configuration, parameters, steps and memory, and train nothing."""
    slurm: Texts | None = None
    """Train as a Slurm job, by words NAME=VALUE: nodes=2 gpus=8 hours=24 partition=main, … (docs/scale.md
    lists the names)."""


@part
class FinetuneOptions(RecipeOptions):
    """Command."""

    table: bool = False
    """Show every parameter's learning rate and weight decay, and train nothing."""
    slurm: Texts | None = None
    """Train as a Slurm job, by words NAME=VALUE: gpus=8 hours=4 partition=main, … (docs/scale.md lists the
    names)."""


# ---------------------------------------------------------------------- fine-tuning


@dataclass(frozen=True)
class FinetuneConfig(Composed):
    """Everything about a fine-tuning run. The defaults are the paper's for ViT-B (table 9), with the random
    erasing of the official code."""

    start: StartConfig = field(default_factory=StartConfig)
    images: LabelledImagesConfig = field(default_factory=LabelledImagesConfig)
    run: RunConfig = field(default_factory=RunConfig)
    tuning: TuningConfig = field(default_factory=TuningConfig)
    loop: LoopConfig = field(default_factory=lambda: LoopConfig(epochs=100))
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(blr=1e-3, warmup_epochs=5))
    decay: LayerDecayConfig = field(default_factory=LayerDecayConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    regularization: RegularizationConfig = field(default_factory=RegularizationConfig)
    resume: ResumeConfig = field(default_factory=ResumeConfig)
    loader: LoaderConfig = field(default_factory=LoaderConfig)
    compute: ComputeConfig = field(default_factory=ComputeConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.regularization.check_batch(self.loop.batch_size)

    def check_complete(self) -> None:
        """Raises UserError if a run cannot be started by this, because something required is missing."""
        for name, given in (
            ("RUN", self.start.run),
            ("--train", self.images.train),
            ("--test", self.images.test),
            ("--out", self.run.out),
        ):
            if not given:
                raise UserError(f"{name} is missing. Give finetune RUN --train … --test … --out ….")


# ---------------------------------------------------------------------- timing


@part
class BenchOptions:
    """Timing."""

    seconds: Annotated[float, Gt(0), FIRST] = 20.0
    """How long steps are timed, after those that warm up; reading images is timed for as long again."""
    images: Annotated[int | None, Ge(1)] = None
    """Images in the set that hours are told for; by default those of --data, else ImageNet-1K's 1,281,167."""
    json: Annotated[Text | None, PATH] = None
    """A file to write the figures to."""


@dataclass(frozen=True)
class BenchConfig(Composed):
    """What to time: a pre-training, and how long to look."""

    RENAMED: ClassVar[Mapping[str, str]] = {"objective": "method"}

    options: BenchOptions = field(default_factory=BenchOptions)
    data: DataConfig = field(default_factory=DataConfig)
    model: ViTConfig = field(default_factory=ViTConfig)
    method: MethodConfig = field(default_factory=MAE)
    loop: LoopConfig = field(default_factory=LoopConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    view: ViewConfig = field(default_factory=ViewConfig)
    loader: LoaderConfig = field(default_factory=LoaderConfig)
    compute: ComputeConfig = field(default_factory=ComputeConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.method, MAE) or self.method.target != "pixels":
            target = getattr(self.method, "target", "")
            raise UserError(
                f"bench times masked autoencoders of pixels, not --method {self.method.name}"
                f"{f' --target {target}' if target else ''}. Remove these flags."
            )
        self.pretraining()

    def pretraining(self) -> PretrainConfig:
        """The pre-training that is timed."""
        return PretrainConfig(**{name: its for name, its in self.parts().items() if name != "options"})


# ---------------------------------------------------------------------- commands without a run


@part
class DemoConfig:
    """Demo."""

    out: Annotated[Text, FIRST, PATH] = "runs/demo"
    """The run's folder; made anew each time."""
    seed: Annotated[int, FIRST] = 0
    """Seed of every random draw."""


@part
class RecipesConfig:
    """Recipes."""


# ---------------------------------------------------------------------- evaluation


@dataclass(frozen=True)
class KnnConfig(Composed):
    """Classify each test image by its nearest labelled ones, in the space of the features."""

    images: LabelledImagesConfig = field(default_factory=LabelledImagesConfig)
    probe: ProbeConfig = field(default_factory=ProbeConfig)
    classifier: KnnClassifierConfig = field(default_factory=KnnClassifierConfig)


@dataclass(frozen=True)
class LinearConfig(Composed):
    """Train a linear classifier on frozen features."""

    images: LabelledImagesConfig = field(default_factory=LabelledImagesConfig)
    probe: ProbeConfig = field(default_factory=ProbeConfig)
    classifier: LinearClassifierConfig = field(default_factory=LinearClassifierConfig)


@dataclass(frozen=True)
class RobustnessCommandConfig(Composed):
    """Judge a classifier on corrupted images, as ImageNet-C has them, and on other sets."""

    robustness: RobustnessConfig = field(default_factory=RobustnessConfig)


@dataclass(frozen=True)
class EmbedCommandConfig(Composed):
    """Write the embeddings of images as Parquet: `quarterview embed RUN --data photos --out DIR`."""

    embed: EmbedConfig = field(default_factory=EmbedConfig)


@dataclass(frozen=True)
class LookCommandConfig(Composed):
    """Draw what a model sees in images: attention, groups of patches, reconstruction."""

    look: LookConfig = field(default_factory=LookConfig)


@dataclass(frozen=True)
class ReconstructCommandConfig(Composed):
    """Draw what a model makes of images of which it sees a quarter."""

    reconstruct: ReconstructConfig = field(default_factory=ReconstructConfig)
