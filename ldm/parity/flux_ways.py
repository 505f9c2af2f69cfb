"""Other ways to do what FLUX's modules do: the mistakes, and the honest differences, that ports are made of.

As `alternatives.py` for the UNet's. What FLUX's blocks call by name is replaced while the copy of a block runs.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.models import flux
from ldm.models.blocks import timestep_embedding
from ldm.models.unet import Extras
from ldm.parity.alternatives import ACTIVATIONS, EPSILONS, with_fields
from ldm.parity.calls import PLAIN, Way

PATCH, attention, modulate, rotate = flux.PATCH, F.scaled_dot_product_attention, flux.modulate, flux.rotate


def ways_of_flux(module: nn.Module) -> Iterator[Way]:
    """All that is known for this kind of module."""
    for kind, ways in KINDS:
        if isinstance(module, kind):
            yield from ways(module)


def instead(**functions: Callable) -> Callable[..., object]:
    """The module itself, with functions of `ldm.models.flux`, or of `F` there, replaced while it runs."""

    def run(twin: nn.Module, *args: object, **kwargs: object) -> object:
        with ExitStack() as stack:
            for name, function in functions.items():
                stack.enter_context(patch.object(flux if hasattr(flux, name) else F, name, function))
            return twin(*args, **kwargs)

    return run


def of_rms_norm(module: flux.RMSNorm) -> Iterator[Way]:
    for eps in EPSILONS:
        if eps != module.eps:
            yield Way(f"with eps {eps:g} instead of {module.eps:g}", with_fields(eps=eps))
    yield Way("with its gain plus 1", with_fields(weight=nn.Parameter(1 + module.weight)))
    yield Way("without its gain", with_fields(weight=nn.Parameter(torch.ones_like(module.weight))))
    yield Way("subtracting the mean", lambda twin, x: twin(x - x.mean(-1, keepdim=True)))
    yield Way("left out", lambda twin, x: x)


def of_feed_forward(module: flux.FeedForward) -> Iterator[Way]:
    for name, act in ACTIVATIONS.items():
        yield Way(f"with {name}", instead(gelu=lambda x, approximate="none", act=act: act(x)))


def of_block(module: flux.DoubleBlock | flux.SingleBlock) -> Iterator[Way]:
    yield Way(PLAIN, instead(modulate=modulate, rotate=rotate, scaled_dot_product_attention=attention))
    yield Way("with shift and scale exchanged", instead(modulate=lambda x, a, b: modulate(x, b, a)))
    yield Way("with the scale as it is instead of 1 plus it", instead(modulate=lambda x, a, b: modulate(x, a, b - 1)))
    for eps in (1e-5, 1e-8):
        yield Way(f"with a LayerNorm of eps {eps:g} instead of 1e-06", instead(modulate=normed_by(eps)))
    yield Way("without turning q and k by their places", instead(rotate=lambda x, rotary: x))
    yield Way("with q and k turned the other way", instead(rotate=lambda x, rotary: rotate(x, (rotary[0], -rotary[1]))))
    yield Way("with halves of q and k turned instead of pairs", instead(rotate=in_halves))
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        yield Way(f"with q and k turned in {name}", instead(rotate=turned_in(dtype)))
    yield Way("without norms of q and k", without_norms)
    undivided = instead(scaled_dot_product_attention=lambda q, k, v: attention(q, k, v, scale=1.0))
    yield Way("with scores not divided", undivided)
    if isinstance(module, flux.SingleBlock):
        yield from of_feed_forward(module)
    else:
        yield Way("with the norms of text and picture exchanged", norms_exchanged)


def normed_by(eps: float) -> Callable[..., Tensor]:
    return lambda x, shift, scale: F.layer_norm(x, x.shape[-1:], eps=eps) * (1 + scale) + shift


def in_halves(x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """As LLaMA's port in transformers has it: number i turns with number i + W_h/2."""
    a, b = x.to(rotary[0].dtype).chunk(2, dim=-1)
    return torch.cat([a * rotary[0] - b * rotary[1], a * rotary[1] + b * rotary[0]], dim=-1).to(x.dtype)


def turned_in(dtype: torch.dtype) -> Callable[..., Tensor]:
    return lambda x, rotary: rotate(x.to(dtype), tuple(each.to(dtype) for each in rotary)).to(x.dtype)


def without_norms(twin: nn.Module, *args: object, **kwargs: object) -> object:
    for name, module in list(twin.attn.named_children()):
        if isinstance(module, flux.RMSNorm):
            setattr(twin.attn, name, nn.Identity())
    return twin(*args, **kwargs)


def norms_exchanged(twin: nn.Module, *args: object, **kwargs: object) -> object:
    attn = twin.attn
    attn.norm_q, attn.norm_added_q = attn.norm_added_q, attn.norm_q
    attn.norm_k, attn.norm_added_k = attn.norm_added_k, attn.norm_k
    return twin(*args, **kwargs)


def of_told(module: flux.Told) -> Iterator[Way]:
    """The vector of timestep, guidance and pooled text."""
    yield Way("without guidance", lambda twin, t, pooled, guidance: twin(t, pooled, None))
    yield Way("without the pooled text", lambda twin, t, pooled, g: twin(t, pooled, g) - twin.text_embedder(pooled))
    yield Way("with guidance as it is, not times 1000", lambda twin, t, p, g: twin(t, p, g / 1000))
    yield Way("with the timestep in thousandths", lambda twin, t, pooled, guidance: twin(t / 1000, pooled, guidance))
    flipped = instead(timestep_embedding=lambda t, width: timestep_embedding(t, width, flip_sin_to_cos=False))
    yield Way("with sines and cosines exchanged", flipped)


def of_network(module: flux.Flux) -> Iterator[Way]:
    """What is done before the first module, and behind the last one."""
    orders = {
        "with patches whose channels come last": (0, 2, 4, 3, 5, 1),
        "with patches read column by column": (0, 4, 2, 1, 3, 5),
        "with the positions inside a patch column by column": (0, 2, 4, 1, 5, 3),
    }
    for text, order in orders.items():
        yield Way(text, network(pack=packed_by(order)))
    yield Way("with shift before scale in the last layer", last_exchanged)
    for dtype in (torch.bfloat16, torch.float16):
        name = str(dtype).removeprefix("torch.")
        yield Way(f"told a timestep that {name} rounds", rounded("t", dtype))
        yield Way(f"told a guidance that {name} rounds", rounded("guidance", dtype))
    yield Way("told thousandths of a timestep", lambda twin, x, t, *rest: asked(twin, x, t / 1000, *rest))


def asked(twin: flux.Flux, x: Tensor, t: Tensor, context: Tensor, extras: dict[str, Tensor]) -> Tensor:
    return twin(x, t, context, Extras(**extras))


def network(**functions: Callable) -> Callable[..., object]:
    def run(twin: flux.Flux, *args: object) -> object:
        return instead(**functions)(lambda *given: asked(twin, *given), *args)

    return run


def packed_by(order: tuple[int, ...]) -> Callable[[Tensor], Tensor]:
    def run(x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        x = x.view(b, c, h // PATCH, PATCH, w // PATCH, PATCH).permute(order)
        return x.reshape(b, h * w // PATCH**2, c * PATCH**2)

    return run


def last_exchanged(twin: flux.Flux, *args: object) -> object:
    linear = twin.norm_out.linear
    halves = (torch.cat(each.chunk(2)[::-1]) for each in (linear.weight, linear.bias))
    linear.weight, linear.bias = map(nn.Parameter, halves)
    return asked(twin, *args)


def rounded(what: str, dtype: torch.dtype) -> Callable[..., object]:
    """As diffusers' transformer does it: to thousandths, to the dtype, times 1000, to the dtype."""

    def run(twin: flux.Flux, x: Tensor, t: Tensor, context: Tensor, extras: dict[str, Tensor]) -> Tensor:
        if what == "t":
            t = ((t / 1000).to(dtype) * 1000).to(t.dtype)
        else:
            guidance = extras["guidance"]
            extras = extras | {"guidance": (guidance.to(dtype) * 1000).to(guidance.dtype) / 1000}
        return asked(twin, x, t, context, extras)

    return run


KINDS = (
    (flux.RMSNorm, of_rms_norm),
    (flux.FeedForward, of_feed_forward),
    (flux.DoubleBlock, of_block),
    (flux.SingleBlock, of_block),
    (flux.Told, of_told),
    (flux.Flux, of_network),
)
