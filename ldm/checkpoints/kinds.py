"""Tensors that tell: of files that are something else, and of what lies beside a model and takes no part in drawing."""

import re
from collections.abc import Iterable
from functools import lru_cache

from ldm.io.headers import MOST_TENSORS, Entry

TABLES = (  # of the noise schedule, which is computed from its few numbers
    r"betas|alphas_cumprod(_prev)?|sqrt_alphas_cumprod|sqrt_one_minus_alphas_cumprod|log_one_minus_alphas_cumprod|"
    r"sqrt_recip_alphas_cumprod|sqrt_recipm1_alphas_cumprod|posterior_variance|posterior_log_variance_clipped|"
    r"posterior_mean_coef[12]|lvlb_weights|logvar"
)
CLIP = r"(cond_stage_model|conditioner\.embedders\.\d+|text_encoders\.clip_l)\.(transformer\.|model\.)?"
TEXT = rf"{CLIP}(text_model\.)?"

PASSED_OVER = tuple(
    (re.compile(pattern), what, why)
    for pattern, what, why in (
        (r"model_ema\.(decay|num_updates)", "counters of moving averages", "training alone reads them"),
        (r"model_ema\..+", "moving averages of the weights (EMA)", 'variant "ema" reads them instead of the weights'),
        (
            TABLES + r"|(denoiser\.(weighting\.)?|model\.|model_sampling\.)(log_)?sigmas",
            "tables of the noise schedule",
            "they are computed from its configuration",
        ),
        (rf"low_scale_model\.({TABLES})", "tables of the small picture's noise", "they are computed as well"),
        (r".*\bembeddings\.position_ids", "position numbers", "they are 0, 1, 2 and so on"),
        (r"text_encoders\.t5xxl\.logit_scale", "a number of T5's", "it has no use there"),
        (
            r"text_encoders\.t5xxl\.transformer\.encoder\.embed_tokens\.weight",
            "T5's words once more",
            "they are shared",
        ),
        (rf"({TEXT})?logit_scale", "CLIP's temperature", "only its training reads it"),
        (
            TEXT + r"text_projection(\.weight)?",
            "CLIP's projection",
            "this model reads no pooled vector of that encoder",
        ),
        (
            CLIP + r"(vision_model\..+|visual\..+|visual_projection(\.weight)?)",
            "CLIP's half for pictures",
            "a prompt is read by the other half",
        ),
        (rf"({TEXT})?attn_mask", "CLIP's mask", "it is computed"),
        (r"depth_model\..+", "the depth estimator (MiDaS)", "in this layout it isn't read: give the depth itself"),
        (r"(first_stage_model\.)?loss\..+", "the VAE's losses (discriminator, LPIPS)", "training alone reads them"),
        (r"v_pred|ztsnr", "marks of the prediction type", "their names say it all"),
        (r"edm_(mean|std)|edm_vpred\.sigma_(min|max)", "marks of EDM's levels of noise", "they have no other use"),
    )
)

EDM = "its levels of noise are those of EDM, which ldm doesn't implement: take a model of the usual schedule"
REFUSED = {"edm_mean": EDM, "edm_vpred.sigma_max": EDM}  # marks of models that we don't know to draw with

NO_SUCH = "ldm draws with Stable Diffusion 1, 2 and XL and FLUX.1: take a model of these"
FLOATS = "take float16, bfloat16 or float32 weights"
NETWORKS = (  # kind, what it is, what to do, and a pattern of keys of which one is enough; whatever else is there
    ("flux2", "a FLUX.2", NO_SUCH, r"(model\.diffusion_model\.|transformer\.)?double_stream_modulation_img\..+"),
    ("chroma", "a Chroma", NO_SUCH, r"(model\.diffusion_model\.|transformer\.)?distilled_guidance_layer\..+"),
    ("flux-controlnet", "a ControlNet of FLUX",
     "load_controlnet reads its diffusers folder, which has the configuration beside it",
     r"controlnet_(x_embedder|blocks\.0|single_blocks\.0)\.(weight|bias)|controlnet_mode_embedder\.weight"),
    ("flux-ip", "an IP-Adapter of FLUX", "ldm doesn't read these: take FLUX.1 Canny or Depth, or a ControlNet",
     r"double_blocks\.\d+\.processor\.ip_adapter.+"),
    ("sd3", "a Stable Diffusion 3", NO_SUCH, r"(model\.diffusion_model\.)?joint_blocks\.0\..+"),
    ("cascade", "a Stable Cascade", NO_SUCH, r"clip_txt_mapper\.weight|down_blocks\.1\.0\.channelwise\.0\.weight"),
    ("unclip", "an unCLIP, which draws from a picture's vector", NO_SUCH,
     r"(noise_augmentor|embedder\.model\.visual)\..+"),
    ("video", "a network for video", NO_SUCH,
     r"(.+\.)?(time_stack|time_mixer|motion_modules|temp_convs|temporal_transformer)\..+|"
     r"(model\.(diffusion_model\.)?)?double_blocks\.0\.img_attn_qkv\..+"),
    ("brushnet", "a BrushNet", "ldm doesn't read these: take a model for inpainting",
     r"brushnet_(down_blocks|mid_block|up_blocks)\..+"),
    ("gligen", "a GLIGEN, which is told boxes", NO_SUCH, r".+\.transformer_blocks\.\d+\.fuser\..+"),
    ("dit", "a diffusion transformer (DiT, PixArt or another)", NO_SUCH,
     r"(model\.diffusion_model\.)?((transformer_)?blocks\.0\.(adaLN_modulation\.1\.weight|scale_shift_table)|"
     r"layers\.0\.adaLN_modulation\..+)"),
)  # fmt: skip
FILES = (  # the same, of files without a UNet or a VAE
    ("controlnet-lora", "a Control-LoRA", "take the whole ControlNet", r"lora_controlnet"),
    ("lora", "a LoRA", "it is a change to a model and not a model: add it to one (--lora)",
     r"lora_(unet|te\d?)_.+|"
     r".+\.(lora_(A|B|up|down|a|b)|lora\.(up|down)|hada_w[12]_[ab]|lokr_w[12](_[ab])?|oft_blocks)(\.[\w-]+)*"),
    ("lllite", "a ControlNet-LLLite", "ldm doesn't read these: take the whole ControlNet", r"lllite_unet_.+"),
    ("hypernetwork", "a hypernetwork", "ldm doesn't read these: take a LoRA",
     r"\d+\.[01]\.linear\.\d+\.(weight|bias)"),
    ("embedding", "an embedding (textual inversion)", "it is a word and not a model: teach it to one (--embedding)",
     r"string_to_param\..+|emb_params|<.+>|clip_[lg]"),
    ("ip-adapter", "an IP-Adapter", "ldm doesn't read these: take a ControlNet or a T2I-Adapter",
     r"(image_proj|ip_adapter)\..+"),
    ("adapter", "a T2I-Adapter", "load_controlnet reads its diffusers folder, which has the configuration beside it",
     r"(adapter\.)?body\.0\.(resnets\.0\.)?block1\.weight"),
    ("t5", "a T5 text encoder", "it is a part of FLUX.1: take FLUX's folder, which holds one with its tokenizer",
     r"encoder\.block\.0\.layer\.0\.SelfAttention\.q\.weight"),
    ("enlarger", "an enlarging network (ESRGAN)", "ldm doesn't read these: take the x4 upscaler",
     r"(model\.1\.sub\.0|body\.0|RRDB_trunk\.0)\.(RDB|rdb)1\..+"),
    ("safety", "a safety checker", "ldm takes no part of it: name a model", r"concept_embeds"),
    ("vision", "an image encoder (CLIP)", "drawing needs none: name a model", r"(vision_model|visual)\..+"),
    ("taesd", "a TAESD, a small network in place of the VAE", "ldm doesn't read these: take a whole VAE",
     r"(taesd_)?((encoder|decoder)\.(layers\.)?)?\d+\.conv\.[024]\.(weight|bias)"),
    ("wrapped", "a training's file, whose weights lie below a state_dict", "save these alone, without that word",
     r"state_dict\..+"),
    ("training", "the state of a training", "it is not a model: take the weights that were saved beside it",
     r"optimizer(_states)?\..+|(state\..+\.)?exp_avg(_sq)?(\..+)?"),
)  # fmt: skip


@lru_cache(maxsize=MOST_TENSORS)  # a file is compared with a dozen architectures, which leave over the same names
def beside(name: str) -> tuple[str, str] | None:
    """(what it is, why it is passed over) of a tensor that lies beside a model and takes no part in drawing."""
    return next(((what, why) for pattern, what, why in PASSED_OVER if pattern.fullmatch(name)), None)


def other_kind(keys: Iterable[str], model: bool) -> tuple[str, str, str] | None:
    """(kind, what it is, what to do) if a key tells that it is none of ours. `model`: a network that draws is there."""
    for kind, what, advice, pattern in NETWORKS if model else (*NETWORKS, *FILES):
        matches = re.compile(pattern).fullmatch
        if name := next((name for name in keys if matches(name)), None):
            return kind, f"{what}, by its tensor {name[:100]!r}", advice
    return None


def quantised(entries: Iterable[Entry]) -> str:
    """Why these weights aren't read, if one is stored as something else than a float; else nothing."""
    whole = next((each for each in entries if each.dtype not in ("F64", "F32", "F16", "BF16")), None)
    return "" if whole is None else f"it is quantised ({whole.name} is {whole.dtype}): {FLOATS}"
