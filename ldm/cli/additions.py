"""What a command line adds to a model, found: opened, put on, written into a record, and found again by one."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from ldm.cli.added import TITLES, Wish, read_words, wishes
from ldm.errors import LDMError, say_on_stderr

if TYPE_CHECKING:
    from ldm.lora.file import Lora
    from ldm.pipeline import Pipeline
    from ldm.text.embeddings import Embedding


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

    def put_on_refiner(self, refiner: "Pipeline") -> None:
        """Teach a refiner the words that have vectors for it, and say on stderr what it goes without.

        A VAE is the base's alone: it is that which decodes.
        """
        without = []
        for each in self.found:
            if each.wish.kind == "embedding" and "text_encoder_2" in each.opened.vectors:
                refiner.add_embedding(each.opened, each.wish.value)
            elif each.wish.kind != "vae":
                without.append(each.wish.name)
        if without:
            say_on_stderr(f"The refiner draws without {' and '.join(without)}, which is for the base alone.")

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
    """Where it lies: a VAE may come from the hub."""
    from ldm.checkpoints.places import EMBEDDING, LORA, find_file

    if wish.kind == "vae":
        from ldm.loading import find_vae

        return find_vae(wish.name, None, allow_pickle)
    return find_file(wish.name, LORA if wish.kind == "lora" else EMBEDDING)


# ---------------------------------------------------------------------------------------------------- by a record


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
        check_value(wish, [value for digits, _, value in known if digits == now.hash], where)
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


def check_value(wish: Wish, recorded: list[str], where: str) -> None:
    """Raise LDMError for a weight or a word that isn't what the record says of the file."""
    if wish.said and wish.value is not None and str(wish.value) not in recorded:
        what = "weight" if wish.kind == "lora" else "word"
        raise LDMError(
            f"{where} was drawn with {wish.name} by the {what} {' and '.join(recorded)}, and not {wish.value}: leave "
            f"the {what} out, for --{wish.kind} only says where the file is now."
        )


def torn(path: str) -> LDMError:
    return LDMError(f"{path}: the picture and its settings don't belong together; it was changed since.")
