"""Train the VAE on the scenes: reconstruct crops through a noisy latent an eighth as wide.

loss = mean of w * (|x' - x| + |grad x' - grad x|) + kl_weight * KL. The weight w is larger on objects, which fill a
tenth of a picture and carry nearly all that a caption says. (Rombach et al. 2022, section 3.1, train with an L1 and
a perceptual term and a KL weight of 1e-6; the gradient term stands in for the perceptual one, which needs a network
trained on millions of photographs.)
"""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.models.vae import VAE, VAEConfig
from ldm.train.common import EMA, Optimizer, Run, begin_from, step_generator, trapezoid, write_model
from ldm.train.data import Pictures, pictures, to_tensor
from ldm.train.parallel import share

CONFIG = VAEConfig(
    block_out_channels=(16, 32, 64, 128),
    layers_per_block=1,
    norm_num_groups=4,  # at least four channels a group: fewer, and GroupNorm throws colour away
    sample_size=128,
    force_upcast=False,
)


@dataclass(frozen=True)
class Recipe:
    pictures: int = 12000
    held_out: int = 512  # pictures of held-out combinations, to measure on
    steps: int = 2600
    batch: int = 16
    crop: int = 64
    lr: float = 3e-3
    kl_weight: float = 1e-6
    object_weight: float = 3.0
    seed: int = 0
    init: str = ""  # a model folder to begin from, otherwise at random
    sheet_every: int = 500
    device: str = "cpu"


def crops(data: Pictures, recipe: Recipe, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Random crops (B, 3, c, c) in [-1, 1] and their weights (B, 1, c, c); two in three are centred on an object.

    Corners lie on multiples of 8, so that a crop's latents are the picture's own and pixel art keeps its grid.
    """
    c, limit = recipe.crop, 128 - recipe.crop
    images, masks = [], []
    rows = torch.randint(len(data), (recipe.batch,), generator=generator).tolist()
    for row in rows:
        y, x = torch.randint(limit + 1, (2,), generator=generator).tolist()
        ys, xs = np.nonzero(data.masks[row])
        pick, aim = torch.rand(2, generator=generator).tolist()
        if len(ys) and aim < 2 / 3:
            k = int(pick * len(ys))
            y, x = np.clip([ys[k] - c // 2, xs[k] - c // 2], 0, limit)
        y, x = 8 * round(y / 8), 8 * round(x / 8)
        images.append(data.images[row, y : y + c, x : x + c])
        masks.append(data.masks[row, y : y + c, x : x + c])
    mask = torch.from_numpy(np.stack(masks)).float()[:, None]
    mask = F.max_pool2d(mask, 5, stride=1, padding=2)  # the outline belongs to the object
    return to_tensor(np.stack(images)), 1 + recipe.object_weight * mask


def gradient(image: Tensor) -> tuple[Tensor, Tensor]:
    """Differences between neighbours, across and down."""
    return image[..., :, 1:] - image[..., :, :-1], image[..., 1:, :] - image[..., :-1, :]


def loss(vae: VAE, x: Tensor, weight: Tensor, noise: Tensor, kl_weight: float) -> Tensor:
    """`x` (B, 3, c, c) in [-1, 1], `weight` (B, 1, c, c), `noise` shaped as the latent."""
    posterior = vae.posterior(x)
    y = vae.reconstruct(posterior.sample(noise))
    value = (weight * (y - x).abs()).mean()
    for dy, dx, w in zip(gradient(y), gradient(x), (weight[..., 1:], weight[..., 1:, :]), strict=True):
        value = value + (w * (dy - dx).abs()).mean()
    return value + kl_weight * posterior.kl().mean()


def psnr(y: Tensor, x: Tensor, mask: Tensor | None = None) -> float:
    """Peak signal-to-noise ratio in dB of pictures in [-1, 1], over all pixels or where `mask` (B, H, W) is set."""
    error = (y.clamp(-1, 1) - x).square().mean(dim=1)  # (B, H, W)
    return (10 * torch.log10(4 / (error if mask is None else error[mask]).mean())).item()


@torch.no_grad()
def measure(vae: VAE, held: Pictures, rows: slice = slice(0, 64)) -> tuple[dict[str, float], Tensor]:
    """PSNR over held-out pictures and inside their object masks, and the reconstructions themselves."""
    x = held.tensor(rows).to(vae.encoder.conv_in.weight.device)
    y = vae.reconstruct(vae.posterior(x).mean)
    mask = torch.from_numpy(held.masks[rows].copy()).to(x.device)
    return {"psnr": psnr(y, x), "psnr_objects": psnr(y, x, mask)}, y


@torch.no_grad()
def latent_scale(vae: VAE, data: Pictures, count: int = 1024) -> float:
    """1 / the standard deviation of the raw latents, samples included: the VAE's `scaling_factor`.

    Rombach et al. 2022, appendix G: so that the diffusion model sees latents of unit variance.
    """
    total = squares = 0.0
    n = 0
    generator = torch.Generator().manual_seed(0)
    for start in range(0, count, 32):
        posterior = vae.posterior(data.tensor(slice(start, start + 32)).to(vae.encoder.conv_in.weight.device))
        z = posterior.sample(torch.randn(posterior.mean.shape, generator=generator).to(posterior.mean))
        total, squares, n = total + z.double().sum().item(), squares + z.double().square().sum().item(), n + z.numel()
    return (squares / n - (total / n) ** 2) ** -0.5


def train(folder: Path, recipe: Recipe = Recipe(), config: VAEConfig = CONFIG) -> None:
    """Train in `folder`/vae, or go on where it stopped; at the end write the averaged model there, with its scale."""
    data = pictures(folder / "data", recipe.pictures)
    held = pictures(folder / "data", recipe.held_out, "held-out", first=10_000_000)
    torch.manual_seed(recipe.seed)
    vae = VAE(config).to(recipe.device, memory_format=torch.channels_last)
    if recipe.init and not (folder / "vae" / "state.pt").exists():
        begin_from(vae, Path(recipe.init) / "vae" / "diffusion_pytorch_model.safetensors")
    optimizer, ema = Optimizer([vae], recipe.lr), EMA(vae, 0.998)
    run = Run(folder / "vae", {"vae": vae, "optimizer": optimizer, "ema": ema}, recipe)
    mine = share(recipe.batch)
    for step in run.steps():
        generator = step_generator(recipe.seed, step)
        x, weight = crops(data, recipe, generator)
        noise = torch.randn(len(x), *vae.latent_shape(recipe.crop, recipe.crop), generator=generator)
        x, weight, noise = (v[mine].to(recipe.device) for v in (x, weight, noise))
        value = loss(vae, x.contiguous(memory_format=torch.channels_last), weight, noise, recipe.kl_weight)
        norm = optimizer.step(value, trapezoid(step, recipe.steps))
        ema.update(vae, step)
        if step % 10 == 9:
            run.log(step + 1, loss=value.item(), norm=norm)
        if (step + 1) % recipe.sheet_every == 0 or step + 1 == recipe.steps:
            numbers, y = measure(ema.of(vae), held)
            run.log(step + 1, **numbers)
            run.sheet(step + 1, torch.stack([held.tensor(slice(0, 24)), y[:24].cpu()], 1).flatten(0, 1), columns=8)
    averaged = ema.of(vae).cpu()
    config = replace(config, scaling_factor=float(f"{latent_scale(averaged, data):.5g}"))
    write_model(folder / "vae", averaged, "diffusion_pytorch_model", config)
