"""A trace is the run itself, step by step, with its words where they stand and colours that resemble the pictures."""

import re

import numpy as np
import pytest
import torch
from PIL import Image
from reference import assert_close, normal
from tiny_pairs import OTHERS, PROMPT, SCENES, scenes

import ldm
from ldm.errors import LDMError
from ldm.lab.trace import Trace, Word, fit_linear, pixels_of, words_of

SIZE = {"width": 48, "height": 32}
TWO = {"prompt": [PROMPT, OTHERS[1]], "steps": 4, "guidance": 4.0, "seed": 3, **SIZE}


@pytest.fixture(scope="module")
def trace(models):
    return models.ours("sd1").trace(**TWO)


@pytest.mark.parametrize("options", [{}, {"sampler": "heun"}, {"sampler": "euler-a", "guidance": 1.0}])
def test_a_trace_has_the_steps_of_the_run_bit_for_bit(models, options):
    pipe = models.ours("sd1")
    options = {**TWO, **options}
    found = pipe.trace(**options)
    steps, result = list(pipe.steps(**options)), pipe(**options)
    assert isinstance(found, Trace) and len(found) == len(steps) == 4
    for k, step in enumerate(steps):
        assert found[k] is found.steps[k] and found[k].level == step.level and not found[k].edited
        for field in ("x_before", "x", "x0", "eps", "cond", "uncond"):
            one, other = getattr(found[k], field), getattr(step, field)
            assert one is other is None or torch.equal(one, other), field
    assert found.settings == result.settings and torch.equal(found.result.x0, result.x0)
    assert [a.tobytes() for a in found.result.images] == [b.tobytes() for b in result.images]
    assert found.decode(found[3].x)[1].tobytes() == result.images[1].tobytes()
    assert found.schedule.levels == tuple([*(step.level for step in steps), steps[-1].next])
    assert {call.run for call in found.record.calls} == {0} and "vae.decoder" == found.record.beside[-1].name
    assert not pipe.watchers


def test_each_step_is_timed(models, monkeypatch):
    clock = iter(range(0, 1000, 3))
    monkeypatch.setattr("time.perf_counter", lambda: float(next(clock)))
    assert models.ours("sd1").trace(PROMPT, steps=3, **SIZE).seconds == (3.0, 3.0, 3.0)


def test_a_run_without_steps_is_traced(models):
    x0 = normal(5, 1, 4, 4, 6)
    found = models.ours("sd1").trace(PROMPT, image=x0, strength=0.0)
    assert len(found) == 0 and found.seconds == () and torch.equal(found.result.x0, x0)
    assert found.preview(x0)[0].size == (6, 4)
    with pytest.raises(LDMError, match=r"^This run takes no step, so it has no attention maps: its strength is 0"):
        found.maps("house")


# ------------------------------------------------------------------------------------------------------- words


@scenes
def test_words_stand_where_their_pieces_are():
    """The embedded tokenizer knows no lighthouse and spells it: l, i, gh, t, house."""
    tokenizer = ldm.Tokenizer.from_folder(SCENES / "tokenizer")
    found = words_of(tokenizer, "  Two LIGHTHOUSES, left of a lighthouse; café <|endoftext|> 42")
    assert [word.text for word in found] == [
        "two", "lighthouses", ",", "left", "of", "a", "lighthouse", ";", "café", "<|endoftext|>", "4", "2",
    ]  # fmt: skip
    ids = tokenizer("  Two LIGHTHOUSES, left of a lighthouse; café <|endoftext|> 42").ids[0]
    assert ids[0] == tokenizer.bos_id
    for word in found:
        assert tokenizer.decode(ids[list(word.tokens)]) == word.text
    assert [each for word in found for each in word.tokens] == list(range(1, 1 + sum(len(w.tokens) for w in found)))
    assert found[2] == Word(",", (found[1].tokens[-1] + 1,)) and len(found[6].tokens) == 5
    assert words_of(tokenizer, "") == ()


@scenes
@pytest.mark.parametrize("before", range(70, 77))
def test_words_behind_the_last_token_are_left_out(before):
    """A word that is cut within is left out as well, for its pieces say something else."""
    tokenizer = ldm.Tokenizer.from_folder(SCENES / "tokenizer")
    found = words_of(tokenizer, "a " * before + "lighthouse house")
    whole = min(before, 75) + (before + 5 <= 75) + (before + 6 <= 75)
    assert len(found) == whole and found[-1].tokens[-1] <= 75
    assert (found[-1].text == "lighthouse") == (before == 70)


def test_every_picture_has_the_words_of_its_prompt(models, trace):
    assert [[word.text for word in words][:3] for words in trace.words] == [
        ["a", "large", "red"],
        ["a", "yellow", "boat"],
    ]
    both = models.ours("sd1").trace([PROMPT, OTHERS[0]], count=2, steps=1, **SIZE)
    assert both.words[0] == both.words[1] and both.words[2] == both.words[3] and len(both.words) == 4
    assert [word.text for word in both.words[2]] == ["two", "trees"]


def test_maps_of_a_word_are_those_of_its_tokens(trace):
    words = {word.text: word for word in trace.words[1]}
    assert len(words["lighthouse"].tokens) > 1
    found = trace.maps("lighthouse", picture=1)
    assert found.shape == (4, 4, 6) and (found[0] - found[3]).abs().max() > 1e-7
    for k in range(4):
        assert torch.equal(found[k], trace.record.map(words["lighthouse"].tokens, step=k, picture=1))
    for same in (words["lighthouse"], words["lighthouse"].tokens, "Lighthouse"):
        assert torch.equal(trace.maps(same, picture=1), found)
    assert torch.equal(trace.maps(3), trace.maps((3,))) and not torch.equal(trace.maps(3), trace.maps(3, picture=1))


def test_a_word_that_is_not_there_or_there_twice_is_refused(trace):
    with pytest.raises(LDMError, match=r"'boat' is no word of the prompt 'a large red house.*trace\.words\[0\]\."):
        trace.maps("boat")
    with pytest.raises(LDMError, match=r"'hous' is no word.*Did you mean 'house'\?"):
        trace.maps("hous")
    with pytest.raises(LDMError, match=r"'a' stands several times in the prompt 'a yellow boat.*trace\.words\[1\]\.$"):
        trace.maps("a", picture=1)


@pytest.mark.parametrize("picture", [5, 2, -1, "1", 1.0, True])
def test_a_picture_that_was_not_drawn_is_refused(trace, picture):
    for ask in (lambda: trace.maps("house", picture), lambda: trace.show(picture=picture)):
        with pytest.raises(LDMError, match=rf"^The run drew the pictures 0 to 1: it has no picture {picture!r}\.$"):
            ask()


def test_a_trace_is_told_its_memory_and_its_layers(models, capsys):
    """And what is said where that is too little can be done."""
    pipe, asked = models.ours("sd1"), {"prompt": PROMPT, "steps": 2, **SIZE}
    whole, middle = pipe.trace(**asked), pipe.trace(**asked, layers="mid_block")
    house = next(word for word in whole.words[0] if word.text == "house")
    assert torch.equal(middle.maps("house")[1], whole.record.map(house.tokens, step=1, layer="mid_block"))
    with pytest.raises(LDMError, match=r"watch fewer layers \(layers=.*or give more memory \(memory=\)"):
        pipe.trace(**asked, memory=0.001)
    capsys.readouterr()
    little = pipe.trace(**asked, memory=0.3 * whole.record.maps.used / 2**20)
    assert len(capsys.readouterr().err.splitlines()) == 2
    with pytest.raises(LDMError, match=r"give pipe\.trace more \(memory=\) or fewer layers") as told:
        little.maps("house")
    mean = re.search(r"trace\.(record\.map\(.*\))\.$", str(told.value))[1]
    assert_close(eval(f"little.{mean}"), whole.maps("house").mean(0), 1e-5, at_least=1e-3)


# ----------------------------------------------------------------------------------------------------- previews


def test_the_linear_map_from_latent_to_colour_is_found():
    """Of pictures whose mean colours are linear in the latents, exactly; pixels within a position may differ."""
    matrix = normal(1, 5, 3) / 10
    pairs = []
    for seed, (h, w) in ((2, (4, 6)), (3, (3, 5))):
        x0 = normal(seed, 2, 4, h, w)
        colours = torch.einsum("bchw,cd->bdhw", x0, matrix[:4]) + matrix[4][:, None, None]
        noise = normal(seed + 10, 2, 3, h, w, 8, 8)
        noise = noise - noise.mean((-1, -2), keepdim=True)
        pairs.append((x0, (colours[..., None, None] + noise).permute(0, 1, 2, 4, 3, 5).reshape(2, 3, 8 * h, 8 * w)))
    assert_close(fit_linear(pairs), matrix, 1e-5, at_least=0.01)


@scenes
def test_previews_resemble_the_pictures():
    """They explain nine tenths of what the decoded pictures vary by: colours in their order, sides too."""
    found = ldm.load(SCENES).trace(["a large red house on snow at night", "a yellow boat"], steps=6, width=96)
    pictures = pixels_of(found.decode(found[4].x0))
    small = torch.nn.functional.adaptive_avg_pool2d(pictures, (16, 12))
    previews = found.preview(found[4].x0)
    assert [each.size for each in previews] == [(12, 16)] * 2 and isinstance(previews[0], Image.Image)
    apart = (pixels_of(previews) - small).square().mean()
    plain = (small - small.mean((0, 2, 3), keepdim=True)).square().mean()
    assert apart < plain / 10, (apart, plain)
    state = found._linear
    assert np.array_equal(np.asarray(found.preview(found[4].x0)[1]), np.asarray(previews[1])) and found._linear is state


# ------------------------------------------------------------------------------------------------------- pages


def test_a_trace_shown_by_itself_is_one_line(trace):
    assert repr(trace) == f"<Trace: 4 steps of ddim, pictures of {PROMPT!r}, {OTHERS[1]!r}>"


def test_pages_are_asked_of_the_page_writer(trace, monkeypatch):
    from ldm.lab import page

    asked = []
    monkeypatch.setattr(page, "show", lambda *args: asked.append(("show", *args)))
    monkeypatch.setattr(page, "write", lambda *args: asked.append(("write", *args)))
    trace.show(picture=1)
    trace.to_html("run.html", trace, other_picture=1)
    assert asked == [("show", trace, None, 1, None), ("write", trace, "run.html", trace, 0, 1)]
