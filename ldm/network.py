"""The UNet told all it is to know: words, guidance, ControlNets, further channels, tiles. One `Network` for the loop.

Here the closures of `ldm.guidance`, `ldm.control` and `ldm.tiles` are put around each other:

    guidance(together or apart(channels joined(tiles(the UNet reading words, with what ControlNets add inside it))))
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ldm.control import Seen, lead
from ldm.errors import LDMError
from ldm.guidance import Network, classifier_free, conditional, halves_apart, halves_together, joined, text_and_image
from ldm.models.unet import Extras, UNet
from ldm.tiles import tiled


@dataclass(frozen=True)
class Beside:
    """What the UNet is told beside latent, timestep and words; the same at every step."""

    channels: Tensor | None = None  # (B, C', h, w), read behind the latent
    image_guidance: float | None = None  # of a model that edits: the channels are guided, too
    seen: Sequence[Seen] = ()  # ControlNets, and what they see
    noise_level: int | None = None  # of an upscaler
    tile: int = 0  # positions of the latent along a side of a tile; 0: no tiles
    overlap: int = 0

    def __post_init__(self):
        if self.tile and self.seen:
            raise LDMError("Tiles and ControlNets don't go together, for a net sees its picture whole: leave one out.")


def unguided(unet: UNet, cond: Tensor, beside: Beside = Beside()) -> Network:
    """The UNet reading `cond` (B, L, D), once a step."""
    return part(unet, [cond], [beside.channels], beside)


def guided(
    unet: UNet, uncond: Tensor, cond: Tensor, scale: float, beside: Beside = Beside(), together: bool = True
) -> Network:
    """Classifier-free guidance by `scale` from `uncond` to `cond`, each (B, L, D); the two of a model that edits.

    `together` runs the parts in one batch, otherwise one after the other.
    """
    contexts, channels = [uncond, cond], [beside.channels] * 2
    if beside.image_guidance is not None:
        contexts = [uncond, uncond, cond]
        channels = [torch.zeros_like(beside.channels), beside.channels, beside.channels]
    if together:
        halves = halves_together(part(unet, contexts, channels, beside), len(contexts))
    else:
        last = len(contexts) - 1
        pairs = enumerate(zip(contexts, channels, strict=True))
        halves = halves_apart(*(part(unet, [words], [more], beside, k == last) for k, (words, more) in pairs))
    if beside.image_guidance is not None:
        return text_and_image(halves, scale, beside.image_guidance)
    return classifier_free(halves, scale)


def part(
    unet: UNet, contexts: Sequence[Tensor], channels: Sequence[Tensor | None], beside: Beside, last: bool = True
) -> Network:
    """One run of the UNet for one part of guidance, or for several in a batch; `last`: the conditional one is in it."""
    context = torch.cat(list(contexts))
    labels = None
    if beside.noise_level is not None:
        labels = torch.full((len(context),), beside.noise_level, device=context.device)
    network = conditional(unet, context, Extras(class_labels=labels), lead(beside.seen, contexts, last))
    if beside.tile:
        network = tiled(network, beside.tile, beside.overlap)
    return network if beside.channels is None else joined(network, torch.cat(list(channels)))
