"""Where the file of what is added to a model lies: an embedded one's name, a path, a folder, the hub's cache."""

import subprocess
import sys

import pytest

from ldm import hub
from ldm.checkpoints import places
from ldm.checkpoints.places import CONFIG, EMBEDDING, INDEX, LORA, find_file, find_model
from ldm.errors import LDMError
from ldm.lora.file import open_lora
from ldm.text import embeddings


@pytest.fixture
def shelf(tmp_path, monkeypatch):
    """A package with a model, a ControlNet, a LoRA and a word in its weights/, and an empty folder to work in."""
    for name in (f"scenes/{INDEX}", f"canny/{CONFIG}", f"neon/{LORA}", f"mushroom/{EMBEDDING}"):
        (tmp_path / "weights" / name).parent.mkdir(parents=True)
        (tmp_path / "weights" / name).write_bytes(b"")
    (tmp_path / "here").mkdir()
    monkeypatch.setattr(places, "PACKAGE", tmp_path)
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(hub, "local", lambda *args, **options: None)
    monkeypatch.setattr(hub, "fetch", lambda *args, **options: pytest.fail("nothing is fetched"))
    return tmp_path / "weights"


def test_an_embedded_one_by_its_name(shelf):
    assert find_file("neon", LORA) == shelf / "neon" / LORA
    assert find_file("mushroom", EMBEDDING) == shelf / "mushroom" / EMBEDDING


def test_a_file_and_a_folder(shelf, tmp_path):
    folder = tmp_path / "style"
    folder.mkdir()
    (folder / "one.safetensors").write_bytes(b"")
    assert find_file(folder / "one.safetensors", LORA) == folder / "one.safetensors"
    assert find_file(folder, LORA) == folder / "one.safetensors"
    (folder / "two.safetensors").write_bytes(b"")
    with pytest.raises(LDMError, match=f"has no {LORA}, and it holds 'one.safetensors', 'two.safetensors': name"):
        find_file(folder, LORA)
    (folder / LORA).write_bytes(b"")
    assert find_file(folder, LORA) == folder / LORA


def test_a_file_of_the_hub_that_is_here(shelf, monkeypatch, tmp_path):
    monkeypatch.setattr(hub, "local", lambda name, **options: tmp_path / name.rpartition("/")[2])
    assert find_file("org/name/style.safetensors", LORA) == tmp_path / "style.safetensors"


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("nowhere.safetensors", r"There is no file 'nowhere.safetensors' here, nor an embedded one .*\(neon\)\.$"),
        ("neom", "Did you mean 'neon'"),
        ("canny", r"The embedded 'canny' is a ControlNet, and not a LoRA: ldm.load_controlnet, --control\.$"),
        ("scenes", r"The embedded 'scenes' is a whole model, and not a LoRA: ldm.load, --model\.$"),
        ("mushroom", r"'mushroom' is a learnt word, and not a LoRA: pipe.add_embedding, --embedding\.$"),
        ("", "named by a file, a folder or an embedded one's name, not by ''"),
        (None, "not by None"),
        (3, "not by 3"),
        (["neon"], "not by"),
        ("a\0b", "not by"),
        ("a" * 5000, "not by 'aaa"),
        ("a" * 300, r"There is no file 'aaa.*\(neon\)\.$"),
        ("loras/style.safetensors", r"\(neon\)\.$"),
        ("old/style.pt", r"\(neon\)\.$"),
        ("folder/loras/style.safetensors", r"\(neon\)\.$"),
        ("sd15", r"\(neon\)\.$"),
        ("org/name/style.safetensors", "`ldm fetch org/name/style.safetensors` brings it"),
        ("org/name", "`ldm fetch org/name/FILE` brings it"),
    ],
)
def test_what_is_nowhere(shelf, name, sentence):
    (shelf.parent / "here" / "folder").mkdir()
    with pytest.raises(LDMError, match=sentence):
        find_file(name, LORA)


def test_a_lora_is_no_word(shelf):
    with pytest.raises(LDMError, match=r"'neon' is a LoRA, and not a learnt word: pipe.add_lora, --lora"):
        find_file("neon", EMBEDDING)


def test_finding_a_name_needs_no_torch():
    assert embeddings.FILE == EMBEDDING  # ldm.text knows nothing of checkpoints
    program = "import sys, ldm.checkpoints.places; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True).stdout == "False\n"


@pytest.mark.parametrize(("name", "how"), [("neon", "pipe.add_lora, --lora"), ("mushroom", "pipe.add_embedding")])
def test_what_is_added_to_a_model_is_none_itself(shelf, name, how):
    with pytest.raises(LDMError, match=f"The embedded '{name}' is added to a model, and is none itself: {how}"):
        find_model(name)


def test_a_folder_names_a_lora_that_diffusers_has_named(tmp_path):
    import torch

    from ldm.io.weights import save_weights

    (tmp_path / "neon").mkdir()
    factors = {f"unet.mid_block.attentions.0.proj_in.lora_{side}.weight": torch.ones(2, 2) for side in "AB"}
    save_weights(factors, tmp_path / "neon" / LORA)
    assert open_lora(tmp_path / "neon" / LORA).name == "neon"
