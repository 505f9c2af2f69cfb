"""What does an added LoRA or word do? Pictures of held-out scenes, drawn without it and with it, read by two judges.

The checker (`ldm.metrics.checker`) tells whether the pictures still show what they were asked for. It has never seen
what was added, and has no word for it; so a `Probe`, a linear rule on its features, is fitted on true pictures to tell
the new (a style, a thing) from all that is old. How often either is right on true pictures stands in the same table.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from ldm import scenes
from ldm.checkpoints.places import EMBEDDING, LORA
from ldm.loading import load
from ldm.metrics.checker import Checker
from ldm.metrics.evaluation import QUESTIONS, Share, batches, load_checker, tally, verdict
from ldm.pictures import image_tensor
from ldm.pipeline import Pipeline
from ldm.train.examples import unstyled

FIRST_SEED = 43_000_000  # of the scenes to measure on; the probe's begin at FITTED
FITTED = 45_000_000
HAS_STYLE = [question for question in QUESTIONS if question != "style"]  # what is asked of a style it doesn't know
HAS_THING = [question for question in QUESTIONS if question not in ("object", "left/right")]


def chosen(count: int, first: int, split: str, **pins) -> list[scenes.Scene]:
    return [scenes.sample(first + i, split, **pins) for i in range(count)]


def true_pictures(wanted: Sequence[scenes.Scene]) -> list[Image.Image]:
    return [Image.fromarray(scenes.render(scene).image) for scene in wanted]


@torch.no_grad()
def rebuilt(pipe: Pipeline, images: Sequence[Image.Image]) -> list[Image.Image]:
    """What the VAE makes of pictures: no drawn one can be expected to show more."""
    parts = (
        image_tensor(list(part)).to(pipe.device, pipe.vae.dtype) for part in batches(list(images), 25, "rebuilding")
    )
    return [image for x in parts for image in pipe.decode(pipe.vae.encode(x))]


@torch.no_grad()
def features(checker: Checker, images: Sequence[Image.Image]) -> Tensor:
    """Of each of the checker's activations the mean, the largest and the deviation over the picture: (B, F)."""
    h, found = image_tensor(list(images)), []
    for layer in checker.features:
        h = layer(h)
        if isinstance(layer, nn.SiLU):
            found += [h.mean(dim=(2, 3)), h.amax(dim=(2, 3)), h.std(dim=(2, 3))]
    return torch.cat(found, dim=1)


@dataclass(frozen=True)
class Probe:
    """A linear rule on the checker's features: positive where a picture shows the new style or thing."""

    checker: Checker
    weight: Tensor  # (F,)
    bias: Tensor

    @classmethod
    def fit(cls, checker: Checker, new: Sequence[Image.Image], old: Sequence[Image.Image], ridge: float = 10.0):
        """Ridge regression on +1 for the `new` pictures and -1 for the `old`, each group weighing the same."""
        x = torch.cat([features(checker, new), features(checker, old)]).double()
        y = torch.cat([torch.ones(len(new)), -torch.ones(len(old))]).double()
        w = torch.cat([torch.full((n,), 0.5 / n) for n in (len(new), len(old))]).double()[:, None]
        mean = (w * x).sum(0)
        spread = (w * (x - mean).square()).sum(0).sqrt() + 1e-6
        z = (x - mean) / spread
        system = z.T @ (w * z) + ridge / len(x) * torch.eye(z.shape[1], dtype=z.dtype)
        weight = torch.linalg.solve(system, z.T @ (w[:, 0] * y)) / spread
        return cls(checker, weight.float(), (-mean @ weight).float())

    def says(self, images: Sequence[Image.Image]) -> list[bool]:
        return (features(self.checker, images) @ self.weight + self.bias > 0).tolist()


def mean_colors(images: Sequence[Image.Image]) -> np.ndarray:
    """(B, 3), of 0 to 255."""
    return np.stack([np.asarray(image, np.float64).mean(axis=(0, 1)) for image in images])


def color_distance(images: Sequence[Image.Image], true: Sequence[Image.Image]) -> float:
    """How far the pictures' mean colours are from those of the true ones, scene by scene: root of the mean square."""
    return float(np.sqrt(np.mean((mean_colors(images) - mean_colors(true)) ** 2)))


def psnr(images: Sequence[Image.Image], true: Sequence[Image.Image]) -> float:
    """In dB, over all pictures together."""
    pairs = zip(images, true, strict=True)
    error = np.mean([np.square(np.asarray(a, np.float64) - np.asarray(b, np.float64)) for a, b in pairs])
    return 10 * math.log10(255**2 / error)


def fit_probe(pipe: Pipeline, checker: Checker, new: dict, old: dict, count: int = 600) -> Probe:
    """A probe for what `new` says of scenes and `old` doesn't: from `count` true pictures each, a third rebuilt too."""
    sides = [true_pictures(chosen(count, FITTED + count * k, "train", **pins)) for k, pins in enumerate((new, old))]
    return Probe.fit(checker, *([*side, *rebuilt(pipe, side[: count // 3])] for side in sides))


@dataclass(frozen=True)
class Row:
    """What was measured of one kind of pictures."""

    new: Share  # of which the probe says that they show the new
    color: float  # distance of mean colours from the true pictures'
    answers: dict[str, Share]  # of the checker's questions


def look(probe: Probe, wanted: Sequence[scenes.Scene], images: list[Image.Image], true: list[Image.Image]) -> Row:
    """Both judges on pictures that were to show the scenes."""
    says = probe.says(images)
    # The checker answers in the words it knows; the scene's own new words would have no number there.
    known = [known_words(scene) for scene in wanted]
    read = probe.checker.read(image_tensor(images))
    answers = tally(verdict(scene, each) for scene, each in zip(known, read, strict=True))
    return Row(Share(sum(says), len(says)), color_distance(images, true), answers)


def known_words(scene: scenes.Scene) -> scenes.Scene:
    """The scene in words of training: its new style or things replaced by old ones, which aren't asked about."""
    style = scene.style if scene.style in scenes.STYLES else "plain"
    things = tuple(t if t.kind in scenes.KINDS else replace(t, kind=scenes.KINDS[0]) for t in scene.things)
    return replace(scene, style=style, things=things)


def draw_all(pipe: Pipeline, captions: list[str], title: str, batch: int = 20, **options) -> list[Image.Image]:
    """A picture for each caption, seeds 0, 1, ..."""
    starts = range(0, len(captions), batch)
    parts = batches([captions[k : k + batch] for k in starts], 1, title)
    return [image for k, (part,) in zip(starts, parts, strict=True) for image in pipe(part, seed=k, **options).images]


def evaluate_style(
    pipe: Pipeline, lora, style: str, count: int, weights: Sequence[float] = (0.0, 0.5, 1.0), **options
) -> tuple[dict[str, Row], dict[str, float]]:
    """Held-out scenes in the style; their captions don't name it, so that only the LoRA can bring it.

    What was measured of each kind of pictures, and how well the VAE rebuilds the style, and the same scenes without it.
    """
    checker = load_checker(pipe.folder)
    probe = fit_probe(pipe, checker, {"style": style}, {})
    wanted = chosen(count, FIRST_SEED, "held-out", style=style)
    captions = [unstyled(scene, scene.seed, full=True) for scene in wanted]
    true, plain = true_pictures(wanted), true_pictures([replace(scene, style="plain") for scene in wanted])
    pictures = {"true": true, "rebuilt": rebuilt(pipe, true), "true, plain": plain}
    vae = {style: psnr(pictures["rebuilt"], true), "plain": psnr(rebuilt(pipe, plain), plain)}
    for weight in weights:
        with pipe.lora(lora, weight):
            pictures[f"weight {weight:g}"] = draw_all(pipe, captions, f"weight {weight:g}", **options)
    return {name: look(probe, wanted, images, true) for name, images in pictures.items()}, vae


def evaluate_word(pipe: Pipeline, embedding, thing: str, words: Sequence[str], count: int, **options) -> dict[str, Row]:
    """Held-out scenes of one such thing; in their captions it is called by the learnt word, and by ordinary `words`."""
    checker = load_checker(pipe.folder)
    probe = fit_probe(pipe, checker, {"kind": thing, "n": 1}, {"n": 1})
    wanted = chosen(count, FIRST_SEED, "held-out", kind=thing, n=1)
    captions = [scenes.caption(scene, scene.seed, full=True) for scene in wanted]
    true = true_pictures(wanted)
    pictures = {"true": true, "rebuilt": rebuilt(pipe, true)}
    for word in words:
        pictures[word] = draw_all(pipe, [text.replace(thing, word) for text in captions], word, **options)
    with pipe.embedding(embedding) as learnt:
        named = [text.replace(thing, learnt.word) for text in captions]
        pictures[learnt.word] = draw_all(pipe, named, learnt.word, **options)
    return {name: look(probe, wanted, images, true) for name, images in pictures.items()}


def report(found: dict[str, Row], new: str, questions: Sequence[str]) -> str:
    """A table in Markdown: a column for each kind of pictures."""

    def line(title: str, cells: Sequence[str]) -> str:
        return f"| {title} | " + " | ".join(cells) + " |"

    rows = found.values()
    lines = [line("", [f"`{name}`" if "<" in name else name for name in found]), "|" + "---|" * (len(found) + 1)]
    lines.append(line(f"the probe says {new}", [f"{100 * row.new.value:.1f} %" for row in rows]))
    lines.append(line("mean colour, distance from the true (of 255)", [f"{row.color:.1f}" for row in rows]))
    for question in questions:
        lines.append(line(question, [f"{100 * row.answers[question].value:.1f} %" for row in rows]))
    return "\n".join(lines)


def measure_lora(folder: Path, base: str, style: str, count: int) -> str:
    """The table of a LoRA's card."""
    found, vae = evaluate_style(load(base), folder / LORA, style, count)
    said = "; ".join(f"{name} {value:.2f} dB" for name, value in vae.items())
    return report(found, style, HAS_STYLE) + f"\n\nPSNR of what the VAE rebuilds: {said}."


def measure_word(folder: Path, base: str, thing: str, count: int, words: Sequence[str] = scenes.KINDS[:3]) -> str:
    """The table of a word's card. `words`: ordinary ones to hold it against: a house, a tree and a flower."""
    return report(evaluate_word(load(base), folder / EMBEDDING, thing, words, count), thing, HAS_THING)
