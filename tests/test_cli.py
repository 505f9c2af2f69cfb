"""The command line: what it draws, where it puts it, what it says, and that nothing is lost."""

import filecmp
import functools
import io
import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass, fields
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import DEFAULTS, SIZE, plant, tiny_model

import ldm
from ldm import loading
from ldm.cli import inside, jobs, main, options, schedule, train
from ldm.cli.record import pixel_hash
from ldm.io.folders import folder_hash
from ldm.io.png import read_settings, save_png
from ldm.pipeline import Pipeline
from ldm.run import Run
from ldm.samplers import SAMPLERS, table
from ldm.schedules import CHOICES, RULES, make_schedule

HOUSE = "a large red house"
ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def load(model):
    """`ldm.load`, which reads the tiny model once for all tests; every other is read as ever."""
    read = loading.load
    kept = functools.cache(read)
    return lambda name, *rest, **options: (kept if str(name) == str(model) else read)(name, *rest, **options)


@pytest.fixture
def cli(model, load, tmp_path, monkeypatch, capsys):
    """Run a command in an empty folder; status, standard output and standard error."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(loading, "load", load)

    def run(*words, status=0, model=model):
        words = [str(word) for word in words]
        named = ["--model", str(model)] if words[0] == "generate" and model and "--model" not in words else []
        found = main([*words, *named])
        out, err = capsys.readouterr()
        assert found == status, err
        assert "Traceback" not in err
        return SimpleNamespace(out=out, err=err, lines=out.splitlines())

    return run


@pytest.fixture
def runs(monkeypatch):
    """A list that grows by (prompt, seed, count) with every run of the model."""
    calls, prepare = [], Pipeline.prepare

    def counted(self, prompt, *, seed=0, count=1, **rest):
        calls.append((prompt, seed, count))
        return prepare(self, prompt, seed=seed, count=count, **rest)

    monkeypatch.setattr(Pipeline, "prepare", counted)
    return calls


def pixels(path):
    with Image.open(path) as image:
        return np.asarray(image, dtype=int)


def apart(a, b):
    return np.abs(pixels(a) - pixels(b)).max()


def names(folder="."):
    return sorted(path.name for path in Path(folder).iterdir())


# ---------------------------------------------------------------------------------------------- one picture


def test_draws_what_the_pipeline_draws_and_says_where(cli, model):
    assert cli("generate", HOUSE, "--seed", 7, "--out", "a.png").lines == ["a.png"]
    with Image.open("a.png") as image:
        assert np.array_equal(np.asarray(image), np.asarray(ldm.load(model)(HOUSE, seed=7).images[0]))
    assert pixels("a.png").std() > 5  # it is no even surface: two of them are equal for a reason


def test_the_png_says_how_it_was_made(cli, model):
    cli("generate", HOUSE, "--seed", 7, "--out", "a.png", "--negative", "a tree", "--height", 2 * SIZE)
    found = read_settings("a.png")
    assert found == {
        "prompt": HOUSE, "negative": "a tree", "seed": 7, **DEFAULTS, "eta": 0.0, "width": SIZE, "height": 2 * SIZE,
        "rule": "ddim", "sigmas": "spaced", "timesteps": None, "compat": False, "clip_skip": 0, "dtype": "float32",
        "strength": None, "image_guidance": None, "noise_level": None, "given": {}, "pictures": [],
        "sizes": None, "negative_sizes": None, "autocast": None, "quantise": None, "true_guidance": 1.0,
        "max_sequence_length": None, "memory": [], "reading": [], "dialect": "plain",
        "added": [], "additions": [],
        "model": str(model), "model_hash": folder_hash(model), "device": "cpu", "batch": 1,
        "version": ldm.__version__, "torch": str(torch.__version__),
        "pixels": pixel_hash(Image.open("a.png")),
    }  # fmt: skip


@pytest.mark.parametrize(
    "words, key, value",
    [
        (["--seed", "8"], "seed", 8),
        (["--negative", "red"], "negative", "red"),
        (["--steps", "4"], "steps", 4),
        (["--guidance", "5"], "guidance", 5.0),
        (["--guidance", "0"], "guidance", 0.0),
        (["--sampler", "euler"], "sampler", "euler"),
        (["--sampler", "ddim", "--eta", "1"], "eta", 1.0),
        (["--sampler", "tcd"], "eta", 0.3),
        (["--rule", "dpm"], "rule", "dpm"),
        (["--compat"], "rule", "dpm"),
        (["--compat"], "compat", True),
        (["--sigmas", "karras"], "sigmas", "karras"),
        (["--sigmas", "14.6,2.5,0.5,0"], "sigmas", [14.6, 2.5, 0.5, 0.0]),
        (["--timesteps", "900,400.5,3"], "timesteps", [900.0, 400.5, 3.0]),
        (["--width", "64"], "width", 64),
        (["--height", "48"], "height", 48),
        (["--clip-skip", "1"], "clip_skip", 1),
        (["--dtype", "float64"], "dtype", "float64"),
        (["--dtype", "bfloat16"], "dtype", "bfloat16"),
        (["--device", "cpu"], "device", "cpu"),
    ],
)
def test_every_setting_arrives_in_the_picture(cli, words, key, value):
    cli("generate", HOUSE, "--out", "plain.png")
    cli("generate", HOUSE, "--out", "set.png", *words)
    assert read_settings("set.png")[key] == value
    if key in ("width", "height"):
        assert pixels("set.png").shape[key == "width"] == value
    elif key not in ("dtype", "device"):
        assert apart("plain.png", "set.png") > 0


@pytest.mark.parametrize("prompt", ["", "  ", "ein großes Haus 🏠 家", "\x00", "a 'quoted' \"word\"\nof two lines"])
def test_any_text_is_a_prompt(cli, prompt):
    path = cli("generate", prompt).lines[0]
    assert read_settings(path)["prompt"] == prompt


def test_the_empty_prompt_is_unconditional(cli):
    cli("generate", "", "--out", "a.png", "--guidance", 9)
    cli("generate", "", "--out", "b.png", "--guidance", 1)
    assert apart("a.png", "b.png") <= 1


def test_a_prompt_that_is_cut_is_said(cli):
    found = cli("generate", "a red house " * 60 + "zebra", "--out", "a.png")
    assert "longer than 77 tokens" in found.err and "zebra" in found.err


def test_a_negative_prompt_without_guidance_is_said_to_do_nothing(cli):
    assert "does nothing" in cli("generate", HOUSE, "--negative", "red", "--guidance", 1).err


# ---------------------------------------------------------------------------------------------- several


def test_count_takes_the_next_seeds_and_equals_each_drawn_alone(cli):
    together = cli("generate", HOUSE, "--seed", 7, "--count", 3, "--out", "t.png").lines
    alone = cli("generate", HOUSE, "--seed", 7, "--count", 3, "--out", "o.png", "--one-by-one").lines
    assert together == ["t-7.png", "t-8.png", "t-9.png"] and alone == ["o-7.png", "o-8.png", "o-9.png"]
    for seed in (7, 8, 9):
        cli("generate", HOUSE, "--seed", seed, "--out", "single.png")
        assert apart(f"t-{seed}.png", "single.png") <= 1
        assert apart(f"o-{seed}.png", "single.png") == 0
        assert read_settings(f"t-{seed}.png")["seed"] == seed
        assert read_settings(f"t-{seed}.png")["batch"] == 3 and read_settings(f"o-{seed}.png")["batch"] == 1
    assert apart("t-7.png", "t-8.png") > 5


def test_batches(cli, runs):
    cli("generate", HOUSE, "--count", 5, "--batch", 2)
    cli("generate", HOUSE, "--count", 2, "--seed", 10, "--one-by-one")
    assert runs == [(HOUSE, 0, 2), (HOUSE, 2, 2), (HOUSE, 4, 1), (HOUSE, 10, 1), (HOUSE, 11, 1)]


def test_names_in_a_folder_tell_prompts_apart():
    alike = [
        "a red house",
        "A red house",
        "a red-house",
        "a red house!",
        "a  red house",
        "",
        "!",
        "x" * 300,
        "x" * 301,
        "家" * 90,
    ]
    found = [jobs.slug(prompt) for prompt in alike]
    assert found[0] == "a-red-house" and len(set(found)) == len(alike)
    assert all(0 < len(name.encode()) < 100 and "/" not in name for name in found)


def test_where_pictures_go(cli):
    Path("there").mkdir()
    assert cli("generate", HOUSE).lines == ["a-large-red-house-0.png"]
    assert cli("generate", HOUSE, "--out", "there").lines == ["there/a-large-red-house-0.png"]
    assert cli("generate", HOUSE, "--out", "new/deep/", "--seed", 3).lines == ["new/deep/a-large-red-house-3.png"]


# ---------------------------------------------------------------------------------------------- nothing is lost


def test_a_named_picture_of_ours_is_replaced_but_no_strangers_file(cli):
    cli("generate", HOUSE, "--out", "a.png")
    cli("generate", HOUSE, "--out", "a.png", "--seed", 1)
    assert read_settings("a.png")["seed"] == 1
    Image.new("RGB", (4, 4)).save("photo.png")
    shutil.copy("photo.png", "copy.png")
    for command in (["generate", HOUSE], ["rerun", "a.png"]):
        assert "not drawn by ldm" in cli(*command, "--out", "photo.png", status=1).err
    assert filecmp.cmp("photo.png", "copy.png", shallow=False)
    cli("generate", HOUSE, "--out", "photo.png", "--overwrite")
    assert read_settings("photo.png")["prompt"] == HOUSE


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text(
        "\ufeff# three of them\na red house\n\n  a blue house  \r\na red house\nZwei Häuser\n", encoding="utf-8"
    )
    return path


def test_prompts_of_a_file_and_what_is_drawn_is_not_drawn_again(cli, prompts, runs):
    first = cli("generate", "--prompts", prompts, "--count", 2)
    assert [call[0] for call in runs] == ["a red house", "a blue house", "Zwei Häuser"]
    assert first.lines[:2] == ["pictures/a-red-house-0.png", "pictures/a-red-house-1.png"]
    assert names("pictures") == sorted(Path(line).name for line in first.lines) and len(first.lines) == 6
    before = {path: path.stat().st_mtime_ns for path in Path("pictures").iterdir()}

    runs.clear()
    again = cli("generate", "--prompts", prompts, "--count", 2)
    assert runs == [] and again.out == "" and "6 of 6 pictures are drawn already" in again.err

    Path("pictures/a-red-house-1.png").unlink()
    prompts.write_text("one more\n" + prompts.read_text(encoding="utf-8-sig"), encoding="utf-8")
    cli("generate", "--prompts", prompts, "--count", 2)
    assert runs == [("one more", 0, 2), ("a red house", 1, 1)]
    del before[Path("pictures/a-red-house-1.png")]
    assert all(path.stat().st_mtime_ns == when for path, when in before.items())


def test_pictures_of_other_settings_are_in_the_way_until_told_otherwise(cli, prompts, runs):
    cli("generate", "--prompts", prompts, "--out", "p")
    runs.clear()
    found = cli("generate", "--prompts", prompts, "--out", "p", "--steps", 2, status=1)
    assert "p/a-red-house-0.png was drawn with other settings (steps: 3 then, 2 now) (and 2 more" in found.err
    assert runs == [] and read_settings("p/a-red-house-0.png")["steps"] == 3
    cli("generate", "--prompts", prompts, "--out", "p", "--steps", 2, "--overwrite")
    assert len(runs) == 3 and read_settings("p/a-red-house-0.png")["steps"] == 2


def test_other_weights_are_other_settings(cli, tmp_path, tmp_path_factory):
    other = tiny_model(tmp_path_factory.mktemp("models") / "other", seed=1)
    cli("generate", HOUSE)
    assert "model_hash" in cli("generate", HOUSE, model=other, status=1).err


def test_a_strangers_file_is_in_the_way_too(cli):
    Path("a-large-red-house-0.png").write_text("a diary")
    assert "not drawn by ldm" in cli("generate", HOUSE, status=1).err
    assert Path("a-large-red-house-0.png").read_text() == "a diary"


def test_one_by_one_draws_again_what_was_drawn_in_a_batch(cli):
    cli("generate", HOUSE, "--count", 2)
    assert "batch: 2 then, 1 now" in cli("generate", HOUSE, "--one-by-one", status=1).err


def test_ctrl_c_leaves_whole_files_and_the_next_run_goes_on(cli, prompts, monkeypatch, runs):
    steps = Run.steps

    def interrupted(self, *rest):
        for step in steps(self, *rest):
            if self.settings.prompt == ("a blue house",) and step.i == 1:
                raise KeyboardInterrupt
            yield step

    with monkeypatch.context() as patch:
        patch.setattr(Run, "steps", interrupted)
        found = cli("generate", "--prompts", prompts, "--save-steps", "in", status=130)
    assert found.err == "ldm: Stopped: 1 of 3 pictures are finished; the same command draws the others.\n"
    assert names("pictures") == ["a-red-house-0.png"] and names("in/a-blue-house-0") == ["step-00.png"]
    runs.clear()
    cli("generate", "--prompts", prompts, "--save-steps", "in")
    assert [call[0] for call in runs] == ["a blue house", "Zwei Häuser"]
    assert len(names("pictures")) == 3 and len(names("in/a-blue-house-0")) == 4


def test_ctrl_c_while_a_picture_is_written(cli, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    assert "0 of 1 pictures" in cli("generate", HOUSE, status=130).err
    assert names() == []


# ---------------------------------------------------------------------------------------------- inside a run


def test_save_steps_shows_every_prediction_and_a_sheet(cli, model):
    cli("generate", HOUSE, "--out", "a.png", "--save-steps", "in/side")
    assert names("in/side") == ["contact-sheet.png", "step-00.png", "step-01.png", "step-02.png"]
    pipe = ldm.load(model)
    for step in pipe.steps(HOUSE):
        path = f"in/side/step-{step.i:02d}.png"
        assert np.array_equal(pixels(path), np.asarray(pipe.decode(step.x0)[0]))
        assert (read_settings(path)["step"], read_settings(path)["t"]) == (step.i, step.level.t)
    assert "inside of a run" in cli("rerun", "in/side/step-01.png", status=1).err
    plain = pixels("a.png")
    cli("generate", HOUSE, "--out", "b.png")
    assert np.array_equal(plain, pixels("b.png"))  # looking changes nothing


def test_save_steps_of_several_pictures(cli):
    cli("generate", HOUSE, "--count", 2, "--seed", 5, "--out", "a.png", "--save-steps", "in")
    assert names("in") == ["a-5", "a-6"] and len(names("in/a-5")) == len(names("in/a-6")) == 4


def test_steps_of_another_run_are_in_the_way(cli):
    cli("generate", HOUSE, "--out", "a.png", "--save-steps", "in")
    assert "belongs to another run" in cli("generate", HOUSE, "--steps", 2, "--save-steps", "in", status=1).err
    assert len(names("in")) == 4
    cli("generate", HOUSE, "--out", "a.png", "--save-steps", "in")  # the same run may
    cli("generate", HOUSE, "--steps", 2, "--save-steps", "in", "--overwrite")
    assert names("in") == ["contact-sheet.png", "step-00.png", "step-01.png"]


def test_a_finished_picture_whose_steps_are_wanted_is_drawn_again(cli, runs):
    cli("generate", HOUSE)
    cli("generate", HOUSE, "--save-steps", "in")
    assert len(runs) == 2 and len(names("in")) == 4


def test_contact_sheet_labels_never_overlap():
    thumbs = [(Image.new("RGB", (16, 16), "red"), f"{i}   t = {961.25 - i}") for i in range(7)]
    sheet = np.asarray(inside.contact_sheet(thumbs)).astype(int)
    red = (sheet == (255, 0, 0)).all(axis=2)
    assert red.sum() == 7 * 16 * 16 and (sheet.sum(axis=2) < 300).any()
    columns = np.flatnonzero(red.any(axis=0))
    starts = columns[np.diff(columns, prepend=-9) > 1]
    assert len(starts) > 1 and np.diff(starts).min() > 60  # a label is some 60 pixels wide


# ---------------------------------------------------------------------------------------------- rerun


def test_rerun_of_a_picture_drawn_alone_is_identical(cli):
    cli("generate", HOUSE, "--seed", 7, "--out", "a.png", "--negative", "red", "--sampler", "ddim", "--eta", 0.5,
        "--width", 64, "--clip-skip", 1, "--guidance", 3, "--steps", 4, "--dtype", "float64")  # fmt: skip
    assert cli("rerun", "a.png").lines == ["a.png: identical."]
    assert cli("rerun", "a.png", "--out", "b.png").lines[0] == "b.png"
    assert filecmp.cmp("a.png", "b.png", shallow=False)


@pytest.mark.parametrize(
    "words",
    [
        ["--sigmas", "14.6,2.5,0.5,0"],
        ["--sigmas", "exponential", "--rule", "unipc"],
        ["--timesteps", "900,400.5,3", "--sampler", "heun"],
        ["--sampler", "dpm++2m-sde", "--compat"],
        ["--sampler", "tcd", "--eta", "0"],
        ["--sampler", "tcd", "--compat", "--timesteps", "900,500,100"],
    ],
)
def test_rerun_takes_up_the_levels(cli, words, runs):
    cli("generate", HOUSE, "--out", "a.png", *words)
    cli("generate", HOUSE, "--out", "plain.png")
    assert apart("a.png", "plain.png") > 1  # a rerun that forgot them would be seen
    found = cli("rerun", "a.png", "--out", "b.png").lines
    assert found == ["b.png", "a.png: identical."]
    assert read_settings("b.png") == read_settings("a.png")


@pytest.mark.parametrize("words", [["--sigmas", "14.6,2.5,0.5,0"], ["--timesteps", "900,400.5,3"], ["--compat"]])
def test_levels_are_compared_with_those_of_a_picture_that_is_there(cli, runs, words):
    """Tuples here, lists in JSON: the same settings are no other settings."""
    cli("generate", HOUSE, "--save-steps", "in", *words)
    runs.clear()
    assert "is drawn already" in cli("generate", HOUSE, "--save-steps", "in", *words).err and runs == []
    changed = cli("generate", HOUSE, status=1).err
    assert "was drawn with other settings" in changed and f"{words[0][2:]}: " in changed


def test_rerun_of_a_picture_of_a_batch(cli):
    cli("generate", HOUSE, "--count", 3, "--out", "a.png")
    for seed in range(3):
        found = cli("rerun", f"a-{seed}.png").out
        assert "identical" in found or ("within one grey level" in found and "batch: 3 then, 1 now" in found)


def edit(path, image=None, **changes):
    """Save a picture of ldm again, with other settings or pixels."""
    with Image.open(path) as old:
        save_png(image or old.copy(), path, {**read_settings(path), **changes})


def test_rerun_says_what_differs(cli, tmp_path_factory):
    other = tiny_model(tmp_path_factory.mktemp("models") / "other", seed=1)
    cli("generate", HOUSE, "--out", "a.png")
    found = cli("rerun", "a.png", "--model", other, status=1).out
    assert "different in" in found and "model_hash: " in found and "torch" not in found
    edit("a.png", torch="1.13", version="0.0.1")
    found = cli("rerun", "a.png").out  # the picture is the same in spite of them
    assert "identical" in found and "torch: '1.13' then" in found and "version: '0.0.1' then" in found


def test_rerun_notices_edited_pixels(cli):
    cli("generate", HOUSE, "--out", "a.png")
    with Image.open("a.png") as image:
        edited = image.copy()
    edited.paste((255, 0, 0), (0, 0, 4, 4))
    edit("a.png", edited)
    found = cli("rerun", "a.png", status=1).out
    assert (
        "different in 16 of 1024 pixels" in found and "edited since; those that were are drawn again exactly" in found
    )


def test_rerun_where_nothing_recorded_differs(cli):
    cli("generate", HOUSE, "--out", "a.png")
    noise = Image.effect_noise((SIZE, SIZE), 90).convert("RGB")
    edit("a.png", noise, pixels=pixel_hash(noise))
    assert "nothing that the file records is different" in cli("rerun", "a.png", status=1).out


def test_rerun_falls_back_to_the_cpu(cli):
    cli("generate", HOUSE, "--out", "a.png")
    edit("a.png", device="cuda:77")
    found = cli("rerun", "a.png")
    assert "no device 'cuda:77' here: drawing on the CPU" in found.err and "device: 'cuda:77' then" in found.out


@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({"steps": "many"}, "lack a sound 'steps' ('many')"),
        ({"seed": True}, "lack a sound 'seed'"),
        ({"width": 4096}, "don't belong together"),
        ({"dtype": "load"}, "don't belong together"),
        ({"sampler": "eluer"}, "Did you mean 'euler'?"),
        ({"rule": None}, "lack a sound 'rule' (None)"),
        ({"rule": "eulr"}, "Did you mean 'euler'?"),
        ({"sigmas": None}, "lack a sound 'sigmas' (None)"),
        ({"sigmas": [9.0, True]}, "lack a sound 'sigmas' ([9.0, True])"),
        ({"sigmas": [0.5, 9.0]}, "sigmas must be 2 or more falling numbers"),
        ({"timesteps": "900"}, "lack a sound 'timesteps' ('900')"),
        ({"timesteps": [[900]]}, "lack a sound 'timesteps'"),
        ({"compat": 1}, "lack a sound 'compat' (1)"),
        ({"model": "/no/such"}, "--model says where it is now"),
    ],
)
def test_rerun_trusts_no_settings(cli, changes, sentence):
    cli("generate", HOUSE, "--out", "a.png")
    edit("a.png", **changes)
    assert sentence in cli("rerun", "a.png", status=1).err


def test_rerun_of_what_is_no_picture_of_ours(cli):
    cli("generate", HOUSE, "--out", "a.png")
    whole = Path("a.png").read_bytes()
    Path("short.png").write_bytes(whole[: len(whole) // 2])
    start = whole.index(b"IDAT") + 10
    Path("broken.png").write_bytes(whole[:start] + b"??????" + whole[start + 6 :])
    Image.new("RGB", (4, 4)).save("photo.png")
    for name, sentence in {
        "none.png": "does not exist",
        "short.png": "is truncated",
        "broken.png": "is damaged",
        "photo.png": "holds no settings of ldm",
    }.items():
        found = cli("rerun", name, status=1).err
        assert name in found and sentence in found and found.count("\n") == 1


# ---------------------------------------------------------------------------------------------- sentences

BAD = [  # words after `generate`, exit status, what the sentence says
    ([HOUSE, "--model", "no/such/folder"], 1, "There is no model 'no/such/folder'"),
    ([HOUSE, "--model", "empty"], 1, "empty is not a model folder"),
    ([HOUSE, "--sampler", "eulr"], 1, "Unknown sampler 'eulr': ldm has ddpm, ddim, euler"),
    ([HOUSE, "--sampler", "eulr"], 1, "Did you mean 'euler'?"),
    ([HOUSE, "--width", "100"], 1, "width must be a multiple of 8, not 100"),
    ([HOUSE, "--height", "7"], 1, "height must be a multiple of 8, not 7"),
    ([HOUSE, "--width", "0"], 2, "--width must be 1 or more, not 0"),
    ([HOUSE, "--height", "160000"], 2, "--height must be at most 16384"),
    ([HOUSE, "--steps", "0"], 2, "--steps must be 1 or more, not 0"),
    ([HOUSE, "--steps", "-3"], 2, "--steps must be 1 or more, not -3"),
    ([HOUSE, "--steps", "1.5"], 2, "--steps must be a whole number, not '1.5'"),
    ([HOUSE, "--steps", "1001"], 1, "1001 steps asked for; this model's schedule has between 1 and 1000"),
    ([HOUSE, "--count", "0"], 2, "--count must be 1 or more"),
    ([HOUSE, "--seed", "-1"], 2, "--seed must be 0 or more"),
    ([HOUSE, "--seed", str(2**63)], 2, "--seed must be at most"),
    ([HOUSE, "--guidance", "nan"], 2, "--guidance must be finite, not nan"),
    ([HOUSE, "--guidance", "much"], 2, "--guidance must be a number, not 'much'"),
    ([HOUSE, "--eta", "2"], 2, "--eta must be between 0 and 1, not 2"),
    ([HOUSE, "--eta", "1"], 1, "dpm++2m has no eta, ddim and tcd have: take one of these samplers, or leave eta out."),
    ([HOUSE, "--sampler", "dpm++"], 1, "Did you mean 'dpm++2m'?"),
    ([HOUSE, "--rule", "eulr"], 1, "Unknown schedule rule 'eulr': ldm knows ddpm, ddim, euler"),
    ([HOUSE, "--rule", "eulr"], 1, "Did you mean 'euler'?"),
    ([HOUSE, "--rule", "flow"], 1, "flow models have the rule flow, and they alone"),
    ([HOUSE, "--rule", "lcm", "--steps", "51"], 1, "51 steps asked for; this model's schedule has between 1 and 50"),
    ([HOUSE, "--sigmas", "karas"], 1, "Unknown choice of sigmas 'karas': ldm knows spaced, karras, exponential, beta"),
    ([HOUSE, "--sigmas", "karas"], 1, "Did you mean 'karras'?"),
    ([HOUSE, "--sigmas", "9,1,b"], 2, "--sigmas must be a name or numbers with commas between them, not '9,1,b'."),
    ([HOUSE, "--sigmas", "1,9"], 1, "sigmas must be 2 or more falling numbers, none below 0: not [1.0, 9.0]"),
    ([HOUSE, "--sigmas", "9"], 1, "sigmas must be 2 or more falling numbers"),
    ([HOUSE, "--sigmas", "9,1,0", "--steps", "3"], 1, "3 steps asked for, but the sigmas given make 2: leave one of"),
    ([HOUSE, "--timesteps", "3,900"], 1, "timesteps must be 1 or more falling numbers, none below 0, at most 999"),
    ([HOUSE, "--timesteps", "1000,3"], 1, "at most 999: not [1000.0, 3.0]"),
    ([HOUSE, "--timesteps", "many"], 2, "--timesteps must be numbers with commas between them, not 'many'"),
    ([HOUSE, "--timesteps", "9,1", "--steps", "3"], 1, "3 steps asked for, but the timesteps given make 2"),
    ([HOUSE, "--timesteps", "9", "--sigmas", "karras"], 1, "Both timesteps and sigmas are given: a schedule takes one"),
    ([HOUSE, "--clip-skip", "3"], 1, "clip_skip 3 asked for, but the text encoder has 2 layers"),
    ([HOUSE, "--dtype", "flaot16"], 2, "not 'flaot16'. Did you mean 'float16'?"),
    ([HOUSE, "--device", "cuad"], 1, "Unknown device 'cuad': ldm knows cpu, cuda, mps. Did you mean 'cuda'?"),
    ([HOUSE, "--device", "cuda:99"], 1, "There is no device 'cuda:99'"),
    ([HOUSE, "--device", "cpu:1"], 1, "the last one here is cpu:0"),
    ([HOUSE, "--out", "a.jpg"], 1, "--out a.jpg must end in .png"),
    ([HOUSE, "--out", ".png"], 1, "must end in .png"),
    ([HOUSE, "--out", "nowhere/a.png"], 1, "the folder nowhere does not exist"),
    ([HOUSE, "--out", "file.txt/a.png"], 1, "Cannot write file.txt/a.png: Not a directory"),
    ([HOUSE, "--out", "file.txt/sub/"], 1, "Cannot make the folder file.txt/sub: Not a directory"),
    ([HOUSE, "--out", "folder.png", "--count", "2", "--seed", "3"], 1, "a folder of that name stands there"),
    ([HOUSE, "--save-steps", "file.txt"], 1, "Cannot make the folder file.txt"),
    ([], 2, "Say what to draw"),
    (
        [HOUSE, "--prompts", "p.txt"],
        2,
        "Say what to draw: one prompt in quotation marks, or --prompts FILE, and not both",
    ),
    (["--prompts", "none.txt"], 1, "Cannot read the prompts in none.txt: No such file"),
    (["--prompts", "empty"], 1, "Cannot read the prompts in empty: Is a directory"),
    (["--prompts", "blank.txt"], 1, "There is no prompt in blank.txt"),
    (["--prompts", "latin.txt"], 1, "latin.txt is not UTF-8 text (byte 1)"),
    (["--prompts", "p.txt", "--out", "a.png"], 1, "give --out a folder, not a.png"),
    (["a", "red", "house"], 2, "'red' is one word too many: put words that belong together in quotation marks"),
    ([HOUSE, "--stepps", "3"], 2, "Unknown option --stepps. Did you mean '--steps'?"),
    ([HOUSE, "--prompt=x"], 2, "Unknown option --prompt. Did you mean '--prompts'?"),
    ([HOUSE, "--steps"], 2, "--steps expected one argument"),
    ([os.fsdecode(b"a red \xff house")], 1, "not valid UTF-8"),
]


@pytest.mark.parametrize("words, status, sentence", BAD)
def test_bad_input_gets_one_sentence_and_leaves_nothing(cli, words, status, sentence):
    for folder in ("empty", "folder-3.png"):
        Path(folder).mkdir()
    Path("file.txt").write_text("x")
    Path("p.txt").write_text("a house")
    Path("blank.txt").write_text("\n# only a remark\n")
    Path("latin.txt").write_bytes(b"\n\xe9")
    before = names()
    found = cli("generate", *words, status=status)
    assert found.err.startswith("ldm: ") and found.err.count("\n") == 1 and sentence in found.err
    assert found.out == "" and names() == before


@pytest.mark.parametrize(
    "words, sentence",
    [
        ([], "The following arguments are required: COMMAND"),
        (["generat"], "Did you mean 'generate'? See `ldm --help`."),
        (["train", "uent"], "Unknown stage 'uent': vae, clip, checker, unet, all, depth-reader, "),
        (["train", "uent"], "controlnet, flow, lora, word, export. Did you mean 'unet'? See"),
        (["train"], "required: STAGE"),
        (["train", "vae", "--text", "frozen"], "Unknown option --text."),
        (["train", "all", "--lr", "1"], "Unknown option --lr."),
        (["train", "unet", "--text", "frosen"], "--text must be frozen or tuned, not 'frosen'. Did you mean 'frozen'?"),
        (["rerun"], "required: picture"),
    ],
)
def test_bad_commands(capsys, words, sentence):
    assert main(words) == 2
    err = capsys.readouterr().err
    assert err.startswith("ldm: ") and sentence in err and err.count("\n") == 1


def test_the_nearest_model_is_named(cli, monkeypatch, model):
    monkeypatch.setattr("ldm.checkpoints.places.embedded", lambda mark: {"scenes": model})
    found = cli("generate", HOUSE, "--model", "sceens", status=1)
    assert "There is no model 'sceens'" in found.err and "Did you mean 'scenes'?" in found.err
    assert cli("generate", HOUSE, "--out", "a.png", model=None).lines == ["a.png"]  # and scenes is the default


# ---------------------------------------------------------------------------------------------- samplers, schedules


def test_samplers_lists_every_one(cli):
    found = cli("samplers")
    assert found.out == table() + "\n"
    assert [line.split()[0] for line in found.lines[1:]] == list(SAMPLERS)


@pytest.fixture
def no_weights(model, tmp_path):
    """A model's folder of which only the files are left that say what its levels are."""
    folder = tmp_path / "levels"
    shutil.copytree(model / "scheduler", folder / "scheduler")
    shutil.copy(model / "ldm.json", folder)
    return folder


def test_schedule_prints_the_table_that_a_run_takes_and_reads_no_weights(cli, no_weights, model):
    """`ldm schedule` says before what `pipe.steps` does then."""
    pipe = ldm.load(model)
    for words, chosen in [
        ([], {}),
        (["--steps", 7, "--sampler", "heun"], {"steps": 7, "sampler": "heun"}),
        (["--steps", 7, "--sampler", "heun", "--compat"], {"steps": 7, "sampler": "heun", "compat": True}),
        (["--rule", "unipc", "--sigmas", "karras"], {"rule": "unipc", "sigmas": "karras"}),
        (["--sigmas", "14.6,2,0"], {"sigmas": [14.6, 2, 0]}),
        (["--timesteps", "900,400.5,3", "--rule", "tcd"], {"timesteps": [900, 400.5, 3], "rule": "tcd"}),
    ]:
        head, *rows = cli("schedule", "--model", no_weights, *words).lines
        steps = list(pipe.steps(HOUSE, **chosen))
        visited = [steps[0].level, *(step.next for step in steps)]
        assert rows == pipe.schedule(**chosen).table().splitlines() and len(rows) == len(visited) + 1
        for row, level in zip(rows[1:], visited, strict=True):
            found = [float(word) for word in row.split()]
            assert found[:4] == pytest.approx(level, abs=1e-3) and found[4] == pytest.approx(level.ratio, rel=1e-3)
        settings = pipe.settings(HOUSE, **chosen)
        assert head.startswith(f"rule {settings.rule}, sigmas ") and f"sampler {settings.sampler}, " in head
        assert f"{len(steps)} steps" in head and head.endswith("as diffusers does") == settings.compat
    assert cli("schedule", "--model", no_weights).lines[0] == "rule ddim, sigmas spaced, sampler dpm++2m, 3 steps"


def test_schedule_says_where_diffusers_steps_land(cli, no_weights):
    words = ["schedule", "--model", no_weights, "--sampler", "ddim", "--steps", 3]
    (no_weights / "scheduler" / "scheduler_config.json").write_text(
        '{"_class_name": "DDIMScheduler", "timestep_spacing": "trailing", "clip_sample": false}'
    )
    assert [line.split()[1] for line in cli(*words).lines[2:]] == ["999.000", "666.000", "332.000", "0.000"]
    assert cli(*words, "--compat").lines[-1] == "but diffusers' steps land on t = 666, 333, 0"


def test_schedule_plots_every_row(cli, no_weights, monkeypatch):
    """The points of the figure are the table's; a row that no logarithm holds is an arrow."""
    figures, plot = [], schedule.plot
    monkeypatch.setattr(schedule, "plot", lambda *rest: figures.append(plot(*rest)) or figures[-1])
    assert cli("schedule", "--model", no_weights, "--compat", "--steps", 9, "--plot", "a.png").lines == ["a.png"]
    image = pixels("a.png")
    assert image.shape[1] > 1500 and 0.01 < (image.min(axis=2) < 200).mean() < 0.3
    with Image.open("a.png") as saved:
        colors = {color for _, color in saved.getcolors(1 << 24)}
    assert {tuple(int(c[i : i + 2], 16) for i in (1, 3, 5)) for c in (schedule.BLUE, schedule.RED)} <= colors
    title, (mix, ratio, time) = figures[0].get_suptitle(), figures[0].axes
    assert (
        title
        == read_settings("a.png")["plot"]
        == "rule dpm, sigmas spaced, sampler dpm++2m, 9 steps, as diffusers does"
    )
    config, _ = loading.find_schedule(no_weights)
    levels = make_schedule(config, 9, "dpm").levels
    assert [line.get_ydata().tolist() for line in mix.lines] == [[r.alpha for r in levels], [r.sigma for r in levels]]
    assert time.lines[0].get_ydata().tolist() == [r.t for r in levels]
    assert ratio.get_yscale() == "log" and ratio.lines[0].get_ydata().tolist() == [r.ratio for r in levels[:-1]]
    assert levels[-1].ratio == 0 and [each.get_text() for each in ratio.texts] == ["0"]


def test_a_plot_replaces_a_plot_and_nothing_else(cli, no_weights, monkeypatch):
    words = ["schedule", "--model", no_weights, "--plot"]
    cli(*words, "a.png")
    cli(*words, "a.png", "--steps", 5)
    assert "5 steps" in read_settings("a.png")["plot"]
    Image.new("RGB", (4, 4)).save("photo.png")
    cli("generate", HOUSE, "--out", "house.png")
    for name in ("photo.png", "house.png"):
        before = Path(name).read_bytes()
        assert f"{name} is there already and is no plot by ldm: choose" in cli(*words, name, status=1).err
        assert Path(name).read_bytes() == before
    assert "--plot a.jpg must end in .png" in cli(*words, "a.jpg", status=1).err
    assert "the folder no does not exist" in cli(*words, "no/a.png", status=1).err
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    found = cli(*words, "b.png", status=1).err
    assert found == "ldm: --plot needs matplotlib: python -m pip install matplotlib.\n" and not Path("b.png").exists()


@pytest.mark.parametrize(
    "words, status, sentence",
    [
        (["--model", "sceens"], 1, "There is no model 'sceens'"),
        (["--model", "empty"], 1, "empty/scheduler/scheduler_config.json does not exist"),
        (["--sampler", "eulr"], 1, "Did you mean 'euler'?"),
        (["--rule", "dmp"], 1, "Did you mean 'dpm'?"),
        (["--sigmas", "ay"], 1, "Did you mean 'ays'?"),
        (["--steps", "1001"], 1, "1001 steps asked for; this model's schedule has between 1 and 1000"),
        (["--timesteps", "5,6"], 1, "falling numbers"),
        (["--eta", "1"], 2, "Unknown option --eta"),
        (["--stepps", "1"], 2, "Did you mean '--steps'?"),
    ],
)
def test_schedule_sentences(cli, no_weights, words, status, sentence):
    Path("empty").mkdir()
    words = words if "--model" in words else ["--model", no_weights, *words]
    found = cli("schedule", *words, status=status)
    assert found.err.startswith("ldm: ") and found.err.count("\n") == 1 and sentence in found.err and found.out == ""


def test_help_names_every_rule_and_choice(cli):
    """By hand, for `--help` imports no torch."""
    text = " ".join(cli("schedule", "--help").out.split())
    assert f"does: {', '.join(RULES)} " in text and f"sigma/alpha: {', '.join(CHOICES)};" in text


def test_evaluate_hands_the_levels_on(cli, model, monkeypatch):
    calls = []
    monkeypatch.setattr("ldm.metrics.evaluation.evaluate", lambda *rest, **options: calls.append((rest[1:], options)))
    words = ["evaluate", "--model", model, "--count", 3]
    cli(*words)
    cli(*words, "--sampler", "euler", "--sigmas", "9,1,0", "--guidance", 0, "--compat", "--out", "o", "--batch", 2)
    assert calls[0] == ((3, None), {"batch": 20})
    options = {"sampler": "euler", "sigmas": [9.0, 1.0, 0.0], "guidance": 0.0, "compat": True, "batch": 2}
    assert calls[1] == ((3, Path("o")), options)
    assert "Did you mean 'euler'?" in cli(*words, "--sampler", "eulr", status=1).err
    assert "1001 steps asked for" in cli(*words, "--steps", 1001, status=1).err
    assert len(calls) == 2


# ---------------------------------------------------------------------------------------------- damaged models

# part: numbers that overflow together (the text encoder's alone, in the LayerNorm after it), and who is named
CULPRITS = {
    "text_encoder": (["encoder.layers.1.mlp.fc2.bias"], "the text encoder returned"),
    "unet": (["conv_norm_out.bias", "conv_out.weight"], "the UNet, in step 1 returned"),
    "vae": (["decoder.conv_norm_out.bias", "decoder.conv_out.weight"], "the VAE's decoder returned"),
}


@pytest.fixture
def damaged(model, tmp_path_factory):
    return Path(shutil.copytree(model, tmp_path_factory.mktemp("models") / "damaged"))


@pytest.mark.parametrize("part", CULPRITS)
def test_nan_in_the_weights_is_named(cli, damaged, part):
    name = CULPRITS[part][0][0]
    plant(damaged, part, name, float("nan"))
    found = cli("generate", HOUSE, model=damaged, status=1).err
    assert f"{part}/" in found and name in found and "1 NaN" in found and names() == []


@pytest.mark.parametrize("part", CULPRITS)
def test_numbers_that_become_infinite_are_named_and_never_a_black_picture(cli, damaged, part):
    culprits, sentence = CULPRITS[part]
    for name in culprits:
        plant(damaged, part, name, 3e38)
    found = cli("generate", HOUSE, model=damaged, status=1).err
    assert sentence in found and "not finite" in found and found.count("\n") == 1 and names() == []


@pytest.mark.parametrize("part", CULPRITS)
def test_truncated_weights(cli, damaged, part):
    path = next((damaged / part).glob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:-100])
    found = cli("generate", HOUSE, model=damaged, status=1).err
    assert f"{path} is corrupt or truncated" in found and found.count("\n") == 1


def test_damaged_configuration(cli, damaged):
    (damaged / "unet" / "config.json").write_text("{")
    assert "unet/config.json is not valid JSON" in cli("generate", HOUSE, model=damaged, status=1).err


def test_an_error_late_in_a_run_leaves_what_was_drawn(cli, prompts, monkeypatch):
    decode, calls = Pipeline.decode, []

    def broken(self, x0, tile):
        calls.append(1)
        return decode(self, x0 if len(calls) < 3 else x0 * float("nan"), tile)

    monkeypatch.setattr(Pipeline, "decode", broken)
    found = cli("generate", "--prompts", prompts, status=1)
    assert "the latents returned numbers" in found.err and len(found.lines) == 2
    assert names("pictures") == ["a-blue-house-0.png", "a-red-house-0.png"]


@pytest.mark.parametrize(
    "error, sentence",
    [
        (MemoryError(), "Not enough memory"),
        (
            RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"),
            "Not enough memory",
        ),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "Not enough memory"),
        (OSError(28, "No space left on device", "a.png"), "a.png: No space left on device."),
        (RuntimeError("mat1 and mat2\nshapes"), "Unexpected RuntimeError: mat1 and mat2 shapes (with LDM_TRACEBACK=1"),
    ],
)
def test_errors_of_the_machine_are_sentences_too(cli, monkeypatch, error, sentence):
    def broken(*_, **__):
        raise error

    monkeypatch.setattr(Pipeline, "prepare", broken)
    found = cli("generate", HOUSE, status=1).err
    assert found.startswith(f"ldm: {sentence}") and found.count("\n") == 1
    monkeypatch.setenv("LDM_TRACEBACK", "1")  # for those who look for the fault
    with pytest.raises(type(error)):
        cli("generate", HOUSE)


# ---------------------------------------------------------------------------------------------- the terminal


def test_a_bar_where_someone_looks(cli, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    terminal = Terminal()
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", terminal)
        assert cli("generate", HOUSE, "--count", 4, "--batch", 2).lines == [
            f"a-large-red-house-{k}.png" for k in range(4)
        ]
    assert "picture 3 of 4" in terminal.getvalue() and "/6" in terminal.getvalue()  # two batches of three steps
    assert options.progress(5).disable  # and none where nobody does


def test_help_names_samplers_and_imports_no_torch():
    code = "import sys; from ldm.cli import main; main(['generate', '--help']); assert 'torch' not in sys.modules"
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    assert "--save-steps" in found.stdout and sum(name in found.stdout for name in SAMPLERS) >= 4


def start(*words, **options):
    """The command as a process of its own. Ctrl-C reaches it even where the tests run in a shell's background, whose
    children are born deaf to it."""
    options["preexec_fn"] = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)
    return subprocess.Popen(
        [sys.executable, "-m", "ldm", *map(str, words)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)}, **options,
    )  # fmt: skip


def test_a_real_ctrl_c(model, tmp_path):
    (tmp_path / "p.txt").write_text("\n".join(f"house {i}" for i in range(2000)))
    with start("generate", "--prompts", "p.txt", "--model", model, cwd=tmp_path) as process:
        first = process.stdout.readline().strip()
        process.send_signal(signal.SIGINT)
        rest, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    done = [first, *rest.split()]
    assert err.strip() == f"ldm: Stopped: {len(done)} of 2000 pictures are finished; the same command draws the others."
    assert names(tmp_path / "pictures") == sorted(Path(path).name for path in done)
    assert all(pixels(tmp_path / path).shape == (SIZE, SIZE, 3) for path in done)


def test_a_real_error(tmp_path):
    with start("generate", HOUSE, "--model", "nowhere", cwd=tmp_path) as process:
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (1, "") and err.startswith("ldm: There is no model 'nowhere'")
    assert "Traceback" not in err and err.count("\n") == 1


def test_drawing_never_imports_torchs_compiler(model, tmp_path):
    words = ["generate", HOUSE, "--model", str(model), "--out", str(tmp_path / "a.png")]
    code = f"import sys; from ldm.cli import main; main({words}); assert 'torch._dynamo' not in sys.modules"
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr  # it takes as long to import as all of torch


def test_version(capsys):
    assert main(["--version"]) == 0 and capsys.readouterr().out == f"ldm {ldm.__version__}\n"


# ---------------------------------------------------------------------------------------------- training


@dataclass(frozen=True)
class Recipe:
    pictures: int = 1
    steps: int = 1
    batch: int = 1
    lr: float = 1.0
    seed: int = 0
    device: str = "cpu"


@dataclass(frozen=True)
class UNetRecipe(Recipe):
    text: str = "tuned"


@pytest.fixture
def stages(monkeypatch):
    """Training that only takes notes: (stage, folder, recipe, other arguments)."""
    calls = []
    for stage in train.STAGES:

        def note(folder, recipe, stage=stage, **rest):
            calls.append((stage, folder, recipe, rest))
            (folder / stage).mkdir(exist_ok=True)
            (folder / stage / "config.json").write_text("{}")

        monkeypatch.setattr(f"ldm.train.{stage}.Recipe", UNetRecipe if stage == "unet" else Recipe)
        monkeypatch.setattr(f"ldm.train.{stage}.train", note)
    return calls


def test_train_all_goes_through_the_stages_in_order(cli, stages):
    cli("train", "all", "--run", "r/new", "--steps", 5, "--pictures", 64, "--seed", 3, "--text", "frozen")
    folder = Path("r/new")
    plain = Recipe(pictures=64, steps=5, seed=3)
    frozen = UNetRecipe(pictures=64, steps=5, seed=3, text="frozen")
    assert stages == [
        ("vae", folder, plain, {}),
        ("clip", folder, plain, {}),
        ("checker", folder, plain, {}),
        ("unet", folder, frozen, {"name": "unet"}),
    ]


def test_train_one_stage_with_its_options(cli, stages):
    cli("train", "vae", "--batch", 4, "--lr", 0.5, "--device", "cpu")
    assert stages == [("vae", Path("runs/scenes"), Recipe(batch=4, lr=0.5), {})]
    assert (
        "no trained clip yet, which unet needs: `ldm train clip --run runs/scenes`"
        in cli("train", "unet", status=1).err
    )
    cli("train", "clip")
    cli("train", "unet", "--name", "second", "--text", "frozen")
    assert stages[-1] == ("unet", Path("runs/scenes"), UNetRecipe(text="frozen"), {"name": "second"})


@pytest.mark.parametrize("stage", train.STAGES)
def test_every_recipe_has_what_the_options_set(stage):
    module = __import__(f"ldm.train.{stage}", fromlist=["Recipe"])
    known = {field.name for field in fields(module.Recipe)}
    assert {"pictures", "steps", "batch", "lr", "seed", "device"} <= known and ("text" in known) == (stage == "unet")


def test_train_says_what_ctrl_c_leaves(cli, monkeypatch):
    def stopped(folder, recipe):
        raise KeyboardInterrupt

    monkeypatch.setattr("ldm.train.vae.train", stopped)
    found = cli("train", "all", "--run", "r", status=130)
    assert found.err == "ldm: Stopped in vae; r holds what is done, the same command goes on.\n"


def test_train_sentences(cli, stages):
    Path("file").write_text("x")
    assert "Cannot make the run's folder file/x" in cli("train", "vae", "--run", "file/x", status=1).err
    assert "--init file lacks vae/diff" in cli("train", "all", "--init", "file", status=1).err
    assert "--init file lacks unet/diff" in cli("train", "unet", "--init", "file", status=1).err
    assert "Unknown device 'gpu'" in cli("train", "vae", "--device", "gpu", status=1).err
    Path("r/vae").mkdir(parents=True)  # begun and not finished
    assert "has no trained vae yet" in cli("train", "export", "--run", "r", status=1).err
    odd = cli("train", "vae", "--batch", 3, "--processes", 2, status=1).err
    assert "A batch of 3 cannot be shared by 2 processes: choose a multiple." in odd
    assert "Did you mean 'euler'?" in cli("train", "export", "--sampler", "eulr", status=1).err


def test_train_export(cli, monkeypatch):
    calls = []
    monkeypatch.setattr("ldm.train.export.export", lambda *rest: calls.append(rest))
    for stage in ("vae", "clip", "checker", "second"):
        Path("r", stage).mkdir(parents=True)
        Path("r", stage, "model.safetensors").touch()
    found = cli("train", "export", "--run", "r", "--to", "w/m", "--name", "second", "--steps", 9, "--guidance", 3)
    assert calls == [(Path("r"), Path("w/m"), {"steps": 9, "guidance": 3.0, "sampler": "dpm++2m"}, "second")]
    assert found.lines == ["w/m"] and Path("w").is_dir()


def test_settings_survive_the_journey_through_json(cli):
    cli("generate", 'ß "🏠"', "--out", "a.png", "--guidance", 0.1)
    with Image.open("a.png") as image:
        assert json.loads(image.text["ldm"]) == read_settings("a.png")
    assert read_settings("a.png")["guidance"] == 0.1 and read_settings("a.png")["prompt"] == 'ß "🏠"'


# ---------------------------------------------------------------------------------------------- memory and time


def test_switches_of_memory_change_no_picture_and_are_told(cli):
    cli("generate", HOUSE, "--count", 2, "--out", "plain/")
    words = ("--slice-vae", "--slice-attention", 3, "--channels-last")
    out = cli("generate", HOUSE, "--count", 2, *words, "--out", "saved/").lines
    for path in out:
        pair = [np.asarray(Image.open(f"{folder}/{Path(path).name}"), int) for folder in ("plain", "saved")]
        assert np.abs(pair[0] - pair[1]).max() <= 1 and pair[0].std() > 5
    told = ["slice_vae=True", "slice_attention=3", "channels_last=True"]
    assert read_settings(out[0])["memory"] == told and read_settings("plain/" + Path(out[0]).name)["memory"] == []
    assert cli("rerun", out[0]).out.splitlines()[1] == f"  memory: {told!r} then, [] now"


def test_under_autocast_a_picture_is_drawn_in_bfloat16(cli, model):
    own = ("--model", shutil.copytree(model, "model"))  # a pipeline that no other test is given
    cli("generate", HOUSE, *own, "--out", "folder/")
    cli("generate", HOUSE, *own, "--autocast", "bfloat16", "--out", "cast.png")
    pair = [np.asarray(Image.open(path), int) for path in ("folder/a-large-red-house-0.png", "cast.png")]
    found = read_settings("cast.png")
    assert 0 < np.abs(pair[0] - pair[1]).mean() < 20
    assert (found["dtype"], found["autocast"], found["memory"]) == ("float32", "bfloat16", [])
    assert cli("rerun", "cast.png").out == "cast.png: identical.\n"
    other = cli("generate", HOUSE, *own, "--autocast", "bfloat16", "--out", "folder/", status=1)
    assert "autocast: None then, 'bfloat16' now" in other.err
    told = cli("rerun", "cast.png", "--slice-vae", "--out", "again.png")
    assert "identical" in told.out and read_settings("again.png")["memory"] == ["slice_vae=True"]
    save_png(Image.open("cast.png"), "forged.png", found | {"autocast": "float8"})
    assert "don't belong together" in cli("rerun", "forged.png", status=1).err


@pytest.mark.parametrize(
    "words, status, sentence",
    [
        (["--offload", "parts"], 1, "--offload brings to another device what is at work, and the CPU has all of it"),
        (["--offload", "halves"], 2, "--offload must be parts or blocks, not 'halves'"),
        (["--slice-attention", "0"], 2, "--slice-attention must be 1 or more"),
        (["--autocast", "float64"], 2, "--autocast must be bfloat16 or float16"),
    ],
)
def test_switches_that_cannot_be_are_refused(cli, words, status, sentence):
    assert sentence in cli("generate", HOUSE, *words, "--out", "a.png", status=status).err


@pytest.mark.parametrize("by", ["parts", "blocks"])
def test_an_offloaded_pipeline_draws_the_same_bits(model, by):
    """Here the CPU is the device as well: what is compared is the road, not the saving."""
    from ldm import memory

    plain, pipe = ldm.load(model), ldm.load(model)
    expected = plain(HOUSE, seed=3, count=2)
    memory.offload(pipe, "cpu", by)
    found = pipe(HOUSE, seed=3, count=2)
    assert torch.equal(found.x0, expected.x0) and pipe.device == torch.device("cpu") and expected.x0.std() > 0.1
    again = pipe(HOUSE, image=found.images[0], strength=0.5)
    assert torch.equal(again.x0, plain(HOUSE, image=expected.images[0], strength=0.5).x0)
    memory.restore(pipe)
    assert torch.equal(pipe(HOUSE, seed=3, count=2).x0, expected.x0)
