# %% [markdown]
# # 06 · Guidance and negative prompts
#
# **Why does a picture follow its sentence better when we exaggerate what the sentence changed, and what does "not" mean to
# a model?**
#
# About 15 minutes to read, half a minute to run. Before it: [00](00_one_picture.ipynb), [04](04_unet.ipynb). You will have
# built classifier-free guidance, measured what it buys and what it costs, and broken it in three ways.

# %%
import numpy as np
import torch

import ldm
from ldm import scenes
from ldm.lab.real import real
from ldm.loading import find_model
from ldm.metrics.evaluation import held_out, load_checker, tally, verdict
from ldm.pictures import image_tensor

pipe = ldm.load("scenes")
prompt = "a large red boat on sea at sunset"
scales = (0, 1, 2, 4, 8, 14)


def drawn(pipe, prompt, scale, **options):
    """Pictures at one guidance scale; scale 0 is the model without any words."""
    if scale == 0:
        prompt, scale = [""] * (1 if isinstance(prompt, str) else len(prompt)), 1
    return pipe(prompt, guidance=scale, steps=8, **options).images


def scale_strip(pipe, prompt, seeds=(1, 2)):
    """The same sentence and the same noise at growing scales, one row a seed."""
    rows = [[drawn(pipe, prompt, scale, seed=seed)[0] for scale in scales] for seed in seeds]
    labels = [f"scale {scale}" for scale in scales]
    return figures.pictures(rows, labels, heading=f"“{prompt}”: the same noise, more guidance")


scale_strip(pipe, prompt)

# %% [markdown]
# Scale 0 is the model without words. Scale 1 is the model with them, as it was trained. Everything to the right of it is
# *extrapolation*: no training example ever asked for it.
#
# ## Predict
#
# Before you go on, commit yourself: at which of these scales will the pictures agree best with their sentences, over many
# sentences? And does the best scale also give the most varied pictures? (Nothing checks this cell; it is for you.)

# %%
my_guess = {"best scale": None, "most varied at scale": None}

# %% [markdown]
# ## Derive
#
# A diffusion model's noise prediction is, up to a factor, the direction in which pictures become *more likely*: the score
# of the noisy distribution (Song et al. 2021),
#
# $$\epsilon(x) = -\sigma \, \nabla_x \log p(x). \tag{1}$$
#
# Bayes' rule says what a caption $c$ adds to it:
#
# $$\nabla \log p(x \mid c) = \nabla \log p(x) + \nabla \log p(c \mid x). \tag{2}$$
#
# The last term is a classifier: it asks which change of $x$ would make the caption fit better. Nobody has to train one. The
# same network, run with the caption and with an empty one, gives it as a difference: with (1) in (2),
# $-\sigma \nabla \log p(c \mid x) = \epsilon_c - \epsilon_u$. To count the caption $s$ times instead of once (Ho & Salimans
# 2022, equation 6, where their $w$ is $s - 1$):
#
# $$\hat\epsilon = \epsilon_u + s \, (\epsilon_c - \epsilon_u). \tag{3}$$
#
# $s = 0$ forgets the caption, $s = 1$ is the plain model, $s > 1$ sharpens $p(c \mid x)$ to its $s$-th power. A negative
# prompt takes the empty one's place in $\epsilon_u$: the direction then points *away from it* and towards the caption.
#
# ## Build
#
# The whole loop with (3) in it, from parts. Nothing here is hidden in a pipeline.


# %%
@torch.no_grad()
def draw(prompt, negative="", s=4.0, seed=7, steps=12, combine=None):
    """DDIM with guidance: the picture, and the norms of eps_u, eps_c, their difference."""
    ids = pipe.tokenizer([negative, prompt]).ids
    context = pipe.text_encoder.context(ids)  # (2, 77, 128)
    schedule = pipe.schedule(steps, sampler="ddim")
    x = ldm.Noise.from_seeds([seed]).draw((4, 16, 16)) * schedule.start_scale
    norms = []
    for level, after in zip(schedule.levels, schedule.levels[1:]):
        uncond, cond = pipe.unet(torch.cat([x, x]), level.t, context).chunk(2)
        eps = combine(uncond, cond, s) if combine else uncond + s * (cond - uncond)  # (3)
        norms.append([level.t] + [v.norm().item() for v in (uncond, cond, cond - uncond)])
        x0 = (x - level.sigma * eps) / level.alpha
        x = after.alpha * x0 + after.sigma * eps
    return pipe.decode(x)[0], np.array(norms)


mine, norms = draw(prompt)
theirs = pipe(prompt, seed=7, steps=12, guidance=4.0, sampler="ddim").images[0]
assert np.array_equal(np.asarray(mine), np.asarray(theirs)), "not what the pipeline does"
print("Twelve lines and the pipeline draw the same picture, bit for bit.")

# %% [markdown]
# How large is the push that (3) multiplies? Small beside the prediction, and not the same everywhere: least in the middle of
# the road, more at both ends.

# %%
t, uncond, cond, push = norms.T
fig, (left, right) = figures.canvas(7.6, 2.9, columns=2)
left.plot(t, uncond, label="without the sentence")
left.plot(t, cond, "--", label="with it")
left.set(xlabel="timestep (noise on the left)", ylabel="norm", xlim=(1000, 0), ylim=(0, None))
left.legend(frameon=False, fontsize=8)
right.plot(t, 100 * push / uncond, color=figures.COLORS[1])
right.set(xlabel="timestep", ylabel="the difference, in % of it", xlim=(1000, 0), ylim=(0, None))
low, high = 100 * (push / uncond).min(), 100 * (push / uncond).max()
figures.title(fig, f"The sentence changes the prediction by {low:.0f} to {high:.0f} %")
assert high < 100, "the push is smaller than the prediction at every step"
assert min(push[0] / uncond[0], push[-1] / uncond[-1]) > 1.5 * (push / uncond).min()
figures.show(fig, "Over the timesteps: norms of both predictions, and their difference in per cent")

# %% [markdown]
# ## Run
#
# What does it buy? Our world knows the truth about every picture, so we need not judge by eye: a checker, a small network
# trained on true scenes, reads what was drawn. We ask for 20 scenes whose combinations no training picture held. And what
# does it cost? "A flower" leaves time, place and colour open: in how many ways do 32 seeds fill them in?

# %%
checker = load_checker(find_model("scenes"))
wanted = held_out(20)
prompts = [scenes.caption(scene, scene.seed) for scene in wanted]


def accuracy(images):
    """The share of all questions about a picture that the checker answers as its caption says."""
    read = checker.read(image_tensor(images))
    shares = tally(map(verdict, wanted, read)).values()
    return sum(share.right for share in shares) / sum(share.asked for share in shares)


right_share = {s: accuracy(drawn(pipe, prompts, s, seed=0)) for s in scales}


# %%
def bits(answers):
    """Entropy of what was answered: 0 if always the same, 2 bits for four answers equally often."""
    share = np.unique(answers, return_counts=True)[1] / len(answers)
    return -(share * np.log2(share)).sum()


free = ("time", "ground", "mountains", "style", "left color", "left size")  # left open
variety = {}
for s in (1, 2, 4):
    found = checker.read(image_tensor(drawn(pipe, "a flower", s, seed=100, count=32)))
    variety[s] = sum(bits([str(each[question]) for each in found]) for question in free)
best = max(right_share, key=right_share.get)

fig, (left, right) = figures.canvas(7.6, 2.9, columns=2)
left.plot(scales, [100 * right_share[s] for s in scales], "o-")
left.set(xlabel="scale of guidance", ylabel="questions answered rightly, %", ylim=(0, 100))
right.plot(list(variety), list(variety.values()), "o-", color=figures.COLORS[1])
right.set(xlabel="scale of guidance", ylabel="variety of 32 flowers, bits", ylim=(0, 9))
figures.title(fig, f"Agreement is best at scale {best}, then collapses; guidance costs variety")
figures.show(fig, "Accuracy against the scale rises, stays, falls after 4; variety is highest at 1")

# %%
for s in scales:
    bits_too = f"   variety {variety[s]:.2f} bits" if s in variety else ""
    print(f"scale {s:2}: {100 * right_share[s]:5.1f} % right{bits_too}")
assert right_share[0] < 0.6 < 0.85 < right_share[1], "words count"
assert best in (1, 2, 4), "a little guidance is best"
assert right_share[14] < right_share[8] < right_share[best] - 0.1, "too much harms"
assert max(variety[2], variety[4]) < variety[1] - 0.2, "guidance costs variety"

# %% [markdown]
# Two things to take from the curves. The rise from 0 to 1 is what *training* with captions gave, and it is most of what
# there is: this model is small, its world is simple, and it listens well without help. Stable Diffusion gains far more
# between 1 and 7.5, because captions from the web are a weak signal. The fall on the right is common to both: the latent is
# pushed to places where no training picture ever was.
#
# ### A negative prompt
#
# Left to itself, our model paints balloons brown. "Not brown" as words means nothing to a model that has never read "not". But
# brown in the *unconditional* half of (3) is a direction to walk away from.

# %%
asked = {  # row: (prompt, negative prompt)
    "a large balloon": ("a large balloon", ""),
    "negative: brown": ("a large balloon", "a large brown balloon"),
    "… not brown": ("a large balloon that is not brown", ""),
}
rows, colors = [], {}
for row, (prompt_of, negative) in asked.items():
    rows.append(pipe(prompt_of, negative=negative, seed=20, count=6, steps=12, guidance=4).images)
    colors[row] = [found["left color"] for found in checker.read(image_tensor(rows[-1]))]
    print(f"{row:16} the checker sees:", ", ".join(colors[row]))
assert min(colors[row].count("brown") for row in ("a large balloon", "… not brown")) >= 4
assert colors["negative: brown"].count("brown") == 0
heading = "A negative prompt removes what the word “not” only names"
figures.pictures(rows, side=list(asked), heading=heading)

# %% [markdown]
# ## Break it
#
# Three faults that people really make, each with its own signature. **Swapped halves** (the batch is put together in one
# order and taken apart in the other): the picture runs away from its sentence. **A wrong sign**, which widely read tutorials
# print, $s\,\epsilon_c + (s-1)\,\epsilon_u$: the result is far too large, and the picture burns out. **Mixing instead of
# extrapolating**, $(s\,\epsilon_c + \epsilon_u)/(s+1)$: at a glance it is fine, and that makes it the worst of the three.
# Only beside the right picture does one see that guidance is off.

# %%
faults = {
    "right": None,
    "halves swapped": lambda u, c, s: c + s * (u - c),
    "sign of the 2nd term": lambda u, c, s: s * c + (s - 1) * u,
    "mixed": lambda u, c, s: (u + s * c) / (s + 1),
}
broken = {name: draw(prompt, combine=fault, s=4.0)[0] for name, fault in faults.items()}
for name, found in zip(broken, checker.read(image_tensor(broken.values())), strict=True):
    sees = f"{found['left color']} {found['left kind']}, {found['time']}"
    print(f"{name:22} the checker sees: {sees}")
    wanted_there = name in ("right", "mixed")  # the other two faults lose the sentence
    assert (sees == "red boat, sunset") == wanted_there
figures.pictures(list(broken.values()), list(broken), heading="Three faults in one line")

# %% [markdown]
# ## Your turn
#
# ### Exercise 06.1: guide it
# *Difficulty 1 of 5, importance 5 of 5, five minutes.* Write equation (3). `uncond` and `cond` are (B, 4, h, w).


# %% tags=["exercise"]
def cfg(uncond, cond, s):
    # BEGIN SOLUTION
    return uncond + s * (cond - uncond)
    # END SOLUTION


ldm.check("06.1", cfg)

# %% [markdown]
# ### Exercise 06.2: both halves in one batch
# *Difficulty 2 of 5, importance 4 of 5, five minutes.* The network is run once for both halves. From latents `x`
# (B, 4, h, w) and the contexts of the negative and of the positive prompts, each (B, L, D), make what it is given: latents
# (2B, 4, h, w) and contexts (2B, L, D), so that `.chunk(2)` of its output is `(uncond, cond)`.


# %% tags=["exercise"]
def one_batch(x, negative, positive):
    # BEGIN SOLUTION
    return torch.cat([x, x]), torch.cat([negative, positive])
    # END SOLUTION


ldm.check("06.2", one_batch)

# %% [markdown]
# ### Exercise 06.3: bring the spread back
# *Difficulty 3 of 5, importance 2 of 5, ten minutes.* A large scale makes the output too large. Lin et al. 2023 (section
# 3.4) bring its standard deviation back to that of `cond`, picture by picture, and mix: `phi` times the rescaled output plus
# `1 - phi` times the plain one.


# %% tags=["exercise"]
def rescaled(uncond, cond, s, phi):
    # BEGIN SOLUTION
    out = uncond + s * (cond - uncond)
    factor = cond.std((1, 2, 3), keepdim=True) / out.std((1, 2, 3), keepdim=True)  # (B, 1, 1, 1)
    return phi * factor * out + (1 - phi) * out
    # END SOLUTION


ldm.check("06.3", rescaled)

# %% [markdown]
# ### Exercise 06.4: guide in the middle of the road alone
# *Difficulty 1 of 5, importance 2 of 5, five minutes.* Kynkäänniemi et al. 2024 (equation 6) guide only where the noise
# $\sigma/\alpha$ lies in `(low, high]`; elsewhere the model runs unguided. Which scale belongs to a level whose
# $\sigma/\alpha$ is `ratio`?


# %% tags=["exercise"]
def scale_at(s, ratio, low, high):
    # BEGIN SOLUTION
    return s if low < ratio <= high else 1.0
    # END SOLUTION


ldm.check("06.4", scale_at)

# %% [markdown]
# ## The same on a real model
#
# The same function, on Stable Diffusion 1.5.

# %% tags=["real-model"]
sd = real("sd15")
if sd is not None:
    display(scale_strip(sd, "a photograph of a red boat on the sea at sunset", seeds=(1,)))

# %% [markdown]
# ## Where it lives in `ldm`
#
# Equation (3) is `classifier_free` in `ldm/guidance.py`, a closure of two lines around the network; `rescaled`, `within` (the
# interval), `all_of` (several prompts) and `perpendicular_negative` stand beside it. `ldm/network.py` puts the halves into one
# batch or runs them apart. In diffusers the same line stands in each pipeline's `__call__`, once a family.

# %%
import inspect

from ldm import guidance

print(inspect.getsource(guidance.classifier_free))

# %% [markdown]
# **In short.** Guidance extrapolates from the prediction without the words through the one with them. A negative prompt
# replaces the empty one. More is not better: agreement has a maximum, and variety is its price. Next:
# [07, samplers: one equation](07_samplers.ipynb).
