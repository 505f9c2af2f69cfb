"""A run as a page to step through: the output of a notebook's cell, or one file of HTML.

    trace.show()                     a slider over the steps: latent, predicted picture, words, guidance
    trace.show(other)                beside it another run, paired step by step
    trace.to_html("run.html")        the same as a page that needs neither a kernel nor a network

The browser draws it (stepper.js, stepper.css) from these numbers of one picture:

    latents, guidance    one signed byte a number: value = byte / 127 * scale, with a scale for each step
    maps                 one byte a number: value = byte / 255 * peak, with a peak for each word
    previews             red, green, blue; the decoded pictures are JPEG, all steps on one sheet

Where scripts are blocked, that sheet and one of the words' maps stand there instead.
Shapes: n steps, N = n + 1 with the end of the run; C channels of h x w positions; maps of h' x w'.
"""

import base64
import hashlib
import html as escaping
import io
import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from importlib import resources
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from ldm.errors import LDMError
from ldm.io.atomic import atomic_file

if TYPE_CHECKING:
    from ldm.lab.trace import Trace
    from ldm.schedules import Level
    from ldm.settings import Settings

MARK = '<meta name="generator" content="ldm explain">'  # by which a page of ours is known, in its first lines
MOST_SIDE = 32  # positions along a side of the latents and maps shown: larger ones are averaged down to it
MOST_PIXELS = 256  # along a side of a decoded picture
BLOCK = 16  # JPEG's, with its colours halved: pictures that begin on one don't stain their neighbours
SHEET, QUALITY = 896, 80  # pixels across a sheet; JPEG's
MAGMA = ("#000004", "#1c1044", "#4f127b", "#812581", "#b5367a", "#e55064", "#fb8761", "#fec287", "#fcfdbf")
SHADE = 0.4  # how much of a map's colour is left where the picture below it is black


class Run(NamedTuple):
    """What is shown of one run: numbers for the script, and two sheets of pictures, JPEG."""

    data: dict
    steps: bytes
    words: bytes | None
    about: str


class Stepper:
    """What `show` returns. A notebook shows it as the last thing of a cell, or by `display(...)`."""

    def __init__(self, runs: Sequence[Run], text: str):
        self.runs, self.html = runs, text

    def __repr__(self) -> str:
        return f"<stepper: {' | '.join(run.about for run in self.runs)}>"

    def _repr_mimebundle_(self, include: object = None, exclude: object = None) -> dict:
        picture = base64.b64encode(self.runs[0].steps).decode()
        return {"text/html": self.html, "image/jpeg": picture, "text/plain": repr(self)}


def show(trace: "Trace", other: "Trace | None" = None, picture: int = 0) -> Stepper:
    """The stepper for a notebook. A place that shows no HTML shows the pictures of the steps.

    `other` is a second run beside it, `picture` which of a batch. Raises LDMError if a run has no such picture.
    """
    traces = [trace] if other is None else [trace, other]
    runs = [read(each, picture, letter) for each, letter in zip(traces, "AB" if other else [""], strict=True)]
    return Stepper(runs, compose(runs, traces, picture))


def html(trace: "Trace", other: "Trace | None" = None, picture: int = 0) -> str:
    """The stepper as a piece of HTML that needs nothing from elsewhere, and disturbs nothing around it."""
    return show(trace, other, picture).html


def write(trace: "Trace", path: str | Path, other: "Trace | None" = None, picture: int = 0) -> None:
    """Write the stepper as one page, whole or not at all. Raises LDMError as `show` does, or if that cannot be."""
    stepper = show(trace, other, picture)
    title = escaping.escape(trace.settings.prompt[picture] or "no prompt")
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


def compose(runs: Sequence[Run], traces: Sequence["Trace"], picture: int) -> str:
    """The pictures that stand where scripts are blocked, and the script that takes their place."""
    levels = [levels_of(trace) for trace in traces]
    data = {"runs": [run.data for run in runs], "pairs": [[k] for k in range(len(levels[0]))]}
    data |= {"ramp": MAGMA, "shade": SHADE}
    if len(traces) == 2:
        data["pairs"], data["paired"] = pair(*levels)
        data["differs"] = differences(*(trace.settings for trace in traces), picture)
    data["token"] = hashlib.sha256(json.dumps(data).encode()).hexdigest()[:16]  # the same run makes the same page
    parts = {"DATA": data, "STYLE": source("stepper.css")}
    # In a script "</script>" would end it, wherever it stands; all beyond ASCII is written as \uXXXX.
    constants = [f"const {name} = {json.dumps(value).replace('<', chr(92) + 'u003c')};" for name, value in parts.items()]
    script = "\n".join([*constants, source("stepper.js")])
    # Of the notebook's keys none may act while the focus is here: that is what JupyterLab's attribute says.
    return (
        f'<div data-ldm-stepper="{data["token"]}" data-lm-suppress-shortcuts="true">\n'
        + "\n".join(fallback(run, k) for k, run in enumerate(runs))
        + f"\n</div>\n<script>\n(() => {{\n{script}}})();\n</script>\n"
    )


def fallback(run: Run, k: int) -> str:
    """A run as pictures alone. No styles, for where scripts are blocked, those are as well."""
    about = escaping.escape(run.about)
    n = len(run.data["rows"]) - 1
    lines = [
        f"<p><b>{about}</b></p>",
        figure(run.steps, f"{n} predicted pictures and the result of the run {about}", f'data-run="{k}"'),
        "<p>What is predicted at each step, from noise to picture; last the picture itself.</p>",
    ]
    if run.words is not None:
        said = escaping.escape(", ".join(word["text"] for word in run.data["words"]))
        lines += [figure(run.words, f"Attention maps over the picture, for the words {said}")]
        lines += ["<p>Attention to each word, the mean over all steps, laid over the picture.</p>"]
    return "\n".join(lines)


def figure(jpeg: bytes, alt: str, more: str = "") -> str:
    """A picture that is in the page itself; `alt` is escaped already."""
    width, height = Image.open(io.BytesIO(jpeg)).size
    data = base64.b64encode(jpeg).decode()
    return f'<p><img {more} width="{width}" height="{height}" alt="{alt}" src="data:image/jpeg;base64,{data}"></p>'


# ------------------------------------------------------------------------------------------ two runs


def pair(a: Sequence["Level"], b: Sequence["Level"]) -> tuple[list[list[int]], str]:
    """For each step of the longer run, [step of a, step of b]; and the sentence that says how they were paired."""
    n, m = len(a) - 1, len(b) - 1
    if [place(level) for level in a] == [place(level) for level in b]:
        return [[k, k] for k in range(n + 1)], "Both runs visit the same noise levels."
    long, other = (a, b) if n >= m else (b, a)
    nearest = [
        min(range(len(other) - 1), key=lambda j: abs(place(other[j]) - place(level)), default=0) for level in long[:-1]
    ]
    nearest.append(len(other) - 1)  # the ends belong together
    pairs = [[k, j] if n >= m else [j, k] for k, j in enumerate(nearest)]
    first, second = ("A", "B") if n >= m else ("B", "A")
    return pairs, (
        f"The runs visit other noise levels: beside each step of {first} stands the one of {second} whose place "
        "between noise and picture is nearest."
    )


def place(level: "Level") -> float:
    """Where a level lies between noise (0) and picture (1): the angle whose tangent is sigma / alpha, from the end."""
    return 1 - math.atan2(level.sigma, level.alpha) / (math.pi / 2)


def differences(a: "Settings", b: "Settings", picture: int) -> str:
    """In which settings two runs differ: a sentence."""
    mine, theirs = (settings_of(each, picture) for each in (a, b))
    found = [f"{name} ({tell(mine[name])} | {tell(theirs[name])})" for name in mine if mine[name] != theirs[name]]
    return f"A and B differ in {', '.join(found)}." if found else "A and B have the same settings."


def settings_of(settings: "Settings", picture: int) -> dict:
    """The settings of one picture of a batch."""
    fields = asdict(settings)
    seed = fields.pop("seeds")[picture]
    return {name: fields[name][picture] for name in ("prompt", "negative")} | {"seed": seed} | {
        name: value for name, value in fields.items() if name not in ("prompt", "negative")
    }


def tell(value: object) -> str:
    if isinstance(value, tuple):
        return ", ".join(map(tell, value))
    return f"{value:g}" if isinstance(value, float) else f"“{value}”" if value == "" else str(value)


# ------------------------------------------------------------------------------------------ reading a run


def read(trace: "Trace", picture: int, letter: str = "") -> Run:
    """All that is shown of one picture of a run. Raises LDMError if there is no such picture."""
    count = len(trace.settings.seeds)
    if not 0 <= picture < count:
        there = "one picture, number 0" if count == 1 else f"the pictures 0 to {count - 1}"
        raise LDMError(f"The run drew {there}: it has no picture {picture}.")
    of = slice(picture, picture + 1)
    x = torch.cat([*(step.x_before[of] for step in trace.steps), trace.result.x0[of]]).float().cpu()  # (N, C, h, w)
    x0 = torch.cat([*(step.x0[of] for step in trace.steps), trace.result.x0[of]])
    decoded = [trace.decode(each[None])[0] for each in x0[:-1]] + [trace.result.images[picture]]
    decoded = [small_picture(image) for image in decoded]
    steps, grid = sheet(decoded, [str(k + 1) for k in range(len(decoded) - 1)] + ["end"])
    words, maps, note = maps_of(trace, picture)
    pull, unguided = guidance_of(trace, picture)
    prompt, settings = trace.settings.prompt[picture], headline(trace.settings, picture)
    small, levels = pooled(x), levels_of(trace)
    data = {
        "letter": letter, "settings": settings, "notes": [note] if note else [], "unguided": unguided,
        "sentence": pieces(prompt, words), "rows": rows_of(trace, levels), "places": [place(level) for level in levels],
        "channels": x.shape[1], "height": small.shape[2], "width": small.shape[3],
        "shrunk": "" if small.shape == x.shape else f", averaged down from {x.shape[2]} × {x.shape[3]}",
        "x": signed(small), "guidance": pull, "preview": preview_of(trace, x0), "sheet": grid,
        "maps": list(maps.shape[2:]), "words": words_of(words, maps),
    }  # fmt: skip
    laid = lay_all(decoded[-1], words, maps) if words else None
    return Run(data, steps, laid, f"“{prompt}”, {settings}" if prompt else f"no prompt, {settings}")


def levels_of(trace: "Trace") -> list["Level"]:
    """The levels that the run went through, and the one where it ended: N of them."""
    steps = trace.steps
    return [step.level for step in steps] + [steps[-1].next if steps else trace.schedule[len(trace.schedule)]]


def rows_of(trace: "Trace", levels: Sequence["Level"]) -> list[list]:
    """i, t, alpha, sigma and the seconds the step took, of which the end has none."""
    seconds = [*trace.seconds, None]
    return [[row.i, *map(five, row[1:4]), s if s is None else five(s)] for row, s in zip(levels, seconds, strict=True)]


def headline(settings: "Settings", picture: int) -> str:
    """The settings of a run in a line."""
    s = settings
    sigmas = "" if s.sigmas == "spaced" else f", {s.sigmas} levels" if isinstance(s.sigmas, str) else ", levels given"
    parts = [f"seed {s.seeds[picture]}", f"{s.sampler}, {s.steps} steps{sigmas}"]
    parts.append(f"guidance {s.guidance:g}" if s.guidance > 1 else "not guided")
    if s.negative[picture] and s.guidance > 1:
        parts.append(f"away from “{s.negative[picture]}”")
    if s.strength is not None:
        parts.append(f"strength {s.strength:g}, so {s.steps - s.first} of the steps")
    return " · ".join([*parts, f"{s.width} × {s.height} pixels"])


def pieces(prompt: str, words: Sequence[str]) -> list[list]:
    """The prompt in pieces [text, k]: its k-th word, or -1 for what stands between words or was cut off.

    Where a word isn't found as it stands, for the tokenizer writes some otherwise, the words follow each other.
    """
    found, at, lower = [], 0, prompt.lower()
    for k, word in enumerate(words):
        start = lower.find(word.lower(), at) if len(lower) == len(prompt) else -1
        if start < 0:
            return [[word, k] for k, word in enumerate(words)]
        found += [[prompt[at:start].strip(), -1], [prompt[start : start + len(word)], k]]
        at = start + len(word)
    return [piece for piece in [*found, [prompt[at:].strip(), -1]] if piece[0]] or [["(no words)", -1]]


def maps_of(trace: "Trace", picture: int) -> tuple[list[str], Tensor, str]:
    """Words, their maps (words, n, h', w'), and a sentence where something about them is missing."""
    nothing, words = torch.zeros(0, len(trace.steps), 1, 1), trace.words[picture]
    if not words or not trace.steps:
        return [], nothing, "" if trace.steps else "This run takes no step: its strength is 0."
    record, note = trace.record, ""
    try:
        if record.maps.every_call:
            maps = [[record.map(w.tokens, step=s.i, picture=picture) for s in trace.steps] for w in words]
        else:
            note = "The attention maps are the mean over all steps: single ones took more memory than was given."
            maps = [[record.map(w.tokens, picture=picture)] * len(trace.steps) for w in words]
    except LDMError as error:
        return [], nothing, f"Without attention maps. {error}"
    stacked = torch.stack([torch.stack(own) for own in maps]).float().cpu()
    return [word.text for word in words], pooled(stacked), note


def words_of(words: Sequence[str], maps: Tensor) -> list[dict]:
    """Each word's maps as bytes. The key tells the second "red" of a sentence from its first."""
    seen, found = Counter(), []
    for text, own in zip(words, maps, strict=True):
        seen[text.lower()] += 1
        peak = five(own.max().item()) or 1.0
        found.append({"text": text, "key": f"{text.lower()} {seen[text.lower()]}", "peak": peak})
        found[-1]["bytes"] = packed((own / peak * 255).round().clamp(0, 255).to(torch.uint8))
    return found


def guidance_of(trace: "Trace", picture: int) -> tuple[dict | None, str]:
    """cond - uncond at every step and its norm, None where a step isn't guided; or a sentence, of a run without."""
    pulls = [None if s.uncond is None else (s.cond - s.uncond)[picture].float().cpu() for s in trace.steps]
    there = [pull for pull in pulls if pull is not None]
    if not there:
        return None, "This run is not guided: the UNet is asked once a step, and there is nothing to subtract."
    norms = [None if pull is None else five(pull.norm().item()) for pull in pulls]
    filled = [torch.zeros_like(there[0]) if pull is None else pull for pull in pulls]
    return {"norm": norms, **signed(pooled(torch.stack(filled)))}, ""


def preview_of(trace: "Trace", x0: Tensor) -> dict:
    """The cheap pictures of latents (N, C, h, w), as bytes."""
    return {}


# ------------------------------------------------------------------------------------------ numbers and pictures


def five(number: float) -> float:
    """Five significant digits, which is more than the page shows."""
    return float(f"{number:.5g}")


def packed(numbers: Tensor) -> str:
    """Bytes as text."""
    return base64.b64encode(numbers.contiguous().numpy().tobytes()).decode()


def pooled(x: Tensor) -> Tensor:
    """(..., h, w), averaged down to at most `MOST_SIDE` along a side."""
    factor = max(1, max(x.shape[-2:]) / MOST_SIDE)
    if factor == 1:
        return x
    size = [max(1, round(side / factor)) for side in x.shape[-2:]]
    return adaptive_avg_pool2d(x, size)


def signed(x: Tensor) -> dict:
    """(n, C, h, w) as a signed byte a number, and how much 127 is worth at each step: off by half of scale / 127."""
    scale = [five(each.abs().max().item()) or 1.0 for each in x]
    share = x / torch.tensor(scale)[:, None, None, None]
    return {"scale": scale, "bytes": packed((share * 127).round().clamp(-127, 127).to(torch.int8))}


def small_picture(image: Image.Image) -> Image.Image:
    image = image.copy()
    image.thumbnail((MOST_PIXELS, MOST_PIXELS), Image.Resampling.LANCZOS)
    return image


def sheet(images: Sequence[Image.Image], labels: Sequence[str]) -> tuple[bytes, dict]:
    """Pictures of one size in rows, read like a text, with labels below; and where they lie, for the script."""
    width, height = images[0].size
    cell = [math.ceil((side + gap) / BLOCK) * BLOCK for side, gap in ((width, 1), (height, 14))]
    columns = min(len(images), max(1, SHEET // cell[0]))
    whole = Image.new("RGB", (columns * cell[0], math.ceil(len(images) / columns) * cell[1]), "white")
    pen, font = ImageDraw.Draw(whole), ImageFont.load_default(12)
    for k, (image, label) in enumerate(zip(images, labels, strict=True)):
        x, y = k % columns * cell[0], k // columns * cell[1]
        whole.paste(image, (x, y))
        pen.text((x + width / 2, y + height + 1), label, "#555555", font, anchor="ma")
    return jpeg(whole), {"columns": columns, "cell": cell, "picture": [width, height]}


def lay_all(image: Image.Image, words: Sequence[str], maps: Tensor) -> bytes:
    """Each word's mean map over the picture, on a sheet; as stepper.js lays them."""
    table = np.array([[int(stop[k : k + 2], 16) for k in (1, 3, 5)] for stop in MAGMA])
    small = image.copy()
    small.thumbnail((96, 96))
    grey = np.asarray(small.convert("L"), dtype=np.float32)[..., None] / 255
    laid = []
    for own in maps.mean(1):
        share = Image.fromarray((own / own.max().clamp(min=1e-12)).numpy()).resize(small.size, Image.Resampling.BILINEAR)
        stops = np.asarray(share).clip(0, 1) * (len(MAGMA) - 1)
        colour = np.stack([np.interp(stops, range(len(MAGMA)), table[:, c]) for c in range(3)], axis=-1)
        laid.append(Image.fromarray((colour * (SHADE + (1 - SHADE) * grey)).astype(np.uint8)))
    return sheet(laid, words)[0]


def jpeg(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=QUALITY, optimize=True)
    return buffer.getvalue()
