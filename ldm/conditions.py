"""What a ControlNet looks at: edges, scribbles, depth, classes or poses, as pictures; and what is wrong with them.

All are RGB pictures whose values reach the network as [0, 1], unlike the picture of an autoencoder, [-1, 1].
"""

import math
import numbers
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw

from ldm.errors import LDMError, nearest
from ldm.io.folders import read_fields
from ldm.io.pictures import as_labels, as_picture
from ldm.palette import ADE20K, JOINTS, LIMBS, OPENPOSE

Source = str | Path | Image.Image | np.ndarray  # what `as_picture` takes

# ---------------------------------------------------------------------------------------------------- edges


def canny(picture: Source, low: float = 100, high: float = 200) -> Image.Image:
    """White edges, one pixel wide, on black: OpenCV's Canny of the RGB picture, as ControlNet's authors call it.

    An edge begins where the gradient exceeds `high` and goes on while it exceeds `low` (Canny 1986); both are on the
    scale of 8 bits, where gradients reach 1000 and more. Raises LDMError without OpenCV, or for low > high.
    """
    cv2 = _opencv()
    if not 0 <= low <= high < math.inf:
        raise LDMError(f"canny needs 0 <= low <= high, not low {low:g} and high {high:g}: give the smaller one as low.")
    edges = cv2.Canny(np.array(as_picture(picture)), low, high)  # (H, W)
    return Image.fromarray(edges).convert("RGB")


def scribble(picture: Source) -> Image.Image:
    """Thick white lines on black, as if drawn with a felt pen along the outlines of a photograph.

    ControlNet's authors thin and thicken the edges that a network, HED, finds (gradio_fake_scribble2image.py). This
    needs no network: at 512 pixels, or the picture's own size if that is smaller, it blurs, which loses fine texture,
    takes Canny's edges and thickens them to the width that the authors' threshold gives, 13 pixels at 512. HED knows
    outlines from texture; this does not. Raises LDMError without OpenCV.
    """
    cv2 = _opencv()
    picture = as_picture(picture)
    unit = max(min(picture.width, picture.height, 512) / 512, 0.25)
    shrink = min(512 / min(picture.size), 1)
    a = np.array(picture.resize([max(round(side * shrink), 1) for side in picture.size], Image.Resampling.BOX))
    blur = max(3 * unit, 1)  # pixels; a step of one grey level then rises by 1 / (2.5 blur) a pixel, hence the division
    edges = cv2.Canny(cv2.GaussianBlur(a, (0, 0), blur), 50 / blur, 150 / blur)
    width = 2 * int(6 * unit) + 1
    lines = cv2.dilate(edges, cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (width, width)))
    lines = Image.fromarray(lines).resize(picture.size, Image.Resampling.BILINEAR)
    return lines.point(lambda value: 255 * (value > 127)).convert("RGB")


def _opencv() -> Any:
    try:
        import cv2
    except ImportError as error:
        raise LDMError('Edges need OpenCV: python -m pip install "ldm-from-scratch[control]".') from error
    return cv2


# ---------------------------------------------------------------------------------------------------- depth

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
        processor = AutoImageProcessor.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        run = pipeline("depth-estimation", model=model, image_processor=processor, device="cpu")
    except Exception as error:  # of broken folders transformers raises many kinds
        why = " ".join(str(error).split())[:200].rstrip(".")
        raise LDMError(f"{folder} cannot be read as a depth estimator ({why}): download it again.") from error
    missing = sorted(name for name in info["missing_keys"] if NEVER_USED not in name)
    if missing:  # transformers would draw them at random
        raise LDMError(f"{folder} lacks {len(missing)} weights of its network, first {missing[0]}: download it again.")
    return run, model.config


# ---------------------------------------------------------------------------------------------------- classes


def segmentation(labels: Source) -> Image.Image:
    """Class indices in ADE20K's 150 colours: from integers (H, W), or a picture, mode L or P, that stores them.

    Indices begin at 0, wall, as networks (UperNet, SegFormer) predict them. ADE20K's own files begin at 1, with 0 for
    nothing: subtract 1 there. Raises LDMError for indices outside 0 to 149.
    """
    labels = as_labels(labels)
    low, high = labels.min(), labels.max()
    if low < 0 or high >= len(ADE20K):
        raise LDMError(
            f"Class {low if low < 0 else high} is none of ADE20K's, 0 (wall) to {len(ADE20K) - 1}: ADE20K's own files "
            "count from 1, so subtract 1 there, and mark nothing with a class that it has."
        )
    return Image.fromarray(ADE20K[labels])


# ---------------------------------------------------------------------------------------------------- poses

MOST_SIDE = 16_384  # pixels
RADIUS = 4  # pixels, of joints and, across, of limbs: OpenPose's, whatever the size of the picture
DARKEN = 0.6  # of limbs, so that joints stand out


def pose(people: Sequence, width: int, height: int) -> Image.Image:
    """OpenPose's picture of people: limbs as ellipses, joints as discs, in 18 colours on black.

    Each of `people` has 18 keypoints in the order of `ldm.palette.JOINTS`, (x, y) in pixels or None where unseen; a
    limb is drawn if both its ends are seen. The geometry is ControlNet's `draw_bodypose`, with limbs below joints as
    in controlnet_aux (the first version mixed limbs over joints). Raises LDMError for wrong counts or numbers.
    """
    for side in (width, height):
        if isinstance(side, bool) or not isinstance(side, numbers.Integral) or not 1 <= side <= MOST_SIDE:
            raise LDMError(f"A pose needs a width and a height of 1 to {MOST_SIDE} pixels, not {side!r}.")
    if not isinstance(people, Sequence | np.ndarray) or isinstance(people, str):
        raise LDMError("people must be a list that has 18 keypoints for each person.")
    people = [_keypoints(person, number) for number, person in enumerate(people)]
    canvas = Image.new("RGB", (int(width), int(height)))
    draw = ImageDraw.Draw(canvas)
    for (start, end), colour in zip(LIMBS, OPENPOSE, strict=False):  # the 18th colour is of a joint alone
        for points in people:
            if points[start] and points[end]:
                draw.polygon(_ellipse(points[start], points[end]), fill=tuple(map(int, colour)))
    canvas = Image.fromarray((np.asarray(canvas) * DARKEN).astype(np.uint8))
    draw = ImageDraw.Draw(canvas)
    for joint, colour in enumerate(OPENPOSE):
        for points in people:
            if points[joint]:
                x, y = map(int, points[joint])
                draw.ellipse((x - RADIUS, y - RADIUS, x + RADIUS, y + RADIUS), fill=tuple(map(int, colour)))
    return canvas


def _keypoints(person: Any, number: int) -> list[tuple[float, float] | None]:
    if not isinstance(person, Sequence | np.ndarray) or len(person) != len(JOINTS):
        count = f"{len(person)} keypoints" if isinstance(person, Sequence | np.ndarray) else f"{person!r:.40}"
        raise LDMError(f"Person {number} of the pose must have {len(JOINTS)} keypoints, not {count}: null if unseen.")
    points = []
    for name, point in zip(JOINTS, person, strict=True):
        if point is None:
            points.append(None)
            continue
        pair = isinstance(point, Sequence | np.ndarray) and len(point) == 2
        if not pair or not all(map(_is_coordinate, point)):
            raise LDMError(
                f"The {name} of person {number} must be null or two numbers x, y in pixels, within {MOST_SIDE}, "
                f"not {point!r:.40}."
            )
        points.append((float(point[0]), float(point[1])))
    return points


def _is_coordinate(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and abs(value) <= MOST_SIDE  # NaN is not


def _ellipse(start: tuple[float, float], end: tuple[float, float]) -> list[tuple[float, float]]:
    """A limb's outline: corners in whole pixels at every degree, as `cv2.ellipse2Poly` has them."""
    dx, dy = start[0] - end[0], start[1] - end[1]
    half, turn = int(math.hypot(dx, dy) / 2), math.radians(int(math.degrees(math.atan2(dy, dx))))
    t = np.radians(np.arange(361))
    along, across = half * np.cos(t), RADIUS * np.sin(t)
    x = int((start[0] + end[0]) / 2) + along * math.cos(turn) - across * math.sin(turn)
    y = int((start[1] + end[1]) / 2) + along * math.sin(turn) + across * math.cos(turn)
    return list(zip(np.round(x).tolist(), np.round(y).tolist(), strict=True))


def read_pose(path: str | Path) -> Image.Image:
    """`pose` of a JSON file {"width": 512, "height": 512, "people": [[[x, y], null, ...], ...]}."""
    if not isinstance(path, str | Path):
        raise LDMError("A pose is read from a JSON file: give its path.")
    fields = read_fields(path)
    if set(fields) != {"width", "height", "people"}:
        found = ", ".join(sorted(fields)) or "nothing"
        raise LDMError(f"{path} must hold width, height and people, and no more, not {found}.")
    return pose(fields["people"], fields["width"], fields["height"])


# ---------------------------------------------------------------------------------------------------- all of them

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
    _check_kind(kind)
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


def _check_kind(kind: str) -> None:
    if kind not in CONDITIONS:
        raise LDMError(f"Unknown condition {kind!r}: {', '.join(CONDITIONS)}.{nearest(str(kind), CONDITIONS)}")


def to_tensor(picture: Source) -> torch.Tensor:
    """float32 (1, 3, H, W) in [0, 1], as a ControlNet takes it."""
    return torch.from_numpy(np.array(as_picture(picture))).permute(2, 0, 1)[None].contiguous().float() / 255


# ---------------------------------------------------------------------------------------------------- doubts


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
    _check_kind(kind)
    a = np.asarray(as_picture(picture))
    return {"depth": _doubt_depth, "segmentation": _doubt_classes, "pose": _doubt_pose}.get(kind, _doubt_edges)(a, kind)


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
