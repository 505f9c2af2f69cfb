"""The attributes of the toy world, how scenes are drawn at random, and which are held out.

A *scene* is a complete, tiny description of a picture: what is in it, where, when
and in which style. Nothing here knows about pixels; `render.py` turns a scene into one.

All lengths are in pixels of the 128x128 picture, y grows downwards.
"""

import hashlib
from dataclasses import dataclass

import numpy as np

PIXELS = 128

TIMES = ("day", "sunset", "night", "dawn")
GROUNDS = ("grass", "sand", "snow", "sea")
KINDS = ("house", "tree", "flower", "boat", "car", "balloon", "star", "fish")
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "white", "black", "brown")
SIZES = ("small", "large")
STYLES = ("plain", "watercolor", "pixel art", "pencil sketch")

# These exist in the generator but `sample` never picks them unless asked to:
# later lessons teach them to a model that has never seen them.
NEW_KIND = "mushroom"
NEW_STYLE = "neon"

# Width and height of each kind as a share of its larger extent.
BOXES = {
    "house": (1.0, 0.96),
    "tree": (0.80, 1.0),
    "flower": (0.74, 1.0),
    "boat": (1.0, 0.96),
    "car": (1.0, 0.58),
    "balloon": (0.80, 1.0),
    "star": (1.0, 0.93),
    "fish": (1.0, 0.68),
    "mushroom": (0.96, 1.0),
}
SKY_KINDS = ("balloon", "star")  # these float; every other kind belongs to the ground

MARGIN = 8  # no thing comes nearer to the frame than this (watercolor leaves a paper border)
MIN_GAP = 40  # two things' centres are at least this far apart in x
HELD_OUT_IN = 10  # one combination in this many is held out


@dataclass(frozen=True)
class Thing:
    """One object. (x, y) is the centre of its bounding box, in pixels."""

    kind: str
    color: str
    size: str
    x: float
    y: float


@dataclass(frozen=True)
class Scene:
    """A whole picture in words. `seed` fixes the free choices of the drawing (hills, clouds ...)."""

    time: str
    ground: str
    mountains: bool
    style: str
    things: tuple[Thing, ...]
    seed: int


def generator(*key) -> np.random.Generator:
    """A random generator that depends on the whole numbers in `key` and on nothing else."""
    return np.random.default_rng(np.random.SeedSequence(key))


def extent(scene_seed: int, index: int, size: str, crowded: bool) -> float:
    """Larger side (pixels) of thing number `index`: small 30-36, large 54-64 (54-56 if two share the frame)."""
    low, high = (30, 36) if size == "small" else (54, 56 if crowded else 64)
    return float(generator(scene_seed, 10, index).uniform(low, high))


def horizon(scene_seed: int) -> float:
    """Mean y of the horizon, in pixels."""
    return float(generator(scene_seed, 12).uniform(71, 82))


def box(scene: Scene, index: int) -> tuple[float, float, float, float]:
    """Bounding box (left, top, right, bottom) in pixels of thing number `index`."""
    thing = scene.things[index]
    side = extent(scene.seed, index, thing.size, len(scene.things) > 1)
    wide, high = (side * share for share in BOXES[thing.kind])
    return thing.x - wide / 2, thing.y - high / 2, thing.x + wide / 2, thing.y + high / 2


def held_out_combination(kind: str, color: str, time: str, ground: str, style: str) -> bool:
    """True for a fixed tenth, about, of all (kind, color, time, ground, style).

    The rule: sha256 of "kind|color|time|ground|style" (utf-8), its first eight bytes
    read as a big-endian number; held out if that number is divisible by ten.
    It needs no list, no random state, and was fixed before any training.
    """
    text = "|".join((kind, color, time, ground, style))
    digest = hashlib.sha256(text.encode("utf-8")).digest()
    return int.from_bytes(digest[:8], "big") % HELD_OUT_IN == 0


def held_out(scene: Scene) -> bool:
    """True if ANY thing of the scene forms a held-out combination."""
    return any(held_out_combination(t.kind, t.color, scene.time, scene.ground, scene.style) for t in scene.things)


def sample(seed: int, split: str = "train", style=None, time=None, ground=None, kind=None, n=None) -> Scene:
    """Draw a scene at random, uniformly over the attributes; the same seed gives the same scene.

    seed:   a non-negative whole number
    split:  "train" (never a held-out combination), "held-out" (always one) or "any"
    style, time, ground, kind, n: pin this attribute instead of drawing it
            (`kind` pins the first thing; NEW_KIND and NEW_STYLE are allowed here only)
    """
    if split not in ("train", "held-out", "any"):
        raise ValueError(f"unknown split {split!r}")
    rng = generator(seed, 1)
    for _ in range(1000):
        scene = propose(rng, style, time, ground, kind, n)
        if split == "any" or held_out(scene) == (split == "held-out"):
            return scene
    raise ValueError(f"no {split} scene among 1000 with style={style} time={time} ground={ground} kind={kind}")


def propose(rng, style, time, ground, kind, n) -> Scene:
    """One random scene, held out or not; arguments that are not None are taken as they are."""
    count = n if n is not None else 1 + int(rng.random() < 0.4)
    kinds = [kind if kind is not None else pick(rng, KINDS)]
    colors = [pick(rng, COLORS)]
    if count == 2:
        kinds.append(pick(rng, [k for k in KINDS if k != kinds[0]]))
        # The same colour twice is rare: it would make the captions ambiguous to learn from.
        same = rng.random() < 0.05
        colors.append(colors[0] if same else pick(rng, [c for c in COLORS if c != colors[0]]))
    sizes = [pick(rng, SIZES) for _ in range(count)]
    time = time if time is not None else pick(rng, TIMES)
    ground = ground if ground is not None else pick(rng, GROUNDS)
    style = style if style is not None else pick(rng, STYLES)
    mountains = bool(rng.random() < 0.5)
    seed = int(rng.integers(2**31))
    things = place(rng, seed, kinds, colors, sizes)
    return Scene(time, ground, mountains, style, things, seed)


def pick(rng, options) -> str:
    """One of `options`, each equally likely."""
    return options[int(rng.integers(len(options)))]


def place(rng, seed: int, kinds, colors, sizes) -> tuple[Thing, ...]:
    """Choose positions: inside the frame, and two things clearly beside each other."""
    sides = [extent(seed, i, size, len(kinds) > 1) for i, size in enumerate(sizes)]
    widths = [side * BOXES[kind][0] for side, kind in zip(sides, kinds, strict=True)]
    heights = [side * BOXES[kind][1] for side, kind in zip(sides, kinds, strict=True)]
    xs = places_across(rng, widths)
    things = []
    for kind, color, size, x, high in zip(kinds, colors, sizes, xs, heights, strict=True):
        if kind in SKY_KINDS:
            top = MARGIN + rng.uniform(0, 12 if size == "large" else 22)
            y = top + high / 2
        else:
            # The feet stand between the middle and the front of the ground; a small
            # thing may stand further back. Fish are short, so they leap a little higher.
            bottom = rng.uniform(100 if size == "small" else 108, PIXELS - MARGIN)
            y = bottom - high / 2 - (4 if kind == "fish" else 0)
        things.append(Thing(kind, color, size, round(float(x), 2), round(float(y), 2)))
    return tuple(things)


def places_across(rng, widths) -> list[float]:
    """x of the centres of one or two things with these widths (pixels)."""
    left = [MARGIN + w / 2 for w in widths]
    if len(widths) == 1:
        return [rng.uniform(left[0], PIXELS - left[0])]
    half = sum(widths) / 2
    widest = PIXELS - 2 * MARGIN - half  # centres cannot be further apart than this
    closest = min(max(MIN_GAP, 0.92 * half), widest)  # a slight overlap is allowed
    gap = rng.uniform(closest, widest)
    first = int(rng.random() < 0.5)  # which of the two is on the left
    x = rng.uniform(left[first], left[first] + widest - gap)
    return [x, x + gap] if first == 0 else [x + gap, x]
