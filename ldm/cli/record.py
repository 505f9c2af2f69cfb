"""What a PNG of ldm says about itself: everything needed to draw it again, and to tell why it came out otherwise."""

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from types import UnionType
from typing import TYPE_CHECKING, get_args

from ldm import __version__
from ldm.errors import LDMError
from ldm.io.png import read_settings

if TYPE_CHECKING:
    from PIL import Image

    from ldm.cli.additions import Additions
    from ldm.cli.given import Given
    from ldm.pipeline import Pipeline
    from ldm.settings import Settings

NUMBERS, WORDS = list[float], list[str]
# What decides a picture: two records that agree in these are records of one picture (to within a grey level).
DECIDES = {
    "prompt": str, "negative": str | None, "seed": int, "steps": int, "sampler": str, "rule": str,
    "sigmas": str | NUMBERS,
    "timesteps": NUMBERS | None, "compat": bool, "guidance": float, "eta": float, "width": int, "height": int,
    "clip_skip": int, "dtype": str, "model_hash": str, "strength": float | None, "image_guidance": float | None,
    "noise_level": int | None, "given": dict, "sizes": dict | None, "negative_sizes": dict | None,
    "autocast": str | None, "dialect": str, "added": WORDS, "true_guidance": float,
    "max_sequence_length": int | None, "quantise": str | None,
}  # fmt: skip
# Where it was drawn: numbers may be rounded otherwise elsewhere. `batch` is how many pictures were drawn together.
# `pictures` are the words of the command line that name the pictures given; `given` is what they were. So are
# `additions` and `added` of what was added to the model.
# `memory` are the switches of `ldm.memory`; `reading`, which of the model's weights were taken, and as what.
SURROUNDS = {
    "model": str,
    "device": str,
    "batch": int,
    "version": str,
    "torch": str,
    "pictures": WORDS,
    "additions": WORDS,
    "memory": WORDS,
    "reading": WORDS,
}
# What pictures don't tell that were drawn before ldm was given any.
BEFORE = {"strength": None, "image_guidance": None, "noise_level": None, "given": {}, "pictures": []}
BEFORE |= {
    "sizes": None,
    "negative_sizes": None,
    "autocast": None,
    "memory": [],
}  # nor those that were drawn before ldm knew SDXL
BEFORE |= {"reading": []}  # nor those that were drawn before it read more than folders
BEFORE |= {"dialect": "plain", "added": [], "additions": []}  # nor those before it knew LoRAs, words and dialects
BEFORE |= {"true_guidance": 1.0, "max_sequence_length": None, "quantise": None}  # nor those before it knew FLUX


def make_record(
    pipe: "Pipeline", model: str, model_hash: str, settings: "Settings", clip_skip: int, batch: int, given: "Given"
) -> dict:
    """The record of a picture to be drawn with `settings`, the first of them if there are several."""
    import torch

    fields = json.loads(json.dumps(asdict(settings)))  # as a file gives it back: lists, no tuples
    del fields["denoising_start"], fields["denoising_end"]  # a picture that was drawn has been drawn to its end
    prompt, negative, seed = (fields.pop(name)[0] for name in ("prompt", "negative", "seeds"))
    return {
        "prompt": prompt,
        "negative": negative,
        "seed": seed,
        **fields,
        "clip_skip": clip_skip,
        "added": [],
        "additions": [],
        "given": given.record(),
        "pictures": given.words(),
        "dtype": dtype_of(pipe),
        "autocast": None if pipe.autocast is None else str(pipe.autocast).removeprefix("torch."),
        "quantise": quantised_to(pipe),
        "model": model,
        "model_hash": model_hash,
        "device": str(pipe.device),
        "batch": batch,
        "memory": [],
        "reading": [],
        "version": __version__,
        "torch": str(torch.__version__),
    }


def told_of_additions(additions: "Additions") -> dict:
    """What was added to the model, as a record has it: what it was, and the words of the command line that name it."""
    return {"added": additions.record(), "additions": additions.words()}


def told_of_memory(switches: dict) -> list[str]:
    """The switches of `ldm.memory` as a record has them: those that change the picture stand by themselves."""
    return [f"{name}={value}" for name, value in switches.items() if name not in ("autocast", "quantise")]


def told_of_reading(options: dict) -> list[str]:
    """How the model's files were read. That a pickle was allowed, a stranger's picture must not say for others."""
    return [f"{name}={value}" for name, value in options.items() if name != "allow_pickle"]


def reading_of(record: dict) -> dict[str, str]:
    """The options that `told_of_reading` wrote. Raises LDMError for others."""
    found = dict(word.partition("=")[::2] for word in record["reading"])
    if unknown := found.keys() - {"variant", "prediction_type", "parts_of"}:
        raise LDMError(f"The picture's settings ask to read the model by {min(unknown)!r}, which ldm doesn't know.")
    return found


def dtype_of(pipe: "Pipeline") -> str:
    """As `--dtype` has it: the network's, and those of parts that have another."""
    found = {name: str(part.dtype).removeprefix("torch.") for name, part in pipe.parts().items()}
    main = found["transformer" if pipe.flux else "unet"]
    return ",".join([main, *(f"{name}={dtype}" for name, dtype in found.items() if dtype != main)])


def quantised_to(pipe: "Pipeline") -> str | None:
    """As `--quantise` has it; None of weights that are whole."""
    from ldm.quantised import QuantisedLinear

    modules = (module for part in pipe.parts().values() for module in part.modules())
    return next((f"int{module.bits}" for module in modules if isinstance(module, QuantisedLinear)), None)


def pixel_hash(image: "Image.Image") -> str:
    """SHA-256 of the pixels alone: whatever becomes of the file, it tells whether they are those that were drawn."""
    return hashlib.sha256(image.convert("RGB").tobytes()).hexdigest()


def read_record(path: str | Path) -> dict:
    """The record in a PNG that ldm drew; a stranger may have written it, so nothing in it is taken on trust.

    Raises LDMError if there is none, or it isn't whole.
    """
    record = BEFORE | read_settings(path)
    if "step" in record:
        raise LDMError(f"{path} shows the inside of a run (--save-steps), not its result: name the picture it led to.")
    for name, kind in {**DECIDES, **SURROUNDS}.items():
        if name not in record or not any(sound(record[name], each) for each in alternatives(kind)):
            raise LDMError(
                f"{path}: its settings lack a sound {name!r} ({record.get(name)!r}): it isn't as this ldm writes it."
            )
    return record


def alternatives(kind: object) -> tuple:
    """The kinds that a value may be of: those that | stands between, or the one."""
    return get_args(kind) if isinstance(kind, UnionType) else (kind,)


def sound(value: object, kind: type) -> bool:
    """Whether a value out of a JSON file is of that kind; `True` is no number."""
    if kind in (NUMBERS, WORDS):
        return isinstance(value, list) and all(sound(each, *get_args(kind)) for each in value)
    kinds = (int, float) if kind is float else kind
    return isinstance(value, kinds) and (kind is bool or not isinstance(value, bool))


def differences(old: dict, new: dict, names: tuple[str, ...]) -> list[str]:
    """One line for each of `names` in which the records differ."""
    return [
        f"{name}: {old.get(name)!r} then, {new.get(name)!r} now" for name in names if old.get(name) != new.get(name)
    ]
