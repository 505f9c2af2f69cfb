"""Bad files end in one sentence, by the public roads: nothing executed, nothing written, nothing half-loaded."""

import re
import shutil
import sys

import pytest
from bad_files import MARKER, ROADS
from tiny import tiny_model

import ldm
from ldm.cli import main
from ldm.errors import LDMError


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("sound") / "model")


@pytest.fixture(scope="module")
def pipe(sound):
    return ldm.load(sound)


@pytest.fixture
def folder(sound, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where a `touch executed` would land
    return shutil.copytree(sound, tmp_path / "model")


def listing(root):
    """Every file, link and folder below, with its size and time."""
    return {p: (p.lstat().st_size, p.lstat().st_mtime_ns) for p in sorted(root.rglob("*"))}


def refuse(road, place, pipe, capsys):
    """The sentence in which opening `place` ends."""
    if road == "rerun":
        assert main(["rerun", str(place)]) == 1
        return capsys.readouterr().err.removeprefix("ldm: ").removesuffix("\n")
    with pytest.raises(LDMError) as caught:
        if road == "controlnet":
            ldm.load_controlnet(place, pipe)
        elif road == "picture":
            pipe("a house", image=place, strength=0.5, steps=2)
        else:
            ldm.load(place, allow_pickle=road == "pickle")
    return str(caught.value)


CASES = [(road, case) for road, cases in ROADS.items() for case in cases]


@pytest.mark.parametrize("road, case", CASES, ids=[case.name for _, case in CASES])
def test_bad_file(road, case, folder, pipe, capsys):
    place = case.spoil(folder) or folder
    before, modules = listing(folder.parent), set(sys.modules)
    said = refuse(road, place, pipe, capsys)
    assert re.search(case.says, said), said
    assert said.isprintable() and len(said) <= 1000 and said.endswith((".", "?", ")")), said
    assert not said.startswith("Unexpected") and ("/" in said or "configuration" in said or "file" in said), said
    assert listing(folder.parent) == before and not list(folder.parent.rglob(MARKER))
    assert not {name for name in set(sys.modules) - modules if "evil" in name.lower()}


def test_a_folder_full_of_code_is_a_folder_of_weights(folder, sound, capsys):
    """diffusers' ways to bring one's own code: a pipeline's, a component's, a package; none is looked at."""
    code = f"open({str(folder / MARKER)!r}, 'w')\nraise SystemExit('executed')\n"
    for name in ("pipeline.py", "unet/unet.py", "unet/__init__.py", "__init__.py", "safetensors.py", "conftest.py"):
        (folder / name).write_text(code)
    before = listing(folder)
    assert ldm.load(folder).unet.conv_in.bias.equal(ldm.load(sound).unet.conv_in.bias)
    assert listing(folder) == before


def test_links_are_followed(folder, sound):
    """The hub's cache is a folder of links; what they lead to is read as weights and as JSON, whoever made them."""
    for path in folder.rglob("*.*"):
        if path.is_file():
            path.unlink()
            path.symlink_to(sound / path.relative_to(folder))
    assert ldm.load(folder).unet.conv_in.bias.equal(ldm.load(sound).unet.conv_in.bias)


def test_a_net_that_is_refused_leaves_the_pipeline_alone(folder, pipe):
    before = {name: tensor.clone() for name, tensor in pipe.unet.state_dict().items()}
    with pytest.raises(LDMError, match="is a whole model"):
        ldm.load_controlnet(folder, pipe)
    assert all(tensor.equal(before[name]) for name, tensor in pipe.unet.state_dict().items())


def test_there_are_many_bad_files():
    names = [case.name for _, case in CASES]
    assert len(names) == len(set(names)) >= 220
