"""Tests of what commands import, because imports can take minutes on a busy machine."""

import subprocess
import sys

FIRST_STEP = """
import sys
import quarterview as qv
from quarterview.training.trainer import Trainer

update = Trainer._run_update

def first(self, batch):
    update(self, batch)
    print("loaded", *sorted({"timm", "torchvision", "sklearn", "scipy", "matplotlib"} & set(sys.modules)))
    sys.exit()

Trainer._run_update = first
qv.pretrain(
    data="shapes:200:size=16", out=sys.argv[1], model="mae_vit_32x2x2_patch4", image_size=16, steps=2,
    decoder_width=16, decoder_depth=1, decoder_heads=2, batch_size=8, device="cpu", workers=0,
)
"""


def test_pretraining_does_not_import_unneeded_packages(tmp_path):
    command = [sys.executable, "-c", FIRST_STEP, str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "loaded"


def test_load_prints_nothing(tmp_path):
    """`qv.load` prints nothing: its assumptions go to the log and to `notes`."""
    script = (
        "import sys, quarterview as qv\n"
        "run = sys.argv[1]\n"
        "qv.pretrain(data='shapes:200:size=16', out=run, model='mae_vit_32x2x2_patch4', image_size=16,\n"
        "    steps=1, decoder_width=16, decoder_depth=1, decoder_heads=2, batch_size=8,\n"
        "    device='cpu', workers=0)\n"
        "print('BEGIN')\n"
        "model = qv.load(run)\n"
        "print('END', len(model.config.mean), model.notes)\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.partition("BEGIN\n")[2] == "END 3 ()\n"
