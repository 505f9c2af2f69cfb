"""From a sentence to a picture: encode the words, draw noise, walk down the schedule, decode.

    pipe = ldm.load("scenes")
    pipe("a large red house on snow at night", seed=7).images[0]

    for step in pipe.steps("a large red house on snow at night", seed=7):
        show(pipe.decode(step.x0))

    pipe("the same at sunset", image="photo.png", strength=0.6, mask="mask.png", control=[Control(net, "edges.png")])

Each station of the road is a method of `Pipeline`, and each part is usable alone.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ldm import pictures, tasks
from ldm.control import Control, Seen, as_controls
from ldm.diffusion import Prediction
from ldm.errors import LDMError, say_on_stderr
from ldm.guidance import Network, denoiser
from ldm.models.controlnet import check_base
from ldm.models.unet import UNet
from ldm.models.vae import VAE
from ldm.network import Beside, guided, unguided
from ldm.noise import Noise
from ldm.run import Result, Run, finite
from ldm.samplers import find_sampler
from ldm.samplers.inverse import ddim_inverse
from ldm.sampling import Sampler, Step
from ldm.schedules import Level, Schedule, ScheduleConfig, alpha_bars
from ldm.schedules.table import level_at
from ldm.settings import Defaults, Model, Settings, choose_levels, choose_settings, whole
from ldm.text.clip import TextEncoder
from ldm.text.tokenizer import Tokenizer
from ldm.tiles import in_tiles

if TYPE_CHECKING:
    from ldm.lab.trace import Trace

TILE = 512  # pixels along a side of an upscaler's tiles: the size it was trained on


class Pipeline:
    """The parts of a latent diffusion model, each usable alone, and the road through them.

    `tokenizer`, `text_encoder`, `unet`, `vae` are the parts; `schedule(n)` makes the table for n steps. `low_res`,
    of an upscaler, is the schedule of the noise on its small picture, `max_noise_level` the most it was trained on.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        text_encoder: TextEncoder,
        unet: UNet,
        vae: VAE,
        scheduler: ScheduleConfig,
        defaults: Defaults = Defaults(),
        folder: Path | None = None,
        low_res: ScheduleConfig | None = None,
        max_noise_level: int | None = None,
    ):
        self.tokenizer, self.text_encoder, self.unet, self.vae = tokenizer, text_encoder, unet, vae
        self.scheduler, self.defaults, self.folder = scheduler, defaults, folder
        self.low_res, self.max_noise_level = low_res, max_noise_level
        self.watchers = []  # what looks on at the steps of every run: `ldm.lab.watch` comes and goes

    # ------------------------------------------------------------------------------------------ the road

    def __call__(
        self, prompt: str | Sequence[str], *, one_by_one: bool = False, after: Sequence[Step] = (), **options
    ) -> Result:
        """Draw pictures; the options are those of `prepare`.

        `one_by_one` draws each picture of the batch alone: slower, and its bits don't depend on the others.
        """
        if one_by_one:
            return self._one_by_one(prompt, after, options)
        run = self.prepare(prompt, **options)
        x = run.x
        for step in chain(after, run.steps(after)):  # a finished run takes no step more, one of strength 0 none at all
            x = step.x
        return run.finish(x)

    def _one_by_one(self, prompt: str | Sequence[str], after: Sequence[Step], options: dict) -> Result:
        of_a_batch = ("latents", "generator", "network")
        if after or any(options.get(name) is not None for name in of_a_batch):
            raise LDMError(
                "one_by_one begins each picture from its seed: pass no latents, generator, after or network with it."
            )
        settings = self.prepare(prompt, **options).settings
        n = len(settings.seeds)

        def own(given: object, k: int) -> object:
            if isinstance(given, Tensor):  # of latents or pictures (B, ...) its row; a depth (H, W) is for all
                return given[k : k + 1] if given.dim() > 2 and len(given) == n else given
            return given[k] if isinstance(given, list | tuple) and len(given) == n else given

        options = {k: v for k, v in options.items() if k not in ("negative", "seed", "count")}
        pictured = {name: options.pop(name) for name in ("image", "mask", "depth") if name in options}
        if isinstance(pictured.get("depth"), np.ndarray):
            pictured["depth"] = torch.as_tensor(pictured["depth"])
        controls = as_controls(options.pop("control", None))
        results = [
            self(
                settings.prompt[k],
                negative=settings.negative[k],
                seed=settings.seeds[k],
                control=[replace(each, picture=own(each.picture, k)) for each in controls],
                **{name: own(given, k) for name, given in pictured.items()},
                **options,
            )
            for k in range(n)
        ]
        images = [image for result in results for image in result.images]
        changed = tuple(number for result in results for number in result.changed)
        return Result(images, torch.cat([result.x0 for result in results]), settings, changed)

    def steps(self, prompt: str | Sequence[str], *, after: Sequence[Step] = (), **options) -> Iterator[Step]:
        """The steps of a run, each yielded as it is taken (`ldm.sampling.Step`); nothing is hidden between them.

        The options are those of `prepare`. `after=steps[:k]` goes on from steps of an earlier run.
        Raises LDMError, at once, for what cannot be.
        """
        return self.prepare(prompt, **options).steps(after)

    def trace(
        self, prompt: str | Sequence[str], *, memory: float = 512, layers: str | Sequence[str] | None = None, **options
    ) -> "Trace":
        """A run with all that can be seen of it: steps, attention maps, words, times.

        memory     MiB of attention maps that are kept; what is more is averaged over heads, then over steps
        layers     keep those of these layers alone, named as in `ldm.watch`; the other options are `prepare`'s
        """
        from ldm.lab.trace import trace  # drawing a picture needs no laboratory

        return trace(self, prompt, memory=memory, layers=layers, **options)

    def prepare(
        self,
        prompt: str | Sequence[str],
        *,
        image: object = None,
        strength: float | None = None,
        mask: object = None,
        paste: bool = True,
        control: Control | Sequence[Control] | None = None,
        depth: object = None,
        width: int | None = None,
        height: int | None = None,
        clip_skip: int = 0,
        latents: Tensor | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        together: bool = True,
        tile: int | None = None,
        network: Network | None = None,
        **options,
    ) -> Run:
        """Everything that a run needs before its first step; the other options are those of `settings`.

        Pictures are paths, Pillow pictures or arrays, one for all or a list with one for each picture drawn.

        image      begin from this picture, or from latents (B, C, h, w), by `strength`; or upscale it or edit it,
                   where the model is made for that
        mask       white is drawn anew, black is kept; with `paste`, bit for bit
        control    ControlNets and their pictures (`ldm.control.Control`), any number of them
        depth      what a depth-to-image model keeps: (H, W), larger is nearer; left out, its own estimator tells it
        latents    (B, C, h, w) of unit variance, or a `generator` (one for a single picture, or one a picture), replace
                   what the seeds would draw
        together   False runs the halves of guidance one after the other
        tile       draw in overlapping tiles of so many pixels; an upscaler does so by itself, 0 forbids it
        network    made of `ldm.guidance`'s closures, takes the place of the UNet, and the prompts' with it

        Raises LDMError, at once, for what cannot be.
        """
        control = as_controls(control)
        tasks.check_given(self.task, image is not None, mask is not None, depth is not None, options)
        image = tasks.open_image(image, self.vae.config.latent_channels, self.task)
        depth = tasks.own_depth(self.folder, image) if self.task == "depth" and depth is None else depth
        led = control[0].size() if control and image is None else None
        sized = tasks.choose_sizes(self.model, image, mask, led, width, height, strength)
        settings = self.settings(prompt, **sized, **options)
        schedule, noise = self.schedule_of(settings), self.noise(settings, generator)
        small = self.vae.config.factor if self.task == "upscale" else 1
        count, size = len(settings.seeds), (settings.width // small, settings.height // small)
        given = tasks.read_given(image, mask, depth, count, size, self.vae.config.factor)
        start = self.begin(settings, schedule, noise, given, latents)
        sampler = self.sampler(settings)
        if start.known is not None:
            sampler = tasks.blended(sampler, *start.known)
        tile = TILE * (self.task == "upscale") if tile is None else tile
        own = network is not None
        if network is None:
            seen = self.look(settings, schedule, control)
            told = Beside(start.channels, settings.image_guidance, seen, settings.noise_level, *self.tiles(tile))
            network = self.network(settings, clip_skip, together, told)
        elif control:
            raise LDMError("A network of your own is given: put the ControlNets into it (ldm.control), not beside it.")
        decode = partial(self.decode, tile=tile)

        def finish(x: Tensor) -> Result:
            images, changed = decode(x), ()
            if given.masks and paste:
                images, changed = given.paste(images)
            return Result(images, x, settings, changed)

        denoise = denoiser(network, schedule.prediction)
        return Run(settings, schedule, start.x, denoise, sampler, noise, decode, finish, own, self.watchers)

    def prepare_inversion(
        self, image: object, prompt: str | Sequence[str], *, guidance: float = 1.0, refine: int = 5, **options
    ) -> Run:
        """A run from a picture up to noise: DDIM's road walked the other way (`ldm.samplers.inverse`).

        `refine`: how often each step is corrected; the other options are those of `prepare`. With guidance, or with few
        steps, corrections may lead away from the road rather than to it: then take more steps, or guidance 1.
        """
        if taken := {"sampler", "strength", "steps_are", "mask", "paste", "latents", "eta"} & options.keys():
            raise LDMError(
                f"Inversion walks DDIM's road from the whole picture: leave {' and '.join(sorted(taken))} out."
            )
        refine = whole("refine", refine, 0)
        run = self.prepare(prompt, image=image, strength=0.0, guidance=guidance, sampler="ddim", **options)
        settings, schedule = replace(run.settings, strength=None), run.schedule.upwards()

        def denoise(x: Tensor, level: Level) -> Prediction:
            return run.denoise(x, level._replace(i=len(schedule) - level.i))  # ControlNets know the rows from above

        sampler = partial(ddim_inverse, refine=refine)
        return replace(run, settings=settings, schedule=schedule, sampler=sampler, denoise=denoise)

    def invert(self, image: object, prompt: str | Sequence[str], **options) -> Tensor:
        """The noise (B, C, h, w) from which DDIM draws this picture (Song et al. 2021, section 4.3).

        `pipe(prompt, latents=..., sampler="ddim", guidance=...)` with the same settings leads back to it, and with
        another prompt to a relative of it. The options are those of `prepare_inversion`.
        """
        run = self.prepare_inversion(image, prompt, **options)
        *_, last = run.steps()
        return last.x / run.schedule.start_scale

    def enlarge(self, x0: Tensor, factor: float) -> Tensor:
        """Latents of a picture as those of a larger one, to be refined: `pipe(prompt, image=..., strength=0.6)`.

        The latent hi-res fix: a model draws large pictures best from what it has drawn at the size it knows.
        """
        if not isinstance(factor, Real) or not 1 <= factor < math.inf:
            raise LDMError(f"The factor of an enlargement must be a number of 1 or more, not {factor!r}.")
        return pictures.enlarge(x0, *(round(factor * side) for side in x0.shape[2:]))

    # ------------------------------------------------------------------------------------------ its stations

    @torch.no_grad()
    def encode(self, prompts: Sequence[str], clip_skip: int = 0) -> Tensor:
        """Sentences -> what the UNet reads, (B, 77, D). Says on stderr what was cut off behind the 77th token."""
        tokens = self.tokenizer(list(prompts))
        for cut in dict.fromkeys(cut for cut in tokens.cut if cut):
            say_on_stderr(
                f"The prompt is longer than {self.tokenizer.max_length} tokens; this part is not read: {cut!r}"
            )
        context = self.text_encoder.context(tokens.ids.to(self.device), clip_skip)
        return finite(context, "the text encoder")

    def schedule(self, steps: int | None = None, **options) -> Schedule:
        """The table of noise levels of a run: `steps`, sampler, rule, sigmas, timesteps, compat as in `steps`."""
        return choose_levels(self.scheduler, self.defaults, steps=steps, **options).schedule(self.scheduler)

    def schedule_of(self, settings: Settings) -> Schedule:
        """The table of noise levels of these settings."""
        return settings.schedule(self.scheduler)

    def noise(self, settings: Settings, generator: torch.Generator | Sequence[torch.Generator] | None = None) -> Noise:
        """The pictures' noise: from their seeds, or from the caller's generators."""
        if generator is None:
            return Noise.from_seeds(settings.seeds)
        generators = [generator] if isinstance(generator, torch.Generator) else list(generator)
        if len(generators) != len(settings.seeds):
            raise LDMError(
                f"{len(settings.seeds)} pictures asked for, but {len(generators)} generators given: one each."
            )
        return Noise(generators)

    def sampler(self, settings: Settings) -> Sampler:
        """The function of the sampler's name, told `eta` if it has that choice."""
        method = find_sampler(settings.sampler)
        return method.step if method.eta is None else partial(method.step, eta=settings.eta)

    @torch.no_grad()
    def begin(
        self,
        settings: Settings,
        schedule: Schedule,
        noise: Noise,
        given: tasks.Given = tasks.Given(),
        latents: Tensor | None = None,
    ) -> tasks.Start:
        """Where the loop begins: at noise, or part of the way from a picture; `latents` replace the noise."""
        shape = (len(settings.seeds), *self.vae.latent_shape(settings.height, settings.width))
        if latents is not None and latents.shape != shape:
            raise LDMError(f"latents of shape {tuple(latents.shape)} given; these settings need {shape}.")
        for name, tensor in (("latents", latents), ("image", given.x0)):
            if tensor is not None and not torch.isfinite(tensor).all():
                raise LDMError(f"The {name} given hold numbers that are not finite (NaN or infinity).")
        chosen = settings.timesteps is not None or not isinstance(settings.sigmas, str)
        if settings.strength is None and schedule[0].sigma < 0.9 and chosen:
            say_on_stderr(
                f"The first level holds {schedule[0].sigma:.2f} of noise, and the run begins from noise alone: what is "
                "above that level is left out."
            )
        like = torch.empty(shape, dtype=self.dtype, device=self.device)
        road = tasks.Road(self.vae, schedule, settings.first, noise, latents, like)
        if self.task == "upscale":
            bar = alpha_bars(self.low_res).double()[settings.noise_level].item()
            start = tasks.begin_upscaling(road, given, level_at(0, settings.noise_level, bar))
        else:
            start = tasks.begin(self.task, road, given, settings.strength, nearest=settings.compat)
        finite(start.x, "the VAE's encoder")
        return start

    @torch.no_grad()
    def look(self, settings: Settings, schedule: Schedule, control: Sequence[Control]) -> list[Seen]:
        """What the ControlNets see of their pictures, computed once."""
        seen = []
        for k, each in enumerate(control):
            name = f"The ControlNet {k + 1} of {len(control)}" if len(control) > 1 else "The ControlNet"
            check_base(each.net.config, self.unet.config, self.vae.config, name)
            picture = each.pictures(settings.width, settings.height, len(settings.seeds))
            weight = each.net.conv_in.weight
            features = each.net.condition(picture.to(weight.device, weight.dtype))
            first = settings.first % len(schedule)  # of strength 0 no step is drawn, but inversion goes all of them
            seen.append(Seen(each, features, each.rows(first, len(schedule))))
        return seen

    @torch.no_grad()
    def network(
        self, settings: Settings, clip_skip: int = 0, together: bool = True, beside: Beside = Beside()
    ) -> Network:
        """The UNet told what to draw, with classifier-free guidance unless its scale is 1 or less."""
        cond = self.encode(settings.prompt, clip_skip)
        if settings.guidance <= 1:
            if any(settings.negative):
                say_on_stderr("Without guidance (1 or less) the negative prompt does nothing.")
            return unguided(self.unet, cond, beside)
        uncond = self.encode(settings.negative)  # as in diffusers, clip_skip is the prompt's alone
        return guided(self.unet, uncond, cond, settings.guidance, beside, together)

    @torch.no_grad()
    def decode(self, x0: Tensor, tile: int = 0) -> list[Image.Image]:
        """Clean latents (B, C, h, w) -> PIL pictures. Raises LDMError rather than paint NaN black.

        `tile`: decode in overlapping tiles of so many pixels; 0 is all at once.
        """
        x0 = finite(x0, "the latents").to(self.vae.dtype)
        size, overlap = self.tiles(tile) if tile else (max(x0.shape[2:]), 0)
        image = finite(in_tiles(self.vae.decode, x0, size, overlap, self.vae.config.factor), "the VAE's decoder")
        pixels = ((image / 2 + 0.5).clamp(0, 1).float() * 255).round().byte()  # (B, 3, H, W)
        return [Image.fromarray(p) for p in pixels.permute(0, 2, 3, 1).cpu().numpy()]

    # ------------------------------------------------------------------------------------------ what it is

    def tiles(self, pixels: int) -> tuple[int, int]:
        """A tile's size and overlap in positions of the latent, for a tile of so many pixels; 0 is no tiles."""
        size = whole("tile", pixels, 0) // self.vae.config.factor
        if pixels and size < 4:
            raise LDMError(f"A tile of {pixels} pixels is too small: {4 * self.vae.config.factor} is the smallest.")
        return size, size // 4

    @property
    def device(self) -> torch.device:
        return self.unet.conv_in.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.unet.dtype

    @property
    def task(self) -> str:
        """What the UNet is made for, by the channels it reads beside the latent (`ldm.tasks`)."""
        return tasks.task_of(self.unet.config.in_channels, self.vae.config.latent_channels)

    @property
    def default_size(self) -> int:
        """Pixels along a side of the pictures the model was trained on."""
        return (self.unet.config.sample_size or 64) * self.vae.config.factor

    @property
    def model(self) -> Model:
        """What the settings of a run must fit."""
        noise_levels = self.unet.config.num_class_embeds or 0
        if self.max_noise_level is not None:
            noise_levels = min(noise_levels, self.max_noise_level + 1)
        factor = self.vae.config.factor
        return Model(self.scheduler, self.defaults, self.task, factor, self.default_size, noise_levels)

    def settings(self, prompt: str | Sequence[str], **options) -> Settings:
        """Fill in every default, and refuse with a sentence what cannot be drawn: `ldm.settings.choose_settings`."""
        return choose_settings(self.model, prompt, **options)
