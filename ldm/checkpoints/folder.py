"""A folder in diffusers' format: model_index.json, and a folder a part with its configuration and weights."""

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from ldm.checkpoints.checkpoint import NETWORKS, Checkpoint, backbone_of, family_defaults
from ldm.checkpoints.places import CONFIG, INDEX, embedded
from ldm.config import from_json
from ldm.errors import LDMError, say_on_stderr
from ldm.io.folders import find_weights, read_fields
from ldm.io.weights import WeightFiles
from ldm.models.flux import FluxConfig
from ldm.models.unet import UNetConfig
from ldm.schedules import ScheduleConfig
from ldm.settings import Defaults
from ldm.text.t5_tokenizer import T5Tokenizer
from ldm.text.tokenizer import Tokenizer

Say = Callable[[str], None]
OWN, PARTS_OF = "ldm.json", "parts_of"  # what a model says of its drawing; and whose parts those are that it lacks
# Parts of a model's folder, and the classes by which model_index.json may name them.
PARTS = {
    "tokenizer": ("CLIPTokenizer", "CLIPTokenizerFast"),
    "text_encoder": ("CLIPTextModel", "CLIPTextModelWithProjection"),
    "unet": ("UNet2DConditionModel",),
    "vae": ("AutoencoderKL",),
    "scheduler": None,  # read by `ScheduleConfig`, which knows the classes
}
SECOND = {  # of SDXL, which has these beside the first ones; its refiner has these alone
    "tokenizer_2": PARTS["tokenizer"],
    "text_encoder_2": ("CLIPTextModelWithProjection",),
}
FLUX = {name: classes for name, classes in PARTS.items() if name != "unet"} | {
    "transformer": ("FluxTransformer2DModel",),
}
FLUX_SECOND = {  # which a model of one's own need not have
    "tokenizer_2": ("T5Tokenizer", "T5TokenizerFast"),
    "text_encoder_2": ("T5EncoderModel",),
}
KONTEXT = ("FluxKontextPipeline", "FluxKontextInpaintPipeline")  # of the same parts, but drawn with in another way
# An upscaler's schedule of the noise on its small picture; a depth estimator, which with its feature_extractor is read
# when a picture's depth is not given.
OPTIONAL = ("low_res_scheduler", "depth_estimator")
PASSED_OVER = ("safety_checker", "feature_extractor", "image_encoder", "watermarker")  # they take no part in drawing


def open_folder(
    folder: Path, variant: str | None, clean: str, allow_pickle: bool = False, say: Say = say_on_stderr
) -> Checkpoint:
    """The model in a folder; of its weights nothing is read yet. Raises LDMError for one that is not whole."""
    index = check_index(folder, say)
    place = places_of_parts(folder)
    present = [name for name in NETWORKS if name in index]
    configs = {name: NETWORKS[name].config.from_json(read_fields(place(name) / CONFIG)) for name in present}
    scheduler, defaults = read_schedule(folder, backbone_of(configs))
    names = [name for name in ("tokenizer", "tokenizer_2") if name in index]
    tokenizers = {name: open_tokenizer(place(name), index[name], clean) for name in names}
    low_res = folder / "low_res_scheduler"

    def weights(name: str) -> WeightFiles:
        return WeightFiles(find_weights(place(name), NETWORKS[name].stem, variant, allow_pickle, say), allow_pickle)

    return Checkpoint(
        place=folder,
        configs=configs,
        tokenizers=tokenizers,
        weights=weights,
        scheduler=scheduler,
        defaults=defaults,
        low_res=read_scheduler(low_res) if low_res.is_dir() else None,
        index=index,
    )


def open_tokenizer(folder: Path, cls: str, clean: str = "transformers") -> Tokenizer | T5Tokenizer:
    """CLIP's or T5's, by the class that model_index.json says."""
    return (
        T5Tokenizer.from_folder(folder) if cls in FLUX_SECOND["tokenizer_2"] else Tokenizer.from_folder(folder, clean)
    )


def places_of_parts(folder: Path) -> Callable[[str], Path]:
    """Where each part of a model lies: in its folder, or where it isn't there, in that of the model that `ldm.json`
    names in `parts_of`: a folder beside it, or one of ldm's own. Raises LDMError for a name that is none.
    """
    home = home_of_parts(folder)
    return lambda part: folder / part if home is None or (folder / part).is_dir() else home / part


def home_of_parts(folder: Path) -> Path | None:
    """The folder of the model that `ldm.json` names in `parts_of`; None where it names none."""
    path = folder / OWN
    name = read_fields(path).get(PARTS_OF) if path.exists() else None
    if name is None:
        return None
    # It is a stranger's text: it may name a folder beside this one, nothing else ("../", "/etc").
    if not isinstance(name, str) or not re.fullmatch(r"[\w-][\w.-]{0,99}", name, re.ASCII) or name == folder.name:
        raise LDMError(f"{path} has {PARTS_OF} {name!r:.100}: it must be the bare name of another model's folder.")
    for home in (folder.absolute().parent / name, embedded().get(name)):
        if home is not None and (home / INDEX).is_file():
            return home
    raise LDMError(
        f"{path} says that its other parts are those of {name!r}, and there is no such model: put its folder beside "
        f"{folder}, as {name}."
    )


def read_schedule(folder: Path, unet: UNetConfig | FluxConfig | None = None) -> tuple[ScheduleConfig, Defaults]:
    """What a folder says of its noise levels, in its scheduler's file and in `ldm.json`; no weights are read.

    Where there is no `ldm.json`, the defaults are those of the `unet`'s family in diffusers.
    """
    path = folder / OWN
    if path.exists():
        said = {name: value for name, value in read_fields(path).items() if name != PARTS_OF}
        defaults = from_json(Defaults, said, {}, str(path))
        if defaults.sigmas is None and (folder / "transformer").is_dir():
            defaults = replace(defaults, sigmas="even")  # as FLUX's own program spaces them
    else:
        defaults = family_defaults(unet or read_transformer(folder))
    return read_scheduler(folder / "scheduler"), defaults


def read_transformer(folder: Path) -> FluxConfig | None:
    """The configuration of the folder's transformer, if it has one."""
    path = folder / "transformer" / CONFIG
    return FluxConfig.from_json(read_fields(path)) if path.is_file() else None


def read_scheduler(folder: Path) -> ScheduleConfig:
    # diffusers writes DPM-Solver's lambda_min_clipped as -Infinity
    return ScheduleConfig.from_json(read_fields(folder / "scheduler_config.json", ("-Infinity",)))


def check_index(folder: Path, say: Say = say_on_stderr) -> dict:
    """What model_index.json says: {part: its class}, and remarks. Unknown parts are refused, idle ones named."""
    if not (folder / INDEX).exists():
        raise LDMError(f"{folder} is not a model folder in diffusers' format: it has no {INDEX}.")
    index = read_fields(folder / INDEX)  # {part: [library, class]}, or two nulls; and remarks
    entries = {name: value[-1] for name, value in index.items() if isinstance(value, list) and value}
    parts = {name: cls for name, cls in entries.items() if cls is not None}
    flux = "transformer" in parts
    classes = FLUX | FLUX_SECOND if flux else PARTS | SECOND
    known = {*classes, *OPTIONAL} | ({"feature_extractor"} if "depth_estimator" in parts else set())
    for name, cls in parts.items():
        if name in PASSED_OVER and name not in known:
            say(f"{folder}: {name} takes no part in drawing and is passed over.")
        elif name not in known:
            raise LDMError(f"{folder}/model_index.json names a part that ldm doesn't know: {name!r} ({cls}).")
        elif classes.get(name) is not None and cls not in classes[name]:
            raise LDMError(f"{folder}/model_index.json: {name} is a {cls}; ldm knows {' and '.join(classes[name])}.")
    if index.get("_class_name") in KONTEXT:
        raise LDMError(
            f"{folder} is a FLUX.1 Kontext, which reads another picture's patches behind its own, and ldm doesn't draw "
            "with it: take FLUX.1-dev, -schnell, Fill, Canny or Depth."
        )
    second = SECOND.keys() & parts
    if flux:
        wanted = [*FLUX, *(FLUX_SECOND if second else ())]
    else:
        wanted = wanted_of_stable_diffusion(parts)
    missing = [name for name in wanted if name not in parts]
    if missing:
        raise LDMError(f"{folder}/model_index.json lacks {', '.join(missing)}.")
    return {name: value for name, value in index.items() if not isinstance(value, list)} | parts


def wanted_of_stable_diffusion(parts: Mapping[str, str]) -> list[str]:
    """The parts that a Stable Diffusion of these must have."""
    second = SECOND.keys() & parts
    alone = second and not {"tokenizer", "text_encoder"} & parts.keys()  # a refiner, which has no first ones
    return [name for name in PARTS if not (alone and f"{name}_2" in SECOND)] + [*SECOND] * bool(second)
