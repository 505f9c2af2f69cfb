"""The plot of `ldm compare-samplers`: a column for each family, right answers above, distance below."""

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from ldm.errors import LDMError
from ldm.metrics.evaluation import save_image
from ldm.metrics.samplers import REFERENCE, WITNESS, Cell, Run, called
from ldm.samplers import SAMPLERS

try:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
except ImportError as error:
    raise LDMError("The plot needs matplotlib: python -m pip install matplotlib.") from error

FAMILIES = {
    "no memory": ("ddim", "euler", "heun", "flow-heun", "dpm2"),
    "multistep, through eps": ("lms", "plms", "pndm", "deis2", "deis3", "dpm2m", "dpm3m"),
    "multistep, through x0": ("dpm++2m", "dpm++3m", "dpm++2s"),
    "UniPC": ("unipc1", "unipc2", "unipc3", "unipc1-bh1", "unipc2-bh1", "unipc3-bh1"),
}
NOISY = "with fresh noise"  # all others
TITLES = (*FAMILIES, NOISY)
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#b0589a", "#8a6d00", "#3fa0dd", "#222222")  # after Okabe & Ito 2008
INK, FAINT = "#333333", "#dcdcdc"
SHARES = (1, 0.99, 0.97, 0.95, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0)
DISTANCES = (0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10)
EVALUATIONS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)
GAP = 0.062  # between two names, as a share of a panel's height

Line = tuple[str, list[Cell]]  # a label, and a sampler's cells by evaluations
Value = Callable[[Cell], float]


def plot(cells: dict[Run, Cell], path: Path) -> None:
    """Write the PNG: distance on a logarithmic scale, right answers on one that has room for the last few per cent."""
    lines = lines_of({run: cell for run, cell in cells.items() if run not in (REFERENCE, WITNESS)})
    families = {title: [line for line in lines if family_of(line) == title] for title in TITLES}
    families = {title: own for title, own in families.items() if own}
    figure = Figure(figsize=(1.0 + 2.8 * len(families), 8), layout="constrained")
    grid = figure.subplots(2, len(families), sharex=True, sharey="row", squeeze=False)
    scale(grid, [cell for _, own in lines for cell in own], cells[REFERENCE])
    for (title, own), (top, bottom) in zip(families.items(), grid.T, strict=True):
        top.set_title(title, color=INK, fontsize=12, fontweight="bold", loc="left")
        for axes, value in ((top, accuracy), (bottom, distance)):
            draw(axes, value, own, lines)
        if title == NOISY:
            remark(bottom, "far need not be wrong")
    write(figure, path)


def accuracy(cell: Cell) -> float:
    return cell.accuracy.value


def distance(cell: Cell) -> float:
    return cell.distance


def family_of(line: Line) -> str:
    return next((title for title, names in FAMILIES.items() if line[1][0].sampler in names), NOISY)


def lines_of(cells: dict[Run, Cell]) -> list[Line]:
    """One line a sampler; those that are one method in other words share it, and its label."""
    found: dict[tuple, Line] = {}
    for name in SAMPLERS:
        own = sorted((cell for cell in cells.values() if cell.sampler == name), key=lambda cell: cell.evaluations)
        if own:
            key = tuple((cell.evaluations, f"{cell.distance:.2g}") for cell in own)
            label, first = found.get(key, ("", own))
            found[key] = (f"{label} = {name}" if label else name, first)
    return list(found.values())


def scale(grid: np.ndarray, cells: list[Cell], reference: Cell) -> None:
    """Axes, before anything stands on them; and the reference's own accuracy."""
    for axes in grid.flat:
        axes.set_xscale("log")
        axes.set_xticks([n for n in EVALUATIONS], [str(n) for n in EVALUATIONS])
        axes.set_xlim(min(c.evaluations for c in cells) / 1.15, max(c.evaluations for c in cells) * 1.15)
        axes.grid(color="#eeeeee", linewidth=0.7)
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color("#aaaaaa")
        axes.tick_params(colors=INK, labelsize=9.5, color="#aaaaaa", labelbottom=True)
    low, high = reference.accuracy.interval
    for axes in grid[0]:
        axes.set_yscale("function", functions=(lambda a: -np.sqrt(np.maximum(1 - a, 0)), lambda y: 1 - y**2))
        axes.set_yticks(SHARES, [f"{100 * share:g} %" for share in SHARES])
        axes.set_ylim(min(c.accuracy.value for c in cells) - 0.03, 1)
        axes.minorticks_off()
        axes.axhspan(low, high, color="#f2ecd8", linewidth=0, zorder=0)
        axes.axhline(reference.accuracy.value, color="#a08a3c", linewidth=1, linestyle=(0, (1, 1.5)), zorder=2)
    for axes in grid[1]:
        axes.set_yscale("log")
        axes.set_yticks(DISTANCES, [f"{far:g}" for far in DISTANCES])
        axes.set_ylim(min(c.distance for c in cells) / 1.6, max(c.distance for c in cells) * 1.3)
        axes.minorticks_off()
        axes.set_xlabel("evaluations of the network", color=INK, fontsize=10)
    grid[0, 0].set_ylabel("right answers of the checker", color=INK, fontsize=11)
    remark(grid[0, 0], f"dotted: {REFERENCE[0]}\nat {REFERENCE[1]} steps;\nband: 95 % interval")
    grid[1, 0].set_ylabel(f"distance from {called(REFERENCE)}", color=INK, fontsize=11)


def draw(axes: Axes, value: Value, own: list[Line], lines: list[Line]) -> None:
    """A family's lines with their names at the right end, and all others faintly behind them."""
    for _, cells in lines:
        if value is accuracy or not SAMPLERS[cells[0].sampler].adds_noise:
            axes.plot([c.evaluations for c in cells], list(map(value, cells)), color=FAINT, linewidth=0.8, zorder=1)
    ends = []
    for (_, cells), colour in zip(own, COLOURS * len(own), strict=False):
        x, y = [c.evaluations for c in cells], list(map(value, cells))
        dashed = value is distance and SAMPLERS[cells[0].sampler].adds_noise
        axes.plot(x, y, color=colour, linewidth=1.7, marker="o", markersize=3.5, zorder=3,
                  linestyle=(0, (3, 1.2)) if dashed else "-")  # fmt: skip
        ends.append(axes.transAxes.inverted().transform(axes.transData.transform((x[-1], y[-1]))))
    heights = spread([end[1] for end in ends])
    for (label, _), colour, end, height in zip(own, COLOURS * len(own), ends, heights, strict=False):
        axes.plot([end[0], 1.03], [end[1], height], transform=axes.transAxes, color=colour, linewidth=0.6, alpha=0.6,
                  clip_on=False, zorder=2)  # fmt: skip
        axes.text(1.04, height, label, transform=axes.transAxes, color=colour, fontsize=9.5, va="center")


def remark(axes: Axes, text: str) -> None:
    """Small print where no line is: those of `accuracy` rise to the right, those with noise lie high."""
    box = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1.5}
    axes.text(0.98, 0.03, text, transform=axes.transAxes, color=INK, fontsize=8.5, ha="right", bbox=box)


def spread(heights: list[float]) -> list[float]:
    """The same heights, moved apart as far as names need, and none below the panel or beside its title."""
    placed, ceiling, floor = list(heights), 0.97, 0.0
    falling = sorted(range(len(heights)), key=lambda k: -heights[k])
    for k in falling:
        placed[k] = min(heights[k], ceiling)
        ceiling = placed[k] - GAP
    for k in reversed(falling):
        placed[k] = max(placed[k], floor)
        floor = placed[k] + GAP
    return placed


def write(figure: Figure, path: Path) -> None:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=96)
    save_image(Image.open(buffer).convert("RGB").quantize(64), path)  # a third of the bytes
