"""CLIP's tokenizer: text -> words -> pieces -> ids (Radford et al. 2021, section 2.4; Sennrich et al. 2016).

    tokenizer = Tokenizer.from_folder("weights/scenes/tokenizer")
    tokenizer.pieces("a lighthouse")         # ["a</w>", "l", "i", "gh", "t", "house</w>"]
    tokenizer("a lighthouse").ids            # (1, 77)

1. clean       lower case, single spaces
2. split       into words: a run of letters, one digit, a run of signs, or an ending such as 's
3. spell       each word as its UTF-8 bytes, so that no text is unknown; the last symbol bears the mark `</w>`
4. join        neighbouring symbols, again and again, by the list of merges learnt in `ldm.train.vocabulary`
5. look up     each piece's id, begin with `<|startoftext|>`, end with `<|endoftext|>`, pad to 77

`clean="transformers"` equals transformers 5.23 (which is what diffusers' checkpoints are used with); `clean="original"`
equals OpenAI's `simple_tokenizer.py`, with which CLIP was trained. They differ: the original also repairs broken text
(ftfy), resolves HTML entities (`&amp;`) and knows Greek's final sigma, while transformers composes accents (NFC) and
leaves those out; the original never cuts a special token out of a run of signs, and knows it in upper case too.
One thing of transformers' isn't followed: its tables for NFC are those of Unicode 9, so it leaves newer accents in a
wrong order. Python's tables are used here: of Unicode 13 (Python 3.10) or newer.
Shapes: B prompts, L ids for each (77).
"""

import html
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from ldm.errors import LDMError
from ldm.text.tokenizer_files import BOS, END, EOS, SPECIAL, Added, read_tokenizer

CONTRACTIONS = ("'s", "'t", "'re", "'ve", "'m", "'ll", "'d")
# Unicode's White_Space, which is what `\s` means in the reference; Python's own `\s` adds U+001C to U+001F.
SPACES = re.compile(r"[^\S\x1c-\x1f]+")


def clean_transformers(text: str) -> str:
    """What transformers' CLIPTokenizer does by default: compose accents (NFC), single spaces, lower case."""
    text = SPACES.sub(" ", unicodedata.normalize("NFC", text))
    # One character at a time: str.lower() of a whole word writes a final sigma, as the original does; Rust's doesn't.
    return "".join(char.lower() for char in text)


def clean_original(text: str) -> str:
    """What OpenAI's CLIP does: repair (ftfy, where installed), HTML entities twice, single spaces, lower case."""
    if has_ftfy():
        import ftfy

        text = ftfy.fix_text(text)
    text = html.unescape(html.unescape(text)).strip()  # twice: captions from the web say "&amp;amp;"
    return SPACES.sub(" ", text).strip().lower()


def has_ftfy() -> bool:
    """Whether the package that repairs broken text ("cafÃ©" -> "café") is installed."""
    try:
        import ftfy  # noqa: F401
    except ImportError:
        return False
    return True


def kind(char: str) -> str:
    r"""The class of a character in CLIP's pattern: "L" a letter \p{L}, "N" a number \p{N}, " " a space, "*" the rest.

    Python 3.11 knows Unicode 14: a letter that is younger counts as "*", until Python is newer.
    """
    if SPACES.match(char):
        return " "
    category = unicodedata.category(char)[0]
    return category if category in "LN" else "*"


def split_words(text: str, whole: Sequence[str] = ()) -> list[str]:
    r"""Cut cleaned text into words; spaces are dropped. Strings in `whole` are kept in one piece.

    CLIP's pattern, read out: whole | 's|'t|'re|'ve|'m|'ll|'d | [\p{L}]+ | [\p{N}] | [^\s\p{L}\p{N}]+
    """
    words, start = [], 0
    while start < len(text):
        fixed = next((word for word in (*whole, *CONTRACTIONS) if text.startswith(word, start)), "")
        first, end = kind(text[start]), start + max(1, len(fixed))
        while not fixed and first != "N" and end < len(text) and kind(text[end]) == first:
            end += 1
        if first != " ":
            words.append(text[start:end])
        start = end
    return words


def byte_symbols() -> list[str]:
    """A printable character for each of the 256 bytes: its own in Latin-1 if that shows, else one from U+0100 on."""
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in shown]  # spaces, control characters, the soft hyphen
    symbols = {byte: chr(byte) for byte in shown} | {byte: chr(0x100 + n) for n, byte in enumerate(hidden)}
    return [symbols[byte] for byte in range(256)]


SYMBOLS = byte_symbols()
BYTES = {symbol: byte for byte, symbol in enumerate(SYMBOLS)}


def byte_vocabulary() -> dict[str, int]:
    """The 512 pieces that every word can be written in: a byte inside a word, a byte at its end.

    Bytes that show as themselves come first: sorting the symbols, not the bytes, gives CLIP's order.
    """
    symbols = sorted(SYMBOLS)
    return {piece: id for id, piece in enumerate(symbols + [symbol + END for symbol in symbols])}


def spell(word: str) -> list[str]:
    """A word as symbols, one for each UTF-8 byte, the last one marked: "cat" -> ["c", "a", "t</w>"]."""
    symbols = [SYMBOLS[byte] for byte in word.encode("utf-8")]
    return [*symbols[:-1], symbols[-1] + END]


def merge(symbols: Sequence[str], pair: tuple[str, str]) -> list[str]:
    """Join every occurrence of `pair`, from left to right."""
    joined, i = [], 0
    while i < len(symbols):
        size = 2 if tuple(symbols[i : i + 2]) == pair else 1
        joined.append("".join(symbols[i : i + size]))
        i += size
    return joined


def cut_out(text: str, tokens: Iterable[str]) -> list[tuple[str, bool]]:
    """Split `text` at the special tokens it spells out, the longest first: [(part, is it a token)]."""
    pattern = "|".join(re.escape(token) for token in sorted(tokens, key=len, reverse=True))
    if not pattern:
        return [(text, False)]
    return [(part, i % 2 == 1) for i, part in enumerate(re.split(f"({pattern})", text))]


def pieces_of(word: str, count: int) -> tuple[str, ...]:
    """The names of a learnt word's pieces, which are diffusers': word, word_1, word_2, ..."""
    return (word, *(f"{word}_{k}" for k in range(1, count)))


@dataclass(frozen=True)
class Tokens:
    """What a text encoder is given, and what didn't fit."""

    ids: Tensor  # (B, L) int64
    mask: Tensor  # (B, L) int64: 1 up to and with the end token, 0 on the padding
    cut: list[str]  # B texts: the end of each prompt that was cut off, "" where none was


class Tokenizer:
    """CLIP's byte-pair tokenizer. `vocab`: piece -> id; `merges`: pairs, the first learnt first.

    `added`: the tokens that are found in a prompt as they stand; bos, eos, unk and pad are always among them.
    `words`: {a learnt word: its pieces}, none but in what `with_words` has made.
    """

    def __init__(
        self,
        vocab: dict[str, int],
        merges: Sequence[tuple[str, str]],
        special: dict[str, str] | None = None,
        added: dict[str, Added] | None = None,
        max_length: int = 77,
        clean: str = "transformers",
    ):
        if clean not in ("transformers", "original"):
            raise LDMError(f"clean={clean!r} is no way to clean a prompt; use 'transformers' or 'original'.")
        if max_length < 3:
            raise LDMError(f"model_max_length is {max_length}, which leaves no room for a word; it must be 3 or more.")
        special = SPECIAL | (special or {})
        self.vocab, self.ranks = vocab, {pair: rank for rank, pair in enumerate(merges)}
        self.max_length, self.clean = max_length, clean
        self.added, self.words = dict(added or {}), {}
        self.ids = vocab | {token: one.id for token, one in self.added.items()}
        for name, token in special.items():
            if token not in self.ids:
                raise LDMError(f"The {name} token {token!r} isn't in the tokenizer's vocabulary; name one that is.")
            self.added.setdefault(token, Added(self.ids[token]))
        for pair in self.ranks:
            for piece in (*pair, "".join(pair)):
                if piece not in vocab:
                    raise LDMError(f"The merge {' '.join(pair)!r} needs {piece!r}, which the vocabulary lacks.")
        self.bos, self.eos = special["bos"], special["eos"]
        self.bos_id, self.eos_id = self.ids[self.bos], self.ids[self.eos]
        self.unk_id, self.pad_id = self.ids[special["unk"]], self.ids[special["pad"]]
        self._names = {id: piece for piece, id in self.ids.items()}
        self._raw = {token: token for token, one in self.added.items() if not one.normalized}
        self._normalized = {clean_transformers(token): token for token, one in self.added.items() if one.normalized}
        self._original: dict[str, str] = {}  # learnt words, as `clean="original"` leaves them
        self._before: dict[str, str | None] = {}  # of a learnt word's pieces, each one's predecessor
        self._seen: dict[str, list[str]] = {}  # words already joined: captions repeat theirs

    @classmethod
    def from_folder(cls, folder: str | Path, clean: str = "transformers") -> "Tokenizer":
        """Read vocab.json and merges.txt (or tokenizer.json), tokenizer_config.json and special_tokens_map.json."""
        return cls(**read_tokenizer(Path(folder)), clean=clean)

    def with_words(self, words: Mapping[str, Sequence[int]]) -> "Tokenizer":
        """Another tokenizer, which knows learnt words too, each of which stands for one or several ids.

        As in diffusers, a word is found in the cleaned text wherever it stands, inside other words too, the longest
        first. Its pieces are `word`, `word_1`, `word_2`, ...; of these `word` alone is found in a prompt, and is all
        of them. (In diffusers `word_1` is found too, and `Word` is the first piece alone, where the file says `word`.)
        """
        other = copy(self)
        other.words = {word: pieces_of(word, len(ids)) for word, ids in words.items()}
        found = {each: id for word, ids in words.items() for each, id in zip(other.words[word], ids, strict=True)}
        other.ids = self.ids | found
        other.added = self.added | {each: Added(id, normalized=True, special=False) for each, id in found.items()}
        other._names = self._names | {id: each for each, id in found.items()}
        other._normalized = self._normalized | {clean_transformers(word): word for word in words}
        other._original = {clean_original(word): word for word in words}
        other._before = {each: before for names in other.words.values() for before, each in pairwise((None, *names))}
        return other

    def __len__(self) -> int:
        """The number of ids: 49408 for CLIP."""
        return len(self.ids)

    @property
    def notice(self) -> str:
        """What a user should be told about this tokenizer, or ""."""
        if self.clean == "original" and not has_ftfy():
            return "ftfy isn't installed, so broken characters in prompts stay as they are (pip install ftfy)."
        return ""

    def pieces(self, text: str) -> list[str]:
        """The pieces of a text, special tokens that it spells out among them; nothing is cut."""
        if not isinstance(text, str):
            raise LDMError(f"A prompt must be a text, not {type(text).__name__}: {text!r}.")
        try:
            words = self._words_original(text) if self.clean == "original" else self._words(text)
            return [
                piece
                for word, is_token in words
                for piece in (self.words.get(word, (word,)) if is_token else self._join(word))
            ]
        except UnicodeEncodeError as error:
            at = ascii(error.object[error.start])
            raise LDMError(f"The prompt holds {at}, half of a surrogate pair; remove it or repair the text.") from None

    def _words(self, text: str) -> list[tuple[str, bool]]:
        """The words in transformers' order: find tokens, clean, find normalized tokens, split."""
        words = []
        for part, is_token in cut_out(text, self._raw):
            if is_token:
                words.append((part, True))
                continue
            for span, is_token in cut_out(clean_transformers(part), self._normalized):
                if is_token:
                    words.append((self._normalized[span], True))
                    continue
                # Twice, as transformers does: by CLIP's pattern, then by GPT-2's, which knows no special tokens. So an
                # upper-case <|ENDOFTEXT|> that isn't `normalized` becomes "<|", "endoftext", "|>".
                chunks = split_words(span, whole=(BOS, EOS))
                words += [(word, False) for chunk in chunks for word in split_words(chunk)]
        return words

    def _words_original(self, text: str) -> list[tuple[str, bool]]:
        """The words in OpenAI's order: clean, then split, special tokens being words like others.

        One thing isn't followed: its pattern ignores case once more, and so takes a long s (U+017F) for the s of 's
        and drops a lone iota subscript (U+0345).
        """
        tokens, words = (self.bos, self.eos), []
        for span, is_learnt in cut_out(clean_original(text), self._original):
            if is_learnt:
                words.append((self._original[span], True))
            else:
                words += [(word, word in tokens) for word in split_words(span, whole=tokens)]
        return words

    def _join(self, word: str) -> list[str]:
        """Join the symbols of a word: always the pair that was learnt first (Sennrich et al. 2016, algorithm 1)."""
        if word not in self._seen:
            symbols = spell(word)
            while len(symbols) > 1:
                first = min(pairwise(symbols), key=lambda pair: self.ranks.get(pair, len(self.ranks)))
                if first not in self.ranks:
                    break
                symbols = merge(symbols, first)
            self._seen[word] = symbols
        return self._seen[word]

    def encode(self, text: str) -> list[int]:
        """The ids of a text alone: without begin and end, neither cut nor padded."""
        return [self.ids.get(piece, self.unk_id) for piece in self.pieces(text)]

    def frame(self, ids: Sequence[int]) -> list[int]:
        """Begin, at most L - 2 ids, end, padding: L ids, which is what the text encoder reads."""
        ids = [self.bos_id, *ids[: self.max_length - 2], self.eos_id]
        return ids + [self.pad_id] * (self.max_length - len(ids))

    def __call__(self, prompts: str | Sequence[str]) -> Tokens:
        """Tokens of one prompt or of B prompts: ids (B, L). What didn't fit stands in `cut`: tell the user."""
        prompts = [prompts] if isinstance(prompts, str) else prompts
        rows = [self.encode(prompt) for prompt in prompts]
        room = self.max_length - 2
        ids = torch.tensor([self.frame(row) for row in rows], dtype=torch.int64).reshape(len(rows), self.max_length)
        used = torch.tensor([min(len(row), room) + 2 for row in rows], dtype=torch.int64)
        mask = (torch.arange(self.max_length) < used[:, None]).long()
        return Tokens(ids, mask, cut=[self.decode(row[room:]) for row in rows])

    def decode(self, ids: Iterable[int], skip_special: bool = False) -> str:
        """The text of ids. Cleaning is not undone: words come back in lower case with one space after each.

        The pieces of a learnt word are that word once, if none is missing before its end.
        """
        data, tokens = b"", [""]
        for id in map(int, ids):
            if id not in self._names:
                raise LDMError(f"The id {id} isn't in the tokenizer's vocabulary of {len(self)}.")
            tokens.append(self._names[id])
        for before, token in pairwise(tokens):
            if token in self._before:
                data += b"" if self._before[token] == before else f"{clean_transformers(token)} ".encode()
            elif not (skip_special and token in self.added and self.added[token].special):
                known = all(symbol in BYTES for symbol in token)  # an added token may be written in any letters
                data += bytes(BYTES[symbol] for symbol in token) if known else token.encode("utf-8")
        return data.decode("utf-8", errors="replace").replace(END, " ").strip()
