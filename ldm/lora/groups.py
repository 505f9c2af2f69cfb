"""The factors that belong to one layer, and whether they can: told from a file's header, before a number is read."""

from dataclasses import dataclass, field
from math import prod

from ldm.errors import LDMError
from ldm.lora.algebra import Change, Full, Hadamard, Kronecker, LowRank, New, Shift

Shape = tuple[int, ...]
NORMS = ("w_norm", "b_norm")


@dataclass(frozen=True, eq=False)
class Group:
    """What a file holds for one layer.

    part     the network: "unet", "transformer", "text_encoder" or "text_encoder_2"
    layer    the layer, as the file calls it
    form     "LoRA", "LoHa", "LoKr", "full" or "new": what takes a norm's gain's place
    style    whose names the factors have
    keys     each factor (`down`, `w1_a`, ...) -> its name in the file
    shapes   each factor's shape
    rank     None, where nothing is factored
    shape    of the change: (O, I), (O, I, k, k) or flattened (O, I*k*k); of a full one that of the file; None: only the
             layer's bias changes
    alpha    None, where the file says none: then the scale is 1
    """

    part: str
    layer: str
    form: str
    style: str
    keys: dict[str, str] = field(repr=False)
    shapes: dict[str, Shape] = field(repr=False)
    rank: int | None = None
    shape: Shape | None = None
    alpha: float | None = None

    @property
    def name(self) -> str:
        return f"{self.part}.{self.layer}"


def measured(group: Group) -> tuple[int | None, Shape | None]:
    """(rank, the change's shape) of a group. Raises LDMError, without the file's name, if the factors don't go
    together: one is missing or too many, ranks differ, or are larger than the layer itself.
    """
    measure = {"LoRA": _lora, "LoHa": _loha, "LoKr": _lokr, "full": _full, "new": _new}[group.form]
    for role, shape in group.shapes.items():
        if 0 in shape or (role != "alpha" and not shape):
            raise LDMError(f"{group.keys[role]!r} is of the empty shape {shape}")
    rank, shape = measure(group)
    if rank is not None and rank > max(shape[0], prod(shape[1:])):
        raise LDMError(
            f"{group.layer!r} claims rank {rank:,}, which a layer of {' x '.join(map(str, shape))} numbers can't have"
        )
    return rank, shape


def fits(shape: Shape, target: Shape) -> bool:
    """Whether a change of that shape is one of a weight of the shape `target`.

    A matrix is a 1x1 convolution too: SD 1 projects by the one, SD 2 and XL by the other. Inputs and kernel may be
    flattened into one.
    """
    shape, target = without_ones(shape), without_ones(target)
    flat = len(shape) == 2 and len(target) > 2
    return shape == target or (flat and shape == (target[0], prod(target[1:])))


def without_ones(shape: Shape) -> Shape:
    return shape[:2] if shape[2:] == (1, 1) else shape


def built(group: Group, factors: dict) -> dict[str, Change]:
    """Which of a layer's parameters changes ("weight", "bias") -> how, made of the factors."""
    factors = dict(factors)
    factors.pop("alpha", None)
    if group.form == "new":
        return {"weight": New(factors["new"])}
    if group.form == "full":
        roles = {"weight": ("diff", "w_norm"), "bias": ("diff_b", "b_norm")}
        kinds = {"weight": Full, "bias": Shift}
        return {leaf: kinds[leaf](factors[role]) for leaf in roles for role in roles[leaf] if role in factors}
    shift, diff_b = factors.pop("shift", None), factors.pop("diff_b", None)
    if group.form == "LoKr":
        factors["said_rank"] = group.rank
    change = {"LoRA": LowRank, "LoHa": Hadamard, "LoKr": Kronecker}[group.form](**factors, alpha=group.alpha)
    if diff_b is not None:  # ComfyUI writes a bias' change beside the factors, and doesn't scale it by their alpha
        return {"weight": change, "bias": Shift(diff_b)}
    return {"weight": change} if shift is None else {"weight": change, "bias": Shift(shift, change.scale)}


# ------------------------------------------------------------------------------------------- each form's factors


def _need(group: Group, *roles: str) -> list[Shape]:
    """The shapes of factors that must be there."""
    missing = [role for role in roles if role not in group.shapes]
    if missing:
        have = next((key for role, key in group.keys.items() if role != "alpha"), group.layer)
        names = " and ".join(repr(role) for role in missing)
        raise LDMError(f"{group.layer!r} lacks its factor {names}, though {have!r} is there")
    return [group.shapes[role] for role in roles]


def _only(group: Group, *roles: str) -> None:
    """Raise LDMError for a factor that goes with none of `roles`."""
    if odd := [key for role, key in group.keys.items() if role not in (*roles, "alpha")]:
        raise LDMError(f"{group.layer!r} has {odd[0]!r}, which doesn't go with its other factors")


def _equal(group: Group, what: str, *numbers: int) -> None:
    if len(set(numbers)) > 1:
        raise LDMError(f"{group.layer!r} has factors of different {what}, {' and '.join(map(str, numbers))}")


def _matrix(group: Group, role: str) -> Shape:
    """The shape of a factor that must be a matrix, or a 1x1 convolution."""
    shape = without_ones(group.shapes[role])
    if len(shape) != 2:
        raise LDMError(f"{group.keys[role]!r} is of shape {group.shapes[role]}, where a matrix belongs")
    return shape


def _kernel(group: Group, role: str) -> Shape:
    """The shape of a factor that must be a matrix or a convolution."""
    shape = group.shapes[role]
    if len(shape) not in (2, 4):
        raise LDMError(f"{group.keys[role]!r} is of shape {shape}, where a matrix or a convolution's belongs")
    return shape


def _core(group: Group, role: str, rows: int, columns: int) -> Shape:
    """The kernel of a Tucker core (rows, columns, k, k)."""
    shape = group.shapes[role]
    if len(shape) != 4:
        raise LDMError(f"{group.keys[role]!r} is of shape {shape}, where a core of four dimensions belongs")
    _equal(group, "ranks", rows, shape[0])
    _equal(group, "ranks", columns, shape[1])
    return shape[2:]


def _lora(group: Group) -> tuple[int, Shape]:
    _need(group, "down", "up")
    _only(group, "down", "up", "mid", "shift" if "shift" in group.shapes else "diff_b")
    (outputs, rank), down = _matrix(group, "up"), _kernel(group, "down")
    _equal(group, "ranks", down[0], rank)
    if "shift" in group.shapes and group.shapes["shift"] != (outputs,):
        raise LDMError(f"{group.keys['shift']!r} is of shape {group.shapes['shift']} instead of {(outputs,)}")
    if "mid" in group.shapes:
        return rank, (outputs, _matrix(group, "down")[1], *_core(group, "mid", rank, rank))
    return rank, (outputs, *down[1:])


def _loha(group: Group) -> tuple[int, Shape]:
    _need(group, "w1_a", "w1_b", "w2_a", "w2_b")
    cores = {"t1", "t2"} & group.shapes.keys()
    if cores:
        _need(group, "t1", "t2")
    _only(group, "w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2", "diff_b")
    halves = [_half(group, *roles) for roles in (("w1_a", "w1_b", "t1"), ("w2_a", "w2_b", "t2"))]
    (rank, shape), (rank_2, shape_2) = halves
    _equal(group, "ranks", rank, rank_2)
    if shape != shape_2:
        raise LDMError(f"{group.layer!r} has halves of different shapes, {shape} and {shape_2}")
    return rank, shape


def _half(group: Group, a: str, b: str, core: str) -> tuple[int, Shape]:
    """(rank, shape) of the product of two factors and their core, if there is one."""
    if core in group.shapes:
        (rank, outputs), (rank_b, inputs) = _matrix(group, a), _matrix(group, b)
        return rank, (outputs, inputs, *_core(group, core, rank, rank_b))
    (outputs, rank), right = _matrix(group, a), _kernel(group, b)
    _equal(group, "ranks", rank, right[0])
    return rank, (outputs, *right[1:])


def _lokr(group: Group) -> tuple[int | None, Shape]:
    ranks, sides = [], []
    for whole, a, b, core in (("w1", "w1_a", "w1_b", ""), ("w2", "w2_a", "w2_b", "t2")):
        if whole in group.shapes:
            if odd := {a, b, core} & group.shapes.keys():
                raise LDMError(f"{group.layer!r} has both {group.keys[whole]!r} and {group.keys[odd.pop()]!r}")
            sides.append(_kernel(group, whole) if core else _matrix(group, whole))
            continue
        _need(group, a, b)
        rank, shape = _half(group, a, b, core)
        if rank > max(shape[0], prod(shape[1:])):
            raise LDMError(f"{group.layer!r} claims rank {rank:,}, which a side of shape {shape} can't have")
        ranks.append(rank)
        sides.append(shape)
    _only(group, "w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2", "diff_b")
    _equal(group, "ranks", *ranks)
    left, right = sides
    if len(left) != 2:
        raise LDMError(f"{group.layer!r} has a left side of shape {left}, where a matrix belongs")
    return (ranks or [None])[0], (left[0] * right[0], left[1] * right[1], *right[2:])


def _full(group: Group) -> tuple[None, Shape | None]:
    _only(group, *(NORMS if NORMS[0] in group.keys or NORMS[1] in group.keys else ("diff", "diff_b")))
    return None, group.shapes.get("diff", group.shapes.get("w_norm"))


def _new(group: Group) -> tuple[None, Shape]:
    _only(group, "new")
    return None, group.shapes["new"]
