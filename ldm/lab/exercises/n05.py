"""Exercises of notebook 05: attention."""

import math

import torch
import torch.nn.functional as F

from ldm.lab.check import Exercise, calling


def noise(generator, *shape):
    return torch.randn(shape, generator=generator)


# 05.1 -------------------------------------------------------------------------------------------------------


def attention(q, k, v):
    weights = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(dim=-1)
    return weights @ v


def queries_keys_values(generator):
    return noise(generator, 2, 3, 10, 16), noise(generator, 2, 3, 7, 16), noise(generator, 2, 3, 7, 16)


def as_many_words_as_places(generator):
    return noise(generator, 2, 3, 8, 16), noise(generator, 2, 3, 8, 16), noise(generator, 2, 3, 8, 16)


ATTENTION = Exercise(
    "attention(q, k, v)",
    attention,
    calling(queries_keys_values, as_many_words_as_places),
    {
        "the scores aren't divided by the root of the head's width: softmax gets too sharp.":
            lambda q, k, v: (q @ k.mT).softmax(-1) @ v,
        "the scores are divided by the width itself: a square root is missing.":
            lambda q, k, v: (q @ k.mT / q.shape[-1]).softmax(-1) @ v,
        "softmax runs over the queries: each position has to share out its attention over the keys (the last dim).":
            lambda q, k, v: (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-2) @ v,
        "keys and values are exchanged: the scores come from q and k, what is mixed is v.":
            lambda q, k, v: (q @ v.mT / math.sqrt(q.shape[-1])).softmax(-1) @ k,
        "there is no softmax: the weights of a position have to be positive and add up to 1.":
            lambda q, k, v: (q @ k.mT / math.sqrt(q.shape[-1])) @ v,
        "the division comes after the softmax; it belongs to the scores, before it.":
            lambda q, k, v: ((q @ k.mT).softmax(-1) / math.sqrt(q.shape[-1])) @ v,
        "the scores are divided by the root of the number of keys; it should be that of the head's width.":
            lambda q, k, v: (q @ k.mT / math.sqrt(k.shape[-2])).softmax(-1) @ v,
    },
)  # fmt: skip


# 05.2 -------------------------------------------------------------------------------------------------------


def split_heads(x, heads):
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


HEADS = Exercise(
    "split_heads(x, heads)",
    split_heads,
    calling(lambda g: (noise(g, 2, 6, 12), 3), lambda g: (noise(g, 1, 8, 8), 4)),
    {
        "the numbers are only poured into the new shape: a head gets a piece of the positions, where it should get a "
        "piece of the channels.":
            lambda x, heads: x.reshape(len(x), heads, x.shape[1], -1),
        "the heads are the fast part of the channels here: a head owns neighbouring channels, (heads, width) in this "
        "order.": lambda x, heads: x.unflatten(-1, (-1, heads)).permute(0, 3, 1, 2),
        "the heads stand behind the positions: (B, heads, N, width) is wanted, so that every head has a matrix.":
            lambda x, heads: x.unflatten(-1, (heads, -1)),
        "heads and width are exchanged: `heads` is how many there are.":
            lambda x, heads: x.unflatten(-1, (-1, heads)).transpose(1, 2),
    },
)  # fmt: skip


# 05.3 -------------------------------------------------------------------------------------------------------


def one_map(maps, side):
    def wide(each):
        return F.interpolate(each.mean(0)[None, None], (side, side), mode="bilinear", align_corners=False)[0, 0]

    return torch.stack([wide(each) for each in maps]).mean(0)


def of_layers(generator):
    maps = [noise(generator, heads, side, side).abs() for heads, side in ((2, 16), (4, 8), (8, 4))]
    return maps, 16


def enlarged(maps, side, each=lambda m: m.mean(0), all_of=lambda s: s.mean(0), **how):
    how = {"mode": "bilinear", "align_corners": False} | how
    return all_of(torch.stack([F.interpolate(each(m)[None, None], (side, side), **how)[0, 0] for m in maps]))


AGGREGATE = Exercise(
    "one_map(maps, side)",
    one_map,
    calling(of_layers),
    {
        "heads are summed, so that a layer with many heads counts for more: average over the heads of a layer.":
            lambda maps, side: enlarged(maps, side, each=lambda m: m.sum(0)),
        "layers are summed: average them, so that the map stays a share of the attention.":
            lambda maps, side: enlarged(maps, side, all_of=lambda s: s.sum(0)),
        "all heads of all layers are averaged together: a layer with 8 heads then counts four times one with 2. "
        "Average within each layer first.":
            lambda maps, side: torch.cat(
                [F.interpolate(m[None], (side, side), mode="bilinear")[0] for m in maps]
            ).mean(0),
        "the maps are enlarged in blocks (nearest): enlarge them bilinearly.":
            lambda maps, side: enlarged(maps, side, mode="nearest", align_corners=None),
        "the corners are aligned: positions are areas, so align_corners is False.":
            lambda maps, side: enlarged(maps, side, align_corners=True),
        "this is the largest value, not the average.":
            lambda maps, side: enlarged(maps, side, each=lambda m: m.amax(0), all_of=lambda s: s.amax(0)),
    },
)  # fmt: skip


# 05.4 -------------------------------------------------------------------------------------------------------


def hit_rate(found, mask):
    best = found.flatten().topk(int(mask.sum())).indices
    return mask.flatten()[best].float().mean()


def map_and_mask(generator):
    mask = torch.zeros(16, 16, dtype=torch.bool)
    mask[4:10, 3:9] = True
    return 0.02 * noise(generator, 16, 16).abs() + 0.03 * mask * noise(generator, 16, 16).abs(), mask


def threshold_iou(found, mask):
    seen = found > found.max() / 2
    return (seen & mask).sum() / (seen | mask).sum()


SCORE = Exercise(
    "hit_rate(found, mask)",
    hit_rate,
    calling(map_and_mask, map_and_mask),
    {
        "a threshold decides here (half of the maximum, overlap over union): one loud position would move it. Take as "
        "many of the best positions as the mask has.": threshold_iou,
        "the worst positions are taken, not the best.":
            lambda f, m: m.flatten()[f.flatten().topk(int(m.sum()), largest=False).indices].float().mean(),
        "the hits are divided by all positions of the map: divide by how many were taken.":
            lambda f, m: m.flatten()[f.flatten().topk(int(m.sum())).indices].float().sum() / m.numel(),
        "this is the share of the attention inside the mask, not of the best positions: a broad, faint map would lose.":
            lambda f, m: f[m].sum() / f.sum(),
        "the hits are counted, not their share.":
            lambda f, m: m.flatten()[f.flatten().topk(int(m.sum())).indices].float().sum(),
        "always the same number of positions is taken: take as many as the mask has, or large things are favoured.":
            lambda f, m: m.flatten()[f.flatten().topk(10).indices].float().mean(),
    },
)  # fmt: skip


EXERCISES = {"05.1": ATTENTION, "05.2": HEADS, "05.3": AGGREGATE, "05.4": SCORE}
