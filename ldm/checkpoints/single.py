"""A single file in the original layout: all parts of a model in one, under the names that their authors gave.

It holds tensors and nothing else: neither configurations nor a tokenizer. So what it is is told by its keys and shapes
(`recognise`), the configuration is the published one of that kind (`architectures`), and the vocabulary is looked for
(`vocabulary`). What is decided so is said, a line each.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ldm.checkpoints import vocabulary
from ldm.checkpoints.checkpoint import NETWORKS, Checkpoint, backbone_of, family_defaults
from ldm.checkpoints.names import Renamed
from ldm.checkpoints.recognise import Found, recognise
from ldm.config import from_json
from ldm.errors import LDMError, say_on_stderr
from ldm.io.folders import some
from ldm.io.weights import Tensors, WeightFiles
from ldm.models.vae import VAEConfig
from ldm.schedules import ScheduleConfig
from ldm.settings import Defaults

Say = Callable[[str], None]
MODELSPEC = "modelspec.prediction_type"  # of Stability AI's ModelSpec, which trainers write into the metadata
SPOKEN = {"epsilon": "epsilon", "eps": "epsilon", "v": "v_prediction", "v_prediction": "v_prediction"}
BASE_2 = 875_000  # training steps of Stable Diffusion 2's base, which predicts noise; a pickle tells them


def open_single(
    file: Path, variant: str | None, clean: str, allow_pickle: bool = False, say: Say = say_on_stderr
) -> Checkpoint:
    """The model in a file; of its weights nothing is read yet. Raises LDMError for what is no whole model."""
    files, found = look(file, allow_pickle)
    found.check_pipeline(file)
    averaged = wants_average(file, found, variant, say)
    tell(file, found, averaged, say)
    if files.passed_over:
        say(f"{file}: beside its tensors it holds {some(files.passed_over)}, which are passed over.")
    architecture = found.architecture
    prediction, doubt = said_of_prediction(found, files)
    schedulers = {each: found.predicting(each) for each in SPOKEN.values()}
    chosen = schedulers.get(prediction, architecture)
    configs = {part: found.configs[part] for part in NETWORKS if part in found.parts}
    configs["vae"] = VAEConfig.from_json(chosen.parts["vae"])
    texts = [part for part in ("text_encoder", "text_encoder_2") if part in configs]
    if not chosen.scheduler or len(architecture.pads) != len(texts):  # in metadata alone
        raise LDMError(f"{file}: its metadata lack a scheduler, or the padding of a tokenizer: take a sound copy.")
    tokenizers = {}
    for pad, part in zip(architecture.pads, texts, strict=True):
        name = part.replace("text_encoder", "tokenizer")
        tokenizers[name] = vocabulary.tokenizer(file, pad, configs[part], say, name, clean)
    low_res, zero_snr = chosen.low_res_scheduler, "ztsnr" in found.marks
    others = schedulers if "unet" in found.parts else {}

    def weights(name: str) -> Tensors:
        return Renamed(files, found.origins(name, ema=averaged and name == "unet"))

    checkpoint = Checkpoint(
        place=file,
        configs=configs,
        tokenizers=tokenizers,
        weights=weights,
        scheduler=read_scheduler(chosen.scheduler, zero_snr),
        defaults=defaults_of(found, file),
        low_res=None if low_res is None else ScheduleConfig.from_json(low_res),
        index=architecture.index,
        doubt=doubt,
        usual=usual(found),
        otherwise={
            said: (read_scheduler(each.scheduler, zero_snr), each.parts["unet"].get("sample_size"))
            for said, each in others.items()
        },
    )
    return checkpoint if prediction is None else checkpoint.predicting(prediction)


def find_schedule(file: Path, allow_pickle: bool = False, say: Say = say_on_stderr) -> tuple[ScheduleConfig, Defaults]:
    """What the model in a file is drawn by; neither its weights nor a tokenizer are asked for."""
    files, found = look(file, allow_pickle)
    found.check(file)
    if not found.backbone or ("transformer" in found.parts and not found.architecture.scheduler):
        raise LDMError(f"{file} is {found.reason}: no schedule is known of it; name a model that draws.")
    prediction, doubt = said_of_prediction(found, files)
    chosen = found.architecture if prediction is None else found.predicting(prediction)
    say(f"{file} is {found.reason}.")
    if doubt is not None:
        say(f"{file}: what it predicts isn't known ({doubt}); the levels are those of {chosen.title} ({chosen.name}).")
    config = read_scheduler(chosen.scheduler, "ztsnr" in found.marks)
    return (config if prediction is None else replace(config, prediction_type=prediction)), defaults_of(found, file)


def defaults_of(found: Found, file: Path) -> Defaults:
    """Steps and guidance: what the file's metadata say, else those of the family."""
    own = found.architecture.defaults
    return from_json(Defaults, own, {}, f"{file} (ldm)") if own else family_defaults(backbone_of(found.configs))


def open_part(
    file: Path, part: str, allow_pickle: bool = False, like: Any = None, say: Say = say_on_stderr
) -> tuple[Any, Tensors]:
    """The configuration and the tensors of one part, "controlnet" or "vae", that is alone in a file or one of several.

    `like`: the VAE whose place it is to take; its scaling factor counts where the file leaves it open.
    """
    files, found = look(file, allow_pickle)
    found.check(file)
    if part not in found.parts:
        raise LDMError(f"{file} is {found.reason}: there is no {part} in it; name a file that has one.")
    tell(file, found, False, say)
    config = found.configs[part]
    if part == "vae" and found.backbone:
        config = VAEConfig.from_json(found.architecture.parts["vae"])
    elif part == "vae" and like is not None and like.scaling_factor in found.scaling_factors:
        config = replace(config, scaling_factor=like.scaling_factor, shift_factor=like.shift_factor)
    return config, Renamed(files, found.origins(part))


def look(file: Path, allow_pickle: bool) -> tuple[WeightFiles, Found]:
    """A file's tensors, of which none is read yet, and what they are."""
    files = WeightFiles(file, allow_pickle)
    return files, recognise(files.entries, str(file), files.metadata)


def wants_average(file: Path, found: Found, variant: str | None, say: Say) -> bool:
    """Whether the moving averages are to be read. Raises LDMError if there are none."""
    if variant == "ema":
        if not found.has_ema:
            raise LDMError(
                f"{file} holds no moving averages of the weights (model_ema.*): leave the variant 'ema' out."
            )
        return True
    if variant is not None:
        say(f"{file}: variants are a folder's, and {variant!r} is passed over; a single file's only one is 'ema'.")
    return False


def tell(file: Path, found: Found, averaged: bool, say: Say) -> None:
    """What it is and why, and what of it is not read."""
    say(f"{file} is {found.reason}.")
    for what, why, names in found.passed_over:
        if not (averaged and what.startswith("moving averages")):
            count = "1 tensor is" if len(names) == 1 else f"{len(names)} tensors are"
            say(f"{file}: {count} passed over, {what} ({some(names, 2)}): {why}.")
    if averaged:
        say(f"{file}: the UNet's moving averages are taken instead of its weights.")


def said_of_prediction(found: Found, files: WeightFiles) -> tuple[str | None, str | None]:
    """The prediction type that something in the file says, or None and why nothing does."""
    if "transformer" in found.parts:
        return "flow", None
    if found.own:
        return found.architecture.scheduler.get("prediction_type", "epsilon"), None
    if "v_pred" in found.marks:
        return "v_prediction", None
    told = files.metadata.get(MODELSPEC)
    if told is not None and told.lower() in SPOKEN:
        return SPOKEN[told.lower()], None
    if files.scalars.get("global_step") == BASE_2 and len(predictions(found)) > 1:
        return "epsilon", None
    if found.architecture.name in ("x4-upscaler", "sdxl-refiner"):  # published once, and never answer to pure noise
        return predictions(found)[0], None
    return None, "neither its metadata nor a mark among its keys says it"


def predictions(found: Found) -> list[str]:
    """What the schedulers of all that it can be say."""
    return list(dict.fromkeys(each.scheduler.get("prediction_type", "epsilon") for each in found.candidates))


def usual(found: Found) -> str:
    """Why the architecture's prediction type is the likely one; "" if it isn't."""
    return "that of every published model of its kind" if len(predictions(found)) == 1 else ""


def read_scheduler(fields: Mapping[str, Any], zero_snr: bool) -> ScheduleConfig:
    """`zero_snr`: the model was trained down to pure noise (Lin et al. 2023), as the mark "ztsnr" says."""
    fields = dict(fields)
    if zero_snr:
        fields["rescale_betas_zero_snr"] = True
        if fields.get("_class_name") == "PNDMScheduler":  # which cannot begin without any signal
            fields.pop("skip_prk_steps", None)
            fields["_class_name"] = "DDIMScheduler"
    return ScheduleConfig.from_json(fields)
