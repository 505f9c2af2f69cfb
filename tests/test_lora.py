"""LoRAs on a model: against diffusers and PEFT, against the published formulas, and gone without a trace."""

import math
from collections.abc import Callable
from contextlib import ExitStack
from copy import copy, deepcopy
from pathlib import Path
from shutil import copyfile

import lora_files
import numpy as np
import pytest
import torch
from diffusers import StableDiffusionControlNetPipeline
from lora_files import ATTENTION, CONV, LINEAR, TEXT, kohya, layers, original, pairs, peft, told, write
from peft import LoHaConfig, LoKrConfig, get_peft_model_state_dict, inject_adapter_in_model
from reference import DTYPES, assert_close, normal
from tiny_pairs import PROMPT, Models, controlnets
from torch import Tensor, nn

import ldm
from ldm import memory
from ldm.lora import applied
from ldm.lora.algebra import Full, Hadamard, Kronecker, LowRank, Shift
from ldm.lora.applied import attach
from ldm.lora.file import Lora, open_lora
from ldm.models.unet import Extras
from ldm.pipeline import Pipeline

FP64 = torch.float64
SHORT = {"steps": 3, "height": 64, "width": 96, "seed": 3}


def asked(pipe, xl: bool) -> tuple[Tensor, ...]:
    """ids, x, t, context and, of SDXL, pooled vector and time ids: what both sides' networks are asked."""
    dtype, width = pipe.unet.dtype, pipe.unet.config.cross_attention_dim
    ids = torch.randint(3, 500, (2, 77), generator=torch.Generator().manual_seed(1))
    ids[:, -1] = pipe.tokenizer.eos_token_id if hasattr(pipe.tokenizer, "eos_token_id") else 0
    x, context = normal(3, 2, 4, 8, 12, dtype=dtype), normal(4, 2, 77, width, dtype=dtype)
    told = (normal(5, 2, 14, dtype=dtype), 100 * normal(6, 2, 6, dtype=dtype).abs()) if xl else ()
    return ids, x, torch.tensor([10, 500]), context, *told


@torch.no_grad()
def said(pipe: Pipeline, given: tuple[Tensor, ...]) -> list[Tensor]:
    """What our networks answer."""
    ids, x, t, context, *told = given
    answers = [pipe.unet(x, t, context, Extras(pooled=told[0], time_ids=told[1]) if told else Extras())]
    answers.append(pipe.text_encoder(ids).last)
    if pipe.text_encoder_2 is not None:
        states = pipe.text_encoder_2(ids)
        answers += [states.pooled, states.hidden[-2]]
    return answers


@torch.no_grad()
def said_by_diffusers(pipe, given: tuple[Tensor, ...]) -> list[Tensor]:
    ids, x, t, context, *told = given
    added = {"text_embeds": told[0], "time_ids": told[1]} if told else None
    answers = [pipe.unet(x, t, context, added_cond_kwargs=added).sample, pipe.text_encoder(ids)[0]]
    if told:
        second = pipe.text_encoder_2(ids, output_hidden_states=True)
        answers += [second.text_embeds, second.hidden_states[-2]]
    return answers


def grey(seed: int, *shape: int) -> np.ndarray:
    """A picture of nothing."""
    return (255 * normal(seed, *shape).sigmoid()).byte().numpy()


def assert_changed(found: list[Tensor], plain: list[Tensor]) -> None:
    """By far more than any tolerance: a LoRA that does nothing would pass as well otherwise."""
    assert all((a - b).abs().mean() > 0.02 for a, b in zip(found, plain, strict=True))


STYLES = {  # whose names, and which of the layers it can name
    "kohya": (lambda found, pipe: (kohya(found), None), LINEAR + CONV, TEXT),
    "original": (lambda found, pipe: (original(found, pipe), None), LINEAR + CONV, TEXT),
    "peft": (lambda found, pipe: (peft(found), None), ATTENTION, TEXT),
    "told": (lambda found, pipe: (peft(found), told(found)), LINEAR + CONV, TEXT),
    "diffusers": (lambda found, pipe: (lora_files.diffusers(found), None), LINEAR + CONV, TEXT),
    "oldest": (lambda found, pipe: (lora_files.oldest(found), None), ATTENTION, TEXT[:4]),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("family", "style", "dtype", "weight", "alpha"),
    [
        ("sd1", "kohya", torch.float32, 1.0, 1.5),
        ("sd1", "kohya", FP64, 0.5, None),
        ("sd1", "oldest", FP64, 0.5, None),
        ("sd2", "told", FP64, -0.7, 3.0),
        ("sd2", "diffusers", FP64, 1.0, None),
        ("sdxl", "original", FP64, 0.8, 2.5),
        ("sdxl", "peft", torch.float32, 0.5, None),
        ("sd1", "oldest", torch.float32, 0.5, None),
        ("sd1", "told", torch.float32, -0.7, 3.0),
        ("sd1", "diffusers", torch.float32, 1.0, None),
        ("sdxl", "original", torch.float32, 0.8, 2.5),
        ("sd1", "kohya", torch.float32, 0.0, 1.5),
    ],
)
def test_equals_diffusers(models: Models, tmp_path, family, style, dtype, weight, alpha) -> None:
    ours, theirs = models.ours(family, dtype), models.reference(family, dtype)
    write_style, unet, text = STYLES[style]
    file = write(tmp_path / "style.safetensors", *write_style(pairs(ours, unet, text, alpha), ours))
    given = asked(theirs, family == "sdxl")
    plain = said(ours, given)
    theirs.load_lora_weights(tmp_path, weight_name=file.name, adapter_name="style")
    try:
        theirs.set_adapters(["style"], [weight])
        expected = said_by_diffusers(theirs, given)
    finally:
        theirs.unload_lora_weights()
    with ours.lora(file, weight):
        found = said(ours, given)
    with ours.lora(file, weight, merge=False):
        beside = said(ours, given)
    if weight:
        assert_changed(found, plain)
    else:
        assert all(torch.equal(a, b) for a, b in zip(found, plain, strict=True))
    for each, other, reference in zip(found, beside, expected, strict=True):
        assert_close(each, reference, DTYPES[dtype])
        assert_close(other, reference, DTYPES[dtype])
    assert all(torch.equal(a, b) for a, b in zip(said(ours, given), plain, strict=True))


@pytest.mark.filterwarnings("ignore")
def test_stack_beside_a_controlnet_equals_diffusers(models: Models, tmp_path) -> None:
    """Two LoRAs at once, a ControlNet, guidance: the latents of a whole run. (diffusers' schedule is float32.)"""
    ours, theirs = models.ours("sd1", FP64), models.reference("sd1", FP64)
    reference, net = controlnets(models, "sd1", dtype=FP64)
    first = write(tmp_path / "first.safetensors", kohya(pairs(ours, alpha=2.0)))
    second = write(tmp_path / "second.safetensors", peft(pairs(ours, ATTENTION, (), None, seed=1000)))
    theirs = StableDiffusionControlNetPipeline(**theirs.components, controlnet=reference)
    theirs.set_progress_bar_config(disable=True)
    picture, latents = grey(7, 64, 96, 3), normal(8, 1, 4, 8, 12)
    theirs_picture = torch.from_numpy(picture).permute(2, 0, 1)[None].double() / 255
    theirs.load_lora_weights(tmp_path, weight_name=first.name, adapter_name="first")
    theirs.load_lora_weights(tmp_path, weight_name=second.name, adapter_name="second")
    try:
        theirs.set_adapters(["first", "second"], [0.6, -0.4])
        expected = theirs(
            PROMPT, theirs_picture, num_inference_steps=3, latents=latents.double(), output_type="latent",
            guidance_scale=4.0,
        ).images  # fmt: skip
    finally:
        theirs.unload_lora_weights()
    control = ldm.Control(net, picture)
    options = {"latents": latents, "guidance": 4.0, "control": control, **SHORT}
    plain = ours(PROMPT, **options).x0
    with ours.lora(first, 0.6), ours.lora(second, -0.4, merge=False):
        found = ours(PROMPT, **options).x0
    assert (found - plain).abs().mean() > 0.02
    assert_close(found, expected, 1e-5)


def test_every_layer_has_its_own_alpha(models: Models, tmp_path) -> None:
    """W0 + weight * alpha/r * BA, by hand: diffusers takes the most frequent alpha for attention and text encoders."""
    pipe = models.ours("sd1", FP64)
    found = {place: pair._replace(alpha=0.5 + k % 5) for k, (place, pair) in enumerate(pairs(pipe).items())}
    before = {place: pipe.parts()[place[0]].get_submodule(place[1]).weight.data for place in found}
    with pipe.lora(write(tmp_path / "style.safetensors", kohya(found)), 0.6):
        for (part, layer), pair in found.items():
            exact = pair._replace(down=pair.down.double(), up=pair.up.double())
            weight = pipe.parts()[part].get_submodule(layer).weight.data
            difference = weight - before[part, layer]
            assert difference.abs().mean() > 1e-3
            assert (difference - 0.6 * exact.delta(weight.shape)).abs().max() < 1e-14


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "config",
    [
        LoHaConfig(r=4, alpha=5, use_effective_conv2d=True),
        LoKrConfig(r=2, alpha=3, use_effective_conv2d=True, decompose_both=True, rank_pattern={"to_q": 1}),
        LoKrConfig(r=2, alpha=3, decompose_factor=4, alpha_pattern={"attentions.0.proj_in": 7}),
    ],
    ids=["loha", "lokr-both-sides", "lokr"],
)
def test_lycoris_forms_equal_pefts(models: Models, tmp_path, config) -> None:
    """PEFT's own modules in diffusers' UNet, saved by PEFT with its adapter_config.json beside.

    (PEFT keeps LoHa's scale in float32, so there it is a number of few digits.)
    """
    ours, reference = models.ours("sd1", FP64), deepcopy(models.reference("sd1", FP64).unet)
    config.target_modules = [
        "to_q",
        "to_v",
        "ff.net.0.proj",
        "proj_in",
        "conv1",
        "conv_shortcut",
        "downsamplers.0.conv",
    ]
    inject_adapter_in_model(config, reference, "default")
    g = torch.Generator().manual_seed(5)
    for name, p in reference.named_parameters():
        if "hada" in name or "lokr" in name:
            p.data = 0.5 * torch.randn(p.shape, generator=g, dtype=torch.float32).double()
    reference.peft_config = {"default": config}
    tensors = get_peft_model_state_dict(reference)
    file = write(tmp_path / "adapter_model.safetensors", {f"base_model.model.{key}": t for key, t in tensors.items()})
    config.save_pretrained(tmp_path)
    given = asked(models.reference("sd1", FP64), False)
    with torch.no_grad():
        expected = reference(*given[1:]).sample
    plain = said(ours, given)[:1]
    with ours.lora(file) as on:
        found = said(ours, given)[:1]
    with ours.lora(file, merge=False):
        beside = said(ours, given)[:1]
    assert on.name == tmp_path.name and on.lora.format == f"a {on.lora.groups[0].form} in LyCORIS' names"
    assert_changed(found, plain)
    assert_close(found[0], expected, 1e-11)
    assert_close(beside[0], expected, 1e-11)


# ------------------------------------------------------------------------------------------------- the formulas


def changes(outputs: int, inputs: int, kernel: tuple[int, ...]) -> dict[str, tuple]:
    """Each form for a weight (O, I, *kernel), and its whole change written out, element by element."""
    o, i, k = outputs, inputs, kernel
    d = lambda seed, *shape: normal(seed, *shape, dtype=FP64)  # noqa: E731
    ones = [1] * len(k)
    down, up, mid = d(1, 3, i, *k), d(2, o, 3, *ones), d(3, 3, 3, *k)
    a1, b1, a2, b2 = d(4, o, 2), d(5, 2, i * math.prod(k)), d(6, o, 2), d(7, 2, i * math.prod(k))
    left, right, l1, l2, r1, r2 = d(8, 2, 3), d(9, o // 2, i // 3, *k), d(10, 2, 1), d(11, 1, 3), d(12, o // 2, 1), None
    r2 = d(13, 1, i // 3 * math.prod(k))
    found = {
        "lora": (LowRank(down, up, 4.0), 4 / 3 * sum_of("or,ri...->oi...", up.flatten(1), down)),
        "loha": (
            Hadamard(a1, b1, a2, b2, 3.0),
            1.5 * (sum_of("or,rn->on", a1, b1) * sum_of("or,rn->on", a2, b2)).reshape(o, i, *k),
        ),
        "lokr-whole": (Kronecker(w1=left, w2=right, alpha=9.0), by_blocks(left, right)),
        "lokr-split": (
            Kronecker(w1_a=l1, w1_b=l2, w2_a=r1, w2_b=r2, alpha=3.0),
            3.0 * by_blocks(l1 @ l2, (r1 @ r2).reshape(o // 2, i // 3, *k)),
        ),
        "full": (Full(d(14, o, i, *k)), d(14, o, i, *k)),
    }
    if k:
        c1, c2 = d(15, 2, 2, *k), d(16, 2, 2, *k)
        p1, q1, p2, q2 = d(17, 2, o), d(18, 2, i), d(19, 2, o), d(20, 2, i)
        core = lambda c, p, q: sum_of("ijhw,ip,jr->prhw", c, p, q)  # noqa: E731
        thin = down[:, :, :1, :1]
        found |= {
            "lora-tucker": (
                LowRank(thin, up, 4.0, mid),
                4 / 3 * sum_of("mnhw,om,ni->oihw", mid, up.flatten(1), thin.flatten(1)),
            ),
            "loha-tucker": (Hadamard(p1, q1, p2, q2, 3.0, c1, c2), 1.5 * core(c1, p1, q1) * core(c2, p2, q2)),
            "lokr-tucker": (
                Kronecker(w1=left, w2_a=p1[:, : o // 2], w2_b=q1[:, : i // 3], t2=c1, alpha=5.0),
                2.5 * by_blocks(left, core(c1, p1[:, : o // 2], q1[:, : i // 3])),
            ),
        }
    return found


def sum_of(letters: str, *factors: Tensor) -> Tensor:
    """The sum of products over the letters that don't remain."""
    return torch.einsum(letters, *factors)


def by_blocks(left: Tensor, right: Tensor) -> Tensor:
    """The Kronecker product by its definition: a block of `right`'s shape for every number of `left`."""
    return torch.cat([torch.cat([number * right for number in row], dim=1) for row in left], dim=0)


@pytest.mark.parametrize("module", [nn.Linear(9, 8), nn.Conv2d(9, 8, 1), nn.Conv2d(9, 8, 3, stride=2, padding=1)])
def test_forms_are_the_published_formulas(module: nn.Module) -> None:
    """The whole change, its norm, and what it adds to a layer's output without being built."""
    kernel = tuple(module.weight.shape[2:])
    module = module.double()
    x = normal(30, 2, 5, 9, dtype=FP64) if not kernel else normal(30, 2, 9, 6, 7, dtype=FP64)
    shape = module.weight.shape
    for name, (change, expected) in changes(8, 9, kernel).items():
        assert_close(change.delta(shape), expected, 1e-12), name
        assert change.norm() == pytest.approx(float(expected.norm()), rel=1e-12), name
        plain = module(x)
        handle = attach(module, change, 0.7)
        found = module(x)
        handle.remove()
        other = deepcopy(module)
        other.weight.data += 0.7 * expected
        assert_close(found, other(x), 1e-12)
        assert (found - plain).abs().mean() > 0.1, name
        assert torch.equal(module(x), plain)


@pytest.mark.parametrize("module", [nn.LayerNorm(6), nn.GroupNorm(2, 6), nn.Linear(6, 6), nn.Conv2d(6, 6, 3)])
def test_gains_and_biases_beside_a_layer(module: nn.Module) -> None:
    x = normal(1, 4, 6, 6, 6, dtype=FP64)
    module = module.double()
    other, gain, bias = deepcopy(module), normal(2, *module.weight.shape, dtype=FP64), normal(3, 6, dtype=FP64)
    other.weight.data += 0.3 * gain
    other.bias.data += 0.3 * 2.0 * bias
    attach(module, Full(gain), 0.3)
    attach(module, Shift(bias, 2.0), 0.3)
    assert_close(module(x), other(x), 1e-12)


def test_factors_learn_beside_a_layer() -> None:
    """The gradients are those of the change written out: `attach` trains."""
    layer = nn.Linear(9, 8).double().requires_grad_(False)
    down, up = nn.Parameter(normal(1, 3, 9, dtype=FP64)), nn.Parameter(normal(2, 8, 3, dtype=FP64))
    attach(layer, LowRank(down, up, 6.0), 0.5)
    x = normal(3, 4, 9, dtype=FP64)
    found = torch.autograd.grad(layer(x).square().sum(), (down, up))
    expected = torch.autograd.grad((x @ (layer.weight + up @ down).T + layer.bias).square().sum(), (down, up))
    for a, b in zip(found, expected, strict=True):
        assert_close(a, b, 1e-10)


# ------------------------------------------------------------------------------------------- coming and going


def weights(pipe: Pipeline) -> dict[str, Tensor]:
    """Every parameter's tensor, by name: the very ones."""
    return {f"{part}.{key}": p.data for part, net in pipe.parts().items() for key, p in net.named_parameters()}


def assert_bits(pipe: Pipeline, before: dict[str, Tensor]) -> None:
    now = weights(pipe)
    assert now.keys() == before.keys()
    different = [key for key in before if not torch.equal(now[key], before[key])]
    assert not different, different[:3]


@pytest.fixture
def three(models: Models, tmp_path) -> tuple[Pipeline, list[Path]]:
    """A pipeline of its own, and three LoRAs that change the same layers, some of them."""
    pipe = deepcopy(models.ours("sd1"))
    chosen = (("a", LINEAR, TEXT), ("b", ATTENTION + CONV, ()), ("c", ("to_v", "conv_in"), ("fc1",)))
    files = [
        write(tmp_path / f"{name}.safetensors", kohya(pairs(pipe, unet, text, seed=100 * k)))
        for k, (name, unet, text) in enumerate(chosen)
    ]
    return pipe, files


def test_what_leaves_leaves_no_trace(three) -> None:
    """The very tensors come back, and what stays has the bits that it would have alone, whatever came in what order."""
    pipe, (a, b, c) = three
    untouched = weights(pipe)
    alone = {}
    for file in (a, b):
        with pipe.lora(file, 0.7):
            alone[file] = {key: tensor.clone() for key, tensor in weights(pipe).items()}
    first, second = pipe.add_lora(a, 0.7), pipe.add_lora(b, 0.7)
    both = {key: tensor.clone() for key, tensor in weights(pipe).items()}
    assert [each.name for each in pipe.loras] == ["a", "b"]
    pipe.add_lora(c, -1.0)
    pipe.remove_lora(first)
    pipe.remove_lora("c")
    assert_bits(pipe, alone[b])
    again = pipe.add_lora(a, 0.7)
    assert_bits(pipe, both)  # b before a now
    assert pipe.loras == (second, again)
    pipe.remove_lora("b")
    assert_bits(pipe, alone[a])
    pipe.remove_lora(again)
    assert pipe.loras == ()
    assert all(tensor.data_ptr() == untouched[key].data_ptr() for key, tensor in weights(pipe).items())
    assert not any("loras" in vars(net) for net in pipe.parts().values())


def test_the_sum_does_not_hang_on_names(three) -> None:
    """A copy under another name, and a file that isn't there any more: the same bits."""
    pipe, (a, _, _) = three
    c = write(a.with_name("m.safetensors"), kohya(pairs(pipe, LINEAR, TEXT, seed=700)))
    renamed = copyfile(a, a.with_name("z.safetensors"))
    with pipe.lora(a, 0.7), pipe.lora(c, 0.7), pipe.lora(c, -0.3):
        expected = {key: tensor.clone() for key, tensor in weights(pipe).items()}
    with pipe.lora(c, 0.7), pipe.lora(c, -0.3), pipe.lora(renamed, 0.7):
        assert_bits(pipe, expected)
        renamed.unlink()


@pytest.mark.parametrize("how", ["in place", "replaced", "copied"])
def test_what_somebody_else_writes_meanwhile_stays(three, capsys, how: str) -> None:
    """Nobody's numbers are lost, and the others' come back."""
    pipe, (a, b, _) = three
    untouched = {key: tensor.clone() for key, tensor in weights(pipe).items()}
    on = pipe.add_lora(a, 0.7)
    pipe.add_lora(b, 0.5)
    other = pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_k
    other.weight = nn.Parameter(other.weight.data.clone())  # the same numbers, as `ldm.memory` pins them
    if how == "copied":
        pipe = deepcopy(pipe)
    pipe.unet.double()
    memory.channels_last(pipe)
    key = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    layer = pipe.unet.get_submodule(key)
    size = 0.5 if how == "replaced" else 1e-4  # of a weight that was put there, it is its numbers that tell
    theirs = layer.weight.data + size * normal(1, *layer.weight.shape)
    layer.load_state_dict({"weight": theirs}, assign=how == "replaced")
    capsys.readouterr()
    pipe.remove_lora(on)
    said = capsys.readouterr().err
    assert said.startswith(f"{key}.weight: written by something else while a and b was merged there; what was written")
    pipe.remove_lora("b")
    assert capsys.readouterr().err == ""
    now = weights(pipe)
    assert torch.equal(now.pop(f"unet.{key}.weight"), theirs)
    assert all(torch.equal(tensor, untouched[name].to(tensor.dtype)) for name, tensor in now.items())
    with pipe.lora(a, 0.7), pipe.lora(a, 0.7, merge=False):
        assert not torch.equal(layer.weight, theirs)
    assert torch.equal(layer.weight, theirs) and "written by" not in capsys.readouterr().err


def test_a_network_with_a_lora_is_not_pickled(three, tmp_path) -> None:
    pipe, (a, *_) = three
    with pipe.lora(a), pytest.raises(ldm.LDMError, match=r"a.safetensors is an open file, .* remove it before"):
        torch.save(pipe.unet, tmp_path / "unet.pt")
    torch.save(pipe.unet, tmp_path / "unet.pt")


def test_the_same_twice_and_weight_0(three) -> None:
    pipe, (a, *_) = three
    untouched = {key: tensor.clone() for key, tensor in weights(pipe).items()}
    with pipe.lora(a, 0.0) as nothing:
        assert_bits(pipe, untouched)
        assert nothing.change == 0
    with pipe.lora(a, 0.5), pipe.lora(a, 0.25) as second:
        assert second.name == "a (2)"
        twice = weights(pipe)
    assert max((tensor - untouched[key]).abs().max() for key, tensor in twice.items()) > 0.01
    with pipe.lora(a, 0.75):
        assert all((tensor - twice[key]).abs().max() < 1e-6 for key, tensor in weights(pipe).items())
    with pipe.lora(a, 0.5, merge=False), pipe.lora(a, -0.5):
        given = asked(pipe, False)
        found = said(pipe, given)
    for each, plain in zip(found, said(pipe, given), strict=True):
        assert_close(each, plain, 1e-5)


def interrupted(function: Callable, call: int) -> Callable:
    """The function, interrupted at its n-th call, and at no other."""
    count = iter(range(1, 10_000))

    def inside(*args):
        if next(count) == call:
            raise KeyboardInterrupt
        return function(*args)

    return inside


def test_all_or_nothing(three, monkeypatch) -> None:
    """A change that goes beyond float16 in one of the last layers, and Ctrl-C in the middle: nothing has changed."""
    pipe, (a, b, _) = three
    pipe.unet.half()
    pipe.add_lora(b, 0.5)
    before = {key: tensor.clone() for key, tensor in weights(pipe).items()}
    with pytest.raises(ldm.LDMError, match="beyond the range of float16: take a smaller weight"):
        pipe.add_lora(a, 1e7)
    with pytest.raises(ldm.LDMError, match="beyond the range of float16: take a smaller weight"):
        pipe.add_lora(a, 1e7, merge=False)
    assert not any(module._forward_hooks for module in pipe.unet.modules())
    assert_bits(pipe, before)
    for owner, name, act in ((LowRank, "delta", lambda: pipe.add_lora(a, 0.5)), (applied, "alike", pipe.loras[0])):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, interrupted(getattr(owner, name), call=40))
            with pytest.raises(KeyboardInterrupt):
                act() if callable(act) else pipe.remove_lora(act)
        assert_bits(pipe, before)
    assert [each.name for each in pipe.loras] == ["b"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_weights_are_rounded_once(three, dtype: torch.dtype) -> None:
    """The sum of all is made in float32, and cast: not rounded LoRA by LoRA."""
    pipe, (a, b, _) = three
    pipe.unet.to(dtype)
    key = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    start = pipe.unet.get_submodule(key).weight.data
    pair = [open_lora(file).fit({"unet": pipe.unet, "text_encoder": pipe.text_encoder}) for file in (a, b)]
    terms = [0.3 * each["unet"][key + ".weight"].delta(start.shape) for each in pair]
    with pipe.lora(a, 0.3), pipe.lora(b, 0.3):
        found = pipe.unet.get_submodule(key).weight
        assert found.dtype == dtype
        assert torch.equal(found, (start.float() + terms[0] + terms[1]).to(dtype))
        assert not torch.equal(found, (start + terms[0].to(dtype)) + terms[1].to(dtype))
    assert pipe.unet.get_submodule(key).weight.data_ptr() == start.data_ptr()


def test_copies_and_networks_in_anothers_place(three) -> None:
    """LoRAs lie on networks: a copy of the pipeline shares them, a deep copy has its own, another network has none."""
    pipe, (a, b, _) = three
    untouched = {key: tensor.clone() for key, tensor in weights(pipe).items()}
    on = pipe.add_lora(a, 0.7)
    beside = pipe.add_lora(b, 0.7, merge=False)
    given = asked(pipe, False)
    changed = said(pipe, given)
    shallow, deep = copy(pipe), deepcopy(pipe)
    assert shallow.loras == deep.loras == (on, beside)
    deep.remove_lora(on)
    deep.remove_lora("b")
    assert_bits(deep, untouched)
    assert all(torch.equal(x, y) for x, y in zip(said(pipe, given), changed, strict=True))
    assert not torch.equal(said(deep, given)[0], changed[0])
    other, pipe.unet = pipe.unet, deep.unet
    assert pipe.loras == (on,)  # on the text encoder, still
    pipe.remove_lora(on)
    assert_bits(pipe, untouched)
    with pytest.raises(ldm.LDMError, match="no LoRA 'a' on this model; none is"):
        pipe.remove_lora(on)
    pipe.unet = other
    assert pipe.loras == (on, beside)
    shallow.remove_lora("b")
    shallow.remove_lora(on)
    assert_bits(pipe, untouched)
    assert all(torch.equal(x, y) for x, y in zip(said(pipe, given), said(deep, given), strict=True))


def test_moved_or_cast_meanwhile(three) -> None:
    """What comes back is as the weight is now: its dtype and its layout; and so is what is computed anew."""
    pipe, (_, b, _) = three
    untouched = weights(pipe)
    pipe.add_lora(b, 0.7)
    pipe.unet.to(FP64)
    memory.channels_last(pipe)

    def is_channels_last() -> bool:
        conv = pipe.unet.mid_block.resnets[0].conv1.weight
        return conv.is_contiguous(memory_format=torch.channels_last) and not conv.is_contiguous()

    with pipe.lora(b, 0.1):
        assert is_channels_last()
    pipe.remove_lora("b")
    for key, tensor in weights(pipe).items():
        assert torch.equal(tensor, untouched[key].to(tensor.dtype)), key
    assert pipe.unet.dtype == FP64 and is_channels_last()


@pytest.mark.parametrize("by", ["parts", "blocks"])
def test_offloaded(three, monkeypatch, by: str) -> None:
    """Weights that are away come home first; and the factors beside a layer go to where it computes."""
    pipe, (a, b, _) = three
    untouched = {key: tensor.clone() for key, tensor in weights(pipe).items()}
    with pipe.lora(a, 0.7), pipe.lora(b, 0.5, merge=False):
        expected = pipe(PROMPT, **SHORT).x0
    plain = pipe(PROMPT, **SHORT).x0
    monkeypatch.setattr(memory, "sent", lambda home, device: nn.Parameter(home.detach().clone(), requires_grad=False))
    memory.offload(pipe, "cpu", by=by)
    assert torch.equal(pipe(PROMPT, **SHORT).x0, plain)
    next(pipe.steps(PROMPT, **SHORT))  # by parts, the UNet stays on the device
    with pipe.lora(a, 0.7), pipe.lora(b, 0.5, merge=False):
        assert torch.equal(pipe(PROMPT, **SHORT).x0, expected)
        next(pipe.steps(PROMPT, **SHORT))
    memory.restore(pipe)
    assert_bits(pipe, untouched)
    assert torch.equal(pipe(PROMPT, **SHORT).x0, plain)
    assert (plain - expected).abs().mean() > 0.02


@pytest.mark.gpu
@pytest.mark.parametrize("merge", [True, False])
def test_on_a_gpu(three, merge: bool) -> None:
    """The numbers of the CPU within rounding, the untouched weights on the CPU, and their bits back on the GPU."""
    pipe, (a, b, _) = three
    untouched = {key: tensor.clone() for key, tensor in weights(pipe).items()}
    given = asked(pipe, False)
    with pipe.lora(a, 0.7), pipe.lora(b, 0.5, merge):
        expected = said(pipe, given)
    for net in pipe.parts().values():
        net.to("cuda")
    with pipe.lora(a, 0.7), pipe.lora(b, 0.5, merge):
        assert not any(tensor.is_cuda for tensor in pipe.unet.loras.untouched.values())
        found = said(pipe, [each.cuda() for each in given])
    for each, reference in zip(found, expected, strict=True):
        assert_close(each.cpu(), reference, 1e-3)
    assert all(tensor.is_cuda and torch.equal(tensor.cpu(), untouched[key]) for key, tensor in weights(pipe).items())


# --------------------------------------------------------------------------------------- with everything else


@pytest.mark.parametrize(
    ("sampler", "options"),
    [
        ("dpm++2m", {"guidance": 5.0}),
        ("euler-a", {"image": True, "strength": 0.6}),
        ("unipc2", {"image": True, "mask": True, "strength": 0.9}),
        ("heun", {"control": True, "clip_skip": 1}),
    ],
)
def test_merged_equals_beside_with_everything(models: Models, tmp_path, sampler: str, options: dict) -> None:
    """Whatever draws with the networks, and however their layers are called, in float64."""
    pipe = models.ours("sd1", FP64)
    if "image" in options:
        options = options | {"image": grey(1, 64, 96, 3)}
    if "mask" in options:
        options = options | {"mask": grey(2, 64, 96) // 128 * 255}
    if "control" in options:
        net = controlnets(models, "sd1", dtype=FP64)[1]
        options = options | {"control": ldm.Control(net, grey(3, 64, 96, 3))}
    file = write(tmp_path / "style.safetensors", kohya(pairs(pipe, LINEAR + CONV)))
    short = SHORT if "image" not in options else {"steps": 4, "seed": 3}
    drawn = []
    for merge in (None, True, False):
        with ExitStack() as stack:
            if merge is not None:
                stack.enter_context(pipe.lora(file, 0.7, merge))
            drawn.append(pipe(PROMPT, sampler=sampler, **short, **options).x0)
    plain, merged, beside = drawn
    assert_close(beside, merged, 1e-10)
    assert (plain - merged).abs().mean() > 0.01


# ------------------------------------------------------------------------------------------------ what it says


def test_says_how_large_the_change_is(three, capsys) -> None:
    """||dW|| / ||W|| over all that it touches, of the weights without any LoRA; and which layer changes the most."""
    pipe, (a, b, _) = three
    untouched = {key: tensor.clone() for key, tensor in weights(pipe).items()}
    pipe.add_lora(b, 2.0)
    capsys.readouterr()
    on = pipe.add_lora(a, 0.5)
    line = capsys.readouterr().err
    pipe.remove_lora("b")
    changed = {key: tensor - untouched[key] for key, tensor in weights(pipe).items() if key in on.layers}
    shares = {key: float(delta.norm() / untouched[key].norm()) for key, delta in changed.items()}
    total = sum(delta.square().sum() for delta in changed.values()) / sum(
        untouched[key].square().sum() for key in changed
    )
    assert on.change == pytest.approx(float(total.sqrt()), rel=1e-4)
    assert on.layers == pytest.approx(shares, rel=1e-3)
    most = max(shares, key=shares.get)
    unet = len(layers(pipe.unet, LINEAR))
    assert line == (
        f"a: a LoRA in kohya's names, rank 2 to 4, alpha 1.5: {unet} layers of the UNet and 18 of the text encoder; at "
        f"weight 0.5 it changes them by {100 * on.change:.2g} % (the most in {most.removesuffix('.weight')}, "
        f"{100 * shares[most]:.2g} %).\n"
    )
    assert str(on) == f"a at 0.5, merged: {unet + 18} weights changed by {100 * on.change:.2g} %" == repr(on)


def test_says_when_it_does_nothing_or_too_much(three, tmp_path, capsys) -> None:
    pipe, (a, *_) = three
    pipe.add_lora(a, 0)
    untrained = {place: pair._replace(up=0 * pair.up) for place, pair in pairs(pipe).items()}
    pipe.add_lora(write(tmp_path / "untrained.safetensors", kohya(untrained)))
    pipe.add_lora(a, -30)
    nothing, zeros, much = capsys.readouterr().err.splitlines()
    assert nothing.endswith("it changes nothing, at weight 0.")
    assert zeros.endswith("it changes nothing, for its factors are zero (it was never trained), or its alphas are.")
    assert much.endswith("that is more than the weights themselves, so expect noise, and try a smaller weight.")


def test_large_changes_in_words() -> None:
    """And their norms, whose squares are beyond all range."""
    shares = (0.000042, 0.031, 1.2, 9.99, 1234.5, 1e19, math.inf)
    assert [applied.percent(share) for share in shares] == [
        "0.0042 %", "3.1 %", "120 %", "999 %", "1,234 times their size", *["more than a million times their size"] * 2
    ]  # fmt: skip
    down, up = normal(1, 3, 9, dtype=FP64), normal(2, 8, 3, dtype=FP64)
    for change in (
        LowRank(1e100 * down, 1e100 * up),
        Full(1e200 * up @ down),
        Kronecker(w1=1e100 * up, w2=1e100 * down),
    ):
        expected = type(change)(**{name: factor / factor.abs().max() for name, factor in change.factors()}).norm()
        most = math.prod(float(factor.abs().max()) for _, factor in change.factors())
        assert change.norm() == pytest.approx(expected * most, rel=1e-12)
    assert LowRank(1e100 * down, 1e100 * up, 0.0).norm() == 0


@pytest.mark.parametrize("weight", [True, math.nan, math.inf, "0.8", None, torch.tensor(0.5)])
def test_weights_that_are_none(three, weight: object) -> None:
    pipe, (a, *_) = three
    with pytest.raises(ldm.LDMError, match="must be a finite number, such as 0"):
        pipe.add_lora(a, weight)
    assert pipe.loras == ()


def test_taking_off_what_is_not_on(three) -> None:
    pipe, (a, b, _) = three
    pipe.add_lora(a)
    with pytest.raises(ldm.LDMError, match=r"no LoRA 'aa' on this model; on are 'a'. Did you mean 'a'\?"):
        pipe.remove_lora("aa")
    with pytest.raises(RuntimeError), pipe.lora(b):
        raise RuntimeError
    assert [each.name for each in pipe.loras] == ["a"]
    with pipe.lora(open_lora(b), 0.5) as on:
        assert isinstance(on.lora, Lora)
        pipe.remove_lora(on)  # before the block ends: that is no error
