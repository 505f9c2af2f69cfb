"""What decides a picture beside the model: what the caller says, with every default filled in."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from ldm.errors import LDMError
from ldm.samplers import find_sampler
from ldm.schedules import Schedule, ScheduleConfig, make_schedule
from ldm.schedules.config import as_read_for, find_rule
from ldm.schedules.table import count_steps, is_whole, numbers


@dataclass(frozen=True)
class Defaults:
    """What a model is best drawn with, where the caller says nothing: `ldm.json` in its folder."""

    steps: int = 50
    guidance: float = 7.5
    sampler: str | None = None  # that of the scheduler file
    sigmas: str | None = None  # those of the scheduler file
    width: int | None = None  # the UNet's sample_size times the VAE's factor
    height: int | None = None


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
    negative: tuple[str, ...]
    seeds: tuple[int, ...]
    guidance: float
    eta: float
    width: int
    height: int


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


def whole(name: str, value: object, least: int, below: float = math.inf) -> int:
    """`value` itself, or an LDMError if it is no whole number of that range."""
    if not is_whole(value) or not least <= value < below:
        most = "" if below == math.inf else f" and below {below}"
        raise LDMError(f"{name} must be a whole number of {least} or more{most}, not {value!r}.")
    return int(value)
