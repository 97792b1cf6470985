"""Configurations of evaluation: flags, markers, and import without torch."""

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
from quarterview.config import MAY_CHANGE, PATH, get_field_specs
from quarterview.errors import UserError
from quarterview.evaluation.config import OnlineProbeConfig

COMPOSED = (
    *(KnnConfig, LinearConfig, RobustnessCommandConfig),
    *(EmbedCommandConfig, LookCommandConfig, ReconstructCommandConfig),
)


@pytest.mark.parametrize("config_class", COMPOSED)
def test_flags_are_unique_and_have_help(config_class):
    names = [name for part in config_class().parts().values() for name in get_field_specs(type(part))]
    assert [name for name, count in Counter(names).items() if count > 1] == []
    assert [name for name, spec in config_class().specs().items() if not spec.help] == []
    assert "run" in config_class().flags_marked(PATH)
    assert config_class.from_dict(config_class().to_dict()) == config_class()


def test_configurations_do_not_import_torch():
    script = "import sys, quarterview.commands.config; print('torch' in sys.modules)"
    process = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert process.stdout.split() == ["False"]


def test_the_probe_may_change_when_a_run_is_resumed():
    assert all(MAY_CHANGE in spec.markers for spec in get_field_specs(OnlineProbeConfig).values())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("knn", "RUN is missing"),
        ("linear --protocol paper", "RUN is missing"),
        ("knn RUN --k 0", "--k is 0. Give one or more numbers, each at least 1"),
        ("linear RUN --epochs 0", "--epochs 0"),
        ("knn RUN --crop-pct 2", "--crop-pct 2"),
        ("robustness", "RUN is missing"),
        ("embed RUN", "--data is missing"),
        ("embed RUN --data shapes", "--out is missing"),
        ("look RUN", "IMAGES is missing"),
        ("reconstruct", "RUN is missing"),
    ],
)
def test_invalid_flags_exit_with_code_2_and_a_message(arguments, message, capsys):
    assert cli.run(arguments.split()) == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_every_flag_reaches_the_configuration():
    config = KnnConfig.from_flags(run="r", train="a", test=["b", "c"], k=[1, 5], labels=7, seed=3, ema=True)
    assert (config.images.train, config.images.test) == (("a",), ("b", "c"))
    assert (config.probe.run, config.probe.labels, config.probe.seed, config.probe.ema) == ("r", 7, 3, True)
    assert config.classifier.k == (1, 5)
    with pytest.raises(UserError, match="Did you mean"):
        KnnConfig.from_flags(label=7)
