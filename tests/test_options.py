"""Options of plugins: strings and values to typed fields, what is refused, how they are described."""

from __future__ import annotations

import enum
from typing import Annotated, Any, Literal

import msgspec
import pytest
from msgspec import Meta

from rdkv.runtime.errors import ConfigError, PluginError
from rdkv.runtime.interfaces import PluginOptions
from rdkv.runtime.options import describe_options, did_you_mean, parse_options
from rdkv.runtime.registry import load_registry

OWNER = "scorer 'wide'"


class Shape(enum.Enum):
    ROUND = "round"
    SQUARE = "square"


class WideOptions(PluginOptions, frozen=True, kw_only=True):
    """A field of every type that options are likely to have."""

    width: Annotated[int, Meta(ge=1, le=99, description="how wide")] = 3
    ladder: Annotated[tuple[int, ...], Meta(min_length=1, description="levels")] = (0, 2, 4)
    share: Annotated[Annotated[float, Meta(gt=0, le=1)] | None, Meta(description="part")] = None
    levels: tuple[Annotated[int, Meta(ge=0)], ...] | None = None
    mode: Literal["avg", "max"] = "avg"
    shape: Shape = Shape.ROUND
    strict: bool = False
    label: str = "x"
    note: str | None = None
    names: list[str] = msgspec.field(default_factory=list)

    def __post_init__(self) -> None:
        if self.width == 13:
            raise ValueError("option width is 13; that is unlucky")


class NeedyOptions(PluginOptions, frozen=True, kw_only=True):
    """A field without a default."""

    path: str


class MalformedOptions(PluginOptions, frozen=True, kw_only=True):
    """msgspec refuses a bound on a union, but only when the type is first used."""

    share: Annotated[float | None, Meta(gt=0)] = None


@pytest.mark.parametrize(
    ("name", "given", "value"),
    [
        ("width", "7", 7),
        ("width", " 7 ", 7),
        ("width", 7, 7),
        ("ladder", "0,2,8", (0, 2, 8)),
        ("ladder", "[0, 2]", (0, 2)),
        ("ladder", "4", (4,)),
        ("ladder", [0, 16], (0, 16)),
        ("ladder", (0, 16), (0, 16)),
        ("levels", "0,2", (0, 2)),
        ("levels", "None", None),
        ("share", "0.5", 0.5),
        ("share", "none", None),
        ("share", None, None),
        ("share", "1", 1.0),
        ("mode", "max", "max"),
        ("mode", " max", "max"),
        ("shape", "square", Shape.SQUARE),
        ("strict", "yes", True),
        ("strict", "False", False),
        ("strict", "1", True),
        ("strict", True, True),
        ("label", "a,b", "a,b"),
        ("label", "3", "3"),
        ("label", "none", "none"),
        ("note", "none", None),
        ("note", "nan", "nan"),
        ("names", "a, b", ["a", "b"]),
        ("names", "", []),
    ],
)
def test_value(name: str, given: Any, value: Any) -> None:
    parsed = getattr(parse_options(WideOptions, {name: given}, OWNER), name)
    assert parsed == value
    assert type(parsed) is type(value)


@pytest.mark.parametrize(
    ("name", "given", "words"),
    [
        ("width", "x", ["width is 'x'", "int, at least 1, at most 99"]),
        ("width", "0", ["width is '0'", "at least 1"]),
        ("width", 1.5, ["width is 1.5", "int"]),
        ("width", True, ["width is True", "int"]),
        ("width", None, ["width is None", "int"]),
        ("width", 13, ["unlucky"]),
        ("ladder", "0,x", ["ladder is '0,x'", "int,..."]),
        ("ladder", "", ["ladder is ''", "at least 1 items"]),
        ("levels", "0,-2", ["levels is '0,-2'", "int,... or none", "each at least 0"]),
        ("share", "2", ["share is '2'", "float or none, above 0, at most 1"]),
        ("share", "nan", ["share is nan"]),
        ("share", float("nan"), ["share is nan"]),
        ("mode", "min", ["mode is 'min'", "avg | max"]),
        ("shape", "flat", ["shape is 'flat'", "round | square"]),
        ("strict", "maybe", ["strict is 'maybe'", "bool"]),
        ("label", 3, ["label is 3", "str"]),
        ("widht", "3", ["no option 'widht'", "did you mean 'width'", "ladder, share"]),
        ("widths\n", "3", ["did you mean 'width'"]),
    ],
)
def test_refused(name: str, given: Any, words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_options(WideOptions, {name: given}, OWNER)
    message = str(caught.value)
    assert "\n" not in message
    for word in [OWNER, *words]:
        assert word in message


def test_defaults_and_dashes() -> None:
    assert parse_options(WideOptions, None, OWNER) == WideOptions()
    assert parse_options(WideOptions, {}, OWNER) == WideOptions()
    options = load_registry().scorer("snapkv", {"kernel-size": "7"}).options
    assert getattr(options, "kernel_size", None) == 7


def test_missing_option() -> None:
    with pytest.raises(ConfigError, match=r"scorer 'wide': .*path"):
        parse_options(NeedyOptions, {}, OWNER)
    assert [row.default for row in describe_options(NeedyOptions)] == [None]


def test_plugin_without_options() -> None:
    with pytest.raises(ConfigError, match="scorer 'key-norm' has no option 'window'; its options: none"):
        load_registry().scorer("key-norm", {"window": 3})


def test_own_check_of_a_builtin() -> None:
    with pytest.raises(ConfigError, match="scorer 'snapkv': option kernel_size is 4; it must be odd"):
        load_registry().scorer("snapkv", {"kernel_size": "4"})


def test_malformed_annotation_is_named() -> None:
    for call in (lambda: parse_options(MalformedOptions, {}, OWNER), lambda: describe_options(MalformedOptions)):
        with pytest.raises(PluginError, match="MalformedOptions"):
            call()


def test_description() -> None:
    rows = {row.name: row for row in describe_options(WideOptions)}
    assert list(rows) == list(WideOptions.__struct_fields__)
    width = rows["width"]
    assert (width.type, width.default, width.description) == ("int", "3", "how wide")
    assert width.constraints == "at least 1, at most 99"
    assert width.expects == "int, at least 1, at most 99"
    assert (rows["ladder"].type, rows["ladder"].default) == ("int,...", "0,2,4")
    assert (rows["share"].type, rows["share"].default, rows["share"].description) == ("float or none", "none", "part")
    assert rows["mode"].type == rows["mode"].expects == "avg | max"
    assert (rows["shape"].type, rows["shape"].default) == ("round | square", "round")
    assert (rows["strict"].type, rows["strict"].default) == ("bool", "false")
    assert rows["names"].default == ""


def test_described_defaults_can_be_given_back() -> None:
    registry = load_registry()
    classes = [e.cls for e in [*registry.scorers.values(), *registry.allocators.values(), *registry.formats.values()]]
    for options in [WideOptions, *(cls.Options for cls in classes)]:
        defaults = {row.name: row.default for row in describe_options(options)}
        assert msgspec.structs.asdict(parse_options(options, defaults, OWNER)) == msgspec.structs.asdict(options())


def test_suggestion() -> None:
    assert did_you_mean("snapvk", ["snapkv", "random"]) == " (did you mean 'snapkv'?)"
    assert did_you_mean("zzz", ["snapkv", "random"]) == ""
