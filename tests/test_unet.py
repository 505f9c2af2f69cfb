"""The UNet equals diffusers' UNet2DConditionModel: output, gradients, key names, and how it reads configurations."""

import inspect
import json
from functools import cache

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from reference import DTYPES, assert_close, assert_gradients_close, gradients, keys_and_shapes, normal, randomise, same

from ldm.errors import LDMError
from ldm.models.blocks import Attention, timestep_embedding
from ldm.models.unet import NEUTRAL, Extras, UNet, UNetConfig

DOWN, CROSS_DOWN, UP, CROSS_UP = "DownBlock2D", "CrossAttnDownBlock2D", "UpBlock2D", "CrossAttnUpBlock2D"
BATCH, TOKENS, WIDTH = 3, 7, 20

# Widths, heads and depths differ from level to level, so that a mix-up of levels shows.
BASE = {
    "block_out_channels": [8, 16, 24, 32],
    "down_block_types": [CROSS_DOWN, CROSS_DOWN, CROSS_DOWN, DOWN],
    "up_block_types": [UP, CROSS_UP, CROSS_UP, CROSS_UP],
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "cross_attention_dim": WIDTH,
    "attention_head_dim": 4,
}
TINY = {
    "sd1": BASE | {"layers_per_block": 2},
    "sd1-inpaint": BASE | {"in_channels": 9},
    "sd2": BASE | {"attention_head_dim": [2, 4, 3, 8], "use_linear_projection": True, "upcast_attention": True},
    "sdxl": BASE
    | {
        "block_out_channels": [8, 16, 24],
        "down_block_types": [DOWN, CROSS_DOWN, CROSS_DOWN],
        "up_block_types": [CROSS_UP, CROSS_UP, UP],
        "attention_head_dim": [2, 4, 3],
        "transformer_layers_per_block": [1, 2, 3],
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 6,
        "projection_class_embeddings_input_dim": 6 * 6 + 10,
    },
    "refiner": BASE
    | {
        "down_block_types": [DOWN, CROSS_DOWN, CROSS_DOWN, DOWN],
        "up_block_types": [UP, CROSS_UP, CROSS_UP, UP],
        "attention_head_dim": [2, 4, 3, 8],
        "transformer_layers_per_block": 2,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 6,
        "projection_class_embeddings_input_dim": 5 * 6 + 10,
    },
    "x4": BASE
    | {
        "in_channels": 7,
        "down_block_types": [DOWN, CROSS_DOWN, CROSS_DOWN, CROSS_DOWN],
        "up_block_types": [CROSS_UP, CROSS_UP, CROSS_UP, UP],
        "only_cross_attention": [True, True, True, False],
        "use_linear_projection": True,
        "num_class_embeds": 50,
    },
    "lcm": BASE | {"time_cond_proj_dim": 12},
    "other-numbers": BASE
    | {"norm_eps": 1e-3, "freq_shift": 1, "flip_sin_to_cos": False, "layers_per_block": 3, "out_channels": 8},
}
T = torch.tensor([981.0, 0.0, 333.3])  # of a first step, of the last, and one of Karras's between two integers


@cache
def pair(name, dtype=torch.float64):
    """The reference, every parameter drawn, and ours with the same parameters."""
    reference = randomise(UNet2DConditionModel(**TINY[name])).to(dtype).eval()
    return reference, same(lambda: UNet(UNetConfig.from_json(TINY[name])), reference)


def inputs(name, dtype, size=(16, 24)):
    """x, context and extras for one of `TINY`."""
    config = TINY[name]
    x = normal(1, BATCH, config.get("in_channels", 4), *size, dtype=dtype)
    extras = Extras()
    if name == "sdxl":
        time_ids = torch.tensor([[1024, 768, 0, 16, 512, 640], [72, 40, 8, 0, 40, 72], [1, 2, 3, 4, 5, 6]])
        extras = Extras(pooled=normal(3, BATCH, 10, dtype=dtype), time_ids=time_ids.to(dtype))
    if name == "refiner":
        time_ids = torch.tensor([[1024, 768, 0, 16, 6.0], [72, 40, 8, 0, 2.5], [1, 2, 3, 4, 9.25]])
        extras = Extras(pooled=normal(3, BATCH, 10, dtype=dtype), time_ids=time_ids.to(dtype))
    if name == "x4":
        extras = Extras(class_labels=torch.tensor([20, 0, 49]))
    if name == "lcm":
        extras = Extras(guidance=normal(4, BATCH, 12, dtype=dtype))
    return x, normal(2, BATCH, TOKENS, WIDTH, dtype=dtype), extras


def run_reference(reference, x, t, context, extras, residuals=None):
    added = {"text_embeds": extras.pooled, "time_ids": extras.time_ids} if extras.pooled is not None else None
    down, mid = residuals or (None, None)
    return reference(
        x,
        t,
        context,
        class_labels=extras.class_labels,
        timestep_cond=extras.guidance,
        added_cond_kwargs=added,
        down_block_additional_residuals=down,
        mid_block_additional_residual=mid,
    ).sample


# ----------------------------------------------------------------------------------------------------------- parity


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", TINY)
@torch.no_grad()
def test_output_equals_diffusers(name, dtype):
    reference, unet = pair(name, dtype)
    x, context, extras = inputs(name, dtype)
    assert_close(unet(x, T, context, extras), run_reference(reference, x, T, context, extras), DTYPES[dtype])


@pytest.mark.parametrize("size", [(9, 5), (13, 22), (8, 1)])
@pytest.mark.parametrize("name", ["sd1", "sdxl"])
@torch.no_grad()
def test_sizes_that_halve_unevenly_equal_diffusers(name, size):
    reference, unet = pair(name)
    x, context, extras = inputs(name, torch.float64, size)
    assert_close(unet(x, T, context, extras), run_reference(reference, x, T, context, extras), 1e-11)


@pytest.mark.parametrize("t", [7, 421.5, torch.tensor(999), torch.tensor([3, 2, 1])], ids=str)
@torch.no_grad()
def test_timestep_may_be_a_number_or_one_a_picture(t):
    reference, unet = pair("sd1")
    x, context, extras = inputs("sd1", torch.float64)
    assert_close(unet(x, t, context), run_reference(reference, x, t, context, extras), 1e-11)


@torch.no_grad()
def test_controlnet_residuals_are_added_where_diffusers_adds_them():
    reference, unet = pair("sd1")
    x, context, extras = inputs("sd1", torch.float64, (9, 14))
    h, skips = unet.encode(unet.conv_in(x), unet.embed(T), context)
    down = [normal(10 + i, *skip.shape, dtype=torch.float64) for i, skip in enumerate(skips)]
    mid = normal(9, *h.shape, dtype=torch.float64)
    expected = run_reference(reference, x, T, context, extras, (tuple(down), mid))
    assert_close(unet(x, T, context, residuals=(down, mid)), expected, 1e-11)
    assert_close(unet(x, T, context), run_reference(reference, x, T, context, extras), 1e-11)
    with pytest.raises(ValueError):  # a residual too few isn't passed over
        unet(x, T, context, residuals=(down[:-1], mid))


@pytest.mark.parametrize("name", ["sd1", "sdxl", "x4"])
def test_gradients_equal_diffusers(name):
    reference, unet = pair(name)
    x, context, extras = inputs(name, torch.float64, (10, 7))
    leaves = [x.requires_grad_(), context.requires_grad_()]
    if extras.pooled is not None:
        leaves.append(extras.pooled.requires_grad_())
    expected, ours = run_reference(reference, x, T, context, extras), unet(x, T, context, extras)
    weights = normal(5, *ours.shape, dtype=torch.float64)
    expected, ours = (
        gradients((expected * weights).sum(), reference, leaves),
        gradients((ours * weights).sum(), unet, leaves),
    )
    assert_gradients_close(ours, expected)


@pytest.mark.parametrize("name", ["sd1", "sdxl", "x4"])
@torch.no_grad()
def test_prepared_context_equals_plain(name):
    _, unet = pair(name)
    x, context, extras = inputs(name, torch.float64)
    prepared = unet.prepare(context)
    cross = [m for m in unet.modules() if isinstance(m, Attention) and m.to_k.in_features == WIDTH]
    assert set(prepared) == set(cross)
    for t in (T, 5):  # one preparation serves every step
        assert_close(unet(x, t, prepared, extras), unet(x, t, context, extras), 1e-12)


@torch.no_grad()
def test_pictures_of_a_batch_do_not_touch_each_other():
    for name in ("sdxl", "x4", "lcm"):
        _, unet = pair(name)
        x, context, extras = inputs(name, torch.float64)
        out = unet(x, T, context, extras)
        order = torch.tensor([2, 0, 1])
        mixed = Extras(*(None if e is None else e[order] for e in extras))
        assert_close(unet(x[order], T[order], context[order], mixed), out[order], 1e-12)
        assert (out - out[order]).abs().mean() > 0.1  # the pictures do differ


# ---------------------------------------------------------------------------------------------- timestep embedding


@pytest.mark.parametrize("flip, shift, width", [(True, 0, 320), (False, 0, 32), (True, 1, 8), (False, 1, 256)])
def test_timestep_embedding_is_the_formula(flip, shift, width):
    t = np.array([0.0, 1.0, 17.5, 500.0, 999.0])
    angle = t[:, None] * 10000.0 ** (-np.arange(width // 2) / (width // 2 - shift))
    waves = [np.cos(angle), np.sin(angle)] if flip else [np.sin(angle), np.cos(angle)]
    ours = timestep_embedding(torch.tensor(t), width, flip, shift)
    # float32: the angle 999 itself is known to 6e-5
    assert_close(ours, torch.tensor(np.concatenate(waves, 1)).float(), 2e-4)


def test_timestep_embedding_is_float32_and_tells_neighbours_apart():
    waves = timestep_embedding(torch.tensor([999, 998]), 320)
    assert waves.dtype == torch.float32 and (waves[0] - waves[1]).abs().max() > 0.8


# ---------------------------------------------------------------------------------------------------- configuration

# As published in the `unet/config.json` of the models named.
PUBLISHED = {
    "runwayml/stable-diffusion-v1-5": {
        "_class_name": "UNet2DConditionModel",
        "_diffusers_version": "0.6.0",
        "act_fn": "silu",
        "attention_head_dim": 8,
        "block_out_channels": [320, 640, 1280, 1280],
        "center_input_sample": False,
        "cross_attention_dim": 768,
        "down_block_types": [CROSS_DOWN, CROSS_DOWN, CROSS_DOWN, DOWN],
        "downsample_padding": 1,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "in_channels": 4,
        "layers_per_block": 2,
        "mid_block_scale_factor": 1,
        "norm_eps": 1e-05,
        "norm_num_groups": 32,
        "out_channels": 4,
        "sample_size": 64,
        "up_block_types": [UP, CROSS_UP, CROSS_UP, CROSS_UP],
    },
    "stabilityai/stable-diffusion-2-1": {
        "_class_name": "UNet2DConditionModel",
        "_diffusers_version": "0.10.0.dev0",
        "act_fn": "silu",
        "attention_head_dim": [5, 10, 20, 20],
        "block_out_channels": [320, 640, 1280, 1280],
        "center_input_sample": False,
        "cross_attention_dim": 1024,
        "down_block_types": [CROSS_DOWN, CROSS_DOWN, CROSS_DOWN, DOWN],
        "downsample_padding": 1,
        "dual_cross_attention": False,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "in_channels": 4,
        "layers_per_block": 2,
        "mid_block_scale_factor": 1,
        "norm_eps": 1e-05,
        "norm_num_groups": 32,
        "num_class_embeds": None,
        "only_cross_attention": False,
        "out_channels": 4,
        "sample_size": 96,
        "up_block_types": [UP, CROSS_UP, CROSS_UP, CROSS_UP],
        "upcast_attention": True,
        "use_linear_projection": True,
    },
    "stabilityai/stable-diffusion-xl-base-1.0": {
        "_class_name": "UNet2DConditionModel",
        "_diffusers_version": "0.19.0.dev0",
        "act_fn": "silu",
        "addition_embed_type": "text_time",
        "addition_embed_type_num_heads": 64,
        "addition_time_embed_dim": 256,
        "attention_head_dim": [5, 10, 20],
        "block_out_channels": [320, 640, 1280],
        "center_input_sample": False,
        "class_embed_type": None,
        "class_embeddings_concat": False,
        "conv_in_kernel": 3,
        "conv_out_kernel": 3,
        "cross_attention_dim": 2048,
        "cross_attention_norm": None,
        "down_block_types": [DOWN, CROSS_DOWN, CROSS_DOWN],
        "downsample_padding": 1,
        "dual_cross_attention": False,
        "encoder_hid_dim": None,
        "encoder_hid_dim_type": None,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "in_channels": 4,
        "layers_per_block": 2,
        "mid_block_only_cross_attention": None,
        "mid_block_scale_factor": 1,
        "mid_block_type": "UNetMidBlock2DCrossAttn",
        "norm_eps": 1e-05,
        "norm_num_groups": 32,
        "num_attention_heads": None,
        "num_class_embeds": None,
        "only_cross_attention": False,
        "out_channels": 4,
        "projection_class_embeddings_input_dim": 2816,
        "resnet_out_scale_factor": 1.0,
        "resnet_skip_time_act": False,
        "resnet_time_scale_shift": "default",
        "sample_size": 128,
        "time_cond_proj_dim": None,
        "time_embedding_act_fn": None,
        "time_embedding_dim": None,
        "time_embedding_type": "positional",
        "timestep_post_act": None,
        "transformer_layers_per_block": [1, 2, 10],
        "up_block_types": [CROSS_UP, CROSS_UP, UP],
        "upcast_attention": None,
        "use_linear_projection": True,
    },
    "stabilityai/stable-diffusion-x4-upscaler": {
        "_class_name": "UNet2DConditionModel",
        "_diffusers_version": "0.8.0.dev0",
        "act_fn": "silu",
        "attention_head_dim": 8,
        "block_out_channels": [256, 512, 512, 1024],
        "center_input_sample": False,
        "cross_attention_dim": 1024,
        "down_block_types": [DOWN, CROSS_DOWN, CROSS_DOWN, CROSS_DOWN],
        "downsample_padding": 1,
        "dual_cross_attention": False,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "in_channels": 7,
        "layers_per_block": 2,
        "mid_block_scale_factor": 1,
        "norm_eps": 1e-05,
        "norm_num_groups": 32,
        "num_class_embeds": 1000,
        "only_cross_attention": [True, True, True, False],
        "out_channels": 4,
        "sample_size": 128,
        "up_block_types": [CROSS_UP, CROSS_UP, CROSS_UP, UP],
        "use_linear_projection": True,
    },
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configurations_give_the_published_keys_and_shapes(name):
    fields = PUBLISHED[name]
    config = UNetConfig.from_json(fields)
    with torch.device("meta"):
        reference = UNet2DConditionModel.from_config(fields)
        expected = keys_and_shapes(reference)
        assert keys_and_shapes(UNet(config)) == expected
        # What we write, diffusers reads as the same model; what diffusers writes, we read as the same.
        written = json.loads(json.dumps(config.to_json()))
        again = UNet2DConditionModel.from_config(written)
    assert keys_and_shapes(again) == expected
    assert UNetConfig.from_json(written) == config
    full = dict(reference.config)
    heads = full["attention_head_dim"]
    assert config.heads == (tuple(heads) if isinstance(heads, list) else (heads,) * len(config.heads))
    assert UNetConfig.from_json(full) == config


@pytest.mark.parametrize("name", TINY)
def test_configuration_makes_the_round_trip_through_diffusers(name):
    config = UNetConfig.from_json(TINY[name])
    with torch.device("meta"):
        reference = UNet2DConditionModel.from_config(json.loads(json.dumps(config.to_json())))
    assert UNetConfig.from_json(dict(reference.config)) == config


def test_defaults_and_neutral_values_are_those_of_diffusers():
    """Every field of diffusers is either read or refused unless neutral, and neutral is diffusers' own default."""
    parameters = dict(inspect.signature(UNet2DConditionModel.__init__).parameters)
    defaults = {key: p.default for key, p in parameters.items() if key != "self"}
    with torch.device("meta"):
        UNetConfig.from_json(defaults)
    assert UNetConfig.from_json(defaults) == UNetConfig() == UNetConfig.from_json({})
    assert {key: defaults[key] for key in NEUTRAL} == NEUTRAL


REFUSED = {
    "act_fn": "gelu",
    "addition_embed_type": "text_image",
    "addition_embed_type_num_heads": 8,
    "attention_type": "gated",
    "center_input_sample": True,
    "class_embed_type": "timestep",
    "class_embeddings_concat": True,
    "conv_in_kernel": 5,
    "conv_out_kernel": 1,
    "cross_attention_dim": [768, 768, 768, 768],
    "cross_attention_norm": "layer_norm",
    "down_block_types": [CROSS_DOWN, CROSS_DOWN, CROSS_DOWN, "AttnDownBlock2D"],
    "downsample_padding": 0,
    "dropout": 0.1,
    "dual_cross_attention": True,
    "encoder_hid_dim": 4096,
    "encoder_hid_dim_type": "text_proj",
    "layers_per_block": [2, 2, 2, 3],
    "mid_block_only_cross_attention": True,
    "mid_block_scale_factor": 2,
    "mid_block_type": "UNetMidBlock2D",
    "only_cross_attention": [True, False],
    "resnet_out_scale_factor": 1.414,
    "resnet_skip_time_act": True,
    "resnet_time_scale_shift": "scale_shift",
    "reverse_transformer_layers_per_block": [[1, 1]],
    "time_embedding_act_fn": "silu",
    "time_embedding_dim": 512,
    "time_embedding_type": "fourier",
    "timestep_post_act": "silu",
    "transformer_layers_per_block": [1, 2],
    "up_block_types": [UP, CROSS_UP, CROSS_UP, CROSS_DOWN],
    "attention_head_dim": [8, 8],
    "a_field_of_the_future": None,
}


def test_every_field_with_a_neutral_value_is_tried_at_another():
    assert set(NEUTRAL) <= set(REFUSED)


@pytest.mark.parametrize("field", REFUSED)
def test_what_is_not_implemented_is_refused_by_name(field):
    said = "heads" if field == "attention_head_dim" else field
    with pytest.raises(LDMError, match=said):
        UNetConfig.from_json({**PUBLISHED["runwayml/stable-diffusion-v1-5"], field: REFUSED[field]})


@pytest.mark.parametrize("name, said", [("sdxl", "pass pooled, time_ids in extras"), ("x4", "pass class_labels in")])
def test_a_unet_that_asks_for_more_says_so(name, said):
    x, context, _ = inputs(name, torch.float64)
    with pytest.raises(LDMError, match=said):
        pair(name)[1](x, T, context)
