"""Whether a LoRA is for this model: every layer that it names must be there, and of the shape that it changes."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import nn

from ldm.errors import LDMError
from ldm.io.folders import some
from ldm.io.misfits import CONTEXT_WIDTHS
from ldm.lora.groups import Group, fits
from ldm.lora.names import TEXT, TEXT_2, UNET, WORDS, flattened, names_original, names_ours

if TYPE_CHECKING:
    from ldm.lora.file import Lora

Place = tuple[str, str]  # a network, and one of its layers


def places(lora: "Lora", networks: Mapping[str, nn.Module]) -> dict[Group, Place]:
    """Where each group of the file belongs. Raises LDMError if one has no place, or not the right shape.

    Half a LoRA would draw something that nobody has trained: so all of it fits, or nothing is taken.
    """
    networks = dict(networks)
    found: dict[Group, Place] = {}
    absent: list[str] = []
    shapes: list[str] = []
    tables = {part: names_ours(part, network) for part, network in networks.items()}
    originals: dict[str, dict[str, str]] = {}
    for group in lora.groups:
        part = refiners(group.part, networks)
        if part not in networks:
            absent.append(group.name)
            continue
        layer = flattened(group.layer)
        if layer not in tables[part] and part not in originals:
            originals[part] = names_original(part, networks[part])
        name = tables[part].get(layer) or originals.get(part, {}).get(layer)
        if name is None:
            absent.append(group.name)
            continue
        found[group] = part, name
        shapes += misfits(group, networks[part].get_submodule(name))
    if absent or shapes:
        raise LDMError(refusal(lora, networks, absent, shapes))
    taken: dict[Place, Group] = {}
    for group, place in found.items():
        other = taken.setdefault(place, group)
        if other is not group:
            raise LDMError(
                f"{lora.place} changes one layer twice, as {other.layer!r} and as {group.layer!r}: leave one out."
            )
    return found


def refiners(part: str, networks: Mapping[str, nn.Module]) -> str:
    """Which network is meant: SDXL's refiner has the second text encoder alone, and it is its first here."""
    alone = TEXT_2 not in networks and TEXT in networks and networks[TEXT].config.with_projection
    return TEXT if part == TEXT_2 and alone else part


def misfits(group: Group, module: nn.Module) -> list[str]:
    """In words, what of a layer the group's factors don't fit."""
    found = []
    bias = next((group.shapes[role] for role in ("diff_b", "b_norm", "shift") if role in group.shapes), None)
    if group.shape is not None and not fits(group.shape, tuple(module.weight.shape)):
        found.append(f"{group.layer} is changed by {group.shape} and is {tuple(module.weight.shape)}")
    if group.shape is not None and isinstance(module, nn.Embedding):
        found.append(f"{group.layer} is an embedding, which is no layer to change so")
    if bias is not None and getattr(module, "bias", None) is None:
        found.append(f"{group.layer} has no bias to change")
    elif bias is not None and bias != tuple(module.bias.shape):
        found.append(f"{group.layer}'s bias is changed by {bias} and is {tuple(module.bias.shape)}")
    return found


def refusal(lora: "Lora", networks: Mapping[str, nn.Module], absent: list[str], shapes: list[str]) -> str:
    """The sentence: what doesn't fit, and what likely lies behind it."""
    faults = []
    if absent:
        faults.append(
            f"it has {len(absent)} of {len(lora.groups)} layers that are not in this model ({some(absent, 2)})"
        )
    if shapes:
        faults.append(f"{len(shapes)} of {len(lora.groups)} layers are of other shapes ({some(shapes, 2)})")
    return f"{lora.place} does not fit: {' and '.join(faults)}; {cause(lora, networks)}."


def cause(lora: "Lora", networks: Mapping[str, nn.Module]) -> str:
    """What likely lies behind a misfit, and what to do."""
    missing = [part for part in dict.fromkeys(group.part for group in lora.groups) if part not in networks]
    model = family(networks)
    if lora.made_for is not None and lora.made_for != model:
        return f"it was made for {lora.made_for}, and this is {model}: take one that was made for the same"
    if missing:
        return (
            f"this model has no {' and no '.join(WORDS[part] for part in missing)}: take one that was made for {model}"
        )
    return f"this is {model}: take a LoRA that was made for it, as its trainer wrote it"


def family(networks: Mapping[str, nn.Module]) -> str:
    """What a model is, by the width of the text that its UNet reads: "SDXL"."""
    if UNET not in networks:
        return "a model without a UNet"
    width = networks[UNET].config.cross_attention_dim
    return CONTEXT_WIDTHS.get(width, f"a model whose text is {width} wide")
