"""Train a ControlNet for a finished model: show it a condition too, and ask for the noise as before.

    x = alpha_t x0 + sigma_t eps;  loss = w(t) |unet(x, t, text, net(x, t, text, condition)) - eps|^2

Zhang et al. 2023, equation 1 and section 3.4. The UNet, the VAE and the text encoder stay as they are: the ControlNet
begins as the UNet's encoder and adds nothing, so the first step starts from the finished model's own loss. Some
captions are replaced by the empty one, so that what a picture holds is read from the condition where no word tells it
(the paper takes half of them; here fewer, for our captions say what no edge can: the colours and the time).
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from ldm import conditions, scenes
from ldm.control import controller
from ldm.guidance import classifier_free, conditional, halves_together
from ldm.io.atomic import atomic_file
from ldm.io.folders import folder_hash
from ldm.loading import load
from ldm.models.controlnet import ControlNet
from ldm.models.unet import UNet
from ldm.pipeline import Pipeline
from ldm.train.common import EMA, Optimizer, Run, step_generator, trapezoid, write_model
from ldm.train.data import Pictures, pictures, to_tensor
from ldm.train.parallel import leader_first, leads, share
from ldm.train.unet import draw_batch, encode_pictures, loss

CHANNELS = (16, 32, 64, 96)  # of the condition's embedding; diffusers' last two are 96 and 256


@dataclass(frozen=True)
class Recipe:
    condition: str = "canny"  # or "depth"
    base: str = "scenes"  # the model it is for: an embedded one's name, or a folder
    pictures: int = 8000
    held_out: int = 256  # pictures of held-out combinations, to measure on
    steps: int = 2000
    batch: int = 32
    lr: float = 1e-3
    caption_dropout: float = 0.3
    snr_range: tuple[float, float] = (1.0, 5.0)  # as the UNet's own training has it
    ema: float = 0.99
    seed: int = 0
    sheet_every: int = 500
    device: str = "cpu"


def condition_of(kind: str, scene: scenes.Scene, image: np.ndarray) -> Image.Image:
    """What the ControlNet sees of a scene: its picture's Canny edges, or its exact depth."""
    if kind == "depth":
        return conditions.depth_picture(scenes.render(scene).depth)
    return conditions.canny(Image.fromarray(image))


def conditions_of(kind: str, data: Pictures, folder: Path, name: str) -> np.ndarray:
    """(N, 128, 128) uint8, mapped from disk, made now unless `folder` holds them; all three channels are this one."""
    path = folder / f"{kind}-{name}-{len(data)}.npy"
    with leader_first():
        if not path.exists():
            rows = tqdm(zip(data.scenes, data.images, strict=True), total=len(data), desc=f"{kind} of {name}")
            found = [np.asarray(condition_of(kind, scene, image))[..., 0] for scene, image in rows]
            with atomic_file(path) as file:
                np.save(file, np.stack(found))
    return np.load(path, mmap_mode="r")


def condition_tensor(rows: np.ndarray) -> Tensor:
    """uint8 (B, H, W) -> what the ControlNet reads, (B, 3, H, W) in [0, 1]."""
    return torch.from_numpy(np.array(rows)).float().div(255)[:, None].expand(-1, 3, -1, -1)


class Controlled(torch.nn.Module):
    """The UNet led by a ControlNet, called as the UNet itself is; `condition` (B, 3, H, W) is the pictures' own."""

    def __init__(self, unet: UNet, net: ControlNet, condition: Tensor):
        super().__init__()
        self.unet, self.net, self.condition = unet, net, condition

    def forward(self, x: Tensor, t: Tensor, context: Tensor) -> Tensor:
        features = self.net.condition(self.condition)
        return self.unet(x, t, context, residuals=self.net(x, t, context, features))


@torch.no_grad()
def held_out_loss(
    pipe: Pipeline, net: ControlNet, x0: Tensor, context: Tensor, condition: np.ndarray, bars: Tensor, recipe: Recipe
) -> float:
    """The loss on held-out pictures, always with the same noise and timesteps."""
    generator, n, total = torch.Generator().manual_seed(0), len(x0), 0.0
    t = ((torch.arange(n) + 0.5) / n * 1000).long()
    eps = torch.randn(x0.shape, generator=generator)
    for rows in torch.arange(n).split(32):
        z, times, noise, words = (v[rows].to(bars.device) for v in (x0, t, eps, context))
        led = Controlled(pipe.unet, net, condition_tensor(condition[rows.numpy()]).to(bars.device))
        value = loss(led, z, words, times, noise, bars, recipe.snr_range, pipe.scheduler.prediction_type)
        total += value.item() * len(rows)
    return total / n


@torch.no_grad()
def draw(pipe: Pipeline, net: ControlNet, words: list[str], condition: np.ndarray) -> Tensor:
    """Rows of eight conditions, and under each the picture drawn from it: (B, 3, 128, 128) in [-1, 1]."""
    seen = condition_tensor(condition).to(pipe.device)
    context = pipe.encode([""] * len(words) + words)
    led = controller(net, context, net.condition(seen).repeat(2, 1, 1, 1))
    halves = halves_together(conditional(pipe.unet, context, controller=led))
    network, (height, width) = classifier_free(halves, pipe.defaults.guidance), condition.shape[1:]
    drawn = pipe(words, network=network, width=width, height=height).images
    rows = (2 * seen.cpu() - 1, to_tensor(np.stack([np.asarray(image) for image in drawn])))
    return torch.cat([half for pair in zip(*(row.split(8) for row in rows), strict=True) for half in pair])


def train(folder: Path, recipe: Recipe = Recipe(), name: str = "") -> None:
    """Train in `folder`/`name`, or go on where it stopped; at the end write the averaged ControlNet there."""
    device, kind = recipe.device, recipe.condition
    name = name or f"controlnet-{kind}"
    pipe = load(recipe.base, device=device)
    pipe.unet.requires_grad_(False)
    data = pictures(folder / "data", recipe.pictures)
    held = pictures(folder / "data", recipe.held_out, "held-out", first=10_000_000)
    latents = folder / "data", folder_hash(pipe.folder / "vae")
    mean, deviation = encode_pictures(pipe.vae, data, *latents, "train", device)
    held_mean, _ = encode_pictures(pipe.vae, held, *latents, "held-out", device)
    seen = conditions_of(kind, data, folder / "data", "train")
    held_seen = conditions_of(kind, held, folder / "data", "held-out")
    ids = torch.stack([pipe.tokenizer(words).ids for words in data.captions])  # (N, 4, 77)
    held_words = [words[0] for words in held.captions]
    empty = pipe.tokenizer("").ids
    with torch.no_grad():
        held_context = pipe.text_encoder.context(pipe.tokenizer(held_words).ids.to(device)).cpu()

    torch.manual_seed(recipe.seed)
    net = ControlNet.from_unet(pipe.unet, CHANNELS).to(memory_format=torch.channels_last)
    bars = torch.tensor(pipe.schedule(1).bars, dtype=torch.float32, device=device)
    optimizer, ema = Optimizer([net], recipe.lr), EMA(net, recipe.ema)
    run = Run(folder / name, {"net": net, "optimizer": optimizer, "ema": ema}, recipe)

    mine = share(recipe.batch)
    for step in run.steps():
        generator = step_generator(recipe.seed, step)
        batch = draw_batch(recipe.batch, recipe.caption_dropout, mean, deviation, ids, empty, generator)
        condition = condition_tensor(seen[batch.rows[mine].numpy()]).to(device)
        words, x0, eps, t = (v[mine].to(device) for v in batch[1:])
        with torch.no_grad():
            context = pipe.text_encoder.context(words)
        led = Controlled(pipe.unet, net, condition)
        value = loss(led, x0, context, t, eps, bars, recipe.snr_range, pipe.scheduler.prediction_type)
        norm = optimizer.step(value, trapezoid(step, recipe.steps))
        ema.update(net, step)
        if step % 10 == 9:
            run.log(step + 1, loss=value.item(), norm=norm)
        if (step + 1) % recipe.sheet_every == 0 or step + 1 == recipe.steps:
            averaged = ema.of(net)
            measured = held_out_loss(pipe, averaged, held_mean, held_context, held_seen, bars, recipe)
            run.log(step + 1, held_out_loss=measured)
            if leads():
                run.sheet(step + 1, draw(pipe, averaged, held_words[:16], held_seen[:16]), columns=8)

    write_model(folder / name / "controlnet", ema.of(net).cpu(), "diffusion_pytorch_model")
