"""Train the depth reader (`ldm.metrics.depth_reader`) on true scenes, a little blurred and noisy, and their depth."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ldm.io.weights import save_weights
from ldm.metrics.depth_reader import DepthReader
from ldm.train.checker import distort
from ldm.train.common import EMA, Optimizer, Run, step_generator, trapezoid
from ldm.train.controlnet import conditions_of
from ldm.train.data import Pictures, pictures
from ldm.train.parallel import leads, share


@dataclass(frozen=True)
class Recipe:
    pictures: int = 8000
    held_out: int = 256  # pictures of held-out combinations, to measure on
    steps: int = 1000
    batch: int = 16
    lr: float = 2e-3
    seed: int = 0
    device: str = "cpu"


@torch.no_grad()
def error(reader: DepthReader, data: Pictures, depth: np.ndarray, device: str) -> float:
    """The mean error of the depth (0 to 1) on true pictures."""
    parts = [slice(start, start + 32) for start in range(0, len(data), 32)]
    apart = [(reader(data.tensor(rows).to(device)).cpu() - depth_tensor(depth[rows])).abs() for rows in parts]
    return torch.cat(apart).mean().item()


def depth_tensor(rows: np.ndarray) -> Tensor:
    """uint8 (B, H, W) -> (B, H, W) in [0, 1]."""
    return torch.from_numpy(np.array(rows)).float() / 255


def train(folder: Path, recipe: Recipe = Recipe()) -> None:
    """Train in `folder`/depth-reader, or go on where it stopped; at the end write the averaged network there."""
    data = pictures(folder / "data", recipe.pictures)
    held = pictures(folder / "data", recipe.held_out, "held-out", first=10_000_000)
    depth = conditions_of("depth", data, folder / "data", "train")
    held_depth = conditions_of("depth", held, folder / "data", "held-out")
    torch.manual_seed(recipe.seed)
    reader = DepthReader().to(recipe.device, memory_format=torch.channels_last)
    optimizer, ema = Optimizer([reader], recipe.lr), EMA(reader, 0.995)
    run = Run(folder / "depth-reader", {"reader": reader, "optimizer": optimizer, "ema": ema}, recipe)
    mine = share(recipe.batch)
    for step in run.steps():
        generator = step_generator(recipe.seed, step)
        rows = torch.randint(len(data), (recipe.batch,), generator=generator).sort().values.numpy()
        x, y = distort(data.tensor(rows), generator)[mine].to(recipe.device), depth_tensor(depth[rows])[mine]
        value = (reader(x) - y.to(recipe.device)).abs().mean()
        optimizer.step(value, trapezoid(step, recipe.steps))
        ema.update(reader, step)
        if step % 10 == 9:
            run.log(step + 1, loss=value.item())
        if (step + 1) % 250 == 0 or step + 1 == recipe.steps:
            run.log(step + 1, held_out_error=error(ema.of(reader), held, held_depth, recipe.device))
    if leads():
        save_weights(ema.of(reader).cpu().state_dict(), folder / "depth-reader" / "depth_reader.safetensors")
