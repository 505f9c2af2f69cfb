"""A batch drawn picture by picture: slower, and the bits of each don't depend on its neighbours."""

from collections.abc import Sequence
from copy import copy
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ldm.control import as_controls
from ldm.errors import LDMError
from ldm.guidance import Output
from ldm.run import Result
from ldm.sampling import Step
from ldm.schedules import Level

if TYPE_CHECKING:
    from ldm.pipeline import Pipeline


def nothing(x: Tensor, level: Level) -> Output:
    """Stands for a network where none is asked."""
    raise AssertionError("This run is never begun.")


def draw_alone(pipe: "Pipeline", prompt: str | Sequence[str], after: Sequence[Step], options: dict) -> Result:
    """The pictures of `pipe(prompt, **options)`, each drawn by a call of its own.

    Raises LDMError for options that only a batch has.
    """
    of_a_batch = ("latents", "generator", "network")
    if after or any(options.get(name) is not None for name in of_a_batch):
        raise LDMError(
            "one_by_one begins each picture from its seed: pass no latents, generator, after or network with it."
        )
    # All that is given is looked at before the first picture is drawn, but for the words, which each run reads itself:
    # what is to be said of them would be said of a batch that isn't drawn.
    looking = copy(pipe)
    looking.network = lambda *told: nothing
    settings = looking.prepare(prompt, **options).settings
    n = len(settings.seeds)

    def own(given: object, k: int) -> object:
        if isinstance(given, Tensor):  # of latents or pictures (B, ...) its row; a depth (H, W) is for all
            return given[k : k + 1] if given.dim() > 2 and len(given) == n else given
        return given[k] if isinstance(given, list | tuple) and len(given) == n else given

    options = {k: v for k, v in options.items() if k not in ("negative", "seed", "count")}
    pictured = {name: options.pop(name) for name in ("image", "mask", "depth") if name in options}
    if isinstance(pictured.get("depth"), np.ndarray):
        pictured["depth"] = torch.as_tensor(pictured["depth"])
    controls = as_controls(options.pop("control", None))
    results = [
        pipe(
            settings.prompt[k],
            negative=settings.negative[k],
            seed=settings.seeds[k],
            control=[replace(each, picture=own(each.picture, k)) for each in controls],
            **{name: own(given, k) for name, given in pictured.items()},
            **options,
        )
        for k in range(n)
    ]
    images = [image for result in results for image in result.images]
    changed = tuple(number for result in results for number in result.changed)
    return Result(images, torch.cat([result.x0 for result in results]), settings, changed)
