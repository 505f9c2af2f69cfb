"""A model written out: as a folder in diffusers' format, or as a single file in the original layout.

A tensor is read when it is its turn to be written, so that memory holds one at a time, and of OpenCLIP's layers three.
(What a network predicts may have to be tried out before, which takes the whole UNet: `ldm.convert.predicted`.) A single
file carries its configurations in its metadata (`described.metadata`), so that models of one's own widths come back
too. A tokenizer has no place in it: one that isn't CLIP's own is written beside it, where `vocabulary` looks first.
"""

import hashlib
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ldm.checkpoints import names
from ldm.checkpoints.checkpoint import NETWORKS, Checkpoint
from ldm.checkpoints.places import CONFIG, INDEX
from ldm.checkpoints.vocabulary import MERGES_SHA256, clip_tokenizer, save_tokenizer
from ldm.convert.described import metadata, model_index, own_defaults, padding, scheduler_fields
from ldm.convert.estimator import carry_estimator
from ldm.errors import LDMError, bytes_in_words, say_on_stderr
from ldm.io.atomic import atomic_folder, check_writable
from ldm.io.folders import PICKLES, read_fields, write_json
from ldm.io.misfits import Found, refuse_misfits
from ldm.io.weights import DTYPES, Tensors, save_weights
from ldm.text.clip import TextConfig
from ldm.text.t5_tokenizer import JSON, SPIECE, T5Tokenizer
from ldm.text.tokenizer import Tokenizer

STEM = "diffusion_pytorch_model"
ALONE = {  # by class
    "ControlNetModel": "controlnet",
    "AutoencoderKL": "vae",
    "UNet2DConditionModel": "unet",
    "FluxTransformer2DModel": "transformer",
}
Tick = Callable[[int], object]  # told the bytes of a tensor, when it is written
Begin = Callable[[int], Tick]  # told the bytes of all, before the first


class Ours:
    """A part's tensors under our names, compared with what its configuration asks for before a number is read."""

    def __init__(self, part: str, config: Any, tensors: Tensors, say: Callable[[str], None] = say_on_stderr):
        network = names.CLASSES[type(config)]
        rename = getattr(network, "rename", None) or (lambda name: name)
        self.tensors = tensors
        renamed = {name: rename(name) for name in tensors.entries}
        entries = {name: (key, tensors.entries[name]) for name, key in renamed.items() if key is not None}
        with torch.device("meta"):
            expected = {key: torch.empty(shape) for key, shape in names.shapes(part, config).items()}
        found = [Found(key, entry, DTYPES.get(entry.dtype)) for key, entry in entries.values()]
        refuse_misfits(f"{tensors.place} does not fit the model {network.__name__}", expected, found)
        self.names: dict[str, str] = {}
        for name, (key, _) in entries.items():
            if key in self.names and not torch.equal(self.read(key), tensors.read(name)):
                raise LDMError(f"{tensors.place}: {name!r} is a second {key!r}, with other numbers; don't trust it.")
            self.names.setdefault(key, name)
        if idle := [name for name, key in renamed.items() if key is None]:
            say(f"{tensors.place}: {', '.join(idle)} is no weight, and is passed over.")

    def read(self, key: str) -> Tensor:
        return self.tensors.read(self.names[key])

    def outline(self, key: str) -> Tensor:
        """Its shape and type alone, on the meta device."""
        entry = self.tensors.entries[self.names[key]]
        return torch.empty(entry.shape, dtype=DTYPES[entry.dtype], device="meta")

    def bytes(self, dtype: torch.dtype | None) -> int:
        """How much room they take, as that type or as the one each has."""
        entries = [self.tensors.entries[name] for name in self.names.values()]
        return sum(prod(entry.shape) * (dtype or DTYPES[entry.dtype]).itemsize for entry in entries)


@dataclass(frozen=True)
class Source:
    """What is to be written: a whole `model`, or one network alone; `weights` gives each one's tensors, by our names.

    `title`: its name, for the metadata; `remarks`: what more these are to say.
    """

    place: Path
    title: str
    configs: Mapping[str, Any]
    weights: Mapping[str, Ours]
    model: Checkpoint | None = None
    remarks: Mapping[str, str] = field(default_factory=dict)

    def bytes(self, dtype: torch.dtype | None) -> int:
        """How much room the numbers take, as that type or as those they have."""
        return sum(tensors.bytes(dtype) for tensors in self.weights.values())


class Written(NamedTuple):
    """What has been written: the place, what lies there, how large it is, and the folders beside it."""

    path: Path
    source: Source
    bytes: int
    beside: tuple[Path, ...] = ()

    @property
    def parts(self) -> tuple[str, ...]:
        return tuple(self.source.configs)


def check_target(target: str | Path, overwrite: bool) -> None:
    """Raise LDMError, before anything is read, for a target that may not or can't be written."""
    target = Path(target)
    if target.suffix.lower() in PICKLES:
        raise LDMError(f"{target} would be a pickle, and ldm writes none: name a .safetensors file, or a folder.")
    if is_file(target):
        check_writable(target)
    elif not target.parent.is_dir():
        raise LDMError(f"Cannot write {target}: the folder {target.parent} does not exist; create it first.")
    elif target.exists() and not target.is_dir():
        raise LDMError(f"{target} is a file; a single file is written as .safetensors, everything else as a folder.")
    if target.exists() and not overwrite:
        raise LDMError(f"{target} is there already: choose another target, or say overwrite (--overwrite).")
    if target.is_dir() and any(target.iterdir()) and not is_model(target):
        raise LDMError(f"{target} holds something else than a model, and would be replaced: choose another target.")


def check_apart(place: Path, target: str | Path) -> None:
    """Raise LDMError for a target that is what is to be converted, or a folder around it, or lies inside of it."""
    # A source that is a link, as in the hub's cache, is lost with the link as well.
    origins, goal = [place.resolve(), place.parent.resolve() / place.name], Path(target).resolve()
    if any(goal in (origin, *origin.parents) for origin in origins):
        raise LDMError(f"{target} holds what is to be converted, and would be replaced: choose another target.")
    if any(origin in goal.parents for origin in origins):
        raise LDMError(f"{target} lies inside of what is to be converted, {place}: choose a target outside of it.")


def is_model(folder: Path) -> bool:
    """Whether that is the folder of a model, or of one network."""
    if (folder / INDEX).is_file():
        return True
    return (folder / CONFIG).is_file() and read_fields(folder / CONFIG).get("_class_name") in ALONE


def is_file(target: Path) -> bool:
    """Whether that name is a single file's."""
    return target.suffix.lower() == ".safetensors"


def write(
    source: Source,
    target: str | Path,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
    begin: Begin = lambda bytes: lambda done: None,
) -> Written:
    """Write what was opened, to a target that was checked. See `convert`."""
    target, size = Path(target), source.bytes(dtype)
    check_room(target, size)
    tick = begin(size)
    if is_file(target):
        beside = write_file(source, target, dtype, overwrite, tick)
    else:
        beside = write_folder(source, target, dtype, tick)
    return Written(target, source, size, beside)


def check_room(target: Path, size: int) -> None:
    """Raise LDMError if the disk hasn't so many bytes left."""
    free = shutil.disk_usage(target.parent).free
    if size > free:
        need, have = bytes_in_words(size), bytes_in_words(free)
        raise LDMError(f"{target} needs {need}, and {have} are free there: free some space, or choose another target.")


class Lazy(Mapping[str, Tensor]):
    """Tensors by name that are read when they are asked for, each time anew."""

    def __init__(self, reads: Mapping[str, Callable[[], Tensor]]):
        self.reads = reads

    def __getitem__(self, name: str) -> Tensor:
        return self.reads[name]()

    def __iter__(self) -> Iterator[str]:
        return iter(self.reads)

    def __len__(self) -> int:
        return len(self.reads)


def write_folder(source: Source, target: Path, dtype: torch.dtype | None, tick: Tick) -> tuple[Path, ...]:
    """diffusers' format: a folder a part, or one network's files."""
    model = source.model
    with atomic_folder(target) as new:
        if model is None:
            ((part, config),) = source.configs.items()
            write_part(new, part, config, source, dtype, tick)
            return ()
        for part, config in source.configs.items():
            (new / part).mkdir()
            write_part(new / part, part, config, source, dtype, tick)
        for name, tokenizer in model.tokenizers.items():
            save_tokenizer(tokenizer, new / name)
        for name, scheduler in (("scheduler", model.scheduler), ("low_res_scheduler", model.low_res)):
            if scheduler is not None:
                (new / name).mkdir()
                write_json(new / name / "scheduler_config.json", scheduler_fields(scheduler))
        if defaults := own_defaults(model):
            write_json(new / "ldm.json", defaults)
        write_json(new / INDEX, model_index(model, carry_estimator(model, new)))
    return ()


def write_part(folder: Path, part: str, config: Any, source: Source, dtype: torch.dtype | None, tick: Tick) -> None:
    """One network's configuration and weights."""
    tensors = source.weights[part]
    write_json(folder / CONFIG, config.to_json())
    stem = NETWORKS[part].stem if part in NETWORKS else STEM
    # The outer `text_model.` is what every version of transformers reads; the projection lies outside of it.
    outer = "text_model." if isinstance(config, TextConfig) else ""
    keys = {(key if key.startswith("text_projection") else outer + key): key for key in tensors.names}
    reads = {name: partial(tensors.read, key) for name, key in keys.items()}
    outline = {name: tensors.outline(key) for name, key in keys.items()}
    save_weights(Lazy(reads), folder / f"{stem}.safetensors", dtype, dict(source.remarks), tick, outline)


def write_file(
    source: Source, target: Path, dtype: torch.dtype | None, overwrite: bool, tick: Tick
) -> tuple[Path, ...]:
    """The original layout, in one file; and beside it the tokenizers that it can't hold."""
    model, reads, outline = source.model, {}, {}
    for part, config in source.configs.items():
        tensors, origins = source.weights[part], names.origins(part, config, *layout(part, source))
        reads |= originals(tensors.read, origins)
        outline |= {name: make() for name, make in originals(tensors.outline, origins).items()}
    if model is not None:
        reads |= marks(model)
        outline |= {name: make() for name, make in marks(model).items()}
        if "depth_estimator" in model.index:
            say_on_stderr(f"{source.place}: its depth_estimator has no place in a single file and is left out.")
    said = metadata(source.configs, model, source.title) | source.remarks
    beside = {} if model is None else beside_file(target, model.tokenizers, overwrite)
    with ExitStack() as stack:  # the folders take their places when the file has
        for folder, tokenizer in beside.items():
            save_tokenizer(tokenizer, stack.enter_context(atomic_folder(folder)))
        save_weights(Lazy(reads), target, dtype, said, tick, outline)
    return tuple(beside)


def layout(part: str, source: Source) -> tuple[str, str]:
    """Below which prefix, and in which of `names`' layouts, a single file keeps a part."""
    if source.model is None and part in ("vae", "transformer"):
        return "", "original"  # as VAEs, and FLUX's transformers, are published alone
    if part == "controlnet" and source.configs[part].is_xl:
        return "", "diffusers"  # the only layout in which SDXL's were ever published, and that diffusers reads
    return names.prefixes(source.configs)[part], "original"


def originals(read: Callable[[str], Tensor], origins: Mapping[str, names.Origin]) -> dict[str, Callable[[], Tensor]]:
    """How each tensor of the original layout is made: of one of ours, or of three, which `read` gives by our names."""
    groups: dict[str, list[str]] = {}
    for key, origin in origins.items():
        groups.setdefault(origin.name, []).append(key)

    def make(name: str) -> Tensor:
        return names.to_original({key: read(key) for key in groups[name]}, origins)[name]

    return {name: partial(make, name) for name in groups}


def marks(model: Checkpoint) -> dict[str, Callable[[], Tensor]]:
    """Empty tensors by which other programs know that an SDXL predicts velocity, and begins from pure noise."""
    unet = model.configs.get("unet")
    if unet is None or not unet.is_xl or model.scheduler.prediction_type != "v_prediction":
        return {}
    said = ["v_pred"] + ["ztsnr"] * model.scheduler.rescale_betas_zero_snr
    return {name: (lambda: torch.zeros(0)) for name in said}


def beside_file(
    target: Path, tokenizers: Mapping[str, Tokenizer | T5Tokenizer], overwrite: bool
) -> dict[Path, Tokenizer | T5Tokenizer]:
    """The tokenizers that must lie beside the file, and where: those that `vocabulary` would not find otherwise.

    That is, those that are not CLIP's own (T5's among them), and all where other tokenizers lie in the way.
    """
    found = {}
    for name, tokenizer in tokenizers.items():
        folder = target.with_name(f"{target.stem}.{name}")
        others = [folder, target.with_name(target.stem) / name, target.with_name(name)]
        if isinstance(tokenizer, Tokenizer) and is_clip(tokenizer) and not any(other.is_dir() for other in others):
            continue
        if folder.exists() and not overwrite:
            raise LDMError(f"{folder} is there already: choose another target, or say overwrite (--overwrite).")
        mine = any((folder / each).exists() for each in ("vocab.json", JSON, SPIECE))
        if folder.is_dir() and any(folder.iterdir()) and not mine:
            raise LDMError(f"{folder} holds something else than a tokenizer: choose another target.")
        found[folder] = tokenizer
    return found


def is_clip(tokenizer: Tokenizer) -> bool:
    """Whether it is the one that `vocabulary` makes of CLIP's vocabulary and that padding."""
    merges = sorted(tokenizer.ranks, key=tokenizer.ranks.get)
    if hashlib.sha256("\n".join(map(" ".join, merges)).encode()).hexdigest() != MERGES_SHA256:
        return False
    usual = clip_tokenizer(merges, padding(tokenizer))
    return all(
        getattr(tokenizer, name) == getattr(usual, name)
        for name in ("vocab", "ids", "added", "bos_id", "eos_id", "unk_id", "pad_id", "max_length")
    )
