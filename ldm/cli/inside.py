"""`--save-steps`: the clean picture that the model predicts at every step, and a contact sheet of them all."""

import math
from pathlib import Path
from typing import TYPE_CHECKING

from ldm.cli.jobs import make_folder
from ldm.cli.record import BEFORE, DECIDES, differences
from ldm.errors import LDMError
from ldm.io.png import read_settings, save_png

if TYPE_CHECKING:
    from PIL import Image

    from ldm.schedules import Level

THUMB, LABEL, GAP = 192, 18, 4  # pixels: the longer side of a picture on the sheet, the line under it, the margin
SHEET = "contact-sheet.png"


class Inside:
    """Writes what the model predicts of one picture, step by step, into `folder`; what another run left there goes."""

    def __init__(self, folder: Path, record: dict):
        self.folder, self.record = folder, record
        self.thumbs = []  # (a small picture, its label)
        make_folder(folder)
        for path in files(folder) if other_run(folder, record) else ():
            path.unlink()

    def add(self, image: "Image.Image", level: "Level") -> None:
        """The prediction made at `level`."""
        name = f"step-{len(self.thumbs):02d}.png"  # a run may begin midway, and go over the picture twice
        save_png(image, self.folder / name, self.record | {"step": level.i, "t": level.t})
        thumb = image.copy()
        thumb.thumbnail((THUMB, THUMB))
        self.thumbs.append((thumb, f"{level.i}   t = {level.t:g}"))

    def finish(self) -> None:
        if self.thumbs:  # of strength 0 there is no step
            save_png(contact_sheet(self.thumbs), self.folder / SHEET, self.record | {"step": "all"})


def files(folder: Path) -> list[Path]:
    return sorted([*folder.glob("step-*.png"), *folder.glob(SHEET)])


def other_run(folder: Path, record: dict) -> str | None:
    """Why `folder` may not be used without asking: it shows another run than that of `record`. None if it may."""
    for path in files(folder):
        try:
            same = not differences(BEFORE | read_settings(path), record, tuple(DECIDES))
        except LDMError:
            same = False
        if not same:
            return f"{path} belongs to another run"
    return None


def contact_sheet(thumbs: "list[tuple[Image.Image, str]]") -> "Image.Image":
    """Pictures in rows, read like a text, each with its label below."""
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.load_default()
    width = max(max(image.width, math.ceil(font.getlength(label))) for image, label in thumbs) + GAP
    height = max(image.height for image, _ in thumbs) + LABEL + GAP
    columns = min(len(thumbs), max(1, round(math.sqrt(len(thumbs) * height / width * 1.5))))  # about 3:2
    rows = math.ceil(len(thumbs) / columns)
    sheet = Image.new("RGB", (columns * width + GAP, rows * height + GAP), "white")
    pen = ImageDraw.Draw(sheet)
    for k, (image, label) in enumerate(thumbs):
        x, y = GAP + k % columns * width, GAP + k // columns * height
        sheet.paste(image, (x, y))
        pen.text((x, y + image.height + 2), label, "black", font)
    return sheet
