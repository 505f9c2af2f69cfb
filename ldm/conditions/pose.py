"""Poses: people as OpenPose's coloured limbs."""

import math
import numbers
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from ldm.conditions.palette import JOINTS, LIMBS, OPENPOSE
from ldm.errors import LDMError
from ldm.io.folders import read_fields

MOST_SIDE = 16_384  # pixels
RADIUS = 4  # pixels, of joints and, across, of limbs: OpenPose's, whatever the size of the picture
DARKEN = 0.6  # of limbs, so that joints stand out


def pose(people: Sequence, width: int, height: int) -> Image.Image:
    """OpenPose's picture of people: limbs as ellipses, joints as discs, in 18 colours on black.

    Each of `people` has 18 keypoints in the order of `palette.JOINTS`, (x, y) in pixels or None where unseen; a limb
    is drawn if both its ends are seen. The geometry is ControlNet's `draw_bodypose`, with limbs below joints as
    in controlnet_aux (the first version mixed limbs over joints). Raises LDMError for wrong counts or numbers.
    """
    for side in (width, height):
        if isinstance(side, bool) or not isinstance(side, numbers.Integral) or not 1 <= side <= MOST_SIDE:
            raise LDMError(f"A pose needs a width and a height of 1 to {MOST_SIDE} pixels, not {side!r}.")
    if not isinstance(people, Sequence | np.ndarray) or isinstance(people, str):
        raise LDMError("people must be a list that has 18 keypoints for each person.")
    people = [_keypoints(person, number) for number, person in enumerate(people)]
    canvas = Image.new("RGB", (int(width), int(height)))
    draw = ImageDraw.Draw(canvas)
    for (start, end), colour in zip(LIMBS, OPENPOSE, strict=False):  # the 18th colour is of a joint alone
        for points in people:
            if points[start] and points[end]:
                draw.polygon(_ellipse(points[start], points[end]), fill=tuple(map(int, colour)))
    canvas = Image.fromarray((np.asarray(canvas) * DARKEN).astype(np.uint8))
    draw = ImageDraw.Draw(canvas)
    for joint, colour in enumerate(OPENPOSE):
        for points in people:
            if points[joint]:
                x, y = map(int, points[joint])
                draw.ellipse((x - RADIUS, y - RADIUS, x + RADIUS, y + RADIUS), fill=tuple(map(int, colour)))
    return canvas


def _keypoints(person: Any, number: int) -> list[tuple[float, float] | None]:
    if not isinstance(person, Sequence | np.ndarray) or len(person) != len(JOINTS):
        count = f"{len(person)} keypoints" if isinstance(person, Sequence | np.ndarray) else f"{person!r:.40}"
        raise LDMError(f"Person {number} of the pose must have {len(JOINTS)} keypoints, not {count}: null if unseen.")
    points = []
    for name, point in zip(JOINTS, person, strict=True):
        if point is None:
            points.append(None)
            continue
        pair = isinstance(point, Sequence | np.ndarray) and len(point) == 2
        if not pair or not all(map(_is_coordinate, point)):
            raise LDMError(
                f"The {name} of person {number} must be null or two numbers x, y in pixels, within {MOST_SIDE}, "
                f"not {point!r:.40}."
            )
        points.append((float(point[0]), float(point[1])))
    return points


def _is_coordinate(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and abs(value) <= MOST_SIDE  # NaN is not


def _ellipse(start: tuple[float, float], end: tuple[float, float]) -> list[tuple[float, float]]:
    """A limb's outline: corners in whole pixels at every degree, as `cv2.ellipse2Poly` has them."""
    dx, dy = start[0] - end[0], start[1] - end[1]
    half, turn = int(math.hypot(dx, dy) / 2), math.radians(int(math.degrees(math.atan2(dy, dx))))
    t = np.radians(np.arange(361))
    along, across = half * np.cos(t), RADIUS * np.sin(t)
    x = int((start[0] + end[0]) / 2) + along * math.cos(turn) - across * math.sin(turn)
    y = int((start[1] + end[1]) / 2) + along * math.sin(turn) + across * math.cos(turn)
    return list(zip(np.round(x).tolist(), np.round(y).tolist(), strict=True))


def read_pose(path: str | Path) -> Image.Image:
    """`pose` of a JSON file {"width": 512, "height": 512, "people": [[[x, y], null, ...], ...]}."""
    if not isinstance(path, str | Path):
        raise LDMError("A pose is read from a JSON file: give its path.")
    fields = read_fields(path)
    if set(fields) != {"width", "height", "people"}:
        found = ", ".join(sorted(fields)) or "nothing"
        raise LDMError(f"{path} must hold width, height and people, and no more, not {found}.")
    return pose(fields["people"], fields["width"], fields["height"])
