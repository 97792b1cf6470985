"""Tests that renamed flags work under their old names with a warning."""

import json
import logging

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

import quarterview as qv
from quarterview import recipes
from quarterview.cli import _import, parse
from quarterview.command_table import COMMANDS
from quarterview.commands.config import FinetuneConfig, PretrainConfig
from quarterview.config import ComposedConfig, flag_name, get_renamed_fields
from quarterview.errors import UserError
from quarterview.models.config import MAEConfig, TokenizerConfig
from quarterview.studies.config import CompareConfig
from quarterview.studies.plan import make_arm_key
from quarterview.studies.plan_file import _rename_fields
from quarterview.studies.study import Arm, read_study
from quarterview.weights.facts import flatten_settings
from quarterview.weights.loading import make_metadata, read_any_header_config

_PRETRAIN = {
    "objective": ("method", "mae", ""),
    "vocabulary": ("codebook_size", "9", ""),
    "predict_share": ("predict_ratio", "0.5", "--decoder cross"),
}
_OTHER_METHODS = {
    "noise": ("noise_std", "0.5", "--method denoising"),
    "head_width": ("proj_hidden_dim", "8", "--method simclr"),
    "head_out": ("proj_output_dim", "8", "--method byol"),
    "view_colours": ("view_colors", None, "--method mocov3"),
}
_ERASE = {"erase": ("erase_prob", "0.1", "")}
OLD_FLAGS = {
    "pretrain": _PRETRAIN | _OTHER_METHODS,
    "tokenizer": {"vocabulary": ("codebook_size", "9", "")},
    "bench": _PRETRAIN,
    "finetune": _ERASE,
    "compare": {
        **_ERASE,
        "least_steps": ("min_steps", "7", ""),
        "worthwhile": ("min_difference", "2", ""),
    },
    "study": {"head_width": ("proj_hidden_dim", "8", ""), "vocabulary": ("codebook_size", "9", "")},
    "export": {"licence": ("license", "MIT", "RUN --to timm --out OUT")},
}
"""By command: the old name, the new one, a value (None for a switch), and the arguments that it needs."""
CASES = [(command, old, *rest) for command, flags in OLD_FLAGS.items() for old, rest in flags.items()]


def warning_of(old: str, new: str) -> str:
    """Return the warning for an old flag."""
    return f"{flag_name(old)} is now called {flag_name(new)}. The old name will go in the next version."


def read_value(value: str | None) -> object:
    """Convert a value of `CASES` to what YAML contains."""
    return True if value is None else yaml.safe_load(value)


@pytest.mark.parametrize(("command", "old", "new", "value", "more"), CASES)
def test_an_old_flag_works_on_the_command_line_with_a_warning(command, old, new, value, more, caplog):
    words = [command, *more.split()]
    expected = parse([*words, flag_name(new), *([] if value is None else [value])])[1]
    assert not caplog.messages
    for spelling in (flag_name(old), f"--{old}"):
        caplog.clear()
        assert parse([*words, spelling, *([] if value is None else [value])])[1] == expected
        assert caplog.messages == [warning_of(old, new)]


@pytest.mark.parametrize("method", ["simclr", "byol", "mocov3"])
def test_an_old_switch_can_be_turned_off(method, caplog):
    config = parse(["pretrain", "--method", method, "--no-view-colours"])[1]
    assert config.method.view_colors is False
    assert caplog.messages == [warning_of("no_view_colours", "no_view_colors")]


def test_all_old_flags_of_all_commands_are_tested():
    for name, command in COMMANDS.items():
        kind = _import(command.config)
        renamed = (
            kind.get_renamed_flags() if issubclass(kind, ComposedConfig) else dict(get_renamed_fields(kind))
        )
        tested = {old: new for old, (new, *_) in OLD_FLAGS.get(name, {}).items()}
        if name == "bench":  # which has a single method
            tested |= {old: new for old, (new, *_) in _OTHER_METHODS.items()}
        if name == "tokenizer":  # has the flags of pretrain
            tested |= {old: new for old, (new, *_) in OLD_FLAGS["pretrain"].items()}
        assert renamed == tested, name


@pytest.mark.parametrize("command", OLD_FLAGS)
def test_help_shows_the_new_names_alone(command, capsys):
    for more in {more for *_, more in OLD_FLAGS[command].values()}:
        with pytest.raises(SystemExit):
            parse([command, *more.split(), "--help"])
        words = capsys.readouterr().out.replace(",", " ").split()
        assert {flag_name(old) for old in OLD_FLAGS[command]}.isdisjoint(words)
        assert "--no-view-colours" not in words


def test_an_old_and_a_new_name_together_are_refused():
    with pytest.raises(UserError, match=r"^--erase is now called --erase-prob, and both are given\. Remove"):
        parse(["finetune", "--erase", "0", "--erase-prob", "0.1"])
    with pytest.raises(UserError, match=r"Remove --noise\.$"):
        PretrainConfig.from_flags(method="denoising", noise=1.0, noise_std=2.0)


@pytest.mark.parametrize(
    ("kind", "command"),
    [(PretrainConfig, "pretrain"), (FinetuneConfig, "finetune"), (CompareConfig, "compare")],
)
def test_an_old_name_works_as_a_keyword_and_in_a_recipe(kind, command, tmp_path, caplog):
    for old, (new, text, more) in OLD_FLAGS[command].items():
        words = more.replace("--", "").split()
        others, value = dict(zip(words[::2], words[1::2], strict=True)), read_value(text)
        caplog.clear()
        expected = kind.from_flags(**others, **{new: value})
        assert not caplog.messages
        assert kind.from_flags(**others, **{old: value}) == expected
        assert caplog.messages == [warning_of(old, new)]
        if old == "objective":  # in a file, the sign of version 0.1
            continue
        caplog.clear()
        path = tmp_path / "mine.yaml"
        path.write_text(yaml.safe_dump({**others, old: value}))
        assert recipes.read_config_file(str(path), kind, {}) == expected
        assert caplog.messages == [warning_of(old, new)]


def old_nested(config: ComposedConfig) -> dict:
    """Return the contents of ``config.yaml`` before the flags were renamed."""
    old = {new: old for old, new in type(config).get_renamed_fields().items()}
    return {
        part: {old.get(name, name): value for name, value in its.items()}
        for part, its in config.to_dict().items()
    }


@pytest.mark.parametrize(
    "config",
    [
        PretrainConfig.from_flags(decoder="cross", predict_ratio=0.5),
        PretrainConfig.from_flags(method="denoising", noise_std=0.5),
        PretrainConfig.from_flags(method="byol", proj_hidden_dim=8, proj_output_dim=4, view_colors=False),
        PretrainConfig.from_flags(method="tokenizer", codebook_size=7),
        FinetuneConfig.from_flags(erase_prob=0.5),
        CompareConfig.from_flags(min_steps=3, min_difference=2.0, erase_prob=0.5),
    ],
)
def test_the_configuration_of_an_earlier_run_is_read(config, tmp_path, caplog):
    kind, plain = type(config), old_nested(config)
    assert plain != config.to_dict()
    assert kind.from_dict(plain) == config
    assert kind.flatten(plain) == kind.flatten(config.to_dict())  # as a resumed run compares them
    assert not caplog.messages
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(plain))
    assert recipes.read_config_file(str(path), kind, {}) == config
    assert caplog.messages
    assert all("is now called" in message for message in caplog.messages)
    shown = flatten_settings(plain)
    assert {name: shown[name] for name in shown if name in config.flags()}.items() <= flatten_settings(
        config.to_dict()
    ).items()


def test_old_names_in_a_study_file_are_read(tmp_path, caplog):
    path = tmp_path / "mine.yaml"
    arms = "{a: {method: denoising, noise: 0.5}, b: {decoder: cross, predict_share: 0.5}}"
    path.write_text(f"base: {{vocabulary: 9}}\ntables: [{{title: T, arms: {arms}}}]\n")
    study = read_study(path)
    assert study.base == {"codebook_size": 9}
    assert [dict(arm.values) for arm in study.tables[0].arms] == [
        {"method": "denoising", "noise_std": 0.5},
        {"decoder": "cross", "predict_ratio": 0.5},
    ]
    pairs = [("vocabulary", "codebook_size"), ("noise", "noise_std"), ("predict_share", "predict_ratio")]
    assert caplog.messages == [warning_of(*pair) for pair in pairs]


def test_a_study_of_an_earlier_version_resumes():
    """Old names in its plan are converted, and the names of its folders are unchanged."""
    known = {"study": {"tables": [{"arms": [{"values": {"noise": 1.0}}]}]}, "pretraining": {"head_out": 2}}
    assert _rename_fields({**known, "head_width": 3, "vocabulary": 4}) == {
        "study": {"tables": [{"arms": [{"values": {"noise_std": 1.0}}]}]},
        "pretraining": {"proj_output_dim": 2},
        "proj_hidden_dim": 3,
        "codebook_size": 4,
    }
    arms = [{}, {"method": "simclr"}, {"method": "denoising"}, {"method": "tokenizer"}]
    keys = [make_arm_key(Arm("x"), PretrainConfig.from_flags(**arm)) for arm in arms]
    assert keys == ["mae-e7f36023", "simclr-341874e5", "denoising-067dabee", "tokenizer-abbd3232"]


@pytest.mark.parametrize(
    ("config", "old"),
    [
        (MAEConfig(decoder="cross", predict_ratio=0.5), {"predict_ratio": "predict_share"}),
        (MAEConfig(target="tokens", codebook_size=9), {"codebook_size": "vocabulary"}),
        (TokenizerConfig(4, 1, 9, 8, 1, (0.0,), (1.0,)), {"codebook_size": "vocabulary"}),
    ],
)
def test_the_header_of_earlier_weights_is_read(config, old, tmp_path, caplog):
    (key, header), *rest = make_metadata(config).items()
    content = json.loads(header)
    content["config"] = {old.get(name, name): value for name, value in content["config"].items()}
    save_file({"x": torch.zeros(1)}, tmp_path / "w.safetensors", {key: json.dumps(content), **dict(rest)})
    assert load_file(tmp_path / "w.safetensors").keys() == {"x"}
    assert read_any_header_config(tmp_path / "w.safetensors") == config
    assert not caplog.messages


def test_old_keywords_of_models_work_with_a_warning(caplog):
    caplog.set_level(logging.WARNING)
    model = qv.create_model("mae_vit_16x2x2_patch4", image_size=16, target="tokens", vocabulary=16)
    assert model.config.codebook_size == 16
    assert MAEConfig(decoder="cross", predict_share=0.5).predict_ratio == 0.5
    pairs = [("vocabulary", "codebook_size"), ("predict_share", "predict_ratio")]
    assert caplog.messages == [warning_of(*pair) for pair in pairs]
