"""What FLUX alone can be asked for: guidance in two senses, how much of the text is read, and diffusers' roundings.

FLUX.1-dev was distilled from guided predictions: it is told the scale of guidance, and one run of it is guided.
Guidance in the older sense, away from other words, is on top of that: `true_guidance`, diffusers' true_cfg_scale.
"""

import math
from numbers import Real
from typing import TYPE_CHECKING

import torch

from ldm.errors import LDMError
from ldm.schedules.table import is_whole

if TYPE_CHECKING:
    from ldm.settings import Model


def choose_true_guidance(model: "Model", asked: float | None) -> float:
    """The scale of guidance away from the negative prompt, of a model that is told its guidance: 1 is none."""
    if asked is None:
        return 1.0
    if not isinstance(asked, Real) or isinstance(asked, bool) or not math.isfinite(asked):
        raise LDMError(f"true_guidance must be a finite number, not {asked!r}.")
    if asked < 1:
        raise LDMError(f"true_guidance is 1 (none) or more, not {asked!r}.")
    if asked != 1 and not model.distilled:
        raise LDMError(
            "true_guidance is for models that are told their guidance, as FLUX.1-dev is: this one has no other than "
            "the true one, so pass the number as guidance."
        )
    return float(asked)


def choose_tokens(model: "Model", asked: int | None) -> int | None:
    """How many tokens of a prompt FLUX reads; None of a model that always reads 77."""
    if model.most_tokens is None:
        if asked is not None:
            raise LDMError("max_sequence_length says how much of a prompt FLUX reads; this model reads 77 tokens.")
        return None
    if asked is None:
        return min(model.defaults.max_sequence_length or model.most_tokens, model.most_tokens)
    return check_tokens(asked, model.most_tokens)


def check_tokens(asked: int, most: int) -> int:
    """Refuse a number of tokens that the text encoder doesn't know."""
    if not is_whole(asked) or not 1 <= asked <= most:
        raise LDMError(f"max_sequence_length must be a whole number from 1 to {most}, not {asked!r}.")
    return int(asked)


def check_plain(dialect: str, clip_skip: int = 0) -> None:
    """Refuse what only CLIP's contexts know: signs that weigh words, and layers that are left out."""
    if dialect != "plain":
        raise LDMError(
            f"FLUX reads plain sentences: the signs of the dialect {dialect!r} weigh words for CLIP, which here makes "
            "one vector of all of them. Take plain."
        )
    if clip_skip:
        raise LDMError(f"FLUX reads the last layer of its text encoders: leave clip_skip {clip_skip} out.")


def as_told(t: float, dtype: torch.dtype) -> float:
    """The timestep as diffusers' FLUX is told it: divided by 1000 and multiplied again, in the network's own dtype.

    In bfloat16 that moves it by up to 4 of 1000.
    """
    return (torch.tensor(t, dtype=torch.float32).to(dtype) / 1000 * 1000).item()
