"""diffusers and transformers as one side of a comparison: the only file that imports them, and only on use.

Their modules keep their own names, which are the checkpoint's; `Part.rename` maps what transformers calls otherwise.
"""

import inspect
import logging
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from ldm.checkpoints.architectures import Architecture
from ldm.errors import LDMError
from ldm.io.folders import read_fields
from ldm.models.vae import VAE
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
    index = read_fields(folder / "model_index.json")
    parts, tokenizers = {}, {}
    with quiet():
        for name, entry in index.items():
            library, cls = entry if isinstance(entry, list) and len(entry) == 2 else (None, None)
            if name.startswith("tokenizer") and cls is not None:
                tokenizers[name] = transformers.CLIPTokenizer.from_pretrained(folder / name)
            elif name in (*TEXTS, "unet", "vae") and cls is not None:
                kind = getattr({"diffusers": diffusers, "transformers": transformers}[library], cls)
                parts[name] = kind.from_pretrained(folder / name, torch_dtype=dtype, **variant(folder / name))
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
                    part = kind(transformers.CLIPTextConfig(**fields))
                else:
                    classes = {"unet": "UNet2DConditionModel", "vae": "AutoencoderKL", "controlnet": "ControlNetModel"}
                    part = getattr(diffusers, classes[name]).from_config(fields)
            parts[name] = give(part, draw(part, dtype, device, seed + k), device)
        tokenizers = {n: transformers.CLIPTokenizer.from_pretrained(path) for n, path in vocabularies.items()}
    return side(parts, tokenizers, architecture.scheduler, architecture.index)


def side(parts: dict[str, nn.Module], tokenizers: dict, scheduler: dict, index: dict) -> Side:
    """All of it as the walk wants it."""
    found = {name: PARTS[name](part) for name, part in parts.items() if name != "vae"}
    if "vae" in parts:
        found |= {"vae_encode": encoder(parts["vae"]), "vae_decode": decoder(parts["vae"])}
    own = {"parts": parts, "tokenizers": tokenizers, "scheduler": scheduler, "index": index}
    return Side("diffusers", {name: reader(each) for name, each in tokenizers.items()}, found, own)


def reader(tokenizer: Any) -> Callable[[list[str]], Tensor]:
    def read_prompts(prompts: list[str]) -> Tensor:
        length = min(tokenizer.model_max_length, 77)
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


PARTS = {"text_encoder": text, "text_encoder_2": text, "unet": unet, "controlnet": controlnet}

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
    is_xl = parts["unet"].config.addition_embed_type == "text_time"
    name, end = WAYS[way]
    with quiet():
        cls = getattr(libraries()[0], name + "XL" * is_xl + "ControlNet" * led + end)
    known = inspect.signature(cls.__init__).parameters
    given = {**dict.fromkeys((*TEXTS, "tokenizer", "tokenizer_2")), **parts, **own["tokenizers"], "scheduler": made}
    given |= {"safety_checker": None, "feature_extractor": None, "image_encoder": None, "add_watermarker": False}
    given |= {"requires_safety_checker": False}
    given |= {key: index[key] for key in ("force_zeros_for_empty_prompt", "requires_aesthetics_score") if key in index}
    with quiet():
        pipe = cls(**{key: value for key, value in given.items() if key in known})
    pipe.set_progress_bar_config(disable=True)
    return pipe


@contextmanager
def vae_in(dtype: torch.dtype, vae: nn.Module) -> Iterator[None]:
    """SDXL's pipelines cast their VAE to float32, which float64 and bfloat16 don't need: here it keeps its dtype."""
    kept = vae.config.force_upcast
    vae.register_to_config(force_upcast=kept and dtype == torch.float16)
    try:
        yield
    finally:
        vae.register_to_config(force_upcast=kept)


def run(pipe: Any, steps: int, request: dict, generators: list, dtype: torch.dtype) -> tuple[list[Tensor], Tensor]:
    """The latents after every call of the scheduler, and the pictures (B, H, W, 3) in whole grey levels."""
    found, whole = [], dtype if dtype == torch.float64 else torch.float32
    with quiet(whole), noise_of_float32(pipe), vae_in(dtype, pipe.vae):
        images = pipe(
            **request,
            num_inference_steps=steps,
            generator=generators,
            output_type="np",
            callback_on_step_end=lambda pipe, i, t, tensors: found.append(tensors["latents"].clone()) or {},
        ).images
    return found, (torch.from_numpy(images) * 255).round().to(torch.uint8)
