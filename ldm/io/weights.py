"""Weights: read from files, checked, and given to a model; and written back.

paths = find_weights(folder / "unet", "diffusion_pytorch_model", variant="fp16")
with blank():
    unet = UNet(config)
load_weights(unet, paths)
"""

import json
import os
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from torch.overrides import TorchFunctionMode

from ldm.errors import LDMError, bytes_in_words, say_on_stderr
from ldm.io.atomic import atomic_file
from ldm.io.folders import AGAIN, some
from ldm.io.headers import Entry, is_pickle, read_header
from ldm.io.misfits import FLOATS, Found, refuse_misfits
from ldm.io.pickles import Pickled, refused

Paths = str | os.PathLike | Sequence[str | os.PathLike]
# In the order of the safetensors library, which lays out the widest numbers first, so that each is aligned.
DTYPES = {
    "I64": torch.int64,
    "F64": torch.float64,
    "F32": torch.float32,
    "I32": torch.int32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}

# ---------------------------------------------------------------------------------------------------- reading


class Tensors(Protocol):
    """Tensors by name, described at once and read when asked for: files, or a view on them under other names."""

    entries: Mapping[str, Entry]
    place: str  # where they come from, for sentences

    def read(self, name: str) -> torch.Tensor: ...


class WeightFiles:
    """The tensors of one file, or of the shards that make up one model.

    `entries`: {name: its dtype, shape and file}, from the headers; `metadata`: texts beside them, of the first file;
    `scalars` and `passed_over`: of a pickle, the numbers beside them, and what is no tensor, in words. `read` gives a
    window on the file: copy what you keep.
    Raises LDMError for a file that is missing, corrupt or truncated, for a name in two files, and for a pickle, which
    can run any code when it is opened, unless `allow_pickle`; then it is read by an interpreter that builds tensors
    alone (`ldm.io.pickles`).
    """

    def __init__(self, paths: Paths, allow_pickle: bool = False):
        self.paths = [Path(p) for p in ([paths] if isinstance(paths, str | os.PathLike) else paths)]
        if not self.paths:
            raise LDMError("No weight file was given: name at least one.")
        self.place = str(self.paths[0]) if len(self.paths) == 1 else f"{self.paths[0].parent} ({len(self.paths)} files)"
        self.entries: dict[str, Entry] = {}
        self.metadata: dict[str, str] = {}
        self.scalars: dict[str, int | float | str] = {}
        self.passed_over: list[str] = []
        self._files: dict[Path, Pickled | safe_open] = {}  # kept open: opening takes far longer than a tensor
        for path in self.paths:
            for entry in self._header(path, allow_pickle):
                if entry.name in self.entries:
                    first = self.entries[entry.name].path
                    raise LDMError(f"{entry.name!r} is in both {first} and {path}: remove the outdated file.")
                self.entries[entry.name] = entry

    def _header(self, path: Path, allow_pickle: bool) -> Iterable[Entry]:
        if is_pickle(path):
            if not allow_pickle:
                raise refused(path)
            self._files[path] = pickled = Pickled(path)
            self.scalars |= pickled.scalars
            self.passed_over += pickled.passed_over
            return pickled.entries.values()
        header = read_header(path)
        self.metadata = self.metadata or header.metadata
        return header.entries

    def read(self, name: str) -> torch.Tensor:
        path = self.entries[name].path
        try:
            if path not in self._files:
                self._files[path] = safe_open(path, "pt")
            file = self._files[path]
            return file.read(name) if isinstance(file, Pickled) else file.get_tensor(name)
        except (SafetensorError, AttributeError) as error:  # AttributeError: a type that torch lacks
            raise LDMError(f"{path}: cannot read {name!r} ({str(error)[:200]}): {AGAIN}.") from error


def read_tensors(paths: Paths, allow_pickle: bool = False) -> Iterator[tuple[str, torch.Tensor, Path]]:
    """Yield (name, tensor, path), one tensor at a time. The tensors are windows on the file: copy what you keep.

    Raises LDMError for a file that is missing, corrupt or truncated.
    """
    files = WeightFiles(paths, allow_pickle)
    for path in files.paths:
        for name in sorted(name for name, entry in files.entries.items() if entry.path == path):
            yield name, files.read(name), path


# ---------------------------------------------------------------------------------------------------- loading


@contextmanager
def blank() -> Iterator[None]:
    """Models built inside have names and shapes and no numbers: nothing is initialised, to be read from a file.

    `torch.device("meta")` alone would still go through the motions of drawing random numbers, for which torch imports
    its compiler: some seconds.
    """
    with torch.device("meta"), _NoInitialisation():
        yield


class Mapped(nn.Parameter):
    """A weight that lies in its file: a window on it, read by the system as it is used, and no memory of its own.

    Writing into it changes a private copy of the page and not the file. A file that is cut short while such a weight
    lives ends the process: it is replaced as `ldm` replaces files, by renaming.
    """


class _NoInitialisation(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        if getattr(function, "__module__", "") == "torch.nn.init":
            return kwargs["tensor"] if kwargs and "tensor" in kwargs else args[0]
        return function(*args, **(kwargs or {}))


def load_weights(
    model: torch.nn.Module,
    source: Paths | Tensors,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    rename: Callable[[str], str | None] | None = None,
    mapped: bool = False,
) -> torch.nn.Module:
    """Fill a model that was built under `blank()`, and return it in eval mode, without gradients.

    Each tensor is cast to `dtype` as it is read (integers stay as they are). `rename` maps a name in the file to the
    model's, or to None if it is known and not needed. Two names of the file may map to one (tied weights), if the two
    tensors are equal. Names, types and shapes are compared before a single number is read.
    `mapped`: weights that are of `dtype` in the file stay there (`Mapped`), and take no memory but what the system can
    take back; the others are cast into memory, which a line on stderr says. All are read once, for the check.
    Raises LDMError for names missing, left over or doubled, wrong shapes or types, numbers that are not finite.
    """
    if dtype not in FLOATS:
        raise ValueError(f"dtype must be a float type, not {dtype}")
    if mapped and torch.device(device).type != "cpu":
        raise LDMError(
            f"Weights that stay in their files are on the CPU's side: load them for the CPU, not for {device}, and let "
            "ldm.memory.offload bring them there as they are needed."
        )
    source = WeightFiles(source) if isinstance(source, str | os.PathLike | Sequence) else source
    rename = rename or (lambda name: name)
    expected = _expected(model)
    ours = {name: key for name in source.entries if (key := rename(name)) is not None}
    found = [Found(key, source.entries[name], DTYPES.get(source.entries[name].dtype)) for name, key in ours.items()]
    refuse_misfits(f"{source.place} does not fit the model {type(model).__name__}", expected, found)

    state: dict[str, torch.Tensor] = {}
    parameters, copied = dict(model.named_parameters()), 0
    for name, key in sorted(ours.items()):
        path = source.entries[name].path
        tensor = source.read(name)
        stays = mapped and tensor.dtype == dtype and tensor.is_contiguous() and key in parameters
        tensor = _cast(tensor, dtype, device, f"{path}: {name!r}", copy=not stays)
        if key in state and not torch.equal(state[key], tensor):
            raise LDMError(f"{path}: {name!r} is a second {key!r}, with other numbers; do not trust this file.")
        state[key] = Mapped(tensor, requires_grad=False) if stays else tensor
        copied += 0 if stays else tensor.nbytes
    if mapped and copied > sum(tensor.nbytes for tensor in state.values()) / 10:
        say_on_stderr(
            f"{source.place}: {bytes_in_words(copied)} of {_short(dtype)} are kept in memory, for the file holds "
            "another type: ldm convert --dtype makes files whose weights can stay there."
        )
    model.load_state_dict(state, strict=True, assign=True)
    left = [n for named in (model.named_parameters(), model.named_buffers()) for n, t in named if t.is_meta]
    if left:
        raise RuntimeError(
            f"{type(model).__name__} left {some(left)} on the meta device: compute them, in its forward."
        )
    return model.requires_grad_(False).eval()


def _expected(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    if len(names) != len(list(model.parameters())):  # assigning by name would untie them without a word
        raise RuntimeError(f"{type(model).__name__} has one parameter under two names: keep one, and use `rename`.")
    return model.state_dict()


def _cast(
    tensor: torch.Tensor, dtype: torch.dtype, device: str | torch.device, what: str, copy: bool = True
) -> torch.Tensor:
    """A copy in memory of its own (a tensor that is a window on a file breaks with the file), of finite numbers."""
    if not tensor.is_floating_point():
        return tensor.to(device, copy=True)
    # Contiguous: a transposed view would be copied as one, and multiply in another order.
    cast = tensor.to(device, dtype, copy=copy, memory_format=torch.contiguous_format)
    if not all_finite(cast):
        nan, infinite = int(tensor.isnan().sum()), int(tensor.isinf().sum())
        if nan or infinite:
            raise LDMError(f"{what} holds {nan} NaN and {infinite} infinite numbers: take a sound copy of the weights.")
        raise LDMError(
            f"{what} reaches {float(tensor.abs().max()):.4g}, beyond {_short(dtype)}: choose a type of wider range."
        )
    return cast


def all_finite(tensor: torch.Tensor) -> bool:
    """Whether no number is NaN or infinite."""
    # One shows in the smallest or the largest number; 15 times as fast as isfinite().all().
    return not tensor.numel() or all(end.isfinite() for end in tensor.aminmax())


# ---------------------------------------------------------------------------------------------------- writing


def save_weights(
    tensors: Mapping[str, torch.Tensor],
    path: str | Path,
    dtype: torch.dtype | None = None,
    metadata: dict[str, str] | None = None,
    wrote: Callable[[int], object] = lambda count: None,
    outline: Mapping[str, torch.Tensor] | None = None,
) -> None:
    """Write a safetensors file, whole or not at all; floats are cast to `dtype` if one is given, one at a time.

    `wrote` is told the number of bytes of each tensor, when it is written. `outline`: the same tensors without numbers
    (on the meta device), by which the file is laid out, where `tensors` are read or computed when they are asked for.
    Raises LDMError if a number is not finite (before or after the cast), or the file cannot be written.
    """
    if dtype is not None and dtype not in FLOATS:
        raise ValueError(f"dtype must be a float type, not {dtype}")
    if not all(isinstance(word, str) for pair in (metadata or {}).items() for word in pair):
        raise LDMError(f"Cannot write {path}: metadata must be strings; write numbers as text.")
    codes = {t: code for code, t in DTYPES.items()}
    kinds, shapes = {}, {}
    for name, tensor in (tensors if outline is None else outline).items():
        kinds[name] = dtype if dtype and tensor.is_floating_point() else tensor.dtype
        shapes[name] = tensor.shape
    for name, kind in kinds.items():
        if not (name.isascii() and name.isprintable()) or name == "__metadata__" or kind not in codes:
            raise LDMError(
                f"Cannot write {path}: {name!r} of type {_short(kind)} has no place in it; rename or cast it."
            )
    order = list(DTYPES.values())
    names = sorted(tensors, key=lambda name: (order.index(kinds[name]), name))
    header: dict = {"__metadata__": {"format": "pt", **(metadata or {})}}  # transformers refuses a file without format
    end = 0
    for name in names:
        start, end = end, end + shapes[name].numel() * kinds[name].itemsize
        header[name] = {"dtype": codes[kinds[name]], "shape": list(shapes[name]), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # so that the numbers begin at a multiple of 8
    with atomic_file(path) as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name in names:
            tensor = _cast(tensors[name].detach(), kinds[name], "cpu", f"Cannot write {path}: {name!r}").contiguous()
            if tensor.shape != shapes[name]:  # every tensor behind it would be read from the wrong place
                raise ValueError(f"{name!r} is {tuple(tensor.shape)}, and its outline {tuple(shapes[name])}")
            file.write(tensor.reshape(-1).view(torch.uint8).numpy())
            wrote(tensor.nbytes)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
