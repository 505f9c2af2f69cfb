"""Which levels of noise a run visits: timesteps spaced over training's, levels chosen freely, flow's shift."""

import math

import numpy as np

from ldm.errors import LDMError, nearest
from ldm.schedules.config import CHOICES, SPACINGS, ScheduleConfig, find_rule


def spaced_timesteps(config: ScheduleConfig, n: int) -> np.ndarray:
    """The `n` timesteps of the rule, falling; Lin et al. 2023 ("flawed"), table 2, compares the three spacings."""
    total, offset, rule = config.num_train_timesteps, config.steps_offset, find_rule(config.rule)
    if config.rule in ("lcm", "tcd"):  # n of the timesteps that the teacher was asked for
        stride = total // config.original_inference_steps
        teacher = np.arange(config.original_inference_steps, 0, -1) * stride - 1
        return teacher[np.floor(np.linspace(0, len(teacher), n, endpoint=False)).astype(int)].astype(float)
    points = n + 1 if rule.extra else n
    if config.spacing == "linspace":
        t = np.linspace(0, total - 1, points)[::-1][:n]
        return t if rule.fractions else t.round()
    if config.spacing == "leading":
        ratio = total // points
        # With as many steps as training had, SD's offset of 1 would point one past the table's end.
        offset = min(offset, total - 1 - ratio * (points - 1))
        return (np.arange(points) * ratio)[::-1][:n].astype(float) + offset
    if config.spacing == "trailing":
        return np.arange(total, 0, -total / n)[:n].round() - 1
    raise LDMError(f"Unknown timestep_spacing {config.spacing!r}: ldm knows {', '.join(SPACINGS)}.")


def most_steps(config: ScheduleConfig) -> int:
    """How many steps the rule has room for."""
    if config.rule in ("lcm", "tcd"):
        if config.original_inference_steps > config.num_train_timesteps:
            raise LDMError(
                f"original_inference_steps is {config.original_inference_steps}, more than the "
                f"{config.num_train_timesteps} steps of training: the scheduler file contradicts itself."
            )
        return config.original_inference_steps
    crowded = find_rule(config.rule).extra and config.spacing != "trailing"
    return config.num_train_timesteps - crowded


def choose_sigmas(choice: str, most: float, least: float, n: int) -> np.ndarray:
    """n noise levels sigma / alpha falling from `most` to `least`, by one of `CHOICES`."""
    if choice == "karras":  # Karras et al. 2022, equation 5 with rho = 7
        return (most ** (1 / 7) + np.linspace(0, 1, n) * (least ** (1 / 7) - most ** (1 / 7))) ** 7
    if choice == "exponential":  # even in log(sigma / alpha): k-diffusion's get_sigmas_exponential
        return np.exp(np.linspace(math.log(most), math.log(least), n))
    if choice == "beta":  # Lee et al. 2024 ("Beta sampling is all you need"): quantiles of Beta(0.6, 0.6)
        try:
            from scipy.stats import beta
        except ImportError as error:
            raise LDMError("The beta choice of sigmas needs SciPy: python -m pip install scipy.") from error
        return least + beta.ppf(1 - np.linspace(0, 1, n), 0.6, 0.6) * (most - least)
    if choice in AYS:  # the published levels, and between them evenly in the logarithm, as their authors advise
        published = np.log(AYS[choice])
        return np.exp(np.interp(np.linspace(0, 1, n + 1), np.linspace(0, 1, len(published)), published))[:n]
    raise LDMError(f"Unknown choice of sigmas {choice!r}: ldm knows {', '.join(CHOICES)}.{nearest(choice, CHOICES)}")


AYS = {  # Sabour et al. 2024, "Align your steps", for Stable Diffusion 1.5 and SDXL: ten steps
    "ays": (14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0.029),
    "ays-xl": (14.615, 6.315, 3.771, 2.181, 1.342, 0.862, 0.555, 0.380, 0.234, 0.113, 0.029),
}


def shifted(config: ScheduleConfig, sigmas: np.ndarray, tokens: int | None) -> np.ndarray:
    """Flow's levels moved towards noise, the more the larger the picture (Esser et al. 2024, equation 23).

    Static: by `shift`. Dynamic: by exp(mu), where mu is a line in `tokens`, the length of the network's sequence.
    """
    if not config.use_dynamic_shifting:
        s = config.shift * sigmas / (1 + (config.shift - 1) * sigmas)
    elif tokens is None:
        raise LDMError("This model's schedule depends on the size of the picture: pass `tokens`, its sequence length.")
    else:
        slope = (config.max_shift - config.base_shift) / (config.max_image_seq_len - config.base_image_seq_len)
        mu = config.base_shift + slope * (tokens - config.base_image_seq_len)
        factor = math.exp(mu) if config.time_shift_type == "exponential" else mu
        s = factor / (factor + (1 / sigmas - 1))
    if config.shift_terminal is not None and s[-1] < 1:  # stretched, so that the last of them is this one
        s = 1 - (1 - s) * (1 - config.shift_terminal) / (1 - s[-1])
    return s
