"""FLUX.1's files: folders of diffusers, the authors' single files, and what becomes of one into the other.

diffusers' converter of single files is the second truth: it reads what we write, bit for bit, and shows what we read.
"""

import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from diffusers.loaders import single_file_utils as converters
from reference import assert_close, normal
from safetensors.torch import load_file, save_file
from test_inspect import sparse
from test_names import configs_of, original_keys
from tiny import tiny_model
from tiny_flux import FluxModels

from ldm.checkpoints import names, recognise
from ldm.checkpoints.architectures import ARCHITECTURES
from ldm.checkpoints.checkpoint import check_fit, family_defaults, task_of_parts
from ldm.checkpoints.folder import check_index, open_folder, read_schedule
from ldm.checkpoints.single import find_schedule, open_single
from ldm.cli import main
from ldm.convert import convert
from ldm.errors import LDMError
from ldm.hub import wanted
from ldm.inspect import inspect
from ldm.io.folders import read_fields, write_json
from ldm.io.headers import Entry
from ldm.loading import load
from ldm.models.unet import Extras
from ldm.schedules import ScheduleConfig

PUBLISHED = ("flux-dev", "flux-schnell", "flux-fill", "flux-canny")
PLACE = "picture.safetensors"  # a name that says something else, and is not asked


@pytest.fixture(scope="module")
def flux(tmp_path_factory):
    return FluxModels(tmp_path_factory.mktemp("flux"))


def state(network):
    return network.state_dict()


def assert_same(ours, theirs):
    assert ours.keys() == theirs.keys() and ours
    for key, tensor in ours.items():
        assert tensor.shape == theirs[key].shape and torch.equal(tensor, theirs[key]), key


def assert_same_model(one, two):
    assert one.parts().keys() == two.parts().keys()
    for name, network in one.parts().items():
        assert network.config == two.parts()[name].config
        assert_same(state(network), state(two.parts()[name]))
    assert (one.scheduler, one.defaults, one.task) == (two.scheduler, two.defaults, two.task)
    for tokenizer in ("tokenizer", "tokenizer_2"):
        assert getattr(one, tokenizer)("a red house").ids.equal(getattr(two, tokenizer)("a red house").ids)


def copied(folder, target, **index):
    """A model's folder, with other words in its model_index.json."""
    shutil.copytree(folder, target)
    write_json(target / "model_index.json", read_fields(folder / "model_index.json") | index)
    return target


def rewrite(path, **fields):
    write_json(path, read_fields(path) | fields)


# ------------------------------------------------------------------------------------------------ folders


@pytest.mark.parametrize("name, task, steps, guidance, tokens", [
    ("dev", "text", 28, 3.5, 512), ("schnell", "text", 4, 1.0, 256), ("fill", "fill", 50, 30.0, 512),
    ("control", "control", 50, 30.0, 512),
])  # fmt: skip
def test_a_folder_of_diffusers_is_loaded_whole(flux, name, task, steps, guidance, tokens):
    pipe, reference = flux.ours(name), flux.reference(name)
    assert [*pipe.parts()] == ["text_encoder", "text_encoder_2", "transformer", "vae"] and pipe.task == task
    assert_same(state(pipe.transformer), reference.transformer.state_dict())
    given = {key: value for key, value in reference.text_encoder_2.state_dict().items() if "embed_tokens" not in key}
    assert_same(state(pipe.text_encoder_2), given)
    assert_same(state(pipe.vae), reference.vae.state_dict())
    d = pipe.defaults
    assert (d.steps, d.guidance, d.max_sequence_length, d.sigmas) == (steps, guidance, tokens, "even")
    config = pipe.transformer.config
    x, context, pooled = normal(1, 2, config.channels_in, 6, 4), normal(2, 2, 5, 20), normal(3, 2, 24)
    scale = torch.tensor([3.5, 2.0]) if config.guidance_embeds else None
    from ldm.models.patches import pack, places, unpack

    ids = places(5, 6, 4)
    theirs = reference.transformer(
        pack(x), context, pooled, torch.tensor([0.7, 0.7]), ids[5:], ids[:5], scale, return_dict=False
    )[0]  # fmt: skip
    ours = pipe.transformer(x, torch.tensor([700.0, 700.0]), context, Extras(pooled=pooled, guidance=scale))
    assert_close(ours, unpack(theirs, 6, 4), 1e-5)


def test_shards_are_read_as_one(flux, tmp_path):
    """As FLUX.1 is published: the transformer in three, T5 in two."""
    flux.reference("dev").save_pretrained(tmp_path / "shards", max_shard_size="100KB")
    for part in ("transformer", "text_encoder_2"):
        shards = [*(tmp_path / "shards" / part).glob("*-of-*.safetensors")]
        assert len(shards) > 1 or part == "text_encoder_2"
    flux.reference("dev").text_encoder_2.save_pretrained(tmp_path / "shards" / "text_encoder_2", max_shard_size="10KB")
    (tmp_path / "shards" / "text_encoder_2" / "model.safetensors").unlink(missing_ok=True)
    assert len([*(tmp_path / "shards" / "text_encoder_2").glob("*-of-*.safetensors")]) > 1
    assert_same_model(load(tmp_path / "shards"), flux.ours("dev"))
    report = inspect(tmp_path / "shards")
    assert report.sound and "more shards" in next(part.where for part in report.parts if part.name == "transformer")


CLASSES = ("FluxPipeline", "FluxImg2ImgPipeline", "FluxInpaintPipeline", "FluxFillPipeline", "FluxControlPipeline")


@pytest.mark.parametrize("cls", CLASSES)
def test_every_pipeline_of_the_same_parts_is_read(flux, tmp_path, cls):
    folder = tmp_path / "model"
    folder.mkdir()
    index = read_fields(flux.folder("dev") / "model_index.json") | {"_class_name": cls}
    write_json(folder / "model_index.json", index)
    assert check_index(folder)["transformer"] == "FluxTransformer2DModel"


@pytest.mark.parametrize("index, sentence", [
    ({"_class_name": "FluxKontextPipeline"}, "is a FLUX.1 Kontext, which reads another picture's patches"),
    ({"transformer": ["diffusers", "SD3Transformer2DModel"]}, "transformer is a SD3Transformer2DModel; ldm knows Flux"),
    ({"transformer": ["diffusers", "Flux2Transformer2DModel"]}, "transformer is a Flux2Transformer2DModel; ldm knows"),
    ({"tokenizer_2": [None, None]}, "lacks tokenizer_2."),
    ({"vae": [None, None]}, "lacks vae."),
    ({"text_encoder_2": ["transformers", "UMT5EncoderModel"]}, "text_encoder_2 is a UMT5EncoderModel; ldm knows T5"),
    ({"unet": ["diffusers", "UNet2DConditionModel"]}, "names a part that ldm doesn't know: 'unet'"),
    ({"controlnet": ["diffusers", "FluxControlNetModel"]}, "names a part that ldm doesn't know: 'controlnet'"),
])  # fmt: skip
def test_other_models_and_incomplete_ones_are_refused(flux, tmp_path, index, sentence):
    write_json(tmp_path / "model_index.json", read_fields(flux.folder("dev") / "model_index.json") | index)
    with pytest.raises(LDMError, match=re.escape(sentence)):
        check_index(tmp_path)


FAULTS = {  # which configurations of a sound model are changed, and what is said
    "T5's width": ({"text_encoder_2": {"d_model": 24}}, "T5 speaks vectors of 24 numbers, the transformer reads 20"),
    "T5's words": ({"text_encoder_2": {"vocab_size": 39}}, "the second tokenizer writes 40 kinds of tokens, its text"),
    "CLIP's words": ({"text_encoder": {"vocab_size": 559}}, "the tokenizer writes 77 tokens of 560 kinds"),
    "pooled": (
        {"transformer": {"pooled_projection_dim": 768}},
        "pooled vector has 24 numbers, the transformer reads 768",
    ),
    "channels": ({"transformer": {"in_channels": 24}}, "the transformer takes 6 channels and returns 4, the VAE's lat"),
    "what it returns": (
        {"transformer": {"out_channels": 32}},
        "takes 4 channels and returns 8, the VAE's latents have 4",
    ),
    "latents": ({"vae": {"latent_channels": 16}}, "the transformer takes 4 channels and returns 4, the VAE's latents"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_parts_of_different_models_are_refused(flux, fault):
    checkpoint = open_folder(flux.folder("schnell"), None, "transformers")
    check_fit(checkpoint)
    changes, sentence = FAULTS[fault]
    changed = {part: replace(checkpoint.configs[part], **fields) for part, fields in changes.items()}
    with pytest.raises(LDMError, match=re.escape(sentence) + ".*don't belong together"):
        check_fit(replace(checkpoint, configs={**checkpoint.configs, **changed}))


def test_a_second_clip_or_another_schedule_is_refused(flux):
    checkpoint = open_folder(flux.folder("schnell"), None, "transformers")
    clip = checkpoint.configs["text_encoder"]
    with pytest.raises(LDMError, match="its second text encoder is CLIP, FLUX's is T5"):
        check_fit(replace(checkpoint, configs={**checkpoint.configs, "text_encoder_2": clip}))
    with pytest.raises(LDMError, match="its scheduler isn't one of flow matching"):
        check_fit(replace(checkpoint, scheduler=ScheduleConfig()))


# ------------------------------------------------------------------------------- parts that another model's folder has


@pytest.fixture(scope="module")
def lean(flux, tmp_path_factory):
    """A transformer and a schedule, whose other parts are those of "base", a Stable Diffusion in the folder beside it.

    The context is CLIP's own: there is no T5.
    """
    root = tmp_path_factory.mktemp("lean")
    (root / "base").mkdir()
    tiny_model(root / "base")
    net = FluxTransformer2DModel.from_pretrained(flux.folder("schnell") / "transformer")
    config = dict(net.config) | {"joint_attention_dim": 16, "pooled_projection_dim": 16}
    fields = {key: config[key] for key in config if not key.startswith("_") and key != "patch_size"}
    FluxTransformer2DModel(**fields).save_pretrained(root / "lean" / "transformer")
    shutil.copytree(flux.folder("schnell") / "scheduler", root / "lean" / "scheduler")
    index = read_fields(root / "base" / "model_index.json")
    kept = {part: index[part] for part in ("tokenizer", "text_encoder", "vae")}
    kept |= {"transformer": ["diffusers", "FluxTransformer2DModel"], "_class_name": "FluxPipeline"}
    kept["scheduler"] = ["diffusers", "FlowMatchEulerDiscreteScheduler"]
    write_json(root / "lean" / "model_index.json", kept)
    write_json(root / "lean" / "ldm.json", {"parts_of": "base", "steps": 6, "guidance": 2.0, "max_sequence_length": 12})
    return root / "lean"


def test_parts_that_a_folder_lacks_are_those_of_the_one_that_it_names(lean, tmp_path):
    pipe, base = load(lean), load(lean.parent / "base")
    assert_same(state(pipe.vae), state(base.vae))
    assert_same(state(pipe.text_encoder), state(base.text_encoder))
    assert pipe.text_encoder_2 is None and pipe.tokenizer.ids == base.tokenizer.ids
    assert (pipe.defaults.steps, pipe.defaults.max_sequence_length, pipe.defaults.sigmas) == (6, 12, "even")
    report = inspect(lean)
    assert report.sound and [part.name for part in report.parts] == ["text_encoder", "transformer", "vae"]
    assert report.what.startswith("a model in the manner of FLUX.1") and "16 of OpenAI's CLIP" in report.reason
    convert(lean, tmp_path / "whole")  # which has all its parts
    assert (tmp_path / "whole" / "vae" / "config.json").is_file()
    assert "parts_of" not in read_fields(tmp_path / "whole" / "ldm.json")
    again = load(tmp_path / "whole")
    assert_same(state(pipe.transformer), state(again.transformer))
    assert (again.defaults, again.text_encoder_2) == (pipe.defaults, None)
    convert(lean, tmp_path / "one.safetensors")
    assert_same(state(pipe.text_encoder), state(load(tmp_path / "one.safetensors").text_encoder))


@pytest.mark.parametrize("name", ["../base", "..", "/etc", "a/b", ".hidden", "", 5, "lean", "x" * 101, "b\\c"])
def test_only_a_bare_name_says_whose_parts_they_are(lean, tmp_path, name):
    shutil.copytree(lean, tmp_path / "lean")
    shutil.copytree(lean.parent / "base", tmp_path / "base")
    rewrite(tmp_path / "lean" / "ldm.json", parts_of=name)
    with pytest.raises(LDMError, match="must be the bare name of another model's folder"):
        load(tmp_path / "lean")
    assert not inspect(tmp_path / "lean").sound


def test_an_embedded_model_s_parts_are_found_anywhere_and_unknown_ones_are_named(lean, tmp_path):
    shutil.copytree(lean, tmp_path / "lean")
    with pytest.raises(
        LDMError, match="its other parts are those of 'base', and there is no such model: put its folder"
    ):
        load(tmp_path / "lean")
    rewrite(tmp_path / "lean" / "ldm.json", parts_of="scenes")
    checkpoint = open_folder(tmp_path / "lean", None, "transformers")
    assert checkpoint.configs["vae"] == load("scenes").vae.config
    with pytest.raises(LDMError, match="the text encoder speaks vectors of 128 numbers, the transformer reads 16"):
        check_fit(checkpoint)


def test_ldm_json_is_read_as_strictly_as_ever(lean, tmp_path):
    shutil.copytree(lean, tmp_path / "lean")
    rewrite(tmp_path / "lean" / "ldm.json", parts_off="base")
    with pytest.raises(LDMError, match="a field that ldm doesn't know: 'parts_off'"):
        read_schedule(tmp_path / "lean")


# ------------------------------------------------------------------------------------------------ the authors' files


def look(shapes, metadata=None, dtype="BF16"):
    entries = {name: Entry(name, dtype, tuple(shape), Path(PLACE)) for name, shape in shapes.items()}
    return recognise.recognise(entries, PLACE, metadata)


def bare(name, prefix=""):
    """Keys and shapes of a published transformer's file."""
    config = configs_of(name, "transformer")["transformer"]
    ours = names.shapes("transformer", config)
    return {o.name: o.stored(ours[key]) for key, o in names.origins("transformer", config, prefix).items()}


@pytest.mark.parametrize("file", ["flux-dev", "flux-schnell"])
def test_the_authors_transformer_becomes_diffusers_row_by_row(file):
    """At full size, of each matrix its first column: names and rows are all that the way there and back moves."""
    theirs = {key: shape[:1] + (1,) * (len(shape) - 1) for key, shape in original_keys()[file].items()}
    start, drawn = 0, {}
    for key, shape in theirs.items():
        drawn[key] = torch.arange(start, start := start + shape[0]).reshape(shape)  # no number stands twice
    origins = names.origins("transformer", configs_of(file, "transformer")["transformer"], "")
    ours = {key: origin.take(drawn[origin.name]) for key, origin in origins.items()}
    assert_same(ours, converters.convert_flux_transformer_checkpoint_to_diffusers(dict(drawn)))
    assert_same(names.to_original(ours, origins), drawn)
    assert sum(tensor.shape[0] for tensor in ours.values()) == start  # no row is read twice, none is left


@pytest.mark.parametrize("name, prefix", [
    *((name, "") for name in PUBLISHED), ("flux-dev", "model.diffusion_model."), ("flux-schnell", "diffusion_model."),
])  # fmt: skip
def test_published_transformers_are_recognised(name, prefix):
    found = look(bare(name, prefix))
    found.check(PLACE)
    assert found.kind == "transformer" and [each.name for each in found.candidates] == [name]
    assert found.lacks == ("text_encoder", "text_encoder_2", "vae")
    title = ARCHITECTURES[name].title
    assert found.reason.startswith(f"a transformer of {title}: it reads {found.configs['transformer'].in_channels} num")
    assert ("the guidance scale" in found.reason) == (name != "flux-schnell")
    with pytest.raises(
        LDMError,
        match=f"is a transformer of {title}: .* and no whole model: it lacks the text encoder "
        "and the second text encoder and the VAE; take these from another FLUX.1: parts_of=FOLDER",
    ):
        found.check_pipeline(PLACE)  # fmt: skip


def test_the_parameters_are_as_many_as_published():
    def count(part, name="flux-dev"):
        return sum(torch.Size(shape).numel() for shape in names.shapes(part, configs_of(name, part)[part]).values())

    assert (
        round(count("transformer") / 1e6, 1) == 11901.4 and round(count("transformer", "flux-schnell") / 1e6) == 11891
    )
    assert round(count("text_encoder_2") / 1e6) == 4762 and round(count("vae") / 1e6, 1) == 83.8
    assert count("transformer", "flux-fill") - count("transformer") == (384 - 64) * 3072
    assert count("transformer", "flux-canny") - count("transformer") == 64 * 3072


def test_diffusers_layout_in_a_file_is_recognised():
    for prefix in ("", "transformer."):
        shapes = names.shapes("transformer", configs_of("flux-dev", "transformer")["transformer"])
        found = look({prefix + key: shape for key, shape in shapes.items()})
        found.check(PLACE)
        assert found.kind == "transformer" and found.parts["transformer"] == (prefix, "diffusers")


def test_what_a_transformer_lacks_or_has_too_much_is_told():
    keys = bare("flux-dev")
    less = {key: shape for key, shape in keys.items() if key != "single_blocks.37.linear2.bias"}
    with pytest.raises(LDMError, match=r"missing single_blocks.37.linear2.bias"):
        look(less).check(PLACE)
    with pytest.raises(LDMError, match=r"unknown 'double_blocks.19.x'"):
        look(keys | {"double_blocks.19.x": (3,)}).check(PLACE)
    with pytest.raises(LDMError, match=re.escape("img_in.weight is (3072, 96) instead of (3072, 64)")):
        look(keys | {"img_in.weight": (3072, 96)}).check(PLACE)
    found = look({key: tuple(n + 1 for n in shape) for key, shape in keys.items()})
    assert found.kind == "unknown" and "a transformer whose first layer is (3073, 65)" in found.reason


def test_quantised_and_kontext_files_are_refused():
    with pytest.raises(LDMError, match=r"it is quantised \(.* is F8_E4M3\): take float16, bfloat16 or float32 weights"):
        look(bare("flux-dev"), dtype="F8_E4M3").check(PLACE)
    for told in ({"modelspec.architecture": "Flux.1-dev-Kontext"}, {"modelspec.title": "flux1-kontext-dev"}):
        with pytest.raises(LDMError, match=r"its metadata call it a FLUX.1 Kontext"):
            look(bare("flux-dev"), told).check(PLACE)
    look(bare("flux-dev"), {"modelspec.title": "flux1-dev"}).check(PLACE)


def test_all_parts_in_one_file_as_comfyui_has_them():
    configs, keys = configs_of("flux-dev"), {}
    for part, prefix in names.prefixes(configs).items():
        ours = names.shapes(part, configs[part])
        keys |= {o.name: o.stored(ours[key]) for key, o in names.origins(part, configs[part], prefix).items()}
    t5 = "text_encoders.t5xxl.transformer."
    beside = {"text_encoders.clip_l.logit_scale": (), "text_encoders.t5xxl.logit_scale": ()}
    beside |= {"text_encoders.clip_l.transformer.text_projection.weight": (768, 768)}
    beside |= {f"{t5}encoder.embed_tokens.weight": (32128, 4096)}
    found = look(keys | beside)
    found.check_pipeline(PLACE)
    assert found.kind == "pipeline" and found.architecture.name == "flux-dev" and found.configs == {
        part: configs[part] for part in found.configs
    }  # fmt: skip
    assert {name for group in found.passed_over for name in group.names} == beside.keys()
    assert found.reason.startswith("a FLUX.1-dev: its transformer reads 64 numbers of a patch, a context of 4096")


def test_a_file_of_real_size_is_inspected_by_its_header(tmp_path):
    report = inspect(sparse(tmp_path / "x.safetensors", {key: list(shape) for key, shape in bare("flux-fill").items()}))
    assert report.sound and report.what == "a transformer of FLUX.1 Fill"
    assert report.parts[0].parameters == 11_901_408_320 + 320 * 3072
    assert (
        "told to the transformer" in report.facts["guidance"] and "50 steps, guidance 30" in report.facts["draws with"]
    )
    assert (
        report.use[0].startswith('ldm generate "a lighthouse at dusk" --model ') and " --parts-of FLUX" in report.use[0]
    )
    assert report.warnings == (
        "It lacks the text encoder and the second text encoder and the VAE: these are taken from another FLUX.1 "
        "(--parts-of).",
    )
    vae = inspect(sparse(tmp_path / "ae.safetensors", {k: list(s) for k, s in original_keys()["flux-vae"].items()}))
    assert vae.sound and vae.facts["latents"] == (
        "16 channels, one for 8 x 8 pixels, scaled by 0.3611 after 0.1159 is taken away"
    )


# ------------------------------------------------------------------------------------------------ there and back


@pytest.mark.parametrize("name", ["dev", "schnell"])
def test_a_folder_becomes_a_file_and_a_folder_again(flux, tmp_path, name, capsys):
    written = convert(flux.folder(name), tmp_path / "one.safetensors")
    assert written.parts == ("text_encoder", "text_encoder_2", "transformer", "vae")
    assert [path.name for path in written.beside] == ["one.tokenizer", "one.tokenizer_2"]
    keys = load_file(tmp_path / "one.safetensors").keys()
    assert (
        "model.diffusion_model.double_blocks.1.txt_attn.qkv.bias" in keys and "vae.decoder.mid.attn_1.q.weight" in keys
    )
    assert "text_encoders.t5xxl.transformer.encoder.block.1.layer.0.SelfAttention.o.weight" in keys
    assert_same_model(load(tmp_path / "one.safetensors"), flux.ours(name))
    convert(tmp_path / "one.safetensors", tmp_path / "again")
    assert_same_model(load(tmp_path / "again"), flux.ours(name))
    capsys.readouterr()
    theirs = FluxPipeline.from_pretrained(tmp_path / "again", local_files_only=True)
    assert_same(theirs.transformer.state_dict(), flux.reference(name).transformer.state_dict())
    assert theirs.scheduler.config.use_dynamic_shifting == flux.reference(name).scheduler.config.use_dynamic_shifting
    ids = theirs.tokenizer_2("a red house", padding="max_length", max_length=12).input_ids
    assert ids == flux.ours(name).tokenizer_2("a red house", 12).ids[0].tolist()


def test_a_transformer_alone_goes_there_and_back_and_is_put_beside_others(flux, tmp_path):
    """The file is as the authors', and loaded with another model's other parts."""
    convert(flux.folder("dev"), tmp_path / "alone.safetensors", part="transformer")
    state_dict = load_file(tmp_path / "alone.safetensors")
    assert all(not key.startswith("model.") for key in state_dict) and "final_layer.linear.weight" in state_dict
    convert(tmp_path / "alone.safetensors", tmp_path / "alone")
    theirs = FluxTransformer2DModel.from_pretrained(tmp_path / "alone")
    assert_same(theirs.state_dict(), flux.reference("dev").transformer.state_dict())
    for source in ("alone.safetensors", "alone"):
        pipe = load(tmp_path / source, parts_of=flux.folder("schnell"))
        assert_same(state(pipe.transformer), state(flux.ours("dev").transformer))
        assert_same(state(pipe.text_encoder_2), state(flux.ours("schnell").text_encoder_2))
        assert pipe.defaults == flux.ours("dev").defaults  # of its own kind
    same = load(tmp_path / "alone.safetensors", parts_of=flux.folder("dev"))
    assert_same_model(same, flux.ours("dev"))
    convert(tmp_path / "alone.safetensors", tmp_path / "whole", parts_of=flux.folder("dev"))
    assert_same_model(load(tmp_path / "whole"), flux.ours("dev"))


def test_the_authors_file_brings_the_schedule_of_its_kind(flux, tmp_path, monkeypatch):
    """schnell's folder isn't shifted by the size; a file that is told its guidance is dev's, whose levels are."""
    tiny = {name: replace(ARCHITECTURES[name], parts=published(flux, name)) for name in ("flux-dev", "flux-schnell")}
    monkeypatch.setattr(recognise, "PUBLISHED", tuple(tiny.values()))
    convert(flux.folder("dev"), tmp_path / "mine.safetensors", part="transformer")
    save_file(load_file(tmp_path / "mine.safetensors"), tmp_path / "dev.safetensors")  # without its metadata
    pipe = load(tmp_path / "dev.safetensors", parts_of=flux.folder("schnell"))
    assert pipe.scheduler.use_dynamic_shifting and not flux.ours("schnell").scheduler.use_dynamic_shifting
    config, defaults = find_schedule(tmp_path / "dev.safetensors")
    assert config == pipe.scheduler and defaults == pipe.defaults
    with pytest.raises(LDMError, match="no schedule is known of it"):
        find_schedule(tmp_path / "mine.safetensors")


def published(flux, name):
    configs = flux.ours(name.removeprefix("flux-")).parts()
    return {part: network.config.to_json() for part, network in configs.items()}


@pytest.mark.parametrize("what, sentence", [
    ("whole folder", "is a whole model: leave parts_of out"),
    ("whole file", "it is a whole model, so leave parts_of out"),
    ("vae", "that is no transformer of FLUX alone, so leave parts_of out"),
    ("vae's folder", "holds no transformer of FLUX alone: leave parts_of out"),
    ("home is a file", "parts_of must name a FLUX.1's folder, or an address on the hub, and"),
    ("home is another", "scenes is no FLUX.1, whose parts belong to a transformer: name another as parts_of"),
])  # fmt: skip
def test_parts_of_is_for_a_transformer_alone(flux, tmp_path, what, sentence):
    home = flux.folder("dev")
    place = {"whole folder": home, "vae's folder": home / "vae"}.get(what, tmp_path / "file.safetensors")
    if not place.is_dir():
        part = {"whole file": None, "vae": "vae"}.get(what, "transformer")
        convert(home, place, part=part)
    home = {"home is a file": place, "home is another": "scenes"}.get(what, home)
    with pytest.raises(LDMError, match=re.escape(sentence)):
        load(place, parts_of=home)


def test_a_file_without_a_tokenizer_of_t5_says_what_to_do(flux, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    convert(flux.folder("dev"), tmp_path / "one.safetensors")
    own = tmp_path / "one.tokenizer_2"
    own.rename(tmp_path / "tokenizer_2")
    lines = []
    open_single(tmp_path / "one.safetensors", None, "transformers", say=lines.append)
    assert any("holds no tokenizer of T5; taking" in line for line in lines)
    (tmp_path / "tokenizer_2").rename(tmp_path / "elsewhere")
    with pytest.raises(
        LDMError, match="holds no tokenizer of T5, and none is on this machine: put the folder tokenizer_2"
    ):
        load(tmp_path / "one.safetensors")
    report = inspect(tmp_path / "one.safetensors")
    assert report.sound and any("no tokenizer of T5" in line for line in report.warnings)
    cached = tmp_path / "cache" / "models--a--flux" / "snapshots" / "1" / "tokenizer_2"
    shutil.copytree(tmp_path / "elsewhere", cached)
    (cached / "spiece.model").touch()  # by which a cache's T5 is known from other models' second tokenizers
    assert load(tmp_path / "one.safetensors").tokenizer_2.ids == flux.ours("dev").tokenizer_2.ids
    tokens = read_fields(cached / "tokenizer.json")
    tokens["model"]["vocab"] += [[f"▁{n}", -9.0] for n in range(60)]
    write_json(cached / "tokenizer.json", tokens)
    with pytest.raises(LDMError, match="writes 100 kinds of tokens, and T5 reads 40"):
        load(tmp_path / "one.safetensors")


def test_a_half_precision_folder_is_read_in_its_own_bits(flux, tmp_path):
    convert(flux.folder("dev"), tmp_path / "half", dtype="bfloat16")
    kept = load_file(tmp_path / "half" / "transformer" / "diffusion_pytorch_model.safetensors")
    assert {tensor.dtype for tensor in kept.values()} == {torch.bfloat16}
    convert(tmp_path / "half", tmp_path / "half.safetensors")
    convert(tmp_path / "half.safetensors", tmp_path / "again")
    again = load_file(tmp_path / "again" / "transformer" / "diffusion_pytorch_model.safetensors")
    assert_same(kept, again)


# ------------------------------------------------------------------------------------------------ said of it


def test_a_folder_is_inspected(flux, capsys):
    assert main(["inspect", str(flux.folder("fill"))]) == 0
    page = capsys.readouterr().out
    for line in (
        "a model in the manner of FLUX.1 for filling holes in pictures, of its own widths",
        "FlowMatchEulerDiscreteScheduler: flow, straight lines from noise to picture, shifted by the number of patches",
        "euler, 50 steps, guidance 30, 512 tokens of a prompt",
        "--image photo.png --mask mask.png",
        "20 of T5 and 24 of OpenAI's CLIP",
    ):
        assert line in page, line
    assert "not told to the transformer" in inspect(flux.folder("schnell")).facts["guidance"]
    for part, kind in (("transformer", "transformer"), ("text_encoder_2", "text_encoder_2")):
        report = inspect(flux.folder("dev") / part)
        assert report.sound and report.kind == kind


def test_the_schedule_of_a_folder_is_that_of_its_own_size(flux, lean, capsys):
    """mu of 4096 patches is 1.15 (dev): sigma = e^mu / (e^mu + 1/s - 1)."""
    main(["schedule", "--model", str(flux.folder("dev")), "--steps", "4"])
    page = capsys.readouterr().out
    assert "sigmas even" in page and "4096 patches" in page and "0.904531" in page and "0.512844" in page
    main(["schedule", "--model", str(flux.folder("dev")), "--steps", "4", "--tokens", "256"])
    assert "0.622459" in capsys.readouterr().out  # mu 0.5, of half the way
    main(["schedule", "--model", str(flux.folder("schnell"))])
    page = capsys.readouterr().out
    assert "4 steps" in page and "0.750000" in page and "patches" not in page
    main(["schedule", "--model", str(lean)])
    assert "sigmas even, sampler euler, 6 steps" in capsys.readouterr().out


def test_the_task_and_the_presets_go_by_the_channels():
    for name, task in zip(PUBLISHED, ("text", "text", "fill", "control"), strict=True):
        assert task_of_parts(configs_of(name)) == task
    dev, schnell = (configs_of(name, "transformer")["transformer"] for name in PUBLISHED[:2])
    assert (family_defaults(dev).steps, family_defaults(schnell).steps) == (28, 4)


def test_the_hub_s_folder_is_fetched_without_what_is_not_read():
    index = {part: ["transformers", cls] for part, cls in {
        "tokenizer": "CLIPTokenizer", "tokenizer_2": "T5TokenizerFast", "text_encoder": "CLIPTextModel",
        "text_encoder_2": "T5EncoderModel", "transformer": "FluxTransformer2DModel", "vae": "AutoencoderKL",
        "scheduler": "FlowMatchEulerDiscreteScheduler",
    }.items()} | {"_class_name": "FluxPipeline"}  # fmt: skip
    shards = [f"transformer/diffusion_pytorch_model-0000{n}-of-00003.safetensors" for n in (1, 2, 3)]
    t5 = [f"text_encoder_2/model-0000{n}-of-00002.safetensors" for n in (1, 2)]
    tables = {
        "model_index.json": index,
        "transformer/diffusion_pytorch_model.safetensors.index.json": {
            "weight_map": dict(zip("abc", map(plain, shards), strict=True))
        },
        "text_encoder_2/model.safetensors.index.json": {"weight_map": dict(zip("ab", map(plain, t5), strict=True))},
    }
    read = [
        *tables, *shards, *t5, "scheduler/scheduler_config.json", "text_encoder/config.json",
        "text_encoder/model.safetensors", "text_encoder_2/config.json", "tokenizer/merges.txt", "tokenizer/vocab.json",
        "tokenizer_2/spiece.model", "tokenizer_2/tokenizer.json", "transformer/config.json", "vae/config.json",
        "vae/diffusion_pytorch_model.safetensors",
    ]  # fmt: skip
    idle = ["flux1-dev.safetensors", "ae.safetensors", "README.md", "dev_grid.jpg"]

    def choose(names, **other):
        return wanted.choose(names, (tables | {"model_index.json": index | other}).__getitem__, "org/flux")

    assert choose([*read, *idle]) == sorted(read)
    with pytest.raises(LDMError, match=r"lacks tokenizer_2/tokenizer.json and spiece.model"):
        choose([name for name in [*read, "tokenizer_2/tokenizer_config.json"] if name not in TOKENIZERS])
    with pytest.raises(LDMError, match=r"is a FLUX.1 Kontext"):
        choose(read, _class_name="FluxKontextPipeline")


TOKENIZERS = ("tokenizer_2/spiece.model", "tokenizer_2/tokenizer.json")


def plain(path):
    return path.rpartition("/")[2]
