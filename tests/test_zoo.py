"""Addresses on the hub, the zoo's table, and which files of a repository are read: nothing here opens a connection."""

import gzip
import json
import re
from pathlib import Path

import pytest
from hub_server import HALF_UNET, INDEX, PLAIN_UNET, WANTED, pipeline, sha256

from ldm.checkpoints import folder
from ldm.errors import LDMError
from ldm.hub import fetching as hub
from ldm.hub import wanted, zoo
from ldm.hub.zoo import Address, parse
from ldm.io.folders import find_weights

ROOT = Path(__file__).resolve().parent.parent


# ---------------------------------------------------------------------------------------------------- addresses


@pytest.mark.parametrize(
    "text, address",
    [
        ("org/name", Address("org/name")),
        ("Org-1/na.me_2", Address("Org-1/na.me_2")),
        ("org/name@v1.0", Address("org/name", "v1.0")),
        ("org/name/file.safetensors", Address("org/name", path="file.safetensors")),
        ("org/name@abc/a/b--c.ckpt", Address("org/name", "abc", "a/b--c.ckpt")),
    ],
)
def test_addresses_are_read(text, address):
    assert parse(text) == address == zoo.address(text)


@pytest.mark.parametrize(
    "text",
    [
        "scenes", "name", "", "/org/name", "./org/name", "../org/name", "org/..", "org/../name", "~/name", "org/name/",
        "org//name", "org/name/folder", "org/name/run.py", "org/name@", "org/name@a/../b.safetensors", "a--b/name",
        "org/name.git", "org/name.", "org\\name", "C:/name", "org/na me", "org/name\n", "ünd/name", "org/nüme",
        "org/name/../x.ckpt",
        "org/name@../x", "org/.hidden", "org/name/.hidden.safetensors", "https://host/x", "org/name?x=1", "-org/name",
    ],
)  # fmt: skip
def test_what_is_no_address(text):
    assert parse(text) is None


def test_a_name_of_the_zoo_is_pinned():
    address = parse("sd15")
    assert address == zoo.find("sd15").sources[0] and re.fullmatch("[0-9a-f]{40}", address.revision)
    with pytest.raises(LDMError, match=r"no model 'sd-15'.*Did you mean 'sd15'"):
        zoo.find("sd-15")
    with pytest.raises(LDMError, match=r"neither a name of the zoo.*Did you mean 'sdxl-turbo'"):
        hub.fetch("sdxl_turbo")


# ---------------------------------------------------------------------------------------------------- the table


def test_the_table_is_whole():
    models = zoo.zoo()
    assert len(models) > 25 and "clip-vocab" in models
    assert sum(bool(re.fullmatch("[0-9a-f]{40}", model.sources[0].revision)) for model in models.values()) > 25
    for model in models.values():
        assert model.what and model.licence and model.sources
        for old in model.formerly:
            assert zoo.entry_of(old) in (model,)
        assert zoo.entry_of(model.name) is model


@pytest.mark.parametrize(
    "text, what",
    [
        ("[a", "not valid TOML"),
        ('[a]\nwhat = "x"\nrepo = "o/n"\nlicense = "mit"', "unknown field 'license'.*mean 'licence'"),
        ('[a]\nwhat = "x"\nrepo = "o/n"', "lacks licence"),
        ('[a]\nwhat = "x"\nrepo = "o"\nlicence = "mit"', "no address"),
        ('[a]\nwhat = "x"\nrepo = "o/n"\nlicence = "mit"\nmirrors = "o/m"', "mirrors must be a list"),
        ('[a]\nwhat = "x"\nrepo = "o/n"\nlicence = "mit"\nfiles = [1]', "files must be a list"),
        ('[a]\nwhat = "x"\nrepo = "o/n"\nlicence = "mit"\ngated = "no"', "gated must be a bool"),
        ('[a]\nwhat = "x"\nrepo = "o/n"\nlicence = "mit"\ninstead = ["b"]', "names 'b'"),
        ('[a]\nwhat = "x"\nrepo = "o/n"\nlicence = "mit"\nsha256 = {f = "0123"}', "no SHA-256"),
        ('[a]\nwhat = "x"\nrepo = "o/n"\nlicence = "mit"\nmirrors = ["https://h/f.gz"]', "needs its sha256"),
        ("[A]", "small letters"),
        ("a = 1", "must be a table"),
    ],
)
def test_a_wrong_table_is_refused(text, what):
    with pytest.raises(LDMError, match=what):
        zoo.read_zoo(text, "zoo.toml")


def test_no_id_stands_elsewhere():
    ids = {source.repo for model in zoo.zoo().values() for source in model.sources if source.repo}
    ids |= {old for model in zoo.zoo().values() for old in model.formerly}
    places = [*(ROOT / "ldm").rglob("*.py"), *(ROOT / "notebooks").rglob("*.py"), ROOT / "README.md"]
    places += [path for path in (ROOT / "notebooks").rglob("*.ipynb") if ".ipynb_checkpoints" not in path.parts]
    assert len(places) > 100
    found = [(path.name, id) for path in places for id in ids if id in path.read_text(encoding="utf-8")]
    assert found == []


def test_the_merges_hash_is_that_of_the_published_vocabulary():
    """zoo.toml pins merges.txt by a hash that follows from OpenAI's file, whose own hash is pinned beside it."""
    path = ROOT.parent / "shared" / "data" / "clip-vocab" / "bpe_simple_vocab_16e6.txt.gz"
    if not path.exists():
        pytest.skip("needs OpenAI's vocabulary")
    data, known = path.read_bytes(), zoo.find("clip-vocab").sha256
    merges = gzip.decompress(data).decode().split("\n")[1 : 49152 - 256 - 2 + 1]
    assert sha256(data) == known[path.name]
    assert sha256(("#version: 0.2\n" + "\n".join(merges) + "\n").encode()) == known["merges.txt"]


# ---------------------------------------------------------------------------------------------------- which files


def choose(files: dict[str, bytes], *args, **options) -> list[str]:
    return wanted.choose(set(files), lambda name: json.loads(files[name]), "org/name", *args, **options)


def test_the_parts_are_those_that_a_folder_is_read_for():
    known = {*folder.PARTS, *folder.SECOND, *folder.FLUX, *folder.OPTIONAL, "feature_extractor"}
    assert {*wanted.PLAIN, *wanted.STEMS} == known and wanted.IDLE == folder.PASSED_OVER
    assert {name: network.stem for name, network in folder.NETWORKS.items()}.items() <= wanted.STEMS.items()


def test_only_what_is_read_is_chosen():
    assert choose(pipeline()) == WANTED
    half = [re.sub(r"(model)\.safetensors", r"\1.fp16.safetensors", name) for name in WANTED]
    assert choose(pipeline(), "fp16") == sorted(half)
    assert choose(pipeline(), "bf16") == WANTED
    assert choose(pipeline("ldm.json")) == sorted([*WANTED, "ldm.json"])


def test_a_variant_that_a_part_lacks_falls_back():
    files = pipeline(without=(HALF_UNET, "vae/diffusion_pytorch_model.safetensors"))
    assert PLAIN_UNET in choose(files, "fp16") and "vae/diffusion_pytorch_model.fp16.safetensors" in choose(files)
    for variant in ("fp16", None):
        with pytest.raises(wanted.Missing, match=r"lacks (unet|vae)/"):
            choose(files, variant, exact=True)
    files = pipeline("unet/diffusion_pytorch_model.bf16.safetensors", without=(PLAIN_UNET,))
    with pytest.raises(LDMError, match=r"several variants.*bf16, fp16"):
        choose(files)


def test_shards_come_with_their_index():
    index, shards = (
        "unet/diffusion_pytorch_model.safetensors.index.json",
        ["m-1-of-2.safetensors", "m-2-of-2.safetensors"],
    )
    files = pipeline(*(f"unet/{name}" for name in shards), without=(PLAIN_UNET,))
    files[index] = json.dumps({"weight_map": {"a": shards[1], "b": shards[0], "c": shards[1]}}).encode()
    chosen = choose(files)
    assert {index, *(f"unet/{name}" for name in shards)} <= {*chosen} and PLAIN_UNET not in chosen
    half = "unet/diffusion_pytorch_model.safetensors.index.fp16.json"
    sharded = {name: data for name, data in files.items() if name != HALF_UNET} | {half: files[index]}
    assert half in choose(sharded, "fp16")
    del files["unet/m-2-of-2.safetensors"]
    with pytest.raises(wanted.Missing, match=r"lacks unet/m-2-of-2"):
        choose(files)


@pytest.mark.parametrize("more, held", [("", PLAIN_UNET), (".fp16", HALF_UNET)])
def test_a_file_and_an_index_of_one_variant_are_refused(tmp_path, more, held):
    """By the hub as by a folder: one of them is outdated, and nothing says which."""
    index, shard = f"unet/diffusion_pytorch_model.safetensors.index{more}.json", "m-1-of-1.safetensors"
    files = pipeline(f"unet/{shard}") | {index: json.dumps({"weight_map": {"a": shard}}).encode()}
    for variant in (None, "fp16"):
        with pytest.raises(LDMError, match=rf"org/name holds both {re.escape(held)} and {re.escape(index)}"):
            choose(files, variant)
    (tmp_path / "unet").mkdir()
    for name in (held, index):
        (tmp_path / name).write_bytes(files[name])
    with pytest.raises(LDMError, match="holds both"):
        find_weights(tmp_path / "unet", "diffusion_pytorch_model")


@pytest.mark.parametrize(
    "shard",
    [
        "../vae/x.safetensors",
        "/etc/x.safetensors",
        "a/b.safetensors",
        "C:x.safetensors",
        "x.py",
        "",
        ".x",
        "x" * 300 + ".safetensors",
    ],
)
def test_an_index_names_files_of_its_own_folder(shard):
    index = "unet/diffusion_pytorch_model.safetensors.index.json"
    files = pipeline(without=(PLAIN_UNET, HALF_UNET)) | {index: json.dumps({"weight_map": {"a": shard}}).encode()}
    with pytest.raises(LDMError, match="do not trust"):
        choose(files)


def test_an_index_without_a_table_is_refused():
    index = "unet/diffusion_pytorch_model.safetensors.index.json"
    files = pipeline(without=(PLAIN_UNET, HALF_UNET)) | {index: b'{"weight_map": {"a": 1}}'}
    with pytest.raises(LDMError, match="no table"):
        choose(files)


def test_pickles_are_taken_only_if_allowed():
    files = pipeline(without=(PLAIN_UNET, HALF_UNET))
    with pytest.raises(wanted.OnlyPickles, match=r"unet/ only as pickles.*--allow-pickle"):
        choose(files)
    chosen = choose(files, allow_pickle=True)
    assert "unet/diffusion_pytorch_model.bin" in chosen and "text_encoder/pytorch_model.bin" not in chosen
    text = ("text_encoder/model.safetensors", "text_encoder/model.fp16.safetensors")
    assert "text_encoder/pytorch_model.bin" in choose(pipeline(without=text), allow_pickle=True)
    net = {"config.json": b"{}", "diffusion_pytorch_model.bin": b""}
    with pytest.raises(wanted.OnlyPickles):
        choose(net)
    assert choose(net, allow_pickle=True) == sorted(net)


def test_other_kinds_of_repositories():
    net = {"config.json": b"{}", "diffusion_pytorch_model.safetensors": b"", "README.md": b"", "x.py": b""}
    assert choose(net) == ["config.json", "diffusion_pytorch_model.safetensors"]
    depth = {"config.json": b"{}", "model.safetensors": b"", "preprocessor_config.json": b"{}", "tokenizer.json": b""}
    assert choose(depth) == ["config.json", "model.safetensors", "preprocessor_config.json"]
    with pytest.raises(LDMError, match=r"name one of its files, org/name/FILE: a.safetensors, b.ckpt"):
        choose({"a.safetensors": b"", "b.ckpt": b"", "c/d.safetensors": b"", "e.txt": b""})
    with pytest.raises(LDMError, match="holds no model"):
        choose({"README.md": b""})
    other = {"model_index.json": json.dumps({"transformer": ["diffusers", "SD3Transformer2DModel"]}).encode()}
    with pytest.raises(LDMError, match=r"a transformer that ldm doesn't know \('SD3Transformer2DModel'\): it is"):
        choose(other)
    more = pipeline() | {
        "model_index.json": json.dumps(INDEX | {"controlnet": ["diffusers", "ControlNetModel"]}).encode()
    }
    with pytest.raises(LDMError, match=r"parts that ldm doesn't know \(controlnet\)"):
        choose(more)
    with pytest.raises(LDMError, match=r"has no unet"):
        choose({"model_index.json": b"{}"})


def test_what_a_model_with_more_parts_needs():
    more = {
        "tokenizer_2": [1, "x"],
        "text_encoder_2": [1, "x"],
        "depth_estimator": [1, "x"],
        "low_res_scheduler": [1, "x"],
    }
    names = [
        "tokenizer_2/tokenizer.json", "text_encoder_2/config.json", "text_encoder_2/model.safetensors",
        "depth_estimator/config.json", "depth_estimator/model.safetensors", "low_res_scheduler/scheduler_config.json",
    ]  # fmt: skip
    files = pipeline(*names) | {"model_index.json": json.dumps(INDEX | more).encode()}
    assert {*choose(files)} == {*WANTED, *names, "feature_extractor/preprocessor_config.json"}
    for lost in ("unet/config.json", "tokenizer/merges.txt", "tokenizer_2/tokenizer.json"):
        with pytest.raises(wanted.Missing, match=lost.split("/")[0]):
            choose({name: data for name, data in files.items() if name != lost})
    refiner = INDEX | {"tokenizer": [None, None], "text_encoder": [None, None]} | more
    assert not any(name.startswith(("tokenizer/", "text_encoder/")) for name in choose(
        files | {"model_index.json": json.dumps(refiner).encode()}
    ))  # fmt: skip


def test_names_that_climb_are_not_even_seen():
    names = {"../config.json", "/config.json", "a/../config.json", "a\\config.json", ".config.json", "config.json\n"}
    with pytest.raises(wanted.Missing, match="is no folder"):
        wanted.choose(names | {"diffusion_pytorch_model.safetensors"}, lambda name: {}, "org/name")
