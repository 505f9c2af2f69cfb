"""Random weights that hide nothing, shared by both sides of a comparison.

Default initialisation hides mistakes: with gains of 1, biases of 0 and zero convolutions, swapped norms and a dead
ControlNet change nothing. So every parameter is drawn. Both sides are built without numbers and given the very same
tensors, drawn in the dtype and on the device of the run: SDXL in bfloat16 takes 7 GB once, and not twice.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ldm.io.weights import blank

SMALL = 100_000  # parameters of a layer that is widened at once


def draw(module: nn.Module, dtype: torch.dtype, device: torch.device, seed: int) -> dict[str, Tensor]:
    """A tensor for every parameter of a module that has none yet: {name: tensor}.

    Weights at fan-in scale, norm gains around 1, biases around 0, embeddings of 0.5, no convolution zero.
    """
    g = torch.Generator(device).manual_seed(seed)
    state = {}
    for prefix, owner in module.named_modules():
        norm = isinstance(owner, nn.GroupNorm | nn.LayerNorm)
        for name, p in owner.named_parameters(recurse=False):
            x = torch.empty(p.shape, dtype=dtype, device=device).normal_(generator=g)
            if norm and name == "weight":
                x.mul_(0.3).add_(1)
            elif name == "bias" or norm:
                x.mul_(0.3)
            elif isinstance(owner, nn.Embedding) or p.dim() == 1:
                x.mul_(0.5)
            else:
                x.mul_(p[0].numel() ** -0.5)
            state[f"{prefix}.{name}" if prefix else name] = x
    return state


def give(module: nn.Module, state: dict[str, Tensor], device: torch.device) -> nn.Module:
    """The module with these tensors as its parameters, not copies of them; buffers that no file holds are made."""
    module.load_state_dict(state, strict=True, assign=True)
    for owner in module.modules():
        for name, buffer in owner.named_buffers(recurse=False):
            if buffer.is_meta and name == "position_ids":  # CLIP's, in transformers
                owner._buffers[name] = torch.arange(buffer.shape[-1], device=device).expand(buffer.shape)
    left = [n for named in (module.named_parameters(), module.named_buffers()) for n, t in named if t.is_meta]
    if left:
        raise NotImplementedError(f"{type(module).__name__}: {left[0]} has no numbers, and is not drawn.")
    return module.eval().requires_grad_(False)


def share(
    make: Callable[[], nn.Module], theirs: nn.Module, rename: Callable[[str], str | None], device: torch.device
) -> nn.Module:
    """Our model with the reference's own tensors: the same storage."""
    with blank():
        model = make()
    state = {rename(key): value for key, value in theirs.state_dict().items() if rename(key) is not None}
    return give(model, state, device)


@contextmanager
def widened(module: nn.Module, dtype: torch.dtype = torch.float32, at_once: int = 1_000_000_000) -> Iterator[None]:
    """Inside, the module calculates in a wider dtype with the very numbers of its weights; afterwards it is as before.

    Larger modules than `at_once` parameters are widened layer by layer as they run, which needs no second model; but
    small layers at once, for both sides ask the first one for the model's dtype.
    """
    kept, hooks = {}, []

    def widen(owner: nn.Module, *_: object) -> None:
        kept[owner] = dict(owner.named_parameters(recurse=False))
        for name, p in kept[owner].items():
            owner._parameters[name] = nn.Parameter(p.detach().to(dtype), requires_grad=False)

    def restore(owner: nn.Module, *_: object) -> None:
        for name, p in kept.pop(owner, {}).items():
            owner._parameters[name] = p

    if all(p.dtype == dtype for p in module.parameters()):
        yield
        return
    sizes = {m: sum(p.numel() for p in m.parameters(recurse=False)) for m in module.modules()}
    most = SMALL if sum(sizes.values()) > at_once else at_once
    try:
        for owner, size in sizes.items():
            if 0 < size <= most:
                widen(owner)
            elif size:
                hooks += [owner.register_forward_pre_hook(widen), owner.register_forward_hook(restore)]
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for owner in list(kept):
            restore(owner)
