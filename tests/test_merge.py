"""`ldm merge`: every weight is what the formula says, ends and equals are bit for bit, and strangers are named."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from reference import assert_close, normal
from safetensors.torch import load_file, save_file
from tiny import plant
from tiny_pairs import PROMPT, Models

import ldm
from ldm.cli import main
from ldm.convert import convert, open_source
from ldm.errors import LDMError
from ldm.io.folders import read_json, write_json
from ldm.io.headers import read_header
from ldm.merge import Recipe, merge
from ldm.merge.blocks import alphas

PARTS = ("text_encoder", "text_encoder_2", "unet", "vae")
TEXT_LORA, UNET_LORA = "lora_te_text_model_encoder_layers_1_mlp_fc1", "lora_unet_mid_block_attentions_0_proj_in"


def files(folder: Path) -> list[Path]:
    return [path for part in PARTS for path in sorted((folder / part).glob("*.safetensors"))]


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """A folder's, as the safetensors library reads them: "unet.conv_in.weight"."""
    return {
        f"{path.parent.name}.{key.removeprefix('text_model.')}": tensor
        for path in files(folder)
        for key, tensor in load_file(path).items()
    }


@pytest.fixture(scope="module")
def others(models, tmp_path_factory):
    """Another model of the same kind: `others(name, seed)` is its folder."""
    root = tmp_path_factory.mktemp("others")

    def other(name: str, seed: int) -> Path:
        folder = root / f"{name}-{seed}"
        if not folder.exists():
            shutil.copytree(models.folder(name), folder)
            for k, path in enumerate(files(folder)):
                drawn = {
                    key: 0.3 * normal(1000 * seed + 100 * k + i, *tensor.shape)
                    for i, (key, tensor) in enumerate(load_file(path).items())
                }
                save_file(drawn, path, metadata={"format": "pt"})
        return folder

    return other


def changed(folder: Path, target: Path, file: str, **fields) -> Path:
    """A copy of a model's folder with other fields in one of its files."""
    shutil.copytree(folder, target)
    write_json(target / file, read_json(target / file) | fields)
    return target


def loras(tmp_path: Path) -> list[tuple[Path, float]]:
    """Two that have a layer in common."""
    for name, seed in (("one", 1), ("two", 5)):
        factors = {}
        for k, (layer, o, i) in enumerate([(UNET_LORA, 24, 24), (TEXT_LORA, 52, 24)][: 2 if name == "one" else 1]):
            factors |= {f"{layer}.lora_down.weight": normal(seed + k, 3, i)}
            factors |= {f"{layer}.lora_up.weight": normal(seed + k + 9, o, 3), f"{layer}.alpha": torch.tensor(2.0)}
        save_file(factors, tmp_path / f"{name}.safetensors")
    return [(tmp_path / "two.safetensors", 0.8), (tmp_path / "one.safetensors", -0.3)]


# ---------------------------------------------------------------------------------------------------- formulas


@pytest.mark.parametrize(
    "name, difference", [("sd1", True), ("sd2", False), ("sdxl", False), ("sdxl", True), ("refiner", False)]
)
def test_every_weight_is_what_the_formula_says(models, others, name, difference, tmp_path):
    a, b, base = models.folder(name), others(name, 1), others(name, 2)
    blocks = {"unet.up_blocks": 0.6, "unet.up_blocks.1": 0.9, "vae.decoder": 0.1, "text_encoder_2": 0.7}
    if name in ("sd1", "sd2"):
        del blocks["text_encoder_2"]
    recipe = Recipe(a, b, 0.3, base if difference else None, blocks)
    merged = merge(recipe, tmp_path / "made")
    one, two, third, made = (tensors(each) for each in (a, b, base, tmp_path / "made"))
    assert one.keys() == made.keys()
    sizes = {}
    for key, tensor in made.items():
        alpha = 0.3
        for prefix, other in (("unet.up_blocks.", 0.6), ("unet.up_blocks.1.", 0.9), ("vae.decoder.", 0.1)):
            alpha = other if key.startswith(prefix) else alpha
        alpha = 0.7 if key.startswith("text_encoder_2.") else alpha
        x, y, z = (each[key].double() for each in (one, two, third))
        exact = x + alpha * (y - z) if difference else (1 - alpha) * x + alpha * y
        assert_close(tensor.double(), exact, 1e-6, at_least=1e-3)
        part = key.partition(".")[0]
        sums = sizes.setdefault(part, [0.0, 0.0])
        sums[0], sums[1] = sums[0] + (exact - x).square().sum(), sums[1] + x.square().sum()
    assert merged.changes == pytest.approx({part: float((d / w).sqrt()) for part, (d, w) in sizes.items()}, rel=1e-5)
    assert merged.written.source.configs == open_source(a).configs


def test_both_ends_and_equals_are_bit_for_bit(models, others, tmp_path):
    """From a folder and a file to either, where the file has three weights of the text encoder in one tensor."""
    a, b = models.folder("sd2"), tmp_path / "b.safetensors"
    convert(others("sd2", 1), b)
    one, two = tensors(a), tensors(others("sd2", 1))
    for recipe, expected in ((Recipe(a, b, 0), one), (Recipe(a, b, 1), two), (Recipe(a, a, 0.37), one),
                             (Recipe(a, b, 0.37, b), one)):  # fmt: skip
        merge(recipe, tmp_path / "made", overwrite=True)
        made = tensors(tmp_path / "made")
        assert all(torch.equal(made[key], tensor) for key, tensor in expected.items()), recipe
    merge(Recipe(b, a, 0), tmp_path / "again.safetensors")
    again = load_file(tmp_path / "again.safetensors")
    assert again.keys() == load_file(b).keys()
    assert all(torch.equal(again[key], tensor) for key, tensor in load_file(b).items())


def test_types(models, others, tmp_path):
    """Computed in float32 and rounded once, to A's type or the one that is asked for."""
    a, b = tmp_path / "half", others("sd1", 1)
    convert(models.folder("sd1"), a, dtype="float16")
    key = "unet.mid_block.attentions.0.proj_in.weight"
    one, two = tensors(a)[key].float(), tensors(b)[key]
    for dtype, kind in ((None, torch.float16), ("float32", torch.float32)):
        merge(Recipe(a, b, 0.3), tmp_path / "made", dtype, overwrite=True)
        made = tensors(tmp_path / "made")[key]
        assert made.dtype == kind and torch.equal(made, torch.lerp(one, two, 0.3).to(kind))


def test_a_difference_is_added_to_one_that_reads_more(task_models, others, tmp_path):
    """The way to an inpainting model of any model: what the other channels are read by stays."""
    a, b, base = task_models.folder("inpaint"), others("sd1", 1), others("sd1", 2)
    merge(Recipe(a, b, 1.0, base), tmp_path / "made")
    one, two, third, made = (tensors(each)["unet.conv_in.weight"] for each in (a, b, base, tmp_path / "made"))
    assert made.shape[1] == 9 and torch.equal(made[:, 4:], one[:, 4:])
    assert_close(made[:, :4], one[:, :4] + two - third, 1e-6)
    with pytest.raises(LDMError, match=r"reads 9 channels \(inpainting\), the second one's 4 .*--add-difference"):
        merge(Recipe(a, b), tmp_path / "never")
    with pytest.raises(LDMError, match=r"reads 4 channels .*, the second one's 9 channels"):
        merge(Recipe(b, a, 1.0, a), tmp_path / "never")


def test_the_names_of_blocks_elsewhere(models):
    configs = open_source(models.folder("sd1")).configs
    config = configs["unet"]
    found = alphas(0.5, {"IN00": 0.0, "IN04": 0.1, "M00": 0.2, "OUT05": 0.3, "unet.up_blocks": 0.4}, configs)
    known = {  # of two ResNet blocks a level on the way up, one and a resampling on the way down
        "conv_in.weight": 0.0,
        "down_blocks.1.downsamplers.0.conv.weight": 0.1,
        "down_blocks.1.resnets.0.conv1.weight": 0.5,
        "mid_block.resnets.1.conv2.bias": 0.2,
        "up_blocks.2.resnets.1.conv1.weight": 0.3,  # fewer than all of the way up
        "up_blocks.2.attentions.1.proj_in.weight": 0.3,
        "up_blocks.2.resnets.0.conv1.weight": 0.4,
        "time_embedding.linear_1.weight": 0.5,
    }
    assert config.layers_per_block == 1 and len(config.block_out_channels) == 3
    assert {key: found["unet", key] for key in known} == known
    assert found["vae", "encoder.conv_in.weight"] == 0.5


# ---------------------------------------------------------------------------------------------------- LoRAs


def test_loras_are_what_add_lora_makes_of_the_weights(models, others, tmp_path):
    """Bit for bit: alone, and on two that were merged."""
    a, b, added = models.folder("sd1"), others("sd1", 1), loras(tmp_path)
    merge(Recipe(a, b, 0.3), tmp_path / "two")
    for recipe, under in ((Recipe(a, loras=added), a), (Recipe(a, b, 0.3, loras=added), tmp_path / "two")):
        merge(recipe, tmp_path / "made", overwrite=True)
        pipe = ldm.load(under)
        before = tensors(under)
        for file, weight in reversed(added):
            pipe.add_lora(file, weight)
        made = tensors(tmp_path / "made")
        count = 0
        for part, network in pipe.parts().items():
            for key, weight in network.state_dict().items():
                assert torch.equal(made[f"{part}.{key}"], weight), key
                count += not torch.equal(weight, before[f"{part}.{key}"])
        assert count == 2
    save_file({f"{UNET_LORA}.lora_down.weight": normal(1, 3, 7), f"{UNET_LORA}.lora_up.weight": normal(1, 24, 3)},
              tmp_path / "misfit.safetensors")  # fmt: skip
    with pytest.raises(LDMError, match="does not fit"):
        merge(Recipe(a, loras=[(tmp_path / "misfit.safetensors", 1.0)]), tmp_path / "never")
    with pytest.raises(LDMError, match="holds what is to be"):
        merge(Recipe(a, loras=added), added[0][0], overwrite=True)


# ---------------------------------------------------------------------------------------------------- what is written


def test_it_says_what_each_lora_changes(models, others, tmp_path, capsys):
    """The lines of adding them, to what was merged; and where nothing changes, that."""
    a, b, added = models.folder("sd1"), others("sd1", 1), loras(tmp_path)
    merge(Recipe(a, b, 0.3), tmp_path / "two")
    capsys.readouterr()
    made = merge(Recipe(a, b, 0.3, loras=added), tmp_path / "made")
    said = capsys.readouterr().err.splitlines()
    assert [each.name for each in made.loras] == ["two", "one"]
    pipe = ldm.load(tmp_path / "two")
    capsys.readouterr()
    for (file, weight), line in zip(added, said[-2:], strict=True):
        pipe.add_lora(file, weight)
        assert capsys.readouterr().err == line + "\n"
    for recipe in (Recipe(a, a, 0.4), Recipe(a, b, 0.0), Recipe(a, loras=[(added[0][0], 0.0)])):
        merge(recipe, tmp_path / "made", overwrite=True)
        assert capsys.readouterr().err.endswith(f"Nothing changes: every weight is that of {a}.\n")
    merge(Recipe(a, b, 0.3), tmp_path / "made", overwrite=True)
    assert "Nothing changes" not in capsys.readouterr().err


def test_it_draws_and_diffusers_reads_it(models, others, tmp_path):
    a, b = models.folder("sdxl"), others("sdxl", 1)
    made, file = tmp_path / "made", tmp_path / "made.safetensors"
    merge(Recipe(a, b, 0.2), made)
    merge(Recipe(a, b, 0.2), file)
    wish = {"seed": 3, "steps": 2, "width": 64, "height": 64}
    one, two, before = (ldm.load(each)(PROMPT, **wish).x0 for each in (made, file, a))
    assert torch.equal(one, two) and (one - before).abs().mean() > 0.01
    theirs = DiffusionPipeline.from_pretrained(made)
    expected = tensors(made)
    for part in PARTS:
        state = {key.removeprefix("text_model."): value for key, value in getattr(theirs, part).state_dict().items()}
        assert all(torch.equal(expected[f"{part}.{key}"], tensor) for key, tensor in state.items())
    for name in ("scheduler/scheduler_config.json", "tokenizer_2/vocab.json"):
        assert read_json(made / name)["_class_name" if "sched" in name else "a</w>"] is not None
    assert read_header(file).metadata["modelspec.title"] == f"0.8 sdxl + 0.2 {b.name}"
    for each in (file, *files(made)):
        assert read_header(each).metadata["modelspec.merged_from"] == f"0.8 sdxl + 0.2 {b.name}"


def test_a_recipe_in_a_line():
    assert str(Recipe("org/photo", "/secret/anime.ckpt", 0.4)) == "0.6 photo + 0.4 anime"
    assert str(Recipe("a", "b", 0.4, "c", {"vae": 0, "IN00": 1})) == "a + 0.4 (b - c) (vae 0, IN00 1)"
    assert str(Recipe("a", loras=[("x/neon.safetensors", 0.8), ("y", -1)])) == "a + 0.8 neon + -1 y"


def test_the_command_line(models, others, tmp_path, capsys):
    a, b, added = models.folder("sd1"), others("sd1", 1), loras(tmp_path)
    words = ["merge", str(a), str(b), "--alpha", "0.25", "--block", "IN00=1", "--out", str(tmp_path / "made")]
    words += ["--lora", f"{added[0][0]}:0.8", "--add-difference", str(others("sd1", 2)), "--dtype", "float64"]
    assert main(words) == 0
    said = capsys.readouterr()
    assert "sd1 + 0.25 (sd1-1 - sd1-2) (IN00 1) + 0.8 two, " in said.out and "|C - A| / |A|" in said.out
    assert f"tokenizers, schedule and defaults are those of {a}" in said.err and "ldm generate" in said.out
    expected = Recipe(a, b, 0.25, others("sd1", 2), {"IN00": 1.0}, added[:1])
    merge(expected, tmp_path / "same", "float64")
    one, two = (tensors(tmp_path / each) for each in ("made", "same"))
    assert all(torch.equal(one[key], tensor) and tensor.dtype == torch.float64 for key, tensor in two.items())
    for more, status, sentence in (
        (["--block", "IN00=1", "--block", "IN00=0"], 2, "names 'IN00' twice"),
        (["--block", "IN00"], 2, "must read NAME=X"),
        (["--alpha", "7"], 2, "between -2 and 2"),
        ([], 1, "is there already"),
    ):
        assert main([*words[:3], "--out", str(tmp_path / "made"), *more]) == status
        assert sentence in capsys.readouterr().err
    assert main(["merge", str(a), "--alpha", "0.5", "--out", str(tmp_path / "x")]) == 2
    assert "how much of a second model" in capsys.readouterr().err


@pytest.mark.parametrize("target", ["made", "made.safetensors"])
def test_stopped_in_the_middle_nothing_is_half(models, others, tmp_path, target):
    recipe = Recipe(models.folder("sd1"), others("sd1", 1))
    merge(recipe, tmp_path / target)
    before = sorted((path, path.stat().st_mtime_ns) for path in tmp_path.rglob("*"))
    seen = []

    def begin(size):
        def tick(count):
            seen.append(count)
            if len(seen) == 7:
                raise KeyboardInterrupt

        return tick

    with pytest.raises(KeyboardInterrupt):
        merge(replace(recipe, alpha=0.1), tmp_path / target, overwrite=True, begin=begin)
    assert len(seen) == 7 and sorted((path, path.stat().st_mtime_ns) for path in tmp_path.rglob("*")) == before


# ---------------------------------------------------------------------------------------------------- refused


def stranger(case: str, models: Models, others, task_models, tmp_path: Path) -> Path:
    """A model that isn't of SD 1's kind, or not quite."""
    b, target = others("sd1", 1), tmp_path / "b"
    if case in ("sd2", "sdxl"):
        return models.folder(case)
    if case == "inpaint":
        return task_models.folder(case)
    if case == "velocity":
        return changed(b, target, "scheduler/scheduler_config.json", prediction_type="v_prediction")
    if case == "noise":
        return changed(b, target, "scheduler/scheduler_config.json", beta_end=0.013)
    if case == "scaling":
        return changed(b, target, "vae/config.json", scaling_factor=0.13)
    if case == "activation":
        return changed(b, target, "text_encoder/config.json", hidden_act="gelu")
    if case == "heads":
        return changed(b, target, "unet/config.json", attention_head_dim=4)
    shutil.copytree(b, target)
    single = read_json(target / "tokenizer" / "tokenizer.json")
    vocab = single["model"]["vocab"]
    single["model"]["vocab"] = vocab | {"a</w>": vocab["b</w>"], "b</w>": vocab["a</w>"]}
    write_json(target / "tokenizer" / "tokenizer.json", single)
    return target


@pytest.mark.parametrize(
    "case, sentence",
    [
        ("sd2", "predicts epsilon, the second one's v_prediction"),
        ("sdxl", "the first is Stable Diffusion's kind.* the second SDXL's"),
        ("inpaint", r"reads 4 channels \(text to image\), the second one's 9 channels \(inpainting\)\.$"),
        ("velocity", "predicts epsilon, the second one's v_prediction"),
        ("noise", r"was trained with beta_end 0\.012, the second with 0\.013"),
        ("scaling", r"vae has scaling_factor 0\.18215, the second one's 0\.13"),
        ("activation", "text_encoder has hidden_act quick_gelu, the second one's gelu"),
        ("heads", r"unet has heads \(2, 2, 2\), the second one's \(4, 4, 4\)"),
        ("vocabulary", "tokenizers spell words otherwise"),
    ],
)
def test_strangers_are_named_by_their_first_difference(models, others, task_models, tmp_path, case, sentence):
    other = stranger(case, models, others, task_models, tmp_path)
    with pytest.raises(LDMError, match=sentence):
        merge(Recipe(models.folder("sd1"), other), tmp_path / "never")
    with pytest.raises(LDMError, match="can't be merged"):  # a base must be of B's kind, too
        merge(Recipe(models.folder("sd1"), others("sd1", 1), 0.5, other), tmp_path / "never")
    assert not (tmp_path / "never").exists()


def test_what_is_no_recipe(models, others, tmp_path):
    a, b = models.folder("sd1"), others("sd1", 1)
    for recipe, sentence in (
        (Recipe(a), "nothing to merge"),
        (Recipe(a, base=b, loras=[("x", 1.0)]), r"base \(--add-difference\) says how a second model"),
        (Recipe(a, blocks={"vae": 0}, loras=[("x", 1.0)]), r"block \(--block\) says how a second"),
        (Recipe(a, b, float("nan")), "alpha of 'alpha' is nan"),
        (Recipe(a, b, True), "alpha of 'alpha' is True"),
        (Recipe(a, b, blocks={"vae": 3}), "alpha of 'vae' is 3: it is a number from 0"),
        (
            Recipe(a, b, blocks={"unet.mid_blok": 0}),
            "'unet.mid_blok' names no block of this model. Did you mean 'unet.mid_b",
        ),
        (Recipe(a, b, blocks={"unet.up_bl": 0}), "names no block"),
        (Recipe(a, b, blocks={"IN77": 0}), "'IN77' names no block"),
        (Recipe(a, loras=[("x", float("inf"))]), "must be a finite number"),
        (Recipe(a, loras=[("x", 1.0)]), "There is no file 'x'"),
        (Recipe(a, a / "unet"), "is a unet alone, and whole models"),
        (
            Recipe(a, b, blocks={"IN11": 0}),
            "no block of this model's UNet, which has IN00 to IN05, M00 and OUT00 to OUT05",
        ),
        (Recipe(a, b, blocks={"in04": 0}), "'in04' names no block of this model's UNet, which has IN00 to"),
        (Recipe(a, b, blocks={3: 0.1}), "Blocks are a table of names"),
        (Recipe(a, b, blocks=["vae"]), "Blocks are a table of names"),
        (Recipe(a, loras=["x.safetensors"]), "LoRAs are pairs of a file and its weight"),
        (Recipe(a, loras="x.safetensors"), "LoRAs are pairs of a file and its weight"),
        (Recipe(a, loras=[("x", "0.5")]), "must be a finite number"),
        (Recipe(None, b), "A model is a name, a folder, a file or an address, not None"),
    ):
        with pytest.raises(LDMError, match=sentence):
            merge(recipe, tmp_path / "never")
    shutil.copytree(b, tmp_path / "bad")
    plant(tmp_path / "bad", "unet", "conv_out.bias", float("nan"))
    for recipe in (Recipe(a, tmp_path / "bad"), Recipe(a, b, 0.5, tmp_path / "bad"), Recipe(tmp_path / "bad", b, 1)):
        with pytest.raises(LDMError, match=r"bad.*conv_out.bias' holds numbers that are not finite"):
            merge(recipe, tmp_path / "never")
    save_file({f"{UNET_LORA}.diff": torch.full((24, 24), 1e6)}, tmp_path / "large.safetensors")
    with pytest.raises(LDMError, match=r"carry 'mid_block.*' of .*sd1.* beyond the range of float16: take") as error:
        merge(Recipe(a, loras=[(tmp_path / "large.safetensors", 1)]), tmp_path / "never", "float16")
    assert "tmp" not in str(error.value).replace(str(a), "").replace(str(tmp_path), "")
    assert not (tmp_path / "never").exists()
    for target in (a, b, b / "unet"):
        with pytest.raises(LDMError, match=r"holds what is to be|lies inside of what"):
            merge(Recipe(a, b), target, overwrite=True)
