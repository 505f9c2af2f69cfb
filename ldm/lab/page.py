"""A run as a page to step through: the output of a notebook's cell, or one file of HTML.

    trace.show()                     a slider over the steps: latent, predicted picture, words, guidance
    trace.show(other)                beside it another run, paired step by step
    trace.to_html("run.html")        the same as a page that needs neither a kernel nor a network

The browser draws it (parts.js, stepper.js, stepper.css) from the numbers that `ldm.lab.shown` reads. Where scripts are
blocked, two sheets of pictures stand there instead: what was predicted at each step, and the words' maps.
"""

import base64
import hashlib
import html
import io
import json
from collections.abc import Sequence
from dataclasses import asdict
from importlib import resources
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING

from PIL import Image

from ldm.errors import LDMError
from ldm.io.atomic import atomic_file
from ldm.lab.shown import MAGMA, SHADE, Side, levels_of, place, read

if TYPE_CHECKING:
    from ldm.lab.trace import Trace
    from ldm.schedules import Level
    from ldm.settings import Settings

MARK = '<meta name="generator" content="ldm explain">'  # by which a page of ours is known, in its first lines


class Stepper:
    """What `show` returns. A notebook shows it as the last thing of a cell, or by `display(...)`."""

    def __init__(self, runs: Sequence[Side], text: str):
        self.runs, self.html = runs, text

    def __repr__(self) -> str:
        return f"<stepper: {' | '.join(run.about for run in self.runs)}>"

    def _repr_mimebundle_(self, include: object = None, exclude: object = None) -> dict:
        buffer = io.BytesIO()  # notebooks know no output of WebP
        Image.open(io.BytesIO(self.runs[0].steps)).save(buffer, format="JPEG")
        picture = base64.b64encode(buffer.getvalue()).decode()
        return {"text/html": self.html, "image/jpeg": picture, "text/plain": repr(self)}


def show(trace: "Trace", other: "Trace | None" = None, picture: int = 0, other_picture: int | None = None) -> Stepper:
    """The stepper for a notebook. A place that shows no HTML shows the pictures of the steps.

    other            a second run beside it
    picture          which of a batch
    other_picture    which of the other run's, or of this one's if there is no other; left out, it is as `picture`, or
                     the only one

    Raises LDMError if a run has no such picture.
    """
    if other is None and other_picture is not None:
        other = trace
    if other is None:
        runs = [read(trace, picture)]
        return Stepper(runs, compose(runs, [trace], [picture]))
    if not isinstance(other, type(trace)):
        raise LDMError(
            f"other is a second run, a Trace (pipe.trace), not a thing of type {type(other).__name__}: a picture of "
            "a batch is chosen by its number, such as picture=1."
        )
    if other_picture is None:
        other_picture = picture if len(other.settings.seeds) > 1 else 0
    runs = [read(trace, picture, "A"), read(other, other_picture, "B")]
    return Stepper(runs, compose(runs, [trace, other], [picture, other_picture]))


def write(
    trace: "Trace",
    path: str | Path,
    other: "Trace | None" = None,
    picture: int = 0,
    other_picture: int | None = None,
) -> None:
    """Write the stepper as one page, whole or not at all. Raises LDMError as `show` does, or if that cannot be."""
    stepper = show(trace, other, picture, other_picture)
    title = html.escape(trace.settings.prompt[picture] or "no prompt")
    page = Template(source("stepper.html")).substitute(mark=MARK, title=title, stepper=stepper.html)
    with atomic_file(path, "w") as file:
        file.write(page)


def is_page(path: str | Path) -> bool:
    """Whether a file is a page that `write` wrote."""
    with open(path, "rb") as file:
        return MARK.encode() in file.read(200)


def source(name: str) -> str:
    return resources.files("ldm.lab").joinpath(name).read_text(encoding="utf-8")


# ------------------------------------------------------------------------------------------ the piece of HTML


def compose(runs: Sequence[Side], traces: Sequence["Trace"], pictures: Sequence[int]) -> str:
    """The pictures that stand where scripts are blocked, and the script that takes their place: a piece of HTML that
    needs nothing from elsewhere, and disturbs nothing around it.
    """
    levels = [levels_of(trace) for trace in traces]
    data = {"runs": [run.data for run in runs], "pairs": [[k] for k in range(len(levels[0]))]}
    data |= {"ramp": MAGMA, "shade": SHADE}
    if len(traces) == 2:
        data["pairs"], data["paired"] = pair(*levels)
        data["differs"] = differences(*(trace.settings for trace in traces), *pictures)
    data["token"] = hashlib.sha256(json.dumps(data).encode()).hexdigest()[:16]  # the same run makes the same page
    constants = [constant("DATA", data), constant("STYLE", tight(source("stepper.css")))]
    script = "\n".join([*constants, tight(source("parts.js")), tight(source("stepper.js"))])
    # Of the notebook's keys none may act while the focus is here: that is what JupyterLab's attribute says.
    return (
        f'<div data-ldm-stepper="{data["token"]}" data-lm-suppress-shortcuts="true">\n'
        + "\n".join(fallback(run, k) for k, run in enumerate(runs))
        + f"\n</div>\n<script>\n(() => {{\n{script}\n}})();\n</script>\n"
    )


def constant(name: str, value: object) -> str:
    """A line of script. In one, "</script>" would end it wherever it stood, so it holds no "<" at all."""
    return f"const {name} = {json.dumps(value)};".replace("<", r"\u003c")


def tight(text: str) -> str:
    """A script or style without indentation and lines of comment: an eighth of it."""
    lines = (line.strip() for line in text.splitlines())
    return "\n".join(line for line in lines if line and not line.startswith(("//", "/**")))


def fallback(run: Side, k: int) -> str:
    """A run as pictures alone. No styles, for where scripts are blocked, those are as well."""
    about = html.escape(run.about)
    n = len(run.data["rows"]) - 1
    lines = [
        f"<p><b>{about}</b></p>",
        figure(run.steps, f"{n} predicted pictures and the result of the run {about}", f'data-run="{k}"'),
        "<p>What is predicted at each step, from noise to picture; last the picture itself.</p>",
    ]
    if run.words is not None:
        said = html.escape(", ".join(word["text"] for word in run.data["words"]))
        lines += [figure(run.words, f"Attention maps over the picture, for the words {said}")]
        lines += ["<p>Attention to each word, the mean over all steps, laid over the picture.</p>"]
    return "\n".join(lines)


def figure(picture: bytes, alt: str, more: str = "") -> str:
    """A picture that is in the page itself; `alt` is escaped already."""
    width, height = Image.open(io.BytesIO(picture)).size
    data = base64.b64encode(picture).decode()
    return f'<p><img {more} width="{width}" height="{height}" alt="{alt}" src="data:image/webp;base64,{data}"></p>'


# ------------------------------------------------------------------------------------------ two runs


def pair(a: Sequence["Level"], b: Sequence["Level"]) -> tuple[list[list[int]], str]:
    """For each step of the longer run, [step of a, step of b]; and the sentence that says how they were paired."""
    if [place(level) for level in a] == [place(level) for level in b]:
        return [[k, k] for k in range(len(a))], "Both runs visit the same noise levels."
    (long, first), (short, second) = sorted([(a, "A"), (b, "B")], key=lambda run: -len(run[0]))  # stable: A, if equal
    nearest = [nearest_row(level, short) for level in long[:-1]] + [len(short) - 1]  # the ends belong together
    pairs = [[k, j] if first == "A" else [j, k] for k, j in enumerate(nearest)]
    return pairs, (
        f"The runs visit other noise levels: beside each step of {first} stands the one of {second} whose place "
        "between noise and picture is nearest."
    )


def nearest_row(level: "Level", levels: Sequence["Level"]) -> int:
    """Which of the steps at `levels`, of which the last is the end, lies nearest; without steps the end."""
    return min(range(len(levels) - 1), key=lambda k: abs(place(levels[k]) - place(level)), default=0)


def differences(a: "Settings", b: "Settings", picture: int, other_picture: int) -> str:
    """In which settings a picture of one run and a picture of another differ: a sentence."""
    mine, theirs = settings_of(a, picture), settings_of(b, other_picture)
    found = [
        name if name == "prompt" else f"{name} ({tell(mine[name])} | {tell(theirs[name])})"
        for name in mine
        if mine[name] != theirs[name]
    ]
    if found:
        return f"A and B differ in {', '.join(found)}."
    return "A and B have the same settings, to which models, given pictures and ControlNets don't belong."


def settings_of(settings: "Settings", picture: int) -> dict:
    """The settings of one picture of a batch."""
    fields = asdict(settings)
    own = {"seed": fields.pop("seeds"), "prompt": fields.pop("prompt"), "negative": fields.pop("negative")}
    return {name: values[picture] for name, values in own.items()} | fields


def tell(value: object) -> str:
    if isinstance(value, tuple):
        return ", ".join(map(tell, value))
    if isinstance(value, str):
        return value or "“”"
    return "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
