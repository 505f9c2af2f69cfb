"""LoRA files: every trainer's names are understood, and what isn't sound is refused by one sentence."""

import json
import math
from pathlib import Path

import lora_files
import pytest
import torch
from lora_files import ATTENTION, kohya, layers, original, pairs, peft, told, write
from peft import LoraConfig, PeftType
from reference import normal
from safetensors.torch import save_file
from test_lora import assert_bits, weights
from tiny_pairs import Models
from torch import Tensor

import ldm
from ldm.io.weights import WeightFiles, blank
from ldm.lora.file import open_lora
from ldm.lora.names import Name, names_original, names_ours, parse
from ldm.models.unet import UNet, UNetConfig
from ldm.pipeline import Pipeline

FILE = "style.safetensors"


# ------------------------------------------------------------------------------------------------------- names


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        (
            "lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight",
            ("unet", "down_blocks_0_attentions_0_proj_in", "LoRA", "down", "kohya"),
        ),
        (
            "lora_te_text_model_encoder_layers_0_mlp_fc1.alpha",
            ("text_encoder", "text_model_encoder_layers_0_mlp_fc1", "", "alpha", ""),
        ),
        ("lora_te2_text_projection.lora_up.weight", ("text_encoder_2", "text_projection", "LoRA", "up", "kohya")),
        (
            "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.processor.to_out_lora.up.weight",
            ("unet", "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out.0", "LoRA", "up", "processors"),
        ),
        (
            "mid_block.attentions.0.transformer_blocks.0.attn2.processor.to_q_lora.down.weight",
            ("unet", "mid_block.attentions.0.transformer_blocks.0.attn2.to_q", "LoRA", "down", "processors"),
        ),
        (
            "text_encoder.text_model.encoder.layers.3.self_attn.to_out_lora.down.weight",
            ("text_encoder", "text_model.encoder.layers.3.self_attn.out_proj", "LoRA", "down", "processors"),
        ),
        (
            "text_encoder_2.text_model.encoder.layers.3.mlp.fc1.lora_linear_layer.up.weight",
            ("text_encoder_2", "text_model.encoder.layers.3.mlp.fc1", "LoRA", "up", "diffusers"),
        ),
        ("unet.conv_in.lora.down.weight", ("unet", "conv_in", "LoRA", "down", "diffusers")),
        (
            "base_model.model.up_blocks.1.attentions.0.proj_out.lora_A.default.weight",
            ("unet", "up_blocks.1.attentions.0.proj_out", "LoRA", "down", "PEFT"),
        ),
        (
            "base_model.model.text_model.encoder.layers.0.mlp.fc2.lora_B.weight",
            ("text_encoder", "text_model.encoder.layers.0.mlp.fc2", "LoRA", "up", "PEFT"),
        ),
        ("unet.mid_block.resnets.0.conv1.lora_B.bias", ("unet", "mid_block.resnets.0.conv1", "LoRA", "shift", "PEFT")),
        (
            "lora_unet_mid_block_attentions_0_proj_in.hada_w1_a",
            ("unet", "mid_block_attentions_0_proj_in", "LoHa", "w1_a", "LyCORIS"),
        ),
        (
            "lycoris_mid_block_attentions_0_proj_in.lokr_w2",
            ("unet", "mid_block_attentions_0_proj_in", "LoKr", "w2", "LyCORIS"),
        ),
        (
            "lycoris_text_model_encoder_layers_0_mlp_fc1.lokr_t2",
            ("text_encoder", "text_model_encoder_layers_0_mlp_fc1", "LoKr", "t2", "LyCORIS"),
        ),
        (
            "lora_unet_mid_block_resnets_0_norm1.w_norm",
            ("unet", "mid_block_resnets_0_norm1", "full", "w_norm", "LyCORIS"),
        ),
        ("lora_unet_conv_in.diff_b", ("unet", "conv_in", "full", "diff_b", "LyCORIS")),
        (
            "diffusion_model.input_blocks.1.1.proj_in.lora_up.weight",
            ("unet", "input_blocks.1.1.proj_in", "LoRA", "up", "kohya"),
        ),
        (
            "text_encoders.clip_g.transformer.text_model.encoder.layers.0.mlp.fc1.lora_up.weight",
            ("text_encoder_2", "text_model.encoder.layers.0.mlp.fc1", "LoRA", "up", "kohya"),
        ),
        ("somewhere.else.lora_up.weight", None),
        ("lora_unet_conv_in.lora_sideways.weight", None),
    ],
)
def test_names_are_taken_apart(key: str, expected: tuple | None) -> None:
    assert parse(key) == (None if expected is None else Name(*expected))


def test_original_names_of_sdxl() -> None:
    """Names in files of kohya's SDXL trainer, which counts the blocks as Stability AI does; all 722 are known."""
    with blank():
        unet = UNet(UNetConfig.from_json(json.loads(SDXL)))
    theirs, ours = names_original("unet", unet), names_ours("unet", unet)
    known = {
        "input_blocks_4_1_transformer_blocks_0_norm1": "down_blocks.1.attentions.0.transformer_blocks.0.norm1",
        "input_blocks_8_1_proj_out": "down_blocks.2.attentions.1.proj_out",
        "input_blocks_3_0_op": "down_blocks.0.downsamplers.0.conv",
        "middle_block_1_transformer_blocks_9_ff_net_2": "mid_block.attentions.0.transformer_blocks.9.ff.net.2",
        "middle_block_2_in_layers_2": "mid_block.resnets.1.conv1",
        "output_blocks_0_1_transformer_blocks_0_attn2_to_v": "up_blocks.0.attentions.0.transformer_blocks.0.attn2.to_v",
        "output_blocks_5_2_conv": "up_blocks.1.upsamplers.0.conv",
        "output_blocks_8_0_skip_connection": "up_blocks.2.resnets.2.conv_shortcut",
        "time_embed_2": "time_embedding.linear_2",
        "label_emb_0_0": "add_embedding.linear_1",
        "out_2": "conv_out",
    }
    assert {name: theirs[name] for name in known} == known
    assert set(theirs.values()) == set(ours.values())  # each layer has both names, and no two layers share one
    transformers = [name for name, _ in layers(unet, (*ATTENTION, "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out"))]
    assert len(transformers) == 722


SDXL = """{"_class_name": "UNet2DConditionModel", "block_out_channels": [320, 640, 1280], "cross_attention_dim": 2048,
 "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"], "attention_head_dim": [5, 10, 20],
 "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
 "transformer_layers_per_block": [1, 2, 10],
 "use_linear_projection": true, "addition_embed_type": "text_time", "addition_time_embed_dim": 256,
 "projection_class_embeddings_input_dim": 2816}"""


COMFYS = {
    "lora_unet_": "diffusion_model.",
    "lora_te1_": "text_encoders.clip_l.transformer.",
    "lora_te2_": "text_encoders.clip_g.transformer.",
}


def comfys(found: lora_files.Pairs, pipe: Pipeline) -> dict[str, Tensor]:
    tensors = original(found, pipe)
    for prefix, theirs in COMFYS.items():
        tensors = {key.replace(prefix, theirs): tensor for key, tensor in tensors.items()}
    return tensors


@pytest.mark.parametrize(
    "style", ["kohya", "original", "comfy", "peft", "peft-bare", "peft-named", "diffusers", "oldest"]
)
def test_all_names_mean_the_same(models: Models, tmp_path, style: str) -> None:
    """One set of factors, under everybody's names: the same weights, bit for bit."""
    pipe = models.ours("sdxl")
    bare = style == "peft-bare"  # PEFT by itself has one network a file
    found = pairs(pipe, ATTENTION, ("q_proj", "out_proj") if not bare else (), None)
    tensors, format = {
        "kohya": lambda: (kohya(found, "lora_te1_"), "kohya's names"),
        "original": lambda: (original(found, pipe), "kohya's and original names"),
        "comfy": lambda: (comfys(found, pipe), "kohya's and original names"),
        "peft": lambda: (peft(found), "PEFT's names"),
        "peft-bare": lambda: (peft(found, lambda part: "base_model.model."), "PEFT's names"),
        "peft-named": lambda: (peft(found, name=".my-adapter"), "PEFT's names"),
        "diffusers": lambda: (lora_files.diffusers(found), "diffusers' old names"),
        "oldest": lambda: (lora_files.oldest(found), "diffusers' old names"),
    }[style]()
    lora = open_lora(write(tmp_path / FILE, tensors))
    if style == "diffusers":
        format = "diffusers' and diffusers' old names"
    assert lora.format == f"a LoRA in {format}"
    assert lora.ranks == {rank: sum(len(pair.down) == rank for pair in found.values()) for rank in (2, 3, 4)}
    before = weights(pipe)
    with pipe.lora(lora, 0.7):
        after = weights(pipe)
        for (part, layer), pair in found.items():
            key = f"{part}.{layer}.weight"
            expected = before[key] + 0.7 * pair.delta(before[key].shape)
            assert torch.equal(after[key], expected), key
            before.pop(key)
        assert all(torch.equal(tensor, after[key]) for key, tensor in before.items())


def test_a_matrix_is_a_1x1_convolution(models: Models, tmp_path) -> None:
    """SD 1 projects with a convolution and SD 2 with a matrix: either's factors fit both."""
    for family, ones in (("sd1", ()), ("sd2", (1, 1))):
        pipe = models.ours(family)
        found = pairs(pipe, ("proj_in",), ("fc1",))
        other = {
            place: pair._replace(
                down=pair.down.reshape(*pair.down.shape[:2], *ones), up=pair.up.reshape(*pair.up.shape[:2], *ones)
            )
            for place, pair in found.items()
        }
        drawn = []
        for tensors in (kohya(found), kohya(other)):
            file = write(tmp_path / FILE, tensors)
            with pipe.lora(file, 0.7), pipe.lora(file, 0.5, merge=False):
                drawn.append(pipe("a house", steps=2, seed=1).x0)
        assert torch.equal(*drawn)


def test_what_peft_says_of_alpha(tmp_path) -> None:
    """Of the network, of layers that differ (by a name's end), and rank-stabilised: alpha/sqrt(rank)."""
    down, up = normal(1, 4, 9), normal(2, 8, 4)
    names = ("down_blocks.0.attentions.0.proj_in", "mid_block.attentions.0.proj_in")
    tensors = {f"unet.{n}.lora_{f}.weight": t for n in names for f, t in (("A", down), ("B", up))}
    said = {"unet.r": 4, "unet.lora_alpha": 6, "unet.alpha_pattern": {"mid_block.attentions.0.proj_in": 3}}

    def scales(**more) -> list[float]:
        metadata = {"lora_adapter_metadata": json.dumps(said | {f"unet.{k}": v for k, v in more.items()})}
        lora = open_lora(write(tmp_path / FILE, tensors, metadata))
        return [lora.changes(group)["weight"].scale for group in lora.groups]

    assert scales() == [1.5, 0.75]
    assert scales(use_rslora=True) == [3.0, 1.5]
    assert scales(alpha_pattern={"^down_blocks.0.attentions.0.proj_in": 2, "proj_in": 8}) == [0.5, 2.0]
    assert scales(alpha_pattern={"attentions.0": 8, "in": 8}) == [1.5, 1.5]  # neither is a name's end
    assert scales(alpha_pattern={}, lora_alpha=None) == [1.0, 1.0]


def test_the_embedded_names_of_files(models: Models, tmp_path) -> None:
    """A folder as diffusers writes it is called by its own name; a pickle is read when it is allowed."""
    pipe = models.ours("sd1")
    tensors = kohya(pairs(pipe, ("to_q",), ()))
    (tmp_path / "watercolour").mkdir()
    write(tmp_path / "watercolour" / "pytorch_lora_weights.safetensors", tensors)
    with pipe.lora(tmp_path / "watercolour") as on:
        assert on.name == "watercolour"
        expected = {key: tensor.clone() for key, tensor in weights(pipe).items()}
    torch.save(tensors, tmp_path / "old.pt")
    with pytest.raises(ldm.LDMError, match="pickle"):
        pipe.add_lora(tmp_path / "old.pt")
    with pipe.lora(tmp_path / "old.pt", allow_pickle=True):
        assert_bits(pipe, expected)


# ------------------------------------------------------------------------------------------------------ refusals

LAYER = "lora_unet_mid_block_attentions_0_proj_in"
BLOCK = "lora_unet_mid_block_attentions_0_transformer_blocks_0"


def with_one(key: str, tensor: Tensor):
    return lambda tensors: tensors | {key: tensor}


def with_factors(up: Tensor, down: Tensor):
    return lambda tensors: tensors | {f"{LAYER}.lora_up.weight": up, f"{LAYER}.lora_down.weight": down}


def without(key: str):
    return lambda tensors: {name: tensor for name, tensor in tensors.items() if name != key}


def alone(tensors: dict[str, Tensor]):
    return lambda _: tensors


REFUSED = {  # what is done to a sound file, and what the sentence says
    "half of a pair": (
        without(f"{LAYER}.lora_up.weight"),
        "'mid_block_attentions_0_proj_in' lacks its factor 'up', though",
    ),
    "alpha alone": (
        with_one("lora_unet_conv_out.alpha", torch.ones(())),
        "has no factors beside it that it would scale",
    ),
    "ranks differ": (with_one(f"{LAYER}.lora_up.weight", normal(1, 24, 5, 1, 1)), "has factors of different ranks, "),
    "an impossible rank": (
        with_factors(normal(1, 24, 25, 1, 1), normal(2, 25, 24, 1, 1)),
        "claims rank 25, which a layer of 24 x 24 x 1 x 1 numbers can't have",
    ),
    "of another shape": (
        with_factors(normal(1, 25, 3, 1, 1), normal(2, 3, 24, 1, 1)),
        r"are of other shapes \(mid_block_attentions_0_proj_in is changed by \(25, 24, 1, 1\) and is \(24, 24, 1, 1\)",
    ),
    "three dimensions": (
        with_one(f"{LAYER}.lora_down.weight", normal(1, 3, 24, 1)),
        "where a matrix or a convolution's belongs",
    ),
    "an empty factor": (with_one(f"{LAYER}.lora_down.weight", normal(1, 3, 0)), "is of the empty shape"),
    "NaN": (with_one(f"{LAYER}.lora_up.weight", torch.full((24, 3, 1, 1), math.nan)), "holds NaN or infinite"),
    "infinite alpha": (with_one(f"{LAYER}.alpha", torch.tensor(math.inf)), "is inf, and not a finite number"),
    "two alphas": (with_one(f"{LAYER}.alpha", torch.ones(2)), r"is F32 of shape \(2,\), where one number belongs"),
    "a layer that isn't there": (
        with_one("lora_unet_mid_block_attentions_9_proj_in.diff", normal(1, 24, 24)),
        r"has 1 of \d+ layers that are not in this model \(unet.mid_block_attentions_9_proj_in\)",
    ),
    "a network that isn't there": (
        with_one("lora_te2_text_model_encoder_layers_0_mlp_fc1.diff", normal(1, 24, 24)),
        "it was made for SDXL, and this is a model whose text is 24 wide",
    ),
    "no bias": (with_one(f"{BLOCK}_attn1_to_q.diff_b", normal(1, 24)), "has no bias to change"),
    "two forms": (
        with_one(f"{LAYER}.hada_w1_a", normal(1, 24, 4)),
        "mixes two forms for 'mid_block_attentions_0_proj_in', LoHa and LoRA",
    ),
    "the same layer twice": (
        with_one("unet.mid_block.attentions.0.proj_in.lora_A.weight", normal(1, 4, 24)),
        "says twice what 'mid_block_attentions_0_proj_in' is",
    ),
    "the same layer under its original name": (
        with_one("lora_unet_middle_block_1_proj_in.diff", normal(1, 24, 24)),
        "changes one layer twice, as 'mid_block_attentions_0_proj_in' and as 'middle_block_1_proj_in'",
    ),
    "an odd factor": (with_one(f"{LAYER}.lokr_t2", normal(1, 2, 2, 3, 3)), "mixes two forms"),
    "renamed": (lambda t: {f"my_{key}": tensor for key, tensor in t.items()}, "that ldm doesn't know as a LoRA's"),
    "one renamed": (
        lambda t: {key.replace("lora_up", "lora_upp") if "proj_in" in key else key: x for key, x in t.items()},
        "holds 7 of .* tensors that ldm doesn't know",
    ),
    "quantised": (with_one(f"{LAYER}.lora_up.weight", torch.ones(24, 4, 1, 1, dtype=torch.int8)), "is quantised"),
    "whole numbers": (
        with_one(f"{LAYER}.lora_up.weight", torch.ones(24, 4, 1, 1, dtype=torch.int32)),
        "is of type I32, no number's that a factor has",
    ),
    "truths": (
        with_one(f"{LAYER}.lora_up.weight", torch.ones(24, 4, 1, 1, dtype=torch.bool)),
        "'lora_unet_mid_block_attentions_0_proj_in.lora_up.weight' is of type BOOL, no number's",
    ),
    "empty": (alone({}), "holds no tensors at all"),
    "a DoRA": (
        with_one(f"{LAYER}.dora_scale", normal(1, 24, 1, 1, 1)),
        "is a DoRA, which also scales each row of a weight",
    ),
    "PEFT's DoRA": (with_one("unet.conv_in.lora_magnitude_vector.weight", normal(1, 8)), "is a DoRA"),
    "OFT": (alone({"lora_unet_conv_in.oft_blocks": normal(1, 2, 4, 4)}), "is an OFT or BOFT, which rotates weights"),
    "IA3": (alone({"base_model.model.conv_in.ia3_l": normal(1, 8, 1)}), "is an IA3, which scales activations"),
    "GLoRA": (alone({"lora_unet_conv_in.a1.weight": normal(1, 8, 1)}), "is a GLoRA"),
    "a Control-LoRA": (with_one("lora_controlnet", torch.ones(1)), "is a Control-LoRA"),
    "FLUX.2": (
        alone({"lora_unet_double_stream_modulation_img_lin.lora_up.weight": normal(1, 8, 2)}),
        "is a LoRA for FLUX.2, by its tensor",
    ),
    "SD 3": (
        alone({"lora_unet_joint_blocks_0_x_block_attn_qkv.lora_up.weight": normal(1, 8, 2)}),
        "for Stable Diffusion 3",
    ),
    "AnimateDiff": (
        with_one("lora_unet_down_blocks_0_motion_modules_0_proj_in.lora_up.weight", normal(1, 8, 2)),
        "for video",
    ),
    "an embedding": (alone({"emb_params": normal(1, 2, 24)}), "is an embedding .* and not a LoRA"),
    "a whole network": (alone({"conv_in.weight": normal(1, 8, 4, 3, 3)}), "is no LoRA: its tensors are whole weights"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refused_by_one_sentence(models: Models, tmp_path, capsys, what: str) -> None:
    pipe = models.ours("sd1")
    change, sentence = REFUSED[what]
    sound = kohya(pairs(pipe, ("proj_in", "ff.net.2"), ("fc1",)))
    file = write(tmp_path / FILE, sound)
    open_lora(file)
    save_file(change(sound), file)  # ours would refuse NaN
    before = weights(pipe)
    pointers = {key: tensor.data_ptr() for key, tensor in before.items()}
    copies = {key: tensor.clone() for key, tensor in before.items()}
    capsys.readouterr()
    with pytest.raises(ldm.LDMError, match=sentence) as error:
        pipe.add_lora(file, 0.7)
    assert str(file) in str(error.value) and str(error.value).count("\n") == 0 and str(error.value).endswith(".")
    assert capsys.readouterr().err == ""
    assert pipe.loras == ()
    assert {key: tensor.data_ptr() for key, tensor in weights(pipe).items()} == pointers
    assert_bits(pipe, copies)


def test_rank_1_000_000_is_refused_by_the_header(tmp_path, monkeypatch) -> None:
    """Before a number is read."""
    rank = 1_000_000
    sizes = {f"{LAYER}.lora_down.weight": (rank, 24), f"{LAYER}.lora_up.weight": (24, rank), f"{LAYER}.alpha": ()}
    header, end = {}, 0
    for name, shape in sizes.items():
        start, end = end, end + 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with (tmp_path / FILE).open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    monkeypatch.setattr(WeightFiles, "read", lambda *_: pytest.fail("a number was read"))
    with pytest.raises(ldm.LDMError, match="claims rank 1,000,000, which a layer of 24 x 24 numbers can't have"):
        open_lora(tmp_path / FILE)


def test_truncated_and_missing(models: Models, tmp_path) -> None:
    pipe = models.ours("sd1")
    file = write(tmp_path / FILE, kohya(pairs(pipe, ("proj_in",), ())))
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(ldm.LDMError, match="10 bytes are missing"):
        pipe.add_lora(file)
    with pytest.raises(ldm.LDMError, match="no file"):
        pipe.add_lora(tmp_path / "none.safetensors")
    with pytest.raises(ldm.LDMError, match="corrupt or truncated"):
        pipe.add_lora(tmp_path)


def of_width(width: int) -> dict[str, Tensor]:
    name = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
    return {f"{name}.lora_down.weight": normal(1, 2, width), f"{name}.lora_up.weight": normal(2, 8, 2)}


@pytest.mark.parametrize(
    ("width", "made_for"), [(768, "SD 1.x"), (1024, "SD 2.x"), (2048, "SDXL"), (1280, "the SDXL refiner")]
)
def test_says_for_what_it_was_made(models: Models, tmp_path, width: int, made_for: str) -> None:
    file = write(tmp_path / FILE, of_width(width))
    assert open_lora(file).made_for == made_for
    with pytest.raises(
        ldm.LDMError, match=f"it was made for {made_for}, and this is a model whose text is 24 wide: take"
    ):
        models.ours("sd1").add_lora(file)


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"use_dora": True}, "says that it is a DoRA"),
        ({"peft_type": "OFT"}, "says that it is a 'OFT'"),
        ({"r": 7}, "rank 7 is said of .* whose factors are of rank"),
        ({"rank_pattern": {}, "r": 0}, "a rank must be a whole number of 1 or more"),
        ({"lora_alpha": "a lot"}, 'its lora_alpha is "a lot", where a number belongs'),
        ({"alpha_pattern": {"(a+)+": 3}}, r"pattern '\(a\+\)\+' is more than a layer's name"),
        ({"rank_pattern": [4]}, r"its rank_pattern is \[4\], where a table of layers and numbers belongs"),
        ({"alpha_pattern": [4]}, r"its alpha_pattern is \[4\], where a table"),
        ({"lora_alpha": 10**400}, r"its lora_alpha is 10{79}\.\.\., where a number belongs"),
        ({"lora_alpha": {"to_q": 4}}, "its lora_alpha is .*, where a number belongs"),
        ({"use_rslora": "false"}, 'its use_rslora is "false", neither true nor false'),
        ({"init_lora_weights": "pissa_niter_4"}, "began with 'pissa_niter_4', which changes the model's weights too"),
        ({"init_lora_weights": "olora"}, "began with 'olora', which changes"),
        ({"modules_to_save": ["conv_in"]}, "says modules_to_save, which needs whole layers beside the factors"),
        ({"bias": "lora_only"}, "says bias, which needs other biases of layers"),
        ({"use_bdlora": {"nblocks": 2}}, "says use_bdlora, which needs factors that are block-diagonal"),
    ],
)
def test_what_peft_says_may_be_wrong(models: Models, tmp_path, fields: dict, sentence: str) -> None:
    found = pairs(models.ours("sd1"), ("to_q",), ())
    metadata = told(found)
    said = json.loads(metadata["lora_adapter_metadata"]) | {f"unet.{key}": value for key, value in fields.items()}
    if "r" in fields:
        said["unet.rank_pattern"] = {}
    file = write(tmp_path / FILE, peft(found), {"lora_adapter_metadata": json.dumps(said)})
    with pytest.raises(ldm.LDMError, match=sentence) as error:
        open_lora(file)
    assert str(file) in str(error.value)


def test_what_peft_says_and_means_nothing(tmp_path) -> None:
    """All that PEFT's own configuration says by itself, and a beginning that leaves the model as it is."""
    fields = LoraConfig(r=4, lora_alpha=2, init_lora_weights="gaussian", lora_dropout=0.1).to_dict()
    said = {f"unet.{key}": value.value if isinstance(value, PeftType) else value for key, value in fields.items()}
    tensors = {"unet.conv_in.lora_A.weight": normal(1, 4, 9), "unet.conv_in.lora_B.weight": normal(2, 8, 4)}
    lora = open_lora(write(tmp_path / FILE, tensors, {"lora_adapter_metadata": json.dumps(said)}))
    assert [group.alpha for group in lora.groups] == [2]


@pytest.mark.parametrize(
    ("file", "prefix", "alpha"),
    [(FILE, "unet.", None), (FILE, "base_model.model.", 6), ("adapter_model.safetensors", "unet.", 6)],
)
def test_whose_the_configuration_beside_is(tmp_path, file: str, prefix: str, alpha: float | None) -> None:
    """PEFT's is of the file that PEFT writes, and of no other in that folder."""
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 4, "lora_alpha": 6}')
    tensors = {f"{prefix}conv_in.lora_A.weight": normal(1, 4, 9), f"{prefix}conv_in.lora_B.weight": normal(2, 8, 4)}
    assert [group.alpha for group in open_lora(write(tmp_path / file, tensors)).groups] == [alpha]


def test_words_in_the_same_file_are_passed_over(models: Models, tmp_path, capsys) -> None:
    found = kohya(pairs(models.ours("sd1"), ("to_q",), ()))
    words = {"bundle_emb.toy.string_to_param.*": normal(1, 2, 24)}
    lora = open_lora(write(tmp_path / FILE, found | words))
    line = capsys.readouterr().err
    assert "1 learnt word (toy) beside the LoRA passed over" in line and line.count("\n") == 1
    without = open_lora(write(tmp_path / FILE, found))
    assert [group.keys for group in lora.groups] == [group.keys for group in without.groups]
    assert capsys.readouterr().err == ""
    with pytest.raises(ldm.LDMError, match=r"holds 1 learnt word \(toy\) and no LoRA"):
        open_lora(write(tmp_path / FILE, words))


def test_the_refiners_text_encoder_is_the_second(models: Models, tmp_path) -> None:
    pipe = models.ours("refiner")
    file = write(
        tmp_path / FILE,
        {key.replace("lora_te_", "lora_te2_"): t for key, t in kohya(pairs(pipe, (), ("fc1",))).items()},
    )
    with pipe.lora(file) as on:
        assert len(on.layers) == 4 and all(key.startswith("text_encoder.") for key in on.layers)


def test_a_file_may_be_overwritten_while_it_is_on(models: Models, tmp_path) -> None:
    """Its numbers are copied: a window on the file would break with it."""
    pipe = models.ours("sd1")
    file: Path = write(tmp_path / FILE, kohya(pairs(pipe, ("to_q",), ())))
    with pipe.lora(file, 0.7):
        expected = {key: tensor.clone() for key, tensor in weights(pipe).items()}
        with file.open("r+b") as opened:
            opened.seek(3000)
            opened.write(bytes(2000))
        with pipe.lora(write(tmp_path / "other.safetensors", kohya(pairs(pipe, ("to_q",), (), seed=9))), 0.7):
            pass
        assert_bits(pipe, expected)
