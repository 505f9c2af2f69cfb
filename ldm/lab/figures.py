"""Figures for notebooks: one look, small files, alt texts. Each function returns something that a notebook shows.

matplotlib (the extra `notebooks`) is imported on use. `pictures` lays pictures out, `heat` maps, `channels` latents;
`canvas` begins a plot of one's own and `show` ends it.
"""

import io
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ldm.errors import LDMError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, QUIET, PAPER = "#1f2328", "#6e7781", "#ffffff"
# Okabe & Ito's colours, which colour-blind readers can tell apart; the first two carry most plots.
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
SIGNED, RISING = "RdBu_r", "magma"  # colour maps: around zero, and from zero up
FONT = "DejaVu Sans"


class Shown:
    """A finished figure: a notebook shows it, `.image` is a Pillow picture, `.save(path)` writes it."""

    def __init__(self, data: bytes, mime: str, alt: str):
        self.data, self.mime, self.alt = data, mime, alt

    @property
    def image(self) -> Image.Image:
        return Image.open(io.BytesIO(self.data)).convert("RGB")

    def save(self, path: str) -> None:
        self.image.save(path)

    def __repr__(self) -> str:
        return f"<figure: {self.alt}>"

    def _repr_mimebundle_(self, include=None, exclude=None) -> tuple[dict, dict]:
        """Data and metadata: nbconvert's pages take the alt text from there."""
        return {self.mime: self.data, "text/plain": repr(self)}, {self.mime: {"alt": self.alt}}


def canvas(width: float = 7.2, height: float = 3.2, rows: int = 1, columns: int = 1, **ratios) -> tuple:
    """A figure of so many inches and its axes, in the house's look; `ratios`: matplotlib's width_ratios and so on."""
    from matplotlib.figure import Figure

    fig = Figure(figsize=(width, height), dpi=100, layout="constrained", facecolor=PAPER)
    axes = fig.subplots(rows, columns, gridspec_kw=ratios or None)
    for ax in np.atleast_1d(axes).flat:
        tidy(ax)
    return fig, axes


def tidy(ax: "Axes") -> None:
    """Two axis lines, a faint grid, one font."""
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set_color(QUIET)
    ax.grid(True, color="#d0d7de", linewidth=0.6)
    ax.set_axisbelow(True)
    ax.tick_params(colors=QUIET, labelsize=9)
    ax.xaxis.label.set(color=INK, fontsize=10, family=FONT)
    ax.yaxis.label.set(color=INK, fontsize=10, family=FONT)
    ax.set_prop_cycle(color=COLORS)


def title(fig: "Figure", text: str) -> None:
    """What the figure shows, said as a sentence above it."""
    lines = textwrap.fill(text, max(int(9.5 * fig.get_figwidth()), 20))  # bold letters of this size: 9.5 an inch
    fig.suptitle(lines, x=0.01, ha="left", fontsize=11.5, fontweight="bold", color=INK, family=FONT)


def show(fig: "Figure", alt: str, photographic: bool = False, colors: int = 128) -> Shown:
    """End a figure. Plots become PNG with few `colors`, `photographic` ones JPEG: either is a few dozen kB."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    agg = FigureCanvasAgg(fig)
    agg.draw()
    image, file = Image.fromarray(np.asarray(agg.buffer_rgba())).convert("RGB"), io.BytesIO()
    if photographic:
        image.save(file, "JPEG", quality=88, optimize=True)
        return Shown(file.getvalue(), "image/jpeg", alt)
    image.quantize(colors, method=Image.Quantize.MAXCOVERAGE).save(file, "PNG", optimize=True)
    return Shown(file.getvalue(), "image/png", alt)


def pictures(
    rows: Sequence,
    labels: Sequence[str] | Sequence[Sequence[str]] = (),
    side: Sequence[str] = (),
    heading: str = "",
    alt: str = "",
    inches: float = 1.35,
) -> Shown:
    """Pictures in a row, or in rows: Pillow pictures, uint8 arrays, or tensors (3, H, W) in [-1, 1].

    `labels` stand above the columns, or one above each picture if they are nested like them; `side` to the left.
    """
    grid = [list(row) if isinstance(row, list | tuple) else None for row in rows]
    grid = [list(rows)] if None in grid else grid
    fig, axes = grid_of(len(grid), max(map(len, grid)), inches, side)
    own = bool(labels) and not isinstance(labels[0], str)
    for r, row in enumerate(grid):
        for c, ax in enumerate(axes[r]):
            if c < len(row) and row[c] is not None:
                ax.imshow(as_pixels(row[c]), interpolation="lanczos")
                label = labels[r][c] if own else labels[c] if r == 0 and c < len(labels) else ""
                ax.set_title(label, fontsize=9, color=INK, family=FONT, pad=3)
            else:
                ax.axis("off")
    if heading:
        title(fig, heading)
    return show(fig, alt or heading, photographic=True)


def grid_of(rows: int, columns: int, inches: float, side: Sequence[str]) -> tuple:
    """A figure of square cells without axis lines, with words on the left where `side` says some."""
    from matplotlib.figure import Figure

    fig = Figure(figsize=(columns * inches + 0.1, rows * (inches + 0.06) + 0.5), dpi=100, layout="constrained")
    axes = np.array(fig.subplots(rows, columns, squeeze=False))
    for r, row in enumerate(axes):
        for ax in row:
            ax.set(xticks=[], yticks=[])
            ax.spines[:].set_visible(False)
        if r < len(side):
            row[0].set_ylabel(side[r], fontsize=9, color=INK, family=FONT)
    return fig, axes


def as_pixels(picture: object) -> np.ndarray:
    """A picture as an array that can be drawn."""
    if isinstance(picture, Tensor):
        if picture.dim() != 3 or picture.shape[0] != 3:
            raise LDMError(f"A tensor of shape {tuple(picture.shape)} is no picture: give (3, H, W) in [-1, 1].")
        return ((picture.detach().float().cpu() / 2 + 0.5).clamp(0, 1).permute(1, 2, 0).numpy() * 255).astype(np.uint8)
    return np.asarray(picture)


def heat(
    maps: Sequence,
    labels: Sequence[str] = (),
    heading: str = "",
    alt: str = "",
    signed: bool = False,
    over: object = None,
    bound: float | None = None,
    inches: float = 1.35,
) -> Shown:
    """Maps (h, w) side by side on one scale, which stands beside them; `over` a picture if one is given.

    `signed` maps are blue below zero and red above. `bound` is the end of the scale, the largest value if left out.
    """
    arrays = [torch.as_tensor(each).detach().float().cpu().numpy() for each in maps]
    bound = bound or max(float(np.abs(each).max()) for each in arrays) or 1.0
    fig, axes = grid_of(1, len(arrays), inches, ())
    low, colors = (-bound, SIGNED) if signed else (0.0, RISING)
    for k, (ax, array) in enumerate(zip(axes[0], arrays, strict=True)):
        if over is not None:
            pixels = as_pixels(over)
            ax.imshow(np.asarray(Image.fromarray(pixels).convert("L")), cmap="gray", vmin=0, vmax=255)
        frame = (
            (-0.5, as_pixels(over).shape[1] - 0.5, as_pixels(over).shape[0] - 0.5, -0.5) if over is not None else None
        )
        drawn = ax.imshow(array, cmap=colors, vmin=low, vmax=bound, extent=frame, alpha=0.65 if over is not None else 1,
                          interpolation="bilinear" if over is not None else "nearest")  # fmt: skip
        ax.set_title(labels[k] if k < len(labels) else "", fontsize=9, color=INK, family=FONT, pad=3)
    bar = fig.colorbar(drawn, ax=list(axes[0]), fraction=0.02, pad=0.01)
    bar.ax.tick_params(labelsize=8, colors=QUIET)
    bar.outline.set_visible(False)
    if heading:
        title(fig, heading)
    return show(fig, alt or heading, photographic=over is not None)


def channels(x: Tensor, heading: str = "", alt: str = "", inches: float = 1.35) -> Shown:
    """The channels of one latent (C, h, w), side by side."""
    labels = [f"channel {c}" for c in range(len(x))]
    return heat(list(x), labels, heading, alt, signed=True, inches=inches)
