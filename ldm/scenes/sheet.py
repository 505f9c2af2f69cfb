"""A contact sheet: many pictures with their captions, for documentation and for our own eyes."""

import textwrap

from PIL import Image, ImageDraw

from .captions import caption
from .render import Picture, render
from .world import PIXELS, sample


def draw(seed: int, split: str = "train") -> tuple[Picture, str]:
    """Sample, render and caption one scene: (picture, caption)."""
    scene = sample(seed, split)
    return render(scene), caption(scene, seed)


def contact_sheet(
    seed: int = 0, rows: int = 4, cols: int = 6, scale: int = 1, split: str = "any", scenes=None, labels=None, **pins
) -> Image.Image:
    """A labelled grid of pictures.

    scale:  enlarges every picture this many times
    scenes: show these (a list, row by row) instead of sampled ones; labels: their texts
    pins:   passed to `sample` (style=..., time=..., ground=..., kind=..., n=...)
    """
    if scenes is None:
        scenes = [sample(seed * 1000 + i, split, **pins) for i in range(rows * cols)]
    if labels is None:
        labels = [caption(scene, seed * 1000 + i) for i, scene in enumerate(scenes)]
    side, text, gap = PIXELS * scale, 46, 8
    sheet = Image.new("RGB", (gap + cols * (side + gap), gap + rows * (side + text + gap)), (250, 249, 245))
    pen = ImageDraw.Draw(sheet)
    for i, (scene, label) in enumerate(zip(scenes, labels, strict=True)):
        left, top = gap + (i % cols) * (side + gap), gap + (i // cols) * (side + text + gap)
        picture = Image.fromarray(render(scene).image)
        sheet.paste(picture.resize((side, side), Image.Resampling.NEAREST), (left, top))
        lines = textwrap.wrap(label, max(8, side // 6))[:4]
        pen.multiline_text((left, top + side + 2), "\n".join(lines), fill=(40, 40, 48), spacing=1)
    return sheet
