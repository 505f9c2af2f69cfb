"""Train a word: find the vectors that make a finished model draw what it has no word for. Nothing else is changed.

    v* = argmin over v of  w(t) |unet(x, t, text(caption, v)) - eps|^2      (Gal et al. 2022, equation 2)

The vectors (N, D) are rows that the text encoder's table of tokens lacks; they begin as a near word's (section 4.2).
What the model cannot draw at all no vector teaches it: a word can but point to what is already there.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ldm import scenes
from ldm.errors import LDMError, nearest
from ldm.io.folders import folder_hash
from ldm.io.weights import save_weights
from ldm.text.clip import TextEncoder
from ldm.text.embeddings import FILE
from ldm.text.tokenizer import Tokenizer
from ldm.text.tokenizer_files import END
from ldm.train.common import EMA, Optimizer, Run, step_generator, trapezoid
from ldm.train.examples import Examples, encode, of_scenes, open_base, scenes_with
from ldm.train.parallel import leads, share
from ldm.train.unet import draw, draw_batch, held_out_loss, loss

TABLE = "embeddings.token_embedding.weight"


@dataclass(frozen=True)
class Recipe:
    thing: str = scenes.NEW_KIND  # of `ldm.scenes`
    word: str = "<mushroom>"
    begin: str = "tree flower"  # the vectors begin as those of these words, in turn
    vectors: int = 24  # a shape, a stem and spots are more than one vector of a small text encoder says
    base: str = "scenes"  # the model it is for: an embedded one's name, or a folder
    pictures: int = 400
    held_out: int = 64  # pictures of held-out combinations, to measure on
    steps: int = 600
    batch: int = 16
    lr: float = 1e-2
    caption_dropout: float = 0.0  # the word has no part in the empty caption
    snr_range: tuple[float, float] = (1.0, 5.0)  # as the UNet's own training has it
    ema: float = 0.98
    seed: int = 0
    sheet_every: int = 200
    device: str = "cpu"


class Speaking(nn.Module):
    """A text encoder that knows one word more: its vectors (N, D) are the tokens behind the last of the table."""

    def __init__(self, text: TextEncoder, vectors: Tensor):
        super().__init__()
        self.text = text
        self.word = nn.Embedding.from_pretrained(vectors.clone(), freeze=False)

    def context(self, ids: Tensor) -> Tensor:
        """(B, 77) -> (B, 77, D), as `TextEncoder.context`; gradients reach the word's vectors."""
        table = self.text.embeddings.token_embedding.weight
        whole = {TABLE: torch.cat([table, self.word.weight.to(table.dtype)])}
        return functional_call(self.text, whole, (ids,)).last


def knowing(tokenizer: Tokenizer, word: str, ids: range) -> Tokenizer:
    """The tokenizer with the word. Raises LDMError for one that it knows already, or would not find."""
    if {word.lower(), word.lower() + END} & tokenizer.ids.keys():
        raise LDMError(f"{word!r} is a word of the model already: choose another --word, such as <{word}>.")
    known = tokenizer.with_words({word: ids})
    if known.encode(f"a {word} on snow").count(ids[0]) != 1:
        raise LDMError(f"The tokenizer does not find {word!r} in a prompt: choose a --word of plain letters in < >.")
    return known


def spelt(tokenizer: Tokenizer, captions: list[str], word: str) -> Tensor:
    """Ids (B, 77). Raises LDMError for a caption in which the word does not stand, or does no longer once it is cut."""
    ids = tokenizer(captions).ids
    whole = torch.tensor(tokenizer.encode(word))
    found = (ids.unfold(1, len(whole), 1) == whole).all(dim=2).any(dim=1)  # (B,)
    if not found.all():
        lost = captions[int(found.int().argmin())]
        raise LDMError(
            f"{word} does not stand in the first {tokenizer.max_length} tokens of {lost!r}: say it earlier, or give it "
            "fewer vectors (--vectors)."
        )
    return ids


def beginning(text: TextEncoder, tokenizer: Tokenizer, words: str, count: int) -> Tensor:
    """The vectors (count, D) of the words' tokens, in turn."""
    ids = tokenizer.encode(words)
    rows = [ids[k % len(ids)] for k in range(count)]
    return text.embeddings.token_embedding.weight[rows].detach().clone()


def naming(thing: str, word: str) -> Callable[[scenes.Scene, int], str]:
    """How captions are said when the thing is called by the word."""
    return lambda scene, seed: scenes.caption(scene, seed).replace(thing, word)


def examples_of(thing: str, word: str, count: int, held_out: bool = False) -> Examples:
    """Pictures of such a thing, alone in its scene, and captions that call it by the word."""
    return of_scenes(scenes_with(count, held_out, kind=thing, n=1), naming(thing, word))


def place(folder: Path, recipe: Recipe) -> Path:
    """Where in the run's folder such a word is trained."""
    return folder / f"word-{recipe.thing}"


def train(folder: Path, recipe: Recipe = Recipe(), of: Callable[[str, str, int, bool], Examples] = examples_of) -> None:
    """Train in `folder`/word-THING, or go on where it stopped; at the end write the averaged vectors there.

    `of(thing, word, count, held_out)` gives the pictures, with captions in which the word stands.
    """
    check(recipe)
    device = recipe.device
    pipe = open_base(recipe.base, device)
    (folder / "data").mkdir(parents=True, exist_ok=True)
    data, held = (
        of(recipe.thing, recipe.word, n, late) for n, late in ((recipe.pictures, False), (recipe.held_out, True))
    )
    latents = folder / "data", folder_hash(pipe.folder / "vae")
    mean, deviation = encode(pipe.vae, data, *latents, f"{recipe.thing}-train", device)
    held_mean, _ = encode(pipe.vae, held, *latents, f"{recipe.thing}-held-out", device)
    size = pipe.text_encoder.config.vocab_size
    tokenizer = knowing(pipe.tokenizer, recipe.word, range(size, size + recipe.vectors))
    ids = torch.stack([spelt(tokenizer, words, recipe.word) for words in data.captions])  # (N, 4, 77)
    held_ids = spelt(tokenizer, [words[0] for words in held.captions], recipe.word)
    empty = tokenizer("").ids

    torch.manual_seed(recipe.seed)
    text = Speaking(pipe.text_encoder, beginning(pipe.text_encoder, tokenizer, recipe.begin, recipe.vectors))
    bars = torch.tensor(pipe.schedule(1).bars, dtype=torch.float32, device=device)
    optimizer, ema = Optimizer([text.word], recipe.lr), EMA(text.word, recipe.ema)
    run = Run(place(folder, recipe), {"word": text.word, "optimizer": optimizer, "ema": ema}, recipe)

    mine = share(recipe.batch)
    for step in run.steps():
        if step == 0:  # what the word that it begins from makes of these pictures
            parts = nn.ModuleDict({"unet": pipe.unet, "text": text})
            run.log(0, held_out_loss=held_out_loss(parts, held_mean, held_ids, bars, recipe, pipe.scheduler))
        generator = step_generator(recipe.seed, step)
        batch = draw_batch(recipe.batch, recipe.caption_dropout, mean, deviation, ids, empty, generator)
        words, x0, eps, t = (v[mine].to(device) for v in batch[1:])
        value = loss(pipe.unet, x0, text.context(words), t, eps, bars, recipe.snr_range, pipe.scheduler.prediction_type)
        norm = optimizer.step(value, trapezoid(step, recipe.steps))
        ema.update(text.word, step)
        if step % 10 == 9:
            run.log(step + 1, loss=value.item(), norm=norm)
        if (step + 1) % recipe.sheet_every == 0 or step + 1 == recipe.steps:
            averaged = Speaking(pipe.text_encoder, ema.of(text.word).weight)
            parts = nn.ModuleDict({"unet": pipe.unet, "text": averaged})
            measured = held_out_loss(parts, held_mean, held_ids, bars, recipe, pipe.scheduler)
            run.log(step + 1, held_out_loss=measured)
            run.sheet(step + 1, draw(parts, pipe.vae, held_ids[:16], empty, pipe.scheduler), columns=8)

    if leads():
        save_weights({recipe.word: ema.of(text.word).weight.cpu()}, place(folder, recipe) / FILE)


def check(recipe: Recipe) -> None:
    """Raise LDMError for a thing that there is not, and for a word that no caption would hold."""
    known = (*scenes.KINDS, scenes.NEW_KIND)
    if recipe.thing not in known:
        raise LDMError(f"There is no {recipe.thing!r}: {', '.join(known)}.{nearest(recipe.thing, known)}")
    if recipe.word.split() != [recipe.word]:
        raise LDMError(f"The word {recipe.word!r} is none: choose one without spaces, such as <{recipe.thing}>.")
