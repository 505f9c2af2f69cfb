"""How near pictures come to a condition: the measures by closed forms, and that the embedded ControlNets lead."""

import inspect
import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

import ldm
from ldm import conditions, loading, scenes
from ldm.checkpoints.places import embedded
from ldm.cli import main
from ldm.control import Control
from ldm.errors import LDMError
from ldm.io.folders import read_json
from ldm.io.weights import save_weights
from ldm.metrics import control
from ldm.metrics.control import Agreement, Judge, correlation, edge_f1, evaluate_control, load_depth_reader, report
from ldm.metrics.depth_reader import DepthReader
from ldm.metrics.evaluation import QUESTIONS, held_out, load_checker
from ldm.train.controlnet import condition_of

SIDE = 128

# ---------------------------------------------------------------------------------------------- edges


def lines(*columns, rows=slice(None), side=32):
    """Vertical lines, (1, H, W) of bool."""
    found = torch.zeros(1, side, side, dtype=torch.bool)
    for column in columns:
        found[0, rows, column] = True
    return found


@pytest.mark.parametrize(
    "found, wanted, f1",
    [
        (lines(9), lines(9), 1.0),
        (lines(10), lines(9), 1.0),  # within a pixel
        (lines(8), lines(9), 1.0),
        (lines(11), lines(9), 0.0),
        (lines(12), lines(9), 0.0),
        (lines(9, rows=slice(0, 1)), lines(10, rows=slice(1, 2)), 1.0),  # across a corner
        (lines(9), lines(9, 20), 2 / 3),  # half the edges: precision 1, recall 1/2
        (lines(9, 20), lines(9), 2 / 3),  # and the other way round
        (lines(9, 20, 25), lines(9), 1 / 2),
        (lines(9, 25), lines(9, 20), 1 / 2),
        (lines(9, rows=slice(0, 8)), lines(9), 2 * (9 / 32) / (1 + 9 / 32)),  # the ninth row is near the eighth
        (lines(), lines(), 1.0),  # two empty maps agree
        (lines(), lines(9), 0.0),
        (lines(9), lines(), 0.0),
        (lines(0), lines(31), 0.0),  # nothing wraps around
    ],
)
def test_f1_of_edges_by_closed_forms(found, wanted, f1):
    assert edge_f1(found, wanted).tolist() == [pytest.approx(f1, abs=1e-6)]


@pytest.mark.parametrize("reach", [0, 1, 2])
def test_f1_of_edges_counts_what_loops_count(reach):
    rng = torch.Generator().manual_seed(0)
    found, wanted = (torch.rand(3, 12, 17, generator=rng) < share for share in (0.05, 0.03))

    def near(point, points):
        return any(max(abs(point[0] - y), abs(point[1] - x)) <= reach for y, x in points)

    for k, f1 in enumerate(edge_f1(found, wanted, reach).tolist()):
        a, b = found[k].nonzero().tolist(), wanted[k].nonzero().tolist()
        precision, recall = np.mean([near(p, b) for p in a]), np.mean([near(p, a) for p in b])
        by_hand = 2 * precision * recall / (precision + recall) if precision + recall else 0
        assert a and b and f1 == pytest.approx(by_hand, abs=1e-6)


def test_edges_of_pictures_are_cannys():
    image = Image.fromarray(scenes.render(held_out(1)[0]).image)
    found = control.edges_of([image, image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)])
    assert found.dtype == torch.bool and found.shape == (2, SIDE, SIDE) and 0.005 < found.float().mean() < 0.5
    assert np.array_equal(found[0].numpy(), np.asarray(conditions.canny(image))[..., 0] == 255)
    assert not torch.equal(found[0], found[1])


# ---------------------------------------------------------------------------------------------- depth


def test_correlation_is_numpys():
    rng = torch.Generator().manual_seed(0)
    a, noise = torch.rand(3, 8, 9, generator=rng), torch.rand(3, 8, 9, generator=rng)
    b = torch.stack([a[0], 1 - 0.5 * a[1], a[2] + noise[2]])
    found = correlation(a, b).tolist()
    assert found == [
        pytest.approx(np.corrcoef(x.numpy().ravel(), y.numpy().ravel())[0, 1]) for x, y in zip(a, b, strict=True)
    ]
    assert found[:2] == [pytest.approx(1), pytest.approx(-1)] and 0.5 < found[2] < 0.9
    assert correlation(a[:1], torch.full((1, 8, 9), 0.5)).tolist() == [pytest.approx(0, abs=1e-6)]


@pytest.mark.parametrize("size", [(1, 16, 16), (2, 32, 48), (1, 128, 128)])
def test_the_depth_reader_tells_a_depth_for_every_pixel(size):
    torch.manual_seed(0)
    reader, (batch, height, width) = DepthReader(), size
    depth = reader(torch.rand(batch, 3, height, width) * 2 - 1)
    assert depth.shape == size and 0 < depth.min() < depth.max() < 1
    depth.square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in reader.parameters())


def test_the_depth_reader_sees_where_a_thing_is():
    """A change in one corner of the picture changes the depth there most, and each picture of a batch by itself."""
    torch.manual_seed(0)
    reader = DepthReader().eval()
    x = torch.zeros(2, 3, 64, 64)
    x[1, :, :16, :16] = 1
    with torch.no_grad():
        both, alone = reader(x), reader(x[1:])
    apart = (both[1] - both[0]).abs()
    assert apart[:16, :16].mean() > 2 * apart[48:, 48:].mean() and torch.allclose(both[1:], alone, atol=1e-6)


def test_a_model_without_a_depth_reader_is_told_so(tmp_path):
    with pytest.raises(LDMError, match=r"There is no depth reader for .*mine: .*mine-depth-extras/.*missing"):
        load_depth_reader(tmp_path / "mine")
    with pytest.raises(LDMError, match="only it can tell depth"):
        Judge("depth", tmp_path / "mine")
    Judge("canny", tmp_path / "mine")  # edges need none


def test_the_depth_reader_beside_a_model_is_read(tmp_path):
    torch.manual_seed(0)
    reader = DepthReader()
    folder = tmp_path / "mine-depth-extras"
    folder.mkdir(parents=True)
    save_weights(reader.state_dict(), folder / "depth_reader.safetensors")
    found = load_depth_reader(tmp_path / "mine")
    assert all(torch.equal(a, b) for a, b in zip(reader.parameters(), found.parameters(), strict=True))


# ---------------------------------------------------------------------------------------------- judging


@pytest.fixture(scope="module")
def true():
    """Three held-out scenes as pictures."""
    return [scenes.render(scene) for scene in held_out(3)]


def shown(pictures):
    return [Image.fromarray(picture.image) for picture in pictures]


def test_true_pictures_have_the_edges_that_are_asked_of_them(true):
    judges, found, others = Judge("canny", None), Agreement(), Agreement()
    wanted = [condition_of(judges.kind, picture.scene, picture.image) for picture in true]
    assert wanted[0].tobytes() == conditions.canny(Image.fromarray(true[0].image)).tobytes()
    judges(shown(true), wanted, found)
    judges(shown([*true[1:], true[0]]), wanted, others)
    assert found.scores == [1.0] * 3 and found.score == 1.0 and found.errors == [] and max(others.scores) < 0.6
    judges(shown(true[:1]), wanted[:1], found)
    assert found.scores == [1.0] * 4  # batch after batch


def test_depth_is_judged_by_what_the_reader_tells(true, monkeypatch):
    seen = []

    def reader(x):
        seen.append(x)
        depth = torch.stack([torch.from_numpy(picture.depth) for picture in true])
        return torch.stack([depth[0], 0.5 * depth[1], 1 - depth[2]])

    monkeypatch.setattr(control, "load_depth_reader", lambda model: reader)
    judges, found = Judge("depth", None), Agreement()
    wanted = [condition_of(judges.kind, picture.scene, picture.image) for picture in true]
    assert wanted[0].tobytes() == conditions.depth_picture(true[0].depth).tobytes()
    judges(shown(true), wanted, found)
    assert found.scores == [pytest.approx(1, abs=1e-4), pytest.approx(1, abs=1e-4), pytest.approx(-1, abs=1e-4)]
    assert found.errors[0] == pytest.approx(0, abs=2e-3)  # grey levels are whole
    assert found.errors[1] == pytest.approx(0.5 * true[1].depth.mean(), abs=2e-3)
    assert found.score == pytest.approx(1 / 3, abs=1e-4) and found.error == pytest.approx(np.mean(found.errors))
    assert torch.equal(seen[0][0], torch.from_numpy(true[0].image.copy()).permute(2, 0, 1) / 255 * 2 - 1)


class Stub:
    """A pipeline that draws, led by a ControlNet, the true scene, and without one a grey surface."""

    folder, device, dtype = None, torch.device("cpu"), torch.float32

    def __init__(self, of):
        self.scenes, self.calls, self.vae = held_out(of), [], SimpleNamespace(encode=lambda x: x)

    def decode(self, x):
        return [Image.fromarray(((each.permute(1, 2, 0) + 1) * 127.5).round().byte().numpy()) for each in x]

    def __call__(self, words, *, seed, control=(), **options):
        self.calls.append((words, seed, [each.scale for each in control], options))
        count = 1 if isinstance(words, str) else len(words)
        right = shown(scenes.render(scene) for scene in self.scenes[seed : seed + count])
        if control:
            seen = control[0].picture if isinstance(control[0].picture, list) else [control[0].picture]
            assert [each.tobytes() for each in seen] == [conditions.canny(picture).tobytes() for picture in right]
        return SimpleNamespace(images=right if control else [Image.new("RGB", (SIDE, SIDE), "grey")] * count)


@pytest.fixture(scope="module")
def canny_net():
    return loading.load_controlnet("scenes-canny", loading.load("scenes"))


def test_with_and_without_are_of_the_same_words_and_seeds(canny_net, monkeypatch):
    stub, read = Stub(5), []
    monkeypatch.setattr(
        control, "judge", lambda checker, part, images: read.append((checker, part, images)) or [{}] * len(part)
    )
    found = evaluate_control(stub, canny_net, "canny", "the checker", 5, batch=2, steps=7, guidance=3.0)
    assert list(found) == ["true", "rebuilt", "without", "with"]
    scores = {name: agreement.scores for name, agreement in found.items()}
    assert scores == {"true": [1.0] * 5, "rebuilt": [1.0] * 5, "without": [0.0] * 5, "with": [1.0] * 5}
    captions = [scenes.caption(scene, scene.seed, full=True) for scene in held_out(5)]
    options = {"steps": 7, "guidance": 3.0}
    assert stub.calls == [
        (captions[first : first + 2], first, scales, options) for first in (0, 2, 4) for scales in ([], [1.0])
    ]
    assert [len(part) for _, part, _ in read] == [2] * 8 + [1] * 4 and {each[0] for each in read} == {"the checker"}
    assert [scene for _, part, _ in read[::4] for scene in part] == held_out(5)
    assert torch.equal(read[0][2], read[3][2]) and (read[2][2] - 1 / 255).abs().max() < 1e-2  # what is drawn is read
    assert all(len(agreement.verdicts) == 5 for agreement in found.values())


def test_the_table_that_is_printed():
    yes, no = ({question: [answer] for question in QUESTIONS} for answer in (True, False))
    found = {
        "true": Agreement([1.0, 1.0], [0.0, 0.01], [yes, yes]),
        "with": Agreement([0.5, 0.8], [0.1, 0.2], [yes, no]),
    }
    for kind, head in (
        ("canny", ["edge F1, within a pixel          1.000     0.650"]),
        (
            "depth",
            ["depth, correlation               1.000     0.650", "depth, mean error of 0 to 1      0.005     0.150"],
        ),
    ):
        rows = report(kind, found).splitlines()
        assert rows[0].split() == ["2", "pictures", "true", "with"] and rows[1 : 1 + len(head)] == head
        table, spread = rows[: 1 + len(head) + len(QUESTIONS)], rows[1 + len(head) + len(QUESTIONS) :]
        assert [re.split(r"  +", row) for row in table[1 + len(head) :]] == [
            [q, "100.0 %", "50.0 %"] for q in QUESTIONS
        ]
        assert len({len(row) for row in table}) == 1  # in columns
        assert spread[0] == "drawn with it, with 95 % intervals:" and len(spread) == 1 + len(QUESTIONS)
        assert spread[1].split() == ["time", "50.0", "%", "(9.5", "to", "90.5,", "n", "=", "2)"]
    assert np.isnan(Agreement().score) and np.isnan(Agreement().error)


def test_the_grid_has_the_condition_and_a_picture_at_every_scale(true, canny_net):
    class Coloured(Stub):
        def __call__(self, words, *, seed, control=(), **options):
            super().__call__(words, seed=seed, control=control, **options)
            return SimpleNamespace(images=[Image.new("RGB", (SIDE, SIDE), (int(100 * control[0].scale), seed, 7))])

    stub = Coloured(3)
    grid = control.scale_grid(stub, canny_net, "canny", rows=3, steps=2)
    assert grid.size == (SIDE * (1 + len(control.SCALES)), SIDE * 3) and control.SCALES[0] == 0
    tiles = np.asarray(grid).reshape(3, SIDE, -1, SIDE, 3).swapaxes(1, 2)  # (row, column, H, W, 3)
    for row, picture in enumerate(true):
        assert np.array_equal(tiles[row, 0], np.asarray(conditions.canny(Image.fromarray(picture.image))))
        for column, scale in enumerate(control.SCALES, 1):
            assert (tiles[row, column] == (int(100 * scale), row, 7)).all()
    assert all(options == {"steps": 2} for *_, options in stub.calls)


# ---------------------------------------------------------------------------------------------- the command


def test_the_command_measures_prints_and_draws_a_grid(tmp_path, monkeypatch, capsys):
    calls = []
    table = {"with": Agreement([0.5], [], [{question: [True] for question in QUESTIONS}])}

    def measured(pipe, net, kind, checker, count, batch, **options):
        calls.append((type(net).__name__, kind, type(checker).__name__, count, batch, options))
        return table

    monkeypatch.setattr(control, "evaluate_control", measured)
    monkeypatch.setattr(control, "scale_grid", lambda *rest, **options: Image.new("RGB", (8, 8), "red"))
    monkeypatch.chdir(tmp_path)
    words = ["evaluate", "--control", "canny", "--count", "3", "--batch", "2", "--steps", "4", "--guidance", "2"]
    assert main([*words, "--grid", "grid.png"]) == 0
    out = capsys.readouterr().out
    assert calls == [("ControlNet", "canny", "Checker", 3, 2, {"steps": 4, "guidance": 2.0})]
    assert out == report("canny", table) + "\ngrid.png\n"
    with Image.open("grid.png") as grid:
        assert grid.size == (8, 8) and "scales 0, 0.25" in json.loads(grid.text["ldm"])["shows"]
    assert main([*words, "--grid", "grid.png"]) == 0  # a grid of ours is replaced
    Image.new("RGB", (4, 4)).save("photo.png")
    assert main([*words, "--grid", "photo.png"]) == 1
    assert "photo.png is there already and is no such sheet" in capsys.readouterr().err and len(calls) == 2


@pytest.mark.parametrize(
    "words, status, sentence",
    [
        (["--net", "x"], 1, "--net and --grid are about a ControlNet: say which, --control canny or"),
        (["--grid", "g.png"], 1, "--net and --grid are about a ControlNet"),
        (["--control", "canny", "--out", "o"], 1, "--out keeps the pictures of an evaluation without --control"),
        (["--control", "canny", "--net", "nowhere"], 1, "There is no model 'nowhere'"),
        (["--control", "canny", "--grid", "g.jpg"], 1, "only PNG"),
        (["--control", "edges"], 2, "--control must be canny or depth, not 'edges'"),
    ],
)
def test_what_the_command_refuses(tmp_path, monkeypatch, capsys, words, status, sentence):
    monkeypatch.chdir(tmp_path)
    assert main(["evaluate", *words]) == status
    err = capsys.readouterr().err
    assert err.startswith("ldm: ") and sentence in err and err.count("\n") == 1 and not list(tmp_path.iterdir())


# ---------------------------------------------------------------------------------------------- what travels along

LED = {"canny": 0.2, "depth": 0.04}  # by how much the mean score with the net is to exceed the one without


def folder_of(kind):
    folder = embedded().get("scenes").parent / f"scenes-{kind}"
    if not folder.is_dir():
        pytest.skip(f"weights/scenes-{kind} isn't there yet")
    return folder


every_net = pytest.mark.parametrize("kind", LED)


@every_net
def test_an_embedded_controlnet_is_small_and_has_no_strange_fields(kind):
    folder = folder_of(kind)
    files = sorted(folder.glob("*.safetensors"))
    assert [file.name for file in files] == ["diffusion_pytorch_model.safetensors"]
    assert files[0].stat().st_size <= 6e6
    with safe_open(files[0], "pt") as tensors:
        assert {tensors.get_slice(name).get_dtype() for name in tensors.keys()} == {"F16"}
    net = loading.load_controlnet(f"scenes-{kind}", loading.load("scenes"))
    assert read_json(folder / "config.json") == json.loads(json.dumps(net.config.to_json()))


@every_net
def test_an_embedded_controlnet_is_the_same_network_in_diffusers(kind):
    from diffusers import ControlNetModel

    folder, pipe = folder_of(kind), loading.load("scenes")
    net = loading.load_controlnet(f"scenes-{kind}", pipe)
    theirs, told = ControlNetModel.from_pretrained(folder, torch_dtype=torch.float32, output_loading_info=True)
    assert not any(told.values())
    known = {"_class_name", *inspect.signature(ControlNetModel.__init__).parameters}
    assert set(read_json(folder / "config.json")) <= known
    rng = torch.Generator().manual_seed(0)
    x, context = torch.randn(2, 4, 16, 16, generator=rng), pipe.encode(["", "a large red house on snow at night"])
    pictures = [scenes.render(scene) for scene in held_out(2)]
    seen = [condition_of(kind, p.scene, p.image) for p in pictures]
    seen = torch.cat([conditions.to_tensor(each) for each in seen])
    t = torch.tensor([981.0, 40.0])
    with torch.no_grad():
        skips, middle = net(x, t, context, net.condition(seen))
        wanted = theirs(x, t, encoder_hidden_states=context, controlnet_cond=seen, return_dict=False)
    assert len(skips) == len(wanted[0])
    for ours, other in zip([*skips, middle], [*wanted[0], wanted[1]], strict=True):
        assert other.abs().max() > 0.01 and (ours - other).abs().max() <= 1e-5 * max(1, other.abs().max())


@every_net
def test_an_embedded_controlnet_leads(kind):
    folder_of(kind)
    pipe = loading.load("scenes")
    if kind == "depth" and not pipe.folder.with_name("scenes-depth-extras").is_dir():
        pytest.skip("weights/scenes-depth-extras isn't there")
    net = loading.load_controlnet(f"scenes-{kind}", pipe)
    found = evaluate_control(pipe, net, kind, load_checker(pipe.folder), 3, batch=3, steps=12)
    scores = {name: round(agreement.score, 3) for name, agreement in found.items()}
    assert scores["with"] > scores["without"] + LED[kind], scores
    assert scores["true"] >= scores["rebuilt"] > scores["without"], scores
    if kind == "canny":
        assert found["true"].scores == [1.0] * 3
    else:
        assert scores["true"] > 0.9 and found["with"].error < found["without"].error
    words = scenes.caption(held_out(1)[0], held_out(1)[0].seed, full=True)  # scale 0 is no net at all
    seen = conditions.canny(Image.fromarray(scenes.render(held_out(1)[0]).image))
    idle = pipe(words, steps=2, control=[Control(net, seen, scale=0.0)]).images[0]
    assert idle.tobytes() == pipe(words, steps=2).images[0].tobytes()


def test_the_embedded_depth_reader_reads_true_pictures():
    model = ldm.load("scenes").folder
    if not model.with_name("scenes-depth-extras").is_dir():
        pytest.skip("weights/scenes-depth-extras isn't there")
    judges, found = Judge("depth", model), Agreement()
    pictures = [scenes.render(scene) for scene in held_out(8)]
    judges(shown(pictures), [condition_of(judges.kind, picture.scene, picture.image) for picture in pictures], found)
    assert found.score > 0.95 and found.error < 0.05, (found.score, found.error)
