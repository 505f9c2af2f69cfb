# %% [markdown]
# # 05 · Which word painted which pixel?
#
# **The UNet reads 77 vectors and paints 256 positions. Which of them speaks to which, and can we prove it?**
#
# About 20 minutes to read, half a minute to run. Before it: [01](01_words.ipynb), [04](04_unet.ipynb). You will have built
# cross-attention, scored its maps against true masks, and found out in which of the 77 vectors the word "red" lives.

# %%
import math

import numpy as np
import torch
import torch.nn.functional as F

import ldm
from ldm import scenes
from ldm.guidance import classifier_free, conditional, halves_together
from ldm.lab.real import real
from ldm.lab.trace import words_of
from ldm.loading import find_model
from ldm.metrics.evaluation import load_checker
from ldm.pictures import image_tensor

pipe = ldm.load("scenes")


def word_maps(pipe, prompt, seed=4, steps=10):
    """A picture, and where each of its sentence's words was looked at, over all steps."""
    trace = pipe.trace(prompt, seed=seed, steps=steps)
    words = [word for word in trace.words[0] if len(word.text) > 2]
    maps = [trace.maps(word).mean(0) for word in words]
    maps = [each / each.max() for each in maps]
    heading = "Each word has a place: attention maps of one run"
    labels = [word.text for word in words]
    return figures.heat(maps, labels, heading, over=trace.result.images[0], inches=1.25)


word_maps(pipe, "a large red house left of a small blue tree on snow")

# %% [markdown]
# Bright is where a word was looked at while the picture was painted. (Each map is stretched to its own maximum.)
#
# ## Predict
#
# Such maps are shown everywhere, and hardly ever checked. In our world the true mask of every thing is known. If we take as
# many of a map's best positions as a thing covers, which share of them will lie on the thing? (By chance: the share of the
# picture that it covers, about a tenth.) And do all layers do equally well?

# %%
my_guess = {"share that lies on the thing": None, "best layers": None}

# %% [markdown]
# ## Derive
#
# A position of the picture has a feature vector $x_i$; token $j$ of the text has a vector $c_j$. Three matrices turn them into
# a *query*, a *key* and a *value*: $q_i = W_q x_i,\ k_j = W_k c_j,\ v_j = W_v c_j$. The position looks at the tokens in
# proportion to how well key and query agree, and takes the values in these proportions (Vaswani et al. 2017, equation 1):
#
# $$A_{ij} = \frac{\exp(q_i \cdot k_j / \sqrt d)}{\sum_{j'} \exp(q_i \cdot k_{j'} / \sqrt d)}, \tag{1}$$
# $$y_i = \sum_j A_{ij}\, v_j. \tag{2}$$
#
# Each row of $A$ is a set of shares: $\sum_j A_{ij} = 1$. Column $j$, drawn as a picture, is the map of token $j$. The root of
# the width $d$ keeps the scores' spread near 1: for independent entries of variance 1, $q \cdot k$ has the variance $d$.
# Several *heads* do this side by side, each on its own slice of the channels.
#
# ## Build
#
# (1) and (2) for one layer of the UNet, from the very features that pass through it.


# %%
@torch.no_grad()
def attend(layer, x, context):
    """Cross-attention by hand: the maps (B, heads, N, 77) and the output (B, N, C)."""
    q, k, v = layer.to_q(x), layer.to_k(context), layer.to_v(context)
    q, k, v = (m.unflatten(-1, (layer.heads, -1)).transpose(1, 2) for m in (q, k, v))
    scores = q @ k.mT / math.sqrt(q.shape[-1])  # (B, heads, N, 77)
    maps = scores.softmax(dim=-1)  # (1)
    y = maps @ v  # (2)
    return maps, layer.to_out[0](y.transpose(1, 2).flatten(2))


layer = pipe.unet.up_blocks[2].attentions[0].transformer_blocks[0].attn2
caught = {}


def catch(module, args, output):
    caught.update(x=args[0], y=output)


handle = layer.register_forward_hook(catch)
prompt = "a large red house left of a small blue tree on snow"
context = pipe.encode([prompt])
x = ldm.Noise.from_seeds([4]).draw((4, 16, 16))
with ldm.watch(pipe) as seen, torch.no_grad():
    pipe.unet(x, 500, context)
handle.remove()
maps, y = attend(layer, caught["x"], context)
name = "unet.up_blocks.2.attentions.0.transformer_blocks.0.attn2"
recorded = seen.attention(name).flatten(1, 2)  # (heads, N, 77), by ldm.watch
print(
    f"output: off by {(y - caught['y']).abs().max():.1e}; rows add up to {maps.sum(-1).mean():.6f}"
)
assert torch.allclose(y, caught["y"], atol=1e-5) and torch.allclose(maps[0], recorded, atol=1e-5)

# %% [markdown]
# The UNet itself uses a fused kernel that never writes $A$ down. `ldm.watch` computes the maps beside it, from the same
# queries and keys, and changes nothing of the run; that both are one is what the last line holds.
#
# ## Run
#
# ### On true scenes, where masks are known
#
# We take 12 held-out scenes of two large things, noise their latents, and let the UNet read the caption once. No picture is
# drawn: the things are where the generator put them.

# %%
wanted, seed = [], 20_000
while len(wanted) < 12:
    scene = scenes.sample(seed, "held-out", style="plain", n=2)
    seed += 1
    if all(thing.size == "large" for thing in scene.things):
        wanted.append(scene)
truth = [scenes.render(scene) for scene in wanted]
captions = [scenes.caption(scene, scene.seed) for scene in wanted]
pixels = torch.from_numpy(np.stack([one.image for one in truth])).permute(0, 3, 1, 2) / 127.5 - 1
masks = torch.from_numpy(np.stack([one.masks for one in truth])).float()  # (12, 2, 128, 128)
masks = F.adaptive_avg_pool2d(masks, 16) > 0.5  # a position belongs to a thing if most of it does
with torch.no_grad():
    x0 = pipe.vae.encode(pixels)  # (12, 4, 16, 16)
eps = torch.randn(x0.shape, generator=torch.Generator().manual_seed(0))
texts = pipe.encode(captions)
tokens = [{word.text: word.tokens for word in words_of(pipe.tokenizer, text)} for text in captions]
print("\n".join(captions[:3]))
print(f"a thing covers {100 * masks.float().mean():.0f} % of its picture")


def look(t_index):
    """The record of one reading of all 12 noisy scenes at this row of a schedule of 20."""
    level = pipe.schedule(20, sampler="ddim")[t_index]
    with ldm.watch(pipe) as seen, torch.no_grad():
        pipe.unet(level.alpha * x0 + level.sigma * eps, level.t, texts)
    return level, seen


def score(seen, what, layer=None):
    """Of the best positions of a word's map, as many as its thing has: the share on the thing."""
    shares = []
    for k, scene in enumerate(wanted):
        for thing, mask in zip(scene.things, masks[k]):
            word = getattr(thing, what)
            if word in tokens[k]:  # some captions leave the colour out
                found = seen.map(tokens[k][word], layer=layer, picture=k)
                best = found.flatten().topk(int(mask.sum())).indices
                shares.append(mask.flatten()[best].float().mean().item())
    return float(np.mean(shares))


# %%
level, seen = look(12)
layers = [each for each in seen.layers if each.cross]
by_layer = {what: [score(seen, what, each.name) for each in layers] for what in ("kind", "color")}
together = {what: score(seen, what) for what in by_layer}
chance = masks.float().mean().item()
short = [each.name.split(".transformer")[0].removeprefix("unet.") for each in layers]
short = [
    n.replace("_blocks", "").replace(".attentions", "").replace("mid_block", "mid") for n in short
]
labels = [f"{n}\n{each.size[0]}×{each.size[1]}" for n, each in zip(short, layers)]
fig, ax = figures.canvas(7.8, 3.1)
places = np.arange(len(layers))
ax.bar(places - 0.2, by_layer["kind"], 0.38, label="word for the thing")
ax.bar(places + 0.2, by_layer["color"], 0.38, label="word for its colour", color=figures.COLORS[1])
ax.axhline(chance, color=figures.QUIET, lw=1, ls="--")
ax.text(4, chance + 0.08, "dashed: chance", ha="center", fontsize=8, color=figures.QUIET)
ax.set_xticks(places, labels, fontsize=7.5)
ax.set(ylim=(0, 1), ylabel="share on the thing")
ax.legend(frameon=False, fontsize=8, loc="upper center")
average = f"{100 * together['kind']:.0f} % (things) and {100 * together['color']:.0f} % (colours)"
figures.title(fig, f"Averaged over layers: {average} of the best positions lie on the thing")
figures.show(
    fig, "Bars for each attention layer: share of the best positions that lie on the thing"
)

# %%
fine = [k for k, each in enumerate(layers) if each.size[0] >= 8]
coarse = [k for k, each in enumerate(layers) if each.size[0] < 8]
both = f"things {together['kind']:.2f}, colours {together['color']:.2f}"
print(f"t = {level.t:g}, averaged over the layers: {both}, chance {chance:.2f}")
print(f"coarse layers, the best: {max(by_layer['kind'][k] for k in coarse):.2f}")
assert together["kind"] > 0.7 and together["color"] > 0.7 and chance < 0.12
assert max(by_layer["kind"][k] for k in coarse) < 0.3 < max(by_layer["kind"][k] for k in fine)
assert together["kind"] > max(by_layer["kind"]) - 0.1

# %% [markdown]
# The maps are not decoration: most of the best positions lie on the thing. But not every layer's. On the 4×4 grid the maps say
# next to nothing of place (a position there stands for 32×32 pixels). What these layers are for, this score doesn't tell. Here
# the average over all layers survives them; with more coarse layers it need not.
#
# How early does the network know? The same, over the noise levels.

# %%
rows = (1, 4, 8, 12, 16, 19)
levels, curve = [], {"kind": [], "color": []}
for row in rows:
    level, seen = look(row)
    levels.append(level)
    for what in curve:
        curve[what].append(score(seen, what))
fig, ax = figures.canvas(6.4, 2.7)
t = [level.t for level in levels]
ax.plot(t, curve["kind"], "o-", label="word for the thing")
ax.plot(t, curve["color"], "o-", label="word for its colour", color=figures.COLORS[1])
ax.axhline(chance, color=figures.QUIET, lw=1, ls="--")
ax.text(500, chance + 0.03, "dashed: chance", ha="center", fontsize=8, color=figures.QUIET)
ax.set(xlim=(1000, -30), ylim=(0, 1))
ax.set(xlabel="timestep (noise on the left)", ylabel="share on the thing")
ax.legend(frameon=False, fontsize=8)
figures.title(fig, f"Already at t = {t[0]:g} the words know their places")
print("timestep", "".join(f"{each:6.0f}" for each in t))
for what, line in {"things": curve["kind"], "colours": curve["color"]}.items():
    print(f"{what:8}", "".join(f"{value:6.2f}" for value in line))
assert min(curve["kind"][0], curve["color"][0]) > 4 * chance
assert curve["kind"][-1] > curve["kind"][0] and curve["color"][-1] > curve["color"][0]
figures.show(fig, "The score of both kinds of words rises as the noise falls")

# %% [markdown]
# ### On generated pictures, whose masks nobody knows
#
# There is no truth to hold these maps against, and a score would be invented. But the *sentence* makes a claim that can be
# tested: "left of". If the maps mean something, the map of the left thing must have its centre of mass further left.

# %%
sentences = [
    ("house", "tree", "a large red house left of a large blue tree on grass by day"),
    ("tree", "house", "a large blue tree left of a large red house on grass by day"),
    ("car", "flower", "a large yellow flower to the right of a large green car on sand by day"),
    ("boat", "fish", "a large white boat to the left of a large orange fish on sea by day"),
]
up = ["up_blocks.1", "up_blocks.2"]  # the layers that the bars above recommend


def centre(found):
    """The column of a map's centre of mass, its faint parts left out: 0 to 15."""
    weight = (found - found.min()).square().sum(0)
    return ((weight * torch.arange(len(weight))).sum() / weight.sum()).item()


kept, right = [], 0
for left_word, right_word, text in sentences:
    trace = pipe.trace(text, seed=0, count=2, steps=10)
    at = {word.text: word.tokens for word in trace.words[0]}
    for k in range(2):
        maps = {w: trace.record.map(at[w], layer=up, picture=k) for w in (left_word, right_word)}
        columns = {word: centre(found) for word, found in maps.items()}
        right += columns[left_word] < columns[right_word]
        print(k, " ".join(f"{word} at column {column:.1f}" for word, column in columns.items()))
    kept.append((trace.result.images[1], maps))
assert right == 8, "every map lies on the side that the sentence names"
image, maps = kept[2]
figures.heat(
    [each / each.max() for each in maps.values()], list(maps),
    "In 8 of 8 the maps lie as the sentence says", over=image, inches=1.7,
)  # fmt: skip

# %% [markdown]
# ### Where does "red" live?
#
# A map tells where a word is looked at, not what it *does*. To learn that, change something. Take two sentences that differ
# in one word, and mix their 77 vectors: at some positions those of the blue sentence, at the rest those of the red one. CLIP's
# text encoder has mixed the words already (each token has read those before it), so "boat" in the first sentence knows that
# it is red. Does the UNet care?

# %%
checker = load_checker(find_model("scenes"))


def read(images):
    """What the checker sees in each picture."""
    seen = checker.read(image_tensor(images))
    return [f"{found['left color']} {found['left kind']}" for found in seen]


@torch.no_grad()
def draw(context, count=3):
    """Pictures of one context, with guidance, whatever it was mixed from."""
    both = torch.cat([pipe.encode([""] * count), context.expand(count, -1, -1)])
    network = classifier_free(halves_together(conditional(pipe.unet, both)), 4.0)
    return pipe("mixed", count=count, seed=0, steps=10, network=network).images


red, blue = (pipe.encode([f"a large {c} boat on sea at sunset"]) for c in ("red", "blue"))
word, end = 3, 9  # <begin> a large RED boat on sea at sunset <end> <padding> ...
mixes = {
    "nothing": [],
    "the word itself": [word],
    "all other words": list(range(word + 1, end)),
    "end and padding": list(range(end, 77)),
    "all but the word": [k for k in range(77) if k != word],
}
rows, verdicts = [], {}
for name, positions in mixes.items():
    mixed = red.clone()
    mixed[:, positions] = blue[:, positions]
    rows.append(draw(mixed))
    verdicts[name] = read(rows[-1])
    print(f"from the blue sentence: {name:17} {', '.join(verdicts[name])}")
assert verdicts["the word itself"] == ["blue boat"] * 3
assert all(
    "blue" not in seen for name in mixes if name != "the word itself" for seen in verdicts[name]
)
kept_red = sum(seen.startswith("red") for seen in verdicts["all but the word"])
print(f"with its own vector alone red stays red in {kept_red} of 3")
assert kept_red < 3 and verdicts["end and padding"] == ["red boat"] * 3
heading = "Only the word's own vector turns the boat blue"
figures.pictures([row[:3] for row in rows], side=list(mixes), heading=heading, inches=1.05)

# %% [markdown]
# One vector of 77 is enough to turn all boats blue, the word's own, and no exchange that spares it makes any boat blue. But it
# doesn't do everything: where all the others contradict it (last row), red is no longer sure, and neither is the boat. In our
# captions any colour goes with any thing, which may be why; we have not tested it. Do not carry this over: Stable Diffusion's
# text encoder is deeper, has read the whole internet, and may spread a word over the tokens behind it. The experiment above is
# how to find out.
#
# And most of the attention goes to nobody at all:

# %%
with ldm.watch(pipe) as seen:
    pipe("a large red boat on sea at sunset", seed=1, steps=10)
groups = {"<begin>": [0], "8 words": list(range(1, end)), "<end> + padding": list(range(end, 77))}
share = {name: seen.map(positions).mean().item() for name, positions in groups.items()}
print(", ".join(f"{name} {100 * value:.0f} %" for name, value in share.items()))
assert abs(sum(share.values()) - 1) < 1e-5 and share["8 words"] < 0.4

# %% [markdown]
# Shares must add up to 1, so a position that needs no word has to look *somewhere*, and begin and padding are there for it. That
# need not be all they are for: in notebook [01](01_words.ipynb) the style could be told from end and padding alone.
#
# ## Break it
#
# Three faults in (1) and (2), each put into all layers of the UNet, and what becomes of the picture. The statistics that
# give them away: how sharp the maps are (the mean of each row's largest share), and whether rows add up to 1.

# %%
from ldm.models.blocks import Attention


def faulty(fault):
    """A forward method for attention layers with one fault."""

    def forward(self, x, context=None):
        k, v = self.keys_values(x if context is None else context)
        q = self.split_heads(self.to_q(x))
        root = 1.0 if fault == "no root" else math.sqrt(q.shape[-1])
        maps = (q @ k.mT / root).softmax(dim=-2 if fault == "over positions" else -1)
        sharp.append(maps.amax(-1).mean().item())
        sums.append((maps.sum(-1) - 1).abs().mean().item())
        y = maps @ (v.roll(1, dims=2) if fault == "values shifted" else v)
        return self.to_out[0](y.transpose(1, 2).flatten(2))

    return forward


@torch.no_grad()
def draw_faulty(fault, text, s=4.0, seed=3):
    """DDIM with guidance, every attention layer of the UNet with the fault."""
    layers = [module for module in pipe.unet.modules() if isinstance(module, Attention)]
    for layer in layers:
        layer.forward = faulty(fault).__get__(layer)  # laid over the class's own
    both, x = pipe.encode(["", text]), ldm.Noise.from_seeds([seed]).draw((4, 16, 16))
    schedule = pipe.schedule(12, sampler="ddim")
    for here, after in zip(schedule.levels, schedule.levels[1:]):
        uncond, cond = pipe.unet(torch.cat([x, x]), here.t, both).chunk(2)
        eps = uncond + s * (cond - uncond)
        x = after.alpha * (x - here.sigma * eps) / here.alpha + after.sigma * eps
    for layer in layers:
        del layer.forward  # and away
    return pipe.decode(x)[0]


text, drawn, signs, there = "a large red house on snow at night", {}, {}, {}
for fault in ("none", "no root", "over positions", "values shifted"):
    sharp, sums = [], []
    drawn[fault] = draw_faulty(fault, text)
    signs[fault] = float(np.mean(sharp)), float(np.mean(sums))
    there[fault] = read([drawn[fault]])[0]
    print(
        f"{fault:15} sharp {signs[fault][0]:.3f}, rows off by {signs[fault][1]:.3f}: {there[fault]}"
    )
plain = pipe(text, seed=3, steps=12, guidance=4.0, sampler="ddim").images[0]
assert np.abs(np.asarray(plain, float) - np.asarray(drawn["none"], float)).mean() < 0.5
assert signs["no root"][0] > 1.2 * signs["none"][0] and signs["over positions"][1] > 0.1
assert signs["values shifted"][1] < 1e-5 and there["none"] == "red house"
assert "red house" not in (there["over positions"], there["values shifted"])
figures.pictures(list(drawn.values()), list(drawn), heading="Three faults in attention", inches=1.6)

# %% [markdown]
# Without the root the maps are too sharp (here still a red house, misshapen). Softmax over positions breaks the sum of 1, and the
# picture. The third one is the nastiest: each token takes the value of the one before it. All maps are in order, all rows add up
# to 1, and only the picture is wrong. Statistics find what breaks a law, not what breaks the meaning.
#
# ## Your turn
#
# ### Exercise 05.1: attention
# *Difficulty 2 of 5, importance 5 of 5, ten minutes.* Write (1) and (2) for `q` (B, heads, N, d), `k` and `v` (B, heads, L, d).


# %% tags=["exercise"]
def attention(q, k, v):
    # BEGIN SOLUTION
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    return scores.softmax(dim=-1) @ v
    # END SOLUTION


ldm.check("05.1", attention)

# %% [markdown]
# ### Exercise 05.2: heads
# *Difficulty 2 of 5, importance 3 of 5, five minutes.* From `x` (B, N, C) make (B, heads, N, C/heads), each head owning
# neighbouring channels.


# %% tags=["exercise"]
def split_heads(x, heads):
    # BEGIN SOLUTION
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)
    # END SOLUTION


ldm.check("05.2", split_heads)

# %% [markdown]
# ### Exercise 05.3: one map from many
# *Difficulty 3 of 5, importance 3 of 5, ten minutes.* `maps` is a list with one tensor (heads, h, w) a layer, of several
# sizes. Average over the heads of each layer, enlarge bilinearly to (`side`, `side`), average over the layers.


# %% tags=["exercise"]
def one_map(maps, side):
    # BEGIN SOLUTION
    wide = []
    for each in maps:
        mean = each.mean(0)[None, None]  # (1, 1, h, w)
        wide.append(F.interpolate(mean, (side, side), mode="bilinear", align_corners=False)[0, 0])
    return torch.stack(wide).mean(0)
    # END SOLUTION


ldm.check("05.3", one_map)

# %% [markdown]
# ### Exercise 05.4: a score that needs no threshold
# *Difficulty 2 of 5, importance 3 of 5, five minutes.* Of the best positions of the map `found` (h, w), as many as `mask`
# (h, w) of bool has: which share lies within the mask?


# %% tags=["exercise"]
def hit_rate(found, mask):
    # BEGIN SOLUTION
    best = found.flatten().topk(int(mask.sum())).indices
    return mask.flatten()[best].float().mean()
    # END SOLUTION


ldm.check("05.4", hit_rate)

# %% [markdown]
# ## The same on a real model
#
# The same function on Stable Diffusion 1.5: words, maps and all.

# %% tags=["real-model"]
sd = real("sd15")
if sd is not None:
    display(word_maps(sd, "a photograph of a red house beside a tree in the snow", steps=15))

# %% [markdown]
# ## Where it lives in `ldm`
#
# `Attention` in `ldm/models/blocks.py` is (1) and (2), with torch's fused kernel; `UNet.prepare` computes keys and values of the
# words once, before the loop. `ldm/lab/watch.py` records the maps beside it. In diffusers the same is `Attention` with a
# *processor*, which has to be exchanged for a slower one before a map can be seen.

# %%
import inspect

print(inspect.getsource(Attention.forward))

# %% [markdown]
# **In short.** Cross-attention lets each position choose among 77 vectors. Its maps, read in the finer layers, lie on the things
# they name: measured against true masks, and on generated pictures against what the sentence claims. What a word *does* only an
# intervention tells. Next: [06, guidance](06_guidance.ipynb).
