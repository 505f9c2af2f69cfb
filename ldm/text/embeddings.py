"""Textual inversion: a word that text encoders learnt from pictures, a few vectors of it and nothing else changed.

    embedding = open_embedding("learned_embeds.safetensors")     # Gal et al. 2022, arXiv:2208.01618
    embedding.word, embedding.count                              # "<mushroom>", 2
    add(pipe, embedding)                                         # pipe("a <mushroom> on snow") ...
    remove(pipe, "<mushroom>")                                   # ... and the model is the very same again

The table of vectors that a text encoder looks its ids up in grows by the word's, below all others, and the tokenizer
finds the word in prompts (`Tokenizer.with_words`). In three formats, N vectors of D numbers:

    diffusers               {the word: (D,) or (N, D)}
    AUTOMATIC1111           {"string_to_param": {"*": (N, D)}, "name": the word, ...}, a pickle; {"emb_params": (N, D)}
    SDXL, of many trainers  {"clip_l": (N, 768), "clip_g": (N, 1280)}, one for each of its text encoders

A word belongs to a pipeline, its vectors to the text encoder: an id means nothing without the table that it was made
for. So the table remembers the words of the tokenizer that goes with it, and where the two no longer belong together
(two pipelines share an encoder, or it was exchanged) nothing is added, removed or read (`check_table`).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from ldm.errors import LDMError, nearest, say_on_stderr
from ldm.io.folders import some
from ldm.io.misfits import FLOATS
from ldm.io.weights import DTYPES, WeightFiles
from ldm.text.clip import TextConfig, TextEncoder
from ldm.text.prompts.notices import how_to_write
from ldm.text.tokenizer import SPACES, Tokenizer, clean_transformers, pieces_of
from ldm.text.tokenizer_files import CLIP_LENGTH, END

if TYPE_CHECKING:
    from ldm.parts import Parts

FILE = "learned_embeds.safetensors"  # as diffusers calls it in a folder
TOKENIZERS = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"}
WIDTHS = {  # (of the first text encoder, of the second) -> whose they are; the refiner has SDXL's second alone
    (768, 0): "Stable Diffusion 1",
    (1024, 0): "Stable Diffusion 2",
    (768, 1280): "SDXL",
    (0, 1280): "SDXL's refiner",
}
A1111, BARE, XL = "string_to_param.", "emb_params", {"clip_l": "text_encoder", "clip_g": "text_encoder_2"}
TOKENS = "string_to_token."  # beside A1111's: ids of the program that learnt the word, which mean nothing here
OLD = "'torch.nn.modules.container.ParameterDict'"  # what the first such program put the vectors in
LORA = ("lora_", ".lora", "hada_", "lokr_", ".alpha", ".diff")  # parts of a LoRA's keys
MOST = CLIP_LENGTH - 2  # vectors: between the tokens at both ends


class Plain(NamedTuple):
    """A text encoder and its tokenizer before any word was added, and which of a word's vectors it reads."""

    reads: str
    tokenizer: Tokenizer
    config: TextConfig
    table: nn.Parameter


@dataclass(frozen=True, eq=False)
class Embedding:
    """A learnt word: `vectors` (N, D) by text encoder, "text_encoder" and, of SDXL, "text_encoder_2".

    `place`: its file; `format`: in words. `plain`: of a word that is on, what was before any was.
    """

    word: str
    vectors: Mapping[str, Tensor]
    place: Path
    format: str = "diffusers"
    plain: Mapping[str, Plain] = field(default_factory=dict, repr=False)

    @property
    def count(self) -> int:
        """The number of vectors N, which is that of a prompt's tokens that the word takes."""
        return max(map(len, self.vectors.values()))

    @property
    def pieces(self) -> tuple[str, ...]:
        """The names of its vectors in the tokenizer."""
        return pieces_of(self.word, self.count)

    @property
    def base(self) -> str:
        """The model it was made for, told by the widths of its vectors."""
        return in_words(*(self.vectors[part].shape[1] if part in self.vectors else 0 for part in TOKENIZERS))


def in_words(*widths: int) -> str:
    """Whose text encoders have these widths."""
    name = WIDTHS.get(widths)
    numbers = " and ".join(str(each) for each in widths if each)
    return f"{name} (vectors of {numbers} numbers)" if name else f"a model of vectors of {numbers} numbers"


# ---------------------------------------------------------------------------------------------------- files


def open_embedding(path: str | Path, allow_pickle: bool = False) -> Embedding:
    """The word in a file. Raises LDMError for what is no embedding, or not sound, and for a pickle unless allowed."""
    path = Path(path)
    files = opened(path, allow_pickle)
    keys, names = {}, [name for name in files.entries if not name.startswith(TOKENS)]
    said, form = names[0] if names else "", "diffusers"
    if set(names) <= XL.keys() and names:
        keys, said, form = {XL[name]: name for name in names}, "", "SDXL's (clip_l, clip_g)"
    elif said.startswith(A1111):
        keys, said, form = {"text_encoder": said}, files.scalars.get("name", ""), "AUTOMATIC1111"
        said = said or names[0].removeprefix(A1111)
    elif BARE in names:
        keys, said, form = {"text_encoder": BARE}, "", "AUTOMATIC1111 (emb_params)"
    elif len(names) == 1:
        keys = {"text_encoder": said}
    if not keys or len(names) != len(keys) or any(mark in name for name in names for mark in LORA):
        raise no_embedding(path, names)
    stem = path.parent.resolve().name if path.name == FILE else path.stem
    word = said if isinstance(said, str) and said not in ("", "*") else stem
    vectors = {part: read_vectors(files, key) for part, key in sorted(keys.items())}
    counts = {len(each) for each in vectors.values()}
    if len(counts) > 1:
        raise LDMError(f"{path} has {' and '.join(map(str, counts))} vectors for SDXL's two text encoders, and they "
                       "must be as many: take a sound copy.")  # fmt: skip
    return Embedding(word, vectors, path, form)


def opened(path: Path, allow_pickle: bool) -> WeightFiles:
    """The tensors of a file. Of the original program's format (Gal et al. 2022) it is said what to do with it."""
    try:
        return WeightFiles(path, allow_pickle)
    except LDMError as error:
        if OLD not in str(error):
            raise
        raise LDMError(
            f"{path} is in the old format of the first program for textual inversion, a pickle with a ParameterDict, "
            "which ldm doesn't read: if you trust it, open it in torch and save it anew: torch.save({'<word>': next("
            "torch.load(path, weights_only=False)['string_to_param'].parameters()).data}, new)."
        ) from error


def no_embedding(path: Path, names: list[str]) -> LDMError:
    """What a file is that is no embedding."""
    if any(mark in name for name in names for mark in LORA):
        return LDMError(
            f"{path} is a LoRA (it has {names[0][:80]!r}), not an embedding: add it as one (add_lora, --lora)."
        )
    if not names:
        return LDMError(f"{path} holds no tensors: it is no embedding; take a sound copy.")
    if len(names) <= 8:
        return LDMError(f"{path} holds {some([repr(name[:80]) for name in names])}, and an embedding is one word: "
                        "split it, or name another file.")  # fmt: skip
    return LDMError(f"{path} holds {len(names)} tensors, such as {names[0][:80]!r}: it is no embedding; a model "
                    "is for --model.")  # fmt: skip


def read_vectors(files: WeightFiles, key: str) -> Tensor:
    """(N, D), finite, with memory of its own. Raises LDMError for anything else, before a number is read if it can."""
    entry = files.entries[key]
    shape = (1, *entry.shape) if len(entry.shape) == 1 else entry.shape
    what = f"{files.place}: {key[:80]!r}"
    if len(shape) != 2 or 0 in shape or DTYPES.get(entry.dtype) not in FLOATS:
        raise LDMError(f"{what} is {entry.dtype} of shape {entry.shape}, and an embedding is floats of shape (vectors, "
                       "width): it is none.")  # fmt: skip
    if shape[0] > MOST:
        raise LDMError(f"{what} has {shape[0]} vectors, and a prompt has room for {MOST} tokens: it is no word.")
    vectors = files.read(key).reshape(shape).clone()
    if not vectors.isfinite().all():
        raise LDMError(f"{what} holds numbers that are not finite: take a sound copy.")
    return vectors


# ---------------------------------------------------------------------------------------------------- a pipeline's


def add(pipe: "Parts", embedding: Embedding, word: str | None = None) -> Embedding:
    """Teach the pipeline's text encoders the word, and return it as it is in `pipe.embeddings`.

    `word`: what prompts call it; left out, what the file does. Says on stderr how long its vectors are. Until the last
    word is removed the table of before is kept beside the longer one. Raises LDMError, and leaves the pipeline as it
    is, for vectors of another model, for a word that can't be one, and where another pipeline's words are on the text
    encoder. An offloaded pipeline is to be sent home before (`ldm.memory.send_home`): what is on its device is a copy
    that is forgotten.
    """
    check_table(pipe, alone=True)
    plain = next((each.plain for each in pipe.embeddings.values()), None) or plain_parts(pipe)
    added = named(embedding, word, plain, pipe.embeddings)
    put(pipe, plain, {**pipe.embeddings, added.word: added})
    for line in (described(added), inside_others(added.word), how_to_write(added.word, pipe.tokenizer)):
        if line:
            say_on_stderr(line)
    return added


def named(
    embedding: Embedding, word: str | None, plain: Mapping[str, Plain], others: Mapping[str, Embedding]
) -> Embedding:
    """The word as it can be added to these text encoders beside `others`, called `word` or as its file says.

    Raises LDMError if it can't.
    """
    word = embedding.word if word is None else word
    check_fit(embedding, plain)
    check_word(word, embedding, plain, others)
    return replace(embedding, word=word, plain=plain)


def remove(pipe: "Parts", word: str) -> None:
    """Forget the word. With the last one, tables, tokenizers and configurations are the very same again.

    Where the model was moved or cast meanwhile, the table is a copy of what it has become. Sent home before, as for
    `add`. Raises LDMError for a word that isn't on, and where the text encoder is no longer the one that has it.
    """
    if not isinstance(word, str):
        own = repr(word.word) if isinstance(word, Embedding) else "such as '<toy>'"
        raise LDMError(f"What is to be removed is named by its word, {own}, not by something of type "
                       f"{type(word).__name__}.")  # fmt: skip
    if word not in pipe.embeddings:
        known = f"those on are {some(list(map(repr, pipe.embeddings)))}" if pipe.embeddings else "none is on"
        raise LDMError(f"There is no learnt word {word!r} to remove: {known}.{nearest(word, pipe.embeddings)}")
    check_table(pipe)
    rest = {each: added for each, added in pipe.embeddings.items() if each != word}
    put(pipe, pipe.embeddings[word].plain, rest)


def table_of(encoder: TextEncoder) -> nn.Embedding:
    return encoder.embeddings.token_embedding


def check_table(pipe: "Parts", alone: bool = False) -> None:
    """Raise LDMError where a text encoder's table isn't the one that this pipeline's words were put in.

    `alone`: and where words of another pipeline are on it, which this one can read its own prompts beside.
    """
    for part, name in TOKENIZERS.items():
        if not isinstance(encoder := getattr(pipe, part), TextEncoder):  # None, or T5, which learns no words
            continue
        words, title = vars(table_of(encoder)).get("words", {}), part.replace("_", " ")
        if pipe.embeddings and words is not getattr(pipe, name).words:
            raise LDMError(
                f"This pipeline's learnt words ({some(list(map(repr, pipe.embeddings)))}) aren't on its {title}: that "
                "(or its tokenizer) is another one now, or a pipeline that shares it has learnt or forgotten words; "
                "put back the one that has them, or load the model anew, and remove words before anything is "
                "exchanged, or let pipelines share nothing (copy.deepcopy(pipe))."
            )
        if alone and words and not pipe.embeddings:
            raise LDMError(
                f"The {title} has learnt words of another pipeline that shares it ({some(list(map(repr, words)))}): "
                "remove them there first, or load the model anew for this pipeline."
            )


def plain_parts(pipe: "Parts") -> dict[str, Plain]:
    """The text encoders of a pipeline to which no word was added so far."""
    refiner = pipe.xl and pipe.text_encoder_2 is None  # its only text encoder is SDXL's second
    parts = [part for part in TOKENIZERS if getattr(pipe, part) is not None]
    return {
        part: Plain(
            "text_encoder_2" if refiner else part,
            getattr(pipe, TOKENIZERS[part]),
            getattr(pipe, part).config,
            table_of(getattr(pipe, part)).weight,
        )
        for part in parts
    }


def check_fit(embedding: Embedding, plain: Mapping[str, Plain]) -> None:
    """Raise LDMError for vectors of another model, and for those that its type of numbers can't hold."""
    needed = {each.reads: each.table.shape[1] for each in plain.values()}
    given = {part: vectors.shape[1] for part, vectors in embedding.vectors.items()}
    if needed != given and (len(needed) > 1 or "text_encoder" in needed or needed.items() - given.items()):
        mine, base = in_words(*(needed.get(part, 0) for part in TOKENIZERS)), embedding.base
        if "text_encoder" not in given:
            base = f"SDXL's second text encoder alone (clip_g, vectors of {given['text_encoder_2']} numbers)"
        raise LDMError(f"{embedding.place} was made for {base}, and this model is {mine}: take another file.")
    for each in plain.values():
        if not embedding.vectors[each.reads].to(each.table.dtype).isfinite().all():
            raise LDMError(f"{embedding.place} has numbers beyond {str(each.table.dtype).removeprefix('torch.')}: load "
                           "the model in a type of wider range.")  # fmt: skip


def check_word(word: str, embedding: Embedding, plain: Mapping[str, Plain], others: Mapping[str, Embedding]) -> None:
    """Raise LDMError for a word that prompts can't name, that is one already, or for which they have no room."""
    mend = "name it otherwise: add_embedding(file, word='<...>'), --embedding FILE:<...>"
    if not isinstance(word, str) or not word or SPACES.search(word) or not word.isprintable():
        raise LDMError(f"{word!r} of {embedding.place} is no word without spaces, as a prompt would name it; {mend}.")
    names = pieces_of(word, embedding.count)
    for each in plain.values():
        taken = each.tokenizer.ids.keys() | {name for other in others.values() for name in other.pieces}
        cleaned = {clean_transformers(other) for other in others}
        low = clean_transformers(word)
        if low in cleaned or taken & {low, low + END, *names}:
            raise LDMError(f"{word!r} of {embedding.place} is a word of this model already; {mend}.")
        room = each.tokenizer.max_length - 2
        if embedding.count > room:
            raise LDMError(f"{embedding.place} has {embedding.count} vectors, and a prompt has room for {room} tokens.")
        ids = range(len(each.table), len(each.table) + embedding.count)
        if each.tokenizer.with_words({word: ids}).pieces(word) != list(names):
            raise LDMError(f"{word!r} of {embedding.place} can't be found in prompts, for the tokenizer cuts it "
                           f"at another token; {mend}.")  # fmt: skip


def put(pipe: "Parts", plain: Mapping[str, Plain], words: Mapping[str, Embedding]) -> None:
    """Let these words, and no others, follow the vocabulary: nothing is changed before all is made."""
    made = {part: learnt(getattr(pipe, part), before, words) for part, before in plain.items()}
    for part, (tokenizer, config, table) in made.items():
        encoder = getattr(pipe, part)
        setattr(pipe, TOKENIZERS[part], tokenizer)
        encoder.config = config
        table_of(encoder).weight = table
        table_of(encoder).num_embeddings = len(table)
        vars(table_of(encoder)).pop("words", None)
        if words:
            table_of(encoder).words = tokenizer.words  # the very one: by it they know each other
    pipe.embeddings = dict(words)


def learnt(
    encoder: TextEncoder, before: Plain, words: Mapping[str, Embedding]
) -> tuple[Tokenizer, TextConfig, nn.Parameter]:
    """A text encoder's tokenizer, configuration and table with these words: with none, those of before."""
    now, usual = table_of(encoder).weight, len(before.table)
    if not words:
        same = (now.dtype, now.device) == (before.table.dtype, before.table.device)
        kept = before.table if same else nn.Parameter(now.detach()[:usual].clone(), now.requires_grad)
        return before.tokenizer, before.config, kept
    rows = torch.cat([now.detach()[:usual], *(each.vectors[before.reads].to(now) for each in words.values())])
    rows = rows.pin_memory() if now.is_pinned() else rows  # from where an offloaded model is sent faster
    # Of an old configuration, which says 2, the end of a text is its largest id; and now a word's is larger. There
    # diffusers pools at the word.
    end = before.tokenizer.eos_id if before.config.eos_token_id == 2 else before.config.eos_token_id
    config = replace(before.config, vocab_size=len(rows), eos_token_id=end)
    return knowing(before, words), config, nn.Parameter(rows, now.requires_grad)


def knowing(before: Plain, words: Mapping[str, Embedding]) -> Tokenizer:
    """A text encoder's tokenizer with these words: their ids follow those of the table, one word behind the other."""
    ids, first = {}, len(before.table)
    for word, added in words.items():
        ids[word] = range(first, first + added.count)
        first += added.count
    return before.tokenizer.with_words(ids) if ids else before.tokenizer


def described(added: Embedding) -> str:
    """What a user should know of a word that was added: its vectors, and whether they are as long as others."""
    count = f"{added.count} vector{'s' * (added.count > 1)}"
    told = []
    for part, before in added.plain.items():
        vectors, table = (each.detach().float().norm(dim=1) for each in (added.vectors[before.reads], before.table))
        low, high = table.quantile(torch.tensor([0.05, 0.95], device=table.device)).tolist()
        length = " to ".join(dict.fromkeys(f"{float(each):.2g}" for each in (vectors.min(), vectors.max())))
        usual = f"where most of the vocabulary's are {low:.2g} to {high:.2g}"
        told.append(f"{part.replace('_', ' ')}: their length {length} {usual}")
    return f"{added.word} is now a word of {count} ({'; '.join(told)})."


def inside_others(word: str) -> str:
    """Of a word of letters alone, which ordinary words may have in them: a sentence that says so. "" of others."""
    if not word.isalpha():
        return ""
    return f"{word!r} is found inside other words too, and cuts them up, as in diffusers; '<{word}>' would not be."
