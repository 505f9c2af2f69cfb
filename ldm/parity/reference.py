"""diffusers and transformers as one side of a comparison: the only file that imports them, and only on use.

Their modules keep their own names, which are the checkpoint's; `Part.rename` maps what transformers calls otherwise.
"""

import inspect
import logging
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, wraps
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from ldm.checkpoints.architectures import Architecture
from ldm.checkpoints.folder import places_of_parts
from ldm.errors import LDMError
from ldm.io.folders import read_fields
from ldm.models.vae import VAE
from ldm.parity import flux
from ldm.parity.drawn import draw, give
from ldm.parity.sides import Part, Side
from ldm.text.clip import TextEncoder

NEEDED = 'the parity command needs them: python -m pip install -c constraints.txt -e ".[test]"'
TEXTS = ("text_encoder", "text_encoder_2")


def libraries() -> tuple[Any, Any]:
    """diffusers and transformers. Raises LDMError with what to install if they are not there."""
    try:
        import diffusers
        import transformers
    except ImportError as error:
        raise LDMError(
            f"diffusers and transformers cannot be imported ({error}); {NEEDED} (--against PORT.py needs neither)."
        ) from error
    return diffusers, transformers


def versions() -> dict[str, str]:
    return {library.__name__: library.__version__ for library in libraries()}


@contextmanager
def quiet(dtype: torch.dtype = torch.float32) -> Iterator[None]:
    """Without the libraries' warnings and bars; and what they make of bare numbers is of that dtype."""
    kept, before = logging.root.manager.disable, torch.get_default_dtype()
    bars = [each.utils.logging for each in libraries() if each.utils.logging.is_progress_bar_enabled()]
    logging.disable(logging.WARNING)
    for each in bars:
        each.disable_progress_bar()
    torch.set_default_dtype(dtype)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for each in bars:
            each.enable_progress_bar()
        logging.disable(kept)
        torch.set_default_dtype(before)


# ---------------------------------------------------------------------------------------------------- the two ways


def read(folder: Path, dtype: torch.dtype, device: torch.device, controlnet: Path | None = None) -> Side:
    """The reference of a model's folder, by its own loaders."""
    diffusers, transformers = libraries()
    index, place = read_fields(folder / "model_index.json"), places_of_parts(folder)
    parts, tokenizers = {}, {}
    with quiet():
        for name, entry in index.items():
            library, cls = entry if isinstance(entry, list) and len(entry) == 2 else (None, None)
            if name.startswith("tokenizer") and cls is not None:
                tokenizers[name] = tokenizer_class(cls).from_pretrained(place(name))
            elif name in (*TEXTS, "unet", "transformer", "vae") and cls is not None:
                kind = getattr({"diffusers": diffusers, "transformers": transformers}[library], cls)
                parts[name] = kind.from_pretrained(place(name), torch_dtype=dtype, **variant(place(name)))
        if controlnet is not None:
            kind = diffusers.ControlNetModel
            parts["controlnet"] = kind.from_pretrained(controlnet, torch_dtype=dtype, **variant(controlnet))
    parts = {name: part.to(device).eval().requires_grad_(False) for name, part in parts.items()}
    scheduler = read_fields(folder / "scheduler" / "scheduler_config.json", ("-Infinity",))
    return side(parts, tokenizers, scheduler, index)


def variant(folder: Path) -> dict[str, str]:
    """What `from_pretrained` must be told of a folder that holds nothing but a variant: fp16."""
    names = [path.name for path in folder.glob("*.safetensors")]
    found = {name.split(".")[1] for name in names if name.count(".") == 2}
    plain = any(name.count(".") == 1 for name in names)
    return {} if plain or len(found) != 1 else {"variant": found.pop().split("-")[0]}


def build(
    architecture: Architecture, dtype: torch.dtype, device: torch.device, vocabularies: dict[str, Path], seed: int = 0
) -> Side:
    """The reference of an architecture, with random weights; built without numbers, so that it exists once."""
    diffusers, transformers = libraries()
    parts = {}
    with quiet():
        for k, (name, fields) in enumerate(architecture.parts.items()):
            with torch.device("meta"):
                if name in TEXTS:
                    kind = getattr(transformers, fields["architectures"][0])
                    part = kind(kind.config_class(**fields))
                else:
                    part = getattr(diffusers, CLASSES[name]).from_config(fields)
            parts[name] = give(part, drawn(part, dtype, device, seed + k), device)
        tokenizers = {n: tokenizer_class(kind_of(path)).from_pretrained(path) for n, path in vocabularies.items()}
    return side(parts, tokenizers, architecture.scheduler, architecture.index)


CLASSES = {
    "unet": "UNet2DConditionModel",
    "transformer": "FluxTransformer2DModel",
    "vae": "AutoencoderKL",
    "controlnet": "ControlNetModel",
}


def drawn(part: nn.Module, dtype: torch.dtype, device: torch.device, seed: int) -> dict[str, Tensor]:
    """Random numbers for every parameter; T5's table of words has two names, and is one."""
    if hasattr(part, "shared"):
        part.encoder.embed_tokens = part.shared
    state = draw(part, dtype, device, seed)
    return state | ({"encoder.embed_tokens.weight": state["shared.weight"]} if "shared.weight" in state else {})


def kind_of(vocabulary: Path) -> str:
    """Whose vocabulary lies in a folder: CLIP's has a file of its own for its ids."""
    return "clip" if (vocabulary / "vocab.json").exists() else "t5"


def tokenizer_class(name: str) -> Any:
    """transformers' class of that name or kind: T5's, or CLIP's."""
    transformers = libraries()[1]
    return transformers.T5TokenizerFast if "t5" in name.lower() else transformers.CLIPTokenizer


def side(parts: dict[str, nn.Module], tokenizers: dict, scheduler: dict, index: dict) -> Side:
    """All of it as the walk wants it."""
    found = {name: PARTS[name](part) for name, part in parts.items() if name != "vae"}
    if "vae" in parts:
        found |= {"vae_encode": encoder(parts["vae"]), "vae_decode": decoder(parts["vae"])}
    own = {"parts": parts, "tokenizers": tokenizers, "scheduler": scheduler, "index": index}
    if "transformer" in parts:
        own["task"] = flux.task_of(parts["transformer"].config, parts["vae"].config)
    return Side("diffusers", {name: reader(each) for name, each in tokenizers.items()}, found, own)


def reader(tokenizer: Any) -> Callable[[list[str]], Tensor]:
    def read_prompts(prompts: list[str]) -> Tensor:
        length = min(tokenizer.model_max_length, 512 if "T5" in type(tokenizer).__name__ else 77)
        with quiet():
            padded = tokenizer(prompts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        return padded.input_ids

    return read_prompts


def text(module: nn.Module) -> Part:
    def run(ids: Tensor) -> dict[str, Tensor]:
        out = module(ids, output_hidden_states=True)
        pooled = out.text_embeds if "text_embeds" in out else out.pooler_output
        return {"hidden states": torch.stack(list(out.hidden_states)), "last, normed": out.last_hidden_state} | {
            "pooled": pooled
        }

    return Part(run, module, TextEncoder.rename)


def encoder(module: nn.Module) -> Part:
    def run(image: Tensor, noise: Tensor) -> dict[str, Tensor]:
        found = module.encode(image).latent_dist
        z = found.mean + found.std * noise
        return {"a sample of x0": (z - (module.config.shift_factor or 0.0)) * module.config.scaling_factor}

    return Part(run, module, VAE.rename)


def decoder(module: nn.Module) -> Part:
    def run(x0: Tensor) -> dict[str, Tensor]:
        z = x0 / module.config.scaling_factor + (module.config.shift_factor or 0.0)
        return {"image": module.decode(z).sample}

    return Part(run, module, VAE.rename)


def added(extras: dict[str, Tensor]) -> dict | None:
    return {"text_embeds": extras["pooled"], "time_ids": extras["time_ids"]} if "time_ids" in extras else None


def unet(module: nn.Module) -> Part:
    def run(x: Tensor, t: Tensor, context: Tensor, extras: dict[str, Tensor]) -> dict[str, Tensor]:
        labels = extras.get("class_labels")
        out = module(x, t, context, class_labels=labels, added_cond_kwargs=added(extras))
        return {"output": out.sample}

    return Part(run, module)


def controlnet(module: nn.Module) -> Part:
    def run(x: Tensor, t: Tensor, context: Tensor, extras: dict[str, Tensor], picture: Tensor) -> dict[str, Tensor]:
        out = module(x, t, context, picture, added_cond_kwargs=added(extras), conditioning_scale=0.7)
        skips = torch.cat([each.flatten(1) for each in out.down_block_res_samples], dim=1)
        return {"to the skips": skips, "to the middle": out.mid_block_res_sample}

    return Part(run, module)


def second_text(module: nn.Module) -> Part:
    return flux.t5(module) if hasattr(module, "shared") else text(module)


PARTS = {
    "text_encoder": text,
    "text_encoder_2": second_text,
    "unet": unet,
    "transformer": flux.transformer,
    "controlnet": controlnet,
}

# ---------------------------------------------------------------------------------------------------- schedulers


@cache
def in_float64(cls: type) -> type:
    """The same scheduler, compiled from its source with float32 replaced: diffusers calculates in it always.

    Noise is still drawn in float32, so that the stream is the same.
    """
    module = sys.modules[cls.__module__]
    twin = ModuleType(cls.__module__ + "_in_float64")
    twin.__package__, twin.__file__ = module.__package__, module.__file__
    sys.modules[twin.__name__] = twin
    exec(compile(inspect.getsource(module).replace("float32", "float64"), twin.__name__, "exec"), twin.__dict__)
    if hasattr(twin, "randn_tensor"):
        twin.randn_tensor = drawn_in_float32
    return twin.__dict__[cls.__name__]


def scheduler(fields: dict, cls: str, own: dict, dtype: torch.dtype) -> Any:
    """diffusers' scheduler `cls` over a model's own file; `own` fields are written over. No steps are set."""
    with quiet():
        kind = getattr(libraries()[0], cls)
        made = kind.from_config(fields, **own)
        if dtype != torch.float64:
            return made
        bars = getattr(made, "alphas_cumprod", None)
        made = in_float64(kind).from_config(fields, **own)
    if bars is not None:  # the betas keep the digits that training had
        made.alphas_cumprod = bars.double()
        if getattr(made, "final_alpha_cumprod", torch.ones(())) != 1:
            made.final_alpha_cumprod = made.alphas_cumprod[0]
    return made


def in_float32_digits(made: Any, fields: dict, cls: str) -> Any:
    """A flow scheduler in float64 whose levels have the digits that diffusers gives them, those of float32.

    `ldm` has them under `compat`; the steps are calculated in float64.
    """
    plain = scheduler(fields, cls, {}, torch.float32)
    own = made.set_timesteps

    @wraps(own)  # pipelines read its signature
    def set_timesteps(*args: object, **named: object) -> None:
        plain.set_timesteps(*args, **named)
        own(*args, **named)
        made.sigmas, made.timesteps = plain.sigmas.double(), plain.timesteps.double()

    made.set_timesteps = set_timesteps
    return made


def drawn_in_float32(shape: tuple, generator: Any = None, device: Any = None, dtype: Any = None, layout: Any = None):
    """diffusers' own function, which draws in the dtype of the model: in another dtype that is other noise."""
    from diffusers.utils.torch_utils import randn_tensor

    return randn_tensor(shape, generator=generator, device=device, dtype=torch.float32).to(dtype)


@contextmanager
def noise_of_float32(*places: Any) -> Iterator[None]:
    """In the modules where these objects' classes stand, noise is drawn in float32 and cast, as ours is."""
    import diffusers.models.autoencoders.vae as autoencoder

    modules = {autoencoder, *(sys.modules[type(place).__module__] for place in places)}
    kept = {module: module.randn_tensor for module in modules if hasattr(module, "randn_tensor")}
    for module in kept:
        module.randn_tensor = drawn_in_float32
    try:
        yield
    finally:
        for module, own in kept.items():
            module.randn_tensor = own


# ---------------------------------------------------------------------------------------------------- pipelines

WAYS = {  # what is drawn from: the classes of Stable Diffusion, and of SDXL, without and with a ControlNet
    "words": ("StableDiffusion", "Pipeline"),
    "image": ("StableDiffusion", "Img2ImgPipeline"),
    "inpaint": ("StableDiffusion", "InpaintPipeline"),
}


def pipeline(own: dict, way: str, made: Any, led: bool = False) -> Any:
    """diffusers' pipeline for a way of drawing, of parts that are there already; `made` is its scheduler."""
    parts, index = own["parts"], own["index"]
    with quiet():
        cls = getattr(libraries()[0], class_name(own, way, led))
    known = inspect.signature(cls.__init__).parameters
    given = {**dict.fromkeys((*TEXTS, "tokenizer", "tokenizer_2")), **parts, **own["tokenizers"], "scheduler": made}
    given |= {"safety_checker": None, "feature_extractor": None, "image_encoder": None, "add_watermarker": False}
    given |= {"requires_safety_checker": False}
    given |= {key: index[key] for key in ("force_zeros_for_empty_prompt", "requires_aesthetics_score") if key in index}
    with quiet():
        pipe = cls(**{key: value for key, value in given.items() if key in known})
    pipe.set_progress_bar_config(disable=True)
    return pipe


def class_name(own: dict, way: str, led: bool) -> str:
    """diffusers' class for a way of drawing with these parts."""
    parts = own["parts"]
    if "transformer" in parts:
        return flux.CLASSES[own["task"], way]
    name, end = WAYS[way]
    is_xl = parts["unet"].config.addition_embed_type == "text_time"
    return name + "XL" * is_xl + "ControlNet" * led + end


@contextmanager
def vae_in(dtype: torch.dtype, vae: nn.Module) -> Iterator[None]:
    """SDXL's pipelines cast their VAE to float32, which float64 and bfloat16 don't need: here it keeps its dtype.

    And FLUX's add its shift to the latents, where none is said as well: that is 0.
    """
    kept, shift = vae.config.force_upcast, vae.config.shift_factor
    vae.register_to_config(force_upcast=kept and dtype == torch.float16, shift_factor=shift or 0.0)
    try:
        yield
    finally:
        vae.register_to_config(force_upcast=kept, shift_factor=shift)


def run(pipe: Any, steps: int, request: dict, generators: list, dtype: torch.dtype) -> tuple[list[Tensor], Tensor]:
    """The latents after every call of the scheduler, and the pictures (B, H, W, 3) in whole grey levels."""
    found, whole = [], dtype if dtype == torch.float64 else torch.float32
    network = getattr(pipe, "transformer", None) or pipe.unet
    with quiet(whole), noise_of_float32(pipe), vae_in(dtype, pipe.vae), flux.exact_turns(network, dtype):
        images = pipe(
            **request,
            num_inference_steps=steps,
            generator=generators,
            output_type="np",
            callback_on_step_end=lambda pipe, i, t, tensors: found.append(tensors["latents"].clone()) or {},
        ).images
    return found, (torch.from_numpy(images) * 255).round().to(torch.uint8)
