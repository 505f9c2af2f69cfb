"""The world behind the objects: sky, mountains and ground, as smooth layers.

Everything is written as a colour (or an opacity) that depends on the pixel's x and y, so
edges are soft over one pixel without drawing anything finer than the picture. There is no
texture and no noise on purpose: an autoencoder that shrinks the picture eightfold must be
able to give it back.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from .world import PIXELS, Scene, generator
from .world import horizon as horizon_of

# Sky colours from the top of the picture to the horizon.
SKY = {
    "day": ((74, 150, 232), (128, 188, 244), (204, 232, 250)),
    "sunset": ((104, 62, 140), (238, 104, 92), (255, 186, 84)),
    "night": ((10, 14, 46), (20, 30, 76), (44, 60, 116)),
    "dawn": ((176, 178, 228), (244, 198, 220), (255, 240, 200)),
}

# Ground colours: at the horizon and at the bottom of the picture.
GROUND = {
    ("grass", "day"): ((150, 204, 100), (88, 160, 62)),
    ("grass", "sunset"): ((170, 166, 70), (94, 116, 44)),
    ("grass", "night"): ((38, 84, 62), (18, 54, 40)),
    ("grass", "dawn"): ((184, 212, 140), (120, 172, 104)),
    ("sand", "day"): ((248, 228, 166), (232, 196, 120)),
    ("sand", "sunset"): ((246, 186, 112), (204, 132, 72)),
    ("sand", "night"): ((132, 114, 84), (92, 76, 56)),
    ("sand", "dawn"): ((252, 226, 182), (234, 194, 146)),
    ("snow", "day"): ((250, 252, 255), (216, 230, 246)),
    ("snow", "sunset"): ((255, 226, 216), (220, 190, 208)),
    ("snow", "night"): ((142, 158, 204), (102, 120, 176)),
    ("snow", "dawn"): ((254, 244, 248), (226, 222, 242)),
    ("sea", "day"): ((82, 168, 222), (22, 98, 180)),
    ("sea", "sunset"): ((214, 120, 118), (62, 66, 130)),
    ("sea", "night"): ((24, 50, 104), (10, 24, 66)),
    ("sea", "dawn"): ((184, 196, 226), (98, 146, 200)),
}

# Mountains: sunny side, shaded side, snow cap.
ROCK = {
    "day": ((128, 150, 190), (98, 122, 168), (250, 252, 255)),
    "sunset": ((140, 92, 134), (108, 70, 122), (255, 214, 196)),
    "night": ((56, 68, 116), (40, 50, 94), (150, 164, 210)),
    "dawn": ((170, 166, 208), (146, 146, 196), (255, 244, 246)),
}

WAVE = {"day": (206, 236, 250), "sunset": (255, 198, 140), "night": (112, 142, 206), "dawn": (255, 240, 228)}


@dataclass
class Land:
    """The layers, back to front. Colours (3, 128, 128) float32 0-255, opacities (128, 128) 0-1.

    Colour comes first here (three planes), because numpy combines a (128, 128) opacity with
    whole planes about ten times faster than with interleaved pixels.
    """

    sky: np.ndarray
    rock: np.ndarray
    rock_alpha: np.ndarray
    ground: np.ndarray
    ground_alpha: np.ndarray
    horizon: float  # mean y of the horizon, pixels


@lru_cache(maxsize=1)
def grid() -> tuple[np.ndarray, np.ndarray]:
    """x and y of every pixel centre, each (128, 128) float32. Do not write into them."""
    centres = np.arange(PIXELS, dtype=np.float32) + 0.5
    return np.meshgrid(centres, centres)


def mix(a, b, share):
    """Blend colours a -> b, each (3,) or (3, 128, 128); `share` (128, 128), from 0 to 1."""
    a, b = planes(a), planes(b)
    blend = b - a
    if blend.shape[1:] != share.shape:  # two single colours: spread them over the picture
        return a + blend * share.astype(np.float32, copy=False)
    blend *= share
    blend += a
    return blend


def planes(color) -> np.ndarray:
    """A single colour (3,) as (3, 1, 1), so that it combines with planes (3, 128, 128)."""
    color = np.asarray(color, np.float32)
    return color[:, None, None] if color.ndim == 1 else color


def soft(distance, width: float = 1.0):
    """1 where `distance` (pixels) is well below 0, 0 well above, a ramp `width` wide between."""
    return np.clip(0.5 - distance / width, 0, 1)


def distance(dx, dy):
    """Length of the vector (dx, dy); several times faster here than numpy's careful hypot."""
    return np.sqrt(dx * dx + dy * dy)


def landscape(scene: Scene) -> Land:
    """All background layers of a scene; depends on time, ground, mountains and seed only."""
    rng = generator(scene.seed, 20)
    horizon = horizon_of(scene.seed)
    light_x = float(rng.uniform(20, 108))  # the sun or moon, and its path on the sea
    sky = paint_sky(rng, scene.time, horizon, light_x)
    if scene.ground == "sea":
        ground, line = paint_sea(rng, scene.time, horizon, light_x)
    else:
        ground, line = paint_hills(rng, scene.ground, scene.time, horizon)
    _, y = grid()
    if scene.mountains:
        rock, rock_alpha = paint_mountains(rng, scene.time, horizon)
    else:
        rock, rock_alpha = sky, np.zeros_like(y)
    return Land(sky, rock, rock_alpha, ground, soft(line - y), horizon)


def paint_sky(rng, time: str, horizon: float, light_x: float) -> np.ndarray:
    """The gradient and what shines or drifts in it."""
    _, y = grid()
    top, middle, low = SKY[time]
    down = np.clip(y / horizon, 0, 1)
    sky = mix(mix(top, middle, np.clip(2 * down, 0, 1)), low, np.clip(2 * down - 1, 0, 1))
    if time == "day":
        corner = 16 if light_x < 64 else 112  # high in a corner, where few things are
        sky = paint_sun(sky, corner, 16, 9, (255, 244, 178), 20)
        return paint_clouds(rng, sky, (255, 255, 255), 0.75)
    if time == "sunset":
        sky = paint_clouds(rng, sky, (255, 168, 120), 0.55)
        return paint_sun(sky, light_x, horizon - 4, 13, (255, 222, 120), 34)
    if time == "dawn":
        sky = paint_clouds(rng, sky, (255, 226, 226), 0.6)
        return paint_sun(sky, light_x, horizon - 1, 9, (255, 250, 226), 26)
    return paint_night(rng, sky, 18 if light_x < 64 else 110)


def paint_sun(sky, sun_x, sun_y, radius, color, glow):
    """A disc with a soft glow that reaches `glow` pixels further."""
    x, y = grid()
    away = distance(x - sun_x, y - sun_y) - radius
    halo = 0.5 * np.clip(1 - away / glow, 0, 1) ** 2
    return mix(sky, color, np.maximum(halo, soft(away, 1.5)))


def paint_clouds(rng, sky, color, strength):
    """Two flat, soft clouds, each of three overlapping ovals."""
    sky = sky.copy()
    for _ in range(2):
        cx, cy, wide = rng.uniform(10, 118), rng.uniform(12, 50), rng.uniform(13, 20)
        rows = np.s_[: int(cy) + 12]  # a cloud never hangs lower than this
        x, y = (axis[rows] for axis in grid())
        away = np.full_like(x, 9.0)
        for du, dv, size in ((-0.8, 0.1, 0.75), (0.0, -0.12, 1.0), (0.8, 0.12, 0.7)):
            ru, rv = size * wide, 0.3 * size * wide
            oval = distance((x - cx - du * wide) / ru, (y - cy - dv * wide) / rv) - 1
            away = np.minimum(away, oval * rv)
        sky[:, rows] = mix(sky[:, rows], color, strength * soft(away, 3.0))
    return sky


def paint_night(rng, sky, moon_x):
    """A crescent moon and seven faint round stars (far smaller than any star that is a thing)."""
    x, y = grid()
    disc = soft(distance(x - moon_x, y - 18) - 9, 1.2)
    bite = soft(distance(x - moon_x - 4.5, y - 15.5) - 8, 1.2)
    glow = 0.25 * np.clip(1 - distance(x - moon_x, y - 18) / 28, 0, 1) ** 2
    sky = mix(sky, (236, 236, 206), np.maximum(glow, disc * (1 - bite)))
    places = rng.uniform((6, 5), (122, 62), (7, 2)).tolist()
    nearest = np.full_like(x, 9.0)  # squared distance to the nearest star, in pixels
    for star_x, star_y in places:
        left, top = max(0, int(star_x) - 3), max(0, int(star_y) - 3)
        window = np.s_[top : top + 7, left : left + 7]
        away = (x[window] - star_x) ** 2 + (y[window] - star_y) ** 2
        nearest[window] = np.minimum(nearest[window], away)
    return mix(sky, (214, 222, 250), 0.85 * soft(np.sqrt(nearest) - 1.2, 1.4))


def paint_mountains(rng, time: str, horizon: float):
    """Three big peaks with snow caps. Returns colour and opacity."""
    rows = np.s_[20:84]  # no peak is higher, no horizon lower
    x, y = (axis[rows] for axis in grid())
    sunny, shaded, snow = ROCK[time]
    rock = planes(shaded)
    alpha = np.zeros_like(x)
    centres = [middle + rng.uniform(-12, 12) for middle in (20, 64, 108)]
    heights = [rng.uniform(26, 46) for _ in centres]
    slopes = [rng.uniform(0.85, 1.2) for _ in centres]
    for i in sorted(range(3), key=lambda i: -heights[i]):  # the highest peak stands at the back
        peak = horizon - heights[i]
        ridge = peak + slopes[i] * np.abs(x - centres[i])
        inside = soft(ridge - y)
        # The light comes from the left; the border between the sides runs down in a bend.
        bend = centres[i] + 4 * np.sin((y - peak) / 7)
        side = mix(sunny, shaded, soft(bend - x, 1.5))
        # The cap ends in a zigzag of three teeth.
        teeth = 3.0 * np.abs(((x - centres[i]) / 9 + 0.5) % 2 - 1)
        cap = soft(y - (peak + 0.30 * heights[i] + teeth), 1.5)
        side = mix(side, mix(snow, 0.88 * np.asarray(snow), soft(bend - x, 1.5)), cap)
        rock = mix(rock, side, inside)
        alpha = np.maximum(alpha, inside)
    whole_rock = np.broadcast_to(planes(shaded), (3, PIXELS, PIXELS)).copy()
    whole_alpha = np.ones((PIXELS, PIXELS), np.float32)  # below, the ground hides it
    whole_rock[:, rows], whole_alpha[rows], whole_alpha[: rows.start] = rock, alpha, 0.0
    return whole_rock, whole_alpha


def paint_hills(rng, ground: str, time: str, horizon: float):
    """Grass, sand or snow as four soft folds, each with a lit crest. Returns colour and horizon line y(x)."""
    x, y = grid()
    far, near = GROUND[ground, time]
    color = mix(far, near, np.clip((y - horizon) / (PIXELS - horizon), 0, 1))
    swing = {"grass": 3.0, "sand": 4.0, "snow": 2.5}[ground]
    line = None
    for i, depth in enumerate((0.0, 0.16, 0.42, 0.72)):
        wave = np.sin(x / rng.uniform(16, 30) + rng.uniform(0, 6.3))
        if ground == "sand":
            wave = 1 - 2 * np.abs(np.sin(x / rng.uniform(40, 60) + rng.uniform(0, 6.3)))  # sharp dune crests
        crest = horizon + depth * (PIXELS - horizon) - swing * (0.5 + 0.35 * i) * wave
        if i == 0:
            line = crest
            continue
        below = y - crest
        # Brighter just under the crest, darker on the slope behind it.
        lit = np.exp(-np.maximum(below, 0) / 9) * soft(-below, 1.5)
        color = mix(color, (255, 255, 255), 0.15 * lit)
        dim = np.exp(-np.maximum(-below, 0) / 7) * soft(below, 1.5)
        color = color * (1 - 0.11 * dim)
    return color, line


def paint_sea(rng, time: str, horizon: float, light_x: float):
    """A flat horizon, lens-shaped waves that grow towards us, and the light's path."""
    x, y = grid()
    far, near = GROUND["sea", time]
    color = mix(far, near, np.clip((y - horizon) / (PIXELS - horizon), 0, 1) ** 0.7)
    if time != "day":
        path = soft(np.abs(x - light_x) - (5 + 0.2 * (y - horizon)), 9)
        color = mix(color, WAVE[time], 0.35 * path * np.clip(1 - (y - horizon) / 45, 0, 1))
    strokes = np.zeros_like(x)
    for depth in (0.16, 0.36, 0.6, 0.86):
        wave_y = horizon + depth * (PIXELS - horizon)
        long, thick = 8 + 9 * depth, 0.7 + 1.0 * depth
        start = rng.uniform(0, 44)
        rows = np.s_[int(wave_y) - 6 : int(wave_y) + 4]  # the whole row of waves lies in here
        # Waves repeat every 44 pixels; `across` runs from -1 to 1 over each of them.
        across = ((x[rows] - start + 22) % 44 - 22) / long
        bow = y[rows] - wave_y + 2.2 * np.cos(np.clip(1.6 * across, -1.6, 1.6))
        stroke = soft(np.abs(bow) - thick * (1 - across**2), 1.2) * (np.abs(across) < 1)
        strokes[rows] = np.maximum(strokes[rows], stroke)
    return mix(color, WAVE[time], 0.6 * strokes), np.full_like(x, horizon)
