"""What a LoRA is: whose format, of which rank, what it changes and how much, and which models it goes with."""

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from functools import lru_cache
from shlex import quote

from torch import float64, nn
from torch.linalg import vector_norm

from ldm.checkpoints.checkpoint import NETWORKS, blank_part
from ldm.checkpoints.names import Config
from ldm.errors import LDMError
from ldm.inspect.bases import Base, beside, line_of_base
from ldm.inspect.report import Report, Strength, make_part
from ldm.inspect.trained import facts_of_training
from ldm.io.misfits import CONTEXT_WIDTHS
from ldm.io.weights import Tensors, WeightFiles
from ldm.lora.file import Lora, open_lora
from ldm.lora.fitting import FLUX_WIDTHS, Place, places
from ldm.lora.groups import Group
from ldm.lora.names import TRANSFORMER, UNET, WORDS, flattened, other_form, other_model, parse
from ldm.models.patches import PATCH

BLOCKS = re.compile(
    r"(down_blocks|up_blocks|input_blocks|output_blocks|double_blocks|single_blocks|transformer_blocks|"
    r"single_transformer_blocks)_(\d+)_|(mid_block|middle_block)_"
)
ORDER = ("", "down_blocks", "input_blocks", "mid_block", "middle_block", "up_blocks", "output_blocks")  # as data goes
ORDER += ("double_blocks", "single_blocks")
AUTHORS = {
    "transformer_blocks": "double_blocks",
    "single_transformer_blocks": "single_blocks",
}  # FLUX's, whose tell more
USUAL_PATCH = 64  # numbers of a patch of FLUX.1's latents
MOST_NUMBERS = 2**31  # of a model's weights, that are read to compare a LoRA with them


def could_be(files: WeightFiles) -> bool:
    """Whether a file whose keys are no LoRA's at first sight has one that is: of an old or of a rare kind."""
    return any(parse(key) or other_form(key) for key in files.entries)


def of_adapter(files: WeightFiles, form: str, name: str, base: Base | None) -> Report:
    """The report of a LoRA's file, whose numbers are read; and whether it goes with `base`, if one is named."""
    path, facts = files.paths[0], facts_of_training(files.metadata)
    common = {"place": str(path), "kind": "lora", "form": form}
    try:
        lora = open_lora(path, allow_pickle=True)
        changes = {group: norms_of(lora, group) for group in lora.groups}
    except LDMError as error:  # damaged, or of a kind that is refused by its name
        what = next((what for what in map(other_form, files.entries) if what), None)
        other = next((f"a LoRA for {model}" for model in map(other_model, files.entries) if model), "a LoRA")
        part = make_part("all", path.name, files.entries.values())
        return Report(**common, what=what or other, parts=(part,), facts=facts, faults=(str(error),))
    norms = {group: math.hypot(*each.values()) for group, each in changes.items()}
    bases = beside(base)
    found = {title: whereabouts(lora, each) for title, each in bases.items()}
    known = {title: bases[title] for title, where in found.items() if where is not None}
    first = next(iter(known.values()), None)
    where, sizes = (found[first.title], own_norms(changes, first, found[first.title])) if first else (None, {})
    fault, warnings = None if base is None else refusal(lora, base), []
    if not known and base is None:
        warnings.append("It goes with no model that ldm knows by its shapes: --model M asks whether it goes with M.")
    if not any(norms.values()):
        warnings.append("It changes nothing: all its products are 0.")
    line = f"ldm generate {line_of_base(known.values())} --lora {quote(name)}:0.8"
    return Report(
        **common,
        what=lora.format,
        reason=made_for(lora),
        parts=tuple(parts_of(lora, files)),
        facts=facts_of(lora) | {"goes with": in_words(known)} | facts,
        strengths=strengths(norms, where, sizes),
        strengths_in=first.title if sizes else "",
        warnings=tuple(warnings),
        faults=(fault,) if fault else (),
        use=() if fault else (line + " --allow-pickle" * form.startswith("a pickle"),),
    )


def norms_of(lora: Lora, group: Group) -> dict[str, float]:
    """How large the change of a layer's "weight" and "bias" is, at weight 1. Raises LDMError for NaN."""
    return {leaf: change.norm() for leaf, change in lora.changes(group).items()}


def own_norms(
    changes: Mapping[Group, Mapping[str, float]], base: Base, where: Mapping[Group, tuple[Place, ...]]
) -> dict[Group, float]:
    """How large the model's own weights are that each group changes.

    Nothing, if they aren't here, can't be read, or are so many that reading them would take minutes.
    """
    numbers = sum(math.prod(group.shape) for group in where if group.shape is not None)
    if base.checkpoint is None or numbers > MOST_NUMBERS:
        return {}
    tables: dict[str, tuple[Tensors, dict[str, str]]] = {}
    found = {}
    try:
        for group, spots in where.items():
            part = spots[0].part
            if part not in tables:
                weights, rename = base.checkpoint.weights(part), getattr(NETWORKS[part].network, "rename", str)
                tables[part] = weights, {rename(name): name for name in weights.entries}
            weights, names = tables[part]
            own = [weights.read(names[f"{each.layer}.{leaf}"]) for each in spots for leaf in changes[group]]
            found[group] = math.hypot(*(float(vector_norm(each, dtype=float64)) for each in own))
    except (LDMError, KeyError):  # of a model that ldm wouldn't load
        return {}
    return found


def made_for(lora: Lora) -> str:
    """By what its model was told."""
    if lora.width is not None:
        return f"made for {lora.made_for}: its layers are {lora.width} wide"
    if lora.context_width is not None:
        made = f"made for {CONTEXT_WIDTHS[lora.context_width]}: " if lora.context_width in CONTEXT_WIDTHS else ""
        return f"{made}its cross-attention reads a context of {lora.context_width} numbers"
    return f"made for {lora.made_for}, as its metadata or its text encoders say" if lora.made_for else ""


def parts_of(lora: Lora, files: WeightFiles) -> Iterable:
    """The factors for each network."""
    for part in WORDS:
        groups = [group for group in lora.groups if group.part == part]
        if groups:
            entries = [files.entries[key] for group in groups for key in group.keys.values()]
            yield make_part(part, many(len(groups)), entries)


def facts_of(lora: Lora) -> dict[str, str]:
    """What it changes, with which rank and alpha."""
    told = []
    for part, word in WORDS.items():
        groups = [group for group in lora.groups if group.part == part]
        kernels = sum(
            group.shape is not None and len(group.shape) == 4 and group.shape[2:] != (1, 1) for group in groups
        )
        gains = sum(group.form == "new" for group in groups)
        some = f" ({kernels} of them convolutions)" if kernels else ""
        some += f" ({gains} of them norms, whose gains it takes the place of)" if gains else ""
        told += [f"{many(len(groups))} of the {word}{some}"] if groups else []
    facts = {"changes": " and ".join(told)}
    if lora.patch is not None:
        facts["reads"] = f"{lora.patch} numbers of a patch, so {lora.patch // PATCH**2} channels"
        if lora.patch > USUAL_PATCH and lora.width in FLUX_WIDTHS:
            facts["reads"] += f": {(lora.patch - USUAL_PATCH) // PATCH**2} of a picture beside the 16 of the latent"
    if lora.ranks:
        scales = Counter(
            1.0 if group.alpha is None else group.alpha / group.rank for group in lora.groups if group.rank
        )
        facts["rank"] = counted(lora.ranks)
        facts["alpha"] = f"{counted(lora.alphas)}; so the factors' product is scaled by {counted(scales)}"
    return facts


def counted(found: Counter) -> str:
    """ "8", or "8 (192 layers), 4 (72)" with the most frequent first."""
    words = [("not said" if value is None else f"{value:g}", layers) for value, layers in found.most_common(6)]
    if len(words) == 1:
        return words[0][0]
    more = f" and {len(found) - 6} more" if len(found) > 6 else ""
    return ", ".join(f"{word} ({many(layers)})" for word, layers in words) + more


def many(layers: int) -> str:
    return f"{layers} layer{'s' * (layers != 1)}"


def in_words(titles: Iterable[str]) -> str:
    return f"{', '.join(titles)}, by its names and shapes" if titles else "no model that ldm knows"


# ---------------------------------------------------------------------------------------------------- its places


def networks_of(base: Base) -> dict[str, nn.Module]:
    """The networks that a LoRA may change, without numbers."""
    return {part: network_of(part, config) for part, config in base.configs.items() if part in WORDS}


@lru_cache(maxsize=32)  # models share their text encoders, and a file is compared with a dozen of them
def network_of(part: str, config: Config) -> nn.Module:
    return blank_part(part, config)


def whereabouts(lora: Lora, base: Base) -> dict[Group, tuple[Place, ...]] | None:
    """The layers of each group in that model; None if it doesn't go with it."""
    widths = {
        UNET: (lora.context_width, getattr(base.configs.get(UNET), "cross_attention_dim", None)),
        TRANSFORMER: (lora.width, getattr(base.configs.get(TRANSFORMER), "width", None)),
    }
    if any(own not in (None, width) for own, width in widths.values()):  # told without building the model
        return None
    try:
        return places(lora, networks_of(base))
    except LDMError:
        return None


def refusal(lora: Lora, base: Base) -> str | None:
    """The sentence with which that model refuses it, if it does."""
    try:
        places(lora, networks_of(base))
    except LDMError as error:
        return str(error)
    return None


def strengths(
    norms: Mapping[Group, float], where: Mapping[Group, tuple[Place, ...]] | None, own: Mapping[Group, float]
) -> tuple[Strength, ...]:
    """The change's norm by block, in the order in which data goes through them. `own`: of the weights, if known."""
    found: dict[tuple, list[Group]] = {}
    for group in norms:
        part, layer = where[group][0][:2] if where is not None else (group.part, group.layer)
        found.setdefault(block_of(part, layer), []).append(group)
    told = []
    for (part, _, number, block), groups in sorted(found.items()):
        name = f"{WORDS[list(WORDS)[part]]}{f' {block}' if block else ''}{'' if number < 0 else f'.{number}'}"
        norm, base = (math.hypot(*(sizes.get(group, 0.0) for group in groups)) for sizes in (norms, own))
        told.append(Strength(name, len(groups), norm, norm / base if base else None))
    return tuple(told)


def block_of(part: str, layer: str) -> tuple[int, int, int, str]:
    """What sorts a layer's block, and its name: of a text encoder all layers are one."""
    order = list(WORDS).index(part)
    if part not in (UNET, TRANSFORMER):
        return order, 0, -1, ""
    found = BLOCKS.match(flattened(layer))
    if found is None:  # the first and the last layer, and what reads the timestep
        return order, 0, -1, "outside the blocks"
    kind = AUTHORS.get(found[1], found[1]) or found[3]
    return order, ORDER.index(kind), int(found[2] or -1), kind
