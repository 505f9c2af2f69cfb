"""A FLUX that reads more beside the latent, by a LoRA: Black Forest Labs' Canny and Depth turn it into a control model.

Their change of the first layer, `x_embedder`, has more columns than the layer. So zeros are put behind its own, which
changes nothing yet, and the configuration says how many there are now: a pipeline takes its task from there.
"""

from collections.abc import Iterable
from dataclasses import replace

import torch.nn.functional as F
from torch import Tensor, nn
from torch import equal as same_numbers

from ldm.lora.algebra import Change
from ldm.lora.fitting import PATCHES

KEY = f"{PATCHES}.weight"


class Wider:
    """A network whose first layer has been made to read `inputs` numbers, and what it was before.

    `beneath`: the layer's weight without any LoRA.
    """

    def __init__(self, network: nn.Module, inputs: int, beneath: Tensor):
        self.narrow, self.config = beneath, network.config
        outputs = self.config.out_channels or self.config.in_channels
        _read(network, inputs, replace(self.config, in_channels=inputs, out_channels=outputs))
        network.x_embedder.weight.data = widened(network.x_embedder.weight.data, inputs)

    def undo(self, network: nn.Module) -> None:
        """As it was: the very tensor, unless it has been moved or cast, or something else has written it."""
        weight, inputs = network.x_embedder.weight, self.narrow.shape[1]
        now = weight.data[:, :inputs]
        narrow = self.narrow.to(now.device, now.dtype)
        weight.data = narrow if same_numbers(narrow, now) else now.contiguous()
        _read(network, inputs, self.config)


def _read(network: nn.Module, inputs: int, config: object) -> None:
    network.x_embedder.in_features, network.config = inputs, config


def inputs_of(changes: Iterable[Change]) -> int:
    """How many numbers the widest of these changes of the first layer reads; 0, if there is none."""
    return max((change.whole().flatten(1).shape[1] for change in changes), default=0)


def widened(weight: Tensor, inputs: int) -> Tensor:
    """With columns of zeros behind its own."""
    return F.pad(weight, (0, inputs - weight.shape[1]))
