"""The loop: it walks a schedule row by row with a sampler, and yields every step it takes."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ldm.diffusion import Prediction
from ldm.errors import LDMError
from ldm.noise import Noise
from ldm.schedules import Level, Schedule

Denoise = Callable[[Tensor, Level], Prediction]


@dataclass
class Step:
    """One step that has been taken. Assign `x` (or change it in place) and the loop goes on from there.

    All tensors are (B, C, h, w) in the model's coordinates. `x0` and `eps` are what was predicted at `level`, of
    `x_before`. `noise_state` is the state of the noise source after the step, so that a run can go on from any step.
    """

    level: Level
    next: Level
    x_before: Tensor
    x: Tensor
    x0: Tensor
    eps: Tensor
    cond: Tensor | None = None
    uncond: Tensor | None = None
    corrected: Tensor | None = field(default=None, repr=False)  # UniPC: `x_before`, once its prediction was known
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


# A sampler is given `denoise`, the latent, the schedule, the row it stands on, the steps so far and a source of noise.
Sampler = Callable[[Denoise, Tensor, Schedule, int, Sequence[Step], Noise], Step]


@torch.inference_mode(False)  # in inference mode tensors don't count their changes: `Step.edited` would be blind
@torch.no_grad()
def sample(
    denoise: Denoise,
    x: Tensor,
    schedule: Schedule,
    sampler: Sampler,
    noise: Noise,
    after: Sequence[Step] = (),
    first: int = 0,
    last: int | None = None,
) -> Iterator[Step]:
    """The loop: one `Step` per row of the schedule. `x` (B, C, h, w) is the first latent, at row `first`.

    It ends at row `last`; None: at the schedule's own end.

    `after` holds steps of an earlier run with the same settings: the loop goes on from the last of them, with its `x`,
    its noise, and what came before it as history. (`after=steps[:k]` forks; a changed `steps[k - 1].x` is taken up.)
    """
    last = len(schedule) if last is None else last
    if not 0 <= first <= last <= len(schedule):
        raise LDMError(f"A run of {len(schedule)} steps can begin at row 0 to {last}, not {first}.")
    steps = list(after)
    rows = [(step.level, step.next) for step in steps]
    if rows != [schedule.step(first + k) for k in range(min(len(rows), last - first))]:
        raise LDMError(
            "The steps given as `after` don't belong to this schedule: pass steps[:k] of a run like this one."
        )
    if steps:
        noise.restore(steps[-1].noise_state)
    for i in range(first + len(steps), last):
        x = steps[-1].x if steps else x
        # A multistep method may build only on predictions that lead to the present x: none from before an edit.
        # diffusers, which cannot know of an edit, builds on them all the same.
        edits = [] if schedule.compat else [k + 1 for k, step in enumerate(steps) if step.edited]
        step = sampler(denoise, x, schedule, i, steps[max(edits, default=0) :], noise)
        step.noise_state = noise.state()
        steps.append(step)
        yield step
