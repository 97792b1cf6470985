"""Every command: its place in the help, its configuration, and the function that carries it out.

Nothing is imported here: the command line imports the one that is asked for.
"""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Command:
    """Where a command's configuration and function are, as ``module:name`` below `quarterview`."""

    group: str
    summary: str
    example: str
    config: str
    main: str
    """Called with the configuration, the command line and, if there are any, the options."""
    options: str | None = None
    """What belongs to the command line alone, such as --dry-run."""
    recipes: str | None = None
    """Reads what --recipe names."""


def _command(group: str, name: str, config: str, summary: str, example: str, **more: Any) -> Command:
    return Command(group, summary, f"quarterview {name} {example}", config, f"commands.{name}:main", **more)


_TRAIN, _JUDGE, _USE, _LOOK, _DATA = "Train", "Judge", "Use", "Look", "Images, weights, speed"
COMMANDS: dict[str, Command] = {
    "demo": Command(
        "Start here", "See it work in minutes: generate images, pre-train on them, measure what was learned.",
        "quarterview demo", "commands.config:DemoConfig", "demo:main",
    ),
    "recipes": _command(
        "Start here", "recipes", "commands.config:RecipesConfig",
        "List the named configurations of --recipe, and the named studies.", "",
    ),
    "pretrain": _command(
        _TRAIN, "pretrain", "commands.config:PretrainConfig",
        "Learn from unlabelled images.", "--data photos --out runs/photos --recipe laptop",
        options="commands.config:PretrainOptions", recipes="recipes:read",
    ),
    "tokenizer": _command(
        _TRAIN, "pretrain", "commands.config:PretrainConfig",
        "Learn visual tokens, for --target tokens and --method beit.", "--data photos --out runs/tokens",
        options="commands.config:PretrainOptions", recipes="recipes:read",
    ),
    "finetune": _command(
        _TRAIN, "finetune", "commands.config:FinetuneConfig",
        "Train a classifier from a pre-trained encoder, whole or in part, or from scratch.",
        "runs/photos --train labelled/train --test labelled/test --out runs/tuned",
        options="commands.config:FinetuneOptions", recipes="recipes:read_finetune",
    ),
    "compare": Command(
        _JUDGE, "Did pre-training help? Models beside random weights and raw pixels, and a verdict.",
        "quarterview compare runs/photos --train labelled/train --test labelled/test --out runs/verdict",
        "studies.config:CompareConfig", "studies.compare_command:main",
        options="commands.config:RecipeOptions", recipes="recipes:read_finetune",
    ),
    "doctor": _command(
        _JUDGE, "doctor", "doctor.config:DoctorConfig",
        "Is my run working? The model beside trivial inpainters, its features, its history, its images.",
        "runs/photos",
    ),
    "knn": _command(
        _JUDGE, "knn", "commands.config:KnnConfig",
        "Classify each test image by its nearest labelled ones, in the space of the features.",
        "runs/photos --train labelled/train --test labelled/test",
    ),
    "linear": _command(
        _JUDGE, "linear", "commands.config:LinearConfig", "Train a linear classifier on frozen features.",
        "runs/photos --train labelled/train --test labelled/test",
    ),
    "robustness": _command(
        _JUDGE, "robustness", "commands.config:RobustnessCommandConfig",
        "Judge a classifier on corrupted images, as ImageNet-C has them, and on other sets.",
        "runs/tuned --test labelled/test",
    ),
    "study": Command(
        _JUDGE, "The paper's ablations and comparisons on your images.",
        "quarterview study mask-ratio --data photos --train own/train --test own/test --out studies/x",
        "studies.config:StudyConfig", "studies.study_command:main",
    ),
    "embed": _command(
        _USE, "embed", "commands.config:EmbedCommandConfig", "Write the embeddings of images as Parquet.",
        "runs/photos --data photos --out vectors",
    ),
    "export": _command(
        _USE, "export", "weights.config:ExportConfig", "Write a model as others open it.",
        "runs/photos --to timm --out exported",
    ),
    "push": _command(
        _USE, "push", "weights.config:HubConfig", "Upload an export to the Hugging Face Hub.",
        "exported OWNER/NAME",
    ),
    "look": _command(
        _LOOK, "look", "commands.config:LookCommandConfig",
        "Draw what a model sees in images: attention, groups of patches, reconstruction.",
        "runs/photos a.jpg b.jpg",
    ),
    "reconstruct": _command(
        _LOOK, "reconstruct", "commands.config:ReconstructCommandConfig",
        "Draw what a model makes of images of which it sees a quarter.", "runs/photos a.jpg b.jpg",
    ),
    "inspect": _command(
        _DATA, "inspect", "weights.config:InspectConfig",
        "Say what weights are, wherever they are from; or in what two of them differ.", "runs/photos",
    ),
    "pack": _command(
        _DATA, "pack", "data.pack_config:PackConfig",
        "Make images small once, in few files that are read fast.",
        "photos --out packed",
    ),
    "bench": _command(
        _DATA, "bench", "commands.config:BenchConfig",
        "How fast would a pre-training run here, where does its time go, and how long would it take?",
        "--data photos --recipe laptop",
        options="commands.config:RecipeOptions", recipes="recipes:read",
    ),
}  # fmt: skip
