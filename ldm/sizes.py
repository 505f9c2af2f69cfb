"""What SDXL is told of a picture's size: the micro-conditioning of Podell et al. 2023, sections 2.2 and 2.3.

Pictures of every size were enlarged or cut to train SDXL, and the UNet was told how: six numbers a picture, and of the
refiner five, of which the last is a score of its beauty. Told that the original was small it draws a blurred picture,
told of a crop it draws one that is cut off.
"""

import math
from dataclasses import dataclass, fields, replace
from numbers import Real

from ldm.errors import LDMError

Pair = tuple[int, int]


@dataclass(frozen=True)
class Sizes:
    """The numbers, as the paper has them: height before width, top before left. None: not said."""

    original: Pair | None = None  # height and width of the picture before it was enlarged or cut
    crop: Pair | None = None  # how much was cut off at the top and at the left; left out, nothing
    target: Pair | None = None  # height and width of what was left; the refiner isn't told it, but the score
    score: float | None = None  # of the refiner alone: a judgement of its beauty, about 1 to 10

    def __post_init__(self):
        for name in ("original", "crop", "target"):
            pair = getattr(self, name)
            if pair is not None and not (isinstance(pair, list | tuple) and len(pair) == 2 and all(map(finite, pair))):
                order = "(top, left)" if name == "crop" else "(height, width)"
                raise LDMError(f"The {name} of sizes must be two numbers {order}, not {pair!r}.")
            object.__setattr__(self, name, pair if pair is None else tuple(pair))  # a file has lists
        if self.score is not None and not finite(self.score):
            raise LDMError(f"The score of sizes must be a finite number, about 1 to 10, not {self.score!r}.")

    @classmethod
    def read(cls, given: object) -> "Sizes":
        """Sizes, or a table of their names as a file has it. Raises LDMError for anything else."""
        if given is None or isinstance(given, cls):
            return given or cls()
        known = [field.name for field in fields(cls)]
        if not isinstance(given, dict) or not given.keys() <= set(known):
            raise LDMError(f"sizes must be ldm.Sizes, or a table with {', '.join(known)}, not {given!r}.")
        return cls(**given)

    def over(self, other: "Sizes") -> "Sizes":
        """These numbers, and the other's where these are not said."""
        return replace(other, **{name: value for name, value in vars(self).items() if value is not None})

    @property
    def numbers(self) -> tuple[float, ...]:
        """The row that the UNet is told: six numbers, or the refiner's five."""
        last = self.target if self.score is None else (self.score,)
        return tuple(map(float, (*self.original, *self.crop, *last)))


def finite(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


SCORE, NEGATIVE_SCORE = 6.0, 2.5  # of the refiner, as diffusers and Stability's own program have them


def told_sizes(
    kind: str | None, given: object, negative: object, width: int, height: int
) -> tuple[Sizes | None, Sizes | None]:
    """What the prompt's half of guidance and the negative one's are told, with every gap filled.

    `kind` is the model's: None is told nothing, SDXL its "target", the refiner a "score". What isn't said of the
    negative half is as the other's, but for the score. Raises LDMError for what this model isn't told.
    """
    if kind is None:
        if given is not None or negative is not None:
            raise LDMError("This model isn't told of sizes, as SDXL is: leave sizes and negative_sizes out.")
        return None, None
    given, negative = Sizes.read(given), Sizes.read(negative)
    idle, why = {"target": ("score", "that is a refiner's"), "score": ("target", "a refiner is told a score instead")}[
        kind
    ]
    if getattr(given, idle) is not None or getattr(negative, idle) is not None:
        raise LDMError(f"The {idle} in sizes means nothing to this model, for {why}: leave it out.")
    drawn = Sizes((height, width), (0, 0), **{kind: (height, width) if kind == "target" else SCORE})
    chosen = given.over(drawn)
    return chosen, negative.over(chosen if kind == "target" else replace(chosen, score=NEGATIVE_SCORE))
