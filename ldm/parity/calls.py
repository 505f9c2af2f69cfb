"""What every module of a network was given and what it gave, in order of completion, under our names."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ldm.parity.compare import distance, same_layout
from ldm.parity.sides import Part


class Way(NamedTuple):
    """A module's work done otherwise: `run` is called with a copy of it, which may be changed, and its inputs."""

    text: str  # "with eps 1e-06 instead of 1e-05"
    run: Callable[..., object]


PLAIN = "written out plainly, as published"  # where this helps, our own code is at fault


@dataclass(frozen=True)
class Block:
    """A module of both sides: its output's relative error, and its input's; None where they can't be compared.

    `difference` is the largest of the output, `ours_ms` and `theirs_ms` the time of that one call, hooks and all.
    """

    name: str
    error: float | None
    input_error: float | None
    difference: float | None = None
    ours_ms: float | None = None
    theirs_ms: float | None = None


@dataclass
class Call:
    """What a module was given and what it gave, at its first call."""

    module: nn.Module
    args: tuple
    kwargs: dict
    output: object = None
    begun: float = 0.0
    ms: float = 0.0

    @property
    def inputs(self) -> list[Tensor]:
        return tensors((self.args, self.kwargs))

    @property
    def answer(self) -> Tensor | None:
        """The output, if it is a single tensor, or two streams of one sequence."""
        found = streams(self.output)
        return found if isinstance(found, Tensor) else None


def streams(output: object) -> Tensor | None:
    """The one tensor of an output; of two sequences of vectors (B, N, D), as FLUX's blocks give, both in one."""
    found = tensors(output)
    if len(found) == 2 and type(output) is tuple and all(each.dim() == 3 for each in found):
        first, second = found
        if (len(first), first.shape[2]) == (len(second), second.shape[2]):
            return torch.cat(found, dim=1)
    return found[0] if len(found) == 1 else None


def tensors(value: object) -> list[Tensor]:
    """All floating-point tensors in a value, in order."""
    if isinstance(value, Tensor):
        return [value] if value.is_floating_point() else []
    if isinstance(value, dict):
        value = list(value.values())
    return [each for item in value for each in tensors(item)] if isinstance(value, list | tuple) else []


def cast(value: object, dtype: torch.dtype) -> object:
    """The same value with its floating-point tensors in another dtype."""
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, dict):
        return {key: cast(each, dtype) for key, each in value.items()}
    return tuple(cast(each, dtype) for each in value) if isinstance(value, tuple) else value


@torch.no_grad()
def watch(part: Part, inputs: tuple, what: str) -> dict[str, Call]:
    """Run a part and keep every module's first call, in order of completion, under our names.

    "" is the whole, with the output of the name `what`.
    """
    calls, done, hooks = {}, {}, []

    def before(name: str, module: nn.Module, args: tuple, kwargs: dict) -> None:
        if name not in calls:
            calls[name] = Call(module, kept(args), kept(kwargs), begun=clock(args))

    def after(name: str, module: nn.Module, args: tuple, kwargs: dict, output: object) -> None:
        if name in calls and name not in done:
            calls[name].ms = 1000 * (clock(args) - calls[name].begun)
            calls[name].output = kept(output)
            done[name] = calls[name]

    for own, module in part.module.named_modules():
        name = own if own == "" else module_name(part.rename, own)
        if name is not None:
            hooks.append(module.register_forward_pre_hook(partial(before, name), with_kwargs=True))
            hooks.append(module.register_forward_hook(partial(after, name), with_kwargs=True))
    begun = clock(inputs)
    try:
        answer = part.run(*inputs)
    finally:
        for hook in hooks:
            hook.remove()
    for name, call in done.items() if part.retell is not None else ():
        part.retell(name, call)
    done[""] = Call(part.module, inputs, {}, answer[what], begun, 1000 * (clock(inputs) - begun))
    return done


def clock(args: tuple) -> float:
    """Seconds, when the device has done what it was told."""
    if any(isinstance(each, Tensor) and each.is_cuda for each in args):
        torch.cuda.synchronize()
    return time.perf_counter()


def module_name(rename: Callable[[str], str | None], name: str) -> str | None:
    """A module's name as ours: tables rename parameters, so one is put behind it."""
    found = rename(f"{name}.weight")
    return None if found in (None, "weight") else found.removesuffix(".weight")  # an outer shell has no name of ours


def kept(value: object) -> object:
    """The same value with its tensors copied, so that later changes in place don't reach it."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if type(value) in (list, tuple):
        return type(value)(kept(each) for each in value)
    if hasattr(value, "items"):
        return {key: kept(each) for key, each in value.items()}
    return value


def apart(a: Tensor | None, b: Tensor | None) -> tuple[float | None, float | None]:
    """The distance of two tensors, and the relative one, in either layout; None if they can't be compared."""
    if a is None or b is None or a.numel() == 0:
        return None, None
    pair = same_layout(a, b)
    return (None, None) if pair is None else distance(*pair)


def between(a: Tensor | None, b: Tensor | None) -> float | None:
    """The relative distance alone."""
    return apart(a, b)[1]


def hold(name: str, mine: Call, other: Call) -> Block:
    found = [between(a, b) for a, b in zip(mine.inputs[:1], other.inputs[:1], strict=False)]
    difference, error = apart(mine.answer, other.answer)
    return Block(name, error, found[0] if found else None, difference, mine.ms, other.ms)
