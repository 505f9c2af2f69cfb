"""The first module that differs: both networks run again, every module watched, compared in order of completion.

The first to complete with another output is the deepest. If it was given the same as its counterpart, it is at fault
itself; if not, the fault lies in the code around it, in the smallest module that was still given the same: the block.
Then `causes` experiments with our own module of that name.
"""

import re
from dataclasses import dataclass, field, replace

import torch

from ldm.parity import causes
from ldm.parity.calls import Block, Call, between, cast, hold, watch
from ldm.parity.compare import DIFFERS, EQUAL, Line
from ldm.parity.drawn import widened
from ldm.parity.inputs import Plan, given
from ldm.parity.sides import Part, Side

# The error, relative to the largest value, from which a block counts as different. Below it lies rounding.
BAR = {torch.float64: 1e-12, torch.float32: 3e-6, torch.float16: 3e-3, torch.bfloat16: 2e-2}


@dataclass(frozen=True)
class Divergence:
    """Where a station begins to differ. `causes` were found by experiment; `tried` says what else was tried."""

    station: str
    block: str
    kind: str
    first: str  # the first module inside the block to complete with another output
    error: float
    input_errors: tuple[float, ...]
    causes: tuple[str, ...]
    tried: tuple[str, ...]
    blocks: tuple[Block, ...] = field(default=(), repr=False)
    note: str = ""


def look_inside(
    name: str, title: str, what: str, ours: Side, theirs: Side, plan: Plan, inputs: tuple
) -> Divergence:  # fmt: skip
    """Find the block, and experiment on it: in float64 if that is no great matter, and at a small size, if it differs
    there too."""
    mine, other = ours.parts[name], theirs.parts[name]
    if other.module is None:
        why = f"{theirs.name} shows no module of it: give load(...) a {name.split('_')[0]}_module"
        return Divergence(title, "", "", "", float("inf"), (), (), (), note=why)
    small = given(name, ours, plan.small(ours.own[0].vae.config.factor))
    ways = [(plan.dtype, small), (plan.dtype, inputs)]
    light = plan.device.type != "mps" and sum(p.numel() for p in mine.module.parameters()) <= LIGHT
    if light and plan.dtype != torch.float64:
        ways.insert(0, (torch.float64, cast(small, torch.float64)))
    for dtype, tried in ways:
        with widened(mine.module, dtype), widened(other.module, dtype):
            found, blocks = search(title, mine, other, what, tried, dtype)
        if found is not None and dtype == plan.dtype and light and dtype != torch.float64:
            return replace(found, note=ROUNDING.format(found.block or "the end"))
        if found is not None:
            return found
    return nowhere(title, blocks, plan)


# What a block's output may be off by where the network's own is equal: rounding that later blocks average away.
MOST = {torch.float64: 1e-11, torch.float32: 3e-5, torch.float16: 3e-2, torch.bfloat16: 2e-1}


@dataclass(frozen=True)
class Walked:
    """Every block of a network whose answer is equal."""

    station: str
    blocks: tuple[Block, ...] = field(repr=False)

    @property
    def named(self) -> tuple[Block, ...]:
        """Those that a reader knows by name: ResNet blocks, attention, transformer blocks, layers, both ends."""
        return tuple(block for block in self.blocks if block.error is not None and NAMED.fullmatch(block.name))


NAMED = re.compile(
    r"\w+(\.\w+)?|.*\.(resnets|attentions|transformer_blocks|downsamplers|upsamplers|layers|attn[12]|ff|self_attn|mlp)"
    r"(\.\d+)?"
)


def walk_inside(name: str, title: str, what: str, ours: Side, theirs: Side, plan: Plan) -> tuple[Line, Walked] | None:
    """Every module of both sides held against the other, at a small size: a line for all of them. None: no modules."""
    mine, other = ours.parts[name], theirs.parts[name]
    if mine.module is None or other.module is None:
        return None
    inputs = given(name, ours, plan.small(ours.own[0].vae.config.factor))
    watch(mine, inputs, what), watch(other, inputs, what)  # a first run is slow
    a, b = watch(mine, inputs, what), watch(other, inputs, what)
    blocks = tuple(hold(each, a[each], b[each]) for each in a if each in b and each)
    compared = [block for block in blocks if block.error is not None]
    if not compared:
        return None
    worst, most = max(compared, key=lambda block: block.error), MOST[plan.dtype]
    verdict = EQUAL if worst.error <= most else DIFFERS
    note = f"largest in {worst.name}" if worst.error else ""
    times = (a[""].ms, b[""].ms)
    line = Line(
        title, f"each of {len(compared)} modules", verdict, worst.difference, worst.error, most, *times, note=note
    )
    return line, Walked(title, blocks)


LIGHT = 100_000_000  # parameters of a network that is walked in float64 as well
ROUNDING = "in float64 every block agrees, so it is rounding; in this dtype the first to exceed its bound is {}"


def search(
    title: str, mine: Part, other: Part, what: str, inputs: tuple, dtype: torch.dtype
) -> tuple[Divergence | None, tuple[Block, ...]]:
    """Walk both on these inputs: the divergence, if a block differs, and all blocks."""
    bar = BAR[dtype]
    a, b = watch(mine, inputs, what), watch(other, inputs, what)
    blocks = tuple(hold(each, a[each], b[each]) for each in a if each in b)
    first = next((block for block in blocks if block.error is not None and not block.error <= bar), None)
    if first is None:
        return None, blocks
    block = enclosing(first, {each.name: each for each in blocks}, a, b, bar)
    found, tried = causes.find(mine.module, block, first.name, a, b, bar)
    call = a[block]
    errors = tuple(e for e in map(between, call.inputs, b[block].inputs) if e is not None)[:3]
    kind = type(call.module).__name__
    return Divergence(title, block, kind, first.name, first.error, errors, found, tried, blocks), blocks


def enclosing(first: Block, blocks: dict[str, Block], a: dict[str, Call], b: dict[str, Call], bar: float) -> str:
    """The module at fault: the first to differ, or the smallest around it that was given the same on both sides."""
    name = first.name
    while name:
        call, other = a.get(name), b.get(name)
        if call is not None and other is not None:
            error = blocks[name].input_error
            if error is not None and error <= bar:
                return name
        name = name.rpartition(".")[0]
    return ""


def nowhere(title: str, blocks: tuple[Block, ...], plan: Plan) -> Divergence:
    """The station differs and no block does by itself: rounding that grows, or the code after the last module."""
    compared = [block for block in blocks if block.error is not None]
    worst = max(compared, key=lambda block: block.error, default=Block("", float("inf"), None))
    if not compared:
        why = "no module bears a name of both sides"
    elif plan.dtype == torch.float64:
        why = "every module agrees: what differs is done before the first or after the last of them"
    else:
        why = "no block differs by more than rounding, which adds up on the way: see what --dtype float64 says"
    return Divergence(title, worst.name, "", worst.name, worst.error, (), (), (), blocks, why)
