"""Stable Diffusion 1.5, 2.1 and SDXL at their full size, with random weights: one guided step equals diffusers'.

Tiny models can't show a mistake that grows with width, depth or the number of groups. 3.4 GiB of parameters in float32,
and 4.8 of SDXL's in bfloat16, shared by both sides. `ldm parity --random-init sdxl` walks everything else at that size.
"""

import gc
import os

import pytest
import torch
from diffusers import AutoencoderKL, ControlNetModel, DDIMScheduler, EulerDiscreteScheduler, UNet2DConditionModel
from reference import assert_close, normal, randomise, same
from test_unet import PUBLISHED as UNETS
from test_vae import PUBLISHED as VAES

from ldm.checkpoints.architectures import EULER, UNET_2, UNET_XL
from ldm.guidance import Told, classifier_free, conditional, denoiser, halves_together
from ldm.models.controlnet import ControlNet, ControlNetConfig
from ldm.models.unet import UNet, UNetConfig
from ldm.models.vae import VAE, VAEConfig
from ldm.network import guided, tell
from ldm.noise import Noise
from ldm.parity.drawn import draw, give, share
from ldm.samplers import SAMPLERS
from ldm.sampling import sample
from ldm.schedules import ScheduleConfig, make_schedule
from ldm.sizes import Sizes
from ldm.text.words import Words

pytestmark = pytest.mark.slow

SD = "runwayml/stable-diffusion-v1-5"
SCHEDULER = {
    "_class_name": "DDIMScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
    "set_alpha_to_one": False,
    "clip_sample": False,
}
SCALE, STEPS = 7.5, 20


@pytest.fixture(autouse=True)
def all_cores():
    before = torch.get_num_threads()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    yield
    torch.set_num_threads(before)
    gc.collect()


@torch.no_grad()
def test_one_guided_step_of_stable_diffusion_equals_diffusers():
    x, cond, uncond = normal(1, 1, 4, 48, 32), normal(2, 1, 77, 768), normal(3, 1, 77, 768)
    reference = randomise(UNet2DConditionModel.from_config(UNETS[SD])).eval()
    scheduler = DDIMScheduler.from_config(SCHEDULER)
    scheduler.set_timesteps(STEPS)
    t = scheduler.timesteps[0]
    noise_uncond, noise_text = reference(torch.cat([x] * 2), t, torch.cat([uncond, cond])).sample.chunk(2)
    guided = noise_uncond + SCALE * (noise_text - noise_uncond)
    expected = scheduler.step(guided, t, x)

    unet = same(lambda: UNet(UNetConfig.from_json(UNETS[SD])), reference)
    del reference
    denoise = denoiser(classifier_free(halves_together(conditional(unet, torch.cat([uncond, cond]))), SCALE), "epsilon")
    schedule = make_schedule(ScheduleConfig.from_json(SCHEDULER), STEPS)
    step = next(sample(denoise, x, schedule, SAMPLERS["ddim"].step, Noise.from_seeds([0])))
    # Guidance multiplies the rounding of the two predictions, and dividing by alpha (0.07 here) that of x0.
    assert_close(step.cond, noise_text, 1e-5)
    assert_close(step.uncond, noise_uncond, 1e-5)
    assert_close(step.eps, guided, 1e-4)
    assert_close(step.x0, expected.pred_original_sample, 2e-3, at_least=1)
    assert_close(step.x, expected.prev_sample, 1e-4)


def built(fields, dtype):
    """diffusers' UNet of that configuration, drawn in `dtype`, and ours with the same storage."""
    cpu = torch.device("cpu")
    with torch.device("meta"):
        reference = UNet2DConditionModel.from_config(fields)
    give(reference, draw(reference, dtype, cpu, seed=1), cpu)
    return reference, share(lambda: UNet(UNetConfig.from_json(fields)), reference, lambda name: name, cpu)


@torch.no_grad()
def test_one_guided_step_of_stable_diffusion_2_1_equals_diffusers():
    """v-prediction, linear projections, heads of 64 everywhere, a text of 1024 numbers."""
    x, cond, uncond = normal(1, 1, 4, 24, 32), normal(2, 1, 77, 1024), normal(3, 1, 77, 1024)
    reference, unet = built(UNET_2, torch.float32)
    assert sum(p.numel() for p in unet.parameters()) == 865_910_724  # published: 865.9 M
    fields = {**SCHEDULER, "prediction_type": "v_prediction"}
    scheduler = DDIMScheduler.from_config(fields)
    scheduler.set_timesteps(STEPS)
    t = scheduler.timesteps[0]
    low, high = reference(torch.cat([x] * 2), t, torch.cat([uncond, cond])).sample.chunk(2)
    expected = scheduler.step(low + SCALE * (high - low), t, x)

    network = guided(unet, Told(uncond), Told(cond), SCALE)
    schedule = make_schedule(ScheduleConfig.from_json(fields), STEPS)
    denoise = denoiser(network, "v_prediction")
    step = next(sample(denoise, x, schedule, SAMPLERS["ddim"].step, Noise.from_seeds([0])))
    assert_close(step.cond, high, 1e-5)
    assert_close(step.uncond, low, 1e-5)
    assert_close(step.x0, expected.pred_original_sample, 1e-4, at_least=1)
    assert_close(step.x, expected.prev_sample, 1e-4)


@torch.no_grad()
def test_one_guided_step_of_sdxl_in_bfloat16_equals_diffusers():
    """Both halves are told their own pooled vector and sizes. Both sides round at the same places: little is left."""
    half = torch.bfloat16
    x, cond, uncond = (normal(k, *shape, dtype=half) for k, shape in enumerate([(1, 4, 16, 24)] + [(1, 77, 2048)] * 2))
    pooled = [normal(10 + k, 1, 1280, dtype=half) for k in range(2)]
    sizes = [Sizes((1024, 768), (0, 16), (128, 192)), Sizes((256, 256), (0, 0), (128, 192))]
    reference, unet = built(UNET_XL, half)
    assert sum(p.numel() for p in unet.parameters()) == 2_567_463_684  # published: 2,567.5 M
    scheduler = EulerDiscreteScheduler.from_config(EULER)
    scheduler.set_timesteps(STEPS)
    t, ids = scheduler.timesteps[0], torch.tensor([each.numbers for each in sizes])
    start = x * scheduler.init_noise_sigma
    read = torch.cat([scheduler.scale_model_input(start, t)] * 2)
    added = {"text_embeds": torch.cat(pooled), "time_ids": ids}
    low, high = reference(read, t, torch.cat([uncond, cond]), added_cond_kwargs=added).sample.chunk(2)

    words = [Words(*each) for each in zip((uncond, cond), pooled, strict=True)]
    told = [tell(unet, each, size) for each, size in zip(words, sizes, strict=True)]
    schedule = make_schedule(ScheduleConfig.from_json(EULER), STEPS)
    denoise = denoiser(guided(unet, *told, SCALE), "epsilon")
    step = next(sample(denoise, read[:1], schedule, SAMPLERS["euler"].step, Noise.from_seeds([0])))
    for ours, theirs in ((step.cond, high), (step.uncond, low)):
        apart = (ours.float() - theirs.float()).square().mean().sqrt() / theirs.float().square().mean().sqrt()
        assert ours.dtype == half and theirs.abs().mean() > 0.1 and apart < 1e-2, apart
    assert (high - low).abs().mean() > 0.01  # and the halves are told different things


@torch.no_grad()
def test_the_vae_of_stable_diffusion_equals_diffusers():
    reference = randomise(AutoencoderKL.from_config(VAES[SD])).eval()
    vae = same(lambda: VAE(VAEConfig.from_json(VAES[SD])), reference)
    image, z = normal(1, 1, 3, 128, 96), normal(2, 1, 4, 16, 12)
    assert_close(vae.posterior(image).mean, reference.encode(image).latent_dist.mean, 1e-5)
    assert_close(vae.reconstruct(z), reference.decode(z).sample, 1e-5)


@torch.no_grad()
def test_a_controlnet_of_stable_diffusion_equals_diffusers():
    reference = randomise(ControlNetModel(cross_attention_dim=768)).eval()  # as the published ones for SD 1.5 are
    net = same(lambda: ControlNet(ControlNetConfig.from_json(dict(reference.config))), reference)
    x, context = normal(1, 2, 4, 32, 24), normal(2, 2, 77, 768)
    picture = normal(3, 2, 3, 256, 192).sigmoid()
    skips, middle = reference(x, 500, context, picture, conditioning_scale=0.7, return_dict=False)
    ours, own_middle = net(x, 500, context, net.condition(picture), scale=0.7)
    assert len(ours) == len(skips) == 12
    for mine, theirs in zip([*ours, own_middle], [*skips, middle], strict=True):
        assert_close(mine, theirs, 1e-5)
