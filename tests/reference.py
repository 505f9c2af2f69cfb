"""What the parity tests share: random parameters that hide nothing, and a comparison that zeros don't pass.

Default initialisation hides bugs: with gains of 1, biases of 0 and zero convolutions, swapped norms and a dead
ControlNet change nothing. So every parameter is drawn (`randomise`), and ours are the reference's own (`same`).
In float32 a wrong epsilon drowns in rounding, in float64 it stands a billion times above it: hence the two `DTYPES`.
"""

import inspect
import sys
from collections.abc import Callable, Sequence
from functools import cache
from types import ModuleType

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor, nn

# dtype -> largest difference allowed between values of order 1
DTYPES = {torch.float64: 1e-11, torch.float32: 1e-5}


def normal(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Standard normal numbers: the same ones, rounded, in every dtype."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float32).to(dtype)


@torch.no_grad()
def randomise(module: nn.Module, seed: int = 0) -> nn.Module:
    """Draw every parameter, in place: weights of fan-in scale, norm gains around 1, biases around 0, embeddings of 0.5.

    Buffers are left alone. Drawn in float32, so that a model in float64 gets the same numbers.
    """
    g = torch.Generator().manual_seed(seed)
    for owner in module.modules():
        for name, p in owner.named_parameters(recurse=False):
            x = torch.randn(p.shape, generator=g, dtype=torch.float32)
            if isinstance(owner, nn.GroupNorm | nn.LayerNorm):
                x = 1 + 0.3 * x if name == "weight" else 0.3 * x
            elif isinstance(owner, nn.Embedding) or (p.dim() == 1 and name != "bias"):  # such as CLIP's class_embedding
                x = 0.5 * x
            elif name == "bias":
                x = 0.3 * x
            elif p.dim() > 1:
                x = x / p[0].numel() ** 0.5
            p.copy_(x)
    return module


def same(
    make: Callable[[], nn.Module], reference: nn.Module, rename: Callable[[str], str | None] = lambda key: key
) -> nn.Module:
    """Our model with the reference's parameters: built on meta, every key used (`rename` gives None to drop one)."""
    with torch.device("meta"):
        model = make()
    state = {rename(key): value for key, value in reference.state_dict().items() if rename(key) is not None}
    model.load_state_dict(state, strict=True, assign=True)
    return model.train(reference.training)


def assert_close(ours: Tensor, reference: Tensor, atol: float, at_least: float = 0.1, rtol: float = 0.0) -> float:
    """Every element agrees, shape and dtype too, and the reference's mean size is at least `at_least`.

    Returns the largest difference.
    """
    assert ours.shape == reference.shape, f"shape {tuple(ours.shape)}, reference {tuple(reference.shape)}"
    assert ours.dtype == reference.dtype, f"dtype {ours.dtype}, reference {reference.dtype}"
    assert reference.isfinite().all(), "the reference isn't finite"
    size = reference.abs().mean().item()
    assert size >= at_least, f"the reference is so small ({size:.1e}) that zeros might pass"
    excess = (ours - reference).abs() - rtol * reference.abs()
    worst = excess.max().item()
    assert worst <= atol, f"off by {worst:.2e} where {atol:.0e} is allowed; the reference's mean size is {size:.2g}"
    return worst


def keys_and_shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """A model's state dict without its numbers."""
    return {key: tuple(value.shape) for key, value in module.state_dict().items()}


def gradients(
    loss: Tensor, model: nn.Module, inputs: Sequence[Tensor] = (), rename: Callable[[str], str | None] = lambda key: key
) -> dict[str, Tensor]:
    """The gradient of `loss` by every parameter's name and every input's number."""
    leaves = {str(i): x for i, x in enumerate(inputs)} | {rename(key): p for key, p in model.named_parameters()}
    return dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))


def assert_gradients_close(ours: dict[str, Tensor], reference: dict[str, Tensor]) -> None:
    """In float64."""
    assert ours.keys() == reference.keys()
    for key, expected in reference.items():
        # A bias that shifts all keys alike leaves the softmax as it was: its gradient is 0.
        at_least = 0.0 if key.endswith(("to_k.bias", "k_proj.bias")) else 1e-6
        assert_close(ours[key], expected, 1e-11, at_least, rtol=1e-10)


# ------------------------------------------------------------------------------------ schedulers in float64


@cache
def in_float64(cls):
    """The same class, compiled from its source with every float32 replaced; noise is still drawn in float32."""
    module = sys.modules[cls.__module__]
    twin = ModuleType(cls.__module__ + "_float64")
    twin.__package__, twin.__file__ = module.__package__, module.__file__
    sys.modules[twin.__name__] = twin
    exec(compile(inspect.getsource(module).replace("float32", "float64"), twin.__name__, "exec"), twin.__dict__)
    twin.randn_tensor = lambda shape, generator=None, device=None, dtype=None: randn_tensor(
        shape, generator=generator, device=device, dtype=torch.float32
    ).to(dtype)
    return twin.__dict__[cls.__name__]


def scheduler_of(cls, fields, n, dtype=torch.float64):
    """diffusers' scheduler with n steps set; in float64 it keeps the table's float32 digits, as training had them."""
    known = inspect.signature(cls.__init__).parameters
    fields = {name: value for name, value in fields.items() if name in known}
    if "clip_sample" in known:
        fields["clip_sample"] = False
    scheduler = cls(**fields)
    if dtype == torch.float64:
        bars = scheduler.alphas_cumprod.double()
        scheduler = in_float64(cls)(**fields)
        scheduler.alphas_cumprod = bars
        if not scheduler.config.get("set_alpha_to_one", True):
            scheduler.final_alpha_cumprod = bars[0]
    scheduler.set_timesteps(n)
    return scheduler
