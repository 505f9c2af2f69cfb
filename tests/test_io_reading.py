"""Weight files are found, and their headers checked, strictly: faults, hostile files, every error message."""

import struct

import pytest
import safetensors.torch
import torch

from ldm.errors import LDMError
from ldm.io.folders import find_weights, write_json
from ldm.io.weights import read_header, read_tensors

STEM = "diffusion_pytorch_model"
SOME = {"a": torch.randn(3, 4), "b": torch.randn(3).half(), "ids": torch.arange(5)}


def save_file(path, tensors):
    path.write_bytes(safetensors.torch.save(tensors))
    return path


def raw_safetensors(header: str | bytes, data: bytes = b"") -> bytes:
    text = header.encode() if isinstance(header, str) else header
    return struct.pack("<Q", len(text)) + text + data


# ---------------------------------------------------------------------------------------------------- finding weights


def touch(folder, *names):
    for name in names:
        (folder / name).write_bytes(b"")


def put_index(folder, names, name=f"{STEM}.safetensors.index.json"):
    write_json(folder / name, {"metadata": {}, "weight_map": {f"key{i}": n for i, n in enumerate(names)}})


@pytest.mark.parametrize(
    "present, variant, chosen, says",
    [
        (["S.safetensors"], None, "S.safetensors", 0),
        (["S.safetensors", "S.fp16.safetensors"], None, "S.safetensors", 0),
        (["S.safetensors", "S.fp16.safetensors"], "fp16", "S.fp16.safetensors", 0),
        (["S.safetensors"], "fp16", "S.safetensors", 1),
        (["S.fp16.safetensors"], None, "S.fp16.safetensors", 1),
        (["S.bf16.safetensors"], "fp16", "S.bf16.safetensors", 1),
        (["S.safetensors", "S.non_ema.safetensors", "S.bin", "S_x.safetensors"], None, "S.safetensors", 0),
    ],
)
def test_find_one_file(tmp_path, present, variant, chosen, says):
    touch(tmp_path, *(name.replace("S", STEM) for name in present))
    lines = []
    assert find_weights(tmp_path, STEM, variant, say=lines.append) == [tmp_path / chosen.replace("S", STEM)]
    assert len(lines) == says and all(chosen.replace("S", STEM) in line for line in lines)


def test_a_fallback_is_told_on_stderr(tmp_path, capsys):
    touch(tmp_path, "model.fp16.safetensors")
    find_weights(tmp_path, "model")
    assert capsys.readouterr() == ("", f"{tmp_path}: no weights without a variant; reading model.fp16.safetensors.\n")
    find_weights(str(tmp_path), "model", "bf16")
    assert "no variant 'bf16'; reading model.fp16.safetensors." in capsys.readouterr().err


@pytest.mark.parametrize(
    "present, variant, message",
    [
        ([], None, r"has no S\.safetensors: check the path"),
        (["other.safetensors"], None, r"has no S\.safetensors; it holds other\.safetensors: check"),
        (["S.bin"], None, r"holds only a pickle \(S\.bin\).*can run any code.*--allow-pickle"),
        (["S-00001-of-00002.safetensors"], None, r"holds shards .*without S\.safetensors\.index\.json: download it"),
        (["S.fp16.safetensors", "S.bf16.safetensors"], None, r"several variants \(S\.bf16.*, S\.fp16.*\): name one"),
        (["S.safetensors", "S.safetensors.index.json"], None, r"holds both .* and .*: remove the outdated one"),
    ],
)
def test_find_says_what_is_wrong(tmp_path, present, variant, message):
    touch(tmp_path, *(name.replace("S", STEM) for name in present))
    with pytest.raises(LDMError, match=message.replace("S", STEM)):
        find_weights(tmp_path, STEM, variant)
    with pytest.raises(LDMError, match=r"There is no folder"):
        find_weights(tmp_path / "no", STEM)


TRAVERSALS = ["../evil.safetensors", "/etc/evil.safetensors", "a/b.safetensors", "..", "", "C:\\evil.safetensors"]
TRAVERSALS += ["..\\evil.safetensors", "C:evil.safetensors", "a\0.safetensors", "model.bin", ".safetensors", "a b.ckpt"]


@pytest.mark.parametrize("name", TRAVERSALS)
def test_an_index_names_files_of_its_folder_only(tmp_path, name):
    (tmp_path / "model").mkdir()
    touch(tmp_path, "evil.safetensors")
    put_index(tmp_path / "model", [name])
    with pytest.raises(LDMError, match=r"not a plain file name: do not trust this model"):
        find_weights(tmp_path / "model", STEM)


def test_a_bad_index(tmp_path):
    put_index(tmp_path, ["a.safetensors", "b.safetensors"])
    touch(tmp_path, "a.safetensors")
    with pytest.raises(LDMError, match=rf"lacks b\.safetensors, which {STEM}\.safetensors\.index\.json lists"):
        find_weights(tmp_path, STEM)
    for content in ([], {}, {"weight_map": {}}, {"weight_map": {"a": 1}}, {"weight_map": ["a.safetensors"]}):
        write_json(tmp_path / f"{STEM}.safetensors.index.json", content)
        with pytest.raises(LDMError, match=r"has no table 'weight_map'"):
            find_weights(tmp_path, STEM)


# ---------------------------------------------------------------------------------------------------- reading weights


def test_every_truncation_is_noticed(tmp_path):
    whole = safetensors.torch.save(SOME)
    path = tmp_path / "cut.safetensors"
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(LDMError, match=r"cut\.safetensors is corrupt or truncated.*download or copy it again"):
            list(read_tensors(path))
    path.write_bytes(whole + b"\0")
    with pytest.raises(LDMError, match=r"corrupt or truncated"):
        list(read_tensors(path))


def test_every_bit_of_the_length_is_noticed(tmp_path):
    whole = bytearray(safetensors.torch.save(SOME))
    path = tmp_path / "flipped.safetensors"
    for bit in range(64):
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        with pytest.raises(LDMError, match=r"flipped\.safetensors"):
            list(read_tensors(path))


def line(dtype="F32", shape="[1]", offsets="[0,4]"):
    return f'{{"dtype":"{dtype}","shape":{shape},"data_offsets":{offsets}}}'


BAD_HEADERS = {
    "not JSON": ("{x}   ", "corrupt or truncated"),
    "no object": ("[1,2]", "corrupt or truncated"),
    "negative shape": (f'{{"a":{line(shape="[-1]")}}}', "corrupt or truncated"),
    "float shape": (f'{{"a":{line(shape="[1.0]")}}}', "corrupt or truncated"),
    "overflow": (f'{{"a":{line(shape="[9223372036854775807,9223372036854775807]")}}}', "corrupt or truncated"),
    "overlap": (f'{{"a":{line()},"b":{line()}}}', "corrupt or truncated"),
    "hole": (f'{{"a":{line(offsets="[1,5]")}}}', "corrupt or truncated"),
    "past the end": (f'{{"a":{line(shape="[2]", offsets="[0,8]")}}}', "corrupt or truncated"),
    "bad type": (f'{{"a":{line("F99")}}}', "corrupt or truncated"),
    "deep": ('{"a":' + "[" * 100_000, "corrupt or truncated"),
    "metadata": (f'{{"__metadata__":{{"a":1}},"a":{line()}}}', "corrupt or truncated"),
    "twice": (f'{{"a":{line()},"a":{line()}}}', "the name 'a' stands twice"),
    "name": (f'{{"a\\u001b[2J":{line()}}}', r"impossible tensor 'a\\x1b\[2J': do not trust"),
    "right to left": (f'{{"a\u202e":{line()}}}', "impossible tensor"),
    "rank": (f'{{"a":{line(shape=str([1] * 5000))}}}', "impossible tensor 'a'"),
}


@pytest.mark.parametrize("case", BAD_HEADERS)
def test_bad_headers(tmp_path, case):
    header, message = BAD_HEADERS[case]
    (tmp_path / "a.safetensors").write_bytes(raw_safetensors(header, bytes(4)))
    with pytest.raises(LDMError, match=rf"a\.safetensors.*{message}"):
        list(read_tensors(tmp_path / "a.safetensors"))


def test_a_header_that_is_too_large(tmp_path):
    path = tmp_path / "a.safetensors"
    lines = (f'"{i}":{line(shape="[0]", offsets="[0,0]")}' for i in range(20_001))
    path.write_bytes(raw_safetensors("{" + ",".join(lines) + "}"))
    with pytest.raises(LDMError, match=r"declares 20001 tensors, more than 20000"):
        read_header(path)
    path.write_bytes(raw_safetensors("{" + " " * 20_000_000 + "}"))
    with pytest.raises(LDMError, match=r"corrupt or truncated, or not a safetensors file"):
        read_header(path)


@pytest.mark.parametrize(
    "content, message",
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n", "Git LFS pointer.*git lfs pull"),
        (b"PK\x03\x04" + bytes(50), "is a pickle in spite of its name"),
        (b"\x80\x02}q\x00." + bytes(50), "is a pickle in spite of its name"),
        (b"\n<!DOCTYPE html><html>", "is a web page, not weights"),
        (b"", "corrupt or truncated"),
        (bytes(100), "corrupt or truncated"),
    ],
)
def test_what_is_no_safetensors_file(tmp_path, content, message):
    (tmp_path / "a.safetensors").write_bytes(content)
    with pytest.raises(LDMError, match=message):
        list(read_tensors(tmp_path / "a.safetensors"))


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(LDMError, match=r"a\.safetensors does not exist: check the path"):
        list(read_tensors([tmp_path / "a.safetensors"]))
    with pytest.raises(LDMError, match=r"is a folder, not a file"):
        list(read_tensors(str(tmp_path)))
    with pytest.raises(LDMError, match=r"No weight file was given"):
        list(read_tensors([]))


def test_read_tensors_in_order(tmp_path):
    a = save_file(tmp_path / "a.safetensors", {"y": torch.ones(2), "x": torch.zeros(1)})
    b = save_file(tmp_path / "b.safetensors", {"w": torch.tensor(2.0), "empty": torch.zeros(0, 3)})
    got = list(read_tensors([a, b]))
    assert [(n, p) for n, _, p in got] == [("x", a), ("y", a), ("empty", b), ("w", b)]
    assert got[3][1].shape == () and got[2][1].shape == (0, 3)
