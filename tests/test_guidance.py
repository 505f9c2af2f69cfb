"""Guidance equals what diffusers' pipelines do with its UNet, in one batch or in several runs.

What diffusers' package lacks (prompts composed, Perp-Neg, the interval) is held to closed forms and properties.
"""

import math

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg
from reference import assert_close, normal, randomise, same

from ldm.diffusion import PREDICTIONS, add_noise, target
from ldm.errors import LDMError
from ldm.guidance import (
    Output,
    all_of,
    classifier_free,
    conditional,
    denoiser,
    halves_apart,
    halves_together,
    perpendicular,
    perpendicular_negative,
    rescaled,
    within,
)
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


# ------------------------------------------------------------------------------------ the UNet, counted


def counted(**more):
    """Our UNet, and a list that grows by the size of the batch whenever it runs."""
    unet, runs = pair(**more)[1], []
    unet.register_forward_hook(lambda module, args, out: runs.append(len(out)))
    return unet, runs


def contexts(n):
    return [normal(20 + i, 3, 7, 12).double() for i in range(n)]


GUIDED = {  # name -> (a guidance of three pictures, of how many parts)
    "classifier_free": (lambda halves: classifier_free(halves, 4.0), 2),
    "rescaled": (lambda halves: rescaled(halves, 4.0, 0.7), 2),
    "all_of": (lambda halves: all_of(halves, [3.0, 2.0, -1.5]), 4),
    "perpendicular_negative": (lambda halves: perpendicular_negative(halves, 4.0, 1.5), 3),
}


@pytest.mark.parametrize("name", GUIDED)
@torch.no_grad()
def test_together_is_one_run_apart_is_one_for_each_part_and_both_say_the_same(name):
    make, n = GUIDED[name]
    unet, runs = counted()
    x, parts = inputs()[0], contexts(n)
    together = make(halves_together(conditional(unet, torch.cat(parts)), n))(x, LEVEL)
    assert runs == [3 * n]
    apart = make(halves_apart(*(conditional(unet, part) for part in parts)))(x, LEVEL)
    assert runs == [3 * n] + [3] * n
    for a, b in zip(together, apart, strict=True):
        assert_close(a, b, 1e-11)
    assert_close(apart.uncond, conditional(unet, parts[0])(x, LEVEL).out, 1e-11)
    assert_close(apart.cond, conditional(unet, parts[1])(x, LEVEL).out, 1e-11)
    assert (apart.out - apart.cond).abs().mean() > 0.1


@torch.no_grad()
def test_off_is_exactly_one_evaluation():
    unet, runs = counted()
    out, cond, uncond = conditional(unet, contexts(1)[0])(inputs()[0], LEVEL)
    assert runs == [3] and cond is None and uncond is None
    assert out.abs().mean() > 0.1


# ------------------------------------------------------------------------------------ outputs chosen by hand


def parts_of(*shape, n=3, dtype=torch.float64):
    """`n` outputs of three pictures that differ in size and mean."""
    size = torch.tensor([0.3, 1.0, 4.0]).view(-1, 1, 1, 1)
    return [(size * (normal(30 + i, *shape) + 0.2 * i)).to(dtype) for i in range(n)]


def fixed(*parts):
    """The halves that always answer with these."""
    return lambda x, level: parts


X = torch.zeros(3, 4, 10, 6, dtype=torch.float64)  # halves by hand don't look at it
SHAPE = X.shape


@pytest.mark.parametrize("name", GUIDED)
def test_a_picture_does_not_depend_on_its_neighbours(name):
    make, n = GUIDED[name]
    parts = parts_of(*SHAPE, n=n)
    together = make(fixed(*parts))(X, LEVEL)
    for i in range(3):
        alone = make(fixed(*(part[i : i + 1] for part in parts)))(X[i : i + 1], LEVEL)
        for a, b in zip(alone, together, strict=True):
            assert_close(a, b[i : i + 1], 1e-12)


@pytest.mark.parametrize(
    "dtype, tolerance", [(torch.float16, 3e-3), (torch.bfloat16, 3e-2), (torch.float32, 1e-6), (torch.float64, 1e-15)]
)
@pytest.mark.parametrize("name", GUIDED)
def test_every_dtype_keeps_to_itself_and_to_float64(name, dtype, tolerance):
    """On a latent of 128 x 128, whose squares add up to more than float16 holds."""
    make, n = GUIDED[name]
    parts = parts_of(3, 4, 128, 128, n=n, dtype=dtype)
    ours = make(fixed(*parts))(X.to(dtype), LEVEL)
    exact = make(fixed(*(part.double() for part in parts)))(X, LEVEL)
    assert [part.dtype for part in ours] == [dtype] * 3
    assert ((parts[1] - parts[0]).double() ** 2).sum((1, 2, 3)).max() > torch.finfo(torch.float16).max
    for i in range(3):
        size = exact.out[i].abs().max().item()
        assert_close(ours.out[i].double() / size, exact.out[i] / size, tolerance, at_least=0.05)


@pytest.mark.parametrize("rescale", [1.0, 0.7, 0.0])
@pytest.mark.parametrize("scale", [7.5, 1.0, -2.0])
@torch.no_grad()
def test_rescaled_equals_diffusers(scale, rescale):
    """The pipeline's own function, which is told the text half."""
    reference, unet = pair()
    x, cond, uncond = inputs()
    noise_uncond, noise_text = (reference(x, LEVEL.t, context).sample for context in (uncond, cond))
    guided = noise_uncond + scale * (noise_text - noise_uncond)
    ours = rescaled(halves_apart(conditional(unet, uncond), conditional(unet, cond)), scale, rescale)(x, LEVEL)
    assert_close(ours.out, rescale_noise_cfg(guided, noise_text, rescale), 1e-11)
    assert_close(ours.cond, noise_text, 1e-11)
    assert_close(ours.uncond, noise_uncond, 1e-11)
    uncond, cond = parts_of(*SHAPE, n=2)
    ours = rescaled(fixed(uncond, cond), scale, rescale)(X, LEVEL).out
    assert_close(ours, rescale_noise_cfg(uncond + scale * (cond - uncond), cond, rescale), 1e-11)


def test_full_rescale_has_the_spread_of_cond_and_none_is_classifier_free():
    uncond, cond = parts_of(*SHAPE, n=2)
    halves = fixed(uncond, cond)
    spread = [part.std((1, 2, 3)) for part in (cond, classifier_free(halves, 7.5)(X, LEVEL).out)]
    assert (spread[1] > 2 * spread[0]).all()  # there is something to bring back
    full, part, none = (rescaled(halves, 7.5, rescale)(X, LEVEL).out for rescale in (1, 0.25, 0))
    assert_close(full.std((1, 2, 3)), spread[0], 1e-12)
    assert_close(part.std((1, 2, 3)), 0.25 * spread[0] + 0.75 * spread[1], 1e-12)
    assert torch.equal(none, classifier_free(halves, 7.5)(X, LEVEL).out)
    assert_close(rescaled(halves, 1.0, 1)(X, LEVEL).out, cond, 1e-12)  # scale 1 is cond


def test_all_of_is_its_formula_and_with_one_prompt_classifier_free():
    uncond, a, b, c = parts_of(*SHAPE, n=4)
    out = all_of(fixed(uncond, a, b, c), [3.0, 0.5, -2.0])(X, LEVEL)
    assert_close(out.out, -0.5 * uncond + 3.0 * a + 0.5 * b - 2.0 * c, 1e-12)
    assert out.cond is a and out.uncond is uncond
    one = all_of(fixed(uncond, a), [7.5])(X, LEVEL)
    for ours, theirs in zip(one, classifier_free(fixed(uncond, a), 7.5)(X, LEVEL), strict=True):
        assert torch.equal(ours, theirs)
    assert_close(all_of(fixed(uncond, a), [1])(X, LEVEL).out, a, 1e-12)  # scale 1 is cond
    assert_close(all_of(fixed(uncond, a, a), [3, 4.5])(X, LEVEL).out, one.out, 1e-12)  # said twice: added
    assert torch.equal(all_of(fixed(uncond, a, b), [7.5, 0])(X, LEVEL).out, one.out)  # weight 0: unheard


def test_not_goes_as_far_from_a_prompt_as_and_goes_towards_it():
    uncond, a, b = parts_of(*SHAPE)
    alone = all_of(fixed(uncond, a), [3])(X, LEVEL).out
    with_b, without_b = (all_of(fixed(uncond, a, b), [3, w])(X, LEVEL).out - alone for w in (2, -2))
    assert_close(with_b, -without_b, 1e-12)
    assert_close(with_b, 2 * (b - uncond), 1e-12)


def of_two(*numbers):
    """A picture of two numbers, as a vector on paper."""
    return torch.tensor(numbers, dtype=torch.float64).view(1, 1, 1, 2)


def test_perpendicular_negative_on_paper():
    """pos = (2, 0) and neg = (3, 4), of which (0, 4) is perpendicular: (1, 1) + 5 * ((2, 0) - 0.5 * (0, 4))."""
    halves = [of_two(1, 1), of_two(3, 1), of_two(4, 5)]
    out = perpendicular_negative(fixed(*halves), 5.0, 0.5)(X, LEVEL)
    assert torch.equal(out.out, of_two(11, -9))
    assert out.uncond is halves[0] and out.cond is halves[1]
    # pos = (3, 4) of length 5, neg = (5, 0): along pos lies (9, 12) / 5, the rest is (16, -12) / 5.
    halves = [of_two(0, 0), of_two(3, 4), of_two(5, 0)]
    assert_close(perpendicular_negative(fixed(*halves), 1.0)(X, LEVEL).out, of_two(-0.2, 6.4), 1e-14)


def test_the_perpendicular_component_is_orthogonal_and_what_is_missing_is_parallel():
    u, v = parts_of(*SHAPE, n=2)
    perp = perpendicular(v, u)
    for p, a, b in zip(perp.flatten(1), v.flatten(1), u.flatten(1), strict=True):
        assert abs(p @ b) < 1e-12 * a.norm() * b.norm()
        cosine = (a @ b) / (a.norm() * b.norm())
        assert 0.01 < abs(cosine) < 0.9
        assert math.isclose(p.norm(), a.norm() * math.sqrt(1 - cosine**2), rel_tol=1e-12)  # Pythagoras
        torch.testing.assert_close((a - p) / (a - p).norm(), cosine.sign() * b / b.norm(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("times", [0.7, 1.0, -3.0])
def test_a_negative_parallel_to_the_prompt_changes_nothing(times):
    uncond, cond, negative = parts_of(*SHAPE)
    plain = classifier_free(fixed(uncond, cond), 7.5)(X, LEVEL).out
    parallel = uncond + times * (cond - uncond)
    assert_close(perpendicular_negative(fixed(uncond, cond, parallel), 7.5)(X, LEVEL).out, plain, 1e-11)
    with_more = perpendicular_negative(fixed(uncond, cond, negative + parallel - uncond), 7.5)(X, LEVEL).out
    assert_close(with_more, perpendicular_negative(fixed(uncond, cond, negative), 7.5)(X, LEVEL).out, 1e-11)
    assert (with_more - plain).abs().mean() > 0.1


def test_perpendicular_negative_of_weight_0_is_classifier_free_and_of_scale_1_cond_less_the_component():
    uncond, cond, negative = parts_of(*SHAPE)
    halves = fixed(uncond, cond, negative)
    ours = perpendicular_negative(halves, 7.5, 0)(X, LEVEL).out
    assert torch.equal(ours, classifier_free(fixed(uncond, cond), 7.5)(X, LEVEL).out)
    ours = perpendicular_negative(halves, 1.0, 0.5)(X, LEVEL).out
    assert_close(ours, cond - 0.5 * perpendicular(negative - uncond, cond - uncond), 1e-12)
    doubled = perpendicular_negative(halves, 1.0, 1.0)(X, LEVEL).out
    assert_close(doubled - cond, 2 * (ours - cond), 1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_the_empty_prompt_with_a_perpendicular_negative(dtype):
    """pos is 0, and the whole of neg is perpendicular to it: no 0 / 0."""
    uncond, _, negative = parts_of(*SHAPE, dtype=dtype)
    out = perpendicular_negative(fixed(uncond, uncond, negative), 2.0)(X, LEVEL).out
    assert_close(out, uncond - 2 * (negative - uncond), 1e-2 if dtype == torch.float16 else 1e-12)


# ------------------------------------------------------------------------------------ the interval


def says(name, asked):
    """A network that answers with its name, and notes that it was asked."""

    def network(x, level):
        asked.append(name)
        return Output(name)

    return network


RATIO = LEVEL.sigma / LEVEL.alpha  # 0.75: above 0.7 and below 0.8, where neither sigma nor alpha alone would be


@pytest.mark.parametrize(
    "low, high, level, chosen",
    [
        (0.7, 0.79, LEVEL, "guided"),
        (RATIO, 2.0, LEVEL, "plain"),  # the low end is outside
        (0.1, RATIO, LEVEL, "guided"),  # the high end is inside
        (0.55, 0.65, LEVEL, "plain"),  # where sigma lies
        (1.2, 1.4, LEVEL, "plain"),  # where alpha / sigma lies
        (0.8, 3.0, LEVEL, "plain"),
        (0.1, 0.7, LEVEL, "plain"),
        (1.4, 1.6, Level(0, 600.0, 0.4, 0.6), "guided"),  # a flow's
        (0.0, math.inf, LEVEL, "guided"),
        (0.0, math.inf, Level(0, 999.0, 0.0, 1.0), "guided"),  # alpha 0: the ratio is infinite
        (0.0, 1e9, Level(0, 999.0, 0.0, 1.0), "plain"),
    ],
)
def test_guidance_within_its_interval(low, high, level, chosen):
    asked = []
    out = within(says("guided", asked), says("plain", asked), low, high)(X, level)
    assert out.out == chosen
    assert asked == [chosen]  # the other was not run


@torch.no_grad()
def test_the_interval_on_the_way_down_costs_one_evaluation_outside():
    """The prediction carries both kinds of output; outside it is the conditional network's."""
    unet, runs = counted()
    uncond, cond = contexts(2)
    together = classifier_free(halves_together(conditional(unet, torch.cat([uncond, cond]))), 5.0)
    denoise = denoiser(within(together, conditional(unet, cond), 0.28, 5.42), "epsilon")
    only_cond = denoiser(conditional(unet, cond), "epsilon")
    ratios = [14.6, 7.0, 4.0, 2.0, 1.0, 0.3, 0.1]
    levels = [Level(i, 999.0 - 150 * i, 1 / math.hypot(1, r), r / math.hypot(1, r)) for i, r in enumerate(ratios)]
    x = inputs()[0]
    for level, guided in zip(levels, [False, False, True, True, True, True, False], strict=True):
        p = denoise(x, level)
        assert runs == [6 if guided else 3]
        plain = only_cond(x, level)
        assert (p.cond is not None, p.uncond is not None) == (guided, guided)
        assert_close(p.cond if guided else p.eps, plain.eps, 1e-11)
        assert ((p.x0 - plain.x0).abs().mean() > 0.1) == guided
        runs.clear()


# ------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize("rescale", [-0.1, 1.5, math.nan])
def test_a_rescale_outside_its_range(rescale):
    with pytest.raises(LDMError, match=rf"rescale of guidance must lie between 0 .* and 1 .*, not {rescale}\."):
        rescaled(fixed(X, X), 7.5, rescale)


@pytest.mark.parametrize("low, high", [(1.0, 1.0), (2.0, 1.0), (-0.5, 1.0), (math.nan, 1.0), (0.0, math.nan)])
def test_an_interval_that_is_none(low, high):
    with pytest.raises(LDMError, match=rf"limited to sigma/alpha in \({low}, {high}\]: .* 0 <= low < high\."):
        within(says("guided", []), says("plain", []), low, high)


def test_weights_unlike_the_prompts():
    halves = fixed(X, X, X)
    for weights in ([1.0], [1.0, 2.0, 3.0]):
        with pytest.raises(LDMError, match=rf"{len(weights)} weights for 2 prompts: give one for each, and none for"):
            all_of(halves, weights)(X, LEVEL)
    for weights in ([], [1.0, math.nan], [math.inf]):
        with pytest.raises(LDMError, match=r"a finite weight for each prompt, at least one; it was given \["):
            all_of(halves, weights)


@pytest.mark.parametrize("weight", [-1.0, math.inf, math.nan])
def test_a_perpendicular_negative_that_would_pull(weight):
    with pytest.raises(LDMError, match=rf"how hard it pushes away: 0 or more, not {weight}\."):
        perpendicular_negative(fixed(X, X, X), 7.5, weight)
