"""Training a ControlNet, and the reader of depth that judges it: what they compute, and short runs for real."""

import filecmp
import json
import os
import signal
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from tiny import tiny_model

import ldm
from ldm import conditions, scenes
from ldm.cli import main
from ldm.errors import LDMError
from ldm.io.folders import folder_hash, read_json, write_json
from ldm.metrics.control import load_depth_reader
from ldm.models.controlnet import ControlNet
from ldm.train import common, controlnet, depth_reader, export, unet
from ldm.train.controlnet import CHANNELS, Controlled, condition_of, condition_tensor, conditions_of
from ldm.train.data import pictures

PICTURES, HELD_OUT, STEPS = 32, 16, 11
SHORT = ["--pictures", PICTURES, "--steps", STEPS, "--batch", 4, "--lr", 0.01]
STEM = "diffusion_pytorch_model.safetensors"


@dataclass(frozen=True)
class ShortNet(controlnet.Recipe):
    held_out: int = HELD_OUT
    sheet_every: int = 6


@dataclass(frozen=True)
class ShortReader(depth_reader.Recipe):
    held_out: int = HELD_OUT


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """The pictures, drawn once; what the runs make of them lies beside them."""
    folder = tmp_path_factory.mktemp("pictures") / "data"
    pictures(folder, PICTURES)
    pictures(folder, HELD_OUT, "held-out", first=10_000_000)
    return folder


@pytest.fixture
def train(base, data, monkeypatch, capsys):
    """`ldm train STAGE` in that folder; what it said on stderr."""
    monkeypatch.setattr(controlnet, "Recipe", ShortNet)
    monkeypatch.setattr(depth_reader, "Recipe", ShortReader)

    def run(stage, folder, *words, status=0):
        folder.mkdir(exist_ok=True)
        if not (folder / "data").exists():
            (folder / "data").symlink_to(data)
        model = ["--base", base] if stage == "controlnet" and "--base" not in words else []
        found = main([str(word) for word in ("train", stage, "--run", folder, *SHORT, *model, *words)])
        err = capsys.readouterr().err
        assert found == status, err
        assert "Traceback" not in err
        return err

    return run


def log(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def same_bytes(a, b):
    return filecmp.cmp(a, b, shallow=False)


def of_data(data):
    return pictures(data, PICTURES), pictures(data, HELD_OUT, "held-out", first=10_000_000)


def interrupt_in_step(monkeypatch, number):
    """Ctrl-C in the middle of that step; the list grows by every step that is taken."""
    step, calls = common.Optimizer.step, []

    def interrupted(self, *args):
        calls.append(1)
        if len(calls) == number:
            os.kill(os.getpid(), signal.SIGINT)
        return step(self, *args)

    monkeypatch.setattr(common.Optimizer, "step", interrupted)
    return calls


# ---------------------------------------------------------------------------------------------- conditions


@pytest.mark.parametrize("kind", ["canny", "depth"])
def test_conditions_are_those_of_the_pictures_and_are_made_once(data, tmp_path, monkeypatch, kind):
    every, held = of_data(data)
    for one, name in ((every, "train"), (held, "held-out")):
        rows = conditions_of(kind, one, tmp_path, name)
        assert rows.shape == (len(one), 128, 128) and rows.dtype == np.uint8
        for k in (0, 5, len(one) - 1):
            true = scenes.render(one.scenes[k])
            if kind == "canny":
                wanted = np.asarray(conditions.canny(Image.fromarray(true.image)))[..., 0]
            else:
                wanted = np.round(255 * true.depth).astype(np.uint8)
            assert wanted.any() and np.array_equal(rows[k], wanted)
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"{kind}-held-out-16.npy", f"{kind}-train-32.npy"]
    monkeypatch.setattr(controlnet, "condition_of", None)  # not called again
    assert np.array_equal(conditions_of(kind, held, tmp_path, "held-out"), rows)


def test_what_the_net_is_shown_in_training_is_what_it_is_shown_in_drawing(data):
    every, _ = of_data(data)
    for kind in ("canny", "depth"):
        picture = condition_of(kind, every.scenes[3], every.images[3])
        rows = np.asarray(picture)[None, ..., 0]
        assert torch.equal(condition_tensor(rows), conditions.to_tensor(picture))
        assert 0 <= condition_tensor(rows).min() < condition_tensor(rows).max() <= 1


# ---------------------------------------------------------------------------------------------- the loss


def some_batch(n=3, size=4):
    rng = torch.Generator().manual_seed(0)
    x0, eps = (torch.randn(n, 4, size, size, generator=rng) for _ in range(2))
    return x0, eps, torch.tensor([0, 400, 999])[:n], torch.randn(n, 77, 16, generator=rng)


def test_the_loss_is_the_weighted_error_of_the_unet_that_is_led():
    """With a net that answers with what it was given, and a UNet that returns what the net answers."""
    x0, eps, t, context = some_batch()
    bars, condition = torch.linspace(0.99, 0.01, 1000), torch.rand(3, 3, 32, 32)

    class Net:
        def condition(self, picture):
            return picture.mean((1, 2, 3)).view(-1, 1, 1, 1)

        def __call__(self, x, times, words, features):
            assert times is t and words is context
            return 0.5 * x + features

    def stub(x, times, words, residuals):
        assert times is t and words is context
        return residuals

    led = Controlled.__new__(Controlled)
    torch.nn.Module.__init__(led)
    led.__dict__.update(unet=stub, net=Net(), condition=condition)
    found = unet.loss(led, x0, context, t, eps, bars, (1.0, 5.0), "epsilon").item()
    bar = bars[t].view(-1, 1, 1, 1)
    answer = 0.5 * (bar.sqrt() * x0 + (1 - bar).sqrt() * eps) + condition.mean((1, 2, 3)).view(-1, 1, 1, 1)
    errors, snr = (answer - eps).square().mean((1, 2, 3)), bars[t] / (1 - bars[t])
    weights = torch.stack([torch.tensor(5.0), snr[1], torch.tensor(1.0)]) / snr
    assert found == pytest.approx((errors * weights).mean().item(), rel=1e-5)


@pytest.fixture(scope="module")
def pipe(base):
    pipe = ldm.load(base)
    pipe.unet.requires_grad_(False)
    return pipe


def test_the_first_step_starts_from_the_finished_models_own_loss(pipe):
    x0, eps, t, context = some_batch()
    net = ControlNet.from_unet(pipe.unet, CHANNELS)
    rest = (x0, context, t, eps, torch.linspace(0.99, 0.01, 1000), (1.0, 5.0), "epsilon")
    condition = torch.rand(3, 3, 32, 32)
    led, own = unet.loss(Controlled(pipe.unet, net, condition), *rest), unet.loss(pipe.unet, *rest)
    assert torch.equal(led, own) and own > 0.1
    led.backward()  # the zero convolutions learn at once, the UNet never
    moved = [name for name, p in net.named_parameters() if p.grad is not None and p.grad.abs().max() > 0]
    assert moved and all(name.startswith(("controlnet_down_blocks", "controlnet_mid_block")) for name in moved)
    assert all(p.grad is None for p in pipe.unet.parameters())
    with torch.no_grad():
        net.controlnet_mid_block.bias += 1
    assert not torch.equal(unet.loss(Controlled(pipe.unet, net, condition), *rest), own)


def test_the_held_out_loss_is_always_of_the_same_noise(pipe, data):
    _, held = of_data(data)
    net = ControlNet.from_unet(pipe.unet, CHANNELS)
    with torch.no_grad():
        x0 = pipe.vae.posterior(held.tensor(slice(0, 16))).mean
        context = pipe.text_encoder.context(pipe.tokenizer([words[0] for words in held.captions]).ids)
    seen = conditions_of("canny", held, data, "held-out")
    bars = torch.tensor(pipe.schedule(1).bars, dtype=torch.float32)
    recipe = ShortNet()
    found = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        found.append(controlnet.held_out_loss(pipe, net, x0, context, seen, bars, recipe))
    eps = torch.randn(x0.shape, generator=torch.Generator().manual_seed(0))
    t = ((torch.arange(16) + 0.5) / 16 * 1000).long()
    with torch.no_grad():
        own = unet.loss(pipe.unet, x0, context, t, eps, bars, recipe.snr_range, pipe.scheduler.prediction_type)
    assert found[0] == found[1] == pytest.approx(own.item(), rel=1e-5)


def test_the_sheet_shows_conditions_and_under_each_what_is_drawn_by_it(pipe, data):
    _, held = of_data(data)
    words, seen = [each[0] for each in held.captions][:10], conditions_of("canny", held, data, "held-out")[:10]
    net = ControlNet.from_unet(pipe.unet, CHANNELS)  # changes nothing yet
    found = controlnet.draw(pipe, net, words, seen)
    assert found.shape == (20, 3, 128, 128)  # eight conditions, their pictures, two conditions, their pictures
    plain = pipe(words, width=128, height=128).images
    for k in range(10):
        row = 16 * (k // 8) + k % 8
        assert torch.equal(found[row], 2 * condition_tensor(seen)[k] - 1)
        under = found[row + (8 if k < 8 else 2)].permute(1, 2, 0).numpy()
        assert np.abs((under + 1) * 127.5 - np.asarray(plain[k], dtype=float)).max() < 1.5
    with torch.no_grad():
        net.controlnet_mid_block.bias += 1
    assert not torch.equal(controlnet.draw(pipe, net, words, seen)[8:16], found[8:16])


# ---------------------------------------------------------------------------------------------- a run of eleven steps


@pytest.mark.parametrize("kind", ["canny", "depth"])
def test_a_controlnet_is_trained_logged_shown_and_written(train, base, data, tmp_path, kind):
    before = folder_hash(base)
    (tmp_path / "out" / "net").mkdir(parents=True)
    train("controlnet", tmp_path / "r", "--condition", kind, "--to", tmp_path / "out" / "net")
    folder = tmp_path / "r" / f"controlnet-{kind}"
    assert sorted(path.name for path in folder.iterdir()) == [
        "controlnet", "log.jsonl", "sheet-000006.png", "sheet-000011.png", "state.pt"
    ]  # fmt: skip
    assert folder_hash(base) == before

    lines = log(folder)
    assert [sorted(line) for line in lines] == [
        ["held_out_loss", "seconds", "step"], ["loss", "norm", "seconds", "step"], ["held_out_loss", "seconds", "step"]
    ]  # fmt: skip
    assert [line["step"] for line in lines] == [6, 10, 11] and all(0 < v for line in lines for v in line.values())
    assert lines[0]["held_out_loss"] != lines[2]["held_out_loss"]
    assert torch.load(folder / "state.pt", weights_only=True)["step"] == STEPS

    with Image.open(folder / "sheet-000011.png") as sheet:
        assert sheet.size == (8 * 128, 4 * 128)
        rows = np.asarray(sheet).reshape(4, 128, 8, 128, 3).swapaxes(1, 2)  # (row, column, H, W, 3)
    _, held = of_data(data)
    assert np.array_equal(rows[0, 5], np.asarray(condition_of(kind, held.scenes[5], held.images[5])))
    assert np.array_equal(rows[2, 7], np.asarray(condition_of(kind, held.scenes[15], held.images[15])))

    pipe = ldm.load(base)
    net = ldm.load_controlnet(folder / "controlnet", pipe)
    assert net.config.conditioning_embedding_out_channels == CHANNELS
    start, found = ControlNet.from_unet(pipe.unet, CHANNELS).state_dict(), net.state_dict()
    zeros = [name for name in start if name.startswith("controlnet_") and not start[name].any()]
    assert len(zeros) > 8 and all(found[name].any() for name in zeros)
    averaged = torch.load(folder / "state.pt", weights_only=True)["ema"]  # what is kept is the mean of the last steps
    assert all(torch.equal(found[name], averaged[name]) for name in found)

    small = load_file(tmp_path / "out" / "net" / STEM)
    assert small.keys() == found.keys() and {tensor.dtype for tensor in small.values()} == {torch.float16}
    assert all(torch.equal(small[name], found[name].half()) for name in small)
    assert read_json(tmp_path / "out" / "net" / "config.json") == read_json(folder / "controlnet" / "config.json")
    ldm.load_controlnet(tmp_path / "out" / "net", pipe)


def test_a_run_stopped_by_ctrl_c_and_resumed_equals_an_unbroken_one(train, tmp_path, monkeypatch):
    train("controlnet", tmp_path / "whole")
    calls = interrupt_in_step(monkeypatch, 3)
    said = train("controlnet", tmp_path / "broken", status=130)
    assert f"ldm: Stopped in controlnet; {tmp_path / 'broken'} holds what is done, the same command goes on." in said
    folders = [tmp_path / name / "controlnet-canny" for name in ("whole", "broken")]
    assert torch.load(folders[1] / "state.pt", weights_only=True)["step"] == 3
    assert not (folders[1] / "controlnet").exists()
    train("controlnet", tmp_path / "broken")
    assert len(calls) == STEPS
    for name in (f"controlnet/{STEM}", "controlnet/config.json", "sheet-000011.png"):
        assert same_bytes(folders[0] / name, folders[1] / name), name
    lines = [[{k: v for k, v in line.items() if k != "seconds"} for line in log(folder)] for folder in folders]
    assert lines[0] == lines[1]

    weights = (folders[1] / "controlnet" / STEM).read_bytes()
    train("controlnet", tmp_path / "broken")  # a finished run takes no step more
    assert len(calls) == STEPS and (folders[1] / "controlnet" / STEM).read_bytes() == weights


def test_other_seeds_and_conditions_are_other_nets(train, tmp_path):
    weights = []
    for name, words in (("a", []), ("b", ["--seed", 1]), ("c", ["--condition", "depth"])):
        train("controlnet", tmp_path / name, *words, "--steps", 2)
        weights.append(next((tmp_path / name).glob(f"controlnet-*/controlnet/{STEM}")).read_bytes())
    assert len(set(weights)) == 3


def test_every_batch_is_decided_by_its_step_and_belongs_together(train, base, data, tmp_path, monkeypatch):
    """Noise, pictures, words and timesteps; each picture with its own condition; now and then without its words."""
    seen = []

    def loss(led, x0, context, t, eps, *rest):
        seen.append((x0, context, t, eps, led.condition))
        return unet.loss(led, x0, context, t, eps, *rest)

    monkeypatch.setattr(controlnet, "loss", loss)
    for name in ("a", "b"):
        train("controlnet", tmp_path / name, "--steps", 4, "--batch", 8)
    a, b = (lambda steps: (steps[:4], steps[4:]))([one for one in seen if len(one[0]) == 8])
    assert len(b) == 4  # the held-out pictures are sixteen
    assert all(torch.equal(x, y) for one, two in zip(a, b, strict=True) for x, y in zip(one, two, strict=True))

    pipe, (every, _) = ldm.load(base), of_data(data)
    edges, share, wordings = conditions_of("canny", every, data, "train"), [], set()
    with torch.no_grad():
        empty = pipe.text_encoder.context(pipe.tokenizer([""]).ids)
    for step, (x0, context, t, eps, condition) in enumerate(a):
        rows = torch.randint(PICTURES, (8,), generator=common.step_generator(0, step)).numpy()
        assert torch.equal(condition, condition_tensor(edges[rows]))
        with torch.no_grad():
            posterior = pipe.vae.posterior(every.tensor(rows))
        noise = (x0 - posterior.mean) / (0.5 * posterior.log_variance).exp()  # the tiny VAE's scaling factor is 1
        assert noise.mean().abs() < 0.1 and 0.9 < noise.std() < 1.1 and 0.9 < eps.std() < 1.1
        assert [int(each) // 125 for each in t] == list(range(8))  # one in each eighth
        share += [torch.allclose(row, empty[0], atol=1e-5) for row in context]
        for row, dropped, k in zip(context, share[-8:], rows, strict=True):  # its own words, in any of their wordings
            with torch.no_grad():
                own = pipe.text_encoder.context(pipe.tokenizer(every.captions[k]).ids)
            found = [n for n, each in enumerate(own) if torch.allclose(row, each, atol=1e-5)]
            assert found or dropped
            wordings.update(found[:1])
    assert not torch.equal(a[0][3], a[1][3]) and len(share) == 32
    assert 0.1 < np.mean(share) < 0.6  # the recipe drops 0.3 of them
    assert len(wordings) > 1


# ---------------------------------------------------------------------------------------------- --to


def finished(folder, base):
    """A trained ControlNet in that folder, and a card beside it."""
    pipe = ldm.load(base)
    common.write_model(folder, ControlNet.from_unet(pipe.unet, CHANNELS), "diffusion_pytorch_model")
    return folder


def test_export_replaces_an_older_net_but_keeps_its_card(base, tmp_path):
    source, target = finished(tmp_path / "new", base), tmp_path / "deep" / "net"
    export.export_controlnet(source, target)
    assert sorted(path.name for path in target.iterdir()) == ["config.json", STEM]
    (target / "README.md").write_text("measured by hand: ä")
    (target / "old.txt").write_text("of an older one")
    export.export_controlnet(source, target)
    assert sorted(path.name for path in target.iterdir()) == ["README.md", "config.json", STEM]
    assert (target / "README.md").read_text() == "measured by hand: ä"
    assert not [path for path in target.parent.iterdir() if path.name != "net"]  # no temporary folder is left


def a_diary(folder, base):
    (folder / "diary.txt").write_text("all I have")


def a_unet(folder, base):
    for name in ("config.json", STEM):
        (folder / name).write_bytes((base / "unet" / name).read_bytes())


def a_model(folder, base):
    write_json(folder / "model_index.json", {})


@pytest.mark.parametrize("fill", [a_diary, a_unet, a_model])
def test_a_folder_of_something_else_is_refused_before_the_training(train, base, tmp_path, monkeypatch, fill):
    target = tmp_path / "mine"
    target.mkdir()
    fill(target, base)
    before = {path.name: path.read_bytes() for path in target.iterdir()}
    calls = interrupt_in_step(monkeypatch, 0)
    said = train("controlnet", tmp_path / "r", "--to", target, status=1)
    assert said == f"ldm: {target} holds something else than a ControlNet, and would be replaced: name another.\n"
    assert calls == [] and {path.name: path.read_bytes() for path in target.iterdir()} == before
    with pytest.raises(LDMError, match="holds something else than a ControlNet"):
        export.export_controlnet(finished(tmp_path / "new", base), target)


@pytest.mark.parametrize(
    "words, status, sentence",
    [
        (["--base", "nowhere"], 1, "There is no model 'nowhere'"),
        (["--condition", "cany"], 2, "--condition must be canny or depth, not 'cany'. Did you mean 'canny'?"),
        (["--pictures", 5], 2, "--pictures must be 32 or more"),
        (["--batch", 3, "--processes", 2], 1, "A batch of 3 cannot be shared by 2 processes"),
        (["--init", "x"], 2, "Unknown option --init"),
    ],
)
def test_what_the_training_refuses(train, tmp_path, words, status, sentence):
    said = train("controlnet", tmp_path / "r", *words, status=status)
    assert said.startswith("ldm: ") and sentence in said and said.count("\n") == 1


# ---------------------------------------------------------------------------------------------- the depth reader


def test_the_depth_reader_is_trained_logged_written_and_resumed(train, tmp_path, monkeypatch):
    train("depth-reader", tmp_path / "whole")
    calls = interrupt_in_step(monkeypatch, 3)
    assert "Stopped in depth-reader; " in train("depth-reader", tmp_path / "broken", status=130)
    train("depth-reader", tmp_path / "broken")
    assert len(calls) == STEPS
    folders = [tmp_path / name / "depth-reader" for name in ("whole", "broken")]
    assert sorted(path.name for path in folders[0].iterdir()) == ["depth_reader.safetensors", "log.jsonl", "state.pt"]
    assert same_bytes(*(folder / "depth_reader.safetensors" for folder in folders))
    state = torch.load(folders[0] / "state.pt", weights_only=True)
    written = load_file(folders[0] / "depth_reader.safetensors")  # the mean of the last steps
    assert written.keys() == state["ema"].keys()
    assert all(torch.equal(tensor, state["ema"][name]) for name, tensor in written.items())
    assert not all(torch.equal(tensor, state["reader"][name]) for name, tensor in written.items())
    lines = log(folders[0])
    assert [sorted(line) for line in lines] == [["loss", "seconds", "step"], ["held_out_error", "seconds", "step"]]
    assert [line["step"] for line in lines] == [10, 11] and all(0 < value < 100 for value in lines[1].values())


def test_the_depth_reader_sees_other_pictures_each_step_with_their_own_depth(train, data, tmp_path, monkeypatch):
    seen, told, to_tensor = [], [], depth_reader.depth_tensor
    monkeypatch.setattr(depth_reader, "distort", lambda x, generator: seen.append(x) or x)
    monkeypatch.setattr(depth_reader, "depth_tensor", lambda rows: told.append(to_tensor(rows)) or told[-1])
    train("depth-reader", tmp_path, "--steps", 3)
    (every, _), found = of_data(data), []
    for x, y in zip(seen, told[:3], strict=True):
        pixels = ((x + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
        rows = [next(k for k in range(PICTURES) if np.array_equal(each, every.images[k])) for each in pixels]
        wanted = np.stack([np.round(255 * scenes.render(every.scenes[k]).depth) for k in rows])
        assert np.array_equal((255 * y).round().numpy(), wanted)
        found.append(tuple(rows))
    assert len(set(found)) == 3


def test_the_error_of_the_depth_reader_is_the_mean_distance(data):
    _, held = of_data(data)
    depth = conditions_of("depth", held, data, "held-out")

    def flat(x):
        return torch.full((len(x), 128, 128), 0.25)

    wanted = np.abs(0.25 - np.asarray(depth) / 255).mean()
    assert depth_reader.error(flat, held, depth, "cpu") == pytest.approx(wanted, rel=1e-5)
    true = SimpleNamespace(k=0)

    def right(x):
        true.k += len(x)
        return depth_reader.depth_tensor(depth[true.k - len(x) : true.k])

    assert depth_reader.error(right, held, depth, "cpu") == 0.0 and true.k == HELD_OUT


def test_the_depth_reader_learns(train, tmp_path):
    train("depth-reader", tmp_path, "--steps", 20)
    lines = log(tmp_path / "depth-reader")
    losses = [line["loss"] for line in lines if "loss" in line]
    assert losses[-1] < 0.8 * losses[0], losses


def test_a_depth_reader_is_written_in_half_precision_beside_the_model(tmp_path):
    torch.manual_seed(0)
    reader = depth_reader.DepthReader()
    target = tmp_path / "mine-depth-extras"
    (tmp_path / "depth-reader").mkdir()
    depth_reader.save_weights(reader.state_dict(), tmp_path / "depth-reader" / "depth_reader.safetensors")
    export.export_depth_reader(tmp_path / "depth-reader", target)
    with safe_open(target / "depth_reader.safetensors", "pt") as tensors:
        assert {tensors.get_slice(name).get_dtype() for name in tensors.keys()} == {"F16"}
    found = load_depth_reader(Path(tmp_path / "mine"))
    assert all(torch.equal(a.half().float(), b) for a, b in zip(reader.parameters(), found.parameters(), strict=True))
