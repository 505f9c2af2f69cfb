"""Weights go into models and files unchanged or not at all; diffusers and transformers read the same numbers."""

from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

from ldm.errors import LDMError
from ldm.io.folders import find_weights
from ldm.io.weights import _cast, load_weights, read_tensors, save_weights

STEM = "diffusion_pytorch_model"


class Tiny(nn.Module):
    """Two float parameters, one integer buffer."""

    def __init__(self, width=3):
        super().__init__()
        self.conv_in = nn.Conv2d(4, width, 1)
        self.register_buffer("ids", torch.arange(5))


def tiny_state(dtype=torch.float32):
    g = torch.Generator().manual_seed(0)
    return {
        "conv_in.weight": torch.randn(3, 4, 1, 1, generator=g).to(dtype),
        "conv_in.bias": torch.randn(3, generator=g).to(dtype),
        "ids": torch.tensor([3, 1, 4, 1, 5]),
    }


def meta(model=Tiny, *args):
    with torch.device("meta"):
        return model(*args)


def write(path, tensors, **changes):
    """A safetensors file by the library's hand."""
    safetensors.torch.save_file({k: v for k, v in {**tensors, **changes}.items() if v is not None}, path)
    return path


def no_rubbish(folder):
    return not [p for p in Path(folder).rglob("*") if ".ldm-tmp" in p.name or ".old-" in p.name]


# ---------------------------------------------------------------------------------------------------- loading a model


def test_load(tmp_path):
    state = tiny_state()
    model = load_weights(meta(), write(tmp_path / "a.safetensors", state))
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[name]) and tensor.dtype == state[name].dtype
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    assert isinstance(model.conv_in.weight, nn.Parameter)
    with open(tmp_path / "a.safetensors", "r+b") as file:  # the numbers live in memory, not in the file
        file.truncate(0)
    assert torch.equal(model.conv_in.weight, state["conv_in.weight"])


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_casts_are_those_of_torch(tmp_path, stored, dtype):
    state = tiny_state(stored)
    model = load_weights(meta(), [write(tmp_path / "a.safetensors", state)], dtype)
    for name in ("conv_in.weight", "conv_in.bias"):
        got = model.state_dict()[name]
        assert got.dtype == dtype and torch.equal(got.view(torch.uint8), state[name].to(dtype).view(torch.uint8))
    assert model.ids.dtype == torch.int64


def test_every_float16_number_survives(tmp_path):
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.float16)
    every = every[every.isfinite()]
    state = {"weight": every[None], "bias": torch.zeros(1, dtype=torch.float16)}
    path = write(tmp_path / "a.safetensors", state)
    got = load_weights(meta(nn.Linear, len(every), 1), path).weight[0]
    assert len(every) == 63488 and torch.equal(got.view(torch.int32), every.float().view(torch.int32))


MISFITS = {
    "missing": ({"conv_in.bias": None}, r"does not fit the model Tiny: missing conv_in\.bias\. Check that the weights"),
    "unexpected": ({"extra": torch.ones(1)}, r"Tiny: unexpected extra \(in a\.safetensors\)\. Check"),
    "many": (
        {f"x{i}": torch.ones(1) for i in range(9)},
        r"unexpected x0 \(in a\.safetensors\), .*x4 \(in a\.safetensors\) and 4 more\.",
    ),
    "shape": (
        {"conv_in.weight": torch.ones(3, 9, 1, 1)},
        r"wrong shape: conv_in\.weight in a\.safetensors is \(3, 9, 1, 1\) instead of \(3, 4, 1, 1\)\. "
        r"9 input channels are those of inpainting",
    ),
    "int8": (
        {"conv_in.weight": torch.ones(3, 4, 1, 1, dtype=torch.int8)},
        r"wrong type: conv_in\.weight in a\.safetensors is I8 instead of float32\. Quantised weights are not read",
    ),
    "float8": ({"conv_in.bias": torch.ones(3).to(torch.float8_e4m3fn)}, r"is F8_E4M3 instead of float32\. Quantised"),
    "bool": ({"conv_in.bias": torch.ones(3, dtype=torch.bool)}, r"is BOOL instead of float32\. Check"),
    "int64": ({"conv_in.bias": torch.ones(3, dtype=torch.int64)}, r"is I64 instead of float32\. Check"),
    "int32": ({"ids": torch.ones(5, dtype=torch.int32)}, r"ids in a\.safetensors is I32 instead of int64"),
    "float ids": ({"ids": torch.ones(5)}, r"ids in a\.safetensors is F32 instead of int64"),
    "lora": ({"conv_in.lora_A.weight": torch.ones(1)}, r"This is a LoRA"),
    "single": ({"model.diffusion_model.x": torch.ones(1)}, r"This is a single-file checkpoint"),
    "nan": (
        {"conv_in.bias": torch.tensor([1.0, torch.nan, torch.inf])},
        r"a\.safetensors: 'conv_in\.bias' holds 1 NaN and 1 infinite numbers: take a sound copy",
    ),
}


@pytest.mark.parametrize("case", MISFITS)
def test_what_does_not_fit(tmp_path, case):
    changes, message = MISFITS[case]
    with pytest.raises(LDMError, match=message):
        load_weights(meta(), write(tmp_path / "a.safetensors", tiny_state(), **changes))


def test_every_missing_key_is_noticed(tmp_path):
    for name in tiny_state():
        with pytest.raises(LDMError, match=f"missing {name}"):
            load_weights(meta(), write(tmp_path / "a.safetensors", tiny_state(), **{name: None}))


def test_likely_causes(tmp_path):
    prefixed = {f"text_model.{k}": v for k, v in tiny_state().items()}
    with pytest.raises(LDMError, match=r"The file's names begin with 'text_model.'"):
        load_weights(meta(), write(tmp_path / "a.safetensors", prefixed))
    with pytest.raises(LDMError, match=r"The model's names begin with 'inner.'"):
        load_weights(nn.ModuleDict({"inner": meta()}), write(tmp_path / "a.safetensors", tiny_state()))
    attention = nn.ModuleDict({"attn2": nn.ModuleDict({"to_k": meta(nn.Linear, 768, 8)})})
    attention["attn2"]["to_k"].bias = None
    path = write(tmp_path / "a.safetensors", {"attn2.to_k.weight": torch.ones(8, 2048)})
    with pytest.raises(LDMError, match=r"A context of width 2048 is that of SDXL"):
        load_weights(attention, path)


def test_shards(tmp_path):
    state = tiny_state()
    a = write(tmp_path / "a.safetensors", state, ids=None)
    b = write(tmp_path / "b.safetensors", {"ids": state["ids"]})
    assert torch.equal(load_weights(meta(), [a, b]).conv_in.bias, state["conv_in.bias"])
    with pytest.raises(LDMError, match=rf"^{tmp_path} \(2 files\) does not fit .*missing conv_in\.bias"):
        load_weights(meta(), [write(a, state, ids=None, **{"conv_in.bias": None}), b])
    with pytest.raises(LDMError, match=r"'ids' is in both .*a\.safetensors and .*b\.safetensors: remove the outdated"):
        load_weights(meta(), [write(a, state), b])


def test_rename(tmp_path):
    old = {"position_ids": torch.arange(3), "in.weight": tiny_state()["conv_in.weight"]}
    old |= {k: v for k, v in tiny_state().items() if k != "conv_in.weight"}

    def rename(name):
        return None if name == "position_ids" else name.replace("in.weight", "conv_in.weight")

    model = load_weights(meta(), write(tmp_path / "a.safetensors", old), rename=rename)
    assert torch.equal(model.conv_in.weight, old["in.weight"])
    with pytest.raises(LDMError, match=r"unexpected in.weight .*position_ids|unexpected position_ids .*in.weight"):
        load_weights(meta(), tmp_path / "a.safetensors")


def test_tied_weights_must_be_equal(tmp_path):
    def rename(name):
        return name.replace("conv_out", "conv_in")

    bias = tiny_state()["conv_in.bias"]
    load_weights(meta(), write(tmp_path / "a.safetensors", tiny_state(), **{"conv_out.bias": bias}), rename=rename)
    path = write(tmp_path / "a.safetensors", tiny_state(), **{"conv_out.bias": bias + 1})
    with pytest.raises(LDMError, match=r"'conv_out.bias' is a second 'conv_in.bias', with other numbers"):
        load_weights(meta(), path, rename=rename)


def test_a_number_beyond_the_type(tmp_path):
    path = write(tmp_path / "a.safetensors", tiny_state(), **{"conv_in.bias": torch.tensor([1.0, -1e6, 0.0])})
    load_weights(meta(), path, torch.bfloat16)
    with pytest.raises(LDMError, match=r"'conv_in\.bias' reaches 1e\+06, beyond float16: choose a type of wider range"):
        load_weights(meta(), path, torch.float16)
    with pytest.raises(ValueError, match=r"dtype must be a float type"):
        load_weights(meta(), path, torch.int32)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_one_bad_number_at_any_place_is_noticed(dtype, bad):
    for size, place in [(1, 0), *((67, i) for i in range(67)), (100_003, 100_002), (100_003, 50_000)]:
        tensor = torch.linspace(-1, 1, size).to(dtype)
        _cast(tensor, dtype, "cpu", "all good")
        tensor[place] = bad
        with pytest.raises(LDMError, match=r"it holds . NaN and . infinite numbers"):
            _cast(tensor, dtype, "cpu", "it")


def test_what_is_computed_when_it_is_asked_for_is_laid_out_without_it(tmp_path):
    """By an outline: each tensor is computed once, and the file is that of tensors that are there."""
    tensors, asked = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(4, dtype=torch.int64)}, []

    class Computed(dict):
        def __getitem__(self, name):
            asked.append(name)
            return super().__getitem__(name)

        def items(self):
            return [(name, self[name]) for name in self]

    outline = {name: tensor.to("meta") for name, tensor in tensors.items()}
    save_weights(tensors, tmp_path / "there.safetensors", torch.float16)
    save_weights(Computed(tensors), tmp_path / "computed.safetensors", torch.float16, outline=outline)
    assert sorted(asked) == ["a", "b"]
    assert (tmp_path / "computed.safetensors").read_bytes() == (tmp_path / "there.safetensors").read_bytes()
    with pytest.raises(ValueError, match=r"'a' is \(2, 3\), and its outline \(3, 2\)"):
        save_weights(tensors, tmp_path / "other.safetensors", outline=outline | {"a": torch.empty(3, 2, device="meta")})
    assert not (tmp_path / "other.safetensors").exists()


def test_where_the_system_gives_no_memory_for_a_file(tmp_path, monkeypatch):
    def refused(*args):
        raise RuntimeError("unable to mmap 8796093022208 bytes: Cannot allocate memory (12)")

    save_weights({"a": torch.ones(3)}, tmp_path / "large.safetensors")
    monkeypatch.setattr("ldm.io.headers.safe_open", refused)
    with pytest.raises(LDMError, match=r"Cannot read .*large.safetensors, of \d+ bytes: unable to mmap .* memory"):
        list(read_tensors(tmp_path / "large.safetensors"))


def test_mistakes_of_the_model_are_noticed(tmp_path):
    class Forgetful(Tiny):
        def __init__(self):
            super().__init__()
            self.register_buffer("table", torch.ones(2), persistent=False)

    class Tied(Tiny):
        def __init__(self):
            super().__init__()
            self.again = self.conv_in

    path = write(tmp_path / "a.safetensors", tiny_state())
    with pytest.raises(RuntimeError, match=r"Forgetful left table on the meta device"):
        load_weights(meta(Forgetful), path)
    with pytest.raises(RuntimeError, match=r"Tied has one parameter under two names"):
        load_weights(meta(Tied), path)


# ---------------------------------------------------------------------------------------------------- saving weights


@pytest.mark.parametrize("sizes", [(3, 4), (3, 5)])
def test_saved_files_are_those_of_the_library(tmp_path, sizes):
    g = torch.Generator().manual_seed(1)
    a = torch.randn(*sizes, generator=g)
    tensors = {"b": a.double(), "z": a, "a": a + 1, "h": a.half(), "bf": a.bfloat16(), "i": a.long(), "s": a[0, 0]}
    tensors |= {"bool": a > 0, "u8": a.byte(), "i8": a.to(torch.int8), "i16": a.short(), "i32": a.int()}
    tensors |= {"empty": torch.zeros(0, 2)}
    save_weights(tensors, tmp_path / "a.safetensors")
    ours = (tmp_path / "a.safetensors").read_bytes()
    assert ours == safetensors.torch.save({k: v.clone() for k, v in tensors.items()}, {"format": "pt"})
    assert no_rubbish(tmp_path)


def test_save_casts_and_straightens(tmp_path):
    state = tiny_state() | {"t": torch.arange(6.0).reshape(2, 3).T, "p": nn.Parameter(torch.ones(2))}
    save_weights(state, tmp_path / "a.safetensors", torch.float16, {"note": "fjörd"})
    got = safetensors.torch.load_file(tmp_path / "a.safetensors")
    assert sorted(got) == sorted(state) and got["ids"].dtype == torch.int64
    assert got["t"].dtype == torch.float16 and torch.equal(got["t"], state["t"].half())
    with safetensors.safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "note": "fjörd"}


def test_save_says_what_is_wrong(tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_bytes(b"old")
    ok = {"a": torch.ones(2)}
    with pytest.raises(LDMError, match=r"Cannot write .*: 'b' holds 1 NaN and 0 infinite numbers"):
        save_weights(ok | {"b": torch.tensor([torch.nan])}, path)
    with pytest.raises(LDMError, match=r"'b' reaches 7e[+]04, beyond float16"):
        save_weights(ok | {"b": torch.tensor([7e4])}, path, torch.float16)
    with pytest.raises(LDMError, match=r"'b' of type complex64 has no place in it"):
        save_weights({"b": torch.ones(1, dtype=torch.complex64)}, path)
    with pytest.raises(LDMError, match=r"has no place in it; rename or cast it"):
        save_weights({"a\n": torch.ones(1)}, path)
    with pytest.raises(LDMError, match=r"metadata must be strings"):
        save_weights(ok, path, metadata={"step": 3})
    with pytest.raises(ValueError, match=r"dtype must be a float type"):
        save_weights(ok, path, torch.int8)
    assert path.read_bytes() == b"old" and no_rubbish(tmp_path)


# ---------------------------------------------------------------------------------------------------- the others' files


def same(paths, reference):
    got = {name: tensor.clone() for name, tensor, _ in read_tensors(paths)}
    assert sorted(got) == sorted(reference)
    return all(torch.equal(got[n], t) and got[n].dtype == t.dtype for n, t in reference.items())


@pytest.mark.parametrize("variant, dtype", [(None, torch.float32), ("fp16", torch.float16)])
@pytest.mark.parametrize("size, files", [("30KB", 2), ("1GB", 1)])
def test_folders_of_diffusers(tmp_path, variant, dtype, size, files):
    diffusers = pytest.importorskip("diffusers")
    unet = diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(4, 8),
        layers_per_block=1,
        norm_num_groups=2,
        cross_attention_dim=8,
        attention_head_dim=2,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    ).to(dtype)
    unet.save_pretrained(tmp_path, max_shard_size=size if dtype == torch.float32 else size.replace("30", "15"))
    unet.save_pretrained(tmp_path / "v", variant=variant, max_shard_size=size.replace("30", "15"))
    lines = []
    paths = find_weights(tmp_path / "v", STEM, variant, say=lines.append)
    assert same(paths, unet.state_dict()) and not lines and len(paths) >= files
    assert same(find_weights(tmp_path, STEM, variant, say=lines.append), unet.state_dict())
    assert len(lines) == (variant is not None)
    with torch.device("meta"):
        empty = diffusers.UNet2DConditionModel.from_config(unet.config)
    loaded = load_weights(empty, paths)
    assert all(torch.equal(t, unet.state_dict()[n].float()) for n, t in loaded.state_dict().items())
    save_weights(loaded.state_dict(), tmp_path / "v" / f"{STEM}.safetensors")
    for path in (tmp_path / "v").glob("*index*"):
        path.unlink()
    again = diffusers.UNet2DConditionModel.from_pretrained(tmp_path / "v")
    assert all(torch.equal(t, unet.state_dict()[n].float()) for n, t in again.state_dict().items())


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_folders_of_transformers(tmp_path, variant):
    transformers = pytest.importorskip("transformers")
    config = transformers.CLIPTextConfig(
        vocab_size=99, hidden_size=8, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=16, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    clip = transformers.CLIPTextModel(config)
    reference = {name: tensor for name, tensor in clip.state_dict().items() if not name.endswith("position_ids")}
    for size, files in (("3KB", 3), ("1GB", 1)):
        clip.save_pretrained(tmp_path / size, variant=variant, max_shard_size=size)
        paths = find_weights(tmp_path / size, "model", variant)
        assert len(paths) == files and same(paths, reference)
    save_weights(reference, tmp_path / size / "model.safetensors")
    again = transformers.CLIPTextModel.from_pretrained(tmp_path / size).state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in reference.items())
