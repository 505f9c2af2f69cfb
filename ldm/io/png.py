"""Pictures that carry their recipe: a PNG whose text chunk `ldm` holds prompt, seed and settings as JSON."""

import json
import os
import struct
import zlib
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ldm.errors import LDMError
from ldm.io.atomic import atomic_file
from ldm.io.folders import cannot_read, open_plain, parse_json

SIGNATURE = b"\x89PNG\r\n\x1a\n"
KEY = "ldm"
MOST_BYTES = 1_000_000  # of settings; Pillow reads no longer text either
MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")


def save_png(image: Image.Image, path: str | Path, settings: dict[str, Any]) -> None:
    """Write a PNG with its settings, whole or not at all.

    Raises LDMError if the name does not end in .png, the settings are not JSON or too long, the image's mode is none
    of PNG's, or the file cannot be written.
    """
    path = Path(path)
    if path.suffix.lower() != ".png":
        raise LDMError(f"Cannot write {path}: only PNG keeps the settings; give it a name that ends in .png.")
    if image.mode not in MODES:
        raise LDMError(f"Cannot write {path}: PNG has no mode {image.mode!r}; convert the image to RGB first.")
    try:
        # ASCII (other letters as \uXXXX): a plain tEXt chunk, that every program shows, is Latin-1 by the standard
        text = json.dumps(settings, ensure_ascii=True, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise LDMError(f"Cannot write {path}: its settings are not expressible as JSON ({error}).") from error
    if not isinstance(settings, dict) or len(text) > MOST_BYTES:
        raise LDMError(f"Cannot write {path}: its settings must be a dict of at most {MOST_BYTES} bytes as JSON.")
    info = PngInfo()
    info.add_text(KEY, text)
    with atomic_file(path) as file:
        image.save(file, format="PNG", pnginfo=info)


def read_settings(path: str | Path) -> dict[str, Any]:
    """The settings that `save_png` wrote. No pixel is decoded and nothing is decompressed, so there is no bomb.

    Raises LDMError if the file is not a PNG, is truncated, or holds no `ldm` chunk, two, or one that is not sound.
    """
    path = Path(path)
    try:
        text = _find_chunk(path)
    except OSError as error:
        raise cannot_read(path, error) from error
    if text is None:
        raise LDMError(f"{path} holds no settings of ldm: it was made or saved again by another program.")
    settings = parse_json(text, f"{path}: the text chunk {KEY!r}")
    if not isinstance(settings, dict):
        raise LDMError(f"{path}: the text chunk {KEY!r} is a {type(settings).__name__}, not a table of settings.")
    return settings


def _find_chunk(path: Path) -> bytes | None:
    """A PNG is a signature and chunks: length, type, data, and a check sum of the last two."""
    found = None
    with open_plain(path) as file:
        size = os.fstat(file.fileno()).st_size
        if file.read(8) != SIGNATURE:
            raise LDMError(f"{path} is not a PNG: name a picture that ldm wrote.")
        kind = b""
        while kind != b"IEND":
            head = file.read(8)
            length, kind = struct.unpack(">I4s", head) if len(head) == 8 else (size, b"")
            if file.tell() + length + 4 > size:
                raise LDMError(f"{path} is truncated: take another copy of it.")
            keyword = file.read(min(length, len(KEY) + 1)) if kind in (b"tEXt", b"zTXt", b"iTXt") else b""
            if keyword != KEY.encode() + b"\0":
                file.seek(length - len(keyword) + 4, os.SEEK_CUR)
                continue
            if found is not None or kind != b"tEXt" or length - len(keyword) > MOST_BYTES:
                why = "twice" if found is not None else "compressed" if kind != b"tEXt" else f"over {MOST_BYTES} bytes"
                raise LDMError(f"{path} holds the text chunk {KEY!r} {why}: it is not as ldm wrote it.")
            found = file.read(length - len(keyword))
            if file.read(4) != struct.pack(">I", zlib.crc32(kind + keyword + found)):
                raise LDMError(f"{path} is damaged (check sum of the chunk {KEY!r}): take another copy of it.")
    return found
