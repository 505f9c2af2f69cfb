"""What `ldm.watch` has seen of a run, and how it is asked: calls of the network, what went through it, attention maps.

The network is the UNet, or FLUX's transformer: "unet" or "transformer" begins the names of all that is inside it.
"""

import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.errors import LDMError
from ldm.lab.maps import Maps
from ldm.schedules.table import is_whole


class Stats(NamedTuple):
    """One output of one brick: mean, spread and range of its finite numbers, and how many aren't finite."""

    name: str  # the module's, such as "unet.mid_block.resnets.0"
    shape: tuple[int, ...]
    mean: float
    std: float
    min: float
    max: float
    nonfinite: int


def stats(name: str, x: Tensor) -> Stats:
    """NaN for all but the count, where not one number is finite."""
    values = x.to(torch.promote_types(x.dtype, torch.float32))
    if values.numel() and not torch.stack(values.aminmax()).isfinite().all():  # one NaN makes both ends NaN
        values = values[values.isfinite()]
    count = x.numel() - values.numel()
    if not values.numel():
        return Stats(name, tuple(x.shape), *[float("nan")] * 4, count)
    mean = values.mean()
    std = (values - mean).square().mean().sqrt()
    return Stats(name, tuple(x.shape), *torch.stack([mean, std, *values.aminmax()]).tolist(), count)


@dataclass
class Call:
    """One call of the network. Its batch holds `pictures` rows for each of `parts`, part by part.

    A method that asks twice in a step (heun, dpm2) makes two calls of one `step`, at different rows `i` and times `t`;
    the halves of guidance make two where they don't run together. In a loop of one's own `i` is None, and `step` counts
    the calls.
    """

    number: int  # its place in `Record.calls`
    run: int  # 0, 1, ...: the runs that were watched
    step: int  # the row of the schedule that the step begins at: `Step.i`
    i: int | None  # the row that the network was asked about
    t: float | tuple[float, ...]  # several where the rows of the batch have several
    parts: tuple[str, ...]  # of guidance: uncond, cond; uncond, image, cond; or "part 1", ... where nobody can know
    pictures: int
    size: tuple[int, int]  # (h, w) of the latent
    tiled: bool = False  # whether the batch holds one tile of the pictures, `size` then being that of all
    bricks: dict[str, Stats] = field(default_factory=dict, repr=False)  # the network's, in the order they were run
    # (skips + 1, rows of the batch): norms of what all ControlNets together add to every skip and, last, the middle;
    # of a transformer to the stream behind every block, (blocks, rows)
    residuals: Tensor | None = field(default=None, repr=False)
    # |cond - uncond| of each picture: on the last call of those from which one prediction was made
    guidance: tuple[float, ...] | None = None


class Layer(NamedTuple):
    """An attention layer of the network: `size` (h, w) of its maps is None until it has run.

    FLUX's attend to text and picture in one: a layer `NAME` is how they see the text, `NAME.patches` how the picture.
    """

    name: str
    heads: int
    cross: bool  # to the text; otherwise from position to position
    size: tuple[int, int] | None


def within(name: str, pattern: str) -> bool:
    """Whether the pattern is a run of whole words of a dotted name, as "mid_block" is of "unet.mid_block.resnets.0"."""
    return f".{pattern}." in f".{name}."


class Record:
    """What was seen. `calls` are those of the network; `beside` are the outputs of all bricks outside such a call.

    `layers` are all attention layers of the network; the maps are those of the cross-attention unless asked otherwise.
    """

    def __init__(self, layers: Sequence[Layer], maps: Maps):
        self.calls: list[Call] = []
        self.beside: list[Stats] = []  # text encoders and VAE, and bricks of the network run by hand
        self.maps = maps
        self._layers = {layer.name: layer for layer in layers}

    def place(self, name: str, size: tuple[int, int]) -> None:
        """The size of a layer's maps, as its last call had it."""
        self._layers[name] = self._layers[name]._replace(size=size)

    @property
    def layers(self) -> list[Layer]:
        return list(self._layers.values())

    def map(
        self,
        tokens: int | Sequence[int],
        step: int | None = None,
        layer: str | Sequence[str] | None = None,
        head: int | None = None,
        part: str | None = None,
        picture: int = 0,
        size: tuple[int, int] | None = None,
        run: int | None = None,
    ) -> Tensor:
        """How much every position of the latent attends to these tokens together, (h, w): all 77 together are 1.

        In a dialect there are 77 for each chunk of the prompt, and all of them together are 1. FLUX's patches look at
        the text and at each other in one: there the rest, to 1, goes to patches.

        Averaged over what is left out: steps (or rather their calls), layers, heads. Every layer counts alike; coarse
        ones are enlarged bilinearly to `size`, which is the latent's if it isn't given.
        tokens    positions among them; of a self-attention layer, among its h*w
        layer     a name, names, or a part of names: "mid_block", "up_blocks.1". Cross-attention, unless all are self-
        part      "cond" where that is recorded, or the only one there is; `picture` counts within the part
        run       needed if several were watched
        """
        calls, part = self._choose(step, part, picture, run)
        layers = self._matching(layer)
        tokens = check_tokens(tokens)
        size = calls[0].size if size is None else check_size(size)
        total = 0
        for name in layers:
            found = self._mean(name, calls, part, picture, head, tokens)  # (heads, h, w, tokens)
            found = found.sum(-1).mean(0)[None, None]
            total = total + F.interpolate(found, size=size, mode="bilinear", align_corners=False)[0, 0]
        return total / len(layers)

    def attention(
        self, layer: str, step: int | None = None, part: str | None = None, picture: int = 0, run: int | None = None
    ) -> Tensor:
        """One layer's maps as they are, (heads, h, w, L): L tokens, or positions in self-attention.

        Averaged over the calls of the step, or of all. Each row of L sums to 1; of FLUX those of a layer and of its
        `.patches` together.
        """
        calls, part = self._choose(step, part, picture, run)
        names = self._matching(layer)
        if len(names) > 1:
            raise LDMError(f"{layer!r} is part of the names of {len(names)} layers: name one, such as {names[0]!r}.")
        return self._mean(names[0], calls, part, picture)

    def _mean(
        self,
        layer: str,
        calls: Sequence[Call],
        part: str,
        picture: int,
        head: int | None = None,
        tokens: Sequence[int] | None = None,
    ) -> Tensor:
        numbers = [call.number for call in calls]
        found = self.maps.mean(layer, part, calls[0].run, numbers, picture, tokens)
        if head is None:
            return found
        if not self.maps.every_head:
            raise LDMError("The maps were averaged over heads for want of memory: watch fewer layers, or give memory=.")
        if not is_whole(head) or not 0 <= head < len(found):
            raise LDMError(f"Head {head!r} asked for, but {layer} has {len(found)}: 0 to {len(found) - 1}.")
        return found[head : head + 1]

    def _choose(self, step: int | None, part: str | None, picture: int, run: int | None) -> tuple[list[Call], str]:
        """The calls that are asked for, and the name of the part."""
        runs = sorted({call.run for call in self.calls})
        if not runs:
            raise LDMError("Nothing was recorded: no call of this pipeline's network was made under the watch.")
        if run is None and len(runs) > 1:
            raise LDMError(f"{len(runs)} runs were watched: say which is meant (run=0 to run={runs[-1]}).")
        if run is not None and run not in runs:
            raise LDMError(f"Run {run} asked for, but {len(runs)} watched: counted from 0.")
        calls = [call for call in self.calls if run in (None, call.run)]
        parts = list(dict.fromkeys(key.part for key in self.maps.kept if key.run == calls[0].run))
        if any(call.tiled for call in calls):
            raise LDMError("A run in tiles has no maps, for each tile attends by itself: draw without tiles (tile=0).")
        if part is None:
            part = parts[0] if len(parts) == 1 else "cond"
        if part not in parts:
            raise LDMError(
                f"No maps of the part {part!r} are kept, those of {', '.join(parts) or 'none'} are: name one of them "
                "(part=), or see every part by ldm.watch(every_part=True)."
            )
        calls = [call for call in calls if part in call.parts]
        if step is not None:
            if not self.maps.every_call:
                raise LDMError(
                    "The maps were averaged over steps for want of memory: leave step out, watch fewer layers, or give "
                    "memory=."
                )
            steps = list(dict.fromkeys(call.step for call in calls))
            calls = [call for call in calls if call.step == step]
            if not calls:
                raise LDMError(f"Step {step} asked for, but {steps[0]} to {steps[-1]} were watched.")
        if not is_whole(picture) or not 0 <= picture < calls[0].pictures:
            raise LDMError(f"Picture {picture!r} asked for, but there are {calls[0].pictures}: counted from 0.")
        return calls, part

    def _matching(self, layer: str | Sequence[str] | None) -> list[str]:
        """The names, of the layers whose maps are kept, that are asked for: those to the text, if there are any."""
        kept = self.maps.layers()
        wanted = None if layer is None else check_names("layer", layer)
        names = [name for name in kept if wanted is None or any(within(name, each) for each in wanted)]
        if not names:
            raise LDMError(f"No maps of a layer {layer!r} are kept, but of {', '.join(kept) or 'none'}.")
        return [name for name in names if self._layers[name].cross] or names


def check_tokens(tokens: int | Sequence[int]) -> list[int]:
    """Positions as a list. Raises LDMError for anything else."""
    try:
        found = [operator.index(each) for each in (tokens if isinstance(tokens, Sequence) else [tokens])]
    except TypeError:
        found = []
    if not found or min(found) < 0:
        raise LDMError(
            f"Tokens are positions among those the network reads, 0 or more, one or a list, not {tokens!r}; "
            "`ldm.lab.trace.words_of` tells where a prompt's words stand."
        )
    return found


def check_size(size: tuple[int, int]) -> tuple[int, int]:
    """(h, w) as a tuple. Raises LDMError for anything else."""
    found = tuple(size) if isinstance(size, Iterable) else ()
    if len(found) != 2 or not all(is_whole(side) and side > 0 for side in found):
        raise LDMError(f"size is that of the map, (h, w), two whole numbers of 1 or more, not {size!r}.")
    return found


def check_names(option: str, given: str | Sequence[str]) -> list[str]:
    """Names of layers, or parts of such, as a list. Raises LDMError for anything else."""
    found = [given] if isinstance(given, str) else list(given) if isinstance(given, Iterable) else [None]
    if not all(isinstance(each, str) for each in found):
        raise LDMError(
            f"{option} is a name or several, or parts of names, such as 'mid_block', not {given!r}: those of this "
            "model stand in Record.layers."
        )
    return found
