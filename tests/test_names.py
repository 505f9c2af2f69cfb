"""Original names: against the authors' own modules at full size, and against diffusers' converters, number for number.

`original_keys.json.gz` holds every key and shape of the authors' modules (CompVis' ldm and cldm, Stability AI's
stablediffusion and generative-models, FLUX and its VAE), built at full size without memory. Keys and shapes can't tell
a query from a key; so tiny networks with every parameter drawn go through diffusers' converters of files as well.
"""

import gzip
import inspect
import json
import math
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers.loaders import single_file_utils as converters
from reference import normal

from ldm.checkpoints import names
from ldm.checkpoints.architectures import ALL, ARCHITECTURES, PUBLISHED, SMALL_VAE
from ldm.checkpoints.fit import CONFIGS
from ldm.checkpoints.names import Origin, Renamed, averaged, origins, prefixes, shapes, to_original
from ldm.errors import LDMError
from ldm.io.weights import WeightFiles, blank, load_weights, save_weights
from ldm.models.unet import CROSS_DOWN, CROSS_UP, DOWN, UP, UNetConfig
from ldm.models.vae import VAEConfig
from ldm.text.clip import TextConfig, TextEncoder

TINY = [each.name for each in ALL if each.name.startswith("tiny")]


@cache
def original_keys():
    """{name of a file: {key: shape}}"""
    text = gzip.decompress((Path(__file__).parent / "original_keys.json.gz").read_bytes())
    files = json.loads(text)
    return {name: {key: tuple(shape) for key, shape in keys.items()} for name, keys in files.items()}


def configs_of(name, only=None):
    parts = ARCHITECTURES[name].parts
    return {part: CONFIGS[part].from_json(fields) for part, fields in parts.items() if only in (None, part)}


def drawn(part, config, seed=0):
    """A state dict of numbers that are all different."""
    found = {}
    for i, (key, shape) in enumerate(shapes(part, config).items()):
        found[key] = normal(1000 * seed + i, *shape)
    return found


def assert_same(ours, theirs):
    assert ours.keys() == theirs.keys()
    for key, tensor in ours.items():
        assert tensor.shape == theirs[key].shape and torch.equal(tensor, theirs[key]), key


# ------------------------------------------------------------------------------------------- the authors' modules

REST = {  # what we don't read, of each list: how many, and a word that is in all their names
    "sd1": {"alphas_cumprod": 7, "betas": 1, "posterior": 4, "position_ids": 1},
    "sd1-inpainting": {"alphas_cumprod": 7, "betas": 1, "posterior": 4, "position_ids": 1},
    "sd2": {"resblocks.23.": 12, "logit_scale": 1, "text_projection": 1},
    "sdxl-base": {"position_ids": 1, "logit_scale": 1},
    "sdxl-refiner": {"logit_scale": 1},
    "controlnet-sd1": {},
    "flux-vae": {},
    "flux-dev": {},
    "flux-schnell": {},
}
BARE = {"vae": "", "transformer": ""}  # below which prefix FLUX's two files have them


@pytest.mark.parametrize(
    "file, name, only",
    [
        ("sd1", "sd15", None),
        ("sd1-inpainting", "sd15-inpaint", None),
        ("sd2", "sd21", None),
        ("sdxl-base", "sdxl", None),
        ("sdxl-refiner", "sdxl-refiner", None),
        ("controlnet-sd1", "sd15-controlnet", "controlnet"),
        ("flux-vae", "flux-dev", "vae"),
        ("flux-dev", "flux-dev", "transformer"),
        ("flux-schnell", "flux-schnell", "transformer"),
    ],
)
def test_every_key_and_shape_is_that_of_the_authors_modules(file, name, only):
    theirs = original_keys()[file]
    configs = configs_of(name, only)
    places = {only: BARE[only]} if file.startswith("flux") else prefixes(configs)
    ours, pieces = {}, 0
    for part, prefix in places.items():
        for key, origin in origins(part, configs[part], prefix).items():
            shape = origin.stored(shapes(part, configs[part])[key])
            assert ours.setdefault(origin.name, shape) == shape  # thirds agree on the whole
            pieces += 1
    thirds = sum(name.endswith(("in_proj_weight", "in_proj_bias")) or ".qkv." in name for name in ours)
    sevenths = sum(".linear1." in name for name in ours)
    assert pieces == len(ours) + 2 * thirds + 3 * sevenths and len(ours) > 200
    assert {key: theirs.get(key) for key in ours} == ours
    rest = [key for key in theirs if key not in ours]
    assert {word: sum(word in key for key in rest) for word in REST[file]} == REST[file]
    assert len(rest) == sum(REST[file].values())


@pytest.mark.parametrize("each", [*PUBLISHED, ARCHITECTURES["sdxl-controlnet"]], ids=lambda each: each.name)
def test_no_two_tensors_of_a_published_model_meet_under_one_name(each):
    configs = configs_of(each.name)
    taken = set()
    for part, prefix in prefixes(configs).items():
        found = origins(part, configs[part], prefix)
        assert found.keys() == shapes(part, configs[part]).keys()
        places = {(origin.name, origin.form if origin.form in names.SHARES else "") for origin in found.values()}
        assert len(places) == len(found) and not places & taken
        taken |= places


def test_the_x4_upscaler_is_as_large_as_published():
    """And the others' UNets differ from their family's in the first convolution alone."""
    count = {
        each.name: sum(map(math.prod, shapes("unet", configs_of(each.name)["unet"]).values()))
        for each in PUBLISHED
        if "unet" in each.parts
    }
    assert round(count["x4-upscaler"] / 1e6, 1) == 473.4
    for name, base, more in (
        ("sd15-inpaint", "sd15", 5), ("sd15-edit", "sd15", 4), ("sd2-inpaint", "sd21", 5), ("sd2-depth", "sd21", 1),
        ("sdxl-inpaint", "sdxl", 5), ("sdxl-edit", "sdxl", 4),
    ):  # fmt: skip
        assert count[name] - count[base] == 320 * 9 * more
    found = origins("unet", configs_of("x4-upscaler")["unet"], names.UNET)
    assert found["class_embedding.weight"].name == "model.diffusion_model.label_emb.weight"


# ------------------------------------------------------------------------------------------ diffusers' converters


def converted(part, config, state, prefix):
    """diffusers' converters of single files, over an original state dict."""
    fields = dict(config.to_json())
    state = dict(state)
    if part == "unet":
        fields["class_embed_type"] = None
        return converters.convert_ldm_unet_checkpoint(state, fields)
    if part == "controlnet":
        return converters.convert_controlnet_checkpoint(state, {"class_embed_type": None, **fields})
    if part == "vae":
        return converters.convert_ldm_vae_checkpoint(state, fields)
    if part == "transformer":
        return narrow(config.width)(state)
    if prefix == names.COMFY_T5:
        return converters.convert_sd3_t5_checkpoint_to_diffusers(state)
    if prefix.endswith("text_model."):
        found = converters.convert_ldm_clip_checkpoint(state, remove_prefix=prefix.removesuffix("text_model."))
    else:
        found = converters.convert_open_clip_checkpoint(SimpleNamespace(config=config), state, prefix=prefix)
    return {TextEncoder.rename(key): tensor for key, tensor in found.items()}


def narrow(width):
    """diffusers' converter of FLUX, which knows one width alone, for a network of another."""
    text = inspect.getsource(converters.convert_flux_transformer_checkpoint_to_diffusers)
    assert text.count("inner_dim = 3072") == 1
    scope = {"torch": torch}
    exec(text.replace("inner_dim = 3072", f"inner_dim = {width}"), scope)
    return scope["convert_flux_transformer_checkpoint_to_diffusers"]


def assert_diffusers_agrees(part, config, prefix, seed=0):
    ours = drawn(part, config, seed)
    found = origins(part, config, prefix)
    original = to_original(ours, found)
    assert {name: tuple(tensor.shape) for name, tensor in original.items()} == {
        origin.name: origin.stored(shapes(part, config)[key]) for key, origin in found.items()
    }
    assert_same(ours, {key: origin.take(original[origin.name]) for key, origin in found.items()})
    if part == "controlnet":  # diffusers' converter passes over what SDXL's is told beside the text
        ours = {key: tensor for key, tensor in ours.items() if not key.startswith("add_embedding.")}
    assert_same(ours, converted(part, config, original, prefix))


@pytest.mark.parametrize("name", TINY)
def test_diffusers_converters_give_our_tensors_back(name):
    """Bit for bit, from what we write; and so do we."""
    configs = configs_of(name)
    for seed, (part, prefix) in enumerate(prefixes(configs).items()):
        assert_diffusers_agrees(part, configs[part], prefix, seed)


@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("crossed", ["x", "ox", "xo", "oxx", "xxo", "oxoox", "ooo"])
def test_diffusers_converters_agree_for_any_levels_and_layers(crossed, layers):
    """`crossed`: a letter a level, x for one with attention. Every number of levels moves every block."""
    down = [CROSS_DOWN if each == "x" else DOWN for each in crossed]
    up = [CROSS_UP if each == "x" else UP for each in reversed(crossed)]
    fields = {
        "block_out_channels": [4 * (i + 1) for i in range(len(crossed))],
        "down_block_types": down,
        "up_block_types": up,
    }
    fields |= {"norm_num_groups": 2, "attention_head_dim": 2, "cross_attention_dim": 6, "layers_per_block": layers}
    depth = [1 + i % 2 for i in range(len(crossed))]
    config = UNetConfig.from_json(
        fields | {"transformer_layers_per_block": depth, "use_linear_projection": layers == 2}
    )
    assert_diffusers_agrees("unet", config, names.UNET)
    widths = {"block_out_channels": [4 * (i + 1) for i in range(len(crossed))], "layers_per_block": layers}
    assert_diffusers_agrees("vae", VAEConfig.from_json(SMALL_VAE | {"norm_num_groups": 2} | widths), names.FIRST_STAGE)


def test_the_upscaler_s_class_embedding_and_only_cross_attention():
    fields = ARCHITECTURES["tiny-sd21"].parts["unet"] | {
        "num_class_embeds": 7,
        "only_cross_attention": [True, False, True],
    }
    config = UNetConfig.from_json(fields)
    ours, found = drawn("unet", config), origins("unet", config, names.UNET)
    original = to_original(ours, found)
    label = original.pop("model.diffusion_model.label_emb.weight")
    assert torch.equal(label, ours.pop("class_embedding.weight")) and label.shape == (7, 32)
    assert_same(ours, converted("unet", config, original, names.UNET))


def test_moving_averages_are_where_diffusers_finds_them():
    config = configs_of("tiny-sd15")["unet"]
    ours, others = drawn("unet", config, 1), drawn("unet", config, 2)
    found = origins("unet", config, names.UNET)
    averages = {key: averaged(origin) for key, origin in found.items()}
    assert averages["time_embedding.linear_1.weight"].name == "model_ema.diffusion_modeltime_embed0weight"
    original = to_original(others, found) | to_original(ours, averages)
    assert len(original) == 2 * len(ours)
    assert_same(ours, converters.convert_ldm_unet_checkpoint(original, config.to_json(), extract_ema=True))


def test_names_of_transformers_and_of_diffusers_own_files():
    text = configs_of("tiny-sdxl")["text_encoder_2"]
    for prefix, layout in (("text_model.", "diffusers"), (names.CLIP_XL, "original")):
        found = {key: origin.name for key, origin in origins("text_encoder_2", text, prefix, layout).items()}
        outer = prefix.removesuffix("text_model.")
        assert found["text_projection.weight"] == f"{outer}text_projection.weight"
        assert found["final_layer_norm.bias"] == f"{outer}text_model.final_layer_norm.bias"
    old = origins("text_encoder", configs_of("tiny-sd15")["text_encoder"], "cond_stage_model.transformer.")
    assert old["final_layer_norm.bias"].name == "cond_stage_model.transformer.final_layer_norm.bias"
    config = configs_of("tiny-sd15")["vae"]
    vae = origins("vae", config, "", "diffusers-old")
    middle = "decoder.mid_block.attentions.0."
    assert [vae[f"{middle}{name}.weight"].name for name in ("to_q", "to_k", "to_v", "to_out.0")] == [
        f"{middle}{name}.weight" for name in ("query", "key", "value", "proj_attn")
    ]
    assert all(names.VAE.rename(origin.name) == key for key, origin in vae.items())
    same = origins("unet", configs_of("tiny-sd15")["unet"], "unet.", "diffusers")
    assert all(origin == Origin(f"unet.{key}") for key, origin in same.items())


# ---------------------------------------------------------------------------------------------- one tensor, one file


def test_a_tensor_of_each_form():
    x = normal(1, 6, 4)
    third = torch.cat([x, 2 * x, 3 * x])
    forms = {"same": x, "conv": x[:, :, None, None], "transposed": x.T, "q": third, "k": third, "v": third}
    for form, stored in forms.items():
        origin = Origin("name", form)
        assert origin.stored((6, 4)) == tuple(stored.shape) and origin.shape(tuple(stored.shape)) == (6, 4)
        taken = origin.take(stored)
        factor = {"k": 2, "v": 3}.get(form, 1)
        assert torch.equal(taken, factor * x)
        assert taken.untyped_storage().data_ptr() == stored.untyped_storage().data_ptr()  # a view
    assert torch.equal(Origin("name", "conv").take(x), x)  # a matrix already
    assert Origin("name", "v").stored((6,)) == (18,) and Origin("name", "k").shape((18,)) == (6,)


def test_shapes_that_cannot_be_meant_are_left_to_be_compared():
    assert Origin("n", "conv").shape((6, 4, 3, 3)) == (6, 4, 3, 3)
    assert Origin("n", "conv").shape((6,)) == (6,)
    assert Origin("n", "q").shape((7, 4)) == (7, 4) and Origin("n", "q").shape(()) == ()
    assert Origin("n", "transposed").shape((2, 3, 4)) == (4, 3, 2)
    for tensor in (torch.zeros(7, 4), torch.zeros(())):
        with pytest.raises(ValueError, match="can't be cut into 3"):
            Origin("n", "k").take(tensor)


@pytest.mark.parametrize("name", ["tiny-sd15-controlnet", "tiny-sd21", "tiny-refiner"])
def test_a_part_is_read_out_of_an_original_file(name, tmp_path):
    """All parts in one file: each is read under our names; loading is strict as ever."""
    configs = configs_of(name)
    places = prefixes(configs)
    states = {part: drawn(part, config, seed) for seed, (part, config) in enumerate(configs.items())}
    original = {}
    for part, state in states.items():
        original |= to_original(state, origins(part, configs[part], places[part]))
    save_weights(original, tmp_path / "all.safetensors")
    source = WeightFiles([tmp_path / "all.safetensors"])
    for part, config in configs.items():
        view = Renamed(source, origins(part, config, places[part]))
        assert {key: entry.shape for key, entry in view.entries.items()} == shapes(part, config)
        assert all(key == entry.name for key, entry in view.entries.items())
        with blank():
            model = names.CLASSES[type(config)](config)
        assert_same(load_weights(model, view).state_dict(), states[part])


def test_what_an_original_file_lacks_is_named(tmp_path):
    config = configs_of("tiny-sd21")["text_encoder"]
    found = origins("text_encoder", config, names.OPENCLIP_2)
    original = to_original(drawn("text_encoder", config), found)
    del original["cond_stage_model.model.transformer.resblocks.1.attn.in_proj_bias"]
    save_weights(original, tmp_path / "all.safetensors")
    view = Renamed(WeightFiles([tmp_path / "all.safetensors"]), found)
    assert len(view.entries) == len(found) - 3
    with blank():
        model = TextEncoder(config)
    with pytest.raises(LDMError, match=r"missing encoder\.layers\.1\.self_attn\.(q|k|v)_proj\.bias"):
        load_weights(model, view)


def test_openclip_s_tower_has_its_place_by_its_activation():
    gelu = {"text_encoder": TextConfig(hidden_act="gelu")}
    quick = {"text_encoder": TextConfig(hidden_act="quick_gelu")}
    assert prefixes(gelu) == {"text_encoder": "cond_stage_model.model."}
    assert prefixes(quick) == {"text_encoder": "cond_stage_model.transformer.text_model."}
    assert prefixes({"text_encoder_2": 1}) == {"text_encoder_2": "conditioner.embedders.0.model."}
    assert prefixes({"text_encoder": 1, "text_encoder_2": 1}) == {
        "text_encoder": "conditioner.embedders.0.transformer.text_model.",
        "text_encoder_2": "conditioner.embedders.1.model.",
    }
