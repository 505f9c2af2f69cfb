"""The conditional UNet: noisy latents, a timestep and a text in; the prediction (of the noise, for SD 1) out.

Rombach et al. 2022, section 3.3 and appendix E; Podell et al. 2023 (SDXL) for the pooled vector and sizes. Names are
those of diffusers' `UNet2DConditionModel`. Shapes: B batch, C channels, H height, W width, L tokens, D context width,
E embedding width.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.config import check_class, from_json, levels_of
from ldm.errors import LDMError
from ldm.models.blocks import (
    Attention,
    Context,
    Downsample,
    KeysValues,
    ResnetBlock,
    SpatialTransformer,
    TimestepMLP,
    Upsample,
    timestep_embedding,
)

DOWN, CROSS_DOWN = "DownBlock2D", "CrossAttnDownBlock2D"
UP, CROSS_UP = "UpBlock2D", "CrossAttnUpBlock2D"
MOST_BLOCKS = 500  # one way; SDXL's have 48. Some bytes of a file might ask for a million, to be built one by one


NEUTRAL = {  # fields of the JSON that we accept at these values alone: with them they change nothing
    "act_fn": "silu",
    "addition_embed_type_num_heads": 64,  # read only by another addition_embed_type
    "attention_type": "default",
    "center_input_sample": False,
    "class_embed_type": None,
    "class_embeddings_concat": False,
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "cross_attention_norm": None,
    "downsample_padding": 1,
    "dropout": 0.0,
    "dual_cross_attention": False,
    "encoder_hid_dim": None,
    "encoder_hid_dim_type": None,
    "mid_block_only_cross_attention": None,
    "mid_block_scale_factor": 1,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "resnet_out_scale_factor": 1.0,
    "resnet_skip_time_act": False,
    "resnet_time_scale_shift": "default",
    "reverse_transformer_layers_per_block": None,
    "time_embedding_act_fn": None,
    "time_embedding_dim": None,
    "time_embedding_type": "positional",
    "timestep_post_act": None,
}


@dataclass(frozen=True)
class EncoderConfig:
    """The fields that shape the way down and the middle, of a UNet and of a ControlNet. Defaults are diffusers'.

    `heads` is the number of attention heads a level, which Stable Diffusion's JSON calls `attention_head_dim`.
    `transformer_layers_per_block`, `heads` and `only_cross_attention` hold one value a level.
    """

    in_channels: int = 4
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    down_block_types: tuple[str, ...] = (CROSS_DOWN, CROSS_DOWN, CROSS_DOWN, DOWN)
    layers_per_block: int = 2
    cross_attention_dim: int = 1280
    heads: tuple[int, ...] = (8, 8, 8, 8)
    transformer_layers_per_block: tuple[int, ...] = (1, 1, 1, 1)
    only_cross_attention: tuple[bool, ...] = (False, False, False, False)
    use_linear_projection: bool = False
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    flip_sin_to_cos: bool = True
    freq_shift: float = 0.0
    time_cond_proj_dim: int | None = None  # LCM: the width of the guidance embedding
    num_class_embeds: int | None = None  # x4 upscaler: the noise level of the small picture
    addition_embed_type: str | None = None  # SDXL: "text_time"
    addition_time_embed_dim: int | None = None
    projection_class_embeddings_input_dim: int | None = None
    # A request for float32 softmax. Fused attention accumulates in float32 anyway, there and here.
    upcast_attention: bool | None = False

    what: ClassVar[str]  # the network, in a sentence
    class_name: ClassVar[str]  # diffusers' name of it
    blocks: ClassVar[dict] = {"down_block_types": (DOWN, CROSS_DOWN)}  # the lists of blocks, and those implemented

    @property
    def is_xl(self) -> bool:
        """Whether it is SDXL's, or its refiner's: told a pooled vector and sizes."""
        return self.addition_embed_type == "text_time"

    @classmethod
    def from_json(cls, fields: dict) -> "EncoderConfig":
        """Read diffusers' JSON; a field that is neither implemented nor neutral is refused by name."""
        check_class(fields.get("_class_name"), (cls.class_name,), cls.what)
        fields = dict(fields)
        levels = levels_of(fields, cls.block_out_channels)
        head_dim = fields.pop("attention_head_dim", 8)
        heads = fields.pop("num_attention_heads", None) or head_dim
        fields["heads"] = heads
        for name, default in (("heads", 8), ("transformer_layers_per_block", 1), ("only_cross_attention", False)):
            value = fields.get(name, default)
            fields[name] = tuple(value) if isinstance(value, list | tuple) else (value,) * levels
        if fields.get("class_embed_type") is None and fields.get("addition_embed_type") != "text_time":
            # The width means something only together with one of the two: SD 1 files carry stale values.
            fields.pop("projection_class_embeddings_input_dim", None)
        for name in ("layers_per_block", "cross_attention_dim"):
            if isinstance(fields.get(name), list | tuple):
                what = cls.what[0].upper() + cls.what[1:]
                raise LDMError(f"{what} asks for a different {name} at each level, which ldm doesn't implement.")
        config = from_json(cls, fields, NEUTRAL, cls.what)
        config.validate()
        return config

    def to_json(self) -> dict:
        """The same as diffusers writes it."""
        fields = asdict(self)
        fields["attention_head_dim"] = fields.pop("heads")
        return {"_class_name": self.class_name, **fields}

    def validate(self) -> None:
        """Raise LDMError where the fields contradict each other or ask for a block that is not implemented."""
        levels, what = len(self.block_out_channels), self.what[0].upper() + self.what[1:]
        for name in (*self.blocks, "heads", "transformer_layers_per_block", "only_cross_attention"):
            if len(getattr(self, name)) != levels:
                raise LDMError(f"{what} has {levels} levels, but its {name} lists {len(getattr(self, name))}.")
        for name, known in self.blocks.items():
            for block in getattr(self, name):
                if block not in known:
                    raise LDMError(f"{what}'s {name} asks for a {block!r}, which ldm doesn't implement.")
        blocks = sum((self.layers_per_block + 1) * (1 + depth) for depth in self.transformer_layers_per_block)
        if blocks > MOST_BLOCKS:
            raise LDMError(f"The configuration of {self.what} asks for {blocks} blocks, more than {MOST_BLOCKS}.")
        if self.addition_embed_type not in (None, "text_time"):
            raise LDMError(f"{what} asks for addition_embed_type {self.addition_embed_type!r}; ldm knows 'text_time'.")


@dataclass(frozen=True)
class UNetConfig(EncoderConfig):
    """The fields of `unet/config.json` that shape the network: the encoder's, and those of the way up."""

    sample_size: int | None = None
    out_channels: int = 4
    up_block_types: tuple[str, ...] = (UP, CROSS_UP, CROSS_UP, CROSS_UP)

    what: ClassVar[str] = "the UNet"
    class_name: ClassVar[str] = "UNet2DConditionModel"
    blocks: ClassVar[dict] = {**EncoderConfig.blocks, "up_block_types": (UP, CROSS_UP)}


class Residuals(NamedTuple):
    """What is added inside the UNet. ControlNets give the first two, a pair (skips, middle); T2I-Adapters the third."""

    skips: Sequence[Tensor] | None = None  # to every skip, when the way down is done
    middle: Tensor | None = None  # to the middle block's output
    levels: Sequence[Tensor] = ()  # on the way down, one a level from the first one on; a last one behind the middle


class Extras(NamedTuple):
    """What some models are told beside text and timestep; None where a model knows no such thing."""

    pooled: Tensor | None = None  # SDXL, FLUX: the pooled text (B, P)
    time_ids: Tensor | None = None  # SDXL: original size, crop, target size (B, 6)
    class_labels: Tensor | None = None  # x4 upscaler: the noise level of the small picture (B,)
    guidance: Tensor | None = None  # LCM: the embedded guidance scale (B, time_cond_proj_dim); FLUX: the scale (B,)

    @classmethod
    def join(cls, parts: Sequence["Extras"]) -> "Extras":
        """Those of all parts of a batch, one part after the other."""
        return cls(*(None if column[0] is None else torch.cat(column) for column in zip(*parts, strict=True)))


class UNetLevel(nn.Module):
    """One resolution: ResNet blocks, each followed by a spatial transformer where `heads` is given, then a resampling.

    On the way down every output is kept for the way up; on the way up each block takes one of them (`skips`).
    """

    def __init__(self, config: EncoderConfig, level: int, widths: list[tuple[int, int]], cross: bool):
        super().__init__()
        emb_width = 4 * config.block_out_channels[0]
        groups, eps, only_cross = config.norm_num_groups, config.norm_eps, config.only_cross_attention[level]
        self.resnets = nn.ModuleList(ResnetBlock(c_in, c_out, groups, eps, emb_width) for c_in, c_out in widths)
        self.attentions = nn.ModuleList(transformer(config, level, only_cross) for _ in widths) if cross else None

    def layer(self, i: int, x: Tensor, emb: Tensor, context: Context) -> Tensor:
        x = self.resnets[i](x, emb)
        return x if self.attentions is None else self.attentions[i](x, context)


class DownLevel(UNetLevel):
    def __init__(self, config: EncoderConfig, level: int):
        channels = config.block_out_channels
        width = channels[level]
        widths = [(channels[max(level - 1, 0)], width)] + [(width, width)] * (config.layers_per_block - 1)
        super().__init__(config, level, widths, config.down_block_types[level] == CROSS_DOWN)
        last = level == len(channels) - 1
        self.downsamplers = None if last else nn.ModuleList([Downsample(width)])

    def forward(self, x: Tensor, emb: Tensor, context: Context, feature: Tensor | None = None) -> list[Tensor]:
        """The output of every layer; the last of them goes on. `feature`: what an adapter adds to one of them."""
        outputs = []
        for i in range(len(self.resnets)):
            x = self.layer(i, x, emb, context)
            outputs.append(x)
        if feature is not None and self.attentions is not None:
            outputs[-1] = outputs[-1] + feature
        if self.downsamplers is not None:
            outputs.append(self.downsamplers[0](outputs[-1]))  # (B, C, H/2, W/2)
        if feature is not None and self.attentions is None:  # such a level was trained with it behind its downsampling
            outputs[-1] = outputs[-1] + feature
        return outputs


class UpLevel(UNetLevel):
    def __init__(self, config: UNetConfig, level: int):
        channels = config.block_out_channels
        top = len(channels) - 1
        width, above = channels[level], channels[min(level + 1, top)]
        # Each layer takes what the way down kept: the same level's outputs, the last from one level finer.
        skips = [width] * config.layers_per_block + [channels[max(level - 1, 0)]]
        widths = [((above if i == 0 else width) + skip, width) for i, skip in enumerate(skips)]
        super().__init__(config, level, widths, config.up_block_types[top - level] == CROSS_UP)
        self.upsamplers = None if level == 0 else nn.ModuleList([Upsample(width)])

    def forward(self, x: Tensor, skips: list[Tensor], emb: Tensor, context: Context) -> Tensor:
        for i in range(len(self.resnets)):
            x = self.layer(i, torch.cat([x, skips.pop()], dim=1), emb, context)
        if self.upsamplers is not None:
            x = self.upsamplers[0](x, skips[-1].shape[2:])  # to the next skip's size: odd sizes halve unevenly
        return x


class Middle(nn.Module):
    def __init__(self, config: EncoderConfig):
        super().__init__()
        width, emb_width = config.block_out_channels[-1], 4 * config.block_out_channels[0]
        resnets = (ResnetBlock(width, width, config.norm_num_groups, config.norm_eps, emb_width) for _ in range(2))
        self.resnets = nn.ModuleList(resnets)
        self.attentions = nn.ModuleList([transformer(config, len(config.block_out_channels) - 1, only_cross=False)])

    def forward(self, x: Tensor, emb: Tensor, context: Context) -> Tensor:
        x = self.attentions[0](self.resnets[0](x, emb), context)
        return self.resnets[1](x, emb)


def transformer(config: EncoderConfig, level: int, only_cross: bool) -> SpatialTransformer:
    return SpatialTransformer(
        config.block_out_channels[level],
        config.heads[level],
        config.cross_attention_dim,
        config.transformer_layers_per_block[level],
        config.norm_num_groups,
        config.use_linear_projection,
        only_cross,
    )


class UNetEncoder(nn.Module):
    """The way down and the middle, with the embedding of the timestep: the half that a ControlNet copies."""

    def __init__(self, config: EncoderConfig):
        super().__init__()
        self.config = config
        widths = config.block_out_channels
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.time_embedding = TimestepMLP(widths[0], 4 * widths[0], config.time_cond_proj_dim)
        if config.num_class_embeds is not None:
            self.class_embedding = nn.Embedding(config.num_class_embeds, 4 * widths[0])
        if config.is_xl:
            self.add_embedding = TimestepMLP(config.projection_class_embeddings_input_dim, 4 * widths[0])
        self.down_blocks = nn.ModuleList(DownLevel(config, level) for level in range(len(widths)))
        self.mid_block = Middle(config)

    @property
    def dtype(self) -> torch.dtype:
        return self.conv_in.weight.dtype

    def prepare(
        self, context: Tensor, extras: Extras = Extras(), times: Sequence[float] = ()
    ) -> dict[Attention, KeysValues]:
        """Every cross-attention's keys and values for `context` (B, L, D).

        They don't change between the steps, so a loop computes them once and passes them as `context`. Of `extras` and
        of the `times` at which it will be asked FLUX's transformer prepares more, and so every network is given them.
        """
        return {m: m.keys_values(context) for m in self.modules() if isinstance(m, Attention) and m.is_cross}

    def embed(self, t: Tensor, extras: Extras = Extras()) -> Tensor:
        """Timestep (B,) and extras -> the embedding (B, E) that every ResNet block is given."""
        config, dtype = self.config, self.dtype
        wanted = ("class_labels",) * (config.num_class_embeds is not None)
        wanted += ("pooled", "time_ids") * config.is_xl
        if missing := [name for name in wanted if getattr(extras, name) is None]:
            raise LDMError(f"This UNet asks for more than a timestep and a text: pass {', '.join(missing)} in extras.")

        def waves(value: Tensor, width: int) -> Tensor:
            return timestep_embedding(value, width, config.flip_sin_to_cos, config.freq_shift).to(dtype)

        emb = self.time_embedding(waves(t, config.block_out_channels[0]), extras.guidance)
        if config.num_class_embeds is not None:
            emb = emb + self.class_embedding(extras.class_labels)
        if config.is_xl:
            ids = waves(extras.time_ids.flatten(), config.addition_time_embed_dim)
            ids = ids.reshape(len(extras.time_ids), -1)  # (B, 6*width)
            emb = emb + self.add_embedding(torch.cat([extras.pooled, ids], dim=-1))
        return emb

    def encode(
        self, h: Tensor, emb: Tensor, context: Context, features: Sequence[Tensor] = ()
    ) -> tuple[Tensor, list[Tensor]]:
        """From conv_in's output, and an adapter's `features`: the middle's output, and all that the way up takes."""
        *inside, behind = [*features, *[None] * (len(self.down_blocks) + 1 - len(features))]
        skips = [h]
        for level, feature in zip(self.down_blocks, inside, strict=True):
            skips += level(skips[-1], emb, context, feature)
        middle = self.mid_block(skips[-1], emb, context)
        return middle if behind is None else middle + behind, skips


class UNet(UNetEncoder):
    """The whole network. `forward` returns the prediction in the parametrisation that the model was trained in."""

    def __init__(self, config: UNetConfig):
        super().__init__(config)
        widths = config.block_out_channels
        self.up_blocks = nn.ModuleList(UpLevel(config, level) for level in reversed(range(len(widths))))
        self.conv_norm_out = nn.GroupNorm(config.norm_num_groups, widths[0], eps=config.norm_eps)
        self.conv_out = nn.Conv2d(widths[0], config.out_channels, 3, padding=1)

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        context: Context,
        extras: Extras = Extras(),
        residuals: Residuals | tuple[list[Tensor], Tensor] | None = None,
    ) -> Tensor:
        """`x` (B, C, H, W) noisy latents, `t` (B,) or a number, `context` (B, L, D) or what `prepare` made of it.

        `residuals`: what ControlNets and adapters add. Returns (B, out_channels, H, W).
        """
        t = torch.as_tensor(t, device=x.device).expand(len(x))
        emb = self.embed(t, extras)
        added = Residuals() if residuals is None else Residuals(*residuals)
        h, skips = self.encode(self.conv_in(x), emb, context, added.levels)
        if added.skips is not None:
            skips = [skip + extra for skip, extra in zip(skips, added.skips, strict=True)]
        if added.middle is not None:
            h = h + added.middle
        for level in self.up_blocks:
            h = level(h, skips, emb, context)
        return self.conv_out(F.silu(self.conv_norm_out(h)))
