"""Stable Diffusion 1.5 at its full size, with random weights: one guided step equals diffusers'.

Tiny models can't show a mistake that grows with width, depth or the number of groups. 3.4 GiB of parameters, shared.
"""

import gc
import os

import pytest
import torch
from diffusers import AutoencoderKL, ControlNetModel, DDIMScheduler, UNet2DConditionModel
from reference import assert_close, normal, randomise, same
from test_unet import PUBLISHED as UNETS
from test_vae import PUBLISHED as VAES

from ldm.guidance import classifier_free, conditional, denoiser, halves_together
from ldm.models.controlnet import ControlNet, ControlNetConfig
from ldm.models.unet import UNet, UNetConfig
from ldm.models.vae import VAE, VAEConfig
from ldm.noise import Noise
from ldm.samplers import SAMPLERS
from ldm.sampling import sample
from ldm.schedules import ScheduleConfig, make_schedule

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
