"""Noise, passed in rather than taken from global state: one generator per picture, always on the CPU, always float32.

So a picture depends neither on its neighbours in the batch nor on the device, and the stream is the one that diffusers
draws when it is given the same generators.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ldm.errors import LDMError


class Noise:
    """Standard normal noise for a batch, image k from generator k."""

    def __init__(self, generators: Sequence[torch.Generator]):
        self.generators = list(generators)

    @classmethod
    def from_seeds(cls, seeds: Sequence[int]) -> "Noise":
        return cls([torch.Generator().manual_seed(seed) for seed in seeds])

    def draw(self, shape: Sequence[int]) -> Tensor:
        """(B, *shape) float32 on the CPU: the next numbers of every picture's generator.

        Drawn picture by picture and in float32 whatever the model's dtype: another shape or dtype is another stream.
        """
        return torch.cat([torch.randn((1, *shape), generator=g, dtype=torch.float32) for g in self.generators])

    def __call__(self, like: Tensor) -> Tensor:
        """Fresh noise of the shape, dtype and device of `like` (B, C, h, w)."""
        if len(like) != len(self.generators):
            raise LDMError(
                f"{len(self.generators)} noise generators for {len(like)} pictures: pass one seed a picture."
            )
        return self.draw(like.shape[1:]).to(like)

    def state(self) -> list[Tensor]:
        """Where every generator stands."""
        return [g.get_state() for g in self.generators]

    def restore(self, state: list[Tensor]) -> None:
        """Put every generator back to where `state` was taken."""
        if len(state) != len(self.generators):
            raise LDMError(
                f"The run had {len(state)} noise generators, this one has {len(self.generators)}: pass as many."
            )
        for g, s in zip(self.generators, state, strict=True):
            g.set_state(s)
