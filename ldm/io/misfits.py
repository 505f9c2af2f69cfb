"""Weights that don't fit their model: what is missing, left over or misshapen, and what likely lies behind it."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch

from ldm.errors import LDMError
from ldm.io.folders import some
from ldm.io.headers import Entry

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class Found(NamedTuple):
    """A tensor of a file, the model's name for it, and its type as torch knows it (None: it doesn't)."""

    key: str
    entry: Entry
    dtype: torch.dtype | None


def refuse_misfits(what: str, expected: Mapping[str, torch.Tensor], found: Sequence[Found]) -> None:
    """Raise LDMError unless `found` are the names, shapes and types of `expected`."""
    names = {key for key, _, _ in found}
    missing = [key for key in expected if key not in names]
    unexpected = [entry for key, entry, _ in found if key not in expected]
    shapes, types = [], []
    for key, entry, dtype in found:
        if key in expected and entry.shape != tuple(expected[key].shape):
            shapes.append((key, entry))
        elif key in expected and not _may_become(dtype, expected[key].dtype):
            types.append((key, entry))
    faults = []
    if missing:
        faults.append(f"missing {some(missing)}")
    if unexpected:
        faults.append("unexpected " + some([f"{e.name} (in {e.path.name})" for e in unexpected]))
    if shapes:
        lines = [f"{e.name} in {e.path.name} is {e.shape} instead of {tuple(expected[k].shape)}" for k, e in shapes]
        faults.append("wrong shape: " + some(lines))
    if types:
        lines = [
            f"{e.name} in {e.path.name} is {e.dtype} instead of {str(expected[k].dtype).removeprefix('torch.')}"
            for k, e in types
        ]
        faults.append("wrong type: " + some(lines))
    if faults:
        cause = _likely_cause(missing, [e.name for e in unexpected], [e for _, e in shapes], [e for _, e in types])
        raise LDMError(f"{what}: {'; '.join(faults)}. {cause}")


def _may_become(stored: torch.dtype | None, wanted: torch.dtype) -> bool:
    """Any float may stand for a float; whole numbers and truth values only for their own type."""
    return stored in FLOATS if wanted.is_floating_point else stored == wanted


CONTEXT_WIDTHS = {768: "SD 1.x", 1024: "SD 2.x", 1280: "the SDXL refiner", 2048: "SDXL"}
INPUT_CHANNELS = {4: "text to image", 5: "depth", 7: "the upscaler", 8: "InstructPix2Pix", 9: "inpainting"}


def _likely_cause(
    missing: Sequence[str], unexpected: Sequence[str], shapes: Sequence[Entry], types: Sequence[Entry]
) -> str:
    """What most often lies behind such a misfit, and what to do."""
    if any("lora" in name for name in unexpected):
        return "This is a LoRA, a change to a model and not a model: add it to one (pipe.add_lora, --lora)."
    if any(name.startswith(("model.diffusion_model.", "first_stage_model.")) for name in unexpected):
        return "This is a single-file checkpoint with all parts in one: load it as such."
    for longer, shorter, which in ((unexpected, missing, "file's"), (missing, unexpected, "model's")):
        prefix = next((n[: -len(s)] for n in longer[:1] for s in shorter if n.endswith("." + s)), None)
        if prefix:
            return f"The {which} names begin with {prefix!r}, the others don't: check which model the file is for."
    for entry in shapes:
        if entry.name.endswith("attn2.to_k.weight") and entry.shape[-1] in CONTEXT_WIDTHS:
            return f"A context of width {entry.shape[-1]} is that of {CONTEXT_WIDTHS[entry.shape[-1]]}."
        if entry.name == "conv_in.weight" and len(entry.shape) == 4 and entry.shape[1] in INPUT_CHANNELS:
            return f"{entry.shape[1]} input channels are those of {INPUT_CHANNELS[entry.shape[1]]}."
    if any(entry.dtype.endswith("8") or entry.dtype.startswith(("F8", "F6", "F4")) for entry in types):
        return "Quantised weights are not read: take float16, bfloat16 or float32 ones."
    return "Check that the weights and the configuration belong to the same model."
