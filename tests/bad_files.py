"""Files that a stranger might send, each bad in its own way: made small, by hand, around the tiny model of `tiny`.

A case takes a sound folder (or a place for a file), spoils it, and says by which road it is opened and what the
sentence must say. The roads are the public ones: `ldm.load`, `ldm.load_controlnet`, a picture given to a pipeline, and
`ldm rerun`.
"""

import collections
import io
import json
import os
import pickle
import struct
import tarfile
import warnings
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import safetensors.torch
import torch
from fuzz_inputs import costly
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ldm.io.folders import read_json
from ldm.models.controlnet import ControlNetConfig

MARKER = "executed"  # what hostile code would write
UNET, UNET_2D = "unet/diffusion_pytorch_model.safetensors", "UNet2DConditionModel"


class Case(NamedTuple):
    """`spoil(folder)` returns what to open (None: the folder); `says` is a pattern for the sentence."""

    name: str
    spoil: Callable[[Path], Path | None]
    says: str


# ---------------------------------------------------------------------------------------------------- safetensors


def container(header: str | bytes, data: bytes = b"") -> bytes:
    """A safetensors file by hand."""
    text = header.encode() if isinstance(header, str) else header
    return struct.pack("<Q", len(text)) + text + data


def entry(dtype: str = '"F32"', shape: str = "[1]", offsets: str = "[0,4]", more: str = "") -> str:
    return f'{{"dtype":{dtype},"shape":{shape},"data_offsets":{offsets}{more}}}'


def one(name: str = "a", **fields: str) -> bytes:
    return container(f'{{"{name}":{entry(**fields)}}}', bytes(4))


def put(content: bytes, place: str = UNET) -> Callable[[Path], None]:
    return lambda folder: (folder / place).write_bytes(content) and None


def changed(change: Callable[[bytes], bytes], place: str = UNET) -> Callable[[Path], None]:
    return lambda folder: (folder / place).write_bytes(change((folder / place).read_bytes())) and None


def tensors(change: Callable[[dict], dict | None], part: str = "unet") -> Callable[[Path], None]:
    """Change what is stored, by the library's hand."""

    def spoil(folder: Path) -> None:
        path = next((folder / part).glob("*.safetensors"))
        state = safetensors.torch.load_file(path)
        state = change(state) or state
        safetensors.torch.save_file(state, path, metadata={"format": "pt"})

    return spoil


def planted(value: float) -> Callable[[dict], None]:
    def change(state: dict) -> None:
        state["conv_in.bias"][3] = value

    return change


def without(state: dict) -> None:
    del state["conv_in.bias"]


def many(count: int) -> bytes:
    return container("{" + ",".join(f'"{i}":{entry(shape="[0]", offsets="[0,0]")}' for i in range(count)) + "}")


def counted(count: int) -> str:
    """A table of that many names, and the last one again."""
    return "{" + ",".join(f'"{i}":0' for i in [*range(count), count - 1]) + "}"


def tar() -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("weights.safetensors"))
    return file.getvalue()


def special(make: Callable[[Path], object], place: str = UNET) -> Callable[[Path], None]:
    """Something else than a file in its place."""

    def spoil(folder: Path) -> None:
        (folder / place).unlink()
        make(folder / place)

    return spoil


CORRUPT = r"diffusion_pytorch_model\.safetensors is corrupt or truncated \(.*\): download or copy it again"
DISTRUST = r"diffusion_pytorch_model\.safetensors declares .*: do not trust this file"
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n"
SAFETENSORS = [
    Case("header cut off", changed(lambda b: b[:100]), CORRUPT.replace(".*", r"its header has 92 of \d+ bytes")),
    Case("numbers cut off", changed(lambda b: b[:-5]), CORRUPT.replace(".*", "5 bytes are missing at its end")),
    Case("trailing bytes", changed(lambda b: b + b"!!"), CORRUPT.replace(".*", "2 bytes too many at its end")),
    Case("header of 2^63 bytes", changed(lambda b: struct.pack("<Q", 2**63) + b[8:]), "or not a safetensors file"),
    Case("header longer than the file", put(struct.pack("<Q", 999) + b"{}"), r"its header has 2 of 999 bytes"),
    Case("header of no bytes", put(bytes(8)), "or not a safetensors file"),
    Case("header too large", put(container("{" + " " * 10_000_000 + "}")), "or not a safetensors file"),
    Case("header is no JSON", put(container("{x}")), CORRUPT.replace(".*", "its header is not valid JSON .*")),
    Case("header is a list", put(container("[1,2]")), "or not a safetensors file"),
    Case("header in UTF-16", put(container("{}".encode("utf-16-le"))), CORRUPT),
    Case("header not UTF-8", put(container(b'{"\xff":1}')), CORRUPT.replace(".*", "its header is not UTF-8 .*")),
    Case("NaN in the header", put(one(shape="[NaN]")), CORRUPT.replace(".*", ".*NaN is not a JSON number.*")),
    Case("one name twice", put(container(f'{{"a":{entry()},"a":{entry()}}}', bytes(4))), "the name 'a' stands twice"),
    Case("one of 200,000 names twice", put(container(counted(200_000))), "the name '199999' stands twice"),
    Case("one field twice", put(one(more=',"shape":[1]')), "the name 'shape' stands twice"),
    Case("one field more", put(one(more=',"code":"import os"')), "'a' has no dtype, .* or more than these"),
    Case("negative shape", put(one(shape="[-1]")), "the shape or the offsets of 'a' are no whole numbers"),
    Case("fraction as shape", put(one(shape="[1.0]")), "the shape or the offsets of 'a' are no whole numbers"),
    Case("truth as shape", put(one(shape="[true]")), "the shape or the offsets of 'a' are no whole numbers"),
    Case("shape beyond 64 bits", put(one(shape="[4294967296,4294967296]")), r"which are not its \(4294967296"),
    Case("shape of 2^64", put(one(shape="[18446744073709551617]")), "no whole numbers from 0 on"),
    Case("overlap", put(container(f'{{"a":{entry()},"b":{entry()}}}', bytes(4))), r"\(two tensors at byte 0\)"),
    Case("hole", put(container(f'{{"a":{entry(offsets="[1,5]")}}}', bytes(5))), r"\(a hole at byte 0\)"),
    Case("beyond the end", put(one(shape="[2]", offsets="[0,8]")), "4 bytes are missing at its end"),
    Case("offsets backwards", put(one(shape="[0]", offsets="[4,0]")), CORRUPT),
    Case("three offsets", put(one(offsets="[0,2,4]")), CORRUPT),
    Case("fewer bytes than numbers", put(one(shape="[3]")), r"'a' has 4 bytes, which are not its \(3,\)"),
    Case("unknown type", put(one(dtype='"F99"')), "'a' is of the unknown type 'F99'"),
    Case("type is a list", put(one(dtype="[1]")), "'a' is of the unknown type"),
    Case("nested 100,000 deep", put(container('{"a":' + "[" * 100_000)), CORRUPT),
    Case("nested beyond count", put(container('{"a":' + "[" * 600_000)), CORRUPT.replace(".*", ".*brackets")),
    Case("metadata of numbers", put(container('{"__metadata__":{"a":1}}')), "its metadata are not texts"),
    Case("5000 dimensions", put(one(shape=str([1] * 5000))), DISTRUST),
    Case("20,001 tensors", put(many(20_001)), r"declares 20001 tensors, more than 20000: do not trust"),
    Case("name clears the screen", put(one("a\\u001b[2J")), r"tensor 'a\\x1b\[2J': do not trust"),
    Case("name from right to left", put(one("a\\u202e")), r"tensor 'a\\u202e': do not trust"),
    Case("name with a zero", put(one("a\\u0000")), r"tensor 'a\\x00': do not trust"),
    Case("name of a million letters", put(one("a" * 1_000_000)), DISTRUST),
    Case("empty file", put(b""), r"\(it is empty\)"),
    Case("zeros", put(bytes(1000)), "or not a safetensors file"),
    Case("LFS pointer", put(LFS), "is a Git LFS pointer.*git lfs pull"),
    Case("web page", put(b"\n<!DOCTYPE html><html>"), "is a web page, not weights: download the file itself"),
    Case("GGUF", put(b"GGUF\3\0\0\0" + bytes(99)), "is a GGUF file.*take the model's safetensors"),
    Case("gzip", changed(lambda b: b"\x1f\x8b\x08" + zlib.compress(b)), "is compressed by gzip: unpack it"),
    Case("tar", put(tar()), "is a tar archive: unpack it"),
    Case("an index in place of weights", put(b'{"weight_map":{"a":"b.safetensors"}}'), "is JSON, an index or a conf"),
    Case("a picture", put(b"\x89PNG\r\n\x1a\n" + bytes(99)), "is a picture, not weights"),
    Case("a folder", special(Path.mkdir), "is a folder, not a file"),
    Case("a pipe", special(os.mkfifo), "is no ordinary file"),
    Case("an endless device", special(lambda p: p.symlink_to("/dev/zero")), "is no ordinary file"),
    Case("a link to nothing", special(lambda p: p.symlink_to("gone")), "does not exist: check the path"),
    Case("NaN", tensors(planted(torch.nan)), "'conv_in.bias' holds 1 NaN and 0 infinite numbers: take a sound copy"),
    Case("infinity", tensors(planted(torch.inf)), "'conv_in.bias' holds 0 NaN and 1 infinite numbers"),
    Case("a tensor is missing", tensors(without), "UNet: missing conv_in.bias"),
    Case("a tensor too many", tensors(lambda s: s | {"x": torch.ones(1)}), r"UNet: unexpected x \(in diffusion_pyt"),
    Case("wrong shape", tensors(lambda s: s | {"conv_in.bias": torch.ones(9)}), r"conv_in\.bias .* is \(9,\) instead"),
    Case("int8", tensors(lambda s: {k: v.char() for k, v in s.items()}), "is I8 instead of float32.*Quantised"),
    Case("bool", tensors(lambda s: s | {"conv_in.bias": s["conv_in.bias"] > 0}), "is BOOL instead of float32"),
    Case("a LoRA", tensors(lambda s: {"lora_unet_x.lora_down.weight": torch.ones(4, 4)}), "This is a LoRA"),
    Case(
        "another network", lambda f: put((f / "vae/diffusion_pytorch_model.safetensors").read_bytes())(f), "UNet: mis"
    ),
]


# ---------------------------------------------------------------------------------------------------- pickles


class Runs:
    """Pickles as a call of anything."""

    def __init__(self, function: Callable | type, *arguments: object):
        self.call = function, arguments

    def __reduce__(self) -> tuple:
        return self.call


def touch(folder: Path) -> Runs:
    return Runs(os.system, f"touch {folder / MARKER}")


BIN = "unet/diffusion_pytorch_model.bin"


def pickled(make: Callable[[Path], object], place: str = BIN, **options: object) -> Callable[[Path], None]:
    """Save `make(folder)` in place of the UNet's weights, as torch does."""

    def spoil(folder: Path) -> None:
        content = make(folder)
        (folder / UNET).unlink()
        torch.save(content, folder / place, **options)

    return spoil


def program(*steps: bytes) -> Callable[[Path], None]:
    """A checkpoint whose pickle is written step by step, with four numbers in storage 0."""
    return archived(
        {"x/data.pkl": b"\x80\x02" + b"".join(steps) + b".", "x/data/0": bytes(16), "x/byteorder": b"little"}
    )


def archived(records: dict[str, bytes], method: int = zipfile.ZIP_STORED, tail: bytes = b"") -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        (folder / UNET).unlink()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with zipfile.ZipFile(folder / BIN, "w", method) as archive:
                for name, content in records.items():
                    archive.writestr(name, content)
        with open(folder / BIN, "ab") as file:
            file.write(tail)

    return spoil


def state(folder: Path) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(folder / UNET)


def then(first: Callable[[Path], object], second: Callable[[Path], object]) -> Callable[[Path], None]:
    return lambda folder: (first(folder), second(folder)) and None


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def name(module: str, of: str) -> bytes:
    return f"c{module}\n{of}\n".encode()


def number(value: int) -> bytes:
    raw = value.to_bytes((value.bit_length() + 8) // 8, "little", signed=True)
    return b"\x8a" + bytes([len(raw)]) + raw


def row(*values: int) -> bytes:
    return b"(" + b"".join(map(number, values)) + b"t"


def storage(key: str = "0", of: str = "FloatStorage", count: int = 4) -> bytes:
    return b"(" + text("storage") + name("torch", of) + text(key) + text("cpu") + number(count) + b"tQ"


def tensor(of: bytes, offset: bytes, shape: bytes, stride: bytes) -> bytes:
    rebuild = name("torch._utils", "_rebuild_tensor_v2")
    return rebuild + b"(" + of + offset + shape + stride + b"\x89" + name("collections", "OrderedDict") + b")RtR"


def laid(shape: tuple = (4,), stride: tuple = (1,), offset: int = 0, **of: object) -> Callable[[Path], None]:
    """A table of one tensor that is laid out so."""
    return program(b"}", text("a"), tensor(storage(**of), number(offset), row(*shape), row(*stride)), b"s")


def untyped(folder: Path) -> None:
    """A storage that says no type, of a size that fits none."""
    of = b"(" + text("storage") + name("torch.storage", "UntypedStorage") + text("0") + text("cpu") + number(7) + b"tQ"
    rest = number(0) + row(1) + row(1) + b"\x89" + name("collections", "OrderedDict") + b")R" + name("torch", "float32")
    steps = b"}" + text("a") + name("torch._utils", "_rebuild_tensor_v3") + b"(" + of + rest + b"tRs"
    archived({"x/data.pkl": b"\x80\x02" + steps + b".", "x/data/0": bytes(7)})(folder)


def nested(levels: int) -> dict:
    return {"state_dict": nested(levels - 1)} if levels else {"a": torch.ones(1)}


def circle(key: str) -> dict:
    table: dict = {"a": torch.ones(1)}
    table[key] = table
    return table


def doubling(levels: int) -> dict:
    """A small file, and a table of 700 ** levels lines."""
    return dict.fromkeys(map(str, range(700)), doubling(levels - 1)) if levels else {}


def flipped(content: bytes, of: bytes) -> bytes:
    at = content.index(of)
    return content[:at] + bytes([of[0] ^ 1]) + content[at + 1 :]


def torchscript(folder: Path) -> None:
    (folder / UNET).unlink()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.script(torch.nn.Linear(2, 2)).save(str(folder / BIN))


def raw(folder: Path, place: str = BIN) -> None:
    (folder / UNET).unlink()
    (folder / place).write_bytes(pickle.dumps({"a": touch(folder)}))


def dear(which: str, n: int, times: int) -> Callable[[Path], None]:
    """A small program that makes much work: as much as is refused (`fuzz.py` lets it make hours of it)."""
    return lambda folder: ((folder / UNET).unlink(), (folder / BIN).write_bytes(costly(which, n, times))) and None


def full_of_holes(folder: Path) -> None:
    """A pickle of 3 GB, none of which is on the disk."""
    archived({"x/data.pkl": b""})(folder)
    whole = (folder / BIN).read_bytes()
    end = whole.index(b"PK\1\2")
    length = struct.pack("<II", 3 << 30, 3 << 30)
    local, central, tail = whole[:end], whole[end:-22], whole[-22:]
    with open(folder / BIN, "wb") as file:
        file.write(local[:18] + length + local[26:])
        file.seek(end + (3 << 30))
        file.write(central[:20] + length + central[28:] + tail[:16] + struct.pack("<I", end + (3 << 30)) + tail[20:])


WORK = "a pickle of more than 500000 steps, or of steps that make as much work: do not trust"
NOT_SOUND = r"diffusion_pytorch_model\.bin is no sound checkpoint( of torch)? \(.*\): "
CALLS = r"diffusion_pytorch_model\.bin asks to call '{}', which is no part of weights; nothing was run"
WHOLE = {"x/data.pkl": b"\x80\x02}.", "x/byteorder": b"little"}
NOT_ALLOWED = [
    Case("not allowed", pickled(lambda f: {"a": torch.ones(1)}), "holds only a pickle.*--allow-pickle"),
    Case("code, not allowed", pickled(lambda f: {"a": touch(f)}, UNET), r"this one asks for '(posix|nt)\.system'"),
    Case("raw code, not allowed", lambda f: raw(f, UNET), "is a pickle in spite of its name.*not read"),
]
PICKLES = [
    Case("os.system", pickled(lambda f: {"a": touch(f)}), CALLS.format(r"\w+\.system")),
    Case("os.system, protocol 4", pickled(lambda f: touch(f), pickle_protocol=4), CALLS.format(r"\w+\.system")),
    Case(
        "os.system within",
        pickled(lambda f: {"state_dict": state(f) | {"x": [touch(f)]}}),
        CALLS.format(r"\w+\.system"),
    ),
    Case("eval", pickled(lambda f: Runs(eval, f"open({str(f / MARKER)!r}, 'w')")), CALLS.format(r"\w+\.eval")),
    Case(
        "a loader as a gadget",
        pickled(lambda f: {"a": Runs(torch.load, str(f))}),
        CALLS.format("torch.serialization.load"),
    ),
    Case("getattr", pickled(lambda f: {"a": Runs(getattr, "", "join")}), CALLS.format(r"\w+\.getattr")),
    Case(
        "code as a class to fill",
        program(name("copyreg", "_reconstructor"), b"(", name("os", "system"), name("builtins", "object"), b"NtR"),
        CALLS.format("copyreg._reconstructor"),
    ),
    Case(
        "code by a class of Lightning's package",
        program(name("lightning.fabric.utilities.cloud_io", "_load"), text("x"), b"\x85R"),
        CALLS.format("lightning.*_load"),
    ),
    Case(
        "what a call made is called",
        program(name("argparse", "Namespace"), b")R)R"),
        CALLS.format("what argparse.Namespace gives"),
    ),
    Case(
        "code by the oldest opcodes",
        program(b"(S'touch executed'\nios\nsystem\n"),
        "with STRING, which torch doesn't write",
    ),
    Case(
        "code by OBJ",
        program(b"(", name("os", "system"), text("touch executed"), b"o"),
        "with OBJ, which torch doesn't",
    ),
    Case("an extension registry", program(b"\x82\x01"), "damaged pickle|with EXT1, which torch doesn't"),
    Case("a whole network", pickled(lambda f: torch.nn.Linear(2, 2)), CALLS.format("torch.nn.modules.linear.Linear")),
    Case("a raw pickle", raw, "is a bare pickle, not a checkpoint of torch"),
    Case("torch before 1.6", pickled(state, _use_new_zipfile_serialization=False), "wrote before version 1.6"),
    Case("TorchScript", torchscript, "TorchScript program.*take the safetensors file"),
    Case("compressed", archived(WHOLE | {"x/data/0": bytes(9999)}, zipfile.ZIP_DEFLATED), r"is compressed\)"),
    Case("another zip", archived({"word/document.xml": b"<w/>"}), "is a zip archive, but no checkpoint of torch"),
    Case("two pickles", archived(WHOLE | {"y/data.pkl": b"\x80\x02}."}), "is a zip archive, but no checkpoint"),
    Case("one record twice", lambda f: double(f), "it holds 'x/data.pkl' twice"),
    Case("a record outside", archived(WHOLE | {"x/../../evil": b""}), "holds a record named b'x/../../evil'"),
    Case("an absolute record", archived(WHOLE | {"/etc/evil": b""}), "holds a record named b'/etc/evil'"),
    Case("a record that clears the screen", archived(WHOLE | {"x/\x1b[2J": b""}), r"named b'x/\\x1b\[2J'"),
    Case("zip cut off", then(pickled(state), changed(lambda b: b[:-30], BIN)), "cut off, or other bytes follow"),
    Case("zip's middle is gone", then(pickled(state), changed(lambda b: b[:900] + b[-3000:], BIN)), NOT_SOUND),
    Case("bytes behind the zip", archived(WHOLE, tail=b"#"), "cut off, or other bytes follow"),
    Case(
        "another name in the directory",
        then(archived(WHOLE), changed(lambda b: flipped(b, b"x/data.pkl"), BIN)),
        "is another one in its directory",
    ),
    Case(
        "encrypted",
        then(archived(WHOLE), changed(lambda b: b.replace(b"PK\1\2\x14\3\x14\0\0", b"PK\1\2\x14\3\x14\0\1"), BIN)),
        "is encrypted",
    ),
    Case(
        "a flipped bit of the numbers",
        then(pickled(lambda f: {k: v + 3 for k, v in state(f).items()}), changed(lambda b: spoiled(b), BIN)),
        "the check sum of '.*/data/.*' is wrong",
    ),
    Case(
        "a flipped bit of the pickle",
        then(pickled(state), changed(lambda b: flipped(b, b"conv_in.weight"), BIN)),
        "the check sum of '.*/data.pkl' is wrong",
    ),
    Case("another byte order", archived(WHOLE | {"x/byteorder": b"big"}), "other byte order"),
    Case("a state dict in itself", pickled(lambda f: circle("state_dict")), "wrapped more than 3 times"),
    Case("wrapped too often", pickled(lambda f: nested(9)), "wrapped more than 3 times"),
    Case("one table in many places", pickled(lambda f: doubling(2)), "more than 200000 lines"),
    Case(
        "a path of a million letters", pickled(lambda f: {"a" * 10**6: {"b": torch.ones(1)}}), "names of more than 500"
    ),
    Case("a table in itself", pickled(lambda f: circle("x")), "its tables are nested more than 8 deep"),
    Case(
        "one number, 10^10 times",
        pickled(lambda f: {"a": torch.zeros(1).expand(10**5, 10**5)}),
        "the elements of 'a' lie over each other",
    ),
    Case("windows over each other", laid((3, 2), (1, 1)), "the elements of 'a' lie over each other"),
    Case("beyond the numbers", laid((4,), (1,), 1), "'a' reaches beyond its numbers"),
    Case("far beyond the numbers", laid((2,), (2**62,)), "'a' reaches beyond its numbers"),
    Case("strides backwards", laid((4,), (-1,), 3), "laid out impossibly"),
    Case("offset below", laid((4,), (1,), -1), "laid out impossibly"),
    Case("impossible sizes", laid((2**40, 2**40), (2**40, 1)), "declares an impossible tensor 'a'"),
    Case("too many dimensions", laid((1,) * 9, (1,) * 9), "declares an impossible tensor 'a'"),
    Case("fewer strides than sizes", laid((2, 2), (1,)), "laid out impossibly"),
    Case("more numbers than stored", laid(count=5), "are 16 bytes, not those it declares"),
    Case("numbers that aren't there", laid(key="1"), "it lacks the numbers of 'a'"),
    Case("numbers outside", laid(key="../../data.pkl"), "it lacks the numbers of 'a'"),
    Case("quantised numbers", laid(of="QInt8Storage"), "stores 'torch.QInt8Storage', which ldm doesn't read"),
    Case(
        "a key of 20 KB", program(b"}", b"\x8b", struct.pack("<i", 20_000), b"\x7f" * 20_000, b"Ns"), "damaged pickle"
    ),
    Case("a key of tuples in tuples", program(b"}", b")" + b"\x85" * 450_000, b"Ns"), "damaged pickle"),
    Case("a key twice", program(b"}", text("a"), b"Ns", text("a"), b"Ns"), "damaged pickle.*a key stands twice"),
    Case("more than half a million steps", program(b"N0" * 300_000), WORK),
    Case("20 tables of 50,000 pairs", dear("tables of many pairs", 50_000, 20), WORK),
    Case("30 objects of a name of 9 MB", dear("an object of a long name", 9_000_000, 30), "damaged pickle.*a name"),
    Case("a text of 10 MB as a size", dear("a size that is a text", 1_000_000, 5), "damaged pickle.*a list is none"),
    Case("25 sizes of 100,000 numbers", dear("a size of many numbers", 100_000, 25), WORK),
    Case(
        "a size that is no number", program(name("torch", "Size"), b"N\x85\x85R"), "damaged pickle.*a size is no whole"
    ),
    Case("a key of 100,000 items, 50 times", dear("a key of many items", 100_000, 50), "damaged pickle.*up to 8"),
    Case("a key of texts of megabytes", dear("a key of long texts", 3_000_000, 50), "damaged.*more than 1000 letters"),
    Case("50,000 numbers as keys, which may collide", dear("numbers as keys", 50_000, 1), WORK),
    Case("100,000 arguments, 25 times", dear("many arguments", 100_000, 25), WORK),
    Case("100,000 sizes, 12 times", dear("many sizes", 100_000, 12), WORK),
    Case("a storage of a name of megabytes", dear("a storage of a long name", 3_000_000, 50), "storage is described"),
    Case("a name of megabytes in many tables", dear("names of many tables", 10_000_000, 50), "names of more than 500"),
    Case("a pickle of 3 GB of holes", full_of_holes, "a pickle of 3221225472 bytes, more than 20000000"),
    Case("seven bytes as float32", untyped, "'a' are 7 bytes, no whole count of F32"),
    Case("nothing on the stack", program(b"R"), "damaged pickle.*its stack is empty"),
    Case("no end", archived(WHOLE | {"x/data.pkl": b"\x80\x02}"}), "damaged pickle"),
    Case("a number of 20 MB", program(b"\x8b", struct.pack("<i", 2**24), bytes(100)), "damaged pickle"),
    Case("a text that is cut off", program(b"X\xff\xff\xff\x7f"), "damaged pickle"),
    Case("a bare tensor", pickled(lambda f: torch.ones(1)), "holds no table of tensors but a tensor"),
    Case("a list", pickled(lambda f: [torch.ones(1)]), "holds no table of tensors but list"),
    Case("conjugated numbers", pickled(lambda f: {"a": torch.ones(2, dtype=torch.complex64).conj()}), "conjugated"),
    Case("a tensor's name clears the screen", pickled(lambda f: {"a\x1b[2J": torch.ones(1)}), r"tensor 'a\\x1b\[2J'"),
    Case(
        "two names that are one",
        pickled(lambda f: {"a": {"b": torch.ones(1)}, "a.b": torch.ones(1)}),
        "tensor 'a.b', twice",
    ),
    Case("pickle: NaN", pickled(lambda f: state(f) | {"conv_in.bias": torch.full((8,), torch.nan)}), "holds 8 NaN"),
    Case(
        "pickle: a tensor is missing",
        pickled(lambda f: {k: v for k, v in state(f).items() if k != "conv_in.bias"}),
        "missing conv_in.bias",
    ),
    Case("pickle: nothing in it", pickled(lambda f: collections.OrderedDict()), "UNet: missing"),
]


def double(folder: Path) -> None:
    """Two records of one name, written with another name and renamed byte by byte: zipfile warns, and refuses less."""
    archived(WHOLE | {"x/data.pk1": b"\x80\x02}."})(folder)
    changed(lambda content: content.replace(b"x/data.pk1", b"x/data.pkl"), BIN)(folder)


def spoiled(content: bytes) -> bytes:
    """One bit of the first storage."""
    at = content.index(b"/data/0") + 200
    return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]


# ---------------------------------------------------------------------------------------------------- JSON


def fields(place: str, **changes: object) -> Callable[[Path], None]:
    """Change fields of a JSON file; `...` removes one."""

    def spoil(folder: Path) -> None:
        table = read_json(folder / place) | changes
        (folder / place).write_text(json.dumps({k: v for k, v in table.items() if v is not ...}))

    return spoil


def sharded(names: object) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        (folder / UNET).rename(folder / "unet" / "a.safetensors")
        table = {"weight_map": names}
        (folder / f"{UNET}.index.json").write_text(json.dumps(table))

    return spoil


def twice(folder: Path) -> None:
    (folder / "unet" / "b.safetensors").write_bytes((folder / UNET).read_bytes())
    sharded({"a": "a.safetensors", "b": "b.safetensors"})(folder)


def also(place: str, content: object) -> Callable[[Path], None]:
    return lambda folder: (folder / place).write_text(json.dumps(content)) and None


INDEX, CONFIG, SCHEDULER = "model_index.json", "unet/config.json", "scheduler/scheduler_config.json"
VOCAB, MERGES, TOKENS = "tokenizer/vocab.json", "tokenizer/merges.txt", "tokenizer/tokenizer_config.json"
PLAIN = r"names the shard .*, which is not a plain file name: do not trust this model"
CLASS = r"The configuration of {} names the class {}, and ldm reads {} there: take the model's own file"
KIND = r"The configuration of {} has '{}' = .*, which is of the wrong kind or size"
JSONS = [
    Case("a shard outside", sharded({"a": "../../evil.safetensors"}), PLAIN),
    Case("an absolute shard", sharded({"a": "/etc/evil.safetensors"}), PLAIN),
    Case("a shard of Windows", sharded({"a": "C:\\evil.safetensors"}), PLAIN),
    Case("a shard that clears the screen", sharded({"a": "\x1b[2J.safetensors"}), PLAIN),
    Case("a pickle as a shard", sharded({"a": "model.bin"}), PLAIN),
    Case("a missing shard", sharded({"a": "a.safetensors", "b": "b.safetensors"}), "lacks b.safetensors"),
    Case("a tensor in two shards", twice, "is in both .*a.safetensors and .*b.safetensors: remove the outdated"),
    Case("no shards", sharded({}), "has no table 'weight_map'"),
    Case("shards are numbers", sharded({"a": 1}), "has no table 'weight_map'"),
    Case(
        "a deep index",
        then(sharded({}), put(b'{"weight_map":' + b"[" * 99_999, f"{UNET}.index.json")),
        "not acceptable JSON",
    ),
    Case("model_index is gone", special(lambda p: None, INDEX), "has no model_index.json"),
    Case("model_index is a list", put(b"[]", INDEX), "must hold a JSON object, not a list"),
    Case("model_index is cut off", changed(lambda b: b[:-9], INDEX), "is not valid JSON at line"),
    Case("model_index of 11 MB", put(b" " * 11_000_000, INDEX), "is larger than 10000000 bytes"),
    Case("model_index with NaN", fields(INDEX, x=float("nan")), "NaN is not a JSON number"),
    Case(
        "model_index says a name twice",
        changed(lambda b: b[:-2] + b',"vae":null}', INDEX),
        "the name 'vae' stands twice|not valid",
    ),
    Case("model_index of a million brackets", put(b"[" + b"[]," * 600_000 + b"1]", INDEX), "more than 500000 brackets"),
    Case("model_index not UTF-8", put(b'{"a":"\xff"}', INDEX), "is not UTF-8 text"),
    Case("a component of a stranger's library", fields(INDEX, unet=["evil", "Evil"]), "unet is a .*Evil"),
    Case("a component that clears the screen", fields(INDEX, unet=["evil", "\x1b[2J"]), r"unet is a '?\\x1b\[2J"),
    Case(
        "a component of 5000 letters",
        fields(INDEX, vae=["evil", "E" * 5000]),
        r"vae is a .?EEE.*ldm knows AutoencoderKL",
    ),
    Case("os.system as a component", fields(INDEX, vae=["os", "system"]), "vae is a .*system"),
    Case("a VAE in the UNet's place", fields(INDEX, unet=["diffusers", "AutoencoderKL"]), "unet is a .*AutoencoderKL"),
    Case(
        "a component that ldm doesn't know",
        fields(INDEX, evil=["evil", "Evil"]),
        "a part that ldm doesn't know: 'evil'",
    ),
    Case("a component is gone", fields(INDEX, vae=...), "lacks vae"),
    Case(
        "a VAE's configuration for the UNet",
        lambda f: put((f / "vae/config.json").read_bytes(), CONFIG)(f),
        "The configuration of the UNet",
    ),
    *(
        Case(
            f"the UNet says that it is a {cls}",
            fields(CONFIG, _class_name=cls),
            CLASS.format("the UNet", repr(cls), UNET_2D),
        )
        for cls in ("AutoencoderKL", "UNet3DConditionModel", "FluxTransformer2DModel", 5)
    ),
    Case(
        "the VAE says that it is a small one",
        fields("vae/config.json", _class_name="AutoencoderTiny"),
        CLASS.format("the VAE", "'AutoencoderTiny'", "AutoencoderKL"),
    ),
    *(
        Case(
            f"the text encoder says that it is a {said}",
            fields("text_encoder/config.json", architectures=said),
            CLASS.format("the text encoder", ".*", "CLIPTextModel or CLIPTextModelWithProjection or CLIPModel"),
        )
        for said in (["T5EncoderModel"], {"a": 1}, "T5", ["CLIPTextModel", "CLIPTextModel"])
    ),
    *(
        Case(
            f"a noise level of {said!r}", fields(INDEX, max_noise_level=said), "max_noise_level .*a whole number from 0"
        )
        for said in ("abc", {"a": 1}, 1.5, True, -5, None)
    ),
    *(
        Case(f"an empty prompt of {said!r}", fields(INDEX, force_zeros_for_empty_prompt=said), "it is true or false")
        for said in (1, "yes", None)
    ),
    Case("the UNet's configuration is gone", special(lambda p: None, CONFIG), "config.json does not exist"),
    Case("the UNet's configuration is a pipe", special(os.mkfifo, CONFIG), "is no ordinary file"),
    Case(
        "the UNet's configuration never ends",
        special(lambda p: p.symlink_to("/dev/zero"), CONFIG),
        "is no ordinary file",
    ),
    Case(
        "a field that ldm doesn't know",
        fields(CONFIG, auto_map={"x": "evil.py"}),
        "a field that ldm doesn't know: 'auto_map'",
    ),
    Case(
        "ten million channels",
        fields(CONFIG, block_out_channels=[4, 10_000_000]),
        KIND.format("the UNet", "block_out_channels"),
    ),
    Case("a million channels", fields(CONFIG, block_out_channels=[4, 1_000_000]), "wrong shape"),
    Case("a thousand levels", fields(CONFIG, block_out_channels=[4] * 1000), "must list the widths of 1 to 10 levels"),
    Case("a million layers", fields(CONFIG, layers_per_block=1_000_000), KIND.format("the UNet", "layers_per_block")),
    Case(
        "a million transformers",
        fields(CONFIG, transformer_layers_per_block=10**6),
        KIND.format("the UNet", "transformer_layers_per_block"),
    ),
    Case("many blocks", fields(CONFIG, layers_per_block=30, transformer_layers_per_block=10), "asks for 682 blocks"),
    Case("widths that don't divide", fields(CONFIG, norm_num_groups=7), "the unet makes no network .*divisible"),
    Case(
        "heads that don't divide", fields("text_encoder/config.json", num_attention_heads=3), "the text_encoder makes"
    ),
    Case("no heads", fields(CONFIG, attention_head_dim=[0, 0]), "the unet makes no network"),
    Case(
        "ten million layers of text",
        fields("text_encoder/config.json", num_hidden_layers=10**7),
        KIND.format("the text encoder", "num_hidden_layers"),
    ),
    Case(
        "10^30 words",
        fields("text_encoder/config.json", vocab_size=10**30),
        KIND.format("the text encoder", "vocab_size"),
    ),
    Case(
        "negative channels", fields(CONFIG, block_out_channels=[8, -16]), KIND.format("the UNet", "block_out_channels")
    ),
    Case("channels are a text", fields(CONFIG, block_out_channels="8,16"), "must list the widths"),
    Case("layers are true", fields(CONFIG, layers_per_block=True), KIND.format("the UNet", "layers_per_block")),
    Case(
        "an infinite epsilon",
        changed(lambda b: b.replace(b"1e-05", b"1e999"), CONFIG),
        "1e999 is beyond all numbers",
    ),
    Case("a scheduler of a stranger", fields(SCHEDULER, _class_name="Evil\x1b[2J"), r"names 'Evil\\x1b\[2J'"),
    Case("a billion training steps", fields(SCHEDULER, num_train_timesteps=10**9), "num_train_timesteps"),
    Case("betas are texts", fields(SCHEDULER, beta_start="0.1"), "beta_start"),
    Case("a vocabulary of texts", also(VOCAB, {"a": "b"}), "gives the piece 'a' the id 'b'"),
    Case("an id twice", also(VOCAB, {"a": 1, "b": 1}), "gives one id to several pieces"),
    Case("ids beyond the table", lambda f: fields(VOCAB, evil=10**9)(f), "these parts don't belong together"),
    Case("merges are gone", special(lambda p: None, MERGES), "merges.txt is missing"),
    Case("a merge of three", put(b"#version: 0.2\na b c\n", MERGES), "line 2: 'a b c' isn't two pieces"),
    Case("merges are a pipe", special(os.mkfifo, MERGES), "merges.txt is no ordinary file"),
    Case("merges never end", special(lambda p: p.symlink_to("/dev/zero"), MERGES), "merges.txt is no ordinary"),
    Case("a length that is a text", fields(TOKENS, model_max_length="77"), "model_max_length must be a number"),
    Case(
        "a special token is a number",
        fields("tokenizer/special_tokens_map.json", pad_token=7),
        "a special token is written 7",
    ),
    Case("settings of the model", also("ldm.json", {"steps": "rm -rf"}), "'steps'"),
]


# ---------------------------------------------------------------------------------------------------- pictures


def picture(content: bytes | Callable[[Path], object], ending: str = "png") -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        path = folder / f"given.{ending}"
        path.write_bytes(content) if isinstance(content, bytes) else content(path)
        return path

    return make


def saved(kind: str, size: tuple[int, int] = (32, 32), **options: object) -> bytes:
    file = io.BytesIO()
    Image.effect_noise(size, 50).convert("RGB").save(file, kind, **options)
    return file.getvalue()


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def bomb(width: int, height: int) -> bytes:
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(bytes(5000))) + chunk(b"IEND", b"")


PICTURES = [
    Case("a picture of 900 million pixels", picture(bomb(30_000, 30_000)), "more than 100 million pixels"),
    Case(
        "a picture of 90 million pixels in 100 bytes", picture(bomb(9_000, 10_000)), "bytes can't hold 9000 x 10000 pix"
    ),
    Case("a picture of 2^62 pixels", picture(bomb(2**31 - 1, 2**31 - 1)), "more than 100 million pixels"),
    Case("a picture cut off", picture(saved("PNG")[:-500]), "is damaged or cut off"),
    Case("a photograph cut off", picture(saved("JPEG")[:-500], "jpg"), "is damaged or cut off"),
    Case("WebP cut off", picture(saved("WEBP")[:-500], "webp"), "damaged|no picture that ldm can read"),
    Case("PostScript", picture(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "eps"), "no picture that ldm can"),
    Case("a pickle as a picture", picture(pickle.dumps([1])), "no picture that ldm can read"),
    Case("a picture's size is 0", picture(bomb(0, 5)), "no picture that ldm can|damaged|no pixels"),
    Case("a pipe as a picture", picture(os.mkfifo), "is no ordinary file"),
    Case("a picture that isn't there", picture(lambda p: None), "does not exist: check the path"),
    Case("a web page as a picture", picture(b"<html>"), "no picture that ldm can read"),
]


def told(content: str | None, **others: str) -> bytes:
    """A PNG with text chunks: `ldm`, and others."""
    info = PngInfo()
    for key, value in ({} if content is None else {"ldm": content} | others).items():
        info.add_text(key, value)
    return saved("PNG", pnginfo=info)


def chunks(*extra: bytes) -> bytes:
    whole = saved("PNG")
    return whole[:33] + b"".join(extra) + whole[33:]  # behind IHDR


RERUN = [
    Case("no settings", picture(told(None)), "holds no settings of ldm"),
    Case("settings twice", picture(chunks(chunk(b"tEXt", b"ldm\0{}"), chunk(b"tEXt", b"ldm\0{}"))), "'ldm' twice"),
    Case("settings compressed", picture(chunks(chunk(b"zTXt", b"ldm\0\0" + zlib.compress(b"{}")))), "'ldm' compressed"),
    Case(
        "settings of two million bytes",
        picture(chunks(chunk(b"tEXt", b"ldm\0" + b" " * 2_000_000))),
        "over 1000000 bytes",
    ),
    Case("settings with a wrong check sum", picture(chunks(chunk(b"tEXt", b"ldm\0{}")[:-1] + b"?")), "check sum"),
    Case("settings are no JSON", picture(told("{x}")), "not valid JSON"),
    Case(
        "settings in UTF-16",
        picture(chunks(chunk(b"tEXt", b"ldm\0" + '{"prompt":"a"}'.encode("utf-16-le")))),
        "not valid JSON",
    ),
    Case("settings 100,000 deep", picture(told("[" * 100_000)), "not acceptable JSON"),
    Case("settings are a list", picture(told("[]")), "is a list, not a table"),
    Case("settings lack all", picture(told("{}")), "lack a sound 'prompt'"),
    Case("settings clear the screen", picture(told('{"prompt":["\\u001b[2J"]}')), r"lack a sound 'prompt' \(\['\\x1b"),
    Case("settings cut off", picture(told("{}")[:60]), "is truncated"),
    Case("no PNG", picture(saved("JPEG")), "is not a PNG"),
    Case("a pipe to rerun", picture(os.mkfifo), "is no ordinary file"),
]


# ---------------------------------------------------------------------------------------------------- single files


def single(content: bytes | Callable[[Path], bytes], place: str) -> Callable[[Path], Path]:
    """A file alone, whatever its name says of it."""

    def make(folder: Path) -> Path:
        path = folder.parent / place
        path.write_bytes(content if isinstance(content, bytes) else content(folder))
        return path

    return make


def saved_pickle(make: Callable[[Path], object]) -> Callable[[Path], bytes]:
    def content(folder: Path) -> bytes:
        file = io.BytesIO()
        torch.save(make(folder), file)
        return file.getvalue()

    return content


SINGLE = [
    Case("single: empty", single(b"", "a.safetensors"), r"a\.safetensors is corrupt .*it is empty"),
    Case("single: LFS", single(LFS, "a.ckpt"), r"a\.ckpt is a Git LFS pointer"),
    Case("single: GGUF", single(b"GGUF" + bytes(60), "a.gguf"), "is a GGUF file"),
    Case("single: a pickle", single(saved_pickle(lambda f: {"a": torch.ones(1)}), "a.ckpt"), "is a pickle, a program"),
    Case("single: code", single(saved_pickle(touch), "a.ckpt"), r"this one asks for '(posix|nt)\.system'"),
    Case("single: code in capitals", single(saved_pickle(touch), "a.SAFETENSORS"), "is a pickle, a program"),
    Case("single: nothing known", single(one(), "a.safetensors"), r"a\.safetensors"),
    Case(
        "single: a name of two texts of 4 MB, 50 times",
        single(costly("a name of two long texts", 4_000_000, 50), "a.ckpt"),
        r"this one asks for 'k{80}'\), and is not read",
    ),
    Case("single: the name of no file", lambda f: f.parent / "gone.safetensors", r"no model '.*gone\.safetensors'"),
]
SINGLE_PICKLES = [
    Case("single: code, allowed", single(saved_pickle(touch), "a.ckpt"), r"asks to call '\w+\.system'"),
    Case("single: nothing known, pickled", single(saved_pickle(lambda f: {"a": torch.ones(1)}), "a.pt"), r"a\.pt"),
]


def net(**changes: object) -> Callable[[Path], Path]:
    """A ControlNet's folder for the tiny model: its configuration, changed, and no weights."""

    def make(folder: Path) -> Path:
        unet = read_json(folder / CONFIG)
        table = ControlNetConfig().to_json()
        table |= {name: unet[name] for name in table.keys() & unet.keys()} | {"_class_name": "ControlNetModel"}
        (folder.parent / "net").mkdir()
        (folder.parent / "net" / "config.json").write_text(json.dumps(table | changes))
        return folder.parent / "net"

    return make


CONTROLNETS = [
    Case("a ControlNet without weights", net(), "has no diffusion_pytorch_model.safetensors"),
    Case(
        "a ControlNet whose widths don't divide", net(norm_num_groups=7), "the ControlNet makes no network .*divisible"
    ),
    Case(
        "a ControlNet says that it is a UNet",
        net(_class_name=UNET_2D),
        CLASS.format("the ControlNet", repr(UNET_2D), "ControlNetModel"),
    ),
    Case("a ControlNet for other levels", net(block_out_channels=[8, 24]), "was made for another base"),
    Case(
        "a ControlNet of a million layers",
        net(layers_per_block=10**6),
        KIND.format("the ControlNet", "layers_per_block"),
    ),
    Case("a whole model as a ControlNet", lambda f: f, "is a whole model, not a ControlNet"),
    Case("a UNet as a ControlNet", lambda f: f / "unet", "The configuration of the ControlNet"),
    Case("a file as a ControlNet", single(one(), "a.safetensors"), r"a\.safetensors"),
    Case("code as a ControlNet", single(saved_pickle(touch), "a.pth"), "this one asks for"),
]
ROADS = {
    "load": SAFETENSORS + NOT_ALLOWED + JSONS + SINGLE,
    "pickle": PICKLES + SINGLE_PICKLES,
    "picture": PICTURES,
    "rerun": RERUN,
    "controlnet": CONTROLNETS,
}
