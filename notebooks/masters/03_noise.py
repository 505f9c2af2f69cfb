# %% [markdown]
# # 03 · Noise, and the perfect denoiser
#
# **How much noise is t = 400, and what is the best that anyone could do against it?**
#
# About 25 minutes to read, half a minute to run. Before it: [00](00_one_picture.ipynb), [02](02_latents.ipynb). You
# will have built three schedules of noise and the best denoiser that a set of pictures allows, seen why it is useless,
# and found what Stable Diffusion's last step doesn't destroy.

# %%
import math
import textwrap
from dataclasses import replace

import torch
from PIL import Image

import ldm
from ldm import scenes
from ldm.diffusion import Prediction, add_noise, target, to_x0_eps
from ldm.lab.real import real
from ldm.loading import find_model
from ldm.metrics.evaluation import held_out, load_checker, verdict
from ldm.pictures import image_tensor
from ldm.samplers import find_sampler
from ldm.schedules import ScheduleConfig, alpha_bars, make_schedule
from ldm.schedules.betas import betas, zero_terminal_snr

torch.set_grad_enabled(False)
pipe = ldm.load("scenes")


# %%
def network(pipe, x, level, words=""):
    """What the network believes the clean latent to be, told `words` (none: nothing but x)."""
    context = pipe.encode([words] * len(x) if isinstance(words, str) else words)
    out = pipe.unet(x, level.t, context)
    return to_x0_eps(out, x, level.alpha, level.sigma, pipe.scheduler.prediction_type).x0


def ladder(pipe, picture, ts=(0, 200, 400, 600, 800, 999)):
    """A picture under growing noise, and below it the network's one guess at each rung."""
    side = pipe.default_size
    x0 = pipe.vae.encode(image_tensor([picture.resize((side, side))]))  # (1, 4, h, w)
    eps = ldm.Noise.from_seeds([3]).draw(x0.shape[1:])
    levels = [pipe.schedule(10).at(0, t) for t in ts]
    noisy = [add_noise(x0, eps, level.alpha, level.sigma) for level in levels]
    guesses = [network(pipe, x, level) for x, level in zip(noisy, levels)]
    rows = [[pipe.decode(x)[0] for x in row] for row in (noisy, guesses)]
    return figures.pictures(
        rows,
        [f"t = {level.t:.0f}" for level in levels],
        ["noised", "one guess"],
        heading="Where we see only noise, the network still sees a scene",
        inches=0.9,
    )


unseen = held_out(64)  # scenes whose combinations no training picture held
picture = Image.fromarray(scenes.render(unseen[3]).image)
ladder(pipe, picture)

# %% [markdown]
# The upper row is all that the network is given: a scene's latent with noise, here decoded. (Noise in a latent doesn't
# look like snow on a screen; each of its numbers paints a patch.) The lower row is the network's answer, in one step
# and without a word of the caption. How much of the picture is there at $t = 400$? And could anyone answer better?
#
# ## Predict
#
# Commit yourself before you go on. A picture is noised to $t = 400$ of 1000. (a) Which share of what you see above is
# still the picture's own? (b) Three contestants guess the clean picture, which none of them has seen before: the best
# Gaussian blur, our network, and an *ideal* denoiser that knows 512 other pictures by heart. In which order do they
# end? (c) What does the ideal denoiser draw if it begins from pure noise? (Nothing checks this cell; it is for you.)

# %%
my_guess = {"(a) the picture's share, %": None, "(b) best to worst": None, "(c) it draws": None}

# %% [markdown]
# ## Derive
#
# Training adds noise in 1000 small steps that keep the variance, $x_t = \sqrt{1-\beta_t}\,x_{t-1} +
# \sqrt{\beta_t}\,\epsilon_t$. Gaussians add up to a Gaussian, so all steps up to $t$ are one (Ho et al. 2020, equation
# 4):
#
# $$x_t = \alpha_t\,x_0 + \sigma_t\,\epsilon, \qquad \alpha_t^2 = \bar\alpha_t = \prod_{s \le t} (1-\beta_s), \qquad
# \sigma_t^2 = 1 - \bar\alpha_t. \tag{1}$$
#
# $t$ is a mere index into a table. What counts is the signal-to-noise ratio (Kingma et al. 2021, section 3.1):
#
# $$\mathrm{SNR}_t = \alpha_t^2 / \sigma_t^2. \tag{2}$$
#
# A network may say $\epsilon$, $x_0$ or $v$ (Salimans & Ho 2022, appendix D): with $x$, each gives the others.
#
# $$v = \alpha\,\epsilon - \sigma\,x_0 \quad\Rightarrow\quad x_0 = \alpha\,x - \sigma\,v, \quad \epsilon = \sigma\,x + \alpha\,v. \tag{3}$$
#
# Now the best denoiser. The guess with the least squared error is the mean of all that $x$ may have been, $E[x_0 \mid
# x]$. Say the world is a set of $N$ pictures $x^1 \dots x^N$, each equally likely. By (1), $x$ given picture $i$ is
# Gaussian around $\alpha x^i$, and Bayes' rule weighs the pictures (Karras et al. 2022, appendix B.3):
#
# $$D(x) = \sum_i w_i\,x^i, \qquad w = \mathrm{softmax}_i\!\left(-\frac{\lVert x - \alpha x^i \rVert^2}{2\sigma^2}\right). \tag{4}$$
#
# Training on these pictures minimises, level by level, the very error that (4) minimises (to ask for $\epsilon$ instead
# of $x_0$ only weighs the levels). No network can beat (4) on them, and an infinitely patient and flexible one would
# become it.
#
# ## Build
#
# Three rules for $\beta$, and (1).


# %%
def shares(name, n=1000):
    """alpha-bar at every timestep, (n,) float32."""
    if name == "scaled linear":  # Stable Diffusion: linear in the root of beta
        beta = torch.linspace(0.00085**0.5, 0.012**0.5, n) ** 2
    elif name == "linear":  # Ho et al. 2020, section 4
        beta = torch.linspace(0.0001, 0.02, n)
    else:  # cosine, Nichol & Dhariwal 2021, equation 17: alpha-bar first, beta from it
        f = [math.cos((k / n + 0.008) / 1.008 * math.pi / 2) ** 2 for k in range(n + 1)]
        beta = torch.tensor([min(1 - f[k + 1] / f[k], 0.999) for k in range(n)])
    return (1 - beta).cumprod(0)  # (1)


theirs = {
    "scaled linear": pipe.scheduler,
    "linear": ScheduleConfig(beta_schedule="linear"),
    "cosine": ScheduleConfig(beta_schedule="squaredcos_cap_v2"),
}
for name, config in theirs.items():
    assert torch.equal(shares(name), alpha_bars(config)), name
print("Three schedules, bit for bit those of ldm.")

# %% [markdown]
# And (4), in three lines. ldm has no ideal denoiser to compare with, so a plainer one must do: Bayes' rule picture by
# picture, in double precision.


# %%
def ideal(x, level, data):
    """The mean of what x (B, 4, h, w) may have been in `data` (N, 4, h, w), and weights (B, N)."""
    distance = torch.cdist(x.flatten(1), level.alpha * data.flatten(1)) ** 2  # (B, N)
    w = (-distance / (2 * level.sigma**2)).softmax(1)  # (4)
    return (w @ data.flatten(1)).view_as(x), w


def bayes(x, level, data):
    """The same for one latent, by Bayes' rule: each picture's likelihood over the sum of all."""
    logs = [-((x - level.alpha * each) ** 2).sum() / (2 * level.sigma**2) for each in data]
    likelihood = [math.exp(log - max(logs)) for log in logs]
    return sum(p * each for p, each in zip(likelihood, data)) / sum(likelihood)


# %%
def level_at(t):
    """A row of the training's own table: t, alpha and sigma."""
    return pipe.schedule(10).at(0, t)


def encode(some):
    """The latents of scenes, (N, 4, 16, 16)."""
    pixels = [Image.fromarray(scenes.render(scene).image) for scene in some]
    parts = [image_tensor(pixels[k : k + 32]) for k in range(0, len(pixels), 32)]
    return torch.cat([pipe.vae.encode(part) for part in parts])


def noisy(x0, t, seed=0):
    """Latents (B, 4, h, w) under noise, each with a seed of its own, and the level."""
    level = level_at(t)
    eps = ldm.Noise.from_seeds(range(seed, seed + len(x0))).draw(x0.shape[1:])
    return add_noise(x0, eps, level.alpha, level.sigma), level


known = [scenes.sample(seed, "train") for seed in range(512)]  # our network has seen them too
data, new = encode(known), encode(unseen)
x, level = noisy(new[:4], 900)
plain = torch.stack([bayes(each.double(), level, data.double()) for each in x])
assert torch.allclose(ideal(x, level, data)[0].double(), plain, atol=1e-3)
print("the ideal denoiser equals Bayes' rule")

# %% [markdown]
# ## Run
#
# ### How much noise is t = 400?

# %%
t = torch.arange(1000)
bars = {name: shares(name).double() for name in theirs}
fig, (left, right) = figures.canvas(7.8, 3.0, columns=2)
for name, bar in bars.items():
    left.plot(t, 100 * bar, label=name)
    right.plot(t, (bar / (1 - bar)).log(), label=name)
for ax in (left, right):
    ax.axvline(400, color=figures.QUIET, linewidth=0.8)
    ax.set(xlabel="timestep", xlim=(0, 1000))
left.set(ylabel="the picture's share, %", ylim=(0, 100))
right.set(ylabel="log-SNR", ylim=(-12, 10))
left.legend(frameon=False, fontsize=8)
at_400 = [f"{100 * bar[400]:.0f}" for bar in bars.values()]
found = f"{at_400[0]}, {at_400[1]} or {at_400[2]} %"
figures.title(fig, f"t = 400 leaves {found} of the picture: t alone says nothing")
figures.show(fig, "Alpha-bar and log-SNR over the timesteps, for three schedules")

# %%
rungs = (0, 200, 400, 600, 800, 999)
print("alpha at    t:" + "".join(f"{k:8}" for k in rungs), "  more noise than picture from")
for name, bar in bars.items():
    half = int((bar < 0.5).nonzero()[0])
    print(f"{name:14}" + "".join(f"{bar[k].sqrt():8.5f}" for k in rungs), f"  t = {half}")
sd = bars["scaled linear"]
assert 0.42 < sd[400] < 0.43 and int((sd < 0.5).nonzero()[0]) == 354
assert round((1 - sd[400]).sqrt().item(), 2) == 0.76 and round(sd[400].sqrt().item(), 2) == 0.65
assert 0.0682 < sd[999].sqrt() < 0.0683
assert bars["linear"][999].sqrt() < 0.007 and bars["cosine"][999].sqrt() < 0.0001

# %% [markdown]
# The rows are $\alpha_t = \sqrt{\bar\alpha_t}$, the factor before the picture in (1). In Stable Diffusion's schedule,
# which is also our model's, $t = 400$ means $0.65\,x_0 + 0.76\,\epsilon$: 42 % of the variance is the picture's, and
# noise has the upper hand from $t = 354$. The last number of the first row, 0.0683, will occupy us below: it isn't 0.
#
# All this presumes latents of variance 1; that is what notebook 02's scaling factor is for.

# %%
eps = ldm.Noise.from_seeds(range(64)).draw(new.shape[1:])
level = level_at(400)
x = add_noise(new, eps, level.alpha, level.sigma)  # (1)
v = level.alpha * eps - level.sigma * new  # (3)
assert torch.equal(v, target(new, eps, level.alpha, level.sigma, "v_prediction"))
assert torch.allclose(level.alpha * x - level.sigma * v, new, atol=1e-5)
assert torch.allclose(level.sigma * x + level.alpha * v, eps, atol=1e-5)
assert 0.9 < data.std() < 1.1 and 0.9 < x.std() < 1.1
print(f"spread of the 512 latents {data.std():.3f}, of noisy ones at t = 400 {x.std():.3f}")

# %% [markdown]
# ### Three denoisers
#
# The ideal denoiser knows 512 scenes. The network was trained on 12,000, among them these. The blur knows nothing; of
# ten widths it may take the one that, in hindsight, was best. First the scene above, under the same noise, which none
# of the three has seen.


# %%
def blur(x, level, truth, widths=(0.1, 0.4, 0.6, 0.8, 1, 1.5, 2, 3, 5, 8)):
    """x / alpha, smoothed by the Gaussian whose width is best in hindsight."""
    k, tries = torch.arange(16.0), []
    for width in widths:
        g = torch.exp(-((k[:, None] - k) ** 2) / (2 * width**2))  # (16, 16)
        g = g / g.sum(1, keepdim=True)
        tries.append(g @ (x / level.alpha) @ g.T)  # down the columns, and along the rows
    return min(tries, key=lambda each: (each - truth).square().mean())


contestants = {
    "best blur": blur,
    "ideal": lambda x, level, truth: ideal(x, level, data)[0],
    "network": lambda x, level, truth: network(pipe, x, level),
}


# %%
def compete(x0, who, heading, ts=rungs):
    """Guesses of one latent (1, 4, h, w) at growing noise, one row a contestant."""
    under = [noisy(x0, t, seed=3) for t in ts]
    rows = [[contestants[name](x, level, x0) for x, level in under] for name in who]
    drawn = [pipe.decode(torch.cat(row)) for row in rows]
    return figures.pictures(drawn, [f"t = {t}" for t in ts], who, heading=heading, inches=0.9)


compete(new[3:4], list(contestants), "A new scene: the ideal denoiser sees others")

# %% [markdown]
# Even at $t = 0$, where the picture lies open, the ideal denoiser answers with the tree that it knows. Now a scene of
# the 512:

# %%
compete(data[4:5], ["ideal", "network"], "A scene of the set: it has it by heart, the network not")

# %% [markdown]
# How general is this? The mean squared error of each number of the latent (whose variance is 1), for 24 scenes of
# either kind.

# %%
ts = (20, 100, 200, 400, 600, 800, 900, 999)
words = [scenes.caption(scene, scene.seed, full=True) for scene in unseen[:24]]
error = {}


def off(name, kind, guess, truth):
    error.setdefault((name, kind), []).append((guess - truth).square().mean().item())


for t in ts:
    for kind, x0 in (("set", data[:24]), ("new", new[:24])):
        x, level = noisy(x0, t)
        off("mean of the set", kind, data.mean(0), x0)
        for name, guess in contestants.items():
            off(name, kind, guess(x, level, x0), x0)
        if kind == "new":
            off("network, told the words", kind, network(pipe, x, level, words), x0)

# %%
fig, axes = figures.canvas(7.8, 3.3, columns=2)
blue, orange, green = figures.COLORS[:3]
looks = {
    "mean of the set": (figures.QUIET, ":"),
    "best blur": (green, "-"),
    "ideal": (orange, "-"),
    "network": (blue, "-"),
    "network, told the words": (blue, "--"),
}
for ax, kind, name in zip(axes, ("set", "new"), ("scenes of the set", "new scenes")):
    for who, (color, line) in looks.items():
        if (who, kind) in error:
            ax.plot(ts, error[who, kind], line, color=color, label=who)
    ax.set(xlabel="timestep", ylabel="squared error of x0", xlim=(0, 1000), ylim=(0, 1))
    ax.set_title(name, fontsize=10, color=figures.INK)
axes[0].legend(handles=axes[1].lines, frameon=False, fontsize=7.5, loc=(0.02, 0.42))
figures.title(fig, "Perfect where it knows the answer, worse than a blur where it does not")
figures.show(fig, "Error over the timesteps, for scenes of the set and for new ones")

# %%
print("error at t =               " + "".join(f"{t:7}" for t in ts))
for (name, kind), row in error.items():
    print(f"{name:23} {kind} " + "".join(f"{each:7.3f}" for each in row))
e = {key: dict(zip(ts, row)) for key, row in error.items()}
known_by_heart = [e["ideal", "set"][t] for t in (20, 100, 200, 400, 600)]
assert max(known_by_heart) < 1e-3 and min(e["ideal", "new"].values()) > 0.4
assert all(e["ideal", "set"][t] < e["network", "set"][t] for t in ts), "(4) is a bound"
assert all(e["ideal", "new"][t] > e["best blur", "new"][t] for t in (20, 100, 200, 400))
assert all(e["network", "new"][t] < e["best blur", "new"][t] for t in ts)
assert all(e["network", "new"][t] < e["ideal", "new"][t] for t in ts if t <= 800)
assert all(0.7 < e["network", "new"][t] / e["network", "set"][t] < 1.4 for t in ts), "no memory"
assert e["network", "new"][800] < 0.6 * e["mean of the set", "new"][800], "it sees a scene"
helped = e["network, told the words", "new"]
assert all(helped[t] < 0.75 * e["network", "new"][t] for t in (800, 999)), "words help"

# %% [markdown]
# Read the left half first. On scenes that it knows the ideal denoiser makes no error at all (below 0.001) up to $t =
# 600$, where five sixths of the variance are noise, and nobody can be below its curve on average. On the right it fails
# completely: with hardly any noise it answers with *another picture* (it cannot do otherwise: (4) can say nothing that
# isn't a mean of its pictures), and a blur does better.
#
# The network has nearly the same error in both halves. It isn't the minimum of its own training loss: on scenes that it
# was trained on it stands far above the ideal curve. And just for this it is worth something on the right. Where noise
# is strong nobody can tell scenes apart, and the two meet; there words are the best help (dashed).
#
# How soon does the ideal denoiser know which scene it has before it? All 512, noised:

# %%
for t in (500, 600, 700, 800, 900, 999):
    x, level = noisy(data, t)
    w = ideal(x, level, data)[1]  # (512, 512)
    right = (w.argmax(1) == torch.arange(512)).float().mean().item()
    in_play = torch.special.entr(w).sum(1).exp().mean().item()  # e to the entropy
    print(f"t = {t}: {100 * right:5.1f} % recognised, {in_play:5.1f} scenes in play")
    assert right > {500: 0.99, 600: 0.99, 700: 0.97, 800: 0.8, 900: 0.3, 999: 0.05}[t], t

# %% [markdown]
# What looks like pure noise to us identifies one picture among 512. 1024 numbers, each barely touched, together say a
# great deal; guessing blindly would be right in 0.2 %. Even the last training step, $t = 999$, still betrays something.
#
# ### Let them draw
#
# A denoiser is all that a sampler needs, so the ideal one can draw, too: eight seeds, 20 DDIM steps, by ldm's own loop.


# %%
def drawn(x0_of, seeds):
    """Latents drawn by a denoiser, a function of (x, level)."""

    def denoise(x, level):
        x0 = x0_of(x, level)
        return Prediction(x0, (x - level.alpha * x0) / level.sigma)  # (1), solved for eps

    schedule, noise = pipe.schedule(timesteps=range(999, 0, -50)), ldm.Noise.from_seeds(seeds)
    x = noise.draw((4, 16, 16)) * schedule.start_scale
    *_, last = ldm.sample(denoise, x, schedule, find_sampler("ddim").step, noise)
    return last.x0


def nearest(x):
    """The scenes of the set that are nearest, and how far off they are."""
    gaps = (x[:, None] - data).flatten(2).norm(dim=2)  # (B, 512)
    return data[gaps.argmin(1)], gaps.min(1).values


seeds = range(8)
recited = drawn(lambda x, level: ideal(x, level, data)[0], seeds)
painted = drawn(lambda x, level: network(pipe, x, level), seeds)
for name, x in (("ideal", recited), ("network", painted), ("a new scene", new)):
    gap = nearest(x)[1]
    print(f"{name:12} nearest of the 512: {gap.min():.3f} to {gap.max():.3f} away")
assert nearest(recited)[1].max() < 1e-3, "copies"
assert nearest(painted)[1].min() > 10 and nearest(new)[1].min() > 10

# %%
rows = recited, nearest(recited)[0], painted, nearest(painted)[0]
side = ["ideal", "nearest", "network", "nearest"]
told = "The ideal one recites, the network invents"
figures.pictures([pipe.decode(x[:5]) for x in rows], (), side, told, inches=0.9)

# %% [markdown]
# The upper two rows are equal: **a perfectly trained, perfectly flexible diffusion model is a photocopier.** Nothing in
# the loss asks for anything new. The network's pictures are as far from the 512 as scenes that were never in the set.
#
# But the network saw 12,000 pictures, not 512. So let it draw what none of the 12,000 held: eight combinations of
# thing, colour, time, ground and style that were kept from it. A copy would be wrong; the checker, a network trained on
# true scenes, reads what came out.

# %%
checker = load_checker(find_model("scenes"))
images = pipe(words[:8], seed=0, steps=12).images
read = checker.read(image_tensor(images))
asked = ("object", "color", "time", "ground", "style")
verdicts = [verdict(scene, found) for scene, found in zip(unseen, read)]
new_ones = sum(all(all(each[question]) for question in asked) for each in verdicts)
print(f"{new_ones} of 8 pictures show a combination that no training picture held")
assert new_ones >= 5

# %% [markdown]
# ### Between memory and blur
#
# Would a larger memory do? The ideal denoiser's error on new scenes, at $t = 400$, for growing parts of the set:

# %%
x, level = noisy(new, 400)
sizes = (32, 64, 128, 256, 512)
misses = {}
for n in sizes:  # all parts of that size, averaged
    tries = [(ideal(x, level, part)[0] - new).square().mean() for part in data.split(n)]
    misses[n] = torch.stack(tries).mean().item()
    print(f"{n:4} scenes: {misses[n]:.3f}")
last = misses[512] / misses[256]
print(f"The last doubling took off {100 * (1 - last):.0f} %.")
print(f"network:     {e['network', 'new'][400]:.3f}")
kept = [misses[2 * n] / misses[n] for n in sizes[:-1]]
at_best = misses[512] * min(kept) ** math.log2(12_000 / 512)
print(f"12,000 scenes, if every doubling did as much as the best of these: {at_best:.2f}")
assert all(0.85 < each < 0.99 for each in kept)
assert at_best > 3 * e["network", "new"][400]

# %% [markdown]
# Each doubling takes off a tenth or so. Even if that went on up to the 12,000 scenes that the network was trained on,
# the best memory of all it saw would remain several times worse than the network.
#
# So the network must *share*: use what it learnt from one place of one picture in another picture. One explanation is
# that convolutions look at neighbourhoods (Kamb & Ganguli 2025). It can be tried without any network: let (4) judge a
# window around each position instead of the whole latent, and each position choose its own scenes.


# %%
def windows(x, level, data, radius):
    """(4) for every position alone, by the scenes that fit in the window around it."""
    k = torch.arange(16)
    near = ((k[:, None] - k).abs() <= radius).float()  # (16, 16)
    found = []
    for each in x:
        distance = near @ (each - level.alpha * data).square().sum(1) @ near  # (N, 16, 16)
        w = (-distance / (2 * level.sigma**2)).softmax(0)
        found.append((w[:, None] * data).sum(0))
    return torch.stack(found)


x, level = noisy(new[:12], 800)
whole = ideal(x, level, data)[0]
assert torch.allclose(windows(x, level, data, 15), whole, atol=1e-3)  # this one sees everything

# %%
radii, best, local = (0, 1, 2, 4, 15), {}, {}
for t in ts:
    x, level = noisy(new[:12], t)
    for r in radii:
        local[t, r] = (windows(x, level, data, r) - new[:12]).square().mean().item()
    best[t] = min(radii, key=lambda r: local[t, r])
print("window    t =" + "".join(f"{t:7}" for t in ts))
for r in radii:
    name = f"{2 * r + 1} x {2 * r + 1}" if r < 15 else "whole"
    print(f"{name:13}" + "".join(f"{local[t, r]:7.3f}" for t in ts))
widths = [f"{2 * best[t] + 1}" if best[t] < 15 else "whole" for t in ts]
print("best         " + "".join(f"{width:>7}" for width in widths))
assert best[20] == 0 and best[400] in (1, 2) and best[999] == 15
assert list(best.values()) == sorted(best.values()), "the more noise, the wider the best window"
assert local[400, best[400]] < 0.65 * local[400, 15] and local[20, 0] < 0.15 * local[20, 15]


# %%
def quilt(x, level):
    """Windows as wide as is best at the nearest of the measured levels."""
    return windows(x, level, data, best[min(ts, key=lambda t: abs(t - level.t))])


sewn = drawn(quilt, seeds)
gap, usual = nearest(sewn)[1].mean(), nearest(new)[1].mean()
print(f"mean distance to the nearest of the 512: quilts {gap:.1f}, new scenes {usual:.1f}")
assert nearest(sewn)[1].min() > 10 and gap > usual + 2, "new, but like no scene at all"
told = "Windows invent, but without sense"
weights = sum(p.numel() for p in pipe.unet.parameters())
print(f"{weights:,} parameters, {12_000 * new[0].numel():,} numbers in the training latents")
figures.pictures([pipe.decode(sewn[:5])], (), ["windows"], told, inches=0.9)

# %% [markdown]
# From the same 512 scenes, with the same formula, something new: none of these pictures exists in the set, and on new
# scenes its error at $t = 400$ is about half that of the whole memory. But no position knows what the others chose, so
# the sky is patched together from all times of day. The network does both halves: it shares what is local, and holds
# the whole together, as its attention and its coarse layers let it (notebooks 04 and 05). That it is small and was
# trained briefly may help to keep it from reciting, too: it has 5.5 million parameters for the 12 million numbers of
# its training latents (12,000 of 1,024), and saw each picture under other noise every time.
#
# This is no law. With few pictures, or one picture hundreds of times in the set, real networks do recite: Carlini et
# al. 2023 drew about a hundred training images out of Stable Diffusion, searching among those most often duplicated in
# its data.
#
# ### The last step doesn't end in noise
#
# Back to the number above. At the last step $\alpha_{999} = 0.068$, not 0. (The linear schedule ends at 0.006, the
# cosine at 0.00005.) Too little to see; but sums over many positions see it. A test: noise 64 new scenes to $t = 999$,
# average each channel of the latent, so that four numbers remain, and guess the time of day from them.

# %%
kinds = torch.tensor([scenes.TIMES.index(scene.time) for scene in known])
means = torch.stack([data[kinds == k].mean(0) for k in range(4)])  # day, sunset, night, dawn
truth = torch.tensor([scenes.TIMES.index(scene.time) for scene in unseen])
right = []
for seed in range(0, 64 * 20, 64):
    x, level = noisy(new, 999, seed)
    gaps = torch.cdist(x.mean((2, 3)), level.alpha * means.mean((2, 3)))  # (64, 4)
    right.append((gaps.argmin(1) == truth).float().mean().item())
share = sum(right) / len(right)
print(f"time of day told from four means at t = 999: {100 * share:.0f} % right; blindly 25 %")
assert 0.45 < share < 0.7

# %% [markdown]
# The network was trained with that hint and relies on it: it takes the mean of the first latent for the brightness of
# the picture. A picture is drawn from pure noise, whose mean is nearly 0, so it ought to come out neither dark nor
# bright. Let us look, and then give the noise what training would have left in it, 0.068 of the mean latent of all
# nights, or of all days.

# %%
pure = ldm.Noise.from_seeds(range(16)).draw((4, 16, 16))
starts = {
    "noise alone": pure,
    "0.068 of night": add_noise(means[2], pure, level.alpha, level.sigma),
    "0.068 of day": add_noise(means[0], pure, level.alpha, level.sigma),
}
rows, nights, greys = [], {}, {}
for name, x in starts.items():
    run = {"guidance": 1, "sampler": "ddim", "timesteps": range(999, 0, -125)}
    images = pipe([""] * 16, latents=x, **run).images
    nights[name] = sum(found["time"] == "night" for found in checker.read(image_tensor(images)))
    greys[name] = image_tensor(images).mean().item() * 127.5 + 127.5
    rows.append(images[:5])
    print(f"{name:15} {nights[name]:2} of 16 are night, mean grey {greys[name]:.0f}")
assert nights["noise alone"] <= 3, "fewer than the quarter that are night in our world"
assert nights["0.068 of night"] >= nights["noise alone"] + 5
assert greys["0.068 of night"] + 20 < greys["noise alone"] < greys["0.068 of day"] - 10
told = f"7 % of a mean: {nights['0.068 of night']} of 16 are night"
figures.pictures(rows, (), list(starts), told, inches=0.9)

# %% [markdown]
# So a mean of 0 is no neutral start: it says *medium brightness*. Lin et al. 2023 found that this keeps Stable
# Diffusion from very dark and very bright pictures. Its latents are 64×64 instead of our 16×16, so a mean over them
# holds a quarter of our noise, and the hint is four times as clear.
#
# They mend the table (section 3.1, algorithm 1): shift $\sqrt{\bar\alpha}$ so that it ends at 0, and stretch it so
# that its beginning stays. (Their section 3.3 adds that a run must then begin at the last step; many begin lower,
# and so does ours by its file: with ten steps at $t = 901$.)
#
# $$\alpha'_t = (\alpha_t - \alpha_T)\,\frac{\alpha_0}{\alpha_0 - \alpha_T}. \tag{5}$$

# %%
root = sd.sqrt()
mended = (root - root[-1]) * root[0] / (root[0] - root[-1])  # (5)
theirs = 1 - zero_terminal_snr(betas(pipe.scheduler))  # as 1 - beta
assert torch.allclose(theirs.cumprod(0).sqrt().double(), mended, atol=1e-5)
print("     t   alpha  mended  log-SNR  mended")
for t in (0, 200, 400, 600, 800, 999):
    snr, other = root[t] ** 2 / (1 - root[t] ** 2), mended[t] ** 2 / (1 - mended[t] ** 2)
    print(f"{t:6} {root[t]:7.4f} {mended[t]:7.4f} {snr.log():8.2f} {other.log():7.2f}")
assert mended[-1] == 0 and abs(mended[0] - root[0]) < 1e-12 and pipe.schedule(10)[0].t == 901

# %% [markdown]
# At its end $\epsilon$ is useless as an answer: $x$ *is* $\epsilon$, and $x_0 = (x - \sigma\epsilon)/\alpha$ would be
# 0/0. But (3) gives $v = -x_0$ there, a question about the picture. So a model for this table predicts $v$, and ldm
# refuses one that doesn't:

# %%
zero = replace(pipe.scheduler, rescale_betas_zero_snr=True, timestep_spacing="trailing")
try:
    make_schedule(zero, 4)
except ldm.LDMError as refusal:
    print(textwrap.fill(str(refusal), 90), "\n")
print(make_schedule(replace(zero, prediction_type="v_prediction"), 4).table())

# %% [markdown]
# ## Break it
#
# Four ways to get (1) wrong, each easily made. None raises an error, and a network trains on any of them. **No square
# roots**: the amplitudes of $x$ are variances, and it shrinks halfway. **$\beta$ for $\bar\alpha$**: noise from the
# first step. **$1-\beta$ for $\bar\alpha$**, the product forgotten: hardly any noise until the end. **Swapped.** Two
# numbers tell them apart: the spread of $x$, which should stay at 1, and its correlation with $x_0$, which should fall
# from 1 to $\alpha_T$.

# %%
beta = betas(pipe.scheduler)
bar = (1 - beta).cumprod(0)
faults = {
    "right": (bar.sqrt(), (1 - bar).sqrt()),
    "no square roots": (bar, 1 - bar),
    "beta for alpha-bar": (beta.sqrt(), (1 - beta).sqrt()),
    "1 - beta for alpha-bar": ((1 - beta).sqrt(), beta.sqrt()),
    "swapped": ((1 - bar).sqrt(), bar.sqrt()),
}
signs, strips = {}, []
for name, (alpha, sigma) in faults.items():
    found = {t: add_noise(new, eps, alpha[t], sigma[t]) for t in (0, 300, 600, 999)}
    spread = {t: x.std().item() for t, x in found.items()}
    pairs = {t: torch.stack([x.flatten(), new.flatten()]) for t, x in found.items()}
    like = {t: torch.corrcoef(pair)[0, 1].item() for t, pair in pairs.items()}
    signs[name] = spread, like
    strips.append([pipe.decode(found[t][3:4])[0] for t in (0, 300, 999)])

# %%
print("t =                              0    300    600    999")
for name, (spread, like) in signs.items():
    print(f"{name:23} spread" + "".join(f"{each:7.2f}" for each in spread.values()))
    print(f"{'':18} correlation" + "".join(f"{each:7.2f}" for each in like.values()))
spread, like = ({name: pair[k] for name, pair in signs.items()} for k in (0, 1))
assert all(0.95 < each < 1.05 for each in spread["right"].values())
assert spread["no square roots"][300] < 0.8, "it shrinks halfway"
assert like["beta for alpha-bar"][0] < 0.1 and like["1 - beta for alpha-bar"][999] > 0.95
assert like["swapped"][0] < 0.1 and like["swapped"][999] > 0.95 and like["right"][999] < 0.15
assert like["no square roots"][600] < 0.7 * like["right"][600]
turned = [list(row) for row in zip(*strips)]
labels = ["right", "no roots", "beta", "1 - beta", "swapped"]
at = ["t = 0", "t = 300", "t = 999"]
figures.pictures(turned, labels, at, "One line, four faults", inches=0.76)

# %% [markdown]
# "No square roots" is the treacherous one: to the eye it is nearly the right ladder. Only numbers give it away: the
# spread falls half-way, and so, by t = 600, has the correlation.
#
# ## Your turn
#
# ### Exercise 03.1: how much noise?
# *Difficulty 1 of 5, importance 4 of 5, five minutes.* Equation (2) as the field plots it: the natural logarithm of the
# SNR at every timestep. `bars` (N,) is $\bar\alpha$.


# %% tags=["exercise"]
def log_snr(bars):
    # BEGIN SOLUTION
    return (bars / (1 - bars)).log()
    # END SOLUTION


ldm.check("03.1", log_snr)

# %% [markdown]
# ### Exercise 03.2: add noise
# *Difficulty 2 of 5, importance 5 of 5, ten minutes.* Equation (1) for a batch, from nothing but the betas: `x0` and
# `eps` are (B, 4, h, w), `t` (B,) whole timesteps, one for each latent, `betas` (1000,). This line stands in every
# training loop.


# %% tags=["exercise"]
def noised(x0, eps, t, betas):
    # BEGIN SOLUTION
    bar = (1 - betas).cumprod(0)[t].view(-1, 1, 1, 1)  # (B, 1, 1, 1)
    return bar.sqrt() * x0 + (1 - bar).sqrt() * eps
    # END SOLUTION


ldm.check("03.2", noised)

# %% [markdown]
# ### Exercise 03.3: there and back
# *Difficulty 2 of 5, importance 5 of 5, ten minutes.* A network has said `out` of the noisy latent `x`. If `kind` is
# "eps" it has told the noise, if "v" the $v$ of equation (3). Return `(x0, eps)`, as these imply them.


# %% tags=["exercise"]
def both(out, x, alpha, sigma, kind):
    # BEGIN SOLUTION
    if kind == "eps":
        return (x - sigma * out) / alpha, out
    return alpha * x - sigma * out, sigma * x + alpha * out
    # END SOLUTION


ldm.check("03.3", both)

# %% [markdown]
# ### Exercise 03.4: the best that anyone could do
# *Difficulty 3 of 5, importance 3 of 5, fifteen minutes.* Equation (4), without looking: `x` (B, 4, h, w), numbers
# `alpha` and `sigma`, `data` (N, 4, h, w); return the guesses (B, 4, h, w). Mind what exponentials do to numbers below
# -100.


# %% tags=["exercise"]
def my_ideal(x, alpha, sigma, data):
    # BEGIN SOLUTION
    distance = (x[:, None] - alpha * data).square().sum((2, 3, 4))  # (B, N)
    w = (-distance / (2 * sigma**2)).softmax(1)
    return (w @ data.flatten(1)).view_as(x)
    # END SOLUTION


ldm.check("03.4", my_ideal)

# %% [markdown]
# ### Further 03.5: end in noise
# *Difficulty 2 of 5, importance 2 of 5, ten minutes.* Equation (5), from $\bar\alpha$ to $\bar\alpha'$: `bars` (N,) of
# any schedule.


# %% tags=["exercise"]
def zero_terminal(bars):
    # BEGIN SOLUTION
    root = bars.sqrt()
    return ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
    # END SOLUTION


ldm.check("03.5", zero_terminal)

# %% [markdown]
# ## The same on a real model
#
# The same ladder with Stable Diffusion 1.5, whose schedule is the same. The scene is nothing it was trained on; noise
# of one level hides less of it than of ours, since a latent of 64×64 says everything sixteen times.

# %% tags=["real-model"]
big = real("sd15")
if big is not None:
    print(f"alpha at the last step: {alpha_bars(big.scheduler)[-1].sqrt():.4f}")
    display(ladder(big, picture))

# %% [markdown]
# ## Where it lives in `ldm`
#
# The tables of $\beta$ and (5) are in `ldm/schedules/betas.py`, (1) and (3) in `ldm/diffusion.py`, `add_noise`,
# `target` and `to_x0_eps`; no sampler and no training loop has algebra of its own. In diffusers each scheduler's class
# has its own `add_noise`, `get_velocity` and `rescale_zero_terminal_snr`.

# %%
import inspect

print(inspect.getsource(add_noise))
print(inspect.getsource(zero_terminal_snr))

# %% [markdown]
# **In short.** $t$ is an index; how much noise it means stands in $\bar\alpha$, and at $t = 400$ of Stable Diffusion's
# schedule 42 % of the variance are the picture's. The best denoiser of a finite set is a softmax over distances; it
# recites the set. A network is worth its name because it falls short of that ideal in the right way. Next: [04, the
# UNet, opened](04_unet.ipynb).
