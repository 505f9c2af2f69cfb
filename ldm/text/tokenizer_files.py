"""The files of a tokenizer's folder, as diffusers' checkpoints hold them: read and written.

    vocab.json + merges.txt        the vocabulary, as CLIP published it
    tokenizer.json                 the same in one file, as transformers 5 writes it; read where vocab.json is missing
    tokenizer_config.json          special tokens and model_max_length
    special_tokens_map.json        special tokens again, in the older place, which wins (Stable Diffusion 2: pad "!")
    added_tokens.json              tokens beyond the vocabulary, in the older place

The older places count only where tokenizer_config.json has no `added_tokens_decoder`, as in transformers 5.

    bpe_simple_vocab_16e6.txt.gz   the merges alone, as OpenAI published them with CLIP; packages carry this file
"""

import json
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from ldm.errors import LDMError
from ldm.io.atomic import atomic_file
from ldm.io.folders import cannot_read, open_plain, read_fields

END = "</w>"  # end of word: "house</w>" is the word, "house" the beginning of "houses"
BOS, EOS = "<|startoftext|>", "<|endoftext|>"
SPECIAL = {"bos": BOS, "eos": EOS, "unk": EOS, "pad": EOS}  # where a folder names none
NAMES = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")  # CLIP has no sep, cls and mask, but a file may
# transformers writes 10^30 where a tokenizer knows no length; CLIP has 77 positions.
CLIP_LENGTH, NO_LENGTH = 77, 1_000_000
CLIP_MERGES = 49_152 - 256 - 2  # of the 262,144 that are published; 256 + 256 bytes and 2 tokens beside: 49,408 pieces
MOST_MERGES_BYTES = 4_000_000  # unpacked; the published file has 3.2 million, CLIP's merges.txt half a million


class Added(NamedTuple):
    """A token that is cut out of the prompt before it is split into words.

    `normalized` tokens are searched in the cleaned text (so `<|ENDOFTEXT|>` is found), others in the text as written.
    `special` ones are left out by `decode(skip_special=True)`. The pad token is among them: where it is "!" (Stable
    Diffusion 2, SDXL's second tokenizer), transformers gives each "!" of a prompt the padding's id 0, not 256 as the
    original does; `clean="original"` does not.
    """

    id: int
    normalized: bool = False
    special: bool = True


def read_tokenizer(folder: Path) -> dict[str, Any]:
    """The arguments of `Tokenizer`: vocab, merges, special, added, max_length."""
    if not folder.is_dir():
        raise LDMError(f"There is no tokenizer folder {folder}; check the path.")
    single = read_if_there(folder / "tokenizer.json")
    if (folder / "vocab.json").exists():
        vocab, merges = read_if_there(folder / "vocab.json"), read_merges(folder / "merges.txt")
        source = folder / "vocab.json"
    elif single:
        vocab, merges = unpack_single(folder / "tokenizer.json", single)
        source = folder / "tokenizer.json"
    else:
        raise LDMError(f"The tokenizer folder {folder} lacks vocab.json (and tokenizer.json); copy the whole folder.")
    check_vocabulary(source, vocab)
    config = read_if_there(folder / "tokenizer_config.json")
    special, added = special_tokens(folder, config, vocab, single)
    length = config.get("model_max_length") or CLIP_LENGTH
    if type(length) not in (int, float) or length < 2:  # the tokens at both ends
        raise LDMError(f"{folder / 'tokenizer_config.json'}: model_max_length must be a number, not {length!r}.")
    length = int(length) if length < NO_LENGTH else CLIP_LENGTH
    return {"vocab": vocab, "merges": merges, "special": special, "added": added, "max_length": length}


def read_if_there(path: Path) -> dict[str, Any]:
    """A JSON file that holds an object; {} where there is no such file."""
    return read_fields(path) if path.exists() else {}


def read_merges(path: Path) -> list[tuple[str, str]]:
    """merges.txt: one pair on a line, the first learnt first, under a line `#version: 0.2`."""
    if not path.exists():
        raise LDMError(f"The tokenizer file {path} is missing; copy the whole folder.")
    # Windows' line ends may be anywhere, but not what splitlines() also breaks at: U+0085 and others.
    text = decoded(path, bounded(path)).replace("\r\n", "\n").removesuffix("\n")
    lines = enumerate(text.split("\n"), start=1) if text else ()
    return [two_pieces(path, number, line) for number, line in lines if not line.startswith("#version")]


def read_published(path: Path) -> list[tuple[str, str]]:
    """CLIP's merges out of bpe_simple_vocab_16e6.txt.gz: the first 48,894 below its heading.

    Unpacked to a bound, whatever the file says of its size. Raises LDMError for what is no such file.
    """
    unpack = zlib.decompressobj(wbits=31)  # gzip's wrapping, its checksum included
    try:
        data = unpack.decompress(bounded(path), MOST_MERGES_BYTES)
    except zlib.error as error:
        raise LDMError(f"{path} isn't a whole gzip file ({error}); download it again.") from None
    if not unpack.eof or unpack.unused_data:
        raise LDMError(f"{path} is cut off, goes on behind its end, or unpacks to too much; download it again.")
    lines = decoded(path, data).split("\n")[1 : CLIP_MERGES + 1]
    return [two_pieces(path, number, line) for number, line in enumerate(lines, start=2)]


def bounded(path: Path, most: int = MOST_MERGES_BYTES, what: str = "tokenizer's list of merges") -> bytes:
    """The content of a file that must be small. Raises LDMError if it isn't, or can't be read."""
    try:
        with open_plain(path) as file:
            data = file.read(most + 1)
    except OSError as error:
        raise cannot_read(path, error) from error
    if len(data) > most:
        raise LDMError(f"{path} is larger than {most} bytes: it is no {what}.")
    return data


def decoded(path: Path, data: bytes) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise LDMError(f"{path} isn't UTF-8 text ({error}); download it again.") from None


def two_pieces(path: Path, number: int, line: str) -> tuple[str, str]:
    """The two pieces on a line."""
    pieces = tuple(line.split(" "))
    if len(pieces) != 2 or "" in pieces:
        raise LDMError(f"{path}, line {number}: {line[:80]!r} isn't two pieces and one space; download it again.")
    return pieces


def unpack_single(path: Path, content: dict[str, Any]) -> tuple[Any, list[tuple[str, str]]]:
    """Vocabulary and merges of a tokenizer.json."""
    model = content.get("model")
    model = model if isinstance(model, dict) else {}
    if model.get("type") != "BPE" or model.get("end_of_word_suffix") != END:
        raise LDMError(f"{path} isn't CLIP's kind (BPE with {END}) but {model.get('type')!r}; choose another.")
    merges = model.get("merges")
    merges = merges if isinstance(merges, list) else [None]
    # Written as "a b" by older versions, as ["a", "b"] by newer ones.
    pairs = [tuple(pair.split(" ")) if isinstance(pair, str) else tuple(pair or ()) for pair in merges]
    for pair in pairs:
        if len(pair) != 2 or not all(isinstance(piece, str) and piece for piece in pair):
            raise LDMError(f"{path} holds the merge {pair!r}, which isn't two pieces; download it again.")
    return model.get("vocab"), pairs


def check_vocabulary(path: Path, vocab: Any) -> None:
    """Pieces must be texts, ids different whole numbers: the ids are rows of the text encoder's table."""
    if not isinstance(vocab, dict) or not vocab:
        raise LDMError(f"{path} holds no vocabulary; download it again.")
    for piece, id in vocab.items():
        if type(id) is not int or id < 0:
            raise LDMError(f"{path} gives the piece {piece!r} the id {id!r}, which is no whole number from 0 on.")
    if len(set(vocab.values())) != len(vocab):
        raise LDMError(f"{path} gives one id to several pieces; download it again.")


def special_tokens(folder: Path, config: dict, vocab: dict, single: dict) -> tuple[dict[str, str], dict[str, Added]]:
    """({"bos": token, ...}, {token: Added}) as transformers 5 gathers them."""
    entries, config = listed_tokens(folder, config, single)
    added: dict[str, Added] = {}
    for entry in entries:
        token = content_of(folder, entry)
        id, special = entry["id"], entry.get("special", False)
        if type(id) is not int or id != vocab.get(token, id):
            raise LDMError(f"In {folder} the token {token!r} has two ids, {id!r} and {vocab.get(token)}; mend one.")
        added[token] = Added(id, entry.get("normalized", not special), special)
    special, listed = dict(SPECIAL), set(added)
    more = config.get("additional_special_tokens") or config.get("extra_special_tokens") or []
    named = [(name, config.get(f"{name}_token") or SPECIAL.get(name)) for name in NAMES]
    for name, entry in [*named, *(("additional", entry) for entry in more)]:
        if entry is None:
            continue
        token = special[name] = content_of(folder, entry)
        id = added[token].id if token in added else vocab.get(token)
        if id is None:
            raise LDMError(f"The {name} token {token!r} of {folder} isn't in its vocabulary; name one that is.")
        # Where one token has several names and they disagree, the last one decides, as in transformers: Stable
        # Diffusion 1's `"pad_token": "<|endoftext|>"`, a plain string, makes its normalized eos token a raw one.
        normalized = isinstance(entry, dict) and entry.get("normalized", False)
        added[token] = added[token]._replace(special=True) if token in listed else Added(id, normalized)
    return {name: special[name] for name in SPECIAL}, added


def listed_tokens(folder: Path, config: dict, single: dict) -> tuple[list[dict], dict]:
    """(The tokens that the files list with their ids, the configuration): a newer file makes older ones ignored."""
    if "added_tokens_decoder" in config:
        table = config["added_tokens_decoder"]
        if not isinstance(table, dict) or not all(id.isdecimal() and isinstance(e, dict) for id, e in table.items()):
            raise LDMError(f"{folder / 'tokenizer_config.json'}: added_tokens_decoder must map ids to objects.")
        return [{**entry, "id": int(id)} for id, entry in table.items()], config
    older = read_if_there(folder / "added_tokens.json")
    entries = [{"content": token, "id": id, "normalized": True, "special": False} for token, id in older.items()]
    entries += [entry for entry in single.get("added_tokens", []) if isinstance(entry, dict) and "id" in entry]
    return entries, config | read_if_there(folder / "special_tokens_map.json")


def content_of(folder: Path, entry: Any) -> str:
    """The text of a token, which is written as a string or as an object with "content"."""
    token = entry.get("content") if isinstance(entry, dict) else entry
    if not isinstance(token, str) or not token:
        raise LDMError(f"In {folder} a special token is written {entry!r}; it must be a text or have a 'content'.")
    for flag in ("lstrip", "rstrip", "single_word"):
        if isinstance(entry, dict) and entry.get(flag):
            raise LDMError(f"In {folder} the token {token!r} asks for {flag}, which ldm doesn't implement.")
    return token


def write_tokenizer(
    folder: str | Path,
    vocab: dict[str, int],
    merges: Iterable[tuple[str, str]],
    special: dict[str, str] = SPECIAL,
    added: dict[str, Added] | None = None,
    max_length: int = CLIP_LENGTH,
) -> None:
    """Write the four files that `read_tokenizer` and transformers' CLIPTokenizer read alike.

    Without `added`, both find the special tokens in a prompt as it is written; with it, as its entries say.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    named = {f"{name}_token": token for name, token in special.items()}
    config = {**named, "model_max_length": max_length, "tokenizer_class": "CLIPTokenizer"}
    if added:
        plain = {"lstrip": False, "rstrip": False, "single_word": False}
        entries = {t: {"content": t, "normalized": one.normalized, **plain} for t, one in added.items()}
        config["added_tokens_decoder"] = {
            str(one.id): entries[t] | {"special": one.special} for t, one in added.items()
        }
        named = {name: entries[token] for name, token in named.items()}  # for readers that know no such list
    files = {
        "merges.txt": "\n".join(["#version: 0.2", *map(" ".join, merges)]) + "\n",
        "tokenizer_config.json": json.dumps(config, indent=2) + "\n",
        "special_tokens_map.json": json.dumps(named, indent=2) + "\n",
        "vocab.json": json.dumps(vocab, ensure_ascii=False),  # last: it says that the vocabulary is there
    }
    for name, content in files.items():
        with atomic_file(folder / name, "w") as file:
            file.write(content)
