import contextlib
import io
import json
import os
import signal
import struct
import subprocess
import sys
import zlib
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

import quarterview as qv
from quarterview import cli
from quarterview.errors import UserError
from quarterview.training import checkpoint
from quarterview.training.metric_writers import read_metrics as metrics
from quarterview.training.trainer import Trainer

MODEL = [
    *("--model", "mae_vit_32x2x2_patch4", "--image-size", "16", "--decoder-width", "32"),
    *("--decoder-depth", "1", "--decoder-heads", "2", "--precision", "fp32"),
]
TINY = [*MODEL, "--batch-size", "16", "--workers", "0"]


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def run(capsys, monkeypatch):
    """A function that runs a command line in this process and returns exit code, stdout and stderr."""
    monkeypatch.setenv("COLUMNS", "1000")  # boxes around errors do not break their lines

    def call(*argv: object) -> tuple[int, str, str]:
        capsys.readouterr()
        try:
            code = cli.run([str(word) for word in argv])
        except SystemExit as stop:
            code = stop.code
        out, err = capsys.readouterr()
        assert "Traceback" not in out + err
        return code, out, err

    return call


def call_apart(*argv: object, timeout: float = 120) -> subprocess.CompletedProcess:
    """Run a command line in a new process."""
    return subprocess.run(
        [sys.executable, "-m", "quarterview", *map(str, argv)],
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
        env={**os.environ, "COLUMNS": "1000", "OMP_NUM_THREADS": "1"},
    )


# ---------------------------------------------------------------------- what is wrong is said


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--datta x", ["--datta is not a flag of quarterview pretrain. Did you mean --data?"]),
        ("--mask-ratio 0.999", ["mask ratio of 0.999 leaves 0 of 16 patches visible", "Give a ratio"]),
        ("--mask-ratio many", ["--mask-ratio", "many"]),
        ("--image-size 18", ["--image-size is 18 18, and the patch size is 4", "a multiple of 4"]),
        ("--image-size 16 16 16", ["--image-size is 16 16 16", "Give one side, or height and width"]),
        ("--model mae_vit_bas_patch4", ["mae_vit_bas_patch4", "Did you mean 'mae_vit_base_patch4'?"]),
        ("--batch-size x", ["--batch-size x is of the wrong type. Give a whole number of at least 1."]),
        ("--batch-size 0", ["--batch-size 0 is out of range. Give a whole number of at least 1."]),
        ("--lr -1", ["--lr -1.0 is out of range. Give a number above 0, or nothing."]),
        ("--device tpu", ["tpu", "cpu", "cuda"]),
        ("--mask blok", ["blok", "block"]),
        ("--recipe latop", ["Unknown recipe 'latop'", "Did you mean 'laptop'?"]),
        ("--recipe nothing.yaml", ["The recipe nothing.yaml does not exist"]),
        ("--seed 1 --seed 2", ["--seed is given twice"]),
        ("--norm-pix-loss --no-norm-pix-loss", ["--norm-pix-loss is given twice"]),
        ("--mean 0.5 0.5", ["--mean has 2 numbers, and images have 3 channels"]),
        (
            "--accum-iter 9",
            ["--batch-size 16 is too small for 1 ranks with --accum-iter 9. Give 18 or more."],
        ),
        ("--data shapes:five", ["'five' in 'shapes:five' is not", "a whole number"]),
        ("--init-from nothing", ["Cannot read nothing: it does not exist"]),
        ("--resume nothing", ["--resume nothing has no complete checkpoint"]),
        ("--holdout 200", ["--holdout is 200, of 200 images. Give 0 to 199."]),
    ],
)
def test_invalid_input_exits_with_2_and_a_message(run, tmp_path, flags, said):
    given = flags.split()
    base = [word for word in ["--data", "shapes:200:size=16"] if "--data" not in given]
    pairs = {TINY[i]: TINY[i + 1] for i in range(0, len(TINY), 2) if TINY[i] not in given}
    kept = [word for pair in pairs.items() for word in pair]
    code, out, err = run("pretrain", *base, *kept, *given, "--out", tmp_path / "run", "--steps", 1)
    assert code == 2
    for words in said:
        assert words in err
    assert "step" not in out
    assert checkpoint.find_newest(tmp_path / "run" / "checkpoints") is None


def test_the_version(run):
    code, out, _ = run("--version")
    assert code == 0
    assert out.strip() == f"quarterview {version('quarterview')}"


def test_missing_flags_are_reported(run, tmp_path):
    (tmp_path / "photos").mkdir()
    for argv, words in (
        ([], "pretrain"),
        (["pretrian"], "pretrain"),
        (["pretrain"], "The run has no folder. Give --out RUN."),
        (["pretrain", "--out", tmp_path / "run"], "No images are given. Give --data with"),
        (["pretrain", "--out", tmp_path / "run", "--data", tmp_path / "potos"], "contains 'photos'"),
        (["pretrain", "--out", tmp_path / "run", "--data", tmp_path / "photos"], "No image in the folder"),
    ):
        code, _, err = run(*argv)
        assert code == 2
        assert words in err


def test_a_run_folder_that_cannot_be_created_is_reported(run, tmp_path):
    (tmp_path / "file").write_text("mine")
    code, _, err = run("pretrain", *TINY, "--data", "shapes:200:size=16", "--out", tmp_path / "file")
    assert code in (1, 2)
    assert str(tmp_path / "file") in err
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize(
    "command", ["", "pretrain", "reconstruct", "knn", "linear", "inspect", "recipes", "demo"]
)
def test_help(run, command):
    code, out, _ = run(*command.split(), "--help")
    assert code == 0
    assert "usage: quarterview" in out


def test_every_field_is_a_flag_with_help(run):
    _, out, _ = run("pretrain", "--help")
    for name in qv.PretrainConfig().flags():
        assert f"--{name.replace('_', '-')}" in out
    assert "(default: 0.75)" in out
    assert qv.PretrainConfig().specs()["mask_ratio"].help in " ".join(out.replace("│", " ").split())


# ---------------------------------------------------------------------- flags


@pytest.mark.parametrize(
    "given",
    [
        *("--data A B --out X", "--data A --data B --out X", "--data=A --data=B --out=X"),
        *("--data A --out X --data B", "--out X --data A B"),
    ],
)
def test_data_flag_accepts_several_forms(given):
    _, config, _ = cli.parse(["pretrain", *given.split()])
    assert config.data.data == ("A", "B")
    assert config.run.out == "X"


def test_single_values_are_accepted_for_lists():
    given = ["pretrain", "--data=a=b", "--image-size=32", "--out", "X", "--no-norm-pix-loss"]
    _, config, _ = cli.parse(given)
    assert config.data.data == ("a=b",)
    assert config.model.image_size == (32, 32)
    assert config.method.norm_pix_loss is False
    assert config.optim.lr is None


def test_flags_override_the_recipe():
    _, config, _ = cli.parse(["pretrain", "--recipe", "laptop", "--data", "A", "--epochs", "3"])
    assert (config.model.model, config.loop.epochs, config.optim.lr) == ("mae_vit_tiny_patch8", 3, 1e-3)
    assert config.data.data == ("A",)
    assert config.model.image_size == (96, 96)


def test_blr_overrides_the_lr_of_a_recipe():
    given = ["finetune", "RUN", "--recipe", "small", "--blr", "2e-3"]
    _, config, _ = cli.parse([*given, "--batch-size", "256"])
    assert config.optim.peak_lr(config.loop.batch_size) == 2e-3
    _, config, _ = cli.parse([*given, "--lr", "5e-4"])
    assert config.optim.peak_lr(config.loop.batch_size) == 5e-4


def test_help_does_not_import_torch():
    heavy = "{'torch', 'torchvision', 'timm', 'numpy', 'sklearn', 'matplotlib', 'scipy'}"
    script = (
        "import sys; from quarterview import cli\n"
        "for name in cli.COMMANDS:\n"
        "    try: cli.run([name, '--help'])\n"
        "    except SystemExit: pass\n"
        f"print('loaded', *{heavy} & set(sys.modules))"
    )
    shown = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert shown.stdout.splitlines()[-1] == "loaded"


def test_recipes_are_listed_and_valid(run):
    from quarterview.recipes import RECIPES, get_changed_flags, read_pretrain_recipe

    code, out, _ = run("recipes")
    assert code == 0
    for name, recipe in RECIPES.items():
        assert f"{name}: {recipe.__doc__.splitlines()[0]}" in out
        assert all(f"{key} " in out for key in get_changed_flags(read_pretrain_recipe(name)))
    assert "mask-ratio: How much should be hidden?" in out


# ---------------------------------------------------------------------- runs


def test_a_complete_run_and_its_config_as_a_recipe(run, tmp_path):
    first = [*TINY, "--data", "shapes:200:size=16", "--steps", "4", "--lr", "1e-3", "--holdout", "0"]
    assert run("pretrain", *first, "--out", tmp_path / "a")[0] == 0
    code, out, _ = run("pretrain", *first, "--out", tmp_path / "a")
    assert code == 0
    assert "is complete" in out
    recipe = tmp_path / "a" / "config.yaml"
    assert run("pretrain", "--recipe", recipe, "--out", tmp_path / "b")[0] == 0
    one, two = (checkpoint.load(tmp_path / name / "checkpoints" / "last") for name in "ab")
    assert all(torch.equal(two.tensors["model"][name], t) for name, t in one.tensors["model"].items())
    kept = one.state["config"]
    assert two.state["config"] == {**kept, "run": {**kept["run"], "out": str(tmp_path / "b")}}
    record = json.loads((tmp_path / "b" / "run.json").read_text())
    assert record["argv"] == [
        "quarterview",
        "pretrain",
        "--recipe",
        str(recipe),
        "--out",
        str(tmp_path / "b"),
    ]

    code, _, err = run("pretrain", *first, "--out", tmp_path / "a", "--mask-ratio", "0.5")
    assert code == 2
    assert "mask_ratio: was 0.75, now 0.5" in err


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("lr: !!python/object/apply:os.system ['touch hacked']\n", "not valid YAML"),
        ("lr: !!python/name:os.system\n", "not valid YAML"),
        ("lr: [1,\n", "not valid YAML"),
        ("- 1\n", "not a mapping of fields"),
        ("", "not a mapping of fields"),
        ("mask_ration: 0.5\n", "Did you mean --mask-ratio?"),
        ("mask_ratio: 0.999\n", "mask ratio of 0.999"),
        ("mask_ratio: lots\n", "lots"),
        ("epochs: [1, 2]\n", "epochs"),
    ],
)
def test_a_bad_recipe_file_is_refused(run, tmp_path, monkeypatch, text, said):
    monkeypatch.chdir(tmp_path)
    Path("r.yaml").write_text(text)
    code, _, err = run("pretrain", "--recipe", "r.yaml", "--data", "shapes:20", "--out", "run")
    assert code == 2
    assert said in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["r.yaml"]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_stopped_run_reports_it_and_resumes(run, tmp_path, monkeypatch, number, code):
    real, stopped = Trainer._run_update, []

    def update(self, batch):
        real(self, batch)
        if self.step == 3 and not stopped:
            stopped.append(True)
            os.kill(os.getpid(), number)

    monkeypatch.setattr(Trainer, "_run_update", update)
    argv = ["pretrain", *TINY, "--data", "shapes:200:size=16", "--steps", "6", "--out", tmp_path / "run"]
    ended, out, _ = run(*argv)
    assert ended == code
    assert f"Stopped by {number.name} after step 3. The same command resumes the run" in out
    ended, out, _ = run(*argv)
    assert ended == 0
    assert "step 3 of 6" in out
    assert metrics(tmp_path / "run")[-1]["step"] == 6


def test_a_run_that_diverges_exits_with_1(run, tmp_path):
    np.save(tmp_path / "x.npy", np.full((40, 16, 16, 3), 1e30, np.float32))
    code, _, err = run(
        *("pretrain", *TINY, "--data", tmp_path / "x.npy", "--out", tmp_path / "run", "--steps", 5),
        *("--mean", "0", "0", "0", "--std", "1", "1", "1"),
    )
    assert code == 1
    assert "The gradients of steps 1 to 3 are not finite" in err


def test_images_with_five_channels_that_are_not_square(run, tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (40, 60, 100, 5), dtype=np.uint8)
    np.save(tmp_path / "x.npy", images)
    argv = [word for word in TINY if word not in ("--image-size", "16")]
    argv.remove("--batch-size")
    code, _, err = run(
        *("pretrain", *argv, "--data", tmp_path / "x.npy", "--out", tmp_path / "run", "--steps", 3),
        *("--image-size", 48, 96, "--in-chans", 5, "--batch-size", 8, "--holdout", 2),
    )
    assert (code, err) == (0, "")
    model = qv.load(tmp_path / "run")
    assert (model.config.image_size, model.config.in_chans, model.grid) == ((48, 96), 5, (12, 24))
    assert len(model.config.mean) == 5
    batch = torch.randn(2, 5, 48, 96)
    assert model.encode(batch).shape == (2, 1 + 12 * 24, 32)
    mask = torch.rand(2, 288).argsort(dim=1) >= 72
    pictures = model.reconstruct(batch, mask=mask)
    assert pictures.shape == batch.shape
    hidden = model.unpatchify(mask[:, :, None].expand(-1, -1, 4 * 4 * 5).float()).bool()
    assert torch.equal(pictures[~hidden], batch[~hidden])
    assert not torch.equal(pictures[hidden], batch[hidden])
    assert len(list((tmp_path / "run" / "samples").glob("*.png"))) == 1


# ---------------------------------------------------------------------- a folder from real life


def giant_png() -> bytes:
    """A PNG whose header claims 30,000 × 30,000 pixels, without any."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 100))


@pytest.fixture
def photos(tmp_path) -> Path:
    """A folder with 200 valid photographs and eight other files."""
    folder = tmp_path / "photos"
    folder.mkdir()
    generator = np.random.default_rng(0)
    for i in range(200):
        height, width = generator.integers(24, 60, 2)
        pixels = generator.integers(0, 256, (height // 6 + 1, width // 6 + 1, 3), dtype=np.uint8)
        image = Image.fromarray(pixels).resize((int(width), int(height)))
        image.save(folder / f"good{i:03d}.{'jpg' if i % 2 else 'png'}")
    file = io.BytesIO()
    Image.effect_noise((64, 64), 80).convert("RGB").save(file, "JPEG")
    (folder / "truncated.jpg").write_bytes(file.getvalue()[: len(file.getvalue()) // 2])
    (folder / "empty.png").write_bytes(b"")
    (folder / "text.jpg").write_text("Dear diary, today I was called an image.\n")
    (folder / "giant.png").write_bytes(giant_png())
    Image.new("CMYK", (40, 30), (10, 200, 30, 0)).save(folder / "cmyk.jpg")
    Image.fromarray(np.full((30, 40), 40_000, np.uint16)).save(folder / "deep.png")
    frames = [Image.new("RGB", (30, 30), (colour, 0, 99)) for colour in (3, 99, 200)]
    frames[0].save(folder / "moving.gif", save_all=True, append_images=frames[1:])
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (40, 30), (200, 0, 0)).save(folder / "rotated.jpg", exif=exif)
    return folder


BROKEN = {"truncated.jpg", "empty.png", "text.jpg", "giant.png"}


@pytest.mark.parametrize("workers", [0, 2])
def test_a_folder_with_broken_files_trains_if_allowed(run, tmp_path, photos, workers):
    code, out, err = run(
        *("pretrain", *MODEL, "--batch-size", 16, "--workers", workers, "--data", photos),
        *("--out", tmp_path / "run", "--epochs", 1, "--max-bad-samples", 0.05, "--holdout", 0),
    )
    assert (code, err) == (0, "")
    lines = (tmp_path / "run" / "bad_samples.jsonl").read_text().splitlines()
    rows = {row["name"]: row["reason"] for row in map(json.loads, lines)}
    assert rows.keys() == BROKEN
    assert len(lines) == 4
    assert rows["empty.png"] == "the file is empty"
    assert "not an image in one of the formats" in rows["text.jpg"]
    assert "more than 128 megapixels" in rows["giant.png"]
    assert "truncated" in rows["truncated.jpg"]
    for name in BROKEN:
        assert f"  {name}: {rows[name]}" in out
    for note in (
        *("4 broken image(s)", "1 image(s): CMYK converted to RGB"),
        *("1 image(s): 16 bits scaled to [0, 1]", "1 image(s): first of several frames"),
        "1 image(s): rotated by EXIF",
    ):
        assert note in out
    assert metrics(tmp_path / "run")[-1]["skipped"] == 0
    assert qv.load(tmp_path / "run").config.image_size == (16, 16)


def test_a_folder_with_broken_files_stops_a_run_by_default(tmp_path, photos):
    done = call_apart(
        *("pretrain", *TINY, "--data", photos, "--out", tmp_path / "run", "--epochs", 100_000), timeout=100
    )
    assert done.returncode == 1
    assert (
        "of 208 images are broken, which is more than the 1.00% that --max-bad-samples allows" in done.stderr
    )
    assert "--max-bad-samples" in done.stderr.splitlines()[-1]
    assert any(name in done.stderr for name in BROKEN)
    assert "Traceback" not in done.stderr + done.stdout
    assert checkpoint.find_newest(tmp_path / "run" / "checkpoints") is None


def test_the_command_in_a_process(tmp_path):
    done = call_apart("pretrain", "--data", tmp_path / "nothing", "--out", tmp_path / "run")
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {tmp_path / 'nothing'} does not exist")
    assert done.stdout == ""
    with contextlib.suppress(FileNotFoundError):
        assert not any((tmp_path / "run").glob("[!.]*"))


def test_a_config_yaml_is_read_in_python(tmp_path):
    from quarterview.recipes import read_pretrain_recipe

    flags = {"data": ("a", "b"), "image_size": 32, "lr": 1e-3, "out": "x", "mean": (0.1, 0.2, 0.3)}
    config = qv.PretrainConfig.from_flags(**flags)
    (tmp_path / "c.yml").write_text(yaml.safe_dump(config.to_dict()))
    assert read_pretrain_recipe(str(tmp_path / "c.yml")) == config
    with pytest.raises(UserError, match="Unknown recipe"):
        read_pretrain_recipe(str(tmp_path / "c"))


# ---------------------------------------------------------------------- packed stores


def test_images_are_packed_verified_and_trained_on(run, tmp_path):
    store = tmp_path / "store"
    code, out, _ = run(
        *("pack", "shapes:40:size=24", "--out", store, "--short-side", 20, "--shard-size", 16),
        *("--workers", 0),
    )
    assert code == 0
    assert f"Packed 40 images into {store}" in out
    code, out, _ = run("pack", store, "--verify")
    assert code == 0
    assert "is undamaged: 40 images" in out
    code, _, _ = run(
        "pretrain", "--data", store, *TINY, "--steps", 2, "--cache", "none", "--out", tmp_path / "run"
    )
    assert code == 0
    (store / "00001.bin").write_bytes(bytes((store / "00001.bin").stat().st_size))
    code, _, err = run("pack", store, "--verify")
    assert code == 1
    assert "damaged in 16 place(s)" in err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("pack shapes:40", "A folder for the packed store is missing. Give --out STORE"),
        ("pack shapes:40 --out {} --encoding png", "Unknown value of --encoding: 'png'"),
        ("pack shapes:40 --out {} --part 2/2", "--part is 2/2. Give INDEX/COUNT, such as 0/4"),
        ("pack {} --verify", "is not a packed store: it contains no store.json"),
        ("pack {} --verify --out {}", "--verify checks one packed store"),
    ],
)
def test_invalid_pack_commands_are_refused(run, tmp_path, words, said):
    code, _, err = run(*words.format(*[tmp_path / "there"] * 2).split())
    assert code == 2
    assert said in err
