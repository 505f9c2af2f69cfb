"""A model's name becomes a place on this machine: an embedded model, a folder or file here, or the hub's."""

from collections.abc import Callable
from pathlib import Path

from ldm import hub
from ldm.errors import LDMError, nearest
from ldm.io.folders import PICKLES, some

PACKAGE = Path(__file__).parent.parent
INDEX, CONFIG = "model_index.json", "config.json"  # what marks the folder of a whole model, and of one network
LORA = "pytorch_lora_weights.safetensors"  # and of what is added to a model, as diffusers calls it
EMBEDDING = "learned_embeds.safetensors"
MOST_LETTERS = 4096  # of a path, on most systems
KINDS = {  # what an embedded thing is by its mark, and what reads it
    INDEX: ("a whole model", "ldm.load, --model"),
    CONFIG: ("a ControlNet", "ldm.load_controlnet, --control"),
    LORA: ("a LoRA", "pipe.add_lora, --lora"),
    EMBEDDING: ("a learnt word", "pipe.add_embedding, --embedding"),
}


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
    if added := next((each for each in (LORA, EMBEDDING) if str(model) in embedded(each)), None):
        raise LDMError(f"The embedded {str(model)!r} is added to a model, and is none itself: {KINDS[added][1]}.")
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
    text = str(name)
    if not isinstance(name, str | Path) or not text or len(text) > MOST_LETTERS or "\0" in text:
        raise LDMError(f"What is added is named by a file, a folder or an embedded one's name, not by {name!r:.60}.")
    known, path = embedded(mark), Path(name)
    if text in known:
        return known[text] / mark
    if is_there(path, Path.is_file):
        return path
    if is_there(path, Path.is_dir):
        files = sorted(each for each in path.iterdir() if each.suffix == ".safetensors")
        if (path / mark).is_file() or len(files) == 1:
            return path / mark if (path / mark).is_file() else files[0]
        inside = f"it holds {some([repr(each.name) for each in files])}" if files else "it holds no .safetensors"
        raise LDMError(f"{path} has no {mark}, and {inside}: name the file itself.")
    if other := next((each for each in KINDS if each != mark and text in embedded(each)), None):
        what, how = KINDS[other]
        raise LDMError(f"The embedded {text!r} is {what}, and not {KINDS[mark][0]}: {how}.")
    asked = hub.parse(text)
    if asked is not None and asked.path and (found := hub.local(text, allow_pickle=True)) is not None:
        return found
    names = ", ".join(known) or "none"
    raise LDMError(
        f"There is no file {text!r} here, nor an embedded one of that name ({names})."
        + (nearest(text, known) or hint_of_hub(text))
    )


def is_there(path: Path, kind: Callable[[Path], bool]) -> bool:
    """Whether a file or a folder is there; a name that is longer than names may be is none."""
    try:
        return kind(path)
    except OSError:
        return False


def hint_of_hub(text: str) -> str:
    """How to fetch it, if it may be an address on the hub: a file's name, or one in a folder that is here, isn't."""
    asked, first = hub.parse(text) if "/" in text else None, text.partition("/")[0]
    if asked is None or Path(first).is_dir() or (not asked.path and text.endswith((".safetensors", *PICKLES))):
        return ""
    return f" Of the hub, `ldm fetch {text if asked.path else f'{text}/FILE'}` brings it, if you want it."
