"""How much a LoRA changes, ||dW|| / ||W||, and the line that says so."""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ldm.lora.applied import Applied


def strength(sizes: Mapping[str, tuple[float, float]], weight: float) -> tuple[float, dict[str, float]]:
    """||weight * dW|| / ||W||: over all, and of each."""
    layers = {key: abs(weight) * ratio(delta, norm) for key, (delta, norm) in sizes.items()}
    all_deltas, all_norms = (math.hypot(*column) for column in zip(*sizes.values(), strict=True))
    return abs(weight) * ratio(all_deltas, all_norms), layers


def ratio(delta: float, norm: float) -> float:
    return delta / norm if norm else math.inf if delta else 0.0


def percent(share: float) -> str:
    """Two digits that say something: 3.1 %, 120 %, 0.0042 %; and of what is far too much, that it is."""
    if share >= 10:
        return (f"{share:,.0f}" if share < 1e6 else "more than a million") + " times their size"
    return f"{100 * share:.2g} %" if share < 1 else f"{100 * share:.0f} %"


def told(applied: "Applied") -> str:
    """The line for stderr: what it is, what it touches, and how much that is."""
    line = f"{applied.name}: {applied.lora}"
    if applied.change == 0:
        untrained = "for its factors are zero (it was never trained), or its alphas are"
        why = untrained if applied.weight else "at weight 0"
        return f"{line}; it changes nothing, {why}."
    worst = max(applied.layers, key=applied.layers.get)
    line += f"; at weight {applied.weight:g} it changes them by {percent(applied.change)}"
    line += f" (the most in {worst.removesuffix('.weight')}, {percent(applied.layers[worst])})"
    if applied.change > 1:
        line += ": that is more than the weights themselves, so expect noise, and try a smaller weight"
    return line + "."
