"""What a model's files say beside its tensors: model_index.json, the scheduler's file, the metadata of a single file.

Our configurations read diffusers' JSON; here is the way back, so that what was read can be written anywhere, and read
again as the same.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from ldm.checkpoints.architectures import PUBLISHED
from ldm.checkpoints.checkpoint import Checkpoint, family_defaults, task_of_parts
from ldm.checkpoints.folder import FLUX, OPTIONAL, PARTS, PASSED_OVER, SECOND
from ldm.io.folders import PICKLES
from ldm.models.flux import FluxConfig
from ldm.models.unet import UNetConfig
from ldm.schedules.config import CLASSES, SOLVERS, ScheduleConfig
from ldm.settings import Defaults
from ldm.text.t5_tokenizer import T5Tokenizer
from ldm.text.tokenizer import Tokenizer

DIFFUSERS = "0.42.1"  # the version whose format this is
FLUXES = {"text": "FluxPipeline", "control": "FluxControlPipeline", "fill": "FluxFillPipeline"}  # by task, too
PIPELINES = {  # (task, whether it is SDXL) -> diffusers' class
    ("text", False): "StableDiffusionPipeline",
    ("inpaint", False): "StableDiffusionInpaintPipeline",
    ("edit", False): "StableDiffusionInstructPix2PixPipeline",
    ("depth", False): "StableDiffusionDepth2ImgPipeline",
    ("upscale", False): "StableDiffusionUpscalePipeline",
    ("text", True): "StableDiffusionXLPipeline",
    ("inpaint", True): "StableDiffusionXLInpaintPipeline",
    ("edit", True): "StableDiffusionXLInstructPix2PixPipeline",
}
REFINER = "StableDiffusionXLImg2ImgPipeline"
ABSENT = {  # what a class may have, and these models don't
    "StableDiffusionDepth2ImgPipeline": ("depth_estimator", "feature_extractor"),
    "StableDiffusionUpscalePipeline": ("feature_extractor", "safety_checker", "watermarker"),
    "StableDiffusionXLInstructPix2PixPipeline": (),
    REFINER: ("feature_extractor", "image_encoder", "text_encoder", "tokenizer"),
    "FluxControlPipeline": (),
    "FluxFillPipeline": (),
}
ABSENT_XL = ("feature_extractor", "image_encoder")  # of SDXL's others, and of FLUX
ABSENT_SD = ("feature_extractor", "image_encoder", "safety_checker")  # of all others

# ModelSpec's names of the published architectures, and one that it lacks and others use.
SPEC_NAMES = {
    "sd15": "stable-diffusion-v1",
    "sd15-inpaint": "stable-diffusion-v1-inpainting",
    "sd21": "stable-diffusion-v2-768-v",
    "sd21-base": "stable-diffusion-v2-512",
    "sdxl": "stable-diffusion-xl-v1-base",
    "sdxl-refiner": "stable-diffusion-xl-v1-refiner",
    "flux-dev": "Flux.1-dev",
    "flux-schnell": "Flux.1-schnell",
}
SPEC_WORDS = {"epsilon": "epsilon", "v_prediction": "v"}


# ---------------------------------------------------------------------------------------------------- a folder's


def model_index(model: Checkpoint, beside: Mapping[str, list] = {}) -> dict[str, Any]:
    """`model_index.json`: diffusers' class, remarks, and each part's library and class. `beside`: more parts."""
    name = pipeline_class(model)
    remarks = remarks_of(model)
    unet = model.configs.get("unet")
    absent = ABSENT.get(name, ABSENT_XL if unet is None or unet.is_xl else ABSENT_SD)
    if absent is ABSENT_SD:  # without it, the class would complain that it has no checker
        remarks["requires_safety_checker"] = False
    parts: dict[str, list] = {part: [None, None] for part in absent}
    parts["scheduler"] = ["diffusers", scheduler_fields(model.scheduler)["_class_name"]]
    if model.low_res is not None:
        parts["low_res_scheduler"] = ["diffusers", scheduler_fields(model.low_res)["_class_name"]]
    for part, tokenizer in model.tokenizers.items():
        parts[part] = ["transformers", "T5TokenizerFast" if isinstance(tokenizer, T5Tokenizer) else "CLIPTokenizer"]
    if unet is None and "text_encoder_2" not in model.configs:
        parts |= {"text_encoder_2": [None, None], "tokenizer_2": [None, None]}
    for part, config in model.configs.items():
        said = config.to_json()
        text = part.startswith("text_encoder")
        parts[part] = ["transformers", said["architectures"][0]] if text else ["diffusers", said["_class_name"]]
    return {"_class_name": name, "_diffusers_version": DIFFUSERS} | dict(
        sorted((remarks | parts | dict(beside)).items())
    )


def pipeline_class(model: Checkpoint) -> str:
    """The class that the model's own model_index.json named, or the one for its task in diffusers."""
    said = model.index.get("_class_name")
    if isinstance(said, str) and said.isidentifier():
        return said
    unet, task = model.configs.get("unet"), task_of_parts(model.configs) or "text"
    if unet is None:
        return FLUXES[task]
    if unet.is_xl and task == "text" and "text_encoder" not in model.configs:
        return REFINER
    if unet.time_cond_proj_dim is not None and task == "text" and not unet.is_xl:
        return "LatentConsistencyModelPipeline"  # diffusers' plain one would not tell its UNet the guidance
    return PIPELINES[task, unet.is_xl]


def remarks_of(model: Checkpoint) -> dict[str, Any]:
    """What model_index.json says beside the parts, such as `force_zeros_for_empty_prompt`.

    Numbers and words alone: a stranger's file could otherwise name a class to diffusers, which would import it.
    """
    parts = {*PARTS, *SECOND, *FLUX, *OPTIONAL, *PASSED_OVER}
    said = {name: said for name, said in model.index.items() if name not in parts and not name.startswith("_")}
    return {name: value for name, value in said.items() if isinstance(value, bool | int | float | str | None)}


def scheduler_fields(config: ScheduleConfig) -> dict[str, Any]:
    """`scheduler_config.json`, which `ScheduleConfig.from_json` reads as `config`: its class, and what it says."""
    found = (name for name, (rule, sampler, _) in CLASSES.items() if (rule, sampler) == (config.rule, config.sampler))
    name, more = next(found, ""), {}
    if config.sampler in ("plms", "pndm"):
        name, more = "PNDMScheduler", {"skip_prk_steps": config.sampler == "plms"}
    elif not name:
        name, more = solver_fields(config)
    # Where the file is silent, some classes have other values than the rest; so these are always written.
    always = {"num_train_timesteps"}
    if config.rule != "flow":
        always |= {"beta_start", "beta_end", "beta_schedule", "steps_offset", "prediction_type"}
    usual = {f.name: f.default for f in fields(ScheduleConfig)}
    said = {key: value for key, value in asdict(config).items() if key in always or value != usual[key]}
    if config.rule == "flow":  # whose classes know no other
        said = {key: value for key, value in said.items() if (key, value) != ("prediction_type", "flow")}
    said = {key: value for key, value in said.items() if key not in ("rule", "sampler")}
    return {"_class_name": name, "_diffusers_version": DIFFUSERS} | dict(sorted((said | more).items()))


def solver_fields(config: ScheduleConfig) -> tuple[str, dict[str, Any]]:
    """The class of a DPM-Solver, DEIS or UniPC, and the fields that say which one it is."""
    sampler, bh1 = config.sampler.removesuffix("-bh1"), config.sampler.endswith("-bh1")
    for (name, algorithm, order), known in SOLVERS.items():
        if known == sampler and CLASSES[name][0] == config.rule:
            more = {"solver_order": order} | ({"algorithm_type": algorithm} if algorithm else {})
            if name == "DPMSolverSinglestepScheduler":
                more["lower_order_final"] = True
            return name, more | ({"solver_type": "bh1"} if bh1 else {})
    raise ValueError(f"no class of diffusers has the rule {config.rule!r} and the sampler {config.sampler!r}")


def own_defaults(model: Checkpoint) -> dict[str, Any]:
    """`ldm.json`: what the model is best drawn with; {} where that is what its family is drawn with anyway."""
    if model.defaults == family_defaults(model.backbone):
        return {}
    usual = asdict(Defaults(steps=0, guidance=0.0))  # these two are always said
    return {name: value for name, value in asdict(model.defaults).items() if value != usual[name]}


# ---------------------------------------------------------------------------------------------------- a single file's


def metadata(configs: Mapping[str, Any], model: Checkpoint | None, title: str) -> dict[str, str]:
    """The metadata of a single file: all configurations, for ldm, and what it is, for everybody.

    `model` is None for one part alone. Texts by name, as safetensors has them.
    """
    own = {part: config.to_json() for part, config in configs.items()}
    control = configs.get("controlnet")
    names = "diffusers" if control is not None and control.is_xl else "sgm"  # whose the tensors' names are
    spec = {"modelspec.title": title, "modelspec.implementation": names}
    if model is not None:
        remarks = remarks_of(model)
        if isinstance(said := model.index.get("_class_name"), str):
            remarks["_class_name"] = said
        own |= {"scheduler": scheduler_fields(model.scheduler), "index": remarks}
        own["pads"] = [padding(tokenizer) for tokenizer in model.tokenizers.values()]
        if model.low_res is not None:
            own["low_res_scheduler"] = scheduler_fields(model.low_res)
        if defaults := own_defaults(model):
            own["ldm"] = defaults
        spec |= described(model)
    return {"ldm.config": json.dumps(own, separators=(",", ":"), allow_nan=False)} | spec


def described(model: Checkpoint) -> dict[str, str]:
    """What ModelSpec has names for: the architecture, if it is a published one; prediction type; size of pictures."""
    unet, vae = model.backbone, model.configs["vae"]
    said: dict[str, str] = {}
    if (name := published(unet, model.scheduler.prediction_type)) is not None:
        said |= {"modelspec.sai_model_spec": "1.0.0", "modelspec.architecture": name}
    if model.scheduler.prediction_type in SPEC_WORDS:
        said["modelspec.prediction_type"] = SPEC_WORDS[model.scheduler.prediction_type]
    side = getattr(unet, "sample_size", None)  # which FLUX's configuration doesn't say
    if side:
        side *= vae.factor
        said["modelspec.resolution"] = f"{side}x{side}"
    return said


def published(unet: UNetConfig | FluxConfig, prediction: str) -> str | None:
    """ModelSpec's name of the published architecture that has this network and predicts that, if there is one."""
    if isinstance(unet, FluxConfig):
        mine = (each for each in PUBLISHED if each.name in SPEC_NAMES and "transformer" in each.parts)
        known = (each.name for each in mine if FluxConfig.from_json(each.parts["transformer"]) == unet)
        return SPEC_NAMES.get(next(known, ""))
    idle = ("sample_size", "upcast_attention")  # of no shape
    mine = {name: value for name, value in asdict(unet).items() if name not in idle}
    for each in (each for each in PUBLISHED if "unet" in each.parts):
        theirs = asdict(UNetConfig.from_json(each.parts["unet"]))
        predicted = each.scheduler["prediction_type"]
        # Stable Diffusion 2 is published in two; of all others, fine-tuned ones may predict the other thing.
        same = predicted == prediction or each.name not in ("sd21", "sd21-base")
        if each.name in SPEC_NAMES and same and all(theirs[name] == value for name, value in mine.items()):
            return SPEC_NAMES[each.name]
    return None


def padding(tokenizer: Tokenizer | T5Tokenizer) -> str:
    """The token that a tokenizer pads with."""
    return next(token for token, id in tokenizer.ids.items() if id == tokenizer.pad_id)


def title_of(source: str | Path) -> str:
    """A model's name, from the path or address by which it was asked for."""
    name = str(source).replace("\\", "/").rstrip("/").rsplit("/", 1)[-1].split("@")[0]
    stem, dot, ending = name.rpartition(".")
    return (stem if dot + ending in (".safetensors", *PICKLES) else name) or "model"
