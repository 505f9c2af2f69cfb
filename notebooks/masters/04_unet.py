# %% [markdown]
# # 04 · The UNet, opened
#
# **Where does the time go in, and what do the skips carry?**
#
# About 25 minutes to read, half a minute to run. Before it: [03](03_noise.ipynb); [01](01_words.ipynb) helps. You will
# have walked through the whole network by hand, bit for bit, counted what each part of it costs, silenced its parts one
# by one, and lied to it about the time.

# %%
import itertools
import math
from collections import Counter
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import ldm
from ldm import scenes
from ldm.diffusion import add_noise
from ldm.guidance import Output, classifier_free, halves_together
from ldm.lab.real import real
from ldm.loading import find_model
from ldm.metrics.evaluation import held_out, load_checker
from ldm.models.blocks import Attention, timestep_embedding
from ldm.models.unet import UNet, UNetConfig
from ldm.train.data import to_tensor

pipe = ldm.load("scenes")
unet = pipe.unet
checker = load_checker(find_model("scenes"))  # it reads what a picture shows
prompts = ["a large red boat on sea at sunset", "a small blue house on grass at night"]

# %% [markdown]
# A trained network, and three small operations on it. Each is one hook: a function that PyTorch calls as a tensor
# passes.

# %%
last = unet.up_blocks[-1].resnets[-1]  # it reads (what came up, the first skip), joined: 48 + 48
operations = {
    "untouched": None,
    "no middle": (unet.mid_block.register_forward_hook, lambda module, given, out: 0 * out),
    "no first skip": (last.register_forward_pre_hook, lambda module, given: (
        torch.cat([given[0][:, :48], 0 * given[0][:, 48:]], dim=1), given[1])),
    "told t / 4": (unet.register_forward_pre_hook, lambda module, given: (
        given[0], given[1] / 4, *given[2:])),
}  # fmt: skip
drawn = {}
for name, operation in operations.items():
    handle = operation and operation[0](operation[1])
    drawn[name] = pipe(prompts, seed=1, steps=10, guidance=3.0).images
    if handle:
        handle.remove()


# %%
def grey_levels(one, other):
    """How far two pictures are apart: the mean difference of their pixels, of 255 grey levels."""
    return np.abs(np.asarray(one, dtype=float) - np.asarray(other, dtype=float)).mean()


moved = {name: np.mean([grey_levels(*pair) for pair in zip(drawn["untouched"], images)])
         for name, images in drawn.items()}  # fmt: skip
size = {name: sum(p.numel() for p in part.parameters()) for name, part in unet.named_children()}
share = size["mid_block"] / sum(size.values())
labels = ["untouched", *(f"{name}: {moved[name]:.1f}" for name in list(drawn)[1:])]
assert moved["no middle"] < 3 < 10 < moved["told t / 4"] < 40 < moved["no first skip"]
figures.pictures(list(zip(*drawn.values())), labels, inches=1.3, heading=(
    f"{100 * share:.0f} % of the parameters can go; one tensor can not"))  # fmt: skip

# %% [markdown]
# The numbers say how far the pictures moved, in grey levels of 255. The middle block, the deepest point of the network,
# can go, and one has to look hard to see it. The first of six skips can not. And a network that is told a quarter of
# the true time draws a clean picture of something that nobody asked for.
#
# ## Predict
#
# The network has three levels, of 16 x 16, 8 x 8 and 4 x 4 positions. Before you go on: how much of its parameters sits
# at the coarsest level, and how much of its work? Which is worse, to tell it of more noise than there is, or of less?
# (Nothing checks this cell; it is for you.)

# %%
my_guess = {"parameters at 4 x 4, %": None, "work at 4 x 4, %": None, "worse": None}

# %% [markdown]
# ## Derive
#
# **The time** is one number, $t$, and the same weights have to be a thousand denoisers. A number alone is a poor input:
# a network of smooth functions hardly tells 500 from 501. So $t$ is shown on a row of clocks, each slower than the one
# before (Vaswani et al. 2017, section 3.5; Ho et al. 2020, appendix B). With $d$ numbers and $j = 0, \dots, d/2 - 1$:
#
# $$e = [\cos \omega_j t, \; \sin \omega_j t], \qquad \omega_j = 10000^{-j/(d/2)}. \tag{1}$$
#
# Two linear layers make the *embedding* of it, $m = W_2\,\mathrm{silu}(W_1 e)$, once for the whole network. (Biases are
# left out here.) It goes into every **ResNet block**, between its two convolutions, as one number for each channel,
# added at all positions alike (Ho et al. 2020, appendix B):
#
# $$\begin{aligned} h &= \mathrm{conv}_1(\mathrm{silu}(\mathrm{norm}_1(x))) + W\,\mathrm{silu}(m), \\
# y &= S x + \mathrm{conv}_2(\mathrm{silu}(\mathrm{norm}_2(h))). \end{aligned} \tag{2}$$
#
# $S x$ is $x$ where input and output have as many channels, and a convolution of width 1 otherwise. **The norm** gives
# each group $g$ of neighbouring channels of *one* picture mean 0 and variance 1, over its channels and all positions,
# then scales and shifts every channel (Wu & He 2018, section 3.1):
#
# $$\mathrm{norm}(x)_c = w_c \, (x_c - \mu_g) / \sqrt{v_g + \varepsilon} + b_c. \tag{3}$$
#
# **The skips.** On the way down every output is kept; each block of the way up reads $[h, s]$, what comes from below
# joined with the last one kept that is not used yet (Ronneberger et al. 2015). Why must they be there? Solve $x_t =
# \alpha x_0 + \sigma \epsilon$ for what the network is asked for:
#
# $$\epsilon = (x_t - \alpha x_0) / \sigma. \tag{4}$$
#
# The answer *contains its input*, to the last position. The noise has no structure that could be summed up at 4 x 4: a
# copy of $x_t$ has to arrive at the end, and only $x_0$ is worth thinking about. (5) says what thinking costs, for a
# convolution of width $k$ at $H \times W$ positions; a linear layer is $k = 1$:
#
# $$\text{parameters} = k^2 C_{in} C_{out}, \qquad \text{multiply-adds} = k^2 C_{in} C_{out} \cdot H W. \tag{5}$$
#
# ## Build
#
# ### A row of clocks


# %%
def waves(t, width, period=10000):
    """(1): timesteps (B,) -> (B, width)."""
    j = torch.arange(width // 2)  # (width/2,)
    angle = t[:, None] * torch.exp(-math.log(period) * j / (width // 2))  # (B, width/2)
    return torch.cat([angle.cos(), angle.sin()], dim=-1)


width = unet.config.block_out_channels[0]  # 48: as many numbers as the first level has channels
times = torch.arange(1000)
clocks = waves(times, width)
assert torch.equal(clocks, timestep_embedding(times, width)), "no longer what ldm computes"
alike = clocks @ clocks.T / (width // 2)  # 1 with itself: cos² + sin² = 1 at each frequency
far = (alike.diagonal(d).max() - alike.diagonal(d).min() for d in range(1000))
assert max(far) < 1e-3, "how alike two times are depends on their distance alone"
slowest = clocks[:, -1]  # the last of the sines (of its cosine the first steps round to 0)
assert (slowest[1:] > slowest[:-1]).all(), "the slowest clock never turns back"

# %%
fig, (left, right) = figures.canvas(8.4, 3.1, columns=2, width_ratios=(1.6, 1))
left.imshow(clocks.T, cmap=figures.SIGNED, aspect="auto", vmin=-1, vmax=1, interpolation="nearest")
left.set_yticks((12, 36), ("24 cosines", "24 sines"), rotation=90, va="center")
left.set_xlabel("timestep")
left.grid(False)
for numbers, label in ((320, "320 numbers (SD 1.5)"), (width, f"{width} numbers (ours)")):
    likeness = waves(times, numbers)[1:] @ waves(times, numbers)[0] / (numbers // 2)
    right.plot(times[1:], likeness, label=label)
right.set(xlabel="steps apart", ylabel="likeness (1 is equal)", xscale="log")
right.legend(frameon=False, fontsize=8, loc="lower left")
assert (alike[0, 1:] < 0.98).all() and alike[0, 1] > alike[0, 10] > alike[0, 100] > alike[0, 600]
figures.title(fig, "Fast clocks tell neighbours apart, slow ones tell early from late")
figures.show(fig, "Left: 48 waves over 1000 timesteps. Right: likeness falls with distance")

# %% [markdown]
# ### The block
#
# (3) and (2), from the parts of one of the network's own blocks: the first of the way down's second level, where 48
# channels become 96. Its input is what really arrives there: a noisy latent of a picture that no training has seen.

# %%
wanted = held_out(8)
truth = to_tensor(np.stack([scenes.render(scene).image for scene in wanted]))  # (8, 3, 128, 128)
with torch.no_grad():
    x0 = pipe.vae.encode(truth)  # (8, 4, 16, 16)
    context = pipe.encode([scenes.caption(scene, scene.seed) for scene in wanted])  # (8, 77, 128)
eps = torch.randn(x0.shape, generator=torch.Generator().manual_seed(4))
table = pipe.schedule(10)


def noisy(t):
    """The eight latents with the noise of time t: what training showed the network."""
    level = table.at(0, t)
    return add_noise(x0, eps, level.alpha, level.sigma)


# %%
def group_norm(x, norm):
    groups = x.unflatten(1, (norm.num_groups, -1))  # (B, G, C/G, H, W)
    mean = groups.mean((2, 3, 4), keepdim=True)
    var = groups.var((2, 3, 4), keepdim=True, correction=0)
    y = ((groups - mean) / (var + norm.eps).sqrt()).flatten(1, 2)
    return y * norm.weight[:, None, None] + norm.bias[:, None, None]  # (3)


def resnet(block, x, emb):
    h = block.conv1(F.silu(group_norm(x, block.norm1)))
    h = h + block.time_emb_proj(F.silu(emb))[:, :, None, None]  # one number a channel
    h = block.conv2(F.silu(group_norm(h, block.norm2)))
    return (block.conv_shortcut(x) if block.conv_shortcut else x) + h  # (2)


block, arrived = unet.down_blocks[1].resnets[0], {}
handle = block.register_forward_hook(lambda _, given, out: arrived.update(given=given, out=out))
with torch.no_grad():
    unet(noisy(400), 400, context)
    mine = resnet(block, *arrived["given"])
handle.remove()
off = (mine - arrived["out"]).abs().max().item()
assert off < 1e-4 and arrived["out"].abs().max() > 1
print(f"By hand and ldm's: at most {off:.0e} apart; values reach {arrived['out'].abs().max():.1f}.")

# %% [markdown]
# ### Down, across and up
#
# The rest is order: what is kept, and who reads it. Three loops over the network's own modules.


# %%
def down(unet, x, emb, context, say=lambda *what: None):
    """The way down. Every output is kept; the last one goes on."""
    skips = [unet.conv_in(x)]  # (B, 48, 16, 16)
    say("conv_in", skips[-1], "kept")
    for n, level in enumerate(unet.down_blocks):
        for i, block in enumerate(level.resnets):
            h = block(skips[-1], emb)
            h = level.attentions[i](h, context) if level.attentions else h
            skips.append(h)
            say(f"down {n}", h, "kept")
        if level.downsamplers:
            skips.append(level.downsamplers[0](h))  # (B, C, H/2, W/2)
            say(f"down {n}, halved", skips[-1], "kept")
    return skips


def middle(unet, h, emb, context):
    h = unet.mid_block.resnets[0](h, emb)
    return unet.mid_block.resnets[1](unet.mid_block.attentions[0](h, context), emb)


def join(h, skip):
    return torch.cat([h, skip], dim=1)


# %%
def up(unet, h, skips, emb, context, join=join, say=lambda *what: None):
    """The way up. Each block takes the last of the skips that are left."""
    skips = list(skips)
    for n, level in enumerate(unet.up_blocks):
        for i, block in enumerate(level.resnets):
            reads = f"reads {h.shape[1]} from below, {skips[-1].shape[1]} kept"
            h = block(join(h, skips.pop()), emb)
            h = level.attentions[i](h, context) if level.attentions else h
            say(f"up {n}", h, reads)
        if level.upsamplers:
            h = level.upsamplers[0](h, skips[-1].shape[2:])  # (B, C, 2H, 2W)
            say(f"up {n}, doubled", h)
    return h


# %%
@torch.no_grad()
def forward(unet, x, t, context, clocks=waves, edit=None, join=join, say=lambda *what: None):
    """The whole UNet. `clocks`, `edit` and `join` are where we shall break it."""
    times = torch.as_tensor(t, device=x.device).expand(len(x))
    emb = unet.time_embedding(clocks(times, unet.config.block_out_channels[0]))  # (B, 192)
    skips = down(unet, x, emb, context, say)
    h = middle(unet, skips[-1], emb, context)
    say("middle", h)
    skips, h = edit(skips, h) if edit else (skips, h)
    h = up(unet, h, skips, emb, context, join, say)
    return unet.conv_out(F.silu(unet.conv_norm_out(h)))  # (B, 4, 16, 16)


def tell(name, h, more=""):
    print(f"{name:16}{' x '.join(map(str, h.shape[1:])):>14}   {more}")


mine = forward(unet, noisy(400), 400, context, say=tell)
with torch.no_grad():
    theirs = unet(noisy(400), 400, context)
assert torch.equal(mine, theirs), "the loops above are no longer what ldm does"
print("\nThe loops and the network agree, bit for bit.")

# %% [markdown]
# Read the column of sizes: 16, 8, 4 and back. Six tensors are kept, and the six blocks of the way up take them from the
# last to the first. Each level of the way up has one block more than its partner on the way down: it takes what the
# strided convolution (or, on the finest level, the first one) has left.
#
# ## Run
#
# ### What it costs
#
# Parameters and multiply-adds of every part, by (5), counted as the network runs. Attention adds two products of
# matrices to its linear layers: each of N positions with each of L others (or 77 tokens) over C channels, and the same
# again for the mixing, 2NLC. Beside ours stands Stable Diffusion 1.5's network, built from its configuration on
# PyTorch's `meta` device, where tensors have shapes and no numbers: nothing is downloaded, and it takes no memory.


# %%
def part_of(name):
    """down_blocks.0.resnets.1.conv1 -> down 0"""
    words = name.split(".")
    return f"{words[0].split('_')[0]} {words[1]}" if "_blocks" in words[0] else words[0]


def cost(unet, x, context):
    """Parameters, and multiply-adds of one run, of every part."""
    numbers, work, hooks = Counter(), Counter(), []

    def count(part, module, given, out):
        if isinstance(module, Attention):
            source = given[0] if given[1] is None else given[1]  # itself, or the text
            work[part] += 2 * out.numel() * source.shape[1]
        else:
            work[part] += out.numel() * module.weight[0].numel()  # (5)

    for name, module in unet.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear | Attention):
            hooks.append(module.register_forward_hook(partial(count, part_of(name))))
    forward(unet, x, 400, context)
    for hook in hooks:
        hook.remove()
    for name, parameter in unet.named_parameters():
        numbers[part_of(name)] += parameter.numel()
    return numbers, work


# %%
with torch.device("meta"):
    sd15 = UNet(UNetConfig(cross_attention_dim=768))  # the other defaults are SD 1.5's
    sd_cost = cost(sd15, torch.empty(1, 4, 64, 64), torch.empty(1, 77, 768))
costs = {"ours": cost(unet, noisy(400)[:1], context[:1]), "SD 1.5": sd_cost}
assert [sum(each.values()) for each in sd_cost] == [859_520_964, 401_636_720_640]
for name, (numbers, work) in costs.items():
    print(f"{name:7}{sum(numbers.values()):12,} parameters{sum(work.values()):16,} multiply-adds")

# %%
fig, axes = figures.canvas(8.6, 3.3, columns=2, width_ratios=(7, 9))
finest, coarsest = {}, {}
for ax, (name, both) in zip(axes, costs.items()):
    parts = [part for part in both[0] if part.split()[0] in ("down", "mid_block", "up")]
    share = [{part: 100 * each[part] / sum(each.values()) for part in parts} for each in both]
    places = np.arange(len(parts))
    ax.bar(places - 0.2, share[0].values(), 0.4, label="of the parameters")
    ax.bar(places + 0.2, share[1].values(), 0.4, label="of the multiply-adds")
    ax.set_xticks(places, [part.replace("_block", "dle").replace(" ", "\n") for part in parts])
    ax.set_ylabel(f"{name}, %")
    bottom = len(parts) // 2
    finest[name] = [each[parts[0]] + each[parts[-1]] for each in share]
    coarsest[name] = [sum(each[part] for part in parts[bottom - 1 : bottom + 2]) for each in share]
axes[0].legend(frameon=False, fontsize=8)
(p, w), (sd_p, sd_w) = finest.values()
assert p < 10 and sd_p < 10 and w > 30 and sd_w > 30
figures.title(fig, f"The finest level: {p:.0f} % (ours) and {sd_p:.0f} % (SD) of the parameters, "
                   f"{w:.0f} and {sd_w:.0f} % of the work")  # fmt: skip
figures.show(fig, "Bars for each part: parameters gather at the bottom, multiply-adds at the rims")

# %%
for name, (parameters, work) in coarsest.items():
    print(f"{name:7} coarsest level with the middle: "
          f"{parameters:4.1f} % of the parameters, {work:4.1f} % of the work")  # fmt: skip
    assert work < parameters / 2

# %% [markdown]
# (5) says why: a convolution uses each of its parameters once a position, 256 times a run at 16 x 16 and 16 times at 4
# x 4. Whoever wants a *smaller file* saves at the bottom of the U, whoever wants a *faster run* at its rims.
#
# ### What it sees
#
# The same run, looked at: the channels of each level that vary most, half-way through the steps. The function works for
# any model of `ldm`, and comes back at the end.


# %%
def last_bricks(unet):
    """The last layer of every level, in the order they run."""
    levels = {f"down {n}": level for n, level in enumerate(unet.down_blocks)}
    levels |= {f"up {n}": level for n, level in enumerate(unet.up_blocks)}
    bricks = {name: (level.attentions or level.resnets)[-1] for name, level in levels.items()}
    return {"conv_in": unet.conv_in, **bricks, "middle": unet.mid_block}


def mosaic(pipe, prompt, steps=10, columns=9, seed=1):
    """Feature maps of every level, half-way through a run: the channels that vary most."""
    seen = {}
    hooks = [brick.register_forward_hook(lambda m, x, out, name=name: seen.update({name: out[-1]}))
             for name, brick in last_bricks(pipe.unet).items()]  # fmt: skip
    taken = list(itertools.islice(pipe.steps(prompt, seed=seed, steps=steps), steps // 2))
    for hook in hooks:
        hook.remove()
    fig, axes = figures.canvas(8.4, 0.95 * len(seen) + 0.3, rows=len(seen), columns=columns)
    for (name, maps), line in zip(seen.items(), axes):
        most = maps.std((1, 2)).argsort(descending=True)[:columns]
        for ax, picture in zip(line, maps[most]):
            ax.imshow(picture.float().cpu(), cmap="gray", interpolation="nearest")
            ax.set(xticks=[], yticks=[])
            ax.spines[:].set_visible(False)
        line[0].set_ylabel(f"{name}\n{maps.shape[1]} x {maps.shape[2]}", fontsize=8)
    t = pipe.schedule(steps)[taken[-1].i].t
    figures.title(fig, f"From noise to areas and back: “{prompt}”, t = {t:.0f}")
    return figures.show(fig, "Feature maps of each level: noise, coarse areas, noise again")


mosaic(pipe, prompts[0])

# %% [markdown]
# The first row is noise with a hint of a boat. On the way down boat, horizon and sky become areas; at the bottom 16
# positions are left. On the way up the areas get their edges back, and the last row is noise again. It has to be, by
# (4).
#
# ### What the skips carry
#
# The prediction is compared with the noise that is truly in the latents, over our eight pictures. Then one skip at a
# time is replaced by zeros, and last the middle.

# %%
names = ["conv_in", "down 0", "0 halved", "down 1", "1 halved", "down 2", "middle"]


def without(k):
    """An edit that silences skip k; number 6 is the middle."""

    def edit(skips, h):
        skips = [0 * skip if i == k else skip for i, skip in enumerate(skips)]
        return skips, 0 * h if k == len(skips) else h

    return edit


def error(prediction, truth=eps):
    return (prediction - truth).pow(2).mean().item()


grid = (20, 120, 300, 600, 900)
rows = np.array([[error(forward(unet, noisy(t), t, context, edit=edit)) for t in grid]
                 for edit in (None, *map(without, range(7)))])  # fmt: skip

# %%
fig, ax = figures.canvas(7.2, 3.4)
ax.imshow(np.log10(rows / rows[0]), cmap=figures.RISING, aspect="auto", vmin=0, vmax=1)
for r, c in np.ndindex(rows.shape):
    ax.text(c, r, f"{rows[r, c]:.3f}", ha="center", va="center", fontsize=8,
            color="black" if rows[r, c] > 5 * rows[0, c] else "white")  # fmt: skip
ax.set_xticks(range(len(grid)), [f"t = {t}" for t in grid])
ax.set_yticks(range(8), ["nothing silenced", *names])
ax.grid(False)
assert (rows[1] > 0.9).all(), "without the first skip the noise is not known at all"
assert (rows[2:, 3:] < 0.1).all(), "where noise is strong, each of the others can go"
assert (rows[5:] < 1.15 * rows[0]).all(), "the deepest are hardly missed"
assert rows[4, 2] > 1.4 * rows[0, 2] and rows[2, 0] > 1.4 * rows[0, 0], "those between are"
figures.title(fig, "Mean squared error of the predicted noise: the first skip carries it")
figures.show(fig, "A table of errors: the row of the first skip is far above all others")

# %% [markdown]
# An error of 1 is what one makes who answers every question with zero, for $\epsilon$ has variance 1. So without the
# first skip the network knows nothing of the noise. (Look at the first column as well: at t = 20 even the whole network
# is bad. So little noise is left that it can hardly be told from the picture.) The skips between, "down 0" to "down 1",
# are missed where the *picture* has to be known to the pixel. The two deepest ("1 halved", "down 2") and the middle
# hardly are.
#
# But zeros are something that a block has never seen, and the error might be mere confusion. A fairer test gives it
# something real: the skip of *another picture*, with other noise. Whose noise does the network then report?

# %%
turned = torch.arange(8).roll(1)


def exchanged(k):
    """An edit that gives every picture its neighbour's skip k."""

    def edit(skips, h):
        skips = [skip[turned] if i == k else skip for i, skip in enumerate(skips)]
        return skips, h[turned] if k == len(skips) else h

    return edit


print("t = 900, the neighbour's ...   error against one's own noise   against the neighbour's")
for k, name in enumerate(names):
    prediction = forward(unet, noisy(900), 900, context, edit=exchanged(k))
    own, other = error(prediction), error(prediction, eps[turned])
    print(f"{name:>28}{own:32.3f}{other:26.3f}")
    assert (other < 0.1 < 1.5 < own) if k == 0 else (own < 0.1 < 1.5 < other)

# %% [markdown]
# The network reports the noise of the picture whose *first skip* it was given. That is (4): a copy of $x_t$ takes the
# short way, and all the rest of the network works out what to take off it.
#
# And in the pictures? One part is silenced at every step; below stands how far the picture moved, in grey levels.


# %%
def draw(network, prompts=prompts, steps=10, s=3.0, seed=1):
    """Pictures with a network of our own, (x, t, context) -> eps, in the UNet's place."""
    words = pipe.encode([""] * len(prompts) + prompts)  # (2B, 77, 128)
    halves = halves_together(lambda x, level: Output(network(x, level.t, words)))
    return pipe(prompts, seed=seed, steps=steps, network=classifier_free(halves, s)).images


def as_tensor(images):
    return to_tensor(np.stack([np.asarray(image) for image in images]))  # (B, 3, H, W)


def moves(images):
    """How far pictures are from the untouched ones, in grey levels."""
    return [grey_levels(*pair) for pair in zip(images, drawn["untouched"])]


assert max(moves(draw(partial(forward, unet)))) < 0.1, "our loops draw the same pictures"
strip = {name: draw(partial(forward, unet, edit=without(k))) for k, name in enumerate(names)}
distance = {name: moves(images) for name, images in strip.items()}
labels = [[f"{name}: {distance[name][row]:.1f}" for name in names] for row in range(2)]
assert min(distance["conv_in"]) > 40 and max(distance["middle"] + distance["down 2"]) < 3
assert min(distance["down 1"] + distance["0 halved"]) > 8, "the things in the picture change"
title = "All hangs on the first skip; on the deepest and the middle, next to nothing"
figures.pictures(list(zip(*strip.values())), labels, inches=1.05, heading=title)

# %% [markdown]
# What of this holds for Stable Diffusion? That the finest skips carry the noise is (4), and holds for every network
# that predicts $\epsilon$. That the middle does next to nothing is first of all a fact about ours: in so simple a world
# 4 x 4 positions have little to add. But Kim et al. 2024 (BK-SDM) found much the same there, and left the middle out of
# their smaller models altogether.
#
# ### Where the time goes in
#
# The shift in (2) is `time_emb_proj`, in each of eleven blocks. The part of it that never changes is a mere bias; what
# moves with $t$ is the clock. Here it is measured against what it is added to.

# %%
blocks = {name: module for name, module in unet.named_modules() if hasattr(module, "time_emb_proj")}
grid = (20, 120, 250, 400, 550, 700, 850, 980)
spread, ratios = {}, []
with torch.no_grad():
    emb = unet.time_embedding(waves(times, width))  # (1000, 192)
    shifts = {name: block.time_emb_proj(F.silu(emb)) for name, block in blocks.items()}  # (1000, C)
moving = {name: shift - shift.mean(0) for name, shift in shifts.items()}


def measure(name):
    return lambda module, given, h: spread.update({name: h.std((0, 2, 3))})


hooks = [block.conv1.register_forward_hook(measure(name)) for name, block in blocks.items()]
for t in grid:
    forward(unet, noisy(t)[:6], t, context[:6])
    ratios.append([(moving[name][t].norm() / spread[name].norm()).item() for name in blocks])
for hook in hooks:
    hook.remove()
ratios = np.array(ratios).T  # (11 blocks, 8 times)

# %%
fig, ax = figures.canvas(7.2, 3.6)
ax.imshow(ratios, cmap=figures.RISING, aspect="auto", vmin=0, vmax=2)
for r, c in np.ndindex(ratios.shape):
    ax.text(c, r, f"{ratios[r, c]:.1f}", ha="center", va="center", fontsize=8,
            color="black" if ratios[r, c] > 1.2 else "white")  # fmt: skip
ax.set_xticks(range(len(grid)), [f"t = {t}" for t in grid])
short = [part_of(name).replace("_block", "dle") + f", block {name[-1]}" for name in blocks]
ax.set_yticks(range(len(blocks)), short)
ax.grid(False)
rims, bottom = ratios[[0, -2, -1]].mean(), ratios[2:7].mean()
assert rims > 2.5 * bottom and ratios[-1, [0, -1]].min() > 2.5 * ratios[-1, 4]
figures.title(fig, f"Clock to signal: {rims:.1f} at the rims of the U, {bottom:.1f} at its bottom")
figures.show(fig, "A table of ratios: largest in the first and last blocks, at both ends of time")

# %% [markdown]
# Over all times, the clock is about as loud as the picture at the rims, and loudest at the two ends of the schedule.
# For the clean end (4) suggests why: $1/\sigma$ of $x_t$ is handed on, and that depends on the time and on nothing
# else. For the noisy end, where $1/\sigma$ hardly changes, it gives no reason.
#
# ### What the network thinks the noise level is
#
# Now it is lied to: latents with the noise of one time, and word of another. The noise that it claims to see has the
# size $\sigma_{told}$ times its prediction's. If it believed what it is told, the curves on the right would lie on the
# grey diagonal; if it looked for itself, each would be flat.

# %%
grid = (20, 120, 250, 400, 600, 800, 980)
sigma = np.array([table.at(0, t).sigma for t in grid])
wrong, claimed = np.zeros((2, len(grid), len(grid)))
for i, true in enumerate(grid):
    for j, told in enumerate(grid):
        prediction = forward(unet, noisy(true)[:6], told, context[:6])
        wrong[i, j] = error(prediction, eps[:6])
        claimed[i, j] = sigma[j] * prediction.pow(2).mean().sqrt()
less, more = (np.tril_indices(len(grid), -1), np.triu_indices(len(grid), 1))  # told of
harm = wrong - np.diag(wrong)[:, None]  # what the lie adds to the error
assert (harm >= 0).all(), "the truth is the best that can be told"
assert harm[less].mean() > 1.4 * harm[more].mean()
true = np.repeat(sigma[:, None], len(grid), axis=1)
assert (claimed[less] < true[less]).all() and (claimed[more] > true[more]).all()
causes = np.stack([np.log(true).ravel(), np.log(true.T).ravel(), np.ones(true.size)], axis=1)
looks, listens, _ = np.linalg.lstsq(causes, np.log(claimed).ravel(), rcond=None)[0]
assert 0.25 < looks < listens < 0.8
print(f"a lie adds {harm[less].mean():.2f} to the error if it tells of less noise, "
      f"{harm[more].mean():.2f} if of more")  # fmt: skip
print(f"the noise it claims to see grows like true^{looks:.2f} * told^{listens:.2f}")

# %%
fig, (left, right) = figures.canvas(8.4, 3.5, columns=2)
left.imshow(np.log10(wrong), cmap=figures.RISING)
for r, c in np.ndindex(wrong.shape):
    left.text(c, r, f"{wrong[r, c]:.2f}", ha="center", va="center", fontsize=7,
              color="black" if wrong[r, c] > 0.3 else "white")  # fmt: skip
left.set_xticks(range(len(grid)), grid)
left.set_yticks(range(len(grid)), grid)
left.set(xlabel="the time it is told", ylabel="the true time")
left.grid(False)
right.plot([0, 1], [0, 1], color=figures.QUIET, linewidth=1)
for i in (1, 2, 3, 4, 6):
    right.plot(sigma, claimed[i], "o-", markersize=3, label=f"{sigma[i]:.2f}")
right.set(xlabel="$\\sigma$ that it is told", ylabel="noise it claims to see", xlim=(0, 1))
right.legend(
    edgecolor="none", framealpha=1, fontsize=7.5, loc="lower right", title="true $\\sigma$"
)
figures.title(fig, "The truth is best, less noise is the worse lie, and it is half believed")
figures.show(fig, "Left: errors, least on the diagonal. Right: claimed noise against what is told")

# %% [markdown]
# The network does both: it sees how noisy the latent is, and it believes what it is told. (Sun et al. 2025 trained
# networks that are told nothing; most lost little, for the noise is there to be seen.) The two lies have two faces.
# Told of *less* noise than there is, it takes noise for picture: every claim lies below the truth. Told of *more*, it
# takes picture for noise: every claim lies above. What becomes of that over a whole run? Four boats each, of which the
# first is shown:


# %%
def lying(factor):
    return lambda x, t, words: forward(unet, x, min(999, factor * t), words)


lies = {f"t x {factor:g}": lying(factor) for factor in (0.25, 0.5, 1, 2)}
lies["always 500"] = lambda x, t, words: forward(unet, x, 500, words)
told = {name: draw(lie, 4 * prompts[:1]) for name, lie in lies.items()}  # seeds 1 to 4


def rough(images):
    """The mean difference of neighbouring pixels."""
    pixels = np.stack([np.asarray(image, dtype=float) for image in images])
    return np.abs(np.diff(pixels, axis=1)).mean() + np.abs(np.diff(pixels, axis=2)).mean()


def peaks(images):
    """In how many of the pictures the checker sees mountains."""
    return sum(found["mountains"] for found in checker.read(as_tensor(images)))


for name, images in told.items():
    print(f"{name:12} mountains in {peaks(images)} of 4, roughness {rough(images):.1f}")
assert peaks(told["t x 1"]) <= min(peaks(told["t x 0.25"]), peaks(told["t x 0.5"])) - 2
assert peaks(told["t x 2"]) <= 1 and rough(told["always 500"]) > 1.2 * rough(told["t x 1"])
title = "Told too little noise, it invents mountains; told always 500, noise stays"
figures.pictures([images[0] for images in told.values()], list(told), heading=title, inches=1.35)

# %% [markdown]
# ## Break it
#
# Faults in the network's code rarely stop it: nearly all shapes fit. **The clocks** come in several kinds: sines first
# (as in Ho et al.), the exponent divided by $d/2 - 1$ (also theirs), a largest period of 1000, time in [0, 1]. A widely
# used trainer for SDXL had the second kind until March 2024 (kohya-ss/sd-scripts, pull request 1187). A port of a video
# model had the first in 2026: sharp pictures, but a crowd of cats where two were asked for (flashinfer, pull request
# 3819). **The skips** can be exchanged wherever two have one shape, and joined the wrong way round, $[s, h]$, always.
# **The norm** can run its statistics over the batch, or have another $\varepsilon$.


# %%
def clocks_of(t, width, shift=0, scale=1.0, sines_first=False):
    angle = scale * t[:, None] * 10000 ** (-torch.arange(width // 2) / (width // 2 - shift))
    halves = [angle.cos(), angle.sin()]
    return torch.cat(halves[::-1] if sines_first else halves, dim=-1)


def first_two_exchanged(skips, h):
    return [skips[1], skips[0], *skips[2:]], h


def with_norms(norm_of, x, t, context):
    """The network with other norms: `norm_of(norm, x)` instead of what each group norm puts out."""
    norms = [module for module in unet.modules() if isinstance(module, nn.GroupNorm)]
    hooks = [norm.register_forward_hook(lambda m, x, out: norm_of(m, x[0])) for norm in norms]
    try:
        return forward(unet, x, t, context)
    finally:
        for hook in hooks:
            hook.remove()


def over_the_batch(norm, x):
    together = x.transpose(0, 1)[None]  # (1, C, B, H, W): the batch as one large picture
    y = F.group_norm(together, norm.num_groups, norm.weight, norm.bias, norm.eps)
    return y[0].transpose(0, 1)


def other_eps(norm, x):
    return F.group_norm(x, norm.num_groups, norm.weight, norm.bias, 1e-6)


# %%
run = partial(forward, unet)
faults = {
    "right": run,
    "sines first": partial(run, clocks=partial(clocks_of, sines_first=True)),
    "d/2 - 1": partial(run, clocks=partial(clocks_of, shift=1)),
    "period 1000": partial(run, clocks=partial(waves, period=1000)),
    "t in [0, 1]": partial(run, clocks=partial(clocks_of, scale=1e-3)),
    "skips exchanged": partial(run, edit=first_two_exchanged),
    "[s, h]": partial(run, join=lambda h, skip: torch.cat([skip, h], dim=1)),
    "norm of the batch": partial(with_norms, over_the_batch),
    "eps 1e-6": partial(with_norms, other_eps),
}
marks, reference = {}, None
for name, network in faults.items():
    said = {t: network(noisy(t)[:6], t, context[:6]) for t in (900, 250, 1)}
    reference = reference if marks else said[250]
    alone = network(noisy(250)[:1], 250, context[:1])  # the first picture without its neighbours
    apart = [(each - said[250][: len(each)]).abs().max().item() for each in (alone, reference)]
    marks[name] = [*(error(prediction, eps[:6]) for prediction in said.values()), *apart]
print(" " * 19 + "error at 900   at 250     at 1   neighbours matter   off by")
for name, (*errors, neighbours, off) in marks.items():
    print(f"{name:18}{errors[0]:13.3f}{errors[1]:9.3f}{errors[2]:9.3f}{neighbours:20.0e}{off:9.0e}")

# %% [markdown]
# Five numbers tell them apart; here as a doctor would go about it.


# %%
def diagnosis(noisy, between, clean, neighbours, off):
    if neighbours > 1e-2:
        return "norm of the batch"  # a picture depends on those beside it
    if off < 1e-3:
        return "right" if off == 0 else "eps 1e-6"  # seen by comparing numbers, never by eye
    if min(noisy, between, clean) > 2:
        return "[s, h]"  # wrong at every time: the weights meet other channels
    if noisy > 1:
        return "t in [0, 1]"  # it always believes that there is hardly any noise
    if clean > 1.1 * marks["right"][2]:  # where t is nearly 0, all clocks but ...
        return "skips exchanged" if clean > 1.8 * marks["right"][2] else "sines first"
    return "period 1000" if between > 0.3 else "d/2 - 1"  # ... these two show the same


for name, numbers in marks.items():
    assert diagnosis(*numbers) == name, (name, numbers)

# %%
shown = ("d/2 - 1", "period 1000", "sines first", "t in [0, 1]", "skips exchanged", "[s, h]",
         "norm of the batch")  # fmt: skip
broken = {name: draw(faults[name]) for name in shown}
for name, images in {"untouched": drawn["untouched"], **broken}.items():
    print(f"{name:18} roughness {rough(images):4.1f}, mountains in {peaks(images)} of 2")
for name in ("d/2 - 1", "period 1000", "sines first"):
    assert rough(broken[name]) < 1.4 * rough(drawn["untouched"]) and peaks(broken[name][:1])
unseen = max(moves(draw(faults["eps 1e-6"])))
print(f"eps 1e-6 moves the pictures by {unseen:.4f} grey levels")
assert unseen < 0.1 and max(moves(broken["norm of the batch"])) < 12
labels = [f"{name}: {moves(images)[0]:.0f}" for name, images in broken.items()]
title = "A slightly wrong clock draws a clean picture of something else"
figures.pictures([images[0] for images in broken.values()], labels, heading=title, inches=1.45)

# %% [markdown]
# The fault to fear is the one that doesn't look broken. A network with a slightly wrong clock draws a boat before
# mountains that nobody ordered, and passes for a model that listens badly. The norm over the batch even looks right;
# its picture merely changes with those that are drawn beside it. And a wrong $\varepsilon$ moves the sixth digit, and
# the pictures by less than a tenth of a grey level. That is why `ldm` is compared with diffusers number by number, in
# double precision.
#
# And the skips in a wholly wrong order? Shapes forbid most of that.


# %%
def exchangeable(unet, x, context):
    """Pairs of skips of one shape: exchanging them stops no run."""
    emb = torch.zeros(1, unet.time_embedding.linear_2.out_features, device=x.device)
    shapes = [skip.shape for skip in down(unet, x, emb, context)]
    return sum(a == b for a, b in itertools.combinations(shapes, 2)), math.comb(len(shapes), 2)


try:
    forward(unet, noisy(250), 250, context, edit=lambda skips, h: (skips[::-1], h))
except RuntimeError as complaint:
    print("reversed:", str(complaint).splitlines()[0])
else:
    raise AssertionError("reversed skips should not fit")
with torch.no_grad():
    ours = exchangeable(unet, noisy(250)[:1], context[:1])
with torch.device("meta"):
    theirs = exchangeable(sd15, torch.empty(1, 4, 64, 64), torch.empty(1, 77, 768))
for name, (pairs, all_pairs) in (("here", ours), ("SD 1.5", theirs)):
    print(f"{name:7} {pairs} of {all_pairs} pairs of skips could be exchanged in silence")
assert ours == (1, 15) and theirs == (8, 66)

# %% [markdown]
# ## Your turn
#
# ### Exercise 04.1: a row of clocks
# *Difficulty 2 of 5, importance 4 of 5, ten minutes.* Equation (1) from memory, with Stable Diffusion's order:
# timesteps `t` (B,), whole numbers, and an even `width` make (B, width).


# %% tags=["exercise"]
def my_waves(t, width):
    # BEGIN SOLUTION
    half = width // 2
    angle = t[:, None] * 10000 ** (-torch.arange(half) / half)
    return torch.cat([angle.cos(), angle.sin()], dim=-1)
    # END SOLUTION


ldm.check("04.1", my_waves)

# %% [markdown]
# ### Exercise 04.2: norm by groups
# *Difficulty 2 of 5, importance 3 of 5, ten minutes.* Equation (3) without `F.group_norm`, from memory: `x` (B, C, H,
# W), `weight` and `bias` (C,).


# %% tags=["exercise"]
def my_group_norm(x, groups, weight, bias, eps):
    # BEGIN SOLUTION
    y = x.unflatten(1, (groups, -1))
    mean, var = y.mean((2, 3, 4), keepdim=True), y.var((2, 3, 4), keepdim=True, correction=0)
    y = ((y - mean) / (var + eps).sqrt()).flatten(1, 2)
    return y * weight[:, None, None] + bias[:, None, None]
    # END SOLUTION


ldm.check("04.2", my_group_norm)

# %% [markdown]
# ### Exercise 04.3: the ResNet block
# *Difficulty 3 of 5, importance 5 of 5, ten minutes.* Equation (2). `block` has the bricks `norm1`, `conv1`,
# `time_emb_proj`, `norm2`, `conv2` and `conv_shortcut` (None where it isn't needed), with weights that are new to you;
# `x` is (B, C, H, W), `emb` (B, E).


# %% tags=["exercise"]
def my_resnet(block, x, emb):
    # BEGIN SOLUTION
    h = block.conv1(F.silu(block.norm1(x)))
    h = h + block.time_emb_proj(F.silu(emb))[:, :, None, None]
    h = block.conv2(F.silu(block.norm2(h)))
    return h + (x if block.conv_shortcut is None else block.conv_shortcut(x))
    # END SOLUTION


ldm.check("04.3", my_resnet)

# %% [markdown]
# ### Exercise 04.4: what is kept
# *Difficulty 3 of 5, importance 4 of 5, fifteen minutes.* The shapes (C, H, W) of all skips, in the order in which the
# way down makes them, for any network: `widths` as (48, 96, 128), so many `layers` a level, a latent of `height` x
# `width`. All levels but the last are halved by a convolution of width 3, stride 2 and padding 1.


# %% tags=["exercise"]
def skip_shapes(widths, layers, height, width):
    # BEGIN SOLUTION
    shapes = [(widths[0], height, width)]
    for level, channels in enumerate(widths):
        shapes += [(channels, height, width)] * layers
        if level < len(widths) - 1:
            height, width = (height + 1) // 2, (width + 1) // 2
            shapes.append((channels, height, width))
    return shapes
    # END SOLUTION


ldm.check("04.4", skip_shapes)

# %% [markdown]
# ### Further 04.5: count a block
# *Difficulty 2 of 5, importance 3 of 5, ten minutes.* How many parameters has a ResNet block from `c_in` to `c_out`
# channels that reads an embedding of `emb_width` numbers? Count weights *and* biases, of convolutions, norms and the
# projection.


# %% tags=["exercise"]
def parameters(c_in, c_out, emb_width):
    # BEGIN SOLUTION
    norms = 2 * c_in + 2 * c_out
    convolutions = 9 * c_in * c_out + c_out + 9 * c_out * c_out + c_out
    shortcut = 0 if c_in == c_out else c_in * c_out + c_out
    return norms + convolutions + emb_width * c_out + c_out + shortcut
    # END SOLUTION


ldm.check("04.5", parameters)

# %% [markdown]
# ## The same on a real model
#
# The same loops and the same mosaic on Stable Diffusion 1.5, and how much its prediction changes where one part is
# silenced.

# %% tags=["real-model"]
sd = real("sd15")
if sd is not None:
    x = torch.randn(1, *sd.vae.latent_shape(sd.default_size, sd.default_size),
                    generator=torch.Generator().manual_seed(0))  # fmt: skip
    words = sd.encode(["a photograph of a red boat on the sea at sunset"])
    with torch.no_grad():
        assert torch.equal(forward(sd.unet, x, 900, words), sd.unet(x, 900, words))
        emb = sd.unet.embed(torch.tensor([900]))
        kept = [tuple(skip.shape[1:]) for skip in down(sd.unet, x, emb, words)]
    whole = forward(sd.unet, x, 900, words)
    for k, shape in enumerate([*kept, "the middle"]):
        change = (forward(sd.unet, x, 900, words, edit=without(k)) - whole).norm() / whole.norm()
        print(f"without {k:2}, {shape}: the prediction changes by {100 * change:.1f} %")
    display(mosaic(sd, "a photograph of a red boat on the sea at sunset"))

# %% [markdown]
# ## Where it lives in `ldm`
#
# `timestep_embedding`, `TimestepMLP`, `ResnetBlock`, `Downsample` and `Upsample` are in `ldm/models/blocks.py`;
# `DownLevel`, `Middle`, `UpLevel` and `UNet` in `ldm/models/unet.py`. A level with attention and one without are one
# class, and `UNetEncoder` is the half that a ControlNet copies ([09](09_controlnet.ipynb)). In diffusers the same are
# `get_timestep_embedding`, `ResnetBlock2D`, and a class for every kind of level in `unet_2d_blocks.py`. The parameters
# bear the same names, so weights go over as they are.

# %%
import inspect

from ldm.models.blocks import ResnetBlock

print(inspect.getsource(ResnetBlock.forward))
print(
    "    def forward(...):  # of the UNet\n" + inspect.getsource(UNet.forward).split('"""')[-1][1:]
)

# %% [markdown]
# **In short.** The time is shown as a row of clocks, and added as one number a channel between the two convolutions of
# every block. Parameters gather at the bottom of the U, work at its rims. The first skip carries the noise to the end,
# because the answer contains its input; those between carry the shapes of things, and the deepest hardly anything.
# Next: [05, which word painted which pixel?](05_attention.ipynb).
