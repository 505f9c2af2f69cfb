"""T5's tokenizer equals transformers' on the same files, and its two libraries agree; cuts, padding, broken files."""

import builtins
import io
import json
import random
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer as Library
from tokenizers import models, pre_tokenizers, trainers
from transformers import T5Tokenizer as Theirs

from ldm.errors import LDMError
from ldm.text.t5_tokenizer import Speller, T5Tokenizer

WORDS = """a an the lighthouse stands by near sea table cubes cube red green two three spheres sphere and on of in photo
painting quick brown fox jumps over lazy dog Größe Maß café naïve don't we're 12345 67890 日本語 テスト stone tall"""
# Letters of the vocabulary and others; every kind of space; signs, emoji, joined emoji, a piece's own mark.
CHARACTERS = "abcdeghilnorst  \t\n\r ,.'12éßÅΩ日本語😀👩\u200d👧☃<>/_▁\x00\u00a0\u200b\u2028\u3000"
FORMS = "ﬁ½①ｆ㍿ﷺ"  # these have a plain form under NFKC
SPECIAL = ["</s>", "<pad>", "<unk>", "<extra_id_0>", " <extra_id_99> ", "<extra_id_100>", "</s", "<PAD>"]


def sentences(count, seed=0):
    rng, words = random.Random(seed), WORDS.split()
    return [" ".join(rng.choices(words, k=7)) for _ in range(count)]


def texts(count, characters=CHARACTERS, seed=1):
    """Empty ones, words, letters in any order, special tokens spelled out, and some far longer than the rest."""
    rng, words = random.Random(seed), WORDS.split()
    for n in range(count):
        letters = "".join(rng.choices(characters, k=rng.randrange(25)))
        said = rng.choice(["", " ", "  "]).join(rng.choices(words, k=rng.choice([0, 1, 5, 5, 120])))
        yield (letters + said, said + letters, letters + rng.choice(SPECIAL) + said, said)[n % 4]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tokenizer of T5's kind, learnt here, as transformers writes it."""
    library = Library(models.Unigram())
    library.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")]
    )
    special = ["<pad>", "</s>", "<unk>"]
    trainer = trainers.UnigramTrainer(vocab_size=150, special_tokens=special, unk_token="<unk>", show_progress=False)
    library.train_from_iterator(sentences(300), trainer)
    learnt = [tuple(pair) for pair in json.loads(library.to_str())["model"]["vocab"]]
    path = tmp_path_factory.mktemp("t5") / "tokenizer_2"
    Theirs(vocab=learnt + [(f"<extra_id_{n}>", 0.0) for n in range(99, -1, -1)], model_max_length=64).save_pretrained(
        path
    )
    return path


@pytest.fixture(scope="module")
def both(folder):
    return T5Tokenizer.from_folder(folder), Theirs.from_pretrained(folder)


def assert_same(ours, theirs, text, length):
    tokens = ours(text, length)
    expected = theirs(text, max_length=length, padding="max_length", truncation=True, return_tensors="pt")
    assert torch.equal(tokens.ids, expected.input_ids), ascii(text)
    assert torch.equal(tokens.mask, expected.attention_mask), ascii(text)
    return tokens


# ------------------------------------------------------------------------------------------------ parity


def test_ids_equal_transformers_on_generated_texts(both):
    seen, cut = set(), 0
    for n, text in enumerate(texts(600, CHARACTERS + "\x85")):
        tokens = assert_same(*both, text, (1, 2, 3, 17, 64, 256, 512)[n % 7])
        seen |= set(tokens.ids.flatten().tolist())
        cut += bool(tokens.cut[0])
    assert len(seen) > 70 and 100 < cut < 500  # not unknown pieces and padding alone


def test_a_batch_is_its_rows(both):
    batch = ["a lighthouse", "", "two red cubes " * 200, "\n\t 😀", "</s>"]
    for length in (5, 64, 256):
        tokens = assert_same(*both, batch, length)
        assert tokens.ids.shape == tokens.mask.shape == (5, length) and tokens.ids.dtype == torch.int64
        for row, text in enumerate(batch):
            assert torch.equal(tokens.ids[row], both[0](text, length).ids[0])
    assert both[0]([]).ids.shape == (0, 64)


def test_pieces_and_numbers_equal_transformers(both):
    ours, theirs = both
    assert ours.ids == theirs.get_vocab() and len(ours) == len(theirs) == 1 + max(ours.ids.values())
    assert (ours.pad_id, ours.eos_id, ours.unk_id) == (0, 1, 2)
    for text in texts(100, seed=2):
        # Of what isn't known, transformers names the letters.
        assert ours.pieces(text) == [p if p in ours.ids else "<unk>" for p in theirs.tokenize(text)]
        assert ours.encode(text) == theirs(text, add_special_tokens=False).input_ids


# ------------------------------------------------------------------------------------------------ cutting


def test_the_end_token_is_kept_and_what_is_not_read_is_told(both):
    ours, _ = both
    text = "a lighthouse by the sea and two red cubes on a table"
    whole = ours.encode(text)
    for length in (1, 2, 8, len(whole), len(whole) + 1, len(whole) + 5):
        tokens = ours(text, length)
        row, read = tokens.ids[0].tolist(), min(len(whole), length - 1)
        assert row == whole[:read] + [1] + [0] * (length - read - 1)
        assert tokens.mask[0].sum() == read + 1
        assert tokens.cut == [ours.decode(whole[read:])]
        together = f"{ours.decode(whole[:read])}{tokens.cut[0]}".replace(" ", "")
        assert together == text.replace(" ", "")
        assert (tokens.cut[0] == "") == (length > len(whole))
    assert ours("the sea", 2).cut == ["the sea".removeprefix(ours.decode(ours.encode("the sea")[:1])).strip()]


def test_the_length_is_the_files_unless_another_is_asked_for(both, folder, tmp_path):
    ours, _ = both
    assert ours.max_length == 64 and ours("a").ids.shape == (1, 64) and len(ours.frame([5])) == 64
    for said, length in ((512, 512), (10**30, 512), (None, 512), (7.0, 7)):
        copy_of(folder, tmp_path, settings={"model_max_length": said})
        assert T5Tokenizer.from_folder(tmp_path).max_length == length
    for wrong in (0, -1, 2.0, "64", True):
        with pytest.raises(LDMError, match="max_sequence_length must be a whole number"):
            ours("a", wrong)


def test_decoding_is_transformers_own(both):
    ours, theirs = both
    for text in sentences(20, seed=5):
        ids = ours.encode(text)
        assert ours.decode(ids) == theirs.decode(ids)
    with pytest.raises(LDMError, match="999 isn't in"):
        ours.decode([5, 999])


def test_no_text_is_refused_by_name(both):
    for wrong in (None, 3, ["a"]):
        with pytest.raises(LDMError, match="must be a text"):
            both[0].encode(wrong)
    with pytest.raises(LDMError, match=r"half of a surrogate pair"):
        both[0]("a \ud83d b")


# ------------------------------------------------------------------------------------------------ files


def copy_of(folder, to, change=lambda fields: None, settings=None):
    fields = json.loads((folder / "tokenizer.json").read_text())
    change(fields)
    (to / "tokenizer.json").write_text(json.dumps(fields))
    if settings is not None:
        (to / "tokenizer_config.json").write_text(json.dumps(settings))
    return to


def test_a_file_of_the_older_style_reads_alike(both, folder, tmp_path):
    """Of tokenizers 0.13, which published most T5s; with cutting and padding, which a file keeps after use."""

    def change(fields):
        fields["pre_tokenizer"]["pretokenizers"][1] = {
            "type": "Metaspace",
            "replacement": "▁",
            "add_prefix_space": True,
        }
        fields["truncation"] = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
        fields["padding"] = {"strategy": {"Fixed": 9}, "direction": "Right", "pad_to_multiple_of": None}
        fields["padding"] |= {"pad_id": 0, "pad_type_id": 0, "pad_token": "<pad>"}
        del fields["model"]["byte_fallback"]

    older = T5Tokenizer.from_folder(copy_of(folder, tmp_path, change))
    assert older.max_length == 512
    for text in texts(40, seed=6):
        assert older.encode(text) == both[0].encode(text)


def test_what_is_written_is_what_was_read(both, folder, tmp_path):
    both[0].write(tmp_path / "new" / "tokenizer_2")
    for path in (tmp_path / "new" / "tokenizer_2").iterdir():
        assert path.read_bytes() == (folder / path.name).read_bytes()
    again = T5Tokenizer.from_folder(tmp_path / "new" / "tokenizer_2")
    assert again.max_length == 64 and again.ids == both[0].ids


BROKEN = {
    "not Unigram": (lambda f: f.update(model={"type": "BPE", "vocab": {}, "merges": []}), "Unigram"),
    "no model": (lambda f: f.pop("model"), "Unigram"),
    "no vocabulary": (lambda f: f["model"].update(vocab=[]), "can't be read by the tokenizers library"),
    "no unknown piece": (lambda f: f["model"].update(unk_id=None), "unk_id"),
    "a table that makes the library panic": (
        lambda f: f.update(normalizer={"type": "Precompiled", "precompiled_charsmap": "AAAA"}),
        "can't be read by the tokenizers library",
    ),
    "no end token": (
        lambda f: (f["model"]["vocab"][1].__setitem__(0, "<s>"), f.update(added_tokens=[], post_processor=None)),
        "lacks '</s>'",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_refused(folder, tmp_path, name):
    change, said = BROKEN[name]
    with pytest.raises(LDMError, match=said):
        T5Tokenizer.from_folder(copy_of(folder, tmp_path, change))


def test_a_folder_is_refused_by_what_it_lacks_or_says(folder, tmp_path):
    with pytest.raises(LDMError, match="no tokenizer folder"):
        T5Tokenizer.from_folder(tmp_path / "nowhere")
    with pytest.raises(LDMError, match=r"lacks tokenizer.json and spiece.model"):
        T5Tokenizer.from_folder(tmp_path)
    for settings in ({"model_max_length": "512"}, {"model_max_length": -3}, {"extra_ids": 1.5}, {"extra_ids": -1}):
        with pytest.raises(LDMError, match=next(iter(settings))):
            T5Tokenizer.from_folder(copy_of(folder, tmp_path, settings=settings))
    (tmp_path / "tokenizer_config.json").unlink()
    (tmp_path / "tokenizer.json").write_bytes(b" " * 10_000_001)
    with pytest.raises(LDMError, match="larger than"):
        T5Tokenizer.from_folder(tmp_path)
    with pytest.raises(LDMError, match="one id to several"):
        T5Tokenizer(Speller(lambda text: [], {"<pad>": 0, "</s>": 1, "<unk>": 2, "a": 2}))


@pytest.mark.parametrize("files,hint", [(["tokenizer.json"], "tokenizers"), (["spiece.model"], "sentencepiece")])
def test_a_missing_library_is_named(folder, tmp_path, monkeypatch, files, hint):
    without(monkeypatch, "tokenizers", "sentencepiece")
    for name in files:
        (tmp_path / name).write_bytes((folder / "tokenizer.json").read_bytes())
    with pytest.raises(LDMError, match=f"`pip install {hint}` for {files[0]}"):
        T5Tokenizer.from_folder(tmp_path)


def without(monkeypatch, *names):
    """As if these packages weren't installed."""
    real = builtins.__import__

    def importing(name, *args, **kwargs):
        if name in names:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", importing)


# ------------------------------------------------------------------------------------------------ sentencepiece


@pytest.fixture(scope="module")
def spiece(tmp_path_factory):
    """The same model twice: (its folder as sentencepiece writes it, as transformers writes it)."""
    library = pytest.importorskip("sentencepiece")
    out = io.BytesIO()
    library.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences(300)),
        model_writer=out,
        vocab_size=150,
        hard_vocab_limit=False,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    original, theirs = (tmp_path_factory.mktemp("spiece") / name for name in ("original", "theirs"))
    original.mkdir()
    (original / "spiece.model").write_bytes(out.getvalue())
    model = library.SentencePieceProcessor(model_proto=out.getvalue())
    learnt = [(model.id_to_piece(n), model.get_score(n)) for n in range(model.get_piece_size())]
    extra = [(f"<extra_id_{n}>", 0.0) for n in range(99, -1, -1)]
    Theirs(vocab=learnt + extra, _spm_precompiled_charsmap=table_of(out.getvalue())).save_pretrained(theirs)
    return original, theirs


def table_of(proto):
    """The table of plain forms in a sentencepiece file: field 2 of field 3."""
    return messages(messages(proto)[3])[2]


def messages(data):
    """A protobuf's fields by number; of repeated ones the last."""
    found, at = {}, 0

    def number():
        nonlocal at
        value = shift = 0
        while True:
            byte = data[at]
            value, shift, at = value | (byte & 127) << shift, shift + 7, at + 1
            if byte < 128:
                return value

    while at < len(data):
        key = number()
        size = {0: 0, 1: 8, 2: None, 5: 4}[key & 7]
        if size == 0:
            found[key >> 3] = number()
            continue
        size = number() if size is None else size
        found[key >> 3] = data[at : at + size]
        at += size
    return found


def test_spiece_equals_transformers(spiece):
    """With plain forms too. Where the libraries differ is said in the docstring, and noticed when it changes."""
    ours, theirs = T5Tokenizer.from_folder(spiece[0]), Theirs.from_pretrained(spiece[1])
    by_json = T5Tokenizer.from_folder(spiece[1])
    assert ours.ids == by_json.ids == theirs.get_vocab() and ours.max_length == 512
    for n, text in enumerate(texts(600, CHARACTERS.replace("\u200d", "") + FORMS, seed=7)):
        length = (1, 3, 17, 64, 256, 512)[n % 6]
        assert_same(by_json, theirs, text, length)
        tokens = assert_same(ours, theirs, text, length)
        assert tokens.cut == by_json(text, length).cut
    for differing in ("½\u0304 stone", "a\x85stone"):
        assert by_json.pieces(differing) != ours.pieces(differing)
    assert by_json.pieces("👩\u200d👧 ½ é\u0304") == ours.pieces("👩\u200d👧 ½ é\u0304")


def test_spiece_is_read_where_tokenizers_is_missing(spiece, tmp_path, monkeypatch):
    (tmp_path / "spiece.model").write_bytes((spiece[0] / "spiece.model").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"extra_ids": 3, "model_max_length": 9}))
    (tmp_path / "tokenizer.json").write_text("{}")
    without(monkeypatch, "tokenizers")
    ours = T5Tokenizer.from_folder(tmp_path)
    assert ours("the sea").ids.shape == (1, 9)
    assert [ours.ids[f"<extra_id_{n}>"] for n in (2, 0)] == [len(ours) - 3, len(ours) - 1]
    assert sorted(ours.files) == ["spiece.model", "tokenizer.json", "tokenizer_config.json"]


@pytest.mark.parametrize("data", [b"", b"junk" * 99, bytes(500), None])
def test_a_broken_spiece_is_refused(spiece, tmp_path, data):
    data = (spiece[0] / "spiece.model").read_bytes()[:1000] if data is None else data
    (tmp_path / "spiece.model").write_bytes(data)
    with pytest.raises(LDMError, match="can't be read by the sentencepiece library"):
        T5Tokenizer.from_folder(Path(tmp_path))
