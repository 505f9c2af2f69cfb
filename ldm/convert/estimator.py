"""A depth model's estimator: no network of ours, and carried from folder to folder as it is.

What is carried is a stranger's: it is named to diffusers only if it is the network that belongs there, for diffusers
imports whatever it is told; and of its files those are copied that such a network has.
"""

import re
import shutil
from pathlib import Path

from ldm.checkpoints.checkpoint import Checkpoint
from ldm.checkpoints.places import INDEX
from ldm.errors import LDMError, say_on_stderr
from ldm.io.folders import read_fields
from ldm.tasks import task_of

CLASSES = {  # of transformers; an older and a newer name of one thing each
    "depth_estimator": ("DPTForDepthEstimation",),
    "feature_extractor": ("DPTFeatureExtractor", "DPTImageProcessor", "DPTImageProcessorFast", "DPTImageProcessorPil"),
}
FILES = re.compile(
    r"config\.json|preprocessor_config\.json|model[\w.\-]{0,200}\.safetensors(\.index[\w.]{0,100}\.json)?", re.ASCII
)


def carry_estimator(model: Checkpoint, new: Path) -> dict[str, list]:
    """Copy a depth model's estimator, out of a folder that has one, into `new`; what model_index.json says of it.

    Raises LDMError for a link that leads out of the model.
    """
    place, carried = model.place, {}
    if "depth_estimator" in model.index and list((place / "depth_estimator").glob("*.safetensors")):
        carried = named(place)
    for name in carried:
        (new / name).mkdir()
        for path in sorted((place / name).iterdir()):
            if FILES.fullmatch(path.name) and path.is_file():
                check_inside(path, place)
                shutil.copyfile(path, new / name / path.name)
    unet, vae = model.configs.get("unet"), model.configs["vae"]
    if unet is None:
        return {}
    if "depth_estimator" not in carried and task_of(unet.in_channels, vae.latent_channels) == "depth":
        say_on_stderr(
            f"{place} has no depth_estimator in safetensors: ldm takes the depth as a picture (--depth); "
            "diffusers' pipeline asks for one (depth_estimator=..., feature_extractor=...)."
        )
    return carried


def named(place: Path) -> dict[str, list]:
    """What of an estimator model_index.json names, if it is transformers' DPT; what isn't is said to be left out."""
    index, found = read_fields(place / INDEX), {}
    for name, classes in CLASSES.items():
        if index.get(name) in [["transformers", cls] for cls in classes]:
            if (place / name).is_dir():
                found[name] = index[name]
        elif index.get(name) not in (None, [None, None]):
            said = str(index[name])[:100]
            say_on_stderr(f"{place}: its {name} is {said}, not transformers' {classes[0]}, and is left out.")
    return found if "depth_estimator" in found else {}


def check_inside(path: Path, place: Path) -> None:
    """Refuse a link that leads out of the model: the copy could be of any file of this machine.

    Models in the hub's cache are links, from snapshots/<commit>/ to the same repository's blobs/.
    """
    home, real = place.resolve(), path.resolve()
    homes = [home] + [home.parent.parent / "blobs"] * (home.parent.name == "snapshots")
    if not any(real.is_relative_to(each) for each in homes):
        raise LDMError(f"{path} is a link out of the model, to {real}: don't trust it, or put the file in its place.")
