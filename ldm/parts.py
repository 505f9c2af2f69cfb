"""A model taken apart: its tokenizers, networks and schedule, and what they tell of what it is."""

from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from ldm import tasks
from ldm.errors import LDMError
from ldm.lora.applied import Applied, loras_on
from ldm.models.flux import Flux
from ldm.models.patches import PATCH
from ldm.models.unet import UNet
from ldm.models.vae import VAE
from ldm.precision import autocasting
from ldm.schedules import ScheduleConfig
from ldm.settings import Defaults, Model, flux_defaults
from ldm.text.clip import TextEncoder
from ldm.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from ldm.text.embeddings import Embedding
    from ldm.text.t5 import T5Encoder
    from ldm.text.t5_tokenizer import T5Tokenizer


class Parts:
    """The parts of a latent diffusion model, each usable alone, and what can be told of them.

    `tokenizer`, `text_encoder`, `vae` are the parts, with a `unet`, or the `transformer` of FLUX in its place;
    `scheduler` is what the schedule is made of. `backbone` is whichever of the two there is.

    defaults                       None: as FLUX's family is drawn; with a UNet Defaults()
    low_res, max_noise_level       of an upscaler: the schedule of the noise on its small picture, and the most of it
    tokenizer_2, text_encoder_2    of SDXL, whose refiner has the second ones alone: they are its first here; of FLUX T5
    zero_negative                  where no negative prompt is given, zeros take its place (SDXL)

    Raises LDMError without a VAE, and for neither or both of the two networks.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        text_encoder: TextEncoder,
        unet: UNet | None = None,
        vae: VAE | None = None,
        scheduler: ScheduleConfig = ScheduleConfig(),
        defaults: Defaults | None = None,
        folder: Path | None = None,
        low_res: ScheduleConfig | None = None,
        max_noise_level: int | None = None,
        *,
        transformer: Flux | None = None,
        tokenizer_2: "Tokenizer | T5Tokenizer | None" = None,
        text_encoder_2: "TextEncoder | T5Encoder | None" = None,
        zero_negative: bool = False,
    ):
        if vae is None:
            raise LDMError("A pipeline is made of a VAE, too, which turns latents into pictures: pass it as vae.")
        if (unet is None) == (transformer is None):
            raise LDMError("A pipeline is made of either a unet or, of FLUX, a transformer: pass one of them.")
        if defaults is None:
            # The levels stay the scheduler's, should it say which.
            defaults = Defaults() if transformer is None else replace(flux_defaults(transformer.config), sigmas=None)
        if transformer is not None and defaults.sigmas is None and scheduler.sigmas == "spaced":
            defaults = replace(defaults, sigmas="even")  # as FLUX's own program spaces them, and diffusers' pipelines
        self.tokenizer, self.text_encoder, self.vae = tokenizer, text_encoder, vae
        self.unet, self.transformer = unet, transformer
        self.scheduler, self.defaults, self.folder = scheduler, defaults, folder
        self.low_res, self.max_noise_level = low_res, max_noise_level
        self.tokenizer_2, self.text_encoder_2, self.zero_negative = tokenizer_2, text_encoder_2, zero_negative
        self.where: torch.device | None = None  # what computes, if parts are kept elsewhere (`ldm.memory.offload`)
        self.autocast: torch.dtype | None = None  # what is computed in, if it isn't the weights' own (`ldm.memory`)
        self.watchers = []  # what looks on at the steps of every run: `ldm.lab.watch` comes and goes
        self.embeddings: dict[str, Embedding] = {}

    def parts(self) -> dict[str, nn.Module]:
        """The networks, by name, in the order of the road."""
        names = ("text_encoder", "text_encoder_2", "unet", "transformer", "vae")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    @property
    def backbone(self) -> UNet | Flux:
        """The network that is asked at every step: the UNet, or FLUX's transformer."""
        return self.transformer if self.unet is None else self.unet

    @property
    def flux(self) -> bool:
        """Whether it is FLUX: a transformer, that goes in straight lines from noise to picture."""
        return self.transformer is not None

    @property
    def loras(self) -> tuple[Applied, ...]:
        """The LoRAs on the networks, in the order of their coming (`ldm.added`): they lie there, and not here."""
        return loras_on(self.parts().values())

    def precision(self) -> AbstractContextManager:
        """What every station computes under: nothing, unless `autocast` is set."""
        return autocasting(self.autocast, self.device)

    @property
    def device(self) -> torch.device:
        """What computes."""
        return next(self.backbone.parameters()).device if self.where is None else self.where

    @property
    def xl(self) -> bool:
        """Whether it is SDXL, or its refiner: the UNet is told a pooled vector and sizes."""
        return not self.flux and self.unet.config.is_xl

    @property
    def told_sizes(self) -> str | None:
        """What the UNet is told of sizes (`ldm.sizes`): nothing, with SDXL's "target", or with a refiner's "score"."""
        if not self.xl:
            return None
        pooled = (self.text_encoder_2 or self.text_encoder).config.projection_dim
        config = self.unet.config
        numbers = (config.projection_class_embeddings_input_dim - pooled) // config.addition_time_embed_dim
        return "score" if numbers == 5 else "target"

    @property
    def distilled(self) -> bool:
        """Whether the network is told the scale of guidance, and needs no second half for it (LCM, FLUX.1-dev)."""
        config = self.backbone.config
        return config.guidance_embeds if self.flux else config.time_cond_proj_dim is not None

    @property
    def dtype(self) -> torch.dtype:
        return self.backbone.dtype

    @property
    def task(self) -> str:
        """What the network is made for, by the channels it reads beside the latent (`ldm.tasks`)."""
        config = self.backbone.config
        reads = config.channels_in if self.flux else config.in_channels
        vae = self.vae.config
        return tasks.task_of(reads, vae.latent_channels, vae.factor if self.flux else None)

    @property
    def default_size(self) -> int:
        """Pixels along a side of the pictures the model was trained on; of FLUX `ldm.json` alone may say it."""
        if self.flux:
            return self.defaults.width or 128 * self.vae.config.factor
        return (self.unet.config.sample_size or 64) * self.vae.config.factor

    @property
    def most_tokens(self) -> int | None:
        """The most that `max_sequence_length` can be, of FLUX: T5 was trained with it on 512, CLIP alone knows 77."""
        if not self.flux:
            return None
        return self.tokenizer.max_length if self.text_encoder_2 is None else 512

    @property
    def model(self) -> Model:
        """What the settings of a run must fit."""
        noise_levels = 0 if self.flux else self.unet.config.num_class_embeds or 0
        if self.max_noise_level is not None:
            noise_levels = min(noise_levels, self.max_noise_level + 1)
        factor = self.vae.config.factor
        return Model(
            self.scheduler, self.defaults, self.task, factor, self.default_size, noise_levels, self.told_sizes,
            self.zero_negative, PATCH if self.flux else 1, self.distilled, self.most_tokens,
        )  # fmt: skip
