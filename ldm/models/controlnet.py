"""ControlNet: a copy of the UNet's encoder that reads a second picture, and adds what it sees to the UNet's skips.

Zhang et al. 2023, "Adding Conditional Control to Text-to-Image Diffusion Models", section 3. Names are those of
diffusers' `ControlNetModel`; those of the copied encoder equal the UNet's, so `from_unet` needs no table.
Shapes: B batch, C channels, H and W of the picture, h and w of the latent.
"""

from dataclasses import dataclass, fields
from itertools import pairwise
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.errors import LDMError
from ldm.models.blocks import Context
from ldm.models.unet import EncoderConfig, Extras, UNet, UNetConfig, UNetEncoder
from ldm.models.vae import VAEConfig


@dataclass(frozen=True)
class ControlNetConfig(EncoderConfig):
    """The fields of a ControlNet's `config.json`: the encoder's, and those of the picture it reads."""

    conditioning_channels: int = 3
    conditioning_embedding_out_channels: tuple[int, ...] = (16, 32, 96, 256)
    controlnet_conditioning_channel_order: str = "rgb"
    global_pool_conditions: bool = False

    what: ClassVar[str] = "the ControlNet"
    class_name: ClassVar[str] = "ControlNetModel"

    def to_json(self) -> dict:
        """The same as diffusers writes it, which knows no guidance embedding in a ControlNet."""
        fields = super().to_json()
        if self.time_cond_proj_dim is None:
            del fields["time_cond_proj_dim"]
        return fields

    def validate(self) -> None:
        super().validate()
        order = self.controlnet_conditioning_channel_order
        if order not in ("rgb", "bgr"):
            raise LDMError(f"The ControlNet reads its picture's colours in the order {order!r}; ldm knows rgb and bgr.")

    @property
    def factor(self) -> int:
        """How many pixels of the picture make one position of the latent, along a side."""
        return 2 ** (len(self.conditioning_embedding_out_channels) - 1)


class ConditioningEmbedding(nn.Module):
    """The picture, shrunk to the latent's size by strided convolutions (section 3.3). The last one begins at zero."""

    def __init__(self, channels: int, config: ControlNetConfig):
        super().__init__()
        widths = config.conditioning_embedding_out_channels
        self.conv_in = nn.Conv2d(config.conditioning_channels, widths[0], 3, padding=1)
        self.blocks = nn.ModuleList()
        for narrow, wide in pairwise(widths):
            self.blocks += [nn.Conv2d(narrow, narrow, 3, padding=1), nn.Conv2d(narrow, wide, 3, padding=1, stride=2)]
        self.conv_out = zero(nn.Conv2d(widths[-1], channels, 3, padding=1))

    def forward(self, picture: Tensor) -> Tensor:
        h = F.silu(self.conv_in(picture))  # (B, 16, H, W)
        for block in self.blocks:
            h = F.silu(block(h))
        return self.conv_out(h)  # (B, C, h, w)


class ControlNet(UNetEncoder):
    """The encoder's copy, the embedding of the picture before it, and a zero convolution behind every output."""

    config: ControlNetConfig

    def __init__(self, config: ControlNetConfig):
        super().__init__(config)
        widths, last = config.block_out_channels, len(config.block_out_channels) - 1
        self.controlnet_cond_embedding = ConditioningEmbedding(widths[0], config)
        # One for conv_in's output, and at each level one a layer and one for the downsampling.
        skips = [widths[0]]
        for level, width in enumerate(widths):
            skips += [width] * (config.layers_per_block + (level < last))
        self.controlnet_down_blocks = nn.ModuleList(zero(nn.Conv2d(width, width, 1)) for width in skips)
        self.controlnet_mid_block = zero(nn.Conv2d(widths[-1], widths[-1], 1))

    @classmethod
    def from_unet(
        cls, unet: UNet, conditioning_embedding_out_channels: tuple[int, ...] = (16, 32, 96, 256)
    ) -> "ControlNet":
        """A copy of the UNet's encoder that changes nothing yet: every zero convolution is zero."""
        shared = {field.name: getattr(unet.config, field.name) for field in fields(EncoderConfig)}
        net = cls(ControlNetConfig(**shared, conditioning_embedding_out_channels=conditioning_embedding_out_channels))
        encoder = {name: tensor for name, tensor in unet.state_dict().items() if name in net.state_dict()}
        net.load_state_dict(encoder, strict=False)
        return net.to(unet.conv_in.weight.device, unet.dtype)

    def condition(self, picture: Tensor) -> Tensor:
        """`picture` (B, 3, H, W) in [0, 1] -> its features (B, C, h, w), which don't change between the steps."""
        if self.config.controlnet_conditioning_channel_order == "bgr":
            picture = picture.flip(1)
        return self.controlnet_cond_embedding(picture)

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        context: Context,
        features: Tensor,
        extras: Extras = Extras(),
        scale: float = 1.0,
        guess: bool = False,
    ) -> tuple[list[Tensor], Tensor]:
        """The residuals (skips, middle) for the UNet that reads the same `x` (B, C, h, w), `t` and `context`.

        `features` is what `condition` made of the picture. `guess` weighs them from 0.1 at the finest level to 1 at the
        middle (the authors' guess mode), so that the picture's contents count more than its details.
        """
        t = torch.as_tensor(t, device=x.device).expand(len(x))
        emb = self.embed(t, extras)
        middle, skips = self.encode(self.conv_in(x) + features, emb, context)
        residuals = [conv(skip) for conv, skip in zip(self.controlnet_down_blocks, skips, strict=True)]
        residuals.append(self.controlnet_mid_block(middle))
        pool = self.config.global_pool_conditions  # the "shuffle" ControlNet: a mood, not a place
        n = len(residuals)
        weights = [scale * (10 ** (k / (n - 1) - 1) if guess and not pool else 1.0) for k in range(n)]
        residuals = [weight * residual for weight, residual in zip(weights, residuals, strict=True)]
        if pool:
            residuals = [residual.mean(dim=(2, 3), keepdim=True) for residual in residuals]
        return residuals[:-1], residuals[-1]


# What gives the residuals their shapes, and what is read beside the latent. Transformers may be fewer: SDXL has small
# ControlNets.
SHARED = ("block_out_channels", "layers_per_block", "cross_attention_dim", "addition_embed_type")
BASES = {768: "Stable Diffusion 1", 1024: "Stable Diffusion 2", 2048: "SDXL"}  # by the width of the text they read


def check_base(config: ControlNetConfig, unet: UNetConfig, vae: VAEConfig, name: str = "The ControlNet") -> None:
    """Raise LDMError, with the base that it fits, if a ControlNet's outputs have no place in this model's UNet."""
    apart = [field for field in SHARED if getattr(config, field) != getattr(unet, field)]
    if apart:
        widths = (config.cross_attention_dim, unet.cross_attention_dim)
        fits, here = (BASES.get(width, f"a model that reads text {width} wide") for width in widths)
        here = "this model" if here == fits else f"this model, {here}," if widths[1] in BASES else "this model"
        details = "; ".join(f"{field} {getattr(config, field)}, here {getattr(unet, field)}" for field in apart)
        raise LDMError(f"{name} was made for another base than {here}: it fits {fits} ({details}).")
    if config.factor != vae.factor or config.in_channels != vae.latent_channels:
        raise LDMError(
            f"{name} reads {config.in_channels} channels of latents that stand for {config.factor} pixels a side; this "
            f"model's have {vae.latent_channels} and stand for {vae.factor}."
        )
    if config.conditioning_channels != 3:
        raise LDMError(f"{name} looks at {config.conditioning_channels} channels; ldm shows it pictures, which have 3.")


def zero(conv: nn.Conv2d) -> nn.Conv2d:
    """The convolution with all its numbers 0, through which a finished network is left as it is (section 3.1)."""
    nn.init.zeros_(conv.weight)
    nn.init.zeros_(conv.bias)
    return conv
