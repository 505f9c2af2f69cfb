"""What a picture can do for a run: where the loop begins, what the network reads beside the latent, what is kept.

One loop serves all tasks. A task is known by the channels that the UNet reads beyond the latent's own:

    0   from words; from a picture (strength); inpainting by blending, which all but upscalers can
    1   depth: Stable Diffusion 2's depth-to-image
    3   upscale: the x4 upscaler, beside the small picture with some noise
    4   edit: InstructPix2Pix, beside the picture to be changed
    5   inpaint: beside a mask and the picture without what it covers

FLUX's transformer reads, with C channels of its latent (16) and factor x factor pixels (8x8) in a position of it:

    0             as above
    C             control: FLUX.1 Canny and Depth, beside the picture that leads it: edges, or depths
    C + factor^2  fill: FLUX.1 Fill, beside the picture without what the mask covers, and the mask's own pixels

Noise is drawn in the order in which diffusers draws it, so that the same generators give the same pictures.
Shapes: B pictures, C channels of the latent, H, W pixels, h, w positions.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ldm import conditions, pictures
from ldm.diffusion import add_noise
from ldm.errors import LDMError
from ldm.io.pictures import as_picture
from ldm.models.vae import VAE
from ldm.noise import Noise
from ldm.precision import in_range
from ldm.sampling import Denoise, Sampler, Step
from ldm.schedules import Level, Schedule
from ldm.settings import Model

TASKS = {0: "text", 1: "depth", 3: "upscale", 4: "edit", 5: "inpaint"}  # of a UNet
FROM_NOISE = ("upscale", "edit", "control")  # the picture is read beside the latent, and never the run's beginning
MADE = {"upscale": "A model to upscale pictures", "edit": "A model to edit pictures", "control": "A control model"}
FILLS = ("inpaint", "fill")  # the mask is read there, and so is the picture without what it covers


@dataclass(frozen=True)
class Given:
    """What the caller gave, as tensors of float32: each for all B pictures, or one for each.

    `originals` and `masks` are the same as pictures, at the size that is drawn.
    """

    image: Tensor | None = None  # (B or 1, 3, H, W) in [-1, 1]
    x0: Tensor | None = None  # (B or 1, C, h, w): the picture as latents already
    mask: Tensor | None = None  # (B or 1, 1, H, W), 1 where the picture is drawn anew
    depth: Tensor | None = None  # (B or 1, 1, h, w) in [-1, 1]
    originals: Sequence[Image.Image] = ()
    masks: Sequence[Image.Image] = ()

    def paste(self, images: Sequence[Image.Image]) -> tuple[list[Image.Image], tuple[float, ...]]:
        """The pictures drawn, with the originals' own pixels outside the masks; and by how much those had changed."""
        n, m = len(self.originals), len(self.masks)
        pairs = [(self.originals[k % n], self.masks[k % m]) for k in range(len(images))]
        changed = tuple(pictures.changed_outside(image, *pair) for image, pair in zip(images, pairs, strict=True))
        return [pictures.paste(image, *pair) for image, pair in zip(images, pairs, strict=True)], changed


def open_image(image: object, channels: int, task: str = "text") -> list[Image.Image] | Tensor | None:
    """The caller's pictures as RGB, in a list; latents (B, `channels`, h, w) are left as they are."""
    if image is None:
        return None
    if isinstance(image, Tensor):
        if task in FROM_NOISE:
            raise LDMError(f"{MADE[task]} reads the picture itself: pass that as image, not latents.")
        if image.dim() != 4 or image.shape[1] != channels:
            raise LDMError(
                f"image is a tensor of shape {tuple(image.shape)}: as a tensor it must be latents (B, {channels}, h, "
                "w); pass a picture as a path, a Pillow picture or an array."
            )
        return image
    if isinstance(image, list | tuple) and not image:
        raise LDMError("image is an empty list: give one picture for all that are drawn, or one each.")
    return [as_picture(each, "image") for each in (image if isinstance(image, list | tuple) else [image])]


def choose_sizes(
    model: Model,
    image: Sequence[Image.Image] | Tensor | None,
    mask: object = None,
    led: tuple[int, int] | None = None,
    width: int | None = None,
    height: int | None = None,
    strength: float | None = None,
    midway: bool = False,
) -> dict:
    """width, height and strength, where the pictures given decide what is left open; `settings` takes them.

    `led` is the size of a ControlNet's picture, which decides where there is no other. `midway`: what is given are
    latents on the way, which know no strength.
    """
    factor = model.factor
    if width is not None and height is not None:
        own = (width, height)
    elif isinstance(image, Tensor):
        own = (factor * image.shape[3], factor * image.shape[2])
    elif image is not None and model.task == "upscale":
        own = (factor * image[0].width, factor * image[0].height)
    elif image is not None or led is not None:
        own = pictures.choose_size(*(led if image is None else image[0].size), model.size, model.multiple)
    else:
        own = None
    begins = image is not None and model.task not in FROM_NOISE
    if midway:
        check_midway(image, mask, strength)
    elif begins and strength is None:
        strength = 1.0 if mask is not None else 0.3 if model.sizes == "score" else 0.8  # a refiner's work is the last
    elif not begins and strength is not None:
        if image is not None:
            raise LDMError(f"strength has no meaning here: {MADE[model.task].lower()} begins from noise.")
        raise LDMError("strength says how much of a picture is drawn over: pass the picture as image (--image).")
    width, height = pictures.complete(width, height, own, model.multiple)
    return {"width": width, "height": height, "strength": strength}


def check_midway(image: Sequence[Image.Image] | Tensor | None, mask: object, strength: float | None) -> None:
    """Refuse what a run that begins in the middle of the road cannot take up."""
    if not isinstance(image, Tensor):
        raise LDMError(
            "denoising_start goes on from latents on the way, those of a run with denoising_end: pass them as image. A "
            "finished picture is taken up by its strength."
        )
    if mask is not None or strength is not None:
        name = "mask" if mask is not None else "strength"
        raise LDMError(f"A run that goes on from latents on the way (denoising_start) knows no {name}: leave it out.")


def handed_latents(handed: Step, given: dict, options: dict) -> Tensor:
    """The latents that another model hands over. Raises LDMError for what would compete with them."""
    if taken := [name for name, value in given.items() if value is not None]:
        raise LDMError(f"A step is handed over, from which the run goes on: leave {taken[0]} out.")
    start, compat = options.get("denoising_start"), options.get("compat", False)
    if (start is None) == bool(compat):
        raise LDMError(
            "Under compat a run goes on at the row that denoising_start says, as in diffusers: pass it."
            if compat
            else "A step that is handed over brings its level with it: leave denoising_start out, or say compat."
        )
    return handed.x


def own_depth(folder: Path | None, image: Sequence[Image.Image] | Tensor) -> list[Tensor]:
    """The depth (h, w) of each picture, by the estimator in the model's folder, through transformers."""
    if folder is None or not (folder / "depth_estimator").is_dir() or isinstance(image, Tensor):
        raise LDMError(
            "This model keeps the depth of the picture, and there is no depth_estimator in its folder: pass it as "
            "depth (--depth), for instance of ldm.conditions.predict_depth(picture, folder)."
        )
    return [conditions.predict_depth(each, folder / "depth_estimator") for each in image]


def read_given(
    image: list[Image.Image] | Tensor | None,
    mask: object,
    depth: object,
    count: int,
    size: tuple[int, int],
    factor: int,
    slack: int = pictures.SLACK,
) -> Given:
    """Everything given, for `count` pictures, of which the given one is read at `size` (width, height).

    A picture may be out of that proportion by less than `slack` pixels.
    Raises LDMError for another number, size or proportion, and for a mask that is empty.
    """
    latents, shown = (image, []) if isinstance(image, Tensor) else (None, image or [])
    shown = pictures.one_or_each(shown, count, "picture") if shown else []
    if latents is not None and len(latents) not in (1, count):
        raise LDMError(f"Latents of {len(latents)} pictures for {count} to be drawn: give those of one, or of each.")
    if mask is not None and not shown:
        raise LDMError("A mask needs the picture itself as image: latents have no pixels to keep.")
    width, height = size
    if latents is not None and latents.shape[2:] != (height // factor, width // factor):
        own = f"{factor * latents.shape[3]}x{factor * latents.shape[2]}"
        raise LDMError(
            f"The latents given are of {own} pixels, and {width}x{height} are to be drawn: leave the size out, or "
            "bring them to it (Pipeline.enlarge)."
        )
    masks = [] if mask is None else pictures.one_or_each(mask, count, "mask")
    masks = [pictures.read_mask(each, shown[k % len(shown)]) for k, each in enumerate(masks)]
    originals = [pictures.fit(each, width, height, slack=slack) for each in shown]
    masks = [pictures.fit(each, width, height, "The mask", slack) for each in masks]
    if any(mask.getextrema()[1] < 128 for mask in masks):
        raise LDMError(f"So little of the mask is white that nothing is left of it at {width}x{height}: take more.")
    depths = [] if depth is None else pictures.one_or_each(depth, count, "depth")
    depths = [pictures.depth_tensor(each, height // factor, width // factor) for each in depths]
    if sum(map(len, depths)) not in (0, 1, count):
        raise LDMError(
            f"{sum(map(len, depths))} depths for {count} pictures to be drawn: give one for all, or one each."
        )
    return Given(
        image=pictures.image_tensor(originals) if originals else None,
        x0=latents,
        mask=pictures.mask_tensor(masks) if masks else None,
        depth=torch.cat(depths) if depths else None,
        originals=originals,
        masks=masks,
    )


@dataclass(frozen=True)
class Start:
    """Where the loop begins, and what it is given beside words and noise."""

    x: Tensor  # (B, C, h, w) in the model's coordinates, at the row that the strength says
    channels: Tensor | None = None  # (B, C', h, w), what the UNet reads behind the latent
    known: tuple[Tensor, Tensor, Tensor] | None = None  # for `blended`: x0, eps, mask at the latent's size


@dataclass(frozen=True)
class Road:
    """The common first steps of every task: encode a picture, draw noise, and go part of the way back."""

    vae: VAE
    schedule: Schedule
    first: int  # the row that the run begins at
    noise: Noise
    latents: Tensor | None  # the caller's own noise
    like: Tensor  # (B, C, h, w) of the shape, dtype and device that the loop's latents have

    def encode(self, image: Tensor) -> Tensor:
        """A sample of the latents of (B or 1, 3, H, W), each picture's with its own noise."""
        return encode(self.vae, self.noise, self.like, image)

    def eps(self) -> Tensor:
        """The first noise, of unit variance: the caller's latents, or drawn."""
        return self.noise(self.like) if self.latents is None else self.latents.to(self.like)

    def from_noise(self, eps: Tensor) -> Tensor:
        return eps * self.schedule.start_scale

    def from_picture(self, x0: Tensor, eps: Tensor) -> Tensor:
        """x0 with the noise of the row that the run begins at; at the last row, of strength 0, as it is."""
        return at_row(self.schedule, self.first, x0, eps)


def encode(vae: VAE, noise: Noise, like: Tensor, image: Tensor) -> Tensor:
    """A sample of the latents of (B or 1, 3, H, W) for the pictures of `like` (B, C, h, w), as diffusers takes one."""
    posterior = noise(like.to(vae.dtype))
    image = image.expand(len(like), -1, -1, -1).to(like.device)
    return in_range(vae, lambda image: vae.encode(image, posterior.to(image)), image).to(like)


def at_row(schedule: Schedule, i: int, x0: Tensor, eps: Tensor) -> Tensor:
    """x0 with the noise of row i. The last row counts as clean, whatever noise its level has (as in diffusers)."""
    level = schedule[i]
    return x0 if i == len(schedule) else add_noise(x0, eps, level.alpha, level.sigma)


def begin(task: str, road: Road, given: Given, strength: float | None, nearest: bool) -> Start:
    """The start of a run. `strength` None is a run from noise alone; `nearest` takes masks to latents as diffusers."""
    if given.mask is not None:
        return begin_inpainting(task, road, given, strength, nearest)
    if given.x0 is not None and strength is None:  # latents on the way
        return Start(given.x0.expand_as(road.like).to(road.like), read_beside(task, road, given))
    beside = read_beside(task, road, given)  # before the first noise: some draw noise, too
    x0 = None
    if strength is not None:
        x0 = given.x0.expand_as(road.like).to(road.like) if given.x0 is not None else road.encode(given.image)
    eps = road.eps()
    x = road.from_noise(eps) if x0 is None else road.from_picture(x0, eps)
    return Start(x, beside)


def read_beside(task: str, road: Road, given: Given) -> Tensor | None:
    """What a UNet for depth or for editing reads behind the latent, (B, C', h, w): the same with a mask and without.

    An editor reads the mean of the picture's latents, in the VAE's own scale: so InstructPix2Pix was trained.
    FLUX's control models read a sample of them, in the scale of all latents.
    """
    if task == "depth":
        return given.depth.expand(len(road.like), -1, -1, -1).to(road.like)
    if task == "edit":
        image = given.image.expand(len(road.like), -1, -1, -1).to(road.like.device)
        return in_range(road.vae, lambda image: road.vae.posterior(image).mean, image).to(road.like)
    return road.encode(given.image) if task == "control" else None


def begin_inpainting(task: str, road: Road, given: Given, strength: float | None, nearest: bool) -> Start:
    """From noise alone at strength 1, so that nothing of what the mask covers is seen (as diffusers has it)."""
    mask = (
        pictures.latent_mask(given.mask, road.vae.config.factor, nearest)
        .expand(len(road.like), -1, -1, -1)
        .to(road.like)
    )
    if task == "fill" and strength == 1 and road.latents is None:
        road.noise(road.like)  # diffusers encodes the picture, of which nothing is then left
    x0 = road.encode(given.image) if task not in FILLS or strength < 1 else None
    eps = road.eps()
    x = road.from_noise(eps) if strength in (1, None) else road.from_picture(x0, eps)
    if task not in FILLS:
        if nearest:  # diffusers encodes the masked picture for models that don't read it, too
            road.noise(road.like)
        return Start(x, read_beside(task, road, given), known=(x0, eps, mask))
    masked = road.encode(given.image * (given.mask < 0.5))
    if task == "inpaint":
        return Start(x, torch.cat([mask, masked], dim=1))
    pixels = F.pixel_unshuffle(given.mask, road.vae.config.factor)  # (B, 64, h, w), row by row of each position
    return Start(x, torch.cat([masked, pixels.expand(len(road.like), -1, -1, -1).to(road.like)], dim=1))


def begin_upscaling(road: Road, given: Given, level: Level) -> Start:
    """From noise, beside the small picture itself, noised to `level` so that its faults are not taken for details."""
    small = given.image.expand(len(road.like), -1, -1, -1).to(road.like)
    small = add_noise(small, road.noise(small), level.alpha, level.sigma)
    return Start(road.from_noise(road.eps()), small)


def blended(sampler: Sampler, x0: Tensor, eps: Tensor, mask: Tensor) -> Sampler:
    """Inpainting with any model: after every step, what the mask doesn't cover is the known picture at that level.

    mask * x + (1 - mask) * (alpha' x0 + sigma' eps) (Lugmayr et al. 2022, RePaint, equation 8, with one noise
    throughout, as diffusers has it). The mask (B, 1, h, w) is 1 where the picture is drawn anew.
    """

    def step(denoise: Denoise, x: Tensor, schedule: Schedule, i: int, history: Sequence[Step], noise: Noise) -> Step:
        taken = sampler(denoise, x, schedule, i, history, noise)
        known = at_row(schedule, i + 1, x0, eps)
        # Not an edit: what multistep methods have predicted inside the mask stays true.
        return replace(taken, x=(1 - mask) * known + mask * taken.x, made=None)

    return step


def task_of(in_channels: int, latent_channels: int, factor: int | None = None) -> str | None:
    """What a network is for, by the channels it reads; None if ldm knows no such task.

    A UNet, unless a `factor` is given: how many pixels a latent of FLUX stands for along a side.
    """
    known = TASKS if factor is None else {0: "text", latent_channels: "control", latent_channels + factor**2: "fill"}
    return known.get(in_channels - latent_channels)


def check_given(task: str, image: bool, mask: bool, depth: bool, options: dict) -> None:
    """Refuse with a sentence what this model has no use for, or lacks."""
    needs = {
        "depth": "a picture, whose depth it keeps",
        "upscale": "the small picture",
        "edit": "the picture to change",
        "control": "the picture that leads it, of edges or of depths",
    }
    if task in needs and not image:
        raise LDMError(f"This model draws from {needs[task]}: pass it as image (--image).")
    if task in FILLS and not (image and mask):
        raise LDMError("This model fills holes in a picture: pass image and mask (--image, --mask).")
    if mask and not image:
        raise LDMError("A mask says what of a picture is drawn anew: pass the picture as image (--image).")
    if mask and task == "upscale":
        raise LDMError("A mask is given, but an upscaler draws every pixel: leave it out.")
    if mask and task == "control":
        raise LDMError("A mask is given, but the picture that leads this model has nothing to be kept: leave it out.")
    if depth and task != "depth":
        if task == "control":
            raise LDMError("A control model reads depths as a picture: pass the depths as image (--image).")
        raise LDMError(
            "This model reads no depth of its own (its network has no channel for it): a ControlNet may, through "
            "control."
        )
    for name, wanted in (("noise_level", "upscale"), ("image_guidance", "edit")):
        if options.get(name) is not None and task != wanted:
            raise LDMError(f"{name} is given, which only a model to {wanted} pictures knows; this one is for {task}.")
