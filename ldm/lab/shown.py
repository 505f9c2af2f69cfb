"""A run as the numbers and pictures that a page shows of it (`ldm.lab.page`, parts.js), of one picture of its batch.

    latents, guidance    one signed byte a number: value = byte / 127 * scale, with a scale for each step
    maps                 one byte a number: value = byte / 255 * peak, with a peak for each word
    previews             red, green, blue, a byte each; the decoded pictures stand on a sheet, which is WebP

Shapes: n steps, N = n + 1 with the end of the run; C channels of h x w positions; maps of h' x w'.
"""

import base64
import io
import math
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from ldm.errors import LDMError
from ldm.settings import run_of

if TYPE_CHECKING:
    from ldm.lab.trace import Trace
    from ldm.schedules import Level

MOST_SIDE = 32  # positions along a side of the latents and maps shown: larger ones are averaged down to it
MOST_PIXELS = 256  # along a side of a decoded picture
BLOCK = 16  # WebP's: pictures that begin on one don't stain their neighbours
SHEET, THUMB, QUALITY = 896, 96, 82  # pixels across a sheet, and of a map on it; WebP's
MAGMA = ("#000004", "#1c1044", "#4f127b", "#812581", "#b5367a", "#e55064", "#fb8761", "#fec287", "#fcfdbf")
SHADE = 0.4  # how much of a map's colour is left where the picture below it is black
TAKES_NONE = "This run takes no step: its strength is 0."


class Side(NamedTuple):
    """A side of the page, which shows one run: numbers for the script, and two sheets of pictures, WebP."""

    data: dict
    steps: bytes
    words: bytes | None  # None: there are no maps
    about: str


def read(trace: "Trace", picture: int, letter: str = "") -> Side:
    """All that is shown of one picture of a run. Raises LDMError if there is no such picture."""
    trace.check_picture(picture)
    of = slice(picture, picture + 1)
    x = torch.cat([*(step.x_before[of] for step in trace.steps), trace.result.x0[of]]).float().cpu()  # (N, C, h, w)
    x0 = torch.cat([*(step.x0[of] for step in trace.steps), trace.result.x0[of]])
    decoded = [trace.decode(each[None])[0] for each in x0[:-1]] + [trace.result.images[picture]]
    decoded = [small_picture(image, MOST_PIXELS) for image in decoded]
    steps, grid = sheet(decoded, [str(k + 1) for k in range(len(decoded) - 1)] + ["end"])
    words, maps, note = maps_of(trace, picture)
    pull, unguided = guidance_of(trace, picture)
    led = any(call.residuals is not None for call in trace.record.calls)
    prompt, settings = trace.settings.prompt[picture], headline(trace, picture, led)
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
    return Side(data, steps, laid, f"“{prompt}”, {settings}" if prompt else f"no prompt, {settings}")


def levels_of(trace: "Trace") -> list["Level"]:
    """The levels that the run went through, and the one where it ended: N of them."""
    steps = trace.steps
    return [step.level for step in steps] + [steps[-1].next if steps else trace.schedule[len(trace.schedule)]]


def place(level: "Level") -> float:
    """Where a level lies between noise (0) and picture (1): the angle whose tangent is sigma / alpha, from the end."""
    return 1 - math.atan2(level.sigma, level.alpha) / (math.pi / 2)


def rows_of(trace: "Trace", levels: Sequence["Level"]) -> list[list]:
    """i, t, alpha, sigma and the seconds the step took, of which the end has none."""
    seconds = [*trace.seconds, None]
    return [[row.i, *map(five, row[1:4]), s if s is None else five(s)] for row, s in zip(levels, seconds, strict=True)]


def headline(trace: "Trace", picture: int, led: bool) -> str:
    """The settings of a run in a line; `led` by ControlNets."""
    s = trace.settings
    sigmas = "" if s.sigmas == "spaced" else f", {s.sigmas} levels" if isinstance(s.sigmas, str) else ", levels given"
    parts = [f"seed {s.seeds[picture]}", f"{s.sampler}, {s.steps} steps{sigmas}"]
    guidance = s.guidance
    if trace.distilled:  # then the scale is a number that the network reads, and what pulls is another
        parts.append(f"told a guidance of {guidance:g}")
        guidance = s.true_guidance
    if not trace.distilled or guidance > 1:
        parts.append(f"guidance {guidance:g}" if guidance > 1 else "not guided")
    if s.negative[picture] and guidance > 1:
        parts.append(f"away from “{s.negative[picture]}”")
    if s.strength is not None:
        parts.append(f"strength {s.strength:g}, so {run_of(s.steps, s.strength, s.rule)} of the steps")
    parts += [f"read as {s.dialect}"] if s.dialect != "plain" else []
    parts += [*trace.added, *(["led by ControlNet"] if led else [])]
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
        return [], nothing, trace.note(picture) if trace.steps else TAKES_NONE
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
        return None, "This run is not guided: there is nothing to subtract." if pulls else TAKES_NONE
    norms = [None if pull is None else five(pull.norm().item()) for pull in pulls]
    filled = [torch.zeros_like(there[0]) if pull is None else pull for pull in pulls]
    return {"norm": norms, **signed(pooled(torch.stack(filled)))}, ""


def preview_of(trace: "Trace", x0: Tensor) -> dict:
    """The cheap pictures of latents (N, C, h, w), as bytes: (N, h, w, 3)."""
    pictures = [small_picture(image, MOST_SIDE, Image.Resampling.BOX) for image in trace.preview(x0)]
    pixels = torch.from_numpy(np.stack([np.asarray(each) for each in pictures]))
    return {"height": pixels.shape[1], "width": pixels.shape[2], "bytes": packed(pixels)}


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


def small_picture(image: Image.Image, most: int, filter: Image.Resampling = Image.Resampling.LANCZOS) -> Image.Image:
    """The picture, made smaller where a side is longer than `most`."""
    image = image.copy()
    image.thumbnail((most, most), filter, reducing_gap=None)
    return image


def sheet(images: Sequence[Image.Image], labels: Sequence[str]) -> tuple[bytes, dict]:
    """Pictures of one size in rows, read like a text, with labels below; and where they lie, for the script."""
    width, height = images[0].size
    cell = [math.ceil((side + gap) / BLOCK) * BLOCK for side, gap in ((width, 1), (height, 14))]
    rows = math.ceil(len(images) / max(1, SHEET // cell[0]))
    columns = math.ceil(len(images) / rows)
    whole = Image.new("RGB", (columns * cell[0], rows * cell[1]), "white")
    pen, font = ImageDraw.Draw(whole), ImageFont.load_default(12)
    for k, (image, label) in enumerate(zip(images, labels, strict=True)):
        x, y = k % columns * cell[0], k // columns * cell[1]
        whole.paste(image, (x, y))
        pen.text((x + width / 2, y + height + 1), label, "#555555", font, anchor="ma")
    return webp(whole), {"columns": columns, "cell": cell, "picture": [width, height]}


def lay_all(image: Image.Image, words: Sequence[str], maps: Tensor) -> bytes:
    """Each word's mean map over the picture, on a sheet; as parts.js lays them."""
    table = np.array([[int(stop[k : k + 2], 16) for k in (1, 3, 5)] for stop in MAGMA])
    small = small_picture(image, THUMB)
    grey = np.asarray(small.convert("L"), dtype=np.float32)[..., None] / 255
    laid = []
    for own in maps:
        mean = Image.fromarray((own.mean(0) / (own.max() or 1)).numpy()).resize(small.size, Image.Resampling.BILINEAR)
        stops = np.asarray(mean) * (len(MAGMA) - 1)
        colour = np.stack([np.interp(stops, range(len(MAGMA)), table[:, c]) for c in range(3)], axis=-1)
        laid.append(Image.fromarray((colour * (SHADE + (1 - SHADE) * grey)).astype(np.uint8)))
    return sheet(laid, words)[0]


def webp(image: Image.Image) -> bytes:
    """Half of what JPEG takes for the same pictures."""
    buffer = io.BytesIO()
    image.save(buffer, format="WEBP", quality=QUALITY, method=6)
    return buffer.getvalue()
