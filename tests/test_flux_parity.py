"""`ldm parity` of FLUX: equal where both are, along the whole road; what is planted in ours is found and named."""

import json
from unittest import mock

import pytest
import torch
from test_parity import by_station

from ldm.cli import main
from ldm.models import flux
from ldm.parity import opening, timing

CPU = torch.device("cpu")


@pytest.fixture
def parity(tmp_path, capsys, monkeypatch):
    """Walk; status, report and what was printed. Nothing is run twice for its time."""
    monkeypatch.setattr(timing, "DEAR", 0.0)

    def run(*words):
        path = tmp_path / "report.json"
        status = main(["parity", *words, "--json", str(path), "--html", str(tmp_path / "report.html")])
        out, err = capsys.readouterr()
        return status, json.loads(path.read_text()), out + err

    return run


def test_every_station_of_a_flux_is_equal_in_float64(parity, tmp_path):
    only = "weights,tokenizer,text,transformer,samplers,pipelines"
    words = ("--random-init", "tiny-flux", "--dtype", "float64", "--size", "32x48", "--steps", "2", "--only", only)
    status, report, out = parity(*words)
    networks = ("weights", "tokenizer", "tokenizer_2", "text encoder", "text encoder 2", "transformer")
    pictures = ("drawn from words", "drawn from a picture", "inpainted")
    expected = {each: {"equal"} for each in (*networks, *pictures)} | {"samplers": {"equal", "skipped"}}
    assert status == 0 and by_station(report) == expected, out
    (modules,) = [
        line for line in report["lines"] if line["what"].startswith("each of") and "former" in line["station"]
    ]
    assert int(modules["what"].split()[2]) > 80
    named = {block["name"] for block in report["blocks"]["transformer"]}
    # the blocks themselves, though diffusers hands text and picture on in another order
    assert {"transformer_blocks.1", "single_transformer_blocks.2", "time_text_embed", "x_embedder"} <= named
    assert "single_transformer_blocks.2" in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize(
    "name, station", [("tiny-flux-fill", "inpainted"), ("tiny-flux-canny", "drawn from a picture")]
)
def test_models_that_read_pictures_are_drawn_with_as_diffusers_does(parity, name, station):
    words = ("--random-init", name, "--dtype", "float64", "--size", "32x48", "--steps", "2", "--only", "pipelines")
    status, report, out = parity(*words)
    assert status == 0 and by_station(report) == {station: {"equal"}}, out


def test_bfloat16_is_no_farther_from_float32_than_diffusers(parity):
    words = ("--random-init", "tiny-flux", "--dtype", "bfloat16", "--size", "32x48", "--only", "transformer")
    status, report, out = parity(*words)
    line = report["lines"][0]
    assert status == 0 and "against float32; theirs" in line["note"] and 1e-4 < line["relative"] < 0.5, out


PLANTED = {  # what is planted in ours, by what takes whose place
    "turned the other way": {"rotate": lambda x, rotary, own=flux.rotate: own(x, (rotary[0], -rotary[1]))},
    "shift and scale": {"modulate": lambda x, shift, scale, own=flux.modulate: own(x, scale, shift)},
}


@pytest.mark.parametrize("name", PLANTED)
def test_what_is_planted_is_found_in_its_block(parity, name):
    with mock.patch.multiple(flux, **PLANTED[name]):
        words = ("--random-init", "tiny-flux-schnell", "--dtype", "float64", "--size", "32x48", "--only", "transformer")
        status, report, out = parity(*words)
    (found,) = report["divergences"]
    assert status == 1 and found["block"] == "transformer_blocks.0", out
    assert any(cause.startswith("written out plainly, as published") for cause in found["causes"]), out


def test_a_port_that_differs_is_explained(parity, tmp_path, flux_folder):
    """A port's transformer that turns halves instead of pairs, as LLaMA's does: the block and the cause."""
    port = tmp_path / "port.py"
    port.write_text(
        """
import ldm, torch
from unittest import mock
from ldm.models import flux
from ldm.models.unet import Extras
from ldm.parity.flux_ways import in_halves

def load(folder, device, dtype):
    pipe = ldm.load(folder, dtype, device)
    flux_module = pipe.transformer
    def transformer(x, t, context, extras):
        with mock.patch.object(flux, "rotate", in_halves):
            return flux_module(x, t, context, Extras(**extras))
    return {"transformer": transformer, "transformer_module": flux_module}
"""
    )
    words = (str(flux_folder), "--against", str(port), "--dtype", "float64", "--size", "32x48", "--only", "transformer")
    status, report, out = parity(*words)
    (found,) = report["divergences"]
    assert status == 1 and found["block"] == "transformer_blocks.0" and found["kind"] == "DoubleBlock", out
    assert any(cause.startswith("with halves of q and k turned instead of pairs") for cause in found["causes"]), out


@pytest.fixture(scope="module")
def flux_folder(tmp_path_factory):
    """A tiny FLUX as a folder, as ldm writes it."""
    from tiny_flux import FluxModels

    return FluxModels(tmp_path_factory.mktemp("flux")).folder("schnell")


def test_both_sides_share_one_set_of_weights():
    ours, theirs = opening.of_architecture("tiny-flux", torch.float32, CPU)
    for name, part in ours.parts.items():
        other = theirs.parts[name]
        state = {other.rename(key): tensor for key, tensor in other.module.state_dict().items()}
        mine = part.module.state_dict()
        assert mine.keys() == state.keys()
        assert all(tensor.data_ptr() == state[key].data_ptr() for key, tensor in mine.items())


# ---------------------------------------------------------------------------------------------------- on a GPU

ROOM = torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else 0


@pytest.mark.gpu
@pytest.mark.skipif(not ROOM, reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
def test_on_cuda_a_tiny_flux_is_equal(parity, dtype):
    status, report, out = parity("--random-init", "tiny-flux", "--device", "cuda", "--dtype", dtype, "--size", "64x96")
    assert status == 0 and report["equal"], out


@pytest.mark.gpu
@pytest.mark.skipif(ROOM < 60e9, reason="needs a CUDA device with 60 GB")
@pytest.mark.parametrize("name", ["flux-schnell", "flux-dev"])
def test_flux_at_full_size_is_equal_in_bfloat16(parity, name):
    words = ("--device", "cuda", "--dtype", "bfloat16", "--size", "1024x1024", "--only", "transformer,pipelines")
    status, report, out = parity("--random-init", name, *words)
    assert status == 0 and report["equal"] and "peak " in out, out
