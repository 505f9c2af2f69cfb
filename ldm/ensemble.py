"""Two denoisers after each other: SDXL's base draws the large, its refiner the last fifth of the road.

    two = Ensemble(ldm.load("sdxl"), ldm.load("sdxl-refiner"))
    two("a lighthouse at dusk", seed=7).images[0]

    for step in two.steps("a lighthouse at dusk", seed=7): ...       # the base's steps, then the refiner's

Podell et al. 2023, section 2.5, and Balaji et al. 2022 (eDiff-I). Each has its own schedule and number of steps. Handed
over is a latent, and the level of noise that it is at: the refiner's table begins with that very level. diffusers hands
over a latent alone, and each side cuts its own table at a share of training's timesteps: with another number of steps
the refiner is told another level than the latent has. `compat` does as diffusers does; every mismatch is said.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from torch import Tensor

from ldm.errors import LDMError, say_on_stderr
from ldm.memory import send_home
from ldm.run import Result, Run
from ldm.sampling import Step
from ldm.schedules import Level, Schedule
from ldm.schedules.table import stays
from ldm.settings import Settings, check_shares, rows_before

if TYPE_CHECKING:
    from ldm.pipeline import Pipeline


def taken_over(schedule: Schedule, level: Level, name: str = "the refiner") -> Schedule:
    """The table of a run that begins at another's `level`: that level, and the rows below it.

    Says on stderr where the table has no such row, between which two it lies.
    """
    after = below(schedule, level)
    if not after:
        raise LDMError(
            f"A latent at t = {level.t:g} is handed over, and {name}'s table of {len(schedule)} steps has no row below "
            "it: give it more steps, or hand over earlier."
        )
    if not any(stays(row, level) for row in schedule.levels):
        above = next((f"{row.t:g}" for row in reversed(schedule.levels) if row.ratio > level.ratio), "no row")
        say_on_stderr(
            f"The base stops at t = {level.t:g}, which is no row of {name}'s table (that has {above} and "
            f"{after[0].t:g}): its first step goes from {level.t:g} to {after[0].t:g}."
        )
    rows = [level, *after]
    return replace(schedule, levels=tuple(row._replace(i=i) for i, row in enumerate(rows)), landings=None)


def below(schedule: Schedule, level: Level) -> list[Level]:
    """The rows with less noise than that level."""
    return [row for row in schedule.levels if row.ratio < level.ratio and not stays(row, level)]


def check_told(told: Level, level: Level, name: str = "the refiner") -> None:
    """Say on stderr what diffusers doesn't: that a latent at `level` is told to be at another one."""
    if not stays(told, level):
        say_on_stderr(
            f"The base stops at t = {level.t:g}, and {name} is told that its latent is at t = {told.t:g}, as diffusers "
            "does it: without compat it begins where the base stops."
        )


def handed_schedule(handed: Step, schedule: Schedule, settings: Settings) -> Schedule:
    """The table of a run that goes on from another model's step; under `compat` its own."""
    if not settings.compat:
        return taken_over(schedule, handed.next)
    check_told(schedule[settings.rows(schedule).start], handed.next)
    return schedule


def handed_latent(handed: Step, schedule: Schedule, settings: Settings) -> Tensor:
    """The latent itself; under `compat` what diffusers would take it for, whose Euler and its like keep x / alpha."""
    if len(handed.x) != len(settings.seeds):
        raise LDMError(f"Latents of {len(handed.x)} pictures are handed over, for {len(settings.seeds)} to be drawn.")
    told = schedule[settings.rows(schedule).start]
    if settings.compat and settings.sampler in OF_RATIO:
        return handed.x * (told.alpha / handed.next.alpha)
    return handed.x


OF_RATIO = ("euler", "euler-a", "heun", "lms", "dpm2", "dpm2-a")


@dataclass(frozen=True)
class Ensemble:
    """A base and a refiner that takes over when `at` of the road (0.8) is behind."""

    base: "Pipeline"
    refiner: "Pipeline"
    at: float = 0.8

    def __post_init__(self):
        check_shares(None, self.at, "at")
        base, refiner = self.base.vae.config, self.refiner.vae.config
        same = math.isclose(base.scaling_factor, refiner.scaling_factor)
        if base.latent_channels != refiner.latent_channels or not same:
            raise LDMError("The base and the refiner have latents of different kinds: they don't go together.")
        if self.refiner.task != "text":
            raise LDMError(
                f"The refiner is a model to {self.refiner.task} pictures; it must go on from a latent alone."
            )

    def __call__(self, prompt: str | Sequence[str], *, refined: dict | None = None, **options) -> Result:
        """Draw pictures; the options are the base's (`Pipeline.prepare`), `refined` those in which the refiner differs.

        The refiner is given the prompts, the seeds' further noise, as many steps and the same method, unless `refined`
        says otherwise: {"steps": 20, "guidance": 4.0, "sizes": ...}.
        """
        first, x = self.prepare(prompt, **options), None
        for step in self.walk(first, options, refined or {}):
            x = step.x
        return first.finish(x)  # a mask of the base's is seen to there

    def steps(self, prompt: str | Sequence[str], *, refined: dict | None = None, **options) -> Iterator[Step]:
        """The base's steps, then the refiner's, each yielded as it is taken. Raises LDMError for what cannot be."""
        return self.walk(self.prepare(prompt, **options), options, refined or {})

    def prepare(self, prompt: str | Sequence[str], **options) -> Run:
        """The base's run, up to where the refiner takes over."""
        if taken := {"denoising_start", "denoising_end", "handed", "one_by_one", "after"} & options.keys():
            raise LDMError(f"An ensemble runs two models, and says itself where they meet: leave {min(taken)} out.")
        return self.base.prepare(prompt, denoising_end=self.at, **options)

    def count(self, settings: Settings, refined: dict) -> int:
        """How many steps both take together, of a run of the base with these settings."""
        schedule = self.base.schedule_of(settings)
        first = rows_before(schedule, self.at)
        asked = self.shared(settings, {}, refined)
        levels = ("steps", "sampler", "rule", "sigmas", "timesteps", "compat")
        own = self.refiner.schedule(**{name: asked[name] for name in levels if name in asked})
        after = len(own) - rows_before(own, self.at) if settings.compat else len(below(own, schedule[first]))
        return first - settings.rows(schedule).start + after

    def walk(self, first: Run, options: dict, refined: dict) -> Iterator[Step]:
        """The steps of the base's run, and of the refiner's, which is prepared when the base is done.

        What the refiner is asked for is looked at before the base's first step. Of models that are offloaded one at a
        time is on the device.
        """
        asked, step = self.shared(first.settings, options, refined), None
        for step in first.steps():
            yield step
        send_home(self.base)
        try:
            yield from self.take_over(step, first.settings, asked).steps()
        finally:
            send_home(self.refiner)

    def take_over(self, step: Step, settings: Settings, asked: dict) -> Run:
        """The refiner's run, from the base's last step."""
        given = any(each is not None for each in settings.negative)
        negative = list(settings.negative) if given else None
        prompts, seed = list(settings.prompt), settings.seeds[0]
        return self.refiner.prepare(prompts, negative=negative, seed=seed, handed=step, **asked)

    def shared(self, settings: Settings, options: dict, refined: dict) -> dict:
        """The refiner's options: the base's method, and what `refined` says. Raises LDMError for what is the base's."""
        its_own = {"prompt", "negative", "seed", "count", "handed", "image", "mask", "width", "height"}
        if taken := its_own & refined.keys():
            raise LDMError(f"The refiner goes on with the base's {min(taken)}: leave it out of refined.")
        asked = {name: getattr(settings, name) for name in ("sampler", "rule", "eta", "guidance", "compat", "dialect")}
        if "sampler" in refined:  # with whatever eta it has
            del asked["eta"]
        numbers = "timesteps" in refined or not isinstance(refined.get("sigmas", ""), str)  # levels one by one
        same = not numbers and not {"steps", "sigmas"} & refined.keys()
        if same and settings.timesteps is not None:
            asked["timesteps"] = settings.timesteps
        elif same and not isinstance(settings.sigmas, str):
            asked["sigmas"] = settings.sigmas
        else:
            asked |= {"steps": settings.steps} if not numbers else {}
            named = settings.timesteps is None and isinstance(settings.sigmas, str)
            asked |= {"sigmas": settings.sigmas} if named and "timesteps" not in refined else {}
        asked |= {name: options[name] for name in ("clip_skip", "together", "tile") if name in options} | refined
        sampler = asked["sampler"]
        if settings.compat:
            asked["denoising_start"] = self.at
            if (settings.sampler in OF_RATIO) != (sampler in OF_RATIO):
                raise LDMError(
                    f"Under compat {settings.sampler} can't hand over to {sampler}: of diffusers' classes one keeps x "
                    "and the other x / alpha. Take the same method for both, or leave compat out."
                )
        return asked
