"""Zip archives as torch writes checkpoints: a list of records, each stored as it is, that are read by offset.

    local header, name, padding, bytes     for every record
    central directory                      every record's name, length, check sum and offset
    [zip64 end, zip64 locator], end        where the directory is

One file of this format can be read in several ways (names twice, lengths that differ between header and directory,
compressed records, archives behind archives): whatever torch doesn't write is refused, so that only one way is left.
"""

import mmap
import os
import re
import struct
import zlib
from pathlib import Path
from typing import NamedTuple

import torch

from ldm.errors import LDMError
from ldm.io.folders import AGAIN, cannot_read

MOST_RECORDS, MOST_DIRECTORY_BYTES = 50_000, 20_000_000  # far above every real checkpoint
LOCAL, CENTRAL, END, END64, LOCATOR = b"PK\x03\x04", b"PK\x01\x02", b"PK\x05\x06", b"PK\x06\x06", b"PK\x06\x07"
ENCRYPTED = 0x2041  # bits of the flags: encrypted, strongly so, or its header is
FULL16, FULL32 = 0xFFFF, 0xFFFFFFFF  # "see the 64-bit field"


class Record(NamedTuple):
    """Where the bytes of one record lie in the file, and their check sum."""

    start: int
    length: int
    crc: int


class Archive:
    """`records`: {name: Record}. Raises LDMError unless the file is whole and as torch would write it."""

    def __init__(self, path: Path):
        self.path = path
        self.records: dict[str, Record] = {}
        self._checked: set[str] = set()
        self._window: torch.Tensor | None = None
        try:
            with open(path, "rb") as file:
                self.size = os.fstat(file.fileno()).st_size
                if self.size < 22:
                    raise self._bad("it is cut off", AGAIN)
                with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
                    self._read(content)
        except OSError as error:
            raise cannot_read(path, error) from error
        except struct.error as error:
            raise self._bad("its directory is cut off", AGAIN) from error

    def read(self, name: str) -> torch.Tensor:
        """The bytes of a record, checked, as a window on the file: uint8 (length,)."""
        start, length, crc = self.records[name]
        if self._window is None:  # private: what is written into it stays in memory
            self._window = torch.from_file(str(self.path), shared=False, size=self.size, dtype=torch.uint8)
        window = self._window[start : start + length]
        if name not in self._checked and zlib.crc32(window.numpy()) != crc:
            raise self._bad(f"the check sum of {name!r} is wrong", AGAIN)
        self._checked.add(name)
        return window

    def _read(self, content: mmap.mmap) -> None:
        count, length, start, end = self._directory(content)
        if count > MOST_RECORDS or length > MOST_DIRECTORY_BYTES:
            raise self._bad(f"it lists {count} records in {length} bytes", "do not trust this file")
        if not start <= start + length <= end:
            raise self._bad("its directory does not lie inside it", AGAIN)
        place, spans = start, []
        for _ in range(count):
            if place + 46 > start + length or content[place : place + 4] != CENTRAL:
                raise self._bad("its directory is damaged", AGAIN)
            name, record, header, place = self._entry(content, place, start + length)
            if name in self.records:
                raise self._bad(f"it holds {name!r} twice", "do not trust this file")
            self.records[name] = record
            spans.append((header, record.start + record.length))
        if place != start + length:
            raise self._bad("its directory is longer than its list", "do not trust this file")
        spans.sort()
        if any(a[1] > b[0] for a, b in zip(spans, [*spans[1:], (start, start)], strict=True)):
            raise self._bad("records lie over each other", "do not trust this file")

    def _directory(self, content: mmap.mmap) -> tuple[int, int, int, int]:
        """(number of records, length and offset of the directory, where it must have ended)"""
        end = self.size - 22
        if content[end : end + 4] != END:
            raise self._bad("it is cut off, or other bytes follow it", AGAIN)
        disks, count, length, start, remark = struct.unpack("<4xI2xHIIH", content[end:])
        if disks or remark:
            raise self._bad("it is one part of several", AGAIN)
        if content[end - 20 : end - 16] != LOCATOR:
            return count, length, start, end
        (end64,) = struct.unpack("<8xQ4x", content[end - 20 : end])
        if end64 + 56 != end - 20 or content[end64 : end64 + 4] != END64:
            raise self._bad("its directory cannot be found", AGAIN)
        wide = struct.unpack("<32xQQQ", content[end64 : end64 + 56])
        for narrow, full, value in zip((count, length, start), (FULL16, FULL32, FULL32), wide, strict=True):
            if narrow not in (full, value):
                raise self._bad("it has two directories", "do not trust this file")
        return *wide, end64

    def _entry(self, content: mmap.mmap, place: int, end: int) -> tuple[str, Record, int, int]:
        """(name, record, where its local header is, where the next entry is)"""
        fields = struct.unpack("<8xHH4xIIIHHHHxxxxxxI", content[place : place + 46])
        flags, method, crc, packed, length, name_length, extra_length, remark, disk, header = fields
        after = place + 46 + name_length + extra_length + remark
        if after > end:
            raise self._bad("its directory is damaged", AGAIN)
        raw = content[place + 46 : place + 46 + name_length]
        extra = content[place + 46 + name_length : place + 46 + name_length + extra_length]
        name = self._name(raw)
        length, packed, header = self._wide(extra, (length, packed, header))
        if flags & ENCRYPTED or disk:
            raise self._bad(f"{name!r} is encrypted or in another file", "store it plainly")
        if method or packed != length:
            kind = "part of a TorchScript program" if "/code/" in name else "compressed"
            raise self._bad(f"{name!r} is {kind}", "take the safetensors file, or save the weights with torch.save")
        local = content[header : header + 30]
        if local[:4] != LOCAL:
            raise self._bad(f"{name!r} is not where its directory says", AGAIN)
        local_method, local_name, local_extra = struct.unpack("<8xH16xHH", local)
        start = header + 30 + local_name + local_extra
        if local_method or content[header + 30 : header + 30 + local_name] != raw or start + length > self.size:
            raise self._bad(f"{name!r} is another one in its directory", "do not trust this file")
        return name, Record(start, length, crc), header, after

    def _wide(self, extra: bytes, narrow: tuple[int, int, int]) -> list[int]:
        """length, packed length, offset: those that do not fit 32 bits stand in the extra field of kind 1."""
        wide, place = iter(()), 0
        while place + 4 <= len(extra):
            kind, size = struct.unpack("<HH", extra[place : place + 4])
            if kind == 1:
                size -= size % 8
                wide = iter(struct.unpack(f"<{size // 8}Q", extra[place + 4 : place + 4 + size]))
            place += 4 + size
        values = [next(wide, -1) if value == FULL32 else value for value in narrow]
        if any(not 0 <= value <= self.size for value in values):
            raise self._bad("a record lies outside it", AGAIN)
        return values

    def _name(self, raw: bytes) -> str:
        try:
            name = raw.decode()
        except UnicodeDecodeError:
            name = ""
        if not name.isprintable() or not re.fullmatch(r"[^/\\]+(/[^/\\]+)*", name) or ".." in name.split("/"):
            raise self._bad(f"it holds a record named {raw[:80]!r}", "do not trust this file")
        return name

    def _bad(self, why: str, remedy: str) -> LDMError:
        return LDMError(f"{self.path} is no sound checkpoint of torch ({why}): {remedy}.")
