"""The packages that ldm needs, and those that only some features need: asked for their versions, not imported."""

import re
import sys
from collections.abc import Callable, Iterator
from importlib import metadata
from typing import NamedTuple

from ldm import __version__
from ldm.doctor.lines import BROKEN, LACKS, PACKAGE, Line, install

NEEDED = {"torch": "2.4", "numpy": "1.26", "pillow": "10", "safetensors": "0.4.3", "tqdm": "4.60"}
PROVEN = {"diffusers": "0.42.1", "transformers": "5.23.0"}  # what the tests compare with


class Optional(NamedTuple):
    """A package that some features need: the names it is installed by, and the extra of ldm that brings it."""

    name: str
    distributions: tuple[str, ...]
    least: str
    extra: str  # "" where none does
    stops: str  # what doesn't work without it, up to the package's name


OPENCV = ("opencv-python-headless", "opencv-python", "opencv-contrib-python-headless", "opencv-contrib-python")
OPTIONAL = (
    Optional("OpenCV", OPENCV, "4.8", "control", "Edges for ControlNets (canny, scribble) need"),
    Optional(
        "matplotlib", ("matplotlib",), "3.8", "plots", "Plots (`ldm schedule --plot`, `ldm compare-samplers`) need"
    ),
    Optional("scipy", ("scipy",), "1.11", "plots", "The beta choice of noise levels (`--sigmas beta`) needs"),
    Optional("jupyter", ("jupyter", "jupyterlab", "notebook"), "1.1", "notebooks", "The notebooks need"),
    Optional("transformers", ("transformers",), "5.6", "depth", "Depth of photographs (`ldm condition depth`) needs"),
    Optional("diffusers", ("diffusers",), "0.38", "test", "`ldm parity` and the tests need"),
    Optional("ftfy", ("ftfy",), "6", "", "The repair of broken letters in prompts (`clean='original'`) needs"),
    Optional("huggingface_hub", ("huggingface_hub",), "1.0", "hub", "Models from the hub (`ldm fetch`) need"),
    Optional("tokenizers", ("tokenizers",), "0.20", "flux", "FLUX's T5 needs"),
    Optional("bitsandbytes", ("bitsandbytes",), "0.48", "quantise", "Weights of 8 and 4 bits (`--quantise`) need"),
)


def installed(distribution: str) -> str | None:
    """The version of an installed package, which isn't imported; None if it isn't there."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def older(version: str, least: str) -> bool:
    """Whether a version comes before another: of each the numbers in front count ("2.13.0+cpu" is 2.13.0)."""
    numbers = [re.match(r"[\d.]*", each)[0].strip(".").split(".") for each in (version, least)]
    length = max(map(len, numbers))
    mine, other = ([int(n or 0) for n in each] + [0] * (length - len(each)) for each in numbers)
    return mine < other


def versions(version_of: Callable[[str], str | None] = installed) -> Iterator[Line]:
    """Python, ldm, and the packages that drawing needs."""
    yield Line("Python", f"{sys.version.split()[0]} ({sys.executable})")
    yield Line("ldm", f"{__version__} ({PACKAGE})")
    for name, least in NEEDED.items():
        version = version_of(name)
        if version is not None and not older(version, least):
            yield Line(name, version)
            continue
        text = "not installed" if version is None else f"{version}, too old"
        said = f"{name} is not installed" if version is None else f"{name} {version} is too old"
        fault = f"{said}: drawing needs {least} or newer."
        yield Line(name, text, BROKEN, fault, everything())


def everything() -> str:
    """The line that installs all that drawing needs, or what of it is missing."""
    return install([f"{name}>={least}" for name, least in NEEDED.items()], "")


def optional(version_of: Callable[[str], str | None] = installed) -> Iterator[Line]:
    """The packages that only some features need."""
    for each in OPTIONAL:
        version = next(filter(None, map(version_of, each.distributions)), None)
        command = install([f"{each.distributions[0]}>={each.least}"], each.extra or None)
        proven = PROVEN.get(each.name, version)
        if version is None:
            fault = f"{each.stops} {each.name}, which is not installed."
            yield Line(each.name, "not installed", LACKS, fault, command)
        elif older(version, each.least):
            fault = f"{each.stops} {each.name} {each.least} or newer, not {version}."
            yield Line(each.name, f"{version}, too old", LACKS, fault, command)
        elif version != proven:
            fault = f"ldm was proven against {each.name} {proven}, not {version}: `ldm parity` may find other numbers."
            command = install([f"{each.name}=={proven}"])
            yield Line(each.name, f"{version}, proven with {proven}", LACKS, fault, command)
        else:
            yield Line(each.name, version)
