"""What a file is, told by keys and shapes: every published model in every layout, other kinds, files that don't fit.

No file is written: a header is all that recognition sees. The lists are the authors' own (`test_names.py`).
"""

import json
import random
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
from test_names import configs_of, original_keys

from ldm.checkpoints import names
from ldm.checkpoints.architectures import ARCHITECTURES, PUBLISHED
from ldm.checkpoints.kinds import FILES, NETWORKS
from ldm.checkpoints.names import Origin, averaged, origins, prefixes, shapes
from ldm.checkpoints.recognise import recognise
from ldm.errors import LDMError
from ldm.io.headers import Entry
from ldm.schedules import ScheduleConfig
from ldm.tasks import task_of

PLACE = "flux-lora.safetensors"  # a name that says something else, and is not asked


def entries(keys, dtype="F16"):
    return {name: Entry(name, dtype, tuple(shape), Path(PLACE)) for name, shape in keys.items()}


def look(keys, metadata=None, dtype="F16"):
    return recognise(entries(keys, dtype), PLACE, metadata)


def keys_of(part, config, prefix, layout="original"):
    found = origins(part, config, prefix, layout)
    return {origin.name: origin.stored(shapes(part, config)[key]) for key, origin in found.items()}


@cache
def whole(name):
    """A published model as one original file."""
    configs = configs_of(name)
    keys = {}
    for part, prefix in prefixes(configs).items():
        keys |= keys_of(part, configs[part], prefix)
    return keys


def refusal(found, place=PLACE):
    with pytest.raises(LDMError) as error:
        found.check(place)
    sentence = str(error.value)
    assert sentence.startswith(f"{place} is ") and sentence.endswith(".") and "\n" not in sentence
    return sentence


# ---------------------------------------------------------------------------------------------------- whole models

LISTS = {  # the list, the candidates, how many tensors are passed over, what the sentence says
    "sd1": (["sd15"], 13, "a Stable Diffusion 1: its UNet reads 4 channels and a context of 768 numbers"),
    "sd1-inpainting": (["sd15-inpaint"], 13, "a Stable Diffusion 1 for inpainting: its UNet reads 9 channels and a "
                       "context of 768 numbers"),
    "sd2": (["sd21", "sd21-base"], 14, "a Stable Diffusion 2: its UNet reads 4 channels and a context of 1024 numbers"),
    "sdxl-base": (["sdxl"], 2, "a Stable Diffusion XL base: its UNet reads 4 channels, a context of 2048 numbers and "
                  "2816 numbers of pooled vector and sizes"),
    "sdxl-refiner": (["sdxl-refiner"], 1, "a Stable Diffusion XL refiner: its UNet reads 4 channels, a context of 1280 "
                     "numbers and 2560 numbers of pooled vector and sizes"),
}  # fmt: skip


@pytest.mark.parametrize("file", LISTS)
def test_the_authors_files_are_recognised_with_the_reason(file):
    candidates, passed, reason = LISTS[file]
    keys = original_keys()[file]
    found = look(keys)
    assert found.kind == "pipeline" and [each.name for each in found.candidates] == candidates
    assert found.reason == reason and found.architecture is found.candidates[0]
    assert sum(len(group.names) for group in found.passed_over) == passed and all(g.why for g in found.passed_over)
    assert not (found.missing or found.wrong or found.unknown or found.lacks or found.refused or found.own)
    found.check_pipeline(PLACE)
    claimed = {origin.name for part in found.parts for origin in found.origins(part).values()}
    assert claimed | {name for group in found.passed_over for name in group.names} == set(keys)
    assert found.parts.keys() == found.configs.keys() == found.architecture.parts.keys()


@pytest.mark.parametrize("each", PUBLISHED, ids=lambda each: each.name)
def test_every_published_model_is_recognised_as_itself(each):
    found = look(whole(each.name))
    found.check_pipeline(PLACE)
    alike = {"sd21-base": ["sd21", "sd21-base"], "sd21": ["sd21", "sd21-base"]}
    assert [one.name for one in found.candidates] == alike.get(each.name, [each.name])
    assert not found.passed_over and found.configs["vae"] == configs_of(each.name)["vae"]


def test_every_published_model_is_one_that_ldm_draws_with():
    tasks = {"inpaint": "inpaint", "edit": "edit", "depth": "depth", "upscaler": "upscale"}
    for each in PUBLISHED:
        configs = configs_of(each.name)
        if "transformer" in configs:
            continue
        unet, vae = configs["unet"], configs["vae"]
        assert task_of(unet.in_channels, vae.latent_channels) == tasks.get(each.name.split("-")[-1], "text")
        width = sum(configs[part].hidden_size for part in configs if part.startswith("text_encoder"))
        assert width == unet.cross_attention_dim and len(each.pads) == sum("text" in part for part in configs)
        assert ScheduleConfig.from_json(each.scheduler).num_train_timesteps == 1000
        assert vae.factor == (4 if each.name == "x4-upscaler" else 8)
    upscaler = ARCHITECTURES["x4-upscaler"]
    low_res = ScheduleConfig.from_json(upscaler.low_res_scheduler)
    assert (low_res.beta_end, low_res.prediction_type, upscaler.index) == (0.02, "epsilon", {"max_noise_level": 350})
    assert upscaler.scheduler["prediction_type"] == "v_prediction"


def test_what_shapes_do_not_show_is_left_open():
    found = look(whole("sd21"))
    assert found.predicting("v_prediction").name == "sd21" and found.predicting("epsilon").name == "sd21-base"
    assert look(whole("sd15")).predicting("v_prediction").name == "sd15"
    assert look({"a": ()}).predicting("epsilon") is None


def test_beside_the_model_of_older_and_longer_files():
    """EMA copies, an upscaler's tables, MiDaS, a VAE's losses: in groups, with the reason; none of them is read."""
    found = origins("unet", configs_of("sd15")["unet"], names.UNET)
    ema = {averaged(origin).name: (1,) for origin in found.values()}
    plain = whole("sd15")
    full = look(plain | ema | {"model_ema.decay": (), "model_ema.num_updates": ()})
    full.check_pipeline(PLACE)
    groups = {group.what: len(group.names) for group in full.passed_over}
    assert groups == {"moving averages of the weights (EMA)": 686, "counters of moving averages": 2}
    assert full.has_ema and not look(plain | {"model_ema.decay": (), "model_ema.num_updates": ()}).has_ema
    assert {origin.name for origin in full.origins("unet", ema=True).values()} == set(ema)
    for name, more in (
        ("x4-upscaler", ["low_scale_model.betas", "low_scale_model.sqrt_alphas_cumprod"]),
        ("sd2-depth", ["depth_model.model.pretrained.model.cls_token", "depth_model.model.scratch.layer1_rn.weight"]),
        ("sd15", ["first_stage_model.loss.logvar", "first_stage_model.loss.discriminator.main.0.weight"]),
        ("sd15", [f"cond_stage_model.transformer.{each}" for each in (
            "vision_model.embeddings.class_embedding", "vision_model.embeddings.position_ids", "text_projection.weight",
            "vision_model.encoder.layers.0.mlp.fc1.bias", "visual_projection.weight", "logit_scale")]),
        ("sd21", ["cond_stage_model.model.visual.proj", "model.log_sigmas", "model.sigmas"]),
        ("sdxl", ["denoiser.log_sigmas", "denoiser.weighting.sigmas", "model_sampling.sigmas"]),
        ("sdxl", ["denoiser.sigmas", "conditioner.embedders.0.transformer.text_projection.weight",
                  "conditioner.embedders.0.logit_scale"]),
    ):  # fmt: skip
        found = look(whole(name) | dict.fromkeys(more, (1,)))
        found.check_pipeline(PLACE)
        assert sorted(n for group in found.passed_over for n in group.names) == sorted(more)


def test_old_text_encoders_without_their_outer_name():
    old = {name.replace("transformer.text_model.", "transformer."): shape for name, shape in whole("sd15").items()}
    found = look(old | {"cond_stage_model.transformer.embeddings.position_ids": (1, 77)})
    found.check_pipeline(PLACE)
    assert found.parts["text_encoder"] == ("cond_stage_model.transformer.", "original")


def test_a_text_encoder_that_is_called_as_sdxl_s_are():
    """SD Turbo's file: Stable Diffusion 2 by the code that trained SDXL, which numbers text encoders."""
    inner = "conditioner.embedders.0.model."
    for name, first in (("sd21", "sd21"), ("tiny-sd21", "own")):
        keys = {key.replace(names.OPENCLIP_2, inner): shape for key, shape in whole(name).items()}
        found = look(keys | {f"{inner}logit_scale": ()}, own(name) if first == "own" else None)
        found.check_pipeline(PLACE)
        assert found.architecture.name == first and found.parts["text_encoder"] == (inner, "original")
        assert list(found.parts) == list(found.configs) == ["unet", "vae", "text_encoder"]
    keys = {key.replace(names.CLIP_1, names.CLIP_XL): shape for key, shape in whole("sd15").items()}
    assert look(keys).architecture.name == "sd15" and not look(keys).lacks


def test_a_distilled_unet_s_guidance_embedding():
    found = look(whole("sd15") | {"model.diffusion_model.time_embed.cond_proj.weight": (320, 256)})
    found.check_pipeline(PLACE)
    assert found.configs["unet"].time_cond_proj_dim == 256 and found.reason.endswith("and the guidance scale")
    assert found.architecture.parts["unet"]["time_cond_proj_dim"] == 256


def test_a_controlnet_together_with_its_model():
    """As cldm's training saves it."""
    found = look(whole("sd15-controlnet"))
    found.check_pipeline(PLACE)
    assert list(found.parts) == ["unet", "vae", "controlnet", "text_encoder"]
    assert found.reason.startswith("a Stable Diffusion 1 with a ControlNet: its UNet reads 4 channels")
    assert found.configs["controlnet"] == configs_of("sd15-controlnet")["controlnet"]


# ------------------------------------------------------------------------------------------------------ single parts


@pytest.mark.parametrize("name", ["sd15", "sd21", "sdxl"])
@pytest.mark.parametrize(
    "prefix, layout",
    [("control_model.", "original"), ("", "original"), ("", "diffusers")],
    ids=["prefix", "bare", "ours"],
)
def test_a_controlnet(name, prefix, layout):
    led = ARCHITECTURES[name].led(name)
    config = names.ControlNetConfig.from_json(led.parts["controlnet"])
    found = look(keys_of("controlnet", config, prefix, layout))
    found.check(PLACE)
    assert found.kind == "controlnet" and found.parts == {"controlnet": (prefix, layout)}
    assert found.configs["controlnet"] == config and found.architecture.name == name
    assert found.reason.startswith(f"a ControlNet of {ARCHITECTURES[name].title}: it reads 4 channels")
    with pytest.raises(LDMError, match="and no whole model: it lacks the UNet; take a checkpoint"):
        found.check_pipeline(PLACE)
    assert look(original_keys()["controlnet-sd1"]).architecture.name == "sd15"


@pytest.mark.parametrize("name", ["sd15", "sd2-depth", "x4-upscaler", "sdxl", "sdxl-refiner"])
@pytest.mark.parametrize(
    "prefix, layout", [("model.diffusion_model.", "original"), ("", "original"), ("", "diffusers")], ids=str
)
def test_a_unet_alone_is_known_and_is_no_whole_model(name, prefix, layout):
    config = configs_of(name)["unet"]
    found = look(keys_of("unet", config, prefix, layout))
    found.check(PLACE)
    assert found.kind == "unet" and found.configs == {"unet": config} and found.architecture.name == name
    with pytest.raises(
        LDMError, match=r"no whole model: it lacks the (text encoder|second text encoder) and the"
    ) as error:
        found.check_pipeline(PLACE)
    assert "VAE" in str(error.value) and "ldm convert" in str(error.value)


@pytest.mark.parametrize(
    "prefix, layout",
    [
        ("first_stage_model.", "original"),
        ("", "original"),
        ("", "diffusers"),
        ("vae.", "diffusers"),
        ("", "diffusers-old"),
    ],
    ids=str,
)
def test_a_vae_alone_may_have_one_of_two_scales(prefix, layout):
    config = configs_of("sd15")["vae"]
    keys = keys_of("vae", config, prefix, layout)
    found = look(keys | {"loss.discriminator.main.0.weight": (64, 3, 4, 4), "model_ema.decay": ()})
    found.check(PLACE)
    assert found.kind == "vae" and found.parts == {"vae": (prefix, layout)}
    assert found.scaling_factors == (0.18215, 0.13025) and [c.name for c in found.candidates] == ["sd15", "sdxl"]
    assert found.reason == "a VAE: its latents have 4 channels, at 8 pixels each"
    small = look(keys_of("vae", configs_of("x4-upscaler")["vae"], "first_stage_model."))
    assert small.scaling_factors == (0.08333,)


def test_a_vae_that_keeps_its_attention_as_matrices():
    keys = keys_of("vae", configs_of("sd15")["vae"], "first_stage_model.")
    flat = {name: shape[:2] if ".attn_1." in name else shape for name, shape in keys.items()}
    assert flat != keys
    look(flat).check(PLACE)


@pytest.mark.parametrize(
    "name, part, prefix, layout",
    [
        ("sd15", "text_encoder", "text_model.", "diffusers"),
        ("sd15", "text_encoder", "", "diffusers"),
        ("sd15", "text_encoder", "cond_stage_model.transformer.text_model.", "original"),
        ("sd21", "text_encoder", "", "original"),
        ("sdxl", "text_encoder_2", "text_model.", "diffusers"),
        ("sdxl", "text_encoder_2", "", "original"),
    ],
)
def test_a_text_encoder_alone(name, part, prefix, layout):
    config = configs_of(name)[part]
    keys = keys_of("text_encoder", config, prefix, layout) | {f"{prefix}embeddings.position_ids": (1, 77)}
    found = look(keys)
    found.check(PLACE)
    assert found.kind == "text_encoder" and found.configs["text_encoder"] == config
    assert found.reason == f"a text encoder: its {config.num_hidden_layers} layers are {config.hidden_size} wide"


def test_parts_without_a_text_encoder():
    keys = {name: shape for name, shape in whole("sd15").items() if not name.startswith("cond_stage_model.")}
    found = look(keys | {"cond_stage_model.transformer.text_model.embeddings.position_ids": (1, 77)})
    found.check(PLACE)
    assert found.kind == "pipeline" and found.lacks == ("text_encoder",)
    with pytest.raises(LDMError, match="it lacks the text encoder; take"):
        found.check_pipeline(PLACE)


# ---------------------------------------------------------------------------------------------------- what doesn't fit


@pytest.mark.parametrize("file", LISTS)
def test_nothing_may_be_lost_added_or_misshapen(file):
    """Any tensor of any part: what is read can't be done without, and what is unknown is told."""
    keys, rng = original_keys()[file], random.Random(1)
    passed = {name for group in look(keys).passed_over for name in group.names}
    for name in rng.sample([key for key in keys if key not in passed], 3) + ["model.diffusion_model.out.2.weight"]:
        less = look({key: shape for key, shape in keys.items() if key != name})
        assert less.missing == (name,) and not less.wrong and not less.unknown
        assert f"; but missing {name}: " in refusal(less) and less.reason.startswith("most like a Stable Diffusion")
        twisted = look(keys | {name: (*keys[name], 2)})
        assert [misfit[:2] for misfit in twisted.wrong] == [(name, (*keys[name], 2))] and not twisted.missing
        assert twisted.wrong[0].wanted == keys[name]
        assert f"wrong shape: {name} is {(*keys[name], 2)} instead of {keys[name]}: " in refusal(twisted)
        more = look(keys | {name + ".more": (1,)})
        assert more.unknown == (name + ".more",) and f"unknown '{name}.more'" in refusal(more)


@pytest.mark.parametrize(
    "strange",
    [
        "extra",
        "cond_stage_model.more.weight",
        "embedding_manager.x",
        "model_emo.x",
        "depth.model",
        "\x1b[1m",
        "model.sigmas.0",
        "sigmas",
        "cond_stage_model.transformer.visual",
        "vision_model.x",
    ],
)
def test_a_tensor_of_nothing_that_is_known_is_told(strange):
    found = look(original_keys()["sd1"] | {strange: (3,)})
    assert found.unknown == (strange,) and f"unknown {strange!r}: " in refusal(found)


def test_a_layer_too_many_is_passed_over_only_where_it_is_known_to_be_one():
    layer = "transformer.resblocks.{}.ln_1.weight"
    assert look(whole("sd21") | {f"cond_stage_model.model.{layer.format(24)}": (1024,)}).unknown
    assert look(whole("sdxl") | {f"conditioner.embedders.1.model.{layer.format(32)}": (1280,)}).unknown
    assert not look(whole("sd21") | {f"cond_stage_model.model.{layer.format(23)}": (1024,)}).unknown


def test_a_unet_of_another_first_convolution_is_the_nearest_one_misshapen():
    keys = whole("sd15") | {"model.diffusion_model.input_blocks.0.0.weight": (320, 12, 3, 3)}
    assert "input_blocks.0.0.weight is (320, 12, 3, 3) instead of (320, 4, 3, 3)" in refusal(look(keys))


def test_another_vae_is_most_like_ours():
    keys = original_keys()["flux-vae"]
    found = look(keys)
    found.check(PLACE)
    assert found.kind == "vae" and found.configs["vae"].latent_channels == 16 and found.scaling_factors == (0.3611,)
    wider = keys | {"encoder.conv_out.weight": (64, 512, 3, 3), "encoder.conv_out.bias": (64,)}
    sentence = refusal(look(wider))
    assert "most like a VAE" in sentence and "encoder.conv_out.weight is (64, 512, 3, 3) instead of (32, 5" in sentence


def test_shapes_of_no_published_model():
    keys = {name: tuple(n + 1 for n in shape) for name, shape in whole("sd15").items()}
    found = look(keys)
    assert found.kind == "unknown" and found.architecture is None and not found.parts
    sentence = refusal(found)
    assert (
        "of no architecture that ldm knows: its 1130 tensors make a UNet whose first convolution is (321, 5, 4, 4) and"
        in (sentence)
    )
    assert refusal(look({})) == (
        f"{PLACE} is empty: it holds no tensor: name a model, a ControlNet or a VAE of Stable Diffusion 1, 2 or XL, or "
        "of FLUX.1."
    )
    nothing = refusal(look({"fc1.weight": (3, 4), "fc1.bias": (3,)}))
    assert "nothing that ldm knows: its 2 tensors are 'fc1.weight', 'fc1.bias': name a model" in nothing


@pytest.mark.parametrize("dtype", ["F8_E4M3", "U8", "I8"])
def test_quantised_weights_are_refused(dtype):
    keys = whole("sd15")
    some = entries(keys)
    name = "model.diffusion_model.middle_block.1.proj_in.weight"
    some[name] = some[name]._replace(dtype=dtype)
    assert f"quantised ({name} is {dtype}): take float16" in refusal(recognise(some, PLACE))
    assert recognise(entries(keys, "BF16"), PLACE).refused == ""


def test_marks_of_the_prediction_type():
    plain = whole("sdxl")
    assert look(plain).marks == frozenset()
    found = look(plain | {"v_pred": (), "ztsnr": ()})
    found.check_pipeline(PLACE)
    assert found.marks == {"v_pred", "ztsnr"}
    for mark in ("edm_mean", "edm_vpred.sigma_max"):
        assert "levels of noise are those of EDM" in refusal(look(plain | {mark: (4,), mark.replace("max", "min"): ()}))


OTHERS = {
    "double_blocks.0.img_attn.qkv.weight": "unknown",
    "double_stream_modulation_img.lin.weight": "flux2",
    "transformer.double_stream_modulation_img.linear.weight": "flux2",
    "model.diffusion_model.distilled_guidance_layer.in_proj.weight": "chroma",
    "controlnet_x_embedder.weight": "flux-controlnet",
    "double_blocks.3.processor.ip_adapter_double_stream_k_proj.weight": "flux-ip",
    "model.model.double_blocks.0.img_attn_qkv.weight": "unknown",
    "model.double_blocks.0.img_attn_qkv.weight": "video",
    "model.diffusion_model.joint_blocks.0.context_block.adaLN_modulation.1.bias": "sd3",
    "clip_txt_mapper.weight": "cascade",
    "embedder.model.visual.conv1.weight": "unclip",
    "noise_augmentor.betas": "unclip",
    "down_blocks.0.motion_modules.0.temporal_transformer.norm.weight": "video",
    "model.diffusion_model.input_blocks.1.1.time_stack.0.attn1.to_q.weight": "video",
    "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.fuser.alpha_attn": "gligen",
    "blocks.0.adaLN_modulation.1.weight": "dit",
    "transformer_blocks.0.scale_shift_table": "dit",
    "lora_controlnet": "controlnet-lora",
    "lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight": "lora",
    "lora_te1_text_model_encoder_layers_0_mlp_fc1.alpha": "lora",
    "base_model.model.down_blocks.0.attentions.0.proj_in.lora_A.default.weight": "lora",
    "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.processor.to_q_lora.down.weight": "unknown",
    "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.lora.down.weight": "lora",
    "unet.mid_block.attentions.0.to_k.lora_A.weight": "lora",
    "emb_params": "embedding",
    "clip_g": "embedding",
    "<cat-toy>": "embedding",
    "image_proj.proj.weight": "ip-adapter",
    "lllite_unet_input_blocks_1_1_transformer_blocks_0_attn1_to_q.conditioning1.0.weight": "lllite",
    "768.0.linear.0.weight": "hypernetwork",
    "taesd_decoder.3.conv.0.weight": "taesd",
    "3.conv.4.bias": "taesd",
    "encoder.layers.1.conv.2.weight": "taesd",
    "brushnet_mid_block.weight": "brushnet",
    "brushnet_up_blocks.3.bias": "brushnet",
    "state_dict.model.diffusion_model.out.2.weight": "wrapped",
    "3.conv.1.weight": "unknown",
    "adapter.body.0.resnets.0.block1.weight": "adapter",
    "body.0.block1.weight": "adapter",
    "encoder.block.0.layer.0.SelfAttention.q.weight": "t5",
    "model.1.sub.0.RDB1.conv1.0.weight": "enlarger",
    "concept_embeds": "safety",
    "vision_model.embeddings.class_embedding": "vision",
    "optimizer_states.0.state.0.exp_avg": "training",
    "layers.0.weight": "unknown",
    "my.joint_blocks.0.weight": "unknown",
    "concept_embeds_weights": "unknown",
}


@pytest.mark.parametrize("key", OTHERS)
def test_other_kinds_are_called_by_their_name(key):
    found = look({"x.weight": (3,), key: (2, 2)})
    assert found.kind == OTHERS[key]
    sentence = refusal(found)
    assert (f"by its tensor '{key}'" in sentence) == (found.kind != "unknown")


def test_every_other_kind_has_a_test_and_none_takes_a_model_for_it():
    assert {line[0] for line in (*NETWORKS, *FILES)} <= set(OTHERS.values())
    brushnet = keys_of("unet", configs_of("sd15")["unet"], "", "diffusers") | {
        "brushnet_mid_block.weight": (1280, 1280)
    }
    assert look(brushnet).kind == "brushnet" and "is a BrushNet, by its tensor 'brushnet_mid" in refusal(look(brushnet))
    with_lora = look(whole("sd15") | {"lora_unet_x.lora_down.weight": (1,)})
    assert with_lora.kind == "pipeline" and with_lora.unknown == ("lora_unet_x.lora_down.weight",)


# ------------------------------------------------------------------------------------------- its own configuration


def own(name, **more):
    parts = {part: config.to_json() for part, config in configs_of(name).items()}
    return {"ldm.config": json.dumps(parts | more)}


@pytest.mark.parametrize("name", ["tiny-sd15", "tiny-sd21", "tiny-sdxl-controlnet", "tiny-refiner"])
def test_a_file_that_carries_its_configuration(name):
    """Whatever its size: its own configurations are taken, and compared as strictly."""
    keys, scheduler = whole(name), {"prediction_type": "v_prediction"}
    found = look(keys, own(name, scheduler=scheduler, index={"a": 1}, pads=["!"]))
    found.check_pipeline(PLACE)
    assert found.own and found.configs == {part: configs_of(name)[part] for part in found.configs}
    mine = found.architecture
    assert (mine.scheduler, mine.index, mine.pads) == (scheduler, {"a": 1}, ("!",)) and len(found.candidates) == 1
    assert found.reason.startswith("a model of its own") and ", as its metadata say: its UNet reads 4 " in found.reason
    assert look(keys).kind == "unknown"
    key = next(iter(keys))
    assert look({k: s for k, s in keys.items() if k != key}, own(name)).missing == (key,)
    assert look({k: (*s, 1) for k, s in keys.items()}, own(name)).kind == "pipeline"  # hardly fits, and is no other


def test_a_part_that_carries_its_configuration():
    config = replace(configs_of("tiny-sd15")["vae"], scaling_factor=0.5)
    found = look(keys_of("vae", config, "", "diffusers"), {"ldm.config": json.dumps({"vae": config.to_json()})})
    found.check(PLACE)
    assert found.scaling_factors == (0.5,) and found.configs == {"vae": config}
    only = {"ldm.config": json.dumps({"unet": configs_of("tiny-sd15")["unet"].to_json()})}
    with pytest.raises(LDMError, match="holds a VAE, of which the configuration in its metadata says nothing"):
        look(whole("tiny-sd15"), only)


@pytest.mark.parametrize(
    "text, says",
    [
        ("{", "is not valid JSON"),
        ('{"unet": {}, "unet": {}}', "not acceptable JSON"),
        ("[]", "is no table of configurations"),
        ('{"unet": 3}', "has a unet that is no table"),
        ('{"scheduler": []}', "has a scheduler that is no table"),
        ('{"unet": {}, "code": {}}', "has a 'code', which ldm doesn't know"),
        ('{"pads": "!"}', "has pads that are no list of words"),
        ('{"unet": {"act_fn": "mish"}}', "asks for 'act_fn' = 'mish'"),
        ('{"unet": {"block_out_channels": 3}}', "in its metadata (ldm.config): "),
        ('{"unet": {"norm_num_groups": "many"}}', "in its metadata (ldm.config): "),
        ('{"unet": {"norm_num_groups": 7}}', "no unet can be built of it (num_channels (320) must be divisible"),
        ('{"unet": {"norm_num_groups": 0}}', "no unet can be built of it"),
        ('{"unet": {"layers_per_block": 100000000}}', "asks for 100000000 layers, and the file has"),
        ('{"text_encoder": {"num_hidden_layers": 1000000}}', "asks for 1000000 layers"),
        ('{"unet": {"transformer_layers_per_block": [1, 1, 1, 99999]}}', "asks for 99999 layers"),
        ('{"unet": {"transformer_layers_per_block": 99, "layers_per_block": 99}}', "asks for 9801 layers"),
    ],
)
def test_a_configuration_that_cannot_be_meant_is_refused(text, says):
    with pytest.raises(LDMError) as error:
        look(whole("tiny-sd15"), {"ldm.config": text})
    assert says in str(error.value) and "\n" not in str(error.value)


def test_a_configuration_that_names_another_class_is_refused():
    """Parts of one model in the metadata of a file, under each other's names."""
    for part, fields, says in (
        (
            "unet",
            {"_class_name": "ControlNetModel"},
            "of the UNet names the class 'ControlNetModel', and ldm reads UNet2D",
        ),
        ("vae", {"_class_name": "AutoencoderTiny"}, "of the VAE names the class 'AutoencoderTiny'"),
        ("controlnet", {"_class_name": "UNet2DConditionModel"}, "of the ControlNet names the class 'UNet2DCond"),
        ("text_encoder", {"architectures": ["T5EncoderModel"]}, "of the text encoder names the class 'T5EncoderModel'"),
    ):
        with pytest.raises(LDMError) as error:
            look(whole("tiny-sd15"), {"ldm.config": json.dumps({part: fields})})
        assert f"in its metadata (ldm.config): The configuration {says}" in str(error.value)


def test_origins_lead_to_the_files_tensors():
    found = look(whole("sdxl"))
    assert found.origins("text_encoder_2")["text_projection.weight"] == Origin(
        "conditioner.embedders.1.model.text_projection", "transposed"
    )
    assert found.origins("vae")["decoder.mid_block.attentions.0.to_q.weight"].form == "conv"
