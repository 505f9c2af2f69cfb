"""A model taken apart: its tokenizers, networks and schedule, and what they tell of what it is."""

from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from ldm import tasks
from ldm.lora.applied import Applied, loras_on
from ldm.models.unet import UNet
from ldm.models.vae import VAE
from ldm.precision import autocasting
from ldm.schedules import ScheduleConfig
from ldm.settings import Defaults, Model
from ldm.text.clip import TextEncoder
from ldm.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from ldm.text.embeddings import Embedding


class Parts:
    """The parts of a latent diffusion model, each usable alone, and what can be told of them.

    `tokenizer`, `text_encoder`, `unet`, `vae` are the parts, `scheduler` what the schedule is made of.

    low_res, max_noise_level       of an upscaler: the schedule of the noise on its small picture, and the most of it
    tokenizer_2, text_encoder_2    of SDXL, whose refiner has the second ones alone: they are its first here
    zero_negative                  where no negative prompt is given, zeros take its place (SDXL)
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
        *,
        tokenizer_2: Tokenizer | None = None,
        text_encoder_2: TextEncoder | None = None,
        zero_negative: bool = False,
    ):
        self.tokenizer, self.text_encoder, self.unet, self.vae = tokenizer, text_encoder, unet, vae
        self.scheduler, self.defaults, self.folder = scheduler, defaults, folder
        self.low_res, self.max_noise_level = low_res, max_noise_level
        self.tokenizer_2, self.text_encoder_2, self.zero_negative = tokenizer_2, text_encoder_2, zero_negative
        self.where: torch.device | None = None  # what computes, if parts are kept elsewhere (`ldm.memory.offload`)
        self.autocast: torch.dtype | None = None  # what is computed in, if it isn't the weights' own (`ldm.memory`)
        self.watchers = []  # what looks on at the steps of every run: `ldm.lab.watch` comes and goes
        self.embeddings: dict[str, Embedding] = {}

    def parts(self) -> dict[str, nn.Module]:
        """The networks, by name, in the order of the road."""
        names = ("text_encoder", "text_encoder_2", "unet", "vae")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

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
        return self.unet.conv_in.weight.device if self.where is None else self.where

    @property
    def xl(self) -> bool:
        """Whether it is SDXL, or its refiner: the UNet is told a pooled vector and sizes."""
        return self.unet.config.is_xl

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
        """Whether the UNet is told the scale of guidance, and needs no second half for it (LCM)."""
        return self.unet.config.time_cond_proj_dim is not None

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
        return Model(
            self.scheduler, self.defaults, self.task, factor, self.default_size, noise_levels, self.told_sizes,
            self.zero_negative,
        )  # fmt: skip
