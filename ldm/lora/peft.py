"""What PEFT says beside its factors: rank, alpha, and for which layers they differ."""

import json
import math
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from numbers import Real
from pathlib import Path
from typing import Any

from ldm.errors import LDMError
from ldm.io.folders import parse_json, read_json
from ldm.lora.groups import Group
from ldm.lora.names import WORDS

KEY = "lora_adapter_metadata"  # where diffusers keeps it, in a safetensors file's metadata
FILE = "adapter_config.json"  # where PEFT by itself does, beside its adapter_model.safetensors
FORMS = ("LORA", "LOHA", "LOKR")
STARTS = ("pissa", "olora", "corda", "loftq", "lora_ga")  # which begin by taking something out of the model's weights
NEEDS = {  # fields that are neutral where they are empty (or "none"), and what a network needs where they aren't
    "bias": "other biases of layers, in whole",
    "modules_to_save": "whole layers beside the factors",
    "layer_replication": "layers that stand several times",
    "target_parameters": "parameters that are no layer's",
    "trainable_token_indices": "other vectors of some tokens",
    "alora_invocation_tokens": "words that switch it on",
    "use_qalora": "inputs that are averaged in groups",
    "use_bdlora": "factors that are block-diagonal",
    "arrow_config": "a choice among several LoRAs",
    "kasa_config": "a matrix between the factors",
    "monteclora_config": "samples beside the factors",
}


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
        rank = self._of(self.ranks, group.layer, self.rank)
        if group.rank is None:  # a LoKr with both sides whole: PEFT scales it as well, LyCORIS doesn't
            group = replace(group, rank=rank)
        if rank is not None and rank != group.rank:
            raise LDMError(
                f"{self.place}: rank {rank} is said of {group.layer!r}, whose factors are of rank {group.rank}: take "
                "the file that it was saved with."
            )
        alpha = self._of(self.alphas, group.layer, self.alpha)
        if alpha is not None and group.rank is not None and self.rank_stabilised:
            alpha *= math.sqrt(group.rank)
        return replace(group, alpha=alpha)

    def _of(self, patterns: Mapping[str, Any], layer: str, default: Any) -> Any:
        """The value for a layer: that of the pattern that its name ends in, or is.

        PEFT takes patterns as regular expressions; names are what trainers write, and a stranger's expression is not
        run. Raises LDMError for one that is more than a name.
        """
        for pattern, value in patterns.items():
            name = pattern.removeprefix("^").removesuffix("$").replace("\\.", ".")
            if not re.fullmatch(r"[\w.\-]+", name):
                raise LDMError(
                    f"{self.place}: the pattern {pattern[:80]!r} is more than a layer's name, and ldm runs no "
                    "stranger's expressions: write out the layers that it means."
                )
            ending, own = name.removeprefix("text_model."), layer.removeprefix("text_model.")
            if own == ending or (not pattern.startswith("^") and own.endswith("." + ending)):
                return value
        return default


def read_configs(path: Path, metadata: Mapping[str, str], pefts: bool) -> dict[str, Config]:
    """Network -> what is said of it; {} where nothing is. `pefts`: PEFT itself wrote the file, and its own beside it.

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
        return {part: _config(fields, place) for part, fields in by_part.items() if part in WORDS}
    beside = path.parent / FILE
    if pefts and beside.is_file():
        fields = read_json(beside)
        if not isinstance(fields, dict):
            raise LDMError(f"{beside} is no JSON object: take the file as it was saved.")
        return dict.fromkeys(WORDS, _config(fields, str(beside)))
    return {}


def _config(fields: Mapping[str, Any], place: str) -> Config:
    form = fields.get("peft_type") or "LORA"
    if form not in FORMS:
        raise LDMError(f"{place} says that it is a {form!r}: ldm knows LoRA, LoHa and LoKr; take one of these.")
    if fields.get("use_dora"):
        raise LDMError(f"{place} says that it is a DoRA, which ldm doesn't implement: take a LoRA, a LoHa or a LoKr.")
    start = fields.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(STARTS):
        raise LDMError(
            f"{place} says that its training began with {start[:40]!r}, which changes the model's weights too: save it "
            "as an ordinary LoRA (PEFT's path_initial_model_for_weight_conversion), or take another."
        )
    if more := next((name for name in NEEDS if fields.get(name) not in (None, False, "none", [], {})), None):
        raise LDMError(
            f"{place} says {more}, which needs {NEEDS[more]}: ldm doesn't implement that; take a plain LoRA."
        )
    alpha = "lora_alpha" if "lora_alpha" in fields else "alpha"
    said = {name: fields.get(name) for name in ("r", alpha)}
    patterns = {name: fields.get(name) or {} for name in ("rank_pattern", "alpha_pattern")}
    for name, value in {**said, **patterns}.items():
        values = value.values() if isinstance(value, dict) else [value]
        if isinstance(value, dict) != (name in patterns) or not all(each is None or _number(each) for each in values):
            raise LDMError(
                f"{place}: its {name} is {shortened(value)}, where "
                f"{'a table of layers and numbers' if name in patterns else 'a number'} belongs: take a sound copy."
            )
    if fields.get("use_rslora") not in (None, True, False):
        raise LDMError(f"{place}: its use_rslora is {shortened(fields['use_rslora'])}, neither true nor false.")
    rank, alpha = said.values()
    ranks, alphas = patterns.values()
    wrong = next((each for each in (rank, *ranks.values()) if each is not None and (each < 1 or each % 1)), None)
    if wrong is not None:
        raise LDMError(f"{place}: a rank must be a whole number of 1 or more, not {wrong!r}: take a sound copy.")
    return Config(place, rank, alpha, ranks, alphas, bool(fields.get("use_rslora")))


def _number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def shortened(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:80] + "..."
