"""A model's name becomes a place on this machine: an embedded model, a folder or file here, or the hub's."""

from pathlib import Path

from ldm import hub
from ldm.errors import LDMError, nearest
from ldm.io.folders import some
from ldm.text.embeddings import FILE as EMBEDDING

PACKAGE = Path(__file__).parent.parent
INDEX, CONFIG = "model_index.json", "config.json"  # what marks the folder of a whole model, and of one network
LORA = "pytorch_lora_weights.safetensors"  # and of what is added to a model, as diffusers calls it
ADDED = {LORA: "pipe.add_lora, --lora", EMBEDDING: "pipe.add_embedding, --embedding"}


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
    if option := next((ADDED[file] for file in ADDED if str(model) in embedded(file)), None):
        raise LDMError(f"The embedded {str(model)!r} is added to a model, and is none itself: {option}.")
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


def find_file(name: str | Path, mark: str) -> Path:
    """The file of what is added to a model, a LoRA or a word: an embedded one's name, a file, a folder that holds
    `mark`, which is how diffusers calls it there, or a file of the hub ("org/name/file.safetensors") that is here.

    Raises LDMError if there is none; nothing is fetched.
    """
    known, path, asked = embedded(mark), Path(name), hub.parse(str(name))
    if str(name) in known:
        return known[str(name)] / mark
    if path.is_file():
        return path
    if path.is_dir():
        files = sorted(each for each in path.iterdir() if each.suffix == ".safetensors")
        if (path / mark).is_file() or len(files) == 1:
            return path / mark if (path / mark).is_file() else files[0]
        inside = f"it holds {some([repr(each.name) for each in files])}" if files else "it holds no .safetensors"
        raise LDMError(f"{path} has no {mark}, and {inside}: name the file itself.")
    if asked is not None and asked.path and (found := hub.local(str(name), allow_pickle=True)) is not None:
        return found
    hint = ""
    if asked is not None:
        hint = f" Of the hub, `ldm fetch {name if asked.path else f'{name}/FILE'}` brings it, if you want it."
    names = ", ".join(known) or "none"
    raise LDMError(
        f"There is no file {str(name)!r} here, nor an embedded one of that name ({names})."
        + (nearest(str(name), known) or hint)
    )
