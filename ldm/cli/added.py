"""What a command line adds to a model: another VAE, words, LoRAs; parsed, found, put on, and told again by a record."""

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from ldm.cli.options import Parser
from ldm.errors import LDMError

if TYPE_CHECKING:
    from ldm.lora.file import Lora
    from ldm.pipeline import Pipeline
    from ldm.text.embeddings import Embedding

TITLE = "what is added to the model (not to a --refiner)"
TITLES = {"vae": "VAE", "embedding": "embedding", "lora": "LoRA"}  # by option, in the order in which they are added


def add(p: "argparse._ActionsContainer", where: str = "") -> None:
    """The options. `where`: in words, if they say where something lies now."""
    p.add_argument(
        "--lora", type=lora, action="append", default=[], metavar="FILE[:WEIGHT]",
        help=where or "a LoRA on top of the model's weights, or the name of an embedded one (scenes-neon:0.8); weights "
        "may be negative (default: 1); several are summed",
    )  # fmt: skip
    p.add_argument(
        "--embedding", type=embedding, action="append", default=[], metavar="FILE[:WORD]",
        help=where or "a word for prompts (textual inversion), or the name of an embedded one; WORD: to be called so, "
        "and not as its file says",
    )  # fmt: skip
    p.add_argument(
        "--vae", type=vae, metavar="MODEL", help=where or "a VAE in place of the model's: a folder, a file, or a name "
        "of the hub",
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------------- in words


@dataclass(frozen=True)
class Wish:
    """One thing to be added: `kind` is its option, `value` a LoRA's weight, or what an embedding is to be called."""

    kind: str
    name: str
    value: float | str | None = None

    @property
    def word(self) -> str:
        """As a command line says it. "=": a name may begin with "-"."""
        return f"--{self.kind}={self.name}" + ("" if self.value is None else f":{self.value}")


def lora(text: str) -> Wish:
    """FILE[:WEIGHT]. A file's name may hold colons, too: a file that is there is meant whole."""
    name, colon, tail = text.rpartition(":")
    if not colon or Path(text).exists():
        return Wish("lora", some_name(text, text), 1.0)
    try:
        weight = float(tail)
    except ValueError:
        if (
            tail and not Path(name).exists()
        ):  # it is the name itself that isn't right: that is told when it is looked for
            return Wish("lora", text, 1.0)
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
    parser = Parser(prog=where, add_help=False)
    add(parser)
    parser.error = lambda message: (_ for _ in ()).throw(LDMError(f"{where} tells of what was added: {message}."))
    args, unknown = parser.parse_known_args(told)
    if unknown:
        raise LDMError(f"{where} tells of what was added in words that ldm doesn't know: {unknown[0]!r}.")
    return wishes(args)


# ---------------------------------------------------------------------------------------------------- found


@dataclass(frozen=True)
class Found:
    """One thing to be added, found and opened: a VAE alone is opened when it is put on, beside the model's."""

    wish: Wish
    place: Path
    opened: "Lora | Embedding | None" = None

    @cached_property
    def hash(self) -> str:
        from ldm.io.folders import folder_hash

        return folder_hash(self.place)

    def record(self) -> str:
        """What decides the picture, in the manner of `Wish.word`: not where it lies, but what it is."""
        value = self.wish.value
        if self.wish.kind == "embedding" and value is None:
            value = self.opened.word
        return f"{self.wish.kind} {self.hash}" + ("" if value is None else f":{value}")

    def put_on(self, pipe: "Pipeline", allow_pickle: bool) -> None:
        from ldm.loading import load_vae

        if self.wish.kind == "vae":
            pipe.vae = load_vae(self.place, pipe, allow_pickle=allow_pickle)
        elif self.wish.kind == "embedding":
            pipe.add_embedding(self.opened, self.wish.value)
        else:
            pipe.add_lora(self.opened, self.wish.value)


@dataclass(frozen=True)
class Additions:
    """All that is added to a model, in that order."""

    found: tuple[Found, ...] = ()
    allow_pickle: bool = False

    def put_on(self, pipe: "Pipeline") -> None:
        for each in self.found:
            each.put_on(pipe, self.allow_pickle)

    def record(self) -> list[str]:
        return [each.record() for each in self.found]

    def words(self) -> list[str]:
        return [each.wish.word for each in self.found]


def find(wanted: Sequence[Wish], allow_pickle: bool = False) -> Additions:
    """Find and open what is to be added: before the model is loaded, which may take long. Raises LDMError."""
    return Additions(tuple(open_wish(wish, allow_pickle) for wish in wanted), allow_pickle)


def open_wish(wish: Wish, allow_pickle: bool) -> Found:
    place = place_of(wish, allow_pickle)
    if wish.kind == "vae":
        return Found(wish, place)
    from ldm.lora.file import open_lora
    from ldm.text.embeddings import open_embedding

    return Found(wish, place, (open_lora if wish.kind == "lora" else open_embedding)(place, allow_pickle))


def place_of(wish: Wish, allow_pickle: bool) -> Path:
    """Where it lies: a VAE's folder or file may come from the hub, and may be that of a whole model."""
    from ldm.checkpoints.places import CONFIG, INDEX, LORA, embedded, find_file, find_model

    if wish.kind == "vae":
        whole = wish.name in embedded(INDEX)
        place = find_model(wish.name, INDEX if whole else CONFIG, None, allow_pickle)
        return place / "vae" if (place / INDEX).exists() else place
    from ldm.text.embeddings import FILE as EMBEDDING

    return find_file(wish.name, LORA if wish.kind == "lora" else EMBEDDING)


# ---------------------------------------------------------------------------------------------------- found again


def find_again(old: dict, args: argparse.Namespace, where: str) -> Additions:
    """What the picture `where` was drawn with, by its record `old`; `args` may say where something lies now.

    Raises LDMError for what isn't there any more, or is another one; nothing is fetched.
    """
    from ldm.checkpoints.places import check_here

    told, moved = read_words(old["additions"], where), {}
    known = [each.partition(" ")[2].partition(":") for each in old["added"]]
    hashes = [digits for digits, _, _ in known]
    if len(known) != len(told):
        raise torn(where)
    for wish in wishes(args):
        now = Found(wish, place_of(wish, args.allow_pickle))
        if now.hash not in [h for h, each in zip(hashes, told, strict=True) if each.kind == wish.kind]:
            raise LDMError(f"{wish.name} is no {TITLES[wish.kind]} that {where} was drawn with: leave it out.")
        moved[wish.kind, now.hash] = wish.name
    found = []
    for wish, (digits, _, value) in zip(told, known, strict=True):
        name, title = moved.get((wish.kind, digits), wish.name), TITLES[wish.kind]
        hint = f"(The picture names the {title} {wish.name!r}; --{wish.kind} says where it is now.)"
        try:
            if wish.kind == "vae":
                check_here(name, None, args.allow_pickle)
            # A word may have been called as its file was, which is called otherwise now: the record knows it.
            value = value if wish.kind == "embedding" and name != wish.name else wish.value
            each = open_wish(Wish(wish.kind, name, value), args.allow_pickle)
        except LDMError as error:
            raise LDMError(f"{error} {hint}") from error
        if each.hash != digits:
            raise LDMError(f"{where}: the {title} {name!r} is another one now, so it can't be drawn again. {hint}")
        found.append(each)
    additions = Additions(tuple(found), args.allow_pickle)
    if additions.record() != old["added"]:
        raise torn(where)
    return additions


def torn(path: str) -> LDMError:
    return LDMError(f"{path}: the picture and its settings don't belong together; it was changed since.")
