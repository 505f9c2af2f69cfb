"""The checker: a plain convolutional network that reads from a picture of a scene what it shows.

It learns on true scenes (`ldm.train.checker`), where the answers are known, and then judges pictures that a diffusion
model drew. A verdict on generated pictures is worth no more than the checker's own accuracy on true ones, so that is
always stated with it.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm import scenes

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
