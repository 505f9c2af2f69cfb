# %% [markdown]
# # 09 · ControlNet
#
# **How do you put a steering wheel into a finished car without breaking it?**
#
# About 20 minutes to read, half a minute to run. Before it: [04](04_unet.ipynb), [06](06_guidance.ipynb). You will have built
# a ControlNet's forward pass and its place in the UNet, seen why it begins as nothing at all, and measured what it does.

# %%
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

import ldm
from ldm import scenes
from ldm.conditions import canny, depth_picture, to_tensor
from ldm.lab.real import real, real_controlnet
from ldm.metrics.control import edge_f1, edges_of
from ldm.models.controlnet import ControlNet

pipe = ldm.load("scenes")
net = ldm.load_controlnet("scenes-canny", pipe)
truth = scenes.render(scenes.sample(9, kind="boat", ground="sea", style="plain", n=1))
photo = Image.fromarray(truth.image)
edges = canny(photo)


def steered(pipe, net, edges, words, **options):
    """The condition, then one picture for each sentence, all with the same net and seed."""
    led = ldm.Control(net, edges, **options)
    drawn = [pipe(text, control=led, steps=12, seed=3).images[0] for text in words]
    labels = ["the edges", *(text.replace(" on ", "\non ", 1) for text in words)]
    heading = "Edges say where, words say what"
    return figures.pictures(
        [edges.resize(drawn[0].size), *drawn], labels, heading=heading, inches=1.6
    )


words = [
    "a green boat on sea at sunset",
    "a white boat on sea at night",
    "a pink boat on sea at dawn",
]
steered(pipe, net, edges, words)

# %% [markdown]
# One set of edges, three sentences. The UNet that draws is the one of all the other notebooks: not one of its numbers has
# changed. A second network, half its size, looks at the edges and speaks into it.
#
# ## Predict
#
# A ControlNet that has just been made, before any training, is put beside the UNet. What happens to the picture: noise, a
# slightly different picture, or exactly the same one? And if it is the same: how can the net ever learn?

# %%
my_guess = {"an untrained ControlNet makes the picture": None, "it can learn because": None}

# %% [markdown]
# ## Derive
#
# Zhang et al. 2023 copy the UNet's way down and its middle. The copy reads the noisy latent $x$, the time and the words as
# the original does, and also a picture $c$ (edges, depth, ...). What it computes at each level goes through a 1×1
# convolution $Z$ and is added to what the original hands to its way up. For one block $F$ with weights $\Theta$ and a copy
# with weights $\Theta_c$ (their equation 2),
#
# $$y = F(x; \Theta) + Z\big(F(x + Z(c; \Theta_{z1}); \Theta_c); \Theta_{z2}\big). \tag{1}$$
#
# Both $Z$ begin with all weights zero, so that at first $y = F(x; \Theta)$ **exactly**. Nothing is broken on the first day.
# Why isn't it stuck there? For one position, $Z(h) = W h + b$ with $W = 0$, and a loss $L$ that depends on $y$,
#
# $$\frac{\partial L}{\partial W} = \frac{\partial L}{\partial y}\, h^\top, \qquad
#   \frac{\partial L}{\partial h} = W^\top \frac{\partial L}{\partial y} = 0. \tag{2}$$
#
# $h$ is not zero, the copy being a trained network: so $W$ *does* get a gradient, while everything behind it gets none. After
# one step $W$ is no longer zero, and from then on the copy learns too. A multiplication by zero would have stopped both.
#
# ## Build
#
# The net's forward pass by hand, from its parts, and its residuals' place in the UNet.


# %%
@torch.no_grad()
def residuals_by_hand(net, x, t, context, picture):
    """What the net adds to each skip and to the middle: (1), level by level."""
    emb = net.embed(torch.as_tensor(t).expand(len(x)))  # (B, 192)
    seen = net.controlnet_cond_embedding(
        picture
    )  # (B, 3, 128, 128) -> (B, 48, 16, 16); its end is Z_1
    h = net.conv_in(x) + seen  # x + Z(c)
    skips = [h]
    for level in net.down_blocks:  # the copy of the way down
        skips += level(skips[-1], emb, context)
    middle = net.mid_block(skips[-1], emb, context)
    added = [zero(skip) for zero, skip in zip(net.controlnet_down_blocks, skips)]  # Z_2, one a skip
    return added, net.controlnet_mid_block(middle)


@torch.no_grad()
def unet_by_hand(unet, x, t, context, added, added_middle):
    """The UNet, with what the net says added to every skip and to the middle block's output."""
    emb = unet.embed(torch.as_tensor(t).expand(len(x)))
    h, skips = unet.encode(unet.conv_in(x), emb, context)
    skips = [skip + extra for skip, extra in zip(skips, added)]
    h = h + added_middle
    for level in unet.up_blocks:
        h = level(h, skips, emb, context)
    return unet.conv_out(F.silu(unet.conv_norm_out(h)))


x = ldm.Noise.from_seeds([1]).draw((4, 16, 16))
context = pipe.encode(["a green boat on sea at sunset"])
picture = to_tensor(edges)  # (1, 3, 128, 128) in [0, 1]
mine = unet_by_hand(pipe.unet, x, 500, context, *residuals_by_hand(net, x, 500, context, picture))
with torch.no_grad():
    theirs = pipe.unet(x, 500, context, residuals=net(x, 500, context, net.condition(picture)))
assert torch.equal(mine, theirs)
count = sum(p.numel() for p in net.parameters()), sum(p.numel() for p in pipe.unet.parameters())
print(f"Bit for bit the same. The net has {count[0]:,} parameters, the UNet {count[1]:,}.")

# %% [markdown]
# And the promise of the first day: a net fresh from `from_unet` changes nothing, not even by rounding.

# %%
torch.manual_seed(0)
fresh = ControlNet.from_unet(pipe.unet, net.config.conditioning_embedding_out_channels)
with torch.no_grad():
    without = pipe.unet(x, 500, context)
    with_fresh = pipe.unet(
        x, 500, context, residuals=fresh(x, 500, context, fresh.condition(picture))
    )
assert torch.equal(without, with_fresh)
print("With a fresh net the prediction is the same, bit for bit.")

# %% [markdown]
# Now equation (2) itself: one step of training on 8 scenes. We sort the net's parameters into the zero convolutions behind
# the copy, $Z_2$, and everything before them, and look at the gradients of the first two steps.


# %%
def batch_of(count, seed=1000):
    """Latents, words and edges of true scenes."""
    drawn = [scenes.draw(seed + k) for k in range(count)]
    pixels = torch.from_numpy(np.stack([one.image for one, _ in drawn])).permute(0, 3, 1, 2)
    seen = torch.cat([to_tensor(canny(Image.fromarray(one.image))) for one, _ in drawn])
    with torch.no_grad():
        x0 = pipe.vae.encode(pixels / 127.5 - 1)
    return x0, pipe.encode([text for _, text in drawn]), seen


def loss_of(net, x0, context, seen, level, eps):
    noisy = level.alpha * x0 + level.sigma * eps
    added = net(noisy, level.t, context, net.condition(seen))
    return F.mse_loss(pipe.unet(noisy, level.t, context, residuals=added), eps)


pipe.unet.requires_grad_(False)
x0, texts, seen = batch_of(8)
eps = torch.randn(x0.shape, generator=torch.Generator().manual_seed(0))
level = pipe.schedule(20)[8]
behind = ("controlnet_down_blocks", "controlnet_mid_block")
optimizer = torch.optim.SGD(fresh.parameters(), lr=0.5)
slopes = []
for step in range(2):
    optimizer.zero_grad()
    loss = loss_of(fresh, x0, texts, seen, level, eps)
    loss.backward()
    sizes = {True: 0.0, False: 0.0}
    for name, p in fresh.named_parameters():
        sizes[name.startswith(behind)] += p.grad.square().sum().item()
    slopes.append((sizes[True] ** 0.5, sizes[False] ** 0.5))
    optimizer.step()
    text = f"gradient of Z_2 {slopes[-1][0]:.4f}, of everything before it {slopes[-1][1]:.2e}"
    print(f"step {step}: loss {loss.item():.4f}, {text}")
assert slopes[0][0] > 0 and slopes[0][1] == 0 and slopes[1][1] > 0

# %% [markdown]
# Exactly zero at the first step, and not at the second: (2). (Where does the edges' own way in, $Z_1$, wake up? Only after
# that: it stands before the copy, so its gradient waits for $Z_2$ as well.)
#
# ## Run
#
# What does the trained net do? F1 counts the edge pixels of the picture that has been drawn which lie within one pixel of
# an edge that was asked for, and the other way round: 1 is perfect. We have the truth for comparison: the same scenes, with
# the net's scale from nothing to one and a half.

# %%
asked = [scenes.draw(seed) for seed in range(500, 508)]
conditions = [canny(Image.fromarray(one.image)) for one, _ in asked]
prompts = [text for _, text in asked]
wanted = edges_of([Image.fromarray(one.image) for one, _ in asked])
scales = (0.0, 0.25, 0.5, 0.75, 1.0, 1.5)


def f1_of(images):
    return edge_f1(edges_of(images), wanted).mean().item()


drawn = {}
for scale in scales:
    led = ldm.Control(net, conditions, scale=scale)
    drawn[scale] = pipe(prompts, control=led, steps=10, seed=0).images
score = {scale: f1_of(images) for scale, images in drawn.items()}
rows = [[conditions[k], *(drawn[scale][k] for scale in scales)] for k in range(3)]
labels = ["edges", *(f"scale {scale:g}" for scale in scales)]
heading = f"From {score[0.0]:.2f} without the net to {score[1.0]:.2f} with it: edge F1 of 8 scenes"
figures.pictures(rows, labels, heading=heading, inches=1.15)

# %%
for scale in scales:
    print(f"scale {scale:4}: edge F1 {score[scale]:.3f}")
assert score[0.0] < 0.55 and score[1.0] > 0.7
assert score[0.0] < score[0.25] < score[0.5] < score[1.0], (
    "the louder the net, the closer the lines"
)

# %% [markdown]
# ### Where and when it speaks
#
# The residuals' size beside that of the skips they are added to, at every step of one run. The rows are the places in the
# order of the way down; the last is the middle.

# %%
schedule = pipe.schedule(20, sampler="ddim")
share = []
x = ldm.Noise.from_seeds([3]).draw((4, 16, 16)) * schedule.start_scale
with torch.no_grad():
    for here, after in zip(schedule.levels, schedule.levels[1:]):
        added, added_middle = net(x, here.t, context, net.condition(picture))
        middle, skips = pipe.unet.encode(
            pipe.unet.conv_in(x), pipe.unet.embed(torch.tensor([here.t])), context
        )
        pairs = [*zip(added, skips), (added_middle, middle)]
        share.append([(a.norm() / b.norm()).item() for a, b in pairs])
        eps_hat = pipe.unet(x, here.t, context, residuals=(added, added_middle))
        x0_hat = (x - here.sigma * eps_hat) / here.alpha
        x = after.alpha * x0_hat + after.sigma * eps_hat
share = np.array(share).T  # (places, steps)
fig, ax = figures.canvas(7.2, 2.8)
image = ax.imshow(100 * share, aspect="auto", cmap=figures.RISING)
sides = [skip.shape[-1] for skip in skips]
ax.set_yticks(range(len(share)), [*(f"skip {k} ({s}×{s})" for k, s in enumerate(sides)), "middle"])
ax.set(xlabel="step (noise on the left)", xticks=range(0, 20, 5))
ax.grid(False)
fig.colorbar(image, ax=ax, label="% of the skip's size")
figures.title(fig, "How loud the net is, place by place and step by step")
figures.show(fig, "A heat map: size of the residuals over places and steps")

# %%
early, late = share[:, :5].mean(), share[:, -5:].mean()
print(
    f"on average {100 * early:.0f} % in the first five steps, {100 * late:.0f} % in the last five"
)
runs = {
    "the first half": (0.0, 0.5),
    "the second half": (0.5, 1.0),
    "all but the first fifth": (0.2, 1.0),
}
parts = {}
for name, (start, end) in runs.items():
    led = ldm.Control(net, conditions, start=start, end=end)
    parts[name] = f1_of(pipe(prompts, control=led, steps=10, seed=0).images)
    print(f"run in {name} of the steps: edge F1 {parts[name]:.3f}")
assert max(parts["the first half"], parts["the second half"]) < score[1.0] - 0.08
assert parts["all but the first fifth"] > score[1.0] - 0.05

# %% [markdown]
# A widespread rule says that layout is settled in the first steps and that a ControlNet may rest afterwards. For lines this
# exact it isn't so here: either half of the steps alone does about the same, and neither suffices. What can be saved is at
# the other end, the noisiest fifth. (A rule about a big model and photographs need not hold for a small one and drawings.
# The point is that one can measure it, in two lines.)
#
# ### Two at once
#
# Residuals are added, so nets go together. Here the exact depth of one scene beside the edges of it.

# %%
deep = ldm.load_controlnet("scenes-depth", pipe)
depth = depth_picture(truth.depth)
text = "a green boat on sea at sunset"
both = [ldm.Control(net, edges, scale=0.6), ldm.Control(deep, depth, scale=0.6)]
cases = {"no net": None, "edges": both[:1], "depth": both[1:], "both": both}
images = [pipe(text, control=led, steps=12, seed=5).images[0] for led in cases.values()]
figures.pictures([edges, depth, *images], ["edges", "depth", *cases], heading="Residuals add up")

# %% [markdown]
# ## Break it
#
# Four faults that people really make. **Wrong order**: two residuals of the same shape are exchanged, and nothing complains.
# **Wrong range**: the picture in [-1, 1], as the VAE reads it, instead of [0, 1]; the result looks sound, which is why this
# one lives long. **Wrong picture**: the photograph itself where edges are expected. And **not zero**: the convolutions behind
# the copy begin with small random numbers.

# %%
with torch.no_grad():
    added, added_middle = net(x, 500, context, net.condition(picture))
shapes = [tuple(a.shape[1:]) for a in added]
print("shapes of the residuals:", *shapes)


class Faulty(torch.nn.Module):
    """The trained net with one fault, called as the net is."""

    def __init__(self, net, order=None, look=lambda picture: picture):
        super().__init__()
        self.net, self.order, self.look = net, order, look

    def added(self, x, t, context, picture):
        skips, middle = self.net(x, t, context, self.net.condition(self.look(picture)))
        return ([skips[k] for k in self.order] if self.order else skips), middle


order = [1, 0, 2, 3, 4, 5]  # the two whose shapes are the same, exchanged
photo_tensor = to_tensor(photo)
faults = {
    "as trained": Faulty(net),
    "wrong order": Faulty(net, order=order),
    "range [-1, 1]": Faulty(net, look=lambda picture: 2 * picture - 1),
    "the photograph": Faulty(net, look=lambda picture: photo_tensor),
}


@torch.no_grad()
def draw(fault, text, s=4.0, seed=3):
    """DDIM with guidance, led by a faulty net."""
    both, x = pipe.encode(["", text]), ldm.Noise.from_seeds([seed]).draw((4, 16, 16))
    x = x * schedule.start_scale
    for here, after in zip(schedule.levels, schedule.levels[1:]):
        two = torch.cat([x, x])
        added = fault.added(two, here.t, both, picture.repeat(2, 1, 1, 1))
        uncond, cond = pipe.unet(two, here.t, both, residuals=added).chunk(2)
        eps = uncond + s * (cond - uncond)
        x = after.alpha * (x - here.sigma * eps) / here.alpha + after.sigma * eps
    return pipe.decode(x)[0]


images = {name: draw(fault, text) for name, fault in faults.items()}
goal = edges_of([photo])
f1 = {name: edge_f1(edges_of([image]), goal).item() for name, image in images.items()}
labels = [f"{name}\nedge F1 {f1[name]:.2f}" for name in images]
figures.pictures(
    list(images.values()), labels, heading="Three faults of the trained net", inches=1.5
)

# %%
print(", ".join(f"{name} {value:.3f}" for name, value in f1.items()))
assert all(f1["as trained"] > f1[name] + 0.04 for name in f1 if name != "as trained")
torch.manual_seed(0)
loud = ControlNet.from_unet(pipe.unet, net.config.conditioning_embedding_out_channels)
for conv in [*loud.controlnet_down_blocks, loud.controlnet_mid_block]:
    torch.nn.init.normal_(conv.weight, std=0.1)
with torch.no_grad():
    added = loud(x, 500, context, loud.condition(picture))
    off = (pipe.unet(x, 500, context, residuals=added) - pipe.unet(x, 500, context)).norm()
    off = (off / pipe.unet(x, 500, context).norm()).item()
print(f"random instead of zero convolutions: the prediction is off by {100 * off:.0f} % on day one")
assert off > 0.3

# %% [markdown]
# ## Your turn
#
# ### Exercise 09.1: a layer that is nothing, and can become anything
# *Difficulty 2 of 5, importance 5 of 5, five minutes.* Make a layer for `channels` channels that keeps height and width,
# mixes channels at each position alone, gives 0 for every input, and still learns from the first step on.


# %% tags=["exercise"]
def zero_conv(channels):
    # BEGIN SOLUTION
    conv = torch.nn.Conv2d(channels, channels, 1)
    torch.nn.init.zeros_(conv.weight)
    torch.nn.init.zeros_(conv.bias)
    return conv
    # END SOLUTION


ldm.check("09.1", zero_conv)

# %% [markdown]
# ### Exercise 09.2: put the residuals in their place
# *Difficulty 2 of 5, importance 4 of 5, five minutes.* From the UNet's `skips` (a list, in the order of the way down) and
# `middle`, and from what a net wants to add to each of them, make the new list of skips and the new middle.


# %% tags=["exercise"]
def inject(skips, middle, extra_skips, extra_middle, scale):
    # BEGIN SOLUTION
    skips = [skip + scale * extra for skip, extra in zip(skips, extra_skips)]
    return skips, middle + scale * extra_middle
    # END SOLUTION


ldm.check("09.2", inject)

# %% [markdown]
# ### Exercise 09.3: are the edges where they should be?
# *Difficulty 3 of 5, importance 3 of 5, fifteen minutes.* `found` and `wanted` are (H, W) tensors of bool. Precision is the
# share of found edge pixels that have a wanted one within one pixel (the eight neighbours count), recall the share of wanted
# ones that have a found one. Give F1, $2PR/(P+R)$. (`F.max_pool2d` widens a map.)


# %% tags=["exercise"]
def my_edge_f1(found, wanted):
    # BEGIN SOLUTION
    def near(edges):
        return F.max_pool2d(edges.float()[None], 3, stride=1, padding=1)[0] > 0

    precision = (found & near(wanted)).sum() / found.sum()
    recall = (wanted & near(found)).sum() / wanted.sum()
    return 2 * precision * recall / (precision + recall)
    # END SOLUTION


ldm.check("09.3", my_edge_f1)

# %% [markdown]
# ### Exercise 09.4: which steps are led?
# *Difficulty 2 of 5, importance 2 of 5, five minutes.* Of `n` steps, step k takes the share from k/n to (k+1)/n of the road.
# A net runs in the steps that lie wholly within `start` to `end`. List their numbers.


# %% tags=["exercise"]
def steps_led(n, start, end):
    # BEGIN SOLUTION
    return [k for k in range(n) if k / n >= start and (k + 1) / n <= end]
    # END SOLUTION


ldm.check("09.4", steps_led)

# %% [markdown]
# ## The same on a real model
#
# The same function on Stable Diffusion 1.5 with the ControlNet for Canny edges, from the same scene, enlarged.

# %% tags=["real-model"]
sd = real("sd15")
sd_net = real_controlnet("sd15-canny", sd)
if sd_net is not None:
    size = sd.default_size
    large = canny(photo.resize((size, size), Image.Resampling.LANCZOS))
    display(steered(sd, sd_net, large, ["a photograph of a sailing boat on the sea at sunset"]))

# %% [markdown]
# ## Where it lives in `ldm`
#
# `ldm/models/controlnet.py` is the net: it *inherits* the UNet's encoder, so the copy needs no table of names. `ldm/control.py`
# makes it a closure beside the UNet, with scale, interval and guess mode; `ldm/conditions/` draws edges, depth and poses;
# `ldm train controlnet`
# trained the two nets used here. In diffusers it is `ControlNetModel`, and one
# pipeline for each combination with img2img, inpainting and SDXL.

# %%
import inspect

print(inspect.getsource(ControlNet.from_unet))

# %% [markdown]
# **In short.** A ControlNet is a copy of the encoder that speaks through convolutions which begin at zero: at first it changes
# nothing, exactly, and yet it learns. What it says is added to the skips and the middle, so several nets, scales and intervals
# need no new machinery. Next: back to [00](00_one_picture.ipynb) with other eyes, or on to the
# [reading orders](README.md).
