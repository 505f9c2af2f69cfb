"""The whole road of one picture on one page: six boxes, and what each hands on. Notebook 00 draws it.

Every shape and number is read from the trace. Lengths are in hundredths of the figure's width.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from ldm.errors import LDMError
from ldm.lab.figures import INK, QUIET, SIGNED, Shown, canvas, show, title
from ldm.lab.trace import Trace, steps_of, texts_at
from ldm.pipeline import Pipeline
from ldm.text.prompts.table import parts_of
from ldm.text.tokenizer import END

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WORDS, NOISE, UNET, STEP, VAE = "#0072b2", "#6e7781", "#d55e00", "#009e73", "#aa3377"  # the boxes' colours


def poster(pipe: Pipeline, trace: Trace, took: Mapping[str, float]) -> Shown:
    """The figure for a trace of one picture, guided. `took`: milliseconds of "1 tokenizer" to "6 VAE decoder"."""
    if pipe.flux:
        raise LDMError("The poster draws a UNet's levels, and FLUX has none: pipe.trace(...).to_html shows its run.")
    fig, ax = canvas(8.6, 5.2)
    ax.set(xlim=(0, 100), ylim=(2, 60))
    ax.axis("off")
    words_half(ax, pipe, trace, took)
    unet_half(ax, pipe, trace, took)
    picture_half(ax, pipe, trace, took)
    title(fig, f"“{trace.settings.prompt[0]}”: six boxes, and what they hand on")
    return show(
        fig, "Sentence, tokens, vectors, UNet, sampler, latent, decoder, picture, with their shapes", colors=256
    )


def box(ax: "Axes", x: float, y: float, number: int, text: str, color: str) -> None:
    """A box's number on a disc, and its name."""
    ax.plot(x, y, "o", markersize=13, color=color)
    ax.text(x, y - 0.1, str(number), color="w", ha="center", va="center", weight="bold", size=8)
    ax.text(x + 1.7, y, text, color=INK, va="center", weight="bold", size=9)


def note(ax: "Axes", x: float, y: float, text: object, color: str = QUIET, **more) -> None:
    ax.text(x, y, text, color=color, **{"ha": "center", "va": "center", "size": 7} | more)


def arrow(ax: "Axes", *points: tuple[float, float], color: str = QUIET) -> None:
    """A line through these points that ends in an arrow."""
    ax.plot(*zip(*points, strict=True), color=color, lw=1.6, solid_joinstyle="round")
    style = dict(arrowstyle="-|>", color=color, lw=1.6, shrinkA=0, shrinkB=0)
    ax.annotate("", points[-1], points[-2], arrowprops=style)


def image(ax: "Axes", corner: tuple, size: tuple, values: object, how: str = "nearest") -> None:
    """Pixels, or numbers from -3 to 3, as a small picture inside the figure."""
    inset = ax.inset_axes([*corner, *size], transform=ax.transData)
    colors = dict(cmap=SIGNED, vmin=-3, vmax=3)
    inset.imshow(values, aspect="auto", interpolation=how, **colors)
    inset.set(xticks=[], yticks=[])
    inset.spines[:].set(visible=True, color=QUIET, linewidth=0.6)


def latent(ax: "Axes", x: float, y: float, values: Tensor, side: float = 11) -> None:
    """The four channels of a latent (1, 4, h, w) as one square."""
    four = torch.cat([torch.cat(list(values[0, :2]), 1), torch.cat(list(values[0, 2:]), 1)])
    image(ax, (x, y), (side, side), (2 * four).round() / 2)  # few colours: a small file
    note(ax, x + side / 2, y - 1.5, tuple(values.shape))


def cost(module: nn.Module, milliseconds: float) -> str:
    millions = sum(each.numel() for each in module.parameters()) / 1e6
    return f"{millions:.1f} M weights, {milliseconds:.0f} ms"


def words_half(ax: "Axes", pipe: Pipeline, trace: Trace, took: Mapping[str, float]) -> None:
    """Boxes 1 and 2: chips for tokens, a row of the heat map for each of their vectors.

    Of a prompt in chunks the first, and of one with other words at other steps what it is at the first.
    """
    prompt, dialect = trace.settings.prompt[0], trace.settings.dialect
    prompt = texts_at(prompt, dialect, *steps_of(trace.settings, trace.schedule))[0]
    chunk = parts_of(pipe.tokenizer, prompt, dialect)[0].chunks[0]
    ids = pipe.tokenizer.frame([token.id for token in chunk])
    box(ax, 2.2, 57.3, 1, "tokenizer", WORDS)
    for k, text in enumerate(["begin", *(token.piece.removesuffix(END) for token in chunk), "end"]):
        x, y = 3.8 + 6.2 * (k % 5), 51.8 - 5.4 * (k // 5)
        ax.bar(x, 4.6, 5.6, y - 2.3, color="w", edgecolor=WORDS, linewidth=0.6)
        note(ax, x, y + 1.0, text, INK)
        note(ax, x, y - 1.1, ids[k], weight="bold")
    note(ax, 16.2, 42, f"{len(ids)} numbers: behind the “end” only more of it")
    arrow(ax, (32.4, 49.2), (37.4, 49.2))
    box(ax, 39.7, 57.3, 2, "text encoder", WORDS)
    context = pipe.encode([prompt], dialect=dialect)
    image(ax, (38.5, 43.8), (24, 11), context[0].round())
    note(ax, 50.5, 42, f"{tuple(context.shape)}; {cost(pipe.text_encoder, took['2 text encoder'])}")


def unet_half(ax: "Axes", pipe: Pipeline, trace: Trace, took: Mapping[str, float]) -> None:
    """Boxes 3 to 5: bars are as high as the resolution inside them, as wide as their channels."""
    bricks, rows, x = trace.record.calls[0].bricks, trace.schedule.levels, 18.6
    box(ax, 2.2, 30.8, 3, f"noise, seed {trace.settings.seeds[0]}", NOISE)
    latent(ax, 1, 16, trace[0].x_before)
    arrow(ax, (12.8, 21.5), (17.4, 21.5))
    box(ax, 33, 33, 4, "UNet, guided", UNET)
    stations = [f"down_blocks.{k}.resnets.0" for k in range(3)] + ["mid_block"]
    stations += [f"up_blocks.{k}.resnets.0" for k in range(3)]
    for y in (28.2, 24.6):  # skips
        ax.plot([20, 38], [y, y], color=UNET, lw=0.8, alpha=0.6)
    for _, channels, height, _ in (bricks[f"unet.{station}"].shape for station in stations):
        ax.bar(x, height, channels / 40, 21.5 - height / 2, align="edge", color=UNET)
        note(ax, x + channels / 80, 21.5, height, "w", size=6)
        note(ax, x + channels / 80, 20.4 - height / 2, channels, size=6)
        x += channels / 40 + 0.45
    arrow(ax, (50.5, 40.4), (50.5, 37.8), (29, 37.8), (29, 26), color=WORDS)
    halves = f"{bricks['unet'].shape}, without and with words; {cost(pipe.unet, took['4 UNet'])}"
    note(ax, 34.2, 9.8, halves)
    arrow(ax, (40.6, 21.5), (44, 21.5))
    latent(ax, 44.8, 17, trace[0].eps, side=9)
    note(ax, 49.3, 27.6, "the noise it sees, ε")
    arrow(ax, (54.4, 21.5), (58, 21.5))
    box(ax, 60, 30.8, 5, "sampler", STEP)
    arc = [(60 + 12 * row.alpha, 14 + 12 * row.sigma) for row in rows]
    ax.plot(*zip(*arc, strict=True), "o-", color=STEP, markersize=4, lw=1)
    note(ax, 66, 12.4, "α: picture")
    note(ax, 60, 20, "σ: noise", rotation=90)
    arrow(ax, (66, 11), (66, 5.4), (15, 5.4), (15, 20.6), color=STEP)
    times = f"{len(trace)} times, at t = {rows[0].t:.0f} to {rows[-2].t:.0f}"
    note(ax, 40, 4, times, weight="bold")


def picture_half(ax: "Axes", pipe: Pipeline, trace: Trace, took: Mapping[str, float]) -> None:
    """Box 6, from the clean latent up to the picture: bars as wide as the resolution."""
    arrow(ax, (72.7, 14.35), (78.7, 14.35), color=STEP)
    latent(ax, 79.5, 6, trace.result.x0)
    box(ax, 75, 29.8, 6, "VAE decoder", VAE)
    levels = [f"vae.decoder.up_blocks.{k}.resnets.1" for k in range(4)]
    shapes = {each.name: each.shape for each in trace.record.beside}
    for k, (*_, width) in enumerate(shapes[level] for level in levels):
        ax.bar(85, 1.6, width / 128 * 24, 18.8 + 2.3 * k, color=VAE)
        note(ax, 85, 19.5 + 2.3 * k, width, "w", size=6)
    pixels = np.asarray(trace.result.images[0])
    image(ax, (73, 34), (24, 24), pixels, "lanczos")
    note(ax, 85, 32.5, f"{shapes['vae.decoder']}; {cost(pipe.vae.decoder, took['6 VAE decoder'])}")
