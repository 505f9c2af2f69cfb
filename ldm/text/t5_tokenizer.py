"""T5's tokenizer: text -> the most probable pieces -> ids (Kudo 2018, unigram language model; Kudo & Richardson 2018).

    tokenizer = T5Tokenizer.from_folder("FLUX.1-schnell/tokenizer_2")
    tokenizer.pieces("a lighthouse")                   # ["▁", "a", "▁light", "house"]
    tokenizer("a lighthouse", max_length=256).ids      # (1, 256)

Of all ways to write a text in pieces of the vocabulary the one is taken whose probabilities have the greatest product.
That search, and the tables that make of a character its plain form, are the library's whose file the folder holds:

    tokenizer.json     the `tokenizers` library, as in transformers
    spiece.model       the `sentencepiece` library, the original; read where there is no tokenizer.json

Both are imported when such a file is read. They agree on every single character but U+0085, which tokenizers takes for
a space, and in runs but for what hangs on a character that has a plain form: of ½ with a combining accent, tokenizers
0.23 loses the accent, sentencepiece keeps it.
What is done here: special tokens, the end token, cutting and padding. Shapes: B prompts, L ids for each (512).
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ldm.errors import LDMError
from ldm.io.atomic import atomic_file
from ldm.io.folders import read_fields
from ldm.text.tokenizer import Tokens, cut_out
from ldm.text.tokenizer_files import NO_LENGTH, bounded, read_if_there

JSON, SPIECE, SETTINGS = "tokenizer.json", "spiece.model", "tokenizer_config.json"
PAD, EOS, UNK = "<pad>", "</s>", "<unk>"  # ids 0, 1 and 2
SPACE = "▁"  # how a piece spells the space before it
T5_LENGTH = 512
EXTRA = 100  # `<extra_id_99>` to `<extra_id_0>`: gaps of T5's training, behind the vocabulary of spiece.model
MOST_BYTES = 10_000_000  # T5's spiece.model has 0.8 million
AGAIN = "copy the whole folder again"


class Speller(NamedTuple):
    """What a library knows: how a text is spelled, special tokens in it included, and the number of each piece."""

    spell: Callable[[str], list[int]]
    ids: Mapping[str, int]


class T5Tokenizer:
    """Called as CLIP's `Tokenizer` is. `ids`: piece -> id, special tokens included.

    `files`: {name: content}, what `write` writes. There is no begin token.
    """

    def __init__(self, speller: Speller, max_length: int = T5_LENGTH, files: Mapping[str, bytes] | None = None):
        self._spell, self.ids = speller.spell, dict(speller.ids)
        self.max_length, self.files = check_length(max_length), dict(files or {})
        for token in (PAD, EOS, UNK):
            if token not in self.ids:
                raise LDMError(f"The T5 tokenizer's vocabulary lacks {token!r}: it is none of T5's; {AGAIN}.")
        self.pad_id, self.eos_id, self.unk_id = (self.ids[token] for token in (PAD, EOS, UNK))
        self._names = {id: piece for piece, id in self.ids.items()}
        if len(self._names) < len(self.ids):
            raise LDMError(f"The T5 tokenizer's vocabulary gives one id to several pieces; {AGAIN}.")

    @classmethod
    def from_folder(cls, folder: str | Path) -> "T5Tokenizer":
        """Read tokenizer.json or spiece.model, and the length in tokenizer_config.json.

        Raises LDMError if neither is there or sound, or the library that reads it isn't installed.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise LDMError(f"There is no tokenizer folder {folder}; check the path.")
        there = [name for name in (JSON, SPIECE) if (folder / name).exists()]
        if not there:
            raise LDMError(f"The tokenizer folder {folder} lacks {JSON} and {SPIECE}; copy the whole folder.")
        settings = read_if_there(folder / SETTINGS)
        length = settings.get("model_max_length") or T5_LENGTH
        if type(length) not in (int, float) or length < 1:
            raise LDMError(f"{folder / SETTINGS}: model_max_length must be a number from 1 on, not {length!r}.")
        length = int(length) if length < NO_LENGTH else T5_LENGTH
        extra = settings.get("extra_ids", EXTRA)
        if type(extra) is not int or not 0 <= extra <= NO_LENGTH:
            raise LDMError(f"{folder / SETTINGS}: extra_ids must be a whole number from 0 on, not {extra!r}.")
        lacking = []
        for name in there:
            try:
                speller = read_json(folder / name) if name == JSON else read_spiece(folder / name, extra)
            except ImportError as error:
                lacking.append((name, error.name))
                continue
            kept = [*there, SETTINGS] if (folder / SETTINGS).exists() else there
            return cls(speller, length, {each: content(folder / each) for each in kept})
        names = " or ".join(f"`pip install {library}` for {name}" for name, library in lacking)
        raise LDMError(f"Reading the T5 tokenizer in {folder} takes a library that isn't installed: {names}.")

    def write(self, folder: str | Path) -> None:
        """Write the files that it was read from, byte for byte, into a folder that is made if need be."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        for name, data in self.files.items():
            with atomic_file(Path(folder) / name) as file:
                file.write(data)

    def __len__(self) -> int:
        """The number of ids: 32100 for T5, whose table has 32128 rows."""
        return len(self.ids)

    def encode(self, text: str) -> list[int]:
        """The ids of a text alone: without the end token, neither cut nor padded."""
        if not isinstance(text, str):
            raise LDMError(f"A prompt must be a text, not {type(text).__name__}: {text!r}.")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            at = ascii(error.object[error.start])
            raise LDMError(f"The prompt holds {at}, half of a surrogate pair; remove it or repair the text.") from None
        return self._spell(text)

    def pieces(self, text: str) -> list[str]:
        """The pieces of a text, special tokens that it spells out among them; nothing is cut."""
        return [self._names[id] for id in self.encode(text)]

    def frame(self, ids: Sequence[int], max_length: int | None = None) -> list[int]:
        """At most L - 1 ids, the end, padding: L ids."""
        length = self.max_length if max_length is None else check_length(max_length)
        ids = [*ids[: length - 1], self.eos_id]
        return ids + [self.pad_id] * (length - len(ids))

    def __call__(self, prompts: str | Sequence[str], max_length: int | None = None) -> Tokens:
        """Tokens of one prompt or of B prompts: ids (B, L), L being `max_length` or the tokenizer's own.

        What didn't fit stands in `cut`: tell the user.
        """
        prompts = [prompts] if isinstance(prompts, str) else prompts
        length = self.max_length if max_length is None else check_length(max_length)
        rows = [self.encode(prompt) for prompt in prompts]
        ids = torch.tensor([self.frame(row, length) for row in rows], dtype=torch.int64).reshape(len(rows), length)
        used = torch.tensor([min(len(row), length - 1) + 1 for row in rows], dtype=torch.int64)
        mask: Tensor = (torch.arange(length) < used[:, None]).long()
        return Tokens(ids, mask, cut=[self.decode(row[length - 1 :]) for row in rows])

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids. What the vocabulary doesn't know is `<unk>`, and runs of spaces are one."""
        for id in (ids := list(map(int, ids))):
            if id not in self._names:
                raise LDMError(f"The id {id} isn't in the T5 tokenizer's vocabulary of {len(self)}.")
        return "".join(self._names[id] for id in ids).replace(SPACE, " ").strip(" ")


def check_length(length: int) -> int:
    """A number of tokens that leaves room for the end token, or LDMError."""
    if type(length) is not int or length < 1:
        raise LDMError(f"T5 can't read {length!r} tokens: max_sequence_length must be a whole number from 1 on.")
    return length


# ------------------------------------------------------------------------------------------------ the two libraries


def read_json(path: Path) -> Speller:
    """By the `tokenizers` library. Raises LDMError for a file that is broken or no T5's, ImportError without it."""
    import tokenizers

    model = read_fields(path).get("model")
    kind: Any = model.get("type", "Unigram") if isinstance(model, dict) else None
    if kind != "Unigram":
        raise LDMError(f"{path} isn't T5's kind (Unigram) but {str(kind)[:80]!r}; choose another.")
    try:
        library = tokenizers.Tokenizer.from_str(content(path).decode())
        library.encode("\U0010ffff")  # no vocabulary has it: without an unknown piece prompts would fail here and there
    except BaseException as error:  # the library raises nothing more precise, and where it panics, nothing less
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise LDMError(f"{path} can't be read by the tokenizers library ({str(error)[:200]}); {AGAIN}.") from error
    library.no_truncation()  # files that were written after use may ask for either
    library.no_padding()
    # The end token is put by `frame`, whatever template the file has.
    return Speller(lambda text: library.encode(text, add_special_tokens=False).ids, library.get_vocab())


def read_spiece(path: Path, extra: int) -> Speller:
    """By the `sentencepiece` library; `extra` tokens behind its vocabulary. Raises as `read_json` does."""
    import sentencepiece

    library = sentencepiece.SentencePieceProcessor()
    try:
        library.LoadFromSerializedProto(content(path))
    except RuntimeError as error:
        raise LDMError(f"{path} can't be read by the sentencepiece library ({str(error)[:200]}); {AGAIN}.") from error
    size = library.GetPieceSize()
    ids = {library.IdToPiece(id): id for id in range(size)}
    gaps = {f"<extra_id_{n}>": size + extra - 1 - n for n in range(extra)}
    # The library would spell these out, letter by letter.
    whole = {token: ids[token] for token in (PAD, EOS, UNK) if token in ids} | gaps

    def spell(text: str) -> list[int]:
        parts = cut_out(text, whole)
        return [id for part, special in parts for id in ([whole[part]] if special else library.EncodeAsIds(part))]

    return Speller(spell, ids | gaps)


def content(path: Path) -> bytes:
    """A file's bytes. Raises LDMError if it can't be read, or is larger than any tokenizer's."""
    return bounded(path, MOST_BYTES, "file of a tokenizer")
