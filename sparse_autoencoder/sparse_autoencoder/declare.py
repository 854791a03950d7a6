"""Settings that are declared once.

A field of a frozen dataclass carries everything about a setting: its flag, its help, the values it may take, how it stands
in a run's name and whether it identifies the result. Command lines, names, manifests and checks all derive from the fields.

A field is one of three things: a setting (`setting(...)`), a choice among dataclasses (`choice(...)`, whose flag names one of
them), or a dataclass of further settings (any field whose default is a dataclass).
"""

import dataclasses
import math
import numbers
import re
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, TypeVar

T = TypeVar("T")
_MOST_INTEGER = 2**63 - 1  # what files and libraries can hold
_NUMBERS = {int: (numbers.Integral, "a whole number"), float: (numbers.Real, "a number")}


@dataclass(frozen=True)
class Setting:
    """What a field says about itself."""

    help: str  # one phrase for `--help`
    flag: str = ""  # the flag's name without dashes; by default the field's name
    alias: str = ""  # a second flag with the same meaning, where no other setting of the command line has it
    least: float | None = None  # the smallest value allowed
    most: float | None = None  # the largest value allowed
    above: float | None = None  # values must be above this
    below: float | None = None  # values must be below this
    choices: tuple[str, ...] = ()  # the only values allowed
    units: tuple[str, ...] = ()  # units that may follow a whole number (50000items); the first is that of a plain number
    pattern: str = ""  # a regular expression that the whole text must match
    called: str = ""  # what a text must do to match the pattern, in words: "be a name"
    place: int = 0  # parts of a run's name are joined in the order of their places
    # The part of the run's name, with `{}` for the value; "" if the value is a folder of its own; None if neither.
    in_name: str | None = None
    name_default: bool = True  # whether the name shows the default as well
    # Whether the result depends on the value; `changed`: it is recorded only where it is not the default, so that outputs
    # made before the setting existed stay valid.
    identifies: Literal["always", "changed", "never"] = "always"
    when: tuple[str, str] = ("", "")  # (field, value): read only while another field of the dataclass has this value
    presets: Mapping[str, Any] = field(default_factory=dict)  # name of a preset -> the value that it picks
    configurable: bool = True  # whether the defaults of a config file apply
    separate: bool = False  # whether a list is written as separate words, each of which may hold commas
    positional: bool = False  # whether the value is written without a flag


def setting(default: Any, help: str, *, factory: Callable[[], Any] | None = None, **about: Any) -> Any:
    """A dataclass field that declares a setting.

    Args:
        default: its default; ignored if there is a factory.
        help: one phrase for `--help`.
        factory: computes the default.
        about: the other fields of Setting.
    """
    metadata = {"setting": Setting(help, **about)}
    if factory is not None:
        return field(default_factory=factory, metadata=metadata)
    return field(default=default, metadata=metadata)


def choice(variants: Mapping[str, type], default: str, help: str, **about: Any) -> Any:
    """A dataclass field that holds one of several dataclasses; its flag names which.

    Args:
        variants: name -> dataclass.
        default: the name of the default.
        help: one phrase for `--help`.
        about: the other fields of Setting.
    """
    metadata = {"setting": Setting(help, choices=tuple(variants), **about), "variants": variants}
    return field(default_factory=variants[default], metadata=metadata)


@dataclass(frozen=True)
class Flag:
    """A setting as a command line has it."""

    name: str
    setting: Setting
    type: Any  # str, int, float, bool, or a tuple of one of the first two
    default: Any
    field: str  # name of the field
    variants: tuple[str, ...] = ()  # the variants of a choice that have this setting; empty: all

    @property
    def is_tuple(self) -> bool:
        """Whether the value is a list, written with commas."""
        return typing.get_origin(self.type) is tuple

    def parse(self, text: str) -> Any:
        """The value that a text stands for.
        Raises ValueError, which says what it must be, if it is not of the setting's type or not allowed."""
        if self.type is bool:
            if text not in ("True", "False"):
                raise ValueError(f"must be True or False, not {_shown(text)}")
            return text == "True"
        if self.setting.units:
            number, unit = in_unit(text, self.setting.units)
            if complaint := _complaint(self.setting, number):
                raise ValueError(complaint)
            return number if unit == self.setting.units[0] else f"{number}{unit}"
        kind = typing.get_args(self.type)[0] if self.is_tuple else self.type
        if kind is Path and not text.strip():  # which would be the working folder
            raise ValueError(f"must be a path, not {_shown(text)}")
        split = self.is_tuple and not self.setting.separate
        texts = [part.strip() for part in text.split(",") if part.strip()] if split else [text]
        try:
            values = [kind(part) for part in texts]
        except ValueError:
            what = "whole numbers separated by commas" if self.is_tuple else _NUMBERS[kind][1]
            raise ValueError(f"must be {what}, not {_shown(text)}") from None
        for value in values:
            if complaint := _complaint(self.setting, value):
                raise ValueError(complaint)
        return tuple(dict.fromkeys(values)) if self.is_tuple else values[0]


def in_unit(value: int | str, units: tuple[str, ...]) -> tuple[int, str]:
    """The number and the unit of a setting that has units: 3 or "3" (in the first unit), or "50000items".
    Raises ValueError, which says what it must be, if it is anything else."""
    text = _shown(value) if isinstance(value, int) else value.strip() if isinstance(value, str) else ""
    found = re.fullmatch(rf"([+-]?[0-9]{{1,20}})\s*({'|'.join(units)})?", text)
    if found is None:
        raise ValueError(f"must be a whole number, alone or followed by {' or '.join(units)}, not {_shown(value)}")
    return int(found[1]), found[2] or units[0]


@cache
def flags(cls: Any) -> dict[str, Flag]:
    """Every setting of a dataclass, those of nested dataclasses and of all variants included, by the flag's name."""
    found: dict[str, Flag] = {}
    for one, declared, nested in _declared(cls):
        if declared is not None:
            name, default = declared.flag or one.name, _default(one)
            if variants := one.metadata.get("variants"):
                default = next(key for key, variant in variants.items() if type(default) is variant)
                found[name] = Flag(name, declared, str, default, one.name)
                for key, variant in variants.items():
                    for flag in flags(variant).values():
                        earlier = found.get(flag.name, flag)
                        found[flag.name] = dataclasses.replace(earlier, variants=(*earlier.variants, key))
            else:
                found[name] = Flag(name, declared, _plain_type(cls, one.name), default, one.name)
        elif nested is not None:
            found |= flags(nested)
    return found


def build(cls: type[T], values: Mapping[str, Any]) -> T:
    """The dataclass that flags stand for.

    Args:
        cls: the dataclass.
        values: flag -> value; flags of other dataclasses are ignored, what is missing or None is the default, and a list of
            one may be given as its value.
    """
    arguments: dict[str, Any] = {}
    for one, declared, nested in _declared(cls):
        if declared is not None:
            value = values.get(declared.flag or one.name)
            if variants := one.metadata.get("variants"):
                arguments[one.name] = build(type(_default(one)) if value is None else variants[value], values)
            elif value is not None:
                is_list = isinstance(_default(one), tuple)
                arguments[one.name] = (value,) if is_list and not isinstance(value, tuple) else value
        elif nested is not None:
            arguments[one.name] = build(nested, values)
    return cls(**arguments)


def values(declared: Any) -> dict[str, Any]:
    """Flag -> value of a dataclass: what `build` makes it from."""
    found: dict[str, Any] = {}
    for one, about, nested in _declared(type(declared)):
        value = getattr(declared, one.name)
        if about is not None and (variants := one.metadata.get("variants")):
            found[about.flag or one.name] = next(key for key, variant in variants.items() if type(value) is variant)
            found |= values(value)
        elif about is not None:
            found[about.flag or one.name] = value
        elif nested is not None:
            found |= values(value)
    return found


def run_name(declared: Any) -> str:
    """The name of a run: the parts of its settings, in order. A nested dataclass may have a `name_part` of its own."""
    return "".join(text for _, text in sorted(_name_parts(declared))).removeprefix("_")


def _name_parts(declared: Any) -> Iterator[tuple[int, str]]:
    for one, about, nested in _declared(type(declared)):
        value = getattr(declared, one.name)
        if about is not None and about.in_name and _applies(declared, about):
            if about.name_default or value != _default(one):
                yield about.place, about.in_name.format(getattr(value, "name_part", value))
        elif about is None and nested is not None:
            yield from _name_parts(value)


def identity(declared: Any) -> dict[str, Any]:
    """Field -> value of every setting that the result depends on; a variant is written as Python writes it."""
    found: dict[str, Any] = {}
    for one, about, nested in _declared(type(declared)):
        value = getattr(declared, one.name)
        if about is not None:
            wanted = about.identifies == "always" or (about.identifies == "changed" and value != _default(one))
            if wanted and _applies(declared, about):
                found[one.name] = repr(value) if "variants" in one.metadata else value
        elif nested is not None:
            found |= identity(value)
    return found


def check(declared: Any) -> None:
    """Raises ValueError, naming the field, if a setting of a dataclass has a value or type that is not allowed."""
    for one, about, _ in _declared(type(declared)):
        value = getattr(declared, one.name)
        if about is None or "variants" in one.metadata or value is None or isinstance(value, tuple):
            continue
        if about.units:
            try:
                complaint = _complaint(about, in_unit(value, about.units)[0])
            except ValueError as error:
                complaint = str(error)
            if complaint:
                raise ValueError(f"{type(declared).__name__}: {one.name} {complaint}")
            continue
        cls: Any = type(declared)
        number, what = _NUMBERS.get(_plain_type(cls, one.name), (object, ""))
        complaint = _complaint(about, value) if isinstance(value, number) else f"must be {what}, not {_shown(value)}"
        if complaint:
            raise ValueError(f"{type(declared).__name__}: {one.name} {complaint}")


def _declared(cls: Any) -> Iterator[tuple["dataclasses.Field[Any]", Setting | None, type | None]]:
    """Each field, with its Setting or the dataclass that is nested there."""
    for one in fields(cls):
        default = _default(one)
        nested = type(default) if is_dataclass(default) and not isinstance(default, type) else None
        yield one, one.metadata.get("setting"), nested


def _default(one: "dataclasses.Field[Any]") -> Any:
    if one.default is not dataclasses.MISSING:
        return one.default
    return one.default_factory() if one.default_factory is not dataclasses.MISSING else None


def _applies(declared: Any, about: Setting) -> bool:
    name, value = about.when
    return not name or getattr(declared, name) == value


@cache
def _plain_type(cls: Any, name: str) -> Any:
    """The type of a field without `| None`, and of a number with units without `| str`."""
    hint = typing.get_type_hints(cls)[name]
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        hint = next(part for part in typing.get_args(hint) if part is not type(None))
    return hint


def _complaint(about: Setting, value: Any) -> str | None:
    """What a value must be, if it is not allowed."""
    if about.choices and value not in about.choices:
        return f"must be {' or '.join(about.choices)}, not {_shown(value)}"
    if about.pattern and not (isinstance(value, str) and re.fullmatch(about.pattern, value)):
        return f"must {about.called or f'match {about.pattern}'}, not {_shown(value)}"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    if isinstance(value, float) and not math.isfinite(value):
        return f"must be finite, not {value}"
    least, most = about.least, about.most
    if isinstance(value, int):
        least = -_MOST_INTEGER if least is None and value < -_MOST_INTEGER else least
        most = _MOST_INTEGER if most is None and value > _MOST_INTEGER else most
    bounds = [
        (least is None or value >= least, f"at least {least}"),
        (most is None or value <= most, f"at most {most}"),
        (about.above is None or value > about.above, f"above {about.above}"),
        (about.below is None or value < about.below, f"below {about.below}"),
    ]
    asked = [text for _, text in bounds if "None" not in text]
    return None if all(holds for holds, _ in bounds) else f"must be {' and '.join(asked)}, not {_shown(value)}"


def _shown(value: Any) -> str:
    """A value as an error message shows it: on one line, and not longer than one."""
    try:
        text = repr(value)
    except ValueError:  # Python writes out no integers of more than 4300 digits
        return "a number of thousands of digits"
    return text if len(text) <= 80 else f"{text[:60]}... ({len(text)} characters)"
