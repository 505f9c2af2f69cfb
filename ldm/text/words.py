"""Sentences become what the UNet reads: by one text encoder, or by SDXL's two side by side.

    Stable Diffusion 1, 2    the last layer's output, normed. (Folders of SD 2 leave out the last of OpenCLIP's 24
                             layers, for it was trained on the last but one.)
    SDXL                     the last but one of each encoder, not normed, side by side; and the second's pooled vector
    its refiner              the same of the second encoder alone
    FLUX                     T5's last layer, of its first tokens, and CLIP's pooled vector; CLIP's own without T5

Shapes: B prompts, L tokens (77), D the encoders' widths together, J the second's joint space.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ldm.errors import say_on_stderr
from ldm.text.clip import TextEncoder
from ldm.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from ldm.text.t5 import T5Encoder
    from ldm.text.t5_tokenizer import T5Tokenizer


class Words(NamedTuple):
    """What text encoders say of a batch of prompts."""

    context: Tensor  # (B, L, D), read by attention
    pooled: Tensor | None = None  # (B, J), of SDXL and FLUX: the whole prompt as one vector


class Reader(NamedTuple):
    """A text encoder, and the tokenizer it was trained with: SDXL's two pad in different ways."""

    tokenizer: "Tokenizer | T5Tokenizer"
    encoder: "TextEncoder | T5Encoder"


def read(
    readers: Sequence[Reader], prompts: Sequence[str], device: torch.device, clip_skip: int = 0, xl: bool = False
) -> Words:
    """What Stable Diffusion reads of each prompt, or SDXL (`xl`; Podell et al. 2023, section 2.1).

    `clip_skip` leaves out so many more layers: 1 is what the web UI calls clip skip 2. Says on stderr what was cut off
    behind the 77th token; dialects read it in chunks (`ldm.text.prompts`).
    """
    said, contexts, pooled = {}, [], None
    for reader in readers:
        tokens, length = reader.tokenizer(list(prompts)), reader.tokenizer.max_length
        said |= dict.fromkeys(
            f"The prompt is longer than {length} tokens; this part is not read: {cut!r}" for cut in tokens.cut if cut
        )
        context, pooled = vectors(reader, tokens.ids.to(device), clip_skip, xl)  # the last encoder's pooled is kept
        contexts.append(context)
    for sentence in said:
        say_on_stderr(sentence)
    return Words(torch.cat([context.to(contexts[-1]) for context in contexts], dim=-1), pooled)


def read_flux(
    readers: Sequence[Reader],
    prompts: Sequence[str],
    device: torch.device,
    length: int,
    say: Callable[[str], None] = say_on_stderr,
) -> Words:
    """What FLUX reads of each prompt: T5's vectors of `length` tokens, padding among them, and CLIP's pooled vector.

    With CLIP alone (a model of one's own) the first `length` of its context: CLIP is causal, so they don't depend on
    what is left out. Says on stderr what that is.
    """
    clip, *more = readers
    tokens, most = clip.tokenizer(list(prompts)), clip.tokenizer.max_length
    states = clip.encoder(tokens.ids.to(device))
    if more:
        pieces = more[0].tokenizer(list(prompts), length)
        context, cuts = more[0].encoder.context(pieces.ids.to(device)), pieces.cut
        for part in filter(None, dict.fromkeys(map(before, tokens.cut, cuts))):
            say(f"CLIP reads {most} tokens of a prompt, T5 {length}: this part is in T5's words alone: {part!r}")
    else:
        context, ids = states.last[:, :length], map(clip.tokenizer.encode, prompts)
        room = min(length - 1, most - 2)  # the first token is none of the text's, nor the last of 77
        cuts = [clip.tokenizer.decode(row[room:]) for row in ids]
    for cut in filter(None, dict.fromkeys(cuts)):
        say(f"The prompt is longer than {length} tokens (max_sequence_length); this part is not read: {cut!r}")
    return Words(context, states.pooled)


def before(cut: str, unread: str) -> str:
    """What of the end of a prompt lies before its further end `unread`; "" if that is the longer one.

    Letters are counted, for two tokenizers write the same words with other spaces, one in lower case, and the other
    what it doesn't know as <unk>.
    """
    left = len("".join(cut.split())) - len("".join(unread.replace("<unk>", "?").split()))
    for k, letter in enumerate(cut):
        if left <= 0:
            return cut[:k].strip()
        left -= not letter.isspace()
    return cut


def vectors(
    reader: Reader, ids: Tensor, clip_skip: int = 0, xl: bool = False, mask: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """What one text encoder says of ids (B, L): (B, L, its width), and of SDXL's second the pooled vector (B, J).

    `mask` (B, L): tokens where it is False are seen by none.
    """
    if not xl:
        return reader.encoder.context(ids, clip_skip, mask), None
    states = reader.encoder(ids, mask)
    return reader.encoder.earlier(states, 1 + clip_skip, clip_skip), states.pooled


def nothing(words: Words) -> Words:
    """Zeros in the words' place: what SDXL was shown where a picture's caption was dropped."""
    return Words(*(None if each is None else torch.zeros_like(each) for each in words))
