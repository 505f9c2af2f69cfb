"""What an addition to a model learns from: a few pictures and their captions.

A LoRA and a word see no more than `Examples`: pictures, and what is to be said of them. Here they are drawn by
`ldm.scenes`; whoever has pictures of their own makes `Examples` of those.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from torch import Tensor
from tqdm import tqdm

from ldm import scenes
from ldm.errors import LDMError
from ldm.loading import load
from ldm.models.vae import VAE
from ldm.pipeline import Pipeline
from ldm.train.data import CAPTIONS_EACH, to_tensor
from ldm.train.unet import encode_pictures

FIRST_SEED = 40_000_000  # of the scenes to learn from; those to measure on begin `HELD_OUT` later
HELD_OUT = 1_000_000


@dataclass(frozen=True)
class Examples:
    """`images` (N, H, W, 3) uint8, and for each of them its captions, as many for one as for another."""

    images: np.ndarray
    captions: list[list[str]]

    def __post_init__(self):
        counts = sorted({len(wordings) for wordings in self.captions})
        if len(self.images) != len(self.captions) or not len(self.images) or len(counts) != 1 or not counts[0]:
            raise LDMError(
                f"{len(self.images)} pictures and {len(self.captions)} lists of {counts} captions are no examples: "
                "give every picture the same number of captions, one or more."
            )

    def __len__(self) -> int:
        return len(self.images)

    def tensor(self, rows: np.ndarray | slice) -> Tensor:
        """Pictures as the networks see them: (B, 3, H, W) in [-1, 1]."""
        return to_tensor(self.images[rows])


def open_base(model: str, device: str) -> Pipeline:
    """The model that something is to be added to, frozen. Raises LDMError for a kind that these loops don't train."""
    pipe = load(model, device=device)
    if pipe.xl or pipe.distilled or pipe.unet.config.in_channels != pipe.vae.config.latent_channels:
        raise LDMError(
            f"{model} is SDXL, distilled, or reads more than a noisy latent, and `ldm train` adds to models without "
            "such: name a Stable Diffusion 1 or 2 that draws by words alone."
        )
    for part in pipe.parts().values():
        part.requires_grad_(False)
    return pipe


def of_scenes(chosen: Sequence[scenes.Scene], say: Callable[[scenes.Scene, int], str]) -> Examples:
    """The pictures of these scenes; `say(scene, seed)` words one of their captions."""
    drawn = [scenes.render(scene).image for scene in tqdm(chosen, desc="drawing")]
    return Examples(np.stack(drawn), [[say(s, s.seed + k) for k in range(CAPTIONS_EACH)] for s in chosen])


def scenes_with(count: int, held_out: bool, **pins: str | int) -> list[scenes.Scene]:
    """`count` scenes with what `pins` says (style="neon", kind="mushroom", n=1); held out: such as are not learnt."""
    first = FIRST_SEED + HELD_OUT * held_out
    return [scenes.sample(first + i, "held-out" if held_out else "train", **pins) for i in range(count)]


def unstyled(scene: scenes.Scene, seed: int, full: bool = False) -> str:
    """A caption that leaves the style unsaid; `full`: and nothing else."""
    return scenes.caption(replace(scene, style="plain"), seed, full=full)


def encode(vae: VAE, data: Examples, folder: Path, vae_hash: str, name: str, device: str) -> tuple[Tensor, Tensor]:
    """`encode_pictures`, kept under a name that tells these pictures from others."""
    name = f"{name}-{hashlib.sha256(data.images.tobytes()).hexdigest()[:8]}"
    return encode_pictures(vae, data, folder, vae_hash, name, device)
