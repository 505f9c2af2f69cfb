# %% [markdown]
# # 01 · Words into vectors
#
# **A sentence goes in, a picture comes out, but the UNet never sees a word. What does it actually receive?**
#
# About 25 minutes to read, half a minute to run. Before it: [00](00_one_picture.ipynb). You will have learnt byte pairs
# from captions, built CLIP's text encoder by hand, seen which of its 77 vectors do the work, mixed two sentences,
# tested what the encoder has *not* learnt, and broken it in three ways.

# %%
import math
from collections import Counter
from dataclasses import replace
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F

import ldm
from ldm import scenes
from ldm.io.folders import read_fields
from ldm.io.weights import load_weights
from ldm.lab.real import real
from ldm.loading import find_model
from ldm.metrics.checker import answers
from ldm.metrics.evaluation import load_checker
from ldm.scenes.captions import GROUND_WORDS, TIME_WORDS
from ldm.text import clip
from ldm.text.tokenizer import merge, spell, split_words
from ldm.train.clip import shrink
from ldm.train.data import to_tensor
from ldm.train.vocabulary import train_vocabulary

# %%
torch.set_grad_enabled(False)  # nothing is trained here
pipe = ldm.load("scenes")
checker = load_checker(find_model("scenes"))  # a small network that reads pictures of our world


def as_drawn(pipe, sentences, seed=8):
    """How each sentence is cut up, in print, and what is drawn of it, from the same noise."""
    for sentence in sentences:
        print(f"{sentence:26}", " | ".join(pipe.tokenizer.pieces(sentence)))
    return [pipe(sentence, seed=seed, steps=10).images[0] for sentence in sentences]


def read(images):
    """What the checker sees: a dict a picture, of "left kind", "left color", "time" and so on."""
    return checker.read(to_tensor(np.stack([np.asarray(image) for image in images])))


# %%
odd = [
    "a red boat on the sea",
    "A RED Boat on the SEA",
    "sea the on boat red a",
    "a crimson boat on the sea",
    "a lighthouse on the sea",
    "a castle on the sea",
]
drawn = as_drawn(pipe, odd)
seen = [(each["left color"], each["left kind"]) for each in read(drawn)]
assert drawn[0].tobytes() == drawn[1].tobytes() and seen[0] == seen[2] == ("red", "boat")
assert seen[3][1] == "boat" and seen[3][0] != "red" and seen[4][1] == "house"
assert read(drawn[5:])[0]["left size"] != "large"
figures.pictures(
    drawn,
    [text.replace(" on", "\non") for text in odd],
    inches=1.35,
    heading="Same noise, six sentences: what of them arrives?",
)

# %% [markdown]
# Capitals make no difference, not of a single bit, and the order of the words hardly any. But a crimson boat is not
# red, a lighthouse is a house, and where the castle should be there is only sea. The print gives a reason: `crimson`
# falls into six pieces, none of them a colour, and the last piece of `lighthouse` is `house</w>`.
#
# ## Predict
#
# The UNet is given 77 vectors for every sentence. Commit yourself: in how many of the 77 do "a red house" and "a blue
# house" differ? What does the average of the two sentences' vectors draw? And if the encoder did not know at which
# position a word stands, could it still tell "a red house left of a blue boat" from "a blue boat left of a red house"?

# %%
my_guess = {"vectors that differ": None, "the average draws": None, "order without positions": None}

# %% [markdown]
# ## Derive
#
# **Pieces.** Byte-pair encoding (Sennrich et al. 2016, section 3.2; their algorithm 1 is the learning, built below)
# starts from single letters and joins, of all pairs of neighbours $(a, b)$ in its list, the one learnt first, again and
# again:
#
# $$(a, b)^* = \arg\min_{(a,b)\ \text{neighbours}} \mathrm{rank}(a, b). \tag{1}$$
#
# **Vectors.** Each piece has an id, and each id a learnt vector, a row of $E$; so has each of the 77 positions, in $P$:
#
# $$x_i = E_{\mathrm{id}_i} + P_i. \tag{2}$$
#
# **Layers.** Each lets positions read from one another, and then thinks about each by itself (Vaswani et al. 2017,
# equation 1; the norms stand in front, as in GPT-2). The mask $M$ is $0$ for $j \le i$ and $-\infty$ for $j > i$:
#
# $$A = \mathrm{softmax}\!\left(\tfrac{QK^\top}{\sqrt d} + M\right), \qquad x \leftarrow x + W_o A V, \qquad
# x \leftarrow x + \mathrm{MLP}(\mathrm{LN}(x)), \tag{3}$$
#
# with $Q, K, V$ linear in $\mathrm{LN}(x)$. Why a mask in an encoder that sees the whole sentence anyway? To keep open
# the use of a pretrained language model, say its authors (Radford et al. 2021, section 2.4). A consequence: the first
# token knows nothing, and the **end token** is the first that has read everything.
#
# **Meaning.** Nobody says what the vectors should be. A second tower turns *pictures* into vectors, and both are
# trained until each of $B$ pictures finds its caption and each caption its picture (ibid., figure 3), with unit vectors
# $u_k$ of the pictures and $v_k$ of the captions, read at the end token, and a learnt scale $s$:
#
# $$L = \tfrac12 \Big[\mathrm{CE}(s\,UV^\top) + \mathrm{CE}(s\,VU^\top)\Big], \qquad
# \text{row } k\text{'s right answer being } k. \tag{4}$$
#
# ## Build
#
# ### Pieces from letters
#
# Where does the list of (1) come from? From counting. Here it is learnt anew, from the captions of 500 pictures.


# %%
def learn(captions, count):
    """The pairs in the order learnt: join the most frequent neighbours everywhere, repeat."""
    words = Counter(word for caption in captions for word in split_words(caption))
    spelt = {word: spell(word) for word in words}  # "boat" -> b o a t</w>
    learnt = []
    while len(learnt) < count:
        pairs = Counter()
        for word, symbols in spelt.items():
            for pair in pairwise(symbols):
                pairs[pair] += words[word]
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))  # among equals, by the alphabet
        learnt.append(best)
        spelt = {word: merge(symbols, best) for word, symbols in spelt.items()}
    return learnt


captions = [scenes.caption(scenes.sample(k), 4 * k + n) for k in range(500) for n in range(4)]
learnt = learn(captions, 158)
assert learnt == train_vocabulary(captions, 512 + 158 + 2)[1], "no longer what ldm learns"
ranks = pipe.tokenizer.ranks  # of the embedded tokenizer: pair -> rank
common = len(set(learnt) & set(ranks))
assert len(ranks) == 158 and common >= 150
assert pipe.tokenizer.eos_id + 1 == 2 * 256 + 158 + 2 == 672
assert clip.TextConfig().vocab_size == 49408
print("the first six:", ", ".join("+".join(pair) for pair in learnt[:6]))
print(f"of the 158 pairs of the embedded tokenizer, {common} are found again")

# %% [markdown]
# The embedded tokenizer learnt from more captions than that, those of 12,000 pictures, by the same function. With 256
# bytes, the same 256 at the end of a word (`</w>`), 158 joined pieces and the two marks for begin and end it has 672
# pieces. CLIP's has 49,408, from far more text, by the same rule. To read a new word, the list is replayed: that is
# (1).


# %%
def merges_of(word):
    """(pieces, rank of the merge that made them), from single letters on."""
    steps = [(spell(word), None)]
    while known := [pair for pair in pairwise(steps[-1][0]) if pair in ranks]:
        first = min(known, key=ranks.get)  # (1)
        steps.append((merge(steps[-1][0], first), ranks[first]))
    return steps


def tree(ax, word):
    """Each merge a row, the new pieces coloured."""
    before = []
    for row, (pieces, rank) in enumerate(merges_of(word)):
        at = 0
        for piece in pieces:
            letters = piece.removesuffix("</w>")
            fresh = row > 0 and piece not in before
            color = figures.COLORS[4] if fresh else "#e6ebf0"
            ax.barh(-row, len(letters) - 0.12, 0.74, left=at + 0.06, color=color)
            ax.text(at + len(letters) / 2, -row, letters, ha="center", va="center", fontsize=9)
            at += len(letters)
        ax.text(at + 0.3, -row, "" if rank is None else f"pair {rank}", va="center", fontsize=8)
        before = pieces
    ax.set(xlim=(0, at + 2.6), ylim=(-9.6, 0.6))
    ax.axis("off")


# %%
several = ("watercolor", "lighthouse", "crimson")
for word in (*several, "castle", "boat", "evening", "houseboat"):
    assert merges_of(word)[-1][0] == pipe.tokenizer.pieces(word), "no longer what ldm does"
vocabulary = {word for caption in captions for word in split_words(caption)}
assert "watercolor" in vocabulary and not {"lighthouse", "crimson"} & vocabulary
rare = [word for word in vocabulary if len(pipe.tokenizer.pieces(word)) > 1]
print(f"of {len(vocabulary)} words in the captions {len(rare)} stay in pieces")
assert "evening" in rare and len(rare) < len(vocabulary) / 3
fig, axes = figures.canvas(7.6, 3.3, columns=3)
for ax, word in zip(axes, several):
    tree(ax, word)
ends = [len(merges_of(word)[-1][0]) for word in several]
figures.title(
    fig, "A frequent word grows into {} piece, words never met stop at {} and {}".format(*ends)
)
figures.show(
    fig, "Three words joined from letters, one merge a row; the last piece of lighthouse is house"
)

# %% [markdown]
# Nothing is ever unknown, for every text is made of bytes. A word in pieces is no misfortune by itself: rarer words of
# our own captions stay in pieces ("evening"), and the encoder has learnt what they mean together. Of the pieces of a
# word that it never met it has not.
#
# ### 77 numbers
#
# Begin, words, end, and then the end token again as padding: every prompt has 77 positions (CLIP's choice, and so that
# of all who use it). What is longer is cut.

# %%
tokens = pipe.tokenizer("a red house")
print("ids:", tokens.ids[0, :9].tolist(), "... and so on to", tokens.ids.shape[1])
print(
    "begin", pipe.tokenizer.bos_id, " end", pipe.tokenizer.eos_id, " padding", pipe.tokenizer.pad_id
)
long = pipe.tokenizer("a red house " * 30)
print(f"of 90 words {int(long.mask.sum()) - 2} fit; cut off: {long.cut[0][:24]}...")
assert long.ids[0, -1] == pipe.tokenizer.eos_id and int(long.mask.sum()) == 77

# %% [markdown]
# ### The text encoder
#
# Equations (2) and (3), with switches for the faults that come later.


# %%
def attend(attention, h, mask):
    """One self-attention: its output (B, L, C), and who looked at whom (B, heads, L, L)."""
    q, k, v = (
        project(h).unflatten(-1, (attention.heads, -1)).transpose(1, 2)
        for project in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    looks = (q @ k.mT / math.sqrt(q.shape[-1]) + mask).softmax(-1)  # (3), left
    return attention.out_proj((looks @ v).transpose(1, 2).flatten(2)), looks


# %%
def states(encoder, ids, positions=True, causal=True):
    """The embeddings and each layer's output, (B, L, C) each; and each layer's looks."""
    length = ids.shape[1]
    x = encoder.embeddings.token_embedding(ids)  # (2)
    if positions:
        x = x + encoder.embeddings.position_embedding.weight[:length]
    mask = torch.full((length, length), -torch.inf).triu(1) if causal else torch.zeros(1)
    hidden, looks = [x], []
    for layer in encoder.encoder.layers:
        h, look = attend(layer.self_attn, layer.layer_norm1(x), mask)
        x = x + h  # (3), middle
        x = x + layer.mlp.fc2(layer.mlp.act(layer.mlp.fc1(layer.layer_norm2(x))))  # (3), right
        hidden, looks = [*hidden, x], [*looks, look]
    return hidden, looks


def encode(encoder, ids, positions=True, causal=True, skip=0):
    """What the UNet reads, (B, 77, C): the last layer's output (or an earlier one's), normed."""
    return encoder.final_layer_norm(states(encoder, ids, positions, causal)[0][-1 - skip])


# %%
encoder, ids = pipe.text_encoder, pipe.tokenizer(odd).ids
for skip in (3, 2, 1, 0):
    mine, theirs = encode(encoder, ids, skip=skip), encoder.context(ids, skip)
    torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=0)
print(f"by hand and ldm's own: equal, up to {(mine - theirs).abs().max():.0e}")
print("6 sentences become", tuple(mine.shape), f"numbers, of size about {mine.abs().mean():.1f}")

# %% [markdown]
# That is the answer to the question: **77 vectors of 128 numbers** (768 in Stable Diffusion 1), one for each position,
# words or not. The mask shows in who looks at whom, and in which of the 77 notice that one word was exchanged.

# %%
sentence = "a large red boat on the sea at sunset"
red, blue = encode(encoder, pipe.tokenizer([sentence, sentence.replace("red", "blue")]).ids)
change = ((red - blue).norm(dim=1) / red.norm(dim=1)).numpy()  # (77,)
looks = states(encoder, pipe.tokenizer(sentence).ids)[1]
pieces = [piece.removesuffix("</w>") for piece in pipe.tokenizer.pieces(sentence)]
pieces = ["begin", *pieces, "end"]
differ = int((change > 0).sum())
assert differ == 74 and (red[:3] == blue[:3]).all(), "nothing changes before the word, bit for bit"
assert change[3] > 0.8 > change[4] > 0.4 > np.median(change[11:]) > 0.05

# %%
fig, (left, right) = figures.canvas(7.8, 3.1, columns=2, width_ratios=[1, 1.5])
first = looks[0][0].mean(0)[:11, :11]  # of the first layer, the mean of its heads
left.imshow(first, cmap=figures.RISING)
left.grid(False)
left.set_xticks(range(11), pieces, rotation=90, fontsize=7)
left.set_yticks(range(11), pieces, fontsize=7)
left.set(xlabel="is looked at", ylabel="looks")
shades = [figures.COLORS[0 if k < 11 else 5] for k in range(77)]
right.bar(range(77), 100 * change, color=shades)
for k in (3, 4, 8):
    right.text(k + 0.8, 100 * change[k] + 2, pieces[k], fontsize=9, rotation=45)
right.set(xlabel="position among the 77 (padding is paler)", ylabel="changes by, %", ylim=(0, 140))
figures.title(fig, f"One word exchanged: {differ} of 77 vectors change, and none before it")
figures.show(fig, "A triangle of attention weights; bars of how much each of 77 vectors changes")

# %%
two = encode(encoder, pipe.tokenizer(["a red house", "a blue house"]).ids)
print("a red house, a blue house:", int((two[0] != two[1]).any(dim=1).sum()), "of 77 differ")
assert (two[0] != two[1]).any(dim=1).tolist() == [False] * 2 + [True] * 75

# %% [markdown]
# The triangle is (3)'s mask. The bars show what attention is for: `boat` knows now that it is blue, and a little of it
# has got into all of the padding. (`at` is this model's own oddity: in the triangle it looks at `red`.)
#
# ## Run
#
# ### Which of the 77 does the UNet use?
#
# To find out, we draw from vectors instead of sentences, and exchange rows between the vectors of a sentence and those
# of the empty one. The loop is that of [00](00_one_picture.ipynb); the judge is the checker, on scenes of two things
# that no training picture held, where a colour counts as right only if it stands on the right side.

# %%
empty = encode(encoder, pipe.tokenizer("").ids)  # (1, 77, 128)


def draw(contexts, seeds, steps=8, s=4.0):
    """DDIM from vectors (B, 77, C)."""
    schedule = pipe.schedule(steps, sampler="ddim")
    x = ldm.Noise.from_seeds(seeds).draw((4, 16, 16)) * schedule.start_scale
    both = torch.cat([empty.expand_as(contexts), contexts])
    for level, after in zip(schedule.levels, schedule.levels[1:]):
        uncond, cond = pipe.unet(torch.cat([x, x]), level.t, both).chunk(2)
        eps = uncond + s * (cond - uncond)
        x0 = (x - level.sigma * eps) / level.alpha
        x = after.alpha * x0 + after.sigma * eps
    return pipe.decode(x)


# %%
wanted = [scenes.sample(20_000_000 + k, "held-out", n=2) for k in range(10)]
tokens = pipe.tokenizer([scenes.caption(scene, scene.seed, full=True) for scene in wanted])
full = encode(encoder, tokens.ids)  # (10, 77, 128)
truth = [answers(scene) for scene in wanted]
columns = ["place, time", "style", "kinds\nanywhere", "kinds\nin place", "colours", "sizes"]


def score(found, truth=truth):
    """Shares of right answers, one for each column; the last three each on its side."""
    both, sides = list(zip(truth, found)), ("left", "right")
    asked = [("time", "ground", "mountains"), ("style",)]
    asked += [[f"{side} {name}" for side in sides] for name in ("kind", "color", "size")]
    shares = [np.mean([true[q] == each[q] for true, each in both for q in qs]) for qs in asked]
    kinds = [[{one[f"{side} kind"] for side in sides} for one in pair] for pair in both]
    shares.insert(2, np.mean([len(true & each) / 2 for true, each in kinds]))
    return shares


# %%
def table(rows, heading):
    """Shares of right answers as a coloured table."""
    shares = np.array(list(rows.values()))
    fig, ax = figures.canvas(7.4, 0.9 + 0.36 * len(rows))
    ax.imshow(shares, cmap="cividis", vmin=0, vmax=1, aspect="auto")
    ax.grid(False)
    ax.set_xticks(range(len(columns)), columns)
    ax.set_yticks(range(len(rows)), rows)
    ax.tick_params(length=0, labeltop=True, labelbottom=False)
    for (row, column), share in np.ndenumerate(shares):
        ink = "white" if share < 0.6 else "black"
        ax.text(
            column, row, f"{100 * share:.0f} %", ha="center", va="center", fontsize=9, color=ink
        )
    figures.title(fig, heading)
    cells = [f"{name} {', '.join(f'{100 * v:.0f}' for v in row)}" for name, row in rows.items()]
    return figures.show(
        fig, f"Right, in per cent ({', '.join(columns).replace(chr(10), ' ')}): {'; '.join(cells)}"
    )


# %%
place = torch.arange(77)[None, :, None]
end = (tokens.mask.sum(dim=1) - 1)[:, None, None]  # where each caption ends
found = read(draw(full, range(10)))
whole, guess = score(found), score(found, truth[1:] + truth[:1])  # guess: another scene's picture
words = score(read(draw(torch.where(place < end, full, empty), range(10))))
padding = score(read(draw(torch.where(place < end, empty, full), range(10))))
assert min(whole) > 0.85 and np.mean(words) > 0.85
assert padding[1] > 0.7 and max(padding[3:5]) < 0.4 and padding[0] < 0.65
rows = {"all 77 vectors": whole, "the words' alone": words, "end and padding alone": padding}
rows["another scene's picture"] = guess
table(rows, "The words suffice; what stands behind them knows the style and little else")

# %% [markdown]
# The last row is the level of guessing: what the right pictures score on the questions of the next scene. What stands
# where, and in which colour, is read at the words themselves. But padding is no empty space: it has read the sentence
# too, the UNet looks at all 77 rows from everywhere, and the style of a picture can be told from padding alone. (Why
# the style and not the time of day, which concerns the whole picture as well, this experiment does not say.)
#
# ### Between two sentences
#
# Vectors can be mixed where words can't: $(1 - w)\,x_\text{red} + w\,x_\text{blue}$, row by row.

# %%
mix = torch.linspace(0, 1, 7)[:, None, None]
morph = draw((1 - mix) * red + mix * blue, [3] * 7, steps=10)
named = [each["left color"] for each in read(morph)]
pixels = np.stack([np.asarray(image, dtype=float) for image in morph])  # (7, 128, 128, 3)
redness = (pixels[..., 0] - pixels[..., 2]).mean(axis=(1, 2))
print("the checker sees:   ", ", ".join(named))
print("mean red minus blue:", *redness.round(1))
assert named[0] == "red" and named[-1] == "blue" and redness[0] > redness[3] > redness[-1]
assert set(named[3:5]) <= {"black", "purple"}
figures.pictures(
    morph,
    [f"{w:.2f} blue" for w in mix.flatten()],
    inches=1.15,
    heading="Half of “red” and half of “blue” is neither: the boat turns dark and purple between",
)

# %% [markdown]
# And where among the 77 does the colour sit? We exchange a single row, that of the word itself; then all the others.

# %%
one, others = red.clone(), blue.clone()
one[3], others[3] = blue[3], red[3]  # position 3: the colour's word
swapped = {"only the word's row is blue": one, "all rows but the word's are blue": others}
drawn = {name: draw(context.expand(5, -1, -1), range(5)) for name, context in swapped.items()}
colors = {name: [each["left color"] for each in read(images)] for name, images in drawn.items()}
for name, found in colors.items():
    print(f"{name:34}", ", ".join(found))
blues = [found.count("blue") for found in colors.values()]
assert blues[0] >= 3 and blues[1] == 0
figures.pictures(
    list(drawn.values()),
    side=["only its row", "all but its row"],
    inches=1.1,
    heading="The colour is read almost wholly at one row of 77: its own",
)

# %% [markdown]
# ### Earlier layers
#
# Stable Diffusion users know a switch called *clip skip*: take the output of an earlier layer. (diffusers and `ldm`
# count the layers left out, so 1 is the penultimate one; several programs call that same one "2".) What does each of
# our three add?

# %%
depths = {"embeddings (skip 3)": 3, "one layer (skip 2)": 2, "two layers (skip 1)": 1}
by_depth = {
    name: score(read(draw(encode(encoder, tokens.ids, skip=skip), range(10))))
    for name, skip in depths.items()
}
by_depth["three layers (skip 0)"] = whole
shares = np.array(list(by_depth.values()))
assert shares[0, 2] < 0.4 and shares[1, 2] > 0.6 and shares[1, 3] < 0.6 and shares[2, 3] > 0.75
assert shares[3, 5] > shares[2, 5] + 0.1, "sizes come last"
table(by_depth, "One layer gives things names, the second their side, the third their size")

# %% [markdown]
# A word's bare embedding says nothing to the UNet. After one layer most things are there, but no better placed than by
# chance; and so on. All this is a property of the training: this UNet has only ever read the last layer. Stable
# Diffusion 2 and SDXL were trained on the penultimate one, where it is the right choice and no trick.
#
# ### What do the vectors mean?
#
# Our text encoder began as one of CLIP's two towers. Both towers, as they were *before* the UNet's training, lie beside
# the model. Equation (4) at work on pictures that neither tower ever saw:

# %%
beside = find_model("scenes").with_name("scenes-extras")


def tower(kind, config, name):
    network = kind(config.from_json(read_fields(beside / name / "config.json")))
    return load_weights(network, [beside / name / "model.safetensors"])


text_tower = tower(clip.TextEncoder, clip.TextConfig, "clip_text")
image_tower = tower(clip.ImageEncoder, clip.VisionConfig, "clip_vision")

# %%


def texts(sentences):
    """Unit vectors (B, 128). The end token looks only back, so what stands behind it can go."""
    tokens = pipe.tokenizer(sentences)
    return F.normalize(text_tower(tokens.ids[:, : tokens.mask.sum(dim=1).max()]).pooled, dim=-1)


unseen = [scenes.sample(20_000_000 + k, "held-out", n=1) for k in range(96)]
said_of_unseen = [scenes.caption(scene, scene.seed, full=True) for scene in unseen]
images = to_tensor(np.stack([scenes.render(scene).image for scene in unseen]))  # (96, 3, 128, 128)
U = F.normalize(image_tower(shrink(images)), dim=-1)  # (96, 128)
V = texts(said_of_unseen)
cosines = U @ V.T  # (96, 96)
found = (cosines.argmax(dim=1) == torch.arange(96)).float().mean().item()
others = (cosines.sum() - cosines.trace()) / (96 * 95)
print(f"{100 * found:.0f} % of 96 pictures find their own caption")
print(f"mean cosine with it {cosines.diag().mean():.2f}, with the others {others:.2f}")
assert found > 0.85

# %%
shown = 8
assert (cosines[:shown, :shown].argmax(dim=1) == torch.arange(shown)).all()
fig, (top, ax) = figures.canvas(7.6, 3.3, rows=2, height_ratios=[1, 5.6])
strip = np.concatenate([figures.as_pixels(image) for image in images[:shown]], axis=1)
top.imshow(strip, extent=(-0.5, shown - 0.5, 0, 1), aspect="auto")
top.axis("off")
ax.imshow(cosines[:shown, :shown].T, cmap=figures.SIGNED, vmin=-1, vmax=1, aspect="auto")
ax.grid(False)
ax.set_xticks([])
ax.set_yticks(range(shown), said_of_unseen[:shown], fontsize=8)
for (row, column), value in np.ndenumerate(cosines[:shown, :shown].T.numpy()):
    ink = "white" if abs(value) > 0.6 else "black"
    ax.text(column, row, f"{value:.1f}", ha="center", va="center", fontsize=7, color=ink)
figures.title(fig, f"{100 * found:.0f} % of 96 unseen pictures find their own caption")
alt = "Cosines of eight pictures and eight captions: the diagonal is the highest"
figures.show(fig, alt, photographic=True)

# %% [markdown]
# A classifier without training follows: describe each class in words, average over the wordings (Radford et al. 2021,
# section 3.1), choose the nearest. Does a tower that finds almost all captions know what a house is?


# %%
def things(color=scenes.COLORS, kind=scenes.KINDS, more="{}"):
    return [more.format(f"{c} {k}") for c in color for k in kind]


classes = {  # question of the checker's: {answer: sentences that say it}
    "time": {o: things(more=f"a {{}} {TIME_WORDS[o][0]}") for o in scenes.TIMES},
    "ground": {o: things(more=f"a {{}} {GROUND_WORDS[o][0]}") for o in scenes.GROUNDS},
    "style": {o: things(more="a {}" if o == "plain" else f"a {{}}, {o}") for o in scenes.STYLES},
    "left color": {o: things(color=[o], more="a {}") for o in scenes.COLORS},
    "left size": {o: things(more=f"a {o} {{}}") for o in scenes.SIZES},
    "left kind": {o: things(kind=[o], more="a {}") for o in scenes.KINDS},
}

# %%
zero = {}  # the share of pictures whose nearest class is the true one
for question, sentences in classes.items():
    centres = torch.stack([F.normalize(texts(each).mean(0), dim=-1) for each in sentences.values()])
    picks = (U @ centres.T).argmax(dim=1)
    right = [list(sentences)[k] == answers(scene)[question] for k, scene in zip(picks, unseen)]
    name = question.removeprefix("left ")
    zero[name] = np.mean(right)
    print(f"{name:8} {100 * zero[name]:3.0f} %   guessing {100 / len(sentences):.0f} %")
assert min(zero[name] for name in ("time", "ground", "style", "color")) > 0.85
assert zero["kind"] < 0.45 and zero["size"] < 0.75

# %% [markdown]
# Hardly. Then what does it find captions by? Let every caption lie about one thing.


# %%
def lying(scene, name, options):
    """The scene with another colour, or another kind of thing."""
    thing = scene.things[0]
    other = options[options.index(getattr(thing, name)) - 3]
    return replace(scene, things=(replace(thing, **{name: other}),))


still = {"true": found}
for name, options in (("kind", scenes.KINDS), ("color", scenes.COLORS)):
    lies = texts([scenes.caption(lying(s, name, options), s.seed, full=True) for s in unseen])
    still[name] = ((U @ lies.T).argmax(dim=1) == torch.arange(96)).float().mean().item()
    print(f"captions with the wrong {name}: {100 * still[name]:.0f} % are found all the same")
assert still["kind"] > still["color"] + 0.25

# %%
fig, (left, right) = figures.canvas(7.6, 2.9, columns=2, width_ratios=[2, 1])
labels = [name.replace("color", "colour") for name in zero]
left.bar(labels, [100 * share for share in zero.values()], color=figures.COLORS[0])
guess = [100 / len(sentences) for sentences in classes.values()]
left.hlines(guess, np.arange(6) - 0.4, np.arange(6) + 0.4, color=figures.COLORS[4], linewidth=3)
left.text(0, guess[0] + 3, "guessing", fontsize=7, ha="center", color="white")
left.set(ylabel="chosen rightly, %", ylim=(0, 100))
right.bar(
    ["true", "wrong\nkind", "wrong\ncolour"],
    [100 * v for v in still.values()],
    color=figures.COLORS[2],
)
right.set(ylabel="captions found, %", ylim=(0, 100))
colors, kinds = (f"{100 * zero[name]:.0f} %" for name in ("color", "kind"))
figures.title(fig, f"It tells {colors} of the colours and {kinds} of the kinds of things")
figures.show(fig, "Bars: classes chosen rightly by question; captions found, true and lying")

# %% [markdown]
# This is the most important thing to know about contrastive vectors: they hold what *tells the pictures of a batch
# apart*; nothing rewards more. Colour, time, ground, mountains and style of our world suffice for that, so this small
# and briefly trained CLIP hardly learnt shapes: with a wrong kind of thing most captions are still found. (A shortcut,
# in the sense of Geirhos et al. 2020. OpenAI's CLIP chose among 32,768 pictures of everything; shapes it had to learn,
# but the order of words hardly: "bags of words", Yuksekgonul et al. 2023.)
#
# Stable Diffusion 1 freezes its text tower and lives with what contrast taught. Ours was trained on: along with the
# UNet, and for a while by itself, to answer what stands on the left and what on the right, and in which colours. The
# end token's vectors of 40 captions, before and after all that:

# %%
forty = [f"a {color} {kind}" for kind in scenes.KINDS for color in scenes.COLORS[:5]]
ids = pipe.tokenizer(forty).ids
towers = {"CLIP, trained by contrast": text_tower, "after further training": encoder}
number = torch.arange(40)
same_kind = number[:, None] // 5 == number // 5
same_color = number[:, None] % 5 == number % 5
means = []
fig, axes = figures.canvas(7.6, 3.9, columns=2)
for ax, (name, tower_) in zip(axes, towers.items()):
    vectors = tower_(ids).pooled
    vectors = F.normalize(vectors - vectors.mean(0), dim=-1)
    matrix = vectors @ vectors.T
    kind, color = matrix[same_kind & ~same_color].mean(), matrix[same_color & ~same_kind].mean()
    print(f"{name:30} mean cosine: same colour {color:.2f}, same kind {kind:.2f}")
    ax.imshow(matrix, cmap=figures.SIGNED, vmin=-1, vmax=1)
    ax.grid(False)
    ax.set_xticks([])
    ax.set_yticks(range(2, 40, 5), scenes.KINDS, fontsize=8)
    ax.set_title(name, fontsize=9)
    means.append((kind, color))
assert means[0][0] < 0.2 and means[0][1] > 0.5 and means[1][0] > 0.4 > means[1][1]
figures.title(fig, "Contrast sorts sentences by colour (stripes), what came later by kind (blocks)")
figures.show(
    fig, "Two matrices of 40 by 40 cosines: stripes of equal colour, then blocks of equal kind"
)

# %% [markdown]
# Which of the two later trainings did it, this doesn't tell.
#
# ## Break it
#
# ### No positions
#
# Attention has no order: without (2)'s $P$ a sentence should be a bag of words. Is it? Two sentences of the same words:

# %%
pair = ["a red house left of a blue boat", "a blue boat left of a red house"]
both = pipe.tokenizer(pair)
at = [1 + pipe.tokenizer.pieces(text).index("house</w>") for text in pair]  # where "house" stands
switches = {"as trained": (True, True), "no positions": (False, True)}
switches |= {"no mask": (True, False), "neither": (False, False)}
contexts = {name: encode(encoder, both.ids, *switch) for name, switch in switches.items()}
apart = {}
for name, (a, b) in contexts.items():
    apart[name] = ((a[at[0]] - b[at[1]]).norm() / a[at[0]].norm()).item()
    print(f"{name:14} the two vectors of “house” differ by {100 * apart[name]:.5f} %")
assert min(list(apart.values())[:3]) > 0.1 and apart["neither"] < 1e-5

# %%
rows = [draw(torch.stack([context[k] for context in contexts.values()]), [5] * 4) for k in (0, 1)]
seen = [read(row) for row in rows]
shows = "{left color} {left kind}, {right color} {right kind}".format_map
for name, first, second in zip(switches, *seen):
    print(f"{name:14} {shows(first):24} | {shows(second)}")
kinds = [[(each["left kind"], each["right kind"]) for each in row] for row in seen]
assert kinds[0][:2] == [("house", "boat")] * 2 and kinds[1][:2] == [("boat", "house")] * 2
gaps = [np.abs(np.asarray(a, float) - np.asarray(b, float)).mean() for a, b in zip(*rows)]
assert gaps[3] < 0.5 and min(gaps[:3]) > 5, "without positions and mask the two pictures are one"
figures.pictures(
    rows,
    list(switches),
    side=["house left of boat", "boat left of house"],
    inches=1.3,
    heading="Order goes only when positions and mask both go",
)

# %% [markdown]
# Dropping the positions alone does not do what one expects. The mask counts for them: whatever a token looks at came
# before it. (Haviv et al. 2022 found that language models trained without positions learn them all the same.) Without
# the mask alone the two pictures still differ, though neither is right. Only without both is the sentence a bag of
# words: the vectors are the same, in another order, which attention in the UNet does not see, and so are the pictures,
# up to rounding.
#
# ### No mask
#
# Without the mask a word knows what comes after it, which no word ever did in training. We exchange what follows the
# house and look at the vector of "house" itself; then at the pictures of the ten scenes.

# %%
heard = {}
for name in ("as trained", "no mask"):
    for after in ("right of a blue boat", "left of a blue tree", "left of a green boat"):
        other = encode(encoder, pipe.tokenizer(f"a red house {after}").ids, *switches[name])[0]
        a, b = contexts[name][0][at[0]], other[at[0]]
        heard[name, after] = ((a - b).norm() / a.norm()).item()
        percent = 100 * heard[name, after]
        print(f"{name:10}  a red house {after:22} changes “house” by {percent:.0f} %")
assert not any(change for (name, _), change in heard.items() if name == "as trained")
assert heard["no mask", "right of a blue boat"] > 0.2

# %%
no_positions = score(read(draw(encode(encoder, tokens.ids, positions=False), range(10))))
no_mask = score(read(draw(encode(encoder, tokens.ids, causal=False), range(10))))
assert np.mean(no_mask[3:]) < np.mean(no_positions[3:]) - 0.2 and min(no_mask[:2]) > 0.75
table(
    {"as trained": whole, "no positions": no_positions, "no mask": no_mask},
    "Without the mask things lose their side, their colour and their size",
)

# %% [markdown]
# The signature: place, time and style are right, and what belongs to one thing is not. (An encoder *trained* without a
# mask, as T5 is, does very well; the fault is to run one otherwise than it was trained. It happens where CLIP is
# rebuilt from a general transformer.)
#
# ### No end token
#
# The pooled vector, which CLIP compares and SDXL's UNet reads too, stands where the first end token stands. A long
# prompt that is cut to 77 after the end was put on has none. Then nothing stops: `argmax` of "is it the end?" gives
# position 0. Here every caption loses its end:

# %%
lost = pipe.tokenizer(said_of_unseen).ids
lost[lost == pipe.tokenizer.eos_id] = 0  # no end; 0 is Stable Diffusion 2's padding
blind = F.normalize(text_tower(lost).pooled, dim=-1)
alike = (blind @ blind.T).min().item()
found_now = ((U @ blind.T).argmax(dim=1) == torch.arange(96)).float().mean().item()
print(f"least cosine between two of 96 captions: {alike:.6f} (before: {(V @ V.T).min():.2f})")
print(f"pictures that find their caption: {100 * found_now:.0f} % (before: {100 * found:.0f} %)")
assert alike > 0.9999 and found_now < 0.05

# %% [markdown]
# The signature: all sentences have the same vector, that of the begin token, which behind the mask has seen nothing. No
# error, no warning.
#
# ## Your turn
#
# ### Exercise 01.1: one merge
# *Difficulty 2 of 5, importance 3 of 5, ten minutes.* Equation (1), once, without `merge`. `symbols` is a list of
# pieces, `ranks` maps pairs (tuples) to whole numbers. Give the new list, with every occurrence of the chosen pair
# joined, from left to right; if no pair of neighbours is known, the same pieces.


# %% tags=["exercise"]
def merge_step(symbols, ranks):
    # BEGIN SOLUTION
    known = [pair for pair in pairwise(symbols) if pair in ranks]
    if not known:
        return symbols
    first, joined = min(known, key=ranks.get), []
    for symbol in symbols:
        if joined[-1:] == [first[0]] and symbol == first[1]:
            joined[-1] += symbol  # what was joined is no longer first[0], so none overlap
        else:
            joined.append(symbol)
    return joined
    # END SOLUTION


ldm.check("01.1", merge_step)

# %% [markdown]
# ### Exercise 01.2: begin, end, padding
# *Difficulty 1 of 5, importance 4 of 5, five minutes.* From a list of ids make the row of `length` ids that the text
# encoder reads. What doesn't fit is cut; begin and end never are.


# %% tags=["exercise"]
def frame(ids, begin, end, pad, length):
    # BEGIN SOLUTION
    row = [begin, *ids[: length - 2], end]
    return row + [pad] * (length - len(row))
    # END SOLUTION


ldm.check("01.2", frame)

# %% [markdown]
# ### Exercise 01.3: look back, not ahead
# *Difficulty 3 of 5, importance 5 of 5, ten minutes.* The attention of (3) from `q`, `k`, `v`, each (B, heads, L, d),
# without `attend` and without torch's own: the output (B, heads, L, d).


# %% tags=["exercise"]
def causal_attention(q, k, v):
    # BEGIN SOLUTION
    length = q.shape[-2]
    mask = torch.full((length, length), -torch.inf).triu(1)  # (L, L): nothing above the diagonal
    return (q @ k.mT / math.sqrt(q.shape[-1]) + mask).softmax(-1) @ v
    # END SOLUTION


ldm.check("01.3", causal_attention)

# %% [markdown]
# ### Exercise 01.4: the end token
# *Difficulty 2 of 5, importance 3 of 5, five minutes.* From the last layer's output `last` (B, L, C) and `ids` (B, L)
# read each prompt's vector (B, C) at its end. The padding may be the end token itself, or another id.


# %% tags=["exercise"]
def pool(last, ids, eos):
    # BEGIN SOLUTION
    first = (ids == eos).int().argmax(dim=1)  # argmax gives the first of equals
    return last[torch.arange(len(ids)), first]
    # END SOLUTION


ldm.check("01.4", pool)

# %% [markdown]
# ### Further 01.5: contrast
# *Difficulty 3 of 5, importance 4 of 5, ten minutes.* Equation (4), from vectors of any length, `image` and `text` (B,
# J), and a number `scale`.


# %% tags=["exercise"]
def contrast(image, text, scale):
    # BEGIN SOLUTION
    logits = scale * F.normalize(image, dim=-1) @ F.normalize(text, dim=-1).T  # (B, B)
    right = torch.arange(len(logits))
    return (F.cross_entropy(logits, right) + F.cross_entropy(logits.T, right)) / 2
    # END SOLUTION


ldm.check("01.5", contrast)

# %% [markdown]
# ## The same on a real model
#
# The same functions, on Stable Diffusion 1.5: its pieces, its encoder by our hand, its pictures.

# %% tags=["real-model"]
sd = real("sd15")
if sd is not None:
    some = [odd[0], odd[3], odd[4]]
    pictures = as_drawn(sd, some)
    ids = sd.tokenizer(some).ids
    mine, theirs = encode(sd.text_encoder, ids), sd.text_encoder.context(ids)
    torch.testing.assert_close(mine, theirs, atol=1e-3, rtol=1e-3)
    print("by hand and ldm's own: equal")
    display(figures.pictures(pictures, some, inches=2.2))

# %% [markdown]
# ## Where it lives in `ldm`
#
# `ldm/train/vocabulary.py` learns the pairs; `ldm/text/tokenizer.py` replays them (`Tokenizer._join`) and frames the
# ids; `ldm/text/clip.py` holds both towers and `contrastive_loss`; `Pipeline.encode` joins them. The counterparts are
# transformers' `CLIPTokenizer` and `CLIPTextModel`, which diffusers calls in each pipeline's `encode_prompt`. All of
# the tower's forward pass:

# %%
import inspect

print(inspect.getsource(clip.TextEncoder.forward))

# %% [markdown]
# **In short.** The UNet receives 77 vectors, whatever the sentence: bytes joined by frequency, looked up, and mixed by
# a transformer that looks only back. They mean what training needed them to mean: contrast keeps what tells pictures
# apart, and later training adds what has to be drawn. Stable Diffusion 1's encoder goes the same road with 12 layers,
# 768 channels, 49,408 pieces and captions from the web; which of our findings hold there, row by row and layer by
# layer, has to be measured there. Next: [02, pictures into latents](02_latents.ipynb).
