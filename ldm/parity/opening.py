"""Both sides opened: of one folder, by their own loaders; or of one architecture, sharing one set of random weights."""

import json
import shutil
import tempfile
from pathlib import Path

import torch

from ldm.checkpoints.architectures import Architecture, find_architecture
from ldm.checkpoints.checkpoint import NETWORKS, family_defaults
from ldm.checkpoints.names import CLASSES
from ldm.errors import LDMError
from ldm.io.folders import read_fields
from ldm.loading import find_model, load, load_controlnet
from ldm.models.controlnet import ControlNetConfig
from ldm.parity import flux, reference, sides
from ldm.parity.drawn import share
from ldm.parity.sides import Side
from ldm.pipeline import Pipeline
from ldm.schedules import ScheduleConfig
from ldm.text.t5_tokenizer import T5Tokenizer
from ldm.text.tokenizer import Tokenizer

ZEROS = "force_zeros_for_empty_prompt"


def of_folder(
    model: str, dtype: torch.dtype, device: torch.device, against: str = "diffusers", controlnet: str | None = None
) -> tuple[Side, Side]:
    """Ours and theirs of a model's folder, or an embedded model's name. Raises LDMError as `ldm.load` does."""
    if against == "diffusers":
        reference.libraries()  # missing: said before anything is read
    folder = find_model(model)
    if folder.is_file():
        raise LDMError(f"{folder} is a single file, and the other side reads folders: `ldm convert` makes one of it.")
    pipe = load(model, dtype, device)
    if pipe.flux and controlnet is not None:
        raise LDMError("FLUX's ControlNets are compared by the tests alone: leave --controlnet out.")
    net = None if controlnet is None else load_controlnet(controlnet, pipe)
    if against != "diffusers":
        return sides.ours(pipe, for_port=True), sides.read_port(Path(against), folder, dtype, device)
    led = None if controlnet is None else find_model(controlnet, "config.json")
    return sides.ours(pipe, net), reference.read(folder, dtype, device, led)


def of_architecture(name: str, dtype: torch.dtype, device: torch.device, seed: int = 0) -> tuple[Side, Side]:
    """Ours and diffusers' of a published architecture, with random weights that both share."""
    architecture = find_architecture(name)
    with tempfile.TemporaryDirectory() as room:
        vocabularies = write_vocabularies(architecture, Path(room))
        theirs = reference.build(architecture, dtype, device, vocabularies, seed)
        tokenizers = {name: read_vocabulary(path) for name, path in vocabularies.items()}
    parts = {}
    for part, fields in architecture.parts.items():
        config = (ControlNetConfig if part == "controlnet" else NETWORKS[part].config).from_json(fields)
        kind = CLASSES[type(config)]
        module = theirs.own["parts"][part]
        rename = getattr(kind, "rename", lambda key: key)
        parts[part] = share(lambda k=kind, c=config: k(c), module, rename, device)
    net = parts.pop("controlnet", None)
    scheduler = ScheduleConfig.from_json(architecture.scheduler)
    named = parts | tokenizers
    if "text_encoder" not in named:  # SDXL's refiner, which has the second alone
        named |= {"text_encoder": named.pop("text_encoder_2"), "tokenizer": named.pop("tokenizer_2")}
    if "transformer" in parts:
        named["defaults"] = family_defaults(parts["transformer"].config)
    pipe = Pipeline(scheduler=scheduler, zero_negative=architecture.index.get(ZEROS, False), **named)
    return sides.ours(pipe, net), theirs


def write_vocabularies(architecture: Architecture, room: Path) -> dict[str, Path]:
    """Folders of the embedded model's vocabulary, padded as the family pads, by the tokenizers' names.

    Its end token has the largest id, by which the published configurations find the end of a prompt.
    """
    source = find_model("scenes") / "tokenizer"
    names = [part.replace("text_encoder", "tokenizer") for part in architecture.parts if part.startswith("text")]
    found = {}
    for name, pad in zip(names, architecture.pads, strict=True):
        found[name] = room / name
        if "T5EncoderModel" in architecture.parts[name.replace("tokenizer", "text_encoder")]["architectures"]:
            flux.write_t5_vocabulary(found[name])
            continue
        shutil.copytree(source, found[name])
        for file in ("tokenizer_config.json", "special_tokens_map.json"):
            fields = read_fields(found[name] / file) | {"pad_token": pad}
            (found[name] / file).write_text(json.dumps(fields), encoding="utf-8")
    return found


def read_vocabulary(folder: Path) -> Tokenizer | T5Tokenizer:
    return Tokenizer.from_folder(folder) if reference.kind_of(folder) == "clip" else T5Tokenizer.from_folder(folder)


def check_choice(random_init: str | None, against: str, controlnet: str | None) -> None:
    """Raise LDMError for choices that can't go together, before anything is read."""
    if random_init is not None:
        find_architecture(random_init)
        if against != "diffusers":
            raise LDMError("--random-init has no folder that a port could load: name a MODEL, or leave --against out.")
        if controlnet is not None:
            raise LDMError("--random-init brings its own ControlNet (sd15-controlnet): leave --controlnet out.")
    if against != "diffusers" and not Path(against).is_file():
        raise LDMError(f"--against takes diffusers or a port's Python file; there is no file {against!r}.")
    if against != "diffusers" and controlnet is not None:
        raise LDMError("A port is asked for no ControlNet: leave --controlnet out.")
