"""`convert`: a model of any format, written as a folder that diffusers reads, or as a single file.

Nothing is computed: every number keeps its value and, unless another dtype is asked for, its type, so that the way
there and back gives the same bits, and the same configurations.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ldm.checkpoints import single
from ldm.checkpoints.checkpoint import check_fit
from ldm.checkpoints.places import CONFIG, INDEX, embedded, find_model
from ldm.checkpoints.recognise import recognise
from ldm.convert.described import title_of
from ldm.convert.writing import ALONE, STEM, Ours, Source, Written, check_target, write
from ldm.errors import LDMError, nearest, say_on_stderr
from ldm.io.folders import find_weights, read_fields
from ldm.io.weights import Tensors, WeightFiles
from ldm.loading import decide, fill, find_dtype, open_checkpoint
from ldm.models.controlnet import ControlNetConfig
from ldm.models.unet import UNetConfig
from ldm.models.vae import VAEConfig

CONFIGS = {"controlnet": ControlNetConfig, "vae": VAEConfig, "unet": UNetConfig}
PARTS = tuple(CONFIGS)  # what may be converted without the rest


def convert(
    source: str | Path,
    target: str | Path,
    dtype: torch.dtype | str | None = None,
    variant: str | None = None,
    prediction_type: str | None = None,
    part: str | None = None,
    allow_pickle: bool = False,
    overwrite: bool = False,
) -> Written:
    """Write `source` as `target`: a single file if that ends in .safetensors, else a folder that diffusers reads.

    `source`: whatever `ldm.load`, `ldm.load_controlnet` or `ldm.load_vae` reads; `variant`, `prediction_type` and
    `allow_pickle` are as there. `part` takes one network ("vae", "unet", "controlnet") out of a whole model. `dtype`:
    the type of all numbers, by default that which they have. Raises LDMError for a source that is not sound, and for a
    target that is there already, unless `overwrite`, or can't be written: then nothing is.
    """
    check_target(source, target, overwrite)
    kind = None if dtype is None else find_dtype(dtype)
    return write(open_source(source, variant, prediction_type, part, allow_pickle), target, kind, overwrite)


def open_source(
    source: str | Path,
    variant: str | None = None,
    prediction_type: str | None = None,
    part: str | None = None,
    allow_pickle: bool = False,
    scaling_factor: float | None = None,
) -> Source:
    """What is to be written; its numbers are read when it is. For the arguments see `convert`.

    `scaling_factor`: that of a VAE alone in a file that leaves it open.
    """
    if part is not None and part not in PARTS:
        raise LDMError(f"There is no part {part!r} to convert: {', '.join(PARTS)}.{nearest(part, PARTS)}")
    mark = CONFIG if str(source) in embedded(CONFIG) else INDEX
    place, title = find_model(source, mark, variant), title_of(source)
    alone = open_alone(place, part, variant, allow_pickle, scaling_factor)
    if alone is not None:
        name, config, tensors = alone
        if prediction_type is not None:
            raise LDMError(f"{place} is a {name} alone, which has no prediction_type: leave it out.")
        return Source(place, title, {name: config}, {name: Ours(name, config, tensors)})
    if scaling_factor is not None:
        raise LDMError(f"{place} is a whole model, whose scaling factor is known: leave the scaling factor out.")
    model = open_checkpoint(place, variant, "transformers", allow_pickle)
    check_fit(model)
    if part is not None:
        if part not in model.configs:
            raise LDMError(f"{place} has no {part} of its own: it has {', '.join(model.configs)}.")
        config = model.configs[part]
        return Source(place, title, {part: config}, {part: Ours(part, config, model.weights(part))})
    weights = {name: Ours(name, config, model.weights(name)) for name, config in model.configs.items()}
    tried = prediction_type is None and model.doubt is not None
    unet = fill(model, "unet", torch.float32, "cpu") if tried else None
    model = decide(model, unet, prediction_type)
    return Source(place, title, model.configs, weights, model)


def open_alone(
    place: Path, part: str | None, variant: str | None, allow_pickle: bool, scaling_factor: float | None
) -> tuple[str, Any, Tensors] | None:
    """(name, configuration, tensors) of a network that is alone in its folder or file; None for a whole model."""
    if place.is_dir():
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
        return name, CONFIGS[name].from_json(fields), WeightFiles(
            find_weights(place, STEM, variant, allow_pickle), allow_pickle
        )  # fmt: skip
    files = WeightFiles(place, allow_pickle)
    found = recognise(files.entries, str(place), files.metadata)
    whole = found.kind.startswith("pipeline") or len(found.parts) > 1
    if whole and part != "controlnet":
        if part is None and "controlnet" in found.parts:
            say_on_stderr(f"{place}: its ControlNet is left out; the part 'controlnet' (--part) takes it out alone.")
        return None
    name = part or found.kind
    if found.parts and not whole and name not in CONFIGS:
        raise LDMError(f"{place} is {found.reason}: ldm converts whole models, and {', '.join(PARTS)} alone.")
    config, tensors = single.open_part(place, name, allow_pickle)
    if name == "vae" and not whole:
        config = scaled(config, found.scaling_factors, scaling_factor, place)
    return name, config, tensors


def scaled(config: VAEConfig, known: tuple[float, ...], asked: float | None, place: Path) -> VAEConfig:
    """A VAE's configuration with its scaling factor: by the shapes alone it may be one of several."""
    if asked is not None:
        return replace(config, scaling_factor=asked)
    if len(known) > 1:
        raise LDMError(
            f"{place} doesn't say by what its latents are multiplied, and VAEs of this shape have {known[0]} (Stable "
            f"Diffusion 1 and 2) or {known[1]} (SDXL): say which, as scaling_factor (--scaling-factor)."
        )
    return replace(config, scaling_factor=known[0])
