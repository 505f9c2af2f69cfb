"""T5: the text encoder whose vectors FLUX reads (Raffel et al. 2020; version 1.1's feed-forward: Shazeer 2020).

A transformer without biases that sees no positions, only distances: each head adds to its scores a number that it has
learnt for how far apart two tokens are. The first block holds that table, and all blocks use it. Names are those of
transformers' `T5EncoderModel`, so its folders load without a table.
Shapes: B batch, L tokens, D width (`d_model`), K width of a head (`d_kv`).
"""

import math
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.config import check_class, from_json
from ldm.errors import LDMError
from ldm.text.clip import REMARKS

# transformers' names: of the encoder alone (FLUX's folder), and of a whole T5, whose decoder isn't read.
CLASSES = ("T5EncoderModel", "T5Model", "T5ForConditionalGeneration")
FEED_FORWARD = "gated-gelu"  # T5 1.1's; the first T5 has "relu", which is no part of any FLUX
# The same said in other words (transformers writes all three), and what we don't implement.
NEUTRAL = {"dense_act_fn": "gelu_new", "is_gated_act": True, "is_decoder": False, "pruned_heads": {}}
# How the model was trained, and what its decoder is.
T5_REMARKS = REMARKS | set(
    """
    bos_token_id classifier_dropout dropout_rate eos_token_id initializer_factor is_encoder_decoder n_positions
    num_decoder_layers output_past pad_token_id scale_decoder_outputs
    """.split()
)


@dataclass(frozen=True)
class T5Config:
    """The fields of `text_encoder_2/config.json` that shape the network. Defaults are transformers'."""

    vocab_size: int = 32128
    d_model: int = 512
    d_kv: int = 64
    d_ff: int = 2048
    num_layers: int = 6
    num_heads: int = 8
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    layer_norm_epsilon: float = 1e-6
    feed_forward_proj: str = FEED_FORWARD

    @property
    def hidden_size(self) -> int:
        """`d_model` by the name that CLIP's configuration has for it."""
        return self.d_model

    @classmethod
    def from_json(cls, fields: dict) -> "T5Config":
        """Read transformers' JSON; a field that is neither implemented nor neutral is refused by name."""
        named = fields.get("architectures") or [CLASSES[0]]
        name = named[0] if isinstance(named, list | tuple) and len(named) == 1 else named
        check_class(name, CLASSES, "the T5 text encoder")
        if fields.get("model_type", "t5") != "t5":  # mT5 and UMT5: the latter has a table of distances in every block
            raise LDMError(
                f"The configuration of the T5 text encoder is of a {str(fields['model_type'])[:80]!r}; "
                "ldm reads 't5' there: take FLUX's own file."
            )
        fields = {"feed_forward_proj": "relu", **fields}  # which is what a file means that doesn't say
        kind = fields["feed_forward_proj"]
        if kind != FEED_FORWARD:  # first of all: the other fields that follow from it would be refused for nothing
            raise LDMError(
                f"The T5 text encoder has feed_forward_proj {str(kind)[:80]!r}; ldm implements {FEED_FORWARD!r}, "
                "which is T5 1.1's: take that version."
            )
        kept = {k: v for k, v in fields.items() if k not in T5_REMARKS}
        config = from_json(cls, kept, NEUTRAL | {"model_type": "t5"}, "the T5 text encoder")
        config.validate()
        return config

    def to_json(self) -> dict:
        """The same as transformers writes it."""
        neutral = {k: v for k, v in NEUTRAL.items() if k != "pruned_heads"}
        return {"architectures": [CLASSES[0]], "model_type": "t5", **neutral, **asdict(self)}

    def validate(self) -> None:
        """Raise LDMError where the fields make no network."""
        for name in ("vocab_size", "d_model", "d_kv", "d_ff", "num_layers", "num_heads"):
            if getattr(self, name) < 1:
                raise LDMError(f"The T5 text encoder has {name} {getattr(self, name)}: it must be 1 or more.")
        buckets, furthest = self.relative_attention_num_buckets, self.relative_attention_max_distance
        if buckets < 4 or furthest <= buckets // 4:
            raise LDMError(
                f"The T5 text encoder has {buckets} buckets of distances up to {furthest}: there must be 4 or more, "
                "and the furthest distance more than a quarter of them."
            )


XXL = T5Config(d_model=4096, d_ff=10240, num_layers=24, num_heads=64)  # FLUX.1's: 4.76 billion parameters


# ------------------------------------------------------------------------------------------------ distances


def buckets(distance: Tensor, count: int, furthest: int) -> Tensor:
    """The row, of `count` in the table, of each distance: how far behind the token that looks the other one stands.

    The lower half of the rows is for tokens before it, the upper half for those behind. Of each half the first half is
    for one distance each; the rest widen with the logarithm, and the last one reaches from about `furthest` to
    infinity. (Raffel et al. 2020, section 2.1; the formula is of their code.)
    """
    half, exact = count // 2, count // 4
    n = distance.abs()
    # In float32, as everywhere: a border that falls on a whole number (16, 32, 64) must fall to the same side.
    wider = torch.log(n.clip(min=exact).float() / exact) / math.log(furthest / exact) * (half - exact)
    row = torch.where(n < exact, n, (exact + wider.long()).clip(max=half - 1))
    return row + half * (distance > 0)


def distances(length: int) -> Tensor:
    """How far behind token i token j stands, j - i: (L, L)."""
    place = torch.arange(length)  # on the CPU: another device's logarithm might put a border elsewhere
    return place[None, :] - place[:, None]


# ------------------------------------------------------------------------------------------------ bricks


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight: no mean is taken away (Zhang & Sennrich 2019, equation 4).

    The mean is taken in float32 whatever x is, also in float64, and in half precision x is rounded before it meets the
    weight: both as in transformers, whose numbers these are to the last bit.
    """

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x: Tensor) -> Tensor:
        x = x * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + self.eps)
        return self.weight * (x.to(self.weight.dtype) if self.weight.dtype.itemsize == 2 else x)


class SelfAttention(nn.Module):
    """softmax(q k' + what the heads have learnt for each distance) v, not divided by sqrt(K): the weights allow for it.

    (So that training starts well without the division, q is drawn smaller by that factor.)
    """

    def __init__(self, config: T5Config, first: bool):
        super().__init__()
        width, inner = config.d_model, config.num_heads * config.d_kv
        self.heads, self.furthest = config.num_heads, config.relative_attention_max_distance
        self.q, self.k, self.v = (nn.Linear(width, inner, bias=False) for _ in range(3))
        self.o = nn.Linear(inner, width, bias=False)
        if first:
            self.relative_attention_bias = nn.Embedding(config.relative_attention_num_buckets, config.num_heads)

    def bias(self, length: int) -> Tensor:
        """What the first block's table adds to the scores of every block: (1, heads, L, L)."""
        table = self.relative_attention_bias
        rows = buckets(distances(length), table.num_embeddings, self.furthest)
        return table(rows.to(table.weight.device)).permute(2, 0, 1)[None].contiguous()

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:  # (B, L, D), bias (B or 1, heads, L, L)
        q, k, v = (p(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for p in (self.q, self.k, self.v))
        h = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=1.0)  # (B, heads, L, K)
        return self.o(h.transpose(1, 2).flatten(2))


def gelu(x: Tensor) -> Tensor:
    """GELU by tanh's approximation (Hendrycks & Gimpel 2016, section 2), one operation after another.

    torch's own rounds once, this rounds every operation to the numbers' type: what transformers does for T5.
    """
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x.pow(3))))


class FeedForward(nn.Module):
    """wo(gelu(wi_0 x) * wi_1 x): the first projection is a gate of the second (Shazeer 2020, equation 6: GEGLU)."""

    def __init__(self, config: T5Config):
        super().__init__()
        self.wi_0, self.wi_1 = (nn.Linear(config.d_model, config.d_ff, bias=False) for _ in range(2))
        self.wo = nn.Linear(config.d_ff, config.d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = gelu(self.wi_0(x)) * self.wi_1(x)  # (B, L, d_ff)
        if h.dtype == torch.float16:
            # XXL's sums go beyond float16's end, 65504. transformers holds wo in float32; this takes half its memory,
            # and is the same for numbers that came out of a float16 file. From here on the stream is float32.
            return F.linear(h.float(), self.wo.weight.float())
        return self.wo(h)


class AttentionLayer(nn.Module):
    def __init__(self, config: T5Config, first: bool):
        super().__init__()
        self.layer_norm = RMSNorm(config.d_model, config.layer_norm_epsilon)
        self.SelfAttention = SelfAttention(config, first)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        return x + self.SelfAttention(self.layer_norm(x), bias)


class FeedForwardLayer(nn.Module):
    def __init__(self, config: T5Config):
        super().__init__()
        self.layer_norm = RMSNorm(config.d_model, config.layer_norm_epsilon)
        self.DenseReluDense = FeedForward(config)  # its name since the first T5, which had no gate

    def forward(self, x: Tensor) -> Tensor:
        return x + self.DenseReluDense(self.layer_norm(x))


class Block(nn.Module):
    """Attention and feed-forward. The `first` block makes the bias that all the others are given."""

    def __init__(self, config: T5Config, first: bool):
        super().__init__()
        self.layer = nn.ModuleList([AttentionLayer(config, first), FeedForwardLayer(config)])

    def forward(self, x: Tensor, bias: Tensor | None, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        if bias is None:
            bias = self.layer[0].SelfAttention.bias(x.shape[1])
            if mask is not None:
                bias = bias.masked_fill(~mask[:, None, None].bool(), torch.finfo(bias.dtype).min)  # (B, heads, L, L)
        return self.layer[1](in_range(self.layer[0](x, bias))), bias


def in_range(x: Tensor) -> Tensor:
    """float16 ends at 65504: what went beyond becomes the greatest number instead, or it would turn into NaN."""
    return x.clip(-65504, 65504) if x.dtype == torch.float16 else x


class Blocks(nn.Module):
    def __init__(self, config: T5Config):
        super().__init__()
        self.block = nn.ModuleList(Block(config, first=i == 0) for i in range(config.num_layers))
        self.final_layer_norm = RMSNorm(config.d_model, config.layer_norm_epsilon)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        bias = None
        for block in self.block:
            x, bias = block(x, bias, mask)
        return self.final_layer_norm(x)


# ------------------------------------------------------------------------------------------------ the encoder


class T5Encoder(nn.Module):
    """The encoder of T5 1.1, without dropout: it is read, not trained."""

    def __init__(self, config: T5Config):
        super().__init__()
        config.validate()
        self.config = config
        self.shared = nn.Embedding(config.vocab_size, config.d_model)
        self.encoder = Blocks(config)

    @property
    def dtype(self) -> torch.dtype:
        return self.encoder.final_layer_norm.weight.dtype

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """The last block's output, normed: ids (B, L) -> (B, L, D).

        Tokens where the `mask` (B, L) is False are seen by none. Without one the padding is read like words.
        """
        return self.encoder(self.shared(ids), mask)

    def context(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """What FLUX reads: (B, L, D). It was trained without a mask, so with the padding in sight."""
        return self(ids, mask)

    @staticmethod
    def rename(key: str) -> str | None:
        """A key of a transformers file -> ours, or None for what isn't read.

        The embedding is written as `shared`, as `encoder.embed_tokens` or as both: it is one. A whole T5 has a decoder.
        """
        if key.startswith(("decoder.", "lm_head.")):
            return None
        return "shared.weight" if key == "encoder.embed_tokens.weight" else key
