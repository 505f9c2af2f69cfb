"""FLUX Fill, the control models (Canny, Depth) and ControlNets draw what diffusers' pipelines draw, step by step.

Whole trajectories on tiny models in float32: pictures that aren't square, two at once, and every draw of noise in its
order. Then what the channels mean, and what is refused with a sentence.
"""

import numpy as np
import pytest
import torch
from diffusers import (
    FluxControlNetImg2ImgPipeline,
    FluxControlNetPipeline,
    FluxControlPipeline,
    FluxFillPipeline,
    FluxMultiControlNetModel,
)
from reference import assert_close, normal
from tiny_flux import FACTOR, LATENT, MODELS, FluxModels
from tiny_tasks import box_mask, picture

import ldm
from ldm import tasks
from ldm.control import Control
from ldm.errors import LDMError
from ldm.models.flux_controlnet import FluxControlNet
from ldm.models.patches import pack
from ldm.noise import Noise
from ldm.tasks import check_given, choose_sizes, open_image, task_of

WIDTH, HEIGHT, SEED, TOKENS = 32, 48, 7, 9
PROMPTS = ["a large red house", "a fish, in the snow"]
TWO = [picture(1, WIDTH, HEIGHT), picture(2, WIDTH, HEIGHT)]
# Its borders lie inside of a position, and in the second one the mask's pixels are no multiple of anything.
MASKS = [box_mask(WIDTH, HEIGHT, 3, 5, 21, 30), box_mask(WIDTH, HEIGHT, 17, 9, 30, 46)]
UNION = {"num_mode": 4}
LOOKS = {"conditioning_embedding_channels": LATENT, "patch_size": 2, "num_layers": 2, "num_single_layers": 0}


@pytest.fixture(scope="module")
def flux(tmp_path_factory):
    return FluxModels(tmp_path_factory.mktemp("flux"))


def theirs(pipe, prompts=PROMPTS, steps=3, **options) -> list[torch.Tensor]:
    """The latents behind each of diffusers' steps, packed; two pictures, each of its own generator."""
    steps_taken = []

    def keep(pipe, i, t, given):
        steps_taken.append(given["latents"])
        return {}

    generators = [torch.Generator().manual_seed(SEED + k) for k in range(len(prompts))]
    size = {"width": WIDTH, "height": HEIGHT, "max_sequence_length": TOKENS, "num_inference_steps": steps}
    options = size | {"generator": generators, "callback_on_step_end": keep, "output_type": "latent"} | options
    pipe(prompts, **options)
    return steps_taken


def check(pipe, expected: list[torch.Tensor], prompts=PROMPTS, steps=3, **options) -> None:
    """Ours, at every step; with the halves of guidance in one batch and apart."""
    options = {"seed": SEED, "steps": steps, "max_sequence_length": TOKENS, "compat": True} | options
    found = list(pipe.steps(prompts, **options))
    assert len(found) == len(expected) and expected[0].std() > 0.1
    for ours, reference in zip(found, expected, strict=True):
        assert_close(pack(ours.x), reference, 1e-5, rtol=1e-5)
    assert (expected[-1][0] - expected[-1][1]).abs().mean() > 0.1  # the pictures of the batch differ


# ------------------------------------------------------------------------------------------------ fill


@pytest.mark.parametrize("strength", [1.0, 0.66])
def test_fill_draws_what_diffusers_draws(flux, strength):
    expected = theirs(
        flux.reference("fill", FluxFillPipeline), image=TWO, mask_image=MASKS, strength=strength, guidance_scale=30.0
    )
    assert len(expected) == (3 if strength == 1 else 2)
    check(flux.ours("fill"), expected, image=TWO, mask=MASKS, strength=strength, guidance=30.0)


def test_fill_from_latents_of_ones_own(flux):
    latents = normal(5, 2, LATENT, HEIGHT // 8, WIDTH // 8)
    expected = theirs(
        flux.reference("fill", FluxFillPipeline), image=TWO, mask_image=MASKS, latents=pack(latents), guidance_scale=4.0
    )
    check(flux.ours("fill"), expected, image=TWO, mask=MASKS, latents=latents, guidance=4.0)


def test_what_fill_reads_is_the_masked_picture_and_every_pixel_of_the_mask(flux):
    pipe = flux.ours("fill")
    settings = pipe.settings(PROMPTS, width=WIDTH, height=HEIGHT, strength=1.0, seed=SEED)
    given = tasks.read_given(TWO, MASKS, None, 2, (WIDTH, HEIGHT), FACTOR)
    start = pipe.begin(settings, pipe.schedule_of(settings), Noise.from_seeds([7, 8]), given)
    assert start.channels.shape == (2, LATENT + 64, HEIGHT // 8, WIDTH // 8) and start.known is None
    for k, mask in enumerate(MASKS):
        white = np.asarray(mask) >= 128
        for y, x in ((0, 0), (1, 2), (3, 2), (5, 3)):
            seen = start.channels[k, LATENT:, y, x].reshape(8, 8).numpy()
            assert (seen == white[8 * y : 8 * y + 8, 8 * x : 8 * x + 8]).all()
    noise = Noise.from_seeds([7, 8])
    noise(start.x), noise(start.x)  # of the picture, of which nothing is left, and of the beginning
    with torch.no_grad():
        latents = pipe.vae.encode(given.image * (1 - given.mask), noise(start.x))
    assert_close(start.channels[:, :LATENT], latents, 1e-6)


def test_fill_puts_the_pixels_it_was_given_back(flux):
    result = flux.ours("fill")(PROMPTS[0], image=TWO[0], mask=MASKS[0], steps=1, max_sequence_length=TOKENS)
    drawn, outside = np.asarray(result.images[0]), np.asarray(MASKS[0]) < 128
    assert (drawn == np.asarray(TWO[0]))[outside].all() and result.changed[0] > 1
    assert result.settings.guidance == 30 and result.settings.strength == 1


# ------------------------------------------------------------------------------------------------ control models


def test_a_control_model_draws_what_diffusers_draws(flux):
    expected = theirs(flux.reference("control", FluxControlPipeline), control_image=TWO, guidance_scale=10.0)
    check(flux.ours("control"), expected, image=TWO, guidance=10.0)


def test_one_picture_leads_both_each_by_its_own_sample(flux):
    expected = theirs(flux.reference("control", FluxControlPipeline), control_image=TWO[0], guidance_scale=10.0)
    check(flux.ours("control"), expected, image=TWO[0], guidance=10.0)


def test_the_picture_decides_the_size_and_the_first_noise_is_the_callers(flux):
    latents = normal(5, 2, LATENT, HEIGHT // 8, WIDTH // 8)
    pipe = flux.reference("control", FluxControlPipeline)
    expected = theirs(pipe, control_image=TWO, guidance_scale=10.0, latents=pack(latents))
    check(flux.ours("control"), expected, image=TWO, guidance=10.0, latents=latents)


# ------------------------------------------------------------------------------------------------ ControlNets


@pytest.mark.parametrize(
    ("name", "fields", "mode"),
    [
        ("schnell", {}, None),
        ("dev", {"guidance_embeds": True, "num_single_layers": 0}, None),
        ("dev", UNION, 2),
        ("dev", LOOKS, None),
    ],
    ids=["latents", "told its guidance", "union", "pictures"],
)
def test_a_controlnet_leads_as_in_diffusers(flux, name, fields, mode):
    reference, folder = flux.controlnet(**fields)
    expected = theirs(
        flux.reference(name, FluxControlNetPipeline, controlnet=reference),
        control_image=TWO,
        control_mode=mode,
        controlnet_conditioning_scale=0.8,
        guidance_scale=3.5,
    )
    pipe = flux.ours(name)
    net = ldm.load_controlnet(folder, pipe)
    assert isinstance(net, FluxControlNet)
    check(pipe, expected, control=Control(net, TWO, 0.8, mode=mode), width=WIDTH, height=HEIGHT)


def test_a_net_that_is_told_its_guidance_leads_a_transformer_that_isnt(flux):
    reference, folder = flux.controlnet(guidance_embeds=True)
    pipe = flux.reference("schnell", FluxControlNetPipeline, controlnet=reference)
    expected = theirs(pipe, control_image=TWO, guidance_scale=3.5)
    ours = flux.ours("schnell")
    check(ours, expected, control=Control(ldm.load_controlnet(folder, ours), TWO))


def test_a_controlnet_in_a_share_of_the_steps(flux):
    reference, folder = flux.controlnet()
    pipe = flux.reference("dev", FluxControlNetPipeline, controlnet=reference)
    share = {"control_guidance_start": 0.25, "control_guidance_end": 0.75}
    expected = theirs(pipe, control_image=TWO, guidance_scale=3.5, steps=4, **share)
    ours = flux.ours("dev")
    check(ours, expected, steps=4, control=Control(ldm.load_controlnet(folder, ours), TWO, start=0.25, end=0.75))


def test_several_controlnets_add_up_as_in_diffusers(flux):
    """Their pictures are encoded one after the other, before the first noise."""
    (one, first), (two, second) = flux.controlnet(seed=41), flux.controlnet(seed=42, **UNION)
    pipe = flux.reference("dev", FluxControlNetPipeline, controlnet=FluxMultiControlNetModel([one, two]))
    expected = theirs(
        pipe,
        control_image=[TWO, TWO[::-1]],
        control_mode=[None, 3],
        controlnet_conditioning_scale=[0.8, 0.5],
        guidance_scale=3.5,
    )
    ours = flux.ours("dev")
    nets = [ldm.load_controlnet(folder, ours) for folder in (first, second)]
    check(ours, expected, control=[Control(nets[0], TWO, 0.8), Control(nets[1], TWO[::-1], 0.5, mode=3)])


@pytest.mark.parametrize("together", [True, False])
def test_both_halves_of_true_guidance_are_led_alike(flux, together):
    reference, folder = flux.controlnet(guidance_embeds=True)
    pipe = flux.reference("dev", FluxControlNetPipeline, controlnet=reference)
    negatives = ["a house", "snow"]
    expected = theirs(pipe, control_image=TWO, guidance_scale=3.5, negative_prompt=negatives, true_cfg_scale=2.0)
    ours = flux.ours("dev")
    control = Control(ldm.load_controlnet(folder, ours), TWO)
    check(ours, expected, control=control, negative=negatives, true_guidance=2.0, together=together)


def test_a_controlnet_leads_from_a_picture_as_in_diffusers(flux):
    reference, folder = flux.controlnet()
    pipe = flux.reference("dev", FluxControlNetImg2ImgPipeline, controlnet=reference)
    expected = theirs(pipe, image=TWO, control_image=TWO[::-1], strength=0.66, guidance_scale=3.5)
    assert len(expected) == 2
    ours = flux.ours("dev")
    control = Control(ldm.load_controlnet(folder, ours), TWO[::-1])
    check(ours, expected, image=TWO, strength=0.66, control=control)


def test_a_net_leads_a_model_that_reads_more_beside_the_latent(flux):
    """Fill with a ControlNet, for which diffusers has no class: the net reads the latent alone."""
    _, folder = flux.controlnet()
    pipe = flux.ours("fill")
    options = {"image": TWO, "mask": MASKS, "steps": 2, "max_sequence_length": TOKENS, "seed": SEED}
    led = list(pipe.steps(PROMPTS, control=Control(ldm.load_controlnet(folder, pipe), TWO), **options))
    none = list(pipe.steps(PROMPTS, control=Control(ldm.load_controlnet(folder, pipe), TWO, 0.0), **options))
    assert (led[0].x - none[0].x).abs().mean() > 0.01


# ------------------------------------------------------------------------------------------------ sentences


def test_the_channels_tell_the_task():
    assert [task_of(16 + more, 16, 8) for more in (0, 16, 80, 4, 64)] == ["text", "control", "fill", None, None]
    assert [task_of(4 + more, 4, 8) for more in (0, 4, 68, 5)] == ["text", "control", "fill", None]
    assert [task_of(4 + more, 4) for more in (0, 4, 5, 68)] == ["text", "edit", "inpaint", None]


def test_every_model_is_known_for_what_it_does(flux):
    assert {name: flux.ours(name).task for name in MODELS} == {
        "schnell": "text", "dev": "text", "fill": "fill", "control": "control"
    }  # fmt: skip


@pytest.mark.parametrize(
    ("task", "given", "sentence"),
    [
        ("fill", (True, False, False), r"This model fills holes in a picture: pass image and mask \(--image, --mask\)"),
        ("fill", (False, False, False), "This model fills holes in a picture"),
        ("control", (False, False, False), r"draws from the picture that leads it, of edges or of depths: pass it as"),
        ("control", (True, True, False), "the picture that leads this model has nothing to be kept: leave it out"),
        (
            "fill",
            (True, True, True),
            r"reads no depth of its own \(its network has no channel for it\): a ControlNet may",
        ),
        ("control", (True, False, True), r"A control model reads depths as a picture: pass the depths as image \(--im"),
    ],
)
def test_what_a_task_lacks_or_has_no_use_for_is_refused(task, given, sentence):
    with pytest.raises(LDMError, match=sentence):
        check_given(task, *given, {})


def test_a_control_model_begins_from_noise_and_reads_the_picture_itself(flux):
    pipe = flux.ours("control")
    with pytest.raises(LDMError, match="strength has no meaning here: a control model begins from noise"):
        pipe.prepare(PROMPTS[0], image=TWO[0], strength=0.5)
    with pytest.raises(LDMError, match="A control model reads the picture itself: pass that as image, not latents"):
        open_image(torch.zeros(1, LATENT, 6, 4), LATENT, "control")
    with pytest.raises(LDMError, match=r"image_guidance is given, which only .* this one is for control"):
        check_given("control", True, False, False, {"image_guidance": 1.5})


def test_sides_are_rounded_to_patches(flux, capsys):
    model = flux.ours("dev").model
    odd = [picture(3, 47, 49)]
    assert choose_sizes(model, odd) == {"width": 32, "height": 48, "strength": 0.8}
    assert "drawn at 32x48, multiples of 16" in capsys.readouterr().err
    assert choose_sizes(model, odd, width=32)["height"] == 48
    assert choose_sizes(model, torch.zeros(1, LATENT, 6, 4))["height"] == 48
    pipe = flux.ours("control")
    run = pipe.prepare(PROMPTS[0], image=odd[0], steps=1, max_sequence_length=TOKENS)
    assert run.x.shape == (1, LATENT, 6, 4)  # a side may be stretched by less than a patch
    net = ldm.load_controlnet(flux.controlnet()[1], flux.ours("dev"))
    led = flux.ours("dev").prepare(PROMPTS[0], control=Control(net, odd[0]), steps=1, max_sequence_length=TOKENS)
    assert led.x.shape == (1, LATENT, 6, 4)


def test_a_net_for_another_base_is_refused_before_its_weights_are_read(flux, models):
    folder = flux.controlnet(joint_attention_dim=21)[1]
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(LDMError, match=r"joint_attention_dim=21 was made for another base than this model \(joint"):
        ldm.load_controlnet(folder, flux.ours("dev"))
    with pytest.raises(LDMError, match="was made for FLUX, and this model is a UNet"):
        ldm.load_controlnet(flux.controlnet()[1], models.ours("sd1"))
    net = ldm.load_controlnet(flux.controlnet()[1], flux.ours("dev"))
    with pytest.raises(LDMError, match="The ControlNet was made for FLUX, and this model is a UNet"):
        models.ours("sd1").prepare(PROMPTS[0], control=Control(net, TWO[0]))


def test_a_net_sees_the_same_whoever_asks(flux):
    """`look` by itself takes the settings' own noise."""
    pipe = flux.ours("dev")
    net = ldm.load_controlnet(flux.controlnet()[1], pipe)
    settings = pipe.settings(PROMPTS, width=WIDTH, height=HEIGHT, seed=SEED)
    schedule = pipe.schedule_of(settings)
    seen = pipe.look(settings, schedule, [Control(net, TWO)])[0]
    again = pipe.look(settings, schedule, [Control(net, TWO)], pipe.noise(settings))[0]
    assert torch.equal(seen.features, again.features) and seen.features.shape == (2, 6, 32)
    other = pipe.look(settings, schedule, [Control(net, TWO)], Noise.from_seeds([1, 2]))[0]
    assert not torch.equal(seen.features, other.features)
