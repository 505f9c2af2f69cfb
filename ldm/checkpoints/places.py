"""A model's name becomes a place on this machine: an embedded model, a folder or file here, or the hub's."""

from pathlib import Path

from ldm import hub
from ldm.errors import LDMError, nearest

PACKAGE = Path(__file__).parent.parent
INDEX, CONFIG = "model_index.json", "config.json"  # what marks the folder of a whole model, and of one network


def embedded(mark: str = INDEX) -> dict[str, Path]:
    """The models that travel with ldm, those that hold the file `mark`: "config.json" is a ControlNet's.

    They lie in `weights/` of a checkout, or inside an installed package.
    """
    for root in (PACKAGE / "weights", PACKAGE.parent / "weights"):
        found = {path.parent.name: path.parent for path in sorted(root.glob(f"*/{mark}"))}
        if found:
            return found
    return {}


def check_here(model: str, variant: str | None = None, allow_pickle: bool = False) -> None:
    """Raise LDMError for an address on the hub that isn't here, where nobody asked for a download.

    A stranger's picture must not start one.
    """
    known = model in embedded() or model in embedded(CONFIG) or Path(model).exists()
    if not known and hub.parse(model) is not None and hub.local(model, variant, allow_pickle) is None:
        raise LDMError(f"The model {model!r} isn't here: `ldm fetch {model}` brings it, if you want it.")


def find_model(model: str | Path, mark: str = INDEX, variant: str | None = None, allow_pickle: bool = False) -> Path:
    """The folder or file of an embedded model's name, of a path, or of an address on the hub.

    An address ("org/name", or a short name of `ldm fetch`) is fetched, unless it is here already: then no connection is
    made. Raises LDMError if there is no such model.
    """
    known, other = embedded(mark), embedded(CONFIG if mark == INDEX else INDEX)
    if str(model) in known:
        return known[str(model)]
    if str(model) in other:
        which = "a ControlNet: load_controlnet" if mark == INDEX else "a whole model: load"
        raise LDMError(f"The embedded {str(model)!r} is {which} reads it.")
    path = Path(model)
    if path.exists():
        return path
    if hub.parse(str(model)) is not None:
        try:
            return hub.fetch(str(model), variant, allow_pickle)
        except LDMError as error:  # it may be a path with a slip in it
            raise LDMError(f"{str(error).rstrip('.')}. (There is no folder or file {str(model)!r} here.)") from error
    names = ", ".join(known) or "none"
    raise LDMError(
        f"There is no model {str(model)!r}: neither a folder or file here, nor a name of the hub (org/name; `ldm "
        f"fetch` lists some), nor an embedded model ({names})." + nearest(str(model), known)
    )
