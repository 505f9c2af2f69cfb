"""Learn a vocabulary of byte pairs from captions, in CLIP's format (Sennrich et al. 2016, algorithm 1).

Begin with every word spelled in single bytes. Count all neighbouring pairs of symbols, join the most frequent pair
everywhere, and note it down; repeat. Frequent words soon are one symbol; rare ones stay in a few pieces, and a word
never seen before can still be written, in bytes at worst. The list of pairs, in this order, *is* the tokenizer:
`Tokenizer` replays it on new text.

    h o u s e</w>   ->  h ou s e</w>   ->  h ou se</w>   ->  hou se</w>   ->  house</w>
"""

from collections import Counter
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path

from ldm.errors import LDMError
from ldm.text.tokenizer import byte_vocabulary, clean_transformers, merge, spell, split_words
from ldm.text.tokenizer_files import BOS, EOS, write_tokenizer

Pair = tuple[str, str]


def train_vocabulary(captions: Iterable[str], size: int = 672) -> tuple[dict[str, int], list[Pair]]:
    """Learn (vocab: piece -> id, merges in order) from captions; the same captions always give the same vocabulary.

    The ids, in CLIP's order: 256 bytes, 256 bytes at the end of a word, the merges, begin, end. So `size` is at least
    514; it isn't reached when no pair occurs twice any more: by then every word but the rarest is one piece.
    At 672 our captions' common words are one piece, and some rarer ones ("evening", "picture") are two to five.
    """
    vocab = byte_vocabulary()
    if size < len(vocab) + 2:
        raise LDMError(f"A vocabulary of {size} is too small: the bytes and two special tokens need {len(vocab) + 2}.")
    count = Counter(word for caption in captions for word in split_words(clean_transformers(caption)))
    spelled = {word: spell(word) for word in count}
    merges: list[Pair] = []
    while len(vocab) < size - 2:
        pairs = count_pairs(spelled, count)
        best = min(pairs, key=lambda pair: (-pairs[pair], pair), default=None)  # among equals the first in the alphabet
        if best is None or pairs[best] < 2:
            break
        merges.append(best)
        vocab["".join(best)] = len(vocab)
        spelled = {word: merge(symbols, best) for word, symbols in spelled.items()}
    for token in (BOS, EOS):
        vocab[token] = len(vocab)
    return vocab, merges


def count_pairs(spelled: dict[str, list[str]], count: Counter) -> Counter:
    """How often each pair of neighbours occurs in the captions: a word's pairs as often as the word."""
    pairs: Counter = Counter()
    for word, symbols in spelled.items():
        for pair in pairwise(symbols):
            pairs[pair] += count[word]
    return pairs


def save_vocabulary(folder: str | Path, vocab: dict[str, int], merges: list[Pair]) -> None:
    """Write the four files that `Tokenizer.from_folder` and transformers' CLIPTokenizer read."""
    write_tokenizer(folder, vocab, merges)
