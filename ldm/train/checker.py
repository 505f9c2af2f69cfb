"""Train the checker: a plain convolutional network that reads from a picture what it shows.

It learns on true scenes, where the answers are known, and then judges pictures that the diffusion model drew. A verdict
on generated pictures is worth no more than the checker's own accuracy on true ones, so that is always stated with it.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm import scenes
from ldm.io.weights import save_weights
from ldm.train.common import EMA, Optimizer, Run, step_generator, trapezoid
from ldm.train.data import Pictures, pictures

NOTHING = "nothing"  # the answer for the right-hand object of a picture with one
THING = {"kind": (*scenes.KINDS, NOTHING), "color": (*scenes.COLORS, NOTHING), "size": (*scenes.SIZES, NOTHING)}
QUESTIONS: dict[str, tuple] = {
    "time": scenes.TIMES,
    "ground": scenes.GROUNDS,
    "mountains": (False, True),
    "style": scenes.STYLES,
    **{f"left {name}": answers for name, answers in THING.items()},
    **{f"right {name}": answers for name, answers in THING.items()},
}


def answers(scene: scenes.Scene) -> dict[str, object]:
    """The true answers for a scene. A single object counts as the left one."""
    things = sorted(scene.things, key=lambda thing: thing.x)
    right = things[1] if len(things) > 1 else None
    found = {"time": scene.time, "ground": scene.ground, "mountains": scene.mountains, "style": scene.style}
    for name in THING:
        found[f"left {name}"] = getattr(things[0], name)
        found[f"right {name}"] = NOTHING if right is None else getattr(right, name)
    return found


def labels(scene: scenes.Scene) -> list[int]:
    """`answers` as indices into `QUESTIONS`."""
    found = answers(scene)
    return [options.index(found[question]) for question, options in QUESTIONS.items()]


class Checker(nn.Module):
    """Picture (B, 3, 128, 128) in [-1, 1] -> one row of logits a question.

    Strided convolutions down to 8x8, then a linear layer that still sees where things are: left and right matter.
    """

    def __init__(self, widths: tuple[int, ...] = (24, 48, 64, 96)):
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(3, widths[0], 5, stride=2, padding=2)]
        for i, width in enumerate(widths):
            layers += [nn.GroupNorm(4, width), nn.SiLU()]
            if i + 1 < len(widths):
                layers += [nn.Conv2d(width, widths[i + 1], 3, stride=2, padding=1)]
        self.features = nn.Sequential(*layers)
        self.mix = nn.Sequential(nn.Conv2d(widths[-1], 48, 3, padding=1), nn.GroupNorm(4, 48), nn.SiLU())
        self.hidden = nn.Linear(48 * 64, 96)
        self.heads = nn.ModuleList(nn.Linear(96, len(options)) for options in QUESTIONS.values())

    def forward(self, x: Tensor) -> list[Tensor]:
        h = self.mix(self.features(x)).flatten(1)  # (B, 48*8*8)
        h = F.silu(self.hidden(h))
        return [head(h) for head in self.heads]

    @torch.no_grad()
    def read(self, x: Tensor) -> list[dict[str, object]]:
        """What each picture (B, 3, 128, 128) shows, in the words of `answers`."""
        picks = [logits.argmax(dim=1).tolist() for logits in self(x)]
        questions = list(QUESTIONS.items())
        return [
            {q: options[pick[b]] for (q, options), pick in zip(questions, picks, strict=True)} for b in range(len(x))
        ]


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
    share = torch.rand(len(x), 1, 1, 1, generator=generator)
    level = 0.1 * torch.rand(len(x), 1, 1, 1, generator=generator)
    return x.lerp(blurred, share) + level * torch.randn(x.shape, generator=generator)


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
    run = Run(folder / "checker", {"checker": checker, "optimizer": optimizer, "ema": ema}, recipe.steps)
    averaged = Checker().requires_grad_(False)
    for step in run.steps():
        generator = step_generator(recipe.seed, step)
        rows = torch.randint(len(data), (recipe.batch,), generator=generator)
        x = distort(data.tensor(np.sort(rows.numpy())), generator).to(recipe.device)
        y = truth[rows.sort().values].to(recipe.device)
        value = sum(F.cross_entropy(logits, y[:, k]) for k, logits in enumerate(checker(x)))
        optimizer.step(value, trapezoid(step, recipe.steps))
        ema.update(checker, step)
        if step % 10 == 9:
            run.log(step + 1, loss=value.item())
        if (step + 1) % 500 == 0 or step + 1 == recipe.steps:
            averaged.load_state_dict({name: p.cpu() for name, p in ema.average.items()})
            run.log(step + 1, **accuracy(averaged, held))
    averaged.load_state_dict({name: p.cpu() for name, p in ema.average.items()})
    save_weights(averaged.state_dict(), folder / "checker" / "checker.safetensors")
