"""Configurations: small frozen dataclasses with the field names of the JSON files, read strictly.

A field of the file that a dataclass lacks is accepted only if its value changes nothing ("neutral").
"""

from dataclasses import MISSING, fields
from typing import Any, TypeVar

from ldm.errors import LDMError

Config = TypeVar("Config")


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
            raise LDMError(f"The configuration of {what} has a field that ldm doesn't know: {name!r} = {value!r}.")
        if _tuples(value) != _tuples(neutral[name]):
            raise LDMError(
                f"The configuration of {what} asks for {name!r} = {value!r}; ldm implements only {neutral[name]!r}."
            )
    missing = [f.name for f in fields(cls) if f.default is MISSING and f.name not in known]
    if missing:
        raise LDMError(f"The configuration of {what} lacks {', '.join(missing)}.")
    return cls(**known)
