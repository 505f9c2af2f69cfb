"""What a PNG of ldm says about itself: everything needed to draw it again, and to tell why it came out otherwise."""

import hashlib
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from ldm import __version__
from ldm.errors import LDMError
from ldm.io.png import read_settings

if TYPE_CHECKING:
    from PIL import Image

    from ldm.pipeline import Pipeline, Settings

# What decides a picture: two records that agree in these are records of one picture (to within a grey level).
DECIDES = {
    "prompt": str, "negative": str, "seed": int, "steps": int, "guidance": float, "sampler": str, "eta": float,
    "width": int, "height": int, "clip_skip": int, "dtype": str, "model_hash": str,
}  # fmt: skip
# Where it was drawn: numbers may be rounded otherwise elsewhere. `batch` is how many pictures were drawn together.
SURROUNDS = {"model": str, "device": str, "batch": int, "version": str, "torch": str}


def make_record(
    pipe: "Pipeline", model: str, model_hash: str, settings: "Settings", clip_skip: int, batch: int
) -> dict:
    """The record of a picture to be drawn with `settings`, the first of them if there are several."""
    import torch

    fields = asdict(settings)
    prompt, negative, seed = (fields.pop(name)[0] for name in ("prompt", "negative", "seeds"))
    return {
        "prompt": prompt,
        "negative": negative,
        "seed": seed,
        **fields,
        "clip_skip": clip_skip,
        "dtype": str(pipe.dtype).removeprefix("torch."),
        "model": model,
        "model_hash": model_hash,
        "device": str(pipe.device),
        "batch": batch,
        "version": __version__,
        "torch": str(torch.__version__),
    }


def pixel_hash(image: "Image.Image") -> str:
    """SHA-256 of the pixels alone: whatever becomes of the file, it tells whether they are those that were drawn."""
    return hashlib.sha256(image.convert("RGB").tobytes()).hexdigest()


def read_record(path: str | Path) -> dict:
    """The record in a PNG that ldm drew; a stranger may have written it, so nothing in it is taken on trust.

    Raises LDMError if there is none, or it isn't whole.
    """
    record = read_settings(path)
    if "step" in record:
        raise LDMError(f"{path} shows the inside of a run (--save-steps), not its result: name the picture it led to.")
    for name, kind in {**DECIDES, **SURROUNDS}.items():
        value = record.get(name)
        kinds = (int, float) if kind is float else (kind,)
        if not isinstance(value, kinds) or isinstance(value, bool):
            raise LDMError(f"{path}: its settings lack a sound {name!r} ({value!r}): it isn't as ldm wrote it.")
    return record


def differences(old: dict, new: dict, names: tuple[str, ...]) -> list[str]:
    """One line for each of `names` in which the records differ."""
    return [
        f"{name}: {old.get(name)!r} then, {new.get(name)!r} now" for name in names if old.get(name) != new.get(name)
    ]
