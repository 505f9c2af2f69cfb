"""Switches for little memory: each draws what the plain path draws, and does what it is for.

There is one device here, so what offloading does is proved otherwise: the weights that stay at home are made NaN, and
only the copies that are sent hold numbers; or the device is `meta`, and every operation must find all it reads there.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from reference import DTYPES, assert_close, normal, randomise
from tiny import SIZE, tiny_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import ldm
from ldm import memory
from ldm.errors import LDMError
from ldm.models import blocks
from ldm.models.blocks import Attention, ResnetBlock, TransformerBlock
from ldm.models.controlnet import ControlNet, ControlNetConfig
from ldm.models.unet import CROSS_DOWN, CROSS_UP, DOWN, UP, UNet, UNetConfig
from ldm.models.vae import VAE, VAEConfig
from ldm.precision import autocasting
from ldm.text.clip import TextConfig, TextEncoder

IDS = torch.tensor([[97, 5, 98, 98, 98], [97, 5, 77, 31, 98], [97, 11, 12, 13, 98]])
ENCODER = {
    "block_out_channels": (8, 16),
    "down_block_types": (CROSS_DOWN, DOWN),
    "cross_attention_dim": 24,
    "heads": (2, 4),
    "transformer_layers_per_block": (1, 1),
    "only_cross_attention": (False, False),
    "layers_per_block": 2,
    "norm_num_groups": 4,
}
TEXT = {
    "vocab_size": 99, "intermediate_size": 30, "num_hidden_layers": 2, "num_attention_heads": 2, "eos_token_id": 98,
    "max_position_embeddings": 13,
}  # fmt: skip


class Pipe:
    """The parts of a model, and where they are at work: what `ldm.memory` asks of a pipeline."""

    def __init__(self, dtype=torch.float64, linear=False, device="cpu"):
        self.where = None
        self.text_encoder = TextEncoder(TextConfig(**TEXT, hidden_size=16))
        self.text_encoder_2 = TextEncoder(TextConfig(**TEXT, hidden_size=8))
        self.unet = UNet(UNetConfig(**ENCODER, up_block_types=(UP, CROSS_UP), use_linear_projection=linear))
        self.vae = VAE(VAEConfig(block_out_channels=(8, 16), norm_num_groups=4))
        self.net = ControlNet(ControlNetConfig(**ENCODER, conditioning_embedding_out_channels=(4, 8)))
        for seed, part in enumerate(self.all().values()):
            randomise(part, seed).to(device, dtype).requires_grad_(False)

    def parts(self):
        return {name: getattr(self, name) for name in ("text_encoder", "text_encoder_2", "unet", "vae")}

    def all(self):
        return {**self.parts(), "net": self.net}


@torch.no_grad()
def draw(pipe, device="cpu", control=True):
    """All that a run computes, in a run's order; keys and values are prepared without calling the UNet."""
    dtype = pipe.unet.dtype
    ids = IDS.to(device)
    context = torch.cat([each.context(ids) for each in (pipe.text_encoder, pipe.text_encoder_2)], dim=-1)
    x, image = (normal(k, *shape, dtype=dtype).to(device) for k, shape in enumerate([(3, 4, 6, 10), (3, 3, 12, 20)]))
    prepared, seen = pipe.unet.prepare(context), pipe.net.prepare(context)
    features = pipe.net.condition(image.sigmoid())
    for t in (900.0, 400.0):
        residuals = pipe.net(x, t, seen, features) if control else None
        x = x - 0.5 * pipe.unet(x, t, prepared, residuals=residuals)
    return [
        context,
        x,
        pipe.vae.decode(x),
        *pipe.vae.posterior(image),
        pipe.vae.encode(image, normal(9, *x.shape).to(x)),
    ]


def assert_same(ours, reference):
    """Bit for bit, and no trifle."""
    for mine, theirs in zip(ours, reference, strict=True):
        assert theirs.abs().mean() > 0.1 and theirs.isfinite().all()
        assert torch.equal(mine, theirs)


def tensors(pipe):
    return [p for part in pipe.all().values() for p in part.parameters()]


# ----------------------------------------------------------------------------------------------------- slices


@pytest.fixture
def asked(monkeypatch):
    """How many positions looked at once, at every call of the attention's kernel in the UNet and the VAE."""
    rows, kernel = [], F.scaled_dot_product_attention

    def counted(q, k, v, **options):
        rows.append(q.shape[2])
        return kernel(q, k, v, **options)

    monkeypatch.setattr(blocks.F, "scaled_dot_product_attention", counted)
    return rows


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 7, 64])
def test_attention_in_slices_equals_attention_at_once(rows, dtype, asked):
    pipe = Pipe(dtype)
    whole = draw(pipe)
    assert {60, 15} <= set(asked)  # 6 x 10 positions and 3 x 5, in the UNet; the text encoders' own also counts
    asked.clear()
    memory.slice_attention(pipe, rows, [pipe.net])
    for mine, theirs in zip(draw(pipe), whole, strict=True):
        assert_close(mine, theirs, DTYPES[dtype])
    sizes = [size for size in asked if size != IDS.shape[1]]
    assert max(sizes) == min(rows, 60) and (rows == 1 or 60 % rows in sizes)
    asked.clear()
    memory.slice_attention(pipe, None, [pipe.net])
    assert_same(draw(pipe), whole)
    assert {60, 15} <= set(asked)


@torch.no_grad()
def test_sliced_attention_is_vaswani_s_formula():
    attention = randomise(Attention(12, heads=3, context_width=5)).double()
    attention.rows = 4
    x, context = normal(1, 2, 10, 12, dtype=torch.float64), normal(2, 2, 7, 5, dtype=torch.float64)
    heads = []
    for h in range(3):
        q, k, v = (
            each.weight[4 * h : 4 * h + 4].mm(y.flatten(0, 1).T).T.unflatten(0, (2, -1))
            for each, y in ((attention.to_q, x), (attention.to_k, context), (attention.to_v, context))
        )
        heads.append((q @ k.mT / math.sqrt(4)).softmax(dim=-1) @ v)
    assert_close(attention(x, context), attention.to_out[0](torch.cat(heads, dim=-1)), 1e-11)


@pytest.mark.parametrize("rows", [0, -1, 2.0, True, "max"])
def test_slices_are_whole_numbers(rows):
    with pytest.raises(LDMError, match=rf"whole number of rows, 1 or more .*, not {rows!r}\."):
        memory.slice_attention(Pipe(), rows)


@torch.no_grad()
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_sliced_vae_takes_each_picture_as_if_it_were_alone(dtype):
    pipe = Pipe(dtype)
    image, noise = normal(1, 3, 3, 12, 20, dtype=dtype), normal(2, 3, 4, 6, 10, dtype=dtype)
    batches = []
    for module in (pipe.vae.encoder, pipe.vae.decoder):
        module.register_forward_pre_hook(lambda module, args: batches.append(len(args[0])))
    together = [*pipe.vae.posterior(image), pipe.vae.encode(image, noise), pipe.vae.decode(noise)]
    assert batches == [3, 3, 3]
    alone = [torch.cat(each) for each in zip(*(pipe.vae.posterior(one) for one in image.split(1)), strict=True)]
    alone.append(torch.cat([pipe.vae.encode(*pair) for pair in zip(image.split(1), noise.split(1), strict=True)]))
    alone.append(torch.cat([pipe.vae.decode(one) for one in noise.split(1)]))
    batches.clear()
    memory.slice_vae(pipe)
    sliced = [*pipe.vae.posterior(image), pipe.vae.encode(image, noise), pipe.vae.decode(noise)]
    assert batches == [1] * 9
    assert_same(sliced, alone)
    for mine, theirs in zip(sliced, together, strict=True):
        assert_close(mine, theirs, DTYPES[dtype])
    memory.slice_vae(pipe, on=False)
    pipe.vae.decode(noise)
    assert batches[9:] == [3]


# ----------------------------------------------------------------------------------------------------- offloading


class Sent:
    """Every sending of a weight, once the weights at home are NaN: copies of what they were are all there is."""

    def __init__(self, parts, monkeypatch):
        self.parts = parts
        self.homes = {p: (name, p.clone()) for name, part in self.parts.items() for p in part.parameters()}
        modules = [module for part in self.parts.values() for module in part.modules()]
        self.places = [(m, name, p) for m in modules for name, p in m.named_parameters(recurse=False)]
        for p in self.homes:
            p.fill_(math.nan)
        self.log, self.most = [], 0
        monkeypatch.setattr(memory, "sent", self)

    def __call__(self, home, device):
        name, numbers = self.homes[home]
        self.log.append(name)
        self.most = max(self.most, self.away() + home.numel())
        return nn.Parameter(numbers.clone(), requires_grad=False)

    def away(self):
        """How many numbers are on the device just now."""
        return sum(home.numel() for module, name, home in self.places if module._parameters[name] is not home)

    def order(self):
        """The parts that came, one after the other."""
        return [name for k, name in enumerate(self.log) if k == 0 or self.log[k - 1] != name]


def size(*modules):
    return sum(p.numel() for module in modules for p in module.parameters())


def test_by_parts_only_the_part_at_work_is_there(monkeypatch):
    pipe = Pipe()
    resident = draw(pipe)
    memory.offload(pipe, "cpu", others=[pipe.net])
    assert pipe.where == torch.device("cpu")
    seen = Sent(pipe.all(), monkeypatch)
    assert_same(draw(pipe), resident)
    assert seen.order() == ["text_encoder", "text_encoder_2", "unet", "net", "vae"]  # once each, for the whole loop
    assert len(seen.log) == len(tensors(pipe))
    assert seen.most == size(pipe.unet, pipe.net) and seen.away() == size(pipe.vae)
    assert_same(draw(pipe), resident)
    assert seen.order() == ["text_encoder", "text_encoder_2", "unet", "net", "vae"] * 2


def test_by_blocks_only_the_block_at_work_is_there(monkeypatch):
    pipe = Pipe()
    resident = draw(pipe)
    memory.offload(pipe, "cpu", by="blocks", others=[pipe.net])
    seen = Sent(pipe.all(), monkeypatch)
    assert_same(draw(pipe), resident)
    every = [module for part in seen.parts.values() for module in part.modules()]
    largest = max(size(module) for module in every if isinstance(module, ResnetBlock | TransformerBlock))
    assert seen.most == largest < size(pipe.unet) / 5
    assert seen.away() == 0
    # Two steps, and keys and values once before them, which the steps' blocks bring along.
    prepared = [m for m in pipe.unet.modules() if isinstance(m, Attention) and m.is_cross]
    assert seen.log.count("unet") == 2 * len(list(pipe.unet.parameters())) + 2 * len(prepared)


@pytest.mark.parametrize(
    "kind", ["ResnetBlock", "TransformerBlock", "VAEAttention", "Downsample", "Upsample", "TimestepMLP", "Layer"]
)
def test_a_block_comes_in_one_piece_and_no_larger_one(kind):
    pipe = Pipe()
    found = 0
    for part in pipe.parts().values():
        needs = memory.blocks_of(part)
        for module in part.modules():
            if type(module).__name__ == kind:
                found += 1
                assert {p for each in needs[module] for _, p in memory.own_tensors(each.module)} == {
                    *module.parameters()
                }
        assert not {part, *(m for m in part.modules() if hasattr(m, "resnets"))} & needs.keys()
    assert found


def test_a_net_that_is_not_named_stays(monkeypatch):
    pipe = Pipe()
    resident = draw(pipe)
    memory.offload(pipe, "cpu", by="blocks")
    net = list(pipe.net.parameters())
    seen = Sent(pipe.all(), monkeypatch)
    for p in net:
        p.copy_(seen.homes[p][1])
    assert_same(draw(pipe), resident)
    assert "net" not in seen.log


class AllOn(TorchDispatchMode):
    """Every operation but a copy from one device to the other finds all that it reads on `device`."""

    def __init__(self, device):
        super().__init__()
        self.device, self.count = device, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        read = [each for each in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(each, torch.Tensor)]
        name = function.overloadpacket.__name__
        if name not in ("_to_copy", "detach"):
            self.count += 1
            if not all(each.device.type == self.device or each.dim() == 0 for each in read):
                raise AssertionError(f"{name} reads elsewhere")
        return function(*args, **(kwargs or {}))


@torch.no_grad()
def on_meta(pipe):
    """A run's computations on a device that only knows shapes; noise and pictures are of no matter there."""
    x, image = (torch.empty(shape, dtype=torch.float64, device="meta") for shape in ((3, 4, 6, 10), (3, 3, 12, 20)))
    with AllOn("meta") as seen:
        context = torch.cat([each.context(IDS.to("meta")) for each in (pipe.text_encoder, pipe.text_encoder_2)], dim=-1)
        prepared, features = pipe.unet.prepare(context), pipe.net.condition(image)
        x = pipe.unet(x, 5.0, prepared, residuals=pipe.net(x, 5.0, context, features))
        assert pipe.vae.encode(image).shape == x.shape and pipe.vae.decode(x).shape == image.shape
    assert seen.count > 1000


@pytest.mark.parametrize("by", ["parts", "blocks"])
def test_every_operation_finds_its_weights_on_the_device(by):
    pipe = Pipe()
    with pytest.raises(AssertionError, match="embedding reads elsewhere"):
        on_meta(pipe)
    resident, before = draw(pipe), tensors(pipe)
    memory.offload(pipe, "meta", by=by, others=[pipe.net])
    on_meta(pipe)
    there = {name for name, part in pipe.all().items() if next(part.parameters()).is_meta}
    assert there == ({"vae"} if by == "parts" else set())
    memory.restore(pipe)
    assert all(mine is theirs for mine, theirs in zip(tensors(pipe), before, strict=True))
    assert pipe.where is None
    assert not any(
        "forward" in vars(module) for part in (*pipe.parts().values(), pipe.net) for module in part.modules()
    )
    assert_same(draw(pipe), resident)


@pytest.mark.parametrize("by", ["parts", "blocks"])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("at", [1, 40, 260, 700])
def test_whatever_breaks_a_run_leaves_the_weights_whole_and_at_home(by, error, at, monkeypatch):
    pipe = Pipe()
    resident, before = draw(pipe), tensors(pipe)
    memory.offload(pipe, "cpu", by=by, others=[pipe.net])
    calls = 0

    def breaks(function):
        def broken(*args, **options):
            nonlocal calls
            calls += 1
            if calls == at:
                raise error("here")
            return function(*args, **options)

        return broken

    with monkeypatch.context() as patch:
        # In the middle of sending a part or a block, and in the middle of what is computed.
        patch.setattr(memory, "sent", breaks(lambda home, device: nn.Parameter(home.clone(), requires_grad=False)))
        patch.setattr(F, "group_norm", breaks(F.group_norm))
        patch.setattr(F, "silu", breaks(F.silu))
        patch.setattr(F, "layer_norm", breaks(F.layer_norm))
        with pytest.raises(error, match="here"):
            draw(pipe)
        assert calls == at
        assert all(mine is theirs for mine, theirs in zip(tensors(pipe), before, strict=True))
        assert_same(draw(pipe), resident)


@pytest.mark.parametrize("by", ["parts", "blocks"])
def test_a_whole_pipeline_draws_the_same_when_it_is_offloaded(by, tmp_path, monkeypatch):
    """From a picture and a mask, two pictures: text encoder, VAE, UNet and VAE again."""
    pipe = ldm.load(tiny_model(tmp_path))
    given = {"image": Image.radial_gradient("L").resize((SIZE, SIZE)), "strength": 0.7, "seed": 3, "count": 2}
    resident = pipe("a large red house", **given)
    parts, order = pipe.parts(), ["vae", "text_encoder", "unet", "vae"]
    memory.offload(pipe, "cpu", by=by)
    seen = Sent(parts, monkeypatch)
    drawn = pipe("a large red house", **given)
    assert_same([drawn.x0], [resident.x0])
    assert [each.tobytes() for each in drawn.images] == [each.tobytes() for each in resident.images]
    assert seen.order() == order
    assert seen.away() == (size(pipe.vae) if by == "parts" else 0)
    memory.send_home(pipe)
    assert seen.away() == 0
    assert_same([pipe("a large red house", **given).x0], [resident.x0])


@pytest.mark.parametrize("by", ["parts", "blocks"])
def test_weights_that_change_at_home_are_the_ones_that_are_sent(by):
    """A LoRA may write into a weight, or put another in its place."""
    pipe, other = Pipe(), Pipe()
    memory.offload(pipe, "cpu", by=by)
    draw(pipe)
    for each in (pipe, other):
        each.unet.conv_in.weight.mul_(2)
        each.unet.mid_block.resnets[0].conv1.weight = nn.Parameter(
            3 * each.unet.mid_block.resnets[0].conv1.weight, requires_grad=False
        )
    changed = draw(other)
    assert_same(draw(pipe), changed)
    memory.restore(pipe)
    assert_same(draw(pipe), changed)


def test_offloading_anew_replaces_the_way(monkeypatch):
    pipe = Pipe()
    resident = draw(pipe)
    memory.offload(pipe, "cpu", by="parts", others=[pipe.net])
    memory.offload(pipe, "cpu", by="blocks", others=[pipe.net])
    seen = Sent(pipe.all(), monkeypatch)
    assert_same(draw(pipe), resident)
    assert seen.away() == 0


def test_restoring_what_was_never_offloaded_does_nothing():
    pipe = Pipe()
    before = tensors(pipe)
    memory.restore(pipe)
    assert all(mine is theirs for mine, theirs in zip(tensors(pipe), before, strict=True))


def test_another_way_of_offloading_is_refused():
    with pytest.raises(LDMError, match="offloaded by parts or by blocks, not by 'layers'"):
        memory.offload(Pipe(), "cpu", by="layers")


def test_weights_go_into_page_locked_memory_as_far_as_there_is_some(monkeypatch, capsys):
    part, pinned = Pipe().vae, []

    def pin_memory(tensor):
        if len(pinned) == most:
            raise RuntimeError("no page left")
        pinned.append(tensor.clone())
        return pinned[-1]

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin_memory)
    before, most = [p.clone() for p in part.parameters()], 10
    assert memory.pin_memory(part) is False
    assert "Not all weights fit into page-locked memory" in capsys.readouterr().err
    most = math.inf
    assert memory.pin_memory(part) is True and capsys.readouterr().err == ""
    for p, value, home in zip(part.parameters(), before, pinned[10:], strict=True):
        assert p.data_ptr() == home.data_ptr() and torch.equal(p, value) and not p.requires_grad


# ----------------------------------------------------------------------------------------------------- layout, types


def layouts(pipe):
    """Of every convolution's input, behind the first of each network: whether its channels lie last."""
    found, handles = {}, []
    for part in (pipe.unet, pipe.vae):
        for name, module in part.named_modules():
            if isinstance(module, nn.Conv2d) and not name.endswith(("conv_in", "quant_conv")):

                def look(module, args, name=f"{type(part).__name__} {name}"):
                    found[name] = args[0].is_contiguous(memory_format=torch.channels_last)

                handles.append(module.register_forward_pre_hook(look))
    draw(pipe, control=False)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("linear", [False, True])
def test_channels_last_stays_so_all_the_way(linear):
    pipe = Pipe(linear=linear)
    plain = draw(pipe)
    before = layouts(pipe)
    assert len(before) > 40 and sum(before.values()) < len(before) / 4
    memory.channels_last(pipe)
    after = layouts(pipe)
    assert after.keys() == before.keys() and [name for name, last in after.items() if not last] == []
    for mine, theirs in zip(draw(pipe), plain, strict=True):
        assert_close(mine.contiguous(), theirs, 1e-11)
    memory.channels_last(pipe, on=False)
    assert layouts(pipe) == before
    assert_same(draw(pipe), plain)


def test_channels_last_in_float32():
    pipe = Pipe(torch.float32)
    plain = draw(pipe)
    memory.channels_last(pipe, others=[pipe.net])
    weight = pipe.net.mid_block.resnets[0].conv1.weight
    assert weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous()
    for mine, theirs in zip(draw(pipe), plain, strict=True):
        assert_close(mine, theirs, 1e-4)  # two steps and two networks one behind the other


def test_autocast_computes_in_bfloat16_from_float32_weights():
    pipe = Pipe(torch.float32)
    plain, kinds = draw(pipe), set()
    pipe.unet.mid_block.resnets[0].conv1.register_forward_hook(lambda module, args, output: kinds.add(output.dtype))
    with autocasting(torch.bfloat16, torch.device("cpu")):
        rounded = draw(pipe)
    assert kinds == {torch.bfloat16} and {p.dtype for p in tensors(pipe)} == {torch.float32}
    for mine, theirs in zip(rounded, plain, strict=True):
        error = ((mine.float() - theirs).square().mean() / theirs.square().mean()).sqrt()
        assert 1e-4 < error < 0.05  # bfloat16 keeps 8 bits: 0.4 % a number
    with autocasting(None, torch.device("cpu")):
        assert_same(draw(pipe), plain)


# ----------------------------------------------------------------------------------------------------- on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("pin", [True, False])
@pytest.mark.parametrize("by", ["parts", "blocks"])
def test_offloaded_from_a_gpu_it_draws_the_same_there(by, pin):
    pipe = Pipe(device="cuda")
    resident = draw(pipe, "cuda")
    memory.offload(pipe, "cuda", by=by, others=[pipe.net], pin=pin)
    assert all(not p.is_cuda and p.is_pinned() == pin for p in tensors(pipe))
    assert_same(draw(pipe, "cuda"), resident)
    assert any(p.is_cuda for p in tensors(pipe)) == (by == "parts")
    memory.restore(pipe)
    assert all(p.is_cuda for p in tensors(pipe)) and pipe.where is None
    assert_same(draw(pipe, "cuda"), resident)


@pytest.mark.gpu
def test_the_other_switches_on_a_gpu():
    pipe = Pipe(device="cuda")
    plain = draw(pipe, "cuda")
    memory.slice_attention(pipe, 7, [pipe.net])
    memory.slice_vae(pipe)
    memory.channels_last(pipe, others=[pipe.net])
    for mine, theirs in zip(draw(pipe, "cuda"), plain, strict=True):
        assert_close(mine, theirs, 1e-10)
