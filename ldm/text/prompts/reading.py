"""Prompts in a dialect become what the UNet reads: chunks side by side, weighted. `ldm.text.words` reads plain ones.

Prompts of different length are brought to the length of the longest by chunks of the empty prompt, as are a prompt and
its negative one (the web UI's pad_cond_uncond, compel's pad_conditioning_tensors_to_same_length). So a long prompt in
a batch changes the pictures of short ones a little; drawn one by one, they are as alone.

Shapes: n chunks of L tokens (77), D the encoders' widths together, J the second's joint space.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ldm.errors import say_on_stderr
from ldm.text.prompts import a1111, compel
from ldm.text.prompts.chunks import Chunk, by_sentences, in_chunks
from ldm.text.prompts.weighing import emphasised, parted, weights_of
from ldm.text.tokenizer import Tokenizer
from ldm.text.words import Reader, Words, vectors


class Asked(NamedTuple):
    """How prompts are to be read: the dialect, where, which layer of the encoders; and who is told what is odd."""

    dialect: str
    device: torch.device
    clip_skip: int = 0
    xl: bool = False
    say: Callable[[str], None] = say_on_stderr


def length(tokenizer: Tokenizer, prompt: str, dialect: str) -> int:
    """How many chunks a prompt in a1111's or compel's dialect is; of a .blend() those of its longest text."""
    if dialect == "a1111":
        return len(in_chunks(tokenizer, a1111.parse(prompt)))
    return sum(max(len(by_sentences(tokenizer, text)) for text in mix.texts) for mix in compel.parse(prompt).mixes)


def read_chunks(readers: Sequence[Reader], prompts: Sequence[str], asked: Asked) -> Words:
    """What the text encoders say of each prompt, (B, n * L, D): each is read by itself, its bits are its own."""
    one = {prompt: [read_one(reader, prompt, asked) for reader in readers] for prompt in dict.fromkeys(prompts)}
    most = max(len(context) for found in one.values() for context, _ in found)

    def row(found: list[tuple[Tensor, Tensor | None]]) -> Words:
        sides = []
        for reader, (context, _) in zip(readers, found, strict=True):
            missing = [empty_chunk(reader, asked)] * (most - len(context)) if len(context) < most else []
            sides.append(torch.cat([context, *missing]).flatten(0, 1))
        context = torch.cat([side.to(sides[-1]) for side in sides], dim=-1)
        return Words(context[None], found[-1][1])

    rows = {prompt: row(found) for prompt, found in one.items()}
    pooled = [rows[prompt].pooled for prompt in prompts]
    context = torch.cat([rows[prompt].context for prompt in prompts])
    return Words(context, None if pooled[0] is None else torch.cat(pooled))


def empty_chunk(reader: Reader, asked: Asked) -> Tensor:
    """What an encoder says of the empty prompt, (1, L, D)."""
    return vectors(reader, framed(reader, [()], asked), asked.clip_skip, asked.xl)[0]


def filled(words: Words, tokens: int, empty: Tensor) -> Words:
    """The same in `tokens` tokens or more, by `empty` (1, L, D), what is said of the empty prompt."""
    missing = -(-max(tokens - words.context.shape[1], 0) // empty.shape[1])
    return words._replace(context=torch.cat([words.context, *[empty.expand(len(words.context), -1, -1)] * missing], 1))


def framed(reader: Reader, chunks: Sequence[Chunk], asked: Asked) -> Tensor:
    """The ids (n, L), begin and end around each chunk."""
    rows = [reader.tokenizer.frame([token.id for token in chunk]) for chunk in chunks]
    return torch.tensor(rows, dtype=torch.int64, device=asked.device)


def read_one(reader: Reader, prompt: str, asked: Asked) -> tuple[Tensor, Tensor | None]:
    """What one encoder says of one prompt: (n, L, D), and of SDXL the pooled vector (1, J)."""
    return (read_a1111 if asked.dialect == "a1111" else read_compel)(reader, prompt, asked)


def read_a1111(reader: Reader, prompt: str, asked: Asked) -> tuple[Tensor, Tensor | None]:
    """The pooled vector is that of the first chunk, without weights."""
    chunks = in_chunks(reader.tokenizer, a1111.parse(prompt))
    context, pooled = vectors(reader, framed(reader, chunks, asked), asked.clip_skip, asked.xl)
    weighted = emphasised(context, weights_of(chunks, context.shape[1]), asked.say)
    return weighted, None if pooled is None else pooled[:1]


def read_compel(reader: Reader, prompt: str, asked: Asked) -> tuple[Tensor, Tensor | None]:
    """The pooled vector is that of the prompt as it is written, signs among the words, and cut: as the library does."""
    parsed = compel.parse(prompt)
    empty = empty_chunk(reader, asked)
    found = []
    for mix, weight in zip(parsed.mixes, parsed.weights, strict=True):
        context = mixed([of_text(reader, text, empty, asked) for text in mix.texts], mix.weights, empty)
        found.append(context if weight == 1 else empty + (context - empty) * weight)
    pooled = None
    if asked.xl:
        _, pooled = vectors(reader, reader.tokenizer([prompt]).ids.to(asked.device), asked.clip_skip, asked.xl)
    return torch.cat(found).to(empty.dtype), pooled


def of_text(reader: Reader, text: Sequence[compel.Phrase], empty: Tensor, asked: Asked) -> Tensor:
    chunks = by_sentences(reader.tokenizer, text)
    ids = framed(reader, chunks, asked)

    def encode(mask: Tensor | None) -> Tensor:
        context, _ = vectors(reader, ids, asked.clip_skip, asked.xl, mask)
        return wide(context)

    return parted(encode, wide(empty), chunks, [phrase.weight for phrase in text])


def wide(context: Tensor) -> Tensor:
    """In float32 at least: weights are, and half precision would round each of their steps."""
    return context.to(torch.promote_types(context.dtype, torch.float32))


def mixed(contexts: Sequence[Tensor], weights: Sequence[float], empty: Tensor) -> Tensor:
    """Their sum so weighted; shorter ones are filled up with the empty prompt."""
    if len(contexts) == 1 and weights[0] == 1:
        return contexts[0]
    most = max(map(len, contexts))
    contexts = [torch.cat([each, *[empty.to(each)] * (most - len(each))]) for each in contexts]
    return sum(each * weight for each, weight in zip(contexts, weights, strict=True))
