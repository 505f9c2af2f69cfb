"""PNDM (Liu et al. 2022): numerical methods of the textbook for eps, DDIM's line (their transfer part) for x.

Adams and Bashforth's coefficients hold for even steps, and PNDM takes its rows for even: where sigma/alpha is not, its
order is 2, as its authors prove, and not the textbook's 4. Where the noisiest rows lie far apart in it (Euler's rule at
zero terminal SNR begins at 4096), a run of few steps goes astray: take another sampler there.
"""

from collections.abc import Sequence

from torch import Tensor

from ldm.diffusion import Prediction, target, to_x0_eps
from ldm.noise import Noise
from ldm.samplers.lines import along_eps, along_x0
from ldm.samplers.multistep import mean, usable
from ldm.sampling import Denoise, Step
from ldm.schedules import Level, Schedule

ADAMS_BASHFORTH = {2: (3 / 2, -1 / 2), 3: (23 / 12, -16 / 12, 5 / 12), 4: (55 / 24, -59 / 24, 37 / 24, -9 / 24)}
RUNGE_KUTTA = (1 / 6, 1 / 3, 1 / 3, 1 / 6)


def plms(denoise: Denoise, x: Tensor, schedule: Schedule, i: int, history: Sequence[Step], noise: Noise) -> Step:
    """PNDM without its Runge-Kutta steps (Rombach et al. 2022, in their code): one step of Heun's kind, then multistep.

    It ends with a step of first order only if the run has no other.
    """
    level, after = schedule.step(i)
    p = denoise(x, level)
    steps = usable(history, 4)
    if schedule.landings and level.alpha > 0:
        return Step(level, after, x, plms_of_diffusers(denoise, x, schedule, i, steps, p), *p)
    if level.alpha == 0 or (not steps and i == len(schedule) - 1):
        return Step(level, after, x, along_x0(x, p.x0, level, after), *p)
    if steps:
        eps = mean(ADAMS_BASHFORTH[len(steps) + 1], [p.eps, *(step.eps for step in steps)])
    else:
        eps = (p.eps + denoise(along_eps(x, p.eps, level, after), after).eps) / 2
    return Step(level, after, x, along_eps(x, eps, level, after), *p)


def pndm(denoise: Denoise, x: Tensor, schedule: Schedule, i: int, history: Sequence[Step], noise: Noise) -> Step:
    """All of PNDM: three steps of Runge and Kutta's, four evaluations each, then multistep."""
    if len(usable(history, 4)) == 3:
        return plms(denoise, x, schedule, i, history, noise)
    level, after = schedule.step(i)
    p = denoise(x, level)
    if schedule.landings and level.alpha > 0:
        return Step(level, after, x, runge_kutta_of_diffusers(denoise, x, schedule, i, p), *p)
    if level.alpha == 0 or after.sigma == 0:
        return Step(level, after, x, along_x0(x, p.x0, level, after), *p)
    half = schedule.at(i, (level.t + after.t) / 2)
    q = denoise(along_eps(x, p.eps, level, half), half)
    r = denoise(along_eps(x, q.eps, level, half), half)
    s = denoise(along_eps(x, r.eps, level, after), after)
    eps = mean(RUNGE_KUTTA, [p.eps, q.eps, r.eps, s.eps])
    return Step(level, after, x, along_eps(x, eps, level, after), *p)


# -------------------------------------------------------------------------------------------------- as diffusers does
#
# Under `compat`, where its own rule made the table: diffusers goes down by its stride of timesteps, wherever the next
# row is, and averages what the network says, which is eps or not (REFERENCE_DEFECTS.md, 9).


def plms_of_diffusers(
    denoise: Denoise, x: Tensor, schedule: Schedule, i: int, steps: Sequence[Step], p: Prediction
) -> Tensor:
    """scheduling_pndm.py, step_plms: the latent it goes to."""
    level, after = schedule.step(i)
    if steps:
        outs = [said(each, at, schedule) for each, at in [(p, level), *((step, step.level) for step in steps)]]
        return jump(x, mean(ADAMS_BASHFORTH[len(outs)], outs), level, after, schedule)
    ahead = jump(x, said(p, level, schedule), level, after, schedule)
    if i == len(schedule) - 1:
        return ahead
    told = schedule[i + 1]
    q = denoise(ahead, after._replace(t=told.t))
    out = (said(p, level, schedule) + said(q, after, schedule)) / 2
    begin = schedule.at(i, told.t + schedule.total // len(schedule))
    return jump(x, out, begin, told, schedule)


def runge_kutta_of_diffusers(denoise: Denoise, x: Tensor, schedule: Schedule, i: int, p: Prediction) -> Tensor:
    """scheduling_pndm.py, step_prk: the latent it goes to."""
    level, after = schedule[i], schedule[i + 1]
    stride = schedule.total // len(schedule)
    half, middle = schedule.at(i, level.t - stride // 2), schedule.at(i, after.t + stride // 2)
    outs = [said(p, level, schedule)]
    for here, told in ((half, middle), (middle, middle), (after, after)):
        q = denoise(jump(x, outs[-1], level, here, schedule), here._replace(t=told.t))
        outs.append(said(q, here, schedule))
    return jump(x, mean(RUNGE_KUTTA, outs), level, after, schedule)


def said(p: Prediction | Step, level: Level, schedule: Schedule) -> Tensor:
    """What the network said, of which (x0, eps) was made."""
    return target(p.x0, p.eps, level.alpha, level.sigma, schedule.prediction)


def jump(x: Tensor, out: Tensor, level: Level, after: Level, schedule: Schedule) -> Tensor:
    """DDIM's line along what `out` means at `level`."""
    return along_eps(x, to_x0_eps(out, x, level.alpha, level.sigma, schedule.prediction).eps, level, after)
