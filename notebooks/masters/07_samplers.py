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
from ldm.loading import find_model
from ldm.metrics.evaluation import load_checker
from ldm.samplers import SAMPLERS
from ldm.schedules.spacing import choose_sigmas

pipe = ldm.load("scenes")
prompts = (
    "a large red boat on sea with mountains at sunset",
    "a large yellow flower on grass at dawn",
    "a large green balloon over sand at noon",
)


def levels_of(pipe, n):
    """n levels sigma / alpha over all of training's range, spaced as Karras' are, then zero."""
    ratios = np.sqrt(1 / pipe.schedule(1).bars - 1)  # at every training step
    return (*choose_sigmas("karras", ratios[-1], ratios[0], n), 0.0)


# %%
@cache
def final(pipe, prompts, sampler, asked, guidance):
    """The last latents (B, 4, h, w) of a run that asks the network about `asked` times."""
    steps = -(-asked // SAMPLERS[sampler].evaluations)
    run = pipe.prepare(list(prompts), seed=0, sampler=sampler, sigmas=levels_of(pipe, steps),
                       guidance=guidance)  # fmt: skip
    *_, last = run.steps()
    return last.x


def grid(pipe, prompts, samplers, budgets, heading, guidance=1):
    """The first sentence's picture: a row a sampler, a column a number of evaluations."""
    rows = [
        [final(pipe, prompts, name, asked, guidance)[:1] for asked in budgets] for name in samplers
    ]
    images = [[pipe.decode(x)[0] for x in row] for row in rows]
    labels = [f"{asked} evaluations" for asked in budgets]
    return figures.pictures(images, labels, samplers, heading, inches=1.2)


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
# Data, and noise of standard deviation $r$ on top, which falls from 14.6 to 0. Song, Sohl-Dickstein et al. (2021, equation 13)
# found that each point can move without any chance so that at every $r$ the cloud of all points is that of (1). In these coordinates
# (Karras et al. 2022, equation 1 with $\sigma(t) = t$)
#
# $$\frac{dy}{dr} = -r \, \nabla_y \log p_r(y) = \epsilon(y, r). \tag{2}$$
#
# The second half is (1) of notebook 06, and it is what a network trained on noise says: **its output is the slope**. Samplers
# are ways to walk down (2). Euler's way keeps the slope for a whole step, from $r$ to $s$:
#
# $$y' = y + (s - r) \, \epsilon \; = \; x_0 + s \, \epsilon. \tag{3}$$
#
# (With $x_0 = y - r \epsilon$ from (1).) Times the new $\alpha'$ that is $x' = \alpha' x_0 + \sigma' \epsilon$: DDIM (Song, Meng
# & Ermon 2021, equation 12). Heun's way tries Euler's step, asks again at its end, and walks with the mean of both slopes:
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
    given = {"sampler": name, "sigmas": levels_of(pipe, 6), "guidance": 1, "seed": 0}
    run, theirs = pipe.prepare(prompts[0], **given), pipe.prepare(prompts[0], **given)
    ratios = [level.ratio for level in run.schedule.levels]
    if name == "euler-a":
        method = partial(method, fresh=lambda y: run.noise(y))
    mine = walk(method, slope_of(run), run.x / run.schedule[0].alpha, ratios)
    *_, last = theirs.steps()
    off = (mine - last.x).abs().max().item()
    size = last.x.abs().max()
    print(f"{name:8} by hand and in ldm: at most {off:.0e} apart, of values up to {size:.1f}")
    assert off < 1e-3 and size > 1

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


def by_hand_to(method):
    """The same data walked by one of the four functions above."""
    return partial(walk, method, gauss, begin)


# %% [markdown]
# The same data in `ldm`, whose samplers work on $x$ and ask for both $x_0$ and $\epsilon$:


# %%
def denoise(x, level):
    eps = gauss(x / level.alpha, level.ratio)
    return to_x0_eps(eps, x, level.alpha, level.sigma, "epsilon")


def ldm_to(name):
    """The same data walked by ldm's own sampler of that name."""

    def run(levels):
        schedule = pipe.schedule(sigmas=levels)
        *_, last = ldm.sample(denoise, begin * schedule[0].alpha, schedule, SAMPLERS[name].step,
                              ldm.Noise([]))  # fmt: skip
        return last.x / last.next.alpha

    return run


for name in ("ddim", "heun", "dpm++2m"):
    levels = choose_sigmas("karras", 14.6, 0.03, 41).tolist()
    apart = (by_hand_to(by_hand[name])(levels) - ldm_to(name)(levels)).abs().max().item()
    print(f"{name:8} by hand and in ldm, with sixteen digits: at most {apart:.0e} apart")
    assert apart < 1e-12

# %% [markdown]
# Now the measurement. A third-order method of ldm joins in.


# %%
def error(run, n, least=0.03):
    """How far n steps end from the solution (8), at most."""
    ended = run(choose_sigmas("karras", 14.6, least, n + 1).tolist())
    truth = mu + (begin - mu) * math.sqrt((d**2 + least**2) / (d**2 + 14.6**2))  # (8)
    return (ended - truth).abs().max().item()


def slope(steps, errors):
    """Of the straight line through the points, both axes logarithmic: the order."""
    return -np.polyfit(np.log(steps), np.log(errors), 1)[0]


steps = (10, 20, 40, 80, 160, 320)
runs = {"ddim": by_hand_to(euler), "heun": by_hand_to(heun), "dpm++2m": by_hand_to(dpmpp_2m),
        "dpm++3m": ldm_to("dpm++3m")}  # fmt: skip
errors = {name: [error(run, n) for n in steps] for name, run in runs.items()}
order = {name: slope(steps[2:], found[2:]) for name, found in errors.items()}
for name, wanted in {"ddim": 1, "heun": 2, "dpm++2m": 2, "dpm++3m": 3}.items():
    print(f"{name:8} order {order[name]:.2f}   errors", *(f"{e:.1e}" for e in errors[name]))
    assert abs(order[name] - wanted) < 0.15

# %%
fig, ax = figures.canvas(7.2, 3.6)
for name, found in errors.items():
    asked = np.array(steps) * SAMPLERS[name].evaluations
    ax.loglog(asked, found, "o-", ms=4, label=f"{name}: order {order[name]:.2f}")
twenty, fifty = errors["dpm++2m"][1], error(runs["ddim"], 50)
ax.plot([20, 50], [twenty, fifty], "s", ms=9, mfc="none", color=figures.INK)
ax.annotate(f"50 steps of ddim: {fifty:.3f}", (50, fifty), (62, 0.1), fontsize=9)
ax.annotate(f"20 of dpm++2m: {twenty:.3f}", (19, twenty), (8.4, 0.0006), fontsize=9,
            arrowprops={"arrowstyle": "-", "color": figures.QUIET})  # fmt: skip
ax.set(xlabel="evaluations of the network", ylabel="error at the end", xlim=(8, 800))
ax.set_xticks([10, 20, 50, 100, 200, 500], ["10", "20", "50", "100", "200", "500"])
ax.legend(frameon=False, fontsize=9, loc="lower left")
assert twenty < 0.6 * fifty
figures.title(fig, "The order is the slope, and 20 steps of second order beat 50 of the first")
figures.show(
    fig, "Log-log plot of the error against evaluations: four lines of slopes 1, 2, 2 and 3"
)

# %% [markdown]
# That is the answer to the first question, in one picture: what counts is how fast the error *falls*. With half
# the steps DDIM's is twice as large, 2M's four times, that of third order eight times. Heun's line is
# as steep as 2M's and lies to the right of it, because each of its steps asks twice; 2M gets its second
# order for nothing, from memory. And at the left end the lines cross: with few steps a high order
# promises nothing.
#
# ### What a step does
#
# Two clouds of data in the plane, of which the exact denoiser is known, too: the mean of two Gaussians' denoisers, each weighed
# by how probable it is that the point came from it. Points start as noise and are to end in one cloud or the other.

# %%
means = torch.tensor([[-1.6, -0.8], [1.5, 0.8]])
spreads, shares = torch.tensor([0.25, 0.35]), torch.tensor([0.35, 0.65])


def two_clouds(y, r):
    """The slope at points y (B, 2) for data of two Gaussians."""
    away = y[:, None] - means  # (B, 2 clouds, 2)
    variance = spreads**2 + r**2
    logits = shares.log() - variance.log() - away.pow(2).sum(-1) / (2 * variance)
    eps = r * away / variance[:, None]  # (8), for each cloud
    return (logits.softmax(-1)[..., None] * eps).sum(1)


def road(method, y, n):
    """The points after every step (n + 1, B, 2), as x = alpha y, in which noise is of size 1."""
    levels, past = choose_sigmas("karras", 14.6, 0.02, n + 1).tolist(), []
    points = [y]
    for r, s in pairwise(levels):
        points.append(method(two_clouds, points[-1], r, s, past))
    return torch.stack(points) / (1 + torch.tensor(levels)[:, None, None] ** 2).sqrt()


noise = 14.6 * torch.randn(2000, 2, generator=torch.Generator().manual_seed(0))
roads = {
    "the road itself: heun, 300 steps": road(heun, noise, 300),
    "ddim, 6 steps": road(euler, noise, 6),
    "dpm++2m, 6 steps": road(dpmpp_2m, noise, 6),
}
cloud = [(points[-1][:, None] - means).norm(dim=-1).argmin(-1) for points in roads.values()]
wrong = [100 * (found != cloud[0]).float().mean().item() for found in cloud]

# %%
fig, axes = figures.canvas(8.4, 3.0, columns=3)
for ax, (name, points), found in zip(axes, roads.items(), cloud):
    style = "-" if len(points) > 9 else ".-"
    for k in range(36):
        color, lost = figures.COLORS[cloud[0][k]], found[k] != cloud[0][k]
        ax.plot(*points[:, k].T, style, color=color, lw=0.7, ms=3, alpha=0.7)
        mark, size = ("x", 9) if lost else ("o", 3.5)
        ax.plot(*points[-1, k], mark, color=color, ms=size, mew=size / 4)
    ax.set(xlim=(-2.7, 2.7), ylim=(-2.4, 2.4), xticks=[], yticks=[])
    ax.set_title(name, fontsize=10)
assert wrong[0] == 0 and 0 < wrong[2] < 0.5 * wrong[1]
say = f"DDIM leads {wrong[1]:.1f} % of the points to the wrong cloud, 2M {wrong[2]:.1f} %"
figures.title(fig, say)
figures.show(fig, "Roads of 36 points from noise to two clouds: exact, 6 steps of DDIM, 6 of 2M")

# %% [markdown]
# The colour says where a point ends if every step is tiny, a cross that the steps were too long. Two kinds of error are to be
# seen. Most points end in the right cloud, a little off. A few stand near the watershed, and a small error there becomes a
# large one: another cloud; in a picture, another boat. The clouds' watershed bends, a straight step cuts the corner.
#
# ### The network
#
# The embedded model's $\epsilon$ has no closed form, but many small steps do as truth: 120 of `unipc2`, a method that takes no part
# in the comparison. Three sentences, no guidance, and the distance of the last latents from those, as a share of their length.

# %%
budgets = (5, 10, 20, 50)
truth = final(pipe, prompts, "unipc2", 120, 1)


def distance(x, truth):
    """Per picture, as a share of the truth's length."""
    return ((x - truth).flatten(1).norm(dim=1) / truth.flatten(1).norm(dim=1)).numpy()


away = {}
for name in ("ddim", "heun", "dpm++2m"):
    ended = [final(pipe, prompts, name, asked, 1) for asked in budgets]
    away[name] = np.array([distance(x, truth) for x in ended])  # (budgets, pictures)
typical = {name: np.median(found, axis=1) for name, found in away.items()}
print("evaluations", *(f"{asked:8}" for asked in budgets))
for name, found in typical.items():
    print(f"{name:11}", *(f"{x:8.4f}" for x in found))

# %%
fig, ax = figures.canvas(7.2, 3.4)
for name, found in away.items():
    per = SAMPLERS[name].evaluations
    asked = [per * -(-n // per) - (per - 1) for n in budgets]  # Heun's last step asks once
    (line,) = ax.loglog(asked, typical[name], "o-", ms=5, label=name)
    ax.loglog(asked, found, ".", ms=4, color=line.get_color(), alpha=0.5)
ax.set(xlabel="evaluations of the network", ylabel="distance from the truth", xlim=(4.5, 60))
ax.set_xticks(budgets, [str(n) for n in budgets])
ax.minorticks_off()
ax.legend(frameon=False, fontsize=9, loc="lower left")
factor = typical["ddim"][3] / typical["dpm++2m"][2]
measured = {name: slope(budgets[1:], found[1:]) for name, found in typical.items()}
figures.title(fig, f"20 steps of 2M end {factor:.1f} times nearer to the truth than 50 of DDIM")
assert factor > 1.3 and typical["heun"][0] > 1
assert typical["heun"][3] < 0.003 and typical["dpm++2m"][3] < 0.003
assert 0.6 < measured["ddim"] < 1.6 < measured["dpm++2m"] < 3.0
assert away["dpm++2m"][2, 0] < away["ddim"][3, 0] < 0.5 * away["ddim"][2, 0]  # the boat above
figures.show(
    fig,
    "Distances on the embedded model, log-log: DDIM's fall slowly, those of higher order faster",
)

# %%
for found in away.values():  # the boat, near a watershed, is the farthest of the three
    assert found[3].argmax() == 0 and found[3, 0] < 0.15
one = "By 50 evaluations all three have found the same boat"
grid(pipe, prompts, tuple(away), budgets, one)

# %% [markdown]
# The orders are there, on a network of 5.5 million parameters that nobody asked to be smooth. (Is the truth
# one? Heun and 2M, which know nothing of each other, both end within 0.003 of it. The faint
# dots are the three pictures; the boat's are on top, for it is one of those points near a watershed.) And
# again the lines cross on the left: Heun, with 3 steps for its 5 evaluations, ends farther from the truth
# than an empty latent would, which has a distance of 1.
#
# ### Few steps, and guidance
#
# Guidance multiplies the difference of two predictions, and with it every bend of the road. Five evaluations, scale 4:

# %%
two = prompts[:2]
strong = final(pipe, two, "unipc2", 25, 4)
five = {name: final(pipe, two, name, 5, 4) for name in (*away, "dpm++3m")}
away_by = {name: distance(x, strong).mean() for name, x in five.items()}
for name, found in away_by.items():
    without = f"    without: {away[name][0, :2].mean():.2f}" if name in away else ""
    print(f"{name:8} guidance 4: {found:.2f}{without}")
    assert (found < 0.8) == (name == "ddim")
shown = [pipe.decode(x) for x in (strong, *five.values())]
whole = "5 evaluations on Karras' levels, guidance 4: DDIM alone stays whole"
figures.pictures(
    [[row[k] for row in shown] for k in (0, 1)], ["25 of unipc2", *five], heading=whole
)

# %% [markdown]
# A higher order draws a curve through what it has seen and follows it into the unknown. Over a short step the curve is
# right; over a long one it is a guess, and guidance makes it a wild one. DDIM guesses nothing: it is not near, but whole.
#
# ### Which five levels?
#
# The other half of a fast sampler is where it stands. *Leading* spacing (Stable Diffusion's own) climbs from t = 1 in equal
# strides and doesn't reach the noisiest level; *trailing* descends from it (Lin et al. 2023, table 2); Karras' levels (Karras et al.
# 2022, equation 5) are even in the seventh root of $r$. All three with the same two samplers, and guidance 4:

# %%
choices = {"leading": {"steps": 5}, "trailing": {"timesteps": (999, 799, 599, 399, 199)},
           "karras": {"sigmas": levels_of(pipe, 5)}}  # fmt: skip


def spaced(sampler, **levels):
    """Distance from the truth, of a run with guidance on other levels."""
    run = pipe.prepare(list(two), seed=0, sampler=sampler, guidance=4.0, **levels)
    *_, last = run.steps()
    return distance(last.x, strong).mean()


ended = {name: [spaced(sampler, **choices[name]) for sampler in ("ddim", "dpm++2m")]
         for name in ("leading", "trailing")}  # fmt: skip
ended["karras"] = [away_by["ddim"], away_by["dpm++2m"]]
rows = {name: [level.ratio for level in pipe.schedule(**given).levels]
        for name, given in choices.items()}  # fmt: skip
late = spaced("dpm++2m", sigmas=(*choose_sigmas("karras", rows["leading"][0], 0.03, 10), 0.0))
for name, (ddim, second) in ended.items():
    between = sum(0.5 < r < 6 for r in rows[name])
    print(f"{name:9} begins at {rows[name][0]:4.1f}, {between} levels from 6 to 0.5:"
          f"   ddim {ddim:.2f}   dpm++2m {second:.2f}")  # fmt: skip
print(f"begun where leading begins, and walked in 10 steps: {late:.2f}")

# %%
fig, (left, right) = figures.canvas(8.0, 2.5, columns=2, width_ratios=(3, 2))
for k, (name, ratios) in enumerate(rows.items()):
    at = [max(r, 0.02) for r in ratios]  # zero has no place on a logarithmic axis
    left.semilogx(at, [-k] * 6, "o-", color=figures.COLORS[k])
    for j, off in enumerate(ended[name]):
        right.barh(-k + 0.2 - 0.4 * j, off, 0.36, color=figures.COLORS[k], alpha=1 - 0.5 * j)
left.set(xlabel="r, noise on the left (0.02 stands for 0)", xlim=(20, 0.015), yticks=[0, -1, -2],
         yticklabels=list(choices), ylim=(-2.5, 0.5))  # fmt: skip
right.set(xlabel="distance (full: ddim, pale: dpm++2m)", yticks=[], ylim=(-2.5, 0.5))
ddim, second = zip(*ended.values(), strict=True)
assert second[1] < 1.05 * ddim[1] and second[2] > 2 * ddim[2]
assert late > 0.7 * min(ended["leading"]), "leading's error is that of its beginning"
figures.title(fig, "Five levels: on trailing ones 2M is no worse than DDIM, on Karras' it breaks")
figures.show(fig, "Left: the levels of three spacings; right: distances of DDIM and 2M on each")

# %% [markdown]
# So it was not the order alone. From r = 6 to 0.5 Karras' five levels stand twice, the others' four
# times, and 2M draws its line over longer leaps: likely that is what breaks it. Leading spacing has
# a fault of another kind: it begins too late. Its run takes pure noise for a latent that holds a fifth of
# picture, and twice as many steps from there hardly end nearer.
#
# ### With fresh noise
#
# An ancestral sampler (7) throws dice at every step. One beginning leads to many pictures, and twice as many
# steps lead not nearer to one of them, but to another.


# %%
def spread(x):
    """Mean distance within a batch (B, 4, h, w), as a share of the mean length."""
    x = x.flatten(1)
    pairs = torch.pdist(x)
    return (pairs.mean() / x.norm(dim=1).mean()).item()


def runs_from(seeds, sampler, n=10):
    """Last latents of runs that begin at these seeds' noise; the fresh noise is each run's own."""
    start = ldm.Noise.from_seeds(seeds).draw((4, 16, 16))
    run = pipe.prepare(["a house"] * len(seeds), seed=0, sampler=sampler, sigmas=levels_of(pipe, n),
                       guidance=1, latents=start)  # fmt: skip
    *_, last = run.steps()
    return last.x


starts, fresh = runs_from(range(5), "euler"), runs_from([9] * 5, "euler-a")
twice = spread(runs_from([9] * 2, "euler", 4))
print(f"euler, twice from one start: {twice:.0e} apart")
print(f"spread: euler from five starts {spread(starts):.2f}, euler-a from one {spread(fresh):.2f}")
more = distance(runs_from([9] * 2, "euler-a", 20), fresh[:2]).mean()
print(f"euler-a in 20 steps, with the same dice: {more:.2f} away from its 10 steps")
assert twice < 1e-4 and spread(fresh) > 0.3 and more > 0.3
share = 100 * spread(fresh) / spread(starts)
names = ["euler\nfive starts", "euler-a\none start"]
wide = f"Fresh noise spreads one start {share:.0f} % as far as five starts lie"
figures.pictures([pipe.decode(starts), pipe.decode(fresh)], side=names, heading=wide)

# %% [markdown]
# ## Break it
#
# Six faults, all of them made by people. First on the Gaussian data, where the order tells.


# %%
def second_alone(eps, y, r, s, past):  # Heun without the mean
    return y + (s - r) * eps(y + (s - r) * eps(y, r), s)


def summed(eps, y, r, s, past):  # Heun without the half
    slope = eps(y, r)
    return y + (s - r) * (slope + eps(y + (s - r) * slope, s))


def told_late(eps, y, r, s, past):  # DDIM, an index off by one: the network is told the next level
    return y + (s - r) * eps(y, s)


def even_steps(eps, y, r, s, past):  # 2M that takes all steps for equally long
    x0 = y - r * eps(y, r)
    past.append(x0)
    if len(past) > 1 and s > 0:
        x0 = 1.5 * x0 - 0.5 * past[-2]
    return s / r * y + (1 - s / r) * x0


def to_nothing(eps, y, r, s, past):  # 2M that draws its line into the last step, too
    x0 = y - r * eps(y, r)
    past.append((r, x0))
    if len(past) > 1:
        h = (torch.tensor(r) / s).log()
        x0 = x0 + h / (2 * math.log(past[-2][0] / r)) * (x0 - past[-2][1])
    return s / r * y + (1 - s / r) * x0


# %%
faults = {"heun, 2nd slope alone": second_alone, "heun, sum without half": summed,
          "ddim, told late": told_late, "2m, steps as if even": even_steps}  # fmt: skip
broken = {name: [error(by_hand_to(fault), n) for n in steps] for name, fault in faults.items()}
kept = partial(walk, dpmpp_2m, gauss, begin, past=[])  # one list for all runs
broken["2m, another run's past"] = [error(kept, n) for n in steps]
got = {name: slope(steps[2:], found[2:]) for name, found in (errors | broken).items()}
for name, found in (errors | broken).items():
    print(f"{name:24} order {got[name]:5.2f}   error of 20 steps {found[1]:7.4f}, of 320", end=" ")
    print(f"{found[-1]:.1e}")
assert abs(got["heun, 2nd slope alone"] - 1) < 0.15 and abs(got["heun, sum without half"]) < 0.1
assert abs(got["ddim, told late"] - 1) < 0.15
assert broken["ddim, told late"][-1] > 4 * errors["ddim"][-1]
assert abs(got["2m, steps as if even"] - 2) < 0.15 > abs(got["2m, another run's past"] - 2)

# %%
to_zero = [*choose_sigmas("karras", 14.6, 0.03, 20).tolist(), 0.0]
for name, method in {"2m": dpmpp_2m, "2m into the step to zero": to_nothing}.items():
    ended_at = by_hand_to(method)(to_zero)
    print(f"{name:24} ends at {ended_at[0].item():.3f}")
    assert ended_at.isfinite().all() == (method is dpmpp_2m)

# %% [markdown]
# Forget the mean, and the second order is gone; forget the half, and no number of steps helps. The
# index off by one keeps its order and multiplies the error. And one fault goes through: as there are
# more levels, neighbouring steps become equal, so to take them for equal costs no order, and here
# not even accuracy. A measured order proves that a method converges, and how fast; not that it is
# the method of the paper. For that one compares it with another's, as above.
#
# **(6) used for the step to zero**, where $\log(r/s)$ is infinite, can't be overlooked: a picture
# would be black, and `ldm` refuses to decode it. But a **past that is another run's**, in a list that is
# never emptied, or kept in an object, strikes a single step, and the order doesn't see it. So make the
# same call twice, and look at all of them at 15 steps.


# %%
def picture(method, past=None):
    """The boat's last latent, walked by hand in 15 steps without guidance."""
    run = pipe.prepare(prompts[0], seed=0, sigmas=levels_of(pipe, 15), guidance=1)
    ratios = [level.ratio for level in run.schedule.levels]
    return walk(method, slope_of(run), run.x / run.schedule[0].alpha, ratios, past)


shelf = []  # never emptied
seen = {"2m": picture(dpmpp_2m, shelf), "2m, called again": picture(dpmpp_2m, shelf)}
for name in ("ddim, told late", "heun, 2nd slope alone", "heun, sum without half"):
    seen[name] = picture(faults[name])
images = [pipe.decode(x)[0] for x in seen.values()]
pixels = [torch.from_numpy(np.array(each)).permute(2, 0, 1) / 127.5 - 1 for each in images]
read = load_checker(find_model("scenes")).read(torch.stack(pixels))
off = {name: distance(x, seen["2m"])[0] for name, x in seen.items()}
for name, found in zip(seen, read, strict=True):
    what = f"{found['left color']} {found['left kind']}, {found['time']}"
    print(f"{name:24} {off[name]:.4f} away from 2m, the checker reads: {what}")
    assert (found["left color"], found["left kind"]) == ("red", "boat")
assert off["2m, called again"] > 5e-4 and min(list(off.values())[2:]) > 0.05
red = "Four faults, 15 steps: the checker reads a red boat in each"
figures.pictures(images, [name.replace(", ", "\n") for name in seen], heading=red)

# %% [markdown]
# All of them draw a red boat, if not always the same one. A network mends much of what a sampler does wrong,
# for it answers for the latent that it is given, wherever that came from. So a wrong sampler need
# not look wrong; it needs more steps, or draws another picture than its seed's. Whoever judges
# samplers by eye will keep such faults for years. Numbers find them at once: the order, the distance from
# another's code, and the same call made twice, for whose answers to differ there is no excuse.
#
# ## Your turn
#
# ### Exercise 07.1: DDIM as the papers write it
# *Difficulty 1 of 5, importance 5 of 5, five minutes.* Papers and schedulers keep $\bar\alpha = \alpha^2$, with $\sigma^2 = 1 -
# \bar\alpha$. Take the step from `x` and the predicted noise `eps` (both (B, 4, h, w)), from the level `bar` to the level
# `bar_next`.


# %% tags=["exercise"]
def ddim_step(x, eps, bar, bar_next):
    # BEGIN SOLUTION
    x0 = (x - math.sqrt(1 - bar) * eps) / math.sqrt(bar)
    return math.sqrt(bar_next) * x0 + math.sqrt(1 - bar_next) * eps
    # END SOLUTION


ldm.check("07.1", ddim_step)

# %% [markdown]
# ### Exercise 07.2: second order without a mean
# *Difficulty 2 of 5, importance 3 of 5, ten minutes.* Heun asks at both ends of a step and takes the mean. The midpoint rule asks
# once in its middle and uses that slope alone. Write it for `eps(y, r)` as above; let the middle be the one of the
# logarithm, $m = \sqrt{r s}$. ($s$ is not zero here. This is `dpm2` of `ldm` and k-diffusion.)


# %% tags=["exercise"]
def midpoint(eps, y, r, s):
    # BEGIN SOLUTION
    m = math.sqrt(r * s)
    ahead = y + (m - r) * eps(y, r)
    return y + (s - r) * eps(ahead, m)
    # END SOLUTION


ldm.check("07.2", midpoint)

# %% [markdown]
# ### Exercise 07.3: remember the slope
# *Difficulty 3 of 5, importance 3 of 5, ten minutes.* What 2M does with $x_0$ over $-\log r$, the method of Adams and Bashforth
# (`lms`, with two points) does with the slope over $r$ itself. `before` is the slope at the level `q`, `eps` that at `r`; they
# lie on a line. What does the line say in the middle of the step from `r` to `s`? The levels need not be evenly spaced.


# %% tags=["exercise"]
def slope_ahead(eps, before, q, r, s):
    # BEGIN SOLUTION
    return eps + (s - r) / (2 * (r - q)) * (eps - before)
    # END SOLUTION


ldm.check("07.3", slope_ahead)

# %% [markdown]
# ### Exercise 07.4: how far down, how much back up
# *Difficulty 2 of 5, importance 3 of 5, ten minutes.* Between a sampler without fresh noise and the one of (7) lies a whole family:
# $r_\text{up}$ is `eta` times that of (7), and the sum of the variances stays $s^2$. Return
# $(r_\text{down}, r_\text{up})$ for a step from `r` to `s`.


# %% tags=["exercise"]
def split(r, s, eta):
    # BEGIN SOLUTION
    up = eta * s * math.sqrt(1 - (s / r) ** 2)
    return math.sqrt(s**2 - up**2), up
    # END SOLUTION


ldm.check("07.4", split)

# %% [markdown]
# ### Further 07.5: Karras' levels
# *Difficulty 2 of 5, importance 4 of 5, ten minutes.* `n` levels from `most` down to `least`, both included, whose `rho`-th roots are
# evenly spaced; then a zero: n + 1 numbers.


# %% tags=["exercise"]
def karras(n, most, least, rho):
    # BEGIN SOLUTION
    roots = np.linspace(most ** (1 / rho), least ** (1 / rho), n)
    return [*(roots**rho), 0.0]
    # END SOLUTION


ldm.check("07.5", karras)

# %% [markdown]
# ### Further 07.6: read an order off
# *Difficulty 1 of 5, importance 4 of 5, five minutes.* `steps` is a list of growing numbers of steps (not always doubled), `errors`
# what each left. Return the order between every two neighbours: one number fewer than there are errors.


# %% tags=["exercise"]
def orders(steps, errors):
    # BEGIN SOLUTION
    points = list(zip(steps, errors, strict=True))
    return [math.log(e / f) / math.log(m / n) for (n, e), (m, f) in pairwise(points)]
    # END SOLUTION


ldm.check("07.6", orders)

# %% [markdown]
# ## The same on a real model
#
# The same function, on Stable Diffusion 1.5. What carries over is the equation and its orders. What does not is the
# counts: our world is small and its pictures are simple, so that five evaluations without guidance already draw a boat.

# %% tags=["real-model"]
sd = real("sd15")
if sd is not None:
    photo = ("a photograph of a red boat on the sea at sunset",)
    display(grid(sd, photo, ("ddim", "dpm++2m"), (5, 10, 20, 50), same, guidance=7.5))

# %% [markdown]
# ## Where it lives in `ldm`
#
# `ldm/samplers/lines.py` has the lines that all samplers are made of, in the model's coordinates: `along_x0` is (3) and (5) at once,
# `ancestral` is (7). `onestep.py`, `twice.py` and `multistep.py` beside it hold most of the methods, each a pure function
# for one step: its history is what the caller hands in, so another run's can't slip in. `ldm/schedules/spacing.py` has the levels. `ldm
# compare-samplers` measures all of them on the embedded model with guidance, and `ldm/samplers/README.md` says what came of it. In
# diffusers every method is a scheduler class, with levels and history of its own inside.

# %%
import inspect

from ldm.samplers import lines

print(inspect.getsource(lines.along_x0))

# %% [markdown]
# **In short.** A network's noise is the slope of one equation, and samplers are ways to walk down it. The order says how fast
# the error falls with more steps: so 20 of 2M beat 50 of DDIM. With very few steps, and with
# guidance, order is no help, and the choice of levels counts for more. Next: [08, from a picture](08_from_a_picture.ipynb).
