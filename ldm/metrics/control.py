"""Does a ControlNet lead? Pictures for held-out scenes, drawn with it and without, held against the condition given.

Edges are compared as edge detection is judged: precision and recall within a pixel (Martin et al. 2004, simplified: no
one-to-one matching), of OpenCV's Canny on both sides. Depth is read from the drawn picture by `DepthReader`. What the
pictures show is read by the checker, for a ControlNet that is followed at the price of the words would be a bad one.
"""

import math
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from ldm import conditions, scenes
from ldm.control import Control
from ldm.errors import LDMError
from ldm.io.weights import blank, load_weights
from ldm.metrics.checker import Checker
from ldm.metrics.depth_reader import DepthReader
from ldm.metrics.evaluation import QUESTIONS, Share, batches, held_out, judge, tally
from ldm.models.controlnet import ControlNet
from ldm.pictures import image_tensor
from ldm.pipeline import Pipeline
from ldm.train.controlnet import condition_of
from ldm.train.data import tiled

SCALES = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5)


def edge_f1(found: Tensor, wanted: Tensor, reach: int = 1) -> Tensor:
    """F1 of edge maps (B, H, W) of bool, within `reach` pixels: (B,). Two empty maps agree."""

    def near(edges: Tensor) -> Tensor:
        return F.max_pool2d(edges.float()[:, None], 2 * reach + 1, stride=1, padding=reach)[:, 0] > 0

    hit, met = (found & near(wanted)).sum((1, 2)), (wanted & near(found)).sum((1, 2))
    count, total = found.sum((1, 2)), wanted.sum((1, 2))
    precision, recall = hit / count.clamp(min=1), met / total.clamp(min=1)
    f1 = 2 * precision * recall / (precision + recall).clamp(min=1e-9)
    return torch.where((count == 0) & (total == 0), torch.ones_like(f1), f1)


def edges_of(images: list[Image.Image]) -> Tensor:
    """Canny's edges, (B, H, W) of bool."""
    return torch.stack([torch.from_numpy(np.asarray(conditions.canny(image))[..., 0] > 127) for image in images])


def correlation(a: Tensor, b: Tensor) -> Tensor:
    """Pearson's, picture by picture: (B, H, W) each -> (B,)."""
    a, b = a.flatten(1).double(), b.flatten(1).double()
    a, b = a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True)
    return (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1)).clamp(min=1e-12)


def load_depth_reader(model: Path) -> DepthReader:
    """The depth reader that travels beside an embedded model's ControlNet of depth, in `<model>-depth-extras`."""
    path = model.with_name(model.name + "-depth-extras") / "depth_reader.safetensors"
    if not path.exists():
        raise LDMError(f"There is no depth reader for {model}: {path} is missing, and only it can tell depth.")
    with blank():
        reader = DepthReader()
    return load_weights(reader, path)


@dataclass
class Agreement:
    """What was measured of one kind of pictures: how near to the condition each came, and what they show."""

    scores: list[float] = field(default_factory=list)  # a picture's F1, or correlation
    errors: list[float] = field(default_factory=list)  # a picture's mean error of depth
    verdicts: list[dict] = field(default_factory=list)

    @property
    def score(self) -> float:
        return sum(self.scores) / len(self.scores) if self.scores else math.nan

    @property
    def error(self) -> float:
        return sum(self.errors) / len(self.errors) if self.errors else math.nan

    def shares(self) -> dict[str, Share]:
        return tally(self.verdicts)


class Judge:
    """Holds pictures against the condition they were to follow."""

    def __init__(self, kind: str, model: Path):
        self.kind, self.reader = kind, load_depth_reader(model) if kind == "depth" else None

    @torch.no_grad()
    def __call__(self, images: list[Image.Image], wanted: list[Image.Image], into: Agreement) -> None:
        asked = torch.stack([torch.from_numpy(np.array(each)[..., 0]) for each in wanted])  # (B, H, W) uint8
        if self.kind == "canny":
            into.scores += edge_f1(edges_of(images), asked > 127).tolist()
            return
        depth, asked = self.reader(image_tensor(images)), asked.float() / 255
        into.scores += correlation(depth, asked).tolist()
        into.errors += (depth - asked).abs().mean((1, 2)).tolist()


@torch.no_grad()
def evaluate_control(
    pipe: Pipeline, net: ControlNet, kind: str, checker: Checker, count: int, batch: int = 20, **options
) -> dict[str, Agreement]:
    """The true pictures, their reconstructions by the VAE, and those drawn without and with the ControlNet.

    The drawn ones have the same captions and seeds. `options` go to the pipeline.
    """
    judges, found = Judge(kind, pipe.folder), {name: Agreement() for name in ("true", "rebuilt", "without", "with")}
    for part in batches(held_out(count), batch, f"with and without {kind}"):
        first = len(found["with"].scores)
        pictures = [scenes.render(scene) for scene in part]
        wanted = [condition_of(kind, picture.scene, picture.image) for picture in pictures]
        captions = [scenes.caption(scene, scene.seed, full=True) for scene in part]
        true = [Image.fromarray(picture.image) for picture in pictures]
        x = image_tensor(true).to(pipe.device, pipe.dtype)
        drawn = {
            "true": true,
            "rebuilt": pipe.decode(pipe.vae.encode(x)),
            "without": pipe(captions, seed=first, **options).images,
            "with": pipe(captions, seed=first, control=[Control(net, wanted)], **options).images,
        }
        for name, images in drawn.items():
            judges(images, wanted, found[name])
            found[name].verdicts += judge(checker, part, image_tensor(images))
    return found


def report(kind: str, found: dict[str, Agreement]) -> str:
    """The table that `ldm evaluate --control` prints."""
    names, count = list(found), len(found["with"].scores)
    shares = {name: found[name].shares() for name in names}
    lines = [f"{count} pictures".ljust(28) + "".join(f"{name:>10s}" for name in names)]

    def row(title: str, values: list[str]) -> None:
        lines.append(f"{title:28s}" + "".join(f"{value:>10s}" for value in values))

    if kind == "canny":
        row("edge F1, within a pixel", [f"{found[name].score:.3f}" for name in names])
    else:
        row("depth, correlation", [f"{found[name].score:.3f}" for name in names])
        row("depth, mean error of 0 to 1", [f"{found[name].error:.3f}" for name in names])
    for question in QUESTIONS:
        row(question, [f"{100 * shares[name][question].value:.1f} %" for name in names])
    lines.append("drawn with it, with 95 % intervals:")
    lines += [f"{question:12s} {shares['with'][question]}" for question in QUESTIONS]
    return "\n".join(lines)


def scale_grid(pipe: Pipeline, net: ControlNet, kind: str, rows: int = 4, **options) -> Image.Image:
    """Held-out scenes: the condition, and a picture at each of `SCALES`, from left to right."""
    tiles = []
    for k, scene in enumerate(tqdm(held_out(rows), desc=f"{kind} at every scale")):
        seen = condition_of(kind, scene, scenes.render(scene).image)
        words = scenes.caption(scene, scene.seed, full=True)
        drawn = [pipe(words, seed=k, control=[Control(net, seen, scale=s)], **options).images[0] for s in SCALES]
        tiles += [seen, *drawn]
    return tiled(tiles, 1 + len(SCALES))
