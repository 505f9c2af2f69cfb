"""What `ldm convert` writes is loaded by diffusers 0.42.1, without a network: the same bits, the same pictures.

`from_pretrained` reads the folders. `from_single_file` reads the files with the configurations of a folder, here one
without any weights, so that every number must come out of the file.
"""

import re
import shutil
import socket

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    StableDiffusionDepth2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionInstructPix2PixPipeline,
    StableDiffusionPipeline,
    StableDiffusionUpscalePipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from tiny_pairs import PROMPT, SCENES, controlnets, scenes
from tiny_tasks import TaskModels

import ldm
from ldm.convert import convert
from ldm.io.folders import read_json, write_json

CLASSES = {
    "sd1": StableDiffusionPipeline,
    "sd2": StableDiffusionPipeline,
    "sdxl": StableDiffusionXLPipeline,
    "refiner": StableDiffusionXLImg2ImgPipeline,
    "inpaint": StableDiffusionInpaintPipeline,
    "edit": StableDiffusionInstructPix2PixPipeline,
    "upscale": StableDiffusionUpscalePipeline,
}


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*_):
        raise AssertionError("a connection is made")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture(scope="module")
def tasks(models, tmp_path_factory):
    return TaskModels(tmp_path_factory.mktemp("tasks"), models)


def assert_same_bits(ours, theirs):
    ours, theirs = ours.state_dict(), theirs.state_dict()
    assert ours.keys() == theirs.keys() and len(ours) > 10
    for key, tensor in theirs.items():
        assert ours[key].dtype == tensor.dtype and torch.equal(ours[key], tensor), key


def assert_same_networks(pipe, reference):
    networks = [name for name, part in reference.components.items() if isinstance(part, torch.nn.Module)]
    assert {"unet", "vae"} < set(networks)
    for name in networks:
        assert_same_bits(getattr(pipe, name), getattr(reference, name))


def without_weights(folder, target):
    """A folder's configurations and tokenizers alone."""
    shutil.copytree(folder, target, ignore=shutil.ignore_patterns("*.safetensors"))
    return str(target)


@pytest.mark.parametrize("name", CLASSES)
def test_pipelines_from_folders_and_files(tasks, name, tmp_path):
    folder = tasks.folder(name)
    convert(folder, tmp_path / "file.safetensors")
    convert(tmp_path / "file.safetensors", tmp_path / "back")
    reference = DiffusionPipeline.from_pretrained(folder)
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "back")
    assert type(pipe) is CLASSES[name] is type(reference)
    assert_same_networks(pipe, reference)
    said = {key: pipe.scheduler.config.get(key) for key in reference.scheduler.config}
    assert said == dict(reference.scheduler.config)
    tokens = [each.tokenizer_2 if name == "refiner" else each.tokenizer for each in (pipe, reference)]
    assert tokens[0](PROMPT).input_ids == tokens[1](PROMPT).input_ids

    bare = without_weights(tmp_path / "back", tmp_path / "bare")
    single = CLASSES[name].from_single_file(str(tmp_path / "file.safetensors"), config=bare, local_files_only=True)
    assert_same_networks(single, reference)
    if name in ("sd1", "sd2", "sdxl"):
        pictures = [drawn(each) for each in (reference, pipe, single)]
        assert torch.equal(pictures[0], pictures[1]) and torch.equal(pictures[0], pictures[2])
        assert pictures[0].abs().mean() > 0.1


def test_an_xl_with_marks_of_velocity(models, tmp_path):
    """Empty tensors that name no part: diffusers passes them over."""
    folder = tmp_path / "xl"
    shutil.copytree(models.folder("sdxl"), folder)
    path = folder / "scheduler" / "scheduler_config.json"
    write_json(path, read_json(path) | {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True})
    convert(folder, tmp_path / "file.safetensors")
    bare = without_weights(folder, tmp_path / "bare")
    pipe = StableDiffusionXLPipeline.from_single_file(
        str(tmp_path / "file.safetensors"), config=bare, local_files_only=True
    )
    assert_same_networks(pipe, DiffusionPipeline.from_pretrained(folder))


def drawn(pipe):
    """The latents after two steps."""
    pipe.set_progress_bar_config(disable=True)
    wish = {"height": 64, "width": 64, "num_inference_steps": 2, "output_type": "latent"}
    return pipe(PROMPT, generator=torch.Generator().manual_seed(3), **wish).images


def test_depth_needs_an_estimator_there(tasks, tmp_path):
    """Its pipeline takes no model without one, even where its parts are passed as None."""
    convert(tasks.folder("depth"), tmp_path / "depth")
    parts = {"depth_estimator": None, "feature_extractor": None}
    with pytest.raises(ValueError, match=re.escape("expected ['depth_estimator', 'feature_extractor'")):
        DiffusionPipeline.from_pretrained(tmp_path / "depth")
    unet = UNet2DConditionModel.from_pretrained(tmp_path / "depth", subfolder="unet")
    assert_same_bits(unet, UNet2DConditionModel.from_pretrained(tasks.folder("depth"), subfolder="unet"))
    pipe = StableDiffusionDepth2ImgPipeline.from_pretrained(tmp_path / "depth", **parts)
    assert_same_bits(pipe.unet, unet)


@pytest.mark.parametrize("name", ["sd1", "sdxl"])
def test_controlnets(models, name, tmp_path):
    controlnets(models, name, seed=4)
    folder = models.root / f"{name}-controlnet-4"
    convert(folder, tmp_path / "net.safetensors")
    convert(tmp_path / "net.safetensors", tmp_path / "net")
    reference = ControlNetModel.from_pretrained(folder)
    assert_same_bits(ControlNetModel.from_pretrained(tmp_path / "net"), reference)
    bare = without_weights(tmp_path / "net", tmp_path / "bare")
    single = ControlNetModel.from_single_file(str(tmp_path / "net.safetensors"), config=bare, local_files_only=True)
    assert_same_bits(single, reference)


@pytest.mark.parametrize("part, cls", [("vae", AutoencoderKL), ("unet", UNet2DConditionModel)])
@pytest.mark.parametrize("name", ["sd2", "sdxl"])
def test_one_network_alone(models, name, part, cls, tmp_path):
    folder = models.folder(name)
    convert(folder, tmp_path / "part.safetensors", part=part)
    convert(folder, tmp_path / "part", part=part)
    reference = cls.from_pretrained(folder, subfolder=part)
    assert_same_bits(cls.from_pretrained(tmp_path / "part"), reference)
    bare = without_weights(tmp_path / "part", tmp_path / "bare")
    single = cls.from_single_file(str(tmp_path / "part.safetensors"), config=bare, local_files_only=True)
    assert_same_bits(single, reference)


@scenes
@pytest.mark.filterwarnings("ignore")
def test_diffusers_draws_the_same_with_the_embedded_ones():
    """Both at once, three steps of DDIM: the latents are those of diffusers with PEFT."""
    theirs, ours = StableDiffusionPipeline.from_pretrained(SCENES, torch_dtype=torch.float32), ldm.load(SCENES)
    theirs.load_lora_weights(SCENES.parent / "scenes-neon", adapter_name="neon")
    theirs.set_adapters(["neon"], [0.8])
    theirs.load_textual_inversion(SCENES.parent / "scenes-mushroom" / "learned_embeds.safetensors")
    words, latents = "a large red <mushroom> on snow at dawn", torch.randn(1, 4, 16, 16)
    plain = ours("a large red mushroom on snow at dawn", latents=latents, steps=3, sampler="ddim").x0
    ours.add_lora("scenes-neon", 0.8)
    ours.add_embedding("scenes-mushroom")
    found = ours(words, latents=latents, steps=3, sampler="ddim").x0
    theirs.set_progress_bar_config(disable=True)
    expected = theirs(words, latents=latents, num_inference_steps=3, guidance_scale=4.0, output_type="latent").images
    assert (found - plain).abs().mean() > 0.1
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()


@scenes
def test_diffusers_draws_the_same_with_the_embedded_flux():
    """It knows no FLUX without T5, so it is given the vectors of the words; and a VAE's shift must be said."""
    flow = SCENES.with_name("scenes-flow")
    pipe = ldm.load(flow)
    vae = AutoencoderKL.from_pretrained(SCENES / "vae")
    vae.register_to_config(shift_factor=0.0)
    theirs = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler.from_pretrained(flow / "scheduler"),
        vae=vae,
        transformer=FluxTransformer2DModel.from_pretrained(flow / "transformer"),
        text_encoder=None, tokenizer=None, text_encoder_2=None, tokenizer_2=None,
    )  # fmt: skip
    theirs.set_progress_bar_config(disable=True)
    cond, uncond = pipe.read([PROMPT]), pipe.read([""])
    told = {"prompt_embeds": cond.context, "pooled_prompt_embeds": cond.pooled}
    against = {"negative_prompt_embeds": uncond.context, "negative_pooled_prompt_embeds": uncond.pooled}
    generator, size = torch.Generator().manual_seed(5), {"width": 128, "height": 128}
    drawn = theirs(
        **told, **against, **size, true_cfg_scale=4.0, num_inference_steps=4, generator=generator, output_type="np"
    ).images[0]
    ours = torch.tensor(list(pipe(PROMPT, seed=5, steps=4).images[0].getdata())).view(128, 128, 3)
    theirs = (torch.from_numpy(drawn) * 255).round()
    assert theirs.std() > 20
    assert (ours - theirs).abs().max() <= 1
