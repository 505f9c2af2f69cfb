"""`load`: a folder in diffusers' format becomes a `Pipeline`, every tensor of it used or named in an error."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import nn

from ldm.config import from_json
from ldm.errors import LDMError, nearest, say_on_stderr
from ldm.io.folders import find_weights, read_fields
from ldm.io.weights import blank, load_weights
from ldm.models.adapter import Adapter, AdapterConfig, check_levels
from ldm.models.controlnet import ControlNet, ControlNetConfig, check_base
from ldm.models.unet import UNet, UNetConfig
from ldm.models.vae import VAE, VAEConfig
from ldm.pipeline import Pipeline
from ldm.schedules import ScheduleConfig
from ldm.settings import Defaults
from ldm.tasks import task_of
from ldm.text.clip import TextConfig, TextEncoder
from ldm.text.tokenizer import Tokenizer

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
NETWORKS = {  # a network's class, its configuration's, and the stem of its file
    "text_encoder": (TextEncoder, TextConfig, "model"),
    "text_encoder_2": (TextEncoder, TextConfig, "model"),
    "unet": (UNet, UNetConfig, "diffusion_pytorch_model"),
    "vae": (VAE, VAEConfig, "diffusion_pytorch_model"),
}
Dtype = torch.dtype | str


def load(
    model: str | Path = "scenes",
    dtype: Dtype | Mapping[str, Dtype] = torch.float32,
    device: str | torch.device = "cpu",
    variant: str | None = None,
    clean: str = "transformers",
) -> Pipeline:
    """`model`: the name of an embedded model ("scenes") or a folder in diffusers' format.

    `variant` ("fp16") picks one of several sets of weights in the folder; `dtype` is what they are cast to as they are
    read, one for all or {"vae": "float32", "rest": "float16"}; `clean` is how prompts are cleaned
    (`ldm.text.tokenizer`). Raises LDMError with one sentence for a folder that is not such a model, or is damaged.
    """
    folder = find_model(model)
    index = check_index(folder)
    present = [name for name in NETWORKS if name in index]
    configs = {name: NETWORKS[name][1].from_json(read_fields(folder / name / "config.json")) for name in present}
    scheduler, defaults = read_schedule(folder, configs["unet"])
    names = [name for name in ("tokenizer", "tokenizer_2") if name in index]
    tokenizers = {name: Tokenizer.from_folder(folder / name, clean) for name in names}
    if notice := next(iter(tokenizers.values())).notice:
        say_on_stderr(notice)
    check_fit(folder, tokenizers, configs, index)
    dtypes = choose_dtypes(dtype, configs, folder)

    def fill(name: str) -> nn.Module:
        cls, _, stem = NETWORKS[name]
        with blank():
            part = cls(configs[name])
        paths = find_weights(folder / name, stem, variant)
        return load_weights(part, paths, dtypes[name], device, getattr(cls, "rename", None))

    parts = {name: fill(name) for name in present} | tokenizers
    if "text_encoder" not in parts:  # a refiner
        parts |= {"tokenizer": parts.pop("tokenizer_2"), "text_encoder": parts.pop("text_encoder_2")}
    return Pipeline(
        **parts,
        scheduler=scheduler,
        defaults=defaults,
        folder=folder,
        low_res=read_scheduler(folder / "low_res_scheduler") if (folder / "low_res_scheduler").is_dir() else None,
        max_noise_level=index.get("max_noise_level"),
        zero_negative=configs["unet"].is_xl and bool(index.get("force_zeros_for_empty_prompt", True)),
    )


def choose_dtypes(dtype: Dtype | Mapping[str, Dtype], configs: dict, folder: Path) -> dict[str, torch.dtype]:
    """The dtype of each part. Raises LDMError for one that is none, and for a part that isn't there."""
    asked = dict(dtype) if isinstance(dtype, Mapping) else {"rest": dtype}
    if "text_encoder" in asked and "text_encoder" not in configs:  # a refiner's only one is its first in a pipeline
        asked["text_encoder_2"] = asked.pop("text_encoder")
    if unknown := [name for name in asked if name not in (*configs, "rest")]:
        raise LDMError(
            f"A dtype is given for {unknown[0]!r}, which {folder} doesn't have: it has {', '.join(configs)}."
            + nearest(str(unknown[0]), configs)
        )
    rest = asked.get("rest", torch.float32)
    chosen = {name: find_dtype(asked.get(name, rest)) for name in configs}
    # SDXL's VAE overflows in float16, and its file says so; those of SD 1 and 2 say so too, and don't.
    narrow = configs["unet"].is_xl and configs["vae"].force_upcast and chosen["vae"] == torch.float16
    if narrow and "vae" not in asked:
        chosen["vae"] = torch.float32
        say_on_stderr(f"{folder}: the VAE is read in float32, for its file says that float16 is too narrow for it.")
    return chosen


def load_controlnet(
    model: str | Path, pipe: Pipeline, dtype: torch.dtype | str | None = None, variant: str | None = None
) -> ControlNet | Adapter:
    """`model`: an embedded ControlNet's name ("scenes-canny") or its folder in diffusers' format, for that pipeline.

    A T2I-Adapter's folder is read as well. The net gets the pipeline's dtype, or another, and its device. Raises
    LDMError, before a weight is read, for one that was made for another base, and as `load` does.
    """
    folder = find_model(model, "config.json")
    if (folder / "model_index.json").exists():
        raise LDMError(f"{folder} is a whole model, not a ControlNet: ldm.load reads it.")
    fields = read_fields(folder / "config.json")
    adapter = fields.get("_class_name") == AdapterConfig.class_name
    config = (AdapterConfig if adapter else ControlNetConfig).from_json(fields)
    (check_levels if adapter else check_base)(config, pipe.unet.config, pipe.vae.config, str(folder))
    with blank():
        net = (Adapter if adapter else ControlNet)(config)
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


def read_schedule(folder: Path, unet: UNetConfig | None = None) -> tuple[ScheduleConfig, Defaults]:
    """What a folder says of its noise levels, in its scheduler's file and in `ldm.json`; no weights are read.

    Where there is no `ldm.json`, the defaults are those of the `unet`'s family in diffusers.
    """
    path = folder / "ldm.json"
    if path.exists():
        defaults = from_json(Defaults, read_fields(path), {}, str(path))
    elif unet is not None and unet.time_cond_proj_dim is not None:
        defaults = Defaults(steps=4, guidance=8.5)  # LCM
    else:
        defaults = Defaults(guidance=5.0) if unet is not None and unet.is_xl else Defaults()
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


def check_index(folder: Path) -> dict:
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
            say_on_stderr(f"{folder}: {name} takes no part in drawing and is passed over.")
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


def check_fit(folder: Path, tokenizers: dict[str, Tokenizer], configs: dict, index: dict) -> None:
    """Refuse parts of different models, and UNets that ask for more than ldm tells them, before a weight is read."""
    unet, vae = configs["unet"], configs["vae"]
    task, xl = task_of(unet.in_channels, vae.latent_channels), unet.is_xl
    texts = [configs[name] for name in ("text_encoder", "text_encoder_2") if name in configs]
    if unet.num_class_embeds is not None and task != "upscale":
        raise LDMError(f"{folder}: the UNet asks for more than a prompt (num_class_embeds), which ldm doesn't give it.")
    faults = []
    for tokenizer, text in zip(tokenizers.values(), texts, strict=True):
        ids, length = 1 + max(tokenizer.ids.values()), tokenizer.max_length
        if ids > text.vocab_size or length > text.max_position_embeddings:
            known = f"{text.max_position_embeddings} of {text.vocab_size} kinds"
            faults.append(f"the tokenizer writes {length} tokens of {ids} kinds, the text encoder reads {known}")
    width, wanted = sum(text.hidden_size for text in texts), unet.cross_attention_dim
    if width != wanted:
        speak = "the text encoder speaks" if len(texts) == 1 else "the two text encoders together speak"
        faults.append(f"{speak} vectors of {width} numbers, the UNet reads {wanted}")
    if task is None or unet.out_channels != vae.latent_channels:
        inner = f"{unet.in_channels} channels and returns {unet.out_channels}"
        faults.append(f"the UNet takes {inner}, the VAE's latents have {vae.latent_channels}")
    if task == "upscale" and (unet.num_class_embeds is None or not (folder / "low_res_scheduler").is_dir()):
        faults.append("the UNet upscales, which takes noise levels (num_class_embeds) and a low_res_scheduler")
    faults += check_xl(texts, unet, index) if xl else ["only SDXL has two text encoders"] * (len(texts) > 1)
    if faults:
        raise LDMError(f"{folder}: {'; '.join(faults)}: these parts don't belong together.")


def check_xl(texts: Sequence[TextConfig], unet: UNetConfig, index: dict) -> list[str]:
    """What is wrong with the pooled vector and the numbers that SDXL's UNet is told."""
    if not texts[-1].with_projection:
        return ["SDXL's UNet reads a pooled vector, and the last text encoder has no projection that makes one"]
    pooled, width = texts[-1].projection_dim, unet.addition_time_embed_dim or 0
    rest = (unet.projection_class_embeddings_input_dim or 0) - pooled
    if rest not in (5 * width, 6 * width) or not width:
        return [
            f"the UNet reads {unet.projection_class_embeddings_input_dim} numbers beside the text, which is neither "
            f"{pooled} + 6 x {width} (SDXL) nor {pooled} + 5 x {width} (its refiner)"
        ]
    scored = index.get("requires_aesthetics_score", rest == 5 * width)
    if scored != (rest == 5 * width):
        return [f"model_index.json says requires_aesthetics_score {scored}, and the UNet reads {rest // width} numbers"]
    return []
