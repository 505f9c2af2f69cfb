"""Original names: where each tensor of ours lies in a file of CompVis, Stability AI or OpenCLIP.

Our names are those of diffusers' folders. The older files hold the same numbers under the names of the authors' own
modules, in which the blocks of a network are counted through and its layers numbered. The table, from ours to theirs;
l is a level, i a layer, n the layers of a level on the way down (2; on the way up there is one more):

    UNet, below model.diffusion_model.       ControlNet, below control_model.
        conv_in                              input_blocks.0.0
        down_blocks.l.resnets.i              input_blocks.{1 + l(n+1) + i}.0
        down_blocks.l.attentions.i           input_blocks.{1 + l(n+1) + i}.1
        down_blocks.l.downsamplers.0.conv    input_blocks.{1 + l(n+1) + n}.0.op
        mid_block.resnets.i, .attentions.0   middle_block.{2i}, middle_block.1
        up_blocks.l.resnets.i                output_blocks.{l(n+1) + i}.0
        up_blocks.l.attentions.i             output_blocks.{l(n+1) + i}.1
        up_blocks.l.upsamplers.0.conv        output_blocks.{l(n+1) + n}.{2, without attention 1}.conv
        a ResNet block's norm1, conv1, time_emb_proj, norm2, conv2, conv_shortcut
                                             in_layers.0, in_layers.2, emb_layers.1, out_layers.0, out_layers.3,
                                             skip_connection
        controlnet_cond_embedding            input_hint_block.0, .2, .4, ... (between them the activations)
        controlnet_down_blocks.i             zero_convs.i.0
    VAE, below first_stage_model.
        encoder.down_blocks.l.resnets.i      encoder.down.l.block.i
        decoder.up_blocks.l.resnets.i        decoder.up.{top - l}.block.i: theirs counts from the finest level
        mid_block.resnets.i, .attentions.0   mid.block_{i+1}, mid.attn_1, with 1x1 convolutions for q, k, v, proj_out
        conv_shortcut, conv_norm_out         nin_shortcut, norm_out
    CLIP's text tower, below conditioner.embedders.0.transformer. or cond_stage_model.transformer.
        as transformers names it, that is as we do, inside text_model.
    OpenCLIP's text tower, below conditioner.embedders.1.model. (the refiner's: .0.) or cond_stage_model.model.
        encoder.layers.i                     transformer.resblocks.i
        self_attn.q_proj, k_proj, v_proj     attn.in_proj_weight, in_proj_bias: one tensor, the three under each other
        text_projection.weight               text_projection, transposed: there it multiplies from the right
    FLUX's transformer, below model.diffusion_model. or nothing: `flux_names`. T5, as transformers names it, that is as
    we do, below text_encoders.t5xxl.transformer., where a FLUX.1 has all its parts in one file.

Only this direction is written out; reading a file inverts it.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from types import MappingProxyType
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ldm.checkpoints import flux_names
from ldm.io.weights import blank
from ldm.models.controlnet import ControlNet, ControlNetConfig
from ldm.models.flux import Flux, FluxConfig
from ldm.models.unet import UNet, UNetConfig
from ldm.models.vae import VAE, VAEConfig
from ldm.text.clip import TextConfig, TextEncoder
from ldm.text.t5 import T5Config, T5Encoder

if TYPE_CHECKING:
    from ldm.io.headers import Entry
    from ldm.io.weights import Tensors

Config = UNetConfig | FluxConfig | VAEConfig | TextConfig | T5Config | ControlNetConfig
Shape = tuple[int, ...]

CLASSES = {  # the network of each configuration
    UNetConfig: UNet,
    FluxConfig: Flux,
    VAEConfig: VAE,
    ControlNetConfig: ControlNet,
    TextConfig: TextEncoder,
    T5Config: T5Encoder,
}
UNET, FIRST_STAGE, CONTROL, EMA = "model.diffusion_model.", "first_stage_model.", "control_model.", "model_ema."
CLIP_1, OPENCLIP_2 = "cond_stage_model.transformer.text_model.", "cond_stage_model.model."
CLIP_XL, OPENCLIP_XL = "conditioner.embedders.0.transformer.text_model.", "conditioner.embedders.1.model."
OPENCLIP_REFINER = "conditioner.embedders.0.model."
COMFY_CLIP, COMFY_T5 = "text_encoders.clip_l.transformer.text_model.", "text_encoders.t5xxl.transformer."
COMFY_VAE = "vae."  # ComfyUI's, and with it FLUX's in one file with all parts
SHARES = {  # of one tensor's rows, cut into so many equal pieces, this is from which to which one is ours
    **{name: (i, i + 1, 3) for i, name in enumerate("qkv")},
    **{f"{name} of 7": (i, i + 1, 7) for i, name in enumerate("qkv")},
    "mlp of 7": (3, 7, 7),
}


@dataclass(frozen=True)
class Origin:
    """Where one tensor of ours lies in an original file.

    `form`: "same"; "conv", our matrix (O, I) as a 1x1 convolution (O, I, 1, 1); "transposed"; "swapped", with the two
    halves of its rows exchanged; or one of `SHARES`: "q", "k", "v", a third of the rows of one tensor.
    """

    name: str
    form: str = "same"

    def stored(self, shape: Shape) -> Shape:
        """The shape in the file, of a tensor that has `shape` with us; for a share, that of the whole."""
        if self.form == "conv":
            return (*shape, 1, 1)
        if self.form == "transposed":
            return shape[::-1]
        if self.form in SHARES:
            first, last, pieces = SHARES[self.form]
            return (shape[0] * pieces // (last - first), *shape[1:])
        return shape

    def shape(self, stored: Shape) -> Shape:
        """The shape with us, of a tensor that has `stored` in the file; a shape that cannot be meant is left as it is.

        A matrix is a "conv" too: some programs write the VAE's attention so.
        """
        if self.form == "conv":
            return stored[:2] if stored[2:] == (1, 1) else stored
        if self.form == "transposed":
            return stored[::-1]
        first, last, pieces = SHARES.get(self.form, (0, 1, 1))
        cut = stored and stored[0] % pieces == 0
        return (stored[0] // pieces * (last - first), *stored[1:]) if cut else stored

    def take(self, tensor: Tensor) -> Tensor:
        """Ours out of the file's: a view, but for a "swapped" one. Raises ValueError for what cannot be meant."""
        if self.form == "conv":
            return tensor.reshape(self.shape(tuple(tensor.shape)))
        if self.form == "transposed":
            return tensor.t()
        if self.form == "swapped":
            return swapped(tensor)
        if self.form in SHARES:
            first, last, pieces = SHARES[self.form]
            if tensor.ndim == 0 or len(tensor) % pieces:
                raise ValueError(f"{self.name} of shape {tuple(tensor.shape)} can't be cut into {pieces}")
            one = len(tensor) // pieces
            return tensor[first * one : last * one]
        return tensor


def swapped(tensor: Tensor) -> Tensor:
    """With the two halves of its rows exchanged."""
    return torch.cat(tensor.chunk(2)[::-1])


def origins(part: str, config: Config, prefix: str, layout: str = "original") -> dict[str, Origin]:
    """Every key of the part's state dict -> where a file keeps it, below `prefix`.

    `part`: "unet", "transformer", "vae", "text_encoder", "text_encoder_2" or "controlnet". `layout`: "original";
    "diffusers", our own names; "diffusers-old", those in which the VAE's attention says query, key, value and
    proj_attn. An original text tower is T5's if its configuration is, CLIP's if the prefix ends in "transformer." (very
    old files) or "text_model.", OpenCLIP's otherwise.
    """
    return dict(_origins(part, config, prefix, layout))


@lru_cache(maxsize=128)  # a file is compared with a dozen architectures, and so is the next one
def _origins(part: str, config: Config, prefix: str, layout: str) -> dict[str, Origin]:
    keys = shapes(part, config)
    if layout == "diffusers-old":
        return {key: Origin(prefix + _old(key)) for key in keys}
    if (
        layout == "diffusers"
        or isinstance(config, T5Config)
        or (part.startswith("text_encoder") and prefix.endswith(("transformer.", "text_model.")))
    ):
        outer = prefix.removesuffix("text_model.")  # the projection is transformers' outer model's
        return {key: Origin((outer if key.startswith("text_projection") else prefix) + key) for key in keys}
    translate = {"unet": _unet, "controlnet": _unet, "vae": _vae, "transformer": _flux}.get(part, _openclip)
    found = {key: translate(key, config) for key in keys}
    return {key: replace(origin, name=prefix + origin.name) for key, origin in found.items()}


@lru_cache(maxsize=128)
def shapes(part: str, config: Config) -> Mapping[str, Shape]:
    """Every key of the part's state dict -> its shape. Takes up to a second for a full-size network, the first time."""
    with blank():
        model = CLASSES[type(config)](config)
    return MappingProxyType({key: tuple(tensor.shape) for key, tensor in model.state_dict().items()})


def prefixes(configs: Mapping[str, Config]) -> dict[str, str]:
    """Under which prefix the original single file of such a model keeps each part."""
    found = {"unet": UNET, "vae": FIRST_STAGE, "controlnet": CONTROL, "text_encoder": CLIP_1}
    if "transformer" in configs:
        found |= {"transformer": UNET, "vae": COMFY_VAE, "text_encoder": COMFY_CLIP, "text_encoder_2": COMFY_T5}
    elif "text_encoder_2" in configs:
        found |= {"text_encoder": CLIP_XL, "text_encoder_2": OPENCLIP_XL}
        if "text_encoder" not in configs:
            found["text_encoder_2"] = OPENCLIP_REFINER
    elif "text_encoder" in configs and configs["text_encoder"].hidden_act == "gelu":  # OpenCLIP's, as in SD 2
        found["text_encoder"] = OPENCLIP_2
    return {part: found[part] for part in configs}


def averaged(origin: Origin) -> Origin:
    """Where the moving average (EMA) of the same tensor lies: its name without dots, for a buffer's can't have any."""
    return replace(origin, name=EMA + origin.name.removeprefix("model.").replace(".", ""))


def to_original(tensors: Mapping[str, Tensor], origins: Mapping[str, Origin]) -> dict[str, Tensor]:
    """Our tensors under their original names and in their original shapes: views, but for those joined or swapped."""
    found: dict[str, Tensor] = {}
    shares: dict[str, dict[int, Tensor]] = {}
    for key, tensor in tensors.items():
        origin = origins[key]
        if origin.form in SHARES:
            shares.setdefault(origin.name, {})[SHARES[origin.form][0]] = tensor
        elif origin.form == "swapped":
            found[origin.name] = swapped(tensor)
        elif origin.form == "transposed":
            found[origin.name] = tensor.t()
        else:
            found[origin.name] = tensor.reshape(origin.stored(tuple(tensor.shape)))
    return found | {name: torch.cat([parts[first] for first in sorted(parts)]) for name, parts in shares.items()}


class Renamed:
    """One part of a file under our names and in our shapes, for `load_weights`. What the file lacks, this lacks."""

    def __init__(self, source: "Tensors", origins: Mapping[str, Origin]):
        self.source = source
        self.place = source.place
        self.origins = {key: origin for key, origin in origins.items() if origin.name in source.entries}
        self.entries: dict[str, Entry] = {}
        for key, origin in self.origins.items():
            entry = source.entries[origin.name]
            self.entries[key] = entry._replace(name=key, shape=origin.shape(entry.shape))

    def read(self, name: str) -> Tensor:
        """That tensor: a window on the file; copy what you keep."""
        origin = self.origins[name]
        return origin.take(self.source.read(origin.name))


# ------------------------------------------------------------------------------------------- the table, ours -> theirs

UNET_NAMES = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "time_embedding.cond_proj": "time_embed.cond_proj",
    "class_embedding": "label_emb",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "controlnet_mid_block": "middle_block_out.0",
}
RESNET_NAMES = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
VAE_NAMES = {  # of the last words; what isn't here stays
    "conv_norm_out": "norm_out",
    "conv_shortcut": "nin_shortcut",
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
    "downsamplers.0.conv": "downsample.conv",
    "upsamplers.0.conv": "upsample.conv",
}
OPENCLIP_NAMES = {
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm.weight": "ln_final.weight",
    "final_layer_norm.bias": "ln_final.bias",
}
RESBLOCK_NAMES = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "self_attn.out_proj": "attn.out_proj",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}
OLD_NAMES = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


def _unet(key: str, config: UNetConfig | ControlNetConfig) -> Origin:
    module, leaf = key.rsplit(".", 1)
    blocks = config.layers_per_block + 1  # of a level, in their count: its resampling is one on the way down
    if module in UNET_NAMES:
        place = UNET_NAMES[module]
    elif found := re.fullmatch(r"down_blocks\.(\d+)\.(\w+)\.(\d+)\.(.+)", module):
        level, kind, i, rest = int(found[1]), found[2], int(found[3]), found[4]
        if kind == "downsamplers":
            place = f"input_blocks.{1 + level * blocks + blocks - 1}.0.op"
        else:
            place = f"input_blocks.{1 + level * blocks + i}.{_layer(kind, rest)}"
    elif found := re.fullmatch(r"up_blocks\.(\d+)\.(\w+)\.(\d+)\.(.+)", module):
        level, kind, i, rest = int(found[1]), found[2], int(found[3]), found[4]
        if kind == "upsamplers":
            behind = 2 if config.up_block_types[level].startswith("CrossAttn") else 1
            place = f"output_blocks.{level * blocks + blocks - 1}.{behind}.conv"
        else:
            place = f"output_blocks.{level * blocks + i}.{_layer(kind, rest)}"
    elif found := re.fullmatch(r"mid_block\.(\w+)\.(\d+)\.(.+)", module):
        kind, i, rest = found[1], int(found[2]), found[3]
        # _layer says 0 for a ResNet block, 1 for an attention; here the three stand in one list.
        place = f"middle_block.{2 * i if kind == 'resnets' else 1}.{_layer(kind, rest).split('.', 1)[1]}"
    else:
        place = _control(module, config)
    return Origin(f"{place}.{leaf}")


def _layer(kind: str, rest: str) -> str:
    return f"0.{RESNET_NAMES[rest]}" if kind == "resnets" else f"1.{rest}"


def _control(module: str, config: ControlNetConfig) -> str:
    """What a ControlNet has beside the encoder."""
    kind, rest = module.split(".", 1)
    if kind == "controlnet_down_blocks":
        return f"zero_convs.{rest}.0"
    last = 2 * (len(config.conditioning_embedding_out_channels) - 1) + 1
    i = {"conv_in": 0, "conv_out": last}.get(rest)
    i = 1 + int(rest.removeprefix("blocks.")) if i is None else i
    return f"input_hint_block.{2 * i}"  # every second one is a SiLU


def _vae(key: str, config: VAEConfig) -> Origin:
    top = len(config.block_out_channels) - 1
    name = re.sub(r"down_blocks\.(\d+)\.", r"down.\1.", key)
    name = re.sub(r"up_blocks\.(\d+)\.", lambda found: f"up.{top - int(found[1])}.", name)
    name = re.sub(r"mid_block\.resnets\.(\d+)", lambda found: f"mid.block_{int(found[1]) + 1}", name)
    name = name.replace("mid_block.attentions.0", "mid.attn_1").replace(".resnets.", ".block.")
    attention = re.search(r"\.attn_1\.(?!group_norm)", name) is not None
    module, leaf = name.rsplit(".", 1)
    for ours, theirs in VAE_NAMES.items():
        if module.endswith("." + ours):
            module = module.removesuffix(ours) + theirs
            break
    return Origin(f"{module}.{leaf}", "conv" if attention and leaf == "weight" else "same")


def _openclip(key: str, config: TextConfig) -> Origin:
    if key == "text_projection.weight":
        return Origin("text_projection", "transposed")
    if key in OPENCLIP_NAMES:
        return Origin(OPENCLIP_NAMES[key])
    _, _, layer, rest = key.split(".", 3)  # encoder.layers.3.mlp.fc1.weight
    module, leaf = rest.rsplit(".", 1)
    if third := re.fullmatch(r"self_attn\.([qkv])_proj", module):
        return Origin(f"transformer.resblocks.{layer}.attn.in_proj_{leaf}", third[1])
    return Origin(f"transformer.resblocks.{layer}.{RESBLOCK_NAMES[module]}.{leaf}")


def _flux(key: str, config: FluxConfig) -> Origin:
    return Origin(*flux_names.original(key))


def _old(key: str) -> str:
    for new, old in OLD_NAMES.items():
        key = key.replace(f".attentions.0.{new}.", f".attentions.0.{old}.")
    return key
