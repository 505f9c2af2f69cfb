"""A watch tells the truth of a run, and leaves it as it is.

Maps against the layers' own output and against diffusers' explicit scores, on drawn parameters and on the embedded
weights; what belongs to which step, part and picture; the bound on memory; nothing left behind.
"""

import copy
import itertools
import math
from dataclasses import replace

import pytest
import torch
from reference import DTYPES, assert_close, normal, randomise
from tiny_pairs import OTHERS, PROMPT, SCENES, controlnets, scenes
from torch import nn

import ldm
from ldm.control import Control
from ldm.errors import LDMError
from ldm.guidance import all_of, classifier_free, conditional, halves_apart, halves_together
from ldm.lab.maps import Key, Maps, explicit
from ldm.lab.record import stats
from ldm.models.blocks import Attention
from ldm.models.unet import UNet
from ldm.pipeline import Pipeline
from ldm.samplers import SAMPLERS

F64 = torch.float64
SIZE = {"width": 48, "height": 32}
TWO = {"prompt": [PROMPT, OTHERS[1]], "negative": ["fog", "a dog"], "steps": 3, "guidance": 4.0, "seed": 3, **SIZE}
DOWN0 = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2"


@pytest.fixture(scope="session")
def pipe(models):
    return models.ours("sd1", F64)


def attentions(pipe):
    return {f"unet.{name}": m for name, m in pipe.unet.named_modules() if isinstance(m, Attention)}


def hooks(pipe):
    """Everything that hangs on the pipeline's modules."""
    parts = (pipe.unet, pipe.vae, pipe.text_encoder)
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called")
    return [hook for part in parts for m in part.modules() for kind in kinds for hook in getattr(m, kind)]


def editor(pipe):
    """A model that edits pictures: eight channels, three parts of guidance."""
    unet = randomise(UNet(replace(pipe.unet.config, in_channels=8)), seed=12).to(pipe.dtype)
    return Pipeline(pipe.tokenizer, pipe.text_encoder, unet, pipe.vae, pipe.scheduler)


# ------------------------------------------------------------------------------------------------ the maps are true


class Inside:
    """What every attention layer was given and gave, in its last call: (x, context, output)."""

    def __init__(self, pipe):
        self.seen, self.handles = {}, []
        for name, module in attentions(pipe).items():
            self.handles.append(module.register_forward_hook(self.look(name), with_kwargs=True))

    def look(self, name):
        def hook(module, args, kwargs, output):
            context = args[1] if len(args) > 1 else kwargs.get("context")
            self.seen[name] = (args[0], context, output)

        return hook

    def remove(self):
        for handle in self.handles:
            handle.remove()


@torch.no_grad()
def check_against_outputs(pipe, dtype, **options):
    """Each layer's maps times its values, through `to_out`, are what the fused layer put out. Returns the worst."""
    inside = Inside(pipe)
    try:
        with ldm.watch(pipe, self_attention=True, every_part=True) as seen:
            *_, last = pipe.steps(**options)
    finally:
        inside.remove()
    call, worst, count = seen.calls[-1], 0.0, 0
    assert call.parts == ("uncond", "cond")
    for name, module in attentions(pipe).items():
        x, context, output = inside.seen[name]
        v = context[module][1] if context is not None else module.split_heads(module.to_v(x))
        for row, (part, picture) in enumerate(itertools.product(call.parts, range(call.pictures))):
            found = seen.attention(name, step=last.i, part=part, picture=picture)  # (heads, h, w, L)
            assert found.dtype == dtype and len(found) == module.heads
            made = (found.flatten(1, 2) @ v[row]).transpose(0, 1).flatten(1)  # (N, C)
            worst = max(worst, assert_close(module.to_out[0](made), output[row], DTYPES[dtype], at_least=0.01))
            assert (found.sum(-1) - 1).abs().max() < DTYPES[dtype]
            count += 1
    assert count == 2 * call.pictures * len(seen.layers)
    return worst


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["sd1", "sd2"])
def test_maps_times_values_are_every_layer_s_own_output(models, name, dtype):
    check_against_outputs(models.ours(name, dtype), dtype, **TWO)


@scenes
@pytest.mark.parametrize("dtype", DTYPES)
def test_maps_of_the_embedded_model_are_true(dtype):
    check_against_outputs(ldm.load(SCENES, dtype), dtype, prompt=PROMPT, steps=1, width=64, height=96)


class Scores:
    """diffusers' attention written out, and its scores kept (B * heads, N, L)."""

    def __init__(self, kept, name):
        self.kept, self.name = kept, name

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, **_):
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        q, k, v = (
            attn.head_to_batch_dim(to(x))
            for to, x in ((attn.to_q, hidden_states), (attn.to_k, context), (attn.to_v, context))
        )
        scores = self.kept[self.name] = attn.get_attention_scores(q, k, attention_mask)
        return attn.to_out[1](attn.to_out[0](attn.batch_to_head_dim(scores @ v)))


@torch.no_grad()
@pytest.mark.parametrize("name", ["sd1", "sd2"])
def test_maps_equal_diffusers_explicit_scores(models, name):
    """Of three rows at three times, not square, in float64."""
    pipe, kept = models.ours(name, F64), {}
    reference = copy.deepcopy(models.reference(name, F64).unet)
    names = [each.removesuffix(".processor") for each in reference.attn_processors]
    reference.set_attn_processor({f"{each}.processor": Scores(kept, each) for each in names})
    x, t, context = normal(1, 3, 4, 10, 6, dtype=F64), torch.tensor([3, 500, 999]), normal(2, 3, 77, 24, dtype=F64)
    wanted = reference(x, t, context).sample
    with ldm.watch(pipe, self_attention=True) as seen:
        assert_close(pipe.unet(x, t, context), wanted, 1e-11)
    assert {f"unet.{each}" for each in names} == {each.name for each in seen.layers} and len(names) == 14
    assert seen.calls[0].t == (3.0, 500.0, 999.0) and seen.calls[0].pictures == 3
    sizes = {each.name: (each.heads, *each.size) for each in seen.layers}
    assert {(10, 6), (5, 3), (3, 2)} == {size[1:] for size in sizes.values()} and max(sizes.values())[0] > 1
    for each in names:
        scores = kept[each].reshape(3, *sizes[f"unet.{each}"], -1)
        for row in range(3):
            assert_close(seen.attention(f"unet.{each}", picture=row), scores[row], 1e-11, at_least=1e-3)


def test_an_odd_size_keeps_its_rows_and_columns_apart(pipe):
    """Height and width are not interchanged where maps are enlarged, and every token's share is counted once."""
    with ldm.watch(pipe) as seen:
        pipe(PROMPT, steps=1, width=72, height=40)
    assert seen.calls[0].size == (5, 9)
    assert seen.map(4).shape == (5, 9) and seen.map(4, size=(20, 36)).shape == (20, 36)
    assert (seen.map(range(77)) - 1).abs().max() < 1e-12
    apart = sum(seen.map(token) for token in (3, 4, 9))
    assert_close(seen.map([3, 4, 9]), apart, 1e-12, at_least=1e-3)
    own = seen.attention(DOWN0)  # (heads, h, w, 77), of the latent's own size: not enlarged
    assert_close(seen.map(4, layer=DOWN0), own[..., 4].mean(0), 1e-12, at_least=1e-3)
    assert_close(seen.map(4, layer=DOWN0, head=1), own[1, ..., 4], 1e-12, at_least=1e-3)
    assert seen.map(4, layer=DOWN0, head=1).std() > 1e-6


def test_layers_heads_and_steps_left_out_are_averaged(pipe):
    with ldm.watch(pipe, self_attention=True) as seen:
        pipe(PROMPT, steps=2, **SIZE)
    cross = [each.name for each in seen.layers if each.cross]
    assert 2 * len(cross) == len(seen.layers) == 14
    assert {each.size for each in seen.layers} == {(4, 6), (2, 3), (1, 2)}
    mean = sum(seen.map(4, layer=each, step=step) for each in cross for step in (0, 1)) / (2 * len(cross))
    assert_close(seen.map(4), mean, 1e-13, at_least=1e-3)
    halves = [seen.map(4, layer=each) for each in ("mid_block", "down_blocks", "up_blocks")]
    counts = [sum(each in name for name in cross) for each in ("mid_block", "down_blocks", "up_blocks")]
    assert_close(sum(n * one for n, one in zip(counts, halves, strict=True)) / len(cross), seen.map(4), 1e-13, 1e-3)
    assert_close(seen.map(4, layer=["mid_block", "up_blocks"], step=1), (
        counts[0] * seen.map(4, layer="mid_block", step=1) + counts[2] * seen.map(4, layer="up_blocks", step=1)
    ) / (counts[0] + counts[2]), 1e-13, at_least=1e-3)  # fmt: skip
    place = seen.map(5, layer="down_blocks.0.attentions.0.transformer_blocks.0.attn1")  # a position, not a word
    assert_close(place, seen.attention(DOWN0.replace("attn2", "attn1"))[..., 5].mean(0), 1e-12, at_least=1e-3)


# ------------------------------------------------------------------------------------------- the run is as it was


@pytest.mark.parametrize("sampler", ["euler-a", "heun", "dpm++2m-sde", "unipc2"])
def test_a_watched_run_is_the_unwatched_bit_for_bit(models, sampler):
    pipe = models.ours("sd2")
    steps = list(pipe.steps(**TWO, sampler=sampler))
    state = torch.get_rng_state()
    with ldm.watch(pipe, self_attention=True, every_part=True), ldm.watch(pipe, memory=0.3):
        watched = list(pipe.steps(**TWO, sampler=sampler))
    assert torch.equal(state, torch.get_rng_state())
    for one, other in zip(steps, watched, strict=True):
        assert one.level == other.level and not other.edited
        for field in ("x_before", "x", "x0", "eps", "cond", "uncond"):
            assert torch.equal(getattr(one, field), getattr(other, field)), field


def test_nothing_stays_hooked(pipe, capsys):
    """After the end, an exception, a generator that is left alone, a refusal, and want of memory."""
    assert not hooks(pipe) and not pipe.watchers
    with ldm.watch(pipe) as seen:
        assert hooks(pipe) and pipe.watchers
        pipe.steps(PROMPT, steps=2, **SIZE)  # never walked
        left = pipe.steps(PROMPT, steps=3, **SIZE)
        next(left)
    assert not hooks(pipe) and not pipe.watchers
    alone = list(pipe.steps(PROMPT, steps=3, **SIZE))
    count = len(seen.calls), [call.guidance for call in seen.calls]
    assert torch.equal(list(left)[-1].x, alone[-1].x)  # it goes on, and nobody looks
    assert (len(seen.calls), [call.guidance for call in seen.calls]) == count and count[0] == 1
    with pytest.raises(ZeroDivisionError), ldm.watch(pipe):
        raise ZeroDivisionError
    with pytest.raises(LDMError), ldm.watch(pipe, layers="attn9"):
        raise AssertionError
    with pytest.raises(LDMError), ldm.watch(pipe, memory=1e-3):
        pipe(PROMPT, steps=1, **SIZE)
    with pytest.raises(RuntimeError), ldm.watch(pipe) as seen:
        try:
            pipe.unet(normal(1, 1, 4, 4, 4, dtype=F64), 5, normal(2, 1, 77, 3, dtype=F64))  # a text of another width
        finally:
            pipe.unet.mid_block.attentions[0].norm(normal(3, 1, 16, 2, 2, dtype=F64)[:, :8].repeat(1, 3, 1, 1))
            broken = len(seen.calls[0].bricks)
            pipe.unet.time_embedding(normal(1, 1, 8, dtype=F64))
            assert len(seen.calls[0].bricks) == broken and seen.beside[-1].name == "unet.time_embedding"
    assert not hooks(pipe) and not pipe.watchers
    capsys.readouterr()


def test_watches_may_be_nested(pipe):
    with ldm.watch(pipe) as outer:
        pipe(PROMPT, steps=1, **SIZE)
        with ldm.watch(pipe, layers="mid_block", self_attention=True) as inner:
            pipe(PROMPT, steps=2, **SIZE)
        pipe(OTHERS[0], steps=1, **SIZE)
    assert [call.run for call in outer.calls] == [0, 1, 1, 2] and [call.run for call in inner.calls] == [0, 0]
    assert [call.step for call in outer.calls] == [0, 0, 1, 0]
    assert torch.equal(outer.map(4, run=1, layer="mid_block"), inner.map(4))
    assert not torch.equal(outer.map(4, run=0), outer.map(4, run=2))
    assert [call.guidance for call in outer.calls[1:3]] == [call.guidance for call in inner.calls]


# ------------------------------------------------------------------------------------ rows, parts, pictures, steps


@torch.no_grad()
def own_map(pipe, x, t, context, token, layer=DOWN0):
    """Where one row looks at a token, of a call with no other row."""
    with ldm.watch(pipe, layers=layer) as seen:
        pipe.unet(x, t, context)
    assert seen.calls[0].i is None and seen.calls[0].parts == ("part 1",)
    return seen.map(token)


@pytest.mark.parametrize("together", [True, False])
def test_parts_and_pictures_are_told_apart(pipe, together):
    """Both halves in one batch or one after the other: the map of each is that of the UNet run on it alone."""
    with ldm.watch(pipe, every_part=True) as seen:
        steps = list(pipe.steps(**TWO, together=together))
    with ldm.watch(pipe) as by_default:
        list(pipe.steps(**TWO, together=together))
    parts = [("uncond", "cond")] if together else [("uncond",), ("cond",)]
    assert [call.parts for call in seen.calls] == parts * 3
    assert [call.step for call in seen.calls] == [k for k in range(3) for _ in parts]
    assert [(call.i, call.t) for call in seen.calls] == [(s.level.i, s.level.t) for s in steps for _ in parts]
    assert {call.pictures for call in seen.calls} == {2} and {call.run for call in seen.calls} == {0}
    assert torch.equal(by_default.map(4, step=1), seen.map(4, step=1, part="cond"))
    texts = {"uncond": TWO["negative"], "cond": TWO["prompt"]}
    for part, picture in itertools.product(texts, (0, 1)):
        context = pipe.encode([texts[part][picture]])
        wanted = own_map(pipe, steps[1].x_before[picture : picture + 1], steps[1].level.t, context, 4)
        found = seen.map(4, step=1, layer=DOWN0, part=part, picture=picture)
        assert_close(found, wanted, 1e-12, at_least=1e-3)
    with pytest.raises(LDMError, match=r"part 'uncond' are kept, those of cond are.*every_part=True"):
        by_default.map(4, part="uncond")


@pytest.mark.parametrize("together", [True, False])
def test_the_three_parts_of_an_editor(pipe, together):
    edits = editor(pipe)
    asked = {**TWO, "image": (normal(8, 32, 48, 3).sigmoid() * 255).byte().numpy(), "together": together}
    with ldm.watch(edits, every_part=True, layers=DOWN0) as seen:
        steps = list(edits.steps(**asked))
    parts = [("uncond", "image", "cond")] if together else [("uncond",), ("image",), ("cond",)]
    assert [call.parts for call in seen.calls] == parts * 3
    maps = [seen.map(4, step=1, part=part) for part in ("uncond", "image", "cond")]
    assert min((one - other).abs().max() for one, other in itertools.combinations(maps, 2)) > 1e-5
    with ldm.watch(edits, layers=DOWN0) as alone:
        edits(**{**asked, "guidance": 1.0})
    assert alone.calls[0].parts == ("cond",)
    assert_close(seen.map(4, step=0, part="cond"), alone.map(4, step=0), 1e-12, at_least=1e-3)
    for call, step in zip([call for call in seen.calls if "cond" in call.parts], steps, strict=True):
        assert call.guidance == pytest.approx((step.cond - step.uncond).flatten(1).norm(dim=1).tolist(), rel=1e-12)


def times(pipe):
    """The timesteps that the UNet is told, one a call: a list that fills, and its hook."""
    told = []
    return told, pipe.unet.register_forward_pre_hook(lambda module, args: told.append(float(args[1])))


@pytest.mark.parametrize("sampler", ["heun", "dpm2", "unipc2", "euler"])
def test_calls_belong_to_their_steps_where_there_are_two_in_a_step(pipe, sampler):
    told, handle = times(pipe)
    with ldm.watch(pipe) as seen:
        steps = list(pipe.steps(PROMPT, sampler=sampler, steps=4, **SIZE))
    handle.remove()
    calls = seen.calls
    assert [call.t for call in calls] == told and len(set(told)) >= 4
    twice = SAMPLERS[sampler].evaluations == 2
    assert [call.step for call in calls] == ([0, 0, 1, 1, 2, 2, 3, 3] if twice else [0, 1, 2, 3])
    ahead = sampler == "heun"  # asks at the next row; dpm2 between the two
    assert [call.i for call in calls] == [call.step + ahead * (k % 2) for k, call in enumerate(calls)]
    assert [call.number for call in calls] == list(range(len(calls)))
    pair = [seen.maps.kept[Key(DOWN0, "cond", 0, call.number)][0] for call in calls if call.step == 1]
    assert_close(seen.attention(DOWN0, step=1), sum(pair) / len(pair), 1e-13, at_least=1e-3)
    for step in steps:
        wanted = (step.cond - step.uncond).flatten(1).norm(dim=1).tolist()
        first = next(call for call in calls if call.step == step.i)
        assert first.guidance == pytest.approx(wanted, rel=1e-12) and wanted[0] > 0.1


def test_a_run_from_a_picture_begins_at_its_row(pipe):
    with ldm.watch(pipe) as seen:
        steps = list(pipe.steps(PROMPT, image=normal(5, 1, 4, 4, 6), strength=0.5, steps=6))
    assert [call.step for call in seen.calls] == [step.i for step in steps] == [3, 4, 5]
    with pytest.raises(LDMError, match=r"Step 1 asked for, but 3 to 5 were watched"):
        seen.map(4, step=1)


def test_inversion_counts_its_rows_upwards(pipe):
    with ldm.watch(pipe) as seen:
        run = pipe.prepare_inversion(normal(5, 1, 4, 4, 6), PROMPT, steps=3, refine=1)
        steps = list(run.steps())
    assert [call.step for call in seen.calls] == [step.i for step in steps for _ in range(2)] == [0, 0, 1, 1, 2, 2]
    assert [call.t for call in seen.calls[::2]] == [step.level.t for step in steps]
    assert {call.parts for call in seen.calls} == {("cond",)} and seen.calls[0].guidance is None


def test_two_runs_at_once_are_kept_apart(pipe):
    asked = [{"prompt": PROMPT, "steps": 2, **SIZE}, {"prompt": OTHERS[1], "guidance": 1.0, "steps": 2, **SIZE}]
    with ldm.watch(pipe) as seen:
        list(zip(*(pipe.steps(**each) for each in asked), strict=True))
    assert [(call.run, call.step, len(call.parts)) for call in seen.calls] == [
        (0, 0, 2),
        (1, 0, 1),
        (0, 1, 2),
        (1, 1, 1),
    ]
    for run, each in enumerate(asked):
        with ldm.watch(pipe) as alone:
            pipe(**each)
        assert torch.equal(alone.map(4), seen.map(4, run=run))
    with ldm.watch(pipe) as seen:
        pipe([PROMPT, OTHERS[1]], one_by_one=True, steps=1, **SIZE)
    assert [(call.run, call.pictures) for call in seen.calls] == [(0, 1), (1, 1)]


def test_a_loop_of_one_s_own_is_recorded(pipe):
    """Two rows without names, or halves of guidance where the reader says so: then the same as the pipeline's run."""
    context, schedule = pipe.encode(["", PROMPT]), pipe.schedule(3, sampler="ddim")
    x = ldm.Noise.from_seeds([7]).draw((4, 4, 6)).to(F64) * schedule.start_scale

    @torch.no_grad()
    def loop(x):
        for level, after in itertools.pairwise(schedule.levels):
            uncond, cond = pipe.unet(torch.cat([x, x]), level.t, context).chunk(2)
            eps = uncond + 4.0 * (cond - uncond)
            x = after.alpha * (x - level.sigma * eps) / level.alpha + after.sigma * eps
        return x

    with ldm.watch(pipe, parts=("uncond", "cond")) as named:
        loop(x)
    with ldm.watch(pipe) as unnamed:
        loop(x)
        pipe(PROMPT, steps=1, **SIZE)
        loop(x)
        loop(x[..., :3])
    with ldm.watch(pipe) as seen:
        pipe(PROMPT, seed=7, sampler="ddim", guidance=4.0, steps=3, **SIZE)
    assert [(call.i, call.step, call.parts, call.pictures) for call in named.calls] == [
        (None, k, ("uncond", "cond"), 1) for k in range(3)
    ]
    assert [call.t for call in named.calls] == [call.t for call in seen.calls]
    for call, other in zip(named.calls, seen.calls, strict=True):
        assert call.guidance == pytest.approx(other.guidance, rel=1e-9)
    for step in (None, 1):
        assert_close(named.map(4, step=step), seen.map(4, step=step), 1e-11, at_least=1e-3)
        assert_close(unnamed.map(4, step=step, picture=1, run=0), seen.map(4, step=step), 1e-11, at_least=1e-3)
    runs = [(call.run, call.step, call.size) for call in unnamed.calls if call.i is None]
    assert runs == [(run, step, size) for run, size in ((0, (4, 6)), (2, (4, 6)), (3, (4, 3))) for step in range(3)]
    assert {(call.parts, call.pictures, call.guidance) for call in unnamed.calls if call.i is None} == {
        (("part 1",), 2, None)
    }


def test_the_parts_of_a_network_of_one_s_own_are_named_by_whoever_made_it(pipe):
    contexts = [pipe.encode([text]) for text in ("", PROMPT, OTHERS[1])]
    both = classifier_free(halves_together(conditional(pipe.unet, torch.cat(contexts[:2]))), 4.0)
    three = all_of(halves_apart(*(conditional(pipe.unet, each) for each in contexts)), [2.0, 1.0])
    asked = {"prompt": PROMPT, "guidance": 4.0, "steps": 2, **SIZE}
    with ldm.watch(pipe) as wanted:
        pipe(**asked)
    with ldm.watch(pipe, parts=["uncond", "cond"]) as named:
        pipe(**asked, network=both)
    with ldm.watch(pipe) as unnamed:
        pipe(**asked, network=both)
    with ldm.watch(pipe, parts=["uncond", "cond"]) as apart:
        pipe(**asked, network=three)
    assert [call.parts for call in named.calls] == [("uncond", "cond")] * 2
    assert [call.parts for call in unnamed.calls] == [("part 1", "part 2")] * 2
    assert [call.parts for call in apart.calls] == [("part 1",), ("part 2",), ("part 3",)] * 2
    assert torch.equal(named.map(4), wanted.map(4)) and torch.equal(unnamed.map(4, part="part 2"), wanted.map(4))
    assert_close(apart.map(4, part="part 2", step=0), wanted.map(4, step=0), 1e-12, at_least=1e-3)
    assert named.calls[0].guidance == wanted.calls[0].guidance == unnamed.calls[0].guidance
    assert [call.guidance is None for call in apart.calls] == [True, True, False] * 2
    with pytest.raises(LDMError, match=r"part 'cond' are kept, those of part 1, part 2 are: name one"):
        unnamed.map(4)


# ------------------------------------------------------------------------------------------- what passes through


def test_residuals_of_controlnets_are_measured(models):
    """Two nets added up, one of them in the first half of the steps alone, in guess mode: nothing for uncond."""
    pipe, told = models.ours("sd1", F64), []
    nets = [controlnets(models, "sd1", seed, F64)[1] for seed in (4, 5)]
    edges = normal(7, 1, 3, 32, 48).sigmoid()
    controls = [Control(nets[0], edges, guess=True), Control(nets[1], edges, end=0.5, guess=True)]
    handle = pipe.unet.register_forward_pre_hook(lambda module, args: told.append(args[4]))
    with ldm.watch(pipe) as seen:
        pipe(PROMPT, control=controls, steps=4, **SIZE)
        pipe(PROMPT, control=replace(controls[1], end=0.5), steps=2, **SIZE)
    handle.remove()
    for call, (skips, middle, _) in zip(seen.calls[:5], told[:5], strict=True):
        wanted = torch.stack([each.flatten(1).norm(dim=1) for each in (*skips, middle)])  # (skips + 1, rows)
        assert_close(call.residuals, wanted, 1e-12)
        assert call.residuals.shape == (len(skips) + 1, 2) and (call.residuals[:, 0] == 0).all()
        assert (call.residuals[:, 1] > 0).all()
    assert seen.calls[0].residuals[0, 1] != seen.calls[2].residuals[0, 1]
    assert told[5] is None and seen.calls[5].residuals is None


def test_bricks_are_measured(pipe):
    """Against numbers computed here, and with one that isn't finite."""
    named = {f"unet.{name}": m for name, m in pipe.unet.named_modules()} | {
        f"vae.{name}": m for name, m in pipe.vae.named_modules()
    }
    names = ["unet.conv_in", "unet.mid_block.resnets.1", "unet.down_blocks.0", DOWN0, "vae.decoder.up_blocks.1", "unet"]
    outputs = {}
    named["unet"] = pipe.unet
    handles = [
        named[name].register_forward_hook(lambda m, args, out, name=name: outputs.__setitem__(name, out))
        for name in names
    ]
    with ldm.watch(pipe) as seen:
        pipe(PROMPT, steps=2, **SIZE)
    for handle in handles:
        handle.remove()
    found = seen.calls[-1].bricks | {each.name: each for each in seen.beside}
    for name in names:
        x = outputs[name][-1] if isinstance(outputs[name], list) else outputs[name]
        assert found[name].shape == x.shape and found[name].nonfinite == 0
        wanted = [x.mean(), x.std(correction=0), x.min(), x.max()]
        assert list(found[name][2:6]) == pytest.approx([each.item() for each in wanted], rel=1e-12)
    made = {name for name, m in pipe.unet.named_modules() if list(m.children()) and not isinstance(m, nn.ModuleList)}
    made = {"unet." * bool(name) + (name or "unet") for name in made}
    assert set(seen.calls[0].bricks) == made | {"unet.conv_in", "unet.conv_out"}
    beside = [each.name for each in seen.beside]
    assert beside[0] == "text_encoder.embeddings" and beside[-1] == "vae.decoder"
    assert beside.count("text_encoder.encoder.layers.0.mlp") == 2  # the prompt and the negative one


def test_numbers_that_are_not_finite_are_counted():
    x = torch.tensor([[1.0, float("nan"), 3.0], [float("inf"), -float("inf"), 8.0]])
    assert stats("x", x)[1:] == ((2, 3), 4.0, pytest.approx((26 / 3) ** 0.5), 1.0, 8.0, 3)
    assert stats("x", torch.tensor([60000.0, 60000.0], dtype=torch.float16)).mean == 60000.0  # their sum isn't half's
    nothing = stats("x", x[:, 1:2].log())
    assert nothing.nonfinite == 2 and nothing.mean != nothing.mean
    assert stats("x", x[:0]).shape == (0, 3)


def test_tiles_are_recorded_and_have_no_maps(pipe):
    with ldm.watch(pipe) as seen:
        pipe(PROMPT, tile=32, width=48, height=32, steps=1, together=False)
    assert [call.parts for call in seen.calls] == [("uncond",)] * 2 + [("cond",)] * 2
    assert all(call.tiled and call.size == (4, 6) for call in seen.calls) and seen.calls[0].bricks
    assert seen.calls[-1].guidance is not None and not seen.maps.kept
    with pytest.raises(LDMError, match=r"A run in tiles has no maps.*\(tile=0\)"):
        seen.map(4)


# ------------------------------------------------------------------------------------------------------- memory


def test_what_outgrows_its_memory_is_averaged_and_said_once(pipe, capsys):
    with ldm.watch(pipe, every_part=True, self_attention=True) as whole:
        list(pipe.steps(**TWO))
    assert not capsys.readouterr().err
    kept, heads = whole.maps.used, max(layer.heads for layer in whole.layers)
    assert heads == 2 and kept == sum(each.numel() * 8 for each in whole.maps.kept.values())
    for share, lines in ((0.6, 1), (0.45, 2), (0.17, 2)):
        memory = share * kept / 2**20
        with ldm.watch(pipe, every_part=True, self_attention=True, memory=memory) as seen:
            for _ in pipe.steps(**TWO):
                assert seen.maps.used <= memory * 2**20
                assert seen.maps.used == sum(each.nbytes for each in seen.maps.kept.values())
        said = capsys.readouterr().err.splitlines()
        assert len(said) == lines and said[0].endswith("MiB: they are averaged over heads."), said
        assert said[1:] == [said[0].replace("over heads", "over steps as well")] * (lines - 1)
        for layer, part, picture in itertools.product(whole.layers, ("uncond", "cond"), (0, 1)):
            wanted = whole.attention(layer.name, part=part, picture=picture).mean(0, keepdim=True)
            assert_close(seen.attention(layer.name, part=part, picture=picture), wanted, 1e-12, at_least=1e-3)
        assert_close(seen.map([2, 3], picture=1, part="cond"), whole.map([2, 3], picture=1, part="cond"), 1e-12, 1e-3)
        with pytest.raises(LDMError, match=r"averaged over heads for want of memory: watch fewer"):
            seen.map(4, head=0, part="cond")
        if lines == 1:
            assert_close(seen.map(4, step=1, part="cond"), whole.map(4, step=1, part="cond"), 1e-12, at_least=1e-3)
        else:
            with pytest.raises(LDMError, match=r"averaged over steps for want of memory: leave step out"):
                seen.map(4, step=1, part="cond")


def test_maps_that_fit_in_no_way_are_refused_with_what_to_leave_out(pipe, capsys):
    with pytest.raises(LDMError, match=r"more than 0\.02 MiB even averaged over heads and steps.*\(layers=.*memory="):
        with ldm.watch(pipe, self_attention=True, memory=0.02):
            pipe(**TWO)
    with ldm.watch(pipe, layers="mid_block", memory=0.02) as seen:
        pipe(**TWO)
    assert seen.maps.every_head and seen.map(4).shape == (4, 6)
    assert len(capsys.readouterr().err.splitlines()) == 2


def test_memory_may_be_without_bound(pipe):
    with ldm.watch(pipe, memory=math.inf) as seen:
        pipe(PROMPT, steps=1, **SIZE)
    assert seen.maps.every_head and seen.maps.every_call and seen.map(4).shape == (4, 6)


def test_averaging_heads_one_by_one_is_their_mean_and_half_precision_counts_in_float32():
    q, k = normal(1, 3, 5, 12, 4, dtype=F64), normal(2, 3, 5, 7, 4, dtype=F64)
    whole = explicit(q, k)
    assert_close(explicit(q, k, average=True), whole.mean(1, keepdim=True), 1e-14, at_least=0.05)
    half = explicit(q.half(), k.half())
    assert half.dtype == torch.float32 and (half - explicit(q.half().float(), k.half().float())).abs().max() == 0
    for average in (True, False):
        maps = Maps(1)
        maps.every_head = not average
        maps.add(Key("layer", "cond", 0, 0), q.half(), k.half(), (3, 4))
        assert maps.used == sum(each.nbytes for each in maps.kept.values())


# ------------------------------------------------------------------------------------------------------ refusals


def test_what_cannot_be_asked_is_refused_with_a_sentence(pipe):
    with ldm.watch(pipe) as nothing:
        pass
    with ldm.watch(pipe, layers=["down_blocks.0", "mid_block"]) as seen:
        pipe(PROMPT, steps=1, **SIZE)
    with ldm.watch(pipe) as twice:
        for _ in range(2):
            pipe(PROMPT, steps=1, **SIZE)
    refused = [
        (lambda: nothing.map(4), r"^Nothing was recorded: no call of this pipeline's network"),
        (lambda: twice.map(4), r"^2 runs were watched: say which is meant \(run=0 to run=1\)"),
        (lambda: twice.map(4, run=2), r"^Run 2 asked for, but 2 watched: counted from 0"),
        (lambda: seen.map(77), r"^Token 77 asked for, but unet\.down_blocks\.0.* knows 77: 0 to 76"),
        (lambda: seen.map("house"), r"^Tokens are positions among those the network reads.*not 'house'"),
        (lambda: seen.map([]), r"^Tokens are positions.*not \[\]"),
        (lambda: seen.map(-1), r"^Tokens are positions.*not -1"),
        (lambda: seen.map(4, head=2), r"^Head 2 asked for, but unet\.down_blocks\.0.* has 2: 0 to 1"),
        (lambda: seen.map(4, picture=1), r"^Picture 1 asked for, but there are 1: counted from 0"),
        (lambda: seen.map(4, layer="up_blocks"), r"^No maps of a layer 'up_blocks' are kept, but of unet\.down"),
        (lambda: seen.map(4, layer="mid"), r"^No maps of a layer 'mid' are kept"),
        (lambda: seen.attention("attn2"), r"^'attn2' is part of the names of 2 layers: name one, such as 'unet\.down"),
        (lambda: ldm.watch(pipe, layers="attn1").__enter__(), r"^No attention layer is named 'attn1', of the self-"),
        (lambda: ldm.watch(pipe, layers=["x"], self_attention=True).__enter__(), r"named 'x': this model has unet\."),
        (lambda: ldm.watch(pipe.unet).__enter__(), r"^watch takes a pipeline \(ldm\.load\), not a thing of type UNet"),
        (
            lambda: ldm.watch(pipe, layers=5).__enter__(),
            r"^layers is a name or several.*, not 5: those .*Record\.layers",
        ),
        (lambda: ldm.watch(pipe, memory=0).__enter__(), r"^memory must be a number of MiB above 0, not 0"),
        (lambda: ldm.watch(pipe, memory=math.nan).__enter__(), r"^memory must be a number of MiB above 0, not nan"),
        (lambda: ldm.watch(pipe, parts="cond").__enter__(), r"^parts are the names.*, \('cond',\), not 'cond'\."),
        (lambda: ldm.watch(pipe, parts=5).__enter__(), r"^parts are the names of all that a batch holds.*, not 5\."),
        (lambda: ldm.watch(pipe, parts=(1, 2)).__enter__(), r"^parts are the names.*, not \(1, 2\)\."),
        (lambda: seen.map(4, size=5), r"^size is that of the map, \(h, w\), two whole numbers of 1 or more, not 5"),
        (lambda: seen.map(4, size=(0, 5)), r"^size is that of the map.*, not \(0, 5\)"),
        (lambda: seen.map(4, size=(4, 5, 6)), r"^size is that of the map.*, not \(4, 5, 6\)"),
        (lambda: seen.map(4, size=(4, 5.5)), r"^size is that of the map.*, not \(4, 5\.5\)"),
        (lambda: seen.map(4, layer=3), r"^layer is a name or several, or parts of names, such as 'mid_block', not 3:"),
        (lambda: seen.attention([DOWN0, 3]), r"^layer is a name or several.*, 3\]: those of this model stand in"),
        (lambda: seen.map(4, head="a"), r"^Head 'a' asked for, but unet\.down_blocks\.0.* has 2: 0 to 1"),
        (lambda: seen.map(4, picture="1"), r"^Picture '1' asked for, but there are 1: counted from 0"),
    ]
    for ask, sentence in refused:
        with pytest.raises(LDMError, match=sentence):
            ask()
    assert not hooks(pipe)
