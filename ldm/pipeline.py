"""From a sentence to a picture: encode the words, draw noise, walk down the schedule, decode.

    pipe = ldm.load("scenes")
    pipe("a large red house on snow at night", seed=7).images[0]

    for step in pipe.steps("a large red house on snow at night", seed=7):
        show(pipe.decode(step.x0))

    pipe("the same at sunset", image="photo.png", strength=0.6, mask="mask.png", control=[Control(net, "edges.png")])

Each station of the road is a method of `Pipeline`, and each part is usable alone.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from ldm import pictures, tasks
from ldm.control import Control, Seen, lead
from ldm.errors import LDMError, say_on_stderr
from ldm.guidance import (
    Network,
    classifier_free,
    conditional,
    denoiser,
    halves_apart,
    halves_together,
    joined,
    text_and_image,
)
from ldm.io.pictures import as_picture
from ldm.models.controlnet import check_base
from ldm.models.unet import Extras, UNet
from ldm.models.vae import VAE
from ldm.noise import Noise
from ldm.run import Result, Run, finite
from ldm.samplers import find_sampler
from ldm.samplers.inverse import ddim_inverse
from ldm.sampling import Sampler, Step
from ldm.schedules import Level, Schedule, ScheduleConfig, alpha_bars
from ldm.settings import Defaults, Model, Settings, choose_levels, choose_settings
from ldm.text.clip import TextEncoder
from ldm.text.tokenizer import Tokenizer
from ldm.tiles import in_tiles, tiled

OVERLAP = 4  # tiles share a quarter of their side


class Pipeline:
    """The parts of a latent diffusion model, each usable alone, and the road through them.

    `tokenizer`, `text_encoder`, `unet`, `vae` are the parts; `schedule(n)` makes the table for n steps; `low_res` is an
    upscaler's second schedule, that of the noise on its small picture.
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
    ):
        self.tokenizer, self.text_encoder, self.unet, self.vae = tokenizer, text_encoder, unet, vae
        self.scheduler, self.defaults, self.folder, self.low_res = scheduler, defaults, folder, low_res

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
            return given[k] if isinstance(given, list | tuple) and len(given) == n else given

        options = {k: v for k, v in options.items() if k not in ("negative", "seed", "count")}
        pictured = {name: options.pop(name) for name in ("image", "mask", "depth") if name in options}
        controls = options.pop("control", ())
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

    def prepare(
        self,
        prompt: str | Sequence[str],
        *,
        image: object = None,
        strength: float | None = None,
        mask: object = None,
        paste: bool = True,
        control: Sequence[Control] = (),
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
        depth      what a depth-to-image model keeps: (H, W), larger is nearer
        latents    (B, C, h, w) of unit variance, or a `generator` (one for a single picture, or one a picture), replace
                   what the seeds would draw
        together   False runs the halves of guidance one after the other
        tile       draw in overlapping tiles of so many pixels; an upscaler does so by itself, 0 forbids it
        network    made of `ldm.guidance`'s closures, takes the place of the UNet, and the prompts' with it

        Raises LDMError, at once, for what cannot be.
        """
        task = self.task
        tasks.check_given(task, image is not None, mask is not None, depth is not None, options)
        shown = self.pictures_of(image)
        if shown:
            own = (
                shown[0].size
                if task == "upscale"
                else pictures.choose_size(shown[0], self.default_size, self.vae.config.factor)
            )
            grown = self.vae.config.factor if task == "upscale" else 1
            width, height = width or grown * own[0], height or grown * own[1]
        elif isinstance(image, Tensor):
            width, height = (self.vae.config.factor * side for side in (image.shape[3], image.shape[2]))
        begins = image is not None and task not in ("upscale", "edit")
        if begins and strength is None:
            strength = 0.8 if mask is None else 1.0
        elif not begins and strength is not None:
            raise LDMError("strength says how much of a picture is drawn over: pass the picture as image (--image).")
        settings = self.settings(prompt, width=width, height=height, strength=strength, **options)
        schedule, noise = self.schedule_of(settings), self.noise(settings, generator)
        given, original, masks = self.given(settings, image, shown, mask, depth)
        start = self.begin(settings, schedule, noise, given, latents)
        sampler = self.sampler(settings)
        if start.known is not None:
            sampler = tasks.blended(sampler, *start.known)
        if network is None:
            seen = self.look(settings, schedule, control)
            tile = (512 if task == "upscale" else 0) if tile is None else tile
            network = self.network(settings, clip_skip, together, start.channels, seen, tile)
        decode = partial(self.decode, tile=tile or 0)

        def finish(x: Tensor) -> Result:
            images, changed = decode(x), ()
            if masks and paste:
                pairs = [(original[k % len(original)], masks[k % len(masks)]) for k in range(len(images))]
                changed = tuple(pictures.changed_outside(i, *pair) for i, pair in zip(images, pairs, strict=True))
                images = [pictures.paste(i, *pair) for i, pair in zip(images, pairs, strict=True)]
            return Result(images, x, settings, changed)

        denoise = denoiser(network, schedule.prediction)
        return Run(settings, schedule, start.x, denoise, sampler, noise, decode, finish)

    @torch.no_grad()
    def invert(
        self, image: object, prompt: str | Sequence[str], *, guidance: float = 1.0, refine: int = 5, **options
    ) -> Tensor:
        """The noise (B, C, h, w) from which DDIM draws this picture: its road walked upwards (Song et al. 2021).

        `pipe(prompt, latents=..., sampler="ddim", guidance=...)` with the same settings leads back to it, and with
        another prompt to a relative of it. `refine`: how often each step is corrected (`ldm.samplers.inverse`).
        """
        run = self.prepare(prompt, image=image, strength=0.0, guidance=guidance, sampler="ddim", **options)
        upwards = replace(
            run,
            settings=replace(run.settings, strength=None),
            schedule=run.schedule.upwards(),
            sampler=partial(ddim_inverse, refine=refine),
        )
        *_, last = upwards.steps()
        return last.x / run.schedule.start_scale

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

    # ------------------------------------------------------------------------------------------ pictures given

    def pictures_of(self, image: object) -> list[Image.Image]:
        """The caller's pictures, opened: RGB. None where latents were given, or nothing."""
        if image is None or isinstance(image, Tensor):
            if image is not None and (image.dim() != 4 or image.shape[1] != self.vae.config.latent_channels):
                raise LDMError(
                    f"image is a tensor of shape {tuple(image.shape)}: as a tensor it must be latents (B, "
                    f"{self.vae.config.latent_channels}, h, w); pass a picture as a path, a Pillow picture or an array."
                )
            return []
        return [as_picture(each, "image") for each in (image if isinstance(image, list | tuple) else [image])]

    def given(
        self, settings: Settings, image: object, shown: list[Image.Image], mask: object, depth: object
    ) -> tuple[tasks.Given, list[Image.Image], list[Image.Image]]:
        """What was given as tensors, and the pictures and masks at the size that is drawn."""
        count, factor = len(settings.seeds), self.vae.config.factor
        width, height = settings.width, settings.height
        small = factor if self.task == "upscale" else 1
        original = [pictures.fit(each, width // small, height // small) for each in shown]
        pictures.one_or_each(image if isinstance(image, Tensor) else original or [None], count, "picture")
        masks = []
        if mask is not None:
            if not shown:
                raise LDMError("A mask needs the picture itself as image: latents have no pixels to keep.")
            each = pictures.one_or_each(mask, count, "mask")
            whole = [pictures.read_mask(one, shown[k % len(shown)]) for k, one in enumerate(each)]
            masks = [pictures.fit(one, width, height, "The mask") for one in whole]
        if self.task == "depth" and depth is None:
            raise LDMError(
                "This model keeps the depth of the picture: pass it as depth, for instance of "
                "ldm.conditions.estimate_depth(picture, folder)."
            )
        return (
            tasks.Given(
                image=pictures.image_tensor(original) if original else None,
                x0=image if isinstance(image, Tensor) else None,
                mask=pictures.mask_tensor(masks) if masks else None,
                depth=None if depth is None else pictures.depth_tensor(depth, height // factor, width // factor),
            ),
            original,
            masks,
        )

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
        if self.task == "edit":
            start = tasks.begin_editing(road, given)
        elif self.task == "upscale":
            bars = alpha_bars(self.low_res).double()
            bar = float(bars[settings.noise_level])
            start = tasks.begin_upscaling(road, given, Level(0, settings.noise_level, bar**0.5, (1 - bar) ** 0.5))
        else:
            start = tasks.begin(self.task, road, given, settings.strength, nearest=settings.compat)
        finite(start.x, "the VAE's encoder")
        return start

    @torch.no_grad()
    def look(self, settings: Settings, schedule: Schedule, control: Sequence[Control]) -> list[Seen]:
        """What the ControlNets see of their pictures, computed once."""
        seen = []
        for k, each in enumerate([control] if isinstance(control, Control) else control):
            name = f"The ControlNet {k + 1} of {len(control)}" if len(control) > 1 else "The ControlNet"
            check_base(each.net.config, self.unet.config, self.vae.config, name)
            picture = each.pictures(settings.width, settings.height, len(settings.seeds))
            weight = each.net.conv_in.weight
            features = each.net.condition(picture.to(weight.device, weight.dtype))
            seen.append(Seen(each, features, each.rows(settings.first, len(schedule))))
        return seen

    # ------------------------------------------------------------------------------------------ the network

    @torch.no_grad()
    def network(
        self,
        settings: Settings,
        clip_skip: int = 0,
        together: bool = True,
        channels: Tensor | None = None,
        seen: Sequence[Seen] = (),
        tile: int = 0,
    ) -> Network:
        """The UNet told what to draw, with classifier-free guidance unless its scale is 1 or less.

        `channels` (B, C', h, w) are what it reads behind the latent; of a model that edits, only the guided parts do.
        """
        if tile and seen:
            raise LDMError(
                "Tiles and ControlNets don't go together: the net sees its picture whole. Leave one of them out."
            )
        cond = self.encode(settings.prompt, clip_skip)
        if settings.guidance <= 1:
            if any(settings.negative):
                say_on_stderr("Without guidance (1 or less) the negative prompt does nothing.")
            return self.part(settings, [cond], [channels], seen, tile)
        uncond = self.encode(settings.negative)  # as in diffusers, clip_skip is the prompt's alone
        contexts, beside = [uncond, cond], [channels, channels]
        if self.task == "edit":
            contexts, beside = [uncond, uncond, cond], [torch.zeros_like(channels), channels, channels]
        if together:
            halves = halves_together(self.part(settings, contexts, beside, seen, tile), len(contexts))
        else:
            each = zip(contexts, beside, strict=True)
            last = len(contexts) - 1
            halves = halves_apart(
                *(self.part(settings, [c], [b], seen, tile, k == last) for k, (c, b) in enumerate(each))
            )
        if self.task == "edit":
            return text_and_image(halves, settings.guidance, settings.image_guidance)
        return classifier_free(halves, settings.guidance)

    def part(
        self,
        settings: Settings,
        contexts: Sequence[Tensor],
        channels: Sequence[Tensor | None],
        seen: Sequence[Seen],
        tile: int,
        last: bool = True,
    ) -> Network:
        """One run of the UNet for one part of guidance, or for several of them in a batch."""
        context = torch.cat(list(contexts))
        labels = None
        if settings.noise_level is not None:
            labels = torch.full((len(context),), settings.noise_level, device=self.device)
        network = conditional(self.unet, context, Extras(class_labels=labels), lead(seen, contexts, last))
        if tile:
            size = max(tile // self.vae.config.factor, OVERLAP)
            network = tiled(network, size, size // OVERLAP)
        return network if channels[0] is None else joined(network, torch.cat(list(channels)))

    @torch.no_grad()
    def decode(self, x0: Tensor, tile: int = 0) -> list[Image.Image]:
        """Clean latents (B, C, h, w) -> PIL pictures. Raises LDMError rather than paint NaN black.

        `tile`: decode in overlapping tiles of so many pixels; 0 is all at once.
        """
        x0 = finite(x0, "the latents").to(self.vae.dtype)
        factor = self.vae.config.factor
        size = max(tile // factor, OVERLAP) if tile else max(x0.shape[2:])
        image = finite(in_tiles(self.vae.decode, x0, size, size // OVERLAP, factor), "the VAE's decoder")
        pixels = ((image / 2 + 0.5).clamp(0, 1).float() * 255).round().byte()  # (B, 3, H, W)
        return [Image.fromarray(p) for p in pixels.permute(0, 2, 3, 1).cpu().numpy()]

    # ------------------------------------------------------------------------------------------ what it is

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

    def settings(self, prompt: str | Sequence[str], **options) -> Settings:
        """Fill in every default, and refuse with a sentence what cannot be drawn: `ldm.settings.choose_settings`."""
        noise_levels = self.unet.config.num_class_embeds or 0
        known = Model(
            self.scheduler, self.defaults, self.task, self.vae.config.factor, self.default_size, noise_levels
        )  # fmt: skip
        return choose_settings(known, prompt, **options)
