"""What a ControlNet looks at: edges, scribbles, depth, classes or poses, as pictures; and what is wrong with them.

All are RGB pictures whose values reach the network as [0, 1], unlike the picture of an autoencoder, [-1, 1].
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ldm.conditions.checks import already_processed, check_kind, check_range, doubts
from ldm.conditions.classes import segmentation
from ldm.conditions.depth import depth_picture, estimate_depth, predict_depth
from ldm.conditions.edges import canny, scribble
from ldm.conditions.pose import pose, read_pose
from ldm.errors import LDMError
from ldm.io.pictures import Source, as_picture

__all__ = [
    "CONDITIONS", "already_processed", "canny", "check_kind", "check_range", "depth_picture", "doubts",
    "estimate_depth", "pose", "predict_depth", "prepare", "read_pose", "scribble", "segmentation", "to_tensor",
]  # fmt: skip

CONDITIONS: dict[str, Callable[..., Image.Image]] = {
    "canny": canny,
    "scribble": scribble,
    "depth": estimate_depth,
    "segmentation": segmentation,
    "pose": read_pose,
}


def prepare(
    kind: str, source: Source, low: float | None = None, high: float | None = None, estimator: str | Path | None = None
) -> Image.Image:
    """The condition of that kind, from a photograph; a picture of class indices ("segmentation"); a JSON file ("pose").

    low, high: canny's thresholds; estimator: the folder that depth needs. Raises LDMError for an unknown kind, an
    option of another kind, and as the kind's function does.
    """
    check_kind(kind)
    thresholds = {name: value for name, value in (("low", low), ("high", high)) if value is not None}
    if thresholds and kind != "canny":
        raise LDMError(f"{' and '.join(thresholds)} belong to canny, not to {kind}: leave them out.")
    if estimator is not None and kind != "depth":
        raise LDMError(f"An estimator belongs to depth, not to {kind}: leave it out.")
    if kind == "canny":
        return canny(source, **thresholds)
    if kind == "depth":
        if estimator is None:
            raise LDMError("Depth needs an estimator: name the folder of a depth network of transformers.")
        return estimate_depth(source, estimator)
    return CONDITIONS[kind](source)


def to_tensor(picture: Source) -> torch.Tensor:
    """float32 (1, 3, H, W) in [0, 1], as a ControlNet takes it."""
    return torch.from_numpy(np.array(as_picture(picture))).permute(2, 0, 1)[None].contiguous().float() / 255
