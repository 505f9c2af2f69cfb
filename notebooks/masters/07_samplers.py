# %% [markdown]
# # 07 · Samplers: one equation
#
# **Why do 20 steps of one sampler beat 50 of another, and why do 5 of the better one ruin the picture?**
#
# About 20 minutes to read, half a minute to run. Before it: [00](00_one_picture.ipynb), [03](03_noise.ipynb), and for one
# section [06](06_guidance.ipynb). You will have written four samplers, measured their order of convergence against a
# solution in closed form and on the embedded model, and broken them in six ways.

# %%
import math
from functools import cache, partial
from itertools import pairwise

import numpy as np
import torch

import ldm
from ldm.diffusion import to_x0_eps
from ldm.lab.real import real
from ldm.samplers import SAMPLERS
from ldm.schedules.spacing import choose_sigmas

pipe = ldm.load("scenes")
prompts = ("a large red boat on sea with mountains at sunset", "a large yellow flower on grass at dawn",
           "a large green balloon over sand at noon")  # fmt: skip


def levels_of(pipe, n):
    """n levels sigma / alpha over the whole of training's range, spaced as Karras' are, then zero."""
    ratios = np.sqrt(1 / pipe.schedule(1).bars - 1)  # at every training step
    return (*choose_sigmas("karras", ratios[-1], ratios[0], n), 0.0)


# %%
@cache
def final(pipe, prompts, sampler, asked, guidance=1.0):
    """The last latents (B, 4, h, w) of a run that asks the network about `asked` times."""
    steps = -(-asked // SAMPLERS[sampler].evaluations)
    run = pipe.prepare(list(prompts), seed=0, sampler=sampler, sigmas=levels_of(pipe, steps),
                       guidance=guidance)  # fmt: skip
    *_, last = run.steps()
    return last.x


def grid(pipe, prompts, samplers, budgets, heading, guidance=1.0):
    """The first sentence's picture: a row for each sampler, a column for each number of evaluations."""
    rows = [[pipe.decode(final(pipe, prompts, sampler, asked, guidance)[:1])[0] for asked in budgets]
            for sampler in samplers]  # fmt: skip
    return figures.pictures(rows, [f"{asked} evaluations" for asked in budgets], samplers, heading)


same = "The same words, noise and network: two ways to walk"
grid(pipe, prompts, ("ddim", "dpm++2m"), (5, 10, 20, 50), same)

# %% [markdown]
# Look at the boat. Both rows begin at the same noise and ask the same network, without guidance, so nothing is left to
# chance: there is one right boat, and two ways to come near it. The upper row still changes its mind between 20 and 50
# evaluations of the network; the lower one has found at 20 the boat that the upper finds at 50.
#
# ## Predict
#
# Commit yourself before you go on. If you halve the steps of DDIM, by what is its error multiplied? And that of DPM-Solver++(2M),
# the lower row? Which of the two would you take for 5 steps with guidance? (Nothing checks this cell; it is for you.)

# %%
my_guess = {"half of DDIM's steps": None, "half of 2M's steps": None, "for 5 steps": None}

# %% [markdown]
# ## Derive
#
# A noisy latent is $x = \alpha x_0 + \sigma \epsilon$. Divide by $\alpha$, and every schedule becomes the same:
#
# $$y = x / \alpha = x_0 + r \epsilon, \qquad r = \sigma / \alpha. \tag{1}$$
#
# Data, and noise of standard deviation $r$ on top, which falls from 14.6 to 0. Song et al. (2021, "score", equation 13) found that
# each point can move without any chance so that at every $r$ the cloud of all points is that of (1). In these coordinates
# (Karras et al. 2022, equation 1 with $\sigma(t) = t$)
#
# $$\frac{dy}{dr} = -r \, \nabla_y \log p_r(y) = \epsilon(y, r). \tag{2}$$
#
# The second half is (1) of notebook 06, and it is what a network trained on noise says: **its output is the slope**. Samplers
# are ways to walk down (2). Euler's way keeps the slope for a whole step, from $r$ to $s$:
#
# $$y' = y + (s - r) \, \epsilon \; = \; x_0 + s \, \epsilon. \tag{3}$$
#
# (With $x_0 = y - r \epsilon$ from (1).) Times the new $\alpha'$ that is $x' = \alpha' x_0 + \sigma' \epsilon$: DDIM (Song et al.
# 2021, "implicit", equation 12). Heun's way tries Euler's step, asks again at its end, and walks with the mean of both slopes:
#
# $$y' = y + (s - r) \, \tfrac12 (\epsilon + \epsilon'). \tag{4}$$
#
# DPM-Solver++ (Lu et al. 2022b) writes (2) for $x_0$: $dy/dr = (y - x_0)/r$. If $x_0$ stood still, the solution would be
#
# $$y' = \tfrac{s}{r} \, y + (1 - \tfrac{s}{r}) \, x_0, \tag{5}$$
#
# Euler's step in other words. Its second-order method 2M asks nothing more: it draws a line through this $x_0$ and the one
# before, over the time $-\log r$, and takes its value in the middle of the step ($q$ is the level before $r$):
#
# $$x_0 + \frac{\log (r/s)}{2 \log (q/r)} \, (x_0 - x_0^{\text{before}}). \tag{6}$$
#
# An *ancestral* sampler walks too far down and adds fresh noise to come back, so that variances are right:
#
# $$r_\text{down}^2 + r_\text{up}^2 = s^2, \qquad r_\text{up} = s \sqrt{1 - s^2 / r^2}. \tag{7}$$
#
# A method is of **order** $p$ if $n$ steps leave an error that falls like $n^{-p}$: on paper with two logarithmic axes, a
# straight line with slope $-p$.
#
# ## Build
#
# Four samplers. Each takes `eps(y, r)`, the slope (2); a point `y`; the levels `r` now and `s` next; and a list of what it
# has seen.


# %%
def euler(eps, y, r, s, past):
    return y + (s - r) * eps(y, r)  # (3)


def heun(eps, y, r, s, past):
    slope = eps(y, r)
    ahead = y + (s - r) * slope
    if s == 0:  # no noise is left to ask about: the last step is Euler's
        return ahead
    return y + (s - r) * (slope + eps(ahead, s)) / 2  # (4)


def dpmpp_2m(eps, y, r, s, past):
    x0 = y - r * eps(y, r)  # (1)
    past.append((r, x0))
    if len(past) > 1 and s > 0:  # log(r / s) is infinite at s = 0
        q, before = past[-2]
        x0 = x0 + math.log(r / s) / (2 * math.log(q / r)) * (x0 - before)  # (6)
    return s / r * y + (1 - s / r) * x0  # (5)


def euler_ancestral(eps, y, r, s, past, fresh):
    up = s * math.sqrt(1 - (s / r) ** 2)  # (7)
    down = math.sqrt(s**2 - up**2)
    y = y + (down - r) * eps(y, r)
    return y + up * fresh(y) if s > 0 else y


# %% [markdown]
# And the loop around them. The network itself wants $x$ and its own timestep: `slope_of` asks it in its language.


# %%
def walk(method, eps, y, levels, past=None):
    past = [] if past is None else past
    for r, s in pairwise(levels):
        y = method(eps, y, r, s, past)
    return y


def slope_of(run):
    rows = {level.ratio: level for level in run.schedule.levels}
    return lambda y, r: run.denoise(rows[r].alpha * y, rows[r]).eps  # (B, 4, h, w)


by_hand = {"ddim": euler, "heun": heun, "dpm++2m": dpmpp_2m, "euler-a": euler_ancestral}
for name, method in by_hand.items():
    run, theirs = (pipe.prepare(prompts[0], seed=0, sampler=name, sigmas=levels_of(pipe, 8))
                   for _ in range(2))  # fmt: skip
    first, *_ = ratios = [level.ratio for level in run.schedule.levels]
    if name == "euler-a":
        method = partial(method, fresh=lambda y: run.noise(y))
    mine = walk(method, slope_of(run), run.x / run.schedule[0].alpha, ratios)
    *_, last = theirs.steps()
    off = (mine - last.x).abs().max().item()
    print(f"{name:8} by hand and in ldm: at most {off:.0e} apart, of values up to {last.x.abs().max():.1f}")
    assert off < 1e-3 and last.x.abs().max() > 1

# %% [markdown]
# So DDIM *is* Euler's method, in other coordinates. (The network calculates with seven digits; below, with sixteen, the two
# agree to the last of them.)
#
# ## Run
#
# ### The order, measured
#
# To measure an error one needs the truth. For data that are normally distributed, $x_0 \sim N(\mu, d^2)$, the best denoiser is
# known, and with it the slope; and (2) can be solved by separating its variables:
#
# $$\epsilon(y, r) = \frac{r \, (y - \mu)}{d^2 + r^2}, \qquad
# y(s) = \mu + (y - \mu) \sqrt{\frac{d^2 + s^2}{d^2 + r^2}}. \tag{8}$$

# %%
mu, d = 0.7, 0.5
begin = mu + 14.6 * torch.linspace(-2.5, 2.5, 11, dtype=torch.float64)


def gauss(y, r):
    return r * (y - mu) / (d**2 + r**2)  # (8)


def error(method, n, least=0.03):
    """How far n steps of a method end from the solution (8), at most."""
    levels = choose_sigmas("karras", 14.6, least, n + 1).tolist()
    truth = mu + (begin - mu) * math.sqrt((d**2 + least**2) / (d**2 + 14.6**2))  # (8)
    ended = method(levels) if isinstance(method, Ours) else walk(method, gauss, begin, levels)
    return (ended - truth).abs().max().item()


class Ours(str):
    """A sampler of ldm, by its name, on the same data."""

    def __call__(self, levels):
        schedule = pipe.schedule(sigmas=levels)

        def denoise(x, level):
            eps = gauss(x / level.alpha, level.ratio)
            return to_x0_eps(eps, x, level.alpha, level.sigma, "epsilon")

        x, step = begin * schedule[0].alpha, SAMPLERS[self].step
        *_, last = ldm.sample(denoise, x, schedule, step, ldm.Noise([]))
        return last.x / last.next.alpha


# %%
methods = {"ddim": euler, "heun": heun, "dpm++2m": dpmpp_2m, "dpm++3m": Ours("dpm++3m")}
steps = (10, 20, 40, 80, 160, 320)
errors = {name: [error(method, n) for n in steps] for name, method in methods.items()}


def slope(steps, errors):
    """That of the straight line through the points, both axes logarithmic."""
    return -np.polyfit(np.log(steps), np.log(errors), 1)[0]


order = {name: slope(steps[2:], found[2:]) for name, found in errors.items()}
for name, wanted in {"ddim": 1, "heun": 2, "dpm++2m": 2, "dpm++3m": 3}.items():
    print(f"{name:8} order {order[name]:.2f}   errors", *(f"{e:.1e}" for e in errors[name]))
    assert abs(order[name] - wanted) < 0.15
    levels = choose_sigmas("karras", 14.6, 0.03, 21).tolist()
    if name in by_hand:  # sixteen digits: by hand is ldm's own to rounding
        apart = (walk(methods[name], gauss, begin, levels) - Ours(name)(levels)).abs().max()
        assert apart < 1e-12, apart
ten, fifty = error(dpmpp_2m, 20), error(euler, 50)
print(f"20 steps of dpm++2m leave {ten:.3f}, 50 of ddim {fifty:.3f}")
assert ten < 0.6 * fifty

# %%
fig, ax = figures.canvas(7.2, 3.6)
for name, found in errors.items():
    asked = np.array(steps) * SAMPLERS[name].evaluations
    ax.loglog(asked, found, "o-", ms=4, label=f"{name}: order {order[name]:.2f}")
ax.set(xlabel="evaluations of the network", ylabel="error at the end", xlim=(8, 800))
ax.legend(frameon=False, fontsize=9, loc="lower left")
gain = errors["ddim"][-1] / errors["dpm++3m"][-1]
figures.title(fig, f"The order is the slope: at 320 steps the third beats the first by {gain:,.0f}")
figures.show(fig, "Log-log plot of the error against evaluations: four straight lines of slopes 1, 2, 2, 3")

# %% [markdown]
# That is the answer to the question above, in one picture: what counts is not the size of a step but how the error *falls*.
# Heun's line is as steep as 2M's, and lies to the right of it, because each of its steps asks twice. 2M gets its second
# order for nothing, from memory. And at the left end the lines cross: with few steps a high order promises nothing.
#
# ### What a step does
#
# Two clouds of data in the plane, of which the exact denoiser is known, too: the mean of two Gaussians' denoisers, each weighed
# by how probable it is that the point came from it. Points start as noise and are to end in one cloud or the other.

# %%
means, spreads, shares = torch.tensor([[-1.5, -0.6], [1.3, 0.7]]), torch.tensor([0.3, 0.5]), (0.35, 0.65)


def two_clouds(y, r):
    """The slope at points y (B, 2) for data of two Gaussians, with spreads d_k and shares w_k."""
    away = y[:, None] - means  # (B, 2 clouds, 2)
    variance = spreads**2 + r**2
    logits = torch.tensor(shares).log() - variance.log() - away.pow(2).sum(-1) / (2 * variance)
    eps = r * away / variance[:, None]  # (8), for each cloud
    return (logits.softmax(-1)[..., None] * eps).sum(1)


def road(method, y, n, least=0.02):
    """The points after every step (n + 1, B, 2)."""
    levels, past = choose_sigmas("karras", 14.6, least, n + 1).tolist(), []
    points = [y]
    for r, s in pairwise(levels):
        points.append(method(two_clouds, points[-1], r, s, past))
    return torch.stack(points) / (1 + torch.tensor(levels)[:, None, None] ** 2).sqrt()  # as x, not y


many = 14.6 * torch.randn(2000, 2, generator=torch.Generator().manual_seed(0))
which = {name: (road(method, many, n)[-1][:, None] - means).norm(dim=-1).argmin(-1)
         for name, method, n in (("truth", heun, 200), ("ddim", euler, 8), ("dpm++2m", dpmpp_2m, 8))}  # fmt: skip
wrong = {name: (found != which["truth"]).float().mean().item() for name, found in which.items()}
print({name: f"{100 * share:.1f} % in the wrong cloud" for name, share in wrong.items()})

# %%
fig, axes = figures.canvas(8.4, 3.2, columns=3)
few = many[:40]
for ax, (name, method, n) in zip(axes, (("the road itself (400 evaluations)", heun, 200), ("ddim, 8", euler, 8),
                                        ("dpm++2m, 8", dpmpp_2m, 8)), strict=True):  # fmt: skip
    points, lost = road(method, few, n), which[name.split(",")[0]][:40] != which["truth"][:40] if n == 8 else []
    for k in range(len(few)):
        color = figures.COLORS[which["truth"][k]]
        ax.plot(*points[:, k].T, "-" if n > 8 else ".-", color=color, lw=0.7, ms=2.5, alpha=0.7)
        end = points[-1, k]
        ax.plot(*end, "x" if n == 8 and lost[k] else "o", color=color, ms=7 if n == 8 and lost[k] else 3)
    ax.set(xlim=(-3, 3), ylim=(-3, 3), title=name, aspect="equal")
    ax.title.set(fontsize=10)
figures.title(fig, f"In 8 steps DDIM leads {100 * wrong['ddim']:.1f} % of all noise to the wrong cloud,"
                   f" 2M {100 * wrong['dpm++2m']:.1f} %")  # fmt: skip
assert wrong["dpm++2m"] < wrong["ddim"]
figures.show(fig, "Roads of 40 points from noise to two clouds: exact, with 8 steps of DDIM, with 8 steps of 2M")
