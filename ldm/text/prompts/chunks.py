"""A prompt's tokens in chunks, each read as a prompt of its own: begin, 75 tokens at most, end, padding.

    plain     one chunk; what is left over is cut off
    a1111     `in_chunks`: full ones, but a comma among the last 20 tokens takes what is behind it along into the next
    compel    `by_sentences`: up to the last full stop that fits, or else the last comma or its like, or word

A learnt word of several vectors (`ldm.text.embeddings`) is not torn apart by the first two.
"""

from collections.abc import Sequence
from typing import NamedTuple

from ldm.text.prompts.a1111 import Section
from ldm.text.prompts.phrases import Phrase
from ldm.text.tokenizer import END, Tokenizer

BACKTRACK = 20  # the web UI's default: "Prompt word wrap length limit"
COMMA, STOP = "," + END, "." + END
PAUSES = (STOP, COMMA, ";" + END, ":" + END)


class Token(NamedTuple):
    """A piece of a word, its id, how much it counts, and the number of the phrase that it is of."""

    piece: str
    id: int
    weight: float = 1.0
    phrase: int = 0


Chunk = tuple[Token, ...]  # without begin, end and padding


def words_in(tokenizer: Tokenizer, phrase: Phrase, number: int = 0) -> list[list[Token]]:
    """The tokens of a phrase. Those of a learnt word stay together; every other token is alone, as in the web UI."""
    tokens = [
        Token(piece, tokenizer.ids.get(piece, tokenizer.unk_id), phrase.weight, number)
        for piece in tokenizer.pieces(phrase.text)
    ]
    found, at = [], 0
    while at < len(tokens):
        size = len(tokenizer.words.get(tokens[at].piece, "1"))
        found.append(tokens[at : at + size])
        at += size
    return found


def in_one(tokenizer: Tokenizer, prompt: str) -> tuple[Chunk, Chunk]:
    """What of a plain prompt is read, and what is cut off."""
    tokens = [token for word in words_in(tokenizer, Phrase(prompt)) for token in word]
    room = tokenizer.max_length - 2
    return tuple(tokens[:room]), tuple(tokens[room:])


def in_chunks(tokenizer: Tokenizer, sections: Sequence[Section]) -> list[Chunk]:
    """The chunks of a prompt in the web UI's dialect. There is always one; a BREAK ends one, even without tokens."""
    room = tokenizer.max_length - 2
    done: list[list[Token]] = []
    now: list[Token] = []
    comma = None  # where in the chunk the last one stands
    number = 0
    for k, section in enumerate(sections):
        if k:
            done.append(now)
            now, comma = [], None
        for phrase in section:
            for word in words_in(tokenizer, phrase, number):
                if word[0].piece == COMMA:
                    comma = len(now)
                elif len(now) == room and comma is not None and room - comma <= BACKTRACK:
                    done.append(now[: comma + 1])
                    now, comma = now[comma + 1 :], None
                if len(now) + len(word) > room:
                    done.append(now)
                    now, comma = [], None
                now = now + word
            number += 1
    if now or not done:
        done.append(now)
    return [tuple(chunk) for chunk in done]


def by_sentences(tokenizer: Tokenizer, phrases: Sequence[Phrase]) -> list[Chunk]:
    """The chunks of a prompt in compel's dialect. There is always one."""
    rest = [token for k, phrase in enumerate(phrases) for word in words_in(tokenizer, phrase, k) for token in word]
    room, done = tokenizer.max_length - 2, []
    while rest or not done:
        size = len(rest) if len(rest) <= room else split_point([token.piece for token in rest[:room]])
        done.append(tuple(rest[:size]))
        rest = rest[size:]
    return done


def split_point(pieces: Sequence[str]) -> int:
    """How many of these pieces come before the best place to split behind."""
    for fits in (STOP.__eq__, PAUSES.__contains__, lambda piece: piece.endswith(END)):
        found = [k for k, piece in enumerate(pieces) if fits(piece)]
        if found:
            return found[-1] + 1
    return len(pieces)
