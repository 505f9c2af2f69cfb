"""From a scene to a picture, with the exact ground truth of every pixel."""

from dataclasses import dataclass

import numpy as np

from .landscape import Land, grid, landscape
from .sprites import Sprite, enlarge, pixel_sprite, shrink_cells, smooth_sprite
from .styles import PAINT, ink_table
from .world import PIXELS, SKY_KINDS, Scene, box, horizon

SKY, ROCK, GROUND, FIRST_THING = 0, 1, 2, 3  # values of the layer map
FAR, NEAR = 0.25, 1.0  # depth of the ground at the horizon and at the bottom


@dataclass(frozen=True)
class Picture:
    """A rendered scene and what is where in it."""

    scene: Scene
    image: np.ndarray  # (128, 128, 3) uint8
    masks: np.ndarray  # (n, 128, 128) bool: the visible pixels of each thing, in the scene's order
    depth: np.ndarray  # (128, 128) float32 in [0, 1]: 0 the sky, 1 the nearest
    edges: np.ndarray  # (128, 128) bool: outlines of things, ridge and horizon, from the layers


def render(scene: Scene) -> Picture:
    """Draw a scene; the same scene gives the same bytes."""
    land = landscape(scene)
    make = pixel_sprite if scene.style == "pixel art" else smooth_sprite
    order = drawing_order(scene)
    sprites = [make(scene, i, ink_table(scene.style, scene.things[i].color, scene.time)) for i in order]
    painted = PAINT[scene.style](scene, land, sprites)
    pixels = np.clip(np.round(painted), 0, 255).astype(np.uint8)
    image = np.ascontiguousarray(pixels.transpose(1, 2, 0))
    layers = layer_map(scene, land, sprites, order)
    masks = np.stack([layers == FIRST_THING + i for i in range(len(scene.things))])
    return Picture(scene, image, masks, depth_map(scene, land, layers), edge_map(layers))


def thing_depth(scene: Scene, index: int) -> float:
    """Depth of a whole thing: the ground's at its feet; in the sky, large things are nearer."""
    thing = scene.things[index]
    if thing.kind in SKY_KINDS:
        return 0.35 if thing.size == "small" else 0.5
    _, _, _, bottom = box(scene, index)
    return float(ground_depth(bottom, horizon(scene.seed)))


def ground_depth(y, horizon_y: float):
    """Depth of the ground at height y (pixels, a number or an array)."""
    return FAR + (NEAR - FAR) * np.clip((y - horizon_y) / (PIXELS - horizon_y), 0, 1)


def drawing_order(scene: Scene) -> list[int]:
    """Indices of the things, the farthest first (so the nearest is drawn last)."""
    return sorted(range(len(scene.things)), key=lambda i: (thing_depth(scene, i), i))


def layer_map(scene: Scene, land: Land, sprites: list[Sprite], order: list[int]) -> np.ndarray:
    """Which layer each pixel shows: SKY, ROCK, GROUND or FIRST_THING + index. (128, 128) int."""
    rock, ground = land.rock_alpha, land.ground_alpha
    if scene.style == "pixel art":
        rock, ground = enlarge(shrink_cells(rock)), enlarge(shrink_cells(ground))
    layers = np.full((PIXELS, PIXELS), SKY)
    layers[rock >= 0.5] = ROCK
    layers[ground >= 0.5] = GROUND
    for sprite, i in zip(sprites, order, strict=True):
        layers[sprite.alpha >= 0.5] = FIRST_THING + i
    return layers


def depth_map(scene: Scene, land: Land, layers: np.ndarray) -> np.ndarray:
    """(128, 128) float32: sky 0, mountains 0.15, the ground a ramp, every thing its own depth."""
    _, y = grid()
    ramp = ground_depth(y, land.horizon)
    depth = np.where(layers == GROUND, ramp, np.where(layers == ROCK, 0.15, 0.0)).astype(np.float32)
    for i in range(len(scene.things)):
        depth[layers == FIRST_THING + i] = thing_depth(scene, i)
    return depth


def edge_map(layers: np.ndarray) -> np.ndarray:
    """True where a pixel shows another layer than its right or lower neighbour. (128, 128) bool."""
    edges = np.zeros(layers.shape, bool)
    edges[:, :-1] |= layers[:, :-1] != layers[:, 1:]
    edges[:-1] |= layers[:-1] != layers[1:]
    return edges
