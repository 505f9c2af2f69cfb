"""FLUX: a transformer over the text's tokens and the picture's patches, that predicts which way the picture flows.

Esser et al. 2024 (MMDiT, section 4: two streams that meet in one attention), Dehghani et al. 2023 (attention and
feed-forward side by side), Peebles & Xie 2023 (adaLN-Zero); patches and their places are in `ldm.models.patches`. Names
are those of diffusers' `FluxTransformer2DModel`, so its folders load without a table.
Shapes: B batch, C channels of the latent, H, W its positions, N = H/2 * W/2 patches, L text tokens, D width of the
network, P numbers of a patch, W_h width of a head.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.config import check_class, from_json
from ldm.errors import LDMError
from ldm.models.blocks import TimestepMLP, timestep_embedding
from ldm.models.patches import PATCH, pack, rotary_table, rotate, unpack
from ldm.models.unet import Extras

WAVES = 256  # numbers of the timestep's sinusoids, and of the guidance scale's


@dataclass(frozen=True)
class FluxConfig:
    """The fields of `transformer/config.json` that shape the network. Defaults are FLUX.1's.

    `in_channels` and `out_channels` are numbers of a patch: four times the latent's, and those of what is read beside.
    """

    in_channels: int = 64
    out_channels: int | None = None  # as many as go in
    num_layers: int = 19  # blocks of two streams
    num_single_layers: int = 38  # blocks of one
    attention_head_dim: int = 128
    num_attention_heads: int = 24
    joint_attention_dim: int = 4096  # the width of the text's vectors
    pooled_projection_dim: int = 768  # of the whole text's one vector
    guidance_embeds: bool = False  # FLUX.1-dev: it is told the scale of guidance
    axes_dims_rope: tuple[int, ...] = (16, 56, 56)  # how much of a head turns with the text's place, with y, with x

    what: ClassVar[str] = "the transformer"
    class_name: ClassVar[str] = "FluxTransformer2DModel"
    neutral: ClassVar[dict] = {"patch_size": 1}

    @property
    def width(self) -> int:
        return self.num_attention_heads * self.attention_head_dim

    @property
    def channels_in(self) -> int:
        """Channels of the latent, and of what is read beside it."""
        return self.in_channels // PATCH**2

    @property
    def channels_out(self) -> int:
        """Channels of the latent."""
        return (self.out_channels or self.in_channels) // PATCH**2

    @classmethod
    def from_json(cls, fields: dict) -> "FluxConfig":
        """Read diffusers' JSON; a field that is neither implemented nor neutral is refused by name."""
        check_class(fields.get("_class_name"), (cls.class_name,), cls.what)
        config = from_json(cls, fields, cls.neutral, cls.what)
        config.validate()
        return config

    def to_json(self) -> dict:
        """The same as diffusers writes it."""
        return {"_class_name": self.class_name, **self.neutral, **asdict(self)}

    def validate(self) -> None:
        """Raise LDMError where the fields contradict each other."""
        what, axes = self.what[0].upper() + self.what[1:], self.axes_dims_rope
        if len(axes) != 3 or sum(axes) != self.attention_head_dim or any(axis % 2 for axis in axes):
            raise LDMError(
                f"{what}'s axes_dims_rope {axes} must be three even numbers whose sum is attention_head_dim, "
                f"{self.attention_head_dim}."
            )
        for name, value in (("in_channels", self.in_channels), ("out_channels", self.out_channels or PATCH**2)):
            if value % PATCH**2 or not value:
                raise LDMError(f"{what} has {name} {value}: a patch of 2x2 positions needs a multiple of 4.")


# ------------------------------------------------------------------------------------------------ bricks


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last axis: no mean is taken away (Zhang & Sennrich 2019, eq. 4)."""

    def __init__(self, width: int, eps: float = 1e-6):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class Modulation(nn.Module):
    """What timestep, guidance and pooled text make of a layer: vectors by which its input is scaled, shifted, gated.

    adaLN-Zero (Peebles & Xie 2023, section 3.2): `linear` of the embedding (B, D) gives all of them in one.
    """

    def __init__(self, width: int, vectors: int):
        super().__init__()
        self.linear = nn.Linear(width, vectors * width)

    def forward(self, emb: Tensor) -> Tensor:
        return self.linear(F.silu(emb))  # (B, vectors * D)


def split(vectors: Tensor, count: int) -> Sequence[Tensor]:
    """The `count` vectors that a modulation gave in one, each (B, 1, D)."""
    return vectors[:, None].chunk(count, dim=-1)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """LayerNorm without gain and bias of its own, then those that the modulation gives."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift


def in_range(x: Tensor) -> Tensor:
    """float16 ends at 65504, and FLUX's streams go beyond it here and there; as the reference has it."""
    return x.clip(-65504, 65504) if x.dtype == torch.float16 else x


class FeedForward(nn.Module):
    """GELU (tanh's approximation) at four times the width. `net.1` is the dropout of the checkpoints' numbering."""

    def __init__(self, width: int):
        super().__init__()
        wider = nn.ModuleDict({"proj": nn.Linear(width, 4 * width)})
        self.net = nn.ModuleList([wider, nn.Identity(), nn.Linear(4 * width, width)])

    def forward(self, x: Tensor) -> Tensor:
        return self.net[2](F.gelu(self.net[0]["proj"](x), approximate="tanh"))


class JointAttention(nn.Module):
    """Attention of a whole sequence to itself, with places; q and k are normed, or large models diverge.

    `streams` 2: the picture's patches and the text's tokens have projections of their own and meet in one softmax
    (Esser et al. 2024, figure 2b). `streams` 1: one sequence, and what comes out isn't projected.
    """

    def __init__(self, heads: int, head_width: int, streams: int):
        super().__init__()
        width = heads * head_width
        self.heads = heads
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, width) for _ in range(3))
        self.norm_q, self.norm_k = RMSNorm(head_width), RMSNorm(head_width)
        if streams == 2:
            self.to_out = nn.ModuleList([nn.Linear(width, width)])  # a list because checkpoints say `to_out.0`
            self.add_q_proj, self.add_k_proj, self.add_v_proj = (nn.Linear(width, width) for _ in range(3))
            self.norm_added_q, self.norm_added_k = RMSNorm(head_width), RMSNorm(head_width)
            self.to_add_out = nn.Linear(width, width)

    def split_heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1))  # (B, N, heads, W_h)

    def own(self, x: Tensor) -> list[Tensor]:
        """q, k, v of the picture's patches, or of the one sequence."""
        q, k, v = (self.split_heads(linear(x)) for linear in (self.to_q, self.to_k, self.to_v))
        return [self.norm_q(q), self.norm_k(k), v]

    def added(self, text: Tensor) -> list[Tensor]:
        """q, k, v of the text's tokens, where they are another stream."""
        q, k, v = (self.split_heads(linear(text)) for linear in (self.add_q_proj, self.add_k_proj, self.add_v_proj))
        return [self.norm_added_q(q), self.norm_added_k(k), v]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (rotate(q, rotary), rotate(k, rotary), v))  # (B, heads, L + N, W_h)
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)  # (B, L + N, D)


class DoubleBlock(nn.Module):
    """Two streams, each with weights of its own; they see each other in the attention."""

    def __init__(self, config: FluxConfig):
        super().__init__()
        width = config.width
        self.norm1, self.norm1_context = Modulation(width, 6), Modulation(width, 6)
        self.attn = JointAttention(config.num_attention_heads, config.attention_head_dim, streams=2)
        self.ff, self.ff_context = FeedForward(width), FeedForward(width)

    def modulations(self, emb: Tensor) -> tuple[Tensor, Tensor]:
        return self.norm1(emb), self.norm1_context(emb)

    def forward(
        self, x: Tensor, text: Tensor, modulations: tuple[Tensor, Tensor], rotary: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:  # x (B, N, D), text (B, L, D)
        shift, scale, gate, shift_ff, scale_ff, gate_ff = split(modulations[0], 6)
        shift_t, scale_t, gate_t, shift_ff_t, scale_ff_t, gate_ff_t = split(modulations[1], 6)
        own, added = self.attn.own(modulate(x, shift, scale)), self.attn.added(modulate(text, shift_t, scale_t))
        h = self.attn.attend(*(torch.cat(pair, dim=1) for pair in zip(added, own, strict=True)), rotary)
        h_text, h = (each.contiguous() for each in h.split([text.shape[1], x.shape[1]], dim=1))
        x = x + gate * self.attn.to_out[0](h)
        x = x + gate_ff * self.ff(modulate(x, shift_ff, scale_ff))
        text = text + gate_t * self.attn.to_add_out(h_text)
        text = text + gate_ff_t * self.ff_context(modulate(text, shift_ff_t, scale_ff_t))
        return x, in_range(text)


class SingleBlock(nn.Module):
    """One stream, text first: attention and feed-forward side by side, of one input and into one projection."""

    def __init__(self, config: FluxConfig):
        super().__init__()
        width = config.width
        self.norm = Modulation(width, 3)
        self.attn = JointAttention(config.num_attention_heads, config.attention_head_dim, streams=1)
        self.proj_mlp = nn.Linear(width, 4 * width)
        self.proj_out = nn.Linear(width + 4 * width, width)

    def modulations(self, emb: Tensor) -> Tensor:
        return self.norm(emb)

    def forward(self, x: Tensor, modulations: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:  # x (B, L + N, D)
        shift, scale, gate = split(modulations, 3)
        h = modulate(x, shift, scale)
        mlp = F.gelu(self.proj_mlp(h), approximate="tanh")
        h = torch.cat([self.attn.attend(*self.attn.own(h), rotary), mlp], dim=2)
        return in_range(x + gate * self.proj_out(h))


class Told(nn.Module):
    """Timestep, guidance scale and pooled text as one vector (B, D), the sum of three."""

    def __init__(self, config: FluxConfig):
        super().__init__()
        self.timestep_embedder = TimestepMLP(WAVES, config.width)
        if config.guidance_embeds:
            self.guidance_embedder = TimestepMLP(WAVES, config.width)
        self.text_embedder = TimestepMLP(config.pooled_projection_dim, config.width)

    def forward(self, t: Tensor, pooled: Tensor, guidance: Tensor | None) -> Tensor:
        """`t` (B,) in training steps (0 to 1000); `guidance` (B,), of a model that is told it, is the scale itself."""
        dtype = pooled.dtype
        emb = self.timestep_embedder(timestep_embedding(t, WAVES).to(dtype))
        if guidance is not None:
            emb = emb + self.guidance_embedder(timestep_embedding(1000 * guidance, WAVES).to(dtype))
        return emb + self.text_embedder(pooled)


# ------------------------------------------------------------------------------------------------ the network

Vectors = list[Tensor | tuple[Tensor, Tensor]]  # what the modulations of all blocks give for one timestep, in order


def at(row: Tensor | tuple[Tensor, Tensor], k: int) -> Tensor | tuple[Tensor, Tensor]:
    """Of one block's modulations at all timesteps those at the k-th; a block of two streams has two."""
    return tuple(each[k] for each in row) if isinstance(row, tuple) else row[k]


class Prepared(NamedTuple):
    """What doesn't change between the steps (`FluxTrunk.prepare`)."""

    text: Tensor  # (B, L, D), the text in the network's own width
    extras: Extras
    table: Mapping[float, Vectors] = {}  # timestep -> what the modulations give there


class FluxResiduals(NamedTuple):
    """What ControlNets add to the picture's stream behind the blocks: one tensor (B, N, D) a block, or none at all."""

    double: Sequence[Tensor] = ()
    single: Sequence[Tensor] = ()


class FluxTrunk(nn.Module):
    """Embeddings and blocks: what the network and its ControlNets have in common."""

    def __init__(self, config: FluxConfig):
        super().__init__()
        self.config = config
        self.time_text_embed = Told(config)
        self.context_embedder = nn.Linear(config.joint_attention_dim, config.width)
        self.x_embedder = nn.Linear(config.in_channels, config.width)
        self.transformer_blocks = nn.ModuleList(DoubleBlock(config) for _ in range(config.num_layers))
        self.single_transformer_blocks = nn.ModuleList(SingleBlock(config) for _ in range(config.num_single_layers))

    @property
    def dtype(self) -> torch.dtype:
        return self.x_embedder.weight.dtype

    def prepare(self, context: Tensor, extras: Extras = Extras(), times: Sequence[float] = ()) -> Prepared:
        """What a loop computes once for `context` (B, L, joint_attention_dim) and what else the network is told.

        `times`: timesteps at which it will be asked; their modulations, a quarter of all its weights, are needed no
        more when this is done.
        """
        wanted = ["pooled", *["guidance"] * self.config.guidance_embeds]
        if missing := [name for name in wanted if getattr(extras, name) is None]:
            raise LDMError(f"This transformer asks for more than a text: pass {', '.join(missing)} in extras.")
        return Prepared(self.context_embedder(context), extras, self.table(list(dict.fromkeys(times)), extras))

    def table(self, times: Sequence[float], extras: Extras) -> dict[float, Vectors]:
        """What the modulations give at each of these timesteps: every weight is read once, for all of them."""
        if not times:
            return {}
        rows = self.modulations(torch.stack([self.embed(t, extras) for t in times]))  # (T, B, vectors * D) each
        return {t: [at(row, k) for row in rows] for k, t in enumerate(times)}

    def embed(self, t: Tensor | float, extras: Extras) -> Tensor:
        """Timestep, pooled text (B, P) and guidance (B,) -> the vector (B, D) that all modulations are made of."""
        t = torch.as_tensor(t, device=extras.pooled.device).expand(len(extras.pooled))
        return self.time_text_embed(t, extras.pooled, extras.guidance if self.config.guidance_embeds else None)

    def blocks(self) -> list[DoubleBlock | SingleBlock]:
        """All blocks, in their order."""
        return [*self.transformer_blocks, *self.single_transformer_blocks]

    def modulations(self, emb: Tensor) -> Vectors:
        """What the blocks' modulations give for an embedding (B, D)."""
        return [block.modulations(emb) for block in self.blocks()]

    def vectors(self, t: Tensor | float, prepared: Prepared) -> Vectors:
        """The modulations at this timestep, out of the table where it stands there."""
        known = prepared.table.get(t) if isinstance(t, int | float) else None
        return self.modulations(self.embed(t, prepared.extras)) if known is None else known

    def rotary(self, tokens: int, height: int, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """The rotary table of a picture's patches behind so many tokens; at least float32, whatever the weights are."""
        like = (device, torch.promote_types(self.dtype, torch.float32))
        return rotary_table(tokens, height, width, self.config.axes_dims_rope, like)

    def walk(
        self, x: Tensor, text: Tensor, vectors: Vectors, rotary: tuple[Tensor, Tensor], added: FluxResiduals
    ) -> Iterator[Tensor]:
        """The picture's stream (B, N, D) behind each block, one after the other.

        x (B, N, D) and text (B, L, D) are what the embedders made; `added` is put upon the stream behind each block.
        """
        length, doubles = text.shape[1], len(self.transformer_blocks)
        for i, block in enumerate(self.transformer_blocks):
            x, text = block(x, text, vectors[i], rotary)
            x = x + added.double[i] if added.double else x
            yield x
        h = torch.cat([text, x], dim=1)  # (B, L + N, D)
        for i, block in enumerate(self.single_transformer_blocks):
            h = block(h, vectors[doubles + i], rotary)
            if added.single:
                h = torch.cat([h[:, :length], h[:, length:] + added.single[i]], dim=1)
            yield h[:, length:]


class Flux(FluxTrunk):
    """The whole network. `forward` returns the velocity eps - x0 by which the picture changes with the noise level."""

    def __init__(self, config: FluxConfig):
        super().__init__(config)
        self.norm_out = Modulation(config.width, 2)
        self.proj_out = nn.Linear(config.width, config.out_channels or config.in_channels)

    def modulations(self, emb: Tensor) -> Vectors:
        return [*super().modulations(emb), self.norm_out(emb)]

    def forward(
        self,
        x: Tensor,
        t: Tensor | float,
        context: Tensor | Prepared,
        extras: Extras = Extras(),
        residuals: FluxResiduals | None = None,
    ) -> Tensor:
        """`x` (B, C, H, W) noisy latents with what is read beside them, `t` (B,) or a number, in training steps.

        `context`: the text (B, L, joint_attention_dim) with its `extras`, or what `prepare` made of both.
        `residuals`: what ControlNets add. Returns (B, channels_out, H, W).
        """
        told = context if isinstance(context, Prepared) else self.prepare(context, extras)
        height, width = x.shape[2:]
        self.check(x)
        vectors = self.vectors(t, told)
        rotary = self.rotary(told.text.shape[1], height, width, x.device)
        h = self.x_embedder(pack(x))
        for stream in self.walk(h, told.text, vectors, rotary, residuals or FluxResiduals()):
            h = stream  # the last of them goes on; what is kept of the others would be most of a step's memory
        scale, shift = split(vectors[-1], 2)  # in this order here, and in no other layer
        return unpack(self.proj_out(modulate(h, shift, scale)), height, width)

    def check(self, x: Tensor) -> None:
        """Raise LDMError for latents of which no patches can be made, or with other channels."""
        if x.shape[1] != self.config.channels_in or x.shape[2] % PATCH or x.shape[3] % PATCH:
            raise LDMError(
                f"Latents of shape {tuple(x.shape)}: this transformer reads {self.config.channels_in} channels, of an "
                "even number of positions along each side."
            )
