"""Switches for little memory, each beside the plain path, and what each costs.

    memory.offload(pipe, "cuda")                  only the part at work is on the device: the UNet while the loop runs
    memory.offload(pipe, "cuda", by="blocks")     only the block at work: the least memory, and the slowest
                                                  (`ldm.load(..., mapped=True)`: both straight from the files)
    memory.restore(pipe)                          everything as it was before
    memory.slice_attention(pipe, 512)             512 positions look at once
    memory.slice_vae(pipe)                        the VAE takes one picture of a batch after the other
    memory.channels_last(pipe)                    convolutions see a position's channels side by side
    memory.send_home(pipe)                        before weights are changed while it is offloaded

A `pipe` is whatever has `parts()` (name -> module) and, to be offloaded, an attribute `where`: an `ldm.Pipeline`.
Tiles (`Pipeline.decode(x0, tile=512)`, `ldm.tiles`) bound the VAE's memory for one large picture; weights in bfloat16
(`ldm.load(dtype="bfloat16")`) halve that of the model.
`python tests/measure_memory.py` measures all of this.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from ldm.errors import LDMError, say_on_stderr
from ldm.io.weights import Mapped
from ldm.models.blocks import Attention, Downsample, ResnetBlock, TimestepMLP, TransformerBlock, Upsample
from ldm.models.flux import DoubleBlock, Modulation, SingleBlock
from ldm.models.vae import VAE
from ldm.text import t5
from ldm.text.clip import Layer, TextEmbeddings, VisionEmbeddings

# What is brought to the device in one piece when a model is offloaded by blocks; what lies outside them comes alone.
# The embeddings are here because they read a weight of a module inside them without calling it.
BLOCKS = (
    ResnetBlock, TransformerBlock, Attention, Downsample, Upsample, TimestepMLP, Layer, TextEmbeddings,
    VisionEmbeddings, DoubleBlock, SingleBlock, t5.Block,
)  # fmt: skip


class Parts(Protocol):
    """What the switches ask of a pipeline."""

    where: torch.device | None  # where is computed, if the parts are not kept there

    def parts(self) -> Mapping[str, nn.Module]: ...


# ---------------------------------------------------------------------------------------------------- piece by piece


def slice_attention(pipe: Parts, rows: int | None = 512, others: Sequence[nn.Module] = ()) -> None:
    """Let `rows` positions at a time look at all others, in the UNet, the VAE and `others` (ControlNets); None: all.

    It bounds the scores, (B, heads, N, N) numbers, to (B, heads, rows, N) where they are written out. PyTorch's fused
    attention, which is what runs on CPUs and on most GPUs, never writes them out: there slicing gains nothing and costs
    a little time. It is for where PyTorch falls back to its plain `math` kernel: float64 on CUDA, some older GPUs,
    Apple's. The numbers are those of the whole within rounding: a kernel may add in another order.
    """
    if rows is not None and (not isinstance(rows, int) or isinstance(rows, bool) or rows < 1):
        raise LDMError(f"Attention is sliced into a whole number of rows, 1 or more (None: not at all), not {rows!r}.")
    for part in (*pipe.parts().values(), *others):
        for module in part.modules():
            if isinstance(module, Attention):
                module.rows = rows


def slice_vae(pipe: Parts, on: bool = True) -> None:
    """Let the VAE take the pictures of a batch one after the other: the memory of one, and each as if it were alone.

    Bit for bit what the VAE makes of each alone; within rounding what it makes of the batch, for which a convolution
    may add in another order.
    """
    for part in pipe.parts().values():
        if isinstance(part, VAE):
            part.one_by_one = on


# ---------------------------------------------------------------------------------------------------- layout


def channels_last(pipe: Parts, on: bool = True, others: Sequence[nn.Module] = ()) -> None:
    """Lay the convolutions' weights out with the channels last; what flows through the UNet and the VAE follows them.

    The shapes stay as they are, the strides change; attention reads such a feature map as (B, N, C) without a copy.
    The numbers are the same within rounding. Faster on CPUs and for half precision on tensor cores; on CUDA PyTorch's
    GroupNorm returns the ordinary layout, so every convolution converts its input. `on=False` undoes it.
    """
    send_home(pipe)
    for part in (*pipe.parts().values(), *others):
        part.to(memory_format=torch.channels_last if on else torch.contiguous_format)


# ---------------------------------------------------------------------------------------------------- offloading


def offload(
    pipe: Parts, device: str | torch.device, by: str = "parts", others: Sequence[nn.Module] = (), pin: bool = True
) -> None:
    """Keep the weights on the CPU, and bring to `device` what is at work: `by` "parts" or "blocks". Bit for bit equal.

    parts     A text encoder, the UNet or transformer, or the VAE comes whole when it begins, and leaves when another
              begins. Decoding between steps therefore swaps UNet and VAE every time. `others`, ControlNets, stay
              beside the UNet (one that is not named here is left on the device where it was loaded to).
    blocks    A ResNet block, a transformer block or a layer comes for the one call and leaves after it, and so in every
              step: memory for the largest block, and the time to send the whole model once a step.

    FLUX's modulations, a quarter of its weights, come for the one call either way: `Flux.prepare` asks them once, for
    all steps of a run, and after it they are not there. (A sampler that asks between two rows calls them again.)

    The weights on the CPU stay there all the while, and copies go; so nothing is sent back, and a run that breaks off,
    with an error or with Ctrl-C, leaves the weights whole. For CUDA they are moved to page-locked memory, from which
    they are sent faster, unless `pin` is False; what `ldm.load(..., mapped=True)` left in its files stays there, and is
    read from the disk whenever it comes, or from what the system still has of it. By parts, the last part stays on the
    device when a run has ended, and a weight that is changed there (a LoRA put in) is forgotten with its copy: call
    `send_home` first. Not for training.

    Raises LDMError for another `by`.
    """
    if by not in ("parts", "blocks"):
        raise LDMError(f"A pipeline is offloaded by parts or by blocks, not by {by!r}.")
    restore(pipe)
    device = torch.device(device)
    named = dict(pipe.parts())
    loop = [*(named.pop(name) for name in ("unet", "transformer") if name in named), *others]
    stage = Stage(device, [*([part] for part in named.values()), loop])
    pin = pin and device.type == "cuda"
    for part in stage.origins:
        part.to("cpu")
        pin = pin and pin_memory(part)
        brief = asked_once(part)
        for module, needs in (whole_part(part) if by == "parts" else blocks_of(part)).items():
            module.forward = AtWork(module.forward, stage, needs, part, leave=by == "blocks" or module in brief)
    pipe.where = device


def restore(pipe: Parts) -> None:
    """Undo `offload`: every part, the `others` too, is back where it was before. Without one it does nothing."""
    for stage in stages_of(pipe):
        stage.clear()
        for part, origin in stage.origins.items():
            for module in part.modules():
                vars(module).pop("forward", None)
            part.to(origin)
    pipe.where = None


def send_home(pipe: Parts) -> None:
    """Empty the device of an offloaded pipeline's weights until it is used again: now they may be changed."""
    for stage in stages_of(pipe):
        stage.clear()


def is_offloaded(module: nn.Module) -> bool:
    """Whether a part, or a ControlNet beside it, is brought to the device by `offload` when it is at work."""
    return any(isinstance(vars(each).get("forward"), AtWork) for each in module.modules())


def stages_of(pipe: Parts) -> list["Stage"]:
    """The one stage of an offloaded pipeline; several, if its parts were offloaded with others."""
    found: dict[Stage, None] = {}
    for part in pipe.parts().values():
        for module in part.modules():
            at_work = vars(module).get("forward")
            if isinstance(at_work, AtWork):
                found[at_work.stage] = None
    return list(found)


class Weights:
    """A module's own parameters and buffers: at home on the CPU, or on the device as copies while it works."""

    def __init__(self, module: nn.Module):
        self.module = module
        self.homes: dict[str, Tensor] = {}  # what has copies on the device just now

    def come(self, device: torch.device) -> None:
        for name, home in own_tensors(self.module):
            self.homes[name] = home  # noted first: `go` mends whatever is broken off from here on
            setattr(self.module, name, sent(home, device))

    def go(self) -> None:
        while self.homes:
            name, home = next(reversed(self.homes.items()))
            setattr(self.module, name, home)
            del self.homes[name]


class Stage:
    """The device, and which parts are on it. `groups` of parts work together; another group's beginning ends theirs."""

    def __init__(self, device: torch.device, groups: Sequence[Sequence[nn.Module]]):
        self.device = device
        self.groups = {part: k for k, group in enumerate(groups) for part in group}
        self.origins = {part: next(part.parameters()).device for part in self.groups}
        self.present: dict[nn.Module, list[Weights]] = {}

    def enter(self, part: nn.Module, weights: list[Weights]) -> None:
        if part in self.present:
            return
        for other in [other for other in self.present if self.groups[other] != self.groups[part]]:
            self.leave(other)
        self.present[part] = weights
        for each in weights:
            each.come(self.device)

    def leave(self, part: nn.Module) -> None:
        for each in self.present[part]:
            each.go()
        del self.present[part]

    def clear(self) -> None:
        for part in list(self.present):
            self.leave(part)


class AtWork:
    """Stands in the place of a module's `forward`: what it `needs` comes before, and by blocks leaves after.

    Not a pair of hooks, for those are passed over when Ctrl-C comes between them.
    """

    def __init__(self, forward: Callable, stage: Stage, needs: list[Weights], part: nn.Module, leave: bool):
        self.forward, self.stage, self.needs, self.part, self.leave = forward, stage, needs, part, leave

    def __call__(self, *args, **kwargs):
        return self.block(args, kwargs) if self.leave else self.whole(args, kwargs)

    def block(self, args: tuple, kwargs: dict) -> object:
        # What an outer block has brought stays until that is done.
        missing = [each for each in self.needs if not each.homes]
        try:
            for each in missing:
                each.come(self.stage.device)
            return self.forward(*args, **kwargs)
        finally:
            for each in missing:
                each.go()

    def whole(self, args: tuple, kwargs: dict) -> object:
        try:
            self.stage.enter(self.part, self.needs)
            return self.forward(*args, **kwargs)
        except BaseException:  # Ctrl-C, too
            self.stage.clear()
            raise


def own_tensors(module: nn.Module) -> list[tuple[str, Tensor]]:
    """Name and tensor of what the module itself holds, not of what its children do."""
    return [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]


def sent(home: Tensor, device: torch.device) -> Tensor:
    """A copy of a weight on the device; the weight itself, if it is there and not in a file."""
    # Nobody waits: the weight at home lives on, unchanged.
    copy = home.detach().to(device, non_blocking=True, copy=isinstance(home, Mapped))
    return nn.Parameter(copy, requires_grad=False) if isinstance(home, nn.Parameter) else copy


def whole_part(part: nn.Module) -> dict[nn.Module, list[Weights]]:
    """Every module at which the part's work may begin (`UNet.prepare` never calls the UNet itself): it needs all."""
    brief = asked_once(part)
    own = {module: Weights(module) for module in part.modules() if own_tensors(module)}
    every = [weights for module, weights in own.items() if module not in brief]
    needs = {module: every for module in part.modules() if next(module.parameters(), None) is not None}
    return needs | {module: [own[module]] for module in brief}


def asked_once(part: nn.Module) -> set[nn.Module]:
    """The layers that only `prepare` calls: FLUX's modulations."""
    return {each.linear for each in part.modules() if isinstance(each, Modulation)}


def blocks_of(part: nn.Module) -> dict[nn.Module, list[Weights]]:
    """What is called -> what it needs: a block all that is inside it, and any other module what is its own."""
    brief = asked_once(part)
    own = {module: Weights(module) for module in part.modules() if own_tensors(module)}
    needs = {module: [weights] for module, weights in own.items()}
    for block in part.modules():
        if isinstance(block, BLOCKS):
            needs[block] = [own[module] for module in block.modules() if module in own and module not in brief]
    return needs


def pin_memory(part: nn.Module) -> bool:
    """Move a part's weights to page-locked memory, one at a time; False, with a line on stderr, if there is too little.

    Those that lie in their files stay there. What was moved before that stays there: it serves as well.
    """
    for module in part.modules():
        for name, tensor in own_tensors(module):
            if isinstance(tensor, Mapped):
                continue
            try:
                pinned = tensor.detach().pin_memory()
            except RuntimeError as error:
                say_on_stderr(
                    f"Not all weights fit into page-locked memory, so they are sent more slowly ({str(error)[:100]})."
                )
                return False
            is_parameter = isinstance(tensor, nn.Parameter)
            setattr(module, name, nn.Parameter(pinned, tensor.requires_grad) if is_parameter else pinned)
    return True
