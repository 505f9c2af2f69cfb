"""The table itself: n+1 rows of noise levels, and how a configuration becomes one."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from numbers import Integral
from typing import NamedTuple

import numpy as np

from ldm.errors import LDMError
from ldm.schedules.betas import alpha_bars
from ldm.schedules.config import ScheduleConfig, find_rule
from ldm.schedules.spacing import AYS, choose_sigmas, most_steps, shifted, spaced_timesteps


class Level(NamedTuple):
    """One row: x = alpha * x0 + sigma * eps, and the timestep `t` the network is told (a fraction for some rules)."""

    i: int
    t: float
    alpha: float
    sigma: float

    @property
    def ratio(self) -> float:
        return self.sigma / self.alpha if self.alpha else math.inf


def level_at(i: int, t: float, bar: float) -> Level:
    """The level of a training step, whose alpha^2 is `bar`."""
    return Level(i, float(t), math.sqrt(bar), math.sqrt(1 - bar))


def level_of(i: int, t: float, ratio: float, flow: bool) -> Level:
    """The level whose sigma / alpha is `ratio`, on the circle alpha^2 + sigma^2 = 1 or the line alpha + sigma = 1."""
    alpha = 1 / (1 + ratio) if flow else 1 / math.sqrt(1 + ratio**2)
    return Level(i, float(t), alpha, 1.0 if ratio == math.inf else ratio * alpha)


def stays(level: Level, after: Level) -> bool:
    """Whether two rows are one level: they differ by rounding alone."""
    return math.isclose(level.ratio, after.ratio, rel_tol=1e-9)


@dataclass(frozen=True)
class Schedule:
    """`levels`: n+1 rows. The loop starts from `start_scale` * eps; the network speaks in `prediction`.

    `compat` tells samplers to do what diffusers 0.42.1 does where that departs from the method. `landings`, set under
    `compat` alone, are the levels on which diffusers' DDIM and PNDM believe to land, where those are not the next rows.
    `bars` (N,) is alpha^2 at every training step; None for flow, where alpha = 1 - sigma and t = sigma * `total`.
    """

    levels: tuple[Level, ...]
    prediction: str
    start_scale: float
    rule: str
    landings: tuple[Level, ...] | None = None
    compat: bool = False
    bars: np.ndarray | None = field(default=None, repr=False, compare=False)
    total: int = 1000
    rises: bool = False  # from the clean latent to noise: inversion

    def __post_init__(self):
        if self.prediction == "epsilon" and self.levels[-1 if self.rises else 0].alpha == 0:
            raise LDMError(
                "This schedule begins at alpha = 0, pure noise, where predicting the noise says nothing of the "
                "picture: a model trained for it predicts v or flow (Lin et al. 2023, section 3.2)."
            )
        falling = reversed(self.levels) if self.rises else self.levels
        for a, b in () if self.compat else pairwise(falling):
            if stays(a, b) or b.ratio > a.ratio:
                what = "are the same noise level" if stays(a, b) else "rise instead of falling"
                raise LDMError(
                    f"Rows {a.i} and {b.i} of this schedule (t = {a.t:g} and {b.t:g}) {what}, and a step between them "
                    "would be lost: take fewer steps, another rule, other sigmas or timesteps (whose last is 1 or "
                    "more), or let the scheduler file end at zero (set_alpha_to_one true, final_sigmas_type zero); "
                    "compat keeps the table as diffusers has it."
                )

    def __len__(self) -> int:
        """The number of steps: one less than there are levels."""
        return len(self.levels) - 1

    def __getitem__(self, i: int) -> Level:
        return self.levels[i]

    def step(self, i: int) -> tuple[Level, Level]:
        """The level that step `i` starts from, and the one it goes to."""
        return self.levels[i], self.landings[i] if self.landings else self.levels[i + 1]

    def upwards(self) -> "Schedule":
        """The same levels from the cleanest to the noisiest: the road on which a picture is turned into its noise."""
        levels = tuple(level._replace(i=i) for i, level in enumerate(reversed(self.levels)))
        return replace(self, levels=levels, landings=None, rises=not self.rises)

    def at(self, i: int, t: float) -> Level:
        """The level of timestep `t`, for methods that visit more than the rows; `i` is the row it belongs to."""
        if self.bars is None:
            sigma = t / self.total
            return Level(i, float(t), 1 - sigma, sigma)
        return row_at(i, t, self.bars)

    def between(self, i: int, ratio: float) -> Level:
        """The level of that sigma / alpha, with the timestep that training had for it."""
        if self.bars is None:
            level = level_of(i, 0.0, ratio, flow=True)
            return level._replace(t=level.sigma * self.total)
        return level_of(i, timestep_of(ratio, self.bars), ratio, flow=False)

    def table(self) -> str:
        """The rows as text."""
        rows = [f"{r.i:4d} {r.t:9.3f} {r.alpha:9.6f} {r.sigma:9.6f} {r.ratio:11.6f}" for r in self.levels]
        return "\n".join(["   i         t     alpha     sigma sigma/alpha", *rows])


def timestep_of(ratio: float, bars: np.ndarray) -> float:
    """The timestep, with a fraction, at which training had this sigma / alpha; linear in its logarithm between two."""
    with np.errstate(divide="ignore"):  # infinite at zero terminal SNR, minus infinite at sigma = 0
        return place_among(np.log(np.sqrt((1 - bars) / bars)), np.log(ratio))


def place_among(logs: np.ndarray, wanted: np.float64) -> float:
    """Where in a rising row a number stands: an index, with a fraction between two."""
    low = int(np.clip(np.searchsorted(logs, wanted, side="right") - 1, 0, len(logs) - 2))
    w = min(max((logs[low] - wanted) / (logs[low] - logs[low + 1]), 0.0), 1.0)
    return float((1 - w) * low + w * (low + 1))


def make_schedule(
    config: ScheduleConfig,
    n: int | None = None,
    rule: str | None = None,
    compat: bool = False,
    *,
    sigmas: str | Sequence[float] | None = None,
    timesteps: Sequence[float] | None = None,
    tokens: int | None = None,
) -> Schedule:
    """The table for `n` steps. `rule`: one of `RULES`, otherwise the file's own.

    `sigmas`: one of `CHOICES`, otherwise the file's own; or the levels themselves, n+1 falling numbers sigma / alpha
    (flow: sigma). `timesteps`: or n falling timesteps; the end is the rule's. `tokens`: the length of the network's
    sequence, where the file shifts levels by it. `compat` copies diffusers 0.42.1 where it departs from the method.
    Raises LDMError for what the schedule cannot hold.
    """
    sigmas = sigmas if isinstance(sigmas, str | None) else numbers("sigmas", sigmas)
    timesteps = None if timesteps is None else numbers("timesteps", timesteps)
    config = config if rule is None else replace(config, rule=rule)
    find_rule(config.rule)
    if (config.rule == "flow") != (config.prediction_type == "flow"):
        raise LDMError(
            f"The rule {config.rule!r} doesn't go with a network that predicts {config.prediction_type}: flow models "
            "have the rule flow, and they alone."
        )
    if timesteps is not None and sigmas is not None:
        raise LDMError("Both timesteps and sigmas are given: a schedule takes one of them.")
    n = count_steps(config, n, sigmas, timesteps)
    if config.rule == "flow":
        return flow_table(config, n, sigmas, timesteps, tokens, compat)
    bars = alpha_bars(config).double().numpy()
    choice = sigmas if sigmas is not None else "spaced" if timesteps is not None else config.sigmas
    if choice == "even":
        raise LDMError("The even levels are for flow models: this one has spaced, karras and others.")
    rows = rows_of(config, n, choice, timesteps, bars, compat)
    # "leading" stops short of the noisiest step and calls its first level pure noise; so do rules that aren't scaled.
    scaled = find_rule(config.rule).scaled and config.spacing != "leading"
    striding = compat and config.rule == "ddim" and timesteps is None and choice == "spaced"
    landings = ddim_landings(rows, bars, config.num_train_timesteps // n) if striding else None
    start_scale = rows[0].sigma if scaled else 1.0
    return Schedule(tuple(rows), config.prediction_type, start_scale, config.rule, landings, compat, bars,
                    config.num_train_timesteps)  # fmt: skip


def rows_of(
    config: ScheduleConfig,
    n: int,
    choice: str | Sequence[float],
    timesteps: Sequence[float] | None,
    bars: np.ndarray,
    compat: bool,
) -> list[Level]:
    """The n+1 levels: the caller's own, those of his timesteps, or spaced or chosen as the rule does it."""
    if not isinstance(choice, str):
        most = level_at(0, 0, float(bars[-1])).ratio
        if choice[0] > 1.05 * most:
            raise LDMError(
                f"The sigmas given begin at {choice[0]:g}: training ended at {most:.4g}; begin there or below."
            )
        return [level_of(i, timestep_of(s, bars), float(s), flow=False) for i, s in enumerate(choice)]
    if timesteps is None:
        timesteps = spaced_timesteps(config, n)
    elif compat and not find_rule(config.rule).fractions:  # diffusers cuts them
        timesteps = [int(t) for t in timesteps]
    rows = [row_at(i, t, bars) for i, t in enumerate(timesteps)]
    if choice != "spaced":
        rows = chosen_rows(config, rows, bars, choice, compat)
    return [*rows, last_row(config, rows, bars, compat and choice != "spaced")]


def is_whole(value: object) -> bool:
    """Whether it is a whole number, of any library; True and False are none."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def numbers(name: str, values: Sequence[float]) -> tuple[float, ...]:
    """Whatever holds numbers (a list, an array, a tensor) as plain ones, or an LDMError."""
    try:
        if isinstance(values, str | bytes):  # of which Python would make numbers, digit by digit
            raise TypeError
        return tuple(float(value) for value in values)
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:  # the last from tensors within tensors
        raise LDMError(f"{name} must be a list of falling numbers, not {values!r}.") from error


def count_steps(
    config: ScheduleConfig, n: int | None, sigmas: str | Sequence[float] | None, timesteps: Sequence[float] | None
) -> int:
    """How many steps were asked for, in any of the three ways; an LDMError if there is no such schedule."""
    n = int(n) if is_whole(n) else n
    if timesteps is not None or not isinstance(sigmas, str | None):
        name, given, least = ("timesteps", timesteps, 0) if timesteps is not None else ("sigmas", sigmas, 1)
        falls = all(a > b for a, b in pairwise(given))
        highest = config.num_train_timesteps - 1 if least == 0 and config.rule != "flow" else math.inf
        if len(given) <= least or not falls or not (given[-1] >= 0 and math.isfinite(given[0])) or given[0] > highest:
            ends = f", at most {highest}" if highest < math.inf else ""
            raise LDMError(
                f"{name} must be {least + 1} or more falling numbers, none below 0{ends}: not {list(given)}."
            )
        if n is not None and not (is_whole(n) and n == len(given) - least):
            raise LDMError(
                f"{n!r} steps asked for, but the {name} given make {len(given) - least}: leave one of them out."
            )
        return len(given) - least
    most = most_steps(config)
    if not is_whole(n) or not 1 <= n <= most:
        raise LDMError(f"{n!r} steps asked for; this model's schedule has between 1 and {most} of them.")
    return n


def row_at(i: int, t: float, bars: np.ndarray) -> Level:
    """The level of a timestep; between two training steps it is sigma/alpha that is interpolated."""
    if t == int(t):
        return level_at(i, t, float(bars[int(t)]))
    with np.errstate(divide="ignore"):  # zero terminal SNR
        return level_of(i, t, float(np.interp(t, np.arange(len(bars)), np.sqrt((1 - bars) / bars))), flow=False)


def chosen_rows(config: ScheduleConfig, rows: list[Level], bars: np.ndarray, choice: str, compat: bool) -> list[Level]:
    """As many rows with other noise levels, and the timesteps that training had for them, as the rule tells them."""
    rule, n = find_rule(config.rule), len(rows)
    ends = (level_at(0, 0, bars[-1]), level_at(0, 0, bars[0])) if rule.whole_range else (rows[0], rows[-1])
    most, least = file_ends(config, ends[0].ratio, ends[1].ratio)
    if most == math.inf:
        raise LDMError(
            f"This schedule begins at pure noise (zero terminal SNR), from where no {choice} levels lead: take sigmas "
            "spaced, or set sigma_max."
        )
    ratios = choose_sigmas(choice, most, least, n)
    ts = [timestep_of(ratio, bars) for ratio in ratios]
    if rule.told == "whole" and compat:
        ts = whole_timesteps_of_diffusers(config, choice, n)
    elif rule.told == "whole" or (rule.told == "karras" and choice == "karras"):
        ts = [round(t) for t in ts]
    return [level_of(i, t, float(ratio), flow=False) for i, (t, ratio) in enumerate(zip(ts, ratios, strict=True))]


def file_ends(config: ScheduleConfig, most: float, least: float) -> tuple[float, float]:
    """The ends of chosen levels: these, where the file has no others."""
    return (
        most if config.sigma_max is None else config.sigma_max,
        least if config.sigma_min is None else config.sigma_min,
    )


def whole_timesteps_of_diffusers(config: ScheduleConfig, choice: str, n: int) -> list[int]:
    """What the classes of DPM-Solver, DEIS and UniPC tell the network: rounded for Karras' levels, else cut.

    Of the noisiest level the last digit then decides, 998.9999 or 999: hence in float32, as they calculate. The
    multistep DPM-Solver cuts Karras' timesteps, too, on a cosine schedule.
    """
    bars = alpha_bars(config)
    ratios = ((1 - bars) / bars) ** 0.5
    logs = np.log(ratios.numpy())
    ends = file_ends(config, ratios[-1].item(), ratios[0].item())
    ts = [place_among(logs, np.log(ratio)) for ratio in choose_sigmas(choice, *ends, n)]
    rounds = choice == "karras" and (config.rule, config.beta_schedule) != ("dpm", "squaredcos_cap_v2")
    return [round(t) if rounds else int(t) for t in ts]


def last_row(config: ScheduleConfig, rows: list[Level], bars: np.ndarray, chosen_compat: bool) -> Level:
    """Where the table ends: on the clean latent, or on the cleanest training level."""
    n, ends = len(rows), find_rule(config.rule).ends
    if ends == "file":
        clean = config.set_alpha_to_one is not False if config.rule == "ddim" else config.final_sigmas_type == "zero"
        ends = "zero" if clean else "first"
    if ends == "first" and chosen_compat and config.rule in ("unipc", "deis"):
        return rows[-1]._replace(i=n, t=0.0)  # diffusers ends there twice
    return Level(n, 0.0, 1.0, 0.0) if ends == "zero" else level_at(n, 0, float(bars[0]))


def ddim_landings(rows: list[Level], bars: np.ndarray, stride: int) -> tuple[Level, ...]:
    """Where diffusers' DDIM goes: always `stride` timesteps down, whatever the next row is (scheduling_ddim.py:445)."""
    landings = []
    for row in rows[:-1]:
        i, t = row.i + 1, int(row.t) - stride
        landings.append(level_at(i, t, float(bars[t])) if t >= 0 else rows[-1]._replace(i=i))
    return tuple(landings)


def flow_table(
    config: ScheduleConfig,
    n: int,
    sigmas: str | Sequence[float] | None,
    timesteps: Sequence[float] | None,
    tokens: int | None,
    compat: bool,
) -> Schedule:
    """alpha = 1 - sigma and t = sigma * N: from pure noise to the clean latent (Lipman et al. 2023)."""
    total = config.num_train_timesteps
    if timesteps is not None:
        s = np.append(np.asarray(timesteps, dtype=float) / total, 0.0)
    elif not isinstance(sigmas, str | None):
        s = np.asarray(sigmas, dtype=float)
    else:
        choice = sigmas if sigmas is not None else config.sigmas
        if choice in AYS:
            raise LDMError(f"The {choice} levels were found for Stable Diffusion: a flow model has no use for them.")
        # diffusers shifts the lower end here and, with all others, once more below: so do its trained models' users.
        least = 1 / total if config.use_dynamic_shifting else float(shifted(config, np.array([1 / total]), None)[0])
        if choice == "even":  # as FLUX's own program and diffusers' pipelines for it have them: to an n-th of the noise
            s = np.linspace(1, 1 / n, n)
            s = shifted(config, s.astype(np.float32) if compat else s, tokens)  # diffusers' last digit
            s = np.append(s, s.dtype.type(0))
        else:
            s = shifted(config, np.linspace(1, least, n), tokens)
            s = np.append(s if choice == "spaced" else choose_sigmas(choice, s[0], s[-1], n), 0.0)
    if s[0] > 1 + 1e-9:  # rounding
        raise LDMError(f"A flow model's sigmas lie between 0 and 1: not {s[0]:g}.")
    rows = tuple(Level(i, float(x * total), float(1 - x), float(x)) for i, x in enumerate(np.minimum(s, 1.0)))
    return Schedule(rows, config.prediction_type, 1.0, config.rule, compat=compat, total=total)
