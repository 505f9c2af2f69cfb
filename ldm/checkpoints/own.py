"""Configurations that a single file carries itself: ldm writes them into the metadata of what it makes."""

from ldm.checkpoints.architectures import Architecture
from ldm.checkpoints.fit import CONFIGS
from ldm.checkpoints.names import shapes
from ldm.errors import LDMError
from ldm.io.folders import parse_json
from ldm.schedules import ScheduleConfig

METADATA = "ldm.config"  # {part: its JSON, "scheduler": ..., "index": ..., ...}
TABLES = ("scheduler", "low_res_scheduler", "index", "ldm")  # beside the parts; and "pads", the tokenizers' padding
COUNTS = (
    "num_hidden_layers", "layers_per_block", "transformer_layers_per_block", "num_layers", "num_single_layers",
)  # fmt: skip


def own_architecture(text: str, place: object, tensors: int) -> Architecture:
    """The architecture that the metadata of `place` describe, a file of so many tensors.

    Raises LDMError for one that can't be meant.
    """
    what = f"{place}: the configuration in its metadata ({METADATA})"
    fields = parse_json(text, what)
    if not isinstance(fields, dict):
        raise LDMError(f"{what} is no table of configurations: take a sound copy.")
    pads = fields.pop("pads", [])
    if not isinstance(pads, list) or not all(isinstance(pad, str) for pad in pads):
        raise LDMError(f"{what} has pads that are no list of words: take a sound copy.")
    for name, value in fields.items():
        if name not in (*CONFIGS, *TABLES):
            raise LDMError(f"{what} has a {name[:80]!r}, which ldm doesn't know: take a newer ldm, or a sound copy.")
        if not isinstance(value, dict):
            raise LDMError(f"{what} has a {name} that is no table: take a sound copy.")
    parts = {part: fields[part] for part in CONFIGS if part in fields}
    for part, config in parts.items():
        _refuse_giant(config, tensors, f"{what}: {part}")
        try:
            shapes(part, CONFIGS[part].from_json(config))
        except LDMError as error:
            raise LDMError(f"{what}: {error}") from error
        except (TypeError, ValueError, ArithmeticError, RuntimeError, IndexError) as error:  # torch's, of odd widths
            raise LDMError(f"{what}: no {part} can be built of it ({str(error)[:200]}): take a sound copy.") from error
    for name in ("scheduler", "low_res_scheduler"):
        try:
            ScheduleConfig.from_json(fields.get(name, {}))
        except LDMError as error:
            raise LDMError(f"{what}: {error}") from error
    scheduler, low_res, index, defaults = (fields.get(name) for name in TABLES)
    return Architecture(
        "own", parts, scheduler or {}, tuple(pads), index or {}, low_res, "model of its own", defaults or {}
    )


def _refuse_giant(config: dict, tensors: int, what: str) -> None:
    """A network of more layers than the file has tensors would be built for hours, and wouldn't fit it."""
    asked = [len(value) for value in config.values() if isinstance(value, list)]
    numbers = {name: value if isinstance(value := config.get(name), list) else [value] for name in COUNTS}
    counts = {name: [n for n in each if isinstance(n, int)] for name, each in numbers.items()}
    asked += [n for each in counts.values() for n in each]
    asked += [n * sum(counts["transformer_layers_per_block"]) for n in counts["layers_per_block"]]
    if max(asked, default=0) > tensors:
        raise LDMError(f"{what} asks for {max(asked)} layers, and the file has {tensors} tensors: do not trust it.")
