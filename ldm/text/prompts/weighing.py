"""What weights do to a text encoder's vectors: the web UI's emphasis, and compel's two ways up and down.

Shapes: n chunks of L tokens (77), D numbers each.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ldm.errors import say_on_stderr
from ldm.text.prompts.chunks import Chunk

USUAL = (0.2, 5.0)  # what all vectors of a chunk are multiplied by to have their mean back, at the least and most
LEAST = 1e-5  # of a weight below 1 in `parted`, whose tangent at 0 would be infinite


def weights_of(chunks: Sequence[Chunk], length: int) -> list[list[float]]:
    """The weight of each of the L tokens: begin, end and padding count 1."""
    return [([1.0, *(token.weight for token in chunk)] + [1.0] * length)[:length] for chunk in chunks]


def emphasised(
    context: Tensor, weights: Sequence[Sequence[float]], say: Callable[[str], None] = say_on_stderr
) -> Tensor:
    """The vectors (n, L, D) times their weights (n, L), and the mean of each chunk as it was.

    That is the web UI's "original" emphasis. It takes the mean over the prompts of a batch; here it is the prompt's
    own, or a picture would depend on its neighbours. A chunk without weights is left as it is. Where little is left of
    a mean it says (`say`) that all vectors are multiplied by much, or by less than 0.
    """
    if all(weight == 1 for row in weights for weight in row):
        return context
    wide = context.to(torch.promote_types(context.dtype, torch.float32))
    scaled = wide * torch.tensor(weights, dtype=wide.dtype, device=wide.device)[..., None]
    before, after = wide.mean((1, 2), keepdim=True), scaled.mean((1, 2), keepdim=True)
    factor = torch.where(after == 0, 1.0, before / torch.where(after == 0, 1.0, after))
    least, most = USUAL
    if ((factor < least) | (factor > most)).any():
        say(
            f"A prompt's weights move the mean of its vectors so far that all of them are multiplied by more than "
            f"{most:g}, less than {least:g} or a negative number to have it back, as in the web UI: the picture may "
            "come to nothing; take weights nearer to 1."
        )
    return (scaled * factor).to(context.dtype)


def away_from_empty(context: Tensor, empty: Tensor, weights: Sequence[Sequence[float]]) -> Tensor:
    """empty + weight * (context - empty), token by token: compel's way up. `empty` (1, L, D): of the empty prompt."""
    scale = torch.tensor(weights, dtype=context.dtype, device=context.device)[..., None]
    return torch.where(scale == 1, context, empty + (context - empty) * scale)  # of weight 1 nothing is rounded


def parted(
    encode: Callable[[Tensor | None], Tensor], empty: Tensor, chunks: Sequence[Chunk], weights: Sequence[float]
) -> Tensor:
    """compel's weighting of a text: `away_from_empty`, and for every phrase below 1 a way towards its absence.

    `encode(mask)` gives the vectors (n, L, D) of the text, where the mask (n, L) is 0 blind to those tokens. `weights`
    are the phrases'. The result is a mean: the text itself counts 1, and the text without the phrase of weight w counts
    tan((1 - w) * pi / 2), which is nothing at 1, as much at 1/2, and all at 0.
    """
    length = empty.shape[1]
    each = weights_of(chunks, length)
    there = {token.phrase for chunk in chunks for token in chunk}
    low = [k for k, weight in enumerate(weights) if weight < 1 and k in there]
    found = [away_from_empty(encode(None), empty, each)]
    counts = [1.0]
    for k in low:
        mask = torch.tensor(without(chunks, k, length), device=empty.device)
        found.append(away_from_empty(encode(mask), empty, each))
        counts.append(math.tan((1 - max(weights[k], LEAST)) * math.pi / 2))
    if not low:
        return found[0]
    share = torch.tensor(counts, dtype=empty.dtype, device=empty.device)
    share = share / share.sum()
    return sum(vectors * s for vectors, s in zip(found, share, strict=True))


def without(chunks: Sequence[Chunk], phrase: int, length: int) -> list[list[bool]]:
    """Which tokens (n, L) are seen where a phrase isn't: all but those from its first to its last.

    Where it goes on into another chunk, the end and the padding between are hidden too, as the library does it, but not
    the first and the last token of a chunk.
    """
    places = [
        n * length + 1 + k for n, chunk in enumerate(chunks) for k, token in enumerate(chunk) if token.phrase == phrase
    ]
    ends = (0, length - 1)
    return [
        [k in ends or not places[0] <= n * length + k <= places[-1] for k in range(length)] for n in range(len(chunks))
    ]
