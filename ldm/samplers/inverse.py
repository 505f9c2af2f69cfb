"""DDIM walked upwards: from a picture to the noise that it is drawn from."""

from collections.abc import Sequence

from torch import Tensor

from ldm.noise import Noise
from ldm.sampling import Denoise, Step
from ldm.schedules import Schedule


def ddim_inverse(
    denoise: Denoise, x: Tensor, schedule: Schedule, i: int, history: Sequence[Step], noise: Noise, refine: int = 5
) -> Step:
    """One step of DDIM inversion on a rising schedule (Song et al. 2021, section 4.3: the same equation, upwards).

    DDIM goes from x' down to x with the noise it predicts in x', which we don't have yet. The prediction in x stands in
    for it, and lands beside x' (what Mokady et al. 2023 call DDIM inversion). `refine` times the prediction is made
    again where that landed: x' is the fixed point of this (Pan et al. 2023, AIDI), and DDIM leads from it back to x.
    """
    level, after = schedule.step(i)
    p = denoise(x, level)
    y = after.alpha * p.x0 + after.sigma * p.eps
    for _ in range(refine):
        eps = denoise(y, after).eps
        x0 = (x - level.sigma * eps) / level.alpha
        y = after.alpha * x0 + after.sigma * eps
        p = p._replace(x0=x0, eps=eps)
    return Step(level, after, x, y, *p)
