"""What a command line adds to a model, in words: another VAE, words, LoRAs; `additions` finds it and puts it on."""

import argparse
import math
from dataclasses import dataclass, field
from pathlib import Path

from ldm.cli.options import read_again

TITLE = "what is added to the model"
TITLES = {"vae": "VAE", "embedding": "embedding", "lora": "LoRA"}  # by option, in the order in which they are added


def add(p: "argparse._ActionsContainer", where: str = "") -> None:
    """The options. `where`: in words, if they say where something lies now."""
    p.add_argument(
        "--lora", type=lora, action="append", default=[], metavar="FILE[:WEIGHT]",
        help=where or "a LoRA: a file, its folder, or the name of an embedded one (scenes-neon:0.8); its weight may be "
        "negative (default: 1); may be given several times",
    )  # fmt: skip
    p.add_argument(
        "--embedding", type=embedding, action="append", default=[], metavar="FILE[:WORD]",
        help=where or "a learnt word (textual inversion), to be used in prompts: a file, its folder, or the name of an "
        "embedded one (scenes-mushroom); WORD: what prompts call it, instead of what its file does",
    )  # fmt: skip
    p.add_argument(
        "--vae", type=vae, metavar="MODEL", help=where or "a VAE in place of the model's: a folder, a file, or a name "
        "of the hub; of a whole model its VAE is taken",
    )  # fmt: skip


@dataclass(frozen=True)
class Wish:
    """One thing to be added: `kind` is its option, `value` a LoRA's weight, or what an embedding is to be called.

    `said`: whether the command line says the weight, which is 1 where it doesn't.
    """

    kind: str
    name: str
    value: float | str | None = None
    said: bool = field(default=True, compare=False)

    @property
    def word(self) -> str:
        """As a command line says it. "=": a name may begin with "-"."""
        return f"--{self.kind}={self.name}" + ("" if self.value is None else f":{self.value}")


def lora(text: str) -> Wish:
    """FILE[:WEIGHT]. A file's name may hold colons, too: a file that is there is meant whole."""
    name, colon, tail = text.rpartition(":")
    if not colon or Path(text).exists():
        return Wish("lora", some_name(text, text), 1.0, said=False)
    try:
        weight = float(tail)
    except ValueError:
        if tail and not Path(name).exists():  # the name itself isn't right, which is told when it is looked for
            return Wish("lora", text, 1.0, said=False)
        weight = math.nan
    if not math.isfinite(weight):
        raise argparse.ArgumentTypeError(
            f"must read FILE[:WEIGHT] with a finite number, like style.safetensors:0.8, not {text!r}"
        )
    return Wish("lora", some_name(name, text), weight)


def embedding(text: str) -> Wish:
    """FILE[:WORD]. As with a LoRA, a file that is there is meant whole."""
    name, colon, word = text.rpartition(":")
    if not colon or Path(text).exists() or (len(name) == 1 and name.isalpha()):  # of C:\style.pt the colon is Windows'
        return Wish("embedding", some_name(text, text))
    if not word:
        raise argparse.ArgumentTypeError(f"must read FILE[:WORD], like toy.safetensors:<toy>, not {text!r}")
    return Wish("embedding", some_name(name, text), word)


def vae(text: str) -> Wish:
    return Wish("vae", some_name(text, text))


def some_name(name: str, text: str) -> str:
    if not name:
        raise argparse.ArgumentTypeError(f"must name a file, not {text!r}")
    return name


def wishes(args: argparse.Namespace) -> list[Wish]:
    """What the command line says of them, in the order in which they are added."""
    return [*([args.vae] if args.vae else []), *args.embedding, *args.lora]


def read_words(told: list[str], where: str) -> list[Wish]:
    """The wishes of words that `Wish.word` wrote. Raises LDMError for anything else."""
    return wishes(read_again(add, told, f"{where} tells of what was added"))
