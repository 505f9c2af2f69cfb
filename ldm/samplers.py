"""Samplers: each a pure function for one step from a noise level to the next, and the loop that calls them.

A sampler is given `denoise`, the latent `x`, the schedule, the row it stands on, the steps so far and a source of
noise; it returns the new latent and the prediction it used. It keeps nothing: called twice, it answers the same twice.
No sampler knows what the network predicts, whether there is guidance, or which family of models it drives.

Notation: level (alpha, sigma) now, (alpha2, sigma2) next; lambda = log(alpha / sigma), half the log of the
signal-to-noise ratio.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ldm.diffusion import Prediction
from ldm.errors import LDMError, nearest
from ldm.noise import Noise
from ldm.schedules import Level, Schedule

Denoise = Callable[[Tensor, Level], Prediction]


@dataclass
class Step:
    """One step that has been taken. Assign `x` (or change it in place) and the loop goes on from there.

    All tensors are (B, C, h, w) in the model's coordinates. `noise_state` is the state of the noise source after the
    step, so that a run can go on from any step.
    """

    level: Level
    next: Level
    x_before: Tensor
    x: Tensor
    x0: Tensor
    eps: Tensor
    cond: Tensor | None = None
    uncond: Tensor | None = None
    noise_state: object = field(default=None, repr=False)
    made: tuple | None = field(default=None, repr=False)  # the `x` that the sampler returned, and its version

    def __post_init__(self):
        if self.made is None:  # `dataclasses.replace(step, x=...)` hands it on, and so counts as an edit
            self.made = (self.x, self.x._version)

    def __getstate__(self) -> dict:
        return self.__dict__ | {"made": self.edited}

    def __setstate__(self, state: dict) -> None:
        """A copied or saved step keeps its answer to `edited`; torch's version counters don't survive the journey."""
        self.__dict__.update(state)
        self.made = (None, 0) if state["made"] else (self.x, self.x._version)

    @property
    def i(self) -> int:
        return self.level.i

    @property
    def edited(self) -> bool:
        """Whether `x` is no longer what the sampler returned."""
        tensor, version = self.made
        return self.x is not tensor or self.x._version != version


def first_order(x: Tensor, x0: Tensor, level: Level, after: Level) -> Tensor:
    """Keep the noise that `x` holds, and only change its weight: x' = (s'/s) x + (a' - a s'/s) x0.

    DDIM without added noise (Song et al. 2021, equation 12), Euler's method (Karras et al. 2022, algorithm 1) and flow
    matching's Euler are this one line in different coordinates. Holds at alpha = 0; needs sigma > 0.
    """
    ratio = after.sigma / level.sigma
    return ratio * x + (after.alpha - level.alpha * ratio) * x0


def ddpm(denoise: Denoise, x: Tensor, schedule: Schedule, i: int, history: Sequence[Step], noise: Noise) -> Step:
    """Ancestral sampling from the posterior q(x' | x, x0) (Ho et al. 2020, equations 6 and 7), of fixed variance."""
    level, after = schedule.step(i)
    p = denoise(x, level)
    a = level.alpha / after.alpha  # alpha of the step between the two levels
    variance = max(level.sigma**2 - (a * after.sigma) ** 2, 0.0)  # sigma^2 of that step; rounding may give -1e-17
    mean = (a * after.sigma**2 / level.sigma**2) * x + (after.alpha * variance / level.sigma**2) * p.x0
    std = after.sigma * math.sqrt(variance) / level.sigma
    return Step(level, after, x, mean + std * noise(x) if std > 0 else mean, *p)


def ddim(
    denoise: Denoise, x: Tensor, schedule: Schedule, i: int, history: Sequence[Step], noise: Noise, eta: float = 0.0
) -> Step:
    """Song et al. 2021, equation 12. `eta` 0 is deterministic; 1 adds as much noise as DDPM (their equation 16)."""
    level, after = schedule.step(i)
    p = denoise(x, level)
    if eta == 0:
        return Step(level, after, x, after.alpha * p.x0 + after.sigma * p.eps, *p)
    variance = max(level.sigma**2 - (level.alpha / after.alpha * after.sigma) ** 2, 0.0)
    std = eta * after.sigma * math.sqrt(variance) / level.sigma
    kept = math.sqrt(max(after.sigma**2 - std**2, 0.0))
    return Step(level, after, x, after.alpha * p.x0 + kept * p.eps + std * noise(x), *p)


def euler(denoise: Denoise, x: Tensor, schedule: Schedule, i: int, history: Sequence[Step], noise: Noise) -> Step:
    """Euler's method on d(x/alpha) / d(sigma/alpha) = eps (Karras et al. 2022, algorithm 1 without churn)."""
    level, after = schedule.step(i)
    p = denoise(x, level)
    return Step(level, after, x, first_order(x, p.x0, level, after), *p)


def dpmpp_2m(denoise: Denoise, x: Tensor, schedule: Schedule, i: int, history: Sequence[Step], noise: Noise) -> Step:
    """DPM-Solver++(2M): a line through the last two x0 in lambda, integrated exactly (Lu et al. 2022b, algorithm 2).

    The first step, any step to sigma = 0 and, in runs of fewer than 15 steps, the last are of first order: there the
    line would be drawn from one point, over an infinite stretch, or too far (the authors' `lower_order_final`).
    """
    level, after = schedule.step(i)
    p = denoise(x, level)
    last = i == len(schedule) - 1 and len(schedule) < 15
    if not history or last or after.sigma == 0 or history[-1].level.alpha == 0:
        return Step(level, after, x, first_order(x, p.x0, level, after), *p)
    before = history[-1]
    h, h_before = lam(after) - lam(level), lam(level) - lam(before.level)
    w = h / (2 * h_before)
    x0 = (1 + w) * p.x0 - w * before.x0  # the paper's D_i: x0 at the middle of the step
    return Step(level, after, x, first_order(x, x0, level, after), *p)


def lam(level: Level) -> float:
    """Half the log of the signal-to-noise ratio (Kingma et al. 2021): the time in which DPM-Solver's steps are even."""
    return math.log(level.alpha / level.sigma)


Sampler = Callable[..., Step]
SAMPLERS: dict[str, Sampler] = {"ddpm": ddpm, "ddim": ddim, "euler": euler, "dpm++": dpmpp_2m}


def find_sampler(name: str) -> Sampler:
    """The sampler of that name. Raises LDMError that names the nearest one."""
    if name not in SAMPLERS:
        raise LDMError(f"Unknown sampler {name!r}: ldm has {', '.join(SAMPLERS)}.{nearest(name, SAMPLERS)}")
    return SAMPLERS[name]


@torch.inference_mode(False)  # in inference mode tensors don't count their changes: `Step.edited` would be blind
@torch.no_grad()
def sample(
    denoise: Denoise, x: Tensor, schedule: Schedule, sampler: Sampler, noise: Noise, after: Sequence[Step] = ()
) -> Iterator[Step]:
    """The loop: one `Step` per row of the schedule. `x` (B, C, h, w) is the first latent.

    `after` holds steps of an earlier run with the same settings: the loop goes on from the last of them, with its `x`,
    its noise, and what came before it as history. (`after=steps[:k]` forks; a changed `steps[k - 1].x` is taken up.)
    """
    steps = list(after)
    if len(steps) > len(schedule) or any((s.level, s.next) != schedule.step(k) for k, s in enumerate(steps)):
        raise LDMError(
            "The steps given as `after` don't belong to this schedule: pass steps[:k] of a run like this one."
        )
    if steps:
        noise.restore(steps[-1].noise_state)
    for i in range(len(steps), len(schedule)):
        x = steps[-1].x if steps else x
        # A multistep method may build only on predictions that lead to the present x: none from before an edit.
        unbroken = max((k + 1 for k, step in enumerate(steps) if step.edited), default=0)
        step = sampler(denoise, x, schedule, i, steps[unbroken:], noise)
        step.noise_state = noise.state()
        steps.append(step)
        yield step
