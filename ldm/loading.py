"""`load`: a folder in diffusers' format becomes a `Pipeline`, every tensor of it used or named in an error."""

from pathlib import Path

import torch
from torch import nn

from ldm.config import from_json
from ldm.errors import LDMError, nearest, say_on_stderr
from ldm.io.folders import find_weights, read_fields
from ldm.io.weights import blank, load_weights
from ldm.models.controlnet import ControlNet, ControlNetConfig, check_base
from ldm.models.unet import UNet, UNetConfig
from ldm.models.vae import VAE, VAEConfig
from ldm.pipeline import Pipeline
from ldm.schedules import ScheduleConfig
from ldm.settings import Defaults
from ldm.tasks import task_of
from ldm.text.clip import TextConfig, TextEncoder
from ldm.text.tokenizer import Tokenizer

# Parts of a Stable Diffusion 1 or 2 folder, and the classes by which model_index.json may name them.
PARTS = {
    "tokenizer": ("CLIPTokenizer", "CLIPTokenizerFast"),
    "text_encoder": ("CLIPTextModel", "CLIPTextModelWithProjection"),
    "unet": ("UNet2DConditionModel",),
    "vae": ("AutoencoderKL",),
    "scheduler": None,  # read by `ScheduleConfig`, which knows the classes
}
# An upscaler's schedule of the noise on its small picture; a depth estimator, which with its feature_extractor is read
# when a picture's depth is not given.
OPTIONAL = ("low_res_scheduler", "depth_estimator")
PASSED_OVER = ("safety_checker", "feature_extractor", "image_encoder", "watermarker")  # they take no part in drawing


def load(
    model: str | Path = "scenes",
    dtype: torch.dtype | str = torch.float32,
    device: str | torch.device = "cpu",
    variant: str | None = None,
    clean: str = "transformers",
) -> Pipeline:
    """`model`: the name of an embedded model ("scenes") or a folder in diffusers' format.

    `variant` ("fp16") picks one of several sets of weights in the folder; `dtype` is what they are cast to as they are
    read; `clean` is how prompts are cleaned (`ldm.text.tokenizer`). Raises LDMError with one sentence for a folder that
    is not such a model, or is damaged.
    """
    dtype = find_dtype(dtype)
    folder = find_model(model)
    check_index(folder)
    text_config = TextConfig.from_json(read_fields(folder / "text_encoder" / "config.json"))
    unet_config = UNetConfig.from_json(read_fields(folder / "unet" / "config.json"))
    vae_config = VAEConfig.from_json(read_fields(folder / "vae" / "config.json"))
    scheduler, defaults = read_schedule(folder)
    tokenizer = Tokenizer.from_folder(folder / "tokenizer", clean)
    if tokenizer.notice:
        say_on_stderr(tokenizer.notice)
    check_fit(folder, tokenizer, text_config, unet_config, vae_config)

    def fill(cls: type[nn.Module], config: object, name: str, stem: str) -> nn.Module:
        with blank():
            part = cls(config)
        paths = find_weights(folder / name, stem, variant)
        return load_weights(part, paths, dtype, device, getattr(cls, "rename", None))

    return Pipeline(
        tokenizer,
        fill(TextEncoder, text_config, "text_encoder", "model"),
        fill(UNet, unet_config, "unet", "diffusion_pytorch_model"),
        fill(VAE, vae_config, "vae", "diffusion_pytorch_model"),
        scheduler,
        defaults,
        folder,
        read_scheduler(folder / "low_res_scheduler") if (folder / "low_res_scheduler").is_dir() else None,
        read_fields(folder / "model_index.json").get("max_noise_level"),
    )


def load_controlnet(
    model: str | Path, pipe: Pipeline, dtype: torch.dtype | str | None = None, variant: str | None = None
) -> ControlNet:
    """`model`: an embedded ControlNet's name ("scenes-canny") or its folder in diffusers' format, for that pipeline.

    It is read in the pipeline's dtype, or in another, to its device. Raises LDMError, before a weight is read, for one
    that was made for another base, and as `load` does.
    """
    folder = find_model(model, "config.json")
    if (folder / "model_index.json").exists():
        raise LDMError(f"{folder} is a whole model, not a ControlNet: ldm.load reads it.")
    config = ControlNetConfig.from_json(read_fields(folder / "config.json"))
    check_base(config, pipe.unet.config, pipe.vae.config, str(folder))
    with blank():
        net = ControlNet(config)
    paths = find_weights(folder, "diffusion_pytorch_model", variant)
    return load_weights(net, paths, pipe.dtype if dtype is None else find_dtype(dtype), pipe.device)


def find_dtype(dtype: torch.dtype | str) -> torch.dtype:
    """The dtype itself, or the one of that name. Raises LDMError for one that weights cannot have."""
    known = {name: getattr(torch, name) for name in ("float32", "float16", "bfloat16", "float64")}
    if dtype in known.values():
        return dtype
    if str(dtype) not in known:
        raise LDMError(
            f"dtype {dtype!r} is none that weights can have: {', '.join(known)}.{nearest(str(dtype), known)}"
        )
    return known[dtype]


def read_schedule(folder: Path) -> tuple[ScheduleConfig, Defaults]:
    """What a folder says of its noise levels, in its scheduler's file and in `ldm.json`; no weights are read."""
    path = folder / "ldm.json"
    defaults = from_json(Defaults, read_fields(path), {}, str(path)) if path.exists() else Defaults()
    return read_scheduler(folder / "scheduler"), defaults


def read_scheduler(folder: Path) -> ScheduleConfig:
    # diffusers writes DPM-Solver's lambda_min_clipped as -Infinity
    return ScheduleConfig.from_json(read_fields(folder / "scheduler_config.json", ("-Infinity",)))


def embedded(mark: str = "model_index.json") -> dict[str, Path]:
    """The models that travel with ldm, those that hold the file `mark`: "config.json" is a ControlNet's.

    They lie in `weights/` of a checkout, or inside an installed package.
    """
    for root in (Path(__file__).parent / "weights", Path(__file__).parent.parent / "weights"):
        found = {path.parent.name: path.parent for path in sorted(root.glob(f"*/{mark}"))}
        if found:
            return found
    return {}


def find_model(model: str | Path, mark: str = "model_index.json") -> Path:
    """The folder of an embedded model's name, or the folder itself. Raises LDMError if there is none."""
    known, other = embedded(mark), embedded("config.json" if mark == "model_index.json" else "model_index.json")
    if str(model) in known:
        return known[str(model)]
    if str(model) in other:
        which = "a ControlNet: load_controlnet" if mark == "model_index.json" else "a whole model: load"
        raise LDMError(f"The embedded {str(model)!r} is {which} reads it.")
    folder = Path(model)
    if folder.is_dir():
        return folder
    names = ", ".join(known) or "none"
    raise LDMError(
        f"There is no model {str(model)!r}: neither a folder here nor an embedded model ({names})."
        + nearest(str(model), known)
    )


def check_index(folder: Path) -> None:
    """Hold model_index.json against what ldm draws with: parts unknown are refused, idle ones named in a line."""
    if not (folder / "model_index.json").exists():
        raise LDMError(f"{folder} is not a model folder in diffusers' format: it has no model_index.json.")
    index = read_fields(folder / "model_index.json")  # {part: [library, class]}, or two nulls; and remarks
    entries = {name: value[-1] for name, value in index.items() if isinstance(value, list) and value}
    parts = {name: cls for name, cls in entries.items() if cls is not None}
    known = {*PARTS, *OPTIONAL} | ({"feature_extractor"} if "depth_estimator" in parts else set())
    for name, cls in parts.items():
        if name in PASSED_OVER and name not in known:
            say_on_stderr(f"{folder}: {name} takes no part in drawing and is passed over.")
        elif name not in known:
            raise LDMError(f"{folder}/model_index.json names a part that ldm doesn't know: {name!r} ({cls}).")
        elif PARTS.get(name) is not None and cls not in PARTS[name]:
            raise LDMError(f"{folder}/model_index.json: {name} is a {cls}; ldm knows {' and '.join(PARTS[name])}.")
    missing = [name for name in PARTS if name not in parts]
    if missing:
        raise LDMError(f"{folder}/model_index.json lacks {', '.join(missing)}.")


def check_fit(folder: Path, tokenizer: Tokenizer, text: TextConfig, unet: UNetConfig, vae: VAEConfig) -> None:
    """Refuse parts of different models, and UNets that ask for more than a prompt, before a weight is read."""
    task = task_of(unet.in_channels, vae.latent_channels)
    for name in ("time_cond_proj_dim", "num_class_embeds", "addition_embed_type"):  # LCM, upscaler, SDXL
        if getattr(unet, name) is not None and (name, task) != ("num_class_embeds", "upscale"):
            raise LDMError(f"{folder}: the UNet asks for more than a prompt ({name}), which ldm.load doesn't give it.")
    ids, length = 1 + max(tokenizer.ids.values()), tokenizer.max_length
    faults = []
    if ids > text.vocab_size or length > text.max_position_embeddings:
        known = f"{text.max_position_embeddings} of {text.vocab_size} kinds"
        faults.append(f"the tokenizer writes {length} tokens of {ids} kinds, the text encoder reads {known}")
    if text.hidden_size != unet.cross_attention_dim:
        wanted = unet.cross_attention_dim
        faults.append(f"the text encoder speaks vectors of {text.hidden_size} numbers, the UNet reads {wanted}")
    if task is None or unet.out_channels != vae.latent_channels:
        inner = f"{unet.in_channels} channels and returns {unet.out_channels}"
        faults.append(f"the UNet takes {inner}, the VAE's latents have {vae.latent_channels}")
    if task == "upscale" and (unet.num_class_embeds is None or not (folder / "low_res_scheduler").is_dir()):
        faults.append("the UNet upscales, which takes noise levels (num_class_embeds) and a low_res_scheduler")
    if faults:
        raise LDMError(f"{folder}: {'; '.join(faults)}: these parts don't belong together.")
