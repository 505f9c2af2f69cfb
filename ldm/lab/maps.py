"""Attention maps within a bound of memory: whole, or averaged over heads, or over the calls of a run as well.

Shapes: P pictures, N = h*w positions, L tokens (or positions, of self-attention), d head width.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ldm.errors import LDMError, say_on_stderr

EVERY = slice(None)


def explicit(q: Tensor, k: Tensor, average: bool = False, seen: slice = EVERY) -> Tensor:
    """softmax(q k^T / sqrt(d)) of q (P, heads, N, d) and k (P, heads, L, d), written out: (P, heads, N, L).

    It is what fused attention multiplies the values with and never shows (Vaswani et al. 2017, equation 1). In float32
    at least, as there. `average` over the heads gives (P, 1, N, L), and never holds more than two heads at a time.
    Of the L that the softmax is over, those `seen` are given.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    q, k = q.to(wide), k.to(wide)
    if not average:
        return (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(-1)[..., seen]
    heads = q.shape[1]
    total = explicit(q[:, :1], k[:, :1], seen=seen)
    for head in range(1, heads):
        total += explicit(q[:, head : head + 1], k[:, head : head + 1], seen=seen)
    return total / heads


class Key(NamedTuple):
    """Which map: of which attention layer, part of guidance, run and call. `call` None is the sum over the run's."""

    layer: str
    part: str
    run: int
    call: int | None


class Maps:
    """Maps (P, heads, h, w, L) on the CPU, together no larger than `memory` MiB, which may be infinite.

    What doesn't fit is averaged, and that is said on stderr: first over the heads, then over the calls of each run.
    """

    def __init__(self, memory: float):
        self.memory, self.limit, self.used = memory, memory * 2**20, 0  # bytes
        self.every_head, self.every_call = True, True
        self.kept: dict[Key, Tensor] = {}
        self.counts: dict[Key, int] = {}

    def add(self, key: Key, q: Tensor, k: Tensor, size: tuple[int, int], seen: slice = EVERY) -> None:
        """Keep the map of these queries (P, heads, N, d) and keys (P, heads, L, d), N being h*w of `size`.

        Of the keys those `seen` are kept; what goes to the others is missing in the sum.
        """
        while self.used + self._bytes(key, q, k[:, :, seen]) > self.limit:
            self._make_room()
        made = explicit(q, k, not self.every_head, seen).unflatten(2, tuple(size)).cpu()
        self._put(key, made.contiguous(), 1)

    def _bytes(self, key: Key, q: Tensor, k: Tensor) -> int:
        """What one map more would take: nothing, where it is only added to a sum."""
        if not self.every_call and key._replace(call=None) in self.kept:
            return 0
        heads = q.shape[1] if self.every_head else 1
        width = torch.promote_types(q.dtype, torch.float32).itemsize
        return len(q) * heads * q.shape[2] * k.shape[2] * width

    def _put(self, key: Key, made: Tensor, count: int) -> None:
        key = key if self.every_call else key._replace(call=None)
        if key in self.kept:
            self.kept[key] = self.kept[key] + made  # not in place: a tensor of inference mode forbids it later
            self.counts[key] += count
        else:
            self.kept[key], self.counts[key] = made, count
            self.used += made.nbytes

    def _make_room(self) -> None:
        """Average over the heads; where that was done already, over the calls; after that, give up."""
        what = f"The attention maps need more than {self.memory:g} MiB"
        if self.every_head:
            self.every_head = False
            say_on_stderr(f"{what}: they are averaged over heads.")
            for key, kept in self.kept.items():
                self.kept[key] = kept.mean(1, keepdim=True)
            self.used = sum(kept.nbytes for kept in self.kept.values())
        elif self.every_call:
            self.every_call = False
            say_on_stderr(f"{what}: they are averaged over steps as well.")
            kept, counts, self.kept, self.counts, self.used = self.kept, self.counts, {}, {}, 0
            while kept:  # one by one, so that a sum and its terms are not held twice
                key = next(iter(kept))
                self._put(key, kept.pop(key), counts[key])
        else:
            raise LDMError(
                f"{what} even averaged over heads and steps: watch fewer layers (layers=, their names stand in "
                "Record.layers), or give more memory (memory=)."
            )

    def layers(self) -> list[str]:
        """The names of the layers of which something is kept, in the order in which they came."""
        return list(dict.fromkeys(key.layer for key in self.kept))

    def mean(
        self, layer: str, part: str, run: int, calls: Sequence[int], picture: int, tokens: Sequence[int] | None = None
    ) -> Tensor:
        """The mean over these calls of one run: (heads, h, w, L), heads 1 where they were averaged.

        `tokens` picks some of the L. With `every_call` False it is the mean over all calls of the run.
        """
        keys = [Key(layer, part, run, call) for call in calls] if self.every_call else [Key(layer, part, run, None)]
        found = [key for key in keys if key in self.kept]
        if not found:
            raise LDMError(f"No maps of the layer {layer!r} and the part {part!r} are kept: {self.layers()} are.")
        most = self.kept[found[0]].shape[-1]
        if tokens is not None and max(tokens) >= most:
            raise LDMError(f"Token {max(tokens)} asked for, but {layer} knows {most}: 0 to {most - 1}.")
        pick = slice(None) if tokens is None else list(tokens)
        total = sum(self.kept[key][picture][..., pick] for key in found)
        return total / sum(self.counts[key] for key in found)
