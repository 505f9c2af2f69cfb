"""What is told of a model by its configurations, in words: its family, how it draws, and the line that uses it."""

from collections.abc import Mapping
from shlex import quote
from typing import Any

from ldm.checkpoints.architectures import PUBLISHED
from ldm.checkpoints.checkpoint import task_of_parts
from ldm.checkpoints.fit import CONFIGS
from ldm.checkpoints.places import CONFIG, embedded
from ldm.checkpoints.recognise import of_transformer
from ldm.schedules import ScheduleConfig
from ldm.settings import Defaults
from ldm.text.t5 import T5Config

TELLING = {  # the fields by which published models are told apart
    "unet": ("in_channels", "block_out_channels", "down_block_types", "cross_attention_dim", "heads",
             "num_class_embeds", "transformer_layers_per_block", "projection_class_embeddings_input_dim"),
    "transformer": ("in_channels", "out_channels", "num_layers", "num_single_layers", "width", "joint_attention_dim",
                    "guidance_embeds"),
    "text": ("hidden_size", "num_hidden_layers", "hidden_act"),
    "t5": ("d_model", "d_ff", "num_layers"),
    "vae": ("block_out_channels", "latent_channels"),
}  # fmt: skip
TASKS = {
    "inpaint": " for inpainting",
    "edit": " for editing pictures",
    "depth": " for depth",
    "upscale": " for enlarging",
    "control": " for pictures that lead it",
    "fill": " for filling holes in pictures",
}
GIVEN = {  # what such a model must be shown
    "inpaint": " --image photo.png --mask mask.png",
    "edit": " --image photo.png",
    "depth": " --image photo.png",
    "upscale": " --image small.png",
    "control": " --image edges.png",
    "fill": " --image photo.png --mask mask.png",
}
TOWERS = {"quick_gelu": "OpenAI's CLIP", "gelu": "OpenCLIP"}
PROMPT = '"a lighthouse at dusk"'


def telling(part: str, config: Any) -> tuple:
    kind = "t5" if isinstance(config, T5Config) else "text" if part.startswith("text") else part
    return tuple(getattr(config, name) for name in TELLING[kind])


def family(configs: Mapping[str, Any]) -> tuple[str, str]:
    """(what a whole model is, by what that was told): of its configurations by part."""
    mine = {name: telling(name, config) for name, config in configs.items()}
    for each in PUBLISHED:
        theirs = {name: CONFIGS[name].from_json(fields) for name, fields in each.parts.items()}
        if mine == {name: telling(name, config) for name, config in theirs.items()}:
            title = f"a {each.title}"
            break
    else:
        task = TASKS.get(task_of_parts(configs), "")
        title = f"a model in the manner of {manner(configs)}{task}, of its own widths"
    if "transformer" in configs:
        return title, f"its transformer reads {of_transformer(configs['transformer'])}{speakers(configs)}"
    unet = configs["unet"]
    channels, texts = unet.in_channels, [name for name in configs if name.startswith("text_encoder")]
    towers = " and ".join(f"{configs[name].hidden_size} of {TOWERS.get(configs[name].hidden_act)}" for name in texts)
    reason = f"its UNet reads {channels} channels and a context of {unet.cross_attention_dim} numbers ({towers})"
    if unet.is_xl:
        reason += f", and {unet.projection_class_embeddings_input_dim} numbers of pooled vector and sizes"
    distilled = ", distilled (LCM)" if unet.time_cond_proj_dim is not None else ""
    return title + distilled, reason


def speakers(configs: Mapping[str, Any]) -> str:
    """Whose vectors a FLUX reads, in brackets."""
    clip, t5 = configs.get("text_encoder"), configs.get("text_encoder_2")
    tower = "" if clip is None else f"{clip.hidden_size} of {TOWERS.get(clip.hidden_act)}"
    both = [f"{t5.d_model} of T5" if isinstance(t5, T5Config) else "", tower]
    return f" ({' and '.join(filter(None, both))})"


def manner(configs: Mapping[str, Any]) -> str:
    """The family whose architecture it has, whatever its widths."""
    if "transformer" in configs:
        return "FLUX.1"
    if configs["unet"].is_xl:
        return "Stable Diffusion XL" if "text_encoder" in configs else "Stable Diffusion XL's refiner"
    openai = configs["text_encoder"].hidden_act == "quick_gelu" if "text_encoder" in configs else False
    return f"Stable Diffusion {1 if openai else 2}"


def facts_of_schedule(scheduler: ScheduleConfig, name: str, defaults: Defaults) -> dict[str, str]:
    """`name`: of the scheduler's class."""
    if scheduler.rule == "flow":
        return facts_of_flow(scheduler, name, defaults)
    betas = f"{scheduler.beta_schedule} from {scheduler.beta_start:g} to {scheduler.beta_end:g}"
    betas = "betas of its own" if scheduler.trained_betas is not None else betas
    zero = ", to pure noise (zero terminal SNR)" if scheduler.rescale_betas_zero_snr else ""
    chosen = defaults.sigmas or scheduler.sigmas
    sampler = f"{defaults.sampler or scheduler.sampler}, {defaults.steps} steps, guidance {defaults.guidance:g}"
    return {
        "schedule": f"{name}: {scheduler.num_train_timesteps} levels, {betas}, {scheduler.spacing}{zero}",
        "draws with": sampler + (f", {chosen} sigmas" if chosen != "spaced" else ""),
    }


def facts_of_flow(scheduler: ScheduleConfig, name: str, defaults: Defaults) -> dict[str, str]:
    """`facts_of_schedule` of straight lines from noise to picture."""
    shifted = (
        "shifted by the number of patches" if scheduler.use_dynamic_shifting else f"shifted by {scheduler.shift:g}"
    )
    drawn = f"{defaults.sampler or scheduler.sampler}, {defaults.steps} steps, guidance {defaults.guidance:g}"
    tokens = defaults.max_sequence_length
    return {
        "schedule": f"{name}: flow, straight lines from noise to picture, {shifted}",
        "draws with": drawn + (f", {tokens} tokens of a prompt" if tokens else ""),
    }


def guidance_of(transformer: Any) -> str:
    """What becomes of the guidance scale in a FLUX."""
    if transformer.guidance_embeds:
        return "told to the transformer; away from a negative prompt by --true-guidance"
    return "not told to the transformer: above 1 it is classifier-free, of two runs"


def facts_of_networks(configs: Mapping[str, Any]) -> dict[str, str]:
    """Of the networks that could be read."""
    facts = {}
    unet, vae = configs.get("unet"), configs.get("vae")
    if "transformer" in configs:
        facts["guidance"] = guidance_of(configs["transformer"])
    if unet is not None and vae is not None and unet.sample_size is not None:
        side = unet.sample_size * vae.factor
        facts["pictures"] = f"{side} x {side} pixels"
    if vae is not None:
        facts["latents"] = latents(vae)
    return facts


def latents(vae: Any, scaling: str | None = None) -> str:
    """`scaling`: instead of the configuration's, where that isn't known."""
    shift = f" after {vae.shift_factor:g} is taken away" if vae.shift_factor else ""
    scaling = f"scaled by {vae.scaling_factor:g}{shift}" if scaling is None else scaling
    return f"{vae.latent_channels} channels, one for {vae.factor} x {vae.factor} pixels, {scaling}"


def line_of_model(name: str, configs: Mapping[str, Any], options: str = "") -> str:
    """The line that draws with a whole model."""
    unet, place = configs.get("unet"), quote(name)
    if unet is not None and unet.is_xl and "text_encoder" not in configs:
        return f"ldm generate {PROMPT} --model BASE --refiner {place}{options}   # BASE: a Stable Diffusion XL"
    given = GIVEN.get(task_of_parts(configs), "")
    return f"ldm generate {PROMPT} --model {place}{given}{options}"


def line_of_part(kind: str, name: str, options: str = "") -> str:
    """The line that uses a part of a model; "" if only a whole model's folder has a place for it."""
    if kind == "vae":
        return f"pipe.vae = ldm.load_vae({name!r}, pipe)   # pipe: ldm.load(...), with such latents"
    if kind == "transformer":
        return (
            f"ldm generate {PROMPT} --model {quote(name)} --parts-of FLUX{options}   # FLUX: a FLUX.1's folder or name"
        )
    if kind not in ("controlnet", "adapter"):
        return ""
    base = "" if name in embedded(CONFIG) else " --model BASE"
    what = f"KIND: canny, depth, pose ...{'; BASE: the model it was made for' if base else ''}"
    return f"ldm generate {PROMPT}{base} --control KIND@{quote(name)}:photo.png{options}   # {what}"
