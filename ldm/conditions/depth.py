"""Depth as a grey picture: the scenes' own, or what a network of transformers sees in a photograph."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from ldm.errors import LDMError
from ldm.io.folders import read_fields
from ldm.io.pictures import Source, as_picture

DISTANCE = ("glpn", "zoedepth", "depth_pro")  # transformers' names of networks that tell metres: larger is farther
NEARNESS = ("dpt", "depth_anything")  # and of those that tell 1 / distance, up to scale and shift, as MiDaS does
NEAREST = 0.1  # metres: 1 / distance is cut off there, or one pixel at 0 would leave all others black
NEVER_USED = "fusion_stage.layers.0.residual_layer1."  # Intel's DPT files lack it, and nothing reads it


def depth_picture(depth: np.ndarray) -> Image.Image:
    """Depth as a grey picture, near white: (H, W) floats in [0, 1], 1 the nearest, as of `ldm.scenes.render`.

    The values are not stretched: 0.5 is grey wherever it stands. Raises LDMError for other values or shapes.
    """
    depth = np.asarray(depth)
    if depth.ndim != 2 or depth.size == 0 or not np.issubdtype(depth.dtype, np.floating):
        raise LDMError(f"Depth must be an array of floats (H, W), not {depth.dtype} {depth.shape}.")
    if not np.isfinite(depth).all() or depth.min() < 0 or depth.max() > 1:
        raise LDMError("Depth must lie within 0, the farthest, and 1, the nearest: scale it first.")
    return Image.fromarray(np.round(255 * depth).astype(np.uint8)).convert("RGB")


def estimate_depth(picture: Source, folder: str | Path) -> Image.Image:
    """Depth that a network of transformers sees in a photograph: grey, nearest white, farthest black.

    `folder` holds the network (DPT, Depth Anything, GLPN, ZoeDepth, Depth Pro) in safetensors; nothing is fetched.
    Its output is resized to the picture (bicubic) and stretched to 0..1. Networks that tell metres are inverted,
    1 / distance, which is what the others predict and what ControlNet's depth was trained on; "dpt" is taken to be
    such another, MiDaS. Raises LDMError without transformers, or for a folder that holds no such network.
    """
    picture = as_picture(picture)
    run, config = _depth_estimator(Path(folder))
    depth = run(picture)["predicted_depth"].float()  # (H, W), by bicubic interpolation inside the pipeline
    values = depth.reshape(picture.height, picture.width).numpy()
    if config.model_type in DISTANCE or getattr(config, "depth_estimation_type", "relative") == "metric":
        values = 1 / np.maximum(values, NEAREST)
    low, high = values.min(), values.max()
    if not (np.isfinite(low) and np.isfinite(high) and low < high):
        raise LDMError(f"The depth estimator in {folder} sees no depth in this picture: take another of the two.")
    return depth_picture(((values - low) / (high - low)).clip(0, 1))


def predict_depth(picture: Source, folder: str | Path) -> torch.Tensor:
    """What the network itself says of a photograph, at its own size and scale: (h, w), as `depth=` takes it.

    A depth-to-image model stretches that by itself (`ldm.pictures.depth_tensor`). `folder` as in `estimate_depth`.
    """
    run, _ = _depth_estimator(Path(folder))
    with torch.no_grad():
        return run.model(**run.image_processor(as_picture(picture), return_tensors="pt")).predicted_depth[0]


def _depth_estimator(folder: Path) -> tuple[Callable, Any]:
    """transformers' depth-estimation pipeline around a local network, on the CPU; and the network's configuration."""
    if not (folder / "config.json").is_file():
        raise LDMError(f"{folder} holds no depth estimator (config.json): give a folder of transformers.")
    try:
        from transformers import AutoImageProcessor, AutoModelForDepthEstimation, pipeline
    except ImportError as error:
        raise LDMError('Depth of photographs needs transformers: python -m pip install "transformers>=5.6".') from error
    kind = read_fields(folder / "config.json").get("model_type")
    if kind not in DISTANCE + NEARNESS:
        raise LDMError(f"{folder} is of type {kind!r}, no depth estimator known: {', '.join(NEARNESS + DISTANCE)}.")
    try:
        model, info = AutoModelForDepthEstimation.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False, use_safetensors=True, dtype=torch.float32,
            output_loading_info=True,
        )  # fmt: skip
        beside = folder.parent / "feature_extractor"  # where Stable Diffusion's depth-to-image folder has it
        where = folder if (folder / "preprocessor_config.json").exists() or not beside.is_dir() else beside
        processor = AutoImageProcessor.from_pretrained(where, local_files_only=True, trust_remote_code=False)
        run = pipeline("depth-estimation", model=model, image_processor=processor, device="cpu")
    except Exception as error:  # of broken folders transformers raises many kinds
        why = " ".join(str(error).split())[:200].rstrip(".")
        raise LDMError(f"{folder} cannot be read as a depth estimator ({why}): download it again.") from error
    missing = sorted(name for name in info["missing_keys"] if NEVER_USED not in name)
    if missing:  # transformers would draw them at random
        raise LDMError(f"{folder} lacks {len(missing)} weights of its network, first {missing[0]}: download it again.")
    return run, model.config
