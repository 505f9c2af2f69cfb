"""FLUX's transformer from one place, all other parts from another: transformers are published and tuned alone."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from ldm.checkpoints.checkpoint import STEM, Checkpoint, family_defaults
from ldm.checkpoints.folder import open_folder
from ldm.checkpoints.names import Renamed
from ldm.checkpoints.places import CONFIG, INDEX
from ldm.checkpoints.single import look, tell
from ldm.errors import LDMError, say_on_stderr
from ldm.io.folders import find_weights, read_fields
from ldm.io.weights import Tensors, WeightFiles
from ldm.models.flux import FluxConfig
from ldm.schedules import ScheduleConfig

Say = Callable[[str], None]


def open_together(
    place: Path,
    home: Path,
    variant: str | None = None,
    clean: str = "transformers",
    allow_pickle: bool = False,
    say: Say = say_on_stderr,
) -> Checkpoint:
    """The transformer that lies alone at `place`, a file or a folder, with the other parts of the folder `home`.

    Its levels of noise are those of its own kind, unless the folder's transformer is of that kind, too. Of the weights
    nothing is read yet. Raises LDMError if there is no transformer alone, or no FLUX.
    """
    if not home.is_dir():
        raise LDMError(f"parts_of must name a FLUX.1's folder, or an address on the hub, and {home} is a file.")
    config, tensors, said = (in_folder if place.is_dir() else in_file)(place, variant, allow_pickle, say)
    rest = open_folder(home, variant, clean, allow_pickle, say)
    if "transformer" not in rest.configs:
        raise LDMError(f"{home} is no FLUX.1, whose parts belong to a transformer: name another as parts_of.")
    say(f"{place}: all other parts are those of {home}.")
    scheduler, defaults, index = rest.scheduler, rest.defaults, rest.index
    if config != rest.configs["transformer"]:
        scheduler = ScheduleConfig.from_json(said) if said else scheduler
        defaults = family_defaults(config)
        index = {name: value for name, value in index.items() if name != "_class_name"}

    def weights(name: str) -> Tensors:
        return tensors if name == "transformer" else rest.weights(name)

    configs = rest.configs | {"transformer": config}
    return replace(
        rest, place=place, configs=configs, weights=weights, scheduler=scheduler, defaults=defaults, index=index
    )


def in_file(place: Path, variant: str | None, allow_pickle: bool, say: Say) -> tuple[FluxConfig, Tensors, dict]:
    """A file's transformer: its configuration, its tensors, and the scheduler of its kind ({} if that isn't known)."""
    files, found = look(place, allow_pickle)
    found.check(place)
    if found.kind != "transformer":
        what = "it is a whole model" if found.backbone and not found.lacks else "that is no transformer of FLUX alone"
        raise LDMError(f"{place} is {found.reason}: {what}, so leave parts_of out (--parts-of).")
    tell(place, found, False, say)
    return found.configs["transformer"], Renamed(files, found.origins("transformer")), found.architecture.scheduler


def in_folder(place: Path, variant: str | None, allow_pickle: bool, say: Say) -> tuple[FluxConfig, Tensors, dict]:
    """The same of a folder in diffusers' format."""
    fields: dict[str, Any] = read_fields(place / CONFIG) if (place / CONFIG).is_file() else {}
    if (place / INDEX).exists() or fields.get("_class_name") != FluxConfig.class_name:
        what = "is a whole model" if (place / INDEX).exists() else "holds no transformer of FLUX alone"
        raise LDMError(f"{place} {what}: leave parts_of out (--parts-of).")
    return FluxConfig.from_json(fields), WeightFiles(find_weights(place, STEM, variant, allow_pickle, say)), {}
