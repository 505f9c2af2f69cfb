"""T2I-Adapter: a small network that looks at a picture once; what it sees is added on the UNet's way down, every step.

Mou et al. 2023, "T2I-Adapter", section 3.3. A ControlNet reads latent, timestep and words, and is run beside the UNet
at every step; an adapter reads its picture alone, once. Names are those of diffusers' `T2IAdapter`.
Shapes: B batch, C channels, H and W of the picture, p pixels of it along a side that one position stands for.
"""

from dataclasses import asdict, dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.config import check_class, from_json
from ldm.errors import LDMError
from ldm.models.unet import DOWN, UNetConfig
from ldm.models.vae import VAEConfig

FULL, LIGHT, XL = "full_adapter", "light_adapter", "full_adapter_xl"


@dataclass(frozen=True)
class AdapterConfig:
    """The fields of an adapter's `config.json`. Defaults are diffusers'."""

    in_channels: int = 3  # 1: it looks at grey pictures, as those for sketches and edges do
    channels: tuple[int, ...] = (320, 640, 1280, 1280)
    num_res_blocks: int = 2
    downscale_factor: int = 8
    adapter_type: str = FULL

    what: ClassVar[str] = "the adapter"
    class_name: ClassVar[str] = "T2IAdapter"

    @classmethod
    def from_json(cls, fields: dict) -> "AdapterConfig":
        """Read diffusers' JSON; a field that is not known is refused by name."""
        check_class(fields.get("_class_name"), (cls.class_name,), cls.what)
        config = from_json(cls, fields, {}, cls.what)
        config.validate()
        return config

    def to_json(self) -> dict:
        """The same as diffusers writes it."""
        return {"_class_name": self.class_name, **asdict(self)}

    def validate(self) -> None:
        """Raise LDMError where the fields contradict each other or ask for what is not implemented."""
        if self.adapter_type not in (FULL, LIGHT, XL):
            raise LDMError(f"The adapter is a {self.adapter_type!r}; ldm knows {FULL}, {LIGHT} and {XL}.")
        if not self.channels:
            raise LDMError("The adapter's channels name no level: one number a level is needed.")
        if self.adapter_type == XL and len(set(self.channels[2:])) > 1:
            raise LDMError(f"Behind the second level a {XL} has one width, but its channels are {self.channels}.")

    def shrinks(self, level: int) -> bool:
        """Whether that level halves the size of the one before it."""
        return level == 2 if self.adapter_type == XL else level > 0

    @property
    def features(self) -> list[tuple[int, int]]:
        """(C, p) of every feature map. The light adapter has one level more than it names: its last width again."""
        found, pixels = [], self.downscale_factor
        for level, width in enumerate(self.channels + self.channels[-1:] * (self.adapter_type == LIGHT)):
            pixels *= 2 if self.shrinks(level) else 1
            found.append((width, pixels))
        return found


class ResnetBlock(nn.Module):
    """Two convolutions and their input: no norm, and no timestep."""

    def __init__(self, channels: int, kernel: int):
        super().__init__()
        self.block1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.block2 = nn.Conv2d(channels, channels, kernel, padding=kernel // 2)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.block2(F.relu(self.block1(x)))


class Level(nn.Module):
    """One resolution. The light adapter works at a quarter of the width, between two 1x1 convolutions."""

    def __init__(self, config: AdapterConfig, level: int, c_in: int, c_out: int):
        super().__init__()
        light = config.adapter_type == LIGHT
        width = c_out // 4 if light else c_out
        self.shrinks = config.shrinks(level)
        self.in_conv = nn.Conv2d(c_in, width, 1) if light or c_in != c_out else None
        self.resnets = nn.Sequential(*(ResnetBlock(width, 3 if light else 1) for _ in range(config.num_res_blocks)))
        self.out_conv = nn.Conv2d(width, c_out, 1) if light else None

    def forward(self, x: Tensor) -> Tensor:
        if self.shrinks:
            x = F.avg_pool2d(x, 2, ceil_mode=True)  # (B, C, H/2, W/2), odd sizes rounded up, as the UNet's are
        x = self.resnets(x if self.in_conv is None else self.in_conv(x))
        return x if self.out_conv is None else self.out_conv(x)


class Adapter(nn.Module):
    """The picture's pixels folded into channels, then one level after another; the output of each is a feature map."""

    def __init__(self, config: AdapterConfig):
        super().__init__()
        self.config = config
        widths = [width for width, _ in config.features]
        pixels = config.in_channels * config.downscale_factor**2
        inputs = [pixels if config.adapter_type == LIGHT else widths[0], *widths]
        body = nn.ModuleList(Level(config, k, inputs[k], width) for k, width in enumerate(widths))
        self.adapter = nn.ModuleDict({"body": body})
        if config.adapter_type != LIGHT:
            self.adapter["conv_in"] = nn.Conv2d(pixels, widths[0], 3, padding=1)

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    def condition(self, picture: Tensor) -> list[Tensor]:
        """`picture` (B, 1 or 3, H, W) in [0, 1] -> what is added on the UNet's way down, each (B, C, H/p, W/p).

        H and W are multiples of `downscale_factor`.
        """
        h = F.pixel_unshuffle(picture, self.config.downscale_factor)  # (B, C*f*f, H/f, W/f)
        if "conv_in" in self.adapter:
            h = self.adapter["conv_in"](h)
        features = []
        for level in self.adapter["body"]:
            h = level(h)
            features.append(h)
        return features


def check_levels(config: AdapterConfig, unet: UNetConfig, vae: VAEConfig, name: str = "The adapter") -> None:
    """Raise LDMError, with the base that it fits, if an adapter's feature maps have no place in this model's UNet.

    An adapter of Stable Diffusion 1 has its place in Stable Diffusion 2 as well: their widths are the same, and it
    reads no text by which to tell them apart.
    """
    places, p = [], vae.factor
    for k, width in enumerate(unet.block_out_channels):
        last = k == len(unet.block_out_channels) - 1
        places.append((width, p * 2 if unet.down_block_types[k] == DOWN and not last else p))  # see DownLevel
        p *= 1 if last else 2
    places.append((unet.block_out_channels[-1], p))  # behind the middle
    if config.features != places[: len(config.features)]:
        base = "SDXL" if config.adapter_type == XL else "Stable Diffusion 1 or 2"
        has, wants = (", ".join(f"{c}/{p}" for c, p in each) for each in (config.features, places))
        raise LDMError(
            f"{name} was made for another base than this model: a {config.adapter_type} mostly fits {base} (channels "
            f"and pixels a position of its maps: {has}; this model adds {wants})."
        )
    if config.in_channels not in (1, 3):
        raise LDMError(f"{name} looks at {config.in_channels} channels; ldm shows it pictures, which have 1 or 3.")
