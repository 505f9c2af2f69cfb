"""Whether a LoRA is for this model: every layer that it names must be there, and of the shape that it changes."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from torch import nn

from ldm.errors import LDMError
from ldm.io.folders import some
from ldm.io.misfits import CONTEXT_WIDTHS
from ldm.lora.flux import Pieces, Target
from ldm.lora.groups import Group, fits
from ldm.lora.names import TEXT, TEXT_2, TRANSFORMER, UNET, WORDS, flattened, names_ours, targets_original

if TYPE_CHECKING:
    from ldm.lora.file import Lora

FLUX_WIDTHS = {3072: "FLUX.1"}
PATCHES = "x_embedder"  # the one layer of FLUX that a LoRA may make read more


class Place(NamedTuple):
    """A network, one of its layers, and which rows of what the file says are that layer's; None: all of them."""

    part: str
    layer: str
    rows: Pieces | None = None


def places(lora: "Lora", networks: Mapping[str, nn.Module]) -> dict[Group, tuple[Place, ...]]:
    """Where each group of the file belongs: to one layer or, where the file has several of ours in one, to these.

    Raises LDMError if one has no place, or not the right shape. Half a LoRA would draw something that nobody has
    trained: so all of it fits, or nothing is taken.
    """
    networks = dict(networks)
    found: dict[Group, tuple[Place, ...]] = {}
    absent: list[str] = []
    shapes: list[str] = []
    tables = {part: names_ours(part, network) for part, network in networks.items()}
    originals: dict[str, dict[str, tuple[Target, ...]]] = {}
    for group in lora.groups:
        part = refiners(group.part, networks)
        if part not in networks:
            absent.append(group.name)
            continue
        layer = flattened(group.layer)
        if layer not in tables[part] and part not in originals:
            originals[part] = targets_original(part, networks[part])
        own = tables[part].get(layer)
        targets = originals.get(part, {}).get(layer, ()) if own is None else (Target(own),)
        if not targets:
            absent.append(group.name)
            continue
        found[group] = tuple(Place(part, *target) for target in targets)
        shapes += misfits(group, networks[part], [target.layer for target in targets])
    if absent or shapes:
        raise LDMError(refusal(lora, networks, absent, shapes))
    taken: dict[tuple[str, str], Group] = {}
    for group, part, layer in [(group, each.part, each.layer) for group, own in found.items() for each in own]:
        other = taken.setdefault((part, layer), group)
        if other is not group:
            raise LDMError(
                f"{lora.place} changes one layer twice, as {other.layer!r} and as {group.layer!r}: leave one out."
            )
    return found


def refiners(part: str, networks: Mapping[str, nn.Module]) -> str:
    """Which network is meant: SDXL's refiner has the second text encoder alone, and it is its first here."""
    alone = TEXT_2 not in networks and TEXT in networks and networks[TEXT].config.with_projection
    alone = alone and TRANSFORMER not in networks
    return TEXT if part == TEXT_2 and alone else part


def misfits(group: Group, network: nn.Module, layers: Sequence[str]) -> list[str]:
    """In words, what of a layer the group's factors don't fit; `layers`: those of ours that it is."""
    modules = [network.get_submodule(layer) for layer in layers]
    found, module, outputs = [], modules[0], sum(len(each.weight) for each in modules)
    shape = (outputs, *module.weight.shape[1:])
    if layers == [PATCHES] and reads_patches(group, network):
        shape = (outputs, group.shape[1])
    bias = next((group.shapes[role] for role in ("diff_b", "b_norm", "shift") if role in group.shapes), None)
    if group.shape is not None and not fits(group.shape, shape):
        found.append(f"{group.layer} is changed by {group.shape} and is {shape}")
    if group.shape is not None and isinstance(module, nn.Embedding):
        found.append(f"{group.layer} is an embedding, which is no layer to change so")
    if bias is not None and getattr(module, "bias", None) is None:
        found.append(f"{group.layer} has no bias to change")
    elif bias is not None and bias != (outputs,):
        found.append(f"{group.layer}'s bias is changed by {bias} and is {(outputs,)}")
    return found


def reads_patches(group: Group, network: nn.Module) -> bool:
    """Whether a change of FLUX's first layer goes with another width than the layer has.

    One of the picture alone changes the first columns of a model that reads something beside it. One of a picture with
    something beside it makes a model that reads the picture alone wider (`ldm.lora.wider`).
    """
    picture, reads = network.config.out_channels or network.config.in_channels, network.config.in_channels
    if group.shape is None or len(group.shape) != 2 or group.shape[1] % 4:
        return False
    return group.shape[1] == picture or (group.shape[1] > picture and reads == picture)


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
    """What a model is, by the width of the text that its UNet reads: "SDXL"; of its transformer's layers: "FLUX.1"."""
    if TRANSFORMER in networks:
        return family_of_flux(networks[TRANSFORMER].config.width)
    if UNET not in networks:
        return "a model without a UNet"
    width = networks[UNET].config.cross_attention_dim
    return CONTEXT_WIDTHS.get(width, f"a model whose text is {width} wide")


def family_of_flux(width: int) -> str:
    return FLUX_WIDTHS.get(width, f"a FLUX of width {width}")
