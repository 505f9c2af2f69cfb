"""What a file or folder is, from the headers alone: no number of it is read, no pickle run, nothing fetched.

    print(inspect("scenes"))                           # an embedded model
    report = inspect("model.safetensors")              # report.what, report.parts, report.sound, ...
    print(inspect("style.safetensors", base="sd15"))   # a LoRA: what it changes, and whether it goes with that model

A folder says itself what it is, and the question is whether its weights are those that it asks for
(`folder.py`). A single file is recognised by its keys and shapes (`file.py`). Of what is added to a model, a LoRA
(`adapter.py`) or a word (`word.py`), the numbers are read: they are few; and of a model that it goes with, if it is
here, those that it changes.
"""

from dataclasses import replace
from pathlib import Path

from ldm import hub
from ldm.checkpoints.places import CONFIG, INDEX, embedded
from ldm.errors import LDMError, nearest
from ldm.inspect.bases import ADDED, Base, of_place
from ldm.inspect.file import of_file
from ldm.inspect.folder import of_model, of_network
from ldm.inspect.report import ADDED as KINDS
from ldm.inspect.report import Report
from ldm.io.folders import PICKLES, some

WEIGHTS = (".safetensors", *PICKLES)


def inspect(model: str | Path, variant: str | None = None, base: str | Path | None = None) -> Report:
    """What lies there; `model` and `variant` as in `ldm.load`, or the file or folder of a single part, or of a LoRA ...

    `base`: a model; of a LoRA or an embedding the report then says whether it goes with that one. A damaged file is a
    report as well, with `faults`. Raises LDMError if there is nothing of that name on this machine.
    """
    on = None if base is None else of_place(find(base), str(base))
    report = look(find(model, variant), variant, str(model), on)
    if on is None or report.kind in (*KINDS, "damaged"):
        return report
    idle = f"Whether it goes with {on.title} is asked of LoRAs and embeddings alone, and it is neither."
    return replace(report, warnings=(*report.warnings, idle))


def look(place: Path, variant: str | None, name: str, on: Base | None) -> Report:
    """The report of the file or folder `place`, which its user calls `name`."""
    if not place.is_dir():
        return of_file(place, variant, name, on)
    try:
        if (place / INDEX).exists():
            return of_model(place, variant, name)
        if (place / CONFIG).exists():
            return of_network(place, variant, name)
    except LDMError as error:  # model_index.json or config.json is damaged: nothing else can be told
        return Report(str(place), "a folder", "damaged", "not readable", faults=(str(error),))
    for mark in ADDED:
        if (place / mark).exists():
            return of_file(place / mark, variant, name, on)
    files = sorted(path.name for path in place.iterdir() if path.suffix in WEIGHTS)
    files += sorted({path.parent.name for mark in (INDEX, CONFIG) for path in place.glob(f"*/{mark}")})
    inside = f"; it holds {some([repr(name) for name in files])}, to be named one by one" if files else ""
    fault = f"{place} is no model's folder: it has neither {INDEX} nor {CONFIG}{inside}."
    return Report(str(place), "a folder", faults=(fault,))


def find(model: str | Path, variant: str | None = None) -> Path:
    """Where it lies on this machine. Raises LDMError if it doesn't; nothing is fetched."""
    known = embedded(CONFIG) | embedded(INDEX)
    for mark in ADDED:
        known |= embedded(mark)
    if str(model) in known:
        return known[str(model)]
    if Path(model).exists():
        return Path(model)
    if hub.parse(model) is None:
        names = ", ".join(known) or "none"
        raise LDMError(
            f"There is no {str(model)!r} to inspect: it is neither a folder or file here, nor an embedded model "
            f"({names}), nor a name of the hub (org/name).{nearest(str(model), known)}"
        )
    found = hub.local(model, variant, allow_pickle=True, settle=True)
    if found is None:
        raise LDMError(
            f"There is no folder or file {str(model)!r} here, nor is it on this machine as a name of the hub: check "
            f"the path; or `ldm fetch {model}` says how large it is, and fetches it."
        )
    return found
