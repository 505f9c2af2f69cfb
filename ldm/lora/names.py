"""What the tensors of a LoRA file are called: by every trainer otherwise, and all of them mean our layers.

A name has two halves, which trainers combine freely: the layer, and the factor that it ends in.

    lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight      kohya: the layer's dots are underscores
    lora_unet_input_blocks_1_1_proj_in.lora_down.weight                kohya, SDXL: the original name of the same layer
    unet.down_blocks.0.attentions.0.proj_in.lora_A.weight              diffusers, as PEFT names the factors
    unet.down_blocks.0.[...].attn1.processor.to_q_lora.down.weight     diffusers before PEFT: attention processors
    base_model.model.down_blocks.0.attentions.0.proj_in.lora_A.weight  PEFT by itself
    text_encoder.text_model.encoder.layers.0.mlp.fc1.lora_linear_layer.down.weight
    lora_te1_text_model_encoder_layers_0_mlp_fc1.hada_w1_a             LyCORIS

and of FLUX, whose original names mean several of our layers at once (`ldm.lora.flux`):

    lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight            kohya; T5's begin with lora_te3_
    transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight    diffusers, PEFT
    lora_transformer_transformer_blocks_0_attn_to_q.lora_down.weight   OneTrainer
    double_blocks.0.processor.qkv_lora1.down.weight                    XLabs
    double_blocks.0.img_attn.qkv.lora_A.weight, [...].key_norm.scale   the authors'; `scale` is a gain in whole
"""

import re
from typing import NamedTuple

from torch import nn

from ldm.checkpoints.names import origins
from ldm.lora import flux
from ldm.lora.flux import Target

UNET, TRANSFORMER, TEXT, TEXT_2 = "unet", "transformer", "text_encoder", "text_encoder_2"
WORDS = {UNET: "UNet", TRANSFORMER: "transformer", TEXT: "text encoder", TEXT_2: "second text encoder"}

NAME = r"(?:\.(?!weight$|bias$)[\w-]+)?"  # PEFT may leave the adapter's name in between: lora_A.default.weight
LEAVES = tuple(  # (what a name ends in, the form, the factor; "\1" is looked up in `SIDES`, and whose style it is)
    (re.compile(rf"(?P<layer>.+)\.{pattern}"), form, role, style)
    for pattern, form, role, style in (
        (r"lora_(down|up|mid)\.weight", "LoRA", r"\1", "kohya"),
        (rf"lora_(A|B){NAME}\.weight", "LoRA", r"\1", "PEFT"),
        (rf"lora_B{NAME}\.bias", "LoRA", "shift", "PEFT"),
        (r"lora(?:_linear_layer)?\.(down|up)\.weight", "LoRA", r"\1", "diffusers"),
        (rf"hada_(w[12]_[ab]|t[12]){NAME}", "LoHa", r"\1", "LyCORIS"),
        (rf"lokr_(w[12](?:_[ab])?|t2){NAME}", "LoKr", r"\1", "LyCORIS"),
        (r"(diff|diff_b|w_norm|b_norm)", "full", r"\1", "LyCORIS"),
        (r"alpha", "", "alpha", ""),
        (r"(?<=_norm\.)scale", "new", "new", "original"),
        (r"(?:(?<=norm_[qk]\.)|(?<=norm_added_[qk]\.))weight", "new", "new", "diffusers"),
    )
)
SIDES = {"A": "down", "B": "up"}
XLABS = re.compile(
    r"(?P<block>(.+\.)?(double|single)_blocks\.\d+)\.processor\."
    r"(?P<module>(qkv|proj)_lora[12]?)\.(?P<role>down|up)\.weight"
)
OLD = re.compile(r"(?P<layer>.+)\.(?P<module>to_q|to_k|to_v|to_out)_lora\.(?P<role>down\.weight|up\.weight|alpha)")
OLD_MODULES = {  # what an attention processor's layer is called, in the UNet and in a text encoder
    "to_q": ("to_q", "q_proj"),
    "to_k": ("to_k", "k_proj"),
    "to_v": ("to_v", "v_proj"),
    "to_out": ("to_out.0", "out_proj"),
}

PREFIXES = (  # how a layer's name says which network is meant
    ("lora_unet_", UNET),  # or FLUX's transformer
    ("lora_unet.", UNET),
    ("lora_te1_", TEXT),
    ("lora_te2_", TEXT_2),
    ("lora_te3_", TEXT_2),  # T5, which is the second of FLUX
    ("lora_te_", TEXT),
    ("lora_transformer_", TRANSFORMER),
    ("unet.", UNET),
    ("transformer.", TRANSFORMER),
    ("text_encoder_2.", TEXT_2),
    ("text_encoder.", TEXT),
    ("model.diffusion_model.", UNET),  # ComfyUI's, which says the original names
    ("diffusion_model.", UNET),
    ("text_encoders.clip_l.transformer.", TEXT),
    ("text_encoders.clip_g.transformer.", TEXT_2),
    ("text_encoders.t5xxl.transformer.", TEXT_2),
    ("lycoris_", ""),  # of one network, and it doesn't say which
    ("", ""),
)
OWN = (  # a layer's first words, where no prefix says whose it is
    (TRANSFORMER, re.compile(flux.LAYER.pattern.replace("_", "[._]"))),
    (UNET, re.compile(r"(down_blocks|mid_block|up_blocks|conv_in|conv_out|time_embedding|add_embedding|input_blocks|"
                      r"middle_block|output_blocks|time_embed|label_emb)[._].+|conv_in|conv_out")),
    (TEXT, re.compile(r"(text_model|encoder[._]layers)[._].+|text_projection")),
)  # fmt: skip

TAKE = "take a LoRA, a LoHa or a LoKr"
OTHER_FORMS = tuple(  # what a factor's name tells of forms that aren't implemented
    (re.compile(pattern), what)
    for pattern, what in (
        (r"(.+\.)?(dora_scale|lora_magnitude_vector(\..+)?)", "a DoRA, which also scales each row of a weight"),
        (r"lora_controlnet", "a Control-LoRA, a ControlNet made of a UNet"),
        (r".+\.(oft_(blocks|diag|R|r|S|s)|boft_\w+)(\..+)?", "an OFT or BOFT, which rotates weights"),
        (r".+\.(ia3_l(\..+)?|on_input)", "an IA3, which scales activations"),
        (r".+\.(a1|a2|b1|b2|bm1|bm2)\.weight", "a GLoRA"),
        (r".+\.lora_embedding_[AB](\..+)?", "a LoRA of a token embedding"),
        (r".+\.(lora_E|vera_lambda_[bd]|hra_u|ln_tuning_layers)(\..+)?", "a kin of LoRA (AdaLoRA, VeRA, HRA)"),
    )
)
OTHER_MODELS = tuple(  # what a layer's name tells of other models
    (re.compile(pattern), what)
    for pattern, what in (
        (r"(.+[._])?(double_stream_modulation_(img|txt)|single_stream_modulation|time_guidance_embed)[._].+", "FLUX.2"),
        (r"(.+[._])?distilled_guidance_layer[._].+", "Chroma"),
        (r"(.+[._])?joint_(transformer_)?blocks[._].+|text_encoder_3\..+", "Stable Diffusion 3"),
        (r"(lora_|lycoris_)?(transformer[._])?transformer_blocks[._]\d+[._](attn[12]|(img|txt)_(mlp|mod))[._].+",
         "a diffusion transformer (Qwen-Image, LTX or another)"),
        (r"(.+[._])?(motion_modules|temp_convs|temporal_transformer|time_stack)[._].+", "video (AnimateDiff)"),
        (r"(lora_prior_|prior[._]|lora_unet_down_blocks_\d+_\d+_channelwise).+", "Stable Cascade or Kandinsky"),
        (r"(lora_)?transformer[._](layers|blocks)[._].+", "a diffusion transformer (CogVideoX, Lumina or another)"),
        (r"(lora_unet_|diffusion_model\.|model\.diffusion_model\.)(layers|blocks|transformer_blocks)[._].+",
         "a diffusion transformer (Wan, Z-Image or another)"),
        (r"(lora_|first_stage_model|vae)[._]?(encoder|decoder)[._].+", "a VAE"),
    )
)  # fmt: skip


class Name(NamedTuple):
    """A tensor's name taken apart: network, layer (as the file calls it), form, factor and whose style it is."""

    part: str
    layer: str
    form: str
    role: str
    style: str


def other_form(key: str) -> str | None:
    """What a tensor's name tells of a form that isn't implemented, in words."""
    return next((what for pattern, what in OTHER_FORMS if pattern.fullmatch(key)), None)


def other_model(key: str) -> str | None:
    """What a tensor's name tells of a model that isn't ours, in words."""
    return next((what for pattern, what in OTHER_MODELS if pattern.fullmatch(key)), None)


def parse(key: str) -> Name | None:
    """A tensor's name taken apart; None if it is no factor's, or the layer is of no network of ours."""
    if old := OLD.fullmatch(key):
        part, layer = whose(old["layer"].removesuffix(".processor"))
        layer = f"{layer}.{OLD_MODULES[old['module']][part != UNET]}"
        return Name(part, layer, "LoRA", old["role"].removesuffix(".weight"), "processors") if part else None
    if own := XLABS.fullmatch(key):
        part, layer = whose(f"{own['block']}.{own['module']}")
        return Name(part, layer, "LoRA", own["role"], "XLabs")
    for pattern, form, role, style in LEAVES:
        if found := pattern.fullmatch(key):
            part, layer = whose(found["layer"].replace(".processor.", "."))
            role = found[2] if role == r"\1" else role
            return Name(part, layer, form, SIDES.get(role, role), style) if part else None
    return None


def whose(layer: str) -> tuple[str, str]:
    """A layer's name in the file -> the network ("" if it doesn't say) and the layer's name in it."""
    layer = layer.removeprefix("base_model.model.")
    prefix, part = next(each for each in PREFIXES if layer.startswith(each[0]))
    layer = layer.removeprefix(prefix).removeprefix("base_model.model.")
    if part == UNET and flux.LAYER.fullmatch(flattened(layer)):
        return TRANSFORMER, layer
    return part or next((own for own, pattern in OWN if pattern.fullmatch(layer)), ""), layer


def flattened(name: str) -> str:
    """kohya's spelling, in which a dot is an underscore: what all styles have in common."""
    return name.replace(".", "_")


def names_ours(part: str, network: nn.Module) -> dict[str, str]:
    """Every name, flattened, that a file may call a layer of this network -> our name of it."""
    ours = {key.rpartition(".")[0] for key, _ in network.named_parameters()}
    ours |= {name for name, module in network.named_modules() if hasattr(type(module), "weight")}  # quantised
    found = {flattened(name): name for name in ours}
    if part in (TEXT, TEXT_2):  # transformers 5 took the outer `text_model` away
        found |= {flattened(f"text_model.{name}"): name for name in ours}
    return found


def names_original(part: str, network: nn.Module) -> dict[str, str]:
    """The same of the original names of a UNet's layers, which kohya's SDXL trainer and ComfyUI write."""
    if part != UNET:
        return {}
    keys = origins(part, network.config, "")
    return {flattened(origin.name.rpartition(".")[0]): key.rpartition(".")[0] for key, origin in keys.items()}


def targets_original(part: str, network: nn.Module) -> dict[str, tuple[Target, ...]]:
    """Which of our layers an original name means, flattened: one of a UNet's, of FLUX's one or several."""
    if part == TRANSFORMER:
        return {flattened(name): targets for name, targets in flux.named(network.config).items()}
    return {name: (Target(ours),) for name, ours in names_original(part, network).items()}


def is_original(layer: str) -> bool:
    """Whether a layer's name is one of CompVis' and Stability AI's, or of FLUX's authors'."""
    words = ("input_blocks", "middle_block", "output_blocks", "time_embed_0", "time_embed_2", "label_emb", "out_")
    return flattened(layer).startswith(words) or flux.ORIGINAL.fullmatch(flattened(layer)) is not None
