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
from ldm.text.tokenizer import END, Tokenizer

if TYPE_CHECKING:
    from ldm.pipeline import Pipeline


class Word(NamedTuple):
    """A word of a prompt, cleaned, and the positions of its pieces among the tokens; the begin token is position 0."""

    text: str
    tokens: tuple[int, ...]


def words_of(tokenizer: Tokenizer, prompt: str) -> tuple[Word, ...]:
    """The words of a prompt, punctuation too. A word that was cut off behind the last token, or within, is left out."""
    words, pieces = [], []
    for position, piece in enumerate(tokenizer.pieces(prompt)[: tokenizer.max_length - 2], start=1):
        pieces.append(piece)
        if piece.endswith(END) or piece in tokenizer.added:
            ids = [tokenizer.ids.get(each, tokenizer.unk_id) for each in pieces]
            words.append(Word(tokenizer.decode(ids), tuple(range(position - len(pieces) + 1, position + 1))))
            pieces = []
    return tuple(words)


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
    _linear: Tensor | None = field(default=None, init=False)

    def __repr__(self) -> str:
        prompts = ", ".join(map(repr, self.settings.prompt))
        return f"<Trace: {len(self)} steps of {self.settings.sampler}, pictures of {prompts}>"

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
        found = [each for each in self.words[picture] if each.text == word.lower()]
        if len(found) != 1:
            known = [each.text for each in self.words[picture]]
            how = "stands several times in" if found else "is no word of"
            raise LDMError(
                f"{word!r} {how} the prompt {' '.join(known)!r}: pass one of trace.words[{picture}]."
                f"{'' if found else nearest(word, known)}"
            )
        return found[0].tokens

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
    words = tuple(words_of(pipe.tokenizer, text) for text in run.settings.prompt)
    return Trace(run.settings, run.schedule, steps, record, result, words, run.decode, tuple(seconds))
