"""Looking inside FLUX: how patches look at words, what every block puts out, the page, the steps, and a record."""

import json
import math

import pytest
import torch
from tiny_flux import FluxModels

import ldm
from ldm.cli import main
from ldm.cli.record import read_record
from ldm.errors import LDMError
from ldm.lab.maps import explicit
from ldm.lab.trace import words_of_pieces
from ldm.models.flux import Flux, FluxConfig, FluxResiduals
from ldm.models.patches import rotate
from ldm.models.unet import Extras

PROMPT = "a large red house, a fish"
FIRST, LAST = "transformer.transformer_blocks.0.attn", "transformer.single_transformer_blocks.2.attn"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return FluxModels(tmp_path_factory.mktemp("flux"))


@pytest.fixture(scope="module")
def traced(models):
    return models.ours("dev").trace(PROMPT, steps=3, width=48, height=32, seed=4)


def test_maps_are_the_attention_that_the_blocks_make(models):
    """Written out by hand of what the first block is given: the text's columns of one softmax over text and picture."""
    pipe = models.ours("dev")
    flux, x = pipe.transformer, torch.randn(2, 4, 4, 6, generator=torch.Generator().manual_seed(0))
    context, pooled = torch.randn(2, 7, 20), torch.randn(2, 24)
    extras = Extras(pooled=pooled, guidance=torch.tensor([3.5, 2.0]))
    with torch.no_grad():
        expected = flux(x, 500.0, context, extras)
        with ldm.watch(pipe, self_attention=True) as seen:
            assert torch.equal(flux(x, 500.0, context, extras), expected)  # looking on changes not one bit
        text, patches = seen.attention(FIRST, picture=1), seen.attention(f"{FIRST}.patches", picture=1)
        assert text.shape == (2, 2, 3, 7) and patches.shape == (2, 2, 3, 6)
        assert torch.allclose(text.sum(-1) + patches.sum(-1), torch.ones(2, 2, 3)) and 0.05 < text.sum(-1).mean() < 0.95
        block, told = flux.transformer_blocks[0], flux.prepare(context, extras)
        vectors, rotary = flux.vectors(500.0, told), flux.rotary(7, 4, 6, x.device)
        from ldm.models.flux import modulate, split
        from ldm.models.patches import pack

        own, other = (split(each, 6) for each in vectors[0])
        q, k, _ = block.attn.own(modulate(flux.x_embedder(pack(x)), *own[:2]))
        q_text, k_text, _ = block.attn.added(modulate(told.text, *other[:2]))
        q, k = (rotate(torch.cat(pair, 1), rotary).transpose(1, 2) for pair in ((q_text, q), (k_text, k)))
        scores = (q @ k.transpose(-1, -2) / math.sqrt(16)).softmax(-1)[1, :, 7:]  # (heads, N, L + N)
    assert torch.allclose(text.flatten(1, 2), scores[..., :7], atol=1e-6)
    assert torch.allclose(patches.flatten(1, 2), scores[..., 7:], atol=1e-6)
    assert (text - patches[..., :1]).abs().max() > 0.05


def test_a_slice_of_the_softmax_is_not_a_softmax_of_the_slice():
    q, k = torch.randn(1, 2, 3, 4), torch.randn(1, 2, 5, 4)
    whole = explicit(q, k)
    assert torch.equal(explicit(q, k, seen=slice(1, 3)), whole[..., 1:3])
    assert torch.allclose(explicit(q, k, average=True, seen=slice(1, 3)), whole.mean(1, keepdim=True)[..., 1:3])


def test_layers_and_bricks_bear_the_transformer_s_names(traced):
    names = [layer.name for layer in traced.record.layers]
    assert names[0] == FIRST and names[1] == f"{FIRST}.patches" and names[-2] == LAST and len(names) == 2 * 5
    assert all(layer.size == (2, 3) for layer in traced.record.layers)
    bricks = traced.record.calls[0].bricks
    assert bricks["transformer.transformer_blocks.1"].shape == (1, 6, 32)  # the picture's stream
    assert bricks["transformer.single_transformer_blocks.2"].shape == (1, traced.settings.max_sequence_length + 6, 32)
    assert bricks["transformer"].shape == (1, 4, 4, 6)
    beside = {each.name for each in traced.record.beside}
    assert "text_encoder" not in beside and "text_encoder_2.encoder.block.1" in beside | {
        "text_encoder_2.encoder.block.1"
    }


def test_maps_by_word_by_step_and_by_kind_of_block(traced):
    assert [word.text for word in traced.words[0]] == ["a", "large", "red", "house", ",", "a", "fish"]
    maps = traced.maps("house")
    assert maps.shape == (3, 4, 6) and 0 < maps.min() and maps.max() < 1
    tokens = next(word.tokens for word in traced.words[0] if word.text == "house")
    both = [traced.record.map(tokens, layer=each) for each in ("transformer_blocks", "single_transformer_blocks")]
    everything = traced.record.map(tokens)
    assert torch.allclose((2 * both[0] + 3 * both[1]) / 5, everything, atol=1e-6)  # every layer counts alike
    assert (both[0] - both[1]).abs().max() > 1e-5


def test_words_of_t5_are_those_of_the_prompt(models):
    tokenizer = models.ours("dev").tokenizer_2
    pieces, words = tokenizer.pieces(PROMPT), words_of_pieces(tokenizer, PROMPT)
    assert [k for word in words for k in word.tokens] == [
        k for k, piece in enumerate(pieces) if tokenizer.decode([tokenizer.ids[piece]]) or piece == "▁"
    ]
    assert "".join(pieces[k] for k in words[3].tokens).replace("▁", "") == "house"


def test_the_page_tells_what_the_model_was_told(traced, tmp_path):
    traced.to_html(tmp_path / "run.html")
    page = (tmp_path / "run.html").read_text()
    assert "told a guidance of 3.5" in page and "house" in page and "not guided" in page


def test_guidance_of_two_parts_is_known_by_name(models):
    pipe = models.ours("dev")
    with ldm.watch(pipe, every_part=True) as seen:
        pipe(PROMPT, negative="a fish", true_guidance=2.0, steps=1, width=32, height=32)
        pipe(PROMPT, steps=1, width=32, height=32)
    assert [call.parts for call in seen.calls] == [("uncond", "cond"), ("cond",)]
    assert seen.calls[0].guidance[0] > 0 and seen.calls[1].guidance is None
    assert (seen.map(2, run=0, part="cond") - seen.map(2, run=0, part="uncond")).abs().max() > 0


def test_what_controlnets_add_is_measured_block_by_block():
    config = FluxConfig(in_channels=16, num_layers=1, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
                        joint_attention_dim=20, pooled_projection_dim=24, axes_dims_rope=(4, 4, 8))  # fmt: skip
    flux = Flux(config)

    class Held:
        flux, backbone, distilled, watchers = True, None, False, []

        def parts(self):
            return {"transformer": self.backbone}

    pipe = Held()
    pipe.backbone = flux
    added = FluxResiduals([torch.full((1, 4, 32), 2.0)], [torch.zeros(1, 4, 32), torch.ones(1, 4, 32)])
    with torch.no_grad(), ldm.watch(pipe) as seen:
        flux(torch.zeros(1, 4, 4, 4), 5.0, torch.zeros(1, 3, 20), Extras(pooled=torch.zeros(1, 24)), added)
    assert torch.allclose(seen.calls[0].residuals[:, 0], torch.tensor([2.0, 0.0, 1.0]) * math.sqrt(4 * 32))


def test_the_command_line_draws_and_draws_again(models, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = str(models.folder("dev"))
    words = ["--model", folder, "--width", "48", "--height", "32", "--steps", "2", "--seed", "3"]
    asked = ["--guidance", "4", "--true-guidance", "2", "--negative", "a fish", "--max-sequence-length", "40"]
    assert main(["generate", PROMPT, *words, *asked, "--out", "picture.png", "--save-steps", "inside"]) == 0
    record = read_record("picture.png")
    assert (record["guidance"], record["true_guidance"], record["max_sequence_length"]) == (4.0, 2.0, 40)
    assert record["sigmas"] == "even" and record["quantise"] is None and record["dtype"] == "float32"
    assert len(list((tmp_path / "inside").glob("step-*.png"))) == 2 or len(list((tmp_path / "inside").iterdir())) >= 3
    assert main(["rerun", "picture.png"]) == 0
    assert "identical" in capsys.readouterr().out
    assert main(["generate", PROMPT, *words, "--out", "picture.png", "--dialect", "a1111"]) == 1
    assert "FLUX reads plain sentences" in capsys.readouterr().err
    with pytest.raises(LDMError, match="max_sequence_length must be a whole number from 1 to 512, not 600"):
        models.ours("dev").settings("x", max_sequence_length=600)


def test_pictures_given_are_filled_and_lead(models, tmp_path, capsys, monkeypatch):
    from PIL import Image

    monkeypatch.chdir(tmp_path)
    Image.effect_noise((48, 32), 90).convert("RGB").save("photo.png")
    Image.linear_gradient("L").resize((48, 32)).save("mask.png")
    words = ["--steps", "2", "--seed", "3", "--guidance", "30"]
    fill = ["--model", str(models.folder("fill")), "--image", "photo.png", "--mask", "mask.png"]
    assert main(["generate", PROMPT, *words, *fill, "--out", "filled.png"]) == 0
    assert main(["rerun", "filled.png"]) == 0
    led = ["--model", str(models.folder("control")), "--image", "photo.png"]
    assert main(["generate", PROMPT, *words, *led, "--out", "led.png"]) == 0
    assert main(["rerun", "led.png"]) == 0
    assert capsys.readouterr().out.count("identical") == 2
    assert main(["generate", PROMPT, *words, *led, "--strength", "0.5", "--out", "none.png"]) == 1
    assert "begins from noise" in capsys.readouterr().err


def test_records_of_before_flux_are_read(tmp_path):
    from ldm.cli.record import BEFORE, SURROUNDS

    assert BEFORE["true_guidance"] == 1.0 and BEFORE["max_sequence_length"] is None and BEFORE["quantise"] is None
    assert json.loads(json.dumps(BEFORE)) == BEFORE and "memory" in SURROUNDS


def test_tokens_of_both_encoders_are_told(models, capsys):
    assert main(["tokens", PROMPT, "--model", str(models.folder("dev"))]) == 0
    out = capsys.readouterr().out
    tokenizer = models.ours("dev").tokenizer_2
    assert f"text_encoder_2 (T5): {len(tokenizer.encode(PROMPT)) + 1} tokens" in out
    assert "▁red" in out and "</s>" in out and out.index("text_encoder") < out.index("▁red")
