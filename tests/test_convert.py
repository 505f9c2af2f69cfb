"""`ldm convert`: there and back with the same bits, the same pictures from both, and nothing lost without a word."""

import json
import os
import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from reference import normal, randomise
from tiny_pairs import PROMPT, SCENES, controlnets, scenes, write_tokenizer
from tiny_tasks import TaskModels
from transformers import DPTConfig, DPTForDepthEstimation

import ldm
from ldm.checkpoints import architectures, names, recognise, vocabulary
from ldm.checkpoints.architectures import TINY_REFINER, TINY_SD15, TINY_SD21, TINY_SDXL, Architecture
from ldm.checkpoints.prediction import answer
from ldm.cli import convert as convert_command
from ldm.cli import main
from ldm.convert import convert, described, open_source, writing
from ldm.convert.described import metadata, model_index, own_defaults, published, scheduler_fields, title_of
from ldm.errors import LDMError
from ldm.io.folders import read_json, write_json
from ldm.io.headers import read_header
from ldm.io.weights import WeightFiles, save_weights
from ldm.loading import load_vae
from ldm.models.unet import UNetConfig
from ldm.models.vae import VAEConfig
from ldm.schedules.config import CLASSES, SOLVERS, ScheduleConfig
from ldm.settings import Defaults

MODELS = ("sd1", "sd2", "sdxl", "refiner", "inpaint", "edit", "depth", "upscale")
TINY = (TINY_SD15, TINY_SD21, TINY_SDXL, TINY_REFINER)


@pytest.fixture(scope="module")
def tasks(models, tmp_path_factory):
    return TaskModels(tmp_path_factory.mktemp("tasks"), models)


@pytest.fixture
def published_tiny(monkeypatch):
    """The tiny architectures, as if they had been published: files without a configuration are compared with them."""
    monkeypatch.setattr(recognise, "PUBLISHED", TINY)


def assert_same(one, two):
    """Two opened sources: every configuration, every tokenizer and every bit."""
    assert one.configs == two.configs
    for part, tensors in one.weights.items():
        assert tensors.names.keys() == two.weights[part].names.keys()
        for key in tensors.names:
            here, there = tensors.read(key), two.weights[part].read(key)
            assert here.dtype == there.dtype and torch.equal(here, there), f"{part}: {key}"
            assert here.abs().sum() > 0, f"{part}: {key} is nothing but zeros"
    if one.model is None:
        return
    for name in ("scheduler", "low_res", "defaults"):
        assert getattr(one.model, name) == getattr(two.model, name)
    assert described.remarks_of(one.model) == described.remarks_of(two.model)
    for name, tokenizer in one.model.tokenizers.items():
        other = two.model.tokenizers[name]
        for field in ("vocab", "ranks", "added", "ids", "max_length", "bos_id", "eos_id", "unk_id", "pad_id"):
            assert getattr(tokenizer, field) == getattr(other, field)


def original(architecture: Architecture, parts=None, seed=0) -> dict[str, torch.Tensor]:
    """An original file's tensors, drawn: of an architecture's parts."""
    configs = {part: recognise.CONFIGS[part].from_json(fields) for part, fields in architecture.parts.items()}
    tensors = {}
    for part, prefix in names.prefixes(configs).items():
        if parts is None or part in parts:
            state = randomise(names.CLASSES[type(configs[part])](configs[part]), seed).state_dict()
            tensors |= names.to_original(state, names.origins(part, configs[part], prefix))
    return {name: tensor.clone() for name, tensor in tensors.items()}


# ---------------------------------------------------------------------------------------------------- there and back


@pytest.mark.parametrize("name", MODELS)
def test_folder_to_file_to_folder_is_bit_exact(tasks, name, tmp_path):
    """The second file, of a folder of the same name, is the first one byte for byte."""
    folder, file = tasks.folder(name), tmp_path / f"{name}.safetensors"
    written = convert(folder, file)
    assert written.path == file and written.bytes < file.stat().st_size
    back = tmp_path / "back" / name
    back.parent.mkdir()
    convert(file, back)
    assert_same(open_source(folder), open_source(back))
    assert_same(open_source(folder), open_source(file))
    again = tmp_path / "again" / f"{name}.safetensors"
    again.parent.mkdir()
    convert(back, again)
    assert again.read_bytes() == file.read_bytes()
    theirs, ours = read_json(folder / "model_index.json"), read_json(back / "model_index.json")
    present = {part: said for part, said in theirs.items() if said != [None, None]}
    assert {part: ours.get(part) for part in present if part != "_name_or_path"} == present


@pytest.mark.parametrize("name", ["sd1", "sd2", "sdxl"])
def test_the_file_draws_the_same_bits(models, name, tmp_path):
    file = tmp_path / "model.safetensors"
    convert(models.folder(name), file)
    wish = {"seed": 3, "steps": 3, "width": 64, "height": 128}
    *_, one = models.ours(name).steps(PROMPT, **wish)
    *_, two = ldm.load(file).steps(PROMPT, **wish)
    assert torch.equal(one.x, two.x) and one.x.abs().mean() > 0.1


def test_names_and_shapes_are_the_originals(models, tmp_path):
    """Some that are known by heart; all of them are held against the authors' own in test_original_names."""
    file = tmp_path / "xl.safetensors"
    convert(models.folder("sdxl"), file)
    shapes = {entry.name: entry.shape for entry in read_header(file).entries}
    assert shapes["model.diffusion_model.input_blocks.0.0.weight"] == (8, 4, 3, 3)
    assert shapes["first_stage_model.decoder.mid.attn_1.q.weight"] == (16, 16, 1, 1)
    assert shapes["conditioner.embedders.1.model.text_projection"] == (20, 14)  # from the right
    assert shapes["conditioner.embedders.1.model.transformer.resblocks.3.attn.in_proj_weight"] == (60, 20)
    weights = WeightFiles(file)
    whole = weights.read("conditioner.embedders.1.model.transformer.resblocks.3.attn.in_proj_weight")
    middle = (
        open_source(models.folder("sdxl")).weights["text_encoder_2"].read("encoder.layers.3.self_attn.k_proj.weight")
    )
    assert torch.equal(whole[20:40], middle)
    convert(file, tmp_path / "xl")
    kept = WeightFiles(tmp_path / "xl" / "text_encoder_2" / "model.safetensors").entries
    assert "text_projection.weight" in kept and "text_model.final_layer_norm.weight" in kept  # as transformers writes


def test_controlnet_there_and_back(models, tmp_path):
    controlnets(models, "sd1", seed=4)
    folder = models.root / "sd1-controlnet-4"
    convert(folder, tmp_path / "net.safetensors")
    convert(tmp_path / "net.safetensors", tmp_path / "net")
    assert_same(open_source(folder), open_source(tmp_path / "net"))
    assert all(entry.name.startswith("control_model.") for entry in read_header(tmp_path / "net.safetensors").entries)
    assert read_header(tmp_path / "net.safetensors").metadata["modelspec.implementation"] == "sgm"
    xl = replace(open_source(folder).configs["controlnet"], addition_embed_type="text_time")
    assert metadata({"controlnet": xl}, None, "xl")["modelspec.implementation"] == "diffusers"
    pipe = models.ours("sd1")
    nets = [ldm.load_controlnet(place, pipe) for place in (folder, tmp_path / "net.safetensors")]
    context = pipe.text_encoder.context(pipe.tokenizer(PROMPT).ids)
    given = (normal(1, 1, 4, 8, 8), torch.tensor([7.0]), context, normal(2, 1, 3, 64, 64))
    found = [net(*given[:3], net.condition(given[3])) for net in nets]
    (skips, middle), (others, other) = found
    assert torch.equal(middle, other) and middle.abs().mean() > 0.01
    assert all(torch.equal(a, b) for a, b in zip(skips, others, strict=True))


def test_a_vae_alone_there_and_back(models, tmp_path):
    written = convert(models.folder("sdxl"), tmp_path / "vae.safetensors", part="vae")
    assert written.parts == ("vae",)
    assert "encoder.conv_in.weight" in WeightFiles(tmp_path / "vae.safetensors").entries
    convert(tmp_path / "vae.safetensors", tmp_path / "vae")
    convert(models.folder("sdxl") / "vae", tmp_path / "other")
    assert_same(open_source(tmp_path / "vae"), open_source(models.folder("sdxl") / "vae"))
    assert_same(open_source(tmp_path / "vae"), open_source(tmp_path / "other"))
    assert open_source(tmp_path / "vae").configs["vae"].scaling_factor == 0.13025
    taken = load_vae(tmp_path / "vae.safetensors", models.ours("sdxl"))
    assert torch.equal(taken.decoder.conv_in.weight, models.ours("sdxl").vae.decoder.conv_in.weight)


def test_a_unet_alone(models, tmp_path):
    convert(models.folder("sd1"), tmp_path / "unet.safetensors", part="unet")
    convert(tmp_path / "unet.safetensors", tmp_path / "unet")
    assert_same(open_source(models.folder("sd1"), part="unet"), open_source(tmp_path / "unet"))


@scenes
def test_the_embedded_model_draws_the_same_from_its_file(tmp_path, capsys):
    """It is of its own widths, with a tokenizer and defaults of its own."""
    file = tmp_path / "x.safetensors"
    assert convert("scenes", file).beside == (tmp_path / "x.tokenizer",)
    one, two = ldm.load("scenes"), ldm.load(file)
    assert two.defaults == one.defaults and two.scheduler == one.scheduler
    prompt = "a large red house on snow at night"
    images = [pipe(prompt, seed=7, steps=3).images[0].tobytes() for pipe in (one, two)]
    assert images[0] == images[1]
    convert("scenes-canny", tmp_path / "canny.safetensors")
    nets = [ldm.load_controlnet(place, one) for place in ("scenes-canny", tmp_path / "canny.safetensors")]
    states = [net.state_dict() for net in nets]
    assert states[0].keys() == states[1].keys() and all(torch.equal(states[0][k], states[1][k]) for k in states[0])
    convert(file, tmp_path / "back")
    assert read_json(tmp_path / "back" / "ldm.json") == read_json(SCENES / "ldm.json")


# ---------------------------------------------------------------------------------------------------- types, variants


def test_dtype_is_kept_or_cast(models, tmp_path):
    folder = models.folder("sd1")
    convert(folder, tmp_path / "half.safetensors", dtype="float16")
    convert(tmp_path / "half.safetensors", tmp_path / "half")
    whole, half = open_source(folder), open_source(tmp_path / "half")
    for part, tensors in whole.weights.items():
        for key in tensors.names:
            assert torch.equal(half.weights[part].read(key), tensors.read(key).half())
    assert half.configs == whole.configs
    assert whole.bytes(None) == 2 * half.bytes(None) == 2 * whole.bytes(torch.float16)
    convert(tmp_path / "half", tmp_path / "wide", dtype=torch.bfloat16)
    kept = WeightFiles(tmp_path / "wide" / "unet" / "diffusion_pytorch_model.safetensors").entries.values()
    assert {entry.dtype for entry in kept} == {"BF16"}


def test_reads_what_diffusers_writes_in_variants_and_shards(models, tmp_path, capsys):
    pipe = models.reference("sd2")
    pipe.save_pretrained(tmp_path / "sharded", variant="fp16", max_shard_size="100KB", safe_serialization=True)
    assert len(list((tmp_path / "sharded" / "unet").glob("*.fp16-0000*"))) > 2
    convert(tmp_path / "sharded", tmp_path / "model.safetensors", variant="fp16")
    assert_same(open_source(models.folder("sd2")), open_source(tmp_path / "model.safetensors"))
    assert "fp16" not in capsys.readouterr().err  # asked for, and found


# ---------------------------------------------------------------------------------------------------- original files


def test_a_pickle_with_averages_and_tables(published_tiny, tmp_path, capsys):
    """What no network reads is named; `ema` takes the averages instead."""
    file = tmp_path / "old.ckpt"
    write_tokenizer(tmp_path / "old.tokenizer", "<|endoftext|>")
    tensors = original(TINY_SD15, seed=1)
    unet = {name: tensor for name, tensor in tensors.items() if name.startswith(names.UNET)}
    averages = {names.averaged(names.Origin(name)).name: tensor + 1 for name, tensor in unet.items()}
    idle = {
        "betas": torch.ones(1000),
        "cond_stage_model.transformer.text_model.embeddings.position_ids": torch.arange(77)[None],
    }
    torch.save({"state_dict": tensors | averages | idle, "global_step": 5}, file)
    with pytest.raises(LDMError, match="pickle"):
        convert(file, tmp_path / "never")
    assert not (tmp_path / "never").exists()

    plain = convert(file, tmp_path / "plain", prediction_type="epsilon", allow_pickle=True).path
    said = capsys.readouterr().err
    assert "averages" in said and "position" in said and "schedule" in said, said
    ema = convert(file, tmp_path / "ema", variant="ema", prediction_type="epsilon", allow_pickle=True).path
    found = [open_source(place) for place in (plain, ema)]
    first = "model.diffusion_model.input_blocks.0.0.weight"
    assert torch.equal(found[0].weights["unet"].read("conv_in.weight"), tensors[first])
    assert torch.equal(found[1].weights["unet"].read("conv_in.weight"), tensors[first] + 1)

    convert(plain, tmp_path / "again.safetensors")
    again = WeightFiles(tmp_path / "again.safetensors")
    assert again.entries.keys() == tensors.keys()
    assert all(torch.equal(again.read(name), tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize("part, variant", [("vae", None), ("unet", None), ("unet", "ema")])
def test_a_part_needs_no_vocabulary(published_tiny, tmp_path, capsys, part, variant):
    """The vocabulary of these is nowhere: of the whole model it would be asked for."""
    tensors = original(TINY_SD15, seed=1)
    unet = {name: tensor for name, tensor in tensors.items() if name.startswith(names.UNET)}
    averages = {names.averaged(names.Origin(name)).name: tensor + 1 for name, tensor in unet.items()}
    file = tmp_path / "model.safetensors"
    save_weights(tensors | averages, file)
    with pytest.raises(LDMError, match="tokenizer"):
        convert(file, tmp_path / "never")
    capsys.readouterr()
    convert(file, tmp_path / part, part=part, variant=variant)
    assert ("averages are taken instead" in capsys.readouterr().err) == (variant == "ema")
    made = open_source(tmp_path / part)
    assert made.configs == {part: recognise.CONFIGS[part].from_json(TINY_SD15.parts[part])}
    prefix = {"vae": "first_stage_model.", "unet": names.UNET}[part]
    kept = names.origins(part, made.configs[part], prefix)
    for key, origin in kept.items():
        assert torch.equal(made.weights[part].read(key), origin.take(tensors[origin.name]) + (variant == "ema")), key
    with pytest.raises(LDMError, match=f"a {part} alone has no prediction_type"):
        convert(file, tmp_path / "never", part=part, prediction_type="epsilon")


def test_a_part_of_a_file_and_its_variant(published_tiny, tmp_path, capsys):
    save_weights(original(TINY_SD15), tmp_path / "model.safetensors")
    for part, variant, words in (("unet", "ema", "holds no moving averages"), ("controlnet", None, "no controlnet in")):
        with pytest.raises(LDMError, match=words):
            convert(tmp_path / "model.safetensors", tmp_path / "never", part=part, variant=variant)
    convert(tmp_path / "model.safetensors", tmp_path / "vae", part="vae", variant="ema")
    assert "one set of weights of a vae, and 'ema' is passed over" in capsys.readouterr().err


def test_a_part_has_the_configuration_of_what_its_model_predicts(models, monkeypatch, tmp_path):
    """Of two published models of the same shapes, which draw pictures of two sizes."""
    big, small = replace(TINY_SD21, name="big"), replace(
        TINY_SD21,
        name="small",
        parts=TINY_SD21.parts | {"unet": TINY_SD21.parts["unet"] | {"sample_size": 5}},
        scheduler=TINY_SD21.scheduler | {"prediction_type": "epsilon"},
    )  # fmt: skip
    assert big.scheduler["prediction_type"] == "v_prediction" and big.parts["unet"]["sample_size"] != 5
    monkeypatch.setattr(recognise, "PUBLISHED", (big, small))
    for said, size in (("v", big.parts["unet"]["sample_size"]), ("epsilon", 5)):
        file = tmp_path / f"{said}.safetensors"
        save_weights(original(TINY_SD21), file, metadata={"modelspec.prediction_type": said})
        assert open_source(file, part="unet").configs["unet"].sample_size == size


def test_pickles_of_the_hub_are_asked_for_only_if_allowed(models, tmp_path, monkeypatch):
    asked = []

    def fetch(name, variant, allow_pickle):
        asked.append((name, variant, allow_pickle))
        return models.folder("sd1")

    monkeypatch.setattr("ldm.hub.fetch", fetch)
    convert("org/name", tmp_path / "one", part="vae")
    convert("org/name", tmp_path / "two", part="vae", variant="fp16", allow_pickle=True)
    assert asked == [("org/name", None, False), ("org/name", "fp16", True)]


@pytest.mark.parametrize(
    "kind, held",
    [
        (torch.float16, torch.bfloat16),
        (torch.bfloat16, torch.bfloat16),
        (torch.float32, torch.float32),
        (None, torch.bfloat16),
    ],
)
def test_what_is_tried_out_takes_no_more_room_than_its_file(published_tiny, monkeypatch, tmp_path, kind, held):
    """`None`: nearly all in float16, and the last layer in float32, as some programs mix them."""
    seen = []
    monkeypatch.setattr("ldm.loading.measure", lambda unet: seen.append(unet) or ("epsilon", 0.9))
    write_tokenizer(tmp_path / "model.tokenizer", "!")
    tensors = original(TINY_SD21)
    mixed = {name: tensor if ".out.2." in name else tensor.half() for name, tensor in tensors.items()}
    save_weights(mixed if kind is None else tensors, tmp_path / "model.safetensors", kind)
    open_source(tmp_path / "model.safetensors")
    ((unet,), first) = seen, tensors["model.diffusion_model.input_blocks.0.0.weight"]
    assert {tensor.dtype for tensor in unet.state_dict().values()} == {held}
    kept = first.half() if kind in (None, torch.float16) else first.to(kind)
    assert torch.equal(unet.conv_in.weight, kept.to(held))
    seen.clear()
    open_source(tmp_path / "model.safetensors", prediction_type="epsilon")
    assert not seen


@scenes
def test_a_network_answers_in_half_precision_as_in_float32():
    """What decides, the correlation with the noise, is the same to a hundredth."""
    unet = ldm.load("scenes").unet
    whole, half = answer(unet), answer(unet.to(torch.bfloat16))
    assert abs(whole - half) < 0.01 and abs(whole) > 0.01


@pytest.mark.parametrize("shown, other", [("epsilon", "v_prediction"), ("v_prediction", "epsilon")])
def test_prediction_type_is_tried_out_or_asked(published_tiny, monkeypatch, tmp_path, capsys, shown, other):
    write_tokenizer(tmp_path / "model.tokenizer", "!")
    save_weights(original(TINY_SD21), tmp_path / "model.safetensors")
    monkeypatch.setattr("ldm.loading.measure", lambda unet: (shown, 0.5))
    convert(tmp_path / "model.safetensors", tmp_path / "tried")
    assert f"prediction_type {shown}" in capsys.readouterr().err
    convert(tmp_path / "model.safetensors", tmp_path / "asked", prediction_type=other)
    for folder, expected in (("tried", shown), ("asked", other)):
        assert read_json(tmp_path / folder / "scheduler" / "scheduler_config.json")["prediction_type"] == expected
    convert(tmp_path / "asked", tmp_path / "said.safetensors")
    assert read_header(tmp_path / "said.safetensors").metadata["modelspec.prediction_type"] == other.split("_")[0]


def test_a_vae_that_says_nothing_of_its_scale(published_tiny, tmp_path):
    save_weights(original(TINY_SD15, parts=["vae"]), tmp_path / "vae.safetensors")
    with pytest.raises(LDMError, match=r"0.18215 .* or 0.13025 .*--scaling-factor"):
        convert(tmp_path / "vae.safetensors", tmp_path / "vae")
    convert(tmp_path / "vae.safetensors", tmp_path / "vae", scaling_factor=0.13025)
    assert VAEConfig.from_json(read_json(tmp_path / "vae" / "config.json")).scaling_factor == 0.13025


def test_a_scaling_factor_that_is_asked_for_counts_or_is_refused(models, tmp_path, capsys):
    """Of a VAE alone in a folder, in a file that says another, and as a part of a model."""
    folder = models.folder("sd1")
    convert(folder, tmp_path / "vae.safetensors", part="vae")
    for source, part in ((folder / "vae", None), (tmp_path / "vae.safetensors", None), (folder, "vae")):
        capsys.readouterr()
        assert open_source(source, part=part).configs["vae"].scaling_factor == 0.18215
        assert open_source(source, part=part, scaling_factor=0.18215).configs["vae"].scaling_factor == 0.18215
        assert "scaling factor" not in capsys.readouterr().err
        changed = open_source(source, part=part, scaling_factor=0.5).configs["vae"]
        assert changed == replace(open_source(source, part=part).configs["vae"], scaling_factor=0.5)
        assert "its scaling factor is 0.18215, and 0.5 is taken as asked" in capsys.readouterr().err
    controlnets(models, "sd1", seed=4)
    net = models.root / "sd1-controlnet-4"
    convert(net, tmp_path / "net.safetensors")
    for source, part, words in (
        (folder, None, "whole model, whose scaling factor is known"),
        (folder, "unet", "a unet has no scaling factor"),
        (folder / "unet", None, "a unet has no scaling factor"),
        (net, None, "a controlnet has no scaling factor"),
        (tmp_path / "net.safetensors", None, "a controlnet has no scaling factor"),
    ):
        with pytest.raises(LDMError, match=words):
            convert(source, tmp_path / "never", part=part, scaling_factor=0.5)
    for wrong in (0, -1.0, float("nan"), float("inf"), True, "0.5"):
        with pytest.raises(LDMError, match="scaling_factor must be a number above 0"):
            convert(folder, tmp_path / "never", part="vae", scaling_factor=wrong)
    assert not (tmp_path / "never").exists()


# ---------------------------------------------------------------------------------------------------- descriptions

SAID = {
    "prediction_type": "v_prediction", "timestep_spacing": "trailing", "steps_offset": 3, "num_train_timesteps": 900,
    "beta_start": 0.0003, "beta_end": 0.03, "beta_schedule": "scaled_linear",
}  # fmt: skip


def schedulers():
    yield from ({"_class_name": name} for name in CLASSES)
    yield from ({"_class_name": name} | SAID for name in CLASSES if not name.startswith("Flow"))
    for name in ("HeunDiscreteScheduler", "LCMScheduler"):  # which mean other betas where they are silent
        yield {"_class_name": name, "beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear"}
    yield {"_class_name": "PNDMScheduler", "skip_prk_steps": True, "set_alpha_to_one": True}
    yield {"_class_name": "DDIMScheduler", "rescale_betas_zero_snr": True, "clip_sample": False}
    yield {"_class_name": "EulerDiscreteScheduler", "use_karras_sigmas": True, "trained_betas": [0.001] * 1000}
    yield {"_class_name": "DPMSolverSinglestepScheduler", "lower_order_final": True, "final_sigmas_type": "sigma_min"}
    yield {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0, "use_dynamic_shifting": True}
    for name, algorithm, order in SOLVERS:
        yield {"_class_name": name, "algorithm_type": algorithm, "solver_order": order}
    yield {"_class_name": "UniPCMultistepScheduler", "solver_type": "bh1", "solver_order": 3}


def test_schedulers_come_back():
    for fields in schedulers():
        config = ScheduleConfig.from_json(fields)
        written = scheduler_fields(config)
        assert ScheduleConfig.from_json(json.loads(json.dumps(written))) == config, fields
        if fields.get("algorithm_type") != "dpmsolver" or config.sampler != "ddim":  # two names of one step
            assert written["_class_name"] == fields["_class_name"]
    with pytest.raises(ValueError, match="no class of diffusers"):
        scheduler_fields(ScheduleConfig(rule="tcd", sampler="heun"))


SPEC = {
    "sd15": "stable-diffusion-v1", "sd15-inpaint": "stable-diffusion-v1-inpainting", "sd15-edit": None,
    "sd21": "stable-diffusion-v2-768-v", "sd21-base": "stable-diffusion-v2-512", "sd2-inpaint": None,
    "sd2-depth": None, "x4-upscaler": None, "sdxl": "stable-diffusion-xl-v1-base", "sdxl-inpaint": None,
    "sdxl-edit": None, "sdxl-refiner": "stable-diffusion-xl-v1-refiner",
}  # fmt: skip


def test_published_architectures_are_named_as_modelspec_does():
    for each in architectures.PUBLISHED:
        if "transformer" in each.parts:
            continue
        unet = UNetConfig.from_json(each.parts["unet"])
        assert published(unet, each.scheduler["prediction_type"]) == SPEC[each.name], each.name
        assert published(replace(unet, layers_per_block=3), each.scheduler["prediction_type"]) is None
    xl = UNetConfig.from_json(architectures.SDXL.parts["unet"])
    assert published(xl, "v_prediction") == "stable-diffusion-xl-v1-base"


def test_metadata_of_a_file(models, tmp_path):
    source = open_source(models.folder("sd2"))
    said = metadata(source.configs, source.model, "a title")
    own = json.loads(said["ldm.config"])
    assert own.keys() == {"text_encoder", "unet", "vae", "scheduler", "index", "pads"} and own["pads"] == ["!"]
    assert own["index"] == {"_class_name": "StableDiffusionPipeline", "requires_safety_checker": False}
    assert said["modelspec.title"] == "a title" and said["modelspec.implementation"] == "sgm"
    assert said["modelspec.prediction_type"] == "v" and said["modelspec.resolution"] == "64x64"
    assert "modelspec.architecture" not in said and "modelspec.sai_model_spec" not in said  # it isn't a published one
    changed = replace(source.model, defaults=Defaults(steps=9, guidance=7.5, width=72))
    assert json.loads(metadata(source.configs, changed, "")["ldm.config"])["ldm"] == own_defaults(changed)
    assert own_defaults(changed) == {"steps": 9, "guidance": 7.5, "width": 72}
    assert own_defaults(source.model) == {}


def test_titles():
    for source, title in {
        "scenes": "scenes",
        "a/b.c/": "b.c",
        "models/v1-5.safetensors": "v1-5",
        "c:\\x\\old.ckpt": "old",
        "control_v11p.pth": "control_v11p",
        "org/name@abc": "name",
        "/": "model",
    }.items():
        assert title_of(source) == title


def test_pipeline_classes():
    """Of models whose files name none; of those that do, the one they name."""
    for name, expected in {
        "sd15": "StableDiffusionPipeline",
        "sd15-inpaint": "StableDiffusionInpaintPipeline",
        "sd15-edit": "StableDiffusionInstructPix2PixPipeline",
        "sd2-depth": "StableDiffusionDepth2ImgPipeline",
        "x4-upscaler": "StableDiffusionUpscalePipeline",
        "sdxl": "StableDiffusionXLPipeline",
        "sdxl-inpaint": "StableDiffusionXLInpaintPipeline",
        "sdxl-refiner": "StableDiffusionXLImg2ImgPipeline",
    }.items():
        each = architectures.find_architecture(name) if name in architectures.ARCHITECTURES else None
        configs = {part: recognise.CONFIGS[part].from_json(fields) for part, fields in each.parts.items()}
        schedule = ScheduleConfig.from_json(each.scheduler)
        low = each.low_res_scheduler and ScheduleConfig.from_json(each.low_res_scheduler)
        model = SimpleNamespace(
            configs=configs, tokenizers={}, index=each.index, scheduler=schedule, low_res=low, defaults=Defaults()
        )
        index = model_index(model)
        assert index["_class_name"] == expected and each.index.items() <= index.items()
        assert ("low_res_scheduler" in index) == (name == "x4-upscaler")
        assert ("requires_safety_checker" in index) == (
            not configs["unet"].is_xl and "Depth" not in expected and name != "x4-upscaler"
        )
        lcm = configs | {"unet": replace(configs["unet"], time_cond_proj_dim=256)}
        if name == "sd15":
            model.configs = lcm
            assert model_index(model)["_class_name"] == "LatentConsistencyModelPipeline"
        strange = {"vae": 1, "x": ["os", "system"], "y": {"z": 1}, "_name_or_path": "/", "n": None, "z": 0.5}
        assert {"n", "z"} == described.remarks_of(SimpleNamespace(index=strange)).keys()
        assert model_index(SimpleNamespace(**vars(model) | {"index": {"_class_name": "../x"}}))["_class_name"] != "../x"
        model.index = {"_class_name": "StableDiffusionImg2ImgPipeline"}
        assert model_index(model)["_class_name"] == "StableDiffusionImg2ImgPipeline"


def test_marks_of_an_xl_that_predicts_velocity(models, tmp_path, capsys):
    folder = tmp_path / "xl"
    shutil.copytree(models.folder("sdxl"), folder)
    path = folder / "scheduler" / "scheduler_config.json"
    write_json(path, read_json(path) | {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True})
    convert(folder, tmp_path / "xl.safetensors")
    marks = {
        entry.name: entry.shape for entry in read_header(tmp_path / "xl.safetensors").entries if "." not in entry.name
    }
    assert marks == {"v_pred": (0,), "ztsnr": (0,)}
    convert(tmp_path / "xl.safetensors", tmp_path / "back")
    assert_same(open_source(folder), open_source(tmp_path / "back"))
    write_json(path, read_json(path) | {"rescale_betas_zero_snr": False})
    convert(folder, tmp_path / "some.safetensors")
    assert {name for name in WeightFiles(tmp_path / "some.safetensors").entries if "." not in name} == {"v_pred"}
    for name in ("sdxl", "sd2"):  # predicts noise; of a family that other programs know by its shapes
        convert(models.folder(name), tmp_path / f"{name}.safetensors")
        assert "v_pred" not in WeightFiles(tmp_path / f"{name}.safetensors").entries


# ---------------------------------------------------------------------------------------------------- tokenizers


def test_tokenizers_of_clips_vocabulary_are_not_written(models, tmp_path, monkeypatch):
    """The tiny one stands for CLIP's; where another tokenizer lies in the way, its own is written all the same."""
    usual = vocabulary.clip_tokenizer(sorted(tokenizer_of(models).ranks, key=tokenizer_of(models).ranks.get), "!")
    assert not writing.is_clip(usual)  # of fewer merges
    monkeypatch.setattr(writing, "MERGES_SHA256", merges_hash(usual))
    assert writing.is_clip(usual)
    for field, value in {"max_length": 76, "pad_id": 5, "added": {}, "vocab": {}}.items():
        other = vocabulary.clip_tokenizer(sorted(usual.ranks, key=usual.ranks.get), "!")
        setattr(other, field, value)
        assert not writing.is_clip(other), field
    target = tmp_path / "m.safetensors"
    assert writing.beside_file(target, {"tokenizer": usual}, False) == {}
    for way in ("tokenizer", "m/tokenizer", "m.tokenizer"):
        (tmp_path / way).mkdir(parents=True)
        assert list(writing.beside_file(target, {"tokenizer": usual}, True)) == [tmp_path / "m.tokenizer"]
        (tmp_path / way).rmdir()


def tokenizer_of(models):
    return models.ours("sd2").tokenizer


def merges_hash(tokenizer):
    import hashlib

    merges = sorted(tokenizer.ranks, key=tokenizer.ranks.get)
    return hashlib.sha256("\n".join(" ".join(pair) for pair in merges).encode()).hexdigest()


# ---------------------------------------------------------------------------------------------------- depth


@pytest.fixture
def depth(tasks, tmp_path):
    """A depth model's folder with a tiny estimator."""
    folder = tmp_path / "depth"
    shutil.copytree(tasks.folder("depth"), folder)
    config = DPTConfig(
        hidden_size=8, num_hidden_layers=4, num_attention_heads=2, intermediate_size=8, image_size=32, patch_size=16,
        backbone_out_indices=[0, 1, 2, 3], neck_hidden_sizes=[4, 4, 4, 4], fusion_hidden_size=4, is_hybrid=False,
    )  # fmt: skip
    DPTForDepthEstimation(config).save_pretrained(folder / "depth_estimator")
    (folder / "feature_extractor").mkdir()
    write_json(folder / "feature_extractor" / "preprocessor_config.json", {"image_processor_type": "DPTImageProcessor"})
    write_json(folder / "model_index.json", read_json(folder / "model_index.json") | DPT)
    return folder


DPT = {
    "depth_estimator": ["transformers", "DPTForDepthEstimation"],
    "feature_extractor": ["transformers", "DPTImageProcessor"],
}


def test_a_depth_models_estimator_is_carried_into_folders(depth, tmp_path, capsys):
    folder = depth
    (folder / "depth_estimator" / "other.json").write_text("{}")
    (folder / "depth_estimator" / "pytorch_model.bin").write_text("")
    capsys.readouterr()
    convert(folder, tmp_path / "half", dtype="float16")
    assert "depth_estimator" not in capsys.readouterr().err
    assert {path.name for path in (tmp_path / "half" / "depth_estimator").iterdir()} == {
        "config.json", "model.safetensors",
    }  # fmt: skip
    assert (tmp_path / "half" / "feature_extractor" / "preprocessor_config.json").is_file()
    assert DPT.items() <= read_json(tmp_path / "half" / "model_index.json").items()
    kept = "depth_estimator/model.safetensors"
    assert (tmp_path / "half" / kept).read_bytes() == (folder / kept).read_bytes()
    convert(folder, tmp_path / "depth.safetensors")
    assert "depth_estimator has no place in a single file" in capsys.readouterr().err
    convert(tmp_path / "depth.safetensors", tmp_path / "back")
    assert (
        "has no depth_estimator in safetensors: ldm takes the depth as a picture (--depth)" in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    "name, said",
    [
        ("depth_estimator", ["evil_module", "DPTForDepthEstimation"]),
        ("depth_estimator", ["transformers", "AutoModelForCausalLM"]),
        ("feature_extractor", ["evil_module", "Evil"]),
        ("feature_extractor", ["transformers", "DPTImageProcessor", "more"]),
    ],
)
def test_no_strangers_class_is_named_to_diffusers(depth, tmp_path, capsys, name, said):
    write_json(depth / "model_index.json", read_json(depth / "model_index.json") | {name: said})
    convert(depth, tmp_path / "new")
    assert f"its {name} is {said}, not transformers' DPT" in capsys.readouterr().err
    index = read_json(tmp_path / "new" / "model_index.json")
    assert index[name] == [None, None] and not (tmp_path / "new" / name).exists()
    kept = "depth_estimator" if name == "feature_extractor" else "feature_extractor"
    assert (index[kept] == DPT[kept]) == (kept == "depth_estimator") == (tmp_path / "new" / kept).exists()


def test_an_estimator_is_copied_through_no_link_out_of_its_model(depth, tmp_path):
    """But in the hub's cache, where all files are links to the repository's blobs."""
    (tmp_path / "secret").write_text("{}")
    for name in ("depth_estimator/config.json", "feature_extractor/preprocessor_config.json"):
        kept = (depth / name).read_bytes()
        for goal in (tmp_path / "secret", "../../secret"):
            (depth / name).unlink()
            os.symlink(goal, depth / name)
            with pytest.raises(LDMError, match=rf"{name} is a link out of the model, to {tmp_path / 'secret'}"):
                convert(depth, tmp_path / "new")
            assert not (tmp_path / "new").exists()
        (depth / name).unlink()
        (depth / name).write_bytes(kept)
    cached = tmp_path / "models--org--name" / "snapshots" / "1234"
    shutil.copytree(depth, cached)
    blobs = cached.parent.parent / "blobs"
    blobs.mkdir()
    file = cached / "depth_estimator" / "config.json"
    file.rename(blobs / "5678")
    os.symlink("../../../blobs/5678", file)
    convert(cached, tmp_path / "new")
    copy = tmp_path / "new" / "depth_estimator" / "config.json"
    assert copy.read_bytes() == (blobs / "5678").read_bytes() and not copy.is_symlink()
    other = cached.parent.rename(cached.parent.with_name("others")) / "1234"  # not as the hub's cache is laid out
    with pytest.raises(LDMError, match="is a link out of the model"):
        convert(other, tmp_path / "again")
    other.parent.rename(cached.parent)
    blobs.rename(tmp_path / "elsewhere")
    os.symlink(tmp_path / "elsewhere", blobs)
    with pytest.raises(LDMError, match="is a link out of the model"):
        convert(cached, tmp_path / "again")


# ---------------------------------------------------------------------------------------------------- what cannot be


@pytest.fixture
def empty(tmp_path):
    folder = tmp_path / "empty"
    folder.mkdir()
    return folder


def test_targets_that_cannot_be(models, tmp_path, empty):
    folder = models.folder("sd1")
    (tmp_path / "there.safetensors").write_bytes(b"x")
    (tmp_path / "file").write_bytes(b"x")
    (tmp_path / "else").mkdir()
    (tmp_path / "else" / "letters.txt").write_text("dear")
    for target, words in {
        "model.ckpt": "would be a pickle, and ldm writes none",
        "no/model.safetensors": "does not exist; create it first",
        "no/model": "does not exist; create it first",
        "file": "is a file; a single file is written as .safetensors",
        "there.safetensors": r"is there already: choose another target, or say overwrite \(--overwrite\)",
        "empty": "is there already",
    }.items():
        with pytest.raises(LDMError, match=words):
            convert(folder, tmp_path / target)
    for _ in range(2):
        with pytest.raises(LDMError, match="holds something else than a model"):
            convert(folder, tmp_path / "else", overwrite=True)
        write_json(tmp_path / "else" / "config.json", {"theme": "dark"})
    with pytest.raises(LDMError, match="holds something else than a model"):
        convert(folder, folder.parent, overwrite=True)
    assert (tmp_path / "there.safetensors").read_bytes() == b"x"
    convert(folder, empty, overwrite=True)
    convert(folder, empty, overwrite=True)  # a model's
    for _ in range(2):
        convert(folder, tmp_path / "vae", part="vae", overwrite=True)
    assert_same(open_source(folder), open_source(empty))
    convert(folder, tmp_path / "there.safetensors", overwrite=True)
    (tmp_path / "there.safetensors").unlink()
    with pytest.raises(LDMError, match=r"there.tokenizer is there already"):
        convert(folder, tmp_path / "there.safetensors")
    (tmp_path / "there.tokenizer" / "vocab.json").unlink()
    with pytest.raises(LDMError, match=r"there.tokenizer holds something else than a tokenizer"):
        convert(folder, tmp_path / "there.safetensors", overwrite=True)


def held(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_no_target_destroys_its_source(models, tmp_path):
    folder, link = tmp_path / "model", tmp_path / "link"
    shutil.copytree(models.folder("sd1"), folder)
    convert(folder, tmp_path / "blob.safetensors", part="vae")
    os.symlink(tmp_path / "blob.safetensors", folder / "vae.safetensors")
    os.symlink(folder, link)
    before = held(tmp_path)
    holds, inside = "holds what is to be converted, and would be replaced", "lies inside of what is to be converted"
    for source, target, words in (
        (folder, folder, holds),
        (link, folder, holds),
        (folder, link, holds),
        (folder / "vae", folder / "vae", holds),
        (folder / "vae", folder, holds),
        (folder / "vae.safetensors", folder, holds),  # the link would be lost
        (folder, folder / "unet", inside),
        (folder, link / "unet", inside),
        (folder, folder / "new", inside),
        (folder, folder / "unet" / "new.safetensors", inside),
        (link, folder / "unet", inside),
        (folder / "vae", folder / "vae" / "new", inside),
    ):
        with pytest.raises(LDMError, match=words):
            convert(source, target, overwrite=True)
        assert held(tmp_path) == before
    convert(folder / "vae", folder / "new.safetensors")  # beside it is another place


def test_sources_that_cannot_be(models, tmp_path, empty):
    folder = models.folder("sd1")
    (tmp_path / "adapter").mkdir()
    write_json(tmp_path / "adapter" / "config.json", {"_class_name": "T2IAdapter"})
    save_weights({"lora_unet_x.lora_up.weight": torch.ones(2, 2)}, tmp_path / "lora.safetensors")
    for source, options, words in (
        (empty, {}, "is no model's folder: it has neither model_index.json nor config.json"),
        (tmp_path / "adapter", {}, "holds a T2IAdapter, and ldm converts ControlNetModel"),
        (folder / "vae", {"part": "unet"}, "holds a AutoencoderKL, not a unet"),
        (folder / "vae", {"prediction_type": "epsilon"}, "a vae alone has no prediction_type: leave it out"),
        (folder, {"part": "vea"}, "There is no part 'vea' to convert: .* Did you mean 'vae'?"),
        (folder, {"part": "controlnet"}, "has no controlnet of its own"),
        (folder, {"prediction_type": "velocity"}, "There is no prediction_type 'velocity'"),
        (folder, {"dtype": "int8"}, "dtype 'int8' is none that weights can have"),
        (tmp_path / "lora.safetensors", {}, "LoRA"),
        ("no-such-model", {}, "There is no model 'no-such-model'"),
    ):
        with pytest.raises(LDMError, match=words):
            convert(source, tmp_path / "never", **options)
    assert not (tmp_path / "never").exists()


def test_weights_that_do_not_fit(models, tmp_path):
    folder = tmp_path / "vae"
    shutil.copytree(models.folder("sd1") / "vae", folder)
    file = folder / "diffusion_pytorch_model.safetensors"
    tensors = {name: WeightFiles(file).read(name).clone() for name in WeightFiles(file).entries}
    one, *_ = tensors
    for changed, words in (
        ({name: tensor for name, tensor in tensors.items() if name != one}, f"missing {one}"),
        (tensors | {"more": torch.ones(1)}, "unexpected more"),
        (tensors | {one: torch.ones(3)}, "wrong shape"),
        (tensors | {one: torch.full_like(tensors[one], torch.nan)}, "NaN"),
        (tensors | {one: torch.ones_like(tensors[one], dtype=torch.int8)}, "wrong type"),
        (
            tensors | {"decoder.mid_block.attentions.0.query.weight": torch.ones(16, 16)},
            "is a second 'decoder.mid_block.attentions.0.to_q.weight', with other numbers",
        ),
    ):
        save_weights({n: torch.zeros_like(t) if t.isnan().any() else t for n, t in changed.items()}, file)
        if words == "NaN":
            poison(file, one)
        for target in (tmp_path / "v", tmp_path / "v.safetensors"):
            with pytest.raises(LDMError, match=words):
                convert(folder, target)
            assert not target.exists()
    with pytest.raises(LDMError, match="beyond float16"):
        save_weights(tensors | {one: torch.full_like(tensors[one], 1e6)}, file)
        convert(folder, tmp_path / "v", dtype="float16")
    assert not list(tmp_path.glob(".ldm-tmp*")) and not (tmp_path / "v").exists()


def poison(file, name):
    """Make a tensor's first number NaN, in the file."""
    data = bytearray(file.read_bytes())
    length = int.from_bytes(data[:8], "little")
    begin = json.loads(data[8 : 8 + length])[name]["data_offsets"][0]
    data[8 + length + begin : 8 + length + begin + 4] = b"\x00\x00\xc0\x7f"
    file.write_bytes(data)


def test_position_numbers_are_named(models, tmp_path, capsys):
    folder = tmp_path / "old"
    shutil.copytree(models.folder("sd1"), folder)
    file = folder / "text_encoder" / "model.safetensors"
    tensors = {name: WeightFiles(file).read(name).clone() for name in WeightFiles(file).entries}
    save_weights(tensors | {"text_model.embeddings.position_ids": torch.arange(77)[None]}, file)
    convert(folder, tmp_path / "new")
    assert "text_model.embeddings.position_ids is no weight, and is passed over" in capsys.readouterr().err
    assert_same(open_source(models.folder("sd1")), open_source(tmp_path / "new"))


@pytest.mark.parametrize("target", ["model", "model.safetensors"])
def test_all_or_nothing(models, tmp_path, monkeypatch, target):
    """Ctrl-C in the midst of writing, and a disk that is too small."""
    convert(models.folder("sd1"), tmp_path / target)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    written = []

    def stop(tensors, path, *rest, **more):
        written.append(path)
        if len(written) == (2 if target == "model" else 1):
            raise KeyboardInterrupt
        save_weights(tensors, path, *rest, **more)

    monkeypatch.setattr(writing, "save_weights", stop)
    with pytest.raises(KeyboardInterrupt):
        convert(models.folder("sd2"), tmp_path / target, overwrite=True)
    monkeypatch.setattr(writing, "save_weights", save_weights)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=900_000))
    with pytest.raises(LDMError, match=r"needs 961.9 kB, and 900.0 kB are free there: free some space, or choose"):
        convert(models.folder("sd2"), tmp_path / target, overwrite=True)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    monkeypatch.setattr(
        shutil, "disk_usage", lambda path: SimpleNamespace(free=open_source(models.folder("sd2")).bytes(None))
    )
    convert(models.folder("sd2"), tmp_path / target, overwrite=True)


# ---------------------------------------------------------------------------------------------------- the command


def test_the_command(models, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("ldm.cli.COMMANDS", (convert_command,))
    folder = models.folder("sd1")
    assert main(["convert", str(folder), "a model.safetensors"]) == 0
    out, err = capsys.readouterr()
    assert out.splitlines() == [
        "a model.safetensors: text_encoder, unet, vae, 961.9 kB",
        "ldm generate \"a lighthouse at dusk\" --model 'a model.safetensors'",
    ]
    assert "a model.tokenizer: the tokenizer, which has no place in the file; keep the two together." in err
    assert main(["convert", "a model.safetensors", "half", "--dtype", "float16"]) == 0
    assert capsys.readouterr().out.startswith("half: text_encoder, unet, vae, 480.9 kB\n")
    assert main(["convert", "half", "vae", "--part", "vae"]) == 0
    assert "ldm.load_vae('vae', pipe)" in capsys.readouterr().out
    assert main(["convert", "half", "u.safetensors", "--part", "unet"]) == 0
    assert "UNet2DConditionModel.from_single_file('u.safetensors')" in capsys.readouterr().out
    assert main(["convert", "half", "u", "--part", "unet"]) == 0
    assert "UNet2DConditionModel.from_pretrained('u')" in capsys.readouterr().out
    assert main(["convert", "half", "vae"]) == 1
    assert "say overwrite (--overwrite)" in capsys.readouterr().err
    assert main(["convert", "half", "vae", "--part", "vae", "--overwrite"]) == 0
    controlnets(models, "sd1", seed=4)
    capsys.readouterr()
    assert main(["convert", str(models.root / "sd1-controlnet-4"), "net.safetensors"]) == 0
    assert "--control KIND@net.safetensors:photo.png" in capsys.readouterr().out
    assert main(["convert", "half/vae", "v", "--scaling-factor", "0.5"]) == 0
    assert read_json(tmp_path / "v" / "config.json")["scaling_factor"] == 0.5
    assert main(["convert", "half", "x", "--part", "vea"]) == 2
    assert (
        "--part must be controlnet or vae or unet or transformer, not 'vea'. Did you mean 'vae'?"
        in capsys.readouterr().err.replace("Vae", "vae")
    )


def test_a_file_with_a_model_and_its_controlnet(published_tiny, tmp_path, capsys):
    """As the first ControlNets were published: each with its model."""
    write_tokenizer(tmp_path / "both.tokenizer", "<|endoftext|>")
    led = TINY_SD15.led("led")
    save_weights(original(led), tmp_path / "both.safetensors")
    convert(tmp_path / "both.safetensors", tmp_path / "net", part="controlnet")
    config = recognise.CONFIGS["controlnet"].from_json(led.parts["controlnet"])
    net = open_source(tmp_path / "net")
    assert net.configs == {"controlnet": config}
    kept = WeightFiles(tmp_path / "both.safetensors").read("control_model.zero_convs.1.0.weight")
    assert torch.equal(net.weights["controlnet"].read("controlnet_down_blocks.1.weight")[:, :, 0, 0], kept[:, :, 0, 0])
    capsys.readouterr()
    convert(tmp_path / "both.safetensors", tmp_path / "model", prediction_type="epsilon")
    assert "its ControlNet is left out" in capsys.readouterr().err
    assert open_source(tmp_path / "model").configs.keys() == {"text_encoder", "unet", "vae"}
