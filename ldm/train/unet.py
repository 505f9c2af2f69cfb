"""Train the UNet: show it latents with noise, and the caption, and ask for the noise.

    t ~ uniform;  x = alpha_t x0 + sigma_t eps;  loss = w(t) |unet(x, t, text) - eps|^2    (Ho et al. 2020, equation 14)

One caption in ten is replaced by the empty one, so that the same network also learns the unconditional prediction that
guidance needs (Ho & Salimans 2022, algorithm 1). w(t) = clamp(SNR, 1, 5) / SNR, which weighs the error of x0 by the
clamp: at most 5, or the nearly clean levels, of which there are many and which say little, would take all the gradient
(Hang et al. 2023, equation 8); at least 1, or the noisiest levels, where it is decided what stands on the left, would
hardly count: the last one's SNR is 0.005 (the truncated SNR of Salimans & Ho 2022, section 4).
"""

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ldm.diffusion import add_noise, target
from ldm.guidance import classifier_free, conditional, denoiser, halves_together
from ldm.io.folders import folder_hash, read_json, write_json
from ldm.io.weights import blank, load_weights, read_tensors, save_weights
from ldm.models.unet import CROSS_DOWN, CROSS_UP, UNet, UNetConfig
from ldm.models.vae import VAE, VAEConfig
from ldm.noise import Noise
from ldm.samplers import find_sampler
from ldm.sampling import sample
from ldm.schedules import ScheduleConfig, alpha_bars, make_schedule
from ldm.text.clip import TextConfig, TextEncoder
from ldm.text.tokenizer import Tokenizer
from ldm.train.common import EMA, Optimizer, Run, begin_from, step_generator, trapezoid, write_model
from ldm.train.data import Pictures, pictures
from ldm.train.parallel import leader_first, leads, share

CONFIG = UNetConfig(
    sample_size=16,
    block_out_channels=(48, 96, 128),
    down_block_types=(CROSS_DOWN,) * 3,
    up_block_types=(CROSS_UP,) * 3,
    layers_per_block=1,
    cross_attention_dim=128,
    heads=(3, 6, 8),
    transformer_layers_per_block=(1, 1, 1),
    only_cross_attention=(False,) * 3,
    use_linear_projection=True,
    norm_num_groups=8,
)

SCHEDULER = {  # Stable Diffusion 1's schedule, as diffusers writes it
    "_class_name": "DDIMScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "clip_sample_range": 1.0,
    "dynamic_thresholding_ratio": 0.995,
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "rescale_betas_zero_snr": False,
    "sample_max_value": 1.0,
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "thresholding": False,
    "timestep_spacing": "leading",
    "trained_betas": None,
}


INPUTS = ("vae", "tokenizer")  # of the run's folder: another one of these would mean other latents, other words


@dataclass(frozen=True)
class Recipe:
    pictures: int = 12000
    held_out: int = 512  # pictures of held-out combinations, to measure on
    steps: int = 6000
    batch: int = 32
    lr: float = 2e-3
    text: str = "tuned"  # or "frozen": whether the text encoder goes on learning with the UNet
    caption_dropout: float = 0.1
    snr_range: tuple[float, float] = (1.0, 5.0)  # the weight of x0's error: the SNR, clamped to this
    ema: float = 0.995  # short: the falling rate averages by itself, and a long memory lags behind what is learnt late
    seed: int = 0
    init: str = ""  # a model folder to begin from, otherwise at random
    sheet_every: int = 1000
    device: str = "cpu"


@torch.no_grad()
def encode_pictures(
    vae: VAE, data: Pictures, folder: Path, vae_hash: str, name: str, device: str
) -> tuple[Tensor, Tensor]:
    """Means and deviations (N, 4, 16, 16) of the pictures' latents, scaled to unit variance.

    They are kept in `folder` under the VAE's hash: another VAE's latents are never taken for its own.
    """
    path = folder / f"latents-{name}-{len(data)}-{vae_hash}.safetensors"
    with leader_first():
        if not path.exists():
            means, deviations = [], []
            for start in tqdm(range(0, len(data), 32), desc=f"encoding {path.stem}"):
                posterior = vae.posterior(data.tensor(slice(start, start + 32)).to(device))
                means.append(posterior.mean.cpu() * vae.config.scaling_factor)
                deviations.append((0.5 * posterior.log_variance).exp().cpu() * vae.config.scaling_factor)
            save_weights({"mean": torch.cat(means), "deviation": torch.cat(deviations)}, path)
    tensors = {name: tensor.clone() for name, tensor, _ in read_tensors(path)}
    return tensors["mean"], tensors["deviation"]


def loss(
    unet: nn.Module,
    x0: Tensor,
    context: Tensor,
    t: Tensor,
    eps: Tensor,
    bars: Tensor,
    snr_range: tuple[float, float],
    prediction: str,
) -> Tensor:
    """`x0`, `eps` (B, 4, h, w), `context` (B, 77, D), `t` (B,) whole timesteps, `bars` (1000,) alpha^2 at each.

    `unet` is the UNet, or what is called like one.

    `snr_range` holds the weight of x0's error where the network predicts epsilon.
    """
    bar = bars[t].view(-1, 1, 1, 1)
    alpha, sigma = bar.sqrt(), (1 - bar).sqrt()
    out = unet(add_noise(x0, eps, alpha, sigma), t, context)
    error = (out - target(x0, eps, alpha, sigma, prediction)).square().mean(dim=(1, 2, 3))  # (B,)
    snr = bars[t] / (1 - bars[t])
    return (error * snr.clamp(*snr_range) / snr).mean()


def stratified(batch: int, generator: torch.Generator) -> Tensor:
    """Timesteps (B,), one in each of B equal stretches of [0, 1000): as uniform as drawn freely, and calmer."""
    t = (torch.arange(batch) + torch.rand(batch, generator=generator)) / batch  # [0, 1)
    return (t * 1000).long().clamp(max=999)  # float32 may round 31 + 0.9999999 to 32


class Batch(NamedTuple):
    """One step's pictures, by their rows, and all that is random about them."""

    rows: Tensor  # (B,)
    words: Tensor  # (B, 77) token ids
    x0: Tensor  # (B, 4, h, w)
    eps: Tensor  # (B, 4, h, w)
    t: Tensor  # (B,) whole timesteps


def draw_batch(
    size: int, dropout: float, mean: Tensor, deviation: Tensor, ids: Tensor, empty: Tensor, generator: torch.Generator
) -> Batch:
    """Pictures at random, each in one of its wordings `ids` (N, 4, 77) or, a share `dropout` of them, in the empty one.

    x0 is a sample of each latent: `mean` and `deviation` (N, 4, h, w) are what the VAE says of it.
    """
    rows = torch.randint(len(mean), (size,), generator=generator)
    wording = torch.randint(ids.shape[1], (size,), generator=generator)
    dropped = torch.rand(size, generator=generator) < dropout
    words = torch.where(dropped[:, None], empty, ids[rows, wording])
    x0 = mean[rows] + deviation[rows] * torch.randn(mean[rows].shape, generator=generator)
    eps = torch.randn(x0.shape, generator=generator)
    return Batch(rows, words, x0, eps, stratified(size, generator))


def load_parts(folder: Path, device: str) -> tuple[Tokenizer, TextEncoder, VAE]:
    """What was trained before: the vocabulary, CLIP's text tower and the VAE."""

    def fill(cls, config, path: Path):
        with blank():
            model = cls(config)
        return load_weights(model, path, device=device)

    text_config = TextConfig.from_json(read_json(folder / "clip" / "text" / "config.json"))
    vae_config = VAEConfig.from_json(read_json(folder / "vae" / "config.json"))
    text = fill(TextEncoder, text_config, folder / "clip" / "text" / "model.safetensors")
    vae = fill(VAE, vae_config, folder / "vae" / "diffusion_pytorch_model.safetensors")
    return Tokenizer.from_folder(folder / "tokenizer"), text, vae


@torch.no_grad()
def held_out_loss(
    parts: torch.nn.ModuleDict, x0: Tensor, ids: Tensor, bars: Tensor, recipe: Recipe, scheduler: ScheduleConfig
) -> float:
    """The loss on 256 held-out pictures, always with the same noise and timesteps: runs of one `snr_range` compare."""
    generator, device = torch.Generator().manual_seed(0), bars.device
    total, n = 0.0, min(256, len(x0))
    t = ((torch.arange(n) + 0.5) / n * 1000).long()
    eps = torch.randn(x0[:n].shape, generator=generator)
    for rows in torch.arange(n).split(32):
        context = parts["text"].context(ids[rows].to(device))
        z, times, noise = (v[rows].to(device) for v in (x0, t, eps))
        prediction = scheduler.prediction_type
        total += loss(parts["unet"], z, context, times, noise, bars, recipe.snr_range, prediction).item() * len(rows)
    return total / n


@torch.no_grad()
def draw(parts: torch.nn.ModuleDict, vae: VAE, ids: Tensor, empty: Tensor, scheduler: ScheduleConfig) -> Tensor:
    """A picture for each prompt (B, 77), with seeds 0, 1, ...: (B, 3, 128, 128) in [-1, 1]."""
    device = vae.encoder.conv_in.weight.device
    schedule = make_schedule(scheduler, 20)
    noise = Noise.from_seeds(range(len(ids)))
    context = parts["text"].context(torch.cat([empty.expand(len(ids), -1), ids]).to(device))
    halves = halves_together(conditional(parts["unet"], context))
    denoise = denoiser(classifier_free(halves, scale=4.0), schedule.prediction)
    x = noise.draw(vae.latent_shape(128, 128)).to(device) * schedule.start_scale
    *_, last = sample(denoise, x, schedule, find_sampler("dpm++2m").step, noise)
    return vae.decode(last.x)


def train(folder: Path, recipe: Recipe = Recipe(), name: str = "unet") -> None:
    """Train in `folder`/`name`, or go on where it stopped; at the end write the averaged UNet and text tower there."""
    device = recipe.device
    data = pictures(folder / "data", recipe.pictures)
    held = pictures(folder / "data", recipe.held_out, "held-out", first=10_000_000)
    tokenizer, text, vae = load_parts(folder, device)
    latents = folder / "data", folder_hash(folder / "vae")
    mean, deviation = encode_pictures(vae, data, *latents, "train", device)
    held_mean, _ = encode_pictures(vae, held, *latents, "held-out", device)
    ids = torch.stack([tokenizer(words).ids for words in data.captions])  # (N, 4, 77)
    held_ids = tokenizer([words[0] for words in held.captions]).ids
    empty = tokenizer("").ids

    torch.manual_seed(recipe.seed)
    unet = UNet(CONFIG).to(device, memory_format=torch.channels_last)
    torch.nn.init.zeros_(unet.conv_out.weight)  # begin by predicting nothing, not by unlearning a guess
    if recipe.init and not (folder / name / "state.pt").exists():
        begin_from(unet, Path(recipe.init) / "unet" / "diffusion_pytorch_model.safetensors")
        begin_from(text, Path(recipe.init) / "text_encoder" / "model.safetensors", TextEncoder.rename)
    text.train().requires_grad_(recipe.text == "tuned")
    trained = torch.nn.ModuleDict({"unet": unet, "text": text})
    scheduler = ScheduleConfig.from_json(SCHEDULER)
    bars = alpha_bars(scheduler).to(device)
    optimizer, ema = Optimizer([trained], recipe.lr), EMA(trained, recipe.ema)
    run = Run(folder / name, {"trained": trained, "optimizer": optimizer, "ema": ema}, recipe)

    mine = share(recipe.batch)
    for step in run.steps():
        generator = step_generator(recipe.seed, step)
        _, words, x0, eps, t = draw_batch(recipe.batch, recipe.caption_dropout, mean, deviation, ids, empty, generator)
        x0, eps, t, words = (v[mine].to(device) for v in (x0, eps, t, words))
        context = text.context(words)
        value = loss(unet, x0, context, t, eps, bars, recipe.snr_range, scheduler.prediction_type)
        norm = optimizer.step(value, trapezoid(step, recipe.steps))
        ema.update(trained, step)
        if step % 10 == 9:
            run.log(step + 1, loss=value.item(), norm=norm)
        if (step + 1) % recipe.sheet_every == 0 or step + 1 == recipe.steps:
            averaged = ema.of(trained)
            run.log(step + 1, held_out_loss=held_out_loss(averaged, held_mean, held_ids, bars, recipe, scheduler))
            run.sheet(step + 1, draw(averaged, vae, held_ids[:32], empty, scheduler), columns=8)

    averaged = ema.of(trained).cpu()
    if leads():  # `export` asks whether the parts still are these
        write_json(folder / name / "trained-with.json", {part: folder_hash(folder / part) for part in INPUTS})
    for part, stem in (("unet", "diffusion_pytorch_model"), ("text", "model")):
        write_model(folder / name / part, averaged[part], stem)
