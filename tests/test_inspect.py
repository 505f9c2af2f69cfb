"""`ldm inspect`: what is there is told truly, what is wrong is named, and no number is read for it."""

import argparse
import gzip
import json
import math
import os
import re
import shutil
import struct
from functools import cache
from pathlib import Path

import pytest
import torch
from diffusers import ControlNetModel
from safetensors.torch import load_file, save_file
from tiny_pairs import SCENES, Models, scenes

import ldm
from ldm.checkpoints import names, vocabulary
from ldm.checkpoints.fit import CONFIGS
from ldm.cli import inspect as command
from ldm.cli.options import Parser
from ldm.errors import LDMError, bytes_in_words
from ldm.inspect import file as inspect_file
from ldm.inspect import inspect
from ldm.inspect.report import Report, as_json, page
from ldm.io import headers, weights, zips
from ldm.io.png import save_png

TABLES = "alphas_cumprod", "betas"
PUBLISHED = {  # file: what it is, and the parameters of its parts, as others have counted them
    "sd1": ("a Stable Diffusion 1", {"unet": 859_520_964, "vae": 83_653_863, "text_encoder": 123_060_480}),
    "sd1-inpainting": ("a Stable Diffusion 1 for inpainting", {"unet": 859_535_364}),
    "sd2": ("a Stable Diffusion 2", {"unet": 865_910_724, "text_encoder": 340_387_840}),
    "sdxl-base": (
        "a Stable Diffusion XL base",
        {"unet": 2_567_463_684, "text_encoder": 123_060_480, "text_encoder_2": 694_659_840},
    ),
    "sdxl-refiner": ("a Stable Diffusion XL refiner", {"unet": 2_259_526_660, "text_encoder_2": 694_659_840}),
    "controlnet-sd1": ("a ControlNet of Stable Diffusion 1", {"controlnet": 361_279_120}),
}


@pytest.fixture(autouse=True)
def headers_alone(monkeypatch, tmp_path):
    """Whoever reads a number here fails; nor is the vocabulary of this machine looked for, nor its cache."""

    def read(self, name):
        raise AssertionError(f"a number was read: {name}")

    def record(self, name, archive=zips.Archive.read):
        assert name.endswith(("data.pkl", "byteorder")), f"numbers were read: {name}"
        return archive(self, name)

    monkeypatch.setattr(weights.WeightFiles, "read", read)
    monkeypatch.setattr(zips.Archive, "read", record)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("LDM_CLIP_VOCAB", raising=False)
    monkeypatch.setattr(vocabulary, "packaged", lambda: iter(()))


@cache
def original_keys():
    return json.loads(gzip.decompress((Path(__file__).parent / "original_keys.json.gz").read_bytes()))


def sparse(path, shapes, dtype="F16", **metadata):
    """A file of full size that takes no room: its header, and a hole."""
    size, header, end = headers.BITS[dtype] // 8, {"__metadata__": {"format": "pt", **metadata}}, 0
    for name, shape in shapes.items():
        start, end = end, end + size * math.prod(shape)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text)
    os.truncate(path, 8 + len(text) + end)
    return path


def single(models: Models, name, path, **more):
    """A tiny model as a single file in the original layout, with its configurations and its tokenizers beside it."""
    folder, shapes = models.folder(name), {}
    fields = {part: json.loads((folder / part / "config.json").read_text()) for part in CONFIGS
              if (folder / part).is_dir()}  # fmt: skip
    configs = {part: CONFIGS[part].from_json(each) for part, each in fields.items()}
    for part, prefix in names.prefixes(configs).items():
        own = names.shapes(part, configs[part])
        shapes |= {o.name: o.stored(own[key]) for key, o in names.origins(part, configs[part], prefix).items()}
    fields["ldm"] = {"steps": 9} if name == "sd1" else {}
    fields["scheduler"] = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    fields["pads"] = ["<|endoftext|>", "!"][-sum(part.startswith("text_encoder") for part in configs) :]
    for tokenizer in folder.glob("tokenizer*"):
        shutil.copytree(tokenizer, path.with_name(f"{path.stem}.{tokenizer.name}"), dirs_exist_ok=True)
    return sparse(path, shapes | more, "F32", **{"ldm.config": json.dumps(fields)})


@pytest.fixture
def copied(models, tmp_path):
    """A folder to be damaged."""
    return Path(shutil.copytree(models.folder("sd1"), tmp_path / "model"))


def run(capsys, *argv):
    """(exit status, what is printed) of the command."""
    top = Parser(prog="ldm")
    command.add(top.add_subparsers())
    args = top.parse_args(["inspect", *map(str, argv)])
    capsys.readouterr()
    return args.run(args), capsys.readouterr().out


def edit(path, **fields):
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def part_of(report, name):
    return next(part for part in report.parts if part.name == name)


# ---------------------------------------------------------------------------------------------------- folders


@pytest.mark.parametrize(
    "name, what, use",
    [
        ("sd1", "Stable Diffusion 1, of its own widths", "--model"),
        ("sd2", "Stable Diffusion 2, of its own widths", "--model"),
        ("sdxl", "Stable Diffusion XL, of its own widths", "--model"),
        ("refiner", "Stable Diffusion XL's refiner, of its own widths", "--refiner"),
    ],
)
def test_a_folder_is_told_as_it_is(models, name, what, use):
    folder = models.folder(name)
    report = inspect(folder)
    assert report.sound and report.what == f"a model in the manner of {what}" and report.kind == "pipeline"
    for part in report.parts:
        file = next((folder / part.name).glob("*.safetensors"))
        tensors = load_file(file)
        kept = {key: each for key, each in tensors.items() if not key.endswith("position_ids")}
        assert part.parameters == sum(each.numel() for each in kept.values()) > 10_000
        assert part.size == 4 * part.parameters and part.dtypes == {"F32": part.parameters}
        assert {each.name: each.shape for each in part.tensors} == {key: tuple(t.shape) for key, t in kept.items()}
        assert part.where == f"{part.name}/{file.name}"
    tokens = [key for key in report.facts if key.startswith("tokenizer")]
    assert len(tokens) == len(list(folder.glob("tokenizer*"))) and "560 pieces" in report.facts[tokens[0]]
    assert report.facts["predicts"].startswith("v_prediction" if name == "sd2" else "epsilon")
    assert report.facts["pictures"] == "64 x 64 pixels"
    assert f"{use} {folder}" in report.use[0] and not report.warnings


@scenes
def test_an_embedded_model_by_its_name(capsys):
    report = inspect("scenes")
    assert report.sound and report.facts["draws with"] == "dpm++2m, 25 steps, guidance 4"
    assert report.use == ('ldm generate "a lighthouse at dusk" --model scenes',)
    status, text = run(capsys, "scenes")
    assert status == 0 and text == str(report) + "\n"
    assert text.endswith("Every tensor of it is there; the numbers were not read.\n")
    net = inspect("scenes-canny")
    assert net.sound and net.kind == "controlnet" and "--control KIND@scenes-canny:" in net.use[0]
    assert "--model" not in net.use[0]  # the embedded model is the one that is taken


def test_a_networks_own_folder(models, tmp_path):
    net = ControlNetModel.from_unet(models.reference("sd1").unet, conditioning_embedding_out_channels=(4, 6, 10, 12))
    net.save_pretrained(tmp_path / "net")
    net = inspect(tmp_path / "net")
    assert net.sound and net.what == "a ControlNet" and "context of 24 numbers" in net.reason
    assert "--model BASE --control KIND@" in net.use[0]
    vae = inspect(models.folder("sd1") / "vae")
    assert vae.kind == "vae" and vae.facts == {"latents": "4 channels, one for 8 x 8 pixels, scaled by 0.18215"}
    assert "load_vae(" in vae.use[0]
    for part in ("unet", "text_encoder"):
        alone = inspect(models.folder("sd1") / part)
        assert alone.sound and alone.kind == part and not alone.use
        assert f"which has model_index.json, as its {part}." in alone.warnings[0]
    (tmp_path / "config.json").write_text('{"_class_name": "PriorTransformer"}')
    other = inspect(tmp_path)
    assert not other.sound and not other.faults and other.reason == "its config.json calls it PriorTransformer"


def test_published_widths_are_known_by_their_configurations(tmp_path):
    from ldm.checkpoints.architectures import PUBLISHED as ALL
    from ldm.inspect.told import family

    whole = [each for each in ALL if {"unet", "vae"} <= each.parts.keys()]
    assert len(whole) > 8
    for each in whole:
        configs = {part: CONFIGS[part].from_json(fields) for part, fields in each.parts.items()}
        assert family(configs)[0] == f"a {each.title}"
    lcm = configs | {"unet": CONFIGS["unet"].from_json(each.parts["unet"] | {"time_cond_proj_dim": 256})}
    assert family(lcm)[0] == f"a {each.title}, distilled (LCM)"


def test_variants_and_other_weights(copied):
    unet = copied / "unet"
    plain = unet / "diffusion_pytorch_model.safetensors"
    save_file({key: each.half() for key, each in load_file(plain).items()}, unet / f"{plain.stem}.fp16.safetensors")
    (copied / "whole.ckpt").write_bytes(b"x" * 1234)
    report = inspect(copied)
    assert part_of(report, "unet").dtypes.keys() == {"F32"}
    assert "unet/diffusion_pytorch_model.fp16.safetensors, 321.3 kB" in " ".join(report.passed_over)
    assert "whole.ckpt, 1.2 kB: other weights" in report.passed_over
    half = inspect(copied, "fp16")
    assert half.sound and part_of(half, "unet").dtypes.keys() == {"F16"} and "--variant fp16" in half.use[0]
    assert any("vae: no variant 'fp16'; reading" in line for line in half.warnings)
    plain.rename(unet / f"{plain.stem}.bf16.safetensors")
    several = inspect(copied)
    assert "unet holds only variants (bf16, fp16): name one of them" in several.warnings[0] and several.sound


def test_what_takes_no_part_in_drawing(copied):
    (copied / "safety_checker").mkdir()
    (copied / "odd").mkdir()
    edit(copied / "model_index.json", safety_checker=["stable_diffusion", "StableDiffusionSafetyChecker"])
    report = inspect(copied)
    assert report.sound
    idle, odd = report.passed_over
    assert idle == "safety_checker: it takes no part in drawing" and odd == "odd/: model_index.json doesn't name it"


def test_pickles_are_neither_run_nor_in_need_of_permission(copied):
    vae = copied / "vae" / "diffusion_pytorch_model.safetensors"
    state = load_file(vae)
    vae.unlink()
    torch.save(state, vae.with_suffix(".bin"))
    report = inspect(copied)
    assert report.sound and "--allow-pickle" in report.use[0]
    assert "diffusion_pytorch_model.bin is a pickle" in report.warnings[0]
    assert part_of(report, "vae").parameters == sum(each.numel() for each in state.values())


# ---------------------------------------------------------------------------------------------------- single files


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_files_of_full_size(name, tmp_path, capsys):
    what, parts = PUBLISHED[name]
    file = sparse(tmp_path / "anything.bin", original_keys()[name])
    assert file.stat().st_size > 700e6
    report = inspect(file)
    assert report.sound and report.what == what and "in the original layout" in report.form
    assert {key: part_of(report, key).parameters for key in parts} == parts
    assert bytes_in_words(file.stat().st_size) in report.form
    if name != "controlnet-sd1":
        assert any("CLIP's vocabulary isn't on this machine" in line for line in report.warnings)
    first, *others = report.use  # what lacks is fetched first; a ControlNet needs none
    assert first.startswith("ldm fetch clip-vocab ") == (name != "controlnet-sd1") == bool(others)
    line = report.use[-1]
    assert str(file) in line and ("--mask mask.png" in line) == (name == "sd1-inpainting")


def test_a_file_beside_what_it_should_be(models, tmp_path):
    keys = dict(original_keys()["sd1"])
    lost, odd = "model.diffusion_model.out.2.weight", "first_stage_model.encoder.conv_in.weight"
    shape = keys.pop("model.diffusion_model.out.2.bias")
    right = keys[odd]
    keys[odd] = [128, 4, 3, 3]
    keys["model.diffusion_model.strange"] = [3]
    file = sparse(tmp_path / "x.safetensors", keys)
    report = inspect(file)
    assert not report.sound and not report.use and lost in keys
    unet, vae = part_of(report, "unet"), part_of(report, "vae")
    assert [(each.name, list(each.shape)) for each in unet.missing] == [("model.diffusion_model.out.2.bias", shape)]
    assert [each.name for each in unet.extra] == ["model.diffusion_model.strange"]
    assert [(each.name, list(each.shape), list(each.wanted)) for each in vae.wrong] == [(odd, [128, 4, 3, 3], right)]
    with pytest.raises(LDMError) as refused:
        ldm.load(file)
    assert report.faults == (str(refused.value),)
    text = str(report)
    assert f"\n  {odd}  128 x 4 x 3 x 3 F16 instead of 128 x 3 x 3 x 3\n" in text
    assert "What unet lacks (1)\n  model.diffusion_model.out.2.bias  4\n" in text


@pytest.mark.parametrize("name", ["sd1", "sd2", "sdxl", "refiner"])
def test_a_tiny_file_with_its_own_configurations(models, name, tmp_path):
    file = single(models, name, tmp_path / "tiny.safetensors")
    report, folder = inspect(file), inspect(models.folder(name))
    if name == "sd1":  # what its metadata say of drawing
        assert report.facts["draws with"] == "ddim, 9 steps, guidance 7.5"
        folder.facts["draws with"] = report.facts["draws with"]
    assert report.sound and report.kind == "pipeline" and not report.warnings
    told = {part.name: part.parameters for part in report.parts}
    assert told == {part.name: part.parameters for part in folder.parts}
    prediction = "v_prediction" if name == "sd2" else "epsilon"
    assert report.facts["predicts"] == f"{prediction}, by the configuration in its metadata"
    key = "tokenizer 2" if name == "refiner" else "tokenizer"
    assert report.facts[key] == "560 pieces, of the folder that bears the file's name"
    for same in ("pictures", "latents", "draws with"):
        assert report.facts[same] == folder.facts[same]
    assert "Scheduler (its own): 1000 levels" in report.facts["schedule"]


def test_what_says_the_prediction_type(tmp_path, monkeypatch):
    sd2 = original_keys()["sd2"]

    def predicts(shapes, **metadata):
        return inspect(sparse(tmp_path / "x.safetensors", shapes, **metadata)).facts["predicts"]

    assert predicts(sd2).startswith("v_prediction or epsilon: nothing in the file says it")
    assert predicts(original_keys()["sd1"]).startswith("likely epsilon: nothing in the file says it")
    assert predicts(sd2 | {"v_pred": [0]}) == "v_prediction, by its mark v_pred"
    told = predicts(sd2, **{"modelspec.prediction_type": "epsilon"})
    assert told == "epsilon, by modelspec.prediction_type in its metadata"
    assert predicts(original_keys()["sdxl-refiner"]) == "epsilon, by its kind"

    def stepped(self, *args, init=weights.WeightFiles.__init__, **options):
        init(self, *args, **options)
        self.scalars["global_step"] = 875_000

    with monkeypatch.context() as patched:
        patched.setattr(weights.WeightFiles, "__init__", stepped)
        assert predicts(sd2) == "epsilon, by its number of training steps"
    assert inspect(sparse(tmp_path / "x.safetensors", sd2)).facts.get("pictures") is None
    known = inspect(sparse(tmp_path / "x.safetensors", sd2 | {"v_pred": [0], "ztsnr": [0]})).facts
    base = inspect(sparse(tmp_path / "x.safetensors", sd2, **{"modelspec.prediction_type": "epsilon"})).facts
    assert base["pictures"] == "512 x 512 pixels" and base["schedule"].startswith("PNDMScheduler (that of its kind)")
    assert known["pictures"] == "768 x 768 pixels" and "zero terminal SNR" in known["schedule"]


def test_averages_tables_and_a_pickles_other_things(models, tmp_path):
    keys = original_keys()["sd1"]
    ema = {f"model_ema.{key.removeprefix('model.').replace('.', '')}": shape for key, shape in keys.items()
           if key.startswith("model.diffusion_model.")}  # fmt: skip
    file = sparse(tmp_path / "x.safetensors", keys | ema | {"model_ema.decay": []})
    report = inspect(file)
    assert report.sound and any(f"averages of the weights (EMA) ({len(ema)}):" in line for line in report.passed_over)
    assert any("tables of the noise schedule" in line for line in report.passed_over)
    averaged = inspect(file, "ema")
    assert averaged.sound and all(each.name.startswith("model_ema.") for each in part_of(averaged, "unet").tensors)
    assert "--variant ema" in averaged.use[1] and not any(part.missing for part in averaged.parts)
    refused = inspect(sparse(tmp_path / "y.safetensors", keys), "ema")
    assert not refused.sound and "holds no moving averages" in refused.faults[0]


def test_a_pickled_checkpoint(models, tmp_path):
    vae = {"first_stage_model.encoder.conv_in.weight": torch.ones(2)}
    torch.save({"state_dict": vae, "global_step": 7, "options": argparse.Namespace()}, tmp_path / "x.ckpt")
    report = inspect(tmp_path / "x.ckpt")
    assert report.form.startswith("a pickle of ") and "'options' (argparse.Namespace)" in report.passed_over


@pytest.mark.parametrize(
    "shapes, kind",
    [
        ({"lora_controlnet": [1]}, "controlnet-lora"),
        ({"double_stream_modulation_img.lin.weight": [9, 3]}, "flux2"),
        ({"adapter.body.0.resnets.0.block1.weight": [4, 4, 3, 3]}, "adapter"),
        ({"some.thing": [3]}, "unknown"),
    ],
)
def test_what_ldm_does_not_load_is_named(shapes, kind, tmp_path, capsys):
    report = inspect(sparse(tmp_path / "x.safetensors", shapes))
    assert report.kind == kind and not report.sound and not report.faults and report.warnings
    assert report.parts[0].parameters == sum(map(math.prod, shapes.values()))
    status, text = run(capsys, tmp_path / "x.safetensors")
    assert status == 1 and text.endswith("ldm does not read such a thing.\n")


def test_shards_by_their_index(models, tmp_path):
    keys = original_keys()["controlnet-sd1"]
    half = len(keys) // 2
    shards = [dict(list(keys.items())[:half]), dict(list(keys.items())[half:])]
    table = {}
    for k, shard in enumerate(shards, 1):
        file = sparse(tmp_path / f"net-0000{k}-of-00002.safetensors", shard)
        table |= dict.fromkeys(shard, file.name)
    index = tmp_path / "net.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": table}))
    report = inspect(index)
    assert report.sound and report.form.startswith("2 shards of 722.6 MB") and report.kind == "controlnet"
    assert part_of(report, "controlnet").parameters == PUBLISHED["controlnet-sd1"][1]["controlnet"]
    index.write_text(json.dumps({"weight_map": table | {"more": file.name}}))
    assert "lists 'more', which no shard holds" in inspect(index).faults[0]
    index.write_text(json.dumps({"weight_map": table | {"more": "../x.safetensors"}}))
    assert "not a plain file name" in inspect(index).faults[0]
    index.write_text(json.dumps({"weight_map": table}))
    file.unlink()
    assert f"lacks {file.name}" in inspect(index).faults[0]


def test_a_picture_and_a_configuration(tmp_path, models):
    from PIL import Image

    save_png(Image.new("RGB", (8, 8)), tmp_path / "a.png", {"prompt": "a boat\x1b[31m", "seed": 3})
    report = inspect(tmp_path / "a.png")
    assert report.use == (f"ldm rerun {tmp_path / 'a.png'}",) and report.facts["seed"] == "3" and report.sound
    Image.new("RGB", (8, 8)).save(tmp_path / "b.png")
    other = inspect(tmp_path / "b.png")
    assert other.kind == "picture" and not other.sound and "holds no settings of ldm" in other.warnings[0]
    config = inspect(models.folder("sd1") / "unet" / "config.json")
    assert config.kind == "json" and config.reason == "it names UNet2DConditionModel"
    assert config.use == (f"ldm inspect {models.folder('sd1') / 'unet'}",)


def test_parts_in_a_file_of_their_own(tmp_path):
    keys = original_keys()["sd1"]

    def report(*beginnings, **more):
        shapes = {key: shape for key, shape in keys.items() if key.startswith(beginnings)}
        return inspect(sparse(tmp_path / "x.safetensors", shapes | more))

    unet = report("model.diffusion_model.")
    assert unet.sound and unet.kind == "unet" and not unet.use
    assert unet.warnings[0].startswith("It is no whole model: it lacks the text encoder and the VAE; take a")
    text = report("cond_stage_model.")
    assert text.sound and text.kind == "text_encoder" and "it lacks the UNet" in text.warnings[0]
    vae = report("first_stage_model.")
    assert vae.sound and "scaled by 0.18215 or 0.13025: its keys don't tell" in vae.facts["latents"]
    assert "load_vae(" in vae.use[0] and not vae.warnings
    both = report("model.diffusion_model.", "first_stage_model.")
    assert "it lacks the text encoder; take" in both.warnings[0] and "load_vae(" in both.use[0]
    led = report("", **original_keys()["controlnet-sd1"])
    assert led.sound and len(led.parts) == 4 and "--control KIND@" in led.use[2] and "--model" in led.use[1]


@scenes
def test_a_controlnet_with_its_configuration(tmp_path):
    folder = SCENES.parent / "scenes-canny"
    fields = json.loads((folder / "config.json").read_text())
    config = CONFIGS["controlnet"].from_json(fields)
    found = names.origins("controlnet", config, names.CONTROL), names.shapes("controlnet", config)
    shapes = {origin.name: origin.stored(found[1][key]) for key, origin in found[0].items()}
    text = json.dumps({"controlnet": fields})
    report = inspect(sparse(tmp_path / "x.safetensors", shapes, **{"ldm.config": text}))
    assert report.sound and report.kind == "controlnet" and report.facts == {}
    assert [part.parameters for part in report.parts] == [part.parameters for part in inspect("scenes-canny").parts]


def test_weights_of_a_folder_lead_to_its_configuration(models):
    folder = models.folder("sd1") / "unet"
    report = inspect(folder / "diffusion_pytorch_model.safetensors")
    assert not report.sound and f"`ldm inspect {folder}` compares the two" in report.warnings[0]


def test_the_vocabulary_of_a_file(tmp_path, monkeypatch):
    file = sparse(tmp_path / "x.safetensors", original_keys()["sdxl-base"])
    made = vocabulary.clip_tokenizer([("a", "b")], "!")
    monkeypatch.setattr(vocabulary, "find_clip", lambda file, say: (Path("there"), [("a", "b")]))
    report = inspect(file)
    told = f"{len(made)} pieces, of CLIP's vocabulary from there"
    assert report.facts["tokenizer"] == report.facts["tokenizer 2"] == told and not report.warnings
    (line,) = report.use
    (tmp_path / "x.tokenizer").mkdir()
    empty = inspect(file)  # one that is the file's own: no other would take its place
    assert "vocab.json" in empty.warnings[0] and empty.use == (line,)


# ---------------------------------------------------------------------------------------------------- what is wrong


def cut(path):
    os.truncate(path, path.stat().st_size - 5)


def lengthen(path):
    path.write_bytes(path.read_bytes() + b"12345")


def without(path):
    state = load_file(path)
    del state["conv_in.bias"]
    save_file(state, path)


def reshaped(path):
    save_file(load_file(path) | {"conv_in.bias": torch.ones(3)}, path)


def with_more(path):
    save_file(load_file(path) | {"odd": torch.ones(3)}, path)


def quantised(path):
    state = load_file(path)
    save_file(state | {"conv_in.bias": state["conv_in.bias"].to(torch.int8)}, path)


UNET = "unet/diffusion_pytorch_model.safetensors"
DAMAGES = [  # what is damaged, how, and what the page says
    (UNET, cut, r"unet\S* is corrupt or truncated \(5 bytes"),
    (UNET, lengthen, "5 bytes too many"),
    (UNET, Path.unlink, "unet has no diffusion_pytorch_model.safetensors"),
    (UNET, lambda p: p.write_bytes(b""), "it is empty"),
    (UNET, lambda p: p.write_bytes(b"version https://git-lfs.github.com/spec/v1\n"), "git lfs pull"),
    (UNET, lambda p: p.write_bytes(b"<!DOCTYPE html>"), "is a web page"),
    (UNET, without, r"missing conv_in\.bias"),
    (UNET, reshaped, r"conv_in\.bias in \S+ is \(3,\) instead of \(8,\)"),
    (UNET, with_more, "unexpected odd"),
    (UNET, quantised, "Quantised weights are not read"),
    ("unet/config.json", lambda p: p.write_text("{"), "not valid JSON"),
    ("unet/config.json", lambda p: edit(p, block_out_channels=[8, 2**40, 24]), "of the wrong kind or size"),
    ("unet/config.json", lambda p: edit(p, magic=1), "doesn't know: 'magic'"),
    ("unet/config.json", lambda p: edit(p, norm_num_groups=5), "No UNet can be built"),
    ("unet/config.json", lambda p: edit(p, cross_attention_dim=32), "wrong shape"),
    ("model_index.json", lambda p: p.write_text("[]"), "must hold a JSON object"),
    ("model_index.json", lambda p: edit(p, vae=["os", "system"]), "vae is a system"),
    ("model_index.json", lambda p: edit(p, magic=["diffusers", "Magic"]), "doesn't know: 'magic'"),
    ("model_index.json", lambda p: edit(p, vae=[None, None]), "lacks vae"),
    ("scheduler/scheduler_config.json", lambda p: edit(p, prediction_type="magic"), "magic"),
    ("tokenizer/tokenizer.json", Path.unlink, "tokenizer"),
    ("text_encoder/model.safetensors", cut, r"text_encoder\S* is corrupt"),
]


@pytest.mark.parametrize("place, damage, sentence", DAMAGES, ids=[str(k) for k in range(len(DAMAGES))])
def test_damage_is_one_sentence_that_loading_says_too(place, damage, sentence, copied, capsys, monkeypatch):
    damage(copied / place)
    report = inspect(copied)
    assert not report.sound and not report.use and len(set(report.faults)) == len(report.faults)
    assert re.search(sentence, report.faults[0]), report.faults
    status, text = run(capsys, copied)
    assert status == 1 and f"What is wrong\n! {report.faults[0]}\n" in text and text.endswith("does not load it.\n")
    monkeypatch.undo()  # loading may read numbers
    if "can be built" not in sentence:
        with pytest.raises(LDMError) as refused:
            ldm.load(copied)
        assert str(refused.value) in report.faults


def test_what_a_folder_lacks_and_has_beside(copied):
    state = load_file(copied / UNET)
    kept = {key: each for key, each in state.items() if key != "conv_in.weight"}
    save_file(kept | {"odd": torch.ones(2, 3), "conv_in.bias": torch.ones(3)}, copied / UNET)
    unet = part_of(inspect(copied), "unet")
    assert [each[:2] for each in unet.missing] == [("conv_in.weight", (8, 4, 3, 3))]
    assert [each[:3] for each in unet.extra] == [("odd", (2, 3), "F32")]
    assert [tuple(each) for each in unet.wrong] == [("conv_in.bias", (3,), "F32", (8,))]
    assert not part_of(inspect(copied), "vae").missing and len(inspect(copied).faults) == 1


def test_parts_that_do_not_belong_together(models, copied):
    shutil.rmtree(copied / "text_encoder")
    shutil.copytree(models.folder("sdxl") / "text_encoder_2", copied / "text_encoder")
    report = inspect(copied)
    assert "speaks vectors of 20 numbers, the UNet reads 24" in report.faults[0]
    assert len(report.parts) == 3 and not any(part.missing for part in report.parts)


class Bomb:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def test_a_pickle_with_code_is_told_and_not_run(tmp_path):
    torch.save({"state_dict": Bomb(tmp_path / "marker")}, tmp_path / "x.safetensors")
    report = inspect(tmp_path / "x.safetensors")
    assert not report.sound and not (tmp_path / "marker").exists()
    assert "mkdir" in report.faults[0] and "this one asks for" in report.warnings[0] and "mkdir" in report.warnings[0]
    assert "is a pickle in spite of its name" in report.warnings[0]


def test_a_folder_of_other_things(tmp_path, models):
    assert "has neither model_index.json nor config.json." in inspect(tmp_path).faults[0]
    (tmp_path / "x.ckpt").touch()
    shutil.copytree(models.folder("sd1") / "vae", tmp_path / "sub")
    assert "it holds 'x.ckpt', 'sub', to be named one by one" in inspect(tmp_path).faults[0]


def test_what_is_not_here_is_not_fetched(tmp_path):
    with pytest.raises(LDMError, match=r"There is no 'scnes' to inspect.*Did you mean 'scenes'"):
        inspect("scnes")
    for name in ("org/name", "models/sd1", "downloads/x.safetensors"):  # each of them may be a path, mistyped
        words = rf"There is no folder or file '{name}' here, nor .* of the hub: check the path; or `ldm fetch {name}`"
        with pytest.raises(LDMError, match=words):
            inspect(name)


# ---------------------------------------------------------------------------------------------------- the page


def test_no_strangers_text_reaches_the_terminal_as_it_is(copied, tmp_path):
    evil = "\x1b]0;owned\x07\u202e"
    edit(copied / "unet" / "config.json", **{evil: 1})
    os.rename(copied, tmp_path / f"model{evil}")
    for shown in (inspect(tmp_path / f"model{evil}"), inspect(sparse(tmp_path / "x.safetensors", {"a": [1]}, x=evil))):
        text = page(shown, keys=True)
        assert all(char.isprintable() for char in text.replace("\n", ""))
        assert all(char.isprintable() for char in json.dumps(as_json(shown, keys=True)))
    assert r"\x1b]0;owned\x07\u202e" in str(inspect(tmp_path / f"model{evil}"))
    told = page(Report("x", "a file", faults=(f"fault{evil}",), warnings=(f"warning{evil}",)), coloured=True)
    assert told.count(r"\x1b]0;owned\x07\u202e") == 2 and "\x07" not in told
    titled = sparse(tmp_path / "t.safetensors", {"a": [1]}, **{"modelspec.title": f"My model{evil}\nldm: all is well"})
    assert r"title  My model\x1b]0;owned\x07\u202e\nldm: all is well" in str(inspect(titled))


def test_colours_are_all_that_a_terminal_is_given_beside(copied):
    for damaged in (False, True):
        if damaged:
            with_more(copied / UNET)
        report = inspect(copied)
        coloured = page(report, coloured=True)
        assert re.sub(r"\x1b\[3[123]m|\x1b\[0m", "", coloured) == page(report) != coloured
        assert ("\x1b[31m! " in coloured) == damaged


def test_keys_and_json(models, capsys):
    folder = models.folder("sd1")
    tensors = {part: load_file(next((folder / part).glob("*.safetensors"))) for part in ("unet", "vae", "text_encoder")}
    status, text = run(capsys, folder, "--keys")
    assert status == 0 and all(f"  {key}  " in text for key in tensors["unet"])
    assert run(capsys, folder)[1].count("\n") < 30
    fields = json.loads(run(capsys, folder, "--json")[1])
    assert fields["sound"] is True and fields["kind"] == "pipeline"
    assert {each["name"]: each["count"] for each in fields["parts"]} == {k: len(v) for k, v in tensors.items()}
    assert "tensors" not in fields["parts"][0]
    named = json.loads(run(capsys, folder, "--json", "--keys")[1])["parts"]
    unet = {each["name"]: tuple(each["shape"]) for part in named if part["name"] == "unet" for each in part["tensors"]}
    assert unet == {key: tuple(each.shape) for key, each in tensors["unet"].items()}


def test_long_lists_are_cut_but_with_keys(tmp_path):
    keys = {key: shape for key, shape in original_keys()["sd1"].items() if "output_blocks.11" not in key}
    report = inspect(sparse(tmp_path / "x.safetensors", keys))
    missing = part_of(report, "unet").missing
    assert len(missing) > 20 and f"  and {len(missing) - 6} more (--keys names them all)" in page(report)
    assert all(f"  {each.name} " in page(report, keys=True) for each in missing)


def test_sizes_in_words():
    sizes = {0: "0 bytes", 999: "999 bytes", 1000: "1.0 kB", 999_499: "999.5 kB", 999_500: "1.0 MB", 4_265e6: "4.3 GB"}
    assert {size: bytes_in_words(size) for size in sizes} == sizes
    assert bytes_in_words(23.8e12) == "23800.0 GB"


def test_everything_in_this_file_was_inspected_from_headers_alone(models):
    """The fixture does what it says."""
    with pytest.raises(AssertionError, match="a number was read"):
        weights.WeightFiles(models.folder("sd1") / UNET).read("conv_in.weight")
    assert inspect_file.MOST_LETTERS == 200
