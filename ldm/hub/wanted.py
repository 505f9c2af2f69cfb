"""Which files of a repository ldm reads, by their names and the few JSON files that say so: nothing else is fetched.

Code (.py) is never among them, nor pickles unless they are allowed, nor what takes no part in drawing.
"""

import re
from collections.abc import Callable, Collection
from typing import Any

from ldm.errors import LDMError
from ldm.io.folders import PICKLED, PICKLES, some

TOKENIZER = (
    "vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json",
)  # fmt: skip
PLAIN = {  # parts that are small files of these names, where they are there
    "tokenizer": TOKENIZER,
    "tokenizer_2": (*TOKENIZER, "spiece.model"),
    "scheduler": ("scheduler_config.json",),
    "low_res_scheduler": ("scheduler_config.json",),
    "feature_extractor": ("preprocessor_config.json",),
}
STEMS = {  # parts that are networks: a config.json and weights of this stem
    "text_encoder": "model",
    "text_encoder_2": "model",
    "unet": "diffusion_pytorch_model",
    "transformer": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    "depth_estimator": "model",
}
FLUX = "FluxTransformer2DModel"  # the transformer that ldm knows
KONTEXT = ("FluxKontextPipeline", "FluxKontextInpaintPipeline")  # which has the same, and is drawn with otherwise
T5, T5_FILES = ("T5Tokenizer", "T5TokenizerFast"), ("tokenizer.json", "spiece.model")
IDLE = ("safety_checker", "feature_extractor", "image_encoder", "watermarker")  # of no use for drawing
SAFE = re.compile(r"\w[\w.\-+]*(?:/\w[\w.\-+]*)*", re.ASCII)  # no hidden file, no "..", no absolute path

Read = Callable[[str], dict[str, Any]]  # a JSON file's fields


class Missing(LDMError):
    """What ldm needs isn't among the names: of a repository, it lacks it; of a cache, it isn't here yet."""


class OnlyPickles(Missing):
    """There are no weights but pickles."""


def choose(
    names: Collection[str],
    read: Read,
    place: str,
    variant: str | None = None,
    allow_pickle: bool = False,
    exact: bool = False,
) -> list[str]:
    """The names of what ldm reads, in the order in which it is fetched; `read` opens a JSON file among them.

    `variant` ("fp16") as in `ldm.load`: where a part doesn't have it, the other weights that it has are taken, unless
    `exact`. `place` is whose names they are, for sentences.
    Raises Missing if something isn't there; LDMError if it is no model that ldm knows, or not to be trusted.
    """
    names = {name for name in names if SAFE.fullmatch(name)}
    if "model_index.json" in names:
        return sorted(_of_pipeline(names, read, place, variant, allow_pickle, exact))
    for stem in ("diffusion_pytorch_model", "model"):  # a ControlNet, a VAE; a depth estimator
        if "config.json" in names and (
            _variants(names, "", stem, "safetensors", place) or _pickled(names, "", stem, place)
        ):
            extra = {"preprocessor_config.json"} & names
            return sorted(
                {"config.json", *extra, *_weights(names, read, place, "", stem, variant, allow_pickle, exact)}
            )
    raise Missing(_nothing(names, place))


def _of_pipeline(
    names: set[str], read: Read, place: str, variant: str | None, allow_pickle: bool, exact: bool
) -> set[str]:
    index = read("model_index.json")
    listed = {part for part, value in index.items() if isinstance(value, list) and value and value[-1] is not None}
    known = {*PLAIN, *STEMS} - ({"feature_extractor"} if "depth_estimator" not in listed else set())
    unknown = sorted(listed - known - {*IDLE})
    transformer = index["transformer"][-1] if "transformer" in listed else FLUX
    if not {"unet", "transformer"} & listed or unknown or transformer != FLUX:
        what = f"has parts that ldm doesn't know ({some(unknown)})" if unknown else "has no unet and no transformer"
        what = what if transformer == FLUX else f"has a transformer that ldm doesn't know ({transformer!r:.80})"
        raise LDMError(f"{place} {what}: it is no Stable Diffusion 1, 2 or XL and no FLUX.1, nothing was downloaded.")
    if index.get("_class_name") in KONTEXT:
        raise LDMError(f"{place} is a FLUX.1 Kontext, and ldm doesn't draw with it: nothing was downloaded.")
    found = {"model_index.json"} | {"ldm.json"} & names
    for part in sorted(listed & known):
        if part in PLAIN:
            files = {f"{part}/{name}" for name in PLAIN[part]} & names
            if part == "tokenizer_2" and index[part][-1] in T5 and not {f"{part}/{name}" for name in T5_FILES} & files:
                raise Missing(f"{place} lacks {part}/{' and '.join(T5_FILES)}.")
            if not files or (
                f"{part}/vocab.json" in files and not {f"{part}/merges.txt", f"{part}/tokenizer.json"} & files
            ):
                raise Missing(f"{place} lacks files of its {part}.")
            found |= files
        else:
            config = f"{part}/config.json"
            if config not in names:
                raise Missing(f"{place} lacks {config}.")
            found |= {config, *_weights(names, read, place, f"{part}/", STEMS[part], variant, allow_pickle, exact)}
    return found


def _weights(
    names: set[str],
    read: Read,
    place: str,
    folder: str,
    stem: str,
    variant: str | None,
    allow_pickle: bool,
    exact: bool,
) -> list[str]:
    """The weights of one network, one file or shards and their index: as `find_weights` finds them in a folder."""
    ending, found = "safetensors", _variants(names, folder, stem, "safetensors", place)
    if not found and _pickled(names, folder, stem, place):
        if not allow_pickle:
            raise OnlyPickles(
                f"{place} has {folder or 'its weights'} only as pickles, which can run any code when they are opened: "
                "take another model, or allow it (allow_pickle=True, --allow-pickle), and ldm reads the tensors alone."
            )
        ending, found = "bin", _pickled(names, folder, stem, place)
    wanted = variant if variant in found else None if None in found else next(iter(found), None)
    if not found or (exact and wanted != variant):
        raise Missing(f"{place} lacks {folder}{stem}{f'.{variant}' if variant else ''}.safetensors.")
    if wanted not in (variant, None) and len(found) > 1:
        raise LDMError(f"{place} holds several variants of {folder}{stem} ({some(sorted(map(str, found)))}): name one.")
    name = found[wanted]
    return [name, *_shards(read(name), names, place, folder, name, ending)] if name.endswith(".json") else [name]


def _variants(names: set[str], folder: str, stem: str, ending: str, place: str) -> dict[str | None, str]:
    """{variant: its single file or its index}; both of one are refused, as in a folder: they may be two models."""
    pattern = re.compile(
        re.escape(folder + stem) + rf"(?:(?:\.(?P<one>\w+))?\.{ending}|\.{ending}\.index(?:\.(?P<many>\w+))?\.json)"
    )
    found: dict[str | None, str] = {}
    for match in filter(None, map(pattern.fullmatch, sorted(names))):
        variant = match["one"] or match["many"]
        if variant in found:
            raise LDMError(
                f"{place} holds both {found[variant]} and {match[0]}, of which one is outdated: take another revision "
                "or model."
            )
        found[variant] = match[0]
    return found


def _pickled(names: set[str], folder: str, stem: str, place: str) -> dict[str | None, str]:
    return _variants(names, folder, PICKLED.get(stem, stem), "bin", place)


def _shards(index: dict, names: set[str], place: str, folder: str, file: str, ending: str) -> list[str]:
    table = index.get("weight_map")
    if not isinstance(table, dict) or not table or not all(isinstance(name, str) for name in table.values()):
        raise LDMError(f"{place}: {file} has no table 'weight_map' of names and files: take another model.")
    shards = sorted(set(table.values()))
    for shard in shards:  # a stranger's text: it may name files of its own folder, nothing else
        if not re.fullmatch(rf"\w[\w.\-]{{0,200}}\.{ending}", shard, re.ASCII):
            raise LDMError(f"{place}: {file} names the shard {shard!r}, no plain file name: do not trust this model.")
        if folder + shard not in names:
            raise Missing(f"{place} lacks {folder}{shard}, which {file} lists.")
    return [folder + shard for shard in shards]


def _nothing(names: Collection[str], place: str) -> str:
    single = sorted(name for name in names if "/" not in name and name.endswith((".safetensors", *PICKLES)))
    if single:
        return f"{place} is no folder in diffusers' format; name one of its files, {place}/FILE: {some(single)}."
    return f"{place} holds no model that ldm reads (no model_index.json, no config.json with weights): check the name."


def check_single(path: str, names: Collection[str], place: str, allow_pickle: bool) -> None:
    """Refuse a single file that isn't there, or is a pickle that wasn't allowed. Raises LDMError."""
    if path not in names:
        singles = [name for name in names if name.endswith((".safetensors", *PICKLES))]
        singles.sort(key=lambda name: (name.count("/"), name))
        raise Missing(f"{place} has no file {path}: it has {some(singles) or 'no weights at all'}.")
    if path.endswith(PICKLES) and not allow_pickle:
        raise LDMError(
            f"{place}/{path} is a pickle, which can run any code when it is opened: take a .safetensors file, or allow "
            "it (allow_pickle=True, --allow-pickle), and ldm reads its tensors alone."
        )
