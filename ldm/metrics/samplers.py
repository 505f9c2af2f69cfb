"""Which sampler, and how many steps? Each draws the same held-out scenes from the same noise, and is held against what
the equation itself leads to, which a run of many small steps comes as near to as float32 can.

Two numbers are not one: a sampler that is far from that result may yet draw what was asked for.
"""

import json
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor
from tqdm import tqdm

from ldm import scenes
from ldm.errors import LDMError
from ldm.guidance import Network, Output
from ldm.io.atomic import atomic_file
from ldm.io.weights import save_weights
from ldm.metrics.checker import Checker
from ldm.metrics.evaluation import Share, fingerprint, held_out, judge, load_checker, tally, whole_lines
from ldm.pipeline import Pipeline
from ldm.samplers import SAMPLERS, find_sampler
from ldm.schedules import Level
from ldm.train.data import to_tensor

Run = tuple[str, int]  # a sampler and its steps

REFERENCE: Run = ("dpm++2m", 500)
WITNESS: Run = ("deis3", 500)  # another kind, through eps: how far it lies tells the error of the reference
STEPS = (5, 8, 10, 15, 20, 30, 50)


class Cell(NamedTuple):
    """What came of one run: one line of results.jsonl."""

    sampler: str
    steps: int
    evaluations: int  # of the network, counted; the two halves of guidance are one
    right: int  # answers of the checker, of so many asked
    asked: int
    distance: float  # of the latents from the reference's, where those are 1 long

    @property
    def accuracy(self) -> Share:
        return Share(self.right, self.asked)


class Counted:
    """A network that counts how often it is asked."""

    def __init__(self, network: Network):
        self.network, self.calls = network, 0

    def __call__(self, x: Tensor, level: Level) -> Output:
        self.calls += 1
        return self.network(x, level)


def compare(
    pipe: Pipeline,
    folder: Path,
    samplers: Sequence[str] = tuple(SAMPLERS),
    steps: Sequence[int] = STEPS,
    count: int = 32,
    batch: int = 16,
    say: Callable[[str], None] = print,
    **options,
) -> dict[Run, Cell]:
    """Run what `folder` doesn't hold yet, write table.md there, and return all cells asked for.

    `options` (guidance, rule, sigmas) go to the pipeline. Raises LDMError where the folder is another comparison's.
    """
    for name in samplers:
        find_sampler(name)
    checker, wanted = load_checker(pipe.folder), held_out(count)
    every = runs(pipe, samplers, steps, say, options)
    log, done = begin(folder, header(pipe, checker, count, options))
    reference = folder / "reference.safetensors"
    if not reference.exists():
        done.pop(REFERENCE, None)
    todo = [run for run in every if run not in done]
    ticks = -(-count // batch) * sum(n for _, n in todo)
    with tqdm(total=ticks, unit="step", file=sys.stderr, disable=None, dynamic_ncols=True, leave=False) as bar:
        try:
            for run in todo:
                bar.set_description(called(run))
                try:
                    x0, evaluations = draw(pipe, wanted, run, batch, bar.update, options)
                except LDMError as error:
                    if run in (REFERENCE, WITNESS):
                        raise
                    say(f"{called(run)} is skipped: {error}")
                    continue
                if run == REFERENCE:
                    save_weights({"x0": x0}, reference)
                done[run] = examine(pipe, checker, wanted, run, x0, evaluations, load_file(reference)["x0"])
                with open(log, "a") as file:
                    file.write(json.dumps(done[run]._asdict()) + "\n")
        except KeyboardInterrupt:
            finished = sum(run in done for run in every)
            raise KeyboardInterrupt(
                f"Stopped: {finished} of {len(every)} runs are finished; the same command does the others."
            ) from None
    found = {run: done[run] for run in every if run in done}
    check_left(found)
    text = report(found, count)
    with atomic_file(folder / "table.md", "w") as file:
        file.write(text + "\n")
    say(text)
    return found


# ---------------------------------------------------------------------------------------------------- the folder


def header(pipe: Pipeline, checker: Checker, count: int, options: dict) -> dict:
    """All that decides the numbers beside sampler and steps: they may grow from run to run, this may not."""
    settings = pipe.settings("", **options)
    chosen = {"guidance": settings.guidance, "rule": settings.rule, "sigmas": settings.sigmas}
    return {**fingerprint(pipe, checker), "count": count, **chosen, "reference": list(REFERENCE)}


def begin(folder: Path, this: dict) -> tuple[Path, dict[Run, Cell]]:
    """The file of results in `folder`, with `this` as its first line, and what it holds already."""
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / "results.jsonl"
    lines = whole_lines(log) or [json.dumps(this) + "\n"]
    before = json.loads(lines[0])
    if before != this:
        other = ", ".join(name for name in this if before.get(name) != this[name])
        raise LDMError(f"{folder} holds a comparison with another {other or 'header'}: name another folder with --out.")
    with atomic_file(log, "w") as file:
        file.writelines(lines)
    cells = [Cell(**json.loads(line)) for line in lines[1:]]
    return log, {(cell.sampler, cell.steps): cell for cell in cells}


def runs(
    pipe: Pipeline, samplers: Sequence[str], steps: Sequence[int], say: Callable[[str], None], options: dict
) -> list[Run]:
    """What is to be run, in order; the reference comes first, and few steps before many."""
    chosen = {name: options[name] for name in ("rule", "sigmas") if name in options}
    try:
        pipe.schedule(REFERENCE[1], **chosen)
    except LDMError as error:
        raise LDMError(f"All is compared with a run of {REFERENCE[1]} steps, which cannot be here: {error}") from error
    able: list[int] = []
    for n in sorted(set(steps)):
        try:
            pipe.schedule(n, **chosen)
            able.append(n)
        except LDMError as error:
            say(f"{n} steps are skipped: {error}")
    found = list(dict.fromkeys([REFERENCE, WITNESS, *((name, n) for n in able for name in samplers)]))
    check_left(found)
    return found


def check_left(found: Iterable[Run]) -> None:
    if not set(found) - {REFERENCE, WITNESS}:
        raise LDMError("Nothing is left to compare: choose other --samplers or other --steps.")


# ---------------------------------------------------------------------------------------------------- one cell


def draw(
    pipe: Pipeline, wanted: list[scenes.Scene], run: Run, batch: int, tick: Callable[[], object], options: dict
) -> tuple[Tensor, int]:
    """The latents of a picture for every scene (B, C, h, w), and how often the network was asked for each."""
    latents, calls = [], 0
    for first in range(0, len(wanted), batch):
        captions = [scenes.caption(scene, scene.seed, full=True) for scene in wanted[first : first + batch]]
        network = Counted(pipe.network(pipe.settings(captions, **options)))
        for step in pipe.steps(captions, seed=first, sampler=run[0], steps=run[1], network=network, **options):
            x = step.x
            tick()
        latents.append(x)
        calls = network.calls  # the same for every batch
    return torch.cat(latents), calls


def examine(
    pipe: Pipeline, checker: Checker, wanted: list[scenes.Scene], run: Run, x0: Tensor, calls: int, reference: Tensor
) -> Cell:
    """Have the pictures read, and their latents compared with the reference's."""
    verdicts = []
    for scene, latent in zip(wanted, x0.split(1), strict=True):
        picture = to_tensor(np.asarray(pipe.decode(latent)[0])[None])
        verdicts += judge(checker, [scene], picture)
    shares = tally(verdicts).values()
    right, asked = sum(share.right for share in shares), sum(share.asked for share in shares)
    return Cell(*run, calls, right, asked, distance(x0, reference))


def distance(x: Tensor, reference: Tensor) -> float:
    """Root mean square difference over the reference's root mean square, picture by picture, and their mean."""
    x, reference = x.cpu().double(), reference.double()
    far = (x - reference).square().mean(dim=(1, 2, 3)).sqrt() / reference.square().mean(dim=(1, 2, 3)).sqrt()  # (B,)
    return far.mean().item()


# ---------------------------------------------------------------------------------------------------- the table


def report(cells: dict[Run, Cell], count: int) -> str:
    """The tables as Markdown, wide enough to be read as they are."""
    reference, witness = cells[REFERENCE], cells[WITNESS]
    plain = {run: cell for run, cell in cells.items() if run not in (REFERENCE, WITNESS)}
    names = [name for name in SAMPLERS if any(run[0] == name for run in plain)]
    steps = sorted({run[1] for run in plain})
    head = ["sampler", *(f"{n} steps" for n in steps)]

    def grid(value: Callable[[Cell], str]) -> str:
        rows = [[label(name), *(value(plain[name, n]) if (name, n) in plain else "–" for n in steps)] for name in names]
        return markdown(head, rows)

    low, high = reference.accuracy.interval
    lines = [
        f"{count} pictures of held-out scenes. The reference, {called(REFERENCE)}, has "
        f"{100 * reference.accuracy.value:.1f} % of {reference.asked} answers right (95 % interval {100 * low:.1f} to "
        f"{100 * high:.1f}). Its own error is about {witness.distance:.2g}: so far from it lies {called(WITNESS)}, "
        f"after {witness.evaluations} evaluations.",
        "Right answers in %, and in brackets the evaluations of the network where they are not the steps:",
        grid(lambda cell: f"{100 * cell.accuracy.value:.1f}" + brackets(cell)),
        "Distance of the latents from the reference's, as a share of their length:",
        grid(lambda cell: f"{cell.distance:.2g}"),
        "† adds noise: its picture is another one, and the distance says how different it is, not how wrong.",
    ]
    return "\n\n".join(lines)


def label(name: str) -> str:
    return f"{name} †" if SAMPLERS[name].adds_noise else name


def called(run: Run) -> str:
    return f"{run[0]} at {run[1]} steps"


def brackets(cell: Cell) -> str:
    return f" ({cell.evaluations})" if cell.evaluations != cell.steps else ""


def markdown(head: list[str], rows: Iterable[list[str]]) -> str:
    rows = [head, *rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["| " + " | ".join(text.ljust(w) for text, w in zip(row, widths, strict=True)) + " |" for row in rows]
    lines.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
    return "\n".join(lines)
