"""Pictures from anywhere, made plain: RGB, eight bits, upright, opaque; or one sentence that says why not."""

import os
import stat
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from ldm.errors import LDMError, say_on_stderr
from ldm.io.folders import cannot_read

Source = str | Path | Image.Image | np.ndarray  # what `as_picture` takes
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF", "PPM")  # Pillow knows more, some through other programs
MOST_PIXELS = 100_000_000  # a header of 30 bytes may promise gigabytes: it is read before any pixel is
# Of so many the memory is taken before the first is read. PNG packs 1032 equal bytes into one, at best.
MANY_PIXELS, PIXELS_A_BYTE = 32_000_000, 1100
TRANSPARENT = ("RGBA", "LA", "PA", "RGBa", "La")
LABEL_MODES = ("L", "P", "I", "I;16", "I;16L", "I;16B", "I;16N")


def open_picture(path: str | Path) -> Image.Image:
    """Read a picture file as RGB.

    It is turned as its EXIF says; transparent parts are laid onto white and of an animation the first picture is taken,
    each with a line on stderr; 16 bits of grey are scaled to 8, not clipped.
    Raises LDMError if the file is missing, unreadable, no picture of `FORMATS`, damaged, empty, or of more than
    `MOST_PIXELS` pixels.
    """
    return _plain(_read(path), str(path))


def as_picture(picture: str | Path | Image.Image | np.ndarray, name: str = "picture") -> Image.Image:
    """RGB, from a path, a Pillow image of any mode, or an array of uint8, (H, W, 3) or (H, W) for grey.

    The image given is not changed. `name` is what the sentences call it. Raises LDMError as `open_picture` does, and
    for anything else.
    """
    if isinstance(picture, str | Path):
        return open_picture(picture)
    if isinstance(picture, np.ndarray):
        return _from_array(picture, name)
    if not isinstance(picture, Image.Image):
        raise LDMError(f"{name} must be a path, a Pillow image or an array of uint8, not {_a(type(picture).__name__)}.")
    return _plain(_upright(picture, name), name)


def as_mask(mask: str | Path | Image.Image | np.ndarray, name: str = "mask") -> Image.Image:
    """Grey, mode L, from whatever `as_picture` takes, or an array of bool (H, W): True is 255, white."""
    if isinstance(mask, np.ndarray) and mask.dtype == bool:
        mask = mask.astype(np.uint8) * 255
    return as_picture(mask, name).convert("L")


def as_labels(labels: str | Path | Image.Image | np.ndarray, name: str = "labels") -> np.ndarray:
    """Class indices as they are stored, int64 (H, W): of a grey or palette picture its raw values, never its colours.

    Raises LDMError for a picture that stores colours, an array that is not of integers, and as `open_picture` does.
    """
    if isinstance(labels, str | Path):
        labels, name = _read(labels), str(labels)
    elif isinstance(labels, Image.Image):
        labels = _upright(labels, name)
    if isinstance(labels, Image.Image):
        if labels.mode not in LABEL_MODES:
            raise LDMError(
                f"{name} holds colours (mode {labels.mode}), not class indices: give a picture of mode L or P, "
                "or use it as it is, if its classes are coloured already."
            )
        labels = np.asarray(labels)
    if not isinstance(labels, np.ndarray) or labels.ndim != 2 or not np.issubdtype(labels.dtype, np.integer):
        raise LDMError(f"{name} must be a picture of class indices or integers (H, W), not {_what(labels)}.")
    if labels.size == 0:
        raise _empty(name)
    return labels.astype(np.int64)


# ---------------------------------------------------------------------------------------------------- reading


def _read(path: str | Path) -> Image.Image:
    """A file's first picture, decoded and upright, in the mode in which it is stored."""
    path = Path(path)
    try:
        kind = os.stat(path).st_mode
        if not stat.S_ISREG(kind):  # opening a pipe would wait for ever
            what = "a folder: name a file inside it" if stat.S_ISDIR(kind) else "no ordinary file: copy it to one"
            raise LDMError(f"{path} is {what}.")
        with open(path, "rb") as file:
            return _decode(file, str(path))
    except FileNotFoundError as error:
        raise LDMError(f"{path} does not exist: check the path of the picture.") from error
    except OSError as error:
        raise cannot_read(path, error) from error
    except ValueError as error:  # a zero byte in the name
        raise LDMError(f"{str(path)!r} is no name of a file: check the path of the picture.") from error


def _decode(file: IO[bytes], name: str) -> Image.Image:
    with _explained(name):
        image = Image.open(file, formats=FORMATS)
        if image.width * image.height > MOST_PIXELS:
            raise _too_large(name)
        size = os.fstat(file.fileno()).st_size
        if image.width * image.height > max(MANY_PIXELS, PIXELS_A_BYTE * size):
            raise LDMError(f"{name} is damaged: {size} bytes can't hold {image.width} x {image.height} pixels.")
        if getattr(image, "is_animated", False) and image.format != "MPO":  # MPO: a camera's JPEG with its preview
            say_on_stderr(f"{name} holds several pictures: the first is taken.")
    return _upright(image, name)


def _upright(image: Image.Image, name: str) -> Image.Image:
    if 0 in image.size:
        raise _empty(name)
    with _explained(name):
        image.load()
        try:
            return ImageOps.exif_transpose(image)
        except (MemoryError, LDMError):
            raise
        except Exception:  # of broken EXIF Pillow raises many kinds; the pixels are sound
            say_on_stderr(f"{name}: its EXIF is damaged, so it is not turned.")
            return image


@contextmanager
def _explained(name: str) -> Iterator[None]:
    """Turn what Pillow raises of a stranger's file, which is of any kind, into sentences; and mute its warnings.

    Among them is the one about large pictures, which speaks earlier or later than `MOST_PIXELS`.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except (LDMError, MemoryError):
        raise
    except UnidentifiedImageError as error:
        known = ", ".join(FORMATS)
        raise LDMError(f"{name} is no picture that ldm can read ({known}), or its beginning is damaged.") from error
    except Image.DecompressionBombError as error:
        raise _too_large(name) from error
    except Exception as error:
        why = " ".join(str(error).split())[:120].rstrip(".") or type(error).__name__
        raise LDMError(f"{name} is damaged or cut off ({why}): take another copy of it.") from error


def _too_large(name: str) -> LDMError:
    return LDMError(f"{name} has more than {MOST_PIXELS // 10**6} million pixels: make it smaller in another program.")


def _empty(name: str) -> LDMError:
    return LDMError(f"{name} has no pixels: its width or height is 0; take another picture.")


# ---------------------------------------------------------------------------------------------------- making plain


def _plain(image: Image.Image, name: str) -> Image.Image:
    """RGB on white, without the remarks (colour profile, transparent colour) that a later `save` would write again."""
    if image.mode == "F":
        raise LDMError(f"{name} holds floating-point numbers without a known white: save it with 8 or 16 bits.")
    with _explained(name):
        if image.mode.startswith("I"):
            image = _eight_bits(image, name)
        if image.mode in TRANSPARENT or "transparency" in image.info:
            image = _onto_white(image, name)
        image = image.convert("RGB")
    image.info = {}
    return image


def _eight_bits(image: Image.Image, name: str) -> Image.Image:
    """Grey of 16 bits to 8: 65535 = 255 * 257. Pillow's own `convert` would make all above 255 white."""
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise LDMError(f"{name} holds grey levels outside 0 to 65535: save it with 8 or 16 bits.")
    grey = Image.fromarray(((values + 128) // 257).astype(np.uint8))
    clear = image.info.get("transparency")
    if isinstance(clear, int):
        grey = Image.merge("LA", (grey, Image.fromarray(np.where(values == clear, 0, 255).astype(np.uint8))))
    return grey


def _onto_white(image: Image.Image, name: str) -> Image.Image:
    image = image.convert("LA") if image.mode == "La" else image  # Pillow has no way from La to RGBA at once
    image = image.convert("RGBA")
    if image.getchannel("A").getextrema()[0] == 255:
        return image
    say_on_stderr(f"{name} is transparent in places: they become white.")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)


def _from_array(array: np.ndarray, name: str) -> Image.Image:
    if array.dtype != np.uint8 or not (array.ndim == 2 or (array.ndim == 3 and array.shape[2] == 3)):
        raise LDMError(f"{name} must be an array of uint8, 0 to 255, (H, W, 3) or (H, W), not {_what(array)}.")
    if array.size == 0:
        raise _empty(name)
    return Image.fromarray(array).convert("RGB")


def _what(thing: object) -> str:
    return f"{thing.dtype} {thing.shape}" if isinstance(thing, np.ndarray) else _a(type(thing).__name__)


def _a(word: str) -> str:
    return f"{'an' if word[0].lower() in 'aeiou' else 'a'} {word}"
