"""Pictures on the command line: each does to a picture what the same call does from Python, and nothing else.

A drawn picture's record knows the pictures given by their pixels, and how to find them again; whatever is wrong with
them is told in one sentence. All with the tiny model, and a tiny ControlNet whose zero convolutions are no longer zero.
"""

import functools
import io
import json
import re
import shutil
import struct
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given as drawn_from
from hypothesis import settings as examples
from hypothesis import strategies as st
from PIL import Image, ImageDraw, ImageOps
from tiny import DEFAULTS, SIZE, tiny_model

import ldm
from ldm import loading, scenes
from ldm.checkpoints import places
from ldm.cli import given, main, wishes
from ldm.cli.condition import KINDS
from ldm.cli.record import pixel_hash
from ldm.conditions import canny, depth_picture, scribble
from ldm.control import Control
from ldm.errors import LDMError
from ldm.io.folders import folder_hash, read_json, write_json
from ldm.io.png import read_settings, save_png
from ldm.io.weights import save_weights
from ldm.models.controlnet import ControlNet
from ldm.pictures import extend
from ldm.pipeline import Pipeline

HOUSE = "a large red house"
STEPS = DEFAULTS["steps"]


def photo(seed=0, width=SIZE, height=SIZE):
    """Something with outlines and colours, of any size."""
    rng = np.random.default_rng(seed)
    image = Image.fromarray(rng.integers(90, 130, (height, width, 3), dtype=np.uint8))
    pen = ImageDraw.Draw(image)
    for _ in range(3):
        x, y = int(rng.integers(0, width // 2)), int(rng.integers(0, height // 2))
        pen.rectangle([x, y, x + width // 3, y + height // 3], tuple(map(int, rng.integers(0, 256, 3))))
    return image


def half_mask(width=SIZE, height=SIZE):
    """Its right half is drawn anew; the border lies on no latent's border."""
    mask = Image.new("L", (width, height))
    mask.paste(255, (width // 2 + 3, 0, width, height))
    return mask


def some_net(unet, folder, seed=0):
    """A ControlNet in diffusers' format that changes what is drawn."""
    net, rng = ControlNet.from_unet(unet), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if not parameter.any() and "norm" not in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=rng))
    folder.mkdir()
    write_json(folder / "config.json", net.config.to_json())
    save_weights(net.state_dict(), folder / "diffusion_pytorch_model.safetensors")
    return folder


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def nets(model, tmp_path_factory):
    """Two ControlNets."""
    unet, folder = ldm.load(model).unet, tmp_path_factory.mktemp("nets")
    return some_net(unet, folder / "one", 1), some_net(unet, folder / "two", 2)


@pytest.fixture(scope="session")
def load(model):
    """`ldm.load`, which reads the tiny model once for all tests; every other is read as ever."""
    read = loading.load
    kept = functools.cache(read)
    return lambda name, *rest, **options: (kept if str(name) == str(model) else read)(name, *rest, **options)


@pytest.fixture
def cli(model, load, tmp_path, monkeypatch, capsys):
    """Run a command in a folder that holds some pictures; status, standard output and standard error."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(loading, "load", load)
    photo().save("photo.png")
    half_mask().save("mask.png")

    def run(*words, status=0, model=model):
        words = [str(word) for word in words]
        named = ["--model", str(model)] if words[0] == "generate" and "--model" not in words else []
        found = main([*words, *named])
        out, err = capsys.readouterr()
        assert found == status, err
        assert "Traceback" not in err
        return SimpleNamespace(out=out, err=err, lines=out.splitlines())

    return run


@pytest.fixture
def runs(monkeypatch):
    """A list that grows by the prompt of every run that is prepared."""
    calls, prepare = [], Pipeline.prepare
    monkeypatch.setattr(
        Pipeline, "prepare", lambda self, prompt, **rest: calls.append(prompt) or prepare(self, prompt, **rest)
    )
    return calls


def pixels(path):
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"), dtype=int)


def names(folder="."):
    return sorted(path.name for path in Path(folder).iterdir())


def one_line(err):
    return err.startswith("ldm: ") and err.count("\n") == 1 and err.rstrip().endswith((".", "?", "`"))


def edit(path, drop=(), **changes):
    """Save a picture of ldm again, with another record."""
    with Image.open(path) as old:
        record = {name: value for name, value in read_settings(path).items() if name not in drop}
        save_png(old.copy(), path, record | changes)


# ---------------------------------------------------------------------------------------------- as from Python


@pytest.fixture
def pipe(cli, model):
    return loading.load(model)


def larger(pipe, factor, refine=0.6, led=None, **options):
    """What --enlarge is, with the parts."""
    led = led or {}
    small = pipe(HOUSE, **led, **options)
    return pipe(HOUSE, image=pipe.enlarge(small.x0, factor), strength=refine, **led)


def inverted(pipe, told, **options):
    up = {name: value for name, value in options.items() if name != "guidance"}
    return pipe(HOUSE, latents=pipe.invert("photo.png", told, **up), sampler="ddim", **options)


def of_scene(kind, seed=7):
    picture = scenes.render(scenes.sample(seed, "any"))
    return depth_picture(picture.depth) if kind == "depth" else Image.fromarray(picture.image)


SQUARE = {"width": 32, "height": 32}
IMAGE = ["--image", "photo.png"]

# What is said (NET and OTHER stand for folders), the same from Python (of the pipeline and the two nets), and what the
# record has under `given` beside hashes.
WAYS = {
    "image": (IMAGE, lambda p, n, o: p(HOUSE, image="photo.png", strength=0.8), {}),
    "strength": ([*IMAGE, "--strength", "0.4"], lambda p, n, o: p(HOUSE, image="photo.png", strength=0.4), {}),
    "nothing drawn over": ([*IMAGE, "--strength", "0"], lambda p, n, o: p(HOUSE, image="photo.png", strength=0.0), {}),
    "actual steps": (
        [*IMAGE, "--strength", "0.5", "--steps-are", "actual"],
        lambda p, n, o: p(HOUSE, image="photo.png", strength=0.5, steps=2 * STEPS), {},
    ),
    "a scene": (
        ["--image", "scene:7", "--width", "64", "--height", "64"],
        lambda p, n, o: p(HOUSE, image=of_scene("image"), width=64, height=64), {},
    ),
    "another size": (
        [*IMAGE, "--width", "48", "--height", "48"],
        lambda p, n, o: p(HOUSE, image="photo.png", width=48, height=48), {},
    ),
    "mask": (
        [*IMAGE, "--mask", "mask.png"],
        lambda p, n, o: p(HOUSE, image="photo.png", mask="mask.png", strength=1.0), {},
    ),
    "mask, half drawn over": (
        [*IMAGE, "--mask", "mask.png", "--strength", "0.7"],
        lambda p, n, o: p(HOUSE, image="photo.png", mask="mask.png", strength=0.7), {},
    ),
    "mask, not pasted": (
        [*IMAGE, "--mask", "mask.png", "--no-paste"],
        lambda p, n, o: p(HOUSE, image="photo.png", mask="mask.png", paste=False), {"no_paste": True},
    ),
    "outpaint": (
        [*IMAGE, "--outpaint", "0,8,16,0"],
        lambda p, n, o: p(HOUSE, **dict(zip(("image", "mask"), extend(photo(), 0, 8, 16, 0), strict=True))),
        {"outpaint": [0, 8, 16, 0]},
    ),
    "edges": (
        ["--control", "canny@NET:photo.png"],
        lambda p, n, o: p(HOUSE, control=Control(n, canny(photo()))), {},
    ),
    "edges at a scale": (
        ["--control", "canny@NET:photo.png:0.5"],
        lambda p, n, o: p(HOUSE, control=Control(n, canny(photo()), 0.5)), {},
    ),
    "edges against": (
        ["--control", "canny@NET:photo.png:-1"],
        lambda p, n, o: p(HOUSE, control=Control(n, canny(photo()), -1.0)), {},
    ),
    "edges at first": (
        ["--control", "canny@NET:photo.png:0.8:0:0.5"],
        lambda p, n, o: p(HOUSE, control=Control(n, canny(photo()), 0.8, 0.0, 0.5)), {},
    ),
    "guess": (
        ["--control", "canny@NET:photo.png", "--guess"],
        lambda p, n, o: p(HOUSE, control=Control(n, canny(photo()), guess=True)), {"guess": True},
    ),
    "two nets": (
        ["--control", "scribble@NET:photo.png:0.7", "--control", "as-is@OTHER:photo.png"],
        lambda p, n, o: p(HOUSE, control=[Control(n, scribble(photo()), 0.7), Control(o, photo())]), {},
    ),
    "a scene's edges": (
        ["--control", "canny@NET:scene:7:0.9"],
        lambda p, n, o: p(HOUSE, control=Control(n, canny(of_scene("image").resize((32, 32), 1)), 0.9), **SQUARE), {},
    ),
    "a scene's depth": (
        ["--control", "depth@NET:scene:7", "--width", "64", "--height", "64"],
        lambda p, n, o: p(HOUSE, control=Control(n, of_scene("depth")), width=64, height=64), {},
    ),
    "image and edges": (
        [*IMAGE, "--strength", "0.7", "--control", "canny@NET:photo.png"],
        lambda p, n, o: p(HOUSE, image="photo.png", strength=0.7, control=Control(n, canny(photo()))), {},
    ),
    "mask and edges": (
        [*IMAGE, "--mask", "mask.png", "--control", "as-is@NET:photo.png"],
        lambda p, n, o: p(HOUSE, image="photo.png", mask="mask.png", control=Control(n, photo())), {},
    ),
    "enlarged": (["--enlarge", "1.5"], lambda p, n, o: larger(p, 1.5), {"enlarge": 1.5}),
    "enlarged by an odd factor": (["--enlarge", "1.3"], lambda p, n, o: larger(p, 1.3), {"enlarge": 1.3}),
    "enlarged and refined": (
        ["--enlarge", "2", "--refine", "0.9"], lambda p, n, o: larger(p, 2, 0.9), {"enlarge": 2.0, "refine": 0.9},
    ),
    "enlarged, not refined": (
        ["--enlarge", "2", "--refine", "0"], lambda p, n, o: larger(p, 2, 0.0), {"enlarge": 2.0, "refine": 0.0},
    ),
    "an image enlarged": (
        [*IMAGE, "--enlarge", "1.5"],
        lambda p, n, o: larger(p, 1.5, image="photo.png", strength=0.8), {"enlarge": 1.5},
    ),
    "edges-enlarged": (
        ["--enlarge", "1.5", "--control", "canny@NET:photo.png"],
        lambda p, n, o: larger(p, 1.5, led={"control": Control(n, canny(photo()))}), {"enlarge": 1.5},
    ),
    "inverted": ([*IMAGE, "--invert", "a tree"], lambda p, n, o: inverted(p, "a tree"), {"invert": "a tree"}),
    "inverted on another table": (
        [*IMAGE, "--invert", "a tree", "--timesteps", "900,500,100"],
        lambda p, n, o: inverted(p, "a tree", timesteps=[900, 500, 100]), {"invert": "a tree"},
    ),
    "inverted, without words, unguided": (
        [*IMAGE, "--invert", "", "--guidance", "1"], lambda p, n, o: inverted(p, "", guidance=1.0), {"invert": ""},
    ),
    "in tiles": (
        ["--tile", "32", "--width", "64", "--height", "48"],
        lambda p, n, o: p(HOUSE, tile=32, width=64, height=48), {"tile": 32},
    ),
}  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
def test_the_command_draws_what_python_draws_and_rerun_draws_it_again(cli, pipe, nets, runs, way):
    words, draw, said = WAYS[way]
    words = [word.replace("NET", str(nets[0])).replace("OTHER", str(nets[1])) for word in words]
    found = draw(pipe, *(ldm.load_controlnet(net, pipe) for net in nets))
    (path,) = cli("generate", HOUSE, *words).lines
    assert np.array_equal(pixels(path), np.asarray(found.images[0], dtype=int))

    plain = pipe(HOUSE, width=found.settings.width, height=found.settings.height).images[0]
    assert np.abs(pixels(path) - np.asarray(plain, dtype=int)).max() > 5  # what was given is seen

    record = read_settings(path)
    hashes = {"image", "mask", "depth", "control"}
    assert {name: value for name, value in record["given"].items() if name not in hashes} == said
    assert not re.search(r"photo|mask\.png|scene:|/|\\", json.dumps(record["given"]))
    small = 0.8 if "--image" in words else None  # the record is of the picture that is enlarged
    assert record["strength"] == (small if "enlarge" in said else found.settings.strength)

    runs.clear()
    assert "is drawn already" in cli("generate", HOUSE, *words).err and runs == []
    assert cli("rerun", path, "--out", "again.png").lines == ["again.png", f"{path}: identical."]
    assert read_settings("again.png") == record and runs != []


def test_a_tile_of_0_is_said_and_draws_at_once(cli):
    (path,) = cli("generate", HOUSE, "--tile", 0).lines
    cli("generate", HOUSE, "--out", "plain.png")
    assert np.array_equal(pixels(path), pixels("plain.png")) and read_settings(path)["given"] == {"tile": 0}


def test_what_the_record_knows_of_the_pictures(cli, nets):
    cli(
        "generate", HOUSE, *IMAGE, "--mask", "mask.png", "--control", f"canny@{nets[0]}:photo.png:0.8", "--out", "a.png"
    )
    found = read_settings("a.png")
    net = {"net": folder_hash(nets[0]), "kind": "canny", "scale": 0.8, "start": 0.0, "end": 1.0}
    assert found["given"] == {
        "image": given.hash_of(photo()),
        "mask": given.hash_of(half_mask()),
        "control": [net | {"picture": given.hash_of(canny(photo()))}],
    }
    assert len({given.hash_of(photo()), given.hash_of(photo(1)), given.hash_of(half_mask())}) == 3
    pair = Image.new("RGB", (8, 2)), Image.new("RGB", (2, 8))  # the same bytes
    assert given.hash_of(pair[0]) != given.hash_of(pair[1])
    assert wishes.read_words(found["pictures"], "x")["image"] == "photo.png"


def test_the_steps_that_are_run(cli):
    """total: a share of the steps; actual: so many. The record has the total, from which either follows."""
    for words, run, total in [
        (["--strength", 0.7], 2, 3),
        (["--strength", 0.34], 1, 3),
        (["--strength", 0.34, "--steps-are", "actual"], 3, 9),
        (["--strength", 0], 0, 3),
    ]:
        cli("generate", HOUSE, *IMAGE, *words, "--out", "a.png", "--save-steps", "in", "--overwrite")
        steps = [name for name in names("in") if name.startswith("step-")]
        assert steps == [f"step-{k:02d}.png" for k in range(run)] and read_settings("a.png")["steps"] == total
        if run:
            assert read_settings("in/step-00.png")["step"] == total - run


# ---------------------------------------------------------------------------------------------- masks


@pytest.mark.parametrize("size", [(SIZE, SIZE), (45, 37)])
def test_outside_the_mask_every_pixel_stays_and_the_change_is_said(cli, pipe, size):
    photo(0, *size).save("photo.png")
    half_mask(*size).save("mask.png")
    found = cli("generate", HOUSE, *IMAGE, "--mask", "mask.png", "--out", "a.png")
    result = pipe(HOUSE, image="photo.png", mask="mask.png")
    (level,) = result.changed
    assert level > 1 and f"to be kept by {level:.1f} grey levels of 255 on average; the picture's own are" in found.err
    original = photo(0, *size).resize(result.images[0].size, Image.Resampling.LANCZOS)
    kept = np.asarray(half_mask(*size).resize(original.size, Image.Resampling.LANCZOS)) < 128
    drawn, original = pixels("a.png"), np.asarray(original, dtype=int)
    assert 0.3 < kept.mean() < 0.7 and np.array_equal(drawn[kept], original[kept])
    assert (drawn[~kept] != original[~kept]).any(axis=1).mean() > 0.9
    loose = cli("generate", HOUSE, *IMAGE, "--mask", "mask.png", "--no-paste", "--out", "b.png")
    assert "grey levels" not in loose.err and (pixels("b.png")[kept] != original[kept]).any()


def test_outpainting_keeps_the_picture_and_fills_its_sides(cli):
    cli("generate", HOUSE, *IMAGE, "--outpaint", "8,0,16,24", "--out", "a.png")
    assert pixels("a.png").shape == (SIZE + 24, SIZE + 24, 3)
    assert np.array_equal(pixels("a.png")[:SIZE, 8 : 8 + SIZE], pixels("photo.png"))
    assert pixels("a.png")[SIZE:].std() > 5


# ---------------------------------------------------------------------------------------------- --explain


def thumb(sheet, row, column, columns):
    """A picture of a sheet whose pictures are of 256x256."""
    x, y = 4 + column * ((sheet.width - 4) // columns), 4 + row * (256 + 18 + 4)
    return np.asarray(sheet.crop((x, y, x + 256, y + 256)), dtype=int)


def test_explain_shows_the_mask_in_red_and_the_condition(cli, nets):
    Image.new("RGB", (SIZE, SIZE), (100, 100, 100)).save("grey.png")
    control = ["--control", f"canny@{nets[0]}:photo.png:0.8:0:0.5"]
    words = ["--image", "grey.png", "--mask", "mask.png", *control]
    assert cli("generate", HOUSE, *words, "--out", "a.png", "--explain", "e.png").lines == ["e.png", "a.png"]
    with Image.open("e.png") as sheet:
        picture, red, edges = thumb(sheet, 0, 0, 2), thumb(sheet, 0, 1, 2), thumb(sheet, 1, 0, 2)
    assert (picture == 100).all()
    left, right = red[:, : 8 * SIZE // 2], red[:, 8 * SIZE // 2 + 48 :]  # black and white in the mask
    assert (left == 100).all() and np.abs(right - (193, 40, 40)).max() <= 1
    assert np.array_equal(edges, np.asarray(ImageOps.contain(canny(photo()), (256, 256)), dtype=int))
    assert read_settings("e.png")["explains"] == read_settings("a.png")["pictures"]
    cli("generate", HOUSE, *words, "--out", "b.png", "--explain", "e.png")  # a sheet of ours is replaced
    cli("generate", HOUSE, *words, "--out", "c.png")
    assert np.array_equal(pixels("a.png"), pixels("c.png"))  # looking changes nothing


def test_explain_shows_the_condition_at_the_size_of_the_network(cli, nets):
    photo(3, 64, 64).save("large.png")
    cli(
        "generate",
        HOUSE,
        "--control",
        f"as-is@{nets[0]}:large.png",
        "--width",
        32,
        "--height",
        32,
        "--explain",
        "e.png",
    )
    with Image.open("e.png") as sheet:
        seen = photo(3, 64, 64).resize((32, 32), Image.Resampling.LANCZOS)
        assert np.array_equal(thumb(sheet, 0, 0, 1), np.asarray(ImageOps.contain(seen, (256, 256)), dtype=int))


@pytest.mark.parametrize("name", ["photo.png", "drawn.png"])
def test_explain_replaces_no_other_picture(cli, name):
    cli("generate", HOUSE, "--out", "drawn.png")
    before = Path(name).read_bytes()
    found = cli("generate", HOUSE, *IMAGE, "--explain", name, "--out", "a.png", status=1).err
    assert one_line(found) and f"{name} is there already and is no such sheet" in found
    assert Path(name).read_bytes() == before and not Path("a.png").exists()


# ---------------------------------------------------------------------------------------------- several pictures


def test_count_draws_over_one_picture_with_several_seeds(cli):
    cli("generate", HOUSE, *IMAGE, "--mask", "mask.png", "--strength", 0.7, "--count", 2, "--seed", 5, "--out", "t.png")
    for seed in (5, 6):
        words = ["--mask", "mask.png", "--strength", 0.7, "--seed", seed]
        cli("generate", HOUSE, *IMAGE, *words, "--out", "one.png")
        assert np.abs(pixels(f"t-{seed}.png") - pixels("one.png")).max() <= 1
        assert "identical" in (said := cli("rerun", f"t-{seed}.png").out) or "within one grey level" in said
    assert np.abs(pixels("t-5.png") - pixels("t-6.png")).max() > 5


def test_one_by_one_each_is_the_only_one(cli, nets):
    words = [*IMAGE, "--control", f"canny@{nets[0]}:photo.png"]
    cli("generate", HOUSE, *words, "--count", 2, "--one-by-one", "--out", "t.png")
    cli("generate", HOUSE, *words, "--seed", 1, "--out", "one.png")
    assert np.array_equal(pixels("t-1.png"), pixels("one.png"))


def test_count_with_an_inversion_draws_as_each_alone(cli):
    words = [*IMAGE, "--invert", "a tree"]
    cli("generate", HOUSE, *words, "--count", 2, "--out", "t.png")
    cli("generate", HOUSE, *words, "--seed", 1, "--out", "one.png")
    assert np.abs(pixels("t-1.png") - pixels("one.png")).max() <= 1


def test_prompts_of_a_file_each_begin_from_the_picture(cli, pipe):
    Path("p.txt").write_text("a red house\na blue tree\n")
    paths = cli("generate", "--prompts", "p.txt", *IMAGE, "--strength", 0.7).lines
    for path, prompt in zip(paths, ("a red house", "a blue tree"), strict=True):
        drawn = pipe(prompt, image="photo.png", strength=0.7).images[0]
        assert np.array_equal(pixels(path), np.asarray(drawn, dtype=int))
    assert "2 of 2 pictures are drawn already" in cli("generate", "--prompts", "p.txt", *IMAGE, "--strength", 0.7).err


@pytest.mark.parametrize(
    "words, sizes",
    [
        ([*IMAGE, "--strength", "0.7"], [32, 32]),
        (["--enlarge", "2", "--refine", "0.7"], [32, 32, 32, 64, 64]),
        ([*IMAGE, "--strength", "0.4", "--enlarge", "1.5", "--refine", "0.4"], [32, 48]),
        ([*IMAGE, "--invert", "a tree"], [32, 32, 32]),  # the way back alone
        ([*IMAGE, "--mask", "mask.png", "--strength", "0.4"], [32]),
    ],
)
def test_save_steps_numbers_them_from_0_and_shows_each(cli, words, sizes):
    cli("generate", HOUSE, *words, "--out", "a.png", "--save-steps", "in")
    assert names("in") == ["contact-sheet.png", *(f"step-{k:02d}.png" for k in range(len(sizes)))]
    assert [pixels(f"in/step-{k:02d}.png").shape[1] for k in range(len(sizes))] == sizes
    cli("generate", HOUSE, *words, "--out", "b.png")
    assert np.array_equal(pixels("a.png"), pixels("b.png"))
    assert "belongs to another run" in cli("generate", HOUSE, "--save-steps", "in", status=1).err


# ---------------------------------------------------------------------------------------------- what was given, later


@pytest.mark.parametrize(
    "name, other", [("photo.png", photo(1)), ("mask.png", half_mask().transpose(Image.Transpose.FLIP_LEFT_RIGHT))]
)
def test_another_picture_of_the_same_name_is_other_settings(cli, name, other):
    words = [*IMAGE, "--mask", "mask.png"]
    (path,) = cli("generate", HOUSE, *words).lines
    other.save(name)
    found = cli("generate", HOUSE, *words, status=1).err
    assert one_line(found) and f"{path} was drawn with other settings (given: " in found
    kind = {"photo.png": "image", "mask.png": "mask"}[name]
    again = cli("rerun", path, status=1).err
    assert one_line(again) and f"{path}: what was given as {kind} is another one now" in again
    cli("generate", HOUSE, *words, "--overwrite")
    assert "identical" in cli("rerun", path).out


def test_the_same_picture_in_another_file_is_the_same(cli, runs):
    cli("generate", HOUSE, *IMAGE)
    photo().save("copy.bmp")
    runs.clear()
    assert "is drawn already" in cli("generate", HOUSE, "--image", "copy.bmp").err and runs == []


@pytest.mark.parametrize("what", ["picture", "net"])
def test_another_condition_or_net_is_noticed(cli, nets, tmp_path, pipe, what):
    net = some_net(pipe.unet, tmp_path / "net", 5)
    words = ["--control", f"canny@{net}:photo.png"]
    (path,) = cli("generate", HOUSE, *words).lines
    if what == "picture":
        photo(1).save("photo.png")
    else:
        for file in nets[0].iterdir():
            (net / file.name).write_bytes(file.read_bytes())
    assert "other settings (given: " in cli("generate", HOUSE, *words, status=1).err
    assert "what was given as control is another one now" in cli("rerun", path, status=1).err


def test_rerun_of_a_picture_whose_picture_is_gone_or_moved(cli, tmp_path, monkeypatch):
    cli("generate", HOUSE, *IMAGE, "--out", "a.png")
    (tmp_path / "elsewhere").mkdir()
    Path("photo.png").rename("elsewhere/photo.png")
    found = cli("rerun", "a.png", status=1).err
    assert one_line(found) and "photo.png does not exist" in found
    monkeypatch.chdir(tmp_path / "elsewhere")  # names are looked up from where one stands
    assert cli("rerun", "../a.png").lines == ["../a.png: identical."]


def test_pictures_drawn_before_any_were_given_are_drawn_again(cli):
    cli("generate", HOUSE, "--out", "a.png")
    edit("a.png", drop=("strength", "image_guidance", "noise_level", "given", "pictures"))
    assert "given" not in read_settings("a.png")
    assert cli("rerun", "a.png").lines == ["a.png: identical."]
    (path,) = cli("generate", HOUSE).lines
    edit(path, drop=("strength", "image_guidance", "noise_level", "given", "pictures"))
    assert "is drawn already" in cli("generate", HOUSE).err


PATHS = st.text(st.sampled_from("ab ./\\:-=@,'\"é家0.8"), min_size=1, max_size=12) | st.sampled_from(
    ["C:\\x.png", "a:b.png", "-photo.png", "--mask", "my photo.png", "a=b.png", "scene:7", "", "0", "x.png:0.5"]
)
SENTENCES = st.text(st.characters(exclude_categories=("Cs",)), max_size=12)
# argparse drops "--" wherever it stands.
PATHS, SENTENCES = (texts.filter(lambda text: text != "--") for texts in (PATHS, SENTENCES))
SPECS = st.builds(
    lambda kind, net, path, tail: f"{kind}{net}:{path}{tail}",
    st.sampled_from(("canny", "depth", "as-is")),
    st.sampled_from(("", "@some/folder", "@-net", "@a b")),
    st.sampled_from(("photo.png", "C:\\x.png", "a:b.png", "-x.png", "my photo.png", "scene:7", "--image")),
    st.sampled_from(("", ":0.8", ":-1", ":1:0:0.5", ":.5:0.25:1")),
)
NUMBERS = st.floats(0, 1, allow_nan=False)
WISHES = st.fixed_dictionaries(
    {},
    optional={
        "image": PATHS,
        "mask": PATHS,
        "depth": PATHS,
        "estimator": PATHS,
        "invert": SENTENCES | PATHS,
        "outpaint": st.lists(st.integers(0, 999), min_size=4, max_size=4),
        "control": st.lists(SPECS.map(wishes.control), min_size=1, max_size=3),
        "tile": st.integers(0, 4096),
        "enlarge": st.floats(1, 8, allow_nan=False),
        "refine": NUMBERS,
        "no_paste": st.just(True),
        "guess": st.just(True),
    },
)


@examples(max_examples=300, deadline=None)
@drawn_from(WISHES)
def test_the_words_of_a_record_say_the_same_wishes_again(wish):
    words = json.loads(json.dumps(wishes.words(wish)))
    assert all(isinstance(word, str) for word in words)
    assert wishes.read_words(words, "a.png") == wish


def test_a_picture_whose_name_begins_with_a_dash(cli):
    photo().save("-photo.png")
    (path,) = cli("generate", HOUSE, "--image=-photo.png").lines
    assert cli("rerun", path).lines == [f"{path}: identical."]


@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({"pictures": ["--image"]}, r"a\.png tells of pictures given: .*--image: expected one argument"),
        ({"pictures": ["photo.png"]}, r"in words that ldm doesn't know: 'photo\.png'"),
        ({"pictures": ["--photo=photo.png"]}, r"doesn't know: '--photo=photo\.png'"),
        ({"pictures": ["--imag=photo.png"]}, r"doesn't know: '--imag=photo\.png'"),
        ({"pictures": ["--help"]}, r"doesn't know: '--help'"),
        ({"pictures": ["--tile=x"]}, r"--tile: must be a whole number, not 'x'"),
        ({"pictures": ["--tile=-1"]}, r"--tile: must be 0 or more"),
        ({"pictures": ["--enlarge=99"]}, r"--enlarge: must be between 1 and 8"),
        ({"pictures": ["--refine=nan"]}, r"--refine: must be finite"),
        ({"pictures": ["--outpaint=1,2"]}, r"--outpaint: must be four numbers"),
        ({"pictures": ["--control=junk"]}, r"--control: must read KIND"),
        ({"pictures": ["--guess=1"]}, r"--guess: ignored explicit argument '1'"),
        ({"pictures": ["--image=nowhere.png"]}, r"nowhere\.png does not exist"),
        ({"pictures": ["--mask=mask.png"]}, r"name it with --image"),
        ({"pictures": []}, r"what was given as image is another one now"),
        ({"pictures": ["--image=photo.png", "--tile=64"]}, r"what was given as tile is another one now"),
        ({"pictures": ["--image=photo.png", "--enlarge=2"]}, r"given as enlarge is another one now"),
        ({"pictures": [3]}, r"lack a sound 'pictures' \(\[3\]\)"),
        ({"pictures": "--image"}, r"lack a sound 'pictures'"),
        ({"given": []}, r"lack a sound 'given' \(\[\]\)"),
        ({"given": {"image": 3}}, r"what was given as image is another one now"),
        ({"strength": "half"}, r"lack a sound 'strength'"),
        ({"strength": 1.5}, r"strength must be a number from 0"),
        ({"strength": 0.1}, r"less than one step"),
        ({"noise_level": 0.5}, r"lack a sound 'noise_level'"),
        ({"noise_level": 5}, r"noise_level is given, which only a model to upscale"),
        ({"width": 4096, "height": 4096}, r"don't belong together"),
        (
            {"pictures": ["--enlarge=2"], "given": {"enlarge": 2.0}, "strength": None}, r"don't belong together",
        ),
    ],
)  # fmt: skip
def test_rerun_trusts_no_words_about_pictures(cli, changes, sentence):
    cli("generate", HOUSE, *IMAGE, "--out", "a.png")
    edit("a.png", **changes)
    found = cli("rerun", "a.png", status=1).err
    assert one_line(found) and re.search(sentence, found), found


# ---------------------------------------------------------------------------------------------- --control


@pytest.mark.parametrize(
    "text, kind, net, picture, scale, start, end",
    [
        ("canny:photo.png", "canny", None, "photo.png", 1, 0, 1),
        ("canny:photo.png:0.8", "canny", None, "photo.png", 0.8, 0, 1),
        ("canny:photo.png:0.8:0:0.5", "canny", None, "photo.png", 0.8, 0, 0.5),
        ("canny:photo.png:1:.25:.75", "canny", None, "photo.png", 1, 0.25, 0.75),
        ("canny:photo.png:-1", "canny", None, "photo.png", -1, 0, 1),
        ("canny:photo.png:0", "canny", None, "photo.png", 0, 0, 1),
        ("depth@some/folder:p.png:1", "depth", "some/folder", "p.png", 1, 0, 1),
        ("as-is@net:p.png", "as-is", "net", "p.png", 1, 0, 1),
        ("canny:scene:7", "canny", None, "scene:7", 1, 0, 1),
        ("canny:scene:7:0.5", "canny", None, "scene:7", 0.5, 0, 1),
        ("canny@scenes-canny:scene:7:0.5:0:1", "canny", "scenes-canny", "scene:7", 0.5, 0, 1),
        ("canny:C:\\pictures\\x.png:0.5", "canny", None, "C:\\pictures\\x.png", 0.5, 0, 1),
        ("canny:C:\\pictures\\x.png", "canny", None, "C:\\pictures\\x.png", 1, 0, 1),
        ("canny:my photo.png:2", "canny", None, "my photo.png", 2, 0, 1),
        ("canny:a@b.png", "canny", None, "a@b.png", 1, 0, 1),
    ],
)
def test_a_control_is_read(text, kind, net, picture, scale, start, end):
    found = wishes.control(text)
    assert found.pop("text") == text
    assert found == {"kind": kind, "net": net, "picture": picture, "scale": scale, "start": start, "end": end}


@pytest.mark.parametrize("text", ["", "canny", "canny:", ":photo.png", "canny@:photo.png", "canny:x.png:..", "a b:c"])
def test_what_is_no_control_is_told_how_one_reads(cli, text):
    found = cli("generate", HOUSE, f"--control={text}", status=2).err
    assert one_line(found) and "--control must read KIND[@NET]:PICTURE[:SCALE[:START:END]], like canny:p" in found


def test_a_control_without_a_net_takes_the_models_own(cli, model, nets, monkeypatch):
    embedded = places.embedded
    own = {"tiny-canny": nets[0]}
    monkeypatch.setattr(
        places, "embedded", lambda mark="model_index.json": own if mark == "config.json" else embedded(mark)
    )
    cli("generate", HOUSE, "--control", "canny:photo.png", "--out", "a.png")
    cli("generate", HOUSE, "--control", f"canny@{nets[0]}:photo.png", "--out", "b.png")
    assert np.array_equal(pixels("a.png"), pixels("b.png"))
    assert read_settings("a.png")["given"] == read_settings("b.png")["given"]
    assert cli("rerun", "a.png").lines == ["a.png: identical."]


# ---------------------------------------------------------------------------------------------- photographs


def test_a_photograph_is_turned_as_its_exif_says(cli):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    wide = photo(2, 48, 32)
    wide.save("turned.png", exif=exif)
    cli("generate", HOUSE, "--image", "turned.png", "--out", "a.png")
    wide.transpose(Image.Transpose.ROTATE_270).save("upright.png")
    cli("generate", HOUSE, "--image", "upright.png", "--out", "b.png")
    assert pixels("a.png").shape == (48, 32, 3) and np.array_equal(pixels("a.png"), pixels("b.png"))
    assert read_settings("a.png")["given"] == read_settings("b.png")["given"]


def test_what_is_transparent_becomes_white_and_is_said_once(cli):
    clear = photo().convert("RGBA")
    clear.paste((0, 0, 0, 0), (0, 0, 16, 32))
    clear.save("clear.png")
    found = cli("generate", HOUSE, "--image", "clear.png", "--out", "a.png")
    assert found.err == "clear.png is transparent in places: they become white.\n"
    white = photo()
    white.paste("white", (0, 0, 16, 32))
    white.save("white.png")
    cli("generate", HOUSE, "--image", "white.png", "--out", "b.png")
    assert np.array_equal(pixels("a.png"), pixels("b.png"))


@pytest.mark.parametrize("size, drawn", [((37, 50), (32, 48)), ((33, 33), (32, 32)), ((9, 17), (8, 16))])
def test_any_size_is_brought_to_multiples_of_8(cli, nets, size, drawn):
    photo(4, *size).save("odd.png")
    for k, words in enumerate((["--image", "odd.png"], ["--control", f"canny@{nets[0]}:odd.png"])):
        cli("generate", HOUSE, *words, "--out", f"{k}.png")
        with Image.open(f"{k}.png") as image:
            assert image.size == drawn
        assert (read_settings(f"{k}.png")["width"], read_settings(f"{k}.png")["height"]) == drawn


def test_a_photograph_much_larger_than_the_model_is_said_once(cli):
    photo(4, 300, 150).save("large.png")
    found = cli("generate", HOUSE, "--image", "large.png", "--out", "a.png", "--count", 1)
    assert re.fullmatch(
        r"The picture has 300x150 pixels, many for a model of 32x32: drawn at 40x16, multiples of 8; .*\n", found.err
    )
    with Image.open("a.png") as image:
        assert image.size == (40, 16)
    asked = cli("generate", HOUSE, "--image", "large.png", "--width", 96, "--height", 48, "--out", "b.png")
    assert asked.err == "" and pixels("b.png").shape == (48, 96, 3)


def test_edges_of_edges_and_no_edges_are_doubted(cli, nets):
    canny(photo(1, 64, 64)).save("edges.png")
    said = cli("generate", HOUSE, "--control", f"canny@{nets[0]}:edges.png", "--out", "a.png").err
    assert "edges.png: The source is nearly only black and white, as if it were edges already" in said
    Image.new("RGB", (SIZE, SIZE), "grey").save("plain.png")
    said = cli("generate", HOUSE, "--control", f"canny@{nets[0]}:plain.png", "--out", "b.png").err
    assert "The edge picture holds no edge" in said and said.count("\n") == 1


# ---------------------------------------------------------------------------------------------- sentences


def bomb():
    """The head of a PNG that promises a hundred thousand pixels a side."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"0")) + chunk(b"IEND", b"")


NET = "canny@NET:photo.png"
BAD = [  # words after the prompt, exit status, what the sentence says
    (["--mask", "mask.png"], 1, r"^ldm: --mask, --outpaint and --invert are about a picture: name it with --image\."),
    (["--outpaint", "8,8,8,8"], 1, r"about a picture: name it with --image"),
    (["--invert", "a tree"], 1, r"about a picture: name it with --image"),
    ([*IMAGE, "--mask", "mask.png", "--outpaint", "8,8,8,8"], 1, r"--outpaint makes its own mask"),
    ([*IMAGE, "--enlarge", "2", "--mask", "mask.png"], 1, r"--enlarge draws over the whole picture"),
    ([*IMAGE, "--enlarge", "2", "--outpaint", "8,8,8,8"], 1, r"--enlarge draws over the whole picture"),
    (["--refine", "0.5"], 1, r"--refine is the strength .* say --enlarge, too"),
    ([*IMAGE, "--invert", "x", "--mask", "mask.png"], 1, r"--invert begins from noise, and a mask keeps a picture"),
    ([*IMAGE, "--invert", "x", "--outpaint", "8,8,8,8"], 1, r"--invert begins from noise"),
    ([*IMAGE, "--invert", "x", "--strength", "0.5"], 1, r"back by DDIM: leave --strength out"),
    ([*IMAGE, "--invert", "x", "--steps-are", "actual"], 1, r"back by DDIM: leave --steps-are out"),
    ([*IMAGE, "--invert", "x", "--sampler", "euler"], 1, r"back by DDIM: leave --sampler out"),
    (["--enlarge", "2", "--refine", "0.2"], 1, r"Strength 0\.2 of 3 steps is less than one step: 0\.334"),
    (["--enlarge", "9"], 2, r"--enlarge must be between 1 and 8, not 9"),
    (["--refine", "1.5"], 2, r"--refine must be between 0 and 1"),
    ([*IMAGE, "--outpaint", "1,2,3"], 2, r"--outpaint must be four numbers of pixels, .* not '1,2,3'"),
    ([*IMAGE, "--outpaint=-8,0,0,0"], 2, r"--outpaint must be four numbers"),
    ([*IMAGE, "--outpaint", "0,0,0,0"], 1, r"Outpainting takes pixels for left, top, right, bottom"),
    (["--control", "canny:photo.png"], 1, r"No ControlNet for 'canny' travels .* canny@FOLDER:photo\.png"),
    (["--control", "as-is:photo.png"], 1, r"No ControlNet for 'as-is' travels"),
    (["--control", "cany:photo.png"], 1, r"Unknown condition 'cany': .*Did you mean 'canny'\?"),
    (["--no-paste"], 1, r"about what a mask keeps: say --mask or --outpaint"),
    (["--guess"], 1, r"are about ControlNets: say --control"),
    (["--estimator", "."], 1, r"are about ControlNets: say --control"),
    (["--control", "depth@NET:photo.png"], 1, r"with --estimator FOLDER; .* --control as-is-depth:photo\.png"),
    (["--control", "depth@NET:photo.png", "--estimator", "."], 1, r"holds no depth estimator"),
    (["--control", f"{NET}:1:0.5:0.2"], 1, r"0 <= start < end <= 1: not from 0\.5 to 0\.2"),
    (["--control", "canny@NET:none.png"], 1, r"none\.png does not exist"),
    (["--control", "canny@NET:photo.png:1:0.5"], 2, r"START and END come together"),
    (["--control", "canny@NET:photo.png:1e3"], 2, r"must read KIND"),
    (["--control", "canny@NET:photo.png:0.8:"], 2, r"must read KIND"),
    (["--control", "canny@NET:photo.png", "--estimator", "."], 1, r"tells the depth of photographs: say --control"),
    (["--image", "photo.png", "--invert", "a house", "--eta", "1"], 1, r"leave --eta out"),
    (["--image", "photo.png", "--outpaint", "0,0,99999,0"], 1, r"adds more on a side than the picture has"),
    (["--image", "photo.png", "--out", "photo.png", "--overwrite"], 1, r"photo\.png is given, and would be writ"),
    (["--image", "photo.png", "--out", "x.png", "--explain", "x.png"], 1, r"has the name of a picture that is drawn"),
    (["--control", "canny@nowhere:photo.png"], 1, r"There is no model 'nowhere'"),
    (["--control", "canny@MODEL:photo.png"], 1, r"is a whole model, not a ControlNet"),
    (["--control", "canny@FOREIGN:photo.png"], 1, r"foreign was made for another base than .*: it fits .*\(block_out"),
    (["--control", NET, "--width", "64", "--height", "32"], 1, r"The picture of a ControlNet has 32x32 .* distort it"),
    ([*IMAGE, "--width", "64", "--height", "32"], 1, r"has 32x32 pixels, and 64x32 are to be drawn: .*distort"),
    ([*IMAGE, "--width", "36"], 1, r"width must be a multiple of 8, not 36"),
    ([*IMAGE, "--mask", "small.png"], 1, r"small\.png has 16x16 pixels and the picture 32x32: they must be equal"),
    ([*IMAGE, "--mask", "small.png", "--explain", "e.png"], 1, r"small\.png has 16x16 pixels and the picture 32x32"),
    ([*IMAGE, "--mask", "black.png"], 1, r"black\.png is empty: .* White is drawn anew, black is kept"),
    ([*IMAGE, "--mask", "none.png"], 1, r"none\.png does not exist"),
    ([*IMAGE, "--strength", "0.3"], 1, r"Strength 0\.3 of 3 steps is less than one step: 0\.334 is the smallest that"),
    ([*IMAGE, "--strength", "1.5"], 2, r"--strength must be between 0 and 1"),
    ([*IMAGE, "--strength", "0.002", "--steps-are", "actual"], 1, r"this schedule has at most 1000"),
    ([*IMAGE, "--steps-are", "all"], 2, r"--steps-are must be total or actual, not 'all'"),
    (["--strength", "0.5"], 1, r"strength says how much of a picture is drawn over: pass .*--image"),
    (["--steps-are", "actual"], 1, r"steps_are speaks of the steps run from a given picture"),
    (["--image", "none.png"], 1, r"none\.png does not exist: check the path of the picture"),
    (["--image", "."], 1, r"\. is a folder: name a file inside it"),
    (["--image", "text.png"], 1, r"text\.png is no picture that ldm can read"),
    (["--image", "cut.png"], 1, r"cut\.png is damaged or cut off"),
    (["--image", "bomb.png"], 1, r"bomb\.png has more than 100 million pixels"),
    (["--image", "scene:x"], 1, r"scene:x does not exist"),
    (["--depth", "photo.png", *IMAGE], 1, r"This model reads no depth of its own"),
    ([*IMAGE, "--image-guidance", "2"], 1, r"image_guidance is given, which only a model to edit pictures knows"),
    ([*IMAGE, "--noise-level", "20"], 1, r"noise_level is given, which only a model to upscale pictures knows"),
    (["--tile", "8"], 1, r"A tile of 8 pixels is too small: 32 is the smallest"),
    (["--explain", "e.png"], 1, r"--explain shows the pictures that the model is given, and none is"),
    ([*IMAGE, "--explain", "e.jpg"], 1, r"Cannot write e\.jpg: only PNG"),
    ([*IMAGE, "--explain", "no/e.png"], 1, r"the folder no does not exist"),
    ([*IMAGE, "--imag", "x"], 2, r"Unknown option --imag\. Did you mean '--image'\?"),
]  # fmt: skip


@pytest.mark.parametrize("words, status, sentence", BAD)
def test_bad_input_gets_one_sentence_and_leaves_nothing(cli, model, nets, tmp_path_factory, words, status, sentence):
    Image.new("L", (16, 16), 255).save("small.png")
    Image.new("L", (SIZE, SIZE), 127).save("black.png")
    Path("text.png").write_text("no picture")
    whole = io.BytesIO()
    photo().save(whole, "PNG")
    Path("cut.png").write_bytes(whole.getvalue()[:500])
    Path("bomb.png").write_bytes(bomb())
    foreign = tmp_path_factory.mktemp("nets") / "foreign"
    foreign.mkdir()
    write_json(foreign / "config.json", read_json(nets[0] / "config.json") | {"block_out_channels": [8, 32]})
    places = {"NET": nets[0], "MODEL": model, "FOREIGN": foreign}
    words = [re.sub(r"(?<=@)(NET|MODEL|FOREIGN)\b", lambda m: str(places[m[0]]), word) for word in words]
    before = names()
    found = cli("generate", HOUSE, *words, status=status)
    assert one_line(found.err) and re.search(sentence, found.err), found.err
    assert found.out == "" and names() == before


@pytest.mark.parametrize("task", ["edit", "upscale", "depth", "inpaint"])
@pytest.mark.parametrize("words", [["--enlarge", "2"], ["--invert", "a tree"]])
def test_models_for_other_tasks_neither_enlarge_nor_invert(cli, monkeypatch, task, words):
    monkeypatch.setattr(Pipeline, "task", task)
    found = cli("generate", HOUSE, *IMAGE, *words, status=1).err
    assert one_line(found) and f"need a model that draws from words; this one is for {task}." in found


def test_a_depth_to_image_model_is_given_depth(cli, monkeypatch, pipe):
    """`--depth` reaches the pipeline, as grey; of a scene it is its depth."""
    seen = []

    def prepare(self, prompt, **options):
        seen.append(options["depth"])
        raise LDMError("Enough.")

    monkeypatch.setattr(Pipeline, "prepare", prepare)
    cli("generate", HOUSE, *IMAGE, "--depth", "scene:7", status=1)
    cli("generate", HOUSE, *IMAGE, "--depth", "photo.png", status=1)
    assert pixel_hash(seen[0]) == pixel_hash(of_scene("depth")) and pixel_hash(seen[1]) == pixel_hash(photo())


def test_the_help_says_what_is_white_and_how_a_control_reads(cli):
    text = " ".join(cli("generate", "--help").out.split())
    assert "white is drawn anew, black is kept" in text and "KIND[@NET]:PICTURE[:SCALE[:START:END]]" in text
    assert all(f" {option} " in text for option in ("--image", "--strength", "--mask", "--control", "--explain"))
    assert all(kind in text for kind in KINDS)


def test_edges_are_made_at_the_size_that_is_drawn(cli, nets):
    """In a photograph eight times as large they would be so thin that shrinking wipes them out."""
    board = np.kron(np.array([[60, 200], [200, 60]], np.uint8), np.ones((128, 128), np.uint8))
    Image.fromarray(board).convert("RGB").save("large.png")
    spec, at = f"canny@{nets[0]}:large.png", ["--width", "32", "--height", "32"]
    cli("generate", HOUSE, "--control", spec, *at, "--out", "a.png", "--explain", "sheet.png")
    with Image.open("sheet.png") as sheet:
        shown = thumb(sheet.convert("RGB"), 0, 0, 1)
    assert shown.max() == 255 and (shown > 127).mean() > 0.05
    shrunk = canny(Image.open("large.png")).resize((32, 32), Image.Resampling.LANCZOS)
    assert np.asarray(shrunk).max() < 128  # made at the large size, no edge would be left
    larger = cli("generate", HOUSE, "--control", spec, *at, "--enlarge", "2", "--out", "b.png")
    assert larger.err == ""


@pytest.mark.parametrize(
    "word, path, sentence",
    [
        ("as-is-canny", "white.png", "mostly white: the network knows white lines on black, so invert it"),
        ("as-is-canny", "photo.png", "many colours or greys, as a photograph has"),
        ("as-is-depth", "photo.png", "coloured: the network knows grey"),
    ],
)
def test_a_finished_condition_that_looks_wrong_for_its_kind_is_said(cli, nets, word, path, sentence):
    ImageOps.invert(canny(photo())).save("white.png")
    found = cli("generate", HOUSE, "--control", f"{word}@{nets[0]}:{path}", "--out", "a.png")
    assert sentence in found.err
    canny(photo()).save("edges.png")
    assert cli("generate", HOUSE, "--control", f"as-is-canny@{nets[0]}:edges.png", "--out", "b.png").err == ""
    cli("generate", HOUSE, "--control", f"canny@{nets[0]}:photo.png", "--out", "c.png")
    assert np.array_equal(pixels("b.png"), pixels("c.png"))


# ------------------------------------------------------------------------------------------------------ SDXL


@pytest.fixture(scope="module")
def xl(models):
    """(the tiny SDXL, its refiner): folders."""
    return models.folder("sdxl"), models.folder("refiner")


XL = ("--steps", 5, "--width", 48, "--height", 32, "--sampler", "ddim")


def test_sdxl_is_drawn_told_of_sizes_and_drawn_again(cli, xl):
    sizes = ("--sizes", "original=300x200,crop=7x3", "--negative-sizes", "original=90x80,target=66x77")
    cli("generate", HOUSE, "--model", xl[0], *XL, *sizes, "--negative", "fog", "--seed", 3, "--out", "a.png")
    pipe = ldm.load(xl[0])
    told = {"sizes": ldm.Sizes((200, 300), (3, 7)), "negative_sizes": ldm.Sizes((80, 90), target=(77, 66))}
    drawn = {"steps": 5, "width": 48, "height": 32, "sampler": "ddim", "seed": 3}
    expected = pipe(HOUSE, negative="fog", **drawn, **told).images[0]
    assert pixel_hash(Image.open("a.png")) == pixel_hash(expected)
    found = read_settings("a.png")
    assert found["sizes"] == {"original": [200, 300], "crop": [3, 7], "target": [32, 48], "score": None}
    assert found["negative_sizes"] == {"original": [80, 90], "crop": [3, 7], "target": [77, 66], "score": None}
    assert cli("rerun", "a.png").out == "a.png: identical.\n"
    words = ("--model", xl[0], *XL, "--negative", "fog", "--out", "pictures/")
    same = ("--negative-sizes", "original=90x80,crop=7x3,target=66x77")
    cli("generate", HOUSE, *words, *sizes)
    for other in (("--sizes", "original=300x200", *same), sizes[:2]):
        assert "was drawn with other settings" in cli("generate", HOUSE, *words, *other, status=1).err
    cli("generate", HOUSE, "--model", xl[0], *XL, "--seed", 3, "--out", "b.png")  # no negative words: zeros
    assert read_settings("b.png")["negative"] is None
    assert pixel_hash(Image.open("b.png")) == pixel_hash(pipe(HOUSE, **drawn).images[0])
    assert cli("rerun", "b.png").out == "b.png: identical.\n"
    cli("generate", HOUSE, "--model", xl[0], *XL, "--seed", 3, "--negative", "", "--out", "c.png")
    assert pixel_hash(Image.open("c.png")) != pixel_hash(Image.open("b.png"))


def test_a_refiner_draws_the_end_of_the_road(cli, xl):
    words = ("--refiner", xl[1], "--hand-over", 0.6, "--refiner-steps", 7)
    out = cli(
        "generate", HOUSE, "--model", xl[0], *XL, *words, "--count", 2, "--save-steps", "in", "--out", "pictures/"
    )
    two = ldm.Ensemble(ldm.load(xl[0]), ldm.load(xl[1]), 0.6)
    drawn = {"steps": 5, "width": 48, "height": 32, "sampler": "ddim", "count": 2}
    expected = two(HOUSE, **drawn, refined={"steps": 7}).images
    assert [pixel_hash(Image.open(path)) for path in out.lines] == [pixel_hash(image) for image in expected]
    assert "The base stops at t = 249.75" in out.err
    steps = len(list(two.steps(HOUSE, **drawn, refined={"steps": 7})))
    assert len(list(Path("in").glob("*/step-*.png"))) == 2 * steps
    record = read_settings(out.lines[0])
    assert record["given"]["refiner"] == folder_hash(xl[1]) and record["given"]["hand_over"] == 0.6
    assert cli("rerun", out.lines[0]).out.startswith(f"{out.lines[0]}: ")
    again = cli(
        "generate", HOUSE, "--model", xl[0], *XL, *words, "--count", 2, "--save-steps", "in", "--out", "pictures/"
    )
    assert "2 of 2 pictures are drawn already" in again.err
    other = cli("generate", HOUSE, "--model", xl[0], *XL, "--out", "pictures/", status=1)
    assert "was drawn with other settings" in other.err


XL_REFUSED = {
    "hand over to nobody": (["--hand-over", 0.5], "say --refiner FOLDER, or leave them out"),
    "steps of nobody": (["--refiner-steps", 5], "say --refiner FOLDER, or leave them out"),
    "no refiner there": (["--refiner", "nowhere"], "There is no model 'nowhere'"),
    "refined and enlarged": (["--refiner", "REFINER", "--enlarge", 2], "do one after the other"),
    "a share beyond the end": (["--refiner", "REFINER", "--hand-over", 1.5], "--hand-over must be between"),
    "sizes of no kind": (["--sizes", "original=9"], "must read original=WIDTHxHEIGHT"),
    "a score for the base": (["--sizes", "score=6"], "The score in sizes means nothing to this model"),
    "a dtype of no part": (["--dtype", "float32,vea=float16"], "A dtype is given for 'vea'"),
    "a dtype that is none": (["--dtype", "float32,vae=float8"], "must be float32 or"),
    "a dtype of nothing": (["--dtype", "float32,vae"], "must read DTYPE,PART=DTYPE"),
}


@pytest.mark.parametrize("what", XL_REFUSED)
def test_what_cannot_be_said_of_sdxl_is_refused(cli, xl, what):
    words, sentence = XL_REFUSED[what]
    words = [xl[1] if word == "REFINER" else word for word in words]
    status = (
        2 if what in ("a share beyond the end", "sizes of no kind", "a dtype that is none", "a dtype of nothing") else 1
    )
    found = cli("generate", HOUSE, "--model", xl[0], *XL, *words, "--out", "a.png", status=status)
    assert sentence in found.err and not Path("a.png").exists()


def test_half_precision_leaves_a_vae_in_float32_whose_file_asks_for_it(cli, xl):
    folder = Path(shutil.copytree(xl[0], "model"))
    write_json(folder / "vae" / "config.json", read_json(folder / "vae" / "config.json") | {"force_upcast": True})
    found = cli("generate", HOUSE, "--model", folder, *XL, "--dtype", "float16", "--out", "a.png")
    assert "the VAE is read in float32" in found.err
    assert read_settings("a.png")["dtype"] == "float16,vae=float32"
    assert cli("rerun", "a.png").out == "a.png: identical.\n"


def test_parts_of_two_dtypes_are_drawn_again_as_they_were(cli, xl):
    cli("generate", HOUSE, "--model", xl[0], *XL, "--dtype", "float32,vae=bfloat16", "--out", "a.png")
    assert read_settings("a.png")["dtype"] == "float32,vae=bfloat16"
    assert cli("rerun", "a.png").out == "a.png: identical.\n"


def test_an_enlarged_picture_of_sdxl_is_told_its_larger_size_and_drawn_again(cli, xl):
    words = ("--enlarge", 2, "--sizes", "crop=3x5", "--seed", 2)
    cli("generate", HOUSE, "--model", xl[0], *XL, *words, "--out", "a.png")
    assert Image.open("a.png").size == (96, 64)
    assert cli("rerun", "a.png").out == "a.png: identical.\n"
    pipe, drawn = ldm.load(xl[0]), {"steps": 5, "sampler": "ddim", "seed": 2}
    small = pipe(HOUSE, width=48, height=32, sizes={"crop": (5, 3)}, **drawn).x0
    large = pipe(HOUSE, image=pipe.enlarge(small, 2), strength=0.6, sizes={"crop": (5, 3)}, **drawn)
    assert large.settings.sizes.target == (64, 96) and pixel_hash(large.images[0]) == pixel_hash(Image.open("a.png"))


def test_switches_of_memory_hold_for_nets_too(cli, nets, monkeypatch):
    from ldm import memory

    named = []
    for name in ("slice_attention", "channels_last"):
        plain = getattr(memory, name)
        monkeypatch.setattr(
            memory,
            name,
            lambda pipe, *a, plain=plain, others=(), **k: (named.append(len(others)), plain(pipe, *a, **k)),
        )
    monkeypatch.setattr(memory, "slice_attention", lambda pipe, rows, others=(): named.append(len(others)))
    words = ("--slice-attention", 4, "--channels-last", "--control", f"as-is-canny@{nets[0]}:photo.png")
    cli("generate", HOUSE, *words, "--out", "a.png")
    assert named == [0, 0, 1, 1]


def test_a_refiner_gets_the_words_that_are_for_it_and_is_said_to_go_without_the_rest(cli, xl):
    base, refiner = ldm.load(xl[0]), ldm.load(xl[1])
    widths = {name: each.config.hidden_size for name, each in base.parts().items() if name.startswith("text")}
    drawn = torch.Generator().manual_seed(0)
    clip = {
        f"clip_{end}": torch.randn(2, width, generator=drawn) for end, width in zip("lg", widths.values(), strict=True)
    }
    save_weights(clip, "toy.safetensors")
    layer = "unet.mid_block.attentions.0.proj_in"
    inside = base.unet.get_submodule(layer.removeprefix("unet.")).weight.shape
    factors = {"A": torch.randn(4, inside[1], generator=drawn), "B": torch.randn(inside[0], 4, generator=drawn)}
    save_weights({f"{layer}.lora_{side}.weight": each for side, each in factors.items()}, "style.safetensors")
    words = ("--model", xl[0], *XL, "--refiner", xl[1], "--hand-over", 0.6)
    added = ("--embedding", "toy.safetensors:<toy>", "--lora", "style.safetensors:0.5")
    out = cli("generate", "a <toy> house", *words, *added, "--out", "a.png")
    assert "The refiner draws without style.safetensors, which is for the base alone." in out.err.splitlines()
    for pipe in (base, refiner):
        pipe.add_embedding("toy.safetensors", "<toy>")
    base.add_lora("style.safetensors", 0.5)
    options = {"steps": 5, "width": 48, "height": 32, "sampler": "ddim", "seed": 0}
    expected = ldm.Ensemble(base, refiner, 0.6)("a <toy> house", **options).images[0]
    refiner.remove_embedding("<toy>")
    deaf = ldm.Ensemble(base, refiner, 0.6)("a <toy> house", **options).images[0]
    assert pixel_hash(Image.open("a.png")) == pixel_hash(expected) != pixel_hash(deaf)
    assert cli("rerun", "a.png").out == "a.png: identical.\n"
    assert "draws without" not in cli("generate", "a <toy> house", *words, *added[:2], "--out", "b.png").err


def test_a_refiner_with_another_scheduler_is_drawn_again_as_it_was(cli, xl, tmp_path):
    from shutil import copytree

    other = copytree(xl[1], tmp_path / "other")
    path = other / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(read_json(path) | {"_class_name": "DPMSolverMultistepScheduler"}))
    words = ("--refiner", other, "--hand-over", 0.6)
    cli("generate", HOUSE, "--model", xl[0], "--steps", 5, "--width", 48, "--height", 32, *words, "--out", "a.png")
    assert read_settings("a.png")["sampler"] == "euler"
    assert cli("rerun", "a.png").out == "a.png: identical.\n"
