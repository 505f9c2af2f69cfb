"""What a single file holds: recognised by its keys and shapes, and beside them what its kind should have."""

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from shlex import quote
from typing import Any

from ldm.checkpoints import names, vocabulary
from ldm.checkpoints.checkpoint import check_fit
from ldm.checkpoints.places import CONFIG, INDEX
from ldm.checkpoints.recognise import TITLES, Found, recognise
from ldm.checkpoints.single import (
    MODELSPEC,
    defaults_of,
    open_single,
    predictions,
    read_scheduler,
    said_of_prediction,
    wants_average,
)
from ldm.errors import LDMError, bytes_in_words
from ldm.inspect import adapter, word
from ldm.inspect.bases import Base
from ldm.inspect.report import Part, Report, Tensor, capital, make_part
from ldm.inspect.told import facts_of_networks, facts_of_schedule, latents, line_of_model, line_of_part
from ldm.io.folders import cannot_read, find_weights, open_plain, read_json, some
from ldm.io.headers import is_pickle
from ldm.io.pickles import refused
from ldm.io.png import SIGNATURE, read_settings
from ldm.io.weights import WeightFiles
from ldm.models.vae import VAEConfig

INDEX_FILE = re.compile(r"(.+)\.(safetensors|bin)\.index(?:\.(\w+))?\.json")
LAYOUTS = {
    "original": "the original layout",
    "diffusers": "diffusers' layout",
    "diffusers-old": "diffusers' old layout",
}
REMARKS = {"title": "title", "author": "author", "license": "licence", "merged_from": "merged from"}  # of ModelSpec
MOST_LETTERS = 200
FETCH = "ldm fetch clip-vocab"  # as `vocabulary` advises it where nothing is found


def of_file(path: Path, variant: str | None, name: str, base: Base | None = None) -> Report:
    """The report of a file, of whatever kind; of a LoRA or an embedding, beside the model `base`."""
    form = "a file"
    try:
        with open_plain(path) as file:
            start = file.read(64)
        if start.startswith(SIGNATURE):
            return of_picture(path)
        index = INDEX_FILE.fullmatch(path.name)
        if index is not None:
            form = "an index of shards"
            return of_index(path, index, variant, name)
        if start.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"{") and start[8:9] != b"{":
            return of_json(path)
        form = "a pickle" if is_pickle(path) else "a safetensors file"
        files = WeightFiles(path, allow_pickle=True)
        return of_addition(files, form, name, base) or of_weights(files, form, variant, name)
    except OSError as error:
        fault = str(cannot_read(path, error))
    except LDMError as error:
        fault = str(error)
    asks = (str(refused(path)),) if form.endswith("pickle") else ()
    return Report(str(path), form, "damaged", "not readable", faults=(fault,), warnings=asks)


def of_picture(path: Path) -> Report:
    """A PNG, which may say how it was drawn."""
    try:
        settings = read_settings(path)
    except LDMError as error:
        return Report(str(path), "a PNG", "picture", "a picture", warnings=(str(error),), readable=False)
    facts = {key: short(settings[key]) for key in ("prompt", "seed", "model", "sampler", "steps") if key in settings}
    use = (f"ldm rerun {quote(str(path))}",)
    return Report(str(path), "a PNG with its settings", "picture", "a picture that ldm drew", facts=facts, use=use)


def of_json(path: Path) -> Report:
    """A configuration: what it names, and where to look."""
    fields = read_json(path)
    cls = fields.get("_class_name") or fields.get("architectures") if isinstance(fields, dict) else None
    reason = f"it names {short(cls)}" if cls else ""
    homes = [home for home in (path.parent, path.parent.parent) if (home / INDEX).exists() or (home / CONFIG).exists()]
    use = (f"ldm inspect {quote(str(homes[0]))}",) if homes else ()
    return Report(str(path), "JSON", "json", "a configuration, not weights", reason, use=use, readable=False)


def of_index(path: Path, match: re.Match, variant: str | None, name: str) -> Report:
    """The shards of an index, as one file. Raises LDMError for one that isn't to be trusted, or lacks a shard."""
    stem, ending, own = match.groups()
    paths = find_weights(path.parent, stem, own, allow_pickle=ending == "bin", say=lambda line: None)
    files = WeightFiles(paths, allow_pickle=True)
    if absent := [key for key in read_json(path)["weight_map"] if key not in files.entries]:
        raise LDMError(
            f"{path} lists {some([repr(key[:100]) for key in absent])}, which no shard holds: take them anew."
        )
    return of_weights(files, f"{len(paths)} shards", variant, name, path)


def of_addition(files: WeightFiles, form: str, name: str, base: Base | None) -> Report | None:
    """The report of a LoRA or an embedding; None for what is neither."""
    found = recognise(files.entries, files.place, files.metadata)
    form += f" of {bytes_in_words(files.paths[0].stat().st_size)}"
    unknown = found.kind == "unknown"
    if found.kind == "lora" or (unknown and adapter.could_be(files)):
        report = adapter.of_adapter(files, form, name, base)
    elif found.kind == "embedding" or (unknown and word.could_be(files, base)):
        report = word.of_word(files, form, name, base)
    else:
        return None
    warnings = [str(refused(each)) for each in files.paths if is_pickle(each)]
    return replace(report, warnings=(*report.warnings, *warnings), passed_over=tuple(files.passed_over))


def of_weights(files: WeightFiles, form: str, variant: str | None, name: str, path: Path | None = None) -> Report:
    """What the tensors make up. Raises LDMError for configurations in the metadata that can't be read."""
    path = path or files.paths[0]
    form += f" of {bytes_in_words(sum(each.stat().st_size for each in files.paths))}"
    found = recognise(files.entries, str(path), files.metadata)
    what, _, reason = found.reason.partition(": ")
    pickles = [each for each in files.paths if is_pickle(each)]
    beside = files.passed_over
    warnings = [str(refused(each)) for each in pickles]
    common = {"place": str(path), "kind": found.kind, "what": what, "reason": reason}
    facts = of_metadata(files.metadata)
    if not found.parts:
        part = make_part("all", path.name, files.entries.values())
        warnings.append(advice_of(found, path))
        return Report(
            **common, form=form, parts=(part,), facts=facts, passed_over=tuple(beside), warnings=tuple(warnings),
            readable=False,
        )  # fmt: skip
    layouts = " and ".join(dict.fromkeys(LAYOUTS[place.layout] for place in found.parts.values()))
    faults = faults_of(found, path, variant)
    whole = bool(found.backbone) and "vae" in found.parts and not found.lacks
    try:
        facts = {} if faults else facts_of(found, files, path) | facts
    except LDMError as error:  # a configuration in the metadata that can't be meant
        faults = [str(error)]
    if whole and not faults:
        told, missing, faults = tokenizers_of(found, path, variant)
        facts, warnings = facts | told, warnings + missing
    use, more = use_of(found, name, variant, bool(pickles), whole)
    if whole and any(FETCH in line for line in warnings):
        use = (f"{FETCH}   # CLIP's vocabulary, which the file lacks and ldm didn't find", *use)
    return Report(
        **common,
        form=f"{form}, in {layouts}",
        parts=tuple(parts_of(found, files, variant)),
        facts=facts,
        passed_over=(*(f"{g.what} ({len(g.names)}): {g.why}" for g in found.passed_over), *beside),
        warnings=(*warnings, *more),
        faults=tuple(faults),
        use=() if faults else use,
    )


# ---------------------------------------------------------------------------------------------------- its parts


def parts_of(found: Found, files: WeightFiles, variant: str | None) -> list[Part]:
    """Each part's tensors, under the file's own names, beside those of its architecture."""
    parts, wrong = [], {each.name: each for each in found.wrong}
    left = {part: [] for part in found.parts}
    for key in found.unknown:  # to the part below whose prefix it lies, the longest one
        owner = max(
            found.parts, key=lambda part: (key.startswith(found.parts[part].prefix), len(found.parts[part].prefix))
        )
        left[owner].append(tensor_of(files, key))
    for part, place in found.parts.items():
        shapes = names.shapes(part, found.configs[part])
        wanted = {o.name: o.stored(shapes[key]) for key, o in found.origins(part, ema(found, part, variant)).items()}
        there = [files.entries[key] for key in wanted if key in files.entries]
        missing = [Tensor(key, shape) for key, shape in wanted.items() if key not in files.entries]
        other = [Tensor(*tensor_of(files, key)[:3], wrong[key].wanted) for key in wanted if key in wrong]
        where = f"below {place.prefix}" if place.prefix else "below no prefix"
        parts.append(make_part(part, where, there, missing=missing, wrong=other, extra=left[part]))
    return parts


def ema(found: Found, part: str, variant: str | None) -> bool:
    return variant == "ema" and part == "unet" and found.has_ema


def tensor_of(files: WeightFiles, key: str) -> Tensor:
    entry = files.entries[key]
    return Tensor(key, entry.shape, entry.dtype)


def faults_of(found: Found, path: Path, variant: str | None) -> list[str]:
    """The sentence with which loading refuses it, if it does."""
    try:
        found.check(path)
        wants_average(path, found, variant, say=lambda line: None)
    except LDMError as error:
        return [str(error)]
    return []


# ---------------------------------------------------------------------------------------------------- what it says


def facts_of(found: Found, files: WeightFiles, place: Path) -> dict[str, str]:
    """Of the networks, and of the schedule if there is a UNet."""
    configs = dict(found.configs)
    if "transformer" in configs:
        return facts_of_flux(found, place)
    if "unet" not in configs:
        return {"latents": latents(configs["vae"], either(found))} if "vae" in configs else {}
    said, _ = said_of_prediction(found, files)
    architecture = found.predicting(said) if said else found.architecture
    if "vae" in configs:
        configs["vae"] = VAEConfig.from_json(architecture.parts["vae"])
    facts = {"predicts": f"{said}, by {evidence(found, files)}" if said else untold(found)}
    name = architecture.scheduler.get("_class_name")
    if name is not None and (said or len(predictions(found)) == 1):
        scheduler = read_scheduler(architecture.scheduler, "ztsnr" in found.marks)
        defaults = defaults_of(found, place)
        facts |= facts_of_schedule(scheduler, f"{name} ({'its own' if found.own else 'that of its kind'})", defaults)
        configs["unet"] = replace(configs["unet"], sample_size=architecture.parts["unet"].get("sample_size"))
        return facts | facts_of_networks(configs)
    return facts | ({"latents": latents(configs["vae"])} if "vae" in configs else {})


def facts_of_flux(found: Found, place: Path) -> dict[str, str]:
    """`facts_of` a FLUX, which always predicts the velocity."""
    said = found.architecture.scheduler
    facts = {}
    if said:
        whose, defaults = "its own" if found.own else "that of its kind", defaults_of(found, place)
        facts = facts_of_schedule(read_scheduler(said, False), f"{said['_class_name']} ({whose})", defaults)
    return facts | facts_of_networks(found.configs)


def either(found: Found) -> str | None:
    """How a lone VAE's latents are scaled, where several models have VAEs of its shapes."""
    factors = found.scaling_factors
    told = " or ".join(f"{each:g}" for each in factors)
    return f"scaled by {told}: its keys don't tell" if len(factors) > 1 else None


def untold(found: Found) -> str:
    kinds = predictions(found)
    likely = f"likely {kinds[0]}" if len(kinds) == 1 else " or ".join(kinds)
    return f"{likely}: nothing in the file says it, and ldm.load tries it out, unless --prediction-type is given"


def evidence(found: Found, files: WeightFiles) -> str:
    """What of a file says its prediction type, in the order in which `said_of_prediction` looks."""
    if found.own:
        return "the configuration in its metadata"
    if "v_pred" in found.marks:
        return "its mark v_pred"
    if MODELSPEC in files.metadata:
        return f"{MODELSPEC} in its metadata"
    return "its number of training steps" if len(predictions(found)) > 1 else "its kind"


def tokenizers_of(found: Found, path: Path, variant: str | None) -> tuple[dict[str, str], list[str], list[str]]:
    """(where they come from, what lacks, what is wrong) of a whole model, which a file holds without tokenizers."""
    facts: dict[str, str] = {}
    texts = [part for part in ("text_encoder", "text_encoder_2") if part in found.parts]
    try:
        for pad, part in zip(found.architecture.pads, texts, strict=False):
            key, lines = part.replace("text_encoder", "tokenizer"), []
            own = vocabulary.tokenizer(path, pad, found.configs[part], lines.append, key)
            taken = lines[-1].partition("taking ")[2].rstrip(".") if lines else "the folder that bears the file's name"
            facts[key.replace("_", " ")] = f"{len(own)} pieces, of {taken}"
    except LDMError as error:
        return facts, [str(error)], []
    try:
        check_fit(open_single(path, variant, "transformers", allow_pickle=True, say=lambda line: None))
    except LDMError as error:
        return facts, [], [str(error)]
    return facts, [], []


def of_metadata(metadata: Mapping[str, str]) -> dict[str, str]:
    """What the file's makers tell of it, as they tell it."""
    found = {word: metadata.get(f"modelspec.{key}", "") for key, word in REMARKS.items()}
    return {word: short(text) for word, text in found.items() if text}


def short(value: Any) -> str:
    text = value if isinstance(value, str) else repr(value)
    return text if len(text) <= MOST_LETTERS else f"{text[:MOST_LETTERS]}..."


# ---------------------------------------------------------------------------------------------------- what to do


def advice_of(found: Found, path: Path) -> str:
    """For what ldm doesn't load as it is."""
    if found.kind == "unknown" and (path.parent / CONFIG).exists():
        return f"Its folder has a configuration: `ldm inspect {quote(str(path.parent))}` compares the two."
    return f"{capital(found.advice)}."


def use_of(
    found: Found, name: str, variant: str | None, pickled: bool, whole: bool
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(lines that use it, what to know of using it)"""
    options = " --variant ema" * (variant == "ema") + " --allow-pickle" * pickled
    lines = [line_of_model(name, found.configs, options)] if whole else []
    kinds = ("transformer", "controlnet", "vae")
    parts = [part for part in kinds if part in found.parts and not (whole and part != "controlnet")]
    lines += [line_of_part(part, name, options) for part in parts]
    lacks = found.lacks if found.backbone else () if lines else ("unet",)
    if not lacks:
        return tuple(lines), ()
    titles = " and the ".join(TITLES[part] for part in lacks)
    if "transformer" in found.parts:
        return tuple(lines), (f"It lacks the {titles}: these are taken from another FLUX.1 (--parts-of).",)
    todo = "take a checkpoint with all parts, or `ldm convert` makes it a part of a model's folder"
    return tuple(lines), (f"It is no whole model: it lacks the {titles}; {todo}.",)
