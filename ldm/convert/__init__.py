"""`convert`: a model of any format, written as a folder that diffusers reads, or as a single file.

Nothing is computed: every number keeps its value and, unless another dtype is asked for, its type, so that the way
there and back gives the same bits, and the same configurations.
"""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ldm.checkpoints import single
from ldm.checkpoints.checkpoint import Checkpoint, check_fit
from ldm.checkpoints.names import Renamed
from ldm.checkpoints.places import CONFIG, INDEX, embedded, find_model
from ldm.checkpoints.recognise import Found
from ldm.convert.described import title_of
from ldm.convert.writing import ALONE, STEM, Begin, Ours, Source, Written, check_apart, check_target, write
from ldm.errors import LDMError, nearest, say_on_stderr
from ldm.io.folders import find_weights, read_fields
from ldm.io.weights import Tensors, WeightFiles
from ldm.loading import decide, fill, find_dtype, open_checkpoint
from ldm.models.controlnet import ControlNetConfig
from ldm.models.flux import FluxConfig
from ldm.models.unet import UNetConfig
from ldm.models.vae import VAEConfig

CONFIGS = {"controlnet": ControlNetConfig, "vae": VAEConfig, "unet": UNetConfig, "transformer": FluxConfig}
PARTS = tuple(CONFIGS)  # what may be converted without the rest


class Alone(NamedTuple):
    """One network without the rest. `factors`: of a VAE, by which its latents may have to be multiplied."""

    name: str
    config: Any
    tensors: Tensors
    factors: tuple[float, ...] = ()


def convert(
    source: str | Path,
    target: str | Path,
    dtype: torch.dtype | str | None = None,
    variant: str | None = None,
    prediction_type: str | None = None,
    part: str | None = None,
    allow_pickle: bool = False,
    overwrite: bool = False,
    scaling_factor: float | None = None,
    begin: Begin = lambda bytes: lambda done: None,
    parts_of: str | Path | None = None,
) -> Written:
    """Write `source` as `target`: a single file if that ends in .safetensors, else a folder that diffusers reads.

    `source`: whatever `ldm.load`, `ldm.load_controlnet` or `ldm.load_vae` reads, or a transformer of FLUX alone;
    `variant`, `prediction_type`, `allow_pickle` and `parts_of` are as there. `part` takes one network ("vae", "unet",
    "transformer", "controlnet") out of a whole model. `dtype`:
    the type of all numbers, by default that which they have. `scaling_factor`: of a VAE alone, counts instead of what
    its files say, or where they don't. `begin` is told the bytes of all numbers before the first is written, and
    returns what is told those of each tensor. Raises LDMError for a source that is not sound, and for a target that
    is there already, unless `overwrite`, or can't be written: then nothing is.
    """
    check_target(target, overwrite)
    kind = None if dtype is None else find_dtype(dtype)
    opened = open_source(source, variant, prediction_type, part, allow_pickle, scaling_factor, parts_of)
    check_apart(opened.place, target)
    return write(opened, target, kind, overwrite, begin)


def open_source(
    source: str | Path,
    variant: str | None = None,
    prediction_type: str | None = None,
    part: str | None = None,
    allow_pickle: bool = False,
    scaling_factor: float | None = None,
    parts_of: str | Path | None = None,
) -> Source:
    """What is to be written; its numbers are read when it is. For the arguments see `convert`."""
    if part is not None and part not in PARTS:
        raise LDMError(f"There is no part {part!r} to convert: {', '.join(PARTS)}.{nearest(part, PARTS)}")
    mark = CONFIG if str(source) in embedded(CONFIG) else INDEX
    place, title = find_model(source, mark, variant, allow_pickle), title_of(source)
    whole = parts_of is not None  # a transformer that the other parts are put beside
    alone = None if whole else (in_folder if place.is_dir() else in_file)(place, part, variant, allow_pickle)
    model = None
    if alone is None:
        model = open_checkpoint(place, variant, "transformers", allow_pickle, parts_of)
        check_fit(model)
        alone = None if part is None else out_of(model, part)
    if alone is not None:
        if prediction_type is not None:
            raise LDMError(f"{place}: a {alone.name} alone has no prediction_type: leave it out.")
        config = scaled(alone, scaling_factor, place)
        return Source(place, title, {alone.name: config}, {alone.name: Ours(alone.name, config, alone.tensors)})
    if scaling_factor is not None:
        raise LDMError(f"{place} is a whole model, whose scaling factor is known: leave the scaling factor out.")
    weights = {name: Ours(name, config, model.weights(name)) for name, config in model.configs.items()}
    model = predicted(model, weights.get("unet"), prediction_type)
    return Source(place, title, model.configs, weights, model)


def predicted(model: Checkpoint, weights: Ours | None, asked: str | None) -> Checkpoint:
    """The model with the prediction type that was asked for, that its files say, or that its UNet shows: then that is
    held in memory, whole, until it has answered."""
    if asked is not None or model.doubt is None:
        return decide(model, None, asked)
    # Most numbers of 2 bytes: so they are held. As bfloat16, for CPUs compute float16 some 30 times as slowly, and it
    # would overflow; the answer's correlation changes by a thousandth.
    narrow = weights.bytes(None) < 0.75 * weights.bytes(torch.float32)
    return decide(model, fill(model, "unet", torch.bfloat16 if narrow else torch.float32, "cpu"), None)


# ---------------------------------------------------------------------------------------------------- one network


def in_folder(place: Path, part: str | None, variant: str | None, allow_pickle: bool) -> Alone | None:
    """The network of a folder that holds one alone; None for a whole model's."""
    if (place / INDEX).exists():
        return None
    if not (place / CONFIG).exists():
        raise LDMError(f"{place} is no model's folder: it has neither {INDEX} nor {CONFIG}; check the path.")
    fields = read_fields(place / CONFIG)
    name = ALONE.get(str(fields.get("_class_name")))
    if name is None or part not in (None, name):
        what = fields.get("_class_name", "network that its config.json doesn't name")
        wanted = f"not a {part}" if name else f"and ldm converts {', '.join(ALONE)}, and whole models"
        raise LDMError(f"{place} holds a {what}, {wanted}: name another.")
    tensors = WeightFiles(find_weights(place, STEM, variant, allow_pickle), allow_pickle)
    return alone_as(name, CONFIGS[name].from_json(fields), tensors)


def out_of(model: Checkpoint, part: str) -> Alone:
    """A part of a whole model's folder."""
    if part not in model.configs:
        raise LDMError(f"{model.place} has no {part} of its own: it has {', '.join(model.configs)}.")
    return alone_as(part, model.configs[part], model.weights(part))


def alone_as(name: str, config: Any, tensors: Tensors) -> Alone:
    return Alone(name, config, tensors, (config.scaling_factor,) if name == "vae" else ())


def in_file(place: Path, part: str | None, variant: str | None, allow_pickle: bool) -> Alone | None:
    """The network that is alone in a file, or is asked for as a part of it; None for a whole model."""
    files, found = single.look(place, allow_pickle)
    if part is None and (found.kind.startswith("pipeline") or len(found.parts) > 1):
        if "controlnet" in found.parts:
            say_on_stderr(f"{place}: its ControlNet is left out; the part 'controlnet' (--part) takes it out alone.")
        return None
    name = part or found.kind
    if found.parts and name not in CONFIGS:
        raise LDMError(f"{place} is {found.reason}: ldm converts whole models, and {', '.join(PARTS)} alone.")
    found.check(place)
    if name not in found.parts:
        raise LDMError(f"{place} is {found.reason}: there is no {name} in it; name a file that has one.")
    if name != "unet" and variant is not None:
        say_on_stderr(f"{place}: a single file holds one set of weights of a {name}, and {variant!r} is passed over.")
    averaged = name == "unet" and single.wants_average(place, found, variant, say_on_stderr)
    single.tell(place, found, averaged, say_on_stderr)
    config, tensors = config_of(found, files, name), Renamed(files, found.origins(name, averaged))
    if name == "vae" and not found.backbone:
        return Alone(name, config, tensors, found.scaling_factors)
    return alone_as(name, config, tensors)


def config_of(found: Found, files: WeightFiles, name: str) -> Any:
    """A part's configuration: of several models with the same shapes, that of the one which predicts what is said."""
    if not found.backbone or name == "controlnet":
        return found.configs[name]
    said, _ = single.said_of_prediction(found, files)
    chosen = found.architecture if said is None else found.predicting(said)
    return CONFIGS[name].from_json(chosen.parts[name])


def scaled(alone: Alone, asked: float | None, place: Path) -> Any:
    """The configuration with the scaling factor that is asked for, if it is a VAE's: by the shapes alone it may be one
    of several."""
    name, config, _, known = alone
    if asked is None:
        if len(known) > 1:
            raise LDMError(
                f"{place} doesn't say by what its latents are multiplied, and VAEs of this shape have {known[0]} "
                f"(Stable Diffusion 1 and 2) or {known[1]} (SDXL): say which, as scaling_factor (--scaling-factor)."
            )
        return replace(config, scaling_factor=known[0]) if known else config
    if name != "vae":
        raise LDMError(f"{place}: a {name} has no scaling factor, which is a VAE's: leave it out (--scaling-factor).")
    if isinstance(asked, bool) or not isinstance(asked, int | float) or not 0 < asked < math.inf:
        raise LDMError(f"scaling_factor must be a number above 0, not {asked!r}: 0.13025 is SDXL's.")
    if asked not in known:
        usual = " or ".join(map(str, known))
        say_on_stderr(f"{place}: by what is known its scaling factor is {usual}, and {asked} is taken as asked.")
    return replace(config, scaling_factor=asked)
