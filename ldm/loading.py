"""`load`: weights in any format become a `Pipeline`, every tensor of them used or named."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from ldm.checkpoints import single
from ldm.checkpoints.checkpoint import NETWORKS, Checkpoint, blank_part, check_fit
from ldm.checkpoints.folder import open_folder, read_schedule
from ldm.checkpoints.places import CONFIG, INDEX, check_here, embedded, find_model
from ldm.checkpoints.prediction import measure
from ldm.checkpoints.together import open_together
from ldm.config import building
from ldm.control import check_net
from ldm.diffusion import PREDICTIONS
from ldm.errors import LDMError, nearest, say_on_stderr
from ldm.io.folders import find_weights, read_fields
from ldm.io.weights import WeightFiles, blank, load_weights
from ldm.models.adapter import Adapter, AdapterConfig
from ldm.models.controlnet import ControlNet, ControlNetConfig
from ldm.models.flux_controlnet import FluxControlNet, FluxControlNetConfig
from ldm.models.vae import VAE, VAEConfig
from ldm.pipeline import Pipeline
from ldm.schedules import ScheduleConfig
from ldm.settings import Defaults

Dtype = torch.dtype | str
STEM = "diffusion_pytorch_model"
NETS = {  # by the class that a folder names; where it names none, it is a ControlNet of a UNet
    AdapterConfig.class_name: (Adapter, AdapterConfig),
    FluxControlNetConfig.class_name: (FluxControlNet, FluxControlNetConfig),
}


def load(
    model: str | Path = "scenes",
    dtype: Dtype | Mapping[str, Dtype] = torch.float32,
    device: str | torch.device = "cpu",
    variant: str | None = None,
    clean: str = "transformers",
    prediction_type: str | None = None,
    allow_pickle: bool = False,
    parts_of: str | Path | None = None,
    mapped: bool = False,
) -> Pipeline:
    """`model`: the name of an embedded model ("scenes"), a folder in diffusers' format, a single file in the original
    layout, or an address on the hub ("org/name"), which is fetched unless it is here.

    `variant` picks one of several sets of weights: "fp16" of a folder, "ema" of a file that holds the averaged ones
    too. `dtype` is what they are cast to as they are read, one for all or {"vae": "float32", "rest": "float16"};
    `clean` is how prompts are cleaned (`ldm.text.tokenizer`). `prediction_type` ("epsilon", "v_prediction") counts
    instead of what the files say, or where they don't. `allow_pickle` reads pickles (.ckpt, .bin), through an
    interpreter that runs nothing. `parts_of`: of a FLUX's transformer alone, a file as it is published or a
    folder, the name of another FLUX.1 whose parts the rest are. `mapped`: weights stay in their files, of which they
    must have the type, and are read as they are used, by the CPU in place or by `ldm.memory.offload` for a device.
    Raises LDMError with one sentence for what is no such model, or is damaged.
    """
    checkpoint = open_checkpoint(
        find_model(model, INDEX, variant, allow_pickle), variant, clean, allow_pickle, parts_of
    )
    check_fit(checkpoint)
    if notice := next(iter(checkpoint.tokenizers.values())).notice:
        say_on_stderr(notice)
    dtypes = choose_dtypes(dtype, checkpoint.configs, checkpoint.place)
    parts = {name: fill(checkpoint, name, dtypes[name], device, mapped) for name in checkpoint.configs}
    checkpoint = decide(checkpoint, parts.get("unet"), prediction_type)
    unet = checkpoint.configs.get("unet")
    if unet is not None:
        parts["unet"].config = unet
    parts |= checkpoint.tokenizers
    if "text_encoder" not in parts:  # a refiner
        parts |= {"tokenizer": parts.pop("tokenizer_2"), "text_encoder": parts.pop("text_encoder_2")}
    index = checkpoint.index
    return Pipeline(
        **parts,
        scheduler=checkpoint.scheduler,
        defaults=checkpoint.defaults,
        folder=checkpoint.place,
        low_res=checkpoint.low_res,
        max_noise_level=index.get("max_noise_level"),
        zero_negative=unet is not None and unet.is_xl and bool(index.get("force_zeros_for_empty_prompt", True)),
    )


def open_checkpoint(
    place: Path, variant: str | None, clean: str, allow_pickle: bool, parts_of: str | Path | None = None
) -> Checkpoint:
    """The model in a folder or a single file; of its weights nothing is read yet."""
    if parts_of is not None:
        home = find_model(parts_of, INDEX, variant, allow_pickle)
        return open_together(place, home, variant, clean, allow_pickle)
    if place.is_dir():
        return open_folder(place, variant, clean, allow_pickle)
    return single.open_single(place, variant, clean, allow_pickle)


def find_schedule(model: str | Path, allow_pickle: bool = False) -> tuple[ScheduleConfig, Defaults]:
    """What a model says of its noise levels; no weights are read, and of a folder none need be there.

    Raises LDMError for an address on the hub that isn't here.
    """
    check_here(str(model), None, allow_pickle)
    place = find_model(model, INDEX, None, allow_pickle)
    return read_schedule(place) if place.is_dir() else single.find_schedule(place, allow_pickle)


def fill(
    checkpoint: Checkpoint, name: str, dtype: torch.dtype, device: str | torch.device, mapped: bool = False
) -> nn.Module:
    """One network, with its weights."""
    rename = getattr(NETWORKS[name].network, "rename", None)
    weights = checkpoint.weights(name)
    return load_weights(blank_part(name, checkpoint.configs[name]), weights, dtype, device, rename, mapped)


def decide(checkpoint: Checkpoint, unet: nn.Module, asked: str | None) -> Checkpoint:
    """The checkpoint with the prediction type that was asked for, that a file says, or that the network shows.

    Raises LDMError where it can't be known.
    """
    place, said = checkpoint.place, checkpoint.scheduler.prediction_type
    if asked is not None:
        if asked not in PREDICTIONS:
            known = ", ".join(PREDICTIONS)
            raise LDMError(f"There is no prediction_type {asked!r}: {known}.{nearest(asked, PREDICTIONS)}")
        if checkpoint.doubt is None and asked != said:
            say_on_stderr(f"{place}: its files say {said}, and {asked} is taken as asked.")
        return checkpoint.predicting(asked)
    if checkpoint.doubt is None:
        return checkpoint
    shown, likeness = measure(unet)
    seen = f"its answer to pure noise has a correlation of {likeness:.2f} with it"
    if shown is None and not checkpoint.usual:
        raise LDMError(
            f"{place} doesn't say whether it predicts noise or velocity ({checkpoint.doubt}), and {seen}, which speaks "
            "for neither: say prediction_type='epsilon' or 'v_prediction' (--prediction-type)."
        )
    why = seen if shown else f"{checkpoint.usual} ({checkpoint.doubt}, and {seen}, which speaks for neither)"
    say_on_stderr(f"{place}: prediction_type {shown or said}, for {why}.")
    return checkpoint.predicting(shown or said)


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
    unet = configs.get("unet")
    narrow = unet is not None and unet.is_xl and configs["vae"].force_upcast and chosen["vae"] == torch.float16
    if narrow and "vae" not in asked:
        chosen["vae"] = torch.float32
        say_on_stderr(f"{folder}: the VAE is read in float32, for its file says that float16 is too narrow for it.")
    return chosen


def load_controlnet(
    model: str | Path,
    pipe: Pipeline,
    dtype: Dtype | None = None,
    variant: str | None = None,
    allow_pickle: bool = False,
) -> ControlNet | FluxControlNet | Adapter:
    """`model`: as for `load`, of a ControlNet for that pipeline: "scenes-canny", a folder, a file, the hub's.

    A T2I-Adapter's folder is read as well. The net gets the pipeline's dtype, or another, and its device. Raises
    LDMError, before a weight is read, for one that was made for another base, and as `load` does.
    """
    place = find_model(model, CONFIG, variant, allow_pickle)
    if (place / INDEX).exists():
        raise LDMError(f"{place} is a whole model, not a ControlNet: ldm.load reads it.")
    fields = read_fields(place / CONFIG) if place.is_dir() else {}
    kind, read = NETS.get(str(fields.get("_class_name")), (ControlNet, ControlNetConfig))
    if place.is_dir():
        config = read.from_json(fields)
    else:
        config, weights = single.open_part(place, "controlnet", allow_pickle)
    check_net(config, pipe.backbone.config, pipe.vae.config, str(place))
    with building(config.what), blank():
        net = kind(config)
    if place.is_dir():
        weights = WeightFiles(find_weights(place, STEM, variant, allow_pickle), allow_pickle)
    return load_weights(net, weights, pipe.dtype if dtype is None else find_dtype(dtype), pipe.device)


def load_vae(
    model: str | Path,
    pipe: Pipeline,
    dtype: Dtype | None = None,
    variant: str | None = None,
    allow_pickle: bool = False,
) -> VAE:
    """`model`: as for `load`, of a VAE to take the place of the pipeline's: `pipe.vae = ldm.load_vae(file, pipe)`.

    Of a whole model its VAE is taken. By how much latents are to be scaled a single file doesn't say: as by the
    pipeline's VAE. Raises LDMError for a VAE whose latents are of another kind, and as `load` does.
    """
    place = find_vae(model, variant, allow_pickle)
    if place.is_dir():
        config = VAEConfig.from_json(read_fields(place / CONFIG))
    else:
        config, weights = single.open_part(place, "vae", allow_pickle, like=pipe.vae.config)
    mine = pipe.vae.config
    for name in ("latent_channels", "factor", "scaling_factor", "shift_factor"):
        if getattr(config, name) != getattr(mine, name):
            raise LDMError(
                f"{place} has a VAE with {name} {getattr(config, name)}, and the pipeline's has {getattr(mine, name)}: "
                "the UNet was trained on latents of another kind."
            )
    if place.is_dir():
        weights = WeightFiles(find_weights(place, STEM, variant, allow_pickle), allow_pickle)
    kept = pipe.vae.encoder.conv_in.weight.device
    with building("the VAE"), blank():
        vae = VAE(config)
    return load_weights(vae, weights, pipe.vae.dtype if dtype is None else find_dtype(dtype), kept, VAE.rename)


def find_vae(model: str | Path, variant: str | None = None, allow_pickle: bool = False) -> Path:
    """The folder or the file of a VAE, or of the whole model that has it. Raises LDMError for what is neither.

    That is seen before anything in it is read: a stranger's picture may name any place.
    """
    place = find_model(model, INDEX if str(model) in embedded(INDEX) else CONFIG, variant, allow_pickle)
    place = place / "vae" if (place / INDEX).is_file() else place
    if place.is_file() or (place / CONFIG).is_file():
        return place
    raise LDMError(f"{place} is no VAE: name a folder that holds {CONFIG}, a whole model, or a single file.")


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
