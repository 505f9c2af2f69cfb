"""What PEFT says beside its factors: rank, alpha, and for which layers they differ."""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from numbers import Real
from pathlib import Path
from typing import Any

from ldm.errors import LDMError
from ldm.io.folders import parse_json, read_json
from ldm.lora.groups import Group
from ldm.lora.names import TEXT, TEXT_2, UNET

KEY = "lora_adapter_metadata"  # where diffusers keeps it, in a safetensors file's metadata
FILE = "adapter_config.json"  # where PEFT by itself does, beside its adapter_model.safetensors
FORMS = ("LORA", "LOHA", "LOKR")


@dataclass(frozen=True)
class Config:
    """The fields of one network's LoraConfig that shape the numbers."""

    place: str
    rank: int | None
    alpha: float | None
    ranks: Mapping[str, int]
    alphas: Mapping[str, float]
    rank_stabilised: bool

    def settle(self, group: Group) -> Group:
        """The group with its alpha. Raises LDMError if the factors have another rank than is said here.

        rsLoRA (Kalajdzievski 2023) scales by alpha/sqrt(rank): here that is an alpha of sqrt(rank) times as much.
        """
        if group.alpha is not None or group.form == "full":
            return group
        rank = of_layer(self.ranks, group.layer, self.rank)
        if group.rank is None:  # a LoKr with both sides whole: PEFT scales it as well, LyCORIS doesn't
            group = replace(group, rank=rank)
        if rank is not None and rank != group.rank:
            raise LDMError(
                f"{self.place}: rank {rank} is said of {group.layer!r}, whose factors are of rank {group.rank}: take "
                "the file that it was saved with."
            )
        alpha = of_layer(self.alphas, group.layer, self.alpha)
        if alpha is not None and group.rank is not None and self.rank_stabilised:
            alpha *= math.sqrt(group.rank)
        return replace(group, alpha=alpha)


def read_configs(path: Path, metadata: Mapping[str, str], pefts: bool) -> dict[str, Config]:
    """Network -> what is said of it; {} where nothing is. `pefts`: the factors are named as PEFT does.

    Raises LDMError for what is malformed, and for forms that aren't implemented.
    """
    if KEY in metadata:
        place = f"{path} ({KEY})"
        try:
            said = parse_json(metadata[KEY], KEY)
        except LDMError as error:
            raise LDMError(f"{path}: {error}") from error
        if not isinstance(said, dict):
            raise LDMError(f"{place} is no JSON object: take the file as it was saved.")
        by_part: dict[str, dict[str, Any]] = {}
        for name, value in said.items():
            part, _, field = name.partition(".")
            by_part.setdefault(part, {})[field] = value
        return {part: _config(fields, place) for part, fields in by_part.items() if part in (UNET, TEXT, TEXT_2)}
    beside = path.parent / FILE
    if pefts and beside.is_file():
        fields = read_json(beside)
        if not isinstance(fields, dict):
            raise LDMError(f"{beside} is no JSON object: take the file as it was saved.")
        return dict.fromkeys((UNET, TEXT, TEXT_2), _config(fields, str(beside)))
    return {}


def _config(fields: Mapping[str, Any], place: str) -> Config:
    form = fields.get("peft_type") or "LORA"
    if form not in FORMS:
        raise LDMError(f"{place} says that it is a {form!r}: ldm knows LoRA, LoHa and LoKr; take one of these.")
    if fields.get("use_dora"):
        raise LDMError(f"{place} says that it is a DoRA, which ldm doesn't implement: take a LoRA, a LoHa or a LoKr.")
    rank, alpha = fields.get("r"), fields.get("lora_alpha", fields.get("alpha"))
    ranks, alphas = fields.get("rank_pattern") or {}, fields.get("alpha_pattern") or {}
    for what, numbers in (("rank", [rank]), ("alpha", [alpha]), ("rank_pattern", ranks), ("alpha_pattern", alphas)):
        values = numbers.values() if isinstance(numbers, dict) else numbers
        if not isinstance(numbers, dict | list) or not all(value is None or _number(value) for value in values):
            raise LDMError(
                f"{place}: its {what} is {json.dumps(fields.get(what, numbers))[:80]}, where numbers belong."
            )
    if any(value is not None and (value < 1 or value != int(value)) for value in (rank, *ranks.values())):
        raise LDMError(f"{place}: a rank must be a whole number of 1 or more, not {rank!r} and {ranks!r}.")
    return Config(place, rank, alpha, ranks, alphas, bool(fields.get("use_rslora")))


def _number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def of_layer(patterns: Mapping[str, Any], layer: str, default: Any) -> Any:
    """The value for a layer: that of the pattern that its name ends in, or is.

    PEFT takes patterns as regular expressions; names are what trainers write, and a stranger's expression is not run.
    Raises LDMError for one that is more than a name.
    """
    for pattern, value in patterns.items():
        name = pattern.removeprefix("^").removesuffix("$").replace("\\.", ".")
        if not re.fullmatch(r"[\w.\-]+", name):
            raise LDMError(f"PEFT's pattern {pattern!r} is more than a layer's name, which ldm doesn't evaluate.")
        ending, own = name.removeprefix("text_model."), layer.removeprefix("text_model.")
        if own == ending or (not pattern.startswith("^") and own.endswith("." + ending)):
            return value
    return default
