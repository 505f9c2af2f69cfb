"""FLUX's layers under other names than ours: its authors', which are kohya's and ComfyUI's too, and XLabs'.

Where we follow diffusers, the authors keep what reads the same input in one layer, whose outputs lie one behind the
other; so the change of one of theirs is that of several of ours, to each its rows (`ldm.checkpoints.flux_names`). XLabs
changes these too, by processors of their attention, but of a single block the first three outputs of four alone:

    double_blocks.N.processor.qkv_lora1, proj_lora1      img_attn.qkv, img_attn.proj
    double_blocks.N.processor.qkv_lora2, proj_lora2      txt_attn.qkv, txt_attn.proj
    single_blocks.N.processor.qkv_lora, proj_lora        linear1 without its last part, linear2
"""

import re
from typing import NamedTuple

from ldm.checkpoints.names import SHARES, Origin, origins, shapes
from ldm.models.flux import FluxConfig

Pieces = tuple[tuple[int, int], ...]  # rows of a file's layer, from and to, that make one of ours

LAYER = re.compile(  # a layer's name, flattened, in a file that doesn't say whose layer it is
    r"(double_blocks|single_blocks|transformer_blocks|single_transformer_blocks)_\d+_.+|"
    r"(time_in|vector_in|guidance_in|final_layer|time_text_embed)_.+|"
    r"img_in|txt_in|x_embedder|context_embedder|norm_out_linear|proj_out"
)
ORIGINAL = re.compile(r"(double_blocks|single_blocks|time_in|vector_in|guidance_in|final_layer)_.+|img_in|txt_in")
XLABS = {  # how a layer's name ends -> what XLabs calls it
    ".img_attn.qkv": ".qkv_lora1",
    ".img_attn.proj": ".proj_lora1",
    ".txt_attn.qkv": ".qkv_lora2",
    ".txt_attn.proj": ".proj_lora2",
    ".linear1": ".qkv_lora",
    ".linear2": ".proj_lora",
}


class Target(NamedTuple):
    """One of our layers, and which rows of the file's layer are its own; None: all, as they stand."""

    layer: str
    rows: Pieces | None = None


def named(config: FluxConfig) -> dict[str, tuple[Target, ...]]:
    """Every other name that a layer of such a network has, and what it means."""
    found: dict[str, tuple[Target, ...]] = {}
    for key, shape in shapes("transformer", config).items():
        origin = origins("transformer", config, "")[key]
        if key.endswith(".weight"):
            theirs = origin.name.rpartition(".")[0]
            found[theirs] = (*found.get(theirs, ()), Target(key.removesuffix(".weight"), rows_of(origin, shape[0])))
    for theirs, targets in list(found.items()):
        if theirs.endswith("_norm"):  # the authors' gain is called `scale`, and some name it as a layer
            found[f"{theirs}.scale"] = targets
        for ending, xlabs in XLABS.items():
            if theirs.endswith(ending):
                own = [target for target in targets if not target.layer.endswith("proj_mlp")]
                found[theirs.removesuffix(ending) + xlabs] = tuple(own)
    return found


def rows_of(origin: Origin, rows: int) -> Pieces | None:
    """Which rows of the original tensor ours are, that has so many; None: all, in their order."""
    if origin.form in SHARES:
        first, last, _ = SHARES[origin.form]
        one = rows // (last - first)
        return ((first * one, last * one),)
    return ((rows // 2, rows), (0, rows // 2)) if origin.form == "swapped" else None
