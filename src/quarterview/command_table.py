"""Table of all commands: help, configuration class and main function.

Commands are given as strings, so that the command line imports only the one that is called.
"""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Command:
    """A command. Classes and functions are given as ``module:name`` below `quarterview`."""

    group: str
    summary: str
    example: str
    config: str
    """The configuration class."""
    main: str
    """The function to call with the configuration, the command line and, if there are any, the options."""
    options: str | None = None
    """The part with flags that only the command line has, such as --dry-run."""
    recipes: str | None = None
    """The function that reads the recipe of --recipe."""


def _command(group: str, name: str, config: str, summary: str, example: str, **more: Any) -> Command:
    return Command(group, summary, f"quarterview {name} {example}", config, f"commands.{name}:main", **more)


_TRAIN, _EVALUATE, _USE, _VISUALIZE, _DATA = "Train", "Evaluate", "Use", "Visualize", "Images, weights, speed"
COMMANDS: dict[str, Command] = {
    "demo": Command(
        "Start here", "Generate images, pre-train on them and evaluate the features, in minutes.",
        "quarterview demo", "commands.config:DemoConfig", "demo:main",
    ),
    "recipes": _command(
        "Start here", "recipes", "commands.config:RecipesConfig",
        "List the recipes (named configurations of --recipe) and the named studies.", "",
    ),
    "pretrain": _command(
        _TRAIN, "pretrain", "commands.config:PretrainConfig",
        "Pre-train an encoder on unlabelled images.", "--data photos --out runs/photos --recipe laptop",
        options="commands.config:PretrainOptions", recipes="recipes:read_pretrain_recipe",
    ),
    "tokenizer": _command(
        _TRAIN, "pretrain", "commands.config:PretrainConfig",
        "Train a tokenizer of visual tokens, for --target tokens and --method beit.",
        "--data photos --out runs/tokens",
        options="commands.config:PretrainOptions", recipes="recipes:read_pretrain_recipe",
    ),
    "finetune": _command(
        _TRAIN, "finetune", "commands.config:FinetuneConfig",
        "Fine-tune a pre-trained encoder as a classifier, or train one from scratch.",
        "runs/photos --train labelled/train --test labelled/test --out runs/tuned",
        options="commands.config:FinetuneOptions", recipes="recipes:read_finetune_recipe",
    ),
    "compare": Command(
        _EVALUATE, "Test whether pre-training helped, against random weights and raw pixels.",
        "quarterview compare runs/photos --train labelled/train --test labelled/test --out runs/verdict",
        "studies.config:CompareConfig", "studies.compare_command:main",
        options="commands.config:RecipeOptions", recipes="recipes:read_finetune_recipe",
    ),
    "doctor": _command(
        _EVALUATE, "doctor", "doctor.config:DoctorConfig",
        "Check a run for problems: its loss against trivial inpainting, its features, history and images.",
        "runs/photos",
    ),
    "knn": _command(
        _EVALUATE, "knn", "commands.config:KnnConfig",
        "Evaluate features by k-nearest-neighbour classification.",
        "runs/photos --train labelled/train --test labelled/test",
    ),
    "linear": _command(
        _EVALUATE, "linear", "commands.config:LinearConfig",
        "Evaluate frozen features by a linear classifier.",
        "runs/photos --train labelled/train --test labelled/test",
    ),
    "robustness": _command(
        _EVALUATE, "robustness", "commands.config:RobustnessCommandConfig",
        "Evaluate a classifier on corrupted images (ImageNet-C) and on other test sets.",
        "runs/tuned --test labelled/test",
    ),
    "study": Command(
        _EVALUATE, "Run the paper's ablations and comparisons on your images.",
        "quarterview study mask-ratio --data photos --train own/train --test own/test --out studies/x",
        "studies.config:StudyConfig", "studies.study_command:main",
    ),
    "embed": _command(
        _USE, "embed", "commands.config:EmbedCommandConfig", "Write embeddings of images to Parquet files.",
        "runs/photos --data photos --out vectors",
    ),
    "export": _command(
        _USE, "export", "weights.config:ExportConfig",
        "Export a model to timm, transformers, ONNX, safetensors or torch.export.",
        "runs/photos --to timm --out exported",
    ),
    "push": _command(
        _USE, "push", "weights.config:HubConfig", "Upload an export to the Hugging Face Hub.",
        "exported OWNER/NAME",
    ),
    "look": _command(
        _VISUALIZE, "look", "commands.config:LookCommandConfig",
        "Draw attention maps, principal components of patches and reconstructions.",
        "runs/photos a.jpg b.jpg",
    ),
    "reconstruct": _command(
        _VISUALIZE, "reconstruct", "commands.config:ReconstructCommandConfig",
        "Draw reconstructions of masked images.", "runs/photos a.jpg b.jpg",
    ),
    "inspect": _command(
        _DATA, "inspect", "weights.config:InspectConfig",
        "Describe weights of any origin, or compare two.", "runs/photos",
    ),
    "pack": _command(
        _DATA, "pack", "data.pack_config:PackConfig",
        "Resize images once and pack them into few files that are read fast.",
        "photos --out packed",
    ),
    "bench": _command(
        _DATA, "bench", "commands.config:BenchConfig",
        "Measure the speed of pre-training on this machine, and estimate the time of a run.",
        "--data photos --recipe laptop",
        options="commands.config:RecipeOptions", recipes="recipes:read_pretrain_recipe",
    ),
}  # fmt: skip
