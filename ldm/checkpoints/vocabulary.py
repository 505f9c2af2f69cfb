"""The tokenizer of a single file: original files are weights alone, and hold none.

A model's own tokenizer lies in a folder beside its file and is taken as it stands, whatever its vocabulary:

    NAME.tokenizer/    NAME/tokenizer/    tokenizer/        of NAME.safetensors; SDXL's second: tokenizer_2

Where there is none, its family's is made: 77 tokens, the family's padding, and CLIP's vocabulary, which all these
families share. It lies at the first of these places:

    1. the file's folder: vocab.json with merges.txt, tokenizer.json or bpe_simple_vocab_16e6.txt.gz, there or in its
       tokenizer/ or tokenizer_2/
    2. LDM_CLIP_VOCAB: such a folder or file
    3. the hub's cache: what `ldm fetch clip-vocab` brought, then any model that came with CLIP's tokenizer
    4. an installed package that carries it, which is looked up and never imported

The variable comes second: it says where CLIP's vocabulary is on this machine, which is asked only of models without a
tokenizer of their own. All that is found there is compared, whole, with what OpenAI published.

T5's, which FLUX reads beside CLIP's, is looked for in the same folders, as tokenizer_2, and then in the hub's cache.
"""

import hashlib
import importlib.util
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path

from ldm import hub
from ldm.errors import LDMError, say_on_stderr
from ldm.io.folders import cannot_read, read_fields
from ldm.text.clip import TextConfig
from ldm.text.t5 import T5Config
from ldm.text.t5_tokenizer import JSON, SPIECE, T5Tokenizer
from ldm.text.tokenizer import Tokenizer, byte_vocabulary
from ldm.text.tokenizer_files import (
    BOS,
    CLIP_LENGTH,
    CLIP_MERGES,
    EOS,
    Added,
    read_merges,
    read_published,
    unpack_single,
    write_tokenizer,
)

VARIABLE = "LDM_CLIP_VOCAB"
PUBLISHED = "bpe_simple_vocab_16e6.txt.gz"
FILES = ("vocab.json", "tokenizer.json", PUBLISHED)
PACKAGES = {"open_clip": "", "clip": "", "lavis": "models/clip_models", "sam3": "assets"}  # where PUBLISHED is in them
MERGES_SHA256 = "f61f2adf497e6f5357c347aeb4646fabe82f341e946de5bdec5d2858e41bef4a"  # "i n\nt h\n...": 48,894 lines
CLIP_SIZE = CLIP_MERGES + 2 * 256 + 2

Merges = list[tuple[str, str]]
Say = Callable[[str], None]


def tokenizer(
    file: str | Path,
    pad: str,
    text: TextConfig | T5Config,
    say: Say = say_on_stderr,
    name: str = "tokenizer",
    clean: str = "transformers",
) -> Tokenizer | T5Tokenizer:
    """The tokenizer of a single file; `pad` is its family's padding token, `text` the encoder that reads the tokens.

    `name` is "tokenizer_2" for SDXL's second and its refiner's, `clean` how prompts are cleaned. `say` is told what was
    taken, but for a folder that bears the file's name. Raises LDMError if nothing is found, or if what is found is
    damaged or doesn't fit `text`.
    """
    file = Path(file)
    named = [file.with_name(f"{file.stem}.{name}"), file.with_name(file.stem) / name]
    if isinstance(text, T5Config):
        return t5_tokenizer(file, named, text, say)
    for folder in (*named, file.with_name(name)):
        if folder.is_dir():
            own = read_own(folder, text, clean)
            if folder not in named:
                say(f"{file} holds no tokenizer; taking {folder}{differences(own, pad, text)}.")
            return own
    if text.vocab_size < CLIP_SIZE:
        raise LDMError(
            f"{file} holds no tokenizer, and its text encoder knows {text.vocab_size} pieces, which isn't CLIP's "
            f"vocabulary of {CLIP_SIZE}: put the model's own tokenizer beside it, as the folder {named[0].name}."
        )
    path, merges = find_clip(file, say)
    say(f"{file} holds no tokenizer; taking CLIP's vocabulary from {path}.")
    return clip_tokenizer(merges, pad, min(CLIP_LENGTH, text.max_position_embeddings), clean)


def save_tokenizer(tokenizer: Tokenizer | T5Tokenizer, folder: str | Path) -> None:
    """Write the folder that `Tokenizer.from_folder` and transformers' CLIPTokenizer read as this tokenizer, or T5's."""
    if isinstance(tokenizer, T5Tokenizer):
        return tokenizer.write(folder)
    names = {id: token for token, id in tokenizer.ids.items()}
    ids = {"bos": tokenizer.bos_id, "eos": tokenizer.eos_id, "unk": tokenizer.unk_id, "pad": tokenizer.pad_id}
    special = {name: names[id] for name, id in ids.items()}
    merges = sorted(tokenizer.ranks, key=tokenizer.ranks.get)
    write_tokenizer(folder, tokenizer.vocab, merges, special, tokenizer.added, tokenizer.max_length)


def t5_tokenizer(file: Path, named: Sequence[Path], text: T5Config, say: Say) -> T5Tokenizer:
    """T5's, from the folders that bear the file's name, one beside it, or a FLUX's in the hub's cache."""
    folders = [*named, file.with_name("tokenizer_2"), *(each.parent for each in cached(("tokenizer_2",), SPIECE))]
    for folder in folders:
        if not any((folder / name).is_file() for name in (JSON, SPIECE)):
            continue
        own = T5Tokenizer.from_folder(folder)
        if (ids := 1 + max(own.ids.values())) > text.vocab_size:
            raise LDMError(f"The tokenizer {folder} writes {ids} kinds of tokens, and T5 reads {text.vocab_size}.")
        if folder not in named:
            say(f"{file} holds no tokenizer of T5; taking {folder}.")
        return own
    raise LDMError(
        f"{file} holds no tokenizer of T5, and none is on this machine: put the folder tokenizer_2 of a FLUX.1 beside "
        f"it, as {named[0].name}."
    )


# ---------------------------------------------------------------------------------------------------- a model's own


def read_own(folder: Path, text: TextConfig, clean: str) -> Tokenizer:
    """A folder's tokenizer. Raises LDMError if the text encoder doesn't know all that it writes."""
    own = Tokenizer.from_folder(folder, clean)
    kinds, length = 1 + max(own.ids.values()), own.max_length
    if kinds > text.vocab_size or length > text.max_position_embeddings:
        raise LDMError(
            f"The tokenizer {folder} writes {length} tokens of {kinds} kinds, and the text encoder reads "
            f"{text.max_position_embeddings} of {text.vocab_size}: put the model's own in its place, or take it away."
        )
    return own


def differences(own: Tokenizer, pad: str, text: TextConfig) -> str:
    """What is unusual about a tokenizer that may be another model's, which lies in the same folder."""
    padding = next(token for token, id in own.ids.items() if id == own.pad_id)
    unusual = [f"pads with {padding!r}, where its family pads with {pad!r}"] * (padding != pad)
    if len(own) < text.vocab_size:
        unusual.append(f"has {len(own)} pieces, where the text encoder knows {text.vocab_size}")
    return f", which {', and '.join(unusual)} (if it is another model's, take it away)" if unusual else ""


# ---------------------------------------------------------------------------------------------------- the family's


def clip_ids(merges: Iterable[tuple[str, str]]) -> dict[str, int]:
    """CLIP's order: 256 bytes, 256 that end a word, the merges, begin, end."""
    pieces = [*byte_vocabulary(), *("".join(pair) for pair in merges), BOS, EOS]
    return {piece: id for id, piece in enumerate(pieces)}


def clip_tokenizer(merges: Merges, pad: str, length: int = CLIP_LENGTH, clean: str = "transformers") -> Tokenizer:
    """The tokenizer that the family's folders hold: <|STARTOFTEXT|> counts as the token, and <|ENDOFTEXT|> too unless
    it is the padding, which those folders write in a way that makes it count as written alone."""
    vocab = clip_ids(merges)
    added = {BOS: Added(vocab[BOS], normalized=True), EOS: Added(vocab[EOS], normalized=pad != EOS)}
    return Tokenizer(vocab, merges, {"pad": pad}, added, length, clean)


def find_clip(file: Path, say: Say) -> tuple[Path, Merges]:
    """(The file that holds CLIP's vocabulary, its merges), from the first place that has it."""

    def aloud(error: LDMError) -> None:
        say(f"Passed over: {error}")

    if found := first(inside(file.parent), aloud):
        return found
    if named := os.environ.get(VARIABLE):
        return wished(Path(os.path.expanduser(named)))
    fetched = hub.local("clip-vocab")
    if found := first(inside(fetched), aloud) if fetched else None:
        return found
    # Other vocabularies are no news there: this is a search.
    if found := first(chain(cached(), packaged()), passed=lambda error: None):
        return found
    raise LDMError(
        f"{file} holds no tokenizer, and CLIP's vocabulary isn't on this machine: run `ldm fetch clip-vocab`, or set "
        f"{VARIABLE} to {PUBLISHED} or a tokenizer's folder, or put the model's tokenizer folder beside the file."
    )


def wished(place: Path) -> tuple[Path, Merges]:
    """What LDM_CLIP_VOCAB names: never passed over."""
    faults: list[LDMError] = []
    if found := first(inside(place), faults.append):
        return found
    why = str(faults[0]).rstrip(".") if faults else f"there is no {', '.join(FILES[:-1])} or {FILES[-1]}"
    raise LDMError(f"{VARIABLE} is {place}, which doesn't give CLIP's vocabulary ({why}): mend or unset it.")


def first(paths: Iterable[Path], passed: Callable[[LDMError], None]) -> tuple[Path, Merges] | None:
    """The first of the files that is CLIP's vocabulary; `passed` is told why those before it are not."""
    for path in paths:
        try:
            return path, read_clip(path)
        except LDMError as error:
            passed(error)
    return None


def read_clip(path: Path) -> Merges:
    """CLIP's merges out of a file that a vocabulary lies in. Raises LDMError if it is another one, or damaged."""
    try:
        with open(path, "rb") as file:
            packed = file.read(2) == b"\x1f\x8b"  # gzip
    except OSError as error:
        raise cannot_read(path, error) from error
    if packed:
        vocab, merges = None, read_published(path)
    elif path.name == "vocab.json":
        vocab, merges = read_fields(path), read_merges(path.with_name("merges.txt"))
    else:
        vocab, merges = unpack_single(path, read_fields(path))
    written = "\n".join(map(" ".join, merges)).encode()
    if hashlib.sha256(written).hexdigest() != MERGES_SHA256 or vocab not in (None, clip_ids(merges)):
        raise LDMError(f"{path} isn't CLIP's vocabulary; it is another one, or damaged.")
    return merges


# ---------------------------------------------------------------------------------------------------- places


def inside(place: Path) -> Iterator[Path]:
    """The files of a place that a vocabulary may lie in: itself, those of a folder, those of its tokenizers."""
    names = ("", *(Path(folder, name) for folder in ("", "tokenizer", "tokenizer_2") for name in FILES))
    # Unlike Path.is_file, it calls absent what may not be looked at.
    yield from (place / name for name in names if os.path.isfile(place / name))


def cached(folders: Sequence[str] = ("tokenizer", "tokenizer_2", "."), file: str = "vocab.json") -> Iterator[Path]:
    """Files of tokenizers of models in the hub's cache, whoever put them there."""
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "huggingface")
    cache = Path(os.path.expanduser(os.environ.get("HF_HUB_CACHE") or Path(home, "hub")))
    for folder in folders:
        yield from sorted(cache.glob(f"models--*/snapshots/*/{folder}/{file}"))


def packaged() -> Iterator[Path]:
    """CLIP's own file in packages that carry it: `find_spec` of a package looks for it and runs nothing of it."""
    for package, folder in PACKAGES.items():
        try:
            spec = importlib.util.find_spec(package)
        except (ImportError, ValueError):  # such as a module of that name that a program has made itself
            continue
        for home in (spec and spec.submodule_search_locations) or ():
            if (path := Path(home, folder, PUBLISHED)).is_file():
                yield path
