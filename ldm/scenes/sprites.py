"""Sprites: one object each, coloured and brought down to the size of the picture."""

from dataclasses import dataclass

import numpy as np
from PIL import Image

from .bitmaps import bitmap
from .shapes import LINE, NONE, draw_shape
from .world import PIXELS, Scene, Thing, extent, generator

FINER = 3  # the ink canvas has this many pixels per picture pixel
CELL = 4  # pixel art: picture pixels per "pixel"
CELLS = PIXELS // CELL


@dataclass
class Sprite:
    """One object on the full frame."""

    thing: Thing
    color: np.ndarray  # (3, 128, 128) float32, 0-255
    alpha: np.ndarray  # (128, 128) float32, 0-1: how much of the pixel the object covers
    line: np.ndarray  # (128, 128) float32, 0-1: how much of the pixel is outline


def smooth_sprite(scene: Scene, index: int, table: np.ndarray) -> Sprite:
    """The object with soft (antialiased) edges. table: (11, 3) colour of each ink, 0-255."""
    thing = scene.things[index]
    side = extent(scene.seed, index, thing.size, len(scene.things) > 1)
    line = 1.0 if thing.size == "small" else 1.34
    # Only a square window round the object is drawn finely; the rest of the frame is empty.
    window = int(side) + 8
    left, top = int(thing.x - window / 2), int(thing.y - window / 2)
    canvas = draw_shape(
        thing.kind,
        window * FINER,
        (thing.x - left) * FINER,
        (thing.y - top) * FINER,
        side * FINER,
        flipped(scene, index),
        line * FINER,
    )
    # A palette image turns ink numbers into colours in one go; reduce() averages FINER x FINER pixels.
    colored = Image.frombytes("P", canvas.size, canvas.tobytes())
    colored.putpalette(np.clip(np.round(table), 0, 255).astype(np.uint8).tobytes())
    color = Image.new("RGB", (PIXELS, PIXELS))
    color.paste(colored.convert("RGB").reduce(FINER), (left, top))
    return Sprite(
        thing,
        np.asarray(color).transpose(2, 0, 1).astype(np.float32),
        covered(canvas, [ink != NONE for ink in range(256)], left, top),
        covered(canvas, [ink == LINE for ink in range(256)], left, top),
    )


def covered(canvas: Image.Image, wanted, left: int, top: int) -> np.ndarray:
    """The share (0-1) of every picture pixel covered by the wanted inks: (128, 128) float32."""
    share = Image.new("L", (PIXELS, PIXELS))
    share.paste(canvas.point([255 if w else 0 for w in wanted]).reduce(FINER), (left, top))
    return np.asarray(share, np.float32) / 255


def pixel_sprite(scene: Scene, index: int, table: np.ndarray) -> Sprite:
    """The object from its hand-drawn bitmap: every 4x4 cell has exactly one ink, no soft edges."""
    thing = scene.things[index]
    drawing = np.pad(np.array(bitmap(thing.kind, thing.size)), 1)  # NONE is 0
    if flipped(scene, index):
        drawing = drawing[:, ::-1]
    body = drawing != NONE
    ring = grow(body) & ~body
    drawing = np.where(ring, LINE, drawing)
    high, wide = drawing.shape
    # Bitmaps can be a little wider than the smooth object; one cell stays free at the frame.
    left = min(max(round(thing.x / CELL - wide / 2), 1), CELLS - wide - 1)
    top = min(max(round(thing.y / CELL - high / 2), 1), CELLS - high - 1)
    inks = np.full((CELLS, CELLS), NONE)
    inks[top : top + high, left : left + wide] = drawing
    alpha, line = enlarge(inks != NONE), enlarge(inks == LINE)
    return Sprite(thing, enlarge(table.T[:, inks]), alpha.astype(np.float32), line.astype(np.float32))


def flipped(scene: Scene, index: int) -> bool:
    """Whether the thing faces the other way: a free choice of the drawing."""
    return bool(generator(scene.seed, 11, index).random() < 0.5)


def grow(mask: np.ndarray) -> np.ndarray:
    """The mask with its upper, lower, left and right neighbours added."""
    wide = mask.copy()
    wide[1:] |= mask[:-1]
    wide[:-1] |= mask[1:]
    wide[:, 1:] |= mask[:, :-1]
    wide[:, :-1] |= mask[:, 1:]
    return wide


def shrink_cells(picture: np.ndarray) -> np.ndarray:
    """Average every 4x4 cell: (..., 128, 128) -> (..., 32, 32)."""
    return picture.reshape(*picture.shape[:-2], CELLS, CELL, CELLS, CELL).mean(axis=(-3, -1))


def enlarge(cells: np.ndarray) -> np.ndarray:
    """Repeat every cell 4x4 times: (..., 32, 32) -> (..., 128, 128)."""
    return cells.repeat(CELL, axis=-2).repeat(CELL, axis=-1)
