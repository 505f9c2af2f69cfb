"""`ldm compare-samplers`: every number is what it says, and a comparison that was stopped becomes the unbroken one."""

import json
import re
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import tiny_model

import ldm
from ldm import loading, scenes
from ldm.cli import main
from ldm.errors import LDMError
from ldm.metrics import samplers
from ldm.metrics.evaluation import held_out, load_checker, verdict
from ldm.metrics.samplers import Cell, compare, distance, draw, report
from ldm.metrics.samplers_plot import NOISY, family_of, lines_of, plot, spread
from ldm.pipeline import Pipeline
from ldm.samplers import SAMPLERS
from ldm.train.data import to_tensor

FEW = {"samplers": ["ddim", "heun", "ddpm"], "steps": [2, 1], "count": 2, "batch": 1}


@pytest.fixture(scope="module")
def pipe():
    return ldm.load("scenes")


@pytest.fixture(autouse=True)
def short(monkeypatch):
    """A reference and a witness that take seconds."""
    monkeypatch.setattr(samplers, "REFERENCE", ("dpm++2m", 4))
    monkeypatch.setattr(samplers, "WITNESS", ("heun", 4))


@pytest.fixture
def drawn(monkeypatch):
    """A list that grows by (sampler, steps) with every batch."""
    calls, steps = [], Pipeline.steps

    def counted(self, prompt, **rest):
        calls.append((rest["sampler"], rest["steps"]))
        return steps(self, prompt, **rest)

    monkeypatch.setattr(Pipeline, "steps", counted)
    return calls


def rows(folder):
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


# ---------------------------------------------------------------------------------------------- the numbers


def test_one_cell_counted_by_hand(pipe, tmp_path):
    said = []
    found = compare(pipe, tmp_path, ["ddim", "heun"], [3], count=2, batch=1, say=said.append)
    wanted, checker = held_out(2), load_checker(pipe.folder)
    captions = [scenes.caption(scene, scene.seed, full=True) for scene in wanted]
    ours, reference = (pipe(captions, sampler=name, steps=n) for name, n in (("heun", 3), ("dpm++2m", 4)))
    answers = [
        answer
        for scene, image in zip(wanted, ours.images, strict=True)
        for found_ in verdict(scene, checker.read(to_tensor(np.asarray(image)[None]))[0]).values()
        for answer in found_
    ]
    far = (ours.x0 - reference.x0).flatten(1).norm(dim=1) / reference.x0.flatten(1).norm(dim=1)
    cell = found["heun", 3]
    assert cell[:5] == ("heun", 3, 6, sum(answers), len(answers))
    assert cell.distance == pytest.approx(far.mean().item(), rel=1e-3) and far.mean() > 0.01
    assert found["dpm++2m", 4].distance == 0 < found["heun", 4].distance
    (text,) = said
    line_of = [line for line in text.splitlines() if line.startswith("| heun")]
    assert line_of[0] == f"| heun    | {100 * sum(answers) / len(answers):.1f} (6) |"
    assert line_of[1] == f"| heun    | {cell.distance:<7.2g} |"
    assert f"lies heun at 4 steps, after {found['heun', 4].evaluations} evaluations" in text
    assert (tmp_path / "table.md").read_text() == text + "\n"


def test_distance_is_relative_and_each_picture_counts_alike():
    reference = torch.randn(2, 4, 8, 8) * torch.tensor([1.0, 100.0]).view(2, 1, 1, 1)
    assert distance(reference, reference) == 0
    assert distance(reference * torch.tensor([1.1, 0.7]).view(2, 1, 1, 1), reference) == pytest.approx(0.2, rel=1e-5)


@pytest.mark.parametrize("rule, ends", [(None, 0), ("heun", 1)])  # a table that ends on a noisy level, or clean
def test_evaluations_are_counted(tmp_path, rule, ends):
    tiny, n = ldm.load(tiny_model(tmp_path / "tiny")), 4
    options = {} if rule is None else {"rule": rule}
    less = {"heun": ends, "flow-heun": ends, "dpm2": ends, "dpm2-a": ends}  # one step to a clean level needs no second
    more = {"pndm": 9, "plms": 1}  # three steps of Runge-Kutta's, one of Heun's
    for name, method in SAMPLERS.items():
        ticks = []
        x0, calls = draw(tiny, held_out(1), (name, n), 1, lambda ticks=ticks: ticks.append(1), options)
        assert calls == n * method.evaluations + more.get(name, 0) - less.get(name, 0), name
        assert x0.shape[0] == 1 and len(ticks) == n
    assert draw(tiny, held_out(1), ("heun", n), 1, int, {**options, "guidance": 1.0})[1] == 2 * n - ends


# ---------------------------------------------------------------------------------------------- the folder


def test_a_stopped_comparison_goes_on_and_becomes_the_unbroken_one(pipe, tmp_path, monkeypatch, drawn):
    whole = compare(pipe, tmp_path / "whole", **FEW, say=str)
    assert list(whole)[:2] == [samplers.REFERENCE, samplers.WITNESS]
    assert [run[1] for run in whole][2:] == [1, 1, 1, 2, 2, 2]  # few steps first
    steps = Pipeline.steps

    def interrupted(self, prompt, **rest):
        for step in steps(self, prompt, **rest):
            if (rest["sampler"], rest["steps"], rest["seed"], step.i) == ("heun", 2, 1, 1):
                raise KeyboardInterrupt
            yield step

    with monkeypatch.context() as patch:
        patch.setattr(Pipeline, "steps", interrupted)
        with pytest.raises(KeyboardInterrupt, match="Stopped: 6 of 8 runs are finished; the same command does the oth"):
            compare(pipe, tmp_path / "broken", **FEW, say=str)
    assert len(rows(tmp_path / "broken")) == 1 + 6
    with open(tmp_path / "broken" / "results.jsonl", "a") as file:
        file.write('{"sampler": "heun", "ste')  # as a kill in the middle of a line leaves it
    drawn.clear()
    assert compare(pipe, tmp_path / "broken", **FEW, say=str) == whole
    assert drawn == [("heun", 2)] * 2 + [("ddpm", 2)] * 2
    for name in ("results.jsonl", "table.md", "reference.safetensors"):
        assert (tmp_path / "broken" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    drawn.clear()
    fewer = compare(pipe, tmp_path / "whole", **{**FEW, "samplers": ["ddim"]}, say=str)
    assert drawn == [] and set(fewer) < set(whole)
    (tmp_path / "whole" / "reference.safetensors").unlink()
    assert compare(pipe, tmp_path / "whole", **FEW, say=str) == whole and set(drawn) == {samplers.REFERENCE}


@pytest.mark.parametrize("name, value", [("count", 3), ("guidance", 2.0), ("rule", "dpm"), ("sigmas", "karras")])
def test_a_folder_of_other_settings_is_refused(pipe, tmp_path, drawn, name, value):
    checker = load_checker(pipe.folder)
    samplers.begin(tmp_path, samplers.header(pipe, checker, 2, {}))
    before = (tmp_path / "results.jsonl").read_bytes()
    with pytest.raises(LDMError, match=f"another {name}: name another folder"):
        compare(pipe, tmp_path, **{**FEW, name: value})
    for key in ("model", "checker", "dtype"):
        (tmp_path / "results.jsonl").write_text(json.dumps(json.loads(before) | {key: "0" * 16}) + "\n")
        with pytest.raises(LDMError, match=f"another {key}: name"):
            compare(pipe, tmp_path, **FEW)
    assert drawn == []


def test_a_default_that_is_said_is_no_other_setting(pipe, tmp_path):
    checker = load_checker(pipe.folder)
    plain, said = (samplers.header(pipe, checker, 2, options) for options in ({}, {"guidance": 4.0, "rule": "ddim"}))
    assert plain == said


# ---------------------------------------------------------------------------------------------- what cannot be


def test_what_a_schedule_or_a_sampler_cannot_take_is_skipped_with_a_line(pipe, tmp_path, monkeypatch):
    steps, said = Pipeline.steps, []

    def fails(self, prompt, **rest):
        if (rest["sampler"], rest["steps"]) == ("ddpm", 2):
            raise LDMError("It cannot.")
        return steps(self, prompt, **rest)

    monkeypatch.setattr(Pipeline, "steps", fails)
    found = compare(pipe, tmp_path, ["ddim", "ddpm"], [1, 2, 1001], 1, say=said.append)
    assert said[0].startswith("1001 steps are skipped: ") and said[1] == "ddpm at 2 steps is skipped: It cannot."
    assert ("ddpm", 2) not in found and ("ddpm", 1) in found
    line = next(line for line in said[2].splitlines() if line.startswith("| ddpm †"))
    assert line.split("|")[3].strip() == "–" and "1001" not in said[2]


def test_nothing_to_compare_and_no_reference_are_said(pipe, tmp_path, drawn):
    with pytest.raises(LDMError, match="Nothing is left to compare"):
        compare(pipe, tmp_path, ["ddim"], [1001], 1, say=str)
    samplers.REFERENCE = ("dpm++2m", 500)  # the fixture puts it back
    with pytest.raises(LDMError, match=r"compared with a run of 500 steps, which cannot be here: .* between 1 and 50"):
        compare(pipe, tmp_path, ["ddim"], [2], 1, rule="lcm")
    assert drawn == [] and not (tmp_path / "results.jsonl").exists()


# ---------------------------------------------------------------------------------------------- the plot


def made_up(names=SAMPLERS):
    """Cells of all samplers; those that are one method have the same."""
    cells = {("dpm++2m", 4): Cell("dpm++2m", 4, 4, 99, 100, 0.0), ("heun", 4): Cell("heun", 4, 8, 99, 100, 0.01)}
    for k, name in enumerate(names):
        k = {"euler": 1, "euler-a": 0}.get(name, k)
        for n in (5, 50):
            cells[name, n] = Cell(name, n, n * SAMPLERS[name].evaluations, 100 - k, 100, (1 + k / 10) / n)
    return cells


@pytest.fixture
def plotted(monkeypatch):
    from ldm.metrics import samplers_plot

    monkeypatch.setattr(samplers_plot, "REFERENCE", samplers.REFERENCE)
    monkeypatch.setattr(samplers_plot, "WITNESS", samplers.WITNESS)


def test_the_plot_is_a_small_file_that_shows_everything(tmp_path, plotted):
    plot(made_up(), tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size < 150_000
    with Image.open(tmp_path / "plot.png") as image:
        assert image.width > 1200 and image.height > 600 and len(image.convert("RGB").getcolors(1 << 16)) > 20
    plot(made_up(["lcm"]), tmp_path / "one.png")
    with Image.open(tmp_path / "one.png") as one:
        assert one.width < image.width / 3  # a single column


def test_every_sampler_has_a_line_and_one_method_has_one_line():
    lines = lines_of({run: cell for run, cell in made_up().items() if run[1] != 4})
    names = [name for label, _ in lines for name in label.split(" = ")]
    assert sorted(names) == sorted(SAMPLERS) and len(lines) == len(SAMPLERS) - 2
    assert "ddim = euler" in dict(lines) and "ddpm = euler-a" in dict(lines)
    noisy = {cells[0].sampler for label, cells in lines if family_of((label, cells)) == NOISY}
    assert noisy == {name for name, method in SAMPLERS.items() if method.adds_noise} - {"euler-a"}


def test_names_are_moved_apart_and_keep_their_order():
    placed = spread([0.5, 0.9, 0.51, 0.99, 0.1])
    assert placed[4] == 0.1 and placed[0] < placed[2] < placed[1] < placed[3] <= 1
    crowded = spread([0.01, 0.0, 0.02, 0.011])
    assert crowded[1] == 0 and crowded[1] < crowded[0] < crowded[3] < crowded[2]
    assert max(spread([1.0, 0.99, 1.0])) < 1  # there the title is
    assert min([*np.diff(sorted(placed)), *np.diff(sorted(crowded))]) > 0.05


# ---------------------------------------------------------------------------------------------- the command


@pytest.fixture
def cli(pipe, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(loading, "load", lambda *_, **options: pipe)

    def run(*words, status=0):
        found = main(["compare-samplers", *map(str, words)])
        out, err = capsys.readouterr()
        assert found == status, err
        return out, err

    return run


def test_the_command_draws_a_table_and_a_plot(cli, tmp_path, plotted):
    options = ("--samplers", "euler", "heun", "--steps", 2, "--count", 1, "--guidance", 2, "--rule", "dpm")
    out, _ = cli(*options, "--sigmas", "karras")
    folder = tmp_path / "compare-samplers"
    assert out == (folder / "table.md").read_text() and "| euler " in out
    assert sorted(path.name for path in folder.iterdir()) == [
        "plot.png", "reference.safetensors", "results.jsonl", "table.md"
    ]  # fmt: skip
    head, *cells = rows(folder)
    assert (head["count"], head["guidance"], head["rule"], head["sigmas"]) == (1, 2.0, "dpm", "karras")
    assert [(cell["sampler"], cell["steps"]) for cell in cells] == [
        ("dpm++2m", 4), ("heun", 4), ("euler", 2), ("heun", 2)
    ]  # fmt: skip
    assert "another rule: name another folder with --out" in cli(*options[:-2], "--sigmas", "karras", status=1)[1]


@pytest.mark.parametrize(
    "words, status, sentence",
    [
        (["--samplers", "ddim", "hoin"], 1, "Unknown sampler 'hoin'.* Did you mean 'heun'"),
        (["--rule", "eular"], 1, "Unknown schedule rule 'eular'.* Did you mean 'euler'"),
        (["--sigmas", "karas"], 1, "Unknown choice of sigmas 'karas'.* Did you mean 'karras'"),
        (["--steps", "0"], 2, "--steps must be 1 or more"),
        (["--count", "0"], 2, "--count must be 1 or more"),
    ],
)
def test_mistakes_are_sentences(cli, tmp_path, drawn, words, status, sentence):
    assert re.search(sentence, cli(*words, status=status)[1])
    assert drawn == [] and not any(tmp_path.iterdir())


def test_a_missing_matplotlib_is_told_before_anything_is_drawn(cli, monkeypatch, drawn):
    monkeypatch.delitem(sys.modules, "ldm.metrics.samplers_plot")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert "python -m pip install matplotlib" in cli(status=1)[1]
    assert drawn == []


def test_the_table_says_which_samplers_add_noise():
    text = report(made_up(), 7)
    assert text.startswith("7 pictures") and "dpm++2m at 4 steps, has 99.0 % of 100 answers" in text
    names = [line.split("|")[1].strip() for line in text.splitlines() if line.startswith("| ")]
    assert {name.removesuffix(" †") for name in names if name.endswith(" †")} == {
        name for name, method in SAMPLERS.items() if method.adds_noise
    }
