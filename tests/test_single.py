"""Single files in the original layout: they draw what the folder draws, and what is decided about them is said.

The tiny models' shapes are nobody's: here they count among the published ones (`known`).
"""

import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from reference import assert_close
from tiny_pairs import PROMPT, controlnets
from tiny_tasks import TASKS

import ldm
from ldm import loading
from ldm.checkpoints import names, places, prediction, recognise, single
from ldm.checkpoints.architectures import Architecture
from ldm.checkpoints.checkpoint import NETWORKS
from ldm.checkpoints.folder import open_folder
from ldm.errors import LDMError
from ldm.io.folders import folder_hash, read_fields
from ldm.io.weights import save_weights

FEW = {"steps": 2, "width": 64, "height": 64, "seed": 3}
PADS = {"sd1": ("<|endoftext|>",), "sd2": ("!",), "sdxl": ("<|endoftext|>", "!"), "refiner": ("!",)}


def architecture_of(folder, name) -> Architecture:
    """What the folder's files say, as if it were published."""
    parts = {part: read_fields(folder / part / "config.json") for part in NETWORKS if (folder / part).is_dir()}
    index = {k: v for k, v in read_fields(folder / "model_index.json").items() if not isinstance(v, list)}
    scheduler = read_fields(folder / "scheduler" / "scheduler_config.json")
    low = folder / "low_res_scheduler" / "scheduler_config.json"
    pads = PADS.get(name) or PADS[TASKS[name][1]]
    index.pop("_name_or_path", None)
    return Architecture(name, parts, scheduler, pads, index, read_fields(low) if low.exists() else None, f"tiny {name}")


def tensors_of(folder) -> dict[str, torch.Tensor]:
    """A folder's tensors under their original names."""
    checkpoint, found = open_folder(folder, None, "transformers"), {}
    prefixes = names.prefixes(checkpoint.configs)
    for part, config in checkpoint.configs.items():
        source, rename = checkpoint.weights(part), getattr(NETWORKS[part].network, "rename", lambda key: key)
        ours = {key: source.read(name).clone() for name in source.entries if (key := rename(name))}
        found |= names.to_original(ours, names.origins(part, config, prefixes[part]))
    return found


def write(folder, path, tensors=None, metadata=None, dtype=None):
    """A single file of the folder's tensors, and its tokenizers beside it."""
    save_weights(tensors_of(folder) if tensors is None else tensors, path, dtype, metadata)
    for name in ("tokenizer", "tokenizer_2"):
        if (folder / name).is_dir():
            shutil.copytree(folder / name, path.with_name(f"{path.stem}.{name}"))
    return path


@pytest.fixture
def known(monkeypatch):
    """Make architectures count among those that are published: alone, so that nothing else is tried."""
    return lambda *architectures: monkeypatch.setattr(recognise, "PUBLISHED", architectures)


@pytest.fixture
def sd1(models, tmp_path, known):
    """(The folder, the same in a file)"""
    folder = models.folder("sd1")
    known(architecture_of(folder, "sd1"))
    return folder, write(folder, tmp_path / "one.safetensors")


def equal(one, other) -> bool:
    """Whether two pipelines have the same parts, bit for bit."""
    same = one.parts().keys() == other.parts().keys()
    for name, part in one.parts().items():
        mine, theirs = part.state_dict(), other.parts()[name].state_dict()
        same &= mine.keys() == theirs.keys() and all(torch.equal(mine[key], theirs[key]) for key in mine)
        assert sum(tensor.abs().sum() for tensor in mine.values()) > 1
    return bool(same)


# ---------------------------------------------------------------------------------------------- whole models


@pytest.mark.parametrize("name", ["sd1", "sd2", "sdxl", "refiner"])
def test_a_single_file_draws_what_its_folder_draws(models, tmp_path, known, name):
    folder = models.folder(name)
    known(architecture_of(folder, name))
    file = write(folder, tmp_path / "one.safetensors")
    ours, theirs = ldm.load(file, prediction_type=models.ours(name).scheduler.prediction_type), models.ours(name)
    assert equal(ours, theirs) and ours.scheduler == theirs.scheduler and ours.told_sizes == theirs.told_sizes
    assert ours.zero_negative == theirs.zero_negative and ours.defaults == theirs.defaults
    for mine, other in ((ours.tokenizer, theirs.tokenizer), (ours.tokenizer_2, theirs.tokenizer_2)):
        assert (mine is None) == (other is None) and (mine is None or torch.equal(mine(PROMPT).ids, other(PROMPT).ids))
    if name != "refiner":
        drawn = ours(PROMPT, **FEW).x0
        assert torch.equal(drawn, theirs(PROMPT, **FEW).x0) and drawn.std() > 0.1


@pytest.mark.parametrize("name", TASKS)
def test_single_files_of_every_task_have_the_folders_parts(task_models, tmp_path, known, name):
    folder = task_models.folder(name)
    known(architecture_of(folder, name))
    ours = ldm.load(write(folder, tmp_path / "one.safetensors"), prediction_type="v_prediction")
    theirs = task_models.ours(name)
    assert equal(ours, theirs) and ours.task == theirs.task and ours.low_res == theirs.low_res
    assert ours.max_noise_level == theirs.max_noise_level


def test_a_pickle_is_refused_and_read_if_allowed(models, sd1, tmp_path):
    folder, _ = sd1
    tensors = tensors_of(folder) | {"model_ema.decay": torch.tensor(0.9999)}
    path = tmp_path / "one.ckpt"
    torch.save({"state_dict": tensors, "global_step": 470_000, "epoch": 3}, path)
    with pytest.raises(LDMError, match=r"one\.ckpt is a pickle.*allow_pickle"):
        ldm.load(path)
    assert equal(ldm.load(path, prediction_type="epsilon", allow_pickle=True), models.ours("sd1"))
    renamed = path.rename(tmp_path / "two.safetensors")
    (tmp_path / "one.tokenizer").rename(tmp_path / "two.tokenizer")
    with pytest.raises(LDMError, match=r"two\.safetensors is a pickle.*allow_pickle"):
        ldm.load(renamed)


def test_what_was_decided_is_said(sd1, capsys):
    ldm.load(sd1[1], prediction_type="epsilon")
    said = capsys.readouterr().err
    assert f"{sd1[1]} is a tiny sd1: its UNet reads 4 channels and a context of 24 numbers." in said


def test_what_takes_no_part_is_passed_over_by_name(sd1, capsys):
    folder, file = sd1
    more = {"betas": torch.ones(1000), "alphas_cumprod": torch.ones(1000)}
    more["cond_stage_model.transformer.text_model.embeddings.position_ids"] = torch.arange(77)[None]
    save_weights(tensors_of(folder) | more, file)
    ldm.load(file, prediction_type="epsilon")
    said = capsys.readouterr().err
    assert "2 tensors are passed over, tables of the noise schedule (" in said
    assert "1 tensor is passed over, position numbers (cond_stage_model.transformer.text_model.emb" in said


def test_what_is_of_nothing_is_refused_by_name(sd1):
    folder, file = sd1
    save_weights(tensors_of(folder) | {"model.diffusion_model.input_blocks.0.0.extra": torch.ones(1)}, file)
    with pytest.raises(LDMError, match=r"unknown 'model\.diffusion_model\.input_blocks\.0\.0\.extra'"):
        ldm.load(file, prediction_type="epsilon")


def test_what_is_missing_is_named(sd1):
    folder, file = sd1
    tensors = tensors_of(folder)
    del tensors["first_stage_model.decoder.mid.attn_1.k.weight"]
    save_weights(tensors, file)
    with pytest.raises(LDMError, match=r"missing first_stage_model\.decoder\.mid\.attn_1\.k\.weight"):
        ldm.load(file, prediction_type="epsilon")


def test_a_part_that_is_missing_is_named(sd1):
    folder, file = sd1
    save_weights({k: v for k, v in tensors_of(folder).items() if not k.startswith("first_stage")}, file)
    with pytest.raises(LDMError, match="no whole model: it lacks the VAE"):
        ldm.load(file)


def test_moving_averages_are_taken_when_asked_for(models, sd1, capsys):
    folder, file = sd1
    plain = tensors_of(folder)
    averaged = {
        "model_ema." + name.removeprefix("model.").replace(".", ""): tensor * 2
        for name, tensor in plain.items()
        if name.startswith("model.")
    }
    with pytest.raises(LDMError, match="holds no moving averages"):
        ldm.load(file, variant="ema")
    save_weights(plain | averaged | {"model_ema.decay": torch.ones(1)}, file)
    assert equal(ldm.load(file, prediction_type="epsilon"), models.ours("sd1"))
    count = len(averaged)
    assert f"{count} tensors are passed over, moving averages of the weights" in capsys.readouterr().err
    unet = ldm.load(file, variant="ema", prediction_type="epsilon").unet.state_dict()
    assert "the UNet's moving averages are taken instead of its weights" in capsys.readouterr().err
    assert all(torch.equal(unet[key], 2 * tensor) for key, tensor in models.ours("sd1").unet.state_dict().items())


def test_a_folders_variant_is_none_of_a_file(sd1, capsys):
    ldm.load(sd1[1], variant="fp16", prediction_type="epsilon")
    assert "'fp16' is passed over; a single file's only one is 'ema'" in capsys.readouterr().err


def test_the_hash_of_a_file_is_that_of_its_bytes(sd1, tmp_path):
    copy = shutil.copy(sd1[1], tmp_path / "copy")
    assert folder_hash(sd1[1]) == folder_hash(copy) != folder_hash(sd1[0]) and len(folder_hash(copy)) == 16


# ---------------------------------------------------------------------------------------------- what it predicts


@pytest.fixture
def answers(monkeypatch):
    """Let the network's answer to noise have that correlation with it."""
    return lambda value: monkeypatch.setattr(prediction, "answer", lambda unet: value)


@pytest.mark.parametrize(
    ("correlation", "said"), [(0.99, "epsilon"), (0.81, "epsilon"), (0.39, "v_prediction"), (-0.7, "v_prediction")]
)
def test_the_prediction_is_told_by_the_answer_to_noise(sd1, answers, capsys, correlation, said):
    answers(correlation)
    assert ldm.load(sd1[1]).scheduler.prediction_type == said
    assert f"prediction_type {said}, for its answer to pure noise has a corr" in capsys.readouterr().err


def test_without_an_answer_the_usual_is_taken_and_said(sd1, answers, capsys):
    answers(0.6)
    assert ldm.load(sd1[1]).scheduler.prediction_type == "epsilon"
    said = capsys.readouterr().err
    assert "prediction_type epsilon, for that of every published model of its kind (neither its metadata" in said
    assert "correlation of 0.60 with it, which speaks for neither" in said


@pytest.fixture
def sd2(models, tmp_path, known):
    """Stable Diffusion 2, of which two are published that differ in what no shape shows."""
    folder = models.folder("sd2")
    one = architecture_of(folder, "sd2")
    unet = one.parts["unet"] | {"sample_size": 5}
    scheduler = one.scheduler | {"prediction_type": "epsilon", "steps_offset": 7}
    known(one, replace(one, name="sd2-base", parts=one.parts | {"unet": unet}, scheduler=scheduler))
    return folder, tmp_path / "two.safetensors"


def test_where_several_are_published_nothing_is_guessed(sd2, answers):
    write(*sd2)
    answers(0.6)
    with pytest.raises(LDMError, match=r"doesn't say whether it predicts noise or velocity.*--prediction-type"):
        ldm.load(sd2[1])


@pytest.mark.parametrize(("asked", "size", "offset"), [("v_prediction", 8, 1), ("epsilon", 5, 7)])
def test_with_the_prediction_come_scheduler_and_size(sd2, asked, size, offset):
    write(*sd2)
    pipe = ldm.load(sd2[1], prediction_type=asked)
    assert (pipe.scheduler.prediction_type, pipe.unet.config.sample_size) == (asked, size)
    assert pipe.scheduler.steps_offset == offset


@pytest.mark.parametrize(
    ("metadata", "marks", "said"),
    [
        ({"modelspec.prediction_type": "epsilon"}, (), "epsilon"),
        ({"modelspec.prediction_type": "v"}, (), "v_prediction"),
        (None, ("v_pred",), "v_prediction"),
        (None, ("v_pred", "ztsnr"), "v_prediction"),
        ({"modelspec.prediction_type": "epsilon"}, ("v_pred",), "v_prediction"),  # whoever wrote the mark meant it
    ],
)
def test_metadata_and_marks_say_what_is_predicted(sd2, answers, capsys, metadata, marks, said):
    answers(0.6)  # which would not do
    write(*sd2, tensors=tensors_of(sd2[0]) | {mark: torch.empty(0) for mark in marks}, metadata=metadata)
    scheduler = ldm.load(sd2[1]).scheduler
    assert (scheduler.prediction_type, scheduler.rescale_betas_zero_snr) == (said, "ztsnr" in marks)


@pytest.mark.parametrize(("steps", "size"), [(875_000, 5), (110_000, None)])
def test_a_pickles_count_of_steps_tells_the_base_of_stable_diffusion_2(sd2, answers, steps, size):
    answers(0.6)
    torch.save({"state_dict": tensors_of(sd2[0]), "global_step": steps}, sd2[1])
    for name in ("tokenizer",):
        shutil.copytree(sd2[0] / name, sd2[1].with_name(f"{sd2[1].stem}.{name}"))
    if size is None:
        with pytest.raises(LDMError, match="doesn't say whether"):
            ldm.load(sd2[1], allow_pickle=True)
    else:
        assert ldm.load(sd2[1], allow_pickle=True).unet.config.sample_size == size


def test_what_was_asked_for_counts_and_is_known(sd1, models, capsys):
    assert ldm.load(sd1[0], prediction_type="v_prediction").scheduler.prediction_type == "v_prediction"
    assert "its files say epsilon, and v_prediction is taken as asked" in capsys.readouterr().err
    for place in sd1:
        with pytest.raises(LDMError, match=r"no prediction_type 'vpred': .*Did you mean 'v_prediction'\?"):
            ldm.load(place, prediction_type="vpred")


@pytest.mark.parametrize("name", ["sd1", "sdxl"])
def test_the_answer_to_noise_of_networks_that_are_known(models, name):
    """A network that returns its input answers with the noise; one that returns another constant, with none of it."""
    unet = models.ours(name).unet
    real = unet.forward
    try:
        unet.forward = lambda x, t, context, extras: x
        assert prediction.measure(unet) == ("epsilon", pytest.approx(1.0))
        unet.forward = lambda x, t, context, extras: real(x, t, context, extras) * 0 + torch.arange(32.0)
        kind, correlation = prediction.measure(unet)
        assert kind == "v_prediction" and abs(correlation) < 0.1
    finally:
        del unet.forward
    assert -1 <= prediction.answer(unet) <= 1


def test_the_embedded_model_says_that_it_predicts_noise():
    pipe = ldm.load("scenes")
    kind, correlation = prediction.measure(pipe.unet)
    assert (kind, pipe.scheduler.prediction_type) == ("epsilon", "epsilon") and correlation > 0.99


# ---------------------------------------------------------------------------------------------- parts alone


def test_a_vae_alone_takes_the_place_of_the_pipelines(models, tmp_path, known):
    folder = models.folder("sd1")
    one = architecture_of(folder, "sd1")
    other = one.parts | {"vae": one.parts["vae"] | {"scaling_factor": 0.5}}
    known(replace(one, name="other", parts=other), one)
    pipe = models.ours("sd1")
    whole = tensors_of(folder)
    bare = {k.removeprefix("first_stage_model."): 2 * v for k, v in whole.items() if k.startswith("first_stage_model.")}
    for tensors in (bare, {f"first_stage_model.{k}": v for k, v in bare.items()}):
        save_weights(tensors | {"loss.logvar": torch.ones(1)}, tmp_path / "vae.safetensors")
        vae = ldm.load_vae(tmp_path / "vae.safetensors", pipe)
        assert vae.config == pipe.vae.config
        found = vae.state_dict()
        assert all(torch.equal(found[k], 2 * v) for k, v in pipe.vae.state_dict().items())
    with pytest.raises(LDMError, match=r"VAE with scaling_factor 0\.5, and the pipeline\'s has 0\.18215"):
        changed = shutil.copytree(folder / "vae", tmp_path / "changed")
        fields = (changed / "config.json").read_text()
        assert "0.18215" in fields
        (changed / "config.json").write_text(fields.replace("0.18215", "0.5"))
        ldm.load_vae(changed, pipe)
    assert equal_states(ldm.load_vae(folder, pipe), pipe.vae)  # out of a whole model


def test_a_controlnet_alone_is_read(models, tmp_path, known):
    _, ours = controlnets(models, "sd1")
    one = architecture_of(models.folder("sd1"), "sd1")
    known(replace(one, parts=one.parts | {"controlnet": ours.config.to_json()}))
    tensors = names.to_original(ours.state_dict(), names.origins("controlnet", ours.config, "control_model."))
    save_weights(tensors, tmp_path / "net.safetensors")
    net = ldm.load_controlnet(tmp_path / "net.safetensors", models.ours("sd1"))
    assert net.config == ours.config and equal_states(net, ours)
    torch.save(tensors, tmp_path / "net.pth")
    with pytest.raises(LDMError, match="is a pickle"):
        ldm.load_controlnet(tmp_path / "net.pth", models.ours("sd1"))
    assert equal_states(ldm.load_controlnet(tmp_path / "net.pth", models.ours("sd1"), allow_pickle=True), ours)
    with pytest.raises(LDMError, match="was made for another base"):
        ldm.load_controlnet(tmp_path / "net.safetensors", models.ours("sdxl"))
    with pytest.raises(LDMError, match="there is no vae in it"):
        ldm.load_vae(tmp_path / "net.safetensors", models.ours("sd1"))
    with pytest.raises(LDMError, match="no whole model"):
        ldm.load(tmp_path / "net.safetensors")


def equal_states(one, other) -> bool:
    mine, theirs = one.state_dict(), other.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[key], theirs[key]) for key in mine)


# ---------------------------------------------------------------------------------------------- pickles in folders


def test_folders_of_pickles_are_read_if_allowed(models, tmp_path):
    folder = shutil.copytree(models.folder("sd1"), tmp_path / "old")
    for part, stem in (
        ("unet", "diffusion_pytorch_model"),
        ("vae", "diffusion_pytorch_model"),
        ("text_encoder", "model"),
    ):
        source = open_folder(folder, None, "transformers").weights(part)
        state = {name: source.read(name).clone() for name in source.entries}
        (folder / part / f"{stem}.safetensors").unlink()
        torch.save(state, folder / part / f"{'pytorch_model' if part == 'text_encoder' else stem}.bin")
    with pytest.raises(LDMError, match=r"holds only a pickle \(.*\.bin\).*--allow-pickle"):
        ldm.load(folder)
    assert equal(ldm.load(folder, allow_pickle=True), models.ours("sd1"))


def test_the_schedule_of_a_file_is_told_without_a_tokenizer(sd1, sd2, capsys):
    folder, file = sd2
    save_weights(tensors_of(folder), file)  # and no tokenizer beside it
    config, defaults = loading.find_schedule(file)
    said = capsys.readouterr().err
    assert "what it predicts isn't known (neither its metadata" in said and "those of tiny sd2 (sd2)" in said
    assert config == ldm.load(folder).scheduler and defaults == ldm.load(folder).defaults
    save_weights(tensors_of(folder), file, metadata={single.MODELSPEC: "epsilon"})
    config, _ = loading.find_schedule(file)
    assert (config.prediction_type, config.steps_offset) == ("epsilon", 7)
    assert "isn't known" not in capsys.readouterr().err
    vae = {key: tensor for key, tensor in tensors_of(folder).items() if key.startswith("first_stage_model.")}
    save_weights(vae, file)
    with pytest.raises(LDMError, match="no schedule is known of it"):
        loading.find_schedule(file)


def test_an_address_is_not_fetched_for_its_schedule(monkeypatch):
    monkeypatch.setattr(places.hub, "fetch", lambda *_: pytest.fail("asked the hub"))
    with pytest.raises(LDMError, match="isn't here: `ldm fetch stranger/model`"):
        loading.find_schedule("stranger/model")


def test_single_reads_a_known_word_of_the_metadata_alone(sd1, answers):
    """A word that no trainer writes is no evidence."""
    answers(0.99)
    folder, file = sd1
    save_weights(tensors_of(folder), file, metadata={single.MODELSPEC: "flow-matching"})
    pipe = ldm.load(file)
    assert pipe.scheduler.prediction_type == "epsilon"
    assert_close(pipe(PROMPT, **FEW).x0, ldm.load(folder)(PROMPT, **FEW).x0, 1e-6)


# ---------------------------------------------------------------------------------------------- real weights

REAL = os.environ.get("LDM_WEIGHTS", "")


@pytest.mark.weights
@pytest.mark.skipif(not REAL, reason="LDM_WEIGHTS names no folder")
def test_real_files_have_the_numbers_of_their_folders():
    """Every NAME.safetensors or NAME.ckpt in LDM_WEIGHTS that has a folder NAME in diffusers' format beside it."""
    files = [file for file in sorted(Path(REAL).iterdir()) if file.suffix in (".safetensors", ".ckpt")]
    pairs = [(file, file.with_suffix("")) for file in files if file.with_suffix("").is_dir()]
    assert pairs, f"{REAL} holds no file with a folder of its name"
    for pair in pairs:
        one, other = (loading.open_checkpoint(place, None, "transformers", True) for place in pair)
        assert one.configs.keys() == other.configs.keys()
        for part in one.configs:
            rename = getattr(NETWORKS[part].network, "rename", lambda key: key)
            mine, theirs = one.weights(part), other.weights(part)
            keys = {key: name for name in theirs.entries if (key := rename(name)) is not None}
            assert mine.entries.keys() == keys.keys()
            for key, name in keys.items():
                ours, reference = mine.read(key), theirs.read(name)
                narrow = min(ours.dtype, reference.dtype, key=lambda dtype: dtype.itemsize)
                assert torch.equal(ours.to(narrow), reference.to(narrow)), (pair[0].name, part, key)
