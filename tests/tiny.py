"""A whole model folder in diffusers' format, of random weights and some hundred kilobytes: it draws noise, quickly."""

from pathlib import Path

import torch

from ldm.io.folders import write_json
from ldm.io.weights import save_weights
from ldm.models.unet import CROSS_DOWN, CROSS_UP, UNet, UNetConfig
from ldm.models.vae import VAE, VAEConfig
from ldm.text.clip import TextConfig, TextEncoder
from ldm.train.export import INDEX
from ldm.train.unet import SCHEDULER
from ldm.train.vocabulary import save_vocabulary, train_vocabulary

SIZE = 32  # pixels along a side
DEFAULTS = {"steps": 3, "guidance": 2.0, "sampler": "dpm++2m"}


def tiny_model(folder: Path, seed: int = 0) -> Path:
    """Write the model there; another `seed` is another model."""
    vocab, merges = train_vocabulary(["a large red house on snow at night"] * 2, 530)
    save_vocabulary(folder / "tokenizer", vocab, merges)
    text = TextConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, projection_dim=16,
        vocab_size=len(vocab), bos_token_id=len(vocab) - 2, eos_token_id=len(vocab) - 1, pad_token_id=len(vocab) - 1,
    )  # fmt: skip
    unet = UNetConfig(
        sample_size=SIZE // 8, block_out_channels=(8, 16), down_block_types=(CROSS_DOWN,) * 2,
        up_block_types=(CROSS_UP,) * 2, layers_per_block=1, cross_attention_dim=16, heads=(2, 2),
        transformer_layers_per_block=(1, 1), only_cross_attention=(False,) * 2, norm_num_groups=4,
    )  # fmt: skip
    vae = VAEConfig(block_out_channels=(8, 8, 8, 8), norm_num_groups=2, sample_size=SIZE, scaling_factor=1.0)
    torch.manual_seed(seed)
    parts = (
        ("text_encoder", "model", TextEncoder(text)),
        ("unet", "diffusion_pytorch_model", UNet(unet)),
        ("vae", "diffusion_pytorch_model", VAE(vae)),
    )
    for name, stem, part in parts:
        (folder / name).mkdir()
        write_json(folder / name / "config.json", part.config.to_json())
        save_weights(part.state_dict(), folder / name / f"{stem}.safetensors")
    (folder / "scheduler").mkdir()
    write_json(folder / "scheduler" / "scheduler_config.json", SCHEDULER)
    write_json(folder / "model_index.json", INDEX)
    write_json(folder / "ldm.json", DEFAULTS)
    return folder


def plant(folder: Path, part: str, name: str, value: float) -> None:
    """Put `value` into one number of a part's weights: the file itself stays sound, the number may be none."""
    from safetensors.torch import load_file, save_file  # ldm's own writer refuses NaN

    path = next((folder / part).glob("*.safetensors"))
    tensors = load_file(path)
    tensors[name].view(-1)[0] = value
    save_file(tensors, path, metadata={"format": "pt"})
