"""Tiny FLUX parts with every parameter drawn, of both libraries with the same numbers; and whole folders of them.

A latent has 4 channels here, and a Flux that reads as many beside it is for "control", where a UNet would be to "edit".
"""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from unittest.mock import patch

import torch
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    FluxControlNetModel,
    FluxControlPipeline,
    FluxFillPipeline,
    FluxPipeline,
    FluxTransformer2DModel,
)
from diffusers.models.transformers import transformer_flux
from reference import randomise, same
from tiny_pairs import write_tokenizer
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5TokenizerFast

import ldm
from ldm.models.flux import Flux, FluxConfig
from ldm.models.vae import VAE, VAEConfig
from ldm.pipeline import Pipeline
from ldm.text.clip import TextConfig, TextEncoder

LATENT, FACTOR = 4, 8  # channels of a latent, and pixels along the side of one of its positions
POOLED, TEXT_WIDTH = 24, 20  # the widths of CLIP's pooled vector and of T5's context
FLUX = {
    "in_channels": 4 * LATENT,
    "out_channels": 4 * LATENT,
    "num_layers": 2,
    "num_single_layers": 3,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": TEXT_WIDTH,
    "pooled_projection_dim": POOLED,
    "axes_dims_rope": (4, 4, 8),
}
VAE_FIELDS = {
    "block_out_channels": (8, 8, 16, 16),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "norm_num_groups": 4,
    "latent_channels": LATENT,
    "scaling_factor": 0.3611,
    "shift_factor": 0.1159,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
    "force_upcast": False,
}
CLIP = {"hidden_size": POOLED, "intermediate_size": 52, "num_hidden_layers": 3, "num_attention_heads": 3}
T5 = {
    "d_model": TEXT_WIDTH,
    "d_kv": 6,
    "d_ff": 40,
    "num_layers": 2,
    "num_heads": 3,
    "feed_forward_proj": "gated-gelu",
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 20,
    "tie_word_embeddings": False,
}
# As black-forest-labs have them: schnell's table is the same at every size, dev's is shifted by the number of patches.
SCHNELL = {"shift": 1.0, "use_dynamic_shifting": False}
DEV = {
    "shift": 3.0,
    "use_dynamic_shifting": True,
    "base_shift": 0.5,
    "max_shift": 1.15,
    "base_image_seq_len": 256,
    "max_image_seq_len": 4096,
}
MODELS = {  # name -> diffusers' class, whether it is told its guidance, channels beside the latent, its schedule
    "schnell": (FluxPipeline, False, 0, SCHNELL),
    "dev": (FluxPipeline, True, 0, DEV),
    "fill": (FluxFillPipeline, True, LATENT + FACTOR**2, DEV),
    "control": (FluxControlPipeline, True, LATENT, DEV),
}


# ------------------------------------------------------------------------------------------------ the parts, in pairs


def flux_reference(guidance: bool = False, beside: int = 0, seed: int = 31, **fields) -> FluxTransformer2DModel:
    """diffusers' transformer, that reads `beside` channels behind the latent's 4; `fields` are written over."""
    reads = {"in_channels": 4 * (LATENT + beside), "guidance_embeds": guidance}
    return randomise(FluxTransformer2DModel(**FLUX | reads | fields), seed).eval()


def flux_pair(
    guidance: bool = False, beside: int = 0, dtype: torch.dtype = torch.float32, seed: int = 31, **fields
) -> tuple[FluxTransformer2DModel, Flux]:
    """The same transformer of both libraries."""
    reference = flux_reference(guidance, beside, seed, **fields).to(dtype)
    return reference, same(lambda: Flux(FluxConfig.from_json(dict(reference.config))), reference)


def vae_pair(dtype: torch.dtype = torch.float32, seed: int = 32, **fields) -> tuple[AutoencoderKL, VAE]:
    """Latents of 4 channels, scaled and shifted, without the convolutions around them."""
    reference = randomise(AutoencoderKL(**VAE_FIELDS | fields), seed).eval().to(dtype)
    return reference, same(lambda: VAE(VAEConfig.from_json(dict(reference.config))), reference)


def clip_reference(vocabulary: int = 560, seed: int = 33, **fields) -> CLIPTextModel:
    """The end is the last token, the start the one before it."""
    ids = {"bos_token_id": vocabulary - 2, "eos_token_id": vocabulary - 1, "pad_token_id": vocabulary - 1}
    config = CLIPTextConfig(**CLIP | {"hidden_act": "quick_gelu", "vocab_size": vocabulary} | ids | fields)
    return randomise(CLIPTextModel(config), seed).eval()


def clip_pair(dtype: torch.dtype = torch.float32, seed: int = 33) -> tuple[CLIPTextModel, TextEncoder]:
    reference = clip_reference(seed=seed).to(dtype)
    config = TextConfig.from_json(reference.config.to_dict())
    return reference, same(lambda: TextEncoder(config), reference, lambda key: key.removeprefix("text_model."))


def t5_reference(vocabulary: int = 64, seed: int = 34, **fields) -> T5EncoderModel:
    return randomise(T5EncoderModel(T5Config(**T5 | {"vocab_size": vocabulary} | fields)), seed).eval()


def t5_pair(dtype: torch.dtype = torch.float32, seed: int = 34, **fields) -> tuple[T5EncoderModel, nn.Module]:
    from ldm.text.t5 import T5Config as OurConfig
    from ldm.text.t5 import T5Encoder

    reference = t5_reference(seed=seed, **fields).to(dtype)
    config = OurConfig.from_json(reference.config.to_dict())
    drop = {"encoder.embed_tokens.weight"}  # the same tensor as `shared.weight`
    return reference, same(lambda: T5Encoder(config), reference, lambda key: None if key in drop else key)


def t5_tokenizer(folder: Path) -> T5TokenizerFast:
    """A vocabulary of letters and some words, as T5's own: pad 0, end 1, unknown 2, and `▁` for the spaces."""
    pieces = ["▁", *"abcdefghijklmnopqrstuvwxyz,.", "▁a", "▁red", "▁house", "▁fish", "ouse", "▁snow", "▁large", "th"]
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    vocabulary += [(piece, -2.0 - 0.1 * k if len(piece) > 1 else -6.0 - 0.1 * k) for k, piece in enumerate(pieces)]
    own = Tokenizer(models.Unigram(vocabulary, unk_id=2))
    own.normalizer = normalizers.Sequence([normalizers.Nmt(), normalizers.NFKC(), normalizers.Replace("  ", " ")])
    own.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()])
    own.decoder = decoders.Metaspace()
    own.post_processor = processors.TemplateProcessing("$A </s>", "$A </s> $B </s>", [("</s>", 1)])
    folder.mkdir(parents=True, exist_ok=True)
    own.save(str(folder / "tokenizer.json"))
    return T5TokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), extra_ids=0, model_max_length=512)


# ------------------------------------------------------------------------------------------------ whole models


def build_flux(name: str, folder: Path) -> DiffusionPipeline:
    """diffusers' own classes; the tokenizers' files go below `folder`."""
    cls, guidance, beside, schedule = MODELS[name]
    write_tokenizer(folder / "vocabulary", "<|endoftext|>")
    tokenizer = CLIPTokenizer.from_pretrained(folder / "vocabulary")
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    tokenizer_2 = t5_tokenizer(folder / "pieces")
    return cls(
        scheduler=FlowMatchEulerDiscreteScheduler(**schedule),
        vae=vae_pair()[0],
        text_encoder=clip_reference(len(tokenizer), pad_token_id=tokenizer.pad_token_id, **ids),
        tokenizer=tokenizer,
        text_encoder_2=t5_reference(len(tokenizer_2)),
        tokenizer_2=tokenizer_2,
        transformer=flux_reference(guidance, beside),
    )


@dataclass
class FluxModels:
    """Both sides' pipelines of the folders below `root`, kept for the session: don't change them, copy them."""

    root: Path
    loaded: dict = field(default_factory=dict)

    def folder(self, name: str) -> Path:
        """One of `MODELS`."""
        folder = self.root / name
        if not (folder / "model_index.json").exists():
            build_flux(name, self.root / f"{name}-parts").save_pretrained(folder)
        return folder

    def reference(self, name: str, cls: type = FluxPipeline, dtype: torch.dtype = torch.float32, **parts):
        """diffusers' pipeline of class `cls` over the folder; `parts` are what it has beside."""
        key = ("reference", name, dtype)
        if key not in self.loaded:
            self.loaded[key] = DiffusionPipeline.from_pretrained(self.folder(name), torch_dtype=dtype).components
        known = inspect.signature(cls).parameters
        pipe: DiffusionPipeline = cls(**{k: v for k, v in self.loaded[key].items() if k in known}, **parts)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def ours(self, name: str, dtype: torch.dtype = torch.float32) -> Pipeline:
        if ("ours", name, dtype) not in self.loaded:
            self.loaded["ours", name, dtype] = ldm.load(self.folder(name), dtype)
        return self.loaded["ours", name, dtype]

    def controlnet(self, seed: int = 36, **fields) -> tuple[FluxControlNetModel, Path]:
        """diffusers' ControlNet for these models, and the folder that it has written."""
        net = controlnet_reference(seed, **fields)
        folder = self.root / "-".join(["controlnet", str(seed), *(f"{k}={v}" for k, v in fields.items())])
        net.save_pretrained(folder)
        return net, folder


def controlnet_reference(seed: int = 36, dtype: torch.dtype = torch.float32, **fields) -> FluxControlNetModel:
    """With fewer blocks than the transformer, as all that are published."""
    own = {k: v for k, v in FLUX.items() if k != "out_channels"} | {"num_layers": 1, "num_single_layers": 2}
    return randomise(FluxControlNetModel(**own | fields), seed).eval().to(dtype)


# ------------------------------------------------------------------------------------------------ float64


@contextmanager
def rotary_in_float64() -> Iterator[None]:
    """diffusers rounds the rotary table, and what is turned by it, to float32: here both stay in float64."""

    def table(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        turns = []
        for k, d in enumerate(self.axes_dim):
            freqs = 1.0 / (self.theta ** (torch.arange(0, d, 2, dtype=torch.float64) / d))
            turns.append(torch.outer(ids[:, k].double(), freqs).repeat_interleave(2, dim=1))
        angles = torch.cat(turns, dim=-1)
        return angles.cos(), angles.sin()

    def turned(x: Tensor, freqs_cis: tuple[Tensor, Tensor], sequence_dim: int) -> Tensor:
        assert sequence_dim == 1
        cos, sin = (each[None, :, None, :] for each in freqs_cis)
        real, imaginary = x.reshape(*x.shape[:-1], -1, 2).unbind(-1)
        return x * cos + torch.stack([-imaginary, real], dim=-1).flatten(3) * sin

    with (
        patch.object(transformer_flux.FluxPosEmbed, "forward", table),
        patch.object(transformer_flux, "apply_rotary_emb", turned),
    ):
        yield
