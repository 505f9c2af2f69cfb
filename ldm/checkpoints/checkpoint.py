"""A model's configurations, tokenizers and tensors before a number is read: what a folder and a single file share."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from ldm.checkpoints.names import CLASSES
from ldm.config import building
from ldm.errors import LDMError
from ldm.io.weights import Tensors, blank
from ldm.models.flux import Flux, FluxConfig
from ldm.models.unet import UNet, UNetConfig
from ldm.models.vae import VAE, VAEConfig
from ldm.schedules import ScheduleConfig
from ldm.settings import Defaults, flux_defaults
from ldm.tasks import task_of
from ldm.text.clip import TextConfig, TextEncoder
from ldm.text.t5 import T5Config
from ldm.text.t5_tokenizer import T5Tokenizer
from ldm.text.tokenizer import Tokenizer


class Kind(NamedTuple):
    """A network's class, what reads its configuration, and the stem of its file in a folder.

    Of a configuration that was read `CLASSES` knows the network's class for sure.
    """

    network: type[nn.Module]
    config: type
    stem: str


class SecondText:
    """The second text encoder: SDXL's is CLIP, FLUX's is T5, as the file itself says."""

    @staticmethod
    def from_json(fields: dict) -> TextConfig | T5Config:
        """Read transformers' JSON, of whichever it is."""
        named = fields.get("architectures") or [fields.get("model_type")]
        return (T5Config if "t5" in str(named).lower() else TextConfig).from_json(fields)


STEM = "diffusion_pytorch_model"
NETWORKS = {
    "text_encoder": Kind(TextEncoder, TextConfig, "model"),
    "text_encoder_2": Kind(TextEncoder, SecondText, "model"),
    "unet": Kind(UNet, UNetConfig, STEM),
    "transformer": Kind(Flux, FluxConfig, STEM),
    "vae": Kind(VAE, VAEConfig, STEM),
}


@dataclass(frozen=True)
class Checkpoint:
    """`configs`, `tokenizers` and `weights` are by the names of a folder's parts; weights are asked for by part, under
    the names that our modules have.

    `doubt`: why the scheduler's prediction type is not known, which is then to be tried out
    (`ldm.checkpoints.prediction`); None where a file says it. `usual`: why the scheduler's is the likely one all the
    same, in words; "" where there is no likely one. `otherwise`: what else is another if the network predicts
    something else, as of Stable Diffusion 2: the scheduler, and the size of its pictures.
    """

    place: Path
    configs: Mapping[str, Any]
    tokenizers: Mapping[str, Tokenizer | T5Tokenizer]
    weights: Callable[[str], Tensors]
    scheduler: ScheduleConfig
    defaults: Defaults
    low_res: ScheduleConfig | None = None
    index: Mapping[str, Any] = field(default_factory=dict)  # remarks of model_index.json
    doubt: str | None = None
    usual: str = ""
    otherwise: Mapping[str, tuple[ScheduleConfig, int | None]] = field(default_factory=dict)

    @property
    def backbone(self) -> UNetConfig | FluxConfig:
        """The configuration of what predicts."""
        return backbone_of(self.configs)

    def predicting(self, prediction_type: str) -> "Checkpoint":
        """The same, of a network that is known to predict that."""
        if "unet" not in self.configs:
            return replace(self, scheduler=replace(self.scheduler, prediction_type=prediction_type), doubt=None)
        unet = self.configs["unet"]
        scheduler, size = self.otherwise.get(prediction_type, (self.scheduler, unet.sample_size))
        return replace(
            self,
            scheduler=replace(scheduler, prediction_type=prediction_type),
            configs={**self.configs, "unet": replace(unet, sample_size=size)},
            doubt=None,
        )


def blank_part(name: str, config: Any) -> nn.Module:
    """The part's network, without numbers. Raises LDMError for a configuration that makes none."""
    with building(f"the {name}"), blank():
        return CLASSES[type(config)](config)


def backbone_of(configs: Mapping[str, Any]) -> UNetConfig | FluxConfig | None:
    """The configuration of the UNet or the transformer, if there is one."""
    return configs.get("transformer", configs.get("unet"))


def task_of_parts(configs: Mapping[str, Any]) -> str | None:
    """What a whole model is for, by the channels its network reads; None if ldm knows no such task."""
    network, vae = backbone_of(configs), configs["vae"]
    if isinstance(network, FluxConfig):
        return task_of(network.channels_in, vae.latent_channels, vae.factor)
    return task_of(network.in_channels, vae.latent_channels)


def family_defaults(unet: UNetConfig | FluxConfig | None) -> Defaults:
    """Steps and guidance where a model says nothing of them: those of its family in diffusers."""
    if isinstance(unet, FluxConfig):
        return flux_defaults(unet)
    if unet is not None and unet.time_cond_proj_dim is not None:
        return Defaults(steps=4, guidance=8.5)  # LCM
    return Defaults(guidance=5.0) if unet is not None and unet.is_xl else Defaults()


def check_fit(checkpoint: Checkpoint) -> None:
    """Refuse parts of different models, and UNets that ask for more than ldm tells them, before a weight is read."""
    folder, configs = checkpoint.place, checkpoint.configs
    if "transformer" in configs:
        return check_flux(checkpoint)
    unet, vae = configs["unet"], configs["vae"]
    task, xl = task_of(unet.in_channels, vae.latent_channels), unet.is_xl
    texts = [configs[name] for name in ("text_encoder", "text_encoder_2") if name in configs]
    check_remarks(folder, checkpoint.index)
    if unet.num_class_embeds is not None and task != "upscale":
        raise LDMError(f"{folder}: the UNet asks for more than a prompt (num_class_embeds), which ldm doesn't give it.")
    faults = []
    for tokenizer, text in zip(checkpoint.tokenizers.values(), texts, strict=True):
        faults += check_words(tokenizer, text)
    width, wanted = sum(text.hidden_size for text in texts), unet.cross_attention_dim
    if width != wanted:
        speak = "the text encoder speaks" if len(texts) == 1 else "the two text encoders together speak"
        faults.append(f"{speak} vectors of {width} numbers, the UNet reads {wanted}")
    if task is None or unet.out_channels != vae.latent_channels:
        inner = f"{unet.in_channels} channels and returns {unet.out_channels}"
        faults.append(f"the UNet takes {inner}, the VAE's latents have {vae.latent_channels}")
    if task == "upscale" and (unet.num_class_embeds is None or checkpoint.low_res is None):
        faults.append("the UNet upscales, which takes noise levels (num_class_embeds) and a low_res_scheduler")
    faults += check_xl(texts, unet, checkpoint.index) if xl else ["only SDXL has two text encoders"] * (len(texts) > 1)
    if faults:
        raise LDMError(f"{folder}: {'; '.join(faults)}: these parts don't belong together.")


def check_words(tokenizer: Tokenizer, text: TextConfig) -> list[str]:
    """What is wrong with a tokenizer beside CLIP's text encoder that reads it."""
    ids, length = 1 + max(tokenizer.ids.values()), tokenizer.max_length
    if ids <= text.vocab_size and length <= text.max_position_embeddings:
        return []
    known = f"{text.max_position_embeddings} of {text.vocab_size} kinds"
    return [f"the tokenizer writes {length} tokens of {ids} kinds, the text encoder reads {known}"]


def check_flux(checkpoint: Checkpoint) -> None:
    """`check_fit` of FLUX's parts."""
    folder, configs = checkpoint.place, checkpoint.configs
    transformer, vae, clip = configs["transformer"], configs["vae"], configs["text_encoder"]
    t5 = configs.get("text_encoder_2")
    check_remarks(folder, checkpoint.index)
    faults = check_words(checkpoint.tokenizers["tokenizer"], clip)
    if t5 is not None and not isinstance(t5, T5Config):
        faults.append("its second text encoder is CLIP, FLUX's is T5")
    elif t5 is not None and (ids := 1 + max(checkpoint.tokenizers["tokenizer_2"].ids.values())) > t5.vocab_size:
        faults.append(f"the second tokenizer writes {ids} kinds of tokens, its text encoder reads {t5.vocab_size}")
    speaker, width = ("T5", t5.d_model) if isinstance(t5, T5Config) else ("the text encoder", clip.hidden_size)
    if width != transformer.joint_attention_dim:
        reads = transformer.joint_attention_dim
        faults.append(f"{speaker} speaks vectors of {width} numbers, the transformer reads {reads}")
    pooled = clip.projection_dim if clip.with_projection else clip.hidden_size
    if pooled != transformer.pooled_projection_dim:
        reads = transformer.pooled_projection_dim
        faults.append(f"the text encoder's pooled vector has {pooled} numbers, the transformer reads {reads}")
    latent, taken, given = vae.latent_channels, transformer.channels_in, transformer.channels_out
    if given != latent or task_of_parts(configs) is None:
        inner = f"{taken} channels and returns {given}"
        faults.append(f"the transformer takes {inner}, the VAE's latents have {latent}")
    if checkpoint.scheduler.rule != "flow":
        faults.append("its scheduler isn't one of flow matching, as FLUX needs")
    if faults:
        raise LDMError(f"{folder}: {'; '.join(faults)}: these parts don't belong together.")


def check_remarks(folder: Path, index: Mapping[str, Any]) -> None:
    """Refuse what model_index.json can't mean by the remarks beside the parts; that they fit is `check_xl`'s."""
    for name, kind in (("max_noise_level", int), ("force_zeros_for_empty_prompt", bool)):
        value = index.get(name, kind())
        if type(value) is not kind or value < 0:
            wanted = "a whole number from 0 on" if kind is int else "true or false"
            raise LDMError(
                f"{folder}: model_index.json says {name} {value!r}, and it is {wanted}: take the model's own file."
            )


def check_xl(texts: Sequence[TextConfig], unet: UNetConfig, index: Mapping[str, Any]) -> list[str]:
    """What is wrong with the pooled vector and the numbers that SDXL's UNet is told."""
    if not texts or not texts[-1].with_projection:
        return ["SDXL's UNet reads a pooled vector, and the last text encoder has no projection that makes one"]
    pooled, width = texts[-1].projection_dim, unet.addition_time_embed_dim or 0
    rest = (unet.projection_class_embeddings_input_dim or 0) - pooled
    if rest not in (5 * width, 6 * width) or not width:
        return [
            f"the UNet reads {unet.projection_class_embeddings_input_dim} numbers beside the text, which is neither "
            f"{pooled} + 6 x {width} (SDXL) nor {pooled} + 5 x {width} (its refiner)"
        ]
    scored = index.get("requires_aesthetics_score", rest == 5 * width)
    if scored != (rest == 5 * width):
        return [f"model_index.json says requires_aesthetics_score {scored}, and the UNet reads {rest // width} numbers"]
    return []
