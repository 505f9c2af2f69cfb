"""ControlNets and T2I-Adapters in the loop: a closure beside the UNet says of (x, level) what is to be added inside it.

Zhang et al. 2023; Mou et al. 2023. A `Controller` is given to `ldm.guidance.conditional`, so that guidance, samplers
and every other closure know nothing of it. What doesn't change between the steps, the picture's features and the keys
and values of the words, is computed when the closure is made. Of an adapter that is all: it doesn't look at (x, level).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from numbers import Real

import torch
from torch import Tensor

from ldm.conditions import check_kind, check_range, doubts, to_tensor
from ldm.errors import LDMError, say_on_stderr
from ldm.guidance import Controller, Told
from ldm.io.pictures import as_picture
from ldm.models.adapter import Adapter, AdapterConfig, check_levels
from ldm.models.controlnet import ControlNet, ControlNetConfig, check_base
from ldm.models.flux import FluxConfig, FluxResiduals
from ldm.models.flux_controlnet import FluxControlNet, FluxControlNetConfig, check_flux_base
from ldm.models.unet import Extras, Residuals, UNetConfig
from ldm.models.vae import VAEConfig
from ldm.pictures import SLACK, fit, one_or_each
from ldm.schedules import Level

GUIDANCE = 3.5  # what a net of FLUX.1-dev is told where the transformer isn't told a scale (schnell): dev's own


@dataclass(frozen=True)
class Control:
    """A ControlNet or an adapter, and the picture it is to look at: `pipe(prompt, control=[Control(net, picture)])`.

    `picture` is whatever `ldm.io.pictures.as_picture` takes, a list of such (one a picture drawn), or a tensor
    (B or 1, 3, H, W) in [0, 1], of one channel for an adapter that looks at grey. `scale` multiplies what the net adds.
    It is run in the share of the steps from `start` to `end`, and not at all in the others: `end` is what diffusers
    calls an adapter's factor, of which rounding costs it a step here and there. `guess`: the authors' guess mode, for
    drawing without a prompt. The ControlNet sees the conditional half alone, and its finer residuals count less.
    `kind` is one of `ldm.conditions.CONDITIONS`: where it is named, a picture that doesn't look like one gets a line on
    stderr. `mode` is the number of a picture's kind, of a net for several (FLUX's unions; each net's page lists its
    own, InstantX's 0 canny, 1 tile, 2 depth, 3 blur, 4 pose, 5 grey, 6 low quality).
    """

    net: ControlNet | FluxControlNet | Adapter
    picture: object
    scale: float = 1.0
    start: float = 0.0
    end: float = 1.0
    guess: bool = False
    kind: str | None = None
    mode: int | None = None

    def __post_init__(self):
        if not isinstance(self.net, ControlNet | FluxControlNet | Adapter):
            raise LDMError(
                f"Control takes a ControlNet, not a thing of type {type(self.net).__name__}: "
                "`ldm.load_controlnet(folder, pipe)` reads one, or an adapter."
            )
        if self.guess and isinstance(self.net, Adapter):
            raise LDMError(
                "An adapter knows no guess mode, for it adds the same to both halves of guidance: leave guess out."
            )
        if self.guess and isinstance(self.net, FluxControlNet):
            raise LDMError("A ControlNet of FLUX knows no guess mode, for it reads the prompt alone: leave guess out.")
        self.check_mode()
        if not isinstance(self.scale, Real) or not math.isfinite(self.scale):
            raise LDMError(f"The scale of {self.what} must be a finite number, not {self.scale!r}.")
        if not all(isinstance(share, Real) for share in (self.start, self.end)) or not 0 <= self.start < self.end <= 1:
            raise LDMError(
                f"{self.what[0].upper() + self.what[1:]} runs from a share of the steps to a later one, 0 <= start < "
                f"end <= 1: not from {self.start!r} to {self.end!r}. Leave it out, to draw without it."
            )
        if self.kind is not None:
            check_kind(self.kind)
        shape = tuple(self.picture.shape) if isinstance(self.picture, Tensor) else None
        if shape is not None and (len(shape) != 4 or shape[1] != self.channels):
            raise LDMError(
                f"The picture of {self.what} has the shape {shape}; (B or 1, {self.channels}, H, W) is needed."
            )

    def check_mode(self) -> None:
        """Raise LDMError for a mode that the net doesn't know, and where it needs one."""
        modes = self.net.config.num_mode if isinstance(self.net, FluxControlNet) else None
        if modes is None and self.mode is not None:
            raise LDMError(f"mode {self.mode!r} is given to {self.what} that knows one kind of picture: leave it out.")
        if modes is not None and (type(self.mode) is not int or not 0 <= self.mode < modes):
            given = "none" if self.mode is None else repr(self.mode)
            raise LDMError(
                f"This ControlNet is one for {modes} kinds of picture: say which by its mode, 0 to {modes - 1}, not "
                f"{given}."
            )

    @property
    def what(self) -> str:
        """What sentences call the net."""
        return "an adapter" if isinstance(self.net, Adapter) else "a ControlNet"

    @property
    def channels(self) -> int:
        """3 for colours; 1 for an adapter that looks at grey."""
        return self.net.config.in_channels if isinstance(self.net, Adapter) else 3

    @property
    def conditional_alone(self) -> bool:
        """Whether the unconditional half of guidance goes without the net."""
        if isinstance(self.net, Adapter | FluxControlNet):
            return False
        return self.guess or self.net.config.global_pool_conditions  # "shuffle" was made for that half alone

    def check_base(self, base: UNetConfig | FluxConfig, vae: VAEConfig, place: str = "") -> None:
        """Raise LDMError if the net was made for another base than this one; `place` says which of several it is."""
        check_net(self.net.config, base, vae, f"The {self.what.split()[-1]}{place}")

    def features(self, picture: Tensor, encode: Callable[[Tensor], Tensor]) -> Tensor | list[Tensor]:
        """What the net sees of pictures (B or 1, 3 or 1, H, W) in [0, 1].

        A net of FLUX is shown latents, which `encode` makes of (B or 1, 3, H, W) in [-1, 1] with noise of their own.
        """
        if isinstance(self.net, FluxControlNet):
            picture = 2 * picture - 1
            picture = picture if self.net.config.reads_pictures else encode(picture)
        return self.net.condition(picture.to(next(self.net.parameters()).dtype))

    def rows(self, first: int, last: int) -> frozenset[int]:
        """The rows of the schedule at which the net is run, of the steps `first` to `last` - 1, as diffusers counts.

        Row `last`, where no step begins, goes with the step before it: a method that looks ahead asks there, too.
        """
        n = 0 if self.scale == 0 else last - first
        kept = [first + k for k in range(n) if not (k / n < self.start or (k + 1) / n > self.end)]
        if n and not kept:
            say_on_stderr(f"No step of {n} lies within {self.start:g} to {self.end:g}: {self.what} is not run.")
        return frozenset(kept + [last] * (last - 1 in kept))

    def size(self) -> tuple[int, int]:
        """Width and height of the picture, or of the first of several."""
        if isinstance(self.picture, Tensor):
            return self.picture.shape[-1], self.picture.shape[-2]
        first = self.picture[0] if isinstance(self.picture, list | tuple) and self.picture else self.picture
        return as_picture(first, f"the picture of {self.what}").size

    def pictures(self, width: int, height: int, count: int, slack: int = SLACK) -> Tensor:
        """What the net gets: (B or 1, 3 or 1, height, width) in [0, 1]. Raises LDMError for another range or size.

        A picture may be out of that proportion by less than `slack` pixels.
        """
        self.check_size(width, height)
        if isinstance(self.picture, Tensor):
            wanted = (self.channels, height, width)
            if len(self.picture) not in (1, count) or self.picture.shape[1:] != wanted:
                raise LDMError(
                    f"The picture of {self.what} has the shape {tuple(self.picture.shape)}; (1 or {count}, "
                    f"{self.channels}, {height}, {width}) is needed."
                )
            check_range(self.picture)
            return self.picture.float()
        given = [
            as_picture(each, f"the picture of {self.what}") for each in one_or_each(self.picture, count, "picture")
        ]
        if self.kind in ("canny", "scribble", None) and max(each.width for each in given) > 1.5 * width:
            say_on_stderr(
                f"The picture of {self.what} is shrunk from {given[0].width} to {width} pixels across, in which thin "
                "lines fade: make edges of a picture of the size that is drawn."
            )
        given = [fit(each, width, height, f"The picture of {self.what}", slack) for each in given]
        for sentence in dict.fromkeys(s for each in given if self.kind is not None for s in doubts(self.kind, each)):
            say_on_stderr(sentence)
        if self.channels == 1:
            given = [each.convert("L") for each in given]
        return torch.cat([to_tensor(each)[:, : self.channels] for each in given])

    def check_size(self, width: int, height: int) -> None:
        """Raise LDMError for a size that the net cannot read."""
        unit = self.net.config.downscale_factor if isinstance(self.net, Adapter) else 1
        if width % unit or height % unit:
            near = "x".join(str(max(unit, side // unit * unit)) for side in (width, height))
            raise LDMError(
                f"This adapter reads pictures whose sides are multiples of {unit}, not {width}x{height}: draw {near}."
            )


def check_net(
    config: ControlNetConfig | FluxControlNetConfig | AdapterConfig,
    base: UNetConfig | FluxConfig,
    vae: VAEConfig,
    name: str,
) -> None:
    """Raise LDMError if a net of this configuration was made for another base than this one."""
    if isinstance(config, FluxControlNetConfig) != isinstance(base, FluxConfig):
        fits, here = ("FLUX", "a UNet") if isinstance(base, UNetConfig) else ("a UNet (Stable Diffusion)", "FLUX")
        raise LDMError(f"{name} was made for {fits}, and this model is {here}: take one that was made for it.")
    if isinstance(config, FluxControlNetConfig):
        check_flux_base(config, base, vae, name)
    else:
        (check_levels if isinstance(config, AdapterConfig) else check_base)(config, base, vae, name)


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
    features: Tensor | list[Tensor]  # an adapter has several, one a level; those of FLUX are (B or 1, N, D)
    rows: frozenset[int]
    base: UNetConfig | FluxConfig | None = None  # of what is led; needed where it is FLUX


def lead(
    seen: Sequence[Seen],
    told: Sequence[Told],
    last: bool = True,
    cond: Told | None = None,
    times: Sequence[float] = (),
) -> Controller:
    """All controls for a batch of as many parts as are `told` something, the conditional one at the end.

    `last` False: the batch is another part by itself, of which a net for the conditional one alone wants nothing, and
    `cond` is what the conditional one is told. `times`: the timesteps of the run, for which nets of FLUX prepare.
    """
    found, cond = [], told[-1] if cond is None else cond
    for one in seen:
        control, size = one.control, len(told[0].context)
        if isinstance(control.net, FluxControlNet):
            found.append(flux_controller(one, cond, len(told), times))
            continue
        if isinstance(control.net, Adapter):
            found.append(adapted([spread(each, size, len(told)) for each in one.features], control.scale, one.rows))
            continue
        if control.conditional_alone and not last:
            continue
        alone = control.conditional_alone and len(told) > 1
        read = told[-1:] if alone else told
        words = Told.join(read)
        features = spread(one.features, size, len(read))
        each = controller(control.net, words.context, features, control.scale, one.rows, control.guess, words.extras)
        found.append(of_last_part(each, len(told)) if alone else each)
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
    prepared = net.prepare(context.to(net.dtype))
    pooled = None if extras.pooled is None else extras.pooled.to(net.dtype)
    # A net knows no scale of guidance (LCM) and no noise level (upscalers), even where its UNet does.
    extras = Extras(pooled=pooled, time_ids=extras.time_ids)

    def residuals(x: Tensor, level: Level) -> Residuals | None:
        if rows is not None and level.i not in rows:
            return None
        latent = x[:, : net.config.in_channels]  # what an inpainting UNet reads beside the latent is not the net's
        skips, middle = net(latent.to(net.dtype), level.t, prepared, features, extras, scale, guess)
        return Residuals([skip.to(x.dtype) for skip in skips], middle.to(x.dtype))

    return residuals


def flux_controller(seen: Seen, cond: Told, parts: int = 1, times: Sequence[float] = ()) -> Controller:
    """A net of FLUX, reading what the conditional one of the `parts` of a batch is told, prepared for these `times`.

    What it adds is the same in all of them, as diffusers has it (XLabs' own program asks it for each part).
    """
    net, control = seen.control.net, seen.control
    context, extras = cond.context.to(net.dtype), cond.extras
    scale = torch.full((len(context),), GUIDANCE, device=context.device) if extras.guidance is None else extras.guidance
    extras = Extras(pooled=extras.pooled.to(net.dtype), guidance=scale)
    prepared = net.prepare(context, extras, times, control.mode)
    features = seen.features.expand(len(context), -1, -1)

    def residuals(x: Tensor, level: Level) -> FluxResiduals | None:
        if level.i not in seen.rows:
            return None
        latent = x.chunk(parts)[-1][:, : net.config.channels_in]  # without what is read beside it
        found = net(latent.to(net.dtype), level.t, prepared, features, control.scale)
        found = FluxResiduals(*([each.to(x.dtype).repeat(parts, 1, 1) for each in kind] for kind in found))
        return net.spread(found, seen.base)

    return residuals


def spread(features: Tensor, size: int, parts: int) -> Tensor:
    """Features (B or 1, C, h, w) of `size` pictures for a batch of so many parts, each of all the pictures."""
    return features.expand(size, -1, -1, -1).repeat(parts, 1, 1, 1)


def adapted(features: Sequence[Tensor], scale: float = 1.0, rows: frozenset[int] | None = None) -> Controller:
    """An adapter's `features`, those of `Adapter.condition`: the same at each of these `rows` (None: at all rows)."""
    levels = [scale * feature for feature in features]

    def residuals(x: Tensor, level: Level) -> Residuals | None:
        if rows is not None and level.i not in rows:
            return None
        return Residuals(levels=[feature.to(x.dtype) for feature in levels])

    return residuals


def all_together(controllers: Sequence[Controller]) -> Controller:
    """Several ControlNets and adapters at once: what they add is added up."""

    def residuals(x: Tensor, level: Level) -> Residuals | FluxResiduals | None:
        found = [each for each in (one(x, level) for one in controllers) if each is not None]
        if not found:
            return None
        if isinstance(found[0], FluxResiduals):
            return FluxResiduals(*(sums(kind) for kind in zip(*found, strict=True)))
        found = [Residuals(*each) for each in found]
        skips = [total(parts) for parts in zip(*(each.skips for each in found if each.skips is not None), strict=True)]
        levels = [total(parts) for parts in zip_longest(*(each.levels for each in found))]  # some adapters have fewer
        return Residuals(skips or None, total([each.middle for each in found]), levels)

    return residuals


def sums(nets: Sequence[Sequence[Tensor]]) -> Sequence[Tensor]:
    """What several nets of FLUX add behind each block; a net that adds nothing there is left out.

    Neighbouring blocks share a tensor, and so they share its sum.
    """
    known = {}
    blocks = list(zip(*(net for net in nets if net), strict=True))
    for parts in blocks:
        known.setdefault(tuple(map(id, parts)), total(parts))
    return [known[tuple(map(id, parts))] for parts in blocks]


def total(parts: Sequence[Tensor | None]) -> Tensor | None:
    """The sum of those that are there."""
    there = [part for part in parts if part is not None]
    return sum(there[1:], start=there[0]) if there else None


def of_last_part(one: Controller, parts: int = 2) -> Controller:
    """A controller that sees the last of the `parts` of a batch alone, the conditional one: the others get zeros."""

    def residuals(x: Tensor, level: Level) -> Residuals | None:
        found = one(x.chunk(parts)[-1], level)
        if found is None:
            return None

        def padded(r: Tensor) -> Tensor:
            return torch.cat([r.new_zeros(len(x) - len(r), *r.shape[1:]), r])

        return Residuals([padded(skip) for skip in found.skips], padded(found.middle))

    return residuals
