"""Tiny Stable Diffusion models with every parameter drawn, in folders that diffusers and transformers have written.

Both sides load the same folder: the reference with `from_pretrained`, ours with `ldm.load`.
"""

import json
import os
from copy import copy
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    DDIMScheduler,
    DiffusionPipeline,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from reference import randomise
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

import ldm
from ldm.io.folders import read_json
from ldm.models.controlnet import ControlNet
from ldm.pipeline import Pipeline
from ldm.scenes import caption, sample
from ldm.schedules import ScheduleConfig
from ldm.settings import Defaults
from ldm.train.vocabulary import save_vocabulary, train_vocabulary

SCENES = Path(os.environ.get("LDM_SCENES", Path(__file__).parent.parent / "weights" / "scenes"))
scenes = pytest.mark.skipif(not (SCENES / "model_index.json").exists(), reason=f"there is no model in {SCENES}")
PROMPT = "a large red house on snow at night, and a small blue fish"
OTHERS = ["two trees", "a yellow boat left of a lighthouse, pixel art"]

DOWN, CROSS_DOWN, UP, CROSS_UP = "DownBlock2D", "CrossAttnDownBlock2D", "UpBlock2D", "CrossAttnUpBlock2D"
SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
TEXT = {"hidden_size": 24, "intermediate_size": 52, "num_hidden_layers": 3, "num_attention_heads": 3}
UNET = {
    "sample_size": 8,
    "block_out_channels": (8, 16, 24),
    "down_block_types": (CROSS_DOWN, CROSS_DOWN, DOWN),
    "up_block_types": (UP, CROSS_UP, CROSS_UP),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "cross_attention_dim": 24,
}
VAE = {
    "block_out_channels": (8, 8, 16, 16),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "norm_num_groups": 4,
}
MODELS = {  # what tells the two families apart: activation, padding, projection, heads a level, prediction
    "sd1": ({"hidden_act": "quick_gelu"}, {"attention_head_dim": 2}, "epsilon", "<|endoftext|>"),
    "sd2": (
        {"hidden_act": "gelu", "layer_norm_eps": 1e-4},
        {"attention_head_dim": (2, 4, 3), "use_linear_projection": True},
        "v_prediction",
        "!",
    ),
}


def write_tokenizer(folder: Path, pad: str) -> None:
    captions = [caption(sample(seed), 0) for seed in range(60)]
    save_vocabulary(folder, *train_vocabulary(captions, 560))
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        (folder / name).write_text(json.dumps(read_json(folder / name) | {"pad_token": pad}))


def build(name: str, folder: Path) -> StableDiffusionPipeline:
    """The reference's own classes, parameters drawn, with a tokenizer that we trained."""
    text, unet, prediction, pad = MODELS[name]
    write_tokenizer(folder / "vocabulary", pad)
    tokenizer = CLIPTokenizer.from_pretrained(folder / "vocabulary")
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = CLIPTextConfig(**TEXT, **text, **ids, vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id)
    scheduler = DDIMScheduler(**SD, prediction_type=prediction, clip_sample=False, set_alpha_to_one=False)
    return StableDiffusionPipeline(
        tokenizer=tokenizer,
        text_encoder=randomise(CLIPTextModel(config), seed=1).eval(),
        unet=randomise(UNet2DConditionModel(**UNET, **unet), seed=2).eval(),
        vae=randomise(AutoencoderKL(**VAE), seed=3).eval(),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


# SDXL: two text encoders, the second of another width, which also makes the pooled vector; no attention on the finest
# level, and other depths than 1. `numbers` is how many sizes the UNet is told. With SDXL's VAE told to be float32
# (force_upcast), diffusers would leave float64 as well: here it isn't told so.
POOLED, SIZE_WIDTH = 14, 6
XL_UNET = UNET | {
    "down_block_types": (DOWN, CROSS_DOWN, CROSS_DOWN),
    "up_block_types": (CROSS_UP, CROSS_UP, UP),
    "attention_head_dim": (2, 4, 3),
    "transformer_layers_per_block": (1, 2, 3),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": SIZE_WIDTH,
}
SECOND = {"hidden_size": 20, "intermediate_size": 44, "num_hidden_layers": 4, "num_attention_heads": 2}
XL = {"sdxl": (24 + 20, 6), "refiner": (20, 5)}  # the width of the text, and how many numbers are told


def xl_unet(name: str, **fields) -> UNet2DConditionModel:
    width, numbers = XL[name]
    told = {"projection_class_embeddings_input_dim": numbers * SIZE_WIDTH + POOLED, "cross_attention_dim": width}
    return randomise(UNet2DConditionModel(**XL_UNET | told | fields), seed=22).eval()


def build_xl(name: str, folder: Path, **fields) -> DiffusionPipeline:
    """The same for SDXL and its refiner; `fields` are the UNet's."""
    tokenizers = []
    for pad in ("<|endoftext|>", "!"):
        write_tokenizer(folder / pad.strip("<|>"), pad)
        tokenizers.append(CLIPTokenizer.from_pretrained(folder / pad.strip("<|>")))
    first, second = tokenizers
    ids = {"bos_token_id": first.bos_token_id, "eos_token_id": first.eos_token_id, "vocab_size": len(first)}
    one = CLIPTextConfig(**TEXT, **ids, hidden_act="quick_gelu", pad_token_id=first.pad_token_id)
    two = CLIPTextConfig(**SECOND, **ids, hidden_act="gelu", pad_token_id=0, projection_dim=POOLED)
    parts = {
        "tokenizer_2": second,
        "text_encoder_2": randomise(CLIPTextModelWithProjection(two), seed=24).eval(),
        "unet": xl_unet(name, **fields),
        "vae": randomise(AutoencoderKL(**VAE, scaling_factor=0.13025, force_upcast=False), seed=23).eval(),
        "scheduler": EulerDiscreteScheduler(**SD),
    }
    if name == "refiner":
        parts |= {"tokenizer": None, "text_encoder": None, "requires_aesthetics_score": True}
        return StableDiffusionXLImg2ImgPipeline(**parts, force_zeros_for_empty_prompt=False)
    encoder = randomise(CLIPTextModel(one), seed=21).eval()
    return StableDiffusionXLPipeline(tokenizer=first, text_encoder=encoder, **parts)


@dataclass
class Models:
    """The folders below `root`, and what was loaded from them, kept for the session: don't change it, copy it."""

    root: Path
    loaded: dict = field(default_factory=dict)

    def folder(self, name: str) -> Path:
        folder = self.root / name
        if not (folder / "model_index.json").exists():
            make, before = build_xl if name in XL else build, torch.get_default_dtype()
            torch.set_default_dtype(torch.float32)  # whoever asks first, and in whatever precision
            make(name, self.root / f"{name}-parts").save_pretrained(folder)
            torch.set_default_dtype(before)
        return folder

    def reference(self, name: str, dtype: torch.dtype = torch.float32) -> DiffusionPipeline:
        key = ("reference", name, dtype)
        if key not in self.loaded:
            pipe = DiffusionPipeline.from_pretrained(self.folder(name), torch_dtype=dtype)
            pipe.set_progress_bar_config(disable=True)
            self.loaded[key] = pipe
        return self.loaded[key]

    def ours(self, name: str, dtype: torch.dtype = torch.float32) -> Pipeline:
        key = ("ours", name, dtype)
        if key not in self.loaded:
            self.loaded[key] = ldm.load(self.folder(name), dtype)
        return self.loaded[key]


def with_scheduler(pipe: Pipeline, scheduler) -> Pipeline:
    """The same parts with the schedule that diffusers' `scheduler` would write into its folder, and no defaults."""
    fields = json.loads(scheduler.to_json_string()) | {"_class_name": type(scheduler).__name__}
    other = copy(pipe)
    other.scheduler, other.defaults, other.watchers = ScheduleConfig.from_json(fields), Defaults(), []
    return other


def controlnets(
    models: Models, name: str, seed: int = 4, dtype: torch.dtype = torch.float32, **fields
) -> tuple[ControlNetModel, ControlNet]:
    """The reference's ControlNet for that model, and ours, from one folder: every parameter drawn, no convolution zero.

    `fields` of the configuration are written over. Kept for the session, as `models` are.
    """
    folder = models.root / "-".join([name, "controlnet", str(seed), *(f"{k}={v}" for k, v in fields.items())])
    if not folder.exists():
        unet = models.reference(name).unet
        net = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(4, 6, 10, 12))
        net.register_to_config(**fields)
        randomise(net, seed).save_pretrained(folder)
    key = (folder, dtype)
    if key not in models.loaded:
        reference = ControlNetModel.from_pretrained(folder, torch_dtype=dtype).eval()
        models.loaded[key] = reference, ldm.load_controlnet(folder, models.ours(name, dtype))
    return models.loaded[key]
