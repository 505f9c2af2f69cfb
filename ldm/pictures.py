"""Pictures given to a model, as the tensors that it reads: images, masks, depth; and what is put back in the end.

Shapes: B pictures (or 1 for all of them), H, W pixels, h, w positions of the latent.
"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ldm.errors import LDMError, say_on_stderr
from ldm.io.pictures import as_mask, as_picture

SLACK = 8  # pixels by which a side may be stretched alone: what a UNet draws has multiples of 8
MOST_AREA = 4  # times the pixels the model was trained on: what is larger is drawn smaller, unless a size is asked for


def choose_size(width: int, height: int, trained: int, factor: int) -> tuple[int, int]:
    """The size to draw at: the given picture's own, as multiples of `factor`, if the model can be expected to."""
    shrink = min(1.0, (trained * trained / (width * height)) ** 0.5) if width * height > MOST_AREA * trained**2 else 1.0
    size = tuple(max(factor, int(shrink * side + 1e-6) // factor * factor) for side in (width, height))
    if size != (width, height):
        many = f", many for a model of {trained}x{trained}" if shrink < 1 else ""
        say_on_stderr(
            f"The picture has {width}x{height} pixels{many}: drawn at {size[0]}x{size[1]}, multiples of {factor}; "
            "--width and --height ask for another size."
        )
    return size


def complete(
    width: int | None, height: int | None, own: tuple[int, int] | None, factor: int
) -> tuple[int | None, int | None]:
    """The size asked for; what is left open is as the picture given has it, in its proportions (`own`)."""
    if own is None or (width is not None and height is not None):
        return width, height
    if width is None and height is None:
        return own
    scale = width / own[0] if height is None else height / own[1]
    sides = (max(factor, round(scale * side / factor) * factor) for side in own)
    return tuple(found if asked is None else asked for asked, found in zip((width, height), sides, strict=True))


def fit(picture: Image.Image, width: int, height: int, what: str = "The picture", slack: int = SLACK) -> Image.Image:
    """The picture at that size (Lanczos, as in diffusers). Raises LDMError where that would change its proportions.

    A side that was rounded down to a multiple of `slack` pixels is stretched by as little; more would be seen.
    """
    w, h = picture.size
    if (w, h) == (width, height):
        return picture
    scale = max(width / w, height / h)
    if abs(w * scale - width) >= slack * max(scale, 1) or abs(h * scale - height) >= slack * max(scale, 1):
        raise LDMError(
            f"{what} has {w}x{h} pixels, and {width}x{height} are to be drawn: that would distort it. Crop it, or ask "
            f"for a size of its proportions."
        )
    return picture.resize((width, height), Image.Resampling.LANCZOS)


def one_or_each(given: object, count: int, what: str) -> list:
    """The picture for all, or one for each of `count`, as a list. Raises LDMError for another number of them."""
    found = list(given) if isinstance(given, list | tuple) else [given]
    if len(found) not in (1, count):
        raise LDMError(f"{len(found)} {what}s for {count} pictures to be drawn: give one for all, or one each.")
    return found


def image_tensor(pictures: Sequence[Image.Image]) -> Tensor:
    """RGB pictures of one size -> (B, 3, H, W) in [-1, 1], what the VAE reads."""
    pixels = torch.from_numpy(np.stack([np.asarray(picture) for picture in pictures]))
    return 2 * (pixels.permute(0, 3, 1, 2).float() / 255) - 1


def mask_tensor(masks: Sequence[Image.Image]) -> Tensor:
    """Masks of one size -> (B, 1, H, W), 1 where white (128 or more): there the picture is drawn anew."""
    return torch.from_numpy(np.stack([np.asarray(mask) >= 128 for mask in masks])).float()[:, None]


def read_mask(mask: object, picture: Image.Image, name: str = "The mask") -> Image.Image:
    """The mask of a picture: white is drawn anew, black is kept. Raises LDMError if it is empty or of another size."""
    mask = as_mask(mask, name)
    if mask.size != picture.size:
        raise LDMError(
            f"{name} has {mask.width}x{mask.height} pixels and the picture {picture.width}x{picture.height}: they must "
            "be equal, for it says which of them are drawn anew."
        )
    if np.asarray(mask).max() < 128:
        raise LDMError(
            f"{name} is empty: no pixel of it is white (128 or more), so nothing would be drawn. White is drawn anew, "
            "black is kept."
        )
    return mask


def latent_mask(mask: Tensor, factor: int, nearest: bool = False) -> Tensor:
    """(B, 1, H, W) -> (B, 1, h, w). A position is drawn anew if any of its pixels is.

    `nearest` takes the pixel at its corner, as diffusers does: a line thinner than a position can be lost there.
    """
    if nearest:
        return F.interpolate(mask, scale_factor=1 / factor)
    return F.max_pool2d(mask, factor)


def depth_tensor(depth: object, height: int, width: int) -> Tensor:
    """Depths (H, W), (B, H, W) of any scale, larger is nearer, or a grey picture -> (B, 1, height, width) in [-1, 1].

    Each picture's own range is stretched to it, as the depth model of Stable Diffusion 2 was trained.
    """
    if isinstance(depth, Tensor | np.ndarray):
        depth = torch.as_tensor(depth).float()
        depth = depth[None] if depth.dim() == 2 else depth
    else:
        depth = torch.from_numpy(np.array(as_picture(depth, "the depth").convert("L"))).float()[None]
    if depth.dim() != 3 or not torch.isfinite(depth).all():
        raise LDMError(f"The depth must be finite numbers of shape (H, W) or (B, H, W), not {tuple(depth.shape)}.")
    depth = F.interpolate(depth[:, None], size=(height, width), mode="bicubic", align_corners=False)
    low, high = depth.amin((1, 2, 3), keepdim=True), depth.amax((1, 2, 3), keepdim=True)
    if (high - low <= 1e-5 * depth.abs().amax((1, 2, 3), keepdim=True)).any():  # what is left is rounding
        raise LDMError("The depth is the same everywhere: there is nothing in it to draw by.")
    return 2 * (depth - low) / (high - low) - 1


def extend(picture: Image.Image, left: int, top: int, right: int, bottom: int) -> tuple[Image.Image, Image.Image]:
    """A picture with room around it (pixels), and the mask of that room: what outpainting draws.

    The room is filled with the picture's border: what the VAE sees beside the picture changes the picture's own latents
    near it, and run-on colours change them least. At most the picture's own width and height are added on a side, for
    the model must see what it continues.
    """
    sides = (left, top, right, bottom)
    if any(not isinstance(side, int) or side < 0 for side in sides) or not any(sides):
        raise LDMError(
            f"Outpainting takes pixels for left, top, right, bottom, none below 0 and some above: not {sides}."
        )
    if max(left, right) > picture.width or max(top, bottom) > picture.height:
        raise LDMError(
            f"Outpainting by {sides} adds more on a side than the picture has ({picture.width}x{picture.height}): go "
            "there in several steps, for the model must see what it continues."
        )
    pad = ((top, bottom), (left, right))
    wide = Image.fromarray(np.pad(np.asarray(picture), (*pad, (0, 0)), mode="edge"))
    known = np.zeros((picture.height, picture.width), np.uint8)
    return wide, Image.fromarray(np.pad(known, pad, constant_values=255))


def paste(drawn: Image.Image, original: Image.Image, mask: Image.Image) -> Image.Image:
    """What was drawn where the mask is white, the original's own pixels elsewhere."""
    inside = mask.point(lambda value: 255 * (value >= 128))
    return Image.composite(drawn, original, inside)


def changed_outside(drawn: Image.Image, original: Image.Image, mask: Image.Image) -> float:
    """By how many grey levels of 255 the pictures differ, on average, where the mask is black."""
    outside = np.asarray(mask) < 128
    apart = np.abs(np.asarray(drawn, np.float64) - np.asarray(original, np.float64)).mean(axis=2)
    return float(apart[outside].mean()) if outside.any() else 0.0


def enlarge(x0: Tensor, height: int, width: int) -> Tensor:
    """Latents (B, C, h, w) at another size, to be refined: the "latent upscale" of hi-res fixes.

    Bicubic with antialiasing; values between the positions are no latents of anything, so strength 0.4 and more is
    needed to draw over them.
    """
    return F.interpolate(x0, size=(height, width), mode="bicubic", antialias=True)
