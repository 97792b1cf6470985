"""Tests of the messages and exit codes of the demo; its training is a slow test elsewhere."""

from types import SimpleNamespace

import pytest

from quarterview import demo
from quarterview.demo import DemoConfig, ProbeAccuracies


@pytest.mark.parametrize(
    ("status", "accuracies", "code", "message"),
    [
        (
            "complete",
            ProbeAccuracies(0.6, 0.2, 0.3),
            0,
            "2.0 times as accurate as on those of a random encoder, and 3.0 times as on raw pixels",
        ),
        ("complete", ProbeAccuracies(0.5, 0.2, 0.3), 1, "The linear probe is not 2 times as accurate"),
        ("SIGTERM", None, 75, "20000 generated images"),
        ("SIGINT", None, 130, "20000 generated images"),
    ],
)
def test_the_message_and_the_exit_code(tmp_path, monkeypatch, capsys, status, accuracies, code, message):
    monkeypatch.setattr(demo, "pretrain", lambda _config, _argv: SimpleNamespace(status=status, step=5))
    monkeypatch.setattr(demo, "save_figures", lambda _folder, _step: None)
    monkeypatch.setattr(demo, "evaluate_features", lambda _out, _seed: accuracies)
    assert demo.main(DemoConfig(str(tmp_path / "demo"), 0), ["quarterview", "demo"]) == code
    output = capsys.readouterr().out
    assert message in output
    assert ("See" in output) == (status == "complete")
