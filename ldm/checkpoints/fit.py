"""Which parts of a model a file holds, and how well an architecture fits them: every key and every shape compared."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import NamedTuple

from ldm.checkpoints import names
from ldm.checkpoints.architectures import Architecture
from ldm.checkpoints.checkpoint import SecondText
from ldm.checkpoints.kinds import beside
from ldm.models.controlnet import ControlNetConfig
from ldm.models.flux import FluxConfig
from ldm.models.unet import UNetConfig
from ldm.models.vae import VAEConfig
from ldm.text.clip import TextConfig

CONFIGS = {  # what reads a part's configuration
    "unet": UNetConfig,
    "transformer": FluxConfig,
    "vae": VAEConfig,
    "controlnet": ControlNetConfig,
    "text_encoder": TextConfig,
    "text_encoder_2": SecondText,
}
Shapes = Mapping[str, names.Shape]  # of the file, by its own names


class Place(NamedTuple):
    """Where a part lies in a file: below `prefix`, in a layout of `names.origins`."""

    prefix: str
    layout: str


ORIGINAL, DIFFUSERS, OLD = "original", "diffusers", "diffusers-old"
CLIP_OLD = names.CLIP_1.removesuffix("text_model.")  # as transformers before version 4 had it
SIGNS = (  # part, layout, a tensor that this part alone has, and the prefixes below which it may lie
    ("controlnet", ORIGINAL, "zero_convs.0.0.weight", (names.CONTROL, "")),
    ("transformer", ORIGINAL, "double_blocks.0.img_attn.qkv.weight", (names.UNET, "diffusion_model.", "")),
    ("unet", ORIGINAL, "out.2.weight", (names.UNET, "diffusion_model.", "")),
    ("vae", ORIGINAL, "decoder.mid.block_1.conv1.weight", (names.FIRST_STAGE, "vae.", "")),
    ("text_encoder", ORIGINAL, "final_layer_norm.weight", (names.CLIP_1, CLIP_OLD, names.CLIP_XL, names.COMFY_CLIP)),
    ("text_encoder", ORIGINAL, "ln_final.weight", (names.OPENCLIP_2, "")),
    ("text_encoder_2", ORIGINAL, "ln_final.weight", (names.OPENCLIP_XL, names.OPENCLIP_REFINER)),
    ("text_encoder_2", ORIGINAL, "encoder.final_layer_norm.weight", (names.COMFY_T5,)),
    ("controlnet", DIFFUSERS, "controlnet_mid_block.weight", ("",)),
    ("transformer", DIFFUSERS, "single_transformer_blocks.0.proj_mlp.weight", ("transformer.", "")),
    ("unet", DIFFUSERS, "up_blocks.0.resnets.0.conv1.weight", ("unet.", "")),
    ("vae", DIFFUSERS, "decoder.mid_block.resnets.0.conv1.weight", ("vae.", "")),
    ("text_encoder", DIFFUSERS, "final_layer_norm.weight", ("text_encoder.text_model.", "text_model.", "")),
    ("text_encoder_2", DIFFUSERS, "final_layer_norm.weight", ("text_encoder_2.text_model.",)),
)


UNMISTAKABLE = (names.UNET, names.FIRST_STAGE, names.CONTROL, names.CLIP_1, names.OPENCLIP_2, names.OPENCLIP_XL)
FEW = 10  # tensors below a prefix may be remains of a part that was taken out


def find_parts(shapes: Shapes) -> dict[str, Place]:
    """The parts whose signs are there, and where; of an unmistakable prefix also those that have lost their sign."""
    counts = {prefix: sum(name.startswith(prefix) for name in shapes) for prefix in UNMISTAKABLE}
    found: dict[str, Place] = {}
    for part, layout, sign, prefixes in SIGNS:
        if part == "unet" and "transformer" in found:  # which lies below the same prefix, and has its sign
            continue
        remains = {} if part == "transformer" else counts
        there = (prefix for prefix in prefixes if prefix + sign in shapes or remains.get(prefix, 0) > FEW)
        prefix = next(there, None)
        if prefix is not None and part not in found:
            found[part] = Place(prefix, layout)
    vae = found.get("vae")
    if vae and vae.layout == DIFFUSERS and f"{vae.prefix}decoder.mid_block.attentions.0.query.weight" in shapes:
        found["vae"] = Place(vae.prefix, OLD)
    return {part: found[part] for part in CONFIGS if part in found}


# ------------------------------------------------------------------------------------------------- how well it fits


class Misfit(NamedTuple):
    """A tensor of another shape than its architecture's; both shapes are the file's."""

    name: str
    shape: names.Shape
    wanted: names.Shape


class Group(NamedTuple):
    """Tensors of the file that are not read, what they are and why."""

    what: str
    why: str
    names: tuple[str, ...]


class Fit(NamedTuple):
    """An architecture beside a file; the names are the file's."""

    architecture: Architecture
    parts: dict[str, Place]
    configs: dict[str, names.Config]  # of the parts
    missing: tuple[str, ...]
    wrong: tuple[Misfit, ...]
    passed_over: tuple[Group, ...]
    unknown: tuple[str, ...]
    claimed: frozenset[str]  # the names that belong to the parts, there or missing

    @property
    def misfits(self) -> int:
        return len(self.missing) + len(self.wrong) + len(self.unknown)


def fit(architecture: Architecture, parts: Mapping[str, Place], shapes: Shapes) -> Fit:
    """Every key and shape of the architecture's `parts` beside the file's."""
    configs = {part: CONFIGS[part].from_json(architecture.parts[part]) for part in parts}
    claimed: dict[str, None] = {}
    missing: dict[str, None] = {}
    wrong: dict[str, Misfit] = {}
    for part, config in configs.items():
        own = names.shapes(part, config)
        for key, origin in names.origins(part, config, *parts[part]).items():
            claimed[origin.name] = None
            if origin.name not in shapes:
                missing[origin.name] = None
            elif origin.shape(shapes[origin.name]) != own[key]:
                wrong[origin.name] = Misfit(origin.name, shapes[origin.name], origin.stored(own[key]))
    passed, unknown = left_over([name for name in shapes if name not in claimed], configs, parts)
    found = tuple(missing), tuple(wrong.values()), passed, unknown
    return Fit(architecture, dict(parts), configs, *found, frozenset(claimed))


def left_over(
    rest: Iterable[str], configs: Mapping[str, names.Config], parts: Mapping[str, Place]
) -> tuple[tuple[Group, ...], tuple[str, ...]]:
    """The names that no part claims: in groups that are known, and the unknown ones."""
    last = None
    if (
        "text_encoder" in parts and "transformer" not in parts
    ):  # Stable Diffusion 2's, which is one layer longer than what is read
        last = f"{parts['text_encoder'].prefix}transformer.resblocks.{configs['text_encoder'].num_hidden_layers}."
    groups: dict[tuple[str, str], list[str]] = {}
    unknown = []
    for name in rest:
        about = beside(name)
        if last is not None and name.startswith(last):
            about = "the text encoder's last layer", "the model reads the one before"
        if about is None:
            unknown.append(name)
        else:
            groups.setdefault(about, []).append(name)
    return tuple(Group(*about, tuple(members)) for about, members in groups.items()), tuple(unknown)


def rank(architectures: Iterable[Architecture], parts: Mapping[str, Place], shapes: Shapes) -> list[Fit]:
    """The architectures that have those parts, the best fit first, equals in their order."""
    fits = []
    for each in architectures:
        if "transformer" in each.parts and {"unet", "controlnet"} & parts.keys():
            continue
        known = called(parts, each)
        variants = _variants(each, known, shapes)
        fits += [fit(variant, known, shapes) for variant in variants if known.keys() <= variant.parts.keys()]
    return sorted(fits, key=lambda each: each.misfits)


def called(parts: Mapping[str, Place], architecture: Architecture) -> Mapping[str, Place]:
    """The parts by the architecture's names.

    The code that trained SDXL numbers text encoders. The first, as OpenCLIP has it, is a refiner's, called the second
    in its folder, or (SD Turbo) the only one of a Stable Diffusion 2.
    """
    lone = "text_encoder_2" in parts and "text_encoder" not in parts
    if not lone or "text_encoder_2" in architecture.parts:
        return parts
    return {part.removesuffix("_2"): place for part, place in parts.items()}


def _variants(architecture: Architecture, parts: Mapping[str, Place], shapes: Shapes) -> list[Architecture]:
    """The architecture as this file may have it.

    With a ControlNet, if there is one; with the guidance embedding of a distilled (LCM) UNet, if that is there. A lone
    text encoder may be either of SDXL's two.
    """
    if "controlnet" in parts and "controlnet" not in architecture.parts:
        architecture = replace(architecture.led(architecture.name), title=architecture.title)
    if "unet" in parts:
        prefix, layout = parts["unet"]
        key = "time_embed.cond_proj" if layout == ORIGINAL else "time_embedding.cond_proj"
        shape = shapes.get(f"{prefix}{key}.weight", ())
        if len(shape) == 2:
            architecture = architecture.with_unet(architecture.name, time_cond_proj_dim=shape[1])
    second = architecture.parts.get("text_encoder_2")
    clip = second is not None and isinstance(SecondText.from_json(second), TextConfig)
    if tuple(parts) != ("text_encoder",) or not clip:
        return [architecture]
    return [architecture, replace(architecture, parts=architecture.parts | {"text_encoder": second})]
