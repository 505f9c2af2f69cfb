"""What a file or folder is, from the headers alone: no number of it is read, no pickle run, nothing fetched.

    print(inspect("scenes"))                   # an embedded model
    report = inspect("model.safetensors")      # report.what, report.parts, report.sound, ...

A folder says itself what it is, and the question is whether its weights are those that it asks for
(`folder.py`). A single file is recognised by its keys and shapes (`file.py`).
"""

from pathlib import Path

from ldm import hub
from ldm.checkpoints.places import CONFIG, INDEX, embedded
from ldm.errors import LDMError, nearest
from ldm.inspect.file import of_file
from ldm.inspect.folder import of_model, of_network
from ldm.inspect.report import Report
from ldm.io.folders import PICKLES, some

WEIGHTS = (".safetensors", *PICKLES)


def inspect(model: str | Path, variant: str | None = None) -> Report:
    """What lies there; `model` and `variant` as in `ldm.load`, or the file or folder of a single part.

    A damaged one is a report as well, with `faults`. Raises LDMError if there is nothing of that name on this machine.
    """
    place = find(model, variant)
    if not place.is_dir():
        return of_file(place, variant, str(model))
    try:
        if (place / INDEX).exists():
            return of_model(place, variant, str(model))
        if (place / CONFIG).exists():
            return of_network(place, variant, str(model))
    except LDMError as error:  # model_index.json or config.json is damaged: nothing else can be told
        return Report(str(place), "a folder", "damaged", "not readable", faults=(str(error),))
    files = sorted(path.name for path in place.iterdir() if path.suffix in WEIGHTS)
    files += sorted({path.parent.name for mark in (INDEX, CONFIG) for path in place.glob(f"*/{mark}")})
    inside = f"; it holds {some([repr(name) for name in files])}, to be named one by one" if files else ""
    fault = f"{place} is no model's folder: it has neither {INDEX} nor {CONFIG}{inside}."
    return Report(str(place), "a folder", faults=(fault,))


def find(model: str | Path, variant: str | None = None) -> Path:
    """Where it lies on this machine. Raises LDMError if it doesn't; nothing is fetched."""
    known = embedded(CONFIG) | embedded(INDEX)
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
