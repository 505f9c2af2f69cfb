"""FLUX's ControlNet equals diffusers' FluxControlNetModel, of all three kinds; and whole pictures equal its pipelines'.

The kinds: one that reads latents (InstantX, Shakker-Labs), a union that is told a mode, one that looks at the picture
itself (XLabs). Then what is run when, and what is refused with a sentence.
"""

import inspect
from dataclasses import replace

import pytest
import torch
from diffusers import FluxControlNetModel, FluxControlNetPipeline
from reference import DTYPES, assert_close, keys_and_shapes, normal, same
from tiny_flux import (
    FLUX,
    LATENT,
    POOLED,
    TEXT_WIDTH,
    VAE_FIELDS,
    controlnet_reference,
    flux_pair,
    rotary_in_float64,
)
from tiny_tasks import picture

from ldm.control import GUIDANCE, Control, Seen, all_together, check_net, flux_controller, lead, sums
from ldm.errors import LDMError
from ldm.guidance import Told
from ldm.models.controlnet import ControlNetConfig
from ldm.models.flux import FluxConfig, FluxResiduals
from ldm.models.flux_controlnet import FluxControlNet, FluxControlNetConfig, check_flux_base, over
from ldm.models.patches import pack
from ldm.models.unet import Extras, UNetConfig
from ldm.models.vae import VAEConfig
from ldm.schedules import Level

KINDS = {
    "latents": {},
    "told its guidance": {"guidance_embeds": True, "num_layers": 2, "num_single_layers": 0},
    "union": {"num_mode": 4},
    "pictures": {"conditioning_embedding_channels": LATENT, "patch_size": 2, "num_layers": 2, "num_single_layers": 0},
    "single blocks alone": {"num_layers": 0},
}
B, TOKENS, HEIGHT, WIDTH = 2, 5, 6, 4  # of the latent
LEVEL = Level(0, 750.0, 0.25, 0.75)


def pair(kind: str, dtype: torch.dtype = torch.float32) -> tuple[FluxControlNetModel, FluxControlNet]:
    """The same net of both libraries, every parameter drawn."""
    reference = controlnet_reference(dtype=dtype, **KINDS[kind])
    return reference, same(lambda: FluxControlNet(FluxControlNetConfig.from_json(dict(reference.config))), reference)


def given(dtype: torch.dtype, seed: int = 0) -> dict:
    """What both are given: t and guidance differ from picture to picture."""
    return {
        "x": normal(seed + 1, B, LATENT, HEIGHT, WIDTH, dtype=dtype),
        "context": normal(seed + 2, B, TOKENS, TEXT_WIDTH, dtype=dtype),
        "pooled": normal(seed + 3, B, POOLED, dtype=dtype),
        "t": torch.tensor([500.0, 750.0], dtype=dtype),
        "guidance": torch.tensor([3.5, 2.0], dtype=dtype),
        "latents": normal(seed + 4, B, LATENT, HEIGHT, WIDTH, dtype=dtype),
        "picture": normal(seed + 5, B, 3, 8 * HEIGHT, 8 * WIDTH, dtype=dtype).clip(-1, 1),
    }


def of_reference(net: FluxControlNetModel, told: dict, mode: int | None, scale: float) -> FluxResiduals:
    dtype, looks = told["x"].dtype, net.config.conditioning_embedding_channels is not None
    with torch.no_grad():
        found = net(
            hidden_states=pack(told["x"]),
            controlnet_cond=told["picture"] if looks else pack(told["latents"]),
            controlnet_mode=None if mode is None else torch.full((B, 1), mode),
            conditioning_scale=scale,
            encoder_hidden_states=told["context"],
            pooled_projections=told["pooled"],
            timestep=told["t"] / 1000,
            img_ids=FluxControlNetPipeline._prepare_latent_image_ids(B, HEIGHT // 2, WIDTH // 2, "cpu", dtype),
            txt_ids=torch.zeros(TOKENS, 3, dtype=dtype),
            guidance=told["guidance"] if net.config.guidance_embeds else None,
            return_dict=False,
        )
    return FluxResiduals(*(each or () for each in found))


@torch.no_grad()
def of_ours(net: FluxControlNet, told: dict, mode: int | None, scale: float) -> FluxResiduals:
    extras = Extras(pooled=told["pooled"], guidance=told["guidance"])
    features = net.condition(told["picture"] if net.config.reads_pictures else told["latents"])
    return net(told["x"], told["t"], net.prepare(told["context"], extras, mode=mode), features, scale)


# ------------------------------------------------------------------------------------------------ the net


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_what_it_adds_equals_diffusers(kind, dtype):
    reference, net = pair(kind, dtype)
    told, mode = given(dtype), 2 if kind == "union" else None
    if dtype == torch.float64:
        with rotary_in_float64():
            expected = of_reference(reference, told, mode, 0.7)
    else:
        expected = of_reference(reference, told, mode, 0.7)
    found = of_ours(net, told, mode, 0.7)
    assert len(found.double) == reference.config.num_layers
    assert len(found.single) == reference.config.num_single_layers
    for ours, theirs in zip([*found.double, *found.single], [*expected.double, *expected.single], strict=True):
        assert_close(ours, theirs, DTYPES[dtype])


# As its authors' page has it, with what diffusers writes of the fields that it lacks.
XLABS = {
    "attention_head_dim": 128, "axes_dims_rope": [16, 56, 56], "guidance_embeds": True, "in_channels": 64,
    "conditioning_embedding_channels": 16, "joint_attention_dim": 4096, "num_attention_heads": 24, "num_layers": 2,
    "num_single_layers": 0, "patch_size": 2, "pooled_projection_dim": 768,
}  # fmt: skip


def test_a_published_net_has_the_names_and_shapes_of_diffusers():
    with torch.device("meta"):
        net = FluxControlNet(FluxControlNetConfig.from_json(XLABS | {"_class_name": "FluxControlNetModel"}))
        assert keys_and_shapes(net) == keys_and_shapes(FluxControlNetModel(**XLABS))
    check_flux_base(net.config, FluxConfig(), VAEConfig(block_out_channels=(128, 256, 512, 512), latent_channels=16))


@pytest.mark.parametrize("kind", KINDS)
def test_names_shapes_and_configuration_are_those_of_diffusers(kind):
    reference = controlnet_reference(**KINDS[kind])
    config = FluxControlNetConfig.from_json(dict(reference.config))
    assert keys_and_shapes(FluxControlNet(config)) == keys_and_shapes(reference)
    written = config.to_json()
    known = set(inspect.signature(FluxControlNetModel).parameters)
    assert written.keys() - {"_class_name"} == known
    assert FluxControlNetConfig.from_json(written) == config
    again = FluxControlNetModel.from_config(written).config
    assert {name: again[name] for name in known} == {name: reference.config[name] for name in known}


def test_a_copy_of_the_transformer_changes_nothing_until_it_learns():
    _, flux = flux_pair(guidance=True)
    net = FluxControlNet.from_transformer(flux, layers=1, single_layers=2)
    told = given(torch.float32)
    found = of_ours(net, told, None, 1.0)
    assert len(found.double) == 1 and len(found.single) == 2
    assert all((each == 0).all() for each in [*found.double, *found.single])
    fields = FLUX | {"guidance_embeds": True, "num_layers": 1, "num_single_layers": 2, "out_channels": None}
    assert net.config == FluxControlNetConfig.from_json(fields)
    theirs = flux.state_dict()
    copied = [name for name in net.state_dict() if not name.startswith("controlnet_")]
    assert len(copied) > 60 and all(torch.equal(net.state_dict()[name], theirs[name]) for name in copied)
    net.state_dict()["x_embedder.weight"].add_(1)
    assert not torch.equal(net.x_embedder.weight, flux.x_embedder.weight)  # a copy, not the same tensor
    with pytest.raises(LDMError, match="The transformer has 2 and 3 blocks: a ControlNet of 3 and 1 can't be copied"):
        FluxControlNet.from_transformer(flux, 3, 1)
    with pytest.raises(LDMError, match="reads the latent alone, and this one reads 4 channels beside it"):
        FluxControlNet.from_transformer(flux_pair(beside=LATENT)[1], 1, 1)


def test_residuals_are_spread_over_the_transformers_blocks_as_diffusers_does():
    """5 of a net's own over 19 blocks: four neighbours each get one; 2 of XLabs' go around."""
    five = [torch.full((1,), float(k)) for k in range(5)]
    assert [int(each) for each in over(five, 19)] == [0] * 4 + [1] * 4 + [2] * 4 + [3] * 4 + [4] * 3
    assert [int(each) for each in over(five[:2], 5, around=True)] == [0, 1, 0, 1, 0]
    assert [int(each) for each in over(five, 5)] == [0, 1, 2, 3, 4]
    assert over([], 19) == ()


@pytest.mark.parametrize("kind", ["latents", "pictures"])
def test_a_led_transformer_equals_diffusers(kind):
    """More blocks than residuals, so that it shows which of them gets which."""
    blocks = {"num_layers": 3, "num_single_layers": 5}
    (theirs, flux), (reference, net) = flux_pair(**blocks), pair(kind)
    told = given(torch.float32)
    with torch.no_grad():
        samples = of_reference(reference, told, None, 0.7)
        expected = theirs(
            hidden_states=pack(told["x"]),
            encoder_hidden_states=told["context"],
            pooled_projections=told["pooled"],
            timestep=told["t"] / 1000,
            img_ids=FluxControlNetPipeline._prepare_latent_image_ids(B, 3, 2, "cpu", torch.float32),
            txt_ids=torch.zeros(TOKENS, 3),
            controlnet_block_samples=samples.double or None,
            controlnet_single_block_samples=samples.single or None,
            controlnet_blocks_repeat=kind == "pictures",
            return_dict=False,
        )[0]
        added = net.spread(of_ours(net, told, None, 0.7), flux.config)
        found = flux(told["x"], told["t"], told["context"], Extras(pooled=told["pooled"]), added)
        plain = flux(told["x"], told["t"], told["context"], Extras(pooled=told["pooled"]))
    assert_close(pack(found), expected, 1e-5)
    assert (found - plain).abs().mean() > 0.05


# ------------------------------------------------------------------------------------------------ the closure


def seen_by(net: FluxControlNet, mode: int | None = None, rows: tuple = (0, 1), scale: float = 0.7) -> Seen:
    features = net.condition(normal(9, 1, LATENT, HEIGHT, WIDTH))
    config = FluxConfig.from_json(FLUX)
    return Seen(Control(net, picture(1, 32, 48), scale, mode=mode), features, frozenset(rows), config)


@torch.no_grad()
def test_the_controller_reads_the_latent_the_prompt_and_its_own_guidance():
    _, net = pair("told its guidance")
    told = given(torch.float32)
    cond = Told(told["context"], Extras(pooled=told["pooled"]))  # of a transformer that is told no scale
    beside = torch.cat([told["x"], 5 * told["x"]], dim=1)
    seen = seen_by(net)
    found = flux_controller(seen, cond)(beside, LEVEL)
    extras = Extras(pooled=told["pooled"], guidance=torch.full((B,), GUIDANCE))
    expected = net(told["x"], LEVEL.t, net.prepare(told["context"], extras), seen.features.expand(B, -1, -1), 0.7)
    for ours, theirs in zip(found.double, expected.double, strict=True):
        assert_close(ours, theirs, 1e-6)
    assert flux_controller(seen, cond)(beside, LEVEL._replace(i=2)) is None
    own = Told(told["context"], Extras(pooled=told["pooled"], guidance=told["guidance"]))
    other = flux_controller(seen, own)(beside, LEVEL)
    assert (other.double[0] - found.double[0]).abs().max() > 1e-3


@torch.no_grad()
def test_what_is_prepared_for_the_timesteps_of_a_run_changes_nothing():
    _, net = pair("latents")
    told, asked = given(torch.float32), []
    cond = Told(told["context"], Extras(pooled=told["pooled"]))
    plain = flux_controller(seen_by(net), cond)(told["x"], LEVEL)
    for block in net.blocks():
        for name, module in block.named_children():
            if name.startswith("norm"):
                module.register_forward_hook(lambda *given: asked.append(1))
    ready = flux_controller(seen_by(net), cond, times=[LEVEL.t, 500.0])
    count = len(asked)
    assert_close(ready(told["x"], LEVEL).double[0], plain.double[0], 1e-6, at_least=0.01)
    assert count == 4 and len(asked) == count  # two modulations a double block, one a single one, each asked once


@torch.no_grad()
def test_both_halves_of_guidance_are_led_by_what_the_prompt_says():
    _, net = pair("union")
    told, other = given(torch.float32), given(torch.float32, seed=40)
    cond, uncond = (Told(each["context"], Extras(pooled=each["pooled"])) for each in (told, other))
    seen, x = seen_by(net, mode=1), told["x"]
    alone = lead([seen], [cond])(x, LEVEL)
    together = lead([seen], [uncond, cond])(torch.cat([x, x]), LEVEL)
    apart = lead([seen], [uncond], last=False, cond=cond)(x, LEVEL)
    for one, both, half in zip(alone.single, together.single, apart.single, strict=True):
        assert torch.equal(torch.cat([one, one]), both) and torch.equal(one, half)
    wrong = lead([seen], [uncond])(x, LEVEL)
    assert (wrong.single[0] - alone.single[0]).abs().max() > 1e-3


@torch.no_grad()
def test_several_nets_add_up_and_share_sums():
    nets = [pair("latents")[1], pair("union")[1], pair("pictures")[1]]
    told = given(torch.float32)
    cond = Told(told["context"], Extras(pooled=told["pooled"]))
    seen = [seen_by(nets[0]), seen_by(nets[1], mode=3)]
    looks = Control(nets[2], picture(1, 32, 48))
    seen.append(Seen(looks, nets[2].condition(told["picture"]), frozenset({0}), seen[0].base))
    one, two, three = (flux_controller(each, cond)(told["x"], LEVEL) for each in seen)
    found = lead(seen, [cond])(told["x"], LEVEL)
    for k in range(2):
        assert_close(found.double[k], one.double[k] + two.double[k] + three.double[k], 1e-6)
    for k in range(3):  # of which the third net has none
        assert_close(found.single[k], one.single[k] + two.single[k], 1e-6)
    assert found.single[0] is found.single[1] and found.single[0] is not found.single[2]
    later = lead(seen, [cond])(told["x"], LEVEL._replace(i=1))
    assert torch.equal(later.double[0], one.double[0] + two.double[0]) and len(later.single) == 3
    assert all_together([])(told["x"], LEVEL) is None and sums([(), ()]) == []


# ------------------------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"patch_size": 2}, "asks for 'patch_size' = 2; one that reads latents has 1"),
        ({"conditioning_embedding_channels": 4}, "asks for 'patch_size' = 1; one that reads pictures has 2"),
        ({"conditioning_embedding_channels": 8, "patch_size": 2}, "end in 8 channels, a quarter of a patch's 16"),
        ({"num_mode": 0}, "has num_mode 0: nothing would come out of it"),
        ({"num_layers": 0, "num_single_layers": 0}, "has num_layers and num_single_layers 0: nothing would come out"),
        ({"_class_name": "FluxTransformer2DModel"}, "names the class 'FluxTransformer2DModel'"),
        ({"num_modes": 3}, "a field that ldm doesn't know: 'num_modes' = 3"),
    ],
)  # fmt: skip
def test_a_configuration_that_cannot_be_is_refused(fields, sentence):
    own = {k: v for k, v in FLUX.items() if k != "out_channels"} | {"patch_size": 1}
    with pytest.raises(LDMError, match=sentence):
        FluxControlNetConfig.from_json(own | fields)


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"num_attention_heads": 3}, r"another base than this model \(width 48, here 32\)"),
        ({"joint_attention_dim": 21}, r"another base than this model \(joint_attention_dim 21, here 20\)"),
        ({"axes_dims_rope": (8, 4, 4)}, r"axes_dims_rope \(8, 4, 4\), here \(4, 4, 8\)"),
        ({"num_layers": 3}, "has num_layers 3, and this model 2: it was made for another base"),
        ({"num_single_layers": 4}, "has num_single_layers 4, and this model 3"),
        ({"in_channels": 64}, "reads latents of 16 channels, and this model's have 4"),
    ],
)
def test_a_net_for_another_base_is_refused(fields, sentence):
    flux, vae = FluxConfig.from_json(FLUX), VAEConfig.from_json(VAE_FIELDS)
    config = FluxControlNetConfig.from_json(FLUX)
    check_flux_base(config, flux, vae)
    with pytest.raises(LDMError, match=sentence):
        check_flux_base(replace(config, **fields), flux, vae)


def test_a_net_that_looks_at_pictures_needs_a_vae_of_three_steps_down():
    flux, vae = FluxConfig.from_json(FLUX), VAEConfig.from_json(VAE_FIELDS)
    config = replace(FluxControlNetConfig.from_json(FLUX), conditioning_embedding_channels=LATENT)
    check_flux_base(config, flux, vae)
    with pytest.raises(LDMError, match="pictures of 8 pixels a position; this model's latents stand for 4"):
        check_flux_base(config, flux, replace(vae, block_out_channels=(8, 8, 16)))


@pytest.mark.parametrize(
    ("kind", "options", "sentence"),
    [
        ("latents", {"guess": True}, "A ControlNet of FLUX knows no guess mode"),
        ("latents", {"mode": 1}, "mode 1 is given to a ControlNet that knows one kind of picture"),
        ("union", {}, "one for 4 kinds of picture: say which by its mode, 0 to 3, not none"),
        ("union", {"mode": 4}, "0 to 3, not 4"),
        ("union", {"mode": True}, "0 to 3, not True"),
        ("latents", {"scale": float("nan")}, "The scale of a ControlNet must be a finite number"),
    ],
)
def test_a_control_that_cannot_be_is_refused(kind, options, sentence):
    with pytest.raises(LDMError, match=sentence):
        Control(pair(kind)[1], picture(1, 32, 48), **options)


def test_a_net_of_the_other_family_is_refused():
    vae = VAEConfig.from_json(VAE_FIELDS)
    control = Control(pair("latents")[1], picture(1, 32, 48))
    with pytest.raises(LDMError, match="The ControlNet was made for FLUX, and this model is a UNet"):
        control.check_base(UNetConfig(), vae)
    with pytest.raises(LDMError, match=r"net was made for a UNet \(Stable Diffusion\), and this model is FLUX"):
        check_net(ControlNetConfig(), FluxConfig.from_json(FLUX), vae, "net")
