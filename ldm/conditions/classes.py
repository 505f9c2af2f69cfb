"""Classes of things and grounds, in ADE20K's colours."""

from PIL import Image

from ldm.conditions.palette import ADE20K
from ldm.errors import LDMError
from ldm.io.pictures import Source, as_labels


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
