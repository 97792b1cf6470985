"""Check that two versions of the package compute bit-identical results, for changes such as refactorings.

Both versions run the same commands: pre-training by every method with its main variants, fine-tuning,
figures, embeddings, probes, and the public Python API. The script compares all tensors of the checkpoints,
all metrics except timings, embeddings, results and pixels. It needs the development environment, but installs
nothing: the `src` folder of each version comes first on the Python path. Both versions together take 150
seconds of CPU time.

    uv run python benchmarks/same_bits.py main HEAD
    uv run python benchmarks/same_bits.py --old-source ../old --new-source . --only "mae*"
"""

import argparse
import contextlib
import fnmatch
import importlib
import json
import math
import os
import runpy
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

RENAMED_FLAGS = {"--objective": "--method"}
"""Old and new names of flags. The new version runs with the old names first, and again with the new names if
it exits with code 2."""

TIMINGS = ("images_per_s", "data_wait", "seconds")
"""Columns and keys that differ between any two runs, and are not compared."""

# ---------------------------------------------------------------------- commands

_MODEL = "--model mae_vit_32x4x2_patch4 --image-size 16"
_LOOP = "--batch-size 32 --lr 1e-3 --log-every 1 --eval-every 5 --workers 0 --device cpu"
_TRAIN = f"{_LOOP} --steps 10 --data shapes:256:size=16 --holdout 8 {_MODEL}"
_DECODER = "--decoder-width 32 --decoder-heads 2"
_MAE = f"pretrain {_TRAIN} {_DECODER} --decoder-depth 2"
_FP32 = f"{_MAE} --precision fp32"
_CONTRASTIVE = f"pretrain {_TRAIN} --precision fp32 --head-width 64 --head-out 16 --objective"
_BEIT = f"pretrain {_TRAIN} --precision fp32 --objective beit --tokenizer tokenizer"
_TUNE = f"--train shapes:128:size=16 --test shapes:64:size=16:seed=1 {_LOOP} --steps 6 --precision fp32"
_SETS = "--train shapes:200:size=16 --test shapes:100:size=16:seed=1 --device cpu"

COMMANDS = {
    "tokenizer": f"tokenizer {_TRAIN} --precision fp32 --vocabulary 64 --tokenizer-width 16",
    "mae": _FP32,
    "mae-bf16": f"{_MAE} --precision bf16",
    "denoising": f"{_FP32} --objective denoising",
    "beit": _BEIT,
    "simclr": f"{_CONTRASTIVE} simclr",
    "byol": f"{_CONTRASTIVE} byol",
    "mocov3": f"{_CONTRASTIVE} mocov3",
    "supervised": f"pretrain {_TRAIN} --precision fp32 --objective supervised",
    "mae-pca": f"{_FP32} --target pca --pca-components 8",
    "mae-hog": f"{_FP32} --target hog",
    "mae-tokens": f"{_FP32} --target tokens --tokenizer tokenizer",
    "mae-raw-pixels": f"{_FP32} --no-norm-pix-loss",
    "mae-cross": f"{_FP32} --decoder cross",
    "mae-cross-share": f"{_FP32} --decoder cross --predict-share 0.5 --masks-per-image 2",
    "mae-encoder-mask-tokens": f"{_FP32} --encoder-mask-tokens",
    "mae-predict-all": f"{_FP32} --predict-all",
    "mae-block": f"{_FP32} --mask block",
    "mae-grid": f"{_FP32} --mask grid",
    "mae-unit": f"{_FP32} --mask-unit 2",
    "mae-loop": f"{_FP32} --ema 0.9 --clip-grad 0.5 --accum-iter 2 --grad-checkpointing --checkpoint-every 5",
    "mae-streamed": f"{_FP32} --cache none --color-jitter 0.4",
    "mae-on-device": f"{_FP32} --cache device --crop fixed",
    "mae-no-crop": f"{_FP32} --crop none --seed 5",
    "mae-2-cls-tokens": f"{_FP32} --cls-tokens 2",
    "mae-fused-blocks": f"{_FP32} --fused-blocks 1 2",
    "mae-uniformity": f"{_FP32} --uniformity 0.01",
    "mae-probed": f"{_FP32} --probe-train shapes:100:size=16 --probe-test shapes:50:size=16:seed=1",
    "mae-from-mae": f"{_FP32} --init-from mae",
    "tuned-mixup": f"finetune mae {_TUNE} --cutmix 0 --cache none",
    "tuned-cutmix": f"finetune mae {_TUNE} --mixup 0 --cutmix 1 --pool cls --ema 0.9",
    "tuned-scratch": f"finetune scratch {_TUNE} {_MODEL} --randaugment none --blocks all",
    "tuned-last-block": f"finetune mae {_TUNE} --randaugment none --blocks 1 --labels 50",
    "reconstruct.png": "reconstruct mae shapes:8:size=16",
    "look.png": "look mae shapes:4:size=16",
    "embed": "embed mae --data shapes:50:size=16 --device cpu",
    "embed-tokens": "embed simclr --data shapes:20:size=16 --features tokens --block 2 --device cpu",
    "results-knn": f"knn mae {_SETS}",
    "results-linear": f"linear mae {_SETS}",
    "results-linear-paper": f"linear mae {_SETS} --protocol paper --epochs 2 --warmup-epochs 1",
}
"""Command lines by name. All run in one folder; most write into --out of their own name."""

API = """
import safetensors.torch, torch
import quarterview as qv

torch.manual_seed(0)
images = torch.rand(4, 3, 16, 16)
model = qv.load("mae").eval()
with torch.no_grad():
    tensors = {"encoded": model.encode(images), "loss": model(images, torch.rand(4, 16)).loss}
torch.manual_seed(1)
decoder = {"decoder_width": 32, "decoder_depth": 1, "decoder_heads": 2}
fresh = qv.create_model("mae_vit_32x4x2_patch4", image_size=16, **decoder)
tensors |= {f"fresh.{name}": value for name, value in fresh.state_dict().items()}
safetensors.torch.save_file(tensors, "api.safetensors")
"""
"""Program that uses the public Python API, run after the commands."""

_SHARED_IMPORTS = (
    *("lightly.loss", "lightly.models.modules.heads", "matplotlib.backends.backend_agg", "matplotlib.figure"),
    *("pyarrow.parquet", "scipy.optimize", "scipy.special", "sklearn.linear_model", "timm.data"),
    *("timm.data.auto_augment", "torch", "torch.utils.tensorboard", "torchvision"),
)
"""Modules that are imported once, before the processes of the commands are forked."""

REQUIRED_BY = {
    "mae": ["mae-from-mae", "tuned-[mcl]*", "reconstruct*", "look*", "embed", "results-*", "api"],
    "simclr": ["embed-tokens"],
    "tokenizer": ["beit", "mae-tokens"],
}
"""Patterns of the commands that read the run of another command."""


def make_argv(name: str) -> list[str]:
    """Return the command line of a name as a list of arguments."""
    argv = COMMANDS[name].split()
    return argv if name.startswith("results-") else [*argv, "--out", name]


def select_names(pattern: str) -> list[str]:
    """Return the names that match a pattern, and the names of the commands that these require."""
    all_names = [*COMMANDS, "api"]
    selected = {name for name in all_names if fnmatch.fnmatch(name, pattern)}
    for required, readers in REQUIRED_BY.items():
        if any(fnmatch.fnmatch(name, reader) for name in selected for reader in readers):
            selected.add(required)
    return [name for name in all_names if name in selected]


# ---------------------------------------------------------------------- run one version, in its own process


def run_side(source: Path, names: list[str], use_new_flags: bool) -> None:
    """Run the commands of one version in the current folder, each in a fork that shares slow imports.

    Args:
        source: the ``src`` folder of the version.
        use_new_flags: run a command with new flag names if it exits with code 2.
    """
    import quarterview

    if not Path(quarterview.__file__).is_relative_to(source):
        sys.exit(f"The package was imported from {quarterview.__file__}, not from {source}.")
    for module in _SHARED_IMPORTS:
        with contextlib.suppress(ImportError):
            importlib.import_module(module)
    importlib.import_module("torch").set_num_threads(1)
    with Path(os.devnull).open("w") as devnull, contextlib.redirect_stdout(devnull):
        _run_quarterview(["recipes"])  # imports the modules of the package, too
    for name in names:
        start = time.perf_counter()
        code = _run_in_fork(name, use_new_flags=False)
        if code == 2 and use_new_flags and name != "api":
            code = _run_in_fork(name, use_new_flags=True)
        Path(f"{name}.exit").write_text(f"{code}\n")
        sys.stdout.write(f"{name}: exit code {code}, {time.perf_counter() - start:.1f} s\n")
        sys.stdout.flush()


def _run_quarterview(argv: list[str]) -> None:
    """Run ``python -m quarterview`` with these arguments in this process."""
    original_argv = sys.argv
    sys.argv = ["quarterview", *argv]
    try:
        runpy.run_module("quarterview", run_name="__main__", alter_sys=True)
    except SystemExit as end:
        if end.code not in (0, None):
            raise
    finally:
        sys.argv = original_argv


def _run_in_fork(name: str, use_new_flags: bool) -> int:
    """Run a command in a fork of this process and return its exit code."""
    sys.stdout.flush()
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    code = 1
    try:
        log = os.open(f"{name}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1)
        os.dup2(log, 2)
        if name == "api":
            exec(API, {})
        else:
            _run_quarterview(
                [RENAMED_FLAGS.get(arg, arg) if use_new_flags else arg for arg in make_argv(name)]
            )
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


# ---------------------------------------------------------------------- compare outputs


def list_differences(old: Path, new: Path, name: str) -> list[str]:
    """List the differences between the outputs of a command in two versions; empty if they are equal.

    Args:
        old: folder in which the commands of the old version were run.
        new: folder of the new version.
    """
    codes = [(side / f"{name}.exit").read_text().strip() for side in (old, new)]
    if codes != ["0", "0"]:
        messages = [
            (side / f"{name}.log").read_text().strip().splitlines()[-1:] or [""] for side in (old, new)
        ]
        return [f"exit codes {codes[0]} and {codes[1]}: {messages[0][0]} | {messages[1][0]}"]
    if name.startswith("results-"):
        return _compare_results(name, old, new)
    if name == "api":
        return _describe_differences(
            _read_tensors(old / "api.safetensors"), _read_tensors(new / "api.safetensors")
        )
    files = [_find_outputs(side / name) for side in (old, new)]
    if files[0].keys() != files[1].keys():
        return [f"files {' '.join(sorted(files[0].keys() ^ files[1].keys()))} only in one version"]
    if not files[0]:
        return ["no files to compare"]
    return [
        f"{file}: {line}"
        for file, path in files[0].items()
        for line in _describe_differences(_read_values(path), _read_values(files[1][file]))
    ]


def _find_outputs(root: Path) -> dict[str, Path]:
    """Find the files to compare, by their path relative to the output folder."""
    if root.is_file():
        return {root.name: root}
    kinds = (".safetensors", ".parquet", ".png", ".npz")
    return {
        str(path.relative_to(root)): path
        for path in sorted(root.rglob("*"))
        if (path.suffix in kinds or path.name in ("metrics.jsonl", "finetune.json"))
        and path.is_file()
        and "last" not in path.parts
    }


def _compare_results(name: str, old: Path, new: Path) -> list[str]:
    """Compare the results that a probe wrote into its run."""
    file_name = name.removeprefix("results-") + ".json"
    paths = [side / "mae" / "results" / file_name for side in (old, new)]
    if not all(path.is_file() for path in paths):
        return [f"results/{file_name} is missing"]
    return _describe_differences(*map(_read_values, paths))


def _read_values(path: Path) -> dict[str, Any]:
    """Read the content of a file as named arrays or plain values."""
    if path.suffix == ".safetensors":
        return _read_tensors(path)
    if path.suffix == ".jsonl":
        rows = map(json.loads, path.read_text().splitlines())
        return {f"row {i} {k}": v for i, row in enumerate(rows) for k, v in row.items() if k not in TIMINGS}
    if path.suffix == ".json":
        return dict(_flatten(json.loads(path.read_text())["results"], "results"))
    import numpy as np

    if path.suffix == ".npz":
        with np.load(path) as arrays:
            return dict(arrays)
    if path.suffix == ".png":
        from PIL import Image

        return {"pixels": np.asarray(Image.open(path))}
    from pyarrow import parquet

    return parquet.read_table(path).to_pydict()


def _read_tensors(path: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    return load_file(path)


def _flatten(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    """Yield the numbers and texts of a nested value with their dotted paths."""
    if isinstance(value, dict | list):
        for key, each in value.items() if isinstance(value, dict) else enumerate(value):
            if key not in TIMINGS:
                yield from _flatten(each, f"{name}.{key}")
    else:
        yield name, value


def _describe_differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Describe the differences between named values, with the largest; empty if all are equal."""
    if old.keys() != new.keys():
        only = [f"-{name}" for name in old if name not in new] + [
            f"+{name}" for name in new if name not in old
        ]
        return [f"names {' '.join(only[:5])}{' …' if len(only) > 5 else ''}"]
    different = [name for name in old if not _is_equal(old[name], new[name])]
    if not different:
        return []
    largest = max(_max_difference(old[name], new[name]) for name in different)
    return [f"{len(different)} of {len(old)}, first {different[0]} (max abs difference {largest:.3g})"]


def _is_equal(old: Any, new: Any) -> bool:
    """Return True if two values are equal to the last bit."""
    import numpy as np
    import torch

    if isinstance(old, torch.Tensor):
        is_compatible = old.dtype == new.dtype and old.shape == new.shape
        return is_compatible and torch.equal(
            *(x.contiguous().flatten().view(torch.uint8) for x in (old, new))
        )
    if isinstance(old, np.ndarray):
        return old.dtype == new.dtype and old.shape == new.shape and old.tobytes() == new.tobytes()
    return repr(old) == repr(new)  # distinguishes any two floats


def _max_difference(old: Any, new: Any) -> float:
    """Return the largest absolute difference of two values; infinity if they are not comparable."""
    import numpy as np
    import torch

    try:
        one, two = (
            np.asarray(x.double() if isinstance(x, torch.Tensor) else x, dtype=np.float64) for x in (old, new)
        )
        return float(np.abs(one - two).max()) if one.shape == two.shape and one.size else math.inf
    except (TypeError, ValueError):
        return math.inf


# ---------------------------------------------------------------------- run and compare both versions


@contextlib.contextmanager
def checkout(commit: str, folder: Path) -> Iterator[Path]:
    """Check out a commit into a temporary worktree, which is removed at the end."""
    git = ["git", "-C", str(Path(__file__).parent), "worktree"]
    subprocess.run([*git, "add", "--quiet", "--detach", str(folder), commit], check=True)
    try:
        yield folder
    finally:
        subprocess.run([*git, "remove", "--force", str(folder)], check=True)


def start_side(source: Path, folder: Path, names: list[str], use_new_flags: bool) -> subprocess.Popen:
    """Start a process that runs the commands of one version in a new folder, with one thread."""
    folder.mkdir()
    environment = os.environ | {
        **{"PYTHONPATH": str(source / "src"), "OMP_NUM_THREADS": "1", "COLUMNS": "200"},
        **{"PYTHONWARNINGS": "ignore", "TERM": "dumb"},
    }
    command = [sys.executable, str(Path(__file__).resolve()), "--side", str(source / "src")]
    command += [*(["--use-new-flags"] if use_new_flags else []), "--names", *names]
    with (folder / "side.log").open("w") as log:
        return subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=subprocess.STDOUT)


def run_and_compare(old: Path, new: Path, names: list[str], workspace: Path) -> int:
    """Run both versions in parallel and print a line for each command; returns the exit code."""
    folders = workspace / "old", workspace / "new"
    sides = [
        start_side(source, folder, names, folder == folders[1])
        for source, folder in zip((old, new), folders, strict=True)
    ]
    for side, folder in zip(sides, folders, strict=True):
        if side.wait():
            print((folder / "side.log").read_text())
            return 1
    num_different = 0
    for name in names:
        differences = list_differences(*folders, name)
        num_different += bool(differences)
        print(f"{name}: {'DIFFERS ' + '; '.join(differences) if differences else 'equal'}")
    print(f"{len(names) - num_different} of {len(names)} are equal")
    return 1 if num_different else 0


def main() -> int:
    """Parse the command line and compare two versions; the exit code is 1 if any result differs."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("commits", nargs="*", metavar="COMMIT", help="old commit and new commit")
    parser.add_argument("--old-source", type=Path, help="checkout to use instead of the old commit")
    parser.add_argument("--new-source", type=Path, help="checkout to use instead of the new commit")
    parser.add_argument("--only", default="*", help="pattern for the names of commands, such as 'mae*'")
    parser.add_argument("--keep", type=Path, help="new folder that keeps the files of both versions")
    parser.add_argument("--list", action="store_true", help="list the commands and exit")
    parser.add_argument("--side", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--use-new-flags", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--names", nargs="*", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        run_side(args.side, args.names, args.use_new_flags)
        return 0
    names = select_names(args.only)
    if args.list:
        print(
            "\n".join(f"{name}: {' '.join(make_argv(name)) if name != 'api' else 'Python'}" for name in names)
        )
        return 0
    folders = [args.old_source, args.new_source]
    if folders.count(None) != len(args.commits):
        parser.error("Give two commits, or replace one or both by --old-source and --new-source.")
    if not names:
        parser.error(f"--only {args.only} matches no command. See --list.")
    start = time.perf_counter()
    with contextlib.ExitStack() as stack:
        workspace = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="same-bits-")))
        commits = iter(args.commits)
        sources = [
            folder.resolve() if folder else stack.enter_context(checkout(next(commits), workspace / side))
            for folder, side in zip(folders, ("old-source", "new-source"), strict=True)
        ]
        code = run_and_compare(*sources, names, workspace)
        if args.keep:
            args.keep.mkdir(parents=True)
            for side in ("old", "new"):
                shutil.move(workspace / side, args.keep / side)
    print(f"{time.perf_counter() - start:.0f} s")
    return code


if __name__ == "__main__":
    sys.exit(main())
