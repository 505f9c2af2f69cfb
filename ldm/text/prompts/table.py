"""What tokenizers make of a prompt, to be looked at: chunks, positions, pieces, ids, weights, and at which steps.

    print(tokens_of(pipe.tokenizer, "a (red:1.3) house", "a1111"))
    tokens_of({"text_encoder": first, "text_encoder_2": second}, prompt, "a1111", steps=30).to_json()

`ldm tokens` prints it. No weights are needed.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from textwrap import wrap
from typing import NamedTuple

from ldm.errors import printable
from ldm.text.prompts import a1111, check_dialect, compel, schedules
from ldm.text.prompts.chunks import Chunk, Token, by_sentences, in_chunks, in_one
from ldm.text.prompts.notices import notices
from ldm.text.tokenizer import Tokenizer

WIDTH = 100  # letters of a line, where nobody says how many there are
MOST_PIECE = 24  # letters of a piece that are shown


class Part(NamedTuple):
    """A text that one encoder reads by itself: `title` tells it from others of the prompt (compel's .and, .blend)."""

    title: str
    chunks: tuple[Chunk, ...]
    cut: Chunk = ()


class Side(NamedTuple):
    """What one text encoder's tokenizer makes of a stage."""

    encoder: str
    tokenizer: Tokenizer
    parts: tuple[Part, ...]

    @property
    def ids(self) -> list[list[list[int]]]:
        return [[[token.id for token in chunk] for chunk in (*part.chunks, part.cut)] for part in self.parts]


class Stage(NamedTuple):
    """The prompt as it is at some steps, counted from 1."""

    steps: tuple[int, ...]
    text: str
    sides: tuple[Side, ...]


@dataclass(frozen=True)
class Tokenised:
    """A prompt in a dialect; as text it is a table, of lines of `width` letters by `lines(width)`."""

    prompt: str
    dialect: str
    steps: int | None
    stages: tuple[Stage, ...]
    notices: tuple[str, ...]

    def __str__(self) -> str:
        return "\n".join(self.lines(WIDTH))

    def lines(self, width: int) -> list[str]:
        lines = []
        for stage in self.stages:
            if len(self.stages) > 1:
                title = f"{spans(stage.steps)} of {self.steps}: {printable(stage.text)}"
                lines += [*wrap(title, width, subsequent_indent="  "), ""]
            for k, side in enumerate(stage.sides):
                lines += [*side_lines(side, stage.sides[:k], width), ""]
        return lines[:-1]

    def to_json(self) -> dict:
        """The same for a program: every token with its position among those that the network reads."""
        stages = [
            {"steps": list(stage.steps), "text": stage.text, "encoders": [side_json(side) for side in stage.sides]}
            for stage in self.stages
        ]
        said = {"prompt": self.prompt, "dialect": self.dialect, "steps": self.steps}
        return said | {"notices": list(self.notices), "stages": stages}


def tokens_of(
    tokenizers: Tokenizer | Mapping[str, Tokenizer], prompt: str, dialect: str = "plain", steps: int | None = None
) -> Tokenised:
    """Of one tokenizer, or of several by their encoders' names. `steps`: of a run, whose stages are told too.

    Without `steps` a prompt that changes on the way is shown as in 20.
    """
    if isinstance(tokenizers, Tokenizer):
        tokenizers = {"text_encoder": tokenizers}
    first = next(iter(tokenizers.values()))
    texts: dict[str, tuple[int, ...]] = {prompt: ()}
    if check_dialect(dialect) == "a1111":
        found = schedules.stages(prompt, steps or 20)
        steps = steps or (20 if len(found) > 1 else None)
        texts = {}
        for stage in found:
            texts[stage.text] = texts.get(stage.text, ()) + tuple(range(stage.first, stage.last + 1))
    stages = tuple(
        Stage(at, text, tuple(Side(name, each, parts_of(each, text, dialect)) for name, each in tokenizers.items()))
        for text, at in texts.items()
    )
    return Tokenised(prompt, dialect, steps, stages, notices(prompt, dialect, first))


def parts_of(tokenizer: Tokenizer, text: str, dialect: str) -> tuple[Part, ...]:
    """The texts of one stage, in their dialect's chunks."""
    if dialect == "plain":
        chunk, cut = in_one(tokenizer, text)
        return (Part("", (chunk,), cut),)
    if dialect == "a1111":
        return (Part("", tuple(in_chunks(tokenizer, a1111.parse(text)))),)
    parsed, parts = compel.parse(text), []
    for k, (mix, weight) in enumerate(zip(parsed.mixes, parsed.weights, strict=True)):
        for n, (each, share) in enumerate(zip(mix.texts, mix.weights, strict=True)):
            title = f"prompt {k + 1} of .and(), weight {weight:g}" if len(parsed.mixes) > 1 else ""
            title = f"prompt {n + 1} of .blend(), share {share:g}" if len(mix.texts) > 1 else title
            parts.append(Part(title, tuple(by_sentences(tokenizer, each))))
    return tuple(parts)


def spans(numbers: Sequence[int]) -> str:
    """ "steps 1 to 12", "step 3", "steps 1, 3, 5, ... 19"."""
    if len(numbers) == 1:
        return f"step {numbers[0]}"
    if numbers[-1] - numbers[0] == len(numbers) - 1:
        return f"steps {numbers[0]} to {numbers[-1]}"
    shown = map(str, numbers if len(numbers) <= 6 else (*numbers[:4], "...", numbers[-1]))
    return f"steps {', '.join(shown)}".replace("..., ", "... ")


def side_lines(side: Side, before: Sequence[Side], width: int) -> list[str]:
    """The heading of an encoder, and its chunks; or that they are those of one before."""
    count = sum(len(chunk) for part in side.parts for chunk in part.chunks)
    chunks = sum(len(part.chunks) for part in side.parts)
    title = f"{side.encoder}: {counted(count, 'token')} in {counted(chunks, 'chunk')}"
    same = next((other for other in before if other.ids == side.ids), None)
    if same is not None:
        pads = same.tokenizer.pad_id != side.tokenizer.pad_id
        return [f"{title}, the same as {same.encoder}{f' but for the padding, {side.tokenizer.pad_id}' * pads}"]
    weighted = any(token.weight != 1 for part in side.parts for chunk in part.chunks for token in chunk)
    lines, number = [f"{title} (position, piece, id{', weight where it is not 1' * weighted})"], 0
    for part in side.parts:
        lines += [f"  {part.title}"] if part.title else []
        for chunk in part.chunks:
            number += 1
            lines += chunk_lines(chunk, side.tokenizer, f"chunk {number} of {chunks}", width)
        if part.cut:
            text = printable(side.tokenizer.decode(token.id for token in part.cut))
            title = f"  cut off, {counted(len(part.cut), 'token')}: {text}"
            lines += wrap(title, width, subsequent_indent="    ")
    return lines


def counted(number: int, word: str) -> str:
    return f"{number} {word}{'s' * (number != 1)}"


def chunk_lines(chunk: Chunk, tokenizer: Tokenizer, title: str, width: int) -> list[str]:
    """Position, piece, id and weight, in as many columns as fit, to be read down; begin and end are tokens too."""
    framed = [Token(tokenizer.bos, tokenizer.bos_id), *chunk, Token(tokenizer.eos, tokenizer.eos_id)]
    weighted = any(token.weight != 1 for token in chunk)
    pieces = [shown(token.piece) for token in framed]
    wide, digits = max(map(len, pieces)), max(len(str(token.id)) for token in framed)
    weights = [f"{token.weight:.4g}" for token in framed]
    most = max(map(len, weights))
    cells = [
        f"{k:2d} {piece:<{wide}} {token.id:>{digits}}" + (f" {weight if token.weight != 1 else '':>{most}}" * weighted)
        for k, (piece, token, weight) in enumerate(zip(pieces, framed, weights, strict=True))
    ]
    columns = max((width - 2 + 3) // (len(cells[0]) + 3), 1)
    rows = -(-len(cells) // columns)
    padding = tokenizer.max_length - len(framed)
    rest = f", then {padding} x {tokenizer.pad_id} as padding" if padding else ""
    lines = [f"  {title}: {counted(len(chunk), 'token')}{rest}"]
    return lines + ["  " + " | ".join(cells[row::rows]).rstrip() for row in range(rows)]


def shown(piece: str) -> str:
    """A piece as it is printed: whole, unless it would fill the line."""
    piece = printable(piece)
    return piece if len(piece) <= MOST_PIECE else f"{piece[: MOST_PIECE - 3]}..."


def side_json(side: Side) -> dict:
    parts = []
    for part in side.parts:
        chunks = [[token_json(token, k) for k, token in enumerate(chunk, start=1)] for chunk in part.chunks]
        parts.append({"title": part.title, "chunks": chunks, "cut": [token_json(token) for token in part.cut]})
    names = ("bos_id", "eos_id", "pad_id", "max_length")
    return {"encoder": side.encoder, **{name: getattr(side.tokenizer, name) for name in names}, "parts": parts}


def token_json(token: Token, position: int | None = None) -> dict:
    """`position`: in its chunk, where the begin token is 0; of what was cut off there is none."""
    return {"position": position, "piece": token.piece, "id": token.id, "weight": token.weight}
