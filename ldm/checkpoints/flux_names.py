"""FLUX's original names: where each tensor of ours lies in a file of Black Forest Labs, below no prefix.

From ours, which are those of diffusers' `FluxTransformer2DModel`, to theirs; i is a block:

    x_embedder, context_embedder            img_in, txt_in
    time_text_embed.timestep_embedder, .guidance_embedder, .text_embedder
                                            time_in, guidance_in, vector_in; linear_1, linear_2: in_layer, out_layer
    transformer_blocks.i                    double_blocks.i
        norm1.linear, norm1_context.linear      img_mod.lin, txt_mod.lin
        attn.to_q, .to_k, .to_v                 img_attn.qkv: one tensor, the three under each other
        attn.add_q_proj, ...                    txt_attn.qkv, likewise
        attn.norm_q.weight, .norm_k             img_attn.norm.query_norm.scale, .key_norm
        attn.norm_added_q, .norm_added_k        txt_attn.norm.query_norm.scale, .key_norm
        attn.to_out.0, .to_add_out              img_attn.proj, txt_attn.proj
        ff.net.0.proj, .net.2; ff_context       img_mlp.0, .2; txt_mlp
    single_transformer_blocks.i             single_blocks.i
        norm.linear, proj_out                   modulation.lin, linear2
        attn.to_q, .to_k, .to_v, proj_mlp       linear1: q, k and v of the width, then the MLP of four times that
        attn.norm_q.weight, .norm_k             norm.query_norm.scale, .key_norm
    norm_out.linear                         final_layer.adaLN_modulation.1: shift and scale, where ours has scale first
    proj_out                                final_layer.linear
"""

import re

OUTER = {
    "x_embedder": "img_in",
    "context_embedder": "txt_in",
    "time_text_embed.timestep_embedder.linear_1": "time_in.in_layer",
    "time_text_embed.timestep_embedder.linear_2": "time_in.out_layer",
    "time_text_embed.guidance_embedder.linear_1": "guidance_in.in_layer",
    "time_text_embed.guidance_embedder.linear_2": "guidance_in.out_layer",
    "time_text_embed.text_embedder.linear_1": "vector_in.in_layer",
    "time_text_embed.text_embedder.linear_2": "vector_in.out_layer",
    "norm_out.linear": "final_layer.adaLN_modulation.1",
    "proj_out": "final_layer.linear",
}
DOUBLE = {
    "norm1.linear": "img_mod.lin",
    "norm1_context.linear": "txt_mod.lin",
    "attn.norm_q": "img_attn.norm.query_norm",
    "attn.norm_k": "img_attn.norm.key_norm",
    "attn.norm_added_q": "txt_attn.norm.query_norm",
    "attn.norm_added_k": "txt_attn.norm.key_norm",
    "attn.to_out.0": "img_attn.proj",
    "attn.to_add_out": "txt_attn.proj",
    "ff.net.0.proj": "img_mlp.0",
    "ff.net.2": "img_mlp.2",
    "ff_context.net.0.proj": "txt_mlp.0",
    "ff_context.net.2": "txt_mlp.2",
}
SINGLE = {
    "norm.linear": "modulation.lin",
    "attn.norm_q": "norm.query_norm",
    "attn.norm_k": "norm.key_norm",
    "proj_out": "linear2",
}
JOINED = {  # what stands in one tensor with others, and which of its rows it is (`names.SHARES`)
    "transformer_blocks": {f"attn.to_{x}": ("img_attn.qkv", x) for x in "qkv"}
    | {f"attn.add_{x}_proj": ("txt_attn.qkv", x) for x in "qkv"},
    "single_transformer_blocks": {f"attn.to_{x}": ("linear1", f"{x} of 7") for x in "qkv"}
    | {"proj_mlp": ("linear1", "mlp of 7")},
}
BLOCKS = {"transformer_blocks": ("double_blocks", DOUBLE), "single_transformer_blocks": ("single_blocks", SINGLE)}


def original(key: str) -> tuple[str, str]:
    """(its name in an original file, its form there: `names.Origin`) of a tensor of ours."""
    module, leaf = key.rsplit(".", 1)
    if module in OUTER:
        return f"{OUTER[module]}.{leaf}", "swapped" if module == "norm_out.linear" else "same"
    kind, i, rest = re.fullmatch(r"(\w+)\.(\d+)\.(.+)", module).groups()
    blocks, table = BLOCKS[kind]
    if rest in JOINED[kind]:
        name, form = JOINED[kind][rest]
        return f"{blocks}.{i}.{name}.{leaf}", form
    leaf = "scale" if ".norm_" in f".{rest}" else leaf  # the norms of q and k have gains alone
    return f"{blocks}.{i}.{table[rest]}.{leaf}", "same"
