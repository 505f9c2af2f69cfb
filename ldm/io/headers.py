"""Headers of safetensors files: what a file holds, without reading its numbers; and what a file is by its first bytes.

A safetensors file is 8 bytes of length, a JSON header {name: {dtype, shape, data_offsets}} and the raw numbers. No code
can hide in it. The header is a stranger's text all the same, and is read here, strictly, before the library sees it:
every byte of the file belongs to one tensor, every tensor has one name, and nothing is larger than real models are.
"""

import os
import struct
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open

from ldm.errors import LDMError, bytes_in_words
from ldm.io.folders import AGAIN, cannot_read, open_plain, parse_json

# Far above every real model; a header beyond them is there to eat memory.
MOST_HEADER_BYTES, MOST_TENSORS, MOST_DIMENSIONS, MOST_NUMBERS = 10_000_000, 20_000, 8, 2**48
MOST_LETTERS = 500  # of a name
BITS = {  # of a number of each type that the format knows
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4,
    "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32,
    "I64": 64, "U64": 64, "F64": 64, "C64": 64, "C128": 128, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
}  # fmt: skip
OTHERS = (  # what else is given for weights, by its first bytes
    (b"version https://git-lfs", "a Git LFS pointer, not the weights themselves: run `git lfs pull` in its folder"),
    (b"GGUF", "a GGUF file of quantised weights, which ldm doesn't read: take the model's safetensors files"),
    (b"\x1f\x8b", "compressed by gzip: unpack it first"),
    (b"BZh", "compressed by bzip2: unpack it first"),
    (b"\xfd7zXZ\x00", "compressed by xz: unpack it first"),
    (b"\x28\xb5\x2f\xfd", "compressed by zstd: unpack it first"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive: unpack it, and name the file inside"),
    (b"Rar!", "a RAR archive: unpack it, and name the file inside"),
    (b"\x89HDF", "an HDF5 file (Keras), which ldm doesn't read: take the model's safetensors files"),
    (b"\x93NUMPY", "an array of numpy, not a model's weights: take the model's safetensors files"),
    (b"\x89PNG", "a picture, not weights: name the model's safetensors file"),
    (b"\xff\xd8\xff", "a picture, not weights: name the model's safetensors file"),
)
TAR_AT, TAR = 257, b"ustar"


class Entry(NamedTuple):
    """One tensor of a file, as its header describes it."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    path: Path


class Header(NamedTuple):
    entries: list[Entry]
    metadata: dict[str, str]


def read_header(path: str | Path) -> Header:
    """What a safetensors file holds, without reading its numbers. Raises LDMError if it is not a sound one."""
    path = Path(path)
    try:
        with open_plain(path) as file:
            size = os.fstat(file.fileno()).st_size
            start = file.read(TAR_AT + len(TAR))
            length = struct.unpack("<Q", start[:8])[0] if len(start) >= 8 else 0
            if not 2 <= length <= MOST_HEADER_BYTES or start[8:9] != b"{":
                raise _not_safetensors(path, start)
            if 8 + length > size:
                raise _corrupt(path, f"its header has {size - 8} of {length} bytes")
            file.seek(8)
            text = file.read(length)
        header = _parse(path, text)
        metadata = header.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
            raise _corrupt(path, "its metadata are not texts")
        if len(header) > MOST_TENSORS:
            raise LDMError(f"{path} declares {len(header)} tensors, more than {MOST_TENSORS}: do not trust this file.")
        entries = [_entry(path, name, line) for name, line in header.items()]
        _check_offsets(path, [line["data_offsets"] for line in header.values()], size - 8 - length)
        with safe_open(path, "pt"):  # what the library refuses beyond this is refused now, not in the middle
            pass
    except OSError as error:
        raise cannot_read(path, error) from error
    except SafetensorError as error:
        raise _corrupt(path, repr(str(error)[:200])) from error
    except RuntimeError as error:  # torch's, where the system gives no window on so large a file
        raise LDMError(f"Cannot read {path}, of {bytes_in_words(size)}: {str(error)[:200]}.") from error
    return Header(entries, metadata)


def _parse(path: Path, text: bytes) -> dict[str, Any]:
    try:
        header = parse_json(text.decode(), "its header")
    except UnicodeDecodeError as error:
        raise _corrupt(path, f"its header is not UTF-8 text at byte {error.start}") from error
    except LDMError as error:
        raise _corrupt(path, str(error).rpartition(": ")[0]) from error
    if not isinstance(header, dict):
        raise _corrupt(path, "its header is no JSON object")
    return header


def _entry(path: Path, name: str, line: Any) -> Entry:
    if not sound_name(name):
        raise LDMError(f"{path} declares an impossible tensor {name[:80]!r}: do not trust this file.")
    if not isinstance(line, dict) or line.keys() != {"dtype", "shape", "data_offsets"}:
        raise _corrupt(path, f"{name[:80]!r} has no dtype, shape and data_offsets, or more than these")
    dtype, shape, offsets = line["dtype"], line["shape"], line["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BITS:
        raise _corrupt(path, f"{name[:80]!r} is of the unknown type {str(dtype)[:40]!r}")
    if not _whole(shape) or not _whole(offsets) or len(offsets) != 2:
        raise _corrupt(path, f"the shape or the offsets of {name[:80]!r} are no whole numbers from 0 on")
    if len(shape) > MOST_DIMENSIONS:
        raise LDMError(f"{path} declares an impossible tensor {name[:80]!r}: do not trust this file.")
    bits = BITS[dtype] * numbers(shape)
    if bits != 8 * (offsets[1] - offsets[0]) or bits > BITS[dtype] * MOST_NUMBERS:
        raise _corrupt(path, f"{name[:80]!r} has {offsets[1] - offsets[0]} bytes, which are not its {tuple(shape)}")
    return Entry(name, dtype, tuple(shape), path)


def _whole(values: Any) -> bool:
    """JSON's true is a number to Python, and 1.0 equals 1; neither may stand in a shape."""
    return isinstance(values, list) and all(type(n) is int and 0 <= n < 2**63 for n in values)


def _check_offsets(path: Path, offsets: list[list[int]], size: int) -> None:
    """The tensors fill the file from its first number to its last, without holes, none over another."""
    place = 0
    for start, end in sorted(offsets):
        if start != place:
            raise _corrupt(path, f"{'a hole' if start > place else 'two tensors'} at byte {min(start, place)}")
        place = end
    if place != size:
        less = f"{place - size} bytes are missing" if place > size else f"{size - place} bytes too many"
        raise _corrupt(path, f"{less} at its end")


def sound_name(name: str) -> bool:
    """Whether a tensor's name can be printed, and is no longer than names are: it is shown in sentences."""
    return name.isascii() and name.isprintable() and 0 < len(name) <= MOST_LETTERS


def numbers(shape: tuple[int, ...] | list[int]) -> int:
    """How many numbers a tensor of that shape has."""
    count = 1
    for n in shape:
        count *= n
    return count


def _corrupt(path: Path, why: str) -> LDMError:
    return LDMError(f"{path} is corrupt or truncated ({why}): {AGAIN}.")


def _not_safetensors(path: Path, start: bytes) -> LDMError:
    if not start:
        return _corrupt(path, "it is empty")
    for magic, what in OTHERS:
        if start.startswith(magic):
            return LDMError(f"{path} is {what}.")
    if start[TAR_AT:].startswith(TAR):
        return LDMError(f"{path} is a tar archive: unpack it, and name the file inside.")
    text = start.lstrip(b"\xef\xbb\xbf \t\r\n")
    if text.startswith(b"<"):
        return LDMError(f"{path} is a web page, not weights: download the file itself.")
    if text.startswith((b'{"', b"{\n", b"{\r", b"{ ", b"{}", b"[")):
        return LDMError(f"{path} is JSON, an index or a configuration, not weights: name the weights themselves.")
    return LDMError(f"{path} is corrupt or truncated, or not a safetensors file: {AGAIN}.")


def is_pickle(path: Path) -> bool:
    """By its first bytes, whatever its name: a zip archive (torch's format since 2020) or a bare pickle."""
    try:
        with open_plain(path) as file:
            start = file.read(9)
    except OSError as error:
        raise cannot_read(path, error) from error
    # A safetensors file may begin with the same bytes, as part of its length.
    header = start[8:9] == b"{" and struct.unpack("<Q", start[:8])[0] <= MOST_HEADER_BYTES
    return start.startswith((b"PK", b"\x80")) and not header
