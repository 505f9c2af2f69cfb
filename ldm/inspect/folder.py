"""What a folder in diffusers' format holds: each part's weights beside what its configuration asks for."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ldm.checkpoints.checkpoint import NETWORKS, Kind, backbone_of, check_fit
from ldm.checkpoints.folder import (
    FLUX,
    OPTIONAL,
    PARTS,
    PASSED_OVER,
    SECOND,
    open_folder,
    places_of_parts,
    read_schedule,
)
from ldm.checkpoints.names import CLASSES as NETWORK
from ldm.checkpoints.places import CONFIG, INDEX
from ldm.errors import LDMError, bytes_in_words
from ldm.inspect.report import Part, Report, Tensor, make_part
from ldm.inspect.told import (
    facts_of_networks,
    facts_of_schedule,
    family,
    latents,
    line_of_model,
    line_of_part,
)
from ldm.io.folders import PICKLES, find_weights, read_fields
from ldm.io.headers import is_pickle
from ldm.io.misfits import CONTEXT_WIDTHS, Found, refuse_misfits
from ldm.io.pickles import refused
from ldm.io.weights import DTYPES, WeightFiles, blank
from ldm.models.adapter import Adapter, AdapterConfig
from ldm.models.controlnet import ControlNet, ControlNetConfig

STEM = "diffusion_pytorch_model"
ENDINGS = (".safetensors", *PICKLES, ".msgpack", ".h5", ".onnx")
CLASSES = {  # what config.json calls it -> its name here, in words, and what reads it
    "ControlNetModel": ("controlnet", "a ControlNet", Kind(ControlNet, ControlNetConfig, STEM)),
    "T2IAdapter": ("adapter", "a T2I-Adapter", Kind(Adapter, AdapterConfig, STEM)),
    "UNet2DConditionModel": ("unet", "a UNet, one part of a model", NETWORKS["unet"]),
    "FluxTransformer2DModel": ("transformer", "a transformer of FLUX, one part of a model", NETWORKS["transformer"]),
    "T5EncoderModel": ("text_encoder_2", "a T5 text encoder, one part of a model", NETWORKS["text_encoder_2"]),
    "AutoencoderKL": ("vae", "a VAE", NETWORKS["vae"]),
    "CLIPTextModel": ("text_encoder", "a text encoder, one part of a model", NETWORKS["text_encoder"]),
    "CLIPTextModelWithProjection": ("text_encoder", "a text encoder, one part of a model", NETWORKS["text_encoder"]),
}


class Seen(NamedTuple):
    """One network of a folder: compared, its configuration (None: damaged), what is wrong and what is to know."""

    part: Part
    config: Any
    faults: Sequence[str]
    warnings: Sequence[str]
    passed_over: Sequence[str]


def of_model(folder: Path, variant: str | None, name: str) -> Report:
    """The report of a whole model. Raises LDMError if model_index.json can't be read."""
    index = read_fields(folder / INDEX)
    named = {part: value[-1] for part, value in index.items() if isinstance(value, list) and value and value[-1]}
    try:
        place = places_of_parts(folder)
    except LDMError:  # of which open_folder tells below
        place = folder.joinpath
    seen = {part: look(place(part), part, NETWORKS[part], variant) for part in NETWORKS if part in named}
    configs = {part: each.config for part, each in seen.items() if each.config is not None}
    faults = [fault for each in seen.values() for fault in each.faults]
    tokenizers: Mapping[str, Any] = {}
    try:
        # What it passes over stands on the page.
        checkpoint = open_folder(folder, variant, "transformers", allow_pickle=True, say=lambda line: None)
        tokenizers = checkpoint.tokenizers
        check_fit(checkpoint)
    except LDMError as error:
        faults += [str(error)] * (str(error) not in faults)
    facts = facts_of_folder(folder, backbone_of(configs)) | facts_of_networks(configs)
    for part, tokenizer in tokenizers.items():
        facts[part.replace("_", " ")] = f"its own, {len(tokenizer)} pieces, {tokenizer.max_length} tokens a prompt"
    whole = len(configs) == len(seen) and "vae" in configs and backbone_of(configs) and len(configs) > 2
    what, reason = family(configs) if whole else ("a model", "")
    pickled = any("is a pickle" in line for each in seen.values() for line in each.warnings)
    options = f" --variant {variant}" * bool(variant) + " --allow-pickle" * pickled
    return Report(
        place=str(folder),
        form="a folder in diffusers' format",
        kind="pipeline",
        what=what,
        reason=reason,
        parts=tuple(each.part for each in seen.values()),
        facts=facts,
        passed_over=(*beside(folder, named), *(line for each in seen.values() for line in each.passed_over)),
        warnings=tuple(warning for each in seen.values() for warning in each.warnings),
        faults=tuple(faults),
        use=() if faults else (line_of_model(name, configs, options),),
    )


def of_network(folder: Path, variant: str | None, name: str) -> Report:
    """The report of one network's folder. Raises LDMError if its config.json can't be read."""
    fields = read_fields(folder / CONFIG)
    architectures = fields.get("architectures")
    first = architectures[0] if isinstance(architectures, list) and architectures else "network without a name"
    cls = str(fields.get("_class_name") or first)
    form, says = "a folder of one network, in diffusers' format", f"its {CONFIG} calls it {cls}"
    if cls not in CLASSES:
        return Report(str(folder), form, "unknown", "a network that ldm doesn't know", says, readable=False)
    kind, what, network = CLASSES[cls]
    seen = look(folder, kind, network, variant)
    width = getattr(seen.config, "cross_attention_dim", None)
    if width is not None:
        of = f", as {CONTEXT_WIDTHS[width]} has it" if width in CONTEXT_WIDTHS else ""
        says += f"; it reads a context of {width} numbers{of}"
    line = line_of_part(kind, name)
    alone = [] if line else [f"It is drawn with from a whole model's folder, which has {INDEX}, as its {kind}."]
    return Report(
        place=str(folder),
        form=form,
        kind=kind,
        what=what,
        reason=says,
        parts=(seen.part,),
        facts={"latents": latents(seen.config)} if kind == "vae" and seen.config is not None else {},
        passed_over=tuple(seen.passed_over),
        warnings=(*seen.warnings, *alone),
        faults=tuple(seen.faults),
        use=(line,) if line and not seen.faults else (),
    )


# ---------------------------------------------------------------------------------------------------- one network


def look(folder: Path, name: str, kind: Kind, variant: str | None) -> Seen:
    """Its weights beside its configuration: each may be damaged alone."""
    faults: list[str] = []
    warnings: list[str] = []
    passed: list[str] = []
    files, config, part = None, None, Part(name, "")
    try:
        say = warnings.append if variant is not None else lambda line: None  # the page shows what is read instead
        variant = variant if variant is not None else only_variant(folder, kind.stem, warnings)
        paths = find_weights(folder, kind.stem, variant, allow_pickle=True, say=say)
        warnings += [str(refused(path)) for path in paths if is_pickle(path)]
        passed += other_files(folder, paths)
        files = WeightFiles(paths, allow_pickle=True)
        part = make_part(name, where(paths), files.entries.values())
    except LDMError as error:
        faults.append(str(error))
    try:
        config = kind.config.from_json(read_fields(folder / CONFIG))
        if files is not None:
            part, fault = compare(part, kind, config, files)
            faults += [fault] * bool(fault)
    except LDMError as error:
        faults.append(str(error))
    return Seen(part, config, faults, warnings, passed)


def where(paths: Sequence[Path]) -> str:
    first = f"{paths[0].parent.name}/{paths[0].name}"
    return first if len(paths) == 1 else f"{first} and {len(paths) - 1} more shards"


def only_variant(folder: Path, stem: str, warnings: list[str]) -> str | None:
    """The variant to look at where none is named: None, the plain one, unless there are only others."""
    pattern = re.compile(
        re.escape(stem) + r"(?:\.(\w+))?\.safetensors|" + re.escape(stem) + r"\.safetensors\.index(?:\.(\w+))?\.json"
    )
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    found = [match[1] or match[2] for match in map(pattern.fullmatch, sorted(names)) if match]
    if None in found or len(found) < 2:
        return None
    warnings.append(f"{folder} holds only variants ({', '.join(found)}): name one of them as `variant` (--variant).")
    return found[0]


def other_files(folder: Path, paths: Sequence[Path]) -> list[str]:
    """Weights that lie beside those that are read."""
    others = [path for path in sorted(folder.iterdir()) if path.suffix in ENDINGS and path not in paths]
    others = [path for path in others if path.is_file()]  # a link may lead nowhere
    return [f"{folder.name}/{each.name}, {bytes_in_words(each.stat().st_size)}: other weights" for each in others]


def compare(part: Part, kind: Kind, config: Any, files: WeightFiles) -> tuple[Part, str]:
    """The part with what is missing, left over and misshapen, and the sentence with which loading refuses that."""
    kind = kind._replace(network=NETWORK.get(type(config), kind.network))  # of a second text encoder, by what it says
    expected = build(kind, config)
    rename = getattr(kind.network, "rename", lambda name: name)
    ours = {name: rename(name) for name in files.entries}
    idle = [name for name, key in ours.items() if key is None]
    found = [Found(key, files.entries[name], DTYPES.get(files.entries[name].dtype))
             for name, key in ours.items() if key is not None]  # fmt: skip
    there = {each.key: each.entry for each in found}
    fault = ""
    try:
        refuse_misfits(f"{files.place} does not fit the model {kind.network.__name__}", expected, found)
    except LDMError as error:
        fault = str(error)
    shapes = {key: tuple(tensor.shape) for key, tensor in expected.items()}
    missing = [Tensor(key, shape) for key, shape in shapes.items() if key not in there]
    extra = [Tensor(e.name, e.shape, e.dtype) for key, e in there.items() if key not in shapes]
    wrong = [
        Tensor(e.name, e.shape, e.dtype, shapes[key]) for key, e in there.items() if shapes.get(key, e.shape) != e.shape
    ]
    entries = [entry for name, entry in files.entries.items() if name not in idle]
    return make_part(part.name, part.where, entries, missing=missing, extra=extra, wrong=wrong), fault


def build(kind: Kind, config: Any) -> dict[str, torch.Tensor]:
    """Every tensor of the network, without numbers. Raises LDMError if there is no network of that configuration."""
    try:
        with blank():
            return kind.network(config).state_dict()
    except (ArithmeticError, AssertionError, IndexError, RuntimeError, TypeError, ValueError) as error:
        why = " ".join(str(error).split())[:200]
        raise LDMError(
            f"No {kind.network.__name__} can be built by its {CONFIG} ({why}): take a sound copy."
        ) from error


# ---------------------------------------------------------------------------------------------------- the rest


def facts_of_folder(folder: Path, unet: Any) -> dict[str, str]:
    """What the scheduler's file says, and ldm.json; nothing of a damaged one, which is a fault already."""
    path = folder / "scheduler" / "scheduler_config.json"
    try:
        scheduler, defaults = read_schedule(folder, unet)
        name = str(read_fields(path, ("-Infinity",)).get("_class_name", "a scheduler without a name"))
    except LDMError:
        return {}
    facts = {"predicts": f"{scheduler.prediction_type}, as scheduler/{path.name} says"}
    return facts | facts_of_schedule(scheduler, name, defaults)


def beside(folder: Path, named: Mapping[str, str]) -> list[str]:
    """Folders and files of the model that take no part in drawing."""
    lines = [
        f"{name}: it takes no part in drawing" for name in PASSED_OVER if name in named and (folder / name).exists()
    ]
    known = {*PARTS, *SECOND, *FLUX, *OPTIONAL, *PASSED_OVER}
    others = [path.name for path in sorted(folder.iterdir()) if path.is_dir() and not path.name.startswith(".")]
    lines += [f"{name}/: {INDEX} doesn't name it" for name in others if name not in known & named.keys()]
    return lines + [line.removeprefix(f"{folder.name}/") for line in other_files(folder, ())]
