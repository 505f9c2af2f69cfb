"""Weights: read from safetensors, checked, and given to a model; and written back.

    paths = find_weights(folder / "unet", "diffusion_pytorch_model", variant="fp16")
    with blank():
        unet = UNet(config)
    load_weights(unet, paths)

A safetensors file is 8 bytes of length, a JSON header {name: {dtype, shape, data_offsets}} and the raw numbers.
No code can hide in it; pickles (.bin, .ckpt, .pt) can run any code when they are opened, and are not read.
"""

import json
import os
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch.overrides import TorchFunctionMode

from ldm.errors import LDMError
from ldm.io.atomic import atomic_file
from ldm.io.folders import AGAIN, cannot_read, parse_json, some

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
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# Far above every real model; a header beyond them is there to eat memory.
MOST_HEADER_BYTES, MOST_TENSORS, MOST_DIMENSIONS = 20_000_000, 20_000, 8


# ---------------------------------------------------------------------------------------------------- reading


@dataclass(frozen=True)
class Entry:
    """One line of a safetensors header."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    path: Path


def read_header(path: str | Path) -> list[Entry]:
    """What a safetensors file holds, without reading its numbers. Raises LDMError if it is not a sound one."""
    path = Path(path)
    try:
        with open(path, "rb") as file:
            start = file.read(40)
            length = struct.unpack("<Q", start[:8])[0] if len(start) >= 8 else 0
            if not 2 <= length <= MOST_HEADER_BYTES or start[8:9] != b"{":
                raise _not_safetensors(path, start)
            file.seek(8)
            text = file.read(length)
        with safe_open(path, "pt"):  # the library checks types, offsets and the file's size against each other
            pass
    except OSError as error:
        raise cannot_read(path, error) from error
    except SafetensorError as error:
        raise LDMError(f"{path} is corrupt or truncated ({str(error)[:200]}): {AGAIN}.") from error
    header = parse_json(text, f"{path}: the header")
    header.pop("__metadata__", None)
    if len(header) > MOST_TENSORS:
        raise LDMError(f"{path} declares {len(header)} tensors, more than {MOST_TENSORS}: do not trust this file.")
    for name, line in header.items():
        if not (name.isascii() and name.isprintable()) or len(line["shape"]) > MOST_DIMENSIONS:
            raise LDMError(f"{path} declares an impossible tensor {name[:80]!r}: do not trust this file.")
    return [Entry(name, line["dtype"], tuple(line["shape"]), path) for name, line in header.items()]


def _not_safetensors(path: Path, start: bytes) -> LDMError:
    if start.startswith(b"version https://git-lfs"):
        return LDMError(f"{path} is a Git LFS pointer, not the weights themselves: run `git lfs pull` in its folder.")
    if start.startswith((b"PK", b"\x80")):
        return LDMError(f"{path} is a pickle in spite of its name, and is not read: take the safetensors file.")
    if start.lstrip().startswith(b"<"):
        return LDMError(f"{path} is a web page, not weights: download the file itself.")
    return LDMError(f"{path} is corrupt or truncated, or not a safetensors file: {AGAIN}.")


def read_tensors(paths: str | Path | Sequence[str | Path]) -> Iterator[tuple[str, torch.Tensor, Path]]:
    """Yield (name, tensor, path), one tensor at a time. The tensors are windows on the file: copy what you keep.

    Raises LDMError for a file that is missing, corrupt or truncated.
    """
    for path in _as_paths(paths):
        read_header(path)
        with safe_open(path, "pt") as file:
            for name in sorted(file.keys()):
                try:
                    tensor = file.get_tensor(name)
                except (SafetensorError, AttributeError) as error:  # AttributeError: a type that torch lacks
                    raise LDMError(f"{path}: cannot read {name!r} ({str(error)[:200]}): {AGAIN}.") from error
                yield name, tensor, path


def _as_paths(paths: str | Path | Sequence[str | Path]) -> list[Path]:
    paths = [paths] if isinstance(paths, str | os.PathLike) else paths
    if not paths:
        raise LDMError("No weight file was given: name at least one.")
    return [Path(p) for p in paths]


# ---------------------------------------------------------------------------------------------------- loading


@contextmanager
def blank() -> Iterator[None]:
    """Models built inside have names and shapes and no numbers: nothing is initialised, to be read from a file.

    `torch.device("meta")` alone would still go through the motions of drawing random numbers, for which torch imports
    its compiler: some seconds.
    """
    with torch.device("meta"), _NoInitialisation():
        yield


class _NoInitialisation(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        if getattr(function, "__module__", "") == "torch.nn.init":
            return kwargs["tensor"] if kwargs and "tensor" in kwargs else args[0]
        return function(*args, **(kwargs or {}))


def load_weights(
    model: torch.nn.Module,
    paths: str | Path | Sequence[str | Path],
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    rename: Callable[[str], str | None] | None = None,
) -> torch.nn.Module:
    """Fill a model that was built under `blank()`, and return it in eval mode, without gradients.

    Each tensor is cast to `dtype` as it is read (integers stay as they are). `rename` maps a name in the file to the
    model's, or to None if it is known and not needed. Two names of the file may map to one (tied weights), if the two
    tensors are equal. Names, types and shapes are compared before a single number is read.
    Raises LDMError for names missing, left over or doubled, wrong shapes or types, numbers that are not finite.
    """
    if dtype not in FLOATS:
        raise ValueError(f"dtype must be a float type, not {dtype}")
    paths, rename = _as_paths(paths), rename or (lambda name: name)
    expected = _expected(model)
    entries = [entry for path in paths for entry in read_header(path)]
    ours = {entry.name: rename(entry.name) for entry in entries}
    _refuse_doubles(entries)
    found = [(ours[entry.name], entry) for entry in entries if ours[entry.name] is not None]
    _refuse_misfits(f"{_place(paths)} does not fit the model {type(model).__name__}", expected, found)

    state: dict[str, torch.Tensor] = {}
    for name, tensor, path in read_tensors(paths):
        key = ours[name]
        if key is None:
            continue
        tensor = _cast(tensor, dtype, device, f"{path}: {name!r}")
        if key in state and not torch.equal(state[key], tensor):
            raise LDMError(f"{path}: {name!r} is a second {key!r}, with other numbers; do not trust this file.")
        state[key] = tensor
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


def _cast(tensor: torch.Tensor, dtype: torch.dtype, device: str | torch.device, what: str) -> torch.Tensor:
    """A copy in memory of its own (a tensor that is a window on a file breaks with the file), of finite numbers."""
    if not tensor.is_floating_point():
        return tensor.to(device, copy=True)
    cast = tensor.to(device, dtype, copy=True)
    # One NaN or infinity shows in the smallest or largest number; 15 times as fast as isfinite().all().
    if cast.numel() and not all(end.isfinite() for end in cast.aminmax()):
        nan, infinite = int(tensor.isnan().sum()), int(tensor.isinf().sum())
        if nan or infinite:
            raise LDMError(f"{what} holds {nan} NaN and {infinite} infinite numbers: take a sound copy of the weights.")
        raise LDMError(
            f"{what} reaches {float(tensor.abs().max()):.4g}, beyond {_short(dtype)}: choose a type of wider range."
        )
    return cast


def _refuse_doubles(entries: list[Entry]) -> None:
    first: dict[str, Path] = {}
    for entry in entries:
        if entry.name in first:
            raise LDMError(f"{entry.name!r} is in both {first[entry.name]} and {entry.path}: remove the outdated file.")
        first[entry.name] = entry.path


def _place(paths: list[Path]) -> str:
    return str(paths[0]) if len(paths) == 1 else f"{paths[0].parent} ({len(paths)} files)"


def _refuse_misfits(what: str, expected: dict[str, torch.Tensor], found: list[tuple[str, Entry]]) -> None:
    names = {key for key, _ in found}
    missing = [key for key in expected if key not in names]
    unexpected = [entry for key, entry in found if key not in expected]
    shapes, types = [], []
    for key, entry in found:
        if key in expected and entry.shape != tuple(expected[key].shape):
            shapes.append((key, entry))
        elif key in expected and not _may_become(entry.dtype, expected[key].dtype):
            types.append((key, entry))
    faults = []
    if missing:
        faults.append(f"missing {some(missing)}")
    if unexpected:
        faults.append("unexpected " + some([f"{e.name} (in {e.path.name})" for e in unexpected]))
    if shapes:
        lines = [f"{e.name} in {e.path.name} is {e.shape} instead of {tuple(expected[k].shape)}" for k, e in shapes]
        faults.append("wrong shape: " + some(lines))
    if types:
        lines = [f"{e.name} in {e.path.name} is {e.dtype} instead of {_short(expected[k].dtype)}" for k, e in types]
        faults.append("wrong type: " + some(lines))
    if faults:
        cause = _likely_cause(missing, [e.name for e in unexpected], [e for _, e in shapes], [e for _, e in types])
        raise LDMError(f"{what}: {'; '.join(faults)}. {cause}")


def _may_become(stored: str, wanted: torch.dtype) -> bool:
    """Any float may stand for a float; whole numbers and truth values only for their own type."""
    return DTYPES.get(stored) in FLOATS if wanted.is_floating_point else DTYPES.get(stored) == wanted


CONTEXT_WIDTHS = {768: "SD 1.x", 1024: "SD 2.x", 1280: "the SDXL refiner", 2048: "SDXL"}
INPUT_CHANNELS = {4: "text to image", 5: "depth", 7: "the upscaler", 8: "InstructPix2Pix", 9: "inpainting"}


def _likely_cause(missing: list[str], unexpected: list[str], shapes: list[Entry], types: list[Entry]) -> str:
    """What most often lies behind such a misfit, and what to do."""
    if any("lora" in name for name in unexpected):
        return "This is a LoRA, a change to a model and not a model: load it on top of one."
    if any(name.startswith(("model.diffusion_model.", "first_stage_model.")) for name in unexpected):
        return "This is a single-file checkpoint with all parts in one: load it as such."
    for longer, shorter, which in ((unexpected, missing, "file's"), (missing, unexpected, "model's")):
        prefix = next((n[: -len(s)] for n in longer[:1] for s in shorter if n.endswith("." + s)), None)
        if prefix:
            return f"The {which} names begin with {prefix!r}, the others don't: check which model the file is for."
    for entry in shapes:
        if entry.name.endswith("attn2.to_k.weight") and entry.shape[-1] in CONTEXT_WIDTHS:
            return f"A context of width {entry.shape[-1]} is that of {CONTEXT_WIDTHS[entry.shape[-1]]}."
        if entry.name == "conv_in.weight" and len(entry.shape) == 4 and entry.shape[1] in INPUT_CHANNELS:
            return f"{entry.shape[1]} input channels are those of {INPUT_CHANNELS[entry.shape[1]]}."
    if any(entry.dtype.endswith("8") or entry.dtype.startswith(("F8", "F6", "F4")) for entry in types):
        return "Quantised weights are not read: take float16, bfloat16 or float32 ones."
    return "Check that the weights and the configuration belong to the same model."


# ---------------------------------------------------------------------------------------------------- writing


def save_weights(
    tensors: dict[str, torch.Tensor],
    path: str | Path,
    dtype: torch.dtype | None = None,
    metadata: dict[str, str] | None = None,
) -> None:
    """Write a safetensors file, whole or not at all; floats are cast to `dtype` if one is given, one at a time.

    Raises LDMError if a number is not finite (before or after the cast), or the file cannot be written.
    """
    if dtype is not None and dtype not in FLOATS:
        raise ValueError(f"dtype must be a float type, not {dtype}")
    if not all(isinstance(word, str) for pair in (metadata or {}).items() for word in pair):
        raise LDMError(f"Cannot write {path}: metadata must be strings; write numbers as text.")
    codes = {t: code for code, t in DTYPES.items()}
    kinds = {n: dtype if dtype and t.is_floating_point() else t.dtype for n, t in tensors.items()}
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
        start, end = end, end + tensors[name].numel() * kinds[name].itemsize
        header[name] = {"dtype": codes[kinds[name]], "shape": list(tensors[name].shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # so that the numbers begin at a multiple of 8
    with atomic_file(path) as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name in names:
            tensor = _cast(tensors[name].detach(), kinds[name], "cpu", f"Cannot write {path}: {name!r}").contiguous()
            file.write(tensor.reshape(-1).view(torch.uint8).numpy())


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
