"""Other ways to do what our modules do: the mistakes, and the honest differences, that ports are made of.

`ways_of(module)` gives, for each kind of module, functions that are called with a copy of it (which shares its
weights, and may be changed) and its inputs. They are written out plainly, beside the code they question.
"""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.models import blocks
from ldm.parity.attention import of_attention
from ldm.parity.calls import PLAIN, Way
from ldm.text import clip

EPSILONS = (1e-3, 1e-4, 1e-5, 1e-6, 1e-8, 1e-12)
ACTIVATIONS = {
    "SiLU": F.silu,
    "GELU (erf)": F.gelu,
    "GELU by tanh": lambda x: F.gelu(x, approximate="tanh"),
    "quick GELU": lambda x: x * torch.sigmoid(1.702 * x),
    "ReLU": F.relu,
    "no activation": lambda x: x,
    "a sigmoid": torch.sigmoid,
}


def ways_of(module: nn.Module) -> Iterator[Way]:
    """All that is known for this kind of module."""
    for kind, ways in KINDS:
        if isinstance(module, kind):
            yield from ways(module)


def with_fields(**fields: object) -> Callable[..., object]:
    """The module itself, with attributes changed."""

    def run(twin: nn.Module, *args: object, **kwargs: object) -> object:
        for name, value in fields.items():
            setattr(twin, name, value)
        return twin(*args, **kwargs)

    return run


# ---------------------------------------------------------------------------------------------------- layers


def of_norm(module: nn.Module) -> Iterator[Way]:
    for eps in EPSILONS:
        if eps != module.eps:
            yield Way(f"with eps {eps:g} instead of {module.eps:g}", with_fields(eps=eps))
    yield Way("without its gain", with_fields(weight=nn.Parameter(torch.ones_like(module.weight))))
    yield Way("without its bias", with_fields(bias=None))
    yield Way("with its gain plus 1", with_fields(weight=nn.Parameter(1 + module.weight)))
    yield Way("left out", lambda twin, x: x)
    if isinstance(module, nn.GroupNorm):
        channels = module.num_channels
        for groups in sorted({1, 2, 4, 8, 16, 32, 64, channels} - {module.num_groups}):
            if channels % groups == 0:
                text = f"with {groups} groups instead of {module.num_groups}"
                yield Way(text, with_fields(num_groups=groups))
    else:

        def without_mean(twin: nn.LayerNorm, x: Tensor) -> Tensor:
            return x * (x.square().mean(-1, keepdim=True) + twin.eps).rsqrt() * twin.weight + twin.bias

        yield Way("without subtracting the mean", without_mean)


def of_linear(module: nn.Linear) -> Iterator[Way]:
    if module.bias is not None:
        yield Way("without its bias", with_fields(bias=None))
        yield Way("with its bias twice", with_fields(bias=nn.Parameter(2 * module.bias)))
    if module.in_features == module.out_features:
        yield Way("with its weight transposed", with_fields(weight=nn.Parameter(module.weight.T)))
    yield Way("left out", lambda twin, x: x)


def of_conv(module: nn.Conv2d) -> Iterator[Way]:
    if module.bias is not None:
        yield Way("without its bias", with_fields(bias=None))
    weight = module.weight
    yield Way("with kernels mirrored", with_fields(weight=nn.Parameter(weight.flip(2, 3))))
    yield Way("with kernels' height and width exchanged", with_fields(weight=nn.Parameter(weight.transpose(2, 3))))
    if weight.shape[0] == weight.shape[1]:
        text = "with its input and output channels exchanged"
        yield Way(text, with_fields(weight=nn.Parameter(weight.transpose(0, 1))))
    for mode in ("reflect", "replicate", "circular"):
        yield Way(f"with {mode} padding instead of zeros", padded_like(mode))


def padded_like(mode: str) -> Callable[..., Tensor]:
    def run(twin: nn.Conv2d, x: Tensor) -> Tensor:
        p = twin.padding[0]
        return F.conv2d(F.pad(x, (p, p, p, p), mode=mode), twin.weight, twin.bias, twin.stride)

    return run


def of_downsample(module: blocks.Downsample) -> Iterator[Way]:
    pads = {
        "padding only right and below": (0, 1, 0, 1),
        "padding only left and above": (1, 0, 1, 0),
        "padding all round": (1, 1, 1, 1),
        "no padding": (0, 0, 0, 0),
    }
    for text, pad in pads.items():
        if pad != ((0, 1, 0, 1) if module.asymmetric else (1, 1, 1, 1)):
            yield Way(f"with {text}", padded_by(pad))
    yield Way("by the mean of four instead of a strided convolution", lambda twin, x: F.avg_pool2d(x, 2))


def padded_by(pad: tuple[int, ...]) -> Callable[..., Tensor]:
    def run(twin: blocks.Downsample, x: Tensor) -> Tensor:
        conv = twin.conv
        conv.padding = (0, 0)  # through the module, so that whoever watches it sees the call
        return conv(F.pad(x, pad))

    return run


def of_upsample(module: blocks.Upsample) -> Iterator[Way]:
    for mode in ("bilinear", "bicubic"):
        yield Way(f"with {mode} enlargement instead of nearest", enlarged_by(mode))
    yield Way("without the convolution", lambda twin, x, size=None: F.interpolate(x, scale_factor=2.0))
    yield Way(
        "with the convolution before the enlargement",
        lambda twin, x, size=None: F.interpolate(twin.conv(x), scale_factor=2.0),
    )


def enlarged_by(mode: str) -> Callable[..., Tensor]:
    def run(twin: blocks.Upsample, x: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        size = size or (2 * x.shape[2], 2 * x.shape[3])
        return twin.conv(F.interpolate(x, size=size, mode=mode, align_corners=False))

    return run


# ---------------------------------------------------------------------------------------------------- blocks


def of_geglu(module: blocks.GEGLU) -> Iterator[Way]:
    for name, act in ACTIVATIONS.items():
        yield Way(f"with {name}", gated(act, swap=False))
        yield Way(f"with {name} and its halves exchanged", gated(act, swap=True))


def gated(act: Callable[[Tensor], Tensor], swap: bool) -> Callable[..., Tensor]:
    def run(twin: blocks.GEGLU, x: Tensor) -> Tensor:
        h, gate = twin.proj(x).chunk(2, dim=-1)
        return gate * act(h) if swap else h * act(gate)

    return run


def of_feed_forward(module: blocks.FeedForward) -> Iterator[Way]:
    for way in of_geglu(module.net[0]):
        yield Way(way.text, lambda twin, x, way=way: twin.net[2](way.run(twin.net[0], x)))


def of_mlp(module: clip.MLP) -> Iterator[Way]:
    own = next((n for n, act in clip.ACTIVATIONS.items() if act is module.act), "its own")
    for name, act in ACTIVATIONS.items():
        yield Way(f"with {name} instead of {own}", with_fields(act=act))


def of_resnet(module: blocks.ResnetBlock) -> Iterator[Way]:
    for name, act in ACTIVATIONS.items():
        yield Way(f"with {name}", resnet(act=act))
    yield Way("without adding its input", resnet(residual=False))
    yield Way("divided by sqrt(2)", lambda twin, *args: twin(*args) / 2**0.5)
    yield Way("with its input added without the shortcut", resnet(shortcut=False))
    yield Way("with norm1 and norm2 exchanged", resnet(exchanged=True))
    if hasattr(module, "time_emb_proj"):
        yield Way("without the timestep", resnet(timed=False))
        yield Way("with the timestep's SiLU left out", resnet(emb_act=lambda emb: emb))
        yield Way("with the timestep added behind norm2", resnet(late=True))


def resnet(
    act: Callable = F.silu, emb_act: Callable = F.silu, residual: bool = True, shortcut: bool = True,
    exchanged: bool = False, timed: bool = True, late: bool = False,
) -> Callable[..., Tensor]:  # fmt: skip
    def run(twin: blocks.ResnetBlock, x: Tensor, emb: Tensor | None = None) -> Tensor:
        norms = (twin.norm2, twin.norm1) if exchanged else (twin.norm1, twin.norm2)
        h = twin.conv1(act(norms[0](x)))
        added = 0 if emb is None or not timed else twin.time_emb_proj(emb_act(emb))[:, :, None, None]
        h = norms[1](h) + added if late else norms[1](h + added)
        h = twin.conv2(act(h))
        if not residual:
            return h
        return (x if twin.conv_shortcut is None or not shortcut else twin.conv_shortcut(x)) + h

    return run


def of_transformer_block(module: blocks.TransformerBlock) -> Iterator[Way]:
    yield Way(PLAIN, transformer())
    for k, text in enumerate(("self-attention", "cross-attention", "feed-forward")):
        yield Way(f"without adding the input of its {text}", transformer(dropped=k))
    yield Way("with norm2 and norm3 exchanged", transformer(norms=(1, 3, 2)))
    yield Way("with norm1 and norm2 exchanged", transformer(norms=(2, 1, 3)))
    yield Way("with norm1 and norm3 exchanged", transformer(norms=(3, 2, 1)))
    yield Way("without its feed-forward", transformer(fed=False))
    yield Way("with cross-attention first", transformer(cross_first=True))


def transformer(
    dropped: int = -1, norms: tuple[int, ...] = (1, 2, 3), fed: bool = True, cross_first: bool = False
) -> Callable[..., Tensor]:
    def run(twin: blocks.TransformerBlock, x: Tensor, context: Tensor) -> Tensor:
        one, two, three = (getattr(twin, f"norm{k}") for k in norms)
        parts = [
            lambda x: twin.attn1(one(x), context if twin.only_cross_attention else None),
            lambda x: twin.attn2(two(x), context),
        ]
        parts = parts[::-1] if cross_first else parts
        for k, part in enumerate([*parts, lambda x: twin.ff(three(x))][: 3 if fed else 2]):
            x = part(x) if k == dropped else x + part(x)
        return x

    return run


def of_spatial(module: blocks.SpatialTransformer) -> Iterator[Way]:
    yield Way("without adding its input", lambda twin, x, *rest, **named: twin(x, *rest, **named) - x)
    yield Way(
        "with its positions column by column instead of row by row",
        lambda twin, x, *rest, **named: twin(x.transpose(2, 3).contiguous(), *rest, **named).transpose(2, 3),
    )


def of_time_mlp(module: blocks.TimestepMLP) -> Iterator[Way]:
    for name, act in ACTIVATIONS.items():
        yield Way(f"with {name}", lambda twin, x, *_, act=act: twin.linear_2(act(twin.linear_1(x))))
    yield Way("with a SiLU behind it", lambda twin, *args: F.silu(twin(*args)))


def of_clip_layer(module: clip.Layer) -> Iterator[Way]:
    yield Way(
        "without adding the input of its attention", lambda m, x: after_attention(m, m.self_attn(m.layer_norm1(x)))
    )
    yield Way(
        "without adding the input of its MLP", lambda m, x: m.mlp(m.layer_norm2(x + m.self_attn(m.layer_norm1(x))))
    )
    yield Way("with norms behind the branches instead of before", behind)


def after_attention(m: clip.Layer, x: Tensor) -> Tensor:
    return x + m.mlp(m.layer_norm2(x))


def behind(m: clip.Layer, x: Tensor) -> Tensor:
    x = m.layer_norm1(x + m.self_attn(x))
    return m.layer_norm2(x + m.mlp(x))


def of_text_embeddings(module: clip.TextEmbeddings) -> Iterator[Way]:
    yield Way("without positions", lambda twin, ids: twin.token_embedding(ids))
    yield Way(
        "with positions counted from 1",
        lambda twin, ids: twin.token_embedding(ids) + twin.position_embedding.weight.roll(-1, 0)[: ids.shape[1]],
    )


def of_text_encoder(module: clip.TextEncoder) -> Iterator[Way]:
    yield Way("without the final norm", lambda twin, ids: twin(ids).hidden[-1])
    yield Way("with the last layer but one, normed", lambda twin, ids: twin.final_layer_norm(twin(ids).hidden[-2]))
    yield Way("with the last layer but one", lambda twin, ids: twin(ids).hidden[-2])
    yield Way("pooled at the last position", lambda twin, ids: projected(twin, twin(ids).last[:, -1]))
    yield Way("pooled at the first position", lambda twin, ids: projected(twin, twin(ids).last[:, 0]))
    yield Way("pooled before the projection", lambda twin, ids: at_end(twin, ids))
    yield Way("pooled by the mean", lambda twin, ids: projected(twin, twin(ids).last.mean(1)))


def projected(twin: clip.TextEncoder, x: Tensor) -> Tensor:
    return twin.text_projection(x) if twin.config.with_projection else x


def at_end(twin: clip.TextEncoder, ids: Tensor) -> Tensor:
    return twin(ids).last[torch.arange(len(ids), device=ids.device), twin.end_of_text(ids)]


def waves(root: nn.Module, args: tuple, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Other sinusoids of the timestep than our UNet's."""
    t, config = args[1], root.config
    flip, shift = config.flip_sin_to_cos, config.freq_shift
    width = config.block_out_channels[0]
    yield "sines and cosines exchanged", blocks.timestep_embedding(t, width, not flip, shift).to(dtype)
    other = 1.0 if shift == 0 else 0.0
    yield f"freq_shift {other:g} instead of {shift:g}", blocks.timestep_embedding(t, width, flip, other).to(dtype)
    both = blocks.timestep_embedding(t, width, not flip, other).to(dtype)
    yield f"sines and cosines exchanged and freq_shift {other:g} instead of {shift:g}", both
    cuts = {"cut to whole numbers": t.long(), "in float16": t.half(), "in bfloat16": t.bfloat16(),
            "plus 1": t + 1, "divided by 1000": t / 1000}  # fmt: skip
    for text, other in cuts.items():
        yield f"the timestep {text}", blocks.timestep_embedding(other, width, flip, shift).to(dtype)


KINDS = (
    (nn.GroupNorm, of_norm),
    (nn.LayerNorm, of_norm),
    (nn.Linear, of_linear),
    (nn.Conv2d, of_conv),
    (blocks.Downsample, of_downsample),
    (blocks.Upsample, of_upsample),
    (blocks.Attention, of_attention),
    (clip.SelfAttention, of_attention),
    (blocks.GEGLU, of_geglu),
    (blocks.FeedForward, of_feed_forward),
    (clip.MLP, of_mlp),
    (blocks.ResnetBlock, of_resnet),
    (blocks.TransformerBlock, of_transformer_block),
    (blocks.SpatialTransformer, of_spatial),
    (blocks.TimestepMLP, of_time_mlp),
    (clip.Layer, of_clip_layer),
    (clip.TextEmbeddings, of_text_embeddings),
    (clip.TextEncoder, of_text_encoder),
)
