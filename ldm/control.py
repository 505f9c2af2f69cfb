"""ControlNets in the loop: a closure looks at (x, level) beside the UNet, and says what is to be added inside it.

Zhang et al. 2023. A `Controller` is given to `ldm.guidance.conditional`, so that guidance, samplers and every other
closure know nothing of it. What doesn't change between the steps, the picture's features and the keys and values of the
words, is computed when the closure is made.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real

import torch
from torch import Tensor

from ldm.conditions import check_kind, check_range, doubts, to_tensor
from ldm.errors import LDMError, say_on_stderr
from ldm.guidance import Controller
from ldm.io.pictures import as_picture
from ldm.models.controlnet import ControlNet
from ldm.models.unet import Extras, Residuals
from ldm.pictures import fit, one_or_each
from ldm.schedules import Level


@dataclass(frozen=True)
class Control:
    """A ControlNet, and the picture it is to look at: `pipe(prompt, control=[Control(net, picture)])`.

    `picture` is whatever `ldm.io.pictures.as_picture` takes, a list of such (one a picture drawn), or a tensor
    (B or 1, 3, H, W) in [0, 1]. `scale` multiplies what the net adds. It is run in the share of the steps from `start`
    to `end`, and not at all in the others. `guess`: the authors' guess mode, for drawing without a prompt. The net sees
    the conditional half alone, and its finer residuals count less. `kind` is one of `ldm.conditions.CONDITIONS`: where
    it is named, a picture that doesn't look like one gets a line on stderr.
    """

    net: ControlNet
    picture: object
    scale: float = 1.0
    start: float = 0.0
    end: float = 1.0
    guess: bool = False
    kind: str | None = None

    def __post_init__(self):
        if not isinstance(self.net, ControlNet):
            raise LDMError(
                f"Control takes a ControlNet, not a thing of type {type(self.net).__name__}: "
                "`ldm.load_controlnet(folder, pipe)` reads one."
            )
        if not isinstance(self.scale, Real) or not math.isfinite(self.scale):
            raise LDMError(f"The scale of a ControlNet must be a finite number, not {self.scale!r}.")
        if not all(isinstance(share, Real) for share in (self.start, self.end)) or not 0 <= self.start < self.end <= 1:
            raise LDMError(
                f"A ControlNet runs from a share of the steps to a later one, 0 <= start < end <= 1: not from "
                f"{self.start!r} to {self.end!r}. Leave it out, to draw without it."
            )
        if self.kind is not None:
            check_kind(self.kind)
        if isinstance(self.picture, Tensor) and (self.picture.dim() != 4 or self.picture.shape[1] != 3):
            raise LDMError(
                f"The picture of a ControlNet has the shape {tuple(self.picture.shape)}; (B or 1, 3, H, W) is needed."
            )

    @property
    def conditional_alone(self) -> bool:
        """Whether the unconditional half of guidance goes without the net."""
        return self.guess or self.net.config.global_pool_conditions  # "shuffle" was made for that half alone

    def rows(self, first: int, last: int) -> frozenset[int]:
        """The rows of the schedule at which the net is run, of the steps `first` to `last` - 1, as diffusers counts.

        Row `last`, where no step begins, goes with the step before it: a method that looks ahead asks there, too.
        """
        n = 0 if self.scale == 0 else last - first
        kept = [first + k for k in range(n) if not (k / n < self.start or (k + 1) / n > self.end)]
        if n and not kept:
            say_on_stderr(f"No step of {n} lies within {self.start:g} to {self.end:g}: a ControlNet is not run.")
        return frozenset(kept + [last] * (last - 1 in kept))

    def size(self) -> tuple[int, int]:
        """Width and height of the picture, or of the first of several."""
        if isinstance(self.picture, Tensor):
            return self.picture.shape[-1], self.picture.shape[-2]
        first = self.picture[0] if isinstance(self.picture, list | tuple) and self.picture else self.picture
        return as_picture(first, "the picture of a ControlNet").size

    def pictures(self, width: int, height: int, count: int) -> Tensor:
        """What the net gets: (B or 1, 3, height, width) in [0, 1]. Raises LDMError for another range or size."""
        if isinstance(self.picture, Tensor):
            wanted = (3, height, width)
            if len(self.picture) not in (1, count) or self.picture.shape[1:] != wanted:
                raise LDMError(
                    f"The picture of a ControlNet has the shape {tuple(self.picture.shape)}; (1 or {count}, 3, "
                    f"{height}, {width}) is needed."
                )
            check_range(self.picture)
            return self.picture.float()
        given = [
            as_picture(each, "the picture of a ControlNet") for each in one_or_each(self.picture, count, "picture")
        ]
        if self.kind in ("canny", "scribble", None) and max(each.width for each in given) > 1.5 * width:
            say_on_stderr(
                f"The picture of a ControlNet is shrunk from {given[0].width} to {width} pixels across, in which thin "
                "lines fade: make edges of a picture of the size that is drawn."
            )
        given = [fit(each, width, height, "The picture of a ControlNet") for each in given]
        for sentence in dict.fromkeys(s for each in given if self.kind is not None for s in doubts(self.kind, each)):
            say_on_stderr(sentence)
        return torch.cat([to_tensor(each) for each in given])


def as_controls(given: Control | Sequence[Control] | None) -> list[Control]:
    """The none, the one or the several of them as a list. Raises LDMError for anything else."""
    found = [] if given is None else list(given) if isinstance(given, list | tuple) else [given]
    for each in found:
        if not isinstance(each, Control):
            what = type(each).__name__
            raise LDMError(f"control takes Controls, a ControlNet with its picture, not a thing of type {what}.")
    return found


@dataclass(frozen=True)
class Seen:
    """A control, with the features of its pictures (B or 1, C, h, w) and the rows of the schedule it is run at."""

    control: Control
    features: Tensor
    rows: frozenset[int]


def lead(seen: Sequence[Seen], contexts: Sequence[Tensor], last: bool = True) -> Controller:
    """All controls for a batch of as many parts as there are `contexts` (B, L, D), the conditional one at the end.

    `last` False: the batch is another part by itself, of which a net for the conditional one alone wants nothing.
    """
    found = []
    for one in seen:
        control, size = one.control, len(contexts[0])
        if control.conditional_alone and not last:
            continue
        alone = control.conditional_alone and len(contexts) > 1
        read = contexts[-1:] if alone else contexts
        features = one.features.expand(size, -1, -1, -1).repeat(len(read), 1, 1, 1)
        each = controller(control.net, torch.cat(list(read)), features, control.scale, one.rows, control.guess)
        found.append(of_last_part(each, len(contexts)) if alone else each)
    return all_together(found)


def controller(
    net: ControlNet,
    context: Tensor,
    features: Tensor,
    scale: float = 1.0,
    rows: frozenset[int] | None = None,
    guess: bool = False,
    extras: Extras = Extras(),
) -> Controller:
    """The net reading `context` (B, L, D) and `features` (B or 1, C, h, w), those of `ControlNet.condition`.

    It is run at these `rows` of the schedule alone; None: at all of them.
    """
    prepared = net.prepare(context)

    def residuals(x: Tensor, level: Level) -> Residuals | None:
        if rows is not None and level.i not in rows:
            return None
        x = x[:, : net.config.in_channels]  # what an inpainting UNet reads beside the latent is not the net's
        return net(x, level.t, prepared, features, extras, scale, guess)

    return residuals


def all_together(controllers: Sequence[Controller]) -> Controller:
    """Several ControlNets at once: their residuals are added up."""

    def residuals(x: Tensor, level: Level) -> Residuals | None:
        found = [each for each in (one(x, level) for one in controllers) if each is not None]
        if not found:
            return None
        skips = [sum(parts[1:], start=parts[0]) for parts in zip(*(skips for skips, _ in found), strict=True)]
        return skips, sum((middle for _, middle in found[1:]), start=found[0][1])

    return residuals


def of_last_part(one: Controller, parts: int = 2) -> Controller:
    """A controller that sees the last of the `parts` of a batch alone, the conditional one: the others get zeros."""

    def residuals(x: Tensor, level: Level) -> Residuals | None:
        found = one(x.chunk(parts)[-1], level)
        if found is None:
            return None
        skips, middle = found

        def padded(r: Tensor) -> Tensor:
            return torch.cat([r.new_zeros(len(x) - len(r), *r.shape[1:]), r])

        return [padded(skip) for skip in skips], padded(middle)

    return residuals
