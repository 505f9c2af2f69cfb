"""What is wrong with a picture that a ControlNet is to look at, in sentences."""

import math

import numpy as np
import torch

from ldm.conditions.palette import ADE20K
from ldm.errors import LDMError, nearest
from ldm.io.pictures import Source, as_picture


def check_range(condition: torch.Tensor) -> None:
    """Raise LDMError unless the values lie in [0, 1]; saying which other range they seem to have."""
    if not condition.is_floating_point():
        raise LDMError(f"The condition is of {condition.dtype}: if it looks like 0..255, divide it by 255.")
    low, high = (condition.min().item(), condition.max().item()) if condition.numel() else (math.nan, math.nan)
    if not (math.isfinite(low) and math.isfinite(high)):
        raise LDMError("The condition is empty or holds NaN or infinity: look where it comes from.")
    if 0 <= low and high <= 1:
        return
    advice = "bring it into [0, 1]"
    if -1 <= low < 0 and high <= 1:
        advice = "it looks like [-1, 1], so take (x + 1) / 2"
    elif 0 <= low and 1 < high <= 255:
        advice = "it looks like 0..255, so divide it by 255"
    raise LDMError(f"The condition reaches from {low:g} to {high:g}, but a ControlNet takes [0, 1]: {advice}.")


def doubts(kind: str, picture: Source) -> list[str]:
    """Sentences about a picture that does not look as the network of that kind knows its conditions; mostly none."""
    check_kind(kind)
    return DOUBTS[kind](np.asarray(as_picture(picture)), kind)


def check_kind(kind: str) -> None:
    """Raise LDMError for a condition that ldm doesn't know."""
    if kind not in DOUBTS:
        raise LDMError(f"Unknown condition {kind!r}: {', '.join(DOUBTS)}.{nearest(str(kind), DOUBTS)}")


def already_processed(kind: str, picture: Source) -> list[str]:
    """A sentence, or none, about a source for `canny` or `scribble` that has been through them: to do it twice doubles
    every line. Of other kinds nothing is said."""
    if kind not in ("canny", "scribble"):
        return []
    a = np.asarray(as_picture(picture))
    if _is_coloured(a) or _between(a) > 0.1:
        return []
    return [f"The source is nearly only black and white, as if it were edges already: {kind} would double its lines."]


def _is_coloured(a: np.ndarray) -> bool:
    return bool((np.ptp(a, axis=2) > 24).mean() > 0.01)  # JPEG tints a few pixels of a grey picture


def _between(a: np.ndarray) -> float:
    """The share of pixels that are neither nearly black nor nearly white."""
    return float(((a.max(2) > 48) & (a.max(2) < 208)).mean())


def _doubt_edges(a: np.ndarray, kind: str) -> list[str]:
    if a.max() < 128:
        return ["The edge picture holds no edge: the network will not be led by anything."]
    if _is_coloured(a) or _between(a) > 0.25:  # shrinking edges greys some
        return [f"The edge picture has many colours or greys, as a photograph has: pass it through {kind} first."]
    if (a.max(2) > 127).mean() > 0.5:
        return ["The edge picture is mostly white: the network knows white lines on black, so invert it."]
    return []


def _doubt_depth(a: np.ndarray, _: str) -> list[str]:
    if _is_coloured(a):
        return ["The depth picture is coloured: the network knows grey, near white and far black."]
    if np.ptp(a.max(2)) <= 2:
        return ["The depth picture is the same everywhere: it says nothing about depth."]
    return []


def _doubt_classes(a: np.ndarray, _: str) -> list[str]:
    known = {tuple(colour) for colour in ADE20K.tolist()}
    colours, counts = np.unique(a.reshape(-1, 3), axis=0, return_counts=True)
    strange = sum(n for colour, n in zip(colours.tolist(), counts.tolist(), strict=True) if tuple(colour) not in known)
    if strange <= 0.05 * counts.sum():  # smooth resizing mixes colours at borders
        return []
    if not _is_coloured(a) and a.max() < len(ADE20K):
        return ["The picture of classes is grey, as if it held indices: colour it with segmentation first."]
    return ["The picture of classes has colours that are not ADE20K's: keep it a PNG, and resize it by nearest pixels."]


def _doubt_pose(a: np.ndarray, _: str) -> list[str]:
    lit = a[a.max(2) > 48]  # (n, 3)
    if len(lit) == 0:
        return ["The pose picture is black: nobody is in it."]
    if len(lit) > 0.5 * a.shape[0] * a.shape[1]:
        return ["The pose picture is not mostly black: the network knows OpenPose's coloured limbs on black."]
    if (np.ptp(lit, axis=1) > 48).mean() < 0.5:
        return ["The pose picture has no colours: the network tells limbs apart by OpenPose's."]
    return []


DOUBTS = {
    "canny": _doubt_edges,
    "scribble": _doubt_edges,
    "depth": _doubt_depth,
    "segmentation": _doubt_classes,
    "pose": _doubt_pose,
}
