"""What a LoRA's trainer wrote into its metadata: by what and on what it was trained, and which words call it up.

A stranger's text: only the fields named here are told, each cut, and anything that isn't as its trainer writes it is
passed over. The keys `ss_...` are those of kohya's sd-scripts (LyCORIS and many others write them too), `modelspec...`
of Stability's ModelSpec, `lora_adapter_metadata` of diffusers, `software` of ai-toolkit and of `ldm.train.lora`, whose
base is `base_model`.
"""

from collections import Counter
from collections.abc import Mapping
from typing import Any

from ldm.errors import LDMError
from ldm.io.folders import parse_json

MOST_LETTERS, MOST_TAGS = 120, 6
PEFT = "lora_adapter_metadata"
MODULES = {  # how ss_network_module begins -> whose it is
    "networks.lora": "kohya's sd-scripts",
    "networks.dylora": "kohya's sd-scripts (DyLoRA)",
    "networks.oft": "kohya's sd-scripts (OFT)",
    "lycoris": "LyCORIS, on kohya's sd-scripts",
}
NONE = ("", "None", "null")


def facts_of_training(metadata: Mapping[str, str]) -> dict[str, str]:
    """What is told, by name, in the order of a page."""
    facts = {
        "trained by": trainer(metadata),
        "trained on": base(metadata),
        "trained with": ", ".join(amounts(metadata)),
        "its maker says": said(metadata, "modelspec.title", "ss_output_name"),
        "author": said(metadata, "modelspec.author"),
        "licence": said(metadata, "modelspec.license"),
        "words": words(metadata),
    }
    return {name: text for name, text in facts.items() if text}


def said(metadata: Mapping[str, str], *keys: str) -> str:
    """The first of these fields that says anything, cut."""
    return cut(next((metadata[key] for key in keys if metadata.get(key, "") not in NONE), ""))


def cut(text: str) -> str:
    return text if len(text) <= MOST_LETTERS else f"{text[:MOST_LETTERS]}..."


def trainer(metadata: Mapping[str, str]) -> str:
    """Whose program it was, and the network's kind in its own words."""
    module = said(metadata, "ss_network_module")
    if module:
        whose = next((name for start, name in MODULES.items() if module.startswith(start)), "a trainer like kohya's")
        algo = fields(metadata.get("ss_network_args", "")).get("algo")
        return f"{whose} ({module}{f', {cut(algo)}' if isinstance(algo, str) else ''})"
    software = metadata.get("software", "")
    name = fields(software).get("name") or software
    if isinstance(name, str) and name not in NONE:
        return cut(name)
    if "ot_branch" in metadata or "ot_revision" in metadata:
        return "OneTrainer"
    said_otherwise = said(metadata, "modelspec.implementation")
    return said_otherwise or ("not said; the file is in diffusers' format" if PEFT in metadata else "")


def base(metadata: Mapping[str, str]) -> str:
    """The model it was trained on, as its trainer names it."""
    kinds = (said(metadata, "ss_base_model_version"), said(metadata, "modelspec.architecture"))
    kinds = [kind for kind in kinds if kind]
    name = said(metadata, "ss_sd_model_name", "base_model")
    told = [name] * bool(name) + ([f"({', '.join(kinds)})" if name else ", ".join(kinds)] if kinds else [])
    return f"{' '.join(told)}, as its metadata say" if told else ""


def amounts(metadata: Mapping[str, str]) -> list[str]:
    """Of how many pictures and steps, at which size."""
    found = []
    for key, word in (("ss_num_train_images", "pictures"), ("ss_steps", "steps"), ("ss_num_epochs", "epochs")):
        text = metadata.get(key, "")
        if text.isdecimal() and len(text) < 12:
            found.append(f"{int(text):,} {word}")
    resolution = said(metadata, "ss_resolution", "modelspec.resolution")
    return [*found, f"at {resolution}"] if resolution else found


def words(metadata: Mapping[str, str]) -> str:
    """What calls it up: as its maker says, or the tags that most of its pictures had, with their number."""
    phrase = said(metadata, "modelspec.trigger_phrase")
    if phrase:
        return phrase
    counts: Counter[str] = Counter()
    for tags in fields(metadata.get("ss_tag_frequency", "")).values():
        for tag, count in (tags if isinstance(tags, dict) else {}).items():
            counts[tag.strip()] += count if type(count) is int and count > 0 else 0
    counts.pop("", None)
    shown = [f"{tag[:40]} ({count})" for tag, count in counts.most_common(MOST_TAGS) if count]
    return f"the most frequent of its captions: {', '.join(shown)}" if shown else ""


def fields(text: str) -> dict[str, Any]:
    """A JSON object in a field of the metadata; nothing, if it is none."""
    try:
        found = parse_json(text, "metadata") if text.lstrip().startswith("{") else {}
    except LDMError:
        return {}
    return found if isinstance(found, dict) else {}
