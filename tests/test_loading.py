"""Folders: every layout that diffusers and transformers write or wrote, and a sentence for each that is no model."""

import inspect
import json
import shutil
from pathlib import Path

import diffusers
import pytest
import torch
from diffusers import AutoencoderKL
from tiny_pairs import PROMPT, SD

import ldm
from ldm import loading
from ldm.checkpoints import places
from ldm.errors import LDMError
from ldm.io.folders import read_json
from ldm.io.weights import read_tensors, save_weights
from ldm.schedules.config import CLASSES
from ldm.text.tokenizer import has_ftfy

SMALL = {"steps": 2, "width": 16, "height": 16}
STEMS = {"text_encoder": "model", "unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model"}


@pytest.fixture
def folder(models, tmp_path):
    """A copy of the tiny SD 1 folder."""
    return shutil.copytree(models.folder("sd1"), tmp_path / "model")


def rewrite(path, **fields):
    """Change fields of a JSON file; None removes one."""
    content = {key: value for key, value in (read_json(path) | fields).items() if value is not None}
    path.write_text(json.dumps(content))


def weights(folder, part):
    path = folder / part / f"{STEMS[part]}.safetensors"
    return path, {name: tensor.clone() for name, tensor, _ in read_tensors(path)}


def draws_what_the_plain_folder_draws(models, folder, **options):
    expected, found = (pipe(PROMPT, **SMALL).x0 for pipe in (models.ours("sd1"), ldm.load(folder, **options)))
    return torch.equal(found, expected) and expected.std() > 0.1


# ---------------------------------------------------------------------------------------------------- layouts


def test_sharded_weights_are_read(models, tmp_path):
    reference = models.reference("sd1")
    reference.save_pretrained(tmp_path / "model", max_shard_size="40KB")
    for part in STEMS:
        assert len(list((tmp_path / "model" / part).glob("*-of-*.safetensors"))) > 1, part
    assert draws_what_the_plain_folder_draws(models, tmp_path / "model")


def test_a_variant_is_read_and_missing_ones_are_said(models, tmp_path, capsys):
    """diffusers' `variant="fp16"`, in half precision as those files are: alone in the folder, and beside the others."""
    reference, folder = models.reference("sd1"), tmp_path / "model"
    halved = {name: tensor.half().float() for name, tensor in reference.unet.state_dict().items()}
    reference.save_pretrained(folder, variant="fp16")
    for part in STEMS:
        (path,) = (folder / part).glob("*.fp16.safetensors")
        save_weights({name: tensor.clone() for name, tensor, _ in read_tensors(path)}, path, torch.float16)
    capsys.readouterr()
    by_name = ldm.load(folder, variant="fp16")
    assert capsys.readouterr().err == ""
    assert by_name.unet.dtype == torch.float32
    assert all(torch.equal(tensor, halved[name]) for name, tensor in by_name.unet.state_dict().items())
    by_itself = ldm.load(folder)  # there is no other
    assert capsys.readouterr().err.count("no weights without a variant; reading") == 3
    assert torch.equal(by_itself(PROMPT, **SMALL).x0, by_name(PROMPT, **SMALL).x0)

    shutil.copytree(models.folder("sd1"), folder, dirs_exist_ok=True)
    assert draws_what_the_plain_folder_draws(models, folder)
    assert torch.equal(ldm.load(folder, variant="fp16")(PROMPT, **SMALL).x0, by_name(PROMPT, **SMALL).x0)
    capsys.readouterr()
    assert draws_what_the_plain_folder_draws(models, folder, variant="bf16")
    assert capsys.readouterr().err.count("no variant 'bf16'; reading") == 3


def test_the_text_encoder_s_keys_may_have_the_old_prefix_and_position_numbers(models, folder):
    path, tensors = weights(folder, "text_encoder")
    prefixed = {"text_model." + name.removeprefix("text_model."): tensor for name, tensor in tensors.items()}
    prefixed["text_model.embeddings.position_ids"] = torch.arange(77)[None]
    for layout in (prefixed, {name.removeprefix("text_model."): tensor for name, tensor in prefixed.items()}):
        save_weights(layout, path)
        assert draws_what_the_plain_folder_draws(models, folder)


def test_the_vae_s_attention_may_have_its_old_names(models, folder):
    """As in Stable Diffusion 1's own files; diffusers reads them too."""
    path, tensors = weights(folder, "vae")
    new = ("to_q", "to_k", "to_v", "to_out.0")
    for name in list(tensors):
        for old, now in zip(("query", "key", "value", "proj_attn"), new, strict=True):
            if f"attentions.0.{now}." in name:
                tensors[name.replace(now, old)] = tensors.pop(name)
    assert sum("proj_attn" in name for name in tensors) == 4 and not any("to_q" in name for name in tensors)
    save_weights(tensors, path)
    theirs, ours = AutoencoderKL.from_pretrained(folder / "vae").state_dict(), ldm.load(folder).vae.state_dict()
    assert theirs.keys() == ours.keys() and all(torch.equal(theirs[name], ours[name]) for name in theirs)
    assert draws_what_the_plain_folder_draws(models, folder)


def test_a_depth_estimator_takes_part_with_its_feature_extractor(folder, capsys):
    parts = {
        "depth_estimator": ["transformers", "DPTForDepthEstimation"],
        "feature_extractor": ["transformers", "DPTImageProcessor"],
        "watermarker": ["x", "W"],
    }
    rewrite(folder / "model_index.json", **parts)
    capsys.readouterr()
    ldm.load(folder)
    assert capsys.readouterr().err == f"{folder}: watermarker takes no part in drawing and is passed over.\n"


def test_parts_that_take_no_part_in_drawing_are_passed_over_with_a_line(models, folder, capsys):
    index = {
        "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
        "feature_extractor": ["transformers", "CLIPImageProcessor"],
        "image_encoder": [None, None],
    }
    rewrite(folder / "model_index.json", **index)
    assert draws_what_the_plain_folder_draws(models, folder)
    assert sorted(capsys.readouterr().err.splitlines()) == [
        f"{folder}: feature_extractor takes no part in drawing and is passed over.",
        f"{folder}: safety_checker takes no part in drawing and is passed over.",
    ]


# A class: the sampler and the rule that its file means, with which fields.
SCHEDULERS = {
    "DDPMScheduler": [("ddpm", "ddpm", {})],
    "DDIMScheduler": [("ddim", "ddim", {})],
    "PNDMScheduler": [("plms", "ddim", {"skip_prk_steps": True}), ("pndm", "ddim", {})],  # the first is SD 1's own
    "EulerDiscreteScheduler": [("euler", "euler", {}), ("euler", "euler", {"use_karras_sigmas": True})],
    "EulerAncestralDiscreteScheduler": [("euler-a", "heun", {})],
    "HeunDiscreteScheduler": [("heun", "heun", {})],
    "LMSDiscreteScheduler": [("lms", "heun", {})],
    "KDPM2DiscreteScheduler": [("dpm2", "dpm2", {})],
    "KDPM2AncestralDiscreteScheduler": [("dpm2-a", "dpm2", {})],
    "DPMSolverMultistepScheduler": [
        ("dpm++2m", "dpm", {}),
        ("dpm++3m", "dpm", {"solver_order": 3}),
        ("dpm++2m-sde", "dpm", {"algorithm_type": "sde-dpmsolver++"}),
        ("dpm2m", "dpm", {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"}),
    ],
    "DPMSolverSinglestepScheduler": [("dpm++2s", "singlestep", {})],
    "DEISMultistepScheduler": [("deis2", "deis", {}), ("deis3", "deis", {"solver_order": 3})],
    "UniPCMultistepScheduler": [
        ("unipc2", "unipc", {}),
        ("unipc3-bh1", "unipc", {"solver_order": 3, "solver_type": "bh1"}),
    ],
    "LCMScheduler": [("lcm", "lcm", {})],
    "TCDScheduler": [("tcd", "tcd", {})],
    "FlowMatchEulerDiscreteScheduler": [("euler", "flow", {}), ("euler", "flow", {"shift": 3.0})],
    "FlowMatchHeunDiscreteScheduler": [("flow-heun", "flow", {})],
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_scheduler_files_of_every_class_are_read_and_drawn_with_their_own_sampler(folder, name, capsys):
    """As diffusers writes them, every field of them; nothing is said of a sampler that ldm lacked."""
    drawn = []
    for sampler, rule, fields in SCHEDULERS[name]:
        cls = getattr(diffusers, name)
        known = inspect.signature(cls.__init__).parameters
        saved = {key: value for key, value in {**SD, "clip_sample": False, **fields}.items() if key in known}
        cls(**saved).save_pretrained(folder / "scheduler")
        pipe = ldm.load(folder)
        config, defaults = loading.find_schedule(folder)
        assert (config, defaults) == (pipe.scheduler, pipe.defaults)
        few = SMALL | {"steps": 6}  # enough to tell the orders apart
        settings = pipe.settings(PROMPT, **few)
        assert (settings.sampler, settings.rule) == (sampler, rule)
        own, named = (pipe(PROMPT, **few, **more).x0 for more in ({}, {"sampler": sampler, "rule": rule}))
        assert torch.equal(own, named) and own.std() > 0.1
        drawn.append(own)
    assert capsys.readouterr().err == ""
    assert len({x.sum().item() for x in drawn}) == len(drawn)


def test_every_class_of_diffusers_that_ldm_knows_is_tested_above():
    assert CLASSES.keys() == SCHEDULERS.keys()


def test_minus_infinity_is_read_in_the_scheduler_s_file_alone(folder):
    """JSON has no such number; diffusers writes it nevertheless, there."""
    path = folder / "scheduler" / "scheduler_config.json"
    diffusers.DPMSolverMultistepScheduler(**SD).save_pretrained(folder / "scheduler")
    text = path.read_text()
    assert '"lambda_min_clipped": -Infinity' in text and ldm.load(folder).scheduler.sampler == "dpm++2m"
    for number in ("Infinity", "NaN"):
        path.write_text(text.replace("-Infinity", number))
        with pytest.raises(LDMError, match=f"scheduler_config.json is not acceptable JSON .{number} is not a JSON"):
            ldm.load(folder)
    path.write_text(text)
    (folder / "ldm.json").write_text('{"guidance": -Infinity}')
    with pytest.raises(LDMError, match=r"ldm.json is not acceptable JSON .-Infinity is not a JSON number"):
        ldm.load(folder)


def test_defaults_are_read_from_ldm_json(folder):
    (folder / "ldm.json").write_text('{"steps": 3, "guidance": 2.5, "sampler": "dpm++2m", "width": 24}')
    settings = ldm.load(folder).settings(PROMPT)
    assert (settings.steps, settings.guidance, settings.sampler) == (3, 2.5, "dpm++2m")
    assert (settings.width, settings.height) == (24, 64)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_weights_are_cast_to_the_dtype_and_kept_without_gradients(folder, dtype):
    pipe = ldm.load(folder, dtype)
    for part in (pipe.text_encoder, pipe.unet, pipe.vae):
        assert {p.dtype for p in part.parameters()} == {dtype} and not part.training
        assert not any(p.requires_grad or p.is_meta for p in part.parameters())
    assert pipe.dtype == dtype and pipe.folder == folder


# ------------------------------------------------------------------------------------ finding models


def test_embedded_models_are_found_by_name(models, tmp_path, monkeypatch):
    """In `weights/` of a checkout, or of an installed package: beside `ldm`, or inside it."""
    for root in (tmp_path / "checkout", tmp_path / "site-packages" / "ldm"):
        shutil.copytree(models.folder("sd1"), root / "weights" / "tiny")
        (root / "weights" / "tiny-extras").mkdir()  # no model: it has no index
        package = root / "ldm" if root.name == "checkout" else root
        monkeypatch.setattr(places, "PACKAGE", package)
        assert places.embedded() == {"tiny": root / "weights" / "tiny"}
        assert ldm.load("tiny").folder == root / "weights" / "tiny"
        with pytest.raises(LDMError, match=r"no model 'tinny': .* embedded model \(tiny\)\. Did you mean 'tiny'\?"):
            ldm.load("tinny")


def test_without_embedded_models_the_sentence_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(places, "PACKAGE", tmp_path / "ldm")
    with pytest.raises(LDMError, match=r"no model 'scenes': neither a folder or .* nor an embedded model \(none\)"):
        ldm.load()


# ------------------------------------------------------------------------------------ what is no such model


def index(**fields):
    return lambda folder: rewrite(folder / "model_index.json", **fields)


def config(part, **fields):
    return lambda folder: rewrite(next((folder / part).glob("*config.json")), **fields)


def write(name, text):
    return lambda folder: (folder / name).write_text(text)


def remove(name):
    return lambda folder: shutil.rmtree(folder / name) if (folder / name).is_dir() else (folder / name).unlink()


def drop_a_tensor(folder):
    path, tensors = weights(folder, "unet")
    del tensors["conv_in.bias"]
    save_weights(tensors, path)


def plant_nan(folder):
    """By hand: `save_weights` refuses."""
    path, _ = weights(folder, "vae")
    path.write_bytes(path.read_bytes()[:-4] + torch.tensor(float("nan")).numpy().tobytes())


SDXL = {"addition_embed_type": "text_time", "addition_time_embed_dim": 4, "projection_class_embeddings_input_dim": 32}
BROKEN = {
    "no index": (remove("model_index.json"), "is not a model folder in diffusers' format: it has no model_index.json"),
    "damaged index": (write("model_index.json", "{"), "model_index.json is not valid JSON at line 1"),
    "index that is a list": (write("model_index.json", "[]"), "must hold a JSON object, not a list: download"),
    "a part too few": (index(unet=None, scheduler=None), "model_index.json lacks unet, scheduler"),
    "a part of nothing": (index(vae=[None, None], tokenizer=[]), "model_index.json lacks tokenizer, vae"),
    "a part too many": (
        index(text_encoder_3=["transformers", "T5EncoderModel"]),
        r"doesn't know: 'text_encoder_3' \(T5",
    ),
    "another class": (
        index(unet=["diffusers", "SD3Transformer2DModel"]),
        "unet is a SD3Transformer2DModel; ldm knows UNet2DConditionModel",
    ),
    "another tokenizer": (
        index(tokenizer=["transformers", "T5Tokenizer"]),
        "tokenizer is a T5Tokenizer; ldm knows CLIPTokenizer and CLIPTokenizerFast",
    ),
    "another scheduler": (
        config("scheduler", _class_name="DDIMSheduler"),
        r"The scheduler file names 'DDIMSheduler'; ldm knows DDPMScheduler, .* Did you mean 'DDIMScheduler'\?",
    ),
    "a scheduler's field unknown": (
        config("scheduler", betas_of_mine=3),
        "scheduler has a field that ldm doesn't know: 'betas_of_mine' = 3",
    ),
    "a variant of a sampler": (
        config("scheduler", _class_name="DPMSolverMultistepScheduler", solver_type="heun"),
        "ldm's DPMSolverMultistepScheduler has solver_type midpoint",
    ),
    "no part's folder": (remove("vae"), "vae/config.json does not exist"),
    "no tokenizer": (remove("tokenizer"), "There is no tokenizer folder"),
    "no weights": (remove("unet/diffusion_pytorch_model.safetensors"), "has no diffusion_pytorch_model.safetensors"),
    "a configuration of text": (
        write("vae/config.json", '"a VAE"'),
        "vae/config.json must hold a JSON object, not a str",
    ),
    "a field unknown": (config("unet", dual_attention=True), "has a field that ldm doesn't know: 'dual_attention'"),
    "a field not implemented": (config("vae", act_fn="mish"), "asks for 'act_fn' = 'mish'; ldm implements only 'silu'"),
    "defaults unknown": (
        write("ldm.json", '{"stepps": 3}'),
        r"ldm.json has a field that ldm doesn't know: 'stepps' = 3",
    ),
    "a tensor missing": (drop_a_tensor, "missing conv_in.bias"),
    "not a number": (plant_nan, "holds 1 NaN"),
    "widths": (
        config("unet", cross_attention_dim=32),
        "speaks vectors of 24 numbers, the UNet reads 32: these parts don't belong together",
    ),
    "a UNet for no known task": (
        config("unet", in_channels=10),
        "takes 10 channels and returns 4, the VAE's latents have 4: these",
    ),
    "a UNet that returns no latents": (
        config("unet", out_channels=8),
        "takes 4 channels and returns 8, the VAE's latents have 4: these",
    ),
    "an upscaler of noise levels without their schedule": (
        config("unet", in_channels=7, num_class_embeds=10),
        "the UNet upscales, which takes noise levels .num_class_embeds. and a low_res_scheduler",
    ),
    "an upscaler without its schedule": (
        config("unet", in_channels=7),
        "the UNet upscales, which takes noise levels .num_class_embeds. and a low_res_scheduler",
    ),
    "latents of another VAE": (config("vae", latent_channels=16), "returns 4, the VAE's latents have 16"),
    "too many words": (
        config("text_encoder", vocab_size=500),
        r"writes 77 tokens of 560 kinds, .* reads 77 of 500 kinds",
    ),
    "too long prompts": (config("text_encoder", max_position_embeddings=40), "the text encoder reads 40 of 560 kinds"),
    "LCM": (config("unet", time_cond_proj_dim=16), r"missing time_embedding\.cond_proj\.weight"),
    "the upscaler": (config("unet", num_class_embeds=10), r"asks for more than a prompt \(num_class_embeds\)"),
    "SDXL": (config("unet", **SDXL), "reads a pooled vector, and the last text encoder has no projection"),
}


def test_a_dtype_may_be_named_and_how_prompts_are_cleaned(folder, capsys):
    pipe = ldm.load(folder, "float16", clean="original")
    assert pipe.dtype == torch.float16 and pipe.tokenizer.clean == "original"
    assert ("ftfy isn't installed" in capsys.readouterr().err) != has_ftfy()
    with pytest.raises(LDMError, match=r"dtype 'floot16' is none that weights can have: .* Did you mean 'float16'\?"):
        ldm.load(folder, "floot16")
    with pytest.raises(LDMError, match=r"dtype torch\.int8 is none that weights can have"):
        ldm.load(folder, torch.int8)
    with pytest.raises(LDMError, match="clean='orignal' is no way to clean a prompt"):
        ldm.load(folder, clean="orignal")


@pytest.mark.parametrize("what", BROKEN)
def test_what_is_no_such_model_is_refused_with_a_sentence(folder, what):
    break_it, sentence = BROKEN[what]
    break_it(folder)
    with pytest.raises(LDMError, match=sentence):
        ldm.load(folder)


def test_one_part_of_a_folder_is_no_model(folder):
    with pytest.raises(LDMError, match=r"safetensors is of no architecture that ldm knows: .*take its"):
        ldm.load(folder / "unet" / "diffusion_pytorch_model.safetensors")


def test_the_embedded_model_stays_within_its_size():
    """A notebook's reader downloads it, and it travels in every clone: 18 MB, and 4 MB of extras."""
    weights = Path(__file__).resolve().parent.parent / "weights"
    for name, most in (("scenes", 18_000_000), ("scenes-extras", 4_000_000)):
        assert sum(path.stat().st_size for path in (weights / name).rglob("*") if path.is_file()) <= most
