"""Does the model draw what it is told? Pictures for held-out scenes, read by a checker, with confidence intervals.

The checker (`ldm.metrics.checker`) is a network too, so its own accuracy on true pictures stands in the same table.
"""

import hashlib
import itertools
import json
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from ldm import scenes
from ldm.checkpoints.folder import home_of_parts
from ldm.errors import LDMError
from ldm.io.atomic import atomic_file
from ldm.io.folders import folder_hash, read_json, write_json
from ldm.io.weights import blank, load_weights
from ldm.metrics.checker import NOTHING, Checker, answers
from ldm.pipeline import Pipeline
from ldm.train.data import to_tensor

FIRST_SEED = 20_000_000  # of the scenes asked for, beyond all seeds of training
QUESTIONS = ("time", "ground", "mountains", "style", "number", "object", "color", "size", "left/right")
BARS = {"time": 0.97, "ground": 0.97, "object": 0.95, "color": 0.93, "left/right": 0.85, "style": 0.95}


@dataclass(frozen=True)
class Share:
    """`right` of `asked`, as a share with its 95 % confidence interval (Wilson 1927)."""

    right: int
    asked: int

    @property
    def value(self) -> float:
        return self.right / self.asked if self.asked else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        n, z = self.asked, 1.96
        if not n:
            return math.nan, math.nan
        centre = (self.right + z * z / 2) / (n + z * z)
        half = z / (n + z * z) * math.sqrt(self.right * (n - self.right) / n + z * z / 4)
        return centre - half, centre + half

    def __str__(self) -> str:
        low, high = self.interval
        return f"{100 * self.value:5.1f} %  ({100 * low:.1f} to {100 * high:.1f}, n = {self.asked})"


def verdict(scene: scenes.Scene, read: dict[str, object]) -> dict[str, list[bool]]:
    """For every question, right or wrong, once or (object, color, size) once for every thing of the scene.

    The things are matched with what was read in the order that fits more kinds, so a picture with the two things
    exchanged has both objects right, and only "left/right" wrong. That is asked where both kinds are there at all.
    "number" is whether there are as many things as were asked for: one too many is wrong there alone.
    """
    true = answers(scene)
    found: dict[str, list[bool]] = {q: [read[q] == true[q]] for q in ("time", "ground", "mountains", "style")}
    found["number"] = [(read["right kind"] == NOTHING) == (true["right kind"] == NOTHING)]
    sides = ("left", "right") if len(scene.things) > 1 else ("left",)
    kinds = [true[f"{side} kind"] for side in sides]

    def fit(order: Iterable[str]) -> int:
        return sum(read[f"{side} kind"] == kind for side, kind in zip(order, kinds, strict=True))

    orders = (("left", "right"), ("right", "left")) if len(sides) == 2 else (("left",), ("right",))
    order = max(orders, key=fit)
    for question, name in (("object", "kind"), ("color", "color"), ("size", "size")):
        pairs = zip(order, sides, strict=True)
        found[question] = [read[f"{there} {name}"] == true[f"{asked} {name}"] for there, asked in pairs]
    found["left/right"] = [order == sides] if len(sides) == 2 and all(found["object"]) else []
    return found


def tally(verdicts: Iterable[dict[str, list[bool]]]) -> dict[str, Share]:
    """All verdicts, question by question."""
    counts = {question: [0, 0] for question in QUESTIONS}
    for found in verdicts:
        for question in QUESTIONS:
            counts[question][0] += sum(found[question])
            counts[question][1] += len(found[question])
    return {question: Share(*count) for question, count in counts.items()}


def travelling(model: Path, what: str) -> Path:
    """The folder `<model>-<what>` beside a model; of one that takes another's parts (`scenes-flow`), beside that."""
    own, home = model.with_name(f"{model.name}-{what}"), home_of_parts(model)
    return own if own.exists() or home is None else home.with_name(f"{home.name}-{what}")


def load_checker(model: Path) -> Checker:
    """The checker that travels beside an embedded model, or the model whose parts it takes, in `<model>-extras`."""
    path = travelling(model, "extras") / "checker" / "checker.safetensors"
    if not path.exists():
        raise LDMError(f"There is no checker for {model}: {path} is missing, and only it can read the pictures.")
    with blank():
        checker = Checker()
    return load_weights(checker, path)


def held_out(count: int) -> list[scenes.Scene]:
    """`count` scenes, two things in two of five, of which every thing is a combination that no training has seen.

    Styles, times and first things take turns: drawn freely, they would be as uneven as the held-out combinations are.
    """

    def unseen(scene: scenes.Scene) -> bool:
        place = (scene.time, scene.ground, scene.style)
        return all(scenes.held_out_combination(thing.kind, thing.color, *place) for thing in scene.things)

    found, seed, turns = [], FIRST_SEED, itertools.cycle(held_out_places())
    kind, time, style, ground = next(turns)
    while len(found) < count:
        two = 2 if len(found) % 5 < 2 else 1
        scene = scenes.sample(seed, "any", style=style, time=time, ground=ground, kind=kind, n=two)
        seed += 1
        if unseen(scene):
            found.append(scene)
            kind, time, style, ground = next(turns)
    return found


def held_out_places() -> list[tuple[str, str, str, str]]:
    """(kind, time, style, ground) with some held-out colour, mixed so that any number of the first ones is even."""
    places, unseen = [], scenes.held_out_combination
    for turn, kind, time, style in itertools.product(range(4), scenes.KINDS, scenes.TIMES, scenes.STYLES):
        grounds = [g for g in scenes.GROUNDS if any(unseen(kind, c, time, g, style) for c in scenes.COLORS)]
        if grounds:  # two of the 128 have none
            places.append((kind, time, style, grounds[turn % len(grounds)]))
    return [places[i * 13 % len(places)] for i in range(len(places))]


def batches(items: list, size: int, title: str) -> Iterable[list]:
    with tqdm(total=len(items), desc=title) as bar:
        for start in range(0, len(items), size):
            yield items[start : start + size]
            bar.update(len(items[start : start + size]))


def judge(checker: Checker, wanted: list[scenes.Scene], x: Tensor) -> list[dict[str, list[bool]]]:
    """Verdicts on pictures (B, 3, 128, 128) in [-1, 1]."""
    return [verdict(scene, read) for scene, read in zip(wanted, checker.read(x), strict=True)]


@torch.no_grad()
def evaluate_vae(pipe: Pipeline, checker: Checker, wanted: list[scenes.Scene]) -> dict:
    """The checker on true pictures and on the VAE's reconstructions of them, and the reconstructions' PSNR in dB."""
    true, rebuilt = [], []
    errors = {"everywhere": [0.0, 0], "inside objects": [0.0, 0]}
    for batch in batches(wanted, 25, "true pictures, rebuilt"):
        pictures = [scenes.render(scene) for scene in batch]
        x = to_tensor(np.stack([picture.image for picture in pictures]))
        y = pipe.vae.decode(pipe.vae.encode(x.to(pipe.device, pipe.vae.dtype))).float().cpu().clamp(-1, 1)
        y = ((y + 1) * 127.5).round() / 127.5 - 1  # as a picture file holds it
        error = (y - x).square().mean(dim=1)  # (B, H, W)
        mask = torch.from_numpy(np.stack([picture.masks.any(axis=0) for picture in pictures]))
        for name, part in (("everywhere", error), ("inside objects", error[mask])):
            errors[name][0] += part.sum().item()
            errors[name][1] += part.numel()
        true += judge(checker, batch, x)
        rebuilt += judge(checker, batch, y)
    psnr = {name: 10 * math.log10(4 / (total / n)) for name, (total, n) in errors.items()}
    return {"checker on true pictures": tally(true), "checker on rebuilt pictures": tally(rebuilt), "psnr": psnr}


def evaluate_pictures(
    pipe: Pipeline, checker: Checker, wanted: list[scenes.Scene], folder: Path | None = None, batch: int = 20, **options
) -> dict[str, Share]:
    """Draw a picture for every scene's full caption and have it read. `options` go to the pipeline.

    With `folder`, pictures and verdicts are kept there, and what is already there is not drawn again.
    """
    log = None if folder is None else begin_log(folder, pipe, checker, options)
    done = [json.loads(line) for line in log.read_text().splitlines()] if log else []
    verdicts = [row["verdict"] for row in done[: len(wanted)]]
    for part in batches(wanted[len(done) :], batch, "drawing"):
        first = len(verdicts)
        captions = [scenes.caption(scene, scene.seed, full=True) for scene in part]
        images = pipe(captions, seed=first, **options).images
        found = judge(checker, part, to_tensor(np.stack([np.asarray(image) for image in images])))
        verdicts += found
        if log is not None:
            for k, image in enumerate(images):
                save_image(image, folder / f"{first + k:05d}.png")
            with open(log, "a") as file:
                rows = zip(captions, found, strict=True)
                file.writelines(json.dumps({"caption": caption, "verdict": v}) + "\n" for caption, v in rows)
    return tally(verdicts)


def begin_log(folder: Path, pipe: Pipeline, checker: Checker, options: dict) -> Path:
    """The file of verdicts in `folder`. Raises LDMError where the folder holds another model's or other settings'."""
    folder.mkdir(parents=True, exist_ok=True)
    this = {**fingerprint(pipe, checker), "options": options}
    settings, log = folder / "settings.json", folder / "verdicts.jsonl"
    if settings.exists() and read_json(settings) != this:
        raise LDMError(f"{folder} holds pictures of another model or of other settings: name another folder.")
    write_json(settings, this)
    with atomic_file(log, "w") as file:
        file.writelines(whole_lines(log))
    return log


def fingerprint(pipe: Pipeline, checker: Checker) -> dict[str, str]:
    """Who drew and who judged: results with another one have no place in the same file."""
    judge = hashlib.sha256(b"".join(p.numpy().tobytes() for p in checker.state_dict().values())).hexdigest()[:16]
    return {"model": folder_hash(pipe.folder), "dtype": str(pipe.dtype), "checker": judge}


def whole_lines(log: Path) -> list[str]:
    """The lines of a file of JSON objects, without the last one where a kill has torn it."""
    lines = log.read_text().splitlines(keepends=True) if log.exists() else []
    return [line for line in lines if line.endswith("}\n")]


def save_image(image: Image.Image, path: Path) -> None:
    with atomic_file(path) as file:
        image.save(file, format="PNG")


def sheet(folder: Path, count: int = 100, columns: int = 10) -> Image.Image:
    """The first pictures of an evaluation's folder in one."""
    tiles = [Image.open(path) for path in sorted(folder.glob("[0-9]*.png"))[:count]]
    size = tiles[0].width
    whole = Image.new("RGB", (columns * size, math.ceil(len(tiles) / columns) * size))
    for k, tile in enumerate(tiles):
        whole.paste(tile, (k % columns * size, k // columns * size))
    return whole


def report(true: dict[str, Share], rebuilt: dict[str, Share], psnr: dict[str, float], drawn: dict[str, Share]) -> str:
    """The table that `ldm evaluate` prints."""
    lines = [f"{'':12s} {'true':>8s} {'rebuilt':>8s}   drawn"]
    for question in QUESTIONS:
        bar = f"   bar {100 * BARS[question]:.0f} %" if question in BARS else ""
        t, r = 100 * true[question].value, 100 * rebuilt[question].value
        lines.append(f"{question:12s} {t:6.1f} % {r:6.1f} %   {drawn[question]}{bar}")
    lines.append("left/right is asked of the pictures with two things in which both were found")
    lines.append(
        f"VAE: {psnr['everywhere']:.2f} dB everywhere (bar 32), {psnr['inside objects']:.2f} dB inside objects (bar 28)"
    )
    return "\n".join(lines)


def evaluate(
    pipe: Pipeline, count: int, folder: Path | None = None, say: Callable[[str], None] = print, **options
) -> dict:
    """The whole table for `count` held-out scenes: printed, and returned as plain numbers."""
    checker, wanted = load_checker(pipe.folder), held_out(count)
    drawn = evaluate_pictures(pipe, checker, wanted, folder, **options)
    vae = evaluate_vae(pipe, checker, wanted)
    true, rebuilt = vae["checker on true pictures"], vae["checker on rebuilt pictures"]
    say(report(true, rebuilt, vae["psnr"], drawn))
    tables = {"true": true, "rebuilt": rebuilt, "drawn": drawn}
    numbers = {name: {q: (s.right, s.asked) for q, s in table.items()} for name, table in tables.items()}
    if folder is not None:
        save_image(sheet(folder), folder / "sheet.png")
    return {**numbers, "psnr": vae["psnr"]}
