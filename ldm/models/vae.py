"""The variational autoencoder: a picture becomes a latent an eighth as wide and high, and back.

Rombach et al. 2022, section 3.1, with the KL penalty of Kingma & Welling 2013. Names are those of diffusers'
`AutoencoderKL`. Shapes: B batch, C channels, H height and W width of the picture, h = H/8, w = W/8 for four levels.
"""

from dataclasses import asdict, dataclass
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.config import check_class, from_json, levels_of
from ldm.models.blocks import Attention, Downsample, ResnetBlock, Upsample

EPS = 1e-6  # of every GroupNorm in the VAE; the UNet's ResNet blocks use 1e-5


@dataclass(frozen=True)
class VAEConfig:
    """The fields of `vae/config.json` that shape the network. Defaults are diffusers'."""

    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 4
    block_out_channels: tuple[int, ...] = (64,)
    layers_per_block: int = 1
    norm_num_groups: int = 32
    sample_size: int = 32
    # What brings Stable Diffusion's latents to unit variance: 1 / their standard deviation (Rombach et al. 2022,
    # appendix G). A model of one's own measures its own (`ldm.train.vae`).
    scaling_factor: float = 0.18215
    shift_factor: float | None = None
    mid_block_add_attention: bool = True
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    force_upcast: bool = True

    class_name: ClassVar[str] = "AutoencoderKL"  # diffusers' name of it

    @classmethod
    def from_json(cls, fields: dict) -> "VAEConfig":
        """Read diffusers' JSON; a field that is neither implemented nor neutral is refused by name."""
        check_class(fields.get("_class_name"), (cls.class_name,), "the VAE")
        levels = levels_of(fields, (64,))
        neutral = {
            "act_fn": "silu",
            "down_block_types": ("DownEncoderBlock2D",) * levels,
            "up_block_types": ("UpDecoderBlock2D",) * levels,
            "latents_mean": None,
            "latents_std": None,
        }
        return from_json(cls, fields, neutral, "the VAE")

    def to_json(self) -> dict:
        """The same as diffusers writes it."""
        levels = len(self.block_out_channels)
        return {
            "_class_name": self.class_name,
            **asdict(self),
            "act_fn": "silu",
            "down_block_types": ["DownEncoderBlock2D"] * levels,
            "up_block_types": ["UpDecoderBlock2D"] * levels,
        }

    @property
    def factor(self) -> int:
        """How many pixels a latent stands for along one side: 8 for four levels."""
        return 2 ** (len(self.block_out_channels) - 1)


class VAEAttention(Attention):
    """One head over all positions of the innermost feature map, with a GroupNorm before and the input added."""

    def __init__(self, channels: int, groups: int):
        super().__init__(channels, heads=1, bias=True)
        self.group_norm = nn.GroupNorm(groups, channels, eps=EPS)

    def forward(self, x: Tensor) -> Tensor:
        h = self.group_norm(x).flatten(2).transpose(1, 2)  # (B, h*w, C)
        return x + super().forward(h).transpose(1, 2).reshape(x.shape)


class VAEMiddle(nn.Module):
    def __init__(self, channels: int, groups: int, attention: bool):
        super().__init__()
        self.resnets = nn.ModuleList(ResnetBlock(channels, channels, groups, EPS) for _ in range(2))
        self.attentions = nn.ModuleList([VAEAttention(channels, groups)] if attention else [])

    def forward(self, x: Tensor) -> Tensor:
        x = self.resnets[0](x)
        for attention in self.attentions:
            x = attention(x)
        return self.resnets[1](x)


class VAELevel(nn.Module):
    """ResNet blocks of one resolution, then at most one change of resolution."""

    def __init__(self, c_in: int, c_out: int, layers: int, groups: int, down: bool = False, up: bool = False):
        super().__init__()
        widths = [c_in] + [c_out] * (layers - 1)
        self.resnets = nn.ModuleList(ResnetBlock(width, c_out, groups, EPS) for width in widths)
        self.downsamplers = nn.ModuleList([Downsample(c_out, asymmetric=True)] if down else [])
        self.upsamplers = nn.ModuleList([Upsample(c_out)] if up else [])

    def forward(self, x: Tensor) -> Tensor:
        for resnet in self.resnets:
            x = resnet(x)
        for resample in (*self.downsamplers, *self.upsamplers):
            x = resample(x)
        return x


class Encoder(nn.Module):
    """Picture (B, 3, H, W) -> mean and log-variance of the latent (B, 2*latent, h, w)."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        widths, groups = config.block_out_channels, config.norm_num_groups
        last = len(widths) - 1
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(
            VAELevel(widths[max(i - 1, 0)], width, config.layers_per_block, groups, down=i < last)
            for i, width in enumerate(widths)
        )
        self.mid_block = VAEMiddle(widths[-1], groups, config.mid_block_add_attention)
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], eps=EPS)
        self.conv_out = nn.Conv2d(widths[-1], 2 * config.latent_channels, 3, padding=1)

    def forward(self, image: Tensor) -> Tensor:
        h = self.conv_in(image)
        for level in self.down_blocks:
            h = level(h)
        h = self.mid_block(h)
        return self.conv_out(F.silu(self.conv_norm_out(h)))


class Decoder(nn.Module):
    """Latent (B, latent, h, w) -> picture (B, 3, H, W). One ResNet block more a level than the encoder."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        widths, groups = config.block_out_channels[::-1], config.norm_num_groups
        last = len(widths) - 1
        self.conv_in = nn.Conv2d(config.latent_channels, widths[0], 3, padding=1)
        self.mid_block = VAEMiddle(widths[0], groups, config.mid_block_add_attention)
        self.up_blocks = nn.ModuleList(
            VAELevel(widths[max(i - 1, 0)], width, config.layers_per_block + 1, groups, up=i < last)
            for i, width in enumerate(widths)
        )
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], eps=EPS)
        self.conv_out = nn.Conv2d(widths[-1], config.out_channels, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        h = self.mid_block(self.conv_in(z))
        for level in self.up_blocks:
            h = level(h)
        return self.conv_out(F.silu(self.conv_norm_out(h)))


class Gaussian(NamedTuple):
    """A diagonal Gaussian over latents, as the encoder describes it: each field (B, latent, h, w)."""

    mean: Tensor
    log_variance: Tensor

    def sample(self, noise: Tensor) -> Tensor:
        """mean + std * noise (Kingma & Welling 2013, section 2.4)."""
        return self.mean + (0.5 * self.log_variance).exp() * noise

    def kl(self) -> Tensor:
        """KL divergence to the standard normal (Kingma & Welling 2013, appendix B), summed over each latent: (B,)."""
        return 0.5 * (self.mean**2 + self.log_variance.exp() - 1 - self.log_variance).sum(dim=(1, 2, 3))


class VAE(nn.Module):
    """Pictures in [-1, 1] to latents and back.

    `encode` and `decode` speak the *diffusion model's* latents: shifted and scaled to about unit variance.
    `posterior` and `reconstruct` speak the raw ones. `one_by_one`: the pictures of a batch go through one after the
    other, in the memory of one (`ldm.memory.slice_vae`).
    """

    def __init__(self, config: VAEConfig):
        super().__init__()
        self.config = config
        self.one_by_one = False
        n = config.latent_channels
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quant_conv = nn.Conv2d(2 * n, 2 * n, 1) if config.use_quant_conv else None
        self.post_quant_conv = nn.Conv2d(n, n, 1) if config.use_post_quant_conv else None

    def posterior(self, image: Tensor) -> Gaussian:
        """The distribution of raw latents for `image` (B, 3, H, W) in [-1, 1]."""
        if self.one_by_one and len(image) > 1:
            alone = [self.posterior(each) for each in image.split(1)]
            return Gaussian(*(torch.cat(rows) for rows in zip(*alone, strict=True)))
        moments = self.encoder(image)
        if self.quant_conv is not None:
            moments = self.quant_conv(moments)
        mean, log_variance = moments.chunk(2, dim=1)
        return Gaussian(mean, log_variance.clamp(-30.0, 20.0))

    def reconstruct(self, z: Tensor) -> Tensor:
        """Raw latents (B, latent, h, w) -> picture (B, 3, H, W), about [-1, 1]."""
        if self.one_by_one and len(z) > 1:
            return torch.cat([self.reconstruct(each) for each in z.split(1)])
        return self.decoder(z if self.post_quant_conv is None else self.post_quant_conv(z))

    def encode(self, image: Tensor, noise: Tensor | None = None) -> Tensor:
        """`image` (B, 3, H, W) in [-1, 1] -> x0 (B, latent, h, w): the mean, or a sample where `noise` is given."""
        posterior = self.posterior(image)
        z = posterior.mean if noise is None else posterior.sample(noise)
        return (z - (self.config.shift_factor or 0.0)) * self.config.scaling_factor

    def decode(self, x0: Tensor) -> Tensor:
        """x0 (B, latent, h, w) of the diffusion model -> picture (B, 3, H, W), about [-1, 1]."""
        return self.reconstruct(x0 / self.config.scaling_factor + (self.config.shift_factor or 0.0))

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """(channels, h, w) of the latent of a picture of `height` x `width` pixels."""
        return self.config.latent_channels, height // self.config.factor, width // self.config.factor

    @staticmethod
    def rename(key: str) -> str:
        """A key of a diffusers file -> ours. Files of Stable Diffusion 1's time name attention otherwise."""
        for old, new in (("query", "to_q"), ("key", "to_k"), ("value", "to_v"), ("proj_attn", "to_out.0")):
            key = key.replace(f"attentions.0.{old}.", f"attentions.0.{new}.")
        return key

    @property
    def dtype(self) -> torch.dtype:
        return self.encoder.conv_in.weight.dtype
