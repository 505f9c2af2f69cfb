"""Where diffusers' loaders themselves go wrong, beside what ldm does: REFERENCE_DEFECTS.md, from 31 on.

A test that fails here says that diffusers has changed: the page is to be changed with it.
"""

import shutil
import signal
import zipfile
from contextlib import contextmanager

import pytest
import torch
from diffusers import ControlNetModel, UNet2DConditionModel
from diffusers.loaders.single_file_utils import load_single_file_checkpoint
from diffusers.models.model_loading_utils import load_state_dict
from tiny_pairs import controlnets

import ldm
from ldm.checkpoints import names
from ldm.errors import LDMError
from ldm.io.weights import WeightFiles, read_tensors, save_weights


class Endless(Exception):
    pass


@contextmanager
def at_most(seconds):
    """Raise `Endless` in what takes longer."""

    def stop(*_):
        raise Endless

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_defect_a_compressed_checkpoint_is_read_as_it_stands(tmp_path):
    path, again = tmp_path / "plain.bin", tmp_path / "compressed.bin"
    numbers = torch.arange(3.0)
    torch.save({"x": numbers}, path)
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(again, "w", zipfile.ZIP_DEFLATED) as new:
        for item in old.infolist():
            new.writestr(item.filename, old.read(item))
    assert torch.equal(load_state_dict(str(path))["x"], numbers)
    assert not torch.equal(load_state_dict(str(again))["x"], numbers)  # and not a word of it
    assert torch.equal(WeightFiles(path, allow_pickle=True).read("x"), numbers)
    with pytest.raises(LDMError, match=r"compressed\.bin.*is compressed"):
        WeightFiles(again, allow_pickle=True)


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="no alarms on this system")
def test_defect_a_table_that_holds_itself_is_unpacked_for_ever(tmp_path):
    path = tmp_path / "cyclic.ckpt"
    table = {"x": torch.ones(3)}
    table["state_dict"] = table
    torch.save(table, path)
    with pytest.raises(Endless), at_most(0.5):
        load_single_file_checkpoint(str(path), local_files_only=True)
    with at_most(5):
        try:
            found = WeightFiles(path, allow_pickle=True)
        except LDMError as error:
            assert "cyclic.ckpt" in str(error)
        else:
            assert torch.equal(found.read("x"), torch.ones(3))


@pytest.fixture
def unet(models, tmp_path):
    """A folder of the tiny UNet, and its file."""
    folder = shutil.copytree(models.folder("sd1") / "unet", tmp_path / "unet")
    return folder, folder / "diffusion_pytorch_model.safetensors"


def test_defect_a_missing_tensor_is_no_error(unet, models, tmp_path):
    folder, file = unet
    tensors = {name: tensor.clone() for name, tensor, _ in read_tensors(file)}
    del tensors["mid_block.resnets.0.conv1.weight"]
    save_weights(tensors, file)
    weight = UNet2DConditionModel.from_pretrained(folder).mid_block.resnets[0].conv1.weight
    # What isn't there stays without numbers, or gets others.
    assert weight.is_meta or not torch.equal(weight, models.reference("sd1").unet.mid_block.resnets[0].conv1.weight)
    whole = shutil.copytree(models.folder("sd1"), tmp_path / "whole", ignore=shutil.ignore_patterns("unet"))
    shutil.move(folder, whole / "unet")
    with pytest.raises(LDMError, match=r"missing mid_block\.resnets\.0\.conv1\.weight"):
        ldm.load(whole)


def test_defect_numbers_that_are_none_are_loaded(unet, models, tmp_path):
    folder, file = unet
    data = bytearray(file.read_bytes())
    data[-4:] = torch.tensor([float("nan")]).numpy().tobytes()  # the last number of the file
    file.write_bytes(data)
    theirs = UNet2DConditionModel.from_pretrained(folder)
    assert sum(parameter.isnan().sum() for parameter in theirs.parameters()) == 1
    whole = shutil.copytree(models.folder("sd1"), tmp_path / "whole", ignore=shutil.ignore_patterns("unet"))
    shutil.move(folder, whole / "unet")
    with pytest.raises(LDMError, match="holds 1 NaN and 0 infinite numbers"):
        ldm.load(whole)


def test_defect_an_original_file_of_sdxl_s_controlnet_isnt_read(models, tmp_path):
    """diffusers' converter leaves out what such a net is told of the pooled text and sizes."""
    theirs, ours = controlnets(models, "sdxl")
    origins = names.origins("controlnet", ours.config, "control_model.")
    file = tmp_path / "net.safetensors"
    save_weights(names.to_original(ours.state_dict(), origins), file)
    theirs.save_config(tmp_path / "config")
    with pytest.raises(Exception) as caught:  # of some kind, as it comes
        net = ControlNetModel.from_single_file(str(file), config=str(tmp_path / "config"), local_files_only=True)
        assert not any(parameter.is_meta for parameter in net.parameters()), "some parameters have no numbers"
    assert not isinstance(caught.value, LDMError)
    view = names.Renamed(WeightFiles(file), origins)
    assert all(torch.equal(view.read(key), tensor) for key, tensor in ours.state_dict().items())
