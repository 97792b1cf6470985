"""The command line: parses and calls, nothing else.

Exit codes: 0 done; 1 the run failed, the demo did not show what it should, the doctor found an
ailment, or pre-training is not shown to have helped; 2 wrong input; 75 stopped by SIGTERM after saving,
run the same command to go on; 130 stopped by Ctrl-C, likewise.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from importlib.metadata import version
from itertools import pairwise, takewhile
from signal import SIGTERM, signal
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import tyro
from torch import OutOfMemoryError
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from quarterview import recipes
from quarterview.commands.bench import BenchConfig
from quarterview.commands.finetune import FinetuneConfig
from quarterview.commands.pretrain import PretrainConfig, pretrain, start_values
from quarterview.data.pack import PackConfig
from quarterview.doctor.run import DoctorConfig
from quarterview.errors import RunError, ToldElsewhereError, UserError, unknown
from quarterview.evaluation.embed import EmbedConfig
from quarterview.evaluation.features import ProbeConfig
from quarterview.evaluation.robustness import RobustnessConfig
from quarterview.methods.registry import DEFAULTS, ObjectiveKind
from quarterview.studies.compare import CompareConfig
from quarterview.studies.plan import StudyConfig
from quarterview.training.logging import Journal
from quarterview.training.run import RunningConfig, check_shares
from quarterview.weights.export.command import ExportConfig

_DESCRIPTION = """Learn to see from a quarter of the picture: masked autoencoders for anyone's images.

Start with `quarterview demo`; then `quarterview pretrain --data FOLDER --out runs/mine --recipe laptop`."""
_EXIT_CODES = {"complete": 0, "helped": 0, "did not help": 1, "cannot tell": 1, "SIGTERM": 75, "SIGINT": 130}


@dataclass(frozen=True)
class Pretrain(PretrainConfig):
    """Learn from unlabelled images: `quarterview pretrain --data photos --out runs/photos`."""

    recipe: str | None = None
    """Start from a named configuration (see `quarterview recipes`) or a YAML file; flags go first."""
    dry_run: bool = False
    """Show the resolved configuration, parameters, steps and memory, and train nothing."""
    slurm: Annotated[tuple[str, ...] | None, tyro.conf.arg(metavar="NAME=VALUE...")] = None
    """Train as a Slurm job: nodes=2 gpus=8 hours=24 partition=main, … (docs/scale.md lists the names)."""

    def execute(self, argv: Sequence[str]) -> int:
        from quarterview.commands import dry_run

        config = PretrainConfig(**{f.name: getattr(self, f.name) for f in fields(PretrainConfig)})
        if self.dry_run:
            dry_run.show(config, Journal())
            return 0
        if self.slurm is not None:
            return _submit(self.slurm, config, config.data, lambda ranks: dry_run.check(config, ranks), argv)
        return _EXIT_CODES[pretrain(config, ["quarterview", *argv]).status]


@dataclass(frozen=True)
class Tokenizer(Pretrain):
    """Learn words for patches, for --target tokens: `quarterview tokenizer --data photos --out words`."""

    objective: Annotated[ObjectiveKind, tyro.conf.Suppress] = "tokenizer"


@dataclass(frozen=True)
class Bench(BenchConfig):
    """How fast would a pre-training run here, where does its time go, and how long would it take?"""

    recipe: str | None = None
    """Start from a named configuration (see `quarterview recipes`) or a YAML file; flags go first."""
    out: Annotated[str, tyro.conf.Suppress] = ""
    resume: Annotated[str, tyro.conf.Suppress] = "auto"
    init_from: Annotated[str | None, tyro.conf.Suppress] = None
    allow_partial: Annotated[tuple[str, ...], tyro.conf.Suppress] = ()

    def execute(self, argv: Sequence[str]) -> int:
        from quarterview.commands.bench import bench

        config = BenchConfig(**{f.name: getattr(self, f.name) for f in fields(BenchConfig)})
        bench(config, Journal(), ["quarterview", *argv])
        return 0


@dataclass(frozen=True)
class Finetune(FinetuneConfig):
    """Train a classifier from a pre-trained encoder, whole or in part, or from scratch."""

    run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")] = ""
    """A run, checkpoint or .safetensors file of a masked autoencoder; scratch for random weights."""
    recipe: str | None = None
    """Start from a named configuration (see `quarterview recipes`) or a YAML file; flags go first."""
    table: bool = False
    """Show every parameter's learning rate and weight decay, and train nothing."""
    slurm: Annotated[tuple[str, ...] | None, tyro.conf.arg(metavar="NAME=VALUE...")] = None
    """Train as a Slurm job: gpus=8 hours=4 partition=main, … (docs/scale.md lists the names)."""

    def execute(self, argv: Sequence[str]) -> int:
        from quarterview.commands.finetune import check, finetune
        from quarterview.commands.finetune_partial import partial
        from quarterview.commands.finetune_table import show_parameters

        config = FinetuneConfig(**{f.name: getattr(self, f.name) for f in fields(FinetuneConfig)})
        command = ["quarterview", *argv]
        if self.table:
            show_parameters(config, Journal())
            return 0
        if self.slurm is not None:

            def look(ranks: int) -> None:
                check_shares(config, ranks)
                check(config)

            return _submit(self.slurm, config, (*config.train, *config.test), look, argv)
        if len(config.blocks) == 1:
            return _EXIT_CODES[finetune(config, command).run.status]
        found = partial(config, Journal(), command)
        return max(_EXIT_CODES[result.run.status] for result in found.values())


@dataclass(frozen=True)
class Doctor(DoctorConfig):
    """Is my run working? The model beside trivial inpainters, its features, its history, its images."""

    run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """The folder of a run, finished or not."""

    def execute(self, argv: Sequence[str]) -> int:
        from quarterview.doctor.run import doctor

        config = DoctorConfig(**{f.name: getattr(self, f.name) for f in fields(DoctorConfig)})
        return 0 if doctor(config, Journal(), ["quarterview", *argv]).healthy else 1


@dataclass(frozen=True)
class Compare(CompareConfig):
    """Did pre-training help? Models beside random weights and raw pixels, and a verdict with its page."""

    arms: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="A...")] = ()
    """Runs, checkpoint folders, .safetensors files or timm:NAME; scratch and random stand beside them."""
    recipe: str | None = None
    """Start from a named configuration (see `quarterview recipes`) or a YAML file; flags go first."""
    run: Annotated[str, tyro.conf.Suppress] = ""
    model: Annotated[str | None, tyro.conf.Suppress] = None
    labels: Annotated[int | None, tyro.conf.Suppress] = None
    resume: Annotated[str, tyro.conf.Suppress] = "auto"

    def execute(self, argv: Sequence[str]) -> int:
        from quarterview.studies.compare import compare

        config = CompareConfig(**{f.name: getattr(self, f.name) for f in fields(CompareConfig)})
        return _EXIT_CODES[compare(config, Journal(), ["quarterview", *argv]).status]


@dataclass(frozen=True)
class StudyCommand(StudyConfig):
    """The paper's ablations and comparisons on your images: `quarterview study mask-ratio --data …`."""

    name: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="NAME")] = ""
    """A study's name (see `quarterview recipes`), or a YAML file."""

    def execute(self, argv: Sequence[str]) -> int:
        from quarterview.studies.conduct import conduct

        config = StudyConfig(**{f.name: getattr(self, f.name) for f in fields(StudyConfig)})
        return _EXIT_CODES[conduct(self.name, config, Journal(), ["quarterview", *argv]).status]


@dataclass(frozen=True)
class Look:
    """Draw what a model sees in pictures: attention, groups of patches, reconstruction."""

    run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """A run, a checkpoint folder or a .safetensors file."""
    images: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="IMAGES...")]
    """Pictures, or anything that --data of pretrain takes; the first eight are drawn."""
    out: str = "look.png"
    """The PNG to write."""
    heads: int = 6
    """How many attention heads of the last block are drawn one by one."""
    seed: int = 0
    """Of the masks."""

    def execute(self, _argv: Sequence[str]) -> int:
        from quarterview.evaluation.look import look

        look(self.run, self.images, self.out, self.seed, self.heads)
        Journal().say(f"wrote {self.out}")
        return 0


@dataclass(frozen=True)
class Reconstruct:
    """Draw what a model makes of pictures of which it sees a quarter."""

    run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """A run, a checkpoint folder or a .safetensors file."""
    images: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="IMAGES...")]
    """Pictures, or anything that --data of pretrain takes; the first eight are drawn."""
    out: str = "panel.png"
    """The PNG to write."""
    seed: int = 0
    """Of the masks."""

    def execute(self, _argv: Sequence[str]) -> int:
        from quarterview.evaluation.panel import reconstruct_files

        reconstruct_files(self.run, self.images, self.out, self.seed)
        Journal().say(f"wrote {self.out}")
        return 0


@dataclass(frozen=True)
class Knn(ProbeConfig):
    """Classify each test image by its nearest labelled ones, in the space of the features."""

    run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """A run, a checkpoint folder or a .safetensors file."""
    k: tuple[int, ...] = (20,)
    """How many neighbours vote, alike and by exp(cosine / 0.07); several numbers give a row each."""

    def execute(self, argv: Sequence[str]) -> int:
        from quarterview.evaluation.knn import knn

        knn(self, self.k, Journal(), ["quarterview", *argv])
        return 0


@dataclass(frozen=True)
class Linear(ProbeConfig):
    """Train a linear classifier on frozen features."""

    run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """A run, a checkpoint folder or a .safetensors file."""
    protocol: Literal["fast", "paper"] = "fast"
    """fast: features computed once, logistic regression whose strength is chosen on a fifth of the
    training images. paper: BatchNorm and a linear layer, trained by LARS on new crops each epoch."""
    epochs: int = 90
    """Of --protocol paper: passes over the labelled images."""
    warmup_epochs: float = 10.0
    """Of --protocol paper: epochs of linear warm-up."""
    batch_size: int = 16384
    """Of --protocol paper: images per update; the whole set where it has fewer."""
    blr: float = 0.1
    """Of --protocol paper: base learning rate, × batch size / 256."""

    def execute(self, argv: Sequence[str]) -> int:
        command = ["quarterview", *argv]
        if self.protocol == "paper":
            from quarterview.evaluation.linear_paper import PaperConfig, linear_paper

            paper = PaperConfig(self.epochs, self.warmup_epochs, self.batch_size, self.blr)
            linear_paper(self, paper, Journal(), command)
        else:
            from quarterview.evaluation.linear import linear

            linear(self, Journal(), command)
        return 0


@dataclass(frozen=True)
class Robustness(RobustnessConfig):
    """Judge a classifier on corrupted pictures, as ImageNet-C has them, and on other sets."""

    run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="CLASSIFIER")]
    """A run of fine-tuning, a checkpoint folder, or other weights of a classifier."""

    def execute(self, argv: Sequence[str]) -> int:
        from quarterview.evaluation.robustness import robustness

        robustness(self, Journal(), ["quarterview", *argv])
        return 0


@dataclass(frozen=True)
class Embed(EmbedConfig):
    """Write the embeddings of images as Parquet: `quarterview embed RUN --data photos --out DIR`."""

    run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """A run, a checkpoint folder or a .safetensors file."""

    def execute(self, _argv: Sequence[str]) -> int:
        from quarterview.evaluation.embed import embed

        embed(self, Journal())
        return 0


@dataclass(frozen=True)
class Pack(PackConfig):
    """Make images small once, in few files that are read fast: `quarterview pack photos --out STORE`."""

    data: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="DATA...")]
    """Images: anything that --data of pretrain takes; with --verify, the packed store."""

    def execute(self, _argv: Sequence[str]) -> int:
        from quarterview.data.pack import pack, verify

        (verify if self.verify else pack)(self, Journal())
        return 0


@dataclass(frozen=True)
class Inspect:
    """Say what weights are, wherever they are from; or in what two of them differ."""

    path: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="WEIGHTS")]
    """A run, a checkpoint folder, a .safetensors or .pth file, a folder of transformers or timm, timm:NAME
    or hf:OWNER/NAME."""
    other: Annotated[str | None, tyro.conf.Positional, tyro.conf.arg(metavar="OTHER")] = None
    """Others to compare them with."""

    def execute(self, _argv: Sequence[str]) -> int:
        from quarterview.weights.inspect import compare_weights, inspect

        if self.other is None:
            inspect(self.path, Journal())
        else:
            compare_weights(self.path, self.other, Journal())
        return 0


@dataclass(frozen=True)
class Export(ExportConfig):
    """Write a model as others open it: `quarterview export RUN --to timm --out DIR`."""

    run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """A run, a checkpoint folder or a .safetensors file."""

    def execute(self, _argv: Sequence[str]) -> int:
        from quarterview.weights.export.command import export

        export(self, Journal())
        return 0


@dataclass(frozen=True)
class Push:
    """Upload an export to the Hugging Face Hub."""

    folder: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER")]
    """What `quarterview export` wrote."""
    name: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="OWNER/NAME")]
    """The repository; made if it is not there."""
    private: bool = False
    """Make it visible to its owner only."""

    def execute(self, _argv: Sequence[str]) -> int:
        from quarterview.weights.hub import push

        files = push(self.folder, self.name, self.private)
        Journal().say(f"uploaded {', '.join(files)} to {self.name}")
        return 0


@dataclass(frozen=True)
class Recipes:
    """List the named configurations of --recipe, for pretrain and for finetune, and the named studies."""

    def execute(self, _argv: Sequence[str]) -> int:
        from quarterview.studies.named import STUDIES

        journal = Journal()
        for command, table in (("pretrain", recipes.RECIPES), ("finetune", recipes.FINETUNE_RECIPES)):
            journal.say(f"{command} --recipe:")
            for name, recipe in table.items():
                journal.say(f"{name}: {recipe.purpose}\n    {recipe.command}\n    {recipe.seen}")
                journal.say("    " + ", ".join(f"{key} {value}" for key, value in recipe.values.items()))
        journal.say("study:")
        for name, study in STUDIES.items():
            journal.say(f"{name}: {study.purpose}\n    " + "; ".join(t.title for t in study.tables))
        return 0


@dataclass(frozen=True)
class Demo:
    """See it work in minutes: generate pictures, pre-train on them, and measure what was learned."""

    out: str = "runs/demo"
    """The run's folder; made anew each time."""
    seed: int = 0
    """Of every random draw."""

    def execute(self, _argv: Sequence[str]) -> int:
        from quarterview import demo

        return _EXIT_CODES[demo.demo(self.out, self.seed, Journal())]


Command = (
    Pretrain
    | Tokenizer
    | StudyCommand
    | Doctor
    | Compare
    | Bench
    | Finetune
    | Knn
    | Linear
    | Robustness
    | Embed
    | Pack
    | Look
    | Reconstruct
    | Inspect
    | Export
    | Push
    | Recipes
    | Demo
)
_COMMANDS: dict[str, Any] = {
    kind.__name__.lower().removesuffix("command"): kind for kind in get_args(Command)
}
_WITH_RECIPES: dict[str, tuple[Any, Callable[[str], Any]]] = {
    "pretrain": (Pretrain, recipes.read),
    "tokenizer": (Tokenizer, recipes.read),
    "bench": (Bench, recipes.read),
    "finetune": (Finetune, recipes.read_finetune),
    "compare": (Compare, recipes.read_finetune),
}


def _submit(
    words: Sequence[str],
    config: RunningConfig,
    inputs: Sequence[str],
    check: Callable[[int], object],
    argv: Sequence[str],
) -> int:
    """Hand the same command line, without --slurm, to Slurm.

    Args:
        words: what followed --slurm.
        inputs: the sets of images.
        check: refuses what so many ranks could not train.
    """
    from quarterview.commands import slurm

    request = slurm.parse(words)
    if not config.out:
        raise UserError("no folder for the run; accepted: --out RUN")
    check(request.world_size)
    arguments = gather(argv)
    at = arguments.index("--slurm")
    rest = [*arguments[:at], *arguments[at + 1 + len(_after("--slurm", arguments)) :]]
    slurm.submit(request, config.out, inputs, run, rest, Journal())
    return 0


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line and exit.

    Args:
        argv: the arguments; those of the process by default.
    """
    signal(SIGTERM, lambda *_: sys.exit(_EXIT_CODES["SIGTERM"]))  # until the loop takes it over
    sys.exit(run(sys.argv[1:] if argv is None else argv))


def run(argv: Sequence[str]) -> int:
    """Run a command line and return its exit code."""
    if list(argv) == ["--version"]:
        Journal().say(f"quarterview {version('quarterview')}")
        return 0
    try:
        command = parse(argv)
        return command.execute(argv)
    except UserError as error:
        Journal().fail(str(error))
        return 2
    except OutOfMemoryError as error:
        Journal().fail(
            f"{error}; accepted: a smaller --batch-size, or --accum-iter 2 for the same one in parts"
        )
        return 1
    except (RunError, OSError) as error:  # of a full disk, no permission: the message names the path
        Journal(quiet=isinstance(error, ToldElsewhereError)).fail(str(error))
        return 1
    except KeyboardInterrupt:
        return 130


def parse(argv: Sequence[str]) -> Command:
    """The command that a command line means.

    Raises:
        UserError: if a flag is given twice, or a recipe does not exist.
        SystemExit: with code 2 if the flags are wrong otherwise, after saying how; 0 after --help.
    """
    arguments = gather(argv)
    check_words(arguments)
    default = _default(arguments)
    types: list[Any] = [
        Annotated[
            kind,
            tyro.conf.subcommand(name, default=default if name in arguments[:1] else tyro.MISSING_NONPROP),
        ]
        for name, kind in _COMMANDS.items()
    ]
    union: Any = types[0]
    for kind in types[1:]:
        union |= kind
    return tyro.cli(union, prog="quarterview", args=arguments, description=_DESCRIPTION, registry=_registry())


def _default(arguments: Sequence[str]) -> Any:
    """What the flags stand above: a recipe, an objective's defaults, the shape of weights to start from."""
    name = arguments[0] if arguments else ""
    flags = ("--recipe", "--init-from", "--objective", "--target", "--tokenizer", "--out")
    given = {flag: word for flag, word in pairwise(arguments) if flag in flags}
    if name == "tokenizer":
        given["--objective"] = name
    if name not in _WITH_RECIPES or not {"--recipe", "--init-from", "--objective"} & given.keys():
        return tyro.MISSING_NONPROP
    kind, read = _WITH_RECIPES[name]
    values: dict[str, Any] = {}
    if "--recipe" in given:
        base = read(given["--recipe"])
        values = {field.name: getattr(base, field.name) for field in fields(base)}
        if "--blr" in arguments and "--lr" not in arguments:
            values["lr"] = None  # else the recipe's own rate would go before the flag
    if "--objective" in given:
        values |= {"objective": given["--objective"], **DEFAULTS.get(given["--objective"], {})}
    if "--init-from" in given and name == "pretrain":
        start = start_values(
            given["--init-from"], given.get("--out", ""), _after("--allow-partial", arguments)
        )
        if "--recipe" in given:
            del start["image_size"]  # to which the weights are adapted
        values |= start
    # Flags that the rest would make no sense without, or that make sense of it.
    for flag in ("--target", "--tokenizer"):
        if flag in given and name in ("pretrain", "bench"):
            values[flag.removeprefix("--")] = given[flag]
    return kind(**values)


def _after(flag: str, arguments: Sequence[str]) -> list[str]:
    """The words that follow a flag, up to the next."""
    words = list(arguments[arguments.index(flag) + 1 :]) if flag in arguments else []
    return list(takewhile(lambda word: not word.startswith("--"), words))


def gather(argv: Sequence[str]) -> list[str]:
    """The same arguments with ``--flag=value`` taken apart and every ``--data`` joined into one.

    Raises:
        UserError: if any other flag is given twice.
    """
    words = [part for word in argv for part in (word.split("=", 1) if word.startswith("--") else [word])]
    kept: list[str] = []
    data: list[str] = []
    seen: set[str] = set()
    in_data = False
    for word in words:
        if word == "-h":
            in_data = False
        if word.startswith("--"):
            in_data = word == "--data"
            flag = "--" + word[2:].replace("_", "-").removeprefix("no-")
            if flag in seen and not in_data:
                raise UserError(f"{flag} is given twice; accepted: once (only --data may be repeated)")
            seen.add(flag)
            if in_data:
                continue
        (data if in_data else kept).append(word)
    return [*kept, "--data", *data] if "--data" in seen else kept


def check_words(arguments: Sequence[str]) -> None:
    """Check the command, and values that are one of a few words.

    Raises:
        UserError: with the nearest of the accepted words.
    """
    if not arguments or arguments[0] in ("-h", "--help"):
        return
    if arguments[0] not in _COMMANDS:
        raise unknown("command", arguments[0], _COMMANDS)
    choices = {
        "--" + name.replace("_", "-"): get_args(kind)
        for name, annotation in get_type_hints(_COMMANDS[arguments[0]]).items()
        for kind in (annotation, *get_args(annotation))
        if get_origin(kind) is Literal
    }
    for flag, value in pairwise(arguments):
        if flag in choices and value not in choices[flag]:
            raise unknown(f"value of {flag}:", value, choices[flag])


def _registry() -> ConstructorRegistry:
    """How optional values are shown, and what is said of words that are no numbers."""
    registry = ConstructorRegistry()

    @registry.primitive_rule
    def number_or_text(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec | None:
        for kind in (int, float, str):
            if info.type in (kind, kind | None):
                return PrimitiveConstructorSpec(
                    nargs=1,
                    metavar=_METAVARS[kind],
                    instance_from_str=lambda words, kind=kind: _read(words[0], kind),
                    is_instance=lambda value, kind=kind: value is None or isinstance(value, kind | int),
                    str_from_instance=lambda value: ["unset" if value is None else str(value)],
                )
        return None

    @registry.primitive_rule
    def numbers(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec | None:
        if info.type != tuple[float, ...] | None:
            return None
        return PrimitiveConstructorSpec(
            nargs="*",
            metavar="NUMBER...",
            instance_from_str=lambda words: (
                None if words == ["unset"] else tuple(_read(w, float) for w in words)
            ),
            is_instance=lambda value: value is None or isinstance(value, tuple),
            str_from_instance=lambda value: ["unset"] if value is None else [str(v) for v in value],
        )

    return registry


_METAVARS = {int: "N", float: "NUMBER", str: "TEXT"}


def _read(word: str, kind: type) -> Any:
    if word == "unset":
        return None
    try:
        return kind(word)
    except ValueError:
        raise ValueError(f"{word!r} is no {'whole ' if kind is int else ''}number") from None
