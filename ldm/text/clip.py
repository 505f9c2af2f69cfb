"""CLIP: a text transformer and an image transformer that agree on what belongs together (Radford et al. 2021).

The text tower is Stable Diffusion's text encoder. Names are those of transformers' `CLIPTextModel` and
`CLIPVisionModel` without their outer `text_model.` and `vision_model.`, which older and newer files write and omit.
Shapes: B batch, L tokens (77), C width, P patches, J joint width of the two towers.
"""

import math
from dataclasses import asdict, dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.config import check_class, from_json
from ldm.errors import LDMError

ACTIVATIONS = {
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),  # OpenAI's CLIP: Stable Diffusion 1 and SDXL's first encoder
    "gelu": F.gelu,  # OpenCLIP: Stable Diffusion 2 and SDXL's second
}

# transformers' names of the text tower: without and with its projection, and in a whole CLIP, which is read without.
CLASSES = ("CLIPTextModel", "CLIPTextModelWithProjection", "CLIPModel")
NEUTRAL = {  # fields of both towers' JSON that we accept at these values alone: with them they change nothing
    "add_cross_attention": False,
    "attention_dropout": 0.0,
    "bos_token_id": None,  # of the image tower, as are the next two
    "eos_token_id": None,
    "pad_token_id": None,
    "dropout": 0.0,
    "initializer_factor": 1.0,
    "is_decoder": False,
    "is_encoder_decoder": False,
    "num_channels": 3,
    "pruned_heads": {},
}
# Fields that say how to train, write or find a model, or (transformers 4 wrote them for every model) how to generate
# text with it: nothing of its numbers.
REMARKS = set(
    """
    architectures chunk_size_feed_forward dtype finetuning_task id2label initializer_range label2id model_type
    output_attentions output_hidden_states prefix problem_type return_dict task_specific_params tokenizer_class
    torch_dtype torchscript transformers_version use_bfloat16
    bad_words_ids begin_suppress_tokens cross_attention_hidden_size decoder_start_token_id diversity_penalty do_sample
    early_stopping encoder_no_repeat_ngram_size exponential_decay_length_penalty forced_bos_token_id
    forced_eos_token_id length_penalty max_length min_length no_repeat_ngram_size num_beam_groups num_beams
    num_return_sequences output_scores remove_invalid_values repetition_penalty return_dict_in_generate sep_token_id
    suppress_tokens temperature tf_legacy_loss tie_encoder_decoder tie_word_embeddings top_k top_p typical_p use_cache
    """.split()
)


@dataclass(frozen=True)
class TowerConfig:
    """What the two towers share. Defaults are transformers'."""

    hidden_size: int = 512
    intermediate_size: int = 2048
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    projection_dim: int = 512


@dataclass(frozen=True)
class TextConfig(TowerConfig):
    """The fields of `text_encoder/config.json` that shape the network."""

    vocab_size: int = 49408
    max_position_embeddings: int = 77
    bos_token_id: int = 49406
    eos_token_id: int = 49407
    pad_token_id: int = 1
    with_projection: bool = False  # CLIPTextModelWithProjection: the pooled vector is mapped to the joint space

    @classmethod
    def from_json(cls, fields: dict) -> "TextConfig":
        """Read transformers' JSON; a field that is neither implemented nor neutral is refused by name."""
        named = fields.get("architectures") or [CLASSES[0]]
        name = named[0] if isinstance(named, list | tuple) and len(named) == 1 else named
        check_class(name, CLASSES, "the text encoder")
        fields = strip(fields, "text_config")
        if isinstance(ends := fields.get("eos_token_id"), list | tuple):
            raise LDMError(f"The text encoder's eos_token_id is {tuple(ends)!r}: ldm reads a single number.")
        config = from_json(cls, fields, NEUTRAL, "the text encoder")
        check_activation(config.hidden_act)
        return replace(config, with_projection=name == CLASSES[1])

    def to_json(self) -> dict:
        """The same as transformers writes it."""
        fields = asdict(self)
        name = CLASSES[fields.pop("with_projection")]
        return {"architectures": [name], "model_type": "clip_text_model", **fields}


@dataclass(frozen=True)
class VisionConfig(TowerConfig):
    """The fields of a CLIP image tower's `config.json` that shape the network."""

    hidden_size: int = 768
    intermediate_size: int = 3072
    num_attention_heads: int = 12
    image_size: int = 224
    patch_size: int = 32

    @classmethod
    def from_json(cls, fields: dict) -> "VisionConfig":
        """Read transformers' JSON; a field that is neither implemented nor neutral is refused by name."""
        config = from_json(cls, strip(fields, "vision_config"), NEUTRAL, "the image encoder")
        check_activation(config.hidden_act)
        return config

    def to_json(self) -> dict:
        """The same as transformers writes it."""
        name = "CLIPVisionModelWithProjection"
        return {"architectures": [name], "model_type": "clip_vision_model", **asdict(self)}


def strip(fields: dict, inner: str) -> dict:
    """The tower's own fields: out of a whole CLIP's JSON, without the remarks."""
    fields = fields[inner] if isinstance(fields.get(inner), dict) else fields
    return {k: v for k, v in fields.items() if k not in REMARKS}


def check_activation(name: str) -> None:
    if name not in ACTIVATIONS:
        raise LDMError(f"CLIP's configuration asks for hidden_act {name!r}; ldm knows {', '.join(ACTIVATIONS)}.")


class SelfAttention(nn.Module):
    """Multi-head self-attention (Vaswani et al. 2017); `causal`: a token sees only itself and those before it."""

    def __init__(self, config: TowerConfig, causal: bool):
        super().__init__()
        width = config.hidden_size
        if config.num_attention_heads < 1 or config.hidden_size % config.num_attention_heads:
            raise ValueError(f"{config.hidden_size} channels don't make {config.num_attention_heads} heads")
        self.heads, self.causal = config.num_attention_heads, causal
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor, seen: Tensor | None = None) -> Tensor:  # (B, L, C)
        """`seen` (B, 1, L, L), of who looks at whom, takes the place of `causal`."""
        q, k, v = (
            p(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj)
        )
        causal = self.causal and seen is None
        h = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, is_causal=causal)  # (B, heads, L, C/heads)
        return self.out_proj(h.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, config: TowerConfig):
        super().__init__()
        self.act = ACTIVATIONS[config.hidden_act]
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class Layer(nn.Module):
    """Attention and MLP, each behind a LayerNorm and added to its input."""

    def __init__(self, config: TowerConfig, causal: bool):
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.self_attn = SelfAttention(config, causal)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, seen: Tensor | None = None) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x), seen)
        return x + self.mlp(self.layer_norm2(x))


class Layers(nn.Module):
    def __init__(self, config: TowerConfig, causal: bool):
        super().__init__()
        self.layers = nn.ModuleList(Layer(config, causal) for _ in range(config.num_hidden_layers))


class TextEmbeddings(nn.Module):
    def __init__(self, config: TextConfig):
        super().__init__()
        self.token_embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embedding = nn.Embedding(config.max_position_embeddings, config.hidden_size)

    def forward(self, ids: Tensor) -> Tensor:
        return self.token_embedding(ids) + self.position_embedding.weight[: ids.shape[1]]  # (B, L, C)


class TextStates(NamedTuple):
    """What the text tower says of a batch of prompts.

    `hidden`: the embeddings and every layer's output, each (B, L, C), before the final norm.
    `last` (B, L, C): the last of them, normed. `pooled` (B, C or J): `last` at the end-of-text token, projected to the
    joint space where the encoder has a projection.
    """

    hidden: tuple[Tensor, ...]
    last: Tensor
    pooled: Tensor


class TextEncoder(nn.Module):
    """CLIP's text tower."""

    def __init__(self, config: TextConfig):
        super().__init__()
        self.config = config
        self.embeddings = TextEmbeddings(config)
        self.encoder = Layers(config, causal=True)
        self.final_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        if config.with_projection:
            self.text_projection = nn.Linear(config.hidden_size, config.projection_dim, bias=False)

    @property
    def dtype(self) -> torch.dtype:
        return self.final_layer_norm.weight.dtype

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> TextStates:
        """`ids` (B, L), begin and end of text included. Tokens where the `mask` (B, L) is False are seen by none."""
        hidden, seen = [self.embeddings(ids)], None
        if mask is not None:
            behind = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool, device=ids.device).tril()
            seen = mask[:, None, None].bool() & behind  # (B, 1, L, L)
        for layer in self.encoder.layers:
            hidden.append(layer(hidden[-1], seen))
        last = self.final_layer_norm(hidden[-1])
        pooled = last[torch.arange(len(ids), device=ids.device), self.end_of_text(ids)]  # (B, C)
        if self.config.with_projection:
            pooled = self.text_projection(pooled)
        return TextStates(tuple(hidden), last, pooled)

    def end_of_text(self, ids: Tensor) -> Tensor:
        """The position (B,) of each prompt's first end-of-text token.

        Old configurations claim an eos id of 2; there, as in OpenAI's code, it is the largest id of the prompt.
        """
        eos = self.config.eos_token_id
        return ids.argmax(dim=-1) if eos == 2 else (ids == eos).int().argmax(dim=-1)

    def context(self, ids: Tensor, clip_skip: int = 0, mask: Tensor | None = None) -> Tensor:
        """What the UNet reads: (B, L, C), the output of the last layer or of `clip_skip` layers earlier, normed."""
        return self.final_layer_norm(self.earlier(self(ids, mask), clip_skip))

    def earlier(self, states: TextStates, layers: int, clip_skip: int | None = None) -> Tensor:
        """The output (B, L, C) of so many layers before the last, not normed. Raises LDMError if there aren't so many.

        `clip_skip` is the number in that sentence, where it isn't `layers`.
        """
        if not 0 <= layers < len(states.hidden):
            asked = layers if clip_skip is None else clip_skip
            raise LDMError(f"clip_skip {asked} asked for, but the text encoder has {len(states.hidden) - 1} layers.")
        return states.hidden[-1 - layers]

    @staticmethod
    def rename(key: str) -> str | None:
        """A key of a transformers file -> ours. Older versions wrote an outer `text_model.` and position numbers."""
        key = key.removeprefix("text_model.")
        return None if key.endswith("embeddings.position_ids") else key


class VisionEmbeddings(nn.Module):
    """Square patches, each one vector, a learned summary token in front, and learned positions."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        width, patch = config.hidden_size, config.patch_size
        self.class_embedding = nn.Parameter(torch.randn(width))
        self.patch_embedding = nn.Conv2d(3, width, patch, stride=patch, bias=False)
        self.position_embedding = nn.Embedding((config.image_size // patch) ** 2 + 1, width)

    def forward(self, image: Tensor) -> Tensor:
        patches = self.patch_embedding(image).flatten(2).transpose(1, 2)  # (B, P, C)
        summary = self.class_embedding.expand(len(image), 1, -1)
        return torch.cat([summary, patches], dim=1) + self.position_embedding.weight  # (B, 1 + P, C)


class ImageEncoder(nn.Module):
    """CLIP's image tower. transformers misspells its first norm; the name is kept, for it is the checkpoint's."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.config = config
        self.embeddings = VisionEmbeddings(config)
        self.pre_layrnorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.encoder = Layers(config, causal=False)
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.visual_projection = nn.Linear(config.hidden_size, config.projection_dim, bias=False)

    def forward(self, image: Tensor) -> Tensor:
        """`image` (B, 3, S, S), normalised as the checkpoint asks -> its vector in the joint space (B, J)."""
        x = self.pre_layrnorm(self.embeddings(image))
        for layer in self.encoder.layers:
            x = layer(x)
        return self.visual_projection(self.post_layernorm(x[:, 0]))

    @staticmethod
    def rename(key: str) -> str | None:
        """A key of a transformers file -> ours."""
        key = key.removeprefix("vision_model.")
        return None if key.endswith("embeddings.position_ids") else key


def contrastive_loss(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    """Both vectors (B, J): each picture must pick its caption out of the batch, and each caption its picture.

    Radford et al. 2021, figure 3. `scale` is the inverse temperature, of which the logarithm is learned.
    """
    logits = scale * F.normalize(image, dim=-1) @ F.normalize(text, dim=-1).T  # (B, B)
    labels = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


def similarity(image: Tensor, text: Tensor) -> Tensor:
    """Cosine of the angle between vectors (B, J) of the joint space, pair by pair: (B,)."""
    return F.cosine_similarity(image, text, dim=-1)


INITIAL_SCALE = math.log(1 / 0.07)  # Radford et al. 2021, section 2.5
