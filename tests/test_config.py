"""Tests of parts and composed configurations: checks, messages, flags and dicts."""

from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

import pytest

from quarterview.config import (
    FIRST,
    PATH,
    ComposedConfig,
    Ge,
    Gt,
    Lt,
    Size,
    Text,
    Texts,
    get_field_specs,
    part,
)
from quarterview.errors import UserError


@part
class Loop:
    """How long."""

    batch_size: Annotated[int, Ge(1), FIRST] = 256
    """Images per
    update."""
    rate: Annotated[float | None, Gt(0), Lt(1)] = None
    """A rate."""
    device: Literal["auto", "cpu"] = "auto"
    """Where."""


@part
class Long(Loop):
    """Longer."""

    weight_decay: float = 0.05
    """Decay."""


@part
class Places:
    """Where."""

    data: Annotated[Texts, PATH] = ()
    """Images."""
    out: Annotated[Text, PATH] = ""
    """The folder."""
    image_size: Size = (224, 224)
    """Pixels."""

    def __post_init__(self) -> None:
        if len(self.image_size) != 2:
            raise UserError("two sides")


@part
class A:
    """First method."""

    name: ClassVar[str] = "a"
    default_overrides: ClassVar[dict] = {}
    mask_ratio: float = 0.75
    """Ratio."""


@part
class B:
    """Second method."""

    name: ClassVar[str] = "b"
    default_overrides: ClassVar[dict] = {"weight_decay": 0.1}
    temperature: float = 0.5
    """Temperature."""


@dataclass(frozen=True)
class Config(ComposedConfig):
    RENAMED: ClassVar = {"objective": "method"}

    places: Places = field(default_factory=Places)
    loop: Long = field(default_factory=Long)
    method: A | B = field(default_factory=A)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"batch_size": 0}, r"^--batch-size 0 is out of range. Give a whole number of at least 1.$"),
        ({"batch_size": "8"}, r"^--batch-size 8 is of the wrong type. Give a whole number of at least 1.$"),
        ({"batch_size": True}, "--batch-size True is of the wrong type"),
        ({"batch_size": 2**63}, "is out of range"),
        ({"rate": 2}, r"^--rate 2 is out of range. Give a number above 0 and below 1, or nothing.$"),
        ({"rate": float("nan")}, "--rate nan is out of range"),
        ({"rate": 10**400}, r"^--rate 100000.* is out of range"),
        ({"device": "cpuu"}, "Unknown value of --device: 'cpuu'.*Did you mean 'cpu'"),
        ({"wrong": 1}, "Unknown option 'wrong'"),
    ],
)
def test_an_invalid_value_is_reported_with_its_flag(values, message):
    with pytest.raises(UserError, match=message):
        Loop(**values)


def test_an_invalid_positional_value_is_reported_with_its_flag():
    with pytest.raises(UserError, match=r"^--rate 2 is out of range"):
        Loop(8, 2)


def test_single_items_lists_and_paths_are_accepted(tmp_path):
    places = Places(data="a", out=tmp_path, image_size=[32])
    assert places == Places(data=("a",), out=str(tmp_path), image_size=(32, 32))
    assert Places(data=["a", tmp_path]).data == ("a", str(tmp_path))
    assert Places(out="\udcff").out == "\udcff"  # a file name that is not UTF-8


def test_errors_of_post_init_checks_are_unchanged():
    with pytest.raises(UserError, match=r"^two sides$"):
        Places(image_size=(1, 2, 3))


def test_an_invalid_list_item_is_reported_with_the_accepted_range():
    with pytest.raises(
        UserError, match=r"^--image-size 0 is out of range. Give whole numbers of at least 1.$"
    ):
        Places(image_size=(16, 0))


def test_help_and_markers_of_inherited_fields():
    specs = get_field_specs(Long)
    assert list(specs) == ["batch_size", "rate", "device", "weight_decay"]
    assert specs["batch_size"].help == "Images per update."
    assert specs["batch_size"].markers == {FIRST}
    assert specs["rate"].annotation == float | None
    assert get_field_specs(Places)["data"].annotation == tuple[str, ...]


def test_flags_set_fields_of_parts_and_choose_the_method():
    config = Config.from_flags(data=["x"], batch_size=8, method="b", temperature=0.1)
    assert config == Config(Places(("x",)), Long(8, weight_decay=0.1), B(0.1))
    assert config.with_flags(method="a") == Config(Places(("x",)), Long(8, weight_decay=0.1))
    assert Config.from_flags(objective="b", weight_decay=0.3).loop.weight_decay == 0.3
    assert Config.from_flags(method=B(0.2)).method == B(0.2)
    assert Config.from_flags(loop=Long(4)).loop == Long(4)


def test_a_flag_of_another_method_is_reported():
    with pytest.raises(
        UserError, match=r"^--temperature is not a flag of --method a. Remove it, or use --method b.$"
    ):
        Config.from_flags(temperature=1.0)
    with pytest.raises(UserError, match=r"^--mask-ratio is not a flag of --method b. Remove it, or .* a.$"):
        Config.from_flags(method="b", mask_ratio=0.5)
    with pytest.raises(UserError, match="Did you mean --batch-size"):
        Config.from_flags(batchsize=1)


def test_to_dict_round_trip_and_flat_dicts():
    config = Config.from_flags(data=["x"], batch_size=8, method="b")
    plain = config.to_dict()
    assert plain["method"] == {"name": "b", "temperature": 0.5}
    assert Config.from_dict(plain) == config
    assert Config.from_dict({"data": ["x"], "batch_size": 8, "objective": "b"}) == config
    assert Config.flatten(plain) == config.flags() | {"data": ["x"], "image_size": [224, 224]}
    with pytest.raises(UserError, match="batch_size is a mapping"):
        Config.from_dict({"batch_size": {"a": 1}})
    with pytest.raises(UserError, match="loop is 3"):
        Config.from_dict({"loop": 3})


def test_marked_flags_of_all_parts():
    assert Config().flags_marked(PATH) == {"data", "out"}
