"""The composed configuration of each command, with checks across its parts."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar

from quarterview.commands.v0_1 import upgrade_flags
from quarterview.config import FIRST, PATH, ComposedConfig, Ge, Gt, Text, Texts, part
from quarterview.data.config import AugmentConfig, DataConfig, LoaderConfig, ViewConfig
from quarterview.errors import UserError, not_supported
from quarterview.evaluation.config import (
    EmbedConfig,
    KnnClassifierConfig,
    LabeledImagesConfig,
    LinearClassifierConfig,
    LookConfig,
    OnlineProbeConfig,
    ProbeConfig,
    ReconstructConfig,
    RobustnessConfig,
)
from quarterview.methods.config import (
    BEiTConfig,
    DenoisingConfig,
    MAEMethodConfig,
    MethodConfig,
    RegularizationConfig,
    make_mae_config,
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
class PretrainConfig(ComposedConfig):
    """Configuration of pre-training. Each field of a part is a flag of ``quarterview pretrain``.

    Example: ``PretrainConfig.from_flags(data="photos", out="runs/x", epochs=20)``.
    """

    RENAMED: ClassVar[Mapping[str, str]] = {"objective": "method"}

    run: RunConfig = field(default_factory=RunConfig)
    data: DataConfig = field(default_factory=DataConfig)
    model: ViTConfig = field(default_factory=ViTConfig)
    method: MethodConfig = field(default_factory=MAEMethodConfig)
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
        if isinstance(method, MAEMethodConfig | BEiTConfig | DenoisingConfig):
            self.autoencoder()
        elif self.init.init_from is not None:
            raise not_supported("--init-from", given, "Remove it, or use --method mae, beit or denoising.")
        if isinstance(method, DenoisingConfig) and self.compute.compile:
            raise not_supported("--compile", given, "Remove it, or use --method mae.")
        if isinstance(method, RegularizationConfig):
            method.check_batch_size(self.loop.batch_size)
        if method.needs_whole_batch and self.loop.accum_iter > 1:
            uniformity = f"--uniformity {getattr(method, 'uniformity', 0)}"
            raise not_supported(
                f"--accum-iter {self.loop.accum_iter}",
                f"{given if method.uses_two_views else uniformity}, which compares the images of a batch",
                "Use --accum-iter 1; --grad-checkpointing or a smaller --batch-size saves memory.",
            )
        if method.uses_two_views and self.compute.parallel == "fsdp":
            raise not_supported("--parallel fsdp", given, "Use --parallel ddp.")
        if method.name == "tokenizer" and self.probe.probe_train:
            raise not_supported("--probe-train", f"{given}, which has no features", "Remove it.")

    @classmethod
    def upgrade(cls, flags: dict[str, Any]) -> dict[str, Any]:
        """Convert flags from a file of version 0.1 to those of this version."""
        return upgrade_flags(flags)

    def autoencoder(self, codebook_size: int | None = None) -> MAEConfig:
        """Return the configuration of the masked autoencoder to train.

        Args:
            codebook_size: the tokenizer's codebook size, for --target tokens.

        Raises:
            UserError: if encoder and method do not fit each other.
        """
        assert isinstance(self.method, MAEMethodConfig | BEiTConfig | DenoisingConfig)
        return make_mae_config(self.method, self.model, codebook_size)

    def check_complete(self) -> None:
        """Raise UserError if a required flag is missing."""
        if not self.run.out:
            raise UserError("The run has no folder. Give --out RUN.")
        if not self.data.data:
            raise UserError(
                "No images are given. Give --data with folders, packed stores, tar shards, .txt lists of "
                "paths, parquet, .npy/.npz arrays, torchvision:NAME or shapes."
            )
        if isinstance(self.method, BEiTConfig) and self.method.tokenizer is None:
            raise UserError("--method beit needs a tokenizer. Give --tokenizer RUN.")


@part
class RecipeOptions:
    """Command."""

    recipe: Annotated[Text | None, FIRST] = None
    """A named configuration (see quarterview recipes) or a YAML file, which other flags override."""


@part
class PretrainOptions(RecipeOptions):
    """Command."""

    dry_run: bool = False
    """Print the configuration, parameters, steps and memory, without training."""
    slurm: Texts | None = None
    """Submit a Slurm job with settings NAME=VALUE: nodes=2 gpus=8 hours=24 partition=main, … (docs/scale.md
    lists the names)."""


@part
class FinetuneOptions(RecipeOptions):
    """Command."""

    table: bool = False
    """Print every parameter's learning rate and weight decay, without training."""
    slurm: Texts | None = None
    """Submit a Slurm job with settings NAME=VALUE: gpus=8 hours=4 partition=main, … (docs/scale.md lists the
    names)."""


# ---------------------------------------------------------------------- fine-tuning


@dataclass(frozen=True)
class FinetuneConfig(ComposedConfig):
    """Configuration of fine-tuning. The defaults are the paper's for ViT-B (table 9), with the random erasing
    of the official code."""

    start: StartConfig = field(default_factory=StartConfig)
    images: LabeledImagesConfig = field(default_factory=LabeledImagesConfig)
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
        self.regularization.check_batch_size(self.loop.batch_size)

    def check_complete(self) -> None:
        """Raise UserError if a required flag is missing."""
        for name, given in (
            ("RUN", self.start.run),
            ("--train", self.images.train),
            ("--test", self.images.test),
            ("--out", self.run.out),
        ):
            if not given:
                raise UserError(f"{name} is missing. Give finetune RUN --train … --test … --out ….")


# ---------------------------------------------------------------------- benchmark


@part
class BenchOptions:
    """Benchmark."""

    seconds: Annotated[float, Gt(0), FIRST] = 20.0
    """Seconds to time training steps, after a warm-up, and as many to time the reading of images."""
    images: Annotated[int | None, Ge(1)] = None
    """Number of training images for the estimated hours; by default those of --data, else ImageNet-1K's
    1,281,167."""
    json: Annotated[Text | None, PATH] = None
    """File to write the result to."""


@dataclass(frozen=True)
class BenchConfig(ComposedConfig):
    """Configuration of bench: the pre-training to time, and for how long."""

    RENAMED: ClassVar[Mapping[str, str]] = {"objective": "method"}

    options: BenchOptions = field(default_factory=BenchOptions)
    data: DataConfig = field(default_factory=DataConfig)
    model: ViTConfig = field(default_factory=ViTConfig)
    method: MethodConfig = field(default_factory=MAEMethodConfig)
    loop: LoopConfig = field(default_factory=LoopConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    view: ViewConfig = field(default_factory=ViewConfig)
    loader: LoaderConfig = field(default_factory=LoaderConfig)
    compute: ComputeConfig = field(default_factory=ComputeConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.method, MAEMethodConfig) or self.method.target != "pixels":
            target = getattr(self.method, "target", "")
            raise UserError(
                f"bench is not supported with --method {self.method.name}"
                f"{f' --target {target}' if target else ''}. Use --method mae --target pixels."
            )
        self.pretraining()

    def pretraining(self) -> PretrainConfig:
        """Return the configuration of the pre-training to time."""
        return PretrainConfig(**{name: part for name, part in self.parts().items() if name != "options"})


# ---------------------------------------------------------------------- demo and recipes


@part
class DemoConfig:
    """Demo."""

    out: Annotated[Text, FIRST, PATH] = "runs/demo"
    """The run's folder, which is overwritten."""
    seed: Annotated[int, FIRST] = 0
    """Seed of all random draws."""


@part
class RecipesConfig:
    """Recipes."""


# ---------------------------------------------------------------------- evaluation


@dataclass(frozen=True)
class KnnConfig(ComposedConfig):
    """Evaluate features by k-nearest-neighbour classification."""

    images: LabeledImagesConfig = field(default_factory=LabeledImagesConfig)
    probe: ProbeConfig = field(default_factory=ProbeConfig)
    classifier: KnnClassifierConfig = field(default_factory=KnnClassifierConfig)


@dataclass(frozen=True)
class LinearConfig(ComposedConfig):
    """Evaluate frozen features by a linear classifier."""

    images: LabeledImagesConfig = field(default_factory=LabeledImagesConfig)
    probe: ProbeConfig = field(default_factory=ProbeConfig)
    classifier: LinearClassifierConfig = field(default_factory=LinearClassifierConfig)


@dataclass(frozen=True)
class RobustnessCommandConfig(ComposedConfig):
    """Evaluate a classifier on corrupted images (ImageNet-C) and on other test sets."""

    robustness: RobustnessConfig = field(default_factory=RobustnessConfig)


@dataclass(frozen=True)
class EmbedCommandConfig(ComposedConfig):
    """Write embeddings of images to Parquet files: `quarterview embed RUN --data photos --out DIR`."""

    embed: EmbedConfig = field(default_factory=EmbedConfig)


@dataclass(frozen=True)
class LookCommandConfig(ComposedConfig):
    """Draw attention maps, principal components of patches and reconstructions."""

    look: LookConfig = field(default_factory=LookConfig)


@dataclass(frozen=True)
class ReconstructCommandConfig(ComposedConfig):
    """Draw reconstructions of masked images."""

    reconstruct: ReconstructConfig = field(default_factory=ReconstructConfig)
