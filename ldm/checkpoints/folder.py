"""A folder in diffusers' format: model_index.json, and a folder a part with its configuration and weights."""

from collections.abc import Callable
from pathlib import Path

from ldm.checkpoints.checkpoint import NETWORKS, Checkpoint, family_defaults
from ldm.config import from_json
from ldm.errors import LDMError, say_on_stderr
from ldm.io.folders import find_weights, read_fields
from ldm.io.weights import WeightFiles
from ldm.models.unet import UNetConfig
from ldm.schedules import ScheduleConfig
from ldm.settings import Defaults
from ldm.text.tokenizer import Tokenizer

Say = Callable[[str], None]
# Parts of a Stable Diffusion folder, and the classes by which model_index.json may name them.
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
# An upscaler's schedule of the noise on its small picture; a depth estimator, which with its feature_extractor is read
# when a picture's depth is not given.
OPTIONAL = ("low_res_scheduler", "depth_estimator")
PASSED_OVER = ("safety_checker", "feature_extractor", "image_encoder", "watermarker")  # they take no part in drawing


def open_folder(
    folder: Path, variant: str | None, clean: str, allow_pickle: bool = False, say: Say = say_on_stderr
) -> Checkpoint:
    """The model in a folder; of its weights nothing is read yet. Raises LDMError for one that is not whole."""
    index = check_index(folder, say)
    present = [name for name in NETWORKS if name in index]
    configs = {name: NETWORKS[name].config.from_json(read_fields(folder / name / "config.json")) for name in present}
    scheduler, defaults = read_schedule(folder, configs["unet"])
    names = [name for name in ("tokenizer", "tokenizer_2") if name in index]
    tokenizers = {name: Tokenizer.from_folder(folder / name, clean) for name in names}
    low_res = folder / "low_res_scheduler"

    def weights(name: str) -> WeightFiles:
        return WeightFiles(find_weights(folder / name, NETWORKS[name].stem, variant, allow_pickle, say), allow_pickle)

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


def read_schedule(folder: Path, unet: UNetConfig | None = None) -> tuple[ScheduleConfig, Defaults]:
    """What a folder says of its noise levels, in its scheduler's file and in `ldm.json`; no weights are read.

    Where there is no `ldm.json`, the defaults are those of the `unet`'s family in diffusers.
    """
    path = folder / "ldm.json"
    defaults = from_json(Defaults, read_fields(path), {}, str(path)) if path.exists() else family_defaults(unet)
    return read_scheduler(folder / "scheduler"), defaults


def read_scheduler(folder: Path) -> ScheduleConfig:
    # diffusers writes DPM-Solver's lambda_min_clipped as -Infinity
    return ScheduleConfig.from_json(read_fields(folder / "scheduler_config.json", ("-Infinity",)))


def check_index(folder: Path, say: Say = say_on_stderr) -> dict:
    """What model_index.json says: {part: its class}, and remarks. Unknown parts are refused, idle ones named."""
    if not (folder / "model_index.json").exists():
        raise LDMError(f"{folder} is not a model folder in diffusers' format: it has no model_index.json.")
    index = read_fields(folder / "model_index.json")  # {part: [library, class]}, or two nulls; and remarks
    entries = {name: value[-1] for name, value in index.items() if isinstance(value, list) and value}
    parts = {name: cls for name, cls in entries.items() if cls is not None}
    classes = PARTS | SECOND
    known = {*classes, *OPTIONAL} | ({"feature_extractor"} if "depth_estimator" in parts else set())
    for name, cls in parts.items():
        if name in PASSED_OVER and name not in known:
            say(f"{folder}: {name} takes no part in drawing and is passed over.")
        elif name not in known:
            raise LDMError(f"{folder}/model_index.json names a part that ldm doesn't know: {name!r} ({cls}).")
        elif classes.get(name) is not None and cls not in classes[name]:
            raise LDMError(f"{folder}/model_index.json: {name} is a {cls}; ldm knows {' and '.join(classes[name])}.")
    second = SECOND.keys() & parts
    alone = second and not {"tokenizer", "text_encoder"} & parts.keys()  # a refiner, which has no first ones
    wanted = [name for name in PARTS if not (alone and f"{name}_2" in SECOND)] + [*SECOND] * bool(second)
    missing = [name for name in wanted if name not in parts]
    if missing:
        raise LDMError(f"{folder}/model_index.json lacks {', '.join(missing)}.")
    return {name: value for name, value in index.items() if not isinstance(value, list)} | parts
