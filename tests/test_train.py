"""The training loops: what they compute, and that a run that was stopped goes on as if it had not been."""

import filecmp
import hashlib
import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from ldm import scenes
from ldm.errors import LDMError
from ldm.io.folders import folder_hash
from ldm.metrics.checker import NOTHING, QUESTIONS
from ldm.models.vae import VAE, VAEConfig
from ldm.train import checker, clip, common, unet, vae
from ldm.train.data import Pictures, pictures
from ldm.train.muon import Muon, orthogonalise, split_parameters

TINY_VAE = VAEConfig(block_out_channels=(8, 8, 8, 8), norm_num_groups=2, sample_size=128)


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """A run's folder with its pictures drawn; every test that trains works in a folder of its own beside it."""
    folder = tmp_path_factory.mktemp("run")
    pictures(folder / "data", 24)
    pictures(folder / "data", 32, "held-out", first=10_000_000)
    return folder


def same_bytes(a, b):
    """Never assert `==` of large bytes: where they differ, pytest on CI prints their diff, which takes for ever."""
    return filecmp.cmp(a, b, shallow=False)


def fresh(run_folder, tmp_path):
    (tmp_path / "data").symlink_to(run_folder / "data")
    return tmp_path


def test_pictures_are_those_of_their_seeds(run_folder):
    data = pictures(run_folder / "data", 24)
    for row in (0, 7, 23):
        scene = scenes.sample(row, "train")
        picture = scenes.render(scene)
        assert data.scenes[row] == scene
        assert np.array_equal(data.images[row], picture.image)
        assert np.array_equal(data.masks[row], picture.masks.any(axis=0))
        assert scenes.caption(scene, row * 4 + 2) == data.captions[row][2]


def test_pictures_of_another_generator_are_refused(run_folder, tmp_path):
    shutil.copytree(run_folder / "data", tmp_path / "data")
    masks = np.load(tmp_path / "data" / "train-0-24" / "masks.npy", mmap_mode="r+")
    masks[23] = ~masks[23]
    masks.flush()
    with pytest.raises(LDMError, match=r"drawn by another version of ldm\.scenes: remove it"):
        pictures(tmp_path / "data", 24)


def test_a_run_stopped_by_ctrl_c_and_resumed_equals_an_unbroken_one(run_folder, tmp_path, monkeypatch):
    recipe = vae.Recipe(pictures=24, held_out=32, steps=5, batch=2, crop=32)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    for folder in (whole, broken):
        folder.mkdir()
        fresh(run_folder, folder)
    vae.train(whole, recipe, TINY_VAE)

    step = common.Optimizer.step
    calls = []

    def interrupted(self, *args):
        calls.append(1)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGINT)  # in the middle of the third step
        return step(self, *args)

    monkeypatch.setattr(common.Optimizer, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        vae.train(broken, recipe, TINY_VAE)
    assert torch.load(broken / "vae" / "state.pt", weights_only=True)["step"] == 3
    vae.train(broken, recipe, TINY_VAE)
    assert len(calls) == 5
    name = "vae/diffusion_pytorch_model.safetensors"
    assert same_bytes(whole / name, broken / name)
    assert (whole / "vae/config.json").read_text() == (broken / "vae/config.json").read_text()


def test_a_run_taken_up_again_says_what_is_new_and_drops_lines_it_will_write_again(run_folder, tmp_path, capsys):
    folder = fresh(run_folder, tmp_path)
    first = checker.Recipe(pictures=24, held_out=4, steps=10, batch=4)
    checker.train(folder, first)
    log = folder / "checker" / "log.jsonl"
    whole = log.read_text()
    log.write_text(whole + '{"step": 20, "loss": 1.0}\n{"step": 3')
    capsys.readouterr()
    checker.train(folder, first)
    assert log.read_text() == whole and "until now" not in capsys.readouterr().err
    checker.train(folder, replace(first, steps=11, lr=1e-3))
    assert f"{folder / 'checker'}: lr 0.001 was 0.002 until now." in capsys.readouterr().err


def test_vae_training_lowers_the_loss_and_measures_its_scale(run_folder, tmp_path):
    folder = fresh(run_folder, tmp_path)
    vae.train(folder, vae.Recipe(pictures=24, held_out=32, steps=60, batch=4, crop=32), TINY_VAE)
    rows = [json.loads(line) for line in (folder / "vae" / "log.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if "loss" in row]
    assert losses[-1] < 0.8 * losses[0]
    config = json.loads((folder / "vae" / "config.json").read_text())
    model = VAE(VAEConfig.from_json(config))
    from ldm.io.weights import load_weights

    load_weights(model, folder / "vae" / "diffusion_pytorch_model.safetensors")
    data = pictures(folder / "data", 24)
    with torch.no_grad():
        posterior = model.posterior(data.tensor(slice(0, 24)))
        z = posterior.sample(torch.randn(posterior.mean.shape)) * model.config.scaling_factor
    assert z.std().item() == pytest.approx(1, rel=0.05)  # the scaling factor brings latents to unit variance


def test_object_pixels_weigh_more_and_crops_keep_the_grid(run_folder):
    data = pictures(run_folder / "data", 24)
    recipe = vae.Recipe(batch=16, crop=64)
    x, weight = vae.crops(data, recipe, torch.Generator().manual_seed(0))
    assert x.shape == (16, 3, 64, 64) and weight.shape == (16, 1, 64, 64)
    assert set(weight.unique().tolist()) == {1.0, 1 + recipe.object_weight}
    for crop in x[:4]:  # every crop is found in some picture with its corner on a multiple of 8
        pixels = ((crop.permute(1, 2, 0) + 1) * 127.5).round().byte().numpy()
        corners = [(y, c) for y in range(0, 65, 8) for c in range(0, 65, 8)]
        assert any((image[y : y + 64, c : c + 64] == pixels).all() for image in data.images for y, c in corners)


def test_vae_loss_by_hand():
    torch.manual_seed(0)
    model = VAE(TINY_VAE)
    x, noise = torch.rand(1, 3, 16, 16) * 2 - 1, torch.randn(1, 4, 2, 2)
    weight = torch.ones(1, 1, 16, 16)
    with torch.no_grad():
        posterior = model.posterior(x)
        y = model.reconstruct(posterior.mean + posterior.log_variance.exp().sqrt() * noise)
        d = (y - x).numpy()
        by_hand = np.abs(d).mean() + np.abs(np.diff(d, axis=3)).mean() + np.abs(np.diff(d, axis=2)).mean()
        assert vae.loss(model, x, weight, noise, 0.0).item() == pytest.approx(by_hand, rel=1e-5)
        kl = vae.loss(model, x, weight, noise, 1.0).item() - by_hand
    normal = torch.distributions.Normal(posterior.mean, (0.5 * posterior.log_variance).exp())
    expected = torch.distributions.kl_divergence(normal, torch.distributions.Normal(0.0, 1.0)).sum()
    assert kl == pytest.approx(expected.item(), rel=1e-4)


def test_psnr_of_a_known_error():
    x = torch.zeros(1, 3, 4, 4)
    assert vae.psnr(x + 0.2, x) == pytest.approx(20.0, abs=1e-4)  # an error of a tenth of the range is 20 dB
    mask = torch.zeros(1, 4, 4, dtype=torch.bool)
    mask[0, 0, 0] = True
    y = x.clone()
    y[0, :, 0, 0] = 0.02
    assert vae.psnr(y, x, mask) == pytest.approx(40.0, abs=1e-4)


def test_orthogonalise_evens_out_the_singular_values():
    torch.manual_seed(0)
    for shape in ((20, 50), (50, 20)):
        g = torch.randn(shape) @ torch.diag(torch.logspace(0, -2, shape[1]))
        values = torch.linalg.svdvals(orthogonalise(g))[: min(shape) - 8]
        assert values.min() > 0.5 and values.max() < 1.3
        u, _, v = torch.linalg.svd(g, full_matrices=False)
        cosine = torch.nn.functional.cosine_similarity(orthogonalise(g).flatten(), (u @ v).flatten(), dim=0)
        assert cosine > 0.85  # towards the nearest orthogonal matrix


def test_orthogonalise_equals_the_published_iteration():
    """Jordan et al. multiply x itself in every step; multiplying the polynomials first is the same product."""
    torch.manual_seed(0)
    for shape in ((20, 50), (50, 20), (30, 30)):
        g = torch.randn(shape, dtype=torch.float64)
        x = g / g.norm()
        for _ in range(5):
            cube = x @ x.T @ x
            x = 3.4445 * x - 4.7750 * cube + 2.0315 * (x @ x.T @ cube)
        assert x.norm() > 3 and torch.allclose(orthogonalise(g), x, atol=1e-6)
        single = orthogonalise(g.float())
        assert (single - x).norm() / x.norm() < 1e-3


def test_muon_moves_against_the_gradient_by_its_rate():
    p = torch.nn.Parameter(torch.randn(16, 24))
    before, g = p.detach().clone(), torch.randn(16, 24)
    p.grad = g.clone()
    Muon([p], lr=0.01).step()
    moved = p.detach() - before
    assert (moved * g).sum() < 0
    assert moved.square().mean().sqrt().item() == pytest.approx(0.01 * 0.2, rel=0.25)


def test_embeddings_gains_and_biases_are_left_to_adamw():
    model = torch.nn.Sequential(torch.nn.Embedding(5, 3), torch.nn.Linear(3, 3), torch.nn.LayerNorm(3))
    matrices, rest = split_parameters(model)
    assert [p.shape for p in matrices] == [(3, 3)]
    assert len(rest) == 4


def test_trapezoid_rises_stays_and_falls_to_almost_nothing():
    rates = [common.trapezoid(step, 1000) for step in range(1000)]
    assert rates[0] == 0.01 and rates[99] == 1.0 and set(rates[99:700]) == {1.0}
    assert rates[850] == pytest.approx(0.5) and 0 < rates[-1] < 0.005


def test_ema_follows_the_weights():
    model = torch.nn.Linear(1, 1)
    ema = common.EMA(model, decay=0.9)
    torch.nn.init.constant_(model.weight, 5.0)
    for step in range(200):
        ema.update(model, step)
    assert ema.average["weight"].item() == pytest.approx(5.0, abs=1e-3)


def test_a_gradient_that_is_not_finite_changes_nothing():
    model = torch.nn.Linear(2, 2)
    before = model.weight.detach().clone()
    optimizer = common.Optimizer([model], lr=0.1)
    norm = optimizer.step((model(torch.ones(1, 2)) * math.inf).sum(), 1.0)
    assert not math.isfinite(norm) and torch.equal(before, model.weight)
    with pytest.raises(LDMError, match="not been a finite number for 20 steps"):
        for _ in range(19):
            optimizer.step((model(torch.ones(1, 2)) * math.inf).sum(), 1.0)


def test_the_reader_asks_only_what_a_caption_tells():
    """A caption that doesn't say who stands where counts neither as a loss nor as a mistake."""
    house, tree = scenes.Thing("house", "red", "large", 90.0, 80.0), scenes.Thing("tree", "blue", "small", 30.0, 80.0)
    both = scenes.Scene("night", "snow", True, "plain", (house, tree), 0)  # the tree stands on the left
    captions = [
        ["a red house and a blue tree", "a blue tree left of a red house", "a red house next to a blue tree", ""],
        ["a red house", "a large red house at night", "snow, a red house", ""],
        ["a blue tree on the left and a red house on the right", "a red house to the right of a blue tree", "", ""],
    ]
    data = Pictures(None, None, captions, [both, replace(both, things=(house,)), both])
    reader = clip.Reader()
    right, given = reader.answers(data)
    assert given.tolist() == [[False, True, False, False], [True] * 4, [True, True, False, False]]
    told = [[QUESTIONS[q][a] for q, a in zip(reader.ASKED, row, strict=True)] for row in right.tolist()]
    assert told == [
        ["tree", "blue", "house", "red"],
        ["house", "red", NOTHING, NOTHING],
        ["tree", "blue", "house", "red"],
    ]

    text = torch.randn(3, 128)
    answers, told = right[:3], torch.tensor([True, False, True])
    each = [
        torch.stack([-head(text).log_softmax(dim=1)[b, answers[b, k]] for k, head in enumerate(reader.heads)]).mean()
        for b in range(3)
    ]
    assert reader.loss(text, answers, told).item() == pytest.approx(((each[0] + each[2]) / 2).item(), rel=1e-5)
    assert reader.loss(text, answers, torch.zeros(3, dtype=torch.bool)).item() == 0
    picks = torch.stack([head(text).argmax(dim=1) for head in reader.heads], dim=1)
    picks[2, 0] = -1
    assert reader.accuracy(text, picks, told) == pytest.approx(7 / 8)


def test_clip_learns_to_match_and_to_read(run_folder, tmp_path):
    folder = fresh(run_folder, tmp_path)
    clip.train(folder, clip.Recipe(pictures=24, held_out=32, steps=80, batch=16, vocabulary=560))
    lines = [json.loads(line) for line in (folder / "clip" / "log.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    first, last = ({"read": s["reading"], "match": s["loss"] - s["reading"]} for s in (steps[0], steps[-1]))
    assert last["read"] < 0.5 * first["read"] and last["match"] < 0.8 * first["match"], (first, last)
    assert 0 < lines[-1]["recall"] <= 1 and 0 < lines[-1]["read"] <= 1


def test_a_run_begun_by_another_version_is_refused(tmp_path):
    recipe = vae.Recipe(steps=3)
    common.Run(tmp_path, {}, recipe).save()
    with pytest.raises(LDMError, match=r"state.pt was begun by another version of ldm and lacks ema, reader: remove"):
        common.Run(tmp_path, {"reader": torch.nn.Linear(1, 1), "ema": torch.nn.Linear(1, 1)}, recipe)


def test_unet_loss_is_the_weighted_noise_error():
    bars = torch.linspace(0.99, 0.01, 1000)
    x0, eps = torch.randn(3, 4, 8, 8), torch.randn(3, 4, 8, 8)
    t = torch.tensor([0, 400, 999])
    seen = {}

    def network(x, times, context):
        seen["x"] = x
        return torch.zeros_like(x)

    value = unet.loss(network, x0, None, t, eps, bars, (1.0, 5.0), "epsilon").item()
    errors = eps.square().mean(dim=(1, 2, 3))
    snr = bars[t] / (1 - bars[t])
    assert snr[0] > 5 and snr[2] < 1
    x0_weights = torch.stack([torch.tensor(5.0), snr[1], torch.tensor(1.0)])
    assert value == pytest.approx((errors * x0_weights / snr).mean().item(), rel=1e-5)
    expected = bars[t].sqrt().view(-1, 1, 1, 1) * x0 + (1 - bars[t]).sqrt().view(-1, 1, 1, 1) * eps
    assert torch.allclose(seen["x"], expected)


def test_the_whole_chain_trains_and_exports_a_model_that_loads(run_folder, tmp_path):
    """VAE, CLIP, checker and UNet for two steps each, exported: a folder that ldm loads and draws with."""
    import ldm
    from ldm.train.export import export

    folder = fresh(run_folder, tmp_path)
    vae.train(folder, vae.Recipe(pictures=24, held_out=32, steps=2, batch=2, crop=32), TINY_VAE)
    clip.train(folder, clip.Recipe(pictures=24, held_out=32, steps=2, batch=4, vocabulary=560))
    checker.train(folder, checker.Recipe(pictures=24, held_out=32, steps=2, batch=4))
    for text in ("tuned", "frozen"):
        unet.train(folder, unet.Recipe(pictures=24, held_out=4, steps=2, batch=2, text=text), name=f"unet-{text}")
    frozen, before = ((folder / path / "model.safetensors").read_bytes() for path in ("unet-frozen/text", "clip/text"))
    tuned = (folder / "unet-tuned" / "text" / "model.safetensors").read_bytes()
    assert frozen == before != tuned
    export(folder, tmp_path / "weights", {"steps": 2, "guidance": 2.0, "sampler": "dpm++2m"}, name="unet-tuned")
    pipe = ldm.load(tmp_path / "weights")
    assert pipe.defaults.steps == 2
    assert Image.open(tmp_path / "weights" / "samples.jpg").size == (8 * 128, 2 * 128)
    picture = np.asarray(pipe("a red house", seed=1).images[0])
    assert picture.shape == (128, 128, 3) and picture.std() > 1  # untrained, but not a single colour

    def again(target):
        export(folder, target, {"steps": 2, "guidance": 2.0, "sampler": "dpm++2m"}, name="unet-tuned")

    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("all I have")
    with pytest.raises(LDMError, match="mine holds something else than an exported model"):
        again(tmp_path / "mine")
    again(tmp_path / "weights")  # an exported model may be replaced
    vae.train(folder, vae.Recipe(pictures=24, held_out=32, steps=3, batch=2, crop=32), TINY_VAE)
    with pytest.raises(LDMError, match="unet-tuned was trained with another vae than"):
        again(tmp_path / "weights")


def test_training_twice_changes_nothing_that_is_finished(run_folder, tmp_path):
    folder = fresh(run_folder, tmp_path)
    stages = (
        lambda: vae.train(folder, vae.Recipe(pictures=24, held_out=4, steps=2, batch=2, crop=32), TINY_VAE),
        lambda: clip.train(folder, clip.Recipe(pictures=24, held_out=4, steps=2, batch=4, vocabulary=560)),
        lambda: checker.train(folder, checker.Recipe(pictures=24, held_out=4, steps=2, batch=4)),
        lambda: unet.train(folder, unet.Recipe(pictures=24, held_out=4, steps=2, batch=2)),
    )
    for train in stages:
        train()

    def hashes():
        return {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.rglob("*.safetensors")}

    before = hashes()
    for train in stages:
        train()
    assert len(before) >= 7 and before == hashes()


def test_another_vae_s_latents_are_not_taken(run_folder, tmp_path):
    folder = fresh(run_folder, tmp_path)
    data = pictures(folder / "data", 24)
    means = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        model = VAE(TINY_VAE).requires_grad_(False)
        common.write_model(folder / "vae", model, "diffusion_pytorch_model")
        latents = folder, folder_hash(folder / "vae")
        means.append(unet.encode_pictures(model, data, *latents, "train", "cpu")[0])
    assert not torch.equal(*means)


def test_two_processes_train_as_one(run_folder, tmp_path):
    """Each process takes half of every batch; the weights are those of one process alone."""
    folders = tmp_path / "alone", tmp_path / "together"
    options = ["--pictures", "32", "--steps", "3", "--batch", "4"]
    for folder, processes in zip(folders, ("1", "2"), strict=True):
        run = [sys.executable, "-m", "ldm", "train", "checker", "--run", folder, "--processes", processes, *options]
        done = subprocess.run(run, cwd=tmp_path, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        assert len((folder / "checker" / "log.jsonl").read_text().splitlines()) == 1  # one reports
    alone, together = (load_file(folder / "checker" / "checker.safetensors") for folder in folders)
    for name, tensor in alone.items():
        assert torch.allclose(tensor, together[name], atol=1e-5), name


SHARED_GRADIENT = """
import torch
from ldm.train import parallel
parallel.start("cpu")
p, unused = torch.nn.Parameter(torch.zeros(3)), torch.nn.Parameter(torch.zeros(1))
rows = torch.arange(12.0).view(4, 3)[parallel.share(4)]
(rows @ p).mean().backward()
parallel.average_gradients([p, unused])
seen = parallel.any_of_us(parallel.rank() == 1), parallel.any_of_us(False)
print(len(rows), p.grad.tolist(), unused.grad, *seen, parallel.leads())
try:
    parallel.share(3)
except Exception as error:
    print(error)
"""


def test_gradients_are_averaged_over_processes(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(SHARED_GRADIENT)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    group = os.environ | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    running = [
        subprocess.Popen(
            [sys.executable, program], env=group | {"RANK": rank, "LOCAL_RANK": rank}, text=True, stdout=-1
        )
        for rank in "01"
    ]
    for child, leads in zip(running, (True, False), strict=True):
        said = child.communicate(timeout=120)[0].splitlines()
        assert said[0] == f"2 [4.5, 5.5, 6.5] None True False {leads}"  # the mean of all four rows
        assert said[1] == "A batch of 3 cannot be shared by 2 processes: choose a multiple of 2."


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_several_processes_stop_together_and_save(run_folder, tmp_path, signum):
    folder = fresh(run_folder, tmp_path)
    pictures(folder / "data", 32)
    run = [sys.executable, "-m", "ldm", "train", "checker", "--run", folder, "--processes", "2", "--pictures", "32"]
    log = folder / "checker" / "log.jsonl"
    with subprocess.Popen([*run, "--steps", "100000", "--batch", "2"], cwd=tmp_path, stderr=-1, text=True) as parent:
        for _ in range(1200):
            if log.exists():
                break
            time.sleep(0.1)
        parent.send_signal(signum)
        said = parent.communicate(timeout=120)[1]
    assert parent.returncode == 130 and "Stopped in checker" in said
    assert torch.load(folder / "checker" / "state.pt", weights_only=True)["step"] >= 10
