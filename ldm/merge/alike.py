"""Whether two models are of one kind, so that a mean of their weights is a model: told by all that is known of them.

Two that were trained apart from the beginning have weights of the same shapes, and their mean is noise; nothing in the
files tells that. Models of the published families go back to the same first ones.
"""

from collections.abc import Iterator
from dataclasses import fields

from ldm.convert.writing import Source
from ldm.errors import LDMError
from ldm.io.misfits import CONTEXT_WIDTHS, INPUT_CHANNELS
from ldm.models.unet import UNetConfig
from ldm.schedules import ScheduleConfig

# What may differ: of no network's numbers, and A's counts.
IDLE = {
    "unet": {"sample_size", "upcast_attention", "in_channels"},  # channels are compared by themselves
    "vae": {"sample_size", "force_upcast"},
    "text_encoder": {"bos_token_id", "eos_token_id", "pad_token_id", "projection_dim"},  # that of one is in its shapes
}
IDLE["text_encoder_2"] = IDLE["text_encoder"]
NOISE = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas")  # what it was trained on


def check_alike(a: Source, b: Source, channels: bool = True) -> None:
    """Raise LDMError that names the first difference that matters.

    `channels`: whether the UNets must read as many, as for a mean; a difference of two others may be added to one that
    reads more beside the latent.
    """
    found = next(differences(a, b, channels), None)
    if found is not None:
        raise LDMError(f"{a.place} and {b.place} can't be merged: {found}.")


def differences(a: Source, b: Source, channels: bool) -> Iterator[str]:
    """What is different, the most important first."""
    one, two = a.configs["unet"], b.configs["unet"]
    if (family(one), one.cross_attention_dim) != (family(two), two.cross_attention_dim):
        yield f"the first is {family(one)}, the second {family(two)}"
    if one.in_channels != two.in_channels and (channels or one.in_channels < two.in_channels):
        read = [f"{n} channels ({INPUT_CHANNELS.get(n, 'unknown')})" for n in (one.in_channels, two.in_channels)]
        more = "" if one.in_channels < two.in_channels else (
            "; what the second is beyond its base can be added to the first (--add-difference)"
        )  # fmt: skip
        yield f"the first one's UNet reads {read[0]}, the second one's {read[1]}{more}"
    first, second = a.model.scheduler, b.model.scheduler
    if first.prediction_type != second.prediction_type:
        yield f"the first one's UNet predicts {first.prediction_type}, the second one's {second.prediction_type}"
    if a.configs.keys() != b.configs.keys():
        yield f"the first has {', '.join(a.configs)}, the second {', '.join(b.configs)}"
    for part in a.configs:
        for name in (field.name for field in fields(a.configs[part]) if field.name not in IDLE[part]):
            values = [getattr(each.configs[part], name) for each in (a, b)]
            if values[0] != values[1]:
                yield f"the first one's {part} has {name} {values[0]}, the second one's {values[1]}"
    for name, tokenizer in a.model.tokenizers.items():
        other = b.model.tokenizers[name]
        if tokenizer.ids != other.ids or tokenizer.ranks != other.ranks:
            yield f"their {name}s spell words otherwise, so that their text encoders know other words"
    yield from noise(first, second)


def family(config: UNetConfig) -> str:
    """A model's family, in words."""
    width = config.cross_attention_dim
    if config.is_xl != (width in (1280, 2048)) or width not in CONTEXT_WIDTHS:
        return f"{'SDXL' if config.is_xl else 'Stable Diffusion'}'s kind, with a context of width {width}"
    return CONTEXT_WIDTHS[width]


def noise(first: ScheduleConfig, second: ScheduleConfig) -> Iterator[str]:
    """How the levels of noise differ that the two were trained on."""
    for name in NOISE:
        if getattr(first, name) != getattr(second, name):
            yield f"the first was trained with {name} {getattr(first, name)}, the second with {getattr(second, name)}"
