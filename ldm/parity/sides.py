"""A side of a comparison: what turns prompts into ids, and the networks, each with the module to look into.

Ours are the parts of a `Pipeline`; a port is a person's own file:

    def load(folder, device, dtype):          # all it must have; it returns an object or a dict with any of
        tokenizer(prompts)                    #   a list of texts -> ids (B, 77), int64
        text_encoder(ids)                     #   -> (context (B, 77, D), pooled (B, P) or None)
        vae_encode(image)                     #   (B, 3, H, W) in [-1, 1] -> means (B, 4, h, w), at the UNet's scale
        vae_decode(x0)                        #   (B, 4, h, w) at the UNet's scale -> (B, 3, H, W), about [-1, 1]
        unet(x, t, context, extras)           #   -> (B, 4, h, w); extras is a dict: SDXL's pooled and time_ids
        transformer(x, t, context, extras)    #   FLUX's, of latents, not of patches; extras: pooled, guidance
        unet_module, text_encoder_module, vae_module      # nn.Modules, to be walked where names are the checkpoint's
"""

import importlib.util
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ldm.errors import LDMError, nearest
from ldm.models.controlnet import ControlNet
from ldm.models.unet import Extras
from ldm.pipeline import Pipeline
from ldm.text.clip import TextEncoder
from ldm.text.t5 import T5Encoder
from ldm.text.tokenizer import Tokenizer


def same_name(name: str) -> str:
    return name


@dataclass(frozen=True)
class Part:
    """A network: `run` gives its outputs by name; `module` is what it is made of; `rename` gives our names for its.

    `retell` makes of a module's `Call`, under our name, what ours would be given and give.
    """

    run: Callable[..., dict[str, Tensor]]
    module: nn.Module | None = None
    rename: Callable[[str], str | None] = same_name
    retell: Callable[[str, Any], None] | None = None


@dataclass(frozen=True)
class Side:
    """Tokenizers and networks by name. `own` is whatever its pipelines are made of."""

    name: str
    tokenizers: dict[str, Callable[[list[str]], Tensor]]
    parts: dict[str, Part]
    own: Any = field(default=None, repr=False)


# ---------------------------------------------------------------------------------------------------- ours


def ours(pipe: Pipeline, net: ControlNet | None = None, for_port: bool = False) -> Side:
    """Our side: the parts of a pipeline, and a ControlNet. A port's VAE gives means, diffusers' a sample."""
    is_xl = pipe.xl
    one, two = ("_2", "") if is_xl and pipe.text_encoder_2 is None else ("", "_2")  # a refiner has SDXL's second alone
    tokenizers = {f"tokenizer{one}": pipe.tokenizer, f"tokenizer{two}": pipe.tokenizer_2}
    texts = {f"text_encoder{one}": pipe.text_encoder, f"text_encoder{two}": pipe.text_encoder_2}
    parts = {name: text(encoder, is_xl) for name, encoder in texts.items() if encoder is not None}
    if for_port:
        parts["vae_encode"] = Part(lambda image, noise: {"x0": pipe.vae.encode(image)}, pipe.vae)
    else:
        parts["vae_encode"] = Part(lambda image, noise: {"a sample of x0": pipe.vae.encode(image, noise)}, pipe.vae)
    parts["vae_decode"] = Part(lambda x0: {"image": pipe.vae.decode(x0)}, pipe.vae)
    parts["transformer" if pipe.flux else "unet"] = Part(
        lambda x, t, context, extras: {"output": pipe.backbone(x, t, context, Extras(**extras))}, pipe.backbone
    )
    if net is not None:
        parts["controlnet"] = Part(lambda *given: residuals(net, *given), net)
    return Side("ldm", {n: reader(each) for n, each in tokenizers.items() if each is not None}, parts, (pipe, net))


def reader(tokenizer: Tokenizer) -> Callable[[list[str]], Tensor]:
    return lambda prompts: tokenizer(prompts).ids


def text(encoder: TextEncoder | T5Encoder, is_xl: bool) -> Part:
    if isinstance(encoder, T5Encoder):
        return Part(lambda ids: {"context": encoder.context(ids)}, encoder)

    def run(ids: Tensor) -> dict[str, Tensor]:
        states = encoder(ids)
        context = states.hidden[-2] if is_xl else states.last  # what the UNet reads
        outputs = {"hidden states": torch.stack(states.hidden), "last, normed": states.last}
        return outputs | {"context": context, "pooled": states.pooled}

    return Part(run, encoder)


def residuals(
    net: ControlNet, x: Tensor, t: Tensor, context: Tensor, extras: dict[str, Tensor], picture: Tensor
) -> dict[str, Tensor]:
    skips, middle = net(x, t, context, net.condition(picture), Extras(**extras), scale=0.7)
    return {"to the skips": torch.cat([each.flatten(1) for each in skips], dim=1), "to the middle": middle}


# ---------------------------------------------------------------------------------------------------- a port

OFFERED = ("tokenizer", "text_encoder", "text_encoder_2", "vae_encode", "vae_decode", "unet", "transformer")
MODULES = {  # where the module of a function is looked for
    "text_encoder": "text_encoder_module",
    "text_encoder_2": "text_encoder_2_module",
    "vae_encode": "vae_module",
    "vae_decode": "vae_module",
    "unet": "unet_module",
    "transformer": "transformer_module",
}
MODULES_OF = tuple(dict.fromkeys(MODULES.values()))
RENAMES = {"text_encoder": TextEncoder.rename, "text_encoder_2": TextEncoder.rename}


def read_port(path: Path, folder: Path, dtype: torch.dtype, device: torch.device) -> Side:
    """A person's own port. Raises LDMError if the file cannot be read, or offers nothing."""
    if not path.is_file():
        raise LDMError(f"There is no port {path}: --against takes 'diffusers' or a Python file with load(folder, ...).")
    found = offers(run_port(path, folder, dtype, device))
    parts = {}
    for name in OFFERED[1:]:
        if name in found:
            inner = found.get(MODULES[name], found[name] if isinstance(found[name], nn.Module) else None)
            parts[name] = Part(SHAPES[name](found[name]), inner, RENAMES.get(name, same_name))
    tokenizers = {"tokenizer": lambda prompts: as_ids(found["tokenizer"](prompts))} if "tokenizer" in found else {}
    return Side(path.name, tokenizers, parts)


def run_port(path: Path, folder: Path, dtype: torch.dtype, device: torch.device) -> Any:
    """What the file's load(...) returns. What it imports may lie beside it."""
    spec = importlib.util.spec_from_file_location("port", path)
    module = importlib.util.module_from_spec(spec)
    beside = str(path.resolve().parent)
    sys.path.insert(0, beside)
    try:
        spec.loader.exec_module(module)
        if not callable(getattr(module, "load", None)):
            raise LDMError(f"The port {path} has no function load(folder, device, dtype): see `ldm parity --help`.")
        return module.load(folder, device, dtype)
    except LDMError:
        raise
    except Exception as error:
        why = " ".join(f"{type(error).__name__}: {error}".split())
        raise LDMError(f"The port {path} cannot be loaded ({why}): mend it.") from error
    finally:
        sys.path.remove(beside)


def offers(loaded: Any) -> dict[str, Any]:
    """The known names of an object or a dict. Raises LDMError for names in a dict that nothing would come of."""
    known = (*OFFERED, *MODULES_OF)
    found = loaded if isinstance(loaded, Mapping) else {name: getattr(loaded, name, None) for name in known}
    if unknown := [name for name in found if name not in known]:
        likely = nearest(str(unknown[0]), known)
        raise LDMError(f"The port offers {unknown[0]!r}, which is none of {', '.join(known)}.{likely}")
    found = {name: value for name, value in found.items() if value is not None}
    if not found.keys() & set(OFFERED):
        raise LDMError(f"The port's load(...) returned nothing to compare: any of {', '.join(OFFERED)}.")
    return found


def as_ids(ids: Any) -> Tensor:
    return torch.as_tensor(ids, dtype=torch.int64)


def of_text(function: Callable) -> Callable[..., dict[str, Tensor]]:
    def run(ids: Tensor) -> dict[str, Tensor]:
        found = function(ids)
        context, pooled = found if isinstance(found, tuple | list) else (found, None)
        return {"context": context} | ({} if pooled is None else {"pooled": pooled})

    return run


def of_means(function: Callable) -> Callable[..., dict[str, Tensor]]:
    return lambda image, noise: {"x0": function(image)}


def of_one(name: str) -> Callable[[Callable], Callable[..., dict[str, Tensor]]]:
    return lambda function: lambda *given: {name: function(*given)}


SHAPES = {
    "text_encoder": of_text,
    "text_encoder_2": of_text,
    "vae_encode": of_means,
    "vae_decode": of_one("image"),
    "unet": of_one("output"),
    "transformer": of_one("output"),
}
