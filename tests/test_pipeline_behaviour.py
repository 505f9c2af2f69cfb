"""How the pipeline behaves: what changes a picture and what must not, going on from any step, and what it refuses."""

import copy
import math
import re
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from reference import assert_close, normal
from tiny_pairs import PROMPT, SCENES, scenes

import ldm
from ldm.errors import LDMError
from ldm.guidance import (
    all_of,
    classifier_free,
    conditional,
    halves_apart,
    halves_together,
    perpendicular_negative,
    rescaled,
    within,
)
from ldm.noise import Noise
from ldm.pipeline import Pipeline
from ldm.samplers import SAMPLERS
from ldm.schedules import RULES, ScheduleConfig, make_schedule
from ldm.schedules.config import CLASSES, SOLVERS
from ldm.settings import Defaults, Settings

README = Path(__file__).parent.parent / "README.md"
N = 5
SMALL = {"steps": N, "width": 32, "height": 24}
WAYS = {name: {"sampler": name} for name in SAMPLERS} | {
    "ddim eta=1": {"sampler": "ddim", "eta": 1.0},
    "tcd eta=1": {"sampler": "tcd", "eta": 1.0},
    "as diffusers does": {"sampler": "unipc2", "compat": True},
    "karras": {"sampler": "dpm++2m", "sigmas": "karras"},
    "levels of one's own": {"sampler": "heun", "sigmas": [14.6, 6.0, 2.0, 0.7, 0.2, 0]},
    "timesteps of one's own": {"sampler": "lms", "timesteps": [999, 700.5, 400, 150, 20]},
}

every_sampler = pytest.mark.parametrize("way", WAYS)


@pytest.fixture
def pipe(models):
    return models.ours("sd1")


@pytest.fixture
def changeable(pipe):
    """A pipeline of our own to break."""
    return copy.deepcopy(pipe)


def same(a, b):
    """Two runs, bit for bit, and not of zeros."""
    assert len(a) == len(b)
    for s, t in zip(a, b, strict=True):
        assert (s.level, s.next) == (t.level, t.next) and s.x.std() > 0.1
        for key in ("x_before", "x", "x0", "eps", "cond", "uncond"):
            assert torch.equal(getattr(s, key), getattr(t, key)), (s.i, key)
    return True


def gray(images):
    return np.stack([np.asarray(image) for image in images]).astype(int)


# ------------------------------------------------------------------------------------ watching and going on


@every_sampler
def test_looking_at_a_run_or_repeating_it_changes_nothing(pipe, way):
    expected = list(pipe.steps(PROMPT, seed=7, **SMALL, **WAYS[way]))
    other, watched = pipe.steps("a fish", seed=8, **SMALL, **WAYS[way]), []
    for step in pipe.steps(PROMPT, seed=7, **SMALL, **WAYS[way]):
        watched.append(step)
        pipe.decode(step.x0)
        torch.randn(3)
        next(other)
    assert same(watched, expected)
    result = pipe(PROMPT, seed=7, **SMALL, **WAYS[way])
    assert torch.equal(result.x0, expected[-1].x)
    assert np.array_equal(gray(result.images), gray(pipe.decode(expected[-1].x)))
    assert not torch.equal(pipe(PROMPT, seed=8, **SMALL, **WAYS[way]).x0, result.x0)


@every_sampler
def test_a_run_goes_on_from_any_of_its_steps(pipe, way):
    """Paused, rewound, forked: with `after` neither seed nor latents matter any more, for the steps carry theirs."""
    options = {"prompt": [PROMPT, "a fish"], **SMALL, **WAYS[way]}
    expected = list(pipe.steps(seed=7, **options))
    paused = pipe.steps(seed=7, **options)
    begun = [next(paused), next(paused)]
    for k in (4, 2, 0, N):
        seed = 7 if k == 0 else 77
        assert same([*expected[:k], *pipe.steps(seed=seed, after=expected[:k], **options)], expected)
    assert same([*begun, *paused], expected)
    for k in (2, N):  # of a finished run too, which has no step left to take
        assert torch.equal(pipe(seed=77, after=expected[:k], **options).x0, expected[-1].x)


@every_sampler
def test_a_changed_latent_is_taken_up(pipe, way):
    plain = list(pipe.steps(PROMPT, **SMALL, **WAYS[way]))
    live = []
    for step in pipe.steps(PROMPT, **SMALL, **WAYS[way]):
        if step.i == 2:
            step.x = step.x.flip(-1)
        live.append(step)
    assert torch.equal(live[3].x_before, plain[2].x.flip(-1)) and same(live[:2], plain[:2])
    assert (live[-1].x - plain[-1].x).abs().max() > 0.01
    forked = list(pipe.steps(PROMPT, **SMALL, **WAYS[way]))[:3]
    forked[2].x = forked[2].x.flip(-1)
    assert same(list(pipe.steps(PROMPT, after=forked, **SMALL, **WAYS[way])), live[3:])


def test_steps_tell_what_guidance_was_made_of(pipe):
    for step in pipe.steps(PROMPT, guidance=3.0, **SMALL):
        assert_close(step.eps, step.uncond + 3.0 * (step.cond - step.uncond), 0.0)
        assert (step.cond - step.uncond).abs().max() > 0.01
    assert next(pipe.steps(PROMPT, guidance=1.0, **SMALL)).uncond is None


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.inference_mode])
def test_the_caller_s_gradient_mode_is_irrelevant(pipe, mode):
    expected = pipe(PROMPT, **SMALL).x0
    with mode():
        before = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        for step in pipe.steps(PROMPT, **SMALL):
            assert (torch.is_grad_enabled(), torch.is_inference_mode_enabled()) == before
            assert not step.x.requires_grad and not step.edited
        assert torch.equal(step.x, expected)


# ------------------------------------------------------------------------------------ the same, another way


@pytest.mark.parametrize("name", ["sd1", "sd2"])
@pytest.mark.parametrize("dtype, atol", [(torch.float32, 1e-5), (torch.float64, 1e-13)])
def test_guidance_in_two_halves_is_guidance_together(models, name, dtype, atol):
    pipe = models.ours(name, dtype)
    options = {"prompt": [PROMPT, "a fish"], "negative": ["fog", ""], **SMALL}
    both, apart = (list(pipe.steps(together=together, **options)) for together in (True, False))
    for a, b in zip(both, apart, strict=True):
        assert_close(a.x, b.x, atol * b.x.abs().max().item())


def test_prepared_keys_and_values_equal_plain_ones(pipe, monkeypatch):
    expected = pipe(PROMPT, **SMALL).x0
    monkeypatch.setattr(pipe.unet, "prepare", lambda context, extras, times: context)
    assert torch.equal(pipe(PROMPT, **SMALL).x0, expected) and expected.std() > 0.1


def test_pictures_drawn_together_equal_those_drawn_alone(pipe):
    """Within one grey level in a batch, where sums may be taken in another order; one by one, bit for bit."""
    options = {"sampler": "ddpm", **SMALL}
    batch = pipe([PROMPT, "a fish"], negative=["", "fog"], count=3, seed=40, **options)
    singly = pipe([PROMPT, "a fish"], negative=["", "fog"], count=3, seed=40, one_by_one=True, **options)
    prompts, negatives = [PROMPT] * 3 + ["a fish"] * 3, [""] * 3 + ["fog"] * 3
    alone = [
        pipe(prompt, negative=negative, seed=40 + k, **options)
        for k, (prompt, negative) in enumerate(zip(prompts, negatives, strict=True))
    ]
    assert torch.equal(singly.x0, torch.cat([result.x0 for result in alone]))
    images = gray([result.images[0] for result in alone])
    assert np.array_equal(gray(singly.images), images)
    assert abs(gray(batch.images) - images).max() <= 1 and images.std() > 20
    assert batch.settings == singly.settings
    assert batch.settings == Settings(
        prompt=tuple(prompts), negative=tuple(negatives), seeds=tuple(range(40, 46)), steps=N, guidance=7.5,
        sampler="ddpm", eta=0.0, width=32, height=24, rule="ddim", sigmas="spaced", timesteps=None, compat=False,
    )  # fmt: skip
    assert len({image.tobytes() for image in images}) == 6


@pytest.mark.parametrize("guidance, batches", [(1.0, [1] * N), (0.0, [1] * N), (1.5, [2] * N)])
def test_without_guidance_the_unet_runs_once_a_step_on_the_prompt_alone(pipe, guidance, batches):
    seen = []
    hook = pipe.unet.register_forward_pre_hook(lambda unet, args: seen.append(len(args[0])))
    try:
        plain = pipe(PROMPT, guidance=guidance, **SMALL)
    finally:
        hook.remove()
    assert seen == batches
    negated = pipe(PROMPT, guidance=guidance, negative="fog", **SMALL)
    assert torch.equal(negated.x0, plain.x0) == (guidance <= 1)


def test_the_empty_prompt_is_unconditional(pipe):
    """Guided away from itself it goes nowhere: the same as the conditional model alone."""
    alone, guided = pipe("", guidance=1.0, **SMALL).x0, pipe("", guidance=7.5, **SMALL).x0
    assert_close(guided, alone, 1e-4 * alone.abs().max().item())
    assert (pipe(PROMPT, guidance=1.0, **SMALL).x0 - alone).abs().max() > 0.01


def test_guidance_apart_runs_the_unet_twice_on_one_picture(pipe):
    seen = []
    hook = pipe.unet.register_forward_pre_hook(lambda unet, args: seen.append(len(args[0])))
    try:
        list(pipe.steps(PROMPT, together=False, **SMALL))
    finally:
        hook.remove()
    assert seen == [1, 1] * N


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_runs_on_the_cpu(models, dtype):
    pipe = models.ours("sd1", dtype)
    result = pipe(PROMPT, guidance=2.0, sampler="ddpm", **SMALL)
    # The networks are in half precision; what goes from step to step isn't, or each would round it once more.
    assert result.x0.dtype == torch.float32 and pipe.unet.dtype == dtype and torch.isfinite(result.x0).all()
    exact = models.ours("sd1").decode(models.ours("sd1")(PROMPT, guidance=2.0, sampler="ddpm", **SMALL).x0)
    assert abs(gray(result.images) - gray(exact)).mean() < {torch.float16: 5, torch.bfloat16: 40}[dtype]


# ------------------------------------------------------------------------------------ defaults


def test_what_the_caller_leaves_open_is_taken_from_the_model_s_defaults(pipe):
    own = Defaults(steps=3, guidance=2.0, sampler="euler", width=40, height=16)
    parts = (pipe.tokenizer, pipe.text_encoder, pipe.unet, pipe.vae, pipe.scheduler)
    expected = pipe(PROMPT, steps=3, guidance=2.0, sampler="euler", width=40, height=16)
    result = Pipeline(*parts, own)(PROMPT)
    assert result.settings == expected.settings and torch.equal(result.x0, expected.x0)
    assert result.images[0].size == (40, 16)
    changed = Pipeline(*parts, own).settings(PROMPT, steps=4, guidance=0.0, sampler="ddpm", width=8, height=8)
    assert (changed.steps, changed.guidance, changed.sampler, changed.width, changed.height) == (4, 0.0, "ddpm", 8, 8)


def test_every_file_has_its_sampler_and_every_sampler_its_rule():
    assert {rule for rule, _, _ in CLASSES.values()} == set(RULES)
    assert {name for _, name, _ in CLASSES.values() if name} | set(SOLVERS.values()) <= set(SAMPLERS)
    assert {method.rule for method in SAMPLERS.values()} <= set(RULES)


# ------------------------------------------------------------------------------------ the levels of noise

FILES = {  # a scheduler file, and the sampler and rule that it means
    "DDIMScheduler": ({}, "ddim", "ddim"),
    "PNDMScheduler": ({"skip_prk_steps": True, "steps_offset": 1}, "plms", "ddim"),
    "EulerDiscreteScheduler": ({}, "euler", "euler"),
    "DPMSolverMultistepScheduler": ({"algorithm_type": "sde-dpmsolver++"}, "dpm++2m-sde", "dpm"),
    "UniPCMultistepScheduler": ({"use_karras_sigmas": True}, "unipc2", "unipc"),
}


def with_file(pipe, name, **fields):
    """The same parts with another scheduler file, and no defaults."""
    config = ScheduleConfig.from_json({"_class_name": name, "beta_schedule": "scaled_linear", **fields})
    return Pipeline(pipe.tokenizer, pipe.text_encoder, pipe.unet, pipe.vae, config)


@pytest.mark.parametrize("name", FILES)
def test_swapping_the_sampler_leaves_the_schedule(pipe, name):
    fields, own, rule = FILES[name]
    pipe = with_file(pipe, name, **fields)
    assert (pipe.settings(PROMPT).sampler, pipe.settings(PROMPT).rule) == (own, rule)
    expected, drawn = pipe.schedule(N), []
    assert expected.rule == rule and expected.levels == make_schedule(pipe.scheduler, N).levels
    for other in ("ddim", "heun", "dpm++2m"):
        assert pipe.settings(PROMPT, sampler=other).rule == rule
        assert pipe.schedule(N, sampler=other) == expected
        steps = list(pipe.steps(PROMPT, sampler=other, **SMALL))
        assert [step.level for step in steps] == list(expected.levels[:-1]) and steps[-1].next == expected[-1]
        drawn.append(steps[-1].x)
    assert len({x.sum().item() for x in drawn}) == 3


def test_swapping_the_rule_leaves_the_sampler(pipe):
    """Each rule's table is another one, and the sampler that walks it the file's."""
    drawn, tables = [], set()
    for rule in ("ddim", "euler", "dpm", "deis", "tcd"):
        settings = pipe.settings(PROMPT, rule=rule, **SMALL)
        assert (settings.sampler, settings.rule, settings.compat) == ("ddim", rule, False)
        steps = list(pipe.steps(PROMPT, rule=rule, **SMALL))
        expected = make_schedule(pipe.scheduler, N, rule).levels
        assert [step.level for step in steps] == list(expected[:-1]) and steps[-1].next == expected[-1]
        for step in steps:
            after = step.next
            assert_close(step.x, after.alpha * step.x0 + after.sigma * step.eps, 1e-5 * step.x.abs().max())
        drawn.append(steps[-1].x.sum().item())
        tables.add(expected)
    assert len(set(drawn)) == len(tables) == 5


def test_compat_takes_the_rule_of_the_sampler_s_class(pipe):
    """That of the class a user of diffusers would have swapped in, unless a rule is named or it is the file's class."""
    for name, method in SAMPLERS.items():
        if method.rule != "flow":
            expected = "ddim" if name == "ddim" else method.rule
            assert pipe.settings(PROMPT, sampler=name, compat=True).rule == expected, name
            assert pipe.settings(PROMPT, sampler=name).rule == "ddim", name
            schedule = pipe.schedule(N, sampler=name, compat=True)
            assert schedule.compat and schedule.levels == make_schedule(pipe.scheduler, N, expected, True).levels
    assert pipe.settings(PROMPT, sampler="unipc2", compat=True, rule="euler").rule == "euler"
    own = with_file(pipe, "DPMSolverSinglestepScheduler", solver_order=1)  # it means the sampler ddim
    assert (own.settings(PROMPT, compat=True).sampler, own.settings(PROMPT, compat=True).rule) == ("ddim", "singlestep")
    assert own.settings(PROMPT, sampler="plms", compat=True).rule == "ddim"


def test_compat_does_as_diffusers_does(pipe):
    """Trailing, its DDIM goes down by a stride that misses the next row (REFERENCE_DEFECTS.md, 1)."""
    pipe = with_file(pipe, "DDIMScheduler", timestep_spacing="trailing")
    plain, compat = (list(pipe.steps(PROMPT, compat=compat, **SMALL | {"steps": 7})) for compat in (False, True))
    assert [step.level for step in plain] == [step.level for step in compat]
    assert plain[0].next == plain[1].level and compat[0].next != compat[1].level
    assert (plain[-1].x - compat[-1].x).abs().max() > 0.001


def test_levels_of_one_s_own_are_visited(pipe):
    sigmas, timesteps = [14.6, 3.0, 0.4, 0.0], torch.tensor([950.0, 500.5, 20.0])
    by_sigma = list(pipe.steps(PROMPT, sigmas=sigmas, width=32, height=24))
    visited = [*(step.level for step in by_sigma), by_sigma[-1].next]
    assert [level.ratio for level in visited] == pytest.approx(sigmas)
    by_t = list(pipe.steps(PROMPT, timesteps=timesteps, width=32, height=24))
    assert [step.level.t for step in by_t] == [950.0, 500.5, 20.0] and len(by_t) == 3
    karras = list(pipe.steps(PROMPT, sigmas="karras", **SMALL))
    ratios = np.array([step.level.ratio for step in karras]) ** (1 / 7)
    assert np.ptp(np.diff(ratios)) < 1e-9 and np.diff(ratios).max() < -0.1
    settings = pipe.settings(PROMPT, timesteps=timesteps)
    assert (settings.steps, settings.sigmas, settings.timesteps) == (3, "spaced", (950.0, 500.5, 20.0))
    assert pipe.settings(PROMPT, sigmas=np.array(sigmas)).sigmas == tuple(sigmas)
    named = Pipeline(pipe.tokenizer, pipe.text_encoder, pipe.unet, pipe.vae, pipe.scheduler, Defaults(sigmas="karras"))
    assert named.settings(PROMPT).sigmas == "karras" and named.settings(PROMPT, sigmas="spaced").sigmas == "spaced"
    assert named.schedule(N) == pipe.schedule(N, sigmas="karras") != pipe.schedule(N)
    assert named.schedule(timesteps=[900, 5]) == pipe.schedule(timesteps=[900, 5])


@pytest.mark.parametrize("options", [
    {"steps": 4, "sampler": "tcd"}, {"sigmas": (9.0, 1.0, 0.0), "compat": True, "sampler": "heun"},
    {"timesteps": (900, 400), "rule": "euler"}, {"sigmas": "beta", "sampler": "ddim", "eta": 0.5},
])  # fmt: skip
def test_settings_are_their_own_settings(pipe, options):
    """What a picture's record holds, handed back, is the same again."""
    settings = pipe.settings(PROMPT, seed=4, **options)
    fields = {name: value for name, value in vars(settings).items() if name not in ("prompt", "negative", "seeds")}
    assert pipe.settings(PROMPT, seed=4, **fields) == settings


def test_eta_is_the_sampler_s_own_unless_it_is_said(pipe):
    assert [pipe.settings(PROMPT, sampler=name).eta for name in ("ddim", "tcd", "heun")] == [0.0, 0.3, 0.0]
    assert pipe.settings(PROMPT, sampler="tcd", eta=0).eta == 0
    assert pipe.settings(PROMPT, sampler="heun", eta=0).eta == 0  # as a record says
    unsaid, said, none = (pipe(PROMPT, sampler="tcd", **more, **SMALL).x0 for more in ({}, {"eta": 0.3}, {"eta": 0}))
    assert torch.equal(unsaid, said) and (unsaid - none).abs().max() > 0.1
    ddim = pipe(PROMPT, sampler="ddim", **SMALL).x0
    assert_close(none, ddim, 1e-5 * ddim.abs().max())  # without noise, TCD's step is DDIM's


# ------------------------------------------------------------------------------------ a network of one's own

OTHER, FOG = "a small blue fish", "fog"


def parts(pipe, *prompts):
    """The network of each prompt, and the halves of all of them."""
    networks = [conditional(pipe.unet, pipe.encode([prompt])) for prompt in prompts]
    apart = torch.cat([pipe.encode([prompt]) for prompt in prompts])  # as the pipeline: a batch may have other bits
    return networks, halves_together(conditional(pipe.unet, apart), len(prompts))


def rescaled_by_hand(u, c):
    out = u + 7.5 * (c - u)
    return out * (0.7 * c.std() / out.std() + 0.3)


def perpendicular_by_hand(u, c, n):
    pos, neg = (c - u).flatten(), (n - u).flatten()
    perpendicular = neg - (neg @ pos) / (pos @ pos) * pos
    return u + 7.5 * (pos - 1.5 * perpendicular).view(u.shape)


COMPOSED = {  # prompts, the closure, and what it says of their predictions
    "classifier_free": (("", PROMPT), lambda h: classifier_free(h, 7.5), lambda u, c: u + 7.5 * (c - u)),
    "rescaled": (("", PROMPT), lambda h: rescaled(h, 7.5, 0.7), rescaled_by_hand),
    "all_of": (
        ("", PROMPT, OTHER),
        lambda h: all_of(h, (6.0, -2.0)),
        lambda u, c, d: u + 6.0 * (c - u) - 2.0 * (d - u),
    ),
    "perpendicular_negative": (("", PROMPT, FOG), lambda h: perpendicular_negative(h, 7.5, 1.5), perpendicular_by_hand),
}


@pytest.mark.parametrize("what", COMPOSED)
@pytest.mark.parametrize("sampler", ["ddim", "heun", "dpm++2m"])
def test_a_network_of_guidance_s_closures_is_drawn_through(models, what, sampler):
    """In every step the prediction is the formula's, of the prompts' predictions one by one."""
    pipe = models.ours("sd1", torch.float64)
    prompts, closure, by_hand = COMPOSED[what]
    networks, halves = parts(pipe, *prompts)
    network = closure(halves)
    steps = list(pipe.steps("", seed=7, sampler=sampler, network=network, **SMALL))
    for step in steps:
        expected = by_hand(*(each(step.x_before, step.level).out for each in networks))
        assert_close(step.eps, expected, 1e-11 * expected.abs().max())
    result = pipe("", seed=7, sampler=sampler, network=network, **SMALL)
    assert torch.equal(result.x0, steps[-1].x) and gray(result.images).std() > 20
    plain = pipe(PROMPT, seed=7, sampler=sampler, **SMALL).x0
    assert torch.equal(plain, result.x0) == (what == "classifier_free")
    apart = pipe("", seed=7, sampler=sampler, network=closure(halves_apart(*networks)), **SMALL).x0
    assert_close(apart, result.x0, 1e-9 * result.x0.abs().max())


def test_guidance_within_an_interval_is_drawn_through(pipe):
    """Outside of it the prompt alone is asked: one picture a run of the UNet instead of two."""
    (_, plain), halves = parts(pipe, "", PROMPT)
    low, high = 0.5, 3.0
    seen = []
    hook = pipe.unet.register_forward_pre_hook(lambda unet, args: seen.append(len(args[0])))
    try:
        steps = list(pipe.steps("", network=within(classifier_free(halves, 7.5), plain, low, high), **SMALL))
    finally:
        hook.remove()
    inside = [low < step.level.ratio <= high for step in steps]
    assert seen == [2 if each else 1 for each in inside] and 0 < sum(inside) < N
    assert [step.uncond is not None for step in steps] == inside
    for step, guided in zip(steps, inside, strict=True):
        if not guided:
            assert_close(step.eps, plain(step.x_before, step.level).out, 0.0)


# ------------------------------------------------------------------------------------ the loop of the README


def readme_loop(pipe, prompt, seed, steps, guidance):
    context = torch.cat([pipe.text_encoder.context(pipe.tokenizer(text).ids) for text in ("", prompt)])
    schedule = pipe.schedule(steps)
    x = Noise.from_seeds([seed]).draw(pipe.vae.latent_shape(64, 64)) * schedule.start_scale
    for level, after in pairwise(schedule.levels):
        uncond, cond = pipe.unet(torch.cat([x, x]), level.t, context).chunk(2)
        eps = uncond + guidance * (cond - uncond)  # classifier-free guidance
        x0 = (x - level.sigma * eps) / level.alpha  # x = alpha * x0 + sigma * eps
        x = after.alpha * x0 + after.sigma * eps  # DDIM
    return pipe.decode(x)[0]


def test_the_loop_written_with_the_parts_is_the_pipeline_s(pipe):
    image = readme_loop(pipe, PROMPT, 7, 4, 7.5)
    assert np.array_equal(gray([image]), gray(pipe(PROMPT, seed=7, steps=4, sampler="ddim").images))
    assert gray([image]).std() > 20


@scenes
@pytest.mark.skipif(not README.exists(), reason="there is no README.md")
def test_the_readme_s_loop_is_the_pipeline_s(monkeypatch):
    """The Python block behind `<!-- loop -->`, executed as it stands: the `image` it makes is `pipe`'s, bit for bit.

    Its prompt, seed, step count and guidance are read out of its text.
    """
    block = re.search(r"<!-- loop -->\s*```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)[1]
    prompt = max(re.findall(r'"([^"]*)"', block), key=len)
    seed, steps = int(re.search(r"\[(\d+)\]\)\.draw", block)[1]), int(re.search(r"schedule\((\d+)\)", block)[1])
    guidance = float(re.search(r"([\d.]+) \* \(cond - uncond\)", block)[1])
    pipe = ldm.load(SCENES)
    monkeypatch.setattr(ldm, "load", lambda name: pipe, raising=False)
    made = {}
    exec(compile(block, "README.md", "exec"), made)
    expected = pipe(prompt, seed=seed, steps=steps, guidance=guidance, sampler="ddim").images
    assert np.array_equal(gray([made["image"]]), gray(expected)) and gray(expected).std() > 10


# ------------------------------------------------------------------------------------ what is said, and refused


def test_a_prompt_that_is_cut_is_said_once(pipe, capsys):
    pipe.encode(["a large red house, " * 30 + "a fish"] * 3)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("The prompt is longer than 77 tokens; this part is not read: '") and line.endswith("a fish'")


PLANTS = {
    "the text encoder": ("text_encoder", "final_layer_norm.weight"),
    "the UNet, in step 1": ("unet", "conv_out.bias"),
    "the VAE's decoder": ("vae", "decoder.conv_out.bias"),
}


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
@pytest.mark.parametrize("who", PLANTS)
def test_not_a_number_is_refused_by_the_name_of_who_made_it(changeable, who, number):
    part, name = PLANTS[who]
    getattr(changeable, part).get_parameter(name)[0] = number
    with pytest.raises(LDMError, match=f"{who} returned numbers that are not finite .*--dtype float32"):
        changeable(PROMPT, **SMALL)


def test_latents_that_are_not_finite_are_refused(pipe):
    with pytest.raises(LDMError, match="the latents returned numbers that are not finite"):
        pipe.decode(torch.full((1, 4, 2, 2), float("nan")))


REFUSED = {
    "no prompt": ({"prompt": []}, "0 prompts and 0 negative ones given: one negative for all, or one each"),
    "negatives": ({"negative": ["a", "b"]}, "1 prompts and 2 negative ones given"),
    "count": ({"count": 0}, "count must be a whole number of 1 or more, not 0"),
    "sampler": ({"sampler": "dimm"}, r"Unknown sampler 'dimm': ldm has ddpm, .*\. Did you mean 'ddim'\?"),
    "no sampler's name": ({"sampler": ""}, "Unknown sampler '': ldm has ddpm"),
    "no name at all": ({"sampler": ["ddim"]}, r"Unknown sampler \['ddim'\]: ldm has .* Did you mean 'ddim'"),
    "no rule's name": ({"rule": ""}, "Unknown schedule rule '': ldm knows ddpm"),
    "no choice's name": ({"sigmas": ""}, "Unknown choice of sigmas '': ldm knows spaced"),
    "width": ({"width": 36}, "width must be a multiple of 8, not 36: a latent stands for 8 pixels"),
    "height": ({"height": 7}, "height must be a multiple of 8, not 7"),
    "negative size": ({"height": -8}, "height must be a multiple of 8, not -8"),
    "a size in words": ({"width": "64"}, "width must be a multiple of 8, not 64"),
    "no size": ({"height": 0}, "height must be a multiple of 8, not 0"),
    "no steps": ({"steps": 0}, "steps must be a whole number of 1 or more, not 0"),
    "half a step": ({"steps": 2.5}, "steps must be a whole number of 1 or more, not 2.5"),
    "a seed beyond all": ({"seed": 2**70}, "seed must be a whole number of 0 or more and below"),
    "guidance that is none": ({"guidance": math.nan}, "guidance must be a finite number, not nan"),
    "a word for a number": ({"guidance": "4"}, "guidance must be a finite number, not '4'"),
    "latents that are none": ({"latents": torch.full((1, 4, 3, 4), math.nan)}, "The latents given hold numbers that"),
    "too many steps": ({"steps": 1001}, "1001 steps asked for"),
    "eta": ({"eta": 0.5, "sampler": "euler"}, "euler has no eta, ddim and tcd have: take one of these samplers, or"),
    "eta above 1": ({"eta": 1.5, "sampler": "ddim"}, "eta must be a number from 0 to 1, not 1.5"),
    "eta below 0": ({"eta": -0.5, "sampler": "tcd"}, "eta must be a number from 0 to 1, not -0.5"),
    "eta that is none": ({"eta": math.nan}, "eta must be a number from 0 to 1, not nan"),
    "eta in words": ({"eta": "0.5"}, "eta must be a number from 0 to 1, not '0.5'"),
    "rule": ({"rule": "eulr"}, r"Unknown schedule rule 'eulr': ldm knows ddpm, .*\. Did you mean 'euler'\?"),
    "rule of flow": ({"rule": "flow"}, "'flow' doesn't go with a network that predicts epsilon"),
    "too many steps for the rule": ({"rule": "tcd", "steps": 51}, "51 steps asked for; .* between 1 and 50 of them"),
    "sigmas unknown": ({"sigmas": "karas"}, r"Unknown choice of sigmas 'karas': .* Did you mean 'karras'\?"),
    "sigmas that rise": ({"sigmas": [1, 2], "steps": None}, "sigmas must be 2 or more falling numbers"),
    "a sigma": ({"sigmas": [1], "steps": None}, r"sigmas must be 2 or more falling numbers, .* not \[1.0\]"),
    "no sigmas": ({"sigmas": [], "steps": None}, r"sigmas must be 2 or more falling numbers, .* not \[\]"),
    "sigmas in words": ({"sigmas": ["a"]}, r"sigmas must be a list of falling numbers, not \['a'\]"),
    "a single number": ({"timesteps": 900}, "timesteps must be a list of falling numbers, not 900"),
    "no timesteps": ({"timesteps": [], "steps": None}, "timesteps must be 1 or more falling numbers"),
    "timesteps beyond training": ({"timesteps": [1000], "steps": None}, "at most 999: not \\[1000.0\\]"),
    "timesteps and steps": ({"timesteps": [900, 5]}, "5 steps asked for, but the timesteps given make 2: leave one"),
    "timesteps and levels": (
        {"timesteps": [5], "sigmas": np.array([2.0, 1.0])},
        "Both timesteps and sigmas are given",
    ),
    "timesteps and sigmas": ({"timesteps": [5], "sigmas": "beta"}, "Both timesteps and sigmas are given"),
    "clip_skip": ({"clip_skip": 4}, "clip_skip 4 asked for, but the text encoder has 3 layers"),
    "clip_skip below 0": ({"clip_skip": -1}, "clip_skip -1 asked for"),
    "latents": ({"latents": torch.zeros(1, 4, 3, 3)}, r"latents of shape \(1, 4, 3, 3\) given; .* need \(1, 4, 3, 4\)"),
    "latents of one for two": (
        {"latents": torch.zeros(1, 4, 3, 4), "count": 2},
        r"latents of shape \(1, 4, 3, 4\) given; these settings need \(2, 4, 3, 4\)",
    ),
    "generator": (
        {"generator": torch.Generator(), "count": 3},
        "3 pictures asked for, but 1 generators given: one each",
    ),
    "prompt that is no text": ({"prompt": [3]}, "A prompt must be a text, not int: 3"),
    "None for a prompt": ({"prompt": None}, "A prompt must be a text, not NoneType: None"),
    "a number as prompt": ({"prompt": 5}, "A prompt must be a text, not int: 5"),
    "a number as negative": ({"negative": 5}, "A negative prompt must be a text, not int: 5"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_drawn_is_refused_with_a_sentence(pipe, what):
    options, sentence = REFUSED[what]
    with pytest.raises(LDMError, match=sentence):
        pipe(**{"prompt": PROMPT, **SMALL, **options})


def test_steps_refuses_at_once_and_not_when_the_first_step_is_asked_for(pipe):
    with pytest.raises(LDMError, match="Unknown sampler 'dimm'"):
        pipe.steps(PROMPT, sampler="dimm")


def test_a_negative_prompt_that_does_nothing_is_said(pipe, capsys):
    pipe.steps(PROMPT, negative="a fish", guidance=1.0, **SMALL)
    assert "Without guidance (1 or less) the negative prompt does nothing." in capsys.readouterr().err
    pipe.steps(PROMPT, negative="a fish", guidance=1.1, **SMALL)
    pipe.steps(PROMPT, guidance=1.0, **SMALL)
    assert capsys.readouterr().err == ""


def test_one_by_one_refuses_what_belongs_to_a_batch(pipe):
    two = {"prompt": PROMPT, "count": 2, "one_by_one": True, **SMALL}
    steps = list(pipe.steps(PROMPT, count=2, **SMALL))
    for name, value in {
        "latents": normal(0, 2, 4, 3, 4),
        "generator": [torch.Generator(), torch.Generator()],
        "after": steps[:2],
        "network": conditional(pipe.unet, pipe.encode([PROMPT] * 2)),
    }.items():
        with pytest.raises(LDMError, match="one_by_one begins each picture from its seed: pass no"):
            pipe(**two, **{name: value})


def test_steps_of_another_run_are_refused(pipe):
    steps = list(pipe.steps(PROMPT, **SMALL))
    with pytest.raises(LDMError, match="don't belong to this schedule"):
        pipe(PROMPT, after=steps[:2], **SMALL | {"steps": 6})
    with pytest.raises(LDMError, match="The run had 1 noise generators, this one has 2"):
        pipe(PROMPT, after=steps[:2], count=2, **SMALL)


def test_an_unknown_option_is_a_mistake_in_the_program(pipe):
    with pytest.raises(TypeError, match="cfg"):
        pipe(PROMPT, cfg=3, **SMALL)
