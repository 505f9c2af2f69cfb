"""The training pictures, drawn once by `ldm.scenes` and kept on disk: `images.npy`, `masks.npy`, `captions.json`.

A scene's seed is its row, so the set can be drawn again at any time.
"""

import json
import os
import signal
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from ldm import scenes
from ldm.errors import LDMError
from ldm.io.atomic import atomic_folder
from ldm.train.parallel import leader_first

CAPTIONS_EACH = 4  # wordings a picture: words vary more often than pictures do


@dataclass
class Pictures:
    """`images` (N, 128, 128, 3) uint8 and `masks` (N, 128, 128) bool, where any object is, both mapped from disk."""

    images: np.ndarray
    masks: np.ndarray
    captions: list[list[str]]
    scenes: list[scenes.Scene]

    def __len__(self) -> int:
        return len(self.images)

    def tensor(self, rows: np.ndarray | slice) -> Tensor:
        """Pictures as the networks see them: (B, 3, 128, 128) in [-1, 1]."""
        return to_tensor(self.images[rows])


def to_tensor(pixels: np.ndarray) -> Tensor:
    """uint8 (B, H, W, 3) -> float32 (B, 3, H, W) in [-1, 1]."""
    return torch.from_numpy(np.array(pixels)).permute(0, 3, 1, 2).float() / 127.5 - 1


def _draw(job: tuple[int, str]) -> tuple[np.ndarray, np.ndarray, list[str]]:
    seed, split = job
    scene = scenes.sample(seed, split)
    picture = scenes.render(scene)
    words = [scenes.caption(scene, seed * CAPTIONS_EACH + k) for k in range(CAPTIONS_EACH)]
    return picture.image, picture.masks.any(axis=0), words


def _draw_all(seeds: range, split: str) -> Iterator[tuple[np.ndarray, np.ndarray, list[str]]]:
    """`_draw` on all cores. Ctrl-C is for this process alone: it drops what waits, the others finish their chunks."""
    ignore = (signal.SIGINT, signal.SIG_IGN)
    with ProcessPoolExecutor(os.cpu_count(), initializer=signal.signal, initargs=ignore) as pool:
        try:
            yield from pool.map(_draw, [(seed, split) for seed in seeds], chunksize=16)
        finally:
            pool.shutdown(cancel_futures=True)


def pictures(folder: Path, count: int, split: str = "train", first: int = 0) -> Pictures:
    """The pictures of seeds `first` to `first + count - 1`, drawn now unless `folder` already holds them."""
    folder = Path(folder) / f"{split}-{first}-{count}"
    seeds = range(first, first + count)
    with leader_first():
        if not folder.exists():
            folder.parent.mkdir(parents=True, exist_ok=True)
            with atomic_folder(folder) as new:
                images = np.lib.format.open_memmap(new / "images.npy", "w+", np.uint8, (count, 128, 128, 3))
                masks = np.lib.format.open_memmap(new / "masks.npy", "w+", bool, (count, 128, 128))
                captions = []
                for i, (image, mask, words) in enumerate(
                    tqdm(_draw_all(seeds, split), total=count, desc=f"drawing {split}")
                ):
                    images[i], masks[i] = image, mask
                    captions.append(words)
                images.flush(), masks.flush()
                (new / "captions.json").write_text(json.dumps(captions))
    images = np.load(folder / "images.npy", mmap_mode="r")
    masks = np.load(folder / "masks.npy", mmap_mode="r")
    captions = json.loads((folder / "captions.json").read_text())
    for row in (0, count - 1):
        image, mask, words = _draw((seeds[row], split))
        if not (np.array_equal(images[row], image) and np.array_equal(masks[row], mask) and captions[row] == words):
            raise LDMError(f"{folder} was drawn by another version of ldm.scenes: remove it, to have it drawn again.")
    return Pictures(images, masks, captions, [scenes.sample(seed, split) for seed in seeds])


def tiled(tiles: Sequence[Image.Image], columns: int) -> Image.Image:
    """Pictures of one size in one, row by row."""
    width, height = tiles[0].size
    sheet = Image.new("RGB", (columns * width, -(-len(tiles) // columns) * height))
    for k, tile in enumerate(tiles):
        sheet.paste(tile, (k % columns * width, k // columns * height))
    return sheet
