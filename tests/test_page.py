"""The page of a run holds the run's own numbers; nothing of a prompt acts in it; and `ldm explain` writes it."""

import base64
import io
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import SIZE, tiny_model

import ldm
from ldm import loading, scenes
from ldm.cli import explain, main
from ldm.errors import LDMError
from ldm.io.atomic import atomic_file
from ldm.lab import page, shown
from ldm.lab.trace import Trace, Word
from ldm.pipeline import Pipeline
from ldm.run import Result
from ldm.sampling import Step
from ldm.schedules import Level

PROMPT = "a red house, a large red house"
EVIL = 'a "red" </script><script>alert(1)</script> & <img src=x onerror=alert(2)> house\'s $mark $stepper'


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def pipe(model):
    return ldm.load(model)


@pytest.fixture(scope="module")
def trace(pipe):
    return pipe.trace(PROMPT, seed=3, steps=4, height=2 * SIZE)


@pytest.fixture(scope="module")
def data(trace):
    return data_of(page.show(trace).html)["runs"][0]


def data_of(text):
    """What the script is told: the JSON in the page."""
    return json.loads(re.search(r"^const DATA = (.*);$", text, re.MULTILINE)[1])


def numbers(text, kind, *shape):
    return np.frombuffer(base64.b64decode(text), kind).reshape(shape).astype(float)


class Outside(HTMLParser):
    """Tags, their attributes and the text of a page, scripts and styles being no text."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.text, self.inside = [], "", ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.inside = tag

    def handle_endtag(self, tag):
        self.inside = ""

    def handle_data(self, data):
        self.text += "" if self.inside in ("script", "style") else data

    def images(self):
        return [attributes for tag, attributes in self.tags if tag == "img"]


def picture_of(attributes):
    kind, _, data = attributes["src"].partition(";base64,")
    assert kind == "data:image/webp"
    return Image.open(io.BytesIO(base64.b64decode(data)))


# ---------------------------------------------------------------------------------------------- its numbers


def test_latents_are_those_of_the_run(trace, data):
    latents = [step.x_before for step in trace.steps] + [trace.result.x0]
    n, (_, c, h, w) = len(latents), latents[0].shape
    assert (data["channels"], data["height"], data["width"]) == (c, h, w) and data["shrunk"] == ""
    scale = np.array(data["x"]["scale"])
    found = numbers(data["x"]["bytes"], np.int8, n, c, h, w) / 127 * scale[:, None, None, None]
    for k, x in enumerate(latents):
        x = x[0].numpy()
        assert scale[k] == pytest.approx(np.abs(x).max(), rel=1e-4)
        assert np.abs(found[k] - x).max() <= 0.505 * scale[k] / 127 + 1e-4 * scale[k]


def test_guidance_is_that_of_the_run(trace, data):
    pulls = [(step.cond - step.uncond)[0].numpy() for step in trace.steps]
    scale = np.array(data["guidance"]["scale"])
    found = numbers(data["guidance"]["bytes"], np.int8, *np.shape(pulls)) / 127 * scale[:, None, None, None]
    assert np.abs(found - pulls).max((1, 2, 3)) == pytest.approx(0.5 * scale / 127, rel=0.1)
    assert data["guidance"]["norm"] == pytest.approx([np.linalg.norm(pull) for pull in pulls], rel=1e-4)
    assert min(data["guidance"]["norm"]) > 1e-3


def test_words_and_their_maps_are_those_of_the_record(trace, data):
    words = trace.words[0]
    assert [word["text"] for word in data["words"]] == [word.text for word in words]
    keys = [word["key"] for word in data["words"]]
    assert keys == ["a 1", "red 1", "house 1", ", 1", "a 2", "large 1", "red 2", "house 2"]
    for word, own in zip(words, data["words"], strict=True):
        maps = trace.maps(word).numpy()
        found = numbers(own["bytes"], np.uint8, len(trace), *data["maps"]) / 255 * own["peak"]
        assert own["peak"] == pytest.approx(maps.max(), rel=1e-4)
        assert np.abs(found - maps).max() <= 0.51 * own["peak"] / 255


def test_previews_and_rows_are_those_of_the_run(trace, data):
    cheap = [np.asarray(trace.preview(x0)[0]) for x0 in (*(step.x0 for step in trace.steps), trace.result.x0)]
    found = numbers(data["preview"]["bytes"], np.uint8, *np.shape(cheap))
    assert np.array_equal(found, np.array(cheap, dtype=float))
    rows = [[level.i, level.t, level.alpha, level.sigma] for level in trace.schedule.levels]
    assert [row[:4] for row in data["rows"]] == [pytest.approx(row, rel=1e-4) for row in rows]
    assert [row[4] for row in data["rows"]] == [*(pytest.approx(s, rel=1e-4) for s in trace.seconds), None]
    assert data["settings"] == "seed 3 · dpm++2m, 4 steps · guidance 2 · 32 × 64 pixels"


def drawn(n, words=("a", "large", "red", "house", "on", "snow", "at", "night")):
    """A trace in sizes and likeness as the embedded model's are, but drawn by the world itself."""
    generator = torch.Generator().manual_seed(0)
    settings = ldm.load("scenes").settings(" ".join(words), steps=n)
    image = Image.fromarray(scenes.draw(seed=7)[0].image)

    def random(*shape):
        return torch.randn(shape, generator=generator)

    levels = [Level(k, float(n - k), (k / n) ** 0.5, (1 - k / n) ** 0.5) for k in range(n + 1)]
    latents = [random(1, 4, 16, 16) for _ in range(n + 1)]
    steps = [
        Step(a, b, 2 * x, x, x, x, x, random(1, 4, 16, 16))
        for a, b, x in zip(levels, levels[1:], latents, strict=False)
    ]
    maps = {(word, k): random(16, 16).abs() for word in range(len(words)) for k in range(n)}
    record = SimpleNamespace(
        calls=[], maps=SimpleNamespace(every_call=True), map=lambda tokens, step, picture: maps[tokens[0], step]
    )

    def decode(x0):
        k = next(k for k, x in enumerate(latents) if torch.equal(x[0], x0[0]))
        return [Image.blend(Image.new("RGB", image.size, (40 * (k % 6), 90, 160)), image, (k + 1) / (n + 1))]

    told = (tuple(Word(word, (k,)) for k, word in enumerate(words)),)
    result = Result([image], latents[-1], settings)
    return Trace(settings, None, steps, record, result, told, decode, (0.1,) * n)


def test_the_sheet_shows_each_prediction_in_its_place_and_last_the_picture():
    run = drawn(12)
    read = shown.read(run, 0)
    sheet, grid = Image.open(io.BytesIO(read.steps)).convert("RGB"), read.data["sheet"]
    images = [run.decode(step.x0)[0] for step in run.steps] + run.result.images
    (w, h), (across, down) = grid["picture"], grid["cell"]
    assert (w, h) == images[0].size and not across % 16 and not down % 16
    for k in range(len(images)):
        x, y = k % grid["columns"] * across, k // grid["columns"] * down
        found = np.asarray(sheet.crop((x, y, x + w, y + h)), dtype=float)
        far = [np.abs(found - np.asarray(each, dtype=float)).mean() for each in images]
        assert far.index(min(far)) == k and far[k] < 4
    laid = Image.open(io.BytesIO(read.words))
    assert laid.width > 8 * 96 and np.asarray(laid.convert("L")).std() > 20


def test_pages_are_small():
    assert len(page.show(drawn(12)).html.encode()) < 150_000
    assert len(page.show(drawn(25)).html.encode()) < 300_000


def test_large_latents_and_pictures_are_shown_smaller_and_that_is_said(trace):
    big = torch.randn(1, 4, 48, 96, generator=torch.Generator().manual_seed(0))
    steps = [replace(step, x_before=big, x0=big, cond=big, uncond=0 * big) for step in trace.steps]
    images = [Image.new("RGB", (768, 384), "red")]
    run = replace(trace, steps=steps, result=replace(trace.result, x0=big, images=images), decode=lambda x0: images)
    found = shown.read(run, 0).data
    assert (found["height"], found["width"]) == (16, 32) == (found["preview"]["height"], found["preview"]["width"])
    assert found["shrunk"] == ", averaged down from 48 × 96" and found["sheet"]["picture"] == [256, 128]
    x = numbers(found["x"]["bytes"], np.int8, 5, 4, 16, 32)[2] / 127 * found["x"]["scale"][2]
    means = big[0].reshape(4, 16, 3, 32, 3).mean((2, 4)).numpy()
    assert np.abs(x - means).max() < found["x"]["scale"][2] / 200
    assert found["guidance"]["norm"][0] == pytest.approx(big.norm().item(), rel=1e-4)  # that of the whole


def test_of_a_batch_one_picture_is_shown(pipe):
    run = pipe.trace(["a red house", "a tree"], seed=5, steps=2)
    read = shown.read(run, 1)
    assert [word["text"] for word in read.data["words"]] == ["a", "tree"]
    assert "seed 6" in read.data["settings"]
    x = numbers(read.data["x"]["bytes"], np.int8, 3, 4, 4, 4)[1] / 127 * read.data["x"]["scale"][1]
    assert np.abs(x - run.steps[1].x_before[1].numpy()).max() < read.data["x"]["scale"][1] / 200
    maps = numbers(read.data["words"][1]["bytes"], np.uint8, 2, 4, 4) / 255 * read.data["words"][1]["peak"]
    assert np.allclose(maps, run.maps("tree", picture=1), atol=read.data["words"][1]["peak"] / 500)
    norm = (run.steps[0].cond - run.steps[0].uncond)[1].norm().item()
    assert read.data["guidance"]["norm"][0] == pytest.approx(norm, rel=1e-4)
    with pytest.raises(LDMError, match="drew the pictures 0 to 1: it has no picture 2"):
        page.show(run, picture=2)
    with pytest.raises(LDMError, match="drew one picture, number 0: it has no picture -1"):
        page.show(pipe.trace("a tree", steps=1), picture=-1)


def test_two_pictures_of_one_batch_stand_side_by_side(pipe, tmp_path):
    batch, one = pipe.trace(["a red house", "a tree"], seed=5, steps=1), pipe.trace("a tree", seed=6, steps=1)
    apart = [shown.read(batch, 0, "A"), shown.read(batch, 1, "B")]
    for given in ((batch, batch, 0, 1), (batch, None, 0, 1)):
        stepper = page.show(*given)
        assert [run.data for run in stepper.runs] == [run.data for run in apart]
        assert data_of(stepper.html)["differs"] == "A and B differ in seed (5 | 6), prompt."
    page.write(batch, tmp_path / "run.html", batch, 1, 0)
    text = (tmp_path / "run.html").read_text(encoding="utf-8")
    assert [run["settings"][:6] for run in data_of(text)["runs"]] == ["seed 6", "seed 5"] and "<title>a tree<" in text
    assert data_of(page.show(batch, batch, 1).html)["differs"].startswith("A and B have the same settings")
    alone = data_of(page.show(batch, one, 1).html)  # of which there is but one
    assert alone["differs"].startswith("A and B have the same settings") and len(alone["runs"]) == 2
    with pytest.raises(LDMError, match="drew one picture, number 0: it has no picture 1"):
        page.show(batch, one, 1, 1)


@pytest.mark.parametrize("other", [3, "x", []])
def test_beside_a_run_stands_a_run(trace, other):
    kind = type(other).__name__
    with pytest.raises(LDMError, match=rf"^other is a second run, a Trace \(.*of type {kind}: .* such as picture=1\."):
        trace.show(other)


# ---------------------------------------------------------------------------------------------- what a run lacks


def test_a_run_without_guidance_says_so(pipe):
    found = shown.read(pipe.trace("a tree", steps=2, guidance=1), 0).data
    assert found["guidance"] is None and found["unguided"] == "This run is not guided: there is nothing to subtract."
    assert "not guided" in found["settings"]


def test_a_step_without_guidance_has_no_norm(trace):
    steps = [replace(step, uncond=None) if step.i == 1 else step for step in trace.steps]
    found = shown.read(replace(trace, steps=steps), 0).data["guidance"]
    assert [norm is None for norm in found["norm"]] == [False, True, False, False]


def test_a_run_of_part_of_the_road_or_of_no_step(pipe, trace):
    image = trace.result.images[0].crop((0, 0, SIZE, SIZE))
    found = shown.read(pipe.trace("a tree", image=image, steps=4, strength=0.5), 0).data
    assert [row[0] for row in found["rows"]] == [2, 3, 4] and "strength 0.5, so 2 of the steps" in found["settings"]
    found = shown.read(pipe.trace("a tree", image=image, steps=4, strength=0), 0).data
    assert [row[0] for row in found["rows"]] == [4] and found["words"] == []
    assert found["unguided"] == found["notes"][0] == "This run takes no step: its strength is 0."
    assert found["sentence"] == [["a tree", -1]]


def test_a_run_that_is_led_says_so(trace):
    assert "ControlNet" not in shown.read(trace, 0).about
    calls = [SimpleNamespace(residuals=None), SimpleNamespace(residuals=torch.ones(3, 2))]
    record = SimpleNamespace(calls=calls, maps=trace.record.maps, map=trace.record.map)
    assert " · led by ControlNet · " in shown.read(replace(trace, record=record), 0).about


def test_missing_maps_are_said(trace):
    def refuse(*args, **options):
        raise LDMError("A run in tiles has no maps.")

    record = SimpleNamespace(calls=[], maps=SimpleNamespace(every_call=True), map=refuse)
    read = shown.read(replace(trace, record=record), 0)
    assert read.data["notes"] == ["Without attention maps. A run in tiles has no maps."] and read.words is None
    assert page.fallback(read, 0).count("<img") == 1
    mean = SimpleNamespace(
        calls=[], maps=SimpleNamespace(every_call=False), map=lambda tokens, picture: trace.record.map(tokens)
    )
    found = shown.read(replace(trace, record=mean), 0).data
    assert found["notes"] == [
        "The attention maps are the mean over all steps: single ones took more memory than was given."
    ]
    maps = numbers(found["words"][2]["bytes"], np.uint8, 4, *found["maps"])
    assert np.array_equal(maps[0], maps[3]) and maps.std() > 1


@pytest.mark.parametrize(
    "prompt, words, expected",
    [
        ("A Red house", ["a", "red", "house"], [["A", 0], ["Red", 1], ["house", 2]]),
        ("red, red", ["red", ",", "red"], [["red", 0], [",", 1], ["red", 2]]),
        ("a tree and more", ["a", "tree"], [["a", 0], ["tree", 1], ["and more", -1]]),
        ("ﬁre", ["fire"], [["fire", 0]]),
        ("", [], [["(no words)", -1]]),
    ],
)  # fmt: skip
def test_the_sentence_stays_as_it_was_written(prompt, words, expected):
    assert shown.pieces(prompt, words) == expected


# ---------------------------------------------------------------------------------------------- its form


def test_nothing_in_a_prompt_acts(pipe, tmp_path):
    run = pipe.trace(EVIL, steps=1, negative=EVIL, width=16, height=16)
    page.write(run, tmp_path / "run.html", run)
    text = (tmp_path / "run.html").read_text(encoding="utf-8")
    outside = Outside(text)
    assert [tag for tag, _ in outside.tags if tag in ("script", "img")] == ["img", "img", "img", "img", "script"]
    assert text.count("<script") == text.count("</script") == 1
    assert not [name for _, attributes in outside.tags for name in attributes if name.startswith("on")]
    assert EVIL in outside.images()[0]["alt"] and EVIL in outside.text
    assert re.search(r"<title>(.*)</title>", text)[1].count("&lt;/script&gt;") == 2
    found = data_of(text)["runs"][0]
    assert EVIL in found["settings"] and "".join(text for text, _ in found["sentence"]) == EVIL.replace(" ", "")


def test_the_page_needs_nothing_from_elsewhere(trace, tmp_path):
    page.write(trace, tmp_path / "run.html")
    text = (tmp_path / "run.html").read_text(encoding="utf-8")
    policy = next(a["content"] for _, a in Outside(text).tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.split()[:2] == ["default-src", "'none';"] and "http" not in policy
    assert set(re.findall(r"https?://[^\"' ]*", text)) == {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xhtml"}
    assert not re.search(r"\b(fetch|import|XMLHttpRequest|WebSocket|@font-face|localStorage)\b", text)
    assert page.is_page(tmp_path / "run.html")


def test_pictures_stand_where_scripts_are_blocked(trace):
    text = page.show(trace).html
    outside = Outside(text)
    steps, words = outside.images()
    assert steps["alt"].startswith(f"4 predicted pictures and the result of the run “{PROMPT}”")
    assert words["alt"].endswith("for the words a, red, house, ,, a, large, red, house")
    for each in (steps, words):
        assert picture_of(each).size == (int(each["width"]), int(each["height"]))
    assert text.index("<img") < text.index("<script") and "style" not in dict(outside.tags)
    bundle = page.show(trace)._repr_mimebundle_()
    assert (
        bundle["text/html"] == text and Image.open(io.BytesIO(base64.b64decode(bundle["image/jpeg"]))).format == "JPEG"
    )
    assert bundle["text/plain"].startswith(f"<stepper: “{PROMPT}”, seed 3")
    assert trace.show()._repr_mimebundle_() == bundle


def test_the_same_run_makes_the_same_page_and_another_another(trace, pipe):
    other = pipe.trace(PROMPT, seed=4, steps=4, height=2 * SIZE)
    tokens = [data_of(page.show(*each).html)["token"] for each in ((trace,), (trace,), (other,), (trace, other))]
    assert tokens[0] == tokens[1] and len(set(tokens)) == 3
    assert f'data-ldm-stepper="{tokens[0]}"' in page.show(trace).html


def test_a_page_is_written_whole_or_not_at_all(trace, tmp_path, monkeypatch):
    path = tmp_path / "run.html"
    path.write_text("old")
    monkeypatch.setattr(page, "source", lambda name: "$unknown" if name == "stepper.html" else "")
    with pytest.raises(KeyError):
        page.write(trace, path)
    assert path.read_text() == "old" and page.atomic_file is atomic_file and not page.is_page(path)
    with pytest.raises(LDMError, match="a folder of that name stands there"):
        monkeypatch.undo()
        page.write(trace, tmp_path)


# ---------------------------------------------------------------------------------------------- two runs


def levels(*ratios):
    return [Level(k, float(k), 1 / (1 + r * r) ** 0.5, r / (1 + r * r) ** 0.5) for k, r in enumerate(ratios)]


def test_runs_of_the_same_levels_go_side_by_side():
    assert page.pair(levels(9, 1, 0), levels(9, 1, 0)) == (
        [[0, 0], [1, 1], [2, 2]], "Both runs visit the same noise levels."
    )  # fmt: skip


def test_other_runs_are_paired_by_their_place_between_noise_and_picture():
    long, short = levels(14, 4, 1.2, 0.6, 0.1, 0), levels(12, 1, 0)
    pairs, sentence = page.pair(short, long)
    assert pairs == [[0, 0], [0, 1], [1, 2], [1, 3], [1, 4], [2, 5]]
    assert "beside each step of B stands the one of A whose place between noise and picture is nearest" in sentence
    assert (
        page.pair(long, short)[0] == [[b, a] for a, b in pairs]
        and "of A stands the one of B" in page.pair(long, short)[1]
    )
    assert page.pair(levels(9, 3, 0), levels(3, 1, 0))[0] == [[0, 0], [1, 0], [2, 2]]
    assert page.pair(levels(3, 1.1, 0.5, 0), levels(3, 0.5, 0))[0] == [[0, 0], [1, 1], [2, 1], [3, 2]]  # by angles
    assert page.pair(levels(0.1), long)[0] == [[0, 0], [0, 1], [0, 2], [0, 3], [0, 4], [0, 5]]


def test_what_two_runs_differ_in_is_said(pipe):
    first = pipe.settings("a tree", seed=1, steps=4)
    assert page.differences(first, first, 0, 0) == (
        "A and B have the same settings, to which models, given pictures and ControlNets don't belong."
    )
    other = pipe.settings("a house", seed=2, steps=4, sampler="ddim", guidance=3.5, negative="blue", strength=0.5)
    assert page.differences(first, other, 0, 0) == (
        "A and B differ in seed (1 | 2), prompt, negative (“” | blue), sampler (dpm++2m | ddim), guidance (2 | 3.5), "
        "strength (none | 0.5)."
    )


def test_two_runs_on_a_page(trace, pipe):
    other = pipe.trace("a tree", seed=4, steps=2)
    found = data_of(page.show(trace, other).html)
    assert [run["letter"] for run in found["runs"]] == ["A", "B"] and len(found["pairs"]) == 5
    assert found["runs"][1] == {**data_of(page.show(other).html)["runs"][0], "letter": "B"}
    assert found["differs"].startswith("A and B differ in seed (3 | 4), prompt, steps (4 | 2)")
    assert Outside(page.show(trace, other).html).images()[2]["data-run"] == "1"


# ---------------------------------------------------------------------------------------------- ldm explain


@pytest.fixture
def cli(model, pipe, tmp_path, monkeypatch, capsys):
    """Run `ldm explain` in an empty folder; standard output and standard error."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(loading, "load", lambda *args, **options: pipe)

    def run(*words, status=0):
        found = main(["explain", *map(str, words), "--model", str(model)])
        out, err = capsys.readouterr()
        assert found == status, err
        return SimpleNamespace(out=out, err=err)

    return run


def test_explain_writes_the_page_of_the_run(cli, pipe, tmp_path):
    words = ("--seed", 5, "--steps", 2, "--guidance", 3, "--negative", "blue", "--width", 16, "--clip-skip", 1)
    assert cli("a tree", *words).out == "run.html\n"
    text = (tmp_path / "run.html").read_text(encoding="utf-8")
    run = pipe.trace("a tree", seed=5, steps=2, guidance=3.0, negative="blue", width=16, clip_skip=1)
    found, expected = data_of(text)["runs"][0], data_of(page.show(run).html)["runs"][0]
    for each in (found, expected):
        each["rows"] = [row[:4] for row in each["rows"]]  # all but the seconds
    assert found == expected and not pipe.watchers


def test_explain_puts_a_second_run_beside_the_first(cli):
    assert cli("a tree", "--steps", 1, "--seed", 2, "--out", "two.html", "--with-seed", 0).out == "two.html\n"
    assert data_of(open("two.html", encoding="utf-8").read())["differs"] == "A and B differ in seed (2 | 0)."
    words = ("--with-prompt", "a house", "--with-negative", "a tree", "--with-steps", 2, "--with-guidance", 3)
    cli("a tree", "--steps", 1, "--out", "two.html", "--with-sampler", "ddim", *words)
    found = data_of(open("two.html", encoding="utf-8").read())
    assert found["differs"] == (
        "A and B differ in prompt, negative (“” | a tree), steps (1 | 2), sampler (dpm++2m | ddim), guidance (2 | 3)."
    )
    assert [len(run["rows"]) for run in found["runs"]] == [2, 3]


def test_explain_leaves_out_an_eta_that_the_second_sampler_has_not(cli):
    words = ("a tree", "--steps", 1, "--sampler", "ddim", "--eta", 1, "--out", "two.html", "--with-sampler")
    assert cli(*words, "euler").err == "The second run is drawn without --eta: euler has none.\n"
    found = data_of(open("two.html", encoding="utf-8").read())["differs"]
    assert found == "A and B differ in sampler (ddim | euler), eta (1 | 0)."
    assert cli(*words, "tcd").err == ""
    found = data_of(open("two.html", encoding="utf-8").read())["differs"]
    assert found == "A and B differ in sampler (ddim | tcd)."


def test_explain_replaces_a_page_of_its_own_and_no_other_file(cli, monkeypatch):
    for _ in range(2):
        cli("a tree", "--steps", 1)
    with open("mine.html", "w") as file:
        file.write("<!DOCTYPE html> mine")
    prepare = Pipeline.prepare
    monkeypatch.setattr(Pipeline, "prepare", None)  # refused before anything is drawn
    told = cli("a tree", "--out", "mine.html", status=1).err
    assert told == "ldm: mine.html is there already and is no page by ldm: choose another --out, or say --overwrite.\n"
    monkeypatch.setattr(Pipeline, "prepare", prepare)
    cli("a tree", "--steps", 1, "--out", "mine.html", "--overwrite")
    assert page.is_page("mine.html")


@pytest.mark.parametrize(
    "words, status, sentence",
    [
        (["--out", "run.png"], 1, "--out run.png must end in .html."),
        (["--out", "no/run.html"], 1, "no/run.html"),
        (["--sampler", "dim"], 1, "Did you mean 'ddim'?"),
        (["--with-sampler", "dim"], 1, "Did you mean 'ddim'?"),
        (["--sigmas", "9,3,0", "--with-steps", 3], 1, "--with-steps can't go with --sigmas, whose numbers make the"),
        (["--timesteps", "900,9", "--with-steps", 3], 1, "--with-steps can't go with --timesteps, whose numbers make"),
        (["--with-steps", 0], 2, "--with-steps must be 1 or more, not 0."),
        (["--with-seed", "x"], 2, "--with-seed must be a whole number, not 'x'."),
        (["--with-seeds", "1"], 2, "unknown option --with-seeds. Did you mean '--with-seed'?"),
    ],
)
def test_explain_refuses_with_a_sentence_and_writes_nothing(cli, tmp_path, words, status, sentence):
    told = cli("a tree", *words, status=status).err
    assert sentence.lower() in told.lower() and told.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_explain_counts_every_step_of_both_runs(cli, monkeypatch):
    bars = []

    class Bar:
        def __init__(self, total):
            self.total, self.done = total, 0
            bars.append(self)

        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

        def clear(self):
            pass

        def update(self):
            self.done += 1

    monkeypatch.setattr(explain, "progress", Bar)
    cli("a tree", "--steps", 2, "--sampler", "heun", "--with-steps", 3)
    assert [(bar.total, bar.done) for bar in bars] == [(5, 5)]
