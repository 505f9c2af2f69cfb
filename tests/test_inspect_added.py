"""`ldm inspect` of LoRAs and embeddings: what each is, what it changes and how much, and what it goes with."""

import json
import math
import os
import re
import shutil
import struct
from pathlib import Path

import pytest
import torch
from reference import normal
from safetensors.torch import save_file
from tiny import tiny_model

import ldm
from ldm.checkpoints import places
from ldm.cli import main
from ldm.inspect import inspect
from ldm.inspect.trained import facts_of_training
from ldm.io import weights

TO_Q = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
SD1 = {  # kohya's name of a layer: (outputs, inputs, kernel)
    TO_Q: (320, 320),
    "lora_unet_down_blocks_1_attentions_1_transformer_blocks_0_attn2_to_k": (640, 768),
    "lora_unet_mid_block_attentions_0_proj_in": (1280, 1280, 1, 1),
    "lora_unet_up_blocks_1_resnets_0_conv1": (1280, 2560, 3, 3),
    "lora_unet_up_blocks_1_attentions_0_transformer_blocks_0_ff_net_0_proj": (10240, 1280),
    "lora_te_text_model_encoder_layers_3_mlp_fc1": (3072, 768),
    "lora_te_text_model_encoder_layers_11_self_attn_q_proj": (768, 768),
}
XL = {
    "lora_unet_input_blocks_4_1_transformer_blocks_1_attn2_to_k": (640, 2048),
    "lora_unet_middle_block_1_proj_in": (1280, 1280),
    "lora_unet_output_blocks_2_1_transformer_blocks_9_attn1_to_q": (1280, 1280),
    "lora_te1_text_model_encoder_layers_0_mlp_fc1": (3072, 768),
    "lora_te2_text_model_encoder_layers_31_mlp_fc2": (1280, 5120),
}
SD1_TITLES = "Stable Diffusion 1, Stable Diffusion 1 for inpainting, InstructPix2Pix of Stable Diffusion 1"
XL_TITLES = "Stable Diffusion XL base, Stable Diffusion XL for inpainting, InstructPix2Pix of Stable Diffusion XL"


def kohya(layers, rank=2, alpha=1.0):
    """The tensors of a LoRA, every factor drawn; the last layer is of twice the rank."""
    tensors = {}
    for k, (name, (outputs, inputs, *kernel)) in enumerate(layers.items()):
        r = rank * (1 + (k == len(layers) - 1))
        tensors[f"{name}.lora_down.weight"] = normal(2 * k, r, inputs, *kernel) / 10
        tensors[f"{name}.lora_up.weight"] = normal(2 * k + 1, outputs, r, *[1] * len(kernel)) / 10
        if alpha is not None:
            tensors[f"{name}.alpha"] = torch.tensor(alpha)
    return tensors


def norm(tensors, layer, scale):
    """The Frobenius norm of a layer's whole change, multiplied out."""
    up, down = (tensors[f"{layer}.lora_{side}.weight"].flatten(1).double() for side in ("up", "down"))
    return scale * (up @ down).norm().item()


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def run(capsys):
    """(exit status, what is printed) of the command."""

    def command(*words, status=0):
        found = main(["inspect", *map(str, words)])
        out, err = capsys.readouterr()
        assert found == status and not err, err
        return out

    return command


def write(tensors, name="x.safetensors", **metadata):
    save_file(tensors, name, metadata=metadata or None)
    return name


# ---------------------------------------------------------------------------------------------- LoRAs


def test_a_lora_of_stable_diffusion_1(run):
    tensors = kohya(SD1)
    report = inspect(write(tensors))
    assert report.sound and report.kind == "lora" and report.what == "a LoRA in kohya's names"
    assert report.reason == "made for SD 1.x: its cross-attention reads a context of 768 numbers"
    assert report.facts == {
        "changes": "5 layers of the UNet (1 of them convolutions) and 2 layers of the text encoder",
        "rank": "2 (6 layers), 4 (1 layer)",
        "alpha": "1; so the factors' product is scaled by 0.5 (6 layers), 0.25 (1 layer)",
        "goes with": f"{SD1_TITLES}, by its names and shapes",
    }
    assert [(part.name, part.where) for part in report.parts] == [("unet", "5 layers"), ("text_encoder", "2 layers")]
    assert sum(part.parameters for part in report.parts) == sum(each.numel() for each in tensors.values())
    a, b, c, d, e, f, g = SD1
    wanted = {
        "UNet down_blocks.0": [norm(tensors, a, 0.5)],
        "UNet down_blocks.1": [norm(tensors, b, 0.5)],
        "UNet mid_block": [norm(tensors, c, 0.5)],
        "UNet up_blocks.1": [norm(tensors, d, 0.5), norm(tensors, e, 0.5)],
        "text encoder": [norm(tensors, f, 0.5), norm(tensors, g, 0.25)],
    }
    assert [each.block for each in report.strengths] == list(wanted)
    for block, layers, size, share in report.strengths:
        assert layers == len(wanted[block]) and size == pytest.approx(math.hypot(*wanted[block]), rel=1e-6) and size > 1
        assert share is None  # of no model that is here
    assert report.use == ('ldm generate "a lighthouse at dusk" --model MODEL --lora x.safetensors:0.8',)
    bars = {line[2:22].strip(): line.count("#") for line in run("x.safetensors").splitlines() if " layer" in line}
    most = max(report.strengths, key=lambda each: each.norm)
    assert bars[most.block] == 32
    assert all(bars[each.block] == round(32 * each.norm / most.norm) for each in report.strengths)


def test_a_lora_of_xl_in_the_original_names():
    report = inspect(write(kohya(XL, alpha=None)))
    assert report.sound and report.what == "a LoRA in kohya's and original names"
    assert report.facts["goes with"] == f"{XL_TITLES}, by its names and shapes"
    assert report.facts["changes"].endswith("1 layer of the text encoder and 1 layer of the second text encoder")
    assert report.facts["alpha"] == "not said; so the factors' product is scaled by 1"
    assert [each.block for each in report.strengths] == [
        "UNet down_blocks.1", "UNet mid_block", "UNet up_blocks.0", "text encoder", "second text encoder",
    ]  # fmt: skip


def test_of_other_forms_and_trainers():
    loha = {f"{TO_Q}.hada_w{i}_{side}": normal(i, *shape) for i in (1, 2) for side, shape in
            (("a", (320, 4)), ("b", (4, 320)))}  # fmt: skip
    report = inspect(write(loha, ss_network_module="lycoris.kohya", ss_network_args='{"algo": "loha"}'))
    assert report.what == "a LoHa in LyCORIS' names" and report.facts["rank"] == "4"
    assert report.facts["trained by"] == "LyCORIS, on kohya's sd-scripts (lycoris.kohya, loha)"
    name = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    peft = {f"{name}.lora_A.weight": normal(1, 4, 320), f"{name}.lora_B.weight": normal(2, 320, 4)}
    report = inspect(write(peft, lora_adapter_metadata=json.dumps({"unet.r": 4, "unet.lora_alpha": 8})))
    assert report.what == "a LoRA in PEFT's names"
    assert report.facts["trained by"] == "not said; the file is in diffusers' format"
    assert report.facts["alpha"] == "8; so the factors' product is scaled by 2"
    old = f"{name.removesuffix('.to_q')}.processor.to_q_lora"  # whose names `recognise` doesn't know as a LoRA's
    report = inspect(write({f"{old}.down.weight": normal(1, 4, 320), f"{old}.up.weight": normal(2, 320, 4)}))
    assert report.sound and report.what == "a LoRA in diffusers' old names"
    assert "Stable Diffusion 2" in report.facts["goes with"] and "XL" not in report.facts["goes with"]


def test_a_change_of_nothing_is_said():
    tensors = kohya({TO_Q: SD1[TO_Q]}) | {f"{TO_Q}.lora_up.weight": torch.zeros(320, 4)}
    report = inspect(write(tensors))
    assert report.sound and report.warnings == ("It changes nothing: all its products are 0.",)


REFUSED = {
    "dora_scale": "a DoRA",
    "oft_blocks": "an OFT",
    "on_input": "an IA3",
    "a1.weight": "a GLoRA",
}


@pytest.mark.parametrize("key", REFUSED)
def test_kinds_that_ldm_refuses_are_named(run, key):
    write(kohya({TO_Q: SD1[TO_Q]}) | {f"{TO_Q}.{key}": normal(3, 4, 8)})
    text = run("x.safetensors", status=1)
    assert text.startswith(f"x.safetensors: {REFUSED[key]}") and "ldm doesn't implement that" in text
    assert text.endswith("ldm does not load it.\n") and "To use it" not in text


def test_adapters_of_other_models_are_named(run):
    layer = "lora_unet_double_stream_modulation_img_lin"
    write({f"{layer}.lora_down.weight": normal(1, 4, 8), f"{layer}.lora_up.weight": normal(1, 8, 4)})
    assert run("x.safetensors", status=1).startswith("x.safetensors: a LoRA for FLUX.2")
    write({"lora_controlnet": normal(1, 1)})
    assert "a Control-LoRA" in (text := run("x.safetensors", status=1)) and "does not read such a thing" in text


def million():
    """A header that claims a rank of a million, of a file that takes no room."""
    shapes, end, header = {"down": [10**6, 320], "up": [320, 10**6]}, 0, {}
    for side, shape in shapes.items():
        start, end = end, end + 2 * math.prod(shape)
        header[f"{TO_Q}.lora_{side}.weight"] = {"dtype": "F16", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    Path("x.safetensors").write_bytes(struct.pack("<Q", len(text)) + text)
    os.truncate("x.safetensors", 8 + len(text) + end)


def cut():
    write(kohya(SD1))
    os.truncate("x.safetensors", 5000)


@pytest.mark.parametrize(
    "damage, sentence",
    [
        (lambda: write(kohya({TO_Q: (320, 320)}) | {f"{TO_Q}.lora_up.weight": torch.full((320, 4), math.nan)}),
         "holds NaN or infinite numbers"),
        (lambda: write({f"{TO_Q}.lora_down.weight": normal(1, 4, 320)}), "lacks its factor 'up'"),
        (million, "claims rank 1,000,000, which a layer of 320 x 320 numbers can't have"),
        (cut, "is corrupt or truncated"),
    ],
    ids=["NaN", "half a pair", "rank 1,000,000", "truncated"],
)  # fmt: skip
def test_what_is_damaged_is_a_fault(run, damage, sentence):
    damage()
    text = run("x.safetensors", status=1)
    assert sentence in text and text.endswith("ldm does not load it.\n") and "To use it" not in text


def test_whether_it_goes_with_a_model_is_asked_of_that_model(run, model, monkeypatch):
    reads, read = [], weights.WeightFiles.read
    monkeypatch.setattr(weights.WeightFiles, "read", lambda self, key: reads.append(key) or read(self, key))
    pipe = ldm.load(model)
    layer = next(name for name, each in pipe.unet.named_modules() if name.endswith("up_blocks.0.attentions.0.proj_in"))
    shape = tuple(pipe.unet.get_submodule(layer).weight.shape)
    mine = kohya({f"lora_unet_{layer.replace('.', '_')}": shape}, alpha=None)
    write(mine)
    reads.clear()
    alone, report = inspect("x.safetensors"), inspect("x.safetensors", base=model)
    assert set(reads) == {*mine, f"{layer}.weight"}  # numbers of the LoRA, and of the model those that it changes
    assert alone.sound and "--model M asks" in alone.warnings[0] and "MODEL" in alone.use[0]
    assert report.sound and not report.warnings and report.facts["goes with"] == f"{model}, by its names and shapes"
    assert report.use == (f'ldm generate "a lighthouse at dusk" --model {model} --lora x.safetensors:0.8',)
    assert [each[:3] for each in alone.strengths] == [each[:3] for each in report.strengths]
    assert report.strengths[0].block == "UNet up_blocks.0" and alone.strengths[0].share is None
    write(kohya(SD1), "sd1.safetensors")
    text = run("sd1.safetensors", "--model", model, status=1)
    assert "! sd1.safetensors does not fit" in text and SD1_TITLES in text and "ldm generate" not in text
    assert run("x.safetensors", "--model", model) == str(report) + "\n"
    assert main(["inspect", "x.safetensors", "--model", "gone"]) == 1
    idle = inspect(model, base=model)
    assert idle.sound and "is asked of LoRAs and embeddings alone" in idle.warnings[0]


def test_of_a_model_that_is_here_the_share_is_told_that_is_changed_of_each_block(run, model):
    """It is what adding the LoRA really does to the weights."""
    pipe, layers = ldm.load(model), {}
    for part, network in (("unet", pipe.unet), ("te", pipe.text_encoder)):
        for name, each in network.named_modules():
            if name.endswith(("attn1.to_q", "proj_in", "conv1", "fc1")):
                outside = "text_model." if part == "te" else ""
                layers[f"lora_{part}_{f'{outside}{name}'.replace('.', '_')}"] = tuple(each.weight.shape)
    write(kohya(layers))
    report = inspect("x.safetensors", base=model)
    found = {each.block: each.share for each in report.strengths}
    assert report.strengths_in == str(model) and {"text encoder", "UNet mid_block", "UNet up_blocks.1"} <= found.keys()

    def weights_of(block):
        network = pipe.text_encoder if block == "text encoder" else pipe.unet.get_submodule(block.split()[1])
        named = {name: p.detach().double() for name, p in network.named_parameters()}
        ends = ("attn1.to_q.weight", "proj_in.weight", "conv1.weight", "fc1.weight")
        return torch.cat([p.flatten() for name, p in named.items() if name.endswith(ends)])

    before = {block: weights_of(block) for block in found}
    pipe.add_lora("x.safetensors")
    for block, share in found.items():
        change = (weights_of(block) - before[block]).norm() / before[block].norm()
        assert share == pytest.approx(change.item(), rel=1e-5) and share > 0.01, block
    lines = str(report).splitlines()
    assert any(line.endswith(f"(Frobenius norm, and its share of the weights' own in {model})") for line in lines)
    told = next(line for line in lines if line.startswith("  UNet mid_block"))
    assert f"  {100 * found['UNet mid_block']:.2g} %  #" in told, told


def test_the_same_as_json(run):
    write(kohya(SD1))
    found = json.loads(run("x.safetensors", "--json"))
    report = inspect("x.safetensors")
    assert found["sound"] is True and found["kind"] == "lora" and found["facts"] == report.facts
    assert found["strengths"] == [each._asdict() for each in report.strengths] and len(found["strengths"]) == 5


# ---------------------------------------------------------------------------------------------- trainers' metadata


def test_what_a_trainer_wrote_is_told(run):
    tags = {
        "10_neon": {"neon style": 50, "house": 40, "boat": 9},
        "x": {"neon style": 5, "sea": 8, "a": 3, "b": 2, "c": 1},
    }
    metadata = {
        "ss_network_module": "networks.lora", "ss_sd_model_name": "v1-5-pruned.ckpt", "ss_base_model_version": "sd_v1",
        "ss_num_train_images": "1200", "ss_steps": "2400", "ss_resolution": "(512, 512)",
        "ss_tag_frequency": json.dumps(tags), "modelspec.title": "Neon \x1b[31mnights", "modelspec.author": "x" * 500,
        "modelspec.architecture": "stable-diffusion-v1/lora", "ss_output_name": "not told",
    }  # fmt: skip
    text = run(write(kohya(SD1), **metadata))
    assert "\x1b" not in text
    facts = dict(re.findall(r"^  (\S.*?)  +(.*)$", text.partition("Properties\n")[2].partition("\n\n")[0], re.M))
    assert facts["trained by"] == "kohya's sd-scripts (networks.lora)"
    assert facts["trained on"] == "v1-5-pruned.ckpt (sd_v1, stable-diffusion-v1/lora), as its metadata say"
    assert facts["trained with"] == "1,200 pictures, 2,400 steps, at (512, 512)"
    assert facts["its maker says"] == "Neon \\x1b[31mnights" and facts["author"] == "x" * 120 + "..."
    tops = "neon style (55), house (40), boat (9), sea (8), a (3), b (2)"
    assert facts["words"] == f"the most frequent of its captions: {tops}"
    assert facts_of_training(metadata | {"modelspec.trigger_phrase": "in neon"})["words"] == "in neon"


def test_the_embedded_lora_says_who_trained_it_and_for_which_model():
    facts = inspect("scenes-neon").facts
    assert facts["trained by"] == "ldm" and facts["trained on"] == "scenes, as its metadata say"


@pytest.mark.parametrize(
    "metadata",
    [
        {"ss_tag_frequency": "{"},
        {"ss_tag_frequency": "[" * 100_000},
        {"ss_tag_frequency": '{"x": {"a": -1, "b": "many", "c": true, "": 5}, "y": 3}'},
        {"ss_num_train_images": "many", "ss_steps": "9" * 50, "ss_sd_model_name": "None"},
        {"ss_network_args": "[]", "software": "null", "modelspec.title": ""},
    ],
)
def test_metadata_that_are_not_as_a_trainer_writes_them_are_passed_over(metadata):
    assert facts_of_training(metadata) == {}


# ---------------------------------------------------------------------------------------------- embeddings


@pytest.mark.parametrize(
    "tensors, word, count, titles, reason",
    [
        ({"<toy>": (2, 768)}, "<toy>, as the file says", 2, SD1_TITLES, "it is made for Stable Diffusion 1"),
        ({"my-toy": (768,)}, "my-toy, as the file says", 1, SD1_TITLES, "it is made for Stable Diffusion 1"),
        ({"emb_params": (3, 1024)}, "x, as the file is called", 3, "Stable Diffusion 2", "Stable Diffusion 2"),
        ({"clip_l": (4, 768), "clip_g": (4, 1280)}, "x, as the file is called", 4, XL_TITLES, "SDXL"),
        ({"clip_g": (1, 1280)}, "x, as the file is called", 1, "Stable Diffusion XL refiner", "SDXL's refiner"),
    ],
)
def test_an_embedding_is_told(tensors, word, count, titles, reason):
    report = inspect(write({key: normal(1, *shape) for key, shape in tensors.items()}))
    assert report.sound and report.kind == "embedding" and reason in report.reason
    assert report.facts["word"] == word and report.facts["vectors"].startswith(f"{count}, ")
    assert report.facts["goes with"].startswith(titles) and report.facts["goes with"].endswith(", by its widths")
    assert ("XL" in report.facts["goes with"]) == ("clip_g" in tensors)
    name = word.partition(",")[0]
    quoted = f"'a picture of {name}'"
    assert report.use == (f"ldm generate {quoted} --model MODEL --embedding x.safetensors",)
    told = "; ".join(f"{length:.2g}" for length in [normal(1, *tensors[key]).norm(dim=-1).min() for key in tensors][:1])
    assert report.facts["lengths"].startswith(told)


def test_an_embedding_beside_a_model(run, model, monkeypatch):
    vectors = torch.stack([torch.full((16,), 0.5), torch.full((16,), 1.0)])
    write({"<toy>": vectors})
    report = inspect("x.safetensors", base=model)
    low, high = ldm.load(model).text_encoder.embeddings.token_embedding.weight.norm(dim=1).quantile(
        torch.tensor([0.05, 0.95])
    )  # fmt: skip
    usual = f"{low:.2g} to {high:.2g}"
    assert report.facts["lengths"] == f"2 to 4 of the text encoder, where most of the vocabulary's are {usual}"
    assert report.sound and f"--model {model} --embedding x.safetensors" in report.use[0]
    write({"house": vectors})
    assert "is a word of this model already" in run("x.safetensors", "--model", model, status=1)
    write({"<toy>": normal(1, 2, 768)})
    text = run("x.safetensors", "--model", model, status=1)
    assert "was made for Stable Diffusion 1 (vectors of 768 numbers)" in text and "ldm generate" not in text


def test_a_pickled_embedding_and_lora():
    torch.save(
        {"string_to_param": {"*": normal(1, 3, 768)}, "name": "kitten", "step": 5, "sd_checkpoint": None}, "x.pt"
    )
    report = inspect("x.pt")
    assert report.sound and report.form.startswith("a pickle of ") and report.form.endswith("format: AUTOMATIC1111")
    assert report.facts["word"] == "kitten, as the file says" and "is a pickle" in report.warnings[0]
    assert report.use[0].endswith("--embedding x.pt --allow-pickle") and "sd_checkpoint" in report.passed_over[0]
    torch.save(kohya(SD1), "y.pt")
    report = inspect("y.pt")
    assert report.sound and "is a pickle" in report.warnings[0] and report.use[0].endswith("y.pt:0.8 --allow-pickle")


@pytest.mark.parametrize(
    "tensors", [{"weight": (768,)}, {"layer.bias": (768,)}, {"toy": (2, 77)}, {"toy": (2, 3, 768)}]
)
def test_a_lone_tensor_is_not_taken_for_a_word(tensors):
    report = inspect(write({key: normal(1, *shape) for key, shape in tensors.items()}))
    assert report.kind == "unknown" and not report.sound


@pytest.mark.parametrize(
    "tensors, sentence",
    [
        ({"<toy>": torch.full((2, 768), math.nan)}, "numbers that are not finite"),
        ({"<toy>": normal(1, 99, 768)}, "has 99 vectors"),
        ({"<toy>": normal(1, 2, 768), "<cat>": normal(1, 2, 768)}, "an embedding is one word"),
    ],
)
def test_what_is_no_sound_word_is_a_fault(run, tensors, sentence):
    write(tensors)
    text = run("x.safetensors", status=1)
    assert sentence in text and text.endswith("ldm does not load it.\n")


# ---------------------------------------------------------------------------------------------- names and folders


def test_embedded_ones_and_folders_are_found(monkeypatch, tmp_path):
    for name, file, tensors in (("neon", "pytorch_lora_weights.safetensors", kohya(SD1)),
                                ("toy", "learned_embeds.safetensors", {"<toy>": normal(1, 768)})):  # fmt: skip
        (tmp_path / "weights" / name).mkdir(parents=True)
        write(tensors, tmp_path / "weights" / name / file)
    shutil.copytree("weights/neon", "folder")
    monkeypatch.setattr(places, "PACKAGE", tmp_path)
    lora, word = inspect("neon"), inspect("toy")
    assert lora.kind == "lora" and "--lora neon:0.8" in lora.use[0] and lora.strengths == inspect("folder").strengths
    assert word.kind == "embedding" and word.use[0].endswith("--embedding toy")
