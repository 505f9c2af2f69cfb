"""The ControlNet equals diffusers' ControlNetModel: every residual, gradients, names, files; and it learns from zero.

Then the closures around it: what is computed once, when the net is run at all, and what is refused with a sentence.
Whole pictures are compared with diffusers' pipelines in `test_controlnet_pipelines.py`.
"""

import copy
import inspect
import json
from contextlib import contextmanager
from functools import cache

import numpy as np
import pytest
import torch
from diffusers import ControlNetModel, UNet2DConditionModel
from PIL import Image
from reference import DTYPES, assert_close, assert_gradients_close, gradients, keys_and_shapes, normal, randomise, same
from test_unet import PUBLISHED as UNETS
from tiny_pairs import OTHERS, PROMPT, controlnets

import ldm
from ldm.control import Control, Seen, all_together, controller, lead, of_last_part
from ldm.errors import LDMError
from ldm.guidance import Told, classifier_free, conditional, halves_together
from ldm.io.folders import read_json, write_json
from ldm.io.weights import read_tensors, save_weights
from ldm.models.blocks import Attention
from ldm.models.controlnet import ControlNet, ControlNetConfig, check_base
from ldm.models.unet import NEUTRAL, EncoderConfig, Extras, UNet, UNetConfig
from ldm.models.vae import VAEConfig
from ldm.schedules import Level

DOWN, CROSS_DOWN, UP, CROSS_UP = "DownBlock2D", "CrossAttnDownBlock2D", "UpBlock2D", "CrossAttnUpBlock2D"
BATCH, TOKENS, WIDTH = 3, 7, 20
STEM = "diffusion_pytorch_model"

# Widths, heads and depths differ from level to level, so that a mix-up of levels shows.
BASE = {
    "block_out_channels": [8, 16, 24, 32],
    "down_block_types": [CROSS_DOWN, CROSS_DOWN, CROSS_DOWN, DOWN],
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "cross_attention_dim": WIDTH,
    "attention_head_dim": 4,
    "conditioning_embedding_out_channels": [4, 6, 10, 12],
}
THREE = {
    "block_out_channels": [8, 16, 24],
    "down_block_types": [DOWN, CROSS_DOWN, CROSS_DOWN],
    "attention_head_dim": [2, 4, 3],
    "use_linear_projection": True,
}
TINY = {
    "sd1": BASE | {"layers_per_block": 2},
    "sd2": BASE | {"attention_head_dim": [2, 4, 3, 8], "use_linear_projection": True, "upcast_attention": True},
    "sdxl": BASE
    | THREE
    | {
        "transformer_layers_per_block": [1, 2, 3],
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 6,
        "projection_class_embeddings_input_dim": 6 * 6 + 10,
    },
    "classes": BASE
    | {
        "in_channels": 7,
        "down_block_types": [DOWN, CROSS_DOWN, CROSS_DOWN, CROSS_DOWN],
        "only_cross_attention": [True, True, True, False],
        "num_class_embeds": 50,
    },
    "bgr": BASE | THREE | {"controlnet_conditioning_channel_order": "bgr"},
    "pooled": BASE | THREE | {"global_pool_conditions": True},
    "other-numbers": BASE
    | {
        "norm_eps": 1e-3,
        "freq_shift": 1,
        "flip_sin_to_cos": False,
        "layers_per_block": 3,
        "conditioning_channels": 5,
        "conditioning_embedding_out_channels": [6, 4, 10],  # so a latent stands for four pixels
    },
}
T = torch.tensor([981.0, 0.0, 333.3])  # of a first step, of the last, and one of Karras's between two integers


@cache
def pair(name, dtype=torch.float64):
    """The reference, every parameter drawn (the zero convolutions too), and ours with the same parameters."""
    reference = randomise(ControlNetModel(**TINY[name])).to(dtype).eval()
    return reference, same(lambda: ControlNet(ControlNetConfig.from_json(TINY[name])), reference)


def inputs(name, dtype, size=(12, 20)):
    """x, context, picture in [0, 1] and extras for one of `TINY`."""
    config = TINY[name]
    x = normal(1, BATCH, config.get("in_channels", 4), *size, dtype=dtype)
    factor = 2 ** (len(config["conditioning_embedding_out_channels"]) - 1)
    picture = normal(5, BATCH, config.get("conditioning_channels", 3), *(factor * side for side in size), dtype=dtype)
    extras = Extras()
    if name == "sdxl":
        time_ids = torch.tensor([[1024, 768, 0, 16, 512, 640], [72, 40, 8, 0, 40, 72], [1, 2, 3, 4, 5, 6]])
        extras = Extras(pooled=normal(3, BATCH, 10, dtype=dtype), time_ids=time_ids.to(dtype))
    if name == "classes":
        extras = Extras(class_labels=torch.tensor([20, 0, 49]))
    return x, normal(2, BATCH, TOKENS, WIDTH, dtype=dtype), picture.sigmoid(), extras


@contextmanager
def default_dtype(dtype):
    """diffusers computes guess mode's scales in torch's default dtype."""
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


def run_reference(reference, x, t, context, picture, extras=Extras(), scale=1.0, guess=False):
    added = {"text_embeds": extras.pooled, "time_ids": extras.time_ids} if extras.pooled is not None else None
    with default_dtype(x.dtype):
        skips, middle = reference(
            x,
            t,
            context,
            picture,
            conditioning_scale=scale,
            class_labels=extras.class_labels,
            added_cond_kwargs=added,
            guess_mode=guess,
            return_dict=False,
        )
    return [*skips, middle]


def run_ours(net, x, t, context, picture, extras=Extras(), scale=1.0, guess=False):
    skips, middle = net(x, t, context, net.condition(picture), extras, scale, guess)
    return [*skips, middle]


def all_close(ours, theirs, atol, at_least=0.1):
    assert len(ours) == len(theirs) > 4
    return max(assert_close(a, b, atol, at_least) for a, b in zip(ours, theirs, strict=True))


# ----------------------------------------------------------------------------------------------------------- parity


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", TINY)
@torch.no_grad()
def test_every_residual_equals_diffusers(name, dtype):
    reference, net = pair(name, dtype)
    x, context, picture, extras = inputs(name, dtype)
    theirs = run_reference(reference, x, T, context, picture, extras)
    all_close(run_ours(net, x, T, context, picture, extras), theirs, DTYPES[dtype], at_least=0.05)
    levels = [r.shape[2:] for r in theirs]
    assert len(set(levels)) == (1 if name == "pooled" else len(TINY[name]["block_out_channels"]))


@pytest.mark.parametrize("scale, guess", [(0.5, False), (-1.7, False), (1.0, True), (0.6, True)])
@pytest.mark.parametrize("name", ["sd1", "sdxl", "pooled"])
@torch.no_grad()
def test_scale_and_guess_mode_equal_diffusers(name, scale, guess):
    reference, net = pair(name)
    x, context, picture, extras = inputs(name, torch.float64)
    theirs = run_reference(reference, x, T, context, picture, extras, scale, guess)
    ours = run_ours(net, x, T, context, picture, extras, scale, guess)
    all_close(ours, theirs, 1e-11, at_least=0.02)
    plain = run_ours(net, x, T, context, picture, extras)
    shares = [(a / b).mean().item() for a, b in zip(ours, plain, strict=True)]
    n = len(shares)
    expected = [scale * 10 ** (k / (n - 1) - 1) if guess and name != "pooled" else scale for k in range(n)]
    assert np.allclose(shares, expected, rtol=1e-9)


@torch.no_grad()
def test_guess_mode_in_float32_equals_diffusers():
    reference, net = pair("sd1", torch.float32)
    x, context, picture, _ = inputs("sd1", torch.float32)
    theirs = run_reference(reference, x, T, context, picture, scale=1.5, guess=True)
    all_close(run_ours(net, x, T, context, picture, scale=1.5, guess=True), theirs, 1e-5)


@pytest.mark.parametrize("size", [(9, 5), (13, 22), (8, 1)])
@pytest.mark.parametrize("name", ["sd1", "sdxl"])
@torch.no_grad()
def test_sizes_that_halve_unevenly_equal_diffusers(name, size):
    reference, net = pair(name)
    x, context, picture, extras = inputs(name, torch.float64, size)
    theirs = run_reference(reference, x, T, context, picture, extras)
    all_close(run_ours(net, x, T, context, picture, extras), theirs, 1e-11)


@pytest.mark.parametrize("t", [7, 421.5, torch.tensor(999), torch.tensor([3, 2, 1])], ids=str)
@torch.no_grad()
def test_timestep_may_be_a_number_or_one_a_picture(t):
    reference, net = pair("sd1")
    x, context, picture, _ = inputs("sd1", torch.float64)
    theirs = run_reference(reference, x, t, context, picture)
    all_close(run_ours(net, x, t, context, picture), theirs, 1e-11)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["sd1", "bgr", "other-numbers"])
@torch.no_grad()
def test_features_of_the_picture_equal_diffusers(name, dtype):
    reference, net = pair(name, dtype)
    _, _, picture, _ = inputs(name, dtype, (6, 11))
    seen = picture.flip(1) if name == "bgr" else picture
    assert_close(net.condition(picture), reference.controlnet_cond_embedding(seen), DTYPES[dtype])
    assert net.condition(picture).shape == (BATCH, 8, 6, 11)
    assert (picture - picture.flip(1)).abs().mean() > 0.1  # the order of colours shows


@torch.no_grad()
def test_one_picture_serves_a_whole_batch():
    reference, net = pair("sd1")
    x, context, picture, _ = inputs("sd1", torch.float64)
    theirs = run_reference(reference, x, T, context, picture[:1].expand(BATCH, -1, -1, -1))
    all_close(run_ours(net, x, T, context, picture[:1]), theirs, 1e-11)


@pytest.mark.parametrize("name", ["sd1", "sdxl"])
@torch.no_grad()
def test_prepared_context_equals_plain(name):
    _, net = pair(name)
    x, context, picture, extras = inputs(name, torch.float64)
    prepared = net.prepare(context)
    assert set(prepared) == {m for m in net.modules() if isinstance(m, Attention) and m.is_cross} != set()
    for t in (T, 5):  # one preparation serves every step
        plain = run_ours(net, x, t, context, picture, extras)
        all_close(run_ours(net, x, t, prepared, picture, extras), plain, 1e-12)


@pytest.mark.parametrize("name", ["sd1", "sdxl", "pooled"])
def test_gradients_equal_diffusers(name):
    """Of every parameter, and of the picture; in guess mode, so that every residual counts differently."""
    reference, net = pair(name)
    x, context, picture, extras = inputs(name, torch.float64, (10, 9))
    leaves = [x.requires_grad_(), context.requires_grad_(), picture.requires_grad_()]
    found = []
    for run, module in ((run_reference, reference), (run_ours, net)):
        residuals = run(module, x, T, context, picture, extras, 0.8, True)
        weights = [normal(40 + i, *r.shape, dtype=torch.float64) for i, r in enumerate(residuals)]
        loss = sum((weight * r).sum() for weight, r in zip(weights, residuals, strict=True))
        found.append(gradients(loss, module, leaves))
    assert_gradients_close(found[1], found[0])


@torch.no_grad()
def test_the_unet_with_our_residuals_is_the_unet_with_diffusers_residuals():
    """The two together, as a step of a picture has them."""
    fields = {**BASE, "up_block_types": [UP, CROSS_UP, CROSS_UP, CROSS_UP]}
    del fields["conditioning_embedding_out_channels"]
    unet = randomise(UNet2DConditionModel(**fields), seed=8).double().eval()
    ours = same(lambda: UNet(UNetConfig.from_json(fields)), unet)
    reference = randomise(ControlNetModel(**BASE), seed=9).double().eval()
    net = same(lambda: ControlNet(ControlNetConfig.from_json(BASE)), reference)
    x, context, picture, _ = inputs("sd1", torch.float64, (9, 14))
    *skips, middle = run_reference(reference, x, 481.0, context, picture, scale=0.7)
    theirs = unet(x, 481.0, context, down_block_additional_residuals=skips, mid_block_additional_residual=middle).sample
    led = controller(net, context, net.condition(picture), 0.7)
    level = Level(3, 481.0, 0.8, 0.6)
    assert_close(conditional(ours, context, controller=led)(x, level).out, theirs, 1e-11)
    assert (conditional(ours, context)(x, level).out - theirs).abs().mean() > 0.05


# ---------------------------------------------------------------------------------------------------- configuration

SD1_FILE = {  # as in `config.json` of lllyasviel/sd-controlnet-canny
    "_class_name": "ControlNetModel",
    "_diffusers_version": "0.16.0.dev0",
    "_name_or_path": "/home/patrick/controlnet_v1_1/control_v11p_sd15_canny",
    "act_fn": "silu",
    "attention_head_dim": 8,
    "block_out_channels": [320, 640, 1280, 1280],
    "class_embed_type": None,
    "conditioning_embedding_out_channels": [16, 32, 96, 256],
    "controlnet_conditioning_channel_order": "rgb",
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
    "num_class_embeds": None,
    "only_cross_attention": False,
    "projection_class_embeddings_input_dim": None,
    "resnet_time_scale_shift": "default",
    "upcast_attention": False,
    "use_linear_projection": False,
}
NEWER = {
    "addition_embed_type": None,
    "addition_embed_type_num_heads": 64,
    "addition_time_embed_dim": None,
    "conditioning_channels": 3,
    "encoder_hid_dim": None,
    "encoder_hid_dim_type": None,
    "global_pool_conditions": False,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "num_attention_heads": None,
    "transformer_layers_per_block": 1,
}
FILES = {
    "Stable Diffusion 1": SD1_FILE,
    "Stable Diffusion 1, shuffle": SD1_FILE | {"global_pool_conditions": True},
    "Stable Diffusion 2": SD1_FILE
    | NEWER
    | {"attention_head_dim": [5, 10, 20, 20], "cross_attention_dim": 1024, "use_linear_projection": True},
    "SDXL": SD1_FILE
    | NEWER
    | {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "attention_head_dim": [5, 10, 20],
        "block_out_channels": [320, 640, 1280],
        "cross_attention_dim": 2048,
        "down_block_types": [DOWN, CROSS_DOWN, CROSS_DOWN],
        "projection_class_embeddings_input_dim": 2816,
        "transformer_layers_per_block": [1, 2, 10],
        "upcast_attention": None,
        "use_linear_projection": True,
    },
}


@pytest.mark.parametrize("name", FILES)
def test_full_size_configurations_give_diffusers_keys_and_shapes(name):
    config = ControlNetConfig.from_json(FILES[name])
    with torch.device("meta"):
        reference = ControlNetModel.from_config(FILES[name])
        expected = keys_and_shapes(reference)
        assert keys_and_shapes(ControlNet(config)) == expected
        # What we write, diffusers reads as the same model; what diffusers writes, we read as the same.
        written = json.loads(json.dumps(config.to_json()))
        again = ControlNetModel.from_config(written)
    assert keys_and_shapes(again) == expected
    assert ControlNetConfig.from_json(written) == config == ControlNetConfig.from_json(dict(reference.config))


@pytest.mark.parametrize("name", TINY)
def test_configuration_makes_the_round_trip_through_diffusers(name):
    config = ControlNetConfig.from_json(TINY[name])
    written = json.loads(json.dumps(config.to_json()))
    with torch.device("meta"):
        reference = ControlNetModel.from_config(written)
        assert keys_and_shapes(reference) == keys_and_shapes(pair(name)[0])
    assert ControlNetConfig.from_json(dict(reference.config)) == config
    # Every field that we write is one of diffusers' (it warns of others, and ignores them).
    assert {key for key in written if not key.startswith("_")} <= set(inspect.signature(ControlNetModel).parameters)


def test_defaults_and_neutral_values_are_those_of_diffusers():
    """Every field of diffusers is either read or refused unless neutral, and neutral is diffusers' own default."""
    parameters = inspect.signature(ControlNetModel).parameters
    defaults = {key: p.default for key, p in parameters.items()}
    assert ControlNetConfig.from_json(defaults) == ControlNetConfig() == ControlNetConfig.from_json({})
    with torch.device("meta"):
        assert ControlNetConfig.from_json(dict(ControlNetModel().config)) == ControlNetConfig()
    assert {key: value for key, value in defaults.items() if key in NEUTRAL} == {
        key: value for key, value in NEUTRAL.items() if key in defaults
    }


REFUSED = {
    "act_fn": "gelu",
    "addition_embed_type": "text",
    "addition_embed_type_num_heads": 8,
    "class_embed_type": "projection",
    "controlnet_conditioning_channel_order": "rbg",
    "cross_attention_dim": [768, 768, 768, 768],
    "down_block_types": [CROSS_DOWN, CROSS_DOWN, CROSS_DOWN, "AttnDownBlock2D"],
    "downsample_padding": 0,
    "encoder_hid_dim": 4096,
    "encoder_hid_dim_type": "text_proj",
    "layers_per_block": [2, 2, 2, 3],
    "mid_block_scale_factor": 2,
    "mid_block_type": "UNetMidBlock2D",
    "only_cross_attention": [True, False],
    "resnet_time_scale_shift": "scale_shift",
    "transformer_layers_per_block": [1, 2],
    "attention_head_dim": [8, 8],
    "sample_size": 64,  # a UNet's, as are the next
    "up_block_types": [UP, CROSS_UP, CROSS_UP, CROSS_UP],
    "a_field_of_the_future": None,
}


def test_every_neutral_field_of_diffusers_is_tried_at_another_value():
    assert set(NEUTRAL) & set(inspect.signature(ControlNetModel).parameters) <= set(REFUSED)


@pytest.mark.parametrize("field", REFUSED)
def test_what_is_not_implemented_is_refused_by_name(field):
    said = {"attention_head_dim": "heads", "controlnet_conditioning_channel_order": "order 'rbg'"}.get(field, field)
    with pytest.raises(LDMError, match=f"(?i)the ControlNet.*{said}"):
        ControlNetConfig.from_json({**SD1_FILE, field: REFUSED[field]})


# ------------------------------------------------------------------------------------------------------------ files


@pytest.fixture
def folder(models, tmp_path):
    """A ControlNet for the tiny SD 1 as diffusers writes it."""
    controlnets(models, "sd1")[0].save_pretrained(tmp_path / "net")
    return tmp_path / "net"


def equal_states(net, reference):
    expected = reference.state_dict()
    state = net.state_dict()
    return state.keys() == expected.keys() and all(torch.equal(state[key], expected[key]) for key in expected)


@pytest.mark.parametrize("name", ["sd1", "sd2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_a_folder_of_diffusers_is_read(models, name, dtype):
    reference, _ = controlnets(models, name)
    folder = models.root / f"{name}-controlnet-4"
    net = ldm.load_controlnet(folder, models.ours(name), dtype)
    assert equal_states(net, copy.deepcopy(reference).to(dtype)) and net.dtype == dtype and not net.training
    assert not any(p.requires_grad or p.is_meta for p in net.parameters())
    by_name = ldm.load_controlnet(str(folder), models.ours(name), str(dtype).removeprefix("torch."))
    assert equal_states(by_name, net)


def test_its_dtype_is_the_pipeline_s_unless_another_is_asked_for(models, folder):
    assert ldm.load_controlnet(folder, models.ours("sd1", torch.float64)).dtype == torch.float64
    assert ldm.load_controlnet(folder, models.ours("sd1")).dtype == torch.float32
    with pytest.raises(LDMError, match=r"dtype 'float31' is none that weights can have.*Did you mean 'float32'"):
        ldm.load_controlnet(folder, models.ours("sd1"), "float31")


def test_shards_and_variants_are_read(models, tmp_path, capsys):
    reference, _ = controlnets(models, "sd1")
    pipe = models.ours("sd1")
    capsys.readouterr()  # diffusers' progress, where the models are written only now
    reference.save_pretrained(tmp_path / "sharded", max_shard_size="40KB")
    assert len(list((tmp_path / "sharded").glob("*-of-*.safetensors"))) > 1
    assert equal_states(ldm.load_controlnet(tmp_path / "sharded", pipe), reference)

    halved = copy.deepcopy(reference).half()
    halved.save_pretrained(tmp_path / "both", variant="fp16")
    reference.save_pretrained(tmp_path / "both")
    assert equal_states(ldm.load_controlnet(tmp_path / "both", pipe), reference)
    by_name = ldm.load_controlnet(tmp_path / "both", pipe, variant="fp16")
    assert equal_states(by_name, halved.float()) and not equal_states(by_name, reference)
    assert capsys.readouterr().err == ""


def test_an_embedded_controlnet_is_found_by_name(models, folder, tmp_path, monkeypatch):
    from ldm.checkpoints import places

    root = tmp_path / "checkout"
    (root / "weights").mkdir(parents=True)
    folder.rename(root / "weights" / "tiny-canny")
    monkeypatch.setattr(places, "PACKAGE", root / "ldm")
    assert equal_states(ldm.load_controlnet("tiny-canny", models.ours("sd1")), controlnets(models, "sd1")[0])
    with pytest.raises(LDMError, match=r"no model 'tiny-cany': .* \(tiny-canny\)\. Did you mean 'tiny-canny'\?"):
        ldm.load_controlnet("tiny-cany", models.ours("sd1"))
    assert places.embedded() == {}  # and it is no model
    with pytest.raises(LDMError, match="'tiny-canny' is a ControlNet: load_controlnet reads it"):
        ldm.load("tiny-canny")


@pytest.mark.parametrize("name", ["sd1", "sdxl", "other-numbers"])
@torch.no_grad()
def test_diffusers_reads_a_folder_of_ours(name, tmp_path, caplog):
    config = ControlNetConfig.from_json(TINY[name])
    net = randomise(ControlNet(config), seed=6).eval()
    write_json(tmp_path / "config.json", config.to_json())
    save_weights(net.state_dict(), tmp_path / f"{STEM}.safetensors")
    reference, info = ControlNetModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()) and equal_states(net, reference)
    x, context, picture, extras = inputs(name, torch.float32)
    theirs = run_reference(reference.eval(), x, T, context, picture, extras)
    all_close(run_ours(net, x, T, context, picture, extras), theirs, 1e-5)


# -------------------------------------------------------------------------------------------------------- from_unet

SHARED = {"sd1": {}, "sd2": {}, "sdxl": {}, "classes": {}}


@pytest.mark.parametrize("name", SHARED)
def test_made_of_a_unet_it_is_what_diffusers_makes_of_it(name):
    fields = {key: value for key, value in TINY[name].items() if key != "conditioning_embedding_out_channels"}
    ups = {DOWN: UP, CROSS_DOWN: CROSS_UP}
    fields["up_block_types"] = [ups[block] for block in reversed(fields["down_block_types"])]
    unet = randomise(UNet2DConditionModel(**fields), seed=3)
    channels = (4, 6, 10, 12)
    reference = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=channels)
    ours = same(lambda: UNet(UNetConfig.from_json(dict(unet.config))), unet)
    kept = {key: value.clone() for key, value in ours.state_dict().items()}
    net = ControlNet.from_unet(ours, channels)
    expected = ControlNetConfig.from_json(dict(reference.config))
    assert net.config == expected and isinstance(net.config, EncoderConfig)
    state, theirs = net.state_dict(), reference.state_dict()
    assert state.keys() == theirs.keys() and net.dtype == torch.float32
    copied = [key for key in state if key in kept]
    drawn = [key for key in state if key not in kept]
    assert len(copied) > 50 and all(torch.equal(state[key], theirs[key]) for key in copied)
    zeros = [key for key in drawn if "down_blocks" in key or "mid_block" in key or "embedding.conv_out" in key]
    assert all(key.startswith("controlnet_") for key in drawn)
    assert len(zeros) == 2 * (len(net.controlnet_down_blocks) + 2)
    assert not any(state[key].any() or theirs[key].any() for key in zeros)
    others = [key for key in drawn if key not in zeros and key.endswith("weight")]
    assert len(others) == 7 and all(state[key].std() > 0.01 for key in others)  # torch's own initialisation
    with torch.no_grad():  # a copy: training it leaves the UNet as it was
        for p in net.parameters():
            p.add_(1.0)
    assert all(torch.equal(value, kept[key]) for key, value in ours.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_made_of_a_unet_it_has_its_dtype(models, dtype):
    unet = copy.deepcopy(models.ours("sd1").unet).to(dtype)
    net = ControlNet.from_unet(unet)
    assert {p.dtype for p in net.parameters()} == {dtype}
    assert net.config.conditioning_embedding_out_channels == (16, 32, 96, 256)  # diffusers' default


SMALL = {"steps": 3, "width": 40, "height": 24, "seed": 3}
PICTURE = Image.fromarray((normal(77, 24, 40, 3).sigmoid() * 255).byte().numpy())


@pytest.mark.parametrize("guidance, together", [(1.0, True), (6.0, True), (6.0, False)])
@pytest.mark.parametrize("sampler", ["ddim", "euler-a", "dpm++2m", "heun"])
def test_a_new_controlnet_leaves_the_picture_unchanged_bit_for_bit(models, sampler, guidance, together):
    pipe = models.ours("sd1")
    net = ControlNet.from_unet(pipe.unet, (4, 6, 10, 12))
    options = {**SMALL, "sampler": sampler, "guidance": guidance, "together": together}
    prompts = [PROMPT, OTHERS[0]]
    plain = pipe(prompts, **options)
    runs = []
    net.register_forward_hook(lambda module, args, out: runs.append(len(out[1])))
    for guess in (False, True):
        led = pipe(prompts, **options, control=[Control(net, PICTURE, guess=guess)])
        assert torch.equal(led.x0, plain.x0) and plain.x0.std() > 0.1
        assert [image.tobytes() for image in led.images] == [image.tobytes() for image in plain.images]
        assert runs, "it wasn't run at all"
    two = [Control(net, PICTURE), Control(ControlNet.from_unet(pipe.unet), PICTURE, scale=1.7)]
    assert torch.equal(pipe(prompts, **options, control=two).x0, plain.x0)
    # And what it is compared with can change: with the convolutions drawn, it does.
    drawn = controlnets(models, "sd1")[1]
    other = pipe(prompts, **options, control=[Control(drawn, PICTURE)]).x0
    assert (other - plain.x0).abs().mean() > 0.01 * plain.x0.abs().mean()


def test_the_zero_convolutions_learn_at_once_and_all_else_behind_them(models):
    """Section 3.1: the gradient of a zero convolution's weight isn't zero; after one step nothing is cut off."""
    unet = copy.deepcopy(models.ours("sd1", torch.float64).unet).requires_grad_(False)
    net = ControlNet.from_unet(unet, (4, 6, 10, 12)).requires_grad_(True)
    x, context = normal(1, 2, 4, 3, 5, dtype=torch.float64), normal(2, 2, TOKENS, 24, dtype=torch.float64)
    picture, eps = normal(3, 2, 3, 24, 40).double().sigmoid(), normal(4, 2, 4, 3, 5, dtype=torch.float64)

    def learn():
        net.zero_grad()
        led = controller(net, context, net.condition(picture))
        out = conditional(unet, context, controller=led)(x, Level(3, 481.0, 0.8, 0.6)).out
        (out - eps).square().mean().backward()
        return {key: p.grad.abs().max().item() for key, p in net.named_parameters()}

    zeros = ("controlnet_down_blocks.", "controlnet_mid_block.")
    first = learn()
    assert all((size > 1e-6) == key.startswith(zeros) for key, size in first.items())
    torch.optim.SGD(net.parameters(), lr=0.1).step()
    behind = {key for key, size in learn().items() if size > 0}
    assert "controlnet_cond_embedding.conv_out.weight" in behind and "conv_in.weight" in behind
    torch.optim.SGD(net.parameters(), lr=0.1).step()
    sizes = learn()  # and now the first convolution that sees the picture, too
    assert all(size > 0 for key, size in sizes.items() if not key.endswith("to_k.bias"))


# ----------------------------------------------------------------------------------- what is run, and how often


class Counted:
    """A copy of our net, and of how large a batch each of its runs was, and when its picture and words were read."""

    def __init__(self, net):
        self.net, self.runs, self.pictures, self.words, self.ts = copy.deepcopy(net), [], [], [], []
        self.net.register_forward_pre_hook(self.seen)
        self.net.controlnet_cond_embedding.register_forward_hook(lambda m, args, out: self.pictures.append(len(out)))
        for module in self.net.modules():
            if isinstance(module, Attention) and module.is_cross:
                module.to_k.register_forward_hook(lambda m, args, out: self.words.append(len(out)))
                module.to_v.register_forward_hook(lambda m, args, out: self.words.append(len(out)))

    def seen(self, module, args):
        self.runs.append(len(args[0]))
        self.ts.append(args[1])


def cross(net):
    return sum(isinstance(m, Attention) and m.is_cross for m in net.modules())


@pytest.mark.parametrize(
    "options, contexts, batch",
    [
        ({"guidance": 5.0}, 1, 4),
        ({"guidance": 1.0}, 1, 2),
        ({"guidance": 5.0, "together": False}, 2, 2),
        ({"guidance": 5.0, "sampler": "heun"}, 1, 4),
    ],
    ids=str,
)
def test_picture_and_words_are_read_once_not_each_step(models, options, contexts, batch):
    counted = Counted(controlnets(models, "sd1")[1])
    list(models.ours("sd1").steps([PROMPT, OTHERS[0]], **{**SMALL, **options}, control=[Control(counted.net, PICTURE)]))
    assert counted.pictures == [1]
    assert counted.words == [batch] * (2 * cross(counted.net) * contexts)
    evaluations = (
        6 if options.get("sampler") == "heun" else 3
    )  # this table ends with some noise: the last step asks twice
    assert counted.runs == [batch] * (evaluations * contexts)


def kept(start, end, n):
    """diffusers' own words: `controlnet_keep` of pipeline_controlnet.py."""
    keep = [1.0 - float(i / n < start or (i + 1) / n > end) for i in range(n)]
    return [i for i in range(n) if keep[i]]


def test_the_rows_are_those_that_diffusers_keeps(models):
    net = controlnets(models, "sd1")[1]
    shares = [k / 20 for k in range(21)] + [1 / 3, 2 / 3, 0.1 + 0.2, 0.7 + 0.1, 1e-9, 1 - 1e-9]
    sizes = set()
    for n in (1, 2, 3, 7, 10, 25, 30, 50):
        for start in shares:
            for end in shares:
                if start < end:
                    for first in (0, 4):
                        rows = Control(net, PICTURE, start=start, end=end).rows(first, first + n)
                        ahead = {first + n} if n - 1 in kept(start, end, n) else set()  # asked by Heun's last step
                        assert rows == {first + i for i in kept(start, end, n)} | ahead
                        sizes.add(len(rows))
    assert len(sizes) > 20 and Control(net, PICTURE, scale=0.0).rows(0, 9) == frozenset()


@pytest.mark.parametrize("strength", [None, 0.6])
@pytest.mark.parametrize("start, end, n", [(0.0, 1.0, 4), (0.2, 0.6, 10), (0.5, 1.0, 5), (0.0, 0.3, 7), (0.4, 0.5, 4)])
def test_outside_its_interval_the_net_is_not_run_at_all(models, start, end, n, strength):
    """With a strength the interval is a share of the steps that are run."""
    counted = Counted(controlnets(models, "sd1")[1])
    control = [Control(counted.net, PICTURE, start=start, end=end)]
    options = {**SMALL, "steps": n, "sampler": "ddim"} | ({"image": PICTURE, "strength": strength} if strength else {})
    found, ran = [], 0
    for k, step in enumerate(models.ours("sd1").steps(PROMPT, **options, control=control)):
        found += [k] * (len(counted.runs) - ran)
        assert all(t == step.level.t for t in counted.ts[ran:])
        ran = len(counted.runs)
    count = n if strength is None else int(n * strength)
    assert k + 1 == count and found == kept(start, end, count) and len(found) == ran
    assert len(counted.pictures) == 1


def test_an_interval_without_a_step_gets_a_line(models, capsys):
    net = controlnets(models, "sd1")[1]
    capsys.readouterr()  # diffusers' progress
    assert Control(net, PICTURE, start=0.4, end=0.5).rows(2, 6) == frozenset()
    assert capsys.readouterr().err == "No step of 4 lies within 0.4 to 0.5: a ControlNet is not run.\n"
    for control in (Control(net, PICTURE, start=0.5), Control(net, PICTURE, scale=0.0, start=0.4, end=0.5)):
        control.rows(2, 6)
    assert capsys.readouterr().err == ""  # of what is run, and of what was turned off, nothing is said


def test_an_interval_is_the_whole_run_inside_it_and_none_outside(models):
    """Each step is, bit for bit, that of a run with the net throughout or without it, from the same latent."""
    pipe, net = models.ours("sd1"), controlnets(models, "sd1")[1]
    options = {**SMALL, "steps": 5, "sampler": "ddim", "guidance": 4.0}

    def steps(**more):
        return pipe.prepare(PROMPT, **options, control=[Control(net, PICTURE, **more)])

    run, always, never = steps(start=0.2, end=0.6), steps(), pipe.prepare(PROMPT, **options)
    apart = 0
    for step in run.steps():
        led, plain = always.denoise(step.x_before, step.level).eps, never.denoise(step.x_before, step.level).eps
        assert torch.equal(step.eps, led if step.i in (1, 2) else plain)
        apart += (led - plain).abs().mean() > 0.01
    assert apart == 5


@pytest.mark.parametrize("together", [True, False])
def test_scale_0_runs_no_net_and_is_the_picture_without_it(models, together):
    pipe, counted = models.ours("sd1"), Counted(controlnets(models, "sd1")[1])
    options = {**SMALL, "together": together}
    plain = pipe(PROMPT, **options).x0
    silent = Control(counted.net, PICTURE, scale=0.0)
    assert torch.equal(pipe(PROMPT, **options, control=[silent]).x0, plain) and plain.std() > 0.1
    assert torch.equal(pipe(PROMPT, **options, control=[]).x0, plain)
    assert counted.runs == []
    other = Control(controlnets(models, "sd1", 5)[1], PICTURE)
    two, one = (pipe(PROMPT, **options, control=each).x0 for each in ([other, silent], [other]))
    assert torch.equal(two, one) and not torch.equal(one, plain) and counted.runs == []


@pytest.mark.parametrize(
    "fields, guess", [({}, True), ({"global_pool_conditions": True}, False)], ids=["guess", "pool"]
)
@pytest.mark.parametrize("together", [True, False])
def test_some_see_the_conditional_half_alone(models, fields, guess, together):
    """Guess mode, and the "shuffle" ControlNet, which pools: with half the batch, or not in the other half's run."""
    pipe, (_, net) = models.ours("sd1"), controlnets(models, "sd1", **fields)
    counted = Counted(net)
    control = [Control(counted.net, PICTURE, guess=guess)]
    options = {**SMALL, "guidance": 5.0, "sampler": "ddim", "together": together}
    led, plain = (pipe.prepare([PROMPT, OTHERS[0]], **options, **more) for more in ({"control": control}, {}))
    first = next(led.steps())
    assert counted.runs == [2] and set(counted.words) == {2}
    expected = next(plain.steps())
    assert_close(first.uncond, expected.uncond, 1e-6)
    if not together:
        assert torch.equal(first.uncond, expected.uncond)
    assert (first.cond - expected.cond).abs().mean() > 1e-3
    # Without guidance there is no other half.
    counted.runs.clear()
    next(pipe.steps([PROMPT, OTHERS[0]], **{**options, "guidance": 1.0}, control=control))
    assert counted.runs == [2]


@pytest.mark.parametrize("controls", ["one", "two", "guess", "guess and plain", "pool and plain"])
def test_halves_together_and_apart_are_the_same_picture(models, controls):
    pipe = models.ours("sd1", torch.float64)
    a, b, pool = (
        controlnets(models, "sd1", seed, torch.float64, **fields)[1]
        for seed, fields in ((4, {}), (5, {}), (4, {"global_pool_conditions": True}))
    )
    given = {
        "one": [Control(a, PICTURE)],
        "two": [Control(a, PICTURE, 0.7), Control(b, PICTURE, 1.2, end=0.7)],
        "guess": [Control(a, PICTURE, guess=True)],
        "guess and plain": [Control(a, PICTURE, guess=True), Control(b, PICTURE, 0.8)],
        "pool and plain": [Control(b, PICTURE), Control(pool, PICTURE, 0.8)],
    }[controls]
    options = {**SMALL, "guidance": 5.0, "control": given}
    both, apart = (pipe([PROMPT, OTHERS[0]], **options, together=together).x0 for together in (True, False))
    assert_close(both, apart, 1e-10 * apart.abs().max().item())


@torch.no_grad()
def test_several_controlnets_are_the_sum_of_their_residuals(models):
    nets = [controlnets(models, "sd1", seed, torch.float64)[1] for seed in (4, 5, 6)]
    x, level = normal(1, 2, 4, 3, 5, dtype=torch.float64), Level(3, 481.0, 0.8, 0.6)
    context = normal(2, 2, TOKENS, 24, dtype=torch.float64)
    features = [net.condition(normal(10 + k, 1, 3, 24, 40).double().sigmoid()) for k, net in enumerate(nets)]
    scales, rows = (0.5, 1.5, -0.8), (None, frozenset({3}), frozenset({2, 4}))
    led = [controller(*each) for each in zip(nets, [context] * 3, features, scales, rows, strict=True)]
    skips, middle, levels = all_together(led)(x, level)
    assert not levels
    parts = [net(x, level.t, context, f) for net, f in zip(nets[:2], features, strict=False)]
    expected = [0.5 * a + 1.5 * b for a, b in zip(*([*skips, middle] for skips, middle, *_ in parts), strict=True)]
    all_close([*skips, middle], expected, 1e-12)
    elsewhere = all_together(led)(x, Level(9, 481.0, 0.8, 0.6))
    all_close([*elsewhere[0], elsewhere[1]], [0.5 * r for r in [*parts[0][0], parts[0][1]]], 1e-12)
    assert led[2](x, level) is None and all_together(led[2:])(x, level) is None and all_together([])(x, level) is None


@torch.no_grad()
def test_the_last_part_alone_gets_zeros_before_it(models):
    net = controlnets(models, "sd1", dtype=torch.float64)[1]
    x, level = normal(1, 6, 4, 3, 5, dtype=torch.float64), Level(3, 481.0, 0.8, 0.6)
    context = normal(2, 2, TOKENS, 24, dtype=torch.float64)
    features = net.condition(normal(10, 1, 3, 24, 40).double().sigmoid())
    one = controller(net, context, features, rows=frozenset({3}))
    skips, middle, _ = of_last_part(one, parts=3)(x, level)
    alone = one(x[4:], level)
    for whole, part in zip([*skips, middle], [*alone[0], alone[1]], strict=True):
        assert len(whole) == 6 and not whole[:4].any() and torch.equal(whole[4:], part) and part.abs().mean() > 0.1
    assert of_last_part(one, parts=3)(x, Level(4, 481.0, 0.8, 0.6)) is None


@torch.no_grad()
def test_each_picture_of_a_batch_is_led_by_its_own(models):
    """Features of one picture are for all; of as many as are drawn, each for its own, in both halves."""
    pipe, net = models.ours("sd1", torch.float64), controlnets(models, "sd1", dtype=torch.float64)[1]
    pictures = [PICTURE, PICTURE.transpose(Image.Transpose.FLIP_LEFT_RIGHT)]
    options = {**SMALL, "guidance": 5.0}
    both = pipe([PROMPT, OTHERS[0]], **options, control=[Control(net, pictures)]).x0
    for k, (prompt, picture) in enumerate(zip([PROMPT, OTHERS[0]], pictures, strict=True)):
        alone = pipe(prompt, **{**options, "seed": 3 + k}, control=[Control(net, picture)]).x0
        assert_close(both[k : k + 1], alone, 1e-10 * alone.abs().max().item())
    swapped = pipe([PROMPT, OTHERS[0]], **options, control=[Control(net, pictures[::-1])]).x0
    assert (swapped - both).abs().mean() > 1e-3


def test_pictures_may_be_paths_arrays_or_tensors(models, tmp_path):
    pipe, net = models.ours("sd1"), controlnets(models, "sd1")[1]
    PICTURE.save(tmp_path / "edges.png")
    pixels = np.asarray(PICTURE)
    tensor = torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None].float() / 255
    expected = pipe(PROMPT, **SMALL, control=[Control(net, PICTURE)]).x0
    for given in (tmp_path / "edges.png", str(tmp_path / "edges.png"), pixels, tensor, tensor.double(), [PICTURE]):
        assert torch.equal(pipe(PROMPT, **SMALL, control=[Control(net, given)]).x0, expected)
    assert torch.equal(pipe(PROMPT, **SMALL, control=Control(net, PICTURE)).x0, expected)  # one needs no list


def test_drawn_one_by_one_each_keeps_its_own_picture(models):
    pipe, net = models.ours("sd1"), controlnets(models, "sd1")[1]
    flipped = PICTURE.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    prompts = [PROMPT, OTHERS[0]]
    alone = [
        pipe(prompt, **{**SMALL, "seed": 3 + k}, control=[Control(net, picture)]).x0
        for k, (prompt, picture) in enumerate(zip(prompts, [PICTURE, flipped], strict=True))
    ]
    tensor = torch.cat([torch.from_numpy(np.array(p)).permute(2, 0, 1)[None] / 255 for p in (PICTURE, flipped)])
    for given in ([PICTURE, flipped], tensor):
        found = pipe(prompts, **SMALL, one_by_one=True, control=[Control(net, given)]).x0
        assert torch.equal(found, torch.cat(alone))


@torch.no_grad()
def test_what_a_unet_reads_beside_the_latent_is_not_the_net_s(models):
    net = controlnets(models, "sd1", dtype=torch.float64)[1]
    x, level = normal(1, 2, 9, 3, 5, dtype=torch.float64), Level(3, 481.0, 0.8, 0.6)
    context = normal(2, 2, TOKENS, 24, dtype=torch.float64)
    led = controller(net, context, net.condition(normal(10, 1, 3, 24, 40).double().sigmoid()))
    whole, alone = led(x, level), led(x[:, :4], level)
    all_close([*whole[0], whole[1]], [*alone[0], alone[1]], 0.0)


@torch.no_grad()
def test_guidance_of_three_parts_is_led_in_all_or_in_the_last(models):
    """As models that edit pictures have it: without both, with the picture alone, with both."""
    unet = models.ours("sd1", torch.float64).unet
    nets = [controlnets(models, "sd1", seed, torch.float64)[1] for seed in (4, 5)]
    x, level = normal(1, 2, 4, 3, 5, dtype=torch.float64), Level(3, 481.0, 0.8, 0.6)
    contexts = [normal(20 + k, 2, TOKENS, 24, dtype=torch.float64) for k in range(3)]
    picture = normal(10, 2, 3, 24, 40).double().sigmoid()
    seen = [
        Seen(Control(net, picture, scale, guess=guess), net.condition(picture), frozenset({3}))
        for net, scale, guess in zip(nets, (0.7, 1.2), (False, True), strict=True)
    ]
    network = conditional(unet, torch.cat(contexts), controller=lead(seen, [Told(c) for c in contexts]))
    parts = halves_together(network, 3)(x, level)
    for k, context in enumerate(contexts):
        skips, middle = nets[0](x, level.t, context, nets[0].condition(picture), scale=0.7)
        if k == 2:
            more = nets[1](x, level.t, context, nets[1].condition(picture), scale=1.2, guess=True)
            skips, middle = [a + b for a, b in zip(skips, more[0], strict=True)], middle + more[1]
        assert_close(parts[k], unet(x, level.t, context, residuals=(skips, middle)), 1e-11)
    guided = classifier_free(halves_together(conditional(unet, torch.cat(contexts[:2])), 2), 3.0)
    assert guided(x, level).out.isfinite().all()


# ------------------------------------------------------------------------------------------------- sentences


def base(name, **fields):
    """(UNet's config, VAE's) of a published model."""
    vae = VAEConfig(block_out_channels=(128, 256, 512, 512), **fields)
    return UNetConfig.from_json(UNETS[name]), vae


SD1, SD2 = "runwayml/stable-diffusion-v1-5", "stabilityai/stable-diffusion-2-1"
SDXL, X4 = "stabilityai/stable-diffusion-xl-base-1.0", "stabilityai/stable-diffusion-x4-upscaler"
OTHER_BASES = [  # the ControlNet's base, the model it is given to, what is said
    (
        "Stable Diffusion 1",
        SD2,
        "another base than this model, Stable Diffusion 2,: it fits Stable Diffusion 1 .*768.*1024",
    ),
    (
        "Stable Diffusion 2",
        SD1,
        "another base than this model, Stable Diffusion 1,: it fits Stable Diffusion 2 .*1024.*768",
    ),
    ("SDXL", SD1, "another base than this model, Stable Diffusion 1,: it fits SDXL"),
    (
        "Stable Diffusion 1, shuffle",
        SDXL,
        "another base than this model, SDXL,: it fits Stable Diffusion 1 .*block_out",
    ),
    ("Stable Diffusion 2", X4, "another base than this model: it fits Stable Diffusion 2 .*block_out_channels"),
]


@pytest.mark.parametrize("net, model, said", OTHER_BASES, ids=lambda each: each[:40])
def test_another_base_is_caught_from_the_shapes(net, model, said):
    config = ControlNetConfig.from_json(FILES[net])
    with pytest.raises(LDMError, match=f"^The ControlNet was made for {said}"):
        check_base(config, *base(model))


@pytest.mark.parametrize("net, model", [("Stable Diffusion 1", SD1), ("Stable Diffusion 2", SD2), ("SDXL", SDXL)])
def test_its_own_base_is_accepted(net, model):
    check_base(ControlNetConfig.from_json(FILES[net]), *base(model))


def test_a_smaller_controlnet_of_the_same_base_is_accepted():
    """Fewer transformers inside, as SDXL's "mid" and "small" have them: the residuals have the same shapes."""
    smaller = {"down_block_types": [DOWN, DOWN, CROSS_DOWN], "transformer_layers_per_block": [1, 1, 1]}
    check_base(ControlNetConfig.from_json(FILES["SDXL"] | smaller), *base(SDXL))


def test_another_latent_is_caught_as_well():
    four, wide = ControlNetConfig.from_json(FILES["Stable Diffusion 1"]), {"in_channels": 9}
    with pytest.raises(LDMError, match=r"^My net reads 4 channels .* 8 pixels a side; this model's have 16 and .* 8"):
        check_base(four, *base(SD1, latent_channels=16), "My net")
    with pytest.raises(
        LDMError, match=r"reads 9 channels of latents .* this model's have 4 "
    ):  # made of an inpainting UNet
        check_base(ControlNetConfig.from_json(FILES["Stable Diffusion 1"] | wide), *base(SD1))
    short = FILES["Stable Diffusion 1"] | {"conditioning_embedding_out_channels": [16, 32, 96]}
    with pytest.raises(LDMError, match=r"stand for 4 pixels a side; this model's have 4 and stand for 8"):
        check_base(ControlNetConfig.from_json(short), *base(SD1))
    five = FILES["Stable Diffusion 1"] | {"conditioning_channels": 5}
    with pytest.raises(LDMError, match=r"^The ControlNet looks at 5 channels; ldm shows it pictures, which have 3\.$"):
        check_base(ControlNetConfig.from_json(five), *base(SD1))


def test_a_net_that_reads_other_extras_is_of_another_base():
    """Widths and text of SDXL, but not told its sizes: the embedding of the timestep is another."""
    fields = FILES["SDXL"] | {"addition_embed_type": None}
    with pytest.raises(LDMError, match=r"another base .* \(addition_embed_type None, here text_time\)\.$"):
        check_base(ControlNetConfig.from_json(fields), *base(SDXL))


OTHER_SHAPES = {
    "text": (
        {"cross_attention_dim": 768},
        r"another base than this model: it fits Stable Diffusion 1 \(cross_.* 768, here 24",
    ),
    "text, 2": ({"cross_attention_dim": 1024}, "it fits Stable Diffusion 2 .*cross_attention_dim 1024, here 24"),
    "text, tiny": ({"cross_attention_dim": 20}, "it fits a model that reads text 20 wide"),
    "widths": ({"block_out_channels": [8, 16, 32]}, r"block_out_channels \(8, 16, 32\), here \(8, 16, 24\)"),
    "layers": ({"layers_per_block": 2}, "layers_per_block 2, here 1"),
    "latents": ({"in_channels": 9}, "reads 9 channels of latents"),
}


@pytest.mark.parametrize("what", OTHER_SHAPES)
def test_another_base_is_caught_before_a_weight_is_read(models, folder, what):
    """The weights are damaged: with the right base that is said, with another one the base."""
    fields, said = OTHER_SHAPES[what]
    (folder / f"{STEM}.safetensors").write_bytes(b"\x09\0\0\0\0\0\0\0{damaged}")
    with pytest.raises(LDMError, match="safetensors is corrupt or truncated"):
        ldm.load_controlnet(folder, models.ours("sd1"))
    write_json(folder / "config.json", read_json(folder / "config.json") | fields)
    with pytest.raises(LDMError, match=f"^{folder} .*{said}") as caught:
        ldm.load_controlnet(folder, models.ours("sd1"))
    assert "safetensors" not in str(caught.value)
    for path in folder.glob("*.safetensors"):
        path.unlink()  # nor is one looked for
    with pytest.raises(LDMError, match=said):
        ldm.load_controlnet(folder, models.ours("sd1"))


def tensors_of(folder):
    return {name: tensor.clone() for name, tensor, _ in read_tensors(folder / f"{STEM}.safetensors")}


def drop(folder):
    tensors = tensors_of(folder)
    del tensors["controlnet_mid_block.weight"]
    save_weights(tensors, folder / f"{STEM}.safetensors")


def add(folder):
    save_weights(tensors_of(folder) | {"up_blocks.0.bias": torch.ones(3)}, folder / f"{STEM}.safetensors")


def reshape(folder):
    tensors = tensors_of(folder)
    tensors["controlnet_cond_embedding.conv_in.weight"] = torch.ones(4, 1, 3, 3)
    save_weights(tensors, folder / f"{STEM}.safetensors")


def field(**fields):
    return lambda folder: write_json(folder / "config.json", read_json(folder / "config.json") | fields)


BROKEN = {
    "a tensor too few": (drop, "missing controlnet_mid_block.weight"),
    "a tensor too many": (add, r"unexpected up_blocks.0.bias \(in diffusion_pytorch_model.safetensors\)"),
    "another shape": (reshape, r"conv_in.weight in diff.* is \(4, 1, 3, 3\) instead of \(4, 3, 3, 3\)"),
    "no configuration": (lambda folder: (folder / "config.json").unlink(), "config.json does not exist"),
    "no weights": (lambda folder: (folder / f"{STEM}.safetensors").unlink(), f"has no {STEM}.safetensors"),
    "an unknown field": (field(camera="front"), "of the ControlNet has a field that ldm doesn't know: 'camera'"),
    "another block": (field(mid_block_type="UNetMidBlock2D"), "'mid_block_type' = 'UNetMidBlock2D'; ldm impl"),
    "other colours": (field(controlnet_conditioning_channel_order="grb"), "in the order 'grb'; ldm knows rgb and bgr"),
    "a whole model": (
        lambda folder: (folder / "model_index.json").write_text("{}"), "is a whole model, not a ControlNet: ldm.load"
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", BROKEN)
def test_a_damaged_folder_gets_a_sentence(models, folder, what):
    damage, said = BROKEN[what]
    assert ldm.load_controlnet(folder, models.ours("sd1"))
    damage(folder)
    with pytest.raises(LDMError, match=said) as caught:
        ldm.load_controlnet(folder, models.ours("sd1"))
    assert str(folder) in str(caught.value) or "ControlNet" in str(caught.value)


def test_what_is_no_controlnet_folder_gets_a_sentence(models, tmp_path):
    pipe = models.ours("sd1")
    with pytest.raises(LDMError, match=r"is a whole model, not a ControlNet: ldm\.load reads it"):
        ldm.load_controlnet(models.folder("sd1"), pipe)
    with pytest.raises(
        LDMError, match="of the ControlNet names the class 'UNet2DConditionModel', and ldm reads ControlNetModel there"
    ):
        ldm.load_controlnet(models.folder("sd1") / "unet", pipe)
    with pytest.raises(LDMError, match="There is no model"):
        ldm.load_controlnet(tmp_path / "nowhere", pipe)


def tensor(*shape, fill=0.5):
    return torch.full(shape, fill)


NOT_FINITE = tensor(1, 3, 24, 40).index_fill(3, torch.tensor([5]), float("nan"))
CONTROLS = {  # what Control is given -> what it says
    "not a net": (lambda net: Control("canny", PICTURE), "^Control takes a ControlNet, not .* str: .ldm.load_contr"),
    "half a net": (lambda net: Control(net.down_blocks, PICTURE), "takes a ControlNet, not .* ModuleList: "),
    "infinite scale": (lambda net: Control(net, PICTURE, float("inf")), "^The scale of a ControlNet must be a finite"),
    "scale not a number": (lambda net: Control(net, PICTURE, float("nan")), "must be a finite number, not nan"),
    "scale a word": (lambda net: Control(net, PICTURE, "high"), "must be a finite number, not 'high'"),
    "scales": (lambda net: Control(net, PICTURE, [1.0, 0.5]), r"must be a finite number, not \[1.0, 0.5\]"),
    "start after end": (lambda net: Control(net, PICTURE, start=0.7, end=0.3), "<= 1: not from 0.7 to 0.3"),
    "nothing between": (lambda net: Control(net, PICTURE, start=0.5, end=0.5), "not from 0.5 to 0.5. Leave it out"),
    "start below 0": (lambda net: Control(net, PICTURE, start=-0.1), "not from -0.1 to 1.0"),
    "end above 1": (lambda net: Control(net, PICTURE, end=50), "not from 0.0 to 50"),
    "no number": (lambda net: Control(net, PICTURE, end=None), "not from 0.0 to None"),
    "an unbatched tensor": (lambda net: Control(net, tensor(3, 24, 40)), r"shape \(3, 24, 40\); \(B or 1, 3, H, W\)"),
    "a grey tensor": (lambda net: Control(net, tensor(1, 1, 24, 40)), r"has the shape \(1, 1, 24, 40\); \(B or 1, 3"),
}  # fmt: skip


@pytest.mark.parametrize("what", CONTROLS)
def test_a_control_that_cannot_be_gets_a_sentence(models, what):
    make, said = CONTROLS[what]
    with pytest.raises(LDMError, match=said) as caught:
        make(controlnets(models, "sd1")[1])
    assert "\n" not in str(caught.value)


PICTURES = {  # the picture -> what a run of two pictures of 40x24 says
    "another shape": (tensor(1, 3, 40, 24), r"shape \(1, 3, 40, 24\); \(1 or 2, 3, 24, 40\) is needed"),
    "three for two": (tensor(3, 3, 24, 40), r"shape \(3, 3, 24, 40\); \(1 or 2, 3, 24, 40\)"),
    "-1 to 1": (torch.linspace(-1, 1, 2880).reshape(1, 3, 24, 40), r"takes \[0, 1\]: it looks like \[-1, 1\]"),
    "0 to 255": (tensor(1, 3, 24, 40, fill=255.0), "it looks like 0..255, so divide it by 255"),
    "whole numbers": (tensor(1, 3, 24, 40).byte(), "of torch.uint8: if it looks like 0..255, divide it by 255"),
    "not finite": (NOT_FINITE, "holds NaN or infinity"),
    "other proportions": (
        PICTURE.resize((40, 40)),
        "The picture of a ControlNet has 40x40 pixels, and 40x24 are to be",
    ),
    "three pictures for two": ([PICTURE] * 3, "3 pictures for 2 pictures to be drawn: give one for all, or one each"),
    "no picture": ([], "0 pictures for 2|must be a path"),
    "nothing": (None, "the picture of a ControlNet must be a path, a Pillow image or an array"),
    "a missing file": ("edges-of-nothing.png", "edges-of-nothing.png does not exist"),
    "an array of floats": (np.zeros((24, 40, 3)), "the picture of a ControlNet must be an array of uint8"),
}


@pytest.mark.parametrize("what", PICTURES)
def test_a_picture_that_cannot_be_gets_a_sentence_before_a_step_is_taken(models, what):
    picture, said = PICTURES[what]
    pipe, net = models.ours("sd1"), controlnets(models, "sd1")[1]
    with pytest.raises(LDMError, match=said) as caught:
        pipe.prepare([PROMPT, OTHERS[0]], **SMALL, control=[Control(net, picture)])
    assert "\n" not in str(caught.value)


def test_what_a_run_cannot_do_with_controls_gets_a_sentence(models):
    pipe, net = models.ours("sd1"), controlnets(models, "sd1")[1]
    for given, said in ((net, "ControlNet"), ([net], "ControlNet"), ([PICTURE], "Image"), ("canny", "str")):
        with pytest.raises(
            LDMError, match=f"control takes Controls, a ControlNet with its picture, not a thing of type {said}"
        ):
            pipe.prepare(PROMPT, **SMALL, control=given)
    fits, other = Control(net, PICTURE), Control(pair("sd1", torch.float32)[1], PICTURE)
    with pytest.raises(LDMError, match=r"^The ControlNet 2 of 2 was made for another base .* text 20 wide"):
        pipe.prepare(PROMPT, **SMALL, control=[fits, other])
    with pytest.raises(LDMError, match=r"^The ControlNet was made for another base"):
        pipe.prepare(PROMPT, **SMALL, control=other)
    with pytest.raises(LDMError, match="Tiles and ControlNets don't go together"):
        pipe.prepare(PROMPT, **SMALL, control=fits, tile=64)
    own = conditional(pipe.unet, pipe.encode([PROMPT]))
    with pytest.raises(LDMError, match="A network of your own is given: put the ControlNets into it"):
        pipe.prepare(PROMPT, **SMALL, control=fits, network=own)


def test_a_picture_that_does_not_look_like_its_kind_gets_a_line(models, capsys):
    pipe, net = models.ours("sd1"), controlnets(models, "sd1")[1]
    capsys.readouterr()  # diffusers' progress, where the models are written only now
    pipe.prepare(PROMPT, **SMALL, control=[Control(net, PICTURE)])
    assert capsys.readouterr().err == ""
    pipe.prepare([PROMPT] * 2, **SMALL, control=[Control(net, [PICTURE] * 2, kind="canny")])
    assert len(capsys.readouterr().err.splitlines()) == 1  # once, not for each picture
    lines = np.zeros((24, 40), np.uint8)
    lines[5, 3:30] = 255
    pipe.prepare(PROMPT, **SMALL, control=[Control(net, lines, kind="canny")])
    assert capsys.readouterr().err == ""
    with pytest.raises(LDMError, match=r"Unknown condition 'cany'.*Did you mean 'canny'"):
        pipe.prepare(PROMPT, **SMALL, control=[Control(net, PICTURE, kind="cany")])


def test_the_size_drawn_is_the_picture_s_unless_another_is_asked_for(models):
    pipe, net = models.ours("sd1"), controlnets(models, "sd1")[1]
    for given in (PICTURE, [PICTURE], tensor(1, 3, 24, 40)):
        settings = pipe.prepare(PROMPT, steps=2, control=[Control(net, given)]).settings
        assert (settings.width, settings.height) == (40, 24)
    settings = pipe.prepare(PROMPT, steps=2, width=80, height=48, control=[Control(net, PICTURE)]).settings
    assert (settings.width, settings.height) == (80, 48)
