"""What a model is said to need of memory: beside what it really takes, and beside sums made by hand."""

import json
import shlex
from types import SimpleNamespace

import pytest
import torch
from test_flux_memory import Pipe, Sent, draw
from torch import nn

from ldm import memory, planned, quantised
from ldm.checkpoints.architectures import ARCHITECTURES
from ldm.checkpoints.checkpoint import NETWORKS, blank_part
from ldm.cli import main, parser
from ldm.cli import plan as command
from ldm.errors import LDMError
from ldm.io.weights import WeightFiles
from ldm.planned import BLOCKS, EIGHT, FOUR, FULL, HALF, PARTS, WAYS, Count, Planned

MIB = 2**20


# ------------------------------------------------------------------------------------------------ weights


def test_flux_dev_is_counted_as_published():
    config = NETWORKS["transformer"].config.from_json(ARCHITECTURES["flux-dev"].parts["transformer"])
    found, d = planned.count(blank_part("transformer", config)), 3072
    assert found.all == 11_901_408_320  # of the parameters that the hub counts in its files
    late = 19 * 2 * 6 + 38 * 3 + 2  # vectors of adaLN, D numbers each, out of D
    assert found.modulations == late * d * (d + 1) and found.largest_modulation == 6 * d * (d + 1)
    double, single = 2 * (4 * d * d + 8 * d * d), 3 * d * d + 4 * d * d + 5 * d * d
    assert found.matrices == 19 * double + 38 * single and found.largest_matrix == 5 * d * d
    assert found.block == double + 2 * (4 * d + 5 * d) + 4 * 128  # a block of two streams, biases and norms


def test_what_is_counted_is_what_is_there(monkeypatch, tmp_path):
    """Sizes of a plan beside bytes of the real thing: whole, by parts, by blocks, in 8 and 4 bits."""
    pipe = Pipe(tmp_path)
    counts = {name: planned.count(part) for name, part in pipe.parts().items()}
    plan = Planned("", 0, 0, 1, 1, False, counts, {})
    two = FULL._replace(dtype=torch.float32)
    for name, part in pipe.parts().items():
        assert plan.weights(name, two) == sum(p.nbytes for p in part.parameters())
    for way in (PARTS, BLOCKS):
        memory.offload(pipe, "cpu", by=way.by)
        with monkeypatch.context() as patch:
            sent = Sent(pipe, patch)
            draw(pipe)
            most = max(plan.weights(name, way._replace(dtype=torch.float32)) for name in counts)
            assert most == 4 * sent.most
        memory.restore(pipe)
    for way in (EIGHT, FOUR):
        pipe = Pipe()
        quantised.quantise(pipe, way.bits)
        whole = way._replace(dtype=torch.float32, by="")
        for name, part in pipe.parts().items():
            assert plan.weights(name, whole) == quantised.held(part)
        codes = sum(
            tensor.nbytes for part in pipe.parts().values() for key, tensor in part.named_buffers()
            if key.endswith((".codes", ".scales"))
        )  # fmt: skip
        assert plan.host(way) == codes and plan.host(whole) == 0


def test_the_sums_of_every_way():
    counts = {
        "text_encoder": Count(100 * MIB, 60 * MIB, 4 * MIB, 0, 0, 7 * MIB),
        "transformer": Count(1000 * MIB, 640 * MIB, 8 * MIB, 250 * MIB, 10 * MIB, 20 * MIB),
        "vae": Count(50 * MIB, 0, 0, 0, 0, 5 * MIB),
    }
    computed = {
        torch.float32: {"text_encoder": 2 * MIB, "transformer": 90 * MIB, "vae": 700 * MIB},
        torch.bfloat16: {"text_encoder": 1 * MIB, "transformer": 50 * MIB, "vae": 400 * MIB},
    }
    plan, own = Planned("", 0, 0, 1, 1, False, counts, computed), planned.OVERHEAD["cuda"]
    expected = {
        FULL: (4600 + 2, 4600 + 90, 4600 + 700),
        HALF: (2300 + 1, 2300 + 50, 2300 + 400),
        PARTS: (200 + 1, 2 * (1000 - 250 + 10) + 50, 100 + 400),
        BLOCKS: (14 + 1, 40 + 50, 10 + 400),
        # CLIP isn't quantised; one matrix at a time is made whole again
        EIGHT: (200 + 1, 2 * (1000 - 250 + 10 - 640) + 640 * 17 / 16 + 16 + 50, 100 + 400),
        FOUR: (200 + 1, 2 * (1000 - 250 + 10 - 640) + 640 * 9 / 16 + 16 + 50, 100 + 400),
    }
    needs = plan.needs("cuda")
    assert needs.keys() == expected.keys()
    for way, sizes in expected.items():
        assert [each - own for each in needs[way].stations.values()] == [each * MIB for each in sizes], way.name
        assert needs[way].peak == max(needs[way].stations.values())
    ranked = [(2700, HALF), (2699, PARTS), (1569, EIGHT), (985, FOUR), (665, BLOCKS), (409, None)]
    for room, best in ranked:
        assert plan.best("cuda", own + room * MIB) is best


# ------------------------------------------------------------------------------------------------ what is computed


def test_of_what_is_computed_the_most_at_one_time_is_counted():
    x, linear = torch.empty(1000, device="meta"), nn.Linear(1000, 1000, device="meta")

    def chain():
        a = x + 1  # 4000 bytes live
        b = a * 2  # 8000
        a = None
        c = torch.cat([b, b])  # b and c: 12000
        b = None
        return c[:500].view(10, 50)  # what is looked at through a view is held whole

    assert planned.live(linear, chain) == 12000
    rows = torch.empty(10, 1000, device="meta")
    assert planned.live(linear, lambda: [linear(rows), linear.weight.T.detach()]) == 40000  # weights aren't counted
    q = torch.empty(2, 3, 500, 8, device="meta")
    attend = torch.nn.functional.scaled_dot_product_attention
    assert planned.live(linear, lambda: attend(q, q, q)) == q.nbytes  # and not 500 * 500 scores
    conv, image = nn.Conv2d(4, 6, 3, padding=1, device="meta"), torch.empty(1, 4, 20, 20, device="meta")
    out = 4 * 6 * 400
    assert planned.live(conv, lambda: conv(image)) == out + image.nbytes + conv.weight.nbytes


def test_more_pictures_larger_ones_and_more_steps_take_more():
    plans = [planned.plan("tiny-flux", 64, 64), planned.plan("tiny-flux", 128, 64, batch=2, steps=29)]
    one, more = (plan.computed[torch.float32] for plan in plans)
    assert more["vae"] > 3 * one["vae"] and more["text_encoder_2"] > one["text_encoder_2"]
    config = NETWORKS["transformer"].config.from_json(ARCHITECTURES["tiny-flux"].parts["transformer"])
    vectors = (config.num_layers * 12 + config.num_single_layers * 3 + 2) * config.width * 4
    assert plans[0].steps == 28 and not plans[0].guided  # it is told its guidance: one row
    assert more["transformer"] > 28 * 2 * vectors and one["transformer"] > 27 * vectors
    longer = planned.beside_weights(
        {"transformer": blank_part("transformer", config)}, "transformer", torch.float32, (1, 1, 16, 8, 8), 512, 29
    )
    assert longer - one["transformer"] == vectors


@pytest.mark.parametrize("model", ["tiny-sdxl", "tiny-refiner"])
def test_every_kind_of_unet_is_walked_through(model):
    found = planned.plan(model, 64, 64)
    assert list(found.counts)[-2:] == ["unet", "vae"] and found.guided
    assert all(found.computed[torch.bfloat16].values())


# ------------------------------------------------------------------------------------------------ the command


def test_a_plan_reads_no_weights(monkeypatch, capsys):
    monkeypatch.setattr(WeightFiles, "read", lambda *_: pytest.fail("a weight was read"))
    assert main(["plan", "--model", "scenes", "--device", "cpu", "--memory", "2G"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("scenes: 1 picture of 128x128, 25 steps; GiB of the processor's memory, 2.0 there")
    assert all(f"* {way.name}" in out for way in WAYS["cpu"])
    assert out.endswith('  ldm generate "a red house" --model scenes --width 128 --height 128 --steps 25\n')


def test_what_fits_is_marked_and_the_line_for_it_told(capsys, monkeypatch):
    counts = {"text_encoder_2": Count(0, 0, 0, 0, 0, 0), "transformer": Count(8 * 2**30, 7 * 2**30, 0, 2**30, 0, 0)}
    none = {dtype: dict.fromkeys(counts, 0) for dtype in (torch.float32, torch.bfloat16)}
    made = Planned("big model", 512, 768, 2, 9, False, counts, none)
    monkeypatch.setattr(planned, "plan", lambda *asked: made if asked == ("big model", 512, 768, 2, 9) else None)
    asked = ["plan", "--model", "big model", "--width", "512", "--height", "768", "--batch", "2", "--steps", "9"]
    assert main([*asked, "--memory", "10 GiB"]) == 0
    out = capsys.readouterr().out
    lines = {line[2:].split("  ")[0]: line for line in out.splitlines()[3:9]}
    assert [line[0] for line in lines.values()] == [" ", " ", "*", "*", "*", " "]
    assert lines["bfloat16, parts in turn"].endswith("14.6") and lines["8 bits, parts in turn"].endswith("8.0")
    assert "Modulations, 2.0 of the transformer in bfloat16, come once a run" in out
    assert "Take 8 bits, parts in turn. It takes 7.4 GiB of the processor's memory beside." in out
    line = '--model "big model" --device cuda --dtype bfloat16 --offload parts --mapped --quantise int8 --width 512'
    assert line in out and out.endswith(" --height 768 --steps 9 --count 2 --batch 2\n")
    assert main([*asked, "--memory", "10G", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["memory"] == 10 * 2**30 and said["best"] == EIGHT.name and line in said["command"]
    assert [way["fits"] for way in said["ways"]] == [False, False, True, True, True, False]
    assert main([*asked, "--memory", "400M"]) == 1
    assert "Nothing fits: bfloat16, block by block takes least, 0.6 GiB. Draw smaller" in capsys.readouterr().out


def test_what_cannot_be_planned_is_said(capsys, monkeypatch):
    for words, said, status in (
        (["--memory", "much"], "--memory must be an amount of memory such as 16G, not 'much'", 2),
        (["--device", "gpu"], "gpu", 2),
        (["--model", "flux-dve"], "no model 'flux-dve' here to be counted", 1),
        (["--model", "tiny-sd15", "--width", "60", "--memory", "1G"], "multiples of 16, not 60x", 1),
    ):
        assert main(["plan", *words]) == status
        assert said in capsys.readouterr().err
    monkeypatch.setattr("ldm.doctor.machine.ram", lambda: None)
    with pytest.raises(LDMError, match="What memory cpu has can't be told here: say --memory"):
        command.free("cpu")
    monkeypatch.setattr("ldm.doctor.machine.ram", lambda: SimpleNamespace(available=7))
    assert command.free("cpu") == 7 and command.size("1.5k") == 1536 and command.size("3 MB") == 3 * MIB


@pytest.mark.parametrize("device", WAYS)
def test_generate_understands_the_line_that_is_told(device):
    counts = {"transformer": Count(1, 0, 0, 0, 0, 0)}
    for way in WAYS[device]:
        line = command.command(Planned("a model", 64, 64, 2, 9, False, counts, {}), way, device)
        args = parser().parse_args(shlex.split(line)[1:])
        assert (args.model, args.width, args.count, args.batch, args.steps) == ("a model", 64, 2, 2, 9)
        bits = {8: "int8", 4: "int4"}.get(way.bits)
        assert (args.device, args.offload, args.quantise) == (
            device,
            way.by if device == "cuda" and way.by else None,
            bits,
        )
        assert args.mapped == bool(way.by)
