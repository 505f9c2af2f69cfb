"""Checkpoints of torch.save are read as torch reads them, bit for bit, and nothing of them is run."""

import argparse
import collections
import pathlib
import struct
import sys
import types
import warnings
import zipfile

import numpy as np
import pytest
import safetensors.torch
import torch

from ldm.errors import LDMError
from ldm.io.opcodes import names_in
from ldm.io.pickles import Pickled, refused
from ldm.io.weights import WeightFiles, load_weights

TYPES = (
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8,
    torch.uint8, torch.bool, torch.complex64, torch.complex128, torch.uint16, torch.uint32, torch.uint64,
    torch.float8_e4m3fn, torch.float8_e5m2,
)  # fmt: skip
NAMES = (
    "F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "BOOL", "C64", "C128", "U16", "U32", "U64", "F8_E4M3",
    "F8_E5M2",
)  # fmt: skip
WIDE = torch.randn(6, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 10


def views():
    """Windows of one storage, and layouts of every kind that don't overlap."""
    return {
        "whole": WIDE,
        "rows": WIDE[1:3],
        "steps": WIDE[1::2, ::3],
        "turned": WIDE.T,
        "four": WIDE.reshape(2, 3, 4, 2).permute(3, 1, 0, 2),
        "last": torch.randn(2, 4, 3, 3).to(memory_format=torch.channels_last),
        "one": torch.randn(1, 5, 1).expand(1, 5, 1),
        "scalar": torch.tensor(3.0),
        "empty": torch.zeros(0, 3),
        "nothing of it": WIDE[:0],
        "parameter": torch.nn.Parameter(WIDE[2]),
        "tied": WIDE.T,
    }


def same_bits(ours, reference):
    assert (ours.dtype, ours.shape, ours.stride()) == (reference.dtype, reference.shape, reference.stride())
    raw = [
        t.detach().clone(memory_format=torch.contiguous_format).reshape(-1).view(torch.uint8) for t in (ours, reference)
    ]
    return torch.equal(*raw)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_tensors_equal_those_of_torch(tmp_path, protocol):
    state = {str(dtype): WIDE.abs().to(dtype) for dtype in TYPES} | views()
    torch.save(collections.OrderedDict(state), tmp_path / "a.ckpt", pickle_protocol=protocol)
    ours, reference = Pickled(tmp_path / "a.ckpt"), torch.load(tmp_path / "a.ckpt", weights_only=protocol < 4)
    assert list(ours.entries) == list(reference) and not ours.passed_over and not ours.scalars
    for name, tensor in reference.items():
        assert same_bits(ours.read(name), tensor), name
        assert ours.entries[name].shape == tuple(tensor.shape)
    assert [ours.entries[str(dtype)].dtype for dtype in TYPES] == list(NAMES)
    assert reference["whole"].abs().mean() > 1


def test_what_is_beside_the_weights(tmp_path):
    """A checkpoint as Lightning and CompVis write it."""
    net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    content = {
        "state_dict": net.state_dict(),  # an OrderedDict with a _metadata attribute
        "global_step": 875_000,
        "lr": 0.25,
        "pytorch-lightning_version": "1.9",
        "hyper_parameters": argparse.Namespace(a=1, where=pathlib.PurePosixPath("a"), b=np.float64(2.0)),
        "noise": np.arange(3.0),
        "betas": collections.defaultdict(list, {"a": [1]}),
        "optimizer_states": [{"state": {0: {"step": 1, "exp_avg": WIDE}}, "param_groups": [{"betas": (0.9, 0.99)}]}],
        7: {1, 2},
    }
    torch.save(content, tmp_path / "a.ckpt")
    read = Pickled(tmp_path / "a.ckpt")
    assert list(read.entries) == list(net.state_dict())
    assert all(torch.equal(read.read(name), tensor) for name, tensor in net.state_dict().items())
    assert read.scalars == {"global_step": 875_000, "lr": 0.25, "pytorch-lightning_version": "1.9"}
    assert read.passed_over == [
        "'hyper_parameters' (argparse.Namespace)", "'noise' (numpy._core.multiarray._reconstruct)",
        "'betas' (collections.defaultdict)", "'optimizer_states' (list)", "'7' (__builtin__.set)",
    ]  # fmt: skip
    assert "this one asks for" not in str(refused(tmp_path / "a.ckpt"))


def test_what_newer_programs_leave(tmp_path):
    content = {"a": torch.ones(1), "torch": torch.__version__, "x": types.SimpleNamespace(a=1, b=[2])}
    torch.save(content, tmp_path / "a.pt")
    read = Pickled(tmp_path / "a.pt")
    assert list(read.entries) == ["a"]
    assert read.passed_over == ["'torch' (torch.torch_version.TorchVersion)", "'x' (types.SimpleNamespace)"]
    assert "this one asks for" not in str(refused(tmp_path / "a.pt"))
    for place in ("pathlib", "pathlib._local"):  # Python 3.13 has them in the second
        program = b"\x80\x02}X\x01\x00\x00\x00pc%s\nPosixPath\nX\x01\x00\x00\x00a\x85Rs." % place.encode()
        with zipfile.ZipFile(tmp_path / "b.pt", "w") as archive:
            archive.writestr("x/data.pkl", program)
        assert Pickled(tmp_path / "b.pt").passed_over == [f"'p' ({place}.PosixPath)"]


def test_large_checkpoints_are_no_work_too_great(tmp_path):
    """A network's weights, their averages and the state of its training, whose tables have numbers as keys."""
    one = torch.ones(1)
    state = {f"model.diffusion_model.{i}.weight": one for i in range(2000)}
    optimizer = {"state": {i: {"step": one, "exp_avg": one, "exp_avg_sq": one} for i in range(2000)}}
    sizes = collections.OrderedDict((f"size {i}", torch.Size([1, 2, 3])) for i in range(2000))
    pairs = {(i, "a", 2.0): None for i in range(2000)}
    content = {"state_dict": state, "optimizer_states": [optimizer], "sizes": sizes, "pairs": pairs}
    torch.save(content, tmp_path / "a.ckpt")
    read = Pickled(tmp_path / "a.ckpt")
    assert list(read.entries) == list(state) and len(read.passed_over) == 3


@pytest.mark.parametrize(
    "names", [("state_dict",), ("model",), ("state_dict", "params_ema"), ("module", "model", "params")]
)
def test_wrapped_weights_are_found(tmp_path, names):
    content = {"a": {"b": torch.ones(2), 1: torch.zeros(1)}, "c": torch.ones(3)}
    for name in reversed(names):
        content = {name: content, "step": 3}
    torch.save(content, tmp_path / "a.pt")
    read = Pickled(tmp_path / "a.pt")
    assert list(read.entries) == ["a.b", "a.1", "c"] and read.scalars == {"step": 3}


def test_a_model_that_is_called_model_stays_whole(tmp_path):
    """Beside tensors "model" is a part like any other; "state_dict" never is."""
    torch.save({"model": {"a": torch.ones(1)}, "b": torch.ones(2)}, tmp_path / "a.pt")
    assert list(Pickled(tmp_path / "a.pt").entries) == ["model.a", "b"]
    torch.save({"state_dict": {"a": torch.ones(1)}, "b": torch.ones(2)}, tmp_path / "a.pt")
    read = Pickled(tmp_path / "a.pt")
    assert list(read.entries) == ["a"] and read.passed_over == ["'b' (a tensor)"]


def test_other_writers_archives(tmp_path):
    """Names, alignment and 64-bit fields as other programs have them."""
    torch.save({"a": WIDE, "b": torch.ones(3)}, tmp_path / "a.pt")
    with zipfile.ZipFile(tmp_path / "a.pt") as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(tmp_path / "b.pt", "w") as archive:
        for name, content in records.items():
            with archive.open(zipfile.ZipInfo(name.replace("a/", "x y/", 1)), "w", force_zip64=True) as file:
                file.write(content)
    starts = [record.start % 8 for record in Pickled(tmp_path / "b.pt")._archive.records.values()]
    assert any(starts)  # not aligned, as torch would have it
    assert torch.equal(Pickled(tmp_path / "b.pt").read("a"), WIDE)


def test_archives_beyond_32_bits(tmp_path, monkeypatch):
    """The offsets of files over 4 GB stand elsewhere; zipfile is told that 100 bytes are as many."""
    torch.save({"a": WIDE, "b": torch.ones(3)}, tmp_path / "a.pt")
    with zipfile.ZipFile(tmp_path / "a.pt") as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 100)
    monkeypatch.setattr(zipfile, "ZIP_FILECOUNT_LIMIT", 2)
    with zipfile.ZipFile(tmp_path / "b.pt", "w") as archive:
        for name, content in records.items():
            archive.writestr(name, content)
    content = (tmp_path / "b.pt").read_bytes()
    assert content.count(struct.pack("<I", 2**32 - 1)) > 4 and b"PK\x06\x06" in content
    assert torch.equal(Pickled(tmp_path / "b.pt").read("a"), WIDE)


def test_windows_do_not_change_the_file(tmp_path):
    torch.save({"a": torch.ones(100)}, tmp_path / "a.pt")
    before = (tmp_path / "a.pt").read_bytes()
    Pickled(tmp_path / "a.pt").read("a").zero_()
    assert (tmp_path / "a.pt").read_bytes() == before
    assert torch.equal(Pickled(tmp_path / "a.pt").read("a"), torch.ones(100))


def test_weights_for_a_model_whatever_the_name(tmp_path):
    state = torch.nn.Linear(3, 2).state_dict()
    for name in ("a.ckpt", "a.bin", "a.safetensors"):
        torch.save({"state_dict": state}, tmp_path / name)
        with pytest.raises(LDMError, match=r"is a pickle.*--allow-pickle"):
            WeightFiles(tmp_path / name)
        with torch.device("meta"):
            model = torch.nn.Linear(3, 2)
        load_weights(model, WeightFiles(tmp_path / name, allow_pickle=True))
        assert torch.equal(model.weight, state["weight"])


def test_safetensors_under_a_pickle_s_name(tmp_path):
    state = {"a": torch.ones(2), "b" * 400: torch.zeros(3)}
    safetensors.torch.save_file(state, tmp_path / "a.ckpt")
    files = WeightFiles(tmp_path / "a.ckpt")
    assert all(torch.equal(files.read(name), tensor) for name, tensor in state.items())


@pytest.mark.parametrize("start", [b"PK", b"\x80\x02", b"\x80\x04"])
def test_a_header_whose_length_looks_like_a_pickle(tmp_path, start):
    """The length is the first thing in a safetensors file: 19,280 bytes are written "PK"."""
    state = {"a": torch.ones(2)}
    content = safetensors.torch.save(state)
    length = struct.unpack("<Q", content[:8])[0]
    wanted = int.from_bytes(start, "little")
    header = content[8 : 8 + length] + b" " * (wanted - length)
    (tmp_path / "a.safetensors").write_bytes(struct.pack("<Q", wanted) + header + content[8 + length :])
    assert (tmp_path / "a.safetensors").read_bytes().startswith(start)
    assert torch.equal(WeightFiles(tmp_path / "a.safetensors").read("a"), state["a"])


def test_every_truncation_and_every_flipped_bit_is_noticed(tmp_path):
    """Of the numbers and the pickle; the bytes between records may be anything."""
    torch.save({"a": torch.arange(20.0)}, tmp_path / "a.pt")
    whole = (tmp_path / "a.pt").read_bytes()
    archive = Pickled(tmp_path / "a.pt")._archive
    for length in range(len(whole)):
        (tmp_path / "b.pt").write_bytes(whole[:length])
        with pytest.raises(LDMError, match=r"b\.pt is (no sound checkpoint|a bare pickle)|cut"):
            Pickled(tmp_path / "b.pt")
    places = [archive.records[f"a/{name}"] for name in ("data.pkl", "data/0")]
    for at in [place.start + i for place in places for i in range(place.length)]:
        (tmp_path / "b.pt").write_bytes(whole[:at] + bytes([whole[at] ^ 1 << at % 8]) + whole[at + 1 :])
        with pytest.raises(LDMError, match="the check sum of"):
            Pickled(tmp_path / "b.pt").read("a")


def test_nothing_is_imported_that_a_pickle_names(tmp_path):
    (tmp_path / "evil_module.py").write_text("raise SystemExit('executed')")
    sys.path.insert(0, str(tmp_path))
    try:
        program = b"\x80\x02}X\x01\x00\x00\x00acevil_module\nEvil\ns."
        with zipfile.ZipFile(tmp_path / "a.pt", "w") as archive:
            archive.writestr("x/data.pkl", program)
        read = Pickled(tmp_path / "a.pt")
    finally:
        sys.path.remove(str(tmp_path))
    assert read.passed_over == ["'a' (evil_module.Evil)"] and "evil_module" not in sys.modules
    assert "this one asks for 'evil_module.Evil'" in str(refused(tmp_path / "a.pt"))


@pytest.mark.parametrize("opcode", [b"c", b"\x93"])
def test_a_refused_pickle_names_what_it_asks_for(tmp_path, opcode):
    texts = b"\x8c\x02os\x94\x8c\x06system\x94"
    asks = b"cos\nsystem\n" if opcode == b"c" else texts + b"00\x8c\x01xh\x00h\x01\x93"  # by name, or out of its memory
    with zipfile.ZipFile(tmp_path / "a.pt", "w") as archive:
        archive.writestr("x/data.pkl", b"\x80\x04" + asks + b"X\x01\x00\x00\x00a\x85R.")
    assert "(this one asks for 'os.system')" in str(refused(tmp_path / "a.pt"))
    with pytest.raises(LDMError, match=r"asks to call 'os.system', which is no part of weights; nothing was run"):
        Pickled(tmp_path / "a.pt")


def test_the_first_hundred_names_are_told_and_counted(tmp_path):
    """Each once, and the first letters of it."""
    program = b"\x80\x02" + b"".join(b"cevil\nE%d\n0" % (i // 2) for i in range(1000))
    with zipfile.ZipFile(tmp_path / "a.pt", "w") as archive:
        archive.writestr("x/data.pkl", program + b"}.")
    said = str(refused(tmp_path / "a.pt"))
    assert "(this one asks for 'evil.E0', 'evil.E1', 'evil.E2', 'evil.E3', 'evil.E4' and 95 more)" in said
    assert names_in(b"c" + b"m" * 5000 + b"\n" + b"n" * 5000 + b"\n.") == [f"{'m' * 1000}.{'n' * 1000}"]


def test_no_warnings(tmp_path):
    """Of buffers that can't be written, for one."""
    torch.save({"a": WIDE}, tmp_path / "a.pt")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Pickled(tmp_path / "a.pt").read("a").clone()
