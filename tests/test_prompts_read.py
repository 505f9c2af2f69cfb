"""Dialects as vectors and pictures: equal to the compel library, to the web UI's rules written out, to runs by hand."""

import re
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from compel import Compel, CompelForSDXL
from compel.prompt_parser import PromptParser
from pyparsing import ParserElement
from reference import assert_close
from test_prompts import COMPEL, compel_prompts, compel_says
from tiny_pairs import controlnets

from ldm.control import Control
from ldm.ensemble import Ensemble
from ldm.errors import LDMError
from ldm.lab.trace import trace
from ldm.text.embeddings import Embedding
from ldm.text.prompts import DIALECTS, a1111
from ldm.text.prompts.chunks import in_chunks
from ldm.text.prompts.weighing import emphasised
from ldm.text.words import vectors
from ldm.told import readers

F64 = torch.float64
SIZE = {"width": 32, "height": 32}
PICTURE = np.random.default_rng(2).integers(0, 256, (32, 32, 3), dtype=np.uint8)
LONG = "a large (red house:1.3), on [snow] at (night:0.6), " * 9 + "BREAK and a (small:1.4) fish"


@pytest.fixture(scope="module", autouse=True)
def memory():
    """compel's parser takes five times as long for each bracket within a bracket without one."""
    ParserElement.enable_packrat(cache_size_limit=None)
    yield
    ParserElement.disable_memoization()


# ------------------------------------------------------------------------------------------ compel


@torch.no_grad()
def test_compels_context_is_its_librarys(models):
    """Over 200 prompts: up and down, nested, long, blended, joined; where the library has an answer."""
    reference, ours = models.reference("sd1"), models.ours("sd1")
    library = Compel(tokenizer=reference.tokenizer, text_encoder=reference.text_encoder, truncate_long_prompts=False)
    parser = PromptParser()
    words = ["a large (red)1.4 house", "two (trees. at)-- night,", "(a (small)++ fish)0.3", "snow", "dog+; é"]
    long = [" ".join(words[(k * n) % 5] for k in range(n)) for n in (8, 11, 13)]
    checked = low = 0
    for prompt in COMPEL + long + compel_prompts(230, seed=4):
        try:
            parsed = parser.parse_conjunction(prompt)
            expected, _ = library.build_conditioning_tensor_for_conjunction(parsed)
        except Exception:  # of what the library refuses, words are made: `test_prompts` tells of it
            continue
        if not expected.isfinite().all():
            continue
        context = ours.encode([prompt], dialect="compel")
        assert_close(context, expected, 1e-5)
        checked += 1
        low += (context - ours.encode([""], dialect="compel").repeat(1, context.shape[1] // 77, 1)).abs().max() > 0.1
    assert checked > 200 and low > 150


@torch.no_grad()
def test_compels_context_is_its_librarys_for_sdxl(models):
    pipe = models.ours("sdxl")
    library = CompelForSDXL(models.reference("sdxl"))
    for prompt in (
        "(a (red)+ house)0.7 on snow",
        "a fish",
        "a (large house)1.3. two trees-- " * 7,
        '("a", "(b)-").and()',
    ):
        said = library(prompt, negative_prompt="two trees-, fog")
        words = pipe.read([prompt, "two trees-, fog"], dialect="compel")
        assert_close(words.context, torch.cat([said.embeds, said.negative_embeds]), 1e-5)
        assert_close(words.pooled, torch.cat([said.pooled_embeds, said.negative_pooled_embeds]), 1e-5)


@torch.no_grad()
def test_compels_weights_are_exact_in_float64(models):
    reference = models.reference("sd2", F64)
    library = Compel(
        tokenizer=reference.tokenizer, text_encoder=reference.text_encoder, truncate_long_prompts=False,
        dtype_for_device_getter=lambda device: F64,
    )  # fmt: skip
    for prompt in ("a (red)1.3 house-- on (snow)0.2", "two (trees. at)-- night, and a (fish)++ in the water " * 3):
        assert_close(models.ours("sd2", F64).encode([prompt], dialect="compel"), library(prompt), 1e-11)


# ------------------------------------------------------------------------------------------ a1111, written out


def written_out(encoder, tokenizer, prompt, xl):
    """The vectors of a prompt by transformers' encoder, chunk by chunk, with plain loops."""
    found, pooled = [], None
    for chunk in in_chunks(tokenizer, a1111.parse(prompt)):
        ids = [tokenizer.bos_id, *(token.id for token in chunk), tokenizer.eos_id]
        ids += [tokenizer.pad_id] * (77 - len(ids))
        said = encoder(torch.tensor([ids]), output_hidden_states=True)
        z = said.hidden_states[-2][0] if xl else said.last_hidden_state[0]
        mean, scaled = z.mean(), z.clone()
        for position, token in enumerate(chunk, start=1):
            scaled[position] *= token.weight
        found.append(scaled * (mean / scaled.mean()))
        pooled = said.text_embeds if pooled is None and xl and hasattr(said, "text_embeds") else pooled
    return torch.cat(found)[None], pooled


@torch.no_grad()
@pytest.mark.parametrize("name", ["sd1", "sd2", "sdxl", "refiner"])
def test_long_and_weighted_prompts_equal_what_the_rules_say(models, name):
    pipe, reference = models.ours(name, F64), models.reference(name, F64)
    encoders = [
        getattr(reference, part) for part in ("text_encoder", "text_encoder_2") if getattr(reference, part, None)
    ]
    tokenizers = [each.tokenizer for each in readers(pipe)]
    for prompt in (LONG, "a (house:1.5)"):
        words = pipe.read([prompt], dialect="a1111")
        sides = [written_out(*pair, prompt, pipe.xl) for pair in zip(encoders, tokenizers, strict=True)]
        assert_close(words.context, torch.cat([context for context, _ in sides], dim=-1), 1e-11)
        if pipe.xl:
            assert_close(words.pooled, sides[-1][1], 1e-11)
    assert pipe.encode([LONG], dialect="a1111").shape[1] > 2 * 77


@torch.no_grad()
def test_clip_skip_holds_for_both_prompts_in_a_dialect(models):
    pipe = models.ours("sd1", F64)
    (reader,) = readers(pipe)
    settings = pipe.settings("a house", negative="a fish", dialect="a1111", steps=2, **SIZE)
    for skip in (1, 2):
        said = pipe.encode(["a (house:1.0)"], skip, "a1111")
        assert torch.equal(said, vectors(reader, pipe.tokenizer(["a house"]).ids, skip)[0])
    x = torch.randn(1, 4, 4, 4, dtype=F64)
    level = pipe.schedule(2)[0]
    skipped = pipe.network(settings, clip_skip=1)(x, level)
    for dialect, both in (("compel", True), ("plain", False)):
        other = pipe.network(replace(settings, dialect=dialect), clip_skip=1)(x, level)
        assert torch.equal(other.cond, skipped.cond) and torch.equal(other.uncond, skipped.uncond) == both


def test_a_prompt_without_signs_is_the_same_in_every_dialect(models):
    for name in ("sd1", "sdxl"):
        pipe = models.ours(name, F64)
        options = {"negative": ["fog", ""], "steps": 2, "seed": 3, **SIZE}
        plain, web, compel = (pipe(["a house", "two trees"], dialect=each, **options).x0 for each in DIALECTS)
        assert_close(web, plain, 1e-10)  # prompts are read one by one there
        assert torch.equal(web, compel)


@torch.no_grad()
@pytest.mark.parametrize("dialect", ["a1111", "compel"])
def test_what_is_said_of_a_prompt_does_not_depend_on_its_neighbours(models, dialect):
    pipe = models.ours("sdxl")
    prompts = ["a (red:1.4) [house] (fog)1.2", "two trees-", "a (small) fish"]
    together = pipe.read(prompts, dialect=dialect)
    for k, prompt in enumerate(prompts):
        alone = pipe.read([prompt], dialect=dialect)
        assert torch.equal(alone.context[0], together.context[k]) and torch.equal(alone.pooled[0], together.pooled[k])
    # Of a longer neighbour's batch, the empty prompt's chunks stand behind.
    mixed, empty = pipe.read(["two trees", "red house, " * 60], dialect=dialect), pipe.read([""], dialect=dialect)
    alone = pipe.read(["two trees"], dialect=dialect)
    rest = empty.context.repeat(1, mixed.context.shape[1] // 77 - 1, 1)
    assert torch.equal(mixed.context[:1], torch.cat([alone.context, rest], dim=1)) and rest.shape[1] >= 77
    assert torch.equal(mixed.pooled[:1], alone.pooled)


def test_one_by_one_a_picture_is_as_alone_beside_a_longer_prompt(models, capsys):
    pipe, long = models.ours("sd1"), "red house, " * 40
    options = {"steps": 2, "dialect": "a1111", **SIZE}
    both = pipe(["two (trees:1.2)", long], one_by_one=True, **options).x0
    assert torch.equal(both[:1], pipe("two (trees:1.2)", **options).x0)
    assert capsys.readouterr().err == ""  # none was filled up
    assert not torch.equal(both[:1], pipe(["two (trees:1.2)", long], **options).x0[:1])
    assert re.match(r"The prompts have 1 to \d chunks: in one batch shorter ones are filled", capsys.readouterr().err)


def test_wherever_a_picture_depends_on_its_neighbours_it_is_said(models, capsys):
    pipe, long = models.ours("sd1", F64), "a " * 80
    cases = [
        (["a", "a"], ["b", long], 3.0, "The prompts and negative ones have 1 to 2 chunks"),
        (["a [b:" + long + ":1]", "a"], "", 3.0, "The prompts have 1 to 2 chunks"),
        ([long, "a"], ["b", long], 3.0, ""),  # both are as long as alone
        (["a", "b"], long, 3.0, ""),
        (["a", "a"], ["b", long], 1.0, "Without guidance (1 or less) the negative prompt does nothing."),
    ]
    for prompts, negative, guidance, line in cases:
        options = {"steps": 2, "guidance": guidance, "dialect": "a1111", **SIZE}
        alone = pipe(prompts[1], negative=negative if isinstance(negative, str) else negative[1], seed=1, **options).x0
        first = pipe(prompts[0], negative=negative if isinstance(negative, str) else negative[0], **options).x0
        capsys.readouterr()
        both = pipe(prompts, negative=negative, **options).x0
        said = capsys.readouterr().err
        assert said.startswith(line) and bool(said) == bool(line), prompts
        apart = (both - torch.cat([first, alone])).abs().max()
        assert (apart > 1e-6) == ("chunks" in line), (prompts, apart)
    blend = '("a", "b").blend(1, 1)'  # two texts, of one length
    pipe([blend, "a"], dialect="compel", steps=1, **SIZE)
    assert capsys.readouterr().err == ""


@torch.no_grad()
def test_prompt_and_negative_are_brought_to_one_length(models):
    pipe = models.ours("sdxl", F64)
    told = pipe.settings(["a house", "two trees"], negative=["a, " * 50, None], dialect="a1111", **SIZE)
    from ldm.text.prompts.schedules import Script
    from ldm.told import read_negative

    words = pipe.read(told.prompt, dialect="a1111")
    cond, uncond = read_negative(pipe, Script(told.prompt, told.negative), words, "a1111")
    empty = pipe.read([""], dialect="a1111").context
    assert cond.context.shape == uncond.context.shape == (2, 154, 44)
    assert torch.equal(cond.context[:, 77:], empty.repeat(2, 1, 1)) and torch.equal(cond.context[:, :77], words.context)
    assert not uncond.context[1].any() and not uncond.pooled[1].any()  # zeros where there is no negative prompt
    assert torch.equal(uncond.context[:1], pipe.encode([told.negative[0]], dialect="a1111"))


# ------------------------------------------------------------------------------------------ other words at other steps

WAYS = {
    "ddim": {"sampler": "ddim"},
    "multistep": {"sampler": "dpm++2m"},
    "with noise": {"sampler": "euler-a"},
    "unipc": {"sampler": "unipc2"},
    "halves apart": {"sampler": "euler", "together": False},
    "tiles": {"sampler": "ddim", "width": 64, "tile": 32},
    "from a picture": {"sampler": "ddim", "steps": 8, "strength": 0.5},
    "unguided": {"sampler": "euler", "guidance": 1.0},
}


def by_hand(pipe, first, then, behind, **options):
    """A run that has the words `first` for so many steps, and then goes on with others."""
    steps = []
    for step in pipe.steps(first, **options):
        steps.append(step)
        if len(steps) == behind:
            break
    return [*steps, *pipe.steps(then, after=steps, **options)]


@pytest.mark.parametrize("way", WAYS)
def test_a_schedule_is_the_run_put_together_by_hand(models, way):
    pipe = models.ours("sd1")
    options = {"steps": 4, "seed": 5, "guidance": 3.0, "dialect": "a1111", **SIZE, **WAYS[way]}
    if way == "from a picture":
        options["image"] = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(1))
    negative = "" if way == "unguided" else "[fog:(snow:1.3):3]"
    steps = list(pipe.steps("a [red:(blue:1.4):0.5] house", negative=negative, **options))
    first = by_hand(pipe, "a red house", "a (blue:1.4) house", 2, negative="fog" * bool(negative), **options)[:3]
    last = pipe.steps("a (blue:1.4) house", negative="(snow:1.3)" * bool(negative), after=first, **options)
    expected = [*first, *last]
    assert len(steps) == len(expected) == 4
    for step, other in zip(steps, expected, strict=True):
        assert torch.equal(step.x, other.x)
    plain = list(pipe.steps("a red house", negative="fog" * bool(negative), **options))
    assert not torch.equal(steps[-1].x, plain[-1].x)


def test_a_method_that_asks_twice_is_answered_by_the_levels_row(models):
    pipe = models.ours("sd1", F64)
    options = {"steps": 4, "sampler": "heun", "seed": 5, "dialect": "a1111", **SIZE}
    found = pipe("a [red|blue] house", **options).x0
    networks = [pipe.network(pipe.settings(f"a {color} house", **options)) for color in ("red", "blue")]
    expected = pipe("a house", network=lambda x, level: networks[min(level.i, 3) % 2](x, level), **options).x0
    assert torch.equal(found, expected) and found.abs().mean() > 0.1


def test_several_prompts_change_each_at_its_time(models):
    pipe = models.ours("sd1")
    options = {"steps": 3, "dialect": "a1111", "sampler": "euler", "guidance": 2.0, **SIZE}
    prompts = ["a [red:blue:1] house", "[two|three] trees", "[" + "fog, " * 50 + "::2] a fish"]
    both = pipe(prompts, one_by_one=True, seed=2, **options).x0
    for k, prompt in enumerate(prompts):
        assert torch.equal(both[k : k + 1], pipe(prompt, seed=2 + k, **options).x0)
    together = pipe(prompts[:2], seed=2, **options).x0
    assert_close(together, both[:2], 1e-4)


def test_controlnets_read_the_words_of_the_step_too(models):
    pipe = models.ours("sd1")
    _, net = controlnets(models, "sd1")
    control = Control(net, PICTURE)
    options = {"steps": 2, "sampler": "ddim", "dialect": "a1111", "control": control, **SIZE}
    steps = list(pipe.steps("a [red:blue:1] house", **options))
    expected = by_hand(pipe, "a red house", "a blue house", 1, **options)
    assert torch.equal(steps[-1].x, expected[-1].x)


def test_a_model_that_edits_changes_its_words_too(task_models):
    pipe = task_models.ours("edit")
    options = {"steps": 2, "sampler": "ddim", "dialect": "a1111", "image": PICTURE, "seed": 1}
    steps = list(pipe.steps("make it [red:blue:1]", **options))
    expected = by_hand(pipe, "make it red", "make it blue", 1, **options)
    assert torch.equal(steps[-1].x, expected[-1].x)


def test_base_and_refiner_are_one_road(models):
    base, refiner = models.ours("sdxl"), models.ours("refiner")
    two = Ensemble(base, refiner, at=0.6)
    options = {"steps": 5, "seed": 2, "sampler": "euler", **SIZE}
    found = [step.x for step in two.steps("a [red:blue:4] house", dialect="a1111", **options)]
    assert len(found) == 5  # 3 of the base; of the refiner 1 with red, and 1 with blue
    first = list(two.steps("a red house", dialect="a1111", **options))
    assert all(torch.equal(x, step.x) for x, step in zip(found[:4], first[:4], strict=True))
    run = two.take_over(first[2], base.settings("a blue house", dialect="a1111", **options), two.shared(
        base.settings("a blue house", dialect="a1111", **options), options, {}))  # fmt: skip
    *_, last = run.steps(first[3:4])
    assert torch.equal(found[4], last.x) and not torch.equal(found[4], first[4].x)


def test_inversion_walks_the_words_from_their_end(models):
    pipe = models.ours("sd1", F64)
    image = torch.randn(1, 4, 4, 4, dtype=F64, generator=torch.Generator().manual_seed(3))
    options = {"steps": 3, "refine": 30, "dialect": "a1111"}
    noise = pipe.invert(image, "a [red:blue:2] house", **options)
    back = pipe("a [red:blue:2] house", latents=noise, sampler="ddim", steps=3, guidance=1.0, dialect="a1111", **SIZE)
    assert_close(back.x0, image, 1e-6)
    other = pipe("a red house", latents=noise, sampler="ddim", steps=3, guidance=1.0, dialect="a1111", **SIZE)
    assert (other.x0 - image).abs().max() > 1e-3


# ------------------------------------------------------------------------------------------ what is told of it


def test_a_trace_tells_words_by_chunks_and_that_a_schedule_has_none(models):
    pipe = models.ours("sd1")
    draw = partial(trace, pipe, steps=2, guidance=2.0, dialect="a1111", **SIZE)
    found = draw("a (house:1.2) BREAK two trees")
    (word,) = [each for each in found.words[0] if each.text == "trees"]
    assert min(word.tokens) > 77 and found.maps("trees").shape == (2, 4, 4) and found.note(0) == ""
    changing = draw("a [house|fish]")
    with pytest.raises(
        LDMError, match=r"^There are no attention maps of words, for the prompt has other words at other"
    ):
        changing.maps("house")
    from ldm.lab.shown import maps_of

    assert maps_of(changing, 0)[::2] == ([], changing.note(0)) and changing.words == ((),)


def test_what_is_said_is_said_once_and_of_the_whole_prompt(models, capsys):
    pipe = models.ours("sd1")
    capsys.readouterr()
    pipe(["a cat AND [a|b]"] * 2, steps=3, dialect="a1111", **SIZE)
    assert capsys.readouterr().err.count("\n") == 1
    pipe("a house (old)", negative="(fog:1.2)", guidance=1.0, steps=1, **SIZE)  # it isn't read: no word of its signs
    assert capsys.readouterr().err == "Without guidance (1 or less) the negative prompt does nothing.\n"


def test_a_run_by_strength_has_the_words_of_its_own_steps(models):
    pipe, image = models.ours("sd1"), torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(1))
    options = {"image": image, "steps": 10, "strength": 0.5, "dialect": "a1111", "guidance": 2.0}
    for prompt, first in (("[house:fish:6] on snow", "house"), ("[house:fish:0.2] on snow", None)):
        found = trace(pipe, prompt, **options)
        assert len(found) == 5 and (found.words[0][0].text if found.words[0] else None) == first


def test_words_of_several_stages_are_asked_for_one_by_one(models):
    pipe = models.ours("sd1")
    for ask in (pipe.read, pipe.encode):
        with pytest.raises(LDMError, match=r"^'\[house:fish:0.5\]' has other words at other steps.*stages\("):
            ask(["a", "[house:fish:0.5]"], dialect="a1111")
    assert pipe.encode(["[house]", "[house:fish:x]"], dialect="a1111").shape == (2, 77, 24)
    # What a stage is, is read as it stands, even where it looks like one.
    odd = pipe("[a:b:[3|x]]", dialect="a1111", steps=2, **SIZE).x0
    assert odd.isfinite().all()


def test_a_trace_tells_its_dialect_and_what_is_on(models):
    from ldm.lab.shown import headline

    pipe = models.ours("sd1")
    with pipe.embedding(Embedding("<toy>", {"text_encoder": torch.randn(2, 24)}, Path("toy.pt"), "diffusers")):
        found = trace(pipe, "a (<toy>:1.2)", steps=1, dialect="a1111", **SIZE)
    assert repr(found) == "<Trace: 1 steps of ddim with word <toy>, pictures of 'a (<toy>:1.2)', read as a1111>"
    assert " · read as a1111 · word <toy> · 32 × 32 pixels" in headline(found, 0, False)
    again = trace(pipe, "a fish", steps=1, **SIZE)
    assert again.added == () and "read as" not in repr(again) + headline(again, 0, False)


def test_a_learnt_word_that_no_prompt_has_is_said(models, capsys):
    pipe, options = models.ours("sd1"), {"steps": 1, **SIZE}
    with pipe.embedding(Embedding("<toy>", {"text_encoder": torch.randn(2, 24)}, Path("toy.pt"), "diffusers")):
        capsys.readouterr()
        for more in (
            {"prompt": "a fish"}, {"prompt": "a toy"}, {"prompt": "a fish", "negative": "<toy>", "guidance": 1.0},
        ):  # fmt: skip
            pipe(**more, **options)
            assert "The learnt word '<toy>' is in no prompt of this run" in capsys.readouterr().err, more
        for more in (
            {"prompt": "a <TOY>"}, {"prompt": ["a fish", "[a:(<toy>:1.2):1]"], "dialect": "a1111", "steps": 2},
            {"prompt": "a <toy>++", "dialect": "compel"}, {"prompt": "a fish", "negative": "<toy>", "guidance": 2.0},
        ):  # fmt: skip
            pipe(**{**options, **more})
            assert "learnt word" not in capsys.readouterr().err, more


def test_weights_that_leave_little_of_the_mean_are_said_once(models, capsys):
    context = torch.randn(2, 77, 24) + 1
    weights = [[1.0] * 77, [1.0, *[1.5] * 10, *[1.0] * 66]]
    emphasised(context, weights)
    assert capsys.readouterr().err == ""
    for weight in (0.0, 0.1, 9.0, -1.0):
        emphasised(context, [weights[0], [1.0, *[weight] * 75, 1.0]])
        said = capsys.readouterr().err
        assert said.startswith("A prompt's weights move the mean of its vectors so far") and said.count("\n") == 1
    pipe = models.ours("sdxl")
    pipe("(a [red|blue|small] house:-0.1)", steps=3, dialect="a1111", negative="(fog:-1)", **SIZE)
    said = capsys.readouterr().err  # by two encoders, at three steps, of two prompts
    assert said.count("A prompt's weights move the mean") == 1 and said.count("\n") == 1


# ------------------------------------------------------------------------------------------ where the library is wrong


@torch.no_grad()
def test_defect_compel_stops_or_is_silent(models):
    """`tests/REFERENCE_DEFECTS.md`: each of these is a prompt of ours."""
    reference, ours = models.reference("sd1"), models.ours("sd1")
    library = Compel(tokenizer=reference.tokenizer, text_encoder=reference.text_encoder, truncate_long_prompts=False)
    for prompt, error in (("()", IndexError), ('a ""0.5 b', TypeError), ('("a").blend()x', Exception)):
        with pytest.raises(error):
            library(prompt)
        assert ours.encode([prompt], dialect="compel").isfinite().all()
    assert library('("a", "b").blend(1, -1)').isnan().any()
    assert ours.encode(['("a", "b").blend(1, -1)'], dialect="compel").isfinite().all()
    assert torch.equal(library('("a", "b").and() a cat'), library('("a", "b").and()'))
    assert compel_says(PromptParser(), r"\\(")[0][0][0] == (("(", 1.0),)  # both backslashes go
    second = CompelForSDXL(models.reference("sdxl"))
    with pytest.raises(AttributeError):
        second('("a", "b").and(1, 0.5)')
    assert models.ours("sdxl").encode(['("a", "b").and(1, 0.5)'], dialect="compel").shape == (1, 154, 44)
