# %% [markdown]
# # 00 · One picture, six boxes
#
# **How does a sentence become a picture?**
#
# About 15 minutes to read, a quarter of a minute to run. Before it: nothing but a little Python. You will have built the whole
# road from a sentence to a picture in twelve lines, watched a picture come out of noise step by step, changed one word of it,
# and broken it in four ways.

# %%
import time

import numpy as np
import torch

import ldm
from ldm.lab.poster import NOISE, STEP, UNET, VAE, WORDS, poster
from ldm.lab.real import real

torch.set_grad_enabled(False)  # nothing is trained here
pipe = ldm.load("scenes")  # a small model that travels with ldm
prompt = "a large red house on snow at night"
sentences = [prompt, "a small yellow boat on sea at sunset", "a large green tree on grass at dawn"]
drawn = [pipe(text, seed=7, steps=10, sampler="ddim").images[0] for text in sentences]

noise = ldm.Noise.from_seeds([7]).draw((4, 16, 16))[0]  # what all three begin from
seen = noise[:3] / 2.5  # three of its four channels, as if they were colours
labels = ["seed 7", *(text.replace(" on ", "\non ") for text in sentences)]
heading = "One and the same noise, three sentences, three pictures"
figures.pictures([seen, *drawn], labels, heading=heading, inches=1.35)

# %% [markdown]
# No picture was looked up, and none was pasted together. Change a sentence and run the cell again: the model knows houses,
# trees, flowers, boats, cars, balloons, stars and fish, ten colours, two sizes, grass, sand, snow and sea, day, sunset, night
# and dawn. It has nothing to say about anything else. It is a toy (its world was drawn by a program, and it fits into 18
# megabytes), but it is built exactly as Stable Diffusion is, box by box:
#
# | box | is given | hands on | opened in |
# |---|---|---|---|
# | 1 tokenizer | the sentence | 77 numbers: one for each piece of a word, the rest is padding | [01](01_words.ipynb) |
# | 2 text encoder | these numbers | 77 vectors: what the words mean beside each other | [01](01_words.ipynb) |
# | 3 noise | a seed | a small grid of random numbers, the *latent* | [03](03_noise.ipynb) |
# | 4 UNet, with guidance | latent, vectors, how noisy it is | what of the latent it takes for noise | [04](04_unet.ipynb), [05](05_attention.ipynb), [06](06_guidance.ipynb) |
# | 5 sampler | latent and noise | a latent that is a little less noisy | [07](07_samplers.ipynb) |
# | 6 VAE decoder | the clean latent | the picture | [02](02_latents.ipynb) |
#
# Boxes 4 and 5 take turns, ten times here. That is all there is.
#
# ## Predict
#
# Commit yourself before you go on. (a) In which box does the time go, and how much of it? (b) The noise stays as it is, and
# "red" becomes "yellow": what changes in the picture? (c) After how many of the ten steps is there a house to be seen?
# (Nothing checks this cell; it is for you.)

# %%
my_guess = {"(a) box, share in %": None, "(b) what changes": None, "(c) steps": None}

# %% [markdown]
# ## Derive
#
# One line of algebra carries everything. Take a clean latent $x_0$ and mix noise $\epsilon$ into it, $\alpha$ parts of the
# one and $\sigma$ parts of the other (for this model their squares add up to 1):
#
# $$x = \alpha\,x_0 + \sigma\,\epsilon. \tag{1}$$
#
# With $\alpha$ near 1 and $\sigma$ near 0 this is the picture, the other way round it is nothing but noise. The UNet is trained
# on such mixtures: it sees $x$, is told how noisy it is (a number $t$ from 0 to 999) and what the caption says, and guesses the
# $\epsilon$ that was mixed in (Ho et al. 2020, algorithm 1).
#
# Now read (1) backwards. We know $x$; the UNet guesses $\epsilon$; what is left is the picture, $\hat x_0 = (x - \sigma\,\epsilon)
# / \alpha$. So why not stop there? Because in pure noise nobody can see a house: the first guess is the mean of all pictures that
# are possible, a blur. It is good for one thing: to go *a little way* towards it. We mix guess and noise again, as (1) says, but
# with the next, slightly smaller share of noise $\sigma'$ (Song et al. 2021, equation 12, nothing random added):
#
# $$x' = \alpha'\,\underbrace{\frac{x - \sigma\,\epsilon}{\alpha}}_{\hat x_0} + \sigma'\,\epsilon. \tag{2}$$
#
# Then the UNet looks again, with a better view than before. This is DDIM, and it is box 5.
#
# ## Build
#
# All six boxes, by hand. One line in it is not (1) or (2): the UNet is asked twice, once with no words and once with the
# sentence, and the difference is exaggerated. This is guidance; why it helps is the matter of [06](06_guidance.ipynb).


# %%
def loop(words, s=4.0, seed=7, steps=10):
    """From words (what to stay away from, what to draw) to a clean latent."""
    ids = [pipe.tokenizer(text).ids for text in words]  # 1: each (1, 77)
    context = torch.cat([pipe.text_encoder.context(each) for each in ids])  # 2: (2, 77, 128)
    schedule = pipe.schedule(steps, sampler="ddim")  # rows of t, alpha, sigma
    x = ldm.Noise.from_seeds([seed]).draw((4, 16, 16)) * schedule.start_scale  # 3: (1, 4, 16, 16)
    for level, after in zip(schedule.levels, schedule.levels[1:]):
        uncond, cond = pipe.unet(torch.cat([x, x]), level.t, context).chunk(2)  # 4
        eps = uncond + s * (cond - uncond)  # 4: guidance
        x0 = (x - level.sigma * eps) / level.alpha  # 5: (1), read backwards
        x = after.alpha * x0 + after.sigma * eps  # 5: (2)
    return x


mine = pipe.decode(loop(["", prompt]))[0]  # 6: (3, 128, 128), as a picture
theirs = pipe(prompt, seed=7, steps=10, sampler="ddim").images[0]
assert np.array_equal(np.asarray(mine), np.asarray(theirs)), "not what the pipeline does"
print("Twelve lines and the pipeline draw the same picture, bit for bit.")

# %% [markdown]
# Not a simplified model of it: the thing itself. The start scale is 1 here (some schedules begin with a little less or more), the
# latent has 4 × 16 × 16 numbers, and the picture 3 × 128 × 128.
#
# ## Run
#
# ### Step through it
#
# `pipe.trace` is the same call as `pipe(...)`, and keeps what happened. Drag the slider, or press the arrow keys: the latent, what
# the UNet takes the picture to be, and what each word looked at. Touch a word to see its map. (Where
# pictures stand in the slider's place: run the cell, or trust the notebook.)

# %%
trace = pipe.trace(prompt, seed=7, steps=10, sampler="ddim")
assert torch.equal(trace.result.x0, loop(["", prompt])), "looking on changed the run"
trace.show()

# %% [markdown]
# ### Out of the noise
#
# Four of the ten steps. Above, what the UNet is given; below, what it takes the picture to be, $\hat x_0$; both painted out by the
# decoder.


# %%
def strip(trace, steps=(0, 1, 3, 6)):
    """The x of some steps, and the x0 that was guessed from each."""
    chosen = [trace[k] for k in steps]
    rows = [[trace.decode(x)[0] for x in (step.x_before, step.x0)] for step in chosen]
    labels = [f"t = {step.level.t:.0f}" for step in chosen]
    heading = "The latent, and what the UNet sees in it"
    return figures.pictures(list(zip(*rows)), labels, ["x", "x0, guessed"], heading, inches=1.1)


strip(trace)


# %%
def grey(image):
    """A picture as numbers from 0 to 255."""
    return np.asarray(image).astype(float)


def away(x0):
    """How far a latent, painted out, is from the finished picture: in grey levels, on average."""
    return np.abs(grey(trace.decode(x0)[0]) - grey(trace.result.images[0])).mean()


print("step    t    x is away by    x0 by   (grey levels of 255)")
for step in trace.steps:
    print(f"{step.i + 1:4} {step.level.t:4.0f} {away(step.x_before):14.1f} {away(step.x0):8.1f}")
assert all(away(step.x0) < away(step.x_before) / 2 for step in trace.steps[:-1])
assert away(trace[3].x0) < 12 < 30 < away(trace[3].x_before)
sky = grey(trace.decode(trace[0].x0)[0])[8:30].mean(2)
left, middle, right = (part.max() for part in (sky[:, :32], sky[:, 32:96], sky[:, 96:]))
assert min(left, right) > 2 * middle, "two moons in the first guess"

# %% [markdown]
# The guess runs ahead: at the fourth step it is nearly the picture, while $x$ is still covered with splinters. The first guess
# is what (2) has to reckon with: a red blur, where a house might stand, and *two* moons, one on each side. It is the
# mean of all the pictures that this noise may hide, exaggerated by guidance. The first steps decide what is where, the later ones draw it finely.
#
# ### One word
#
# Now the noise stays, and one word goes. Where is the house? The model says so itself: we ask at which places it looked at the
# word "house" (white below: at least half as much as at the most), and measure how much changes in there and how much outside, in grey
# levels of 255.

# %%
swaps = {"red": "yellow", "house": "tree", "night": "sunset"}
looked = trace.record.map(trace.words[0][3].tokens, size=(128, 128))
inside = (looked > looked.max() / 2).numpy()
top, below = [trace.result.images[0]], [inside * np.uint8(255)]
labels, change = [["the sentence"], ["“house”"]], {}
for old, new in swaps.items():
    image_new = pipe(prompt.replace(old, new), seed=7, steps=10, sampler="ddim").images[0]
    difference = np.abs(grey(image_new) - grey(top[0])).mean(2)
    change[old] = difference[inside].mean(), difference[~inside].mean()
    top.append(image_new)
    below.append(difference.astype(np.uint8))
    labels[0].append(f"{old} → {new}")
    labels[1].append("{:.0f} in it, {:.0f} outside".format(*change[old]))
below = [np.repeat(each[..., None], 3, axis=2) for each in below]
heading = "A word changes the picture where it belongs"
figures.pictures([top, below], labels, ["picture", "difference"], heading, inches=1.35)

# %%
assert trace.words[0][3].text == "house"
for word in ("red", "house"):
    assert change[word][0] > 5 * change[word][1], f"{word} is about the house"
assert change["night"][1] > 5 * change["red"][1], "night is about the rest"
times = [change[word][0] / change[word][1] for word in ("red", "house")]
print(f"These two change it {min(times):.0f} to {max(times):.0f} times as much as the rest.")

# %% [markdown]
# The moon, the hills of snow, even the place of the house stay: they come from the noise, and the noise is the same. That is a
# habit, no law: with "blue" this house moves.


# %%
def house(trace, picture=0):
    """Where the model looked at the fourth word, (128, 128), and its middle, from the left."""
    looked = trace.record.map(trace.words[picture][3].tokens, picture=picture, size=(128, 128))
    inside = (looked > looked.max() / 2).numpy()
    return inside, inside.nonzero()[1].mean()


blue = pipe.trace(prompt.replace("red", "blue"), seed=7, steps=10, sampler="ddim")
moved = house(blue)[1] - house(trace)[1]
print(f"The blue house stands {abs(moved):.0f} pixels further {'left' if moved < 0 else 'right'}.")
assert moved < -4

# %% [markdown]
# (`trace.show(blue)` puts the two runs side by side, step by step.)
#
# ### Other noise
#
# The other way round: the same words, and four seeds. What the sentence says, all pictures share; what it leaves open, the noise
# decides.

# %%
many = pipe.trace(prompt, seed=0, steps=10, sampler="ddim", count=4)
places = []
for k, drawn_k in enumerate(many.result.images):
    inside_k, middle = house(many, k)
    red, green, blue = grey(drawn_k)[inside_k].mean(0)
    assert red > 1.5 * max(green, blue), "a red house"
    places.append(middle)
assert max(places) - min(places) > 20, "the sentence says nothing of where"
labels = [f"seed {k}: at {middle:.0f}" for k, middle in enumerate(places)]
heading = f"Red houses all, at {min(places):.0f} to {max(places):.0f} of 128 pixels"
figures.pictures(many.result.images, labels, heading=heading, inches=1.2)

# %% [markdown]
# ### Where the time goes
#
# Each box by the clock, on the machine that made this page: the median of five times, ten times that for boxes 4 and 5.


# %%
def milliseconds(run):
    """The median of five times."""
    seconds = []
    for _ in range(5):
        begun = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - begun)
    return 1000 * float(np.median(seconds))


def step():
    x0 = (x - level.sigma * eps) / level.alpha
    return after.alpha * x0 + after.sigma * eps


x, eps, context = trace[0].x_before, trace[0].eps, pipe.encode(["", prompt])
ids, level, after = pipe.tokenizer(["", prompt]).ids, trace[0].level, trace[0].next
took = {
    "1 tokenizer": milliseconds(lambda: pipe.tokenizer(["", prompt])),
    "2 text encoder": milliseconds(lambda: pipe.text_encoder.context(ids)),
    "3 noise": milliseconds(lambda: ldm.Noise.from_seeds([7]).draw((4, 16, 16))),
    "4 UNet": 10 * milliseconds(lambda: pipe.unet(torch.cat([x, x]), level.t, context)),
    "5 sampler": 10 * milliseconds(step),
    "6 VAE decoder": milliseconds(lambda: pipe.decode(trace.result.x0)),
}

# %%
share = took["4 UNet"] / sum(took.values())
assert share > 0.5, "the UNet takes most of it"
fig, ax = figures.canvas(7.6, 2.6)
boxes = list(took)[::-1]
ax.barh(boxes, [took[each] for each in boxes], color=[VAE, STEP, UNET, NOISE, WORDS, WORDS])
for k, (spent, part) in enumerate((took[each], took[each] / sum(took.values())) for each in boxes):
    text = f"  {spent:.3g} ms, {100 * part:.1f} %"
    ax.text(spent, k, text, va="center", size=9, color=figures.INK)
ax.set(xlabel="milliseconds for one picture", xlim=(0, 1.35 * max(took.values())))
figures.title(fig, f"The UNet takes {100 * share:.0f} % of the time, in 10 runs with a batch of 2")
figures.show(fig, "Milliseconds of the six boxes: nearly all is the UNet's, then the decoder's")

# %% [markdown]
# So everybody who wants pictures sooner works on the UNet: fewer runs of it ([07](07_samplers.ipynb) is about that), or a
# cheaper one. With Stable Diffusion it is the same, only more so: its UNet has 860 million weights (the model's own page, 2022),
# and its usual run takes 50 steps.
#
# ### The whole road on a page
#
# The last figure of this section is for the wall. It is drawn from the trace: every shape and every number in it was read there.


# %%
poster(pipe, trace, took)

# %% [markdown]
# Follow it from the seed: noise goes into the UNet, together with the vectors of the sentence; what comes out, the noise it sees,
# goes to the sampler, which walks a small piece of the arc from noise to picture; and back, ten times. (At the first step already
# the seen noise has the shadow of a house in it.) The latent at the bottom right is the whole picture, in a few numbers:
# moon, snow and house can be made out. That is what *latent* diffusion means (Rombach et al. 2022): all the work is done on
# the small grid, and the decoder paints it out at the end.

# %%
fewer = trace.result.images[0].width ** 2 * 3 / trace.result.x0.numel()
assert fewer == 48
print(f"The latent has {fewer:.0f} times fewer numbers than the picture.")

# %% [markdown]#
# ## Break it
#
# Four faults that people really make, all of them in a single place of the loop, and each with a signature of its own.
#
# - **No scaling factor.** The decoder wants its own units: latents are divided by a constant of the VAE first (`pipe.decode` does
#   so). Left out, the picture is pale and greyish.
# - **Noise decoded**, because the loop was never run, or its result went into another variable: glass splinters.
# - **A stale sentence in the unconditional half**, here that of an earlier picture. What it names is driven out of everything, and
#   the colours burn.
# - **No guidance**, $\epsilon$ = `cond`. Nothing looks broken; the picture just doesn't do quite what it was told. Here the house is
#   small.

# %%
pure = ldm.Noise.from_seeds([7]).draw((4, 16, 16))
x0 = loop(["", prompt])
faults = {
    "right": pipe.vae.decode(x0),
    "no scaling factor": pipe.vae.reconstruct(x0),
    "noise decoded": pipe.vae.decode(pure),
    "a stale sentence": pipe.vae.decode(loop(["a small blue boat on sea at sunset", prompt])),
    "no guidance": pipe.vae.decode(loop(["", prompt], s=1)),
}


def signature(picture):
    """Contrast, jumps from pixel to pixel (both in grey levels), red pixels in %; (3, H, W)."""
    pixels = 127.5 * picture.clamp(-1, 1)
    red = pixels[0] - pixels[1:].amax(0) > 50
    return (
        pixels.std().item(),
        pixels.diff(dim=2).abs().mean().item(),
        100 * red.float().mean().item(),
    )


found = {name: signature(picture[0]) for name, picture in faults.items()}
for name, numbers in found.items():
    print("{:20} contrast {:5.1f}   jumps {:5.1f}   red {:5.1f} %".format(name, *numbers))
wrong = [name for name in faults if name != "right"]
heading = "Four faults, four signatures"
figures.pictures([faults[name][0] for name in wrong], wrong, heading=heading, inches=1.2)

# %%
contrast, jumps, red = found["right"]
assert found["no scaling factor"][0] < 0.7 * contrast, "pale"
assert found["noise decoded"][1] > 4 * jumps, "splinters"
assert found["a stale sentence"][0] > 1.2 * contrast, "burnt"
assert found["no guidance"][2] < 0.5 * red and 0.8 < found["no guidance"][0] / contrast < 1.2
unguided = pipe(prompt, seed=7, steps=10, sampler="ddim", guidance=1).images[0]
off = np.abs(grey(unguided) - grey(pipe.decode(loop(["", prompt], s=1))[0])).max()
assert off <= 2, "what pipe(guidance=1) does on purpose"
print("Each fault is told from the others by one number.")

# %% [markdown]
# ## Your turn
#
# A check tells you whether a function is right, and if it isn't, which mistake it looks like.
#
# ### Exercise 00.1: what each box hands on
# *Difficulty 1 of 5, importance 4 of 5, five minutes.* For `n` sentences, one picture of `height` × `width` pixels each, and no
# guidance: the shapes of what the six boxes hand on (ids, vectors, noise, the UNet's output, the sampler's, pictures), as a list
# of six tuples. The vectors are as long as our model's, and pictures are tensors, as the decoder gives them.


# %% tags=["exercise"]
def shapes(n, height, width):
    # BEGIN SOLUTION
    latent = (n, 4, height // 8, width // 8)
    return [(n, 77), (n, 77, 128), latent, latent, latent, (n, 3, height, width)]
    # END SOLUTION


ldm.check("00.1", shapes)

# %% [markdown]
# ### Exercise 00.2: how often is the UNet run?
# *Difficulty 2 of 5, importance 3 of 5, five minutes.* The time is the UNet's, so count its runs. DDIM and Euler ask it once a
# step. Heun asks a second time, at the level the step lands on; but if that is `sigma = 0`, where no noise is left to be
# seen, the step ends there (only the last step can: `last_sigma`). With a `guidance` of 1 or less the UNet is asked for `cond` alone.
# Above it for both halves, in one batch (`together`) or one after the other, which needs half the memory.


# %% tags=["exercise"]
def unet_runs(steps, sampler, last_sigma, guidance, together):
    """`sampler` is "ddim", "euler" or "heun"."""
    # BEGIN SOLUTION
    runs = 2 * steps if sampler == "heun" else steps
    if sampler == "heun" and last_sigma == 0:
        runs -= 1
    return runs if guidance <= 1 or together else 2 * runs
    # END SOLUTION


ldm.check("00.2", unet_runs)

# %% [markdown]
# ### Exercise 00.3: one step
# *Difficulty 1 of 5, importance 5 of 5, five minutes.* Equation (2): from `x` and `eps` at `level` to the latent at `after`. Both
# levels have `.t`, `.alpha` and `.sigma`.


# %% tags=["exercise"]
def ddim_step(x, eps, level, after):
    # BEGIN SOLUTION
    x0 = (x - level.sigma * eps) / level.alpha
    return after.alpha * x0 + after.sigma * eps
    # END SOLUTION


ldm.check("00.3", ddim_step)

# %% [markdown]
# ### Exercise 00.4: the whole loop
# *Difficulty 3 of 5, importance 5 of 5, ten minutes.* Without looking up: from `noise` to the last `x`. `unet(x, t)` gives the pair
# `(uncond, cond)`, `schedule` has `.levels` (one more than there are steps) and `.start_scale`, `s` is the scale of guidance. The
# check brings a toy for a UNet and a schedule that begins below the full noise.


# %% tags=["exercise"]
def draw(unet, noise, schedule, s):
    # BEGIN SOLUTION
    x = noise * schedule.start_scale
    for level, after in zip(schedule.levels, schedule.levels[1:]):
        uncond, cond = unet(x, level.t)
        eps = uncond + s * (cond - uncond)
        x0 = (x - level.sigma * eps) / level.alpha
        x = after.alpha * x0 + after.sigma * eps
    return x
    # END SOLUTION


ldm.check("00.4", draw)

# %% [markdown]
# ## The same on a real model
#
# The same strip and the same stepper, on Stable Diffusion 1.5: 64 × 64 latents, 512 × 512 pixels. (Without a graphics card, ten
# steps of it take minutes.)

# %% tags=["real-model"]
sd = real("sd15")
if sd is not None:
    its = sd.trace(
        "a photograph of a red house in the snow at night", seed=7, steps=10, sampler="ddim"
    )
    display(strip(its), its.show())

# %% [markdown]
# ## Where it lives in `ldm`
#
# | box | in ldm | in diffusers and transformers |
# |---|---|---|
# | 1 tokenizer | `ldm/text/tokenizer.py`, `Tokenizer` | `CLIPTokenizer` |
# | 2 text encoder | `ldm/text/clip.py`, `TextEncoder.context` | `CLIPTextModel` |
# | 3 noise | `ldm/noise.py`, `Noise` | `randn_tensor` |
# | 4 UNet, with guidance | `ldm/models/unet.py`, `UNet`; `ldm/guidance.py`, `classifier_free` | `UNet2DConditionModel`; a line in each pipeline |
# | 5 sampler | `ldm/samplers/`, 28 functions; `ldm/sampling.py`, the loop | `DDIMScheduler.step` and its kin |
# | 6 VAE decoder | `ldm/models/vae.py`, `VAE.decode` | `AutoencoderKL.decode` |
#
# The pipeline, here as there, only puts them together; `ldm.sampling.sample` is the loop of the Build section as a generator, one
# `Step` after the other. And this is box 5: equation (2), with `ancestral` for those who want fresh noise in it (`eta` > 0).

# %%
import inspect

from ldm.samplers.onestep import ddim

body = inspect.getsource(ddim).split('"""')[2]
print("def ddim(...):", body.rstrip())

# %% [markdown]
# **In short.** A sentence becomes vectors, a seed becomes noise; a UNet that reads the vectors says again and again what in the
# latent is noise, a sampler takes a little of it away each time, and a decoder paints the rest out. Next: [01, words into
# vectors](01_words.ipynb).
