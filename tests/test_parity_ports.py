"""`ldm parity --against PORT.py`: a correct port is equal; each planted difference is found, with block and cause.

Against a port ours is the reference; neither diffusers nor transformers take part. The ports are ldm's own parts with
one thing done otherwise, as people's own code does.
"""

import json

import pytest

from ldm.cli import main

PORT = """
from dataclasses import replace

import torch
import torch.nn.functional as F

import ldm
from ldm.models import blocks, unet, vae
from ldm.models.unet import Extras


def load(folder, device, dtype):
    pipe = ldm.load(folder, dtype, device)
    net, text, coder = pipe.unet, pipe.text_encoder, pipe.vae
    block = net.down_blocks[0].attentions[0].transformer_blocks[0]
    port = {{
        "tokenizer": lambda prompts: pipe.tokenizer(prompts).ids,
        "text_encoder": lambda ids: (text(ids).last, text(ids).pooled),
        "vae_encode": coder.encode,
        "vae_decode": coder.decode,
        "unet": lambda x, t, context, extras: net(x, t, context, Extras(**extras)),
        "unet_module": net,
        "text_encoder_module": text,
        "vae_module": coder,
    }}
{planted}
    return port
"""

FORWARD = """
    class Other(type({of})):
        def forward(self, {arguments}):
{body}
    {of}.__class__ = Other
"""


def forward(of, arguments, *body):
    """Code that gives one module another `forward`."""
    lines = "\n".join(f"            {line}" for line in body)
    return FORWARD.format(of=of, arguments=arguments, body=lines)


FF = "down_blocks.0.attentions.0.transformer_blocks.0.ff.net.0"
ATTN = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
SPLIT = "h, gate = self.proj(x).chunk(2, dim=-1)"
HEADS = "q, k, v = (self.split_heads(p(x)) for p in (self.to_q, self.to_k, self.to_v))"
OUT = "return self.to_out[0](h.transpose(1, 2).flatten(2))"

PLANTED = {  # name -> what is planted, the stations walked, the block, words of the cause
    "eps of a norm": ("    net.down_blocks[1].resnets[0].norm1.eps = 1e-6", "unet", "down_blocks.1.resnets.0.norm1",
                      "with eps 1e-06 instead of 1e-05"),
    "eps of a transformer's norm": ("    net.mid_block.attentions[0].norm.eps = 1e-5", "unet",
                                    "mid_block.attentions.0.norm", "with eps 1e-05 instead of 1e-06"),
    "groups of a norm": ("    net.mid_block.resnets[1].norm2.num_groups = 8", "unet", "mid_block.resnets.1.norm2",
                         "with 8 groups instead of 4"),
    "GELU by tanh": (forward("block.ff.net[0]", "x", SPLIT, "return h * F.gelu(gate, approximate='tanh')"), "unet", FF,
                     "with GELU by tanh"),
    "halves of GEGLU": (forward("block.ff.net[0]", "x", SPLIT, "return gate * F.gelu(h)"), "unet", FF,
                        "with GELU (erf) and its halves exchanged"),
    "padding of the VAE": (
        "    down = coder.encoder.down_blocks[1].downsamplers[0]\n"
        "    down.asymmetric, down.conv.padding = False, (1, 1)",
        "vae", "encoder.down_blocks.1.downsamplers.0", "with padding all round"),
    "number of heads": ("    block.attn1.heads = 4", "unet", ATTN, "with 4 heads instead of 2"),
    "scale of attention": (
        forward("block.attn1", "x, context=None", HEADS, "h = F.scaled_dot_product_attention(q, k, v, scale=1.0)", OUT),
        "unet", ATTN, "without scaling"),
    "queries and keys": ("    block.attn2.to_v, block.attn2.to_k = block.attn2.to_k, block.attn2.to_v", "unet",
                         ATTN.replace("attn1", "attn2") + ".to_k", "with the weights of to_v instead of to_k"),
    "a residual": (
        forward("block", "x, context", "x = x + self.attn1(self.norm1(x))", "x = self.attn2(self.norm2(x), context)",
                "return x + self.ff(self.norm3(x))"),
        "unet", ATTN.removesuffix(".attn1"), "without adding the input of its cross-attention"),
    "order of the skips": (
        forward("net.up_blocks[1]", "x, skips, emb, context", "for i in range(len(self.resnets)):",
                "    x = self.layer(i, torch.cat([skips.pop(), x], dim=1), emb, context)",
                "return self.upsamplers[0](x, skips[-1].shape[2:])"),
        "unet", "up_blocks.1", "as its last"),
    "sines first": ("    net.config = replace(net.config, flip_sin_to_cos=False)", "unet", "",
                    "with sines and cosines exchanged"),
    "freq_shift": ("    net.config = replace(net.config, freq_shift=1.0)", "unet", "",
                   "with freq_shift 1 instead of 0"),
    "timestep cut": ("    port['unet'] = lambda x, t, context, extras: net(x, t.long(), context)", "unet", "",
                     "with the timestep cut to whole numbers"),
    "a bias": ("    net.mid_block.resnets[0].conv1.bias = None", "unet", "mid_block.resnets.0.conv1",
               "without its bias"),
    "timestep's SiLU": (
        forward("net.mid_block.resnets[0]", "x, emb=None", "h = self.conv1(F.silu(self.norm1(x)))",
                "h = h + self.time_emb_proj(emb)[:, :, None, None]",
                "return x + self.conv2(F.silu(self.norm2(h)))"),
        "unet", "mid_block.resnets.0", "with the timestep's SiLU left out"),
    "activation of the text encoder": ("    text.encoder.layers[1].mlp.act = F.gelu", "text", "encoder.layers.1.mlp",
                                       "with GELU (erf) instead of quick_gelu"),
    "causal mask": ("    text.encoder.layers[0].self_attn.causal = False", "text", "encoder.layers.0.self_attn",
                    "without the causal mask"),
    "last layer but one": ("    port['text_encoder'] = lambda ids: text(ids).hidden[-2]", "text", "",
                           "with the last layer but one"),
    "scaling of the latents": ("    port['vae_decode'] = coder.reconstruct", "vae", "",
                               "its input is 0.18215 times ours, and scaling_factor is 0.18215"),
    "bfloat16 inside": (
        forward("net.conv_in", "x",
                "return F.conv2d(x.bfloat16(), self.weight.bfloat16(), self.bias.bfloat16(), padding=1).to(x.dtype)"),
        "unet", "conv_in", "calculated in bfloat16"),
    "weights transposed": ("    weight = block.attn1.to_q.weight\n    weight.data = weight.data.T.contiguous()",
                           "weights", ATTN + ".to_q.weight", "it is transposed"),
    "weights rounded": ("    weight = text.encoder.layers[1].mlp.fc1.weight\n    weight.data = weight.half().to(dtype)",
                        "weights", "encoder.layers.1.mlp.fc1.weight", "it was rounded to float16"),
    "weights of another layer": ("    net.mid_block.resnets[1].conv1.weight = net.mid_block.resnets[1].conv2.weight",
                                 "weights", "mid_block.resnets.1.conv1.weight", "it holds the numbers of"),
}  # fmt: skip


@pytest.fixture
def against(models, tmp_path, capsys):
    """Walk the tiny model beside a port with something planted; status, report and what was printed."""

    def walk(planted="", *words):
        port = tmp_path / "port.py"
        port.write_text(PORT.format(planted=planted))
        told = ["--dtype", "float64", "--json", str(tmp_path / "report.json"), *words]
        status = main(["parity", str(models.folder("sd1")), "--against", str(port), *told])
        out, err = capsys.readouterr()
        return status, json.loads((tmp_path / "report.json").read_text()), out + err

    return walk


def test_a_correct_port_is_equal(against):
    status, report, out = against()
    assert status == 0 and report["equal"] and "ldm and port.py are equal on sd1, float64, cpu" in out
    verdicts = {line["station"]: line["verdict"] for line in report["lines"]}
    equal = ("weights", "tokenizer", "text encoder", "VAE encode", "VAE decode", "UNet")
    assert verdicts == dict.fromkeys(equal, "equal") | dict.fromkeys(("samplers", "pipelines"), "skipped")
    assert all(line["allowed"] <= 1e-11 for line in report["lines"] if line["verdict"] == "equal")


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_difference_is_found_with_block_and_cause(against, name):
    planted, only, block, cause = PLANTED[name]
    status, report, out = against(planted, "--only", only)
    assert status == 1 and not report["equal"]
    (found,) = report["divergences"]
    assert found["block"] == block, out
    assert any(cause in each for each in found["causes"]), out
    assert f"likely cause: {next(each for each in found['causes'] if cause in each)}" in out
    assert len(found["causes"]) <= 2, "what explains anything explains nothing"


MORE = {  # what no experiment on a block explains
    "the answer doubled": ("    port['unet'] = lambda x, t, context, extras: 2 * net(x, t, context)", "unet",
                           "its output is 2 times ours"),
    "padding of the prompts": (
        "    port['tokenizer'] = lambda prompts: pipe.tokenizer(prompts).ids.where("
        "pipe.tokenizer(prompts).mask.bool(), torch.tensor(0))",
        "tokenizer", "only the padding differs"),
    "end of text": (
        "    port['tokenizer'] = lambda prompts: pipe.tokenizer(prompts).ids.where("
        "pipe.tokenizer(prompts).ids != pipe.tokenizer.bos_id, torch.tensor(5))",
        "tokenizer", "position 0: ours"),
    "a shape": ("    port['vae_decode'] = lambda x0: coder.decode(x0)[:, :, 1:]", "vae", "the reference's is"),
    "a dtype": ("    port['vae_decode'] = lambda x0: coder.decode(x0).float()", "vae", "dtype float32"),
    "an error": ("    port['unet'] = lambda *given: 1 / 0", "unet", "port.py failed: ZeroDivisionError"),
    "no module to look into": (
        "    port |= {'unet': lambda x, t, context, extras: 2 * x, 'unet_module': None}", "unet",
        "port.py shows no module of it: give load(...) a unet_module"),
    "pooled at the end": ("    port['text_encoder'] = lambda ids: (text(ids).last, text(ids).last[:, -1])", "text",
                          "pooled at the last position"),
}  # fmt: skip


@pytest.mark.parametrize("name", MORE)
def test_what_else_may_differ_is_told(against, name):
    planted, only, told = MORE[name]
    status, report, out = against(planted, "--only", only)
    assert status == 1 and told in out and any(line["verdict"] == "differs" for line in report["lines"])


@pytest.mark.parametrize("planted", ["    port = {'unet': port['unet']}", "    port.pop('tokenizer')"])
def test_what_a_port_lacks_is_skipped_with_a_line(against, planted):
    status, report, out = against(planted, "--only", "tokenizer,unet")
    found = [line for line in report["lines"] if not line["what"].startswith("each of ")]  # where it shows its modules
    assert status == 0 and "skipped: port.py offers none" in out and len(found) == 2


def test_an_object_serves_as_well_as_a_dict(against):
    planted = "    from types import SimpleNamespace\n    port = SimpleNamespace(**port, other=3)"
    status, report, _ = against(planted, "--only", "weights,text,unet")
    assert status == 0 and all(line["verdict"] == "equal" for line in report["lines"])


def test_a_port_may_import_what_lies_beside_it(against, tmp_path):
    (tmp_path / "beside_the_port.py").write_text("def double(x):\n    return 2 * x\n")
    planted = (
        "    import beside_the_port\n    decode = coder.decode\n"
        "    port['vae_decode'] = lambda x0: beside_the_port.double(decode(x0))"
    )
    status, _, out = against(planted, "--only", "vae")
    assert status == 1 and "its output is 2 times ours" in out


def test_half_precision_that_is_worse_than_ours_is_seen(against):
    """The port's rounding of its weights to fewer bits, where ours has all eight."""
    planted = "    for p in net.parameters():\n        p.data = (p * 64).round() / 64"
    status, report, _ = against(planted, "--only", "unet", "--dtype", "bfloat16")
    assert status == 1 and report["lines"][0]["relative"] > 1.05 * report["lines"][0]["allowed"]


WRONG = {
    "": "has no function load",
    "def load(": "cannot be loaded (SyntaxError",
    "def load(*given):\n    return {'unett': 1}": "Did you mean 'unet'?",
    "def load(*given):\n    return {}": "returned nothing to compare",
    "def load(*given):\n    raise KeyError('vae')": "cannot be loaded (KeyError",
}


@pytest.mark.parametrize("text", WRONG)
def test_a_port_that_cannot_be_loaded_is_refused_in_a_sentence(models, tmp_path, capsys, text):
    (tmp_path / "port.py").write_text(text)
    assert main(["parity", str(models.folder("sd1")), "--against", str(tmp_path / "port.py")]) == 1
    err = capsys.readouterr().err
    assert err.startswith("ldm: ") and err.count("\n") == 1 and WRONG[text] in err
