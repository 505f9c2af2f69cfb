"""What a picture takes of memory, in every way of running a model, before anything is loaded.

    planned = plan("flux-dev", width=1024, height=1024)
    planned.needs("cuda")                           every way -> bytes of each station, and the most of them
    planned.best("cuda", memory=16 * 2**30)         the first that fits

Weights are counted. Nor is it guessed what is computed beside them: every station is walked through once, on networks
that have shapes and no numbers, and of all tensors that it makes the most that live at one time are counted. Attention
counts as PyTorch's fused kernels do it, which never write the scores out; a convolution with a copy of what it reads,
for kernels lay it out in another way. Not counted are kernels' other needs, and what an allocator keeps for later;
`OVERHEAD` stands for Python, torch and the device's own.
"""

import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ldm import hub
from ldm.checkpoints.architectures import ARCHITECTURES
from ldm.checkpoints.checkpoint import NETWORKS, backbone_of, blank_part, family_defaults
from ldm.checkpoints.places import INDEX, embedded, find_model
from ldm.errors import LDMError, nearest
from ldm.memory import asked_once, blocks_of, own_tensors
from ldm.models.flux import Flux
from ldm.models.patches import rotary_table
from ldm.models.unet import Extras, UNet
from ldm.quantised import GROUP, USUAL, layers_of
from ldm.text.t5 import T5Encoder

CLIP_TOKENS = 77
OVERHEAD = {"cpu": 500 * 10**6, "cuda": 600 * 10**6}  # torch in a process; what CUDA takes before the first tensor
SCALE = 4 / GROUP  # bytes of a quantised weight's share in its group's scale


class Way(NamedTuple):
    """A way to run a model: the options of `ldm generate` for it, and what they mean."""

    name: str
    dtype: torch.dtype
    options: str
    by: str = ""  # "parts", "blocks"; "files": all stay there, and what computes reads them there
    bits: int = 0  # of the quantised weights


FULL = Way("float32, all there", torch.float32, "--dtype float32")
HALF = Way("bfloat16, all there", torch.bfloat16, "--dtype bfloat16")
PARTS = Way("bfloat16, parts in turn", torch.bfloat16, "--dtype bfloat16 --offload parts --mapped", "parts")
EIGHT = Way("8 bits, parts in turn", torch.bfloat16, f"{PARTS.options} --quantise int8", "parts", 8)
FOUR = Way("4 bits, parts in turn", torch.bfloat16, f"{PARTS.options} --quantise int4", "parts", 4)
BLOCKS = Way("bfloat16, block by block", torch.bfloat16, "--dtype bfloat16 --offload blocks --mapped", "blocks")
# From the first choice to the last, by how fast and how exact they are. Two bytes are what large networks are published
# in; many a processor is slow at them. A processor needs nothing brought to it: there the files are read in place.
WAYS = {
    "cuda": (HALF, PARTS, EIGHT, FOUR, BLOCKS, FULL),
    "cpu": (
        FULL,
        HALF,
        Way("8 bits, all there", torch.bfloat16, "--dtype bfloat16 --quantise int8", "", 8),
        Way("4 bits, all there", torch.bfloat16, "--dtype bfloat16 --quantise int4", "", 4),
        Way("bfloat16, read in its files", torch.bfloat16, "--dtype bfloat16 --mapped", "files"),
    ),
}


class Count(NamedTuple):
    """The numbers of a part's weights: all; those of the matrices that may be quantised, and of the largest of them;
    of FLUX's modulations, and of the largest of them; of the largest block that is brought in one piece."""

    all: int
    matrices: int
    largest_matrix: int
    modulations: int
    largest_modulation: int
    block: int


class Need(NamedTuple):
    """Bytes of the device at each station, and the most of them."""

    stations: dict[str, int]
    peak: int


@dataclass(frozen=True)
class Planned:
    """A model, counted. `computed`: by dtype and part the bytes of what is computed beside the weights."""

    model: str
    width: int
    height: int
    batch: int
    steps: int
    guided: bool
    counts: Mapping[str, Count]
    computed: Mapping[torch.dtype, Mapping[str, int]]

    def needs(self, device: str) -> dict[Way, Need]:
        """What each way of that device takes there."""
        return {way: self.need(way, device) for way in WAYS[device]}

    def need(self, way: Way, device: str) -> Need:
        """What one way takes on the device."""
        whole = sum(self.weights(name, way) for name in self.counts)
        stations = {}
        for name in self.counts:
            there = self.weights(name, way) if way.by else whole
            stations[name] = there + self.computed[way.dtype][name] + self.beside(name, way) + OVERHEAD[device]
        return Need(stations, max(stations.values()))

    def weights(self, name: str, way: Way) -> int:
        """Bytes of a part's weights on the device while it is at work."""
        count, size = self.counts[name], way.dtype.itemsize
        if way.by == "files":
            return 0
        if way.by == "blocks":
            return count.block * size
        numbers = count.all - (count.modulations - count.largest_modulation if way.by == "parts" else 0)
        if way.bits and name in USUAL:
            return (numbers - count.matrices) * size + int(count.matrices * (way.bits / 8 + SCALE))
        return numbers * size

    def beside(self, name: str, way: Way) -> int:
        """Bytes of the one matrix that is made whole again, where they are quantised."""
        return self.counts[name].largest_matrix * way.dtype.itemsize if way.bits and name in USUAL else 0

    def host(self, way: Way) -> int:
        """Bytes that lie in the processor's memory, for the device to take: what was quantised, and is in no file."""
        if not way.bits or not way.by:
            return 0
        each = way.bits / 8 + SCALE
        return int(sum(count.matrices * each for name, count in self.counts.items() if name in USUAL))

    def best(self, device: str, memory: int) -> Way | None:
        """The first of the device's ways that fits; None where none does."""
        return next((way for way, need in self.needs(device).items() if need.peak <= memory), None)


# ------------------------------------------------------------------------------------------------ the plan


def plan(
    model: str, width: int | None = None, height: int | None = None, batch: int = 1, steps: int | None = None
) -> Planned:
    """Count a model: an architecture's name (flux-dev, sdxl), an embedded model, a folder, a file, or one of the hub
    that is here. What is left out is the model's own default. Raises LDMError for what is none of them, or no size.
    """
    configs, defaults = describe(model)
    networks = {name: blank_part(name, config) for name, config in configs.items()}
    backbone, vae = networks.get("transformer") or networks["unet"], networks["vae"]
    side = vae.config.factor * (getattr(backbone.config, "sample_size", None) or (128 if is_flux(backbone) else 64))
    width, height = width or defaults.width or side, height or defaults.height or side
    unit = 2 * vae.config.factor
    if width % unit or height % unit:
        raise LDMError(f"Width and height must be multiples of {unit}, not {width}x{height}.")
    told = backbone.config.guidance_embeds if is_flux(backbone) else backbone.config.time_cond_proj_dim is not None
    guided, steps = defaults.guidance > 1 and not told, steps or defaults.steps
    rows, tokens = batch * (1 + guided), defaults.max_sequence_length or CLIP_TOKENS
    shape = vae.latent_shape(height, width)
    computed = {
        dtype: {name: beside_weights(networks, name, dtype, (batch, rows, *shape), tokens, steps) for name in networks}
        for dtype in (torch.float32, torch.bfloat16)
    }
    counts = {name: count(network) for name, network in networks.items()}
    return Planned(model, width, height, batch, steps, guided, counts, computed)


def is_flux(network: nn.Module) -> bool:
    return isinstance(network, Flux)


def describe(model: str) -> tuple[dict[str, Any], Any]:
    """The configurations of a model's parts, in the road's order, and its defaults; no weight is read, none fetched."""
    on_hub = hub.parse(model) is not None and hub.local(model, None, False) is not None
    if model in embedded() or Path(model).exists() or on_hub:
        from ldm.loading import open_checkpoint  # whoever asks for an architecture needs none of it

        found = open_checkpoint(find_model(model, INDEX), None, "transformers", False)
        return {name: found.configs[name] for name in NETWORKS if name in found.configs}, found.defaults
    if model not in ARCHITECTURES:
        raise LDMError(
            f"There is no model {model!r} here to be counted, and no architecture of that name "
            f"({', '.join(ARCHITECTURES)}).{nearest(model, [*embedded(), *ARCHITECTURES])}"
        )
    parts = ARCHITECTURES[model].parts
    configs = {name: kind.config.from_json(parts[name]) for name, kind in NETWORKS.items() if name in parts}
    return configs, family_defaults(backbone_of(configs))


def count(network: nn.Module) -> Count:
    """The numbers of a network, of shapes alone."""
    late = [size(linear) for linear in asked_once(network)]
    matrices = [linear.weight.numel() for _, _, linear in layers_of(network)]
    pieces = [sum(size(each.module, False) for each in needs) for needs in blocks_of(network).values()]
    return Count(
        size(network), sum(matrices), max(matrices, default=0), sum(late), max(late, default=0), max(pieces, default=0)
    )


def size(module: nn.Module, inside: bool = True) -> int:
    """How many numbers a module holds."""
    tensors = (*module.parameters(), *module.buffers()) if inside else [each for _, each in own_tensors(module)]
    return sum(each.numel() for each in tensors)


# ------------------------------------------------------------------------------------------------ its stations


def beside_weights(
    networks: Mapping[str, nn.Module], name: str, dtype: torch.dtype, shape: tuple, tokens: int, steps: int
) -> int:
    """Bytes that a part's station takes beside its weights; `shape`: pictures, rows of the loop, C, h, w."""
    network, like, (batch, rows, *latent) = networks[name].to(dtype), {"device": "meta", "dtype": dtype}, shape
    if name == "vae":
        return live(network, partial(network.decode, torch.empty(batch, *latent, **like)))
    if name.startswith("text_encoder"):
        return live(network, reads(network, rows, tokens))
    # One step is walked through; of the other steps the modulations' vectors are kept.
    vectors = sum(linear.out_features for linear in asked_once(network))
    kept = (steps - 1) * rows * vectors * dtype.itemsize
    return kept + live(network, draws(network, (rows, *latent), tokens, like))


def reads(encoder: nn.Module, rows: int, tokens: int) -> Callable[[], object]:
    """A text encoder reading so many prompts."""
    length = tokens if isinstance(encoder, T5Encoder) else encoder.config.max_position_embeddings
    ids = torch.zeros(rows, length, dtype=torch.long, device="meta")
    return lambda: encoder.context(ids)


def draws(network: UNet | Flux, shape: tuple, tokens: int, like: dict) -> Callable[[], object]:
    """A step of the loop, with what is prepared for it; x and x0 are held beside."""
    rows, _, *sides = shape
    config = network.config
    if is_flux(network):
        x = torch.empty(rows, config.channels_in, *sides, **like)
        context = torch.empty(rows, tokens, config.joint_attention_dim, **like)
        guidance = torch.empty(rows, **like) if config.guidance_embeds else None
        extras = Extras(pooled=torch.empty(rows, config.pooled_projection_dim, **like), guidance=guidance)
    else:
        x = torch.empty(rows, config.in_channels, *sides, **like)
        context = torch.empty(rows, CLIP_TOKENS, config.cross_attention_dim, **like)
        extras = told_to(network, rows, like)

    def draw() -> object:
        held = [torch.empty(shape, device="meta") for _ in range(2)]  # in float32
        prepared = network.prepare(context, extras, [1000.0])
        return network(x, 1000.0, prepared, extras), held

    return draw


def told_to(unet: UNet, rows: int, like: dict) -> Extras:
    """What else a UNet is told."""
    config, pooled, ids = unet.config, None, None
    if config.is_xl:
        width, numbers = config.projection_class_embeddings_input_dim, config.addition_time_embed_dim
        pooled = torch.empty(rows, width - 6 * numbers, **like)  # a refiner's is wider, and its numbers are 5
        ids = torch.empty(rows, 6, **like)
    labels = None if config.num_class_embeds is None else torch.zeros(rows, dtype=torch.long, device="meta")
    scale = None if config.time_cond_proj_dim is None else torch.empty(rows, config.time_cond_proj_dim, **like)
    return Extras(pooled, ids, labels, scale)


@torch.no_grad()
def live(network: nn.Module, call: Callable[[], object]) -> int:
    """The most bytes that tensors made by a call hold at one time; what it returns is held to its end."""
    rotary_table.cache_clear()  # what is kept from a call before would cost nothing
    with Fused(), Live(network) as seen:
        call()
    rotary_table.cache_clear()
    return seen.most


class Fused(TorchFunctionMode):
    """Attention as the fused kernels do it: what goes in and what comes out."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is F.scaled_dot_product_attention:
            q, _, v, *_ = args
            return q.new_empty(*q.shape[:-1], v.shape[-1])
        return function(*args, **(kwargs or {}))


class Live(TorchDispatchMode):
    """Counts the storages that operations make, for as long as anybody has them."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.now = self.most = 0
        self.known = {id(tensor.untyped_storage()) for tensor in (*network.parameters(), *network.buffers())}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor) and tensor.is_meta:  # small tables are made on the CPU, and sent
                self.see(tensor.untyped_storage())
        if function is torch.ops.aten.convolution.default:
            self.most = max(self.most, self.now + args[0].nbytes + args[1].nbytes)
        return made

    def see(self, storage: torch.UntypedStorage) -> None:
        number, size = id(storage), storage.nbytes()
        if number not in self.known:
            self.known.add(number)
            self.now += size
            self.most = max(self.most, self.now)
            weakref.finalize(storage, self.forget, number, size)

    def forget(self, number: int, size: int) -> None:
        self.known.discard(number)
        self.now -= size
