"""Likely causes, found by experiment: our own module, given the inputs that were captured, done in other ways.

Whichever way gives the other side's output is what the other side does. What the code between modules does is looked
for in the tensors themselves: is the one the other times a number, with a term more, two halves the other way round?
"""

import copy
import math
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.parity.alternatives import waves, ways_of
from ldm.parity.calls import Call, Way, cast, streams
from ldm.parity.compare import distance, same_layout
from ldm.parity.flux_ways import ways_of_flux

GAIN = 5  # an alternative must be so many times nearer than we are, and agree
STEPS = {"float16": 2.0**-11, "bfloat16": 2.0**-8}  # half the step between neighbours, relative


@torch.no_grad()
def find(
    root: nn.Module, block: str, first: str, a: dict[str, Call], b: dict[str, Call], bar: float
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """What makes our `block` agree with theirs, and what was tried. `a` and `b` are ours' and theirs' calls."""
    module = root.get_submodule(block) if block else root
    call, other = a[block], b[block]
    target, inner = other.answer, None
    if call.answer is None or target is None or same_layout(call.answer, target) is None:
        target, inner = b[first].answer, first[len(block) :].lstrip(".")
    causes, tried = [], []
    baseline = off(a[first].answer if inner is not None else call.answer, target)
    ways = (*ways_of(module), *ways_of_flux(module), *swapped(root, block), *(rounded(module) if block else ()))
    for way in ways if math.isfinite(baseline) else ():
        tried.append(way.text)
        error = off(run_way(module, call, way, inner), target)
        if error <= max(bar, baseline / 1e4) and error * GAIN <= baseline:
            causes.append(f"{way.text}, ours agrees ({error:.1e} in place of {baseline:.1e})")
    if not causes:
        tried += ["a factor, a sign, a term more or less, halves, a transposition, another layer's output"]
        if first == block:
            causes += relations_of(a[first].answer, b[first].answer, others(a), bar, "its output", constants(root))
        else:
            causes += told(root, a, b[first], bar) if not block else []
            causes += relations(a[first], b[first], others(a), bar, constants(root)) if not causes else []
    if not causes:
        causes += [f"its size is that of a {name} step" for name, step in STEPS.items() if step / 8 < baseline < step]
    return tuple(dict.fromkeys(causes)), tuple(dict.fromkeys(tried))


def run_way(module: nn.Module, call: Call, way: Way, inner: str | None) -> Tensor | None:
    """Our module's answer to what it was given, done another way: a copy that shares its weights is changed.

    `inner`: the answer wanted is that of a module inside it. None if the way leads nowhere.
    """
    shared = {id(p): p for p in (*module.parameters(), *module.buffers())}
    twin, found = copy.deepcopy(module, shared), []
    hook = None
    if inner:
        hook = twin.get_submodule(inner).register_forward_hook(lambda m, args, output: found.append(output))
    try:
        answer = way.run(twin, *call.args, **call.kwargs)
    except Exception:  # shapes that don't fit: this isn't what the other side does
        return None
    finally:
        if hook:
            hook.remove()
    answer = found[0] if inner and found else answer
    answer = streams(answer) if isinstance(answer, tuple) and streams(answer) is not None else answer
    while isinstance(answer, tuple | list) and answer:
        answer = answer[0]
    return answer if isinstance(answer, Tensor) else None


def off(answer: Tensor | None, target: Tensor | None) -> float:
    """The relative distance, infinite where the two can't be compared."""
    pair = None if answer is None or target is None else same_layout(answer, target)
    return float("inf") if pair is None else distance(*pair)[1]


def swapped(root: nn.Module, block: str) -> Iterator[Way]:
    """With the weights of a neighbour of the same shape."""
    parent, _, own = block.rpartition(".")
    if not block or not hasattr(root.get_submodule(block), "weight"):
        return
    me = root.get_submodule(block)
    for name, neighbour in root.get_submodule(parent).named_children():
        weight = getattr(neighbour, "weight", None)
        if name != own and weight is not None and weight.shape == me.weight.shape:
            yield Way(f"with the weights of {name} instead of {own}", with_weights(neighbour))


def with_weights(neighbour: nn.Module) -> Callable[..., Tensor]:
    def run(twin: nn.Module, *args: object, **kwargs: object) -> Tensor:
        twin.weight, twin.bias = neighbour.weight, getattr(neighbour, "bias", None)
        return twin(*args, **kwargs)

    return run


def rounded(module: nn.Module) -> Iterator[Way]:
    """Calculated in fewer digits."""
    own = next((p.dtype for p in module.parameters()), None)
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        name = str(dtype).removeprefix("torch.")
        if own is not None and own.itemsize > dtype.itemsize:
            yield Way(f"calculated in {name}", in_dtype(dtype))
            yield Way(f"with its weights rounded to {name}", in_dtype(dtype, weights_alone=True))


def in_dtype(dtype: torch.dtype, weights_alone: bool = False) -> Callable[..., object]:
    def run(twin: nn.Module, *args: object, **kwargs: object) -> object:
        own = next(twin.parameters()).dtype
        twin = copy.deepcopy(twin).to(dtype)
        if weights_alone:
            return twin.to(own)(*args, **kwargs)
        return cast(twin(*cast(args, dtype), **cast(kwargs, dtype)), own)

    return run


# ---------------------------------------------------------------------------------------------- between modules

CURVES = {
    "SiLU": F.silu,
    "GELU": F.gelu,
    "GELU by tanh": lambda x: F.gelu(x, approximate="tanh"),
    "ReLU": F.relu,
    "tanh": torch.tanh,
    "a clamp to [-1, 1]": lambda x: x.clamp(-1, 1),
}


def others(calls: dict[str, Call]) -> dict[str, Tensor]:
    """What our side had calculated: the outputs of its modules, and what the blocks were given."""
    found = {name: call.answer for name, call in calls.items() if call.answer is not None and name}
    return found | {f"{name}'s input": call.inputs[0] for name, call in calls.items() if call.inputs and name}


def constants(root: nn.Module) -> dict[str, float]:
    """Numbers that a factor may be: those of the model's configuration."""
    fields = vars(getattr(root, "config", None) or type("", (), {})())
    return {name: value for name, value in fields.items() if isinstance(value, float) and value not in (0.0, 1.0)}


def known(factor: float, constants: dict[str, float]) -> str:
    """What a factor is, if it is one of the model's numbers, or its inverse."""
    for name, value in constants.items():
        for text, number in ((name, value), (f"1/{name}", 1 / value)):
            if abs(factor - number) < 1e-5 * abs(number):
                return f", and {text} is {number:.6g}"
    return ": the sign is turned" if abs(factor + 1) < 1e-9 else ""


def relations(mine: Call, theirs: Call, pool: dict[str, Tensor], bar: float, constants: dict[str, float]) -> list[str]:
    """How the two inputs of a module are related."""
    found = []
    for x, y in zip(mine.inputs, theirs.inputs, strict=False):
        found += relations_of(x, y, pool, bar, "its input", constants)
        if found:
            break
    return found


def relations_of(
    x: Tensor | None, y: Tensor | None, pool: dict[str, Tensor], bar: float, what: str, constants: dict[str, float]
) -> list[str]:
    """How theirs, `y`, comes of ours, `x`, if it is one of the ways that are known."""
    pair = None if x is None or y is None else same_layout(x, y)
    if pair is None or distance(*pair)[1] <= bar:
        return []
    x, y = pair

    def same(candidate: Tensor) -> bool:
        fits = same_layout(candidate, y)
        return fits is not None and distance(*fits)[1] <= bar

    found = []
    factor = ((x * y).sum() / (x * x).sum()).item()
    if same(x * factor):
        found.append(f"{what} is {factor:.6g} times ours{known(factor, constants)}")
    for name, other in pool.items():
        fits = same_layout(other, y)
        if fits is None or not other.any():
            continue
        if distance(*fits)[1] <= bar:
            found.append(f"{what} there is our {name}")
        elif same(x + fits[0]):
            found.append(f"{what} there has our {name} added, ours has not")
        elif same(x - fits[0]):
            found.append(f"{what} there lacks our {name}, which ours adds")
    found += halves(x, y, pool, bar, what) if not found and y.dim() == 4 else []
    if y.dim() == 4 and y.shape[2] == y.shape[3] and same(x.transpose(2, 3)):
        found.append(f"{what} has height and width exchanged")
    for name, curve in CURVES.items():
        if same(curve(x)):
            found.append(f"{what} there went through {name}, ours did not")
        elif distance(curve(y), x)[1] <= bar:
            found.append(f"our {what.split()[-1]} went through {name}, theirs did not")
    return found[:3]


def halves(x: Tensor, y: Tensor, pool: dict[str, Tensor], bar: float, what: str) -> list[str]:
    """Two maps laid on each other: which, and in which order."""
    ours = theirs = None
    for name, other in pool.items():
        if other.dim() != 4 or other.shape[2:] != y.shape[2:] or not len(other) == len(y):
            continue
        c = other.shape[1]
        if c >= y.shape[1] or "input" in name:
            continue
        for side, part in (("first", slice(0, c)), ("last", slice(-c, None))):
            if ours is None and side == "last" and distance(other, x[:, part])[1] <= bar:
                ours = name
            if distance(other, y[:, part])[1] <= bar and distance(other, x[:, part])[1] > bar:
                theirs = f"{what} there has our {name} as its {side} {c} channels"
    return [theirs + (f", where ours has {ours} last" if ours else "")] if theirs else []


def told(root: nn.Module, a: dict[str, Call], other: Call, bar: float) -> list[str]:
    """What the timestep became: other sinusoids."""
    target = other.inputs[0] if other.inputs else None
    if target is None or not hasattr(root, "time_embedding") or target.dim() != 2:
        return []
    found = []
    for text, candidate in waves(root, a[""].args, target.dtype):
        if candidate.shape == target.shape and distance(candidate, target)[1] <= max(bar, 1e-6):
            found.append(f"with {text}, the embedding of the timestep agrees")
    return found
