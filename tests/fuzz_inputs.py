"""Inputs for `fuzz.py`: sound files, and ways to spoil them that know how they are built, beside blind ones."""

import copy
import io
import json
import pickletools
import random
import struct
import zipfile
import zlib
from collections.abc import Callable
from typing import Any

NASTY = (
    None, True, False, -1, 0, 1, 2, 3, 1.5, -0.0, 1e308, 10**6, 2**31, 2**53 + 1, 2**63, 10**30, "", "a", "0", "../x",
    "/dev/zero", "\x1b[2J", "\u202e", "\x00", "x" * 3000, [], {}, [[]], {"a": {}}, [None] * 300, [8] * 40, "float32",
    ["os", "system"], {"content": "a"}, float("nan"), float("inf"), -float("inf"),
)  # fmt: skip
NUMBERS = (
    0, 1, 2, 3, 7, 8, 16, 127, 128, 255, 256, 0x7FFF, 0x8000, 0xFFFF, 2**31 - 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1,
)  # fmt: skip
PROGRAMS = (  # pieces of pickles: calls of anything, and what makes stacks and memories go wrong
    b"cos\nsystem\nX\x01\x00\x00\x00a\x85R", b"cbuiltins\neval\n)R", b"ctorch\nload\n)R", b"ios\nsystem\n",
    b"\x8c\x02os\x8c\x06system\x93)R", b"cargparse\nNamespace\n)\x81}b", b"ccollections\nOrderedDict\n)R",
    b"ctorch._utils\n_rebuild_tensor_v2\n", b"}(X\x01\x00\x00\x00aNu", b"\x8a\x08" + b"\xff" * 7 + b"\x7f",
    b")" + b"\x85" * 200, b"]" + b"]a" * 200, b"r\xff\xff\xff\x7f", b"\x94" * 50, b"\x82\x01", b"q\x00", b"h\x00",
    b"(", b"0", b"t", b"R", b"b", b"Q", b"s", b"u", b"e", b"1", b"2", b".",
)  # fmt: skip
Rng = random.Random
Mutator = Callable[[Rng, bytes], bytes]


def blind(rng: Rng, content: bytes) -> bytes:
    """Flipped bits, numbers at odd limits, pieces lost, doubled, moved and made up."""
    spoiled = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 2, 4, 16))):
        at = rng.randrange(len(spoiled) + 1)
        size = rng.choice((1, 2, 4, 8, 30, 300))
        way = rng.randrange(8)
        if way < 3 and spoiled:
            spoiled[rng.randrange(len(spoiled))] ^= 1 << rng.randrange(8)
        elif way == 3:
            width, order = rng.choice((1, 2, 4, 8)), rng.choice(("little", "big"))
            spoiled[at : at + width] = (rng.choice(NUMBERS) % 256**width).to_bytes(width, order)
        elif way == 4:
            del spoiled[at : at + size]
        elif way == 5:
            spoiled[at:at] = spoiled[at : at + size]
        elif way == 6:
            spoiled[at:at] = rng.randbytes(size)
        else:
            del spoiled[at:]
    return bytes(spoiled)


# ---------------------------------------------------------------------------------------------------- JSON


def places(tree: Any) -> list[tuple[Any, Any]]:
    """(container, key or index) of every value."""
    found, waiting = [], [tree]
    while waiting:
        node = waiting.pop()
        keys = list(node) if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ()
        found += [(node, key) for key in keys]
        waiting += [node[key] for key in keys]
    return found


def places_of(node: Any) -> list[tuple[Any, Any]]:
    """(key or index, value) of a container, which may have lost some."""
    return list(node.items()) if isinstance(node, dict) else list(enumerate(node))


def spoil_tree(rng: Rng, tree: Any) -> Any:
    tree = copy.deepcopy(tree)
    for _ in range(rng.choice((1, 1, 2, 3))):
        spots = places(tree)
        if not spots:
            return rng.choice(NASTY)
        # Of a table with thousands of entries most are alike: half of the time one of the first is taken.
        node, key = rng.choice(spots[:60] if rng.random() < 0.5 else spots)
        way = rng.randrange(8)
        if way < 3:
            node[key] = copy.deepcopy(rng.choice(NASTY))
        elif way == 3:
            del node[key]
        elif way == 4:
            other, there = rng.choice(spots)
            node[key] = copy.deepcopy(dict(places_of(other)).get(there))
        elif way == 5 and type(node[key]) in (int, float):
            node[key] = rng.choice((-node[key], node[key] * 2, node[key] + 1, node[key] / 2, str(node[key])))
        elif way == 6 and isinstance(node, dict):
            node[rng.choice(("x", "", "__metadata__", "\x1b[2J", "_class_name", f"{key} "))] = node.pop(key)
        else:
            node[key] = [node[key]] * rng.choice((1, 2, 50))
    return tree


def spoil_text(rng: Rng, text: str) -> str:
    """What a JSON library would not write."""
    way = rng.randrange(6)
    if way == 0:
        return text.replace("}", ',"a":1,"a":2}', 1) if len(text) > 2 else text
    if way == 1:
        return text.replace(":", ":" + "[" * rng.choice((5, 500, 50_000)), 1)
    if way == 2:
        return text.replace("1", rng.choice(("1e999", "NaN", "-Infinity", "01", "1" * 5000)), 1)
    if way == 3:
        return rng.choice(("\ufeff", " ", "\x00", "//\n")) + text
    return text


def as_json(rng: Rng, content: bytes) -> bytes:
    try:
        tree = json.loads(content)
    except (ValueError, RecursionError):  # it is spoiled already
        tree = None
    if tree is None or rng.random() < 0.3:
        return blind(rng, content)
    text = spoil_text(rng, json.dumps(spoil_tree(rng, tree)))
    return text.encode(rng.choice(("utf-8",) * 20 + ("utf-16", "utf-32-le")), "surrogatepass")


def as_lines(rng: Rng, content: bytes) -> bytes:
    """merges.txt: lines lost, doubled, moved, changed."""
    lines = content.split(b"\n")
    for _ in range(rng.choice((1, 2, 5))):
        at = rng.randrange(len(lines))
        lines[at] = rng.choice((b"", b"a", b"a b c", b"\xff \xff", b" ", b"a\r", rng.choice(lines), lines[at] * 3))
        if rng.random() < 0.2:
            del lines[at + 1 :]
    return blind(rng, b"\n".join(lines)) if rng.random() < 0.3 else b"\n".join(lines)


# ---------------------------------------------------------------------------------------------------- weights


def as_safetensors(rng: Rng, content: bytes) -> bytes:
    length = struct.unpack("<Q", content[:8])[0]
    if rng.random() < 0.3:  # where the header is, not in the numbers, which may be anything
        return blind(rng, content[: 8 + length]) + content[8 + length :]
    text = spoil_text(rng, json.dumps(spoil_tree(rng, json.loads(content[8 : 8 + length])))).encode()
    data = content[8 + length :]
    if rng.random() < 0.2:
        data = data[: rng.randrange(len(data) + 1)] + rng.randbytes(rng.randrange(20))
    said = len(text) if rng.random() < 0.9 else rng.choice(NUMBERS)
    return struct.pack("<Q", said) + text + data


def as_own(rng: Rng, content: bytes) -> bytes:
    """A single file of ldm's: the configurations in its metadata are JSON within JSON."""
    if rng.random() < 0.4:
        return as_safetensors(rng, content)
    length = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + length])
    inner = as_json(rng, header["__metadata__"]["ldm.config"].encode())
    header["__metadata__"]["ldm.config"] = inner.decode(errors="replace")
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + content[8 + length :]


def opcodes(program: bytes) -> list[bytes]:
    starts = [place for _, _, place in pickletools.genops(program)]
    return [program[a:b] for a, b in zip(starts, [*starts[1:], len(program)], strict=True)]


def spoil_program(rng: Rng, program: bytes) -> bytes:
    steps = opcodes(program)
    for _ in range(rng.choice((1, 1, 2, 4, 8))):
        at, way = rng.randrange(len(steps)), rng.randrange(6)
        if way == 0 and len(steps) > 1:
            del steps[at]
        elif way == 1:
            steps.insert(at, rng.choice(steps))
        elif way == 2:
            steps.insert(at, rng.choice(PROGRAMS))
        elif way == 3:
            steps[at] = rng.choice(PROGRAMS)
        elif way == 4:
            other = rng.randrange(len(steps))
            steps[at], steps[other] = steps[other], steps[at]
        else:
            steps[at] = steps[at][:1] + blind(rng, steps[at][1:])
    return b"".join(steps)


def as_checkpoint(rng: Rng, content: bytes) -> bytes:
    """torch's zip: bits of the archive, or a spoiled program in a sound archive."""
    if rng.random() < 0.35:
        return blind(rng, content)
    with zipfile.ZipFile(io.BytesIO(content)) as source:
        records = {name: source.read(name) for name in source.namelist()}
    way = rng.randrange(10)
    name = rng.choice(list(records))
    if way == 0:
        records[rng.choice(("x", "/x", "../x", "x/../y", f"{name}/", f"{name} "))] = records.pop(name)
    elif way == 1:
        records[name] = blind(rng, records[name])
    program = next((each for each in records if each.endswith("data.pkl")), None)
    if way > 1 and program:
        records[program] = spoil_program(rng, records[program])
    spoiled = archive(records, zipfile.ZIP_DEFLATED if rng.random() < 0.03 else zipfile.ZIP_STORED)
    return blind(rng, spoiled) if rng.random() < 0.1 else spoiled


def archive(records: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as target:
        for name, record in records.items():
            target.writestr(zipfile.ZipInfo(name), record, method)  # of 1980: no time stands in it
    return file.getvalue()


# Programs that are small, sound and dear: what is long is made once, and asked for again and again. n: how long it is.
def text(letters: int) -> bytes:
    return b"X" + struct.pack("<I", letters) + b"k" * letters


def whole(number: int) -> bytes:
    return b"J" + struct.pack("<i", number)


def named(name: bytes) -> bytes:
    return b"c%s\nq\x00" % name.replace(b" ", b"\n")


def rows(item: bytes, n: int) -> bytes:
    return b"(" + item * n + b"tq\x01"


SHAPE = b"(h\x02K\x00h\x01h\x01\x89NtR"
STORED = b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\n%sX\x03\x00\x00\x00cpuK\x04tQ"
COSTLY: dict[str, Callable[[int, int], bytes]] = {
    "tables of many pairs": lambda n, times: (
        named(b"collections OrderedDict") + b"]("
        + b"".join(b"X\x06\x00\x00\x00%06dN\x86" % i for i in range(n)) + b"e\x85q\x01" + b"h\x00h\x01R0" * times
    ),
    "an object of a long name": lambda n, times: (
        b"X\x09\x00\x00\x00omegaconf" + text(n) + b"\x93q\x00" + b"h\x00)R" * times
    ),
    "a size that is a text": lambda n, times: named(b"torch Size") + text(n) + b"\x85q\x01" + b"h\x00h\x01R" * times,
    "a size of many numbers": lambda n, times: (
        named(b"torch Size") + rows(b"K\x01", n) + b"h\x01\x85q\x01" + b"h\x00h\x01R" * times
    ),
    "a key of many items": lambda n, times: rows(b"N", n) + b"}h\x01Ns0" * times,
    "a key of long texts": lambda n, times: text(n) + b"q\x00h\x00\x86q\x01" + b"}h\x01Ns0" * times,
    "numbers as keys": lambda n, times: b"}(" + b"".join(whole(i) + b"N" for i in range(n)) + b"u",
    "many arguments": lambda n, times: (
        named(b"argparse Namespace") + rows(b"h\x00", n) + b"h\x00h\x01R" * times
    ),
    "many sizes": lambda n, times: (
        STORED % b"X\x01\x00\x00\x000" + b"q\x02" + named(b"torch._utils _rebuild_tensor_v2") + rows(b"K\x01", n)
        + (b"h\x00" + SHAPE) * times
    ),
    "a storage of a long name": lambda n, times: text(n) + b"q\x00" + STORED % b"h\x00" * times,
    "a name of two long texts": lambda n, times: text(n) + text(n) + b"q\x00" + b"\x93h\x00h\x00" * times,
    "names of many tables": lambda n, times: (
        text(n) + b"q\x00}h\x00Nsq\x01}(" + b"".join(b"X\x06\x00\x00\x00%06dh\x01" % i for i in range(times)) + b"u."
    ),
}  # fmt: skip


def costly(which: str, n: int, times: int) -> bytes:
    """A checkpoint of one such program."""
    return archive({"x/data.pkl": b"\x80\x02" + COSTLY[which](n, times) + b"}."})


def as_costly(rng: Rng, _: bytes) -> bytes:
    """Of any size, up to some megabytes."""
    which = rng.choice(list(COSTLY))
    n = int(10 ** rng.uniform(0, 6.5 if "long" in which else 5))
    return costly(which, n, int(10 ** rng.uniform(0, 4.5)))


def as_costly_text(rng: Rng, _: bytes) -> bytes:
    """The same of JSON: as a header, and alone."""
    n = int(10 ** rng.uniform(0, 5.3))
    names = [f'"{i}":0' for i in range(n)]
    start, end, inner = rng.choice((
        ("{", "}", ",".join(names)), ("{", "}", ",".join([*names, names[-1]])), ("", "", "[" * n),
        ('{"a":[', "]}", ",".join(["1e1"] * n)), ('{"a":', "}", "1" * n), ('{"a":"', '"}', "\\u0041" * n),
        ('{"a":[', "]}", ",".join(["{}"] * n)),
    ))  # fmt: skip
    say = start + inner + end
    return struct.pack("<Q", len(say)) + say.encode() if rng.random() < 0.7 else say.encode()


def as_any_weights(rng: Rng, content: bytes) -> bytes:
    return (as_checkpoint if content.startswith(b"PK") else as_own)(rng, content)


# ---------------------------------------------------------------------------------------------------- pictures


def as_png(rng: Rng, content: bytes) -> bytes:
    """Chunks lost, doubled, moved and changed, with their check sums made right, so that what is behind is reached."""
    if rng.random() < 0.25:
        return blind(rng, content)
    chunks, at = [], 8
    while at + 8 <= len(content):
        length, kind = struct.unpack(">I4s", content[at : at + 8])
        chunks.append((kind, content[at + 8 : at + 8 + length]))
        at += 12 + length
    for _ in range(rng.choice((1, 1, 2, 4))):
        at = rng.randrange(len(chunks))
        kind, data = chunks[at]
        way = rng.randrange(6)
        if way < 3:
            chunks[at] = kind, as_json_chunk(rng, data) if data.startswith(b"ldm\0") else blind(rng, data)
        elif way == 3 and len(chunks) > 1:
            del chunks[at]
        elif way == 4:
            chunks.insert(at, rng.choice(chunks))
        else:
            kinds = (b"tEXt", b"zTXt", b"iTXt", b"PLTE", b"tRNS", b"IDAT", b"acTL", b"fcTL", b"fdAT", b"eXIf", b"iCCP")
            text = b"ldm\0\0" + zlib.compress(b"{}" * 1000)
            chunks.insert(at, (rng.choice(kinds), rng.choice((b"", data, text, rng.randbytes(30)))))
    return content[:8] + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )


def as_json_chunk(rng: Rng, data: bytes) -> bytes:
    return b"ldm\0" + as_json(rng, data[4:])
