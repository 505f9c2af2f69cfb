"""What an embedding (textual inversion) is: which word, of how many vectors, for which text encoders."""

from shlex import quote
from typing import TYPE_CHECKING

from ldm.errors import LDMError
from ldm.inspect.bases import Base, beside, line_of_base, of_embedded
from ldm.inspect.report import Report, make_part
from ldm.io.weights import WeightFiles
from ldm.text.embeddings import TOKENIZERS, Embedding, Plain, named, open_embedding

if TYPE_CHECKING:
    from torch import Tensor

WHAT = "an embedding (textual inversion): a word for prompts"


def could_be(files: WeightFiles, base: Base | None) -> bool:
    """Whether a file whose keys tell nothing has an embedding's shape: one tensor, as wide as a known text encoder."""
    widths = {config.hidden_size for each in beside(base).values() for config in each.texts.values()}
    entries = list(files.entries.values())
    named = len(entries) == 1 and not entries[0].name.endswith(("weight", "bias"))  # as layers have, and words don't
    return named and 1 <= len(entries[0].shape) <= 2 and entries[0].shape[-1] in widths


def of_word(files: WeightFiles, form: str, name: str, base: Base | None) -> Report:
    """The report of an embedding's file, whose numbers are read; and whether it goes with `base`, if one is named."""
    path, pickled = files.paths[0], form.startswith("a pickle")
    part = make_part("vectors", path.name, files.entries.values())
    common = {"place": str(path), "kind": "embedding", "what": WHAT, "parts": (part,), "form": form}
    try:
        word = open_embedding(path, allow_pickle=True)
    except LDMError as error:
        return Report(**common, faults=(str(error),))
    known = {title: each for title, each in beside(base).items() if fault_of(word, each) is None}
    fault = None if base is None else fault_of(word, base)
    warnings = [
        told for each in of_embedded() if fits(word, each) and (told := fault_of(word, each)) not in (None, fault)
    ]
    facts = {
        "word": f"{word.word}, as {'the file says' if word.word in said(files) else 'the file is called'}",
        "vectors": f"{word.count}, and so many tokens of a prompt it takes",
        "lengths": lengths(word, next(iter(known.values()), None)),
        "goes with": f"{', '.join(known)}, by its widths" if known else "no model that ldm knows",
    }
    line = f"ldm generate {line_of_base(known.values(), f'a picture of {word.word}')} --embedding {quote(name)}"
    return Report(
        **common | {"form": f"{form}, format: {word.format}"},
        reason=f"it is made for {word.base}",
        facts=facts,
        warnings=tuple(warnings),
        faults=(fault,) if fault else (),
        use=() if fault else (line + " --allow-pickle" * pickled,),
    )


def said(files: WeightFiles) -> list[object]:
    """What may be the word, in the file itself."""
    return [*files.entries, files.scalars.get("name")]


def fits(word: Embedding, base: Base) -> bool:
    """Whether it has vectors for each of that model's text encoders. Those of SDXL serve its refiner, too."""
    needed = {part: config.hidden_size for part, config in base.texts.items()}
    given = {part: vectors.shape[1] for part, vectors in word.vectors.items()}
    return needed == given or (needed.keys() == {"text_encoder_2"} and needed.items() <= given.items())


def fault_of(word: Embedding, base: Base) -> str | None:
    """The sentence with which a model of this machine refuses it, if it does."""
    if not fits(word, base) or (plain := plain_of(base)) is None:
        return None if fits(word, base) else f"{word.place} was made for {word.base}, and not for {base.title}."
    try:
        named(word, None, plain, {})
    except LDMError as error:
        return str(error)
    return None


def plain_of(base: Base) -> dict[str, Plain] | None:
    """The model's text encoders as `ldm.text.embeddings` wants them; None where they can't be read here."""
    if base.checkpoint is None:
        return None
    tables = {part: base.vocabulary(part) for part in base.texts}
    tokenizers = base.checkpoint.tokenizers
    if any(table is None or TOKENIZERS[part] not in tokenizers for part, table in tables.items()):
        return None
    return {part: Plain(part, tokenizers[TOKENIZERS[part]], base.texts[part], table) for part, table in tables.items()}


def lengths(word: Embedding, base: Base | None) -> str:
    """Of its vectors, beside those of the vocabulary of a model that it goes with, where that is here."""
    import torch

    def ends(vectors: "Tensor", *shares: float) -> str:
        found = vectors.float().norm(dim=1).quantile(torch.tensor(shares, dtype=torch.float32)).tolist()
        return " to ".join(dict.fromkeys(f"{each:.2g}" for each in found))

    told = []
    for part, vectors in word.vectors.items():
        table = base.vocabulary(part) if base is not None else None
        usual = f", where most of the vocabulary's are {ends(table, 0.05, 0.95)}" if table is not None else ""
        told.append(f"{ends(vectors, 0, 1)} of the {part.replace('_', ' ')}{usual}")
    return "; ".join(told)
