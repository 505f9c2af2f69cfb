# %% [markdown]
# # 03 · Noise, and the perfect denoiser
#
# **How much noise is t = 400, and what is the best that anyone could do against it?**
#
# About 25 minutes to read, half a minute to run. Before it: [00](00_one_picture.ipynb), [02](02_latents.ipynb). You will have
# built three schedules of noise and the best denoiser that a set of pictures allows, seen why it is useless, and found what
# Stable Diffusion's last step doesn't destroy.

# %%
import math
from dataclasses import replace

import numpy as np
import torch

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
        rows, [f"t = {level.t:.0f}" for level in levels], ["noised", "one guess"],
        heading="Where we see nothing but noise, the network still sees a scene",
    )  # fmt: skip


unseen = held_out(64)  # scenes whose combinations no training picture held
one = unseen[3]
picture = figures.Image.fromarray(scenes.render(one).image)
ladder(pipe, picture)

# %% [markdown]
# The upper row is all that the network is given. The lower row is its answer, in one step and without a word of the caption.
# How much of the picture is there at $t = 400$? And could anyone answer better?
#
# ## Predict
#
# Commit yourself before you go on. A picture is noised to $t = 400$ of 1000. (a) Which share of what you see above is still
# the picture's own? (b) Three contestants guess the clean picture, which none of them has seen before: the best Gaussian blur,
# our network, and an *ideal* denoiser that knows 512 other pictures by heart. In which order do they end? (c) What does the
# ideal denoiser draw if it begins from pure noise? (Nothing checks this cell; it is for you.)

# %%
my_guess = {"(a) the picture's share, %": None, "(b) best to worst": None, "(c) it draws": None}

# %% [markdown]
# ## Derive
#
# Training adds noise in 1000 small steps that keep the variance, $x_t = \sqrt{1-\beta_t}\,x_{t-1} + \sqrt{\beta_t}\,\epsilon_t$.
# Gaussians add up to a Gaussian, so all steps up to $t$ are one (Ho et al. 2020, equation 4):
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
# Now the best denoiser. The guess with the least squared error is the mean of all that $x$ may have been, $E[x_0 \mid x]$. Say
# the world is a set of $N$ pictures $x^1 \dots x^N$, each equally likely. By (1), $x$ given picture $i$ is Gaussian around
# $\alpha x^i$, and Bayes' rule weighs the pictures (Karras et al. 2022, appendix B.3):
#
# $$D(x) = \sum_i w_i\,x^i, \qquad w = \mathrm{softmax}_i\!\left(-\frac{\lVert x - \alpha x^i \rVert^2}{2\sigma^2}\right). \tag{4}$$
#
# Training on these pictures minimises exactly the error that (4) minimises. No network with that loss can beat it on them, and
# an infinitely patient and flexible one would become it.
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
    else:  # cosine, Nichol & Dhariwal 2021, equation 17: alpha-bar is a cosine squared, beta follows
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
# ... and (4), in three lines. ldm has no ideal denoiser to compare with, so a plainer one must do: Bayes' rule picture by
# picture, in double precision.


# %%
def ideal(x, level, data):
    """The mean of all pictures in `data` (N, 4, h, w) that x (B, 4, h, w) may have been, and their probabilities."""
    distance = torch.cdist(x.flatten(1), level.alpha * data.flatten(1)) ** 2  # (B, N)
    w = (-distance / (2 * level.sigma**2)).softmax(1)  # (4)
    return (w @ data.flatten(1)).view_as(x), w


def bayes(x, level, data):
    """The same for one latent, as Bayes' rule is written: prior times likelihood, over their sum."""
    logs = [-((x - level.alpha * each) ** 2).sum() / (2 * level.sigma**2) for each in data]
    likelihood = [math.exp(log - max(logs)) for log in logs]
    return sum(p * each for p, each in zip(likelihood, data)) / sum(likelihood)


def level_at(t):
    return pipe.schedule(10).at(0, t)


def encode(some):
    """The latents of scenes, (N, 4, 16, 16)."""
    pixels = [figures.Image.fromarray(scenes.render(scene).image) for scene in some]
    return torch.cat([pipe.vae.encode(image_tensor(pixels[k : k + 32])) for k in range(0, len(pixels), 32)])


known = [scenes.sample(seed, "train") for seed in range(512)]  # our network has seen them too
data, new = encode(known), encode(unseen)
x = add_noise(new[:4], ldm.Noise.from_seeds(range(4)).draw(new.shape[1:]), *level_at(900)[2:])
plain = torch.stack([bayes(each.double(), level_at(900), data.double()) for each in x])
assert torch.allclose(ideal(x, level_at(900), data)[0].double(), plain, atol=1e-3)

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
left.set(ylabel="the picture's share of the variance, %", ylim=(0, 100))
right.set(ylabel="log-SNR", ylim=(-12, 10))
left.legend(frameon=False, fontsize=8)
at_400 = [f"{100 * bar[400]:.0f}" for bar in bars.values()]
figures.title(fig, f"t = 400 leaves {at_400[0]}, {at_400[1]} or {at_400[2]} % of the picture: t alone says nothing")
figures.show(fig, "Alpha-bar and log-SNR over the timesteps, for three schedules")

# %%
print("            t:" + "".join(f"{k:8}" for k in (0, 200, 400, 600, 800, 999)), "  half picture, half noise at")
for name, bar in bars.items():
    half = int((bar < 0.5).nonzero()[0])
    print(f"{name:14}" + "".join(f"{bar[k].sqrt():8.4f}" for k in (0, 200, 400, 600, 800, 999)), f"  t = {half}")
sd = bars["scaled linear"]
assert 0.42 < sd[400] < 0.43 and int((sd < 0.5).nonzero()[0]) == 354
assert 0.0682 < sd[999].sqrt() < 0.0683 and bars["linear"][999].sqrt() < 0.007 and bars["cosine"][999] < 1e-8

# %% [markdown]
# The rows are $\alpha_t = \sqrt{\bar\alpha_t}$, the factor before the picture in (1). In Stable Diffusion's schedule, which is
# also our model's, $t = 400$ means $0.65\,x_0 + 0.76\,\epsilon$: 42 % of the variance is the picture's, and noise has the upper
# hand from $t = 354$. The last number of the first row, 0.0683, will occupy us below: it isn't 0.
#
# All this presumes latents of variance 1; that is what notebook 02's scaling factor is for.

# %%
eps = ldm.Noise.from_seeds(range(64)).draw(new.shape[1:])
level = level_at(400)
x = add_noise(new, eps, level.alpha, level.sigma)
v = level.alpha * eps - level.sigma * new  # (3)
assert torch.equal(v, target(new, eps, level.alpha, level.sigma, "v_prediction"))
assert torch.allclose(level.alpha * x - level.sigma * v, new, atol=1e-5)
assert torch.allclose(level.sigma * x + level.alpha * v, eps, atol=1e-5)
assert 0.9 < data.std() < 1.1 and 0.9 < x.std() < 1.1
print(f"spread of the 512 latents {data.std():.3f}, of noisy ones at t = 400 {x.std():.3f}; (3) holds both ways")

# %% [markdown]
# ### Three denoisers
#
# The ideal denoiser knows 512 scenes. The network was trained on 12,000, among them these. The blur knows nothing; of ten
# widths it may take the one that, in hindsight, was best. First a scene that none of them has seen.


# %%
def across(kernel):
    """Smooth a latent along both sides, by a function of the distance between two positions."""
    k = torch.arange(16.0)
    g = kernel((k[:, None] - k).abs())  # (16, 16)
    return g / g.sum(1, keepdim=True)


def blur(x, level, truth):
    """x / alpha, smoothed by the width that is best in hindsight."""
    widths = [across(lambda d, w=w: torch.exp(-(d**2) / (2 * w * w))) for w in
              (0.1, 0.4, 0.6, 0.8, 1, 1.5, 2, 3, 5, 8)]  # fmt: skip
    tries = [g @ (x / level.alpha) @ g.T for g in widths]
    return min(tries, key=lambda each: (each - truth).square().mean())


def guesses(x0, t, seed):
    """One latent, noised to t, and what the three make of it."""
    level = level_at(t)
    x = add_noise(x0, ldm.Noise.from_seeds([seed]).draw(x0.shape[1:]), level.alpha, level.sigma)
    made = x, blur(x, level, x0), ideal(x, level, data)[0], network(pipe, x, level)
    return [pipe.decode(each)[0] for each in made]


rungs = (50, 200, 400, 600, 800, 950)
columns = [guesses(new[3:4], t, seed=3) for t in rungs]
names = ["noised", "best blur", "ideal, of 512", "network"]
figures.pictures(list(map(list, zip(*columns))), [f"t = {t}" for t in rungs], names,
                 heading="A new scene: the ideal denoiser sees another one, whatever the noise")  # fmt: skip

# %% [markdown]
# And one of the 512:

# %%
columns = [guesses(data[4:5], t, seed=3) for t in rungs]
figures.pictures(list(map(list, zip(*columns))), [f"t = {t}" for t in rungs], names,
                 heading="A scene of the set: the ideal denoiser knows it by heart")  # fmt: skip

# %% [markdown]
# How general is this? The mean squared error of each number of the latent (whose variance is 1), for 24 scenes of either kind.

# %%
ts = (20, 100, 200, 400, 600, 800, 900, 999)
words = [scenes.caption(scene, scene.seed, full=True) for scene in unseen[:24]]
error = {}


def off(name, kind, guess, truth):
    error.setdefault((name, kind), []).append((guess - truth).square().mean().item())


for t in ts:
    level = level_at(t)
    for kind, x0 in (("set", data[:24]), ("new", new[:24])):
        x = add_noise(x0, ldm.Noise.from_seeds(range(24)).draw(x0.shape[1:]), level.alpha, level.sigma)
        off("mean of the set", kind, data.mean(0), x0)
        off("best blur", kind, blur(x, level, x0), x0)
        off("ideal, of 512", kind, ideal(x, level, data)[0], x0)
        off("network", kind, network(pipe, x, level), x0)
        if kind == "new":
            off("network, told the words", kind, network(pipe, x, level, words), x0)

# %%
fig, axes = figures.canvas(7.8, 3.3, columns=2)
styles = {"mean of the set": (figures.QUIET, ":"), "best blur": (figures.COLORS[2], "-"), "ideal, of 512": (figures.COLORS[1], "-"),
          "network": (figures.COLORS[0], "-"), "network, told the words": (figures.COLORS[0], "--")}  # fmt: skip
for ax, kind, title in zip(axes, ("set", "new"), ("scenes of the set", "new scenes")):
    for name, (color, line) in styles.items():
        if (name, kind) in error:
            ax.plot(ts, error[name, kind], line, color=color, label=name)
    ax.set(xlabel="timestep", ylabel="squared error of x0", xlim=(0, 1000), ylim=(0, 1))
    ax.set_title(title, fontsize=10, color=figures.INK)
axes[1].legend(frameon=False, fontsize=7.5)
figures.title(fig, "Perfect where it knows the answer, worse than a blur where it doesn't; the network is neither")
figures.show(fig, "Error over the timesteps, for scenes of the set and for new ones")

# %%
print("error at t =             " + "".join(f"{t:7}" for t in ts))
for (name, kind), row in error.items():
    print(f"{name:23} {kind} " + "".join(f"{each:7.3f}" for each in row))
e = {key: dict(zip(ts, row)) for key, row in error.items()}
assert all(e["ideal, of 512", "set"][t] < 1e-3 for t in ts if t <= 600), "it knows the answer"
assert all(e["ideal, of 512", "set"][t] < e["network", "set"][t] for t in ts), "it is a bound"
assert all(e["ideal, of 512", "new"][t] > 0.4 for t in ts), "and it has nothing to say of other scenes"
assert all(e["ideal, of 512", "new"][t] > e["best blur", "new"][t] for t in (20, 100, 200, 400))
assert all(e["network", "new"][t] < e["best blur", "new"][t] for t in ts)
assert all(e["network", "new"][t] < e["ideal, of 512", "new"][t] for t in ts if t <= 900)
assert all(0.7 < e["network", "new"][t] / e["network", "set"][t] < 1.4 for t in ts), "no memory of its own"
assert all(e["network, told the words", "new"][t] < 0.75 * e["network", "new"][t] for t in (800, 900, 999))
