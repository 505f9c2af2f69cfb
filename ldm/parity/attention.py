"""Other ways to attend: heads, scale, exchanged projections, masks; written out, where ours call a fused kernel."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.models import vae
from ldm.parity.calls import PLAIN, Way
from ldm.text import clip


def attend(
    q: Tensor, k: Tensor, v: Tensor, heads: int, scale: float | None = None, causal: bool = False, halves: bool = False
) -> Tensor:
    """softmax(q k^T scale) v of vectors (B, N, C), written out. `halves`: heads are strided, not blocks of channels."""

    def split(x: Tensor) -> Tensor:
        if halves:
            return x.unflatten(-1, (-1, heads)).permute(0, 3, 1, 2)
        return x.unflatten(-1, (heads, -1)).transpose(1, 2)

    q, k, v = split(q), split(k), split(v)
    scores = q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if causal:
        scores = scores + torch.full_like(scores, float("-inf")).triu(1)
    h = scores.softmax(-1) @ v  # (B, heads, N, C/heads)
    return h.permute(0, 2, 3, 1).flatten(2) if halves else h.transpose(1, 2).flatten(2)


class Parts(NamedTuple):
    """The four projections of an attention, by whichever names."""

    q: nn.Linear
    k: nn.Linear
    v: nn.Linear
    out: nn.Linear


def projections(m: nn.Module) -> Parts:
    if isinstance(m, clip.SelfAttention):
        return Parts(m.q_proj, m.k_proj, m.v_proj, m.out_proj)
    return Parts(m.to_q, m.to_k, m.to_v, m.to_out[0])


def of_attention(module: nn.Module) -> Iterator[Way]:
    width = projections(module).q.out_features
    own = width // module.heads
    yield Way(PLAIN, attention_way())
    for heads in sorted({h for h in range(1, min(width, 64) + 1) if width % h == 0} - {module.heads}):
        text = f"with {heads} heads instead of {module.heads}"
        text += " (the number is taken for a head's width)" if heads == own else ""
        yield Way(text, attention_way(heads=heads))
    for text, scale in (
        (f"scaled by 1/sqrt({width}), the whole width, instead of a head's", width**-0.5),
        ("without scaling", 1.0),
        ("scaled by 1/(head width) instead of its root", 1 / own),
        ("scaled by sqrt(head width) instead of its inverse", own**0.5),
    ):
        yield Way(text, attention_way(scale=scale))
    for text, order in (("to_q and to_k", "kqv"), ("to_k and to_v", "qvk"), ("to_q and to_v", "vkq")):
        yield Way(f"with {text} exchanged", attention_way(order=order))
    causal = isinstance(module, clip.SelfAttention) and module.causal
    yield Way("without the causal mask" if causal else "with a causal mask", attention_way(causal=not causal))
    yield Way("with heads that are strided instead of blocks of channels", attention_way(halves=True))
    yield Way("without the bias of its output", attention_way(out_bias=False))
    if isinstance(module, vae.VAEAttention):
        yield Way("without adding its input", lambda twin, x: twin(x) - x)
    else:
        yield Way("reading itself instead of the text", lambda twin, x, *rest, **named: twin(x))


def attention_way(
    heads: int | None = None, order: str = "qkv", causal: bool | None = None, out_bias: bool = True, **options: object
) -> Callable[..., Tensor]:
    def run(twin: nn.Module, x: Tensor, context: Tensor | None = None) -> Tensor:
        shape, own = x, isinstance(twin, vae.VAEAttention)
        if own:
            x = twin.group_norm(x).flatten(2).transpose(1, 2)
        parts, source = projections(twin), x if context is None else context
        named = {"q": parts.q, "k": parts.k, "v": parts.v}
        first, second, third = (named[letter] for letter in order)
        masked = getattr(twin, "causal", False) if causal is None else causal
        h = attend(first(x), second(source), third(source), heads or twin.heads, causal=masked, **options)
        h = F.linear(h, parts.out.weight, parts.out.bias if out_bias else None)
        return shape + h.transpose(1, 2).reshape(shape.shape) if own else h

    return run
