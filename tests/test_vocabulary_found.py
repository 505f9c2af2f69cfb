"""Where the tokenizer of a single file comes from: the places in their order, what is refused, what is said of it.

Most tests put a small vocabulary in CLIP's place (`place`); those that need CLIP's own skip where it isn't at hand.
"""

import gzip
import hashlib
import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
from test_tokenizer import AWKWARD, CLIP_MERGES, entry, random_texts

from ldm.checkpoints import vocabulary
from ldm.checkpoints.vocabulary import clip_ids, clip_tokenizer, save_tokenizer, tokenizer
from ldm.errors import LDMError
from ldm.scenes import caption, sample
from ldm.text import tokenizer_files
from ldm.text.clip import TextConfig
from ldm.text.tokenizer import Tokenizer
from ldm.text.tokenizer_files import Added, read_merges, read_published, write_tokenizer
from ldm.train.vocabulary import train_vocabulary

BOS, EOS = "<|startoftext|>", "<|endoftext|>"
NAME = "bpe_simple_vocab_16e6.txt.gz"
TEXT = TextConfig()
HEADING = '"bpe_simple_vocab_16e6.txt#version: 0.2'
needs_clip = pytest.mark.skipif(not CLIP_MERGES.exists(), reason=f"CLIP's merges are not here: {CLIP_MERGES}")

LOCAL = vocabulary.hub.local


def packed(merges) -> bytes:
    return gzip.compress("\n".join([HEADING, *map(" ".join, merges)]).encode())


@pytest.fixture(scope="session")
def learnt() -> tuple[dict, list]:
    return train_vocabulary([caption(sample(seed), seed) for seed in range(60)], 560)


@pytest.fixture
def place(learnt, tmp_path, monkeypatch):
    """A folder for a single file, on a machine without any vocabulary; the learnt one passes for CLIP's."""
    merges = learnt[1]
    digest = hashlib.sha256("\n".join(map(" ".join, merges)).encode()).hexdigest()
    monkeypatch.setattr(vocabulary, "MERGES_SHA256", digest)
    monkeypatch.setattr(vocabulary, "CLIP_SIZE", len(learnt[0]))
    monkeypatch.setattr(vocabulary.hub, "local", lambda address: None)
    monkeypatch.setattr(vocabulary, "PACKAGES", {"open_clip": "", "some_clip": "inner/assets"})
    monkeypatch.setitem(sys.modules, "open_clip", ModuleType("open_clip"))  # hides an installed one; without a spec
    monkeypatch.delenv("LDM_CLIP_VOCAB", raising=False)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    (tmp_path / "models").mkdir()
    return tmp_path / "models"


@pytest.fixture
def text(learnt) -> TextConfig:
    return replace(TEXT, vocab_size=len(learnt[0]))


def silent(line: str) -> None:
    raise AssertionError(f"nothing should be said, but was: {line}")


# ---------------------------------------------------------------------------------------------------- the places


def fill(place: Path, learnt, monkeypatch) -> dict[str, Path]:
    """CLIP's vocabulary in every place: {place to delete: the file taken from it}, in the order of the search."""
    vocab, merges = learnt
    root, files = place.parent, {}
    for folder in (place, place / "tokenizer_2", root / "wished", root / "fetched"):
        write_tokenizer(folder, vocab, merges)
        files[folder / "vocab.json"] = folder / "vocab.json"
    monkeypatch.setenv("LDM_CLIP_VOCAB", str(root / "wished"))
    monkeypatch.setattr(vocabulary.hub, "local", {"clip-vocab": root / "fetched"}.get)
    for model in ("models--a--b/snapshots/1/tokenizer", "models--c--d/snapshots/2/tokenizer_2"):
        write_tokenizer(root / "cache" / model, vocab, merges)
        files[root / "cache" / model / "vocab.json"] = root / "cache" / model / "vocab.json"
    package = root / "site" / "some_clip"
    (package / "inner" / "assets").mkdir(parents=True)
    (package / "__init__.py").write_text("raise SystemExit('a package was imported')")
    (package / "inner" / "assets" / NAME).write_bytes(packed(merges))
    monkeypatch.syspath_prepend(root / "site")
    files[package / "inner" / "assets" / NAME] = package / "inner" / "assets" / NAME
    return files


def test_places_in_their_order_and_nothing_is_imported(place, learnt, text, monkeypatch):
    files, said = fill(place, learnt, monkeypatch), []
    file = place / "model.safetensors"
    for taken in files:
        found = tokenizer(file, EOS, text, said.append)
        assert said == [f"{file} holds no tokenizer; taking CLIP's vocabulary from {taken}."]
        assert found.ids == learnt[0] and list(found.ranks) == learnt[1]
        said.clear()
        taken.unlink()
        if taken.parent.name == "wished":
            with pytest.raises(LDMError, match=r"LDM_CLIP_VOCAB is .*wished, which doesn't give"):
                tokenizer(file, EOS, text, silent)
            monkeypatch.delenv("LDM_CLIP_VOCAB")
    assert len(files) == 7 and "some_clip" not in sys.modules
    with pytest.raises(LDMError, match=r"run `ldm fetch clip-vocab`, or set LDM_CLIP_VOCAB to .* or put"):
        tokenizer(file, EOS, text, silent)


def test_search_goes_on_without_huggingface_hub(place, learnt, text, monkeypatch):
    files = fill(place, learnt, monkeypatch)
    for path in list(files)[:3]:
        path.unlink()
    monkeypatch.delenv("LDM_CLIP_VOCAB")
    assert vocabulary.find_clip(place / "model.ckpt", silent)[0] == list(files)[3]
    monkeypatch.setattr(vocabulary.hub, "local", LOCAL)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert vocabulary.find_clip(place / "model.ckpt", silent)[0] == list(files)[4]


def test_zoo_has_the_name_that_is_asked_for(tmp_path, monkeypatch):
    """The real `hub.local`, and no request: the network is off in tests."""
    pytest.importorskip("huggingface_hub")
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert vocabulary.hub.local("clip-vocab") is None


def test_cache_is_where_the_environment_says(place, learnt, tmp_path, monkeypatch):
    write_tokenizer(tmp_path / "hub" / "models--a--b/snapshots/1/tokenizer", *learnt)
    write_tokenizer(tmp_path / "huggingface/hub" / "models--a--b/snapshots/1", *learnt)
    assert list(vocabulary.cached()) == []
    monkeypatch.delenv("HF_HUB_CACHE")
    for name, expected in {"HF_HOME": "hub", "XDG_CACHE_HOME": "huggingface/hub"}.items():
        monkeypatch.delenv("HF_HOME", raising=False)
        monkeypatch.setenv(name, str(tmp_path))
        assert [path.is_relative_to(tmp_path / expected) for path in vocabulary.cached()] == [True]


def test_another_tokenizer_in_the_cache_is_no_news(place, learnt, text, monkeypatch):
    files = fill(place, learnt, monkeypatch)
    first, second = [path for path in files if "cache" in path.parts]
    for path in files.keys() - {first, second}:
        path.unlink()
    monkeypatch.delenv("LDM_CLIP_VOCAB")
    (first.parent / "merges.txt").write_text("#version: 0.2\na b\n")
    assert vocabulary.find_clip(place / "model.ckpt", silent)[0] == second


@pytest.mark.parametrize("form", ["vocab.json", "tokenizer.json", NAME, "renamed", "folder", "model", "~"])
def test_forms_that_the_variable_may_name(place, learnt, text, form, monkeypatch):
    vocab, merges = learnt
    folder = place.parent / "wished" / ("tokenizer" if form == "model" else "")
    write_tokenizer(folder, vocab, merges)
    if form in (NAME, "renamed"):
        (folder / form).write_bytes(packed(merges))
    if form == "tokenizer.json":
        model = {"type": "BPE", "end_of_word_suffix": "</w>", "vocab": vocab, "merges": merges}
        (folder / form).write_text(json.dumps({"model": model}))
    monkeypatch.setenv("HOME", str(place.parent))
    named = {"folder": folder, "model": folder.parent, "~": "~/wished"}.get(form, folder / form)
    monkeypatch.setenv("LDM_CLIP_VOCAB", str(named))
    assert tokenizer(place / "model.ckpt", "!", text, lambda line: None).ids == vocab


def test_variable_that_names_something_else_is_never_passed_over(place, learnt, text, monkeypatch):
    vocab, merges = learnt
    files = fill(place, learnt, monkeypatch)
    (place / "vocab.json").unlink(), (place / "tokenizer_2" / "vocab.json").unlink()
    swapped = dict(zip(vocab, [1, 0, *range(2, len(vocab))], strict=True))
    wished = place.parent / "wished"
    for ids, pairs, message in [
        (swapped, merges, "isn't CLIP's vocabulary"),
        (vocab, [*merges[1:], merges[0]], "isn't CLIP's vocabulary"),
        (vocab | {"more": len(vocab)}, merges, "isn't CLIP's vocabulary"),
        (*train_vocabulary(["a red house"] * 3, 520), "isn't CLIP's vocabulary"),
        (vocab, [("one",)], "isn't two pieces"),
    ]:
        write_tokenizer(wished, ids, pairs)
        with pytest.raises(LDMError, match=f"LDM_CLIP_VOCAB is .*{message}.*mend or unset it"):
            tokenizer(place / "model.ckpt", EOS, text, silent)
    monkeypatch.setenv("LDM_CLIP_VOCAB", str(place / "nowhere"))
    with pytest.raises(LDMError, match=r"nowhere, which doesn't give CLIP's vocabulary \(there is no vocab\.json, t"):
        tokenizer(place / "model.ckpt", EOS, text, silent)
    monkeypatch.setenv("LDM_CLIP_VOCAB", "")  # is no wish
    tokenizer(place / "model.ckpt", EOS, text, lambda line: None)
    assert files


def test_another_vocabulary_beside_the_file_is_passed_over_aloud(place, learnt, text, monkeypatch):
    fill(place, learnt, monkeypatch)
    (place / "vocab.json").write_text('{"a": 0}')
    (place / "tokenizer.json").write_text('{"model": {"type": "Unigram"}}')
    said = []
    tokenizer(place / "model.ckpt", EOS, text, said.append)
    assert said[0] == f"Passed over: {place / 'vocab.json'} isn't CLIP's vocabulary; it is another one, or damaged."
    assert "Passed over" in said[1] and "Unigram" in said[1] and len(said) == 3
    assert said[2].endswith(f"from {place / 'tokenizer_2' / 'vocab.json'}.")


# ---------------------------------------------------------------------------------------------------- a model's own


def test_folders_of_the_models_own(place, learnt, text, monkeypatch):
    """They need not hold CLIP's vocabulary, come before all else, and before each other in this order."""
    fill(place, learnt, monkeypatch)
    file, own = place / "my.model.safetensors", train_vocabulary(["a red house"] * 3, 520)
    assert set(own[0]) != set(learnt[0])
    for name in ("tokenizer", "tokenizer_2"):
        folders = [place / f"my.model.{name}", place / "my.model" / name, place / name]
        for length, folder in enumerate(folders, start=9):
            write_tokenizer(folder, *own, max_length=length)
        for length, folder in enumerate(folders, start=9):
            said = []
            found = tokenizer(file, EOS, text, said.append, name)
            assert (found.ids, found.max_length) == (own[0], length)
            unusual = f"which has {len(own[0])} pieces, where the text encoder knows {text.vocab_size}"
            heard = [f"{file} holds no tokenizer; taking {folder}, {unusual} (if it is another model's, take it away)."]
            assert said == ([] if folder in folders[:2] else heard)
            shutil.rmtree(folder)


def test_padding_of_another_family_is_told(place, learnt, text):
    write_tokenizer(place / "tokenizer", *learnt, special={"bos": BOS, "eos": EOS, "unk": EOS, "pad": "!"})
    said = []
    assert tokenizer(place / "a.ckpt", "!", text, said.append, clean="original").clean == "original"
    assert tokenizer(place / "a.ckpt", "!", text, said.append).pad_id == 0
    assert tokenizer(place / "a.ckpt", EOS, text, said.append).pad_id == 0
    assert said[0].endswith(f"taking {place / 'tokenizer'}.")
    assert "which pads with '!', where its family pads with '<|endoftext|>' (if it is another model's" in said[2]


def test_own_tokenizer_must_fit_the_text_encoder(place, learnt, text):
    write_tokenizer(place / "a.tokenizer", *learnt)
    size = text.vocab_size
    for narrow in (replace(text, vocab_size=size - 1), replace(text, max_position_embeddings=76)):
        read = f"{narrow.max_position_embeddings} of {narrow.vocab_size}"
        with pytest.raises(LDMError, match=rf"a.tokenizer writes 77 tokens of {size} kinds, .*reads {read}: put"):
            tokenizer(place / "a.ckpt", EOS, narrow, silent)
    (place / "a.tokenizer" / "vocab.json").unlink()  # a damaged one is never passed over
    with pytest.raises(LDMError, match=r"lacks vocab\.json"):
        tokenizer(place / "a.ckpt", EOS, text, silent)


def test_encoder_of_another_vocabulary_isnt_given_clips(place, learnt, text, monkeypatch):
    fill(place, learnt, monkeypatch)
    shutil.rmtree(place / "tokenizer_2")
    small = replace(text, vocab_size=text.vocab_size - 1)
    with pytest.raises(LDMError, match=r"isn't CLIP's vocabulary of .*beside it, as the folder a.tokenizer_2."):
        tokenizer(place / "a.ckpt", EOS, small, silent, "tokenizer_2")
    short = replace(text, max_position_embeddings=9, vocab_size=text.vocab_size + 5)
    assert tokenizer(place / "a.ckpt", EOS, short, lambda line: None)("a").ids.shape == (1, 9)
    long = replace(text, max_position_embeddings=248)
    found = tokenizer(place / "a.ckpt", EOS, long, lambda line: None, clean="original")
    assert (found.max_length, found.clean) == (77, "original")


# ---------------------------------------------------------------------------------------------------- CLIP's own


@pytest.fixture(scope="session")
def clip_merges() -> list:
    return read_published(CLIP_MERGES)


@needs_clip
def test_published_file_is_clips_vocabulary(clip_merges, tmp_path, monkeypatch):
    lines = gzip.decompress(CLIP_MERGES.read_bytes()).decode().split("\n")
    assert [" ".join(pair) for pair in clip_merges] == lines[1:48895]
    ids = clip_ids(clip_merges)
    # The hash of merges.txt, and the sizes of vocab.json on one line and indented, as the hub has them.
    write_tokenizer(tmp_path / "written", ids, clip_merges)
    written = hashlib.sha256((tmp_path / "written" / "merges.txt").read_bytes()).hexdigest()
    assert written == "9fd691f7c8039210e0fced15865466c65820d09b63988b0174bfe25de299051a"
    assert len(json.dumps(ids, ensure_ascii=False).encode()) == 961_143
    assert len((json.dumps(ids, ensure_ascii=False, indent=2) + "\n").encode()) == 1_059_962
    assert (len(ids), ids["!"], ids["a</w>"], ids["cat</w>"]) == (49408, 0, 320, 2368)
    assert (ids[BOS], ids[EOS]) == (49406, 49407) == (vocabulary.CLIP_SIZE - 2, vocabulary.CLIP_SIZE - 1)
    monkeypatch.setenv("LDM_CLIP_VOCAB", str(CLIP_MERGES))
    said = []
    found = tokenizer(tmp_path / "v1-5.ckpt", "!", TEXT, said.append)
    assert found("a photo of a cat").ids[0, :8].tolist() == [49406, 320, 1125, 539, 320, 2368, 49407, 0]
    assert said == [f"{tmp_path / 'v1-5.ckpt'} holds no tokenizer; taking CLIP's vocabulary from {CLIP_MERGES}."]


def published_folder(folder: Path, merges, pad: str, newer: bool) -> Path:
    """A tokenizer's folder as Stable Diffusion's repositories hold it; `newer`: as SDXL's second is written."""
    write_tokenizer(folder, clip_ids(merges), merges)
    tokens = {f"{name}_token": entry(BOS if name == "bos" else EOS) for name in ("bos", "eos", "unk")}
    config = {"model_max_length": 77, "do_lower_case": True}
    if newer:
        listed = {"0": entry("!", False, special=True)}
        listed |= {"49406": entry(BOS, special=True), "49407": entry(EOS, special=True)}
        names = {"bos_token": BOS, "eos_token": EOS, "unk_token": EOS}
        config |= {"added_tokens_decoder": listed, "pad_token": pad, **names}
    (folder / "special_tokens_map.json").write_text(json.dumps({**tokens, "pad_token": pad}))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@needs_clip
@pytest.mark.parametrize(("pad", "newer"), [(EOS, False), ("!", False), ("!", True)], ids=["sd1", "sd2", "sdxl2"])
def test_made_tokenizers_equal_those_of_the_families_folders(clip_merges, tmp_path, pad, newer):
    """transformers on the families' folders, and transformers and ours on what `save_tokenizer` writes."""
    transformers = pytest.importorskip("transformers")
    texts = [*AWKWARD, f"{BOS.upper()} a {EOS.upper()}!", *random_texts(300, seed=5)]
    ours = clip_tokenizer(clip_merges, pad)
    save_tokenizer(ours, tmp_path / "saved")
    folder = published_folder(tmp_path / "published", clip_merges, pad, newer)
    tokens = ours(texts)
    for each in (folder, tmp_path / "saved"):
        theirs = transformers.CLIPTokenizer.from_pretrained(each)
        expected = theirs(texts, padding="max_length", truncation=True, max_length=77, return_tensors="pt")
        assert tokens.ids.tolist() == expected.input_ids.tolist()
        assert tokens.mask.tolist() == expected.attention_mask.tolist()
    assert len({tuple(row) for row in tokens.ids.tolist()}) > 250 and tokens.ids[0, 2:].unique().tolist() == [
        ours.pad_id
    ]
    alike(ours, Tokenizer.from_folder(tmp_path / "saved"))


@needs_clip
def test_single_json_that_transformers_writes_is_clips(clip_merges, tmp_path):
    transformers = pytest.importorskip("transformers")
    write_tokenizer(tmp_path / "old", clip_ids(clip_merges), clip_merges)
    transformers.CLIPTokenizer.from_pretrained(tmp_path / "old").save_pretrained(tmp_path / "new")
    assert vocabulary.read_clip(tmp_path / "new" / "tokenizer.json") == clip_merges
    assert vocabulary.read_clip(tmp_path / "old" / "vocab.json") == clip_merges


# ---------------------------------------------------------------------------------------------------- written


def alike(a: Tokenizer, b: Tokenizer) -> None:
    for name in ("vocab", "ids", "ranks", "added", "max_length", "bos", "eos", "bos_id", "eos_id", "unk_id", "pad_id"):
        assert getattr(a, name) == getattr(b, name), name


@pytest.mark.parametrize("form", ["plain", "inverted", "own"])
def test_saved_tokenizers_come_back_alike_in_transformers_too(learnt, tmp_path, form):
    """Tokens beyond the vocabulary (textual inversion), other special tokens, another length."""
    transformers = pytest.importorskip("transformers")
    vocab, merges = learnt
    n = len(vocab)
    ours = {
        "plain": Tokenizer(vocab, merges, None, {BOS: Added(n - 2, normalized=True)}),
        "inverted": Tokenizer(
            vocab,
            merges,
            {"pad": "!"},
            {
                EOS: Added(n - 1, normalized=True),
                "<Cat-toy>": Added(n, True, False),
                "<小猫>": Added(n + 1, False, False),
            },
        ),
        "own": Tokenizer(
            vocab, merges, {"unk": "a</w>", "pad": "[PAD]"}, {"[PAD]": Added(n), "the</w>": Added(vocab["the</w>"])}, 12
        ),
    }[form]
    save_tokenizer(ours, tmp_path)
    alike(ours, Tokenizer.from_folder(tmp_path))
    theirs = transformers.CLIPTokenizer.from_pretrained(tmp_path)
    texts = [
        *AWKWARD,
        "a <cat-toy> on <CAT-TOY>x<小猫>猫",
        f"a {EOS.upper()} [PAD] the</w>",
        *random_texts(100, seed=6),
    ]
    expected = theirs(texts, padding="max_length", truncation=True, max_length=ours.max_length, return_tensors="pt")
    tokens = ours(texts)
    assert tokens.ids.tolist() == expected.input_ids.tolist()
    assert (theirs.model_max_length, len(theirs)) == (ours.max_length, len(ours))
    assert form != "inverted" or {n, n + 1} <= set(tokens.ids.flatten().tolist())
    assert ours.decode(tokens.ids[5], True) == theirs.decode(expected.input_ids[5], skip_special_tokens=True)
    if form == "plain":  # a reader that knows no list of added tokens finds the special ones in their older place
        content = json.loads((tmp_path / "tokenizer_config.json").read_text())
        del content["added_tokens_decoder"]
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(content))
        alike(ours, Tokenizer.from_folder(tmp_path))


# ---------------------------------------------------------------------------------------------------- damaged files


def test_published_file_takes_the_first_merges_below_its_heading(tmp_path, monkeypatch):
    monkeypatch.setattr(tokenizer_files, "CLIP_MERGES", 2)
    (tmp_path / NAME).write_bytes(packed([("a", "b"), ("\u0085", "c</w>"), ("d", "e"), ("not", "two", "pieces")]))
    assert read_published(tmp_path / NAME) == [("a", "b"), ("\u0085", "c</w>")]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data[:-9], "cut off"),
        (lambda data: data + b"\0", "goes on behind its end"),
        (lambda data: data + data, "goes on behind its end"),
        (lambda data: data[:-8] + bytes(4) + data[-4:], "isn't a whole gzip file"),
        (lambda data: b"PK" + data[2:], "isn't a whole gzip file"),
        (lambda data: b"", "cut off"),
        (lambda data: gzip.compress(b"a b\n" * 1_000_001), "unpacks to too much"),
        (lambda data: gzip.compress(bytes(200_000_000), 1), "unpacks to too much"),
        (lambda data: b"\x1f\x8b" + bytes(4_000_001), "larger than 4000000 bytes"),
        (lambda data: gzip.compress(b"x\n\xff b"), "isn't UTF-8 text"),
        (lambda data: gzip.compress(b"x\na b\na  b"), "line 3: 'a  b' isn't two pieces"),
        (lambda data: gzip.compress(b"x\n" + b"a" * 3_000_000), "line 2: '" + "a" * 80 + "' isn't two pieces"),
    ],
)
def test_damaged_published_files_are_explained(tmp_path, damage, message):
    path = tmp_path / NAME
    path.write_bytes(damage(packed([("a", "b")] * 50)))
    with pytest.raises(LDMError, match=message) as caught:
        read_published(path)
    assert len(str(caught.value)) < 400 and str(path) in str(caught.value)


def test_lists_of_merges_are_bounded_and_must_be_readable(tmp_path):
    path = tmp_path / "merges.txt"
    path.write_bytes(b"#version: 0.2\n" + b"a b\n" * 1_000_000)
    with pytest.raises(LDMError, match="larger than 4000000 bytes"):
        read_merges(path)
    path.write_bytes(b"a \xff\n")
    with pytest.raises(LDMError, match="isn't UTF-8 text"):
        read_merges(path)
    path.unlink(), path.mkdir()
    with pytest.raises(LDMError, match="is a folder, not a file"):
        read_merges(path)
