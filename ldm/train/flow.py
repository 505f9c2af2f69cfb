"""Train a small FLUX: show it a latent somewhere on the line from a picture to noise, and ask which way the line goes.

    x = (1 - sigma) x0 + sigma eps;  loss = |flux(x, sigma, text) - (eps - x0)|^2

Rectified flow (Liu et al. 2023, equation 1; Lipman et al. 2023, equation 23). sigma is drawn from a logit-normal
distribution (Esser et al. 2024, equation 19), whose mean and spread here favour the noisy half: there it is decided
what stands where. One caption in ten is replaced by the empty one, for classifier-free guidance. VAE and text encoder
are those of a finished model, and stay as they are.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ldm.diffusion import add_noise, target
from ldm.guidance import classifier_free, conditional, denoiser, halves_together
from ldm.io.folders import folder_hash
from ldm.loading import load
from ldm.models.flux import Flux, FluxConfig, Modulation
from ldm.models.unet import Extras
from ldm.models.vae import VAE
from ldm.noise import Noise
from ldm.precision import autocasting
from ldm.samplers import find_sampler
from ldm.sampling import sample
from ldm.schedules import ScheduleConfig, make_schedule
from ldm.text.clip import TextEncoder
from ldm.train.common import EMA, Optimizer, Run, begin_from, step_generator, trapezoid, write_model
from ldm.train.data import pictures
from ldm.train.parallel import share
from ldm.train.unet import draw_batch, encode_pictures

TOKENS = 40  # of a caption that are read: the longest of `ldm.scenes` have 36, begin and end included
CONFIG = FluxConfig(
    in_channels=16,
    num_layers=2,
    num_single_layers=5,
    attention_head_dim=32,
    num_attention_heads=5,
    joint_attention_dim=128,
    pooled_projection_dim=128,
    axes_dims_rope=(8, 12, 12),
)

SCHEDULER = {  # as diffusers writes it: no shift, for a picture of 64 patches needs none
    "_class_name": "FlowMatchEulerDiscreteScheduler",
    "base_image_seq_len": 256,
    "base_shift": 0.5,
    "invert_sigmas": False,
    "max_image_seq_len": 4096,
    "max_shift": 1.15,
    "num_train_timesteps": 1000,
    "shift": 1.0,
    "shift_terminal": None,
    "stochastic_sampling": False,
    "time_shift_type": "exponential",
    "use_beta_sigmas": False,
    "use_dynamic_shifting": False,
    "use_exponential_sigmas": False,
    "use_karras_sigmas": False,
}


@dataclass(frozen=True)
class Recipe:
    base: str = "scenes"  # the model whose VAE and text encoder it takes: an embedded one's name, or a folder
    pictures: int = 16000
    held_out: int = 512  # pictures of held-out combinations, to measure on
    steps: int = 9000
    batch: int = 64
    lr: float = 2e-3
    caption_dropout: float = 0.1
    mean: float = 0.4  # of sigma's logit; 0 is as much noise as picture
    spread: float = 1.2
    ema: float = 0.998
    seed: int = 0
    init: str = ""  # a model folder to begin from, otherwise at random
    precision: str = "bfloat16"  # of products; weights, sums and averages stay in float32. Or "float32"
    sheet_every: int = 1000
    device: str = "cpu"


def levels(count: int, mean: float, spread: float, generator: torch.Generator) -> Tensor:
    """sigma (B,) = sigmoid(mean + spread * z), z standard normal, one in each of B stretches of equal probability."""
    u = (torch.arange(count) + torch.rand(count, generator=generator, dtype=torch.float64)) / count  # [0, 1)
    return torch.sigmoid(mean + spread * torch.special.ndtri(u.clamp(1e-6, 1 - 1e-6))).float()


@contextmanager
def computing(precision: str, device: str) -> Iterator[None]:
    """What the forward pass is done under.

    For a hundred tokens plain attention is faster than the fused one: its backward pass on a CPU took twice the time.
    """
    dtype = None if precision == "float32" else getattr(torch, precision)
    with autocasting(dtype, torch.device(device)), sdpa_kernel([SDPBackend.MATH]):
        yield


@torch.no_grad()
def read(text: TextEncoder, ids: Tensor) -> tuple[Tensor, Extras]:
    """What the transformer reads of the first `TOKENS` of ids (B, 77): their vectors, and the caption's as a whole.

    CLIP looks back alone, so tokens that are left out change nothing before them.
    """
    states = text(ids[:, :TOKENS])
    return states.last, Extras(pooled=states.pooled)


def loss(flux: nn.Module, x0: Tensor, words: tuple[Tensor, Extras], sigma: Tensor, eps: Tensor) -> Tensor:
    """`x0`, `eps` (B, C, h, w), `sigma` (B,) in [0, 1]; `words` as `read` gives them."""
    level = sigma.view(-1, 1, 1, 1)
    out = flux(add_noise(x0, eps, 1 - level, level), 1000 * sigma, *words)
    return (out.float() - target(x0, eps, 1 - level, level, "flow")).square().mean()


def begin(recipe: Recipe) -> Flux:
    """The network as it begins: every block adds nothing (adaLN-Zero, Peebles & Xie 2023), and the answer is zero."""
    torch.manual_seed(recipe.seed)
    flux = Flux(CONFIG).to(recipe.device)
    for layer in (*(m.linear for m in flux.modules() if isinstance(m, Modulation)), flux.proj_out):
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    return flux


@torch.no_grad()
def held_out_loss(flux: Flux, text: TextEncoder, x0: Tensor, ids: Tensor, recipe: Recipe) -> float:
    """The loss on 256 held-out pictures, always with the same noise and levels."""
    generator, n, total = torch.Generator().manual_seed(0), min(256, len(x0)), 0.0
    sigma = levels(n, recipe.mean, recipe.spread, generator)[torch.randperm(n, generator=generator)]
    eps = torch.randn(x0[:n].shape, generator=generator)
    for rows in torch.arange(n).split(32):
        z, level, noise, words = (v[rows].to(recipe.device) for v in (x0, sigma, eps, ids))
        total += loss(flux, z, read(text, words), level, noise).item() * len(rows)
    return total / n


@torch.no_grad()
def draw(
    flux: Flux, text: TextEncoder, vae: VAE, ids: Tensor, empty: Tensor, steps: int = 25, scale: float = 4.0
) -> Tensor:
    """A picture for each prompt (B, 77), with seeds 0, 1, ...: (B, 3, 128, 128) in [-1, 1]."""
    device = vae.encoder.conv_in.weight.device
    schedule = make_schedule(ScheduleConfig.from_json(SCHEDULER), steps)
    noise = Noise.from_seeds(range(len(ids)))
    words = read(text, torch.cat([empty.expand(len(ids), -1), ids]).to(device))
    denoise = denoiser(classifier_free(halves_together(conditional(flux, *words)), scale), schedule.prediction)
    x = noise.draw(vae.latent_shape(128, 128)).to(device)
    *_, last = sample(denoise, x, schedule, find_sampler("euler").step, noise)
    return vae.decode(last.x)


def train(folder: Path, recipe: Recipe = Recipe(), name: str = "flow") -> None:
    """Train in `folder`/`name`, or go on where it stopped; at the end write the averaged transformer there."""
    device = recipe.device
    base = load(recipe.base, device=device)
    text, vae = base.text_encoder.requires_grad_(False), base.vae.requires_grad_(False)
    data = pictures(folder / "data", recipe.pictures)
    held = pictures(folder / "data", recipe.held_out, "held-out", first=10_000_000)
    latents = folder / "data", folder_hash(base.folder / "vae")
    mean, deviation = encode_pictures(vae, data, *latents, "train", device)
    held_mean, _ = encode_pictures(vae, held, *latents, "held-out", device)
    ids = torch.stack([base.tokenizer(words).ids for words in data.captions])  # (N, 4, 77)
    held_ids, empty = base.tokenizer([words[0] for words in held.captions]).ids, base.tokenizer("").ids

    flux = begin(recipe)
    if recipe.init and not (folder / name / "state.pt").exists():
        begin_from(flux, Path(recipe.init) / "transformer" / "diffusion_pytorch_model.safetensors")
    optimizer, ema = Optimizer([flux], recipe.lr), EMA(flux, recipe.ema)
    run = Run(folder / name, {"flux": flux, "optimizer": optimizer, "ema": ema}, recipe)

    mine = share(recipe.batch)
    for step in run.steps():
        generator = step_generator(recipe.seed, step)
        batch = draw_batch(recipe.batch, recipe.caption_dropout, mean, deviation, ids, empty, generator)
        sigma = levels(recipe.batch, recipe.mean, recipe.spread, generator)
        x0, eps, sigma, words = (v[mine].to(device) for v in (batch.x0, batch.eps, sigma, batch.words))
        with computing(recipe.precision, device):
            value = loss(flux, x0, read(text, words), sigma, eps)
        norm = optimizer.step(value, trapezoid(step, recipe.steps))
        ema.update(flux, step)
        if step % 10 == 9:
            run.log(step + 1, loss=value.item(), norm=norm)
        if (step + 1) % recipe.sheet_every == 0 or step + 1 == recipe.steps:
            averaged = ema.of(flux)
            run.log(step + 1, held_out_loss=held_out_loss(averaged, text, held_mean, held_ids, recipe))
            run.sheet(step + 1, draw(averaged, text, vae, held_ids[:32], empty), columns=8)

    write_model(folder / name / "transformer", ema.of(flux).cpu(), "diffusion_pytorch_model")
