"""FLUX through the one loop: whole trajectories and pictures against diffusers' pipelines, and what is refused.

The models have 16 channels a latent and every parameter drawn (`tiny_flux`); the pipelines here are put together of
their parts. In float32 diffusers divides timesteps by 1000 and multiplies them again: their last digit shows in the
latents behind 1e-5. Under `compat` ours does the same; without, it is as near as that digit lets it be.
"""

from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    FluxImg2ImgPipeline,
    FluxInpaintPipeline,
    FluxPipeline,
)
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from PIL import Image
from reference import assert_close, normal, same
from tiny_flux import DEV, SCHNELL, clip_reference, flux_reference, t5_reference, t5_tokenizer, vae_pair
from tiny_pairs import write_tokenizer
from torch import Tensor
from transformers import CLIPTokenizer

from ldm.errors import LDMError
from ldm.flux import as_told
from ldm.guidance import conditional
from ldm.models.flux import Flux, FluxConfig
from ldm.models.patches import pack, unpack
from ldm.models.unet import Extras
from ldm.models.vae import VAE, VAEConfig
from ldm.network import tell, told_rounded
from ldm.pipeline import Pipeline
from ldm.schedules import Level, ScheduleConfig, make_schedule
from ldm.settings import Defaults, Model, Settings, choose_levels, choose_settings, choose_steps, run_of
from ldm.text.clip import TextConfig, TextEncoder
from ldm.text.embeddings import Embedding
from ldm.text.t5 import T5Config, T5Encoder
from ldm.text.t5_tokenizer import T5Tokenizer
from ldm.text.tokenizer import Tokenizer

CHANNELS = 16
FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler"}
KINDS = {"schnell": (False, SCHNELL), "dev": (True, DEV), "shifted": (False, {"shift": 3.0})}
TOKENS = 24
SIZE = {"width": 48, "height": 32}
PROMPTS = ["a large red house, snow", "a fish"]
NEGATIVES = ["red", "a large house"]
SHORT = {"max_sequence_length": 8}  # not the models' own


@dataclass
class Made:
    """Both sides' pipelines of one kind and dtype, sharing every tensor."""

    folder: Path
    found: dict = field(default_factory=dict)
    parts: dict = field(default_factory=dict)

    def __call__(self, kind: str, dtype: torch.dtype = torch.float32) -> tuple[FluxPipeline, Pipeline]:
        if (kind, dtype) not in self.found:
            self.found[kind, dtype] = self.make(kind, dtype)
        return self.found[kind, dtype]

    def make(self, kind: str, dtype: torch.dtype) -> tuple[FluxPipeline, Pipeline]:
        guidance, schedule = KINDS[kind]
        if dtype not in self.parts:
            self.parts[dtype] = self.make_parts(dtype)
        if (guidance, dtype) not in self.parts:
            flux = flux_reference(guidance, in_channels=4 * CHANNELS, out_channels=4 * CHANNELS)
            self.parts[guidance, dtype] = flux.to(dtype)
        reference = FluxPipeline(
            FlowMatchEulerDiscreteScheduler(**schedule), **self.parts[dtype], transformer=self.parts[guidance, dtype]
        )
        reference.set_progress_bar_config(disable=True)
        return reference, ours(
            reference, self.folder, Defaults(4, 3.5 if guidance else 1.0, max_sequence_length=TOKENS)
        )

    def make_parts(self, dtype: torch.dtype) -> dict:
        """All but the transformer, and the schedule."""
        write_tokenizer(self.folder / "vocabulary", "<|endoftext|>")
        clip_tokens = CLIPTokenizer.from_pretrained(self.folder / "vocabulary")
        t5_tokens = t5_tokenizer(self.folder / "pieces")
        ends = {name: getattr(clip_tokens, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        return {
            "vae": vae_pair(latent_channels=CHANNELS)[0].to(dtype),
            "text_encoder": clip_reference(len(clip_tokens), **ends).to(dtype),
            "tokenizer": clip_tokens,
            "text_encoder_2": t5_reference(len(t5_tokens)).to(dtype),
            "tokenizer_2": t5_tokens,
        }


def ours(reference: FluxPipeline, folder: Path, defaults: Defaults) -> Pipeline:
    """The same parts, each of ours with the reference's own tensors."""
    configs = {name: part.config for name, part in reference.components.items() if hasattr(part, "config")}
    clip = TextConfig.from_json(configs["text_encoder"].to_dict())
    t5 = T5Config.from_json(configs["text_encoder_2"].to_dict())
    flux = FluxConfig.from_json(dict(configs["transformer"]))
    vae = VAEConfig.from_json(dict(configs["vae"]))
    return Pipeline(
        tokenizer=Tokenizer.from_folder(folder / "vocabulary"),
        text_encoder=same(lambda: TextEncoder(clip), reference.text_encoder, TextEncoder.rename),
        tokenizer_2=T5Tokenizer.from_folder(folder / "pieces"),
        text_encoder_2=same(lambda: T5Encoder(t5), reference.text_encoder_2, T5Encoder.rename),
        transformer=same(lambda: Flux(flux), reference.transformer),
        vae=same(lambda: VAE(vae), reference.vae),
        scheduler=ScheduleConfig.from_json(dict(configs["scheduler"]) | FLOW),
        defaults=defaults,
    )


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Made:
    return Made(tmp_path_factory.mktemp("flux"))


def generators(count: int, seed: int = 0) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed + k) for k in range(count)]


def run_reference(pipe: FluxPipeline, *args, **options) -> tuple[list[Tensor], list[Image.Image]]:
    """The latents behind every step, as patches, and the pictures."""
    latents = []

    def keep(pipe: FluxPipeline, i: int, t: Tensor, found: dict) -> dict:
        latents.append(found["latents"].clone())
        return {}

    options = {"max_sequence_length": TOKENS} | options
    images = pipe(*args, **options, callback_on_step_end=keep).images
    return latents, images


def as_class(pipe: FluxPipeline, cls: type) -> FluxPipeline:
    """The same parts under another of diffusers' pipelines."""
    components = {name: part for name, part in pipe.components.items() if part is not None}
    other = cls(**components)
    other.set_progress_bar_config(disable=True)
    return other


def assert_same_run(pipe: Pipeline, theirs: tuple, *args, **options) -> None:
    """Every step's latents, and the pictures: of 255 grey levels one at most, for a rounding may fall either way."""
    latents, images = theirs
    for compat, atol in ((False, 1e-4), (True, 1e-5)):
        run = pipe.prepare(*args, **{"compat": compat} | options)
        steps = list(run.steps())
        assert len(steps) == len(latents)
        for step, reference in zip(steps, latents, strict=True):
            assert_close(pack(step.x), reference, atol)
    result = run.finish(steps[-1].x)
    assert len(result.images) == len(images)
    for mine, reference in zip(result.images, images, strict=True):
        mine, reference = np.asarray(mine, dtype=int), np.asarray(reference, dtype=int)
        assert mine.shape == reference.shape and reference.std() > 10
        assert abs(mine - reference).max() <= 1 and (mine != reference).mean() < 1e-3


def picture(seed: int, width: int, height: int) -> Image.Image:
    small = np.random.default_rng(seed).integers(0, 255, (height // 8, width // 8, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


# ------------------------------------------------------------------------------------------------ from words


@pytest.mark.parametrize(
    ("kind", "size", "steps", "guidance"),
    [
        ("schnell", {"width": 32, "height": 32}, 1, 1.0),
        ("schnell", {"width": 48, "height": 32}, 4, 1.0),
        ("dev", {"width": 48, "height": 80}, 5, 3.5),
        ("dev", {"width": 112, "height": 32}, 3, 1.7),
        ("shifted", {"width": 32, "height": 64}, 4, 1.0),
    ],
)
def test_trajectories_from_words_equal_diffusers(made, kind, size, steps, guidance):
    reference, pipe = made(kind)
    theirs = run_reference(
        reference, PROMPTS[0], **size, num_inference_steps=steps, guidance_scale=guidance, generator=generators(1, 5)
    )
    assert_same_run(pipe, theirs, PROMPTS[0], **size, steps=steps, guidance=guidance, seed=5)


@pytest.mark.parametrize("kind", ["schnell", "dev"])
def test_two_prompts_and_two_pictures_each_equal_diffusers(made, kind):
    reference, pipe = made(kind)
    theirs = run_reference(
        reference, PROMPTS, **SIZE, num_inference_steps=3, guidance_scale=3.5, num_images_per_prompt=2,
        generator=generators(4, 20),
    )  # fmt: skip
    assert_same_run(pipe, theirs, PROMPTS, **SIZE, steps=3, count=2, seed=20)
    given = pipe(PROMPTS, **SIZE, steps=3, count=2, generator=generators(4, 20)).x0
    assert torch.equal(given, pipe(PROMPTS, **SIZE, steps=3, count=2, seed=20).x0)


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize(
    ("kind", "ours", "theirs"),
    [
        ("dev", {"guidance": 2.5, "true_guidance": 3.0}, {"guidance_scale": 2.5, "true_cfg_scale": 3.0}),
        ("schnell", {"guidance": 3.0}, {"true_cfg_scale": 3.0}),
        ("schnell", {"guidance": 3.0, **SHORT}, {"true_cfg_scale": 3.0, **SHORT}),
    ],
)
def test_guidance_away_from_other_words_equals_diffusers(made, kind, ours, theirs, together):
    """Of a model that is told its guidance both halves are told it."""
    reference, pipe = made(kind)
    found = run_reference(
        reference, PROMPTS, negative_prompt=NEGATIVES, **SIZE, num_inference_steps=3, generator=generators(2), **theirs
    )
    assert_same_run(pipe, found, PROMPTS, negative=NEGATIVES, **SIZE, steps=3, together=together, **ours)
    plain = pipe.prepare(PROMPTS, **SIZE, steps=3, guidance=ours["guidance"] if kind == "dev" else 1.0)
    last = list(plain.steps())[-1].x
    assert (pack(last) - found[0][-1]).abs().max() > 0.1  # it isn't what the model draws without


def test_what_of_a_negative_prompt_is_cut_off_is_said_once_and_by_the_run_s_length(made, capsys):
    _, pipe = made("schnell")
    pipe.prepare("a", negative=NEGATIVES[1] * 9, guidance=2.0, **SHORT, **SIZE, steps=1)
    said = capsys.readouterr().err.splitlines()
    assert sum("longer than 8 tokens (max_sequence_length)" in line for line in said) == 1 and len(said) == 2


def test_true_guidance_without_other_words_pulls_away_from_none(made):
    _, pipe = made("dev")
    options = {**SIZE, "steps": 2, "true_guidance": 2.0}
    assert torch.equal(pipe(PROMPTS[0], **options).x0, pipe(PROMPTS[0], negative="", **options).x0)
    assert not torch.equal(pipe(PROMPTS[0], **options).x0, pipe(PROMPTS[0], **SIZE, steps=2).x0)


# ------------------------------------------------------------------------------------------------ from a picture


@pytest.mark.parametrize(("strength", "steps"), [(0.58, 5), (0.3, 4), (0.05, 4), (1.0, 3)])
def test_from_a_picture_equals_diffusers(made, strength, steps):
    reference, pipe = made("dev")
    image = picture(1, **SIZE)
    theirs = run_reference(
        as_class(reference, FluxImg2ImgPipeline), PROMPTS[0], image=image, strength=strength, **SIZE,
        num_inference_steps=steps, guidance_scale=3.5, generator=generators(1, 3),
    )  # fmt: skip
    assert len(theirs[0]) == steps - int(steps - steps * strength)
    assert_same_run(pipe, theirs, PROMPTS[0], image=image, strength=strength, steps=steps, seed=3, **SIZE)


def test_from_a_picture_each_with_guidance_equals_diffusers(made):
    reference, pipe = made("schnell")
    images = [picture(k, **SIZE) for k in (1, 2)]
    theirs = run_reference(
        as_class(reference, FluxImg2ImgPipeline), PROMPTS, image=images, strength=0.6, **SIZE, num_inference_steps=4,
        negative_prompt=NEGATIVES, true_cfg_scale=2.0, generator=generators(2, 3),
    )  # fmt: skip
    options = {"image": images, "strength": 0.6, "steps": 4, "negative": NEGATIVES, "guidance": 2.0, "seed": 3}
    assert_same_run(pipe, theirs, PROMPTS, **options, **SIZE)


@pytest.mark.parametrize("strength", [1.0, 0.6])
@pytest.mark.parametrize("kind", ["schnell", "dev"])
def test_inpainting_equals_diffusers(made, kind, strength):
    reference, pipe = made(kind)
    image, mask = picture(1, **SIZE), Image.new("L", (48, 32))
    mask.paste(255, (16, 0, 40, 24))
    theirs = run_reference(
        as_class(reference, FluxInpaintPipeline), PROMPTS[0], image=image, mask_image=mask, strength=strength, **SIZE,
        num_inference_steps=4, guidance_scale=3.5, generator=generators(1, 8),
    )  # fmt: skip
    options = {"image": image, "mask": mask, "strength": strength, "steps": 4, "seed": 8, "compat": True}
    assert_same_run(pipe, theirs, PROMPTS[0], **options, paste=False, **SIZE)
    kept = pipe(PROMPTS[0], **options, **SIZE).images[0]
    assert np.array_equal(np.asarray(kept)[:, :16], np.asarray(image)[:, :16])


@pytest.mark.parametrize("steps", [1, 3, 4, 7, 28, 50])
def test_how_many_steps_a_strength_takes_equals_diffusers(made, steps):
    pipe = as_class(made("schnell")[0], FluxImg2ImgPipeline)
    pipe.scheduler.set_timesteps(steps)
    for strength in np.linspace(0.01, 1, 100).tolist():
        timesteps, count = pipe.get_timesteps(steps, strength, "cpu")
        assert run_of(steps, strength, "flow") == count == len(timesteps) >= 1
        assert choose_steps(steps, strength, "total", 1000, "flow") == steps
        rows = choose_steps(steps, strength, "actual", 10**6, "flow")
        assert run_of(rows, strength, "flow") == steps


# ------------------------------------------------------------------------------------------------ the schedule


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", [1, 4, 28, 50])
def test_even_levels_equal_diffusers(kind, n):
    """Under compat to the last bit, which decides what a timestep is in bfloat16."""
    config = ScheduleConfig.from_json(KINDS[kind][1] | FLOW)
    for tokens in (4, 256, 4096):
        scheduler = FlowMatchEulerDiscreteScheduler(**KINDS[kind][1])
        scheduler.set_timesteps(n, sigmas=np.linspace(1.0, 1 / n, n), mu=calculate_shift(tokens))
        exact = make_schedule(config, n, sigmas="even", tokens=tokens)
        compat = make_schedule(config, n, sigmas="even", tokens=tokens, compat=True)
        assert [row.sigma for row in compat.levels] == scheduler.sigmas.tolist()
        assert [row.t for row in compat.levels[:-1]] == scheduler.timesteps.tolist()
        assert np.allclose([row.sigma for row in exact.levels], scheduler.sigmas, rtol=0, atol=2e-7)
        assert all(isinstance(value, float) for row in compat.levels for value in row[1:])


def test_even_levels_are_the_default_of_flux_alone(made):
    _, pipe = made("dev")
    assert pipe.settings(PROMPTS[0]).sigmas == "even" and pipe.defaults.sigmas == "even"
    assert choose_levels(pipe.scheduler).sigmas == "spaced"
    assert [round(row.sigma, 6) for row in made("schnell")[1].schedule(4).levels] == [1, 0.75, 0.5, 0.25, 0]
    with pytest.raises(LDMError, match="even levels are for flow models: this one has spaced"):
        make_schedule(ScheduleConfig(), 4, sigmas="even")


def test_the_schedule_follows_the_pictures_size(made):
    _, pipe = made("dev")
    karras = replace(pipe.scheduler, use_karras_sigmas=True)  # what a file says otherwise is kept
    parts = {"tokenizer": pipe.tokenizer, "text_encoder": pipe.text_encoder, "vae": pipe.vae}
    assert Pipeline(**parts, transformer=pipe.transformer, scheduler=karras).settings("a").sigmas == "karras"
    small, large = (pipe.prepare(PROMPTS[0], width=side, height=32, steps=4).schedule for side in (32, 128))
    assert small[1].sigma < large[1].sigma
    for schedule, tokens in ((small, 4), (large, 16), (pipe.schedule(4), 64 * 64)):
        assert schedule == make_schedule(pipe.scheduler, 4, sigmas="even", tokens=tokens)
    pipe = Pipeline(
        pipe.tokenizer, pipe.text_encoder, None, pipe.vae, pipe.scheduler, replace(pipe.defaults, width=64, height=32),
        transformer=pipe.transformer,
    )  # fmt: skip
    assert pipe.schedule(4) == make_schedule(pipe.scheduler, 4, sigmas="even", tokens=8)


# ------------------------------------------------------------------------------------------------ words


def test_without_t5_clip_alone_is_read(made, capsys):
    """Its first tokens, of which diffusers is given the same from transformers' own tower."""
    reference, pipe = made("dev")
    flux = flux_reference(True, in_channels=4 * CHANNELS, out_channels=4 * CHANNELS, joint_attention_dim=24)
    config = FluxConfig.from_json(dict(flux.config))
    alone = Pipeline(
        pipe.tokenizer, pipe.text_encoder, None, pipe.vae, pipe.scheduler, Defaults(3, 3.5, max_sequence_length=9),
        transformer=same(lambda: Flux(config), flux),
    )  # fmt: skip
    ids = reference.tokenizer(PROMPTS, padding="max_length", max_length=77, return_tensors="pt").input_ids
    with torch.no_grad():
        states = reference.text_encoder(ids)
        short = reference.text_encoder(ids[:, :9]).last_hidden_state
    words = alone.read(PROMPTS)
    assert_close(words.context, states.last_hidden_state[:, :9], 1e-5)
    assert_close(words.context, short, 1e-5)  # CLIP is causal: what is left out has no part in it
    assert_close(words.pooled, states.pooler_output, 1e-5)
    said = capsys.readouterr().err
    cut = pipe.tokenizer.decode(pipe.tokenizer.encode(PROMPTS[0])[8:])
    assert f"longer than 9 tokens (max_sequence_length); this part is not read: {cut!r}" in said
    assert "a fish" not in said
    theirs = as_class(reference, FluxPipeline)
    theirs.transformer = flux
    embeds = {"prompt_embeds": short, "pooled_prompt_embeds": states.pooler_output}
    found = run_reference(theirs, **embeds, **SIZE, num_inference_steps=3, generator=generators(2))
    assert_same_run(alone, found, PROMPTS, **SIZE)
    assert alone.encode(["a"], max_sequence_length=12).shape == (1, 12, 24)
    assert alone.read(["a"]).context.shape[1] == 9 and alone.read(["a"], max_sequence_length=77).context.shape[1] == 77
    capsys.readouterr()
    alone.read(["a red house " * 40], max_sequence_length=77)
    assert repr(pipe.tokenizer(["a red house " * 40]).cut[0]) in capsys.readouterr().err  # none is lost to the end
    alone.add_embedding(Embedding("<toy>", {"text_encoder": normal(1, 2, 24)}, Path("toy.pt"), "diffusers"))
    assert not torch.equal(alone.read(["a <toy>"]).context, alone.read(["a"]).context)
    alone.remove_embedding("<toy>")


def test_what_is_cut_off_is_said(made, capsys):
    _, pipe = made("dev")
    words = pipe.read(["a red house " * 40], max_sequence_length=30)
    said = capsys.readouterr().err
    assert words.context.shape == (1, 30, 20) and words.pooled.shape == (1, 24)
    assert "The prompt is longer than 30 tokens (max_sequence_length); this part is not read: '" in said
    pipe.read(["a red house"], max_sequence_length=30)
    assert capsys.readouterr().err == ""


def length_of(pipe: Pipeline, prompt: str, most: int) -> int:
    """How many of T5's tokens leave so many letters or fewer."""
    return next(n for n in range(1, 512) if len(pipe.tokenizer_2([prompt], n).cut[0]) < most)


def test_what_t5_does_not_read_either_is_not_said_to_be_in_its_words(made, capsys):
    """CLIP's end of the prompt less T5's end: none where T5 reads less than CLIP, all where it reads everything."""
    _, pipe = made("dev")
    prompt = "A red house " * 40
    end = pipe.tokenizer([prompt]).cut[0]
    for length, both in ((30, False), (512, True)):
        pipe.read([prompt], max_sequence_length=length)
        said = capsys.readouterr().err
        assert ("in T5's words alone" in said) is both and ("longer than" in said) is not both
    assert said.endswith(f"this part is in T5's words alone: {end!r}\n")
    pipe.read([prompt], max_sequence_length=length_of(pipe, prompt, len(end) // 2))
    alone, neither = (line.partition(": ")[2] for line in capsys.readouterr().err.splitlines())
    alone, neither = (part.rpartition(": ")[2][1:-1] for part in (alone, neither))
    assert len(alone) > 100 and len(neither) > 100
    assert "".join((alone + neither.replace("<unk>", "a")).split()) == "".join(end.split())  # T5's has no A


def test_no_dialect_is_advised(made, capsys):
    _, pipe = made("dev")
    pipe.prepare("a (red:1.3) house " + "a red house " * 30, max_sequence_length=512, **SIZE, steps=1)
    said = capsys.readouterr().err.splitlines()
    assert said[0] == "'(red:1.3)' is read as it stands, as FLUX reads all signs."
    assert len(said) == 2 and said[1].startswith("CLIP reads 77 tokens of a prompt, T5 512: this part is in T5's words")


def test_max_sequence_length_is_the_settings(made):
    reference, pipe = made("schnell")
    assert pipe.settings("a").max_sequence_length == TOKENS and pipe.most_tokens == 512
    run = {**SIZE, "steps": 2}
    long, short = (pipe("a fish", max_sequence_length=length, **run).x0 for length in (40, 8))
    theirs = reference(
        "a fish", **SIZE, num_inference_steps=2, max_sequence_length=8, generator=generators(1), output_type="latent"
    ).images
    assert_close(pack(short), theirs, 1e-5)
    assert (long - short).abs().max() > 1e-3
    for wrong in (0, 513, 2.5, True):
        with pytest.raises(LDMError, match="max_sequence_length must be a whole number from 1 to 512, not"):
            pipe.settings("a", max_sequence_length=wrong)
    with pytest.raises(LDMError, match="from 1 to 512, not 600"):
        pipe.read(["a"], max_sequence_length=600)


# ------------------------------------------------------------------------------------------------ prepared, and compat


def test_modulations_of_the_table_are_those_of_each_step(made):
    """All rows before the loop in one product, or each where it is asked: the same within rounding."""
    _, pipe = made("dev")
    told = tell(pipe.transformer, pipe.read(PROMPTS), guidance=3.5)
    x, times = normal(1, 2, CHANNELS, 4, 6), [1000.0, 400.0, 250.0]
    with torch.no_grad():
        table = conditional(pipe.transformer, *told, times=times)
        plain = conditional(pipe.transformer, *told)
        for i, t in enumerate(times):
            level = Level(i, t, 1 - t / 1000, t / 1000)
            assert_close(table(x, level).out, plain(x, level).out, 1e-5)
    assert list(pipe.transformer.prepare(*told, times).table) == times


def test_a_run_computes_its_modulations_before_the_loop(made, monkeypatch):
    _, pipe = made("dev", torch.bfloat16)  # in which compat asks other timesteps
    for compat in (False, True):
        run = pipe.prepare(PROMPTS, **SIZE, steps=3, true_guidance=2.0, compat=compat)
        with monkeypatch.context() as patch:
            patch.setattr(Flux, "modulations", None)  # an error where it is asked
            assert len(list(run.steps())) == 3


@pytest.mark.parametrize("compat", [False, True])
def test_inversion_computes_its_modulations_before_the_loop(made, monkeypatch, compat):
    """It goes all rows, and refines each step at the row that it leads to."""
    _, pipe = made("dev", torch.bfloat16)
    calls, own = [], Flux.modulations
    monkeypatch.setattr(Flux, "modulations", lambda flux, emb: calls.append(len(emb)) or own(flux, emb))
    run = pipe.prepare_inversion(picture(1, **SIZE), PROMPTS[0], **SIZE, steps=3, compat=compat, guidance=3.5)
    assert calls == [4]  # three levels and the clean one
    assert len(list(run.steps())) == 3 and calls == [4]


def test_in_half_precision_compat_tells_what_diffusers_tells(made):
    """Bit for bit what its transformer is told: 3.3 becomes 3296 / 1000, and timesteps move by up to 4."""
    _, pipe = made("dev", torch.bfloat16)
    t = torch.tensor([996.7, 601.3, 510.6, 3.1])  # the third is moved by the division
    theirs = (t.to(torch.bfloat16) / 1000).to(torch.bfloat16) * 1000
    assert [as_told(each, torch.bfloat16) for each in t.tolist()] == theirs.tolist()
    assert as_told(250.0, torch.float64) == 250 and abs(as_told(996.7, torch.float32) - 996.7) < 1e-3
    words, guidance = pipe.read(PROMPTS), []
    for rounded in (False, True):
        scale = tell(pipe.transformer, words, guidance=3.3, rounded=rounded).extras.guidance
        guidance.append((1000 * scale).float().tolist())
    assert guidance[1] == [3296.0] * 2 and np.allclose(guidance[0], 3300)
    seen = []
    network = told_rounded(lambda x, level: seen.append(level), torch.bfloat16)
    network(None, Level(2, 601.3, 0.4, 0.6))
    assert seen == [Level(2, theirs[1].item(), 0.4, 0.6)]


@pytest.mark.parametrize("kind", ["schnell", "dev"])
def test_in_half_precision_every_step_is_diffusers_within_its_rounding(made, kind):
    """Each of our steps from where diffusers stands: what the network says is the same to the last bit.

    diffusers rounds the sum twice in each step, and ours never: over the whole run that leaves some hundredths. What is
    told without compat leaves more.
    """
    reference, pipe = made(kind, torch.bfloat16)
    options = {**SIZE, "steps": 4} | ({"guidance": 3.3} if kind == "dev" else {})
    theirs, _ = run_reference(
        reference, PROMPTS[0], **SIZE, num_inference_steps=4, guidance_scale=3.3, generator=generators(1)
    )
    run = pipe.prepare(PROMPTS[0], compat=True, **options)
    starts = [pack(run.x).to(torch.bfloat16), *theirs[:-1]]
    with torch.no_grad():
        for i, (start, reached) in enumerate(zip(starts, theirs, strict=True)):
            level, after = run.schedule.step(i)
            step = run.sampler(run.denoise, unpack(start, 4, 6).float(), run.schedule, i, [], run.noise)
            velocity = pack(step.eps - step.x0).to(torch.bfloat16)
            dt = torch.tensor(after.sigma) - torch.tensor(level.sigma)
            assert torch.equal((start.float() + dt * velocity).to(torch.bfloat16), reached)
            assert reached.float().abs().mean() > 0.5
    off = {c: (pack(pipe(PROMPTS[0], compat=c, **options).x0) - theirs[-1]).abs().max().item() for c in (True, False)}
    assert off[True] < 0.05 < 0.1 < off[False]


# ------------------------------------------------------------------------------------------------ the same loop


@pytest.mark.parametrize("sampler", ["ddim", "dpm++2m", "flow-heun", "unipc2", "euler-a", "lms"])
def test_other_samplers_work(made, sampler):
    """None is refused; ddim walks euler's line, and what has noise of its own draws from the pictures' generators."""
    _, pipe = made("dev")
    found = pipe(PROMPTS, **SIZE, steps=6, sampler=sampler).x0
    assert found.isfinite().all() and found.abs().mean() > 0.1
    again = torch.cat([pipe(prompt, **SIZE, steps=6, sampler=sampler, seed=k).x0 for k, prompt in enumerate(PROMPTS)])
    assert_close(found, again, 1e-5)
    if sampler == "ddim":
        assert_close(found, pipe(PROMPTS, **SIZE, steps=6).x0, 1e-5)


def test_heun_looks_at_the_next_row_too(made):
    """x' = x + (sigma' - sigma) (v + v') / 2, with the transformer asked here; and at the end Euler's line."""
    _, pipe = made("dev")
    run = pipe.prepare(PROMPTS, **SIZE, steps=3, sampler="flow-heun")
    told = tell(pipe.transformer, pipe.read(PROMPTS), guidance=3.5)

    def velocity(x: Tensor, sigma: float) -> Tensor:
        return pipe.transformer(x, 1000 * sigma, *told)

    x = run.x
    sigmas = [row.sigma for row in run.schedule.levels]
    with torch.no_grad():
        for step, (sigma, after) in zip(run.steps(), pairwise(sigmas), strict=True):
            v = velocity(x, sigma)
            mean = v if after == 0 else (v + velocity(x + (after - sigma) * v, after)) / 2
            x = x + (after - sigma) * mean
            assert_close(step.x, x, 1e-5)


def test_a_run_goes_on_from_any_step(made):
    _, pipe = made("dev")
    options = {**SIZE, "steps": 5, "seed": 4}
    steps = list(pipe.steps(PROMPTS, **options))
    again = list(pipe.steps(PROMPTS, after=steps[:2], **options))
    assert len(again) == 3 and torch.equal(again[-1].x, steps[-1].x)


def test_enlarging_keeps_sides_even_and_is_drawn_over(made):
    _, pipe = made("dev")
    first = pipe(PROMPTS[0], **SIZE, steps=2)
    large = pipe.enlarge(first.x0, 1.3)
    assert large.shape == (1, CHANNELS, 6, 8)  # 5.2 and 7.8
    result = pipe(PROMPTS[0], image=large, strength=0.5, steps=4)
    assert result.images[0].size == (64, 48) and len(pipe.prepare(PROMPTS[0], image=large, strength=0.5, steps=4)) == 2


def test_tiles_are_of_whole_patches(made):
    _, pipe = made("dev")
    assert pipe.tiles(72) == (8, 2) and pipe.tiles(64) == (8, 2)
    result = pipe(PROMPTS[0], width=96, height=64, steps=2, tile=72)
    whole = pipe(PROMPTS[0], width=96, height=64, steps=2)
    assert result.x0.isfinite().all() and not torch.equal(result.x0, whole.x0)


def test_what_flux_tells_of_itself(made):
    for kind, distilled in (("schnell", False), ("dev", True)):
        _, pipe = made(kind)
        assert pipe.flux and pipe.distilled is distilled and pipe.backbone is pipe.transformer and pipe.unet is None
        assert list(pipe.parts()) == ["text_encoder", "text_encoder_2", "transformer", "vae"]
        assert pipe.task == "text" and pipe.default_size == 1024 and pipe.told_sizes is None and not pipe.xl
        assert pipe.dtype == torch.float32 and pipe.device.type == "cpu"
        assert pipe.model.multiple == 16 and pipe.model.distilled is distilled


def test_settings_of_older_records_are_read():
    fields = Settings.__dataclass_fields__
    assert fields["true_guidance"].default == 1.0 and fields["max_sequence_length"].default is None


# ------------------------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"width": 40}, "width must be a multiple of 16, not 40: a patch of the transformer stands for 16 pixels."),
        ({"height": 8}, "height must be a multiple of 16, not 8: a patch of the transformer stands for 16 pixels."),
        ({"dialect": "a1111"}, "FLUX reads plain sentences: the signs of the dialect 'a1111' weigh words for CLIP"),
        ({"dialect": "compel"}, "the signs of the dialect 'compel'"),
        ({"clip_skip": 1}, "FLUX reads the last layer of its text encoders: leave clip_skip 1 out."),
        ({"true_guidance": float("nan")}, "true_guidance must be a finite number, not nan."),
        ({"true_guidance": 0.5}, "true_guidance is 1 (none) or more, not 0.5."),
        ({"true_guidance": "2"}, "true_guidance must be a finite number, not '2'."),
        ({"sigmas": "ays"}, "were found for Stable Diffusion"),
    ],
)
def test_refused(made, options, sentence):
    _, pipe = made("dev")
    with pytest.raises(LDMError) as error:
        pipe.prepare(PROMPTS[0], **SIZE | options)
    assert sentence in str(error.value)


def test_refused_of_other_models(made):
    _, pipe = made("schnell")
    with pytest.raises(LDMError, match=r"told their guidance, as FLUX\.1-dev is: this one has no other than the true"):
        pipe.settings("a", true_guidance=2.0)
    assert pipe.settings("a", true_guidance=1.0).true_guidance == 1.0
    unet = Model(ScheduleConfig(), Defaults(), "text", factor=8, size=512)
    with pytest.raises(LDMError, match="max_sequence_length says how much of a prompt FLUX reads; this model reads 77"):
        choose_settings(unet, "a", max_sequence_length=77)
    with pytest.raises(LDMError, match="pass the number as guidance"):
        choose_settings(unet, "a", true_guidance=2.0)
    assert choose_settings(unet, "a", dialect="a1111", width=24).max_sequence_length is None
    one = object()
    networks, vae = "of either a unet or, of FLUX, a transformer: pass one of them", "of a VAE, too, .*: pass it as vae"
    for wrong, sentence in (
        ({"vae": one}, networks),
        ({"vae": one, "unet": one, "transformer": one}, networks),
        ({"unet": one}, vae),
        ({"transformer": one}, vae),
    ):
        with pytest.raises(LDMError, match=f"A pipeline is made {sentence}"):
            Pipeline(pipe.tokenizer, pipe.text_encoder, **wrong)


def test_words_are_not_taught_where_t5_reads(made):
    _, pipe = made("dev")
    with pytest.raises(LDMError, match="FLUX reads its words from T5, and a learnt word is CLIP's"):
        pipe.add_embedding(Embedding("<toy>", {"text_encoder": normal(1, 2, 24)}, Path("toy.pt"), "diffusers"))


def test_a_negative_prompt_without_effect_says_what_to_do(made, capsys):
    for kind, sentence in (
        (
            "dev",
            "In a model that is told its guidance the negative prompt does nothing, unless true_guidance is above 1.",
        ),
        ("schnell", "Without guidance (1 or less) the negative prompt does nothing."),
    ):
        for options in ({}, {"true_guidance": 1} if kind == "dev" else {"guidance": 1.0}):
            made(kind)[1].prepare(PROMPTS[0], negative="red", **SIZE, steps=1, **options)
            assert capsys.readouterr().err == sentence + "\n"
    made("dev")[1].prepare(PROMPTS[0], negative="red", true_guidance=2.0, **SIZE, steps=1)
    assert capsys.readouterr().err == ""


def test_a_model_that_needs_no_guidance_says_so(made, capsys):
    """Not one that is drawn with guidance by default, nor one that is told it."""
    _, pipe = made("schnell")
    pipe.prepare("a", guidance=3.0, **SIZE, steps=1)
    sentence = "This model was distilled to draw without guidance: 3 doubles the time, and is seldom better.\n"
    assert capsys.readouterr().err == sentence
    pipe.prepare("a", guidance=1.0, **SIZE, steps=1)
    again(pipe, replace(pipe.defaults, guidance=4.0)).prepare("a", **SIZE, steps=1)
    dev = made("dev")[1]
    again(dev, replace(dev.defaults, guidance=1.0)).prepare("a", true_guidance=3.0, **SIZE, steps=1)
    assert capsys.readouterr().err == ""


def again(pipe: Pipeline, defaults: Defaults | None) -> Pipeline:
    """The same parts, put together anew."""
    return Pipeline(
        pipe.tokenizer, pipe.text_encoder, None, pipe.vae, pipe.scheduler, defaults, transformer=pipe.transformer,
        tokenizer_2=pipe.tokenizer_2, text_encoder_2=pipe.text_encoder_2,
    )  # fmt: skip


@pytest.mark.parametrize(("kind", "usual"), [("schnell", (4, 1.0, 256)), ("dev", (28, 3.5, 512))])
def test_put_together_without_defaults_it_is_drawn_as_its_family(made, kind, usual):
    settings = again(made(kind)[1], None).settings("a")
    assert (settings.steps, settings.guidance, settings.max_sequence_length) == usual and settings.sigmas == "even"


def test_without_t5_no_more_is_read_than_clip_knows(made):
    """The least of what is asked by default and what the tower was made for."""
    pipe = made("dev")[1]
    for asked, read in ((512, 77), (9, 9), (None, 77)):
        alone = Pipeline(
            pipe.tokenizer, pipe.text_encoder, None, pipe.vae, pipe.scheduler,
            Defaults(max_sequence_length=asked), transformer=pipe.transformer,
        )  # fmt: skip
        assert alone.settings("a").max_sequence_length == read


@pytest.mark.parametrize(("part", "name"), [("text_encoder", "CLIP"), ("text_encoder_2", "T5")])
def test_what_is_not_finite_names_the_text_encoder(made, monkeypatch, part, name):
    """CLIP's part in it is the pooled vector alone."""
    _, pipe = made("dev")
    weight = next(p for key, p in getattr(pipe, part).named_parameters() if key.endswith("norm.weight"))
    monkeypatch.setattr(weight, "data", torch.full_like(weight, float("nan")))
    with pytest.raises(LDMError, match=rf"the text encoder \({name}\) returned numbers that are not finite"):
        pipe.read(["a fish"])


def test_what_is_not_finite_names_the_transformer(made):
    _, pipe = made("dev")
    run = pipe.prepare(PROMPTS[0], **SIZE, steps=1)
    run = replace(run, x=run.x.fill_(float("nan")))
    with pytest.raises(LDMError, match="the transformer, in step 1 returned numbers that are not finite"):
        list(run.steps())


def test_extras_that_are_lacking_are_named(made):
    _, pipe = made("dev")
    with pytest.raises(LDMError, match="asks for more than a text: pass pooled, guidance in extras"):
        pipe.transformer.prepare(pipe.encode(PROMPTS), Extras())
