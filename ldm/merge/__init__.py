"""`merge`: two checkpoints, or a checkpoint and LoRAs, become one.

    merge(Recipe("photo", "anime", alpha=0.4), "both.safetensors")                 # 0.6 photo + 0.4 anime
    merge(Recipe("photo", "anime", alpha=0.4, base="sd15"), "both")                # photo + 0.4 (anime - sd15)
    merge(Recipe("photo", "anime", blocks={"text_encoder": 0, "OUT08": 0.9}), "both")
    merge(Recipe("photo", loras=[("neon.safetensors", 0.8)]), "neon")              # what add_lora makes of the weights

Wortsman et al. 2022 ("Model soups", arXiv:2203.05482) and Ilharco et al. 2022 ("task arithmetic", arXiv:2212.04089)
say why the mean of two models that were trained from one is a model at all. Where they weren't, it is noise, and
`ldm.merge.alike` refuses what can be told apart.

Each tensor is read, computed and written by itself, so that memory holds the largest of them a few times.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import isfinite
from pathlib import Path
from typing import NamedTuple

import torch

from ldm.checkpoints.checkpoint import blank_part
from ldm.checkpoints.places import LORA, find_file
from ldm.convert import open_source
from ldm.convert.described import title_of
from ldm.convert.writing import Begin, Source, Written, check_apart, check_target, write
from ldm.errors import LDMError, say_on_stderr
from ldm.loading import find_dtype
from ldm.lora.algebra import Change
from ldm.lora.applied import Applied, strength, told
from ldm.lora.file import Lora, open_lora
from ldm.merge.alike import check_alike
from ldm.merge.blocks import alphas
from ldm.merge.mixed import Mixed

MOST_ALPHA = 2.0  # beyond 0 to 1 a mean goes on in the same direction, and soon leaves what draws pictures


@dataclass(frozen=True)
class Recipe:
    """What is to become one: A, B and BASE are whatever `ldm.load` reads as a whole model.

    weighted sum       (1 - alpha) A + alpha B
    add-difference     A + alpha (B - base), where there is a `base`

    `blocks`: {part of the model: another alpha for it} (`ldm.merge.blocks`). `loras`: (file, weight), which are added
    to what came of it.
    """

    a: str | Path
    b: str | Path | None = None
    alpha: float = 0.5
    base: str | Path | None = None
    blocks: Mapping[str, float] = field(default_factory=dict)
    loras: Sequence[tuple[str | Path, float]] = ()

    def __str__(self) -> str:
        """In a line, by the models' names."""
        a, b, base = (None if each is None else title_of(each) for each in (self.a, self.b, self.base))
        if b is None:
            said = a
        elif base is None:
            said = f"{1 - self.alpha:g} {a} + {self.alpha:g} {b}"
        else:
            said = f"{a} + {self.alpha:g} ({b} - {base})"
        others = ", ".join(f"{name} {alpha:g}" for name, alpha in self.blocks.items())
        return said + (f" ({others})" if others else "") + "".join(f" + {w:g} {title_of(f)}" for f, w in self.loras)

    def check(self) -> None:
        """Raise LDMError for what is no recipe."""
        for each in (self.a, self.b, self.base):
            if not (isinstance(each, str | Path) or (each is None and self.a is not None)):
                raise LDMError(f"A model is a name, a folder, a file or an address, not {each!r}.")
        if not isinstance(self.blocks, Mapping) or not all(isinstance(name, str) for name in self.blocks):
            raise LDMError(f"Blocks are a table of names and alphas, like {{'OUT08': 0.9}}, not {self.blocks!r}.")
        pairs = not isinstance(self.loras, str | Path) and isinstance(self.loras, Iterable)
        if not pairs or not all(isinstance(each, tuple | list) and len(each) == 2 for each in self.loras):
            raise LDMError(f"LoRAs are pairs of a file and its weight, like [('neon.safetensors', 0.8)], not "
                           f"{self.loras!r}.")  # fmt: skip
        if self.b is None and not self.loras:
            raise LDMError("There is nothing to merge: name a second model (B), or a LoRA (--lora FILE:0.8).")
        if self.b is None and (self.base is not None or self.blocks):
            what = "base (--add-difference)" if self.base is not None else "alpha for a block (--block)"
            raise LDMError(f"A {what} says how a second model is merged, and there is none: name one, or leave it out.")
        for name, number in {"alpha": self.alpha, **self.blocks}.items():
            if isinstance(number, bool) or not isinstance(number, int | float) or not abs(number) <= MOST_ALPHA:
                raise LDMError(f"The alpha of {name!r} is {number!r}: it is a number from 0 (A) to 1 (B), or beyond "
                               f"these up to {MOST_ALPHA:g}.")  # fmt: skip
        for file, weight in self.loras:
            if isinstance(weight, bool) or not isinstance(weight, int | float) or not isfinite(weight):
                raise LDMError(f"The weight of {file} is {weight!r}: it must be a finite number.")


class Merged(NamedTuple):
    """What was written, and how far from A it is: {part: |C - A| / |A| over all of its weights}.

    `loras`: of each LoRA how much it changes, |dW| / |W| of what it was added to.
    """

    written: Written
    changes: dict[str, float]
    loras: tuple[Applied, ...] = ()


def merge(
    recipe: Recipe,
    target: str | Path,
    dtype: torch.dtype | str | None = None,
    variant: str | None = None,
    allow_pickle: bool = False,
    overwrite: bool = False,
    begin: Begin = lambda bytes: lambda done: None,
) -> Merged:
    """Write what the recipe makes, as `ldm.convert` writes: a file if `target` ends in .safetensors, else a folder.

    Configurations, tokenizers, schedule and defaults are A's, and so are the types of the numbers, unless a `dtype` is
    asked for. `variant`, `allow_pickle`: of all that is read, as for `ldm.load`. `begin` is told the bytes of all
    numbers before the first is written, and returns what is told those of each tensor. Says on stderr what each LoRA
    changes, as `add_lora` does, and where the result is A. Raises LDMError for what isn't sound, or no two of a kind,
    and for a target that can't be written: then nothing is.
    """
    recipe.check()
    check_target(target, overwrite)
    kind = None if dtype is None else find_dtype(dtype)
    a, b, base = (
        None if each is None else open_whole(each, variant, allow_pickle) for each in (recipe.a, recipe.b, recipe.base)
    )
    for each in (a, b, base):
        if each is not None:
            check_apart(each.place, target)
    if b is not None:
        check_alike(a, b, channels=base is None)
    if base is not None:
        check_alike(b, base)
    opened = opened_loras(recipe, target, allow_pickle)
    fitted = fit(opened, a)
    parts = mixed(recipe, a, b, base, kind, by_key(opened, fitted, a))
    if b is not None:
        say_on_stderr(f"Configurations, tokenizers, schedule and defaults are those of {a.place}.")
    source = replace(a, title=str(recipe), weights=parts, remarks={"modelspec.merged_from": str(recipe)})
    written = write(source, target, kind, overwrite, begin)
    loras = applied(opened, fitted, parts)
    for each in loras:
        say_on_stderr(told(each))
    if not any(each.differs for each in parts.values()):
        say_on_stderr(f"Nothing changes: every weight is that of {a.place}.")
    return Merged(written, {part: each.change for part, each in parts.items()}, loras)


def open_whole(model: str | Path, variant: str | None, allow_pickle: bool) -> Source:
    """A model, of which nothing is read yet. Raises LDMError for one network without the rest."""
    source = open_source(model, variant, allow_pickle=allow_pickle)
    if source.model is None:
        raise LDMError(f"{source.place} is a {', '.join(source.configs)} alone, and whole models are merged: name one.")
    return source


def mixed(
    recipe: Recipe,
    a: Source,
    b: Source | None,
    base: Source | None,
    dtype: torch.dtype | None,
    changes: Mapping[str, Mapping[str, Sequence[tuple[float, Change]]]],
) -> dict[str, Mixed]:
    """Each part's tensors, computed when they are asked for."""
    chosen = alphas(recipe.alpha, recipe.blocks, a.configs)
    found = {}
    for part in a.configs:
        others = (None if each is None else each.weights[part] for each in (b, base))
        numbers = {key: number for (name, key), number in chosen.items() if name == part}
        found[part] = Mixed(a.weights[part], *others, numbers, changes.get(part, {}), dtype)
    return found


# ---------------------------------------------------------------------------------------------------- LoRAs

Opened = list[tuple[Lora, float]]
Fitted = list[dict[str, dict[str, Change]]]  # of each: {part: {key: how}}


def opened_loras(recipe: Recipe, target: str | Path, allow_pickle: bool) -> Opened:
    """The recipe's LoRAs, with their weights."""
    opened = []
    for file, weight in recipe.loras:
        place = find_file(file, LORA)
        check_apart(place, target)
        opened.append((open_lora(place, allow_pickle), weight))
    return opened


def fit(opened: Opened, a: Source) -> Fitted:
    """What each of them changes. Raises LDMError for one of another model."""
    if not opened:
        return []
    networks = {part: blank_part(part, config) for part, config in a.configs.items() if part != "vae"}
    return [lora.fit(networks) for lora, _ in opened]


def by_key(opened: Opened, fitted: Fitted, a: Source) -> dict[str, dict[str, list[tuple[float, Change]]]]:
    """What is added to each tensor: {part: {key: [(weight, change)]}}."""
    found: dict[str, dict[str, list[tuple[float, Change]]]] = {part: {} for part in a.configs}
    for (_, weight), changes in zip(opened, fitted, strict=True):
        for part, own in changes.items():
            for key, change in own.items():
                found[part].setdefault(key, []).append((weight, change))
    return found


def applied(opened: Opened, fitted: Fitted, parts: Mapping[str, Mixed]) -> tuple[Applied, ...]:
    """What each has changed, by how much, once all tensors are written."""
    found = []
    for number, ((lora, weight), changes) in enumerate(zip(opened, fitted, strict=True), 1):
        sizes = {
            f"{part}.{key}": (change.norm(), parts[part].beneath[key])
            for part, own in changes.items()
            for key, change in own.items()
        }
        found.append(Applied(lora.name, lora, weight, True, *strength(sizes, weight), number))
    return tuple(found)
