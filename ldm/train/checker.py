"""Train the checker (`ldm.metrics.checker`) on true scenes, a little blurred and noisy."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.io.weights import save_weights
from ldm.metrics.checker import QUESTIONS, Checker, answers, labels
from ldm.train.common import EMA, Optimizer, Run, step_generator, trapezoid
from ldm.train.data import Pictures, pictures
from ldm.train.parallel import leads, share


@dataclass(frozen=True)
class Recipe:
    pictures: int = 12000
    held_out: int = 512  # pictures of held-out combinations, to measure on
    steps: int = 1500
    batch: int = 32
    lr: float = 2e-3
    seed: int = 0
    device: str = "cpu"


def distort(x: Tensor, generator: torch.Generator) -> Tensor:
    """Blur some pictures and add a little noise: the checker shall read shapes and colours, not a renderer's pixels."""
    blurred = F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    blur = torch.rand(len(x), 1, 1, 1, generator=generator)
    level = 0.1 * torch.rand(len(x), 1, 1, 1, generator=generator)
    return x.lerp(blurred, blur) + level * torch.randn(x.shape, generator=generator)


@torch.no_grad()
def accuracy(checker: Checker, data: Pictures) -> dict[str, float]:
    """Share of right answers, question by question, on true pictures."""
    right = dict.fromkeys(QUESTIONS, 0)
    device = checker.hidden.weight.device
    for start in range(0, len(data), 64):
        rows = slice(start, start + 64)
        for found, scene in zip(checker.read(data.tensor(rows).to(device)), data.scenes[rows], strict=True):
            true = answers(scene)
            for question in QUESTIONS:
                right[question] += found[question] == true[question]
    return {question: count / len(data) for question, count in right.items()}


def train(folder: Path, recipe: Recipe = Recipe()) -> None:
    """Train in `folder`/checker, or go on where it stopped; at the end write the averaged network there."""
    data = pictures(folder / "data", recipe.pictures)
    held = pictures(folder / "data", recipe.held_out, "held-out", first=10_000_000)
    truth = torch.tensor([labels(scene) for scene in data.scenes])  # (N, questions)
    torch.manual_seed(recipe.seed)
    checker = Checker().to(recipe.device, memory_format=torch.channels_last)
    optimizer, ema = Optimizer([checker], recipe.lr), EMA(checker, 0.998)
    run = Run(folder / "checker", {"checker": checker, "optimizer": optimizer, "ema": ema}, recipe)
    mine = share(recipe.batch)
    for step in run.steps():
        generator = step_generator(recipe.seed, step)
        rows = torch.randint(len(data), (recipe.batch,), generator=generator)
        x = distort(data.tensor(np.sort(rows.numpy())), generator)
        x, y = (v[mine].to(recipe.device) for v in (x, truth[rows.sort().values]))
        value = sum(F.cross_entropy(logits, y[:, k]) for k, logits in enumerate(checker(x)))
        optimizer.step(value, trapezoid(step, recipe.steps))
        ema.update(checker, step)
        if step % 10 == 9:
            run.log(step + 1, loss=value.item())
        if (step + 1) % 500 == 0 or step + 1 == recipe.steps:
            run.log(step + 1, **accuracy(ema.of(checker), held))
    if leads():
        save_weights(ema.of(checker).cpu().state_dict(), folder / "checker" / "checker.safetensors")
