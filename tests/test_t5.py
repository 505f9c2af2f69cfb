"""T5's encoder equals transformers' bit for bit: every type of number, padding, shards, and the table of distances."""

import json
from dataclasses import replace
from functools import cache

import pytest
import torch
from reference import DTYPES, assert_close, keys_and_shapes, normal, randomise, same
from torch.nn import functional as F
from transformers import T5Config as TheirConfig
from transformers import T5EncoderModel, T5ForConditionalGeneration
from transformers.models.t5.modeling_t5 import T5Attention

from ldm.errors import LDMError
from ldm.io.folders import find_weights, read_fields
from ldm.io.weights import blank, load_weights
from ldm.text.t5 import XXL, RMSNorm, T5Config, T5Encoder, buckets, distances, gelu

BASE = {
    "vocab_size": 61,
    "d_model": 24,
    "d_kv": 8,
    "d_ff": 44,
    "num_layers": 3,
    "num_heads": 3,
    "feed_forward_proj": "gated-gelu",
}
TINY = {
    "base": BASE,
    "heads wider than the model": BASE | {"num_heads": 5, "d_kv": 7, "num_layers": 2},
    "few buckets": BASE | {"relative_attention_num_buckets": 10, "relative_attention_max_distance": 20},
    "odd buckets, coarse norm": BASE | {"relative_attention_num_buckets": 7, "layer_norm_epsilon": 1e-2},
}
# As google/t5-v1_1-xxl publishes it, and as FLUX.1's text_encoder_2 says the same.
PUBLISHED = {
    "architectures": ["T5ForConditionalGeneration"],
    "d_ff": 10240,
    "d_kv": 64,
    "d_model": 4096,
    "decoder_start_token_id": 0,
    "dropout_rate": 0.1,
    "eos_token_id": 1,
    "feed_forward_proj": "gated-gelu",
    "initializer_factor": 1.0,
    "is_encoder_decoder": True,
    "layer_norm_epsilon": 1e-06,
    "model_type": "t5",
    "num_decoder_layers": 24,
    "num_heads": 64,
    "num_layers": 24,
    "output_past": True,
    "pad_token_id": 0,
    "relative_attention_num_buckets": 32,
    "tie_word_embeddings": False,
    "use_cache": True,
    "vocab_size": 32128,
}
FLUX = PUBLISHED | {
    "_name_or_path": "google/t5-v1_1-xxl",
    "architectures": ["T5EncoderModel"],
    "classifier_dropout": 0.0,
    "dense_act_fn": "gelu_new",
    "is_gated_act": True,
    "relative_attention_max_distance": 128,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.43.3",
}


def drawn(fields, dtype=torch.float64):
    """transformers' encoder with every parameter drawn; its attention so large that its softmax isn't flat."""
    reference = randomise(T5EncoderModel(TheirConfig(**fields)))
    with torch.no_grad():
        for name, p in reference.named_parameters():
            if name.endswith(("layer_norm.weight", "final_layer_norm.weight")):
                p.add_(1)
            if name.endswith(("SelfAttention.q.weight", "relative_attention_bias.weight")):
                p.mul_(2)
    return reference.to(dtype).eval()


@cache
def pair(name, dtype=torch.float64):
    reference = drawn(TINY[name], dtype)
    return reference, same(lambda: T5Encoder(T5Config.from_json(TINY[name])), reference, T5Encoder.rename)


def some_ids(batch, length, seed=0):
    ids = torch.randint(3, 61, (batch, length), generator=torch.Generator().manual_seed(seed))
    ids[0, length // 2 :] = 0  # a short prompt, its end and its padding
    ids[0, length // 2] = 1
    return ids


# ------------------------------------------------------------------------------------------------ parity


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", TINY)
@torch.no_grad()
def test_context_equals_transformers(name, dtype):
    reference, ours = pair(name, dtype)
    for length in (1, 2, 13, 150):  # beyond the furthest distance too
        ids = some_ids(3, length)
        context = ours.context(ids)
        assert_close(context, reference(ids).last_hidden_state, DTYPES[dtype])
        assert context.shape == (3, length, 24)


@pytest.mark.parametrize("name", ["base", "few buckets"])
@torch.no_grad()
def test_tokens_behind_the_mask_are_seen_by_none(name):
    reference, ours = pair(name)
    ids, mask = some_ids(3, 19), torch.ones(3, 19, dtype=torch.long)
    mask[0, 10:], mask[2, :4] = 0, 0
    masked = ours.context(ids, mask)
    assert_close(masked, reference(ids, attention_mask=mask).last_hidden_state, 1e-11)
    assert torch.equal(masked, ours.context(ids, mask.bool()))
    changed = ids.clone()
    changed[0, 10:] = 7
    assert torch.equal(ours.context(changed, mask)[0, :10], masked[0, :10])
    # Without a mask, as FLUX has it, the padding is read.
    assert (ours.context(changed)[0, :10] - ours.context(ids)[0, :10]).abs().max() > 0.01
    assert_close(ours.context(ids), reference(ids).last_hidden_state, 1e-11)


@torch.no_grad()
def test_bfloat16_equals_transformers_bit_for_bit():
    reference, ours = pair("base", torch.bfloat16)
    ids = some_ids(3, 40)
    context = ours.context(ids)
    assert ours.dtype == context.dtype == torch.bfloat16 and context.float().abs().mean() > 0.1
    assert torch.equal(context, reference(ids).last_hidden_state)
    # gelu's operations are rounded one by one: torch's, which rounds once, gives other numbers.
    x = normal(0, 999, dtype=torch.bfloat16)
    assert not torch.equal(gelu(x), F.gelu(x, approximate="tanh"))
    assert_close(gelu(x.double()), F.gelu(x.double(), approximate="tanh"), 1e-14)


@torch.no_grad()
def test_float16_equals_transformers_where_sums_go_beyond_it(tmp_path):
    """Both multiply `wo` in float32, and hold the stream so from there on: XXL's numbers are beyond 65504."""
    reference = drawn(BASE, torch.float32)
    for block in reference.encoder.block:
        block.layer[1].DenseReluDense.wo.weight.mul_(30_000)
        block.layer[1].DenseReluDense.wo.weight.clip_(-65000, 65000)
    reference.half().save_pretrained(tmp_path)
    reference = T5EncoderModel.from_pretrained(tmp_path, dtype=torch.float16).eval()
    ours = read(tmp_path, torch.float16)
    assert {p.dtype for p in ours.parameters()} == {torch.float16}  # half of transformers' memory for wo
    ids = some_ids(3, 40)
    context = ours.context(ids)
    stream = ours.encoder.block[0](ours.shared(ids), None, None)[0]
    assert stream.dtype == torch.float32 and stream.abs().max() > 70_000
    assert context.dtype == torch.float16
    assert torch.equal(context, reference(ids).last_hidden_state) and context.float().abs().mean() > 0.1


@torch.no_grad()
def test_float16_attention_beyond_its_end_is_the_greatest_number():
    _, ours = pair("base")
    block = T5Encoder(ours.config).half().encoder.block[0]
    block.layer[0].SelfAttention.o.weight.fill_(60_000)
    block.layer[0].SelfAttention.v.weight.fill_(1)
    x, _ = block(torch.ones(1, 4, 24, dtype=torch.float16), None, None)
    assert x.isfinite().all() and x.abs().max() > 60_000


# ------------------------------------------------------------------------------------------------ distances


def row_by_rule(distance, count, furthest):
    """Raffel et al.'s rule in whole numbers: bucket exact + k begins at exact * (furthest / exact)^(k / wide)."""
    half, exact, n = count // 2, count // 4, abs(distance)
    wide, row = half - exact, n
    if n >= exact:
        row = exact
        # n >= exact * (furthest / exact)^(k / wide), both sides to the power of wide, without a rounding
        while row < half - 1 and n**wide * exact ** (row + 1 - exact) >= exact**wide * furthest ** (row + 1 - exact):
            row += 1
    return row + (half if distance > 0 else 0)


@pytest.mark.parametrize("count,furthest", [(32, 128), (10, 20), (7, 50), (64, 256), (4, 2), (16, 1000)])
def test_buckets_follow_the_published_rule(count, furthest):
    """In whole numbers, so that the borders at 16, 32 and 64 are known not to depend on a logarithm's last bit."""
    distance = torch.arange(-1100, 1101)
    ours = buckets(distance, count, furthest)
    assert ours.tolist() == [row_by_rule(d, count, furthest) for d in distance.tolist()]
    assert 0 <= ours.min() and ours.max() < count


@pytest.mark.parametrize("count,furthest", [(32, 128), (10, 20), (7, 50), (33, 300)])
def test_buckets_equal_transformers(count, furthest):
    place = distances(700)
    theirs = T5Attention._relative_position_bucket(place, True, count, furthest)
    assert torch.equal(buckets(place, count, furthest), theirs) and len(theirs.unique()) > 3


def test_a_published_table_of_buckets():
    """T5's own numbers, written out: 32 rows up to 128."""
    ends = [0, 1, 7, 8, 11, 12, 15, 16, 22, 23, 31, 32, 45, 46, 63, 64, 90, 91, 127, 128, 5000]
    rows = [0, 1, 7, 8, 8, 9, 9, 10, 10, 11, 11, 12, 12, 13, 13, 14, 14, 15, 15, 15, 15]
    assert buckets(-torch.tensor(ends), 32, 128).tolist() == rows
    assert buckets(torch.tensor(ends[1:]), 32, 128).tolist() == [16 + row for row in rows[1:]]


@torch.no_grad()
def test_the_bias_is_read_at_who_is_looked_at_from_who_looks():
    _, ours = pair("base")
    attention = ours.encoder.block[0].layer[0].SelfAttention
    bias, table = attention.bias(30), attention.relative_attention_bias.weight
    assert bias.shape == (1, 3, 30, 30)
    for i, j in ((0, 0), (0, 5), (5, 0), (29, 2), (3, 28)):
        assert torch.equal(bias[0, :, i, j], table[row_by_rule(j - i, 32, 128)])
    assert sum("relative_attention_bias" in name for name, _ in ours.named_parameters()) == 1


# ------------------------------------------------------------------------------------------------ bricks


@torch.no_grad()
def test_attention_is_not_scaled():
    """Written out: softmax(q k' + bias) v, so that twice the queries are a sharper softmax and nothing else."""
    _, ours = pair("heads wider than the model")
    attention = ours.encoder.block[1].layer[0].SelfAttention
    x, bias = normal(1, 2, 9, 24, dtype=torch.float64), normal(2, 1, 5, 9, 9, dtype=torch.float64)
    expected = torch.zeros(2, 9, 24, dtype=torch.float64)
    for head in range(5):
        at = slice(7 * head, 7 * head + 7)
        q, k, v = (x @ p.weight[at].T for p in (attention.q, attention.k, attention.v))
        scores = q @ k.transpose(1, 2) + bias[0, head]
        expected += scores.softmax(-1) @ v @ attention.o.weight[:, at].T
    assert_close(attention(x, bias), expected, 1e-12)


@torch.no_grad()
def test_the_norm_takes_no_mean_away():
    norm = RMSNorm(24, 1e-2).double()
    norm.weight.copy_(1 + normal(3, 24))
    x = 3 + normal(4, 5, 24, dtype=torch.float64)
    expected = x / (x.square().mean(-1, keepdim=True) + 1e-2).sqrt() * norm.weight
    assert_close(norm(x), expected, 1e-6)  # its mean is taken in float32
    # A mean of bfloat16 squares would be off by a hundredth.
    half = RMSNorm(4096, 1e-6).bfloat16()
    x = 3 + normal(5, 2, 4096, dtype=torch.bfloat16)
    assert_close(half(x).double(), F.rms_norm(x.double(), (4096,), eps=1e-6), 0.01)


# ------------------------------------------------------------------------------------------------ files


def read(folder, dtype=torch.float64):
    with blank():
        model = T5Encoder(T5Config.from_json(read_fields(folder / "config.json")))
    return load_weights(model, find_weights(folder, "model"), dtype, rename=T5Encoder.rename)


@pytest.mark.parametrize("shard", ["5GB", "9KB"])
@torch.no_grad()
def test_a_folder_of_transformers_loads_strictly(tmp_path, shard):
    reference, _ = pair("base")
    reference.save_pretrained(tmp_path, max_shard_size=shard)
    assert (len(find_weights(tmp_path, "model")) > 3) == (shard == "9KB")
    ids = some_ids(3, 20)
    assert_close(read(tmp_path).context(ids), reference(ids).last_hidden_state, 1e-11)


@pytest.mark.parametrize("written", ["shared", "encoder.embed_tokens", "both", "neither", "two"])
def test_the_embedding_is_one_however_often_it_is_written(tmp_path, written):
    """transformers leaves the second out; others write it, or the second alone."""
    from ldm.io.weights import save_weights

    reference, _ = pair("base", torch.float32)
    state = {k: v for k, v in reference.state_dict().items() if k not in ("shared.weight",)}
    table = state.pop("encoder.embed_tokens.weight")
    if written in ("shared", "both", "two"):
        state["shared.weight"] = table
    if written in ("encoder.embed_tokens", "both", "two"):
        state["encoder.embed_tokens.weight"] = table + (written == "two")
    save_weights(state, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(reference.config.to_dict() | {"architectures": None}))
    if written in ("neither", "two"):
        with pytest.raises(LDMError, match=r"shared.weight"):
            read(tmp_path)
    else:
        assert torch.equal(read(tmp_path, torch.float32).shared.weight, table)


@torch.no_grad()
def test_a_whole_t5_is_read_without_its_decoder(tmp_path):
    whole = randomise(T5ForConditionalGeneration(TheirConfig(**BASE, tie_word_embeddings=False))).double().eval()
    whole.save_pretrained(tmp_path)
    ids = some_ids(2, 11)
    assert_close(read(tmp_path).context(ids), whole.encoder(ids).last_hidden_state, 1e-11, at_least=0.01)


# ------------------------------------------------------------------------------------------------ configurations


@pytest.mark.parametrize("fields", [PUBLISHED, FLUX])
def test_the_published_configuration_is_xxl(fields):
    assert T5Config.from_json(fields) == XXL and XXL.hidden_size == 4096


def test_xxl_has_the_shapes_of_transformers_and_its_parameters():
    with blank():
        ours = T5Encoder(replace(XXL, num_layers=2))
        theirs = T5EncoderModel(TheirConfig(**FLUX | {"num_layers": 2}))
    shapes = keys_and_shapes(theirs)
    assert keys_and_shapes(ours) == {k: v for k, v in shapes.items() if k != "encoder.embed_tokens.weight"}
    a_block = sum(p.numel() for p in ours.encoder.block[1].parameters())
    assert sum(p.numel() for p in ours.parameters()) + 22 * a_block == 4_762_310_656


def test_our_json_is_read_by_both(tmp_path):
    config = T5Config.from_json(TINY["few buckets"])
    (tmp_path / "config.json").write_text(json.dumps(config.to_json()))
    assert T5Config.from_json(config.to_json()) == config
    theirs = TheirConfig.from_pretrained(tmp_path)
    for name, value in TINY["few buckets"].items():
        assert getattr(theirs, name) == value
    assert T5Config.from_json(theirs.to_dict()) == config
    assert theirs.is_gated_act and theirs.dense_act_fn == "gelu_new"


@pytest.mark.parametrize(
    "fields,said",
    [
        ({"feed_forward_proj": "relu"}, "feed_forward_proj 'relu'"),
        ({"feed_forward_proj": "gated-silu", "dense_act_fn": "silu"}, "feed_forward_proj 'gated-silu'"),
        ({"dense_act_fn": "relu"}, "dense_act_fn"),
        ({"is_decoder": True}, "is_decoder"),
        ({"architectures": ["UMT5EncoderModel"]}, "UMT5EncoderModel"),
        ({"model_type": "umt5"}, "umt5"),
        ({"attention_window": 7}, "attention_window"),
        ({"num_heads": 0}, "num_heads 0"),
        ({"d_model": "24"}, "d_model"),
        ({"relative_attention_num_buckets": 3}, "3 buckets"),
        ({"relative_attention_max_distance": 8}, "up to 8"),
    ],
)
def test_what_is_not_implemented_is_refused_by_name(fields, said):
    with pytest.raises(LDMError, match=said):
        T5Config.from_json(BASE | fields)


def test_a_file_without_a_feed_forward_means_the_first_t5s():
    fields = {k: v for k, v in BASE.items() if k != "feed_forward_proj"}
    assert TheirConfig(**fields).feed_forward_proj == "relu"
    with pytest.raises(LDMError, match="relu"):
        T5Config.from_json(fields)
