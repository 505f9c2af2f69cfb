"""Real models in notebooks: a cell that runs where the weights are, and shows clearly where it did not."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from ldm.errors import LDMError

if TYPE_CHECKING:
    from ldm.pipeline import Pipeline

# The name a notebook uses -> what it is, and the size of its folder in half precision.
MODELS = {
    "sd15": ("Stable Diffusion 1.5", "2.7 GB"),
    "sd15-canny": ("the ControlNet for Canny edges of Stable Diffusion 1.5", "0.7 GB"),
}


def folder_of(name: str) -> Path | None:
    """Where the weights of a real model lie: the environment variable LDM_SD15 names the folder of "sd15"."""
    if name not in MODELS:
        raise LDMError(f"The notebooks know no real model {name!r}: they know {', '.join(MODELS)}.")
    told = os.environ.get(variable(name))
    if told and not Path(told).is_dir():
        raise LDMError(f"{variable(name)} names {told}, which is no folder: name the model's folder, or unset it.")
    return Path(told) if told else None


def variable(name: str) -> str:
    return "LDM_" + name.upper().replace("-", "_")


def real(name: str) -> "Pipeline | None":
    """The real model, or None with a line that says that the cell did not run and what it needs."""
    from ldm.loading import load

    return or_say(name, load)


def real_controlnet(name: str, pipe: "Pipeline | None") -> object | None:
    """A real ControlNet for `pipe`, or None, as `real`."""
    from ldm.loading import load_controlnet

    return or_say(name, lambda folder: load_controlnet(folder, pipe) if pipe is not None else None)


def or_say(name: str, load: Callable) -> object | None:
    folder = folder_of(name)
    if folder is not None:
        return load(str(folder))
    title, size = MODELS[name]
    print(
        f"NOT RUN: this cell needs {title} ({size}), which is not on this machine.\nWith its folder "
        f"(diffusers' format, safetensors) in the environment variable {variable(name)}, the same cell runs on it."
    )
    return None
