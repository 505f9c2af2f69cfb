"""From a sentence to a picture: encode the words, draw noise, walk down the schedule, decode.

    pipe = ldm.load("scenes")
    pipe("a large red house on snow at night", seed=7).images[0]

    for step in pipe.steps("a large red house on snow at night", seed=7):
        show(pipe.decode(step.x0))

Each station of the road is a method of `Pipeline`, and each part is usable alone.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from numbers import Integral, Real
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from ldm.errors import LDMError, say_on_stderr
from ldm.guidance import Network, classifier_free, conditional, denoiser, halves_apart, halves_together
from ldm.models.unet import UNet
from ldm.models.vae import VAE
from ldm.noise import Noise
from ldm.samplers import SAMPLERS, find_sampler
from ldm.sampling import Sampler, Step, sample
from ldm.schedules import Schedule, ScheduleConfig
from ldm.settings import Defaults, Settings, choose_levels, whole
from ldm.text.clip import TextEncoder
from ldm.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Result:
    """`images`: PIL pictures, prompt by prompt, `count` of each. `x0` (B, C, h, w): the latents decoded to them."""

    images: list[Image.Image]
    x0: Tensor
    settings: Settings


class Pipeline:
    """The parts of a latent diffusion model, each usable alone, and the road through them.

    `tokenizer`, `text_encoder`, `unet`, `vae` are the parts; `schedule(n)` makes the table for n steps.
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
    ):
        self.tokenizer, self.text_encoder, self.unet, self.vae = tokenizer, text_encoder, unet, vae
        self.scheduler, self.defaults, self.folder = scheduler, defaults, folder

    # ------------------------------------------------------------------------------------------ the road

    def __call__(self, prompt: str | Sequence[str], *, one_by_one: bool = False, **options) -> Result:
        """Draw pictures; the options are those of `steps`.

        `one_by_one` draws each picture of the batch alone: slower, and its bits don't depend on the others.
        """
        settings = self.settings(prompt, **{k: v for k, v in options.items() if k in SETTINGS})
        if one_by_one and len(settings.seeds) > 1:
            return self._one_by_one(settings, options)
        *_, last = chain(options.get("after", ()), self.steps(prompt, **options))  # a finished run takes no step more
        return Result(self.decode(last.x), last.x, settings)

    def _one_by_one(self, settings: Settings, options: dict) -> Result:
        of_a_batch = ("latents", "generator", "network")
        if options.get("after") or any(options.get(name) is not None for name in of_a_batch):
            raise LDMError(
                "one_by_one begins each picture from its seed: pass no latents, generator, after or network with it."
            )
        options = {k: v for k, v in options.items() if k not in ("negative", "seed", "count")}
        results = [
            self(prompt, negative=negative, seed=seed, **options)
            for prompt, negative, seed in zip(settings.prompt, settings.negative, settings.seeds, strict=True)
        ]
        images = [image for result in results for image in result.images]
        return Result(images, torch.cat([result.x0 for result in results]), settings)

    def steps(
        self,
        prompt: str | Sequence[str],
        *,
        negative: str | Sequence[str] = "",
        seed: int = 0,
        steps: int | None = None,
        guidance: float | None = None,
        sampler: str | None = None,
        eta: float | None = None,
        rule: str | None = None,
        sigmas: str | Sequence[float] | None = None,
        timesteps: Sequence[float] | None = None,
        compat: bool = False,
        width: int | None = None,
        height: int | None = None,
        count: int = 1,
        clip_skip: int = 0,
        latents: Tensor | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        after: Sequence[Step] = (),
        together: bool = True,
        network: Network | None = None,
    ) -> Iterator[Step]:
        """The steps of a run, each yielded as it is taken (`ldm.sampling.Step`); nothing is hidden between them.

        Pictures: `count` for each prompt, with seeds seed, seed + 1, ... `latents` (B, C, h, w) of unit variance, or a
        `generator` (one for the batch's single picture, or one a picture), replace what the seeds would draw.
        `guidance` 1 or less runs the conditional model alone, in which `negative` has no part. `after=steps[:k]` goes
        on from steps of an earlier run. `together` False runs the two halves of guidance one after the other.
        `rule`, `sigmas`, `timesteps` choose the noise levels (`ldm.schedules.make_schedule`); `compat` does what
        diffusers does where it departs from a method, and takes the rule of the sampler's class there. A `network`
        made of `ldm.guidance`'s closures takes the place of the UNet, and the prompts' with it.
        Raises LDMError, at once, for what cannot be.
        """
        settings = self.settings(
            prompt, negative=negative, seed=seed, steps=steps, guidance=guidance, sampler=sampler, eta=eta,
            rule=rule, sigmas=sigmas, timesteps=timesteps, compat=compat, width=width, height=height, count=count,
        )  # fmt: skip
        schedule, sampler = self.schedule_of(settings), self.sampler(settings)
        noise = self.noise(settings, generator)
        x = self.start(settings, schedule, noise, latents)
        network = self.network(settings, clip_skip, together) if network is None else network
        denoise = denoiser(network, schedule.prediction)
        return watched(sample(denoise, x, schedule, sampler, noise, after))

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

    def start(self, settings: Settings, schedule: Schedule, noise: Noise, latents: Tensor | None = None) -> Tensor:
        """The first latent: noise, or the caller's `latents`, times the schedule's `start_scale`."""
        shape = self.vae.latent_shape(settings.height, settings.width)
        if latents is None:
            latents = noise.draw(shape)
        elif latents.shape != (len(settings.seeds), *shape):
            wanted = (len(settings.seeds), *shape)
            raise LDMError(f"latents of shape {tuple(latents.shape)} given; these settings need {wanted}.")
        elif not torch.isfinite(latents).all():
            raise LDMError("The latents given hold numbers that are not finite (NaN or infinity).")
        if schedule[0].sigma < 0.9 and (settings.timesteps is not None or not isinstance(settings.sigmas, str)):
            say_on_stderr(
                f"The first level holds {schedule[0].sigma:.2f} of noise, and the run begins from noise alone: what is "
                "above that level is left out."
            )
        return latents.to(self.device, self.dtype) * schedule.start_scale

    @torch.no_grad()
    def network(self, settings: Settings, clip_skip: int = 0, together: bool = True) -> Network:
        """The UNet told what to draw, with classifier-free guidance unless its scale is 1 or less."""
        cond = self.encode(settings.prompt, clip_skip)
        if settings.guidance <= 1:
            if any(settings.negative):
                say_on_stderr("Without guidance (1 or less) the negative prompt does nothing.")
            return conditional(self.unet, cond)
        uncond = self.encode(settings.negative)  # as in diffusers, clip_skip is the prompt's alone
        if together:
            halves = halves_together(conditional(self.unet, torch.cat([uncond, cond])))
        else:
            halves = halves_apart(conditional(self.unet, uncond), conditional(self.unet, cond))
        return classifier_free(halves, settings.guidance)

    def sampler(self, settings: Settings) -> Sampler:
        """The function of the sampler's name, told `eta` if it has that choice."""
        method = find_sampler(settings.sampler)
        return method.step if method.eta is None else partial(method.step, eta=settings.eta)

    @torch.no_grad()
    def decode(self, x0: Tensor) -> list[Image.Image]:
        """Clean latents (B, C, h, w) -> PIL pictures. Raises LDMError rather than paint NaN black."""
        image = finite(self.vae.decode(finite(x0, "the latents").to(self.vae.dtype)), "the VAE's decoder")
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
    def default_size(self) -> int:
        """Pixels along a side of the pictures the model was trained on."""
        return (self.unet.config.sample_size or 64) * self.vae.config.factor

    def settings(
        self,
        prompt: str | Sequence[str],
        *,
        negative: str | Sequence[str] = "",
        seed: int = 0,
        steps: int | None = None,
        guidance: float | None = None,
        sampler: str | None = None,
        eta: float | None = None,
        rule: str | None = None,
        sigmas: str | Sequence[float] | None = None,
        timesteps: Sequence[float] | None = None,
        compat: bool = False,
        width: int | None = None,
        height: int | None = None,
        count: int = 1,
    ) -> Settings:
        """Fill in every default, and refuse with a sentence what cannot be drawn."""
        d = self.defaults
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        negatives = [negative] * len(prompts) if isinstance(negative, str) else list(negative)
        if not prompts or len(negatives) != len(prompts):
            raise LDMError(
                f"{len(prompts)} prompts and {len(negatives)} negative ones given: one negative for all, or one each."
            )
        seed, count = whole("seed", seed, 0, 2**63), whole("count", count, 1)
        guidance = d.guidance if guidance is None else guidance
        if not isinstance(guidance, Real) or not math.isfinite(guidance):
            raise LDMError(f"guidance must be a finite number, not {guidance!r}.")
        levels = choose_levels(
            self.scheduler, d, steps=steps, sampler=sampler, rule=rule, sigmas=sigmas, timesteps=timesteps,
            compat=compat,
        )  # fmt: skip
        own = find_sampler(levels.sampler).eta
        if eta is not None and not (isinstance(eta, Real) and 0 <= eta <= 1):
            raise LDMError(f"eta must be a number from 0 to 1, not {eta!r}.")
        if eta and own is None:
            able = " and ".join(name for name, method in SAMPLERS.items() if method.eta is not None)
            raise LDMError(f"{levels.sampler} has no eta, {able} have: take one of these samplers, or leave eta out.")
        width = width if width is not None else d.width or self.default_size
        height = height if height is not None else d.height or self.default_size
        factor = self.vae.config.factor
        for name, pixels in (("width", width), ("height", height)):
            if not isinstance(pixels, Integral) or pixels < factor or pixels % factor:
                raise LDMError(
                    f"{name} must be a multiple of {factor}, not {pixels}: a latent stands for {factor} pixels."
                )
        n = len(prompts) * count
        return Settings(
            **vars(levels),
            prompt=tuple(p for p in prompts for _ in range(count)),
            negative=tuple(p for p in negatives for _ in range(count)),
            seeds=tuple(range(seed, seed + n)),
            guidance=guidance,
            eta=eta if eta is not None else own or 0.0,
            width=width,
            height=height,
        )


SETTINGS = (
    "negative", "seed", "steps", "guidance", "sampler", "eta", "rule", "sigmas", "timesteps", "compat", "width",
    "height", "count",
)  # fmt: skip


def watched(steps: Iterator[Step]) -> Iterator[Step]:
    """The same steps, each seen to be finite."""
    for step in steps:
        finite(step.x, f"the UNet, in step {step.i + 1}")
        yield step


def finite(x: Tensor, what: str) -> Tensor:
    """`x` itself, or an LDMError that names who made it not a number: never a black picture."""
    if not torch.isfinite(x).all():
        raise LDMError(
            f"{what} returned numbers that are not finite (NaN or infinity). In half precision, try float32 "
            "(--dtype float32); otherwise the weights are damaged."
        )
    return x
