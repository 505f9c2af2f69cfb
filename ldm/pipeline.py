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
from typing import TYPE_CHECKING

import torch
from PIL import Image
from torch import Tensor

from ldm import pictures, tasks, told
from ldm.added import Added
from ldm.alone import draw_alone
from ldm.control import Control, Seen, as_controls
from ldm.diffusion import Prediction
from ldm.ensemble import handed_latent, handed_schedule
from ldm.errors import LDMError, say_on_stderr
from ldm.guidance import Network, denoiser
from ldm.memory import is_offloaded
from ldm.network import Beside
from ldm.noise import Noise
from ldm.precision import cast, in_range, narrowed
from ldm.run import Result, Run, finite
from ldm.samplers import find_sampler
from ldm.samplers.inverse import ddim_inverse
from ldm.sampling import Sampler, Step
from ldm.schedules import Level, Schedule, alpha_bars
from ldm.schedules.table import level_at
from ldm.settings import Settings, check_rows, choose_levels, choose_settings, whole
from ldm.text.words import Words
from ldm.tiles import in_tiles

if TYPE_CHECKING:
    from ldm.lab.trace import Trace

TILE = 512  # pixels along a side of an upscaler's tiles: the size it was trained on


class Pipeline(Added):
    """The road through a model's parts (`ldm.parts`); `schedule(n)` makes the table for n steps."""

    # ------------------------------------------------------------------------------------------ the road

    def __call__(
        self, prompt: str | Sequence[str], *, one_by_one: bool = False, after: Sequence[Step] = (), **options
    ) -> Result:
        """Draw pictures; the options are those of `prepare`.

        `one_by_one` draws each picture of the batch alone: slower, and its bits don't depend on the others.
        """
        if one_by_one:
            return draw_alone(self, prompt, after, options)
        run = self.prepare(prompt, **options)
        x = run.x
        for step in chain(after, run.steps(after)):  # a finished run takes no step more, one of strength 0 none at all
            x = step.x
        return run.finish(x)

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
        handed: Step | None = None,
        **options,
    ) -> Run:
        """Everything that a run needs before its first step; the other options are those of `settings`.

        Pictures are paths, Pillow pictures or arrays, one for all or a list with one for each picture drawn.

        image      begin from this picture, or from latents (B, C, h, w), by `strength`; or upscale it or edit it,
                   where the model is made for that
        mask       white is drawn anew, black is kept; with `paste`, bit for bit
        control    ControlNets and their pictures (`ldm.control.Control`), any number of them
        depth      what a depth-to-image model keeps: (H, W), larger is nearer; left out, its own estimator tells it
        clip_skip  how many of the text encoders' last layers are left out: 1 is what the web UI calls clip skip 2
        latents    (B, C, h, w) of unit variance, or a `generator` (one for a single picture, or one a picture), replace
                   what the seeds would draw
        together   False runs the halves of guidance one after the other
        tile       draw in overlapping tiles of so many pixels; an upscaler does so by itself, 0 forbids it
        network    made of `ldm.guidance`'s closures, takes the place of the UNet, and the prompts' with it
        handed     the last step of another model's run, from which this one goes on (`ldm.ensemble`)

        Raises LDMError, at once, for what cannot be.
        """
        control = as_controls(control)
        if handed is not None:
            given = {"image": image, "mask": mask, "depth": depth, "latents": latents, "strength": strength}
            image = tasks.handed_latents(handed, given, options)
        tasks.check_given(self.task, image is not None, mask is not None, depth is not None, options)
        image = tasks.open_image(image, self.vae.config.latent_channels, self.task)
        depth = tasks.own_depth(self.folder, image) if self.task == "depth" and depth is None else depth
        led = control[0].size() if control and image is None else None
        midway = handed is not None or options.get("denoising_start") is not None
        sized = tasks.choose_sizes(self.model, image, mask, led, width, height, strength, midway)
        settings = self.settings(prompt, **sized, **options)
        schedule, noise = self.schedule_of(settings), self.noise(settings, generator)
        if handed is not None:
            schedule = handed_schedule(handed, schedule, settings)
        small = self.vae.config.factor if self.task == "upscale" else 1
        count, size = len(settings.seeds), (settings.width // small, settings.height // small)
        slack = pictures.SLACK * self.model.patch
        given = tasks.read_given(image, mask, depth, count, size, self.vae.config.factor, slack)
        if handed is not None:
            given = replace(given, x0=handed_latent(handed, schedule, settings))
            noise.restore(handed.noise_state)
        # FLUX's ControlNets draw noise, too, and in diffusers it is drawn first.
        seen = self.look(settings, schedule, control, noise) if network is None else []
        start = self.begin(settings, schedule, noise, given, latents)
        sampler = self.sampler(settings)
        if start.known is not None:
            sampler = tasks.blended(sampler, *start.known)
        tile = TILE * (self.task == "upscale") if tile is None else tile
        own = network is not None
        if network is None:
            beside = Beside(start.channels, settings.image_guidance, seen, *self.tiles(tile))
            with self.precision():
                network = self.network(settings, clip_skip, together, beside, schedule)
        elif control:
            raise LDMError("A network of your own is given: put the ControlNets into it (ldm.control), not beside it.")
        else:
            network = narrowed(network, self.dtype)
        decode = partial(self.decode, tile=tile)

        def finish(x: Tensor) -> Result:
            images, changed = decode(x), ()
            if given.masks and paste:
                images, changed = given.paste(images)
            return Result(images, x, settings, changed)

        denoise = denoiser(cast(network, self.autocast), schedule.prediction)
        return Run(settings, schedule, start.x, denoise, sampler, noise, decode, finish, own, self.watchers)

    def prepare_inversion(
        self, image: object, prompt: str | Sequence[str], *, guidance: float = 1.0, refine: int = 5, **options
    ) -> Run:
        """A run from a picture up to noise: DDIM's road walked the other way (`ldm.samplers.inverse`).

        `refine`: how often each step is corrected; the other options are those of `prepare`. With guidance, or with few
        steps, corrections may lead away from the road rather than to it: then take more steps, or guidance 1.
        """
        midway = {"handed", "denoising_start", "denoising_end"}
        if taken := {"sampler", "strength", "steps_are", "mask", "paste", "latents", "eta", *midway} & options.keys():
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
        patch = self.model.patch  # of FLUX sides stay even
        return pictures.enlarge(x0, *(patch * round(factor * side / patch) for side in x0.shape[2:]))

    # ------------------------------------------------------------------------------------------ its stations

    def settings(self, prompt: str | Sequence[str], **options) -> Settings:
        """Fill in every default, and refuse with a sentence what cannot be drawn: `ldm.settings.choose_settings`."""
        return choose_settings(self.model, prompt, **options)

    @torch.no_grad()
    def read(
        self,
        prompts: Sequence[str],
        clip_skip: int = 0,
        dialect: str = "plain",
        max_sequence_length: int | None = None,
    ) -> Words:
        """Sentences -> what the text encoders say of them (`ldm.told.read`)."""
        return told.read(self, prompts, clip_skip, dialect, max_sequence_length)

    def encode(
        self,
        prompts: Sequence[str],
        clip_skip: int = 0,
        dialect: str = "plain",
        max_sequence_length: int | None = None,
    ) -> Tensor:
        """Sentences -> what the network reads, (B, L, D): L is 77, in a dialect 77 for each chunk of the longest.

        Of FLUX it is `max_sequence_length`; `read` has the pooled vector, too.
        """
        return self.read(prompts, clip_skip, dialect, max_sequence_length).context

    def schedule(self, steps: int | None = None, **options) -> Schedule:
        """The table of noise levels of a run: `steps`, sampler, rule, sigmas, timesteps, compat as in `steps`.

        Where it depends on the picture's size, as FLUX.1-dev's does, that of the model's own size.
        """
        own = [self.defaults.width or self.default_size, self.defaults.height or self.default_size]
        levels = choose_levels(self.scheduler, self.defaults, steps=steps, **options)
        return levels.schedule(self.scheduler, self.patches(*own))

    def schedule_of(self, settings: Settings) -> Schedule:
        """The table of noise levels of these settings."""
        return settings.schedule(self.scheduler, self.patches(settings.width, settings.height))

    def patches(self, width: int, height: int) -> int | None:
        """The length of the sequence that FLUX makes of a picture of so many pixels; None of a UNet."""
        return width * height // self.model.multiple**2 if self.flux else None

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
        if settings.strength is None and given.x0 is None and schedule[0].sigma < 0.9 and chosen:
            say_on_stderr(
                f"The first level holds {schedule[0].sigma:.2f} of noise, and the run begins from noise alone: what is "
                "above that level is left out."
            )
        like = self.like(settings)
        rows = settings.rows(schedule)
        check_rows(rows, settings)
        road = tasks.Road(self.vae, schedule, rows.start, noise, latents, like)
        with self.precision():
            if self.task == "upscale":
                bar = alpha_bars(self.low_res).double()[settings.noise_level].item()
                start = tasks.begin_upscaling(road, given, level_at(0, settings.noise_level, bar))
            else:
                start = tasks.begin(self.task, road, given, settings.strength, nearest=settings.compat)
        finite(start.x, "the VAE's encoder")
        return start

    def like(self, settings: Settings) -> Tensor:
        """A tensor of the shape, dtype and device that the loop's latents have; its numbers are any."""
        shape = (len(settings.seeds), *self.vae.latent_shape(settings.height, settings.width))
        # In half precision every step would round x once more.
        return torch.empty(shape, dtype=torch.promote_types(self.dtype, torch.float32), device=self.device)

    @torch.no_grad()
    def look(
        self, settings: Settings, schedule: Schedule, control: Sequence[Control], noise: Noise | None = None
    ) -> list[Seen]:
        """What ControlNets and adapters see of their pictures, computed once.

        Nets of FLUX see latents, which are drawn with `noise`: left out, with that of the settings' seeds.
        """
        noise = self.noise(settings) if noise is None else noise
        encode = partial(tasks.encode, self.vae, noise, self.like(settings))
        seen = []
        for k, each in enumerate(control):
            place = f" {k + 1} of {len(control)}" if len(control) > 1 else ""
            each.check_base(self.backbone.config, self.vae.config, place)
            slack = pictures.SLACK * self.model.patch
            picture = each.pictures(settings.width, settings.height, len(settings.seeds), slack)
            weight = next(each.net.parameters())
            if weight.device.type != self.device.type and not is_offloaded(each.net):
                raise LDMError(
                    f"The net{place} lies on {weight.device}, and the pipeline computes on {self.device}: move it "
                    "there (net.to), or name it where the pipeline is offloaded (ldm.memory.offload, others=[net])."
                )
            with self.precision():
                features = each.features(picture.to(self.device), encode)
            # Of strength 0 no step is drawn, but inversion goes all of them.
            first = settings.rows(schedule).start % len(schedule)
            seen.append(Seen(each, features, each.rows(first, len(schedule)), self.backbone.config))
        return seen

    @torch.no_grad()
    def network(
        self,
        settings: Settings,
        clip_skip: int = 0,
        together: bool = True,
        beside: Beside = Beside(),
        schedule: Schedule | None = None,
    ) -> Network:
        """The UNet told what to draw, with classifier-free guidance unless its scale is 1 or less (`ldm.told`).

        `schedule` is the run's, if it isn't that of the settings: words may change with its rows.
        """
        schedule = self.schedule_of(settings) if schedule is None else schedule
        return told.network(self, settings, schedule, clip_skip, together, beside)

    @torch.no_grad()
    def decode(self, x0: Tensor, tile: int = 0) -> list[Image.Image]:
        """Clean latents (B, C, h, w) -> PIL pictures. Raises LDMError rather than paint NaN black.

        `tile`: decode in overlapping tiles of so many pixels; 0 is all at once.
        """
        x0 = finite(x0, "the latents").to(self.device)
        size, overlap = self.tiles(tile) if tile else (max(x0.shape[2:]), 0)
        factor = self.vae.config.factor
        with self.precision():
            image = in_range(self.vae, lambda x0: in_tiles(self.vae.decode, x0, size, overlap, factor), x0)
        finite(image, "the VAE's decoder")
        pixels = ((image / 2 + 0.5).clamp(0, 1).float() * 255).round().byte()  # (B, 3, H, W)
        return [Image.fromarray(p) for p in pixels.permute(0, 2, 3, 1).cpu().numpy()]

    def tiles(self, pixels: int) -> tuple[int, int]:
        """A tile's size and overlap in positions of the latent, for a tile of so many pixels; 0 is no tiles."""
        patch = self.model.patch
        size = whole("tile", pixels, 0) // self.vae.config.factor // patch * patch
        if pixels and size < 4:
            raise LDMError(f"A tile of {pixels} pixels is too small: {4 * self.vae.config.factor} is the smallest.")
        return size, size // 4
