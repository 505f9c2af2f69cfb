"""The network told all it is to know: words, sizes, guidance, ControlNets, further channels, tiles. One `Network`.

Here the closures of `ldm.guidance`, `ldm.control` and `ldm.tiles` are put around each other:

    guidance(together or apart(channels joined(tiles(the UNet reading words, with what ControlNets add inside it))))

FLUX's transformer stands in the UNet's place, and nothing around it knows.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ldm.control import Seen, lead
from ldm.errors import LDMError
from ldm.flux import as_told
from ldm.guidance import (
    Network,
    Output,
    Told,
    classifier_free,
    conditional,
    halves_apart,
    halves_together,
    joined,
    text_and_image,
)
from ldm.models.blocks import guidance_embedding
from ldm.models.flux import Flux
from ldm.models.unet import Extras, UNet
from ldm.schedules import Level
from ldm.sizes import Sizes
from ldm.text.words import Words
from ldm.tiles import tiled


@dataclass(frozen=True)
class Beside:
    """What the UNet is told beside latent, timestep and words; the same at every step."""

    channels: Tensor | None = None  # (B, C', h, w), read behind the latent
    image_guidance: float | None = None  # of a model that edits: the channels are guided, too
    seen: Sequence[Seen] = ()  # ControlNets, and what they see
    tile: int = 0  # positions of the latent along a side of a tile; 0: no tiles
    overlap: int = 0
    times: Sequence[float] = ()  # the timesteps of the run, for which FLUX prepares
    rounded: bool = False  # FLUX is told timesteps as diffusers tells them (compat)

    def __post_init__(self):
        if self.tile and self.seen:
            raise LDMError("Tiles and ControlNets don't go together, for a net sees its picture whole: leave one out.")


def tell(
    unet: UNet | Flux,
    words: Words,
    sizes: Sizes | None = None,
    noise_level: int | None = None,
    guidance: float = 1.0,
    rounded: bool = False,
) -> Told:
    """What this UNet is told in one part of guidance: `words` of B pictures, and whatever else it was made to be told.

    `sizes`: of SDXL. `noise_level`: of an upscaler. `guidance`: the scale itself, of one distilled from guided ones;
    `rounded` to the dtype of FLUX's transformer, as diffusers does it.
    """
    if isinstance(unet, Flux):
        return tell_flux(unet, words, guidance, rounded)
    config, like, count = unet.config, words.context.to(unet.dtype), len(words.context)
    pooled = ids = labels = scale = None
    if sizes is not None:
        pooled = words.pooled.to(like)
        ids = torch.tensor([sizes.numbers] * count, device=like.device)  # (B, 6); in half precision 1017 would be 1016
    if noise_level is not None:
        labels = torch.full((count,), noise_level, device=like.device)
    if config.time_cond_proj_dim is not None:
        scale = torch.tensor([guidance] * count, dtype=torch.float64)
        scale = guidance_embedding(scale, config.time_cond_proj_dim).to(like)
    return Told(like, Extras(pooled, ids, labels, scale))


def tell_flux(flux: Flux, words: Words, guidance: float, rounded: bool = False) -> Told:
    """What FLUX is told: the text's tokens, its one vector, and where it was made for that the scale of guidance."""
    context, scale = words.context.to(flux.dtype), None
    if flux.config.guidance_embeds:
        dtype = flux.dtype if rounded else torch.promote_types(flux.dtype, torch.float32)
        scale = torch.full((len(context),), guidance, dtype=dtype, device=context.device)
    return Told(context, Extras(pooled=words.pooled.to(context), guidance=scale))


def unguided(unet: UNet | Flux, cond: Told, beside: Beside = Beside()) -> Network:
    """The UNet told `cond`, once a step."""
    return part(unet, [cond], [beside.channels], beside)


def guided(
    unet: UNet | Flux, uncond: Told, cond: Told, scale: float, beside: Beside = Beside(), together: bool = True
) -> Network:
    """Classifier-free guidance by `scale` from `uncond` to `cond`; the two guidances of a model that edits.

    `together` runs the parts in one batch, otherwise one after the other.
    """
    told, channels = [uncond, cond], [beside.channels] * 2
    if beside.image_guidance is not None:
        told = [uncond, uncond, cond]
        channels = [torch.zeros_like(beside.channels), beside.channels, beside.channels]
    if together:
        halves = halves_together(part(unet, told, channels, beside), len(told))
    else:
        last = len(told) - 1
        pairs = enumerate(zip(told, channels, strict=True))
        halves = halves_apart(*(part(unet, [each], [more], beside, k == last, cond) for k, (each, more) in pairs))
    if beside.image_guidance is not None:
        return text_and_image(halves, scale, beside.image_guidance)
    return classifier_free(halves, scale)


def in_turn(networks: Sequence[Network], turns: Sequence[int], first: int) -> Network:
    """At row `first` + k of the schedule the network of number `turns[k]`: words that change on the way.

    It is the level's row that counts, so a method that looks at the next row asks with the next row's words. Before the
    first of the `turns` it is that one, behind the last that one.
    """
    if len(networks) == 1:
        return networks[0]

    def network(x: Tensor, level: Level) -> Output:
        return networks[turns[min(max(level.i - first, 0), len(turns) - 1)]](x, level)

    return network


def part(
    unet: UNet | Flux,
    told: Sequence[Told],
    channels: Sequence[Tensor | None],
    beside: Beside,
    last: bool = True,
    cond: Told | None = None,
) -> Network:
    """One run of the UNet for one part of guidance, or for several in a batch; `last`: the conditional one is in it.

    `cond` is what that one is told, if it isn't the last of those `told` here.
    """
    rounded = beside.rounded and isinstance(unet, Flux)
    times = [as_told(t, unet.dtype) for t in beside.times] if rounded else beside.times
    network = conditional(unet, *Told.join(told), lead(beside.seen, told, last, cond, times), times)
    if rounded:
        network = told_rounded(network, unet.dtype)
    if beside.tile:
        network = tiled(network, beside.tile, beside.overlap)
    return network if beside.channels is None else joined(network, torch.cat(list(channels)))


def told_rounded(network: Network, dtype: torch.dtype) -> Network:
    """The network told timesteps in `dtype`, as diffusers' FLUX is (compat)."""
    return lambda x, level: network(x, level._replace(t=as_told(level.t, dtype)))
