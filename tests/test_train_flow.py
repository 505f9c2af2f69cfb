"""The training of the small FLUX: what it computes, that it learns, stops and goes on, and what is exported."""

import json
import os
import shutil
import signal
from dataclasses import replace

import pytest
import torch
from PIL import Image

from ldm.checkpoints.places import embedded
from ldm.cli import main
from ldm.errors import LDMError
from ldm.io.folders import folder_hash
from ldm.loading import load
from ldm.models.flux import Flux, FluxConfig
from ldm.models.unet import Extras
from ldm.schedules import ScheduleConfig
from ldm.train import common, export, flow
from ldm.train.data import pictures

SMALL = replace(
    flow.CONFIG,
    num_layers=1,
    num_single_layers=1,
    attention_head_dim=8,
    num_attention_heads=2,
    axes_dims_rope=(4, 2, 2),
)
RECIPE = flow.Recipe(pictures=16, held_out=8, steps=4, batch=4, sheet_every=4, precision="float32")


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """A run's folder with its pictures drawn and encoded."""
    folder = tmp_path_factory.mktemp("run")
    pictures(folder / "data", 16)
    pictures(folder / "data", 8, "held-out", first=10_000_000)
    return folder


def fresh(run_folder, folder):
    folder.mkdir(exist_ok=True)
    (folder / "data").symlink_to(run_folder / "data")
    return folder


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(flow, "CONFIG", SMALL)


def test_levels_follow_the_logit_normal_distribution():
    """Esser et al. 2024, equation 19: logit(sigma) is normal. Its quartiles by the inverse, and one level a stretch."""
    sigma = flow.levels(4000, 0.4, 1.2, torch.Generator().manual_seed(0))
    logit = torch.logit(sigma.double()).sort().values
    assert torch.equal(logit, torch.logit(sigma.double()))  # one in each stretch, in order
    assert logit.mean().item() == pytest.approx(0.4, abs=2e-3)
    assert logit.std().item() == pytest.approx(1.2, rel=5e-3)
    quarter = 0.6744897501960817  # of the standard normal
    assert logit[1000].item() == pytest.approx(0.4 - 1.2 * quarter, abs=5e-3)
    assert logit[3000].item() == pytest.approx(0.4 + 1.2 * quarter, abs=5e-3)
    assert 0 < sigma.min() and sigma.max() < 1


def test_the_loss_is_the_velocity_s_error_on_the_line_from_picture_to_noise():
    x0, eps = torch.randn(2, 4, 4, 4), torch.randn(2, 4, 4, 4)
    sigma, asked = torch.tensor([0.25, 0.75]), []

    def flux(x, t, context, extras):
        asked.append((x, t, context, extras))
        return torch.full_like(x, 0.5)

    words = (torch.randn(2, 5, 3), Extras(pooled=torch.randn(2, 3)))
    value = flow.loss(flux, x0, words, sigma, eps).item()
    assert value == pytest.approx(((0.5 - (eps - x0)) ** 2).mean().item(), rel=1e-6)
    ((x, t, context, extras),) = asked
    assert t.tolist() == [250, 750] and context is words[0] and extras is words[1]
    assert torch.allclose(x[0], 0.75 * x0[0] + 0.25 * eps[0]) and torch.allclose(x[1], 0.25 * x0[1] + 0.75 * eps[1])


def test_what_is_read_of_a_caption_is_what_the_whole_of_it_gives():
    base = load("scenes")
    ids = base.tokenizer(["a large red house on snow at night", ""]).ids
    context, extras = flow.read(base.text_encoder, ids)
    whole = base.text_encoder(ids)
    assert context.shape == (2, flow.TOKENS, 128)
    assert (context - whole.last[:, : flow.TOKENS]).abs().max() < 1e-5 < whole.last.abs().max()
    assert (extras.pooled - whole.pooled).abs().max() < 1e-5 < extras.pooled.abs().max()


def test_no_caption_is_longer_than_what_is_read(run_folder):
    tokenizer = load("scenes").tokenizer
    words = [each for caption in pictures(run_folder / "data", 16).captions for each in caption]
    assert max(len(tokenizer.encode(each)) for each in words) + 2 <= flow.TOKENS


def test_it_begins_by_answering_nothing_and_every_weight_learns(run_folder, small):
    """adaLN-Zero. Some steps later no parameter is without a gradient."""
    flux = flow.begin(RECIPE)
    x, words = torch.randn(2, 4, 4, 4), (torch.randn(2, 5, 128), Extras(pooled=torch.randn(2, 128)))
    assert flux(x, torch.tensor([100.0, 900.0]), *words).abs().max() == 0
    optimizer = torch.optim.SGD(flux.parameters(), lr=0.1)
    for _ in range(6):
        optimizer.zero_grad()
        flow.loss(flux, x, words, torch.tensor([0.1, 0.9]), torch.randn_like(x)).backward()
        optimizer.step()
    dead = [name for name, p in flux.named_parameters() if p.grad is None or p.grad.abs().max() == 0]
    assert not dead


def test_a_run_stopped_by_ctrl_c_and_resumed_equals_an_unbroken_one(run_folder, tmp_path, small, monkeypatch):
    whole, broken = fresh(run_folder, tmp_path / "whole"), fresh(run_folder, tmp_path / "broken")
    flow.train(whole, RECIPE)
    step, calls = common.Optimizer.step, []

    def interrupted(self, *args):
        calls.append(1)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGINT)  # in the middle of the second step
        return step(self, *args)

    monkeypatch.setattr(common.Optimizer, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        flow.train(broken, RECIPE)
    assert torch.load(broken / "flow" / "state.pt", weights_only=True)["step"] == 2
    flow.train(broken, RECIPE)
    assert len(calls) == 4
    assert folder_hash(whole / "flow" / "transformer") == folder_hash(broken / "flow" / "transformer")
    assert FluxConfig.from_json(json.loads((whole / "flow" / "transformer" / "config.json").read_text())) == SMALL
    lines = [json.loads(line) for line in (whole / "flow" / "log.jsonl").read_text().splitlines()]
    assert 0.5 < lines[-1]["held_out_loss"] < 5
    assert Image.open(whole / "flow" / "sheet-000004.png").size == (8 * 128, 128)


def test_training_lowers_the_held_out_loss(run_folder, tmp_path, small):
    folder = fresh(run_folder, tmp_path / "run")
    flow.train(folder, replace(RECIPE, steps=36, sheet_every=12, ema=0.5, lr=3e-2))
    lines = [json.loads(line) for line in (folder / "flow" / "log.jsonl").read_text().splitlines()]
    early, later, last = (line["held_out_loss"] for line in lines if "held_out_loss" in line)
    assert last < later < early and last < 0.95 * early


def test_half_precision_gives_the_same_gradients(small):
    """bfloat16 products beside float32: one direction, within rounding."""
    grads = []
    for precision in ("float32", "bfloat16"):
        flux = flow.begin(RECIPE)
        torch.manual_seed(1)
        for p in flux.parameters():
            p.data.add_(0.05 * torch.randn_like(p))
        x, words = torch.randn(4, 4, 8, 8), (torch.randn(4, 5, 128), Extras(pooled=torch.randn(4, 128)))
        with flow.computing(precision, "cpu"):
            flow.loss(flux, x, words, torch.tensor([0.2, 0.4, 0.6, 0.8]), torch.randn_like(x)).backward()
        grads.append(torch.cat([p.grad.flatten() for p in flux.parameters()]))
    assert torch.cosine_similarity(*grads, dim=0) > 0.995
    assert not torch.equal(*grads)


def exported(run_folder, tmp_path, base="scenes"):
    flow.write_model(tmp_path / "transformer", flow.begin(RECIPE), "diffusion_pytorch_model")
    export.export_flow(tmp_path / "transformer", tmp_path / "my-flow", base)
    return tmp_path / "my-flow"


def test_what_is_exported_loads_and_draws_and_names_the_model_whose_parts_it_takes(run_folder, tmp_path, small):
    folder = exported(run_folder, tmp_path)
    fields = json.loads((folder / "ldm.json").read_text())
    assert fields["parts_of"] == "scenes" and fields["max_sequence_length"] == flow.TOKENS
    assert sorted(each.name for each in folder.iterdir()) == [
        "ldm.json", "model_index.json", "samples.jpg", "scheduler", "transformer",
    ]  # fmt: skip
    pipe = load(folder)
    assert isinstance(pipe.transformer, Flux) and pipe.unet is None
    assert pipe("a red house", steps=2).images[0].size == (128, 128)


def test_of_a_base_that_is_a_folder_the_parts_are_copied(run_folder, tmp_path, small):
    base = tmp_path / "elsewhere"
    shutil.copytree(embedded()["scenes"], base)
    folder = exported(run_folder, tmp_path, str(base))
    assert "parts_of" not in json.loads((folder / "ldm.json").read_text())
    for part in ("vae", "text_encoder", "tokenizer"):
        assert folder_hash(folder / part) == folder_hash(base / part)
    assert load(folder).backbone.config == SMALL


def test_a_folder_that_holds_something_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("three years")
    with pytest.raises(LDMError, match="holds something else than such a model, and would be replaced: name another"):
        export.check_flow_place(tmp_path)
    line = ["train", "flow", "--run", str(tmp_path / "run"), "--to", str(tmp_path)]
    assert main(line) == 1  # asked before it trains
    assert not (tmp_path / "run" / "flow").exists() and (tmp_path / "thesis.txt").exists()


def test_the_schedule_is_read_as_diffusers_wrote_it():
    config = ScheduleConfig.from_json(flow.SCHEDULER)
    assert (config.rule, config.prediction_type, config.sampler, config.shift) == ("flow", "flow", "euler", 1.0)


def test_a_picture_s_record_tells_other_borrowed_parts_apart(run_folder, tmp_path, small, monkeypatch, capsys):
    """scenes-flow draws with the VAE of "scenes": another one there is another model."""
    folder = exported(run_folder, tmp_path)
    shutil.copytree(embedded()["scenes"], tmp_path / "scenes")
    monkeypatch.chdir(tmp_path)
    line = ["generate", "a red house", "--model", str(folder), "--steps", "1", "--out", "a.png"]
    assert main(line) == 0 and main(["rerun", "a.png", "--out", "b.png"]) == 0
    assert "model_hash" not in capsys.readouterr().out
    config = tmp_path / "scenes" / "vae" / "config.json"
    config.write_text(config.read_text().replace('"sample_size": 128', '"sample_size": 64'))
    main(["rerun", "a.png", "--out", "c.png"])
    assert "model_hash" in capsys.readouterr().out
