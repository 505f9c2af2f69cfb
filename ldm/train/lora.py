"""Train a LoRA: teach a finished model a style by a small change beside each of its layers, and change nothing else.

    y = W x + (alpha / rank) * up(down(x)),  up = 0 and down random at the start        (Hu et al. 2021, section 4.1)

The first step starts from the finished model's own answers. The pictures show the style, and their captions don't name
it: so it is the LoRA that brings it, to whatever is asked for. The loss is the UNet's own (`ldm.train.unet`).
"""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from ldm import scenes
from ldm.checkpoints.places import LORA as FILE
from ldm.errors import LDMError, nearest
from ldm.io.folders import folder_hash
from ldm.io.weights import save_weights
from ldm.lora.algebra import LowRank
from ldm.lora.applied import attach
from ldm.train.common import EMA, Optimizer, Run, step_generator, trapezoid
from ldm.train.examples import Examples, encode, of_scenes, open_base, scenes_with, unstyled
from ldm.train.parallel import leads, share
from ldm.train.unet import draw, draw_batch, held_out_loss, loss

# Endings of the names of the layers that get factors. A style is texture and light as much as it is what words mean,
# so the convolutions take part; the UNet's first and last one, and the timestep's layers, are left alone.
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
LAYERS = {
    "attention": ATTENTION,
    "transformers": (*ATTENTION, "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2"),
    "all": (*ATTENTION, "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2", "conv1", "conv2", "0.conv"),
}


@dataclass(frozen=True)
class Recipe:
    style: str = scenes.NEW_STYLE  # of `ldm.scenes`
    base: str = "scenes"  # the model it is for: an embedded one's name, or a folder
    rank: int = 4
    alpha: float = 4.0
    layers: str = "all"  # or "attention", "transformers"
    pictures: int = 400
    held_out: int = 64  # pictures of held-out combinations, to measure on
    steps: int = 600
    batch: int = 16
    lr: float = 4e-3
    caption_dropout: float = 0.1
    snr_range: tuple[float, float] = (1.0, 5.0)  # as the UNet's own training has it
    ema: float = 0.98
    seed: int = 0
    sheet_every: int = 200
    device: str = "cpu"


class Factors(nn.Module):
    """`down` (rank, C_in) and `up` (C_out, rank) for each of a network's chosen layers, which `names` lists in order.

    A convolution's `down` has its kernel (rank, C_in, k, k), and `up` none: (C_out, rank, 1, 1).
    """

    def __init__(self, network: nn.Module, endings: tuple[str, ...], rank: int, alpha: float):
        super().__init__()
        self.rank, self.alpha = rank, alpha
        kinds = nn.Linear | nn.Conv2d
        chosen = {n: m for n, m in network.named_modules() if isinstance(m, kinds) and n.endswith(endings)}
        if not chosen:
            raise LDMError(f"The {type(network).__name__} has no layer named {', '.join(endings)}: choose others.")
        self.names = list(chosen)
        self.downs, self.ups = nn.ParameterList(), nn.ParameterList()
        for weight in (module.weight for module in chosen.values()):
            inside = weight[0].numel()  # what one output is a sum of
            down, up = torch.randn(rank, *weight.shape[1:]), torch.zeros(len(weight), rank, *[1] * (weight.ndim - 2))
            self.downs.append(down.to(weight.device) / inside**0.5)  # drawn on the CPU: the same wherever it trains
            self.ups.append(up.to(weight.device))

    def changes(self) -> dict[str, LowRank]:
        """The change of each layer, by its name; gradients reach the factors through them."""
        each = zip(self.names, self.downs, self.ups, strict=True)
        return {name: LowRank(down, up, self.alpha) for name, down, up in each}


@contextmanager
def beside(network: nn.Module, factors: Factors, weight: float = 1.0) -> Iterator[None]:
    """`network` with the factors beside its layers, for as long as the block lasts."""
    handles = [attach(network.get_submodule(name), change, weight) for name, change in factors.changes().items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def write_lora(path: Path, factors: Factors, base: str, part: str = "unet") -> None:
    """The file as diffusers writes it, in half precision: PEFT's names, rank and alpha as JSON in the header.

    Beside these the header says who trained it, and for which model (`ldm.inspect.trained` reads both).
    """
    tensors, config = {}, {"r": factors.rank, "lora_alpha": factors.alpha, "target_modules": factors.names}
    for name, change in factors.changes().items():
        tensors[f"{part}.{name}.lora_A.weight"] = change.down.detach()
        tensors[f"{part}.{name}.lora_B.weight"] = change.up.detach()
    header = json.dumps({f"{part}.{key}": value for key, value in config.items()})
    said = {"lora_adapter_metadata": header, "software": "ldm", "base_model": base}
    save_weights(tensors, path, torch.float16, said)


def examples_of(style: str, count: int, held_out: bool = False) -> Examples:
    """Pictures of scenes in that style, with captions that don't name it."""
    return of_scenes(scenes_with(count, held_out, style=style), unstyled)


def place(folder: Path, recipe: Recipe) -> Path:
    """Where in the run's folder such a LoRA is trained."""
    return folder / f"lora-{recipe.style.replace(' ', '-')}"


def train(folder: Path, recipe: Recipe = Recipe(), of: Callable[[str, int, bool], Examples] = examples_of) -> None:
    """Train in `folder`/lora-STYLE, or go on where it stopped; at the end write the averaged LoRA there.

    `of(style, count, held_out)` gives the pictures, with their captions.
    """
    check(recipe)
    device = recipe.device
    pipe = open_base(recipe.base, device)
    (folder / "data").mkdir(parents=True, exist_ok=True)
    data, held = of(recipe.style, recipe.pictures, False), of(recipe.style, recipe.held_out, True)
    latents = folder / "data", folder_hash(pipe.folder / "vae")
    mean, deviation = encode(pipe.vae, data, *latents, f"{recipe.style}-train", device)
    held_mean, _ = encode(pipe.vae, held, *latents, f"{recipe.style}-held-out", device)
    ids = torch.stack([pipe.tokenizer(words).ids for words in data.captions])  # (N, 4, 77)
    held_ids, empty = pipe.tokenizer([words[0] for words in held.captions]).ids, pipe.tokenizer("").ids

    torch.manual_seed(recipe.seed)
    factors = Factors(pipe.unet, LAYERS[recipe.layers], recipe.rank, recipe.alpha)
    parts = nn.ModuleDict({"unet": pipe.unet, "text": pipe.text_encoder})
    bars = torch.tensor(pipe.schedule(1).bars, dtype=torch.float32, device=device)
    optimizer, ema = Optimizer([factors], recipe.lr), EMA(factors, recipe.ema)
    run = Run(place(folder, recipe), {"factors": factors, "optimizer": optimizer, "ema": ema}, recipe)

    mine = share(recipe.batch)
    for step in run.steps():
        if step == 0:  # what the base makes of these pictures
            run.log(0, held_out_loss=held_out_loss(parts, held_mean, held_ids, bars, recipe, pipe.scheduler))
        generator = step_generator(recipe.seed, step)
        batch = draw_batch(recipe.batch, recipe.caption_dropout, mean, deviation, ids, empty, generator)
        words, x0, eps, t = (v[mine].to(device) for v in batch[1:])
        with torch.no_grad():
            context = pipe.text_encoder.context(words)
        with beside(pipe.unet, factors):
            value = loss(pipe.unet, x0, context, t, eps, bars, recipe.snr_range, pipe.scheduler.prediction_type)
        norm = optimizer.step(value, trapezoid(step, recipe.steps))
        ema.update(factors, step)
        if step % 10 == 9:
            run.log(step + 1, loss=value.item(), norm=norm)
        if (step + 1) % recipe.sheet_every == 0 or step + 1 == recipe.steps:
            with beside(pipe.unet, ema.of(factors)):
                measured = held_out_loss(parts, held_mean, held_ids, bars, recipe, pipe.scheduler)
                run.log(step + 1, held_out_loss=measured)
                run.sheet(step + 1, draw(parts, pipe.vae, held_ids[:16], empty, pipe.scheduler), columns=8)

    if leads():
        write_lora(place(folder, recipe) / FILE, ema.of(factors).cpu(), Path(recipe.base).name)


def check(recipe: Recipe) -> None:
    """Raise LDMError for a style or layers that there are not."""
    for value, known in ((recipe.style, (*scenes.STYLES, scenes.NEW_STYLE)), (recipe.layers, tuple(LAYERS))):
        if value not in known:
            raise LDMError(f"There is no {value!r}: {', '.join(known)}.{nearest(value, known)}")
