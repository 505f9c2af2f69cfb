"""FLUX on both sides of a comparison: its transformer and T5, what its pipelines are told, and where diffusers rounds.

diffusers' transformer takes packed patches, the places of all tokens, and thousandths of a timestep; its modules hand
text and picture on in another order than ours. Here both are made alike. diffusers isn't imported: it is reached
through the modules that `reference.py` has built.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from ldm import tasks
from ldm.io.folders import write_json
from ldm.models.patches import PATCH, pack, places, rotary_angles, unpack
from ldm.parity.calls import Call
from ldm.parity.sides import Part
from ldm.text.t5 import T5Encoder
from ldm.text.t5_tokenizer import SPACE

TOKENS = 64  # of a prompt, in pipelines: what both sides read; most of 512 are padding
TOLD = 3.5  # the guidance that a transformer is told that asks for it
DOUBLE, SINGLE = "transformer_blocks", "single_transformer_blocks"


# ---------------------------------------------------------------------------------------------------- theirs


def transformer(module: nn.Module) -> Part:
    """diffusers' transformer, asked as ours is."""

    def run(x: Tensor, t: Tensor, context: Tensor, extras: dict[str, Tensor]) -> dict[str, Tensor]:
        height, width = x.shape[2:]
        ids = places(context.shape[1], height, width).to(x)
        tokens = context.shape[1]
        thousandths = t.to(torch.promote_types(x.dtype, torch.float32)) / 1000
        with exact_turns(module, x.dtype):
            patches = module(
                pack(x), context, extras["pooled"], thousandths, ids[tokens:], ids[:tokens], extras.get("guidance")
            ).sample
        return {"output": unpack(patches, height, width)}

    return Part(run, module, retell=retold)


def t5(module: nn.Module) -> Part:
    return Part(lambda ids: {"context": module(ids).last_hidden_state}, module, T5Encoder.rename)


def retold(name: str, call: Call) -> None:
    """What diffusers' blocks were given and gave, in our order: the picture before the text, or both in one."""
    stem = name.partition(".")[0]
    if name.count(".") != 1 or stem not in (DOUBLE, SINGLE):
        return
    text, x = call.output
    if stem == DOUBLE:
        call.output = x, text
    else:
        call.output = torch.cat([text, x], dim=1)
        given = call.kwargs
        call.kwargs = {"x": torch.cat([given["encoder_hidden_states"], given["hidden_states"]], dim=1)}
        call.args = ()


@contextmanager
def exact_turns(module: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """diffusers turns queries and keys in float32 in every dtype (REFERENCE_DEFECTS.md, 46): in float64, not here."""
    home = sys.modules[type(module).__module__]
    if dtype != torch.float64 or not hasattr(home, "FluxPosEmbed"):
        yield
        return

    def table(own: nn.Module, ids: Tensor) -> tuple[Tensor, Tensor]:
        angles = rotary_angles(ids.cpu(), own.axes_dim, own.theta).to(ids.device).repeat_interleave(2, dim=1)
        return angles.cos(), angles.sin()

    def turned(x: Tensor, table: tuple[Tensor, Tensor], sequence_dim: int = 1) -> Tensor:
        cos, sin = (each[None, :, None] for each in table)
        aside = torch.stack([-x[..., 1::2], x[..., 0::2]], dim=-1).flatten(-2)
        return x * cos + aside * sin

    with patch.object(home.FluxPosEmbed, "forward", table), patch.object(home, "apply_rotary_emb", turned):
        yield


def write_t5_vocabulary(folder: Path) -> None:
    """A small vocabulary in T5's manner, for random weights: letters, signs, some words, and what it can't spell."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    signs = [chr(code) for code in range(33, 127)]
    words = "a the large red house on snow at night and small blue fish two trees fog".split()
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), (SPACE, -4.0), *((sign, -6.0) for sign in signs)]
    made = Tokenizer(models.Unigram([*pieces, *((SPACE + word, -3.0) for word in words)], unk_id=2))
    made.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()])
    made.decoder = decoders.Metaspace()
    made.post_processor = processors.TemplateProcessing("$A </s>", "$A </s> $B </s>", [("</s>", 1)])
    folder.mkdir()
    made.save(str(folder / "tokenizer.json"))
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    told = {"tokenizer_class": "T5TokenizerFast", "extra_ids": 0, "model_max_length": 512, **special}
    write_json(folder / "tokenizer_config.json", told)


# ---------------------------------------------------------------------------------------------------- pipelines

CLASSES = {  # by the task and the way of drawing
    ("text", "words"): "FluxPipeline",
    ("text", "image"): "FluxImg2ImgPipeline",
    ("text", "inpaint"): "FluxInpaintPipeline",
    ("fill", "inpaint"): "FluxFillPipeline",
    ("control", "image"): "FluxControlPipeline",
}


def task_of(transformer: Any, vae: Any) -> str:
    """What it is made for, by the configurations of diffusers' models."""
    factor = 2 ** (len(vae.block_out_channels) - 1)
    return tasks.task_of(transformer.in_channels // PATCH**2, vae.latent_channels, factor)


def ways_of(task: str) -> tuple[str, ...]:
    """How a FLUX for this task is drawn with."""
    return tuple(way for own, way in CLASSES if own == task)


def guided(told: bool, task: str, scale: float) -> tuple[dict, dict]:
    """Ours and theirs of guidance by `scale`: classifier-free, or where the model is `told` its own, beside that.

    diffusers' pipelines for Fill and Control have no true guidance.
    """
    if task != "text":
        return {"guidance": TOLD}, {"guidance_scale": TOLD}
    ours = {"guidance": TOLD, "true_guidance": scale} if told else {"guidance": scale}
    return ours, {"guidance_scale": TOLD, "true_cfg_scale": scale}


def unpacked(latents: list[Tensor], width: int, height: int, factor: int) -> list[Tensor]:
    """diffusers keeps its latents in patches: pixels along a side, and how many a position stands for."""
    return [unpack(each, height // factor, width // factor) for each in latents]


def embedded(text_encoder: nn.Module, ids: Tensor, most: int, prefix: str = "") -> dict[str, Tensor]:
    """What a FluxPipeline without T5 is told in its place: CLIP's own vectors of the first tokens, and the pooled."""
    out = text_encoder(ids)
    return {
        f"{prefix}prompt_embeds": out.last_hidden_state[:, :most],
        f"{prefix}pooled_prompt_embeds": out.pooler_output,
    }
