"""A run with everything that can be seen of it: `pipe.trace("a large red house on snow at night", seed=7)`.

Every step, the record of a watch (`ldm.lab.watch`), the finished pictures, the words and where they stand among the
tokens, the seconds each step took. `show` and `to_html` make a page of it, which `ldm.lab.page` writes.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ldm.errors import LDMError, nearest
from ldm.lab.record import Record
from ldm.lab.watch import watch
from ldm.run import Result
from ldm.sampling import Step
from ldm.schedules import Schedule
from ldm.schedules.table import is_whole
from ldm.settings import Settings
from ldm.text.prompts.schedules import parse, text_at
from ldm.text.prompts.table import Part, parts_of
from ldm.text.t5_tokenizer import SPACE
from ldm.text.tokenizer import END, Tokenizer

if TYPE_CHECKING:
    from ldm.pipeline import Pipeline
    from ldm.text.t5_tokenizer import T5Tokenizer


class Word(NamedTuple):
    """A word of a prompt, cleaned, and the positions of its pieces among the tokens; the begin token is position 0.

    In a dialect, those of the second chunk follow those of the first: its begin token is position 77.
    """

    text: str
    tokens: tuple[int, ...]


def words_of(tokenizer: Tokenizer, prompt: str) -> tuple[Word, ...]:
    """The words of a plain prompt, punctuation too. A word that was cut off at the last token, or within, isn't one."""
    return words_in(tokenizer, parts_of(tokenizer, prompt, "plain"))


def words_in(tokenizer: Tokenizer, parts: Sequence[Part]) -> tuple[Word, ...]:
    """The words of a prompt's parts, of which one stands behind the other. A learnt word is one, of several tokens."""
    chunks = [chunk for part in parts for chunk in part.chunks]
    placed = [(n * tokenizer.max_length + k, t) for n, chunk in enumerate(chunks) for k, t in enumerate(chunk, start=1)]
    words, own, left = [], [], 0  # `left`: how many more tokens the learnt word has
    for position, token in placed:
        own.append((position, token.id))
        left = left - 1 if left else len(tokenizer.words.get(token.piece, "1")) - 1
        if not left and (token.piece.endswith(END) or token.piece in tokenizer.added):
            positions, ids = zip(*own, strict=True)
            words.append(Word(tokenizer.decode(ids), positions))
            own = []
    return tuple(words)


def words_of_pieces(tokenizer: "T5Tokenizer", prompt: str) -> tuple[Word, ...]:
    """The same for T5's pieces, of which there is no begin token; in small letters, though T5 tells them apart.

    A piece that begins with a space begins a word, and so does a sign.
    """
    ids = tokenizer.encode(prompt)
    found: list[list[int]] = []
    for position, piece in enumerate(tokenizer.pieces(prompt)):
        if not found or piece.startswith(SPACE) or not any(map(str.isalnum, piece)):
            found.append([])
        found[-1].append(position)
    words = [Word(tokenizer.decode(ids[k] for k in own).lower(), tuple(own)) for own in found]
    return tuple(word for word in words if word.text)


def steps_of(settings: Settings, schedule: Schedule) -> tuple[int, range]:
    """How many steps the road of a run has as a whole, and those of them that the run takes, counted from 1."""
    _, behind, steps = settings.road(schedule)
    return steps, range(behind + 1, behind + 1 + max(len(settings.rows(schedule)), 1))


def texts_at(prompt: str, dialect: str, steps: int, own: Sequence[int]) -> list[str]:
    """What a prompt is at its `own` ones of so many steps, each text once: one, but in a1111's dialect."""
    if dialect != "a1111":
        return [prompt]
    nodes = parse(prompt)
    return list(dict.fromkeys(text_at(nodes, step, steps) for step in own))


def words_told(tokenizer: Tokenizer, texts: Sequence[str], dialect: str) -> tuple[tuple[Word, ...], str]:
    """The words of a prompt that is these `texts` in turn, or none and a sentence, where a position has several."""
    if len(texts) > 1:
        return (), "There are no attention maps of words, for the prompt has other words at other steps."
    parts = parts_of(tokenizer, texts[0], dialect)
    if any(".blend" in part.title for part in parts):
        return (), "There are no attention maps of words, for of a .blend() several words stand at each position."
    return words_in(tokenizer, parts), ""


def words_read(pipe: "Pipeline", settings: Settings, texts: Sequence[str]) -> tuple[tuple[Word, ...], str]:
    """The same as the pipeline's network reads them: FLUX reads T5's, and as many tokens as it was asked to."""
    if not pipe.flux:
        return words_told(pipe.tokenizer, texts, settings.dialect)
    if pipe.text_encoder_2 is None:
        words = words_of(pipe.tokenizer, texts[0])
    else:
        words = words_of_pieces(pipe.tokenizer_2, texts[0])
    last = settings.max_sequence_length - 1  # the end's own, where the prompt is longer
    return tuple(word for word in words if word.tokens[-1] < last), ""


@dataclass(repr=False)
class Trace:
    """A finished run. `trace[k]` is its k-th step, `len(trace)` their number; shapes as in `ldm.sampling.Step`."""

    settings: Settings
    schedule: Schedule
    steps: list[Step]
    record: Record
    result: Result
    words: tuple[tuple[Word, ...], ...]  # of each picture's prompt
    decode: Callable[[Tensor], list[Image.Image]]  # clean latents (B, C, h, w) -> pictures
    seconds: tuple[float, ...]  # of each step, the watching included
    notes: tuple[str, ...] = ()  # why a picture's prompt has no `words`, where it could have some
    added: tuple[str, ...] = ()  # LoRAs with their weights, and learnt words, that were on
    distilled: bool = False  # whether the network was told the scale of guidance
    _linear: Tensor | None = field(default=None, init=False)

    def __repr__(self) -> str:
        prompts = ", ".join(map(repr, self.settings.prompt))
        dialect, on = self.settings.dialect, f" with {', '.join(self.added)}" if self.added else ""
        read = "" if dialect == "plain" else f", read as {dialect}"
        return f"<Trace: {len(self)} steps of {self.settings.sampler}{on}, pictures of {prompts}{read}>"

    def __len__(self) -> int:
        return len(self.steps)

    def __getitem__(self, k: int) -> Step:
        return self.steps[k]

    def preview(self, x0: Tensor) -> list[Image.Image]:
        """Latents (B, C, h, w) as small pictures, a pixel for each position, at hardly any cost.

        Colours are a linear function of the latent, fitted to what this very run's x0 were decoded to after one and two
        thirds of the steps, and at the end: good enough to recognise what is there, and no more.
        """
        if self._linear is None:
            self._linear = fit_linear(self._pairs())
        rgb = affine(x0) @ self._linear  # (B, h, w, 3)
        pixels = (rgb.clamp(0, 1) * 255).round().byte().numpy()
        return [Image.fromarray(each) for each in pixels]

    def _pairs(self) -> list[tuple[Tensor, Tensor]]:
        """(x0, the picture it was decoded to) at a few steps and at the end; the pictures (B, 3, H, W) in [0, 1].

        None from the beginning: there guidance drives latents beyond what has a colour, and the decoder cuts it off.
        """
        rows = sorted({len(self) // 3, 2 * len(self) // 3}) if self.steps else []
        return [(x0, pixels_of(self.decode(x0))) for x0 in (*(self.steps[k].x0 for k in rows), self.result.x0)]

    def maps(self, word: Word | str | int | Sequence[int], picture: int = 0) -> Tensor:
        """Where a word was looked at in each step, (steps, h, w): `Record.map` of all its tokens.

        `word` is one of `words`, its text, or positions of tokens.
        Raises LDMError where no maps of single steps were kept.
        """
        self.check_picture(picture)
        tokens = self._tokens(word, picture)
        if not self.steps:
            raise LDMError("This run takes no step, so it has no attention maps: its strength is 0, take more.")
        if not self.record.maps.every_call:
            raise LDMError(
                "The maps were averaged over steps for want of memory: give pipe.trace more (memory=) or fewer layers "
                f"(layers=), or take the mean over all steps, trace.record.map({tokens!r}, picture={picture})."
            )
        return torch.stack([self.record.map(tokens, step=step.i, picture=picture) for step in self.steps])

    def _tokens(self, word: Word | str | int | Sequence[int], picture: int) -> int | Sequence[int]:
        if isinstance(word, Word):
            return word.tokens
        if not isinstance(word, str):
            return word
        if self.note(picture):
            raise LDMError(self.note(picture))
        found = [each for each in self.words[picture] if each.text == word.lower()]
        if len(found) != 1:
            known = [each.text for each in self.words[picture]]
            how = "stands several times in" if found else "is no word of"
            raise LDMError(
                f"{word!r} {how} the prompt {' '.join(known)!r}: pass one of trace.words[{picture}]."
                f"{'' if found else nearest(word, known)}"
            )
        return found[0].tokens

    def note(self, picture: int) -> str:
        """Why a picture's prompt has no words to tell maps by, or ""."""
        return self.notes[picture] if self.notes else ""

    def check_picture(self, picture: int) -> None:
        """Raise LDMError if the run drew no picture of that number."""
        count = len(self.settings.seeds)
        if not is_whole(picture) or not 0 <= picture < count:
            there = "one picture, number 0" if count == 1 else f"the pictures 0 to {count - 1}"
            raise LDMError(f"The run drew {there}: it has no picture {picture!r}.")

    def show(self, other: "Trace | None" = None, picture: int = 0, other_picture: int | None = None) -> object:
        """The stepper in a notebook, beside that of another trace if one is given (`ldm.lab.page.show`).

        `show(picture=0, other_picture=1)` puts two pictures of one batch side by side.
        """
        from ldm.lab import page

        return page.show(self, other, picture, other_picture)

    def to_html(
        self, path: str | Path, other: "Trace | None" = None, picture: int = 0, other_picture: int | None = None
    ) -> None:
        """The same as one page that needs no network."""
        from ldm.lab import page

        return page.write(self, path, other, picture, other_picture)


def pixels_of(images: Sequence[Image.Image]) -> Tensor:
    """(B, 3, H, W) in [0, 1]."""
    return torch.stack([torch.from_numpy(np.array(each)).movedim(-1, 0).float() / 255 for each in images])


def affine(x0: Tensor) -> Tensor:
    """(B, C, h, w) -> (B, h, w, C + 1): the channels last, with a 1 behind them."""
    channels = x0.detach().float().cpu().movedim(1, -1)
    return torch.cat([channels, torch.ones_like(channels[..., :1])], dim=-1)


def fit_linear(pairs: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """The matrix (C + 1, 3) from a latent and 1 to red, green and blue in [0, 1], by least squares over `pairs`.

    The mean colour of the pixels that a position stands for is what it is fitted to.
    """
    latents = torch.cat([affine(x0).flatten(0, 2) for x0, _ in pairs])  # (positions, C + 1)
    colours = [F.adaptive_avg_pool2d(picture, x0.shape[2:]).movedim(1, -1).flatten(0, 2) for x0, picture in pairs]
    return torch.linalg.lstsq(latents, torch.cat(colours), driver="gelsd").solution  # few positions may not suffice


def trace(
    pipe: "Pipeline",
    prompt: str | Sequence[str],
    *,
    memory: float = 512,
    layers: str | Sequence[str] | None = None,
    **options,
) -> Trace:
    """Run under `watch`, keep every step, decode the result.

    `memory` and `layers` bound the attention maps, as in `watch`; the other options are those of `Pipeline.prepare`.
    """
    steps, seconds = [], []
    with watch(pipe, memory=memory, layers=layers) as record:
        run = pipe.prepare(prompt, **options)
        begun = time.perf_counter()
        for step in run.steps():
            steps.append(step)
            seconds.append(time.perf_counter() - begun)
            begun = time.perf_counter()
        result = run.finish(steps[-1].x if steps else run.x)
    settings = run.settings
    steps_are = steps_of(settings, run.schedule)
    texts = [texts_at(text, settings.dialect, *steps_are) for text in settings.prompt]
    words, notes = zip(*(words_read(pipe, settings, each) for each in texts), strict=True)
    added = [f"LoRA {each.name} at {each.weight:g}" for each in pipe.loras] + [
        f"word {each}" for each in pipe.embeddings
    ]
    kept = (run.decode, tuple(seconds), notes, tuple(added), pipe.distilled)
    return Trace(settings, run.schedule, steps, record, result, words, *kept)
