"""Colours: the ten named ones, and how the hour of the day tints the objects.

All colours are (red, green, blue) from 0 to 255.
"""

import numpy as np

from .shapes import CREAM, DARK, GLASS, HEART, LEAF, LIGHT, LINE, MAIN, NONE, TYRE, WOOD

NAMED = {
    "red": (214, 34, 42),
    "orange": (250, 134, 18),
    "yellow": (252, 220, 42),
    "green": (42, 158, 62),
    "blue": (38, 92, 222),
    "purple": (128, 48, 180),
    "pink": (250, 134, 188),
    "white": (248, 248, 250),
    "black": (36, 36, 42),
    "brown": (124, 74, 38),
}

# Shades are written out where simply darkening would turn one colour name into another
# (dark orange is brown, dark yellow is olive, light red is pink).
DARKER = {
    "orange": (236, 112, 6),
    "yellow": (240, 196, 16),
    "white": (218, 222, 232),
    "black": (58, 58, 66),
    "pink": (240, 108, 168),
}
LIGHTER = {"red": (232, 66, 66), "white": (255, 255, 255), "black": (78, 78, 88), "pink": (255, 166, 208)}

MATERIALS = {
    WOOD: (150, 106, 66),
    LEAF: (70, 148, 66),
    GLASS: (196, 230, 246),
    CREAM: (252, 246, 226),
    TYRE: (44, 44, 52),
    HEART: (255, 206, 64),
}

# Objects keep their named colour at every hour; this is only a hint of the light.
LIGHT_ON_THINGS = {
    "day": (1.0, 1.0, 1.0),
    "sunset": (1.0, 0.95, 0.90),
    "night": (0.86, 0.88, 0.97),
    "dawn": (1.0, 0.97, 0.98),
}

INKS = 11


def inks(color: str, time: str) -> np.ndarray:
    """The colour of every ink for a thing of this colour at this time: (11, 3) float32, 0-255."""
    main = np.array(NAMED[color], np.float32)
    table = np.zeros((INKS, 3), np.float32)
    table[MAIN] = main
    table[DARK] = DARKER.get(color, tuple(0.8 * main))
    table[LIGHT] = LIGHTER.get(color, tuple(main + 0.28 * (255 - main)))
    for ink, rgb in MATERIALS.items():
        table[ink] = rgb
    if color in ("yellow", "orange", "white"):
        table[HEART] = (168, 96, 40) if color != "white" else (255, 200, 50)
    if color == "brown":  # a brown house with a brown door would lose the door
        table[WOOD] = (206, 164, 112)
    if color == "black":
        table[TYRE] = (92, 92, 102)
    table *= np.array(LIGHT_ON_THINGS[time], np.float32)
    table[LINE] = outline(color, time)
    table[NONE] = table[LINE]  # what lies under the soft rim when the sprite is made smaller
    return table


def outline(color: str, time: str) -> tuple[float, float, float]:
    """A thin dark line round every thing; black things at night get a light rim instead."""
    if color == "black":
        return (176, 182, 208) if time == "night" else (14, 14, 18)
    if color == "white":
        return (92, 98, 118)
    return tuple(0.36 * c for c in NAMED[color])
