"""Large pictures in overlapping tiles: a function of feature maps that is run on windows, and the results blended.

For a network in the loop this is MultiDiffusion (Bar-Tal et al. 2023, equation 5): every step's prediction is the
weighted mean over the windows that see a position, so the tiles agree at each step and no seam can grow between them.
For the VAE's decoder it bounds the memory. A tile knows nothing of the others (normalisation and attention look at the
tile alone), so the result is near to that of the whole picture and not the same.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ldm.errors import LDMError
from ldm.guidance import Network, Output
from ldm.schedules import Level


def starts(length: int, size: int, overlap: int) -> list[int]:
    """Where the windows of `size` begin along a side: evenly spread, at least `overlap` shared by neighbours."""
    if length <= size:
        return [0]
    count = -(-(length - overlap) // (size - overlap))  # rounded up
    return [round(k * (length - size) / (count - 1)) for k in range(count)]


def ramp(size: int, overlap: int) -> Tensor:
    """The weight of a window's positions along a side: rising over `overlap`, then 1, then falling; never 0. (size,)"""
    places = torch.arange(size, dtype=torch.float64) + 1
    return (torch.minimum(places, places.flip(0)) / (overlap + 1)).clamp(max=1)


def in_tiles(function: Callable[[Tensor], Tensor], x: Tensor, size: int, overlap: int, factor: int = 1) -> Tensor:
    """`function` of `x` (B, C, h, w) -> (B, C', factor*h, factor*w), window by window of `size` positions a side.

    An `x` no larger than a window is one call, and exactly what `function` makes of it.
    """
    if not 0 <= overlap < size:
        raise LDMError(
            f"Tiles of {size} that overlap by {overlap}: the overlap must be 0 or more, and less than the size."
        )
    h, w = x.shape[2:]
    if h <= size and w <= size:
        return function(x)
    high, wide = min(size, h), min(size, w)
    total = weights = None
    for top in starts(h, size, overlap):
        for left in starts(w, size, overlap):
            y = function(x[:, :, top : top + high, left : left + wide])
            if total is None:
                total = y.new_zeros(*y.shape[:2], factor * h, factor * w)
                weights = y.new_zeros(factor * h, factor * w)
                weight = torch.outer(*(ramp(factor * side, factor * overlap) for side in (high, wide))).to(y)
            place = (slice(factor * top, factor * (top + high)), slice(factor * left, factor * (left + wide)))
            total[(..., *place)] += weight * y
            weights[place] += weight
    return total / weights


def tiled(network: Network, size: int, overlap: int) -> Network:
    """The network run on windows of the latent, and of whatever channels it reads beside it."""

    def whole(x: Tensor, level: Level) -> Output:
        return Output(in_tiles(lambda window: network(window, level).out, x, size, overlap))

    return whole
