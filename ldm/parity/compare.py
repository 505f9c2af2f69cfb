"""How two tensors are held against each other, and when that is a pass.

In float64 and float32 the largest difference counts, relative to the largest value of the reference. In half precision
both sides round at every operation and neither is the truth: there both are held against a run in a wider type, and
ours must not be farther from it than the reference.
A reference that is all but zero, the same number everywhere, or not finite proves nothing: it is refused.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

ALLOWED = {torch.float64: 1e-11, torch.float32: 1e-5}  # of the reference's largest value
HALF = (torch.float16, torch.bfloat16)
SLACK = 1.05  # in half precision: our root mean square error, as a multiple of the reference's
NOTHING = 1e-8  # a reference with no value beyond this would be met by zeros
EQUAL, DIFFERS, REFUSED, SKIPPED = "equal", "differs", "refused", "skipped"
BAD = (DIFFERS, REFUSED)


@dataclass(frozen=True)
class Line:
    """One comparison: a row of the table. Milliseconds and bytes are of ours and theirs, None where not measured."""

    station: str
    what: str
    verdict: str
    difference: float | None = None  # the largest
    relative: float | None = None  # to the reference's largest value; in half precision our error, rms
    allowed: float | None = None
    ours_ms: float | None = None
    theirs_ms: float | None = None
    ours_bytes: int | None = None
    theirs_bytes: int | None = None
    note: str = ""


def unfit(reference: Tensor) -> str:
    """Why nothing can be proved with this reference, or ""."""
    if reference.numel() == 0:
        return "the reference is empty"
    if not reference.is_floating_point():
        return "" if reference.unique().numel() > 1 else "the reference is one number everywhere"
    if not reference.isfinite().all():
        return f"the reference isn't finite ({int((~reference.isfinite()).sum())} of {reference.numel()} numbers)"
    if reference.abs().max() < NOTHING:
        return f"the reference is all but zero (at most {reference.abs().max().item():.1e}): zeros would pass"
    if (reference - reference.flatten()[0]).abs().max() <= 1e-6 * reference.abs().max():
        return "the reference is one number everywhere"
    return ""


def mismatch(ours: Tensor, reference: Tensor) -> str:
    """How the two differ in kind, or ""."""
    if ours.shape != reference.shape:
        return f"shape {tuple(ours.shape)}, the reference's is {tuple(reference.shape)}"
    if ours.dtype != reference.dtype:
        return f"dtype {name_of(ours.dtype)}, the reference's is {name_of(reference.dtype)}"
    if ours.device != reference.device:
        return f"on {ours.device}, the reference on {reference.device}"
    return ""


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def wide(x: Tensor) -> Tensor:
    """In float64, where differences are taken; on a device that has none (MPS), in float32 as it is."""
    return x if x.device.type == "mps" else x.double()


def distance(ours: Tensor, reference: Tensor) -> tuple[float, float]:
    """The largest difference, and the same in units of the reference's largest value. NaN counts as infinity."""
    off = (wide(ours) - wide(reference)).abs().max().item() if ours.numel() else 0.0
    size = wide(reference).abs().max().item() if reference.numel() else 0.0
    off = off if off == off else float("inf")
    return off, off / size if size else (0.0 if off == 0 else float("inf"))


def rms(ours: Tensor, truth: Tensor) -> float:
    """The root mean square error, in units of the truth's root mean square."""
    off = (wide(ours) - wide(truth)).square().mean().sqrt() / wide(truth).square().mean().sqrt()
    return off.item() if off == off else float("inf")


def held(
    station: str, what: str, ours: Tensor, reference: Tensor, allowed: float | None = None, truth: Tensor | None = None,
    slack: float = SLACK,
) -> Line:  # fmt: skip
    """Ours held against the reference: a line of the table.

    `allowed` replaces the dtype's own bound. `truth` is the reference's answer in a wider type, in half precision.
    """
    line = Line(station, what, REFUSED)
    for tensor in (reference, truth):
        if tensor is not None and (fault := unfit(tensor)):
            return replace(line, note=fault)
    if fault := mismatch(ours, reference):
        return replace(line, verdict=DIFFERS, note=fault)
    off, relative = distance(ours, reference)
    if not ours.is_floating_point():
        count = int((ours != reference).sum())
        return replace(line, verdict=DIFFERS if count else EQUAL, difference=off, relative=relative, allowed=0.0,
                       note=f"{count} of {ours.numel()} numbers" if count else "")  # fmt: skip
    if truth is not None:
        mine, theirs = rms(ours, truth), rms(reference, truth)
        bound = slack * theirs
        note = f"rms error against {name_of(truth.dtype)}; theirs {theirs:.2e}"
        verdict = EQUAL if mine <= bound else DIFFERS
        return replace(line, verdict=verdict, difference=off, relative=mine, allowed=bound, note=note)
    if allowed is None:
        allowed = ALLOWED[reference.dtype]
    verdict = EQUAL if relative <= allowed else DIFFERS
    return replace(line, verdict=verdict, difference=off, relative=relative, allowed=allowed)


def skipped(station: str, why: str) -> Line:
    return Line(station, "", SKIPPED, note=why)


def same_layout(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor] | None:
    """The two in one shape, where they are one map written as (B, C, H, W), (B, C, N) or (B, N, C); None if not."""
    if a.shape == b.shape:
        return a, b
    if a.numel() != b.numel() or len(a) != len(b) or {a.dim(), b.dim()} != {3, 4}:
        return None
    four, three = (a, b) if a.dim() == 4 else (b, a)
    flat = four.flatten(2)
    if flat.shape != three.shape:
        flat = flat.transpose(1, 2)
    if flat.shape != three.shape:
        return None
    return (flat, three) if a.dim() == 4 else (three, flat)
