# %% [markdown]
# # 08 · Start from a picture
#
# **One loop draws from words. What has to change so that it starts from a picture, fills a hole in one, or walks back to
# the noise a picture came from?**
#
# About 30 minutes to read, half a minute to run. Before it: [03](03_noise.ipynb), [06](06_guidance.ipynb);
# [07](07_samplers.ipynb) helps. You will have built image-to-image, inpainting and DDIM inversion by hand, equal to the
# pipeline's bit for bit, measured what each of them keeps, and joined four sentences into one wide picture.

# %%
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

import ldm
from ldm import pictures, scenes
from ldm.lab.real import real
from ldm.loading import find_model
from ldm.metrics.checker import answers
from ldm.metrics.evaluation import load_checker
from ldm.tiles import ramp
from ldm.train.data import to_tensor

pipe = ldm.load("scenes")
truth = scenes.render(scenes.sample(56, "any", n=1, style="plain"))  # a scene, with its masks
photo = Image.fromarray(truth.image)
told = "a large yellow house on grass at dawn with mountains"  # what it shows
words = "a large green house on grass at dawn with mountains"  # what we want

white = np.zeros((128, 128), np.uint8)
white[40:120, 40:112] = 255  # drawn anew
hole = Image.fromarray(white)


# %%
def four_starts(pipe, photo, hole, told, words, seed=9, steps=15):
    """One sentence, one seed, one loop: what it draws from four starts."""
    side = pipe.default_size
    photo, hole = photo.resize((side, side)), hole.resize((side, side))
    same = {"seed": seed, "steps": steps, "sampler": "ddim"}
    own = pipe.invert(photo, told, seed=seed, steps=steps, refine=0)  # the photo's own noise
    drawn = [
        pipe(words, **same),
        pipe(words, image=photo, strength=0.6, **same),
        pipe(words, image=photo, mask=hole, **same),
        pipe(words, latents=own, guidance=1, **same),
    ]
    labels = ["given", "from noise", "from the picture", "in a hole of it", "from its own noise"]
    row = [photo, *(result.images[0] for result in drawn)]
    heading = f"“{words}”: one loop, four starts"
    return figures.pictures(row, labels, heading=heading, inches=1.2)


four_starts(pipe, photo, hole, told, words)

# %% [markdown]
# The loop is that of [06](06_guidance.ipynb). Only where it begins differs, and in one case what is put back after every
# step.
#
# ## Predict
#
# A run from a picture takes a *strength* from 0 (the picture as it is) to 1. At strength 0.5, how many of 20 steps are run?
# When it grows, which of these follow the new sentence first, and which last: the thing's colour, its kind, its size, the
# ground, the time of day, the mountains? (Nothing checks this cell; it is for you.)

# %%
my_guess = {"steps run": None, "first to follow": None, "last to follow": None}

# %% [markdown]
# ## Derive
#
# A schedule is a table of rows $i = 0 \dots n$, from the noisiest down, and the latent that belongs to row $i$ is
#
# $$x_i = \alpha_i\, x_0 + \sigma_i\, \epsilon. \tag{1}$$
#
# **From a picture** (SDEdit, Meng et al. 2022, section 3). The loop doesn't ask how its latent came about. So put the
# picture's latent $x_0$ into (1) with drawn noise, at a row in the middle, and go on from there. `strength` $s$ is the share
# of the $n$ steps that is run; the steps are cut to a whole number, and they are the last ones:
#
# $$i_{\text{first}} = n - \lfloor n s \rfloor. \tag{2}$$
#
# **Into a hole** (RePaint, Lugmayr et al. 2022, equation 8). Start from noise. After every step the latent stands on row
# $i$; outside the mask $m$ we know what belongs there, by (1):
#
# $$x_i \leftarrow m\, x_i + (1 - m)\,(\alpha_i\, x_0 + \sigma_i\, \epsilon). \tag{3}$$
#
# **From its own noise** (DDIM inversion, Song et al. 2021, section 4.3). DDIM's step is deterministic, so it can be walked
# upwards, from row $i$ to the noisier row $i - 1$:
#
# $$x_{i-1} = \alpha_{i-1}\, \frac{x_i - \sigma_i\, \hat\epsilon}{\alpha_i} + \sigma_{i-1}\, \hat\epsilon. \tag{4}$$
#
# On the way down, $\hat\epsilon$ was predicted in $x_{i-1}$, which we don't have yet. The prediction in $x_i$ stands in for
# it; predicting once more, where that landed, corrects it. (Song et al. 2021 do without; Pan et al. 2023 iterate.)
#
# ## Build
#
# First the table. Where does a strength of 0.5 begin, and how much of the picture is left there?

# %%
n = 20
schedule = pipe.schedule(n, sampler="ddim")
strengths = np.array([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0])
rows = [n - int(n * float(s)) for s in strengths]  # (2)
for s, row in zip(strengths, rows):
    level = schedule[row]
    print(f"strength {s:.1f}: row {row:2} of {n}, t = {level.t:3.0f}, "
          f"{level.alpha:.2f} of the picture + {level.sigma:.2f} of noise")  # fmt: skip
assert rows[4] == 10 and (int(50 * 0.58), int(10 * 0.75)) == (28, 7)  # cut, not rounded

# %%
half = schedule[10]
fig, ax = figures.canvas(5.6, 2.5)
ax.plot(strengths, [schedule[row].alpha for row in rows], "o-", label="α, of the picture")
ax.plot(strengths, [schedule[row].sigma for row in rows], "s--", label="σ, of the noise")
ax.set(xlabel="strength", ylabel="share in the first latent", ylim=(0, 1.05))
ax.legend(frameon=False, fontsize=8, loc="center right")
power = (half.sigma / half.alpha) ** 2
figures.title(fig, f"At strength 0.5 there is {power:.1f} times as much noise as picture")
assert power > 1.5
figures.show(fig, "Two curves over strength: alpha falls, sigma rises, they cross at 0.4")

# %% [markdown]
# 20 steps at strength 0.5 are 10 steps: whoever wants 20 to be run asks for 40, or tells `ldm` that the steps are the
# actual ones (`steps_are="actual"`). Also, 50 steps at strength 0.58 are 28 and not 29, for `50 * 0.58` is
# 28.999999999999996 in floating point, and it is cut. `ldm` does as diffusers does here.
#
# Now the loop: [06](06_guidance.ipynb)'s, with two things added: the row it begins at, and a function that may change what
# a step has landed on.


# %%
@torch.no_grad()
def walk(x, prompts, schedule, first=0, s=4.0, landed=lambda x, i: x):
    """DDIM with guidance from row `first` down; x is (B, 4, h, w), with one prompt each."""
    cond, uncond = pipe.encode(prompts), pipe.encode([""] * len(prompts))  # (B, 77, 128)
    for level, after in pairwise(schedule.levels[first:]):
        if s == 1:
            eps = pipe.unet(x, level.t, cond)
        else:
            both = pipe.unet(torch.cat([x, x]), level.t, torch.cat([uncond, cond]))
            u, c = both.chunk(2)
            eps = u + s * (c - u)
        x0 = (x - level.sigma * eps) / level.alpha
        x = after.alpha * x0 + after.sigma * eps
        x = landed(x, after.i)
    return x


def noised(x0, eps, schedule, i):
    """(1). The last row counts as clean, whatever little noise its level has."""
    return x0 if i == len(schedule) else schedule[i].alpha * x0 + schedule[i].sigma * eps


# %% [markdown]
# The encoder draws its latent from a distribution, so it takes noise too, and takes it first. That is the order of
# diffusers, and the order decides which picture a seed gives.

# %%
noise = ldm.Noise.from_seeds([7])
with torch.no_grad():
    x0 = pipe.vae.encode(pictures.image_tensor([photo]), noise(torch.empty(1, 4, 16, 16)))
eps = noise(x0)  # (1, 4, 16, 16)

first = n - int(n * 0.5)  # (2)
mine = walk(noised(x0, eps, schedule, first), [words], schedule, first)
same = {"seed": 7, "steps": n, "sampler": "ddim", "guidance": 4.0}
theirs = pipe(words, image=photo, strength=0.5, **same)
assert torch.equal(mine, theirs.x0), "the loop above is no longer the pipeline's image-to-image"
print("From a picture: the same latent as the pipeline's, bit for bit.")

# %% [markdown]
# For the hole, the mask has to come to the latent's size: 16×16 places, each of which stands for 8×8 pixels. (The known
# part stands first in the sum because a sum's layout in memory follows its first term, and convolutions round by layout:
# the other order is as right, and differs in the last bit.)

# %%
mask = F.max_pool2d(torch.tensor(white / 255.0).float()[None, None], 8)  # (1, 1, 16, 16)


def fill(x, i):
    return (1 - mask) * noised(x0, eps, schedule, i) + mask * x  # (3)


mine = walk(eps, [words], schedule, landed=fill)
theirs = pipe(words, image=photo, mask=hole, paste=False, **same)
assert torch.equal(mine, theirs.x0), "the loop above is no longer the pipeline's inpainting"
print("Into a hole: the same latent as the pipeline's, bit for bit.")


# %%
@torch.no_grad()
def climb(x, prompts, schedule, refine=0):
    """DDIM upwards, (4), each step corrected `refine` times; climbed[i] stands on row i."""
    cond, climbed = pipe.encode(prompts), [x]
    for level, after in pairwise(schedule.levels[::-1]):
        x, eps = climbed[-1], pipe.unet(climbed[-1], level.t, cond)
        for k in range(refine + 1):
            y = after.alpha * ((x - level.sigma * eps) / level.alpha) + after.sigma * eps  # (4)
            if k < refine:
                eps = pipe.unet(y, after.t, cond)  # what DDIM would have predicted, coming from y
        climbed.append(y)
    return climbed[::-1]


ten = pipe.schedule(10, sampler="ddim")
mine = climb(x0, [told], ten, refine=1)[0]
theirs = pipe.invert(photo, told, seed=7, steps=10, refine=1)
assert torch.equal(mine, theirs), "the loop above is no longer the pipeline's inversion"
print("Up to its own noise: the same latent as the pipeline's, bit for bit.")

# %% [markdown]
# ## Run
#
# ### What gives way first
#
# Twelve true scenes, and for each a sentence that contradicts it in all six respects. At which strength does the picture
# follow the sentence, and in what? The checker, a small network trained on true scenes, reads every picture. No guidance
# here: the plain model, for half the work.

# %%
checker = load_checker(find_model("scenes"))
asked = {"left color": "colour", "ground": "ground", "left kind": "kind", "time": "time",
         "left size": "size", "mountains": "mountains"}  # fmt: skip


def scene(seed):
    return scenes.sample(seed, "any", n=1, style="plain")


def unlike(old, seed):
    """The next scene that differs from `old` in everything asked."""
    while any(answers(scene(seed))[q] == answers(old)[q] for q in asked):
        seed += 1000
    return scene(seed)


def read(images):
    return checker.read(to_tensor(np.stack([np.asarray(image) for image in images])))


def encoded(shown):
    """Scenes -> the means of their latents (B, 4, 16, 16); here nothing has to be drawn."""
    pixels = pictures.image_tensor([Image.fromarray(scenes.render(each).image) for each in shown])
    with torch.no_grad():
        return pipe.vae.encode(pixels)


old = [scene(2060 + k) for k in range(12)]
new = [unlike(each, 6060 + k) for k, each in enumerate(old)]
captions = [scenes.caption(each, each.seed, full=True) for each in new]

# %%
latents, drawn_noise = encoded(old), ldm.Noise.from_seeds(range(12)).draw((4, 16, 16))
ladder = {}
for s in (0.0, 0.3, 0.5, 0.7, 0.9):
    first = 10 - int(10 * s)
    start = noised(latents, drawn_noise, ten, first)
    ladder[s] = pipe.decode(walk(start, captions, ten, first, s=1))

shown = (2, 4)
grid = [[ladder[s][k] for s in ladder] for k in shown]
side = [f"“{new[k].things[0].color}\n{new[k].things[0].kind},\n{new[k].time}”" for k in shown]
heading = "From the picture to the sentence, as strength grows"
figures.pictures(grid, [f"strength {s}" for s in ladder], side, heading, inches=1.1)

# %%
readings, follows = [read(images) for images in ladder.values()], {}
for question, name in asked.items():
    true = [answers(each)[question] for each in new]
    follows[name] = [np.mean([a[question] == b for a, b in zip(seen, true)]) for seen in readings]
order = sorted(follows, key=lambda name: -sum(follows[name]))

fig, ax = figures.canvas(5.6, 2.7)
for name, mark in zip(order, "os^vDP"):
    ax.plot(list(ladder), [100 * share for share in follows[name]], mark + "-", label=name)
ax.set(xlabel="strength", ylabel="as the sentence says, %", ylim=(-3, 103))
ax.legend(frameon=False, fontsize=8, loc="upper left")
figures.title(fig, f"First the {order[0]} and the {order[1]}, then the rest")
figures.show(fig, "Six rising curves over strength; colour and ground lie above the others")

# %%
for name in order:
    print(f"{name:10}", *(f"{100 * share:4.0f} %" for share in follows[name]))
first_two, others = order[:2], order[2:]
assert set(first_two) == {"colour", "ground"}
at_half = {name: share[2] for name, share in follows.items()}
assert min(at_half[name] for name in first_two) > max(at_half[name] for name in others) + 0.1
assert all(share[0] <= 0.1 for share in follows.values())

# %% [markdown]
# A colour can be exchanged while all outlines stay, so it goes first. What a thing is, how large it is, whether there are
# mountains and what light lies on everything has been settled by the rows above: to decide it anew, the run has to begin
# higher up. A strength is a choice of *what* may change. (With twelve scenes the order of the later four isn't told apart.)
# No strength changes the kind of the thing and leaves the rest of the picture alone: for that one wants the other starts.
#
# ### The picture's own noise
#
# How well does inversion find the way back? Climb with (4), walk down again with the same sentence, and compare with the
# latent we set out from.


# %%
def error_of(steps, refine):
    """Up and down again: the error of the latent, relative to its spread."""
    table = pipe.schedule(steps, sampler="ddim")
    back = walk(climb(x0, [told], table, refine)[0], [told], table, s=1)
    return ((back - x0).square().mean().sqrt() / x0.std()).item()


counts = (3, 6, 9)
errors = {refine: [error_of(steps, refine) for steps in counts] for refine in (0, 2)}
fig, ax = figures.canvas(5.6, 2.5)
for (refine, found), mark in zip(errors.items(), "os"):
    ax.loglog(counts, [100 * each for each in found], mark + "-", label=f"{refine} corrections")
ax.set(xlabel="steps", ylabel="error of the way back, %")
ax.set_xticks(counts, [str(steps) for steps in counts])
ax.set_yticks([5, 10, 20], ["5", "10", "20"])
ax.minorticks_off()
ax.legend(frameon=False, fontsize=8)
gain = errors[0][2] / errors[2][2]
figures.title(fig, f"Two corrections: {gain:.1f} times nearer, at 9 steps")
assert gain > 2.2 and errors[0][0] > 1.8 * errors[0][2] and errors[2][0] > 2 * errors[2][2]
figures.show(fig, "Error against steps, logarithmic: two falling lines, the corrected one lower")

# %%
for refine, found in errors.items():
    each = [f"{steps} steps {100 * e:4.1f} %" for steps, e in zip(counts, found)]
    print(refine, "corrections a step:", ", ".join(each))
wild = {}
for refine in (1, 4):
    up = pipe.invert(photo, told, seed=7, steps=6, guidance=4, refine=refine)
    down = pipe(told, latents=up, steps=6, guidance=4, sampler="ddim").x0
    wild[refine] = ((down - x0).square().mean().sqrt() / x0.std()).item()
    print(f"guidance 4, 6 steps, corrections {refine}: {100 * wild[refine]:.0f} %")
assert wild[4] > 1.4 * wild[1]

# %% [markdown]
# A correction is a fixed-point iteration, and it converges only where the network's answer moves less than its input.
# Guidance multiplies how far the answer moves: with few steps the corrections lead away. So one inverts without guidance,
# or with many steps.
#
# What is it good for? For a start. At any row we may begin with noise that was *drawn* (1), or with the noise that *this*
# picture has by (4). Six scenes whose things are to get another colour, and nothing else is to change. We count the
# things that got it, and, in grey levels of 255, how much changed outside the thing's true mask.

# %%
wanted_colors = {a: b for a, b in zip(scenes.COLORS, scenes.COLORS[3:] + scenes.COLORS[:3])}
to_edit = [scene(2000 + k) for k in range(6)]
masks = [scenes.render(each).masks.any(axis=0) for each in to_edit]
as_it_is = [scenes.caption(each, each.seed, full=True) for each in to_edit]
color_of = [each.things[0].color for each in to_edit]
edited = [text.replace(c, wanted_colors[c]) for text, c in zip(as_it_is, color_of)]

latents, fresh = encoded(to_edit), ldm.Noise.from_seeds(range(6)).draw((4, 16, 16))
plain = pipe.decode(latents)  # what the autoencoder makes of them: no loop has a part in that
climbed = climb(latents, as_it_is, ten, refine=1)


def changed(images, originals, where):
    """By how many of 255 grey levels, on average over the pixels of one mask a picture."""
    pairs = zip(images, originals, where)
    return np.mean([np.abs(np.float64(a) - np.float64(b))[m].mean() for a, b, m in pairs])


# %%
starts = {"drawn noise": lambda i: noised(latents, fresh, ten, i),
          "its own noise": lambda i: climbed[i]}  # fmt: skip
outcome, images = {}, {}
for name, start in starts.items():
    for s in (0.6, 1.0):
        first = 10 - int(10 * s)
        images[name, s] = found = pipe.decode(walk(start(first), edited, ten, first, s=1))
        colors = [each["left color"] for each in read(found)]
        hits = np.mean([color == wanted_colors[c] for color, c in zip(colors, color_of)])
        outcome[name, s] = (hits, changed(found, plain, [~m for m in masks]))
        print(f"{name:13} strength {s}: {100 * hits:4.0f} % recoloured, "
              f"the rest changed by {outcome[name, s][1]:4.1f}")  # fmt: skip

print(f"The spread of their own noise is {climbed[0].std():.2f}; that of drawn noise is 1.")
rest = [outcome[name, 1.0][1] for name in starts]
assert outcome["its own noise", 1.0][0] >= 0.9 and rest[1] < 0.5 * rest[0]

# %%
chosen = [("drawn noise", 0.6), ("drawn noise", 1.0), ("its own noise", 1.0)]
grid = [[plain[k], *(images[each][k] for each in chosen)] for k in (3, 0)]
labels = ["given", "drawn, 0.6", "drawn, 1.0", "its own, 1.0"]
side = [f"{color_of[k]} to {wanted_colors[color_of[k]]}" for k in (3, 0)]
heading = f"From its own noise: {rest[0] / rest[1]:.1f} times less change"
figures.pictures(grid, labels, side, heading=heading, inches=1.15)

# %% [markdown]
# Even at strength 1, where drawn noise has forgotten the picture, its own noise still knows where everything was: DDIM is a
# deterministic map, and the sentence is nearly the same. (An edit of the light changes every pixel, so there is little to be
# kept.) But what inversion finds is no drawn noise: pictures as flat as ours leave it too even, as its spread says, and the
# further the new sentence is from the old one, the less the model is used to such a start.
#
# ### Into a hole
#
# A run with a mask keeps the rest by construction. What still changes there is what the autoencoder changes; the pipeline
# then puts the original's own pixels back (`paste`), and says by how much they had changed.

# %%
things = ["blue tree", "red boat", "purple car"]
tries = [f"a large {thing} on grass at dawn with mountains" for thing in things]
tries += ["grass at dawn with mountains"]
result = pipe(tries, image=photo, mask=hole, steps=12, sampler="ddim", guidance=4, seed=3)
outside = [white < 128] * len(tries)
print("changed outside, before and after pasting:", np.round(result.changed, 1),
      changed(result.images, [photo] * len(tries), outside))  # fmt: skip
found = [f"{each['left color']} {each['left kind']}" for each in read(result.images)]
print("the checker reads:", ", ".join(found[:3]))
assert changed(result.images, [photo] * len(tries), outside) == 0 and found[:3] == things
labels = ["given", "the mask", *things, "nothing"]
heading = "White is drawn anew, and black is the original, bit for bit"
figures.pictures([photo, hole.convert("RGB"), *result.images], labels, (), heading, inches=1.05)

# %% [markdown]
# Pasting has its price: where the autoencoder's colours differ from the original's, the mask's border can be seen. Tools
# soften the mask for that; the kept pixels are then no longer the original's.
#
# The mask at the latent's size is coarser than the mask that was drawn. Take one pixel for each 8×8, as diffusers does, and
# a thin stroke falls through; `ldm` draws a place anew if *any* of its pixels is white.

# %%
y, x = np.mgrid[:128, :128]
stroke = (np.abs(np.hypot(x - 64, y - 64) - 40) < 1.5) | (np.abs(y - x) < 2)  # thin lines
given = torch.tensor(stroke).float()[None, None]
small = {"nearest": given[..., ::8, ::8], "any pixel": F.max_pool2d(given, 8)}
covered = {}
for name, each in small.items():
    large = each.repeat_interleave(8, 2).repeat_interleave(8, 3)
    covered[name] = ((large * given).sum() / given.sum()).item()
assert torch.equal(small["any pixel"], pictures.latent_mask(given, 8)) and covered["any pixel"] == 1
assert torch.equal(small["nearest"], pictures.latent_mask(given, 8, nearest=True))
assert covered["nearest"] < 0.8
labels = ["128×128", *(f"16×16, {name}: {100 * share:.0f} %" for name, share in covered.items())]
heading = f"Nearest loses {100 * (1 - covered['nearest']):.0f} % of this stroke"
figures.heat([given[0, 0], *(each[0, 0] for each in small.values())], labels, heading, inches=1.8)

# %% [markdown]
# **Why at every step?** One could as well draw a whole new picture, and put the known part back once, at the end. The
# difference shows when the sentence doesn't say what surrounds the hole. Here the right half is drawn anew, of sentences
# that name the thing alone: no light, no ground.

# %%
scenery = [scene(7000 + k) for k in range(10)]
short = [f"a {s.things[0].size} {s.things[0].color} {s.things[0].kind}" for s in scenery]
latents, fresh = encoded(scenery), ldm.Noise.from_seeds(range(10)).draw((4, 16, 16))
right = torch.zeros(1, 1, 16, 16)
right[..., 8:] = 1  # the right half is drawn anew


def keep(known):
    """The hook for `walk`: what known(x, i) says outside the mask."""
    return lambda x, i: (1 - right) * known(x, i) + right * x


ways = {
    "at the end": lambda x, i: latents if i == 10 else x,
    "every step (3)": lambda x, i: noised(latents, fresh, ten, i),
    "clean": lambda x, i: latents,
}
halves = {name: pipe.decode(walk(fresh, short, ten, s=1, landed=keep(known)))
          for name, known in ways.items()}  # fmt: skip

# %% [markdown]
# The third is a shortcut that people take by mistake: the known part goes back without its noise. And a fourth way costs
# three times as much: RePaint's *resampling* (Lugmayr et al. 2022, section 4.2) takes every step three times, with noise
# back up in between, so that what is drawn has time to fit to what is known.


# %%
@torch.no_grad()
def resampled(x, prompts, schedule, known, times=3):
    cond, source = pipe.encode(prompts), torch.Generator().manual_seed(9)
    for level, after in pairwise(schedule.levels):
        for k in range(times):
            eps = pipe.unet(x, level.t, cond)
            y = after.alpha * (x - level.sigma * eps) / level.alpha + after.sigma * eps
            y = keep(known)(y, after.i)
            a = level.alpha / after.alpha  # one step up: x = a y + b noise
            b = (level.sigma**2 - (a * after.sigma) ** 2) ** 0.5
            x = y if k + 1 == times else a * y + b * torch.randn(y.shape, generator=source)
    return x


halves["resampled"] = pipe.decode(resampled(fresh, short, ten, ways["every step (3)"]))


def seam(images):
    """The jump of the pixels at the border of the mask, over that of columns nearby."""
    pixels = np.stack([np.asarray(image, float) for image in images])
    jump = np.abs(np.diff(pixels, axis=2)).mean(axis=(0, 1, 3))  # jump[c]: from column c to c + 1
    return jump[63] / np.mean([jump[63 + d] for d in (-6, -5, -4, -3, 3, 4, 5, 6)])


given = [Image.fromarray(scenes.render(each).image) for each in scenery]
seams = {"given": seam(given), **{name: seam(found) for name, found in halves.items()}}
print("The jump at the mask's border, relative to those nearby:")
print(*(f"{name:15} {found:.1f}" for name, found in seams.items()), sep="\n")
assert seams["at the end"] > 1.5 * seams["every step (3)"] > 1.5 * seams["given"]
assert max(seams["resampled"], seams["clean"]) < 0.9 * seams["every step (3)"]

# %%
chosen = (5, 0)
grid = [[given[k], *(found[k] for found in halves.values())] for k in chosen]
side = [short[k].removeprefix("a ").replace(" ", "\n") for k in chosen]
heading = "Joined at the end, the right half cannot fit"
figures.pictures(grid, ["given", *halves], side, heading, inches=1.15)

# %% [markdown]
# Blending at every step is what lets the drawn half know of night and sea. It knows late: at the first rows the known part
# is nearly all noise, and what is decided there (see the ladder) may not fit. Resampling mends some of that.
#
# The "mistake" is a surprise: with a clean known part this model's seams are *smaller* than with (3). It is told everything
# from the first step on, and it bears a latent whose halves have different noise, though it was never trained on one. That is
# an observation about this model, and no rule to draw by: (3) is what keeps the input of every step like those of training.
# (Models made for inpainting have both: they read the clean picture in channels of their own, beside the noisy latent.)
#
# ### Beyond the frame
#
# Outpainting is a hole around the picture. The same sentence for a picture twice as wide gives a second house, for the
# model knows only pictures of 128 pixels, and each of those has a thing in it. A sentence for the room alone does better.

# %%
wide, room = pictures.extend(photo, 64, 0, 64, 0)  # 64 pixels to the left and to the right
same = {"image": wide, "mask": room, "steps": 12, "sampler": "ddim", "guidance": 3, "seed": 1}
beyond = [pipe(text, **same).images[0] for text in (told, "grass at dawn with mountains")]
assert all(np.array_equal(np.asarray(each)[:, 64:192], truth.image) for each in beyond)
rooms = [np.asarray(each, int)[:, np.r_[:64, 192:256]] for each in beyond]
yellow = [((each[..., 0] > 190) & (each[..., 2] < 90)).mean() for each in rooms]
assert yellow[0] > 0.02 > 0.002 > yellow[1], "a second house in the one, none in the other"


def wide_pictures(images, labels, heading, size=(5.4, 1.8)):
    fig, axes = figures.canvas(*size, columns=len(images))
    for ax, image, label in zip(np.atleast_1d(axes), images, labels):
        ax.imshow(image)
        ax.set_title(label, fontsize=9)
        ax.axis("off")
    figures.title(fig, heading)
    return figures.show(fig, heading, photographic=True)


labels = ["told of a house", "told of the land alone"]
wide_pictures(beyond, labels, "Outpainting: the middle stays, bit for bit")

# %% [markdown]
# ### Larger
#
# Asked for a picture larger than those of its training, the model fills it with several small ones. The "hi-res fix" draws
# at the size that it knows, enlarges the latent, and starts from that: image-to-image with a latent.

# %%
text = "a large red house on grass at sunset with mountains"
same = {"steps": 8, "sampler": "ddim", "guidance": 3, "seed": 3, "count": 3}
usual = pipe(text, **same)
direct = pipe(text, width=192, height=192, **same).images
larger = pipe.enlarge(usual.x0, 1.5)  # (3, 4, 24, 24)
blurred = pipe.decode(larger)
refined = pipe(text, image=larger, strength=0.5, **same).images


def sharpness(images):
    """The mean step from a pixel to its right neighbour, in grey levels."""
    grey = np.stack([np.asarray(each.convert("L"), float) for each in images])
    return np.abs(np.diff(grey, axis=2)).mean()


names = ["128 pixels", "192 at once", "enlarged", "and refined"]
rows = dict(zip(names, [usual.images, direct, blurred, refined]))
alone, sharp = {}, {name: sharpness(images) for name, images in rows.items()}
for name, images in rows.items():
    there = read([each.resize((128, 128), Image.Resampling.LANCZOS) for each in images])
    alone[name] = sum(each["right kind"] == "nothing" for each in there)
    print(f"{name:12} sharpness {sharp[name]:.2f}, one thing alone in {alone[name]} of 3")
assert alone["192 at once"] < alone["and refined"] and sharp["and refined"] > sharp["enlarged"]
row = [rows[name][1] for name in names]
figures.pictures(row, names, heading="At once: several; enlarged and refined: one", inches=1.5)

# %% [markdown]
# One thing, in its place, and somewhat sharper: that is the fix. What it can't do is change what the model knows. No house of
# this world is wider than 64 pixels (`ldm.scenes.world.extent`), so a larger one is given more windows and storeys.
#
# ### Four sentences, one picture
#
# And now for pleasure. Every step's prediction is a field; several predictions can share it. Here four windows of 16×16
# look at one wide latent, each told its own sentence, and where they overlap their predictions are averaged (MultiDiffusion,
# Bar-Tal et al. 2023, equation 5). It is the same loop, with a mean in the middle.


# %%
@torch.no_grad()
def panorama(prompts, stride=12, size=16, seed=5, s=3.0):
    width, lefts = size + stride * (len(prompts) - 1), [stride * k for k in range(len(prompts))]
    context = torch.cat([pipe.encode([""] * len(prompts)), pipe.encode(prompts)])
    weight = ramp(size, size - stride).float()  # (16,): less at the borders of a window
    x = ldm.Noise.from_seeds([seed]).draw((4, 16, width))  # (1, 4, 16, 52)
    for level, after in pairwise(pipe.schedule(12, sampler="ddim").levels):
        windows = torch.cat([x[..., left : left + size] for left in lefts])  # (4, 4, 16, 16)
        u, c = pipe.unet(torch.cat([windows, windows]), level.t, context).chunk(2)
        total, weights = torch.zeros_like(x), torch.zeros(width)
        for left, eps in zip(lefts, u + s * (c - u)):
            total[..., left : left + size] += weight * eps
            weights[left : left + size] += weight
        eps = total / weights
        x = after.alpha * (x - level.sigma * eps) / level.alpha + after.sigma * eps
    return pipe.decode(x)[0]


hours = {"dawn": "a large red house", "day": "a large green tree",
         "sunset": "a large blue house", "night": "a large purple tree"}  # fmt: skip
when = {"dawn": "at dawn", "day": "by day", "sunset": "at sunset", "night": "at night"}
day = panorama([f"{thing} on snow {when[hour]} with mountains" for hour, thing in hours.items()])
crops = [day.crop((96 * k, 0, 96 * k + 128, 128)) for k in range(4)]
for hour, each in zip(hours, read(crops)):
    print(f"told {hour:7} seen {each['time']:7} {each['left color']:6} {each['left kind']}")
assert [each["left kind"] for each in read(crops)] == ["house", "tree", "house", "tree"]
assert [each["left color"] for each in read(crops)] == ["red", "green", "blue", "purple"]
wide_pictures([day], [""], "A day in one picture: four sentences, one latent", size=(6.0, 2.2))

# %% [markdown]
# ## Break it
#
# Faults at the start. The noise belongs to a noisier row than the run begins at, or to none at all; or the latent was not
# multiplied by the VAE's factor (here 0.41), or by Stable Diffusion's (0.18). Three scenes with their own captions at strength
# 0.3: little ought to change.

# %%
some = [scenery[k] for k in (2, 4, 1)]
true_captions = [scenes.caption(each, each.seed, full=True) for each in some]
latents, fresh = encoded(some), ldm.Noise.from_seeds((52, 54, 51)).draw((4, 16, 16))
factor, first = pipe.vae.config.scaling_factor, 20 - int(20 * 0.3)
print(f"The factor is {factor:.3f}: without it a latent is {1 / factor:.1f} times too large.")
plain = pipe.decode(latents)
faults = {
    "right": noised(latents, fresh, schedule, first),
    "noise of a higher row": noised(latents, fresh, schedule, first - 6),
    "no noise": latents,
    "not scaled": noised(latents / factor, fresh, schedule, first),
    "Stable Diffusion's factor": noised(latents / factor * 0.18215, fresh, schedule, first),
}
everywhere = [np.full((128, 128), True)] * 3
numbers, broken = {}, {}
for name, start in faults.items():
    last = walk(start, true_captions, schedule, first, s=1)
    broken[name] = pipe.decode(last)
    spread, moved = (last.std() / latents.std()).item(), changed(broken[name], plain, everywhere)
    numbers[name] = (start.std().item(), spread, moved)
    print(f"{name:26} spread: first latent {start.std():.2f}, last {spread:.2f} of the picture's;"
          f" {moved:4.1f} grey levels changed")  # fmt: skip

# %%
labels = ["right", "too much noise", "no noise", "not scaled"]
grid = [[broken[name][k] for name in list(broken)[:4]] for k in (0, 1)]
heading = "Too much noise turns into clouds"
figures.pictures(grid, labels, (), heading, inches=1.0)

# %%
reference = numbers["right"]
assert numbers["noise of a higher row"][1] < 0.93 * reference[1], "too much noise: it ends too flat"
assert numbers["noise of a higher row"][2] > 1.5 * reference[2], "and far from the picture"
assert numbers["Stable Diffusion's factor"][1] < 0.93 * reference[1], "flat as well"
assert numbers["Stable Diffusion's factor"][0] < 0.8 * reference[0], "seen beforehand"
assert numbers["not scaled"][0] > 1.5 * reference[0] and numbers["not scaled"][1] > 1.3
assert numbers["no noise"][2] < 1.5 * reference[2] and numbers["no noise"][1] > reference[1] + 0.03

# %% [markdown]
# The network believes what it is told of the noise. Noise beyond that it takes for content: clouds, stars, flecks, and the
# contrast falls. Missing noise is the fault that nobody sees, for a polished copy of the picture comes out; it shows in a
# spread that is a little too large. A wrong factor is the same fault in disguise, for what counts is the ratio of noise to
# picture: a latent 2.4 times too large has 2.4 times too little noise, and one that is too small has too much. The factor
# betrays itself before a single step is taken: with a right one the spread of the first latent is near 1.
#
# And the mask **inverted**: for some tools white is what is drawn anew, for others what is kept.

# %%
inverted = Image.fromarray(255 - white)
same = {"image": photo, "steps": 12, "sampler": "ddim", "guidance": 4, "seed": 3, "paste": False}
inside, outside = [white >= 128], [white < 128]
rows = {}
for name, m in (("right", hole), ("inverted", inverted)):
    rows[name] = pipe(tries[0], mask=m, **same).images
for name, images in rows.items():
    moved = [changed(images, [photo], where) for where in (inside, outside)]
    print(f"{name:9} changed inside {moved[0]:5.1f}, outside {moved[1]:5.1f}")
    assert (moved[0] > 3 * moved[1]) == (name == "right")

# %% [markdown]
# ## Your turn
#
# ### Exercise 08.1: where to begin
# *Difficulty 1 of 5, importance 4 of 5, five minutes.* Write equation (2): the first row of a run of that strength. At
# strength 0 no step is run, at strength 1 all are.


# %% tags=["exercise"]
def first_row(steps, strength):
    # BEGIN SOLUTION
    return steps - min(int(steps * strength), steps)
    # END SOLUTION


ldm.check("08.1", first_row)

# %% [markdown]
# ### Exercise 08.2: put the known part back
# *Difficulty 2 of 5, importance 5 of 5, five minutes.* Write equation (3). A step has gone from the row `level` to the row
# `after` (both have `.t`, `.alpha`, `.sigma`) and landed on `x` (B, 4, h, w). `mask` (B, 1, h, w) is 1 where the picture is
# drawn anew; `x0` is the picture's clean latent, `eps` the noise of the whole run.


# %% tags=["exercise"]
def blend(x, x0, eps, mask, level, after):
    # BEGIN SOLUTION
    return mask * x + (1 - mask) * (after.alpha * x0 + after.sigma * eps)
    # END SOLUTION


ldm.check("08.2", blend)

# %% [markdown]
# ### Exercise 08.3: one step up
# *Difficulty 3 of 5, importance 3 of 5, ten minutes.* Write equation (4), from the row `level` to the noisier row `after`,
# and correct it `refine` times: predict again where it landed, and climb from `x` again. `predict(latent, t)` gives the
# noise in a latent.


# %% tags=["exercise"]
def up(predict, x, level, after, refine):
    # BEGIN SOLUTION
    eps = predict(x, level.t)
    for k in range(refine + 1):
        y = after.alpha * (x - level.sigma * eps) / level.alpha + after.sigma * eps
        if k < refine:
            eps = predict(y, after.t)
    return y
    # END SOLUTION


ldm.check("08.3", up)

# %% [markdown]
# ### Exercise 08.4: the mask of the latent
# *Difficulty 1 of 5, importance 3 of 5, five minutes.* A mask of pixels (B, 1, H, W) of zeros and ones is to become one of
# places (B, 1, H / factor, W / factor): 1 wherever any pixel of the place is 1.


# %% tags=["exercise"]
def latent_mask(mask, factor):
    # BEGIN SOLUTION
    return F.max_pool2d(mask, factor)
    # END SOLUTION


ldm.check("08.4", latent_mask)

# %% [markdown]
# ### Further 08.5: several windows, one field
# *Difficulty 2 of 5, importance 2 of 5, ten minutes.* The predictions of several windows, each (C, h, w) and beginning at
# its column of `lefts`, become one field (C, h, width): at each position the mean of the windows that see it, weighted by
# `weight` (w,). Every position is seen by some window.


# %% tags=["exercise"]
def merged(windows, lefts, weight, width):
    # BEGIN SOLUTION
    total, weights = torch.zeros(*windows[0].shape[:-1], width), torch.zeros(width)
    for window, left in zip(windows, lefts):
        total[..., left : left + len(weight)] += weight * window
        weights[left : left + len(weight)] += weight
    return total / weights
    # END SOLUTION


ldm.check("08.5", merged)

# %% [markdown]
# ## The same on a real model
#
# The same function, on Stable Diffusion 1.5, with our scene enlarged to 512 pixels for a photo.

# %% tags=["real-model"]
sd = real("sd15")
if sd is not None:
    display(four_starts(sd, photo, hole, told, words))

# %% [markdown]
# What carries over: the loop, to the letter. What doesn't: which strength changes what, for our model draws from 4×16×16
# numbers and a real one from 4×64×64, and its captions don't name all that a picture shows. Nor should one count on the same
# forgiveness: this model is small, and its world regular. Inversion is mostly run with 50 steps there (Mokady et al. 2023).
#
# ## Where it lives in `ldm`
#
# | here | `ldm` | diffusers |
# |---|---|---|
# | equation (2) | `settings.py`, `run_of` | `get_timesteps` of each image-to-image pipeline |
# | (1) at the first row | `tasks.py`, `Road.from_picture` | `prepare_latents` |
# | (3) | `tasks.py`, `blended` | in `__call__` of `StableDiffusionInpaintPipeline` |
# | (4) | `samplers/inverse.py`, `ddim_inverse` | `DDIMInverseScheduler`, without corrections |
# | masks, room, enlarging | `pictures.py` | `VaeImageProcessor` |
# | windows | `tiles.py` | `StableDiffusionPanoramaPipeline`, deprecated |
#
# In diffusers, image-to-image, inpainting and their ControlNet variants are pipelines of their own. Here `blended` is a
# sampler around a sampler, so any method and any network can be inside it:

# %%
import inspect

from ldm import tasks

print(inspect.getsource(tasks.blended))

# %% [markdown]
# **In short.** A start is a row and a latent that belongs to it: noise, a picture with drawn noise, a picture with its own.
# The higher the row, the more is decided anew. What is known goes back after every step, with the noise of the row that was
# landed on, and what is drawn has to fit it. Next: [09, ControlNet](09_controlnet.ipynb).
