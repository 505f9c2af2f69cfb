"""Model folders: which files hold a model's weights, the JSON beside them, and a hash of the whole."""

import errno
import hashlib
import json
import math
import os
import re
import stat
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any

from ldm.errors import LDMError, say_on_stderr
from ldm.io.atomic import atomic_file

# Far above every real file; a bracket is some 90 bytes of memory.
MOST_JSON_BYTES, MOST_BRACKETS = 10_000_000, 500_000
AGAIN = "download or copy it again"
PICKLES = (".ckpt", ".pt", ".pth", ".bin")  # endings of weights that are pickles


# ---------------------------------------------------------------------------------------------------- finding files


def find_weights(
    folder: str | Path,
    stem: str,
    variant: str | None = None,
    allow_pickle: bool = False,
    say: Callable[[str], None] = say_on_stderr,
) -> list[Path]:
    """The weight files of one model: `stem` is "diffusion_pytorch_model" (diffusers) or "model" (transformers).

    One file `stem[.variant].safetensors`, or the shards that `stem.safetensors.index[.variant].json` lists. If only
    another variant is there, it is taken, and `say` is told so. Pickles (.bin) are looked for where there is nothing
    else, and only if `allow_pickle`.
    Raises LDMError if there is nothing to read, if it is ambiguous, or if the index is not to be trusted.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise LDMError(f"There is no folder {folder}: check the path, or download the model again.")
    ending, found = "safetensors", _variants(folder, stem, "safetensors")
    if not found and allow_pickle:
        ending, found = "bin", _variants(folder, PICKLED.get(stem, stem), "bin")
    if not found:
        raise _nothing_found(folder, stem)
    chosen = variant if variant in found else None if None in found else next(iter(found))
    if chosen not in (variant, None) and len(found) > 1:
        names = ", ".join(sorted(p.name for p in found.values()))
        raise LDMError(f"{folder} holds several variants ({names}): name one of them as `variant`.")
    path = found[chosen]
    if chosen != variant:
        say(f"{folder}: no {f'variant {variant!r}' if variant else 'weights without a variant'}; reading {path.name}.")
    return _shards(path, ending) if path.suffix == ".json" else [path]


PICKLED = {"model": "pytorch_model"}  # transformers' name of its pickles


def _variants(folder: Path, stem: str, ending: str) -> dict[str | None, Path]:
    """{variant: its single file or its index}"""
    single = re.compile(re.escape(stem) + rf"(?:\.(\w+))?\.{ending}")  # \w excludes the "-" of shard names
    index = re.compile(re.escape(stem) + rf"\.{ending}\.index(?:\.(\w+))?\.json")
    found = {}
    for path in sorted(folder.iterdir()):
        match = single.fullmatch(path.name) or index.fullmatch(path.name)
        if match is None:
            continue
        if match[1] in found:
            raise LDMError(f"{folder} holds both {found[match[1]].name} and {path.name}: remove the outdated one.")
        found[match[1]] = path
    return found


def _nothing_found(folder: Path, stem: str) -> LDMError:
    names = sorted(p.name for p in folder.iterdir())
    shards = [n for n in names if re.match(re.escape(stem) + r".*-\d+-of-\d+.*\.safetensors$", n)]
    if shards:
        return LDMError(f"{folder} holds shards ({shards[0]}) without {stem}.safetensors.index.json: download it too.")
    pickles = [n for n in names if n.endswith(PICKLES)]
    if pickles:
        return LDMError(
            f"{folder} holds only a pickle ({pickles[0]}), which can run any code when it is opened: take the model's "
            "safetensors files, or allow it (allow_pickle=True, --allow-pickle), and ldm reads its tensors and runs "
            "nothing of it."
        )
    others = [n for n in names if n.endswith(".safetensors")]
    instead = f"; it holds {some(others)}" if others else ""
    return LDMError(f"{folder} has no {stem}.safetensors{instead}: check the path, or download the model again.")


def _shards(index: Path, ending: str) -> list[Path]:
    content = read_json(index)
    table = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(table, dict) or not table or not all(isinstance(n, str) for n in table.values()):
        raise LDMError(f"{index} has no table 'weight_map' of names and files: {AGAIN}.")
    paths = []
    for name in sorted(set(table.values())):
        # An index is a stranger's text: it may name files of this folder, nothing else ("../", "/etc", "C:").
        if not re.fullmatch(rf"\w[\w.\-]{{0,200}}\.{ending}", name, re.ASCII):
            raise LDMError(
                f"{index} names the shard {name!r}, which is not a plain file name: do not trust this model."
            )
        if not (index.parent / name).is_file():
            raise LDMError(f"{index.parent} lacks {name}, which {index.name} lists: download it too.")
        paths.append(index.parent / name)
    return paths


# ---------------------------------------------------------------------------------------------------- JSON


def read_json(path: str | Path, accept: tuple[str, ...] = ()) -> Any:
    """Parse a UTF-8 JSON file. Raises LDMError if it is missing, too large, malformed, or says one name twice.

    `accept` names what may stand for a number though JSON has no such thing: "-Infinity".
    """
    path = Path(path)
    try:
        with open_plain(path) as file:
            content = file.read(MOST_JSON_BYTES + 1)
        if len(content) > MOST_JSON_BYTES:
            raise LDMError(f"{path} is larger than {MOST_JSON_BYTES} bytes: it is no file of a model.")
        text = content.decode()
    except OSError as error:
        raise cannot_read(path, error) from error
    except UnicodeDecodeError as error:
        raise LDMError(f"{path} is not UTF-8 text (byte {error.start}): {AGAIN}, or save it as UTF-8.") from error
    return parse_json(text, str(path), accept)


def read_fields(path: str | Path, accept: tuple[str, ...] = ()) -> dict[str, Any]:
    """`read_json` of a file that must hold an object."""
    fields = read_json(path, accept)
    if not isinstance(fields, dict):
        raise LDMError(f"{path} must hold a JSON object, not a {type(fields).__name__}: {AGAIN}.")
    return fields


def parse_json(text: str | bytes, what: str, accept: tuple[str, ...] = ()) -> Any:
    """Strict JSON: no NaN, no name twice, no bottomless nesting. Raises LDMError that begins with `what`."""
    brackets = sum(text.count(each if isinstance(text, str) else each.encode()) for each in "[{")
    if brackets > MOST_BRACKETS:
        raise LDMError(f"{what} has more than {MOST_BRACKETS} brackets: it is no file of a model.")

    def constant(name: str) -> float:
        if name in accept:
            return float(name)
        raise ValueError(f"{name} is not a JSON number")

    def finite(digits: str) -> float:
        if math.isinf(float(digits)):
            raise ValueError(f"{digits[:40]} is beyond all numbers")
        return float(digits)

    try:
        text = text.decode() if isinstance(text, bytes) else text  # else json would guess at other encodings
        return json.loads(text, object_pairs_hook=_no_doubles, parse_constant=constant, parse_float=finite)
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise LDMError(f"{what} is not valid JSON at {where} ({error.msg}): mend it there, or {AGAIN}.") from error
    except (ValueError, RecursionError) as error:
        raise LDMError(f"{what} is not acceptable JSON ({str(error)[:200]}): {AGAIN}.") from error


def _no_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The specification leaves open which of two equal names counts: readers may differ, so neither does."""
    table = dict(pairs)
    if len(table) < len(pairs):
        seen: set[str] = set()
        raise ValueError(f"the name {next(n for n, _ in pairs if n in seen or seen.add(n))!r} stands twice")
    return table


def write_json(path: str | Path, obj: Any) -> None:
    """Write indented UTF-8 JSON, whole or not at all. Raises LDMError if `obj` is not JSON or `path` not writable."""
    try:
        text = (json.dumps(obj, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise LDMError(f"Cannot write {path}: not expressible as JSON ({error}); convert it first.") from error
    with atomic_file(path) as file:
        file.write(text)


def open_plain(path: Path) -> IO[bytes]:
    """Open a file for reading that is one: a pipe would be waited for for ever, a device may never end.

    Links are followed, wherever they lead (the hub's cache is made of them): what they lead to is read as weights or
    as JSON, like any other stranger's file, and never written. Raises OSError if it can't be read, LDMError for a pipe.
    """
    kind = os.stat(path).st_mode
    if not (stat.S_ISREG(kind) or stat.S_ISDIR(kind)):  # opening a folder is an OSError by itself
        raise LDMError(f"{path} is no ordinary file: copy its content into one.")
    return open(path, "rb")


def cannot_read(path: Path, error: OSError) -> LDMError:
    if error.errno == errno.ENOENT:
        return LDMError(f"{path} does not exist: check the path, or download the model again.")
    if error.errno == errno.EISDIR:
        return LDMError(f"{path} is a folder, not a file: name the file inside it.")
    return LDMError(f"Cannot read {path}: {error.strerror}; check its permissions and the disk.")


# ---------------------------------------------------------------------------------------------------- identity

MODEL_FILES = (".safetensors", ".json", ".txt", ".model")  # weights, configurations, merges.txt, spiece.model
NOT_THE_MODEL = ("optimizer", "optimiser", "training", "trainer")


def folder_hash(folder: str | Path) -> str:
    """16 hexadecimal digits that name a model: the SHA-256 of its weight and configuration files, names and bytes.

    README and other remarks, hidden files and the state of a training run (optimizer*, training*) don't count. Of a
    single file: the SHA-256 of its bytes, whatever its name.
    Raises LDMError if the folder is missing or holds no such file.
    """
    folder = Path(folder)
    if folder.is_file():
        return file_hash(folder)[:16]
    if not folder.is_dir():
        raise LDMError(f"There is no folder {folder}: check the path, or download the model again.")
    names = {p.relative_to(folder).as_posix(): p for p in folder.rglob("*") if p.is_file() and _is_model(p, folder)}
    if not names:
        raise LDMError(f"{folder} holds no model files ({', '.join(MODEL_FILES)}): check the path.")
    total = hashlib.sha256()
    for name in sorted(names):
        # Hashed apart, no byte can move from one file to the next unseen.
        total.update(f"{name}\0{file_hash(names[name])}\n".encode())
    return total.hexdigest()[:16]


def file_hash(path: Path) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal digits. Raises LDMError if it cannot be read."""
    sha = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                sha.update(block)
    except OSError as error:
        raise cannot_read(path, error) from error
    return sha.hexdigest()


def _is_model(path: Path, folder: Path) -> bool:
    hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
    return path.suffix in MODEL_FILES and not hidden and not path.name.startswith(NOT_THE_MODEL)


def some(names: Sequence[str], most: int = 5) -> str:
    """The first few of a list, and how many more there are."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
