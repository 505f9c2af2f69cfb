"""What both sides are given: prompts, pictures, noise, timesteps, and what SDXL is told beside them; of one seed."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ldm.parity.compare import HALF
from ldm.parity.sides import Side
from ldm.pipeline import Pipeline

AWKWARD = [  # prompts on which tokenizers part
    "a large red house on snow at night",
    "",
    "   spaces\tand\nlines   between ",
    "CAFÉ, naïve façade: Ærøskøbing & Übergröße",
    "cafe\u0301 and A\u030angstro\u0308m, composed",
    "a 🐈‍⬛ beside a 👩🏽‍🚀, 12½ €, 3×4, 1,234.50",
    "it's o'clock; they're, we'd've -- (((brackets))) [x] {y} <z> !!! ??? ...",
    "<|startoftext|> inside <|endoftext|> and <|ENDOFTEXT|>",
    "ΟΔΥΣΣΕΥΣ ἐν Ἰθάκῃ; 東京の夜、雪 ; नमस्ते ; مرحبا ; ไทย",
    "http://example.org/a_b?c=d&e=%20#f, foo@bar.baz, snake_case CamelCase",
    "word " * 200,
    "supercalifragilisticexpialidocious" * 12,
]
PROMPTS = ["a large red house on snow at night, and a small blue fish", "two trees"]
NEGATIVE = ["fog", ""]
TIMES = [981.0, 333.25]  # of a first step; and one between two integers, as Karras' levels have
# diffusers' FLUX rounds thousandths of a timestep and a thousand times the guidance to its own dtype, which is a larger
# matter than all else in half precision: these numbers it leaves as they are.
ROUND_TIMES, GUIDANCES = [500.0, 250.0], [4.0, 2.0]
BATCH = 2


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@dataclass(frozen=True)
class Plan:
    """What is walked: where, how exactly, how large (pixels), how many steps, which stations (none: all)."""

    device: torch.device
    dtype: torch.dtype
    width: int
    height: int
    steps: int = 4
    only: tuple[str, ...] = ()
    seed: int = 0

    def small(self, factor: int) -> "Plan":
        """The same at eight latents a side: there the blocks are walked."""
        return replace(self, width=8 * factor, height=8 * factor)

    def place(self, x: Tensor) -> Tensor:
        return x.to(self.device, self.dtype)


def given(name: str, ours: Side, plan: Plan) -> tuple:
    """The inputs of a network, for a plan's size: the same numbers for both sides."""
    pipe, net = ours.own
    factor, channels = pipe.vae.config.factor, pipe.vae.config.latent_channels
    size = (plan.height // factor, plan.width // factor)
    if name.startswith("text_encoder"):
        return (ids(ours, "tokenizer" + name.removeprefix("text_encoder")).to(plan.device),)
    if name == "vae_encode":
        image = normal(plan.seed + 1, BATCH, pipe.vae.config.in_channels, plan.height, plan.width).tanh()
        return plan.place(image), plan.place(normal(plan.seed + 5, BATCH, channels, *size))
    if name == "vae_decode":
        return (plan.place(normal(plan.seed + 2, BATCH, channels, *size)),)
    config = pipe.backbone.config
    reads = config.channels_in if pipe.flux else config.in_channels
    x = plan.place(normal(plan.seed + 3, BATCH, reads, *size))
    t = torch.tensor(ROUND_TIMES if pipe.flux and plan.dtype in HALF else TIMES, device=plan.device)
    context, extras = told(ours, plan)
    if name != "controlnet":
        return x, t, context, extras
    picture = plan.place(normal(plan.seed + 4, BATCH, 3, plan.height, plan.width).sigmoid())
    return x[:, : net.config.in_channels], t, context, extras, picture


def ids(ours: Side, tokenizer: str, prompts: list[str] = PROMPTS) -> Tensor:
    """By our tokenizer of that name; a model with a single one names it without a number."""
    found = ours.tokenizers.get(tokenizer) or next(iter(ours.tokenizers.values()))
    return found(prompts)


def told(ours: Side, plan: Plan) -> tuple[Tensor, dict[str, Tensor]]:
    """The context (B, 77, D) that our text encoders make of the prompts, and extras: SDXL's pooled text and sizes."""
    pipe: Pipeline = ours.own[0]
    names = [name for name in ours.parts if name.startswith("text_encoder")]
    states = [ours.parts[name].run(*given(name, ours, plan)) for name in names]
    if pipe.flux:
        return told_flux(pipe, states, plan)
    context = torch.cat([each["context"] for each in states], dim=-1)
    config, extras = pipe.unet.config, {}
    if config.addition_embed_type == "text_time":
        pooled, width = states[-1]["pooled"], config.addition_time_embed_dim
        count = (config.projection_class_embeddings_input_dim - pooled.shape[1]) // width
        sizes = [[plan.height, plan.width, 0, 16, plan.height, plan.width], [plan.height, 2 * plan.width, 8, 0, 6, 2]]
        rows = [row[:count] for row in sizes]  # SDXL's refiner: original size, crop, and a score
        extras = {"pooled": pooled, "time_ids": plan.place(torch.tensor(rows))}
    if config.num_class_embeds is not None:
        extras["class_labels"] = torch.tensor([20, 3], device=plan.device) % config.num_class_embeds
    return context, extras


def told_flux(pipe: Pipeline, states: list[dict[str, Tensor]], plan: Plan) -> tuple[Tensor, dict[str, Tensor]]:
    """CLIP's pooled vector, and T5's context; of a FLUX without T5 CLIP's own. And a guidance, where it is told one."""
    extras = {"pooled": states[0]["pooled"]}
    if pipe.transformer.config.guidance_embeds:
        wide = torch.promote_types(plan.dtype, torch.float32)  # rounded, it would be another one
        extras["guidance"] = torch.tensor(GUIDANCES, device=plan.device, dtype=wide)
    return states[-1]["context"], extras
