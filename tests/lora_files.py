"""LoRA files as every trainer writes them, of random factors: one set of numbers, under any names."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from reference import normal
from torch import Tensor, nn

from ldm.checkpoints.names import origins
from ldm.io.weights import save_weights
from ldm.pipeline import Pipeline

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
LINEAR = (*ATTENTION, "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out")
CONV = ("conv1", "conv2", "conv_shortcut", "conv", "time_emb_proj")
TEXT = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")
KOHYA = {"unet": "lora_unet_", "text_encoder": "lora_te_", "text_encoder_2": "lora_te2_"}
OLD = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "out_proj": "to_out", "to_out.0": "to_out"}


class Pair(NamedTuple):
    """A layer's factors, (r, I[, k, k]) and (O, r[, 1, 1]), and its alpha, None if the file shall say none."""

    down: Tensor
    up: Tensor
    alpha: float | None = None

    def delta(self, shape: tuple[int, ...]) -> Tensor:
        """Hu et al. 2021, section 4.1, and kohya's scale."""
        rank = len(self.down)
        scale = 1.0 if self.alpha is None else self.alpha / rank
        return scale * (self.up.reshape(-1, rank) @ self.down.reshape(rank, -1)).reshape(shape)


Pairs = dict[tuple[str, str], Pair]  # (network, layer as ours is called) -> its factors


def pairs(
    pipe: Pipeline,
    unet: tuple[str, ...] = LINEAR,
    text: tuple[str, ...] = TEXT,
    alpha: float | None = 1.5,
    seed: int = 0,
) -> Pairs:
    """Random factors for the layers whose names end so: ranks 2, 3 and 4, and one alpha.

    Of a size that makes a change about a quarter of its weight.
    """
    found: Pairs = {}
    for part, endings in (("unet", unet), ("text_encoder", text), ("text_encoder_2", text)):
        for layer, module in layers(pipe.parts().get(part), endings):
            k, (outputs, inputs, *kernel) = len(found), module.weight.shape
            rank = 2 + k % 3
            down = normal(seed + 2 * k, rank, inputs, *kernel) / (inputs * len(kernel or [1])) ** 0.5
            up = normal(seed + 2 * k + 1, outputs, rank, *[1] * len(kernel)) / 3
            found[part, layer] = Pair(down, up, alpha)
    return found


def layers(network: nn.Module | None, endings: tuple[str, ...]) -> list[tuple[str, nn.Module]]:
    if network is None:
        return []
    named = [(name, module) for name, module in network.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    return [(name, module) for name, module in named if any(("." + name).endswith("." + each) for each in endings)]


# --------------------------------------------------------------------------------------------------- whose names


def kohya(found: Pairs, te: str = "lora_te_") -> dict[str, Tensor]:
    """Dots are underscores, alpha is a tensor; text encoders' layers lie inside `text_model`."""
    tensors = {}
    for (part, layer), pair in found.items():
        prefix = te if part == "text_encoder" else KOHYA[part]
        name = prefix + (layer if part == "unet" else f"text_model.{layer}").replace(".", "_")
        tensors |= {f"{name}.lora_down.weight": pair.down, f"{name}.lora_up.weight": pair.up}
        if pair.alpha is not None:
            tensors[f"{name}.alpha"] = torch.tensor(pair.alpha)
    return tensors


def original(found: Pairs, pipe: Pipeline) -> dict[str, Tensor]:
    """kohya's for SDXL: the UNet's layers under their original names."""
    return kohya({(part, original_name(pipe, part, layer)): pair for (part, layer), pair in found.items()}, "lora_te1_")


def original_name(pipe: Pipeline, part: str, layer: str) -> str:
    if part != "unet":
        return layer
    return origins("unet", pipe.unet.config, "")[f"{layer}.weight"].name.removesuffix(".weight")


def peft(found: Pairs, prefix: Callable[[str], str] = lambda part: f"{part}.", name: str = "") -> dict[str, Tensor]:
    """lora_A and lora_B behind the layers' own names; alphas are told beside (`told`).

    transformers 5 has taken `text_model` from the one text encoder's names, and has it in the other's.
    """
    tensors = {}
    for (part, layer), pair in found.items():
        inner = "text_model." if part == "text_encoder_2" else ""
        tensors[f"{prefix(part)}{inner}{layer}.lora_A{name}.weight"] = pair.down
        tensors[f"{prefix(part)}{inner}{layer}.lora_B{name}.weight"] = pair.up
    return tensors


def told(found: Pairs, **fields) -> dict[str, str]:
    """What diffusers writes into the metadata of such a file: rank and alpha of each network, and who differs."""
    said: dict[str, object] = {}
    for part in {part for part, _ in found}:
        own = {layer: pair for (of, layer), pair in found.items() if of == part}
        first = next(iter(own.values()))
        said |= {
            f"{part}.r": len(first.down),
            f"{part}.lora_alpha": first.alpha,
            f"{part}.rank_pattern": {layer: len(pair.down) for layer, pair in own.items()},
            f"{part}.alpha_pattern": {layer: pair.alpha for layer, pair in own.items()},
            f"{part}.target_modules": list(own),
            f"{part}.use_rslora": False,
            f"{part}.use_dora": False,
        } | {f"{part}.{field}": value for field, value in fields.items()}
    return {"lora_adapter_metadata": json.dumps(said)}


def diffusers(found: Pairs) -> dict[str, Tensor]:
    """Before PEFT: attention processors in the UNet; `text_model` and lora_linear_layer in the text encoders."""
    tensors = {}
    for (part, layer), pair in found.items():
        block, _, last = layer.removesuffix(".0").rpartition(".")
        if part != "unet":
            name = f"text_model.{layer}.lora_linear_layer"
        elif last in ("to_q", "to_k", "to_v", "to_out"):
            name = f"{block}.processor.{last}_lora"
        else:
            name = f"{layer}.lora"
        tensors |= {f"{part}.{name}.down.weight": pair.down, f"{part}.{name}.up.weight": pair.up}
    return tensors


def oldest(found: Pairs) -> dict[str, Tensor]:
    """The first that diffusers wrote: attention alone, processors in text encoders too."""
    tensors = {}
    for (part, layer), pair in found.items():
        block, _, last = layer.removesuffix(".0").rpartition(".")
        name = f"{block}.processor.{last}" if part == "unet" else f"text_model.{block}.{OLD[last]}"
        tensors |= {f"{part}.{name}_lora.down.weight": pair.down, f"{part}.{name}_lora.up.weight": pair.up}
    return tensors


def write(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> Path:
    save_weights(tensors, path, metadata=metadata)
    return path
