# %% [markdown]
# # 04 · The UNet, opened
#
# **Where does the time go in, and what do the skips carry?**
#
# About 25 minutes to read, half a minute to run. Before it: [03](03_noise.ipynb); [01](01_words.ipynb) helps. You will have
# walked through the whole network by hand, bit for bit, counted what each part of it costs, silenced its parts one by one,
# and lied to it about the time.

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
from ldm.metrics.evaluation import held_out
from ldm.models.blocks import Attention, timestep_embedding
from ldm.models.unet import UNet, UNetConfig
from ldm.train.data import to_tensor

pipe = ldm.load("scenes")
unet = pipe.unet
prompts = ["a large red boat on sea at sunset", "a small blue house on grass at night"]

# %% [markdown]
# A trained network, and three small operations on it. Each is one hook: a function that PyTorch calls as a tensor passes.

# %%
last = unet.up_blocks[-1].resnets[-1]  # it reads (what came up, the first skip), joined: 48 + 48
operations = {
    "untouched": None,
    "no middle": (unet.mid_block.register_forward_hook, lambda module, given, out: 0 * out),
    "no first skip": (last.register_forward_pre_hook, lambda module, given: (
        torch.cat([given[0][:, :48], 0 * given[0][:, 48:]], dim=1), given[1])),
    "told a quarter of t": (unet.register_forward_pre_hook, lambda module, given: (
        given[0], given[1] / 4, *given[2:])),
}  # fmt: skip
drawn = {}
for name, operation in operations.items():
    handle = operation and operation[0](operation[1])
    drawn[name] = pipe(prompts, seed=1, steps=10, guidance=3.0).images
    if handle:
        handle.remove()


def grey_levels(one, other):
    """How far two pictures are apart: the mean difference of their pixels, of 255 grey levels."""
    return np.abs(np.asarray(one, dtype=float) - np.asarray(other, dtype=float)).mean()


moved = {name: np.mean([grey_levels(*pair) for pair in zip(drawn["untouched"], images)])
         for name, images in drawn.items()}  # fmt: skip
share = sum(p.numel() for p in unet.mid_block.parameters()) / sum(p.numel() for p in unet.parameters())
labels = [[f"{name}: {moved[name]:.1f}" if row == 0 and k else name if row == 0 else ""
           for k, name in enumerate(drawn)] for row in range(2)]  # fmt: skip
assert moved["no middle"] < 3 < 15 < moved["told a quarter of t"] < 40 < moved["no first skip"]
figures.pictures(list(zip(*drawn.values())), labels, inches=1.75, heading=(
    f"Without {100 * share:.0f} % of its parameters the network draws the same; without one tensor, nothing"))

# %% [markdown]
# The numbers say how far the pictures moved, in grey levels of 255. The middle block, the deepest point of the network,
# can go, and one has to look hard to see it. One of six skips can not. And a network that is told a quarter of the true
# time draws a clean picture of something that nobody asked for.
#
# ## Predict
#
# The network has three levels, of 16 x 16, 8 x 8 and 4 x 4 positions. Before you go on: how much of its parameters sits at
# the coarsest level, and how much of its work? Which is worse, to tell it too late a time (more noise than there is) or too
# early a one? (Nothing checks this cell; it is for you.)

# %%
my_guess = {"parameters at 4 x 4, %": None, "work at 4 x 4, %": None, "worse": None}

# %% [markdown]
# ## Derive
#
# **The time** is one number, $t$, and the same weights have to be a thousand denoisers. A number alone is a poor input: a
# network of smooth functions hardly tells 500 from 501. So $t$ is shown on a row of clocks, each slower than the one before
# (Vaswani et al. 2017, section 3.5; Ho et al. 2020, appendix B). With $d$ numbers and $j = 0, \dots, d/2 - 1$:
#
# $$e = [\cos \omega_j t, \; \sin \omega_j t], \qquad \omega_j = 10000^{-j/(d/2)}. \tag{1}$$
#
# Two linear layers make the *embedding* of it, $m = W_2\,\mathrm{silu}(W_1 e)$, once for the whole network. (Biases are left
# out here.) It goes into every **ResNet block**, between its two convolutions, as one number for each channel, added at all
# positions alike (Ho et al. 2020, appendix B):
#
# $$h = \mathrm{conv}_1(\mathrm{silu}(\mathrm{norm}_1(x))) + W m', \;\; m' = \mathrm{silu}(m); \qquad
# y = S x + \mathrm{conv}_2(\mathrm{silu}(\mathrm{norm}_2(h))). \tag{2}$$
#
# $S$ is nothing where input and output have the same width, and a convolution of width 1 otherwise. **The norm** gives each
# group $g$ of neighbouring channels of *one* picture mean 0 and variance 1, over its channels and all positions, then scales
# and shifts every channel (Wu & He 2018, section 3.1):
#
# $$\mathrm{norm}(x)_c = w_c \, (x_c - \mu_g) / \sqrt{v_g + \varepsilon} + b_c. \tag{3}$$
#
# **The skips.** On the way down every output is kept; each block of the way up reads $[h, s]$, what comes from below joined
# with the last one kept that is not used yet (Ronneberger et al. 2015). Why must they be there? Solve
# $x_t = \alpha x_0 + \sigma \epsilon$ for what the network is asked for:
#
# $$\epsilon = (x_t - \alpha x_0) / \sigma. \tag{4}$$
#
# The answer *contains its input*, to the last position. The noise has no structure that could be summed up at 4 x 4: a copy
# of $x_t$ has to arrive at the end, and only $x_0$ is worth thinking about. (5) says what thinking costs, for a convolution of
# width $k$ at $H \times W$ positions; a linear layer is $k = 1$:
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
alike = clocks @ clocks.T / (width // 2)  # 1 with itself: cos² + sin² = 1 for each frequency

# %%
fig, (left, right) = figures.canvas(8.4, 3.1, columns=2, width_ratios=(1.5, 1))
left.imshow(clocks.T, cmap=figures.SIGNED, aspect="auto", vmin=-1, vmax=1, interpolation="nearest")
left.set(xlabel="timestep", yticks=(0, 23, 24, 47), ylabel="24 cosines, 24 sines")
left.grid(False)
for t in (100, 500, 900):
    right.plot(times, alike[t], label=f"t = {t}")
right.set(xlabel="timestep", ylabel="alike (1 is equal)", xlim=(0, 999))
right.legend(frameon=False, fontsize=8, loc="lower right")
figures.title(fig, "Fast clocks tell neighbours apart, slow ones tell early from late")
assert all(alike[t].argmax() == t for t in range(1000)), "no two times look alike"
assert (alike[500, 510:] < alike[500, 501]).all() and alike[500, 990] < alike[500, 550]
figures.show(fig, "Left: 48 waves over 1000 timesteps, fast at the top of each half; right: likeness peaks")

# %% [markdown]
# ### The block
#
# (3) and (2), from the parts of one of the network's own blocks: the first of the way down's second level, where 48
# channels become 96. Its input is what really arrives there: a noisy latent of a picture that no training has seen.

# %%
wanted = held_out(12)
truth = to_tensor(np.stack([scenes.render(scene).image for scene in wanted]))  # (12, 3, 128, 128)
with torch.no_grad():
    x0 = pipe.vae.encode(truth)  # (12, 4, 16, 16)
    context = pipe.encode([scenes.caption(scene, scene.seed) for scene in wanted])  # (12, 77, 128)
eps = torch.randn(x0.shape, generator=torch.Generator().manual_seed(4))
table = pipe.schedule(10)


def noisy(t):
    """The twelve latents with the noise of time t: what training showed the network."""
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
    h = h + block.time_emb_proj(F.silu(emb))[:, :, None, None]  # one number a channel, at all positions
    h = block.conv2(F.silu(group_norm(h, block.norm2)))
    return (block.conv_shortcut(x) if block.conv_shortcut else x) + h  # (2)


block, arrived = unet.down_blocks[1].resnets[0], {}
handle = block.register_forward_hook(lambda module, given, out: arrived.update(given=given, out=out))
with torch.no_grad():
    unet(noisy(400), 400, context)
    mine = resnet(block, *arrived["given"])
handle.remove()
off = (mine - arrived["out"]).abs().max().item()
assert off < 1e-4 and arrived["out"].abs().max() > 1
print(f"By hand and ldm's: at most {off:.0e} apart, where values reach {arrived['out'].abs().max():.1f}.")

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
            both = join(h, skips.pop())
            h = block(both, emb)
            h = level.attentions[i](h, context) if level.attentions else h
            say(f"up {n}", h, f"made of {both.shape[1]} channels, {both.shape[1] - skip_width(block)} from below")
        if level.upsamplers:
            h = level.upsamplers[0](h, skips[-1].shape[2:])  # (B, C, 2H, 2W)
            say(f"up {n}, doubled", h)
    return h
