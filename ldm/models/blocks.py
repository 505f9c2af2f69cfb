"""The bricks of the UNet and of the VAE: timestep embedding, ResNet block, attention, spatial transformer, resampling.

Every module and parameter bears the name it has in a diffusers checkpoint, so a state dict loads without a table.
Shapes: B batch, C channels, H height, W width, N = H*W positions, L context tokens, D context width, E embedding width.
"""

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

KeysValues = tuple[Tensor, Tensor]  # one attention layer's keys and values, each (B, heads, L, head width)
Context = Tensor | Mapping["Attention", KeysValues]  # the text (B, L, D), or what `UNet.prepare` made of it


def timestep_embedding(t: Tensor, width: int, flip_sin_to_cos: bool = True, freq_shift: float = 0.0) -> Tensor:
    """Sinusoids of `t` (B,) at `width`/2 frequencies from 1 down to 1/10000: (B, width), float32.

    Vaswani et al. 2017, section 3.5, as Ho et al. 2020 use it for the noise level. Stable Diffusion puts the cosines
    first (`flip_sin_to_cos`) and ends just short of 1/10000 (`freq_shift` 0).
    """
    half = width // 2
    # float32 whatever the model's dtype, as the reference: in bfloat16 t = 999 and 998 would be one number.
    exponent = -math.log(10000) * torch.arange(half, dtype=torch.float32, device=t.device) / (half - freq_shift)
    angle = t.float()[:, None] * exponent.exp()  # (B, width/2)
    waves = [angle.cos(), angle.sin()] if flip_sin_to_cos else [angle.sin(), angle.cos()]
    return torch.cat(waves, dim=-1)


def guidance_embedding(scale: Tensor, width: int) -> Tensor:
    """Sinusoids of 1000 * (`scale` - 1), the guidance scale (B,), float64, that a distilled UNet is told: (B, width).

    Meng et al. 2023 (distillation of guided models), section 3.1, as LCM has it (Luo et al. 2023, section 4.3): from
    frequency 1 down to the very 1/10000, and sines first.
    """
    half = width // 2
    # In float32 but for the subtraction, and in this order, as LCM's training had it.
    step = torch.log(torch.tensor(10000.0, dtype=torch.float32)) / (half - 1)
    angle = (scale - 1).float()[:, None] * 1000 * (torch.arange(half, dtype=torch.float32) * -step).exp()
    return F.pad(torch.cat([angle.sin(), angle.cos()], dim=-1), (0, width % 2))


class TimestepMLP(nn.Module):
    """Two linear layers with SiLU between them: sinusoids -> the embedding that every ResNet block is given."""

    def __init__(self, width_in: int, width: int, cond_width: int | None = None):
        super().__init__()
        self.linear_1 = nn.Linear(width_in, width)
        self.linear_2 = nn.Linear(width, width)
        if cond_width is not None:  # the guidance embedding of distilled (LCM) UNets
            self.cond_proj = nn.Linear(cond_width, width_in, bias=False)

    def forward(self, waves: Tensor, cond: Tensor | None = None) -> Tensor:
        if cond is not None:
            waves = waves + self.cond_proj(cond)
        return self.linear_2(F.silu(self.linear_1(waves)))


class ResnetBlock(nn.Module):
    """(norm, SiLU, conv) twice around the timestep embedding, plus the input (He et al. 2016; Ho et al. 2020, app. B).

    The VAE uses it without an embedding (`emb_width` None).
    """

    def __init__(self, c_in: int, c_out: int, groups: int, eps: float, emb_width: int | None = None):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, c_in, eps=eps)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        if emb_width is not None:
            self.time_emb_proj = nn.Linear(emb_width, c_out)
        self.norm2 = nn.GroupNorm(groups, c_out, eps=eps)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else None

    def forward(self, x: Tensor, emb: Tensor | None = None) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))  # (B, C_out, H, W)
        if emb is not None:
            h = h + self.time_emb_proj(F.silu(emb))[:, :, None, None]
        h = self.conv2(F.silu(self.norm2(h)))
        return (x if self.conv_shortcut is None else self.conv_shortcut(x)) + h


class Attention(nn.Module):
    """Multi-head attention softmax(q k^T / sqrt(head width)) v (Vaswani et al. 2017, equation 1).

    Self-attention where `context` is None, cross-attention from `x` to the text otherwise. `rows`: so many positions of
    `x` look at once, where the scores of all, (B, heads, N, L), would be too large (`ldm.memory.slice_attention`).
    """

    def __init__(self, width: int, heads: int, context_width: int | None = None, bias: bool = False):
        super().__init__()
        if heads < 1 or width % heads:
            raise ValueError(f"{width} channels don't make {heads} heads")
        self.heads = heads
        self.is_cross = context_width is not None
        self.rows: int | None = None
        self.to_q = nn.Linear(width, width, bias=bias)
        self.to_k = nn.Linear(context_width or width, width, bias=bias)
        self.to_v = nn.Linear(context_width or width, width, bias=bias)
        self.to_out = nn.ModuleList([nn.Linear(width, width)])  # a list because checkpoints say `to_out.0`

    def split_heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, heads, N, C/heads)

    def keys_values(self, context: Tensor) -> KeysValues:
        return self.split_heads(self.to_k(context)), self.split_heads(self.to_v(context))

    def forward(self, x: Tensor, context: Context | None = None) -> Tensor:  # x (B, N, C)
        k, v = context[self] if isinstance(context, Mapping) else self.keys_values(x if context is None else context)
        if self.rows is None:
            h = F.scaled_dot_product_attention(self.split_heads(self.to_q(x)), k, v)
        else:  # a softmax runs over the keys, so the queries may come in slices: the same numbers
            slices = self.split_heads(self.to_q(x)).split(self.rows, dim=2)
            h = torch.cat([F.scaled_dot_product_attention(q, k, v) for q in slices], dim=2)
        return self.to_out[0](h.transpose(1, 2).flatten(2))  # (B, N, C)


class GEGLU(nn.Module):
    """A linear layer whose one half gates the other through GELU (Shazeer 2020, "GLU variants", section 2)."""

    def __init__(self, width: int, inner: int):
        super().__init__()
        self.proj = nn.Linear(width, inner * 2)

    def forward(self, x: Tensor) -> Tensor:
        h, gate = self.proj(x).chunk(2, dim=-1)
        return h * F.gelu(gate)


class FeedForward(nn.Module):
    """GEGLU to four times the width, then back. `net.1` is the dropout of the checkpoints' numbering: nothing here."""

    def __init__(self, width: int):
        super().__init__()
        self.net = nn.ModuleList([GEGLU(width, 4 * width), nn.Identity(), nn.Linear(4 * width, width)])

    def forward(self, x: Tensor) -> Tensor:
        return self.net[2](self.net[0](x))


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention to the text, feed-forward, each behind a LayerNorm and added to its input.

    `only_cross_attention` (the x4 upscaler) sends the first attention to the text as well.
    """

    def __init__(self, width: int, heads: int, context_width: int, only_cross_attention: bool = False):
        super().__init__()
        self.only_cross_attention = only_cross_attention
        self.norm1 = nn.LayerNorm(width)
        self.attn1 = Attention(width, heads, context_width if only_cross_attention else None)
        self.norm2 = nn.LayerNorm(width)
        self.attn2 = Attention(width, heads, context_width)
        self.norm3 = nn.LayerNorm(width)
        self.ff = FeedForward(width)

    def forward(self, x: Tensor, context: Context) -> Tensor:  # x (B, N, C)
        x = x + self.attn1(self.norm1(x), context if self.only_cross_attention else None)
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nn.Module):
    """Transformer blocks over the positions of a feature map (Rombach et al. 2022, appendix E.2.1).

    `linear` (SD 2, SDXL) projects after flattening; SD 1 projects with a 1x1 convolution before it. Same numbers.
    """

    def __init__(
        self, channels: int, heads: int, context_width: int, depth: int, groups: int, linear: bool, only_cross: bool
    ):
        super().__init__()
        self.linear = linear
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)  # 1e-6 here, `norm_eps` (1e-5) in the ResNet blocks
        self.proj_in = nn.Linear(channels, channels) if linear else nn.Conv2d(channels, channels, 1)
        blocks = [TransformerBlock(channels, heads, context_width, only_cross) for _ in range(depth)]
        self.transformer_blocks = nn.ModuleList(blocks)
        self.proj_out = nn.Linear(channels, channels) if linear else nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        h = self.norm(x)
        if self.linear:
            h = self.proj_in(h.flatten(2).transpose(1, 2))  # (B, N, C)
        else:
            h = self.proj_in(h).flatten(2).transpose(1, 2)  # (B, N, C)
        for block in self.transformer_blocks:
            h = block(h, context)
        if self.linear:
            h = self.proj_out(h).transpose(1, 2).reshape(x.shape)  # (B, C, H, W)
        else:
            h = self.proj_out(h.transpose(1, 2).reshape(x.shape))  # (B, C, H, W)
        return x + h


class Downsample(nn.Module):
    """Halve height and width with a strided convolution.

    The UNet pads all round; the VAE's encoder pads only right and below (`asymmetric`), as its training code did.
    """

    def __init__(self, channels: int, asymmetric: bool = False):
        super().__init__()
        self.asymmetric = asymmetric
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=0 if asymmetric else 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)) if self.asymmetric else x)  # (B, C, H/2, W/2)


class Upsample(nn.Module):
    """Nearest-neighbour enlargement to `size` (double, if not given), then a convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        size = size or (2 * x.shape[2], 2 * x.shape[3])
        return self.conv(F.interpolate(x, size=size, mode="nearest"))
