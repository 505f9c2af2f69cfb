"""Another alpha for some parts of a model, named as we name them, or as the UNet's blocks are known elsewhere.

    unet.up_blocks.1        all whose names begin so, at a dot; text_encoder, vae, unet.mid_block.attentions too
    IN00 ... IN11           input_blocks.0 ... of the original names: the way down (SDXL's has IN00 to IN08)
    M00                     middle_block
    OUT00 ... OUT11         output_blocks.0 ...: the way up

Where several name a tensor, the one that names fewest tensors counts: of two prefixes the longer.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from ldm.checkpoints import names
from ldm.errors import LDMError, nearest

BLOCKS = {"IN": "input_blocks", "M": "middle_block", "OUT": "output_blocks"}
DEEPEST = 5  # dots of a name that is offered in a sentence: unet.up_blocks.1.attentions.0


def alphas(alpha: float, blocks: Mapping[str, float], configs: Mapping[str, Any]) -> dict[tuple[str, str], float]:
    """{(part, key): its alpha} of all tensors of a model with these configurations.

    Raises LDMError for a name of `blocks` that means none of them.
    """
    keys = [(part, key) for part, config in configs.items() for key in names.shapes(part, config)]
    blocks_of = original_blocks(configs["unet"])
    meant = {name: named(name, keys, blocks_of) for name in blocks}
    for name, found in meant.items():
        if not found and re.fullmatch(r"(IN|M|OUT)\d+", name, re.ASCII | re.IGNORECASE):
            raise LDMError(f"{name!r} names no block of this model's UNet, which has {ranges(blocks_of.values())}.")
        if not found:
            known = sorted({*blocks_of.values(), *prefixes(keys)})
            raise LDMError(f"{name!r} names no block of this model.{nearest(name, known) or ' Blocks: ' + say(known)}")
    found = dict.fromkeys(keys, alpha)
    for name in sorted(blocks, key=lambda name: (-len(meant[name]), len(name))):  # what names more is written over
        found |= dict.fromkeys(meant[name], blocks[name])
    return found


def named(name: str, keys: Iterable[tuple[str, str]], blocks_of: Mapping[str, str]) -> list[tuple[str, str]]:
    """The tensors that a name means."""
    if name in blocks_of.values():
        return [("unet", key) for key, block in blocks_of.items() if block == name]
    return [(part, key) for part, key in keys if f"{part}.{key}.".startswith(f"{name}.")]


def original_blocks(config: Any) -> dict[str, str]:
    """{a key of the UNet: "IN04"}, of those that lie in a block."""
    short, found = {long: short for short, long in BLOCKS.items()}, {}
    for key, origin in names.origins("unet", config, "").items():
        if block := re.match(r"(input_blocks|output_blocks)\.(\d+)\.|(middle_block)\.", origin.name):
            found[key] = f"{short[block[1] or block[3]]}{int(block[2] or 0):02}"
    return found


def ranges(blocks: Iterable[str]) -> str:
    """IN00 to IN08, M00 and OUT00 to OUT08."""
    found = [sorted({name for name in blocks if name.startswith(short)}) for short in BLOCKS]
    words = [each[0] if len(each) == 1 else f"{each[0]} to {each[-1]}" for each in found if each]
    return f"{', '.join(words[:-1])} and {words[-1]}"


def prefixes(keys: Iterable[tuple[str, str]]) -> set[str]:
    """All that a name may begin with, up to a few dots."""
    found = set()
    for part, key in keys:
        words = f"{part}.{key}".split(".")
        found |= {".".join(words[:n]) for n in range(1, min(len(words), DEEPEST) + 1)}
    return found


def say(known: Iterable[str]) -> str:
    """The shortest of them."""
    return ", ".join([name for name in known if name.count(".") < 2][:12]) + ", ..."
