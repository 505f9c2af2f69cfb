"""Strangers' picture files: every kind of pixel, turned, transparent, broken, enormous."""

import io
import os
import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps

from ldm import scenes
from ldm.errors import LDMError
from ldm.io.pictures import FORMATS, MOST_PIXELS, as_labels, as_mask, as_picture, open_picture

EXTENSIONS = {"PNG": "png", "JPEG": "jpg", "WEBP": "webp", "BMP": "bmp", "TIFF": "tif", "GIF": "gif", "PPM": "ppm"}
# Corners red, green, blue and white tell all eight ways to lay a picture; 6 x 4, so that width and height differ.
CORNERS = np.zeros((4, 6, 3), np.uint8)
CORNERS[0, 0], CORNERS[0, 5], CORNERS[3, 0], CORNERS[3, 5] = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)
CORNERS[1, 2] = (90, 60, 30)


@pytest.fixture(scope="module")
def photo():
    return np.asarray(scenes.render(scenes.sample(3)).image)


def refused(call, *words):
    """The sentence with which `call` is refused: one, of one line, that holds the words."""
    with pytest.raises(LDMError) as caught:
        call()
    text = str(caught.value)
    assert text.endswith((".", "?")) and "\n" not in text and len(text) < 400
    assert all(word in text for word in words), text
    return text


def pixels(image):
    assert isinstance(image, Image.Image) and image.mode == "RGB"
    return np.asarray(image).astype(int)


# ---------------------------------------------------------------------------------------------------- modes


@pytest.mark.parametrize("form", FORMATS)
def test_every_format_is_read(form, photo, tmp_path, capsys):
    path = tmp_path / f"a.{EXTENSIONS[form]}"
    Image.fromarray(photo).save(path, format=form, **({"lossless": True} if form == "WEBP" else {}))
    apart = np.abs(pixels(open_picture(path)) - photo).mean()
    assert apart < {"JPEG": 8, "GIF": 16}.get(form, 1e-9)
    assert np.array_equal(pixels(as_picture(str(path))), pixels(open_picture(path)))
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("mode", ["RGB", "L", "1", "P", "CMYK", "YCbCr", "HSV", "RGBA", "LA", "PA"])
def test_every_mode_becomes_rgb(mode, photo, capsys):
    source = Image.fromarray(photo)
    image = source.convert("P").convert("PA") if mode == "PA" else source.convert(mode)
    before = image.copy()
    wanted = source.convert("L" if mode == "LA" else "P" if mode == "PA" else mode).convert("RGB")
    assert np.array_equal(pixels(as_picture(image)), np.asarray(wanted)) and np.asarray(wanted).std() > 20
    assert image == before and capsys.readouterr().err == ""


def test_cmyk_file(photo, tmp_path):
    Image.fromarray(photo).convert("CMYK").save(tmp_path / "a.tif")
    assert np.abs(pixels(open_picture(tmp_path / "a.tif")) - photo).max() <= 1


@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.pgm"])
def test_sixteen_bits_are_scaled_not_clipped(name, tmp_path):
    ramp = np.linspace(0, 65535, 64 * 48).astype(np.uint16).reshape(48, 64)
    Image.fromarray(ramp).save(tmp_path / name)
    grey = np.round(ramp / 257).astype(int)
    found = pixels(open_picture(tmp_path / name))
    assert np.array_equal(found, np.stack([grey] * 3, axis=2)) and len(np.unique(found)) == 256
    assert np.array_equal(pixels(as_picture(Image.fromarray(ramp.astype(np.int32)))), found)  # mode I
    assert np.array_equal(np.asarray(as_mask(tmp_path / name)), grey)


def test_sixteen_bits_with_a_transparent_level(tmp_path, capsys):
    Image.fromarray(np.array([[0, 20000, 40000]], np.uint16)).save(tmp_path / "a.png", transparency=20000)
    assert pixels(open_picture(tmp_path / "a.png"))[0, :, 0].tolist() == [0, 255, 156]
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_numbers_without_a_known_white_are_refused():
    refused(lambda: as_picture(Image.new("F", (4, 4)), "depth.tif"), "depth.tif", "floating-point")
    refused(lambda: as_picture(Image.fromarray(np.array([[70000]], np.int32))), "0 to 65535")


# ---------------------------------------------------------------------------------------------------- transparency


def transparent(mode):
    """Opaque dark red or grey at the left, half transparent, wholly transparent at the right."""
    if mode == "RGBA":
        return Image.fromarray(np.array([[(100, 0, 0, 255), (100, 0, 0, 127), (100, 0, 0, 0)]], np.uint8))
    if mode == "LA":
        return Image.fromarray(np.array([[(100, 255), (100, 127), (100, 0)]], np.uint8))
    image = Image.fromarray(np.array([[0, 1, 2]], np.uint8))
    image.putpalette([100, 0, 0] * 3)
    image.info["transparency"] = bytes([255, 127, 0])
    return image


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "La", "RGBa"])
@pytest.mark.parametrize("stored", [False, True])
def test_transparent_parts_become_white_and_a_line_says_so(mode, stored, tmp_path, capsys):
    image, name = transparent(mode.upper()), "memory"
    if mode in ("La", "RGBa"):
        image = image.convert(mode)
    elif stored:
        name = str(tmp_path / "a.png")
        image.save(name, **({"transparency": image.info["transparency"]} if mode == "P" else {}))
    found = pixels(as_picture(name if name != "memory" else image, "memory"))[0]
    grey = mode in ("LA", "La")
    assert found[0].tolist() == [100] * 3 if grey else [100, 0, 0]
    assert np.abs(found[1] - ([178] * 3 if grey else [178, 128, 128])).max() <= 1  # half of it, half of white
    assert found[2].tolist() == [255, 255, 255]
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and name in said[0] and "white" in said[0]


def test_the_result_keeps_no_remarks_of_the_file(tmp_path):
    image = Image.fromarray(CORNERS)
    image.save(tmp_path / "a.png", transparency=(0, 0, 0), icc_profile=b"not a profile")
    assert open_picture(tmp_path / "a.png").info == {}
    image.save(tmp_path / "b.png", dpi=(72, 72), icc_profile=b"not a profile")
    with Image.open(tmp_path / "b.png") as opened:
        assert as_picture(opened).info == {} and set(opened.info) == {"dpi", "icc_profile"}


# ---------------------------------------------------------------------------------------------------- turned


TURNS = {
    1: lambda a: a, 2: lambda a: a[:, ::-1], 3: lambda a: a[::-1, ::-1], 4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1), 6: lambda a: np.rot90(a, -1), 7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: np.rot90(a),
}  # fmt: skip


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("form", ["PNG", "WEBP", "TIFF"])
def test_exif_turns_the_picture(orientation, form, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"a.{EXTENSIONS[form]}"
    Image.fromarray(CORNERS).save(path, form, exif=exif, **({"lossless": True} if form == "WEBP" else {}))
    wanted = TURNS[orientation](CORNERS)
    assert np.array_equal(pixels(open_picture(path)), wanted)
    with Image.open(path) as image:
        assert np.array_equal(pixels(as_picture(image)), wanted)
        once = ImageOps.exif_transpose(image)
    assert np.array_equal(pixels(as_picture(once)), wanted)  # never twice


def test_exif_of_a_jpeg(photo, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(photo).save(tmp_path / "a.jpg", exif=exif, quality=95)
    assert np.abs(pixels(open_picture(tmp_path / "a.jpg")) - np.rot90(photo, -1)).mean() < 5


def test_broken_exif_is_no_reason_to_refuse(tmp_path, capsys):
    start = b"Exif\0\0MM\0*\0\0\0\x08"
    turned, below_zero = struct.pack(">HHIHH", 0x112, 3, 1, 6, 0), struct.pack(">HHIi", 0x100, 9, 1, -5)
    cases = {  # the bytes -> whether Pillow raises of them, which is said, or passes over them
        start + b"\xff" * 20: False,
        start.replace(b"MM", b"XX") + b"\xff" * 20: True,
        b"Exif\0\0MM\0*\0\0": True,
        start + b"\0\2" + below_zero + turned + b"\0\0\0\0": True,  # a width of -5
    }
    for exif, said in cases.items():
        Image.fromarray(CORNERS).save(tmp_path / "a.png", exif=exif)
        assert np.array_equal(pixels(open_picture(tmp_path / "a.png")), CORNERS)
        line = f"{tmp_path / 'a.png'}: its EXIF is damaged, so it is not turned.\n"
        assert capsys.readouterr().err == (line if said else "")


# ---------------------------------------------------------------------------------------------------- animations


@pytest.mark.parametrize("form", ["GIF", "WEBP", "PNG", "TIFF"])
def test_of_an_animation_the_first_is_taken(form, tmp_path, capsys):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime", "blue")]
    path = tmp_path / f"a.{EXTENSIONS[form]}"
    frames[0].save(
        path, form, save_all=True, append_images=frames[1:], **({"lossless": True} if form == "WEBP" else {})
    )
    assert (pixels(open_picture(path)) == [255, 0, 0]).all()
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and str(path) in said[0] and "first" in said[0]


def test_a_camera_s_picture_with_its_preview_is_no_animation(photo, tmp_path, capsys):
    """MPO: a JPEG file behind which a smaller one lies. Cameras name it .jpg."""
    image = Image.fromarray(photo)
    image.save(tmp_path / "a.jpg", "MPO", save_all=True, append_images=[image.resize((32, 32))], quality=95)
    with Image.open(tmp_path / "a.jpg") as opened:
        assert opened.format == "MPO" and opened.n_frames == 2
    assert np.abs(pixels(open_picture(tmp_path / "a.jpg")) - photo).mean() < 5
    assert capsys.readouterr().err == ""


# ---------------------------------------------------------------------------------------------------- broken


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("share", [0.02, 0.2, 0.5, 0.8, 0.95])
def test_cut_off_files(form, share, photo, tmp_path):
    buffer = io.BytesIO()
    Image.fromarray(photo).save(buffer, format=form)
    path = tmp_path / "cut.bin"
    path.write_bytes(buffer.getvalue()[: int(share * buffer.tell())])
    refused(lambda: open_picture(path), str(path), "damaged")


@pytest.mark.parametrize("form", FORMATS)
def test_damaged_bytes_end_in_a_picture_or_a_sentence(form, photo, tmp_path):
    buffer = io.BytesIO()
    Image.fromarray(photo[:32, :32]).save(buffer, format=form)
    rng = np.random.default_rng(0)
    for _ in range(60):
        data = bytearray(buffer.getvalue())
        for place in rng.integers(0, len(data), 6):
            data[place] = rng.integers(0, 256)
        (tmp_path / "a").write_bytes(data)
        try:
            open_picture(tmp_path / "a")
        except LDMError as error:
            assert str(error).endswith(".") and "\n" not in str(error)


def test_a_wrong_check_sum_is_damage(photo, tmp_path):
    Image.fromarray(photo).save(tmp_path / "a.png")
    data = bytearray((tmp_path / "a.png").read_bytes())
    data[data.index(b"IDAT") + 60] ^= 0x55
    (tmp_path / "a.png").write_bytes(data)
    refused(lambda: open_picture(tmp_path / "a.png"), "damaged")


def test_what_is_no_picture(tmp_path):
    (tmp_path / "a.png").write_text("hello")
    refused(lambda: open_picture(tmp_path / "a.png"), "a.png", "no picture", "PNG")
    (tmp_path / "empty.png").touch()
    refused(lambda: open_picture(tmp_path / "empty.png"), "no picture")
    Image.new("RGB", (8, 8)).save(tmp_path / "a.ico")  # Pillow could, but it is none of ours
    refused(lambda: open_picture(tmp_path / "a.ico"), "no picture")
    refused(lambda: open_picture(tmp_path), str(tmp_path), "folder")
    refused(lambda: open_picture(tmp_path / "none.png"), "none.png", "does not exist")
    refused(lambda: open_picture(tmp_path / "a.png" / "b.png"), "b.png")
    refused(lambda: open_picture("x" * 300), "Cannot read")
    refused(lambda: open_picture("a\0b"), "no name")
    os.mkfifo(tmp_path / "pipe")
    refused(lambda: open_picture(tmp_path / "pipe"), "no ordinary file")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="whoever is root may read all")
def test_no_permission(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "a.png").chmod(0)
    refused(lambda: open_picture(tmp_path / "a.png"), "a.png", "permission")


def header(width, height):
    """A PNG that promises much and holds nothing."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    size = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize("width, height", [(60_000, 60_000), (2**31 - 1, 2**31 - 1), (10_000, 10_001)])
def test_bombs_are_refused_by_their_header(width, height, tmp_path):
    (tmp_path / "bomb.png").write_bytes(header(width, height))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        refused(lambda: open_picture(tmp_path / "bomb.png"), "bomb.png", "100 million pixels")


def test_up_to_the_limit_pillow_is_not_asked(tmp_path):
    """Between Pillow's warning (89 million) and ours, a picture is no bomb: this one is only empty."""
    assert 95_000_000 < MOST_PIXELS
    (tmp_path / "a.png").write_bytes(header(95_000, 1000))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        refused(lambda: open_picture(tmp_path / "a.png"), "damaged")


def test_no_pixels(tmp_path):
    (tmp_path / "a.png").write_bytes(header(0, 5))
    refused(lambda: open_picture(tmp_path / "a.png"), "a.png")
    refused(lambda: as_picture(Image.new("RGB", (0, 5))), "no pixels")
    refused(lambda: as_picture(np.zeros((0, 5, 3), np.uint8)), "no pixels")


def test_a_lazy_image_that_is_damaged(photo, tmp_path):
    buffer = io.BytesIO()
    Image.fromarray(photo).save(buffer, format="PNG")
    image = Image.open(io.BytesIO(buffer.getvalue()[:2000]))
    refused(lambda: as_picture(image, "control"), "control is damaged")


# ---------------------------------------------------------------------------------------------------- arrays, masks


def test_arrays(photo):
    assert np.array_equal(pixels(as_picture(photo)), photo)
    assert np.array_equal(pixels(as_picture(photo[:, :, 0])), np.stack([photo[:, :, 0]] * 3, axis=2))
    assert np.array_equal(pixels(as_picture(photo[::-2, ::3])), photo[::-2, ::3])  # a view, not contiguous


@pytest.mark.parametrize(
    "thing",
    [
        np.zeros((4, 4, 3), np.float32), np.zeros((4, 4, 3), np.int64), np.zeros((4, 4, 4), np.uint8), None, 7, b"abc",
        np.zeros(4, np.uint8), np.zeros((1, 4, 4, 3), np.uint8), np.zeros((4, 4), bool), [[1, 2]],
    ],
)  # fmt: skip
def test_anything_else_is_refused(thing):
    refused(lambda: as_picture(thing, "control"), "control", "uint8")


def test_masks(photo, tmp_path):
    inside = photo[:, :, 2] > 60
    for mask in (inside, inside.astype(np.uint8) * 255, Image.fromarray(inside), Image.fromarray(inside).convert("L")):
        found = as_mask(mask)
        assert found.mode == "L" and np.array_equal(np.asarray(found), inside * 255) and 0.1 < inside.mean() < 0.9
    Image.fromarray(inside).save(tmp_path / "mask.png")
    assert np.array_equal(np.asarray(as_mask(tmp_path / "mask.png")), inside * 255)
    assert np.array_equal(np.asarray(as_mask(photo)), np.asarray(Image.fromarray(photo).convert("L")))
    refused(lambda: as_mask(inside.astype(float)), "mask")


def test_labels_are_raw_values(tmp_path):
    values = np.arange(150, dtype=np.uint8).reshape(10, 15)
    grey, palette = Image.fromarray(values), Image.fromarray(values)
    palette.putpalette([k for c in range(256) for k in (255 - c, c, 7)])
    grey.save(tmp_path / "grey.png")
    palette.save(tmp_path / "palette.png")
    Image.fromarray(values.astype(np.uint16)).save(tmp_path / "deep.png")
    for labels in (values, values.astype(np.int32), grey, palette, tmp_path / "grey.png", str(tmp_path / "palette.png"),
                   tmp_path / "deep.png"):  # fmt: skip
        assert np.array_equal(as_labels(labels), values) and as_labels(labels).dtype == np.int64
    refused(lambda: as_labels(grey.convert("RGB"), "classes"), "classes", "colours")
    refused(lambda: as_labels(values / 2), "integers")
    refused(lambda: as_labels(values > 3), "integers")
    refused(lambda: as_labels([[1, 2]]), "integers")
    refused(lambda: as_labels(values[:0]), "no pixels")
