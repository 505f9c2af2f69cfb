"""The published models' configurations, which original files don't hold, and `--random-init` builds; and tiny ones.

Facts of the config.json files in the folders of Stable Diffusion 1.5 and its inpainting model, InstructPix2Pix, Stable
Diffusion 2.1, 2.1 base, 2 inpainting, 2 depth, the x4 upscaler, SDXL base 1.0, its refiner, inpainting model and
InstructPix2Pix, the first ControlNet for edges of SD 1.5 and the one of SDXL; FLUX.1-dev and -schnell, FLUX.1 Fill,
and FLUX.1 Canny and Depth, which are alike.
"""

from dataclasses import dataclass, field, replace

from ldm.errors import LDMError, nearest
from ldm.models.unet import CROSS_DOWN, CROSS_UP, DOWN, UP
from ldm.models.vae import VAEConfig

END = "<|endoftext|>"

CLIP_L = {  # OpenAI's text tower: Stable Diffusion 1, and the first of SDXL
    "architectures": ["CLIPTextModel"],
    "hidden_act": "quick_gelu",
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "projection_dim": 768,
    "layer_norm_eps": 1e-5,
    "max_position_embeddings": 77,
    "vocab_size": 49408,
    "bos_token_id": 0,
    "eos_token_id": 2,  # as published: the end of a prompt is its largest id
    "pad_token_id": 1,
}
CLIP_H = CLIP_L | {  # OpenCLIP's, without its last layer: Stable Diffusion 2
    "hidden_act": "gelu",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_attention_heads": 16,
    "num_hidden_layers": 23,
    "projection_dim": 512,
}
CLIP_G = CLIP_L | {  # OpenCLIP's, with its projection: the second of SDXL
    "architectures": ["CLIPTextModelWithProjection"],
    "hidden_act": "gelu",
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_attention_heads": 20,
    "num_hidden_layers": 32,
    "projection_dim": 1280,
}
UNET = {
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": [320, 640, 1280, 1280],
    "down_block_types": [CROSS_DOWN, CROSS_DOWN, CROSS_DOWN, DOWN],
    "up_block_types": [UP, CROSS_UP, CROSS_UP, CROSS_UP],
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "norm_eps": 1e-5,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
}
UNET_1 = UNET | {"attention_head_dim": 8, "cross_attention_dim": 768, "sample_size": 64}
UNET_2 = UNET | {
    "attention_head_dim": [5, 10, 20, 20],
    "cross_attention_dim": 1024,
    "sample_size": 96,
    "use_linear_projection": True,
}
UNET_XL = UNET | {
    "attention_head_dim": [5, 10, 20],
    "block_out_channels": [320, 640, 1280],
    "down_block_types": [DOWN, CROSS_DOWN, CROSS_DOWN],
    "up_block_types": [CROSS_UP, CROSS_UP, UP],
    "transformer_layers_per_block": [1, 2, 10],
    "cross_attention_dim": 2048,
    "sample_size": 128,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 6 * 256 + 1280,
}
UNET_REFINER = UNET_XL | {
    "attention_head_dim": [6, 12, 24, 24],
    "block_out_channels": [384, 768, 1536, 1536],
    "down_block_types": [DOWN, CROSS_DOWN, CROSS_DOWN, DOWN],
    "up_block_types": [UP, CROSS_UP, CROSS_UP, UP],
    "transformer_layers_per_block": 4,
    "cross_attention_dim": 1280,
    "projection_class_embeddings_input_dim": 5 * 256 + 1280,
}
VAE = {
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "latent_channels": 4,
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "sample_size": 512,
    "scaling_factor": VAEConfig.scaling_factor,
}
VAE_XL = VAE | {"sample_size": 1024, "scaling_factor": 0.13025, "force_upcast": True}
UNET_UPSCALER = UNET_2 | {  # reads a small picture with some noise beside the latent, and is told how much of it
    "attention_head_dim": 8,
    "block_out_channels": [256, 512, 512, 1024],
    "down_block_types": [DOWN, CROSS_DOWN, CROSS_DOWN, CROSS_DOWN],
    "up_block_types": [CROSS_UP, CROSS_UP, CROSS_UP, UP],
    "only_cross_attention": [True, True, True, False],
    "in_channels": 7,
    "num_class_embeds": 1000,
    "sample_size": 128,
}
VAE_UPSCALER = VAE | {  # a latent stands for four pixels
    "block_out_channels": [128, 256, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 3,
    "up_block_types": ["UpDecoderBlock2D"] * 3,
    "sample_size": 256,
    "scaling_factor": 0.08333,
}
T5_XXL = {  # FLUX's second text encoder: the half of T5 1.1 XXL that reads
    "architectures": ["T5EncoderModel"],
    "d_model": 4096,
    "d_kv": 64,
    "d_ff": 10240,
    "num_heads": 64,
    "num_layers": 24,
    "num_decoder_layers": 24,
    "relative_attention_num_buckets": 32,
    "relative_attention_max_distance": 128,
    "feed_forward_proj": "gated-gelu",
    "layer_norm_epsilon": 1e-6,
    "vocab_size": 32128,
}
FLUX = {
    "in_channels": 64,  # four positions of the latent's 16 channels
    "num_layers": 19,
    "num_single_layers": 38,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 768,
    "guidance_embeds": False,
    "axes_dims_rope": [16, 56, 56],
}
VAE_FLUX = VAE | {
    "latent_channels": 16,
    "sample_size": 1024,
    "scaling_factor": 0.3611,
    "shift_factor": 0.1159,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}
LED = {"conditioning_embedding_out_channels": [16, 32, 96, 256]}

BETAS = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "steps_offset": 1,
}
PNDM = {
    "_class_name": "PNDMScheduler",
    "skip_prk_steps": True,
    "set_alpha_to_one": False,
    "prediction_type": "epsilon",
} | BETAS
DDIM = {
    "_class_name": "DDIMScheduler",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "prediction_type": "v_prediction",
} | BETAS
EULER_ANCESTRAL = {"_class_name": "EulerAncestralDiscreteScheduler", "prediction_type": "epsilon"} | BETAS
EULER = {"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "leading", "prediction_type": "epsilon"} | BETAS
FLOW = {
    "_class_name": "FlowMatchEulerDiscreteScheduler",
    "num_train_timesteps": 1000,
    "base_shift": 0.5,
    "max_shift": 1.15,
    "base_image_seq_len": 256,
    "max_image_seq_len": 4096,
}
FLOW_DEV = FLOW | {"shift": 3.0, "use_dynamic_shifting": True}
FLOW_SCHNELL = FLOW | {"shift": 1.0, "use_dynamic_shifting": False}
UPSCALER_BETAS = BETAS | {"beta_start": 0.0001, "beta_end": 0.02}


@dataclass(frozen=True)
class Architecture:
    """Configurations by part, as their JSON files hold them: `parts` are named as a model's folders are.

    `pads`: the padding token of each tokenizer; `index`: what the pipeline's model_index.json says beside the parts;
    `low_res_scheduler`: an upscaler's, of the noise on its small picture. `title`: in a sentence, "a ...". `defaults`:
    what its `ldm.json` says of steps and guidance.
    """

    name: str
    parts: dict[str, dict]
    scheduler: dict
    pads: tuple[str, ...] = (END,)
    index: dict = field(default_factory=dict)
    low_res_scheduler: dict | None = None
    title: str = ""
    defaults: dict = field(default_factory=dict)

    def with_unet(self, name: str, title: str = "", **fields: object) -> "Architecture":
        """With another UNet, or another transformer."""
        backbone = "transformer" if "transformer" in self.parts else "unet"
        parts = self.parts | {backbone: self.parts[backbone] | fields}
        return replace(self, name=name, parts=parts, title=title or self.title)

    def led(self, name: str, **fields: object) -> "Architecture":
        """With a ControlNet that copies the UNet's encoder."""
        only_unet = ("up_block_types", "sample_size", "out_channels")
        net = {key: value for key, value in self.parts["unet"].items() if key not in only_unet}
        return replace(self, name=name, parts=self.parts | {"controlnet": net | LED | fields})


SD15 = Architecture("sd15", {"text_encoder": CLIP_L, "unet": UNET_1, "vae": VAE}, PNDM, title="Stable Diffusion 1")
SD21 = Architecture(
    "sd21", {"text_encoder": CLIP_H, "unet": UNET_2, "vae": VAE}, DDIM, ("!",), title="Stable Diffusion 2"
)
SD21_BASE = replace(SD21.with_unet("sd21-base", sample_size=64), scheduler=PNDM)
UPSCALER = Architecture(
    "x4-upscaler",
    {"text_encoder": CLIP_H, "unet": UNET_UPSCALER, "vae": VAE_UPSCALER},
    DDIM | UPSCALER_BETAS,
    ("!",),
    {"max_noise_level": 350},
    {"_class_name": "DDPMScheduler", "clip_sample": True, "prediction_type": "epsilon"} | UPSCALER_BETAS,
    "Stable Diffusion x4 upscaler",
)
SDXL = Architecture(
    "sdxl",
    {"text_encoder": CLIP_L, "text_encoder_2": CLIP_G, "unet": UNET_XL, "vae": VAE_XL},
    EULER,
    (END, "!"),
    {"force_zeros_for_empty_prompt": True},
    title="Stable Diffusion XL base",
)
REFINER = Architecture(
    "sdxl-refiner",
    {"text_encoder_2": CLIP_G, "unet": UNET_REFINER, "vae": VAE_XL},
    EULER,
    ("!",),
    {"force_zeros_for_empty_prompt": False, "requires_aesthetics_score": True},
    title="Stable Diffusion XL refiner",
)
FLUX_SCHNELL = Architecture(
    "flux-schnell",
    {"text_encoder": CLIP_L, "text_encoder_2": T5_XXL, "transformer": FLUX, "vae": VAE_FLUX},
    FLOW_SCHNELL,
    (END, "<pad>"),
    title="FLUX.1-schnell",
)
FLUX_DEV = replace(FLUX_SCHNELL.with_unet("flux-dev", "FLUX.1-dev", guidance_embeds=True), scheduler=FLOW_DEV)
FLUX_FILL = FLUX_DEV.with_unet("flux-fill", "FLUX.1 Fill", in_channels=384, out_channels=64)
FLUX_CONTROL = FLUX_DEV.with_unet("flux-canny", "FLUX.1 Canny or Depth", in_channels=128, out_channels=64)

SMALL_TEXT = {"hidden_size": 24, "intermediate_size": 52, "num_hidden_layers": 3, "num_attention_heads": 3}
SMALL_UNET = {  # widths and heads differ from level to level, so that a mix-up of levels shows
    "block_out_channels": [8, 16, 24],
    "down_block_types": [CROSS_DOWN, CROSS_DOWN, DOWN],
    "up_block_types": [UP, CROSS_UP, CROSS_UP],
    "layers_per_block": 2,
    "norm_num_groups": 4,
    "sample_size": 8,
    "cross_attention_dim": 24,
}
SMALL_VAE = {"block_out_channels": [8, 8, 16, 16], "norm_num_groups": 4, "layers_per_block": 1, "sample_size": 64}
SMALL_LED = {"conditioning_embedding_out_channels": [4, 6, 10, 12]}


def small(big: Architecture, name: str, unet: dict, *texts: dict) -> Architecture:
    """The same architecture, some ten thousand parameters large."""
    names = [part for part in big.parts if part.startswith("text_encoder")]
    fields = {part: big.parts[part] | SMALL_TEXT | text for part, text in zip(names, texts, strict=True)}
    fields |= {"unet": big.parts["unet"] | SMALL_UNET | unet, "vae": big.parts["vae"] | SMALL_VAE}
    return replace(big, name=name, parts=fields)


THREE_XL = {
    "attention_head_dim": [2, 4, 3],
    "addition_time_embed_dim": 6,
    "transformer_layers_per_block": [1, 2, 3],
} | {
    "down_block_types": [DOWN, CROSS_DOWN, CROSS_DOWN],
    "up_block_types": [CROSS_UP, CROSS_UP, UP],
}
TINY_SD15 = small(SD15, "tiny-sd15", {"attention_head_dim": 2}, {})
TINY_SD21 = small(SD21, "tiny-sd21", {"attention_head_dim": [2, 4, 3]}, {})
TINY_SDXL = small(
    SDXL,
    "tiny-sdxl",
    THREE_XL | {"cross_attention_dim": 24 + 16, "projection_class_embeddings_input_dim": 6 * 6 + 10},
    {},
    {"hidden_size": 16, "num_attention_heads": 2, "projection_dim": 10},
)
TINY_REFINER = small(
    REFINER,
    "tiny-refiner",
    THREE_XL | {"cross_attention_dim": 24, "projection_class_embeddings_input_dim": 5 * 6 + 10},
    {"projection_dim": 10},
)

SMALL_T5 = {"d_model": 20, "d_kv": 6, "d_ff": 28, "num_heads": 3, "num_layers": 3, "num_decoder_layers": 3}
SMALL_FLUX = {
    "in_channels": 64,
    "num_layers": 2,
    "num_single_layers": 3,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 20,
    "pooled_projection_dim": 24,
    "axes_dims_rope": [4, 6, 6],
}


def small_flux(big: Architecture, name: str) -> Architecture:
    """The same FLUX, some hundred thousand parameters large; T5's words are most of them."""
    channels = {key: value for key, value in big.parts["transformer"].items() if key.endswith("_channels")}
    small = {
        "text_encoder": big.parts["text_encoder"] | SMALL_TEXT,
        "text_encoder_2": big.parts["text_encoder_2"] | SMALL_T5,
        "transformer": big.parts["transformer"] | SMALL_FLUX | channels,
        "vae": big.parts["vae"] | SMALL_VAE,
    }
    return replace(big, name=name, parts=small)


TINY_FLUX = small_flux(FLUX_DEV, "tiny-flux")

SD15_EDIT = SD15.with_unet("sd15-edit", "InstructPix2Pix of Stable Diffusion 1", in_channels=8)
PUBLISHED = (  # in the order in which a file is compared with them: of two of the same shapes, the first
    SD15,
    SD15.with_unet("sd15-inpaint", "Stable Diffusion 1 for inpainting", in_channels=9),
    replace(SD15_EDIT, scheduler=EULER_ANCESTRAL),
    SD21,
    SD21_BASE,
    SD21_BASE.with_unet("sd2-inpaint", "Stable Diffusion 2 for inpainting", in_channels=9),
    SD21_BASE.with_unet("sd2-depth", "Stable Diffusion 2 for depth", in_channels=5),
    UPSCALER,
    SDXL,
    SDXL.with_unet("sdxl-inpaint", "Stable Diffusion XL for inpainting", in_channels=9),
    SDXL.with_unet("sdxl-edit", "InstructPix2Pix of Stable Diffusion XL", in_channels=8),
    REFINER,
    FLUX_DEV,
    FLUX_SCHNELL,
    FLUX_FILL,
    FLUX_CONTROL,
)
ALL = (
    *PUBLISHED,
    SD15.led("sd15-controlnet"),
    SDXL.led("sdxl-controlnet"),
    TINY_SD15,
    TINY_SD15.with_unet("tiny-sd15-inpaint", in_channels=9),
    TINY_SD15.led("tiny-sd15-controlnet", **SMALL_LED),
    TINY_SD21,
    TINY_SDXL,
    TINY_SDXL.led("tiny-sdxl-controlnet", **SMALL_LED),
    TINY_REFINER,
    TINY_FLUX,
    small_flux(FLUX_SCHNELL, "tiny-flux-schnell"),
    small_flux(FLUX_FILL, "tiny-flux-fill"),
    small_flux(FLUX_CONTROL, "tiny-flux-canny"),
)
ARCHITECTURES = {each.name: each for each in ALL}


def find_architecture(name: str) -> Architecture:
    """The architecture of that name. Raises LDMError that names the nearest one."""
    if name not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise LDMError(f"There is no architecture {name!r} for --random-init: {known}.{nearest(name, ARCHITECTURES)}")
    return ARCHITECTURES[name]
