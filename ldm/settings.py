"""What decides a picture beside the model: what the caller says, with every default filled in."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from numbers import Integral, Real
from typing import TYPE_CHECKING

from ldm.errors import LDMError
from ldm.flux import check_plain, choose_tokens, choose_true_guidance
from ldm.samplers import SAMPLERS, find_sampler
from ldm.schedules import Schedule, ScheduleConfig, make_schedule
from ldm.schedules.config import as_read_for, find_rule
from ldm.schedules.spacing import most_steps
from ldm.schedules.table import count_steps, is_whole, numbers
from ldm.sizes import Sizes, told_sizes
from ldm.text.prompts import check_dialect

if TYPE_CHECKING:
    from ldm.models.flux import FluxConfig


@dataclass(frozen=True)
class Defaults:
    """What a model is best drawn with, where the caller says nothing: `ldm.json` in its folder."""

    steps: int = 50
    guidance: float = 7.5
    sampler: str | None = None  # that of the scheduler file
    sigmas: str | None = None  # those of the scheduler file
    width: int | None = None  # the UNet's sample_size times the VAE's factor
    height: int | None = None
    max_sequence_length: int | None = None  # of FLUX: tokens that are read, 256 of schnell


def flux_defaults(config: "FluxConfig") -> Defaults:
    """What FLUX is drawn with where a model says nothing of it: as its family is in diffusers."""
    if config.channels_in > config.channels_out:  # FLUX.1 Fill, Canny, Depth
        return Defaults(steps=50, guidance=30.0, sigmas="even", max_sequence_length=512)
    if config.guidance_embeds:  # dev
        return Defaults(steps=28, guidance=3.5, sigmas="even", max_sequence_length=512)
    return Defaults(steps=4, guidance=1.0, sigmas="even", max_sequence_length=256)  # schnell


@dataclass(frozen=True)
class Levels:
    """The levels of noise that a run visits, and the sampler that goes from one to the next."""

    steps: int
    sampler: str
    rule: str
    sigmas: str | tuple[float, ...]  # "spaced" where `timesteps` are given
    timesteps: tuple[float, ...] | None
    compat: bool

    def schedule(self, config: ScheduleConfig, tokens: int | None = None) -> Schedule:
        """The table of these levels, of a model with that scheduler file (`ldm.schedules.make_schedule`)."""
        sigmas = self.sigmas if self.timesteps is None else None
        schedule = make_schedule(
            read_as(self.sampler, config, self.rule, self.compat), self.steps, self.rule, self.compat,
            sigmas=sigmas, timesteps=self.timesteps, tokens=tokens,
        )  # fmt: skip
        # Of diffusers' classes with this rule only these two go by their stride instead of to the next row.
        return schedule if self.sampler in ("ddim", "plms", "pndm") else replace(schedule, landings=None)


@dataclass(frozen=True)
class Settings(Levels):
    """All that decides a picture, beside the model: the arguments of a call with every default filled in."""

    prompt: tuple[str, ...]
    negative: tuple[str | None, ...]  # None, of SDXL: zeros in place of words
    seeds: tuple[int, ...]
    guidance: float
    eta: float
    width: int
    height: int
    strength: float | None = None  # how much of the road a given picture is sent back; None where none is given
    image_guidance: float | None = None  # of a model that edits pictures
    noise_level: int | None = None  # of an upscaler: how much noise its small picture is given
    sizes: Sizes | None = None  # of SDXL, and what the negative half of guidance is told
    negative_sizes: Sizes | None = None
    denoising_start: float | None = None  # of an ensemble: the share of the road that is behind, and where it ends
    denoising_end: float | None = None
    dialect: str = "plain"  # what the prompts' signs mean (`ldm.text.prompts`)
    true_guidance: float = 1.0  # of a model that is told its guidance: that away from the negative prompt
    max_sequence_length: int | None = None  # of FLUX: tokens of a prompt that are read

    def road(self, schedule: Schedule) -> tuple[int, int, int]:
        """The first row that is run, how many steps are behind there, and how many steps the road has as a whole.

        Of a run by strength the road begins where it does; an ensemble's two runs are one road (the refiner's steps,
        counted back from its end), and inversion walks all of it.
        """
        rows = self.rows(schedule) or range(len(schedule))
        cut = max(self.steps - len(schedule), 0) if self.strength is None else 0  # what was handed over lies behind
        behind = cut + (0 if self.strength is not None else rows.start)
        return rows.start, behind, behind + len(schedule) - rows.start

    def rows(self, schedule: Schedule) -> range:
        """The rows of the schedule at which a step begins.

        `strength` is the share of the steps that are run, cut to whole ones; `denoising_start` and `denoising_end` are
        shares of training's timesteps: a step is run if it begins below the first and not below the second.
        """
        if self.denoising_start is not None:
            first = rows_before(schedule, self.denoising_start)
        else:
            first = 0 if self.strength is None else self.steps - run_of(self.steps, self.strength, self.rule)
        return range(first, len(schedule) if self.denoising_end is None else rows_before(schedule, self.denoising_end))


def check_rows(rows: range, settings: Settings) -> None:
    """Refuse a run between two shares of the road in which no step is left: of strength 0 alone none is wanted."""
    if rows or (settings.denoising_start is None and settings.denoising_end is None):
        return
    if settings.denoising_end is None or not rows.stop:
        name = "denoising_start" if settings.denoising_end is None else "denoising_end"
        raise LDMError(
            f"No step of {settings.steps} lies on that side of {name} {getattr(settings, name):g}: take more steps."
        )
    first = "denoising_start" if settings.strength is None else f"strength {settings.strength:g}"
    raise LDMError(
        f"No step is left to run: {first} begins at row {rows.start}, and denoising_end {settings.denoising_end:g} "
        f"ends at row {rows.stop} of {settings.steps}."
    )


def rows_before(schedule: Schedule, share: float) -> int:
    """How many rows lie in that share of training's timesteps, counted from the noisiest (as diffusers rounds them)."""
    cutoff = round(schedule.total - share * schedule.total)
    return sum(level.t >= cutoff for level in schedule.levels[:-1])


STEPS_ARE = ("total", "actual")


def run_of(steps: int, strength: float, rule: str = "ddim") -> int:
    """How many of `steps` a run of that strength takes: diffusers cuts, so 0.58 of 50 are 28; of flow what is left out.

    There 0.58 of 50 are 29, for it is 21 that the others are cut to.
    """
    if rule == "flow":
        return steps - int(steps - steps * strength)
    return min(int(steps * strength), steps)


def choose_steps(steps: int, strength: float, steps_are: str, most: int, rule: str = "ddim") -> int:
    """The rows of the table of a run of that strength, where `steps` are "total", all rows, or "actual", those run.

    Raises LDMError where nothing would be run, though the strength isn't 0, or where the table would be too long.
    """
    if not isinstance(strength, Real) or not 0 <= strength <= 1:
        raise LDMError(
            f"strength must be a number from 0 (the picture as it is) to 1 (hardly anything of it), not {strength!r}."
        )
    if steps_are not in STEPS_ARE:
        raise LDMError(
            f"steps_are must be 'total' (strength's share of the steps is run) or 'actual' (so many are run), not "
            f"{steps_are!r}."
        )
    if steps_are == "actual" and strength:
        rows = int(min(steps / strength, most + 1))
        while rows <= most and run_of(rows, strength, rule) < steps:
            rows += 1
        rows -= rows <= most and run_of(rows, strength, rule) > steps  # rounding
        if rows > most:
            raise LDMError(
                f"{steps} steps at strength {strength:g} are the last of {steps / strength:g}, and this schedule has "
                f"at most {most}: take fewer steps or more strength."
            )
        return rows
    if strength and not run_of(steps, strength, rule):
        least = math.ceil(1000 / steps) / 1000
        raise LDMError(
            f"Strength {strength:g} of {steps} steps is less than one step: {least:g} is the smallest that works, or "
            "0 for the picture as it is, or say that the steps are actual ones."
        )
    return steps


def choose_levels(
    config: ScheduleConfig,
    defaults: Defaults = Defaults(),
    *,
    steps: int | None = None,
    sampler: str | None = None,
    rule: str | None = None,
    sigmas: str | Sequence[float] | None = None,
    timesteps: Sequence[float] | None = None,
    compat: bool = False,
) -> Levels:
    """What is left open is as `ldm.json` and the scheduler file say. Raises LDMError for what cannot be."""
    if sampler is None:
        sampler = defaults.sampler if defaults.sampler is not None else config.sampler
    config = read_as(sampler, config, rule, compat)
    rule = config.rule if rule is None else rule
    find_rule(rule)
    sigmas = sigmas if isinstance(sigmas, str | None) else numbers("sigmas", sigmas)
    if timesteps is None:
        sigmas = sigmas if sigmas is not None else defaults.sigmas or config.sigmas
    elif sigmas is not None and sigmas != "spaced":  # as a record has it where timesteps were given
        raise LDMError("Both timesteps and sigmas are given: a schedule takes one of them.")
    else:
        timesteps, sigmas = numbers("timesteps", timesteps), "spaced"
    given = None if isinstance(sigmas, str) else sigmas
    if steps is not None:
        steps = whole("steps", steps, 1)
    elif given is None and timesteps is None:
        steps = defaults.steps
    steps = count_steps(replace(config, rule=rule), steps, given, timesteps)
    return Levels(steps, sampler, rule, sigmas, timesteps, compat)


def read_as(sampler: str, config: ScheduleConfig, rule: str | None, compat: bool) -> ScheduleConfig:
    """The scheduler file; under `compat`, as the class of a sampler that is not the file's own would read it."""
    own = find_sampler(sampler).rule
    swapped = compat and sampler != config.sampler and rule in (None, own) and "flow" not in (config.rule, own)
    return as_read_for(sampler, config) if swapped else config


@dataclass(frozen=True)
class Model:
    """What the settings of a run must fit."""

    scheduler: ScheduleConfig
    defaults: Defaults
    task: str  # of `ldm.tasks.TASKS`
    factor: int  # how many pixels a latent stands for along a side
    size: int  # pixels along a side of the pictures the model was trained on
    most_noise: int = 0  # an upscaler's noise levels are below this
    sizes: str | None = None  # what SDXL is told of them (`ldm.sizes`): "target", or of a refiner "score"
    zero_negative: bool = False  # zeros stand in the place of a negative prompt where none is given (SDXL)
    patch: int = 1  # positions of a latent along a side of what the network takes as one: FLUX 2
    distilled: bool = False  # it is told the scale of guidance
    most_tokens: int | None = None  # that FLUX can read of a prompt; None: no FLUX

    @property
    def multiple(self) -> int:
        """Pixels of which a side is a multiple."""
        return self.factor * self.patch


def choose_settings(
    model: Model,
    prompt: str | Sequence[str],
    *,
    negative: str | Sequence[str | None] | None = None,
    seed: int = 0,
    steps: int | None = None,
    guidance: float | None = None,
    sampler: str | None = None,
    eta: float | None = None,
    rule: str | None = None,
    sigmas: str | Sequence[float] | None = None,
    timesteps: Sequence[float] | None = None,
    compat: bool = False,
    strength: float | None = None,
    steps_are: str = "total",
    image_guidance: float | None = None,
    noise_level: int | None = None,
    sizes: Sizes | dict | None = None,
    negative_sizes: Sizes | dict | None = None,
    denoising_start: float | None = None,
    denoising_end: float | None = None,
    width: int | None = None,
    height: int | None = None,
    count: int = 1,
    dialect: str = "plain",
    true_guidance: float | None = None,
    max_sequence_length: int | None = None,
) -> Settings:
    """Fill in every default, and refuse with a sentence what cannot be drawn.

    prompt, negative          `count` pictures for each prompt, of seeds seed, seed + 1, ...; one negative, or one each.
                              None: the empty prompt, or what the model was trained with in its place (SDXL: zeros)
    dialect                   what signs in both mean: "plain" nothing, "a1111" or "compel" (`ldm.text.prompts`)
    guidance                  1 or less runs the conditional model alone, in which `negative` has no part; a model that
                              is told its guidance (LCM, FLUX.1-dev) is told this number
    true_guidance             of such a model: guidance away from `negative`, above 1, at twice the time
    max_sequence_length       of FLUX: how many tokens of a prompt are read
    sampler, eta              one of `ldm.samplers.SAMPLERS`, and the share of fresh noise in those that have the choice
    steps, rule, sigmas, timesteps    the noise levels (`ldm.schedules.make_schedule`)
    compat                    do what diffusers does where it departs from a method, and take the rule of the sampler's
                              class there
    strength, steps_are       of a given picture, from 0 (as it is) to 1: the share of the steps that is run. The steps
                              are the "total" of which that share is taken (diffusers), or the "actual" ones run
    image_guidance            of a model that edits: how strongly the given picture counts (1.5)
    noise_level               of an upscaler: the timestep to which its small picture is noised (20)
    sizes, negative_sizes     of SDXL: what each half of guidance is told of a picture's size (`ldm.sizes`)
    denoising_start, denoising_end    of an ensemble: shares of the road, 0.8 is where a refiner takes over
    """
    d, dialect = model.defaults, check_dialect(dialect)
    if model.most_tokens is not None:
        check_plain(dialect)
    prompts = texts("prompt", prompt)
    negatives = texts("negative prompt", negative, none=True)
    negatives = negatives * len(prompts) if isinstance(negative, str | None) else negatives
    negatives = ["" if each is None and not model.zero_negative else each for each in negatives]
    if not prompts or len(negatives) != len(prompts):
        raise LDMError(
            f"{len(prompts)} prompts and {len(negatives)} negative ones given: one negative for all, or one each."
        )
    seed, count = whole("seed", seed, 0, 2**63), whole("count", count, 1)
    guidance = d.guidance if guidance is None else guidance
    if not isinstance(guidance, Real) or not math.isfinite(guidance):
        raise LDMError(f"guidance must be a finite number, not {guidance!r}.")
    asked = {"sampler": sampler, "rule": rule, "sigmas": sigmas, "timesteps": timesteps, "compat": compat}
    levels = choose_levels(model.scheduler, d, steps=steps, **asked)
    if strength is None and steps_are != "total":
        raise LDMError("steps_are speaks of the steps run from a given picture: pass one as image, and a strength.")
    if strength is not None:
        config = read_as(levels.sampler, model.scheduler, levels.rule, compat)
        most = most_steps(replace(config, rule=levels.rule))
        rows = choose_steps(levels.steps, strength, steps_are, most, levels.rule)
        if rows != levels.steps:
            levels = choose_levels(model.scheduler, d, steps=rows, **asked)
    own = find_sampler(levels.sampler).eta
    if eta is not None and not (isinstance(eta, Real) and 0 <= eta <= 1):
        raise LDMError(f"eta must be a number from 0 to 1, not {eta!r}.")
    if eta and own is None:
        able = " and ".join(name for name, method in SAMPLERS.items() if method.eta is not None)
        raise LDMError(f"{levels.sampler} has no eta, {able} have: take one of these samplers, or leave eta out.")
    width = choose_side("width", width, d.width, model)
    height = choose_side("height", height, d.height, model)
    if model.task == "edit":
        image_guidance = 1.5 if image_guidance is None else image_guidance
        if not isinstance(image_guidance, Real) or not math.isfinite(image_guidance):
            raise LDMError(f"image_guidance must be a finite number, not {image_guidance!r}.")
    if model.task == "upscale":
        noise_level = whole("noise_level", 20 if noise_level is None else noise_level, 0, model.most_noise)
    sizes, negative_sizes = told_sizes(model.sizes, sizes, negative_sizes, width, height)
    check_shares(denoising_start, denoising_end)
    n = len(prompts) * count
    return Settings(
        **vars(levels),
        prompt=tuple(p for p in prompts for _ in range(count)),
        negative=tuple(p for p in negatives for _ in range(count)),
        seeds=tuple(range(seed, seed + n)),
        guidance=guidance,
        eta=eta if eta is not None else own or 0.0,
        width=width,
        height=height,
        strength=strength,
        image_guidance=image_guidance,
        noise_level=noise_level,
        sizes=sizes,
        negative_sizes=negative_sizes,
        denoising_start=denoising_start,
        denoising_end=denoising_end,
        dialect=dialect,
        true_guidance=choose_true_guidance(model, true_guidance),
        max_sequence_length=choose_tokens(model, max_sequence_length),
    )


def texts(name: str, given: str | Sequence[str | None] | None, none: bool = False) -> list[str | None]:
    """A text or several as a list; with `none`, None may stand there too. Raises LDMError for anything else."""
    found = list(given) if isinstance(given, Iterable) and not isinstance(given, str | bytes) else [given]
    for each in found:
        if not isinstance(each, str) and not (none and each is None):
            raise LDMError(
                f"A {name} must be a text, not {type(each).__name__}: {each!r:.60}; a list of texts draws several."
            )
    return found


def check_shares(start: float | None, end: float | None, name_of_end: str = "denoising_end") -> None:
    """Refuse shares of the road that are none, or that leave nothing of it."""
    for name, share in (("denoising_start", start), (name_of_end, end)):
        if share is not None and not (isinstance(share, Real) and 0 < share < 1):
            raise LDMError(f"{name} must be a share of the road above 0 and below 1, like 0.8, not {share!r}.")
    if start is not None and end is not None and start >= end:
        raise LDMError(f"denoising_start {start:g} lies behind denoising_end {end:g}: nothing is left between them.")


def choose_side(name: str, asked: int | None, default: int | None, model: Model) -> int:
    """The width or height in pixels: what was asked for, or the model's own."""
    pixels = asked if asked is not None else default or model.size
    if not isinstance(pixels, Integral) or pixels < model.multiple or pixels % model.multiple:
        what = "a latent" if model.patch == 1 else "a patch of the transformer"
        raise LDMError(
            f"{name} must be a multiple of {model.multiple}, not {pixels}: {what} stands for {model.multiple} pixels."
        )
    return pixels


def whole(name: str, value: object, least: int, below: float = math.inf) -> int:
    """`value` itself, or an LDMError if it is no whole number of that range."""
    if not is_whole(value) or not least <= value < below:
        most = "" if below == math.inf else f" and below {below}"
        raise LDMError(f"{name} must be a whole number of {least} or more{most}, not {value!r}.")
    return int(value)
