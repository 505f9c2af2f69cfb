"""FLUX's transformer equals diffusers' FluxTransformer2DModel, and formulas written out number by number.

diffusers turns queries and keys in float32, whatever the model's dtype (`REFERENCE_DEFECTS.md`): for float64 the two
places that do so are replaced by their formulas (`exact_turns`).
"""

import inspect
import json
import math
from copy import deepcopy
from functools import cache
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from diffusers.models.transformers import transformer_flux
from reference import DTYPES, assert_close, assert_gradients_close, gradients, keys_and_shapes, normal, randomise, same
from torch import nn

from ldm.errors import LDMError
from ldm.models import flux
from ldm.models.flux import Flux, FluxConfig, FluxResiduals
from ldm.models.patches import pack, places, rotary_angles, rotate, unpack
from ldm.models.unet import Extras
from ldm.schedules import ScheduleConfig, make_schedule

BATCH, TOKENS = 3, 5
# Depths, heads and widths all differ, so that no two can be mixed up.
BASE = {
    "in_channels": 12,
    "num_layers": 2,
    "num_single_layers": 3,
    "attention_head_dim": 16,
    "num_attention_heads": 3,
    "joint_attention_dim": 20,
    "pooled_projection_dim": 10,
    "axes_dims_rope": (4, 4, 8),
}
TINY = {
    "schnell": BASE,
    "dev": BASE | {"guidance_embeds": True},
    "fill": BASE | {"guidance_embeds": True, "in_channels": 40, "out_channels": 12},
    "double-only": BASE | {"num_single_layers": 0, "axes_dims_rope": (2, 6, 8)},
}
T = torch.tensor([1000.0, 3.5, 333.25])  # the noisiest level, almost the cleanest, and one between two integers


@cache
def pair(name, dtype=torch.float64):
    """The reference, every parameter drawn, and ours with the same parameters."""
    reference = randomise(FluxTransformer2DModel(**TINY[name])).to(dtype).eval()
    return reference, same(lambda: Flux(FluxConfig.from_json(TINY[name])), reference)


def inputs(name, dtype=torch.float64, size=(8, 12)):
    """x, context and extras for one of `TINY`."""
    config = FluxConfig.from_json(TINY[name])
    x = normal(1, BATCH, config.channels_in, *size, dtype=dtype)
    context = normal(2, BATCH, TOKENS, config.joint_attention_dim, dtype=dtype)
    guidance = torch.tensor([3.5, 1.0, 30.0], dtype=dtype) if config.guidance_embeds else None
    return x, context, Extras(pooled=normal(3, BATCH, config.pooled_projection_dim, dtype=dtype), guidance=guidance)


@pytest.fixture
def exact_turns(monkeypatch):
    """diffusers' rotary embedding in the dtype of what is turned, where it has float32."""

    def angles(self, ids):
        parts = [
            ids[:, k, None].double()
            * torch.tensor([self.theta ** (-2 * i / d) for i in range(d // 2)], dtype=torch.float64)
            for k, d in enumerate(self.axes_dim)
        ]
        parts = torch.cat(parts, 1).repeat_interleave(2, 1)
        return parts.cos(), parts.sin()

    def turned(x, cos_sin, sequence_dim):
        cos, sin = (table[None, :, None] for table in cos_sin)
        aside = torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)
        return (x * cos + aside * sin).to(x.dtype)

    monkeypatch.setattr(transformer_flux.FluxPosEmbed, "forward", angles)
    monkeypatch.setattr(transformer_flux, "apply_rotary_emb", turned)


def run_reference(reference, x, t, context, extras, **more):
    """diffusers packs outside of the model, and is told thousandths."""
    height, width = x.shape[2:]
    packed = FluxPipeline._pack_latents(x, len(x), x.shape[1], height, width)
    ids = FluxPipeline._prepare_latent_image_ids(len(x), height // 2, width // 2, x.device, x.dtype)
    t = torch.as_tensor(t, dtype=x.dtype).expand(len(x)) / 1000
    text = torch.zeros(context.shape[1], 3)
    out = reference(packed, context, extras.pooled, t, ids, text, extras.guidance, **more).sample
    return FluxPipeline._unpack_latents(out, height * 8, width * 8, 8)


# ---------------------------------------------------------------------------------------------------- parity


@pytest.mark.parametrize("name", TINY)
@torch.no_grad()
def test_output_equals_diffusers_in_float64(name, exact_turns):
    reference, ours = pair(name)
    x, context, extras = inputs(name)
    assert_close(ours(x, T, context, extras), run_reference(reference, x, T, context, extras), 1e-11)


@pytest.mark.parametrize("name", TINY)
@torch.no_grad()
def test_output_equals_diffusers_as_it_is_in_float32(name):
    reference, ours = pair(name, torch.float32)
    x, context, extras = inputs(name, torch.float32)
    assert_close(ours(x, T, context, extras), run_reference(reference, x, T, context, extras), DTYPES[torch.float32])


@pytest.mark.parametrize("size", [(2, 2), (2, 14), (10, 4), (6, 6)])
@torch.no_grad()
def test_every_size_equals_diffusers(size, exact_turns):
    reference, ours = pair("dev")
    x, context, extras = inputs("dev", size=size)
    assert_close(ours(x, T, context, extras), run_reference(reference, x, T, context, extras), 1e-11)


@pytest.mark.parametrize("t", [7, 421.5, torch.tensor(999), torch.tensor([3.0, 2.0, 1.0])], ids=str)
@torch.no_grad()
def test_timestep_may_be_a_number_or_one_a_picture(t, exact_turns):
    reference, ours = pair("schnell")
    x, context, extras = inputs("schnell")
    assert_close(ours(x, t, context, extras), run_reference(reference, x, t, context, extras), 1e-11)


@torch.no_grad()
def test_what_controlnets_add_is_added_where_diffusers_adds_it(exact_turns):
    reference, ours = pair("dev")
    x, context, extras = inputs("dev")
    double = [normal(10 + i, BATCH, 24, 48, dtype=torch.float64) for i in range(2)]
    single = [normal(20 + i, BATCH, 24, 48, dtype=torch.float64) for i in range(3)]
    plain = ours(x, T, context, extras)
    for added in ((double, ()), ((), single), (double, single)):
        names = ("controlnet_block_samples", "controlnet_single_block_samples")
        expected = run_reference(
            reference, x, T, context, extras, **{k: v or None for k, v in zip(names, added, strict=True)}
        )
        got = ours(x, T, context, extras, residuals=FluxResiduals(*added))
        assert_close(got, expected, 1e-11)
        assert (got - plain).abs().mean() > 0.01  # they do something
    with pytest.raises(IndexError):  # a residual too few isn't passed over
        ours(x, T, context, extras, residuals=FluxResiduals(double[:1]))


def test_gradients_equal_diffusers(exact_turns):
    reference, ours = pair("dev")
    x, context, extras = inputs("dev", size=(6, 4))
    leaves = [x.requires_grad_(), context.requires_grad_(), extras.pooled.requires_grad_()]
    weights = normal(5, *x.shape, dtype=torch.float64)
    expected = gradients((run_reference(reference, x, T, context, extras) * weights).sum(), reference, leaves)
    assert_gradients_close(gradients((ours(x, T, context, extras) * weights).sum(), ours, leaves), expected)


@torch.no_grad()
def test_defect_diffusers_turns_in_float32_whatever_the_dtype():
    """What it costs in float64; nothing in float32 (above) or below it, where ours turns in float32, too."""
    reference, ours = pair("dev")
    x, context, extras = inputs("dev")
    off = (ours(x, T, context, extras) - run_reference(reference, x, T, context, extras)).abs().max()
    assert 1e-9 < off < 1e-6
    q = normal(1, 1, 4, 1, 16, dtype=torch.float64)
    tables = reference.pos_embed(places(0, 4, 4))
    assert tables[0].dtype == torch.float32
    turned = transformer_flux.apply_rotary_emb(q, tables, sequence_dim=1)
    assert turned.dtype == torch.float64 and torch.equal(turned, turned.float().double())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_half_precision_departs_from_float32_no_more_than_diffusers(dtype):
    truth, _ = pair("dev", torch.float32)
    reference, ours = pair("dev", dtype)
    x, context, extras = inputs("dev", dtype)
    # diffusers rounds these three and those three times 1000, which half precision can hold: `compat` is for others
    t, extras = torch.tensor([1000.0, 250.0, 125.0]), extras._replace(guidance=torch.tensor([4.0, 1.0, 32.0]))
    plain = Extras(pooled=extras.pooled.float(), guidance=extras.guidance.float())
    expected = run_reference(truth, x.float(), t, context.float(), plain)
    theirs = (run_reference(reference, x, t, context, extras).float() - expected).abs().mean()
    mine = ours(x, t, context, extras)
    assert mine.dtype == dtype and 0 < (mine.float() - expected).abs().mean() < 1.2 * theirs < 0.1


# ---------------------------------------------------------------------------------------------------- second truth


def layer(weights, name, x):
    return weights[name + ".weight"] @ x + weights[name + ".bias"]


def rms(weights, name, x):
    return x / np.sqrt(np.mean(x**2) + 1e-6) * weights[name + ".weight"]


def normed(x, shift, scale):
    return (x - x.mean()) / np.sqrt(x.var() + 1e-6) * (1 + scale) + shift


def gelu(x):
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def silu(x):
    return x / (1 + np.exp(-x))


def turned(x, place, axes):
    """Every pair of numbers as a complex number, turned by e^(i place theta^(-2k/d))."""
    angles = np.concatenate([p * 10000.0 ** (-np.arange(0, d, 2) / d) for p, d in zip(place, axes, strict=True)])
    z = (x[0::2] + 1j * x[1::2]) * np.exp(1j * angles)
    return np.stack([z.real, z.imag], 1).ravel()


def attention(q, k, v, ids, heads, axes):
    """One query, one head at a time."""
    n, head = len(q), len(q[0]) // heads
    out = np.zeros((n, heads * head))
    for h in range(heads):
        part = slice(h * head, (h + 1) * head)
        keys = [turned(k[j][part], ids[j], axes) for j in range(n)]
        for i in range(n):
            scores = np.array([turned(q[i][part], ids[i], axes) @ key for key in keys]) / math.sqrt(head)
            chances = np.exp(scores - scores.max())
            out[i, part] = sum(c * v[j][part] for j, c in enumerate(chances / chances.sum()))
    return out


def heads_normed(weights, name, x, heads):
    return np.concatenate([rms(weights, name, part) for part in np.split(x, heads)])


def written_out_double(w, x, text, emb, ids, heads, axes):
    """The block of two streams, one token at a time (Esser et al. 2024, figure 2b)."""
    own = np.split(layer(w, "norm1.linear", silu(emb)), 6)
    other = np.split(layer(w, "norm1_context.linear", silu(emb)), 6)
    q, k, v = [], [], []
    for tokens, m, names, norms in (
        (text, other, ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"), ("norm_added_q", "norm_added_k")),
        (x, own, ("attn.to_q", "attn.to_k", "attn.to_v"), ("norm_q", "norm_k")),
    ):
        for token in tokens:
            h = normed(token, m[0], m[1])
            q.append(heads_normed(w, "attn." + norms[0], layer(w, names[0], h), heads))
            k.append(heads_normed(w, "attn." + norms[1], layer(w, names[1], h), heads))
            v.append(layer(w, names[2], h))
    seen = attention(q, k, v, ids, heads, axes)
    out = []
    for i, token in enumerate([*text, *x]):
        m, to, ff = (other, "attn.to_add_out", "ff_context") if i < len(text) else (own, "attn.to_out.0", "ff")
        token = token + m[2] * layer(w, to, seen[i])
        h = normed(token, m[3], m[4])
        out.append(token + m[5] * layer(w, ff + ".net.2", gelu(layer(w, ff + ".net.0.proj", h))))
    return np.array(out[len(text) :]), np.array(out[: len(text)])


def written_out_single(w, x, emb, ids, heads, axes):
    """The block of one stream (Dehghani et al. 2023, section 2)."""
    shift, scale, gate = np.split(layer(w, "norm.linear", silu(emb)), 3)
    h = [normed(token, shift, scale) for token in x]
    q = [heads_normed(w, "attn.norm_q", layer(w, "attn.to_q", token), heads) for token in h]
    k = [heads_normed(w, "attn.norm_k", layer(w, "attn.to_k", token), heads) for token in h]
    seen = attention(q, k, [layer(w, "attn.to_v", token) for token in h], ids, heads, axes)
    joined = [np.concatenate([s, gelu(layer(w, "proj_mlp", token))]) for s, token in zip(seen, h, strict=True)]
    return np.array([token + gate * layer(w, "proj_out", j) for token, j in zip(x, joined, strict=True)])


@torch.no_grad()
def test_blocks_equal_formulas_written_out():
    _, ours = pair("schnell")
    config, axes = ours.config, TINY["schnell"]["axes_dims_rope"]
    heads, ids = config.num_attention_heads, places(3, 4, 6)
    x, text, emb = (normal(i, 1, *s, config.width).double() for i, s in ((1, (6,)), (2, (3,)), (3, ())))
    rotary = ours.rotary(3, 4, 6, x.device)
    for block in (ours.transformer_blocks[1], ours.single_transformer_blocks[2]):
        w = {name: value.numpy() for name, value in block.state_dict().items()}
        if isinstance(block, flux.DoubleBlock):
            got = block(x, text, block.modulations(emb), rotary)
            arguments = (x[0].numpy(), text[0].numpy(), emb[0].numpy(), ids.numpy(), heads, axes)
            for mine, expected in zip(got, written_out_double(w, *arguments), strict=True):
                assert_close(mine[0], torch.from_numpy(expected), 1e-12)
        else:
            both = torch.cat([text, x], 1)
            expected = written_out_single(w, both[0].numpy(), emb[0].numpy(), ids.numpy(), heads, axes)
            assert_close(block(both, block.modulations(emb), rotary)[0], torch.from_numpy(expected), 1e-12)


@torch.no_grad()
def test_the_last_layer_scales_by_the_first_half_and_shifts_by_the_second():
    """In all other layers shift comes first: files of the authors and of diffusers differ just here."""
    _, ours = pair("schnell")
    x, context, extras = inputs("schnell")
    seen = {}
    hook = ours.proj_out.register_forward_pre_hook(lambda _, args: seen.update(x=args[0]))
    last = ours.single_transformer_blocks[-1].register_forward_hook(lambda _, __, out: seen.update(h=out))
    ours(x, T, context, extras)
    hook.remove(), last.remove()
    scale, shift = nn.functional.linear(
        nn.functional.silu(ours.embed(T, extras)), ours.norm_out.linear.weight, ours.norm_out.linear.bias
    ).chunk(2, -1)
    h = seen["h"][:, TOKENS:]
    h = (h - h.mean(-1, keepdim=True)) / (h.var(-1, keepdim=True, correction=0) + 1e-6).sqrt()
    assert_close(seen["x"], h * (1 + scale[:, None]) + shift[:, None], 1e-12)
    assert (seen["x"] - (h * (1 + shift[:, None]) + scale[:, None])).abs().mean() > 0.1


def test_rms_norm_is_the_formula():
    norm = flux.RMSNorm(6).double()
    norm.weight.data = normal(1, 6).double()
    x = normal(2, 4, 6).double() * torch.tensor([1e-4, 1e-2, 1, 100]).double()[:, None]  # eps counts in the first
    gains = norm.weight.tolist()
    expected = [[v / math.sqrt(sum(u * u for u in row) / 6 + 1e-6) * g for v, g in zip(row, gains, strict=True)]
                for row in x.tolist()]  # fmt: skip
    assert_close(norm(x).detach(), torch.tensor(expected, dtype=torch.float64), 1e-14)


# ---------------------------------------------------------------------------------------------- patches and places


def test_packing_is_diffusers_and_undone_by_unpacking():
    x = normal(1, 2, 3, 6, 10)
    packed = pack(x)
    assert torch.equal(packed, FluxPipeline._pack_latents(x, 2, 3, 6, 10))
    assert torch.equal(unpack(packed, 6, 10), x)
    assert torch.equal(packed[1, 5 + 2, 4 * 2 : 4 * 2 + 4], x[1, 2, 2:4, 4:6].flatten())  # row 1, column 2, channel 2


def test_what_is_read_beside_the_latent_may_be_joined_before_packing():
    x, beside = normal(1, 2, 3, 4, 6), normal(2, 2, 5, 4, 6)
    assert torch.equal(pack(torch.cat([x, beside], 1)), torch.cat([pack(x), pack(beside)], 2))


def test_places_are_diffusers():
    expected = FluxPipeline._prepare_latent_image_ids(1, 3, 5, "cpu", torch.float32)
    assert torch.equal(places(4, 6, 10), torch.cat([torch.zeros(4, 3), expected]))


def dots(q, k, p, r, axes=(4, 4, 8)):
    """q at place p times k at place r."""
    tables = [rotary_angles(torch.tensor([place]), axes)[:, None] for place in (p, r)]
    q, k = (rotate(x, (table.cos(), table.sin())) for x, table in zip((q, k), tables, strict=True))
    return (q * k).sum().item()


def test_turned_products_depend_on_the_difference_of_places_alone():
    """Su et al. 2021, equation 16; and each of the three axes counts."""
    q, k = (normal(i, 1, 1, 1, 16, dtype=torch.float64) for i in (1, 2))
    here = dots(q, k, (0.0, 3.0, 5.0), (0.0, 7.0, 1.0))
    assert abs(here - dots(q, k, (9.0, 103.0, 55.0), (9.0, 107.0, 51.0))) < 1e-11
    for other in ((1.0, 7.0, 1.0), (0.0, 8.0, 1.0), (0.0, 7.0, 2.0)):
        assert abs(here - dots(q, k, (0.0, 3.0, 5.0), other)) > 1e-3
    assert abs(here - dots(q, k, (0.0, 7.0, 1.0), (0.0, 3.0, 5.0))) > 1e-3  # not of its size alone


def test_a_table_of_places_that_inference_made_serves_a_training():
    _, ours = pair("schnell")
    flux.rotary_table.cache_clear()
    with torch.inference_mode(), torch.device("meta"):
        tables = ours.rotary(3, 14, 22, torch.device("cpu"))
    assert ours.rotary(3, 14, 22, torch.device("cpu")) is tables and tables[0].device.type == "cpu"
    assert not tables[0].is_inference()


@torch.no_grad()
def test_latents_of_which_no_patches_can_be_made_are_refused():
    _, ours = pair("schnell")
    x, context, extras = inputs("schnell")
    for wrong in (x[:, :1], x[:, :, :-1], x[..., :-1]):
        with pytest.raises(LDMError, match=r"this transformer reads \d+ channels, of an even number of positions"):
            ours(wrong, 500.0, context, extras)


@torch.no_grad()
def test_a_model_whose_places_are_all_moved_draws_the_same(monkeypatch):
    """But not where the picture moves against the text, or the text against itself."""
    _, ours = pair("dev")
    x, context, extras = inputs("dev")
    out = ours(x, T, context, extras)
    for move, part, same_again in (
        ((5.0, 40.0, 17.0), slice(None), True),
        ((0.0, 40.0, 17.0), slice(TOKENS, None), False),
        ((0.0, 0.0, 1.0), slice(0, 1), False),
    ):
        ids = places(TOKENS, 8, 12)
        ids[part] += torch.tensor(move)
        angles = rotary_angles(ids, ours.config.axes_dims_rope)[:, None]
        monkeypatch.setattr(flux, "rotary_table", lambda *_: (angles.cos(), angles.sin()))  # noqa: B023
        off = (ours(x, T, context, extras) - out).abs().max()
        assert (off < 1e-10) == same_again and (off > 1e-4) != same_again


# ---------------------------------------------------------------------------------------------- what is prepared


@pytest.mark.parametrize("name", ["schnell", "dev"])
@torch.no_grad()
def test_a_table_of_modulations_changes_nothing(name):
    _, ours = pair(name)
    x, context, extras = inputs(name)
    times = (1000.0, 421.5, 3.0)
    prepared, bare = ours.prepare(context, extras, times), ours.prepare(context, extras)
    assert list(prepared.table) == list(times) and not bare.table
    for t in (*times, 5.0):  # one preparation serves every step; what isn't in the table is computed
        plain = ours(x, t, context, extras)
        assert torch.equal(ours(x, t, bare), plain)
        assert_close(ours(x, t, prepared), plain, 1e-12)  # all timesteps in one product: another order of its sums
    for module in ours.modules():  # the table is read: with it the modulations' weights are needed no more
        if isinstance(module, flux.Modulation | flux.Told):
            module.forward = None
    try:
        assert torch.equal(ours(x, 421.5, prepared), ours(x, 421.5, prepared))
    finally:
        for module in ours.modules():
            if isinstance(module, flux.Modulation | flux.Told):
                del module.forward


@torch.no_grad()
def test_pictures_of_a_batch_do_not_touch_each_other():
    _, ours = pair("fill")
    x, context, extras = inputs("fill")
    out = ours(x, T, context, extras)
    order = torch.tensor([2, 0, 1])
    mixed = Extras(pooled=extras.pooled[order], guidance=extras.guidance[order])
    assert_close(ours(x[order], T[order], context[order], mixed), out[order], 1e-12)
    assert (out - out[order]).abs().mean() > 0.1  # the pictures do differ


@torch.no_grad()
def test_float16_is_clipped_where_the_reference_clips():
    _, ours = pair("schnell")
    block = ours.single_transformer_blocks[0]
    for dtype, ends in ((torch.float16, True), (torch.bfloat16, False), (torch.float64, False)):
        x = torch.tensor([1e5, -1e5, 3.0]).to(dtype)  # infinite in float16
        assert torch.equal(flux.in_range(x), torch.tensor([65504.0, -65504.0, 3.0]).to(dtype) if ends else x)
    x, text = torch.full((1, 4, 48), 6e4).half(), torch.full((1, 2, 48), -6e4).half()
    big = [torch.zeros(1, 6 * 48).half() for _ in range(2)]
    for vectors in big:
        vectors[:, 5 * 48 :] = 6e4  # the feed-forward's gate
    rotary = ours.rotary(2, 4, 4, x.device)
    got, said = deepcopy(ours.transformer_blocks[0]).half()(x, text, tuple(big), rotary)
    assert said.isfinite().all() and said.abs().max() == 65504 and got.isinf().any()  # the text's stream alone
    one_big = torch.zeros(1, 3 * 48).half()
    one_big[:, 2 * 48 :] = 6e4
    one = deepcopy(block).half()(torch.cat([text, x], 1), one_big, rotary)
    assert one.isfinite().all() and one.abs().max() == 65504  # all of it


# ---------------------------------------------------------------------------------------------------- configuration

# As published in the `transformer/config.json` of the models named, and how many parameters they have.
PUBLISHED = {
    "black-forest-labs/FLUX.1-schnell": ({"guidance_embeds": False}, 11_891_178_560),
    "black-forest-labs/FLUX.1-dev": ({"guidance_embeds": True}, 11_901_408_320),
    "black-forest-labs/FLUX.1-Fill-dev": ({"guidance_embeds": True, "in_channels": 384, "out_channels": 64}, None),
    "black-forest-labs/FLUX.1-Canny-dev": ({"guidance_embeds": True, "in_channels": 128, "out_channels": 64}, None),
}
COMMON = {
    "_class_name": "FluxTransformer2DModel",
    "_diffusers_version": "0.30.0.dev0",
    "attention_head_dim": 128,
    "in_channels": 64,
    "joint_attention_dim": 4096,
    "num_attention_heads": 24,
    "num_layers": 19,
    "num_single_layers": 38,
    "patch_size": 1,
    "pooled_projection_dim": 768,
    "axes_dims_rope": [16, 56, 56],
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configurations_give_the_published_keys_and_shapes(name):
    fields, parameters = COMMON | PUBLISHED[name][0], PUBLISHED[name][1]
    config = FluxConfig.from_json(fields)
    with torch.device("meta"):
        reference, ours = FluxTransformer2DModel.from_config(fields), Flux(config)
        assert keys_and_shapes(ours) == keys_and_shapes(reference)
        if parameters:
            assert sum(p.numel() for p in ours.parameters()) == parameters
        written = json.loads(json.dumps(config.to_json()))  # diffusers reads it as the same model, and so do we
        small = written | {"num_layers": 1, "num_single_layers": 1}
        again = keys_and_shapes(FluxTransformer2DModel.from_config(small))
    assert again.items() <= keys_and_shapes(ours).items()
    assert FluxConfig.from_json(written) == config == FluxConfig.from_json(dict(reference.config))
    beside = {"Fill": (96, 16), "Canny": (32, 16)}.get(name.split("-")[-2].split(".")[0], (16, 16))
    assert (config.channels_in, config.channels_out) == beside


def test_defaults_and_neutral_values_are_those_of_diffusers():
    parameters = inspect.signature(FluxTransformer2DModel.__init__).parameters
    defaults = {key: p.default for key, p in parameters.items() if key != "self"}
    assert FluxConfig.from_json(defaults) == FluxConfig() == FluxConfig.from_json({})


REFUSED = [
    ({"patch_size": 2}, "patch_size"),
    ({"a_field_of_the_future": None}, "a_field_of_the_future"),
    ({"_class_name": "SD3Transformer2DModel"}, "SD3Transformer2DModel"),
    ({"axes_dims_rope": [16, 56, 48]}, r"axes_dims_rope .* whose sum is attention_head_dim, 128"),
    ({"axes_dims_rope": [64, 64]}, "must be three even numbers"),
    ({"axes_dims_rope": [15, 57, 56]}, "must be three even numbers"),
    ({"in_channels": 6}, "in_channels 6: a patch of 2x2"),
    ({"out_channels": 5}, "out_channels 5: a patch of 2x2"),
]


@pytest.mark.parametrize("fields, said", REFUSED)
def test_what_is_not_implemented_is_refused_by_name(fields, said):
    with pytest.raises(LDMError, match=said):
        FluxConfig.from_json(COMMON | fields)


@pytest.mark.parametrize("extras, said", [(Extras(), "pass pooled, guidance in"), (Extras(pooled=1), "pass guidance")])
def test_a_transformer_that_asks_for_more_says_so(extras, said):
    x, context, _ = inputs("dev")
    with pytest.raises(LDMError, match=said):
        pair("dev")[1](x, T, context, extras)


# ---------------------------------------------------------------------------------------------------- its schedule


@pytest.mark.parametrize("n", [1, 4, 28, 50])
@pytest.mark.parametrize("height, width, mu", [(1024, 1024, 1.15), (256, 256, 0.5), (512, 768, None)])
def test_noise_levels_are_those_of_the_authors(n, height, width, mu):
    """Their `get_schedule`: a line from 1 to 0, moved by e^mu / (e^mu + (1/t - 1)), mu on a line through two sizes."""
    patches = (height // 16) * (width // 16)
    slope = (1.15 - 0.5) / (4096 - 256)
    mu_here = slope * patches + (0.5 - slope * 256)
    assert mu is None or mu_here == pytest.approx(mu)
    line = [1 - i / n for i in range(n + 1)]
    expected = [math.exp(mu_here) / (math.exp(mu_here) + (1 / t - 1) ** 1.0) if t else 0.0 for t in line]
    config = SimpleNamespace(dev={"use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15, "shift": 3.0},
                             schnell={"shift": 1.0})  # fmt: skip
    name = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000}
    dev = make_schedule(ScheduleConfig.from_json(name | config.dev), n, tokens=patches, sigmas="even")
    np.testing.assert_allclose([level.sigma for level in dev.levels], expected, atol=1e-7)
    schnell = make_schedule(ScheduleConfig.from_json(name | config.schnell), n, sigmas="even")
    np.testing.assert_allclose([level.sigma for level in schnell.levels], line, atol=1e-7)
    assert [level.t for level in schnell.levels[:-1]] == pytest.approx([1000 * t for t in line[:-1]])


def test_a_shift_is_that_of_a_larger_picture():
    """Esser et al. 2024, equation 23: t_m = sqrt(m/n) t / (1 + (sqrt(m/n) - 1) t), for m/n the ratio of sizes."""
    for ratio in (1.0, 3.0, 4.0, 9.0):
        a = math.sqrt(ratio)
        config = ScheduleConfig.from_json({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": a})
        got = [level.sigma for level in make_schedule(config, 5, sigmas="even").levels]
        expected = [a * t / (1 + (a - 1) * t) for t in (1, 0.8, 0.6, 0.4, 0.2, 0)]
        np.testing.assert_allclose(got, expected, atol=1e-7)
