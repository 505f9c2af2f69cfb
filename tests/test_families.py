"""The families beside plain Stable Diffusion: distilled (LCM), Turbo, SDXL's folders and what is wrong with some, and
parts of different dtypes. What SDXL draws is in test_sdxl.py."""

import json
import shutil
from copy import copy

import numpy as np
import pytest
import torch
from diffusers import (
    LCMScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionInstructPix2PixPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from reference import assert_close, normal, randomise, same, scheduler_of
from test_pipeline import equal, same_pixels
from test_sdxl import NEGATIVE, PROMPTS, SIZE, in_our_coordinates, run_diffusers, run_ours, scheduler_like
from tiny import plant
from tiny_pairs import MODELS, PROMPT, SD, UNET, with_scheduler, xl_unet
from tiny_tasks import box_mask, picture

import ldm
from ldm.errors import LDMError
from ldm.guidance import Output
from ldm.io.folders import read_json
from ldm.io.weights import read_tensors, save_weights
from ldm.models.blocks import guidance_embedding
from ldm.models.unet import UNet, UNetConfig
from ldm.precision import cast
from ldm.settings import Defaults
from ldm.sizes import Sizes
from ldm.text.clip import TextConfig, TextEncoder

F32, F64 = torch.float32, torch.float64
EMBEDDED = 10  # the width of a distilled UNet's guidance embedding


@torch.no_grad()
def other_unet(models, name, dtype, **fields):
    """Both sides of a tiny model, with a UNet of other fields."""
    base, ours = models.reference(name, dtype), copy(models.ours(name, dtype))
    if name in MODELS:
        unet = randomise(UNet2DConditionModel(**UNET | MODELS[name][1] | fields), seed=32).eval()
    else:
        unet = xl_unet(name, **fields)
    unet = unet.to(dtype)
    ours.unet = same(lambda: UNet(UNetConfig.from_json(dict(unet.config))), unet)
    ours.watchers = []
    return type(base)(**{**base.components, "unet": unet}, **asks(base)), ours


def asks(base):
    return {"requires_safety_checker": False} if "requires_safety_checker" in base.config else {}


def both(base, ours, cls, scheduler, n, request, dtype):
    """Equal latents on the way and equal pixels; returns our last latent."""
    latents, pixels = run_diffusers(cls, base, scheduler, n, request, dtype)
    found, drawn = run_ours(with_scheduler(ours, scheduler), n, request)
    equal(found, in_our_coordinates(latents, scheduler, n), 1e-11 if dtype == F64 else 1e-5)
    same_pixels(drawn, pixels, most=0 if dtype == F64 else 1)
    return found[-1]


# -------------------------------------------------------------------------------------------------- distilled

TEXT_PIPELINES = {"sd1": StableDiffusionPipeline, "sd2": StableDiffusionPipeline, "sdxl": StableDiffusionXLPipeline}
PICTURE_PIPELINES = {"sd1": StableDiffusionImg2ImgPipeline, "sdxl": StableDiffusionXLImg2ImgPipeline}


@pytest.mark.parametrize("dtype", [F64, F32], ids=["float64", "float32"])
@pytest.mark.parametrize("name", ["sd1", "sdxl"])
def test_a_distilled_unet_is_told_its_guidance_and_drawn_as_diffusers_does(models, name, dtype, capsys):
    base, ours = other_unet(models, name, dtype, time_cond_proj_dim=EMBEDDED)
    capsys.readouterr()
    prediction = MODELS[name][2] if name in MODELS else "epsilon"
    found = {}
    for guidance in (8.1, 8.5, 1.0):
        scheduler = scheduler_of(LCMScheduler, {**SD, "prediction_type": prediction}, 4, dtype)
        request = {"prompt": PROMPTS, "guidance": guidance, **SIZE}
        found[guidance] = both(base, ours, TEXT_PIPELINES[name], scheduler, 4, request, dtype)
    assert (found[8.5] - found[1.0]).abs().max() > 1e-3 * found[1.0].abs().max()
    assert capsys.readouterr().err == ""
    pipe = with_scheduler(ours, scheduler)
    negative = list(pipe.steps(**{**request, "guidance": 8.5}, seed=5, steps=4, negative="fog"))[-1].x
    assert torch.equal(negative, found[8.5])  # of no effect, and said so
    assert "told its guidance the negative prompt does nothing" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["sd1", "sdxl"])
def test_a_distilled_unet_begins_from_a_picture_as_diffusers_does(models, name):
    base, ours = other_unet(models, name, F64, time_cond_proj_dim=EMBEDDED)
    request = {"prompt": PROMPTS, "guidance": 6.0, "image": [picture(1, 48, 32), picture(2, 48, 32)], "strength": 0.6}
    prediction = MODELS[name][2] if name in MODELS else "epsilon"
    scheduler, _ = scheduler_like("ddim", "leading", 5, F64, prediction_type=prediction)
    cls = PICTURE_PIPELINES[name]
    latents, pixels = run_diffusers(cls, base, scheduler, 5, request, F64)
    found, drawn = run_ours(with_scheduler(ours, scheduler), 5, request)
    equal(found, latents, 1e-11)
    same_pixels(drawn, pixels)


def test_a_net_beside_a_distilled_unet_is_not_told_the_guidance(models):
    from ldm.control import Control
    from ldm.models.controlnet import ControlNet

    _, pipe = other_unet(models, "sdxl", F32, time_cond_proj_dim=EMBEDDED)
    net = randomise(ControlNet.from_unet(models.ours("sdxl").unet, (4, 6, 10, 12)), 5)
    options = {"steps": 2, "seed": 5, **SIZE}
    led, plain = (pipe(PROMPT, control=c, **options).x0 for c in (Control(net, picture(3, 48, 32), 0.5), None))
    assert (led - plain).abs().max() > 1e-3 * plain.abs().max()


def test_the_guidance_embedding_is_sinusoids_of_a_thousand_times_the_scale():
    found = guidance_embedding(torch.tensor([7.5, 1.0], dtype=F64), 8).double()
    frequencies = 10000.0 ** (-np.arange(4) / 3)
    angles = 6500 * frequencies
    assert_close(found[0], torch.tensor(np.concatenate([np.sin(angles), np.cos(angles)])), 2e-3)  # 6500 in float32
    assert torch.equal(found[1], torch.tensor([0.0] * 4 + [1.0] * 4).double())
    assert guidance_embedding(torch.tensor([2.0], dtype=F64), 7).shape == (1, 7)
    for width in (7, 10, 256):
        for scale in (7.5, 8.1, 1.0, 3.3):  # most are none of binary's: subtracted first, then rounded
            reference = StableDiffusionPipeline.get_guidance_scale_embedding(None, torch.tensor([scale - 1]), width)
            assert torch.equal(guidance_embedding(torch.tensor([scale], dtype=F64), width), reference)


def test_a_distilled_folder_is_drawn_in_four_steps(models, tmp_path):
    base, _ = other_unet(models, "sd1", F32, time_cond_proj_dim=EMBEDDED)
    base.scheduler = LCMScheduler(**SD)
    base.save_pretrained(tmp_path / "lcm")
    pipe = ldm.load(tmp_path / "lcm")
    settings = pipe.settings(PROMPT)
    assert (settings.steps, settings.guidance, settings.sampler) == (4, 8.5, "lcm") and pipe.distilled
    assert pipe(PROMPT, **SIZE).x0.std() > 0.1


# ------------------------------------------------------------------------------------------------------ Turbo


@pytest.mark.parametrize("steps", [1, 2, 4])
@pytest.mark.parametrize("name, sampler", [("sd2", "euler"), ("sdxl", "euler-a")])
def test_turbo_models_equal_diffusers_in_few_steps_without_guidance(models, name, sampler, steps):
    """SD-Turbo is Stable Diffusion 2's architecture, Euler, trailing; SDXL-Turbo SDXL's, Euler ancestral, trailing."""
    scheduler, _ = scheduler_like(sampler, "trailing", steps, F64, prediction_type="epsilon")
    request = {"prompt": PROMPTS, "guidance": 0.0, **SIZE}
    both(models.reference(name, F64), models.ours(name, F64), TEXT_PIPELINES[name], scheduler, steps, request, F64)


# -------------------------------------------------------------------------------------- Stable Diffusion 2


@torch.no_grad()
def test_a_folder_without_the_last_layer_reads_the_last_but_one():
    """SD 2's folders hold 23 of OpenCLIP's 24 layers: what they end with is the last but one, normed."""
    small = {
        "hidden_size": 12,
        "intermediate_size": 20,
        "num_attention_heads": 2,
        "hidden_act": "gelu",
        "vocab_size": 99,
    }
    whole = randomise(TextEncoder(TextConfig(**small, num_hidden_layers=4))).eval()
    folder = TextEncoder(TextConfig(**small, num_hidden_layers=3))
    state = whole.state_dict()
    folder.load_state_dict({name: state[name] for name in folder.state_dict()})
    ids = torch.randint(0, 99, (2, 77), generator=torch.Generator().manual_seed(1))
    expected = whole.final_layer_norm(whole(ids).hidden[-2])
    assert torch.equal(folder.context(ids), expected) and expected.std() > 0.1
    assert (whole.context(ids) - expected).abs().max() > 0.1


@pytest.mark.parametrize("sampler", ["ddim", "euler"])
def test_editing_with_stable_diffusion_2_equals_diffusers(models, sampler):
    base, ours = other_unet(models, "sd2", F64, in_channels=8)
    scheduler, _ = scheduler_like(sampler, "leading", 4, F64, prediction_type="v_prediction")
    request = {"prompt": PROMPT, "negative": "fog", "guidance": 3.0, "image_guidance": 1.7, "image": picture(1, 48, 32)}
    both(base, ours, StableDiffusionInstructPix2PixPipeline, scheduler, 4, request, F64)


def test_inpainting_with_stable_diffusion_2_and_nine_channels_equals_diffusers(models):
    base, ours = other_unet(models, "sd2", F64, in_channels=9)
    scheduler, _ = scheduler_like("dpm++2m", "leading", 4, F64, prediction_type="v_prediction")
    request = {
        "prompt": PROMPTS,
        "negative": NEGATIVE,
        "guidance": 3.0,
        "image": [picture(1, 48, 32), picture(2, 48, 32)],
    }
    request |= {"mask": box_mask(48, 32, 9, 5, 33, 27), "strength": 1.0, **SIZE}
    both(base, ours, StableDiffusionInpaintPipeline, scheduler, 4, request, F64)


# --------------------------------------------------------------------------------------------- SDXL's folders


def index(**fields):
    def change(folder):
        path = folder / "model_index.json"
        content = {key: value for key, value in (read_json(path) | fields).items() if value != "gone"}
        path.write_text(json.dumps(content))

    return change


def config(part, **fields):
    def change(folder):
        path = folder / part / "config.json"
        path.write_text(json.dumps(read_json(path) | fields))

    return change


XL_FAULTS = {
    "the second encoder is missing": ("sdxl", index(text_encoder_2="gone"), "lacks text_encoder_2"),
    "the second tokenizer is missing": ("sdxl", index(tokenizer_2=[None, None]), "lacks tokenizer_2"),
    "the first tokenizer is missing": ("sdxl", index(tokenizer="gone"), "lacks tokenizer"),
    "the refiner's encoder is missing": ("refiner", index(text_encoder_2="gone"), "lacks text_encoder_2"),
    "no encoder at all": ("refiner", index(text_encoder_2="gone", tokenizer_2="gone"), "lacks tokenizer, text_encoder"),
    "a second encoder that doesn't project": (
        "sdxl",
        index(text_encoder_2=["transformers", "CLIPTextModel"]),
        "text_encoder_2 is a CLIPTextModel; ldm knows CLIPTextModelWithProjection",
    ),
    "a base with the refiner's words alone": (
        "sdxl",
        index(text_encoder="gone", tokenizer="gone"),
        "speaks vectors of 20 numbers, the UNet reads 44",
    ),
    "the first encoder is missing": ("sdxl", index(text_encoder="gone"), "lacks text_encoder"),
    "a second tokenizer of more words than its encoder reads": (
        "sdxl",
        config("text_encoder_2", vocab_size=99),
        "the tokenizer writes 77 tokens of .* kinds, the text encoder reads 77 of 99 kinds",
    ),
    "another width": (
        "sdxl",
        config("unet", cross_attention_dim=48),
        "the two text encoders together speak vectors of 44 numbers, the UNet reads 48",
    ),
    "a pooled vector of another width": (
        "sdxl",
        config("text_encoder_2", projection_dim=15),
        r"the UNet reads 50 numbers beside the text, which is neither 15 \+ 6 x 6 \(SDXL\) nor 15 \+ 5 x 6",
    ),
    "a pooled vector that leaves room for seven numbers": (
        "sdxl",
        config("text_encoder_2", projection_dim=8),
        r"the UNet reads 50 numbers beside the text, which is neither 8 \+ 6 x 6",
    ),
    "a score that the UNet isn't told": (
        "sdxl",
        index(requires_aesthetics_score=True),
        "says requires_aesthetics_score True, and the UNet reads 6 numbers",
    ),
    "two encoders for a UNet that isn't SDXL": (
        "sdxl",
        config("unet", addition_embed_type=None),
        "only SDXL has two text encoders",
    ),
    "a field of another model": (
        "sdxl",
        config("unet", addition_embed_type="image"),
        "asks for addition_embed_type 'image'; ldm knows 'text_time'",
    ),
}


@pytest.mark.parametrize("what", XL_FAULTS)
def test_what_is_no_sound_sdxl_folder_is_refused_with_a_sentence(models, tmp_path, what):
    name, change, sentence = XL_FAULTS[what]
    folder = shutil.copytree(models.folder(name), tmp_path / "model")
    change(folder)
    with pytest.raises(LDMError, match=sentence):
        ldm.load(folder)


def test_sizes_are_refused_where_they_mean_nothing(models):
    for name, options, sentence in (
        ("sd1", {"sizes": {"original": (9, 9)}}, "This model isn't told of sizes"),
        ("sd2", {"negative_sizes": {"crop": (9, 9)}}, "This model isn't told of sizes"),
        ("sdxl", {"sizes": {"score": 6}}, "The score in sizes means nothing to this model"),
        ("refiner", {"negative_sizes": {"target": (9, 9)}}, "The target in sizes means nothing to this model"),
        ("sdxl", {"sizes": {"original": 9}}, r"original of sizes must be two numbers \(height, width\), not 9"),
        ("sdxl", {"sizes": {"crop": (1, float("nan"))}}, r"crop of sizes must be two numbers \(top, left\)"),
        ("refiner", {"sizes": {"score": "high"}}, "score of sizes must be a finite number"),
        ("sdxl", {"sizes": {"width": 9}}, "a table with original, crop, target, score"),
        ("sdxl", {"sizes": [9, 9]}, r"sizes must be ldm\.Sizes"),
    ):
        with pytest.raises(LDMError, match=sentence):
            models.ours(name).prepare(PROMPT, **options)
    assert Sizes.read({"crop": [3, 7]}) == Sizes(crop=(3, 7))  # as a file has it
    assert Sizes((64, 48), (1, 2), score=0).numbers == (64, 48, 1, 2, 0)


def test_a_file_of_defaults_stands_above_the_family_s(models, tmp_path):
    folder = shutil.copytree(models.folder("sdxl"), tmp_path / "model")
    assert ldm.load(folder).defaults == Defaults(guidance=5.0)
    index(force_zeros_for_empty_prompt="gone")(folder)
    assert ldm.load(folder).zero_negative  # as diffusers has it where a folder doesn't say
    (folder / "ldm.json").write_text(json.dumps({"steps": 3, "guidance": 2.0}))
    assert ldm.load(folder).defaults == Defaults(steps=3, guidance=2.0)


def test_a_refiner_draws_over_a_picture_gently(models):
    pipe = models.ours("refiner")
    run = pipe.prepare(PROMPT, image=picture(1, 48, 32), steps=10)
    assert run.settings.strength == 0.3 and run.rows == range(7, 10) and pipe.told_sizes == "score"
    assert models.ours("sdxl").prepare(PROMPT, image=picture(1, 48, 32)).settings.strength == 0.8


# -------------------------------------------------------------------------------------------- dtypes of parts


def test_each_part_may_have_its_own_dtype(models):
    asked = {"text_encoder": "float64", "vae": torch.bfloat16, "rest": "float32"}
    pipe = ldm.load(models.folder("sdxl"), asked)
    found = {name: part.dtype for name, part in pipe.parts().items()}
    assert found == {"text_encoder": F64, "text_encoder_2": F32, "unet": F32, "vae": torch.bfloat16}
    plain, mixed = models.ours("sdxl")(PROMPT, steps=2, **SIZE), pipe(PROMPT, steps=2, **SIZE)
    assert_close(mixed.x0, plain.x0, 1e-4 * plain.x0.abs().max().item())
    apart = np.abs(np.asarray(mixed.images[0], int) - np.asarray(plain.images[0], int))
    assert 0 < apart.mean() < 3  # bfloat16 has 8 bits
    assert ldm.load(models.folder("sd1"), {"vae": "float64"}).unet.dtype == F32
    with pytest.raises(LDMError, match=r"A dtype is given for 'vea', which .* doesn't have.*Did you mean 'vae'\?"):
        ldm.load(models.folder("sdxl"), {"vea": "float16"})
    with pytest.raises(LDMError, match="dtype 'float8' is none"):
        ldm.load(models.folder("sdxl"), {"vae": "float8"})


def test_pictures_are_given_and_led_in_any_mixture_of_dtypes(models):
    from ldm.control import Control
    from ldm.models.controlnet import ControlNet

    pipe = ldm.load(models.folder("sdxl"), {"vae": "float64", "text_encoder_2": "float64", "rest": "float32"})
    for dtype in (F64, torch.bfloat16):
        net = randomise(ControlNet.from_unet(pipe.unet, (4, 6, 10, 12)), 5).to(dtype)
        control = Control(net, picture(3, 48, 32), 0.5)
        options = {"steps": 3, "image": picture(1, 48, 32), "mask": box_mask(48, 32, 8, 8, 24, 24), "control": control}
        assert pipe(PROMPT, **options).x0.dtype == F32


def test_sdxl_s_vae_stays_in_float32_where_its_file_says_so(models, tmp_path, capsys):
    folder = shutil.copytree(models.folder("sdxl"), tmp_path / "model")
    config("vae", force_upcast=True)(folder)
    models.folder("sd1")  # written now: diffusers says so
    capsys.readouterr()
    pipe = ldm.load(folder, "float16")
    assert (pipe.vae.dtype, pipe.unet.dtype) == (F32, torch.float16)
    assert capsys.readouterr().err == (
        f"{folder}: the VAE is read in float32, for its file says that float16 is too narrow for it.\n"
    )
    assert ldm.load(folder, "bfloat16").vae.dtype == torch.bfloat16  # as wide as float32
    assert ldm.load(folder, {"rest": "float16", "vae": "float16"}).vae.dtype == torch.float16  # said by the caller
    assert capsys.readouterr().err == ""
    mixed = ldm.load(folder, {"rest": "float16", "text_encoder": "float32"})  # nothing was said of the VAE
    assert mixed.vae.dtype == F32 and "the VAE is read in float32" in capsys.readouterr().err
    assert ldm.load(models.folder("sdxl"), "float16").vae.dtype == torch.float16
    assert ldm.load(models.folder("sd1"), "float16").vae.dtype == torch.float16
    assert capsys.readouterr().err == ""


@pytest.fixture
def overflowing(models, tmp_path):
    """The tiny SD 1 with a VAE that goes beyond 65504 inside: its first layer makes what its first norm makes good."""
    folder = shutil.copytree(models.folder("sd1"), tmp_path / "model")
    path = folder / "vae" / "diffusion_pytorch_model.safetensors"
    tensors = {name: tensor.clone() for name, tensor, _ in read_tensors(path)}
    for side in ("encoder", "decoder"):
        for name in ("conv_in.weight", "conv_in.bias"):
            tensors[f"{side}.{name}"] *= 6e4
        for name in ("conv_in.weight", "conv_in.bias"):
            assert tensors[f"{side}.{name}"].abs().max() < 65504  # the file itself fits into float16
    save_weights(tensors, path)
    return folder


def test_a_vae_beyond_float16_is_run_again_in_float32_and_says_so(overflowing, capsys):
    """Black pictures are float16's most common accident; nobody asked for one."""
    wide = ldm.load(overflowing)
    narrow = ldm.load(overflowing, {"rest": "float32", "vae": "float16"})
    options = {"steps": 2, "image": picture(1, 48, 32), "strength": 0.5}
    expected = wide(PROMPT, **options)
    capsys.readouterr()
    found = narrow(PROMPT, **options)
    said = "The VAE goes beyond the range of float16: it is run again in float32.\n"
    assert capsys.readouterr().err == 2 * said  # on the way in, and on the way out
    before = {name: tensor.clone() for name, tensor in narrow.vae.state_dict().items()}
    assert narrow.vae.dtype == torch.float16
    apart = np.abs(np.asarray(found.images[0], int) - np.asarray(expected.images[0], int))
    assert apart.mean() < 2 and np.asarray(expected.images[0]).std() > 20  # the weights were rounded to float16
    narrow.decode(found.x0)
    assert all(torch.equal(tensor, before[name]) for name, tensor in narrow.vae.state_dict().items())


def test_a_vae_that_is_broken_is_not_taken_for_a_narrow_one(models, tmp_path, capsys):
    folder = shutil.copytree(models.folder("sd1"), tmp_path / "model")
    pipe = ldm.load(folder)
    with torch.no_grad():
        pipe.vae.decoder.conv_in.weight[0, 0, 0, 0] = torch.nan
    with pytest.raises(LDMError, match="VAE's decoder returned numbers that are not finite"):
        pipe.decode(normal(1, 1, 4, 2, 2))
    pipe.vae.half()
    with pytest.raises(LDMError, match="VAE's decoder returned numbers that are not finite"):
        pipe.decode(normal(1, 1, 4, 2, 2))
    assert pipe.vae.dtype == torch.float16 and capsys.readouterr().err.count("run again") == 1
    plant(folder, "vae", "encoder.conv_in.weight", float("nan"))
    with pytest.raises(LDMError, match="1 NaN"):
        ldm.load(folder)


def test_under_autocast_the_weights_stay_and_the_sums_too(models):
    pipe = copy(models.ours("sdxl"))
    plain = pipe(PROMPT, steps=3, **SIZE)
    pipe.autocast, computed = torch.bfloat16, set()
    watched = [
        part.register_forward_hook(lambda layer, given, found: computed.add(found.dtype))
        for part in (pipe.unet.conv_in, pipe.text_encoder.encoder.layers[0].mlp.fc1)
    ]
    found, step = pipe(PROMPT, steps=3, **SIZE), next(pipe.steps(PROMPT, steps=3, **SIZE))
    for hook in watched:
        hook.remove()
    assert computed == {torch.bfloat16} and {step.x.dtype, step.eps.dtype, step.uncond.dtype} == {F32}
    assert found.x0.dtype == F32 and pipe.unet.dtype == F32
    own = cast(lambda x, level: Output(x.bfloat16()), torch.bfloat16)(normal(1, 1, 4, 2, 2).float(), None)
    assert own.out.dtype == F32  # nor are they rounded because of what a network of one's own returns
    pipe.autocast = F64
    with pytest.raises(LDMError, match=r"autocast computes in bfloat16 or float16, not in torch\.float64"):
        pipe(PROMPT, steps=3, **SIZE)
    scale = plain.x0.abs().max().item()
    assert 1e-6 * scale < (found.x0 - plain.x0).abs().max() < 0.1 * scale


def test_a_refiner_s_encoder_may_be_named_as_the_first_or_the_second(models):
    for name in ("text_encoder", "text_encoder_2"):
        pipe = ldm.load(models.folder("refiner"), {name: "float64"})
        assert {part: each.dtype for part, each in pipe.parts().items()} == {
            "text_encoder": F64,
            "unet": F32,
            "vae": F32,
        }


@torch.no_grad()
def test_a_network_of_one_s_own_is_given_the_unet_s_dtype(models):
    pipe = ldm.load(models.folder("sd1"), "bfloat16")
    context, seen = pipe.encode([PROMPT]), []

    def network(x, level):
        seen.append(x.dtype)
        return Output(pipe.unet(x, level.t, context))

    result = pipe(PROMPT, network=network, steps=2, **SIZE)
    assert set(seen) == {torch.bfloat16} and result.x0.dtype == F32 and result.x0.std() > 0.1


def test_a_net_that_lies_elsewhere_is_told(models):
    from ldm.control import Control
    from ldm.models.controlnet import ControlNet

    pipe = copy(models.ours("sd1"))
    net = ControlNet.from_unet(pipe.unet, (4, 6, 10, 12))
    pipe.where = torch.device("meta")
    with pytest.raises(LDMError, match="The net lies on cpu, and the pipeline computes on meta: move it there"):
        pipe.look(pipe.settings(PROMPT, **SIZE), pipe.schedule(2), [Control(net, picture(1, 48, 32))])
