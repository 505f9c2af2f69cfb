"""A change computed beside its layer, whose weight stays as it is: y = Wx + weight * dW x."""

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ldm.lora.algebra import Change


class Beside:
    """A forward hook that adds `weight` times a change to what its layer says."""

    def __init__(self, change: Change, weight: float):
        self.change, self.weight = change, weight

    def __call__(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        x = inputs[0]  # an offloaded layer's input is where it is computed, and its weights may be elsewhere
        return output + (self.weight * self.change.to(x.device).beside(module, x)).to(output.dtype)


def attach(module: nn.Module, change: Change, weight: float = 1.0) -> RemovableHandle:
    """Add `weight` times the change to each call of a layer, y = Wx + weight * dW x, until `handle.remove()`.

    The weights stay as they are. The change's factors may be parameters that are trained.
    """
    return module.register_forward_hook(Beside(change, weight))
