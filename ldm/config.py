"""Configurations: small frozen dataclasses with the field names of the JSON files, read strictly.

A field of the file that a dataclass lacks is accepted only if its value changes nothing ("neutral").
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import MISSING, fields
from types import UnionType
from typing import Any, TypeVar, get_args, get_origin

from ldm.errors import LDMError

Config = TypeVar("Config")
# Far above every real model: beyond them a few bytes of JSON would be a network that fills the memory with its names.
MOST, MOST_LAYERS, MOST_LEVELS, MOST_FLOATS = 2**20, 100, 10, 1_000_000


@contextmanager
def building(what: str) -> Iterator[None]:
    """Turn what torch says of widths that no network can have (they don't divide, they overflow) into a sentence."""
    try:
        yield
    except (ArithmeticError, IndexError, RuntimeError, ValueError) as error:
        why = " ".join(str(error).split())[:120]
        raise LDMError(f"The configuration of {what} makes no network ({why}): take the model's own file.") from error


def check_class(said: Any, known: tuple[str, ...], what: str) -> None:
    """Refuse the configuration of another network, by the class that it names; it may name none.

    Much of it could be read as ours: the fields of networks for video or with other attention are named alike.
    """
    if said is not None and said not in known:
        raise LDMError(
            f"The configuration of {what} names the class {_shown(said)}, and ldm reads {' or '.join(known)} there: "
            "take the model's own file."
        )


def levels_of(fields: dict[str, Any], default: tuple) -> int:
    """How many levels a network's JSON lists. Raises LDMError where it lists none, or too many to be one."""
    widths = fields.get("block_out_channels", default)
    if not isinstance(widths, list | tuple) or not 0 < len(widths) <= MOST_LEVELS:
        raise LDMError(
            f"The configuration of a network has block_out_channels {_shown(widths)}: it must list the widths of 1 to "
            f"{MOST_LEVELS} levels."
        )
    return len(widths)


def _tuples(value: Any) -> Any:
    return tuple(_tuples(v) for v in value) if isinstance(value, list | tuple) else value


def from_json(cls: type[Config], json: dict, neutral: dict[str, Any], what: str) -> Config:
    """Build `cls` from the fields of `json`; names that start with "_" are remarks of the writing program.

    Raises LDMError naming the first field that is neither a field of `cls` nor holds its `neutral` value, and every
    field without a default that is missing.
    """
    names = {f.name for f in fields(cls)}
    known = {k: _tuples(v) for k, v in json.items() if k in names}
    for name, value in json.items():
        if name in names or name.startswith("_"):
            continue
        if name not in neutral:
            raise LDMError(
                f"The configuration of {what} has a field that ldm doesn't know: {name!r} = {_shown(value)}."
            )
        if _tuples(value) != _tuples(neutral[name]):
            known_value = repr(neutral[name])
            raise LDMError(
                f"The configuration of {what} asks for {name!r} = {_shown(value)}; ldm implements only {known_value}."
            )
    missing = [f.name for f in fields(cls) if f.default is MISSING and f.name not in known]
    if missing:
        raise LDMError(f"The configuration of {what} lacks {', '.join(missing)}.")
    for field in fields(cls):
        if field.name in known and not _sound(field.name, known[field.name], field.type):
            raise LDMError(
                f"The configuration of {what} has {field.name!r} = {_shown(known[field.name])}, which is of the wrong "
                "kind or size: take the model's own file."
            )
    return cls(**known)


def _sound(name: str, value: Any, kind: Any) -> bool:
    """Whether a value out of a JSON file is of a field's type, and no larger than real models have it."""
    if isinstance(kind, UnionType):
        return any(_sound(name, value, each) for each in get_args(kind))
    if get_origin(kind) is tuple:
        of = get_args(kind)[0]
        most = MOST_FLOATS if of is float else MOST_LEVELS
        return isinstance(value, tuple) and len(value) <= most and all(_sound(name, each, of) for each in value)
    if kind is float:
        return type(value) in (int, float)
    if kind is int and type(value) is int:
        return 0 <= value <= (MOST_LAYERS if "layers" in name or "blocks" in name else MOST)
    return type(value) is kind if kind is not type(None) else value is None


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}..."
