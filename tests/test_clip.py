"""CLIP equals transformers' in both towers: hidden states, pooled vectors, loss, key layouts and configurations."""

import json
from dataclasses import replace
from functools import cache

import pytest
import torch
from reference import DTYPES, assert_close, assert_gradients_close, gradients, keys_and_shapes, normal, randomise, same
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from ldm.errors import LDMError
from ldm.text.clip import (
    INITIAL_SCALE,
    NEUTRAL,
    ImageEncoder,
    TextConfig,
    TextEncoder,
    VisionConfig,
    contrastive_loss,
    similarity,
)

BASE = {
    "vocab_size": 99,
    "hidden_size": 24,
    "intermediate_size": 52,
    "num_hidden_layers": 4,
    "num_attention_heads": 3,
    "max_position_embeddings": 13,
    "projection_dim": 16,
    "bos_token_id": 97,
    "eos_token_id": 98,
}
TINY = {
    "sd1": BASE,
    "sd2": BASE | {"hidden_act": "gelu", "layer_norm_eps": 1e-3},
    "sdxl-2": BASE | {"hidden_act": "gelu", "architectures": ["CLIPTextModelWithProjection"]},
    "legacy-eos": BASE | {"bos_token_id": 0, "eos_token_id": 2},
}
# Padded with end tokens, padded with other ids after one in the middle (SDXL's second encoder), and full.
IDS = torch.tensor(
    [
        [97, 5, 98, 98, 98, 98, 98, 98, 98, 98, 98, 98, 98],
        [97, 5, 77, 31, 2, 98, 0, 0, 0, 0, 0, 0, 0],
        [97, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 98],
    ]
)
VISION = {
    "hidden_size": 24,
    "intermediate_size": 52,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "image_size": 28,
    "patch_size": 7,
    "projection_dim": 16,
}


@cache
def pair(name, dtype=torch.float64):
    """The reference, every parameter drawn, and ours with the same parameters."""
    config = TextConfig.from_json(TINY[name])
    kind = CLIPTextModelWithProjection if config.with_projection else CLIPTextModel
    reference = randomise(kind(CLIPTextConfig(**TINY[name]))).to(dtype).eval()
    return reference, same(lambda: TextEncoder(config), reference, TextEncoder.rename)


@cache
def vision_pair(act, dtype=torch.float64, eps=1e-5):
    fields = VISION | {"hidden_act": act, "layer_norm_eps": eps}
    reference = randomise(CLIPVisionModelWithProjection(CLIPVisionConfig(**fields))).to(dtype).eval()
    return reference, same(lambda: ImageEncoder(VisionConfig.from_json(fields)), reference, ImageEncoder.rename)


# ------------------------------------------------------------------------------------------------------- text tower


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", TINY)
@torch.no_grad()
def test_text_tower_equals_transformers(name, dtype):
    reference, encoder = pair(name, dtype)
    expected, ours = reference(IDS, output_hidden_states=True), encoder(IDS)
    assert len(ours.hidden) == len(expected.hidden_states) == 5
    for hidden, state in zip(ours.hidden, expected.hidden_states, strict=True):
        assert_close(hidden, state, DTYPES[dtype])
    assert_close(ours.last, expected.last_hidden_state, DTYPES[dtype])
    projected = name == "sdxl-2"
    assert_close(ours.pooled, expected.text_embeds if projected else expected.pooler_output, DTYPES[dtype])


def test_end_of_text_is_the_first_end_token_or_for_old_files_the_largest_id():
    assert pair("sd1")[1].end_of_text(IDS).tolist() == [2, 5, 12]
    assert pair("legacy-eos")[1].end_of_text(IDS).tolist() == [2, 5, 12]
    # They part where a token was added behind the end token, and at id 2 itself.
    ids = torch.tensor([[97, 99, 98, 2, 98], [97, 2, 98, 100, 3]])
    assert pair("sd1")[1].end_of_text(ids).tolist() == [2, 2]
    assert pair("legacy-eos")[1].end_of_text(ids).tolist() == [1, 3]


@pytest.mark.parametrize("length", [1, 6])
@torch.no_grad()
def test_short_prompts_equal_transformers(length):
    reference, encoder = pair("sd1")
    assert_close(encoder(IDS[:, :length]).last, reference(IDS[:, :length]).last_hidden_state, 1e-11)


@pytest.mark.parametrize("clip_skip", range(5))
@pytest.mark.parametrize("name", ["sd1", "sdxl-2"])
@torch.no_grad()
def test_clip_skip_norms_an_earlier_layer(name, clip_skip):
    """By hand: diffusers' own way to it raises AttributeError with transformers >= 5.6."""
    reference, encoder = pair(name)
    inner = reference.text_model if name == "sdxl-2" else reference
    hidden = reference(IDS, output_hidden_states=True).hidden_states
    assert_close(encoder.context(IDS, clip_skip), inner.final_layer_norm(hidden[-1 - clip_skip]), 1e-11)


@pytest.mark.parametrize("clip_skip", [-1, 5])
def test_clip_skip_beyond_the_layers_is_refused(clip_skip):
    with pytest.raises(LDMError, match="4 layers"):
        pair("sd1")[1].context(IDS, clip_skip)


@torch.no_grad()
def test_a_token_changes_nothing_before_it():
    _, encoder = pair("sd1")
    changed = IDS.clone()
    changed[:, 7] = 42
    for before, after in zip(encoder(IDS).hidden, encoder(changed).hidden, strict=True):
        assert torch.equal(before[:, :7], after[:, :7])
    assert ((encoder(IDS).last - encoder(changed).last)[:, 7:].abs().mean(dim=(0, 2)) > 0.01).all()


@torch.no_grad()
def test_prompts_of_a_batch_do_not_touch_each_other():
    _, encoder = pair("sdxl-2")
    order = torch.tensor([2, 0, 1])
    for ours, mixed in zip(encoder(IDS)[1:], encoder(IDS[order])[1:], strict=True):
        assert_close(mixed, ours[order], 1e-12)


def test_gradients_equal_transformers():
    reference, encoder = pair("sdxl-2")
    weights = normal(1, 3, 13, 24, dtype=torch.float64), normal(2, 3, 16, dtype=torch.float64)
    expected, ours = reference(IDS), encoder(IDS)
    loss = (ours.last * weights[0]).sum() + (ours.pooled * weights[1]).sum()
    found = gradients(loss, encoder)
    loss = (expected.last_hidden_state * weights[0]).sum() + (expected.text_embeds * weights[1]).sum()
    assert_gradients_close(found, gradients(loss, reference, rename=TextEncoder.rename))


@pytest.mark.parametrize("name", ["sd1", "sdxl-2"])
@torch.no_grad()
def test_old_and_new_key_layouts_load(name):
    """transformers before 5.6 wrote `text_model.` before every key but the projection's, and position numbers."""
    reference, encoder = pair(name)
    flat = {key.removeprefix("text_model."): value for key, value in reference.state_dict().items()}
    old = {key if key == "text_projection.weight" else f"text_model.{key}": value for key, value in flat.items()}
    old["text_model.embeddings.position_ids"] = torch.arange(13)[None]
    for layout in (flat, old, flat | {"embeddings.position_ids": torch.arange(13)[None]}):
        fresh = TextEncoder(encoder.config).double()
        renamed = {TextEncoder.rename(key): value for key, value in layout.items()}
        renamed.pop(None, None)
        fresh.load_state_dict(renamed, strict=True)
        assert torch.equal(fresh(IDS).pooled, encoder(IDS).pooled)


# ------------------------------------------------------------------------------------------- image tower and the loss


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("act, eps", [("quick_gelu", 1e-5), ("gelu", 1e-3)])
@torch.no_grad()
def test_image_tower_equals_transformers(act, eps, dtype):
    reference, encoder = vision_pair(act, dtype, eps)
    image = normal(1, 3, 3, 28, 28, dtype=dtype)
    assert_close(encoder(image), reference(image).image_embeds, DTYPES[dtype])
    order = torch.tensor([2, 0, 1])
    assert_close(encoder(image[order]), encoder(image)[order], DTYPES[dtype])


def test_image_keys_load_with_position_ids():
    reference, encoder = vision_pair("gelu")
    state = reference.state_dict() | {"vision_model.embeddings.position_ids": torch.arange(17)[None]}
    renamed = {ImageEncoder.rename(key): value for key, value in state.items()}
    assert None in renamed and set(renamed) - {None} == set(encoder.state_dict())


@pytest.mark.parametrize("dtype", DTYPES)
@torch.no_grad()
def test_contrastive_loss_equals_transformers(dtype):
    config = CLIPConfig(text_config=TINY["sd1"], vision_config=VISION, projection_dim=16)
    model = randomise(CLIPModel(config)).to(dtype).eval()
    model.logit_scale.fill_(1.3)
    out = model(input_ids=IDS, pixel_values=normal(1, 3, 3, 28, 28, dtype=dtype), return_loss=True)
    # Our loss normalises by itself: it takes the vectors at any length.
    lengths = torch.tensor([[0.3], [2.0], [7.0]], dtype=dtype)
    image, text = out.image_embeds * lengths, out.text_embeds / lengths
    assert_close(contrastive_loss(image, text, model.logit_scale.exp()), out.loss, DTYPES[dtype])
    scores = model.logit_scale.exp() * similarity(image, text)
    assert_close(scores, out.logits_per_image.diagonal(), DTYPES[dtype])
    assert abs(INITIAL_SCALE - CLIPConfig().logit_scale_init_value) < 1e-4


def test_contrastive_loss_counts_pictures_and_captions_alike():
    image, text = normal(1, 5, 8, dtype=torch.float64), normal(2, 5, 8, dtype=torch.float64)
    scale = torch.tensor(5.0, dtype=torch.float64)
    assert_close(contrastive_loss(image, text, scale), contrastive_loss(text, image, scale), 1e-12)
    assert contrastive_loss(image, image, 100 * scale) < 1e-6  # every picture picks its own caption


# ---------------------------------------------------------------------------------------------------- configuration

# As published in the files named.
PUBLISHED_TEXT = {
    "runwayml/stable-diffusion-v1-5 text_encoder": {
        "_name_or_path": "openai/clip-vit-large-patch14",
        "architectures": ["CLIPTextModel"],
        "attention_dropout": 0.0,
        "bos_token_id": 0,
        "dropout": 0.0,
        "eos_token_id": 2,
        "hidden_act": "quick_gelu",
        "hidden_size": 768,
        "initializer_factor": 1.0,
        "initializer_range": 0.02,
        "intermediate_size": 3072,
        "layer_norm_eps": 1e-05,
        "max_position_embeddings": 77,
        "model_type": "clip_text_model",
        "num_attention_heads": 12,
        "num_hidden_layers": 12,
        "pad_token_id": 1,
        "projection_dim": 768,
        "torch_dtype": "float32",
        "transformers_version": "4.22.0.dev0",
        "vocab_size": 49408,
    },
    "stabilityai/stable-diffusion-2-1 text_encoder": {
        "_name_or_path": "hf-models/stable-diffusion-v2-768x768/text_encoder",
        "architectures": ["CLIPTextModel"],
        "attention_dropout": 0.0,
        "bos_token_id": 0,
        "dropout": 0.0,
        "eos_token_id": 2,
        "hidden_act": "gelu",
        "hidden_size": 1024,
        "initializer_factor": 1.0,
        "initializer_range": 0.02,
        "intermediate_size": 4096,
        "layer_norm_eps": 1e-05,
        "max_position_embeddings": 77,
        "model_type": "clip_text_model",
        "num_attention_heads": 16,
        "num_hidden_layers": 23,
        "pad_token_id": 1,
        "projection_dim": 512,
        "torch_dtype": "float32",
        "transformers_version": "4.25.0.dev0",
        "vocab_size": 49408,
    },
    "stabilityai/stable-diffusion-xl-base-1.0 text_encoder_2": {
        "architectures": ["CLIPTextModelWithProjection"],
        "attention_dropout": 0.0,
        "bos_token_id": 0,
        "dropout": 0.0,
        "eos_token_id": 2,
        "hidden_act": "gelu",
        "hidden_size": 1280,
        "initializer_factor": 1.0,
        "initializer_range": 0.02,
        "intermediate_size": 5120,
        "layer_norm_eps": 1e-05,
        "max_position_embeddings": 77,
        "model_type": "clip_text_model",
        "num_attention_heads": 20,
        "num_hidden_layers": 32,
        "pad_token_id": 1,
        "projection_dim": 1280,
        "torch_dtype": "float16",
        "transformers_version": "4.32.0.dev0",
        "vocab_size": 49408,
    },
}
# What transformers 4 wrote beside a tower's shape into the file of a whole CLIP, openai/clip-vit-base-patch32.
GENERATION = {
    **{"add_cross_attention": False, "architectures": None, "bad_words_ids": None, "chunk_size_feed_forward": 0},
    **{"cross_attention_hidden_size": None, "decoder_start_token_id": None, "diversity_penalty": 0.0},
    **{"do_sample": False, "dropout": 0.0, "early_stopping": False, "encoder_no_repeat_ngram_size": 0},
    **{"finetuning_task": None, "forced_bos_token_id": None, "forced_eos_token_id": None},
    **{"id2label": {"0": "LABEL_0", "1": "LABEL_1"}, "label2id": {"LABEL_0": 0, "LABEL_1": 1}, "is_decoder": False},
    **{"is_encoder_decoder": False, "length_penalty": 1.0, "max_length": 20, "min_length": 0},
    **{"no_repeat_ngram_size": 0, "num_beam_groups": 1, "num_beams": 1, "num_return_sequences": 1},
    **{"output_attentions": False, "output_hidden_states": False, "output_scores": False, "prefix": None},
    **{"problem_type": None, "pruned_heads": {}, "remove_invalid_values": False, "repetition_penalty": 1.0},
    **{"return_dict": True, "return_dict_in_generate": False, "sep_token_id": None, "task_specific_params": None},
    **{"temperature": 1.0, "tie_encoder_decoder": False, "tie_word_embeddings": True, "tokenizer_class": None},
    **{"top_k": 50, "top_p": 1.0, "torch_dtype": None, "torchscript": False, "transformers_version": "4.16.0.dev0"},
    **{"use_bfloat16": False, "_name_or_path": "", "initializer_factor": 1.0, "initializer_range": 0.02},
}
CLIP_BASE = {
    "architectures": ["CLIPModel"],
    "logit_scale_init_value": 2.6592,
    "model_type": "clip",
    "projection_dim": 512,
    "text_config": GENERATION | {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1, "vocab_size": 49408},
    "vision_config": GENERATION | {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None, "patch_size": 32},
}


@pytest.mark.parametrize("name", PUBLISHED_TEXT)
def test_published_text_configurations_give_the_published_keys_and_shapes(name):
    fields = PUBLISHED_TEXT[name]
    config = TextConfig.from_json(fields)
    kind = CLIPTextModelWithProjection if config.with_projection else CLIPTextModel
    assert fields["architectures"] == [kind.__name__]
    with torch.device("meta"):
        reference = kind(CLIPTextConfig.from_dict(fields))
        assert keys_and_shapes(TextEncoder(config)) == {
            TextEncoder.rename(key): shape for key, shape in keys_and_shapes(reference).items()
        }
    written = json.loads(json.dumps(config.to_json()))
    assert TextConfig.from_json(written) == config
    again = CLIPTextConfig.from_dict(written)  # what we write, transformers reads as the same; and the other way round
    assert replace(TextConfig.from_json(again.to_dict()), with_projection=config.with_projection) == config


def test_both_towers_of_a_whole_clip_are_read():
    text, vision = TextConfig.from_json(CLIP_BASE), VisionConfig.from_json(CLIP_BASE)
    assert text == TextConfig(bos_token_id=0, eos_token_id=2)
    assert vision == VisionConfig()
    with torch.device("meta"):
        reference = CLIPVisionModelWithProjection(CLIPVisionConfig.from_dict(CLIP_BASE["vision_config"]))
        assert keys_and_shapes(ImageEncoder(vision)) == {
            ImageEncoder.rename(key): shape for key, shape in keys_and_shapes(reference).items()
        }
    again = CLIPVisionConfig.from_dict(json.loads(json.dumps(vision.to_json())))
    assert VisionConfig.from_json(again.to_dict()) == vision


def test_defaults_are_those_of_transformers():
    assert TextConfig.from_json(CLIPTextConfig().to_dict()) == TextConfig() == TextConfig.from_json({})
    assert VisionConfig.from_json(CLIPVisionConfig().to_dict()) == VisionConfig() == VisionConfig.from_json({})


REFUSED = {
    "add_cross_attention": True,
    "attention_dropout": 0.1,
    "bos_token_id": 3,
    "dropout": 0.1,
    "eos_token_id": 3,
    "hidden_act": "relu",
    "initializer_factor": 2.0,
    "is_decoder": True,
    "is_encoder_decoder": True,
    "num_channels": 4,
    "pad_token_id": 3,
    "pruned_heads": {"0": [1]},
    "a_field_of_the_future": None,
}


def test_every_field_with_a_neutral_value_is_tried_at_another():
    assert set(NEUTRAL) <= set(REFUSED)


@pytest.mark.parametrize("field", REFUSED)
def test_what_is_not_implemented_is_refused_by_name(field):
    with pytest.raises(LDMError, match=field):
        VisionConfig.from_json({field: REFUSED[field]})
    if not field.endswith("token_id"):  # the text tower reads those
        with pytest.raises(LDMError, match=field):
            TextConfig.from_json({field: REFUSED[field]})


def test_several_end_of_text_ids_are_refused():
    with pytest.raises(LDMError, match=r"eos_token_id is \(2, 3\): ldm reads a single number"):
        TextConfig.from_json(BASE | {"eos_token_id": [2, 3]})
