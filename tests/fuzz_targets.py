"""What `fuzz.py` reads: each kind of a stranger's file, sound ones, how they are spoiled, and what opens them."""

import argparse
import collections
import contextlib
import io
import json
import random
from collections.abc import Callable
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import fuzz_inputs as spoil
import numpy as np
import safetensors.torch
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from tiny import tiny_model

import ldm
from ldm.checkpoints.checkpoint import blank_part, check_fit
from ldm.checkpoints.folder import read_schedule
from ldm.checkpoints.recognise import recognise
from ldm.cli import wishes
from ldm.cli.record import BEFORE, DECIDES, NUMBERS, SURROUNDS, WORDS, alternatives, read_record
from ldm.convert import convert
from ldm.errors import LDMError
from ldm.inspect import inspect
from ldm.inspect.report import page
from ldm.io.folders import find_weights, read_json, write_json
from ldm.io.pictures import as_labels, open_picture
from ldm.io.weights import WeightFiles, save_weights
from ldm.loading import open_checkpoint
from ldm.models.controlnet import ControlNet, ControlNetConfig
from ldm.schedules import make_schedule
from ldm.text.tokenizer import Tokenizer

TURNED = b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\6\0\0\0\0\0\0"  # EXIF: lying on its side
MODES = {"PNG": ("RGB", "P", "RGBA", "L", "I;16", "1"), "GIF": ("P",), "TIFF": ("RGB", "L")}  # others: RGB


class Target(NamedTuple):
    """One kind of file: where it lies, sound ones, how they are spoiled, what reads them, how often it is taken."""

    place: Path
    sound: list[bytes]
    spoil: Callable[[random.Random, bytes], bytes]
    read: Callable[[Path], Any]
    weight: int


def targets(scratch: Path) -> dict[str, Target]:
    """Everything that reads a stranger's file, around the tiny model, which is written into `scratch`."""
    torch.manual_seed(0)
    model = tiny_model(scratch / "model")
    return weight_files(model, scratch) | texts(model) | pictures(scratch)


# ---------------------------------------------------------------------------------------------------- weights


def weight_files(model: Path, scratch: Path) -> dict[str, Target]:
    some = {"a.weight": torch.randn(3, 4), "b": torch.randn(5).half(), "ids": torch.arange(4), "s": torch.tensor(1.0)}
    convert(model, scratch / "single.safetensors")
    alone, pickles = (scratch / "single.safetensors").read_bytes(), checkpoints(some, scratch)
    net, pipe = scratch / "net", ldm.load(model)
    net.mkdir()
    control = ControlNet(control_of(pipe.unet.config))
    write_json(net / "config.json", control.config.to_json())
    save_weights(control.state_dict(), net / "diffusion_pytorch_model.safetensors")
    settings = (net / "config.json").read_bytes()
    index = shards(some, scratch / "shards")
    plain = [safetensors.torch.save(some, {"a": "b"})]
    return {
        "safetensors": Target(scratch / "w", plain, spoil.as_safetensors, read_weights, 24),
        "pickle": Target(scratch / "p", pickles, spoil.as_checkpoint, read_weights, 24),
        "costly": Target(scratch / "c", [pickles[0]], spoil.as_costly, read_either_way, 2),
        "costly_text": Target(scratch / "t", plain, spoil.as_costly_text, read_both, 2),
        "single": Target(scratch / "single", [alone], spoil.as_own, read_single, 4),
        "inspect": Target(scratch / "seen", [alone, *pickles], spoil.as_any_weights, look_at, 3),
        "controlnet": Target(
            net / "config.json", [settings], spoil.as_json, lambda path: ldm.load_controlnet(path.parent, pipe), 2
        ),
        "index": Target(
            index, [index.read_bytes()], spoil.as_json, lambda path: read_weights(find_weights(path.parent, "m")), 7
        ),
    }


def shards(some: dict, folder: Path) -> Path:
    """Two of them, and their index."""
    folder.mkdir()
    table = {"a.weight": "x-1.safetensors", "b": "x-1.safetensors", "ids": "x-2.safetensors"}
    for shard in set(table.values()):
        safetensors.torch.save_file({name: some[name] for name in table if table[name] == shard}, folder / shard)
    write_json(folder / "m.safetensors.index.json", {"metadata": {}, "weight_map": table})
    return folder / "m.safetensors.index.json"


def checkpoints(some: dict, scratch: Path) -> list[bytes]:
    """As several programs save them: bare, with Lightning's leftovers, in protocol 4, with parameters and windows."""
    wide = torch.randn(6, 8)
    lightning = {
        "state_dict": collections.OrderedDict(some) | {"view": wide[1:, ::2], "p": torch.nn.Parameter(wide[0])},
        "global_step": 875000, "lr": np.float64(0.1), "hyper_parameters": argparse.Namespace(a=1, b=[1, 2]),
        "optimizer_states": [{"state": {0: {"step": 1, "exp_avg": wide}}}],
    }  # fmt: skip
    found = []
    for content, protocol in ((some, 2), (lightning, 2), (lightning, 4), ({"model": {"a": {"b": wide.T}}}, 2)):
        torch.save(content, scratch / "made", pickle_protocol=protocol)
        found.append((scratch / "made").read_bytes())
    return found


def control_of(unet: Any) -> ControlNetConfig:
    """The configuration of a ControlNet for that UNet."""
    shared = {field.name: getattr(unet, field.name) for field in fields(ControlNetConfig) if hasattr(unet, field.name)}
    return ControlNetConfig(**shared | {"conditioning_embedding_out_channels": (4, 4, 4, 4)})


def read_weights(paths: Any) -> None:
    files = WeightFiles(paths, allow_pickle=True)
    for name in files.entries:
        files.read(name).clone()


def read_either_way(path: Path) -> None:
    """A pickle, not allowed and allowed."""
    with contextlib.suppress(LDMError):
        WeightFiles(path)
    read_weights(path)


def read_both(path: Path) -> None:
    """A text as a header and as JSON."""
    with contextlib.suppress(LDMError):
        read_json(path)
    read_weights(path)


def read_single(path: Path) -> None:
    files = WeightFiles(path)
    found = recognise(files.entries, path, files.metadata)
    found.check_pipeline(path)
    for part in found.parts:
        found.origins(part)


def look_at(path: Path) -> None:
    """What `ldm inspect` prints of a stranger's file moves no cursor."""
    text = page(inspect(path), keys=True, coloured=False)
    if not text.replace("\n", "").isprintable():
        raise AssertionError(f"printed {text[:300]!r}")


# ---------------------------------------------------------------------------------------------------- JSON and texts


def texts(model: Path) -> dict[str, Target]:
    def of(place: str, read: Callable[[Path], Any], weight: int, how: Callable = spoil.as_json) -> Target:
        return Target(model / place, [(model / place).read_bytes()], how, read, weight)

    return {
        "model_index": of("model_index.json", partial(read_part, model, "vae"), 2),
        "unet": of("unet/config.json", partial(read_part, model, "unet"), 3),
        "vae": of("vae/config.json", partial(read_part, model, "vae"), 2),
        "text": of("text_encoder/config.json", partial(read_part, model, "text_encoder"), 2),
        "scheduler": of("scheduler/scheduler_config.json", partial(read_levels, model), 6),
        "defaults": of("ldm.json", partial(read_levels, model), 2),
        "json": of("tokenizer/vocab.json", read_json, 2),
        "vocabulary": of("tokenizer/vocab.json", read_words, 2),
        "merges": of("tokenizer/merges.txt", read_words, 3, spoil.as_lines),
        "tokens": of("tokenizer/tokenizer_config.json", read_words, 3),
        "specials": of("tokenizer/special_tokens_map.json", read_words, 2),
    }


def read_part(model: Path, name: str, _: Path) -> None:
    checkpoint = open_checkpoint(model, None, "transformers", False)
    check_fit(checkpoint)
    blank_part(name, checkpoint.configs[name])


def read_words(path: Path) -> None:
    Tokenizer.from_folder(path.parent)("a large red house, 2 ships <|endoftext|>")


def read_levels(model: Path, _: Path) -> None:
    config, _ = read_schedule(model)
    if config.num_train_timesteps > 20_000:  # allowed, and a table of a million rows takes its time
        raise LDMError("Too long to be fuzzed.")
    make_schedule(config, 5)


# ---------------------------------------------------------------------------------------------------- pictures


def pictures(scratch: Path) -> dict[str, Target]:
    given = scratch / "picture"
    return {
        "png": Target(given, drawn("PNG"), spoil.as_png, open_picture, 8),
        "labels": Target(scratch / "labels", drawn("PNG", "P"), spoil.as_png, as_labels, 2),
        "rerun": Target(scratch / "told", [told()], spoil.as_png, read_told, 6),
    } | {
        kind.lower(): Target(given, drawn(kind), spoil.blind, open_picture, 2)
        for kind in ("JPEG", "WEBP", "BMP", "TIFF", "GIF", "PPM")
    }


def drawn(kind: str, *modes: str) -> list[bytes]:
    """A picture of noise in each mode."""
    found = []
    for mode in modes or MODES.get(kind, ("RGB",)):
        image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (17, 24), dtype=np.uint8))
        image = Image.new(mode, image.size, 700) if mode == "I;16" else image.convert(mode)
        file = io.BytesIO()
        image.save(file, kind, **({"exif": TURNED} if kind == "JPEG" else {}))
        found.append(file.getvalue())
    return found


def told() -> bytes:
    """A PNG with a sound record."""
    sample = {str: "float32", int: 3, float: 1.5, bool: True, dict: {}}

    def value(kind: Any) -> Any:
        if kind in (NUMBERS, WORDS):
            return [1.0] if kind == NUMBERS else ["image=a.png"]
        return next((sample[each] for each in alternatives(kind) if each in sample), None)

    record = {name: value(kind) for name, kind in {**DECIDES, **SURROUNDS}.items()}
    info = PngInfo()
    info.add_text("ldm", json.dumps(record | BEFORE | {"sizes": {"original": [8, 8]}}))
    file = io.BytesIO()
    Image.new("RGB", (24, 17)).save(file, "PNG", pnginfo=info)
    return file.getvalue()


def read_told(path: Path) -> None:
    """As `ldm rerun` does before it draws."""
    record = read_record(path)
    open_picture(path)
    wishes.read_words(record["pictures"], str(path))
