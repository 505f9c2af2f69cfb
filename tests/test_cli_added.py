"""LoRAs, words, VAEs and dialects on the command line: what is drawn with them, and what a record knows of them.

A record knows what was added by the hashes of the files: a picture is drawn again where they lie now, and never with
others.
"""

import json
import os
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given as drawn_from
from hypothesis import settings as examples
from hypothesis import strategies as st
from PIL import Image
from tiny import tiny_model
from tiny_pairs import SCENES, scenes

import ldm
from ldm import loading
from ldm.cli import added, main
from ldm.cli.added import Wish
from ldm.errors import LDMError
from ldm.io.folders import folder_hash
from ldm.io.png import read_settings, save_png
from ldm.io.weights import save_weights
from ldm.text.prompts import DIALECTS

HOUSE = "a large red house"
TOY = "a large <toy> house"
ALL = (
    "--vae",
    "vae",
    "--embedding",
    "toy.safetensors",
    "--lora",
    "style.safetensors:0.8",
    "--lora",
    "other.safetensors:-0.5",
)
BEFORE = ("dialect", "added", "additions")  # fields that pictures drawn before don't have


def normal(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def files(model, tmp_path_factory):
    """Two LoRAs of the UNet's and the text encoder's layers, two words of two and of one vector, and another VAE."""
    folder, pipe = tmp_path_factory.mktemp("added"), ldm.load(model)
    layers = {f"unet.{name}": module for name, module in pipe.unet.named_modules()}
    layers |= {f"text_encoder.text_model.{name}": module for name, module in pipe.text_encoder.named_modules()}
    for seed, file in enumerate(("style", "other")):
        tensors = {}
        for k, (name, module) in enumerate(layers.items()):
            if isinstance(module, torch.nn.Linear) and ("attn" in name):
                tensors[f"{name}.lora_A.weight"] = normal(10 * k + seed, 4, module.in_features)
                tensors[f"{name}.lora_B.weight"] = 0.1 * normal(10 * k + seed + 5, module.out_features, 4)
        save_weights(tensors, folder / f"{file}.safetensors")
    save_weights({"<toy>": 3 * normal(1, 2, 16)}, folder / "toy.safetensors")
    save_weights({"emb_params": 3 * normal(2, 1, 16)}, folder / "thing.safetensors")
    (folder / "vae").mkdir()
    shutil.copy(model / "vae" / "config.json", folder / "vae")
    state = {name: 1.3 * each for name, each in pipe.vae.state_dict().items()}
    save_weights(state, folder / "vae" / "diffusion_pytorch_model.safetensors")
    return folder


@pytest.fixture
def cli(model, files, tmp_path, monkeypatch, capsys):
    """Run a command in a folder that holds those files; status, standard output and standard error."""
    monkeypatch.chdir(tmp_path)
    for each in files.iterdir():
        (shutil.copytree if each.is_dir() else shutil.copy)(each, tmp_path / each.name)

    def run(*words, status=0):
        words = [str(word) for word in words]
        named = ["--model", str(model)] if words[0] in ("generate", "explain") and "--model" not in words else []
        found = main([*words, *named])
        out, err = capsys.readouterr()
        assert found == status, err
        assert "Traceback" not in err
        return SimpleNamespace(out=out, err=err, lines=out.splitlines())

    return run


@pytest.fixture(scope="session")
def drawn(model, files, tmp_path_factory):
    """Two pictures, drawn once: "lora.png" with a LoRA, "all.png" with all that can be added."""
    folder = tmp_path_factory.mktemp("drawn")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(files)
        for name, words in (("lora", [HOUSE, "--lora", "style.safetensors"]), ("all", [TOY, *ALL])):
            assert main(["generate", *words, "--model", str(model), "--out", str(folder / f"{name}.png")]) == 0
    return folder


def pixels(path):
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"), dtype=int)


def one_line(err):
    """Whether it ends with one sentence; what was said of additions before may stand above it."""
    said = [line for line in err.splitlines() if line.startswith("ldm: ")]
    return len(said) == 1 and err.endswith(said[0] + "\n") and len(said[0]) < 600 and "Traceback" not in err


def edit(path, drop=(), **changes):
    """Save a picture of ldm again, with another record."""
    with Image.open(path) as old:
        record = {name: value for name, value in read_settings(path).items() if name not in drop}
        save_png(old.copy(), path, record | changes)


# ---------------------------------------------------------------------------------------------- drawn, and drawn again


def test_what_is_added_is_drawn_as_python_draws_it_and_rerun_draws_it_again(cli, model, tmp_path):
    (path,) = cli("generate", TOY, *ALL, "--seed", 3).lines
    pipe = ldm.load(model)
    pipe.vae = ldm.load_vae("vae", pipe)
    pipe.add_embedding("toy.safetensors")
    pipe.add_lora("style.safetensors", 0.8)
    pipe.add_lora("other.safetensors", -0.5)
    assert np.array_equal(pixels(path), np.asarray(pipe(TOY, seed=3).images[0], dtype=int))
    record = read_settings(path)
    assert record["added"] == [
        f"vae {folder_hash('vae')}",
        f"embedding {folder_hash('toy.safetensors')}:<toy>",
        f"lora {folder_hash('style.safetensors')}:0.8",
        f"lora {folder_hash('other.safetensors')}:-0.5",
    ]
    assert len({each.split(":")[0] for each in record["added"]}) == 4
    assert "is drawn already" in cli("generate", TOY, *ALL, "--seed", 3).err
    found = cli("rerun", path, "--out", "again.png")
    assert found.lines == ["again.png", f"{path}: identical."]
    assert read_settings("again.png") == record


def test_each_of_them_is_seen_and_tells_pictures_apart(cli):
    (path,) = cli("generate", TOY, *ALL).lines
    pairs = list(zip(ALL[::2], ALL[1::2], strict=True))
    others = {pair: [each for each in pairs if each != pair] for pair in pairs}
    others["another weight"] = [*pairs[:2], ("--lora", "style.safetensors:0.7"), pairs[3]]
    for what, left in others.items():
        words = [word for pair in left for word in pair]
        found = cli("generate", TOY, *words, status=1).err
        assert one_line(found) and "was drawn with other settings (added: ['" in found
        if what[0] != "--embedding":  # without the word, its letters are read
            cli("generate", TOY, *words, "--out", "other.png")
            assert np.abs(pixels(path) - pixels("other.png")).max() > 1, what


def test_save_steps_tell_runs_apart_by_what_was_added(cli):
    words = ("generate", HOUSE, "--out", "a.png", "--save-steps", "in")
    cli(*words)
    edit("in/step-00.png", drop=BEFORE)  # as one drawn before
    cli(*words)
    assert "belongs to another run" in cli(*words, "--lora", "style.safetensors", status=1).err


def test_pictures_drawn_before_anything_could_be_added_are_drawn_again(cli):
    (path,) = cli("generate", HOUSE).lines
    assert read_settings(path)["added"] == read_settings(path)["additions"] == []
    edit(path, drop=BEFORE)
    assert "added" not in read_settings(path)
    assert cli("rerun", path).lines == [f"{path}: identical."]
    assert "is drawn already" in cli("generate", HOUSE).err


def test_a_dialect_is_drawn_recorded_and_drawn_again(cli, model):
    words = "a (large:1.6) red house"
    for name in DIALECTS:  # plain would be what is drawn without a word about it
        cli("generate", words, "--dialect", name, "--out", f"{name}.png")
        assert read_settings(f"{name}.png")["dialect"] == name
        assert np.array_equal(pixels(f"{name}.png"), np.asarray(ldm.load(model)(words, dialect=name).images[0], int))
        assert cli("rerun", f"{name}.png").lines == [f"{name}.png: identical."]
    assert np.abs(pixels("plain.png") - pixels("a1111.png")).max() > 1
    cli("generate", words)
    assert "(dialect: 'plain' then, 'a1111' now)" in cli("generate", words, "--dialect", "a1111", status=1).err
    edit("plain.png", dialect="latin")
    assert "don't belong together" in cli("rerun", "plain.png", status=1).err
    assert "--dialect must be plain or a1111 or compel" in cli("generate", words, "--dialect", "a111", status=2).err


def test_an_embedded_one_is_found_by_its_name(cli, monkeypatch, tmp_path):
    from ldm.checkpoints import places

    (tmp_path / "weights" / "neon").mkdir(parents=True)
    shutil.copy("style.safetensors", tmp_path / "weights" / "neon" / "pytorch_lora_weights.safetensors")
    monkeypatch.setattr(places, "PACKAGE", tmp_path)
    cli("generate", HOUSE, "--lora", "neon:0.5", "--out", "a.png")
    cli("generate", HOUSE, "--lora", "style.safetensors:.5", "--out", "b.png")
    assert np.array_equal(pixels("a.png"), pixels("b.png"))
    assert read_settings("a.png")["added"] == read_settings("b.png")["added"]
    assert "Did you mean 'neon'?" in cli("generate", HOUSE, "--lora", "noen:0.5", status=1).err


@scenes
def test_a_vae_is_found_by_the_name_of_a_whole_model_in_python_as_on_the_command_line(cli):
    pipe = ldm.load(SCENES)
    vae, same = ldm.load_vae("scenes", pipe), pipe.vae.state_dict()
    assert vae is not pipe.vae and all(torch.equal(each, same[name]) for name, each in vae.state_dict().items())
    cli("generate", HOUSE, "--model", "scenes", "--vae", "scenes", "--steps", 1, "--out", "a.png")
    assert read_settings("a.png")["added"] == [f"vae {folder_hash(SCENES / 'vae')}"]
    for name, sentence in ((".", "is no VAE: name a folder that holds"), ("scenes-neon", "is none itself")):
        with pytest.raises(LDMError, match=sentence):
            ldm.load_vae(name, pipe)


def test_tokens_says_that_they_depend_on_no_lora_and_no_vae(cli, model):
    plain = cli("tokens", HOUSE, "--model", model)
    found = cli("tokens", HOUSE, "--model", model, "--lora", "style.safetensors:0.5", "--vae", "vae")
    assert found.out == plain.out and not plain.err
    assert found.err == "Tokens don't depend on --lora or --vae, which is passed over.\n"


def test_explain_and_evaluate_take_them_too(cli):
    found = cli("explain", TOY, *ALL, "--with-dialect", "a1111", "--out", "run.html")
    assert found.lines == ["run.html"] and "<toy>" in found.err + Path("run.html").read_text()
    found = cli("evaluate", "--lora", "style.safetensors", "--out", "folder", status=1).err
    assert one_line(found) and "--out tells pictures apart by their model alone" in found


# ---------------------------------------------------------------------------------------------- gone, moved, changed


def test_rerun_where_files_were_moved(cli, drawn):
    path = shutil.copy(drawn / "all.png", "a.png")
    Path("there").mkdir()
    for name in ("style.safetensors", "toy.safetensors", "vae"):
        Path(name).rename(Path("there", name))
    found = cli("rerun", path, status=1).err
    assert one_line(found) and "'vae'" in found and "--vae says where it is now" in found
    found = cli("rerun", path, "--vae", "there/vae", "--embedding", "there/toy.safetensors", status=1).err
    assert one_line(found) and "There is no file 'style.safetensors' here" in found
    assert "names the LoRA 'style.safetensors'; --lora says where it is now" in found
    now = ("--vae", "there/vae", "--embedding", "there/toy.safetensors", "--lora", "there/style.safetensors")
    assert cli("rerun", path, *now).lines[0] == f"{path}: identical."
    assert "other.safetensors is another" not in found
    for option, value in (("--lora", "style.safetensors:0.9"), ("--embedding", "toy.safetensors:<cat>")):
        found = cli("rerun", path, *now, option, f"there/{value}", status=1).err  # the picture knows that better
        assert one_line(found) and re.search(r" by the (weight 0\.8|word <toy>), and not (0\.9|<cat>): leave", found)
    assert "identical" in cli("rerun", path, *now, "--lora", "there/style.safetensors:.80").out
    found = cli("rerun", path, "--lora", "toy.safetensors", status=1).err
    assert one_line(found)
    found = cli(
        "rerun", path, "--lora", "there/toy.safetensors", status=1
    ).err  # a word is no LoRA, though it was there
    assert one_line(found) and "there/toy.safetensors is no LoRA that" in found


def test_a_word_that_its_file_s_name_gave_stays_when_the_file_is_renamed(cli):
    cli("generate", "a large thing house", "--embedding", "thing.safetensors", "--out", "a.png")
    assert read_settings("a.png")["added"][0].endswith(":thing")
    Path("thing.safetensors").rename("other-name.safetensors")
    assert cli("rerun", "a.png", "--embedding", "other-name.safetensors").lines[0] == "a.png: identical."
    cli("generate", "a large thing house", "--embedding", "other-name.safetensors:thing", "--out", "b.png")
    assert np.array_equal(pixels("a.png"), pixels("b.png"))


@pytest.mark.parametrize("name", ["style.safetensors", "toy.safetensors", "vae/diffusion_pytorch_model.safetensors"])
def test_rerun_notices_that_a_file_is_another_one_now(cli, drawn, name):
    path = shutil.copy(drawn / "all.png", "a.png")
    tensors = loading.WeightFiles(name)
    changed = {key: 1.5 * tensors.read(key) for key in tensors.entries}
    save_weights(changed, name)
    found = cli("rerun", path, status=1).err
    assert one_line(found) and "is another one now, so it can't be drawn again" in found


@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({"additions": ["--lora"]}, r"a\.png tells of what was added: .*--lora: expected one argument"),
        ({"additions": ["style.safetensors"]}, r"in words that ldm doesn't know: 'style\.safetensors'"),
        ({"additions": ["--model=x"]}, r"doesn't know: '--model=x'"),
        ({"additions": ["--lora=style.safetensors:nan"]}, r"with a finite number"),
        ({"additions": ["--lora=style.safetensors:0.9"]}, r"don't belong together"),
        ({"additions": ["--embedding=style.safetensors"]}, r"is a LoRA"),
        ({"additions": []}, r"don't belong together"),
        ({"additions": [], "added": []}, None),  # a picture without the LoRA, which is another one
        ({"added": []}, r"don't belong together"),
        ({"added": [3]}, r"lack a sound 'added'"),
        ({"added": ["x"]}, r"is another one now"),
        ({"added": [""]}, r"is another one now"),
        ({"added": {}}, r"lack a sound 'added'"),
        ({"additions": [3]}, r"lack a sound 'additions'"),
        ({"dialect": None}, r"lack a sound 'dialect'"),
        ({"additions": ["--vae=stabilityai/sd-vae-ft-mse"]}, r"isn't here: `ldm fetch stabilityai/sd-vae-ft-mse`"),
        ({"additions": ["--vae=."]}, r"\. is no VAE: name a folder that holds config\.json.* --vae says where it is"),
        ({"additions": [f"--vae={os.devnull}"]}, r"is no VAE: "),
        ({"additions": ["--lora=someone/style"]}, r"There is no file 'someone/style' here"),
    ],
)  # fmt: skip
def test_rerun_trusts_no_words_about_what_was_added(cli, drawn, changes, sentence, monkeypatch):
    monkeypatch.setattr("ldm.hub.fetch", lambda *words: pytest.fail("a stranger's picture starts a download"))
    shutil.copy(drawn / "lora.png", "a.png")
    edit("a.png", **changes)
    found = cli("rerun", "a.png", status=1)
    if sentence is None:
        assert "a.png: different in" in found.out
    else:
        assert one_line(found.err) and re.search(sentence, found.err), found.err


# ---------------------------------------------------------------------------------------------- as they are said


@pytest.mark.parametrize(
    "text, name, weight",
    [
        ("style.safetensors", "style.safetensors", 1.0),
        ("style.safetensors:0.8", "style.safetensors", 0.8),
        ("style.safetensors:-1", "style.safetensors", -1.0),
        ("scenes-neon:.5", "scenes-neon", 0.5),
        ("scenes-neon:1e-1", "scenes-neon", 0.1),
        ("C:\\loras\\style.safetensors", "C:\\loras\\style.safetensors", 1.0),
        ("C:\\loras\\style.safetensors:2", "C:\\loras\\style.safetensors", 2.0),
        ("a:b.safetensors:0", "a:b.safetensors", 0.0),
        ("org/name:v2", "org/name:v2", 1.0),
    ],
)
def test_a_lora_is_read(text, name, weight):
    assert added.lora(text) == Wish("lora", name, weight)


def test_a_file_that_is_there_is_meant_whole(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("style:0.8").touch()
    Path("toy:cat").touch()
    assert added.lora("style:0.8") == Wish("lora", "style:0.8", 1.0)
    assert added.lora("style:0.8:0.5") == Wish("lora", "style:0.8", 0.5)
    assert added.embedding("toy:cat") == Wish("embedding", "toy:cat")
    assert added.embedding("toy:cat:dog") == Wish("embedding", "toy:cat", "dog")
    assert added.embedding("C:\\toy.pt") == Wish("embedding", "C:\\toy.pt")


@pytest.mark.parametrize(
    "text", ["style:nan", "style:inf", "style:1e999", "style:", ":0.5", "", "style.safetensors:strong"]
)
def test_what_is_no_lora_is_told_how_one_reads(cli, text):
    found = cli("generate", HOUSE, f"--lora={text}", status=2).err
    assert one_line(found) and re.search(r"--lora must (read FILE\[:WEIGHT\] with a finite|name a file, not)", found)


NAMES = st.text(st.sampled_from("ab ./\\:-=@,'\"é家0.8<>"), min_size=1, max_size=12).filter(lambda text: text != "--")
WISHES = st.builds(
    lambda vae, words, loras: [*([Wish("vae", vae)] if vae else []), *words, *loras],
    st.none() | NAMES,
    st.lists(NAMES.filter(lambda text: text[-1] != ":" and text.rfind(":")).map(added.embedding), max_size=2),
    st.lists(st.builds(lambda name, weight: Wish("lora", name, weight), NAMES, st.floats(-9, 9)), max_size=2),
)


@examples(max_examples=200, deadline=None)
@drawn_from(WISHES)
def test_the_words_of_a_record_say_the_same_wishes_again(wish):
    words = json.loads(json.dumps([each.word for each in wish]))
    assert added.read_words(words, "a.png") == wish


def test_options_are_found_before_the_model_is_read(cli, monkeypatch):
    monkeypatch.setattr(loading, "load", lambda *words, **options: pytest.fail("the model was read"))
    found = cli("generate", HOUSE, "--lora", "gone.safetensors:0.5", status=1).err
    assert one_line(found) and "There is no file 'gone.safetensors' here" in found
    assert one_line(cli("generate", HOUSE, "--embedding", "style.safetensors", status=1).err)
    assert one_line(cli("generate", HOUSE, "--lora", "toy.safetensors", status=1).err)


def test_pickles_are_read_only_if_that_is_allowed(cli):
    torch.save({"<toy>": 3 * normal(1, 2, 16)}, "toy.bin")
    found = cli("generate", TOY, "--embedding", "toy.bin", status=1).err
    assert one_line(found) and "--allow-pickle" in found
    cli("generate", TOY, "--embedding", "toy.bin", "--allow-pickle", "--out", "a.png")
    cli("generate", TOY, "--embedding", "toy.safetensors", "--out", "b.png")
    assert np.array_equal(pixels("a.png"), pixels("b.png"))
    assert "--allow-pickle" in cli("rerun", "a.png", status=1).err
    assert cli("rerun", "a.png", "--allow-pickle").lines == ["a.png: identical."]


def test_memory_is_saved_of_what_was_added_to(cli, drawn):
    cli("generate", TOY, *ALL, "--channels-last", "--slice-vae", "--out", "a.png")
    assert np.abs(pixels("a.png") - pixels(drawn / "all.png")).max() <= 1
