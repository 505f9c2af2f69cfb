"""Tiny models for every task, parameters drawn, in folders that diffusers' own pipelines have written.

Their UNets read channels beside the latent: depth (5), a small picture (7), a picture to edit (8), a mask and a masked
picture (9). Both sides are of the same folder; the plain ones, of 4 channels, are those of `tiny_pairs.py`.
"""

import inspect
import sys
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import diffusers.models.autoencoders.vae as autoencoder
import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    DiffusionPipeline,
    StableDiffusionDepth2ImgPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionInstructPix2PixPipeline,
    StableDiffusionUpscalePipeline,
    UNet2DConditionModel,
)
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from reference import randomise
from tiny_pairs import MODELS, UNET, Models, build

import ldm
from ldm.pipeline import Pipeline

NOISE_LEVELS = 100
LOW_RES = {"beta_start": 0.0002, "beta_end": 0.03, "beta_schedule": "squaredcos_cap_v2"}  # another than the model's own
SMALL_VAE = {  # three levels: a latent stands for four pixels
    "block_out_channels": (8, 16, 16),
    "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3,
    "norm_num_groups": 4,
    "scaling_factor": 0.08333,
}
TASKS = {  # name -> diffusers' class, the family, what its UNet has beside the family's
    "inpaint": (StableDiffusionInpaintPipeline, "sd1", {"in_channels": 9}),
    "inpaint2": (StableDiffusionInpaintPipeline, "sd2", {"in_channels": 9}),
    "edit": (StableDiffusionInstructPix2PixPipeline, "sd1", {"in_channels": 8}),
    "depth": (StableDiffusionDepth2ImgPipeline, "sd2", {"in_channels": 5}),
    "upscale": (
        StableDiffusionUpscalePipeline,
        "sd2",
        {"in_channels": 7, "num_class_embeds": NOISE_LEVELS, "only_cross_attention": (True, True, False)},
    ),
}
FROM_PICTURES = {  # what any model can, by other classes over the same folder
    "image to image": StableDiffusionImg2ImgPipeline,
    "blend": StableDiffusionInpaintPipeline,
}


def build_task(name: str, folder: Path) -> DiffusionPipeline:
    """diffusers' pipeline for that task."""
    cls, family, extra = TASKS[name]
    parts = {k: v for k, v in build(family, folder).components.items() if k in inspect.signature(cls).parameters}
    parts["unet"] = randomise(UNet2DConditionModel(**UNET, **MODELS[family][1], **extra), seed=12).eval()
    if name == "upscale":
        parts["vae"] = randomise(AutoencoderKL(**SMALL_VAE), seed=13).eval()
        parts["low_res_scheduler"] = DDPMScheduler(**LOW_RES)
    if name == "depth":
        parts |= {"depth_estimator": None, "feature_extractor": None}
    if "requires_safety_checker" in inspect.signature(cls).parameters:
        parts["requires_safety_checker"] = False
    return cls(**parts)


@dataclass
class TaskModels:
    """Both sides' pipelines of the folders below `root`, kept for the session: don't change them, copy them."""

    root: Path
    plain: Models
    loaded: dict = field(default_factory=dict)

    def folder(self, name: str) -> Path:
        if name not in TASKS:
            return self.plain.folder(name)
        folder = self.root / name
        if not (folder / "model_index.json").exists():
            build_task(name, self.root / f"{name}-parts").save_pretrained(folder)
        return folder

    def reference(self, name: str, dtype: torch.dtype = torch.float32, way: str | None = None) -> DiffusionPipeline:
        """`way`: one of `FROM_PICTURES`, for the models of 4 channels."""
        key = ("reference", name, dtype, way)
        if key not in self.loaded:
            if way is not None:
                parts = self.plain.reference(name, dtype).components
                pipe = FROM_PICTURES[way](**parts, requires_safety_checker=False)
            else:
                pipe = build_task(name, self.root / f"{name}-{dtype}").to(dtype)
            pipe.set_progress_bar_config(disable=True)
            self.loaded[key] = pipe
        return self.loaded[key]

    def ours(self, name: str, dtype: torch.dtype = torch.float32) -> Pipeline:
        if name not in TASKS:
            return self.plain.ours(name, dtype)
        if (name, dtype) not in self.loaded:
            self.loaded[name, dtype] = ldm.load(self.folder(name), dtype)
        return self.loaded[name, dtype]


@contextmanager
def noise_of_float32(pipe: DiffusionPipeline):
    """diffusers draws noise in the model's dtype, which in float64 is other noise: here it draws float32 and casts."""

    def drawn(shape, generator=None, device=None, dtype=None, layout=None):
        return randn_tensor(shape, generator=generator, device=device, dtype=torch.float32).to(dtype)

    modules = [autoencoder, sys.modules[type(pipe).__module__]]
    kept = [module.randn_tensor for module in modules]
    for module in modules:
        module.randn_tensor = drawn
    try:
        yield
    finally:
        for module, own in zip(modules, kept, strict=True):
            module.randn_tensor = own


def picture(seed: int, width: int, height: int) -> Image.Image:
    """Coloured noise, so that every pixel counts."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def box_mask(width: int, height: int, left: int, top: int, right: int, bottom: int) -> Image.Image:
    """Black, and white in the box."""
    mask = Image.new("L", (width, height), 0)
    mask.paste(255, (left, top, right, bottom))
    return mask
