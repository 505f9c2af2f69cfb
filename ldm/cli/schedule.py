"""`ldm schedule`: the table of noise levels that a run would take, or a plot of it. No weights are read."""

import argparse
import io
import math
from pathlib import Path
from typing import TYPE_CHECKING

from ldm.cli.options import LEVELS, add_levels, add_model, allow_pickle, said, whole
from ldm.errors import LDMError
from ldm.io.atomic import check_writable
from ldm.io.png import read_settings, save_png

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from PIL import Image

    from ldm.schedules import Schedule
    from ldm.settings import Defaults, Levels

HELP = """Print the levels of noise that a run visits: timestep, alpha, sigma and sigma/alpha, row by row.

  ldm schedule
  ldm schedule --sampler heun --steps 10 --sigmas karras
  ldm schedule --model my-model --plot levels.png

A row is x = alpha * picture + sigma * noise. Reads only the model's scheduler file and its ldm.json."""


def add(commands: "argparse._SubParsersAction") -> None:
    p = commands.add_parser("schedule", help="print or plot the levels of noise of a run", description=HELP)
    p.set_defaults(run=run, parser=p)
    add_model(p)
    allow_pickle(p)
    p.add_argument("--plot", metavar="PNG", help="draw the levels instead of printing them (needs matplotlib)")
    levels = p.add_argument_group("the levels (what is left out is as the model's folder says)")
    add_levels(levels)
    levels.add_argument(
        "--tokens",
        type=whole(1),
        metavar="N",
        help="patches of a picture, where flow's levels depend on it (default: of the model's own size; FLUX's are of "
        "16 x 16 pixels)",
    )


def run(args: argparse.Namespace) -> None:
    from ldm.loading import find_schedule
    from ldm.settings import choose_levels

    config, defaults = find_schedule(args.model, args.allow_pickle)
    levels = choose_levels(config, defaults, **said(args, LEVELS))
    tokens = args.tokens or patches(defaults) if config.use_dynamic_shifting else args.tokens
    schedule = levels.schedule(config, tokens)
    title = headline(levels) + (f", {tokens} patches" if config.use_dynamic_shifting else "")
    if args.plot is None:
        print(title, schedule.table(), *lands(schedule), sep="\n")
    else:
        prepare_plot(Path(args.plot))
        save_png(picture(plot(schedule, title)), args.plot, {"plot": title})
        print(args.plot)


def patches(defaults: "Defaults") -> int:
    """How many patches of 16 x 16 pixels a picture of the model's own size has: FLUX's is of 1024 x 1024."""
    width, height = defaults.width or 1024, defaults.height or 1024
    return width // 16 * (height // 16)


def headline(levels: "Levels") -> str:
    """Rule, sigmas, sampler, in a line."""
    if levels.timesteps is not None:
        sigmas = "of the timesteps given"
    else:
        sigmas = levels.sigmas if isinstance(levels.sigmas, str) else "as given"
    steps = "1 step" if levels.steps == 1 else f"{levels.steps} steps"
    compat = ", as diffusers does" if levels.compat else ""
    return f"rule {levels.rule}, sigmas {sigmas}, sampler {levels.sampler}, {steps}{compat}"


def lands(schedule: "Schedule") -> list[str]:
    """Where diffusers' steps, under `compat`, end on other levels than the next rows."""
    pairs = [(schedule.step(i)[1], schedule[i + 1]) for i in range(len(schedule))]
    if all((land.alpha, land.sigma) == (row.alpha, row.sigma) for land, row in pairs):
        return []
    return [f"but diffusers' steps land on t = {', '.join(f'{land.t:g}' for land, _ in pairs)}"]


# ------------------------------------------------------------------------------------------ the plot

BLUE, RED, DARK, GREY, PALE = "#2f6db3", "#c8502d", "#2b2b2b", "#9a9a9a", "#e4e4e4"


def prepare_plot(path: Path) -> None:
    """See that the plot can be written, and that nothing is lost but a plot of ours."""
    if path.suffix.lower() != ".png":
        raise LDMError(f"--plot {path} must end in .png.")
    check_writable(path)
    if path.exists():
        try:
            ours = "plot" in read_settings(path)
        except LDMError:
            ours = False
        if not ours:
            raise LDMError(f"{path} is there already and is no plot by ldm: choose another name for --plot.")


def plot(schedule: "Schedule", title: str) -> "Figure":
    """Three panels over the rows: alpha and sigma, their ratio on a logarithmic scale, the timestep."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise LDMError("--plot needs matplotlib: python -m pip install matplotlib.") from error
    rows = schedule.levels
    figure = Figure(figsize=(12, 4.2), dpi=150, layout="constrained", facecolor="white")
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.08)
    figure.suptitle(title, x=0.01, ha="left", fontsize=12.5, color=DARK)
    mix, ratio, time = figure.subplots(1, 3)
    for axes, name in ((mix, "alpha and sigma"), (ratio, "sigma / alpha, logarithmic"), (time, "timestep t")):
        style(axes, name, len(schedule))
    for name, color in (("alpha", BLUE), ("sigma", RED)):
        line(mix, [(r.i, getattr(r, name)) for r in rows], color)
        end = (rows[-1].i, getattr(rows[-1], name))
        mix.annotate(name, end, xytext=(7, 0), textcoords="offset points", va="center", fontsize=10, color=color)
    mix.set_ylim(-0.04, 1.04)
    logarithmic(ratio, schedule)
    line(time, [(r.i, r.t) for r in rows], DARK)
    time.set_ylim(bottom=-0.04 * max(r.t for r in rows))
    return figure


def style(axes: "Axes", name: str, n: int) -> None:
    axes.set_title(name, loc="left", fontsize=10.5, color=DARK)
    axes.set_xlabel("row", color=DARK)
    axes.set_xlim(-0.03 * n - 0.1, 1.03 * n + 0.1)
    stride = next(k for k in (1, 2, 5, 10, 20, 25, 50, 100, 200) if n <= 6 * k or k == 200)
    ticks = [i for i in range(0, n, stride) if n - i > stride / 2]
    axes.set_xticks([*ticks, n])  # the last row is the one to look for
    axes.grid(color=PALE, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(GREY)
    axes.tick_params(which="both", color=GREY, labelcolor=DARK, labelsize=9)


def line(axes: "Axes", points: list[tuple[int, float]], color: str) -> None:
    size = 4.5 if len(points) <= 60 else 0  # beyond that, dots would only thicken the line
    axes.plot(*zip(*points, strict=True), color=color, linewidth=1.3, marker="o", markersize=size)


def logarithmic(axes: "Axes", schedule: "Schedule") -> None:
    """sigma / alpha; a row that no logarithm holds is an arrow at the edge that it lies behind."""
    from matplotlib.ticker import FuncFormatter, NullFormatter

    axes.set_yscale("log")
    within = [(r.i, r.ratio) for r in schedule.levels if 0 < r.ratio < math.inf]
    values = [value for _, value in within] or [1.0]
    low, high = min(values), max(values)
    room = max((high / low) ** 0.1, 1.3)
    low, high = low / room, high * room
    axes.set_ylim(low, high)
    plain = FuncFormatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_major_formatter(plain)
    axes.yaxis.set_minor_formatter(plain if high < 8 * low else NullFormatter())
    if within:
        line(axes, within, DARK)
    for r in schedule.levels:
        if r.ratio in (0, math.inf):
            edge, mark, word, near = (low, "v", "0", -1) if r.ratio == 0 else (high, "^", "infinite", 1)
            neighbour = [point for point in within if point[0] == r.i + near]
            if neighbour:
                axes.plot(*zip((r.i, edge), *neighbour, strict=True), color=DARK, linewidth=1.3, linestyle=":")
            axes.plot(r.i, edge, marker=mark, color=DARK, markersize=6.5, clip_on=False)
            axes.annotate(word, (r.i, edge), xytext=(8, -7 if near > 0 else 2), textcoords="offset points", fontsize=9)


def picture(figure: "Figure") -> "Image.Image":
    from PIL import Image

    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return Image.open(buffer).convert("RGB")
