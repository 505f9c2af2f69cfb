"""The styles: five ways of putting the same layers on paper.

Each style is a function (scene, land, sprites) -> float32 (3, 128, 128) picture, 0-255.
`sprites` come back to front. All of them stay smooth or blocky: no style adds noise.
"""

import numpy as np
from PIL import Image, ImageFilter

from .colors import NAMED, inks
from .landscape import Land, distance, grid, mix, planes, soft
from .shapes import LINE, MAIN, NONE
from .sprites import Sprite, enlarge, shrink_cells
from .world import PIXELS, SKY_KINDS, Scene, box, generator

PAPER = np.array((252, 249, 241), np.float32)
GRAPHITE = np.array((66, 64, 70), np.float32)
DARKNESS = np.array((10, 8, 24), np.float32)

NEON_LINES = {"grass": (70, 255, 110), "sand": (255, 206, 70), "snow": (214, 240, 255), "sea": (40, 150, 255)}


def ink_table(style: str, color: str, time: str) -> np.ndarray:
    """The colour of every ink, (11, 3) float32, in this style."""
    table = inks(color, time)
    main = np.array(NAMED[color], np.float32)
    if style == "watercolor":
        table[LINE] = table[NONE] = 0.62 * table[MAIN] if color != "black" else (20, 20, 26)
        if color == "white":
            table[LINE] = table[NONE] = (126, 132, 152)
    elif style == "pencil sketch":
        table[LINE] = table[NONE] = GRAPHITE
    elif style == "neon":
        bright = main + 0.16 * (255 - main)
        if color == "black":
            bright = np.array((128, 128, 142), np.float32)
        table = 0.42 * table
        if color != "black":
            table[MAIN] = 0.5 * main
        table[LINE] = table[NONE] = bright
    return table


def backdrop(scene: Scene, land: Land) -> np.ndarray:
    """Sky, mountains, ground and the soft shadows of what stands on it."""
    picture = mix(land.sky, land.rock, land.rock_alpha)
    picture = mix(picture, land.ground, land.ground_alpha)
    x, y = grid()
    for index, thing in enumerate(scene.things):
        if thing.kind in SKY_KINDS:
            continue
        left, _, right, bottom = box(scene, index)
        wide = 0.42 * (right - left)
        lower = bottom + (3 if thing.kind == "fish" else -1)
        oval = distance((x - thing.x) / wide, (y - lower) / (0.16 * wide + 1)) - 1
        picture = picture * (1 - 0.28 * soft(oval, 0.5))
    return picture


def plain(scene: Scene, land: Land, sprites: list[Sprite]) -> np.ndarray:
    """Flat, clean colours with a thin outline."""
    picture = backdrop(scene, land)
    for sprite in sprites:
        picture = mix(picture, sprite.color, sprite.alpha)
    return picture


def watercolor(scene: Scene, land: Land, sprites: list[Sprite]) -> np.ndarray:
    """Thin paint on paper: blotches, darker rims where paint dries, an unpainted border."""
    rng = generator(scene.seed, 40)
    # Blotches of thin paint show far more in dark colours, so the night gets weaker ones.
    full, thin = (0.93, 0.07) if scene.time == "night" else (0.86, 0.14)
    picture = wash(backdrop(scene, land), full + thin * field(rng, 6))
    rims = dried_rim(land.ground_alpha, blur(land.ground_alpha, 2.5))
    if scene.mountains:
        rims = np.maximum(rims, dried_rim(land.rock_alpha, blur(land.rock_alpha, 2.5)))
    picture = picture * (1 - 0.22 * rims)
    for sprite in sprites:
        wide = blur(sprite.alpha, 2.0)
        # Painters leave a hair of bare paper round a thing so that the wet paints do not run together.
        picture = mix(picture, PAPER, 0.55 * wide)
        paint = wash(sprite.color, 0.93 + 0.10 * field(rng, 8))
        paint = paint * (1 - 0.18 * dried_rim(sprite.alpha, wide))
        picture = mix(picture, paint, blur(sprite.alpha, 0.7))
    x, y = grid()
    inward = np.minimum(np.minimum(x, PIXELS - x), np.minimum(y, PIXELS - y))
    unpainted = soft(inward - 5 - 1.8 * field(rng, 9), 2.5)
    return mix(picture, PAPER, unpainted)


def pixel_art(scene: Scene, land: Land, sprites: list[Sprite]) -> np.ndarray:
    """A 32x32 picture with few colours, every pixel shown as a 4x4 block."""
    cells = np.clip(shrink_cells(backdrop(scene, land)), 0, 255).astype(np.uint8)
    # The palette is chosen for each picture (median cut), so no colour drifts into another.
    few = (
        Image.fromarray(np.ascontiguousarray(cells.transpose(1, 2, 0)))
        .quantize(28, method=Image.Quantize.MEDIANCUT, kmeans=2, dither=Image.Dither.NONE)
        .convert("RGB")
    )
    picture = enlarge(np.asarray(few, np.float32).transpose(2, 0, 1))
    for sprite in sprites:
        picture = mix(picture, sprite.color, sprite.alpha)
    return picture


def pencil_sketch(scene: Scene, land: Land, sprites: list[Sprite]) -> np.ndarray:
    """Coloured pencil on light paper: coarse hatching and graphite contours."""
    night = scene.time == "night"
    # At night the pencil is pressed harder; the stripes must then vary less to look the same.
    strength, relief = (0.74, 0.05) if night else (0.54, 0.08)
    x, y = grid()
    slanted, flat = hatching(x + 0.7 * y, 9.0), hatching(0.25 * x + y, 8.0)
    upright = hatching(x - 0.5 * y, 7.0)
    picture = wash(land.sky, strength + relief * slanted)
    rock = wash(land.rock, strength + relief * upright)
    ground = wash(land.ground, strength + 0.08 + relief * flat)
    picture = mix(mix(picture, rock, land.rock_alpha), ground, land.ground_alpha)
    hidden = 1 - land.ground_alpha
    lines = contour(land.ground_alpha)
    if scene.mountains:
        lines = np.maximum(lines, contour(land.rock_alpha) * hidden)
    picture = mix(picture, GRAPHITE, 0.7 * lines)
    for sprite in sprites:
        picture = mix(picture, PAPER, 0.6 * blur(sprite.alpha, 1.5))
        tint = wash(sprite.color, 0.92 + 0.08 * slanted)
        tint = mix(tint, GRAPHITE, sprite.line)
        picture = mix(picture, tint, sprite.alpha)
    return picture


def neon(scene: Scene, land: Land, sprites: list[Sprite]) -> np.ndarray:
    """Glowing tubes in the dark. Never trained on."""
    picture = planes(DARKNESS) + 0.34 * backdrop(scene, land)
    hidden = 1 - land.ground_alpha
    if scene.mountains:
        picture = glow(picture, contour(land.rock_alpha) * hidden, (196, 90, 255))
    picture = glow(picture, contour(land.ground_alpha), NEON_LINES[scene.ground])
    for sprite in sprites:
        picture = mix(picture, sprite.color, sprite.alpha)
        tube = ink_table("neon", sprite.thing.color, scene.time)[LINE]
        picture = glow(picture, sprite.line, tube)
    return picture


def glow(picture, line, color):
    """Add light of this colour on a line (128, 128) and, fainter, around it."""
    light = 0.75 * np.clip(1.4 * line, 0, 1) + 1.1 * blur(line, 1.6) + 1.0 * blur(line, 4.5)
    return mix(picture, color, np.clip(0.8 * light, 0, 1))


def wash(color, amount) -> np.ndarray:
    """Lay a colour on paper; amount (128, 128) or a number: 0 bare paper, 1 the full colour."""
    return planes(PAPER) + (planes(color) - planes(PAPER)) * np.asarray(amount, np.float32)


def hatching(along, period: float) -> np.ndarray:
    """Smooth stripes from -1 to 1, `period` pixels apart, across the direction of `along`."""
    return np.sin(2 * np.pi * along / period)


def contour(alpha) -> np.ndarray:
    """A soft line, about two pixels wide, along the rim of a layer."""
    inside = blur(alpha, 0.8)
    return np.clip(4 * inside * (1 - inside), 0, 1)


def dried_rim(alpha, blurred) -> np.ndarray:
    """1 just inside the rim of a layer, fading over the blur's radius: where pigment gathers."""
    return np.clip(2 * alpha * (1 - blurred), 0, 1)


def blur(values, radius: float) -> np.ndarray:
    """Gaussian blur of a (128, 128) array with values from 0 to 1."""
    as_bytes = Image.fromarray((255 * np.clip(values, 0, 1)).astype(np.uint8))
    return np.asarray(as_bytes.filter(ImageFilter.GaussianBlur(radius)), np.float32) / 255


def field(rng, cells: int) -> np.ndarray:
    """A very smooth random field, (128, 128), mostly within -1 .. 1, with about `cells` hills a side."""
    coarse = Image.fromarray(rng.uniform(-1, 1, (cells, cells)).astype(np.float32))
    return np.asarray(coarse.resize((PIXELS, PIXELS), Image.Resampling.BICUBIC))


PAINT = {"plain": plain, "watercolor": watercolor, "pixel art": pixel_art, "pencil sketch": pencil_sketch, "neon": neon}
