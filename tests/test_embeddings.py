"""Textual inversion: learnt words equal diffusers', in every format; and taken away, nothing of them is left."""

import copy
from dataclasses import replace

import pytest
import torch
from reference import assert_close, normal
from safetensors.torch import save_file
from tiny_pairs import PROMPT, scenes

import ldm
from ldm import memory
from ldm.errors import LDMError
from ldm.lab.trace import words_of
from ldm.pipeline import Pipeline
from ldm.text.embeddings import FILE, Embedding, add, open_embedding, remove
from ldm.text.prompts.notices import spelling
from ldm.text.prompts.schedules import stages
from ldm.text.tokenizer import Tokenizer

MANY, ONE = "<toy>", "zork"  # of three vectors, and of one
PROMPTS = [
    f"a {MANY} on snow at night",
    f"{MANY}, a large {MANY}: ({MANY})",
    f"a house{MANY}s, and two {ONE}s, {MANY}{ONE}!",
    f"{ONE} left of {MANY}",
    " ".join(["5"] * 72 + [MANY, ONE]),  # the 73rd, 74th, 75th token, and one beyond
    "a house",
]
WIDTHS = {"sd1": {"text_encoder": 24}, "sd2": {"text_encoder": 24}, "sdxl": {"text_encoder": 24, "text_encoder_2": 20}}


def learnt(name: str, word: str, count: int, seed: int = 0) -> Embedding:
    """Some vectors for that model's text encoders, as long as those of its vocabulary are."""
    vectors = {part: 0.5 * normal(seed + k, count, width) for k, (part, width) in enumerate(WIDTHS[name].items())}
    return Embedding(word, vectors, "made.safetensors")


def fresh(models, name: str, dtype: torch.dtype = torch.float32) -> Pipeline:
    """Our pipeline, to be changed: with text encoders of its own."""
    pipe = copy.copy(models.ours(name, dtype))
    for part in WIDTHS[name]:
        setattr(pipe, part, copy.deepcopy(getattr(pipe, part)))
    return pipe


def reference(models, name: str, dtype: torch.dtype, words: list[Embedding]):
    """diffusers' pipeline, taught these words."""
    whole = models.reference(name, dtype)
    parts = {key: copy.deepcopy(part) if "t" in key[:1] else part for key, part in whole.components.items()}
    pipe = type(whole)(**parts)
    for word in words:
        for part, vectors in word.vectors.items():
            place = {"tokenizer": parts[part.replace("text_encoder", "tokenizer")], "text_encoder": parts[part]}
            pipe.load_textual_inversion({word.word: vectors.clone()}, **place)
    return pipe


def assert_as_before(pipe: Pipeline, before: Pipeline, parts):
    for part in parts:
        one, two = getattr(pipe, part), getattr(before, part)
        assert one.embeddings.token_embedding.num_embeddings == len(two.embeddings.token_embedding.weight)
        assert torch.equal(one.embeddings.token_embedding.weight, two.embeddings.token_embedding.weight)
        assert one.config == two.config
    assert pipe.tokenizer is before.tokenizer and pipe.tokenizer_2 is before.tokenizer_2 and not pipe.embeddings


# ---------------------------------------------------------------------------------------------------- diffusers


@pytest.mark.parametrize("name", ["sd1", "sd2", "sdxl"])
def test_words_equal_diffusers(models, name, capsys):
    words = [learnt(name, MANY, 3), learnt(name, ONE, 1, seed=5)]
    pipe = fresh(models, name, torch.float64)
    without = pipe.read(PROMPTS)
    theirs = reference(models, name, torch.float64, words)
    for word in words:
        add(pipe, word)
    assert len(pipe.text_encoder.embeddings.token_embedding.weight) == len(pipe.tokenizer) == len(theirs.tokenizer)
    for tokenizer, other in ((pipe.tokenizer, theirs.tokenizer), (pipe.tokenizer_2, getattr(theirs, "tokenizer_2", 0))):
        if tokenizer is not None:
            told = theirs.maybe_convert_prompt(PROMPTS, other)
            ids = other(told, padding="max_length", truncation=True, max_length=77, return_tensors="pt").input_ids
            assert torch.equal(tokenizer(PROMPTS).ids, ids)
    asked = {"device": "cpu", "num_images_per_prompt": 1, "do_classifier_free_guidance": False}
    expected = theirs.encode_prompt(PROMPTS, **asked)
    found = pipe.read(PROMPTS)
    assert_close(found.context, expected[0], 1e-11)
    changed = (found.context - without.context).abs().amax(dim=(1, 2))
    assert (changed[:-1] > 0.1).all() and changed[-1] == 0
    if name == "sdxl":
        assert_close(found.pooled, expected[2], 1e-11)
    if name == "sd1":
        narrow = fresh(models, name)
        for word in words:
            add(narrow, word)
        theirs = reference(models, name, torch.float32, words)
        assert_close(narrow.encode(PROMPTS), theirs.encode_prompt(PROMPTS, **asked)[0], 1e-5)
    assert f"not read: '{ONE}'" in capsys.readouterr().err


def test_diffusers_reads_a_word_in_capitals_by_its_first_vector_alone(models):
    """Here it is the word. If this fails, diffusers has mended it: let `Tokenizer.with_words` say so."""
    pipe, theirs = fresh(models, "sd1"), reference(models, "sd1", torch.float32, [learnt("sd1", MANY, 3)])
    add(pipe, learnt("sd1", MANY, 3))
    first = pipe.tokenizer.ids[MANY]
    told = theirs.maybe_convert_prompt("a <TOY>", theirs.tokenizer)
    assert theirs.tokenizer(told).input_ids[2:-1] == [first]
    assert pipe.tokenizer.encode("a <TOY>")[1:] == [first, first + 1, first + 2]


def test_an_old_end_of_text_is_found_behind_a_learnt_word(models):
    """SDXL's second configuration says eos_token_id 2, the largest id: diffusers pools at the word, and says so."""
    pipe, word = fresh(models, "sdxl"), learnt("sdxl", MANY, 2)
    sound = fresh(models, "sdxl")
    encoder = pipe.text_encoder_2
    encoder.config = old = replace(encoder.config, eos_token_id=2)
    add(pipe, word)
    add(sound, word)
    pooled = pipe.read([PROMPTS[0]]).pooled
    assert torch.equal(pooled, sound.read([PROMPTS[0]]).pooled)
    theirs = reference(models, "sdxl", torch.float32, [word])
    for module in theirs.text_encoder_2.modules():
        if hasattr(module, "eos_token_id"):
            module.eos_token_id = 2
    off = theirs.encode_prompt(PROMPTS[:1], device="cpu", do_classifier_free_guidance=False)[2] - pooled
    assert off.abs().max() > 0.1, "diffusers has mended this: say so in ldm/text/embeddings.py"
    remove(pipe, MANY)
    assert encoder.config is old


# ---------------------------------------------------------------------------------------------------- files


def test_every_format_holds_the_same(tmp_path):
    one, two = normal(1, 2, 24), normal(2, 2, 20)
    (tmp_path / "toy").mkdir()
    save_file({"<word>": one}, tmp_path / "a.safetensors")
    save_file({"<word>": one[0]}, tmp_path / "flat.safetensors")
    torch.save({"<word>": one}, tmp_path / "b.bin")
    table = {"string_to_token": {"*": 265}, "string_to_param": {"*": one}, "name": "easy-word", "step": 100}
    torch.save(table | {"sd_checkpoint": None, "sd_checkpoint_name": None}, tmp_path / "c.pt")
    save_file({"emb_params": one}, tmp_path / "d-word.safetensors")
    save_file({"*": one}, tmp_path / "e-word.safetensors")
    save_file({"clip_l": one, "clip_g": two}, tmp_path / "toy" / FILE)
    for file, word, second in (
        ("a.safetensors", "<word>", False),
        ("b.bin", "<word>", False),
        ("c.pt", "easy-word", False),
        ("d-word.safetensors", "d-word", False),
        ("e-word.safetensors", "e-word", False),
        (f"toy/{FILE}", "toy", True),
    ):
        found = open_embedding(tmp_path / file, allow_pickle=True)
        assert (found.word, found.count, set(found.vectors)) == (
            word, 2, {"text_encoder"} | ({"text_encoder_2"} if second else set()),
        )  # fmt: skip
        assert torch.equal(found.vectors["text_encoder"], one)
        assert not second or torch.equal(found.vectors["text_encoder_2"], two)
    flat = open_embedding(tmp_path / "flat.safetensors")
    assert flat.count == 1 and torch.equal(flat.vectors["text_encoder"], one[:1])
    assert open_embedding(tmp_path / "c.pt", allow_pickle=True).format == "AUTOMATIC1111"


def test_files_of_the_first_program_are_read_or_it_is_said_what_to_do(tmp_path):
    one, old, new = normal(1, 2, 24), tmp_path / "old.pt", tmp_path / "new.pt"
    torch.save({"string_to_token": {"*": torch.tensor(265)}, "string_to_param": {"*": one}}, tmp_path / "cat.pt")
    torch.save({"string_to_token": {"<cat>": torch.tensor(265)}, "string_to_param": {"<cat>": one}}, tmp_path / "b.pt")
    for file, word in (("cat.pt", "cat"), ("b.pt", "<cat>")):
        found = open_embedding(tmp_path / file, allow_pickle=True)
        assert found.word == word and torch.equal(found.vectors["text_encoder"], one)
    table = torch.nn.ParameterDict({"*": torch.nn.Parameter(one)})
    torch.save({"string_to_token": {"*": torch.tensor(265)}, "string_to_param": table}, old)
    for allowed in (False, True):
        with pytest.raises(LDMError, match="old format of the first program") as caught:
            open_embedding(old, allowed)
    told = str(caught.value).partition("save it anew: ")[2].removesuffix(".")
    exec(told, {"torch": torch, "path": old, "new": new})  # what the sentence says works
    assert torch.equal(open_embedding(new, allow_pickle=True).vectors["text_encoder"], one)


BAD = {  # what a file holds -> the sentence
    "nan": ({"w": torch.full((2, 24), float("nan"))}, "not finite"),
    "empty": ({}, "no tensors"),
    "no vectors": ({"w": torch.zeros(0, 24)}, "floats of shape"),
    "rank 3": ({"w": torch.zeros(1, 2, 24)}, "floats of shape"),
    "whole numbers": ({"w": torch.zeros(2, 24, dtype=torch.int32)}, "is I32"),
    "a thousand": ({"w": torch.zeros(1000, 24)}, "1000 vectors, and a prompt has room for 75"),
    "two words": ({"a": torch.zeros(2, 24), "b": torch.zeros(2, 24)}, "an embedding is one word"),
    "xl in part": ({"clip_l": torch.zeros(2, 24), "clip_g": torch.zeros(3, 20)}, "2 and 3 vectors|3 and 2 vectors"),
    "xl and more": ({"clip_l": torch.zeros(2, 24), "w": torch.zeros(3, 20)}, "an embedding is one word"),
    "a LoRA": ({"lora_unet_x.lora_down.weight": torch.zeros(4, 24)}, "is a LoRA .*add_lora"),
    "a model": ({f"unet.{k}": torch.zeros(2) for k in range(9)}, "holds 9 tensors.*--model"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_file_that_is_no_word_is_refused(case, tmp_path):
    tensors, words = BAD[case]
    save_file(tensors, tmp_path / "bad.safetensors")
    with pytest.raises(LDMError, match=words):
        open_embedding(tmp_path / "bad.safetensors")


def test_a_pickle_is_read_if_it_is_allowed_and_a_torn_file_is_not(tmp_path):
    torch.save({"<word>": normal(1, 2, 24)}, tmp_path / "b.bin")
    save_file({"<word>": normal(1, 2, 24)}, tmp_path / "a.safetensors")
    (tmp_path / "torn.safetensors").write_bytes((tmp_path / "a.safetensors").read_bytes()[:-5])
    with pytest.raises(LDMError, match=r"pickle.*allow"):
        open_embedding(tmp_path / "b.bin")
    with pytest.raises(LDMError, match="truncated"):
        open_embedding(tmp_path / "torn.safetensors")


# ---------------------------------------------------------------------------------------------------- on and off


@pytest.mark.parametrize("order", [(MANY, ONE), (ONE, MANY)])
def test_removed_in_any_order_nothing_is_left(models, order):
    pipe, before = fresh(models, "sdxl"), models.ours("sdxl")
    kept = [(e, e.config, e.embeddings.token_embedding.weight) for e in (pipe.text_encoder, pipe.text_encoder_2)]
    add(pipe, learnt("sdxl", MANY, 3))
    alone = pipe.read(PROMPTS)
    add(pipe, learnt("sdxl", ONE, 1, seed=5))
    both = pipe.read(PROMPTS)
    remove(pipe, ONE)
    assert torch.equal(pipe.read(PROMPTS).context, alone.context)
    add(pipe, learnt("sdxl", ONE, 1, seed=5))
    assert list(pipe.embeddings) == [MANY, ONE] and pipe.embeddings[ONE].count == 1
    remove(pipe, order[0])
    assert (pipe.read(PROMPTS[3:4]).context - both.context[3:4]).abs().max() > 0.1
    other = add(pipe, learnt("sdxl", order[0], 1), word="<other>").word  # rows are those of the words that are on
    row = pipe.text_encoder.embeddings.token_embedding.weight[pipe.tokenizer.ids[other]]
    assert torch.equal(row, learnt("sdxl", order[0], 1).vectors["text_encoder"][0])
    remove(pipe, order[1])
    remove(pipe, other)
    assert_as_before(pipe, before, WIDTHS["sdxl"])
    for encoder, config, table in kept:
        assert encoder.config is config and encoder.embeddings.token_embedding.weight is table
    with pytest.raises(LDMError, match="no learnt word '<toi>' to remove: none is on"):
        remove(pipe, "<toi>")
    for wrong in ([], 5, None, pipe):
        with pytest.raises(LDMError, match="named by its word, such as '<toy>', not by something of type"):
            remove(pipe, wrong)
    with pytest.raises(LDMError, match=r"named by its word, 'zork', not by .* Embedding"):
        pipe.remove_embedding(learnt("sdxl", ONE, 1))


def test_a_refiner_takes_the_second_half_and_a_block_ends(models, tmp_path):
    pipe, before = copy.copy(models.ours("refiner")), models.ours("refiner")
    pipe.text_encoder = copy.deepcopy(pipe.text_encoder)
    word = learnt("sdxl", MANY, 2)
    save_file({"clip_l": word.vectors["text_encoder"], "clip_g": word.vectors["text_encoder_2"]}, tmp_path / FILE)
    with pipe.embedding(tmp_path, word=MANY) as added:
        table = pipe.text_encoder.embeddings.token_embedding.weight
        assert torch.equal(table[-2:], word.vectors["text_encoder_2"]) and pipe.embeddings == {MANY: added}
        assert pipe.tokenizer.encode(MANY) == [len(table) - 2, len(table) - 1]
    assert_as_before(pipe, before, ["text_encoder"])


@pytest.mark.parametrize("name", ["sd1", "sdxl"])
def test_where_words_and_table_do_not_belong_together_nothing_is_read(models, name):
    """An id is a row of one table: of another it is another word, or none."""
    pipe = fresh(models, name)
    twin = copy.copy(pipe)
    add(pipe, learnt(name, MANY, 2))
    assert torch.equal(twin.read(PROMPTS[5:]).context, pipe.read(PROMPTS[5:]).context)  # a twin without words reads on
    with pytest.raises(LDMError, match="learnt words of another pipeline that shares it \\('<toy>'\\): remove them"):
        add(twin, learnt(name, ONE, 1))
    same = copy.copy(pipe)
    remove(pipe, MANY)
    add(pipe, learnt(name, MANY, 2, seed=9))
    with pytest.raises(LDMError, match="aren't on its"):  # a word of that name and length, and other vectors
        same.read(PROMPTS[:1])
    late, whole = copy.copy(pipe), copy.deepcopy(pipe)
    add(pipe, learnt(name, ONE, 1))
    both = pipe.read(PROMPTS).context

    def refused(other: Pipeline):
        state = other.embeddings, other.tokenizer
        for act in (
            lambda: other.read(PROMPTS[:1]),
            lambda: other.read(PROMPTS[:1], dialect="a1111"),
            lambda: add(other, learnt(name, "<new>", 1)),
            lambda: remove(other, MANY),
        ):
            with pytest.raises(LDMError, match=r"learnt words .*aren't on its text encoder.*put back"):
                act()
        assert state == (other.embeddings, other.tokenizer)
        assert torch.equal(pipe.read(PROMPTS).context, both)

    refused(late)
    for part in (*WIDTHS[name], *(each.replace("text_encoder", "tokenizer") for each in WIDTHS[name])):
        other = copy.copy(pipe)
        setattr(other, part, getattr(models.ours(name), part))
        refused(other)
        setattr(other, part, getattr(pipe, part))
        assert torch.equal(other.read(PROMPTS).context, both)  # it is put back
    add(whole, learnt(name, ONE, 1))  # a deep copy has its own
    remove(whole, MANY)
    for word in (ONE, MANY):
        remove(pipe, word)
    with pytest.raises(LDMError, match="aren't on its"):
        late.read(PROMPTS[:1])
    assert torch.equal(whole.read([ONE]).context, whole.read([ONE.upper()]).context)
    add(twin, learnt(name, ONE, 1))
    assert torch.equal(whole.read(PROMPTS).context, twin.read(PROMPTS).context)


@pytest.mark.parametrize("by", ["parts", "blocks"])
def test_while_offloaded_and_with_a_lora_of_the_text_encoder(models, by, tmp_path):
    layer = "lora_te_text_model_encoder_layers_1_mlp_fc1"
    file = tmp_path / "style.safetensors"
    save_file({f"{layer}.lora_down.weight": normal(1, 2, 24), f"{layer}.lora_up.weight": normal(2, 52, 2)}, file)
    plain, pipe = fresh(models, "sd1"), fresh(models, "sd1")
    table = pipe.text_encoder.embeddings.token_embedding.weight
    plain.add_lora(file, 0.7)
    add(plain, learnt("sd1", MANY, 3))
    memory.offload(pipe, "cpu", by=by)
    pipe.encode(PROMPTS)  # the text encoder is at work, and its table may lie there as a copy
    pipe.add_embedding(learnt("sd1", MANY, 3))
    pipe.add_lora(file, 0.7)
    assert torch.equal(pipe.encode(PROMPTS), plain.encode(PROMPTS))
    pipe.remove_lora("style")
    pipe.encode(PROMPTS)
    pipe.remove_embedding(MANY)
    memory.restore(pipe)
    remove(plain, MANY)
    plain.remove_lora("style")
    assert pipe.text_encoder.embeddings.token_embedding.weight is table
    for each in (pipe, plain):
        assert_as_before(each, models.ours("sd1"), ["text_encoder"])
        assert torch.equal(each.encode(PROMPTS), models.ours("sd1").encode(PROMPTS))


def test_in_another_type_it_is_cast_and_what_was_moved_meanwhile_stays_moved(models):
    pipe = fresh(models, "sd1")
    pipe.text_encoder.half()
    add(pipe, learnt("sd1", MANY, 3))
    assert pipe.text_encoder.embeddings.token_embedding.weight.dtype == torch.float16
    pipe.text_encoder.double()
    remove(pipe, MANY)
    table, before = (each.text_encoder.embeddings.token_embedding.weight for each in (pipe, models.ours("sd1")))
    assert table.dtype == torch.float64 and torch.equal(table, before.half().double())
    pipe.text_encoder.half()
    big = Embedding("<big>", {"text_encoder": torch.full((1, 24), 1e5)}, "big.safetensors")
    with pytest.raises(LDMError, match="beyond float16"):
        add(pipe, big)


REFUSED = {
    "night": "is a word of this model already",
    "Night": "is a word of this model already",  # prompts are read in lower case
    "!": "is a word of this model already",
    "<|endoftext|>": "is a word of this model already",
    "<TOY>": "is a word of this model already",
    "<toy>_1": "is a word of this model already",
    "two words": "is no word without spaces",
    "": "is no word without spaces",
    "wow!": "can't be found in prompts",  # Stable Diffusion 2 pads with "!", and cuts that out first
}


@pytest.mark.parametrize("word", REFUSED)
def test_a_word_that_can_not_be_one_is_refused(models, word):
    pipe = fresh(models, "sd2")
    add(pipe, learnt("sd2", MANY, 3))
    tokenizer, table, on = pipe.tokenizer, pipe.text_encoder.embeddings.token_embedding.weight, pipe.embeddings
    with pytest.raises(LDMError, match=REFUSED[word]):
        add(pipe, learnt("sd2", "<new>", 2), word=word)
    assert pipe.tokenizer is tokenizer and pipe.embeddings is on
    assert pipe.text_encoder.embeddings.token_embedding.weight is table


def test_vectors_of_another_model_are_refused(models):
    sizes = {"sd1": 768, "sd2": 1024}
    found = {name: {"text_encoder": torch.zeros(1, size)} for name, size in sizes.items()}
    found["xl"] = found["sd1"] | {"text_encoder_2": torch.zeros(1, 1280)}
    for name, words in (
        ("sd1", r"made for Stable Diffusion 1 \(vectors of 768 numbers\), and this model is a model of vectors of"),
        ("sd2", "made for Stable Diffusion 2"),
        ("xl", "made for SDXL"),
    ):
        for target in ("sd1", "sdxl", "refiner"):
            pipe = copy.copy(models.ours(target))
            with pytest.raises(LDMError, match=words):
                add(pipe, Embedding("<new>", found[name], f"{name}.pt"))
            assert pipe.tokenizer is models.ours(target).tokenizer
    for one, other in (("sd1", "sdxl"), ("sdxl", "sd1")):  # the same width, and another number of text encoders
        with pytest.raises(LDMError, match="was made for"):
            add(copy.copy(models.ours(other)), learnt(one, "<new>", 1))


def test_vectors_for_the_second_text_encoder_alone_are_said_to_be_so(models):
    vectors = {"text_encoder_2": normal(1, 2, 24)}
    for target in ("sd1", "sdxl"):  # of one width with the first one's
        with pytest.raises(LDMError, match=r"SDXL's second text encoder alone \(clip_g, vectors of 24 numbers\), and "):
            add(copy.copy(models.ours(target)), Embedding("<new>", vectors, "new.safetensors"))


def test_a_word_has_no_more_vectors_than_a_prompt_has_room(models):
    pipe = fresh(models, "sd1")
    pipe.tokenizer = copy.copy(pipe.tokenizer)
    pipe.tokenizer.max_length = 7
    with pytest.raises(LDMError, match="6 vectors, and a prompt has room for 5"):
        add(pipe, learnt("sd1", "<six>", 6))
    add(pipe, learnt("sd1", "<five>", 5))
    assert pipe.tokenizer("<five>").cut == [""]


def test_it_says_how_long_the_vectors_are(models, capsys):
    pipe = fresh(models, "sdxl")
    vectors = {"text_encoder": torch.zeros(2, 24), "text_encoder_2": torch.zeros(2, 20)}
    vectors["text_encoder"][:, 0], vectors["text_encoder_2"][0, 3] = 3.0, 7.5
    add(pipe, Embedding(MANY, vectors, "made.pt"))
    said = capsys.readouterr().err
    assert said.startswith("<toy> is now a word of 2 vectors (text encoder: their length 3 where most of the ")
    assert "; text encoder 2: their length 0 to 7.5 where" in said
    lengths = models.ours("sdxl").text_encoder.embeddings.token_embedding.weight.norm(dim=1)
    low, high = (float(lengths.sort().values[round(share * (len(lengths) - 1))]) for share in (0.05, 0.95))
    assert f"most of the vocabulary's are {low:.2g} to {high:.2g}; " in said and low < 0.8 * high


def test_it_says_that_a_word_of_letters_is_found_inside_others(models, capsys):
    pipe = fresh(models, "sd1")
    for word in ("rg", "ARG", MANY, "arg-1"):
        add(pipe, learnt("sd1", word, 1))
        pieces, said = pipe.tokenizer.pieces("a large house"), capsys.readouterr().err
        assert (word in pieces) == word.isalpha()
        told = f"'{word}' is found inside other words too, and cuts them up, as in diffusers; '<{word}>' would not be."
        assert told in said if word.isalpha() else "inside other words" not in said
        remove(pipe, word)


# ---------------------------------------------------------------------------------------------------- dialects

SIGNS = {  # word -> what a prompt in a1111 and in compel writes ("" is: can't), and what is said of it
    MANY: (MANY, MANY, ""),
    "a:b": ("a:b", "a:b", ""),
    "bad_prompt(v2)": (
        r"bad_prompt\(v2\)",
        r"bad_prompt\(v2\)",
        r"write it bad_prompt\(v2\); in compel write it bad_p",
    ),
    "bad[x]": (r"bad\[x\]", "bad[x]", r"for theirs: in a1111 write it bad\[x\]."),
    "[p|q]": (r"\[p|q\]", "[p|q]", r"in a1111 write it \[p|q\]."),
    "BREAK": (r"BRE\AK", "BREAK", r"in a1111 write it BRE\AK."),
    "toy)": (r"toy\)", r"toy\)", r"in compel write it toy\)."),
    "zo++": ("zo++", "", "for theirs: compel can't name it, so call it otherwise"),
    "hello,there": ("hello,there", "", "compel can't name it, so call it otherwise"),
    "new-v1.3": ("new-v1.3", "new-v1.3", "theirs: compel finds it outside of brackets alone."),
}


@pytest.mark.parametrize("word", SIGNS)
def test_a_word_with_signs_is_written_in_each_dialect_as_it_is_said(models, word, capsys):
    pipe = fresh(models, "sd1")
    add(pipe, learnt("sd1", word, 2))
    *written, said = SIGNS[word]
    err = capsys.readouterr().err
    assert said in err if said else "dialects" not in err
    table = pipe.text_encoder.embeddings.token_embedding.weight

    def heard(prompt: str, dialect: str) -> bool:
        """Whether both of its vectors are, at every step: what is read is another if they are."""
        if dialect == "a1111" and len(stages(prompt, 2)) > 1:
            return False
        before, found = pipe.read([prompt], dialect=dialect).context, []
        for row in (-2, -1):
            kept = table[row].clone()
            table.data[row] = -kept
            found.append(not torch.equal(before, pipe.read([prompt], dialect=dialect).context))
            table.data[row] = kept
        return all(found)

    assert heard(f"a {word} house", "plain")
    for dialect, text in zip(("a1111", "compel"), written, strict=True):
        spelt, everywhere = spelling(word, dialect, pipe.tokenizer)
        assert spelt == text
        weighed = {"a1111": "a ({}:1.3) house", "compel": "a ({})1.3 house"}[dialect]
        if text:
            assert heard(f"a {text} house", dialect)
            assert heard(weighed.format(text), dialect) == everywhere
        else:
            assert not heard(f"a {word} house", dialect)
        assert heard(weighed.format(word), dialect) == (everywhere and text == word)  # why it is said


def test_a_word_as_long_as_a_prompt_is_written_as_others_are(models, capsys):
    add(fresh(models, "sd1"), learnt("sd1", MANY, 75))
    assert "dialects" not in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------- the tokenizer


@pytest.mark.parametrize("clean", ["transformers", "original"])
def test_pieces_of_learnt_words(models, clean):
    plain = Tokenizer.from_folder(models.folder("sd1") / "tokenizer", clean)
    tokenizer = plain.with_words({"<toy>": [9000, 9001], "toy-box": [9002], "<Toy>er": [9003]})
    assert not plain.words and "<toy>" not in plain.ids
    assert tokenizer.encode("<TOY>") == [9000, 9001]
    assert tokenizer.pieces("a <toy>,toy-box") == ["a</w>", "<toy>", "<toy>_1", *plain.pieces(","), "toy-box"]
    assert tokenizer.encode("<toy>er") == [9003]  # the longest
    assert tokenizer.encode("<toy>_1") == [9000, 9001, *plain.encode("_1")]  # a word's other pieces are no words
    assert tokenizer.encode(PROMPT) == plain.encode(PROMPT)
    assert tokenizer.decode(tokenizer.encode("a <toy> <toy>toy-box on")) == "a <toy> <toy> toy-box on"
    assert tokenizer.decode([9001, 9000]) == "<toy>_1 <toy>"
    assert tokenizer.decode([9003, 9000, 9001]) == "<toy>er <toy>"
    words = words_of(tokenizer, "a <toy> on <Toy>er sand")
    assert [word.text for word in words] == ["a", "<toy>", "on", "<toy>er", "sand"] and len(words[1].tokens) == 2


@scenes
def test_the_embedded_model_draws_another_picture_with_a_word(tmp_path):
    pipe = ldm.load("scenes")
    table = pipe.text_encoder.embeddings.token_embedding.weight
    fish = table[pipe.tokenizer.encode("fish")]
    save_file({"<swimmer>": fish}, tmp_path / "fish.safetensors")
    pipe.add_embedding(tmp_path / "fish.safetensors")
    known, learnt = (pipe(f"a large red {each} on sand", seed=3, steps=2).x0 for each in ("fish", "<swimmer>"))
    assert torch.equal(known, learnt)  # a word whose vectors are those of another is that word
    pipe.remove_embedding("<swimmer>")
    assert pipe.text_encoder.embeddings.token_embedding.weight is table
