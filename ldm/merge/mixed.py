"""The tensors of a model that others become: each is computed when it is asked for, of those that are read then.

weighted sum       C = (1 - alpha) A + alpha B, so written that A is exact at 0, B at 1, and both where they are equal
add-difference     C = A + alpha (B - BASE)
and then           C + sum_i w_i dW_i, the LoRAs'
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ldm.convert.writing import Ours
from ldm.errors import LDMError
from ldm.io.weights import all_finite
from ldm.lora.algebra import Change, summed


@dataclass
class Mixed:
    """One part's tensors, as `ldm.convert.writing` asks for them (`Ours`): by our names.

    `alphas`, and `changes`, the LoRAs' with their weights, are by name too; `dtype`: what is written, None for each
    one's own. Computed in float32, in float64 where A's is, or where that is written.
    """

    a: Ours
    b: Ours | None
    base: Ours | None
    alphas: Mapping[str, float]
    changes: Mapping[str, Sequence[tuple[float, Change]]]
    dtype: torch.dtype | None = None
    sizes: dict[str, tuple[float, float]] = field(default_factory=dict)  # by name: |C - A| and |A|
    beneath: dict[str, float] = field(default_factory=dict)  # of those that LoRAs change: |C| without them
    differs: bool = False  # whether a number of what has been read isn't A's

    @property
    def names(self) -> Mapping[str, str]:
        return self.a.names

    def bytes(self, dtype: torch.dtype | None) -> int:
        """How much room they take, as that type or as the one each has."""
        return self.a.bytes(dtype)

    @property
    def change(self) -> float:
        """|C - A| / |A| over all that has been read."""
        change, weight = (sum(each**2 for each in column) for column in zip(*self.sizes.values(), strict=True))
        return (change / weight) ** 0.5 if weight else 0.0

    def read(self, key: str) -> Tensor:
        """That tensor. Raises LDMError where one that it is made of isn't finite, or it itself wouldn't be."""
        a = self.sound(self.a, key)
        if not a.is_floating_point():
            return a
        kind = self.dtype or a.dtype
        wide = torch.float64 if torch.float64 in (a.dtype, kind) else torch.float32
        mixed, alpha = a, self.alphas[key]
        if self.b is not None and alpha != 0:
            mixed = self.mix(key, a, alpha, wide)
        without = mixed
        if self.changes.get(key):
            mixed = summed(mixed.to(wide), self.changes[key])
        made = mixed.to(kind)
        self.measure(key, a, without, made, wide)
        return made

    def outline(self, key: str) -> Tensor:
        """Its shape and type alone, on the meta device."""
        a = self.a.outline(key)
        return a.to(self.dtype) if self.dtype and a.is_floating_point() else a

    def measure(self, key: str, a: Tensor, without: Tensor, made: Tensor, wide: torch.dtype) -> None:
        """How far from A a tensor is. Raises LDMError for numbers beyond its range."""
        if not all_finite(made):
            dtype = str(made.dtype).removeprefix("torch.")
            raise LDMError(
                f"What is merged would carry {key!r} of {self.a.tensors.place} beyond the range of {dtype}: take "
                "smaller weights, or write another type (--dtype)."
            )
        norms = [float(torch.linalg.vector_norm(each.to(wide))) for each in (made.to(wide) - a.to(wide), a, without)]
        self.sizes[key] = norms[0], norms[1]
        if self.changes.get(key):
            self.beneath[key] = norms[2]
        self.differs |= not torch.equal(made, a.to(made.dtype))

    def mix(self, key: str, a: Tensor, alpha: float, wide: torch.dtype) -> Tensor:
        """A and B, or A and what B is beyond its base."""
        b = self.sound(self.b, key)
        if self.base is None:  # the end B is taken as it is; lerp is exact at A, and where the two are equal
            return b if alpha == 1 else torch.lerp(a.to(wide), b.to(wide), alpha)
        difference = b.to(wide) - self.sound(self.base, key).to(wide)
        if difference.shape != a.shape:  # conv_in: A reads more beside the latent, of which the others know nothing
            known, difference = difference, torch.zeros(a.shape, dtype=wide)
            difference[:, : known.shape[1]] = known
        return a.to(wide) + alpha * difference

    def sound(self, tensors: Ours, key: str) -> Tensor:
        """A source's tensor. Raises LDMError if a number of it isn't finite."""
        tensor = tensors.read(key)
        if tensor.is_floating_point() and not all_finite(tensor):
            raise LDMError(f"{tensors.tensors.place}: {key!r} holds numbers that are not finite: take a sound copy.")
        return tensor
