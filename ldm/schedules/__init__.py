"""Schedules: from a configuration, a step count and a rule to a table of noise levels.

A schedule is n+1 rows `Level(i, t, alpha, sigma)`, from the noisiest to the cleanest, made before the loop. A sampler
walks from row to row and asks nothing else about noise.

`ratio` is sigma / alpha, the noise level in the coordinates of Karras et al. 2022 (their sigma).
"""

from ldm.schedules.betas import alpha_bars
from ldm.schedules.config import CHOICES, RULES, ScheduleConfig
from ldm.schedules.table import Level, Schedule, make_schedule

__all__ = ["CHOICES", "RULES", "Level", "Schedule", "ScheduleConfig", "alpha_bars", "make_schedule"]
