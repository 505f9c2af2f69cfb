"""LoRAs on a model: written into its weights, or computed beside its layers; and taken away without a trace.

A LoRA lies on networks, not on a pipeline: each network keeps a stack of those that are on it, and of the weights that
they change as these were before any came. Whatever comes or goes, a changed weight is computed anew from there,

    W = cast(W0 + sum_i weight_i * dW_i)        in float32, for float64 weights in float64

so its bits depend neither on what has been on it, nor on the order in which it came. So two pipelines that share a
network see the same LoRAs, a deep copy has its own, and a network that is put in another's place has none; the one that
left keeps what it has. A weight that somebody else writes meanwhile (`load_state_dict`, an optimiser) keeps what was
written, and a line says so when its stack changes next; what is written past autograd, into `weight.data`, can't be
seen, and is lost then. A LoRA may make FLUX's first layer wider (`ldm.lora.wider`), as long as it is on.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from numbers import Real
from types import SimpleNamespace
from typing import TYPE_CHECKING
from weakref import ref

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ldm import memory
from ldm.errors import LDMError, nearest, say_on_stderr
from ldm.io.folders import some
from ldm.io.weights import all_finite
from ldm.lora.algebra import Change, summed
from ldm.lora.beside import attach
from ldm.lora.file import Lora
from ldm.lora.names import TEXT, TEXT_2, TRANSFORMER, UNET
from ldm.lora.strength import percent, strength, told
from ldm.lora.wider import KEY, Wider, inputs_of, widened

if TYPE_CHECKING:
    from ldm.parts import Parts

PARTS = (UNET, TRANSFORMER, TEXT, TEXT_2)


@dataclass(frozen=True, eq=False)
class Applied:
    """A LoRA that is on, or was: which, at what weight, and how much it changes.

    name       the file's, with a number behind it where another of that name was on already
    merged     written into the weights, or computed beside them
    change     ||dW|| / ||W|| over all that it touches, at its weight: Frobenius norms, W without any LoRA
    layers     the same of each parameter, "unet.mid_block.[...].to_q.weight"
    number     which of those on its networks it was, in the order of their coming
    """

    name: str
    lora: Lora
    weight: float
    merged: bool
    change: float
    layers: Mapping[str, float] = field(repr=False)
    number: int = field(repr=False)

    def __str__(self) -> str:
        how = "merged" if self.merged else "beside the weights"
        return f"{self.name} at {self.weight:g}, {how}: {len(self.layers)} weights changed by {percent(self.change)}"

    __repr__ = __str__

    def __deepcopy__(self, memo: dict) -> "Applied":
        return self  # it never changes: a copied model's LoRAs are found by the same name and object


@dataclass(eq=False)
class Entry:
    """A LoRA on one network: its changes by parameter, and what undoes the hooks of those that aren't merged."""

    applied: Applied
    changes: dict[str, Change]
    handles: list[RemovableHandle] = field(default_factory=list)


class Written:
    """Which parameter a stack wrote, and how often that had been written in place by then."""

    def __init__(self, parameter: nn.Parameter):
        self.parameter, self.version = ref(parameter), version(parameter)

    def __deepcopy__(self, memo: dict) -> "Written":
        parameter = self.parameter()
        if parameter is None:  # another lies in its place
            return self
        copied = Written(memo.get(id(parameter), parameter))  # the copied network's own, whose versions begin anew
        copied.version += self.version - version(parameter)
        return copied


def version(parameter: nn.Parameter) -> int:
    return 0 if parameter.is_inference() else parameter._version  # of those torch counts none


class Stack:
    """What lies on one network, and the weights beneath it."""

    def __init__(self):
        self.entries: list[Entry] = []
        self.untouched: dict[str, Tensor] = {}  # on the CPU: a second copy on a GPU would cost what it has least of
        self.written: dict[str, Written] = {}
        self.wider: Wider | None = None

    def put(self, network: nn.Module, entry: Entry) -> None:
        self.entries.append(entry)
        self.widen(network)
        if entry.applied.merged:
            self.refresh(network, entry.changes)
            return
        for key in entry.changes:  # of the same range as if it were merged
            weight = weight_of(network, key)
            self.summed(key, weight.data, weight, [entry])
        for key, change in entry.changes.items():
            weight = weight_of(network, key)
            exact = torch.promote_types(weight.dtype, torch.float32)
            layer = network.get_submodule(key.rpartition(".")[0])
            entry.handles.append(attach(layer, change.to(weight.device, exact), entry.applied.weight))

    def take(self, network: nn.Module, entry: Entry) -> None:
        self.yield_to_others(network, entry.changes)
        self.entries.remove(entry)
        while entry.handles:
            entry.handles.pop().remove()
        self.refresh(network, entry.changes)
        self.narrow(network)

    def widen(self, network: nn.Module) -> None:
        """Let FLUX's first layer read as much as the widest LoRA's change of it does."""
        inputs = self.inputs()
        if self.wider is None and inputs and inputs > network.x_embedder.weight.shape[1]:
            self.wider = Wider(network, inputs, self.untouched.get(KEY, network.x_embedder.weight.data))
            if KEY in self.untouched:
                self.untouched[KEY] = widened(self.untouched[KEY], inputs)

    def narrow(self, network: nn.Module) -> None:
        """Let it read as much as ever, if no LoRA is left that needs more."""
        if self.wider is not None and self.inputs() <= self.wider.narrow.shape[1]:
            self.wider.undo(network)
            if KEY in self.untouched:
                self.untouched[KEY] = self.wider.narrow
            self.wider = None
            self.refresh(network, [KEY])

    def inputs(self) -> int:
        return inputs_of(each.changes[KEY] for each in self.entries if KEY in each.changes)

    def refresh(self, network: nn.Module, keys: Iterable[str]) -> None:
        """Compute these weights anew from what lies beneath, which comes back where nothing lies on it any more."""
        for key in keys:
            entries = self.merged(key)
            if not entries and key not in self.untouched:
                continue
            weight = network.get_parameter(key)
            if entries:
                if key not in self.untouched:
                    self.untouched[key] = weight.data.cpu()
                weight.data = self.summed(key, self.untouched[key], weight, entries)
                self.written[key] = Written(weight)
            else:
                weight.data = alike(self.untouched[key], weight)
                del self.untouched[key]
                self.written.pop(key, None)

    def merged(self, key: str) -> list[Entry]:
        """What is merged into that weight."""
        return [each for each in self.entries if each.applied.merged and key in each.changes]

    def yield_to_others(self, network: nn.Module, keys: Iterable[str]) -> None:
        """Let those of these weights that somebody else has written lie beneath from now on, and say so on stderr.

        Whether what was written has the LoRAs in it nobody knows: they aren't on it any more.
        """
        theirs = [key for key in keys if key in self.written and not self.is_still(key, network.get_parameter(key))]
        names: dict[str, None] = {}
        for key in theirs:
            del self.written[key], self.untouched[key]
            for each in self.merged(key):
                names[each.applied.name] = each.changes.pop(key) and None
        if theirs:
            said = f"{some(theirs, 2)}: written by something else while {' and '.join(names)} was merged there"
            say_on_stderr(f"{said}; what was written stays, and no LoRA is taken off it.")

    def is_still(self, key: str, weight: nn.Parameter) -> bool:
        """Whether a weight is what was written there, moved or cast, which keeps parameter and version.

        `ldm.memory` puts the same numbers into other parameters: there they are compared, within bfloat16's rounding.
        """
        if self.written[key].parameter() is weight:
            return version(weight) == self.written[key].version
        expected = self.summed(key, self.untouched[key], weight, self.merged(key))
        return bool((weight.data - expected).abs().max() <= 0.01 * expected.abs().max())

    def summed(self, key: str, base: Tensor, weight: Tensor, entries: list[Entry]) -> Tensor:
        """W0 + sum_i weight_i * dW_i, where and as the weight is. Raises LDMError if it is beyond the dtype's range."""
        exact = torch.promote_types(weight.dtype, torch.float32)
        changes = [(each.applied.weight, each.changes[key]) for each in entries]
        total = summed(base.to(weight.device, exact), changes)
        found = torch.empty_like(weight.data).copy_(total)  # of the same layout (channels last)
        if not all_finite(found):
            names = " and ".join(each.applied.name for each in entries)
            dtype = str(weight.dtype).removeprefix("torch.")
            raise LDMError(f"{names} would carry {key} beyond the range of {dtype}: take a smaller weight.")
        return found


def alike(untouched: Tensor, weight: Tensor) -> Tensor:
    """The untouched weight where and as the changed one lies now: the very tensor, if nobody has moved or cast that."""
    now = weight.data
    if (untouched.device, untouched.dtype, untouched.stride()) == (now.device, now.dtype, now.stride()):
        return untouched
    return torch.empty_like(now).copy_(untouched)


# ---------------------------------------------------------------------------------------------------- on and off


def networks_of(pipe: "Parts") -> dict[str, nn.Module]:
    """The networks that LoRAs change."""
    return {part: network for part, network in pipe.parts().items() if part in PARTS}


def stack_of(network: nn.Module) -> Stack:
    """What lies on a network; an empty stack, not yet its own, where nothing does."""
    return vars(network).get("loras") or Stack()


def weight_of(network: nn.Module, key: str) -> Tensor:
    """A parameter; of a layer that is quantised (`ldm.quantised`) its weight, made for this call."""
    layer, _, leaf = key.rpartition(".")
    return getattr(network.get_submodule(layer), leaf)


def beneath(network: nn.Module, key: str) -> Tensor:
    """A weight without any LoRA."""
    kept = stack_of(network).untouched
    return kept[key] if key in kept else weight_of(network, key).data


def refuse_quantised(networks: Mapping[str, nn.Module], changes: Mapping[str, Mapping[str, Change]], name: str) -> None:
    """Raise LDMError for a change of a weight that is no parameter: into its codes nothing can be merged."""
    for part, found in changes.items():
        own = dict(networks[part].named_parameters())
        if quantised := next((key for key in found if key not in own), None):
            raise LDMError(
                f"{name} can't be merged into weights that are quantised, as {part}.{quantised} is: add it before they "
                "are, or beside them (merge=False)."
            )


def loras_on(networks: Iterable[nn.Module]) -> tuple[Applied, ...]:
    """The LoRAs on these networks, in the order of their coming."""
    found = {entry.applied: None for network in networks for entry in stack_of(network).entries}
    return tuple(sorted(found, key=lambda applied: applied.number))


@torch.no_grad()
def add(pipe: "Parts", lora: Lora, weight: float = 1.0, merge: bool = True) -> Applied:
    """Put a LoRA on a pipeline's networks, all of it or, with an LDMError, nothing; say on stderr what it changes."""
    if isinstance(weight, bool) or not isinstance(weight, Real) or not math.isfinite(weight):
        raise LDMError(f"The weight of a LoRA must be a finite number, such as 0.8, not {weight!r}.")
    weight, networks = float(weight), networks_of(pipe)
    memory.send_home(pipe)
    changes = lora.fit(networks)
    if merge:
        refuse_quantised(networks, changes, lora.name)
    for part, found in changes.items():
        stack_of(networks[part]).yield_to_others(networks[part], found)
        changes[part] = {key: change.against(beneath(networks[part], key)) for key, change in found.items()}
    on = loras_on(networks.values())
    sizes = norms(networks, changes)
    number = max((each.number for each in on), default=0) + 1
    applied = Applied(unused(lora.name, on), lora, weight, bool(merge), *strength(sizes, weight), number)
    done: list[tuple[nn.Module, Entry]] = []
    try:
        for part, found in changes.items():
            done.append((networks[part], Entry(applied, found)))
            put(*done[-1])
    except BaseException:  # Ctrl-C, too
        for network, entry in done:
            take(network, entry)
        raise
    say_on_stderr(told(applied))
    if TRANSFORMER in changes and (wider := stack_of(networks[TRANSFORMER]).wider) is not None:
        more = networks[TRANSFORMER].config.channels_in - wider.config.channels_in
        say_on_stderr(
            f"{applied.name}: as long as it is on, the transformer reads {more} more channels of a picture; such "
            "models are drawn with guidance 30 (Canny) or 10 (Depth): pass it (guidance, --guidance)."
        )
    return applied


@torch.no_grad()
def remove(pipe: "Parts", lora: Applied | str) -> None:
    """Take a LoRA off a pipeline's networks. Raises LDMError for one that isn't on."""
    networks = networks_of(pipe)
    on = loras_on(networks.values())
    applied = next((each for each in on if lora is each or lora == each.name), None)
    if applied is None:
        names = [each.name for each in on]
        asked = lora.name if isinstance(lora, Applied) else lora
        have = f"; on are {', '.join(map(repr, names))}" if names else "; none is"
        raise LDMError(f"There is no LoRA {asked!r} on this model{have}.{nearest(str(asked), names)}")
    memory.send_home(SimpleNamespace(parts=lambda: networks))
    done: list[tuple[nn.Module, Entry]] = []
    try:
        for network in networks.values():
            for entry in [each for each in stack_of(network).entries if each.applied is applied]:
                done.append((network, entry))
                take(network, entry)
    except BaseException:
        for network, entry in done:
            take(network, entry)
            put(network, entry)
        raise


def put(network: nn.Module, entry: Entry) -> None:
    stack = network.loras = stack_of(network)
    stack.put(network, entry)


def take(network: nn.Module, entry: Entry) -> None:
    stack = stack_of(network)
    if entry in stack.entries:
        stack.take(network, entry)
    else:  # what broke off in the middle of it
        stack.refresh(network, entry.changes)
        stack.narrow(network)
    if not stack.entries:
        vars(network).pop("loras", None)


def unused(name: str, on: Iterable[Applied]) -> str:
    """The name, or with the first number behind it that makes it another's of none."""
    taken = {each.name for each in on}
    names = (f"{name} ({k})" if k > 1 else name for k in range(1, len(taken) + 2))
    return next(each for each in names if each not in taken)


# ---------------------------------------------------------------------------------------------------- how much


def norms(networks: Mapping[str, nn.Module], changes: Mapping[str, Mapping[str, Change]]) -> dict[str, tuple]:
    """Of each parameter that changes: (||dW||, ||W||), W without any LoRA."""
    sizes = {}
    for part, found in changes.items():
        for key, change in found.items():
            weight = beneath(networks[part], key)
            exact = torch.promote_types(weight.dtype, torch.float32)
            norm = float(torch.linalg.vector_norm(weight, dtype=exact))
            sizes[f"{part}.{key}"] = change.norm(), norm
    return sizes
