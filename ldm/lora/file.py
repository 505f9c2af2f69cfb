"""A LoRA's file, opened: what it says of itself by its header alone; its numbers are read when it is fitted to a model.

    lora = open_lora("style.safetensors")
    print(lora)                       # a LoRA in kohya's names, rank 8, alpha 4: 192 layers of the UNet
    lora.fit({"unet": pipe.unet})     # {"unet": {"mid_block.[...].to_q.weight": LowRank(...)}}

What its keys mean stands in `names`, which factors go together in `groups`, and where they belong in `fitting`.
"""

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from torch import Tensor, nn

from ldm.checkpoints.kinds import other_kind, quantised
from ldm.checkpoints.places import LORA
from ldm.errors import LDMError, say_on_stderr
from ldm.io.folders import some
from ldm.io.headers import Entry
from ldm.io.misfits import CONTEXT_WIDTHS
from ldm.io.weights import WeightFiles, all_finite
from ldm.lora import fitting, peft
from ldm.lora.algebra import Change
from ldm.lora.groups import Group, built, measured
from ldm.lora.names import (
    TAKE,
    TEXT_2,
    TRANSFORMER,
    UNET,
    WORDS,
    flattened,
    is_original,
    other_form,
    other_model,
    parse,
)

STYLES = {
    "kohya": "kohya's",
    "PEFT": "PEFT's",
    "diffusers": "diffusers'",
    "processors": "diffusers' old",
    "LyCORIS": "LyCORIS'",
    "XLabs": "XLabs'",
}
NUMBERS = ("F64", "F32", "F16", "BF16")
WHOLE = ("I64", "I32", "I16", "I8", "U8")  # of an alpha alone
QUANTISED = re.compile(r"[IU][48]|F[48]_.+|F[48]")
BUNDLED = re.compile(r"bundle_emb\.([^.]+)\..+")  # a learnt word that OneTrainer and A1111 keep in the same file
WIDE = re.compile(r".+_(img|txt)_attn_qkv|.+_qkv_lora[12]?|.+_linear1|.+_attn_(to|add)_[qkv](_proj)?|.+_proj_mlp")
WIDTHS = {1536: "Stable Diffusion 3", 2432: "Stable Diffusion 3.5 large"}  # whose blocks diffusers calls as FLUX's
OWN = "base_model.model."  # before every name that PEFT by itself writes


@dataclass(frozen=True, eq=False)
class Lora:
    """A LoRA's file, or a LoHa's, a LoKr's, or one that mixes them.

    place      the file
    groups     what it holds for each layer (`ldm.lora.groups.Group`)
    metadata   what it says of itself, if it does: texts
    """

    place: str
    groups: tuple[Group, ...]
    metadata: Mapping[str, str]
    source: WeightFiles = field(repr=False)

    @property
    def name(self) -> str:
        """The file's name without its ending; the folder's, where diffusers has named the file."""
        path = Path(self.place)
        return path.parent.name if path.name in (LORA, "adapter_model.safetensors") else path.stem

    @property
    def format(self) -> str:
        """What it is, and in whose names: "a LoRA in kohya's names"."""
        words = {"full": "full change", "new": "new norms"}
        kinds = Counter(words.get(group.form, group.form) for group in self.groups)
        styles = {STYLES[group.style] for group in self.groups if group.form == "LoRA"} or {"LyCORIS'"}
        authors = (group for group in self.groups if group.part in (UNET, TRANSFORMER) and group.style != "XLabs")
        original = " and original" if any(is_original(group.layer) for group in authors) else ""
        forms = [kind for kind, _ in kinds.most_common()]
        return f"a {' with '.join(forms)} in {' and '.join(sorted(styles))}{original} names"

    @property
    def ranks(self) -> Counter:
        """Rank -> how many layers have it; full changes have none."""
        return Counter(group.rank for group in self.groups if group.rank is not None)

    @property
    def alphas(self) -> Counter:
        """Alpha -> how many layers have it; None: the file says none, and the scale is 1."""
        return Counter(group.alpha for group in self.groups if group.rank is not None)

    @property
    def context_width(self) -> int | None:
        """How wide the text is that its UNet's cross-attention reads, if it changes that."""
        for group in self.groups:
            if group.part == UNET and flattened(group.layer).endswith(("attn2_to_k", "attn2_to_v")) and group.shape:
                return math.prod(group.shape[1:])
        return None

    @property
    def width(self) -> int | None:
        """How wide the transformer is that it changes, where it changes what reads that width."""
        for group in self.groups:
            if group.part == TRANSFORMER and WIDE.fullmatch("_" + flattened(group.layer)) and group.shape:
                return math.prod(group.shape[1:])
        return None

    @property
    def patch(self) -> int | None:
        """How many numbers of a patch the first layer reads that it was trained with, where it changes that."""
        first = ("img_in", "x_embedder")
        found = (g.shape for g in self.groups if g.part == TRANSFORMER and g.layer in first and g.shape)
        return next((shape[1] for shape in found if len(shape) == 2), None)

    @property
    def made_for(self) -> str | None:
        """The family of models that it was made for, as far as the file tells: "SD 1.x"."""
        if any(group.part == TRANSFORMER for group in self.groups):
            return "FLUX" if self.width is None else WIDTHS.get(self.width) or fitting.family_of_flux(self.width)
        if self.context_width is not None:
            return CONTEXT_WIDTHS.get(self.context_width, f"a model whose text is {self.context_width} wide")
        said = self.metadata.get("ss_base_model_version", "") + self.metadata.get("modelspec.architecture", "")
        marks = (("sdxl", "SDXL"), ("xl-v1", "SDXL"), ("sd_v2", "SD 2.x"), ("diffusion-v2", "SD 2.x"))
        marks += (("sd_v1", "SD 1.x"), ("diffusion-v1", "SD 1.x"))
        marks += (("flux", "FLUX.1"),)
        found = next((family for mark, family in marks if mark in said.lower()), None)
        second = [group.layer for group in self.groups if group.part == TEXT_2]
        return found or (("FLUX.1" if "block" in second[0] else "SDXL") if second else None)

    def layers(self, part: str) -> int:
        """How many layers of a network it changes."""
        return sum(group.part == part for group in self.groups)

    def fit(self, networks: Mapping[str, nn.Module]) -> dict[str, dict[str, Change]]:
        """What it changes of these networks, by their names in a pipeline: {part: {parameter: how}}.

        Reads the numbers, in the file's own dtype, once it is known that every layer is there and of the right shape.
        Raises LDMError otherwise, and for numbers that are not finite.
        """
        places = fitting.places(self, networks)
        found: dict[str, dict[str, Change]] = {part: {} for part in networks}
        for group, own in places.items():
            for leaf, change in self.changes(group).items():
                for part, layer, rows in own:
                    found[part][f"{layer}.{leaf}"] = change if rows is None else change.rows(rows)
        return {part: changes for part, changes in found.items() if changes}

    def changes(self, group: Group) -> dict[str, Change]:
        """What a group does to its layer's "weight" and "bias", read from the file."""
        return built(group, {role: self._read(key) for role, key in group.keys.items() if role != "alpha"})

    def _read(self, key: str) -> Tensor:
        tensor = self.source.read(key).clone()  # a window on the file breaks with the file
        if not all_finite(tensor):
            raise LDMError(f"{self.place}: {key!r} holds NaN or infinite numbers: take a sound copy of the file.")
        return tensor

    def __str__(self) -> str:
        counts = [f"{self.layers(part)} of the {word}" for part, word in WORDS.items() if self.layers(part)]
        counts[0] = counts[0].replace(" of ", " layers of ", 1)
        return f"{self.format}, {self.strength()}: {' and '.join(counts)}"

    def strength(self) -> str:
        """Rank and alpha, in words."""
        if not self.ranks:
            return "whole"
        alphas = {group.alpha if group.alpha is not None else "not said" for group in self.groups if group.rank}
        return f"rank {_span(self.ranks)}, alpha {_span(alphas)}"

    def __deepcopy__(self, memo: dict) -> "Lora":
        return self  # it never changes, and an open file can't be copied

    def __reduce__(self):
        raise LDMError(
            f"{self.place} is an open file, so neither this LoRA nor a network that it is on can be pickled: remove it "
            "before (pipe.remove_lora), or save the network's state_dict()."
        )


def _span(values: Iterable) -> str:
    """4, or 4 to 16."""
    numbers = sorted(each for each in values if not isinstance(each, str))
    words = [each for each in values if isinstance(each, str)]
    if numbers:
        words.insert(0, f"{numbers[0]:g}" if len(numbers) == 1 else f"{numbers[0]:g} to {numbers[-1]:g}")
    return " or ".join(words)


def open_lora(path: str | Path, allow_pickle: bool = False) -> Lora:
    """Open a LoRA's file. Nothing of a model is needed, and of the numbers only the alphas are read.

    Every tensor is a factor of a layer, or is named in an error; learnt words in the same file are passed over, and
    said on stderr. Raises LDMError for a file that is missing, corrupt or truncated, for a pickle (unless
    `allow_pickle`), for what isn't a LoRA, for forms and models that ldm doesn't know, and for factors that don't go
    together.
    """
    source = WeightFiles(path, allow_pickle)
    path = Path(path)
    entries = _without_words(path, source.entries)
    names = {key: parse(key) for key in entries}
    pefts = path.stem == "adapter_model" or any(key.startswith(OWN) for key in entries)
    configs = peft.read_configs(path, source.metadata, pefts)  # first: it names what other tensors are for
    unknown = [key for key, name in names.items() if name is None]
    changes = any(name is not None and name.form != "new" for name in names.values())
    _refuse_others(path, entries, unknown if changes else list(entries))
    if source.passed_over:
        raise LDMError(f"{path} holds more than tensors: {some(source.passed_over)}: take a safetensors file.")
    raw: dict[tuple[str, str], list[tuple]] = {}
    for key, name in names.items():
        raw.setdefault((name.part, flattened(name.layer).removeprefix("text_model_")), []).append((key, name))
    groups = [_group(path, source, members) for members in raw.values()]
    settled = [configs[group.part].settle(group) if group.part in configs else group for group in groups]
    return Lora(str(path), tuple(sorted(settled, key=lambda g: g.name)), source.metadata, source)


def _without_words(path: Path, entries: Mapping[str, Entry]) -> dict[str, Entry]:
    """The tensors without those of learnt words, which are said on stderr to be passed over."""
    words = list(dict.fromkeys(found[1] for key in entries if (found := BUNDLED.fullmatch(key))))
    rest = {key: entry for key, entry in entries.items() if not BUNDLED.fullmatch(key)}
    if not words:
        return rest
    said = f"{len(words)} learnt word{'s' * (len(words) > 1)} ({some([word[:80] for word in words])})"
    if not rest:
        raise LDMError(f"{path} holds {said} and no LoRA: take the words' own files (add_embedding, --embedding).")
    say_on_stderr(
        f"{path}: {said} beside the LoRA passed over: a prompt that names one needs its own file (add_embedding, "
        "--embedding)."
    )
    return rest


def _refuse_others(path: Path, entries: Mapping[str, Entry], unknown: list[str]) -> None:
    """Raise LDMError for a file that is something else, or holds a tensor that we don't know."""
    if not entries:
        raise LDMError(f"{path} holds no tensors at all: download or copy it again.")
    for key in entries:
        if what := other_form(key):
            raise LDMError(f"{path} is {what}, by its tensor {key!r}: ldm doesn't implement that; {TAKE}.")
    for key in entries:
        if model := other_model(key):
            raise LDMError(
                f"{path} is a LoRA for {model}, by its tensor {key!r}: ldm draws with Stable Diffusion 1, 2 and XL "
                "and FLUX.1; take one that was made for these."
            )
    if len(unknown) == len(entries):
        kind = other_kind(unknown, model=False)
        if kind is not None and kind[0] != "lora":
            raise LDMError(f"{path} is {kind[1]}, and not a LoRA: {kind[2]}.")
        if not any(word in key for key in unknown for word in ("lora", "hada_", "lokr_", "alpha")):
            raise LDMError(
                f"{path} is no LoRA: its tensors are whole weights ({some(unknown, 2)}), none is a factor of a change; "
                "if it is a model, load it as one."
            )
    if unknown:
        raise LDMError(
            f"{path} holds {len(unknown)} of {len(entries)} tensors that ldm doesn't know as a LoRA's "
            f"({some(unknown, 3)}): it was renamed, or is of another kind; take it as its trainer wrote it."
        )
    factors = {key: entry for key, entry in entries.items() if not key.endswith(".alpha")}
    if whole := quantised(entry for entry in factors.values() if QUANTISED.fullmatch(entry.dtype)):
        raise LDMError(f"{path}: {whole}.")
    if odd := next((entry for entry in factors.values() if entry.dtype not in NUMBERS), None):
        raise LDMError(
            f"{path}: {odd.name!r} is of type {odd.dtype}, no number's that a factor has ({', '.join(NUMBERS)}): "
            "take a sound copy."
        )


def _group(path: Path, source: WeightFiles, members: list[tuple]) -> Group:
    """One layer's factors, checked against each other, with its alpha if there is one."""
    names = [name for _, name in members if name.role != "alpha"]
    first = next((name for name in names if name.role != "diff_b"), next(iter(names), members[0][1]))
    keys: dict[str, str] = {}
    for key, name in members:
        if name.role in keys:
            raise LDMError(
                f"{path} says twice what {first.layer!r} is: {keys[name.role]!r} and {key!r}; leave one of them out."
            )
        if name.form not in ("", first.form) and (name.role != "diff_b" or first.form == "new"):
            raise LDMError(
                f"{path} mixes two forms for {first.layer!r}, {first.form} and {name.form} ({key!r}): leave one out."
            )
        keys[name.role] = key
    if set(keys) == {"alpha"}:
        raise LDMError(f"{path}: {keys['alpha']!r} has no factors beside it that it would scale: the file is damaged.")
    shapes = {role: source.entries[key].shape for role, key in keys.items()}
    group = Group(first.part, first.layer, first.form, first.style, keys, shapes)
    try:
        rank, shape = measured(group)
    except LDMError as error:
        raise LDMError(f"{path}: {error}: the file is damaged, or was made by hand; take a sound copy.") from error
    return replace(group, rank=rank, shape=shape, alpha=_alpha(path, source, keys.get("alpha")))


def _alpha(path: Path, source: WeightFiles, key: str | None) -> float | None:
    if key is None:
        return None
    entry = source.entries[key]
    if math.prod(entry.shape) != 1 or entry.dtype not in NUMBERS + WHOLE:
        raise LDMError(f"{path}: {key!r} is {entry.dtype} of shape {entry.shape}, where one number belongs.")
    alpha = float(source.read(key))
    if not math.isfinite(alpha):
        raise LDMError(f"{path}: {key!r} is {alpha}, and not a finite number: take a sound copy of the file.")
    return alpha
