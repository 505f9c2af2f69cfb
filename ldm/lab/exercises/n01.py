"""Exercises of notebook 01: words into vectors."""

from collections import Counter
from itertools import pairwise

import torch
import torch.nn.functional as F

from ldm.lab.check import Exercise, calling
from ldm.text.tokenizer import merge

# 01.1 -------------------------------------------------------------------------------------------------------


def known_pairs(symbols, ranks):
    return [pair for pair in pairwise(symbols) if pair in ranks]


def merge_step(symbols, ranks):
    known = known_pairs(symbols, ranks)
    return merge(symbols, min(known, key=ranks.get)) if known else list(symbols)


def choosing(choose, joined=merge):
    """A wrong answer: another choice among the known pairs, or another way to join them."""

    def step(symbols, ranks):
        known = known_pairs(symbols, ranks)
        return joined(symbols, choose(known, ranks)) if known else list(symbols)

    return step


def learnt_first(known, ranks):
    return min(known, key=ranks.get)


def join_once(symbols, pair):
    at = list(pairwise(symbols)).index(pair)
    return [*symbols[:at], "".join(pair), *symbols[at + 2 :]]


def join_from_the_right(symbols, pair):
    turned = merge([symbol[::-1] for symbol in symbols[::-1]], (pair[1][::-1], pair[0][::-1]))
    return [symbol[::-1] for symbol in turned[::-1]]


def join_and_keep(symbols, pair):
    return ["".join(pair) if tuple(symbols[i : i + 2]) == pair else symbols[i] for i in range(len(symbols))]


def join_and_drop_the_last(symbols, pair):
    joined = merge(symbols, pair)
    return joined[:-1] if tuple(symbols[-2:]) != pair else joined


def join_known(symbols, ranks):
    joined, i = [], 0
    while i < len(symbols):
        size = 2 if tuple(symbols[i : i + 2]) in ranks else 1
        joined.append("".join(symbols[i : i + size]))
        i += size
    return joined


def join_even_unknown(symbols, ranks):
    pairs = list(pairwise(symbols))
    return merge(symbols, min(pairs, key=lambda pair: ranks.get(pair, 0))) if pairs else list(symbols)


def words_and_ranks(generator):
    """Words that tell the mistakes apart, and one of random letters under random ranks."""
    letters = "abc"
    pairs = [(x, y) for x in letters for y in letters]
    order = torch.randperm(len(pairs), generator=generator).tolist()
    random = [letters[int(k)] for k in torch.randint(3, (12,), generator=generator)]
    return [
        (["l", "o", "w", "e", "r", "s</w>"], {("e", "r"): 4, ("l", "o"): 31, ("w", "e"): 7, ("lo", "w"): 2}),
        (["n", "a", "n", "a", "n", "e", "s</w>"], {("n", "a"): 20, ("a", "n"): 25, ("n", "e"): 3}),
        (["h", "a", "a", "a", "h</w>"], {("a", "a"): 5, ("h", "a"): 9}),
        (["o", "n", "o", "n", "o", "x</w>"], {("o", "n"): 1}),
        (["x", "y", "z</w>"], {("a", "b"): 0}),
        (["a</w>"], {("a", "b"): 0}),
        (random, {pair: rank for pair, rank in zip(pairs, order, strict=True)}),
    ]


MERGE = Exercise(
    "merge_step(symbols, ranks)",
    merge_step,
    calling(words_and_ranks),
    {
        "it joins the pair that was learnt last; the smallest rank goes first, for later merges are built on earlier "
        "ones.": choosing(lambda known, ranks: max(known, key=ranks.get)),
        "it joins the first known pair from the left, wherever that stands in the list; the smallest rank decides, not "
        "the place.": choosing(lambda known, ranks: known[0]),
        "it joins the pair that is most frequent in this word. Counting is how merges are learnt; a new word only "
        "replays them by rank.": choosing(lambda known, ranks: Counter(known).most_common(1)[0][0]),
        "the right pair, but joined only where it occurs first; every occurrence belongs to the same step.":
            choosing(learnt_first, join_once),
        "the right pair, but joined from the right: of a, a, a the first two belong together.":
            choosing(learnt_first, join_from_the_right),
        "after a join its second half is still there as a symbol of its own: go on two symbols further.":
            choosing(learnt_first, join_and_keep),
        "the last symbol is lost where it isn't part of a join: the loop ends one symbol early.":
            choosing(learnt_first, join_and_drop_the_last),
        "it joins all known pairs in one sweep; one step joins one pair, or the order of the list would mean nothing.":
            join_known,
        "a pair that isn't in the list counts as rank 0 and is joined first; it must not be joined at all.":
            join_even_unknown,
    },
)  # fmt: skip


# 01.2 -------------------------------------------------------------------------------------------------------


def frame(ids, begin, end, pad, length):
    row = [begin, *ids[: length - 2], end]
    return row + [pad] * (length - len(row))


def filled(row, pad, length):
    return row + [pad] * (length - len(row))


# The second tokenizers of Stable Diffusion 2 and SDXL pad with 0, the first ones with the end token.
PROMPTS = [([7, 3, 9], 98, 99, 0, 9), ([7, 3, 9], 98, 99, 99, 9), ([], 98, 99, 0, 9),
           (list(range(1, 8)), 98, 99, 0, 9), (list(range(1, 9)), 98, 99, 0, 9),
           (list(range(1, 21)), 98, 99, 99, 9)]  # fmt: skip

FRAME = Exercise(
    "frame(ids, begin, end, pad, length)",
    frame,
    calling(*PROMPTS),
    {
        "a long prompt loses its end token: leave room for begin and end before you cut.":
            lambda ids, begin, end, pad, length: filled([begin, *ids, end], pad, length)[:length],
        "a long prompt becomes longer than `length`: the words have to be cut.":
            lambda ids, begin, end, pad, length: filled([begin, *ids, end], pad, length),
        "it is padded with the end token; that is true of Stable Diffusion 1 alone, so take `pad`.":
            lambda ids, begin, end, pad, length: filled([begin, *ids[: length - 2], end], end, length),
        "there is no end token: begin, words, end, padding. The pooled vector is read at the end token.":
            lambda ids, begin, end, pad, length: filled([begin, *ids[: length - 1]], pad, length),
        "there is no begin token: begin, words, end, padding.":
            lambda ids, begin, end, pad, length: filled([*ids[: length - 1], end], pad, length),
        "the padding stands in front; it belongs behind the end token, for every position has a vector of its own.":
            lambda ids, begin, end, pad, length: filled([begin, *ids[: length - 2], end][::-1], pad, length)[::-1],
        "the end token stands behind the padding; it belongs directly behind the last word.":
            lambda ids, begin, end, pad, length: [*filled([begin, *ids[: length - 2]], pad, length - 1), end],
        "of a long prompt the last words are kept; the first ones should be.":
            lambda ids, begin, end, pad, length:
                filled([begin, *ids[max(0, len(ids) - length + 2) :], end], pad, length),
        "the words alone are padded to `length`, and begin and end make it two longer.":
            lambda ids, begin, end, pad, length: filled([begin, *ids[:length], end], pad, length + 2),
    },
)  # fmt: skip


# 01.3 -------------------------------------------------------------------------------------------------------


def mask(q):
    return torch.full((q.shape[-2], q.shape[-2]), -torch.inf).triu(1)


def scores(q, k):
    return q @ k.mT / q.shape[-1] ** 0.5


def causal_attention(q, k, v):
    return (scores(q, k) + mask(q)).softmax(-1) @ v


def queries_keys_values(generator):
    """Unlike numbers of heads, tokens and channels, so that a wrong one is seen."""
    return tuple(2 * torch.randn(2, 3, 7, 16, generator=generator) for _ in range(3))


CAUSAL = Exercise(
    "causal_attention(q, k, v)",
    causal_attention,
    calling(queries_keys_values),
    {
        "there is no mask: each token looks ahead.": lambda q, k, v: scores(q, k).softmax(-1) @ v,
        "the mask is the wrong way round: each token sees what comes after it, and nothing before.":
            lambda q, k, v: (scores(q, k) + mask(q).mT).softmax(-1) @ v,
        "a token can't see itself, and so the first one sees nothing at all (NaN): the diagonal must stay open.":
            lambda q, k, v: (scores(q, k) + torch.full((7, 7), -torch.inf).triu(0)).softmax(-1) @ v,
        "the forbidden scores are set to 0 before the softmax, and exp(0) = 1 is still a weight: it takes minus "
        "infinity.": lambda q, k, v: scores(q, k).tril().softmax(-1) @ v,
        "the mask comes after the softmax: the weights of a token no longer sum to 1.":
            lambda q, k, v: scores(q, k).softmax(-1).tril() @ v,
        "the scores aren't divided by the square root of d: the softmax becomes nearly a choice of one.":
            lambda q, k, v: (q @ k.mT + mask(q)).softmax(-1) @ v,
        "the scores are divided by d; it is the square root of d.":
            lambda q, k, v: (q @ k.mT / q.shape[-1] + mask(q)).softmax(-1) @ v,
        "the scores are divided by the square root of the number of heads (dimension 1); d is the last dimension.":
            lambda q, k, v: (q @ k.mT / q.shape[1] ** 0.5 + mask(q)).softmax(-1) @ v,
        "the scores are divided by the square root of the number of tokens; d is the last dimension.":
            lambda q, k, v: (q @ k.mT / q.shape[2] ** 0.5 + mask(q)).softmax(-1) @ v,
        "the softmax runs over the queries (dim -2); each query's weights over the keys have to sum to 1.":
            lambda q, k, v: (scores(q, k) + mask(q)).softmax(-2) @ v,
    },
)  # fmt: skip


# 01.4 -------------------------------------------------------------------------------------------------------


EOS = 40


def at(last, place):
    return last[torch.arange(len(last)), place]


def first_end(ids, eos):
    return (ids == eos).int().argmax(dim=1)


def pool(last, ids, eos):
    return at(last, first_end(ids, eos))


def prompts(generator):
    """Prompts padded with the end token, with another id, and with ids beyond the end token's (a learnt word's)."""
    rows = []
    for pad, extra in ((EOS, 0), (0, 0), (EOS, 3)):
        ids = torch.full((3, 11), pad)
        for row, words in zip(ids, (4, 2, 7), strict=True):
            row[0], row[words + 1] = EOS - 1, EOS
            row[1 : words + 1] = torch.randint(1, EOS - 1, (words,), generator=generator)
            if extra:
                row[words] = EOS + extra
        rows.append((torch.randn(3, 11, 6, generator=generator), ids, EOS))
    return rows


def mean_to_the_end(last, ids, eos):
    inside = torch.arange(ids.shape[1]) <= first_end(ids, eos)[:, None]
    return (last * inside[..., None]).sum(1) / inside.sum(1, keepdim=True)


POOL = Exercise(
    "pool(last, ids, eos)",
    pool,
    calling(prompts),
    {
        "it reads the last position, which is padding in all but the longest prompts.":
            lambda last, ids, eos: last[:, -1],
        "it reads the last end token; where the padding is the end token too, that is padding. Take the first.":
            lambda last, ids, eos: at(last, ids.shape[1] - 1 - (ids == eos).flip(1).int().argmax(dim=1)),
        "it looks for the largest id. In CLIP's own vocabulary that is the end token, but words that are added later "
        "(textual inversion) have larger ones.": lambda last, ids, eos: at(last, ids.argmax(dim=1)),
        "it counts the ids that aren't the end token; where the padding is another id it counts that too.":
            lambda last, ids, eos: at(last, (ids != eos).sum(dim=1).clamp(max=ids.shape[1] - 1)),
        "it reads the begin token, as BERT does; behind a causal mask that one has seen nothing.":
            lambda last, ids, eos: last[:, 0],
        "it reads the last word: the end token is one position further.":
            lambda last, ids, eos: at(last, first_end(ids, eos) - 1),
        "it reads every prompt where the first one ends: each has a place of its own.":
            lambda last, ids, eos: last[:, first_end(ids, eos)[0]],
        "it averages all positions, the padding among them; CLIP reads one, the end token.":
            lambda last, ids, eos: last.mean(dim=1),
        "it averages the words; CLIP reads one position, the end token.": mean_to_the_end,
    },
)  # fmt: skip


# 01.5 -------------------------------------------------------------------------------------------------------


def logits_of(image, text, scale):
    return scale * F.normalize(image, dim=-1) @ F.normalize(text, dim=-1).T


def one_way(logits, labels=None, **options):
    return F.cross_entropy(logits, torch.arange(len(logits)) if labels is None else labels, **options)


def both_ways(logits, **options):
    return (one_way(logits, **options) + one_way(logits.T, **options)) / 2


def contrast(image, text, scale):
    return both_ways(logits_of(image, text, scale))


def pairs_of_vectors(generator):
    """Pictures and captions that go together a little, of unlike lengths."""
    shared = torch.randn(6, 16, generator=generator)
    image, text = (0.5 * shared + torch.randn(6, 16, generator=generator) for _ in range(2))
    return [(1.7 * image, 0.6 * text, scale) for scale in (5.0, 12.0)]


CONTRAST = Exercise(
    "contrast(image, text, scale)",
    contrast,
    calling(pairs_of_vectors),
    {
        "the vectors aren't normalised: long ones would win, whatever their direction.":
            lambda image, text, scale: both_ways(scale * image @ text.T),
        "they are normalised along the batch (dim 0); each vector has to have length 1 by itself.":
            lambda image, text, scale: both_ways(scale * F.normalize(image, dim=0) @ F.normalize(text, dim=0).T),
        "pictures choose captions, but captions don't choose pictures: the other direction is missing.":
            lambda image, text, scale: one_way(logits_of(image, text, scale)),
        "captions choose pictures, but pictures don't choose captions: the other direction is missing.":
            lambda image, text, scale: one_way(logits_of(image, text, scale).T),
        "the two directions are added; the loss is their mean.":
            lambda image, text, scale: 2 * contrast(image, text, scale),
        "scale divides, as a temperature would; here it is the temperature's inverse.":
            lambda image, text, scale: contrast(image, text, 1 / scale),
        "scale isn't used: cosines between -1 and 1 can't make a confident choice.":
            lambda image, text, scale: contrast(image, text, 1.0),
        "it only pulls the right pairs together: nothing pushes the others apart, and one vector for everything would "
        "do best.": lambda image, text, scale: -logits_of(image, text, scale).diag().mean(),
        "every row is told that pair 0 is right; of row k it is pair k.":
            lambda image, text, scale: both_ways(
                logits_of(image, text, scale), labels=torch.zeros(len(image), dtype=torch.long)
            ),
        "the losses are summed over the batch; the mean is meant.":
            lambda image, text, scale: both_ways(logits_of(image, text, scale), reduction="sum"),
    },
)  # fmt: skip


EXERCISES = {"01.1": MERGE, "01.2": FRAME, "01.3": CAUSAL, "01.4": POOL, "01.5": CONTRAST}
