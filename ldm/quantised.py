"""Weights of 8 or 4 bits: a half or a quarter of the memory of bfloat16, and no longer quite the model that it was.

    quantise(pipe, bits=8)                              the transformer's blocks and T5's, before it is offloaded
    quantise(pipe, bits=4, parts=["transformer"])
    memory.offload(pipe, "cuda", by="parts")            then, if at all

Only the large matrices of the blocks are written in fewer bits: embeddings, norms, biases, the last layer and FLUX's
modulations, which are asked once a run, stay as they are, and so does what is computed in: a matrix is made whole again
for each call. Of each group of 64 weights that follow each other in a row, the largest magnitude s is kept (float32),
and of each weight w the number of the entry of a table that is nearest to w / s:

    w' = s * table[code]        8 bits: -127/127 ... 127/127, in even steps
                                4 bits: the 16 levels of NF4, narrow about 0, where most weights are

So |w - w'| is at most half the step of the table about w / s, times s: for 8 bits s/254 (and a hundredth of that, as
the library rounds), for 4 bits 0.152 s where the steps are widest, behind -1, and 0.04 s about 0. With the scales a
weight takes 8.5 and 4.5 bits. `dequantised` is this formula; what runs is the library's, the same to the last bit.

NF4: Dettmers et al. 2023 (QLoRA), appendix E. The library, for CPU and CUDA, is bitsandbytes.
"""

import logging
from collections.abc import Iterator, Sequence
from functools import cache
from types import ModuleType
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.errors import LDMError, bytes_in_words, nearest, say_on_stderr
from ldm.memory import Parts, asked_once
from ldm.models.blocks import TransformerBlock
from ldm.models.flux import DoubleBlock, SingleBlock
from ldm.text import clip, t5

GROUP = 64  # weights that share a scale
BITS = (8, 4)
USUAL = ("transformer", "unet", "text_encoder_2")  # the large parts, of those that a model has
BLOCKS = (DoubleBlock, SingleBlock, TransformerBlock, t5.Block, clip.Layer)
# The most that a weight may move, in scales of its group: half a step of the table (and the library's rounding).
BOUND = {8: 0.505 / 127, 4: 0.152}


class Done(NamedTuple):
    """How many layers of a part were quantised, and the bytes of the part before and after."""

    part: str
    layers: int
    before: int
    after: int


class QuantisedLinear(nn.Module):
    """`nn.Linear` whose weight is held in 8 or 4 bits: its codes, and the scales of their groups."""

    def __init__(self, linear: nn.Linear, bits: int):
        super().__init__()
        functional = library().functional
        self.bits, self.dtype = bits, linear.weight.dtype
        self.out_features, self.in_features = linear.weight.shape
        weight = linear.weight.detach().float().contiguous()
        if bits == 8:
            codes, state = functional.quantize_blockwise(weight, code=table(8, weight.device), blocksize=GROUP)
        else:
            codes, state = functional.quantize_4bit(weight, blocksize=GROUP, quant_type="nf4")
        self.register_buffer("codes", codes)  # uint8: of 8 bits (out, in), of 4 bits two to a byte
        self.register_buffer("scales", state.absmax)  # (out * in / 64,) float32
        self.bias = linear.bias

    @property
    def weight(self) -> Tensor:
        """(out, in) in the type that the weight had, made for this call."""
        functional, scales = library().functional, self.scales.float()
        shape = torch.Size((self.out_features, self.in_features))
        code = table(self.bits, self.codes.device)
        if self.bits == 8:
            state = functional.QuantState(absmax=scales, code=code, blocksize=GROUP, dtype=self.dtype)
            return functional.dequantize_blockwise(self.codes, state)
        state = functional.QuantState(scales, shape, code, GROUP, quant_type="nf4", dtype=self.dtype)
        return functional.dequantize_4bit(self.codes, state)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bits={self.bits}"


def dequantised(layer: QuantisedLinear) -> Tensor:
    """The layer's weight by the formula above, with nothing but torch: (out, in)."""
    codes = layer.codes.reshape(-1)
    if layer.bits == 4:
        codes = torch.stack([codes >> 4, codes & 15], dim=1).reshape(-1)  # the first of two is the upper half
    count = layer.out_features * layer.in_features
    values = table(layer.bits, codes.device)[codes[:count].long()]
    scales = layer.scales.float().repeat_interleave(GROUP)[:count]
    return (scales * values).view(layer.out_features, layer.in_features).to(layer.dtype)


@cache  # on each device once: sent at every call, it would be waited for
def table(bits: int, device: torch.device = torch.device("cpu")) -> Tensor:
    """What the codes stand for, times the scale: 256 or 16 numbers from -1 to 1."""
    functional = library().functional
    levels = functional.create_linear_map(True, 8) if bits == 8 else functional.get_4bit_type("nf4", device="cpu")
    return levels.to(device)


@torch.no_grad()
def quantise(pipe: Parts, bits: int = 8, parts: Sequence[str] | None = None) -> list[Done]:
    """Write the blocks' weights of these parts (left out: the large ones it has) in 8 or 4 bits, one after the other.

    It stays so: the weights that they were are gone, `ldm.load` has them. A LoRA is merged before: none can be merged
    into what is quantised, none be taken off it. Says on stderr what each part takes now. Raises LDMError, and changes
    nothing, where the library isn't there, for another number of bits, a part that the model doesn't have, one that is
    quantised already, a LoRA that isn't merged, or a pipeline that is offloaded.
    """
    networks = pipe.parts()
    check(pipe, networks, bits, parts)
    library()
    done = []
    for name in USUAL if parts is None else parts:
        if name not in networks:
            continue
        network = networks[name]
        before, layers = held(network), list(layers_of(network))
        for parent, child, linear in layers:
            setattr(parent, child, QuantisedLinear(linear, bits))
        done.append(Done(name, len(layers), before, held(network)))
        sizes = f"{bytes_in_words(done[-1].before)} became {bytes_in_words(done[-1].after)}"
        say_on_stderr(f"{name}: {len(layers)} layers in {bits} bits, {sizes}.")
    return done


def check(pipe: Parts, networks: dict[str, nn.Module], bits: int, parts: Sequence[str] | None) -> None:
    """Refuse what can't be quantised."""
    if bits not in BITS or isinstance(bits, bool):
        raise LDMError(f"Weights are quantised to {' or '.join(map(str, BITS))} bits, not to {bits!r}.")
    chosen = [name for name in USUAL if name in networks] if parts is None else list(parts)
    for name in chosen:
        if name not in networks:
            raise LDMError(f"There is no part {name!r} to quantise: {', '.join(networks)}.{nearest(name, networks)}")
        if is_quantised(networks[name]):
            raise LDMError(f"The {name} is quantised already: load the model anew to quantise it otherwise.")
        if not list(layers_of(networks[name])):
            raise LDMError(f"The {name} has no blocks of large matrices to quantise: leave it out of the parts.")
    if pipe.where is not None:
        raise LDMError("The pipeline is offloaded: quantise it first, and then offload it (ldm.memory.restore).")
    if beside := [each.name for each in getattr(pipe, "loras", ()) if not each.merged]:
        raise LDMError(f"The LoRA {beside[0]!r} lies beside the weights: merge it (merge=True), and then quantise.")


def is_quantised(network: nn.Module) -> bool:
    """Whether layers of a network are held in fewer bits: then no LoRA can be merged into it or taken off it."""
    return any(isinstance(module, QuantisedLinear) for module in network.modules())


def layers_of(network: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Linear]]:
    """The matrices of the blocks: each layer with its name in the module that holds it."""
    kept = asked_once(network)
    for block in network.modules():
        if isinstance(block, BLOCKS):
            for parent in block.modules():
                for child, linear in parent.named_children():
                    if type(linear) is nn.Linear and linear not in kept:
                        yield parent, child, linear


def held(network: nn.Module) -> int:
    """Bytes of a network's parameters and buffers."""
    return sum(tensor.nbytes for tensor in (*network.parameters(), *network.buffers()))


@cache
def library() -> ModuleType:
    """bitsandbytes. Raises LDMError where it isn't installed."""
    log = logging.getLogger("bitsandbytes.backends.cpu.ops")  # it misses a package that we don't use, and warns of it
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        import bitsandbytes
    except ImportError as error:
        raise LDMError(
            'Weights of 8 or 4 bits need bitsandbytes: python -m pip install "ldm-from-scratch[quantise]".'
        ) from error
    finally:
        log.setLevel(level)
    return bitsandbytes
