"""The configurations of evaluation: their flags, their markers, and that they need no torch."""

import subprocess
import sys
from collections import Counter

import pytest

from quarterview import cli
from quarterview.commands.config import (
    EmbedCommandConfig,
    KnnConfig,
    LinearConfig,
    LookCommandConfig,
    ReconstructCommandConfig,
    RobustnessCommandConfig,
)
from quarterview.config import MAY_CHANGE, PATH, field_specs
from quarterview.errors import UserError
from quarterview.evaluation.config import OnlineProbeConfig

COMPOSED = (
    *(KnnConfig, LinearConfig, RobustnessCommandConfig),
    *(EmbedCommandConfig, LookCommandConfig, ReconstructCommandConfig),
)


@pytest.mark.parametrize("kind", COMPOSED)
def test_flags_are_unique_and_have_help(kind):
    names = [name for part in kind().parts().values() for name in field_specs(type(part))]
    assert [name for name, count in Counter(names).items() if count > 1] == []
    assert [name for name, spec in kind().specs().items() if not spec.help] == []
    assert "run" in kind().marked(PATH)
    assert kind.from_plain(kind().to_plain()) == kind()


def test_configurations_need_no_torch():
    script = "import sys, quarterview.commands.config; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False"]


def test_what_is_probed_may_change_when_a_run_is_resumed():
    assert all(MAY_CHANGE in spec.markers for spec in field_specs(OnlineProbeConfig).values())


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("knn", "RUN is missing"),
        ("linear --protocol paper", "RUN is missing"),
        ("knn RUN --k 0", "--k 0 is no number of neighbours"),
        ("linear RUN --epochs 0", "--epochs 0"),
        ("knn RUN --crop-pct 2", "--crop-pct 2"),
        ("robustness", "RUN is missing"),
        ("embed RUN", "--data is missing"),
        ("embed RUN --data shapes", "--out is missing"),
        ("look RUN", "IMAGES is missing"),
        ("reconstruct", "RUN is missing"),
    ],
)
def test_wrong_flags_end_with_2_and_a_reason(words, said, capsys):
    assert cli.run(words.split()) == 2
    assert said in " ".join(capsys.readouterr().err.split())


def test_every_flag_reaches_the_configuration():
    config = KnnConfig.from_flags(run="r", train="a", test=["b", "c"], k=[1, 5], labels=7, seed=3, ema=True)
    assert (config.images.train, config.images.test) == (("a",), ("b", "c"))
    assert (config.probe.run, config.probe.labels, config.probe.seed, config.probe.ema) == ("r", 7, 3, True)
    assert config.classifier.k == (1, 5)
    with pytest.raises(UserError, match="Did you mean"):
        KnnConfig.from_flags(label=7)
