"""What the demo says of what was learned, and the code it ends with; the training itself is a slow test."""

from types import SimpleNamespace

import pytest

from quarterview import demo
from quarterview.demo import DemoConfig, Judged


@pytest.mark.parametrize(
    ("status", "judged", "code", "said"),
    [
        ("complete", Judged(0.6, 0.2, 0.3), 0, "2.0 times as accurate as with a random encoder's, and 3.0"),
        ("complete", Judged(0.5, 0.2, 0.3), 1, "note: these features are not 2 times as good"),
        ("SIGTERM", None, 75, "20000 generated pictures"),
        ("SIGINT", None, 130, "20000 generated pictures"),
    ],
)
def test_the_verdict_and_the_exit_code(tmp_path, monkeypatch, capsys, status, judged, code, said):
    monkeypatch.setattr(demo, "pretrain", lambda _config, _argv: SimpleNamespace(status=status, step=5))
    monkeypatch.setattr(demo, "draw_pictures", lambda _folder, _step: None)
    monkeypatch.setattr(demo, "judge", lambda _out, _seed: judged)
    assert demo.main(DemoConfig(str(tmp_path / "demo"), 0), ["quarterview", "demo"]) == code
    shown = capsys.readouterr().out
    assert said in shown
    assert ("See" in shown) == (status == "complete")
