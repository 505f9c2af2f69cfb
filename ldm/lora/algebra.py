"""The algebra of small changes: how a few numbers describe a whole matrix that is added to a weight.

    LoRA    dW = alpha/r * B A                              Hu et al. 2021, section 4.1; A (r, I) down, B (O, r) up
            of a convolution: A (r, I, k, k), B (O, r, 1, 1); with a Tucker core M (r, r, k, k) between two 1x1 ones
    LoHa    dW = alpha/r * (B1 A1) * (B2 A2)                Hyeon-Woo et al. 2021 (FedPara), proposition 1, element by
            element; each factor may have a Tucker core (proposition 3)
    LoKr    dW = alpha/r * C kron (B A)                     Yeh et al. 2023 (LyCORIS), section 3.2; either side whole
    full    dW itself                                       LyCORIS's `diff`; the gains of a norm, too
    new     dW = W_new - W                                  what takes a gain's place (FLUX's control LoRAs)

Each form is plain tensor code: its factors may be parameters that are trained. Shapes: O and I the weight's outputs and
inputs, k a kernel's side, r the rank.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.errors import LDMError

Pieces = Sequence[tuple[int, int]]  # rows, from and to


class Change:
    """What all forms share: `delta`, the whole change of a weight, and `beside`, what it adds to a layer's output.

    `rank` is None where nothing is factored. `scale`, alpha/rank, is 1 where no alpha is said.
    """

    kind: ClassVar[str]
    alpha: float | None = None

    @property
    def rank(self) -> int | None:
        return None

    @property
    def scale(self) -> float:
        return 1.0 if self.alpha is None or self.rank is None else self.alpha / self.rank

    def whole(self) -> Tensor:
        """The product of the factors, not scaled; in a shape of its own, which `delta` brings into the weight's."""
        raise NotImplementedError

    def delta(self, shape: torch.Size | tuple[int, ...]) -> Tensor:
        """The change of a weight of that shape, at weight 1, in the factors' own dtype.

        Of a matrix that reads more than the change was made for, it changes the first columns. Raises LDMError for one
        that reads less.
        """
        whole = self.scale * self.whole()
        if whole.numel() > math.prod(shape):
            raise LDMError(
                f"A LoRA's change of {whole.numel():,} numbers is more than a weight of {' x '.join(map(str, shape))} "
                "has: it makes FLUX's first layer wider, which a pipeline alone can do (pipe.add_lora)."
            )
        if whole.numel() < math.prod(shape):
            whole = whole.reshape(shape[0], -1)
            whole = F.pad(whole, (0, shape[1] - whole.shape[1]))
        return whole.reshape(shape)

    def rows(self, pieces: Pieces) -> "Change":
        """The change of those rows alone, one piece behind the other: what a layer of ours has of a fused one."""
        return Rows(self, pieces)

    def against(self, weight: Tensor) -> "Change":
        """The same as a change of exactly this weight, which has no LoRA in it."""
        return self

    def norm(self) -> float:
        """The change's Frobenius norm, at weight 1."""
        exact = self.to(dtype=torch.float64)  # float16 factors may multiply beyond their range
        return scaled(self.scale, exact.whole())

    @cached_property
    def digest(self) -> str:
        """A hash of what it is: the form, the scale, and the factors' bits."""
        sha = hashlib.sha256(f"{self.kind} {self.scale!r}".encode())
        for name, tensor in self.factors():
            sha.update(f" {name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
            sha.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        return sha.hexdigest()

    def beside(self, module: nn.Module, x: Tensor) -> Tensor:
        """What the change adds to `module(x)`, at weight 1; here from the whole change, by the layer's own operation.

        `module`: a linear layer, a convolution or a norm.
        """
        weight = self.delta(module.weight.shape)
        x = x.to(weight.dtype)
        if isinstance(module, nn.LayerNorm):
            return F.layer_norm(x, module.normalized_shape, weight, None, module.eps)
        if isinstance(module, nn.GroupNorm):
            return F.group_norm(x, module.num_groups, weight, None, module.eps)
        if weight.dim() == 1:  # the gains of an RMS norm: FLUX's of q and k, and T5's
            return F.rms_norm(x, weight.shape, weight, module.eps)
        return convolved(module, x, weight) if isinstance(module, nn.Conv2d) else F.linear(x, weight)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> "Change":
        """The same with its factors there; itself, if they are."""
        moved = {name: tensor.to(device or tensor.device, dtype or tensor.dtype) for name, tensor in self.factors()}
        return replace(self, **moved) if any(moved[name] is not tensor for name, tensor in self.factors()) else self

    def factors(self) -> list[tuple[str, Tensor]]:
        found = [(field.name, getattr(self, field.name)) for field in fields(self)]
        return [(name, value) for name, value in found if isinstance(value, Tensor)]


@dataclass(frozen=True, eq=False)
class LowRank(Change):
    """LoRA: `down` (r, I[, k, k]), `up` (O, r[, 1, 1]); with `mid` (r, r, k, k), `down` is (r, I[, 1, 1])."""

    down: Tensor
    up: Tensor
    alpha: float | None = None
    mid: Tensor | None = None
    kind: ClassVar[str] = "LoRA"

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    def whole(self) -> Tensor:
        if self.mid is None:
            return self.up.flatten(1) @ self.down.flatten(1)  # (O, I*k*k)
        return torch.einsum("mn..., im, nj -> ij...", self.mid, self.up.flatten(1), self.down.flatten(1))

    def rows(self, pieces: Pieces) -> Change:
        return replace(self, up=taken(self.up, pieces))

    def norm(self) -> float:
        # |BA|^2 = trace((B^T B)(A A^T)): r x r numbers in place of O x I.
        if self.mid is not None:
            return super().norm()
        up, down = self.up.flatten(1).double(), self.down.flatten(1).double()
        most = up.abs().max(), down.abs().max()  # taken out, for fourth powers of large numbers are beyond all range
        if self.scale == 0 or 0 in most:
            return 0.0
        up, down = up / most[0], down / most[1]
        square = ((up.T @ up) * (down @ down.T)).sum()
        return abs(self.scale) * float(most[0]) * float(most[1]) * float(square.clamp(min=0).sqrt())

    def beside(self, module: nn.Module, x: Tensor) -> Tensor:
        x = x.to(self.down.dtype)
        if not isinstance(module, nn.Conv2d):
            down = self.down.flatten(1)
            return self.scale * F.linear(F.linear(x[..., : down.shape[1]], down), self.up.flatten(1))
        up = self.up.flatten(1)[:, :, None, None]
        if self.mid is None:
            h = convolved(module, x, self.down.reshape(-1, *module.weight.shape[1:]))  # (B, r, H', W')
        else:
            h = convolved(module, F.conv2d(x, self.down.flatten(1)[:, :, None, None]), self.mid)
        return self.scale * F.conv2d(h, up)


@dataclass(frozen=True, eq=False)
class Hadamard(Change):
    """LoHa: `w1_a`, `w2_a` (O, r), `w1_b`, `w2_b` (r, I[*k*k]); with cores `t1`, `t2` (r, r, k, k), `a` is (r, O)."""

    w1_a: Tensor
    w1_b: Tensor
    w2_a: Tensor
    w2_b: Tensor
    alpha: float | None = None
    t1: Tensor | None = None
    t2: Tensor | None = None
    kind: ClassVar[str] = "LoHa"

    @property
    def rank(self) -> int:
        return self.w1_b.shape[0]

    def whole(self) -> Tensor:
        return product(self.w1_a, self.w1_b, self.t1) * product(self.w2_a, self.w2_b, self.t2)


@dataclass(frozen=True, eq=False)
class Kronecker(Change):
    """LoKr: the left side `w1` (a, b), or `w1_a` (a, r) and `w1_b` (r, b); the right side `w2` (c, d[, k, k]), or
    `w2_a` (c, r) and `w2_b` (r, d[*k*k]), or with a core `t2` (r, r, k, k) `w2_a` (r, c) and `w2_b` (r, d).

    O = a*c, I = b*d. With both sides whole there is no rank, and alpha counts for nothing; but PEFT scales these, too,
    by a rank that its configuration alone says: `said_rank`.
    """

    w1: Tensor | None = None
    w1_a: Tensor | None = None
    w1_b: Tensor | None = None
    w2: Tensor | None = None
    w2_a: Tensor | None = None
    w2_b: Tensor | None = None
    t2: Tensor | None = None
    alpha: float | None = None
    said_rank: int | None = None
    kind: ClassVar[str] = "LoKr"

    @property
    def rank(self) -> int | None:
        factor = self.w2_b if self.w1_b is None else self.w1_b
        return self.said_rank if factor is None else factor.shape[0]

    @property
    def left(self) -> Tensor:
        return self.w1_a @ self.w1_b if self.w1 is None else self.w1  # (a, b)

    @property
    def right(self) -> Tensor:
        return product(self.w2_a, self.w2_b, self.t2) if self.w2 is None else self.w2  # (c, d, ...)

    def whole(self) -> Tensor:
        left, right = self.left, self.right
        return torch.kron(left.reshape(*left.shape, *[1] * (right.dim() - 2)), right.contiguous())

    def norm(self) -> float:
        exact = self.to(dtype=torch.float64)
        return scaled(self.scale, exact.left) * scaled(1.0, exact.right)

    def beside(self, module: nn.Module, x: Tensor) -> Tensor:
        # (C kron D) x: the inputs as b groups of d, D within each, then C across them.
        left, right = self.left, self.right
        x = x.to(left.dtype)
        if not isinstance(module, nn.Conv2d):
            h = F.linear(x.unflatten(-1, (left.shape[1], -1)), right.flatten(1))  # (..., b, c)
            return self.scale * torch.einsum("...bc, ab -> ...ac", h, left).flatten(-2)
        groups = left.shape[1]
        right = right.reshape(right.shape[0], -1, *module.kernel_size)
        h = convolved(module, x.reshape(len(x) * groups, -1, *x.shape[2:]), right)
        h = h.reshape(len(x), groups, *h.shape[1:])  # (B, b, c, H', W')
        return self.scale * torch.einsum("nbchw, ab -> nachw", h, left).flatten(1, 2)


@dataclass(frozen=True, eq=False)
class Full(Change):
    """The change itself, of a weight or of a norm's gains: `diff` in the weight's own shape."""

    diff: Tensor
    kind: ClassVar[str] = "full"

    def whole(self) -> Tensor:
        return self.diff

    def rows(self, pieces: Pieces) -> Change:
        return replace(self, diff=taken(self.diff, pieces))


@dataclass(frozen=True, eq=False)
class New(Change):
    """What takes a weight's place. It is a change of a known weight only (`against`); by itself it has no size."""

    new: Tensor
    kind: ClassVar[str] = "new"

    def whole(self) -> Tensor:
        raise NotImplementedError("which change this is the weight tells: `against`")

    def norm(self) -> float:
        return 0.0

    def rows(self, pieces: Pieces) -> Change:
        return replace(self, new=taken(self.new, pieces))

    def against(self, weight: Tensor) -> Change:
        exact = torch.promote_types(torch.promote_types(weight.dtype, self.new.dtype), torch.float32)
        return Full(self.new.to(weight.device, exact) - weight.to(exact))


@dataclass(frozen=True, eq=False)
class Rows(Change):
    """Rows of a change whose factors have none of their own (LoHa with cores, LoKr): computed whole, then taken."""

    change: Change
    pieces: Pieces

    @property
    def kind(self) -> str:
        return f"{self.change.kind} {self.pieces}"

    @property
    def rank(self) -> int | None:
        return self.change.rank

    @property
    def alpha(self) -> float | None:
        return self.change.alpha

    def whole(self) -> Tensor:
        return taken(self.change.whole(), self.pieces)

    def factors(self) -> list[tuple[str, Tensor]]:
        return self.change.factors()

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Change:
        moved = self.change.to(device, dtype)
        return self if moved is self.change else Rows(moved, self.pieces)


@dataclass(frozen=True, eq=False)
class Shift(Change):
    """The change of a bias, (O,), `factor` times what the file holds."""

    diff: Tensor
    factor: float = 1.0
    kind: ClassVar[str] = "full"

    @property
    def scale(self) -> float:
        return self.factor

    def whole(self) -> Tensor:
        return self.diff

    def rows(self, pieces: Pieces) -> Change:
        return replace(self, diff=taken(self.diff, pieces))

    def beside(self, module: nn.Module, x: Tensor) -> Tensor:
        channels_first = isinstance(module, nn.Conv2d | nn.GroupNorm)
        shape = (-1, *[1] * (x.dim() - 2)) if channels_first else (-1,)
        return (self.scale * self.whole()).reshape(shape)


def summed(weight: Tensor, changes: Sequence[tuple[float, Change]]) -> Tensor:
    """W + sum_i weight_i * dW_i, in W's own type, of (weight, change).

    Float addition isn't associative: the order is told by what the changes are, and not by who came first, or by how a
    file is called.
    """
    if len(changes) > 1:
        changes = sorted(changes, key=lambda each: (each[1].digest, each[0]))
    base = weight
    for number, change in changes:
        weight = weight + number * change.to(base.device, base.dtype).against(base).delta(base.shape)
    return weight


def taken(x: Tensor, pieces: Pieces) -> Tensor:
    """Those rows of `x`, one piece behind the other."""
    found = [x[start:stop] for start, stop in pieces]
    return found[0] if len(found) == 1 else torch.cat(found)


def scaled(scale: float, x: Tensor) -> float:
    """|scale| times the norm of `x`, float64, of which no square is made that is beyond all range."""
    most = float(x.abs().max())
    return abs(scale) * most * float(torch.linalg.vector_norm(x / most)) if scale and most else 0.0


def product(a: Tensor, b: Tensor, core: Tensor | None) -> Tensor:
    """`a` (O, r) times `b` (r, I...): (O, I...); with a core (r, r, k, k), `a` (r, O): (O, I, k, k)."""
    if core is None:
        return a.flatten(1) @ b.flatten(1)
    return torch.einsum("ij..., ip, jr -> pr...", core, a, b)


def convolved(module: nn.Conv2d, x: Tensor, weight: Tensor) -> Tensor:
    """`x` under that weight in the place of the layer's own, without its bias."""
    return F.conv2d(x, weight, None, module.stride, module.padding, module.dilation)
