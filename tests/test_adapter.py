"""T2I-Adapters equal diffusers': every feature map, the UNet that they are added in, whole runs of its pipeline.

Then what diffusers has no class for, written out here: adapters beside ControlNets, several of each; and the sentences.
"""

import inspect
from functools import cache

import numpy as np
import pytest
import torch
from diffusers import (
    MultiAdapter,
    StableDiffusionAdapterPipeline,
    StableDiffusionXLAdapterPipeline,
    T2IAdapter,
    UNet2DConditionModel,
)
from PIL import Image
from reference import DTYPES, assert_close, keys_and_shapes, normal, randomise, same
from test_controlnet import SDXL, base
from test_pipeline import OF_RATIO, equal, generators, landed, quiet, scheduler_like
from tiny_pairs import OTHERS, PROMPT, controlnets, with_scheduler
from tiny_tasks import noise_of_float32, picture

from ldm.control import Control, Seen, adapted, all_together, controller, lead
from ldm.errors import LDMError
from ldm.guidance import Told, conditional, halves_together
from ldm.io.folders import find_weights, read_json
from ldm.io.weights import blank, load_weights
from ldm.models.adapter import Adapter, AdapterConfig, check_levels
from ldm.models.unet import Extras, Residuals, UNet, UNetConfig
from ldm.schedules import Level

F32, F64 = torch.float32, torch.float64
DOWN, CROSS_DOWN, UP, CROSS_UP = "DownBlock2D", "CrossAttnDownBlock2D", "UpBlock2D", "CrossAttnUpBlock2D"
BATCH, TOKENS, WIDTH = 3, 7, 20
LEVEL = Level(3, 481.0, 0.8, 0.6)

# Widths differ from level to level, so that a mix-up of levels shows.
TINY = {
    "full": {"channels": [8, 16, 24, 32]},
    "full, grey": {"in_channels": 1, "channels": [8, 16, 24], "num_res_blocks": 1},
    "full, equal widths": {"channels": [8, 8, 16], "num_res_blocks": 3, "downscale_factor": 4},
    "light": {"channels": [8, 16, 24], "num_res_blocks": 3, "adapter_type": "light_adapter"},
    "light, grey": {"in_channels": 1, "channels": [8, 12], "num_res_blocks": 1, "adapter_type": "light_adapter"},
    "xl": {"channels": [8, 16, 24, 24], "downscale_factor": 16, "adapter_type": "full_adapter_xl"},
    "xl, two levels": {"channels": [8, 16], "num_res_blocks": 1, "adapter_type": "full_adapter_xl"},
}
PUBLISHED = {  # of the kinds that TencentARC published
    "t2iadapter_canny_sd14v1": {"in_channels": 1},
    "t2iadapter_depth_sd15v2": {},
    "t2iadapter_color_sd14v1": {"channels": [320, 640, 1280], "num_res_blocks": 4, "adapter_type": "light_adapter"},
    "t2i-adapter-canny-sdxl-1.0": {"downscale_factor": 16, "adapter_type": "full_adapter_xl"},
}


@cache
def pair(name, dtype=F64):
    """The reference, every parameter drawn, and ours with the same parameters."""
    reference = randomise(T2IAdapter(**TINY[name])).to(dtype).eval()
    return reference, same(lambda: Adapter(AdapterConfig.from_json(TINY[name])), reference)


def shown(name, dtype, size):
    config = AdapterConfig.from_json(TINY[name])
    sides = (config.downscale_factor * side for side in size)
    return normal(5, BATCH, config.in_channels, *sides, dtype=dtype).sigmoid()


def all_close(ours, theirs, atol):
    assert len(ours) == len(theirs) > 1
    return max(assert_close(a, b, atol) for a, b in zip(ours, theirs, strict=True))


# ----------------------------------------------------------------------------------------------------------- the model


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", TINY)
@torch.no_grad()
def test_every_feature_map_equals_diffusers(name, dtype):
    reference, adapter = pair(name, dtype)
    seen = shown(name, dtype, (9, 5))
    all_close(adapter.condition(seen), reference(seen), DTYPES[dtype])


@pytest.mark.parametrize("size", [(1, 1), (2, 7), (8, 12)])
@pytest.mark.parametrize("name", TINY)
@torch.no_grad()
def test_its_configuration_says_how_wide_and_how_large_every_map_is(name, size):
    """Of odd sizes the half is rounded up."""
    reference, adapter = pair(name)
    seen = shown(name, F64, size)
    features = adapter.condition(seen)
    all_close(features, reference(seen), 1e-11)
    expected = [(c, *(-(-side // p) for side in seen.shape[2:])) for c, p in adapter.config.features]
    assert [tuple(each.shape[1:]) for each in features] == expected


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configurations_give_diffusers_keys_and_shapes(name):
    with torch.device("meta"):
        reference, ours = T2IAdapter(**PUBLISHED[name]), Adapter(AdapterConfig.from_json(PUBLISHED[name]))
    assert keys_and_shapes(ours) == keys_and_shapes(reference)
    fields = {key: value for key, value in reference.config.items() if not key.startswith("_")}
    written = AdapterConfig.from_json(PUBLISHED[name]).to_json()
    assert written.pop("_class_name") == "T2IAdapter"
    assert {key: list(v) if isinstance(v, tuple) else v for key, v in written.items()} == fields
    assert AdapterConfig.from_json(written | {"_diffusers_version": "0.18.0"}).to_json().items() > written.items()


REFUSED = {
    "another type": ({"adapter_type": "fuller_adapter"}, "is a 'fuller_adapter'; ldm knows full_adapter, light_"),
    "no level": ({"channels": []}, "channels name no level"),
    "an unknown field": ({"camera": "front"}, "of the adapter has a field that ldm doesn't know: 'camera'"),
    "xl that widens": (PUBLISHED["t2i-adapter-canny-sdxl-1.0"] | {"channels": [8, 16, 24, 32]}, "has one width, but"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_not_implemented_is_refused_by_name(what):
    fields, said = REFUSED[what]
    with pytest.raises(LDMError, match=said) as caught:
        AdapterConfig.from_json(fields)
    assert "\n" not in str(caught.value)


# ------------------------------------------------------------------------------------------------- inside the UNet

UNETS = {
    "sd1": {
        "block_out_channels": [8, 16, 24, 32],
        "down_block_types": [CROSS_DOWN, CROSS_DOWN, CROSS_DOWN, DOWN],
        "up_block_types": [UP, CROSS_UP, CROSS_UP, CROSS_UP],
        "attention_head_dim": 4,
    },
    "sdxl": {
        "block_out_channels": [8, 16, 24],
        "down_block_types": [DOWN, CROSS_DOWN, CROSS_DOWN],
        "up_block_types": [CROSS_UP, CROSS_UP, UP],
        "attention_head_dim": [2, 4, 3],
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 6,
        "projection_class_embeddings_input_dim": 6 * 6 + 10,
    },
    "cross last": {
        "block_out_channels": [8, 16, 24],
        "down_block_types": [CROSS_DOWN, DOWN, CROSS_DOWN],
        "up_block_types": [CROSS_UP, UP, CROSS_UP],
        "attention_head_dim": 4,
    },
}
ADDED = [("sd1", 4, "full"), ("sd1", 3, None), ("sd1", 5, None), ("sdxl", 4, "xl"), ("sdxl", 2, None)]
ADDED += [("cross last", 3, None), ("cross last", 4, None), ("cross last", 1, None)]


@cache
def unets(name):
    fields = {**UNETS[name], "layers_per_block": 2, "norm_num_groups": 4, "cross_attention_dim": WIDTH}
    reference = randomise(UNet2DConditionModel(**fields), seed=8).double().eval()
    return reference, same(lambda: UNet(UNetConfig.from_json(fields)), reference)


def inputs(name, size):
    x, context = normal(1, BATCH, 4, *size, dtype=F64), normal(2, BATCH, TOKENS, WIDTH, dtype=F64)
    if name != "sdxl":
        return x, context, Extras()
    ids = torch.tensor([[1024, 768, 0, 16, 512, 640], [72, 40, 8, 0, 40, 72], [1, 2, 3, 4, 5, 6]], dtype=F64)
    return x, context, Extras(pooled=normal(3, BATCH, 10, dtype=F64), time_ids=ids)


def run_reference(reference, x, context, extras, features, skips=None, middle=None):
    added = {"text_embeds": extras.pooled, "time_ids": extras.time_ids} if extras.pooled is not None else None
    return reference(
        x, 481.0, context, added_cond_kwargs=added,
        down_intrablock_additional_residuals=[each.clone() for each in features],  # it empties the list
        down_block_additional_residuals=skips, mid_block_additional_residual=middle,
    ).sample  # fmt: skip


def places(unet, size):
    """The shapes of an adapter's maps by the method's own words: each level's output, and the middle's."""
    config, shapes = unet.config, []
    for k, width in enumerate(config.block_out_channels):
        half = tuple(-(-side // 2) for side in size)
        last = k + 1 == len(config.block_out_channels)
        shapes.append((BATCH, width, *(half if config.down_block_types[k] == DOWN and not last else size)))
        size = size if last else half
    return [*shapes, shapes[-1]]


@pytest.mark.parametrize("controlnet", [False, True])
@pytest.mark.parametrize("size", [(16, 8), (9, 14)])
@pytest.mark.parametrize("name, count, adapter", ADDED)
@torch.no_grad()
def test_features_are_added_where_diffusers_adds_them(name, count, adapter, size, controlnet):
    """Of drawn adapters and drawn numbers, for some levels and for all, the middle too; beside a ControlNet's."""
    reference, unet = unets(name)
    x, context, extras = inputs(name, size)
    features = [normal(50 + k, *shape, dtype=F64) for k, shape in enumerate(places(unet, size)[:count])]
    if adapter is not None and (adapter != "xl" or size[0] % 2 == 0):
        pixels = normal(5, BATCH, 3, *(8 * side for side in size), dtype=F64).sigmoid()
        features = pair(adapter)[1].condition(pixels)
    h, skips = unet.encode(unet.conv_in(x), unet.embed(torch.tensor([481.0] * BATCH), extras), context)
    more = [normal(10 + i, *skip.shape, dtype=F64) for i, skip in enumerate(skips)] if controlnet else None
    middle = normal(9, *h.shape, dtype=F64) if controlnet else None
    theirs = run_reference(reference, x, context, extras, features, more, middle)
    ours = unet(x, 481.0, context, extras, Residuals(more, middle, features))
    assert_close(ours, theirs, 1e-11)
    for k in range(count):  # each of them counts
        fewer = [each * (i != k) for i, each in enumerate(features)]
        assert (unet(x, 481.0, context, extras, Residuals(more, middle, fewer)) - ours).abs().mean() > 1e-3


@torch.no_grad()
def test_what_is_kept_for_the_way_up_is_moved_by_the_features_themselves():
    """A level with attention keeps its last layer's output moved; one without it, what is behind its downsampling."""
    for name, kept in (("sd1", 2), ("sdxl", 3)):  # of conv_in, two layers, a downsampling
        unet = unets(name)[1]
        x, context, extras = inputs(name, (16, 8))
        emb = unet.embed(torch.tensor([481.0] * BATCH), extras)
        feature = normal(50, *places(unet, (16, 8))[0], dtype=F64)
        _, plain = unet.encode(unet.conv_in(x), emb, context)
        _, moved = unet.encode(unet.conv_in(x), emb, context, [feature])
        assert all(torch.equal(a, b) for a, b in zip(moved[:kept], plain[:kept], strict=True))
        assert_close(moved[kept] - plain[kept], feature, 1e-12)
        assert all((a - b).abs().mean() > 1e-3 for a, b in zip(moved[kept + 1 :], plain[kept + 1 :], strict=True))


@torch.no_grad()
def test_more_features_than_levels_are_not_passed_over():
    unet = unets("cross last")[1]
    x, context, _ = inputs("cross last", (8, 8))
    shapes = places(unet, (8, 8))
    features = [normal(50 + k, *shape, dtype=F64) for k, shape in enumerate([*shapes, shapes[-1]])]
    assert unet(x, 481.0, context, residuals=Residuals(levels=features[:-1])).isfinite().all()
    with pytest.raises(ValueError):
        unet(x, 481.0, context, residuals=Residuals(levels=features))
    plain = unet(x, 481.0, context)
    assert torch.equal(unet(x, 481.0, context, residuals=Residuals()), plain)


# ------------------------------------------------------------------------------------------------- whole runs

SIZE = {"width": 48, "height": 32}
PROMPTS, NEGATIVE = [PROMPT, OTHERS[0]], ["fog", "a dog at dusk"]
TWO = {"prompt": PROMPTS, "negative": NEGATIVE, "guidance": 4.0}
EDGES = [picture(31, 50, 37), picture(32, 50, 37)]
SMALL = {"width": 40, "height": 24, "steps": 3, "seed": 3}
PICTURE = picture(33, 40, 24)
LED = {  # what leads: for each adapter (its number, its options); of two, the second sees the other pictures
    "one": [(4, {})],
    "half": [(4, {"scale": 0.5})],
    "grey": [(6, {"scale": -0.75})],
    "two": [(4, {"scale": 0.75}), (5, {"scale": 1.5})],
    "two alike": [(4, {"scale": 0.5}), (4, {"scale": 0.25})],
}
XL = {"channels": [8, 16, 24, 24], "adapter_type": "full_adapter_xl", "downscale_factor": 16}
LED_XL = {
    "xl": [(7, {"scale": 0.75})],
    "xl, the first half": [(7, {"end": 0.5})],
    "xl, grey": [(8, {"scale": 1.5, "end": 0.75})],
    "xl, two": [(7, {"scale": 0.5, "end": 0.75}), (9, {"scale": -1.25, "end": 0.75})],
}
FIELDS = {5: {"num_res_blocks": 3}, 6: {"in_channels": 1}, 7: XL, 8: XL | {"in_channels": 1}, 9: XL}


def adapters(models, seed=4, dtype=F32):
    """The reference's adapter, and ours, from one folder that diffusers wrote: every parameter drawn."""
    folder = models.root / f"adapter-{seed}"  # tiny models of all families have the same widths
    if not folder.exists():
        fields = {"channels": [8, 16, 24], "num_res_blocks": 2} | FIELDS.get(seed, {})
        randomise(T2IAdapter(**fields), seed).save_pretrained(folder)
    key = (folder, dtype)
    if key not in models.loaded:
        with blank():
            ours = Adapter(AdapterConfig.from_json(read_json(folder / "config.json")))
        load_weights(ours, find_weights(folder, "diffusion_pytorch_model"), dtype)
        models.loaded[key] = T2IAdapter.from_pretrained(folder, torch_dtype=dtype).eval(), ours
    return models.loaded[key]


def run_diffusers(base, adapter, seen, told, scheduler, n, request):
    """The latents behind every step, in the model's coordinates; `request` holds our options."""
    xl = "text_encoder_2" in base.components
    cls = StableDiffusionXLAdapterPipeline if xl else StableDiffusionAdapterPipeline
    parts = {key: part for key, part in base.components.items() if key in inspect.signature(cls).parameters}
    parts |= {"scheduler": scheduler, "adapter": adapter} | ({} if xl else {"requires_safety_checker": False})
    pipe = cls(**parts)
    pipe.set_progress_bar_config(disable=True)
    names = {"negative": "negative_prompt", "guidance": "guidance_scale", "count": "num_images_per_prompt"}
    request = {names.get(key, key): value for key, value in request.items()}
    found, count = [], len(request["prompt"]) * request.get("num_images_per_prompt", 1)
    with noise_of_float32(pipe):
        pipe(
            **{**SIZE, **request},
            **told,
            image=seen,
            num_inference_steps=n,
            generator=generators(count),
            output_type="latent",
            callback=lambda i, t, latents: found.append(latents),
        )
    if type(scheduler).__name__.startswith(OF_RATIO):
        found = [x / (sigma**2 + 1) ** 0.5 for x, sigma in zip(found, landed(scheduler, n), strict=True)]
    return found


def run_ours(pipe, n, request):
    return [step.x for step in pipe.steps(**{**SIZE, "seed": 5, "steps": n, "compat": True, **request})]


def led_by(models, name, led, dtype):
    """Our controls; diffusers' adapter, what it sees and what it's told. There a user makes pictures grey."""
    wanted = (LED | LED_XL)[led]
    pairs = [adapters(models, seed, dtype) for seed, _ in wanted]
    ours = [
        Control(net, pictures, **options)
        for (_, net), (_, options), pictures in zip(pairs, wanted, (EDGES, EDGES[::-1]), strict=False)
    ]
    told = {"adapter_conditioning_factor": ours[0].end} if name == "sdxl" else {}
    grey = ours[0].channels == 1
    seen = [[each.resize((48, 32), Image.Resampling.LANCZOS) for each in control.picture] for control in ours]
    seen = [[each.convert("L") if grey else each for each in pictures] for pictures in seen]
    if len(ours) == 1:
        return ours, pairs[0][0], seen[0], told | {"adapter_conditioning_scale": ours[0].scale}
    scales = [control.scale for control in ours]
    return ours, MultiAdapter([net for net, _ in pairs]), seen, told | {"adapter_conditioning_scale": scales}


def check(models, name, led, sampler, n, dtype, request):
    """Both runs compared, and ours with one that nothing leads."""
    scheduler, extra = scheduler_like(sampler, "sd1" if name == "sdxl" else name, "leading", n, dtype)
    ours, adapter, seen, told = led_by(models, name, led, dtype)
    with quiet():
        theirs = run_diffusers(models.reference(name, dtype), adapter, seen, told, scheduler, n, {**request, **extra})
    pipe = with_scheduler(models.ours(name, dtype), scheduler)
    found = run_ours(pipe, n, {**request, **extra, "control": ours})
    equal(found, theirs, {F32: 1e-5, F64: 1e-12}[dtype])
    without = run_ours(pipe, n, {**request, **extra})
    assert (found[-1] - without[-1]).abs().max() > 1e-3 * found[-1].abs().max(), "the adapter changed nothing"


@pytest.mark.parametrize("led", LED)
@pytest.mark.parametrize("name", ["sd1", "sd2"])
def test_every_way_of_leading_equals_diffusers_in_float64(models, name, led):
    check(models, name, led, "ddim", 4, F64, TWO)


@pytest.mark.parametrize("sampler", ["ddim eta=0.6", "euler", "dpm++2m", "unipc2"])
def test_samplers_led_by_two_adapters_equal_diffusers_in_float64(models, sampler):
    check(models, "sd1", "two", sampler, 5, F64, TWO)


@pytest.mark.parametrize("led", ["one", "two"])
def test_without_guidance_equal_diffusers_in_float64(models, led):
    check(models, "sd2", led, "dpm++2m", 4, F64, {"prompt": PROMPTS, "guidance": 1.0})


@pytest.mark.parametrize("led", ["half", "grey", "two"])
def test_in_float32_equal_diffusers(models, led):
    check(models, "sd1", led, "ddim", 4, F32, {**TWO, "guidance": 2.0})


@pytest.mark.parametrize("sampler", ["ddim", "euler", "dpm++2m"])
@pytest.mark.parametrize("led", LED_XL)
def test_sdxl_led_by_its_adapters_equals_diffusers_in_float64(models, led, sampler):
    """Its first level has no attention, and the fourth feature map goes behind the middle block."""
    check(models, "sdxl", led, sampler, 4, F64, TWO)


def test_sdxl_without_guidance_and_in_float32_equals_diffusers(models):
    check(models, "sdxl", "xl", "ddim", 3, F64, {"prompt": PROMPTS, "guidance": 1.0})
    check(models, "sdxl", "xl, two", "ddim", 4, F32, {**TWO, "guidance": 2.0})


def test_defect_two_pictures_of_each_prompt_get_each_other_s_conditions(models):
    """diffusers repeats conditions as a, b, a, b and prompts as a, a, b, b; one picture for two prompts it can't take.

    Ours is one a picture drawn, or one for all.
    """
    scheduler, _ = scheduler_like("ddim", "sd1", "leading", 3, F64)
    reference, net = adapters(models, 4, F64)
    pipe, base, request = with_scheduler(models.ours("sd1", F64), scheduler), models.reference("sd1", F64), {**TWO}
    request["count"] = 2
    a, b = EDGES
    with quiet():
        theirs = run_diffusers(base, reference, EDGES, {}, scheduler, 3, request)
        with pytest.raises(RuntimeError, match="size of tensor"):
            run_diffusers(base, reference, EDGES[:1], {}, scheduler, 3, TWO)
    equal(run_ours(pipe, 3, {**request, "control": Control(net, [a, b, a, b])}), theirs, 1e-12)
    right = run_ours(pipe, 3, {**request, "control": Control(net, [a, a, b, b])})[-1]
    assert (right - theirs[-1]).abs().max() > 1e-2 * right.abs().max()
    one, each = (run_ours(pipe, 3, {**TWO, "control": Control(net, given)})[-1] for given in (a, [a, a]))
    assert_close(one, each, 1e-12 * each.abs().max().item())


@torch.no_grad()
@pytest.mark.parametrize("together", [True, False])
def test_two_adapters_and_a_controlnet_that_guesses_equal_a_loop_written_out(models, together):
    """diffusers has no pipeline for it: its UNet is told of both; one adapter is run in the first half alone."""
    base, pipe = models.reference("sd1", F64), models.ours("sd1", F64)
    (first, our_first), (second, our_second) = (adapters(models, seed, F64) for seed in (4, 6))
    guess, our_guess = controlnets(models, "sd1", 5, F64)
    edges = [normal(60 + k, 1, c, 32, 48).sigmoid() for k, c in enumerate((3, 1, 3))]
    control = [
        Control(our_first, edges[0], 0.7),
        Control(our_guess, edges[2], 0.9, guess=True),
        Control(our_second, edges[1], 1.2, end=0.5),
    ]
    run = pipe.prepare(**TWO, **SIZE, control=control, sampler="ddim", steps=4, seed=5, together=together)
    cond, uncond = base.encode_prompt(PROMPTS, "cpu", 1, True, NEGATIVE)
    x = torch.cat([torch.randn(1, 4, 4, 6, generator=g) for g in generators(2)]).double()
    levels = run.schedule.levels
    for step, level, after in zip(run.steps(), levels, levels[1:], strict=False):
        scales = (0.7, 1.2 * (level.i < 2))
        maps = [
            [s * each for each in net(e.double())] for net, e, s in zip((first, second), edges, scales, strict=False)
        ]
        features = [(a + b).expand(4, -1, -1, -1) for a, b in zip(*maps, strict=True)]
        with quiet():
            told = {"conditioning_scale": 0.9, "guess_mode": True, "return_dict": False}
            down, middle = guess(x, level.t, cond, edges[2].double().expand(2, -1, -1, -1), **told)
        skips = [torch.cat([torch.zeros_like(each), each]) for each in down]
        out = base.unet(
            torch.cat([x, x]), level.t, torch.cat([uncond, cond]),
            down_intrablock_additional_residuals=[each.clone() for each in features],
            down_block_additional_residuals=skips,
            mid_block_additional_residual=torch.cat([torch.zeros_like(middle), middle]),
        ).sample  # fmt: skip
        without, given = out.chunk(2)
        eps = without + 4.0 * (given - without)
        x = after.alpha * (x - level.sigma * eps) / level.alpha + after.sigma * eps
        assert_close(step.x, x, 1e-11 * x.abs().max().item())
    assert step.i == 3


# ------------------------------------------------------------------------------------------------- the closures


@torch.no_grad()
def test_adapters_and_controlnets_are_the_sum_of_what_each_adds(models):
    """One adapter has fewer levels than the other; where nothing is run, nothing is added."""
    unet, x = models.ours("sd1", F64).unet, normal(1, 2, 4, 3, 5, dtype=F64)
    context, pixels = normal(2, 2, TOKENS, 24, dtype=F64), normal(10, 1, 3, 24, 40).double().sigmoid()
    maps, net = adapters(models, 4, F64)[1].condition(pixels), controlnets(models, "sd1", 4, F64)[1]
    a, b = adapted(maps, 0.5), adapted(maps[:2], -2.0, frozenset({3}))
    led = controller(net, context, net.condition(pixels), 0.8)
    skips, middle, levels = all_together([b, led, a])(x, LEVEL)
    alone = led(x, LEVEL)
    assert all(torch.equal(s, t) for s, t in zip([*skips, middle], [*alone[0], alone[1]], strict=True))
    for found, share, each in zip(levels, (-1.5, -1.5, 0.5), maps, strict=True):
        assert_close(found, share * each, 1e-12)
    skips, middle, levels = all_together([a, b])(x, LEVEL._replace(i=4))
    assert skips is None and middle is None and len(levels) == 3
    assert_close(levels[0], 0.5 * maps[0], 1e-12)
    assert all_together([b])(x, LEVEL._replace(i=4)) is None
    assert not all_together([led, b])(x, LEVEL._replace(i=4)).levels
    out = conditional(unet, context, controller=all_together([a]))(x, LEVEL).out
    assert_close(out, unet(x, LEVEL.t, context, residuals=Residuals(levels=[0.5 * each for each in maps])), 1e-12)


@torch.no_grad()
def test_each_part_of_guidance_is_led_and_each_picture_by_its_own(models):
    unet, net = models.ours("sd1", F64).unet, adapters(models, 4, F64)[1]
    x, pixels = normal(1, 2, 4, 3, 5, dtype=F64), normal(10, 2, 3, 24, 40).double().sigmoid()
    contexts = [normal(20 + k, 2, TOKENS, 24, dtype=F64) for k in range(3)]
    seen = [Seen(Control(net, pixels, 0.7), net.condition(pixels), frozenset({3}))]
    told = [Told(context) for context in contexts]
    parts = halves_together(conditional(unet, torch.cat(contexts), controller=lead(seen, told)), 3)(x, LEVEL)
    for k, context in enumerate(contexts):
        for j in range(2):
            features = [0.7 * each for each in net.condition(pixels[j : j + 1])]
            alone = unet(x[j : j + 1], LEVEL.t, context[j : j + 1], residuals=Residuals(levels=features))
            assert_close(parts[k][j : j + 1], alone, 1e-11)
    assert lead(seen, told[:1], last=False)(x, LEVEL) is not None  # the halves apart: both are led
    assert lead(seen, told)(x, LEVEL._replace(i=2)) is None


def test_the_picture_is_read_once_and_a_share_of_the_steps_is_led(models):
    """Each step is, bit for bit, that of a run that is led throughout or not at all, from the same latent."""
    pipe, net, reads = models.ours("sd1"), adapters(models)[1], []
    handle = net.adapter["conv_in"].register_forward_hook(lambda module, args, out: reads.append(len(out)))
    options = {**SMALL, "steps": 5, "sampler": "ddim", "guidance": 4.0}

    def prepared(**more):
        return pipe.prepare(PROMPT, **options, control=[Control(net, PICTURE, **more)])

    run, always, never = prepared(start=0.2, end=0.6), prepared(), pipe.prepare(PROMPT, **options)
    apart = 0
    for step in run.steps():
        led, plain = always.denoise(step.x_before, step.level).eps, never.denoise(step.x_before, step.level).eps
        assert torch.equal(step.eps, led if step.i in (1, 2) else plain)
        apart += (led - plain).abs().mean() > 0.01
    handle.remove()
    assert apart == 5 and reads == [1, 1]
    assert torch.equal(pipe(PROMPT, **options, control=Control(net, PICTURE, 0.0)).x0, pipe(PROMPT, **options).x0)


def test_a_share_of_the_steps_is_what_diffusers_calls_a_factor(models):
    """`i < int(n * factor)`; where n * factor should be whole and rounding makes it less, diffusers drops a step."""
    net, cut = adapters(models)[1], 0
    for n in range(1, 101):
        for factor in (k / 100 for k in range(1, 101)):
            if int(n * factor) < 1:
                continue
            theirs = {i for i in range(n) if i < int(n * factor)}
            ours = Control(net, PICTURE, end=factor).rows(0, n) - {n}
            exact = set(range(n * round(100 * factor) // 100))
            assert ours == exact and ours - theirs in (set(), {len(theirs)})
            cut += ours != theirs
    assert 0 < cut < 30


def test_a_grey_adapter_sees_grey(models, tmp_path):
    net = adapters(models, 6)[1]
    grey = PICTURE.convert("L")
    grey.save(tmp_path / "edges.png")
    expected = torch.from_numpy(np.array(grey))[None, None].float() / 255
    for given in (PICTURE, grey, tmp_path / "edges.png", np.asarray(grey), expected, [PICTURE]):
        assert torch.equal(Control(net, given).pictures(40, 24, 1), expected)
    assert Control(net, [PICTURE, grey]).pictures(40, 24, 2).shape == (2, 1, 24, 40)
    assert Control(adapters(models)[1], grey).pictures(40, 24, 1).shape == (1, 3, 24, 40)
    assert expected.std() > 0.1


def test_another_dtype_than_the_model_s_is_cast_once_more(models):
    """An adapter in float32 beside a model in float64: its features are rounded, and nothing else is."""
    pipe = models.ours("sd1", F64)
    ours, exact = (adapters(models, 4, dtype)[1] for dtype in (F32, F64))
    found, wanted = (pipe(PROMPT, **SMALL, control=Control(net, PICTURE)).x0 for net in (ours, exact))
    assert_close(found, wanted, 1e-4 * wanted.abs().max().item())
    assert found.dtype == F64 and not torch.equal(found, wanted)


# ------------------------------------------------------------------------------------------------- sentences


def tensor(*shape):
    return torch.full(shape, 0.5)


CONTROLS = {  # what Control is given, of an adapter that looks at colours and one that looks at grey
    "guess": (lambda net, grey: Control(net, PICTURE, guess=True), "^An adapter knows no guess mode"),
    "scale": (lambda net, grey: Control(net, PICTURE, float("nan")), "^The scale of an adapter must be a finite"),
    "share": (lambda net, grey: Control(net, PICTURE, end=0.0), r"^An adapter runs .* <= 1: not from 0.0 to 0.0"),
    "a grey tensor": (lambda net, grey: Control(net, tensor(1, 1, 24, 40)), r"adapter has .* \(B or 1, 3, H, W\)"),
    "a coloured tensor": (lambda net, grey: Control(grey, tensor(1, 3, 24, 40)), r"shape \(1, 3,.* \(B or 1, 1, H, W"),
    "an unbatched one": (lambda net, grey: Control(grey, tensor(1, 24, 40)), r"shape \(1, 24, 40\); \(B or 1, 1, H"),
    "diffusers' own": (lambda net, grey: Control(T2IAdapter(channels=[8]), PICTURE), "type T2IAdapter: .ldm.load"),
}  # fmt: skip


@pytest.mark.parametrize("what", CONTROLS)
def test_a_control_that_cannot_be_gets_a_sentence(models, what):
    make, said = CONTROLS[what]
    with pytest.raises(LDMError, match=said) as caught:
        make(adapters(models)[1], adapters(models, 6)[1])
    assert "\n" not in str(caught.value)


def test_a_run_that_cannot_be_gets_a_sentence_before_a_step_is_taken(models, capsys):
    pipe, net = models.ours("sd1"), adapters(models)[1]
    other = Adapter(AdapterConfig.from_json(TINY["light"]))
    with pytest.raises(LDMError, match=r"^The adapter was made for another base than this model: a light_adapter"):
        pipe.prepare(PROMPT, **SMALL, control=Control(other, PICTURE))
    with pytest.raises(LDMError, match=r"^The adapter 2 of 2 was made for another base .*24/32, 24/64; .*24/32, 24/32"):
        pipe.prepare(PROMPT, **SMALL, control=[Control(net, PICTURE), Control(other, PICTURE)])
    with pytest.raises(LDMError, match=r"shape \(1, 3, 24, 40\); \(1 or 1, 3, 32, 40\) is needed"):
        pipe.prepare(PROMPT, width=40, height=32, steps=3, control=Control(net, tensor(1, 3, 24, 40)))
    with pytest.raises(LDMError, match=r"^The picture of an adapter has 40x24 pixels, and 40x40 are to be drawn"):
        pipe.prepare(PROMPT, width=40, height=40, steps=3, control=Control(net, PICTURE))
    with pytest.raises(LDMError, match="Tiles and ControlNets don't go together"):
        pipe.prepare(PROMPT, **SMALL, control=Control(net, PICTURE), tile=64)
    capsys.readouterr()
    assert Control(net, PICTURE, start=0.4, end=0.5).rows(2, 6) == frozenset()
    assert capsys.readouterr().err == "No step of 4 lies within 0.4 to 0.5: an adapter is not run.\n"


def test_an_sdxl_adapter_reads_multiples_of_16():
    net = Adapter(AdapterConfig.from_json(TINY["xl"]))
    for w, h, near in ((40, 24, "32x16"), (40, 32, "32x32"), (48, 8, "48x16")):
        for given in (picture(33, w, h), tensor(1, 3, h, w)):
            with pytest.raises(LDMError, match=rf"^This adapter reads .* multiples of 16, not {w}x{h}: draw {near}\.$"):
                Control(net, given).pictures(w, h, 1)
    assert Control(net, tensor(1, 3, 32, 48)).pictures(48, 32, 1).shape == (1, 3, 32, 48)


SD1, SD2 = "runwayml/stable-diffusion-v1-5", "stabilityai/stable-diffusion-2-1"
CANNY, COLOR, XL_CANNY = "t2iadapter_canny_sd14v1", "t2iadapter_color_sd14v1", "t2i-adapter-canny-sdxl-1.0"


@pytest.mark.parametrize("net, model", [(CANNY, SD1), (COLOR, SD1), (CANNY, SD2), (XL_CANNY, SDXL)])
def test_its_own_base_is_accepted(net, model):
    check_levels(AdapterConfig.from_json(PUBLISHED[net]), *base(model))


@pytest.mark.parametrize(
    "net, model, said",
    [
        (CANNY, SDXL, r"fits Stable Diffusion 1 or 2 .*: 320/8, .* adds 320/16, 640/16, 1280/32, 1280/32\)\.$"),
        (COLOR, SDXL, "a light_adapter mostly fits Stable Diffusion 1 or 2 "),
        (XL_CANNY, SD1, r"fits SDXL .*: 320/16, 640/16, 1280/32, 1280/32; .* adds 320/8, 640/16, 1280/32, 1280/64"),
    ],
)
def test_another_base_is_caught_from_the_shapes(net, model, said):
    with pytest.raises(LDMError, match=f"^My adapter was made for another base than this model: .*{said}"):
        check_levels(AdapterConfig.from_json(PUBLISHED[net]), *base(model), "My adapter")


def test_an_adapter_for_other_than_pictures_is_refused():
    with pytest.raises(
        LDMError, match=r"^The adapter looks at 4 channels; ldm shows it pictures, which have 1 or 3\.$"
    ):
        check_levels(AdapterConfig.from_json({"in_channels": 4}), *base(SD1))
