"""FLUX on little memory: weights that stay in their files, modulations that come once a run, 8 and 4 bits.

Streamed and resident runs are compared bit for bit. There is one device here: what is on it is counted by what is sent.
"""

import builtins
import math
import sys
from pathlib import Path

import pytest
import torch
from reference import normal, randomise
from safetensors.torch import save_file
from test_memory import AllOn
from torch import nn

from ldm import memory, quantised
from ldm.errors import LDMError
from ldm.io.weights import Mapped, blank, load_weights, save_weights
from ldm.models.flux import DoubleBlock, Flux, FluxConfig, Modulation, SingleBlock
from ldm.models.unet import Extras
from ldm.models.vae import VAE, VAEConfig
from ldm.text import t5
from ldm.text.clip import TextConfig, TextEncoder

FLUX = FluxConfig(
    in_channels=16, num_layers=2, num_single_layers=3, attention_head_dim=16, num_attention_heads=4,
    joint_attention_dim=64, pooled_projection_dim=24, guidance_embeds=True, axes_dims_rope=(4, 4, 8),
)  # fmt: skip
TOWER = TextConfig(24, 52, num_hidden_layers=2, num_attention_heads=3, vocab_size=50, eos_token_id=49)
T5 = t5.T5Config(vocab_size=60, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4)
MAKE = {
    "text_encoder": lambda: TextEncoder(TOWER),
    "text_encoder_2": lambda: t5.T5Encoder(T5),
    "transformer": lambda: Flux(FLUX),
    "vae": lambda: VAE(VAEConfig(block_out_channels=(8, 16), norm_num_groups=4, latent_channels=4)),
}
TIMES = (900.0, 400.0)
CLIP_IDS = torch.tensor([[48, *range(20), 49], [48, *range(3, 22), 49, 49]])
T5_IDS = torch.arange(18).view(2, 9) % 60


class Pipe:
    """The parts of a FLUX, with random weights; from files, if there is a folder for them."""

    def __init__(self, folder: Path | None = None, dtype: torch.dtype = torch.float32, mapped: bool = True):
        self.where, self.named = None, {}
        for seed, (name, make) in enumerate(MAKE.items()):
            self.named[name] = randomise(make(), seed).to(dtype).requires_grad_(False)
            if folder is not None:
                path = folder / f"{name}.safetensors"
                if not path.exists():
                    save_weights(self.named[name].state_dict(), path)
                with blank():
                    self.named[name] = make()
                load_weights(self.named[name], path, dtype, mapped=mapped)

    def parts(self):
        return self.named


@torch.no_grad()
def draw(pipe, device="cpu", times=TIMES, asked=TIMES):
    """All that a run computes, in its order."""
    clip, text, flux, vae = pipe.parts().values()
    like = {"device": device, "dtype": flux.dtype}
    pooled, context = clip(CLIP_IDS.to(device)).pooled, text.context(T5_IDS.to(device))
    x, image = normal(1, 2, 4, 6, 4).to(**like), normal(2, 2, 3, 12, 8).sigmoid().to(**like)
    prepared = flux.prepare(context, Extras(pooled=pooled, guidance=torch.full((2,), 3.5, **like)), times)
    for t in asked:
        x = x - 0.3 * flux(x, t, prepared)
    return [pooled, context, x, vae.decode(x), *vae.posterior(image)]


def assert_same(ours, reference):
    for mine, theirs in zip(ours, reference, strict=True):
        assert theirs.abs().mean() > 0.05 and theirs.isfinite().all()
        assert torch.equal(mine, theirs)


def tensors(*modules):
    return [p for module in modules for p in module.parameters()]


def size(*modules):
    return sum(p.numel() for p in tensors(*modules))


def modulations(flux):
    return [module.linear for module in flux.modules() if isinstance(module, Modulation)]


class Sent:
    """What is sent, and how many numbers are on the device at most."""

    def __init__(self, pipe, monkeypatch):
        self.places = [
            (module, name, home)
            for part in pipe.parts().values()
            for module in part.modules()
            for name, home in module.named_parameters(recurse=False)
        ]
        self.log, self.most, self.send = [], 0, memory.sent
        monkeypatch.setattr(memory, "sent", self)

    def __call__(self, home, device):
        copy = self.send(home, device)
        assert copy.data_ptr() != home.data_ptr()  # memory of its own, on the CPU, too
        self.log.append(home)
        self.most = max(self.most, self.away() + home.numel())
        return copy

    def away(self):
        return sum(home.numel() for module, name, home in self.places if module._parameters[name] is not home)

    def count(self, homes):
        return sum(any(home is each for each in homes) for home in self.log)


# ------------------------------------------------------------------------------------------- weights in their files


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mapped_weights_are_the_file_s_own_bytes(dtype, tmp_path):
    pipe, loaded = Pipe(tmp_path, dtype), Pipe(tmp_path, dtype, mapped=False)
    for mine, theirs in zip(tensors(*pipe.parts().values()), tensors(*loaded.parts().values()), strict=True):
        assert type(mine) is Mapped and type(theirs) is nn.Parameter and torch.equal(mine, theirs)
        assert not mine.requires_grad
    if sys.platform == "linux":
        maps = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if str(tmp_path) in line]
        ranges = [[int(end, 16) for end in line[0].split("-")] for line in maps]
        assert all(any(a <= p.data_ptr() < b for a, b in ranges) for p in tensors(*pipe.parts().values()))
        assert not any(a <= p.data_ptr() < b for a, b in ranges for p in tensors(*loaded.parts().values()))
    assert_same(draw(pipe), draw(loaded))


@torch.no_grad()
def test_a_mapped_weight_that_is_written_leaves_the_file_as_it_is(tmp_path):
    pipe = Pipe(tmp_path)
    before = (tmp_path / "vae.safetensors").read_bytes()
    weight = pipe.parts()["vae"].decoder.conv_in.weight
    numbers = weight.clone()
    weight.mul_(2)
    assert torch.equal(weight, 2 * numbers) and (tmp_path / "vae.safetensors").read_bytes() == before


def test_weights_of_another_type_are_cast_into_memory_and_a_line_says_so(tmp_path, capsys):
    Pipe(tmp_path)
    assert not capsys.readouterr().err
    with blank():
        vae = MAKE["vae"]()
    load_weights(vae, tmp_path / "vae.safetensors", torch.bfloat16, mapped=True)
    assert all(type(p) is nn.Parameter and p.dtype == torch.bfloat16 for p in vae.parameters())
    size_said = f"{sum(p.nbytes for p in vae.parameters()) / 1000:.1f} kB of bfloat16 are kept in memory"
    assert size_said in capsys.readouterr().err


def test_mapped_weights_are_finite_and_of_the_cpu(tmp_path):
    vae = randomise(MAKE["vae"]())
    state = vae.state_dict()
    raw = {name: p.clone() for name, p in state.items()}
    raw["decoder.conv_in.weight"][0, 0, 0, 0] = math.nan
    save_file(raw, tmp_path / "bad.safetensors")
    for device, said in (
        ("cpu", "decoder.conv_in.weight' holds 1 NaN"),
        ("meta", "load them for the CPU, not for meta"),
    ):
        with blank():
            model = MAKE["vae"]()
        with pytest.raises(LDMError, match=said):
            load_weights(model, tmp_path / "bad.safetensors", device=device, mapped=True)


# ------------------------------------------------------------------------------------------------ streaming


@pytest.mark.parametrize("by", ["parts", "blocks"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_streamed_from_the_files_equals_resident(by, dtype, tmp_path, monkeypatch):
    resident = draw(Pipe(tmp_path, dtype, mapped=False))
    pipe = Pipe(tmp_path, dtype)
    homes = tensors(*pipe.parts().values())
    memory.offload(pipe, "cpu", by=by)
    sent = Sent(pipe, monkeypatch)
    assert_same(draw(pipe), resident)
    assert_same(draw(pipe), resident)
    memory.restore(pipe)
    assert all(a is b for a, b in zip(tensors(*pipe.parts().values()), homes, strict=True)) and sent.log
    assert_same(draw(pipe), resident)


def test_by_parts_one_part_is_there_and_no_modulation(tmp_path, monkeypatch):
    pipe = Pipe(tmp_path)
    flux = pipe.parts()["transformer"]
    late = modulations(flux)
    assert len(late) == 2 * 2 + 3 + 1 and size(*late) > size(flux) / 5
    rest = size(flux) - size(*late)
    memory.offload(pipe, "cpu", by="parts")
    sent = Sent(pipe, monkeypatch)
    others = [size(part) for name, part in pipe.parts().items() if name != "transformer"]
    draw(pipe, asked=TIMES[:0])  # as far as `prepare`
    assert sent.count(tensors(*late)) >= len(tensors(*late))
    sent.log.clear()
    draw(pipe)
    assert sent.most == max(rest + max(size(each) for each in late), *others)
    once = len(tensors(*pipe.parts().values())) - len(tensors(*late))
    assert len(sent.log) - sent.count(tensors(*late)) == once  # every other weight once a run
    assert sent.away() == size(pipe.parts()["vae"])


def test_the_loop_asks_no_modulation_that_stands_in_the_table(tmp_path, monkeypatch):
    pipe = Pipe(tmp_path)
    flux = pipe.parts()["transformer"]
    homes = tensors(*modulations(flux))
    for by in ("parts", "blocks"):
        memory.offload(pipe, "cpu", by=by)
        with monkeypatch.context() as patch:
            sent = Sent(pipe, patch)
            draw(pipe, asked=[])
            for_table = sent.count(homes)
            sent.log.clear()
            draw(pipe, asked=TIMES)
            assert sent.count(homes) == for_table > 0
            sent.log.clear()
            between = draw(pipe, asked=(900.0, 650.0))  # a sampler that asks between two rows
            assert sent.count(homes) == for_table + len(homes)
        memory.restore(pipe)
        assert_same(between, draw(pipe, asked=(900.0, 650.0)))


@pytest.mark.parametrize("kind", [DoubleBlock, SingleBlock, t5.Block])
def test_a_block_comes_in_one_piece_without_its_modulations(kind):
    pipe, found = Pipe(), 0
    for part in pipe.parts().values():
        needs = memory.blocks_of(part)
        for block in part.modules():
            if isinstance(block, kind):
                found += 1
                there = {p for each in needs[block] for _, p in memory.own_tensors(each.module)}
                late = {p for m in block.modules() if isinstance(m, Modulation) for p in m.parameters()}
                assert there == {*block.parameters()} - late and bool(late) == (kind is not t5.Block)
    assert found


@torch.no_grad()
@pytest.mark.parametrize("by", ["parts", "blocks"])
def test_every_operation_of_flux_finds_its_weights_on_the_device(by, monkeypatch):
    pipe = Pipe()
    resident, before = draw(pipe), tensors(*pipe.parts().values())
    # Tables of places, which are made on the CPU: there before.
    monkeypatch.setattr(t5, "distances", lambda length: torch.empty(length, length, dtype=torch.long, device="meta"))
    pipe.parts()["transformer"].rotary(T5_IDS.shape[1], 6, 4, torch.device("meta"))
    memory.offload(pipe, "meta", by=by)
    text, flux = pipe.parts()["text_encoder_2"], pipe.parts()["transformer"]
    like = {"device": "meta", "dtype": torch.float32}
    with AllOn("meta") as seen:
        context = text.context(T5_IDS.to("meta"))
        extras = Extras(pooled=torch.empty(2, 24, **like), guidance=torch.empty(2, **like))
        prepared = flux.prepare(context, extras, TIMES)
        assert flux(torch.empty(2, 4, 6, 4, **like), TIMES[0], prepared).shape == (2, 4, 6, 4)
    assert seen.count > 300
    assert flux.proj_out.weight.is_meta == (by == "parts") and not flux.norm_out.linear.weight.is_meta
    memory.restore(pipe)
    monkeypatch.undo()
    assert all(a is b for a, b in zip(tensors(*pipe.parts().values()), before, strict=True))
    assert_same(draw(pipe), resident)


@pytest.mark.parametrize("by", ["parts", "blocks"])
@pytest.mark.parametrize(("error", "at"), [(RuntimeError, 1), (KeyboardInterrupt, 60), (RuntimeError, 110)])
def test_whatever_breaks_a_streamed_run_leaves_all_at_home(by, error, at, tmp_path, monkeypatch):
    pipe = Pipe(tmp_path)
    resident, before, calls = draw(pipe), tensors(*pipe.parts().values()), 0
    memory.offload(pipe, "cpu", by=by)
    send = memory.sent

    def breaks(home, device):
        nonlocal calls
        calls += 1
        if calls == at:
            raise error("here")
        return send(home, device)

    with monkeypatch.context() as patch:
        patch.setattr(memory, "sent", breaks)
        with pytest.raises(error, match="here"):
            draw(pipe)
    assert all(a is b for a, b in zip(tensors(*pipe.parts().values()), before, strict=True))
    assert_same(draw(pipe), resident)


def test_a_modulation_that_breaks_off_sends_its_part_home(monkeypatch):
    pipe = Pipe()
    before = tensors(*pipe.parts().values())
    flux = pipe.parts()["transformer"]
    memory.offload(pipe, "cpu", by="parts")
    monkeypatch.setattr(memory, "sent", lambda home, device: nn.Parameter(home.clone(), requires_grad=False))

    def fail(emb):
        raise RuntimeError("here")

    flux.transformer_blocks[1].norm1.linear.forward.forward = fail
    with pytest.raises(RuntimeError, match="here"):
        draw(pipe)
    assert all(a is b for a, b in zip(tensors(*pipe.parts().values()), before, strict=True))


# ------------------------------------------------------------------------------------------------ 8 and 4 bits


@pytest.fixture
def whole():
    return Pipe()


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", [8, 4])
def test_a_quantised_weight_is_the_nearest_of_its_table(bits, dtype):
    linear = nn.Linear(192, 50).to(dtype)
    linear.weight.copy_(normal(3, 50, 192) * torch.logspace(-3, 2, 50)[:, None])
    linear.weight[7] = 0
    layer = quantised.QuantisedLinear(linear, bits)
    w = linear.weight.float().view(-1, quantised.GROUP)
    scale, levels = w.abs().amax(1, keepdim=True), quantised.table(bits)
    assert torch.equal(layer.scales.view(-1, 1), scale) and levels.min() == -1 and levels.max() == 1
    read = quantised.dequantised(layer)
    assert read.dtype == dtype and torch.equal(layer.weight, read)  # the library's, and the plain formula
    layer.dtype = torch.float32
    apart = (layer.weight.view_as(w) - w).abs()
    assert (apart <= quantised.BOUND[bits] * scale).all() and apart[w.abs() > 0].mean() > 0
    # No other entry of the table is nearer (by more than the library's rounding).
    nearest = (scale[..., None] * levels - w[..., None]).abs().amin(-1)
    assert (apart <= nearest + 0.005 / 127 * scale).all()
    assert layer.codes.nbytes == linear.weight.numel() * bits // 8 and layer.scales.nbytes == 4 * w.shape[0]


@torch.no_grad()
@pytest.mark.parametrize(("bits", "most"), [(8, 0.02), (4, 0.25)])
def test_a_quantised_model_draws_nearly_the_same(bits, most, whole, capsys):
    resident = draw(whole)
    done = quantised.quantise(whole, bits)
    assert [(each.part, each.layers) for each in done] == [("transformer", 2 * 12 + 3 * 5), ("text_encoder_2", 14)]
    said = capsys.readouterr().err
    for each in done:
        assert each.after < each.before and f"{each.part}: {each.layers} layers in {bits} bits" in said
    flux = whole.parts()["transformer"]
    assert all(type(linear) is nn.Linear for linear in (*modulations(flux), flux.proj_out, flux.x_embedder))
    drawn = draw(whole)
    assert torch.equal(drawn[0], resident[0])  # CLIP is as it was
    for ours, theirs in list(zip(drawn, resident, strict=True))[1:3]:
        off = ((ours - theirs).square().mean() / theirs.square().mean()).sqrt()
        assert most / 50 < off < most
        print(f"{bits} bits: {off:.2%}")


@pytest.mark.parametrize("by", ["parts", "blocks"])
@pytest.mark.parametrize("bits", [8, 4])
def test_a_quantised_model_is_streamed_bit_for_bit(by, bits, tmp_path):
    pipe = Pipe(tmp_path)
    quantised.quantise(pipe, bits)
    resident = draw(pipe)
    memory.offload(pipe, "cpu", by=by)
    assert_same(draw(pipe), resident)
    memory.restore(pipe)
    assert_same(draw(pipe), resident)


def test_what_cannot_be_quantised_is_refused(whole, monkeypatch):
    before = tensors(*whole.parts().values())
    for options, said in (
        ({"bits": 5}, "to 8 or 4 bits, not to 5"),
        ({"parts": ["transfomer"]}, "no part 'transfomer'.*Did you mean 'transformer'"),
        ({"parts": ["vae"]}, "vae has no blocks of large matrices"),
    ):
        with pytest.raises(LDMError, match=said):
            quantised.quantise(whole, **options)
    memory.offload(whole, "cpu")
    with pytest.raises(LDMError, match="offloaded: quantise it first"):
        quantised.quantise(whole)
    memory.restore(whole)
    whole.loras = [type("Lora", (), {"name": "style", "merged": False})]
    with pytest.raises(LDMError, match="LoRA 'style' lies beside the weights: merge it"):
        quantised.quantise(whole)
    whole.loras = []
    importing = builtins.__import__

    def without(name, *args, **options):
        if name == "bitsandbytes":
            raise ImportError(name)
        return importing(name, *args, **options)

    quantised.library.cache_clear()
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(LDMError, match=r'need bitsandbytes: python -m pip install "ldm-from-scratch\[quantise\]"'):
        quantised.quantise(whole)
    monkeypatch.undo()
    assert all(a is b for a, b in zip(tensors(*whole.parts().values()), before, strict=True))
    quantised.quantise(whole, parts=["transformer"])
    assert quantised.is_quantised(whole.parts()["transformer"])
    assert not quantised.is_quantised(whole.parts()["text_encoder_2"])
    with pytest.raises(LDMError, match="transformer is quantised already"):
        quantised.quantise(whole)
