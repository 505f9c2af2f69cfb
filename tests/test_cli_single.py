"""Single files on the command line: drawn, recorded with how they were read, and drawn again."""

import json

import pytest
import torch
from test_single import architecture_of, tensors_of, write
from tiny_pairs import PROMPT

from ldm.checkpoints import recognise
from ldm.cli import main
from ldm.io.folders import folder_hash
from ldm.io.png import read_settings

SMALL = ["--steps", "2", "--width", "32", "--height", "24"]


@pytest.fixture
def file(models, tmp_path, monkeypatch):
    """The tiny model's single file, with moving averages beside the weights, in an empty folder."""
    folder = models.folder("sd1")
    monkeypatch.setattr(recognise, "PUBLISHED", (architecture_of(folder, "sd1"),))
    monkeypatch.chdir(tmp_path)
    plain = tensors_of(folder)
    averaged = {
        "model_ema." + name.removeprefix("model.").replace(".", ""): tensor * 1.01
        for name, tensor in plain.items()
        if name.startswith("model.")
    }
    return write(folder, tmp_path / "one.safetensors", plain | averaged)


def pixels(path):
    return read_settings(path)["pixels"]


def test_how_a_file_was_read_stands_in_its_picture_and_is_done_again(file, capsys):
    words = ["generate", PROMPT, "--model", str(file), *SMALL, "--prediction-type", "v_prediction"]
    assert main([*words, "--out", "a.png"]) == 0
    assert main([*words, "--variant", "ema", "--out", "b.png"]) == 0
    plain, averaged = (read_settings(name) for name in ("a.png", "b.png"))
    assert plain["reading"] == ["prediction_type=v_prediction"]
    assert averaged["reading"] == ["variant=ema", "prediction_type=v_prediction"]
    assert plain["model_hash"] == averaged["model_hash"] == folder_hash(file) and pixels("a.png") != pixels("b.png")
    capsys.readouterr()
    for name in ("a.png", "b.png"):
        assert main(["rerun", name]) == 0
        assert capsys.readouterr().out == f"{name}: identical.\n"


def test_a_pickle_is_allowed_anew_for_every_run(file, models, capsys):
    """A picture of a stranger's must not say for others that pickles are fine."""
    torch.save({"state_dict": tensors_of(models.folder("sd1"))}, "one.ckpt")
    words = ["generate", PROMPT, "--model", "one.ckpt", *SMALL, "--prediction-type", "epsilon", "--out", "a.png"]
    assert main(words) == 1
    assert "one.ckpt is a pickle" in capsys.readouterr().err
    assert main([*words, "--allow-pickle"]) == 0
    assert read_settings("a.png")["reading"] == ["prediction_type=epsilon"]
    capsys.readouterr()
    assert main(["rerun", "a.png"]) == 1
    assert "--allow-pickle" in capsys.readouterr().err
    assert main(["rerun", "a.png", "--allow-pickle"]) == 0
    assert capsys.readouterr().out == "a.png: identical.\n"


def test_a_picture_cannot_ask_for_more_than_how_to_read(file, tmp_path, capsys):
    from PIL import Image, PngImagePlugin

    assert (
        main(["generate", PROMPT, "--model", str(file), *SMALL, "--prediction-type", "epsilon", "--out", "a.png"]) == 0
    )
    settings = read_settings("a.png") | {"reading": ["allow_pickle=True"]}
    told = PngImagePlugin.PngInfo()
    told.add_text("ldm", json.dumps(settings))
    Image.open("a.png").save("b.png", pnginfo=told)
    capsys.readouterr()
    assert main(["rerun", "b.png"]) == 1
    assert "ask to read the model by 'allow_pickle', which ldm doesn't know" in capsys.readouterr().err


def test_the_schedule_of_a_file_is_shown(file, capsys):
    assert main(["schedule", "--model", str(file), "--steps", "3"]) == 0
    assert len(capsys.readouterr().out.splitlines()) >= 4


@pytest.mark.parametrize("where", ["model", "pictures"])
def test_a_stranger_s_picture_starts_no_download(models, tmp_path, monkeypatch, capsys, where):
    from PIL import Image, PngImagePlugin

    from ldm.checkpoints import places

    monkeypatch.chdir(tmp_path)
    assert main(["generate", PROMPT, "--model", str(models.folder("sd1")), *SMALL, "--out", "a.png"]) == 0
    named = {"model": "stranger/model", "pictures": ["--control", "canny@stranger/model:a.png"]}
    told = PngImagePlugin.PngInfo()
    told.add_text("ldm", json.dumps(read_settings("a.png") | {where: named[where]}))
    Image.open("a.png").save("b.png", pnginfo=told)
    monkeypatch.setattr(places.hub, "fetch", lambda *_: pytest.fail("asked the hub"))
    capsys.readouterr()
    assert main(["rerun", "b.png"]) == 1
    assert "The model 'stranger/model' isn't here: `ldm fetch stranger/model` brings it" in capsys.readouterr().err
