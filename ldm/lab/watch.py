"""Look on at a run: attention maps, what every brick put out, what ControlNets added, how far guidance pulls.

    with ldm.watch(pipe) as seen:  # a `Record`
        pipe("a large red house on snow at night", seed=7)
    seen.map(4)  # where the word at position 4 was looked at, over all steps, layers and heads

Nothing of the run changes, not one bit: hooks compute beside it, from the very tensors that pass through it. They are
removed when the block ends, however it ends. Here are the UNet's attention and FLUX's, which sees text and picture in
one softmax; `ldm.lab.record` says what is kept.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from numbers import Real

import torch
from torch import Tensor, nn

from ldm.diffusion import Prediction
from ldm.errors import LDMError
from ldm.lab.maps import EVERY, Key, Maps
from ldm.lab.record import Call, Layer, Record, check_names, stats, within
from ldm.models.blocks import Attention, Context, SpatialTransformer
from ldm.models.flux import DoubleBlock, Flux, FluxResiduals, JointAttention, SingleBlock
from ldm.models.patches import PATCH, rotate
from ldm.models.unet import UNet
from ldm.noise import Noise
from ldm.run import Run
from ldm.sampling import Denoise, Step
from ldm.schedules import Level, Schedule
from ldm.settings import Settings

__all__ = ["Call", "Layer", "Record", "watch"]
# Bricks that hold no others, and stand for themselves.
ENDS = ("conv_in", "conv_out", "final_layer_norm", "x_embedder", "context_embedder")
QUERIES, KEYS = ("norm_added_q", "norm_q"), ("norm_added_k", "norm_k")  # FLUX's: behind them q and k are turned
PATCHES = ".patches"


@contextmanager
def watch(
    pipe: object,
    *,
    layers: str | Sequence[str] | None = None,
    self_attention: bool = False,
    every_part: bool = False,
    parts: Sequence[str] = (),
    memory: float = 512,
) -> Iterator[Record]:
    """Record everything that the pipeline's network, text encoders and VAE do inside the block. May be nested.

    layers           the attention layers whose maps are kept: names or parts of names, such as "up_blocks.1" (None: all
                     of the cross-attention; of FLUX how each block's patches look at the text)
    self_attention   keep those of the self-attention, too; they are large: (h*w)^2 numbers a head. FLUX's are named
                     after their layer, with `.patches` behind it
    every_part       keep the maps of all parts of guidance, not of the conditional one alone
    parts            what a batch holds in a loop or a network of your own, such as ("uncond", "cond"), which nobody
                     else can know; left out, a loop's whole batch is "part 1"
    memory           MiB of maps that are kept on the CPU; what is more is averaged over heads, then over steps
                     (math.inf: nothing is)

    Raises LDMError for what cannot be, and inside the block where even averaged maps don't fit.
    """
    if not isinstance(getattr(pipe, "backbone", None), UNet | Flux) or not hasattr(pipe, "watchers"):
        raise LDMError(f"watch takes a pipeline (ldm.load), not a thing of type {type(pipe).__name__}.")
    if not isinstance(memory, Real) or not memory > 0:
        raise LDMError(f"memory must be a number of MiB above 0, not {memory!r}.")
    if isinstance(parts, str) or not isinstance(parts, Sequence) or not all(isinstance(each, str) for each in parts):
        raise LDMError(
            f"parts are the names of all that a batch holds, in order, such as ('uncond', 'cond') or, of a single one, "
            f"('cond',), not {parts!r}."
        )
    watcher = Watcher(pipe, layers, self_attention, every_part, tuple(parts), memory)
    pipe.watchers.append(watcher)
    try:
        yield watcher.record
    finally:
        pipe.watchers.remove(watcher)
        watcher.close()


@dataclass
class Asked:
    """What a sampler asks of the network just now: its calls until it is answered belong to it."""

    run: int
    step: int
    level: Level
    pictures: int
    size: tuple[int, int]
    parts: tuple[str, ...]  # of guidance, in order; () where the network is the caller's own
    contexts: list[tuple[Context, int]] = field(default_factory=list)  # what was read so far, by how many parts
    calls: list[Call] = field(default_factory=list)


class Watcher:
    """The hooks on a pipeline's modules, and the record that they fill. `ldm.run.Run` calls it with every run."""

    def __init__(
        self,
        pipe: object,
        layers: str | Sequence[str] | None,
        self_attention: bool,
        every_part: bool,
        parts: tuple[str, ...],
        memory: float,
    ):
        self.every_part, self.parts = every_part, parts
        self.runs = 0
        self.asked: Asked | None = None
        self.call: Call | None = None
        self.by_hand: tuple | None = None  # the shape of the last call and its run, where a loop of one's own made it
        self.size = (0, 0)  # of the feature map that attention is at work on
        self.queries: dict[str, Tensor] = {}
        self.keys: dict[str, Tensor] = {}
        self.distilled = pipe.distilled
        self.part = "transformer" if pipe.flux else "unet"
        modules = {f"{self.part}.{name}": module for name, module in pipe.backbone.named_modules()}
        self.record = Record(layers_of(modules), Maps(memory))
        self.chosen = choose_layers(self.record.layers, layers, self_attention)
        self.handles = []
        self._hook_bricks(pipe)
        self._hook_attention(modules)
        self.handles.append(pipe.backbone.register_forward_pre_hook(self._begin, with_kwargs=True))
        # The last one: it closes the call.
        self.handles.append(pipe.backbone.register_forward_hook(self._end, always_call=True))

    def _hook_bricks(self, pipe: object) -> None:
        named = ("text_encoder", *["text_encoder_2"] * pipe.flux, self.part, "vae")
        for part, network in ((name, each) for name, each in pipe.parts().items() if name in named):
            for name, module in network.named_modules(prefix=part):
                if next(module.children(), None) is not None or name.rpartition(".")[2] in ENDS:
                    self.handles.append(module.register_forward_hook(partial(self._brick, name)))

    def _hook_attention(self, modules: Mapping[str, nn.Module]) -> None:
        for name, module in modules.items():
            if isinstance(module, SpatialTransformer):
                self.handles.append(module.register_forward_pre_hook(self._place))
            elif isinstance(module, Attention):
                self.handles.append(module.to_q.register_forward_hook(partial(self._catch, self.queries, name)))
                self.handles.append(module.to_k.register_forward_hook(partial(self._catch, self.keys, name)))
                self.handles.append(module.register_forward_hook(partial(self._attend, name), with_kwargs=True))
            elif isinstance(module, JointAttention):
                for caught, norms in ((self.queries, QUERIES), (self.keys, KEYS)):
                    for norm in (each for each in norms if hasattr(module, each)):
                        catch = partial(self._catch, caught, f"{name}.{norm}")
                        self.handles.append(getattr(module, norm).register_forward_hook(catch))
            elif isinstance(module, DoubleBlock | SingleBlock):
                self.handles.append(module.register_forward_hook(partial(self._attend_jointly, f"{name}.attn")))

    def close(self) -> None:
        """Remove every hook. A run that goes on is no longer recorded."""
        for handle in self.handles:
            handle.remove()

    # ------------------------------------------------------------------------------------------ the loop

    def __call__(self, run: Run) -> Run:
        """The same run, of which the record learns what its sampler asks for."""
        number, step, parts = None, None, () if run.own else parts_of(run.settings, self.distilled)

        def sampler(
            denoise: Denoise, x: Tensor, schedule: Schedule, i: int, history: Sequence[Step], noise: Noise
        ) -> Step:
            nonlocal step
            step = i
            return run.sampler(denoise, x, schedule, i, history, noise)

        def denoise(x: Tensor, level: Level) -> Prediction:
            nonlocal number
            number = self._count() if number is None else number  # not before: a run may never be walked
            asked = self.asked = Asked(number, step, level, len(x), tuple(x.shape[2:]), parts)
            try:
                prediction = run.denoise(x, level)
            finally:
                self.asked = None
            if asked.calls and prediction.cond is not None and prediction.uncond is not None:
                asked.calls[-1].guidance = norms(prediction.cond - prediction.uncond)
            return prediction

        return replace(run, sampler=sampler, denoise=denoise)

    def _count(self) -> int:
        """The number of a run that begins."""
        self.runs += 1
        return self.runs - 1

    def _names(self, asked: Asked, context: Context, count: int) -> tuple[str, ...]:
        """What a batch of `count` parts holds. Parts that run one after the other read contexts of their own."""
        first = 0
        for known, parts in asked.contexts:
            if known is context:  # another tile
                break
            first += parts
        else:
            asked.contexts.append((context, count))
        if not asked.parts and count == len(self.parts):
            return self.parts
        unknown = tuple(f"part {first + k + 1}" for k in range(count))
        return asked.parts[first : first + count] or unknown

    # ------------------------------------------------------------------------------------------ the network

    @torch.no_grad()
    def _begin(self, network: UNet | Flux, args: tuple, kwargs: dict) -> None:
        given = dict(zip(("x", "t", "context", "extras", "residuals"), args, strict=False)) | kwargs
        x, number, asked = given["x"], len(self.record.calls), self.asked
        size = tuple(x.shape[2:])
        if asked is None:
            self.call = self._by_hand(number, x, given["t"])
        else:
            level, tiled = asked.level, size != asked.size
            names = self._names(asked, given["context"], max(len(x) // asked.pictures, 1))
            pictures = len(x) // len(names)
            self.call = Call(number, asked.run, asked.step, level.i, level.t, names, pictures, asked.size, tiled)
            asked.calls.append(self.call)
            self.by_hand = None
        self.record.calls.append(self.call)
        self.size = size
        if (added := given.get("residuals")) is not None:
            if isinstance(added, FluxResiduals):
                found = [*added.double, *added.single]
            else:
                skips, middle, *_ = added  # and an adapter's features, which are not measured
                found = [] if skips is None else [*skips, middle]
            self.call.residuals = torch.stack([norms_of_rows(each) for each in found]) if found else None

    def _by_hand(self, number: int, x: Tensor, t: object) -> Call:
        """A call that no run of ours asked for. Such calls in a row, of one shape, count as the steps of one run."""
        if self.by_hand is None or self.by_hand[0] != x.shape:
            self.by_hand = x.shape, self._count()
        run = self.by_hand[1]
        step = sum(call.run == run for call in self.record.calls)
        parts = self.parts if self.parts and len(x) % len(self.parts) == 0 else ("part 1",)
        times = tuple(map(float, torch.as_tensor(t).flatten().tolist()))
        t = times[0] if len(set(times)) == 1 else times
        return Call(number, run, step, None, t, parts, len(x) // len(parts), tuple(x.shape[2:]))

    @torch.no_grad()
    def _end(self, network: UNet | Flux, args: tuple, output: Tensor | None) -> None:
        call, self.call = self.call, None
        if output is not None and self.asked is None and {"uncond", "cond"} <= set(call.parts):
            said = dict(zip(call.parts, output.chunk(len(call.parts)), strict=True))
            call.guidance = norms(said["cond"] - said["uncond"])

    @torch.no_grad()
    def _brick(self, name: str, module: nn.Module, args: tuple, output: object) -> None:
        output = output[-1] if isinstance(output, list) else output  # a level on the way down gives all it has made
        output = output[0] if isinstance(module, DoubleBlock) else output  # the picture's stream, and not the text's
        if not isinstance(output, Tensor):
            return
        if self.call is not None and within(name, self.part):
            self.call.bricks[name] = stats(name, output)
        else:
            self.record.beside.append(stats(name, output))

    # ------------------------------------------------------------------------------------------ attention

    def _place(self, module: SpatialTransformer, args: tuple) -> None:
        self.size = tuple(args[0].shape[2:])

    def _catch(self, caught: dict[str, Tensor], name: str, module: nn.Module, args: tuple, output: Tensor) -> None:
        if self.call is not None:
            caught[name] = output.detach()

    @torch.no_grad()
    def _attend(self, name: str, module: Attention, args: tuple, kwargs: dict, output: Tensor) -> None:
        if self.call is None:
            return
        q, k = self.queries.pop(name), self.keys.pop(name, None)
        self.record.place(name, self.size)
        if name not in self.chosen or self.call.tiled:
            return
        q = module.split_heads(q)  # (B, heads, N, C/heads)
        context = args[1] if len(args) > 1 else kwargs.get("context")
        k = context[module][0].detach() if isinstance(context, Mapping) else module.split_heads(k)
        k = k.expand(len(q), -1, -1, -1)  # keys of one text may have been prepared for a whole batch
        self._keep(name, q, k, self.size)

    @torch.no_grad()
    def _attend_jointly(self, name: str, block: DoubleBlock | SingleBlock, args: tuple, output: object) -> None:
        """The queries of the picture's patches and the keys of all, as they are turned before they meet."""
        if self.call is None:
            return
        # The text's come first, by norms of their own where it has a stream of its own.
        q, k = (
            torch.cat([caught.pop(f"{name}.{norm}") for norm in norms if f"{name}.{norm}" in caught], dim=1)
            for caught, norms in ((self.queries, QUERIES), (self.keys, KEYS))
        )
        size = tuple(side // PATCH for side in self.size)
        tokens = q.shape[1] - size[0] * size[1]
        for layer, seen in ((name, slice(tokens)), (f"{name}{PATCHES}", slice(tokens, None))):
            self.record.place(layer, size)
            if layer in self.chosen and not self.call.tiled:
                a, b = (rotate(each, args[-1]).transpose(1, 2) for each in (q, k))  # (B, heads, L + N, W_h)
                self._keep(layer, a[:, :, tokens:], b, size, seen)

    def _keep(self, name: str, q: Tensor, k: Tensor, size: tuple[int, int], seen: slice = EVERY) -> None:
        """Keep the maps of the parts that are wanted, of a whole batch's queries and keys."""
        call = self.call
        named = self.asked.parts if self.asked is not None and self.asked.parts else call.parts
        for number, part in enumerate(call.parts):
            if part == "cond" or self.every_part or "cond" not in named:
                rows = slice(number * call.pictures, (number + 1) * call.pictures)
                self.record.maps.add(Key(name, part, call.run, call.number), q[rows], k[rows], size, seen)


def layers_of(modules: Mapping[str, nn.Module]) -> list[Layer]:
    """The attention layers of a network, in its order; of FLUX's each is two: how it sees the text, and the picture."""
    found = []
    for name, module in modules.items():
        if isinstance(module, Attention):
            found.append(Layer(name, module.heads, module.is_cross, None))
        elif isinstance(module, JointAttention):
            found += [Layer(name, module.heads, True, None), Layer(f"{name}{PATCHES}", module.heads, False, None)]
    return found


def choose_layers(known: Sequence[Layer], asked: str | Sequence[str] | None, self_attention: bool) -> set[str]:
    """The names of the layers whose maps are kept. Raises LDMError for a name that no layer has."""
    able = [layer.name for layer in known if layer.cross or self_attention]
    if asked is None:
        return set(able)
    chosen = set()
    for each in check_names("layers", asked):
        found = [name for name in able if within(name, each)]
        if not found:
            hint = "" if self_attention else ", of the self-attention none without ldm.watch(self_attention=True)"
            raise LDMError(f"No attention layer is named {each!r}{hint}: this model has {', '.join(able)}.")
        chosen.update(found)
    return chosen


def parts_of(settings: Settings, distilled: bool) -> tuple[str, ...]:
    """The parts of guidance that `ldm.network` makes for these settings, in its order.

    A `distilled` network is told its guidance, and makes two parts only for FLUX's true guidance.
    """
    if (settings.true_guidance if distilled else settings.guidance) <= 1:
        return ("cond",)
    return ("uncond", "cond") if settings.image_guidance is None else ("uncond", "image", "cond")


def norms_of_rows(x: Tensor) -> Tensor:
    """The length of every row (B, ...) as a vector: (B,), on the CPU, in float32 at least."""
    return x.flatten(1).to(torch.promote_types(x.dtype, torch.float32)).norm(dim=1).cpu()


def norms(x: Tensor) -> tuple[float, ...]:
    return tuple(norms_of_rows(x).tolist())
