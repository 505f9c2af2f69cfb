"""The VAE equals diffusers' AutoencoderKL: posterior, samples, decoding, gradients, and how it reads configurations."""

import inspect
import json
from functools import cache

import pytest
import torch
from diffusers import AutoencoderKL
from reference import DTYPES, assert_close, assert_gradients_close, gradients, keys_and_shapes, normal, randomise, same

from ldm.errors import LDMError
from ldm.models.vae import VAE, Gaussian, VAEConfig

BATCH = 3


def levels(*widths):
    down, up = ["DownEncoderBlock2D"] * len(widths), ["UpDecoderBlock2D"] * len(widths)
    return {"block_out_channels": list(widths), "down_block_types": down, "up_block_types": up}


BASE = levels(8, 16, 24, 32) | {"norm_num_groups": 4}
TINY = {
    "sd": BASE | {"layers_per_block": 2},
    "sdxl": BASE | {"scaling_factor": 0.13025},
    "three-levels": levels(8, 16, 24)
    | {"norm_num_groups": 2, "latent_channels": 3, "in_channels": 1, "out_channels": 1},
    "flux": BASE
    | {
        "latent_channels": 16,
        "scaling_factor": 0.3611,
        "shift_factor": 0.1159,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
    },
    "no-attention": BASE | {"mid_block_add_attention": False},
}


@cache
def pair(name, dtype=torch.float64):
    """The reference, every parameter drawn, and ours with the same parameters."""
    reference = randomise(AutoencoderKL(**TINY[name])).to(dtype).eval()
    return reference, same(lambda: VAE(VAEConfig.from_json(TINY[name])), reference)


def picture(name, dtype, size=(48, 24)):
    return normal(1, BATCH, TINY[name].get("in_channels", 3), *size, dtype=dtype)


def latent(name, dtype, size=(6, 5)):
    return normal(2, BATCH, TINY[name].get("latent_channels", 4), *size, dtype=dtype)


# ----------------------------------------------------------------------------------------------------------- parity


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", TINY)
@torch.no_grad()
def test_posterior_equals_diffusers(name, dtype):
    reference, vae = pair(name, dtype)
    ours, expected = vae.posterior(picture(name, dtype)), reference.encode(picture(name, dtype)).latent_dist
    assert_close(ours.mean, expected.mean, DTYPES[dtype])
    assert_close(ours.log_variance, expected.logvar, DTYPES[dtype])
    assert_close(ours.kl(), expected.kl(), 0, at_least=1, rtol=DTYPES[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", TINY)
@torch.no_grad()
def test_reconstruction_equals_diffusers(name, dtype):
    reference, vae = pair(name, dtype)
    z = latent(name, dtype)
    assert_close(vae.reconstruct(z), reference.decode(z).sample, DTYPES[dtype])


@pytest.mark.parametrize("size", [(37, 22), (9, 41), (8, 8)])
@torch.no_grad()
def test_pictures_of_any_size_equal_diffusers(size):
    reference, vae = pair("sd")
    image = picture("sd", torch.float64, size)
    assert_close(vae.posterior(image).mean, reference.encode(image).latent_dist.mean, 1e-11)


@pytest.mark.parametrize("name", ["sd", "sdxl", "flux"])
@torch.no_grad()
def test_latents_are_shifted_and_scaled_as_the_pipelines_do(name):
    """Of diffusers' pipelines: (z - shift) * scale after encoding, z / scale + shift before decoding."""
    reference, vae = pair(name)
    scale, shift = reference.config.scaling_factor, reference.config.shift_factor or 0.0
    image, x0 = picture(name, torch.float64), latent(name, torch.float64)
    posterior = reference.encode(image).latent_dist
    assert_close(vae.encode(image), (posterior.mode() - shift) * scale, 1e-11, at_least=0.02)
    # diffusers draws from a generator; given the same numbers, the sample is the same.
    z = posterior.sample(torch.Generator().manual_seed(7))
    noise = torch.randn(z.shape, generator=torch.Generator().manual_seed(7), dtype=z.dtype)
    assert_close(vae.encode(image, noise), (z - shift) * scale, 1e-11, at_least=0.02)
    assert_close(vae.decode(x0), reference.decode(x0 / scale + shift).sample, 1e-11)


@torch.no_grad()
def test_log_variance_is_clamped_as_in_diffusers():
    reference, vae = pair("sd")
    bias = reference.quant_conv.bias.clone()
    # Ours shares the reference's parameters: two channels far above the upper bound, two far below the lower one.
    reference.quant_conv.bias[4:] = torch.tensor([60.0, -90.0, 60.0, -90.0])
    try:
        image = picture("sd", torch.float64)
        ours, expected = vae.posterior(image), reference.encode(image).latent_dist
        assert set(expected.logvar.unique().tolist()) == {20.0, -30.0}
        assert_close(ours.log_variance, expected.logvar, 0)
        noise = normal(3, *ours.mean.shape, dtype=torch.float64)
        assert_close(ours.sample(noise), expected.mean + expected.std * noise, 1e-11, at_least=1000, rtol=1e-14)
    finally:
        reference.quant_conv.bias.copy_(bias)


@pytest.mark.parametrize("name", ["sd", "flux"])
def test_gradients_equal_diffusers(name):
    reference, vae = pair(name)
    noise = normal(4, BATCH, TINY[name].get("latent_channels", 4), 3, 5, dtype=torch.float64)
    image = picture(name, torch.float64, (24, 40)).requires_grad_()
    posterior, q = vae.posterior(image), reference.encode(image).latent_dist
    out = vae.reconstruct(posterior.sample(noise))
    expected = reference.decode(q.mean + q.std * noise).sample
    weights = normal(5, *out.shape, dtype=torch.float64)
    ours = gradients((out * weights).sum() + posterior.kl().sum(), vae, [image])
    assert_gradients_close(ours, gradients((expected * weights).sum() + q.kl().sum(), reference, [image]))


# ------------------------------------------------------------------------------------------------------- properties


@torch.no_grad()
def test_kl_is_that_of_torch_distributions():
    q = Gaussian(normal(1, 2, 4, 3, 5, dtype=torch.float64), normal(2, 2, 4, 3, 5, dtype=torch.float64))
    normals = torch.distributions.Normal(q.mean, (0.5 * q.log_variance).exp()), torch.distributions.Normal(0.0, 1.0)
    expected = torch.distributions.kl_divergence(*normals).sum(dim=(1, 2, 3))
    assert_close(q.kl(), expected, 1e-11, at_least=1)
    assert Gaussian(torch.zeros(2, 4, 3, 5), torch.zeros(2, 4, 3, 5)).kl().tolist() == [0.0, 0.0]


@torch.no_grad()
def test_samples_have_the_mean_and_spread_of_the_gaussian():
    mean, log_variance = torch.tensor([1.0, -2.0]), torch.tensor([0.0, 4.0]).log()  # the second: spread 2, mean -2
    shape = (1, 2, 200, 200)
    q = Gaussian(
        mean[None, :, None, None].expand(shape), log_variance.clamp(min=-30)[None, :, None, None].expand(shape)
    )
    z = q.sample(normal(1, *shape))
    assert z.mean(dim=(0, 2, 3)).tolist() == pytest.approx([1.0, -2.0], abs=0.03)
    assert z.std(dim=(0, 2, 3)).tolist() == pytest.approx([0.0, 2.0], abs=0.03)


@torch.no_grad()
def test_pictures_of_a_batch_do_not_touch_each_other():
    _, vae = pair("sd")
    order = torch.tensor([2, 0, 1])
    image, z = picture("sd", torch.float64), latent("sd", torch.float64)
    assert_close(vae.encode(image[order]), vae.encode(image)[order], 1e-12, at_least=0.02)
    assert_close(vae.reconstruct(z[order]), vae.reconstruct(z)[order], 1e-12)


@pytest.mark.parametrize("name, size", [("sd", (48, 24)), ("flux", (16, 40)), ("three-levels", (48, 24))])
@torch.no_grad()
def test_latent_shape_foretells_the_latent(name, size):
    _, vae = pair(name)
    z = vae.encode(picture(name, torch.float64, size))
    assert z.shape[1:] == vae.latent_shape(*size)
    assert vae.decode(z).shape[2:] == size


# ---------------------------------------------------------------------------------------------------- configuration

# As published in the `vae/config.json` of the models named.
PUBLISHED = {
    "runwayml/stable-diffusion-v1-5": {
        "_class_name": "AutoencoderKL",
        "_diffusers_version": "0.6.0",
        "act_fn": "silu",
        **levels(128, 256, 512, 512),
        "in_channels": 3,
        "latent_channels": 4,
        "layers_per_block": 2,
        "norm_num_groups": 32,
        "out_channels": 3,
        "sample_size": 512,
    },
    "stabilityai/stable-diffusion-xl-base-1.0": {
        "_class_name": "AutoencoderKL",
        "_diffusers_version": "0.20.0.dev0",
        "_name_or_path": "../sdxl-vae/",
        "act_fn": "silu",
        **levels(128, 256, 512, 512),
        "force_upcast": True,
        "in_channels": 3,
        "latent_channels": 4,
        "layers_per_block": 2,
        "norm_num_groups": 32,
        "out_channels": 3,
        "sample_size": 1024,
        "scaling_factor": 0.13025,
    },
    "black-forest-labs/FLUX.1-dev": {
        "_class_name": "AutoencoderKL",
        "_diffusers_version": "0.30.0.dev0",
        "_name_or_path": "../checkpoints/flux-dev",
        "act_fn": "silu",
        **levels(128, 256, 512, 512),
        "force_upcast": True,
        "in_channels": 3,
        "latent_channels": 16,
        "latents_mean": None,
        "latents_std": None,
        "layers_per_block": 2,
        "mid_block_add_attention": True,
        "norm_num_groups": 32,
        "out_channels": 3,
        "sample_size": 1024,
        "scaling_factor": 0.3611,
        "shift_factor": 0.1159,
        "use_post_quant_conv": False,
        "use_quant_conv": False,
    },
}


@pytest.mark.parametrize("name", [*PUBLISHED, *TINY])
def test_configurations_give_the_keys_and_shapes_of_diffusers(name):
    fields = (PUBLISHED | TINY)[name]
    config = VAEConfig.from_json(fields)
    with torch.device("meta"):
        reference = AutoencoderKL.from_config(fields)
        expected = keys_and_shapes(reference)
        assert keys_and_shapes(VAE(config)) == expected
        # What we write, diffusers reads as the same model; what diffusers writes, we read as the same.
        written = json.loads(json.dumps(config.to_json()))
        again = AutoencoderKL.from_config(written)
    assert keys_and_shapes(again) == expected
    assert VAEConfig.from_json(written) == VAEConfig.from_json(dict(reference.config)) == config
    assert config.scaling_factor == reference.config.scaling_factor


def test_defaults_are_those_of_diffusers():
    parameters = dict(inspect.signature(AutoencoderKL.__init__).parameters)
    defaults = {key: p.default for key, p in parameters.items() if key != "self"}
    assert VAEConfig.from_json(defaults) == VAEConfig() == VAEConfig.from_json({})


@pytest.mark.parametrize(
    "field, value",
    [
        ("act_fn", "gelu"),
        ("down_block_types", ["DownEncoderBlock2D"] * 3 + ["AttnDownEncoderBlock2D"]),
        ("up_block_types", ["UpDecoderBlock2D"] * 3),
        ("latents_mean", [0.0, 0.1, 0.2, 0.3]),
        ("latents_std", [1.0, 1.1, 1.2, 1.3]),
        ("a_field_of_the_future", None),
    ],
)
def test_what_is_not_implemented_is_refused_by_name(field, value):
    with pytest.raises(LDMError, match=field):
        VAEConfig.from_json({**PUBLISHED["runwayml/stable-diffusion-v1-5"], field: value})
