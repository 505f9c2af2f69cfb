"""Edges and scribbles: white lines on black, by OpenCV."""

import math
from typing import Any

import numpy as np
from PIL import Image

from ldm.errors import LDMError
from ldm.io.pictures import Source, as_picture


def canny(picture: Source, low: float = 100, high: float = 200) -> Image.Image:
    """White edges, one pixel wide, on black: OpenCV's Canny of the RGB picture, as ControlNet's authors call it.

    An edge begins where the gradient exceeds `high` and goes on while it exceeds `low` (Canny 1986); both are on the
    scale of 8 bits, where gradients reach 1000 and more. Raises LDMError without OpenCV, or for low > high.
    """
    cv2 = _opencv()
    if not 0 <= low <= high < math.inf:
        raise LDMError(f"canny needs 0 <= low <= high, not low {low:g} and high {high:g}: give the smaller one as low.")
    edges = cv2.Canny(np.array(as_picture(picture)), low, high)  # (H, W)
    return Image.fromarray(edges).convert("RGB")


def scribble(picture: Source) -> Image.Image:
    """Thick white lines on black, as if drawn with a felt pen along the outlines of a photograph.

    ControlNet's authors thin and thicken the edges that a network, HED, finds (gradio_fake_scribble2image.py). This
    needs no network: at 512 pixels, or the picture's own size if that is smaller, it blurs, which loses fine texture,
    takes Canny's edges and thickens them to the width that the authors' threshold gives, 13 pixels at 512. HED knows
    outlines from texture; this does not. Raises LDMError without OpenCV.
    """
    cv2 = _opencv()
    picture = as_picture(picture)
    unit = max(min(picture.width, picture.height, 512) / 512, 0.25)
    shrink = min(512 / min(picture.size), 1)
    a = np.array(picture.resize([max(round(side * shrink), 1) for side in picture.size], Image.Resampling.BOX))
    blur = max(3 * unit, 1)  # pixels; a step of one grey level then rises by 1 / (2.5 blur) a pixel, hence the division
    edges = cv2.Canny(cv2.GaussianBlur(a, (0, 0), blur), 50 / blur, 150 / blur)
    width = 2 * int(6 * unit) + 1
    lines = cv2.dilate(edges, cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (width, width)))
    lines = Image.fromarray(lines).resize(picture.size, Image.Resampling.BILINEAR)
    return lines.point(lambda value: 255 * (value > 127)).convert("RGB")


def _opencv() -> Any:
    try:
        import cv2
    except ImportError as error:
        raise LDMError("Edges need OpenCV: python -m pip install opencv-python-headless.") from error
    return cv2
