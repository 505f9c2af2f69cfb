"""Checkpoints that torch.save wrote (.ckpt, .pt, .pth, .bin): a zip archive of a pickle and the numbers beside it.

A pickle is a program, and Python runs it. Here nothing of it is run: `ldm.io.opcodes` reads what tables and tensors it
would build. The rule for what else such a file may hold:

- Names are never looked up. One that is only mentioned stays a name.
- Objects that training programs leave (Lightning's, OmegaConf's, argparse.Namespace, numpy's numbers) are not built:
  they are passed over, and named in `passed_over`.
- A call of anything else (os.system, but also a whole pickled network) makes the file refused as a whole: nothing
  could happen, but who writes that into weights is not to be trusted with numbers either.
"""

from pathlib import Path
from typing import Any

import torch

from ldm.errors import LDMError
from ldm.io.folders import cannot_read, some
from ldm.io.headers import BITS, MOST_DIMENSIONS, MOST_LETTERS, MOST_NUMBERS, MOST_TENSORS, Entry, numbers, sound_name
from ldm.io.opcodes import MOST_BYTES, TYPES, Layout, Name, Storage, Thing, names_in, read_pickle
from ldm.io.zips import Archive

# Where training programs keep the weights: Lightning and CompVis, and programs for other networks. The first holds
# weights even beside other tensors; the others are ordinary words, and count where no tensor stands beside them.
WRAPPERS = ("state_dict", "model_state_dict", "model", "module", "params_ema", "params")
MOST_WRAPPERS, MOST_LEVELS, MOST_LINES, MOST_SHARING = 3, 8, 200_000, 4
LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # the number with which torch began files before 1.6
TORCH = {code: getattr(torch, name) for name, code in TYPES.items() if hasattr(torch, name)}


class Pickled:
    """The tensors of one such file.

    `entries`: {name: type, shape, file}; tables within tables have names with dots. `scalars`: the numbers and texts
    beside the weights, such as global_step. `passed_over`: what is there and is no tensor, in words.
    Raises LDMError for a file that is damaged or holds more than weights (see above).
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._archive, program = _open(self.path)
        self._root = self._archive.root
        self.scalars: dict[str, int | float | str] = {}
        self.passed_over: list[str] = []
        self._tensors: dict[str, Layout] = {}
        self._lines = 0
        self._gather(self._unwrap(read_pickle(program, str(self.path))), "", 0)
        bits = [numbers(each.shape) * BITS[each.dtype] for each in self._tensors.values()]
        if sum(bits) > MOST_SHARING * 8 * self._archive.size:
            raise self._bad(f"its tensors are over {MOST_SHARING} times as large as the file")
        self.entries = {n: Entry(n, each.dtype, each.shape, self.path) for n, each in self._tensors.items()}

    def read(self, name: str) -> torch.Tensor:
        """A window on the file (copy what you keep). Raises LDMError if the check sum of the numbers is wrong."""
        layout = self._tensors[name]
        if layout.dtype not in TORCH:
            raise LDMError(f"{self.path}: {name!r} is of type {layout.dtype}, which this torch lacks: update torch.")
        dtype = TORCH[layout.dtype]
        window = self._archive.read(f"{self._root}data/{layout.storage.key}")
        if window.data_ptr() % dtype.itemsize or window.storage_offset() % dtype.itemsize:
            window = window.clone()  # torch aligns what it writes, others don't
        return window.view(dtype).as_strided(
            layout.shape, layout.stride, window.storage_offset() // dtype.itemsize + layout.offset
        )

    def _unwrap(self, content: Any) -> dict:
        """The table of weights; what stands beside it is kept in `scalars` or named in `passed_over`."""
        for _ in range(MOST_WRAPPERS + 1):
            if type(content) is not dict:
                raise LDMError(f"{self.path} holds no table of tensors but {_kind(content)}: it is no checkpoint.")
            bare = not any(type(value) is Layout for value in content.values())
            inner = next((w for w in WRAPPERS[: None if bare else 1] if type(content.get(w)) is dict), None)
            if inner is None:
                return content
            for key, value in content.items():
                if key != inner:
                    self._pass_over(str(key), value)
            content = content[inner]
        raise self._bad(f"its weights are wrapped more than {MOST_WRAPPERS} times")

    def _gather(self, table: dict, prefix: str, level: int) -> None:
        if level > MOST_LEVELS:  # a table in itself, too
            raise self._bad(f"its tables are nested more than {MOST_LEVELS} deep")
        self._lines += len(table)
        if self._lines > MOST_LINES:  # one table in many places is read in each
            raise self._bad(f"its tables have more than {MOST_LINES} lines")
        for key, value in table.items():
            word = str(key)
            if len(prefix) + len(word) > MOST_LETTERS:  # before they are put together: a million lines may ask for it
                raise self._bad(f"its tables have names of more than {MOST_LETTERS} letters")
            name = prefix + word
            if type(value) is dict and value:
                self._gather(value, f"{name}.", level + 1)
            elif type(value) is not Layout:
                self._pass_over(name, value)
            else:
                self._check(name, value)
                self._tensors[name] = value
                if len(self._tensors) > MOST_TENSORS:
                    raise self._bad(f"it holds more than {MOST_TENSORS} tensors")

    def _pass_over(self, name: str, value: Any) -> None:
        simple = type(value) in (int, float) or (type(value) is str and len(value) <= 1000)
        if simple and len(self.scalars) < MOST_TENSORS:
            self.scalars[name[:200]] = value
        elif len(self.passed_over) < MOST_TENSORS:
            self.passed_over.append(f"{name[:200]!r} ({_kind(value)})")

    def _check(self, name: str, tensor: Layout) -> None:
        """A tensor must lie inside its storage, and no number of it be two of its elements."""
        record = self._archive.records.get(f"{self._root}data/{tensor.storage.key}")
        if not sound_name(name) or name in self._tensors:
            raise self._bad(f"it names a tensor {name[:80]!r}, twice or impossibly")
        if len(tensor.shape) > MOST_DIMENSIONS or numbers(tensor.shape) > MOST_NUMBERS:
            raise self._bad(f"it declares an impossible tensor {name[:80]!r}")
        if record is None:
            raise self._bad(f"it lacks the numbers of {name[:80]!r}")
        storage: Storage = tensor.storage
        if record.length * 8 != storage.count * (BITS[storage.dtype] if storage.dtype else 8):
            raise self._bad(f"the numbers of {name[:80]!r} are {record.length} bytes, not those it declares")
        if record.length * 8 % BITS[tensor.dtype]:
            raise self._bad(f"the numbers of {name[:80]!r} are {record.length} bytes, no whole count of {tensor.dtype}")
        reach = 0  # the furthest element of the dimensions so far, those of short strides first
        for stride, size in sorted((s, n) for s, n in zip(tensor.stride, tensor.shape, strict=True) if n != 1):
            if stride <= reach:
                raise self._bad(f"the elements of {name[:80]!r} lie over each other")
            reach += (size - 1) * stride
        end = tensor.offset + (reach + 1 if numbers(tensor.shape) else 0)
        if end * BITS[tensor.dtype] > record.length * 8:
            raise self._bad(f"{name[:80]!r} reaches beyond its numbers")

    def _bad(self, why: str) -> LDMError:
        return LDMError(f"{self.path} is no sound checkpoint ({why}): do not trust this file.")


def refused(path: str | Path) -> LDMError:
    """Why a pickle isn't read without being allowed, and what in it is no part of weights."""
    path = Path(path)
    try:
        names = names_in(_open(path)[1])
    except LDMError:
        names = []
    asks = f" (this one asks for {some([repr(name[:80]) for name in names])})" if names else ""
    spite = " in spite of its name" if path.suffix == ".safetensors" else ""
    return LDMError(
        f"{path} is a pickle{spite}, a program that can run any code when others open it{asks}, and is not read: take "
        "the safetensors file, or allow pickles (allow_pickle=True, --allow-pickle): ldm runs nothing of them."
    )


def _open(path: Path) -> tuple["_Checkpoint", bytes]:
    """The archive and its program. Raises LDMError for the formats that torch no longer writes."""
    try:
        with open(path, "rb") as file:
            start = file.read(16)
    except OSError as error:
        raise cannot_read(path, error) from error
    anew = "if you trust it, open it in torch and save it anew: torch.save(torch.load(path, weights_only=True), new)"
    if start.startswith(LEGACY[: len(start)]) and len(start) > 2:
        raise LDMError(f"{path} is in the format that torch wrote before version 1.6, which ldm doesn't read: {anew}.")
    if not start.startswith(b"PK"):
        raise LDMError(f"{path} is a bare pickle, not a checkpoint of torch, and ldm doesn't read it: {anew}.")
    archive = _Checkpoint(path)
    length = archive.records[f"{archive.root}data.pkl"].length
    if length > MOST_BYTES:  # a file with holes has gigabytes of zeros for nothing: before they are read
        raise LDMError(f"{path} has a pickle of {length} bytes, more than {MOST_BYTES}: do not trust this file.")
    return archive, bytes(archive.read(f"{archive.root}data.pkl").numpy())


class _Checkpoint(Archive):
    """An archive with a program: `root` is the folder that all its records are in, with its "/"."""

    def __init__(self, path: Path):
        super().__init__(path)
        roots = [
            name[: -len("data.pkl")] for name in self.records if name.count("/") == 1 and name.endswith("/data.pkl")
        ]
        if len(roots) != 1 or not all(name.startswith(roots[0]) for name in self.records):
            raise LDMError(f"{path} is a zip archive, but no checkpoint of torch: unpack it, and name the file inside.")
        self.root = roots[0]
        if f"{self.root}constants.pkl" in self.records or any(n.startswith(f"{self.root}code/") for n in self.records):
            raise LDMError(f"{path} is a TorchScript program, not weights: take the safetensors file of its weights.")
        order = self.records.get(f"{self.root}byteorder")
        if order and (order.length > 6 or bytes(self.read(f"{self.root}byteorder").numpy()) != b"little"):
            raise LDMError(f"{path} was written on a machine of the other byte order: save it anew on this one.")


def _kind(value: Any) -> str:
    if type(value) is Thing:
        return str(value.name)[:100]
    return str(value)[:100] if type(value) is Name else "a tensor" if type(value) is Layout else type(value).__name__
