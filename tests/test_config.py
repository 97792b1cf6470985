"""Parts and composed configurations: checks, messages, flags, plain tables."""

from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

import pytest

from quarterview.config import FIRST, PATH, Composed, Ge, Gt, Lt, Size, Text, Texts, field_specs, part
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
    other_defaults: ClassVar[dict] = {}
    mask_ratio: float = 0.75
    """Ratio."""


@part
class B:
    """Second method."""

    name: ClassVar[str] = "b"
    other_defaults: ClassVar[dict] = {"weight_decay": 0.1}
    temperature: float = 0.5
    """Temperature."""


@dataclass(frozen=True)
class Config(Composed):
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
        ({"device": "cpuu"}, "unknown value of --device: 'cpuu'.*Did you mean 'cpu'"),
        ({"wrong": 1}, "unknown option 'wrong'"),
    ],
)
def test_a_wrong_value_is_told_by_its_flag(values, message):
    with pytest.raises(UserError, match=message):
        Loop(**values)


def test_a_wrong_value_given_by_its_position_is_told_by_its_flag():
    with pytest.raises(UserError, match=r"^--rate 2 is out of range"):
        Loop(8, 2)


def test_one_item_a_list_and_a_path_are_taken(tmp_path):
    places = Places(data="a", out=tmp_path, image_size=[32])
    assert places == Places(data=("a",), out=str(tmp_path), image_size=(32, 32))
    assert Places(data=["a", tmp_path]).data == ("a", str(tmp_path))
    assert Places(out="\udcff").out == "\udcff"  # a file name that is not UTF-8


def test_checks_of_several_fields_keep_their_words():
    with pytest.raises(UserError, match=r"^two sides$"):
        Places(image_size=(1, 2, 3))


def test_a_wrong_item_of_a_list_is_told_with_the_range_of_items():
    with pytest.raises(
        UserError, match=r"^--image-size 0 is out of range. Give whole numbers of at least 1.$"
    ):
        Places(image_size=(16, 0))


def test_help_and_markers_are_read_from_the_class_inherited_fields_too():
    specs = field_specs(Long)
    assert list(specs) == ["batch_size", "rate", "device", "weight_decay"]
    assert specs["batch_size"].help == "Images per update."
    assert specs["batch_size"].markers == {FIRST}
    assert specs["rate"].annotation == float | None
    assert field_specs(Places)["data"].annotation == tuple[str, ...]


def test_flags_reach_their_parts_and_choose_the_method():
    config = Config.from_flags(data=["x"], batch_size=8, method="b", temperature=0.1)
    assert config == Config(Places(("x",)), Long(8, weight_decay=0.1), B(0.1))
    assert config.with_flags(method="a") == Config(Places(("x",)), Long(8, weight_decay=0.1))
    assert Config.from_flags(objective="b", weight_decay=0.3).loop.weight_decay == 0.3
    assert Config.from_flags(method=B(0.2)).method == B(0.2)
    assert Config.from_flags(loop=Long(4)).loop == Long(4)


def test_a_flag_of_another_method_is_told_as_that():
    with pytest.raises(
        UserError, match=r"^--temperature is not a flag of --method a. Remove it, or use --method b.$"
    ):
        Config.from_flags(temperature=1.0)
    with pytest.raises(UserError, match=r"^--mask-ratio is not a flag of --method b. Remove it, or .* a.$"):
        Config.from_flags(method="b", mask_ratio=0.5)
    with pytest.raises(UserError, match="Did you mean --batch-size"):
        Config.from_flags(batchsize=1)


def test_what_is_written_is_read_and_so_is_a_flat_table():
    config = Config.from_flags(data=["x"], batch_size=8, method="b")
    plain = config.to_plain()
    assert plain["method"] == {"name": "b", "temperature": 0.5}
    assert Config.from_plain(plain) == config
    assert Config.from_plain({"data": ["x"], "batch_size": 8, "objective": "b"}) == config
    assert Config.flat(plain) == config.flags() | {"data": ["x"], "image_size": [224, 224]}
    with pytest.raises(UserError, match="batch_size is a table"):
        Config.from_plain({"batch_size": {"a": 1}})
    with pytest.raises(UserError, match="loop is 3"):
        Config.from_plain({"loop": 3})


def test_marked_fields_are_found_through_all_parts():
    assert Config().marked(PATH) == {"data", "out"}
