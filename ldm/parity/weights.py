"""Both sides' weights, tensor by tensor: the first question, for with other numbers nothing else can agree."""

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn

from ldm.parity.blocks import Divergence
from ldm.parity.compare import DIFFERS, EQUAL, REFUSED, Line, distance, skipped
from ldm.parity.sides import Part


def compare(part: str, mine: nn.Module, other: Part, port: bool) -> Iterator[Line | Divergence]:
    """One line for a network: every tensor of ours and theirs, bit by bit."""
    ours = mine.state_dict()
    theirs = {other.rename(name): tensor for name, tensor in other.module.state_dict().items()}
    theirs.pop(None, None)
    common = [name for name in ours if name in theirs]
    if port and not common:
        yield skipped("weights", f"{part}: no name of the port's module is the checkpoint's")
        return
    line = Line("weights", f"{part}: {len(ours)} tensors", EQUAL, 0.0, 0.0, 0.0)
    left = [name for name in ours if name not in theirs] + [name for name in theirs if name not in ours]
    if left and not port:
        yield replace(line, verdict=DIFFERS, note=f"{len(left)} names on one side only, such as {left[0]}")
        return
    if not any(tensor.abs().max() > 0 for tensor in theirs.values() if tensor.numel()):
        yield replace(line, verdict=REFUSED, note="every weight is zero")
        return
    apart = [name for name in common if not alike(ours[name], theirs[name])]
    shared = sum(ours[name].data_ptr() == theirs[name].data_ptr() for name in common)
    notes = [f"{shared} shared"] * (shared > 0) + [f"{len(left)} have other names and are passed over"] * bool(left)
    if not apart:
        yield replace(line, note="; ".join(notes))
        return
    first = apart[0]
    found = [distance(ours[name], theirs[name]) for name in apart if ours[name].shape == theirs[name].shape]
    off, relative = max(found, default=(float("inf"), float("inf")))
    notes.append(f"{len(apart)} differ, the first is {first}")
    yield replace(line, verdict=DIFFERS, difference=off, relative=relative, note="; ".join(notes))
    yield explain(part, first, ours, theirs[first])


def alike(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and (a.data_ptr() == b.data_ptr() or torch.equal(a, b))


def explain(part: str, name: str, ours: dict[str, Tensor], theirs: Tensor) -> Divergence:
    """What the other tensor is, if it isn't ours: another one, a transposed or rounded one, or none at all."""
    mine, causes = ours[name], []
    same = [other for other, tensor in ours.items() if other != name and alike(tensor, theirs)]
    if same:
        causes.append(f"it holds the numbers of {same[0]}: the two are swapped or one was loaded twice")
    if theirs.shape == mine.shape:
        if mine.dim() > 1 and mine.shape[0] == mine.shape[1] and torch.equal(mine.transpose(0, 1), theirs):
            causes.append("it is transposed")
        for dtype in (torch.float16, torch.bfloat16, torch.float32):
            if theirs.is_floating_point() and torch.equal(mine.to(dtype).to(mine.dtype), theirs):
                causes.append(f"it was rounded to {str(dtype).removeprefix('torch.')}")
                break
        if not theirs.any():
            causes.append("it is all zeros: never loaded")
        if torch.equal(-mine, theirs):
            causes.append("its sign is turned")
        if mine.dim() > 1 and len(mine) % 2 == 0 and torch.equal(torch.cat(mine.chunk(2)[::-1]), theirs):
            causes.append("its two halves are swapped")
    elif theirs.numel() == mine.numel() and mine.dim() == 2 and torch.equal(mine.T, theirs):
        causes.append("it is transposed")
    else:
        causes.append(f"its shape is {tuple(theirs.shape)}, ours is {tuple(mine.shape)}")
    tried = ["another tensor of the model", "transposed", "rounded", "zeros", "sign", "halves swapped"]
    off = distance(mine, theirs)[1] if mine.shape == theirs.shape else float("inf")
    return Divergence(f"weights of {part}", name, "tensor", name, off, (), tuple(causes), tuple(tried))
