"""The objects: each is a handful of polygons, drawn with a pen that knows ten inks.

A shape is drawn as *ink numbers*, not as colours, on a canvas a few times finer than the
picture. Every style then chooses its own colours for the inks, and the exact mask of the
object is simply "any ink at all". Coordinates: u to the right, v downwards, both measured
from the centre of the object's box in units of its larger extent, so that a house reaches
from u = -0.5 to u = 0.5.
"""

import math

from PIL import Image, ImageDraw

# Inks. MAIN, DARK and LIGHT are shades of the named colour; the rest are fixed materials.
NONE, LINE, MAIN, DARK, LIGHT, WOOD, LEAF, GLASS, CREAM, TYRE, HEART = range(11)


class Pen:
    """Draws filled, outlined parts of one object into a canvas of ink numbers."""

    def __init__(self, canvas: Image.Image, x: float, y: float, side: float, flip: bool, line: float):
        """x, y, side (larger extent) and line (outline width) are in canvas pixels."""
        self.draw = ImageDraw.Draw(canvas)
        # The outline is centred on the contour, so the shape shrinks by half of it on each side.
        self.x, self.y, self.side = x, y, side - line
        self.mirror = -1 if flip else 1
        self.line_width = max(1, round(line))

    def at(self, points) -> list[tuple[float, float]]:
        """Object units to canvas pixels."""
        return [(self.x + self.mirror * u * self.side, self.y + v * self.side) for u, v in points]

    def part(self, points, ink: int, outline: float = 1.0):
        """A filled closed polygon with an outline; outline=0.5 draws it half as wide, 0 not at all."""
        places = self.at(points)
        self.draw.polygon(places, fill=ink)
        if outline > 0:
            width = max(1, round(outline * self.line_width))
            self.draw.line(places + places[:2], fill=LINE, width=width, joint="curve")

    def stroke(self, points, ink: int, width: float):
        """An open line; width in object units."""
        self.draw.line(self.at(points), fill=ink, width=max(1, round(width * self.side)), joint="curve")


def oval(u: float, v: float, ru: float, rv: float, start=0.0, stop=360.0, steps=28):
    """Points of an ellipse (or, with start and stop in degrees, of an arc of one)."""
    angles = [math.radians(start + (stop - start) * i / steps) for i in range(steps + 1)]
    return [(u + ru * math.cos(a), v + rv * math.sin(a)) for a in angles]


def rounded(points, times: int = 2):
    """Cut the corners of a closed polygon `times` times (Chaikin), which rounds it."""
    for _ in range(times):
        cut = []
        for (u0, v0), (u1, v1) in zip(points, points[1:] + points[:1], strict=True):
            cut += [(0.78 * u0 + 0.22 * u1, 0.78 * v0 + 0.22 * v1), (0.22 * u0 + 0.78 * u1, 0.22 * v0 + 0.78 * v1)]
        points = cut
    return points


def block(left, top, right, bottom):
    """The four corners of an upright rectangle."""
    return [(left, top), (right, top), (right, bottom), (left, bottom)]


def house(pen: Pen):
    """Walls and a gabled roof in the named colour, a door, two windows, a chimney."""
    pen.part(block(0.20, -0.44, 0.33, -0.12), DARK)
    pen.part(block(-0.39, -0.06, 0.39, 0.48), MAIN)
    pen.part([(0.0, -0.48), (0.5, -0.01), (0.45, 0.05), (-0.45, 0.05), (-0.5, -0.01)], DARK)
    pen.part(block(-0.30, 0.15, -0.13, 0.31), GLASS, outline=0.5)
    pen.part(block(0.13, 0.15, 0.30, 0.31), GLASS, outline=0.5)
    pen.part(block(-0.07, 0.2, 0.07, 0.48), WOOD, outline=0.5)


def tree(pen: Pen):
    """A trunk with a cloud-like crown in the named colour."""
    pen.part([(-0.06, 0.12), (0.06, 0.12), (0.08, 0.42), (0.14, 0.5), (-0.14, 0.5), (-0.08, 0.42)], WOOD)
    lobes = [(-0.2, 0.03, 0.2), (0.2, 0.03, 0.2), (-0.16, -0.16, 0.2), (0.17, -0.17, 0.2), (0.0, -0.29, 0.21)]
    for u, v, r in lobes:  # the outlines first, so that the lobes melt into one crown
        pen.part(oval(u, v, r, r), MAIN)
    pen.part(oval(0.0, 0.1, 0.2, 0.15), MAIN)
    for u, v, r in lobes:
        pen.part(oval(u, v, r - 0.012, r - 0.012), MAIN, outline=0)
    pen.part(oval(0.0, 0.05, 0.2, 0.18), MAIN, outline=0)
    pen.part(oval(-0.08, -0.31, 0.085, 0.07), LIGHT, outline=0)
    pen.part(oval(-0.22, -0.1, 0.07, 0.06), LIGHT, outline=0)
    pen.part(oval(0.18, 0.06, 0.1, 0.065), DARK, outline=0)
    pen.part(oval(0.2, -0.12, 0.07, 0.05), DARK, outline=0)


def flower(pen: Pen):
    """Six round petals in the named colour, a heart, a stem with two leaves."""
    pen.part([(-0.022, 0.1), (0.022, 0.1), (0.022, 0.5), (-0.022, 0.5)], LEAF)
    pen.part(rounded([(0.0, 0.47), (0.1, 0.29), (0.27, 0.24), (0.2, 0.42)]), LEAF)
    pen.part(rounded([(0.0, 0.47), (-0.1, 0.29), (-0.27, 0.24), (-0.2, 0.42)]), LEAF)
    for i in range(6):
        a = math.radians(60 * i + 30)
        pen.part(oval(0.225 * math.cos(a), -0.135 + 0.215 * math.sin(a), 0.16, 0.16), MAIN)
    pen.part(oval(0.0, -0.135, 0.19, 0.19), MAIN, outline=0)
    pen.part(oval(0.0, -0.135, 0.105, 0.105), HEART, outline=0.5)


def boat(pen: Pen):
    """A hull and a big sail in the named colour, a smaller cream sail."""
    pen.part(block(-0.07, -0.48, -0.03, 0.14), WOOD, outline=0.5)
    pen.part(rounded([(-0.01, -0.46), (0.24, -0.22), (0.45, 0.09), (-0.01, 0.09)], 1), MAIN)
    pen.part([(-0.09, -0.32), (-0.09, 0.09), (-0.34, 0.09)], CREAM)
    pen.part([(-0.5, 0.13), (0.5, 0.13), (0.44, 0.31), (0.32, 0.48), (-0.3, 0.48), (-0.42, 0.31)], MAIN)
    pen.part([(-0.46, 0.24), (0.45, 0.24), (0.42, 0.33), (-0.41, 0.33)], DARK, outline=0)


def car(pen: Pen):
    """A round little car: body in the named colour, two windows, two wheels."""
    body = rounded(
        [
            (-0.5, 0.22),
            (-0.5, -0.04),
            (-0.35, -0.08),
            (-0.22, -0.29),
            (0.18, -0.29),
            (0.32, -0.08),
            (0.5, -0.03),
            (0.5, 0.22),
        ],
        1,
    )
    pen.part(body, MAIN)
    pen.part([(-0.22, -0.09), (-0.14, -0.22), (-0.03, -0.22), (-0.03, -0.09)], GLASS, outline=0.5)
    pen.part([(0.04, -0.09), (0.04, -0.22), (0.12, -0.22), (0.2, -0.09)], GLASS, outline=0.5)
    pen.part(block(-0.46, 0.06, 0.46, 0.1), DARK, outline=0)
    for u in (-0.27, 0.27):
        pen.part(oval(u, 0.19, 0.1, 0.1), TYRE, outline=0.5)
        pen.part(oval(u, 0.19, 0.045, 0.045), CREAM, outline=0)


def balloon(pen: Pen):
    """A hot-air balloon: the envelope in the named colour with darker gores, a wooden basket."""
    pen.stroke([(-0.17, 0.17), (-0.07, 0.37)], LINE, 0.025)
    pen.stroke([(0.17, 0.17), (0.07, 0.37)], LINE, 0.025)
    envelope = oval(0.0, -0.13, 0.39, 0.37, 150, 390) + [(0.15, 0.24), (-0.15, 0.24)]
    pen.part(envelope, MAIN)
    pen.part(oval(-0.2, -0.12, 0.09, 0.28, 90, 270, 14) + oval(-0.2, -0.12, 0.0, 0.28, 270, 90, 14), DARK, outline=0)
    pen.part(oval(0.2, -0.12, 0.09, 0.28), DARK, outline=0)
    pen.part(oval(-0.2, -0.12, 0.09, 0.28), DARK, outline=0)
    pen.part(block(-0.14, 0.17, 0.14, 0.24), LIGHT)
    pen.part(block(-0.1, 0.36, 0.1, 0.5), WOOD)


def star(pen: Pen):
    """A plump five-pointed star with a light middle."""

    def points(outer, inner):
        radii = [outer if i % 2 == 0 else inner for i in range(10)]
        angles = [math.radians(36 * i - 90) for i in range(10)]
        return [(r * math.cos(a), 0.04 + r * math.sin(a)) for r, a in zip(radii, angles, strict=True)]

    pen.part(rounded(points(0.58, 0.28), 2), MAIN)
    pen.part(rounded(points(0.24, 0.12), 1), LIGHT, outline=0)


def fish(pen: Pen):
    """A fish in the named colour: body, tail, fins, a big eye, two scale arcs."""
    pen.part(rounded([(0.2, 0.0), (0.5, -0.26), (0.45, 0.0), (0.5, 0.26)], 1), DARK)
    pen.part(rounded([(-0.2, -0.16), (0.0, -0.34), (0.2, -0.3), (0.14, -0.1)], 1), DARK)
    pen.part(rounded([(-0.08, 0.16), (0.06, 0.34), (0.18, 0.3), (0.1, 0.12)], 1), DARK)
    body = oval(-0.12, 0.0, 0.38, 0.245, 40, 320, 24) + [(0.3, -0.05), (0.3, 0.05)]
    pen.part(body, MAIN)
    pen.part(oval(-0.12, 0.1, 0.24, 0.09), LIGHT, outline=0)
    pen.stroke(oval(-0.3, 0.0, 0.14, 0.2, -55, 55, 10), LINE, 0.022)
    pen.stroke(oval(-0.02, 0.0, 0.1, 0.13, -55, 55, 10), DARK, 0.03)
    pen.part(oval(-0.32, -0.065, 0.07, 0.07), CREAM)
    pen.part(oval(-0.33, -0.06, 0.036, 0.036), TYRE, outline=0)


def mushroom(pen: Pen):
    """A cap in the named colour with cream dots on a cream stalk. Never trained on."""
    pen.part(rounded([(-0.13, 0.0), (0.13, 0.0), (0.17, 0.5), (-0.17, 0.5)], 1), CREAM)
    pen.part(rounded(oval(0.0, 0.08, 0.48, 0.58, 180, 360, 16) + [(0.42, 0.17), (-0.42, 0.17)], 1), MAIN)
    for u, v, r in ((-0.02, -0.3, 0.09), (-0.27, -0.08, 0.08), (0.25, -0.1, 0.085), (0.0, -0.01, 0.06)):
        pen.part(oval(u, v, r, r * 0.85), CREAM, outline=0)


SHAPES = {
    "house": house,
    "tree": tree,
    "flower": flower,
    "boat": boat,
    "car": car,
    "balloon": balloon,
    "star": star,
    "fish": fish,
    "mushroom": mushroom,
}


def draw_shape(kind: str, canvas_pixels: int, x, y, side, flip: bool, line: float) -> Image.Image:
    """A square canvas of ink numbers (mode "L") holding one object; lengths in canvas pixels."""
    canvas = Image.new("L", (canvas_pixels, canvas_pixels), NONE)
    SHAPES[kind](Pen(canvas, x, y, side, flip, line))
    return canvas
