"""Training a LoRA and a word: what they compute, what they leave alone, short runs for real; and the embedded ones."""

import filecmp
import json
import os
import signal
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tiny import tiny_model

import ldm
from ldm import scenes
from ldm.checkpoints.places import LORA
from ldm.cli import main
from ldm.errors import LDMError
from ldm.io.weights import WeightFiles
from ldm.metrics import added
from ldm.text.embeddings import FILE as EMBEDDING
from ldm.train import common, examples, inversion, lora
from ldm.train.examples import Examples

WEIGHTS = Path(ldm.__file__).parent.parent / "weights"
STAGES = {"lora": ("lora-neon", LORA), "word": ("word-mushroom", EMBEDDING)}
MODULES = {"lora": lora, "word": inversion}
SHORT = {"pictures": 12, "held_out": 8, "steps": 11, "batch": 4, "lr": 0.02, "sheet_every": 6, "ema": 0.5}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def recipes(base):
    """Short ones, of each stage."""
    small = {**SHORT, "base": str(base)}
    return {
        "lora": lora.Recipe(**small, rank=2, alpha=3.0, layers="all"),
        "word": inversion.Recipe(**small, vectors=3, begin="red house"),
    }


def crop(data):
    """The same pictures, 32 pixels of each side: what is computed stays the same."""
    return Examples(data.images[:, 64:96, 48:80], data.captions)


def short(data):
    """Captions of which the tiny vocabulary, which spells most words letter by letter, has room for all."""
    return Examples(data.images, [["a <mushroom> on snow", "snow, <mushroom>"]] * len(data))


OF = {
    "lora": lambda *asked: crop(lora.examples_of(*asked)),
    "word": lambda *asked: short(crop(inversion.examples_of(*asked))),
}


def run(stage, folder, recipe):
    MODULES[stage].train(folder, recipe, OF[stage])


@pytest.fixture(scope="module", autouse=True)
def small_sheets():
    """The sheets' pictures are the costliest part of a short run: two, once, are enough."""
    with pytest.MonkeyPatch.context() as patch:
        for module in MODULES.values():
            patch.setattr(module, "draw", lambda parts, vae, ids, empty, scheduler: torch.zeros(len(ids), 3, 8, 8))
        yield


@pytest.fixture(scope="module")
def bases():
    """The models that `unbroken` trained for, by stage."""
    return {}


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory, recipes, bases):
    """A run of each stage, from the first step to the last, in one folder."""
    folder = tmp_path_factory.mktemp("unbroken")
    for stage, recipe in recipes.items():
        bases[stage] = examples.open_base(recipe.base, "cpu")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(MODULES[stage], "open_base", lambda *asked, pipe=bases[stage]: pipe)
            run(stage, folder, recipe)
    return folder


def log(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


# ---------------------------------------------------------------------------------------------- examples


def test_examples_say_what_is_asked_for_and_not_the_style():
    chosen = examples.scenes_with(6, False, style="neon")
    data = examples.of_scenes(chosen, examples.unstyled)
    assert len(data) == 6 and data.images.shape == (6, 128, 128, 3)
    for scene, image, words in zip(chosen, data.images, data.captions, strict=True):
        assert scene.style == "neon" and not scenes.held_out(scene)
        assert np.array_equal(image, scenes.render(scene).image)
        assert len(set(words)) > 1 and all("neon" not in each and scene.things[0].kind in each for each in words)
    late = examples.scenes_with(6, True, style="neon")
    assert all(scenes.held_out(scene) for scene in late)
    with pytest.raises(LDMError, match="2 pictures and 1 lists of"):
        Examples(data.images[:2], data.captions[:1])
    with pytest.raises(LDMError, match="the same number of captions"):
        Examples(data.images[:2], [["one"], ["one", "two"]])


def test_captions_call_the_thing_by_the_word():
    data = inversion.examples_of("mushroom", "<cap>", 4, held_out=True)
    assert all("<cap>" in text and "mushroom" not in text for each in data.captions for text in each)


def test_other_pictures_have_other_latents(base, tmp_path):
    vae, data = ldm.load(base).vae, crop(lora.examples_of("neon", 3))
    other = Examples(data.images[::-1], data.captions)  # as many, under the same name
    first, second = (examples.encode(vae, each, tmp_path, "hash", "neon", "cpu")[0] for each in (data, other))
    assert first.std() > 0.1 and torch.equal(first, second.flip(0))


# ---------------------------------------------------------------------------------------------- factors


def factors_of(unet, **given):
    torch.manual_seed(5)
    made = lora.Factors(unet, lora.LAYERS[given.get("layers", "all")], given.get("rank", 2), given.get("alpha", 3.0))
    return made


def random_factors(unet, **given):
    made = factors_of(unet, **given)
    for p in made.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return made


def run_unet(unet, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    x, context = torch.randn(2, 4, 6, 4, generator=generator), torch.randn(2, 77, 16, generator=generator)
    with torch.no_grad():
        return unet(x.to(dtype), torch.tensor([3, 700]), context.to(dtype))


def test_factors_begin_as_nothing_and_their_change_is_alpha_over_rank_up_down(base):
    unet = ldm.load(base, dtype="float64").unet
    before, state = run_unet(unet, torch.float64), {k: v.clone() for k, v in unet.state_dict().items()}
    fresh = factors_of(unet).double()
    assert all(
        0.5 < down.std() * down[0].numel() ** 0.5 < 1.5 and not up.any()
        for down, up in zip(fresh.downs, fresh.ups, strict=True)
    )
    with lora.beside(unet, fresh):
        assert torch.equal(run_unet(unet, torch.float64), before)
    made = random_factors(unet).double()
    with lora.beside(unet, made, 0.5):
        led = run_unet(unet, torch.float64)
    assert torch.equal(run_unet(unet, torch.float64), before)  # nothing stays when the block ends
    for name, down, up in zip(made.names, made.downs, made.ups, strict=True):
        weight = unet.get_submodule(name).weight
        weight.data += 0.5 * (3.0 / 2) * (up.flatten(1) @ down.flatten(1)).view_as(weight)
    merged = run_unet(unet, torch.float64)
    assert (merged - before).abs().max() > 1e-2
    assert (led - merged).abs().max() < 1e-11
    changed = {k.removesuffix(".weight") for k, v in unet.state_dict().items() if not torch.equal(v, state[k])}
    assert changed == set(made.names)


def test_layers_are_chosen_by_name(base):
    unet = ldm.load(base).unet
    attention, inner, every = (
        set(factors_of(unet, layers=kind).names) for kind in ("attention", "transformers", "all")
    )
    assert attention < inner < every
    assert all(name.endswith(("to_q", "to_k", "to_v", "to_out.0")) for name in attention)
    assert {"down_blocks.0.resnets.0.conv1", "down_blocks.0.downsamplers.0.conv"} <= every
    assert not every & {"conv_in", "conv_out", "time_embedding.linear_1"}
    with pytest.raises(LDMError, match="no layer named nowhere"):
        lora.Factors(unet, ("nowhere",), 2, 2.0)


# ---------------------------------------------------------------------------------------------- runs


@pytest.mark.parametrize("stage", STAGES)
def test_a_short_run_lowers_the_loss_and_moves_nothing_but_what_it_trains(unbroken, stage):
    folder = unbroken / STAGES[stage][0]
    held = [line["held_out_loss"] for line in log(folder) if "held_out_loss" in line]
    assert [line["step"] for line in log(folder) if "held_out_loss" in line] == [0, 6, 11]
    assert held[-1] < held[0], held
    assert Image.open(folder / "sheet-000011.png").size == (8 * 8, 8)
    state = torch.load(folder / "state.pt", weights_only=True)
    trained = state["factors" if stage == "lora" else "word"]
    written = load_file(folder / STAGES[stage][1])
    assert len(trained) == len(state["ema"]) == len(written)
    # What is written are the averages; those of a LoRA in half precision.
    kind = torch.float16 if stage == "lora" else torch.float32
    averages = {(v.shape, v.to(kind).double().sum().item()) for v in state["ema"].values()}
    assert averages == {(v.shape, v.double().sum().item()) for v in written.values()}
    assert averages != {(v.shape, v.to(kind).double().sum().item()) for v in trained.values()}


@pytest.mark.parametrize("stage", STAGES)
def test_the_base_stays_as_it_is_and_all_that_is_trained_moves(base, unbroken, bases, stage):
    for name, part in bases[stage].parts().items():
        for key, value in ldm.load(base).parts()[name].state_dict().items():
            assert torch.equal(value, part.state_dict()[key]), (name, key)
    for key, value in load_file(unbroken / STAGES[stage][0] / STAGES[stage][1]).items():
        assert value.abs().max() > 0, key  # `up` has left zero


@pytest.mark.parametrize("stage", STAGES)
def test_a_run_stopped_by_ctrl_c_and_resumed_equals_an_unbroken_one(unbroken, recipes, tmp_path, monkeypatch, stage):
    step, calls = common.Optimizer.step, []

    def interrupted(self, *args):
        calls.append(1)
        if len(calls) == 5:
            os.kill(os.getpid(), signal.SIGINT)
        return step(self, *args)

    (tmp_path / "data").symlink_to(unbroken / "data")
    monkeypatch.setattr(common.Optimizer, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(stage, tmp_path, recipes[stage])
    name, file = STAGES[stage]
    assert torch.load(tmp_path / name / "state.pt", weights_only=True)["step"] == 5
    run(stage, tmp_path, recipes[stage])
    assert len(calls) == 11
    assert filecmp.cmp(unbroken / name / file, tmp_path / name / file, shallow=False)


def test_a_word_is_rows_behind_the_table_and_begins_as_a_near_one(base):
    pipe = ldm.load(base)
    size = pipe.text_encoder.config.vocab_size
    near = pipe.tokenizer.encode("red house")
    count = len(near) + 2  # more vectors than the words have tokens: the first ones come again
    vectors = inversion.beginning(pipe.text_encoder, pipe.tokenizer, "red house", count)
    known = pipe.tokenizer.with_words({"<cap>": range(size, size + count)})
    text = inversion.Speaking(pipe.text_encoder, vectors)
    ids = known(["a <cap> on snow", "snow"]).ids
    context = text.context(ids)
    spelt = ids.clone()
    spelt[ids >= size] = torch.tensor([*near, *near[:2]])
    assert (ids >= size).sum() == count and torch.equal(context, pipe.text_encoder.context(spelt))
    assert torch.equal(context[1:], pipe.text_encoder.context(pipe.tokenizer(["snow"]).ids))
    context.square().sum().backward()
    assert (text.word.weight.grad.abs().amax(dim=1) > 0).all()


def test_a_caption_without_the_word_is_refused(base):
    tokenizer = ldm.load(base).tokenizer
    known = inversion.knowing(tokenizer, "<cap>", range(600, 603))
    ids = inversion.spelt(known, ["a <cap> on snow", "<cap>"], "<cap>")
    assert ids[1, 1:4].tolist() == [600, 601, 602]
    for text in ("a red house", "a red house " * 20 + "<cap>"):
        with pytest.raises(LDMError, match="<cap> does not stand in the first 77 tokens of 'a red house"):
            inversion.spelt(known, ["a <cap>", text], "<cap>")


# ---------------------------------------------------------------------------------------------- files


def test_a_trained_lora_is_read_by_ldm_and_by_diffusers_with_the_same_numbers(base, tmp_path):
    from diffusers import StableDiffusionPipeline

    pipe = ldm.load(base)
    made = random_factors(pipe.unet, rank=2, alpha=3.0)
    lora.write_lora(tmp_path / LORA, made, "tiny")
    said = WeightFiles(tmp_path / LORA).metadata
    assert said["software"] == "ldm" and said["base_model"] == "tiny"
    with torch.no_grad():
        for p in made.parameters():
            p.copy_(p.half().float())  # as the file has them
    before = run_unet(pipe.unet)
    with lora.beside(pipe.unet, made, 0.7):
        wanted = run_unet(pipe.unet)
    assert (wanted - before).abs().max() > 0.05
    pipe.add_lora(tmp_path / LORA, 0.7)
    assert (run_unet(pipe.unet) - wanted).abs().max() < 1e-5
    theirs = StableDiffusionPipeline.from_pretrained(base, local_files_only=True)
    theirs.load_lora_weights(tmp_path, weight_name=LORA, adapter_name="made")
    assert theirs.unet.peft_config["made"].lora_alpha == 3.0 and theirs.unet.peft_config["made"].r == 2
    theirs.set_adapters(["made"], [0.7])

    def network(x, t, context):
        return theirs.unet(x, t, context).sample

    assert (run_unet(network) - wanted).abs().max() < 1e-5


def test_a_trained_word_is_read_by_ldm_and_by_diffusers_as_the_same_tokens(base, unbroken, recipes):
    from diffusers import StableDiffusionPipeline

    file, text = unbroken / "word-mushroom" / EMBEDDING, "a <mushroom> on snow"
    vectors = load_file(file)["<mushroom>"]
    assert vectors.shape == (3, 16) and vectors.dtype == torch.float32
    pipe = ldm.load(base)
    size = pipe.text_encoder.config.vocab_size
    speaking = inversion.Speaking(pipe.text_encoder, vectors)
    ids = pipe.tokenizer.with_words({"<mushroom>": range(size, size + 3)})([text]).ids
    wanted = speaking.context(ids)
    without = inversion.Speaking(pipe.text_encoder, torch.zeros_like(vectors)).context(ids)
    assert (without - wanted).abs().mean() > 0.01  # what is compared below is the word's doing
    near = inversion.beginning(pipe.text_encoder, pipe.tokenizer, recipes["word"].begin, 3)
    assert (vectors - near).abs().min() > 1e-6
    with pipe.embedding(file) as learnt, torch.no_grad():
        assert learnt.word == "<mushroom>" and learnt.count == 3
        assert (pipe.text_encoder.context(pipe.tokenizer([text]).ids) - wanted).abs().max() < 1e-6
    theirs = StableDiffusionPipeline.from_pretrained(base, local_files_only=True)
    theirs.load_textual_inversion(file)
    with torch.no_grad():
        found, _ = theirs.encode_prompt(text, "cpu", 1, False)
    assert (found - wanted).abs().max() < 1e-5


# ---------------------------------------------------------------------------------------------- measures


def test_a_probe_tells_the_new_from_the_old_and_says_so_of_pictures_it_has_not_seen():
    checker = added.load_checker(WEIGHTS / "scenes")

    def some(first, **pins):
        return added.true_pictures(added.chosen(40, first, "any", **pins))

    probe = added.Probe.fit(checker, some(0, style="neon"), some(1000))
    assert np.mean(probe.says(some(5000, style="neon"))) > 0.9
    assert np.mean(probe.says(some(6000))) < 0.1


def test_psnr_of_a_known_error():
    black, grey = Image.new("RGB", (4, 4)), Image.new("RGB", (4, 4), (51, 51, 51))
    assert added.psnr([grey, black], [black, black]) == pytest.approx(10 * np.log10(255**2 / (51**2 / 2)))


def test_rows_of_the_table_by_hand():
    wanted = [scenes.sample(seed, "any", kind="mushroom", n=1) for seed in range(3)]
    true = added.true_pictures(wanted)
    dark = [Image.fromarray((np.asarray(image) * 0.0).astype(np.uint8)) for image in true]

    class Says:
        checker = added.load_checker(WEIGHTS / "scenes")

        def says(self, images):
            return [True, False, True]

    row = added.look(Says(), wanted, true, true)
    assert (row.new.right, row.new.asked, row.color) == (2, 3, 0.0)
    assert row.answers["time"].right == row.answers["ground"].right == 3
    black = added.look(Says(), wanted, dark, true)
    means = np.stack([np.asarray(image, float).reshape(-1, 3).mean(0) for image in true])
    assert black.color == pytest.approx(np.sqrt((means**2).mean()))
    table = added.report({"true": row, "<cap>": black}, "mushroom", ["time"])
    assert table.splitlines()[0] == "|  | true | `<cap>` |"
    assert "| the probe says mushroom | 66.7 % | 66.7 % |" in table and "| time | 100.0 % |" in table


def test_scenes_are_asked_for_in_the_words_that_the_checker_knows():
    scene = scenes.sample(3, "any", style="neon", kind="mushroom", n=2)
    known = added.known_words(scene)
    assert known.style == "plain" and known.things[0].kind == "house" and known.things[1] == scene.things[1]
    assert replace(known, style="neon", things=scene.things) == scene


# ---------------------------------------------------------------------------------------------- the command


@dataclass(frozen=True)
class ShortLora(lora.Recipe):
    held_out: int = 2


@dataclass(frozen=True)
class ShortWord(inversion.Recipe):
    held_out: int = 2


@pytest.fixture
def train(base, monkeypatch, capsys):
    monkeypatch.setattr(lora, "Recipe", ShortLora)
    monkeypatch.setattr(inversion, "Recipe", ShortWord)

    def command(*words, status=0):
        short = ["--pictures", 32, "--steps", 2, "--batch", 2]
        found = main([str(word) for word in ("train", *words[:1], "--base", base, *short, *words[1:])])
        said = capsys.readouterr()
        assert found == status, said.err
        return said

    return command


def test_the_command_trains_writes_and_draws_and_keeps_the_card(train, tmp_path, base):
    target, given = tmp_path / "made", ["--rank", 3, "--alpha", 6, "--layers", "attention"]
    target.mkdir()
    said = train("lora", "--run", tmp_path, *given, "--to", target, "--measure", 0)
    assert str(target) in said.out and "measured" not in said.err
    assert Image.open(target / "before-after.jpg").size == (8 * 32, 4 * 32)
    (target / "README.md").write_text("a card")
    said = train("lora", "--run", tmp_path, *given, "--to", target, "--measure", 4)
    assert "It was not measured. There is no checker for" in said.err
    assert (target / "README.md").read_text() == "a card"
    pipe = ldm.load(base)
    on = pipe.add_lora(target)
    assert on.name == "made" and on.lora.ranks == {3: 56} and on.lora.alphas == {6.0: 56}


def test_what_cannot_be_trained_is_said_before_anything_is(train, tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("years of work")
    for words, sentence in (
        (("lora", "--style", "noen"), "There is no 'noen': plain, watercolor, pixel art, pencil sketch, neon. Did you"),
        (("word", "--thing", "toadstool"), "There is no 'toadstool': house, "),
        (("word", "--word", "two words"), "The word 'two words' is none: choose one without spaces"),
        (("word", "--word", "a"), "'a' is a word of the model already"),
        (("lora", "--to", tmp_path / "other"), "holds something else than a pytorch_lora_weights.safetensors"),
        (("word", "--to", tmp_path / "other"), "holds something else than a learned_embeds.safetensors"),
    ):
        assert sentence in train(*words, "--run", tmp_path / "run", status=1).err
    assert (tmp_path / "other" / "thesis.txt").read_text() == "years of work"
    assert not list((tmp_path / "run").glob("*/state.pt"))


# ---------------------------------------------------------------------------------------------- the embedded ones


def scenes_and_words(count, **pins):
    wanted = [scenes.sample(46_000_000 + k, "held-out", **pins) for k in range(count)]
    return added.true_pictures(wanted), [scenes.caption(replace(s, style="plain"), s.seed, full=True) for s in wanted]


def test_the_embedded_lora_brings_neon_light_to_pictures_of_words_that_do_not_ask_for_it():
    pipe = ldm.load("scenes")
    true, words = scenes_and_words(4, style="neon", time="day")
    before = pipe(words, steps=8).images
    with pipe.lora("scenes-neon") as on:
        after = pipe(words, steps=8).images
        assert on.lora.ranks == {4: 146} and on.lora.alphas == {4.0: 146}
    assert added.color_distance(before, true) > 40
    assert added.color_distance(after, true) < 0.5 * added.color_distance(before, true)
    assert (WEIGHTS / "scenes-neon" / LORA).stat().st_size < 1_000_000


def test_the_embedded_word_draws_something_else_than_the_words_it_began_from():
    pipe = ldm.load("scenes")
    _, words = scenes_and_words(3, kind="mushroom", n=1, style="plain")
    with pipe.embedding("scenes-mushroom") as learnt:
        assert learnt.word == "<mushroom>" and learnt.vectors["text_encoder"].shape[1] == 128
        found = pipe([text.replace("mushroom", "<mushroom>") for text in words], steps=8).images
    for ordinary in ("tree", "flower"):
        drawn = pipe([text.replace("mushroom", ordinary) for text in words], steps=8).images
        for one, other in zip(found, drawn, strict=True):
            difference = np.abs(np.asarray(one, float) - np.asarray(other, float)).max(axis=2)
            assert 0.005 < (difference > 40).mean() < 0.4  # the thing, and not the landscape
