"""A run that is about to begin: everything that was prepared for the loop, in the open."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from ldm.errors import LDMError
from ldm.noise import Noise
from ldm.sampling import Denoise, Sampler, Step, sample
from ldm.schedules import Schedule
from ldm.settings import Settings


@dataclass(frozen=True)
class Result:
    """`images`: PIL pictures, prompt by prompt, `count` of each. `x0` (B, C, h, w): the latents decoded to them.

    `changed`, where a mask said what is kept: by how many grey levels of 255 the model had changed the rest of each
    picture, on average, before the original's pixels were put back.
    """

    images: list[Image.Image]
    x0: Tensor
    settings: Settings
    changed: tuple[float, ...] = ()


@dataclass(frozen=True)
class Run:
    """What `Pipeline.prepare` makes of a call: `for step in run.steps()` is all that is left to do.

    `x` (B, C, h, w) is the first latent, at the first of the `rows` of the schedule. `decode` makes pictures of a
    latent, `finish` a result: there, what lies outside an inpainting mask is put back. `own` says that the network is
    the caller's own. `watchers` (`ldm.lab.watch`) each turn the run into one that they look on at, when it begins.
    """

    settings: Settings
    schedule: Schedule
    x: Tensor
    denoise: Denoise
    sampler: Sampler
    noise: Noise
    decode: Callable[[Tensor], list[Image.Image]]
    finish: Callable[[Tensor], Result]
    own: bool = False
    watchers: Sequence[Callable[["Run"], "Run"]] = ()

    @property
    def rows(self) -> range:
        """The rows of the schedule at which its steps begin."""
        return self.settings.rows(self.schedule)

    def __len__(self) -> int:
        """How many steps it takes."""
        return len(self.rows)

    def steps(self, after: Sequence[Step] = ()) -> Iterator[Step]:
        """The steps, each yielded as it is taken and seen to be finite; `after` as in `ldm.sampling.sample`."""
        run, rows = self, self.rows
        for watcher in self.watchers:
            run = watcher(run)
        steps = sample(run.denoise, run.x, run.schedule, run.sampler, run.noise, after, rows.start, rows.stop)
        flux = self.settings.max_sequence_length is not None
        return watched(steps, "the transformer" if flux else "the UNet")


def watched(steps: Iterator[Step], what: str = "the UNet") -> Iterator[Step]:
    """The same steps, each seen to be finite."""
    for step in steps:
        finite(step.x, f"{what}, in step {step.i + 1}")
        yield step


def finite(x: Tensor, what: str) -> Tensor:
    """`x` itself, or an LDMError that names who made it not a number: never a black picture."""
    if not torch.isfinite(x).all():
        raise LDMError(
            f"{what} returned numbers that are not finite (NaN or infinity). In half precision, try float32 "
            "(--dtype float32); otherwise the weights are damaged."
        )
    return x
