"""Options of plugins: values or ``key=value`` strings to a typed Struct, and their description."""

from __future__ import annotations

import difflib
import enum
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import msgspec
from msgspec import inspect

from .errors import ConfigError, PluginError
from .interfaces import PluginOptions

SEQUENCES = (inspect.VarTupleType, inspect.TupleType, inspect.ListType, inspect.SetType, inspect.FrozenSetType)
NONE_WORDS = ("none", "null", "")
BOOL_WORDS = {"yes": True, "on": True, "true": True, "no": False, "off": False, "false": False}


@dataclass(frozen=True)
class OptionRow:
    """One option as ``rdkv plugins NAME`` shows it; ``default`` is None where a value must be given."""

    name: str
    type: str
    default: str | None
    description: str
    constraints: str

    @property
    def expects(self) -> str:
        """Type and constraints together."""
        return f"{self.type}, {self.constraints}" if self.constraints else self.type


def describe_options(options: type[PluginOptions]) -> list[OptionRow]:
    """The options of a plugin, in the order of its Struct.

    Raises:
        PluginError: an annotation that msgspec cannot check.
    """
    return [
        OptionRow(
            name=field.name,
            type=_type_name(_bare(field.type)),
            default=_default(field),
            description=_description(field.type),
            constraints=", ".join(_constraints(_bare(field.type))),
        )
        for field in _fields(options)
    ]


def parse_options(options: type[PluginOptions], values: Mapping[str, Any] | None, owner: str) -> PluginOptions:
    """An instance of ``options`` from typed values or from the strings of ``--scorer-option k=v``.

    Strings become what the field asks for: ``2,4,8`` a sequence, ``none`` None, ``yes``/``no`` a bool.
    ``owner`` names the plugin in messages.

    Raises:
        ConfigError: an option that the plugin does not have, or a value that it does not take.
    """
    fields = {field.name: field for field in _fields(options)}
    given: dict[str, Any] = {}
    for key, value in (values or {}).items():
        name = str(key).strip().replace("-", "_")
        if name not in fields:
            known = ", ".join(fields) if fields else "none"
            raise ConfigError(f"{owner} has no option {key!r}{did_you_mean(name, fields)}; its options: {known}")
        kind = _bare(fields[name].type)
        given[name] = _from_string(value, kind) if isinstance(value, str) else value
        if isinstance(given[name], float) and math.isnan(given[name]):
            raise ConfigError(f"{owner}: option {name} is nan; it takes {_expects(options, name)}")
    try:
        return msgspec.convert(given, options, strict=False)
    except msgspec.ValidationError as error:
        raise ConfigError(_explain(error, options, values or {}, owner)) from error


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """``; did you mean 'snapkv'?`` without its mark, or nothing where no known name is close."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean '{close[0]}'?)" if close else ""


def _fields(options: type[PluginOptions]) -> tuple[inspect.Field, ...]:
    try:
        info = inspect.type_info(options)
    except (TypeError, NameError) as error:
        raise PluginError(f"options {options.__module__}.{options.__qualname__} are malformed: {error}") from error
    assert isinstance(info, inspect.StructType)
    return info.fields


def _explain(
    error: msgspec.ValidationError, options: type[PluginOptions], values: Mapping[str, Any], owner: str
) -> str:
    message = " ".join(str(error).split())
    where = re.search(r" - at `\$\.(\w+)", message)
    if where is None:  # a missing field, or a check of the Struct's own
        return f"{owner}: {message}"
    name = where[1]
    value = next(v for k, v in values.items() if str(k).strip().replace("-", "_") == name)
    return f"{owner}: option {name} is {value!r}; it takes {_expects(options, name)}"


def _expects(options: type[PluginOptions], name: str) -> str:
    return next(row.expects for row in describe_options(options) if row.name == name)


def _from_string(text: str, kind: inspect.Type) -> Any:
    variants = [_bare(v) for v in kind.types] if isinstance(kind, inspect.UnionType) else [kind]
    word = text.strip().lower()
    if word in NONE_WORDS and any(isinstance(v, inspect.NoneType) for v in variants):
        return None
    if any(isinstance(v, inspect.StrType) for v in variants):
        return text
    if word in BOOL_WORDS and any(isinstance(v, inspect.BoolType) for v in variants):
        return BOOL_WORDS[word]
    if any(isinstance(v, SEQUENCES) for v in variants):
        items = text.strip().strip("()[]").split(",")
        return [item.strip() for item in items if item.strip()]
    if word == "nan" and any(isinstance(v, inspect.FloatType) for v in variants):
        return math.nan  # refused by the caller, whatever the field's bounds
    return text.strip()


def _bare(kind: inspect.Type) -> inspect.Type:
    while isinstance(kind, inspect.Metadata):
        kind = kind.type
    return kind


def _description(kind: inspect.Type) -> str:
    while isinstance(kind, inspect.Metadata):
        if text := (kind.extra_json_schema or {}).get("description"):
            return str(text)
        kind = kind.type
    return ""


def _type_name(kind: inspect.Type) -> str:
    kind = _bare(kind)
    if isinstance(kind, inspect.UnionType):
        return " or ".join(_type_name(v) for v in kind.types)
    if isinstance(kind, inspect.LiteralType):
        return " | ".join(map(_word, kind.values))
    if isinstance(kind, inspect.EnumType):
        return " | ".join(_word(member.value) for member in kind.cls)
    if isinstance(kind, inspect.TupleType):
        return ",".join(_type_name(v) for v in kind.item_types)
    if isinstance(kind, (inspect.VarTupleType, inspect.ListType, inspect.SetType, inspect.FrozenSetType)):
        return f"{_type_name(kind.item_type)},..."
    return type(kind).__name__.removesuffix("Type").lower()  # IntType -> int


def _constraints(kind: inspect.Type) -> list[str]:
    kind = _bare(kind)
    if isinstance(kind, inspect.UnionType):
        return [text for v in kind.types for text in _constraints(v)]
    words = {"gt": "above", "ge": "at least", "lt": "below", "le": "at most", "multiple_of": "a multiple of"}
    found = [f"{word} {_word(v)}" for key, word in words.items() if (v := getattr(kind, key, None)) is not None]
    unit = "characters" if isinstance(kind, inspect.StrType) else "items"
    if (least := getattr(kind, "min_length", None)) is not None:
        found.append(f"at least {least} {unit}")
    if (most := getattr(kind, "max_length", None)) is not None:
        found.append(f"at most {most} {unit}")
    if (pattern := getattr(kind, "pattern", None)) is not None:
        found.append(f"matching {pattern}")
    if isinstance(kind, (inspect.VarTupleType, inspect.ListType, inspect.SetType, inspect.FrozenSetType)):
        found += [f"each {text}" for text in _constraints(kind.item_type)]
    return found


def _default(field: inspect.Field) -> str | None:
    if field.default_factory is not msgspec.NODEFAULT:
        return _word(field.default_factory())
    return None if field.required else _word(field.default)


def _word(value: Any) -> str:
    """A value as it is written after ``k=``."""
    if isinstance(value, enum.Enum):
        return _word(value.value)
    if value is None or isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (tuple, list, set, frozenset)):
        return ",".join(map(_word, value))
    return str(value)
