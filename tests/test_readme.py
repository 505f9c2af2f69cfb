"""What README shows of pictures that steer, run as it stands there."""

import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_pairs import SCENES, scenes

import ldm
from ldm.cli import main
from ldm.metrics.control import edge_f1, edges_of
from ldm.scenes import render, sample

README = Path(__file__).parent.parent / "README.md"


@scenes
@pytest.mark.skipif(not README.exists(), reason="there is no README.md")
def test_the_pictures_of_the_readme_are_led_by_the_picture(tmp_path, monkeypatch):
    picture = render(sample(30_000_011, "held-out", n=1, style="plain"))
    mask = 255 * picture.masks[0].astype(np.uint8)
    monkeypatch.chdir(tmp_path)
    Image.fromarray(picture.image).save("boat.png")
    Image.fromarray(mask).save("mask.png")
    block = re.search(r"<!-- steer -->\s*```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)[1]
    made = {"ldm": ldm, "pipe": ldm.load(SCENES)}
    exec(compile(block, "README.md", "exec"), made)
    house, night = (np.asarray(made[name].images[0]).astype(int) for name in ("house", "night"))
    boat = picture.image.astype(int)
    wanted = edges_of([Image.fromarray(picture.image)])
    alone = made["pipe"]("a green boat at sunset on sand").images
    led, unled = (edge_f1(edges_of(images), wanted).item() for images in (made["green"].images, alone))
    assert led > unled + 0.3, (led, unled)
    assert np.array_equal(house[mask == 0], boat[mask == 0])
    assert np.abs(house - boat)[mask > 0].mean() > 20
    assert night.mean() < 0.7 * boat.mean()  # it has become night


@scenes
def test_what_is_added_in_the_readme_shows(tmp_path, monkeypatch):
    """Neon is dark, a learnt word draws another thing, and night falls where the words change; then all is gone."""
    monkeypatch.chdir(tmp_path)
    block = re.search(r"<!-- add -->\s*```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)[1]
    made = {"ldm": ldm, "pipe": ldm.load(SCENES)}
    weights = {name: p.clone() for name, p in made["pipe"].unet.state_dict().items()}
    exec(compile(block, "README.md", "exec"), made)
    neon, mushroom, later = (np.asarray(made[name].images[0]).astype(int) for name in ("neon", "mushroom", "later"))
    day = np.asarray(made["pipe"]("a large red house on snow by day", seed=7).images[0]).astype(int)
    assert neon.mean() < 0.7 * day.mean() and later.mean() < 0.7 * day.mean()
    assert np.abs(mushroom - day)[40:].mean() > 10  # below the sky
    assert all(torch.equal(p, weights[name]) for name, p in made["pipe"].unet.state_dict().items())


@scenes
def test_what_is_added_on_the_command_line_of_the_readme_runs_as_it_stands(tmp_path, monkeypatch, capsys):
    """But for the lines that say by capitals, like MODEL, that something is to be put there; and of one step."""
    monkeypatch.chdir(tmp_path)
    section = README.read_text(encoding="utf-8").partition("## What people add")[2].partition("\n## ")[0]
    lines = [shlex.split(line, comments=True) for line in section.splitlines() if line.startswith("    ldm ")]
    runs = [words[1:] for words in lines if not any(re.fullmatch("[A-Z]{3,}", word) for word in words)]
    assert [words[0] for words in runs] == ["generate", "inspect", "merge", "tokens"]
    for words in runs:
        assert main([*words, *(["--steps", "1"] if words[0] == "generate" else [])]) == 0, capsys.readouterr().err
    out, err = capsys.readouterr()
    assert "trained by  ldm" in out and "house, at night" in out and "at weight 0.5 it changes" in err
    assert list(tmp_path.glob("*.png")) and (tmp_path / "neon" / "model_index.json").is_file()


@scenes
def test_what_the_readme_says_of_flux_runs_and_draws_what_it_says(tmp_path, monkeypatch):
    """Night is dark and the house red, in the few steps too; the page's way of stepping gives the very picture."""
    monkeypatch.chdir(tmp_path)
    block = re.search(r"<!-- flux -->\s*```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)[1]
    made = {"ldm": ldm}
    exec(compile(block, "README.md", "exec"), made)
    house, fewer = (np.asarray(made[name].images[0]).astype(int) for name in ("house", "fewer"))
    for picture in (house, fewer):
        assert picture[:40].mean() < 80  # the sky
        assert ((picture[..., 0] > 110) & (picture[..., 1:].max(-1) < 70)).sum() > 500  # the house
    assert np.array_equal(np.asarray(Image.open(sorted(tmp_path.glob("flow-*.png"))[-1])).astype(int), house)
    assert len(list(tmp_path.glob("flow-*.png"))) == 25


def test_what_the_readme_says_of_how_much_code_there_is_was_counted():
    code_size = pytest.importorskip("code_size")
    text = README.read_text(encoding="utf-8").replace("\n", " ")
    said = re.search(r"counts: (\d+) lines .* diffusers has (\d+), and ([\d,]+) .* has ([\d,]+) for", text)
    counted = {what: (ours, theirs) for what, ours, theirs in code_size.table()}
    counted = (*counted["the transformer"], *counted["pipelines, all families and tasks"])
    for number, true in zip(said.groups(), counted, strict=True):
        assert abs(int(number.replace(",", "")) - true) < 0.1 * true, counted


def test_the_lines_about_sdxl_run_as_they_stand(models):
    """On the tiny SDXL in place of the real one, and the CPU in place of a card."""
    from ldm import memory

    block = re.search(r"<!-- xl -->\s*```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)[1]
    for name, folder in (("sdxl", models.folder("sdxl")), ("sdxl-refiner", models.folder("refiner"))):
        block, count = re.subn(f'"{name}"', repr(str(folder)), block)
        assert count == 1
    made = {"ldm": ldm, "memory": memory}
    exec(compile(block.replace('"cuda"', '"cpu"'), "README.md", "exec"), made)
    assert made["image"].size == (64, 64) and np.asarray(made["image"]).std() > 5
    assert made["base"].vae.dtype != made["base"].dtype


@pytest.mark.parametrize("kind", ["canny", "depth"])
def test_the_cards_of_the_controlnets_have_the_figures_of_their_files(kind):
    folder = SCENES.parent / f"scenes-{kind}"
    card = (folder / "README.md").read_text(encoding="utf-8")
    net = ldm.load_controlnet(f"scenes-{kind}", ldm.load(SCENES))
    assert f"{sum(p.numel() for p in net.parameters()) / 1e6:.1f} M parameters" in card
    for name in re.findall(r"\]\(([\w./-]+)\)", card):
        assert (folder / name).exists(), name
