"""`ldm parity` against diffusers: equal where both are, and what is planted in ours is found, refused or named.

Tiny architectures with every parameter drawn, and folders that diffusers has written. Ports are in
`test_parity_ports.py`.
"""

import json
import math
import re

import pytest
import torch
import torch.nn.functional as F
from test_clip import PUBLISHED_TEXT
from test_independence import BLOCK, NOTHING_CAME_IN, python
from test_unet import PUBLISHED as UNETS
from test_vae import PUBLISHED as VAES
from torch import nn

from ldm.checkpoints.architectures import ARCHITECTURES
from ldm.cli import main
from ldm.models import blocks, vae
from ldm.models.unet import UNet, UNetConfig
from ldm.models.vae import VAE, VAEConfig
from ldm.noise import Noise
from ldm.parity import opening, timing, walk
from ldm.parity.compare import held, rms, same_layout
from ldm.parity.drawn import draw, widened
from ldm.parity.inputs import AWKWARD
from ldm.parity.schedulers import THEIRS
from ldm.samplers import SAMPLERS
from ldm.text.clip import TextConfig

CPU, F64 = torch.device("cpu"), torch.float64
NETWORKS = ("--only", "weights,text,vae,unet,controlnet")
TINY = ["tiny-sd15-inpaint", "tiny-sd15-controlnet", "tiny-sd21", "tiny-sdxl-controlnet", "tiny-refiner"]
FF = "down_blocks.0.attentions.0.transformer_blocks.0.ff.net.0"
TITLES = {"text_encoder": "text encoder", "text_encoder_2": "text encoder 2"}


@pytest.fixture
def parity(tmp_path, capsys, monkeypatch):
    """Walk; status, report and what was printed. Nothing is run twice for its time."""
    monkeypatch.setattr(timing, "DEAR", 0.0)

    def run(*words):
        path = tmp_path / "report.json"
        status = main(["parity", *words, "--json", str(path)])
        out, err = capsys.readouterr()
        return status, json.loads(path.read_text()) if path.exists() else None, out + err

    return run


def by_station(report):
    found = {}
    for line in report["lines"]:
        found.setdefault(line["station"], set()).add(line["verdict"])
    return found


# ---------------------------------------------------------------------------------------------------------- equal


def test_both_sides_of_a_folder_are_equal_in_float64(models, parity):
    """Every station of the road; each side has read the folder itself."""
    name = "sd1"
    status, report, out = parity(str(models.folder(name)), "--dtype", "float64", "--size", "32x48")
    stations = ("weights", "tokenizer", "text encoder", "VAE encode", "VAE decode", "UNet", "samplers")
    pictures = ("drawn from words", "drawn from a picture", "inpainted")
    assert status == 0 and by_station(report) == {each: {"equal"} for each in (*stations, *pictures)}
    assert f"are equal on {name}, float64" in out and report["equal"]
    lines = {(line["station"], line["what"]): line for line in report["lines"]}
    assert [what for station, what in lines if station == "samplers"] == list(SAMPLERS)
    for (station, what), line in lines.items():
        assert line["relative"] <= line["allowed"] <= (1e-9 if what == "ddpm" else 1e-10), (station, what)
        if station in stations[2:6]:
            assert line["relative"] <= 1e-13 and line["allowed"] == 1e-11
        if station != "weights":
            assert line["ours_ms"] > 0 and line["theirs_ms"] > 0 and what in out
        else:
            assert "shared" not in line["note"]


@pytest.mark.parametrize("name", TINY)
def test_tiny_architectures_with_random_weights_are_equal_in_float64(parity, name):
    only = "weights,tokenizer,text,vae,unet,controlnet,pipelines"
    status, report, out = parity("--random-init", name, "--dtype", "float64", "--only", only, "--size", "64x64")
    assert status == 0, out
    found = by_station(report)
    for part in ARCHITECTURES[name].parts:
        assert part == "vae" or {"unet": "UNet", "controlnet": "ControlNet", **TITLES}[part] in found
        (line,) = [line for line in report["lines"] if line["what"].startswith(f"{part}: ")]
        assert line["note"] == f"{line['what'].split()[-2]} shared"
    assert ("led by a ControlNet" in found) == name.endswith("controlnet")
    assert ("drawn from words" in found) == (name not in ("tiny-refiner", "tiny-sd15-inpaint"))
    assert ("drawn from a picture" in found) == (name != "tiny-sd15-inpaint")


def test_float32_and_half_precision_are_equal_by_their_own_bounds(parity):
    status, report, _ = parity("--random-init", "tiny-sd15", *NETWORKS)
    assert status == 0 and {line["allowed"] for line in report["lines"]} == {0.0, 1e-5, 3e-5}
    assert report["about"]["dtype"] == "float32"
    for dtype, only, count in (("float16", "text,unet", 4), ("bfloat16", "text,vae,unet,pipelines", 12)):
        words = ("--random-init", "tiny-sd15", "--dtype", dtype, "--only", only, "--size", "64x32")
        status, report, out = parity(*words)
        assert status == 0, out
        half = [line for line in report["lines"] if "against float32; theirs" in line["note"]]
        assert len(half) == count and all(1e-5 < line["relative"] < 0.1 for line in half)


def test_a_controlnet_s_folder_goes_with_its_model(parity):
    status, report, out = parity("scenes", "--controlnet", "scenes-canny", "--only", "controlnet", "--size", "64x64")
    assert status == 0 and by_station(report) == {"ControlNet": {"equal"}}, out


# --------------------------------------------------------------------------------------------------- random weights


def test_both_sides_share_one_set_of_weights():
    """The same storage, so that a model exists once; and every number of it is drawn."""
    ours, theirs = opening.of_architecture("tiny-sdxl-controlnet", F64, CPU)
    for name, part in ours.parts.items():
        other = theirs.parts[name]
        state = {other.rename(key): tensor for key, tensor in other.module.state_dict().items()}
        mine = part.module.state_dict()
        assert mine.keys() == state.keys()
        for key, tensor in mine.items():
            assert tensor.data_ptr() == state[key].data_ptr(), (name, key)
            assert tensor.dtype == F64 and (tensor.numel() == 1 or tensor.std() > 0.01), (name, key)
    assert not any(p.requires_grad for p in theirs.parts["unet"].module.parameters())
    first, second = ours.own[0].tokenizer, ours.own[0].tokenizer_2
    assert first.pad_id == first.eos_id and second.pad_id == second.ids["!"] != second.eos_id
    for name, prompts in (("tokenizer", ["a house"]), ("tokenizer_2", ["a house"])):
        assert ours.tokenizers[name](prompts)[0, -1] == {"tokenizer": first, "tokenizer_2": second}[name].pad_id


def test_what_is_drawn_hides_nothing():
    """Weights at fan-in scale, gains about 1, biases about 0; another seed, other numbers."""
    with torch.device("meta"):
        module = nn.ModuleDict({"norm": nn.GroupNorm(4, 4000), "conv": nn.Conv2d(40, 50, 3), "zero": nn.Linear(90, 80)})
    state = draw(module, torch.float32, CPU, seed=0)
    assert state["norm.weight"].mean() == pytest.approx(1, abs=0.05) and state["norm.weight"].std() > 0.25
    assert state["norm.bias"].std() == pytest.approx(0.3, abs=0.05)
    assert state["conv.weight"].std() == pytest.approx((40 * 9) ** -0.5, rel=0.05)
    assert state["zero.weight"].std() == pytest.approx(90**-0.5, rel=0.05) and state["zero.bias"].std() > 0.2
    assert not torch.equal(draw(module, torch.float32, CPU, seed=1)["conv.weight"], state["conv.weight"])
    assert draw(module, torch.bfloat16, CPU, seed=0)["conv.weight"].dtype == torch.bfloat16


@pytest.mark.parametrize("at_once", [10**9, 0])
def test_a_widened_module_calculates_in_float32_and_is_itself_again(at_once):
    """All at once, and layer by layer (where small layers are widened at once all the same)."""
    g = torch.Generator().manual_seed(0)
    module = nn.Sequential(nn.Linear(8, 400), nn.Tanh(), nn.Linear(400, 400)).to(torch.bfloat16)
    before = {name: (p, p.data_ptr()) for name, p in module.named_parameters()}
    x = torch.randn(3, 8, generator=g).to(torch.bfloat16)
    with torch.no_grad(), widened(module, at_once=at_once):
        assert next(module.parameters()).dtype == torch.float32
        assert (module[2].weight.dtype == torch.float32) == (at_once > 0)
        found = module(x.float())
        assert (module[2].weight.dtype == torch.float32) == (at_once > 0)
        expected = F.linear(F.linear(x.float(), *(p.float() for p in module[0].parameters())).tanh(),
                            *(p.float() for p in module[2].parameters()))  # fmt: skip
    assert found.dtype == torch.float32 and (found - expected).abs().max() < 1e-6 < found.abs().mean()
    assert {name: (p, p.data_ptr()) for name, p in module.named_parameters()}.keys() == before.keys()
    assert all(p is before[name][0] and p.data_ptr() == before[name][1] for name, p in module.named_parameters())
    assert module(x).dtype == torch.bfloat16


def test_the_published_architectures_are_those_of_the_other_tests():
    base = "stabilityai/stable-diffusion-"
    unets = {"sd15": "runwayml/stable-diffusion-v1-5", "sd21": f"{base}2-1", "sdxl": f"{base}xl-base-1.0"}
    for name, published in unets.items():
        parts, config = ARCHITECTURES[name].parts, UNetConfig.from_json(UNETS[published])
        mine = UNetConfig.from_json(parts["unet"])
        assert mine == UNetConfig(**vars(config) | {"upcast_attention": mine.upcast_attention})
    assert VAEConfig.from_json(ARCHITECTURES["sd15"].parts["vae"]) == VAEConfig.from_json(VAES[unets["sd15"]])
    assert VAEConfig.from_json(ARCHITECTURES["sdxl"].parts["vae"]) == VAEConfig.from_json(VAES[unets["sdxl"]])
    texts = {"sd15": ("text_encoder", "runwayml/stable-diffusion-v1-5 text_encoder"),
             "sd21": ("text_encoder", f"{base}2-1 text_encoder"),
             "sdxl": ("text_encoder_2", f"{base}xl-base-1.0 text_encoder_2")}  # fmt: skip
    for name, (part, published) in texts.items():
        mine, theirs = (TextConfig.from_json(f) for f in (ARCHITECTURES[name].parts[part], PUBLISHED_TEXT[published]))
        assert mine == theirs
    for name, billions in (("sdxl", 2.567), ("sd15", 0.860), ("sdxl-refiner", 2.257)):  # as published
        with torch.device("meta"):
            unet = UNet(UNetConfig.from_json(ARCHITECTURES[name].parts["unet"]))
        assert sum(p.numel() for p in unet.parameters()) / 1e9 == pytest.approx(billions, abs=0.01)


# ------------------------------------------------------------------------------------------ not to be fooled


def test_a_reference_that_proves_nothing_is_refused():
    x = torch.randn(4, 5, generator=torch.Generator().manual_seed(0), dtype=F64)
    for reference, why in (
        (torch.zeros_like(x), "all but zero"),
        (1e-9 * x, "all but zero"),
        (torch.full_like(x, 3.0), "one number everywhere"),
        (x.masked_fill(x > 1, math.nan), "isn't finite"),
        (torch.zeros(0, dtype=F64), "is empty"),
        (torch.zeros(3, dtype=torch.int64), "one number everywhere"),
    ):
        line = held("UNet", "output", reference.clone(), reference)
        assert line.verdict == "refused" and why in line.note
    assert held("UNet", "output", x.clone(), x).verdict == "equal"
    assert held("UNet", "output", x.bfloat16(), x.bfloat16(), truth=torch.zeros(4, 5)).verdict == "refused"


def test_differences_of_every_kind_are_seen():
    x = torch.randn(4, 5, generator=torch.Generator().manual_seed(0), dtype=F64)
    largest = x.abs().max().item()
    for other, why in ((x[:, :4], "shape (4, 4)"), (x.float(), "dtype float32"), (x.masked_fill(x > 1, math.nan), "")):
        line = held("UNet", "output", other, x)
        assert line.verdict == "differs" and why in line.note
    off = x.clone()
    off[2, 3] += 0.9e-11 * largest
    assert held("UNet", "output", off, x).verdict == "equal"
    off[2, 3] += 0.2e-11 * largest
    line = held("UNet", "output", off, x)
    assert line.verdict == "differs" and line.relative == pytest.approx(1.1e-11, rel=0.01)
    assert held("UNet", "output", x.float() + 0.9e-5 * largest, x.float()).verdict == "equal"
    for sign in (-1, 1):
        assert held("UNet", "output", x.float() + sign * 1.1e-5 * largest, x.float()).verdict == "differs"
    ids = torch.tensor([[1, 2, 3]])
    line = held("tokenizer", "ids", torch.tensor([[1, 2, 4]]), ids)
    assert line.verdict == "differs" and line.note == "1 of 3 numbers"


def test_in_half_precision_ours_must_be_as_near_to_float32_as_the_reference():
    truth = torch.randn(40, 50, generator=torch.Generator().manual_seed(0))
    reference = truth.bfloat16()
    assert held("UNet", "output", reference.clone(), reference, truth=truth).verdict == "equal"
    worse = (truth + 0.003 * truth.roll(1)).bfloat16()
    line = held("UNet", "output", worse, reference, truth=truth)
    assert line.verdict == "differs" and line.relative == pytest.approx(rms(worse, truth)) and line.relative > 1.2e-3
    assert line.allowed == pytest.approx(1.05 * rms(reference, truth))
    assert held("UNet", "output", worse, reference, truth=truth, slack=9.0).verdict == "equal"


def test_maps_in_other_layouts_are_compared_position_by_position():
    x = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    for other in (x.flatten(2), x.flatten(2).transpose(1, 2)):
        assert all(torch.equal(*pair) for pair in (same_layout(x, other), same_layout(other, x)))
    assert same_layout(x, x.flatten(2)[:, :2]) is None and same_layout(x, x.transpose(0, 1)) is None


def test_a_network_whose_answer_is_zero_is_refused(parity, monkeypatch):
    """Both sides agree, and it proves nothing."""

    def without_the_last_layer(module, *given):
        state = draw(module, *given)
        return {name: x.zero_() if name.startswith("conv_out.") else x for name, x in state.items()}

    monkeypatch.setattr("ldm.parity.reference.draw", without_the_last_layer)
    status, report, out = parity("--random-init", "tiny-sd15", "--only", "unet")
    assert status == 1 and report["lines"][0]["verdict"] == "refused"
    assert "all but zero" in out and "UNet output proves nothing" in out


# ------------------------------------------------------------------------------------ what is planted in ours


def plant_geglu(monkeypatch):
    def forward(self, x):
        h, gate = self.proj(x).chunk(2, dim=-1)
        return h * F.gelu(gate, approximate="tanh")

    monkeypatch.setattr(blocks.GEGLU, "forward", forward)


def plant_eps(monkeypatch):
    init = blocks.SpatialTransformer.__init__

    def other(self, *given, **named):
        init(self, *given, **named)
        self.norm.eps = 1e-5

    monkeypatch.setattr(blocks.SpatialTransformer, "__init__", other)


def plant_scaling(monkeypatch):
    monkeypatch.setattr(VAE, "decode", lambda self, x0: self.reconstruct(x0 * self.config.scaling_factor))


@pytest.mark.parametrize(
    "plant, dtype, only, place, cause",
    [
        (plant_geglu, "float64", "unet", FF, "with GELU (erf), ours agrees"),
        (plant_geglu, "float32", "unet", FF, "with GELU (erf), ours agrees"),
        (plant_eps, "float64", "unet", "down_blocks.0.attentions.0.norm", "with eps 1e-06 instead of 1e-05"),
        (plant_scaling, "float64", "vae", "", "its input is 30.1399 times ours"),
        (plant_scaling, "float32", "vae", "", "its input is 30.1399 times ours"),
    ],
)
def test_a_mistake_of_ours_is_found_with_its_cause(parity, monkeypatch, plant, dtype, only, place, cause):
    """Also in float32, where a light network is walked in float64 all the same."""
    plant(monkeypatch)
    status, report, out = parity("--random-init", "tiny-sd15", "--dtype", dtype, "--only", only)
    (found,) = report["divergences"]
    assert status == 1 and found["block"] == place, out
    assert any(each.startswith(cause) for each in found["causes"]), out


def test_a_block_that_differs_is_found_where_the_answer_is_equal(parity, monkeypatch):
    """Of two mistakes that undo each other the network's answer shows nothing."""
    embed, resnet = blocks.TimestepMLP.forward, blocks.ResnetBlock.forward
    monkeypatch.setattr(blocks.TimestepMLP, "forward", lambda self, *given: 2 * embed(self, *given))
    monkeypatch.setattr(
        blocks.ResnetBlock, "forward", lambda self, x, emb=None: resnet(self, x, None if emb is None else emb / 2)
    )
    status, report, out = parity("--random-init", "tiny-sd15", "--only", "unet")
    output, modules = report["lines"]
    assert status == 1 and (output["verdict"], modules["verdict"]) == ("equal", "differs")
    assert modules["what"].startswith("each of ") and modules["relative"] == pytest.approx(1.0)
    assert "largest in time_embedding" in out and report["divergences"][0]["block"] == "time_embedding"


def test_a_walk_that_was_stopped_says_so(parity, monkeypatch, tmp_path):
    """What it has is kept; of what it hasn't nothing is claimed."""
    from ldm.parity import walk

    def stop(each):
        raise KeyboardInterrupt

    monkeypatch.setattr(walk, "samplers", stop)
    page = tmp_path / "report.html"
    words = ("--random-init", "tiny-sd15", "--only", "tokenizer,unet,samplers", "--html", str(page))
    status, report, out = parity(*words)
    assert status == 130 and not report["equal"] and len(report["lines"]) == 3 and "are equal" not in out
    assert report["sentence"].startswith("Stopped after 3 comparisons, which were equal: nothing is said of the rest")
    assert report["sentence"] in page.read_text() and 'class="verdict bad"' in page.read_text()


def test_every_block_is_told_of(parity):
    status, report, _ = parity("--random-init", "tiny-sd15", "--only", "vae,unet", "--dtype", "float64")
    named = [block["name"] for block in report["blocks"]["UNet"]]
    assert status == 0 and list(report["blocks"]) == ["VAE encode", "VAE decode", "UNet"]
    for name in ("conv_in", "down_blocks.0.resnets.0", FF.removesuffix(".net.0"), "mid_block.attentions.0", "conv_out"):
        assert name in named, name
    assert not any(name.endswith(("norm1", "to_q")) for name in named)  # those are counted, and not listed
    for block in report["blocks"]["UNet"]:
        assert 0 <= block["difference"] < 1e-11 and block["ours_ms"] > 0 and block["theirs_ms"] > 0


def test_in_float32_a_light_network_is_walked_in_float64(parity, monkeypatch):
    """There the blocks before the mistake agree to 15 digits, where float32 has seven."""
    init = vae.Decoder.__init__

    def other(self, config):
        init(self, config)
        self.conv_norm_out.eps = 1e-2

    monkeypatch.setattr(vae.Decoder, "__init__", other)
    status, report, out = parity("--random-init", "tiny-sd15", "--only", "vae")
    (found,) = report["divergences"]
    assert status == 1 and found["block"] == "decoder.conv_norm_out" and "with eps 1e-06 instead of 0.01" in out
    before = [each["error"] for each in found["blocks"][: [e["name"] for e in found["blocks"]].index(found["block"])]]
    assert len(before) > 20 and 0 < max(error for error in before if error is not None) < 1e-13


def test_a_sampler_s_mistake_is_a_line_of_its_own(parity, monkeypatch):
    """And the walk goes on after it only if it is told to."""
    method = SAMPLERS["heun"]
    monkeypatch.setitem(SAMPLERS, "heun", method._replace(step=SAMPLERS["euler"].step))
    monkeypatch.setattr("ldm.parity.schedulers.SAMPLERS", {name: SAMPLERS[name] for name in ("ddim", "heun", "lms")})
    words = ("--random-init", "tiny-sd15", "--only", "samplers,pipelines", "--dtype", "float64", "--size", "32x32")
    status, report, out = parity(*words)
    bad = [line["what"] for line in report["lines"] if line["verdict"] != "equal"]
    assert status == 1 and bad == ["heun"] and "samplers heun differs." in out
    assert by_station(report).keys() == {"samplers"}  # it stops there
    _, report, _ = parity(*words, "--keep-going")
    assert by_station(report)["drawn from words"] == {"equal"}


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
def test_other_noise_shows_in_the_pipelines(parity, monkeypatch, dtype):
    """In the latents, and in the pictures."""
    from_seeds = Noise.from_seeds
    monkeypatch.setattr(Noise, "from_seeds", lambda seeds: from_seeds([seed + 1 for seed in seeds]))
    words = ("--random-init", "tiny-sd15", "--only", "pipelines", "--dtype", dtype, "--size", "32x32")
    status, report, _ = parity(*words)
    assert status == 1 and [line["verdict"] for line in report["lines"]] == ["differs", "differs"]
    assert all(line["relative"] > 0.03 for line in report["lines"])


def test_other_weights_are_the_first_thing_said(models, parity, monkeypatch):
    load = opening.load

    def other(*given):
        pipe = load(*given)
        weight = pipe.unet.mid_block.resnets[0].conv1.weight
        weight.data = weight.data + 1e-9
        return pipe

    monkeypatch.setattr(opening, "load", other)
    status, report, out = parity(str(models.folder("sd1")), "--dtype", "float64")
    assert status == 1 and report["lines"][-1]["verdict"] == "differs" and "1 differ, the first is mid_block" in out
    assert report["divergences"][0]["block"] == "mid_block.resnets.0.conv1.weight"


def test_the_prompts_are_those_on_which_tokenizers_part():
    assert "" in AWKWARD and any(len(prompt.split()) >= 200 for prompt in AWKWARD)
    for sign in ("É", "e\u0301", "\u200d", "½", "<|endoftext|>", "\t", "Σ", "'ve", "東"):
        assert any(sign in prompt for prompt in AWKWARD), sign


def test_every_sampler_has_its_class():
    assert THEIRS.keys() == SAMPLERS.keys()
    known = {"weights", "tokenizer", "text", "vae", "unet", "transformer", "controlnet", "samplers", "pipelines"}
    assert set(walk.PARTS) == known


# ---------------------------------------------------------------------------------------------------- reports


def test_the_page_tells_what_the_table_tells(parity, monkeypatch, tmp_path):
    plant_geglu(monkeypatch)
    page = tmp_path / "report.html"
    words = ("--random-init", "tiny-sd15", "--only", "vae,unet", "--dtype", "float64", "--html", str(page))
    words = (*words, "--size", "96x64")
    status, report, out = parity(*words)
    text = page.read_text()
    assert status == 1 and "<script" not in text and "http" not in text.replace("http-equiv", "")
    for word in (
        report["sentence"],
        "ff.net.0",
        "diffusers 0",
        "tiny-sd15",
        "float64",
        "96x64 pixels",
        "seeds",
        "--html",
    ):
        assert word in text or word.replace("'", "&#x27;") in text, word
    for line in report["lines"]:
        assert line["what"] in text and f"{line['relative']:.1e}" in text
    assert text.count("<rect") > 20 and 'class="bar bad"' in text
    lengths = [float(width) for width in re.findall(r'width="([\d.]+)" height="10"', text)]
    assert min(lengths) == 1 and max(lengths) > 400  # blocks that agree, and one that doesn't
    assert text.count("<details>") == 4 and all(each in text for each in report["divergences"][0]["causes"])
    assert "GEGLU" in out and not list(tmp_path.glob(".ldm-tmp*"))
    names = [block["name"] for block in report["divergences"][0]["blocks"]]
    assert names.index("down_blocks.0.resnets.0") < names.index("down_blocks.0.attentions.0") < names.index("conv_out")


def test_numbers_that_json_has_not_are_null(tmp_path, capsys, models):
    port = tmp_path / "port.py"
    answer = "lambda x0: torch.full((2, 3, 64, 64), torch.nan, dtype=dtype)"
    port.write_text(f"import torch\ndef load(folder, device, dtype):\n    return {{'vae_decode': {answer}}}\n")
    path = tmp_path / "report.json"
    words = ["--against", str(port), "--only", "vae", "--json", str(path)]
    assert main(["parity", str(models.folder("sd1")), *words]) == 1
    line = json.loads(path.read_text())["lines"][-1]
    assert line["verdict"] == "differs" and line["relative"] is None
    assert "shows no module of it" in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------------- refusals

WRONG = {
    "nosuch": ["There is no model 'nosuch'"],
    "--random-init sd16": ["no architecture 'sd16'", "Did you mean 'sd15'?"],
    "scenes --random-init sd15": ["leave one of them out"],
    "--random-init sd15 --controlnet scenes-canny": ["brings its own ControlNet"],
    "--random-init sd15 --against other.py": ["no folder that a port could load"],
    "--only unets": ["--only knows no part 'unets'", "Did you mean 'unet'?"],
    "--against other.py": ["there is no file 'other.py'"],
    "--json nowhere/report.json": ["the folder nowhere does not exist"],
    "--device tpu": ["Unknown device 'tpu'"],
    f"{__file__} --only unet": ["is a single file, and the other side reads folders: `ldm convert` makes one of it"],
}


@pytest.mark.parametrize("words", WRONG)
def test_what_cannot_be_compared_is_refused_in_a_sentence(words, capsys):
    assert main(["parity", *words.split()]) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("ldm: ") and err.count("\n") == 1 and all(each in err for each in WRONG[words])


@pytest.mark.parametrize("words", ["--size 100x64", "--size 64", "--dtype float8", "--steps 0", "--threads 0"])
def test_a_wrong_command_line_is_refused(words, capsys):
    assert main(["parity", *words.split()]) == 2
    assert words.split()[0] in capsys.readouterr().err


PORT = """
import ldm

def load(folder, device, dtype):
    pipe = ldm.load(folder, dtype, device)
    return {"vae_decode": pipe.vae.decode, "vae_module": pipe.vae}
"""


def test_without_the_libraries_the_sentence_says_what_to_install_and_ports_are_compared(models, tmp_path):
    (tmp_path / "port.py").write_text(PORT)
    program = f"""{BLOCK}
from ldm.cli import main
assert main(["parity", sys.argv[1], "--only", "vae,samplers", "--against", "port.py"]) == 0
assert main(["parity", sys.argv[1]]) == 1
assert main(["parity", "--random-init", "tiny-sd15"]) == 1
{NOTHING_CAME_IN.replace("print", "sys.stderr.flush(); print")}"""
    out = python(program, models.folder("sd1"), cwd=tmp_path)
    assert "ldm and port.py are equal" in out and out.endswith("done\n")


def test_the_missing_library_is_named(monkeypatch, capsys):
    monkeypatch.setitem(__import__("sys").modules, "diffusers", None)
    assert main(["parity", "--only", "tokenizer"]) == 1
    err = capsys.readouterr().err
    assert "diffusers" in err and 'python -m pip install -c constraints.txt -e ".[test]"' in err and "PORT.py" in err


def test_cheap_runs_are_repeated_and_dear_ones_are_not(monkeypatch):
    count = {"ours": 0, "theirs": 0}

    def run(name):
        count[name] += 1
        return name

    timed = timing.both(lambda: run("ours"), lambda: run("theirs"), CPU)
    assert (timed.ours, timed.theirs) == ("ours", "theirs") and timed.ours_bytes is None
    assert count["ours"] == count["theirs"] == 1 + timing.MOST
    assert not timed.cold
    monkeypatch.setattr(timing, "DEAR", 0.0)
    timed = timing.both(lambda: run("ours"), lambda: run("theirs"), CPU)
    assert timed.cold and count["ours"] == count["theirs"] == 2 + timing.MOST
    line = timed.on(walk.skipped("UNet", "why"))
    assert line.note == "why; timed once, cold" and line.ours_ms == timed.ours_ms > 0


def test_threads_and_tf32_are_put_back():
    before = torch.get_num_threads(), torch.backends.cudnn.allow_tf32
    with pytest.raises(KeyError), timing.full_float32(threads=3):
        assert torch.get_num_threads() == 3 and not torch.backends.cudnn.allow_tf32
        raise KeyError
    assert (torch.get_num_threads(), torch.backends.cudnn.allow_tf32) == before


# ---------------------------------------------------------------------------------------------------- elsewhere


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
def test_on_cuda_both_sides_are_equal_and_their_memory_is_told(parity, dtype):
    status, report, out = parity("--random-init", "tiny-sdxl-controlnet", "--device", "cuda", "--dtype", dtype)
    assert status == 0, out
    lines = [line for line in report["lines"] if line["station"] in ("UNet", "ControlNet", "drawn from words")]
    lines = [line for line in lines if not line["what"].startswith("each of ")]  # whose memory isn't measured
    assert len(lines) == 5 and all(line["ours_bytes"] > 0 and line["theirs_bytes"] > 0 for line in lines)
    assert out.count("peak ") >= 5 and "cuda" in report["about"]["device"]


@pytest.mark.slow
def test_stable_diffusion_at_full_size_is_equal(parity):
    words = ("--random-init", "sd15", "--size", "64x64", "--only", "weights,tokenizer,text,vae,unet", "--threads", "2")
    status, report, out = parity(*words)
    lines = [line for line in report["lines"] if not line["what"].startswith("each of ")]
    assert status == 0 and (len(lines), len(report["lines"])) == (10, 14), out
