"""Guidance equals what diffusers' pipelines do with its UNet, in one batch or in two runs."""

import pytest
import torch
from diffusers import UNet2DConditionModel
from reference import assert_close, normal, randomise, same

from ldm.diffusion import PREDICTIONS, add_noise, target
from ldm.guidance import Output, classifier_free, conditional, denoiser, halves_apart, halves_together
from ldm.models.unet import Extras, UNet, UNetConfig
from ldm.schedules import Level

LEVEL = Level(3, 481.0, 0.8, 0.6)
FIELDS = {
    "block_out_channels": [8, 16],
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "cross_attention_dim": 12,
    "attention_head_dim": 2,
}


def pair(**more):
    reference = randomise(UNet2DConditionModel(**FIELDS, **more)).double().eval()
    return reference, same(lambda: UNet(UNetConfig.from_json(FIELDS | more)), reference)


def inputs():
    return [normal(1, 3, 4, 10, 6).double(), normal(2, 3, 7, 12).double(), normal(3, 3, 7, 12).double()]


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("scale", [7.5, 1.0, 0.0, -2.0])
@torch.no_grad()
def test_guidance_equals_diffusers_order_and_formula(scale, together):
    """Of StableDiffusionPipeline: [negative, prompt] in one batch, then uncond + scale * (text - uncond)."""
    reference, unet = pair()
    x, cond, uncond = inputs()
    out = reference(torch.cat([x] * 2), LEVEL.t, torch.cat([uncond, cond])).sample
    noise_uncond, noise_text = out.chunk(2)
    if together:
        halves = halves_together(conditional(unet, torch.cat([uncond, cond])))
    else:
        halves = halves_apart(conditional(unet, uncond), conditional(unet, cond))
    ours = classifier_free(halves, scale)(x, LEVEL)
    assert_close(ours.out, noise_uncond + scale * (noise_text - noise_uncond), 1e-11)
    assert_close(ours.cond, noise_text, 1e-11)
    assert_close(ours.uncond, noise_uncond, 1e-11)
    assert (noise_text - noise_uncond).abs().mean() > 0.01


@torch.no_grad()
def test_without_guidance_the_network_is_the_unet():
    reference, unet = pair(num_class_embeds=9)
    x, cond, _ = inputs()
    labels = torch.tensor([1, 8, 0])
    out, *others = conditional(unet, cond, Extras(class_labels=labels))(x, LEVEL)
    assert_close(out, reference(x, LEVEL.t, cond, class_labels=labels).sample, 1e-11)
    assert others == [None, None]


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_denoiser_turns_the_output_into_what_it_was_made_of(prediction):
    x0, eps, cond, uncond = (normal(i, 3, 4, 10, 6).double() for i in range(4))
    level = LEVEL if prediction != "flow" else Level(3, 481.0, 0.4, 0.6)
    x = add_noise(x0, eps, level.alpha, level.sigma)
    out = target(x0, eps, level.alpha, level.sigma, prediction)
    asked = []

    def network(x, level):
        asked.append((x, level))
        return Output(out, cond, uncond)

    p = denoiser(network, prediction)(x, level)
    assert_close(p.x0, x0, 1e-11)
    assert_close(p.eps, eps, 1e-11)
    assert p.cond is cond and p.uncond is uncond
    assert len(asked) == 1 and asked[0][0] is x and asked[0][1] == level
