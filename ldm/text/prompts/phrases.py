"""A prompt in phrases, each of one weight: what both dialects make of brackets and signs."""

from decimal import Decimal
from typing import NamedTuple

MOST = 1000.0  # a weight beyond it makes no picture, and products of such would overflow


class Phrase(NamedTuple):
    """A stretch of a prompt that counts alike. `joins`: whether it melts into a neighbour of its weight (compel)."""

    text: str
    weight: float = 1.0
    joins: bool = True


def bounded(weight: float) -> float:
    """The weight, or the nearest that isn't beyond all measure."""
    return min(max(weight, -MOST), MOST)


def as_number(text: str) -> float | None:
    """A weight as it is written, or None for what is no number, and for one beyond all measure."""
    try:
        number = float(text)
    except ValueError:
        return None
    return number if abs(number) <= MOST else None  # neither does NaN compare


def in_digits(number: float) -> str:
    """The shortest digits that are read as that very number, without an exponent, which no dialect knows."""
    return format(Decimal(repr(number)), "f")
