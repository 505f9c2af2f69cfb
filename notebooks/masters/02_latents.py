# %% [markdown]
# # 02 · Pictures into latents
#
# **Why paint at 16x16, and where does 0.18215 come from?**
#
# About 20 minutes to read, half a minute to run. Before it: [00](00_one_picture.ipynb). You will have taken a VAE
# apart, measured what it loses, recomputed the factor that every latent is multiplied by, fitted the linear preview
# that shows a latent without decoding it, and broken all of it in ways that people really break it.

# %%
import copy
import inspect
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

import ldm
from ldm import scenes
from ldm.lab.real import real
from ldm.metrics.evaluation import held_out
from ldm.train.data import to_tensor
from ldm.train.vae import Recipe, latent_scale, psnr

pipe = ldm.load("scenes")
vae = pipe.vae
s = vae.config.scaling_factor
print(f"the VAE has {sum(p.numel() for p in vae.parameters()):,} parameters")


def tiny(image):
    """The other way to spend a thousand numbers: a picture of 18 x 18 pixels, enlarged again."""
    return image.resize((18, 18), Image.Resampling.LANCZOS).resize(image.size)


def there_and_back(pipe, images):
    """Pictures, themselves as 18 x 18 pixels, and rebuilt from their latents by the model's VAE."""
    size = (pipe.default_size,) * 2
    images = [image.resize(size, Image.Resampling.LANCZOS) for image in images]
    x = to_tensor(np.stack([np.asarray(image) for image in images]))
    with torch.no_grad():
        x0 = torch.cat([pipe.vae.encode(each) for each in x.to(pipe.device, pipe.dtype).split(1)])
    side = [f"{x[0].numel():,} numbers", "18×18×3 = 972", f"latent: {x0[0].numel():,}"]
    rows = [images, [tiny(image) for image in images], pipe.decode(x0)]
    return figures.pictures(rows, side=side, heading="A thousand numbers, two ways", inches=1.15)


some_seeds = [16, 83, 73, 233]
some = [Image.fromarray(scenes.render(scenes.sample(seed)).image) for seed in some_seeds]
there_and_back(pipe, some[:3])

# %% [markdown]
# The pictures in the last row went through 1,024 numbers each. The diffusion model never sees anything else: it paints
# 4 channels of 16x16, and the VAE's decoder makes 128x128 pixels of that.
#
# ## Predict
#
# Commit yourself before you go on (nothing checks this). By how many decibels is the last row nearer to the first than
# the middle one is? Three of the four channels follow the colours: what does the fourth do? And what happens to a
# picture if its latent is mirrored left to right before it is decoded?

# %%
my_guess = {"decibels": None, "the fourth channel": None, "a mirrored latent": None}

# %% [markdown]
# ## Derive
#
# The encoder doesn't answer with a latent but with a distribution of latents, one Gaussian for each of the 1,024
# numbers (Kingma & Welling 2013, section 3):
#
# $$q(z \mid x) = \mathcal N\big(\mu(x),\ \mathrm{diag}\,\sigma^2(x)\big). \tag{1}$$
#
# A random draw has no derivative. Written as a function of noise that depends on nothing, it has one (section 2.4):
#
# $$z = \mu + \sigma\,\varepsilon, \qquad \varepsilon \sim \mathcal N(0, 1). \tag{2}$$
#
# What keeps latents from drifting off is the divergence from a standard normal $p$. For one number, put (2) into both
# densities: $\log q(z) = -\log\sigma - \varepsilon^2/2 + c$ and $\log p(z) = -z^2/2 + c$. Under $q$ the mean of
# $\varepsilon^2$ is 1 and that of $z^2$ is $\mu^2 + \sigma^2$. The numbers are independent, so their divergences add up
# (appendix B):
#
# $$\mathrm{KL}(q \,\|\, p) = \mathbb E_q\big[\log q - \log p\big]
# = \tfrac12 \sum \big(\mu^2 + \sigma^2 - 1 - \log \sigma^2\big). \tag{3}$$
#
# The noise schedule of notebook [03](03_noise.ipynb) was made for data of variance 1: in $x = \alpha x_0 + \sigma_t
# \varepsilon$ the signal-to-noise ratio is
#
# $$\mathrm{SNR} = \frac{\alpha^2\, \mathrm{Var}(x_0)}{\sigma_t^2}. \tag{4}$$
#
# Raw latents of an arbitrary VAE have an arbitrary variance. So they are divided by their standard deviation, measured
# once over all numbers of many pictures (Rombach et al. 2022, appendix G); newer models subtract a mean $m$ before:
#
# $$x_0 = (z - m) \cdot s, \qquad s = 1 / \mathrm{std}(z). \tag{5}$$
#
# That $s$ is the "magic number". A VAE's file calls it `scaling_factor`, and $m$ `shift_factor`.
#
# ## Build
#
# The encoder from its parts, and a draw. The network gives the *logarithm* of the variance, which may be any number; a
# variance could not be negative.


# %%
@torch.no_grad()
def posterior(x):
    """(1) for pictures (B, 3, 128, 128) in [-1, 1]: mean and log-variance of raw latents."""
    moments = vae.quant_conv(vae.encoder(x))  # (B, 8, 16, 16)
    mean, log_variance = moments[:, :4], moments[:, 4:].clamp(-30, 20)
    return mean, log_variance


x = to_tensor(np.stack([np.asarray(image) for image in some]))  # (4, 3, 128, 128)
mean, log_variance = posterior(x)
eps = torch.randn(mean.shape, generator=torch.Generator().manual_seed(0))
z = mean + (log_variance / 2).exp() * eps  # (2)

with torch.no_grad():
    theirs = vae.posterior(x)
    assert torch.equal(mean, theirs.mean) and torch.equal(log_variance, theirs.log_variance)
    assert torch.equal(z, theirs.sample(eps)) and torch.equal(z * s, vae.encode(x, eps))  # (5)
    assert torch.equal(vae.encode(x), mean * s), "without noise: the mean"
print(f"{tuple(x.shape)} -> {tuple(z.shape)}, bit for bit what ldm's VAE does; its s is {s}.")

# %% [markdown]
# Equation (3) we check against its own definition: draw from $q$, average $\log q - \log p$. (You will write the closed
# form in exercise 02.2.)

# %%
normal, draws = torch.distributions.Normal, 200
q = normal(mean, (log_variance / 2).exp())
generator = torch.Generator().manual_seed(1)
samples = [q.mean + q.stddev * torch.randn(mean.shape, generator=generator) for _ in range(draws)]
terms = torch.stack([(q.log_prob(z) - normal(0, 1).log_prob(z)).sum((1, 2, 3)) for z in samples])
error = terms.std(0) / draws**0.5  # of the average, per picture
with torch.no_grad():
    closed = vae.posterior(x).kl()  # (4,)
for k in range(3):
    drawn = f"{terms.mean(0)[k]:.1f} ± {error[k]:.1f}"
    print(f"picture {k}: by draws {drawn} nats, by (3) {closed[k]:.1f}")
assert ((terms.mean(0) - closed).abs() < 5 * error).all()

# %% [markdown]
# And why (2) at all, when one can also differentiate a density? Because of the noise. Both ways estimate the same
# gradient, here that of $\mathbb E\,(z-1)^2$ with respect to $\mu$, which is $2(\mu - 1)$:

# %%
mu, sigma, e = 0.5, 0.2, torch.randn(100_000, generator=torch.Generator().manual_seed(2))
draw = mu + sigma * e
through_the_draw = 2 * (draw - 1)  # d/dmu of f(mu + sigma e)
through_the_density = (draw - 1) ** 2 * (draw - mu) / sigma**2  # f times d/dmu log q: "REINFORCE"
for name, g in {"(2)": through_the_draw, "density": through_the_density}.items():
    print(f"{name:8} {g.mean():+.3f}, a single draw scatters by {g.std():.2f}")
more = (through_the_density.var() / through_the_draw.var()).item()
print(f"true     {2 * (mu - 1):+.3f}. The density needs {more:.0f} times as many draws.")
assert more > 10 and abs(through_the_density.mean() - 2 * (mu - 1)) < 0.05

# %% [markdown]
# ## Run
#
# ### Count it
#
# "64 times smaller" is what one reads. A latent has a 64th of a picture's *positions*. But a pixel is 3 numbers and a
# position of the latent is 4, so in numbers it is 48 times, for this model and for Stable Diffusion alike.

# %%
ours, theirs = ("scenes", 128, vae.latent_shape(128, 128)), ("SD 1.5", 512, (4, 64, 64))
for name, pixels, latent in (ours, theirs):
    numbers, kept, places = 3 * pixels**2, int(np.prod(latent)), int(np.prod(latent[1:]))
    print(f"{name}: {pixels}×{pixels} pixels -> {latent}")
    print(f"    positions  {pixels**2:7,} / {places:6,} = {pixels**2 / places:.0f} : 1")
    print(f"    numbers    {numbers:7,} / {kept:6,} = {numbers / kept:.0f} : 1")
    print(f"    bytes      {numbers:7,} / {2 * kept:6,} = {numbers / (2 * kept):.0f} : 1 (float16)")
    assert numbers == 48 * kept and pixels**2 == 64 * places

# %% [markdown]
# So why 16x16? For the *work*, and there it is positions that count. PyTorch can count operations without doing them
# (the `meta` device has shapes and no numbers): one run of our UNet on 16x16, and of the same UNet on 128x128, where it
# would paint pixels. Convolutions grow with the number of positions, self-attention with its square.

# %%
from torch.utils.flop_counter import FlopCounterMode

shapes_only = copy.deepcopy(pipe.unet).to("meta")


def operations(side):
    x, context = (torch.zeros(shape, device="meta") for shape in ((1, 4, side, side), (1, 77, 128)))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        shapes_only(x, torch.tensor(500, device="meta"), context)
    return counter.get_total_flops()


work = {side: operations(side) for side in (16, 32, 64, 128)}
for side, count in work.items():
    print(f"{side:3}×{side:<3} {count / 1e9:6.1f} billion operations: {count / work[16]:3.0f} ×")
assert work[128] > 200 * work[16]

# %% [markdown]
# ### Four channels
#
# One scene's latent, and what becomes of pictures when one channel is taken away (set to its average over many
# pictures). For those averages, and for the factor further down, we encode the first 256 pictures that the VAE was
# trained on.

# %%
first = np.stack([scenes.render(scenes.sample(seed)).image for seed in range(256)])
with torch.no_grad():
    parts = [vae.posterior(to_tensor(rows)) for rows in np.split(first, 32)]
means = torch.cat([part.mean for part in parts])  # (256, 4, 16, 16)
log_variances = torch.cat([part.log_variance for part in parts])


@torch.no_grad()
def rebuilt(z):
    """Raw latents -> pictures (B, 3, 128, 128) in [-1, 1], eight at a time."""
    return torch.cat([vae.reconstruct(part) for part in z.split(8)]).clamp(-1, 1)


figures.channels(means[83], "A green pixel car: four channels of 16×16 raw numbers")

# %%
whole = rebuilt(means[some_seeds])
rows, cells, fine = [whole], [], []
for channel in range(4):
    without = means[some_seeds].clone()
    without[:, channel] = means[:, channel].mean()
    rows.append(rebuilt(without))
    cells.append(psnr(F.avg_pool2d(rows[-1], 8), F.avg_pool2d(whole, 8)))  # 16 x 16 mean colours
    fine.append(psnr(rows[-1], whole))
    print(f"without channel {channel}: {fine[-1]:.1f} dB from the whole picture, "
          f"{cells[-1]:.1f} dB in its cells' mean colours")  # fmt: skip
assert cells[2] > max(cells[0], cells[1], cells[3]) + 8, "channel 2 carries no colour"
assert fine[2] < cells[2] - 5, "but it carries something"
labels = ["all four", *(f"without {channel}" for channel in range(4))]
figures.pictures([row[1] for row in rows], labels, inches=1.2,
                 heading="Three channels hold colour, channel 2 the drawing")  # fmt: skip

# %% [markdown]
# Look at the car's windows and outline: without channel 2 the colours stay and the drawing goes. Nobody told the VAE to
# divide the work like that, and another training would share it out otherwise: which channel does what is an accident,
# that a position's four numbers hold a colour *and* some structure is not.
#
# ### What is lost
#
# Now 64 scenes whose combinations of thing, colour and place no training picture held. As a second measure of what
# 1,024 numbers can do, the best *linear* code: cut the picture into the same 8x8 cells, and keep of each cell's 192
# numbers the 4 principal components, fitted on the 256 pictures. Same cells, same 48 : 1, no network.

# %%
held = [scenes.render(scene) for scene in held_out(64)]
x = to_tensor(np.stack([picture.image for picture in held]))  # (64, 3, 128, 128)
with torch.no_grad():
    mean = torch.cat([vae.posterior(part).mean for part in x.split(8)])
y = rebuilt(mean)


def in_cells(x):
    return F.unfold(x, 8, stride=8).transpose(1, 2)  # (B, 256, 192)


patches = in_cells(to_tensor(first)).flatten(0, 1)
middle = patches.mean(0)
_, _, axes = torch.linalg.svd(torch.cov(patches.T))  # the principal directions, (192, 192)


def linear_code(x, kept=4):
    code = (in_cells(x) - middle) @ axes[:kept].T  # (B, 256, kept)
    return F.fold((code @ axes[:kept] + middle).transpose(1, 2), 128, 8, stride=8).clamp(-1, 1)


tinies = to_tensor(np.stack([np.asarray(tiny(Image.fromarray(one.image))) for one in held]))
ways = {"VAE, 1,024 numbers": y, "linear code, 1,024": linear_code(x), "18×18 pixels, 972": tinies}
decibels = {name: psnr(way, x) for name, way in ways.items()}
left_out = ((in_cells(x) - middle) @ axes.T).square().mean((0, 1))  # of each component (192,)
needs = next(n for n in range(192) if 10 * torch.log10(768 / left_out[n:].sum()) > psnr(y, x))
for name, value in decibels.items():
    print(f"{name:20} {value:.1f} dB")
print(f"The linear code is as good with {needs} numbers a cell: {192 / needs:.1f} : 1.")
assert decibels["VAE, 1,024 numbers"] > decibels["linear code, 1,024"] + 6 and needs > 16


# %%
def of_style(style):
    return [k for k, picture in enumerate(held) if picture.scene.style == style]


styles = {style: of_style(style) for style in scenes.STYLES}
things = torch.from_numpy(np.stack([picture.masks.any(0) for picture in held]))  # (64, 128, 128)
outlines = torch.from_numpy(np.stack([picture.edges for picture in held]))[:, None].float()
outlines = F.max_pool2d(outlines, 5, 1, 2)[:, 0] > 0  # two pixels to either side
groups = [*styles, "inside things", "near outlines"]
fig, ax = figures.canvas(7.0, 2.6)
for k, (name, way) in enumerate(ways.items()):
    values = [psnr(way[rows], x[rows]) for rows in styles.values()]
    values += [psnr(way, x, mask) for mask in (things, outlines)]
    ax.bar(np.arange(6) + 0.27 * (k - 1), values, 0.25, label=name, color=figures.COLORS[k])
ax.set_xticks(range(6), groups)
ax.set(ylabel="PSNR, dB", ylim=(0, 42))
ax.legend(frameon=False, fontsize=8, ncols=3, loc="upper right")
gain = decibels["VAE, 1,024 numbers"] - decibels["linear code, 1,024"]
assert 7 < gain < 9.5
figures.title(fig, f"48 : 1 both: the network is {gain:.0f} dB better than the best linear code")
figures.show(fig, "Bars: PSNR of three codes by style, inside things, near outlines: the VAE leads")

# %%
error = (y - x).square().mean(1)  # (64, 128, 128)
inside, near = psnr(y, x, things), psnr(y, x, outlines)
share = (error[outlines].sum() / error.sum()).item()
print(f"everywhere {psnr(y, x):.1f} dB, inside things {inside:.1f} dB, near outlines {near:.1f} dB")
part = outlines.float().mean().item()
print(f"{100 * part:.0f} % of the pixels are near outlines; "
      f"they hold {100 * share:.0f} % of the squared error")  # fmt: skip
assert inside < near < psnr(y, x) - 3 and share > 2 * part
order = [styles[style][0] for style in ("plain", "pencil sketch")]
wrong = (4 * (y - x).abs() - 1).clamp(-1, 1)  # four times enlarged, black where nothing is lost
row = [each[k] for k in order for each in (x, y, wrong)]
figures.pictures(row, ["true", "rebuilt", "error × 4"] * 2, inches=1.05,
                 heading=f"{100 * share:.0f} % of the error lies at outlines")  # fmt: skip

# %% [markdown]
# This is a ceiling. The UNet can paint no outline that the decoder can't draw.
#
# ### Mean or sample?
#
# The encoder gives a distribution. How wide is it?

# %%
deviations = (log_variances / 2).exp()
spread, width = means.std().item(), deviations.mean().item()
sixteen, generator = to_tensor(first[:16]), torch.Generator().manual_seed(4)
noise = torch.randn((16, 4, 16, 16), generator=generator)
by_mean = psnr(rebuilt(means[:16]), sixteen)
by_sample = psnr(rebuilt(means[:16] + deviations[:16] * noise), sixteen)
print(f"latents spread by {spread:.3f}, a posterior by {width:.4f}: {spread / width:.0f} to 1")
print(f"rebuilt from the mean {by_mean:.2f} dB, from a sample {by_sample:.2f} dB")
assert spread / width > 50 and abs(by_mean - by_sample) < 0.1

# %%
fig, (left, right) = figures.canvas(7.0, 2.4, columns=2)
grid = np.linspace(-8, 8, 65)
for channel in range(4):
    left.hist(means[:, channel].flatten().numpy(), grid, density=True, histtype="step",
              label=f"channel {channel}", color=figures.COLORS[channel])  # fmt: skip
bell = np.exp(-(grid**2) / 2) / (2 * np.pi) ** 0.5
left.plot(grid, bell, "k--", linewidth=1, label="standard normal")
left.set(xlabel="raw latent", ylabel="density")
left.legend(frameon=False, fontsize=7)
right.hist(deviations.flatten().numpy(), np.linspace(0, 0.05, 60), color=figures.COLORS[0])
right.set(xlabel="standard deviation of a posterior", yticks=[])
figures.title(fig, f"Latents are {spread:.1f} wide and known to ± {width:.3f}: hardly any noise")
figures.show(fig, "Histograms: channels beside a standard normal, and the posteriors' deviations")

# %%
nats = torch.cat([part.kl() for part in parts])  # (3), picture by picture
weight, l1 = Recipe().kl_weight, (y - x).abs().mean().item()
print(f"KL: {nats.mean():.0f} nats a picture; in the loss times {weight:g}, "
      f"{weight * nats.mean():.4f}, beside an L1 error of {l1:.3f}")  # fmt: skip
assert nats.min() > 2000 and weight * nats.mean() < l1 / 2

# %% [markdown]
# The V of this VAE is nearly a formality. Stable Diffusion's was trained with a like weight, about $10^{-6}$ (Rombach
# et al. 2022, appendix G). With so little of it the latents don't become standard normal, and posteriors stay narrow.
# Why keep it, then? Without any penalty nothing would bound the latents' size: it is there against latent spaces of
# arbitrarily high variance (section 3.1). To the eye, mean and sample are the same; training draws samples,
# `vae.encode(image)` gives the mean.
#
# ### Where 0.18215 comes from
#
# Equation (5) is the whole secret: one over a standard deviation.

# %%
draw = means + deviations * torch.randn(means.shape, generator=torch.Generator().manual_seed(0))
mine = 1 / draw.std().item()
print(f"1 / std over {draw.numel():,} numbers of {len(draw)} pictures: {mine:.5f}")
print(f"in vae/config.json: {s:.5f}, so ours is {100 * (mine / s - 1):+.2f} % off")
assert abs(mine / s - 1) < 0.02 and abs(vae.encode(to_tensor(first[:32])).std() - 1) < 0.05


class Rows:  # what ldm.train.vae calls for the same
    def tensor(self, rows):
        return to_tensor(first[rows])


generator = torch.Generator().manual_seed(0)
ours = means[:32] + deviations[:32] * torch.randn((32, 4, 16, 16), generator=generator)
theirs = latent_scale(vae, Rows(), count=32)
assert inspect.signature(latent_scale).parameters["count"].default == 1024
assert abs(theirs * ours.std().item() - 1) < 1e-4, "equation (5) is what the training did"

# %% [markdown]
# Near, and not equal. Why? It is a statistic of *which* pictures and *how many*. The number in the file was measured
# over 1,024 pictures (the default of `latent_scale`), ours over the first 256 of them.
#
# How many pictures does it take? We draw batches of every size from our 256.

# %%
rng, sizes = np.random.default_rng(0), (1, 2, 4, 8, 16, 32, 64)
second = draw.square().mean((1, 2, 3)).double().numpy()  # per picture: mean square, and mean
level = draw.mean((1, 2, 3)).double().numpy()
found = {}
for n in sizes:
    picks = np.array([rng.choice(256, n, replace=False) for _ in range(60)])
    found[n] = (second[picks].mean(1) - level[picks].mean(1) ** 2) ** -0.5
scatter = {n: 100 * found[n].std() / s for n in sizes}
fig, ax = figures.canvas(7.0, 2.6)
for n in sizes:
    aside = n * np.exp(0.12 * rng.standard_normal(60))  # so that dots don't hide one another
    ax.plot(aside, found[n], ".", markersize=3, alpha=0.5, color=figures.COLORS[0])
ax.plot(256, mine, "o", color=figures.COLORS[1], label=f"all 256: {mine:.4f}")
ax.axhline(s, color="k", linewidth=1, linestyle="--", label=f"in the file: {s}")
ax.set(xscale="log", xlabel="pictures in the batch", ylabel="1 / std", ylim=(0.28, 0.62))
ax.set_xticks([*sizes, 256], [str(n) for n in (*sizes, 256)])
ax.minorticks_off()
ax.legend(frameon=False, fontsize=8)
known = f"4 pictures know it to ± {scatter[4]:.0f} %, 64 pictures to ± {scatter[64]:.1f} %"
figures.title(fig, f"How many pictures? {known}")
assert scatter[4] > 3 and scatter[64] < 2.5
figures.show(fig, "Dots: the factor from batches of 1 to 64 pictures, closing in on the stored one")

# %%
by_style = {}
for style in scenes.STYLES:
    rows = [seed for seed in range(256) if scenes.sample(seed).style == style]
    by_style[style] = 1 / draw[rows].std().item()
    print(f"{style:14} {by_style[style]:.3f}  ({len(rows)} pictures)")
assert max(by_style.values()) > 1.15 * min(by_style.values()), "which pictures matters most"
print()
published = {
    "this model": (s, 0),
    "Stable Diffusion 1, 2": (0.18215, 0),
    "SDXL": (0.13025, 0),
    "FLUX.1": (0.3611, 0.1159),
}
for name, (factor, shift) in published.items():
    print(f"{name:22} factor {factor:<8} shift {shift:<7} 1 / factor {1 / factor:.2f}")

# %% [markdown]
# The last three are published numbers: Stable Diffusion's stands in CompVis' `v1-inference.yaml` (`scale_factor`),
# SDXL's in Stability's `sd_xl_base.yaml`, FLUX's two in Black Forest Labs' `util.py`. CompVis' training code, with the
# option `scale_by_std`, takes 1 over the standard deviation of *the first batch* and then keeps it; the figure above
# shows how many of five digits such a number deserves. None of them is a constant of nature: each belongs to its VAE,
# and to the pictures that it was measured on. A wrong digit does no harm as long as training and drawing agree on it.
#
# And where is 0.18215 in `ldm`? Where a VAE's configuration is defined, as the default of diffusers' files that leave
# it out, and nowhere else:

# %%
from pathlib import Path

from ldm.models.vae import VAE, Gaussian, VAEConfig

package = Path(ldm.__file__).parent
holders = [path for path in package.rglob("*.py") if "0.18215" in path.read_text(encoding="utf-8")]
holders = [path.relative_to(package).as_posix() for path in holders]
holders = [name for name in holders if not name.startswith("lab/")]  # exercises may speak of it
print(holders, "VAEConfig().scaling_factor =", VAEConfig().scaling_factor)
assert holders == ["models/vae.py"] and VAEConfig().scaling_factor == 0.18215

# %% [markdown]
# ### A picture of a latent without a decoder
#
# Three channels follow the colours, so a matrix might do for a preview: colour = (4 numbers and a 1) · $W$, fitted by
# least squares to the mean colours of the cells. On the 256 pictures fitted, on the 64 others tried.


# %%
def with_one(x0):
    rows = x0.movedim(1, -1).flatten(0, 2)  # (B*16*16, 4): channels last, then flat
    return torch.cat([rows, torch.ones(len(rows), 1)], 1)


def colours(x):
    return F.avg_pool2d(x, 8).movedim(1, -1).flatten(0, 2)  # (B*16*16, 3)


def r2(W, x0, x, use=slice(None)):
    left = (colours(x) - with_one(x0)[:, use] @ W).square().sum()
    return 1 - (left / (colours(x) - colours(x).mean(0)).square().sum()).item()


W = torch.linalg.lstsq(with_one(s * means), colours(to_tensor(first))).solution  # (5, 3)
blind = [0, 1, 3, 4]  # without channel 2
W3 = torch.linalg.lstsq(with_one(s * means)[:, blind], colours(to_tensor(first))).solution
print(np.array2string(W.numpy(), precision=2, suppress_small=True))
fit, fit3 = r2(W, s * mean, x), r2(W3, s * mean, x, blind)
print(f"R² on held-out pictures: {fit:.3f}; without channel 2: {fit3:.3f}")
assert fit > 0.85 and fit - fit3 < 0.02
with FlopCounterMode(display=False) as counter, torch.no_grad():
    vae.decode(torch.zeros(1, 4, 16, 16))
decode, linear = counter.get_total_flops(), 2 * W.numel() * 256
print(f"operations: a decode {decode / 1e9:.1f} billion, the preview {linear:,}")
assert decode > 1e9 > 1e4 > linear

# %%
preview = (with_one(s * mean[order]) @ W).view(-1, 16, 16, 3).movedim(-1, 1)  # (2, 3, 16, 16)
preview = preview.repeat_interleave(8, 2).repeat_interleave(8, 3)
row = [each for pair in zip(y[order], preview, strict=True) for each in pair]
figures.pictures(row, ["decoded", "preview"] * 2, inches=1.05,
                 heading=f"Fifteen numbers explain {100 * fit:.0f} % of the colours")  # fmt: skip

# %% [markdown]
# A decode takes billions of operations, this some thousands. Every program that shows a picture growing
# does it like this; `trace.preview` fits its own $W$ to each run. What it can't show is what channel 2 holds: outlines.
#
# ### Is a latent a small picture?
#
# It looks like one. Test it: move it by four positions (32 pixels) and it decodes to a moved picture. Now mirror it.

# %%
latents = means[some_seeds]
straight = rebuilt(latents)
moved, mirrored = rebuilt(latents.roll(4, -1)), rebuilt(latents.flip(-1))
shift_db, mirror_db = psnr(moved, straight.roll(32, -1)), psnr(mirrored, straight.flip(-1))
print(f"decode(moved latent) beside moved picture: {shift_db:.1f} dB; mirrored: {mirror_db:.1f} dB")
assert shift_db > mirror_db + 8
row = [each[k] for k in (2, 0) for each in (straight, moved, mirrored)]
figures.pictures(row, ["decoded", "latent moved", "mirrored"] * 2, inches=1.1,
                 heading="A latent can be moved, not mirrored")  # fmt: skip

# %% [markdown]
# Inside each cell the code has a direction: "the outline runs from here to there". Moving cells keeps it, mirroring
# them does not. Whoever caches latents for training and flips *them* instead of the pictures teaches a model to draw
# broken pictures.
#
# Half-way between two latents, then? Cross-fading pictures gives a double exposure. Do latents give a morph?

# %%
a, b = 0, 3  # the tree at sunset, the balloon over snow
fade = straight[a].lerp(straight[b], 0.5)[None]
between = rebuilt(latents[a].lerp(latents[b], 0.5)[None])
apart, alike = psnr(straight[a][None], straight[b][None]), psnr(between, fade)
print(f"the ends are {apart:.1f} dB from each other, the two ways to blend them {alike:.1f} dB")
assert alike > apart + 10

# %% [markdown]
# A double exposure again (it stands in the figure below). Arithmetic works better, for the same dull reason: positions
# stay positions. The blue house by day, minus the red one, plus the red one at night.


# %%
def house(color, time):
    scene = scenes.sample(5, "any", n=1, kind="house", style="plain", time=time, ground="grass")
    thing = replace(scene.things[0], color=color, size="large", x=64.0)
    return to_tensor(scenes.render(replace(scene, things=(thing,))).image[None])


terms = [house("blue", "day"), house("red", "day"), house("red", "night"), house("blue", "night")]
with torch.no_grad():
    blue, red, night, wanted = (vae.posterior(each).mean for each in terms)
by_latents, best = rebuilt(blue - red + night), rebuilt(wanted)
by_pixels = (terms[0] - terms[1] + terms[2]).clamp(-1, 1)
for name, picture in {"latents": by_latents, "pixels": by_pixels, "true, rebuilt": best}.items():
    print(f"{name:14} {psnr(picture, terms[3]):.1f} dB from the true blue house at night")
assert psnr(by_latents, terms[3]) > psnr(terms[2], terms[3]) + 6
assert psnr(by_pixels, terms[3]) > psnr(by_latents, terms[3]), "pixels can do it as well"
labels = ["blend of pixels", "of latents", "sum of pixels", "of latents", "true"]
row = [fade[0], between[0], by_pixels[0], by_latents[0], terms[3][0]]
figures.pictures(row, labels, heading="What latents can do here, pixels can", inches=1.2)

# %% [markdown]
# A VAE's latent knows colours and outlines of cells. It doesn't know what a house is: that knowledge, if anywhere, is
# in the UNet and in the words.
#
# ## Break it
#
# ### Forget the factor
#
# Four ways to get (5) wrong, on the road picture → latent → noise (image-to-image, strength 0.6) → UNet → decoder. `k`
# multiplies the raw latent on the way in, `d` divides on the way out.

# %%
six = [*some_seeds, 3, 49]
captions = [scenes.caption(scenes.sample(seed), seed) for seed in six]
given, raw = to_tensor(first[six]), means[six]
faults = {  # name: (k, d)
    "right": (s, s),
    "only decoding forgets": (s, 1.0),
    "only encoding forgets": (1.0, s),
    "nobody multiplies": (1.0, 1.0),
    "0.18215, copied": (0.18215, 0.18215),
}
drawn = {
    k: pipe(captions, image=k * raw, strength=0.6, steps=12, seed=1).x0 for k in (s, 1.0, 0.18215)
}
pictures = {name: rebuilt(drawn[k] / d) for name, (k, d) in faults.items()}

# %%
spread_in, trip, contrast, nearness = {}, {}, {}, {}
print("                        spread     without UNet:   with it:    with it: dB")
print("                        the UNet   round trip,     contrast    from the")
print("                        is given   dB              kept        picture given")
for name, (k, d) in faults.items():
    spread_in[name] = k * means.std().item()
    trip[name] = psnr(rebuilt(k * raw[:2] / d), given[:2])
    contrast[name] = (pictures[name].std() / given.std()).item()
    nearness[name] = psnr(pictures[name], given)
    row = f"{spread_in[name]:7.2f} {trip[name]:13.1f} {contrast[name]:14.2f} {nearness[name]:14.1f}"
    print(f"{name:22} {row}")

# %%
labels = ["given", "right", "only decoding\nforgets", "only encoding\nforgets"]
labels += ["nobody\nmultiplies", "0.18215,\ncopied"]
columns = [given, *pictures.values()]
figures.pictures([column[2] for column in columns], labels, inches=1.1,
                 heading="One factor, four ways to get it wrong")  # fmt: skip

# %% [markdown]
# Each has its signature. Forgotten in decoding, everything is grey. A factor too small, as when a constant is copied
# from another model, gives haloes and burnt colours. The two that matter are harder to see. *Nobody multiplies* passes
# every round-trip test: in and out cancel, and only the UNet is handed latents of the wrong size. And *only encoding
# forgets* looks like an improvement: its pictures are nearer to those given than the right ones are, because "strength
# 0.6" has quietly become something less.

# %%
assert contrast["only decoding forgets"] < 0.75 * contrast["right"], "grey"
assert contrast["0.18215, copied"] > 1.1 * contrast["right"], "burnt"
assert abs(trip["nobody multiplies"] - trip["right"]) < 0.01, "no round trip finds it"
assert trip["right"] - trip["only decoding forgets"] > 5
assert nearness["only encoding forgets"] > nearness["right"] + 0.3, "like an improvement"
assert abs(spread_in["right"] - 1) < 0.03 and spread_in["nobody multiplies"] > 2

# %% [markdown]
# Equation (4) says what it has become. Raw latents have the variance $1/s^2$, so at every timestep the signal-to-noise
# ratio is $1/s^2$ times what the UNet was trained for at that timestep, and its prediction is wrong accordingly.

# %%
from ldm.schedules import alpha_bars

bars = alpha_bars(pipe.scheduler).double()  # alpha^2 at each of the 1,000 timesteps
snr = bars / (1 - bars)
same = int((snr / s**2 - snr[500]).abs().argmin())
scalings = {"scaled by s": s, "raw": 1.0, "by 0.18215": 0.18215}
times = (100, 200, 300, 400, 500, 700, 900)
with torch.no_grad():
    context = pipe.text_encoder.context(pipe.tokenizer(captions).ids)  # (6, 77, 128)
noise = torch.randn((6, 4, 16, 16), generator=torch.Generator().manual_seed(3))
wrong = {}
for name, k in scalings.items():
    for t in times:
        alpha, sigma = bars[t].sqrt().item(), (1 - bars[t]).sqrt().item()
        with torch.no_grad():
            said = pipe.unet(alpha * k * raw + sigma * noise, t, context)
        wrong[name, t] = (said - noise).square().mean().item()
print(f"raw latents have {1 / s**2:.2f} times the SNR: what t = 500 should be comes at t = {same}")
print(f"SNR at the last timestep: {snr[-1]:.4f} scaled, {snr[-1] / s**2:.4f} raw")
assert 720 < same < 760

# %%
fig, (left, right) = figures.canvas(7.0, 2.6, columns=2)
for name, k in scalings.items():
    left.plot(snr.numpy() * (k / s) ** 2, label=name)
    right.plot(times, [wrong[name, t] for t in times], "o-", markersize=4, label=name)
left.plot([500, same], [snr[500]] * 2, "k:", linewidth=1)
left.annotate(f"500 moves to {same}", (same, snr[500]), (530, 20), fontsize=8,
              arrowprops={"arrowstyle": "-", "linewidth": 0.6})  # fmt: skip
left.set(yscale="log", xlabel="timestep", ylabel="signal-to-noise ratio", ylim=(1e-4, 1e4))
right.set(yscale="log", xlabel="timestep", ylabel="squared error of the noise")
right.legend(frameon=False, fontsize=8)
ratio = wrong["raw", 200] / wrong["scaled by s", 200]
figures.title(fig, f"Without the factor the UNet errs {ratio:.0f} times as much at t = 200")
assert ratio > 8 and all(wrong["scaled by s", t] < wrong["by 0.18215", t] for t in times[:5])
figures.show(fig, "SNR over timesteps for three scalings; the UNet's error, least for the right")

# %% [markdown]
# ### Wrong before the VAE
#
# Two more faults that people really make, with signatures of their own: pictures in [0, 1] instead of [-1, 1], and the
# halves of the encoder's output taken in the wrong order. And one that nobody can see: the variance in (2) in place of
# its root.

# %%
given, raw, lv = given[:3], raw[:3], log_variances[six[:3]]
noise = torch.randn((3, 4, 16, 16), generator=torch.Generator().manual_seed(5))
with torch.no_grad():
    in_01 = vae.posterior(given / 2 + 0.5).mean
codes = {
    "right": raw + (lv / 2).exp() * noise,
    "pictures in [0, 1]": in_01,
    "halves swapped": lv,
    "variance for σ": raw + lv.exp() * noise,
}
seen = {name: rebuilt(code) for name, code in codes.items()}
for name, picture in seen.items():
    print(f"{name:20} {psnr(picture, given):5.1f} dB, darkest value {picture.quantile(0.01):+.2f}, "
          f"pictures differ by {picture.std(0).mean():.2f}")  # fmt: skip
assert seen["pictures in [0, 1]"].quantile(0.01) > given.quantile(0.01) + 0.5, "no blacks"
assert seen["halves swapped"].std(0).mean() < 0.2 * given.std(0).mean(), "always the same picture"
assert abs(psnr(seen["variance for σ"], given) - psnr(seen["right"], given)) < 0.1, "invisible"
figures.pictures([column[2] for column in seen.values()], list(seen), inches=1.25,
                 heading="Washed out; one colour for all; nothing to see")  # fmt: skip

# %% [markdown]
# The last column is the dangerous one: with posteriors this narrow no picture shows it. Only a test of numbers does;
# exercise 02.3 is one.
#
# ### Decode noise
#
# A VAE is called a generative model: draw from the prior, decode. Try it, with noise of the right spread, and with a
# true latent whose positions are shuffled.

# %%
generator = torch.Generator().manual_seed(6)
pure = torch.randn((3, 4, 16, 16), generator=generator)
shuffled = raw.flatten(2)[:, :, torch.randperm(256, generator=generator)].view(raw.shape)


def neighbours(z):
    """Correlation of a position with the one to its right, within pictures and channels."""
    z = z - z.mean((2, 3), keepdim=True)
    return (z[..., :-1] * z[..., 1:]).mean().item() / z.square().mean().item()


rows = {"N(0, 1)": pure, "N(0, 1) / s": pure / s, "shuffled": shuffled, "true": raw}
for name, code in rows.items():
    print(f"{name:12} std {code.std():.2f}, neighbours correlate {neighbours(code):+.2f}")
assert abs(neighbours(pure)) < 0.1 and abs(neighbours(shuffled)) < 0.1 and neighbours(raw) > 0.3
figures.pictures([rebuilt(code[:1])[0] for code in rows.values()], list(rows), inches=1.1,
                 heading="Noise decodes to stained glass")  # fmt: skip

# %% [markdown]
# The spread can be right to the last digit and there is still no picture: the *arrangement* is what is missing, and to
# learn it is the diffusion model's whole work. (The KL term that would make the prior an honest one was given a weight
# of a millionth.)
#
# ### Once more, and once more
#
# Encode, decode, encode, decode. Every edit in latents that goes through pixels pays this toll.

# %%
now, trips, kept = given[:2], [], [given[:2]]
for trip in range(1, 17):
    with torch.no_grad():
        now = rebuilt(vae.posterior(now).mean)
    trips.append(psnr(now, given[:2]))
    if trip in (1, 4, 8, 16):
        kept.append(now)
print(" ".join(f"{value:.1f}" for value in trips), "dB")
assert all(b < a for a, b in zip(trips, trips[1:])) and trips[0] - trips[15] > 6
said = f"{trips[0]:.0f} dB after one round trip, {trips[15]:.0f} dB after sixteen"
figures.pictures([each[0] for each in kept], ["given", "1", "4", "8", "16 trips"], inches=1.1,
                 heading=said)  # fmt: skip

# %% [markdown]
# This is why inpainting pastes the kept pixels back instead of trusting the decoder with them (notebook
# [08](08_from_a_picture.ipynb)), and why latents should be handed on as latents.
#
# ## Your turn
#
# ### Exercise 02.1: count it
# *Difficulty 1 of 5, importance 3 of 5, five minutes.* A VAE makes `factor` x `factor` RGB pixels one position of
# `channels` numbers. Return two ratios, picture to latent: of numbers, and of bits, if a colour has 8 bits and a
# latent's number `bits`.


# %% tags=["exercise"]
def compression(factor, channels, bits):
    # BEGIN SOLUTION
    numbers = 3 * factor**2 / channels
    return numbers, numbers * 8 / bits
    # END SOLUTION


ldm.check("02.1", compression)

# %% [markdown]
# ### Exercise 02.2: the divergence
# *Difficulty 2 of 5, importance 4 of 5, ten minutes.* Equation (3) from what the encoder gives: `mean` and
# `log_variance`, each (B, C, h, w). One number a picture, (B,).


# %% tags=["exercise"]
def kl(mean, log_variance):
    # BEGIN SOLUTION
    return 0.5 * (mean**2 + log_variance.exp() - 1 - log_variance).sum((1, 2, 3))
    # END SOLUTION


ldm.check("02.2", kl)

# %% [markdown]
# ### Exercise 02.3: draw a latent
# *Difficulty 2 of 5, importance 5 of 5, five minutes.* From the encoder's raw output `moments` (B, 8, h, w), means
# before log-variances, and noise `eps` (B, 4, h, w): a sample of the posterior. Keep log-variances in [-30, 20], as
# every file of this kind expects.


# %% tags=["exercise"]
def sample(moments, eps):
    # BEGIN SOLUTION
    mean, log_variance = moments.chunk(2, dim=1)
    return mean + (0.5 * log_variance.clamp(-30, 20)).exp() * eps
    # END SOLUTION


ldm.check("02.3", sample)

# %% [markdown]
# ### Exercise 02.4: the factor, without drawing
# *Difficulty 3 of 5, importance 5 of 5, ten minutes.* The factor of equation (5) for *samples* of posteriors, exactly,
# from `mean` and `log_variance` (B, C, h, w) alone. (A variance splits in two: that of the means, and the mean of the
# variances.)


# %% tags=["exercise"]
def scaling_factor(mean, log_variance):
    # BEGIN SOLUTION
    variance = mean.var() + log_variance.exp().mean()
    return variance**-0.5
    # END SOLUTION


ldm.check("02.4", scaling_factor)

# %% [markdown]
# ### Further 02.5: FLUX's two numbers
# *Difficulty 1 of 5, importance 4 of 5, five minutes.* Equation (5) with a shift, both ways: what becomes of the raw
# latent `z` for the diffusion model, and what becomes of its `x0` for the decoder. Return the two.


# %% tags=["exercise"]
def there_and_back_again(z, x0, factor, shift):
    # BEGIN SOLUTION
    return (z - shift) * factor, x0 / factor + shift
    # END SOLUTION


ldm.check("02.5", there_and_back_again)

# %% [markdown]
# ### Further 02.6: fit a preview
# *Difficulty 3 of 5, importance 3 of 5, fifteen minutes.* From latents `x0` (B, 4, h, w) and pictures (B, 3, 8h, 8w) in
# [-1, 1], the matrix (5, 3) that gives a cell's mean colour from its four numbers and a 1 behind them, by least
# squares.


# %% tags=["exercise"]
def fit_preview(x0, pictures):
    # BEGIN SOLUTION
    rows = x0.movedim(1, -1).flatten(0, 2)  # (B*h*w, 4)
    rows = torch.cat([rows, torch.ones(len(rows), 1)], 1)
    cells = F.avg_pool2d(pictures, 8).movedim(1, -1).flatten(0, 2)  # (B*h*w, 3)
    return torch.linalg.lstsq(rows, cells).solution
    # END SOLUTION


ldm.check("02.6", fit_preview)

# %% [markdown]
# ## The same on a real model
#
# The function from the beginning, and equation (5), on Stable Diffusion 1.5. Its VAE learned from photographs; put some
# of yours into `photographs`, and see how near to 0.18215 you come. Scenes like ours are not what it was measured on.
#
# What is a toy here: a small VAE, trained on drawings with an L1 loss, where Stable Diffusion's had a perceptual and an
# adversarial loss besides. What carries over: the shapes and 48 : 1, the tiny KL weight, the recipe of the factor, and
# what forgetting it looks like. What does not: the decibels, which channel does what, and 0.41214.

# %% tags=["real-model"]
photographs = []  # paths of pictures of your own
sd = real("sd15")
if sd is not None:
    images = [Image.open(path).convert("RGB") for path in photographs] or some
    display(there_and_back(sd, images))
    size = (sd.default_size,) * 2
    x = to_tensor(np.stack([np.asarray(image.resize(size)) for image in images]))
    with torch.no_grad():
        z = torch.cat([sd.vae.posterior(one.to(sd.device, sd.dtype)).mean for one in x.split(1)])
    print(f"1 / std of {len(images)} pictures: {1 / z.std():.5f}")
    print(f"in its file: {sd.vae.config.scaling_factor}")

# %% [markdown]
# ## Where it lives in `ldm`
#
# `ldm/models/vae.py` holds the whole VAE, with the Gaussian of (1) to (3) as a pair of tensors; `encode` and `decode`
# speak the diffusion model's latents, `posterior` and `reconstruct` the raw ones, so that (5) stands in two lines and
# no caller multiplies by anything. `ldm/train/vae.py` trains it and measures the factor. In diffusers, `AutoencoderKL`
# speaks raw latents alone, and each pipeline multiplies and divides by `vae.config.scaling_factor` itself: that is how
# it gets forgotten.

# %%
for each in (Gaussian, VAE.encode, VAE.decode):
    print(inspect.getsource(each))

# %% [markdown]
# **In short.** Four numbers for 8x8 pixels: 48 to 1, and a network makes 8 dB more of them than the best matrix. The
# noise schedule expects data of spread 1, so latents are divided by theirs; 0.18215 is such a measured spread, turned
# over, and every VAE has its own. A latent is a code laid out like a picture, not a small picture. Next: [03, noise and
# the perfect denoiser](03_noise.ipynb).
