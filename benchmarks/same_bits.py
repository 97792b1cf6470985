"""Do two versions of the package compute the same, to the last bit? For changes that should change nothing.

Both run the same commands: pre-training by every method and its main variants, fine-tuning, pictures,
embeddings, probes, and the public Python API. Compared are all tensors of the checkpoints, the metrics but
for timings, embeddings, results and pixels. Needs the development environment; nothing is installed: each
side's `src` comes first on the path. All of it takes 150 seconds of CPU time on both sides together.

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

RENAMED = {"--objective": "--method"}
"""Words of a command line by their old and their new spelling. The new version is given the old ones first,
and the new ones where it refuses those with exit code 2."""

TIMINGS = ("images_per_s", "data_wait", "seconds")
"""Columns and keys that no two runs share."""

# ---------------------------------------------------------------------- what is run

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
"""Command lines by name; most write into --out of that name, in the folder in which all are run."""

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
"""What is asked of the public Python API, after the commands."""

_HEAVY = (
    *("lightly.loss", "lightly.models.modules.heads", "matplotlib.backends.backend_agg", "matplotlib.figure"),
    *("pyarrow.parquet", "scipy.optimize", "scipy.special", "sklearn.linear_model", "timm.data"),
    *("timm.data.auto_augment", "torch", "torch.utils.tensorboard", "torchvision"),
)
"""Imported once, before the commands' processes are forked."""

NEEDED = {
    "mae": ["mae-from-mae", "tuned-[mcl]*", "reconstruct*", "look*", "embed", "results-*", "api"],
    "simclr": ["embed-tokens"],
    "tokenizer": ["beit", "mae-tokens"],
}
"""Whose runs others read."""


def words_of(name: str) -> list[str]:
    """The command line of a name."""
    words = COMMANDS[name].split()
    return words if name.startswith("results-") else [*words, "--out", name]


def chosen(pattern: str) -> list[str]:
    """The names that a pattern asks for, and before them those that they need."""
    everything = [*COMMANDS, "api"]
    asked = {name for name in everything if fnmatch.fnmatch(name, pattern)}
    for need, readers in NEEDED.items():
        if any(fnmatch.fnmatch(name, reader) for name in asked for reader in readers):
            asked.add(need)
    return [name for name in everything if name in asked]


# ---------------------------------------------------------------------- running, in a process of one side


def run_side(source: Path, names: list[str], renamed: bool) -> None:
    """Run the commands of a side in the present folder. Heavy imports are shared by forking."""
    import quarterview

    if not Path(quarterview.__file__).is_relative_to(source):
        sys.exit(f"the package of {quarterview.__file__} was found before that of {source}")
    for heavy in _HEAVY:
        with contextlib.suppress(ImportError):
            importlib.import_module(heavy)
    importlib.import_module("torch").set_num_threads(1)
    with Path(os.devnull).open("w") as nowhere, contextlib.redirect_stdout(nowhere):
        _module(["recipes"])  # imports the package's own modules, too
    for name in names:
        begun = time.perf_counter()
        code = _forked(name, renamed=False)
        if code == 2 and renamed and name != "api":
            code = _forked(name, renamed=True)
        Path(f"{name}.exit").write_text(f"{code}\n")
        sys.stdout.write(f"{name}: exit code {code}, {time.perf_counter() - begun:.1f} s\n")
        sys.stdout.flush()


def _module(words: list[str]) -> None:
    """``python -m quarterview`` in this process."""
    before = sys.argv
    sys.argv = ["quarterview", *words]
    try:
        runpy.run_module("quarterview", run_name="__main__", alter_sys=True)
    except SystemExit as end:
        if end.code not in (0, None):
            raise
    finally:
        sys.argv = before


def _forked(name: str, renamed: bool) -> int:
    """The exit code of a command, run in a child process that has imported everything already."""
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
            _module([RENAMED.get(word, word) if renamed else word for word in words_of(name)])
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


# ---------------------------------------------------------------------- comparing


def differences(old: Path, new: Path, name: str) -> list[str]:
    """In what two sides' outputs of a command differ; nothing if they do not."""
    codes = [(side / f"{name}.exit").read_text().strip() for side in (old, new)]
    if codes != ["0", "0"]:
        ends = [(side / f"{name}.log").read_text().strip().splitlines()[-1:] or [""] for side in (old, new)]
        return [f"exit codes {codes[0]} and {codes[1]}: {ends[0][0]} | {ends[1][0]}"]
    if name.startswith("results-"):
        return _results(name, old, new)
    if name == "api":
        return _compare(_tensors(old / "api.safetensors"), _tensors(new / "api.safetensors"))
    files = [_outputs(side / name) for side in (old, new)]
    if files[0].keys() != files[1].keys():
        return [f"files {' '.join(sorted(files[0].keys() ^ files[1].keys()))} on one side only"]
    if not files[0]:
        return ["there are no files to compare"]
    return [
        f"{file}: {line}"
        for file, path in files[0].items()
        for line in _compare(_read(path), _read(files[1][file]))
    ]


def _outputs(root: Path) -> dict[str, Path]:
    """The files to compare, by their path in a folder."""
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


def _results(name: str, old: Path, new: Path) -> list[str]:
    """Compare the numbers that a probe wrote into its run."""
    kind = name.removeprefix("results-") + ".json"
    found = [side / "mae" / "results" / kind for side in (old, new)]
    if not all(path.is_file() for path in found):
        return [f"results/{kind} is missing"]
    return _compare(*map(_read, found))


def _read(path: Path) -> dict[str, Any]:
    """What is in a file, as named arrays or plain values."""
    if path.suffix == ".safetensors":
        return _tensors(path)
    if path.suffix == ".jsonl":
        rows = map(json.loads, path.read_text().splitlines())
        return {f"row {i} {k}": v for i, row in enumerate(rows) for k, v in row.items() if k not in TIMINGS}
    if path.suffix == ".json":
        return dict(_leaves(json.loads(path.read_text())["results"], "results"))
    import numpy as np

    if path.suffix == ".npz":
        with np.load(path) as arrays:
            return dict(arrays)
    if path.suffix == ".png":
        from PIL import Image

        return {"pixels": np.asarray(Image.open(path))}
    from pyarrow import parquet

    return parquet.read_table(path).to_pydict()


def _tensors(path: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    return load_file(path)


def _leaves(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    """The numbers and texts of a nested value, by where they are."""
    if isinstance(value, dict | list):
        for key, each in value.items() if isinstance(value, dict) else enumerate(value):
            if key not in TIMINGS:
                yield from _leaves(each, f"{name}.{key}")
    else:
        yield name, value


def _compare(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """In what named values differ, and by how much at most."""
    if old.keys() != new.keys():
        only = [f"-{name}" for name in old if name not in new] + [
            f"+{name}" for name in new if name not in old
        ]
        return [f"names {' '.join(only[:5])}{' …' if len(only) > 5 else ''}"]
    unlike = [name for name in old if not _same(old[name], new[name])]
    if not unlike:
        return []
    most = max(_distance(old[name], new[name]) for name in unlike)
    return [f"{len(unlike)} of {len(old)}, first {unlike[0]} (max abs difference {most:.3g})"]


def _same(old: Any, new: Any) -> bool:
    import numpy as np
    import torch

    if isinstance(old, torch.Tensor):
        alike = old.dtype == new.dtype and old.shape == new.shape
        return alike and torch.equal(*(x.contiguous().flatten().view(torch.uint8) for x in (old, new)))
    if isinstance(old, np.ndarray):
        return old.dtype == new.dtype and old.shape == new.shape and old.tobytes() == new.tobytes()
    return repr(old) == repr(new)  # of floats, to the last bit


def _distance(old: Any, new: Any) -> float:
    import numpy as np
    import torch

    try:
        one, two = (
            np.asarray(x.double() if isinstance(x, torch.Tensor) else x, dtype=np.float64) for x in (old, new)
        )
        return float(np.abs(one - two).max()) if one.shape == two.shape and one.size else math.inf
    except (TypeError, ValueError):
        return math.inf


# ---------------------------------------------------------------------- both sides


@contextlib.contextmanager
def checkout(commit: str, folder: Path) -> Iterator[Path]:
    """A commit's files in a temporary worktree."""
    git = ["git", "-C", str(Path(__file__).parent), "worktree"]
    subprocess.run([*git, "add", "--quiet", "--detach", str(folder), commit], check=True)
    try:
        yield folder
    finally:
        subprocess.run([*git, "remove", "--force", str(folder)], check=True)


def start(source: Path, folder: Path, names: list[str], renamed: bool) -> subprocess.Popen:
    """Begin to run one side's commands in a folder of its own, with one thread."""
    folder.mkdir()
    environment = os.environ | {
        **{"PYTHONPATH": str(source / "src"), "OMP_NUM_THREADS": "1", "COLUMNS": "200"},
        **{"PYTHONWARNINGS": "ignore", "TERM": "dumb"},
    }
    words = [sys.executable, str(Path(__file__).resolve()), "--side", str(source / "src")]
    words += [*(["--renamed"] if renamed else []), "--names", *names]
    with (folder / "side.log").open("w") as log:
        return subprocess.Popen(words, cwd=folder, env=environment, stdout=log, stderr=subprocess.STDOUT)


def compare(old: Path, new: Path, names: list[str], workspace: Path) -> int:
    """Run both sides at once and print a line for each command; the exit code."""
    folders = workspace / "old", workspace / "new"
    sides = [
        start(source, folder, names, folder == folders[1])
        for source, folder in zip((old, new), folders, strict=True)
    ]
    for side, folder in zip(sides, folders, strict=True):
        if side.wait():
            print((folder / "side.log").read_text())
            return 1
    differing = 0
    for name in names:
        found = differences(*folders, name)
        differing += bool(found)
        print(f"{name}: {'DIFFERS ' + '; '.join(found) if found else 'equal'}")
    print(f"{len(names) - differing} of {len(names)} are equal")
    return 1 if differing else 0


def main() -> int:
    """Read the command line, and compare; the exit code is 1 if anything differs."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("commits", nargs="*", metavar="COMMIT", help="the old one and the new one")
    parser.add_argument("--old-source", type=Path, help="a checkout in place of the old commit")
    parser.add_argument("--new-source", type=Path, help="a checkout in place of the new commit")
    parser.add_argument("--only", default="*", help="a pattern of the names of commands, such as 'mae*'")
    parser.add_argument("--keep", type=Path, help="keep both sides' files in this new folder")
    parser.add_argument("--list", action="store_true", help="list the commands and stop")
    parser.add_argument("--side", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--renamed", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--names", nargs="*", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.side:
        run_side(given.side, given.names, given.renamed)
        return 0
    names = chosen(given.only)
    if given.list:
        print(
            "\n".join(f"{name}: {' '.join(words_of(name)) if name != 'api' else 'Python'}" for name in names)
        )
        return 0
    folders = [given.old_source, given.new_source]
    if folders.count(None) != len(given.commits):
        parser.error("give two commits, or --old-source or --new-source in place of either")
    if not names:
        parser.error(f"no command is called {given.only}; --list names them")
    begun = time.perf_counter()
    with contextlib.ExitStack() as stack:
        workspace = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="same-bits-")))
        commits = iter(given.commits)
        sources = [
            folder.resolve() if folder else stack.enter_context(checkout(next(commits), workspace / side))
            for folder, side in zip(folders, ("old-source", "new-source"), strict=True)
        ]
        code = compare(*sources, names, workspace)
        if given.keep:
            given.keep.mkdir(parents=True)
            for side in ("old", "new"):
                shutil.move(workspace / side, given.keep / side)
    print(f"{time.perf_counter() - begun:.0f} s")
    return code


if __name__ == "__main__":
    sys.exit(main())
